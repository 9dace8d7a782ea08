"""data.py's RLDS: sets that tensorflow-datasets wrote, all transforms and mixtures, weights, damage, contact sheets."""
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import cogact
import data
import forks
import robobrain_x0
from fixtures import write_rlds
from test_data_robovlms import calvin, opened, written

FIXTURE = Path(__file__).parent / "fixtures" / "rlds"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def reader(name, root=FIXTURE, **how):
    options = {"val": "0"} | how.pop("options", {})
    return data.Rlds(root / name, options=options, **{"views": ("third",), "horizon": 3} | how)


def number(found, i):
    """Which of the writer's episodes the i-th of the set is (it shuffles them): its text says so."""
    return int(found.recording(i)["instruction"].split()[1].strip(","))


def copied(tmp_path, name="bridge_orig"):
    shutil.copytree(FIXTURE / name, tmp_path / name)
    return tmp_path / name


# ---- What tensorflow-datasets wrote -----------------------------------------------------------------------

@pytest.mark.parametrize("name", ["custom_finetuning", "fractal20220817_data", "kuka"])
def test_every_field_of_a_set_that_tensorflow_datasets_wrote(name):
    found = reader(name, history=2)
    assert sorted(number(found, i) for i in range(len(found.kept))) == [*range(len(write_rlds.LENGTHS[name]))]
    for i in range(len(found.kept)):
        e = number(found, i)
        x, n, start = write_rlds.episode(name, e), write_rlds.LENGTHS[name][e], int(found.at[i])
        if name == "custom_finetuning":
            actions, state = x["action"], np.zeros((n, 1))
        else:
            grip = cogact.absolute_gripper(x["action"]["gripper_closedness_action"][:, 0])[:, None]
            actions = np.concatenate([x["action"]["world_vector"], x["action"]["rotation_delta"], grip], 1)
            state = np.concatenate([write_rlds.numbers(e, n, 7), write_rlds.numbers(e, n, 1)], 1)
        for t in range(n):
            sample = data.check_sample(found[start + t], horizon=3, action_dim=7, views=("third",))
            assert np.array_equal(sample["actions"], actions[np.minimum(np.arange(t, t + 3), n - 1)])
            assert sample["loss_mask"].tolist() == (np.arange(t, t + 3) < n).tolist()
            assert np.array_equal(sample["state"], state[t]) and sample["dataset"] == name
            assert sample["instruction"] == f"do {e}, {name}"
            assert np.array_equal(sample["images"]["third"], write_rlds.picture(e, t))             # PNG: lossless
            if t:
                assert np.array_equal(sample["history_images"]["third"][0], write_rlds.picture(e, t - 1))
    x = np.concatenate([found.recording(i)["actions"] for i in range(len(found.kept))]).astype(np.float64)
    assert np.allclose(found.stats[name]["action"]["q99"], np.quantile(x, 0.99, 0), rtol=1e-12)
    assert found.stats[name]["action"]["mask"] == [True] * 6 + [False]


def test_a_table_of_another_version_is_not_read(monkeypatch):
    made = reader("kuka").path
    monkeypatch.setattr(data, "TABLE", data.TABLE + 1)
    assert reader("kuka").path != made


def test_a_camera_that_oxe_does_not_name_is_not_guessed():
    with pytest.raises(ValueError, match="no camera for the view 'wrist' of this set, only .'image_0', 'image_1'"):
        reader("bridge_orig", views=("third", "wrist"))
    named = reader("bridge_orig", views=("third", "wrist"), options={"wrist": "image_1"})
    assert named.views == {"third": "image_0", "wrist": "image_1"}


def test_language_tables_text_is_code_points_and_its_gripper_stays_open():
    found, sample = reader("language_table"), reader("language_table")[1]
    assert found.tasks == ["do 0, language_table"] == [sample["instruction"]]
    assert np.array_equal(sample["actions"][0], [1, 1.125, 0, 0, 0, 0, 1])
    assert np.array_equal(sample["state"], [1, 1.125, 0, 0, 0, 0, 0, 0])


def test_trap_15_bridge_drops_its_first_step_and_is_relabelled():
    found = reader("bridge_orig", views=("third", "side"))
    for i in range(3):
        e, start = number(found, i), int(found.at[i])
        x, n = write_rlds.episode("bridge_orig", e), write_rlds.LENGTHS["bridge_orig"][e]
        state = x["observation"]["state"]
        assert found.kept[i][1] == n - 2
        assert np.array_equal(found.recording(i)["actions"], cogact.bridge_actions(x["action"], state))
        for t in range(n - 2):
            sample = found[start + t]
            assert np.array_equal(sample["state"], [*state[t + 1, :6], 0, state[t + 1, 6]])
            for camera, view in enumerate(("third", "side")):
                off = sample["images"][view].astype(int) - write_rlds.picture(e, t + 1, camera)
                assert np.abs(off).mean() < 25             # a JPEG of steep colours; of the next frame or camera, 40


