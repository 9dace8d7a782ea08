"""
The robot's side of serve.py: observe, ask, play, and ask for the next chunk while this one still plays.

    python serve.py --ckpt runs/cogact-tiny/last                                     # the policy, anywhere
    python examples/robot_loop.py --robot fake --instruction "pick up the red cube"  # a robot of numbers only
    python serve.py --ckpt BAAI/RoboBrain-X0-Preview --wire robobrain --robot agilex --port 5001
    python examples/robot_loop.py --robot agilex --url http://HOST:5001 --topics topics.json \\
        --box -0.6 0.6 -0.6 0.6 0.02 0.8 --instruction "pick up the cup"

A robot is five things: `body` (how it counts), observe() -> (images {view: uint8 (h, w, 3)}, pose),
move(row), stop() (hold still, now), close(). A row is one command: an absolute pose, or what is added to it.

    time      0 1 2 3 4 5 6 7 8 9
    playing   a a a a a a b b b b      chunk b was asked for at 2 and came at 6: its first four rows are past
                  ^ asked ^ answered   and left out, the next may be mixed with what is left of a (--blend)

What stops the robot: a row that leaves the box, is faster than --speed or turns faster than --turn (it is not
played), pictures older than half a second, an error of the server, any exception here, ctrl-c, and the
watchdog: no row was played for --patience seconds, because the server is late or this loop hangs. After that
what was left to play is dropped, and so is a late answer if the robot has moved since it was asked for.

The adapters for RoboBrain-X0's four robots know their units and pauses; the drivers' topics are yours, in a
JSON file: {"ros": 1 or 2, "cameras": {name: Image topic}, "arms": [[state topic, command topic], ...]}, the
right arm first, as std_msgs/Float64MultiArray of the driver's own numbers. No such robot stood here: check
every number at low --speed, the emergency stop in hand. Needs numpy and Pillow, nothing else of this project.
"""
import argparse
import base64
import io
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image


class Unsafe(Exception):
    """The robot was stopped: one line that says why."""


# ---- Bodies: units and conventions -------------------------------------------------------------------------

def same(x):
    """Numbers that are in our units already."""
    return x


def agilex_report(raw):
    """An arm's x y z [1e-6 m], angles [1e-3 degrees], gripper -> m, rad, gripper as reported."""
    return np.concatenate([raw[:3] * 1e-6, np.deg2rad(raw[3:6] * 1e-3), raw[6:] / 1e5])


def agilex_command(row):
    """The inverse, but for the gripper: it reports raw/1e5 and is told |g| * 1e6."""
    return np.concatenate([row[:3] * 1e6, np.rad2deg(row[3:6]) * 1e3, np.abs(row[6:]) * 1e6])


def franka_report(raw):
    """The gripper is 1 (open) when its width is above 0.7."""
    return np.append(raw[:7], float(raw[7] > 0.7))


def franka_command(row):
    """The gripper is told 270 (open) or 30."""
    return np.append(row[:7], 270.0 if row[7] > 0.5 else 30.0)


@dataclass(frozen=True)
class Body:
    """How a robot counts. A row has `arms` times: x y z [m], a rotation, a gripper."""
    kind: str = "pose"                # of a row: pose, absolute; delta: added in the base frame
    rotation: str = "quat"            # x y z w | euler: xyz about fixed axes [rad] | rotvec [rad]
    arms: int = 2                     # right first
    cameras: tuple = ("cam_head", "cam_right_wrist", "cam_left_wrist")
    period: float = 0.1               # seconds per row (official clients)
    execute: int = 30                 # rows played per chunk (official clients)
    report: callable = same           # what an arm's driver says -> a pose (n,)
    command: callable = same          # a pose -> what its driver is told
    reported: float = 1.0             # the gripper that it reports, in units of the one that it is told

    def split(self, row):
        """(arms * n,) -> (arms, n)."""
        return np.asarray(row, np.float64).reshape(self.arms, -1)


# A2D's and R1-Lite's servers turn or scale grippers themselves; R1-Lite's head picture is its right eye, its
# torso is held at -1.0339 2.1635 1.1514 0; Franka starts from 0.305 0 0.481, quaternion 1 0 0 0.
BODIES = {
    "fake": Body("delta", "rotvec", 1, ("third",), period=0.2, execute=4),         # as the tabletop's arm
    "a2d": Body(execute=20),
    "franka": Body(arms=1, cameras=("cam_front", "cam_wrist"), period=0.05, report=franka_report,
                   command=franka_command),
    "agilex": Body(rotation="euler", cameras=("cam_high", "cam_right_wrist", "cam_left_wrist"), period=0.15,
                   report=agilex_report, command=agilex_command, reported=10.0),
    "r1lite": Body(period=0.06)}


