"""What holds for every method: one file and common.py, save and load, act, what a user can get wrong."""
import ast
import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import threading
import weakref
from types import SimpleNamespace

import common
import eval_sim
import numpy as np
import pytest
import torch
import train
from common import METHODS
from forks import ROOT, shared
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The tiny presets, made smaller still: a forward costs milliseconds. (A method that is not here: as it is.)
SMALL = {
    "cogact": dict(image_size=32, patch_size=8, dino_width=32, siglip_width=32, dino_depth=3, siglip_depth=3,
                   dino_heads=2, siglip_heads=2, dino_mlp=64, siglip_mlp=64, llm_width=32, llm_depth=2,
                   llm_heads=4, llm_mlp=64, width=32, depth=2, heads=2, horizon=4,
                   repeated_diffusion_steps=2),
    "vla0": dict(image_size=16, patch_size=4, merge_size=2, window_size=16, vit_width=16, vit_depth=2,
                 vit_mlp=16, full_attention=(1,), llm_width=32, llm_depth=2, llm_mlp=32, llm_init=0.3,
                 mrope_section=(1, 1, 2), horizon=4, window=0),
    "robobrain_x0": dict(action_dim=7, llm_init=0.3), "robovlms": dict(history=1, horizon=4)}
# what turns all augmentation on, and what of a prepared sample it draws
AUGMENTED = {
    "cogact": (dict(augment=True), {"images"}), "a0": (dict(augment=True, image_aug=True), {"images"}),
    "vla0": (dict(crop=0.8, jitter=(0.2, 0.2, 0.2, 0.05), mask_none=0.0), {"images", "ids", "labels"})}
LOW, HIGH = [-0.5] * 6 + [0.0], [0.5] * 6 + [1.0]
STATS = {"toy": {"num_transitions": 10, "num_trajectories": 1, "action": {
    "q01": LOW, "q99": HIGH, "min": LOW, "max": HIGH, "mean": [0.0] * 7, "std": [1.0] * 7,
    "mask": [True] * 6 + [False]}}}


@pytest.fixture(params=METHODS)
def method(request):
    return importlib.import_module(request.param)


def make(method, seed=0, attn="auto", **changes):
    """A model with random weights everywhere: a fresh head may be zero."""
    torch.manual_seed(seed)
    cfg = dataclasses.replace(method.PRESETS["tiny"], **{**SMALL.get(method.__name__, {}), **changes})
    model = method.Model(cfg, method.load_tokenizer(cfg), STATS, attn).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model


def samples(cfg, n):
    rng, words = np.random.default_rng(0), ("put the red cube on the plate", "lift the ball", "push it left")
    return [{"images": {v: rng.integers(0, 256, (40, 48, 3), np.uint8) for v in cfg.views}, "dataset": "toy",
             "instruction": words[i % 3], "state": np.zeros(8, np.float32),
             "loss_mask": np.arange(cfg.horizon) < 3 + i,
             "actions": rng.uniform(-0.4, 0.4, (cfg.horizon, 7)).astype(np.float32),
             "waypoints": rng.uniform(0, 1, (5, 2)).astype(np.float32)} for i in range(n)]


def batch_of(method, model, rows, train=True):
    return method.collate([method.prepare(s, model.cfg, model.tokenizer, STATS, key=10 + i, train=train)
                           for i, s in enumerate(rows)], model.cfg)


def act(model, seen, first=0):
    """What comes out (B, T, A); where that is clipped, what comes before: untrained, all of it would be.

    Where a method draws noise, that of observation i is always the same; first: which one seen[0] is.
    """
    shape, how = (8, model.cfg.horizon, model.cfg.action_dim), {}
    if "noise" in inspect.signature(model.act).parameters:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        how["noise"] = noise[first:first + len(seen)]
    chunks, info = model.act(seen, **how)
    assert chunks.dtype == np.float32 and chunks.shape == (len(seen), *shape[1:])
    return info.get("samples", chunks)


