"""a0.py: official recordings, invariants, acting, checkpoints, command line, errors.

_cNN in a test's name (or cNN in its docstring): the N-th item of the sheet's checklist.
"""
import ast
import json
import re
import shutil
import sys
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (Qwen2Config, Qwen2ForCausalLM, Qwen2Model, SiglipConfig, SiglipModel,
                          SiglipVisionModel)

import a0
import eval_sim
from a0 import PRESETS, Config, Denoiser, Model, Policy, collate, from_pretrained, load_tokenizer, prepare
from golden_cases import Recordings

ROOT = Path(a0.__file__).resolve().parent
GOLDEN = Recordings("a0")
NOISE, T = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(5)), torch.tensor([0, 300, 800])
SIZES = dict(image_size=24, patch_size=12, tokenizer="tiny", vocab=512, pad_id=4)


def to_pixels(x):
    """As in Model.see."""
    return (torch.from_numpy(x).movedim(-1, -3).float() / 255 - 0.5) / 0.5


# ---- Recordings of the official code ----------------------------------------------------------------------

def recorded(case, kind=Model, prefix=None):
    c = case.config                                            # prefix "": with first weights
    net = kind(Config(
        image_size=12, patch_size=4, vocab=40, pad_id=0, siglip_width=20, qwen_width=24,
        width=c["hidden_size"], heads=c.get("num_heads", 4), depth=c.get("depth", 2),
        max_text=c.get("max_lang_cond_len", 12)))
    if prefix != "":
        net.load_state_dict(case.weights(prefix))
    return net.eval()


def compare(case, got, want=None):
    for name, x in got.items():
        case.compare(name, x, *([want[name]] if want else ()))


@GOLDEN.replays("rmsnorm")
def test_norm_is_timms_variance_form(case):
    """FAITHFUL, and c02: the standard deviation, not the root mean square."""
    norm, true, x = a0.Norm(16, "variance"), a0.Norm(16, "rms"), case["x"]
    norm.weight.data, true.weight.data = case["weight"].clone(), case["weight"]
    compare(case, {"out": norm(x), "out_bf16": norm.bfloat16()(x.bfloat16()).float()})
    torch.testing.assert_close(true(x), case["other_variant_true_rms"])
    assert (true(x) - case["out"]).abs().max() > 0.01


def part_matches(case):
    net = recorded(case, Denoiser, "")
    part = {"timestep_embedder": net.t_embedder, "block": net.blocks[0],
            "final_layer": net.final_layer}[case.kind]
    part.load_state_dict(case.weights())
    if case.kind == "final_layer":
        return case.compare("out", part(case["x"]))
    if case.kind == "timestep_embedder":
        freq = a0.sinusoid(case["t"], 256)
        assert a0.sinusoid(torch.zeros(1), 256)[0].tolist() == [1.0] * 128 + [0.0] * 128
        return compare(case, {"freq": freq, "out": part["mlp"](freq)})
    x, cross = case["x"], part.cross_attn
    compare(case, {"norm1_out": part.norm1(x), "self_attn_out": part.attn(x), "ffn_out": part.ffn(x)})
    for name, to in (("masked", (case["c"], case["mask"])), ("nomask", (case["c"],))):
        compare(case, {f"cross_attn_out_{name}": cross(x, *cross.keys_values(*to)),
                       f"block_out_{name}": part(x, *to)})


test_time_step_embedding_matches_cosines_first_c03 = GOLDEN.replays("timestep_embedder")(part_matches)
test_block_and_its_parts_match = GOLDEN.replays("block")(part_matches)
test_final_layer_matches = GOLDEN.replays("final_layer")(part_matches)


@GOLDEN.replays("denoiser")
@torch.no_grad()
def test_denoiser_matches_block_by_block_c08(case):
    net, hidden, conditions = recorded(case, Denoiser), [], (case["lang_c"], case["img_c"], case["lang_mask"])
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, out: hidden.append(out))
    for run in case.config["runs"]:
        case.compare(run["out"], net(case["x"], case[run["t"]], *conditions))
        compare(case, dict(zip(run.get("hidden", ()), hidden)))
    torch.testing.assert_close(net(case["x"], case["t_single"].repeat(3), *conditions), case["out_t_single"])


@GOLDEN.replays("denoiser_bf16")
@torch.no_grad()
def test_denoiser_in_bf16_matches(case):
    r, net = load_file(case.path(case.config["weights_file"])), recorded(case, Denoiser, "").bfloat16()
    net.load_state_dict({n[2:]: x for n, x in r.items() if n.startswith("w.")})
    x, lang, img = (r[n].bfloat16() for n in case.config["cast_to_bfloat16"][1:])
    case.compare("out_bf16_as_f32", net(x, r["t"], lang, img, r["lang_mask"]).float())


@GOLDEN.replays("posemb")
def test_position_tables_match(case):
    cfg = Config(image_size=8, patch_size=4, width=case.config["dim"], heads=1,
                 max_text=case.config["lang_len"])
    one, two = (a0.position_tables(replace(cfg, history=n)) for n in (1, 2))
    compare(case, {"x_pos_embed": two["x_pos_embed"][0], "lang_pos_embed": two["lang_cond_pos_embed"][0],
                   "img_pos_embed_h1": one["img_cond_pos_embed"][0],
                   "img_pos_embed_h2": two["img_cond_pos_embed"][0],
                   "img_pos_embed_h2_c3": a0.image_table((2, 3, -4), 16),
                   "sincos_1d": a0.sincos(case["sincos_1d_pos"], 16)})


@GOLDEN.replays("init_posembeds")
def test_fresh_tables_match_and_a_fresh_model_predicts_zero_c04_c05_c06(case):
    net, features = recorded(case, prefix=""), (torch.randn(3, 7, 24), None, torch.randn(3, 18, 20))
    assert not net.denoise(torch.randn(3, 5, 2), torch.tensor([500]), net.adapt(features)).any()
    compare(case, {name: net.state_dict()[name] for name in case.tensors})
    assert torch.equal((x := case["model.x_pos_embed"][0])[0, 16:], x[1, 16:])
    assert (x[1:, :16] == x[1, :16]).all()
    assert not a0.position_tables(replace(net.cfg, history=1))["img_cond_pos_embed"].any()


@GOLDEN.replays("init_stats")
def test_first_weights_follow_the_official_scheme(case):
    state = recorded(case, prefix="").state_dict()
    for name, (mean, std, most) in case.json()["stats"].items():
        x, rule = state[name], next(r for r in case.config["scheme"]
                                    if any(fnmatchcase(name, k) for k in r["keys"]))
        if rule["init"] == "constant":
            assert (x == rule["value"]).all(), name
        elif x.numel() >= 64:                                  # fewer say nothing about a spread
            assert abs(x.std() / std - 1) < case.config["max_relative_std_deviation"]
            assert x.abs().max() < 2 * most, name
    case.seen.add("scheme")


