"""LIBERO, SimplerEnv, ManiSkill 3 and CALVIN through the evaluator, and several checkpoints or controls in one call.

None of them is installed where the tests run: each is a minimal stand-in of its API here, traps included.
"""
import atexit
import builtins
import importlib
import json
import math
import shutil
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import eval_sim
import numpy as np
import pytest
import test_eval_sim
import torch
from eval_sim import Calvin, Libero, ManiSkill, Simpler, SimplerPort
from test_eval_sim_metaworld import bytes_of
from test_methods import make


class Policy(test_eval_sim.Policy):
    """Plays chunks of what the model gave; begins anew with another instruction."""

    def __init__(self, model, unnorm_key=None, execute=None, robot=None):
        super().__init__(model, unnorm_key, execute)
        self.unnorm_key, self.robot, self.resets = unnorm_key or (robot and f"of {robot}"), robot, 0
        model.sessions.append(self)

    def reset(self, instruction=None):
        self.queue, self.resets = [], self.resets + 1


class Model:
    """Gives always the same action, in chunks."""
    device = "cpu"

    def __init__(self, action=(0.1, 0, 0, 0, 0, 0, 1), keys=("mine",), chunk=7, **cfg):
        self.cfg = SimpleNamespace(**{"views": ("third",), "image_size": 16, "execute": chunk, "horizon": chunk} | cfg)
        self.stats = {key: {"action": {"min": [0]}} for key in keys}
        self.action, self.asked, self.keys, self.sessions = action, [], [], []

    def act(self, observations, unnorm_key=None):
        self.asked += observations
        self.keys.append(unnorm_key)
        return np.tile(self.action, (len(observations), self.cfg.horizon, 1)).astype(np.float64), {}


def method(name="mine", **more):
    return SimpleNamespace(Policy=Policy, PREDICTS="actions", __name__=name, **more)


def run(sim, model, families, episodes, how=None, **more):
    return eval_sim.evaluate(model, how or method(), families, episodes, sim=sim, progress=False,
                             **{"batch": 1} | more)


def modules(monkeypatch, **given):
    """Modules a__b=... into sys.modules, as a.b."""
    for name, content in given.items():
        name = name.replace("__", ".")
        made = ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)


def cut(tmp_path, lines):
    """The journals (whole, cut): of the evaluation in "whole", and in "cut" so many lines of it."""
    whole, = (tmp_path / "whole").glob("*.jsonl")
    (tmp_path / "cut").mkdir()
    (part := tmp_path / "cut" / whole.name).write_text("".join(whole.read_text().splitlines(keepends=True)[:lines]))
    return whole, part


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(eval_sim, "FILM", 24)


# ---- LIBERO: a stand-in of hf-libero 0.1.4, as a package on the disk ------------------------------------------

PACKAGE = {
    "libero/__init__.py": "",
    "libero/libero/__init__.py": """
import json, os, sys
folder = os.environ["LIBERO_CONFIG_PATH"]
if not os.path.exists(os.path.join(folder, "config.yaml")):
    input("Do you want to specify a custom path for the dataset folder? (Y/N): ")
def get_libero_path(key):
    return json.load(open(os.path.join(folder, "config.yaml")))[key]
""",
    "libero/libero/benchmark/__init__.py": """
from types import SimpleNamespace
class Suite:
    def __init__(self, suite):
        self.suite = suite
    def get_task(self, i):
        return SimpleNamespace(name=f"task_{i}", language=f"do thing {i}", problem_folder=self.suite,
                               bddl_file=f"task_{i}.bddl", init_states_file="states.pruned_init")
def get_benchmark_dict():
    return {f"libero_{s}": (lambda s=s: Suite(f"libero_{s}")) for s in ("spatial", "object", "goal", "10", "90")}
""",
    "libero/libero/envs/__init__.py": """
import math, os
import numpy as np
from types import SimpleNamespace
LOG, SOLVED_AT, SPREAD = [], 5, float(os.environ.get("SPREAD", 0))
class OffScreenRenderEnv:
    def __init__(self, bddl_file_name, camera_heights, camera_widths):
        LOG.append(("build", bddl_file_name, camera_heights, camera_widths))
        np.random.rand(3)
        turn = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0.0]]).T                 # looks along -x; y right, z up
        data = SimpleNamespace(cam_xpos=np.array([[1.0, 0, 0]] * 2), cam_xmat=turn.reshape(1, 9).repeat(2, 0))
        self.sim = SimpleNamespace(data=data, model=SimpleNamespace(
            cam_fovy=[60.0, 60.0], camera_name2id=("agentview", "robot0_eye_in_hand").index))
        self.env, self.h = SimpleNamespace(obj_of_interest=["bowl"]), camera_heights
    def seed(self, seed):
        LOG.append(("seed", seed))
        np.random.seed(seed)
    def reset(self):
        self.fixture = np.random.rand()
        LOG.append(("reset", self.fixture))
    def set_init_state(self, state):
        LOG.append(("state", state.tolist()))
        self.steps = 0
        return self.seen()
    def seen(self):
        bowl, f = np.array([0, 0.2, 0.3]), self.h / 2 / math.tan(math.radians(30))
        raw = np.zeros((self.h, self.h, 3), np.uint8)
        raw[int(self.h / 2 + f * bowl[2]), int(self.h / 2 + f * bowl[1])] = 255        # bottom row first
        return {"agentview_image": raw, "robot0_eye_in_hand_image": raw, "bowl_pos": bowl,
                "robot0_eef_pos": np.array([1.0, 2, 3]),
                "robot0_eef_quat": np.array([0, 0, math.sin(0.25), math.cos(0.25)]),           # x, y, z, w
                "robot0_gripper_qpos": np.array([0.04, -0.04])}
    def step(self, action):
        assert len(action) == 7 and action[6] in (-1, 1)
        self.steps += 1
        LOG.append(("step", list(action)))
        return self.seen(), 0.0, self.steps == 10 + SOLVED_AT + int(SPREAD * self.fixture), {}
    def close(self):
        LOG.append(("close",))
        del self.env, self.sim
"""}