class CountReads(TorchDispatchMode):
    """Counts what makes a GPU wait: .item(), .cpu() or bool(tensor)."""
    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


# ---- One file ---------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_method_and_common_alone_train_and_act(method, tmp_path):
    """Only the two files, in an empty folder: the demo trains and acts, in 20 seconds of computing time."""
    for name in (method.__name__, "common"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = shared()(f"{method.__name__}.py", cwd=tmp_path, alone=True)
    assert done.rc == 0, done.err
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.out)]
    assert losses[-1] < 0.5 * losses[0] and done.cpu < 20
    assert re.search(r"\d\.\d", done.out.rpartition("loss")[2].partition("\n")[2]), "no chunk was printed"


def test_fidelity_tags_name_tests_that_exist(method):
    text = (ROOT / f"{method.__name__}.py").read_text(encoding="utf-8")
    tagged = re.split("PAPER!=CODE:|FAITHFUL:", text)[1:]
    assert len(tagged) >= 2 and all("Test: test_" in after[:600] for after in tagged)
    for file, test in re.findall(r"Test: (test_\w+\.py)::(\w+)", text):
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (file, test)


# ---- Network and training ---------------------------------------------------------------------------------

@torch.no_grad()
def test_every_view_and_every_word_counts(method):
    model = make(method, views=("third", "wrist") if method.PREDICTS == "actions" else ("third",))
    sample, = samples(model.cfg, 1)

    def loss(**change):
        return model.loss(batch_of(method, model, [sample | change], train=False))[0]
    for view in model.cfg.views:
        assert loss(images=sample["images"] | {view: 255 - sample["images"][view]}) != loss()
    assert loss(instruction="put the blue cube on the plate") != loss() == loss()


@torch.no_grad()
def test_attention_kinds_agree(method):
    model, eager = make(method), make(method, attn="eager")
    rows = samples(model.cfg, 3)
    a, b = (m.loss(batch_of(method, m, rows))[0] for m in (model, eager))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(act(model, rows), act(eager, rows), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or common.pick_attention("auto", "cuda") != "flash",
                    reason="needs CUDA and flash-attn")
@torch.no_grad()
def test_flash_and_sdpa_and_eager_agree_on_cuda(method):
    losses, device = {}, torch.device("cuda")
    for kind in ("flash", "sdpa", "eager"):
        model = make(method, attn=kind).to(device)
        batch = train.to_device(batch_of(method, model, samples(model.cfg, 3)), device)
        with torch.autocast("cuda", torch.bfloat16), common.Kernels() as kernels:
            losses[kind] = model.loss(batch)[0].item()
        assert kind != "sdpa" or "scaled_dot_product" in str(kernels), kernels
    assert max(losses.values()) - min(losses.values()) <= 2e-2 * losses["eager"], losses


def test_what_runs_is_told(method):
    kernels = {}
    for kind in ("sdpa", "eager"):
        model = make(method, attn=kind)
        with torch.no_grad(), common.Kernels() as kernels[kind]:
            model.loss(batch_of(method, model, samples(model.cfg, 2)))
    assert "scaled_dot_product_flash_attention_for_cpu" in str(kernels["sdpa"])
    frozen = method.__name__ == "a0"                           # its encoders take SDPA in any case
    assert str(kernels["eager"]) == "matrix products" or frozen


def test_what_is_given_to_the_optimizer_is_what_gets_a_gradient(method):
    model = make(method).train()
    model.loss(batch_of(method, model, samples(model.cfg, 3)))[0].backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    groups = model.param_groups(1e-3, 0.5)
    assert sum(len(g["params"]) for g in groups) == len(trained) and groups[0]["lr"] == 1e-3


def backward(method, model, kept, **precision):
    """Log and gradients of three samples; what is kept for the backward pass goes to the list `kept`."""
    with (torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
          torch.autocast("cpu", torch.bfloat16, **precision)):
        loss, log = model.loss(batch_of(method, model, samples(model.cfg, 3)))
    loss.backward()
    return log | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["vla0", "robobrain_x0"])
