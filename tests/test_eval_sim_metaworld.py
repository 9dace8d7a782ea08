"""Meta-World through the evaluator, and what came with it: recording, replay, resume, workers, --check.

Meta-World itself is optional. What depends on it runs against a minimal stand-in of its API, with its traps,
and, where it is installed (pip install -e ".[metaworld]"), against the real thing.
"""
import json
import math
import pickle
import shutil
import sys
import weakref
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import data
import eval_sim
import forks
import numpy as np
import pytest
import torch
from eval_sim import METAWORLD, MT10, MetaWorld
from PIL import Image
from test_eval_sim import Policy

REAL = find_spec("metaworld") is not None and find_spec("mujoco") is not None
DRAWS = sys.platform != "linux" or find_library("EGL") or find_library("OSMesa")
real = pytest.mark.skipif(not REAL, reason='Meta-World is not installed: pip install -e ".[metaworld]"')
draws = pytest.mark.skipif(not (REAL and DRAWS), reason="no Meta-World, or no library it draws with")


# ---- The stand-in: what eval_sim.py uses of metaworld 3.1.1 and mujoco 3.3.0, traps included ----------------

class Env:
    """A hand that moves to a point, and passes through it."""
    action_scale, max_path_length, built = 0.01, 500, 0

    def __init__(self):
        Env.built += 1
        turn = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0.0]]).T                 # looks along -x; y right, z up
        self.model = SimpleNamespace(cam_fovy=np.array([60.0]), camera=lambda name: SimpleNamespace(id=0),
                                     vis=SimpleNamespace(global_=SimpleNamespace(offheight=0, offwidth=0),
                                                         quality=SimpleNamespace(shadowsize=1, offsamples=4)))
        self.data = SimpleNamespace(cam_xpos=np.array([[1.0, 0.6, 0.2]]), cam_xmat=turn.reshape(1, 9), env=self)
        self.seeded_rand_vec, self._freeze_rand_vec, self.task = False, True, None

    tcp_center = property(lambda self: self.hand)
    _target_site_config = property(lambda self: [("goal", self.goal)])

    def _set_pos_site(self, name, at):
        self.shown = at

    def set_task(self, task):
        about = pickle.loads(task.data)
        assert isinstance(self, about["env_cls"]) and about["partially_observable"] is False
        self._freeze_rand_vec, self.vec, self.task = True, about["rand_vec"], task.env_name

    def seed(self, seed):
        self.rng = np.random.default_rng(seed)

    def reset(self, seed=None):                                        # the seed is ignored
        if not self._freeze_rand_vec:
            self.vec = (self.rng if self.seeded_rand_vec else np.random.default_rng()).uniform(-0.1, 0.1, 3)
        assert self.vec is not None
        self.hand, self.goal, self.steps = np.array([0, 0.6, 0.2]), self.vec + [0, 0.6, 0.2], 0
        return self.observe(), {}

    def observe(self):
        moved = self.hand if self.steps > 4 else np.array([0, 0.6, 0.2])       # the object, taken along
        obs = np.zeros(39)
        obs[:3], obs[3], obs[4:7], obs[-3:] = self.hand, 1, moved, self.goal
        return obs

    def step(self, action):
        assert self.task and action.dtype == np.float32 and np.abs(action).max() <= 1
        if self.steps >= self.max_path_length:
            raise ValueError("You must reset the env manually once truncate==True")
        self.steps, self.hand = self.steps + 1, self.hand + action[:3] * self.action_scale
        success = float(np.abs(self.hand - self.goal).max() < 0.006)
        return self.observe(), 1.0, False, self.steps == 500, {"success": success}


class Expert:
    def get_action(self, obs):
        return np.append((obs[-3:] - obs[:3]) * 100, 0.5)              # far beyond 1: to be clipped