@pytest.fixture
def libero(tmp_path, monkeypatch):
    """The stand-in's envs module: its LOG of calls, its SOLVED_AT."""
    for name, text in PACKAGE.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    for suite in eval_sim.LIBERO_STEPS:
        folder = tmp_path / "site" / "libero" / "libero" / "init_files" / suite
        folder.mkdir(parents=True)
        torch.save(np.arange(100.0).reshape(50, 2), folder / "states.pruned_init")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.split(".")[0] == "libero"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "config"))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("it asks"))
    monkeypatch.setattr(Libero, "kept", {})
    monkeypatch.setattr(Libero, "chains", {})
    yield eval_sim.import_libero()[2]
    for name in [name for name in sys.modules if name.split(".")[0] == "libero"]:
        del sys.modules[name]


def laid_out(seed, family="libero_goal/3", **how):
    env = Libero((family,), **how)
    env.lay_out(seed)
    return env


def test_trap_11_libero_is_imported_without_its_question(libero, tmp_path):
    assert libero.__name__ == "libero.libero.envs"
    told = json.loads((tmp_path / "config" / "config.yaml").read_text())
    assert told["init_states"].endswith("libero/libero/init_files") and "assets" in told


def test_libero_official_suites_limits_and_counts():
    assert eval_sim.LIBERO_STEPS == {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520,
                                     "libero_90": 400}
    sets = Libero.SETS
    assert len(sets["libero"]) == 40 and len(sets["libero_90"]) == 90
    jobs = Libero.jobs(sets["libero"], 2000, "eval")
    assert jobs[:2] == [(0, "libero_spatial/0"), (1, "libero_spatial/0")] and jobs[-1] == (49, "libero_10/9")
    assert Libero.jobs(sets["libero_goal"], 20, "eval")[1:3] == [(1, "libero_goal/0"), (0, "libero_goal/1")]
    with pytest.raises(ValueError, match="51 episodes of 1 tasks: LIBERO has 50"):
        Libero.jobs(("libero_goal/0",), 51, "eval")


def test_libero_lays_out_in_the_official_order_and_settles_ten_steps(libero):
    env = laid_out(7, order="official", env_seed=3)
    kinds = [entry[0] for entry in libero.LOG]
    assert kinds == ["build", "seed"] + ["reset"] * 8 + ["state"] + ["step"] * 10
    assert libero.LOG[0][1].endswith("bddl_files/libero_goal/task_3.bddl") and libero.LOG[0][2:] == (256, 256)
    assert libero.LOG[1] == ("seed", 3) and ("state", [14.0, 15.0]) in libero.LOG
    assert libero.LOG[-1] == ("step", [0.0] * 6 + [-1.0])
    assert (env.count, env.instruction, env.max_steps) == (0, "do thing 3", 300)


def fixtures(libero, *seeds, **how):
    found = []
    for seed in seeds:
        env = laid_out(seed, **how)
        found.append(env.env.fixture)
        env.close()
    return found


def test_trap_1_official_fixtures_are_those_of_one_seeded_process_even_after_an_interruption(libero):
    np.random.seed(7)
    official = np.random.rand(4).tolist()
    np.random.seed(99)
    before = np.random.get_state()[1].copy()
    assert fixtures(libero, 0, 1, 2, 3, order="official", env_seed=7) == official
    assert np.array_equal(np.random.get_state()[1], before)            # nobody's draws are moved
    Libero.kept.clear(), Libero.chains.clear()                         # another process goes on at 2
    np.random.rand(5)
    assert fixtures(libero, 2, 3, 1, order="official", env_seed=7) == [*official[2:], official[1]]
    side_by_side = [laid_out(k, order="official", env_seed=7) for k in range(3)]
    assert [env.env.fixture for env in side_by_side] == official[:3]


def test_trap_1_sharded_fixtures_hang_on_nothing_but_seed_task_and_number(libero):
    a = fixtures(libero, 0, 1, 2)
    np.random.rand(3)
    assert fixtures(libero, 2, 0)[::-1] == [a[0], a[2]] and len(set(a)) == 3
    assert fixtures(libero, 0, env_seed=1) != a[:1] and fixtures(libero, 0, family="libero_goal/4") != a[:1]


def test_trap_7_frames_are_turned_and_the_matrices_know_that_they_are_a_mirrors(libero):
    env = laid_out(0, views=("third", "wrist_image"))
    seen = env.observe()
    assert set(seen["images"]) == {"third", "wrist_image"} and seen["images"]["third"].shape == (256, 256, 3)
    row, column = np.argwhere(seen["images"]["third"].any(-1))[0]
    assert row < 128 and column < 128                                  # high up; y to the left, as in a mirror
    at = seen["intrinsics"]["third"] @ (seen["extrinsics"]["third"] @ np.append(env.obs["bowl_pos"], 1))[:3]
    assert np.abs(at[:2] / at[2] - [column + 0.5, row + 0.5]).max() <= 0.51
    assert np.allclose(seen["state"], [1, 2, 3, 0, 0, 0.5, 0.04, -0.04])
    _, hand, thing = env.track()
    assert np.array_equal(hand, [1, 2, 3]) and np.array_equal(thing, env.obs["bowl_pos"])


def test_what_libero_draws_with_is_freed_before_robosuite_closes_egl(libero, monkeypatch):
    class Env(libero.OffScreenRenderEnv):
        def __init__(self, **how):
            super().__init__(**how)
            self.sim.drawn_by, alive = self, weakref.ref(self)         # round and round, as robosuite's
            atexit.register(lambda: found.append(alive()))             # closes EGL
    found, handlers = [], []
    monkeypatch.setattr(atexit, "register", handlers.append)
    monkeypatch.setattr(libero, "OffScreenRenderEnv", Env)
    for seed in (0, 1):
        laid_out(seed).close()
    while handlers:
        handlers.pop()()
    assert found == [None]


@pytest.mark.parametrize("gripper, last, played", [("", -1.0, -1), ("", 0.3, 1), ("", 0.0, -1), ("openvla", 1.0, -1),
                                                   ("openvla", 0.0, 1)])
def test_trap_8_libero_opens_at_minus_one(gripper, last, played, libero):
    env = laid_out(0, gripper=gripper)
    env.advance([0, 0, 0.5, 0, 0, 0, last])
    assert libero.LOG[-1] == ("step", [0, 0, 0.5, 0, 0, 0, played])
    with pytest.raises(ValueError, match=r"shape \(4,\).*LIBERO takes 7"):
        env.advance(np.zeros(4))


