"""robovlms.py: recordings of the official code, the sheet's checklist, the matrix, what a user can get wrong.

`# sheet 12.N` beside a test: it is the N-th item of the checklist that the method was written against. The
data readers are in test_data_robovlms.py; what holds for every method, in test_methods.py.
"""
import fnmatch
import functools
import importlib.util
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import robovlms
from golden_cases import Recordings
from robovlms import (ADAPTERS, CELLS, PRESETS, ActionTokens, Config, Head, Model, Policy, collate,
                      from_pretrained, load_tokenizer, prepare)

ROOT = Path(robovlms.__file__).resolve().parent
GOLDEN = Recordings("robovlms")
TINY = PRESETS["tiny"]
LOW, HIGH = [-0.1] * 6 + [0.0], [0.1] * 6 + [1.0]
STATS = {"toy": {"action": {"q01": LOW, "q99": HIGH, "min": LOW, "max": HIGH, "mask": [True] * 6 + [False]}}}
HEAD_NAMES = {"FCDecoder": "mlp", "LSTMDecoder": "lstm", "GPTDecoder": "gpt", "DiscreteDecoder": "discrete"}
SMALL = dict(vit_heads=2, llm_heads=4, llm_kv_heads=4, norm_min=-0.65, mlp_widths=(1024, 512, 256))


def replays(*kinds):
    """As GOLDEN.replays, for several kinds; here a tensor without a tolerance is an input or a weight."""
    def mark(function):
        def test(case):
            bounds = case.load().entry["tolerance"]
            case.entry["inputs"] = [n for n in case.tensors
                                    if not any(fnmatch.fnmatchcase(n, k) for k in bounds)]
            with torch.no_grad():
                function(case)
            case.finish()
        GOLDEN.replayed.update(kinds)
        cases = [case for case in GOLDEN.cases if case.kind in kinds]
        return pytest.mark.golden(pytest.mark.parametrize("case", cases, ids=repr)(test))
    return mark


def module_of(path):
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def fill(name, shape):
    """The recordings' weights that are not stored; shared, so not to be written to."""
    return module_of(GOLDEN.folder / "fill.py").fill(name, shape)


def filled(rule):
    """The tensors of a manifest's weights rule: fill, add, multiply."""
    return {n: (fill(rule["prefix"] + n, tuple(shape)) + rule["add"].get(n, 0)) * rule["multiply"].get(n, 1)
            for n, shape in rule["params"].items()}


stored = functools.cache(load_file)


def head_config(rule, **more):
    a = rule["args"]
    assert rule["mlp_widths"] == list(Config().mlp_widths)
    return dict(head=HEAD_NAMES[rule["cls"]], width=a["hidden_size"], latent=a["latent"],
                action_dim=a["action_dim"],
                horizon=a["fwd_pred_next_n"], history=a["window_size"], **more)


def recorded_head(rule, width):
    c = head_config(rule)
    c["formulation"] = "policy_head" if c["head"] in ("lstm", "gpt") else "interleaved"
    with robovlms.no_init_weights():
        head = Head(Config(**c, llm_width=width, llm_heads=2, vit_heads=2)).eval()
    head.load_state_dict(filled(rule["weights"]))
    return head


def losses(case, head, features, arm, gripper, mask, names, whole=""):
    """Compare the loss of a head with the recorded one. names: {ours: recorded}."""
    target = torch.cat([arm, gripper[..., None]], -1).float()
    _, log = head.loss(features, target, mask)
    for ours, theirs in names.items():
        case.compare(theirs, log[ours])
    if whole:                                                  # the plain sum: not what is optimized
        case.compare(whole, log["arm"] + log["gripper"])


# ---- Recordings of the official code: heads, actions, text ------------------------------------------------

@replays(*("head_" + n for n in (
    "fc_none_latent1", "fc_none_latent2", "fc_pooling", "fc_pooling_latent2", "fc_3d", "lstm_none_latent1",
    "gpt_none",
    "lstm_none_latent2", "lstm_pooling_latent1", "gpt_samewidth_latent2")))
def test_heads_and_their_losses_match(case):                                           # sheet 12.9
    head = recorded_head(case.config["head"], case["input"].shape[-1])
    x, arm, gripper, mask = (case[n] for n in ("input", "label_arm", "label_gripper", "mask"))
    if x.ndim == 3:                                            # without a step axis: one step
        x, arm, gripper, mask = x[:, None], arm[:, None], gripper[:, None], mask[:, None]
    got, logit = head(x)
    case.compare("arm", got.reshape(case["arm"].shape).detach())
    case.compare("gripper", logit.reshape(case["gripper"].shape).detach())
    for kind, m in (("mask", mask), ("nomask", torch.ones_like(mask))):
        losses(case, head, x, arm, gripper, m, {"arm": f"{kind}_loss_arm", "gripper": f"{kind}_loss_gripper",
                                                "gripper_accuracy": f"{kind}_acc_gripper"})


@replays("rollout_lstm", "rollout_gpt")
def test_rollouts_match(case):                                                         # sheet 12.10, 12.30
    """One observation per call; from step W + 1 on, a fresh pass over the last W inputs."""
    c, x = case.config, case["inputs"][:, 0]                               # (T, 1, 1, D)
    head, W = recorded_head(c["head"], x.shape[-1]), c["window_size"]
    out = [head(x[max(0, t + 1 - W):t + 1].transpose(0, 1)) for t in range(c["steps"])]
    case.compare("arm", torch.stack([arm[:, -1:] for arm, _ in out]))
    case.compare("gripper", torch.stack([g[:, -1:, :, None] for _, g in out]))


def action_tokens(c):
    specials = c.get("special_tokens_map", {str(i): "x" for i in range(c["n_special"])} if "n_special" in c
                     else {})
    return ActionTokens(c["vocab_size"], specials, c["bins"], c["min_action"], c["max_action"])


@replays("head_discrete_loss")
def test_discrete_loss_matches(case):
    tokens = action_tokens(case.config)
    assert (tokens.base, tokens.begin, tokens.end) == tuple(case.config[k]
                                                            for k in ("orig_size", "begin_idx", "end_idx"))
    case.seen |= {"actions", "action_ids"}
    assert np.array_equal(tokens.encode(case["actions"].numpy()), case["action_ids"].numpy())
    loss, log = robovlms.discrete_loss(case["logits"], case["labels"], tokens)
    for ours, theirs in (("loss", "loss_arm"), ("arm_accuracy", "acc_arm"),
                         ("gripper_accuracy", "acc_gripper"),
                         ("l1", "action_l1")):
        case.compare(theirs, log[ours])


@replays("action_tokenizer")
def test_action_tokens_match(case):                                                    # sheet 12.13
    for i, c in enumerate(case.json()):
        tokens = action_tokens(c)
        shape = case.config["ids_2d_reshape"]
        got = {"token_ids": tokens.encode(np.array(c["actions"])).tolist(), "orig_size": tokens.base,
               "begin_idx": tokens.begin, "end_idx": tokens.end,
               "n_special": c["vocab_size"] - 10 - tokens.base,
               "decoded": tokens.decode(c["token_ids"]),
               "out_of_range_decoded": tokens.decode(c["out_of_range_ids"]),
               "ids_2d": tokens.encode(np.array(c["actions"][:14]).reshape(shape)).tolist()}
        for name, value in got.items():
            case.compare(name, value, c[name])


@replays("normalization")
def test_normalization_matches(case):
    c, a = case.config, case["action"].numpy()
    scaled = robovlms.scale_arm(a, c["norm_min"], c["norm_max"])
    every = robovlms.scale_arm(np.concatenate([a, a[:, :1]], 1), c["norm_min"], c["norm_max"])[:, :-1]
    calvin = robovlms.official_stats("calvin")["calvin"]["action"]
    back = robovlms.denormalize_actions(a, a[:, 0] > 0, {k: [v[0]] * 8 for k, v in calvin.items()},
                                        Config())[:, :-1]
    mu, regular = c["mu"], (c["x_mean"], c["x_std"])
    law, plain = robovlms.squash(a[0].astype(np.float64), mu=mu), robovlms.unsquash(a[0], regular)
    got = {"normalize_keep_last": scaled, "normalize_all": every, "unnormalize_all": back,
           "unnormalize_keep_last": np.concatenate([back[:, :-1], a[:, -1:]], 1), "mu_law_1d": law,
           "mu_law_2d": robovlms.squash(a.astype(np.float64), mu=mu),
           "inv_mu_law_1d": robovlms.unsquash(law, mu=mu),
           "regularize_2d": robovlms.squash(a, regular), "unregularize_1d": np.append(plain[:-1], a[0, -1]),
           "calvin_gripper_label": robovlms.gripper_label(case["calvin_gripper_in"].numpy(), "signed")}
    for name, value in got.items():
        case.compare(name, value)
    case.seen |= {"norm_min", "norm_max"}


@replays("random_shift_per_image", "random_shift_traj")
def test_random_shifts_match(case):                                                    # sheet 12.17
    image, shift = case["image"], case["shift"].flatten(1).long().tolist()
    frames = image.flatten(0, -4)
    got = np.stack([robovlms.random_shift(x.permute(1, 2, 0).numpy(), case.config["pad"], *xy)
                    for x, xy in zip(frames, shift)])
    case.compare("output", np.moveaxis(got, -1, 1).reshape(image.shape))


def calvin_frames(case):
    a = case["actions"].numpy() if "actions" in case else case["action"].numpy()
    return robovlms.scale_arm(a, case.config["norm_min"], case.config["norm_max"])


