"""cogact.py: recordings of the official code, invariants, checkpoints, what a user can get wrong.

What holds for every method is in test_methods.py.
"""
import json
import math
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import cogact
import forks
from cogact import (PRESETS, ActionModel, Config, Model, Policy, collate, from_pretrained, load_tokenizer,
                    prepare)
from common import ChunkEnsemble, adaptive_weights, exponential_weights, normalize
from golden_cases import Recordings, hashed, tokenizer_path
from test_methods import CountReads

GOLDEN = Recordings("cogact")
A = 7
STATS = {"toy": {"action": {"q01": [-0.5] * 6 + [0.0], "q99": [0.5] * 6 + [1.0], "min": [-1.0] * 6 + [0.0],
                            "max": [1.0] * 6 + [1.0], "mean": [0.0] * A, "std": [1.0] * A,
                            "mask": [True] * 6 + [False]}, "num_transitions": 10, "num_trajectories": 1}}


# ---- Recordings of the official code ----------------------------------------------------------------------

def dit_config(c):
    """The Config of a recorded DiT."""
    assert (c["norm_eps"], c["learn_sigma"], c["past_action_window_size"]) == (1e-6, False, 0)
    return Config(action_dim=c["in_channels"], horizon=c["future_action_window_size"] + 1,
                  width=c["hidden_size"], depth=c["depth"], heads=c["num_heads"], llm_width=c["token_size"],
                  llm_heads=1, mlp_ratio=c["mlp_ratio"], frequencies=c["timestep_frequency_size"],
                  **schedule_fields(c.get("schedule")))


def schedule_fields(s):
    if s is None:
        return {}
    assert (s["beta_schedule"], s["offset_s"], s["max_beta"]) == ("squaredcos_cap_v2", 0.008, 0.999)
    assert (s["prediction"], s["variance"], s["clip_x0_in_sampler"]) == ("epsilon", "fixed_small", False)
    return {"num_train_steps": s["num_train_timesteps"]}


def recorded_head(case):
    head = ActionModel(dit_config(case.config))
    head.load_state_dict(case.weights())
    return head.eval()


@GOLDEN.replays("dit_forward")
@torch.no_grad()
def test_dit_forward_matches_every_recorded_stage(case):
    head, c = recorded_head(case), case.config
    net, x, t, z = head.net, case["in.x"], case["in.t"], case["in.z"]
    case.compare("mid.x_embed", net.x_embedder(x))
    case.compare("mid.t_embed", net.t_embedder(t))
    case.compare("mid.z_embed", net.z_embedder(z))
    tokens = torch.cat([net.t_embedder(t)[:, None] + net.z_embedder(z), net.x_embedder(x)], 1)
    case.compare("mid.tokens", tokens + net.positional_embedding)
    case.compare("mid.block0", net.blocks[0](tokens + net.positional_embedding))
    case.compare("out.eps", net(x, t, z))
    case.compare("drop.z_embed", net.z_embedder(z, case["drop.ids"].bool()))
    for run in c["cfg_scales"]:                                # the second half of the recorded x is ignored
        n = len(case["cfg.in.x"]) // 2
        condition = net.t_embedder(case["cfg.in.t"])[:, None] + net.z_embedder(case["cfg.in.z"])
        eps = head.guided(case["cfg.in.x"][:n], condition, run["scale"])
        case.compare(run["tensor"], torch.cat([eps, eps]))


@GOLDEN.replays("dit_hashed")
@torch.no_grad()
def test_dit_of_official_width_matches(case):
    c = case.config
    head, prefix = ActionModel(dit_config(c)), c["module_prefix"]
    head.load_state_dict({n: hashed(c["key_prefix"] + n, p.shape, c["hash_rule"], n.removeprefix(prefix))
                          for n, p in head.state_dict().items()})
    for check in c["hash_checks"]:
        p = head.state_dict()[prefix + check["name"]]
        case.compare(check["first8"], p.flatten()[:8])
        case.compare(check["sum"], p.double().sum().reshape(case[check["sum"]].shape))
    case.compare("out.eps", head.eval().net(case["in.x"], case["in.t"], case["in.z"]))


@GOLDEN.replays("schedule")
def test_noise_schedule_and_ddim_steps_match(case):
    c, embedding = case.config, case.config["timestep_embedding"]
    for run in c["cases"]:
        total = run["num_train_timesteps"]
        betas = cogact.cosine_betas(total, c["offset_s"], c["max_beta"])
        for name in c["arrays"]:
            key = c["array_tensor"].format(num_train_timesteps=total, array=name)
            case.compare(key, cogact.schedule(betas)[name])
        for steps in run["stored_steps"]:
            timesteps = cogact.ddim_timesteps(total, steps)
            arrays = {"timesteps": np.array(timesteps), **cogact.schedule(cogact.respace(betas, timesteps))}
            for name in c["ddim_arrays"]:
                key = c["ddim_tensor"].format(num_train_timesteps=total, steps=steps, array=name)
                case.compare(key, arrays[name])
        for steps in run["possible_steps_not_stored"]:
            assert len(cogact.ddim_timesteps(total, steps)) == steps
        for steps in run["raises_value_error"]:
            with pytest.raises(ValueError, match="evenly"):
                cogact.ddim_timesteps(total, steps)
    t = case[embedding["in"]]
    case.compare(embedding["out"], cogact.sinusoid(t, embedding["dim"], embedding["max_period"]))


@GOLDEN.replays("sampling")
@torch.no_grad()
def test_sampling_matches_official_trace(case):
    head, B = recorded_head(case), case["in.z"].shape[0]
    for run in case.config["runs"]:
        trace, noise = [], case[run["step_noise"]][:, :B] if "step_noise" in run else None
        out = head.sample(case["in.z"], case["in.noise"], run["steps"], run["cfg_scale"], run["sampler"],
                          noise, trace)
        case.compare(run["out"], out)
        # Officially both halves of the guided batch carry a state. With DDIM they are equal; with DDPM the
        # second half gets noise of its own and is thrown away, so only the first is compared.
        half = run["guided"] and run["sampler"] == "ddpm"
        both = (lambda x: torch.cat([x, x], 1)) if run["guided"] and not half else (lambda x: x)
        states = torch.stack([case["in.noise"]] + [x for x, _ in trace])
        if "trajectory_at" in run:
            states = states[case[run["trajectory_at"]]]
        case.compare(run["trajectory"], both(states), part=np.s_[:, :B] if half else ...)
        if "pred_xstart" in run:
            case.compare(run["pred_xstart"], both(torch.stack([x0 for _, x0 in trace])))


@GOLDEN.replays("loss")
def test_loss_and_gradients_match(case):
    head, c = recorded_head(case), case.config
    actions, z, noise, t, drop = (case["in." + n] for n in ("actions", "cognition", "noise", "t", "drop_ids"))
    case.compare("out.x_t", head.add_noise(actions.repeat(c["repeated_diffusion_steps"], 1, 1), noise, t))
    for run in c["runs"]:
        head.train(run["mode"] == "train").zero_grad()
        loss = head.loss(actions, z, noise, t, drop.bool() if run["drop"] else None)
        case.compare(run["out"], loss.reshape(case[run["out"]].shape))
        loss.backward()
        if "gradients" in run:
            got = {run["gradients"].replace("net.*", name): p.grad for name, p in head.named_parameters()
                   if p.grad is not None}
            assert not {run["gradients"].replace("net.*", name) for name in c["no_gradient"]} & set(got)
            for name in set(got) & set(case.tensors):          # not all are recorded; the norm is over all
                case.compare(name, got[name])
            norm = sum(g.double().square().sum() for g in got.values()).sqrt()
            case.compare(run["grad_norm"], norm.reshape(case[run["grad_norm"]].shape))