@GOLDEN.replays("scheduler")
def test_noise_schedule_and_solver_match_c10_c12(case):
    abar, (x0, noise, t) = a0.alpha_bar(1000), (case[f"add_noise.{n}"] for n in ("x0", "noise", "t"))
    half = a0.add_noise(x0.bfloat16(), noise.bfloat16(), t, 1000)  # alpha_bar cast first: to the bit
    compare(case, {"betas": a0.cosine_betas(1000), "alphas_cumprod": abar,
                   "add_noise.out_bf16_as_f32": half.float(),
                   "dpm_lambda_t": 0.5 * (abar.double() / (1 - abar.double())).log(),
                   "add_noise.out": a0.add_noise(x0, noise, t, 1000)})
    for run in [*case.config["step_cases"], case.config["bf16_case"]]:
        times, sigma, rows = a0.sampler_table(1000, run["num_inference_steps"])
        x, ms = (case[run[name]].to(getattr(torch, run.get("dtype", "float32")))
                 for name in ("x_init", "model_outputs"))
        after, before = [], None
        for m, row in zip(ms, rows):
            x, before = a0.solver_step(x, m, before, *row), m
            after.append(x.float())
        case.compare(run["x_after"], torch.stack(after))
        assert torch.equal(x, m) and torch.isfinite(torch.stack(after)).all()  # the last prediction itself
        if "sigmas" in run:
            compare(case, {run["sigmas"]: sigma,
                           run["sigmas"].replace("sigmas", "timesteps"): np.array(times)})