@replays("calvin_collate")
def test_calvin_chunks_match(case):
    c = case.config
    W, K, a, mask = c["window_size"], c["fwd_pred_next_n"], calvin_frames(case), case["action_mask"].numpy()
    case.compare("out_action", a[:, :W + K - 1])
    case.compare("out_action_chunck", np.stack([robovlms.chunks_of(x[:-1], K) for x in a]))
    case.compare("out_chunck_mask", np.stack([robovlms.chunks_of(x[:-1], K) for x in mask]))
    case.compare("out_fwd_mask", np.stack([robovlms.chunks_of(x[1:], K) for x in mask]))
    hand = torch.cat([case["out_hand_rgb"], case["out_fwd_hand_rgb_chunck"][:, W - 1]], 1).numpy()
    for name, x in (("rgb", case["rgb_static"].numpy()), ("hand_rgb", hand)):
        case.compare(f"out_{name}", x[:, :W])
        case.compare(f"out_fwd_{name}_chunck", np.stack([robovlms.chunks_of(y[1:], K) for y in x]))
    batch = collate([{"ids": torch.zeros(3, dtype=torch.long)}] * 2, Config())
    case.compare("out_text", batch["ids"])
    case.compare("out_text_mask", batch["mask"].long())


def stand_in_ids(text, e):
    """The recordings' stand-in tokenizer."""
    text = text.replace(e["remove"], "")[:e["max_characters"]]
    return e["prefix_with_special"] + [e["id_offset"] + ord(x) % e["ord_modulo"] for x in text]


def discrete_rows(case, actions, mask, openx):
    c, steps = case.config, case.config["fwd_pred_next_n"]
    text = robovlms.openx_prompt(c["lang"], steps + (not openx), c["tokenizer"]["bos_token"],
                                 c["tokenizer"]["eos_token"])
    assert openx or c["prompt_human"] in text
    prompt, K = stand_in_ids(text, c["tokenizer"]["encode"]), c["fwd_pred_next_n"]
    rows = [robovlms.action_row(prompt, chunk, m, action_tokens(c["action_tokenizer"]), 2, openx)
            for chunk, m in zip(robovlms.chunks_of(actions, K), robovlms.chunks_of(mask, K))]
    return [torch.stack(x)[:c["window_size"]] for x in zip(*rows)]


@replays("calvin_wrap_discrete")
def test_calvin_discrete_rows_match(case):
    ids, labels = discrete_rows(case, case["actions"].numpy(), case["action_mask"].numpy(), False)
    case.compare("input_ids", ids)
    case.compare("labels", labels)


def openx_chunks(case):
    c, a, mask = case.config, calvin_frames(case), case["episode_mask"].numpy()
    K = c["fwd_pred_next_n"]
    case.compare("out_action_tensors", a[:-1])
    case.compare("out_action_mask", mask[:-1])
    case.compare("out_action_chunk", robovlms.chunks_of(a[:-1], K))
    case.compare("out_action_chunk_mask", robovlms.chunks_of(mask[:-1], K))
    images = np.moveaxis(case["images"].numpy(), -1, 1).astype(np.float32)
    return a, mask, images


@replays("oxe_transform_interleave_discrete")
def test_openx_discrete_rows_match(case):
    c = case.config
    a, mask, images = openx_chunks(case)
    a[:, -1] = 2 * a[:, -1] - 1
    ids, labels = discrete_rows(case, a[:-1], mask[:-1], True)
    case.compare("out_input_ids", ids)
    case.compare("out_labels", labels)
    case.compare("out_image_tensors", images[:c["window_size"]])
    case.compare("out_image_chunk", robovlms.chunks_of(images[1:], c["fwd_pred_next_n"]))
    case.compare("out_image_chunk_mask", robovlms.chunks_of(mask[1:], c["fwd_pred_next_n"]))
    case.compare("out_attention_mask", (~action_tokens(c["action_tokenizer"]).holds(ids)).byte())


@replays("oxe_transform_interleave_continuous")
def test_openx_continuous_samples_match(case):
    c = case.config
    _, mask, images = openx_chunks(case)
    text = robovlms.openx_prompt(c["lang"], c["fwd_pred_next_n"], "<s>", "</s>")
    ids = stand_in_ids(text, c["tokenizer"]["encode"]) + c["tokenizer"]["encode"]["suffix_with_special"]
    case.compare("out_input_ids", ids)
    case.compare("out_labels", ids)
    case.compare("out_attention_mask", np.ones(len(ids), np.uint8))
    case.compare("out_image_tensors", images[:c["window_size"]])
    case.compare("out_image_chunk", robovlms.chunks_of(images[1:], c["fwd_pred_next_n"]))
    case.compare("out_image_chunk_mask", robovlms.chunks_of(mask[1:], c["fwd_pred_next_n"]))


@replays("prompts")
def test_prompts_match(case):
    c, want = case.config, case.json()["prompts"]
    for name, b in c["builders"].items():
        if name in ("phi", "phi_mpt", "qwen"):                 # the others: none of the seven's names
            got = robovlms.openx_prompt(c["task"], c["K"], b["bos"], b["eos"])
            case.compare(name, got, want[name])
    instruction, eos = c["text_functions"]["input"][0], c["text_functions"]["tokenizer"]["eos_token"]
    for name in want:
        backbone = name.removeprefix("text_fn_")
        if name.startswith("text_fn_") and backbone != "llava_orig":       # unused upstream
            got = robovlms.wrapper_prompt(backbone, instruction, eos)
            case.compare(name, got, want[name]["text"][0])
            assert want[name]["kwargs"].get("add_special_tokens", True) == (backbone != "paligemma")


@replays("image_preprocess")
def test_image_preprocessing_matches(case):
    image = torch.from_numpy(robovlms.resize(case["image"].numpy(), case.config["size"][0]))
    assert robovlms.CLIP_PIXELS == (tuple(case.config["mean"]), tuple(case.config["std"]))
    case.compare("output", robovlms.normalize_pixels(image[None], *robovlms.CLIP_PIXELS)[0])


@replays("half_cosine")
def test_half_cosine_schedule_matches(case):
    """train.py's cosine, raised by min_lr_scale (which no released recipe uses)."""
    from train import lr_factor
    c, want = case.config, case.json()
    for step, scale in zip(want["steps"], want["scale"]):
        cfg = SimpleNamespace(warmup=c["warmup_iters"], steps=c["iters"], lr_schedule="cosine")
        low = c["min_lr_scale"]
        got = step / c["warmup_iters"] if step < c["warmup_iters"] else low + (1 - low) * lr_factor(cfg, step)
        case.compare("scale", got, scale)


@replays("perceiver_resampler")
def test_perceiver_resampler_matches(case):                                            # sheet 12.25
    c, x = case.config, case["input"]
    net = robovlms.PerceiverResampler(c["dim"], c["depth"], c["num_latents"], c["dim_head"], c["heads"])
    net.load_state_dict(case.weights(c["weights"]["prefix"]))
    case.compare("output", net(x.flatten(2, 3).flatten(0, 1)).reshape(case["output"].shape).detach())


@replays("gated_cross_attention")
def test_gated_cross_attention_matches(case):                                          # sheet 12.25
    c, text, media = case.config, case["text"], case["media"]
    net = robovlms.GatedCrossAttention(c["dim"], c["dim_visual"], c["dim_head"], c["heads"])
    net.load_state_dict(case.weights(c["weights"]["prefix"]))
    times = case["media_locations"].long().cumsum(1)[..., None]                            # (B, L, 1)
    which = torch.arange(1, media.shape[1] + 1)
    case.compare("output", net(text, media, times == which))
    cached = times[:, -1:].expand(-1, 2, -1)
    case.compare("output_cached_first2", net(text[:, :2], media, cached == which))
    some = (times > 0)[..., 0].numpy()       # a word before all media: officially an average, here nothing
    case.compare("output_all_previous_media", net(text, media, times >= which)[some], part=some)
    net.attn_gate.zero_(), net.ff_gate.zero_()
    assert torch.equal(net(text, media, times == which), text)


# ---- Recordings: whole models -----------------------------------------------------------------------------

def model_config(c):
    """The Config of a recorded KosMos, PaliGemma or Flamingo model."""
    kinds = {"pre": "interleaved", "video": "video"}
    space, W = c["action_space"], c["window_size"]
    a = c["act_head"]
    values = dict(
        SMALL, backbone=c.get("backbone", "flamingo"), history=W, horizon=c["fwd_pred_next_n"],
        head=HEAD_NAMES[a["type"]], latent=a["latent"], width=a["hidden_size"],
        fill_zero=a.get("fill_zero", False),
        formulation=kinds.get(c["history_type"], "one_step" if W == 1 else "policy_head"),
        read=a.get("token_source", "all") if space == "down_sample" else "query", n_bin=a.get("n_bin", 256),
        views=("third", "wrist") if c["gripper_camera"] else ("third",), llm_width=c["hidden_size"],
        dropout=0.1,
        bos=c["tokenizer"].get("bos_token") is not None, eos=c["tokenizer"].get("eos_token") is not None,
        resampler=c.get("use_vision_resampler", False))
    if space == "discrete":
        values |= {"formulation": "one_step", "history": 1}
    b = c.get("backbone_config")
    if values["backbone"] == "kosmos":
        t, v = b["text_config"], b["vision_config"]
        values |= dict(vocab=t["vocab_size"], llm_depth=t["layers"], llm_mlp=t["ffn_dim"], pad_id=1,
                       llm_heads=t["attention_heads"], image_tokens=b["latent_query_num"])
    elif values["backbone"] == "paligemma":
        t, v = b["text_config"], b["vision_config"]
        values |= dict(vocab=t["vocab_size"], llm_depth=t["num_hidden_layers"],
                       llm_mlp=t["intermediate_size"],
                       llm_heads=t["num_attention_heads"], llm_kv_heads=t["num_key_value_heads"],
                       llm_head_dim=t["head_dim"], pad_id=0)
    else:
        p, v, ids = c["perceiver"], c["vision"], c["token_ids"]
        lm = c["language_model_config"]
        values |= dict(llm={"gpt_neox": "neox"}.get(c["language_model"], "mpt"), vocab=lm["vocab_size"],
                       llm_depth=lm.get("n_layers", lm.get("num_hidden_layers")),
                       cross_every=c["cross_attn_every_n_layers"],
                       llm_mlp=lm.get("intermediate_size", 1), resampler_depth=p["depth"],
                       resampler_latents=p["num_latents"], vit_width=p["dim"], vit_mlp=16, vit_depth=1,
                       vit_heads=1,
                       image_size=v["image_size"], patch_size=v["patch"], pad_id=ids["pad"],
                       image_start_id=ids["<image>"], image_end_id=ids["<|endofchunk|>"])
        return Config(**values)
    return Config(**values | dict(vit_width=v["hidden_size"], vit_depth=v["num_hidden_layers"],
                                  vit_mlp=v["intermediate_size"],
                                  vit_heads=v["num_attention_heads"], image_size=v["image_size"],
                                  patch_size=v["patch_size"]))


