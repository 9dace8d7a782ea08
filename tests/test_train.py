"""train.py. Every run is a process of its own (tests/forks.py), on synthetic samples and 155,000 weights."""
import dataclasses
import importlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import cogact
import common
import forks
import numpy as np
import pytest
import torch
import train
from common import METHODS
from safetensors.torch import load_file, save_file
from test_methods import batch_of, make, samples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

TOY = '''
import numpy as np

class Toy:
    def __init__(self, n, horizon):
        self.n, self.horizon = n, horizon
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        actions = rng.uniform(-0.05, 0.05, (self.horizon, 7)).astype(np.float32)
        actions[:, 6] = i % 2
        return {"images": {"third": rng.integers(0, 256, (16, 16, 3), np.uint8)},
                "instruction": "pick up the red cube" + " now" * (i % 3), "state": np.zeros(8, np.float32),
                "actions": actions, "loss_mask": np.arange(self.horizon) < 1 + i % self.horizon,
                "dataset": "toy"}

def make(split="train", horizon=8):
    return Toy(40 if split == "train" else 10, horizon)
'''
SMALL = ("dino_width=32 dino_heads=2 dino_mlp=32 dino_depth=2 siglip_width=32 siglip_heads=2 siglip_mlp=32 "
         "siglip_depth=2 llm_width=32 llm_mlp=32 llm_depth=2 llm_heads=2 width=32 depth=2 heads=2 "
         "image_size=16 patch_size=8 repeated_diffusion_steps=2 horizon=4 execute=2 warmup=2 lr=0.01 head_lr=0")
BASE = ("train.py --model cogact --data toy.py:make --init none --batch 8 --val-every 0 --steps 8 "
        "--save-every 2 --log-every 1")


@pytest.fixture
def run(tmp_path):
    """run("--out a", "lr=1", world=2): a training run in tmp_path with these flags and --set values."""
    (tmp_path / "toy.py").write_text(TOY)

    def call(flags, *values, rc=0, **how):
        done = forks.shared()(f"{BASE} {flags} --set {SMALL}", *values, cwd=tmp_path, **how)
        assert rc is None or done.rc == rc, done.err
        return done
    return call


def state(folder, kind):
    """{name: tensor} of one kind ("exp_avg", "weights") in the training state of a checkpoint."""
    return {name.partition("/")[2]: t for name, t in forks.training_state(folder).items()
            if name.startswith(kind + "/")}


def same(a, b):
    """Are all tensors of two checkpoints bit-identical?"""
    for x, y in zip(*((load_file(c / "model.safetensors"), forks.training_state(c)) for c in (a, b))):
        if x.keys() != y.keys() or not all(torch.equal(x[k], y[k]) for k in x):
            return False
    return True


def losses(folder):
    """The training loss of every logged step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


class CountOps(TorchDispatchMode):
    """Counts how often one operation is dispatched."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted, self.seen = wanted, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func is self.wanted
        return func(*args, **(kwargs or {}))


def relative(a, b):
    """Largest relative difference over the tensors, and over all of them as one vector."""
    assert a.keys() == b.keys() and a
    one = max(((a[k] - b[k]).norm() / a[k].norm()).item() for k in a if a[k].norm() > 0)
    return max(one, ((torch.cat([(a[k] - b[k]).flatten() for k in a])).norm()
                     / torch.cat([a[k].flatten() for k in a]).norm()).item())


# ---- the same gradients, however the batch is split -------------------------------------------------------