def test_trap_3_jpegs_are_tensorflows_to_the_bit_with_simplejpeg():
    theirs = np.load(FIXTURE / "pixels.npz")
    found, exact = reader("bridge_orig"), data._simplejpeg() is not None
    assert ("simplejpeg" if exact else "pillow") in found.told["JPEG"] and found.told["JPEG"] in " ".join(found.facts())
    for i in range(3):
        off = np.abs(found[int(found.at[i])]["images"]["third"].astype(int) - theirs[f"episode {number(found, i)}"])
        assert off.max() == 0 if exact else 0 < off.max() < 40 and off.mean() < 3, (off.max(), off.mean())
    if not exact:
        pytest.skip("simplejpeg is not installed: pixels are pillow's, near TensorFlow's (pip install simplejpeg)")


def test_trap_4_pillows_lanczos_is_not_tensorflows():
    """What CogACT trains on is TensorFlow's (golden: test_cogact.py); Pillow's is off by a level here and there."""
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    image = (128 + 90 * np.sin(x / 9 + [[[0]], [[1]], [[2]]]) * np.cos(y / 7)).transpose(1, 2, 0).astype(np.uint8)
    ours = cogact.resize_for_training(image, 56).astype(int)
    off = np.abs(ours - np.array(Image.fromarray(image).resize((56, 56), Image.LANCZOS)))
    assert 0 < off.max() <= 1 and 0.05 < (off > 0).mean() < 0.5


def test_an_episode_shorter_than_the_chunk_repeats_its_last_action():
    found = reader("custom_finetuning", horizon=9)
    for i in range(2):
        sample, n = found[int(found.at[i])], found.kept[i][1]
        assert sample["loss_mask"].tolist() == [True] * n + [False] * (9 - n)
        assert (sample["actions"][n:] == sample["actions"][n - 1]).all()


# ---- Recipes: what is made of a step ----------------------------------------------------------------------

def recipe(text, x):
    """A recipe's columns (n, k), of the features x {name: (n, .)}."""
    n = len(next(iter(x.values())))
    x = {"0": np.zeros((n, 1), np.float32)} | x
    return np.concatenate([data.recipe_column(term, x.__getitem__) for term in text.split()], 1)


def test_recipes_match_the_official_recordings():
    x = load_file(Path(__file__).parent / "golden" / "cogact" / "rlds.safetensors")
    for i in range(4):
        for rule, name in (("binary", "binarize"), ("absolute", "rel2abs")):
            found = recipe(f"{rule}(g)", {"g": x[f"{name}{i}.in"][:, None]})[:, 0]
            assert np.array_equal(found, x[f"{name}{i}.out"])
    *_, action, keep = data.OXE["bridge_orig"]
    found = recipe(action, {"action": x["bridge.in.action"], "observation/state": x["bridge.in.state"]})
    assert np.allclose(data._cut(found, keep), x["bridge.out.action"], atol=1e-6)
    assert data._cut(np.arange(14), keep).tolist() == x["bridge.out.frame_index"].tolist()
    action = {key[7:]: v for key, v in x.items() if key.startswith("rt1.in.")}
    found = recipe(data.OXE["fractal20220817_data"][3], action)
    assert np.allclose(found, x["rt1.out.action"], atol=1e-6)


def cat(*parts):
    return np.concatenate([x if x.ndim == 2 else x[:, None] for x in parts], 1)


def dictionary(x, gripper, turn=None):
    return cat(x["world_vector"], x["rotation_delta"] if turn is None else turn, gripper)


def closedness(x):
    return x["gripper_closedness_action"][:, 0]


def euler(x):
    return robobrain_x0.quat_to_euler(x["action"][:, 3:7].astype(np.float64))


def bridge(x, gripper):
    state = x["observation/state"][:, :6]
    return cat(np.concatenate([state[1:] - state[:-1], np.zeros((1, 6))]), gripper)


def six(x):
    return cat(x["action"][:, :6], 1 - np.clip(x["action"][:, 6], 0, 1))


def relative(x):
    return dictionary(x, cogact.absolute_gripper(closedness(x)))


def shut(x):
    return dictionary(x, 1 - np.clip(closedness(x), 0, 1))


# As methods/cogact.md section 11 and openvla's transforms say it: set: (width of its `action`, its 7 numbers)
OFFICIAL = {
    "bridge_orig": (7, lambda x: bridge(x, cogact.binarize_gripper(x["action"][:, 6]))),
    "bridge": (7, lambda x: bridge(x, x["open_gripper"])), "roboturk": (7, shut), "viola": (7, shut),
    "fractal20220817_data": (7, relative), "kuka": (7, relative), "berkeley_autolab_ur5": (7, relative),
    "taco_play": (7, lambda x: cat(x["rel_actions_world"][:, :6], np.clip(x["rel_actions_world"][:, 6], 0, 1))),
    "jaco_play": (7, lambda x: dictionary(x, cogact.absolute_gripper(closedness(x)), np.zeros((20, 3)))),
    "berkeley_cable_routing": (7, lambda x: dictionary(x, np.zeros(20))),
    "toto": (7, lambda x: dictionary(x, x["open_gripper"])),
    "language_table": (2, lambda x: cat(x["action"], np.zeros((20, 4)), np.ones(20))),
    "stanford_hydra_dataset": (7, lambda x: cat(x["action"][:, :6], 1 - x["action"][:, 6])),
    "dlr_edan_shared_control": (7, lambda x: cat(x["action"][:, :6], 1 - x["action"][:, 6])),
    "nyu_franka_play_dataset": (15, lambda x: cat(x["action"][:, 7:13], np.clip(x["action"][:, 13], 0, 1))),
    "furniture_bench_dataset":
        (8, lambda x: cat(x["action"][:, :3], euler(x), 1 - np.clip(x["action"][:, 7], 0, 1))),
    "iamlab_cmu_pickup_insert": (8, lambda x: cat(x["action"][:, :3], euler(x), x["action"][:, 7])),
    "ucsd_kitchen_dataset": (8, lambda x: x["action"][:, :7]), "cmu_stretch": (8, lambda x: x["action"][:, :7]),
    "berkeley_fanuc_manipulation": (6, lambda x: cat(x["action"], 1 - x["observation/state"][:, 6])),
    "bc_z": (7, lambda x: cat(
        x["future/xyz_residual"][:, :3], x["future/axis_angle_residual"][:, :3], 1 - x["future/target_close"][:, 0])),
    "fmb_dataset": (7, lambda x: x["action"]), "dobbe": (7, lambda x: x["action"]),
    "custom_finetuning": (7, lambda x: x["action"]),
    **dict.fromkeys([f"austin_{name}_dataset" for name in ("buds", "sailor", "sirius")], (7, six)),
    "utaustin_mutex": (7, six),
    **dict.fromkeys([f"libero_{suite}_no_noops" for suite in ("spatial", "object", "goal", "10")], (7, six))}
