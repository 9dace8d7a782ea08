"""Command lines: what a user gets wrong is one line and exit code 2; the main job runs from end to end."""
import importlib.util
import json
import os
import random
import re
import shutil

import forks
import pytest
from safetensors.torch import load_file, save_file
from test_train import BASE, SMALL, TOY

BROKEN = {          # one thing changed in a sample of toy.py -> what the line must say
    "images": ("s['images'] = {'third': s['images']['third'].astype('float32')}", "uint8"),
    "shape": ("s['images'] = {'third': s['images']['third'][..., :2]}", "(h, w, 3)"),
    "view": ("s['images'] = {'top': s['images']['third'], 'left': s['images']['third']}", "third"),
    "instruction": ("s['instruction'] = ' '", "instruction"),
    "state": ("s['state'] = s['state'][:3]", "state"),
    "nan": ("s['actions'][0, 0] = float('nan')", "finite"),
    "actions": ("s['actions'] = s['actions'][:, :5]", "actions"),
    "key": ("del s['loss_mask']", "loss_mask"),
    "late": ("s['instruction'] = s['instruction'] if i < 39 else ''", "sample 39"),
}


@pytest.fixture
def train(tmp_path):
    """train("--flags") runs in tmp_path, beside toy.py."""
    (tmp_path / "toy.py").write_text(TOY)

    def call(flags, **how):
        command = flags if flags.startswith("train.py") else f"{BASE} --out out {flags}"
        return forks.shared()(command, cwd=tmp_path, **how)
    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "toy.py").write_text(TOY)
    assert forks.shared()(f"{BASE} --out out --steps 2 --set {SMALL}", cwd=folder).rc == 0
    return folder / "out"


def refused(done, *words):
    """Exit code 2, one line on stderr after the progress bars, and it says these words."""
    lines = [line for line in re.split(r"[\r\n]+", done.err) if line.strip() and not re.search(r"%\|", line)]
    assert done.rc == 2, (done.rc, done.err)
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in done.err, lines
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


# ---- train.py: flags --------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ("train.py", ["are required: --model"]),
    ("train.py --model cogat", ["--model", "cogat", "did you mean 'cogact'"]),
    ("train.py --model common", ["--model", "common", "cogact"]),
    ("--preset bas", ["--preset", "bas", "did you mean 'base'"]),
    ("--set horison=4", ["cogact.Config has no field 'horison'; did you mean 'horizon'?"]),
    ("--set horizon=four", ["--set horizon=four", "int"]),
    ("--set horizon", ["--set horizon", "=VALUE"]),
    ("--set lr_schedule=linear", ["linear", "cosine"]),
    ("--set image_size=15", ["image_size=15"]),
    ("--no-such-flag", ["--no-such-flag"]),
    ("--attn fast", ["--attn", "fast", "sdpa"]),
    ("--attn flash", ["flash", "--attn auto"]),
    ("--device cuda:0", ["cuda"]),
    ("--steps 0", ["--steps: 0 is not in 1 .. "]),
    ("--workers -1", ["--workers: -1"]),
    ("--data-episodes 0", ["--data-episodes: 0"]),
    ("--eval-episodes 2000000", ["--eval-episodes: 2000000 is not in 0 .. 1000000"]),
    ("--global-batch -8", ["--global-batch: -8"]),
    ("--seed 9223372036854775808", ["--seed: 9223372036854775808"]),
    ("--out=", ["'--out=' cannot be used"]),
    ("--device meta", ["--device 'meta' cannot"]),
    ("--wandb x", ["pip install wandb"]),
    ("--steps many", ["--steps", "many"]),
    ("--ema 1.5", ["--ema: 1.5 is not in 0.0 .. 1.0"]),
    ("--ema 1", ["ema=1.0"]),
    ("--global-batch 7", ["--global-batch 7", "8"]),
    ("--log-every 0", ["--log-every: 0"]),
    ("--eval-episodes 5", ["--eval-episodes", "tabletop"]),
    ("--cache here", ["--cache"]),
    ("--lora 4 --ema 0.9", ["--lora", "--ema"]),
    ("--data nowhere", ["--data nowhere"]),
    ("--data tabletp --eval-episodes 5", ["--data tabletp", "Give tabletop"]),
    ("--data nowhere.py:make", ["nowhere.py"]),
    ("--data toy.py:mke", ["mke", "did you mean 'make'"]),
    ("--init nowhere.safetensors", ["nowhere.safetensors"]),
    ("--init nowhere", ["checkpoint nowhere: no such"]),
    ("--resume", ["--resume", "out"]),
    ("--resume --out .", ["--resume: there is no run.json"]),
    ("--out toy.py", ["--out toy.py", "is a file"]),
    ("--out toy.py/run", ["toy.py/run"]),
    ("--out /dev/null/run", ["/dev/null/run"]),
    ("--set lr=1e30", ["not finite", "step", "rank 0", "toy"]),
], ids=lambda x: x.replace("train.py ", "") if isinstance(x, str) else "")
def test_train_refuses(train, flags, words):
    small = "" if flags.startswith("train.py") or "--set" in flags else f" --set {SMALL}"
    refused(train(flags + small), *words)


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="peft is installed")
def test_train_refuses_lora_without_peft(train):
    refused(train(f"--lora 4 --set {SMALL}"), "pip install peft")


