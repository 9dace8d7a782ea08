"""robobrain_x0.py: recordings of the official code, rotations, codes, prompts, servers, the model, bad input.

`# sheet 12.N` beside a test: it is the N-th item of the checklist that the method was written against. What
holds for every method is in test_methods.py.
"""
import base64
import contextlib
import functools
import importlib
import io
import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import eval_sim
import forks
import numpy as np
import pytest
import robobrain_x0 as x0
import torch
import torch.nn.functional as F
import train
from common import read_json, tiny_tokenizer
from golden_cases import Recordings, tokenizer_path
from PIL import Image
from robobrain_x0 import (PRESETS, ROBOTS, Config, Fast, Model, OmniSAT, Policy, Words, collate,
                          encode_conversation, from_pretrained, infer, load_tokenizer, prepare)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

GOLDEN = Recordings("robobrain_x0")
SERVED = [name for name, r in ROBOTS.items() if r.name]


# ---- Recordings of the official code ----------------------------------------------------------------------

def recording(kind):
    return next(case for case in GOLDEN.cases if case.kind == kind)


def fast_of(case):
    """The FAST+ tokenizer that a recording was made with."""
    c = case.config
    return Fast.load(case.path(c.get("tokenizer", "fast_tokenizer.json")), c.get("scale", 10),
                     c.get("min_token", -354), c.get("vocab_size", 2048))


@GOLDEN.replays("fast_tokenizer")
def test_fast_vocabulary_has_the_size_of_the_release(case):
    assert Fast.load(case.path(case.file)).bpe.get_vocab_size() == case.config["vocab_len"] <= Config.codes
    case.seen.add("vocab_len")


@GOLDEN.replays("fast_tokenizer_cases")
def test_fast_tokenizer_cases(case):                                               # sheet 12.1, 12.3
    c, fast = case.config, fast_of(case)
    assert fast.bpe.get_vocab_size() == c["vocab_len"]
    chunks = {run["prefix"]: (case[run["prefix"] + "actions"].numpy(), run) for run in c["cases"]}
    for name, run in c["constant_chunks"].items():
        chunks[name + "_"] = np.full((run["time_horizon"], run["action_dim"]), run["value"]), run
    for name, (actions, run) in chunks.items():
        T, D = run["time_horizon"], run["action_dim"]
        codes = fast.encode(actions)
        case.compare(name + "tokens", np.array(codes))
        if name + "dct_int" in case:
            case.compare(name + "dct_int", fast.coefficients(codes).reshape(T, D))
        chunk, problem = fast.decode(codes, T, D)
        assert not problem and len(codes) == run.get("n_tokens", len(codes))
        case.compare(name + "decoded", chunk)
        for how in ("server", "strict", "v2"):                 # on a good chunk, all agree
            assert np.array_equal(fast.official(codes, T, D, how), chunk)
    m = c["malformed"]
    T, D = m["time_horizon"], m["action_dim"]
    for name, run in m["cases"].items():
        codes = case[f"malformed_{name}_ids"].tolist()
        assert len(fast.coefficients(codes)) == run["n_coefs"]
        for how in ("server", "strict", "v2"):
            if run[how]["raises"]:
                with pytest.raises(ValueError):
                    fast.official(codes, T, D, how)
            else:
                case.compare(run[how]["tensor"], fast.official(codes, T, D, how))
        chunk, problem = fast.decode(codes, T, D)
        assert (chunk is None) == bool(problem), name
        assert problem or (run["n_coefs"] == T * D and "utf8" not in name), name
    case.seen |= {f"{n}actions" for n in chunks} | {f"malformed_{n}_ids" for n in m["cases"]}


@GOLDEN.replays("fast_invalid_utf8")
def test_codes_that_are_no_utf8_are_flagged(case):                                 # sheet 12.3
    c, fast, (T, D) = case.config, fast_of(case), case["actions"].shape
    good = fast.encode(case["actions"].numpy())
    case.compare("good_ids", np.array(good))
    bad = good[:c["replaced_index"]] + [c["replacement_id"]] + good[c["replaced_index"] + 1:]
    assert bad == case["bad_ids"].tolist() and case["replaced_index"].item() == c["replaced_index"]
    case.compare("official_decode", fast.official(bad, T, D))
    assert np.abs(case["official_decode"].numpy()).max() == pytest.approx(c["official_max_abs"])
    assert fast.decode(good, T, D)[1] == ""
    assert fast.decode(bad, T, D) == (None, "the codes are no valid UTF-8")
    case.seen |= {"actions", "bad_ids", "replaced_index"}


@GOLDEN.replays("fast_tokenizer_meta")
def test_fast_tokenizer_meta(case):                                                # sheet 12.2
    recorded, c = case.json(), case.config
    fast = fast_of(case)
    case.compare("ids_not_valid_utf8_alone", [k for k in range(c["vocab_size"]) if "\ufffd" in
                                              fast.bpe.decode([k])], recorded["ids_not_valid_utf8_alone"])
    for name in ("scale", "min_token", "vocab_size"):
        case.compare(name, c[name], recorded[name])
    case.compare("vocab_len", fast.bpe.get_vocab_size(), recorded["vocab_len"])
    assert Config.action_id == c["bos_offset"] and Config.fast_min == c["min_token"]
    ids = {f"fast_id_{k}": Config.action_id + k for k in (0, c["vocab_size"] - 1)}
    case.compare("bos_offset_example", ids, recorded["bos_offset_example"])
    runs, toy = recording("fast_tokenizer_cases").config["cases"], recording("fast_toy_fit").config
    case.compare("cases", [[r["T"], r["D"], r["n_tokens"], r["n_coefs"]] for r in recorded["cases"]],
                 [[r["time_horizon"], r["action_dim"], r["n_tokens"], r["n_coefs"]] for r in runs])
    case.compare("toy_fit", {n: v for n, v in toy.items() if n in recorded["toy_fit"]}, recorded["toy_fit"])


@GOLDEN.replays("fast_toy_fit")
def test_fast_fits_the_recorded_vocabulary(case):
    c, corpus = case.config, case["corpus"].numpy()
    fast, example = Fast.fit(corpus, c["scale"], c["vocab_size"]), case["example_actions"].numpy()
    case.compare("example_actions", example, corpus[c["example_index"]])
    case.compare("corpus", corpus.reshape(c["n_chunks"], c["time_horizon"], c["action_dim"]))
    assert fast.low == c["min_token"] and fast.bpe.get_vocab_size() == c["vocab_len"]
    assert fast.encode(example) == c["example_ids"]
    points = fast.coefficients(c["example_ids"]) - c["min_token"]
    assert points.tolist() == c["example_string_codepoints"]
    mine, theirs = json.loads(fast.bpe.to_str())["model"], recording("fast_toy_tokenizer").json()["model"]
    assert mine["vocab"] == theirs["vocab"]
    assert [list(m) for m in mine["merges"]] == [list(m) for m in theirs["merges"]]


@GOLDEN.replays("fast_toy_tokenizer")
def test_fast_reads_a_fitted_file(case):
    recorded, toy = case.json()["model"], recording("fast_toy_fit").load()
    fast = Fast.load(case.path(case.file), toy.config["scale"], toy.config["min_token"], 2048)
    case.compare("vocab", fast.bpe.get_vocab(), recorded["vocab"])
    assert len(recorded["merges"]) == case.config["n_merges"]
    assert fast.encode(toy["example_actions"].numpy()) == toy.config["example_ids"]


@GOLDEN.replays("bspline")
def test_splines_match_the_reference(case):                                        # sheet 12.24
    for run in case.config["cases"]:
        p, T, N, degree = run["prefix"], run["T"], run["N"], run["degree"]
        basis, actions = x0.spline_basis(T, N, degree), case[p + "actions"].numpy()
        fit = x0.spline_fit(basis, run["ridge"])
        got = {"knots": x0.spline_knots(N, degree), "basis": basis, "fit_matrix": fit,
               "control": fit @ actions, "recon": basis @ fit @ actions,
               "recon_2T": x0.spline_basis(run["horizon_2T"], N, degree) @ fit @ actions}
        for name, value in got.items():
            case.compare(p + name, value)
        assert np.abs(got["recon"] - actions).max() == pytest.approx(run["max_err"])
        np.testing.assert_allclose(basis.sum(1), 1, atol=1e-12)                     # a partition of unity
        case.seen.add(p + "actions")


@GOLDEN.replays("rvq")
def test_residual_codes_match_the_reference(case):                                 # sheet 12.25
    c, control, flat = case.config, case["control"].numpy(), []
    K, L, recon = c["K"], c["L"], np.zeros_like(control)
    for g, name in enumerate(c["group_order"]):
        x, books = control[..., c["groups"][name]].transpose(0, 2, 1), case[f"codebook_{name}"].numpy()
        codes, quantized, errors = x0.residual_quantize(x, books)                   # (B, dof, L), (B, dof, N)
        case.compare(f"indices_{name}", codes)
        case.compare(f"quantized_{name}", quantized)
        case.compare(f"level_mse_{name}", errors)
        flat.append((codes + g * L * K + np.arange(L) * K).reshape(len(control), -1))
        recon[..., c["groups"][name]] = quantized.transpose(0, 2, 1)
    case.compare("flat_tokens", np.concatenate(flat, 1))
    case.compare("recon_control", recon)
    if [d for name in c["group_order"] for d in c["groups"][name]] == list(range(7)):      # an arm
        degree = min(3, c["N"] - 1)
        sat = OmniSAT(np.stack([case[f"codebook_{n}"].numpy() for n in c["group_order"]]), degree, 3 * L * K)
        basis = x0.spline_basis(3 * c["N"], c["N"], degree)
        for row, tokens in zip(recon, case["flat_tokens"].tolist()):
            np.testing.assert_allclose(sat.decode(tokens, 3 * c["N"], 7)[0], basis @ row, atol=1e-6)
    case.seen |= {"control", *(f"codebook_{n}" for n in c["group_order"])}


