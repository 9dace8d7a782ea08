"""data.py: the sample format, the generated tabletop set, users' datasets, the sampler and the loader."""
import contextlib
import itertools
import os
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval_sim

ROOT = Path(data.__file__).parent
SMALL = {"image_size": 16, "families": ("pick",), "horizon": 4, "workers": 0}


@pytest.fixture(autouse=True)
def two_episodes_per_shard(monkeypatch):
    monkeypatch.setattr(data, "SHARD_EPISODES", 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD_EPISODES", 2)
        return data.tabletop(episodes=5, views=("third", "wrist"), cache=tmp_path_factory.mktemp("cache"),
                             **{**SMALL, "families": eval_sim.FAMILIES})


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def run_cli(*args, preexec=None, **env):
    """python data.py args -> (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, "data.py", *map(str, args)], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, **env}, preexec_fn=preexec, timeout=120)
    return done.returncode, done.stdout, done.stderr


def sample(**changes):
    """A correct sample of T = 4, A = 7, S = 8, with some fields changed (None: left out)."""
    good = {"images": {"third": np.zeros((6, 8, 3), np.uint8)}, "instruction": "pick up the red cube",
            "state": np.zeros(8, np.float32), "actions": np.ones((4, 7), np.float32),
            "loss_mask": np.ones(4, bool), "dataset": "my_robot"}
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


# ---- The generated set ------------------------------------------------------------------------------------

def test_samples_have_the_format_and_equal_the_recording(small):
    views = ("third", "wrist")
    for episode, facts in enumerate(small.episodes):
        recorded = eval_sim.record_episode(facts["seed"], eval_sim.FAMILIES, "train", views, 16)
        for frame in (0, facts["frames"] // 2, facts["frames"] - 1):
            got = small.sample(episode, frame)
            data.check_sample(got, horizon=4, action_dim=7, state_dim=8, views=views)
            assert all(np.array_equal(got["images"][v], recorded["images"][v][frame]) for v in views)
            assert np.array_equal(got["state"], recorded["state"][frame])
            assert np.array_equal(got["waypoints"], recorded["waypoints"][frame])
            assert got["subtask"] == recorded["subtasks"][frame]
            assert got["instruction"] == recorded["instruction"]
        assert np.array_equal(small.recording(episode)["executed"], recorded["executed"])


def test_actions_beyond_the_end_hold_the_pose_and_do_not_count(small):
    for episode, facts in enumerate(small.episodes):
        labels = small.recording(episode)["actions"]
        for left in (1, 3, 4):
            got = small.sample(episode, facts["frames"] - left)
            assert not got["loss_mask"][left:].any()
            assert np.array_equal(got["actions"][:left], labels[-left:])
            assert not got["actions"][left:, :6].any()
            assert (got["actions"][left:, 6] == labels[-1, 6]).all()


def test_what_follows_a_bump_does_not_count(small):
    """The label at the bump itself counts; those after it answer to something that frame could not foresee."""
    bumps = 0
    for episode in range(len(small.episodes)):
        recorded = small.recording(episode)
        bumped = np.flatnonzero((recorded["actions"] != recorded["executed"]).any(1))
        for at in bumped[bumped > 0]:
            inside = [b for b in bumped if at - 1 <= b < at + 3]
            want = [step <= inside[0] and step < len(recorded["actions"]) for step in range(at - 1, at + 3)]
            assert small.sample(episode, at - 1)["loss_mask"].tolist() == want
            bumps += 1
    assert bumps


def test_index_runs_through_all_frames_of_all_episodes(small):
    frames = [e["frames"] for e in small.episodes]
    assert len(small) == sum(frames) and len(frames) == 5
    pairs = [(e, f) for e, n in enumerate(frames) for f in range(n)]
    for index in (0, frames[0] - 1, frames[0], len(small) - 1):
        assert np.array_equal(small[index]["state"], small.sample(*pairs[index])["state"])
    for outside in (-1, len(small)):
        with pytest.raises(IndexError):
            small[outside]


def test_statistics_are_of_every_label_and_leave_the_gripper(small):
    labels = np.concatenate([small.recording(e)["actions"] for e in range(5)]).astype(np.float64)
    stats = small.stats["tabletop"]
    assert np.allclose(stats["action"]["q01"], np.quantile(labels, 0.01, axis=0))
    assert np.allclose(stats["action"]["q99"], np.quantile(labels, 0.99, axis=0))
    assert stats["action"]["mask"] == [True] * 6 + [False]
    assert (stats["num_transitions"], stats["num_trajectories"]) == (len(labels), 5)
    assert data.dataset_statistics(small) is small.stats


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    here, spread = (data.tabletop(episodes=5, cache=tmp_path / str(workers), **{**SMALL, "workers": workers})
                    for workers in (0, 2))
    assert len(contents(here.folder)) == 4 and contents(here.folder) == contents(spread.folder)


KILLED = """
import data, pathlib, sys, time
write = data.atomic_write
def write_three(path, writer):
    write(path, writer)
    if len(list(pathlib.Path(path).parent.glob("shard-*"))) == 3:
        print("three", flush=True)
        time.sleep(600)
data.atomic_write, data.SHARD_EPISODES = write_three, 2
data.tabletop(episodes=12, cache=sys.argv[1], image_size=16, families=("pick",), workers=1)
"""


def test_killed_generation_keeps_whole_shards_and_its_workers_leave(tmp_path):
    whole = contents(data.tabletop(episodes=12, cache=tmp_path / "whole", **SMALL).folder)
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "cut")], cwd=ROOT, text=True,
                          start_new_session=True, stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == "three\n"
        run.kill()
    folder = next((tmp_path / "cut").glob("tabletop-*"))
    assert not (folder / "manifest.json").exists()
    shards = sorted(folder.glob("shard-*"))
    os.truncate(shards[1], 1000)                                       # torn, as by a power failure
    (folder / ".shard-00003.safetensors.1.part").write_bytes(b"half")
    kept = {path.name: path.stat().st_ino for path in shards if path != shards[1]}

    assert contents(data.tabletop(episodes=12, cache=tmp_path / "cut", **SMALL).folder) == whole
    assert {name: (folder / name).stat().st_ino for name in kept} == kept
    for _ in range(100):                                               # its process group is empty, or soon
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, 0)
            time.sleep(0.1)
            continue
        break
    else:
        pytest.fail("workers of the killed run are still there")


def test_second_process_waits_for_the_first_and_generates_nothing(tmp_path):
    code = f"import data; print(len(data.tabletop(episodes=30, cache={str(tmp_path)!r}, **{SMALL!r})))"
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and outputs[0][0] == outputs[1][0]
    assert sum("generating" in err for _, err in outputs) == 1


@pytest.mark.parametrize("tear", ["cut", "empty", "header", "other", "manifest"])
def test_torn_file_is_named_and_made_again_when_deleted(tmp_path, tear):
    folder = data.tabletop(episodes=3, cache=tmp_path, **SMALL).folder
    before = contents(folder)
    path = folder / ("manifest.json" if tear == "manifest" else "shard-00001.safetensors")
    path.write_bytes({"cut": before[path.name][:-7], "empty": b"", "header": b"\xff" * 9999,
                      "other": before["shard-00000.safetensors"], "manifest": b'{"made_from": {'}[tear])
    with pytest.raises(ValueError, match=f"{path.name} is torn or changed") as error:
        data.tabletop(episodes=3, cache=tmp_path, **SMALL)
    assert len(str(error.value).splitlines()) == 1
    path.unlink()
    data.tabletop(episodes=3, cache=tmp_path, **SMALL)
    assert contents(folder) == before


def test_failed_demonstrations_are_left_out(tmp_path, monkeypatch):
    record = eval_sim.record_episode
    monkeypatch.setattr(eval_sim, "record_episode",
                        lambda seed, **settings: {**record(seed, **settings), "success": seed != 1})
    assert [e["seed"] for e in data.tabletop(episodes=3, cache=tmp_path, **SMALL).episodes] == [0, 2]


def test_splits_share_no_episode(tmp_path):
    found = [{e["seed"] for e in data.tabletop(split, episodes=3, cache=tmp_path, **SMALL).episodes}
             for split in ("train", "val", "pretrain")] + [set(eval_sim.seeds("eval", 100_000))]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(found, 2))


def test_pickled_dataset_reads_the_same_frames(small):
    small[0]
    copy = pickle.loads(pickle.dumps(small))
    assert np.array_equal(copy[7]["images"]["third"], small[7]["images"]["third"])


# ---- The format, checked; users' datasets -----------------------------------------------------------------

def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


BAD = {
    "no_instruction": (sample(instruction=None), "no 'instruction'"),
    "empty_instruction": (sample(instruction=" "), "'instruction' must be a string that is not empty"),
    "image_of_floats": (sample(images={"third": zeros(6, 8, 3)}), "is float32.*wanted uint8"),
    "channels_first": (sample(images={"third": zeros(3, 6, 8, dtype=np.uint8)}), r"\(3, 6, 8\), wanted"),
    "image_is_a_tensor": (sample(images={"third": torch.zeros(6, 8, 3)}), "array uint8.*found Tensor"),
    "images_without_a_name": (sample(images=zeros(6, 8, 3, dtype=np.uint8)), "'images' must be a dict"),
    "no_images": (sample(images={}), "at least one view"),
    "wrong_view": (sample(images={"top": zeros(6, 8, 3, dtype=np.uint8)}), "no view 'third'.*'top'"),
    "action_rank": (sample(actions=zeros(7)), r"'actions' is float32 \(7,\), wanted float32 \(4, 7\)"),
    "action_horizon": (sample(actions=zeros(3, 7)), r"\(3, 7\), wanted float32 \(4, 7\)"),
    "action_dtype": (sample(actions=zeros(4, 7, dtype=float)), r"'actions' is float64 .*wanted float32"),
    "action_is_nan": (sample(actions=np.full((4, 7), np.nan, np.float32)), r"'actions' is nan at \[0, 0\]"),
    "state_length": (sample(state=zeros(6)), r"'state' is float32 \(6,\), wanted float32 \(8,\)"),
    "state_is_a_list": (sample(state=[0.0] * 8), "'state' must be a numpy array.*found list"),
    "mask_length": (sample(loss_mask=np.ones(3, bool)), r"'loss_mask' is bool \(3,\), wanted bool \(4,\)"),
    "empty_dataset_name": (sample(dataset=""), "'dataset' must be a string"),
    "waypoints": (sample(waypoints=zeros(2, 5)), r"'waypoints' .*wanted float32 \(5, 2\)"),
    "history": (sample(history_images={"third": zeros(6, 8, 3)}), r"history_images\['third'\]"),
    "not_a_dict": ([1, 2], "wanted a dict"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sample_is_one_line_that_names_the_field(name):
    bad, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        data.check_sample(bad, horizon=4, action_dim=7, state_dim=8, views=("third",))
    assert len(str(error.value).splitlines()) == 1


def test_observation_needs_no_actions():
    observation = sample(actions=None, loss_mask=None, dataset=None)
    assert data.check_sample(observation, actions=False) is observation


USER_FILE = """
import numpy as np
def one(i, T):
    return {"images": {"third": np.full((6, 8, 3), i, np.uint8)}, "instruction": "wave", "dataset": "mine",
            "state": np.zeros(2, np.float32), "actions": np.full((T, 3), i, np.float32),
            "loss_mask": np.arange(T) < 2}
def as_list(split, horizon):
    return [one(i, horizon) for i in range(5)]
def as_generator(horizon=4):
    for i in range(5):
        yield one(i, horizon)
def third_is_bad(horizon):
    return [one(i, horizon if i < 3 else horizon + 1) for i in range(5)]
def empty():
    return []
def number():
    return 3
"""


@pytest.fixture
def user_file(tmp_path):
    (tmp_path / "my_robot.py").write_text(USER_FILE)
    return str(tmp_path / "my_robot.py")


@pytest.mark.parametrize("name", ["as_list", "as_generator"])
def test_users_file_gives_batches_and_statistics(user_file, name):
    dataset = data.open_dataset(f"{user_file}:{name}", horizon=4)
    batches = data.loader(dataset, keep, indices, batch=2, shuffle=False)
    assert [next(batches)[0] for _ in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]
    stats = data.dataset_statistics(dataset)["mine"]
    assert stats["action"]["max"] == [4, 4, 4] and stats["action"]["mask"] == [True, True, False]
    assert stats["num_transitions"] == 10                              # two of four count in each sample


def test_users_file_without_split_has_no_validation_set(user_file):
    assert data.open_dataset(f"{user_file}:as_generator", "val", horizon=4) is None
    assert len(data.open_dataset(f"{user_file}:as_list", "val", horizon=4)) == 5


@pytest.mark.parametrize("spec, message", [
    ("{}:as_lits", "did you mean 'as_list'"), ("{}:empty", "empty dataset"), ("{}:number", "returned int"),
    ("nowhere.py:make", "there is no file nowhere.py"), (str(ROOT), "found a folder. Give tabletop"),
    ("imagenet", "found nothing there"), ("tabletop:pick,juggle", "juggle"), ("tabletop:pick,", "families"),
])
def test_wrong_data_argument_says_what_is_wanted(user_file, tmp_path, spec, message):
    with pytest.raises(ValueError, match=message) as error:
        data.open_dataset(spec.format(user_file), cache=tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_sample_met_later_is_one_line_also_from_a_worker(user_file, workers):
    dataset = data.open_dataset(f"{user_file}:third_is_bad", horizon=4)
    batches = data.loader(dataset, keep, indices, batch=1, shuffle=False, workers=workers)
    assert [next(batches)[0] for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(ValueError, match=r"third_is_bad, sample 3: 'actions' is float32 \(5, 3\)") as error:
        next(batches)
    assert len(str(error.value).splitlines()) == 1


# ---- Sampler and loader -----------------------------------------------------------------------------------

def keep(one, key):
    return int(one["images"]["third"].flat[0]), key


def indices(prepared):
    return [value for value, _ in prepared], [key for _, key in prepared]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 100])
def test_every_epoch_is_a_permutation(n):
    orders = [[data.shuffled(i, n, 0, epoch) for i in range(n)] for epoch in range(4)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 16 or len({tuple(order) for order in orders}) == 4


def test_shuffling_mixes_distant_samples():
    order = np.array([data.shuffled(i, 2000, 0, 0) for i in range(2000)])
    assert abs(np.corrcoef(order, np.arange(2000))[0, 1]) < 0.08        # 1 / sqrt(2000) = 0.022
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.08
    assert len(set((order[:200] // 200).tolist())) == 10               # the first tenth: from everywhere


@pytest.mark.parametrize("world", [2, 3])
def test_global_batches_do_not_depend_on_the_number_of_processes(world):
    alone = data.Sampler(50, 12, seed=3)
    ranks = [data.Sampler(50, 12 // world, rank, world, seed=3) for rank in range(world)]
    for step in range(10):                                             # 120 samples: over two epoch ends
        assert alone[step] == [drawn for rank in ranks for drawn in rank[step]]


def test_accumulated_micro_batches_are_the_global_batch():
    alone, micro = data.Sampler(50, 12, seed=3), data.Sampler(50, 4, seed=3)
    assert alone[2] == micro[6] + micro[7] + micro[8]


def test_sampler_takes_every_sample_once_per_epoch_in_another_order():
    epochs = [[index for index, _ in data.Sampler(30, 30, seed=1)[step]] for step in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_keys_differ_between_samples_epochs_and_seeds():
    keys = [key for seed in (0, 1) for step in range(4) for _, key in data.Sampler(10, 10, seed=seed)[step]]
    assert len(set(keys)) == 80 and all(0 <= key < 2 ** 63 for key in keys)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_exactly_and_leaves_torchs_generator(small, workers):
    state = torch.get_rng_state()
    through = list(itertools.islice(data.loader(small, keep, indices, batch=3), 8))
    resumed = data.loader(small, keep, indices, batch=3, workers=workers, start_step=5)
    assert list(itertools.islice(resumed, 3)) == through[5:]
    assert torch.equal(torch.get_rng_state(), state)


def test_stream_is_shared_by_rank_and_resumes_exactly():
    stream = [sample(images={"third": np.full((2, 2, 3), i, np.uint8)}) for i in range(7)]
    class Stream:
        def __iter__(self):
            return iter(stream)
    def take(n, **options):
        return list(itertools.islice(data.loader(Stream(), keep, indices, **options), n))
    alone = take(6, batch=4)
    assert [value for values, _ in alone for value in values] == [i % 7 for i in range(24)]
    ranks = [take(6, batch=2, rank=rank, world=2) for rank in range(2)]
    assert alone == [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*ranks)]
    assert take(3, batch=4, start_step=3) == alone[3:]


def test_exhausted_iterator_is_an_error_not_an_endless_loop():
    with pytest.raises(ValueError, match="must start anew"):
        list(itertools.islice(data.loader(iter([sample()] * 3), keep, indices, batch=2), 5))


def test_empty_dataset_is_an_error():
    with pytest.raises(ValueError, match="of 0 samples"):
        next(data.loader([], keep, indices, batch=2))


# ---- Command line -----------------------------------------------------------------------------------------

def test_make_then_describe(tmp_path):
    code, out, err = run_cli("--make", "--episodes", 2, "--families", "all", "--views", "third,wrist",
                             "--image-size", 16, "--workers", 0, XDG_CACHE_HOME=str(tmp_path))
    assert code == 0, err
    folder = next((tmp_path / "plainvla").glob("tabletop-train-*"))
    assert "generating 2 episodes" in err and "2/2" in err
    assert "2 episodes" in out and "'wrist': (16, 16, 3)" in out
    raw = bytearray((folder / "shard-00000.safetensors").read_bytes())
    raw[-1] ^= 1                                                       # one flipped bit, same size
    (folder / "shard-00000.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="shard-00000.safetensors is torn or changed: its checksum"):
        data.describe(folder)


def test_bad_command_lines_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    make = ["--make", "--episodes", "2", "--workers", "0", "--image-size", "16", "--cache"]
    here, wrong = str(tmp_path), [["--split", "tests"], ["--families", "juggle"], ["--views", "top"],
                                  ["--episodes", "0"], ["--episodes", "9999999"], ["--image-size", "0"]]
    for args in [[], ["--make", "folder"], [here + "/nowhere"], [here], make + [here + "/file"],
                 make + [here + "/file/below"]] + [make + [here] + change for change in wrong]:
        monkeypatch.setattr(sys, "argv", ["data.py", *args])
        with pytest.raises(SystemExit) as left:
            data.cli(data.main)
        lines = capsys.readouterr().err.strip().splitlines()
        assert left.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (args, lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_full_disk_is_one_line_and_leaves_no_torn_shard(tmp_path):
    def no_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    args = ("--make", "--episodes", 3, "--image-size", 32, "--workers", 0, "--cache", tmp_path)
    code, _, err = run_cli(*args, preexec=no_large_files)
    assert code == 2 and "cannot write" in err.splitlines()[-1] and "Traceback" not in err
    assert [path.name for path in next(tmp_path.glob("tabletop-*")).iterdir()] == [".lock"]
    assert len(data.tabletop(episodes=3, image_size=32, workers=0, cache=tmp_path).episodes) == 3
