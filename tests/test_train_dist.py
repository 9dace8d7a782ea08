"""train.py on several processes: the same gradients, checkpoints that move between them, lost workers.

What runs by default is each method on two processes. All splits, four processes, moves and kills (minutes):
    python -m pytest -m long tests/test_train_dist.py
"""
import importlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import forks
import pytest
import torch
import train
from common import METHODS
from safetensors.torch import save_file
from test_methods import STATS
from test_train import losses, relative, same, state

TOY = '''
import numpy as np

class Toy:
    def __init__(self, horizon, words):
        self.horizon, self.words = horizon, words
    def __len__(self):
        return 240
    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        actions = np.cumsum(rng.uniform(-0.2, 0.2, (4, 7)), 0).astype(np.float32)
        actions[:, 6] = i % 2
        past, points = actions[:1], rng.uniform(0, 1, (5, 2)).astype(np.float32)
        actions = points if self.horizon == 5 else actions     # 5: A0's
        now, before = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
        return {"images": {"third": now}, "history_images": {"third": before[None]}, "actions": actions,
                "history_actions": past, "waypoints": points, "state": np.zeros(8, np.float32),
                "loss_mask": np.arange(len(actions)) < 1 + i % len(actions), "dataset": "toy",
                "instruction": "pick up the red cube" + " now" * (i % self.words)}

def make(split="train", horizon=4):
    return Toy(horizon, 3)

def even(split="train", horizon=4):                            # prompts of one length: in a batch of others,
    return Toy(horizon, 1)                                     # RoboVLMs' query moves (see its FAITHFUL tags)
'''
LM = "llm_width=32 llm_depth=2 llm_mlp=32"
QWEN = f"{LM} vit_width=16 vit_depth=2 vit_heads=2 vit_mlp=16 full_attention=1 mrope_section=1,1,2 horizon=4"
TOWERS = " ".join(f"{name}_{size}" for name in ("dino", "siglip") for size in (
    "width=32", "heads=2", "mlp=32", "depth=2"))
SMALL = {                                                      # a step costs a tenth of a second
    "cogact": f"{TOWERS} {LM} llm_heads=2 image_size=16 patch_size=8 width=32 depth=2 heads=2 horizon=4 "
              "repeated_diffusion_steps=2 execute=2 head_lr=0",
    "vla0": f"{QWEN} image_size=16 patch_size=4 merge_size=2 window_size=16 window=0",
    "a0": "image_size=24 depth=2 width=32 heads=2 siglip_width=32 qwen_width=32",
    "robovlms": f"{LM} llm_heads=2 llm_kv_heads=2 llm_head_dim=16 vit_width=32 vit_heads=2 vit_mlp=32 "
                "vit_depth=2 image_size=16 patch_size=8 image_tokens=4 width=32 mlp_widths=32,16 history=2 "
                "horizon=4 head_lr=0",
    "robobrain_x0": f"{QWEN} image_size=24 action_dim=7 subtask=false"}
RECIPE = "lr=1e-3 lr_schedule=constant warmup=1"
SPLITS = {"DDP": "", "FSDP": "--shard"}


def command(method, flags):
    data = "even" if method == "robovlms" else "make"
    return (f"train.py --model {method} --data toy.py:{data} --batch 12 --global-batch 12 --val-every 0 "
            f"--log-every 1 {flags} --set {SMALL[method]} {RECIPE}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data, METHOD.safetensors (first weights, none of them zero), and what ran there."""
    folder = tmp_path_factory.mktemp("dist")
    (folder / "toy.py").write_text(TOY)
    for method in METHODS:
        module = importlib.import_module(method)
        cfg = train.parse(command(method, "").split()[1:])[2]
        torch.manual_seed(0)
        model = module.Model(cfg, module.load_tokenizer(cfg), STATS)
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.2)
        weights = {name: t.contiguous() for name, t in model.state_dict().items()}
        save_file(weights, folder / f"{method}.safetensors")

    def run(method, out, flags="", world=1, **how):
        """-> the newest checkpoint of the run that is in `out` then."""
        if not (folder / out).exists() or "--resume" in flags:
            flags = f"--out {out} --init {method}.safetensors --batch {12 // world} {flags}"
            done = forks.shared()(command(method, flags), cwd=folder, world=world, **how)
            assert done.rc == 0, done.err
        return folder / out / "last"
    return run