def recorded_model(case):
    c = case.config
    with robovlms.no_init_weights():
        model = Model(model_config(c)).eval()
    weights = stored(case.path(c["backbone_weights"]["source"]))
    state = {n: t for n, t in weights.items() if not n.endswith("lm_head.weight")}
    if "head" in c:
        state |= {f"act_head.{n}": t for n, t in filled(c["head"]["weights"]).items()}
    if "action_token" in c and c["action_token"] and c["action_space"] == "continuous":
        t = c["action_token"]
        state["action_token"] = t["scale"] * fill(t["fill_name"], tuple(t["shape"]))
    for n, p in model.named_parameters():
        if n.startswith("vision_resampler."):
            norm = n.endswith("weight") and p.ndim == 1
            state[n] = fill(n, tuple(p.shape)) + norm
    model.load_state_dict(state)
    return model


def pictures(case):
    return torch.stack([case[n] for n in ("rgb", "hand_rgb") if n in case],
                       2)             # (B, W, V, 3, h, w)


@replays(*("kosmos_" + n for n in (
    "post_lstm", "post_lstm_static_only", "post_lstm_latent2", "post_gpt", "onestep_fc", "interleaved_fc",
    "video_fc",
    "down_sample_all", "down_sample_text", "down_sample_vision", "post_lstm_fill_zero",
    "post_lstm_no_eos_bos",
    "post_lstm_resampler", "onestep_discrete", "interleaved_discrete")),
    *("paligemma_" + n for n in ("post_lstm", "interleaved_fc", "onestep_fc", "onestep_discrete")))
def test_whole_models_match(case):                                         # sheet 12.7, 12.8, 12.27
    model = recorded_model(case)
    tokens = model.see(pictures(case))
    B, W = tokens.shape[:2]
    if case.config["action_space"] == "discrete":
        return replay_discrete(case, model, tokens)
    rows, mask = model.rows(tokens, case["text"], case["text_mask"])
    case.compare("inputs_embeds", rows)
    case.compare("attention_mask", mask.byte())
    case.compare("last_hidden", model.backbone.lm(rows, mask))
    compare_head(case, model, model.think(tokens, case["text"], case["text_mask"]))


def compare_head(case, model, features):
    case.compare("head_input", features.reshape(case["head_input"].shape))
    arm, logit = model.act_head(features)
    case.compare("arm", arm.reshape(case["arm"].shape))
    case.compare("gripper", logit.reshape(case["gripper"].shape))
    label, gripper, m = (case[n] for n in ("label_arm", "label_gripper", "chunck_mask"))
    if m.ndim == 2:                                            # video: one step
        label, gripper, m = label[:, None], gripper[:, None], m[:, None]
    losses(case, model.act_head, features, label, gripper, m,
           {"arm": "out_loss_arm_act", "gripper": "out_loss_gripper_act",
                                                               "gripper_accuracy": "out_acc_gripper_act"},
                                                               "out_loss")


def replay_discrete(case, model, tokens):
    ids, mask = case["instr_and_action_ids"], case["instr_and_action_mask"]
    B, W, L = ids.shape
    rows, row_mask = model.rows(tokens, ids, mask)
    case.compare("inputs_embeds", rows)
    case.compare("attention_mask", row_mask.byte())
    logits = model.backbone.logits(model.backbone.lm(rows, row_mask))
    case.compare("logits", logits)
    labels = case["instr_and_action_labels"].flatten(0, 1)
    P = rows.shape[1] // W - L
    labels = robovlms.insert(labels, labels.new_full((B * W, P), -100), 1).reshape(B, -1)
    t = action_tokens(case.config["action_tokenizer"])
    _, log = robovlms.discrete_loss(logits, labels, t)
    for ours, theirs in (("loss", "out_loss_arm_act"), ("loss", "out_loss"),
                         ("arm_accuracy", "out_acc_arm_act"),
                         ("gripper_accuracy", "out_acc_gripper_act"), ("l1", "out_action_l1_act")):
        case.compare(theirs, log[ours])
    if "decoded_action" in case:
        words = model.decode(tokens[:1], case["prompt_ids"], case.config["decode"]["new_tokens"])
        a = t.decode(words.numpy()[:, :7])
        a[:, -1] = np.where(a[:, -1] > 0, 1, -1)
        case.compare("decoded_action", a)


@replays(*("flamingo_" + n for n in ("mpt_post_lstm", "mpt_onestep_fc", "neox_post_lstm", "neox_onestep_fc")))
def test_flamingo_matches(case):                                                       # sheet 12.26
    c = case.config
    with robovlms.no_init_weights():
        model = Model(model_config(c)).eval()
    v, weights = c["vision"], stored(case.path(c["stored_weights"]["file"]))
    state = {n.removeprefix("param."): t for n, t in weights.items() if n.startswith("param.")}
    linear = nn.Linear(*v["linear"])                           # in place of CLIP, as recorded
    linear.weight, linear.bias = (nn.Parameter(state.pop(name)) for name in v["names"])

    def patches(x):                                            # (N, 3, h, w) -> (N, 1 + P, Dv)
        p = v["patch"]
        x = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return F.pad(linear(x), (0, 0, 1, 0))                  # with a class token, which is dropped
    model.backbone.patches = patches
    state = {f"backbone.{n}": t for n, t in state.items() if "embed_out" not in n}
    state |= {f"act_head.{n}": t for n, t in filled(c["head"]["weights"]).items()}
    own = {n: p for n, p in model.state_dict().items() if "vision_tower" in n}
    model.load_state_dict(own | state)
    tokens = model.see(pictures(case))
    compare_head(case, model, model.think(tokens, case["text"], case["text_mask"]))


@replays("kosmos_rollout_post_lstm")
def test_kosmos_rollout_matches(case):
    """One frame per call; the memory holds W query states."""
    model, x, memory = recorded_model(case), torch.stack([case["rgb"], case["hand_rgb"]], 3), []
    W, arms, grippers = case.config["window_size"], [], []
    for t in range(case.config["steps"]):
        memory = [*memory, model.think(model.see(x[t]), case["text"], case["text_mask"])][-W:]
        arm, logit = model.act_head(torch.cat(memory, 1))
        arms.append(arm[:, -1:]), grippers.append(logit[:, -1:, :, None])
    case.compare("arm", torch.stack(arms).reshape(case["arm"].shape))
    case.compare("gripper", torch.stack(grippers).reshape(case["gripper"].shape))


# ---- Recordings: acting, names of the released checkpoints ------------------------------------------------

def acting(cfg, name, **how):
    return Policy(SimpleNamespace(cfg=cfg, stats=robovlms.official_stats(name)), **how)


def decode_recorded(case, cfg, name):
    arm, logit = (case[n].flatten(0, 2) for n in ("arm", "gripper_logit"))                 # (T, K, .)
    stats = robovlms.official_stats(name)[name]["action"]
    return robovlms.denormalize_actions(arm.numpy(), logit[..., 0].numpy() > 0, stats, cfg)


@replays("calvin_step_continuous")
def test_calvin_step_matches(case):                                                    # sheet 12.18
    cfg = Config(gripper="signed", horizon=4)
    policy, chunks = acting(cfg, "calvin", robot="calvin"), decode_recorded(case, cfg, "calvin")
    got = np.stack([policy.step({"instruction": "x"}, chunk) for chunk in chunks])
    case.compare("action", got)
    assert set(got[:, -1]) <= {-1.0, 1.0} and np.allclose(got[:, :6], 0.65 * case["arm"][:, 0, 0, 0].numpy())


@replays("calvin_step_nonraw")
def test_calvin_step_in_the_gripper_frame_matches(case):
    cfg = Config(gripper="signed", horizon=4)
    arm, g = case["arm"][0].numpy(), case["gripper_logit"][0, ..., 0].numpy() > 0
    chunk = robovlms.denormalize_actions(arm, g, robovlms.official_stats("calvin")["calvin"]["action"],
                                         cfg)[0]
    policy = acting(cfg, "calvin", robot="calvin_gripper_frame")
    case.compare("action", policy.step({"instruction": "x", "state": case["robot_obs"].numpy()}, chunk))


