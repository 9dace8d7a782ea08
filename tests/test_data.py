"""data.py: the sample format, the generated tabletop set, users' datasets, the sampler and the loader."""
import contextlib
import hashlib
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval_sim
import forks

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


def run_cli(*args, **how):
    """python data.py args -> (exit code, stdout, stderr)."""
    done = forks.shared()("data.py", *args, cwd=ROOT, **how)
    return done.rc, done.out, done.err


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
            sample, inner = small.sample(episode, at - 1), want[:len(recorded["actions"]) - at + 1]
            assert sample["loss_mask"].tolist() == want and sample.get("unforeseen", False) != all(inner)
            bumps += 1
    assert bumps and not any("unforeseen" in small.sample(e, facts["frames"] - 1)
                             for e, facts in enumerate(small.episodes))


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    return data.tabletop(episodes=3, cache=tmp_path_factory.mktemp("dual"), embodiment="dual",
                         **{**SMALL, "families": ("put", "two")})


def test_samples_of_two_arms_have_twice_the_numbers_under_a_name_of_their_own(dual):
    assert dual.folder.name.startswith("tabletop_dual-train-put+two-") and list(dual.stats) == ["tabletop_dual"]
    assert dual.stats["tabletop_dual"]["action"]["mask"] == ([True] * 6 + [False]) * 2
    for episode, facts in enumerate(dual.episodes):
        recorded = eval_sim.record_episode(facts["seed"], ("put", "two"), "train", (), 16, embodiment="dual")
        got = dual.sample(episode, last := facts["frames"] - 1)
        data.check_sample(got, horizon=4, action_dim=14, state_dim=16)
        assert (got["dataset"], got["embodiment"]) == ("tabletop_dual", "dual")
        assert np.array_equal(got["state"], recorded["state"][last])
        held = [i for i in range(14) if i % 7 < 6]
        assert np.array_equal(got["actions"][0], recorded["actions"][last])
        assert not got["actions"][1:, held].any()                  # beyond the end: no motion,
        assert (got["actions"][1:, 6::7] == got["actions"][0, 6::7]).all()      # each hand's last gripper
    assert "embodiment=dual" in ", ".join(f"{key}={value}" for key, value in dual.made_from.items())


def test_subtask_of_two_goals_is_the_goal_and_then_done(dual):
    pairs = [i for i, e in enumerate(dual.episodes) if e["family"] == "two"]
    assert 0 < len(pairs) < 3
    for episode, facts in enumerate(dual.episodes):
        samples = [dual.sample(episode, frame) for frame in range(facts["frames"])]
        done = [bool(s.get("done")) for s in samples]
        assert done[-2:] == [episode in pairs] * 2 and not any(done[:4])
        assert all(s["subtask"] == "" for s in samples if s.get("done"))
        if episode in pairs:
            first, second = facts["instruction"].split(", then ")
            assert samples[0]["subtask"] == first and second in [s["subtask"] for s in samples]
    with pytest.raises(ValueError, match="'subtask' must be a string that is not empty"):
        data.check_sample(sample(subtask=""))


def test_tabletop_sets_are_named_by_body_and_families():
    assert data.tabletop_sets("tabletop") == data.tabletop_sets("tabletop:") == [("gripper", None)]
    assert data.tabletop_sets("tabletop@dual:pick,two") == [("dual", ("pick", "two"))]
    assert data.tabletop_sets("tabletop:all+tabletop@dual") == [("gripper", eval_sim.FAMILIES), ("dual", None)]
    for spec in ("tabletops", "tabletop+mine.py:make", "tabletop@dual+maniskill=DIR", "my/tabletop"):
        assert data.tabletop_sets(spec) == []


def test_bodies_are_mixed_each_with_its_own_numbers_and_statistics(tmp_path):
    how = {"horizon": 4, "image_size": 16, "episodes": 2, "cache": tmp_path, "workers": 0}
    both = data.open_dataset("tabletop:pick+tabletop@dual:pick", action_dim=14, **how)
    alone = [data.open_dataset(f"tabletop{body}:pick", **how) for body in ("@gripper", "@dual")]
    assert len(both) == sum(map(len, alone)) and data.dataset_statistics(both) == both.stats
    assert both.stats == alone[0].stats | alone[1].stats and len(both.stats) == 2
    for number, part in enumerate(alone):
        for i in (0, len(part) - 1):
            mine, theirs = part[i], both[i + number * len(alone[0])]
            data.check_sample(theirs, horizon=4, action_dim=(7, 14)[number])
            assert all(np.array_equal(mine[k], theirs[k]) for k in ("state", "actions", "loss_mask"))
            assert mine["dataset"] == theirs["dataset"] and mine["embodiment"] == theirs["embodiment"]
    drawn, = itertools.islice(data.loader(both, lambda s, key: s["actions"].shape, lambda x: x, 64), 1)
    assert {(4, 7), (4, 14)} == set(drawn)


