"""data.py's RoboBrain-X0 forms: AgileX's recordings processed, JSONL and shards read, mixed, refused."""
import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import robobrain_x0 as x0

try:
    import av
    import h5py
except ImportError as e:
    av, MISSING = None, f"{e.name} is not installed (pip install h5py av)"
agilex = pytest.mark.skipif(av is None, reason="" if av else MISSING)


# ---- Recordings of our own: frame f of camera c is gray of 40 c + 2 f -------------------------------------

def poses(n, seed=0, still=()):
    """(n, 14) float64; the frames in `still` are those before them."""
    x = np.cumsum(np.random.default_rng(seed).uniform(-0.02, 0.02, (n, 14)), 0)
    for frame in still:
        x[frame] = x[frame - 1]
    return x


def write_recording(folder, n=50, seed=0, still=(3, 4), **keys):
    """cam_high.mp4, ...; state.hdf5 below `folder`. keys: datasets of the HDF5, else action and qpos."""
    folder.mkdir(parents=True)
    for c, view in enumerate(data.AGILEX_VIEWS):
        with av.open(str(folder / f"aloha_{view}.mp4"), "w") as video:
            stream = video.add_stream("libx264", rate=30, options={"qp": "0", "bf": "2", "g": "10"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
            for f in range(n):
                picture = np.full((48, 64, 3), 40 * c + 2 * f, np.uint8)
                video.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            video.mux(stream.encode())
    with h5py.File(folder / "state.hdf5", "w") as file:
        for name, x in (keys or {"action": poses(n, seed, still), "qpos": poses(n, seed + 9)}).items():
            file[name] = x
    return {name: str(folder / f"aloha_{view}.mp4") for view, name in data.AGILEX_VIEWS.items()} | {
        "state": str(folder / "state.hdf5")}


def item(files, start=1, end=50, raw_task="Tidy  the Table", task="Take the cup"):
    return {"raw_task": raw_task, "task": task, "data": files,
            "frame": {"start_frame": start, "end_frame": end}}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two recordings, three segments, of which one is too short."""
    root = tmp_path_factory.mktemp("agilex")
    a, b = (write_recording(root / "RoboBrain_Robotic_AGXCompany" / "video" / "0" / name, n, seed)
            for name, n, seed in (("a", 50, 0), ("b", 12, 1)))
    path = root / "annotations.json"
    path.write_text(json.dumps({"tidy": [item(a, 3, 48), item(b, 1, 7)],
                                "more": [item(b, 2, 12, task="x: Go.")]}))
    return path


HOW = {"chunk": 8, "workers": 0}


@pytest.fixture(scope="module")
def processed(recordings, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "mine"
    assert data.robobrain_process(recordings, out, **HOW) == len(rows_of(out))
    return out


def rows_of(out):
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def one_line(match, function, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as error:
        function(*args, **kwargs)
    assert len(str(error.value).splitlines()) == 1, error.value


# ---- From recordings to samples ---------------------------------------------------------------------------

def slowly(actions, start, end, chunk, every):
    """The sheet's section 11, step by step, in lists."""
    kept = [f for f in range(start - 1, end) if f == start - 1 or list(actions[f]) != list(actions[f - 1])]
    if len(kept) < 0.5 * chunk:
        return []
    samples = [[kept[min(i + j, len(kept) - 1)] for j in range(chunk + 1)]
               for i in range(max(1, len(kept) - chunk))]
    return samples[::every] + samples[-1:] * ((len(samples) - 1) % every != 0)


@pytest.mark.parametrize("n, start, end, still", [
    (60, 1, 60, (5, 6, 7, 30)), (60, 10, 52, (9, 10)), (40, 1, 40, ()), (31, 1, 31, ()), (30, 1, 30, ()),
    (20, 1, 20, ()), (15, 1, 15, ()), (14, 1, 14, ()), (30, 1, 30, range(5, 30)), (9, 9, 9, ())])
def test_samples_are_the_frames_that_the_sheet_says(n, start, end, still):
    x = poses(n, still=still)
    for chunk in (30, 8):
        for every in (3, 1):
            expected = slowly(x, start, end, chunk, every)
            found = data.agilex_chunks(x, start, end, chunk, every=every)
            assert found.shape == (len(expected), chunk + 1) and found.tolist() == expected


def test_a_frame_is_compared_with_the_one_before_it_kept_or_not():
    x = poses(6)
    x[2], x[3] = x[1], x[1]
    x[4] = x[0]                                                # another one than before: it stays
    assert data.agilex_chunks(x, 1, 6, chunk=2, every=1)[:, 0].tolist() == [0, 1]
    x[1, 13] += 1e-12                                          # one number of the 14 is enough
    assert data.agilex_chunks(x, 1, 6, chunk=2, every=1)[:, 0].tolist() == [0, 1, 2]


def test_less_than_half_a_chunk_is_no_sample():
    for n, samples in {14: 0, 15: 1, 30: 1, 31: 1, 33: 2, 34: 2, 35: 3}.items():
        assert len(data.agilex_chunks(poses(40), 1, n)) == samples
    assert [len(data.agilex_chunks(poses(99), 1, n, step=3)) for n in (44, 45)] == [0, 1]


def recorded(recordings, name):
    folder = recordings.parent / "RoboBrain_Robotic_AGXCompany" / "video" / "0" / name
    with h5py.File(folder / "state.hdf5") as file:
        return file["action"][:], file["qpos"][:]


@agilex
def test_a_sample_is_the_deltas_from_its_frame_on(recordings, processed):
    action, qpos = recorded(recordings, "a")
    for x in (action, qpos):
        x[:, 6] -= -0.00203000009059906
        x[:, 13] -= -0.0006300000241026282
    first = [row for row in rows_of(processed) if "/000000/" in row["image"][0]]
    samples = slowly(action, 3, 48, 8, 3)
    assert len(first) == len(samples) > 9
    for row, frames in zip(first, samples):
        action_, state = ({kind: np.load(processed / path) for kind, path in row[part].items()}
                          for part in ("action", "state"))
        p, q, deltas, joints = action[frames], qpos[frames], action_["eepose"], action_["qpos"]
        assert deltas.shape == joints.shape == (8, 14) and state["eepose"].shape == (8, 20)
        np.testing.assert_allclose(deltas[:, :3], np.diff(p[:, :3], axis=0), atol=1e-12)
        turns = x0.euler_to_quat(p[:, 10:13])
        turned = x0.quat_multiply(x0.rotvec_to_quat(deltas[:, 10:13]), turns[:-1])
        np.testing.assert_allclose(x0.quat_to_matrix(turned), x0.quat_to_matrix(turns[1:]), atol=1e-12)
        np.testing.assert_array_equal(deltas[:, [6, 13]], p[1:, [6, 13]])                   # the next gripper
        np.testing.assert_allclose(joints[:, 7:13], np.diff(q[:, 7:13], axis=0), atol=1e-12)
        np.testing.assert_array_equal(joints[:, 13], q[1:, 13])
        np.testing.assert_array_equal(state["qpos"], q[:-1])
        np.testing.assert_array_equal(state["eepose"][:, [0, 9, 10, 19]], p[:-1, [0, 6, 7, 13]])
        for c, path in enumerate(row["image"]):
            image = np.array(Image.open(processed / path)).astype(int)
            assert image.shape == (240, 320, 3) and abs(image - (40 * c + 2 * frames[0])).max() <= 2
    views = [Path(path).stem.rpartition("_")[0] for path in first[0]["image"]]
    assert views == ["cam_high", "right_wrist", "left_wrist"]


@agilex
def test_statistics_count_other_frames_than_the_samples(recordings, processed):
    stats, parts = json.loads((processed / "normal_stats.json").read_text()), []
    assert list(stats) == ["action.eepose", "action.qpos", "state.eepose", "state.qpos"]
    assert len(stats["state.eepose"]["scale_"]) == 20
    for one, start, end in (("a", 3, 48), ("b", 1, 7), ("b", 2, 12)):       # frames from 0 on: 3 .. 48, ...
        parts.append(x0.pose_deltas(recorded(recordings, one)[0][start:end + 1]))
    low, high = np.quantile(np.concatenate(parts), [0.01, 0.99], axis=0)
    moved = np.arange(14) % 7 != 6                                         # the grippers have their zero
    for name, x in (("quantiles_low_", low), ("quantiles_high_", high)):
        np.testing.assert_allclose(np.array(stats["action.eepose"][name])[moved], x[moved], atol=1e-9)
    gripper = stats["action.eepose"]["quantiles_low_"][6]
    np.testing.assert_allclose(gripper, low[6] + 0.00203000009059906, atol=1e-9)
    np.testing.assert_allclose(stats["action.eepose"]["scale_"], 2 / (high - low + 1e-8), rtol=1e-6)


@agilex
@pytest.mark.parametrize("robot, key", [("agilex", "action.eepose"), ("a2d", "action.eepose.delta")])
def test_the_prompt_is_the_official_one(recordings, tmp_path, robot, key):
    more = tmp_path / "more.json"
    more.write_text(json.dumps({"Tidy  the Table": ["Clean  UP", "no"]}))
    data.robobrain_process(recordings, tmp_path / "out", robot=robot, paraphrases=more, **HOW)
    human, gpt = (turn["value"] for turn in rows_of(tmp_path / "out")[0]["conversations"])
    assert human == x0.training_prompt(robot, False, "Clean  UP", "Take the cup.") and gpt == "<action_token>"
    human, _ = (turn["value"] for turn in rows_of(tmp_path / "out")[-1]["conversations"])
    assert human == x0.training_prompt(robot, False, "clean  up", "go..")  # after the last ": ", officially
    if robot == "agilex":
        assert human.endswith("task is: clean up Currently, focus on completing the subtask: go..")
    assert key in json.loads((tmp_path / "out" / "normal_stats.json").read_text())
    data.robobrain_process(recordings, tmp_path / "two", robot=robot, subtask=True, **HOW)
    human, gpt = (turn["value"] for turn in rows_of(tmp_path / "two")[0]["conversations"])
    assert human == x0.training_prompt(robot, True, "Tidy  the Table", "")
    assert gpt == "Take the cup<boa><action_token>"


@agilex
def test_codes_are_those_of_the_normalized_chunk(recordings, tmp_path):
    fit = x0.Fast.fit(list(np.random.default_rng(0).uniform(-1, 1, (300, 8, 14))), 10.0, 2048, -354)
    fit.save(tmp_path)
    data.robobrain_process(recordings, tmp_path / "out", fast=tmp_path / "fast_tokenizer.json", **HOW)
    stats = json.loads((tmp_path / "out" / "normal_stats.json").read_text())
    row = rows_of(tmp_path / "out")[2]
    for kind in ("eepose", "qpos"):
        codes = np.load(tmp_path / "out" / row[f"action_{kind}_token"])
        chunk = x0.normalize(np.load(tmp_path / "out" / row["action"][kind]), stats[f"action.{kind}"])
        assert codes.shape == (1, len(fit.encode(chunk))) and codes[0].tolist() == fit.encode(chunk)
        path = tmp_path / "out" / "train.jsonl"
        own, file = (opened(path, f",val=0,action={kind}{how}")[2] for how in ("", ",codes=file"))
        assert "action_codes" not in own and "actions" not in file
        assert file["action_codes"] == [codes[0].tolist()]
    os.remove(tmp_path / "out" / row["action_eepose_token"])              # not needed for the actions
    assert "actions" in opened(path, ",val=0")[2]
    one_line("action_eepose_token_.*npy is missing", lambda: opened(path, ",val=0,codes=file")[2])


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


@agilex
def test_killed_and_started_again_it_ends_in_the_same_bytes(recordings, processed, tmp_path):
    """For real: SIGKILL, once each of these files is there."""
    kills, make = 0, partial(data.robobrain_process, recordings, tmp_path / "cut", **HOW)
    for sign in ("built_from.json", "images/000000/right_*", "action_token/000000/*", "images/000002/*"):
        process = multiprocessing.get_context("fork").Process(target=make)
        process.start()
        while process.is_alive() and not any((tmp_path / "cut").glob(sign)):
            time.sleep(0.001)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 2
    (tmp_path / "cut" / ".normal_stats.json.7.part").write_bytes(b"half")
    done = data.robobrain_process(recordings, tmp_path / "cut", **HOW)
    assert tree(tmp_path / "cut") == tree(processed) and done == len(rows_of(processed))
    one_line("was built from something else .*chunk", data.robobrain_process, recordings, tmp_path / "cut",
             **HOW | {"chunk": 9})


@agilex
@pytest.mark.parametrize("torn", ["half a line", "nothing", "in a segment", "one segment"])
def test_a_torn_jsonl_is_refused_and_mended(recordings, processed, tmp_path, torn):
    out = tmp_path / "out"
    data.robobrain_process(recordings, out, **HOW)
    raw, path = (out / "train.jsonl").read_bytes(), out / "train.jsonl"
    last = raw.index(b"images/000002/")
    cut = {"half a line": raw[:-40], "nothing": b"", "in a segment": raw[:raw.index(b"\n", 9000) + 1],
           "one segment": raw[:raw.rindex(b"\n", 0, last) + 1]}
    path.write_bytes(cut[torn])
    one_line("is torn|holds .* samples of .*; run robobrain-process again", opened, path)
    data.robobrain_process(recordings, out, **HOW)
    assert tree(out) == tree(processed)


BAD = {
    "no mp4": (lambda d: os.remove(d["high"]), "aloha_cam_high.mp4 is missing"),
    "torn mp4": (lambda d: Path(d["left"]).write_bytes(b"no video"), "left_wrist.mp4 is not as in an mp4"),
    "short mp4": (lambda d: os.replace(d["high"] + "2", d["high"]), r"have \[12, 5, 12, 12\]"),
    "no hdf5": (lambda d: os.remove(d["state"]), "state.hdf5 is missing"),
    "torn hdf5": (lambda d: Path(d["state"]).write_bytes(b"x" * 99), "hdf5 is not as in AgileX's recordings"),
    "other keys": ({"action": poses(12), "joints": poses(12)}, "are wanted, and no more, found action, j"),
    "more keys": ({"action": poses(12), "qpos": poses(12), "t": np.zeros(12)}, "found action, qpos, t"),
    "short pose": ({"action": poses(12)[:, :13], "qpos": poses(12)}, r"action is .* \(12, 13\), wanted .*14"),
    "fewer joints": ({"action": poses(12), "qpos": poses(11)}, r"qpos is .* \(11, 14\), wanted .*\(12, 14\)"),
    "nan": ({"action": np.full((12, 14), np.nan), "qpos": poses(12)}, "action is nan at"),
}


@agilex
@pytest.mark.parametrize("name", BAD)
def test_a_damaged_recording_is_one_clear_line_or_left_out(tmp_path, name, capsys):
    harm, match = BAD[name]
    files = [write_recording(tmp_path / "RoboBrain_Robotic_Agilex_2nd" / one, 12, i, (),
                             **(harm if one == "bad" and isinstance(harm, dict) else {}))
             for i, one in enumerate(("good", "bad"))]
    if name == "short mp4":
        short = write_recording(tmp_path / "short", 5)
        os.rename(short["high"], files[1]["high"] + "2")
    if not isinstance(harm, dict):
        harm(files[1])
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"g": [item(files[0], 1, 12), item(files[1], 1, 12)]}))
    one_line(match, data.robobrain_process, path, tmp_path / "out", **HOW)
    assert not (tmp_path / "out").exists()
    n = data.robobrain_process(path, tmp_path / "out", skip=True, **HOW)
    assert n == len(data.agilex_chunks(poses(12), 1, 12, 8)) and "left out: " in capsys.readouterr().err
    one_line(match, data.robobrain_process, path, tmp_path / "out", **HOW)