def quaternion(body, turn):
    """The rotation part of rows, (arms, 3 or 4) -> quaternions x y z w, of length 1."""
    if body.rotation == "quat":
        return turn / np.linalg.norm(turn, axis=1, keepdims=True)
    if body.rotation == "rotvec":
        angle = np.linalg.norm(turn, axis=1, keepdims=True)
        return np.concatenate([np.sinc(angle / 2 / np.pi) / 2 * turn, np.cos(angle / 2)], 1)
    (a, b, c), (sa, sb, sc) = np.cos(turn.T / 2), np.sin(turn.T / 2)
    return np.stack([sa * b * c - a * sb * sc, a * sb * c + sa * b * sc, a * b * sc - sa * sb * c,
                     a * b * c + sa * sb * sc], 1)


def motion(body, before, row):
    """A row from the pose before, (arms, n) -> positions after (arms, 3), steps [m], turns [rad] (arms,)."""
    row = body.split(row)
    if body.kind == "delta":
        turn = 2 * np.arccos(np.clip(np.abs(quaternion(body, row[:, 3:-1])[:, 3]), 0, 1))
        return before[:, :3] + row[:, :3], np.linalg.norm(row[:, :3], axis=1), turn
    p, q = quaternion(body, before[:, 3:-1]), quaternion(body, row[:, 3:-1])
    turn = 2 * np.arccos(np.clip(np.abs((p * q).sum(1)), 0, 1))
    return row[:, :3], np.linalg.norm(row[:, :3] - before[:, :3], axis=1), turn


def follow(body, before, row):
    """The pose (arms, n) that a row makes of the one before; of deltas, the rotation is not followed."""
    row = body.split(row)
    if body.kind == "pose":
        return row
    return np.concatenate([before[:, :3] + row[:, :3], before[:, 3:-1], row[:, -1:]], 1)


def mix(body, old, new, w):
    """Between two rows: w 0 is the old one, 1 the new. Angles the short way round, quaternions normalized."""
    old, new = body.split(old), body.split(new).copy()
    if body.rotation == "quat":
        new[:, 3:7] *= np.where((old[:, 3:7] * new[:, 3:7]).sum(1, keepdims=True) < 0, -1, 1)
    elif body.rotation == "euler":
        new[:, 3:6] = old[:, 3:6] + (new[:, 3:6] - old[:, 3:6] + np.pi) % (2 * np.pi) - np.pi
    out = (1 - w) * old + w * new
    if body.rotation == "quat":
        out[:, 3:7] /= np.linalg.norm(out[:, 3:7], axis=1, keepdims=True)
    return out.ravel()


# ---- Safety ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Limits:
    """box: x, y, z from, to [m], in the base frame; speed [m/s]; turn [rad/s]; steps: rows in all."""
    box: tuple = (-0.5, 0.5, -0.5, 0.5, 0.0, 0.8)
    speed: float = 0.25
    turn: float = 1.0
    steps: int = 1000

    def check(self, body, before, row):
        """Unsafe unless this row may be played from the pose before, (arms, n)."""
        if np.size(row) != before.size or not np.isfinite(row).all():
            raise Unsafe(f"the server answered {np.size(row)} numbers that are no command of this robot, "
                         f"{before.size} finite ones: {str(row)[:80]}")
        after, steps, turns = motion(body, before, row)
        low, high = np.reshape(self.box, (3, 2)).T
        outside = ((after < low) & (after < before[:, :3])) | ((after > high) & (after > before[:, :3]))
        if outside.any():                                      # the way back into the box is open
            raise Unsafe(f"a command leads to {after.round(3).tolist()} m, out of the box {self.box}.")
        for rate, most, unit in ((steps, self.speed, "m/s"), (turns, self.turn, "rad/s")):
            rate = rate.max() / body.period
            if not rate <= most * (1 + 1e-6):                  # NaN: a quaternion of length 0
                raise Unsafe(f"a command moves at {rate:.3f} {unit}, at most {most} is allowed. Is the "
                             "server for another robot, or in other units?")


