"""examples/robot_loop.py: the robot's side, a robot of numbers in real time, and against the real server."""
import importlib.util
import json
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import robobrain_x0 as x0
from test_methods import make
from test_serve import ROOT, running

SPEC = importlib.util.spec_from_file_location("robot_loop", ROOT / "examples/robot_loop.py")
loop = importlib.util.module_from_spec(SPEC)
sys.modules["robot_loop"] = loop
SPEC.loader.exec_module(loop)
BODY = loop.Body("delta", "rotvec", 1, ("third",), period=0.02, execute=4)
WIDE = loop.Limits((-9, 9) * 3, speed=9, turn=9, steps=12)
NEVER = 60                                                     # seconds of patience, however slow we are


def until(true, *args):
    """Wait for what must happen, on a slow machine too."""
    for _ in range(30_000):
        if true(*args):
            return
        time.sleep(0.001)
    raise AssertionError("it did not happen in 30 s")


class Server:
    """Answers numbered chunks: row k of chunk n moves by n + k / 100 [mm] along x; may(n): wait for that."""

    def __init__(self, rows=8, may=lambda n: True):
        self.rows, self.may, self.seen = rows, may, []

    def __call__(self, instruction, images, pose):
        self.seen.append(int(images["third"][0, 0, 0]))                     # how many rows were played before
        until(self.may, len(self.seen))
        chunk = np.zeros((self.rows, 7))
        chunk[:, 0] = (len(self.seen) + np.arange(self.rows) / 100) / 1000
        return chunk