@replays("calvin_step_discrete")
def test_calvin_discrete_step_matches(case):
    cfg, a = Config(gripper="signed", head="discrete", formulation="one_step", history=1,
                    horizon=1), case["decoded"].numpy()
    stats = robovlms.official_stats("calvin")["calvin"]["action"]
    case.compare("action", robovlms.denormalize_actions(a[..., :-1], a[..., -1] > 0, stats, cfg)[:, 0])


class Fixed(nn.Module):
    """A head that returns what was recorded."""

    def forward(self, features):
        return self.out

    act = Head.act


@replays("calvin_step_interleaved_published")
def test_published_interleaved_evaluation_acts_on_the_oldest_frame(case):
    rows, newest = [], []
    for published, out in ((True, rows), (False, newest)):
        cfg = cell("kosmos", "interleaved", "mlp", horizon=4, published_step=published, gripper="signed",
                   norm_min=-0.65, norm_max=0.65)
        model = Model(cfg, stats=robovlms.official_stats("calvin")).eval()
        model.act_head, policy = Fixed(), Policy(model)
        for i in range(case.config["steps"]):
            model.act_head.out = case[f"arm_{i}"], case[f"gripper_logit_{i}"][..., 0]
            out.append(policy.step(look(i)))
    case.compare("action_published", np.stack(rows))
    assert np.allclose(newest[3][:6], 0.65 * case["arm_3"][0, -1, 0].numpy(), atol=1e-6)


@replays("ensemble_action")
def test_an_ensemble_of_one_is_the_newest_chunk(case):
    policy = acting(Config(gripper="signed", horizon=4), "calvin")
    for i, chunk in enumerate(case["chunks"]):
        policy.step({"instruction": "x"}, chunk)
        case.compare("output", policy.raw, want=case["output"][i])


@replays("simpler_step_widowx_bridge", "simpler_step_google_robot")
def test_simpler_policies_match(case):
    cfg, key = Config(horizon=4), case.config["unnorm_key"]
    policy, rows = acting(cfg, key, robot=case.config["policy_setup"]), []
    assert policy.unnorm_key == key
    for chunk in decode_recorded(case, cfg, key):
        sent = policy.step({"instruction": "x"}, chunk)
        rows.append((sent[:3], sent[3:6], policy.raw[3:6], policy.raw[6:], sent[6:]))
    for name, got in zip(("world_vector", "rot_axangle", "rotation_delta", "open_gripper", "gripper"),
                         zip(*rows)):
        case.compare(name, np.stack(got))


@replays("keys_kosmos2", "keys_paligemma")
def test_names_of_released_checkpoints_match(case):
    """Names and shapes of the released checkpoints, on the meta device, strict."""
    preset = {"keys_kosmos2": "kosmos_calvin_abcd", "keys_paligemma": "paligemma_calvin"}[case.kind]
    recorded = case.json()
    with torch.device("meta"):
        model = Model(PRESETS[preset])
        for kind, head in recorded["heads"].items():
            model.act_head = Head(replace(model.cfg, head=HEAD_NAMES[kind], formulation="interleaved"))
            shapes = recorded["backbone_and_action_token"] | head
            got = robovlms.rename_official({n: torch.empty(shape) for n, shape in shapes.items()})
            assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in model.state_dict().items()}
            case.seen.add(kind)
    count = sum(p.numel() for p in model.backbone.parameters())
    case.compare("backbone_parameters", count, recorded["backbone_parameters"])


# read by the tests above
GOLDEN.replayed |= {"kosmos_backbone_weights", "paligemma_backbone_weights", "meta_heads", "meta_kosmos",
                    "meta_paligemma", "meta_flamingo", "meta_eval"}


@pytest.mark.golden
def test_every_recording_is_replayed():
    GOLDEN.check("test_data_robovlms.py")


# ---- The sheet's checklist --------------------------------------------------------------------------------

def look(i=0, text="pick up the red cube", views=("third",)):
    """An observation; the picture differs with i."""
    rng = np.random.default_rng(i)
    return {"images": {v: rng.integers(0, 255, (40, 48, 3), np.uint8) for v in views}, "instruction": text}


def sample(cfg, i=0, n=None, text="pick up the red cube"):
    """A training sample with n - 1 earlier frames."""
    n, rng = cfg.history if n is None else n, np.random.default_rng(i)
    frames = {v: rng.integers(0, 255, (n, 40, 48, 3), np.uint8) for v in cfg.views}
    actions = np.append(rng.uniform(-0.1, 0.1, 6),
                        i % 2).astype(np.float32) * np.ones((n - 1 + cfg.horizon, 1), np.float32)
    return {"images": {v: f[-1] for v, f in frames.items()},
            "history_images": {v: f[:-1] for v, f in frames.items()},
            "instruction": text, "history_actions": actions[:n - 1], "actions": actions[n - 1:],
            "dataset": "toy"}


def batch_of(cfg, samples):
    return collate([prepare(s, cfg, load_tokenizer(cfg), STATS, key=1, train=True) for s in samples], cfg)


def cell(backbone="kosmos", formulation="policy_head", head="lstm", **more):
    """A cell of the matrix: the tiny preset, smaller still."""
    small = dict(image_size=48, image_tokens=16, vit_depth=2, llm_depth=2, resampler_depth=1,
                 history=1 if formulation == "one_step" else 3)
    return replace(TINY, backbone=backbone, formulation=formulation, head=head, **{**small, **more})


@torch.no_grad()
def row_of(cfg, instructions):
    model = Model(cfg, load_tokenizer(cfg), STATS)
    model.action_token.fill_(7.0)
    batch = batch_of(cfg, [sample(cfg, i, text=t) for i, t in enumerate(instructions)])
    tokens = model.look_at(batch["images"])
    rows, mask = model.rows(tokens, batch["ids"], batch["mask"])
    return model, batch, tokens, rows, mask


def test_rows_hold_gripper_static_text_query_end():                                    # sheet 12.1
    """<s> | 64 gripper | 64 static | text | ACT | </s>: ACT at N - 2."""
    cfg = cell("kosmos", "one_step", "mlp", views=("third", "wrist"))
    model, batch, tokens, rows, _ = row_of(cfg, ["push"])
    P, words = cfg.image_tokens, model.backbone.words(batch["ids"])[0]
    want = [words[:1], tokens[0, 0, 1], tokens[0, 0, 0], words[1:-1], model.action_token[None], words[-1:]]
    assert torch.equal(rows[0], torch.cat(want)) and rows.shape[1] == len(words) + 2 * P + 1
    assert torch.equal(rows[0, -2], model.action_token)


def test_query_of_a_short_prompt_lies_after_its_padding():                             # sheet 12.2
    cfg = cell("kosmos", "one_step", "mlp")
    model, batch, _, rows, mask = row_of(cfg, ["push", "pick up the red cube and put it down"])
    gap = int((~batch["mask"][0]).sum())
    assert gap > 3 and torch.equal(rows[0, -2], model.action_token)
    assert mask[0, -1] == 0 and mask[0, -2] == 1 and not mask[0, -1 - gap:-2].any() and mask[1].all()


def test_without_bos_and_eos_pictures_come_first_and_the_query_last():                 # sheet 12.3
    cfg = cell("kosmos", "one_step", "mlp", bos=False, eos=False)
    model, _, tokens, rows, _ = row_of(cfg, ["push"])
    assert torch.equal(rows[0, :cfg.image_tokens], tokens[0, 0, 0]) and torch.equal(rows[0, -1],
                                                                                    model.action_token)


def test_a_fresh_gpt_head_is_drawn_as_upstream():
    """normal(0, 0.02) in all of GPT-2; transformers draws the projections into the residual smaller."""
    head = Head(cell(head="gpt"))
    for name, p in head.gpt.named_parameters():
        assert p.ndim < 2 or 0.018 < p.std() < 0.022 or "wpe" in name, name


def test_two_latents_are_equal_and_double_the_heads_width():                           # sheet 12.4
    cfg = cell("kosmos", "one_step", "lstm", latent=2)
    model, _, _, rows, _ = row_of(cfg, ["push"])
    assert torch.equal(rows[0, -2], rows[0, -3]) and torch.equal(rows[0, -2], model.action_token)
    assert model.act_head.rnn.weight_ih_l0.shape == (4 * 2 * cfg.width, 2 * cfg.llm_width)


@torch.no_grad()
@pytest.mark.parametrize("formulation, head", [("interleaved", "mlp"), ("policy_head", "lstm")])
def test_no_step_sees_a_later_frame_and_history_has_its_place(formulation, head):      # sheet 12.5, 12.6
    """interleaved: one row of 3 N tokens; policy_head: an earlier frame reaches a later step by the head."""
    cfg = cell("kosmos", formulation, head)
    model, batch, tokens, rows, _ = row_of(cfg, ["push"])
    assert rows.shape[0] == (1 if formulation == "interleaved" else 3)
    for changed, same in ((2, [0, 1]), (0, [] if formulation == "interleaved" else [1, 2])):
        other = tokens.clone()
        other[:, changed] += torch.randn(other.shape[-1])
        before, after = (model.think(t, batch["ids"], batch["mask"])[0, :, 0] for t in (tokens, other))
        assert all(torch.allclose(before[i], after[i], atol=1e-6) for i in same)
        assert not torch.allclose(before[changed], after[changed], atol=1e-4)
    assert not torch.allclose(model.act_head(before[None, :, None])[0][0, 1], model.act_head(
        after[None, :, None])[0][0, 1], atol=1e-7)