@GOLDEN.replays("sampler")
@torch.no_grad()
def test_sampling_matches_official_trace_with_kept_keys_and_values_c12_c25(case):
    model, trace, step, calls = recorded(case), [], a0.solver_step, []
    given = (case["lang_tokens"], case["lang_attn_mask"], case["img_tokens"]), case["init_noise"]
    for block in model.model.blocks:
        block.cross_attn.kv.register_forward_hook(lambda *args: calls.append(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a0, "solver_step",
                      lambda x, m, *rest: trace.append((m, step(x, m, *rest))) or trace[-1][1])
        out, count, denoise = model.sample(*given), len(calls), model.denoise
    compare(case, {"out": out, "timesteps": np.array(a0.sampler_table(1000, 5)[0]),
                   "model_outputs": torch.stack([m for m, _ in trace]),
                   "x_after": torch.stack([x for _, x in trace])})
    model.denoise = lambda x, t, conditions, kept: denoise(x, t, conditions)  # computed anew in each step
    torch.testing.assert_close(model.sample(*given), out, rtol=0, atol=1e-5)
    assert torch.equal(out, trace[-1][0]) and (count, len(calls)) == (4, 4 + 20)


@GOLDEN.replays("loss")
def test_loss_gradients_and_three_adamw_steps_match_c11(case):
    model, g, losses, t, noise = recorded(case), case.config["adamw"], [], case["timesteps"], case["noise"]
    features, points = (case["lang_tokens"], case["lang_attn_mask"], case["img_tokens"]), case["action_gt"]
    noised, conditions = a0.add_noise(points, noise, t, 1000), model.adapt(features)
    compare(case, {"noisy_action": noised, "adapted_lang": conditions[0], "adapted_img": conditions[1],
                   "adapted_action": model.state_adaptor(noised),
                   "pred": model.denoise(noised, t, conditions)})
    optimizer = torch.optim.AdamW(model.param_groups(g["lr"], g["weight_decay"]), g["lr"], g["betas"],
                                  g["eps"])
    for step in range(g["steps"]):
        loss, log = model.denoising_loss(features, points, noise, t)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            grads = {f"grad.{name}": p.grad for name, p in model.named_parameters()}
            compare(case, {"loss.loss": loss, "loss.mse_loss": log["mse"], "loss.l1_loss": log["l1"],
                           "loss.l1_loss_weighted": 0.2 * log["l1"],
                           "grad_global_norm": nn.utils.get_total_norm(grads.values()),
                           **{name: grad for name, grad in grads.items() if name in case}})
        nn.utils.clip_grad_norm_(model.parameters(), g["clip_grad_norm"])
        optimizer.step()
    case.compare("adamw_losses_constant_lr", np.array(losses))


@GOLDEN.replays("ema")
def test_ema_decays_match_c17(case):
    r, average = case.json(), None
    for step, decay in r["decay_by_optimization_step"].items():
        case.compare(f"decay_by_optimization_step/{step}", a0.ema_decay(int(step)), decay)
    for step, update in enumerate(r["update_sequence"]):  # the first two copy; the bias is frozen, and copied
        decay, new = a0.ema_decay(step), np.array(update["new_weight"])
        average = new if step < 2 else decay * average + (1 - decay) * new
        for name, got in (("decay", decay), ("ema_weight", average), ("ema_bias", update["new_bias"])):
            case.compare(f"update_sequence/{step}/{name}", got, update[name])


@GOLDEN.replays("image_preprocess")
def test_padding_and_resizing_match_c15(case):
    for run in case.config["cases"]:
        image = a0.pad_square(case[run["image"]].numpy(), run["padding"])
        small, large = (to_pixels(a0.resize(image, size)) for size in (32, 384))
        compare(case, {run["padded"]: image, run["pixel_values_32"]: small,
                       run["pixel_values_384_strided"]: large[:, ::16, ::16],
                       run["pixel_values_384_sum"]: large.double().sum().reshape(1)})
    for pad, first in (("center", 420), ("topleft", 0)):
        rows = np.flatnonzero((a0.pad_square(np.zeros((1080, 1920, 3), np.uint8), pad) == 0).all((1, 2)))
        assert (rows[0], rows[-1], len(rows)) == (first, first + 1079, 1080)


@GOLDEN.replays("augment")
def test_crop_and_rotation_match_c20(case):
    c, frames, points, h, w = case.config, list(case["images"].numpy()), case["waypoints"].numpy(), 40, 60
    for run in c["crops"]:
        images, moved = a0.crop(frames, points, run["center_xy"], c["crop_ratio"])
        compare(case, {run["images"]: np.stack(images), run["waypoints"]: moved})
    same, kept = a0.crop(frames, case["crop_rejected.waypoints_in"].numpy(), c["crop_rejected"]["center_xy"])
    case.compare("crop_rejected.waypoints", kept)
    assert same is frames                                      # a crop that would lose a point does nothing
    for run in c["rotations"]:
        images, moved = a0.rotate(frames, points, run["angle_deg"])
        o, x, y = a0.rotate(frames, np.array([[0, 0], [1 / w, 0], [0, 1 / h]]), run["angle_deg"])[1] * [w, h]
        # by three pixels
        compare(case, {run["matrix"]: np.column_stack([x - o, y - o, o]), run["waypoints"]: moved})
        grid = np.stack(np.meshgrid(np.arange(w), np.arange(h))).reshape(2, -1) - o[:, None]
        source = np.linalg.inv(np.column_stack([x - o, y - o])) @ grid               # (2, h w)
        inside = ((source >= 1) & (source <= [[w - 2], [h - 2]])).all(0).reshape(h, w)
        case.compare(run["images"], np.stack(images)[:, inside], case[run["images"]].numpy()[:, inside])
    # right to top
    assert np.allclose(a0.rotate([images[0][:40, :40]], np.array([[0.75, 0.5]]), 90)[1], [[0.5, 0.25]])


@GOLDEN.replays("backprojection")
def test_back_projection_depth_and_grasp_choice_match_c23(case):
    r, K, depth = case.json(), case.config["K"], np.zeros((40, 60))
    given = r["waypoints_normalised"], r["depth_m"], K, (r["width"], r["height"])
    X, base = a0.back_project(*given), a0.back_project(*given, case.config["T_base_from_camera"])
    compare(case, {"points_camera": X, "points_base": base, "contact_point_camera": X[0],
                   "selected_grasp_index":
                   a0.nearest_grasp(r["grasp_candidates_translation_camera"], X[0])}, r)
    assert np.allclose(a0.back_project([[K[0][2] / 640, K[1][2] / 480]], [0.7], *given[2:]), [[0, 0, 0.7]])
    depth[18:23, 28:33], depth[19, 29:32] = np.nan, (0.4, 0.5, 9.0)
    assert a0.depth_at(depth, [[0.5, 0.5]]).tolist() == [0.5]  # the median of what is valid
    assert a0.depth_at(depth + 1, [[0, 0], [1, 1]]).tolist() == [1, 1]


@GOLDEN.replays("metrics")
def test_metrics_match_in_both_precisions_c21_c22(case):
    r, classes = case.json(), {}
    for i, one in enumerate(r["cases"]):
        size, drop = (one["width"], one["height"]), one[case.config["drop_last_point_key"]]
        pixels = (torch.tensor(one["pred"]).bfloat16() * torch.tensor(size)).float()[:len(one["pred_pixels"])]
        half, full = (a0.metrics(one["pred"], one["gt"], size, drop, bf16) for bf16 in (True, False))
        for name, got in (("official_bf16", half), ("pred_pixels", pixels), ("float32_pixels", full)):
            case.compare(f"cases/{i}/{name}", got, one[name])
        classes.setdefault(one["class"], []).append(one["official_bf16"])
    for name, mean in zip(case.config["columns"], np.mean(sum(classes.values(), []), 0)):
        case.compare(f"aggregate/{name}", mean, r["aggregate"][name])
    for name, rows in classes.items():
        case.compare(f"aggregate/per_class_mae/{name}", np.mean(rows, 0)[1],
                     r["aggregate"]["per_class_mae"][name])
    off = [[0.01, 0.03]] * 4 + [[9.0, 9.0]]                    # ManiSkill's last point does not count
    assert a0.metrics(off, np.zeros((5, 2)), (100, 100), drop_last=True)[1] == pytest.approx(2.0, abs=1e-4)


@GOLDEN.replays("checkpoint_keys")
def test_official_parameters_load_strictly_c01(case):
    c, keys = case.config, case.json()["keys"]
    with torch.device("meta"):
        model, state = Model(PRESETS[c["size"]]), {name: torch.empty(shape) for name, shape in keys.items()}
    model.load_state_dict(state, strict=c["strict"], assign=True)
    compare(case, {"keys": {n: list(p.shape) for n, p in model.state_dict().items()},
                   "num_tensors": len(model.state_dict()),
                   "num_params": sum(p.numel() for p in model.parameters())}, c | {"keys": keys})
    assert replace(model.cfg, **a0.read_sizes(state)) == model.cfg
    assert c["img_cond_len"] == 2 * model.cfg.patches


@GOLDEN.replays("end_to_end")
@torch.no_grad()
def test_whole_pipeline_matches_c14_c16_c26_and_in_bf16_c27(case):
    prev, cur = case["image_prev"].numpy(), case["image_cur"].numpy()
    c, noise, model = case.config, case["init_noise"], recorded(case, prefix="runner.")
    encoders = (SiglipVisionModel(SiglipVisionModel.config_class(**c["siglip"])),
                Qwen2Model(Qwen2Config(**c["qwen2"])))
    model.tokenizer = lambda text, **how: SimpleNamespace(input_ids=case["input_ids"][0].tolist())
    for encoder, prefix in zip(encoders, ("siglip.vision_model.", "qwen2.")):
        encoder.load_state_dict(case.weights(prefix))
        model.loaded[type(encoder)] = encoder.eval()           # in the place of those of the hub
    images = np.stack([a0.resize(a0.pad_square(image, c["pad"]), 12)
                       for image in (prev, cur, np.full_like(cur, 127))])
    compare(case, {"pixel_values_prev_cur_background": to_pixels(images),
                   "siglip_last_hidden_state": model.see(torch.from_numpy(images)),
                   "qwen_last_hidden_state": model.read(case["input_ids"],
                                                        torch.ones(1, 6, dtype=torch.bool))})
    for run in c["cases"]:
        model.cfg, seen = replace(model.cfg, poa=run["poa"]), {"images": {"any name": cur},
                                                               "instruction": "x"}
        seen |= {"history_images": {"any name": prev[None]}} if run["reference"] else {}
        points, info = model.act([seen], noise=noise)
        pictures = model(collate([prepare(seen, model.cfg, model.tokenizer)], model.cfg))[2]
        compare(case, {run["img_tokens"]: pictures, run["actions"]: points})
    explicit = seen | {"history_images": {"any name": np.full_like(prev, 127)[None]}}  # grey, given as such
    assert np.array_equal(model.act([explicit], noise=noise)[0], points)
    assert np.allclose(info["pixels"], points * [16, 9], atol=1e-5)  # of the unpadded picture
    assert 0 < np.abs(model.bfloat16().act([seen], noise=noise)[0] - points).max() < 0.05


@pytest.mark.golden
def test_every_recording_is_replayed():
    GOLDEN.check("test_data_a0.py")


def tiny(**changes):
    return replace(PRESETS["tiny"],
                   **{**dict(image_size=24, siglip_width=32, qwen_width=32, width=32, depth=3, heads=2,
                                              max_text=64, single_image=0.0), **changes})


def make(seed=0, **changes):
    torch.manual_seed(seed)
    model = Model(tiny(**changes), load_tokenizer(PRESETS["tiny"]))
    nn.init.normal_(model.model.final_layer.ffn_final.fc2.weight, std=0.2)           # fresh, it is 0
    return model.eval()


def samples(n=3, size=(30, 40)):
    rng, words = np.random.default_rng(0), ("lift the ball", "put the red cube on the plate", "push it")
    return [{"images": {"third": rng.integers(0, 256, (*size, 3), np.uint8)}, "instruction": words[i % 3],
             "dataset": "toy",
             "history_images": {"third": rng.integers(0, 256, (1, *size, 3), np.uint8)},
             "waypoints": rng.uniform(0.2, 0.8, (5, 2)).astype(np.float32)} for i in range(n)]


def batch_of(model, train=False):
    return collate([prepare(s, model.cfg, model.tokenizer, None, i, train) for i, s in enumerate(samples())],
                   model.cfg)


def observe(**changes):
    return make().act([samples(1)[0] | changes])


def test_text_in_even_blocks_pictures_in_odd_ones_padding_nowhere_c07_c09_c19():
    model, hidden, batch, hide = make(), [], batch_of(make()), batch_of(make(condition_mask=1.0), train=True)
    assert torch.equal(batch["mask"], batch["ids"] != model.cfg.pad_id) and not batch["mask"][:, -1].all()
    model.model.blocks[0].register_forward_hook(lambda module, args, out: hidden.append(out))
    (text, mask, pictures), run = model(batch), lambda *f: model.denoise(NOISE, T, model.adapt(f))
    out = run(text, mask, pictures)
    assert out.shape == (3, 5, 2)                              # of six tokens: the time step's is dropped
    assert not torch.equal(run(text, mask, pictures + 1), out) and torch.equal(hidden[0], hidden[1])
    padded, real = (run(text + 9.0 * m[..., None], mask, pictures) for m in (~mask, mask))
    assert torch.equal(padded, out) and not torch.equal(real, out)
    assert not hide["mask"].any() and (hide["images"] == a0.GREY).all()  # no text at all, grey pictures
    for model.model.blocks[0].cross_attn.attn in ("sdpa", "eager"):                  # torch 2.1: NaN
        leaf = text.detach().requires_grad_()
        (out := run(leaf, torch.zeros_like(mask), pictures)).sum().backward()
        assert not leaf.grad.any() and torch.isfinite(out).all()


@torch.no_grad()
def test_poa_subtracts_the_reference():
    """PAPER!=CODE, and c13: no attention; with one frame, nothing."""
    model, off, one = make(), make(poa=False), make(history=1)
    (ref, now), pictures = (model.see(batch_of(model)["images"][:, i])
                            for i in (0, 1)), model(batch_of(model))[2]
    for got, want in ((pictures, [now - ref, now]), (off(batch_of(off))[2], [ref, now]),
                      (one(batch_of(one))[2], [now])):
        assert torch.equal(got, torch.cat(want, 1))


def test_waypoint_weights_are_a_constant_factor():
    """FAITHFUL: the contact's weight of 0.6 has no effect. Also: what learns, and whose draws are whose."""
    model, batch = make(), batch_of(make())
    pred = model.denoise(a0.add_noise(batch["waypoints"], NOISE, T, 1000), T, model.adapt(model(batch)))
    weighted = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]) * (pred - batch["waypoints"]).square().mean()
    torch.testing.assert_close(model.loss(batch, NOISE, T)[0], weighted.mean())
    model.loss(batch)[0].backward()
    learns = {n for n, p in model.named_parameters() if p.grad is not None}
    assert learns == {n for n in model.state_dict() if n.split(".")[0] not in ("siglip", "qwen")}
    assert len(model.param_groups(1e-4, 1e-2)[0]["params"]) == len(learns)
    alone = [model.loss({k: v[i:i + 1] for k, v in batch.items()})[0] for i in range(3)]
    torch.testing.assert_close(model.loss(batch)[0], torch.stack(alone).mean())      # by the sample's key