def test_acting_reads_bf16_blocks_beside_a_float32_embedding(name):
    """So FSDP hands them out under --shard --dtype bf16, when a validation acts."""
    method = importlib.import_module(name)
    model = make(method)
    model.model.layers.to(torch.bfloat16)
    reader, (B, K) = method.Reader(model.cfg, model.model, alias=False), (2, 3)
    slots = torch.arange(K).expand(B, K)
    with torch.no_grad():
        out = reader(torch.ones(B, K, model.cfg.llm_width), slots.expand(3, B, K), slots, reader.new_cache(B, 8))
    assert out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize("name, grids, calls", [
    ("vla0", [[8, 8]] * 3, 2), ("vla0", [[6, 10], [4, 4], [6, 10]], 5), ("robobrain_x0", [[8, 8]] * 3, 4),
    ("robobrain_x0", [[6, 10], [4, 4], [6, 10]], 8)], ids=str)
@torch.no_grad()
def test_the_tower_attends_once_per_size_of_window_as_transformers_does_once_per_window(name, grids, calls):
    model, seen = make(importlib.import_module(name)), []
    grid, cfg = torch.tensor([[1, *sides] for sides in grids]), model.cfg
    patches = torch.randn(int(grid.prod(1).sum()), 3 * cfg.temporal_patch_size * cfg.patch_size ** 2)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append("scaled_dot_product" in str(func))
            return func(*args, **(kwargs or {}))
    with Count():
        found = model.look(patches, grid)
    assert torch.equal(found, model.visual(patches, grid_thw=grid).pooler_output) and sum(seen) == calls


ONE_STEP = {head: {"formulation": "one_step", "head": head} for head in ("mlp", "discrete")}


@pytest.mark.parametrize("name, changes, bf16, kind", [
    *(pytest.param(name, changes, bf16, None, marks=[pytest.mark.long] * bf16)
      for bf16 in (False, True) for name, changes in (
          ("a0", {}), ("robovlms", ONE_STEP["mlp"]), ("robovlms", ONE_STEP["discrete"]), ("vla0", {}),
          ("robobrain_x0", {}))),
    ("a0", {}, False, "selective"), ("vla0", {}, False, "full")], ids=str)
def test_large_tensors_are_computed_again_and_no_number_changes(monkeypatch, name, changes, bf16, kind):
    """common.lean to the bit, common.word_loss up to the order of a sum; no whole logits are kept."""
    method, seen = importlib.import_module(name), {}
    for large in (2**26, 2**14):                               # a piece: 32 words of 512
        monkeypatch.setattr(common, "LARGE", large)
        model, kept = make(method, **changes).train(), []
        train.wrap(model, SimpleNamespace(checkpointing=kind, compile=False, shard=False),
                   torch.device("cpu"), torch.float32, 1)
        seen[large] = backward(method, model, kept, enabled=bf16)
        seen[large, "kept"] = {x.untyped_storage().data_ptr(): x for x in kept}
    a, b = (seen[large] for large in (2**26, 2**14))
    assert a.keys() == b.keys() and len(a) > 10
    words = name != "a0" and changes is not ONE_STEP["mlp"]
    assert words or all(torch.equal(b[key], x) for key, x in a.items())
    all_a, all_b = (torch.cat([x.detach().flatten() for x in of.values()]) for of in (a, b))
    bound = 2e-2 if bf16 else 1e-6
    assert (all_b - all_a).norm() <= bound * all_a.norm() and abs(a["loss"] - b["loss"]) <= bound * a["loss"]
    size = {n: sum(x.untyped_storage().nbytes() for x in seen[n, "kept"].values()) for n in (2**26, 2**14)}
    assert size[2**14] < size[2**26] or kind == "selective"      # that has computed them again before
    if words:
        vocab = model.cfg.vocab
        logits = [x for x in seen[2**14, "kept"].values() if x.ndim == 2 and x.shape[1] == vocab]
        assert not logits and any(x.shape[-1:] == (vocab,) for x in seen[2**26, "kept"].values())