def gradients(checkpoint):
    """After one step, Adam's exp_avg: 1 - beta1 times the clipped gradient. None is zero (but for those of
    keys' biases, which no attention feels: left out, they are what rounding leaves)."""
    found = state(checkpoint, "exp_avg")
    whole = torch.cat([t.flatten() for t in found.values()]).norm()
    found = {name: t for name, t in found.items() if t.norm() > 1e-6 * whole or "k_proj.bias" not in name}
    assert all(t.norm() > 0 for t in found.values()), "a gradient is zero: nothing is compared there"
    return found


# ---- the same gradients -----------------------------------------------------------------------------------

def every_split(method):
    """By default DDP or FSDP on two processes, for every other method; all on two and four: long."""
    for world in (2, 4):
        for name in SPLITS:
            cheap = world == 2 and name == list(SPLITS)[METHODS.index(method) % 2]
            yield pytest.param(method, name, world, marks=() if cheap else pytest.mark.long)
    yield pytest.param(method, "accumulated", 2, marks=pytest.mark.long)


@pytest.mark.parametrize("method, split, world", [p for method in METHODS for p in every_split(method)])
def test_gradients_are_those_of_one_process(place, method, split, world):
    flags = SPLITS.get(split, "--batch 2")
    one = place(method, f"{method}-one", "--steps 1")
    other = place(method, f"{method}-{split}-{world}", f"--steps 1 {flags}", world)
    assert relative(gradients(one), gradients(other)) <= 1e-5
    assert abs(losses(one.parent)[0] / losses(other.parent)[0] - 1) < 1e-6


def test_official_mean_is_that_of_the_processes_means(place):
    """Two processes of six samples, each mean by itself; weighed, tokens count the same (see above)."""
    two = place("vla0", "official", "--steps 1 --official-mean", 2)
    one = place("vla0", "vla0-one", "--steps 1")
    assert 1e-4 < relative(gradients(one), gradients(two)) < 0.5
    assert abs(losses(one.parent)[0] - losses(two.parent)[0]) > 1e-5


# ---- checkpoints move -------------------------------------------------------------------------------------

@pytest.mark.long
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_four_processes_continues_on_one_two_and_three(place, method, split):
    flags = f"--steps 13 --save-every 2 --keep 0 {SPLITS[split]}"
    four = place(method, f"{method}-{split}-whole", flags, 4).parent
    assert len(list((four / "step-000002" / "training_state").glob("state-*-of-4.safetensors"))) == 4
    for world in (1, 2, 3):
        moved = four.with_name(f"{method}-{split}-on-{world}")
        shutil.copytree(four, moved, symlinks=True, ignore=lambda folder, names: [
            name for name in names if name[:5] == "step-" and name != "step-000002"])
        # on one process without --shard: what was split over four is whole there
        place(method, moved.name, f"--resume {flags if world > 1 else flags.replace('--shard', '')}", world)
        expected, found = (losses(folder)[2:] for folder in (four, moved))
        assert len(found) == len(expected) == 11
        assert abs(found[0] / expected[0] - 1) < 1e-6
        assert max(abs(a / b - 1) for a, b in zip(found, expected)) < 1e-4


def test_processes_never_meet_where_the_dead_ones_of_the_last_start_did():
    """torchrun's store outlives them all; whoever comes first waits for those of its own start."""
    shared, world = torch.distributed.HashStore(), 3
    with ThreadPoolExecutor(world) as pool:
        for start in range(3):
            late = start % world
            some = {rank: pool.submit(train.own_store, shared, rank, world)
                    for rank in range(world) if rank != late}
            time.sleep(0.2)
            assert not (some[0] if late else some[1]).done()
            some[late] = pool.submit(train.own_store, shared, late, world)
            stores = [some[rank].result(9) for rank in range(world)]
            assert not stores[start].check(["here"])
            stores[start].set("here", str(start))
            assert all(store.get("here") == str(start).encode() for store in stores)