def test_bf16_targets_only_when_asked():
    """FAITHFUL (a switch): points, noise and alpha_bar on the official grid."""
    model, batch = make(), batch_of(make())
    loss, _ = make(faithful_bf16=True).loss(batch, NOISE, T)
    rounded = batch["waypoints"].bfloat16()
    pred = model.denoise(a0.add_noise(rounded, NOISE.bfloat16(), T, 1000), T, model.adapt(model(batch)))
    torch.testing.assert_close(loss, 0.2 * (pred - rounded.float()).square().mean())
    assert model.loss(batch, NOISE, T)[0] != loss


def test_training_and_inference_pad_alike():
    """FAITHFUL: officially top-left in training and centred in use. Here one setting holds for both."""
    for pad in ("center", "topleft"):
        train, use = (batch_of(make(pad=pad), train=t)["images"] for t in (True, False))
        assert torch.equal(train, use) and (use[:, :, -1] == a0.GREY).all()
        assert (use[:, :, 0] == a0.GREY).all() == (pad == "center")


def test_crop_follows_the_current_frame_unless_faithful():
    """FAITHFUL (a switch): with the geometry of a 384 x 384 filler, the wrong part is cut and turned."""
    image, points = samples(1, (60, 80))[0]["images"]["third"], np.full((5, 2), 0.7)
    asked, chance = [], [0.149]
    draws = SimpleNamespace(random=lambda: chance[0], uniform=lambda *of: asked.append(of) or 10.0,
                            integers=lambda low, high: high - 1)
    for faithful, (h, w) in ((False, (60, 80)), (True, (24, 24))):
        frames, moved = a0.augment_frames([None, image], points, tiny(faithful_crop=faithful), draws)
        cut = a0.crop([np.zeros((h, w, 3), np.uint8), image], points,
                      [n - int(n * 0.85) // 2 for n in (w, h)])
        both, wanted = a0.rotate(*cut, 10.0)
        assert frames[0] is None and np.array_equal(frames[1], both[1]) and np.array_equal(moved, wanted)
    chance[0] = 0.151
    assert asked == [(-30, 30)] * 2 and a0.augment_frames([image], points, tiny(), draws)[0][0] is image


def test_augmentation_is_keyed_and_only_in_training():
    cfg, sample = tiny(augment=True, image_aug=True, single_image=0.5), samples(1)[0]
    rng = np.random.default_rng(0)

    def see(key, train=True):
        return prepare(sample, cfg, load_tokenizer(cfg), key=key, train=train)
    plain, many, image = see(0, False), [see(key) for key in range(60)], sample["images"]["third"]
    assert all(torch.equal(a, b) for a, b in zip(see(7).values(), many[7].values()))
    assert 15 < sum((m["images"][0] == a0.GREY).all().item() for m in many) < 45
    assert 2 < sum(not torch.equal(m["waypoints"], plain["waypoints"]) for m in many) < 35
    assert 20 < sum(not np.array_equal(a0.spoil(image, rng), image) for _ in range(200)) < 60  # one in five
    for change in (a0.blur, a0.jitter, a0.add_grain) * 60:     # each of them leaves a grey picture one
        assert 60 < np.asarray(change(Image.new("RGB", (40, 30), (120, 120, 120)), rng)).mean() < 180


def test_colours_change_as_torchvisions_colorjitter_does():
    """Brightness 0.3, contrast 0.4, saturation 0.5, hue 0.03, each at its most, against its definition."""
    for i, (before, after) in enumerate((
            ([[100] * 3, [40] * 3], [[130] * 3, [52] * 3]), ([[100] * 3, [150] * 3], [[90] * 3, [160] * 3]),
            ([[150, 100, 100]] * 2, [[167, 92, 92]] * 2), ([[255, 0, 0]] * 2, [[255, 42, 0]] * 2))):
        draws = SimpleNamespace(permutation=lambda n, i=i: [i], uniform=lambda low, high: high)
        got = np.asarray(a0.jitter(Image.fromarray(np.array([before], np.uint8)), draws), int)
        assert np.abs(got - after).max() <= 2, i


def test_presets_carry_the_official_recipe():
    c, pre = PRESETS["1b"], PRESETS["pretrain"]
    assert (c.lr, c.lr_schedule, c.warmup, c.betas, c.weight_decay, c.batch, c.steps) == \
        (1e-4, "constant", 500, (0.9, 0.999), 1e-2, 100, 30_000)
    assert (c.num_train_steps, c.sample_steps, c.image_size, c.patches) == (1000, 5, 384, 729)
    assert (c.grad_clip, c.ema, c.norm, c.history, c.poa, c.max_text, c.pad_id) == \
        (0, 0, "variance", 2, True, 1024, 151643)
    assert (pre.horizon, pre.history, pre.steps) == (1, 1, 80_000)
    assert replace(PRESETS["170m"], width=2048, depth=28) == c


def test_maniskills_last_point_does_not_count_and_a_model_with_one_point_is_asked_for_it():
    seen, one = samples(2), make(horizon=1, history=1, execute=1)
    for form in ("maniskill", "hoi4d"):
        rows = []
        for i, s in enumerate(seen):
            points = make().act([s], noise=torch.randn(1, 5, 2, generator=a0.keyed_generator(0, i)))[0][0]
            rows.append(a0.metrics(points, s["waypoints"], (40, 30), drop_last=form == "maniskill"))
        assert a0.official_test(make(), seen, form)[0]["mae"] == pytest.approx(np.mean(rows, 0)[1], rel=1e-5)
    found, away = a0.official_test(one, seen, "maniskill")
    assert away.shape == (2, 1) and found["mae"] == found["mae_first"]


def test_hub_encoders_see_a_frame_and_a_text_once_and_texts_stay_on_disk(tmp_path):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    seen, calls = samples(), []
    vision = dict(vision_config=dict(sizes, image_size=24, patch_size=12),
                  text_config=dict(sizes, vocab_size=40))
    SiglipModel(SiglipConfig(**vision)).save_pretrained(tmp_path / "s")
    qwen = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=512)
    Qwen2ForCausalLM(qwen).save_pretrained(tmp_path / "q")
    how = dict(vision=str(tmp_path / "s"), text=str(tmp_path / "q"), text_cache=str(tmp_path / "texts"),
               compute="fp32")
    half = make(**how | {"compute": "auto"})                   # the released ones: in bf16
    assert half.encoder(None, SiglipVisionModel, half.cfg.vision).dtype == torch.bfloat16
    model, eager = make(**how), Model(tiny(**how), load_tokenizer(tiny()), attn="eager")
    points, files = model.act(seen, noise=NOISE)[0], list((tmp_path / "texts").rglob("*.safetensors"))
    assert len(files) == 3 and load_file(files[0])["features"].shape[1] == 32
    assert not any(n.startswith(("siglip", "qwen")) for n in model.state_dict())  # as in official checkpoints
    shutil.rmtree(tmp_path / "q")                              # no longer needed
    eager.load_state_dict(model.state_dict())                  # another kernel, one by one: the same
    alone = np.concatenate([eager.act([o], noise=NOISE[i:i + 1])[0] for i, o in enumerate(seen)])
    assert np.abs(alone - points).max() < 1e-5 and Qwen2Model not in eager.loaded
    model.loaded[SiglipVisionModel].register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    assert np.array_equal(model.act(seen, noise=NOISE)[0], points) and not calls
    now = [s["images"]["third"] for s in seen]
    model.act([s | {"history_images": {"third": x[None]}, "images": {"third": 255 - x}}
               for s, x in zip(seen, now)])
    assert calls == [3]                                        # the current frames became the references
    model.load_state_dict(make(seed=1, **how).state_dict())
    # other weights: anew
    assert not np.array_equal(model.act(seen, noise=NOISE)[0], points) and calls == [3, 6]


def test_policy_shows_the_first_frame_of_its_session():
    policy, (a, b) = Policy(make(reference="first")), ({"images": s["images"], "instruction": "x"}
                                                       for s in samples(2))
    policy.to_arm = lambda observation: [np.zeros(7)]
    for now, first in ((a, a), (b, a), ({**b, "instruction": "y"}, b)):    # a new task begins anew
        assert np.array_equal(policy.ask(now)["history_images"]["third"][0], first["images"]["third"])
        policy.step(now, np.zeros((5, 2)))
    assert "history_images" not in Policy(make(reference="none")).ask(a)


# ---- Action execution, on the tabletop --------------------------------------------------------------------

def oracle_episode(seed, family, noise=0.02, sampler=None):
    """Play recorded points, `noise` of the picture's width off, through the policy; (env, policy)."""
    env = eval_sim.Tabletop((family,), "val", ("third",), 96)
    env.lay_out(seed)
    truth = eval_sim.record_episode(seed, (family,), "val", (), 96, clean=True)["waypoints"][0]
    policy = Policy(make(), None, grasps=sampler and (lambda seen: sampler(env)))
    rng = np.random.default_rng(seed)
    while not env.success() and env.count < env.max_steps:
        chunk = truth + rng.normal(0, noise, (5, 2)) if policy.needs_chunk else None
        env.advance(policy.step(env.observe() if policy.needs_chunk else {"instruction": env.instruction},
                                chunk))
    return env, policy


@pytest.mark.parametrize("family", ["pick", "put", "push", "side"])
def test_right_points_become_an_episode_that_succeeds(family):
    """Image points, depth and camera are enough to act: points 2 % of the width off still do."""
    done = [oracle_episode(seed, family)[0].success() for seed in eval_sim.seeds("val", 12)]
    assert np.mean(done) >= 0.8


def test_grasps_of_a_sampler_are_taken_the_nearest_to_the_contact():
    def sampler(env):                                          # one at X, others beside the other things
        others = [[*thing.at[:2] + [0, 0.03], 0.03, 0] for thing in env.things if thing is not env.x]
        return np.array([*others, [*env.x.at[:2], 0.025, env.x.yaw % (np.pi / 2)]])
    done = [oracle_episode(seed, "pick", sampler=sampler)[0].success() for seed in eval_sim.seeds("val", 12)]
    wrong = [oracle_episode(seed, "pick", sampler=lambda env: sampler(env)[:1])[0].success()
             for seed in eval_sim.seeds("val", 4)]
    assert np.mean(done) >= 0.8 and not any(wrong)


def test_sides_of_a_thing_turn_the_hand():
    """Of a cube turned by 0.4, two sides are seen; the hand turns with them, where its width says nothing."""
    yaw, height = 0.4, 0.05
    turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    along = np.linspace(-0.02, 0.02, 20)
    side = np.stack([*np.broadcast_arrays(along[:, None], -0.02), np.zeros((20, 1))], -1)[:, 0] @ np.eye(3)
    # (20, 20, 3), seen from the front
    points = np.stack([side + [0, 0, z] for z in np.linspace(height, 0, 20)])
    points[..., :2] = points[..., :2] @ turn.T
    normals = a0.side_normals(points, np.ones((20, 20), bool))
    assert len(normals) == 19 * 19 and np.allclose(np.abs(normals @ turn), [0, 1], atol=1e-6)
    disc = 0.02 * np.stack([np.cos(t := np.linspace(0, 2 * np.pi, 400)), np.sin(t), 0 * t], 1)  # wide as any
    found = a0.grasp_yaw(np.zeros(2), disc, np.zeros((0, 3)), normals, 0.084)
    assert abs(found - yaw) <= 0.1
    assert a0.grasp_yaw(np.zeros(2), disc, np.zeros((0, 3)), normals[:0], 0.084) != found


def test_path_beyond_the_arms_reach_or_from_nothing_holds_the_pose_and_says_so(capsys):
    env = eval_sim.Tabletop(("pick",), "val", ("third",), 96)
    seen, _ = env.reset(eval_sim.seeds("val", 1)[0])
    truth = eval_sim.record_episode(env.seed, ("pick",), "val", (), 96, clean=True)["waypoints"][0]
    policy = Policy(make(reach=0.05))
    assert not policy.step(seen, truth)[:6].any()
    assert "reach is 0.05" in policy.problem
    assert "m away" in capsys.readouterr().err
    policy = Policy(make())
    assert not policy.step(seen, np.full((5, 2), [0.02, 0.98]))[:6].any()      # nothing lies there
    assert "of the picture's width away from any thing" in policy.problem


def test_actions_stay_within_a_control_step_and_arrive():
    cfg, start = PRESETS["tiny"], np.array([0.1, 0.0, 0.15])
    targets = [(np.array([-0.1, 0.05, 0.05]), 0.7, 1), (np.array([-0.1, 0.05, 0.05]), 0.7, 0),
               (start, 0.0, 0)]
    rows = a0.to_actions(targets, start, 0.0, 1.0, cfg)
    assert np.abs(rows[:, :3]).max() <= cfg.max_step and np.abs(rows[:, 5]).max() <= cfg.max_turn
    assert np.allclose(rows[:, :6].sum(0), 0) and np.isfinite(rows).all()
    assert (rows[:, 6] == 0).sum() == cfg.grip_steps + 5
    assert not rows[rows[:, 6] == 0][:cfg.grip_steps, :6].any()


@pytest.mark.parametrize("spoil, words", [
    (lambda o: o["depth"]["third"].fill(np.nan), "no valid depth"),
    (lambda o: o["depth"]["third"].fill(0), "depth"),
    (lambda o: o.update(instruction="contemplate the red cube"), "no verb")])
def test_what_cannot_be_planned_holds_the_pose_and_says_so(spoil, words, capsys):
    env = eval_sim.Tabletop(("pick",), "val", ("third",), 96)
    seen, policy = env.reset(eval_sim.seeds("val", 1)[0])[0], Policy(make())
    spoil(seen)
    action = policy.step(seen, np.full((5, 2), 0.5))
    assert not action[:6].any() and action[6] == 1 and words in policy.problem and policy.needs_chunk
    assert words in capsys.readouterr().err


def test_a_hole_in_the_depth_is_filled_from_the_nearest_surface():
    env = eval_sim.Tabletop(("pick",), "val", ("third",), 96)
    seen, _ = env.reset(eval_sim.seeds("val", 1)[0])
    truth = eval_sim.record_episode(env.seed, ("pick",), "val", (), 96, clean=True)["waypoints"][0]
    x, y = (truth[0] * 96).astype(int)
    seen["depth"]["third"][y - 1:y + 2, x - 1:x + 2] = np.nan
    policy = Policy(make())
    policy.step(seen, truth)
    assert not policy.problem and np.isfinite(policy.queue).all()
    env.lay_out(env.seed)
    for action in [*policy.queue]:
        env.advance(action)


def test_points_above_the_horizon_and_missing_matrices_are_named():
    env = eval_sim.Tabletop(("put",), "val", ("third",), 96)
    seen, policy = env.reset(eval_sim.seeds("val", 1)[0])[0], Policy(make(), manner="place")
    level = np.eye(4)                                          # a camera that looks straight ahead
    level[:3, :3], level[:3, 3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]], [0, 0.3, 0.3]
    with pytest.raises(ValueError, match="above the horizon"):
        a0.meet([0.5, 0.1], (96, 96), seen["intrinsics"]["third"], np.linalg.inv(level), 0.0)
    del seen["extrinsics"]
    with pytest.raises(ValueError, match="no extrinsics"):
        policy.step(seen, np.full((5, 2), 0.5))
    with pytest.raises(ValueError, match="manner='fly'"):
        Policy(make(), manner="fly")