@pytest.mark.parametrize("change, word", BROKEN.values(), ids=BROKEN.keys())
def test_train_refuses_a_broken_sample(train, tmp_path, change, word):
    text = TOY.replace("        return {", "        s = {")
    (tmp_path / "toy.py").write_text(text.replace('"toy"}', f'"toy"}}\n        {change}\n        return s'))
    refused(train(f"--set state_dim=8 {SMALL}"), word)
    assert not (tmp_path / "out" / "last").exists()


# ---- train.py: files --------------------------------------------------------------------------------------

@pytest.mark.slow
def test_train_keeps_a_run_that_is_there(train, tmp_path):
    assert train(f"--steps 2 --set {SMALL}").rc == 0
    refused(train(f"--set {SMALL}"), "out is not empty", "--resume", "--overwrite")
    other = SMALL.replace("horizon=4", "horizon=3")
    refused(train(f"--resume --set {other}"), "another one", "horizon: 4 there, 3 now")
    refused(train(f"--resume --batch 4 --global-batch 4 --set {SMALL}"), "global_batch")
    assert load_file(tmp_path / "out" / "last" / "model.safetensors")
    def files():
        return {p: p.is_file() and p.read_bytes() for p in (tmp_path / "out").rglob("*")}
    before, huge = files(), SMALL.replace("lr=0.01", "lr=1e30")    # --overwrite loses nothing before it saves
    for flags in (f"--set {huge}", f"--data toy.py:mke --set {SMALL}", f"--workers -1 --set {SMALL}"):
        refused(train(f"--overwrite {flags}"))
        assert files() == before
    for k in range(random.randint(1, 3), 24, 3):                   # killed anywhere: all old, or resumable
        done = train(f"--overwrite --steps 1 --set {SMALL}", kill_at=k)
        assert done.rc in (0, -9), done.err
        there = [*(tmp_path / "out" / ".replaced").glob("step-*"), *(tmp_path / "out").glob("step-*")]
        assert there and all((p / "training_state" / "run.json").is_file() for p in there)
    assert train(f"--overwrite --steps 1 --set {SMALL}").rc == 0
    assert [p.name for p in (tmp_path / "out").glob("step-*")] == ["step-000001"]
    assert not [p for p in (tmp_path / "out").iterdir() if p.name[0] == "."]


@pytest.mark.parametrize("file, spoil, word", [
    ("training_state/run.json", lambda d: b"[1]", "not an object"),
    ("training_state/run.json", lambda d: b'{"args": null}', "run.json is damaged"),
    ("training_state/run.json", lambda d: d.replace(b'"keep": 2', b'"keep": "x"'), "--keep"),
    ("training_state/run.json", lambda d: d.replace(b'"lora": 0', b'"loar": 0'), "--loar"),
    ("training_state/state.safetensors", lambda d: d.replace(b"avg_sq/", b"avg_xx/"), "missing, e.g. exp_"),
    ("training_state/state.safetensors", lambda d: d.replace(b'"F32","shape":[32,', b'"I32","shape":[32,'),
     "of another kind"),
    ("config.json", lambda d: d.replace(b'"width": 32', b'"width": "big"'), "width"),
    ("../metrics.jsonl", lambda d: b'[]\n{"step": "x"}\n\xff\xfe\n' + d, ""),
])
def test_train_resumes_from_no_damaged_file(train, trained, tmp_path, file, spoil, word):
    shutil.copytree(trained, tmp_path / "out", symlinks=True)
    path = tmp_path / "out" / "last" / file
    path = path if path.is_file() else tmp_path / "out" / "metrics.jsonl"
    path.write_bytes(spoil(path.read_bytes()))
    done = train(f"--resume --steps 3 --set {SMALL}")
    assert done.rc == 0 if not word else refused(done, word), done.err