@GOLDEN.replays("ensemble")
def test_ensembles_match(case):
    for run in case.config["cases"]:
        weights = (lambda c: adaptive_weights(c, run["alpha"])) if run["rule"] == "adaptive_cosine" \
            else (lambda c: exponential_weights(c, run["temperature"]))
        ensemble, given = ChunkEnsemble(run["horizon"], weights), case[run["in"]].numpy()
        if run["input_kind"] == "one_chunk_after_reset":
            ensemble.step(given + 1)
            ensemble.reset()
            case.compare(run["out"], ensemble.step(given))
        else:
            case.compare(run["out"], np.stack([ensemble.step(x) for x in given]))


@GOLDEN.replays("image_preprocess")
def test_image_preprocessing_matches(case):
    c = case.config
    model, deploy = c["model_transform"], c["deploy"]
    size = model["size"][0]
    for name, constants in (("dino", cogact.DINO_PIXELS), ("siglip", cogact.SIGLIP_PIXELS)):
        assert constants == (tuple(model[name]["mean"]), tuple(model[name]["std"]))
    for run in c["cases"]:
        assert model["resample"] == "bicubic"
        image = cogact.resize(case[run["in"]].numpy(), size)
        pixels = torch.tensor(image)[None]
        for name, constants in (("dino", cogact.DINO_PIXELS), ("siglip", cogact.SIGLIP_PIXELS)):
            if name in run:
                s = run["stride"]
                case.compare(run[name], cogact.normalize_pixels(pixels, *constants)[0, :, ::s, ::s])
        if "resized_uint8" in run:
            case.compare(run["resized_uint8"], image)
    for run in deploy["cases"]:
        image = cogact.deploy_crop(case[run["in"]].numpy(), deploy["first_resize"]["size"][0],
                                   run["shift_to_left"], deploy["area_scale"])
        case.compare(run["out"], image[::run["stride"], ::run["stride"]])


@GOLDEN.replays("rlds")
def test_data_transforms_match(case):
    c = case.config
    for run in c["binarize"]["cases"]:
        case.compare(run["out"], cogact.binarize_gripper(case[run["in"]].numpy()))
    for run in c["rel2abs"]["cases"]:
        case.compare(run["out"], cogact.absolute_gripper(case[run["in"]].numpy()))
    state, action = (case[name].numpy() for name in c["bridge"]["in"])
    moved = cogact.bridge_actions(action, state)
    case.compare(c["bridge"]["out"], moved)
    squares = np.arange(len(state))[:, None] ** 2 * np.ones(A)             # (t + 1)^2 - t^2 = 2 t + 1
    case.compare(c["bridge"]["frame_index"], cogact.bridge_actions(action, squares)[:, 0] // 2)
    case.compare(c["rt1"]["out"], cogact.rt1_actions(*(case[name].numpy() for name in c["rt1"]["in"])))
    stats = {}
    for run in c["normalize"]["cases"]:
        name = run["in"].split(".")[0].removeprefix("norm_")
        stats[name] = {k: case[run[k]].numpy() for k in ("q01", "q99", "min", "max")} | \
            {"mask": c["normalize"]["mask"]}
        case.compare(run["out"], normalize(case[run["in"]].numpy(), stats[name]))
    for run in c["chunk"]["cases"]:
        x, T = case[f"norm_{run['name']}.out.action"].numpy(), c["chunk_len"]
        N = len(x)
        index = np.arange(N)[:, None] + np.arange(T)                       # (N, T)
        chunks = [cogact.pad_chunk(x[np.minimum(i, N - 1)], i < N, stats[run["name"]], True) for i in index]
        case.compare(run["out"], np.stack(chunks))
        # Made here, not by the project, which has no such reader: they show that `index` is the official one.
        # The official mask also lets five steps beyond the end pass, and is never used in the loss.
        case.compare(run["action_mask"], (index < N + 5).astype(np.uint8))
        case.compare(run["frame"], index[:, :1])
    for run in c["lanczos"]["cases"]:
        case.compare(run["out"], cogact.resize_for_training(case[c["lanczos"]["in"]].numpy(), run["size"][0]))
    a = c["augment"]
    stages = list(cogact.augment_stages(
        case[a["in"]].numpy(), a["crop_box"]["y0"], a["crop_box"]["x0"], a["crop_box"]["height"],
        a["brightness_delta"], a["contrast_factor"], a["saturation_factor"], a["hue_delta"]))
    for name, stage in zip(a["stages"], stages):
        case.compare(name, stage)
    case.compare(a["out_uint8"], cogact.to_uint8(stages[-1]))


@GOLDEN.replays("sim_wrapper")
def test_simpler_policy_matches(case):
    c, names = case.config, ("raw_world", "raw_rot", "raw_open", "world_vector", "rot_axangle", "gripper")
    for run in c["cases"]:
        given, chunks = run["arguments"], case[run["chunks"]].numpy()
        cfg = Config(horizon=chunks.shape[1], gripper_index=c["gripper_index"])
        model = SimpleNamespace(cfg=cfg, stats={})
        policy = Policy(model, robot=given["policy_setup"], ensemble=given.get("action_ensemble"),
                        ensemble_horizon=given.get("action_ensemble_horizon"),
                        ensemble_alpha=given.get("adaptive_ensemble_alpha"),
                        action_scale=given.get("action_scale", 1.0))
        resolved = run["resolved"]
        assert policy.hold == resolved["sticky_gripper_num_repeat"] and policy.execute == 1
        if policy.ensemble:
            assert policy.ensemble.chunks.maxlen == resolved["action_ensemble_horizon"]
            assert policy.ensemble.weights.keywords == {"alpha": resolved["adaptive_ensemble_alpha"]}
        rows = []
        for i, chunk in enumerate(chunks):
            task = c["first_task"] if i < run["reset_at"] else c["task_from_reset_at"]
            sent, raw = policy.step({"instruction": task}, chunk), policy.raw
            prev = np.nan if policy.prev is None else policy.prev
            rows.append((raw[:3], raw[3:6], raw[6:], sent[:3], sent[3:6], sent[6:], float(policy.sticky),
                         float(policy.count), prev))
        columns = [np.array(column) for column in zip(*rows)]
        outputs = run["outputs"]["raw"] + run["outputs"]["sent"] + run["outputs"]["state_after_step"]
        assert [name.rsplit(".", 1)[1] for name in outputs[:6]] == list(names)
        for name, column in zip(outputs, columns):
            case.compare(name, column)
    turns = [cogact.euler_to_axis_angle(*angles) for angles in case[c["euler"]["in"]].tolist()]
    case.compare(c["euler"]["out"], np.array(turns))


class RecordedTokenizer:
    """Gives back recorded prompt ids (without the two that the model appends)."""

    def __init__(self, rows):
        self.rows = rows                                       # {prompt: ids}

    def __call__(self, prompt, add_special_tokens):
        return SimpleNamespace(input_ids=self.rows[prompt])


def write_official(folder, modules, stats, name="tiny.pt"):
    """A run folder as the official trainer leaves it."""
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"model": modules}, folder / "checkpoints" / name)
    vla = {"vla_id": "x", "base_vlm": "prism-dinosiglip-224px+7b"}
    (folder / "config.json").write_text(json.dumps({"vla": vla, "run_id": "x"}))
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    return folder / "checkpoints" / name