@pytest.mark.parametrize("instruction, manner", [
    ("Push, please, the cube", "slide"), ("pick up the bowl and place it on the plate", "place"),
    ("take the mug, then put it in the box", "place"), ("grab the mug, put it down", "place"),
    ("pick up the set of cups", "lift"), ("slide the cube and lift it", "slide"), ("put the red cube down",
                                                                                   "place")])
def test_first_verb_says_how_but_pick_and_place_places(instruction, manner):
    assert a0.manner_of(instruction) == manner
    assert all(a0.manner_of(phrase.format(x="red cube", y="box", on="in", side="left")) == want
               for family, want in (("pick", "lift"), ("put", "place"), ("push", "slide"), ("stack", "place"),
                                    ("side", "place")) for phrase in eval_sim.PHRASES[family])


@pytest.mark.parametrize("change, words", [
    ({"depth": {}}, "depth of camera 'third': .*nothing"), ({"depth": np.ones((96, 96))}, r"no dict \{view"),
    ({"depth": {"third": np.ones((96, 96, 1))}}, r"found shape \(96, 96, 1\)"),
    ({"depth": {"wrist": np.ones((96, 96))}}, "intrinsics of camera 'wrist'"),
    ({"intrinsics": {"third": np.zeros((3, 3))}}, "invertible are expected"),
    ({"intrinsics": {"third": np.eye(4)}}, r"intrinsics .*\(3, 3\)"),
    ({"extrinsics": {"third": np.full((4, 4), np.nan)}}, "extrinsics .*invertible .*nan"),
    ({"extrinsics": None}, "extrinsics"), ({"state": np.zeros(3)}, r"state: numbers \(8,\)"),
    ({"state": np.full(8, np.nan)}, "state: .*nan"), ({"instruction": None}, "say in words"),
    ({"images": {}}, "images: a dict"), ({"chunk": np.zeros((4, 2))}, r"chunk: points \(5, 2\)")])