@pytest.mark.slow
def test_train_refuses_torn_and_foreign_checkpoints(train, tmp_path):
    assert train(f"--steps 2 --set {SMALL}").rc == 0
    whole, again = tmp_path / "out" / "last" / "model.safetensors", f"--out b --set {SMALL}"
    torn = shutil.copytree(tmp_path / "out" / "last", tmp_path / "torn")
    os.truncate(torn / "model.safetensors", 5000)
    refused(train(f"--init torn {again}"), "torn")
    refused(train(f"--init torn/model.safetensors {again}"), "torn")
    foreign = shutil.copytree(tmp_path / "out" / "last", tmp_path / "foreign")
    (foreign / "config.json").write_text((foreign / "config.json").read_text().replace('"cogact"', '"vla0"'))
    refused(train(f"--init foreign {again}"), "vla0", "cogact")
    weights = load_file(whole)
    renamed = {name.replace("projector", "projektor"): t for name, t in weights.items()}
    save_file(renamed, tmp_path / "other.safetensors")
    refused(train(f"--init other.safetensors {again}"), "projektor")
    refused(train(f"--init out/last {again} width=64"), "fit", "action_model")
    os.truncate(tmp_path / "out" / "last" / "training_state" / "state.safetensors", 100)
    refused(train(f"--resume --steps 4 --set {SMALL}"), "torn", "state.safetensors")


@pytest.mark.slow
def test_train_survives_a_full_disk(train, tmp_path):
    assert train(f"--steps 2 --set {SMALL}").rc == 0
    before = (tmp_path / "out" / "last" / "model.safetensors").read_bytes()
    for size in (20_000, 400_000):                                 # in the weights; in the training state
        refused(train(f"--steps 4 --resume --set {SMALL}", fsize=size), "cannot write", "step-000004")
        assert (tmp_path / "out" / "last").resolve().name == "step-000002"
        assert (tmp_path / "out" / "last" / "model.safetensors").read_bytes() == before
    assert train(f"--steps 4 --resume --set {SMALL}").rc == 0      # and goes on when there is space again
    (tmp_path / "out" / "metrics.jsonl").unlink()
    (tmp_path / "out" / "metrics.jsonl").symlink_to("/dev/full")
    refused(train(f"--steps 6 --resume --set {SMALL}"), "cannot write", "metrics.jsonl", "space")
    assert (tmp_path / "out" / "last").resolve().name == "step-000004"


def test_nothing_is_saved_after_a_loss_that_is_not_finite(train, tmp_path):
    huge = SMALL.replace("lr=0.01", "lr=1e30")
    refused(train(f"--save-every 1 --log-every 50 --set {huge}"), "not finite")
    for path in (tmp_path / "out").glob("step-*/model.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values())
    refused(train(f"--out two --batch 4 --set {huge}", world=2), "not finite")


@pytest.mark.slow
def test_train_and_evaluate_the_default_at_small_size(tmp_path):
    """The default run from its first line to its last on a few episodes; then with a torn shard."""
    command = ("train.py --model cogact --cache data --data-episodes 4 --steps 4 --val-every 2 --batch 8 "
               "--val-samples 8 --eval-episodes 1")
    done = forks.shared()(command, cwd=tmp_path)
    assert done.rc == 0, done.err
    for text in ("data tabletop", "step 4/4 | loss", "validation loss", "pick", "film.gif",
                 "eval_sim.py --ckpt runs/cogact-tiny/last"):
        assert text in done.out, text
    run = tmp_path / "runs" / "cogact-tiny"
    assert (run / "eval" / "film.gif").stat().st_size > 1000
    assert json.loads((run / "eval" / "results.json").read_text())["success"] <= 1
    shard = next((tmp_path / "data").rglob("tabletop-train*/*.safetensors"))
    os.truncate(shard, 1000)
    refused(forks.shared()(command + " --overwrite", cwd=tmp_path), "torn", shard.name)
