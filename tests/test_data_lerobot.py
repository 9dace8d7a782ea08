"""data.py's LeRobot and LIBERO: sets of every version from a writer of the tests' own, traps, damage, round trips."""
import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import forks
from fixtures import write_lerobot

try:
    import av
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as e:
    pa = None
    MISSING = f"{e.name} is not installed (pip install pyarrow av)"
lerobot = pytest.mark.skipif(pa is None, reason="" if pa else MISSING)
VERSIONS, LENGTHS, FPS = ("v2.0", "v2.1", "v3.0"), (5, 3, 6), 10
FIXTURE = Path(__file__).parent / "fixtures" / "lerobot_v30"
THIRD, WRIST = "observation.images.image", "observation.images.wrist_image"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- A writer that shares nothing with data.py: the format as ecosystem.md section 1.1 says it -------------

def colour(episode, frame, camera):
    return 40 + 40 * episode, 40 + 20 * frame, (30, 200)[camera]


def picture(episode, frame, camera, size=(32, 48)):
    return np.full((*size, 3), colour(episode, frame, camera), np.uint8)


def numbers(episode, n):
    """state (n, 3), actions (n, 4): every number tells its episode and frame."""
    t = np.arange(n)[:, None] + 100 * episode
    state = (t + np.arange(3) / 4).astype(np.float32)
    return state, np.concatenate([t + np.arange(3) / 8, np.where(t % 2, 1, -1)], 1).astype(np.float32)


def mp4(path, pictures, fps=FPS):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options={"g": "4", "crf": "5"})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for x in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(x, "rgb24")))
        file.mux(stream.encode())


def png(x):
    Image.fromarray(x).save(file := io.BytesIO(), "PNG")
    return {"bytes": file.getvalue(), "path": "somewhere/else.png"}


def table(episodes, cameras, action, state, shuffle, start=0):
    """Episodes -> the table of a data file. cameras: {key: number} of those inside of it."""
    columns = {state: [], action: [], "timestamp": [], "frame_index": [], "episode_index": [], "index": [],
               "task_index": [], **{key: [] for key in cameras}}
    for e in episodes:
        for i, (s, a) in enumerate(zip(*numbers(e, LENGTHS[e]))):
            row = {state: s.tolist(), action: a.tolist(), "timestamp": i / FPS, "frame_index": i,
                   "episode_index": e, "index": start + len(columns["index"]), "task_index": e % 2,
                   **{key: png(picture(e, i, camera)) for key, camera in cameras.items()}}
            for key, value in row.items():
                columns[key].append(value)
    kinds = {state: pa.list_(pa.float32(), 3), action: pa.list_(pa.float32()), "timestamp": pa.float32()}
    found = pa.table({key: pa.array(x, kinds.get(key)) for key, x in columns.items()})
    return found.take(np.random.default_rng(0).permutation(len(found))) if shuffle else found


