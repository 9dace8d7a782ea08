"""The tabletop simulator, its expert, its episodes and the evaluation loop."""
import hashlib
import importlib
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import cogact
import common
import data
import eval_sim
import forks
from eval_sim import (FAMILIES, HELD_OUT, HOVER, PHRASES, SPLITS, Camera, Tabletop, expert, record_episode,
                      rotation, seeds)


def played(seed, family, split="eval", embodiment="gripper"):
    """An environment after the expert's episode."""
    env = Tabletop((family,), split, (), 16, embodiment)
    env.reset(seed)
    while env.count < env.max_steps and not env.success():
        env.advance(expert(env)[0])
    return env


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", ["eval", "hard"])
def test_expert_solves_99_percent(family, split):
    wins = sum(played(s, family, split).success() for s in seeds(split, 100))
    assert wins >= 99


def test_expert_recovers_from_disturbed_starts_and_bumps():
    rows = [record_episode(s, FAMILIES, "train", ()) for s in seeds("train", 200)]
    assert sum(r["success"] for r in rows) >= 190
    assert sum((r["executed"] != r["actions"]).any() for r in rows) > 60    # there were bumps


def test_same_seed_same_pixels_and_states():
    a, b = (record_episode(7, FAMILIES, "train", ("third", "wrist"), 32) for _ in range(2))
    assert a["instruction"] == b["instruction"]
    for k in ("state", "actions", "executed", "waypoints"):
        assert np.array_equal(a[k], b[k]), k
    for v in ("third", "wrist"):
        assert np.array_equal(a["images"][v], b["images"][v])


def test_splits_never_share_a_seed():
    drawn = [set(seeds(s, 1000, 999_000)) | set(seeds(s, 1000)) for s in SPLITS]
    assert sum(map(len, drawn)) == len(set.union(*drawn))
    with pytest.raises(ValueError, match="train, val, eval"):
        seeds("test", 3)
    with pytest.raises(ValueError, match="1,000,000"):
        seeds("train", 10, 999_999)


def test_hard_split_holds_out_pairs_phrases_and_camera():
    env, hard = Tabletop(FAMILIES, "train", (), 8), Tabletop(FAMILIES, "hard", (), 8)
    for s in range(150):
        env.reset(s)
        hard.reset(s)
        assert not {(t.colour, t.shape) for t in env.things} & set(HELD_OUT)
        assert (hard.x.colour, hard.x.shape) in HELD_OUT
        assert env.goals[0].phrase != PHRASES[env.family][-1]
        assert hard.goals[0].phrase == PHRASES[hard.family][-1]
    assert not np.allclose(env.third.eye, hard.third.eye)


def test_only_the_instruction_decides():
    """In one scene the expert solves several families: the picture alone does not tell the task."""
    solved = set()
    for family in ("pick", "put", "turn"):
        env = Tabletop(("turn",), "eval", (), 16)
        env.reset(2_000_003)                                                # a scene with a bar as X
        y = next(t for t in env.things if not t.movable) if family == "put" else None
        env.goals = [env.goals[0]._replace(family=family, y=y)]
        while env.count < 60 and not env.success():
            env.advance(expert(env)[0])
        solved |= {family} if env.success() else set()
    assert solved == {"pick", "put", "turn"}


def test_grasp_carry_drop():
    env = Tabletop(("put",), "eval", (), 16)
    env.reset(seeds("eval", 1)[0])
    x, y = env.x, env.y
    env.tcp = np.array([*x.at[:2], 0.025])
    for _ in range(3):
        env.advance([0, 0, 0, 0, 0, 0, 0])
    assert env.held is not None and env.held[0] is x                        # closed around it
    for _ in range(4):
        env.advance([0, 0, 0.04, 0, 0, 0, 0])
    assert x.at[2] > 0.1                                                    # carried up
    env.tcp[:2] = y.at[:2]
    env._carry()
    env.advance([0, 0, 0, 0, 0, 0, 1])
    assert env.held is None and x.at[2] == pytest.approx(y.top)             # dropped onto what is below
    assert env.success()


def test_closing_beside_an_object_grasps_nothing():
    env = Tabletop(("pick",), "eval", (), 16)
    env.reset(seeds("eval", 1)[0])
    env.tcp = np.array([*env.x.at[:2], 0.12])                               # above it
    for _ in range(3):
        env.advance([0, 0, 0, 0, 0, 0, 0])
    assert env.held is None and env.gap == 0


def test_push_moves_sideways_and_lifting_is_not_pushing():
    env = played(seeds("eval", 1)[0], "push")
    start, _ = env.start[id(env.x)]
    assert env.success() and env.x.at[2] == 0 and abs(env.x.at[1] - start[1]) > 0.06
    env.lifted = True
    assert not env.success()


def test_depth_and_projection_agree():
    """A point of the table: `project` and K with the extrinsics say the same pixel, whose depth is right."""
    env = Tabletop(("pick",), "eval", ("third",), 64)
    env.reset(seeds("eval", 1)[0])
    env.tcp = np.array([-0.15, -0.2, 0.2])                                  # out of the way
    camera = env.camera("third")
    _, depth, owner = env.picture("third", 256, 256)
    corner = np.array([0.2, 0.2, 0.0])                                      # a free corner of the table
    p = camera.extrinsics() @ np.append(corner, 1)
    uv = (camera.intrinsics(256, 256) @ p[:3])[:2] / p[2]
    assert np.allclose(uv, camera.project(corner, 256, 256))
    u, v = np.floor(uv).astype(int)
    assert owner[v, u] == -1 and depth[v, u] == pytest.approx(p[2], rel=0.01)