def test_default_set_is_the_same_to_the_byte(tmp_path):
    """Sets in users' caches, and what was trained on them, stand for the code of today."""
    made = contents(data.tabletop("train", 2, ("pick", "turn"), ("third", "wrist"), 16, cache=tmp_path,
                                  workers=0).folder)
    digest = hashlib.sha256(b"".join(made[name] for name in sorted(made))).hexdigest()
    assert digest == "f1409bb4615cebbf89c5638ea528244359e248599db168d6f075526e79b4a862"


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
    assert data.dataset_statistics(small) == small.stats


@pytest.mark.slow
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


@pytest.mark.slow
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
    code, out, err = run_cli("--make", "--episodes", 30, "--families", "pick", "--image-size", 16, "--workers",
                             0, "--cache", tmp_path, world=2)
    assert code == 0 and "30 episodes" in out and err.count("generating 30 episodes") == 1, err


MANIFESTS = {"half": b'{"made_from": {', "list": b"[]", "null": b"null", "no_views": b'"made_from": {}',
             "shards": b'"shards": []', "numbers": b'"shards": [1]', "stats": b'"stats": {"tabletop": {}}'}


@pytest.mark.parametrize("tear", ["cut", "empty", "header", "other", *MANIFESTS])
def test_torn_file_is_named_and_made_again_when_deleted(tmp_path, tear):
    folder = data.tabletop(episodes=3, cache=tmp_path, **SMALL).folder
    before = contents(folder)
    path = folder / ("manifest.json" if tear in MANIFESTS else "shard-00001.safetensors")
    field, _, value = MANIFESTS.get(tear, b"").partition(b": ")
    whole = json.loads(before["manifest.json"])
    if value and tear != "half":
        MANIFESTS[tear] = json.dumps(whole | {json.loads(field): json.loads(value)}).encode()
    path.write_bytes({"cut": before[path.name][:-7], "empty": b"", "header": b"\xff" * 9999,
                      "other": before["shard-00000.safetensors"], **MANIFESTS}[tear])
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
    "one_pixel": (sample(images={"third": zeros(1, 1, 3, dtype=np.uint8)}), r"is uint8 \(1, 1, 3\), wanted"),
    "view_is_a_number": (sample(images={"third": 0, 3: None}), "'images' must be a dict"),
    "half_a_surrogate": (sample(instruction="pick \ud800"), "not empty, found 'pick .ud800'"),
    "nothing_counts": (sample(loss_mask=np.zeros(4, bool)), "'loss_mask' is False everywhere"),
    "keys_of_two_types": ({3: 1, "a": 2}, "no 'images'; it has"),
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
def two_arguments(a, b):
    return []
def leaves():
    raise SystemExit("no data\\nhere")
class Rows(list):
    def __getitem__(self, i):
        return [one, lambda i, T: {}["front"]][i == 3](i, 4)
def third_is_missing():
    return Rows(range(5))
class NoLength(Rows):
    def __len__(self):
        raise RuntimeError("no length")
def no_length():
    return NoLength()
def stops():
    yield one(0, 8)
    next(iter([]))
def with_stats(stats):
    rows = Rows(range(3))
    rows.stats = stats
    return rows
limits = {k: np.ones(3, np.float32) for k in ("mean", "std", "min", "max", "q01", "q99", "mask")}
def arrays():
    return with_stats({"mine": {"action": limits, "num_transitions": np.int64(3)}})
def short():
    return with_stats({"mine": {"action": limits | {"mask": [True]}}})
def three():
    return with_stats(3)
def empty_stats():
    return with_stats({"mine": {}})
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
    ("tabletop@octopus", "cannot drive 'octopus'; there are gripper, dual"), ("tabletop@", "cannot drive ''"),
    ("tabletop@gantry", "'gantry'"), ("tabletop+tabletop:two", "name each body once"),
    ("tabletop+tabletop@dual:fly", "'fly'"), ("tabletop@dual+imagenet", "found nothing there"),
    ("{}:two_arguments", "two_arguments: TypeError: .*missing 2"), ("{}:leaves", ":leaves: SystemExit: no"),
    ("{}:no_length", r"no_length, len\(\): RuntimeError: no length"),
])
def test_wrong_data_argument_says_what_is_wanted(user_file, tmp_path, spec, message):
    with pytest.raises(ValueError, match=message) as error:
        data.open_dataset(spec.format(user_file), cache=tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("text, message", [
    ("def f(:", "SyntaxError"), ("import nowhere", "ModuleNotFoundError"), ("1 / 0", "ZeroDivisionError"),
    ("raise SystemExit", "SystemExit")])
def test_file_that_cannot_be_imported_is_one_line(tmp_path, text, message):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ValueError, match=f"broken.py: {message}"):
        data.open_dataset(f"{tmp_path}/broken.py:make")