@GOLDEN.replays("omnisat_meta")
def test_omnisat_file_and_manifest_tell_the_same(case):
    recorded, rvq = case.json(), recording("rvq").config
    for i, (a, b) in enumerate(zip(recorded["bspline"], recording("bspline").config["cases"])):
        assert a.items() <= (b | {"case": i}).items()
    assert all(recorded["rvq"][name] == rvq[name] for name in ("K", "N", "L", "groups"))
    case.seen.add("bspline")


@GOLDEN.replays("chunk_delta_and_norm")
def test_deltas_and_quantiles_match(case):                                         # sheet 12.5, 12.6, 12.7
    c = case.config
    for step in c["sample_intervals"]:
        poses = case[f"step{step}_pose_chunk"].numpy()
        deltas = x0.pose_deltas(poses, step)
        assert deltas.shape == (c["horizon"], c["action_dim"])
        case.compare(f"step{step}_eepose_delta", deltas)
        case.compare(f"step{step}_qpos_delta", x0.joint_deltas(case[f"step{step}_qpos_chunk"].numpy(), step))
        if c["action_dim"] == 14:                              # and back; Euler angles as rotations
            out, want = (p.reshape(-1, 2, 7) for p in (x0.integrate("agilex", poses[0], deltas),
                                                       poses[step::step]))
            np.testing.assert_allclose(out[..., [0, 1, 2, 6]], want[..., [0, 1, 2, 6]], atol=1e-9)
            turn = x0.quat_delta(*(x0.euler_to_quat(p[..., 3:6]) for p in (out, want)))
            assert np.abs(turn).max() < 1e-7
    v2 = c["eepose_delta_v2_sum"]
    case.compare(v2["output"], x0.pose_deltas_summed(case[v2["input"]].numpy(), v2["step"]))
    stats = x0.quantile_stats(case[c["normalizer"]["fit_input"]].numpy())
    for name, value in stats.items():
        case.compare(f"stats_{name}", np.array(value))
    x = case["fit_data"].numpy()
    case.compare("normalized_clipped", x0.normalize(x, stats))
    case.compare("normalized_unclipped", x0.normalize(x, stats, clip=False))
    case.compare("denormalized_from_clipped", x0.denormalize(case["normalized_clipped"].numpy(), stats))
    zero = x0.denormalize(np.zeros((1, c["action_dim"])), stats)
    case.compare("denormalized_zero", zero)
    middle = (np.array(stats["quantiles_low_"]) + stats["quantiles_high_"]) / 2
    np.testing.assert_allclose(zero[0], middle, atol=1e-8)
    still = c["normalizer"]["constant_columns"]
    assert (x0.normalize(x, stats)[:, still] == -1).all()
    np.testing.assert_allclose(x0.denormalize(-np.ones(len(middle)), stats)[still], x[0, still], atol=1e-8)
    case.compare("state_eepose_20d", x0.state_6d(case["step1_pose_chunk"].numpy()[:-1]))
    case.seen |= {n for n in case.tensors if n.endswith("_chunk") or n == "fit_data"}


@GOLDEN.replays("norm_stats")
def test_statistics_file_matches(case):                                            # sheet 12.6
    c, recorded = case.config, case.json()
    stats = x0.quantile_stats(recording("chunk_delta_and_norm").load()["fit_data"].numpy())
    assert set(recorded) == {c["key"]} and set(recorded[c["key"]]) == set(c["fields"]) == set(stats)
    for name in c["fields"]:
        case.compare(name, np.array(stats[name]), np.array(recorded[c["key"]][name]))
    ours = x0.read_stats(case.path(case.file))[c["key"]]["action"]
    for mine, theirs in zip(*(x0.scale_offset(s, ours["q01"]) for s in (ours, recorded[c["key"]]))):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)


@GOLDEN.replays("pose_transform")
def test_rotations_match(case):                                                    # sheet 12.4
    c = case.config
    euler, quat, raw, delta = (case[n].numpy() for n in ("euler", "quat", "d6_raw", "delta_axis_angle"))
    add, m6 = x0.rotvec_to_quat(delta), x0.matrix_to_quat(x0.matrix_from_6d(case["euler_to_6d"].numpy()))
    got = {"euler_to_6d": x0.matrix_to_6d(x0.quat_to_matrix(x0.euler_to_quat(euler))),
           "d6_to_matrix": x0.matrix_from_6d(raw), "d6_to_euler": x0.quat_to_euler(m6),
           "d6_to_quat": x0.matrix_to_quat(x0.matrix_from_6d(raw)),
           "quat_to_6d": x0.matrix_to_6d(x0.quat_to_matrix(quat)), "euler_to_quat": x0.euler_to_quat(euler),
           "quat_to_euler": x0.quat_to_euler(quat),
           "delta_6d_axis_angle": x0.quat_delta(m6, np.roll(m6, -1, 0)),
           "delta_quat_axis_angle": x0.quat_delta(quat, np.roll(quat, -1, 0)),
           "seq_d6_deltas": x0.quat_delta(m6[:-1], m6[1:]),
           "seq_quat_deltas": x0.quat_delta(quat[:-1], quat[1:]),
           "add_delta_to_euler": x0.quat_to_euler(x0.quat_multiply(add, x0.euler_to_quat(euler))),
           "add_delta_to_quat": x0.quat_multiply(add, x0.unit(quat))}
    assert set(got) == set(c["functions"])
    for name, value in got.items():
        want = case[name].numpy()
        if name in c["quaternion_tensors"]:
            value = np.where((value * want).sum(-1, keepdims=True) < 0, -value, value)
        if name in c["euler_tensors"]:
            value, want = (x0.quat_to_matrix(x0.euler_to_quat(v)) for v in (value, want))
        case.compare(name, value, want)
    case.seen |= {"euler", "quat", "d6_raw", "delta_axis_angle"}


@GOLDEN.replays("image_preprocess")
def test_pictures_match_the_processor(case):                                       # sheet 12.18, 12.19
    names = ("min_pixels", "max_pixels", "patch_size", "merge_size")
    cfg = replace(PRESETS["3b"], **{name: case.config[name] for name in names})
    for run in case.config["images"]:
        image = case[run["prefix"] + "uint8"].numpy()
        assert image.shape[:2] == (run["height"], run["width"])
        patches, grid = x0.patchify(image, cfg)
        pixels = x0.to_pixels(patches, cfg)
        assert len(pixels) == run["rows_total"]
        case.compare(run["prefix"] + "grid_thw", np.array([grid]))
        case.compare(run["prefix"] + "pixel_values_rows", pixels[:run["rows_stored"]])
        case.compare(run["prefix"] + "row_means", pixels.double().mean(1))
        case.seen.add(run["prefix"] + "uint8")


@GOLDEN.replays("keys_3b")
def test_3b_has_the_official_names_and_shapes(case):                               # sheet 12.23
    c, recorded = case.config, case.json()
    with torch.device("meta"):
        model = Model(PRESETS["3b"])
    state = {n: list(t.shape) for n, t in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]                    # tied
    assert len(state) == c["n_keys"]
    case.compare("keys", state, recorded["keys"])
    for name, part in (("total_params_tied", model), ("vision_params", model.visual)):
        case.compare(name, sum(p.numel() for p in part.parameters()), recorded[name])
    assert PRESETS["3b"].image_id == c["image_token_id"] and PRESETS["3b"].vocab == c["text"]["vocab_size"]


def recorded_model(case, folder, tied=(), model="model.", visual="visual."):
    """The recording's weights in a folder of the official layout, loaded; model, visual: names there."""
    c = case.config
    weights, about, text = case.weights(c["weights"]["prefix"]), c["model"], c["model"]["text"]
    config = {"model_type": "qwen2_5_vl", **text, "vision_config": about["vision"],
              "image_token_id": about["image_token_id"]}
    (folder / "config.json").write_text(json.dumps(config))
    state = {re.sub("^model[.]", model, re.sub("^visual[.]", visual, n)): t for n, t in weights.items()}
    state |= {name: weights["model.embed_tokens.weight"].clone() for name in tied}
    save_file(state, folder / "model.safetensors")
    ids = {"pad_id": text["pad_token_id"], "im_end_id": text["eos_token_id"],
           "vision_start_id": about["vision_start_token_id"], "vision_end_id": about["vision_end_token_id"]}
    taken = {*ids.values(), about["image_token_id"]}
    free = [i for i in range(text["vocab_size"]) if i not in taken]                 # not in the recording
    ids |= dict(zip(("im_start_id", "boa_id", "eoa_id", "split_id", "action_id"), free))
    return from_pretrained(folder, preset="tiny", attn=c["attention"], tokenizer=Words(None, None), codes=1,
                           **ids)