def test_libero_through_the_evaluator(libero, tmp_path, capsys):
    families = ("libero_goal/0", "libero_10/1")
    results = run("libero", model := Model(), families, 4, method("vla0"), batch=2, out=tmp_path)
    assert results["averages"] == {"libero_goal": 1, "libero_10": 1} and results["mean_steps"] == 5
    assert results["settings"] == {"env_seed": 7} and results["published"]["libero_10"] == 87.6
    assert model.asked[0]["images"]["third"].shape == (256, 256, 3) and model.asked[0]["instruction"] == "do thing 0"
    eval_sim.print_table(results)
    table = capsys.readouterr().out
    assert "libero_goal" in table and "96.2" not in table and "published: VLA-0" in table   # only some of its tasks
    eval_sim.print_table(results | {"families": Libero.SETS["libero"]})
    assert "96.2" in (table := capsys.readouterr().out) and "94.7" in table
    eval_sim.print_table(results | {"families": Libero.SETS["libero"], "control": "blank"})
    assert "published" not in capsys.readouterr().out
    libero.SOLVED_AT = 10 ** 6
    assert run("libero", Model(), ("libero_spatial/0",), 1)["episodes"][0]["steps"] == 220


def test_interrupted_official_libero_ends_in_the_same_numbers(libero, tmp_path):
    def go(out, model):
        Libero.kept.clear(), Libero.chains.clear(), libero.LOG.clear()
        run("libero", model, ("libero_goal/0",), 3, settings={"order": "official"}, out=tmp_path / out)
        return [entry for entry in libero.LOG if entry[0] == "reset"]
    resets = go("whole", Model())
    whole, part = cut(tmp_path, 3)
    assert go("cut", model := Model()) == resets and len(model.asked) == 1
    assert part.read_bytes() == whole.read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("order", eval_sim.ORDERS)
def test_libero_is_the_same_from_any_number_of_processes(order, libero, monkeypatch):
    monkeypatch.setenv("SPREAD", "20")                                 # the fixture decides on the number of steps
    libero.SPREAD = 20
    how = dict(control="random", settings={"order": order}, families=("libero_goal/0",), episodes=6, batch=2)
    rows = [run("libero", None, workers=workers, **how)["episodes"] for workers in (0, 1, 2)]
    assert rows[0] == rows[1] == rows[2] and len({row["steps"] for row in rows[0]}) > 2


def test_initial_states_are_read_without_running_a_pickle(libero, tmp_path):
    class Bad:
        def __reduce__(self):
            return print, ("ran",)
    torch.save(Bad(), tmp_path / "site/libero/libero/init_files/libero_goal/states.pruned_init")
    with pytest.raises(ValueError, match="states.pruned_init holds something else than an array"):
        laid_out(0)


def test_a_recording_of_a_benchmark_is_a_set(libero, tmp_path):
    data = pytest.importorskip("data")
    pytest.importorskip("pyarrow"), pytest.importorskip("av")
    tasks = ("libero_goal/0", "libero_goal/1")
    run("libero", Model((0, 0, 0, 0, 0, 0, 1.0)), tasks, 2, batch=2, record=tmp_path / "rec",
        settings={"gripper": "openvla", "env_seed": 3})
    drawn = [fixtures(libero, 0, family=task, env_seed=3)[0] for task in tasks]
    libero.LOG.clear()
    made = data.LeRobot(tmp_path / "rec", options={"val": "0"}, views=("third",), cache=tmp_path / "cache", horizon=3)
    assert len(made.kept) == 2 and made.about["fps"] == 20
    assert made[0]["actions"][0][6] == -1 and made[0]["instruction"] == "do thing 0" and made[0]["state"].shape == (8,)
    rows, worst = eval_sim.replay(eval_sim.recordings(tmp_path / "rec"))
    assert worst == 0 and [row["success"] for row in rows] == [True, True]
    assert [entry[1] for entry in libero.LOG if entry[0] == "reset"] == drawn


# ---- SimplerEnv, original: a stand-in of gymnasium, and of mani_skill2_real2sim's environments -----------------

class World:
    """An environment of SimplerEnv."""
    made, good = [], ()

    def __init__(self, name, **how):
        self.name, self.how, self.unwrapped, self.steps, self.actions = name, how, self, 0, []
        self.tcp, self.words = SimpleNamespace(pose=SimpleNamespace(p=np.zeros(3))), "put it there"
        World.made.append(self)

    def seen(self):
        lens = next(iter(self.how.get("rgb_overlay_cameras", ["overhead_camera"])))
        return {"image": {lens: {"rgb": np.zeros((48, 64, 3), np.uint8)}}, "agent": {"qpos": np.zeros(8)},
                "camera_param": {lens: {"extrinsic_cv": np.eye(4),
                                        "intrinsic_cv": [[50, 0, 32], [0, 50, 24], [0, 0, 1]]}}}

    def reset(self, options):
        self.options = options
        return self.seen(), {}

    def get_language_instruction(self):
        return self.words

    def step(self, action):
        self.actions.append(action)
        self.steps += 1
        assert self.steps <= self.how["max_episode_steps"]
        done = self.steps in self.good
        return self.seen(), 0, done, self.steps == self.how["max_episode_steps"], {"episode_stats": {"moved": np.True_}}

    def close(self):
        pass


@pytest.fixture
def simpler(monkeypatch, tmp_path):
    modules(monkeypatch, gymnasium={"make": World}, mani_skill2_real2sim={"ASSET_DIR": tmp_path},
            mani_skill2_real2sim__envs={})
    monkeypatch.setattr(World, "made", [])
    monkeypatch.setattr(World, "good", ())
    return World


def test_simpler_official_counts():
    counts = {family: Simpler.count_of(family) for family in Simpler.tasks()}
    assert {family: n for family, n in counts.items() if not family.startswith("google_va")} == {
        **dict.fromkeys(Simpler.SETS["widowx"], 24), "google_vm/pick_coke_can": 300, "google_vm/move_near": 240,
        "google_vm/drawer": 216, "google_vm/apple_in_drawer": 108}
    assert [counts[f"google_va/{task}"] for task in eval_sim.GOOGLE] == [675, 480, 378, 189]
    for family in counts:                                              # no two are the same
        episodes = [repr(episode) for episode in eval_sim.simpler_episodes(family)]
        assert len(set(episodes)) == len(episodes)
    few = [eval_sim.simpler_episodes(family)[k] for k, family in Simpler.jobs(("google_vm/pick_coke_can",), 12, "eval")]
    assert len({how["urdf_version"] for _, how, *_ in few}) == 4       # few of them are of all variants