def make(root, version="v3.0", video=True, action="action", state="observation.state", cameras=(THIRD, WRIST),
         task_column="__index_level_0__", shuffle=False, **info):
    """A set of three episodes and two tasks. Returns its folder."""
    cameras, v3 = {key: i for i, key in enumerate(cameras)}, version == "v3.0"
    kind = {"dtype": "video" if video else "image", "shape": [3, None, 224], "names": None}
    features = {state: {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "z"]}},
                action: {"dtype": "float32", "shape": [4], "names": None}} | dict.fromkeys(cameras, kind)
    name = "chunk-{chunk_index:03d}/file-{file_index:03d}" if v3 else (
        "chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}")
    about = {"codebase_version": version, "robot_type": None, "fps": float(FPS), "chunks_size": 2, "features": features,
             "total_episodes": 3, "data_path": f"data/{name}.parquet".replace("/{video_key}", ""),
             "video_path": (f"videos/{{video_key}}/{name}.mp4" if v3 else f"videos/{name}.mp4") if video else None}
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(about | info))
    (root / "meta" / "stats.json").write_text(json.dumps({action: {"q01": [9] * 4, "q99": [9] * 4}}))
    tasks, inside = [{"task_index": i, task_column: f"do {i}"} for i in range(2)], {} if video else cameras
    groups = ([0, 1], [2]) if v3 else ([0], [1], [2])          # which episodes share a file
    rows = []
    for number, group in enumerate(groups):
        at = {"chunk_index": 0, "file_index": number, "episode_chunk": number // 2, "episode_index": number}
        path = root / about["data_path"].format(**at)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(group, inside, action, state, shuffle), path, row_group_size=3)
        start = 0
        for e in group:
            row = {"episode_index": e, "tasks": [f"do {e % 2}"], "length": LENGTHS[e], "data/chunk_index": 0,
                   "data/file_index": number, "stats/x/q01": [9.0]}
            for key in cameras if video else ():
                row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": number,
                        f"videos/{key}/from_timestamp": start / FPS, f"videos/{key}/to_timestamp": (start + LENGTHS[e]) / FPS}
            rows.append(row)
            start += LENGTHS[e]
        for key, camera in cameras.items() if video else ():
            frames = [picture(e, i, camera) for e in group for i in range(LENGTHS[e])]
            mp4(root / about["video_path"].format(video_key=key, **at), frames)
    if v3:
        (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
        pq.write_table(pa.table({key: [row[key] for row in rows] for key in rows[0]}),
                       root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
        pq.write_table(pa.Table.from_pylist(tasks), root / "meta" / "tasks.parquet")
    else:
        lines = {"episodes": rows, "tasks": [{"task_index": t["task_index"], "task": t[task_column]} for t in tasks]}
        for file, content in lines.items():
            (root / "meta" / f"{file}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in content))
    return root


def reader(root, **how):
    options = {"val": "0"} | how.pop("options", {})
    return data.LeRobot(root, options=options, **{"views": ("third", "wrist"), "horizon": 4} | how)


# ---- Reading ----------------------------------------------------------------------------------------------

@lerobot
@pytest.mark.parametrize("video", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_field_of_every_version(tmp_path, version, video):
    found = reader(make(tmp_path / "set", version, video, shuffle=version == "v3.0"), history=3)
    assert len(found) == sum(LENGTHS) and not found.damaged
    index = 0
    for e, n in enumerate(LENGTHS):
        state, actions = numbers(e, n)
        for i in range(n):
            sample = data.check_sample(found[index], horizon=4, action_dim=4, state_dim=3, views=("third", "wrist"))
            rows = np.minimum(np.arange(i, i + 4), n - 1)      # never across the episode's end
            assert (sample["actions"] == actions[rows]).all() and (sample["state"] == state[i]).all()
            assert (sample["loss_mask"] == (np.arange(i, i + 4) < n)).all()
            assert (sample["instruction"], sample["dataset"]) == (f"do {e % 2}", "set")
            past = range(max(0, i - 2), i)
            assert np.array_equal(sample.get("history_actions", np.zeros((0, 4))), actions[past.start:i])
            for camera, view in enumerate(("third", "wrist")):
                shown = [*sample.get("history_images", {}).get(view, ()), sample["images"][view]]
                for frame, x in zip((*past, i), shown, strict=True):
                    off = np.abs(x.astype(int) - picture(e, frame, camera)).max()
                    assert off <= (4 if video else 0), (e, frame, view)
            index += 1


@lerobot
def test_a_set_that_lerobot_wrote(tmp_path):
    """lerobot 0.4.4 wrote it (fixtures/write_lerobot.py) and reads the same: pixels, too, of all 26 frames."""
    found, index = reader(FIXTURE, history=2), 0
    for e, n in enumerate(write_lerobot.LENGTHS):
        frames = [write_lerobot.frame(e, i) for i in range(n)]
        for i, frame in enumerate(frames):
            sample, rows = found[index], np.minimum(np.arange(i, i + 4), n - 1)
            assert np.array_equal(sample["actions"], [frames[j]["action"] for j in rows])
            assert np.array_equal(sample["state"], frame["observation.state"]) and sample["instruction"] == frame["task"]
            assert np.array_equal(sample["images"]["wrist"], frame["observation.images.wrist_image"])
            shown = {i: sample["images"]["third"], i - 1: sample.get("history_images", {}).get("third", [None])[0]}
            for j in (i, i - 1)[:1 + (i > 0)]:                 # flat halves, through a lossy codec
                off = shown[j].astype(int) - frames[j]["observation.images.image"]
                assert max(np.abs(half.mean((0, 1))).max() for half in (off[:, 4:28], off[:, 36:])) < 7, (e, j)
            index += 1
    assert index == len(found) == 26 and not [*found.check()]


@lerobot
def test_trap_2_quantiles_of_lerobots_stats_json_are_wrong_and_not_read():
    action = reader(FIXTURE).stats["lerobot_v30"]["action"]
    x = np.array([write_lerobot.frame(e, i)["action"] for e, n in enumerate(write_lerobot.LENGTHS) for i in range(n)])
    theirs = json.loads((FIXTURE / "meta" / "stats.json").read_text())["action"]
    for name, share in (("q01", 0.01), ("q99", 0.99)):
        assert np.allclose(action[name], np.quantile(x.astype(np.float64), share, axis=0), rtol=1e-12)
        assert abs(theirs[name][2] - action[name][2]) > 8      # 11.15 for 0 and for 20: a mean of the episodes'


@lerobot
def test_trap_2_quantiles_are_those_of_all_rows_not_of_stats_json(tmp_path):
    found = reader(make(tmp_path / "set"))
    x = np.concatenate([numbers(e, n)[1] for e, n in enumerate(LENGTHS)]).astype(np.float64)
    action = found.stats["set"]["action"]
    for name, wanted in {"q01": np.quantile(x, 0.01, 0), "q99": np.quantile(x, 0.99, 0), "mean": x.mean(0),
                         "std": x.std(0), "min": x.min(0), "max": x.max(0)}.items():
        assert np.allclose(action[name], wanted, rtol=1e-12), name
    assert action["mask"] == [True, True, True, False]         # the last is in [-1, 1]: a gripper's
    assert found.stats["set"]["num_transitions"] == len(x)
    for options in ({"gripper": "none"}, {"action": "observation.state"}):             # beyond [-1, 1]: no gripper
        assert all(reader(tmp_path / "set", options=options).stats["set"]["action"]["mask"])


@lerobot
@pytest.mark.parametrize("column", ["__index_level_0__", "task"])
def test_trap_13_the_text_of_a_task_is_in_whichever_column_is_not_its_number(tmp_path, column):
    assert reader(make(tmp_path / "set", task_column=column)).tasks == ["do 0", "do 1"]


@lerobot
def test_trap_14_one_set_says_actions_in_the_plural(tmp_path):
    """physical-intelligence/libero's names."""
    root = make(tmp_path / "set", "v2.0", False, "actions", "state", ("image", "wrist_image"))
    found = reader(root)
    assert found.views == {"third": "image", "wrist": "wrist_image"}
    assert (found.action, found.state) == ("actions", "state") and found[0]["state"].shape == (3,)


@lerobot
def test_trap_8_openvlas_gripper_is_1_where_liberos_is_minus_1(tmp_path):
    found = reader(make(tmp_path / "set"), options={"gripper": "openvla"})
    stored = np.concatenate([numbers(e, n)[1][:, -1] for e, n in enumerate(LENGTHS)])
    assert [found[i]["actions"][0, -1] for i in range(len(found))] == np.where(stored < 0, 1, 0).tolist()
    assert found.stats["set"]["action"]["min"][3] == 0


@lerobot
def test_names_are_tried_in_order_then_asked_for(tmp_path):
    root = make(tmp_path / "set", cameras=("observation.images.cam_left", "observation.images.top"))
    found = reader(root, views=("third", "cam_left"))
    assert found.views == {"third": "observation.images.top", "cam_left": "observation.images.cam_left"}
    assert reader(root, views=("left", "right")).views["right"] == "observation.images.top"    # the set's order
    asked = {"third": "observation.images.cam_left", "state": "action", "name": "mine", "embodiment": "arm"}
    found = reader(root, views=("third",), options=asked)
    assert found.views == {"third": asked["third"]} and list(found.stats) == ["mine"]
    assert found[0]["state"].shape == (4,) and found[0]["embodiment"] == "arm"
    assert list(reader(root, views=()).views) == ["cam_left", "top"]       # all
    for how, complaint in (({"views": ("a", "b", "c")}, "views wanted"), ({"options": {"third": "nose"}}, "'nose'"),
                           ({"options": {"action": "acts"}}, "no column 'acts'; did you mean 'action'"),
                           ({"options": {"gripper": "shut"}}, "shut"), ({"options": {"nmae": "x"}}, "'name'"),
                           ({"options": {"val": "x"}}, "val='x'")):
        with pytest.raises(ValueError, match=complaint):
            reader(root, **how)


@lerobot
def test_every_20th_episode_validates_and_sets_are_joined(tmp_path):
    one, two = make(tmp_path / "one"), make(tmp_path / "two", "v2.1", False)
    wanted = {"views": ("third",), "horizon": 2, "action_dim": 4}
    assert data.open_dataset(str(one), "val", **wanted) is None
    train, val = (data.open_dataset(f"lerobot={one},val=3", split, **wanted) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 6) and val[0]["actions"][0, 0] == 200
    both = data.open_dataset(f"lerobot={one}+lerobot={two},name=2", **wanted)
    assert len(both) == 28 and both[14]["dataset"] == "2" and list(data.dataset_statistics(both)) == ["one", "2"]
    assert len(data.open_dataset(str(one), episodes=2, **wanted)) == 8
    with pytest.raises(ValueError, match="sets of one name"):
        data.open_dataset(f"lerobot={one}+lerobot={one}", **wanted)
    with pytest.raises(ValueError, match=r"actions' is float32 \(2, 4\), wanted"):
        data.open_dataset(str(one), **wanted | {"action_dim": 7})


@lerobot
def test_what_the_pass_over_the_rows_found_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    root = make(tmp_path / "set")
    first = reader(root)
    scan = data.LeRobot.scan
    monkeypatch.setattr(data.LeRobot, "scan", lambda self: pytest.fail("read again"))
    second = reader(root)
    assert second.stats == first.stats and np.array_equal(second[7]["actions"], first[7]["actions"])
    monkeypatch.setattr(data.LeRobot, "scan", scan)
    path = root / "data" / "chunk-000" / "file-001.parquet"
    pq.write_table(table([2], {}, "action", "observation.state", False), path)
    os.utime(path, (1, 1))
    assert reader(root).stats == first.stats
    os.utime(path, (2, 2))                                     # as large as before, but younger
    assert reader(root).stats == first.stats
    left = set((tmp_path / "cache").rglob("*.safetensors"))
    assert len(left) == 3
    monkeypatch.setattr(data, "_mark", lambda path: (1,))
    reader(root)                                               # other marks: another file
    kept, = set((tmp_path / "cache").rglob("*.safetensors")) - left
    kept.write_bytes(kept.read_bytes()[:-7])
    with pytest.raises(ValueError, match="torn or changed"):
        reader(root)


@lerobot
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("video", [True, False])
def test_a_worker_opens_its_own_files(tmp_path, video):
    """A container that was open before the fork is neither used nor closed by the workers."""
    found = reader(make(tmp_path / "set", video=video))
    wanted = [found[i]["images"]["third"] for i in range(len(found))]      # now all is open here
    batches = data.loader(found, lambda sample, key: sample["images"]["third"], lambda batch: batch, 14, workers=2,
                          shuffle=False)
    for _ in range(2):
        assert all(map(np.array_equal, next(batches), wanted))
    assert np.array_equal(found[3]["images"]["third"], wanted[3])
    copy = pickle.loads(pickle.dumps(found))                               # spawned workers get this
    assert not copy.videos.files and np.array_equal(copy[3]["images"]["third"], wanted[3])


def test_only_the_last_files_stay_open_and_a_fork_has_its_own(monkeypatch):
    opened = []
    files = data.Opened(lambda name: opened.append(name) or name.upper(), most=2)
    assert [files(name) for name in "abacab"] == list("ABACAB") and opened == list("abcb")
    pid = next(iter(files.files))
    assert list(files.files[pid]) == [("a",), ("b",)]
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    assert files("b") == "B" and opened[4:] == ["b"] and list(files.files[pid]) == [("a",), ("b",)]


@lerobot
def test_odd_but_whole_infos_are_read(tmp_path):
    info = {"codebase_version": "v2.1", "fps": 10, "video_path": None, "robot_type": None, "splits": {}}
    root = make(tmp_path / "set", "v2.1", False, **info)
    about = json.loads((root / "meta" / "info.json").read_text())
    about["features"] |= {"next.done": {"dtype": "bool", "shape": [1], "names": None, "fps": 10.0}}
    (root / "meta" / "info.json").write_text(json.dumps(about))
    assert reader(root)[0]["images"]["third"].shape == (32, 48, 3)         # the frame's, not info.json's


# ---- Damage -----------------------------------------------------------------------------------------------

def without(path, column):
    pq.write_table(pq.read_table(path).drop_columns([column]), path)


def replace(path, column, change):
    found = pq.read_table(path)
    values = change(found[column].to_pylist())
    pq.write_table(found.set_column(found.schema.names.index(column), column, pa.array(values)), path)


DATA, MP4 = "data/chunk-000/file-001.parquet", f"videos/{THIRD}/chunk-000/file-001.mp4"
META = "meta/episodes/chunk-000/file-000.parquet"
DAMAGE = {                 # of episode 2; name: (what is done to the set, what is said)
    "missing mp4": (lambda root: (root / MP4).unlink(), "file-001.mp4 is missing"),
    "missing data": (lambda root: (root / DATA).unlink(), "file-001.parquet is missing"),
    "torn data": (lambda root: (root / DATA).write_bytes((root / DATA).read_bytes()[:200]), "not as in LeRobot"),
    "no action": (lambda root: without(root / DATA, "action"), "no column 'action', only "),
    "a row too few": (lambda root: pq.write_table(pq.read_table(root / DATA).slice(1), root / DATA),
                      "has 5 rows, wanted frames 0 .. 5 once"),
    "frame twice": (lambda root: replace(root / DATA, "frame_index", lambda x: [0, *x[:-1]]), "wanted frames 0 .. 5"),
    "NaN": (lambda root: replace(root / DATA, "action", lambda x: [[float("nan")] * 4, *x[1:]]), "actions is nan"),
    "other width": (lambda root: replace(root / DATA, "action", lambda x: [y[:3] for y in x]), "wanted float32"),
    "null": (lambda root: replace(root / DATA, "action", lambda x: [None, *x[1:]]), "rows of several lengths"),
    "no such task": (lambda root: replace(root / DATA, "task_index", lambda x: [7, *x[1:]]), "no text in meta/tasks"),
    "span of another fps": (lambda root: replace(root / META, f"videos/{THIRD}/to_timestamp", lambda x: [*x[:2], 0.2]),
                            "0.200 s for 6 frames, but info.json's fps is 10"),
}
LATER = {                  # of its video; said when the set is opened, and when a frame is wanted
    "torn mp4": (lambda root: (root / MP4).write_bytes((root / MP4).read_bytes()[:300]), "not as in an mp4"),
    "fps disagrees": (lambda root: mp4(root / MP4, [picture(2, i, 0) for i in range(6)], 30),
                      "has 30 frames per second, info.json's fps is 10"),
    "short mp4": (lambda root: mp4(root / MP4, [picture(2, i, 0) for i in range(4)]),
                  "the video ends at 0.400 s, before the rows do"),
}
DAMAGE |= LATER


@lerobot
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_episode_is_named_and_left_out_only_when_asked(tmp_path, name):
    root, (do, said) = make(tmp_path / "set"), DAMAGE[name]
    do(root)
    with pytest.raises(ValueError, match="1 of 3 episodes are damaged: ") as e:
        reader(root)
    assert said in str(e.value) and "damaged=skip" in str(e.value) and "\n" not in str(e.value)
    found = reader(root, options={"damaged": "skip"})
    assert len(found) == 8 and found.damaged[0][0] == 2 and found[7]["actions"][0, 0] == 102


@lerobot
@pytest.mark.parametrize("name", LATER)
def test_a_damaged_video_is_named_by_the_frame_that_needs_it(tmp_path, name):
    root, (do, said) = make(tmp_path / "set"), LATER[name]
    found = reader(root)
    do(root)                                                   # after the set was opened
    assert found[7]["instruction"] == "do 1"
    found = pickle.loads(pickle.dumps(found))                  # as in another process
    with pytest.raises(ValueError) as e:
        found[13]
    assert MP4 in str(e.value) and "\n" not in str(e.value)
    assert said in str(e.value) or "no frame at 0.5000 s, it ends before" in str(e.value)
    (number, why), = found.check()
    assert number == 2 and (said in why or "no frame at 0.4000 s, of episode 2" in why)


@lerobot
def test_damaged_pictures_are_skipped_when_asked(tmp_path):
    root = make(tmp_path / "set")
    found = reader(root, options={"damaged": "skip"})
    LATER["torn mp4"][0](root)                                 # after the set was opened, as in the middle of it
    found = pickle.loads(pickle.dumps(found))
    with pytest.warns(UserWarning, match="not as in an mp4.*damaged=skip shows another episode's first"):
        instead = found[13]
    for name, x in found[0].items():
        np.testing.assert_equal(instead[name], x)


@lerobot
@pytest.mark.parametrize("look", [lambda root: reader(Path(root)), data.describe], ids=["train", "data.py"])
def test_what_was_damaged_and_is_whole_again_is_read_again(tmp_path, look, capsys):
    root = make(tmp_path / "set")
    video = root / MP4
    whole = video.read_bytes()
    video.unlink()
    with contextlib.suppress(ValueError):
        look(str(root))
    video.write_bytes(whole)
    assert not reader(root).damaged


@lerobot
def test_the_command_says_what_a_folder_is_and_lists_what_is_damaged(tmp_path):
    root = make(tmp_path / "set")
    done = forks.shared()("data.py", root, cwd=tmp_path)
    assert done.rc == 0 and "3 episodes, 0 of them damaged; 14 frames, 3 to 6 in an episode, median 5; 2 tasks" in done.out
    for text in ("LeRobot v3.0, robot None, 10 frames per second", "do 0; do 1", "'image': (32, 48, 3)",
                 "feature action: float32 [4]", "state: (3,)", "action q99"):
        assert text in done.out, text
    LATER["short mp4"][0](root)
    (root / "data" / "chunk-000" / "file-000.parquet").unlink()
    done = forks.shared()("data.py", root, cwd=tmp_path)
    assert done.rc == 2 and done.out.count("\ndamaged ") == 3 and "the video ends at 0.400 s" in done.out
    assert done.err.splitlines()[-1].startswith(f"error: {root}: 3 parts are damaged")
    (tmp_path / "empty").mkdir()
    done = forks.shared()("data.py", tmp_path / "empty", cwd=tmp_path)
    assert done.rc == 2 and "nor LeRobot's, with meta/info.json, nor LIBERO's" in done.err


@lerobot
@pytest.mark.parametrize(("version", "file", "content"), [
    ("v2.1", "tasks.jsonl", '{"task": "no number"}'), ("v2.1", "episodes.jsonl", "torn"), ("v2.0", "tasks.jsonl", None),
    ("v3.0", "tasks.parquet", "torn"), ("v3.0", "episodes/chunk-000/file-000.parquet", "torn")])
def test_a_damaged_index_is_named(tmp_path, version, file, content):
    path = make(tmp_path / "set", version) / "meta" / file
    path.write_text(content) if content else path.unlink()
    with pytest.raises(ValueError, match=f"{path} is not as in LeRobot v2.0, v2.1 or v3.0: "):
        reader(tmp_path / "set")


@lerobot
@pytest.mark.parametrize(("info", "said"), [
    ({"codebase_version": "v1.6"}, "version 'v1.6', fps 10; LeRobot v2.0, v2.1 or v3.0 is read"), ({"fps": 0}, "fps 0"),
    ({"features": {}}, "no action (action, actions) among []"), ({"features": 3}, "not as in LeRobot"),
    ({"data_path": "data/{nose}.parquet"}, "not as in LeRobot"), ({"fps": None}, "not as in LeRobot")])
def test_an_unreadable_info_is_one_line(tmp_path, info, said):
    path = make(tmp_path / "set") / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | info))
    with pytest.raises(ValueError) as e:
        reader(tmp_path / "set")
    assert said in str(e.value) and "\n" not in str(e.value)


# ---- Writing ----------------------------------------------------------------------------------------------

def episode(e, size=(32, 48)):
    state, actions = numbers(e, LENGTHS[e])
    n = len(actions)
    return {"images": {view: np.stack([picture(e, i, camera, size) for i in range(n)])
                       for camera, view in enumerate(("third", "wrist"))},
            "actions": actions, "state": state, "instruction": f"do {e % 2}", "success": np.arange(n) == n - 1,
            "waypoints": np.arange(10 * n, dtype=np.float32).reshape(n, 10) / 100}


def write(folder, episodes=(0, 1, 2), video=True, **how):
    with data.LeRobotWriter(folder, FPS, "arm", video, **how) as writer:
        for e in list(episodes)[len(writer):]:
            writer.add(**episode(e))
    return folder


def every_byte(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@lerobot
@pytest.mark.parametrize("video", [True, False])
def test_what_is_written_is_what_is_read(tmp_path, video):
    found, like = reader(write(tmp_path / "set", video=video)), reader(make(tmp_path / "like", "v3.0", video))
    assert len(found) == len(like) and [n for _, n in found.kept] == list(LENGTHS) and not [*found.check()]
    for i in range(len(found)):
        ours, theirs = found[i], like[i]
        for key in ("actions", "loss_mask", "state"):
            assert np.array_equal(ours[key], theirs[key]), key
        assert ours["instruction"] == theirs["instruction"] and ours["waypoints"].shape == (5, 2)
        for view in ("third", "wrist"):
            off = np.abs(ours["images"][view].astype(int) - theirs["images"][view]).max()
            assert off <= (8 if video else 0)
    rows = pq.read_table(tmp_path / "set" / "data" / "chunk-000" / "file-002.parquet")
    assert rows["index"].to_pylist() == [*range(8, 14)] and rows["episode_index"].to_pylist() == [2] * 6
    whole = found.recording(2)
    assert np.array_equal(whole["actions"], numbers(2, 6)[1]) and whole["images"]["wrist"].shape == (6, 32, 48, 3)
    assert np.array_equal(whole["waypoints"], episode(2)["waypoints"]) and whole["instruction"] == "do 0"


@lerobot
def test_statistics_written_are_those_of_all_rows(tmp_path):
    stats = json.loads((write(tmp_path / "set", video=False) / "meta" / "stats.json").read_text())
    x = np.concatenate([numbers(e, n)[1] for e, n in enumerate(LENGTHS)]).astype(np.float64)
    for name, wanted in {"q01": np.quantile(x, 0.01, 0), "q50": np.median(x, 0), "std": x.std(0)}.items():
        assert np.allclose(stats["action"][name], wanted), name
    pixels = np.concatenate([episode(e)["images"]["wrist"] for e in range(3)]) / 255
    for name, wanted in {"mean": pixels.mean((0, 1, 2)), "std": pixels.std((0, 1, 2)), "max": pixels.max((0, 1, 2))}.items():
        assert np.allclose(stats["observation.images.wrist"][name], wanted.reshape(3, 1, 1)), name
    assert stats["success"]["mean"] == [3 / 14] and stats["success"]["count"] == [14]


@lerobot
def test_a_recording_that_was_killed_ends_in_the_same_bytes(tmp_path):
    """kill -9 before an operation on the disk, again and again, each time a later one, and then not."""
    whole, folder, seen = every_byte(write(tmp_path / "whole")), tmp_path / "killed", []
    (tmp_path / "go.py").write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                                    "import test_data_lerobot\ntest_data_lerobot.write('killed')\n")
    for at in (2, 17, 33, 12, 28, 24, 6):
        done = forks.shared()(str(tmp_path / "go.py"), cwd=tmp_path, kill_at=at)
        assert done.rc == -9, (at, seen, done.err)
        assert not (folder / "meta" / "info.json").exists()                # it is no dataset yet
        seen.append(len([*folder.glob("meta/episodes/*/file*")]))
    assert seen == sorted(seen) and {0, 1, 2, 3} == set(seen), seen
    assert every_byte(write(folder)) == whole


@lerobot
def test_a_recording_is_only_gone_on_with_if_it_is_the_same(tmp_path):
    write(tmp_path / "set", [0, 1], made_from={"seed": 1})
    assert len(reader(write(tmp_path / "set", made_from={"seed": 1}))) == 14
    for how in ({"made_from": {"seed": 2}}, {"video": False}):
        with pytest.raises(ValueError, match="no recording of the same"):
            write(tmp_path / "set", **{"made_from": {"seed": 1}} | how)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        write(tmp_path / "full")
    writer = data.LeRobotWriter(tmp_path / "bad", FPS)
    one = episode(0)
    for change, said in (({"state": one["state"][1:]}, r"observation.state is float32 \(4, 3\) of 5 frames"),
                         ({"images": {"third": one["images"]["third"] / 255}}, "third is float64"),
                         ({"images": {"third": one["images"]["third"][:, 1:]}}, "48 x 31 pixels"),
                         ({"instruction": " "}, "' '"), ({"success": np.array(["no"] * 5)}, "success is <U2")):
        with pytest.raises(ValueError, match=said):
            writer.add(**one | change)
    writer.add(**one)
    with pytest.raises(ValueError, match="episode 1 has features"):
        writer.add(**{key: x for key, x in episode(1).items() if key != "success"})
    with pytest.raises(ValueError, match="cannot read"):
        reader(tmp_path / "bad")                               # not closed


@lerobot
def test_a0_trains_on_the_waypoints_of_a_recording(tmp_path):
    found = data.open_dataset(str(write(tmp_path / "set")), horizon=5, action_dim=2, views=("third",))
    assert set(found[0]) == {"images", "waypoints", "instruction", "dataset", "state"} and found[0]["waypoints"][2, 0] == 0.04


# ---- LIBERO -----------------------------------------------------------------------------------------------

def demonstrations(folder, demos=11, name="KITCHEN_SCENE3_turn_on_the_stove_demo"):
    h5py = pytest.importorskip("h5py")
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{name}.hdf5", "w") as file:
        for d in range(demos):
            demo, n = file.create_group(f"data/demo_{d}"), 6
            actions = np.full((n, 7), 0.1 + d)
            actions[0], actions[[3, 4], :6], actions[:4, 6], actions[4:, 6] = 0, 0, -1, 1
            demo["actions"] = actions                          # 0, 3: no-ops; 4 moves the gripper
            rng = np.random.default_rng(d)
            for key, shape in {"agentview_rgb": (8, 8, 3), "eye_in_hand_rgb": (8, 8, 3)}.items():
                demo[f"obs/{key}"] = rng.integers(0, 256, (n, *shape), np.uint8)
            for key, k in {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2, "joint_states": 7}.items():
                demo[f"obs/{key}"] = rng.random((n, k))
            demo["obs/ee_states"] = np.concatenate([demo["obs/ee_pos"], demo["obs/ee_ori"]], 1)
    return folder / f"{name}.hdf5"


def libero(root, **options):
    return data.Libero(root, views=("third", "wrist"), horizon=3, history=2, options={"val": "0"} | options)


def test_trap_7_liberos_pictures_are_turned_by_180_degrees(tmp_path):
    path = demonstrations(tmp_path / "libero_10", 1)
    import h5py
    with h5py.File(path) as file:
        stored = {view: file[f"data/demo_0/obs/{key}"][:] for view, key in
                  (("third", "agentview_rgb"), ("wrist", "eye_in_hand_rgb"))}
    turned, raw = libero(tmp_path), libero(tmp_path, rotate="0")
    for i, frame in enumerate((1, 2, 4, 5)):                   # without no-ops
        for view, x in stored.items():
            assert np.array_equal(turned[i]["images"][view], x[frame][::-1, ::-1])
            assert np.array_equal(raw[i]["images"][view], x[frame])
    assert np.array_equal(turned[2]["history_images"]["third"][0], stored["third"][2][::-1, ::-1])
    assert np.array_equal(libero(tmp_path, noops="keep")[3]["images"]["third"], stored["third"][3][::-1, ::-1])


def test_libero_fields_tasks_and_order(tmp_path):
    demonstrations(tmp_path / "libero_10")
    demonstrations(tmp_path / "libero_goal", 1, "open_the_drawer_demo")
    found = libero(tmp_path)
    assert len(found) == 12 * 4 and found.tasks == ["turn on the stove", "open the drawer"]
    assert [found[4 * d]["actions"][0, 0] for d in range(11)] == [np.float32(0.1 + d) for d in range(11)]  # 10 is last
    sample = data.check_sample(found[2], horizon=3, action_dim=7, state_dim=8, views=("third", "wrist"))
    assert sample["loss_mask"].tolist() == [True, True, False] and sample["dataset"] == tmp_path.name
    assert sample["actions"][:, 6].tolist() == [1, 1, 1] and sample["history_actions"].shape == (1, 7)
    assert found[47]["instruction"] == "open the drawer"
    rng = np.random.default_rng(0)
    rng.integers(0, 256, (6, 8, 8, 3), np.uint8), rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
    pos, ori, fingers = (rng.random((6, k)) for k in (3, 3, 2))
    assert np.array_equal(sample["state"], np.concatenate([pos, ori, fingers], 1).astype(np.float32)[4])
    assert libero(tmp_path, state="joint_states")[0]["state"].shape == (7,)
    opened = libero(tmp_path, gripper="openvla", name="suite")
    assert opened[0]["actions"][0, 6] == 1 and opened[3]["actions"][0, 6] == 0     # -1: open; +1: closed
    assert list(opened.stats) == ["suite"] and opened.stats["suite"]["num_transitions"] == 48
    assert len(data.open_dataset(str(tmp_path), views=("third",), horizon=3)) == 48


def test_no_ops_are_small_and_leave_the_gripper_as_it_was():
    actions = np.zeros((6, 7), np.float32)
    actions[:, 6] = [1, 1, -1, -1, -1, 1]
    actions[3, 0], actions[4, 5] = 9e-5, 1.1e-4
    assert data.no_ops(actions).tolist() == [True, True, False, True, False, False]
    assert not actions[:0].size and data.no_ops(actions[:0]).tolist() == []


def test_damaged_libero_files_are_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    with pytest.raises(ValueError, match="no .*hdf5 in it or one folder below"):
        libero(tmp_path)
    path, torn = demonstrations(tmp_path, 2), tmp_path / "zz_demo.hdf5"
    torn.write_bytes(path.read_bytes()[:500])
    with h5py.File(path, "r+") as file:
        file["data/demo_1/actions"][2, 3] = np.inf
    for options, said in (({"val": "2"}, "zz_demo.hdf5 is not as in LIBERO's HDF5"), ({}, "2 of 3 episodes are damaged")):
        with pytest.raises(ValueError, match=said):
            libero(tmp_path, **options)
    with h5py.File(tmp_path / "none_demo.hdf5", "w") as file:
        file.create_group("data")
    found = libero(tmp_path, damaged="skip")
    assert len(found) == 4 and "actions is inf" in found.damaged[0][1]
    assert "none_demo.hdf5 is not as in LIBERO's HDF5: ValueError: it holds no demonstration" in found.damaged[1][1]
    (tmp_path / "none_demo.hdf5").unlink()
    done = forks.shared()("data.py", tmp_path, cwd=tmp_path)
    assert done.rc == 2 and "LIBERO's HDF5, 2 files" in done.out and done.out.count("\ndamaged ") == 2
    torn.unlink()
    del found                                                  # it has the file open
    code = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(ValueError, match="is open elsewhere, to be written; close it there"):
            data.Libero(tmp_path, options={"rotate": "0"})
        other.stdin.close()