def test_key_fixes_every_draw_of_a_sample_and_without_training_none_is_made(method):
    changes, drawn = AUGMENTED.get(method.__name__, ({}, set()))
    cfg = dataclasses.replace(method.PRESETS["tiny"], **SMALL.get(method.__name__, {}) | changes)
    (sample, ), tokenizer = samples(cfg, 1), method.load_tokenizer(cfg)

    def seen(**how):
        return {n: x for n, x in method.prepare(sample, cfg, tokenizer, STATS, **how).items() if n != "key"}

    def differ(a, *others):
        return {n for n in a for b in others if not torch.equal(a[n], b[n])}
    one, others = seen(key=1, train=True), [seen(key=k, train=True) for k in range(2, 12)]
    assert differ(one, seen(key=1, train=True)) == set() == differ(seen(), seen(key=1), seen(key=2))
    assert differ(one, *others) >= drawn                       # (some augment only some of the samples)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft: pip install peft")
def test_adapters_count_when_acting(method):
    model, merged = make(method), make(method)
    rows = samples(model.cfg, 2)
    before = act(model, rows)
    try:
        train.add_lora(model, 4)
    except ValueError:                                         # it holds no model of transformers
        return
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
    merged.load_state_dict(train.merge_lora(model.state_dict()))
    np.testing.assert_allclose(act(model, rows), act(merged, rows), rtol=1e-3, atol=1e-4)
    assert not np.allclose(act(model, rows), before, atol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft: pip install peft")
def test_frozen_weights_in_bf16_train_as_autocast_has_them(method):
    """To the bit, in less memory; act(), without autocast, takes them for what they are."""
    found, changes = {}, ONE_STEP["mlp"] if method.__name__ == "robovlms" else {}
    for low in (False, True):
        model = make(method, **changes).train()
        try:
            train.add_lora(model, 4, low)
        except ValueError:                                     # it holds no model of transformers
            return
        torch.manual_seed(5)
        for name, p in model.named_parameters():
            p.requires_grad and "lora_B" in name and torch.nn.init.normal_(p, std=0.1)
        needed = train.memory_needed(model, SimpleNamespace(shard=False), SimpleNamespace(ema=0), 1)
        found[low] = backward(method, model, [], enabled=True), needed, model
    (a, full, _), (b, less, model) = found[False], found[True]
    frozen = [p for p in model.parameters() if p.dtype == torch.bfloat16]
    assert frozen and not any(p.requires_grad for p in frozen)
    assert {x.dtype for x in b.values()} == {torch.float32}
    assert full.pop("weights") - less.pop("weights") == sum(p.nbytes for p in frozen) and full == less
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    merged, rows, state = make(method, **changes), samples(model.cfg, 2), train.merge_lora(model.state_dict())
    assert state.keys() == merged.state_dict().keys() and {x.dtype for x in state.values()} == {torch.float32}
    merged.load_state_dict(state)
    np.testing.assert_allclose(act(model.eval(), rows), act(merged, rows), rtol=1e-3, atol=1e-4)


# ---- Acting -----------------------------------------------------------------------------------------------

def test_act_on_batch_equals_act_one_by_one(method):
    model = make(method)
    rows = samples(model.cfg, 3)
    assert len({tuple(batch_of(method, model, [o])["ids"].shape) for o in rows}) > 1
    alone = np.concatenate([act(model, [o], i) for i, o in enumerate(rows)])
    np.testing.assert_allclose(act(model, rows), alone, rtol=1e-3, atol=1e-4)


def test_policy_plays_execute_steps_per_chunk_and_asks_for_the_next(method):
    if method.PREDICTS != "actions":                           # what becomes of points is in its own tests
        return
    model = make(method)
    o, chunk = samples(model.cfg, 1)[0], np.arange(4.0 * model.cfg.action_dim).reshape(4, -1)
    chunk[:, -1] = 1                                           # the gripper: open
    policy, later = method.Policy(model, execute=3), chunk + [*[1] * (chunk.shape[1] - 1), 0]
    for row in (0, 1, 2):
        assert policy.needs_chunk == (row == 0)
        assert np.array_equal(policy.step(o, chunk if policy.needs_chunk else None), chunk[row])
    assert policy.needs_chunk
    policy.step(o, chunk)
    assert not policy.needs_chunk
    other = o | {"instruction": "b"}                           # a new task starts anew
    assert np.array_equal(policy.step(other, later), later[0])
    policy.reset()
    assert policy.needs_chunk
    torch.manual_seed(3)
    want = model.act([policy.ask(o)])[0][0, 0]
    torch.manual_seed(3)
    np.testing.assert_allclose(policy.step(o)[:-1], want[:-1], atol=1e-6)                # it asks its model


# ---- Checkpoints ------------------------------------------------------------------------------------------

def test_saved_folder_loads_to_the_same_actions(method, tmp_path):
    model, folder = make(method), tmp_path / "ck"
    model.preset, model.origin = "tiny", {"started from": "nothing", "license": "MIT"}
    rows = samples(model.cfg, 2)
    want = act(model, rows)                                    # vla0's weights are views of fused ones now
    model.save_pretrained(folder, card={"success": "80 %"})
    again = method.from_pretrained(folder)
    assert again.cfg == model.cfg and again.stats == STATS and not again.fresh
    assert (again.preset, again.origin) == ("tiny", model.origin)
    np.testing.assert_allclose(act(again, rows), want, rtol=1e-4, atol=1e-4)
    assert not np.allclose(want[0], want[1], rtol=1e-2)
    card = (folder / "README.md").read_text()
    assert "license: MIT" in card and "success: 80 %" in card
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert abs((folder / "model.safetensors").stat().st_size - size) < 30_000              # nothing twice
    again.save_pretrained(folder)                              # over itself, while its weights are mapped
    third, half = method.from_pretrained(folder, execute=1), method.from_pretrained(folder, dtype="bf16")
    assert third.cfg.execute == 1
    assert torch.bfloat16 in {p.dtype for p in half.parameters()} or half.cfg.compute == "bf16"
    with pytest.raises(ValueError, match="='int8'"):
        method.from_pretrained(folder, dtype="int8")
    assert all(torch.equal(a, b) for a, b in zip(third.state_dict().values(), model.state_dict().values()))
    assert [p.requires_grad for p in third.parameters()] == [p.requires_grad for p in model.parameters()]


# what is done to a checkpoint, and what the message must say (of tensors: the first vector's name)
WEIGHTS = {"truncated": (lambda data: data[:len(data) // 2], "torn"), "empty": (lambda data: b"", "torn"),
           "missing": (None, "no weights file")}
CONFIG = {"torn": (lambda text: text[:40], "cannot read"), "another's": ({"method": "other"}, "'other'"),
          "newer": ({"version": 99}, "version 99"), "no version": ({"version": "one"}, "version")}
FIELDS = {"horison": ("3", "did you mean 'horizon'"), "views": ("None", "views"), "batch": ("'big'", "batch"),
          "betas": ("[0.9]", "betas"), "execute": ("0", "execute")}
TENSORS = {"one missing": lambda s, name: s.pop(name), "longer": lambda s, n: s.update({n: s[n].repeat(2)}),
           "of integers": lambda s, n: s.update({n: s[n].char()}),
           "all but one missing": lambda s, name: [s.pop(n) for n in [*s] if n != name]}


@pytest.mark.parametrize("kind, how", [*(("weights", n) for n in WEIGHTS), *(("config", n) for n in CONFIG),
                                       *(("field", n) for n in FIELDS), *(("tensor", n) for n in TENSORS)])
def test_bad_checkpoint_is_one_clear_line(method, tmp_path, kind, how):
    make(method).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    saved = json.loads(config.read_text())
    if kind == "tensor":
        state = load_file(weights)
        name = next(n for n, t in state.items() if t.ndim == 1)
        TENSORS[how](state, name)
        save_file(state, weights)
        words = f"missing, e.g. (?!{name})" if "all" in how else name
    elif kind == "weights":
        change, words = WEIGHTS[how]
        weights.write_bytes(change(weights.read_bytes())) if change else weights.unlink()
    elif kind == "config":
        change, words = CONFIG[how]
        config.write_text(change(config.read_text()) if callable(change) else json.dumps(saved | change))
    else:
        value, words = FIELDS[how]
        config.write_text(json.dumps(saved | {"config": saved["config"] | {how: ast.literal_eval(value)}}))
    with pytest.raises(ValueError, match=words) as caught:
        method.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where, words", [
    ("nowhere/to/be/found", "no such file"), ("nobody/nothing", "offline"),
    (".", "config.json|is there|no weights")])
def test_path_that_leads_nowhere(method, tmp_path, monkeypatch, where, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        method.from_pretrained(where)


# ---- What a user can get wrong ----------------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    ({"instruction": "  "}, "say in words"), ({"instruction": None}, "say in words"),
    ({"images": {}}, "images: a dict"), ({"images": np.zeros((8, 8, 3), np.uint8)}, "images: a dict"),
    ({"images": {"third": np.zeros((8, 8, 3), np.float32)}}, r"found float32 \(8, 8, 3\)"),
    ({"images": {"third": np.zeros((3, 8, 8), np.uint8)}}, r"found uint8 \(3, 8, 8\)"),
    ({"images": {"third": np.zeros((8, 8), np.uint8)}}, r"found uint8 \(8, 8\)"),
    ({"images": {"third": "picture.png"}}, "found str"), ({"state": np.zeros(7)}, "8 numbers are expected"),
    ({"images": dict.fromkeys(("left", "right"), np.zeros((8, 8, 3), np.uint8))}, "looks at")])