@agilex
def test_a_source_that_nobody_knows_is_named(tmp_path):
    files, path = write_recording(tmp_path / "elsewhere", 12, still=()), tmp_path / "a.json"
    path.write_text(json.dumps({"g": [item(files, 1, 12)]}))
    one_line("unknown source: .*--source company", data.robobrain_process, path, tmp_path / "out", **HOW)
    for folder, source in data.SOURCES.items():
        at = tmp_path / folder / "a"
        files_there = {name: str(at / Path(file).name) for name, file in files.items()}
        shutil.copytree(tmp_path / "elsewhere", at)
        (tmp_path / "b.json").write_text(json.dumps({"g": [item(files_there, 1, 12)]}))
        assert data.agilex_items(tmp_path / "b.json", tmp_path)[0][0].zero == data.GRIPPER_ZERO[source]
    for source, zero in data.GRIPPER_ZERO.items():
        data.robobrain_process(path, tmp_path / source, source=source, **HOW)
        row = rows_of(tmp_path / source)[0]
        with h5py.File(files["state"]) as file:
            gripper = file["action"][1:9, [6, 13]]
        actions = np.load(tmp_path / source / row["action"]["eepose"])
        np.testing.assert_allclose(actions[:, [6, 13]], gripper - zero, atol=1e-15)