def test_loss_is_arm_plus_a_hundredth_of_gripper():                                    # sheet 12.11
    cfg = cell(gripper_weight=Config().gripper_weight)
    loss, log = Model(cfg, None, STATS).loss(batch_of(cfg, [sample(cfg, i) for i in range(2)]))
    assert cfg.gripper_weight == 0.01 and torch.allclose(loss, log["arm"] + 0.01 * log["gripper"])


def test_huber_is_half_of_mse_for_small_errors():                                      # sheet 12.12
    cfg = cell()
    head, x, m = Head(cfg), torch.randn(1, 3, 1, cfg.llm_width), torch.ones(1, 3, cfg.horizon)
    arm, _ = head(x)
    target = torch.cat([arm + 0.3, torch.ones_like(arm[..., :1])], -1).detach()
    assert torch.allclose(head.loss(x, target, m)[1]["arm"], torch.tensor(0.5 * 0.3 ** 2))


def test_padded_steps_and_missing_history_are_not_in_the_loss():
    cfg = cell()
    short, full = sample(cfg, 1, n=1), sample(cfg, 2)
    short["loss_mask"] = np.arange(cfg.horizon) < 2
    batch = batch_of(cfg, [short, full])
    assert batch["loss_mask"][0].sum() == 2 and batch["loss_mask"][1].all()
    del full["history_actions"]                                # only the newest frame is trained then
    mask = batch_of(cfg, [full])["loss_mask"][0]
    assert not mask[:2].any() and mask[2].all()


def test_chunk_targets_shift_by_one_per_step():                                        # sheet 12.22
    chunks = robovlms.chunks_of(np.arange(6), 4)
    assert chunks.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]


def test_action_words_saturate_round_trip_and_depend_on_specials():                    # sheet 12.13, 12.14
    t = ActionTokens(1000, {"bos_token": "a", "eos_token": "b", "additional_special_tokens": ["x", "y", "z"]})
    assert t.encode(np.array([-9, -1, 1, 9])).tolist() == [t.base - 1] * 2 + [t.base - 256 + (0)] * 2
    x = np.linspace(-1, 1, 999)
    assert np.abs(t.decode(t.encode(x)) - x).max() <= 1 / 255 + 1e-9
    assert t.decode([t.base + 5, 0]).tolist() == [t.bins.centers[0], t.bins.centers[-1]]
    assert t.base == 1000 - 5 - 10 and ActionTokens(1000, {"bos_token": "a"}).base == t.base + 4


def test_arm_is_scaled_by_065_saturates_and_the_gripper_is_not_touched():              # sheet 12.15, 12.16
    a = np.array([[-0.65, 0.65, 2.0, -2.0, 0, 0.325, 0.4]])
    assert robovlms.scale_arm(a, -0.65, 0.65).tolist() == [[-1, 1, 1, -1, 0, 0.5, 0.4]]
    assert robovlms.gripper_label(np.array([-1.0, 1.0]), "signed").tolist() == [0, 1]
    assert robovlms.gripper_label(np.array([0.0, 0.7, 1.0]), "unit").tolist() == [0, 0, 1]


def test_shifts_differ_between_frames(monkeypatch):                                    # sheet 12.17
    rng, shift, drawn = np.random.default_rng(0), robovlms.random_shift, []
    x = rng.random((20, 20, 3))
    padded = np.pad(x, ((4, 4), (4, 4), (0, 0)), "edge")
    assert np.array_equal(robovlms.random_shift(x, 4, 7, 2), padded[2:22, 7:27])
    cfg = replace(TINY, augment=True, history=3, views=("third",))
    s = sample(cfg)
    for v in ("images", "history_images"):
        s[v]["third"] = s["images"]["third"] if v == "images" else np.stack([s["images"]["third"]] * 2)
    monkeypatch.setattr(robovlms, "random_shift", lambda *a: (drawn.extend(a[2:]), shift(*a))[1])
    for key in (*range(40), 5):
        frames = robovlms.frames_of(s, cfg, True, key)
    assert min(drawn) == 1 and max(drawn) == 20                # never 0, upstream's slip
    assert not np.array_equal(frames[0], frames[1]) and np.array_equal(frames,
                                                                       robovlms.frames_of(s, cfg, True, 5))


def test_widowx_opens_on_the_second_open_and_google_holds_for_two():                   # sheet 12.19, 12.20
    widow, google = (acting(Config(), "calvin", robot=r) for r in ("widowx_bridge", "google_robot"))
    assert [widow.simpler_gripper(g) for g in (1, 1, 0, 1, 1)] == [-1, 1, -1, -1, 1]
    assert [google.simpler_gripper(g) for g in (1, 0, 0, 0)] == [0, 2, 2, 0]


def history(observations):
    return {**observations[-1], "history_images": {v: np.stack([o["images"][v] for o in observations[:-1]])
            for v in observations[0]["images"]}} if len(observations) > 1 else observations[-1]


SESSIONS = [cell(), cell(head="gpt"), cell("flamingo"), cell("qwen", "interleaved", "mlp"),
            cell("kosmos", "interleaved", "lstm"),
            cell("kosmos", "interleaved", "gpt"),
            cell("kosmos", "interleaved", "diffusion", num_train_steps=3),
            cell("kosmos", "video", "mlp"), cell("kosmos", "one_step", "mlp"),
            cell("kosmos", "one_step", "discrete", horizon=1),
            cell("paligemma"), cell("moondream", resampler=True)]


@pytest.mark.parametrize("cfg", SESSIONS, ids=lambda c: f"{c.backbone}_{c.formulation}_{c.head}")
def test_a_session_equals_recomputing_the_window(cfg):                                 # sheet 12.28, 12.30
    """Bar 4: only the newest frame is looked at; fp32, 1e-5, through a reset and beyond the window."""
    model = Model(cfg, load_tokenizer(cfg), STATS).eval()
    policy, seen, looked = Policy(model), [], []
    model.look_at, look_at = lambda images: (looked.append(images.shape[0]),
                                             look_at(images))[1], model.look_at
    for i, text in enumerate(["push"] * 5 + ["pick up the red cube"] * 2):
        seen = seen if i != 5 else []
        seen.append(look(i, text))
        noise = torch.randn(cfg.num_train_steps, 1, cfg.horizon, 7,
                            generator=torch.Generator().manual_seed(i))
        how = {"noise": noise} if cfg.head == "diffusion" else {}
        looked.clear()
        chunk = model.act([policy.ask(seen[-1])], **how)[0]
        assert looked == [1]                                   # one frame, whatever the window is
        again = model.act([history(seen[-cfg.history:])], **how)[0]
        assert looked[1] == (min(len(seen), cfg.history) if cfg.head != "discrete" else 1)
        assert np.allclose(chunk, again, rtol=0, atol=1e-5)
        assert len(policy.memory) == (min(len(seen), cfg.history) if cfg.head != "discrete" else 0)
    policy.reset()
    assert not policy.memory and policy.needs_chunk