def test_statistics_of_a_user_are_checked_and_become_lists(user_file):
    stats = data.dataset_statistics(data.open_dataset(f"{user_file}:arrays", horizon=4))
    assert stats["mine"]["action"]["mask"] == [1] * 3 and stats["mine"]["num_transitions"] == 3
    for name in ("short", "three", "empty_stats"):
        with pytest.raises(ValueError, match=f":{name}, stats: no action statistics"):
            data.dataset_statistics(data.open_dataset(f"{user_file}:{name}", horizon=4))


def test_generator_that_breaks_off_names_the_sample(user_file):
    with pytest.raises(ValueError, match=":stops, sample 1: RuntimeError: generator raised StopIteration"):
        list(data.open_dataset(f"{user_file}:stops"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name, message", [("third_is_bad", r"'actions' is float32 \(5, 3\)"),
                                           ("third_is_missing", "KeyError: 'front'")])
def test_bad_sample_met_later_is_one_line_also_from_a_worker(user_file, workers, name, message):
    dataset = data.open_dataset(f"{user_file}:{name}", horizon=4)
    batches = data.loader(dataset, keep, indices, batch=1, shuffle=False, workers=workers)
    assert [next(batches)[0] for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(ValueError, match=f"{name}, sample 3: {message}") as error:
        next(batches)
    assert len(str(error.value).splitlines()) == 1


# ---- VLA-0's community form -------------------------------------------------------------------------------

TASKS = {"libero_goal/put_the_bowl_on_the_plate_demo.hdf5": {"demo_10": 13, "demo_9": 10, "demo_2": 8},
         "libero_90/KITCHEN_SCENE1_open_the_drawer_demo.hdf5": {"demo_0": 12}}


def write_hdf5(path, demos, change=lambda demo: demo, seed=0):
    """A file in LIBERO's layout: random actions and 4 x 6 pictures. demos: {name: frames}."""
    h5py, rng = pytest.importorskip("h5py"), np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, frames in demos.items():
            demo = {"actions": rng.uniform(-1, 1, (frames, 7)),
                    **{key: rng.integers(0, 256, (frames, 4, 6, 3), np.uint8) for key in data.CAMERAS}}
            demo["actions"][:, 5] = 0.3                                # a dimension that never varies
            for key, value in change(demo).items():
                file[f"data/{name}/{key}"] = value


@pytest.fixture
def libero(tmp_path):
    for seed, (name, demos) in enumerate(TASKS.items()):
        write_hdf5(tmp_path / "libero" / name, demos, seed=seed)
    return tmp_path / "libero"


def build(libero, out, **settings):
    return data.build_manifest(libero, out, workers=0, **settings)


def read_lines(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def one_line(function, match):
    with pytest.raises(ValueError, match=match) as error:
        function()
    assert len(str(error.value).splitlines()) == 1


def recorded():
    """What the original code was seen to do."""
    folder = Path(os.environ.get("GOLDEN_DIR") or ROOT / "tests" / "golden")
    return json.loads((folder / "vla0" / "seed_variant.json").read_text())


def manifest_of(folder, texts, names=("mins", "maxs"), instruction="wave", golden=None, **line):
    """A manifest as the original writes it: in a folder below its statistics, absolute paths. -> its path"""
    golden = golden or recorded()
    (folder / "train" / "images").mkdir(parents=True)
    np.savez(folder / "action_stats.npz", **{name: np.array(golden[key], np.float32)
                                             for name, key in zip(names, ("mins", "maxs"))})
    with open(folder / "train" / "manifest.jsonl", "w") as file:
        for i, text in enumerate(texts):
            image = folder / "train" / "images" / f"{i:08d}.png"
            Image.new("RGB", (12, 4), (i, 0, 0)).save(image)
            whole = {"instruction": instruction, "image_path": str(image), "target_action_text": text, "H": 8,
                     "D": 7, **line}
            file.write(json.dumps({key: value for key, value in whole.items() if value is not None}) + "\n")
    return folder / "train" / "manifest.jsonl"


@pytest.mark.golden
def test_builder_writes_the_recorded_integers_and_text(tmp_path):
    golden, path = recorded(), tmp_path / Path(recorded()["instruction"]["path"]).name
    actions = np.array(golden["actions"] + golden["actions"][:1])      # one more frame, or there is no sample
    write_hdf5(path, {"demo_0": 9}, lambda demo: {**demo, "actions": actions})
    (tmp_path / "images").mkdir()
    low, high = (np.array(golden[name], np.float32) for name in ("mins", "maxs"))
    line, = map(json.loads, data._write_samples(tmp_path, low, high, 8, 1000, (path, "demo_0", 0, 0)))
    assert line["target_action_text"] == golden["text"] and (line["H"], line["D"]) == (8, 7)
    assert line["instruction"] == golden["instruction"]["text"]
    never = {name: np.array(golden["constant_dim"][name], np.float32) for name in ("vec", "min", "max")}
    write_hdf5(path, {"demo_0": 2}, lambda demo: {**demo, "actions": np.stack([never["vec"]] * 2)})
    line, = map(json.loads, data._write_samples(tmp_path, never["min"], never["max"], 1, 1000,
                                                (path, "demo_0", 0, 0)))
    assert line["target_action_text"].split() == list(map(str, golden["constant_dim"]["ints"]))


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["clean", "masked"])
def test_manifest_decodes_as_recorded(tmp_path, kind):
    golden = recorded()["decode"][kind]
    dataset = data.open_dataset(str(manifest_of(tmp_path, [golden["input"]])))
    got = data.check_sample(dataset[0], horizon=8, action_dim=7, views=("third", "wrist"))
    assert np.array_equal(got["actions"], np.array(golden["actions"], np.float32))
    hidden = [["X" in word for word in step] for step in np.reshape(golden["input"].split(), (8, 7))]
    assert np.array_equal(got["loss_mask"], ~np.any(hidden, 1)) and got["action_text"] == golden["input"]


def test_built_samples_are_the_recordings_in_order(libero, tmp_path):
    import h5py
    import vla0
    assert build(libero, tmp_path / "out") == 4 + 5 + 2 + 0            # frames beyond the horizon of 8
    lines = read_lines(tmp_path / "out")
    dataset = data.open_dataset(str(tmp_path / "out" / "manifest.jsonl"), views=("third", "wrist"))
    limits = dataset.stats["libero_hdf5"]["action"]
    frames = [("libero_90/KITCHEN_SCENE1_open_the_drawer", "demo_0", t) for t in range(4)]
    frames += [("libero_goal/put_the_bowl_on_the_plate", demo, t)
               for demo, n in (("demo_9", 2), ("demo_10", 5)) for t in range(n)]
    recordings = {path: h5py.File(libero / path) for path in TASKS}
    every = [demo["actions"] for file in recordings.values() for demo in file["data"].values()]
    assert limits["min"] == np.concatenate(every).astype(np.float32).min(0).tolist()    # the short one's, too
    for i, ((task, demo, t), line) in enumerate(zip(frames, lines, strict=True)):
        recording, got = recordings[f"{task}_demo.hdf5"][f"data/{demo}"], dataset[i]
        low, high = (np.float32(limits[name]) for name in ("min", "max"))
        q = data.community_encode(recording["actions"][t:t + 8].astype(np.float32), low, high, 1000)
        assert line["target_action_text"] == got["action_text"] == vla0.to_text(q)
        np.testing.assert_allclose(got["actions"], vla0.decode_integers(q, low, high, 1000), atol=1e-6)
        assert got["loss_mask"].all()
        assert np.array_equal(got["images"]["third"], recording[data.CAMERAS[0]][t])     # not turned
        assert np.array_equal(got["images"]["wrist"], recording[data.CAMERAS[1]][t])
        assert got["instruction"] == task.split("/")[1].replace("_", " ")


@pytest.mark.parametrize("left", ["half_a_line", "no_newline", "nothing", "second_demo", "zeros"])
def test_interrupted_build_gives_the_same_bytes(libero, tmp_path, monkeypatch, left):
    build(libero, tmp_path / "whole")
    whole, write, calls = tree(tmp_path / "whole"), data._write_samples, []
    def interrupted(*args):
        lines = write(*args)                                           # its pictures are there, its lines not
        calls.append(len(lines))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return lines
    monkeypatch.setattr(data, "_write_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(libero, tmp_path / "cut")
    manifest = tmp_path / "cut" / "manifest.jsonl"
    raw = manifest.read_bytes()
    assert raw.count(b"\n") == sum(calls[:2]) == 6 and whole["manifest.jsonl"].startswith(raw)
    keep = {"half_a_line": raw[:-40], "no_newline": raw[:-1], "nothing": b"", "second_demo": raw,
            "zeros": raw[:-40] + bytes(40)}[left]
    manifest.write_bytes(keep)
    (tmp_path / "cut" / "images" / "00000007.png").write_bytes(b"half a picture")
    monkeypatch.setattr(data, "_write_samples", write)
    one_line(lambda: data.open_dataset(str(manifest)), "holds [06] samples of 11; run build-manifest|is torn")
    build(libero, tmp_path / "cut")
    assert tree(tmp_path / "cut") == whole
    before = (tmp_path / "cut" / "images" / "00000000.png").stat().st_mtime_ns
    build(libero, tmp_path / "cut")                                    # nothing left to do
    assert tree(tmp_path / "cut") == whole
    assert (tmp_path / "cut" / "images" / "00000000.png").stat().st_mtime_ns == before


def test_folder_of_another_origin_is_refused_and_left_alone(libero, tmp_path):
    out, foreign = tmp_path / "out", tmp_path / "foreign"
    build(libero, out)
    before = tree(out)
    one_line(lambda: build(libero, out, horizon=4), r"something else \(horizon, samples differ\)")
    one_line(lambda: build(libero, out, num_bins=100), r"something else \(num_bins differ\)")
    write_hdf5(libero / "libero_10" / "wave_demo.hdf5", {"demo_0": 9})
    one_line(lambda: build(libero, out), r"something else \(files, .*samples differ\)")
    assert tree(out) == before
    manifest_of(foreign, ["1"])
    before = tree(foreign)
    for folder in (foreign, foreign / "train"):                        # there: its statistics, its manifest
        one_line(lambda folder=folder: build(libero, folder), "built from something else")
    assert tree(foreign) == before


BAD_HDF5 = {
    "wrist": (lambda demo: {key: demo[key] for key in ("actions", "obs/agentview_rgb")}, "eye_in_hand_rgb"),
    "one_picture_less": (lambda demo: {**demo, data.CAMERAS[1]: demo[data.CAMERAS[1]][1:]}, "wanted twice"),
    "floats": (lambda demo: {key: x.astype(float) for key, x in demo.items()}, "float64.*wanted twice uint8"),
    "nan": (lambda demo: {**demo, "actions": demo["actions"] * np.nan}, r"demo_0: actions is nan at \[0, 0"),
    "six_numbers": (lambda demo: {**demo, "actions": demo["actions"][:, :6]}, r"\(12, 6\), wanted.*\(T, 7\)"),
    "actions_in_a_row": (lambda demo: {**demo, "actions": demo["actions"][:, 0]}, r"float32 \(12,\), wanted"),
    "group": (lambda demo: {"actions/x": demo["actions"]}, "is not as in LIBERO's HDF5"),
}


@pytest.mark.parametrize("name", BAD_HDF5)
def test_bad_recording_is_one_line_that_names_the_file(libero, tmp_path, name):
    change, message = BAD_HDF5[name]
    write_hdf5(libero / "libero_x" / "bad_demo.hdf5", {"demo_0": 12}, change)
    one_line(lambda: build(libero, tmp_path / "out"), f"bad_demo.hdf5.*{message}")
    assert not (tmp_path / "out").exists()


def test_wrong_inputs_of_a_build_are_one_line(libero, tmp_path, monkeypatch):
    one_line(lambda: build(tmp_path / "nowhere", tmp_path / "out"), "0 files")
    one_line(lambda: build(libero, tmp_path / "out", horizon=0), "horizon=0")
    one_line(lambda: build(libero, tmp_path / "out", horizon=13), "no demonstration has more than 13 frames")
    (libero / "torn.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))
    one_line(lambda: build(libero, tmp_path / "out"), "torn.hdf5 is not as in LIBERO's HDF5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    one_line(lambda: build(libero, tmp_path / "out"), "needs a package; run: pip install h5py")


def test_who_stops_early_does_not_wait_for_what_is_being_computed(tmp_path):
    """Ctrl-C with --workers: one job is done, one runs, others are queued; none of them gets to its end."""
    slow = "import time, pathlib; time.sleep(4); pathlib.Path({!r}).touch()"
    jobs = data._in_processes(exec, ["0", *(slow.format(str(tmp_path / name)) for name in "abc")], 1)
    next(jobs)
    jobs.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [("mins", "maxs"), ("action_mins", "action_maxs")])
@pytest.mark.parametrize("beside", [True, False])
def test_statistics_are_read_under_both_names_and_places(tmp_path, names, beside):
    golden, path = recorded(), manifest_of(tmp_path, [recorded()["text"]], names)
    if beside:
        (tmp_path / "action_stats.npz").rename(path.parent / "action_stats.npz")
    dataset = data.open_dataset(str(path))
    stats = data.dataset_statistics(dataset)["libero_hdf5"]
    assert stats["action"]["min"] == golden["mins"] and stats["action"]["max"] == golden["maxs"]
    assert stats["action"]["q99"] and stats["num_transitions"] == stats["num_trajectories"] == 1


def test_moved_pictures_are_found_beside_the_manifest(tmp_path):
    manifest_of(tmp_path / "before", [recorded()["text"]])
    (tmp_path / "before").rename(tmp_path / "after")
    dataset = data.open_dataset(str(tmp_path / "after" / "train" / "manifest.jsonl"))
    assert dataset[0]["images"]["wrist"].shape == (4, 6, 3)


TEXT = " ".join(["500"] * 56)
BAD_LINES = {
    "count": (dict(texts=[TEXT, TEXT + " 1"]), "line 2: wanted 56 integers in 0..1000"),
    "range": (dict(texts=[TEXT[:-3] + "1001"]), "line 1: wanted 56 integers"),
    "sign": (dict(texts=["-" + TEXT]), "line 1: wanted 56 integers"),
    "words": (dict(texts=["Numbers: " + TEXT]), "line 1: wanted 56 integers"),
    "double_space": (dict(texts=[TEXT.replace(" ", "  ", 1)]), "line 1: wanted 56 integers"),
    "no_text": (dict(texts=[""]), "line 1: .* strings that are not empty"),
    "no_instruction": (dict(texts=[TEXT], instruction=" "), "line 1: .* strings that are not empty"),
    "number": (dict(texts=[7]), "line 1: .* strings that are not empty"),
    "no_D": (dict(texts=[TEXT], D=None), "line 1 .* has not all of instruction, .*'D'"),
    "horizon": (dict(texts=[TEXT], H=4), "line 1: H=4, D=7; the model's horizon is 8"),
    "empty": (dict(texts=[]), "holds 0 samples of at least 1"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_manifest_is_one_line_that_names_its_line(tmp_path, name):
    change, message = BAD_LINES[name]
    path = manifest_of(tmp_path, **change)
    one_line(lambda: data.open_dataset(str(path)), f"manifest.jsonl.*{message}")


def test_torn_parts_of_a_manifest_are_one_line(tmp_path):
    path = manifest_of(tmp_path, [TEXT, TEXT])
    image, stats, raw = path.parent / "images/00000000.png", tmp_path / "action_stats.npz", path.read_bytes()
    one_line(lambda: data.open_dataset(str(path), horizon=4), "the model's horizon is 4")
    one_line(lambda: data.open_dataset(str(path), action_dim=6), r"\(8, 7\), wanted float32 \(8, 6\)")
    one_line(lambda: data.open_dataset(str(path), views=("top",)), "no view 'top'")
    for line in (raw[:-9], raw + b"[1]\n", raw + b"\n", raw + b"\xff\n"):
        path.write_bytes(line)
        one_line(lambda: data.open_dataset(str(path)), "line [23] is torn, or has not all of")
    path.write_bytes(raw)
    for picture in (image.read_bytes()[:-30], b"", None):
        image.unlink() if picture is None else image.write_bytes(picture)
        one_line(lambda: data.open_dataset(str(path)), "line 1: .*00000000.png is no picture of two halves")
    Image.new("RGB", (11, 4)).save(image)
    one_line(lambda: data.open_dataset(str(path)), "line 1: .*00000000.png is no picture of two halves")
    Image.new("RGB", (12, 4)).save(image)
    for torn in (stats.read_bytes()[:-30], b"", b"no archive", None):
        stats.unlink() if torn is None else stats.write_bytes(torn)
        one_line(lambda: data.open_dataset(str(path)), "action_stats.npz, the range .* cannot be read: .")
    for wrong in (dict(mins=np.zeros(7)), dict(mins=np.ones(7), maxs=np.zeros(7)),
                  dict(mins=np.zeros(7), maxs=np.full(7, np.nan))):
        np.savez(stats, **wrong)
        one_line(lambda: data.open_dataset(str(path)), "action_stats.npz, the range .* cannot be read: .")
    np.savez(stats, mins=np.zeros(6), maxs=np.ones(6))
    one_line(lambda: data.open_dataset(str(path)), "line 1: H=8, D=7; .* have 6 numbers")


def mask(text, rng, share=0.2):
    return "".join("X" if c.isdigit() and rng.random() < share else c for c in text)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_every_twentieth_episode_is_held_out_whole(tmp_path, share):
    """Also in the original's files, which do not say where an episode ends, and hide digits."""
    rng, texts = np.random.default_rng(0), []
    for _ in range(41):
        q = rng.integers(0, 1001, (8 + rng.integers(1, 6), 7))
        texts.append([mask(" ".join(map(str, q[t:t + 8].ravel())), rng, share) for t in range(len(q) - 8)])
    path = str(manifest_of(tmp_path, [text for episode in texts for text in episode]))
    found = {split: [one["action_text"] for one in data._each(data.open_dataset(path, split))]
             for split in ("train", "val")}
    assert found["val"] == texts[19] + texts[39]
    assert found["train"] == list(itertools.chain(*texts[:19], *texts[20:39], *texts[40:]))
    stats = data.open_dataset(path, "val").stats["libero_hdf5"]
    assert (stats["num_trajectories"], stats["num_transitions"]) == (41, sum(map(len, texts)))


def test_short_manifest_has_no_validation_set(tmp_path):
    assert data.open_dataset(str(manifest_of(tmp_path, [TEXT])), "val") is None


@pytest.mark.golden
def test_hidden_digits_are_reported_and_are_inputs_never_targets(tmp_path, capsys):
    import vla0
    golden = recorded()
    dataset = data.open_dataset(str(manifest_of(tmp_path, [golden["masked_text"], golden["text"]])),
                                views=("third", "wrist"))
    said = [line for line in capsys.readouterr().err.splitlines() if "X" in line]
    number = golden["masked_text"].count("X")
    assert len(said) == 1 and f"{number} digits are hidden as X, in 1 of 2 samples" in said[0]
    cfg = vla0.configure(vla0.PRESETS["tiny"], views=("third", "wrist"), horizon=8, num_bins=1000,
                         padding="repeat")
    tokenizer = vla0.load_tokenizer(cfg)
    hidden, clean = (vla0.prepare(dataset[i], cfg, tokenizer, dataset.stats) for i in range(2))
    assert capsys.readouterr().err == ""                               # once, not at every sample
    start = len(hidden["ids"]) - 2 - len(golden["text"])
    assert (hidden["labels"][:start] == -100).all()
    for at, (c, true) in enumerate(zip(golden["masked_text"], golden["text"], strict=True), start):
        token = cfg.space_id if true == " " else cfg.digit_id + int(true)
        assert clean["ids"][at] == clean["labels"][at] == token
        assert hidden["ids"][at] == (cfg.mask_id if c == "X" else token)
        assert hidden["labels"][at] == (-100 if c == "X" else token)
    assert (hidden["labels"] == cfg.mask_id).sum() == 0                # X is never learnt


def test_built_set_knows_its_integers_and_hides_none(libero, tmp_path, capsys):
    build(libero, tmp_path / "out", horizon=4, num_bins=100)
    capsys.readouterr()
    dataset = data.open_dataset(str(tmp_path / "out" / "manifest.jsonl"), horizon=4)
    assert "hidden as X" not in capsys.readouterr().err
    got, copy = dataset[0], pickle.loads(pickle.dumps(dataset))
    assert np.abs(got["actions"]).max() <= 1 and max(map(int, got["action_text"].split())) <= 100
    assert np.array_equal(copy[0]["actions"], got["actions"])


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


# ---- The traps of ecosystem.md section 5 --------------------------------------------------------------------

def test_trap_12_what_stands_on_mujoco_wants_one_below_4():
    """robosuite 1.5.2 fails at its first reset with MuJoCo 4: what is said to install, names an older one."""
    for sim in ("libero", "metaworld"):
        assert "mujoco==3." in " ".join(eval_sim.PARTS[sim][0].values()), sim
    assert '"mujoco==3.' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_numbered_trap_has_a_test_named_after_it():
    named = set(re.findall(r"^def test_trap_(\d+b?)_", "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")), re.M))
    assert named == {"1b", *map(str, range(1, 16))}


# ---- Command line -----------------------------------------------------------------------------------------

def test_make_then_describe(tmp_path, capsys):
    code, out, err = run_cli("--make", "--episodes", 2, "--families", "all", "--views", "third,wrist",
                             "--image-size", 16, "--workers", 0, env={"XDG_CACHE_HOME": str(tmp_path)})
    assert code == 0, err
    folder = next((tmp_path / "plainvla").glob("tabletop-train-*"))
    assert "generating 2 episodes" in err and "2/2" in err
    assert "2 episodes" in out and "'wrist': (16, 16, 3)" in out
    raw = bytearray((folder / "shard-00000.safetensors").read_bytes())
    raw[-1] ^= 1                                                       # one flipped bit, same size
    (folder / "shard-00000.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="1 parts are damaged"):
        data.describe(str(folder))
    assert "shard-00000.safetensors is torn or changed: its checksum" in capsys.readouterr().out


def test_describe_tells_a_manifest_and_lists_all_its_damage(tmp_path, capsys):
    path = manifest_of(tmp_path / "set", [TEXT, TEXT, TEXT.replace("500", "9", 56), TEXT])
    data.describe(str(path), tmp_path / "sheet.png")
    said = capsys.readouterr().out
    for text in ("4 lines, 0 of them damaged; 4 frames, 1 to 2 in an episode, median 1; 1 tasks", "horizon 8, integers",
                 "'wrist': (4, 6, 3)", "actions: (8, 7)", "action q99"):
        assert text in said, text
    assert Image.open(tmp_path / "sheet.png").size == (2 * (96 * 6 // 4) * 2, 3 * 112)
    path.write_text(path.read_text().replace('"D": 7', '"D": 8', 1))
    (path.parent / "images" / "00000003.png").unlink()
    one_line(lambda: data.describe(str(path)), "2 parts are damaged")
    said = capsys.readouterr().out
    assert "4 lines, 2 of them damaged" in said and said.count("\ndamaged ") == 2
    assert "line 1: H=8, D=8" in said and "line 4: " in said and "00000003.png is no picture" in said


def test_describe_tells_what_a_users_function_gives(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("""import numpy as np
def make(horizon, bad=3):
    return [{"images": {"third": np.zeros((6, 8, 3), np.uint8)}, "instruction": f"pick {i}", "dataset": "mine",
             "state": np.zeros(8, np.float32), "actions": np.full((horizon, 7), i / 0.25 if i < bad else np.nan,
             np.float32), "loss_mask": np.ones(horizon, bool)} for i in range(5)]
def good(horizon):
    return make(horizon, 9)
def stream():
    return iter(make(4))
""")
    data.describe(f"{tmp_path}/mine.py:good")
    said = capsys.readouterr().out
    assert "5 samples, 0 of them damaged; 5 samples; 5 tasks" in said and "action q99    16.0000" in said
    one_line(lambda: data.describe(f"{tmp_path}/mine.py:make"), "2 parts are damaged")
    assert "damaged      sample 3: " in capsys.readouterr().out
    one_line(lambda: data.describe(f"{tmp_path}/mine.py:stream"), "has no len")


@pytest.mark.slow
def test_build_manifest_command_in_two_processes_then_a_loader(libero, tmp_path):
    code, out, err = run_cli("build-manifest", "--hdf5", libero, "--out", tmp_path / "two", "--workers", 2)
    assert code == 0 and f"11 samples; train on them with --data {tmp_path}/two/manifest.jsonl" in out, err
    assert "11/11" in err
    build(libero, tmp_path / "one")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    dataset = data.open_dataset(f"{tmp_path}/two/manifest.jsonl")
    (values, _), = itertools.islice(data.loader(dataset, keep, indices, 11, shuffle=False, workers=1), 1)
    assert values == [int(dataset[i]["images"]["third"].flat[0]) for i in range(11)]


def test_bad_command_lines_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    make = ["--make", "--episodes", "2", "--workers", "0", "--image-size", "16", "--cache"]
    here, wrong = str(tmp_path), [["--split", "tests"], ["--families", "juggle"], ["--views", "top"],
                                  ["--episodes", "0"], ["--episodes", "9999999"], ["--image-size", "0"],
                                  ["--body", "octopus"]]
    for args in [[], ["--make", "folder"], [here + "/nowhere"], [here], make + [here + "/file"],
                 make + [here + "/file/below"], ["build-manifest", "--hdf5", here, "--out", here + "/out"]
                 ] + [make + [here] + change for change in wrong]:
        monkeypatch.setattr(sys, "argv", ["data.py", *args])
        with pytest.raises(SystemExit) as left:
            data.cli(data.main)
        lines = capsys.readouterr().err.strip().splitlines()
        assert left.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (args, lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_full_disk_is_one_line_and_leaves_no_torn_shard(tmp_path):
    args = ("--make", "--episodes", 3, "--image-size", 32, "--workers", 0, "--cache", tmp_path)
    code, _, err = run_cli(*args, fsize=20_000)
    assert code == 2 and "cannot write" in err.splitlines()[-1] and "Traceback" not in err
    assert [path.name for path in next(tmp_path.glob("tabletop-*")).iterdir()] == [".lock"]
    assert len(data.tabletop(episodes=3, image_size=32, workers=0, cache=tmp_path).episodes) == 3


def test_history_is_the_frames_before_of_the_same_episode(tmp_path):
    alone, with_past = (data.tabletop("val", 2, ("pick",), image_size=32, horizon=2, history=n, cache=tmp_path,
                                      workers=0) for n in (1, 3))
    for i in range(len(alone)):
        sample, first = with_past[i], next(s for s in reversed(alone.at.tolist()) if s <= i)
        frames, actions = sample["history_images"]["third"], sample["history_actions"]
        assert len(frames) == len(actions) == min(2, i - first)
        for back, (frame, action) in enumerate(zip(frames[::-1], actions[::-1]), 1):
            assert np.array_equal(frame, alone[i - back]["images"]["third"])
            assert np.array_equal(action, alone[i - back]["actions"][0])
    assert "history_images" not in alone[3]