@pytest.mark.parametrize("about, match", [
    ('{"g": [{"raw_task": "x"}]}', "not as in AgileX's recordings: KeyError"), ("[1]", "not an object"),
    (json.dumps({"g": [item({"high": "/a"}, "1", 2)]}), "two texts and two whole numbers are wanted"),
    (json.dumps({"g": [item({"high": "/a"}, 1, 2, task=" ")]}), "two texts and two"), ("{", "cannot read")])
def test_an_annotation_of_another_form_is_named(tmp_path, about, match):
    (tmp_path / "a.json").write_text(about)
    one_line(match, data.robobrain_process, tmp_path / "a.json", tmp_path / "out", **HOW)


@agilex
def test_frames_that_are_not_there_and_segments_too_short(recordings, tmp_path):
    found = json.loads(recordings.read_text())
    path, files = tmp_path / "a.json", found["tidy"][0]["data"]
    one_line("no 'franka'", data.robobrain_process, recordings, tmp_path / "out", robot="franka", **HOW)
    for start, end, match in ((0, 9, "0 .. 9"), (5, 4, "5 .. 4"), (1, 51, r"\[50, 50, 50, 50\]")):
        path.write_text(json.dumps({"g": [item(files, start, end)]}))
        one_line(match, data.robobrain_process, path, tmp_path / "out", **HOW)
    path.write_text(json.dumps({"g": [found["tidy"][1]]}))
    one_line("all are shorter than half a chunk", data.robobrain_process, path, tmp_path / "out", workers=0)