OFFICIAL["bridge_dataset"] = OFFICIAL["bridge_orig"]


@pytest.mark.parametrize("name", data.OXE)
def test_every_entry_gives_the_official_seven_numbers(name):
    rng, (width, wanted) = np.random.default_rng(0), OFFICIAL[name]
    widths = {"action": width, "observation/state": 8, "world_vector": 3, "rotation_delta": 3, "open_gripper": 1,
              "gripper_closedness_action": 1, "rel_actions_world": 7, "future/xyz_residual": 30,
              "future/axis_angle_residual": 30, "future/target_close": 10}
    x = {key: rng.uniform(-1.5, 1.5, (20, k)).astype(np.float32) for key, k in widths.items()}
    found = recipe(data.OXE[name][3], x)
    assert found.shape == (20, 7) and np.allclose(found, wanted(x), atol=1e-5)


def test_trap_9_quaternions_of_furniture_bench_and_iamlab_are_xyzw():
    """They become angles about x, y, z, even looking straight up."""
    assert np.allclose(data.quaternion_to_euler(np.array([[np.sin(0.1), 0, 0, np.cos(0.1)]])), [[0.2, 0, 0]])
    angles = np.array([[0.3, -1.2, 2], [0, 0, 0], [-3, 0.5, -2.9], [1, np.pi / 2, 0], [-2, -np.pi / 2, 0]])
    q = robobrain_x0.euler_to_quat(angles)
    assert np.allclose(data.quaternion_to_euler(3 * q), angles, atol=2e-4)


def part(*cuts):
    """The state out of parts of `state`: (start, end), or a number of zeros."""
    return lambda x: cat(*(np.zeros((20, cut)) if isinstance(cut, int) else x["state"][:, slice(*cut)] for cut in cuts))


def named(*names):
    return lambda x: cat(*(np.zeros((20, name)) if isinstance(name, int) else x[name] for name in names))


# As openvla's oxe/configs.py (cameras, state) and transforms.py (what `state` is made of) say it
BRIDGE_STATE, WHOLE, EIGHT = part((0, 6), 1, (-1, None)), part((0, None)), part((0, 8))
POSE, BOTH = "clip_function_input/base_pose_tool_reached", ("image", "wrist_image")
CONFIGS = {       # set: primary, wrist camera, state
    "bridge_orig": ("image_0", "", BRIDGE_STATE), "bridge_dataset": ("image_0", "", BRIDGE_STATE),
    "bridge": ("image", "", BRIDGE_STATE), "kuka": ("image", "", named(POSE, "gripper_closed")),
    "fractal20220817_data": ("image", "", named("base_pose_tool_reached", "gripper_closed")),
    "taco_play": ("rgb_static", "rgb_gripper",
                  lambda x: cat(x["robot_obs"][:, :6], np.zeros(20), x["robot_obs"][:, 7])),
    "jaco_play": ("image", "image_wrist", lambda x: cat(
        x["end_effector_cartesian_pos"][:, :6], np.zeros(20), x["end_effector_cartesian_pos"][:, -1])),
    "berkeley_cable_routing": ("image", "wrist45_image", named("robot_state", 1)),
    "roboturk": ("front_rgb", "", named(8)), "toto": ("image", "", named("state", 1)),
    "viola": ("agentview_rgb", "eye_in_hand_rgb", named("joint_states", "gripper_states")),
    "berkeley_autolab_ur5": ("image", "hand_image", lambda x: x["robot_state"][:, 6:14]),
    "language_table": ("rgb", "", named("effector_translation", 6)),
    "stanford_hydra_dataset": (*BOTH, part((0, 3), (7, 10), 1, (-3, -2))),
    "austin_buds_dataset": (*BOTH, EIGHT), "utaustin_mutex": (*BOTH, EIGHT),
    "austin_sailor_dataset": (*BOTH, WHOLE), "austin_sirius_dataset": (*BOTH, WHOLE),
    "nyu_franka_play_dataset": ("image", "", part((-6, None), 2)),
    "furniture_bench_dataset": (*BOTH, part((0, 7), (-1, None))),
    "ucsd_kitchen_dataset": ("image", "", part((0, 7), 1)), "dlr_edan_shared_control": ("image", "", named("state", 1)),
    "iamlab_cmu_pickup_insert": (*BOTH, part((0, 7), (7, 8))),
    "berkeley_fanuc_manipulation": (*BOTH, part((0, 6), 1, (6, 7))),
    "cmu_stretch": ("image", "", part((0, 3), 3, 1, (-1, None))),
    "bc_z": ("image", "", named("present/xyz", "present/axis_angle", 1, "present/sensed_close")),
    "fmb_dataset": ("image_side_1", "image_wrist_1", named("eef_pose", "state_gripper_pose")),
    "dobbe": ("wrist_image", "", WHOLE),
    **dict.fromkeys([f"libero_{suite}_no_noops" for suite in ("spatial", "object", "goal", "10")], (*BOTH, WHOLE))}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_entry_has_the_official_cameras_and_state(name):
    third, wrist, wanted = CONFIGS[name]
    widths = {"state": 13, "robot_obs": 15, "robot_state": 15, "end_effector_cartesian_pos": 7, "joint_states": 7,
              "base_pose_tool_reached": 7, POSE: 7, "gripper_closed": 1, "gripper_states": 1,
              "effector_translation": 2, "present/xyz": 3, "present/axis_angle": 3, "present/sensed_close": 1,
              "eef_pose": 6, "state_gripper_pose": 1}
    rng = np.random.default_rng(0)
    x = {key: rng.normal(size=(20, k)).astype(np.float32) for key, k in widths.items()}
    packed = {key: [zlib.compress(row.tobytes()) for row in x[key]] for key in (POSE, "gripper_closed")}
    found = recipe(data.OXE[name][2], x | (packed if name == "kuka" else {}))
    assert data.OXE[name][:2] == (third, wrist) and np.array_equal(found, wanted(x).astype(np.float32))
    assert len(data.OXE[name]) == 4 + name.startswith("bridge") and {*data.OXE} == {*CONFIGS, "custom_finetuning"}