def test_a_control_step_of_kosmos_takes_at_most_042_teraflops():
    """Bar 4, counted on the meta device: one new frame, 25 words, the window's 16 states."""
    from torch.utils.flop_counter import FlopCounterMode
    cfg = replace(PRESETS["kosmos_oxe"], compute="fp32")
    with torch.device("meta"), torch.no_grad():
        model = Model(cfg).requires_grad_(False).eval()
        images, ids = torch.empty(1, 1, 1, 224, 224, 3, dtype=torch.uint8), torch.empty(1, 25,
                                                                                        dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            features = model({"images": images, "ids": ids, "mask": torch.ones_like(ids)})
            model.act_head(features.expand(-1, cfg.history, -1, -1))
    assert 0.35e12 < counter.get_total_flops() <= 0.42e12


def test_a_batch_equals_its_members():
    cfg = cell()
    model, seen = Model(cfg, load_tokenizer(cfg), STATS).eval(), [look(i, t) for i, t in enumerate(
        ["push", "pick up the red cube", "push"])]
    whole = model.act(seen)[0]
    assert np.allclose(whole, np.concatenate([model.act([o])[0] for o in seen]), atol=1e-6)


def test_words_that_are_no_actions_hold_the_pose_and_say_so():
    for official in (False, True):
        cfg = cell("kosmos", "one_step", "discrete", horizon=2, official_decode=official)
        model = Model(cfg, load_tokenizer(cfg), STATS).eval()
        model.backbone.embedding.weight.data[cfg.action_base - cfg.n_bin:cfg.action_base] = 0
        chunks, info = model.act([look()])
        assert info["parse_failed"].all() and (official or not chunks[..., :6].any())


OFFICIAL = {"robovlm_name": "RoboKosMos", "model": "kosmos", "window_size": 16, "fwd_pred_next_n": 10,
            "seq_len": 1,
            "use_hand_rgb": True, "norm_action": True, "norm_min": -0.65, "norm_max": 0.65,
            "learning_rate": 2e-5,
            "arm_gripper_loss_ratio": 0.01, "image_size": 224, "some_future_key": 3,
            "trainer": {"precision": "16"},
            "train_setup": {"train_vision": True, "train_text_embedding": True, "freeze_backbone": False,
                            "predict_forward": False},
            "act_head": {"type": "LSTMDecoder", "hidden_size": 1024, "action_dim": 7, "down_sample": "none",
                         "latent": 1,
                         "fwd_pred_next_n": 1, "window_size": 1, "with_history": True,
                         "action_space": "continuous",
                         "history_type": "post"}, "train_dataset": {"type": "DiskCalvinDataset"}}


def test_official_configs_are_read_with_their_parents(tmp_path):                       # sheet 12.23
    (tmp_path / "base.json").write_text(json.dumps(OFFICIAL))
    child = {"parent": "base.json", "window_size": 8, "act_head": {"latent": 2}}
    (tmp_path / "child.json").write_text(json.dumps(child))
    cfg, notes = robovlms.read_official_config(tmp_path / "base.json")
    assert replace(cfg, data="") == PRESETS["kosmos_calvin_abcd"] and cfg.data and any("some_future_key" in n
                                                                                       for n in notes)
    cfg, _ = robovlms.read_official_config(tmp_path / "child.json")
    assert (cfg.history, cfg.horizon, cfg.latent, cfg.width) == (8, 10, 2,
                                                                 1024)      # inner W and K are ignored
    for change, complaint in (({"train_setup": {"predict_caption": True}}, "predict_caption"),
                              ({"act_head": {"type": "FCDecoder", "action_space": "down_sample"}},
                               "act_head.down_sample"),
                              ({"act_head": {"type": "X"}}, "act_head.type"),
                              ({"robovlm_name": "RoboX"}, "no backbone"),
                              ({"parent": "gone.json"}, "gone.json")):
        (tmp_path / "bad.json").write_text(json.dumps({**OFFICIAL, **change}))
        with pytest.raises(ValueError, match=complaint):
            robovlms.read_official_config(tmp_path / "bad.json")


def test_every_key_of_the_schema_is_read_or_reported(tmp_path):
    """The sheet's section 8.1: what acts, what is reported, in a JSON with everything in it."""
    setup = {"precision": "bf16", "predict_action": True, "predict_forward": False, "predict_caption": False,
             "bits": -1,
             "train_vision": True, "freeze_backbone": False, "freeze_resampler": True,
             "train_text_embedding": False,
             "train_decoder_layers": 2, "lora_enable": True, "lora_r": 8, "lora_alpha": 16,
             "gradient_checkpointing": False}
    about = {**OFFICIAL, "train_setup": setup, "use_state": True, "tcp_rel": True, "regular_action": True,
             "x_mean": 0.1,
             "x_std": 0.5, "use_mu_law": True, "mu_val": 100, "gradient_clip_val": 0.5, "warmup_steps": 7,
             "scheduler": "cosine",
             "learning_rate": 1e-4, "weight_decay": 0.1, "batch_size": 3, "seed": 5, "norm_action": False,
             "use_vision_resampler": True, "vision_resampler": {"depth": 8},
             "vlm": {"type": "AutoModelForVision2Seq"},
             "trainer": {"precision": "bf16", "max_steps": 900, "accumulate_grad_batches": 4},
             "act_head": {**OFFICIAL["act_head"], "latent": 2, "fill_zero": True, "num_layers": 3,
                          "n_bin": 1024},
             "train_dataset": [{"type": "DiskCalvinDataset", "rgb_pad": 7, "gripper_pad": -1,
                                "traj_cons": False}]}
    (tmp_path / "c.json").write_text(json.dumps(about))
    cfg, notes = robovlms.read_official_config(tmp_path / "c.json")
    want = dict(freeze=("embeddings", "language", "resampler"), train_layers=2, lora=8, tcp_rel=True,
                regular=(0.1, 0.5),
                mu_law=100, grad_clip=0.5, warmup=7, lr_schedule="cosine", lr=1e-4, weight_decay=0.1, batch=3,
                seed=5,
                norm_min=-1.0, norm_max=1.0, resampler=True, resampler_depth=6, steps=900, latent=2,
                fill_zero=True, depth=3,
                n_bin=1024, shift=(7, 0), traj_cons=False, history=16, horizon=10)
    assert {k: getattr(cfg, k) for k in want} == want
    told = " ".join(notes)
    for precision, compute in (("16", "auto"), (32, "fp32"), ("bf16", "bf16"), (None, "bf16")):
        about["trainer"]["precision"] = precision              # the trainer's goes before train_setup's
        (tmp_path / "c.json").write_text(json.dumps(about))
        cfg, notes = robovlms.read_official_config(tmp_path / "c.json")
        assert cfg.compute == compute and any("fp16" in n for n in notes) == (precision == "16")
    about["train_setup"] = {"freeze_backbone": True, "train_decoder_layers": 2}      # as upstream: nothing of
    (tmp_path / "c.json").write_text(json.dumps(about))                              # the VLM trains then
    cfg, _ = robovlms.read_official_config(tmp_path / "c.json")
    assert (cfg.freeze, cfg.train_layers) == (("vision", "embeddings", "language"), 0)
    flamingo = {**about, "robovlm_name": "RoboFlamingo", "use_vision_resampler": False, "train_dataset": {
        "type": "ConcatDataset", "datasets": [{"type": "DiskCalvinDataset", "rgb_pad": 3}]},
        "train_setup": OFFICIAL["train_setup"], "act_head": {
            **OFFICIAL["act_head"], "action_space": "down_sample", "down_sample": "pooling"}}
    (tmp_path / "c.json").write_text(json.dumps(flamingo))     # its gates, perceiver, words and head learn
    cfg, _ = robovlms.read_official_config(tmp_path / "c.json")
    assert (cfg.freeze, cfg.gripper, cfg.shift) == (("language",), "signed", (3, 4))
    for name in ("use_state", "vision_resampler", "vlm", "seq_len", "some_future_key",
                 "accumulate_grad_batches",
                 "act_head.with_history", "act_head.window_size", "train_setup.gradient_checkpointing"):
        assert name in told, name
    assert "lora_alpha" not in told and "fp16" not in told     # 16 is twice 8
    assert "act_head.latent" not in told and "trainer" not in told.replace("trainer.", "")
    (tmp_path / "loop.json").write_text('{"parent": "loop.json"}')
    with pytest.raises(ValueError, match="a circle"):
        robovlms.read_official_config(tmp_path / "loop.json")


def test_the_jsons_lora_is_train_pys(tmp_path):
    import train
    about = {**OFFICIAL, "train_setup": {"lora_enable": True, "lora_r": 4}}
    (tmp_path / "c.json").write_text(json.dumps(about))
    args, _, cfg, _ = train.parse(["--model", "robovlms", "--set", f"config={tmp_path / 'c.json'}"])
    assert (args.lora, cfg.lora, args.data) == (4, 4, str(tmp_path / "c.json"))
    args, _, cfg, _ = train.parse(["--model", "robovlms", "--set", f"config={tmp_path / 'c.json'}",
                                   "history=8", "--lora", "2"])
    assert args.lora == 2 and cfg.history == 8                 # what is said besides goes first
    for empty in ("config=", "config= "):
        with pytest.raises(ValueError, match="config= names no file; config=FILE.json is wanted"):
            train.parse(["--model", "robovlms", "--set", empty])
    with pytest.raises(ValueError, match="give one of the two"):
        train.parse(["--model", "robovlms", "--preset", "kosmos_oxe", "--set",
                     f"config={tmp_path / 'c.json'}"])


def test_actions_in_the_grippers_frame_are_turned_back_and_need_a_pose():
    plain, turned = (Policy(Model(cell("kosmos", "one_step", "mlp", tcp_rel=on), load_tokenizer(TINY),
                                  STATS).eval())
                     for on in (False, True))
    turned.model.load_state_dict(plain.model.state_dict())
    state = np.array([0.1, 0.2, 0.3, 0.4, -0.5, 0.6, 0, 0])
    a, b = (p.step({**look(), "state": state}) for p in (plain, turned))
    assert np.allclose(robovlms.gripper_frame(b[None], state[None])[0], a, atol=1e-6) and not np.allclose(a,
                                                                                                          b)
    turned.reset()
    with pytest.raises(ValueError, match="its pose is needed"):
        turned.step(look())


def test_official_files_load_in_every_wrapping_and_a_missing_head_raises(tmp_path):    # sheet 12.24
    cfg = cell()
    model = Model(cfg, load_tokenizer(cfg), STATS).eval()
    state, path = model.state_dict(), tmp_path / "x.pt"
    want = model.act([look()])[0]
    values = {k: v for k, v in asdict(cfg).items() if k != "tokenizer"}
    for key, prefix in (("state_dict", "model."), ("model_state_dict", "module.model."),
                        ("state_dict", "module."),
                        ("model_state_dict", "")):
        torch.save({key: {prefix + n: t for n, t in state.items()}, "epoch": 3}, path)
        got = from_pretrained(path, preset="tiny", tokenizer="tiny", **values)
        got.stats = STATS
        assert np.array_equal(got.act([look()])[0], want)
    torch.save({"state_dict": {n: t for n, t in state.items() if "act_head" not in n}}, path)
    with pytest.raises(ValueError, match="missing, e.g. act_head"):
        from_pretrained(path, preset="tiny", **values)
    with pytest.raises(ValueError, match="config=FILE.json"):
        from_pretrained(path)
    model.save_pretrained(tmp_path / "ours")
    assert np.allclose(from_pretrained(tmp_path / "ours").act([look()])[0], want, atol=1e-7)
    for change in ({"backbone": "llava"}, {"head": "gpt"}, {"latent": 2}, {"views": ()}):
        with pytest.raises(ValueError, match="does not fit|views") as caught:
            from_pretrained(tmp_path / "ours", **change)
        assert "\n" not in str(caught.value)
    gpt = Model(cell(head="gpt"), load_tokenizer(cfg), STATS)  # its places are the window's
    gpt.save_pretrained(tmp_path / "gpt")
    with pytest.raises(ValueError, match=r"wpe.weight \(3, 128\) instead of \(5, 128\)"):
        from_pretrained(tmp_path / "gpt", history=5)


# ---- The VLMs' public weights -----------------------------------------------------------------------------

def qwen_names(depth, vit_depth):
    """Qwen-VL's (from its source; no file could be read), with tiny shapes."""
    D, E, b = 32, 16, {}
    for i in range(depth):
        b |= {f"transformer.h.{i}.{n}": s for n, s in {
            "ln_1.weight": (D,), "ln_2.weight": (D,), "attn.c_attn.weight": (3 * D, D),
            "attn.c_attn.bias": (3 * D,),
            "attn.c_proj.weight": (D, D), "mlp.w1.weight": (24, D), "mlp.w2.weight": (24, D),
            "mlp.c_proj.weight": (D, 24)
        }.items()}
    v = {"conv1.weight": (E, 3, 6, 6), "positional_embedding": (4, E), "proj": (D, D),
         "attn_pool.query": (4, D),
         "attn_pool.pos_embed": (4, D), "attn_pool.kv_proj.weight": (D, E),
         "attn_pool.attn.in_proj_weight": (3 * D, D),
         "attn_pool.attn.in_proj_bias": (3 * D,), "attn_pool.attn.out_proj.weight": (D, D),
         "attn_pool.attn.out_proj.bias": (D,)}
    for n, d in (("ln_pre", E), ("ln_post", D), ("attn_pool.ln_q", D), ("attn_pool.ln_kv", D)):
        v |= {f"{n}.weight": (d,), f"{n}.bias": (d,)}
    for i in range(vit_depth):
        for n, a, c in (("attn.in_proj", 3 * E, E), ("attn.out_proj", E, E), ("mlp.c_fc", 20, E),
                        ("mlp.c_proj", E, 20)):
            v |= {f"transformer.resblocks.{i}.{n}.weight": (a, c),
                  f"transformer.resblocks.{i}.{n}.bias": (a,)}
        for n in ("ln_1", "ln_2"):
            v |= {f"transformer.resblocks.{i}.{n}.weight": (E,), f"transformer.resblocks.{i}.{n}.bias": (E,)}
    return b | {f"transformer.visual.{n}": s for n, s in v.items()} | {
        "transformer.wte.weight": (64, D), "transformer.ln_f.weight": (D,), "lm_head.weight": (64, D)}


def moondream_names(depth, vit_depth):
    """MoonDream 2's (from the sheet), with tiny shapes."""
    D, E, b = 32, 16, {"text_model.transformer.embd.wte.weight": (64, 32)}
    pairs = [("vision_encoder.encoder.model.visual.patch_embed.linear", E, 108),
             ("vision_encoder.projection.mlp.fc1", 4 * D, E),
             ("vision_encoder.projection.mlp.fc2", D, 4 * D), ("text_model.lm_head.linear", 64, D)]
    norms = [("vision_encoder.encoder.model.visual.norm", E), ("text_model.lm_head.ln", D)]
    for i in range(depth):
        h = f"text_model.transformer.h.{i}."
        pairs += [(h + "mixer.Wqkv", 3 * D, D), (h + "mixer.out_proj", D, D), (h + "mlp.fc1", 24, D),
                  (h + "mlp.fc2", D, 24)]
        norms += [(h + "ln", D)]
    for i in range(vit_depth):
        h = f"vision_encoder.encoder.model.visual.blocks.{i}."
        pairs += [(h + "attn.qkv", 3 * E, E), (h + "attn.proj", E, E), (h + "mlp.fc1", 20, E),
                  (h + "mlp.fc2", E, 20)]
        norms += [(h + "norm1", E), (h + "norm2", E)]
    b |= {f"{n}.{x}": s for n, o, i in pairs for x, s in (("weight", (o, i)), ("bias", (o,)))}
    return b | {f"{n}.{x}": (d,) for n, d in norms for x in ("weight", "bias")} | {
        "vision_encoder.encoder.model.visual.pos_embed": (1, 16, E)}


NARROW = dict(llm_width=32, llm_depth=2, llm_mlp=24, llm_heads=2, llm_kv_heads=2, llm_head_dim=16,
              vit_width=16, vit_mlp=20,
              vit_depth=2, vit_heads=2, image_size=24, patch_size=6, image_tokens=4, vocab=64,
              image_start_id=5, image_end_id=6,
              action_base=60, n_bin=8)


@pytest.mark.parametrize("backbone, names", [("qwen", qwen_names), ("moondream", moondream_names)])
def test_public_names_of_a_fused_vlm_fit_strictly(backbone, names):
    cfg = replace(TINY, backbone=backbone, **NARROW)
    model = Model(cfg)
    own = {n: t for n, t in model.state_dict().items() if n.startswith("backbone.")}
    state = {n: torch.randn(s) for n, s in names(2, 2).items()}
    got = robovlms.rename_public(state, cfg, own)
    robovlms.check_fit(own, got, "public weights")
    if backbone == "qwen":                       # the tower's are fused per head: q, k, v of 8 rows each
        w = state["transformer.visual.transformer.resblocks.0.attn.in_proj.weight"]
        key = got["backbone.vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight"]
        assert torch.equal(key, torch.cat([w[8:16], w[32:40]]))
        assert torch.equal(got["backbone.proj.weight"], state["transformer.visual.proj"].T)
        assert torch.equal(got["backbone.language_model.model.layers.1.mlp.gate_proj.weight"],
                           state["transformer.h.1.mlp.w2.weight"])
    else:
        w = state["text_model.transformer.h.1.mixer.Wqkv.weight"]
        assert torch.equal(got["backbone.language_model.model.layers.1.self_attn.v_proj.weight"], w[64:])
    with pytest.raises(ValueError, match="missing, e.g. backbone"):
        robovlms.check_fit(own, robovlms.rename_public(dict(list(state.items())[1:]), cfg, own), "x")


def test_qwens_places_of_patches_are_its_queries_interpolated():
    """Qwen-VL has one sine table, of its 16 x 16 queries; for 32 x 32 patches it is enlarged (bicubic)."""
    own = Model(replace(TINY, backbone="qwen", **NARROW)).backbone                     # 2 x 2 and 4 x 4
    table, patches = own.asked.unflatten(0, (2, 2)), own.places.unflatten(0, (4, 4))
    assert torch.equal(table[0, :, :16], table[1, :, :16])                             # half the channels: x,
    assert torch.equal(table[:, 0, 16:], table[:, 1, 16:])                             # half: y
    w = torch.tensor([[1.10546875, -0.10546875], [0.7734375, 0.2265625]])              # a = -0.75
    w = torch.cat([w, w.flip(0, 1)])                                                   # (4, 2)
    assert torch.allclose(patches, torch.einsum("yi,xj,ijd->yxd", w, w, table), atol=1e-6)


@pytest.mark.parametrize("backbone", ["kosmos", "paligemma", "llava"])
def test_full_size_backbones_fit_their_public_names_strictly(backbone):
    """On the meta device: transformers' own class names the weights; PaliGemma's older names, too."""
    cfg = Config(backbone=backbone, **robovlms.BACKBONES[backbone])
    with torch.device("meta"):
        model = Model(cfg)
        if backbone == "paligemma":
            keys = json.loads((GOLDEN.folder / "keys_paligemma_3b_224.json").read_text())
            keys = keys["backbone_and_action_token"]
            names = {n.removeprefix("model.backbone."): torch.empty(s) for n,
                     s in keys.items() if "backbone" in n}
            lists = [names, {n.replace("language_model.model", "model.language_model").replace(
                "vision_tower.vision_model", "model.vision_tower").replace("multi_modal",
                                                                           "model.multi_modal"): t
                for n, t in names.items()}]
        elif backbone == "kosmos":
            lists = [robovlms.hf.Kosmos2ForConditionalGeneration(robovlms.hf.Kosmos2Config()).state_dict()]
        else:
            lists = [robovlms.hf.LlavaForConditionalGeneration(robovlms.hf.LlavaConfig(
                vision_config=dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096,
                                   image_size=336,
                                   num_hidden_layers=24, num_attention_heads=16, patch_size=14,
                                   projection_dim=768),
                text_config=robovlms.hf.LlamaConfig(vocab_size=32064, rms_norm_eps=1e-5))).state_dict()]
    own = {n: t for n, t in model.state_dict().items() if n.startswith("backbone.")}
    for names in lists:
        robovlms.check_fit(own, robovlms.rename_public(names, cfg, own), "public weights")
        gone = [n for n in names if "q_proj" in n][0]
        with pytest.raises(ValueError, match="1 parameters missing"):
            robovlms.check_fit(own, robovlms.rename_public({n: t for n, t in names.items() if n != gone}, cfg,
                                                           own), "x")