# ---- JSONL and shards, read -------------------------------------------------------------------------------

VIEWS = ("cam_high", "cam_right_wrist", "cam_left_wrist")
READ = {"horizon": 8, "views": VIEWS, "action_dim": 14}


def opened(path, options="", **how):
    return data.open_dataset(f"robobrain={path}{options}", **READ | how)


def talk(human, gpt, *more):
    return [{"from": name, "value": value} for name, value in zip(("human", "gpt") * 9, (human, gpt, *more))]


def gray(path, value=7, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)
    return str(path)


def write_jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_shard(path, *rows):
    """As webdataset's writer: members of a sample side by side; the lists of paths are pickles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, row in enumerate(rows):
            about = {"conversations": row["conversations"], "second_per_grid_ts": []}
            more = {key: x for key, x in row.items() if key not in ("conversations", "image")}
            members = {"jpgs": pickle.dumps(row.get("image", [])), "videos": pickle.dumps([]),
                       "json": json.dumps(about).encode(), "metadata": json.dumps(more).encode()}
            for kind, raw in members.items():
                member = tarfile.TarInfo(f"{i}.{kind}")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
    return path


def both_sides(processed):
    return [opened(processed / "train.jsonl", ",val=2", split=split) for split in ("train", "val")]


@agilex
def test_what_was_processed_is_read(processed):
    rows, sets = rows_of(processed), both_sides(processed)
    assert sum(map(len, sets)) == len(rows) and all(map(len, sets))
    found = {}
    for part in sets:
        for i in range(len(part)):
            found[part[i]["conversations"][0]["value"], part[i]["state"].tobytes()] = part[i]
    assert len(found) == len(rows)
    for row in rows:
        state = np.load(processed / row["state"]["eepose"])[0].astype(np.float32)
        sample = found[row["conversations"][0]["value"], state.tobytes()]
        assert sample["conversations"] == row["conversations"] and list(sample["images"]) == list(VIEWS)
        for path, image in zip(row["image"], sample["images"].values()):
            assert np.array_equal(image, np.array(Image.open(processed / path)))
        assert np.array_equal(sample["actions"], np.float32(np.load(processed / row["action"]["eepose"])))
        assert (sample["instruction"], sample["subtask"]) == (row["raw_task"], row["task"])
        assert sample["loss_mask"].all() and sample["dataset"] == "mine" and "action_codes" not in sample
    official = json.loads((processed / "normal_stats.json").read_text())
    low, high = (official["action.eepose"][f"quantiles_{end}_"] for end in ("low", "high"))
    assert sets[0].stats["mine"]["action"] == {"q01": low, "q99": high}
    joints = opened(processed / "train.jsonl", ",action=qpos,val=0")
    assert np.array_equal(joints[3]["actions"], np.float32(np.load(processed / rows[3]["action"]["qpos"])))
    assert joints.stats["mine"]["action"]["q01"] == official["action.qpos"]["quantiles_low_"]


@agilex
def test_rows_of_one_recording_stay_on_one_side(processed):
    rows = rows_of(processed)
    sides = [{Path(rows[line - 1]["image"][0]).parent for line in part.data.rows[:, 1]}
             for part in both_sides(processed)]
    assert all(sides) and not sides[0] & sides[1]
    assert opened(processed / "train.jsonl", ",val=0", split="val") is None


@agilex
def test_shards_give_the_same_samples(processed, tmp_path):
    rows = rows_of(processed)
    for number, at in enumerate(range(0, len(rows), 5)):
        write_shard(tmp_path / "wds-1" / f"pretrain-{number}.tar", *rows[at:at + 5])
    shards = opened(tmp_path, f",root={processed},stats={processed}/normal_stats.json,name=mine,val=0")
    lines = opened(processed / "train.jsonl", ",val=0")
    assert len(shards) == len(lines) and shards.stats == lines.stats
    for i in range(len(lines)):
        a, b = shards[i], lines[i]
        assert a.keys() == b.keys() and a["conversations"] == b["conversations"]
        assert all(np.array_equal(a["images"][v], b["images"][v]) for v in VIEWS)
        assert all(np.array_equal(a[k], b[k]) for k in ("actions", "state"))


@agilex
def test_describe_tells_rows_and_shards_and_lists_their_damage(processed, tmp_path, capsys):
    rows, where = rows_of(processed), tmp_path / "set"
    shutil.copytree(processed, where)
    for number, at in enumerate(range(0, len(rows), 5)):
        shard = write_shard(where / f"pretrain-{number}.tar", *rows[at:at + 5])
    (where / "mine.jsonl").write_text((where / "train.jsonl").read_text() + "[]\n")
    (where / rows[0]["image"][0]).unlink()
    shard.write_bytes(shard.read_bytes()[:700])
    for name, damage in (("train.jsonl", ["line 1: images/"]), ("mine.jsonl", ["line 1: ", f"line {len(rows) + 1} is torn"]),
                         ("", ["sample 0: images/", f"{shard.name} is cut off"])):
        one_line(f"{len(damage)} parts are damaged", data.describe, str(where / name), tmp_path / "sheet.png")
        said = capsys.readouterr().out
        for text in (f"rows, {len(damage)} of them damaged; ", "rows name action.eepose", "actions: (8, 14)",
                     "tasks        Tidy  the Table", "action q99 ", *damage):
            assert text in said, text
        assert said.count("\ndamaged ") == len(damage) and (tmp_path / "sheet.png").is_file()
    gray(where / "a.png")
    vqa = write_jsonl(where / "vqa.jsonl", {"image": "a.png", "conversations": talk("<image>What?", "a cup")})
    data.describe(str(vqa))
    assert "1 rows, 0 of them damaged; 1 samples; 0 tasks" in capsys.readouterr().out


@agilex
def test_pictures_are_found_where_the_folder_was_moved(processed, tmp_path):
    """The authors' absolute paths: their ends count."""
    rows = json.loads(json.dumps(rows_of(processed)).replace('"images/', '"/share/x/images/')
                      .replace('"action_token/', '"/share/x/action_token/'))
    moved = opened(write_jsonl(tmp_path / "moved.jsonl", *rows), f",root={processed},val=0")
    assert np.array_equal(moved[5]["actions"], opened(processed / "train.jsonl", ",val=0")[5]["actions"])
    found = moved.stats["moved"]["action"]                     # none beside it: computed from the actions
    x = np.concatenate([moved[i]["actions"] for i in range(len(moved))])
    np.testing.assert_allclose(found["q99"], np.quantile(x, 0.99, axis=0), rtol=1e-6)