def recorded_vlm(case, folder):
    """The recorded tiny model, written in the official layout and read back by from_pretrained."""
    c, modules = case.config, {}
    for module, names in case.json(c["keys_file"]).items():
        key = (lambda name: c["full_key"].replace("key_prefix", c["key_prefix"]).replace("module", module)
               .replace("name", name).replace(" + ", "").replace("'", ""))
        modules[module] = {n: hashed(key(n), shape, c["hash_rule"], n) for n, shape in names.items()}
    for change in c["after_hash"]:
        modules[change["module"]][change["name"]] *= change["multiply_by"]
    stats = {key: entry["stats"] for key, entry in case.json("unnormalize.json").items() if "stats" in entry}
    path = write_official(folder, modules, stats)
    dino, siglip, llm, dit = c["vision"]["dino"], c["vision"]["siglip"], c["llm"], c["dit"]
    assert (llm["rms_norm_eps"], llm["rope_theta"], llm["num_key_value_heads"]) == \
        (1e-5, 10000.0, llm["num_attention_heads"])
    ids = dict(bos_id=llm["bos_token_id"], eos_id=llm["eos_token_id"], pad_id=llm["pad_token_id"])
    rows = {}
    for row, i in ((case["batch.input_ids"][k], k) for k in range(len(c["instructions"]))):
        row = row[row != llm["pad_token_id"]].tolist()
        rows[cogact.build_prompt(c["instructions"][i])] = row[:-2]
    heads = dict(dino_heads=dino["num_heads"], siglip_heads=siglip["num_heads"], heads=dit["num_heads"],
                 llm_heads=llm["num_attention_heads"])
    return from_pretrained(path, tokenizer=RecordedTokenizer(rows), repeated_diffusion_steps=c["train"][
        "repeated_diffusion_steps"], **heads, **ids, **schedule_fields(c["schedule"]))


@GOLDEN.replays("vlm_tiny")
@torch.no_grad()
def test_whole_model_matches(case):
    c = case.config
    with tempfile.TemporaryDirectory() as folder:
        model = recorded_vlm(case, Path(folder))
        model_matches(case, c, model)


def model_matches(case, c, model):
    images = {"0": case["in.image"].numpy()}
    images["1"] = np.ascontiguousarray(images["0"][::-1])

    def see(i, k):
        return {"images": {"camera": images[str(k)]}, "instruction": c["instructions"][i]}

    def batch(run):
        pairs = zip(run["instructions"], run["images"])
        return collate([prepare(see(i, k), model.cfg, model.tokenizer) for i, k in pairs], model.cfg)
    one = batch(c["cases"][0])
    case.compare("mid.dino_pixels", cogact.normalize_pixels(one["images"][:, 0], *cogact.DINO_PIXELS)[0])
    case.compare("mid.siglip_pixels", cogact.normalize_pixels(one["images"][:, 0], *cogact.SIGLIP_PIXELS)[0])
    patches = model.vision_backbone(one["images"][:, 0])
    case.compare("mid.fused_patches", patches)
    case.compare("mid.projected", model.projector(patches))
    text, patches = model.llm_backbone.llm.model.embed_tokens(one["ids"]), model.projector(patches)
    case.compare("single.last_hidden", model.llm_backbone(torch.cat([text[:, :1], patches, text[:, 1:]], 1)))
    for run in c["cases"]:
        tag, b, shape = run["tag"], batch(run), case[f"{run['tag']}.actions"].shape
        assert b["ids"].flatten().tolist() == case[run["input_ids"]].flatten().tolist()
        if f"{tag}.cognition" in case:
            case.compare(f"{tag}.cognition", model(b))
        _, info = model.act([see(i, k) for i, k in zip(run["instructions"], run["images"])], run["stats_key"],
                            case[run["noise"]][run["noise_rows"]], run["cfg_scale"], run["num_ddim_steps"])
        case.compare(f"{tag}.raw_samples", info["samples"])
        case.compare(f"{tag}.normalized_actions", info["normalized"].reshape(shape))
        case.compare(f"{tag}.actions", info["actions"].reshape(shape))
    train = c["train"]
    b = batch(train) | {"actions": case[train["actions"]]}
    assert torch.equal(b["ids"], case[train["input_ids"]])
    loss, _ = model.loss(b, case[train["noise"]], case[train["t"]])
    case.compare(train["loss"], loss.reshape(case[train["loss"]].shape))
    case.compare("train.cognition", model(b))
    labels = torch.full_like(b["ids"], -100)                   # officially, only the cognition token has one
    labels[torch.arange(len(labels)), b["length"] - 1] = model.cfg.eos_id
    case.compare("train.labels", labels)


def shapes(module):
    return {name: list(p.shape) for name, p in module.state_dict().items()}


@GOLDEN.replays("checkpoint_keys")
def test_official_parameters_load_strictly(case):
    c = case.config
    d, recorded = c["dit"], case.json()["modules"]
    every = case.json(c["other_modules_from"])["modules"] if c["other_modules_from"] else {}
    every |= {module: recorded[module] for module in c["modules_listed_in_full"]}
    with torch.device("meta"):
        model = Model(PRESETS[c["size"]])
        state = {f"{m}.{n}": torch.empty(s) for m in c["modules"] for n, s in every[m].items()}
    model.load_state_dict(state, strict=c["strict"], assign=True)
    for module in c["modules_listed_in_full"]:
        case.compare(f"modules/{module}", shapes(getattr(model, module)), recorded[module])
    sizes = cogact.read_sizes(state)                           # the DiT's size needs no config file
    assert (sizes["width"], sizes["depth"], sizes["horizon"], sizes["action_dim"], sizes["llm_width"]) == \
        (d["hidden_size"], d["depth"], d["future_action_window_size"] + 1, d["in_channels"], d["token_size"])
    assert cogact.DIT_WIDTHS[sizes["width"]] == c["size"] and PRESETS[c["size"]].heads == d["num_heads"]
    assert replace(model.cfg, **sizes) == model.cfg


@GOLDEN.replays("vlm_tiny_keys")
def test_tiny_official_parameters_have_our_names(case):
    recorded = case.json()
    with torch.device("meta"):
        state = {f"{m}.{n}": torch.empty(s) for m in case.config["modules"] for n, s in recorded[m].items()}
        sizes = cogact.read_sizes(state)
        model = Model(Config(**sizes, dino_heads=1, siglip_heads=1, llm_heads=1, heads=1))
    model.load_state_dict(state, strict=case.config["strict"], assign=True)
    for module in case.config["modules"]:
        case.compare(module, shapes(getattr(model, module)), recorded[module])


