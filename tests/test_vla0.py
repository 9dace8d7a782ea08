"""vla0.py: recordings of the official code, exact speculative decoding, invariants, what users get wrong.

`# sheet 14.N` beside a test: it is the N-th item of the checklist that the method was written against.
"""
import itertools
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import data
import forks
import vla0
from common import ChunkEnsemble
from golden_cases import Recordings, tokenizer_path
from vla0 import (END, LIBERO, PRESETS, SYMBOLS, Config, Model, Policy, Reader, Writer, collate,
                  decode_integers, encode_actions, from_pretrained, label, load_tokenizer, parse_safe,
                  parse_strict, prepare, to_text)

ROOT = Path(vla0.__file__).resolve().parent
GOLDEN = Recordings("vla0")


# ---- Recordings of the official code ----------------------------------------------------------------------

def partner(case, kind):
    """The entry of another kind that belongs to this one: one of the two needs the other's file."""
    return next(o for o in GOLDEN.cases if o.kind == kind and
                (o.file in case.entry["needs"] or case.file in o.entry["needs"])).load()


@GOLDEN.replays("action_text")
def test_action_text_matches(case):                                                # sheet 14.3, 14.4, 14.5
    c, recorded = case.config, case.json()

    def replay(name, run, limits, H, bins):
        q, outside = encode_actions(np.asarray(run["actions"], limits[0].dtype), *limits, bins, strict=True)
        many = isinstance(run["text"], list)
        texts = [to_text(x) for x in (q if many else q[None])]
        whole = parse_strict(texts, *limits, bins, H)
        assert whole.dtype == limits[0].dtype and outside == 0
        for text, official in zip(texts, whole):               # our own parser agrees on what is well formed
            mine, problem = parse_safe(text, bins, H, len(limits[0]))
            assert not problem and np.array_equal(decode_integers(mine, *limits, bins), official)
        case.compare(name + "text", texts if many else texts[0], run["text"])
        case.compare(name + "decoded", whole if many else whole[0], np.array(run["decoded"]))
        return texts[0]
    limits = vla0.bounds(c["stats"])
    assert len(recorded["encode"]) == c["encode_cases"]
    for i, run in enumerate(recorded["encode"]):
        text = replay(f"encode/{i}/", run, limits, c["H"], c["bins"])
        case.compare(f"encode/{i}/n_chars", len(text), run["n_chars"])
    for i, (run, about) in enumerate(zip(recorded["encode_other_configs"], c["encode_other_configs"])):
        other = vla0.bounds({**run, "dtype": about["stats_dtype"]})
        replay(f"encode_other_configs/{i}/", run, other, about["H"], about["bins"])
    double = vla0.bounds({**c["stats"], "dtype": c["float64_stats"]["decoded_dtype"]})
    assert double[0].dtype == np.float64                       # the same values: the float32 ones, cast
    double = tuple(np.float64(x) for x in limits)
    replay("float64_stats/", recorded["float64_stats"], double, c["H"], c["bins"])
    for name in c["decode"]["cases"]:
        run = recorded["decode"][name]
        got = parse_strict(run["input"], *limits, c["decode"]["bins"], c["decode"]["H"])
        case.compare(f"decode/{name}/shape", list(got.shape), run["shape"])
        case.compare(f"decode/{name}/output", got, np.array(run["output"]).reshape(run["shape"]))


@GOLDEN.replays("ensemble")
def test_ensembles_match(case):                                          # sheet 14.16, 14.17, 14.18, 14.19
    c, see = case.config, {"instruction": "a"}
    for run in c["cases"]:
        cfg = Config(horizon=run["horizon"], action_dim=c["action_dim"], gripper_index=c["gripper_index"])
        policy = Policy(SimpleNamespace(cfg=cfg, stats={}), execute=run["action_horizon"], robot="libero",
                        ensemble=str(run["version"]), ensemble_horizon=run["ensemble_prediction"],
                        ensemble_weight=run["weight"])
        for _ in range(c["wait_steps"]):
            assert not policy.needs_chunk and policy.step(see).tolist() == c["dummy_action"]
        chunks, sent = deque(case[run["chunks"]].numpy()), []
        for _ in range(run["env_steps_after_wait"]):
            sent.append(policy.step(see, chunks.popleft() if policy.needs_chunk else None))
        assert not chunks
        case.compare(run["executed"], np.stack(sent))
    mean, rows = c["integer_mean"], []
    assert mean["clip"] == [0, 1000]
    for i in range(mean["pushes"]):
        last = case[mean["in"]].numpy()[max(0, i + 1 - mean["H"]):i + 1][::-1]     # newest first
        rows.append(vla0.integer_mean([chunk[age] for age, chunk in enumerate(last)]))
    case.compare(mean["out"], np.array(rows))


@GOLDEN.replays("ensemble_cases")
def test_ensemble_file_and_manifest_tell_the_same(case):
    recorded, c = case.json(), partner(case, "ensemble").config
    assert len(recorded["cases"]) == case.config["num_cases"] == len(c["cases"])
    for mine, theirs in zip(recorded["cases"], c["cases"]):
        assert mine.items() <= theirs.items()
    assert recorded["wait_steps"] == LIBERO["wait_steps"]
    assert recorded["dummy_action"] == [*LIBERO["dummy_action"]]
    case.seen.add("cases")


def seen_by(case, c):
    """The recorded simulator frames, as a LIBERO session hands them to the model: turned by 180 degrees."""
    assert c["rotate_degrees"] == 180
    names = c["camera_order"]
    policy = Policy(SimpleNamespace(cfg=Config(views=names), stats={}), robot="libero")
    turned = policy.ask({"images": {n: case[n].numpy() for n in names}, "instruction": "a"})["images"]
    return [turned[n] for n in names]


def pixels(c, run, **changes):
    """The Config of a recorded crop; patches of one pixel, so that nothing is resized to fit them."""
    spread = c["train"]["jitter_ranges"].values()
    return Config(**{**dict(views=c["camera_order"], crop=run["crop_fraction"], image_size=run["img_size"],
                            patch_size=1, merge_size=1, jitter=[(high - low) / 2 for low, high in spread]),
                     **changes})


def drawing(seed):
    return torch.Generator().manual_seed(seed)


@GOLDEN.replays("image")
def test_images_match(case):                                                       # sheet 14.20, 14.21
    c = case.config
    images, train, one = seen_by(case, c), c["train"], c["single_jitter"]
    for run in c["eval"]:
        x = vla0.crop_views(images, pixels(c, run))                                        # (V, 3, s, s)
        case.compare(run["tensor"], x.permute(0, 2, 3, 1)[None, None])
    tile, how = c["tile"], c["processor"]
    cfg = pixels(c, next(run for run in c["eval"] if run["tensor"] == tile["from"]))
    case.compare(tile["tensor"], vla0.prepare_images(images, cfg)[0])
    assert (tile["order"], tile["direction"]) == (c["camera_order"], "horizontal")
    assert vla0.PIXELS == (tuple(how["mean"]), tuple(how["std"]))
    cfg = replace(cfg, **{k: how[k] for k in ("patch_size", "temporal_patch_size", "merge_size")})
    patches, grid = vla0.patchify(vla0.prepare_images(images, cfg), cfg)
    case.compare("pixel_values", patches)
    case.compare("image_grid_thw", grid)
    assert grid[0].prod() // how["merge_size"] ** 2 == how["n_image_tokens"]
    run = train["jittered"]
    x = vla0.prepare_images(images, pixels(c, train, tile=False), drawing(run["torch_seed"]), train=True)
    case.compare(run["tensor"], x[None])
    run = train["not_jittered"]
    x = vla0.crop_views(images, pixels(c, train), drawing(run["torch_seed"]), train=True)
    case.compare(run["tensor"], x.permute(0, 2, 3, 1)[None])
    operations = dict(zip(("brightness", "contrast", "saturation", "hue"), vla0.JITTER))
    for run in one["cases"]:
        case.compare(run["out"], operations[run["op"]](case[one["in"]], run["factor"]))
    state = c["libero_state8"]
    got = vla0.libero_state(state["eef_pos"], state["eef_quat_xyzw"], state["gripper_qpos"])
    case.compare(state["out"], got[None])


@GOLDEN.replays("image_draws")
def test_crops_and_colours_are_drawn_in_the_official_order(case):                 # sheet 14.22
    c, recorded = partner(case, "image").config, case.json()
    h, w = c["source_size"]
    where = np.indices((h, w)).transpose(1, 2, 0)              # pictures that say of each pixel where it was
    high = where[..., :1] // 256 * 16 + where[..., 1:] // 256
    image = np.concatenate([where % 256, high], 2).astype(np.uint8)

    def corners(generator):
        x = vla0.crop_views([image] * len(c["camera_order"]), pixels(c, c["train"]), generator, train=True)
        row, column, high = x[:, :, 0, 0].int().unbind(1)
        return torch.stack([row + high // 16 * 256, column + high % 16 * 256], 1).tolist()
    g = drawing(recorded["train_torch_seed"])
    case.compare("train_crops_top_left", corners(g), recorded["train_crops_top_left"])
    order, factors = vla0.draw_jitter(pixels(c, c["train"]), g)
    case.compare("jitter/order", order, recorded["jitter"]["order"])
    for name, factor in zip(("brightness", "contrast", "saturation", "hue"), factors):
        case.compare(f"jitter/{name}", factor, recorded["jitter"][name])
    case.compare("train_nojitter_crops_top_left", corners(drawing(recorded["train_nojitter_seed"])),
                 recorded["train_nojitter_crops_top_left"])
    how = {name: c["processor"][name] for name in ("patch_size", "temporal_patch_size", "merge_size")}
    grid = vla0.patchify(partner(case, "image")[c["processor"]["in"]][None], Config(**how))[1]
    case.compare("n_image_tokens", int(grid.prod()) // how["merge_size"] ** 2, recorded["n_image_tokens"])


def shapes(module):
    return {name: list(p.shape) for name, p in module.state_dict().items()}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@GOLDEN.replays("checkpoint_keys")
def test_official_parameters_load_strictly(case):                                 # sheet 14.26
    c, recorded = case.config, case.json()
    about = {**c["build"], "rope_scaling": {"mrope_section": c["build"]["mrope_section"]}}
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder, "config.json"), {**about, "model_type": "qwen2_5_vl"})
        write_json(Path(folder, "generation_config.json"), {"repetition_penalty": Config.repetition_penalty})
        save_file({}, Path(folder, "model.safetensors"))
        _, sizes = vla0.read_official(Path(folder))
    cfg = vla0.configure(PRESETS["3b"], **sizes)
    assert cfg == PRESETS["3b"] or c["build"]["hidden_size"] != PRESETS["3b"].llm_width
    with torch.device("meta"):
        model = Model(cfg)
        state = {name: torch.empty(shape) for name, shape in recorded["keys"].items()}
    assert len(state) == c["num_tensors"] and not any("lm_head" in name for name in state)
    model.load_state_dict(state, strict=c["strict"], assign=True)
    case.compare("keys", shapes(model), recorded["keys"])
    for name, module in (("params", model), ("vision_params", model.visual)):
        case.compare(name, sum(p.numel() for p in module.parameters()), recorded[name])


class RecordedTokenizer:
    """Knows the recorded pieces of text between control tokens, and nothing else."""

    def __init__(self, cfg, texts, rows):
        self.pieces, special = {}, {getattr(cfg, field) for field in vla0.SPECIAL.values()}
        split = "(" + "|".join(map(re.escape, vla0.SPECIAL)) + ")"
        for text, row in zip(texts, rows):
            pieces = [p for p in re.split(split, text) if p and p not in vla0.SPECIAL]
            groups = [list(g) for control, g in itertools.groupby(row, special.__contains__) if not control]
            assert len(pieces) == len(groups)
            self.pieces |= dict(zip(pieces, groups))

    def __call__(self, piece, add_special_tokens):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=self.pieces[piece])


def unrolled(row):
    """An entry [id, n] of a recorded row is that id n times."""
    return [i for e in row for i in ([e[0]] * e[1] if isinstance(e, list) else [e])]


def prompt_config(c, run):
    return Config(horizon=c["H"], action_dim=c["D"], num_bins=c["bins"], patch_size=c["patch_size"],
                  merge_size=c["merge_size"], image_id=c["image_token_id"], pad_id=c["pad_token_id"],
                  tile=not run["two_separate_images"], vision_id=run["vision_id"],
                  views=[str(i) for i in range(max(len(run["images"]), 1 + run["two_separate_images"]))])


