"""data.py's CALVIN as a plain form, for every method: --data calvin=DIR."""
import json

import numpy as np
import pytest

import data
import forks
from test_data_robovlms import Evil, calvin, opened, written


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plain(folder, split="train", **how):
    return data.CalvinSegments(folder, split, **{"horizon": 2, "history": 3, "views": ("third", "wrist")} | how)


def test_segments_are_episodes_of_relative_actions(tmp_path):
    found = plain(calvin(tmp_path))
    assert found.kept == [[0, 12], [1, 9]] and len(found) == 21 and found.tasks == ["lift it", "push it"]
    sample = data.check_sample(found[11], horizon=2, action_dim=7, state_dim=15, views=("third", "wrist"))
    assert sample["images"]["third"][0, 0, 0] == 11 and sample["images"]["wrist"][0, 0, 0] == 111
    assert sample["history_images"]["third"][:, 0, 0, 0].tolist() == [9, 10]
    assert sample["loss_mask"].tolist() == [True, False]       # frame 12, the segment's end, is no target
    assert np.allclose(sample["actions"][:, 0], 0.11) and np.allclose(sample["state"], 1.1)
    assert (found[11]["instruction"], found[12]["instruction"]) == ("lift it", "push it")
    assert found[12]["images"]["third"][0, 0, 0] == 20 and "history_images" not in found[12]
    assert len(found.stats[tmp_path.name]["action"]["q01"]) == 7 and sample["dataset"] == tmp_path.name
    absolute = plain(tmp_path, options={"action": "actions", "state": "scene_obs", "name": "mine"})
    assert absolute[0]["state"].shape == (24,) and list(absolute.stats) == ["mine"]


def test_it_shows_what_robovlms_own_reader_shows(tmp_path):
    """At a frame with all its history, both give the same sample; RoboVLMs' JSON alone cuts the windows' starts."""
    theirs, ours = opened(written(calvin(tmp_path)))[5], plain(tmp_path)[5 + 2]
    for key in ("actions", "loss_mask", "state", "history_actions"):
        assert np.array_equal(ours[key], theirs[key]), key
    for key in ("images", "history_images"):
        assert all(np.array_equal(ours[key][view], x) for view, x in theirs[key].items())
    assert ours["instruction"] == theirs["instruction"]


def test_robovlms_official_json_may_name_the_split_itself(tmp_path):
    """As the official ones do: data_dir .../task_ABCD_D/training."""
    calvin(tmp_path)
    whole, named = (opened(written(tmp_path, data_dir=str(folder))) for folder in (tmp_path, tmp_path / "training"))
    assert len(named) == len(whole) == 17 and np.array_equal(named[5]["actions"], whole[5]["actions"])


def test_trap_8_calvins_gripper_is_1_when_open(tmp_path):
    found, stored = plain(calvin(tmp_path), options={"gripper": "openvla"}), plain(tmp_path)
    assert [found[i]["actions"][0, 6] for i in range(4)] == [0, 1, 0, 1]
    assert [stored[i]["actions"][0, 6] for i in range(4)] == [-1, 1, -1, 1]
    assert found.stats[tmp_path.name]["action"]["mask"] == [True] * 6 + [False]


def test_any_method_opens_it_and_validation_is_its_own_folder(tmp_path):
    calvin(tmp_path)
    with np.load(tmp_path / "validation" / "episode_0000003.npz") as file:
        changed = dict(file) | {"rgb_static": np.full((20, 20, 3), 77, np.uint8)}
    np.savez(tmp_path / "validation" / "episode_0000003.npz", **changed)
    wanted = {"horizon": 8, "action_dim": 7, "views": ("third",)}
    for spec in (str(tmp_path), f"calvin={tmp_path}"):
        train, val = (data.open_dataset(spec, split, **wanted) for split in ("train", "val"))
        assert len(train) == len(val) == 21
        assert (train[3]["images"]["third"][0, 0, 0], val[3]["images"]["third"][0, 0, 0]) == (3, 77)
    assert data.form_of(tmp_path / "validation") == "calvin" and len(plain(tmp_path / "validation")) == 21
    both = data.open_dataset(f"calvin={tmp_path},weight=2+calvin={tmp_path}/validation,name=two", **wanted)
    assert len(both) == 63 and list(data.dataset_statistics(both)) == [tmp_path.name, "two"]
    with pytest.raises(ValueError, match="there is no option 'val'"):
        data.open_dataset(f"calvin={tmp_path},val=3", **wanted)


def test_a_folder_of_training_frames_validates_on_those_beside_it(tmp_path):
    calvin(tmp_path)
    assert plain(tmp_path / "training").folder.name == "training"
    assert plain(tmp_path / "training", "val").folder == plain(tmp_path, "val").folder == tmp_path / "validation"
    (tmp_path / "validation").rename(tmp_path / "away")
    for root in (tmp_path, tmp_path / "training"):
        with pytest.raises(ValueError, match="there is no folder validation, in it or beside it"):
            plain(root, "val")


DAMAGE = {
    "missing": (lambda path: path.unlink(), "FileNotFoundError"),
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:900]), "episode_0000004.npz is not as in CALVIN"),
    "without an action": (lambda path: np.savez(path, rgb_static=np.zeros((20, 20, 3), np.uint8)), "rel_actions"),
    "fewer numbers": (lambda path: np.savez(path, rel_actions=np.zeros(6), robot_obs=np.zeros(15)),
                      "frames 0 to 12: all input arrays must have the same shape"),
    "NaN": (lambda path: np.savez(path, rel_actions=np.full(7, np.nan), robot_obs=np.zeros(15)), "actions is nan")}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_frame_is_named_and_its_segment_left_out_only_when_asked(tmp_path, name):
    do, said = DAMAGE[name]
    do(calvin(tmp_path) / "training" / "episode_0000004.npz")
    with pytest.raises(ValueError, match="1 of 2 episodes are damaged: ") as e:
        plain(tmp_path)
    assert said in str(e.value) and "\n" not in str(e.value)
    found = plain(tmp_path, options={"damaged": "skip"})
    assert len(found) == 9 and found[0]["instruction"] == "push it"


def test_a_damaged_picture_is_found_by_the_command(tmp_path):
    path = calvin(tmp_path / "set") / "training" / "episode_0000021.npz"
    done = forks.shared()("data.py", tmp_path / "set", "--sheet", "sheet.png", cwd=tmp_path)
    assert done.rc == 0 and "2 episodes, 0 of them damaged; 21 frames, 9 to 12 in an episode" in done.out, done.err
    assert "CALVIN, training: 2 language segments" in done.out and (tmp_path / "sheet.png").is_file()
    assert not [*(tmp_path / "set").rglob("*.png")]
    b = path.read_bytes()
    at = b.index(bytes([21]) * 100)
    path.write_bytes(b[:at] + b"\0" * 100 + b[at + 100:])      # a picture's bytes do not fit its checksum
    done = forks.shared()("data.py", tmp_path / "set", cwd=tmp_path)
    assert done.rc == 2 and "episode_0000021.npz is not as in CALVIN: BadZipFile: Bad CRC-32" in done.out


def test_nothing_in_its_language_file_is_executed_and_a_wrong_folder_is_one_line(tmp_path, capsys):
    calvin(tmp_path / "evil", evil=np.array(Evil(), object))
    with pytest.raises(ValueError, match="holds no language of CALVIN: it names builtins.print"):
        plain(tmp_path / "evil")
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no language of CALVIN"):
        plain(tmp_path)
    (tmp_path / "empty.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="found a folder"):
        data.open_dataset(str(tmp_path / "evil" / ".."))