def test_mixtures_are_the_published_ones():
    """openvla/openvla, prismatic/vla/datasets/rlds/oxe/mixtures.py, names without _converted_externally_to_rlds."""
    soup = {
        "fractal20220817_data": 0.54087122203, "kuka": 0.8341046294, "bridge_orig": 1.0, "taco_play": 2.0,
        "jaco_play": 1.0, "berkeley_cable_routing": 1.0, "roboturk": 2.0, "viola": 2.0, "berkeley_autolab_ur5": 2.0,
        "toto": 1.0, "language_table": 0.1, "stanford_hydra_dataset": 2.0, "austin_buds_dataset": 1.0,
        "nyu_franka_play_dataset": 3.0, "furniture_bench_dataset": 0.1, "ucsd_kitchen_dataset": 2.0,
        "austin_sailor_dataset": 1.0, "austin_sirius_dataset": 1.0, "dlr_edan_shared_control": 1.0,
        "iamlab_cmu_pickup_insert": 1.0, "utaustin_mutex": 1.0, "berkeley_fanuc_manipulation": 2.0, "cmu_stretch": 1.0}
    plus = {
        "fractal20220817_data": 1.0, "kuka": 0.8341046294, "bridge_orig": 1.0, "taco_play": 2.0, "jaco_play": 1.0,
        "berkeley_cable_routing": 1.0, "roboturk": 2.0, "viola": 2.0, "berkeley_autolab_ur5": 2.0, "toto": 1.0,
        "stanford_hydra_dataset": 2.0, "austin_buds_dataset": 1.0, "nyu_franka_play_dataset": 3.0,
        "furniture_bench_dataset": 0.1, "ucsd_kitchen_dataset": 2.0, "austin_sailor_dataset": 1.0,
        "austin_sirius_dataset": 1.0, "dlr_edan_shared_control": 1.0, "iamlab_cmu_pickup_insert": 1.0,
        "utaustin_mutex": 1.0, "berkeley_fanuc_manipulation": 2.0, "cmu_stretch": 1.0, "bc_z": 0.2, "fmb_dataset": 1.0,
        "dobbe": 0.2}
    assert data.MIXTURES == {
        "bridge": {"bridge_orig": 1.0}, "rt_1": {"fractal20220817_data": 1.0},
        "bridge_rt_1": {"bridge_orig": 1.0, "fractal20220817_data": 1.0}, "oxe_magic_soup": soup,
        "oxe_magic_soup_plus_minus": plus}
    assert {key for sets in data.MIXTURES.values() for key in sets} <= {*data.OXE}


# ---- Names and options ------------------------------------------------------------------------------------