def test_a_restart_of_one_node_is_one_of_all(monkeypatch):
    """torchrun tells each worker how often its own node failed."""
    shared, node = torch.distributed.HashStore(), {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    monkeypatch.setattr(train, "meet", lambda rank, world: shared)
    for name, value in (node | {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "0"}).items():
        monkeypatch.setenv(name, value)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(train.restarted)
        while shared.add("here", 0) < 1:
            time.sleep(0.01)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert train.restarted() and other.result(9)


def test_nodes_that_see_other_checkpoints_do_not_go_on(place, tmp_path):
    run, nodes = place("a0", "nodes", "--steps 2 --save-every 1"), tmp_path / "nodes.py"
    nodes.write_text("import common, os, train\nos.chdir(os.environ['RANK'])\ncommon.cli(train.main)\n")
    for node in "01":
        shutil.copytree(run.parent, tmp_path / node / "out", symlinks=True)
    shutil.rmtree(tmp_path / "1" / "out" / "step-000002")
    again = f"{nodes} --model a0 --out out --resume --batch 6 --init none"
    done = forks.shared()(again, cwd=tmp_path, world=2)
    assert done.rc == 2 and "rank 0 sees out/step-000002, others {'out/step-000001'}" in done.err


@pytest.mark.long
@pytest.mark.parametrize("flags, nodes", [
    ("--shard", 1), ("--ema 0.9", 1), ("--overwrite", 1), ("--keep 3", 2)])
def test_a_killed_worker_costs_at_most_the_steps_since_the_last_checkpoint(place, flags, nodes):
    """torchrun starts the workers again, of all nodes; the run continues by itself, --overwrite or not."""
    name = flags.strip("-").replace(" ", "")
    whole = place("a0", f"whole-{name}", f"--steps 40 --save-every 5 {flags}", 2)
    out = whole.parent.with_name(f"killed-{name}")
    flags = f"--out {out} --init a0.safetensors --batch 6 --steps 40 --save-every 5 {flags}"
    script, *words = command("a0", flags).split()
    where = f"--rdzv-backend=c10d --rdzv-endpoint=localhost:{random.randint(20000, 30000)}" * (nodes > 1)
    read, write = os.pipe()
    runs = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *(where or "--standalone").split(),
         f"--nnodes={nodes}", f"--nproc_per_node={2 // nodes}", "--max-restarts=2",
         forks.ROOT / script, *words], cwd=out.parent, stdout=write, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(nodes)]
    os.close(write)
    moments, saved, text = [random.randint(8, 18), random.randint(22, 36)], [], ""
    for line in open(read, errors="replace"):
        text += line
        step = re.search(r"step (\d+)/40", line)
        if moments and step and int(step[1]) >= moments[0]:
            del moments[0]
            saved.append(train.checkpoints(out)[-1].name if train.checkpoints(out) else "")
            workers = [pid for run in runs for pid in workers_of(run.pid)]
            os.kill(random.choice(workers), signal.SIGKILL)
    assert not any(run.wait() for run in runs) and not moments, text
    starts = re.findall(r"resuming \S+(step-\d+) at step", text)
    assert len(starts) >= 2 and starts[0] >= saved[0] and starts[-1] >= saved[1] >= "step-000015", text
    assert same(whole, out / "last")


def workers_of(pid):
    """Processes that torchrun has started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.long
def test_kills_at_random_moments_cost_nothing_but_time(place):
    """KILLS=200 python -m pytest -m long tests/test_train_dist.py -k random_moments

    kill -9 after a random time, or just before a random file operation of saving, pruning, beginning again.
    """
    kills, left = 0, int(os.environ.get("KILLS", "200"))
    flags, many = "--steps 6 --save-every 1 --keep 2 --ema 0.9", itertools.cycle(METHODS)
    for number, method in zip(itertools.count(), many):
        whole, seconds = place(method, f"{method}-alone", flags), 1.0
        out, begin = whole.parent.with_name(f"{method}-{number}"), time.time()
        while True:
            how = random.choice([{"kill_at": random.randint(1, 90)},
                                 {"kill_after": random.uniform(0, seconds)}])
            again = " --resume" * out.exists()
            words = command(method, f"--out {out} --init {method}.safetensors {flags}{again}")
            done = forks.shared()(words, cwd=out.parent, **(how if kills < left else {}))
            assert done.rc in (0, -9), done.err
            kills += done.rc == -9
            if done.rc == 0:
                break
            seconds = max(seconds, 1.2 * done.seconds) if "kill_at" in how else seconds
        assert same(whole, out / "last")
        shutil.rmtree(out)
        print(f"{kills} kills; {method} in {time.time() - begin:.0f} s")
        if kills >= left:
            return