@GOLDEN.replays("tokenization")
def test_prompts_match(case):
    c, path = case.config, tokenizer_path(case.entry["needs_tokenizer"])
    cfg = Config(tokenizer=str(path), pad_id=c["pad_token_id"])
    tokenizer = load_tokenizer(cfg) if path else None
    assert (c["inference_append_ids"], c["bos_token_id"]) == ([cfg.space_id, cfg.eos_id], cfg.bos_id)
    for i, want in enumerate(case.json()["cases"]):
        name, prompt = f"cases/{i}/", cogact.build_prompt(want["instruction"])
        case.compare(name + "inference_prompt", prompt, want["inference_prompt"])
        case.compare(name + "training_prompt", prompt + c["training_suffix"], want["training_prompt"])
        if tokenizer is None:                                  # no vocabulary at hand: structure only
            assert want["inference_ids"][0] == cfg.bos_id
            assert want["inference_ids"][-2:] == c["inference_append_ids"]
            assert want["equal"] == (want["inference_ids"] == want["training_ids"])
            continue
        ids = cogact.encode_prompt(want["instruction"], cfg, tokenizer)
        training = list(tokenizer(want["training_prompt"]).input_ids)
        case.compare(name + "inference_ids", ids, want["inference_ids"])
        case.compare(name + "training_ids", training, want["training_ids"])
        case.compare(name + "equal", ids == training, want["equal"])


@GOLDEN.replays("unnormalize")
def test_unnormalization_matches(case):
    c, recorded = case.config, case.json()
    for run in c["cases"]:
        entry = recorded[run["key"]]
        assert run["has_mask"] == ("mask" in entry["stats"]["action"])
        samples = np.array(entry["samples"], np.float32)
        normalized, actions = cogact.decode_actions(samples, entry["stats"]["action"], c["gripper_index"])
        case.compare(run["normalized"], normalized, np.array(entry["normalized"], np.float32))
        case.compare(run["actions"], actions, np.array(entry["actions"]))
        assert actions.dtype == np.float64


@pytest.mark.golden
def test_every_recording_is_replayed():
    GOLDEN.check()


# ---- A small model of our own -----------------------------------------------------------------------------

def tiny(**changes):
    """The tiny preset, made smaller still: a forward costs milliseconds."""
    small = dict(image_size=32, patch_size=8, dino_width=32, siglip_width=32, dino_depth=3, siglip_depth=3,
                 dino_heads=2, siglip_heads=2, dino_mlp=64, siglip_mlp=64, llm_width=32, llm_depth=2,
                 llm_heads=4, llm_mlp=64, width=32, depth=2, heads=2, horizon=4, execute=2,
                 repeated_diffusion_steps=2)
    return replace(PRESETS["tiny"], **{**small, **changes})


def samples(cfg, n):
    rng, T = np.random.default_rng(0), cfg.horizon
    words = ("put the red cube on the plate", "lift the ball", "push the green bar left")
    return [{"images": {v: rng.integers(0, 256, (40, 48, 3), np.uint8) for v in cfg.views},
             "state": np.zeros(8), "instruction": words[i % 3], "dataset": "toy",
             "actions": rng.uniform(-0.4, 0.4, (T, cfg.action_dim)).astype(np.float32),
             "loss_mask": np.arange(T) < 3 + i} for i in range(n)]


def make(cfg=None, seed=0):
    """A model with random weights everywhere, the last layer of the DiT included."""
    torch.manual_seed(seed)
    cfg = cfg or tiny()
    model = Model(cfg, load_tokenizer(cfg), STATS)
    torch.nn.init.normal_(model.action_model.net.final_layer.linear.weight, std=0.2)
    return model.eval()


def batch_of(model, n=3, train=True, **given):
    prepared = [prepare(s, model.cfg, model.tokenizer, STATS, key=10 + i, train=train)
                for i, s in enumerate(samples(model.cfg, n))]
    return collate(prepared, model.cfg) | given


NOISE = torch.randn(8, 4, A, generator=torch.Generator().manual_seed(5))


# ---- The vision-language model ----------------------------------------------------------------------------

@torch.no_grad()
def test_last_vit_block_and_norms_change_nothing():
    model = make()
    batch = batch_of(model)
    before = model(batch)
    for tower in (model.vision_backbone.dino_featurizer, model.vision_backbone.siglip_featurizer):
        for part in (tower.blocks[-1], tower.norm):
            for p in part.parameters():
                p.add_(1.0)
    assert torch.equal(model(batch), before)
    next(model.vision_backbone.siglip_featurizer.blocks[-2].parameters()).add_(1.0)
    assert not torch.equal(model(batch), before)


@torch.no_grad()
def test_padding_a_row_does_not_change_its_cognition():
    model = make()
    batch = batch_of(model)
    more = dict(batch, ids=torch.nn.functional.pad(batch["ids"], (0, 5), value=model.cfg.pad_id))
    torch.testing.assert_close(model(more), model(batch), rtol=1e-5, atol=1e-6)
    assert len(set(batch["length"].tolist())) > 1              # the rows of this batch do differ in length


def test_padding_tokens_get_zero_gradient():
    model = make()
    batch = batch_of(model)
    batch["ids"] = torch.nn.functional.pad(batch["ids"], (0, 2), value=77)     # a token, but beyond every end
    model(batch).square().sum().backward()
    grad = model.llm_backbone.llm.model.embed_tokens.weight.grad
    assert grad[77].abs().max() == 0 and grad[model.cfg.eos_id].abs().max() > 0


@torch.no_grad()
def test_cognition_feature_is_the_last_real_token():
    model = make()
    batch, rows = batch_of(model), []
    hook = model.llm_backbone.register_forward_hook(lambda module, args, out: rows.append(out))
    z = model(batch)
    hook.remove()
    P = (model.cfg.image_size // model.cfg.patch_size) ** 2
    for i, n in enumerate(batch["length"].tolist()):
        assert batch["ids"][i, n - 1] == model.cfg.eos_id      # </s>, and nothing but padding after it
        assert torch.equal(z[i, 0], rows[0][i, P + n - 1])


def test_prompt_costs_less_than_thirty_tokens():
    cfg = PRESETS["tiny"]
    ids = cogact.encode_prompt("put the left red cube on the plate", cfg, load_tokenizer(cfg))
    assert len(ids) < 30 and ids[0] == cfg.bos_id and ids[-2:] == [cfg.space_id, cfg.eos_id]


@pytest.mark.parametrize("instruction", ["pick up the ball", "Stack  the Cube!", "open <image> it"])
def test_training_ids_equal_inference_ids(instruction):
    """Training tokenizes one string that ends in a space and </s>; at inference the two ids are appended."""
    cfg, tokenizer = PRESETS["tiny"], load_tokenizer(PRESETS["tiny"])
    whole = tokenizer(cogact.build_prompt(instruction) + " </s>").input_ids
    assert cogact.encode_prompt(instruction, cfg, tokenizer) == list(whole)


@torch.no_grad()
def test_casting_once_equals_autocast():
    """dtype="bf16" stores what autocast would cast in every call: the same numbers, bit by bit."""
    model = make(tiny(compute="bf16"))
    batch = batch_of(model)
    want = model(batch)
    fp32 = make()(batch)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        cast = from_pretrained(folder, dtype="bf16")
        assert cast.projector.projector[0].weight.dtype == torch.bfloat16
        assert cast.action_model.net.x_embedder.linear.weight.dtype == torch.float32
        assert torch.equal(cast(batch), want)
        assert torch.equal(from_pretrained(folder, dtype="fp32")(batch), fp32) and not torch.equal(want, fp32)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["ours", "official"])