def test_wrong_observation_is_one_clear_line(method, change, words):
    reads_state = hasattr(method.Config, "state_dim")
    model = make(method, **{"state_dim": 8} if reads_state else {})
    if reads_state or "state" not in change:
        with pytest.raises(ValueError, match=words) as caught:
            model.act([samples(model.cfg, 1)[0] | change])
        assert "\n" not in str(caught.value)


def test_unknown_unnorm_key_names_the_known_ones(method):
    if method.PREDICTS != "actions":                           # points in a picture have no robot's units
        return
    model = make(method)
    model.stats = {**STATS, "other": STATS["toy"]}
    for key, words in (("nobody", "unnorm_key='nobody'.*'other', 'toy'"), (None, "no unnorm_key was given")):
        with pytest.raises(ValueError, match=words):
            model.act(samples(model.cfg, 1), key)
    model.stats = {}
    with pytest.raises(ValueError, match="no dataset statistics"):
        model.act(samples(model.cfg, 1))


WRONG = {
    "execute=999": lambda m: m.Config(execute=999), r"views=\(\)": lambda m: m.Config(views=()),
    "lr=-1": lambda m: m.Config(lr=-1), "steps=0": lambda m: m.Config(steps=0),
    "ema=1.0": lambda m: m.Config(ema=1.0), "'linear'": lambda m: m.Config(lr_schedule="linear"),
    "did you mean 'horizon'": lambda m: m.configure(m.Config(), horison=8),
    "execute=99": lambda m: m.Policy(make(m), execute=99),
    "at least one observation": lambda m: make(m).act([])}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_argument_is_one_clear_line(method, words):
    with pytest.raises(ValueError, match=words) as caught:
        WRONG[words](method)
    assert "\n" not in str(caught.value)