def codes_row(codes, gpt="<action_token>", **more):
    return {"conversations": talk("Go", gpt), "action_eepose_token": codes, **more}


@pytest.fixture
def stats_beside(tmp_path):
    about = x0.quantile_stats(np.random.default_rng(0).uniform(-1, 1, (99, 14)))
    (tmp_path / "normal_stats.json").write_text(json.dumps({"action.eepose.delta": about}))
    return about


def test_codes_come_in_every_form_of_the_sheet(tmp_path, stats_beside):
    np.save(tmp_path / "one.npy", np.array([[3, 2047, 0]]))
    np.save(tmp_path / "two.npy", np.array([[5]]))
    path = write_jsonl(
        tmp_path / "c.jsonl", codes_row("one.npy"), codes_row([[3, 9]]), codes_row([3, 9]),
        codes_row(["one.npy", "two.npy"], "<action_token><action_split><action_token>"),
        codes_row([[1], [2]], "Pick up <boa><action_token><action_split><action_token>"),
        codes_row(None, "<EOA>"), codes_row(None),
        {"conversations": [{"role": "human", "content": "Go"}, {"role": "gpt", "content": "yes"}]})
    found = opened(path, ",val=0")
    samples = [found[i] for i in range(len(found))]
    assert [s.get("action_codes") for s in samples] == [
        [[3, 2047, 0]], [[3, 9]], [[3, 9]], [[3, 2047, 0], [5]], [[1], [2]], None, None, None]
    assert [s["conversations"][1]["value"] for s in samples[5:]] == ["<EOA>", "<action_token>", "yes"]
    assert samples[7]["conversations"][0] == {"from": "human", "value": "Go"} and "images" not in samples[0]
    assert found.stats["c"]["action"]["q99"] == stats_beside["quantiles_high_"]            # of ...delta, too