def test_every_object_is_visible_at_any_resolution():
    env = Tabletop(FAMILIES, "eval", ("third",), 64)
    for s in seeds("eval", 20):
        env.reset(s)
        env.tcp = np.array([0.18, 0.2, 0.26])                               # out of the way
        for size in (64, 224):
            rgb, _, owner = env.picture("third", size, size)
            assert rgb.shape == (size, size, 3) and rgb.dtype == np.uint8
            assert all((owner == i).sum() >= 10 * (size / 64) ** 2 for i in range(len(env.things)))
    assert env.picture("wrist", 48, 80)[0].shape == (48, 80, 3)


def test_wrist_camera_sees_the_fingers_and_moves_with_them():
    env = Tabletop(("pick",), "eval", ("wrist",), 64)
    env.reset(5)
    assert (env.picture("wrist")[2] == 100).mean() > 0.05
    before = env.camera("wrist").eye.copy()
    env.advance([0.03, 0, 0, 0, 0, 0, 1])
    assert np.allclose(env.camera("wrist").eye - before, [0.03, 0, 0])


def test_gymnasium_signature_and_a_body_of_four_numbers():
    env = Tabletop(("pick",), "eval", ("third", "wrist"), 32, embodiment="gantry")
    obs, info = env.reset(seed=3)
    assert set(obs) == {"images", "depth", "intrinsics", "extrinsics", "state", "instruction", "embodiment"}
    for view in ("third", "wrist"):                            # depth, K and pose tell one story: a point seen
        K, pose, z = (obs[name][view] for name in ("intrinsics", "extrinsics", "depth"))    # at pixel (20, 9)
        at = np.linalg.inv(pose) @ [*(np.linalg.inv(K) @ [9.5, 20.5, 1] * z[20, 9]), 1]     # lies on its ray
        assert z.shape == (32, 32) and env.camera(view).project(at[:3], 32, 32) == pytest.approx([9.5, 20.5])
        assert at[2] > -1e-4
    assert obs["state"].shape == (8,) and obs["state"].dtype == np.float32
    obs, reward, terminated, truncated, info = env.step(np.array([0.01, 0, 0, 1]))
    assert reward == 0.0 and not terminated and not truncated and info["family"] == "pick"
    with pytest.raises(ValueError, match=r"shape \(7,\).*4 finite numbers"):
        env.step(np.zeros(7))
    with pytest.raises(ValueError, match="nan.*4 finite numbers"):
        env.step([0, 0, math.nan, 1])