@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_files_of_any_type_load_as_float32(tmp_path, layout, dtype):
    """A bf16 file: float32 again, or with dtype="bf16" the VLM's matrices in bf16; the DiT never."""
    model = make().bfloat16()
    options = {"tokenizer": "tiny", **HEADS} if layout == "official" else {}
    path = official(tmp_path, model) if layout == "official" else tmp_path
    if layout == "ours":
        model.save_pretrained(path)
    again = from_pretrained(path, dtype=dtype, **options)
    half = {n for n, p in again.named_parameters() if p.dtype == torch.bfloat16}
    assert ("projector.projector.0.weight" in half) == (dtype == "bf16")
    assert not {n for n in half if n.startswith("action_model") or "norm" in n or "embed_tokens" in n}
    assert all(torch.equal(p, model.state_dict()[n].to(p.dtype)) for n, p in again.state_dict().items())
    assert np.isfinite(again.act(samples(model.cfg, 2), noise=NOISE[:2])[0]).all()


# ---- The action head --------------------------------------------------------------------------------------

def test_fresh_head_predicts_zero_noise():
    head = ActionModel(tiny())
    head.net.init_weights()
    assert head.net(NOISE[:2], torch.tensor([3, 90]), torch.randn(2, 1, 32)).abs().max() == 0


@torch.no_grad()
def test_guidance_reaches_every_step_and_every_channel():
    """(The official code of 2024 guided only 7 of the 16 steps.)"""
    net, head = make().action_model.net, make().action_model
    x, z, t = NOISE[:2], torch.randn(2, 1, 32), torch.tensor([50, 50])
    cond, uncond = net(x, t, z), net(x, t, z, drop=torch.tensor([True, True]))
    both = torch.cat([net.z_embedder(z), net.z_embedder(z, torch.tensor([True, True]))])
    got = head.guided(x, net.t_embedder(t[:1])[:, None] + both, 1.5)
    torch.testing.assert_close(got, uncond + 1.5 * (cond - uncond), rtol=1e-5, atol=1e-6)
    assert ((got - cond).abs() > 1e-6).all()


@pytest.mark.parametrize("cfg_scale, rows", [(1.5, 4), (1.0, 2), (0.0, 2)])
@torch.no_grad()
def test_no_guidance_is_one_conditional_pass(cfg_scale, rows):
    head, seen = make().action_model, []
    head.net.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    head.sample(torch.randn(2, 1, 32), NOISE[:2], 5, cfg_scale)
    assert seen == [rows] * 5


@torch.no_grad()
def test_dropped_condition_is_replaced_before_the_projection():
    z_embedder = make().action_model.net.z_embedder
    z = torch.randn(3, 1, 32)
    got = z_embedder(z, torch.tensor([False, True, False]))
    torch.testing.assert_close(got[1], z_embedder.linear(z_embedder.uncondition))
    torch.testing.assert_close(got[::2], z_embedder.linear(z[::2]))


def test_uncondition_learns_only_when_something_was_dropped():
    model = make()
    batch, t = batch_of(model, 2), torch.tensor([5, 60, 30, 99])
    for drop, learns in (([0, 0, 0, 0], False), ([0, 1, 0, 0], True)):
        model.zero_grad()
        model.loss(batch, NOISE[:4], t, torch.tensor(drop).bool())[0].backward()
        grad = model.action_model.net.z_embedder.uncondition.grad
        assert (grad is not None and grad.abs().max() > 0) == learns
        assert model.action_model.net.history_embedder.linear.weight.grad is None


def test_language_head_and_other_unused_parts_are_frozen_and_without_gradient():
    model = make().train()
    model.loss(batch_of(model))[0].backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    frozen = {n for n, _ in model.named_parameters()} - trained
    assert "llm_backbone.llm.lm_head.weight" in frozen
    prefixes = tuple(p.replace(".-1", f".{model.cfg.dino_depth - 1}") for p in cogact.UNUSED)
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(prefixes)}
    assert sum(len(g["params"]) for g in model.param_groups(1e-3, 0.0)) == len(trained)


def test_action_head_may_have_its_own_learning_rate_and_vectors_never_decay():
    for cfg, head in ((tiny(head_lr=3e-3), 3e-3), (tiny(head_lr=0.0), 1e-3)):
        model = make(cfg)
        names = {p: n for n, p in model.named_parameters()}
        for group in model.param_groups(1e-3, 0.5):
            for p in group["params"]:
                assert group["lr"] == (head if names[p].startswith("action_model") else 1e-3)
                assert group["weight_decay"] == 0.5 * (p.ndim >= 2)


def test_copies_are_tiled_over_the_whole_batch():
    """Row r B + i of noise, steps and drops belongs to sample i."""
    model = make()
    batch = batch_of(model, 3)
    t = torch.arange(6) * 15
    whole, _ = model.loss(batch, NOISE[:6], t)
    z, alone = model(batch), []
    for i in range(3):
        rows = [i, 3 + i]
        alone.append(model.action_model.loss(batch["actions"][i:i + 1], z[i:i + 1], NOISE[rows], t[rows],
                                             loss_mask=batch["loss_mask"][i:i + 1]))
    torch.testing.assert_close(whole, torch.stack(alone).mean())


def test_repeated_diffusion_steps_are_honoured():
    """PAPER!=CODE: the public training code always uses 4."""
    assert PRESETS["base"].repeated_diffusion_steps == PRESETS["tiny"].repeated_diffusion_steps == 8
    for R in (1, 8):
        model = make(tiny(repeated_diffusion_steps=R))
        rows = []
        model.action_model.net.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
        model.loss(batch_of(model, 3))
        assert rows == [3 * R]


def test_masked_steps_are_not_in_the_loss():
    model = make(tiny(padding="mask"))
    batch, t = batch_of(model, 1), torch.tensor([10, 80])
    assert batch["loss_mask"].tolist() == [[True, True, True, False]]
    loss, _ = model.loss(batch, NOISE[:2], t)
    with torch.no_grad():
        x = batch["actions"].repeat(2, 1, 1)
        noised, z = model.action_model.add_noise(x, NOISE[:2], t), model(batch).repeat(2, 1, 1)
        eps = model.action_model.net(noised, t, z)
    torch.testing.assert_close(loss, ((eps - NOISE[:2]) ** 2)[:, :3].sum() / x.numel())
    assert batch_of(make(tiny(padding="neutral")), 1)["loss_mask"].all()