class Renderer:
    """Pictures with one white pixel, where the hand is; upside down, as the corner cameras'."""

    def __init__(self, model, h, w):
        assert h <= model.vis.global_.offheight and w <= model.vis.global_.offwidth
        self.h, self.w, self.depth = h, w, False
        self.scene = SimpleNamespace(flags=[True, True])

    def enable_depth_rendering(self):
        self.depth = True

    def disable_depth_rendering(self):
        self.depth = False

    def update_scene(self, data, camera):
        _, y, z = data.env.hand - data.cam_xpos[0]
        f = self.h / 2 / math.tan(math.radians(30))
        self.at = int(self.h / 2 - f * z), int(self.w / 2 + f * y)     # raw: y to the right, z up, 1 m away

    def render(self):
        if self.depth:
            return np.full((self.h, self.w), 1.0, np.float32)
        picture = np.zeros((self.h, self.w, 3), np.uint8)
        picture[min(max(self.at[0], 0), self.h - 1), min(max(self.at[1], 0), self.w - 1)] = 255
        return picture

    def close(self):
        pass


@pytest.fixture
def stand_in(monkeypatch):
    kinds = {f"{name}-v3": Env for name in METAWORLD}
    package = SimpleNamespace(env_dict=SimpleNamespace(ALL_V3_ENVIRONMENTS=kinds),
                              types=SimpleNamespace(Task=lambda env_name, data: SimpleNamespace(
                                  env_name=env_name, data=data)),
                              policies=SimpleNamespace(ENV_POLICY_MAP=dict.fromkeys(kinds, Expert)))
    mujoco = SimpleNamespace(Renderer=Renderer, FatalError=RuntimeError, mj_kinematics=lambda *_: None,
                             mj_camlight=lambda *_: None,
                             mjtRndFlag=SimpleNamespace(mjRND_SHADOW=0, mjRND_REFLECTION=1))
    monkeypatch.setattr(eval_sim, "import_metaworld", lambda: (package, mujoco))
    monkeypatch.setattr(MetaWorld, "kept", {})
    monkeypatch.setattr(eval_sim, "FILM", 24)
    return package


@pytest.fixture(params=["stand-in", pytest.param("real", marks=real)])
def either(request):
    return request.getfixturevalue("stand_in") if request.param == "stand-in" else None


def world(task="push", seed=0, **how):
    env = MetaWorld((task,), **how)
    env.lay_out(seed)
    return env


# ---- Meta-World's traps (ecosystem.md sections 2.1 and 5) ---------------------------------------------------

def test_every_task_is_told_in_its_own_words():
    assert len(METAWORLD) == len(set(METAWORLD.values())) == 50


@real
def test_task_names_and_order_of_mt10_are_the_packages():
    package, _ = eval_sim.import_metaworld()
    assert {f"{name}-v3" for name in METAWORLD} == set(package.env_dict.MT50_V3)
    assert [f"{name}-v3" for name in MT10] == list(package.env_dict.MT10_V3)


def test_trap_6_reset_ignores_the_seed_but_lay_out_does_not(either):
    a, b, again = (world(seed=s).obs for s in (3, 4, 3))
    assert not np.array_equal(a[-3:], b[-3:]) and np.array_equal(a, again) and a[-3:].any()


def test_a_kept_model_changes_nothing(either):
    def play(env):
        while not env.success() and env.count < 60:
            env.advance(env.expert()[0])
        env.close()
        return env.obs
    fresh = play(world(seed=5))
    play(world(seed=6))
    assert np.array_equal(play(world(seed=5)), fresh) and sum(map(len, MetaWorld.kept.values())) >= 1


def test_only_sixteen_tasks_keep_what_draws_them(stand_in):
    drawing = []
    for task in list(METAWORLD)[:20]:
        env = world(task)
        env.picture("third")
        drawing.append(weakref.ref(*env.renderers.values()))
        env.close()
    assert sum(ref() is not None for ref in drawing) == 16             # nothing else holds those closed
    kept = [renderers for [(_, renderers)] in MetaWorld.kept.values()]
    assert len(kept) == 20 and [len(renderers) for renderers in kept] == [0] * 4 + [1] * 16


def test_trap_5_success_counts_at_any_step(stand_in):
    env = world()
    while not env.success():
        env.advance(env.expert()[0])
    for _ in range(5):
        env.advance([1, 1, 1, 0])                                      # on, and away from the goal
    assert env.success() and np.abs(env.obs[:3] - env.obs[-3:]).max() > 0.02