def test_what_the_robot_says_wrongly_is_one_clear_line(change, words):
    seen, _ = eval_sim.Tabletop(("pick",), "val", ("third",), 96).reset(eval_sim.seeds("val", 1)[0])
    chunk = (seen | change).get("chunk", np.full((5, 2), 0.5))
    with pytest.raises(ValueError, match=words) as caught:
        Policy(make()).step(seen | change, chunk)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk, grasps, words", [
    (np.full((5, 2), np.nan), None, "finite numbers"), (None, [], "at least one"),
    (None, [0.1, 0, 0.02, 0], "rows x y z"),
    (None, np.ones((2, 3)), "rows x y z yaw"), (None, np.full((1, 4), np.nan), "finite numbers")])
def test_points_and_grasps_that_are_no_numbers_hold_the_pose_and_say_so(chunk, grasps, words):
    """NaN points went to the first thing in the picture."""
    seen, _ = eval_sim.Tabletop(("pick",), "val", ("third",), 96).reset(seed := eval_sim.seeds("val", 1)[0])
    if chunk is None:
        chunk = eval_sim.record_episode(seed, ("pick",), "val", (), 96, clean=True)["waypoints"][0]
    policy = Policy(make(), grasps=grasps is not None and (lambda observation: grasps))
    assert not policy.step(seen, chunk)[:6].any() and words in policy.problem and policy.needs_chunk