def test_training_starts_from_a_public_folder(tmp_path):
    """KosMos-2 as transformers saves it: the tower and the words come, head and query are fresh."""
    cfg = cell()
    native = robovlms.hf.Kosmos2ForConditionalGeneration(robovlms.hf.Kosmos2Config(
        text_config=dict(vocab_size=cfg.vocab, embed_dim=cfg.llm_width, layers=cfg.llm_depth,
                         ffn_dim=cfg.llm_mlp,
                         attention_heads=cfg.llm_heads), latent_query_num=cfg.image_tokens,
        vision_config=dict(hidden_size=cfg.vit_width, intermediate_size=cfg.vit_mlp,
                           num_hidden_layers=cfg.vit_depth,
                           num_attention_heads=cfg.vit_heads, image_size=cfg.image_size,
                           patch_size=cfg.patch_size))).eval()
    native.save_pretrained(tmp_path)
    native.set_attn_implementation("eager")                    # before 5.23, its SDPA masks the resampler causally
    model = from_pretrained(tmp_path, allow_fresh=True, tokenizer="tiny", **{
        k: v for k, v in asdict(cfg).items() if k != "tokenizer"}).eval()
    pixels = torch.randn(1, 3, cfg.image_size, cfg.image_size)
    theirs = native.model.get_image_features(pixels) if hasattr(native,
                                                                "model") else native.image_to_text_projection(
        F.normalize(native.vision_model.model.post_layernorm(native.vision_model(pixels).last_hidden_state),
                    dim=-1))[0]
    with torch.no_grad():
        assert torch.allclose(model.backbone.see(pixels), theirs, atol=1e-5)
    assert sorted(model.fresh) == ["act_head"] and not model.action_token.any()
    with pytest.raises(ValueError, match="no list of its public"):
        from_pretrained(tmp_path, allow_fresh=True, tokenizer="tiny", **{
            **{k: v for k, v in asdict(cfg).items() if k != "tokenizer"}, "backbone": "uform"})