NUMBERS = Limits((-9, 9) * 3, speed=9, turn=9, steps=40)       # of the fake robot, which cannot hurt anyone


class Watchdog:
    """Stops the robot when it was not fed for `patience` seconds, whatever the loop does then."""

    def __init__(self, stop, patience):
        self.stop, self.patience, self.fired, self.done = stop, patience, False, threading.Event()
        self.fed = time.monotonic()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def feed(self):
        """All is well: count anew."""
        self.fed, self.fired = time.monotonic(), False

    def watch(self):
        """Its thread: looks five times per `patience`, stops the robot once until it is fed again."""
        while not self.done.wait(self.patience / 5):
            if not self.fired and time.monotonic() - self.fed > self.patience:
                self.fired = True
                self.stop()

    def close(self):
        """End the thread."""
        self.done.set()
        self.thread.join()


# ---- The server --------------------------------------------------------------------------------------------

def encode(image):
    """uint8 (h, w, 3) -> base64 of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def post(url, body, timeout, token=None):
    """JSON there and back, within so many seconds; Unsafe if the server refuses or does not answer."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        return json.load(urllib.request.urlopen(request, timeout=timeout))
    except urllib.error.HTTPError as e:
        raise Unsafe(f"the server refused: {e.code} {e.read().decode('utf-8', 'replace')[:300]}") from e
    except (OSError, ValueError) as e:
        raise Unsafe(f"no answer from {url}: {e}") from e


def ask_ours(url, timeout=10, token=None):
    """The chunk (T, A) of POST /v1/act."""
    def ask(instruction, images, pose):
        images = {view: encode(image) for view, image in images.items()}
        body = {"instruction": instruction, "images": images, "mode": "chunk"}
        return np.array(post(f"{url}/v1/act", body, timeout, token)["actions"])
    return ask


def ask_robobrain(url, timeout=100, token=None):
    """The 30 poses of RoboBrain-X0's POST /infer; none when it says that the task is done."""
    def ask(instruction, images, pose):
        images = {camera: encode(image) for camera, image in images.items()}
        body = {"instruction": instruction, "images": images, "eef_pose": np.ravel(pose).tolist()}
        answer = post(f"{url}/infer", body, timeout, token)
        print(answer.get("subtask", ""), flush=True)
        return np.array([] if answer.get("finished") else answer["eepose"])
    return ask


# ---- The loop ----------------------------------------------------------------------------------------------

def hand_over(body, old, new, late, blend):
    """Rows still to play, and a chunk whose first `late` rows are of the past -> the rows to play. The first
    `blend` of them turn from the old into the new ones."""
    new = list(new[late:])
    for i, row in enumerate(old[:blend]):
        if i < len(new):
            new[i] = mix(body, row, new[i], (i + 1) / (min(blend, len(old)) + 1))
    return new


def run(robot, ask, instruction, limits, execute=None, ahead=0, blend=0, patience=0.5):
    """Play until limits.steps rows are played or the server says that it is done; returns how many.

    ask: (instruction, images, pose) -> rows (T, A); ahead: rows left when the next chunk is asked for (0:
    none, as RoboBrain's clients do). Whatever goes wrong is raised after the robot was stopped.
    """
    body, rows, played, answer = robot.body, [], 0, None
    execute = body.execute if execute is None else execute
    if execute < 1 or ahead < 0 or blend < 0:
        raise ValueError(f"execute={execute}, ahead={ahead}, blend={blend}: at least 1, 0 and 0 rows.")
    if not patience >= 2 * body.period:
        raise ValueError(f"patience={patience} s: a row takes {body.period} s; allow at least two.")
    dog = Watchdog(robot.stop, patience)
    with ThreadPoolExecutor(1) as pool:
        try:
            while played < limits.steps:
                rows = [] if dog.fired else rows
                if answer is None and len(rows) <= ahead:
                    images, pose = robot.observe()
                    if not rows:
                        before = body.split(pose)
                    answer, asked_at = pool.submit(ask, instruction, images, pose), played
                if answer is not None and (answer.done() or not rows):
                    chunk, late, answer = answer.result(), played - asked_at, None     # the dog watches
                    if dog.fired and late:                     # it was made for where the robot no longer is
                        continue
                    if not len(chunk):
                        break
                    dog.feed()
                    rows = hand_over(body, rows, chunk[:late + execute], late, blend) or rows
                if dog.fired or not rows:                      # stopped while this looked, or all was past
                    continue
                tick, row = time.monotonic(), rows.pop(0)
                limits.check(body, before, row)
                robot.move(row)
                dog.feed()
                before, played = follow(body, before, row), played + 1
                time.sleep(max(0.0, body.period - (time.monotonic() - tick)))
        finally:
            dog.close()
            robot.stop()
    return played