def official(folder, model, about=None, name="pytorch_model.bin"):
    state = {n: p.bfloat16() for n, p in model.state_dict().items()
             if n.split(".")[0] not in ("siglip", "qwen")}
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save = save_file if name.endswith("safetensors") else torch.save
    save({"module": state} if name.endswith(".pt") else state, folder / name)
    (folder / "config.json").write_text(json.dumps(about or {}))
    return folder


def test_official_layouts_flat_and_nested_load_to_the_same_model_c24(tmp_path):
    model, about = make(), {"pred_horizon": 5, "noise_scheduler": {"num_inference_timesteps": 4}}
    for i, name in enumerate(a0.OFFICIAL):
        folder = official(tmp_path / str(i), model, {"config": about, "pred_horizon": 5} if i else about,
                          name)
        for path in (folder, folder / name):
            cfg = (again := from_pretrained(path, **SIZES)).cfg
            assert (cfg.width, cfg.depth, cfg.heads, cfg.history, cfg.sample_steps) == (32, 3, 2, 2, 4)
            assert all(torch.equal(p, model.state_dict()[n].bfloat16().float())
                       for n, p in again.state_dict().items())
    assert from_pretrained(folder, dtype="bf16", **SIZES).state_adaptor[0].weight.dtype == torch.bfloat16


def test_missing_or_extra_key_is_one_clear_line_c24(tmp_path):
    for change, words in (({"img_adaptor.2.bias": None}, "missing, e.g. img_adaptor.2.bias"),
                          ({"a": 1}, "unknown, e.g. a"),
                          ({"model.x_pos_embed": None}, "x_pos_embed is missing"),
                          ({"b": torch.ones(1)}, "unknown, e.g. b"),
                          ({"state_adaptor.0.bias": torch.ones(3)},
                           "another kind, e.g. state_adaptor.0.bias"),
                          ({"model.img_cond_pos_embed": torch.ones(1, 9, 32)},
                           "for 9 patches, a frame has 4"),
                          ({7: torch.ones(1)}, "unknown, e.g. 7"),
                          ({"model.img_cond_pos_embed": torch.ones(9)}, "for 0 patches, a frame has 4"),
                          ({"plan": [1]}, r"noise_scheduler in its config.json is \[1\]"),
                          ({"plan": {"prediction_type": "epsilon"}}, "another noise schedule")):
        about = {"noise_scheduler": change.pop("plan", None), "config": "no object"}
        file = official(tmp_path, make(), about) / "pytorch_model.bin"
        state = torch.load(file, weights_only=True) | change
        torch.save({n: x for n, x in state.items() if x is not None}, file)
        with pytest.raises(ValueError, match=words) as caught:
            from_pretrained(tmp_path, **SIZES)
        assert "\n" not in str(caught.value)


def test_pretrained_model_begins_a_run_with_five_points_and_says_what_is_left_out(tmp_path, capsys):
    official(tmp_path, make(horizon=1, history=1, execute=1))
    wanted = asdict(tiny(text="x", vision="x")) | {"tokenizer": "tiny"}
    assert from_pretrained(tmp_path, **SIZES).preset == "pretrain"
    with pytest.raises(ValueError, match="2 parameters of another kind"):
        from_pretrained(tmp_path, **wanted)
    # as train.py asks
    model, said = from_pretrained(tmp_path, allow_fresh=True, **wanted), capsys.readouterr().err
    assert model.fresh == list(Model.resized)
    assert all(name in said for name in model.fresh)
    assert said.count("warning") == 2
    assert torch.equal(model.model.x_pos_embed, a0.position_tables(model.cfg)["x_pos_embed"])
    assert model.cfg.horizon == 5


def test_saved_folder_loads_to_the_same_points_encoders_included(tmp_path):
    model, points = make(), make().act(seen := samples(), noise=NOISE)[0]
    model.preset, model.origin = "tiny", {"license": "MIT"}
    again = model.save_pretrained(tmp_path) or from_pretrained(tmp_path)
    assert (again.cfg, again.preset, again.origin, again.fresh) == (model.cfg, "tiny", model.origin, [])
    assert np.array_equal(again.act(seen, noise=NOISE)[0], points)
    assert not next(again.siglip.parameters()).requires_grad
    assert np.abs(from_pretrained(tmp_path, dtype="bf16").act(seen, noise=NOISE)[0] - points).max() < 0.1


def test_command_line_points_in_a_picture_and_official_metrics(tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["a0.py", *words, "--device", "cpu", "--ckpt", str(tmp_path)])
        a0.main()
        lines = capsys.readouterr().out.splitlines()
        table = {line[:14].strip(): float(line[14:].split()[0]) for line in lines
                 if line.split(" ")[0] in ("contact", "point", "path")}
        return dict(line.split(": ", 1) for line in lines if ": " in line) | {"table": table}
    make().save_pretrained(tmp_path)
    Image.fromarray(samples(1)[0]["images"]["third"]).save(file := tmp_path / "x.jpg")
    run("--image", str(file), "--instruction", "lift the ball")
    assert np.shape(json.loads((tmp_path / "x.json").read_text())["pixels"]) == (5, 2)
    assert Image.open(tmp_path / "x_points.png").size == (40, 30) == Image.open(file).size
    (tmp_path / "x.json").write_text("{}")                     # somebody else's
    with pytest.raises(ValueError, match="not ours"):
        run("--image", str(file), "--instruction", "lift the ball")
    model, rows, away, asked = make(), [], [], []
    rows3 = [s | {"class": name} for s, name in zip(samples(3), ("lift", "put", "put"))]
    monkeypatch.setitem(sys.modules, "data", SimpleNamespace(a0_dataset=lambda form, *where, first_frame: (
        asked.append((form, *where, first_frame)) or rows3[:2] if form == "droid_cotrack" else rows3[2:])))
    said = run("--test", "droid", "--data", "DIR", "--first-frame", "--plot", str(tmp_path / "e.png"))
    for i, s in enumerate(rows3):                              # of both sets; each with noise of its own
        noise = torch.randn(1, 5, 2, generator=a0.keyed_generator(0, i))
        points = model.act([s], noise=noise)[0][0]
        rows.append(a0.metrics(points, s["waypoints"], (40, 30)))
        away.append(100 * np.linalg.norm((points - s["waypoints"]) * [40, 30], axis=1) / 40)
    assert float(said["mae"]) == pytest.approx(np.mean(rows, 0)[1], rel=1e-4) and said["samples"] == "3"
    by_class = ast.literal_eval(said["per_class_mae"])
    assert by_class == pytest.approx({"lift": rows[0][1], "put": np.mean(rows[1:], 0)[1]}, rel=1e-4)
    assert asked == [("droid_cotrack", "DIR", "test", True)]
    mean = np.mean(away, 0)                                    # (T,)
    wanted = dict(zip(("contact", *(f"point {i}" for i in range(1, 5)), "path"), [*mean, mean[1:].mean()]))
    assert said["table"] == pytest.approx(wanted, abs=0.006)
    assert (np.asarray(Image.open(tmp_path / "e.png")) == 211).any()                 # bars
    center, corner = (run("--test", "maniskill", "--data", "D", "--pad", pad)["mae"]
                      for pad in ("center", "topleft"))
    assert center != corner