# ---- acting with CUDA graphs, and with matrices of 8 bits -------------------------------------------------

class Tape(TorchDispatchMode):
    """A CUDA graph without CUDA: what is computed is written down, undone, and computed again at every replay, in
    the memory where it was. What the host computes stays as it was then; numbers computed here it must not read."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert not reads or all(args[0] is not x for call in self.calls for x in tree_leaves(call[-1])), func
        changed = [x for a, x in zip(func._schema.arguments, args) if a.alias_info and a.alias_info.is_write]
        self.before += [(x, x.clone()) for x in changed]
        self.calls.append((func, args, kwargs or {}, func(*args, **kwargs or {})))
        return self.calls[-1][-1]

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():      # no view, not in place
                    old.copy_(new)

    @classmethod
    def capture(cls, work, first=None):
        with cls() as tape:
            out = work()
        for x, value in reversed(tape.before):
            x.copy_(value)
        return tape, out


def replays(graphs):
    """What was captured: replay functions."""
    return [kept[0].replay for _, made in graphs.kept.values() for kept in made.values() if kept]


def test_acting_with_graphs_is_the_same_to_the_bit(method):
    """Pictures, noise, prompts of several lengths: all come in; several in turn, each in memory of its own."""
    model = make(method, **{"vla0": {"horizon": 1, "execute": 1}}.get(method.__name__, {}))
    seen = samples(model.cfg, 2)
    plain, two = [[act(model, [o], first) for o in seen] for first in range(3)], act(model, seen)
    model.graphs = common.Graphs(Tape.capture)
    for first, expected in enumerate(plain):
        for i, chunk in enumerate(expected):
            np.testing.assert_array_equal(act(model, [seen[i]], first), chunk)
    assert len(replays(model.graphs)) >= len({len(s["instruction"].split()) for s in seen}) > 1
    for _ in range(3):
        np.testing.assert_array_equal(act(model, seen), two)


@pytest.mark.parametrize("name", ["cogact", "vla0", "robovlms", "robobrain_x0"])
def test_a_session_with_graphs_is_the_same_to_the_bit(name):
    """With all that a session remembers: drafts, features of earlier frames."""
    method, played = importlib.import_module(name), {}
    model = make(method, **{"robovlms": {"history": 3}}.get(name, {}))
    for graphs in (common.Graphs(), common.Graphs(Tape.capture)):
        model.graphs, policy = graphs, method.Policy(model, "toy", execute=1)
        torch.manual_seed(0)
        policy.reset()
        played[graphs] = [policy.step({**o, "instruction": "lift the ball"}) for o in samples(model.cfg, 4)]
    np.testing.assert_array_equal(*played.values())
    assert replays(model.graphs)


def test_graphs_forget_the_shapes_unused_for_longest():
    graphs, x = common.Graphs(Tape.capture, most=2), torch.ones(4)
    for n in (1, 2, 2, 1, 3, 1):
        assert torch.equal(graphs(torch.neg, x[:n]), -x[:n])
    assert [shape for (*_, (shape, _)) in graphs.kept] == [(3,), (1,)] and len(replays(graphs)) == 1
    with pytest.raises(AssertionError, match="_local_scalar_dense"):       # a number read back: no graph holds it
        for _ in range(2):
            graphs(lambda x: x * x.sum().item(), x)


def test_graphs_are_of_a_thread_and_only_of_what_has_run():
    calls, graphs = [], common.Graphs(lambda work, first: calls.append("capture") or Tape.capture(work))

    def work(x):
        calls.append("run")
        if len(calls) == 1:
            raise MemoryError
        return x + 1
    with pytest.raises(MemoryError):
        graphs(work, torch.ones(1))
    graphs(work, torch.ones(1))
    other = threading.Thread(target=lambda: graphs(work, torch.ones(1)))
    other.start(), other.join()
    assert calls == ["run"] * 3                                # CUDA's libraries are not ready before that


def test_what_is_evicted_goes_at_once():
    graphs = common.Graphs(Tape.capture, most=1)
    for n in (1, 1, 2, 2):                                     # (the first graph's memory all others share: it stays)
        graphs(torch.neg, torch.ones(n))
    second = weakref.ref(next(iter(graphs.kept.values()))[1][""][0])
    gc.collect(), gc.disable()
    graphs(torch.neg, torch.ones(3))
    gc.enable()
    assert second() is None


def test_a_capture_is_on_its_own_device_and_tells_why_it_failed(monkeypatch):
    asked = []

    @contextlib.contextmanager
    def graph(*args, **how):
        asked.append(args)
        try:
            yield
        except RuntimeError:                                   # so torch 2.13 leaves a capture that failed
            raise RuntimeError("operation failed due to a previous error") from None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: "pool"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    first, out = common.captured(lambda: 5, stream="of cuda:1")
    assert out == 5 and common.captured(lambda: 6, first, "of cuda:1")[1] == 6
    assert [args[1:] for args in asked] == [(None, "of cuda:1"), ("pool", "of cuda:1")]

    def work():
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
    with pytest.raises(ValueError, match="not permitted when stream is capturing.; leave --graphs out") as e:
        common.captured(work)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["vla0", "robobrain_x0"])
def test_graphs_with_matrices_of_8_bits_see_new_weights(name):
    method = importlib.import_module(name)
    model, key = make(method, int8=True), {"vla0": "texts", "robobrain_x0": "ids"}[name]
    seen, graphs = samples(model.cfg, 1), common.Graphs(Tape.capture)
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), []
    for _ in range(2):
        model.graphs = graphs
        found.append([model.act(seen)[1][key] for _ in range(2)])
        model.graphs, model.reader = common.Graphs(), None
        assert found[-1] == [model.act(seen)[1][key]] * 2
        model.loss(batch_of(method, model, samples(model.cfg, 2)))[0].backward()
        optimizer.step()
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["vla0", "robobrain_x0"])
def test_matrices_of_8_bits_read_nearly_the_same(name, tmp_path):
    method = importlib.import_module(name)
    model, (B, K) = make(method), (2, 3)
    slots, x = torch.arange(40).expand(B, 40), torch.randn(B, 40, model.cfg.llm_width)
    found = {}
    with torch.no_grad():
        for int8 in (False, True, False):
            with model.reading(int8) as reader:
                cache = reader.new_cache(B, 40)
                found[int8] = [reader(x[:, :n], slots[:, :n].expand(3, B, n), slots[:, :n], cache) for n in (40, K)]
                assert not int8 or reader.small[0][1][0].dtype == torch.int8
    (prompt, few), (prompt8, few8) = found[False], found[True]
    assert torch.equal(prompt, prompt8) and 0 < (few8 - few).norm() < 0.05 * few.norm()
    w = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad(), model.reading(True) as reader:
        w.mul_(2)
    with model.reading(True) as reader:
        q, scale = reader.small[0][-1]
        assert (q * scale.float()[:, None] - w).abs().max() <= 0.51 * scale.max() + 0.004 * w.abs().max()
    odd = make(method, int8=True, llm_mlp=36)                  # a kernel would read beyond such rows: they stay
    assert odd.act(samples(odd.cfg, 1))[1]["tokens"] > 0 and odd.reader.small[0][-1].shape[1] == 36
    model.save_pretrained(tmp_path / "ckpt")
    flags = SimpleNamespace(preset=None, tokenizer=None, attn="auto", device="cpu", graphs=None, int8=True)
    again = eval_sim.load_model(flags, method, tmp_path / "ckpt")                      # --int8
    chunk, info = again.act(samples(model.cfg, 2))
    assert chunk.shape == (2, model.cfg.horizon, 7) and not info["parse_failed"].any() and again.reader.few