def test_simpler_builds_what_the_official_scripts_build(simpler, tmp_path):
    env = Simpler(("widowx/eggplant_in_basket",))
    env.lay_out(5)
    made = simpler.made[0]
    assert made.name == "PutEggplantInBasketScene-v0" and made.how == {
        "obs_mode": "rgbd", "robot": "widowx_sink_camera_setup", "scene_name": "bridge_table_1_v2",
        "control_mode": "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos", "control_freq": 5, "sim_freq": 500,
        "max_episode_steps": 120, "camera_cfgs": {"add_segmentation": True}, "rgb_overlay_cameras": ["3rd_view_camera"],
        "rgb_overlay_path": str(tmp_path / "real_inpainting" / "bridge_sink.png")}
    robot = made.options["robot_init_options"]
    assert robot["init_xy"].tolist() == [0.127, 0.06]
    assert np.allclose(robot["init_rot_quat"], [0, 0, 0, 1])           # trap 9: w first
    assert made.options["obj_init_options"] == {"episode_id": 5} and env.fps == 5
    google = Simpler(("google_vm/move_near",))
    google.lay_out(61)
    made = simpler.made[1]
    assert made.how["urdf_version"] == "recolor_tabletop_visual_matching_1" and made.how["sim_freq"] == 513
    turn = made.options["robot_init_options"]["init_rot_quat"]         # -0.09 rad about z, after half a turn
    assert np.allclose(turn, [math.sin(0.045), 0, 0, math.cos(0.045)]) and google.max_steps == 80
    drawer = Simpler(("google_va/drawer",))
    drawer.lay_out(0)
    assert simpler.made[2].how["shader_dir"] == "rt" and "rgb_overlay_path" not in simpler.made[2].how


def test_trap_5_simpler_succeeds_at_the_last_step_alone(simpler):
    for good, success in (((3,), False), ((3, 60), True), ((60,), True)):
        simpler.good = good
        row, = run("simpler", Model(), ("widowx/stack_cube",), 1)["episodes"]
        assert (row["success"], row["steps"], row["stats"]) == (success, 60, {"moved": True})


def test_cogacts_limits_are_its_default_and_an_option(simpler):
    assert run("simpler", Model(), ("widowx/stack_cube",), 1, method("cogact"))["mean_steps"] == 120
    stock = run("simpler", Model(), ("widowx/stack_cube",), 1, method("cogact"), settings={"limits": "stock"})
    assert stock["mean_steps"] == 60 and stock["settings"] == {"limits": "stock"}
    assert stock["published"]["widowx/stack_cube"] == 15
    assert run("simpler", None, ("widowx/stack_cube",), 1, method("cogact"), control="random")["mean_steps"] == 120


def test_trap_10_a_session_without_the_robot_has_its_euler_angles_turned_into_an_axis(simpler):
    run("simpler", Model((0.1, 0, 0, 0.3, 0.2, 0.4, 0.2)), ("widowx/stack_cube",), 1, settings={"gripper": "openvla"})
    action = simpler.made[0].actions[0]
    angle = np.linalg.norm(action[3:6])
    x, y, z = action[3:6] / angle
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])                 # Rodrigues
    R = np.eye(3) + math.sin(angle) * K + (1 - math.cos(angle)) * K @ K
    assert np.allclose(R, eval_sim.rotation(0.3, 0.2, 0.4)) and action[6] == -1          # closed
    assert np.array_equal(eval_sim.axis_angle([0, 0, 0, 1]), np.zeros(3))


def test_a_method_that_knows_the_robot_acts_as_it_says_and_with_its_statistics(simpler):
    how = method(ROBOTS={"google_robot": 0, "widowx_bridge": 0})
    model = Model((0.1, 0, 0, 0.3, 0.2, 0.4, 0.2), keys=("of google_robot", "b"))
    run("simpler", model, ("google_vm/move_near",), 1, how)
    assert model.sessions[-1].robot == "google_robot" and set(model.keys) == {"of google_robot"}
    assert simpler.made[0].actions[0].tolist() == [0.1, 0, 0, 0.3, 0.2, 0.4, 0.2]        # untouched
    with pytest.raises(ValueError, match="relative gripper: only cogact and robovlms"):
        run("simpler", Model(), ("google_vm/move_near",), 1)
    with pytest.raises(ValueError, match="one robot at a time"):
        Simpler(("google_vm/move_near", "widowx/stack_cube"))


def test_an_instruction_that_changes_begins_a_session_anew(simpler, monkeypatch):
    monkeypatch.setattr(World, "get_language_instruction", lambda self: "first" if self.steps < 10 else "second")
    run("simpler", model := Model(), ("widowx/stack_cube",), 1)
    assert [seen["instruction"] for seen in model.asked][:3] == ["first", "first", "second"]
    assert model.sessions[-1].resets == 1
    run("simpler", model := Model(), ("widowx/stack_cube",), 1, control="swap")
    assert {seen["instruction"] for seen in model.asked} == {"eggplant in basket"}


def test_google_average_is_the_mean_over_tasks():
    rows = [{"task": task, "success": good, "steps": 1, "parse_failed": 0} for task, good in (
        ("google_vm/a", 1), ("google_vm/b", 0), ("google_vm/b", 0), ("google_vm/b", 0))]
    assert eval_sim.summary(rows, ("google_vm/a", "google_vm/b"))["averages"] == {"google_vm": 0.5}


# ---- ManiSkill 3 and SimplerEnv's port: batches of one, of torch's tensors ---------------------------------------

