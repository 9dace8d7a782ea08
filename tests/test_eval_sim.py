"""The tabletop simulator, its expert, its episodes and the evaluation loop."""
import math

import numpy as np
import pytest

import eval_sim
from eval_sim import FAMILIES, HELD_OUT, PHRASES, SPLITS, Camera, Tabletop, expert, record_episode, rotation, seeds


def played(seed, family, split="eval"):
    """An environment after the expert's episode."""
    env = Tabletop((family,), split, (), 16)
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
    assert sum((r["executed"] != r["actions"]).any() for r in rows) > 60          # there was something to recover from


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
        assert env.phrase != PHRASES[env.family][-1] and hard.phrase == PHRASES[hard.family][-1]
    assert not np.allclose(env.third.eye, hard.third.eye)


def test_only_the_instruction_decides():
    """In one scene the expert solves several families: the picture alone does not tell the task."""
    solved = set()
    for family in ("pick", "put", "turn"):
        env = Tabletop(("turn",), "eval", (), 16)
        env.reset(2_000_003)                                                      # a scene with a bar as X
        env.family, env.side = family, env.side
        env.y = next(t for t in env.things if not t.movable) if family == "put" else None
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
    assert env.held is not None and env.held[0] is x                              # closed around it
    for _ in range(4):
        env.advance([0, 0, 0.04, 0, 0, 0, 0])
    assert x.at[2] > 0.1                                                          # carried up
    env.tcp[:2] = y.at[:2]
    env._carry()
    env.advance([0, 0, 0, 0, 0, 0, 1])
    assert env.held is None and x.at[2] == pytest.approx(y.top)                   # dropped onto what is below
    assert env.success()


def test_closing_beside_an_object_grasps_nothing():
    env = Tabletop(("pick",), "eval", (), 16)
    env.reset(seeds("eval", 1)[0])
    env.tcp = np.array([*env.x.at[:2], 0.12])                                     # above it
    for _ in range(3):
        env.advance([0, 0, 0, 0, 0, 0, 0])
    assert env.held is None and env.gap == 0


def test_push_moves_sideways_and_lifting_is_not_pushing():
    env = played(seeds("eval", 1)[0], "push")
    start, _ = env.start[id(env.x)]
    assert env.success() and env.x.at[2] == 0 and abs(env.x.at[1] - start[1]) > 0.08
    env.lifted = True
    assert not env.success()


def test_depth_and_projection_agree():
    """The depth under an object's projected centre is the distance to its surface; K and the extrinsics say the same pixel."""
    env = Tabletop(("pick",), "eval", ("third",), 64)
    env.reset(seeds("eval", 1)[0])
    env.tcp = np.array([-0.15, -0.2, 0.2])                                        # out of the way
    camera = env.camera("third")
    _, depth, owner = env.picture("third", 256, 256)
    corner = np.array([0.2, 0.2, 0.0])                                            # a free corner of the table
    p = camera.extrinsics() @ np.append(corner, 1)
    uv = (camera.intrinsics(256, 256) @ p[:3])[:2] / p[2]
    assert np.allclose(uv, camera.project(corner, 256, 256))
    u, v = np.floor(uv).astype(int)
    assert owner[v, u] == -1 and depth[v, u] == pytest.approx(p[2], rel=0.01)


def test_every_object_is_visible_at_any_resolution():
    env = Tabletop(FAMILIES, "eval", ("third",), 64)
    for s in seeds("eval", 20):
        env.reset(s)
        env.tcp = np.array([0.18, 0.2, 0.26])                                     # out of the way
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


def test_gymnasium_signature_and_second_body():
    env = Tabletop(("pick",), "eval", ("third", "wrist"), 32, embodiment="gantry")
    obs, info = env.reset(seed=3)
    assert set(obs) == {"images", "state", "instruction"} and obs["state"].shape == (8,) and obs["state"].dtype == np.float32
    obs, reward, terminated, truncated, info = env.step(np.array([0.01, 0, 0, 1]))
    assert reward == 0.0 and not terminated and not truncated and info["family"] == "pick"
    with pytest.raises(ValueError, match="4 finite numbers"):
        env.step(np.zeros(7))
    with pytest.raises(ValueError, match="fly.*pick, put"):
        Tabletop(("fly",))


def test_truncation_at_the_step_limit():
    env = Tabletop(("pick",), "eval", (), 16)
    env.reset(1)
    for _ in range(env.max_steps):
        _, _, terminated, truncated, _ = env.step([0, 0, 0, 0, 0, 0, 1])
    assert truncated and not terminated


def test_record_reports_what_other_methods_learn_from():
    r = record_episode(11, ("put",), "train", ("third",), 32)
    N = len(r["actions"])
    assert r["images"]["third"].shape == (N, 32, 32, 3) and r["waypoints"].shape == (N, 5, 2) and len(r["subtasks"]) == N
    assert (np.abs(r["waypoints"] - 0.5) < 0.75).all()
    env = Tabletop(("put",), "train", (), 32)
    env.reset(11)
    end = env.third.project(env.y.at, 1, 1)
    assert np.abs(r["waypoints"][0, -1] - end).max() < 0.1                        # the path ends at the container
    assert "release" in " ".join(r["subtasks"])


def test_replay_of_recorded_actions_is_exact():
    rows, worst = eval_sim.replay(FAMILIES, 12, "train")
    assert worst < 1e-3 and sum(r["success"] for r in rows) >= 11


def test_wilson_interval():
    assert eval_sim.wilson(0, 0) == (0.0, 1.0)
    low, high = eval_sim.wilson(90, 100)
    assert math.isclose(low, 0.8256, abs_tol=1e-3) and math.isclose(high, 0.9448, abs_tol=1e-3)


def test_random_policy_fails_and_expert_passes(tmp_path, capsys):
    random = eval_sim.evaluate(None, None, FAMILIES, 24, control="random", progress=False)
    best = eval_sim.evaluate(None, None, FAMILIES, 12, control="expert", out=tmp_path, progress=False)
    assert random["success"] <= 0.1 and best["success"] == 1.0
    assert (tmp_path / "results-expert.json").exists() and (tmp_path / "film-expert.gif").exists()
    eval_sim.print_table(best)
    assert "100.0%" in capsys.readouterr().out


def test_swap_names_another_object():
    for s in seeds("eval", 30):
        env = Tabletop(FAMILIES, "eval", (), 8)
        env.reset(s)
        before = env.instruction
        env.swap()
        assert env.instruction != before


def test_euler_rotation_is_z_y_x():
    assert np.allclose(rotation(0, 0, math.pi / 2) @ [1, 0, 0], [0, 1, 0])
    assert np.allclose(rotation(0.3, -0.2, 0.5), rotation(0, 0, 0.5) @ rotation(0, -0.2, 0) @ rotation(0.3, 0, 0))
    assert np.allclose(Camera.look_at((0, 0, 1), (0, 1e-3, 0), 1.0).axes[2], [0, 0, -1], atol=1e-2)