@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A model that has had some steps (a fresh head is zero and hides what is behind it), and its gradients.

    After one step Adam's exp_avg is (1 - beta1) times the clipped gradient.
    """
    folder = tmp_path_factory.mktemp("reference")
    (folder / "toy.py").write_text(TOY)
    for flags in ("--out before --steps 4", "--out one --steps 1 --init before/last"):
        assert forks.shared()(f"{BASE} {flags} --set {SMALL}", cwd=folder).rc == 0
    gradients = state(folder / "one" / "last", "exp_avg")
    assert all(t.norm() > 0 for t in gradients.values()), "a gradient is zero: nothing is compared there"
    return folder / "before" / "last", gradients


@pytest.mark.parametrize("flags, world, bound", [
    ("--batch 4", 2, 1e-5), ("--batch 4 --shard", 2, 1e-5), ("--batch 2 --global-batch 8", 1, 1e-5),
    ("--checkpointing", 1, 1e-5), ("--checkpointing selective", 1, 1e-5),
    ("--attn eager", 1, 1e-5), ("--workers 2", 1, 1e-5),
    pytest.param("--shard", 1, 1e-5, marks=pytest.mark.slow),
    pytest.param("--batch 2 --global-batch 8", 2, 1e-5, marks=pytest.mark.slow),
    pytest.param("--batch 2 --global-batch 8 --shard", 2, 1e-5, marks=pytest.mark.slow),
    pytest.param("--batch 4 --shard --checkpointing", 2, 1e-5, marks=pytest.mark.slow),
    pytest.param("--compile --checkpointing", 1, 1e-4, marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_how_the_batch_is_split(run, tmp_path, reference, flags, world, bound):
    before, gradients = reference
    run(f"--out other --steps 1 --init {before} {flags}", world=world)
    assert relative(gradients, state(tmp_path / "other" / "last", "exp_avg")) <= bound


@pytest.mark.slow
def test_bf16_stays_close_and_its_master_weights_are_fp32(run, tmp_path):
    low = "--dtype bf16"
    for name, flags, world in (("one", "", 1), ("low", low, 1), ("sharded", f"{low} --shard --batch 4", 2)):
        run(f"--out {name} --steps 3 --val-every 3 --val-samples 8 {flags}", world=world)
    last = [losses(tmp_path / name)[-1] for name in ("one", "low", "sharded")]
    assert max(last) - min(last) < 0.05
    weights = load_file(tmp_path / "sharded" / "last" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert any((t != t.bfloat16()).any() for t in weights.values())


# ---- killed, stopped, resumed -----------------------------------------------------------------------------

def resume_is_bit_identical(run, tmp_path, flags, **how):
    """Kill a run as `how` says, resume it, compare it with the whole one; False if it ended before."""
    out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
    done = run(f"--out {out.name} {flags}", rc=None, **how)
    assert done.rc in (0, -9), done.err
    run(f"--out {out.name} {flags}" + " --resume" * out.exists())  # killed early: nothing to resume
    assert same(out / "last", tmp_path / "whole" / "last")
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (out, tmp_path / "whole")]
    steps, expected = ([json.loads(line)["step"] for line in log] for log in logs)
    assert steps == expected
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    return done.rc == -9


@pytest.mark.slow
def test_resume_after_kill_at_random_moments_is_bit_identical(run, tmp_path):
    flags, rng = "--ema 0.9 --val-every 3 --val-samples 4", random.Random()      # other moments each time
    seconds = run(f"--out whole {flags}").seconds
    moments = [{"kill_after": rng.uniform(0.3, 0.9) * seconds} for _ in range(3)]
    moments += [{"kill_at": k} for k in rng.sample(range(20, 90), 2)]            # in the middle of a save
    assert any([resume_is_bit_identical(run, tmp_path, flags, **moment) for moment in moments])


@pytest.mark.slow
def test_resume_after_kill_before_any_file_operation_is_bit_identical(run, tmp_path):
    # Every eighth one, beginning anywhere; all of them (STRIDE=1) take two minutes.
    flags, stride = "--ema 0.9 --steps 2 --save-every 1 --keep 1", int(os.environ.get("STRIDE", "8"))
    k = random.Random().randint(1, stride)
    run(f"--out whole {flags}")
    while resume_is_bit_identical(run, tmp_path, flags, kill_at=k):
        k += stride
    assert k > 40, "the run ended after fewer operations than its two saves need"


@pytest.mark.parametrize("world, flags", [
    (1, ""), pytest.param(2, "--batch 4 --shard --ema 0.9 --val-every 2 --steps 5", marks=pytest.mark.slow)])
def test_sigterm_saves_and_leaves_and_resume_is_bit_identical(run, tmp_path, world, flags):
    run(f"--out whole {flags}", world=world)
    done = run(f"--out cut --save-every 0 {flags}", world=world, term_at="step 2/")
    assert "stopped by SIGTERM after step" in done.out and "--resume" in done.out
    last = (tmp_path / "whole" / "last").resolve().name
    assert not (tmp_path / "cut" / last).exists() and (tmp_path / "cut" / "last").exists()
    remembers_its_flags = "train.py --model cogact --out cut --resume"
    assert forks.shared()(remembers_its_flags, cwd=tmp_path, world=world).rc == 0
    assert same(tmp_path / "cut" / "last", tmp_path / "whole" / "last")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(run, tmp_path):
    run("--out whole --steps 5")
    run("--out moved --steps 5 --batch 4 --shard", world=2, term_at="step 2/5")
    done = run("--out moved --batch 8 --resume --steps 5")
    assert "resuming" in done.out
    whole, moved = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert len(whole) == len(moved) == 5 and all(abs(a - b) < 1e-3 for a, b in zip(whole, moved))


def test_resume_of_a_run_whose_replacement_was_killed_early_mixes_no_two_runs(run, tmp_path):
    run("--out a --steps 2")
    for path in list((tmp_path / "a").iterdir()):              # killed before it wrote its own run.json
        (tmp_path / "a" / ".replaced").mkdir(exist_ok=True)
        path.rename(tmp_path / "a" / ".replaced" / path.name)
    assert "now it is back" in run("--out a --steps 4 --resume", rc=2).err
    assert "resuming a/step-000002" in run("--out a --steps 4 --resume").out
    assert len(losses(tmp_path / "a")) == 4 and not (tmp_path / "a" / ".replaced").exists()
    assert "give one of the two" in run("--out a --resume --overwrite", rc=2).err


def test_old_checkpoints_are_pruned_and_last_points_to_the_newest(run, tmp_path):
    run("--out a --keep 3 --save-every 1")
    kept = sorted(p.name for p in (tmp_path / "a").glob("step-*"))
    assert kept == ["step-000006", "step-000007", "step-000008"]
    assert (tmp_path / "a" / "last").resolve().name == "step-000008"


# ---- what is trained, and from where ----------------------------------------------------------------------

def test_checkpoint_holds_the_average_and_the_state_holds_the_weights(run, tmp_path):
    run("--out a --ema 0.8 --save-every 1 --keep 0")
    run("--out zero --ema 0.8 --steps 1", "lr=0")                  # the weights of step 0
    average = load_file(tmp_path / "zero" / "last" / "model.safetensors")
    for step in range(1, 9):
        raw = state(tmp_path / "a" / f"step-{step:06d}", "weights")
        decay = min(0.8, (1 + step) / (10 + step))
        average = {name: t.lerp(raw[name], 1 - decay) if name in raw else t for name, t in average.items()}
    saved = load_file(tmp_path / "a" / "last" / "model.safetensors")
    assert relative(average, saved) < 1e-6
    assert relative(saved | raw, saved) > 1e-4                     # and it is not the newest weights


def test_init_from_part_of_a_model_lists_what_stayed_fresh(run, tmp_path):
    run("--out a --steps 2")
    whole = load_file(tmp_path / "a" / "last" / "model.safetensors")
    trunk = {k: t.half() for k, t in whole.items() if "action_model." not in k and "lm_head" not in k}
    save_file(trunk, tmp_path / "trunk.safetensors")
    done = run("--out b --steps 1 --init trunk.safetensors", "lr=0")
    assert "fresh: llm_backbone.llm.lm_head.weight, action_model" in done.out
    started = load_file(tmp_path / "b" / "last" / "model.safetensors")
    assert all(torch.equal(started[k], t.float()) for k, t in trunk.items())


def test_lora_weights_are_merged_under_their_official_names():
    a, b, w = torch.randn(2, 5), torch.randn(3, 2), torch.randn(3, 5)
    merged = train.merge_lora({"x.q.base_layer.weight": w, "x.q.lora_A.default.weight": a, "y": a,
                               "x.q.lora_B.default.weight": b, "x.q.base_layer.bias": w[:, 0]})
    assert merged.keys() == {"x.q.weight", "x.q.bias", "y"}
    assert torch.allclose(merged["x.q.weight"], w + 2 * b @ a)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft: pip install peft")
@pytest.mark.parametrize("flags", [
    "", "--dtype bf16", pytest.param("--dtype bf16 --shard", marks=pytest.mark.slow)])
def test_lora_trains_adapters_resumes_and_saves_a_plain_checkpoint(run, tmp_path, flags):
    run(f"--out whole --lora 2 {flags}")
    run(f"--out cut --lora 2 {flags}", term_at="step 3/8")
    run("--out cut --lora 2 --resume")
    assert same(tmp_path / "whole" / "last", tmp_path / "cut" / "last")
    kinds = ("bf16", "fp32") if flags else ("fp32", "bf16")
    done = run(f"--out cut --lora 2 --resume --steps 9 --dtype {kinds[1]}", rc=2)      # frozen in the other
    assert "dtype: '{}' there, '{}' now".format(*kinds) in done.err
    names = state(tmp_path / "cut" / "last", "weights")
    assert any("lora_A" in n for n in names) and not any("q_proj.base_layer" in n for n in names)
    model = cogact.from_pretrained(tmp_path / "cut" / "last")
    trained, fresh = (load_file(tmp_path / n / "last" / "model.safetensors") for n in ("cut", "whole"))
    assert model.state_dict().keys() == trained.keys() == fresh.keys()


def test_lora_goes_on_in_the_type_that_its_frozen_weights_were_rounded_to(tmp_path):
    args, cfg = SimpleNamespace(model="cogact", data="", global_batch=8, official_mean=False), cogact.Config()
    common.write_json(tmp_path / "config.json", {"method": "cogact", "config": dataclasses.asdict(cfg)})
    common.write_json(tmp_path / "training_state" / "run.json", {"dtype": "bf16", "args": {}})
    for args.lora, dtype in ((2, "bf16"), (0, "fp32")):
        train.check_same_run(tmp_path, args, cfg, dtype)
    args.lora = 2
    with pytest.raises(ValueError, match="another one .dtype: 'bf16' there, 'fp32' now"):
        train.check_same_run(tmp_path, args, cfg, "fp32")


def test_set_takes_the_type_of_the_field():
    def value(text, old):
        return train.value_like("--set", text, old)
    assert value("1e4", 7) == 10000 and isinstance(value("1e4", 7), int)
    assert value("3", 0.5) == 3.0 and isinstance(value("3", 0.5), float)
    assert value("false", True) is False and value("third,wrist", ("third",)) == ("third", "wrist")
    assert value("0.9,0.95", (0.9, 0.999)) == (0.9, 0.95) and value("7", "text") == "7"
    for text, old in (("x", 3), ("1.5", 3), ("1", True), ("x", 0.5)):
        with pytest.raises(ValueError, match="a value of type"):
            value(text, old)


def test_every_flag_sets_what_it_says():
    flags = ("--model cogact --steps 7 --batch 3 --ema 0.5 --seed 9 --set lr=2 views=a,b --dtype fp32 "
             "--data x.py:f")
    args, module, cfg, found = train.parse(flags.split())
    assert (cfg.steps, cfg.batch, cfg.ema, cfg.seed, cfg.lr) == (7, 3, 0.5, 9, 2.0)
    assert (cfg.views, cfg.compute, args.data) == (("a", "b"), "fp32", "x.py:f")
    assert module is cogact and found is None and args.out == Path("runs/cogact-tiny")
    assert train.parse(["--model", "cogact"])[2] == cogact.PRESETS["tiny"]


def test_schedules():
    cfg = SimpleNamespace(warmup=4, steps=104, lr_schedule="constant")
    assert [train.lr_factor(cfg, s) for s in (0, 1, 3, 4, 103)] == [0.25, 0.5, 1, 1, 1]
    cfg.lr_schedule = "cosine"
    assert train.lr_factor(cfg, 0) == 0.25 and train.lr_factor(cfg, 4) == 1
    assert abs(train.lr_factor(cfg, 54) - 0.5) < 1e-9
    assert 0 <= train.lr_factor(cfg, 103) < 1e-3
    assert train.lr_factor(SimpleNamespace(warmup=0, steps=1, lr_schedule="cosine"), 0) == 1


# ---- what is reported -------------------------------------------------------------------------------------

def test_validation_is_the_loss_and_the_error_of_act_and_changes_nothing(run, tmp_path):
    run("--out a --steps 2 --val-every 2 --val-samples 10")
    run("--out two --steps 2 --val-every 1 --val-samples 10")
    assert same(tmp_path / "a" / "last", tmp_path / "two" / "last")
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    model = cogact.from_pretrained(tmp_path / "a" / "last")
    scope = {}
    exec(TOY, scope)
    samples = [scope["make"]("val", 4)[i] for i in range(10)]
    torch.manual_seed(0)
    found, seen = torch.zeros(7), 0
    for part in (samples[:8], samples[8:]):
        chunks = torch.as_tensor(model.act(part)[0])
        for s, chunk in zip(part, chunks):
            valid = torch.from_numpy(s["loss_mask"])                               # (T,)
            found += (chunk - torch.from_numpy(s["actions"])).abs()[valid].sum(0)
            seen += valid.sum()
    assert torch.allclose(found / seen, torch.tensor(rows[-1]["val_action_error"]), atol=1e-5)
    items = [cogact.prepare(s, model.cfg, model.tokenizer, model.stats, key=i) for i, s in enumerate(samples)]
    assert abs(model.loss(cogact.collate(items, model.cfg))[0].item() - rows[-1]["val_loss"]) < 1e-5


def test_dry_run_shows_the_prompt_and_writes_nothing(run, tmp_path):
    done = run("--out a --dry-run")
    for text in ("prompt", "What action should the robot take to pick up the red cube", "finite",
                 "GiB are free", "(8, 1, 16, 16, 3)"):
        assert text in done.out, text
    assert not (tmp_path / "a").exists()


def test_dry_run_offers_against_too_little_memory_what_is_not_in_use(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sysconf", lambda name: 0)         # pages of memory that are free
    for flags, offered in (("--batch 2", "--checkpointing, a smaller --batch, a smaller preset"),
                           ("--batch 1 --checkpointing", "a smaller preset")):
        train.main(f"{BASE} --out a --dry-run {flags} --set {SMALL}".split()[1:])
        assert f"on cpu: too little; try {offered}\n" in capsys.readouterr().out


def test_checkpointing_keeps_less_and_selective_keeps_products():
    cfg = dataclasses.replace(cogact.PRESETS["tiny"], llm_depth=2, dino_depth=2, siglip_depth=2, depth=2)
    kept = {}
    for kind in (None, "selective", "full"):
        torch.manual_seed(0)
        model = cogact.Model(cfg, cogact.load_tokenizer(cfg), None)
        args = SimpleNamespace(checkpointing=kind, compile=False, shard=False)
        train.wrap(model, args, torch.device("cpu"), torch.float32, 1)
        (block, *_), seen = model.llm_backbone.llm.model.layers, []
        x = torch.randn(1, 9, cfg.llm_width, requires_grad=True)
        rotary = model.llm_backbone.llm.model.rotary_emb(x, torch.arange(9)[None])
        products = CountOps(torch.ops.aten.mm.default)
        out = block(x, position_embeddings=rotary)
        with products:
            (out[0] if isinstance(out, tuple) else out).sum().backward()
        kept[kind] = products.seen
    assert kept["full"] > kept["selective"] == kept[None]


@pytest.mark.parametrize("method", METHODS)
def test_flops_of_a_step_are_three_forward_passes_but_one_of_what_has_no_gradient(method):
    module, frozen = importlib.import_module(method), FlopCounterMode(display=False)
    model = make(module).train()
    batch = batch_of(module, model, samples(model.cfg, 2))
    model.loss(batch)                                          # A0 keeps what it has read
    with train.Flops() as flops, FlopCounterMode(display=False) as forward:
        model.loss(batch)
    if method == "a0":
        with frozen:
            model.see(batch["images"].flatten(0, 1))
        assert frozen.get_total_flops() > 0
    told = 3 * forward.get_total_flops() - 2 * frozen.get_total_flops()
    assert flops.total == pytest.approx(told, rel=1e-2)        # (transformers 5.17: rotary angles, in no_grad)


def test_nothing_of_the_training_is_left_in_memory_for_the_evaluation(tmp_path, monkeypatch):
    """Between the two, torch.set_num_threads is called."""
    alive, left, build = [], [], train.build
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: left.extend(x() for x in alive if x() is not None))

    def watched(*args):
        model = build(*args)
        alive.extend(weakref.ref(p) for p in model.parameters())
        return model
    monkeypatch.setattr(train, "build", watched)
    train.main(f"{BASE} --out a --steps 2 --ema 0.5 --set {SMALL}".split()[1:])
    assert alive and not left


def test_bench_measures_and_writes_nothing(run, tmp_path):
    for flags in ("--bench 2", "--bench 2 --synthetic"):
        done = run(f"--out a {flags}")
        row = json.loads(done.out.splitlines()[-1])
        assert row["steps"] == 2 and row["ms"] > row["data_wait_ms"] >= 0 and row["mfu"] > 0
        assert not (tmp_path / "a").exists() and "step 3/5" in done.out and "step 4/5" not in done.out
    assert row["data_wait_ms"] < 1


def test_too_little_memory_is_told_before_the_first_step():
    args, cfg = SimpleNamespace(shard=False, lora=0, resume=False), SimpleNamespace(ema=0)
    model, cuda = torch.nn.Linear(2**15, 2**18, bias=False, device="meta"), torch.device("cuda")
    needed = train.memory_needed(model, args, cfg, 8)
    assert sum(needed.values()) == 16 * 2**33
    train.check_memory(needed, 150 * 2**30, args, cfg, model, cuda)
    with pytest.raises(ValueError, match="needs 128.0 GiB .* 24.0 are free .* Try --shard over 7 processes"):
        train.check_memory(needed, 24 * 2**30, args, cfg, model, cuda)
    sharded = train.memory_needed(torch.nn.Linear(8, 8), SimpleNamespace(shard=True, lora=0), cfg, 8)
    assert sum(sharded.values()) == 16 * 72 / 8


@pytest.mark.parametrize("method, preset, flags, free, offered", [
    ("a0", "1b", {}, 16, "--shard over 2"), ("a0", "tiny", {}, 0, "--shard"),    # nothing to adapt there
    ("cogact", "base", {}, 80, "--lora 16 or --shard over 2"), ("cogact", "base", {}, 24, "--shard over 6"),
    ("cogact", "base", {"shard": True}, 20, "--lora 16 or more"), ("cogact", "base", {"lora": 16}, 80, "--shard"),
    ("cogact", "base", {"resume": True}, 80, "--shard"), ("cogact", "ema", {}, 80, "--lora 16 --ema 0 or")])
def test_what_is_offered_when_memory_is_short_would_work(method, preset, flags, free, offered):
    module, args = importlib.import_module(method), {"shard": False, "lora": 0, "resume": False} | flags
    cfg = {"ema": dataclasses.replace(cogact.Config(), ema=0.9)}.get(preset) or module.PRESETS[preset]
    with torch.device("meta"):
        model, args = module.Model(cfg), SimpleNamespace(**args)
    needed = train.memory_needed(model, args, cfg, 2)
    with pytest.raises(ValueError, match=f"Try {offered}.* processes or a smaller preset.$"):
        train.check_memory(needed, max(free, 1e-9) * 2**30, args, cfg, model, torch.device("cuda"))


def test_first_lines_say_what_runs(run):
    done = run("--out a --steps 1 --batch 2 --global-batch 8", world=2)
    for text in ("horizon=4", "parameters", "trainable", "step 1/1 | loss", "attention sdpa, device cpu",
                 "DDP", "samples per step 8 = 2 x 2 processes x 2 accumulated", "data wait"):
        assert text in done.out, text


def test_cpu_processes_share_the_presets_batch_and_resume_alone(run, tmp_path):
    run("--out a --dry-run")                                   # writes the data
    base = BASE.replace("--batch 8", "--out a") + " --steps 2 --set batch=8"
    done = forks.shared()(f"{base} {SMALL}", cwd=tmp_path, world=2)
    assert done.rc == 0 and "samples per step 8 = 4 x 2 processes x 1 accumulated" in done.out, done.err
    again = "train.py --model cogact --out a --resume --steps 3 --set batch=8"
    done = forks.shared()(f"{again} {SMALL}", cwd=tmp_path)
    assert done.rc == 0 and "samples per step 8 = 8 x 1 processes x 1 accumulated" in done.out, done.err


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_events_are_written(run, tmp_path):
    run("--out a --steps 1 --tensorboard")
    assert list((tmp_path / "a").glob("events.out.tfevents.*"))


def test_statistics_and_config_travel_with_the_checkpoint(run, tmp_path):
    run("--out a --steps 1", world=2)
    folder = tmp_path / "a" / "last"
    stats, saved = common.read_json(folder / "dataset_statistics.json"), common.load_config(folder, "cogact")
    assert stats["toy"]["action"]["mask"] == [True] * 6 + [False]
    assert saved["preset"] == "tiny" and saved["config"]["horizon"] == 4
    assert saved["config"].keys() == {f.name for f in dataclasses.fields(cogact.Config)}
    assert common.read_json(folder / "training_state" / "run.json")["step"] == 1
    observation = {"images": {"third": np.zeros((16, 16, 3), np.uint8)}, "instruction": "go"}
    assert np.isfinite(cogact.from_pretrained(folder).act([observation])[0]).all()


@pytest.mark.slow
def test_torchrun_starts_two_processes(run, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               *f"{forks.ROOT}/{BASE} --out a --steps 2 --shard --set {SMALL}".split()]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=one_thread)
    assert done.returncode == 0 and "8 x 2 processes" in done.stdout, done.stderr