class Batched(World):
    def seen(self):
        name = "3rd_view_camera" if "segmentation" in self.how["obs_mode"] else "base_camera"
        K = torch.tensor([[[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]])
        return {"sensor_data": {name: {"rgb": torch.zeros(1, 48, 64, 3, dtype=torch.uint8)}},
                "sensor_param": {name: {"extrinsic_cv": torch.eye(4)[None, :3], "intrinsic_cv": K}},
                "agent": {"qpos": torch.zeros(1, 9)}}

    agent = SimpleNamespace(tcp=SimpleNamespace(pose=SimpleNamespace(p=torch.zeros(1, 3))))

    def reset(self, seed, options):
        self.seed, self.options = seed, options
        return self.seen(), {}

    def get_language_instruction(self):
        return ["put it there"]

    def step(self, action):
        assert action.dtype == np.float32
        self.steps, _ = self.steps + 1, self.actions.append(action)
        success = torch.tensor([self.steps in self.good])
        return self.seen(), torch.zeros(1), success, torch.tensor([False]), {"success": success}


@pytest.fixture
def maniskill(monkeypatch):
    modules(monkeypatch, gymnasium={"make": Batched}, mani_skill={}, mani_skill__envs={})
    monkeypatch.setattr(World, "made", [])
    monkeypatch.setattr(World, "good", (4,))
    return World


def test_maniskill_succeeds_at_any_step_and_lays_out_by_seed(maniskill):
    results = run("maniskill", model := Model(), ("PickCube-v1", "StackCube-v1"), 4, batch=2)
    assert results["mean_steps"] == 4 and [env.seed for env in maniskill.made] == [0, 1, 0, 1]
    how = maniskill.made[0].how
    assert how["control_mode"] == "pd_ee_delta_pose" and how["max_episode_steps"] == 50
    seen = model.asked[0]
    assert seen["state"].shape == (9,) and seen["instruction"] == eval_sim.MANISKILL["PickCube-v1"][0]
    assert results["success"] == 1 and "averages" not in results
    assert ManiSkill.jobs(("PickCube-v1",), 100, "eval")[-1] == (99, "PickCube-v1")


def test_port_of_simpler_lays_out_by_episode_and_succeeds_at_the_last_step(maniskill):
    row, = run("simpler3", Model(), ("widowx/carrot_on_plate",), 1)["episodes"]
    made = maniskill.made[0]
    assert made.name == "PutCarrotOnPlateInScene-v1" and made.how["obs_mode"] == "rgb+segmentation"
    assert "control_mode" not in made.how and made.options["episode_id"].tolist() == [0]
    assert (row["success"], row["steps"], row["instruction"]) == (False, 60, "put it there")
    maniskill.good = (60,)
    assert run("simpler3", Model(), ("widowx/carrot_on_plate",), 1)["success"] == 1
    assert SimplerPort(("widowx/carrot_on_plate",), limits="cogact").tasks() == Simpler.SETS["widowx"]


# ---- CALVIN -------------------------------------------------------------------------------------------------------

def test_trap_1b_hash_function_of_calvins_layouts():
    first = "dict_values([1, 1, 'left', 'open', 'slider_left', 'table', 'slider_right', 0])"
    assert eval_sim.fnv1_32(b"hello world") == 2805756500
    assert eval_sim.fnv1_32("hello world".encode("utf-16-le")) == 3799943344
    assert eval_sim.fnv1_32(first.encode("utf-16-le")) == 2138410836
    assert str(eval_sim.calvin_sequences()[0][0].values()) == first


def test_calvins_sequences_have_the_published_hash_and_are_made_anew():
    sequences = eval_sim.calvin_sequences()                            # a ValueError where the hash is another
    assert len(sequences) == 1000 and len(eval_sim.calvin_states()) == 192 and len(eval_sim.CALVIN_TASKS) == 34
    assert sequences[0][1] == ("rotate_blue_block_right", "move_slider_right", "lift_red_block_slider",
                               "place_in_slider", "turn_off_lightbulb")
    for number in (0, 191):                                            # shares of 6 and 5
        state = eval_sim.calvin_states()[number]
        shipped = sorted(tasks for found, tasks in sequences if found == state)
        assert sorted(eval_sim.calvin_draw(number, len(shipped))) == shipped and len(shipped) == 6 - number // 191


@pytest.mark.long
def test_all_of_calvins_sequences_are_generated():
    made = [(eval_sim.calvin_states()[i], tasks) for i, tasks in eval_sim.calvin_generate()]
    assert made == eval_sim.calvin_sequences()


def test_every_sequence_can_be_done_by_calvins_rules():
    for state, tasks in eval_sim.calvin_sequences()[::10]:
        assert len({eval_sim.CALVIN_TASKS[task] for task in tasks}) == 5
        for task in tasks:
            state, = eval_sim.calvin_next(state, task)
    table = dict.fromkeys(eval_sim.BLOCKS, "table")
    start = {"led": 0, "lightbulb": 1, "slider": "left", "drawer": "closed", "grasped": 0, **table}
    held = start | {"red_block": "grasped", "grasped": 1}
    assert eval_sim.calvin_next(start, "lift_red_block_table") == [held]
    assert len(eval_sim.calvin_next(held, "stack_block")) == 2         # on either: not unambiguous
    for task in ("turn_on_lightbulb", "close_drawer", "place_in_drawer", "lift_red_block_drawer", "unstack_block"):
        assert eval_sim.calvin_next(start, task) == []


def test_calvins_layout_of_the_first_sequence():
    robot, scene = eval_sim.calvin_layout(eval_sim.calvin_sequences()[0][0])
    assert robot.shape == (15,) and robot[-1] == 1 and scene.shape == (24,)
    assert scene[:6].tolist() == [0.28, 0.22, 0, 0.088, 1, 1]          # slider left, drawer open, both lamps
    assert scene[6] < -0.2 and 0.07 < scene[18] < 0.071 and scene[12] in (5.00000896e-02, 2.29995412e-01)
    turns = scene[[11, 17, 23]]
    assert (np.abs(turns - math.pi / 2) <= math.pi / 8).all() and len(set(turns)) == 3
    rng = np.random.RandomState(2138410836)
    slots = [0.05, 0.23]
    rng.shuffle(slots)
    assert round(scene[12], 2) == slots[0] and scene[11] == rng.uniform(math.pi * 3 / 8, math.pi * 5 / 8)


class Table:
    """CALVIN's environment: the task that is asked is done `after` steps of it, and `trace` more a reset."""
    built, log, moved, after, trace = 0, [], [], 20, 0

    def __init__(self):
        Table.built += 1
        Table.log.append("build")
        self.cameras, self.resets = [], 0

    def reset(self, robot_obs, scene_obs):
        Table.log.append(("reset", robot_obs.shape, scene_obs.shape))
        self.steps, self.resets = 0, self.resets + 1
        return self.seen()

    def seen(self):
        static, gripper = np.zeros((200, 200, 3), np.uint8), np.ones((84, 84, 3), np.uint8)
        return {"rgb_obs": {"rgb_static": static, "rgb_gripper": gripper}, "robot_obs": np.arange(15.0)}

    def get_info(self):
        return {"steps": self.steps, "last": self.after + self.trace * self.resets}

    def step(self, action):
        assert len(action) == 7 and action[6] in (-1, 1)               # as the robot asserts
        self.steps += 1
        Table.log.append(float(action[6]))
        Table.moved.append(action[0])
        action[:6] *= 0.02                                             # the clone's version changes it in place
        return self.seen(), 0, False, self.get_info()

    def close(self):
        Table.log.append("close")


class Judge:
    def get_task_info_for_set(self, start, now, names):
        assert len(names) == 1
        return names if now["steps"] - start["steps"] == now["last"] else set()


@pytest.fixture
def calvin(monkeypatch):
    monkeypatch.setattr(Table, "log", [])
    monkeypatch.setattr(Table, "moved", [])
    monkeypatch.setattr(Table, "built", 0)
    monkeypatch.setattr(Table, "after", 20)
    monkeypatch.setattr(Table, "trace", 0)
    monkeypatch.setattr(Calvin, "kept", [])
    monkeypatch.setattr(Calvin, "_ready", classmethod(lambda cls: None))
    words = {task: f"please {task}" for task in eval_sim.CALVIN_TASKS}
    monkeypatch.setattr(Calvin, "_build", lambda self: (Table(), Judge(), words))
    monkeypatch.setattr(Calvin, "camera", lambda self, view: eval_sim.Camera.look_at((1, 0, 1), (0, 0, 0), 1))
    return Table


def test_calvin_asks_five_in_a_row_and_begins_a_session_with_each(calvin):
    results = run("calvin", model := Model(views=("third", "wrist")), ("D",), 2, method("robovlms"))
    row = results["episodes"][0]
    assert (row["success"], row["solved"], row["steps"]) == (True, 5, 100)
    assert row["chain"] == list(eval_sim.calvin_sequences()[0][1])
    asked = [seen["instruction"] for seen in model.asked]
    assert list(dict.fromkeys(asked[:15])) == [f"please {task}" for task in row["chain"]]
    assert set(calvin.moved) == {0.1}
    assert model.sessions[-1].resets == 4 and calvin.log[1] == ("reset", (15,), (24,))
    seen = model.asked[0]
    assert seen["images"]["third"].shape == (200, 200, 3) and seen["images"]["wrist"].shape == (84, 84, 3)
    assert seen["intrinsics"]["wrist"][0, 2] == 42 and seen["state"].shape == (15,)
    assert results["length"] == 5 and results["averages"]["5 in a row"] == 1 and results["published"]["length"] == 4.25


@pytest.mark.parametrize("chunk", [7, 50])
def test_calvins_budget_is_360_steps_an_instruction_whatever_the_chunk(chunk, calvin):
    calvin.after = 361
    row, = run("calvin", Model(chunk=chunk), ("D",), 1)["episodes"]
    assert (row["steps"], row["solved"]) == (360, 0)
    calvin.after = 360
    assert chunk < 50 or run("calvin", Model(chunk=chunk), ("D",), 1)["episodes"][0]["steps"] == 1800


def test_calvin_first_failure_ends_the_sequence_and_is_counted(calvin, monkeypatch, capsys):
    monkeypatch.setattr(Judge, "get_task_info_for_set", lambda self, start, now, names: names if (
        now["steps"] - start["steps"] == 5 and now["steps"] <= 10) else set())
    results = run("calvin", Model(), ("D",), 1)
    row, = results["episodes"]
    assert (row["success"], row["solved"], row["steps"], results["length"]) == (False, 2, 370, 2)
    assert [results["averages"][f"{n} in a row"] for n in range(1, 6)] == [1, 1, 0, 0, 0]
    eval_sim.print_table(results)
    assert "average length 2.00" in capsys.readouterr().out


@pytest.mark.parametrize("gripper, last, played", [("", 0.4, 1), ("", -0.4, -1), ("", 0.0, -1), ("openvla", 0.4, -1)])
def test_trap_8_calvin_opens_at_one(gripper, last, played, calvin):
    env = Calvin(gripper=gripper)
    env.lay_out(0)
    env.advance([0, 0, 0, 0, 0, 0, last])
    assert calvin.log[-1] == played


def test_calvin_builds_anew_for_each_sequence_or_keeps_one(calvin):
    run("calvin", Model(), ("D",), 3)
    assert calvin.built == 3 and calvin.log.count("close") == 3        # its reset leaves traces
    run("calvin", Model(), ("D",), 3, settings={"order": "official"})
    assert calvin.built == 4
    with pytest.raises(ValueError, match="of CALVIN one sequence at a time"):
        run("calvin", Model(), ("D",), 2, batch=2)


def test_official_calvin_is_played_in_one_go(calvin, tmp_path, capsys):
    def go(out, order="official"):
        results = run("calvin", model := Model(), ("D",), 3, settings={"order": order}, out=tmp_path / out)
        return [row["steps"] for row in results["episodes"]], len(model.asked)
    calvin.trace = 3                                                   # of the sequences before: five tasks each
    steps, asked = go("whole")
    assert steps == [115, 130, 145] and go("another") == (steps, asked)        # from the same process
    assert go("sharded", "sharded")[0] == [115] * 3
    whole, part = cut(tmp_path, 3)
    capsys.readouterr()
    assert go("cut") == (steps, asked) and part.read_bytes() == whole.read_bytes()
    assert "so the 2 that were played before the interruption are played again." in capsys.readouterr().out
    (tmp_path / "cut" / "results-calvin.json").unlink()
    assert go("cut") == (steps, 0)                                     # all were played
    with pytest.raises(ValueError, match="--order official --workers 2: CALVIN's one environment remembers"):
        run("calvin", Model(), ("D",), 3, settings={"order": "official"}, workers=2)


def test_a_recording_of_calvin_has_an_episode_for_each_instruction(calvin, tmp_path):
    data = pytest.importorskip("data")
    pytest.importorskip("pyarrow"), pytest.importorskip("av")
    calvin.after = 4
    results = run("calvin", Model(), ("D",), 2, record=tmp_path / "rec", out=tmp_path / "whole")
    assert [row["recorded"] for row in results["episodes"]] == [5, 5]
    made = data.LeRobot(tmp_path / "rec", options={"val": "0"}, views=("third",), cache=tmp_path / "cache", horizon=6)
    told = [f"please {task}" for row in results["episodes"] for task in row["chain"]]
    assert [made[i]["instruction"] for i in range(0, 40, 4)] == told and len(made) == 40
    assert made[3]["loss_mask"].tolist() == [True] + [False] * 5       # no chunk goes on into the next task
    for episodes, played in ((200, 2), (1, 1)):
        calvin.log.clear()
        rows, worst = eval_sim.replay(eval_sim.recordings(tmp_path / "rec", episodes=episodes))
        assert [row["success"] for row in rows] == [True] * played and worst == 0 and calvin.log.count("build") == played
    cut(tmp_path, 2)                                                   # the first is in the journal
    shutil.copytree(tmp_path / "rec", tmp_path / "again")
    for path in (tmp_path / "again/meta/episodes").rglob("file-00[7-9].parquet"):    # in the middle of the second
        path.unlink()
    run("calvin", model := Model(), ("D",), 2, record=tmp_path / "again", out=tmp_path / "cut")
    assert len(model.asked) == 5 and bytes_of(tmp_path / "again") == bytes_of(tmp_path / "rec")


def test_calvins_instructions_come_from_its_clone(tmp_path, monkeypatch):
    made, load = {}, lambda path: {"t": ["words"]} if "validation" in str(path) else SimpleNamespace(tasks={"a": 1})
    omega = SimpleNamespace(load=load, merge=lambda *parts: parts[-1], create=lambda about: SimpleNamespace(**about))
    modules(monkeypatch, calvin_env={"__file__": str(tmp_path / "calvin_env" / "calvin_env" / "__init__.py")},
            calvin_env__envs={}, calvin_env__envs__tasks={"Tasks": lambda tasks: tasks}, omegaconf={"OmegaConf": omega},
            hydra={"utils": SimpleNamespace(instantiate=lambda env, **how: made.update(how))})
    with pytest.raises(ValueError, match="must lie in a clone of CALVIN"):
        Calvin()._build()
    sentences = tmp_path / "calvin_models/conf/annotations/new_playtable_validation.yaml"
    sentences.parent.mkdir(parents=True)
    sentences.write_text("")
    assert Calvin()._build()[1:] == ({"a": 1}, {"t": "words"})
    assert made == {"show_gui": False, "use_vr": False, "use_scene_info": True, "use_egl": False}


# ---- Command line: what does not fit, several checkpoints, several controls ----------------------------------------

@pytest.mark.parametrize("argv, message", [
    ("--sim libero --expert", "LIBERO has no expert"),
    ("--sim libero --tasks libero_goal/11 --control random", "libero_goal/11.*sets libero, libero_spatial"),
    ("--sim simpler --control random --order official", "no use for --order"),
    ("--control random --env-seed 1", "no use for --env-seed"),
    ("--sim libero --control random --fast-render", "no use for --fast-render"),
    ("--sim calvin --control random --limits cogact", "no use for --limits"),
    ("--sim libero --control random --tasks libero_goal --episodes 15", "15 episodes of 10 tasks: LIBERO has 500"),
    ("--sim calvin --ckpt x --order official --workers 3", "remembers the sequences before, so one process plays all"),
    ("--sim maniskill --control random --views third,wrist,top --record rec", "draws 2, base_camera and hand_camera"),
    ("--ckpt a b --record rec", "several --ckpt has no use for --record"),
])
def test_bad_flags_are_one_line(argv, message, libero, maniskill, simpler, calvin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        eval_sim.main(argv.split())
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError, ImportError])         # sapien's, robosuite's
def test_a_machine_that_cannot_draw_is_one_line(error, maniskill, monkeypatch):
    def reset(self, seed, options):
        raise error("failed to find a rendering device")
    monkeypatch.setattr(Batched, "reset", reset)
    wanted = "ManiSkill 3, PickCube-v1: failed to find a rendering device. Is all .* mani_skill==3.0.1.*Mesa 25 or newer"
    with pytest.raises(ValueError, match=wanted):
        run("maniskill", Model(), ("PickCube-v1",), 1)