def test_general_conversations_need_no_actions_and_no_statistics(tmp_path):
    (tmp_path / "built_from.json").write_text('{"samples": 99}')           # of a train.jsonl
    rows = [{"image": gray(tmp_path / "p" / "a.png"), "conversations": talk("<image>What?", "a cup")},
            {"image": [gray(tmp_path / "p" / "b.png", 9, (50, 40)), gray(tmp_path / "c.png")],
             "conversations": talk("<image>and<image>", "two", "sure?", "yes")},
            {"conversations": [{"from": "system", "value": "You are X."}, *talk("hi", "yo")]}]
    shards = write_shard(tmp_path / "s" / "x.tar", *rows).parent
    for path in (write_jsonl(tmp_path / "vqa.jsonl", *rows), shards):
        vqa = opened(path, ",val=0", horizon=30)
        assert data.dataset_statistics(vqa) == {} and len(vqa) == 3
        assert [list(vqa[i].get("images", ())) for i in range(3)] == [["0"], ["0", "1"], []]
        assert vqa[1]["images"]["0"].shape == (40, 50, 3) and (vqa[1]["images"]["0"] == 9).all()
        assert [len(vqa[i]["conversations"]) for i in range(3)] == [2, 4, 3]


@pytest.mark.parametrize("size, expected", [
    ((320, 240), (320, 240)), ((768, 768), (768, 768)), ((1000, 800), (858, 686)), ((30, 20), (39, 28)),
    ((300, 10), (300, 28)), ((2, 900), (28, 900)), ((7000, 30), (5400, 30))])
def test_pictures_have_the_official_training_sizes(size, expected):
    image = data.training_picture(Image.new("L", size, 200))
    assert image.shape == (*expected[::-1], 3) and (image == 200).all()


# ---- Mixed ------------------------------------------------------------------------------------------------

@agilex
def test_image_text_and_action_data_mix_by_weight(processed, tmp_path):
    gray(tmp_path / "a.png")
    vqa = write_jsonl(tmp_path / "vqa.jsonl", *[{"image": "a.png", "conversations": talk("<image>?", str(i))}
                                                for i in range(20)])
    n = len(rows_of(processed))
    mixed = opened(processed / "train.jsonl", f",val=0,weight=1+robobrain={vqa},val=0,weight=3")
    assert len(mixed) == n + 60 and set(mixed.stats) == {"mine"}
    batches = data.loader(mixed, lambda sample, key: sample["dataset"], list, batch=len(mixed), seed=3)
    assert sorted(next(batches)) == ["mine"] * n + ["vqa"] * 60