# ---- Robots ------------------------------------------------------------------------------------------------

class FakeRobot:
    """An arm of numbers: it goes where it is told. For tests, and to try a server."""

    def __init__(self, body=BODIES["fake"], start=None, image_size=96):
        turn = {"quat": [0, 0, 0, 1]}.get(body.rotation, [0, 0, 0])
        self.body, self.size, self.moved, self.stops = body, image_size, [], 0
        self.pose = np.array(([0.0, 0, 0.3, *turn, 1] * body.arms) if start is None else start, np.float64)

    def observe(self):
        """The pictures are as bright as rows were played; the pose is the last command's."""
        picture = np.full((self.size, self.size, 3), len(self.moved) % 256, np.uint8)
        return dict.fromkeys(self.body.cameras, picture), self.pose.copy()

    def move(self, row):
        """It is there at once."""
        self.pose = follow(self.body, self.body.split(self.pose), row).ravel()
        self.moved.append(np.array(row))

    def stop(self):
        """It stands anyway; counted."""
        self.stops += 1

    def close(self):
        """Nothing to close."""


def read_topics(path, body):
    """The JSON file of --topics; a ValueError says what it must hold."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        topics = json.loads(text)
        names = [topics["cameras"][name] for name in body.cameras]
        names += [topic for state, command in topics["arms"] for topic in (state, command)]
        whole = topics["ros"] in (1, 2) and len(topics["arms"]) == body.arms
        if whole and all(isinstance(name, str) for name in names):
            return topics
    except (ValueError, TypeError, KeyError):                  # no JSON, or of another form
        pass
    cameras = ", ".join(f'"{name}": topic' for name in body.cameras)
    raise ValueError(f'--topics {path} must hold {{"ros": 1 or 2, "cameras": {{{cameras}}}, "arms": [[state '
                     f'topic, command topic], ...]}}, one pair per arm ({body.arms}).')


class RosRobot:
    """One of BODIES behind ROS 1 (rospy) or 2 (rclpy); topics: see the top."""

    def __init__(self, body, topics, max_age=0.5):
        self.body, self.max_age, self.seen = body, max_age, {}             # name: (when, value)
        connect = {1: self.ros1, 2: self.ros2}[topics["ros"]]
        arms = topics["arms"]
        self.tell = connect({**{name: ("image", topics["cameras"][name]) for name in body.cameras},
                             **{f"arm {i}": ("numbers", state) for i, (state, _) in enumerate(arms)}},
                            [command for _, command in arms])
        until = time.monotonic() + 10
        while len(self.seen) < len(body.cameras) + body.arms:
            if time.monotonic() > until:
                missing = {*body.cameras, *(f"arm {i}" for i in range(body.arms))} - set(self.seen)
                raise Unsafe(f"nothing came from {sorted(missing)} in 10 s; look at the topics.")
            time.sleep(0.05)

    def keep(self, name, kind):
        """The callback of a topic: the newest message counts."""
        def image(m):
            order = {"rgb8": slice(None), "bgr8": slice(None, None, -1)}[m.encoding]
            rows = np.frombuffer(bytes(m.data), np.uint8).reshape(m.height, m.step)[:, :3 * m.width]
            return rows.reshape(m.height, m.width, 3)[..., order]

        def received(m):
            value = image(m) if kind == "image" else np.array(m.data, np.float64)
            self.seen[name] = time.monotonic(), value
        return received

    def ros1(self, inputs, outputs):
        """Listen to inputs {name: (kind, topic)} -> tell(i, numbers), which writes to outputs[i]."""
        import rospy
        from sensor_msgs.msg import Image as RosImage
        from std_msgs.msg import Float64MultiArray as Numbers
        rospy.init_node("plainvla", disable_signals=True)
        for name, (kind, topic) in inputs.items():
            message = RosImage if kind == "image" else Numbers
            rospy.Subscriber(topic, message, self.keep(name, kind), queue_size=1)
        out = [rospy.Publisher(topic, Numbers, queue_size=1) for topic in outputs]
        self.close = lambda: rospy.signal_shutdown("done")
        return lambda i, values: out[i].publish(Numbers(data=values))

    def ros2(self, inputs, outputs):
        """As ros1."""
        import rclpy
        from rclpy.qos import qos_profile_sensor_data as newest
        from sensor_msgs.msg import Image as RosImage
        from std_msgs.msg import Float64MultiArray as Numbers
        rclpy.init()
        node = rclpy.create_node("plainvla")
        for name, (kind, topic) in inputs.items():
            message = RosImage if kind == "image" else Numbers
            node.create_subscription(message, topic, self.keep(name, kind), newest)
        out = [node.create_publisher(Numbers, topic, 1) for topic in outputs]
        threading.Thread(target=rclpy.spin, args=(node,), daemon=True).start()
        self.close = rclpy.shutdown
        return lambda i, values: out[i].publish(Numbers(data=values))

    def pose(self):
        """What the arms reported last: one pose each, in m and rad (Body.report)."""
        return [self.body.report(self.seen[f"arm {i}"][1]) for i in range(self.body.arms)]

    def observe(self):
        """The newest of everything; Unsafe if one is older than max_age [s]."""
        oldest = min(self.seen, key=lambda name: self.seen[name][0])
        age = time.monotonic() - self.seen[oldest][0]
        if age > self.max_age:
            raise Unsafe(f"{oldest} is {age:.1f} s old; stopped.")
        return {camera: self.seen[camera][1] for camera in self.body.cameras}, np.concatenate(self.pose())

    def move(self, row):
        """Tell each arm its pose, in its own units (Body.command)."""
        for i, pose in enumerate(self.body.split(row)):
            self.tell(i, self.body.command(pose).tolist())

    def stop(self):
        """Tell it to be where it is."""
        for i, pose in enumerate(self.pose()):
            pose[-1] /= self.body.reported
            self.tell(i, self.body.command(pose).tolist())


def main():
    """The script; returns 2 after an error, when the robot stands."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--robot", choices=BODIES, default="fake")
    p.add_argument("--instruction", required=True)
    p.add_argument("--url", default="http://127.0.0.1:8000")
    p.add_argument("--token", help="of serve.py --token")
    p.add_argument("--topics", help="JSON file; see above")
    p.add_argument("--execute", type=int, help="rows played per chunk; default: the official client's")
    p.add_argument("--ahead", type=int, default=0, help="rows left when the next chunk is asked for")
    p.add_argument("--blend", type=int, default=0, help="rows in which the old chunk turns into the new one")
    p.add_argument("--patience", type=float, default=0.5, help="seconds until the robot is stopped")
    p.add_argument("--box", type=float, nargs=6, help=f"x, y, z from, to [m]; default {Limits.box}")
    p.add_argument("--speed", type=float, help=f"m/s; default {Limits.speed}")
    p.add_argument("--turn", type=float, help=f"rad/s; default {Limits.turn}")
    p.add_argument("--steps", type=int, help=f"rows in all; default {Limits.steps}, fake: {NUMBERS.steps}")
    a = p.parse_args()
    if a.robot != "fake" and not a.topics:
        p.error(f"--robot {a.robot} needs --topics FILE")
    asked = {name: value for name, value in vars(a).items() if name in vars(NUMBERS) and value is not None}
    robot, limits = None, replace(NUMBERS if a.robot == "fake" else Limits(), **asked)
    try:
        if a.robot == "fake":
            robot, ask = FakeRobot(), ask_ours(a.url, token=a.token)
        else:
            topics = read_topics(a.topics, BODIES[a.robot])
            robot, ask = RosRobot(BODIES[a.robot], topics), ask_robobrain(a.url, token=a.token)
        played = run(robot, ask, a.instruction, limits, a.execute, a.ahead, a.blend, a.patience)
        print(f"{played} commands played")
    except (Unsafe, ValueError, OSError, ImportError) as e:
        ros = "; source the setup.bash of your ROS in this shell first" if isinstance(e, ImportError) else ""
        print(f"error: {e}{ros}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped")
    finally:
        if robot:
            robot.close()


if __name__ == "__main__":
    sys.exit(main())