def test_draws_depend_on_the_sample_only():
    """A batch in one process or split over two: the same draws, so the same gradients."""
    model = make().train()
    grads = []
    for parts in ((slice(0, 4),), (slice(0, 2), slice(2, 4))):
        model.zero_grad()
        batch = batch_of(model, 4)
        for part in parts:
            (model.loss({k: v[part] for k, v in batch.items()})[0] / len(parts)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[0].norm()


def test_what_is_not_given_to_the_loss_is_drawn():
    model = make()
    batch = batch_of(model, 3)
    noise, t, _ = model.draw(batch, 3)
    all_given = model.loss(batch, NOISE[:6], t)[0]
    assert torch.equal(model.loss(batch, noise=NOISE[:6])[0], all_given) and all_given != model.loss(batch)[0]
    assert torch.equal(model.loss(batch, t=99 - t)[0], model.loss(batch, noise, 99 - t)[0])


def test_condition_is_dropped_in_training_only():
    model = make(tiny(condition_dropout=1.0))
    batch = batch_of(model)
    evaluated = model.loss(batch)[0].item()
    assert model.loss(batch)[0].item() == evaluated            # keyed draws: the same value again
    assert model.train().loss(batch)[0].item() != evaluated


@pytest.mark.slow
def test_tiny_overfits_one_batch():
    model = make(tiny(width=64, llm_width=64)).train()
    batch = batch_of(model, 2)
    del batch["key"]                                           # fresh noise at every step
    optimizer = torch.optim.AdamW(model.param_groups(2e-3, 0.0))
    losses = []
    for _ in range(150):
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:5])


# ---- Data -------------------------------------------------------------------------------------------------

class Middle:
    """Draws the middle of every range, but `first` for the first draw."""

    def __init__(self, first):
        self.first, self.count = first, 0

    def uniform(self, low, high):
        self.count += 1
        return self.first if self.count == 1 else (low + high) / 2