def test_tabletop_test_shows_scenes_that_no_training_saw(tmp_path, monkeypatch, capsys):
    model = make(reference="first", image_size=24)
    monkeypatch.setattr(a0, "SCENES", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scenes, seeds = a0.tabletop_test(model, "tabletop:pick,put"), eval_sim.seeds("eval", 3)
    assert len(scenes) == 3
    assert not {*seeds} & {*eval_sim.seeds("train", 5000)} | {*eval_sim.seeds("val", 500)} & {*seeds}
    for scene, seed in zip(scenes, seeds):
        episode = eval_sim.record_episode(seed, ("pick", "put"), "eval", ("third",), 24, clean=True)
        assert scene["class"] == episode["family"] and scene["instruction"] == episode["instruction"]
        assert np.array_equal(scene["images"]["third"], episode["images"]["third"][0])
        assert np.array_equal(scene["history_images"]["third"][0], scene["images"]["third"])  # as Policy does
        assert np.array_equal(scene["waypoints"], episode["waypoints"][0])
    with pytest.raises(ValueError, match="is of tabletop, or"):
        a0.tabletop_test(model, "maniskill=D")
    found, away = a0.official_test(model, scenes, "tabletop")
    assert found["samples"] == 3 and away.shape == (3, 5) and (away > 0).all()
    a0.show_errors(np.zeros((2, 1)), tmp_path / "e.png")       # of a model with one point: it has no path
    assert "path" not in capsys.readouterr().out and (tmp_path / "e.png").is_file()


@pytest.mark.parametrize("flags, words", [
    ("--image nope.png --instruction a", "nope.png"), ("--test tabletop --plot nope/e.png", "NAME.png"),
    ("--test tabletop --plot e.xyz", "NAME.png")])
def test_wrong_files_are_named_before_a_model_is_loaded(flags, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["a0.py", *flags.split(), "--ckpt", "no/where/at/all"])
    with pytest.raises((ValueError, OSError), match=words):
        a0.main()


@pytest.mark.parametrize("flags", [
    "--image x.png", "--test droid", "--image x.png --instruction a --test droid --data D", "--plot e.png",
    "--test hoi4d_frame --data D --first-frame", "--test tabletop --pad center",
    "--test tabletop --bf16-pixels",
    "--image x.png --instruction a --plot e.png", "--instruction a"])
def test_flags_that_would_do_nothing_are_an_error(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["a0.py", *flags.split()])
    with pytest.raises(ValueError, match="--image goes with --instruction"):
        a0.main()


@pytest.mark.slow
def test_keys_values_and_features_are_computed_once():
    """FLOPs of one inference at official size, and what a loop that keeps nothing needs."""
    with torch.device("meta"):
        model = Model(Config(sample_steps=2)).bfloat16()
        model.loaded[SiglipVisionModel] = SiglipVisionModel(SiglipVisionModel.config_class(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
            image_size=384,
            patch_size=14, vision_use_head=False)).bfloat16()
        text, pictures, noise = torch.empty(1, 20, 3584), torch.empty(1, 2 * 729, 1152), torch.empty(1, 5, 2)
        features, grey = (text, torch.ones(1, 20, dtype=torch.bool), pictures), torch.empty(1, 384, 384, 3)
    def flops(work):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
        return counter.get_total_flops() / 1e12
    frame, adaptors, two = (flops(work) for work in (
        lambda: model.see(grey), lambda: model.adapt(features), lambda: model.sample(features, noise)))
    model.cfg = replace(model.cfg, sample_steps=1)
    one = flops(lambda: model.sample(features, noise))         # with the keys and values of all five
    sampling, anew = one + 4 * (two - one), 5 * (one - adaptors)
    assert 1.7 < 2 * frame + sampling <= 1.8 and 1.0 < frame + sampling <= 1.15
    assert 3.0 < 2 * frame + adaptors + anew < 3.2


@pytest.mark.parametrize("do, words", [
    (lambda: observe(instruction=" "), "say in words"), (lambda: observe(images={}), "images: a dict"),
    (lambda: observe(history_images={"third": np.zeros((1, 9, 9, 3), np.uint8)}),
     r"found \{'third': \(1, 9, 9, 3\)\}"),
    (lambda: observe(history_images={"third": np.zeros((1, 30, 40, 3))}), "history_images: .*uint8"),
    (lambda: observe(instruction="xyzzy " * 40), "max_text=64"),
    *((lambda x=x: make().act(x), "at least one observation, in a list") for x in (
        [], None, samples(1)[0], "x", [None])),
    *((lambda x=x: observe(history_images=x), "history_images: a dict") for x in (
        [samples(1)[0]["images"]["third"]], samples(1)[0]["images"]["third"][None])),
    (lambda: Policy(make(), execute=2.5), "execute=2.5"),
    (lambda: make().act(samples(1), noise=NOISE), "noise of shape"),
    (lambda: Policy(make(), execute=6), "execute=6"),
    (lambda: make().loss({"ids": 0}), "waypoints: 5 points"),
    (lambda: a0.configure(Config(), horison=5), "'horizon'"),
    (lambda: prepare(samples(1)[0] | {"waypoints": np.ones((4, 2))}, tiny(), make().tokenizer),
     "waypoints: 5 points"),
    (lambda: make(text_cache="x"), "text_cache"),
    (lambda: from_pretrained("x", dtype="int8"), "dtype='int8'"),
    *((lambda d=d, x=x: a0.depth_at(np.full((4, 4), d), [[x, 0.5]]), "no valid depth")
      for d, x in ((0, 0.5), (1, 1.5))),
    *((lambda c=c: Config(**c), f"{next(iter(c))}=") for c in (
        {"views": ("a", "b")}, {"heads": 3}, {"pad": "left"}, {"history": 3}, {"action_dim": 3},
        {"norm": "layer"}, {"depth": 1},
        {"execute": 6}, {"single_image": 1.5}, {"pad_id": 152064}, {"sample_steps": 1001},
        {"patch_size": 385}, {"vocab": 0}))])
def test_wrong_argument_is_one_clear_line(do, words):
    with pytest.raises(ValueError, match=words) as caught:
        do()
    assert "\n" not in str(caught.value)


def test_every_item_of_the_checklist_has_its_test():
    text = "".join((ROOT / "tests" / name).read_text("utf-8") for name in ("test_a0.py", "test_data_a0.py"))
    named = re.findall(r'^(?:def )?(test_\w+)(?:\(.*\):\n    """[\w!=]+, and (c\d\d))?', text, re.M)
    found = {int(n) for words in named for n in re.findall(r"(?:^|_)c(\d\d)", "_".join(words))}
    assert found == set(range(1, 28))