@pytest.mark.parametrize("view", ["third"])
def test_trap_6_corner_cameras_are_upside_down_and_matrices_know_it(view, stand_in):
    env = world(image_size=(48, 64))
    for _ in range(8):
        env.advance(env.expert()[0])
    seen = env.observe()
    row, column = np.argwhere(seen["images"][view].any(-1))[0]
    K, pose = seen["intrinsics"][view], seen["extrinsics"][view]
    at = K @ (pose @ np.append(env.obs[:3], 1))[:3]
    assert (at[:2] / at[2]).astype(int).tolist() == [column, row]


@draws
def test_trap_6_the_goal_is_drawn_where_the_matrices_say_from_the_first_picture_on():
    for seed in (0, 1):
        env = world("push", seed, image_size=128, fast_render=True)
        rgb = env.picture("third")[0].astype(int)
        green = np.argwhere((rgb[..., 1] > 90) & (rgb[..., 1] > rgb[..., 0] + 40) & (rgb[..., 1] > rgb[..., 2] + 40))
        x, y = env.camera("third").project(env.env._target_pos, 128, 128)
        assert np.abs(green.mean(0) + 0.5 - [y, x]).max() < 1.5
        env.close()


@draws
def test_turned_picture_is_the_renderers_own_and_fast_render_differs():
    env, fast = (world("door-open", 1, image_size=64, fast_render=fast) for fast in (False, True))
    _, mujoco = eval_sim.import_metaworld()
    renderer = mujoco.Renderer(env.env.model, 64, 64)
    renderer.update_scene(env.env.data, camera="corner4")
    own = renderer.render()
    renderer.close()
    assert np.array_equal(env.picture("third")[0], own[::-1, ::-1])
    assert (fast.picture("third")[0] != env.picture("third")[0]).any()
    assert (env.picture("third")[0][:10] == env.picture("third")[0][0, 0]).mean() > 0.5     # the wall is above


def test_actions_are_clipped_and_the_limit_is_500_steps(either):
    far, near = world(seed=1), world(seed=1)
    far.advance([5, -5, 0, 9])
    near.advance([1, -1, 0, 1])
    assert np.array_equal(far.obs, near.obs)
    with pytest.raises(ValueError, match=r"shape \(7,\): this body takes 4.*action_dim=4"):
        far.advance(np.zeros(7))
    with pytest.raises(ValueError, match="nan.*4 finite"):
        far.advance([0, math.nan, 0, 0])
    rows = eval_sim.run_wave([(0, "push")], None, None, "eval", "random", sim="metaworld", embodiment="sawyer")
    assert rows[0]["steps"] == 500 or rows[0]["success"]


def test_missing_packages_and_libraries_are_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(ValueError, match=r"pip install metaworld==3.1.1 .*packaging.*apt-get install libegl1"):
        eval_sim.import_metaworld()