def test_entries_recipes_and_names_of_ones_own(tmp_path):
    root, own = copied(tmp_path, "custom_finetuning"), tmp_path / "sets.json"
    root.rename(root := tmp_path / "my_robot")
    own.write_text(json.dumps({"my_robot": ["image", "", "action[:2] 0", "action[:6] 1-clip(action[6:])"]}))
    plain = reader("my_robot", tmp_path)
    mine = reader("my_robot", tmp_path, options={"sets": str(own), "name": "mine"})
    assert plain.stats.keys() == {"my_robot"} and mine.stats.keys() == {"mine"}
    x = plain.recording(0)["actions"]
    assert np.array_equal(mine.recording(0)["actions"], cat(x[:, :6], 1 - np.clip(x[:, 6], 0, 1)))
    assert np.array_equal(mine.recording(0)["state"], cat(x[:, :2], np.zeros(len(x))))
    asked = reader("my_robot", tmp_path, options={"action": "action[2:5]", "state": "action"})
    assert np.array_equal(asked[0]["actions"][0], x[0, 2:5]) and np.array_equal(asked[0]["state"], x[0])
    like = reader("my_robot", tmp_path, options={"like": "austin_buds_dataset", "state": "action"})
    assert like.action == data.SIX and like.views == {"third": "image"}
    (root / "1.0.0").rename(root / "1.2.0")                # several versions: the newest
    shutil.copytree(root / "1.2.0", root / "1.10.0")
    assert reader("my_robot", tmp_path).files[0].parent.name == "1.10.0"
    assert reader("1.2.0", root).name == "my_robot"
    (tmp_path / "bc_z").mkdir()
    for version in ("0.1.0", "1.0.1"):
        shutil.copytree(root / "1.2.0", tmp_path / "bc_z" / version)
    found = reader("bc_z", tmp_path, options={"action": "action", "state": "action"})
    assert found.files[0].parent.name == "0.1.0"           # its later versions are broken
    shutil.rmtree(tmp_path / "bc_z" / "0.1.0")
    with pytest.raises(ValueError, match="bc_z: found 1.0.1; of this set version 0.1.0 is wanted"):
        reader("bc_z", tmp_path, options={"action": "action", "state": "action"})
    for keep in ("99:", "1:x"):
        own.write_text(json.dumps({"my_robot": ["image", "", "", "action", keep]}))
        with pytest.raises(ValueError, match=f"keep: cannot be made as '{keep}' says"):
            reader("my_robot", tmp_path, options={"sets": str(own)})
    own.write_text('{"my_robot": ["image", 3]}')
    for options, said in (
            ({"like": "bridge_origg"}, "did you mean 'bridge_orig'"), ({"split": "test"}, "split: there is no"),
            ({"action": "actoin"}, "a step has no actoin, only action, "), ({"third": "nose"}, "'nose'"),
            ({"sets": str(own)}, "wanted [third, wrist, state, action], found"), ({"sets": "nowhere"}, "nowhere"),
            *(({"action": slip}, f"actions: cannot be made as {slip!r} says") for slip in (
                "twist(action)", "action[3]", "action[:6]1", "1-", "clip(action", "action[:0]",
                "euler(action[:3])", "zlib(action)")),
            ({"state": "action action[9:]"}, "state: cannot be made")):
        with pytest.raises(ValueError) as e:
            reader("my_robot", tmp_path, options=options)
        assert said in str(e.value) and "\n" not in str(e.value), options


def test_a_mixture_reads_its_sets_with_their_weights(tmp_path, capsys):
    wanted = {"horizon": 2, "action_dim": 7, "views": ("third",)}
    found = data.open_dataset(f"rlds={FIXTURE},mixture=bridge_rt_1,val=0", **wanted)
    assert len(found) == 9 + 8 and [*data.dataset_statistics(found)] == ["bridge_orig", "fractal20220817_data"]
    said = capsys.readouterr().err
    assert "52.9% bridge_orig, 47.1% fractal20220817_data" in said and "JPEG=" in said
    for name, said in (("oxe_magic_soup", "19 of 23 sets are not there: taco_play, "),
                       ("bridg", "did you mean 'bridge'")):
        with pytest.raises(ValueError, match=said):
            data.open_dataset(f"rlds={FIXTURE},mixture={name}", **wanted)
    shutil.copytree(FIXTURE / "kuka", tmp_path / "stanford_hydra_dataset_converted_externally_to_rlds")
    (tmp_path / "kuka").mkdir()
    data.MIXTURES["mine"] = {"stanford_hydra_dataset": 2, "kuka": 1}
    try:
        (_, folder, options), _ = data.recorded_sets(f"rlds={tmp_path},mixture=mine")
    finally:
        del data.MIXTURES["mine"]
    assert folder.endswith("hydra_dataset" + data.EXTERNAL) and options == {"weight": "2.0"}
    twice = data.recorded_sets(f"rlds={FIXTURE},mixture=bridge_rt_1,weight=0.5")           # its weights, times this
    assert [options["weight"] for *_, options in twice] == ["0.5", "0.5"]
    with pytest.raises(ValueError, match="weight=x: a number above 0 is wanted"):
        data.recorded_sets(f"rlds={FIXTURE},mixture=bridge_rt_1,weight=x")