def test_a_missing_simulator_names_the_check(monkeypatch, tmp_path):
    for sim, name in (("simpler", "mani_skill2_real2sim"), ("maniskill", "mani_skill"), ("calvin", "calvin_env")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=f"--sim {sim} --check"):
            eval_sim.main(["--sim", sim, "--control", "random", "--out", str(tmp_path)])


def test_points_are_no_actions_of_a_benchmark(maniskill):
    with pytest.raises(ValueError, match="a0 predicts points, ManiSkill 3 wants actions"):
        how = SimpleNamespace(Policy=Policy, PREDICTS="waypoints", __name__="a0")
        run("maniskill", Model(), ("PickCube-v1",), 1, how)


SERIES = "--sim maniskill --tasks PickCube-v1 --episodes 2 --batch 2".split()


@pytest.fixture
def checkpoints(maniskill, monkeypatch, tmp_path):
    """Two checkpoints; the controls that `evaluate` was called with, (n, flags) -> a series killed in its n-th call."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    calls, last, evaluate = [], [], eval_sim.evaluate
    def watched(model, *args, **how):
        calls.append(args[6])                                          # the control
        if len(calls) in last:
            raise KeyboardInterrupt
        return evaluate(model, *args, **how)
    def killed(n, *argv):
        calls.clear(), last.append(n)
        with pytest.raises(KeyboardInterrupt):
            eval_sim.main([*SERIES, *argv])
        last.clear()
    monkeypatch.setattr(eval_sim, "evaluate", watched)
    monkeypatch.setattr(eval_sim, "find_method", lambda ckpt, model: method())
    monkeypatch.setattr(eval_sim, "load", lambda a, method, ckpt: Model(
        (0.01 if ckpt == "a" else -0.01, 0, 0, 0, 0, 0, 0), keys=("tabletop",)))
    return calls, killed


def test_several_checkpoints_one_table_one_json_each_and_interrupted_they_go_on(checkpoints, tmp_path, capsys):
    calls, killed = checkpoints
    killed(2, "--ckpt", "a", "b")
    first = (results := tmp_path / "a/eval/results-maniskill.json").stat().st_mtime_ns
    eval_sim.main([*SERIES, "--ckpt", "a", "b"])
    out = capsys.readouterr().out
    assert len(calls) == 3 and results.stat().st_mtime_ns == first     # a was not played again
    assert [line.split() for line in out.splitlines() if line.startswith("success ")] == [["success", "a", "b"]]
    found = {json.loads(path.read_text())["checkpoint"]["sha256"] for path in tmp_path.rglob("results*.json")}
    assert len(found) == 2 and not list(tmp_path.rglob(".series.json"))
    eval_sim.main([*SERIES, "--ckpt", "a", "b"])                       # all was finished: begun anew
    assert len(calls) == 5


def test_a_series_plays_again_what_another_run_has_overwritten(checkpoints, tmp_path):
    calls, killed = checkpoints
    killed(2, "--ckpt", "a", "b")
    (results := tmp_path / "a/eval/results-maniskill.json").write_bytes(results.read_bytes())
    eval_sim.main([*SERIES, "--ckpt", "a", "b"])
    assert len(calls) == 4                                             # a, b killed, a, b
    eval_sim.main([*SERIES, "--ckpt", "a", "b", "--out", "out"])
    assert len([*(tmp_path / "out").glob("[ab]/results-maniskill.json")]) == 2


def test_interrupted_controls_go_on_without_those_that_are_finished(checkpoints, tmp_path, monkeypatch):
    calls, killed = checkpoints
    argv = "--ckpt a --control all".split()
    killed(3, *argv)
    eval_sim.main([*SERIES, *argv])
    assert calls == ["", "swap", "blank", "blank", "random"]
    killed(2, *argv)                                                   # of another checkpoint nothing is finished,
    (tmp_path / "a" / "model.safetensors").write_bytes(b"another")
    eval_sim.main([*SERIES, *argv])
    assert calls == ["", "swap", "", "swap", "blank", "random"]
    killed(2, *argv)                                                   # nor in another version of the simulator
    monkeypatch.setattr(eval_sim, "version", lambda name, known=eval_sim.version: (
        "3.0.2" if name == "mani_skill" else known(name)))
    eval_sim.main([*SERIES, *argv])
    assert calls == ["", "swap", "", "swap", "blank", "random"]


def test_a_series_knows_the_commit_of_a_simulator_from_a_clone(simpler, checkpoints, tmp_path, monkeypatch):
    modules(monkeypatch, gymnasium={"make": World})
    calls, killed = checkpoints
    monkeypatch.setattr(sys.modules["mani_skill2_real2sim"], "__file__", str(tmp_path / "its" / "mani" / "x.py"), False)
    monkeypatch.setattr(eval_sim, "_commit", lambda here: commit if here.name == "its" else "")
    argv, commit = ["--ckpt", "a", "b", "--sim", "simpler", "--tasks", "widowx/stack_cube"], "one"
    killed(2, *argv)
    commit = "two"
    eval_sim.main([*SERIES, *argv])
    assert len(calls) == 4


def test_check_of_a_benchmark_draws_and_steps(libero, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_sim, "find_spec", lambda module, find=eval_sim.find_spec: find("json") if module in (
        "robosuite", "bddl", "mujoco") else find(module))
    monkeypatch.setattr(eval_sim, "find_library", lambda name: name)
    assert eval_sim.main(["--sim", "libero", "--check", "--out", str(tmp_path)]) == 0
    assert "5 steps played" in capsys.readouterr().out and (tmp_path / "check-libero.png").is_file()


@pytest.mark.parametrize("name, sim, family, steps", [
    ("vla0", "libero", "libero_goal/0", 5), ("cogact", "simpler", "widowx/stack_cube", 3),
    ("robovlms", "simpler", "widowx/stack_cube", 3), ("robovlms", "calvin", "D", 3),
    ("robobrain_x0", "maniskill", "PickCube-v1", 3), ("cogact", "simpler3", "widowx/stack_cube", 3)])
def test_the_methods_play_the_benchmarks(name, sim, family, steps, request, monkeypatch):
    played = importlib.import_module(name)
    request.getfixturevalue({"simpler3": "maniskill"}.get(sim, sim))
    monkeypatch.setattr(World, "good", ())
    for what, limits in ((Simpler, {"max_steps": 3}), (SimplerPort, {"max_steps": 3}), (Calvin, {"LIMIT": 3}),
                         (ManiSkill, {"max_steps": 3})):
        for key, value in limits.items():
            monkeypatch.setattr(what, key, value)
    results = run(sim, make(played), (family,), 1, played)
    assert results["mean_steps"] == steps and isinstance(results["published"], (dict, str))
    robot = {"simpler": "widowx_bridge", "simpler3": "widowx_bridge", "calvin": "calvin"}.get(sim)
    env = eval_sim.SIMS[sim]((family,))
    session = eval_sim._session(env, make(played), played, None, None)
    assert getattr(session, "robot", None) == robot and env.native == bool(robot)


# ---- The real ones, where they are -------------------------------------------------------------------------------

LIBERO = find_spec("libero")
ASSETS = LIBERO and [Path(LIBERO.submodule_search_locations[0]) / "libero/assets", Path.home() / ".cache/libero/assets"]


@pytest.mark.long
@pytest.mark.skipif(not any(path.is_dir() for path in ASSETS or ()), reason="no hf-libero, or none of its assets")
@pytest.mark.parametrize("suite", eval_sim.LIBERO_STEPS)
def test_all_tasks_of_the_real_libero_build_and_move(suite, monkeypatch):
    monkeypatch.setitem(eval_sim.LIBERO_STEPS, suite, 5)
    for family in Libero.SETS[suite]:
        row, = eval_sim.run_wave([(49, family)], None, None, "eval", "random", sim="libero", embodiment="panda")
        assert row["steps"] == 5 and len(row["instruction"].split()) > 2


@pytest.mark.long
@pytest.mark.skipif(not find_spec("calvin_env"), reason="no calvin_env: pip install -e calvin/calvin_env")
def test_real_calvin_lays_out_what_it_is_told_and_does_not_hang_on_what_was_before():
    def play(number):
        env = Calvin(views=("third", "wrist"))
        env.lay_out(number)
        scene = env.obs["scene_obs"].copy()
        for _ in range(5):
            env.advance([0.5, 0, 0, 0, 0, 0, -1])
        seen = env.observe()
        env.close()
        return scene, seen
    (scene, first), _, (_, again) = play(1), play(0), play(1)
    assert np.abs(scene - eval_sim.calvin_layout(eval_sim.calvin_sequences()[1][0])[1]).max() < 0.02
    assert np.array_equal(first["state"], again["state"])
    assert np.array_equal(first["images"]["wrist"], again["images"]["wrist"])