def played(robot):
    return [(int(round(1e5 * row[0])) // 100, int(round(1e5 * row[0])) % 100) for row in robot.moved]


# ---- Hand-over ---------------------------------------------------------------------------------------------

def test_without_overlap_every_chunk_starts_at_its_first_row():
    robot, server = loop.FakeRobot(BODY), Server()
    assert loop.run(robot, server, "go", WIDE, patience=NEVER) == 12 and robot.stops == 1
    assert played(robot) == [(n, k) for n in (1, 2, 3) for k in range(4)] and server.seen == [0, 4, 8]


def test_with_overlap_rows_of_the_past_are_left_out_and_the_robot_never_waits(monkeypatch):
    """Each answer takes two rows' time: it comes while a third one is left to play."""
    robot, asked = loop.FakeRobot(BODY), []
    server, move = Server(may=lambda n: n == 1 or len(robot.moved) >= server.seen[-1] + 2), robot.move

    class Pool(ThreadPoolExecutor):
        def submit(self, *args):
            asked.append((len(robot.moved), super().submit(*args)))
            return asked[-1][1]

    def moved(row):
        move(row)
        if len(robot.moved) == asked[-1][0] + 2:
            asked[-1][1].result(30)
    robot.move = moved
    monkeypatch.setattr(loop, "ThreadPoolExecutor", Pool)
    loop.run(robot, server, "go", WIDE, ahead=3, patience=NEVER)
    assert played(robot) == [(1, 0), (1, 1), (1, 2)] + [(n, k) for n in (2, 3, 4) for k in (2, 3, 4)]
    assert server.seen == [0, 1, 4, 7, 10] and robot.stops == 1             # a row is played at its own time


def test_blended_rows_lie_between_the_old_and_the_new_chunk():
    old, new = [np.full(7, 1.0)] * 3, np.full((6, 7), 2.0)
    rows = np.array(loop.hand_over(BODY, old, new, late=2, blend=2))
    np.testing.assert_allclose(rows[:, 0], [4 / 3, 5 / 3, 2, 2])
    assert np.array_equal(loop.hand_over(BODY, old, new, 2, 0), new[2:])
    assert not loop.hand_over(BODY, old, new, 9, 2)


def test_angles_are_mixed_the_short_way_round():
    euler, quat = loop.Body(rotation="euler", arms=1), loop.Body(arms=1)
    got = loop.mix(euler, [0, 0, 0, 0, 0, 3.0, 0], [0, 0, 0, 0, 0, -3.0, 1], 0.5)
    assert abs(abs(got[5]) - np.pi) < 1e-9 and got[6] == 0.5
    a, b = x0.euler_to_quat(np.array([0, 0, 0.2])), -x0.euler_to_quat(np.array([0, 0, 0.6]))
    got = loop.mix(quat, [0, 0, 0, *a, 0], [0, 0, 0, *b, 0], 0.5)[3:7]
    np.testing.assert_allclose(x0.quat_to_euler(got), [0, 0, 0.4], atol=1e-9)


def test_rotations_are_those_of_robobrain():
    rng = np.random.default_rng(0)
    for _ in range(20):
        angles = rng.uniform(-1.5, 1.5, (2, 3))
        for kind, theirs in (("euler", x0.euler_to_quat), ("rotvec", x0.rotvec_to_quat)):
            got, want = loop.quaternion(loop.Body(rotation=kind), angles), theirs(angles)
            np.testing.assert_allclose(got * np.sign((got * want).sum(1, keepdims=True)), want, atol=1e-9)
    turned = np.concatenate([np.zeros(3), x0.euler_to_quat(np.array([0, 0, 0.3])), [1]])
    _, _, turn = loop.motion(loop.Body(arms=1), np.array([[0, 0, 0, 0, 0, 0, -1.0, 1]]), turned)
    np.testing.assert_allclose(turn, 0.3)


# ---- What stops the robot ----------------------------------------------------------------------------------

def test_a_late_server_stops_the_robot_and_its_answer_is_thrown_away():
    robot = loop.FakeRobot(BODY)
    when = []
    robot.stop = lambda: when.append(len(robot.moved))
    loop.run(robot, Server(may=lambda n: n != 2 or when), "go", WIDE, ahead=2, patience=0.4)
    assert when == [4, 12]                                     # once while it waits, once at the end
    assert played(robot)[:4] == [(1, k) for k in range(4)] and played(robot)[4] == (3, 0)


def test_a_still_robot_may_wait_for_a_slow_server():
    robot = loop.FakeRobot(BODY)
    limits = loop.Limits(WIDE.box, 9, 9, steps=8)
    held = Server(may=lambda n: robot.stops == n)
    assert loop.run(robot, held, "go", limits, patience=0.4) == 8           # held, then played
    assert played(robot) == [(n, k) for n in (1, 2) for k in range(4)] and robot.stops == 3


def test_a_loop_that_hangs_is_stopped_from_outside():
    robot = loop.FakeRobot(BODY)
    robot.move = lambda row, before=robot.stops: until(lambda: robot.stops > before)     # a driver that hangs
    loop.run(robot, Server(), "go", loop.Limits(WIDE.box, 9, 9, steps=1), patience=0.1)
    assert robot.stops >= 2                                    # by the watchdog, and at the end


def test_what_was_left_to_play_is_dropped_after_a_stop():
    robot = loop.FakeRobot(BODY)
    look = robot.observe

    def observe():                                             # a camera that hangs at the third row
        until(lambda: len(robot.moved) != 2 or robot.stops)
        return look()
    robot.observe = observe
    loop.run(robot, Server(), "go", WIDE, ahead=2, patience=0.4)
    assert played(robot)[:4] == [(1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize("row, words", [
    ([0.006] + [0] * 6, "moves at 0.300 m/s, at most 0.25"), ([0, 0, 0, 0.03, 0, 0, 0], "at 1.500 rad/s"),
    ([0, 0, -0.004, 0, 0, 0, 0], "out of the box"), ([np.nan] * 7, "are no command"),
    ([0.0] * 6, "answered 6 numbers"), ([np.inf] + [0.0] * 6, "are no command")])
def test_a_command_beyond_the_limits_is_not_played(row, words):
    robot = loop.FakeRobot(BODY, start=[0, 0, 0.003, 0, 0, 0, 1])
    with pytest.raises(loop.Unsafe, match=words):
        loop.run(robot, lambda *_: [np.array([0.001] + [0] * 6), np.array(row)], "go", loop.Limits(steps=9),
                 patience=NEVER)
    assert len(robot.moved) == 1 and robot.stops == 1


def test_a_pose_beyond_the_limits_is_not_played_and_the_way_back_is_open():
    body, limits = loop.Body(arms=1), loop.Limits()
    before = np.array([[0, 0, 0.3, 0, 0, 0, 1.0, 1]])
    limits.check(body, before, [0.02, 0, 0.3, 0, 0, 0, 2.0, 1])
    for row, words in (([0.1, 0, 0.3, 0, 0, 0, 1, 1], "1.000 m/s"), ([0, 0, 0.3, 1, 0, 0, 0, 1], "rad/s"),
                       ([0, 0, 0.3, 0, 0, 0, 0, 1], "nan rad/s")):
        with pytest.raises(loop.Unsafe, match=words), np.errstate(invalid="ignore"):
            limits.check(body, before, row)
    outside = before.copy()
    outside[0, 2] = 0.9
    limits.check(body, outside, [0, 0, 0.89, 0, 0, 0, 1, 1])
    with pytest.raises(loop.Unsafe, match="out of the box"):
        limits.check(body, outside, [0, 0, 0.91, 0, 0, 0, 1, 1])


def test_errors_of_the_server_and_of_the_robot_stop_it():
    def broken(*_):
        raise loop.Unsafe("the server refused: 422")
    robot = loop.FakeRobot(BODY)
    with pytest.raises(loop.Unsafe, match="422"):
        loop.run(robot, broken, "go", WIDE, patience=NEVER)
    assert robot.stops == 1 and not robot.moved
    robot.observe = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loop.run(robot, Server(), "go", WIDE, patience=NEVER)
    assert robot.stops == 2
    with pytest.raises(ValueError, match="a row takes 0.02 s; allow at least two"):
        loop.run(robot, Server(), "go", WIDE, patience=0.03)
    with pytest.raises(ValueError, match="execute=0, ahead=0, blend=0: at least 1"):
        loop.run(robot, Server(), "go", WIDE, execute=0)
    with pytest.raises(loop.Unsafe, match="no answer from http://127.0.0.1:1"):
        loop.ask_ours("http://127.0.0.1:1")("go", {}, None)
    assert threading.active_count() < 20


# ---- RoboBrain's robots ------------------------------------------------------------------------------------

def test_bodies_agree_with_robobrain_x0():
    for name, r in x0.ROBOTS.items():
        if r.name:
            body = loop.BODIES[name]
            assert (body.arms, body.cameras, body.rotation) == (r.arms, r.cameras, r.rotation)
            assert body.reported == r.reported and body.kind == "pose" and body.execute <= r.horizon


def test_units_of_agilex_and_franka():
    agilex, franka = loop.BODIES["agilex"], loop.BODIES["franka"]
    raw = np.array([300_000, 0, 200_000, 0, 90_000, 0, 5_000.0])
    pose = agilex.report(raw)
    np.testing.assert_allclose(pose, [0.3, 0, 0.2, 0, np.pi / 2, 0, 0.05])
    pose[-1] /= agilex.reported                                # what it reports, as it is told: the same hold
    np.testing.assert_allclose(agilex.command(pose), raw)
    assert [franka.report(np.array([0] * 7 + [width]))[7] for width in (0.8, 0.7)] == [1, 0]
    assert franka.command(np.array([0] * 7 + [0.6]))[7] == 270 and franka.command(np.zeros(8))[7] == 30


@pytest.mark.parametrize("text", [
    "{", "[]", "{}", '{"ros": 3, "cameras": {"cam_front": "/a", "cam_wrist": "/b"}, "arms": [["/s", "/t"]]}',
    '{"ros": 1, "cameras": {"cam_front": "/a", "cam_wrist": 5}, "arms": [["/s", "/t"]]}',
    '{"ros": 1, "cameras": {"cam_front": "/a", "cam_wrist": "/b"}, "arms": [["/s", "/t"], ["/s", "/t"]]}'])
def test_a_wrong_file_of_topics_is_one_line(text, tmp_path):
    (tmp_path / "topics.json").write_text(text)
    with pytest.raises(ValueError, match='"cam_front": topic, "cam_wrist": topic}, "arms": .* per arm .1'):
        loop.read_topics(tmp_path / "topics.json", loop.BODIES["franka"])


@pytest.mark.parametrize("robot", ["agilex", "franka"])
def test_a_ros_robot_reports_moves_and_holds(robot, monkeypatch):
    """With a bus of our own in ROS 1's place: what is read, told, and what is too old."""
    bus, body = {"in": {}, "out": {}}, loop.BODIES[robot]

    class Publisher:
        def __init__(self, topic, kind, queue_size):
            self.topic = topic

        def publish(self, m):
            bus["out"].setdefault(self.topic, []).append(m.data)

    def subscribe(topic, kind, call, queue_size):
        bus["in"][topic] = call

    rospy = types.SimpleNamespace(init_node=lambda *_, **__: None, Publisher=Publisher, Subscriber=subscribe,
                                  signal_shutdown=print)
    message = types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "rospy", rospy)
    for package in ("sensor_msgs", "std_msgs"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, package + ".msg", message(Image="Image", Float64MultiArray=message))

    class Late(threading.Thread):
        def run(self):
            while len(bus["in"]) < len(body.cameras) + body.arms:
                time.sleep(0.01)
            speak()

    def speak():
        row = np.zeros((4, 20), np.uint8)
        row[:, 0] = 200                                        # blue, of bgr8; two bytes of padding
        for topic, call in bus["in"].items():
            image = message(encoding="bgr8", height=4, width=6, step=20, data=row.tobytes())
            numbers = message(data=[1000.0 * i for i in range(7 if robot == "agilex" else 8)])
            call(image if "cam" in topic else numbers)
    topics = {"ros": 1, "cameras": {c: f"/{c}" for c in body.cameras},
              "arms": [[f"/state{i}", f"/tell{i}"] for i in range(body.arms)]}
    Late().start()
    ros = loop.RosRobot(body, topics, max_age=NEVER)
    images, pose = ros.observe()
    assert list(images) == list(body.cameras) and images[body.cameras[0]].shape == (4, 6, 3)
    assert images[body.cameras[0]][0, 0].tolist() == [0, 0, 200]
    assert len(pose) == (14 if robot == "agilex" else 8)
    ros.move(pose)
    ros.stop()
    told, held = bus["out"]["/tell0"]
    np.testing.assert_allclose(told[:6], [1000.0 * i for i in range(6)])
    if robot == "agilex":
        np.testing.assert_allclose(held, [1000.0 * i for i in range(7)])
    ros.max_age = 0.0
    with pytest.raises(loop.Unsafe, match="s old; stopped"):
        ros.observe()


# ---- Against the server ------------------------------------------------------------------------------------

def test_the_loop_plays_what_the_server_answers():
    import cogact
    model = make(cogact)
    with running(model) as call:
        robot = loop.FakeRobot(loop.Body("delta", "rotvec", 1, ("third",), period=0.02, execute=3))
        limits = loop.Limits((-99, 99) * 3, 99, 99, steps=6)
        assert loop.run(robot, loop.ask_ours(call.url), "go", limits, patience=5) == 6
        assert len(robot.moved) == 6 and np.ptp(robot.moved, 0).max() > 0
        with pytest.raises(loop.Unsafe, match="the server refused: 400 .*instruction"):
            loop.run(robot, loop.ask_ours(call.url), " ", WIDE, patience=5)
        flags = "--robot fake --instruction go --steps 4 --patience 5"         # README's command, but shorter
        command = [sys.executable, ROOT / "examples/robot_loop.py", "--url", call.url, *flags.split()]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "4 commands played" in done.stdout, done.stderr
        slow = subprocess.run([*command, "--speed", "1e-9"], capture_output=True, text=True)
        assert slow.returncode == 2 and slow.stderr.startswith("error: a command moves at"), slow.stderr


def test_robobrains_answers_are_played_until_the_task_is_done(monkeypatch, capsys):
    poses = [[0, 0, 0.3, 0, 0, 0, 1, g] for g in np.linspace(0, 1, 30)]
    answers = [{"success": True, "eepose": poses, "subtask": "pick up the cup"},
               {"success": True, "finished": True, "eepose": poses}]
    sent = []

    def post(url, body, *_):
        sent.append((url, body))
        return answers[len(sent) - 1]

    monkeypatch.setattr(loop, "post", post)
    robot = loop.FakeRobot(loop.Body(arms=1, cameras=("cam_front", "cam_wrist"), period=0.01))
    assert loop.run(robot, loop.ask_robobrain("http://x"), "pick up", loop.Limits(), patience=NEVER) == 30
    assert np.array_equal(robot.moved, poses) and "pick up the cup" in capsys.readouterr().out
    (url, body), _ = sent
    assert url == "http://x/infer" and body["eef_pose"] == [0, 0, 0.3, 0, 0, 0, 1, 1]
    pictures = x0.request_images("franka", json.loads(json.dumps(body))["images"])
    assert [p.shape for p in pictures] == [(240, 320, 3)] * 2 and Path(SPEC.origin).is_file()