@GOLDEN.replays("tiny_qwen2_5_vl")
@torch.no_grad()
def test_tiny_model_matches(case):                                                 # sheet 12.21, 12.22, 12.23
    c = case.config
    with tempfile.TemporaryDirectory() as folder:
        model, *others = (recorded_model(case, Path(folder), **layout) for layout in (
            {}, {"tied": c["weights"]["tied_left_out"]},
            {"model": "model.language_model.", "visual": "model.visual."}))         # both layouts, tied head
    for other in others:
        assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    ids, grid, pixels, n = (case["in.input_ids"], case["in.image_grid_thw"], case["in.pixel_values"],
                            c["prompt_len"])
    positions, delta = x0.rope_positions(ids[0].tolist(), model.cfg, grid.tolist())
    case.compare("out.position_ids", positions[:, None])
    case.compare("out.rope_deltas", np.array([[delta]]))
    case.compare("out.vision_embeds", model.visual(pixels, grid_thw=grid).pooler_output)
    batch = {"patches": pixels, "grid": grid, "ids": ids, "positions": positions[None]}
    logits = F.linear(model(batch), model.model.embed_tokens.weight)
    case.compare("out.logits", logits)
    case.compare("out.token_loss", F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")[None])
    labels = case["in.labels"][0, 1:]
    j = (labels != c["ignore_index"]).nonzero()[:, 0]
    case.compare("out.loss", model.loss(batch | {"rows": j, "targets": labels[j], "clamped": j})[0][None])
    positions, delta = x0.rope_positions(ids[0, :n].tolist(), model.cfg, grid.tolist())
    prompt = {"patches": pixels, "grid": grid, "ids": ids[:, :n], "positions": positions[None],
              "delta": torch.tensor([delta]), "length": torch.tensor([n])}
    want = case["out.greedy_10"][0].tolist()
    how = replace(model.cfg, max_new_tokens=c["greedy"]["new_tokens"], repetition_penalty=1.0)
    for draft in (None, want, want[::-1]):
        writer = model.write(prompt, how, "free", [draft])
        case.compare("out.greedy_10", np.array(writer.answers()))
        assert draft != want or writer.passes[0] <= len(want) // 2
    case.seen |= {n for n in case.tensors if n.startswith(("weights.", "in."))}


@GOLDEN.replays("tiny_qwen2_5_vl_config")
def test_tiny_model_file_and_manifest_tell_the_same(case):
    model, recorded = recording("tiny_qwen2_5_vl").config, case.json()
    assert recorded["config"] == model["model"] and recorded["prompt_len"] == model["prompt_len"]
    case.seen.add("config")


class Characters:
    """The recordings' text tokenizer: one id per character, names of roles one id each."""

    def __init__(self, c):
        self.special, self.rule = c["special"], c["text_encoding"]

    def encode(self, text):
        if text in self.special:
            return [self.special[text]]
        return [ord(x) % self.rule["modulo"] + self.rule["offset"] for x in text]


@GOLDEN.replays("train_encoding")
def test_conversations_and_labels_match(case):                                     # sheet 12.16, 12.17
    c, s, words = case.config, case.config["special"], Characters(case.config)
    cfg = replace(PRESETS["3b"], action_id=c["fast_id_offset"], boa_id=c["fallback_ids"]["boa"],
                  eoa_id=c["fallback_ids"]["EOA"], split_id=c["fallback_ids"]["action_split"],
                  im_start_id=s["<|im_start|>"], im_end_id=s["<|im_end|>"], image_id=s["<|image_pad|>"],
                  vision_start_id=s["<|vision_start|>"], vision_end_id=s["<|vision_end|>"],
                  pad_id=c["pad_token_id"])
    for name, run in c["cases"].items():
        tokens = [t * h * w // c["spatial_merge_size"] ** 2 for t, h, w in run["image_grid_thw"]]
        codes = run["action_eepose_token"]
        ids, labels = encode_conversation(run["conversations"], codes, tokens, words, cfg)
        case.compare(f"{name}_input_ids", np.array(ids))
        case.compare(f"{name}_target", np.array(labels[1:] + [c["ignore_index"]]))
        case.compare(f"{name}_image_mask", (np.array(ids) == cfg.image_id).astype(np.uint8))
        for before, i in zip(ids, ids[1:]):                    # only behind words
            assert i != cfg.boa_id or before not in words.encode("\n")


@GOLDEN.replays("train_encoding_cases")
def test_conversations_file_and_manifest_tell_the_same(case):
    recorded, c = case.json(), recording("train_encoding").config
    assert all(recorded[name] == c[name] for name in ("special", "fallback_ids", "cases"))
    assert list(c["cases"]) == case.config["cases"]
    case.seen.add("cases")


@GOLDEN.replays("train_prompts")
def test_training_prompts_match(case):                                             # sheet 12.8
    recorded, c = case.json(), case.config
    modes = {"agilex_prompt_v2_1": ("agilex", False), "agilex_prompt_v3": ("agilex", True),
             "libero_prompt_v2_1": ("libero", False), "r1lite_prompt_v2_1": ("r1lite", False),
             "r1lite_prompt_v2_demo": ("r1lite_demo", False)}
    for name, text in recorded["templates"].items():
        case.compare(name, x0.training_template(*modes[name]), text)
    for name, run in c["pipeline"].items():
        robot, subtask = modes[run["template"]]
        robot = f"{robot.removesuffix('_demo')}_demo" if name.endswith("_demo") else robot
        got = x0.training_prompt(robot, subtask, recorded["inputs"]["raw_task"], recorded["inputs"]["task"])
        case.compare(name, got, recorded[name])
    assert x0.DEMO_TASK == c["demo_task"].lower()


@GOLDEN.replays("server_images")
def test_red_and_blue_are_swapped_for_a2d_and_r1lite_only(case):                   # sheet 12.20
    c, requests = case.config, recording("server_requests").json()["cases"]
    for robot, index in c["case_index"].items():
        camera, images = c["cameras"][robot], requests[index]["requests"][0]["json"]["images"]
        first = x0.request_images(robot, images)[0]
        assert ROBOTS[robot].cameras[0] == camera and ROBOTS[robot].bgr == c["swap_red_blue"][robot]
        assert list(first.shape[1::-1]) == c["size"]
        sent = np.array(Image.open(io.BytesIO(base64.b64decode(images[camera]))).convert("RGB"))
        assert np.array_equal(sent, case[f"{robot}_input_{camera}"].numpy())
        name, (a, b) = f"{robot}_to_processor_{camera}_", c["stored_rows"]
        case.compare(f"{name}rows{a}_{b}", first[a:b])
        case.compare(name + "mean", first.mean(tuple(c["mean_axes"])))
        if robot in c["full_image_robots"]:
            case.compare(name + "full", first)
        case.seen.add(f"{robot}_input_{camera}")


def render_chat(text):
    """A prompt in Qwen's chat template; <image> stands for each picture."""
    text = text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    return (f"<|im_start|>system\n{Config.system}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"
            "<|im_start|>assistant\n")


def server_words(c):
    """The recordings' text: ids -> text without special tokens."""
    known = c["text_vocabulary"]
    return lambda ids: "".join(known.get(str(i), c["text_unknown"]) for i in ids if i < c["special_from"]
                               and not known.get(str(i), "").startswith("<|"))


@GOLDEN.replays("server_cases")
def test_server_cases(case):                              # sheet 12.8 to 12.15: prompts, answers, errors
    c, recorded, log = case.config, case.json(), {}
    requests = recording("server_requests").json()["cases"]
    fast, decode = Fast.load(case.path("fast_tokenizer.json")), server_words(c)
    cfg = replace(PRESETS["3b"], action_id=c["fast_id_offset"], boa_id=c["boa_id"], split_id=c["eoa_id"],
                  pad_id=c["pad_token_id"], im_end_id=c["eos_token_id"])
    assert len(recorded) == c["n_cases"] == len(requests)

    def write(prompt, pictures, options):
        log.update(rendered_prompt=render_chat(prompt), generate_kwargs=options,
                   image_sizes_given_to_processor=[[*p.shape] for p in pictures])
        return log["ids"]

    for want, sent in zip(recorded, requests):
        robot, subtask, loaded = want["robot"], sent["subtask_mode"], sent.get("model_loaded", True)
        log["ids"] = want.get("generated_token_ids")
        for request in sent["requests"]:
            path, body = request["path"], request["json"]
            if path == "/health":
                status, got = x0.health(robot, subtask, "", loaded)
                case.compare("health", [status, got] if not loaded else got, want["health"])
            elif path == "/info":
                case.compare("info", x0.service_info(robot, subtask, ""), want["info"])
            else:
                status, got = infer(robot, body, write if loaded else None, decode, fast, want.get("stats"),
                                    subtask, official=True, cfg=cfg)
                if "infer" in want:
                    case.compare("infer", [status, got], want["infer"])
                    continue
                case.compare("status", status, want["status"])
                poses = [r.pop("eepose", []) for r in (got, want["response"])]
                case.compare("response.eepose", *map(np.array, poses))
                assert got == want["response"], sent["index"]
        if "rendered_prompt" in want:
            for name in ("rendered_prompt", "generate_kwargs", "image_sizes_given_to_processor"):
                case.compare(name, log[name], want[name])
    for robot, about in c["robots"].items():
        r, names = ROBOTS[robot], ("cameras", "action_dim", "state_dim")
        assert [list(r.cameras), 7 * r.arms, r.pose_dim] == [about[name] for name in names]


@GOLDEN.replays("server_requests")
def test_requests_are_complete(case):
    assert [run["index"] for run in case.json()["cases"]] == list(range(case.config["n_cases"]))
    case.seen.add("cases")


@pytest.mark.golden
def test_every_recording_is_replayed():
    GOLDEN.check()


@pytest.mark.golden
def test_prompts_and_errors_of_all_servers_without_the_third_party_file():         # sheet 12.8, 12.15
    """As test_server_cases, but what needs no FAST+ vocabulary: it runs everywhere."""
    recorded, requests = (recording(kind).json() for kind in ("server_cases", "server_requests"))
    for want, sent in zip(recorded, requests["cases"], strict=True):
        robot, subtask, body = want["robot"], sent["subtask_mode"], sent["requests"][0]["json"]
        if "rendered_prompt" in want:
            text = x0.serving_prompt(robot, body["instruction"], subtask)
            assert render_chat(text) == want["rendered_prompt"]
            assert x0.generate_options(robot) == want["generate_kwargs"]
        elif want.get("status", 200) != 200:
            got = infer(robot, body, print, print, None, None, subtask, official=True)
            assert got == (want["status"], want["response"])


# ---- Small models and tokenizers of our own ---------------------------------------------------------------

STATS = {"toy": {"action": {"q01": [-0.5] * 6 + [0.0], "q99": [0.5] * 6 + [1.0]}}}


def small(**changes):
    """The tiny preset, made smaller still: a pass costs about a millisecond."""
    return replace(PRESETS["tiny"], **{**dict(
        image_size=16, patch_size=4, merge_size=2, window_size=16, vit_width=16, vit_depth=2, vit_mlp=16,
        full_attention=(1,), llm_width=32, llm_depth=2, llm_mlp=32, llm_init=0.3, mrope_section=(1, 1, 2),
        action_dim=7, max_words=5, fast="fit", omnisat="fit", fast_vocab=1024), **changes})


def make(seed=0, **changes):
    torch.manual_seed(seed)
    cfg = small(**changes)
    return Model(cfg, load_tokenizer(cfg), STATS).eval()


def samples(cfg, n):
    rng, words = np.random.default_rng(0), ("put the red cube on the plate", "lift the ball", "push it left")
    return [{"images": {v: rng.integers(0, 256, (40, 48, 3), np.uint8) for v in cfg.views}, "dataset": "toy",
             "instruction": words[i % 3], "subtask": "reach for the ball",
             "actions": rng.uniform(-0.4, 0.4, (cfg.horizon, cfg.action_dim))} for i in range(n)]


def looks(cfg, n=1):
    return [{name: s[name] for name in ("images", "instruction")} for s in samples(cfg, n)]


def test_of_a_chunk_that_nobody_could_foresee_only_the_words_are_learnt():
    cfg = small()
    words, (sample,) = load_tokenizer(cfg), samples(cfg, 1)
    whole, part = (prepare(sample | more, cfg, words, STATS, train=True) for more in ({}, {"unforeseen": True}))
    code = (cfg.action_id <= whole["labels"]) & (whole["labels"] < cfg.action_id + cfg.codes)
    assert code.any() and torch.equal(part["labels"], whole["labels"].masked_fill(code, -100))
    assert torch.equal(part["ids"], whole["ids"]) and cfg.boa_id in part["labels"]


@pytest.mark.parametrize("tokens", ["fast", "omnisat"])
def test_the_tiny_presets_vocabulary_is_at_hand_wherever_it_runs(tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for D in (7, 14):
        cfg = replace(PRESETS["tiny"], tokens=tokens, action_dim=D)
        words = load_tokenizer(cfg)
        for x in x0.example_chunks(cfg, 50):
            assert error(words.actions, x).max() < (0.15 if tokens == "fast" else cfg.tolerance + 1e-9)
        assert words.actions.fitted


@functools.cache
def tokenizers(T=30, D=14):
    """(chunks, one tokenizer of each kind) for chunks (T, D)."""
    cfg = replace(PRESETS["3b"], horizon=T, action_dim=D, execute=1, entries=32, tolerance=0.2)
    chunks = x0.example_chunks(cfg, 200)
    return chunks, [x0.fit_actions(replace(cfg, tokens=kind), chunks) for kind in ("fast", "omnisat")]


def error(tok, x):
    """Of a chunk's way through codes, which must succeed."""
    chunk, problem = tok.decode(tok.encode(x), *x.shape)
    assert problem == ""
    return np.abs(chunk - x)


# ---- Rotations and poses ----------------------------------------------------------------------------------

def angle(p, q):
    return np.linalg.norm(x0.quat_delta(p, q), axis=-1).max()


def test_rotations_survive_every_form_at_angles_near_0_and_pi():
    rng = np.random.default_rng(0)
    sizes = rng.choice([0, 1e-300, 1e-12, 1e-8, 1e-4, 0.1, 1, 3, np.pi - 1e-4, np.pi - 1e-9, np.pi], 200)
    v = x0.unit(rng.normal(size=(200, 3))) * sizes[:, None]
    q = x0.rotvec_to_quat(v)
    m = x0.quat_to_matrix(q)
    np.testing.assert_allclose(m @ m.transpose(0, 2, 1), np.tile(np.eye(3), (len(m), 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(m), 1, atol=1e-12)
    back = {"vector": x0.rotvec_to_quat(x0.quat_to_rotvec(q)), "matrix": x0.matrix_to_quat(m),
            "euler": x0.euler_to_quat(x0.quat_to_euler(q)),
            "6d": x0.matrix_to_quat(x0.matrix_from_6d(x0.matrix_to_6d(m) * [[2, 2, 2, 3, 3, 3]]))}
    assert {name: angle(q, other) < 1e-7 for name, other in back.items()} == dict.fromkeys(back, True)
    tiny = sizes < 1e-3
    np.testing.assert_allclose(x0.quat_to_rotvec(q)[tiny], v[tiny], rtol=1e-9, atol=1e-300)
    assert np.linalg.norm(x0.quat_to_rotvec(q), axis=-1).max() <= np.pi + 1e-12


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2, np.pi / 2 - 1e-9])
def test_gimbal_lock_keeps_the_rotation(pitch):
    q = x0.euler_to_quat(np.array([0.3, pitch, -1.1]))
    assert angle(q, x0.euler_to_quat(x0.quat_to_euler(q))) < 1e-6


def test_rotations_turn_from_the_left_in_the_base_frame():
    quarter, pose = np.array([0, 0, np.pi / 2]), [0, 0, 0, 0.2, 0, 0, 0] * 2
    row = [0.1, 0, 0, *quarter, 1] * 2                                              # Rz after Rx
    np.testing.assert_allclose(x0.integrate("agilex", pose, [row])[0], [0.1, 0, 0, 0.2, 0, np.pi / 2, 1] * 2)


@pytest.mark.parametrize("robot", SERVED)
def test_applying_deltas_reproduces_the_poses(robot):                              # sheet 12.5
    rng, r = np.random.default_rng(1), ROBOTS[robot]
    p = np.cumsum(rng.normal(scale=0.05, size=(31, r.arms, 7)), 0)
    deltas, euler = x0.pose_deltas(p.reshape(31, -1)), r.rotation == "euler"
    turn = p[..., 3:6] if euler else x0.euler_to_quat(p[..., 3:6])
    poses = np.concatenate([p[..., :3], turn, p[..., 6:]], -1)
    got = x0.integrate(robot, poses[0].ravel(), deltas).reshape(30, r.arms, -1)
    np.testing.assert_allclose(got[..., :3], poses[1:, :, :3], atol=1e-12)
    a, b = (x0.euler_to_quat(x) if euler else x for x in (got[..., 3:-1], poses[1:, :, 3:-1]))
    assert angle(a, b) < 1e-9


@pytest.mark.parametrize("robot, grips", [("a2d", [1, 0.75, 0, 0]), ("franka", [0, 0.25, 1, 1]),
                                          ("agilex", [-0.5, 0.25, 1, 80]), ("r1lite", [-0.5, 0.25, 1, 80])])
def test_gripper_conventions_per_robot(robot, grips):                              # sheet 12.13
    r = ROBOTS[robot]
    deltas = np.zeros((4, 7 * r.arms))
    deltas[:, 6::7] = np.array([-0.5, 0.25, 1, 80])[:, None]
    out = x0.integrate(robot, request(robot)["eef_pose"], deltas).reshape(4, r.arms, -1)
    assert all(out[:, arm, -1].tolist() == grips for arm in range(r.arms))


def test_agilex_accepts_a_pose_in_a_list():                                        # sheet 12.14
    pose = np.arange(14) / 10
    assert np.array_equal(x0.read_pose("agilex", [pose.tolist()]), x0.read_pose("agilex", pose))


# ---- Action codes -----------------------------------------------------------------------------------------

def test_code_k_is_id_149595_plus_k():                                             # sheet 12.2
    assert Config().legal == [*range(149595, 151643), 151665, 151666, 151667, 151645]
    assert x0.parse_answer([149594, 149595, 151642, 151643], Config, False, str)[1] == [[0, 2047]]


def test_low_frequencies_come_first():
    fast, x = Fast.fit(tokenizers(8, 7)[0], 10, 512, -40), np.zeros((8, 7))
    x[:, 2] = 0.5                                              # one constant dimension: frequency 0 only
    integers = fast.coefficients(fast.encode(x))
    assert integers[2] == round(10 * 0.5 * 8 ** 0.5) and np.count_nonzero(integers) == 1


def test_official_fit_loses_what_the_data_lacks():
    rng = np.random.default_rng(0)
    chunks = [np.where(rng.random((4, 2)) < 0.5, -1.0, 1.0) for _ in range(50)]
    official, ours = Fast.fit(chunks, 10, 600), Fast.fit(chunks, 10, 600, -25)
    other = rng.uniform(-1, 1, (4, 2))
    with pytest.raises(ValueError, match="too small.*action_tokens"):
        official.encode(other)
    assert error(ours, other).max() < 0.2 and error(official, chunks[0]).max() < 0.2


def test_lenient_decoders_differ():                                                # sheet 12.3
    chunks, (fast, _) = tokenizers(30, 7)

    def cut(n):                                                # the codes of the first n coefficients
        return fast.bpe.encode(fast.bpe.decode(fast.encode(chunks[0]))[:n], add_special_tokens=False).ids
    assert fast.decode(cut(22 * 7), 30, 7) == (None, "154 coefficients instead of 30 x 7")
    server, strict, v2 = (fast.official(cut(22 * 7), 30, 7, how) for how in ("server", "strict", "v2"))
    assert not strict.any() and not v2[22:].any() and v2[:22].any() and np.abs(server[22:]).max() > 0.01
    assert fast.official(cut(22 * 7), 10, 7, "server").shape == (30, 7)             # 30 rows, whatever T is
    assert not fast.official(cut(50), 30, 7, "server").any() and not fast.official([], 30, 7).any()


@pytest.mark.parametrize("D", [7, 14])
def test_any_chunk_survives_the_round_trip_within_the_stated_error(D):
    rng, (chunks, (fast, sat)) = np.random.default_rng(0), tokenizers(30, D)
    for x in [*chunks[:20], *rng.uniform(-1, 1, (10, 30, D)), np.ones((30, D)), -np.ones((30, D))]:
        assert np.sqrt(np.mean(error(fast, x) ** 2)) <= 0.05                        # half a step of 0.1 each
        assert error(fast, x).max() <= 0.05 * 30 ** 0.5 * 2 ** 0.5
        n, codes = 10 * D // 7, sat.encode(x)                  # 2, 1, 1 codes per number; then repairs
        assert n <= len(codes) <= 9 * n and (len(codes) == 9 * n or error(sat, x).max() <= 0.2)
    assert np.mean([error(sat, x) for x in chunks]) < 0.1


def test_any_codes_have_a_defined_result():
    rng, (_, (fast, sat)) = np.random.default_rng(0), tokenizers(8, 7)
    for n in [0, 1, 5, 13, 14, 21, 26, 300]:
        codes = rng.integers(0, fast.bpe.get_vocab_size(), n).tolist()
        for tok in (fast, sat):
            chunk, problem = tok.decode(codes, 8, 7)
            assert (chunk is None) == bool(problem) and (chunk is None or np.isfinite(chunk).all())
        for how in ("server", "strict") + ("v2",) * bool(n):
            assert fast.official(codes, 8, 7, how).shape in ((8, 7), (30, 7))


def walk(g, codes=None, seed=0):
    """Follow codes through a grammar to the end of a chunk; without any, random ones that it allows."""
    rng, out, units, last = np.random.default_rng(seed), [], 0, 0
    end = rng.integers(g.least, g.size + 1) if codes is None else g.least
    while units < end or last or len(out) < len(codes or ()):
        ok = g.table[last + g.slot[units]] & (g.count <= g.size - units)
        k = int(rng.choice(ok.nonzero().flatten().numpy())) if codes is None else codes[len(out)]
        assert ok[k]
        out.append(k)
        units, last = units + int(g.count[k]), int(g.after[k])
    return out


@pytest.mark.parametrize("D", [7, 14])
def test_constrained_codes_always_decode_and_can_be_any_chunk(D):                  # sheet 12.26
    chunks, both = tokenizers(10, D)
    for tok in both:
        g = tok.grammar(10, D)
        assert all(tok.decode(walk(g, seed=seed), 10, D)[1] == "" for seed in range(20))
        for x in [*chunks[:50], *np.random.default_rng(0).uniform(-1, 1, (20, 10, D))]:
            assert walk(g, tok.encode(x)) == tok.encode(x)


@pytest.mark.golden
def test_released_vocabulary_is_constrained_too():
    case = recording("fast_tokenizer_cases").load()
    fast = fast_of(case)
    for T, D in ((30, 14), (30, 7), (10, 7)):
        assert fast.decode(walk(fast.grammar(T, D)), T, D)[1] == ""
    codes = case["case0_tokens"].tolist()
    assert walk(fast.grammar(*case["case0_actions"].shape), codes) == codes


def test_codes_of_a_character_in_two_parts_are_followed_through():
    """Characters of two bytes, and a vocabulary of single bytes only: the second one must follow."""
    fast = Fast.fit([np.zeros((4, 1))], 10, 42, -354)
    g, codes = fast.grammar(4, 1), fast.encode(np.array([[1.0], [-1.0], [0.5], [0.0]]))
    assert len(codes) == 8 and len(g.table) > 1 and g.count[codes].tolist() == [1, 0] * 4
    for k in codes[::2]:
        assert not g.table[g.after[k], codes[::2]].any() and g.table[g.after[k]].any()
    assert all(fast.decode(walk(g, seed=seed), 4, 1)[1] == "" for seed in range(20))


def test_omnisat_codes_are_few_ordered_and_better_with_more_levels():              # sheet 12.25
    chunks, errors = tokenizers(30, 14)[0], []
    for levels in (1, 2, 4):
        sat = OmniSAT.fit(chunks, 6, 3, (levels,) * 3, 32)
        codes = sat.encode(chunks[0])
        assert len(codes) == 14 * levels
        assert [k // 32 for k in codes[:levels]] == list(range(levels))             # position, level by level
        assert codes[6 * levels] // (32 * levels) == 2                              # the gripper's group
        errors.append(np.mean([error(sat, x) ** 2 for x in chunks]))
    assert errors[2] < 0.5 * errors[1] < 0.5 * errors[0]
    np.testing.assert_allclose(sat.decode(codes, 59, 14)[0][::2], sat.decode(codes, 30, 14)[0], atol=1e-9)


def test_residual_quantization_is_idempotent_and_ties_go_to_the_first():           # sheet 12.25
    rng = np.random.default_rng(0)
    books = rng.normal(size=(3, 3, 16, 10)) * [[[[1.0]], [[0.05]], [[0.002]]]]      # each level finer
    sat = OmniSAT(books, 3)
    for x in rng.normal(size=(20, 30, 7)):
        codes = sat.encode(x)
        assert sat.encode(sat.decode(codes, 30, 7)[0]) == codes
    book = np.array([[[1.0], [-1.0], [1.0]]])
    assert x0.residual_quantize(np.array([[0.0], [1.0], [-3.0]]), book)[0].ravel().tolist() == [0, 0, 1]


def example(name, monkeypatch, *args):
    """Run examples/NAME.py with these arguments; its module comes back."""
    monkeypatch.syspath_prepend(str(Path(x0.__file__).parent / "examples"))
    monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, args)])
    module = importlib.import_module(name)
    if args:
        module.main()
    return module


def test_tokenizers_are_compared_and_kept_by_one_command(tmp_path, capsys, monkeypatch):
    chunks = x0.example_chunks(small(action_dim=14), 100) * 0.3
    np.save(tmp_path / "chunks.npy", chunks)
    example("action_tokens", monkeypatch, "--data", tmp_path / "chunks.npy", "--preset", "tiny",
            "--out", tmp_path)
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {row[0].strip(): [float(x.strip(" %s")) for x in row[1:]] for row in table[1:]}
    assert rows["uniform bins"][0] == 4 * 14 > rows["FAST+"][0] > 5 and rows["OmniSAT"][0] >= 20
    stats = x0.read_stats(tmp_path / "action_stats.json")["action.eepose"]["action"]
    for kind, name in (("fast", "FAST+"), ("omnisat", "OmniSAT")):
        tok = x0.load_actions(replace(PRESETS["tiny"], tokens=kind, **{kind: str(tmp_path)}))
        held_out = x0.normalize(chunks[::10], stats)
        assert np.mean([len(tok.encode(x)) for x in held_out]) == pytest.approx(rows[name][0], abs=0.06)
        lost = np.array([x0.denormalize(tok.decode(tok.encode(x), 4, 14)[0] - x - 1, stats) -
                         x0.denormalize(-np.ones(14), stats) for x in held_out]).reshape(-1, 7)[:, :3]
        far = np.linalg.norm(lost, axis=1) * 1000
        assert rows[name][2:4] == pytest.approx([far.mean(), far.max()], abs=0.06)
    with pytest.raises(ValueError, match="n, T, A"):
        example("action_tokens", monkeypatch, "--data", tmp_path / "no.npy")


def test_four_numbers_of_metaworld_are_an_arm_that_does_not_turn(monkeypatch):
    tool, rng = example("action_tokens", monkeypatch), np.random.default_rng(0)
    rows = [{"actions": rng.uniform(-1, 1, (30, 4)), "dataset": "mt10"} for _ in range(40)]
    stats = {"mt10": {"action": {"q01": [-1, -1, -1, 0], "q99": [1, 1, 1, 1], "mask": [True] * 4}}}
    monkeypatch.setattr(tool.data, "open_dataset", lambda *args, **how: rows)
    monkeypatch.setattr(tool.data, "dataset_statistics", lambda rows: stats)
    (x, s), *_ = tool.of_dataset("lerobot=mt10", 40)[0]
    arm = x0.denormalize(x, s)                                              # (30, 7)
    np.testing.assert_allclose(arm[:, :3] * 100, rows[0]["actions"][:, :3], atol=1e-9)      # 1 is 1 cm
    assert np.abs(arm[:, 3:6]).max() < 1e-9 and (arm[:, 6] >= 0).all()
    with pytest.raises(ValueError, match="has 4 numbers.*Leave --out out"):
        example("action_tokens", monkeypatch, "--data", "lerobot=mt10", "--out", "x")


# ---- Prompts, conversations, answers ----------------------------------------------------------------------

@pytest.mark.parametrize("robot", SERVED)
@pytest.mark.parametrize("subtask", [False, True])
def test_training_prompts_have_a_period_that_serving_drops(robot, subtask):
    a = x0.serving_prompt(robot, "X", subtask).rpartition("<image>")
    b = x0.training_prompt(robot, subtask, "X", "y").rpartition("<image>")
    assert a[0] == b[0] and a[2].startswith("\nYour overall task is: x")
    assert b[2].startswith(".\nYour overall task is: x")
    again = x0.serving_prompt(robot, "Go.", subtask, strip_period=True)
    assert "is: go.." in x0.serving_prompt(robot, "Go.", subtask) and ".." not in again


@pytest.mark.parametrize("turns, pictures, words", [
    ([("human", "<video>"), ("gpt", "a")], [], "videos cannot be read"),
    ([("human", "<image>"), ("gpt", "a")], [], "0 pictures"),
    ([("gpt", "a"), ("human", "b")], [], "take turns"),
    ([("human", "a"), ("gpt", "b")], [4], "1 pictures, but")])
def test_wrong_conversation_is_one_clear_line(turns, pictures, words):
    cfg, turns = PRESETS["tiny"], [{"from": a, "value": b} for a, b in turns]
    with pytest.raises(ValueError, match=words):
        encode_conversation(turns, None, pictures, load_tokenizer(cfg), cfg)


def test_words_before_boa_become_the_subtask():                                    # sheet 12.10, 12.12, 12.17
    k, boa, eoa, split, end = (getattr(Config, f"{name}_id") for name in
                               ("action", "boa", "eoa", "split", "im_end"))

    def parse(ids, subtask):
        return x0.parse_answer(ids, Config, subtask, lambda ids: " ".join(map(str, ids)))
    assert parse([5, 6, boa, k + 1, k + 2, split, k + 3, end], True) == ("5 6", [[1, 2], [3]], False)
    assert parse([5, k + 1, end], True) == ("Parsing failed: <boa> token not found", [[1]], False)
    assert parse([eoa, end], False) == ("", [[]], True)


def test_words_between_codes_are_dropped():                                        # sheet 12.11
    k = Config.action_id
    assert x0.parse_answer([k + 1, 99, k + 2, 151643, k + 3], Config, False, str)[1] == [[1, 2, 3]]


def test_abilities_are_asked_and_read():
    assert x0.ability_prompt("grounding", "a {q} cup").endswith("describes: a {q} cup.")
    read = x0.parse_ability
    assert read("pointing", "[(376, 309), ( 332 ,357)]").tolist() == [[376, 309], [332, 357]]
    assert read("trajectory", "[[1, 2], [3, 4]]").tolist() == [[1, 2], [3, 4]]
    assert read("affordance", "it is [577, 224, 638, 310].").tolist() == [[577, 224, 638, 310]]
    assert read("grounding", "nothing").shape == (0, 4) and read("general", "yes") == "yes"
    model, picture = make(max_new_tokens=6), np.zeros((30, 50, 3), np.uint8)
    found, text = model.answer(picture, "where is the cube", "pointing", seed=1)
    assert found.shape[1] == 2 and model.answer(picture, "where is the cube", "pointing", seed=1)[1] == text
    with pytest.raises(ValueError, match="no ability 'point'; did you mean 'pointing'"):
        model.answer(picture, "x", "point")


def test_abilities_are_scored(monkeypatch):
    mask, abilities, line = np.zeros((20, 30), bool), example("abilities", monkeypatch), [[0, 0], [10, 0]]
    rate = abilities.score_ability
    mask[5:10, 10:20] = True
    assert rate("pointing", np.array([[10, 5], [19, 9], [20, 9], [99, 99]]), mask) == {"in mask": 0.5}
    assert rate("pointing", np.zeros((0, 2), int), mask) == {"in mask": 0.0}
    assert rate("grounding", [[0, 0, 10, 10]], [5, 0, 15, 10])["iou"] == pytest.approx(1 / 3)
    assert rate("affordance", [], [5, 0, 15, 10]) == {"iou": 0.0}
    assert rate("trajectory", [[0, 3], [1, 3], [10, 3]], line) == pytest.approx({"rmse": 3, "frechet": 3})
    assert abilities.frechet(line, line[::-1]) == 10 and rate("trajectory", [], line)["rmse"] == np.inf
    with pytest.raises(ValueError, match="'general' have no measure"):
        rate("general", "yes", "no")
    for found in ([[3, 4], [20, 10]], [[20, 15, 3, 4]], np.zeros((0, 2))):
        shown = abilities.draw_ability(np.zeros((20, 30, 3), np.uint8), np.array(found))
        assert shown.any() == bool(len(found))


def test_abilities_are_scored_by_command(tmp_path, capsys, monkeypatch):
    make(max_new_tokens=4).save_pretrained(tmp_path / "ck")
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    Image.new("L", (30, 20), 255).save(tmp_path / "m.png")

    def score(*rows):
        lines = [json.dumps({"image": "a.png", "question": "where", **row}) for row in rows]
        (tmp_path / "q.jsonl").write_text("\n".join(lines))
        example("abilities", monkeypatch, tmp_path / "q.jsonl", tmp_path / "ck", tmp_path / "out")
    score({"ability": "pointing", "mask": "m.png"}, {"ability": "grounding", "box": [0, 0, 5, 5]},
          {"ability": "trajectory", "points": [[0, 0], [9, 9]]})
    said = capsys.readouterr().out
    assert re.search(r"pointing in mask +0.*grounding iou +0.*trajectory frechet", said, re.S)
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    for row, words in (({"image": "none.png"}, "FileNotFoundError"), ({"ability": "pointing"}, "ValueError")):
        with pytest.raises(ValueError, match=f"q.jsonl, line 1: {words}"):
            score(row)


# ---- Samples, batches, the network ------------------------------------------------------------------------

def prepared(model, rows):
    return [prepare(s, model.cfg, model.tokenizer, STATS) for s in rows]


def test_image_text_data_mixes_with_action_data():
    model = make(views=("third", "wrist"))
    talk = {"conversations": [{"from": "human", "value": "<image><image>Which is red?"},
                              {"from": "gpt", "value": "the left one"}],
            "images": {i: np.zeros((h, w, 3), np.uint8) for i, (h, w) in enumerate([(16, 30), (50, 9)])}}
    plain = {"conversations": [{"from": "human", "value": "who"}, {"from": "gpt", "value": "a robot"}]}
    a, b, done = samples(model.cfg, 3)
    rows = prepared(model, [a, b, talk, plain, done | {"done": True}])
    assert [len(p["grid"]) for p in rows] == [2, 2, 2, 0, 2]
    assert (rows[4]["labels"] == model.cfg.eoa_id).sum() == 1
    assert [bool((p["ids"] == model.cfg.boa_id).any()) for p in rows] == [True, True, False, False, False]
    loss, _ = model.loss(collate(rows, model.cfg))
    alone = [(model.loss(collate([p], model.cfg))[0], (p["labels"] != -100).sum()) for p in rows]
    torch.testing.assert_close(loss, sum(a * n for a, n in alone) / sum(n for _, n in alone))   # per token
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- Several bodies, and the data's own vocabulary ---------------------------------------------------------

BODIES = {"toy": ("gripper", 7), "toy_dual": ("dual", 14)}
BOTH = {name: {"action": {"q01": ([-0.5] * 6 + [0.0]) * (A // 7), "q99": ([0.5] * 6 + [1.0]) * (A // 7)}}
        for name, (_, A) in BODIES.items()}


def of_bodies(cfg, n):
    """n samples, of one body and the other by turns; the arm that waits keeps still, its gripper open."""
    rng, out = np.random.default_rng(1), []
    for i, s in enumerate(samples(cfg, n)):
        name = [*BODIES][i % 2]
        actions = np.tile(s["actions"][:, :7], BODIES[name][1] // 7)
        if i % 2:
            actions[:, 7 * rng.integers(2):][:, :7] = [0] * 6 + [1]
        out.append(s | {"actions": actions, "dataset": name, "embodiment": BODIES[name][0]})
    return out


@pytest.mark.parametrize("tokens", ["fast", "omnisat"])
def test_one_vocabulary_is_fitted_on_all_bodies_and_goes_with_the_checkpoint(tokens, tmp_path):
    cfg = small(action_dim=14, tokens=tokens, entries=32)
    rows, before = of_bodies(cfg, 60), load_tokenizer(cfg)
    tok, again = load_tokenizer(cfg), load_tokenizer(cfg)
    for words in (tok, again):
        x0.fit(cfg, words, rows + [{"conversations": []}], BOTH)                    # image-text: no chunk
    x = x0.normalize(rows[1]["actions"], BOTH["toy_dual"]["action"])
    assert tok.actions.encode(x) == again.actions.encode(x)    # the same whenever it is fitted
    assert len(tok.actions.encode(x)) < len(before.actions.encode(x))
    x0.fit(cfg, again, rows[:2], BOTH)                         # it has seen its data
    assert again.actions.encode(x) == tok.actions.encode(x)
    Model(cfg, tok, BOTH).save_pretrained(tmp_path)
    loaded = load_tokenizer(cfg, tmp_path)
    x0.fit(cfg, loaded, rows[:2], BOTH)                        # neither after --resume nor from --init
    assert loaded.actions.fitted and loaded.actions.encode(x) == tok.actions.encode(x)
    stream = load_tokenizer(cfg)
    x0.fit(cfg, stream, iter(rows), BOTH)
    assert stream.actions.encode(x) == tok.actions.encode(x)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["fast", "omnisat"])
@torch.no_grad()
def test_every_body_gets_whole_actions_of_its_own_size(tokens):
    torch.manual_seed(0)
    cfg = small(action_dim=14, tokens=tokens, entries=32, temperature=1.5)
    rows, words = of_bodies(cfg, 40), load_tokenizer(cfg)
    x0.fit(cfg, words, rows, BOTH)
    model, look = Model(cfg, words, BOTH).eval(), looks(cfg, 3)
    losses = [model.loss(collate([prepare(r, cfg, words, BOTH) for r in part], cfg))[0]
              for part in (rows[:2], [rows[0] | {"embodiment": "dual"}, rows[1]])]
    assert losses[0] != losses[1]                              # the prompt names the body
    for name, (body, A) in BODIES.items():
        seen = [o | {"embodiment": body} for o in look]
        for seed in range(10):
            chunks, info = model.act(seen, seed=seed)          # no unnorm_key: that of the body's size
            assert chunks.shape == (3, 4, A) and not info["parse_failed"].any()
            whole = [codes[0] for codes, end in zip(info["codes"], info["finished"]) if not end]
            assert all(words.actions.decode(codes, 4, A)[1] == "" for codes in whole)
        assert np.array_equal(chunks, model.act(seen, name, seed=seed)[0])
        assert Policy(model).step(seen[0]).shape == (A,)
    mixed = [look[0] | {"embodiment": body} for body, _ in BODIES.values()]
    for seen, key, said in ((mixed, None, "statistics for"), (look, None, "toy_dual"),
                            (mixed, "toy", r"\[7, 14\]: act for one body"),
                            (mixed[1:], "toy", "unnorm_key='toy' has statistics of 7")):
        with pytest.raises(ValueError, match=said):
            model.act(seen, key)


@pytest.mark.slow
def test_training_mixes_the_bodies_and_resumes_with_its_vocabulary(tmp_path):
    flags = ("train.py --model robobrain_x0 --out a --cache cache --data-episodes 2 --val-every 0 "
             "--eval-episodes 0 --batch 4 --steps 4 --save-every 2 --keep 0 --device cpu --init none "
             "--set image_size=24 llm_depth=1 vit_depth=1 full_attention=0 tokens=omnisat entries=32")
    done = forks.shared()(flags, cwd=tmp_path)
    assert done.rc == 0, done.err
    assert [*read_json(tmp_path / "a/last/dataset_statistics.json")] == ["tabletop", "tabletop_dual"]
    assert not from_pretrained(tmp_path / "a/last").tokenizer.actions.grammar(4, 14).table[-1].all()
    whole = load_file(tmp_path / "a/last/model.safetensors")
    books = (tmp_path / "a/last/omnisat.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "a/step-000004")
    forks.shared()("train.py --model robobrain_x0 --out a --resume", cwd=tmp_path)
    assert (tmp_path / "a/last/omnisat.safetensors").read_bytes() == books
    again = load_file(tmp_path / "a/last/model.safetensors")
    assert all(torch.equal(again[name], x) for name, x in whole.items())


def test_validation_and_the_last_evaluation_take_every_body(tmp_path, monkeypatch):
    cfg, tested = small(action_dim=14), []
    model, mask = Model(cfg, load_tokenizer(cfg), BOTH), {"loss_mask": np.ones(4, bool)}
    rows = [r | mask for r in of_bodies(cfg, 8)]
    ready = functools.partial(prepare, cfg=cfg, tokenizer=model.tokenizer, stats=BOTH)
    checks = train.held_out(rows, 8, 4, ready, functools.partial(collate, cfg=cfg), 0, 1)
    found = train.validate(train.Step(model), checks, torch.device("cpu"), contextlib.nullcontext, "actions")
    chunks, _ = model.act([r for r in rows if r["embodiment"] == "gripper"])
    alone = np.abs(chunks - [r["actions"] for r in rows if r["embodiment"] == "gripper"]).mean((0, 1))
    assert len(found["val_action_error"]) == 14 and np.isfinite(found["val_action_error"]).all()
    both, _ = model.act([r for r in rows if r["embodiment"] == "dual"])
    right = np.abs(both - [r["actions"] for r in rows if r["embodiment"] == "dual"]).mean((0, 1))
    np.testing.assert_allclose(found["val_action_error"], [*(alone + right[:7]) / 2, *right[7:]], rtol=1e-4)
    model.save_pretrained(tmp_path / "last")
    monkeypatch.setattr(eval_sim, "evaluate", lambda model, module, families, n, **how: tested.append(
        (families, n, how["embodiment"])))
    monkeypatch.setattr(eval_sim, "print_table", lambda results: None)
    args = SimpleNamespace(data="tabletop:pick+tabletop@dual", eval_episodes=3, out=tmp_path)
    train.closed_loop(args, x0, "sdpa", torch.device("cpu"))
    assert tested == [(("pick",), 3, "gripper"), (eval_sim.DEFAULT_FAMILIES, 3, "dual")]


def test_padding_tokens_get_zero_gradient():
    model = make()
    batch = collate(prepared(model, samples(model.cfg, 3)), model.cfg)
    rows = model.embed(batch).detach().requires_grad_()
    model.embed = lambda batch: rows
    model.loss(batch)[0].backward()
    behind = torch.arange(rows.shape[1]) >= batch["length"][:, None]
    assert behind.any() and not rows.grad[behind].any() and rows.grad[~behind].abs().sum() > 0


def test_depth_is_one_more_picture():
    model, flat = make(depth=2.0), make()
    depth = {"depth": {"third": np.full((40, 48), 1.0, np.float32)}}
    s, o = samples(model.cfg, 1)[0] | depth, looks(model.cfg)[0]
    assert [len(prepared(m, [s])[0]["grid"]) for m in (model, flat)] == [2, 1]
    shown = x0.depth_picture(np.array([[0.0, np.nan, 0.5, 2.0, 9.0, np.inf]]), 2.0)
    assert shown[0, :, 0].tolist() == [0, 0, 191, 0, 0, 0]
    assert model.act([o | depth])[0].shape == (1, 4, 7)
    with pytest.raises(ValueError, match="no depth of view 'third'"):
        model.act([o])


def test_official_size_of_a_prompt():                                              # sheet 12.18
    """An agilex observation: 3 pictures of 99 tokens, 30 x 14 actions."""
    cfg, words = PRESETS["3b"], Words(None, None)
    words.encode = lambda text: [ord(c) % 1000 for c in text]
    images = {v: np.zeros((480, 640, 3), np.uint8) for v in cfg.views}
    p = prepare({"images": images, "instruction": "Pick up"}, cfg, words)
    assert p["grid"].tolist() == [[1, 18, 22]] * 3 and (p["ids"] == cfg.image_id).sum() == 3 * 99
    assert p["patches"].shape == (3 * 396, 588) and x0.to_pixels(p["patches"], cfg).shape == (3 * 396, 1176)


# ---- Writing ----------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_cached_decoding_equals_full_forward(seed):
    model = make(seed, max_new_tokens=12)
    batch = collate(prepared(model, looks(model.cfg)), model.cfg)
    got = model.write(batch, model.cfg, "free").answers()[0]
    ids, positions = batch["ids"], batch["positions"]
    for k in got:                                              # id by id, each by a whole forward pass
        hidden = model(batch | {"ids": ids, "positions": positions})[:, -1]
        assert F.linear(hidden, model.model.embed_tokens.weight).argmax(-1).item() == k
        ids = torch.cat([ids, torch.tensor([[k]])], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
    assert len(got) == 12 or got[-1] == model.cfg.im_end_id


@pytest.mark.parametrize("tokens", ["fast", "omnisat"])
@pytest.mark.parametrize("subtask", [True, False])
def test_constrained_answers_never_mix_words_and_codes_and_always_decode(tokens, subtask):
    for seed in range(4):
        model = make(seed, tokens=tokens, subtask=subtask, chunks=1 + seed % 2, temperature=1.5)
        cfg = model.cfg
        _, info = model.act(looks(cfg, 3), seed=seed)
        assert not info["parse_failed"].any()
        for ids, codes, said in zip(info["ids"], info["codes"], info["subtasks"]):
            assert ids[-1] == cfg.im_end_id and 1 <= len(codes) <= cfg.chunks
            start = ids.index(cfg.boa_id) + 1 if subtask else 0
            assert start - 1 <= cfg.max_words and all(i < cfg.action_id for i in ids[:max(start - 1, 0)])
            assert all(i >= cfg.action_id for i in ids[start:]) and "failed" not in said
            assert all(model.tokenizer.actions.decode(c, 4, 7)[1] == "" for c in codes)


@pytest.mark.parametrize("how", [{}, {"tokens": "omnisat"}, {"subtask": False}, {"constrained": False},
                                 {"temperature": 0.8}, {"repetition_penalty": 1.3}])
def test_any_draft_and_window_give_the_same_answer(how):
    model = make(2, max_new_tokens=30, **how)
    rows, rng = looks(model.cfg, 2), np.random.default_rng(0)
    _, plain = model.act(rows, seed=5, draft="none")
    assert (plain["passes"] == plain["tokens"] - 1).all()
    for draft in (plain["ids"], plain["ids"][::-1], [rng.integers(0, 1040, 40).tolist()] * 2):
        for window in (3, 64):
            _, info = model.act([o | {"draft": d} for o, d in zip(rows, draft)], seed=5, window=window)
            assert info["ids"] == plain["ids"]
            if draft is plain["ids"]:
                assert (info["passes"] <= plain["tokens"] // window + 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_unconstrained_failures_hold_the_pose_unless_lenient(seed):
    model = make(seed, max_new_tokens=8, constrained=False, subtask=False)
    o = looks(model.cfg)[0]
    chunk, info = model.act([o | {"last_action": np.array([9.0] * 6 + [0.25])}])
    assert info["parse_failed"][0] and info["problems"][0]
    assert np.array_equal(chunk[0], np.tile([0] * 6 + [0.25], (4, 1)).astype(np.float32))
    lenient, info = model.act([o], lenient="strict")
    assert info["parse_failed"][0]
    np.testing.assert_allclose(lenient[0, :, :6], 0, atol=1e-6)                     # the quantiles' middle


def test_finished_task_holds_the_pose():
    model = make()
    model.write = lambda batch, cfg, mode, drafts, seed: SimpleNamespace(
        answers=lambda: [[cfg.eoa_id, cfg.im_end_id]], count=torch.ones(1), passes=torch.ones(1))
    chunk, info = model.act(looks(model.cfg))
    assert info["finished"][0] and not info["parse_failed"][0] and not chunk[0, :, :6].any()
    assert info["subtasks"] == [""]


def test_policy_drafts_with_its_last_answer():
    model = make()
    policy, o = Policy(model), looks(model.cfg)[0]
    first = policy.step(o)
    assert policy.ask(o)["draft"] == policy.info["ids"][0]
    assert "draft" not in policy.ask(o | {"instruction": "b"})
    assert np.array_equal(policy.ask(o)["last_action"], first)
    policy.step(o), policy.step(o), policy.step(o)             # now the second chunk, in fewer passes
    assert policy.info["passes"][0] < policy.info["tokens"][0] // 2


# ---- Official requests ------------------------------------------------------------------------------------

def request(robot, **changes):
    r, data = ROBOTS[robot], io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(data, "png")
    pose = ([0.1, 0, 0, 0, 0, 0, 1, 0.5] if r.rotation == "quat" else [0.1] * 7) * r.arms
    images = dict.fromkeys(r.cameras, base64.b64encode(data.getvalue()).decode())
    return {"eef_pose": pose, "instruction": "Pick up", "images": images} | changes


def server(robot, ids, body, official=False, subtask=False, **how):
    """POST /infer where the model says these ids (None: no model is loaded)."""
    r, n = ROBOTS[robot], 7 * ROBOTS[robot].arms
    how = {"stats": {k: {"scale_": [100.0] * n, "offset_": [0.5] * n} for k in r.stats}, **how}
    write = (lambda *_: ids) if ids is not None else None
    return infer(robot, body, write, lambda ids: "go", tokenizers(30, n)[1][0], subtask=subtask,
                 official=official, **how)


@pytest.mark.parametrize("robot", SERVED)
def test_failed_decode_holds_the_pose_unless_official(robot):                      # sheet 12.9 to 12.15
    chunks, (fast, _) = tokenizers(30, 7 * ROBOTS[robot].arms)
    k, body, no_boa = Config.action_id, request(robot), "Parsing failed: <boa> token not found"
    good, done = [k + c for c in fast.encode(chunks[0])], [Config.eoa_id, Config.im_end_id]
    for official in (False, True):
        status, got = server(robot, good, body, official)
        assert status == 200 and got["success"] and np.shape(got["eepose"]) == (30, ROBOTS[robot].pose_dim)
        assert "subtask" not in got and np.abs(np.diff(got["eepose"], axis=0)).max() > 0
        assert server(robot, [*good, Config.split_id, k, k], body, official) == (status, got)   # first chunk
    status, got = server(robot, good[:-1], body, subtask=True)
    assert (status, got["success"], got["decode_ok"], got["subtask"]) == (422, False, False, no_boa)
    assert "coefficients instead of 30 x" in got["error"]
    hold = np.array(body["eef_pose"])
    if robot == "agilex":                                      # it reports ten times what it is told
        hold[6::7] /= 10
    assert got["eepose"] == [hold.tolist()] * 30
    status, got = server(robot, done, body, subtask=True)
    assert (status, got["success"], got["finished"], got["subtask"]) == (200, True, True, "")
    for ids in (good[:-1], done):
        status, got = server(robot, ids, body, official=True, subtask=True)
        assert status == 200 and got["subtask"] == no_boa


WRONG_REQUESTS = {
    "Missing required image: 'cam_": {"images": {}}, "a text is expected": {"instruction": 7},
    "Image processing failed": {"images": dict.fromkeys(ROBOTS["a2d"].cameras, "no base64 at all")},
    "eef_pose=\\[1, 2\\]": {"eef_pose": [1, 2]}, "eef_pose='x'": {"eef_pose": "x"},
    "finite numbers": {"eef_pose": [float("nan")] * 16}, "has no direction": {"eef_pose": [0.0] * 16}}


@pytest.mark.parametrize("words", WRONG_REQUESTS)
@pytest.mark.parametrize("official, want", [(False, 400), (True, 500)])
def test_wrong_request_is_one_clear_line(words, official, want):
    good = [Config.action_id + c for c in tokenizers(30, 14)[1][0].encode(np.zeros((30, 14)))]
    status, got = server("a2d", good, request("a2d", **WRONG_REQUESTS[words]), official)
    assert status == want and not got["success"] and "\n" not in got["error"]
    assert re.search(words, got["error"])


@pytest.mark.parametrize("robot", ["franka", "agilex"])
def test_a_request_is_answered_by_a_model(robot):                                  # sheet 12.27
    r = ROBOTS[robot]
    model = make(robot=robot, prompt="", views=r.cameras, horizon=30, action_dim=7 * r.arms, fast_min=-60,
                 image_size=0, patch_size=20, window_size=80)
    stats = {r.stats[1]: {"scale_": [100.0] * 7 * r.arms, "offset_": [0.0] * 7 * r.arms}}
    words, body = model.tokenizer, request(robot)
    write = functools.partial(model.complete, mode="subtask", seed=0)
    status, got = infer(robot, body, write, words.decode, words.actions, stats, True, cfg=model.cfg)
    assert status == 200 and np.shape(got["eepose"]) == (30, r.pose_dim) and "failed" not in got["subtask"]
    if r.temperature == 0:                                     # the same as act() sees it, but for the pose
        pictures = x0.request_images(robot, body["images"])
        model.stats = {"toy": {"action": {"q01": [-0.01] * 14, "q99": [0.01] * 14}}}
        seen = {"images": dict(zip(r.cameras, pictures)), "instruction": body["instruction"]}
        prompt = x0.serving_prompt(robot, body["instruction"], True)
        assert write(prompt, pictures, {}) == model.act([seen])[1]["ids"][0]


def test_missing_statistics_and_models_are_said():
    status, got = server("franka", [], request("franka"), stats=None)
    assert status == 400 and "statistics for 'action.eepose' are missing" in got["error"]
    assert server("franka", None, request("franka"))[0] == 503
    assert server("franka", [], [1])[0] == 400 and server("franka", [], {"instruction": "x"})[0] == 400


# ---- Checkpoints and what users get wrong -----------------------------------------------------------------

@pytest.mark.parametrize("tokens", ["fast", "omnisat"])
def test_saved_folder_holds_its_action_tokenizer(tmp_path, tokens):
    model = make(tokens=tokens)
    other = x0.example_chunks(model.cfg, 60) ** 3
    model.tokenizer.actions = x0.fit_actions(model.cfg, other)
    model.save_pretrained(tmp_path)
    again, codes = from_pretrained(tmp_path), model.tokenizer.actions.encode(other[0])
    assert again.tokenizer.actions.encode(other[0]) == codes
    assert codes != load_tokenizer(model.cfg).actions.encode(other[0]) or tokens == "fast"
    np.testing.assert_array_equal(again.act(looks(model.cfg))[0], model.act(looks(model.cfg))[0])


def test_rotary_tables_stay_in_32_bits_and_a_torn_config_is_said(tmp_path):
    make().save_pretrained(tmp_path)
    half = from_pretrained(tmp_path, dtype="bf16")
    assert half.model.rotary_emb.inv_freq.dtype == half.visual.rotary_pos_emb.inv_freq.dtype == torch.float32
    for about, words in (({"vision_config": {}}, "no 'hidden_size' in config.json"),
                         ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", **about}))
        with pytest.raises(ValueError, match=words):
            from_pretrained(tmp_path)


def test_tokenizer_that_is_asked_for_goes_before_the_folders(tmp_path):
    model, other = make(), tiny_tokenizer()
    other.add_tokens(["zebra"])
    other.backend_tokenizer.save(str(tmp_path / "other.json"))
    model.cfg.tokenizer = "not/used"
    model.save_pretrained(tmp_path / "ck")
    assert len(from_pretrained(tmp_path / "ck").tokenizer.text) == len(other) - 1
    again = from_pretrained(tmp_path / "ck", tokenizer=str(tmp_path / "other.json")).tokenizer
    assert len(again.text) == len(other)
    assert again.actions.bpe.get_vocab() == model.tokenizer.actions.bpe.get_vocab()


def ask(change, **config):
    """prepare() of an observation, or of a sample that has actions, with a change."""
    cfg = small(**config)
    row, = samples(cfg, 1) if "actions" in change else looks(cfg)
    return prepare(row | change, cfg, load_tokenizer(cfg), STATS)


WRONG = {
    "vocabulary is too small": lambda: Fast(Tokenizer(models.BPE())).grammar(4, 7),
    "has room for codes=16": lambda: Fast(load_tokenizer(small()).actions.bpe, codes=16),
    "is no FAST tokenizer.json": lambda: Fast.load(__file__),
    "codes=40: there are 41 letters": lambda: Fast.fit([np.ones((4, 1))], 10, 40, -20),
    "hold NaN": lambda: load_tokenizer(small()).actions.encode(np.full((4, 7), np.nan)),
    "arms of 7 numbers": lambda: OmniSAT.groups(6),
    "5 control points for 4 actions": lambda: x0.spline_fit(x0.spline_basis(4, 5, 3)),
    "omnisat needs codebooks": lambda: x0.load_actions(replace(PRESETS["3b"], tokens="omnisat")),
    "omnisat wants three levels": lambda: small(tokens="omnisat", levels=(2, 1)),
    "room for entries=1025": lambda: small(tokens="omnisat", entries=1025),
    "need more than codes=512": lambda: OmniSAT(np.zeros((3, 2, 600, 3)), 2, 512),
    "must fit into vocab": lambda: small(action_id=600),
    "hold no other id": lambda: small(boa_id=600),
    "lower fast_min": lambda: small(fast_min=-5), "choose strict": lambda: small(lenient="server"),
    "holds no action statistics": lambda: x0.read_stats(GOLDEN.folder / "manifest.json"),
    "too narrow": lambda: x0.smart_resize(1, 900, 28, 3136, 10**6),
    "actions have 5 numbers": lambda: x0.normalize(np.zeros((4, 5)), STATS["toy"]["action"]),
    "those of the same robot": lambda: x0.denormalize(np.zeros((4, 5)), STATS["toy"]["action"]),
    "control tokens": lambda: ask({"instruction": "<image> a"}),
    r"expected, found \(3, 7\)": lambda: ask({"actions": np.zeros((3, 7))}),
    "no robot 'agilx'; did you mean 'agilex'": lambda: ask({"embodiment": "agilx"}, prompt=""),
    r"\(horizon, action_dim, views\) = \(30, 14, 3\)": lambda: ask({"embodiment": "agilex"}, prompt=""),
    "{task} are filled in, found 'tusk'": lambda: small(prompt="{tusk}"),
    "statistics: finite": lambda: x0.quantile_stats(np.zeros((0, 7))),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_input_is_one_clear_line(words):
    with pytest.raises(ValueError, match=words) as caught:
        WRONG[words]()
    assert "\n" not in str(caught.value)


def bytes_tokenizer():
    """A tokenizer whose words are bytes, with Qwen's marks: no files."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    text = Tokenizer(models.BPE(letters, []))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cfg = replace(PRESETS["3b"], im_start_id=256, im_end_id=257, vision_start_id=258, vision_end_id=259,
                  image_id=260)
    text.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                             "<|image_pad|>"])
    return PreTrainedTokenizerFast(tokenizer_object=text), cfg


@pytest.mark.parametrize("vocabulary", ["bytes", "qwen"])
def test_training_and_serving_give_the_same_ids(vocabulary):
    text, cfg = bytes_tokenizer()
    if vocabulary == "qwen":                                   # third-party, through $TOKENIZER_DIR
        path, cfg = tokenizer_path("qwen2_5_vl") or tokenizer_path("qwen"), PRESETS["3b"]
        if path is None:
            pytest.skip("TOKENIZER_DIR holds no Qwen vocabulary")
        text = PreTrainedTokenizerFast(tokenizer_file=str(path))
    prompt = x0.serving_prompt("agilex", "Go", True)
    talk = [{"from": "human", "value": prompt}, {"from": "gpt", "value": None}]
    ids, _ = encode_conversation(talk, None, [1, 1, 1], Words(text, None), cfg)
    assert ids.count(cfg.image_id) == 3
    assert ids == text(render_chat(prompt), add_special_tokens=False).input_ids