def test_robovlms_official_json_reads_its_mixture(tmp_path):
    """type OpenVLADataset, data_root_dir, data_mix: windows of the mixture's sets, as of any other episodes."""
    block = {"type": "OpenVLADataset", "data_dir": None, "data_root_dir": str(FIXTURE), "data_mix": "bridge_rt_1"}
    def found(split="train", **more):
        path = Path(written(tmp_path, **{**block, **more}))
        about = json.loads(path.read_text())
        path.write_text(json.dumps(about | {"val_dataset": about["train_dataset"]}))
        return opened(str(path), split, views=("third",))
    train, sets = found(), [reader(name) for name in ("bridge_orig", "fractal20220817_data")]
    assert len(train) == 9 + 8 and {*train.stats} == {"bridge_orig", "fractal20220817_data"}
    wanted, sample = sets[1].recording(0), train[9 + 2]                    # W = 3, K = 2: a frame with all its history
    assert np.array_equal(sample["images"]["third"], wanted["images"]["third"][2])
    assert np.array_equal(sample["history_images"]["third"], wanted["images"]["third"][:2])
    assert np.array_equal(sample["actions"], wanted["actions"][2:4]) and sample["instruction"] == wanted["instruction"]
    assert len(found(left_pad=False)) == sum(max(0, n - 2) for one in sets for _, n in one.kept)
    assert len(found(data_mix="kuka")) == 3 and found("val") is None       # too few for every 20th


def test_weights_act_on_an_official_json_of_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setitem(data.MIXTURES, "mine", {"bridge_orig": 1 / 3, "fractal20220817_data": 1})
    path = Path(written(tmp_path, type="OpenVLADataset", data_dir=None, data_root_dir=str(FIXTURE), data_mix="mine"))
    about = json.loads(path.read_text())
    block = about["train_dataset"]
    path.write_text(json.dumps(about | {"train_dataset": [block, block | {"data_mix": "kuka"}]}))
    found = opened(str(path), views=("third",))
    assert len(found) == 3 + 8 + 3 and found[13]["dataset"] == "kuka"
    batches = data.loader(found, lambda sample, key: sample, lambda x: x, len(found))
    drawn = [sample["actions"].tobytes() for _ in range(12) for sample in next(batches)
             if sample["dataset"] == "bridge_orig"]
    assert len(drawn) == 36 and len(set(drawn)) > 3        # every epoch draws another third


# ---- Weights, for every form ------------------------------------------------------------------------------

class Numbers(torch.utils.data.Dataset):
    def __init__(self, n, name):
        self.n, self.name, self.stats = n, name, {name: {}}

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        assert 0 <= i < self.n
        return self.name, int(i)