def test_image_text_mixes_with_the_tabletop(tmp_path, monkeypatch):
    class Set(list):
        name, stats = "tabletop", {"tabletop": {"action": {"q01": [0] * 14, "q99": [1] * 14}}}
    made = {"images": {"third": np.zeros((8, 8, 3), np.uint8)}, "instruction": "go", "dataset": "tabletop",
            "state": np.zeros(1, np.float32), "actions": np.zeros((8, 14), np.float32),
            "loss_mask": np.ones(8, bool)}
    monkeypatch.setattr(data, "tabletop", lambda split, **how: Set([made] * 5))
    vqa = write_jsonl(tmp_path / "vqa.jsonl", *[{"conversations": talk("?", str(i))} for i in range(4)])
    for spec, n in (("tabletop:pick", 5), ("tabletop+tabletop@dual", 10)):
        both = data.open_dataset(f"{spec}+robobrain={vqa},val=0,weight=0.5", horizon=8, action_dim=14)
        assert [both[i]["dataset"] for i in range(len(both))] == ["tabletop"] * n + ["vqa"] * 2
        assert set(both.stats) == {"tabletop"}


@agilex
@pytest.mark.parametrize("weight", ["0", "-1", "many", "nan"])
def test_a_weight_that_is_none_is_refused(processed, weight):
    one_line(f"weight={weight}: a number above 0", opened, processed / "train.jsonl", f",weight={weight}")


# ---- What is refused --------------------------------------------------------------------------------------