@pytest.mark.parametrize("wrong, message", [
    (lambda: Tabletop(("fly",)), "fly.*pick, put"), (lambda: Tabletop(()), "at least one of pick, put"),
    (lambda: Tabletop(image_size=0), "image_size=0"), (lambda: Tabletop(split="test"), "test.*train, val"),
    (lambda: Tabletop().reset(1, {"family": "fly"}), "fly.*pick, put"),
    (lambda: Tabletop().camera("front"), "front.*third, wrist"),
])
def test_unknown_names_are_answered_with_the_known_ones(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        wrong()
    assert len(str(error.value).splitlines()) == 1


def test_reset_without_a_seed_stays_in_its_split_and_follows_from_the_last_seed():
    env = Tabletop(("pick",), "eval", (), 8)
    env.reset()
    assert env.seed in range(2_000_000, 3_000_000)
    drawn = []
    for _ in range(2):
        env.reset(seed=2_000_005)
        env.reset()
        drawn.append(env.seed)
    assert drawn[0] == drawn[1] != 2_000_005


def test_lay_out_is_reset_without_a_picture():
    a, b = Tabletop(FAMILIES, "hard", ("third",), 16), Tabletop(FAMILIES, "hard", ("third",), 16)
    seen, info = a.reset(4_000_001, {"family": "side"})
    assert b.lay_out(4_000_001, {"family": "side"}) is None
    assert b.info() == info and np.array_equal(b.observe()["images"]["third"], seen["images"]["third"])


def test_truncation_at_the_step_limit():
    env = Tabletop(("pick",), "eval", (), 16)
    env.reset(1)
    for _ in range(env.max_steps):
        _, _, terminated, truncated, _ = env.step([0, 0, 0, 0, 0, 0, 1])
    assert truncated and not terminated


def test_record_reports_what_other_methods_learn_from():
    r = record_episode(11, ("put",), "train", ("third",), 32)
    N = len(r["actions"])
    assert r["images"]["third"].shape == (N, 32, 32, 3) and r["waypoints"].shape == (N, 5, 2)
    assert len(r["subtasks"]) == N
    assert (np.abs(r["waypoints"] - 0.5) < 0.75).all()
    env = Tabletop(("put",), "train", (), 32)
    env.reset(11)
    end = env.third.project(env.y.at, 1, 1)
    assert np.abs(r["waypoints"][0, -1] - end).max() < 0.1                  # the path ends at the container
    x, y = env.x.name, env.y.name
    phases = [words for words, _ in itertools.groupby(r["subtasks"])]
    assert phases[-2:] == [f"pick up the {x}", f"put the {x} {'in' if y == 'box' else 'on'} the {y}"]
    assert not r["actions"][r["subtasks"].index(phases[-1]), 6]             # it is in the hand from there on


@pytest.mark.parametrize("family, first", [("pick", "pick up the"), ("push", "push the"), ("turn", "turn the"),
                                           ("stack", "pick up the"), ("side", "pick up the")])
def test_subtasks_are_named_alike_however_the_task_is_told(family, first):
    for s in seeds("hard", 4):                                              # phrases of no recording
        env = Tabletop((family,), "hard", (), 16)
        env.lay_out(s)
        words = eval_sim.subtask(env)
        assert words.startswith(f"{first} {env.x.name}") and words != env.instruction
        while not env.success():
            env.advance(expert(env)[0])
        assert eval_sim.subtask(env).split()[0] == eval_sim.PHRASES[family][0].split()[0]


@pytest.mark.parametrize("size", [(48, 80), (64, 64)])
def test_waypoints_are_coordinates_of_the_picture_also_when_it_is_oblong(size):
    r = record_episode(11, ("put",), "train", (), size, clean=True)
    env = Tabletop(("put",), "train", (), size)
    env.lay_out(11)
    for action in r["executed"][:-1]:
        env.advance(action)
    middle = env.x.at + [0, 0, eval_sim.SHAPES[env.x.shape].height / 2]
    pixel = env.third.project(middle, *size)                                # x, y
    assert np.allclose(r["waypoints"][-1, -1] * [size[1], size[0]], pixel, atol=1e-3)


def test_replay_of_recorded_actions_is_exact():
    rows, worst = eval_sim.replay(eval_sim.recordings("tabletop", FAMILIES, "train", 12))
    assert worst < 1e-3 and sum(r["success"] for r in rows) >= 11


def test_replay_of_a_stored_set_is_exact_and_notices_wrong_units(tmp_path, capsys):
    folder = data.tabletop("val", 3, FAMILIES, (), 8, cache=tmp_path, workers=0).folder
    assert eval_sim.main(["--replay", str(folder), "--episodes", "10"]) == 0
    assert "replayed 3 recorded episodes: 3 succeed" in capsys.readouterr().out
    recorded = [(f, s, {**e, "executed": e["executed"] / 2}) for f, s, e in eval_sim.recordings(folder)]
    assert eval_sim.replay(recorded)[1] > 0.01


@pytest.mark.parametrize("sim, given, flag, said", [
    ("metaworld", "lerobot=m,gripper=openvla", None, "give --gripper openvla"), ("tabletop", "x=1,gripper=openvla", None, ""),
    ("libero", "libero=d", "openvla", "leave out --gripper openvla"), ("metaworld", "lerobot=m,gripper=openvla", "openvla", ""),
    ("metaworld", "lerobot=m,gripper=none", None, ""), ("metaworld", "", "openvla", ""), ("metaworld", 3, None, "")])
def test_another_gripper_than_was_learned_is_told(tmp_path, sim, given, flag, said):
    common.write_json(tmp_path / "training_state" / "run.json", {"args": {"data": given}})
    told = eval_sim.other_gripper(SimpleNamespace(sim=sim, gripper=flag), tmp_path)
    assert said in told and bool(told) == bool(said) and eval_sim.other_gripper(
        SimpleNamespace(sim=sim, gripper=flag), "of/the/hub") == ""


def test_a_recording_that_lacks_a_file_is_not_replayed_in_part(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    folder = tmp_path / "taped"
    eval_sim.main(f"--expert --episodes 3 --image-size 16 --record {folder} --out {tmp_path / 'out'}".split())
    one, *_ = sorted((folder / "data").rglob("*.parquet"))
    whole = one.read_bytes()
    for damage, said in ((lambda: one.write_bytes(whole[:200]), one.name), (one.unlink, "holds 2 of 3 episodes")):
        damage()
        with pytest.raises(ValueError, match=said):
            list(eval_sim.recordings(folder))
    one.write_bytes(whole)
    assert len(list(eval_sim.recordings(folder))) == 3


# ---- Two arms, two goals ----------------------------------------------------------------------------------

@pytest.mark.parametrize("family, embodiment", [("pick", "dual"), ("put", "dual"), ("push", "dual"),
                                                ("two", "dual"), ("two", "gripper")])
def test_expert_solves_97_percent_with_either_body(family, embodiment):
    split = "hard" if embodiment == "gripper" else "eval"
    assert sum(played(s, family, split, embodiment).success() for s in seeds(split, 34)) >= 33


def test_recorded_episodes_of_the_first_body_never_change():
    """The figures of README stand on these bytes: DRAWS must rise with them."""
    digest = hashlib.sha256()
    for seed in (*seeds("train", 3), *seeds("hard", 2)):
        split = SPLITS[seed // 1_000_000]
        r = record_episode(seed, FAMILIES, split, ("third", "wrist"), 24)
        for part in (r["state"], r["actions"], r["executed"], r["waypoints"], *r["images"].values()):
            digest.update(part.tobytes())
        digest.update(json.dumps([r["instruction"], r["family"], seed]).encode())
    assert eval_sim.DRAWS == 1 and digest.hexdigest() == (
        "f4d851ccca9997752ccd667a44876d4846cb989ce3b55e5a7942364c20844425")


def test_the_arm_on_the_side_of_x_works_and_the_other_one_waits():
    used = set()
    for s in seeds("eval", 12):
        env = Tabletop(("pick", "put", "push"), "eval", (), 16, "dual")
        obs, info = env.reset(s)
        assert obs["state"].shape == (16,) and obs["embodiment"] == info["embodiment"] == "dual"
        assert np.allclose(obs["state"][[1, 9]], [a.tcp[1] for a in env.arms], atol=1e-6)
        assert obs["state"][1] < 0 < obs["state"][9]                    # the right arm comes first
        arm = int(env.x.at[1] > 0)
        waits, before = 7 * (1 - arm), env.arms[1 - arm].tcp.copy()
        while not env.success():
            action = expert(env)[0]
            assert action.shape == (14,) and action[waits:waits + 7].tolist() == [0, 0, 0, 0, 0, 0, 1]
            env.advance(action)
        assert np.array_equal(env.arms[1 - arm].tcp, before) and env.arm == arm
        used.add(arm)
    assert used == {0, 1}


def test_arms_move_apart_and_neither_takes_what_the_other_holds():
    env = Tabletop(("pick",), "eval", (), 16, "dual")
    env.reset(seeds("eval", 1)[0])
    right, left = (arm.tcp.copy() for arm in env.arms)
    env.advance([0.01, 0, 0, 0, 0, 0, 1, 0, 0.02, 0, 0, 0, 0.1, 1])
    assert np.allclose(env.arms[0].tcp - right, [0.01, 0, 0]) and env.arms[0].rpy[2] != env.arms[1].rpy[2]
    assert np.allclose(env.arms[1].tcp - left, [0, min(0.02, 0.2 - left[1]), 0])
    for arm in env.arms:                                                # both around X
        arm.tcp, arm.rpy = np.array([*env.x.at[:2], 0.025]), np.zeros(3)
    close = np.zeros(14)
    for _ in range(3):
        env.advance(close)
    assert env.arms[0].held[0] is env.x and env.arms[1].held is None
    env.advance(np.array([0, 0, 0.05, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1.0]))
    assert env.x.at[2] > 0.04                                           # it goes with the right arm
    with pytest.raises(ValueError, match=r"shape \(7,\).*takes 14"):
        env.advance(np.zeros(7))


def test_both_arms_are_drawn_in_their_own_colours_and_carry_a_camera_each():
    env = Tabletop(("pick",), "eval", ("third", "wrist", "left_wrist"), 48, "dual")
    env.reset(seeds("eval", 1)[0])
    rgb, _, owner = env.picture("third", 96, 96)
    right, left = (rgb[owner == 100 + i].mean(0) for i in (0, 1))
    assert np.abs(right - left).max() > 25
    columns = [np.nonzero(owner == 100 + i)[1].mean() for i in (0, 1)]
    assert columns[1] < 48 < columns[0]                                 # left is left
    for view, arm in (("wrist", 0), ("left_wrist", 1)):
        assert (env.picture(view)[2] == 100 + arm).mean() > 0.05
        assert np.hypot(*(env.camera(view).eye - env.arms[arm].tcp)[:2]) < 0.1
    with pytest.raises(ValueError, match="left_wrist.*knows third, wrist"):
        Tabletop(("pick",), views=("left_wrist",))


def test_which_arm_works_can_be_seen():
    env = Tabletop(FAMILIES, "train", (), 8, "dual")
    for s in range(150):
        env.lay_out(s)
        assert abs(env.x.at[1]) >= 0.02


@pytest.mark.parametrize("embodiment", eval_sim.BODIES)
def test_two_goals_are_told_in_order_and_done_in_order(embodiment):
    switched = 0
    for s in seeds("train", 12):
        r = record_episode(s, ("two",), "train", (), 16, clean=True, embodiment=embodiment)
        first, second = r["instruction"].split(", then ")
        said = [sentence for sentence, _ in itertools.groupby(r["subtasks"])]
        assert r["success"] and said == [first, second, ""] and r["subtasks"][-2:] == ["", ""]
        assert r["waypoints"].shape == (len(r["actions"]), 5, 2)
        env = Tabletop(("two",), "train", (), 16, embodiment)
        env.lay_out(s)
        assert env.goals[0].family == "put" and env.goals[0].x is not env.goals[1].x
        before = env.arm
        for action in r["executed"]:
            env.advance(action)
        assert env.reached == [0, 1] and env.now == 1
        switched += env.arm != before
        if env.arm != before:                                           # the arm that is done has risen
            assert env.arms[before].tcp[2] > HOVER - 0.001
    assert bool(switched) == (embodiment == "dual")


def test_two_goals_in_the_wrong_order_are_no_success():
    env = Tabletop(("two",), "eval", (), 16)
    s = next(s for s in seeds("eval", 50) if (env.lay_out(s), env.goals[1].family == "push")[1])
    env.lay_out(s)
    (_, goal), first = env.goals, env.goals[0]
    goal.x.at[1] += 0.08 if goal.side == "left" else -0.08              # as if it had been pushed first
    env.advance([0, 0, 0, 0, 0, 0, 1])
    assert env.reached == [1] and env.now == 0 and not env.success()
    first.x.at = first.y.at + [0, 0, first.y.top]
    env.advance([0, 0, 0, 0, 0, 0, 1])
    assert env.reached == [1, 0] and not env.success()
    assert eval_sim.summary([{"task": "two", "success": False, "steps": 2, "parse_failed": 0,
                              "reached": env.reached}], ("two",))["goals"] == {
        "first": 1.0, "both": 1.0, "in_order": 0.0}


def test_swap_changes_the_first_of_two_goals_alone():
    for s in seeds("eval", 10):
        env = Tabletop(("two",), "eval", (), 8)
        env.lay_out(s)
        before = env.instruction.split(", then ")
        env.swap()
        after = env.instruction.split(", then ")
        assert after[0] != before[0] and after[1] == before[1]
        assert all(goal.x.name not in after[0] for goal in env.goals)


def test_replay_is_exact_with_two_arms_and_two_goals(tmp_path, capsys):
    rows, worst = eval_sim.replay(eval_sim.recordings("tabletop", ("put", "two"), "train", 6, "dual"))
    assert worst < 1e-6 and sum(r["success"] for r in rows) >= 5
    folder = data.tabletop("val", 2, ("push", "two"), (), 8, cache=tmp_path, workers=0, embodiment="dual").folder
    assert eval_sim.main(["--replay", str(folder)]) == 0
    assert "replayed 2 recorded episodes: 2 succeed" in capsys.readouterr().out


def test_wilson_interval():
    assert eval_sim.wilson(0, 0) == (0.0, 1.0)
    low, high = eval_sim.wilson(90, 100)
    assert math.isclose(low, 0.8256, abs_tol=1e-3) and math.isclose(high, 0.9448, abs_tol=1e-3)


def test_random_policy_fails_and_expert_passes(tmp_path, capsys):
    random = eval_sim.evaluate(None, None, FAMILIES, 24, control="random", progress=False)
    best = eval_sim.evaluate(None, None, FAMILIES, 12, control="expert", out=tmp_path / "new", progress=False)
    assert random["success"] <= 0.1 and best["success"] == 1.0
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == [
        "episodes-expert.jsonl", "film-expert.gif", "results-expert.json"]
    with Image.open(tmp_path / "new" / "film-expert.gif") as film:          # six pictures side by side, 5 Hz
        assert film.size == (6 * 196, 222) and film.n_frames > 20 and film.info["duration"] == 200
    eval_sim.print_table(best)
    assert "100.0%" in capsys.readouterr().out


def test_results_hold_every_episode_an_interval_per_rate_and_where_they_come_from(tmp_path):
    eval_sim.evaluate(None, None, ("pick", "put"), 3, start=7, control="expert", out=tmp_path, progress=False)
    results = json.loads((tmp_path / "results-expert.json").read_text())
    assert (results["suite"], results["split"], results["version"]) == ("tabletop", "eval", eval_sim.VERSION)
    assert [(e["episode"], e["seed"], e["task"]) for e in results["episodes"]] == [
        (7, 2_000_007, "pick"), (8, 2_000_008, "put"), (9, 2_000_009, "pick")]
    assert {"success", "steps", "instruction", "parse_failed"} <= set(results["episodes"][0])
    assert results["interval"] == list(eval_sim.wilson(3, 3))
    of_two = list(eval_sim.wilson(2, 2))
    assert results["tasks"]["pick"] == {"success": 1.0, "interval": of_two, "episodes": 2}
    assert {"python", "torch", "transformers", "numpy", "commit", "hardware"} <= set(results["made_with"])


def test_numbers_are_shown_even_when_they_cannot_be_written(tmp_path, capsys):
    (tmp_path / "results-expert.json").mkdir()                              # stands for a full disk
    with pytest.raises(OSError, match="results-expert.json"):
        eval_sim.evaluate(None, None, ("pick",), 1, control="expert", out=tmp_path, progress=False)
    assert "100.0%" in capsys.readouterr().out
    assert sorted(f.name for f in tmp_path.iterdir() if f.name[0] != ".") == [
        "episodes-expert.jsonl", "results-expert.json"]                     # no half of another


# A method is its module: Policy and model.act are all that the evaluation needs. This one only ever rises.
class Policy:
    def __init__(self, model, unnorm_key=None, execute=None):
        self.queue, self.execute = [], execute

    def ask(self, observation):
        return observation

    @property
    def needs_chunk(self):
        return not self.queue

    def step(self, observation, chunk=None):
        self.queue = self.queue or list(chunk[:self.execute])
        return self.queue.pop(0)


class Skyward:
    cfg = SimpleNamespace(views=("third", "wrist"), image_size=24, execute=3, horizon=4)
    stats, device = {"tabletop": {"action": {"min": [0]}}}, "cpu"

    def __init__(self):
        self.asked = []

    def act(self, observations, unnorm_key=None, **options):
        self.asked.append((observations, unnorm_key, options))
        chunk = np.zeros((len(observations), 4, 7), np.float32)             # (B, T, A)
        chunk[..., 2] = 0.01
        return chunk, {"parse_failed": [o["instruction"].startswith("put") for o in observations]}


METHOD = SimpleNamespace(Policy=Policy, PREDICTS="actions")


@pytest.mark.parametrize("control", ["", "swap", "blank"])
def test_any_method_is_asked_in_batches_and_only_when_it_needs_a_chunk(control):
    model = Skyward()
    results = eval_sim.evaluate(model, METHOD, ("pick",), 5, batch=3, control=control, unnorm_key="tabletop",
                                progress=False, guidance=2)
    assert results["success"] == 0 and results["mean_steps"] == 40 and results["execute"] == 3
    assert len(model.asked) == 2 * 14                                       # ceil(40 / 3) chunks per wave
    assert {len(seen) for seen, *_ in model.asked} == {3, 2}
    assert all(key == "tabletop" and options == {"guidance": 2} for _, key, options in model.asked)
    first = model.asked[0][0][0]
    env = Tabletop(("pick",), "eval", ("third", "wrist"), 24)
    truth, _ = env.reset(seeds("eval", 1)[0])
    for view in ("third", "wrist"):
        assert first["images"][view].any() == (control != "blank")
        assert control == "blank" or np.array_equal(first["images"][view], truth["images"][view])
    assert (first["instruction"] == truth["instruction"]) == (control != "swap")


def test_unreadable_outputs_are_counted():
    results = eval_sim.evaluate(Skyward(), METHOD, ("put",), 2, progress=False)
    told_to_put = sum(e["instruction"].startswith("put") for e in results["episodes"])
    assert results["parse_failed"] == told_to_put * 20                      # 60 steps, 3 per chunk


class Narrator(Skyward):
    """Two-armed; says the first goal whatever happens, and that it is done only at the end."""
    stats = dict.fromkeys(("tabletop", "tabletop_dual"), Skyward.stats["tabletop"])

    def act(self, observations, unnorm_key=None, **options):
        self.asked.append((observations, unnorm_key, options))
        chunk = np.zeros((len(observations), 4, 14), np.float32)            # (B, T, A)
        return chunk, {"subtasks": [o["instruction"].split(", then ")[0] for o in observations],
                       "finished": np.ones(len(observations), bool)}


def test_a_body_has_its_own_statistics_and_sub_tasks_and_order_are_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_sim, "STEPS", dict.fromkeys(eval_sim.STEPS, 4))
    model = Narrator()
    results = eval_sim.evaluate(model, METHOD, ("two",), 1, embodiment="dual", out=tmp_path, progress=False)
    assert {key for _, key, _ in model.asked} == {"tabletop_dual"} and results["embodiment"] == "dual"
    assert all(o["embodiment"] == "dual" and o["state"].shape == (16,) for seen, *_ in model.asked for o in seen)
    assert results["subtasks_right"] == 1 and results["goals"] == {"first": 0, "both": 0, "in_order": 0}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["episodes-dual.jsonl", "film-dual.gif", "results-dual.json"]
    eval_sim.print_table(results)
    assert "body dual" in (out := capsys.readouterr().out) and "sub-tasks right 100.0%" in out
    eval_sim.evaluate(one := Narrator(), SimpleNamespace(Policy=Half, PREDICTS="actions"), ("pick",), 1,
                      progress=False)
    assert {key for _, key, _ in one.asked} == {"tabletop"}


class Half(Policy):
    def step(self, observation, chunk=None):
        return super().step(observation, chunk)[:14 if observation["embodiment"] == "dual" else 7]


class Oracle(Policy):
    """Does what the expert does, whose world it knows (`worlds`: those of the wave, in order)."""
    worlds = []

    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.env = Oracle.worlds.pop(0) if Oracle.worlds else None

    needs_chunk = True

    def step(self, observation, chunk=None):
        return expert(self.env)[0]


@pytest.mark.parametrize("embodiment", eval_sim.BODIES)
def test_after_both_goals_the_model_is_asked_whether_it_is_done(embodiment, monkeypatch):
    world = eval_sim._world

    def noted(*args):
        env = world(*args)
        Oracle.worlds.append(env)
        return env
    monkeypatch.setattr(eval_sim, "_world", noted)
    method = SimpleNamespace(Policy=Oracle, PREDICTS="actions")
    rows = eval_sim.run_wave([(s, "two") for s in seeds("eval", 2)], Narrator(), method, "eval",
                             embodiment=embodiment)
    assert [(r["success"], r["reached"], r["finished"]) for r in rows] == [(True, [0, 1], True)] * 2
    results = eval_sim.summary(rows, ("two",))
    assert results["goals"] == {"first": 1, "both": 1, "in_order": 1, "finished": 1}
    assert 0.2 < results["subtasks_right"] < 0.8                            # it never names the second goal


@pytest.mark.parametrize("change, message", [
    (dict(model=None), "no model to evaluate"), (dict(embodiment="gantry"), "gantry.*gripper or dual"), (dict(control="reverse"), "reverse.*swap, blank"),
    (dict(episodes=0), "episodes=0"), (dict(batch=0), "batch=0"), (dict(families=("fly",)), "fly.*pick"),
    (dict(split="test"), "test.*train"), (dict(unnorm_key="bridge"), "bridge.*tabletop"),
    (dict(start=999_999), "1,000,000"), (dict(start=-1), "from -1 on"),
])
def test_wrong_settings_fail_before_the_first_episode(change, message, capfd):
    settings = dict(model=Skyward(), method=METHOD, episodes=4) | change
    with pytest.raises(ValueError, match=message):
        eval_sim.evaluate(**settings)
    assert capfd.readouterr().err == ""                                     # not even a bar


def test_swap_names_another_object():
    for s in seeds("eval", 30):
        env = Tabletop(FAMILIES, "eval", (), 8)
        env.reset(s)
        before = env.instruction
        env.swap()
        assert env.instruction != before
        assert (env.x.name in env.instruction) == (env.family in ("side", "turn"))    # there, the side is


def test_euler_rotation_is_z_y_x():
    assert np.allclose(rotation(0, 0, math.pi / 2) @ [1, 0, 0], [0, 1, 0])
    steps = rotation(0, 0, 0.5) @ rotation(0, -0.2, 0) @ rotation(0.3, 0, 0)
    assert np.allclose(rotation(0.3, -0.2, 0.5), steps)
    assert np.allclose(Camera.look_at((0, 0, 1), (0, 1e-3, 0), 1.0).axes[2], [0, 0, -1], atol=1e-2)


# ---- Command line -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny CogACT nobody trained, with the statistics of two datasets."""
    cfg = cogact.PRESETS["tiny"]
    low, high = {k: [-1.0] * 7 for k in ("min", "q01")}, {k: [1.0] * 7 for k in ("max", "q99", "std")}
    one = {"action": {**low, **high, "mean": [0.0] * 7, "mask": [True] * 6 + [False]}}
    folder = tmp_path_factory.mktemp("checkpoint") / "last"
    cogact.Model(cfg, cogact.load_tokenizer(cfg), {"tabletop": one, "bridge": one}).save_pretrained(folder)
    return folder


def test_checkpoint_is_evaluated_and_named_in_the_results(checkpoint, tmp_path, capsys):
    eval_sim.main(["--ckpt", str(checkpoint), "--unnorm-key", "tabletop", "--episodes", "2",
                   "--families", "pick", "--device", "cpu", "--control", "blank", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results-blank.json").read_text())
    assert results["checkpoint"] == {**eval_sim.origin(checkpoint), "preset": None, "tokenizer": None, "attn": "sdpa"}
    assert len(results["checkpoint"]["sha256"]) == 64 and results["unnorm_key"] == "tabletop"
    out = capsys.readouterr().out
    assert "of the 8 actions of a chunk" in out and "control: blank" in out and f"film in {tmp_path}" in out


def ckpt(*flags):
    return lambda folder: ["--ckpt", str(folder), "--unnorm-key", "tabletop", *flags]


@pytest.mark.parametrize("argv, message", [
    (["--control", "expert", "--families", "fly"], "'fly': the tabletop knows pick, put"),
    (["--control", "expert", "--families", ""], "--families '' cannot be used"),
    (["--control", "expert", "--episodes", "0"], "--episodes: 0 is not in 1 .. 1000000"),
    (["--control", "expert", "--batch", "0"], "--batch: 0"),
    (ckpt("--seed", "-1"), "--seed: -1"), (ckpt("--device", "meta"), "--device 'meta' cannot"),
    (["--control", "expert", "--body", "octopus"], "--body: invalid choice: 'octopus'"),
    (["--replay", "/nowhere", "--body", "dual"], "--replay /nowhere has no use for --body"),
    (["--control", "expert", "--episodes", "ten"], "--episodes: invalid int value: 'ten'"),
    (["--control", "reverse"], "--control: invalid choice: 'reverse'"),
    (["--control", "expert", "--split", "test"], "--split: invalid choice: 'test'"),
    (["--control", "expert", "--out", __file__], "--out.*is a file"),
    (["--control", "expert", "--out", __file__ + "/eval"], "--out.*is a file"),
    (["--control", "expert", "--execute", "2"], "--control expert has no use for --execute"),
    (["--control", "random", "--ckpt", "/nowhere"], "/nowhere: no such file or folder"),
    (["--replay", "tabletop", "--ckpt", "x"], "--replay tabletop has no use for --ckpt"),
    (["--replay", "/nowhere"], "/nowhere: nothing is there; the folder of a set is wanted"),
    (["--replay", "/nowhere", "--split", "val"], "--replay /nowhere has no use for --split"),
    (["--replay", "tabletop", "--sim", "tabletop"], "--replay tabletop has no use for --sim"),
    (["--episodes", "3"], "--ckpt is missing"),
    (["--ckpt", "/nowhere"], "/nowhere: no such file or folder"),
    (["--frames", "3"], "unrecognized arguments: --frames"),
    (ckpt("--device", "toaster"), "'toaster' does not exist"),
    (ckpt("--attn", "magic"), "'magic'.*auto, flash, sdpa, eager"),
    (ckpt("--unnorm-key", "my_robot"), "'my_robot'.*'bridge', 'tabletop'"),
    (ckpt("--execute", "99"), "execute=99.*8 actions"),
    (ckpt("--preset", "large"), "'large' was asked for"),
    (ckpt("--model", "a0"), "--model.*a0"),
    (ckpt("--tokenizer", "/nowhere"), "/nowhere"),
])
def test_bad_flags_are_one_line(argv, message, checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = sorted(checkpoint.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message) as error:
        eval_sim.main(argv(checkpoint) if callable(argv) else argv)
    assert len(str(error.value).splitlines()) == 1 and "episodes" not in capfd.readouterr().err
    assert sorted(checkpoint.rglob("*")) == before and not any(tmp_path.iterdir())


@pytest.mark.parametrize("file, content, message", [
    ("model.safetensors", None, "model.safetensors"), ("model.safetensors", b"torn", "torn"),
    ("config.json", b'{"method": "co', "config.json"), ("config.json", b'{"method": "os"}', "'os'; there"),
    ("config.json", b'{"method": "x"}', "'x'; there are"), ("config.json", b"null", "holds None"),
    ("dataset_statistics.json", b"[1]", "not an object"), ("dataset_statistics.json", b"null", "holds None"),
    ("dataset_statistics.json", b'{"tabletop": {}}', "dataset_statistics.json, 'tabletop': no action"),
    ("dataset_statistics.json", b'{"tabletop": {"action": {"q99": [1, 1], "mask": [true]}}}', "no action"),
    ("dataset_statistics.json", b"{", "dataset_statistics"),
])
def test_broken_checkpoint_is_one_line(file, content, message, checkpoint, tmp_path):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        eval_sim.main(["--ckpt", str(tmp_path), "--unnorm-key", "tabletop"])
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "eval").exists()


@pytest.mark.parametrize("argv, line", [
    (["--control", "expert", "--families", "fly"], "error: families 'fly': the tabletop knows pick, "),
    (["--ckpt", "FOLDER", "--unnorm-key", "my_robot"], "error: unnorm_key='my_robot': this checkpoint has "),
])
def test_command_ends_with_one_line_and_code_2(argv, line, checkpoint, tmp_path):
    run = forks.shared()("eval_sim.py", *(checkpoint if a == "FOLDER" else a for a in argv), cwd=tmp_path)
    assert run.rc == 2 and run.err.startswith(line) and run.err.count("\n") == 1, run.err
    assert not any(tmp_path.iterdir())


# ---- examples/pretrain_trunk.py ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trunk():
    sys.path.append(str(Path(eval_sim.__file__).parent / "examples"))
    return importlib.import_module("pretrain_trunk")


@pytest.mark.parametrize("name", ["cogact", "robobrain_x0", "vla0"])
def test_trunk_questions_that_share_a_picture_are_answered_as_if_alone(trunk, name):
    how = trunk.METHODS[name]
    cfg = how.method.PRESETS["tiny"]
    asker = trunk.Asker(how.method.Model(cfg, how.method.load_tokenizer(cfg)), how).eval()
    grid = cfg.image_size // cfg.patch_size // getattr(cfg, "merge_size", 1)
    scenes = [trunk.scene(s, cfg.image_size, grid) for s in seeds("pretrain", 2)]
    together = trunk.make_batch(scenes, [0, 1], np.random.default_rng(0), asker, 4)
    answers, tasks = asker(together)[1:3]
    for q in range(4):
        alone = together | {"ids": together["ids"][:, q:q + 1], "length": together["length"][:, q:q + 1]}
        for a, b in zip((answers, tasks), asker(alone)[1:3]):
            assert np.allclose(a[:, q].detach(), b[:, 0].detach(), atol=1e-5)
    rgb, _, _, asked = scenes[0]                                            # and as the policy reads them
    text = asked[np.random.default_rng(0).choice(6, 4, replace=False)[0]][0]
    prepared = how.method.prepare({"images": {"third": rgb}, "instruction": text}, cfg, asker.model.tokenizer)
    z = asker.model(how.method.collate([prepared], cfg))[0, -1]             # the last token of the prompt
    assert np.allclose(asker.answer_head(z).detach(), answers[0, 0].detach(), atol=1e-5)


def test_trunk_learns_what_the_scene_says(trunk):
    rgb, what, where, asked = trunk.scene(seeds("pretrain", 1)[0], 64, 8)
    assert rgb.shape == (64, 64, 3) and what.shape == (64, 2) and where.shape == (64, 5) and len(asked) == 6
    colours = {trunk.COLOUR_NAMES[i] for i in what[:, 0]}
    env = Tabletop(FAMILIES, "pretrain", (), 64)
    env.lay_out(seeds("pretrain", 1)[0])
    assert {t.colour or t.shape for t in env.things} & colours and "nothing" in colours
    for text, task, row, counts, names, body in asked:
        assert text and 0 <= task < 2 * len(trunk.TASKS) and row.shape == counts.shape == (trunk.ANSWERS,)
        assert any(t.name in text for t in env.things) and names[0] in text and body == ("gripper", 0)


@pytest.mark.parametrize("name", eval_sim.BODIES)
def test_trunk_strides_lead_straight_to_the_thing(trunk, name):
    arms = set()
    for seed in seeds("pretrain", 4):
        for _, _, row, _, _, body in trunk.scene(seed, 64, 8, name)[3]:
            chunk = trunk.strides(row, "x", 40, *body).reshape(40, -1, 7)
            mine, others = chunk[:, body[1]], np.delete(chunk, body[1], 1)
            way = (row[trunk.COLUMNS["x"]] - row[trunk.COLUMNS["gripper"]]) * trunk.SCALE
            np.testing.assert_allclose(mine[:, :3].sum(0), way, atol=1e-6)
            assert np.hypot(*mine[:, :2].T).max() < trunk.STRIDE + 1e-6 > np.abs(mine[:, 2]).max()
            assert not others[..., :6].any() and (others[..., 6] == 1).all()
            arms.add(body[1])
    assert len(arms) == len(eval_sim.EMBODIMENTS[name][1])