def test_a_weight_is_how_often_a_frame_is_drawn_in_an_epoch():
    """Whole weights: each frame that often in every epoch; a tenth: one of each ten, another in each epoch."""
    found = data.Bodies([Numbers(7, "one"), Numbers(5, "two"), Numbers(100, "tenth")], [1, 2, 0.1])
    assert len(found) == 7 + 10 + 10 and list(found.stats) == ["one", "two", "tenth"]
    sampler, drawn = data.Sampler(len(found), 27, seed=3), []
    for epoch in range(4):
        drawn.append([found.draw(index, key) for index, key in sampler[epoch]])
        counts = {one: drawn[-1].count(one) for one in drawn[-1]}
        assert all(counts["one", i] == 1 for i in range(7)) and all(counts["two", i] == 2 for i in range(5))
        assert sorted(i // 10 for name, i in drawn[-1] if name == "tenth") == [*range(10)]
    assert len({i for epoch in drawn for name, i in epoch if name == "tenth"}) > 20
    again = data.Sampler(len(found), 9, rank=1, world=3, seed=3)           # nothing but (seed, epoch, index) counts
    assert [found.draw(*one) for one in again[2]] == drawn[2][9:18]
    plain = data.Bodies([Numbers(7, "one"), Numbers(5, "two")])
    assert [plain[i] for i in range(12)] == [plain.draw(i, 2**63 - 1) for i in range(12)]
    assert plain[11] == ("two", 4) and len(data.Bodies([Numbers(3, "x")], [1e-9])) == 1
    with pytest.raises(IndexError):
        plain[12]


def test_weights_on_the_command_line_act_on_every_form():
    spec = f"rlds={FIXTURE}/kuka,val=0,weight=3+rlds={FIXTURE}/custom_finetuning,val=0,weight=0.5"
    wanted = {"horizon": 2, "action_dim": 7, "views": ("third",)}
    found = data.open_dataset(spec, **wanted)
    assert len(found) == 9 + 3
    batches = [next(data.loader(found, lambda sample, key: sample, lambda x: x, 12, start_step=k)) for k in (0, 0, 1)]
    names = [[(x["dataset"], x["actions"][0, 0]) for x in batch] for batch in batches]
    assert names[0] == names[1] != names[2] and [name for name, _ in names[0]].count("kuka") == 9
    assert len({x for name, x in names[0] if name == "kuka"}) == 3
    alone = [len(data.open_dataset(f"rlds={FIXTURE}/kuka,val=0,weight={w}", **wanted)) for w in (3, 1, 0.4)]
    assert alone == [9, 3, 1]                              # of one set alone, too
    for weight in ("0", "-1", "x", "inf"):
        with pytest.raises(ValueError, match=f"weight={weight}: a number above 0 is wanted"):
            data.open_dataset(spec.replace("weight=3", f"weight={weight}"), **wanted)


def test_trap_10_rotations_are_euler_in_bridge_and_calvin_and_axis_angle_in_simpler_env(tmp_path):
    """Their sets' angles are read as they are; what goes to SimplerEnv is made axis * angle on the way."""
    found = reader("bridge_orig")
    e = write_rlds.episode("bridge_orig", number(found, 0))["observation"]["state"]
    assert np.array_equal(found.recording(0)["actions"][:, 3:6], np.diff(e[1:, 3:6], axis=0).astype(np.float32))
    frames = data.CalvinSegments(calvin(tmp_path), views=("third",))
    assert np.allclose(frames[9]["actions"][0, 3:6], 0.09) and np.allclose(frames[9]["state"][3:6], 0.9)
    assert data.OXE["bc_z"][3].split()[1] == "future/axis_angle_residual[:3]"        # the one set that has these
    policy = cogact.Policy.__new__(cogact.Policy)
    policy.robot, policy.action_scale = "widowx_bridge", 1.0
    for angles in np.random.default_rng(0).uniform(-1.5, 1.5, (20, 3)):
        turn = policy.simpler_action(np.array([0, 0, 0, *angles, 1.0]))[3:6]
        half = np.linalg.norm(turn) / 2
        q = np.array([*turn / np.linalg.norm(turn) * np.sin(half), np.cos(half)])
        assert np.allclose(data.quaternion_to_euler(q[None])[0], angles) and not np.allclose(turn, angles, atol=0.01)


# ---- Damage -----------------------------------------------------------------------------------------------

SHARDS = [f"bridge_orig-train.tfrecord-0000{i}-of-00002" for i in range(2)]


def shard(root, i=0):
    return root / "1.0.0" / SHARDS[i]


def spans(root, i=0):
    with data._mapped(shard(root, i)) as b:
        return [*data.tfrecords(b, "x")]


def flip(path, at):
    b = bytearray(path.read_bytes())
    b[at] ^= 1
    path.write_bytes(b)


# bridge_orig's first file holds two records: (what is done to it, what is said, episodes left)
DAMAGE = {
    "cut off": (lambda root: os.truncate(shard(root), spans(root)[1][1] - 9),
                "00000-of-00002 is cut off in record 1, at byte", 2),
    "cut in a length": (lambda root: os.truncate(shard(root), spans(root)[0][1] + 9), "torn in record 1, at byte", 2),
    "a wrong length": (lambda root: flip(shard(root), 3), "is torn in record 0, at byte 0 of", 1),
    "empty": (lambda root: os.truncate(shard(root, 1), 0), "00001-of-00002 is empty", 2),
    "missing": (lambda root: shard(root, 1).unlink(), "00001-of-00002 is missing", 2),
    "a record less": (lambda root: os.truncate(shard(root), spans(root)[0][1] + 4), "that it holds more records", 2),
    "no Example": (lambda root: flip(shard(root, 1), 12), "record 0 is not as features.json says", 2)}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_tfrecord_is_named_and_left_out_only_when_asked(tmp_path, name):
    root, (do, said, left) = copied(tmp_path), DAMAGE[name]
    do(root)
    with pytest.raises(ValueError, match=f"{3 - left} of 3 episodes are damaged: ") as e:
        reader("bridge_orig", tmp_path)
    assert said in str(e.value) and "damaged=skip" in str(e.value) and "\n" not in str(e.value)
    found = reader("bridge_orig", tmp_path, options={"damaged": "skip"})
    assert len(found.kept) == left and found[len(found) - 1]["images"]["third"].shape == (24, 24, 3)


def test_a_flipped_bit_is_found_by_its_checksum(tmp_path):
    root = copied(tmp_path)
    found = reader("bridge_orig", tmp_path)
    assert not [*found.check()]
    at = found._rows(int(found.at[1]), int(found.at[1]) + 1)["at image_0"][0]
    flip(shard(root), int(at[0]) + 300)                    # inside a picture
    (number, why), = found.check()
    assert number == 1 and why.endswith("record 1: its checksum does not fit its bytes")
    b = shard(root).read_bytes()
    shard(root).write_bytes(b[:at[0]] + b"x" * 30 + b[at[0] + 30:])
    with pytest.raises(ValueError, match="00000-of-00002 is not as in RLDS"):
        found[int(found.at[1])]


@pytest.mark.parametrize(("file", "content"), [
    ("features.json", "{"), ("features.json", '{"featuresDict": {"features": {}}}'), ("features.json", None),
    ("dataset_info.json", None), ("dataset_info.json", '{"name": "x", "splits": [{"name": "train"}]}'),
    ("dataset_info.json", '{"name": "x", "fileFormat": "array_record", "splits": []}')])
def test_damaged_descriptions_are_one_line(tmp_path, file, content):
    path = copied(tmp_path) / "1.0.0" / file
    path.write_text(content) if content else path.unlink()
    with pytest.raises(ValueError) as e:
        reader("bridge_orig", tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_episodes_without_a_text_or_a_step_are_left_out(tmp_path):
    root, wanted = copied(tmp_path, "custom_finetuning"), reader("custom_finetuning")
    path = next(root.glob("*/*tfrecord*"))
    b = path.read_bytes()
    path.write_bytes(b.replace(b"do 1, custom_finetuning", b" " * 23))
    found = reader("custom_finetuning", tmp_path)
    e, = (i for i in range(2) if number(wanted, i) == 0)
    assert len(found.kept) == 1 and np.array_equal(found.recording(0)["actions"], wanted.recording(e)["actions"])
    assert "1 episodes left out: no text" in next(iter(found.facts()))


def test_checksums_match_known_ones():
    """RFC 3720's for 32 zeros; the lanes of long data give what single bytes give."""
    def unmasked(x):
        x = (x - 0xA282EAD8) & 0xFFFFFFFF
        return (x >> 17 | x << 15) & 0xFFFFFFFF
    assert unmasked(data.masked_crc(bytes(32))) == 0x8A9136AA
    assert unmasked(data.masked_crc(b"123456789")) == 0xE3069283
    x = np.random.default_rng(0).bytes(40_001)
    assert data.masked_crc(x) == data.masked_crc(x, lanes=10**6) == data.masked_crc(x, lanes=37)


def test_integers_of_every_length_and_sign():
    b, values = bytearray(), [0, 1, 127, 128, 300, 2**40, 2**63 - 1, -1, -2**63]
    for v in values:
        v &= 2**64 - 1
        while v > 127:
            b.append(v & 127 | 128)
            v >>= 7
        b.append(v)
    assert data.feature_values(b, 3, [(0, len(b))]).tolist() == values
    assert data.feature_values(b, 3, []).tolist() == []


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_read_what_the_main_process_reads():
    found = reader("bridge_orig")
    wanted = [found[i]["images"]["third"] for i in range(len(found))]
    batches = data.loader(found, lambda sample, key: sample["images"]["third"], lambda x: x, 9, workers=2,
                          shuffle=False)
    for _ in range(2):
        assert all(map(np.array_equal, next(batches), wanted))
    copy = pickle.loads(pickle.dumps(found))
    assert np.array_equal(copy[3]["images"]["third"], wanted[3])


# ---- The command ------------------------------------------------------------------------------------------

def test_the_command_describes_a_set_and_writes_a_contact_sheet(tmp_path):
    root, sheet = copied(tmp_path), tmp_path / "out" / "sheet.png"
    done = forks.shared()("data.py", root, "--sheet", sheet, cwd=tmp_path)
    assert done.rc == 0, done.err
    for text in ("3 episodes, 0 of them damaged; 9 frames, 2 to 4 in an episode", "RLDS, 2 files, split train; 0",
                 "action       moved(", "feature observation/state: float32 [7]", f"contact sheet {sheet}",
                 "'image_0': (24, 24, 3)"):
        assert text in done.out, text
    picture = np.array(Image.open(sheet))                  # three rows, of up to 4 frames of two cameras
    assert picture.shape == (3 * 112, 4 * 2 * 96, 3)
    for row in range(3):
        assert picture[row * 112:row * 112 + 16].max() > 200 and picture[row * 112 + 16:(row + 1) * 112].std() > 30
    os.truncate(shard(root), 100)
    done = forks.shared()("data.py", root, "--sheet", root / "sheet.png", cwd=tmp_path)
    assert done.rc == 2 and "give a FILE.png that is not in" in done.err
    done = forks.shared()("data.py", root, "--sheet", sheet, cwd=tmp_path)
    assert done.rc == 2 and done.out.count("\ndamaged ") == 2 and "is cut off in record 0" in done.out
    done = forks.shared()("data.py", FIXTURE, cwd=tmp_path)
    assert done.rc == 2 and "Of several sets, name one (rlds=DIR/SET), or a mixture" in done.err
    done = forks.shared()("data.py", tmp_path / "out", cwd=tmp_path)
    assert done.rc == 2 and "nor RLDS, with features.json" in done.err


def test_a_statistics_pass_that_was_killed_ends_in_the_same_bytes(tmp_path):
    """kill -9 before an operation on the disk, each time a later one; then the table of a run that was not."""
    def table(folder):
        return [path.read_bytes() for path in sorted((tmp_path / folder).rglob("*.safetensors"))]
    for k in (1, 2, 3, 4, None):
        how = {"kill_at": k} if k else {}
        done = forks.shared()("data.py", FIXTURE / "kuka", cwd=tmp_path,
                              env={"XDG_CACHE_HOME": str(tmp_path / "killed")}, **how)
        assert done.rc == (-9 if k else 0), (k, done.err)
        assert k is None or k > 3 or not table("killed")
    forks.shared()("data.py", FIXTURE / "kuka", cwd=tmp_path, env={"XDG_CACHE_HOME": str(tmp_path / "whole")})
    assert table("killed") == table("whole") and len(table("whole")) == 1


def test_the_loader_benchmark_writes_reads_and_measures(tmp_path, monkeypatch):
    """Its set is from a writer of its own, of Examples and checksums; `loop` reads what the reader reads."""
    monkeypatch.syspath_prepend(str(Path(data.__file__).parent / "benchmarks"))
    import bench_loader
    monkeypatch.setattr(bench_loader, "FRAMES", 6)
    bench_loader.make_rlds(tmp_path)
    found, where = bench_loader.opened("rlds", tmp_path, cogact.PRESETS["tiny"], False)
    assert len(where) == 8 * 6 and not [*found.check()]
    image, actions = bench_loader.plain_rlds(found, *where[7], 3)
    assert np.array_equal(found[7]["actions"][:3], actions) and actions[0, 0] == bench_loader.actions(1)[1, 0]
    assert np.abs(found[7]["images"]["third"].astype(int) - image).max() < 30
    row = bench_loader.measure("cogact", "rlds", tmp_path, 2, 1, 0.05)
    assert row["ratio"] > 0 and 0 < row["detail"]["decode"] <= 1 and row["detail"]["image_size"] == 224