@pytest.mark.skipif(sys.platform != "linux", reason="the choice is Linux's")
@pytest.mark.parametrize("there, chosen", [(("EGL", "OSMesa"), "egl"), (("OSMesa",), "osmesa"), ((), None)])
def test_what_mujoco_draws_with_is_chosen_before_it_is_imported(there, chosen, monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(eval_sim, "find_library", lambda name: name in there)
    with pytest.raises(ValueError):
        eval_sim.import_metaworld()
    assert eval_sim.os.environ.get("MUJOCO_GL") == chosen


@real
def test_expert_gate_of_mt10_one_seed_without_a_picture():
    results = eval_sim.evaluate(None, None, MT10, 10, control="expert", batch=10, progress=False, sim="metaworld")
    assert results["success"] == 1 and {e["seed"] for e in results["episodes"]} == {0}


# ---- One evaluator -------------------------------------------------------------------------------------------

class Model:
    """Acts by chance, out of torch's generator; gives as many numbers as it is asked for."""
    stats, device = {"mine": {"action": {"min": [0]}}}, "cpu"

    def __init__(self, numbers=4, last=None, **cfg):
        self.cfg = SimpleNamespace(**{"views": ("third",), "image_size": 16, "execute": 20, "horizon": 20} | cfg)
        self.numbers, self.last, self.asked = numbers, last, []

    def act(self, observations, unnorm_key=None):
        self.asked += observations
        chunk = torch.rand(len(observations), 20, self.numbers).numpy() * 0.2 - 0.1
        chunk[..., -1] = chunk[..., -1] if self.last is None else self.last
        return chunk, {}


ACTS, POINTS = (SimpleNamespace(Policy=Policy, PREDICTS=what) for what in ("actions", "waypoints"))


def test_tasks_take_turns_and_every_one_gets_the_same_seeds():
    assert MetaWorld.jobs(("a", "b"), 4, "eval") == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    assert MetaWorld.jobs(("a", "b"), 2, "train", 2) == [(1_000_001, "a"), (1_000_001, "b")]


def test_a_model_sees_pictures_and_four_numbers(stand_in, capsys, tmp_path):
    results = eval_sim.evaluate(model := Model(), ACTS, ("push", "reach"), 2, batch=2, sim="metaworld",
                                progress=False, out=tmp_path)
    seen = model.asked[0]
    assert seen["state"].shape == (4,) and seen["images"]["third"].shape == (16, 16, 3) and not seen["depth"]
    assert seen["instruction"] == METAWORLD["push"] and "embodiment" not in seen
    assert (results["suite"], results["mean_steps"], results["tasks"]["reach"]["episodes"]) == ("metaworld", 500, 1)
    assert results["published"].startswith("none") and "metaworld" in results["made_with"]
    eval_sim.print_table(results)
    assert "published: none" in capsys.readouterr().out
    with Image.open(tmp_path / "film-metaworld.gif") as film:
        assert 20 < film.n_frames <= 500 // 8 + 4 and film.info["duration"] % 100 == 0      # equal ones are one


def test_gripper_openvla_is_turned_into_effort(stand_in):
    for last, effort in ((1.0, -1), (0.0, 1), (0.5, 0)):
        env, done = world(gripper="openvla"), []
        env.env.step = lambda action, step=env.env.step: done.append(action) or step(action)
        env.advance([0, 0, 0, last])
        assert done[0][3] == effort


def test_a_method_of_points_moves_an_arm_in_metres_and_sees_depth(stand_in):
    eval_sim.evaluate(model := Model(7), POINTS, ("push",), 1, sim="metaworld", progress=False)
    seen = model.asked[0]
    assert seen["state"].shape == (8,) and seen["depth"]["third"].shape == (16, 16)
    env = world(embodiment="arm")
    before = env.env.hand.copy()
    env.advance([0.03, 0, -0.02, 0, 0, 0, 1])
    assert np.allclose(env.env.hand - before, [0.03, 0, -0.02], atol=1e-6) and env.count == 10


def test_swap_tells_another_task(stand_in):
    assert len({eval_sim._world(0, task, "eval", "swap", "metaworld", {}).instruction for task in METAWORLD}) == 50
    assert eval_sim._world(0, "push", "eval", "swap", "metaworld", {}).instruction != METAWORLD["push"]


def bytes_of(folder):
    """{file: its content} of a folder, without the seconds that an evaluation took."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
    return {name: {k: v for k, v in json.loads(text).items() if k != "seconds"} if "results" in name else text
            for name, text in found.items()}


@pytest.mark.parametrize("sim, families, numbers", [("metaworld", ("push",), 4), ("tabletop", ("pick",), 7)])
def test_interrupted_evaluation_goes_on_to_the_same_numbers(sim, families, numbers, stand_in, tmp_path):
    def run(out, model):
        return eval_sim.evaluate(model, ACTS, families, 6, batch=2, sim=sim, progress=False, out=tmp_path / out)
    run("whole", whole := Model(numbers))
    journal = next((tmp_path / "whole").glob("*.jsonl"))
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7 and [json.loads(line)["episode"] for line in lines[1:]] == list(range(6))
    (tmp_path / "cut").mkdir()
    cut = tmp_path / "cut" / journal.name
    cut.write_bytes(b"".join(lines[:4]) + lines[4][:20])               # one wave and a half, and a torn line

    class Killed(Model):
        def act(self, *args, **how):
            if len(self.asked) > len(whole.asked) / 2:
                raise KeyboardInterrupt
            return super().act(*args, **how)
    with pytest.raises(KeyboardInterrupt):                             # the film of the first wave is kept
        run("again", Killed(numbers))
    run("again", Model(numbers))
    run("cut", one := Model(numbers))
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "whole")
    assert 0 < len(one.asked) < len(whole.asked) and cut.read_bytes() == journal.read_bytes()
    before = len(one.asked)
    run("cut", one)                                                    # it was finished: this is a new one
    assert len(one.asked) > 2 * before and cut.read_bytes() == journal.read_bytes()
    cut.write_bytes(b"".join(lines[:3]).replace(b'"seed": 0', b'"seed": 7', 1))             # of another one
    assert eval_sim._journal(cut, json.loads(lines[0]), [(0, [0] * 6)]) == []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError):      # killed after the last episode
        patch.setattr(eval_sim, "save", None)
        run("late", Model(numbers))
    run("late", idle := Model(numbers))
    assert not idle.asked and bytes_of(tmp_path / "late") == bytes_of(tmp_path / "whole")


def test_what_the_model_is_asked_with_is_in_the_journal_and_the_results(tmp_path, capsys):
    class Warm(Model):
        def act(self, *args, heat=1.0, **how):
            return super().act(*args, **how)
    def run(**act):
        eval_sim.evaluate(model := Warm(7), ACTS, ("pick",), 2, batch=1, progress=False, out=tmp_path, **act)
        return len(model.asked)
    whole = run(heat=2.0)
    assert json.loads((tmp_path / "results.json").read_text())["act"] == {"heat": 2.0}
    (journal := tmp_path / "episodes.jsonl").write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
    assert not capsys.readouterr().out and run(heat=3.0) == whole      # not gone on with: another evaluation
    assert "episodes.jsonl: 1 episodes of an evaluation with other settings" in capsys.readouterr().out
    assert run(heat=3.0) == whole and not capsys.readouterr().out      # the same once more


def test_recorded_experts_are_samples_with_points_and_play_again(stand_in, tmp_path, capsys):
    rec = tmp_path / "rec"
    argv = ["--sim", "metaworld", "--expert", "--tasks", "push-v3,reach-v3", "--episodes", "4", "--split", "train",
            "--image-size", "32", "--views", "third,wrist", "--record", str(rec), "--out", str(tmp_path / "out")]
    eval_sim.main(argv)
    made = data.LeRobot(rec, options={"val": "0"}, views=("third", "wrist"), cache=tmp_path / "cache", horizon=5)
    assert len(made.kept) == 4 and made.about["fps"] == 80
    sample = data.check_sample(made[0], action_dim=4, state_dim=4, views=("third", "wrist"))
    assert sample["instruction"] == METAWORLD["push"] and sample["images"]["wrist"].shape == (32, 32, 3)
    env = world("push", 1_000_000, image_size=32)
    path = [env.env.hand.copy()]
    assert np.array_equal(sample["actions"][0], np.clip(env.expert()[0], -1, 1).astype(np.float32))
    while not env.success():
        env.advance(env.expert()[0])
        path.append(env.env.hand.copy())
    contact = next(i for i in range(1, len(path)) if i > 4 and np.linalg.norm(path[i] - path[0]) > 0.01)
    points = env.camera("third").project(np.array(path)[[contact, len(path) - 2]], 1, 1)
    assert np.allclose(sample["waypoints"][[0, -1]], points, atol=1e-5)
    columns = ("third.intrinsics", "third.extrinsics", "seed", "family")
    rows = pytest.importorskip("pyarrow.parquet").read_table(rec / "data/chunk-000/file-003.parquet").to_pydict()
    K, pose, seed, family = (rows[name][0] for name in columns)
    assert np.allclose(np.reshape(pose, (4, 4)), env.camera("third").extrinsics()) and K[2] == 16
    assert (seed, family) == (1_000_001, 1)
    capsys.readouterr()
    assert eval_sim.main(["--replay", str(rec)]) == 0
    assert "replayed 4 recorded episodes: 4 succeed, largest state error 0.0e+00" in capsys.readouterr().out
    points = data.LeRobot(rec, options={"val": "0"}, views=("current",), cache=tmp_path / "cache", points=True)[0]
    assert "actions" not in points and np.array_equal(points["waypoints"], sample["waypoints"])


def test_only_what_succeeds_is_a_demonstration(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(Expert, "get_action", lambda self, obs: np.append(
        (obs[-3:] - obs[:3]) * (100 if obs[-1] > 0.2 else -100), 0))
    results = eval_sim.evaluate(None, None, ("push",), 6, control="expert", sim="metaworld", batch=4,
                                record=tmp_path / "rec", settings={"views": ("third",), "image_size": 16},
                                progress=False)
    good = [e["seed"] for e in results["episodes"] if e["success"]]
    played = [e["seed"] for _, _, e in eval_sim.recordings(tmp_path / "rec")]
    assert 0 < len(good) < 6 and played == good
    eval_sim.evaluate(Model(), ACTS, ("push",), 2, sim="metaworld", record=tmp_path / "all", progress=False)
    assert len(list(eval_sim.recordings(tmp_path / "all"))) == 2       # of a policy: every episode


RECORD = "eval_sim.py --expert --families pick --episodes 2 --batch 1 --image-size 16 --record rec --out out"


@pytest.mark.parametrize("k", [31, pytest.param(9, marks=pytest.mark.long), pytest.param(50, marks=pytest.mark.long)])
def test_killed_recording_ends_in_the_same_bytes(k, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert forks.shared()(RECORD, cwd=tmp_path / "whole").rc == 0
    assert forks.shared()(RECORD, cwd=tmp_path / "killed", kill_at=k).rc == -9
    done = forks.shared()(RECORD, cwd=tmp_path / "killed")
    assert done.rc == 0, done.err
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    assert eval_sim.replay(eval_sim.recordings(tmp_path / "whole" / "rec"))[1] < 1e-6


def loaded():
    """What a worker process plays with."""
    return Model(7), ACTS


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    for workers in (0, 2):
        eval_sim.evaluate(Model(7), ACTS, ("pick", "push"), 6, batch=2, out=tmp_path / f"out{workers}", progress=False,
                          record=tmp_path / f"rec{workers}", workers=workers, load=loaded)
    assert bytes_of(tmp_path / "out0") == bytes_of(tmp_path / "out2")
    assert bytes_of(tmp_path / "rec0") == bytes_of(tmp_path / "rec2")


@draws
@pytest.mark.long
def test_real_recording_is_the_same_from_1_2_and_4_workers(tmp_path):
    for workers in (1, 2, 4):
        eval_sim.evaluate(None, None, ("push", "door-open"), 8, control="expert", sim="metaworld", batch=2,
                          settings={"views": ("third",), "image_size": 48, "fast_render": True}, workers=workers,
                          out=tmp_path / f"out{workers}", record=tmp_path / f"rec{workers}", progress=False)
    for workers in (2, 4):
        for kind in ("out", "rec"):
            assert bytes_of(tmp_path / f"{kind}{workers}") == bytes_of(tmp_path / f"{kind}1")


@real
@pytest.mark.long
def test_expert_gate_mt10_and_mt50():
    results = eval_sim.evaluate(None, None, tuple(METAWORLD), 500, control="expert", sim="metaworld", batch=10)
    assert results["success"] >= 0.98 and all(results["tasks"][task]["success"] == 1 for task in MT10)


# ---- Command line --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, message", [
    ("--sim libero --expert", "LIBERO has no expert"),
    ("--expert --control random", "--expert and --control random"),
    ("--expert --fast-render", "tabletop has no use for --fast-render"), ("--expert --views wrist", "use for --views"),
    ("--ckpt x --views wrist", "of --ckpt has no use for --views"), ("--ckpt x --control all --record r", "for --record"),
    ("--sim metaworld --expert --body dual", "no use for --body"),
    ("--sim metaworld --expert --gripper openvla", "no use for --gripper"),
    ("--sim metaworld --expert --fast-render", "no use for --fast-render"),
    ("--sim metaworld --expert --tasks fly-v3", "'fly': Meta-World knows reach, push"),
    ("--sim metaworld --expert --split hard", "split 'hard': Meta-World knows eval, train, val"),
    ("--sim metaworld --expert --tasks push,reach --episodes 3", "3 episodes of 2 tasks: give a multiple"),
    ("--sim metaworld --expert --views top --record rec", "'top': Meta-World knows third, wrist"),
    ("--sim metaworld --check --ckpt x", "--check has no use for --ckpt"), ("--replay here --record rec", "--record"),
    ("--expert --image-size 15 --record rec", "a video wants even numbers"), (f"--expert --record {__file__}", "is a file"),
    ("--sim metaworld --workers 0", "--workers: 0"),
])
def test_bad_flags_are_one_line(argv, message, stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        eval_sim.main(argv.split())
    assert len(str(error.value).splitlines()) == 1


def test_a_recording_with_gripper_openvla_holds_what_was_played(stand_in, tmp_path, monkeypatch):
    played, step = [], Env.step
    monkeypatch.setattr(Env, "step", lambda self, action: played.append(action[3]) or step(self, action))
    eval_sim.evaluate(Model(last=1.0), ACTS, ("push",), 1, sim="metaworld", record=tmp_path, progress=False,
                      settings={"gripper": "openvla"})
    (*_, episode), = eval_sim.recordings(tmp_path)
    assert set(played) == set(episode["executed"][:, 3]) == {-1}       # open
    played.clear()
    eval_sim.replay(eval_sim.recordings(tmp_path))
    assert set(played) == {-1}


def test_a_replay_that_compares_nothing_has_not_passed(monkeypatch):
    with pytest.raises(ValueError, match="holds no episode"):
        eval_sim.replay([])
    families, split, episode = next(iter(eval_sim.recordings("tabletop", ("pick",), episodes=1)))
    episode["state"][1] = math.nan
    monkeypatch.setattr(eval_sim, "recordings", lambda *_: [(families, split, episode)])
    assert eval_sim.main(["--replay", "tabletop"]) == 1


def test_replay_of_another_ones_recording_is_one_line(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{}")
    with pytest.raises(ValueError, match="--record did not write it"):
        eval_sim.main(["--replay", str(tmp_path)])


def test_a_recording_that_went_missing_or_of_another_version_is_one_line(stand_in, tmp_path, monkeypatch):
    how = dict(control="expert", sim="metaworld", batch=1, progress=False, out=tmp_path / "out",
               record=tmp_path / "rec", settings={"views": ("third",), "image_size": 16})
    eval_sim.evaluate(None, None, ("push",), 2, **how)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no recording of the same.*'metaworld': '4'"):
        patch.setattr(eval_sim, "version", lambda name: "4")
        eval_sim.evaluate(None, None, ("push",), 2, **how)
    journal = next((tmp_path / "out").glob("*.jsonl"))
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
    shutil.rmtree(tmp_path / "rec")
    with pytest.raises(ValueError, match="holds 0 episodes, of 1 that were recorded"):
        eval_sim.evaluate(None, None, ("push",), 2, **how)


@pytest.mark.parametrize("sim", eval_sim.PARTS)
def test_check_says_what_is_missing_and_how_to_install_it(sim, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_sim.platform, "system", lambda: "Linux")
    monkeypatch.setattr(eval_sim, "find_spec", lambda module: None)
    monkeypatch.setattr(eval_sim, "find_library", lambda name: None)
    assert eval_sim.main(["--sim", sim, "--check", "--out", str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing ")]
    modules, libraries, _ = eval_sim.PARTS[sim]
    assert len(lines) == len(modules) + bool(libraries)
    assert all("pip install" in line or "apt-get install" in line for line in lines)
    monkeypatch.setattr(eval_sim.platform, "system", lambda: "Darwin")         # it draws with its own libraries
    assert eval_sim.main(["--sim", sim, "--check", "--out", str(tmp_path)]) == 1
    assert "apt-get" not in capsys.readouterr().out


def test_check_draws_a_picture_and_steps(tmp_path, capsys, monkeypatch):
    assert eval_sim.main(["--check", "--out", str(tmp_path)]) == 0
    assert "steps played" in (out := capsys.readouterr().out) and "numpy " in out
    with Image.open(tmp_path / "check-tabletop.png") as picture:
        assert picture.size == (64, 64)


@draws
def test_check_of_meta_world_draws_a_picture(tmp_path, capsys):
    assert eval_sim.main(["--sim", "metaworld", "--check", "--fast-render", "--image-size", "48", "--out",
                          str(tmp_path)]) == 0
    assert "metaworld 3.1.1" in capsys.readouterr().out
    with Image.open(tmp_path / "check-metaworld.png") as picture:
        assert np.asarray(picture).std() > 10