@GOLDEN.replays("prompt")
def test_prompts_match(case):                                                      # sheet 14.1, 14.2
    """With the real vocabulary where there is one, and always with the recorded pieces in its place."""
    c, recorded, path = case.config, case.json(), tokenizer_path(case.entry["needs_tokenizer"])
    runs = [(prompt_config(c, run), want, run) for run, want in zip(c["cases"], recorded["cases"])]
    assert len(runs) == len(recorded["cases"]) and vla0.SYSTEM == c["system_message_template"]
    case.compare("system_message", vla0.system_message(runs[0][0]), recorded["system_message"])
    pieces = RecordedTokenizer(runs[0][0], [want["generation_prompt_text"] for _, want, _ in runs],
                               [unrolled(want["generation_prompt_ids"]) for _, want, _ in runs])
    tokenizers = [pieces] + ([load_tokenizer(Config(tokenizer=str(path)))] if path else [])
    for i, (cfg, want, run) in enumerate(runs):
        name, text = f"cases/{i}/", vla0.build_prompt(want["instruction"], cfg)
        case.compare(name + "generation_prompt_text", text, want["generation_prompt_text"])
        if run["has_full_text"]:
            whole = vla0.build_prompt(want["instruction"], cfg, want["action_text"])
            case.compare(name + "full_text", whole, want["full_text"])
        unit = cfg.patch_size * cfg.merge_size
        sides = [(p["width"] // unit, p["height"] // unit) for p in run["images"]]
        assert all(a * b == run["image_tokens_per_image"] for a, b in sides)
        for tokenizer in tokenizers:
            ids = vla0.encode_prompt(text, cfg, tokenizer, run["image_tokens_per_image"])
            case.compare(name + "generation_prompt_ids", ids, unrolled(want["generation_prompt_ids"]))
            case.compare(name + "n_prompt", len(ids), want["n_prompt"])
            if not run["has_full_text"]:
                continue
            row, labels = label(ids, want["action_text"], cfg)
            case.compare(name + "full_ids", row, unrolled(want["full_ids"]))
            case.compare(name + "n_full", len(row), want["n_full"])
            case.compare(name + "sysuser_len", sum(x == -100 for x in labels), want["sysuser_len"])
            answer = vla0.answer_ids(want["action_text"], cfg)
            case.compare(name + "n_action_tokens", len(answer), want["n_action_tokens"])
    cfg = runs[0][0]
    own = {**vla0.SPECIAL, "\n": "newline_id", "?": "mask_id", " ": "space_id", "<|endoftext|>": "pad_id"}
    known = {name: getattr(cfg, field) for name, field in own.items()} | {
        str(d): cfg.digit_id + d for d in range(10)}
    for name, want in recorded["single_token_ids"].items():
        if name in known:
            case.compare(f"single_token_ids/{name}", [known[name]], want)
    for tokenizer in tokenizers[1:]:
        for group in ("single_token_ids", "merge_traps"):
            for name, want in recorded[group].items():
                got = tokenizer(name, add_special_tokens=False).input_ids
                case.compare(f"{group}/{name}", list(got), want)


def padded(batch, cfg):
    """A batch's labels as rows (B, L), -100 where nothing is supervised."""
    labels = torch.full_like(batch["ids"], -100)
    labels.view(-1)[batch["rows"] + 1] = batch["targets"]
    return labels


@GOLDEN.replays("masking")
def test_masking_matches(case):                                                    # sheet 14.9, 14.10
    c, path = case.config, tokenizer_path(case.entry["needs_tokenizer"])
    cfg = Config(horizon=c["H"], action_dim=c["D"], num_bins=c["bins"], mask_none=c["no_mask_probability"],
                 mask_max=c["action_mask_aug_per"], mask_id=c["mask_id"], pad_id=c["pad_token_id"],
                 im_end_id=c["im_end_id"], newline_id=c["newline_id"], vision_id=c["vision_id"])
    assert c["ignore_index"] == -100
    for char, i in c["char_ids"].items():
        assert vla0.answer_ids(char, cfg) == [i]
    tokenizer = load_tokenizer(Config(tokenizer=str(path))) if path else None
    patches = [c["image"][side] // cfg.patch_size // cfg.merge_size for side in ("width", "height")]
    for i, (run, seed) in enumerate(zip(case.json()["cases"], c["python_seeds"])):
        rng, prepared, hidden = random.Random(seed), [], random.Random(seed)
        for j, row in enumerate(run["rows"]):
            prompt = [cfg.im_start_id] * row["sysuser_len"]    # without a vocabulary, its length counts
            if tokenizer:
                text = vla0.build_prompt(row["instruction"], cfg)
                prompt = vla0.encode_prompt(text, cfg, tokenizer, patches[0] * patches[1])
                case.compare(f"cases/{i}/rows/{j}/sysuser_len", len(prompt), row["sysuser_len"])
            ids, labels = label(prompt, row["action_text"], cfg, rng)
            prepared.append({"ids": torch.tensor(ids), "labels": torch.tensor(labels),
                             "images": torch.zeros(1), "delta": torch.tensor(0),
                             "positions": torch.zeros(3, len(ids))})
            got = vla0.hidden_characters(len(row["action_text"]), cfg, hidden)
            case.compare(f"cases/{i}/rows/{j}/masked_char_positions", got, row["masked_char_positions"])
        batch = collate(prepared, cfg)
        labels = padded(batch, cfg)
        for j, row in enumerate(run["rows"]):
            name, n, m = f"cases/{i}/rows/{j}/", row["sysuser_len"], len(row["action_text"])
            assert (labels[j, :n] == -100).all()
            for field, x, part in (("action_ids", batch["ids"], slice(n, n + m)),
                                   ("action_labels", labels, slice(n, n + m)),
                                   ("tail_ids", batch["ids"], slice(n + m, None)),
                                   ("tail_labels", labels, slice(n + m, None))):
                case.compare(name + field, x[j, part].tolist(), row[field])
            case.compare(name + "n_label_tokens", int((labels[j] != -100).sum()), row["n_label_tokens"])


@GOLDEN.replays("seed_variant")
def test_community_version_matches(case):
    c, recorded = case.config, case.json()
    low, high, H, D = np.float32(c["mins"]), np.float32(c["maxs"]), c["H"], c["D"]
    q = vla0.community_encode(recorded["actions"], low, high, c["bins"])
    case.compare("ints", q.tolist(), recorded["ints"])
    case.compare("text", to_text(q), recorded["text"])
    rng, mask = random.Random(c["mask"]["python_seed"]), c["mask"]
    hidden = [mask["symbol"] if x.isdigit() and rng.random() < mask["ratio"] else x for x in to_text(q)]
    case.compare("masked_text", "".join(hidden), recorded["masked_text"])
    for name in c["decode_cases"]:
        run = recorded["decode"][name]
        ints, actions = vla0.community_decode(run["input"], low, high, H, D, c["bins"])
        case.compare(f"decode/{name}/ints", ints.tolist(), run["ints"])
        case.compare(f"decode/{name}/actions", actions, np.float32(run["actions"]))
    dim = recorded["constant_dim"]
    q = vla0.community_encode(dim["vec"], dim["min"], dim["max"], c["bins"])
    case.compare("constant_dim/ints", q.tolist(), dim["ints"])
    # Its prompt has letters where ours has numbers, so a template without braces stays as it is.
    case.compare("system_prompt", vla0.system_message(Config(system=recorded["system_prompt"])),
                 recorded["system_prompt"])
    stem = Path(recorded["instruction"]["path"]).stem          # data.py's builder has the rule
    text = stem.replace("_demo", "").replace("_", " ")
    case.compare("instruction/text", text, recorded["instruction"]["text"])


@GOLDEN.replays("stream_quirk")
def test_stream_gives_each_recorded_step_once_and_whole(case):                     # sheet 14.25
    c = case.config
    assert c["compare"] is False and len(case.json()) == c["num_cases"]
    for run in case.json():
        cfg = small(horizon=c["H"], action_dim=c["D"], num_bins=c["bins"], gripper_index=-1,
                    max_new_tokens=1024)
        model, want = make(cfg, stats={"toy": {"action": c["stats"]}}), np.array(run["target_steps"])
        model.reader, limits = Oracle(model, run["target"]), vla0.bounds(c["stats"])
        for grammar, draft in ((True, None), (False, run["target"]), (True, to_text(want[::-1]))):
            got = list(model.stream({**samples(cfg, 1)[0], "draft": draft}, grammar=grammar))
            assert [t for t, _ in got] == list(range(c["H"]))
            assert np.array_equal([action for _, action in got], decode_integers(want, *limits, c["bins"]))
    case.seen.add("target_steps")


# The recorded tiny model: its tokenizer, its weights in the official layout, its batch.

def byte_tokenizer(t):
    """One token per byte, in GPT-2's order, and the control tokens behind."""
    first = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = first + [b for b in range(t["num_bytes"]) if b not in first]
    letters = [chr(b) if b in first else chr(256 + i - len(first)) for i, b in enumerate(order)]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.normalizer = {"NFC": normalizers.NFC()}[t["normalizer"]]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(t["special_tokens"], key=t["special_tokens"].get))
    for text, i in {**t["first_byte_ids"], **t["special_tokens"]}.items():
        assert tokenizer.encode(text).ids == [i]
    return tokenizer


def flat_config(m, version="4.51.3"):
    """config.json as transformers before 4.52 writes it: the language model's values at the top."""
    rope = {"type": m["rope_type"], "rope_type": m["rope_type"], "mrope_section": m["mrope_section"]}
    return {**{k: v for k, v in m.items() if k not in ("rope_type", "mrope_section")}, "rope_scaling": rope,
            "model_type": "qwen2_5_vl", "transformers_version": version}


def write_official(run, config, weights, limits=None, penalty=1.05, tokenizer=None, protocol=4):
    """A run folder as the official trainer leaves it: run/model_last/, two shards, and the pickle."""
    folder, names = run / "model_last", sorted(weights)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"do_sample": True, "repetition_penalty": penalty})
    files, where = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)], {}
    for file, part in zip(files, (names[::2], names[1::2])):
        save_file({name: weights[name].contiguous() for name in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    if tokenizer:
        tokenizer.save(str(folder / "tokenizer.json"))
    if limits is not None:
        low, high = (np.asarray(x, np.float32) for x in limits)
        values = {"min": low, "max": high, "mean_ema": low * 0, "std_ema": low * 0 + 1}
        (run / "dataset_stats.pkl").write_bytes(pickle.dumps({"out_ori_act": values}, protocol))
    return run


def recorded_model(tiny, config=None, penalty=1.05):
    """The recorded weights through from_pretrained; `tiny`: the entry of kind tiny_model."""
    c, t = tiny.config, tiny.config["tokenizer"]
    weights, special = partner(tiny, "tiny_model_weights").tensors, t["special_tokens"]
    byte = t["first_byte_ids"]
    ids = {field: special[name] for name, field in vla0.SPECIAL.items() if field != "image_id"}
    with tempfile.TemporaryDirectory() as run:
        write_official(Path(run), config or flat_config(c["model"]), weights,
                       (tiny["act_min"], tiny["act_max"]), penalty, byte_tokenizer(t))
        model = from_pretrained(
            run, horizon=c["H"], action_dim=c["D"], num_bins=c["bins"], gripper_index=-1, crop=1.0, execute=1,
            views=[f"camera{i}" for i in range(c["num_cameras"])], image_size=c["camera_size"],
            tile=c["tiled"], pad_id=t["pad_token_id"], digit_id=byte["0"], space_id=byte[" "],
            newline_id=byte["\n"], mask_id=c["mask_id"], mask_none=c["no_mask_probability"], **ids)
    assert (model.cfg.vision_id, model.cfg.repetition_penalty) == (c["vision_id"], penalty)
    assert model.cfg.image_id == t["image_token_id"] and c["tiled"]
    return model


def recorded_samples(tiny, model):
    c, s = tiny.config, tiny.config["camera_size"]
    pictures = [{v: p[:, i * s:(i + 1) * s].numpy() for i, v in enumerate(model.cfg.views)}
                for p in tiny["rgb_tiled_uint8"]]
    return [{"images": p, "instruction": text, "actions": a.numpy()}
            for p, text, a in zip(pictures, c["instructions"], tiny["actions"])]


def official_label(prompt, text, cfg, tokenizer, rng):
    """(ids, labels) as recorded: 3 tokens are taken for "<|im_start|>assistant\\n", whatever the vocabulary.

    Qwen's has 3 (see test_masking_matches); the byte tokenizer has more, and part of them is trained.
    """
    header = len(vla0.encode_prompt("<|im_start|>assistant\n", cfg, tokenizer, 0))
    ids, start = label(prompt, text, cfg)[0], len(prompt) - header + 3
    labels = [-100] * start + ids[start:]
    for i in vla0.hidden_characters(len(text), cfg, rng):
        ids[start + i], labels[start + i] = cfg.mask_id, -100
    return ids, labels


def recorded_batch(tiny, model, run):
    """The batch of a recorded training step: hidden characters by its python seed, samples in order."""
    cfg, c = replace(model.cfg, mask_max=run["action_mask_aug_per"]), tiny.config
    rng, prepared = random.Random(run["python_seed"]), []
    for sample, text in zip(recorded_samples(tiny, model), c["action_text"]):
        look = {k: sample[k] for k in ("images", "instruction")}
        p, prompt = (prepare(o, cfg, model.tokenizer, model.stats) for o in (sample, look))
        assert p["ids"].tolist() == label(prompt["ids"].tolist(), text, cfg)[0]    # the text is the same, too
        ids, labels = official_label(prompt["ids"].tolist(), text, cfg, model.tokenizer, rng)
        prepared.append({**p, "ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    return collate(prepared, cfg)


@GOLDEN.replays("tiny_model")
@torch.no_grad()
def test_tiny_model_matches(case):                                                 # sheet 14.12, 14.13, 14.23
    c = case.config
    model = recorded_model(case)
    assert vla0.system_message(model.cfg) == c["system_message"]
    for run in c["runs"]:
        batch = recorded_batch(case, model, run)
        case.compare(run["input_ids"], batch["ids"])
        case.compare(run["labels"], padded(batch, model.cfg))
        case.compare(run["loss"], model.loss(batch)[0].reshape(case[run["loss"]].shape))
        if "logits" not in run:
            continue
        mask = (torch.arange(batch["ids"].shape[1]) < batch["length"][:, None]).numpy()            # (B, L)
        case.compare("in_attention_mask", mask.astype(np.int64))
        patches, grid = vla0.patchify(batch["images"].flatten(0, 1), model.cfg)
        case.compare("in_pixel_values", patches)
        case.compare("in_image_grid_thw", grid)
        case.compare("vision_features", model.visual(patches, grid_thw=grid).pooler_output)
        logits = F.linear(model(batch), model.model.embed_tokens.weight)[:, c["logits_from"]:]
        real = mask[:, c["logits_from"]:]
        case.compare(run["logits"], logits[torch.tensor(real)], part=real)
        position = batch["positions"].transpose(0, 1)                              # (3, B, L)
        case.compare("position_ids_3d", position[:, torch.tensor(mask)], part=np.s_[:, mask])
        short = batch["length"] - batch["ids"].shape[1]        # officially, padding is counted in
        case.compare("rope_deltas", (batch["delta"] + short)[:, None])
    seen = recorded_samples(case, model)
    for prompt in c["prompt_ids"]:
        o = {k: seen[prompt["sample"]][k] for k in ("images", "instruction")}
        case.compare(prompt["tensor"], prepare(o, model.cfg, model.tokenizer)["ids"][None])


def replay_generation(tiny, model, run, recorded, compare, full=True):
    """Recorded greedy texts, plainly and with drafts; `compare` gets what came out."""
    c, cfg = tiny.config, model.cfg
    assert cfg.legal == run["allowed_ids"] and cfg.im_end_id == run["stop_id"] and run["sampling"] == "greedy"
    look, texts = recorded_samples(tiny, model), [r["text"] for r in recorded]
    for i, (want, about) in enumerate(zip(recorded, run["cases"])):
        o = {k: look[about["sample"]][k] for k in ("images", "instruction")}
        assert len(prepare(o, cfg, model.tokenizer)["ids"]) == about["prompt_len"]
        how = dict(grammar=False, repetition_penalty=about["repetition_penalty"], strict=True,
                   max_new_tokens=run["max_new_tokens"], window=0, redraft="jacobi")
        tries = [(None, {}), (want["text"], {})]
        tries += [(c["action_text"][0], {"redraft": "align"}), (texts[i - 1], {"window": 3})] if full else []
        for draft, other in tries:
            _, info = model.act([{**o, "draft": draft}], **{**how, **other})
            text, n = info["texts"][0], int(info["tokens"][0])
            ids = vla0.answer_ids(text, cfg)
            ids += [cfg.im_end_id] * (n - len(ids))
            compare(i, ids, text, info["actions"], want)
            assert info["passes"][0] < n and (draft != text or info["passes"][0] == 1 or other)


@GOLDEN.replays("tiny_model_generate")
def test_tiny_model_writes_what_was_recorded(case):                                # sheet 14.14, 14.15
    c, recorded, tiny = case.config, case.json(), partner(case, "tiny_model")
    model = recorded_model(tiny, recorded[c["full_model_config"]])
    assert {run["repetition_penalty"] for run in c["cases"]} == set(c["repetition_penalties"])

    def compare(i, ids, text, actions, want):
        case.compare(f"generate/{i}/new_ids", ids, want["new_ids"])
        case.compare(f"generate/{i}/text", text, want["text"])
        case.compare(f"generate/{i}/action_shape", list(actions.shape), want["action_shape"])
        case.compare(f"generate/{i}/action", actions, np.array(want["action"]).reshape(want["action_shape"]))
    replay_generation(tiny, model, c, recorded["generate"], compare)
    for i, sample in enumerate(recorded_samples(tiny, model)):
        limits = vla0.bounds(model.stats["libero"]["action"])
        q, _ = encode_actions(sample["actions"], *limits, c["bins"], strict=True)
        case.compare(f"action_text/{i}", to_text(q), recorded["action_text"][i])
    for run in tiny.config["runs"]:
        batch = recorded_batch(tiny, model, run)
        case.compare(run["loss"], model.loss(batch)[0].item(), recorded[run["loss"]])


@GOLDEN.replays("tiny_model_weights")
def test_tiny_model_loads_from_the_official_layout(case):                          # sheet 14.26
    tiny, runs = partner(case, "tiny_model"), partner(case, "tiny_model_generate")
    assert len(case.tensors) == case.config["num_tensors"]
    model = recorded_model(tiny, flat_config(case.config["model"]))
    for name, value in model.state_dict().items():
        assert torch.equal(value, case[name])
        case.seen.add(name)
    assert case.seen == set(case.tensors) and model.fresh == [] and "CC BY-NC" in model.origin["license"]
    stats = model.stats["libero"]["action"]
    assert stats["dtype"] == "float32" and np.float32(stats["min"]).tolist() == tiny["act_min"].tolist()

    def compare(i, ids, text, actions, want):
        assert (text, list(actions.shape)) == (want["text"], want["action_shape"])
    replay_generation(tiny, model, runs.config, runs.json()["generate"], compare, full=False)


@pytest.mark.golden
def test_every_recording_is_replayed():
    GOLDEN.check()


# ---- Small models of our own ------------------------------------------------------------------------------

STATS = {"toy": {"action": {"min": [-0.5, -0.2, 0.0], "max": [0.5, 0.2, 1.0]}}}


def small(**changes):
    """The tiny preset, made smaller still: a pass costs about a millisecond."""
    given = dict(image_size=16, patch_size=4, merge_size=2, window_size=16, vit_width=16, vit_depth=2,
                 vit_heads=2, vit_mlp=16, full_attention=(1,), llm_width=32, llm_depth=2, llm_heads=4,
                 llm_kv_heads=2, llm_mlp=32, mrope_section=(1, 1, 2), llm_init=0.3, horizon=2, action_dim=3,
                 num_bins=100, gripper_index=2, execute=1, ensemble="none", max_new_tokens=64, window=0,
                 draft="previous", redraft="jacobi", grammar=True, repetition_penalty=1.0, padding="mask",
                 jitter=(0, 0, 0, 0), crop=1.0, views=("third",), init="")
    return replace(PRESETS["tiny"], **{**given, **changes})


def make(cfg=None, seed=0, stats=STATS):
    torch.manual_seed(seed)
    cfg = cfg or small()
    return Model(cfg, load_tokenizer(cfg), stats).eval()


def samples(cfg, n, seed=0):
    words = ("put the red cube on the plate", "lift the ball", "push it to the left")
    rng, shape = np.random.default_rng(seed), (cfg.horizon, cfg.action_dim)
    scale = np.resize([0.5, 0.2, 0.5], cfg.action_dim)
    return [{"images": {v: rng.integers(0, 256, (20, 24, 3), np.uint8) for v in cfg.views},
             "instruction": words[i % 3], "dataset": "toy", "loss_mask": np.arange(cfg.horizon) < 1 + i,
             "actions": rng.uniform(0, scale, shape).astype(np.float32)} for i in range(n)]


def batch_of(model, n=3, train=True, **changes):
    cfg = replace(model.cfg, **changes)
    return collate([prepare(s, cfg, model.tokenizer, model.stats, key=10 + i, train=train)
                    for i, s in enumerate(samples(cfg, n))], cfg)


class Oracle:
    """In place of a model's Reader: one that writes these texts, whatever it is given to read."""

    def __init__(self, model, *texts):
        self.embedding, self.legal = model.model.embed_tokens.weight, torch.tensor(model.cfg.legal)
        rows = [[SYMBOLS.index(c) for c in text] for text in texts]
        self.table = torch.full((len(rows), 1 + max(map(len, rows))), END)
        for row, symbols in zip(self.table, rows):
            row[:len(symbols)] = torch.tensor(symbols)

    def current(self, *_):
        return True

    def new_cache(self, B, size):
        self.first = None
        return torch.zeros(1)

    def __call__(self, x, positions, slots, cache):
        return slots[..., None].float()

    def logits(self, hidden):
        at = hidden[..., 0].long()                             # (B, K); first the prompts' last tokens alone
        self.first = at if self.first is None else self.first
        at = (at - self.first).clamp(max=self.table.shape[1] - 1)
        return F.one_hot(self.table[:len(at)].gather(1, at), 12) * 9.0


# ---- Actions as text --------------------------------------------------------------------------------------

LOW = np.float32([-0.9375, -0.9375, -0.9375, -0.2582142949104309, -0.375, -0.3675000071525574, -1])
HIGH = np.float32([0.9375, 0.9375, 0.9375, 0.3557142913341522, 0.375, 0.375, 1])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_text_survives_decoding_then_encoding(kind):                               # sheet 14.3
    """Every integer of every dimension; that is every well-formed text."""
    q = np.arange(1001)[:, None].repeat(7, 1)
    actions = decode_integers(q, LOW.astype(kind), HIGH.astype(kind), 1000)
    back, outside = encode_actions(actions, LOW.astype(kind), HIGH.astype(kind), 1000)
    assert np.array_equal(back, q) and outside == 0
    assert to_text(q[497:499]) == " ".join(["497"] * 7 + ["498"] * 7)


def test_halves_round_to_even_in_the_type_of_the_statistics():                     # sheet 14.4
    low, high = np.float64([0.0]), np.float64([1000.0])
    q, _ = encode_actions([[0.5], [1.5], [2.5], [998.5], [999.5]], low, high, 1000)
    assert q[:, 0].tolist() == [0, 2, 2, 998, 1000]
    for kind in (np.float32, np.float64):
        limits = vla0.bounds({"min": [0.0], "max": [1.0], "dtype": np.dtype(kind).name})
        assert limits[0].dtype == decode_integers([[3]], *limits, 1000).dtype == kind
    assert vla0.bounds({"min": [0.0], "max": [1.0]})[0].dtype == np.float32


def test_min_is_zero_and_max_is_bins():                                            # sheet 14.5
    for bins in (100, 1000, 4000):
        q, _ = encode_actions([LOW, HIGH], LOW, HIGH, bins)
        assert q.tolist() == [[0] * 7, [bins] * 7]


def test_out_of_range_actions_are_clamped_and_counted_and_refused_when_strict():   # sheet 14.6
    actions = [[9, 0, 0, 0, 0, -9, 0], [0] * 7]
    q, outside = encode_actions(actions, LOW, HIGH, 1000)
    assert outside == 2 and (q[0, 0], q[0, 5]) == (1000, 0)
    with pytest.raises(ValueError, match="2 action values lie outside"):
        encode_actions(actions, LOW, HIGH, 1000, strict=True)
    model = make()
    sample = {**samples(model.cfg, 1)[0], "actions": np.float32([[9, 0, 0], [0, 0, -1]])}
    batch = collate([prepare(sample, model.cfg, model.tokenizer, STATS)], model.cfg)
    assert model.loss(batch)[1]["clamped"] == 2


def test_constant_dimension_is_zero_in_text_and_min_in_actions():                  # sheet 14.7
    low, high = np.float32([-1, 0.3]), np.float32([1, 0.3])
    q, outside = encode_actions([[0.5, 0.3], [0.5, 0.4]], low, high, 1000)
    assert q.tolist() == [[750, 0], [750, 0]] and outside == 1
    for n in (0, 7, 1000):
        assert decode_integers([[750, n]], low, high, 1000).tolist() == [[0.5, np.float32(0.3)]]


STEP = " ".join(map(str, range(1, 8)))


@pytest.mark.parametrize("text, steps, problem", [
    (" ".join([STEP] * 8), 8, ""),
    (f"  {' '.join([STEP] * 8)} ", 8, ""),
    (" ".join(map(str, range(20))), 2, "20 numbers instead of 56"),                # sheet 14.8
    (" ".join(map(str, range(66))), 8, "66 numbers instead of 56"),                # sheet 14.8
    ("1 2 3", 0, "3 numbers instead of 56"),                                       # sheet 14.8
    ("", 0, "an empty text"), ("   ", 0, "an empty text"),
    ("I cannot do that", 0, "'I' is no number"),
    (f"{STEP} grasp it", 1, "'grasp' is no number"),
    (f"{STEP}  {STEP}", 1, "double space"),
    (f"{STEP}\n{STEP}", 0, "is no number"),
    (" ".join([STEP] * 7) + " 9999 0 0 0 0 0 0", 8, "9999 is beyond 1000"),
    (" ".join([STEP] * 7) + " -5 0 0 0 0 0 0", 7, "'-5' is no number"),
    ("1" * 5000, 0, "is beyond 1000"), ("५ ५ ५ ५ ५ ५ ५", 0, "is no number")])
def test_flawed_text_keeps_its_whole_steps_and_says_what_is_wrong(text, steps, problem):
    q, found = parse_safe(text, 1000, 8, 7)
    assert (problem in found) if problem else found == ""
    if not steps:
        assert q is None
        return
    assert q.shape == (8, 7) and q.min() >= 0 and q.max() <= 1000
    whole = [min(int(word), 1000) for word in text.split()[:steps * 7]]
    assert q[:steps].ravel().tolist() == whole and (q[steps:] == q[steps - 1]).all()


@pytest.mark.parametrize("text", ["1" * 400 + " 2 3 4 5 6 7", "1" * 5000])
def test_absurdly_long_number_does_not_stop_the_strict_parser(text):
    """Officially any error while parsing gives the midpoint."""
    assert np.array_equal(parse_strict([text], LOW, HIGH, 1000, 8)[0], np.tile((LOW + HIGH) / 2, (8, 1)))


# ---- Prompts, hidden characters, labels -------------------------------------------------------------------

def test_prompt_is_the_released_one():                                             # sheet 14.1
    text = vla0.build_prompt("lift it", PRESETS["3b"])
    assert text == (
        "<|im_start|>system\nAnalyze the input image and predict robot actions for the next 8 timesteps. "
        "Each action has 7 dimensions. Output a single sequence of 56 integers (0-1000 each), representing "
        "the 8 timesteps sequentially. Provide only space separated numbers. Nothing else.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>lift it<|im_end|>\n"
        "<|im_start|>assistant\n")
    two = vla0.build_prompt("lift it", replace(PRESETS["3b"], vision_id=True, tile=False), "1 2")
    assert "user\nPicture 1: <|vision_start|><|image_pad|><|vision_end|>Picture 2: <|vision_start|>" in two
    assert two.endswith("assistant\n1 2<|im_end|>\n")


@pytest.mark.parametrize("tile, grid, pictures, tokens", [(True, [1, 16, 32], 1, 128),
                                                          (False, [1, 16, 16], 2, 64)])
def test_two_cameras_cost_128_tokens_tiled_or_not(tile, grid, pictures, tokens):   # sheet 14.2
    """(The 211 tokens of the first recorded prompt: test_prompts_match.)"""
    cfg = replace(PRESETS["3b"], tile=tile)
    look = {"images": {v: np.zeros((256, 256, 3), np.uint8) for v in cfg.views}, "instruction": "lift it"}
    tokenizer = lambda piece, **_: SimpleNamespace(input_ids=[0] * len(piece))
    batch = collate([prepare(look, cfg, tokenizer)], cfg)
    assert batch["images"].shape[1:] == (pictures, 224, 448 // pictures, 3)
    assert vla0.patchify(batch["images"][0], cfg)[1].tolist() == [grid] * pictures
    assert (batch["ids"] == cfg.image_id).sum() == pictures * tokens


def test_rope_jumps_by_the_longer_side_of_a_picture():                             # sheet 14.23
    cfg = PRESETS["3b"]
    ids = [1] * 67 + [cfg.vision_start_id] + [cfg.image_id] * 128 + [cfg.vision_end_id] + [1] * 13
    positions, delta = vla0.rope_positions(ids, cfg, (8, 16))
    assert delta == -112
    assert positions[:, 67].tolist() == [67] * 3 and positions[:, 68].tolist() == [68] * 3
    assert positions[:, 68 + 127].tolist() == [68, 68 + 7, 68 + 15]
    assert positions[:, 68 + 128].tolist() == [68 + 16] * 3
    assert positions[:, -1].tolist() == [len(ids) - 1 - 112] * 3


@pytest.mark.parametrize("instruction", ["lift<|im_end|>", "<|image_pad|>"])
def test_instruction_cannot_smuggle_control_tokens(instruction):
    with pytest.raises(ValueError, match="control tokens"):
        vla0.build_prompt(instruction, small())


def test_labels_are_the_answer_without_its_hidden_characters():                    # sheet 14.9
    cfg, prompt, text = PRESETS["3b"], [7] * 5, "497 500 0"
    ids, labels = label(prompt, text, replace(cfg, mask_none=0.0, mask_max=0.5), random.Random(3))
    clean, targets = label(prompt, text, cfg)
    assert targets == [-100] * 5 + clean[5:] and clean[-2:] == [cfg.im_end_id, cfg.newline_id]
    hidden = [i for i, (a, b) in enumerate(zip(ids, clean)) if a != b]
    assert hidden and all(ids[i] == cfg.mask_id and labels[i] == -100 for i in hidden)
    assert all(labels[i] == targets[i] for i in range(len(ids)) if i not in hidden)
    assert labels[-2:] == clean[-2:]


def test_same_key_hides_the_same_characters():                                     # sheet 14.10
    model = make(small(mask_none=0.0))
    sample, = samples(model.cfg, 1)
    one, same, other = (prepare(sample, model.cfg, model.tokenizer, STATS, key=k, train=True)
                        for k in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["ids"], other["ids"])
    seeds = [vla0.hidden_characters(211, model.cfg, random.Random(s)) for s in (5, 5, 6)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_tenth_of_the_samples_hides_nothing_and_none_more_than_forty_percent():  # sheet 14.11
    rng, cfg = random.Random(0), PRESETS["3b"]
    share = np.array([len(vla0.hidden_characters(211, cfg, rng)) / 211 for _ in range(4000)])
    assert share.max() <= 0.4 and 0.09 < (share == 0).mean() < 0.13 and abs(share.mean() - 0.18) < 0.01


def test_digits_hidden_by_others_are_inputs_and_never_targets():
    """A community manifest's text, X for hidden digits."""
    model = make()
    sample = {**samples(model.cfg, 1)[0], "action_text": "5X 100 3 4 X6 99"}
    p = prepare(sample, model.cfg, model.tokenizer, STATS)
    at = len(p["ids"]) - 2 - 16
    for i, c in enumerate(sample["action_text"], at):
        assert (p["ids"][i] == model.cfg.mask_id) == (p["labels"][i] == -100) == (c == "X")


@pytest.mark.parametrize("padding", ["repeat", "mask"])
def test_steps_beyond_the_end_count_only_when_repeated(padding):
    cfg = small(padding=padding)
    sample = {**samples(cfg, 1)[0], "actions": np.float32([[0, 0, 0.1], [0, 0, 0.2]])}
    p = prepare(sample, cfg, load_tokenizer(cfg), STATS)
    count = int((p["labels"] != -100).sum())
    assert count == len("50 50 10 50 50 20" if padding == "repeat" else "50 50 10") + 2     # and the tail


# ---- Pictures ---------------------------------------------------------------------------------------------

def test_centre_crop_is_a_slice_and_the_tile_has_the_first_camera_left():          # sheet 14.20, 14.21
    cfg, rng = PRESETS["3b"], np.random.default_rng(0)
    views = [rng.integers(0, 256, (256, 256, 3), np.uint8) for _ in cfg.views]
    tile = vla0.prepare_images(views, cfg)
    assert cfg.views == ("third", "wrist") and tile.dtype == torch.uint8 and tile.shape == (1, 224, 448, 3)
    for i, image in enumerate(views):
        assert np.array_equal(tile[0, :, i * 224:(i + 1) * 224].numpy(), image[16:240, 16:240])


def test_crops_differ_between_cameras_and_colours_do_not():                        # sheet 14.22
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cfg = Config(image_size=56, patch_size=1, merge_size=1, tile=False)
    plain = replace(cfg, jitter=(0, 0, 0, 0))
    one, two = vla0.prepare_images([image, image], plain, drawing(1), train=True)
    assert not torch.equal(one, two)
    whole = replace(cfg, crop=1.0, image_size=0)
    one, two = vla0.prepare_images([image, image], whole, drawing(1), train=True)
    assert torch.equal(one, two) and not np.array_equal(one.numpy(), image)


def test_cameras_of_any_shape_are_brought_to_one_size():
    views = [np.zeros((30, 40, 3), np.uint8), np.zeros((64, 48, 3), np.uint8)]
    assert vla0.prepare_images(views, Config(image_size=56)).shape == (1, 56, 112, 3)
    with pytest.raises(ValueError, match="set image_size"):
        vla0.prepare_images(views, Config(image_size=0))


@pytest.mark.parametrize("size, fitted", [
    ((50, 70), (56, 84)), ((224, 448), (224, 448)), ((64, 64), (84, 84)), ((37, 113), (56, 140)),
    ((40, 300), (56, 308)), ((99, 41), (112, 56))])
def test_picture_is_resized_to_whole_patches_as_qwens_processor_does(size, fitted):
    """(Sizes from transformers' smart_resize; that file needs torchvision, which this project does not.)"""
    cfg, rng = Config(image_size=0, crop=1.0), np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    assert vla0.smart_resize(*size, 28, size[0] * size[1]) == fitted
    got = vla0.prepare_images([image], cfg)[0].numpy()
    want = image if size == fitted else Image.fromarray(image).resize(fitted[::-1], Image.Resampling.BICUBIC)
    assert np.array_equal(got, np.asarray(want))


def test_pictures_of_an_observation_are_not_augmented():
    cfg = small(crop=0.8, jitter=(0.2, 0.2, 0.2, 0.05))
    sample, tokenizer = samples(cfg, 1)[0], load_tokenizer(cfg)
    look = lambda **how: prepare(sample, cfg, tokenizer, STATS, **how)["images"]   # noqa: E731
    assert torch.equal(look(key=1), look(key=2)) and torch.equal(look(), look(key=1))
    assert torch.equal(look(key=1, train=True), look(key=1, train=True))
    assert not torch.equal(look(key=1, train=True), look(key=2, train=True))


# ---- Decoding: exact, whatever the draft ------------------------------------------------------------------

def prompts(cfg, B, generator):
    """B random prompts, each of its own length: (batch, embeddings (B, L, D) float64)."""
    length = torch.randint(2, 9, (B,), generator=generator)
    L = int(length.max())
    ids = torch.randint(0, cfg.vocab, (B, L), generator=generator)
    ids[torch.arange(L) >= length[:, None]] = cfg.pad_id
    batch = {"length": length, "delta": -torch.randint(0, 3, (B,), generator=generator), "ids": ids,
             "positions": torch.arange(L).expand(B, 3, L)}
    return batch, torch.randn(B, L, cfg.llm_width, generator=generator, dtype=torch.float64)


def rows_of(prompt, part):
    batch, rows = prompt
    batch = {name: x[part] for name, x in batch.items()}
    L = int(batch["length"].max())
    return {**batch, **{n: batch[n][..., :L] for n in ("ids", "positions")}}, rows[part, :L]


@torch.no_grad()
def write(cfg, reader, prompt, drafts=None, seed=None):
    batch, rows = prompt
    writer = Writer(cfg, reader, batch, rows.to(reader.embedding.dtype), drafts or [None] * len(rows), seed)
    for _ in writer:
        pass
    return writer


def may_follow(text, cfg):
    """Which of the 12 symbols keep a text well formed: the grammar, said again in plain Python."""
    words = text.split(" ")
    last, full = words[-1], len(words) == cfg.horizon * cfg.action_dim
    digits = [str(int(last + d)) == last + d and int(last + d) <= cfg.num_bins for d in SYMBOLS[:10]]
    return torch.tensor([*digits, bool(last) and not full, bool(last) and full])


@torch.no_grad()
def next_scores(model, cfg, prompt, text):
    """Scores (12,) behind one prompt and `text`, by transformers' forward over all of it and plain Python."""
    (batch, rows), legal = prompt, torch.tensor(cfg.legal)
    n, said = int(batch["length"][0]), legal[[SYMBOLS.index(c) for c in text]]
    x = torch.cat([rows[0, :n].to(model.model.norm.weight.dtype), model.model.embed_tokens(said)])
    place = torch.cat([batch["positions"][0, :, :n],
                       (torch.arange(n, n + len(text)) + batch["delta"][0]).expand(3, -1)], 1)      # (3, L)
    hidden = model.model(inputs_embeds=x[None], position_ids=place[:, None], attention_mask=None,
                         use_cache=False).last_hidden_state[0, -1]
    scores = model.model.embed_tokens.weight[legal] @ hidden
    known = torch.isin(legal, torch.cat([batch["ids"][0, :n], said]))
    p = cfg.repetition_penalty
    scores = torch.where(known, torch.where(scores > 0, scores / p, scores * p), scores)
    return scores.masked_fill(~may_follow(text, cfg), -torch.inf) if cfg.grammar else scores


def margin(model, cfg, prompt, text):
    """How far apart the two best continuations of a text are."""
    best = next_scores(model, cfg, prompt, text).topk(2).values
    return float(best[0] - best[1])


def spoiled(text, rng):
    """Every symbol is another one."""
    return "".join(SYMBOLS[(SYMBOLS.index(c) + rng.randint(1, 10)) % 11] for c in text)


DRAFTS = {
    "random": lambda text, rng: "".join(rng.choice(SYMBOLS) for _ in range(rng.randint(1, 40))),
    "empty": lambda text, rng: "",
    "perfect": lambda text, rng: text,
    "too short": lambda text, rng: text[:rng.randint(0, len(text))],
    "too long": lambda text, rng: text + " 99 1 0" * rng.randint(1, 4),
    "adversarial": spoiled,
    "other length": lambda text, rng: re.sub(r"\d+", rng.choice(("7", "100", "42")), text, count=1)}


def compare_with_plain(model, reader, cfg, prompt, rng, kinds, windows, B):
    """Decode the prompts plainly and with drafts, B at a time. Returns the rows that differ:
    (prompt, text, plain text), and checks what must hold for every draft."""
    plain, differ = write(replace(cfg, draft="none"), reader, prompt), []
    texts, total = plain.texts(), len(plain.texts())
    assert (plain.passes < plain.count).all()                  # the prefill says the first symbol
    for first in range(0, total, B):
        part = slice(first, min(first + B, total))
        for turn, kind in enumerate(kinds):
            names = [kinds[(turn + i) % len(kinds)] for i in range(part.stop - first)]   # each row its own
            drafts = [DRAFTS[name](text, rng) for name, text in zip(names, texts[part])]
            how = replace(cfg, window=windows[(first // B + turn) % len(windows)])
            got = write(how, reader, rows_of(prompt, part), drafts)
            for i, text in enumerate(got.texts()):
                if text != texts[first + i]:
                    differ.append((rows_of(prompt, slice(first + i, first + i + 1)), text, texts[first + i]))
                    continue
                assert got.count[i] == plain.count[first + i] and got.passes[i] < got.count[i]
                if names[i] == "perfect" and text and not how.window:
                    assert got.passes[i] == (got.count[i] > 1)
    return total, differ


CASES = [dict(repetition_penalty=p, grammar=g, redraft=r, max_new_tokens=24) for p in (1.0, 1.05)
         for g in (True, False)
         for r in ("jacobi", "align")]


def cases(first):
    """For parametrize: (seed, how) of every case."""
    names = ["-".join(map(str, list(how.values())[:3])) for how in CASES]
    return [pytest.param(first + i, how, id=name) for i, (how, name) in enumerate(zip(CASES, names))]


@pytest.mark.parametrize("seed, how", cases(0))
def test_speculative_text_is_the_plain_text_in_float64(seed, how):                 # sheet 14.24
    """8 x 128 random chunks, no difference: batches of 4 and of 1, every kind of draft and window."""
    cfg, rng, g = small(**how), random.Random(seed), drawing(seed)
    model = make(cfg, seed).double()
    reader = Reader(cfg, model.model, alias=True)
    windows, first = (0, 1, 2, 5, 0, 40), 2 * seed             # over the cases, all kinds take their turn
    for n, B, turns in ((116, 4, (0, 1)), (12, 1, (2, 3, 4))):
        kinds = [list(DRAFTS)[(first + turn) % len(DRAFTS)] for turn in turns]
        total, differ = compare_with_plain(model, reader, cfg, prompts(cfg, n, g), rng, kinds, windows, B)
        assert total == n and not differ


@pytest.mark.slow
@pytest.mark.parametrize("seed, how", cases(100))
def test_speculative_text_is_the_plain_text_for_all_drafts(seed, how):             # sheet 14.24
    cfg, rng, g = small(**how), random.Random(seed), drawing(seed)
    model = make(cfg, seed).double()
    reader = Reader(cfg, model.model, alias=True)
    for B in (1, 4):
        for window in (0, 3):
            prompt = prompts(cfg, 4, g)
            _, differ = compare_with_plain(model, reader, cfg, prompt, rng, list(DRAFTS), (window,), B)
            assert not differ


@pytest.mark.parametrize("seed, how", cases(50)[::3])
def test_in_float32_only_near_ties_may_differ(seed, how):                          # sheet 14.24
    cfg, rng, g = small(**how), random.Random(seed), drawing(seed)
    model = make(cfg, seed)
    reader = Reader(cfg, model.model, alias=True)
    some, kinds = prompts(cfg, 64, g), list(DRAFTS)[:3]
    total, differ = compare_with_plain(model, reader, cfg, some, rng, kinds, (0, 5), 4)
    for prompt, text, plain in differ:
        same = os.path.commonprefix([text, plain])
        assert margin(model, cfg, prompt, same) < 1e-4, (text, plain)
    assert len(differ) < total


def test_plain_text_is_that_of_transformers_forward():
    """Symbol by symbol, with the whole text read again each time; nothing of our decoding is used."""
    for seed, how in enumerate(CASES[::2]):
        cfg = small(**how)
        model = make(cfg, seed).double()
        reader, prompt = Reader(cfg, model.model, alias=True), prompts(cfg, 5, drawing(seed))
        for i, got in enumerate(write(cfg, reader, prompt).texts()):
            one, text = rows_of(prompt, slice(i, i + 1)), ""
            while len(text) < cfg.max_new_tokens:
                symbol = int(next_scores(model, cfg, one, text).argmax())
                if symbol == END:
                    break
                text += SYMBOLS[symbol]
            same = os.path.commonprefix([text, got])
            assert text == got or margin(model, cfg, one, same) < 1e-4


def test_rows_of_a_batch_write_what_they_write_alone():
    for how in CASES[:3]:
        cfg = small(**how)
        model = make(cfg).double()
        reader, prompt = Reader(cfg, model.model, alias=True), prompts(cfg, 6, drawing(9))
        assert len(set(prompt[0]["length"].tolist())) > 2
        together = write(cfg, reader, prompt, ["7 7 100"] * 6)
        for i in range(6):
            alone = write(cfg, reader, rows_of(prompt, slice(i, i + 1)), ["7 7 100"])
            assert alone.texts() == together.texts()[i:i + 1] and alone.count[0] == together.count[i]
        assert len(set(together.texts())) > 1


def test_perfect_draft_of_an_official_chunk_is_one_pass():                         # sheet 14.24
    """56 numbers of up to 4 digits, some 210 symbols: the window shrinks to what is left, never below it."""
    cfg = small(horizon=8, action_dim=7, gripper_index=6, num_bins=1000, max_new_tokens=1024)
    model = make(cfg, 4).double()
    reader, prompt = Reader(cfg, model.model, alias=True), prompts(cfg, 2, drawing(3))
    plain = write(cfg, reader, prompt)
    perfect = write(cfg, reader, prompt, plain.texts())
    assert perfect.texts() == plain.texts() and perfect.passes.tolist() == [1, 1]
    assert min(plain.count) > 100 and (plain.passes < plain.count).all()
    for redraft, draft in (("jacobi", "1000 " * 55 + "1000"), ("align", "1 2")):
        got = write(replace(cfg, redraft=redraft), reader, prompt, [draft, plain.texts()[1][8:]])
        assert got.texts() == plain.texts() and (got.passes < got.count).all()


def test_jacobi_learns_all_numbers_in_one_pass_where_they_do_not_hang_together():
    """After a wrong draft of the right shape: one pass to read it, one to confirm what that pass said."""
    model = make(small(horizon=8, max_new_tokens=1024))
    true, wrong = (to_text(np.full((8, 3), n)) for n in (77, 33))
    model.reader, look = Oracle(model, true), {**samples(model.cfg, 1)[0], "draft": wrong}
    passes = {how: model.act([look], redraft=how)[1]["passes"][0] for how in ("jacobi", "align")}
    assert passes["jacobi"] == 2 and passes["align"] > 24      # keeping the draft: a pass per number at least


@pytest.mark.parametrize("true, drafted", [
    ("42", "7"), ("7", "42"), ("100", "10"), ("10", "100"), ("100", "7"), ("0", "100"), ("43", "42")])
@pytest.mark.parametrize("place", [0, 1, 11, 22, 23])
def test_number_of_another_length_moves_the_rest_of_the_draft_along(true, drafted, place):
    """What was drafted behind it still fits: at most a pass per digit, then one for all the rest."""
    words = [str(n) for n in np.random.default_rng(0).integers(0, 101, 24)]
    words[place], draft = true, [*words]
    draft[place] = drafted
    model = make(small(horizon=8, max_new_tokens=1024))
    model.reader = Oracle(model, " ".join(words))
    look = {**samples(model.cfg, 1)[0], "draft": " ".join(draft)}
    assert model.act([look], redraft="align")[1]["passes"][0] <= 1 + max(len(true), len(drafted))


@pytest.mark.parametrize("limit", [1, 2, 5, 17])
def test_text_ends_at_max_new_tokens_with_any_draft(limit):
    for grammar in (True, False):
        cfg = small(grammar=grammar, max_new_tokens=limit)
        model = make(cfg).double()
        reader, prompt = Reader(cfg, model.model, alias=True), prompts(cfg, 4, drawing(1))
        whole = write(replace(cfg, max_new_tokens=60), reader, prompt).texts()
        plain = write(cfg, reader, prompt)
        drafted = write(cfg, reader, prompt, whole)
        assert plain.texts() == drafted.texts() == [text[:limit] for text in whole]
        assert (drafted.count <= limit).all()


@pytest.mark.parametrize("B", [1, 4])
def test_sampled_text_is_the_same_with_and_without_speculation(B):
    for grammar in (True, False):
        cfg, rng = small(temperature=0.7, grammar=grammar), random.Random(1)
        model = make(cfg).double()
        reader, prompt = Reader(cfg, model.model, alias=True), prompts(cfg, B, drawing(2))
        plain = write(cfg, reader, prompt, seed=11)
        ways = itertools.cycle(({}, {"window": 3}, {"redraft": "align"}))
        for make_draft, how in zip(DRAFTS.values(), ways):
            drafts = [make_draft(text, rng) for text in plain.texts()]
            assert write(replace(cfg, **how), reader, prompt, drafts, seed=11).texts() == plain.texts()
        assert write(cfg, reader, prompt, seed=12).texts() != plain.texts()
        cold = write(replace(cfg, temperature=1e-6), reader, prompt, seed=11).texts()
        assert cold == write(replace(cfg, temperature=0.0), reader, prompt).texts()


def test_sampling_follows_torchs_seed_and_leaves_it_alone():
    """eval_sim.py --seed: torch.manual_seed fixes a model's draws."""
    model, texts = make(small(temperature=1.0)), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts.append(model.act(samples(model.cfg, 2))[1]["texts"])
    assert texts[0] == texts[1] != texts[2]


def test_grammar_yields_the_right_count_of_integers_in_range():                    # sheet 14.29
    """Whatever the weights, the draft, the temperature: H x D integers in 0..bins, no leading zero."""
    for seed, bins in enumerate((5, 10, 99, 100, 1000, 4095)):
        cfg = small(num_bins=bins, horizon=3, max_new_tokens=1024, temperature=float(seed % 2) * 3)
        model, rng = make(cfg, seed).double(), random.Random(seed)
        reader, prompt = Reader(cfg, model.model, alias=True), prompts(cfg, 8, drawing(seed))
        drafts = [DRAFTS["random"]("", rng) for _ in range(8)]
        for text in write(cfg, reader, prompt, drafts, seed).texts():
            q, problem = parse_safe(text, bins, 3, 3)
            assert problem == "" and text == to_text(q) and 0 <= q.min() <= q.max() <= bins


def test_nothing_but_digits_spaces_and_the_end_is_ever_written():                  # sheet 14.15
    cfg = small(grammar=False)
    model = make(cfg)
    reader = Reader(cfg, model.model, alias=True)
    writer = write(cfg, reader, prompts(cfg, 16, drawing(0)))
    assert writer.text.min() >= 0 and writer.text.max() <= END
    assert all(set(text) <= set(SYMBOLS) for text in writer.texts())
    assert cfg.legal == [*range(22, 32), 3, 501] and PRESETS["3b"].legal == [*range(15, 25), 220, 151645]
    tokenizer = load_tokenizer(cfg)
    assert tokenizer.convert_ids_to_tokens(cfg.legal[:11]) == [*"0123456789", "▁"]


def test_a_pass_reads_nothing_back_from_the_device():
    """No .item(), .cpu() or bool(tensor) between two looks: each would make a GPU wait."""
    class Count(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            aten = torch.ops.aten
            Count.reads += func in (aten._local_scalar_dense.default, aten.nonzero.default)
            return func(*args, **(kwargs or {}))
    cfg = small()                                              # (F.one_hot reads on a CPU, and only there)
    model = make(cfg)
    reader, prompt = Reader(cfg, model.model, alias=True), prompts(cfg, 2, drawing(0))
    with torch.no_grad():
        writer = Writer(cfg, reader, prompt[0], prompt[1].float(), ["1 2 3", None])
        with Count():
            writer.read(writer.window)
    assert Count.reads == 0


# ---- The model --------------------------------------------------------------------------------------------

def hidden_states(model, batch):
    """Model.forward's, and the Reader's over a cache in several steps of several sizes."""
    want = model(batch)
    with model.reading() as reader:
        B, L = batch["ids"].shape
        rows, cache, parts = model.embed(batch), reader.new_cache(B, L + 3), []
        for first, last in itertools.pairwise((0, 5, 6, 7, L - 4, L)):
            slots = torch.arange(first, last).expand(B, -1)
            place = batch["positions"].transpose(0, 1)[:, :, first:last]
            parts.append(reader(rows[:, first:last], place, slots, cache))
    return want, torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(llm_heads=2, llm_kv_heads=1, mrope_section=(2, 2, 4)),
                                     dict(llm_heads=4, llm_kv_heads=4), dict(views=("a", "b"), tile=False)])
def test_cached_decoding_equals_the_full_forward(changes):
    model = make(small(**changes))
    batch = batch_of(model)
    want, got = hidden_states(model, batch)
    for i, n in enumerate(batch["length"].tolist()):
        torch.testing.assert_close(got[i, :n], want[i, :n], rtol=1e-4, atol=1e-4)
    with model.reading() as reader:
        logits = F.linear(want, model.model.embed_tokens.weight)[..., model.cfg.legal]
        torch.testing.assert_close(reader.logits(want), logits)
    assert reader.logits(want).shape[-1] == 12


@torch.no_grad()
def test_rejected_draft_leaves_no_trace_in_the_cache():
    model = make().double()
    batch = batch_of(model, 1)
    with model.reading() as reader:
        rows, place, L = model.embed(batch), batch["positions"].transpose(0, 1), batch["ids"].shape[1]
        cache, slots = reader.new_cache(1, L + 8), torch.arange(L)[None]
        reader(torch.randn_like(rows), place, slots, cache)    # a draft of which nothing was true
        clean = reader(rows, place, slots, reader.new_cache(1, L))
        torch.testing.assert_close(reader(rows, place, slots, cache), clean)


@torch.no_grad()
def test_attention_kinds_agree():
    model = make()
    eager = Model(model.cfg, model.tokenizer, STATS, attn="eager").eval()
    eager.load_state_dict(model.state_dict())
    batch = batch_of(model)
    torch.testing.assert_close(eager(batch), model(batch), rtol=1e-4, atol=1e-4)


def test_loss_is_the_mean_over_supervised_tokens():
    """As transformers computes it from rows of labels: shifted by one, -100 ignored."""
    model = make()
    batch = batch_of(model)
    logits = F.linear(model(batch), model.model.embed_tokens.weight)
    labels = padded(batch, model.cfg)
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(model.loss(batch)[0], want)


def test_padding_changes_no_loss_and_neither_does_the_company():                   # sheet 14.30
    model = make()
    batch = batch_of(model)
    loss, _ = model.loss(batch)
    L, more = batch["ids"].shape[1], dict(batch)
    b = batch["rows"] // L
    more["ids"] = F.pad(batch["ids"], (0, 5), value=77)        # a token, but beyond every end
    more["positions"] = F.pad(batch["positions"], (0, 5), value=3)
    more["rows"] = batch["rows"] + 5 * b
    torch.testing.assert_close(model.loss(more)[0], loss, rtol=1e-5, atol=1e-6)
    alone = [collate([prepare(s, model.cfg, model.tokenizer, STATS, key=10 + i, train=True)], model.cfg)
             for i, s in enumerate(samples(model.cfg, 3))]
    weights = torch.tensor([len(a["targets"]) for a in alone])
    each = torch.stack([model.loss(a)[0] for a in alone])
    torch.testing.assert_close((each * weights).sum() / weights.sum(), loss, rtol=1e-5, atol=1e-6)
    assert len(set(batch["length"].tolist())) > 1


def test_padding_tokens_get_zero_gradient():
    model, rows = make(), []
    batch = batch_of(model)

    def keep(module, args, out):
        out.retain_grad()
        rows.append(out)
    model.model.embed_tokens.register_forward_hook(keep)
    model.loss(batch)[0].backward()
    real = torch.arange(batch["ids"].shape[1]) < batch["length"][:, None]
    assert rows[0].grad[~real].abs().max() == 0 and (~real).any()
    last = batch["length"] - 1                                 # nothing is predicted behind the last token
    assert rows[0].grad[torch.arange(3), last].abs().max() == 0
    text = real & (batch["ids"] != model.cfg.image_id)
    text[torch.arange(3), last] = False
    assert (rows[0].grad[text].abs().amax(1) > 0).all()


def test_everything_trains_the_vision_tower_too():
    model = make().train()
    model.loss(batch_of(model))[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    group, = model.param_groups(4e-5, 1e-10)
    assert len(group["params"]) == len(list(model.parameters())) and group["weight_decay"] == 1e-10
    assert len(model.blocks()) == model.cfg.vit_depth + model.cfg.llm_depth


@torch.no_grad()
def test_every_view_and_every_word_counts():
    for tile in (True, False):
        model = make(small(views=("third", "wrist"), tile=tile))
        seen = samples(model.cfg, 1)[0]

        def other(model=model, seen=seen, **change):
            o = {"images": dict(seen["images"]), "instruction": seen["instruction"]} | change
            return model(collate([prepare(o, model.cfg, model.tokenizer)], model.cfg))[:, -1]
        base = other()
        for view in model.cfg.views:
            assert not torch.equal(other(images=seen["images"] | {view: 255 - seen["images"][view]}), base)
        assert not torch.equal(other(instruction="put the blue cube on the plate"), base)


@pytest.mark.parametrize("world", ["1", "8"])
def test_learning_rate_does_not_depend_on_the_number_of_processes(world, monkeypatch):     # sheet 14.27
    """Officially 5e-6 x GPUs; the released run had 8. (In a real run: test_two_processes_log_the_same_lr.)"""
    monkeypatch.setenv("WORLD_SIZE", world)
    cfg = PRESETS["3b"]
    assert make().param_groups(cfg.lr, cfg.weight_decay)[0]["lr"] == cfg.lr == 4e-5
    assert PRESETS["3b-paper"].lr == 5e-6


def test_two_processes_see_disjoint_samples():                                     # sheet 14.28
    one, two = (data.Sampler(64, 4, rank=rank, world=2) for rank in (0, 1))
    seen = [{index for step in range(8) for index, _ in sampler[step]} for sampler in (one, two)]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(64))


@pytest.mark.slow
def test_tiny_overfits_one_batch():
    model = make(small(llm_width=64, mrope_section=(2, 2, 4), llm_init=0.1, vit_width=32)).train()
    shown, losses = [{**s, "loss_mask": np.ones(2, bool)} for s in samples(model.cfg, 2)], []
    optimizer = torch.optim.AdamW(model.param_groups(3e-3, 0.0))
    for step in range(150):
        batch = collate([prepare(s, model.cfg, model.tokenizer, STATS, key=100 * step + i, train=True)
                         for i, s in enumerate(shown)], model.cfg)
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:5])
    actions, info = model.eval().act(shown)
    wanted = np.stack([s["actions"] for s in shown])
    assert np.abs(actions - wanted).max() <= 0.5 / 100 + 1e-6 and not info["parse_failed"].any()


# ---- Acting -----------------------------------------------------------------------------------------------

def test_act_on_batch_equals_act_one_by_one():
    model = make(small(repetition_penalty=1.05)).double()
    seen = samples(model.cfg, 3)
    together, info = model.act(seen, "toy")
    assert together.shape == info["actions"].shape == (3, 2, 3)
    assert together.dtype == np.float32 and info["actions"].dtype == np.float64
    assert len({len(prepare(o, model.cfg, model.tokenizer, STATS)["ids"]) for o in seen}) > 1
    for i, o in enumerate(seen):
        alone, about = model.act([o], "toy")
        assert np.array_equal(alone[0], together[i]) and about["texts"][0] == info["texts"][i]
        assert (about["tokens"][0], about["passes"][0]) == (info["tokens"][i], info["passes"][i])


def test_draft_changes_the_passes_and_never_the_actions():                         # sheet 14.24
    model = make().double()
    seen = samples(model.cfg, 3)
    plain, info = model.act(seen, draft="none")
    drafts = (info["texts"][0], "5 5 5", None)
    other, fast = model.act([{**o, "draft": d} for o, d in zip(seen, drafts)])
    assert np.array_equal(plain, other) and fast["passes"][0] == 1 and (fast["passes"] < fast["tokens"]).all()
    off = model.act([{**seen[0], "draft": drafts[0]}], draft="none")[1]                # the switch is off
    assert off["passes"][0] == info["passes"][0]


@pytest.mark.parametrize("draft", ["5X 3?", "4\n5 <|im_end|>", "take it", "9" * 100_000, " ", "  1", "१"])
def test_draft_that_is_no_text_of_numbers_only_costs_time(draft):
    for grammar in (True, False):
        model = make(small(grammar=grammar)).double()
        seen = samples(model.cfg, 1)
        want = model.act(seen)[1]["texts"]
        got = model.act([{**seen[0], "draft": draft}])[1]
        assert got["texts"] == want and got["passes"][0] < max(2, got["tokens"][0])


def test_grammar_makes_malformed_chunks_impossible():                              # sheet 14.29
    model = make()
    _, info = model.act(samples(model.cfg, 3))
    assert info["problems"] == [""] * 3 and not info["parse_failed"].any()
    assert all(len(text.split(" ")) == 6 for text in info["texts"])


def told(texts, last=None, **changes):
    """What act answers when a model without grammar writes these texts."""
    cfg = small(grammar=False, max_new_tokens=200, **changes)
    model = make(cfg)
    model.reader = Oracle(model, *texts)
    extra = {} if last is None else {"last_action": np.array(last)}
    return model.act([{**s, **extra} for s in samples(cfg, len(texts))])


@pytest.mark.parametrize("text", ["", " ", "1 2", "   5", "7" * 150])
def test_text_without_one_whole_step_holds_the_pose_and_says_so(text):             # sheet 14.8
    """Zeros move nothing where actions are changes; the gripper stays as it is."""
    actions, info = told([text, "50 50 100 50 50 0"], gripper_open=0.25)
    assert info["parse_failed"].tolist() == [True, False] and info["problems"][0] and not info["problems"][1]
    assert actions[0].tolist() == [[0, 0, 0.25]] * 2 and actions[1].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert told([text], last=(0.3, 0.1, 1))[0].tolist() == [[[0, 0, 1]] * 2]
    assert told([text], gripper_index=-1)[0].tolist() == [[[0, 0, 0]] * 2]


def test_absolute_actions_hold_the_last_action_or_the_state_or_refuse():
    actions, _ = told([""], last=(0.3, 0.1, 1), delta=False)
    np.testing.assert_allclose(actions, [[[0.3, 0.1, 1]] * 2])
    model = make(small(grammar=False, delta=False))
    model.reader = Oracle(model, "")
    look = samples(model.cfg, 1)[0]
    np.testing.assert_allclose(model.act([{**look, "state": np.float32([1, 2, 3])}])[0], [[[1, 2, 3]] * 2])
    for state in ({}, {"state": np.zeros(8, np.float32)}):
        with pytest.raises(ValueError, match="pose to hold"):
            model.act([{**look, **state}])


def test_flawed_text_is_reported_and_its_whole_steps_are_used():
    actions, info = told(["0 0 100 7", "100 100 100 100 100 999", "0 0 0  0 0 0", "50 50 50 0 0 0 0 0 0"])
    assert info["parse_failed"].all()
    assert ["instead of 6" in p for p in info["problems"]] == [True, False, False, True]
    np.testing.assert_allclose(actions[0], [[-0.5, -0.2, 1]] * 2)
    np.testing.assert_allclose(actions[1], [[0.5, 0.2, 1]] * 2)             # 999 is beyond 100: clamped
    np.testing.assert_allclose(actions[2], [[-0.5, -0.2, 0]] * 2)
    np.testing.assert_allclose(actions[3], [[0, 0, 0.5], [-0.5, -0.2, 0]], atol=1e-7)


def test_strict_parsing_is_the_official_midpoint_for_the_whole_batch():
    actions, info = told(["0 0 0 0 0 0", "0  0"], strict=True)
    assert actions.tolist() == [[[0, 0, 0.5]] * 2] * 2 and info["parse_failed"].tolist() == [False, True]
    assert told(["0 0"], strict=True)[0].shape == (1, 0, 3)


def test_constant_statistics_give_finite_actions_and_a_draft():
    stats = {"toy": {"action": {"min": [0.1, -0.2, 0.0], "max": [0.1, 0.2, 0.0]}}}
    model = make(small(execute=2), stats=stats)
    policy, o = Policy(model, "toy"), samples(model.cfg, 1)[0]
    chunk = model.act([o])[0][0]
    assert np.isfinite(chunk).all() and np.allclose(chunk[:, [0, 2]], [0.1, 0.0])
    policy.step(o, chunk)
    words = policy.ask(o)["draft"].split(" ")
    assert words[0] == words[2] == words[3] == words[5] == "0"


@pytest.mark.parametrize("grammar", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_equals_act_step_by_step(grammar, temperature):                     # sheet 14.25
    """Also without a draft, with a wrong one, and with a right one; each step once, in order."""
    model = make(small(horizon=4, grammar=grammar, temperature=temperature, max_new_tokens=80)).double()
    seen = samples(model.cfg, 1)[0]
    _, info = model.act([seen], seed=5)
    for draft in (None, info["texts"][0], "100 " * 11 + "1"):
        for how in ({}, {"window": 2}):
            steps = list(model.stream({**seen, "draft": draft}, seed=5, **how))
            assert [t for t, _ in steps] == list(range(len(steps))) and (len(steps) == 4 or not grammar)
            for t, action in steps:
                assert np.array_equal(action, info["actions"][0, t]) and action.dtype == np.float64


@pytest.mark.parametrize("text", [
    "1 2 3 4 5 6", "1 2 3  4 5 6", " 1 2 3 4 5", "1 2  3 4 5 6", "1 2 3 ", "1 2", "1 2 3 4 5 6 7 8 9", "",
    "100 100 100 10 10 10"])
def test_stream_gives_no_step_that_act_would_not(text):
    model = make(small(grammar=False))
    model.reader = Oracle(model, text)
    seen = samples(model.cfg, 1)[0]
    _, info = model.act([seen])
    for draft in (None, text, "5 5 5 5 5 5"):
        steps = list(model.stream({**seen, "draft": draft}))
        assert [t for t, _ in steps] == list(range(len(steps)))
        assert len(steps) == 2 or info["parse_failed"][0]
        for t, action in steps:
            assert np.array_equal(action, info["actions"][0, t])


def test_step_is_streamed_as_soon_as_its_numbers_stand():
    cfg = small(horizon=8, max_new_tokens=1024)
    model = make(cfg)
    model.reader = Oracle(model, to_text(np.full((8, 3), 77)))
    wrong = to_text(np.full((8, 3), 33))
    steps, when = model.stream({**samples(cfg, 1)[0], "draft": wrong}, redraft="align"), []
    for t, _ in steps:
        when.append(steps.gi_frame.f_locals["writer"].passes.item())
    assert when == sorted(when) and when[0] < when[-1] / 4 and len(when) == 8


def test_stream_leaves_gradients_on_for_its_caller():
    model = make()
    for _ in model.stream(samples(model.cfg, 1)[0]):
        assert torch.is_grad_enabled()
    one, two = (model.stream(samples(model.cfg, 1)[0]) for _ in range(2))
    next(one), next(two)
    one.close()
    two.close()
    assert torch.is_grad_enabled()


def test_training_goes_on_in_the_fused_weights():
    """The Reader's projections and the model's are one memory: a step of the optimizer reaches both."""
    model = make()
    seen, batch = samples(model.cfg, 2), batch_of(model)
    optimizer = torch.optim.AdamW(model.param_groups(0.05, 0.0))
    before = model.act(seen)[1]["texts"]
    reader = model.reader
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        optimizer.step()
    after = model.act(seen)[1]["texts"]
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    assert model.reader is reader and reader.current(model.model)
    assert after == fresh.act(seen)[1]["texts"] != before
    q, k, v = (getattr(model.model.layers[0].self_attn, f"{x}_proj").weight for x in "qkv")
    assert torch.equal(reader.layers[0][1], torch.cat([q, k, v]))
    assert reader.layers[0][1].data_ptr() == q.data_ptr()


@pytest.mark.parametrize("change", ["in place", "assigned", "wider", "wider and back"])
def test_reader_notices_other_weights(change):
    model, other = make(), make(seed=7)
    seen = samples(model.cfg, 2)
    model.act(seen)
    if change == "in place":
        model.load_state_dict(other.state_dict())
    elif change == "assigned":
        model.load_state_dict(other.state_dict(), assign=True)
    else:
        other.double()
        model.load_state_dict(make(seed=7).state_dict())
        model.double()
        if change == "wider and back":
            other, model = other.float(), model.float()
    assert model.act(seen)[1]["texts"] == other.act(seen)[1]["texts"]


def test_adapters_count_when_acting():
    pytest.importorskip("peft")
    import train
    model = make()
    seen = samples(model.cfg, 2)
    before = model.act(seen)[1]["texts"]
    train.add_lora(model, 4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
    merged = make()
    merged.load_state_dict(train.merge_lora(model.state_dict()))
    assert model.act(seen)[1]["texts"] == merged.act(seen)[1]["texts"] != before


def test_act_ignores_autocast():
    model = make()
    seen = samples(model.cfg, 2)
    want = model.act(seen)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.act(seen)
    assert want[1]["texts"] == got[1]["texts"] and np.array_equal(want[0], got[0])


# ---- Policy -----------------------------------------------------------------------------------------------

def test_next_draft_is_the_last_chunk_without_what_was_played():
    cfg = small(horizon=4, execute=1)
    model = make(cfg).double()
    policy, o, seen = Policy(model, "toy"), samples(cfg, 1)[0], []
    assert "draft" not in policy.ask(o) and "last_action" not in policy.ask(o)
    for k in range(3):
        asked = policy.ask(o)
        chunk, info = model.act([asked], "toy")
        seen.append((asked, info))
        policy.step(o, chunk[0])
        text = info["texts"][0].split(" ")
        assert policy.ask(o)["draft"] == " ".join(text[3:] + text[-3:])
        np.testing.assert_allclose(policy.ask(o)["last_action"], chunk[0, 0])
        assert info["texts"] == seen[0][1]["texts"]            # same picture: same text, whatever the draft
    two = Policy(model, "toy", execute=3)
    two.step(o, chunk[0])
    assert two.ask(o)["draft"] == " ".join(text[9:] + text[-3:] * 3)
    assert "draft" not in policy.ask({**o, "instruction": "something else"})


def test_policy_plays_execute_actions_per_chunk():
    model, o = make(small(horizon=4, execute=3)), {"instruction": "a"}
    policy, chunk = Policy(model), np.arange(12.0).reshape(4, 3)
    for row in (0, 1, 2):
        assert policy.needs_chunk == (row == 0)
        assert np.array_equal(policy.step(o, chunk if policy.needs_chunk else None), chunk[row])
    assert policy.needs_chunk
    policy.step(o, chunk)
    assert not policy.needs_chunk
    assert np.array_equal(policy.step({"instruction": "b"}, chunk + 1), chunk[0] + 1)            # a new task
    policy.reset()
    assert policy.needs_chunk


def test_policy_asks_its_model_itself_and_speculates():
    model = make(small(horizon=4, ensemble="1", ensemble_horizon=3)).double()
    policy, o = Policy(model, "toy"), samples(model.cfg, 1)[0]
    got, calls = [], []
    plain = model.act([o])[1]["actions"][0]
    act = model.act
    model.act = lambda observations, key: calls.append(observations[0]) or act(observations, key)
    for _ in range(3):
        got.append(policy.step(o))
    ensemble = ChunkEnsemble(3, vla0.ensemble_weights)
    np.testing.assert_allclose(got, [ensemble.step(plain) for _ in range(3)])
    assert [bool(o.get("draft")) for o in calls] == [False, True, True]


def test_first_call_plays_its_chunk_as_it_is():                                    # sheet 14.17
    for version in ("1", "2", "none"):
        policy = Policy(make(small(horizon=4)), ensemble=version)
        chunk = np.random.default_rng(0).normal(size=(4, 3))
        assert np.array_equal(policy.step({"instruction": "a"}, chunk), chunk[0])


def test_ensemble_weighs_older_chunks_less():                                      # sheet 14.16
    """Version 1: half; version 2: weight ** k. (The paper's plain mean is neither.)"""
    chunks = np.random.default_rng(0).normal(size=(3, 4, 3))
    for version, w in (("1", (1, 0.5, 0.5)), ("2", (1, 0.8, 0.64)), ("none", (1, 0, 0))):
        policy = Policy(make(small(horizon=4)), ensemble=version, ensemble_weight=0.8, ensemble_horizon=8)
        out = [policy.step({"instruction": "a"}, chunk) for chunk in chunks]
        want = (w[0] * chunks[2, 0] + w[1] * chunks[1, 1] + w[2] * chunks[0, 2]) / sum(w)
        np.testing.assert_allclose(out[2], want, rtol=1e-12)


def test_whole_chunks_leave_the_ensemble_nothing_and_warn(capsys):                 # sheet 14.16
    model = make(small(horizon=4))
    Policy(model, execute=4, ensemble="1")
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and len(warning.splitlines()) == 1
    assert "nothing to average" in warning
    for how in ({"execute": 3, "ensemble": "1"}, {"execute": 4, "ensemble": "none"},
                {"execute": 4, "ensemble": "2", "ensemble_horizon": 1}):
        Policy(model, **how)
        assert capsys.readouterr().err == ""


def test_gripper_command_is_a_sign():                                              # sheet 14.18
    for value, command in ((0.0, -1), (0.01, 1), (-0.01, -1), (1.0, 1), (-1.0, -1), (0.999, 1), (3.0, 1)):
        action = np.full(7, 0.3)
        action[6] = value
        sent = vla0.sign_gripper(action)
        assert sent[6] == command and (sent[:6] == 0.3).all() and action[6] == value


def test_libero_waits_ten_steps_that_count_for_nothing():                          # sheet 14.19
    model = SimpleNamespace(cfg=PRESETS["3b"], stats={})
    policy, chunk = Policy(model, robot="libero"), np.full((8, 7), 0.3)
    for episode in range(2):
        for _ in range(10):
            assert not policy.needs_chunk
            assert policy.step({"instruction": "a"}).tolist() == [0, 0, 0, 0, 0, 0, -1]
        assert policy.needs_chunk and "draft" not in policy.ask({"instruction": "a", "images": {}})
        assert policy.step({"instruction": "a"}, chunk).tolist() == [0.3] * 6 + [1]
        assert policy.step({"instruction": "b"}, chunk).tolist() == [0.3] * 6 + [1]      # physics has settled
        policy.reset()
    assert LIBERO["max_steps"] == {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300,
                                   "libero_10": 520, "libero_90": 400}             # without the ten
    assert Policy(model).needs_chunk                           # other robots do not wait


def test_libero_frames_are_turned_by_180_degrees():                                # sheet 14.20
    frame = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    look = {"images": {"third": frame}, "instruction": "a"}
    policy = Policy(SimpleNamespace(cfg=PRESETS["3b"], stats={}), robot="libero")
    assert np.array_equal(policy.ask(look)["images"]["third"], np.rot90(frame, 2))
    assert look["images"]["third"] is frame
    assert Policy(SimpleNamespace(cfg=PRESETS["3b"], stats={})).ask(look)["images"]["third"] is frame


# ---- Checkpoints ------------------------------------------------------------------------------------------

def test_saved_folder_loads_to_the_same_actions(tmp_path):
    model = make()
    model.preset, model.origin = "tiny", {"started from": "nothing", "license": "MIT"}
    seen = samples(model.cfg, 2)
    want = model.act(seen)                                     # from here on, weights are views of fused ones
    model.save_pretrained(tmp_path / "ck", card={"success": "80 %"})
    again = from_pretrained(tmp_path / "ck")
    assert again.cfg == model.cfg and again.stats == STATS and not again.fresh
    assert (again.preset, again.origin) == ("tiny", model.origin)
    got = again.act(seen)
    assert np.array_equal(got[0], want[0]) and got[1]["texts"] == want[1]["texts"]
    card = (tmp_path / "ck" / "README.md").read_text()
    assert "license: MIT" in card and "success: 80 %" in card and "toy" in card
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert abs((tmp_path / "ck" / "model.safetensors").stat().st_size - size) < 20_000     # nothing twice
    again.save_pretrained(tmp_path / "ck")                     # over itself, while its weights are mapped
    third = from_pretrained(tmp_path / "ck", temperature=0.1)
    assert third.cfg.temperature == 0.1
    assert all(torch.equal(a, b) for a, b in zip(third.state_dict().values(), model.state_dict().values()))


def test_weights_are_cast_on_request(tmp_path):
    make().save_pretrained(tmp_path)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), (None, torch.float32),
                        (torch.bfloat16, torch.bfloat16)):
        model = from_pretrained(tmp_path, dtype=name)
        assert {p.dtype for p in model.parameters()} == {dtype}
        chunks, info = model.act(samples(model.cfg, 1))
        assert chunks.dtype == np.float32 and info["problems"] == [""]


SIZES = dict(
    vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e4, mrope_section=[1, 1, 2], rope_type="default",
    image_token_id=504, vision_config=dict(
        depth=2, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32, patch_size=4,
        spatial_merge_size=2, temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1]))
LIMITS = STATS["toy"]["action"]["min"], STATS["toy"]["action"]["max"]


def official(tmp_path, model, config=None, rename=lambda name: name, **how):
    weights = {rename(name): p for name, p in model.state_dict().items()}
    how = {"limits": LIMITS, **how}
    return write_official(tmp_path / "run", config or flat_config(SIZES), weights, **how)


def from_official(path, **how):
    """With the values that no official file states, as the small preset has them."""
    cfg = small()
    stated = {"image_size", "horizon", "action_dim", "gripper_index", "num_bins", "views", "crop", "system",
              "digit_id", "space_id", "newline_id", "mask_id", "pad_id", "im_start_id", "im_end_id",
              "vision_start_id", "vision_end_id", "tokenizer", "ensemble", "gripper_open"}
    return from_pretrained(path, **{**{name: getattr(cfg, name) for name in stated}, **how})


@pytest.mark.parametrize("where", ["run", "run/model_last"])
def test_official_folder_loads_to_the_same_text(tmp_path, where):                  # sheet 14.26
    model = make(small(repetition_penalty=1.3))
    official(tmp_path, model, penalty=1.3)
    again = from_official(tmp_path / where)
    cfg = again.cfg
    assert (cfg.repetition_penalty, cfg.vision_id, cfg.rope_theta, cfg.lr) == (1.3, False, 1e4, 4e-5)
    assert again.preset == "3b" and "CC BY-NC" in again.origin["license"] and not again.fresh
    seen = samples(model.cfg, 2)
    assert again.act(seen, max_new_tokens=30)[1]["texts"] == model.act(seen)[1]["texts"]
    np.testing.assert_allclose(again.act(seen)[0], model.act(seen)[0], atol=1e-6)


@pytest.mark.parametrize("version, vision_id", [("4.49.0", False), ("4.51.3", False), ("4.52.0", True),
                                                ("4.57.1", True), ("5.17.0", True)])
def test_vision_id_follows_the_transformers_that_wrote_the_file(tmp_path, capsys, version, vision_id):
    """Before 4.52 the option `add_vision_id` was dropped without a word, so the release learnt without it."""
    path = official(tmp_path, make(), flat_config(SIZES) | {"transformers_version": version})
    assert from_official(path).cfg.vision_id is vision_id
    said = capsys.readouterr().err
    assert version in said and "Picture 1" in said
    assert from_official(path, vision_id=not vision_id).cfg.vision_id is not vision_id


def test_newer_names_and_nested_config_load_too(tmp_path):
    """As transformers keeps them in memory since 4.52, with a head that is tied and dropped."""
    model = make()
    flat = flat_config(SIZES)
    text = {k: v for k, v in flat.items() if k not in ("vision_config", "model_type", "transformers_version")}
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    config = {"model_type": "qwen2_5_vl", "transformers_version": "5.17.0", "text_config": text,
              "vision_config": SIZES["vision_config"], "image_token_id": 504}
    new = {"model.": "model.language_model.", "visual.": "model.visual."}
    path = official(tmp_path, model, config,
                    rename=lambda n: next(new[p] + n.removeprefix(p) for p in new if n.startswith(p)))
    shard = path / "model_last" / "model-00001-of-00002.safetensors"
    save_file(load_file(shard) | {"lm_head.weight": torch.zeros(512, 32)}, shard)
    with pytest.raises(ValueError, match="lm_head.weight is not model.embed_tokens.weight"):
        from_official(path)
    save_file(load_file(shard) | {"lm_head.weight": model.model.embed_tokens.weight.detach().clone()}, shard)
    again = from_official(path, vision_id=False, repetition_penalty=1.0)
    assert again.cfg.mrope_section == (1, 1, 2) and again.cfg.rope_theta == 1e4
    seen = samples(model.cfg, 2)
    assert again.act(seen)[1]["texts"] == model.act(seen)[1]["texts"]


def test_folder_that_transformers_saves_loads(tmp_path):
    """Qwen2.5-VL itself, as --init of a fine-tuning run: no statistics yet, and the same hidden states."""
    torch.manual_seed(0)
    about = flat_config(SIZES)
    text = {k: about[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                  "num_attention_heads", "num_key_value_heads", "rms_norm_eps")}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": True}, tie_word_embeddings=True,
        vision_config=SIZES["vision_config"], image_token_id=504, vision_start_token_id=502)).eval()
    theirs.save_pretrained(tmp_path)
    model = from_official(tmp_path)
    assert model.stats == {}
    batch = batch_of(make(), 1)
    patches, grid = vla0.patchify(batch["images"].flatten(0, 1), model.cfg)
    with torch.no_grad():
        want = theirs.model(inputs_embeds=model.embed(batch), position_ids=batch["positions"].transpose(0, 1))
        torch.testing.assert_close(model(batch), want.last_hidden_state, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs.model.visual(patches, grid_thw=grid).pooler_output,
                                   model.visual(patches, grid_thw=grid).pooler_output)
    with pytest.raises(ValueError, match="statistics"):
        model.act(samples(model.cfg, 1))


@pytest.mark.parametrize("protocol, numpy_1", [(2, True), (2, False), (4, False)])
def test_official_pickle_is_read_and_written_as_json(tmp_path, protocol, numpy_1):
    path = official(tmp_path, make(), protocol=protocol) / "dataset_stats.pkl"
    if numpy_1:                                                # the release's was written by numpy 1
        path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    stats = vla0.read_stats(path)
    assert stats == {"libero": {"action": {"min": np.float32(LIMITS[0]).tolist(), "dtype": "float32",
                                           "max": np.float32(LIMITS[1]).tolist()}}}
    done = forks.shared()("vla0.py --stats", path, tmp_path / "out.json", cwd=tmp_path)
    assert done.rc == 0 and json.loads((tmp_path / "out.json").read_text()) == stats
    (tmp_path / "run" / "dataset_stats.pkl").unlink()
    write_json(tmp_path / "run" / "dataset_stats.json",
               {"out_ori_act": {k: stats["libero"]["action"][k] for k in ("min", "max")}})
    assert from_official(tmp_path / "run").stats == stats


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_in_a_statistics_pickle_is_executed(tmp_path):
    path, mark = official(tmp_path, make()) / "dataset_stats.pkl", tmp_path / "executed"
    for evil in (Evil(os.mkdir, str(mark)), Evil(eval, f"__import__('os').mkdir({str(mark)!r})"),
                 Evil(np.fromfile, str(path)), Evil(getattr, "x", "upper")):
        path.write_bytes(pickle.dumps({"out_ori_act": {"min": evil, "max": np.zeros(3)}}))
        with pytest.raises(ValueError, match="no action statistics of VLA-0: it names") as caught:
            from_official(tmp_path / "run")
        assert not mark.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [
    b"", b"hello", b"\x80\x04.", pickle.dumps([1]), pickle.dumps({"out_ori_act": 3}),
    pickle.dumps({"out_ori_act": {"min": np.zeros(3)}})])
def test_bad_statistics_are_one_clear_line(tmp_path, content):
    path = official(tmp_path, make()) / "dataset_stats.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no action statistics") as caught:
        from_official(tmp_path / "run")
    assert "\n" not in str(caught.value)


def spoil(folder, how):
    """A checkpoint folder that cannot be loaded, and the words that must be in the message."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    saved = json.loads(config.read_text())
    if how == "truncated":
        weights.write_bytes(whole[:len(whole) // 2])
        return "torn"
    if how == "missing":
        weights.unlink()
        return "no weights file"
    if how == "other method":
        config.write_text(json.dumps(saved | {"method": "a0"}))
        return "checkpoint of 'a0'"
    if how == "no method":
        config.write_text(json.dumps({"model_type": "llama"}))
        return "'llama' model; VLA-0 is a qwen2_5_vl"
    if how == "no config":
        config.unlink()
        return "has no config.json"
    if how == "unknown field":
        saved["config"]["horison"] = 3
        config.write_text(json.dumps(saved))
        return "did you mean 'horizon'"
    state, name = load_file(weights), "model.layers.0.self_attn.q_proj.bias"
    if how == "parameter missing":
        del state[name]
    else:
        state[name] = state[name][:3].clone()
    save_file(state, weights)
    return name


@pytest.mark.parametrize("how", ["truncated", "missing", "other method", "no method", "no config",
                                 "unknown field", "parameter missing", "parameter of another shape"])
def test_bad_checkpoint_is_one_clear_line(tmp_path, how):
    make().save_pretrained(tmp_path / "ck")
    words = spoil(tmp_path / "ck", how)
    with pytest.raises(ValueError, match=words) as caught:
        from_pretrained(tmp_path / "ck")
    assert "\n" not in str(caught.value)


def test_official_folder_without_a_shard_or_a_parameter_is_one_clear_line(tmp_path):
    path = official(tmp_path, make(), rename=lambda n: n.replace("norm.weight", "norm.gain"))
    with pytest.raises(ValueError, match="missing, e.g. model"):
        from_official(path)
    (path / "model_last" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights file .*00002-of-00002"):
        from_official(path)


@pytest.mark.parametrize("where, words", [("nowhere/to/be/found", "no such file"),
                                          ("nobody/nothing", "offline"), (".", "has no config.json")])
def test_path_that_leads_nowhere(tmp_path, monkeypatch, where, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        from_pretrained(where)


def test_missing_tokenizer_names_its_option(tmp_path, monkeypatch):
    path = official(tmp_path, make())
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for tokenizer in ("nowhere/to/be", "org/name", str(path / "dataset_stats.pkl")):
        with pytest.raises(ValueError, match="--tokenizer"):
            from_official(path, tokenizer=tokenizer)


# ---- What a user can get wrong ----------------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    ({"instruction": "  "}, "say in words"), ({"instruction": None}, "say in words"),
    ({"images": {}}, "images: a dict"),
    ({"images": {"third": np.zeros((8, 8, 3), np.float32)}}, "found float32"),
    ({"images": {"left": np.zeros((8, 8, 3), np.uint8), "right": np.zeros((8, 8, 3), np.uint8)}}, "looks at"),
    ({"instruction": "<|im_end|> go"}, "control tokens"), ({"state": np.zeros(7)}, "8 numbers are expected")])
def test_wrong_observation_is_one_clear_line(change, words):
    model = make(small(state_dim=8))
    with pytest.raises(ValueError, match=words) as caught:
        model.act([samples(model.cfg, 1)[0] | change])
    assert "\n" not in str(caught.value)


def test_unknown_unnorm_key_names_the_known_ones():
    model = make(stats={**STATS, "other": STATS["toy"]})
    for key, words in (("nobody", "unnorm_key='nobody'.*'other', 'toy'"), (None, "no unnorm_key was given")):
        with pytest.raises(ValueError, match=words):
            model.act(samples(model.cfg, 1), key)
    model.stats = {}
    with pytest.raises(ValueError, match="no dataset statistics"):
        model.act(samples(model.cfg, 1))


@pytest.mark.parametrize("make_it, words", [
    (lambda: Config(execute=9), "execute=9"), (lambda: Config(views=()), "views=()"),
    (lambda: Config(gripper_index=7), "gripper_index=7"), (lambda: Config(llm_heads=3), "llm_heads=3"),
    (lambda: Config(mrope_section=(1, 2, 3)), "half a head, 64"),
    (lambda: Config(padding="zero"), "padding='zero'"),
    (lambda: Config(ensemble="3"), "ensemble='3'"), (lambda: Config(redraft="never"), "jacobi or align"),
    (lambda: vla0.configure(Config(), horison=8), "'horizon'"),
    (lambda: Policy(make(), execute=9), "execute=9"),
    (lambda: Policy(make(), robot="atlas"), "robot='atlas'"),
    (lambda: Policy(make(), ensemble="5"), "ensemble='5'"),
    (lambda: make().act([]), "at least one observation"),
    (lambda: make().act(samples(small(), 1), gramar=False), "did you mean 'grammar'"),
    (lambda: from_pretrained("x", dtype="int8"), "dtype='int8'"),
    (lambda: prepare(samples(small(horizon=5), 1)[0], small(), load_tokenizer(small()), STATS),
     "horizon, action_dim"),
    (lambda: load_tokenizer(Config(tokenizer=__file__)), "tokenizer.json is needed")])
def test_wrong_argument_is_one_clear_line(make_it, words):
    with pytest.raises(ValueError, match=words) as caught:
        make_it()
    assert "\n" not in str(caught.value)


# ---- The file by itself -----------------------------------------------------------------------------------

def test_vla0_and_common_alone_train_and_act(tmp_path):
    """Only the two files, in an empty folder: the demo trains and acts, in 20 seconds of computing time."""
    for name in ("vla0.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    before = os.times()
    done = subprocess.run([sys.executable, "vla0.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr
    losses = [float(line.split("loss ")[1].split()[0]) for line in done.stdout.splitlines() if "loss" in line]
    assert losses[-1] < 0.5 * losses[0] and done.stdout.count("wrote '") == 2
    assert after.children_user - before.children_user < 20


TOY = '''
import numpy as np

class Toy:
    def __len__(self):
        return 40
    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        actions = rng.uniform(-0.05, 0.05, (2, 3)).astype(np.float32)
        return {"images": {"third": rng.integers(0, 256, (16, 16, 3), np.uint8)}, "actions": actions,
                "instruction": "lift the cube" + " now" * (i % 3), "state": np.zeros(8, np.float32),
                "loss_mask": np.arange(2) < 1 + i % 2, "dataset": "toy"}

def make(split="train"):
    return Toy()
'''


@pytest.mark.slow
def test_two_processes_log_the_same_lr(tmp_path):                                  # sheet 14.27
    (tmp_path / "toy.py").write_text(TOY)
    values = [f"{name}={getattr(small(), name)}".replace(" ", "") for name in (
        "image_size patch_size merge_size window_size vit_width vit_depth vit_heads vit_mlp full_attention "
        "llm_width llm_depth llm_heads llm_kv_heads llm_mlp mrope_section horizon action_dim gripper_index "
        "execute").split()]
    for world, batch in ((1, 8), (2, 4)):
        done = forks.shared()(
            f"train.py --model vla0 --data toy.py:make --init none --batch {batch} --val-every 0 "
            f"--save-every 0 --log-every 1 --steps 3 --out run{world} --set", *values, "warmup=2", "lr=0.008",
            "lr_schedule=constant", cwd=tmp_path, world=world)
        assert done.rc == 0, done.err
        lines = (tmp_path / f"run{world}" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["lr"] for row in rows] == [0.004, 0.008, 0.008]
        assert "lr=0.008" in done.out.replace("\n", " ")
        model = from_pretrained(tmp_path / f"run{world}" / "last")
        assert model.act(samples(model.cfg, 2))[1]["problems"] == ["", ""]


def test_pictures_do_not_depend_on_the_number_of_threads():
    """Loader workers have one, the main process several; a grey level is cut off, so the last bit shows."""
    image = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            seen.append(vla0.prepare_images([image], vla0.PRESETS["tiny"]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_fidelity_tags_name_tests_that_exist():
    text = (ROOT / "vla0.py").read_text(encoding="utf-8")
    names = re.findall(r"Test: test_vla0\.py::(\w+)", text)
    assert len(names) == text.count("PAPER!=CODE:") + text.count("FAITHFUL:") >= 3
    assert all(name in globals() for name in names)


def test_every_item_of_the_checklist_has_its_test():
    text = Path(__file__).read_text(encoding="utf-8")
    marks = [line.partition("# sheet")[2] for line in text.splitlines()]
    found = {int(n) for mark in marks for n in re.findall(r"14\.(\d+)", mark)}
    assert found == set(range(1, 31))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_pass_does_not_wait():
    cfg = small(repetition_penalty=1.05)
    model = make(cfg).cuda()
    want = make(cfg).act(samples(cfg, 2))[1]["texts"]
    assert len(model.act(samples(cfg, 2))[1]["texts"]) == len(want)
    batch = {name: x.cuda() for name, x in batch_of(model, 2).items()}
    with torch.no_grad(), model.reading() as reader:
        writer = Writer(cfg, reader, batch, model.embed(batch), ["1 2 3", None])
        torch.cuda.set_sync_debug_mode("error")
        try:
            writer.read(writer.window)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_big_presets_have_the_official_size():
    with torch.device("meta"):
        model = Model(PRESETS["3b"])
    assert sum(p.numel() for p in model.parameters()) == 3_754_622_976
    assert sum(p.numel() for p in model.visual.parameters()) == 668_684_288