def test_frozen_parts_are_frozen_and_nothing_else():
    """The JSON's switches: vision and embeddings by their own names, whatever happens to the rest."""
    def trains(**more):
        model = Model(cell(**more))
        return {part: any(p.requires_grad for p in module.parameters()) for part, module in {
            "vision": model.backbone.vision_model, "project": model.backbone.image_to_text_projection,
            "words": model.backbone.embedding, "first": model.backbone.layers()[model.cfg.vit_depth],
            "last": model.backbone.layers()[-1], "head": model.act_head}.items()}
    every = dict.fromkeys(("vision", "project", "words", "first", "last", "head"), True)
    assert trains() == every and trains(freeze=("vision",)) == {**every, "vision": False}
    rest = {"project": False, "first": False, "last": False}
    assert trains(freeze=("language",)) == {**every, **rest}
    assert trains(freeze=("language", "embeddings"), train_layers=1) == {**every, **rest, "words": False,
                                                                         "last": True}
    model = Model(cell("moondream", resampler=True, freeze=("resampler",)))
    assert not any(p.requires_grad for p in model.vision_resampler.parameters())
    assert model.action_token.requires_grad


def test_the_head_may_learn_at_a_rate_of_its_own():
    model = Model(cell(head_lr=0.01))
    rates = {id(p): g["lr"] for g in model.param_groups(1e-3, 0.0) for p in g["params"]}
    assert rates == {id(p): 0.01 if n.startswith("act_head.") else 1e-3 for n, p in model.named_parameters()}
    assert len(Model(cell(head_lr=0.0)).param_groups(1e-3, 0.0)) == 1      # officially one group


@pytest.mark.parametrize("change, complaint", [
    ({"formulation": "policy_head", "head": "mlp"}, "policy_head goes with lstm, gpt"),
    ({"formulation": "one_step", "history": 4}, "history=4"), ({"history": 0}, "history=0"),
    ({"train_layers": -1}, "train_layers=-1"), ({"train_layers": 2}, "freeze has no language"),
    ({"backbone": "x"}, "backbone='x'"),
    ({"backbone": "flamingo", "formulation": "interleaved"}, "not in the row"), ({"execute": 2}, "execute=2"),
    ({"head": "gpt", "latent": 2, "width": 64}, "latent=2"), ({"views": ("a", "b", "c")}, "views"),
    ({"freeze": ("legs",)}, "freeze"), ({"norm_min": 2.0}, "norm_min"),
    ({"head": "gpt", "heads": 7}, "heads=7")])
def test_combinations_that_do_not_exist_are_refused_in_a_line(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(TINY, **change)


# ---- The matrix -------------------------------------------------------------------------------------------

FITS = [(b, f, h) for b in ADAPTERS for f, heads in CELLS.items() for h in heads if b != "flamingo" or (
    f in ("one_step", "policy_head") and h != "discrete")]
DIAGONAL = [("kosmos", "policy_head", "lstm"), ("paligemma", "interleaved", "mlp"),
            ("llava", "one_step", "diffusion"),
            ("qwen", "one_step", "discrete"), ("moondream", "policy_head", "gpt"),
            ("uform", "interleaved", "gpt"),
            ("flamingo", "policy_head", "lstm")]


def learns(cfg, folder, steps):
    """Builds, learns one batch, acts, saves, loads."""
    cfg = replace(cfg, image_tokens=4, resampler=cfg.backbone == "moondream", resampler_latents=4, horizon=2,
                  num_train_steps=60)
    model, samples = Model(cfg, load_tokenizer(cfg), STATS), [sample(cfg, i) for i in range(2)]
    batch, optimizer = batch_of(cfg, samples), torch.optim.AdamW(model.param_groups(2e-3, 0.0))
    noise = torch.randn(2 * cfg.history, cfg.horizon, cfg.action_dim), torch.arange(2 * cfg.history) * 9
    seen = []
    for _ in range(steps):
        loss, _ = model.loss(batch, *noise)
        optimizer.zero_grad()
        loss.backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
        seen.append(loss.item())
    assert np.isfinite(seen).all() and seen[-1] < 0.8 * seen[0], seen
    torch.manual_seed(0)
    chunks, _ = model.eval().act(samples)
    model.save_pretrained(folder)
    loaded = from_pretrained(folder)
    torch.manual_seed(0)
    again, _ = loaded.act(samples)
    assert chunks.shape == (2, 2, 7) and np.allclose(chunks, again, atol=1e-6)
    return model


@pytest.mark.parametrize("backbone, formulation, head", DIAGONAL)
def test_cell_learns_acts_saves_loads(backbone, formulation, head, tmp_path):
    model = learns(cell(backbone, formulation, head), tmp_path, 12)
    first = next(m for m in model.modules() if isinstance(m, robovlms.hf.PreTrainedModel))
    assert first is model.backbone.language_model              # which is where train.py --lora goes


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("backbone, formulation, head", FITS)
def test_every_cell_learns_acts_saves_loads(backbone, formulation, head, tmp_path):
    """pytest -m matrix"""
    learns(cell(backbone, formulation, head), tmp_path, 20)


def test_w1_mlp_runs_from_the_method_file_alone(tmp_path):                             # sheet 12.29
    cfg = cell("kosmos", "one_step", "mlp", views=("third", "wrist"))
    chunks, _ = Model(cfg, None, STATS).eval().act([look(views=cfg.views)])
    assert chunks.shape == (1, cfg.horizon, 7)


def test_every_item_of_the_checklist_has_its_test():
    text = "".join(path.read_text(encoding="utf-8")
                   for path in Path(__file__).parent.glob("test_*robovlms.py"))
    marks = [line.partition("# sheet")[2] for line in text.splitlines()]
    assert {int(n) for mark in marks for n in re.findall(r"12\.(\d+)", mark)} == set(range(1, 31))


def test_the_matrix_table_has_exactly_the_cells_that_exist():
    matrix = module_of(ROOT / "examples" / "robovlms_matrix.py")
    found = [(b, f, h) for b in ADAPTERS for f, heads in CELLS.items() for h in heads if matrix.fits(b, f, h)]
    assert found == FITS and len(found) == 78
    assert all(matrix.fits("kosmos", *c) for c in matrix.COMPARED)


def test_your_own_vlm_takes_30_lines_and_trains(tmp_path):
    """examples/own_vlm.py: interleaved and policy_head, learned, saved, loaded."""
    try:
        own = module_of(ROOT / "examples" / "own_vlm.py")
        text = (ROOT / "examples" / "own_vlm.py").read_text()
        text = text.partition("class SmolVLM")[2].partition("if __name__")[0]
        assert len([line for line in text.splitlines() if line.strip()]) <= 30
        learns(cell("smolvlm", "interleaved", "mlp"), tmp_path, 12)
        model = Model(cell("smolvlm", image_size=48), load_tokenizer(TINY), STATS)
        tokens = model.look_at(torch.zeros(1, 1, 1, 48, 48, 3, dtype=torch.uint8))
        assert tokens.shape == (1, 1, 1, 4, TINY.llm_width)
        with torch.device("meta"):
            own.SmolVLM(Config(backbone="smolvlm", **robovlms.BACKBONES["smolvlm"]), "sdpa")
    finally:
        for table in (robovlms.ADAPTERS, robovlms.BACKBONES):
            table.pop("smolvlm", None)


@pytest.mark.parametrize("cfg", [cell(), cell("kosmos", "one_step", "discrete"),
                                 cell("kosmos", "one_step", "mlp", read="all")],
                         ids=lambda c: f"{c.head}_{c.reading}")
def test_every_kosmos_cell_starts_from_the_trunk(cfg, tmp_path):
    """The trunk holds the query, which not every cell has; of another backbone it is not asked."""
    import train
    from safetensors.torch import save_file
    trunk = {n: t + 1 for n, t in Model(cell()).state_dict().items() if not n.startswith("act_head.")}
    save_file(trunk, tmp_path / "trunk.safetensors")
    model = Model(cfg)
    train.load_part(model, tmp_path / "trunk.safetensors", "--init")
    assert all(torch.equal(t, trunk[n]) for n, t in model.state_dict().items() if n in trunk)
    assert replace(TINY, init="assets/x.safetensors").init and not replace(TINY, init="assets/x.safetensors",
                                                                           backbone="qwen").init


def test_demo_overfits(capsys, monkeypatch):
    """(With the tiny preset as it is: test_methods.py.)"""
    monkeypatch.setitem(PRESETS, "tiny", cell())
    robovlms.demo()
    lines = [float(line.split("loss")[1].split("|")[0]) for line in capsys.readouterr().out.splitlines()
             if "loss" in line]
    assert lines[-1] < 0.1 * lines[0]