ROWS = {
    "no conversations": ({"image": []}, "line 1 is torn, or not as in RoboBrain-X0's sets: KeyError"),
    "no turns": ({"conversations": []}, "human and gpt in turn"),
    "gpt first": ({"conversations": talk("a", "b")[::-1]}, "human and gpt in turn"),
    "no answer": ({"conversations": talk("a", "b", "c")[1:]}, "human and gpt in turn"),
    "no text": ({"conversations": talk("a", 3)}, "human and gpt in turn"),
    "a picture less": ({"conversations": talk("<image><image>", "b"), "image": "a.png"},
                       "1 pictures, but its text has 2"),
    "a video": ({"conversations": talk("<video>", "b")}, "1 videos, which cannot be read"),
    "no picture": ({"conversations": talk("<image>", "b"), "image": "no.png"}, "line 1: no.png is missing"),
    "torn picture": ({"conversations": talk("<image>", "b"), "image": "torn.png"}, "torn.png is not as in"),
    "no npy": (codes_row("none.npy"), "none.npy is missing"),
    "pickled npy": (codes_row("evil.npy"), "evil.npy is not as in .*allow_pickle"),
    "NaN in actions": ({"conversations": talk("a", "<action_token>"), "action": {"eepose": ["nan.npy"]}},
                       "nan.npy is not as in .* not all its numbers are finite"),
    "code too large": (codes_row([[2048]]), "codes 0 .. 2047"),
    "no whole number": (codes_row([[1.5]]), "codes 0 .. 2047"),
    "two of one": (codes_row([[1], [2]]), "a chunk per <action_token> is wanted"),
    "one of two": (codes_row([[1]], "<action_token><action_split><action_token>"), "a chunk per <action_tok"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_one_clear_line(tmp_path, stats_beside, name):
    row, match = ROWS[name]
    gray(tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    np.save(tmp_path / "evil.npy", np.array([{"x": 1}], object))
    np.save(tmp_path / "nan.npy", np.full((8, 14), np.nan))
    for path in (write_jsonl(tmp_path / "x.jsonl", row), *([write_shard(tmp_path / "s" / "x.tar", row).parent]
                                                           if "conversations" in row else [])):
        how = f",val=0,root={tmp_path},stats={tmp_path}/normal_stats.json"
        one_line(match.replace("line 1", "(line 1|sample 0)"), opened, path, how)


def test_a_torn_line_is_named(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", *[{"conversations": talk("a", "b")}] * 3)
    path.write_bytes(path.read_bytes()[:-9])
    one_line("x.jsonl, line 3 is torn", opened, path)
    path.write_bytes(b"")
    one_line("no episode is left to train on", opened, path)


def test_a_truncated_shard_is_named(tmp_path):
    path = write_shard(tmp_path / "x.tar", *[{"conversations": talk("a", str(i))} for i in range(9)])
    raw = path.read_bytes()
    assert len(opened(tmp_path, ",val=0")) == 9
    ends = {100, 512, 700, 5120, 9 * 4 * 1024 - 512, 9 * 4 * 1024, 9 * 4 * 1024 + 512}
    for end in ends:                                       # in a header, a member, between two, at the end
        path.write_bytes(raw[:end])
        one_line("x.tar is cut off, or no plain tar", opened, tmp_path, ",val=0")
    path.write_bytes(raw[:2048] + b"x" * 512 + raw[2560:])
    one_line("x.tar is cut off, or no plain tar", opened, tmp_path, ",val=0")
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a/3.jpgs"))
    one_line("x.tar: sample a/3 has no .json", opened, tmp_path, ",val=0")


def test_nothing_in_a_shard_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    row = {"conversations": talk("<image>", "b"), "image": Evil()}
    write_shard(tmp_path / "x.tar", row)
    one_line("sample 0 is torn, or not as in .* it names posix.mkdir", opened, tmp_path)
    assert not (tmp_path / "owned").exists()


@agilex
def test_statistics_that_are_missing_or_of_something_else(processed, tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", codes_row([[1]]))
    one_line("no statistics tell what these stand for. .*stats=FILE", opened, path, ",val=0")
    (tmp_path / "s.json").write_text(json.dumps({"action.qpos": {}}))
    for file, match in (("s", "s.json has no statistics of action.eepose, only of action.qpos"),
                        ("none", "cannot read .*none.json")):
        one_line(match, opened, path, f",val=0,stats={tmp_path}/{file}.json")


@agilex
def test_options_and_paths_that_are_not_there(processed, tmp_path):
    path = processed / "train.jsonl"
    for options, match in ((",actoin=qpos", "no option 'actoin'"), (",action=joints", "there is no 'joints'"),
                           (",val=x", "val=x"), (",codes=yes", "there is no 'yes'")):
        one_line(match, opened, path, options)
    one_line("give a .jsonl file or a folder of .tar", opened, tmp_path)
    one_line("give a .jsonl file or a folder of .tar", opened, tmp_path / "none.jsonl")
    one_line(r"actions' is float32 \(8, 14\), wanted .*7", opened, path, ",val=0", action_dim=7)
    one_line("a chunk per <action_token> .* of the model's horizon 30", opened, path, ",val=0", horizon=30)


# ---- Learnt -----------------------------------------------------------------------------------------------


def small(**config):
    return x0.configure(x0.PRESETS["tiny"], **{"views": VIEWS, "horizon": 8, "fast_min": -30, "fast": "fit", **config})


@agilex
def test_the_model_learns_them_together(processed, tmp_path):
    """Codes of the file = those of its actions; the row's own words, or the preset's."""
    gray(tmp_path / "a.png")
    cup = {"image": "a.png", "conversations": talk("<image>What?", "a cup")}
    vqa = write_jsonl(tmp_path / "vqa.jsonl", cup, codes_row(None))
    both = opened(processed / "train.jsonl", f",val=0+robobrain={vqa},val=0")
    cfg, stats = small(), data.dataset_statistics(both)
    words = x0.load_tokenizer(cfg)
    x0.fit(cfg, words, both, stats)
    rows = [x0.prepare(both[i], cfg, words, stats, i, train=True) for i in (0, len(both) - 2, len(both) - 1)]
    model = x0.Model(cfg, words, stats)
    model.loss(x0.collate(rows, cfg))[0].backward()
    said = [[int(i) for i in p["labels"] if i != -100] for p in rows]
    expected = words.actions.encode(x0.normalize(both[0]["actions"], stats["mine"]["action"]))
    assert [i - cfg.action_id for i in said[0] if 0 <= i - cfg.action_id < cfg.codes] == expected
    assert words.decode(said[1][:-2]) == "a cup" and words.decode(said[2][:-2]) == "I understand the task."
    asked = words.decode(rows[0]["ids"].tolist())
    assert f"robot gripper task: {both[0]['instruction']}" in asked       # the preset's words, as it is asked
    acted = x0.prepare({name: both[0][name] for name in ("images", "instruction")}, cfg, words)
    assert rows[0]["ids"].tolist()[:len(acted["ids"])] == acted["ids"].tolist()
    assert len(rows[0]["patches"]) == 3 * 64                              # pictures as when it acts


@agilex
def test_official_prompts_are_learnt_word_for_word(processed):
    lines = opened(processed / "train.jsonl", ",val=0")
    cfg, stats = small(prompt="", robot="agilex"), data.dataset_statistics(lines)
    words = x0.load_tokenizer(cfg)
    x0.fit(cfg, words, lines, stats)
    ids = x0.prepare(lines[0], cfg, words, stats)["ids"].tolist()
    human = lines[0]["conversations"][0]["value"]
    assert words.decode([i for i in ids if i < cfg.action_id]).count(human.rpartition("<image>")[2]) == 1
    x = x0.normalize(lines[0]["actions"], stats["mine"]["action"])
    codes = words.actions.encode(x)
    coded = {k: v for k, v in lines[0].items() if k != "actions"} | {"action_codes": [codes]}
    again = x0.prepare(coded, cfg, words)
    assert again["ids"].tolist() == ids and codes
    coded["action_codes"] = [[1024]]
    one_line("action_codes up to 1024, but codes=1024", x0.prepare, coded, cfg, words)