def test_crops_slide_along_the_diagonal_only():
    """FAITHFUL: one offset for both axes, so a picture that equals its transpose still does afterwards."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 1), np.uint8).repeat(3, 2)
    image = np.maximum(image, image.transpose(1, 0, 2))
    for first in (0.0, 0.03, 0.05):
        out = cogact.augment(image, Middle(first))
        assert np.array_equal(out, out.transpose(1, 0, 2))
    draws = Middle(0.01)
    cogact.augment(image, draws)
    assert draws.count == 5                                    # one offset, four colours


def test_pictures_are_lanczos_in_training_and_bicubic_in_use():
    """FAITHFUL: the official code resizes pictures differently in training and at inference."""
    cfg = replace(PRESETS["base"], tokenizer="tiny", augment=False, image_size=28, **TINY_IDS)
    sample = samples(cfg, 1)[0]
    del sample["actions"]
    image, tokenizer = sample["images"]["third"], load_tokenizer(cfg)
    train, use = (prepare(sample, cfg, tokenizer, train=t)["images"][0].numpy() for t in (True, False))
    assert np.array_equal(train, cogact.resize_for_training(image, 28))
    assert np.array_equal(use, np.array(Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC)))
    assert not np.array_equal(train, use)


def test_deploy_crop_takes_any_aspect_ratio():
    rng = np.random.default_rng(0)
    for shape in ((40, 60, 3), (60, 40, 3), (50, 50, 3)):
        assert cogact.deploy_crop(rng.integers(0, 256, shape, np.uint8), 28).shape == (28, 28, 3)
    cfg = tiny(center_crop=True)
    image = rng.integers(0, 256, (48, 64, 3), np.uint8)
    out = prepare({"images": {"third": image}, "instruction": "go"}, cfg, load_tokenizer(cfg))["images"]
    assert np.array_equal(out[0].numpy(), cogact.deploy_crop(image, cfg.image_size))


def test_gripper_is_not_normalized():
    stats = STATS["toy"]["action"]
    x = np.array([[0.25] * 6 + [1.0], [-0.6] * 6 + [0.0]])
    assert np.allclose(normalize(x, stats), [[0.5] * 6 + [1.0], [-1.0] * 6 + [0.0]])
    for value, gripper in ((0.4999999, 0), (0.5, 1)):
        assert cogact.decode_actions(np.full((1, A), value, np.float32), stats)[1][0, 6] == gripper


def test_statistics_that_normalize_the_gripper_are_refused():
    scaled = {"toy": {"action": STATS["toy"]["action"] | {"mask": [True] * A}}}
    cfg = tiny()
    with pytest.raises(ValueError, match="mask is True at gripper_index=6"):
        cogact.decode_actions(np.zeros((1, A), np.float32), scaled["toy"]["action"])
    with pytest.raises(ValueError, match="mask is True at gripper_index=6"):       # before the training, too
        prepare(samples(cfg, 1)[0], cfg, load_tokenizer(cfg), scaled)
    cogact.decode_actions(np.zeros((1, A), np.float32), scaled["toy"]["action"], -1)


def test_padding_beyond_the_end_means_no_motion():
    stats = {"q01": [-0.2, -0.1, 0.03, 0], "q99": [0.6, 0.1, 0.03, 1], "min": [-1, -1, 0.03, 0],
             "max": [1, 1, 0.03, 1], "mask": [True, True, True, False]}
    chunk, valid = np.full((4, 4), 0.5, np.float32), np.arange(4) < 2
    chunk[:, 3] = (0, 1, 0, 0)
    ours = cogact.pad_chunk(chunk, valid, stats)
    assert np.allclose(ours[2:], [-0.5, 0, 0, 1], atol=1e-6) and np.array_equal(ours[:2], chunk[:2])
    assert cogact.pad_chunk(chunk, valid, stats, faithful=True)[2, 2] < -1e6
    raw = cogact.decode_actions(ours[2:], stats, 3)[1]
    assert np.allclose(raw[:, :2], 0, atol=1e-6)


# ---- Acting -----------------------------------------------------------------------------------------------

def test_act_runs_the_head_in_float32_under_any_autocast():
    model = make()
    seen, types = samples(model.cfg, 1), []
    model.action_model.net.blocks[0].register_forward_hook(lambda module, args, out: types.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model.act(seen, noise=NOISE[:1])
    assert set(types) == {torch.float32}


def test_inference_reads_nothing_back_from_the_device():
    """No .item(), .cpu() or bool(tensor) in the VLM or the denoising loop: each would make a GPU wait."""
    model = make()
    batch = batch_of(model)
    with torch.no_grad(), CountReads() as count:
        model.action_model.sample(model(batch), NOISE[:3], 10, 1.5)
    assert count.reads == 0


def test_actions_of_another_size_and_without_gripper():
    cfg = tiny(action_dim=4, gripper_index=-1, horizon=6)
    stats = {"arm": {"action": {"q01": [-2.0] * 4, "q99": [2.0] * 4, "min": [-3.0] * 4, "max": [3.0] * 4}}}
    model = Model(cfg, load_tokenizer(cfg), stats).eval()
    chunks, _ = model.act([{k: samples(cfg, 1)[0][k] for k in ("images", "instruction")}])
    assert chunks.shape == (1, 6, 4) and np.abs(chunks).max() <= 2


def test_ensemble_of_two_uses_two_chunks():
    ensemble = ChunkEnsemble(2, lambda c: np.full(len(c), 1 / len(c)))
    chunks = np.random.default_rng(0).normal(size=(3, 4, A))
    out = [ensemble.step(c) for c in chunks]
    assert np.allclose(out[0], chunks[0, 0]) and np.allclose(out[2], (chunks[1, 1] + chunks[2, 0]) / 2)


def test_all_zero_action_does_not_divide_by_zero():
    assert np.allclose(adaptive_weights(np.zeros((3, A)), 1.0), 1 / 3)


# ---- Checkpoints ------------------------------------------------------------------------------------------

def test_config_json_is_written_last(tmp_path):
    """It is what makes a folder a checkpoint; a write that fails before leaves none."""
    model, seen = make(), []
    model.cfg.tokenizer = "mine"
    model.tokenizer = SimpleNamespace(save_pretrained=lambda f: seen.append((f / "config.json").exists()))
    model.save_pretrained(tmp_path)
    assert seen == [False] and (tmp_path / "config.json").exists()


def test_export_in_the_official_layout_and_back(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "ours")
    out, run = tmp_path / "run" / "checkpoints" / "x.pt", forks.shared()
    done = run("cogact.py --export", tmp_path / "ours", out, cwd=tmp_path)
    assert done.rc == 0, done.err
    released = torch.load(out, weights_only=True)["model"]
    assert list(released) == list(cogact.MODULES)
    assert all(t.dtype == torch.float32 for part in released.values() for t in part.values())
    for path in (out, tmp_path / "run"):
        again = from_pretrained(path)
        assert again.cfg == model.cfg and again.stats == STATS and "Llama 2" in again.origin["license"]
        seen = samples(model.cfg, 1)
        a, b = (m.act(seen, noise=NOISE[:1])[1]["samples"] for m in (again, model))     # before the clip
        assert np.array_equal(a, b) and not np.array_equal(a, a.clip(-1, 1))
    done = run("cogact.py --export", tmp_path / "ours", out, cwd=tmp_path)
    assert done.rc == 2 and "overwritten" in done.err and len(done.err.splitlines()) == 1


@pytest.mark.parametrize("there", ["config.json", "dataset_statistics.json", "checkpoints/x.pt"])
def test_export_overwrites_nothing(tmp_path, there):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / there).write_text("mine")
    with pytest.raises(ValueError, match="overwritten"):
        cogact.save_official(make(), tmp_path / "checkpoints" / "x.pt")
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["mine"]


def test_export_leaves_the_model_as_it_is(tmp_path):
    model = make()
    model.projector.bfloat16()
    cogact.save_official(model, tmp_path / "x.pt")
    assert {p.dtype for p in model.projector.parameters()} == {torch.bfloat16}
    written = torch.load(tmp_path / "x.pt", weights_only=True)["model"]["projector"]
    assert {t.dtype for t in written.values()} == {torch.float32}


TINY_IDS = dict(space_id=3, pad_id=4)
HEADS = dict(dino_heads=2, siglip_heads=2, llm_heads=4, heads=2, **TINY_IDS)


def official(tmp_path, model, drop=(), rename=lambda name: name, name="x.pt"):
    modules = {m: {rename(k): v for k, v in getattr(model, m).state_dict().items()} for m in cogact.MODULES
               if m not in drop}
    return write_official(tmp_path, modules, STATS, name)


def test_openvla_checkpoint_starts_with_a_fresh_head(tmp_path, capsys):
    model = make()
    path = official(tmp_path, model, drop=("action_model",))
    how = {name: n for name, n in HEADS.items() if name != "heads"} | {"tokenizer": "tiny"}
    with pytest.raises(ValueError, match="no action_model: it cannot act"):                # but only to train
        from_pretrained(path, **how)
    again = from_pretrained(path, preset="small", allow_fresh=True, **how)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and len(warning.splitlines()) == 1 and "fresh" in warning
    assert again.fresh == ["action_model"] and again.cfg.width == PRESETS["small"].width
    z = again(batch_of(model))
    assert torch.equal(z, model(batch_of(model)))
    assert again.action_model.net(torch.randn(3, 16, A), torch.tensor([1, 50, 99]), z).abs().max() == 0
    with pytest.raises(ValueError, match="no preset 'smal'; did you mean 'small'"):
        from_pretrained(path, preset="smal", **how)


def test_whole_numbers_do_for_floats():
    assert Config(lr=0, weight_decay=0, betas=[0, 0.9]).betas == (0, 0.9)


def test_official_sizes_are_read_from_shapes(tmp_path):
    path = official(tmp_path, make(tiny(depth=3, horizon=5)))
    model = from_pretrained(path, tokenizer="tiny", **HEADS)
    cfg = model.cfg
    assert (cfg.depth, cfg.horizon, cfg.image_size, cfg.vocab, cfg.siglip_mlp) == (3, 5, 32, 512, 64)
    assert (cfg.lr, cfg.repeated_diffusion_steps, cfg.augment) == (2e-5, 8, True)
    with pytest.raises(ValueError, match="set dino_heads"):
        from_pretrained(path, tokenizer="tiny")
    with pytest.raises(ValueError, match="preset 'large' was asked for"):
        from_pretrained(path, tokenizer="tiny", preset="large", **HEADS)


def test_which_of_several_official_files_must_be_named(tmp_path):
    path = official(tmp_path, make())
    shutil.copy(path, path.with_name("y.pt"))
    with pytest.raises(ValueError, match="there are 2"):
        from_pretrained(tmp_path)
    make().save_pretrained(tmp_path / "ours")
    for file in ("model.safetensors", "config.json"):
        with pytest.raises(ValueError, match="give the folder"):
            from_pretrained(tmp_path / "ours" / file)


@pytest.mark.parametrize("key", ["action_model_type", "diffusion_model_type"])
def test_config_json_names_the_head_in_either_spelling(tmp_path, key):
    path = official(tmp_path, make(), drop=("action_model",))
    (tmp_path / "config.json").write_text(json.dumps({"vla": {key: "DiT-L"}}))
    with torch.device("cpu"):
        cfg, _, _, preset = cogact.read_official(path, None, dict(dino_heads=2, siglip_heads=2, llm_heads=4,
                                                                  **TINY_IDS))
    assert (preset, cfg.width, cfg.depth, cfg.heads) == ("large", 1024, 24, 16)


@pytest.mark.parametrize("content, words", [
    ('{"plainvla": {"horison": 3}}', "did you mean 'horizon'"), ('["method"]', "not an object"),
    ("null", "not an object"), ('{"vla": "x"}', "is not the config"), ("[" * 9999, "recursion"),
    ('{"plainvla": []}', "is not the config"), ('{"plainvla": {"depth": "3"}}', "depth='3': a value like")])
def test_bad_official_config_is_one_clear_line(tmp_path, content, words):
    path = official(tmp_path, make())
    (tmp_path / "config.json").write_text(content)
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match=words) as caught:
            from_pretrained(place, tokenizer="tiny", **HEADS)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', "\0"])
def test_bad_tokenizer_file_is_one_clear_line(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match="--tokenizer: .*torn") as caught:
        load_tokenizer(Config(tokenizer=str(tmp_path / "t.json")))
    assert "\n" not in str(caught.value)


def test_bad_official_file_is_one_clear_line(tmp_path):
    model = make()
    path = official(tmp_path, model)
    data, whole = path.read_bytes(), torch.load(path, weights_only=True)["model"]
    for content, words in ((data[:len(data) // 2], "torn"), (b"hello", "torn"), (b"", "torn")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words) as caught:
            from_pretrained(path, tokenizer="tiny", **HEADS)
        assert "\n" not in str(caught.value)
    for content, words in (({"state_dict": {}}, "holds no model"), (torch.zeros(3), "holds no model"),
                           ({"model": {"vision_backbone": {}}}, r"holds \['vision_backbone'\]"),
                           ({"model": {"projector": {}, "llm_backbone": {}}},
                            r"missing or unknown: \['vision_backbone'\].*openvla-7b-prismatic"),
                           ({"model": dict.fromkeys(cogact.MODULES)}, r"unknown: \['action_model', 'llm_"),
                           ({"model": {m: {} for m in cogact.MODULES}}, "is missing, or no.*give a released"),
                           ({"model": {m: {n: [] for n in data} for m, data in whole.items()}}, "no matrix"),
                           ({"model": whole | {"projector": {n: None for n in whole["projector"]}}},
                            "of another kind, e.g. projector.projector.0.weight .*NoneType.* instead of")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=words):
            from_pretrained(path, tokenizer="tiny", **HEADS)
    shutil.rmtree(tmp_path / "checkpoints")
    path = official(tmp_path / "hf", model, rename=lambda k: k.replace("projector.2", "projector.fc2"))
    with pytest.raises(ValueError, match="missing, e.g. projector.projector.2"):
        from_pretrained(path, tokenizer="tiny", **HEADS)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"model": Evil()}, tmp_path / "checkpoints" / "x.pt")
    with pytest.raises(ValueError, match="no weights file"):
        from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_missing_tokenizer_names_its_option(tmp_path, monkeypatch):
    path = official(tmp_path, make())
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for tokenizer in (None, "nowhere/to/be", str(path)):       # gated and offline; no path; no tokenizer
        with pytest.raises(ValueError, match="--tokenizer"):
            from_pretrained(path, tokenizer=tokenizer, **HEADS)


# ---- What a user can get wrong ----------------------------------------------------------------------------

@pytest.mark.parametrize("make_it, words", [
    (lambda: Config(image_size=225), "no multiple of patch_size"),
    (lambda: Config(heads=5), "heads=5"), (lambda: Config(siglip_heads=0), "siglip_heads=0"),
    (lambda: Config(registers=0), "registers=0"),
    (lambda: Config(action_dim=4), "gripper_index=6.*-1"),
    (lambda: Config(gripper_index=-2), "gripper_index=-2"),
    (lambda: Config(ensemble_horizon=17), "ensemble_horizon=17"),
    (lambda: Config(ensemble_horizon=0), "ensemble_horizon=0"),
    (lambda: Config(padding="zero"), "padding='zero'"),
    *((lambda change=change: Config(**change), next(iter(change))) for change in (
        {"patch_size": 0}, {"patch_size": -8}, {"image_size": 0}, {"depth": 0}, {"num_train_steps": 0},
        {"width": -96}, {"betas": (0.9,)}, {"betas": (0.9, 1.0)}, {"betas": 0.9}, {"pad_id": 32064},
        {"lr": math.inf}, {"eps": math.nan}, {"seed": 2**63}, {"grad_clip": -1.0}, {"warmup": -1},
        {"weight_decay": -0.1}, {"condition_dropout": 2.0}, {"frequencies": 3},
        {"width": "big"}, {"views": None}, {"views": (3,)}, {"augment": 1}, {"horizon": True}, {"batch": 1.5},
        {"init": None})),
    (lambda: Model(tiny(sample_steps=11)), r"evenly over 100; choose one of \[1, 2, .*50, 100\]"),
    (lambda: cogact.ddim_timesteps(4, 3), r"evenly over 4; choose one of \[1, 2, 4\]"),
    (lambda: Policy(make(), robot="atlas"), "robot='atlas'"),
    (lambda: Policy(make(tiny(action_dim=4, gripper_index=-1)), robot="google_robot"), "needs action_dim=7"),
    (lambda: Policy(make(tiny(execute=1)), ensemble_horizon=5), "ensemble_horizon=5"),
    (lambda: Policy(make(), ensemble_horizon=0), "ensemble_horizon=0"),
    (lambda: Policy(make(), execute=1, robot="widowx_bridge"), "ensemble_horizon=7: choose 1 to 4"),
    (lambda: Policy(make()).step({"images": {}}, np.zeros((4, A))), "no instruction"),
    (lambda: Policy(make(), execute=2, ensemble=True), "ensemble needs a new chunk"),
    (lambda: Policy(make(), execute=2, ensemble_alpha=0.1), "ensemble_alpha=0.1 do nothing"),
    (lambda: Policy(make(), action_scale=2.0), "action_scale=2.0 needs a robot"),
    (lambda: make().act(samples(tiny(), 1), steps=11), "evenly"),
    (lambda: make().act(samples(tiny(), 1), steps=0), "0 DDIM steps"),
    (lambda: make(tiny(sampler="ddpm")).act(samples(tiny(), 1), steps=5), "ddpm .always 100 steps"),
    (lambda: make().action_model.sample(torch.zeros(1, 1, 32), NOISE[:1], 10, sampler="dpm"), "='dpm'"),
    (lambda: make().act(samples(tiny(), 1), noise=NOISE[:2]), r"noise of shape \(1, 4, 7\)"),
    (lambda: make().act(samples(tiny(), 1), noise=NOISE[:1, :3]), r"found \(1, 3, 7\)"),
    (lambda: make(tiny(vocab=64)).act(samples(tiny(), 1)), "beyond the model's vocab=64"),
    (lambda: make().loss(batch_of(make()) | {"actions": torch.zeros(3, 5, A)}), "horizon, action_dim"),
    (lambda: prepare(samples(tiny(), 1)[0] | {"loss_mask": np.zeros(4, bool)}, tiny(), load_tokenizer(tiny()),
                     STATS), r"loss_mask=\[0, 0, 0, 0\]"),
    (lambda: prepare(samples(tiny(horizon=5), 1)[0], tiny(), load_tokenizer(tiny()), STATS),
     "horizon, action_dim")])
def test_wrong_argument_is_one_clear_line(make_it, words):
    with pytest.raises(ValueError, match=words) as caught:
        make_it()
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_sampler_does_not_wait():
    model = make().cuda()
    seen = samples(model.cfg, 2)
    model.act(seen, noise=NOISE[:2])                           # makes the tables
    z, noise = torch.randn(2, 1, 32, device="cuda"), NOISE[:2].cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            model.action_model.sample(z, noise, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_big_presets_have_the_official_sizes():
    for name, millions in (("small", 7553.7), ("base", 7630.2), ("large", 7849.0)):
        with torch.device("meta"):
            count = sum(p.numel() for p in Model(PRESETS[name]).parameters())
        assert abs(count / 1e6 - millions) < 0.1
    assert PRESETS["small"].width // PRESETS["small"].heads == 96
