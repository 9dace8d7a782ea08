r"""
Closed-loop evaluation: in a tabletop in numpy, no physics engine, or in other people's simulators.

    python eval_sim.py --ckpt runs/cogact-tiny/last                # success per task, intervals, GIF, JSON
    python eval_sim.py --ckpt runs/cogact-tiny/last --families all --episodes 300
    python eval_sim.py --ckpt runs/cogact-tiny/last --control all  # also what must fail: see --help
    python eval_sim.py --replay tabletop                           # recorded actions: the first thing to try
    python eval_sim.py --control expert --body dual --families two # two arms; two goals in one instruction
    python eval_sim.py --sim metaworld --check                     # what is missing, how to install it
    python eval_sim.py --sim metaworld --expert --split train --record DIR  # for train.py --data lerobot=DIR
    python eval_sim.py --sim metaworld --tasks mt50 --ckpt runs/mine/last --workers 4
    python eval_sim.py --sim libero --tasks libero_goal --ckpt runs/a/last runs/b/last     # one table of both

The tabletop, in one picture (metres; a right-handed frame whose origin lies on the table):

        x, away from the robot = up in the picture
        ^      +--------------------+     third-person camera: behind and above the robot, looking along +x
        |      |  o    []     /\    |     wrist camera: on the gripper, looking down between the fingers
    y <-+      |     (plate)        |     "left" is +y: the left side of the third-person picture;
   left        +--------------------+     turning left is turning counter-clockwise, seen from above

Action, 7 numbers at CONTROL_HZ: dx dy dz [m] in the table's frame, droll dpitch dyaw [rad] added to the
gripper's angles, gripper 1 = open, 0 = closed (threshold 0.5).
State, 8 numbers: x y z [m] of the point between the finger tips, roll pitch yaw [rad] (Rz(yaw) Ry(pitch)
Rx(roll)), the two fingers' distances from the middle [m] (0 = closed).
The body "dual" has two arms, and twice these numbers: first the right arm's (its side is y < 0), then the
left arm's. The arm on whose side X lies as its goal begins does the work, the other one waits.
Contact is kinematic: fingers push what they touch sideways, close around what is between them, and what they
let go drops onto what is below. Everything follows from the seed.

Sections: solids and pictures, the world, the expert, episodes, Meta-World, other benchmarks (LIBERO,
SimplerEnv, ManiSkill 3, CALVIN), evaluation, command line.
"""
import atexit
import gc
import hashlib
import importlib
import json
import math
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from ctypes.util import find_library
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from itertools import groupby, islice, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

VERSION = 2                      # of data made with the simulator: 2 has other sub-task sentences than 1
DRAWS = 1                        # of its scenes; a changed pixel or action raises both
CONTROL_HZ = 5
STATE_DIM = 8
FAMILIES = ("pick", "put", "push", "stack", "turn", "side")
DEFAULT_FAMILIES = ("pick", "put", "push")
PAIRS = ("two",)                 # families of two goals, told in one instruction
VIEWS = ("third", "wrist", "left_wrist")    # "wrist" is the right one of two arms, which alone have the last


# ---- Solids and pictures: rays against convex solids, exact perspective, flat shading ---------------------

COLOURS = {"red": (214, 40, 40), "green": (44, 160, 60), "blue": (40, 84, 214), "yellow": (240, 208, 40),
           "purple": (150, 60, 190), "orange": (242, 130, 28)}
NEUTRAL = {"plate": (236, 236, 230), "box": (96, 72, 52)}
TABLE, FLOOR = (176, 160, 140), (70, 76, 84)
# Steel and fingers of the only or right arm, and of the left one.
ARM_COLOURS = (((128, 132, 138), (28, 28, 32)), ((64, 124, 132), (16, 74, 82)))
LIGHT = np.array([0.25, 0.30, 1.0]) / np.linalg.norm([0.25, 0.30, 1.0])     # towards the lamp
AMBIENT = 0.5


class Solid(NamedTuple):
    """A convex solid around its own origin: {p : normals @ p <= offsets}, or a ball when `radius` > 0."""
    normals: np.ndarray          # (P, 3) unit, outward
    offsets: np.ndarray          # (P,) [m]
    vertices: np.ndarray         # (M, 3) corners [m] (of a ball: of its bounding cube)
    radius: float = 0.0          # [m]


def cuboid(sx, sy, sz):
    """A box with edges sx, sy, sz [m]."""
    half = np.array([sx, sy, sz]) / 2
    signs = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)])
    return Solid(np.vstack([np.eye(3), -np.eye(3)]), np.concatenate([half, half]), signs * half)


def frustum(sides, bottom, top, height):
    """A right frustum: a prism (bottom = top), a pyramid (top = 0) or, with many sides, a cylinder.

    bottom, top: distances of the side faces from the axis, at the lower and the upper face [m]; height [m].
    """
    angle = np.arange(sides) * 2 * np.pi / sides
    slope = np.stack([np.cos(angle) * height, np.sin(angle) * height, np.full(sides, bottom - top)], 1)
    slope /= np.linalg.norm(slope, axis=1, keepdims=True)               # (sides, 3) outward
    at = np.stack([np.cos(angle) * bottom, np.sin(angle) * bottom, np.full(sides, -height / 2)], 1)
    normals = np.vstack([slope, [[0, 0, 1], [0, 0, -1]]])               # (sides + 2, 3)
    offsets = np.concatenate([(slope * at).sum(1), [height / 2, height / 2]])
    corner = angle + np.pi / sides
    ring = np.stack([np.cos(corner), np.sin(corner)], 1) / np.cos(np.pi / sides)
    ends = ((bottom, -height / 2), (top, height / 2))
    vertices = np.vstack([np.c_[ring * r, np.full(sides, z)] for r, z in ends])
    return Solid(normals, offsets, vertices)


def ball(radius):
    """A ball of this radius [m]."""
    return cuboid(2 * radius, 2 * radius, 2 * radius)._replace(radius=radius)


def rotation(roll, pitch, yaw):
    """R = Rz(yaw) Ry(pitch) Rx(roll), (3, 3); angles in [rad]."""
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    return np.array([[cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
                     [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
                     [-sp, cp * sr, cp * cr]])


class Camera:
    """A pinhole camera: `eye` (3,) [m], `axes` (3, 3) whose rows are right, down, forward in the world, `fov`
    [rad] from top to bottom. Pictures are h x w pixels, pixel centres at half-integers."""

    def __init__(self, eye, axes, fov):
        self.eye, self.axes, self.fov = np.asarray(eye, float), axes, fov

    @classmethod
    def look_at(cls, eye, target, fov, up=(0.0, 0.0, 1.0)):
        """A camera at `eye` (3,) [m] that sees `target` (3,) [m] in the middle of its picture."""
        forward = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
        right = np.cross(forward, up) / np.linalg.norm(np.cross(forward, up))
        return cls(eye, np.stack([right, np.cross(forward, right), forward]), fov)

    def focal(self, h):
        """The focal length [pixels] of a picture of height h."""
        return h / 2 / math.tan(self.fov / 2)

    def intrinsics(self, h, w):
        """K, (3, 3) [pixels]: camera coordinates to homogeneous pixel coordinates."""
        f = self.focal(h)
        return np.array([[f, 0, w / 2], [0, f, h / 2], [0, 0, 1.0]])

    def extrinsics(self):
        """World to camera [m], (4, 4): x right, y down, z forward."""
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = self.axes, -self.axes @ self.eye
        return pose

    def rays(self, h, w):
        """One direction per pixel, (h, w, 3), of forward component 1: a distance along it is a depth."""
        f = self.focal(h)
        u, v = np.meshgrid((np.arange(w) + 0.5 - w / 2) / f, (np.arange(h) + 0.5 - h / 2) / f)
        return u[..., None] * self.axes[0] + v[..., None] * self.axes[1] + self.axes[2]

    def project(self, points, h, w):
        """World points (..., 3) [m] -> pixel coordinates x, y (..., 2); sensible only in front of the camera.

        h = 1, w = width / height gives y in [0, 1] and x in [0, w].
        """
        p = (np.asarray(points) - self.eye) @ self.axes.T               # (..., 3) in the camera's frame
        z = np.maximum(p[..., 2:], 1e-6)
        return p[..., :2] / z * self.focal(h) + np.array([w / 2, h / 2])


def _hit(solid, pose, at, origin, dirs):
    """Where rays enter a solid with rotation `pose` (3, 3) at `at` (3,).

    origin: (3,) or (n, 3), dirs: (n, 3). Returns distances (n,) in units of dirs (inf = miss), shades (n,) in
    [0, 1] (of a miss: meaningless).
    """
    o, d = (origin - at) @ pose, dirs @ pose                            # local; o is (3,) or (n, 3)
    if solid.radius:
        a, b, c = (d * d).sum(-1), (d * o).sum(-1), (o * o).sum(-1) - solid.radius ** 2
        root = b * b - a * c
        enter = (-b - np.sqrt(np.maximum(root, 0))) / a
        light = (o + enter[:, None] * d) @ (LIGHT @ pose) / solid.radius
        shade = AMBIENT + (1 - AMBIENT) * np.maximum(light, 0)
        return np.where((root > 0) & (enter > 1e-6), enter, np.inf), shade
    speed = d @ solid.normals.T                                         # (n, P), < 0: a face entered
    t = (solid.offsets - o @ solid.normals.T) / np.where(speed == 0, 1e-12, speed)
    inwards = np.where(speed < 0, t, -np.inf)
    face = inwards.argmax(1)                                            # (n,): the last one entered
    enter = inwards[np.arange(len(face)), face]
    leave = np.where(speed > 0, t, np.inf).min(1)
    shade = AMBIENT + (1 - AMBIENT) * np.maximum(solid.normals @ (LIGHT @ pose), 0)         # (P,)
    return np.where((enter < leave) & (enter > 1e-6), enter, np.inf), shade[face]


def _window(pixels, h, w):
    """The slices (rows, columns) of the picture that hold these pixels (M, 2), with a pixel of margin."""
    (x0, y0), (x1, y1) = np.floor(pixels.min(0)).astype(int) - 1, np.ceil(pixels.max(0)).astype(int) + 1
    return slice(max(y0, 0), max(min(y1, h), 0)), slice(max(x0, 0), max(min(x1, w), 0))


def render(parts, camera, h, w):
    """Draw solids on the table.

    parts: list of (owner, Solid, rotation (3, 3), position (3,) [m], colour). Returns rgb uint8 (h, w, 3),
    depth float32 (h, w) [m along the optical axis; 1000 above the horizon] and owner int16 (h, w): -1 the
    table, -2 beyond its edge, else the part's.
    """
    rays, eye = camera.rays(h, w), camera.eye
    down = rays[..., 2]
    depth = np.where(down < -1e-6, -eye[2] / np.minimum(down, -1e-6), 1e3)  # of the plane z = 0
    ground = eye + depth[..., None] * rays                              # (h, w, 3)
    on_table = (np.abs(ground[..., 0]) < 0.26) & (np.abs(ground[..., 1]) < 0.28) & (depth < 1e3)
    colour = np.where(on_table[..., None], TABLE, FLOOR).astype(float)  # (h, w, 3)
    owner = np.where(on_table, -1, -2).astype(np.int16)
    for _, solid, pose, at, _ in parts:                                 # first the shadows on the table
        corners = solid.vertices @ pose.T + at
        rows, cols = _window(camera.project(corners - corners[:, 2:] / LIGHT[2] * LIGHT, h, w), h, w)
        points = ground[rows, cols].reshape(-1, 3)
        if len(points):
            dark = np.isfinite(_hit(solid, pose, at, points, np.broadcast_to(LIGHT, points.shape))[0])
            window = colour[rows, cols]
            window[dark.reshape(window.shape[:2]) & (owner[rows, cols] == -1)] = np.multiply(TABLE, 0.6)
    for who, solid, pose, at, paint in parts:
        corners = solid.vertices @ pose.T + at
        if ((corners - eye) @ camera.axes[2]).min() < 0.005:            # behind the lens: look everywhere
            rows, cols = slice(0, h), slice(0, w)
        else:
            rows, cols = _window(camera.project(corners, h, w), h, w)
        dirs = rays[rows, cols]
        if dirs.size == 0:
            continue
        t, shade = _hit(solid, pose, at, eye, dirs.reshape(-1, 3))      # (n,), (n,)
        near = (t < depth[rows, cols].reshape(-1)).reshape(dirs.shape[:2])
        depth[rows, cols][near] = t.reshape(near.shape)[near]
        colour[rows, cols][near] = shade.reshape(near.shape)[near][:, None] * np.array(paint, float)
        owner[rows, cols][near] = who
    return np.rint(np.clip(colour, 0, 255)).astype(np.uint8), depth.astype(np.float32), owner


# ---- The world: objects, the gripper, kinematic contact, tasks --------------------------------------------

class Shape(NamedTuple):
    """What the contact rules need to know of a shape, lengths in [m]."""
    solid: Solid
    height: float
    radius: float                # of the circle that stands for it when pushed
    width: float                 # between the fingers when held
    flat: bool                   # its top carries another object


SHAPES = {
    "cube": Shape(cuboid(0.050, 0.050, 0.050), 0.050, 0.027, 0.050, True),
    "cylinder": Shape(frustum(12, 0.025, 0.025, 0.060), 0.060, 0.025, 0.050, True),
    "ball": Shape(ball(0.027), 0.054, 0.027, 0.054, False),
    "pyramid": Shape(frustum(4, 0.031, 0.002, 0.056), 0.056, 0.029, 0.036, False),
    "bar": Shape(cuboid(0.100, 0.030, 0.034), 0.034, 0.028, 0.030, False),
}
PLATE = (frustum(16, 0.058, 0.064, 0.010), 0.010)                     # solid, height of its upper face [m]
BOX_IN, BOX_WALL, BOX_FLOOR = 0.120, 0.028, 0.008                     # inner edge, height of walls, floor [m]
BOX_PARTS = [(cuboid(BOX_IN, BOX_IN, BOX_FLOOR), (0, 0, BOX_FLOOR / 2))] + [
    (cuboid(*((0.008, BOX_IN + 0.016) if i else (BOX_IN + 0.016, 0.008)), BOX_WALL),
     (i * (BOX_IN / 2 + 0.004), j * (BOX_IN / 2 + 0.004), BOX_WALL / 2))
    for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))]                   # floor and four walls: (solid, centre)
CONTAINERS = {"plate": 0.066, "box": 0.072}                           # radius kept free around it [m]
FINGER_SOLID, PALM_SOLID = cuboid(0.020, 0.014, 0.064), cuboid(0.032, 0.112, 0.024)
STEM_SOLID = cuboid(0.026, 0.026, 0.114)
REACH = np.array([[-0.18, -0.20, 0.012], [0.18, 0.20, 0.26]])         # of the point between finger tips [m]
FIELD = np.array([[-0.15, -0.17], [0.15, 0.17]])                      # where objects start [m]
MAX_GAP, FINGER_SPEED, FINGER_RADIUS = 0.084, 0.042, 0.009            # [m], [m per step], [m]
MAX_DELTA, MAX_TURN = 0.05, 0.35                                      # an action is clipped to it [m], [rad]
THIRD = dict(eye=(-0.30, 0.0, 0.50), target=(0.022, 0.0, 0.035), fov=0.76)                # [m], [m], [rad]
STEPS = {"pick": 40, "put": 60, "push": 50, "stack": 60, "turn": 50, "side": 60}          # limit per episode

# Phrasings. The last of each family is held out: the split "hard" uses only that one, and no other split it.
PHRASES = {
    "pick": ("pick up the {x}", "lift the {x}", "grab the {x}", "take the {x} off the table"),
    "put": ("put the {x} {on} the {y}", "place the {x} {on} the {y}", "move the {x} {on}to the {y}",
            "set the {x} down {on} the {y}"),
    "push": ("push the {x} to the {side}", "slide the {x} to the {side}", "push the {x} {side}",
             "shove the {x} to the {side}"),
    "stack": ("stack the {x} on the {y}", "put the {x} on top of the {y}", "place the {x} on top of the {y}",
              "pile the {x} on the {y}"),
    "turn": ("turn the {x} {side}", "rotate the {x} {side}", "spin the {x} {side}", "twist the {x} {side}"),
    "side": ("put the {side} {x} {on} the {y}", "place the {side} {x} {on} the {y}",
             "move the {side} {x} {on}to the {y}", "set the {side} {x} down {on} the {y}"),
}
# The split "hard" asks for these, which no other split (and no distractor of any) ever shows.
HELD_OUT = (("red", "ball"), ("green", "bar"), ("blue", "pyramid"), ("purple", "cube"),
            ("orange", "cylinder"))
SPLITS = ("train", "val", "eval", "pretrain", "hard")                 # disjoint: a million seeds each
OTHER = {"left": "right", "right": "left", "": ""}


def seeds(split, n, start=0, splits=SPLITS):
    """`n` seeds of a split, from its `start`-th on; seeds of two splits never meet."""
    if split not in splits:
        raise ValueError(f"split={split!r}: there are {', '.join(splits)}.")
    if not 0 <= start <= start + n <= 1_000_000:
        raise ValueError(f"{n} seeds from {start} on: a split has 1,000,000, numbered from 0.")
    base = splits.index(split) * 1_000_000
    return list(range(base + start, base + start + n))


class Thing:
    """One object or container: colour, shape (a container's is its name), position of its base, yaw [rad]."""

    def __init__(self, colour, shape, xy, yaw):
        self.colour, self.shape, self.yaw = colour, shape, yaw
        self.at = np.array([xy[0], xy[1], 0.0])                       # centre of its lower face [m]
        self.movable = shape in SHAPES

    @property
    def name(self):
        """Its name in an instruction."""
        return f"{self.colour} {self.shape}" if self.movable else self.shape

    @property
    def radius(self):
        """Radius [m] of the circle that stands for it on the table."""
        return SHAPES[self.shape].radius if self.movable else CONTAINERS[self.shape]

    @property
    def top(self):
        """Height [m] of its upper face (of a container: of the face that carries)."""
        height = {"plate": PLATE[1], "box": BOX_FLOOR}.get(self.shape)
        return self.at[2] + (SHAPES[self.shape].height if self.movable else height)

    def carries(self, at):
        """Is the point `at` (3,) [m], whatever its height, above the part of this thing that carries?"""
        off = np.abs(rotation(0, 0, self.yaw).T[:2, :2] @ (at - self.at)[:2])
        if self.shape == "box":
            return off.max() < BOX_IN / 2
        return np.hypot(*off) < (0.062 if self.shape == "plate" else 0.024)


class Goal(NamedTuple):
    """One thing to reach: what becomes of X, with regard to Y or to a side."""
    family: str
    x: Thing
    y: Thing | None
    side: str                    # left, right or ""
    phrase: str

    def words(self, x=None, side=None):
        """The goal as an instruction; x, side: another Thing or side in place of its own."""
        y = self.y.name if self.y else ""
        return self.phrase.format(x=(x or self.x).name, y=y, side=side or self.side,
                                  on="in" if y == "box" else "on")


class Arm:
    """tcp (3,) [m], the point between the finger tips; rpy (3,) [rad]; gap [m] between the fingers; held:
    None or (Thing, its place (3,) [m] and yaw [rad] in the gripper's frame)."""

    def __init__(self, tcp, yaw):
        self.tcp, self.rpy, self.gap, self.held = tcp, np.array([0.0, 0.0, yaw]), MAX_GAP, None


def _settle(env, who, image_size, **asked):
    """Set an environment's attributes, each a name or several out of those known; else one ValueError."""
    for what, (names, known) in asked.items():
        names = names if isinstance(names, str) else tuple(names)
        if wrong := [name for name in ((names,) if isinstance(names, str) else names) if name not in known]:
            raise ValueError(f"{what} {', '.join(map(repr, wrong))}: {who} knows {', '.join(known)}.")
        setattr(env, what, names)
    if not env.families:
        raise ValueError(f"no task family was given; name at least one of {', '.join(asked['families'][1])}.")
    env.h, env.w = (image_size, image_size) if np.isscalar(image_size) else image_size
    if min(env.h, env.w) < 1:
        raise ValueError(f"image_size={image_size}: a picture has at least one pixel.")


def _of_arm(name):
    """An attribute of the working arm, as one of the environment."""
    return property(lambda env: getattr(env.arms[env.arm], name),
                    lambda env, value: setattr(env.arms[env.arm], name, value))


# A body: how many numbers an action of it has; where each arm's tcp starts: lowest, highest (3,) [m]; its
# action as (arms, 7). (The gantry is for the tests: nothing else assumes multiples of seven.)
START = ((*REACH[0, :2] * 0.85, 0.12), (*REACH[1, :2] * 0.85, 0.19))
EMBODIMENTS = {
    "gripper": (7, [START], lambda a: a[None]),                       # dx dy dz droll dpitch dyaw gripper
    "gantry": (4, [START], lambda a: np.array([[*a[:3], 0, 0, 0, a[3]]])),                # dx dy dz gripper
    "dual": (14, [((0.0, -0.17, 0.13), (0.09, -0.08, 0.17)), ((0.0, 0.08, 0.13), (0.09, 0.17, 0.17))],
             lambda a: a.reshape(2, 7)),                              # waiting, they hide little
}
BODIES = ("gripper", "dual")     # those that the expert drives


class Tabletop:
    """The environment, with Gymnasium's reset and step.

    families: which tasks may come; split: which colour-shape pairs, phrasings and camera ("hard": held-out
    ones); views: cameras to render, of VIEWS; image_size: height = width in pixels, or (h, w);
    embodiment: a key of EMBODIMENTS. ValueError for unknown names.

    After `reset`: things (list of Thing); the task: family, instruction, goals (list of Goal), reached: their
    numbers in the order in which they came true; now: the number of the first that is not true, and its x, y
    (Things; y may be None), side; arms (list of Arm), arm: the number of the one that works on this goal,
    whose attributes are the environment's, too; count: steps played.
    """
    tcp, rpy, gap, held = map(_of_arm, ("tcp", "rpy", "gap", "held"))
    suite, fps, film_every, film_ms = "tabletop", CONTROL_HZ, 1, 1000 // CONTROL_HZ
    SETS, default, BATCH = {"all": FAMILIES, "default": DEFAULT_FAMILIES}, "default", 64
    rest = (0, 0.004)            # when all things lie still; by how much [m] one has moved that was touched

    def __init__(self, families=DEFAULT_FAMILIES, split="train", views=("third",), image_size=64,
                 embodiment="gripper"):
        arms = len(EMBODIMENTS[embodiment][1]) if embodiment in EMBODIMENTS else 1
        _settle(self, "the tabletop", image_size, families=(families, FAMILIES + PAIRS),
                split=(split, SPLITS), views=(views, VIEWS[:1 + arms]), embodiment=(embodiment, EMBODIMENTS))
        self.action_dim, self.starts, self.to_sevens = EMBODIMENTS[embodiment]
        self.rng = np.random.default_rng()

    # -- Gymnasium's two verbs, each also without a picture
    def reset(self, seed=None, options=None):
        """Lay out the scene of this seed. Returns (observation, info).

        seed: one of `seeds(split, ...)`; None: the next one at random, of this split. options["family"] fixes
        the family of the task.
        """
        self.lay_out(seed, options)
        return self.observe(), self.info()

    def lay_out(self, seed=None, options=None):
        """`reset` without a picture."""
        family = (options or {}).get("family")
        if family not in (None, *FAMILIES, *PAIRS):
            raise ValueError(f"options: family {family!r}; the tabletop knows {', '.join(FAMILIES + PAIRS)}.")
        seed = seeds(self.split, 1, int(self.rng.integers(1_000_000)))[0] if seed is None else int(seed)
        self.seed, self.rng = seed, np.random.default_rng([DRAWS, seed])
        self.family = family or self.families[self.rng.integers(len(self.families))]
        # of two goals, "put" comes first: that it is done can be seen in any later picture
        plan = ["put", DEFAULT_FAMILIES[self.rng.integers(3)]] if self.family == "two" else [self.family]
        self.max_steps = sum(STEPS[part] for part in plan)
        while not self._draw_scene(plan):                             # one in eight does not fit; for "push",
            pass                                                      # which needs room, three in four
        self.instruction = ", then ".join(goal.words() for goal in self.goals)
        self.arms = [Arm(self.rng.uniform(*box), self.rng.uniform(-0.15, 0.15)) for box in self.starts]
        self.count, self.start = 0, {id(t): (t.at.copy(), t.yaw) for t in self.things}
        self.move = np.zeros(2)                                       # of the last quarter step [m]
        self.reached = []
        self._face(0)
        shift = 0.2 if self.split == "hard" else 0.0                  # held-out camera: 0.2 rad to the side
        eye = rotation(0, 0, shift) @ np.array(THIRD["eye"])
        self.third = Camera.look_at(eye, THIRD["target"], THIRD["fov"])

    def _face(self, number):
        """Turn to a goal of this number, with the arm on whose side its X lies."""
        self.now, (_, self.x, self.y, self.side, _) = number, self.goals[number]
        self.arm = int(len(self.arms) > 1 and self.x.at[1] > 0)
        self.lifted = False                                           # was X carried? (pushing is not that)

    def step(self, action):
        """Play one action (action_dim,). Returns (observation, reward, terminated, truncated, info).

        reward is 1.0 in the step that succeeds, which terminates; the step limit truncates.
        """
        self.advance(action)
        done = self.success()
        return self.observe(), float(done), done, self.count >= self.max_steps and not done, self.info()

    def advance(self, action):
        """`step` without a picture: move, push, grasp, drop. Motion beyond MAX_DELTA, MAX_TURN is clipped."""
        action = np.asarray(action, float)
        if action.shape != (self.action_dim,) or not np.isfinite(action).all():
            found = f"shape {action.shape}" if action.shape != (self.action_dim,) else action.tolist()
            raise ValueError(f"an action of {found}: this body takes {self.action_dim} finite numbers.")
        actions = self.to_sevens(action)                              # (arms, 7)
        before, working, self.count = [arm.tcp for arm in self.arms], self.arm, self.count + 1
        for arm, turn in zip(self.arms, np.clip(actions[:, 3:6], -MAX_TURN, MAX_TURN)):
            arm.rpy = np.clip(arm.rpy + turn, [-0.5, -0.5, -1.7], [0.5, 0.5, 1.7])       # the wrist's limits
        for part in range(1, 5):                                      # quarter steps: nothing is jumped over
            for self.arm, delta in enumerate(np.clip(actions[:, :3], -MAX_DELTA, MAX_DELTA)):
                last = self.tcp[:2]
                self.tcp = np.clip(before[self.arm] + delta * part / 4, *REACH)
                self.move = self.tcp[:2] - last
                self._carry()
                self._push()
        for self.arm, opening in enumerate(actions[:, 6] > 0.5):
            self._fingers(opening)
        self.arm = working
        done = [self._holds(goal) for goal in self.goals]
        self.reached += [i for i, yes in enumerate(done) if yes and i not in self.reached]
        now = (done + [False]).index(False)
        if now not in (self.now, len(done)):                          # all done: it still faces the last one
            self._face(now)

    def observe(self):
        """The observation: images {view: uint8 (h, w, 3)}, state (8,) float32 per arm (top of file),
        instruction, embodiment.

        For methods that act in 3-D also {view: ...}: depth float32 (h, w) [m along the optical axis],
        intrinsics (3, 3) [pixels], extrinsics (4, 4): world to camera [m], x right, y down, z forward.
        """
        state = np.array([x for a in self.arms for x in (*a.tcp, *a.rpy, a.gap / 2, a.gap / 2)], np.float32)
        pictures = {v: self.picture(v) for v in self.views}
        cameras = {v: self.camera(v) for v in self.views}
        return {"images": {v: rgb for v, (rgb, _, _) in pictures.items()},
                "depth": {v: depth for v, (_, depth, _) in pictures.items()},
                "intrinsics": {v: c.intrinsics(self.h, self.w) for v, c in cameras.items()},
                "extrinsics": {v: c.extrinsics() for v, c in cameras.items()},
                "state": state, **self.told()}

    def told(self):
        """What an observation says in words: instruction, embodiment."""
        return {"instruction": self.instruction, "embodiment": self.embodiment}

    def info(self):
        """success, family, body, names of all things, of X and of Y ("": none), side, steps played."""
        return {"success": self.success(), "family": self.family, "embodiment": self.embodiment,
                "objects": [t.name for t in self.things], "x": self.x.name,
                "y": self.y.name if self.y else "", "side": self.side, "steps": self.count}

    # -- the scene
    def _draw_scene(self, plan):
        """Draw objects, containers and the goals, of these families; False when they do not fit."""
        rng, hard = self.rng, self.split == "hard"
        pairs = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT]
        picked = [pairs[i] for i in rng.permutation(len(pairs))[:rng.integers(3, 5)]]     # X, distractors
        targets = {"turn": ["bar"], "side": [s for s in SHAPES if s != "bar"]}.get(self.family, list(SHAPES))
        pool = [p for p in (HELD_OUT if hard else pairs) if p[1] in targets]
        picked[0] = pool[rng.integers(len(pool))]
        if self.family == "stack":                                    # Y: something with a flat top
            flat = [p for p in pairs if SHAPES[p[1]].flat]
            picked[1] = flat[rng.integers(len(flat))]
        if len(set(picked)) < len(picked):
            return False
        if self.family == "side":                                     # X's twin
            picked = [picked[0]] + picked[:3]
        both = rng.random() < 0.25 or plan == ["put", "put"]
        bins = ["plate", "box"] if both else [("plate", "box")[rng.integers(2)]]
        self.things, self.goals = [], []
        for colour, shape in picked + [("", b) for b in bins]:
            radius = SHAPES[shape].radius if shape in SHAPES else CONTAINERS[shape]
            for _ in range(60):
                xy = rng.uniform(*FIELD)
                if all(np.hypot(*(xy - t.at[:2])) > radius + t.radius + 0.022 for t in self.things):
                    break
            else:
                return False
            yaw = rng.uniform(-0.3, 0.3) if shape in ("bar", "box") else rng.uniform(-np.pi, np.pi)
            self.things.append(Thing(colour, shape, xy, yaw))
        return all(self._draw_goal(family, thing) for family, thing in zip(plan, self.things))

    def _draw_goal(self, family, x):
        """Choose Y, the side and the words for X (or its twin); False when the scene does not fit."""
        rng, y, side = self.rng, None, ""
        bins = [t for t in self.things if not t.movable and all(t is not goal.y for goal in self.goals)]
        if family in ("put", "side"):
            y = bins[rng.integers(len(bins))]
        if family == "stack":
            y = self.things[1]
        if family == "push":
            side = ("left", "right")[rng.integers(2)]
            if not self._corridor(x, side):
                return False
        if family == "turn":
            side = ("left", "right")[rng.integers(2)]
        if family == "side":
            first, second = self.things[:2]
            if abs(first.at[1] - second.at[1]) < 0.06:                # which is the left one must be visible
                return False
            side = ("left", "right")[rng.integers(2)]
            x = max(first, second, key=lambda t: t.at[1] * (1 if side == "left" else -1))
        if len(self.starts) > 1 and abs(x.at[1]) < 0.02:              # and on which arm's side X lies
            return False
        phrases = PHRASES[family]
        phrase = phrases[-1] if self.split == "hard" else phrases[rng.integers(len(phrases) - 1)]
        self.goals.append(Goal(family, x, y, side, phrase))
        return True

    def _corridor(self, x, side):
        """Is there room to come from the other side and push x by 12 cm?"""
        s = 1 if side == "left" else -1
        if x.at[1] * s + 0.12 > 0.20 or x.at[1] * s - 0.075 < -0.20:
            return False
        return all(t is x or abs(t.at[0] - x.at[0]) > t.radius + x.radius + 0.005
                   or not -0.085 < (t.at[1] - x.at[1]) * s < 0.13 + t.radius + x.radius for t in self.things)

    def swap(self):
        """A control: change the instruction, not the task. It names another object of the scene instead of X.

        In the families "turn" (only bars are turned) and "side" (equal objects) it names the other side. Of
        two goals, the first is changed.
        """
        goal, *rest = self.goals
        others = [t for t in self.things if t.movable and t.name != goal.x.name and t is not goal.y
                  and all(t is not later.x for later in rest)]
        words = (goal.words(side=OTHER[goal.side]) if goal.family in ("turn", "side") else
                 goal.words(others[self.seed % len(others)]))
        self.instruction = ", then ".join([words, *(later.words() for later in rest)])

    # -- contact
    def _carry(self):
        """What is held moves with the gripper, and turns about the vertical with it; it stays upright."""
        if self.held is not None:
            thing, offset, yaw = self.held
            turn = rotation(0, 0, self.rpy[2])
            thing.at, thing.yaw = self.tcp + turn @ offset, self.rpy[2] + yaw
            self.lifted |= thing is self.x and thing.at[2] > 0.02

    def _tools(self):
        """Circles that push: (centre (2,), radius, lowest z) [m] of both fingers and of what they hold."""
        axis = np.array([-np.sin(self.rpy[2]), np.cos(self.rpy[2])])  # fingers open along the gripper's y
        reach = self.gap / 2 + 0.007
        tools = [(self.tcp[:2] + s * reach * axis, FINGER_RADIUS, self.tcp[2] - 0.010) for s in (-1, 1)]
        if self.held is not None:
            tools.append((self.held[0].at[:2], self.held[0].radius, self.held[0].at[2]))
        return tools

    def _push(self):
        """Objects give way to fingers, to what is held and to each other; containers stay."""
        free = [t for t in self.things if t.movable and not self._in_hand(t)]
        moved = []
        for thing in free:
            for centre, radius, low in self._tools():
                away = thing.at[:2] - centre
                overlap = thing.radius + radius - np.hypot(*away)
                # the tool's lower end is between the thing's base and its top; near the table it may also be
                # a little below the base (of something in the box)
                reached = thing.at[2] <= low + 1e-9 + (0.02 if low < 0.02 else 0) and low < thing.top - 0.004
                if overlap > 0 and reached:
                    # what is pushed goes where the tool goes (friction), else straight away from it
                    along, speed = away @ self.move, np.hypot(*self.move)
                    if speed > 1e-4 and along > 0.3 * speed * np.hypot(*away):
                        far = np.sqrt((along / speed) ** 2 + (thing.radius + radius) ** 2 - away @ away)
                        thing.at[:2] += self.move / speed * (far - along / speed)
                    else:
                        thing.at[:2] += away / max(np.hypot(*away), 1e-6) * overlap
                    moved.append(thing)
        for thing in moved:                                           # one round of object against object
            for other in free:
                away = other.at[:2] - thing.at[:2]
                overlap = thing.radius + other.radius - np.hypot(*away)
                if other is not thing and overlap > 0 and abs(other.at[2] - thing.at[2]) < 0.01:
                    other.at[:2] += away / max(np.hypot(*away), 1e-6) * overlap
        for thing in moved:
            thing.at[:2] = np.clip(thing.at[:2], [-0.24, -0.26], [0.24, 0.26])           # not over the edge
            thing.at[2] = self._support(thing)

    def _fingers(self, opening):
        """Open or close the fingers by one step; grasp what is between them, let go of what is held."""
        if opening:
            self.gap = min(self.gap + FINGER_SPEED, MAX_GAP)
            if self.held is not None:
                thing, self.held = self.held[0], None
                thing.at[2] = self._support(thing)
            return
        if self.held is not None:
            return
        turn = rotation(0, 0, self.rpy[2])
        for thing in self.things:
            if not thing.movable or self._in_hand(thing):
                continue
            local = (thing.at - self.tcp) @ turn                      # in the gripper's frame
            between = abs(local[1]) < self.gap / 2 and abs(local[0]) < 0.034
            level = thing.at[2] - 0.004 <= self.tcp[2] <= thing.top + 0.006   # the tips reach 1 cm below
            if between and level and not self._covered(thing):
                width = SHAPES[thing.shape].width
                self.gap = max(self.gap - FINGER_SPEED, width)
                local[1] = np.clip(local[1], (width - self.gap) / 2, (self.gap - width) / 2)  # centred
                thing.at = self.tcp + turn @ local
                if self.gap <= width + 1e-9:
                    self.held = (thing, local, thing.yaw - self.rpy[2])
                    self._carry()
                return
        self.gap = max(self.gap - FINGER_SPEED, 0.0)

    def _in_hand(self, thing):
        return any(arm.held is not None and arm.held[0] is thing for arm in self.arms)

    def _covered(self, thing):
        """Does another object lie on this one?"""
        return any(t is not thing and t.movable and t.at[2] > thing.at[2] + 0.01
                   and np.hypot(*(t.at - thing.at)[:2]) < 0.03 for t in self.things)

    def _support(self, thing):
        """Height [m] of what lies below the centre of `thing`."""
        below = 0.0
        for t in self.things:
            if t is thing or self._in_hand(t) or t.top > thing.at[2] + 0.02:
                continue
            if (not t.movable or SHAPES[t.shape].flat) and t.carries(thing.at):
                below = max(below, t.top)
        return below

    def success(self):
        """Is the task's predicate true of the present state? (Of two goals: both, reached in this order.)

        pick: X is held, 5 cm above the table. All others want X released: push: 6 cm further to the side, not
        lifted, less than 5 cm off the line; turn: by 0.7 rad, on the table; put, stack, side: it lies on Y.
        """
        return self.reached == sorted(self.reached) and all(self._holds(goal) for goal in self.goals)

    def _holds(self, goal):
        family, x, y, side, _ = goal
        held, (x0, yaw0), s = self._in_hand(x), self.start[id(x)], 1 if side == "left" else -1
        if family == "pick":
            return bool(held and x.at[2] > 0.05)
        if held:
            return False
        if family == "push":
            moved = x.at - x0
            return bool(moved[1] * s > 0.06 and abs(moved[0]) < 0.05 and not self.lifted)
        if family == "turn":
            turned = (x.yaw - yaw0 + np.pi) % (2 * np.pi) - np.pi
            return bool(turned * s > 0.7 and x.at[2] < 0.01)
        return bool(abs(x.at[2] - y.top) < 0.004 and y.carries(x.at))

    # -- pictures
    def camera(self, view):
        """The Camera of a view ("third", "wrist", or two arms' "left_wrist"), as it stands now."""
        if view not in (known := VIEWS[:1 + len(self.starts)]):
            raise ValueError(f"view {view!r}: the tabletop knows {', '.join(known)}.")
        if view == "third":
            return self.third
        arm = self.arms[view == "left_wrist"]
        turn = rotation(*arm.rpy)
        eye, target = (arm.tcp + turn @ np.array(at) for at in ([-0.085, 0.0, 0.050], [-0.004, 0.0, -0.030]))
        return Camera.look_at(eye, target, 1.3, up=turn @ np.array([1.0, 0, 0.2]))

    def parts(self):
        """What there is to draw, for `render`; owner = index into self.things, 100 + i = the i-th arm."""
        parts = []
        for i, t in enumerate(self.things):
            turn = rotation(0, 0, t.yaw)
            if t.movable:
                shape = SHAPES[t.shape]
                parts.append((i, shape.solid, turn, t.at + [0, 0, shape.height / 2], COLOURS[t.colour]))
            elif t.shape == "plate":
                parts.append((i, PLATE[0], turn, t.at + [0, 0, PLATE[1] / 2], NEUTRAL["plate"]))
            else:
                parts += [(i, solid, turn, t.at + turn @ np.array(at), NEUTRAL["box"])
                          for solid, at in BOX_PARTS]
        for i, (arm, (steel, finger)) in enumerate(zip(self.arms, ARM_COLOURS)):
            turn = rotation(*arm.rpy)
            for solid, at, colour in ((FINGER_SOLID, (0, arm.gap / 2 + 0.007, 0.022), finger),
                                      (FINGER_SOLID, (0, -arm.gap / 2 - 0.007, 0.022), finger),
                                      (PALM_SOLID, (0, 0, 0.066), steel), (STEM_SOLID, (0, 0, 0.135), steel)):
                parts.append((100 + i, solid, turn, arm.tcp + turn @ np.array(at), colour))
        return parts

    def picture(self, view, h=None, w=None):
        """rgb uint8 (h, w, 3), depth float32 (h, w) [m], owner int16 (h, w) of one view, as from `render`."""
        return render(self.parts(), self.camera(view), h or self.h, w or self.w)

    # -- what else an evaluation asks of a simulator
    @staticmethod
    def jobs(families, episodes, split, start=0):
        """[(seed, family), ...] of the episodes from the split's `start`-th on; the families take turns."""
        return [(s, families[i % len(families)]) for i, s in enumerate(seeds(split, episodes, start))]

    @staticmethod
    def _ready():
        """Nothing else is to be imported."""

    def expert(self):
        """See `expert`."""
        return expert(self)

    def random_action(self, rng):
        """An action (action_dim,) by chance, per arm within what one step may do."""
        most = np.array([MAX_DELTA] * 3 + [MAX_TURN] * 3)
        return np.concatenate([np.append(rng.uniform(-most, most), rng.random() < 0.5) for _ in self.arms])

    def track(self):
        """Of A0's waypoints: (number of the present goal, the point (3,) whose path they are, of X)."""
        middle = self.x.at + [0, 0, SHAPES[self.x.shape].height / 2]
        return self.now, middle, middle

    def close(self):
        """Nothing is held."""


# ---- The expert: one action from the present state, no memory; what a policy must learn to see ------------

HOVER = 0.105                    # fingers pass above everything on the table [m]


def _toward(env, xy, z, gripper, yaw=0.0, speed=0.04):
    """The action (7,) that moves the gripper towards a pose, at most `speed` [m] and 0.3 [rad] per step."""
    flat = np.asarray(xy, float) - env.tcp[:2]
    flat *= min(1.0, speed / max(np.hypot(*flat), 1e-9))
    tilt = np.clip([-env.rpy[0], -env.rpy[1], yaw - env.rpy[2]], -0.3, 0.3)
    return np.array([*flat, np.clip(z - env.tcp[2], -speed, speed), *tilt, float(gripper)])


def _grasp(env, x):
    """Come down over x and close."""
    if env.held is not None:                                          # something else is in the hand
        return _toward(env, env.tcp[:2], env.tcp[2] + 0.04, 1)
    off = np.hypot(*(x.at[:2] - env.tcp[:2]))
    grasp_z = max(x.at[2] + SHAPES[x.shape].height * 0.45, REACH[0, 2] + 0.006)
    closing = env.gap < MAX_GAP - 1e-6
    if off < 0.013 and abs(env.tcp[2] - grasp_z) < 0.012:
        return _toward(env, x.at[:2], grasp_z, 0)
    if (off > 0.03 or closing) and env.tcp[2] < x.top + 0.022:        # too low to get there: rise
        return _toward(env, env.tcp[:2], HOVER, 1)
    z = grasp_z + np.clip((off - 0.012) * 3.5, 0, HOVER - grasp_z)    # a funnel: lower the closer
    return _toward(env, x.at[:2], z, 1)


def _release(env, x, y):
    """Carry x over y and let go."""
    off = np.hypot(*(y.at[:2] - x.at[:2]))
    others = [goal.x.top for goal in env.goals if goal.x is not x]    # of another goal: to be left alone
    rim = max([{"box": BOX_WALL}.get(y.shape, y.top), *others])
    goal = env.tcp[:2] + (y.at[:2] - x.at[:2])
    low = y.top + 0.006 + env.tcp[2] - x.at[2]                        # gripper's z with x just above y
    if off > 0.012:
        high = rim + 0.03 + env.tcp[2] - x.at[2]
        if env.tcp[2] < high - 0.02:
            return _toward(env, env.tcp[:2], high + 0.01, 0)
        z = max(high - 0.015, env.tcp[2] - 0.03) if off < 0.04 else high
        return _toward(env, goal, z, 0)
    if env.tcp[2] > low + 0.008:
        return _toward(env, goal, low, 0)
    return _toward(env, env.tcp[:2], low, 1)


def _shove(env, x, side):
    """Come down beside x with closed fingers, push it to `side` for as long as it takes."""
    s = 1.0 if side == "left" else -1.0
    if env.held is not None:
        return _toward(env, env.tcp[:2], env.tcp[2] + 0.02, 1)
    along, across = (env.tcp[1] - x.at[1]) * s, env.tcp[0] - x.at[0]
    behind = x.at[:2] - np.array([0, s * (x.radius + 0.034)])
    in_line = -(x.radius + 0.075) < along < -(x.radius + 0.008) and abs(across) < 0.016
    if in_line and env.tcp[2] < 0.034:
        goal = [x.at[0], env.tcp[1] + s * 0.035]
        return _toward(env, goal, 0.020, 0)
    off = np.hypot(*(behind - env.tcp[:2]))
    if off > 0.02 and env.tcp[2] < x.top + 0.022:
        return _toward(env, env.tcp[:2], HOVER, 0)
    z = 0.020 + np.clip((off - 0.014) * 3.5, 0, HOVER - 0.020)
    return _toward(env, behind, z, 0)


def _spin(env, x, side):
    """Grasp x, turn the hand by 75 degrees (its yaw starts near zero), let go."""
    if env.held is None or env.held[0] is not x:
        return _grasp(env, x)
    yaw = 1.3 if side == "left" else -1.3
    if abs(env.rpy[2] - yaw) > 0.12:
        return _toward(env, env.tcp[:2], env.tcp[2], 0, yaw)
    return _toward(env, env.tcp[:2], env.tcp[2], 1, yaw)


def _work(env):
    """What the working arm does for the present goal: its action (7,)."""
    family, x, y, side, _ = env.goals[env.now]
    held = env.held is not None and env.held[0] is x
    if env.success():                                                 # afterwards: move away, or hold it up
        if family == "pick":
            return _toward(env, env.tcp[:2], min(env.tcp[2] + 0.02, 0.20), 0)
        return _toward(env, env.tcp[:2], HOVER + 0.03, family != "push", env.rpy[2])
    for done in (goal.x for goal in env.goals[:env.now]):             # fingers are still around it: leave it
        if np.hypot(*(done.at - env.tcp)[:2]) < 0.03 and env.tcp[2] < done.top + 0.03 and env.held is None:
            return _toward(env, env.tcp[:2], HOVER, 1)
    if family == "pick":
        return _toward(env, env.tcp[:2], 0.16, 0) if held else _grasp(env, x)
    if family == "push":
        return _shove(env, x, side)
    if family == "turn":
        return _spin(env, x, side)
    return _release(env, x, y) if held else _grasp(env, x)


def subtask(env):
    """The sub-task at the present state, in words: what is to be reached next, the way there included.

    Of two goals it is the present one itself, and "" when both are reached.
    """
    goal = env.goals[env.now]
    if len(env.goals) > 1:
        return "" if env.success() else goal.words()
    if goal.y is None or env.success() or env.held is not None and env.held[0] is goal.x:
        return goal._replace(phrase=PHRASES[goal.family][0]).words()
    return f"pick up the {goal.x.name}"


def expert(env):
    """The scripted expert: (action float64, (7,) per arm; `subtask`) for the present state of `env`."""
    action = _work(env)
    # an arm without work stays where it is, open; after work it rises first
    waiting = [np.array([0, 0, np.clip(HOVER - arm.tcp[2], 0, 0.04), 0, 0, 0, 1.0]) for arm in env.arms]
    return np.concatenate(waiting[:env.arm] + [action] + waiting[env.arm + 1:]), subtask(env)


# ---- Episodes of the expert, with mistakes to recover from ------------------------------------------------

AFTER = 3                        # steps recorded after success, so that the end of the task is not cut short
BUMP = 0.06                      # chance per step that something pushes the arm, for two steps


def disturb(env, rng):
    """Start in the middle: low, closed, or with something in the hand; in 40 % of cases change nothing."""
    kind = rng.random()
    if kind < 0.25:                                                   # anywhere, also low
        env.tcp = rng.uniform([*REACH[0, :2], 0.015], [*REACH[1, :2], 0.12])
        env.gap = rng.choice([0.0, MAX_GAP / 2, MAX_GAP])
        env._push()
    elif kind < 0.45:                                                 # near X
        env.tcp = np.array([*(env.x.at[:2] + rng.normal(0, 0.03, 2)), rng.uniform(0.03, 0.10)])
        env.gap = rng.choice([0.0, MAX_GAP])
    elif kind < 0.60:                                                 # holding X, or another object
        movable = [t for t in env.things if t.movable and all(t is not goal.x for goal in env.goals[1:])]
        thing = env.x if rng.random() < 0.7 else movable[rng.integers(len(movable))]
        env.tcp = np.array([*thing.at[:2], thing.at[2] + SHAPES[thing.shape].height * 0.45])
        env.gap = SHAPES[thing.shape].width
        place = np.array([*rng.normal(0, 0.006, 1), 0.0, thing.at[2] - env.tcp[2]])
        env.held = (thing, place, thing.yaw - env.rpy[2])
        env.tcp = np.array([*rng.uniform(*REACH[:, :2] * 0.9), rng.uniform(0.05, 0.2)])
        if env.family == "push" and thing is env.x:                   # carried: it could not succeed any more
            env.held, thing.at = None, env.start[id(thing)][0].copy()
        env._carry()
    env.tcp = np.clip(env.tcp, *REACH)


def record_episode(seed, families=DEFAULT_FAMILIES, split="train", views=("third",), image_size=64,
                   clean=False, embodiment="gripper"):
    """One episode of the expert, recoveries included (`clean`: none), as arrays of N frames.

    The arguments are those of Tabletop and its `reset`. Returns a dict:
    images      {view: uint8 (N, h, w, 3)}
    state       float32 (N, 8)        per arm, as the next two
    actions     float32 (N, 7)        what the expert would do at each frame
    executed    float32 (N, 7)        what was done; it differs where the arm was bumped
    subtasks    N strings             what is to be reached next, see `subtask`
    waypoints   float32 (N, 5, 2)     x right, y down, [0, 1] of the third-person picture (beyond: outside):
                                      X's middle at contact (or now, if that is past) and four later points of
                                      its path, equally spaced in time, the last as its goal is reached
    instruction, family, success, seed, embodiment
    """
    env = Tabletop(families, split, views, image_size, embodiment)
    env.lay_out(seed)
    rng = np.random.default_rng([DRAWS, seed, 1])
    if not clean:
        disturb(env, rng)
    frames, states, actions, executed, subtasks, path = {v: [] for v in views}, [], [], [], [], []
    left, bump = AFTER, 0
    while left and env.count < env.max_steps * 2:                     # a recovery may take longer
        seen = env.observe()
        action, words = expert(env)
        done = action.copy()
        bump, own = bump - 1 if bump else 2 * (not clean and rng.random() < BUMP), done[7 * env.arm:]
        if bump:                                                      # a push; one in ten: the gripper too
            own[:3] += rng.normal(0, 0.02, 3)
            own[6] = 1 - own[6] if rng.random() < 0.1 else own[6]
        for v in views:
            frames[v].append(seen["images"][v])
        states.append(seen["state"])
        actions.append(action)
        executed.append(done)
        subtasks.append(words)
        path.append(env.track())
        env.advance(done)
        left -= bool(env.success() or left < AFTER)
    return {"images": {v: np.stack(frames[v]) for v in views}, "state": np.array(states, np.float32),
            "actions": np.array(actions, np.float32), "executed": np.array(executed, np.float32),
            "instruction": env.instruction, "family": env.family, "subtasks": subtasks,
            "waypoints": waypoints_of(env, path), "success": env.success(), "seed": seed,
            "embodiment": embodiment}


def waypoints_of(env, path):
    """A0's waypoints at each of N steps: (N, 5, 2) float32, in [0, 1] of the third-person picture.

    path: env.track() at each step. The contact, where the goal's X begins to move, and four later points.
    """
    points, aspect = [], env.w / env.h
    for _, part in groupby(path, lambda step: step[0]):
        _, at, x = zip(*part)
        n, (first, least) = len(at), env.rest
        moved = np.linalg.norm(np.subtract(x, x[min(first, n - 1)]), axis=1)[first:] > least
        contact = first + int(moved.argmax()) if moved.any() else n - 1
        points += [np.array(at)[np.linspace(max(t, contact), n - 1, 5).round().astype(int)] for t in range(n)]
    return (env.camera("third").project(points, 1, aspect) / [aspect, 1]).astype(np.float32)


def recordings(source, families=DEFAULT_FAMILIES, split="eval", episodes=200, embodiment="gripper"):
    """(families, split, episode) of up to `episodes` recordings; episode: seed, executed, state, embodiment;
    of a set of --record also sim.

    source: "tabletop" (the expert, recorded now), or the folder of a set that data.py or --record made.
    """
    if source == "tabletop":
        record = partial(record_episode, families=families, split=split, views=(), embodiment=embodiment)
        return ((families, split, record(seed)) for seed in seeds(split, episodes))
    from data import Episodes, form_of                                # not above: data.py needs this file
    if form_of(Path(source)) == "lerobot":
        return _taped(Path(source), episodes)
    made = Episodes(source)
    about = made.made_from
    if about["simulator"] != VERSION:
        raise ValueError(f"{source} was recorded in version {about['simulator']} of the simulator, this is "
                         f"version {VERSION}: make the set again (python data.py --make).")
    chosen = range(min(episodes, len(made.episodes)))
    return ((about["families"], about["split"], {**made.recording(i), "embodiment": made.embodiment})
            for i in chosen)


def _taped(folder, episodes):
    from common import read_json
    from data import _layout, _optional
    pq, about = _optional("pyarrow.parquet", folder), folder / "meta" / "recording.json"
    made_from = read_json(about).get("made_from") if about.is_file() else None
    if not isinstance(made_from, dict) or str(made_from.get("suite")) not in SIMS:
        raise ValueError(f"{folder}: eval_sim.py --record did not write it, so there are no seeds to lay its "
                         "scenes out again.")
    columns = ["family", "seed", "action", "observation.state"]
    files = sorted((folder / "data").rglob("*.parquet"))
    if len(files) != (whole := read_json(folder / "meta" / "info.json").get("total_episodes")):
        raise ValueError(f"{folder}/data holds {len(files)} of {whole} episodes. Copy the folder again.")

    def read(path):                                                   # an episode
        with _layout(path, "a recording of --record"):
            table = pq.read_table(path, columns=columns)
            return [np.array(table[name].to_pylist()) for name in columns]
    parts = map(read, files)
    for (family, seed), played in islice(groupby(parts, lambda part: (part[0][0], part[1][0])), episodes):
        _, _, actions, states = map(np.concatenate, zip(*played))     # told one instruction after the other
        with _layout(about, "a recording of --record"):
            found = (made_from["families"][family],), made_from["split"], {
                "seed": int(seed), "executed": actions, "state": states, "sim": made_from["suite"],
                "embodiment": made_from["embodiment"],
                "settings": {k: x for k, x in made_from.get("settings", {}).items() if k in LAID_OUT_BY}}
        yield found


def replay(recorded):
    """Play what was executed in a fresh world, and compare: actions, units and states are what they seem.

    recorded: as from `recordings`. Returns (a dict per episode: task, seed, success; the largest difference
    between a recorded state and the one met now, [m] or [rad]). No episode at all is a ValueError.
    """
    rows, worst = [], 0.0
    for families, split, episode in recorded:
        env = SIMS[episode.get("sim", "tabletop")](families, split, (), embodiment=episode["embodiment"],
                                                   **episode.get("settings", {}))
        env.lay_out(episode["seed"])
        if "sim" not in episode:
            disturb(env, np.random.default_rng([DRAWS, episode["seed"], 1]))
        for action, state in zip(episode["executed"], episode["state"]):
            worst = float(np.maximum(worst, np.abs(env.observe()["state"] - state).max()))     # NaN counts
            env.advance(action)
        rows.append({"task": env.family, "seed": env.seed, "success": env.success()})
        env.close()
    if not rows:
        raise ValueError("--replay: the recording holds no episode; record some first.")
    return rows, worst


# ---- Meta-World: 50 tasks of a Sawyer arm, in MuJoCo; optional (pip install -e ".[metaworld]") -------------
# Action, 4 numbers at 80 Hz, clipped to [-1, 1]: dx dy dz [cm], the gripper's effort (-1 opens, 1 closes).
# State, 4 numbers: x y z [m] of the hand, the gripper's opening [0 closed .. 1 open]. The hand never turns.
# Success: the task's own flag, in any of 500 steps; it ends the episode. Views: "third" is the camera
# corner4, whose picture is upside down, turned by 180 degrees (equal to corner2 moved, which others use);
# "wrist" is gripperPOV. Spheres in the picture mark goals. Meta-World has no instructions: these are ours.

METAWORLD = {
    "reach": "move the hand to the goal", "push": "push the puck to the goal",
    "pick-place": "pick up the puck and move it to the goal",
    "door-open": "take the handle and open the door",
    "drawer-open": "slide the drawer open", "drawer-close": "push the drawer shut",
    "button-press-topdown": "push the button down", "peg-insert-side": "put the peg into the hole",
    "window-open": "slide the window open", "window-close": "slide the window shut",
    "assembly": "put the ring on the peg", "basketball": "put the ball into the basket",
    "bin-picking": "move the block to the other bin", "box-close": "put the lid on the box",
    "button-press-topdown-wall": "push the button down, over the wall", "button-press": "push the button",
    "button-press-wall": "push the button, around the wall", "coffee-button": "push the button of the coffee "
    "machine", "coffee-pull": "move the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine", "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg", "door-close": "push the door shut",
    "door-lock": "turn the lock to lock the door", "door-unlock": "turn the lock to unlock the door",
    "hand-insert": "put the hand into the hole", "faucet-open": "turn the faucet on",
    "faucet-close": "turn the faucet off", "hammer": "take the hammer and hit the nail",
    "handle-press-side": "push the handle down from the side", "handle-press": "push the handle down",
    "handle-pull-side": "lift the handle from the side", "handle-pull": "lift the handle",
    "lever-pull": "lift the lever",
    "pick-place-wall": "pick up the puck and move it over the wall to the goal",
    "pick-out-of-hole": "pick up the puck from the hole", "plate-slide": "slide the plate into the goal",
    "plate-slide-side": "slide the plate to the side into the goal",
    "plate-slide-back": "slide the plate back out of the goal",
    "plate-slide-back-side": "slide the plate to the side out of the goal",
    "peg-unplug-side": "take the peg out of the hole", "soccer": "push the ball into the goal",
    "stick-push": "take the stick and push the box with it",
    "stick-pull": "take the stick and pull the box with it",
    "push-wall": "push the puck around the wall to the goal", "push-back": "push the puck back to the goal",
    "reach-wall": "move the hand over the wall to the goal", "shelf-place": "put the block on the shelf",
    "sweep-into": "push the block into the hole", "sweep": "push the block off the table",
}
MT10 = tuple(METAWORLD)[:10]     # the benchmarks' names: mt10, mt50
CAMERAS = {"third": "corner4", "wrist": "gripperPOV"}
GL = {"egl": "EGL", "osmesa": "OSMesa"}          # MUJOCO_GL: the library it needs; their pictures are equal


def _choose_gl():
    if platform.system() == "Linux" and "MUJOCO_GL" not in os.environ:     # read at the first import, once
        os.environ.update({"MUJOCO_GL": gl for gl, name in reversed(GL.items()) if find_library(name)})


def import_metaworld():
    """The modules (metaworld, mujoco). ValueError: they, or what they draw with, cannot be imported."""
    _choose_gl()
    try:
        import metaworld.policies
        import mujoco
    except (ImportError, AttributeError, RuntimeError) as e:               # the last two: no such GL
        modules, _, libraries = PARTS["metaworld"]
        gl = os.environ.get("MUJOCO_GL")
        gl = f", and for MUJOCO_GL={gl}: {libraries}" if gl else ""
        raise ValueError(f"Meta-World cannot be imported ({e}): {modules['metaworld']}{gl}.") from e
    return metaworld, mujoco


class MetaWorld:
    """A task of Meta-World, with the verbs of `Tabletop`, and its arguments.

    embodiment: "sawyer", or "arm": the same one for a method that gives an arm's motion (a0). Its actions are
    7 at 8 Hz, dx dy dz [m], three angles that nothing heeds, gripper 1 = open; its state is 8, as the
    tabletop's, of the point between the fingers; depth is seen. fast_render: no shadows, no smooth edges.
    gripper: "openvla" if actions end as data.py's gripper=openvla makes them, 1 = open, 0 = closed.
    """
    suite, film_ms, kept = "metaworld", 100, {}
    SETS, default, BATCH = {"mt10": MT10, "mt50": tuple(METAWORLD)}, "mt10", 10
    SPLITS, SUBSTEPS, count_of = ("eval", "train", "val"), 10, staticmethod(lambda family: 10)
    max_steps, goals, reached = 500, (), ()
    rest = (1, 0.010)            # before the first step, Meta-World tells some things' place wrongly
    _ready = staticmethod(lambda: import_metaworld())

    def __init__(self, families=MT10, split="eval", views=("third",), image_size=224, embodiment="sawyer",
                 fast_render=False, gripper=""):
        _settle(self, "Meta-World", image_size, families=(families, METAWORLD), split=(split, self.SPLITS),
                views=(views, CAMERAS), embodiment=(embodiment, ("sawyer", "arm")),
                gripper=(gripper, ("", "openvla")))
        self.fast_render, self.env, self.renderers = fast_render, None, {}
        self.action_dim, self.fps, self.film_every = (4, 80, 8) if embodiment == "sawyer" else (7, 8, 1)

    @classmethod
    def jobs(cls, families, episodes, split, start=0):
        """[(seed, task), ...] of the episodes from `start` on: every task gets the split's first seeds."""
        if episodes % len(families):
            raise ValueError(f"{episodes} episodes of {len(families)} tasks: give a multiple, so that every "
                             "task counts the same.")
        n, of = len(families), seeds(split, -(-(start + episodes) // len(families)), 0, cls.SPLITS)
        return [(of[i // n], families[i % n]) for i in range(start, start + episodes)]

    def lay_out(self, seed, options=None):
        """Lay out the scene of this seed. (Meta-World's own reset(seed) ignores it.)"""
        package, mujoco = import_metaworld()
        self.seed, self.family = seed, (options or {}).get("family") or self.families[0]
        self.instruction, self.count, self.done, name = METAWORLD[self.family], 0, False, f"{self.family}-v3"
        kind = package.env_dict.ALL_V3_ENVIRONMENTS[name]
        kept = self.kept.setdefault((name, self.fast_render), [])
        self.env, self.renderers = kept.pop() if kept else (kind(), {})
        self.env.set_task(package.types.Task(name, pickle.dumps(
            {"env_cls": kind, "rand_vec": None, "partially_observable": False})))
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True
        self.env.seed(seed)
        self.obs = self.env.reset()[0]                                # (39,): now, before, the goal
        for place in (mujoco.mj_kinematics, mujoco.mj_camlight):      # else the first picture shows some
            place(self.env.model, self.env.data)                      # things, and the goal, where they were;
        for site in self.env._target_site_config:                     # mj_forward would change what follows
            self.env._set_pos_site(*site)
        self.policy = package.policies.ENV_POLICY_MAP[name]()

    def swap(self):
        """A control: the instruction of the next task, whose things are not in this scene."""
        names = list(METAWORLD)
        self.instruction = METAWORLD[names[(names.index(self.family) + 1) % len(names)]]

    def close(self):
        """Keep the scene's model for the next episode of this task, of the last 16 tasks what draws it, too
        (130 MB each)."""
        key = f"{self.family}-v3", self.fast_render
        self.kept[key] = [*self.kept.pop(key), (self.env, self.renderers)]
        for old in list(self.kept)[:-16]:
            for _, renderers in self.kept[old]:
                while renderers:
                    close = renderers.popitem()[1].close
                    atexit.unregister(close)
                    close()

    def played(self, action):
        """What is recorded of an action: that of the "sawyer" ends in the effort that is played."""
        turned = self.gripper and self.embodiment != "arm"
        return np.append(action[:-1], 1 - 2 * action[-1]) if turned else action

    def advance(self, action):
        """Play one action (4,), or (7,) of the "arm", which takes ten steps."""
        action = np.asarray(action, np.float32)
        if action.shape != (self.action_dim,) or not np.isfinite(action).all():
            found = f"shape {action.shape}" if action.shape != (self.action_dim,) else action.tolist()
            raise ValueError(f"an action of {found}: this body takes {self.action_dim} finite numbers. (Of a "
                             f"model: train it with --set action_dim={self.action_dim}.)")
        if self.embodiment == "arm" or self.gripper:
            action = np.append(action[:3], 1 - 2 * action[-1])
        if self.embodiment == "arm":
            action[:3] /= self.SUBSTEPS * self.env.action_scale
        for _ in range(self.SUBSTEPS if self.embodiment == "arm" else 1):
            self.obs, _, _, _, info = self.env.step(np.clip(action, -1, 1, dtype=np.float32))
            self.count, self.done = self.count + 1, self.done or bool(info["success"])
            if self.done or self.count >= self.max_steps:
                break

    def success(self):
        """Was the task's flag raised, in any step so far?"""
        return self.done

    def observe(self):
        """As `Tabletop.observe`; depth only of the "arm"."""
        tcp, gap = self.env.tcp_center, np.full(2, self.obs[3] * 0.05)
        state = self.obs[:4] if self.embodiment == "sawyer" else np.concatenate([tcp, np.zeros(3), gap])
        drawn, cameras = {v: self.picture(v) for v in self.views}, {v: self.camera(v) for v in self.views}
        return {"images": {v: rgb for v, (rgb, _) in drawn.items()},
                "depth": {v: depth for v, (_, depth) in drawn.items() if depth is not None},
                "intrinsics": {v: c.intrinsics(self.h, self.w) for v, c in cameras.items()},
                "extrinsics": {v: c.extrinsics() for v, c in cameras.items()},
                "state": state.astype(np.float32), **self.told()}

    def told(self):
        """What an observation says in words: the instruction."""
        return {"instruction": self.instruction}

    def camera(self, view):
        """The Camera of a view, as it stands now, in Meta-World's frame; turned, where its picture is."""
        i = self.env.model.camera(CAMERAS[view]).id
        turn = np.array([-1, 1, -1] if view == "third" else [1, -1, -1])       # MuJoCo's: y up, z backwards
        axes = self.env.data.cam_xmat[i].reshape(3, 3).T * turn[:, None]
        return Camera(self.env.data.cam_xpos[i], axes, math.radians(self.env.model.cam_fovy[i]))

    def picture(self, view, h=None, w=None):
        """rgb uint8 (h, w, 3), of the "arm" also depth float32 (h, w) [m], else None. h, w: resized."""
        _, mujoco = import_metaworld()
        size, model = (self.h, self.w), self.env.model
        if size not in self.renderers:
            shown = model.vis.global_
            shown.offheight, shown.offwidth = max(shown.offheight, size[0]), max(shown.offwidth, size[1])
            if self.fast_render:
                model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
            try:
                self.renderers[size] = mujoco.Renderer(model, *size)
                atexit.register(self.renderers[size].close)           # before what it draws with is closed
            except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as e:
                gl = os.environ.get("MUJOCO_GL")
                raise ValueError(f"MuJoCo cannot draw, with MUJOCO_GL={gl} ({e}): set it to egl or osmesa, "
                                 f"and {PARTS['metaworld'][2]}.") from e
        renderer, drawn = self.renderers[size], []
        for depth in (False, True) if self.embodiment == "arm" else (False,):
            (renderer.enable_depth_rendering if depth else renderer.disable_depth_rendering)()
            renderer.update_scene(self.env.data, camera=CAMERAS[view])
            if self.fast_render:
                for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                    renderer.scene.flags[flag] = False
            picture = renderer.render()
            drawn.append(np.ascontiguousarray(picture[::-1, ::-1] if view == "third" else picture))
        if h:
            drawn[0] = np.array(Image.fromarray(drawn[0]).resize((w, h)))
        return (*drawn, None)[:2]

    def expert(self):
        """Meta-World's scripted expert: (action, clipped to what the arm does; None: it says nothing)."""
        with warnings.catch_warnings():                               # that it asks for more than is done
            warnings.simplefilter("ignore")
            return np.clip(self.policy.get_action(self.obs), -1, 1), None

    def random_action(self, rng):
        """An action (4,) by chance."""
        return rng.uniform(-1, 1, 4)

    def track(self):
        """As `Tabletop.track`: the end effector's point, and the first object's."""
        return 0, self.env.tcp_center.copy(), self.obs[4:7].copy()


# ---- Other benchmarks: LIBERO, SimplerEnv, ManiSkill 3, CALVIN; all optional (--check says how) ------------

# What second cameras are called in data; a view of another name is the camera at its place in the list.
SECOND = ("wrist", "wrist_image", "image2", "eye_in_hand", "gripper", "hand", "cam_right_wrist")
ORDERS, LIMITS = ("sharded", "official"), ("stock", "cogact")
LAID_OUT_BY = ("order", "limits", "env_seed")    # settings that a replay needs


def _need(sim, *modules):
    try:
        return [importlib.import_module(module) for module in modules]
    except (ImportError, AttributeError, RuntimeError, OSError) as e:
        gl = f" (with MUJOCO_GL={os.environ.get('MUJOCO_GL')})" if sim == "libero" else ""
        raise ValueError(f"--sim {sim}: {e}{gl}. eval_sim.py --sim {sim} --check says what is missing and "
                         "how it is installed; if nothing is, install what is named here.") from e


def axis_angle(quaternion):
    """x, y, z, w (4,) -> axis times angle (3,) [rad], up to 2 pi long; next to no turn: zeros."""
    w = np.clip(quaternion[3], -1.0, 1.0)
    length = math.sqrt(1 - w * w)
    return np.zeros(3) if length < 1e-8 else 2 * math.acos(w) / length * np.asarray(quaternion[:3])


def _quaternion(roll, pitch, yaw):
    (r, p, y), (i, j, k) = (turn(np.array([roll, pitch, yaw]) / 2) for turn in (np.cos, np.sin))
    return np.array([i * p * y - r * j * k, r * j * y + i * p * k, r * p * k - i * j * y,
                     r * p * y + i * j * k])


def _lens(extrinsic, intrinsic, h):
    pose, K = np.asarray(extrinsic, float), np.asarray(intrinsic, float)                # as OpenCV has them
    return Camera(-pose[:3, :3].T @ pose[:3, 3], pose[:3, :3], 2 * math.atan(h / 2 / K[1, 1]))


class Bench:
    """What the benchmarks below share: the verbs and arguments of `Tabletop`.

    families: tasks; a seed is the number of one of a task's fixed episodes. Pictures come as the benchmark
    draws them, whatever image_size. gripper: "openvla" if actions end in 1 = open, 0 = closed, and not as the
    benchmark's. order, limits, env_seed: see who uses them. There is no expert. native, set by the
    evaluator: the session knows the robot, its actions are the benchmark's already.
    """
    film_every, film_ms, goals, reached, rest, SPLITS, native = 1, 100, (), (), (1, 0.004), ("eval",), True
    OPEN, SCALE, robot, action_dim, CAMERAS, BATCH = 1, 1.0, "", 7, ("third",), 4
    success, told = MetaWorld.success, MetaWorld.told

    def __init__(self, families=(), split="eval", views=("third",), image_size=None, embodiment=None,
                 gripper="", order="sharded", limits="stock", env_seed=0):
        if wrong := [family for family in families if family not in self.tasks()]:
            raise ValueError(f"families {', '.join(map(repr, wrong))}: {self.title} has the sets "
                             f"{', '.join(self.SETS)}, or single ones, as {self.tasks()[0]}.")
        _settle(self, self.title, self.SIZE, families=(families or self.SETS[self.default], self.tasks()),
                split=(split, self.SPLITS), embodiment=(embodiment or self.body, (self.body,)),
                gripper=(gripper, ("", "openvla")), order=(order, ORDERS), limits=(limits, LIMITS))
        places = [1 if view in SECOND else 0 if view == "third" else i for i, view in enumerate(views)]
        if max(places, default=0) >= len(self.CAMERAS):
            raise ValueError(f"views {', '.join(views)}: {self.title} draws {len(self.CAMERAS)}, "
                             f"{' and '.join(self.CAMERAS)}.")
        self.views, self.env_seed, self.env = tuple(views), env_seed, None
        self.cameras = {view: self.CAMERAS[i] for view, i in zip(views, places)}

    @classmethod
    def tasks(cls):
        """The names of all tasks."""
        return tuple(dict.fromkeys(name for names in cls.SETS.values() for name in names))

    @classmethod
    def count_of(cls, family):
        """How many episodes a task has."""
        return cls.COUNT

    @classmethod
    def jobs(cls, families, episodes, split, start=0):
        """[(number, task), ...]: all episodes of these tasks, or as many of each."""
        counts, n = [cls.count_of(family) for family in families], episodes // len(families)
        if start or episodes != sum(counts) and (n > min(counts) or episodes % len(families)):
            raise ValueError(f"{episodes} episodes of {len(families)} tasks: {cls.title} has {sum(counts)}; "
                             f"give that, or the same number, up to {min(counts)}, of each.")
        counts = counts if episodes == sum(counts) else [n] * len(families)
        return [(cls._number(k, n, family), family) for n, family in zip(counts, families) for k in range(n)]

    @classmethod
    def _number(cls, k, n, family):                                   # the k-th of n that are played
        return k

    def lay_out(self, seed, options=None):
        """Build the scene of this episode."""
        self.seed, self.family = seed, (options or {}).get("family") or self.families[0]
        self.count, self.done, self.other = 0, False, ""
        try:
            self._start()
        except (RuntimeError, OSError, ImportError) as e:             # no device that draws, no such file
            modules, _, libraries = PARTS[self.suite]
            wanted = "; ".join(dict.fromkeys(filter(None, (*modules.values(), libraries))))
            raise ValueError(f"{self.title}, {self.family}: {e}. Is all of it there? {wanted}.") from e

    def _say(self, words):
        self.instruction = self.other or words

    def swap(self):
        """A control: the instruction of another task, even if the benchmark gives the next one."""
        names = self.tasks()
        self.other = self.instruction = self._words(names[(names.index(self.family) + 1) % len(names)])

    def _words(self, family):                                         # as far as its name tells them
        return family.split("/")[-1].replace("_", " ")

    def played(self, action):
        """An action (7,) as the benchmark takes it: its last number is 1 or -1. ValueError: it is none."""
        action = np.array(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action of shape {action.shape}, {action.tolist()}: {self.title} takes 7 "
                             "finite numbers.")
        opens = action[6] > 0.5 if self.gripper else (action[6] > 0) == (self.OPEN > 0)
        return np.append(action[:6], self.OPEN if opens else -self.OPEN)

    def advance(self, action):
        """Play one action (7,)."""
        self.count += 1
        self._step(self.played(action))

    def observe(self):
        """As `Tabletop.observe`, without depth; every view in its own size."""
        images = {view: self._frame(camera) for view, camera in self.cameras.items()}
        cameras = {view: self.camera(view) for view in self.views}
        return {"images": images, "depth": {}, "state": np.array(self._feel()[0], np.float32), **self.told(),
                "intrinsics": {view: c.intrinsics(*images[view].shape[:2]) for view, c in cameras.items()},
                "extrinsics": {view: c.extrinsics() for view, c in cameras.items()}}

    def picture(self, view, h=None, w=None):
        """rgb uint8 (h, w, 3) of a view, at its own or this size; and None: no depth."""
        frame = self._frame(self.cameras.get(view, self.CAMERAS[0]))
        return (np.array(Image.fromarray(frame).resize((w, h))) if h else frame), None

    def random_action(self, rng):
        """An action (7,) by chance, as the benchmark takes it."""
        return np.append(rng.uniform(-1, 1, 6) * self.SCALE, rng.choice([-1.0, 1.0]))

    def expert(self):
        """There is none, who would act or say anything."""
        return None, None

    def track(self):
        """As `Tabletop.track`: the hand's point; for want of knowledge, it is also the object's."""
        return 0, np.array(self._feel()[1]), np.array(self._feel()[1])

    def report(self):
        """What a result says of an episode beyond success."""
        return {}

    def close(self):
        """Close the scene."""
        self.env.close()


# LIBERO. Action 7 at 20 Hz in [-1, 1]: position, axis-angle, gripper -1 open, 1 closed (by its sign). State
# 8: position [m], axis-angle [rad], two finger joints [m]. Pictures are turned by 180 degrees, as everyone's;
# the renderer hands them over bottom row first, so this makes them a mirror's, and the matrices say so.
LIBERO_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520,
                "libero_90": 400}
LIBERO_TASKS = {suite: tuple(f"{suite}/{i}" for i in range(90 if suite == "libero_90" else 10))
                for suite in LIBERO_STEPS}


def import_libero():
    """The modules (libero, its benchmark, its envs). ValueError: what is missing.

    Its first import asks a question unless there is a config.yaml; so one is written, at its usual place.
    """
    config = Path(os.environ.get("LIBERO_CONFIG_PATH") or Path.home() / ".libero") / "config.yaml"
    _choose_gl()
    if (found := find_spec("libero")) and not config.is_file():
        from common import write_json
        root = Path(next(iter(found.submodule_search_locations))) / "libero"
        kinds = {"benchmark_root": "", "bddl_files": "bddl_files", "init_states": "init_files",
                 "datasets": "../datasets", "assets": "assets"}
        config.parent.mkdir(parents=True, exist_ok=True)
        write_json(config, {kind: str(root / name) for kind, name in kinds.items()})           # JSON is YAML
    return _need("libero", "libero.libero", "libero.libero.benchmark", "libero.libero.envs")


def _numbers(path):
    """The array that torch.save wrote there; no other object's pickle is let in."""
    import torch
    core = importlib.import_module(f"numpy.{'_core' if hasattr(np, '_core') else 'core'}.multiarray")
    known = [np.ndarray, np.dtype, type(np.dtype(float)), *(
        (core._reconstruct, f"numpy.{name}.multiarray._reconstruct") for name in ("core", "_core"))]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path} holds something else than an array: get LIBERO's file again.") from e


@lru_cache
def _suite(benchmark, name):                                          # once: it prints a line
    return benchmark.get_benchmark_dict()[name]()


def _leave():                                                         # robosuite closes EGL at exit: what
    Libero.kept.clear()                                               # draws with it goes first, or complains
    gc.collect()


class Libero(Bench):
    """A task of LIBERO, SUITE/NUMBER in the suite's own order; 50 initial states each.

    Fixtures stand where NumPy's global generator says at a reset, whatever the initial state. order
    "official": seeded with env_seed once per task, then a reset per episode (earlier ones are made up for);
    "sharded": seeded by env_seed, task and number before every reset.
    """
    suite, title, body, default, fps, film_every, BATCH = "libero", "LIBERO", "panda", "libero", 20, 2, 10
    CAMERAS, SIZE, COUNT, OPEN, WAIT = ("agentview", "robot0_eye_in_hand"), (256, 256), 50, -1, 10
    SETS = {"libero": sum(list(LIBERO_TASKS.values())[:4], ()), **LIBERO_TASKS}
    chains, kept = {}, {}        # official: {(task, env_seed): (resets so far, the generator after them)}
    max_steps = property(lambda self: LIBERO_STEPS[self.family.split("/")[0]])
    _ready = staticmethod(import_libero)

    def _words(self, family):
        return self._task(family).language

    def _task(self, family):
        suite, number = family.split("/")
        return _suite(self._ready()[1], suite).get_task(int(number))

    def _start(self):
        package, _, envs = self._ready()
        task, kept = self._task(self.family), self.kept.setdefault(self.family, [])
        states, bddl = (Path(package.get_libero_path(kind)) / task.problem_folder / name for kind, name in (
            ("init_states", task.init_states_file), ("bddl_files", task.bddl_file)))
        before = np.random.get_state()                                 # which goes on unmoved
        self.env = kept.pop() if kept else envs.OffScreenRenderEnv(
            bddl_file_name=str(bddl), camera_heights=self.h, camera_widths=self.w)
        atexit.unregister(_leave)                                      # what is registered last is done first
        atexit.register(_leave)
        self._reset()
        np.random.set_state(before)
        self.obs = self.env.set_init_state(_numbers(states)[self.seed])                   # (50, nq + nv + 1)
        for _ in range(self.WAIT):                                     # all settles; not counted
            self.obs, *_ = self.env.step([0.0] * 6 + [-1.0])
        self._say(task.language)

    def _reset(self):
        name, key = f"{self.env_seed} {self.family} {self.seed}", (self.family, self.env_seed)
        if self.order == "sharded":
            np.random.seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
            self.env.reset()
            return
        done, state = self.chains.get(key, (0, None))
        if state is None or done > self.seed:
            done, _ = 0, self.env.seed(self.env_seed)                  # is nothing but np.random.seed
        else:
            np.random.set_state(state)
        for _ in range(self.seed + 1 - done):
            self.env.reset()
        self.chains[key] = self.seed + 1, np.random.get_state()

    def _step(self, action):
        self.obs, _, done, _ = self.env.step(action)
        self.done = self.done or bool(done)

    def _frame(self, camera):
        return np.ascontiguousarray(self.obs[f"{camera}_image"][::-1, ::-1])

    def _feel(self):
        at, turn = self.obs["robot0_eef_pos"], axis_angle(self.obs["robot0_eef_quat"])
        return [*at, *turn, *self.obs["robot0_gripper_qpos"]], at

    def camera(self, view):
        """The Camera of a view; its first axis points left in the world: the picture is a mirror's."""
        data, model = self.env.sim.data, self.env.sim.model
        i = model.camera_name2id(self.cameras.get(view, self.CAMERAS[0]))
        axes = -data.cam_xmat[i].reshape(3, 3).T                       # MuJoCo's: right, up, backwards
        return Camera(data.cam_xpos[i].copy(), axes, math.radians(model.cam_fovy[i]))

    def track(self):
        """As `Tabletop.track`: the hand's point, and that of the first thing that the task is about."""
        thing = f"{(self.env.env.obj_of_interest or [''])[0]}_pos"
        return 0, np.array(self._feel()[1]), np.array(self.obs.get(thing, self._feel()[1]))

    def close(self):
        """Keep the scene for the next episode of this task; of other tasks, close theirs."""
        last = self.camera("third")
        self.camera = lambda view: last                               # a tape asks for it later on
        for family in [family for family in self.kept if family != self.family]:
            for env in self.kept.pop(family):
                env.close()
        self.kept.setdefault(self.family, []).append(self.env)


# SimplerEnv. Action 7: dx dy dz [m] in the world, axis-angle [rad], gripper: of the WidowX, 5 Hz, 1 open, -1
# closed; of Google's robot, 3 Hz, relative: 1 closes, -1 opens. Success is what it is at the last step.
WIDOWX = {   # task: environment, stock limit [steps], robot, scene, overlay, the robot's x, y [m]
    task: (f"{name}-v0", 60, "widowx", "bridge_table_1_v1", "bridge_real_eval_1", 0.147, 0.028)
    for task, name in (("spoon_on_towel", "PutSpoonOnTableClothInScene"),
                       ("carrot_on_plate", "PutCarrotOnPlateInScene"),
                       ("stack_cube", "StackGreenCubeOnYellowCubeBakedTexInScene"))}
WIDOWX["eggplant_in_basket"] = ("PutEggplantInBasketScene-v0", 120, "widowx_sink_camera_setup",
                                "bridge_table_1_v2", "bridge_sink", 0.127, 0.06)
GOOGLE = {"pick_coke_can": 80, "move_near": 80, "drawer": 113, "apple_in_drawer": 200}      # limit [steps]
SIMPLER_TASKS = {kind: tuple(f"{kind}/{task}" for task in tasks) for kind, tasks in (
    ("widowx", WIDOWX), ("google_vm", GOOGLE), ("google_va", GOOGLE))}
DRAWERS = tuple(f"{verb}{which}DrawerCustomInScene-v0" for verb in ("Open", "Close")
                for which in ("Top", "Middle", "Bottom"))
STANDS = {"a0": (0.644, -0.179, -0.03), "b0": (0.652, 0.009, 0.0), "c0": (0.665, 0.224, 0.0),    # x, y, yaw
          "a1": (0.765, -0.182, -0.02), "b1": (0.752, 0.009, 0.0), "c1": (0.765, 0.222, -0.025),
          "a2": (0.889, -0.203, -0.06), "b2": (0.851, 0.035, 0.0), "c2": (0.865, 0.222, -0.025)}
URDFS = (None, *(f"recolor_{part}_visual_matching_{i}" for part, i in (("tabletop", 1), ("tabletop", 2),
                                                                       ("cabinet", 1))))
TABLE_SCENE, ROOM_SCENE = "google_pick_coke_can_1_v4", "frl_apartment_stage_simple"
# Variant aggregation: of tables backgrounds, textures, lights; of drawers rooms, lights, cabinets.
TABLES = (*({"scene_name": scene} for scene in (
    TABLE_SCENE, f"{TABLE_SCENE}_alt_background", f"{TABLE_SCENE}_alt_background_2",
    "Baked_sc1_staging_objaverse_cabinet1_h870", "Baked_sc1_staging_objaverse_cabinet2_h870")),
    *({"scene_name": TABLE_SCENE, f"slightly_{how}_lighting": True} for how in ("darker", "brighter")))
ROOMS = (*({"scene_name": scene} for scene in (ROOM_SCENE, "modern_bedroom_no_roof",
                                               "modern_office_no_roof")),
         *({"scene_name": ROOM_SCENE, key: value} for key, value in (
             ("light_mode", "brighter"), ("light_mode", "darker"), ("station_name", "mk_station2"),
             ("station_name", "mk_station3"))))


@lru_cache
def simpler_episodes(family):
    """The episodes of a task of SimplerEnv, by its official scripts: a list of (environment, its arguments,
    the robot's x, y [m] and yaw [rad], reset's obj_init_options)."""
    table = {"scene_name": TABLE_SCENE}
    kind, task = family.split("/")
    matching, drawer = kind == "google_vm", task == "drawer"
    def grid(xs, ys):
        return [{"init_xy": np.array(at)} for at in product(np.linspace(*xs), np.linspace(*ys))]
    if kind == "widowx":
        name, _, robot, scene, overlay, x, y = WIDOWX[task]
        how = {"robot": robot, "scene_name": scene, "overlay": overlay}
        return [(name, how, (x, y, 0.0), {"episode_id": k}) for k in range(24)]
    if task == "pick_coke_can":
        looks = ([("", table | {"overlay": "google_coke_can_real_eval_1", "urdf_version": urdf})
                  for urdf in URDFS] if matching else
                 [*(("", look) for look in TABLES), ("Distractor", table),
                  ("Distractor", table | {"distractor_config": "more"})])
        return [(f"GraspSingleOpenedCokeCan{more}InScene-v0", look | {can: True}, (0.35, 0.20, 0.0), at)
                for more, look in looks for can in ("lr_switch", "upright", "laid_vertically")
                for at in grid((-0.35, -0.12, 5), (-0.02, 0.42, 5))]
    if task == "move_near":
        looks = ([table | {"overlay": "google_move_near_real_eval_1", "urdf_version": urdf} for urdf in URDFS]
                 if matching else [*TABLES, table | {"no_distractor": True}])
        name = f"MoveNearGoogle{'BakedTex' * matching}InScene-v0"
        return [(name, look, (0.35, 0.21, -0.09), {"episode_id": k}) for look in looks for k in range(60)]
    names = DRAWERS if drawer else ("PlaceIntoClosedTopDrawerCustomInScene-v0",)
    things = [{"init_xy": np.zeros(2)}] if drawer else grid((-0.08, -0.02, 3), (-0.02, 0.08, 3))
    more = {"shader_dir": "rt"} | ({} if drawer else {"model_ids": "baked_apple_v2" if matching else "apple"})
    if matching:
        scene = {"scene_name": "dummy_drawer", "station_name": "mk_station_recolor", "light_mode": "simple",
                 "disable_bad_material": True}
        looks = [(scene | {"overlay": f"open_drawer_{at}", "urdf_version": urdf}, STANDS[at])
                 for urdf in URDFS for at in STANDS if drawer or at.endswith("0")]
    else:
        xs = np.linspace(0.65, 0.85, 3) if drawer else [0.65]
        looks = [(room, (x, y, 0.0)) for room in ROOMS for x in xs for y in np.linspace(-0.2, 0.2, 3)]
    return [(name, more | look, stand, at) for name in names for look, stand in looks for at in things]


class Simpler(Bench):
    """A task of SimplerEnv: visual matching (widowx/, google_vm/) or variant aggregation (google_va/).

    limits: "cogact" gives all tasks of the WidowX 120 steps, as CogACT's scripts do, and not 60 (eggplant
    120). Each episode builds its environment anew. State: the joints.
    """
    suite, title, body, default, film_ms = "simpler", "SimplerEnv", "robot", "widowx", 200
    SETS, SCALE, SIZE = SIMPLER_TASKS, 0.03, (480, 640)

    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        if len({family.startswith("google") for family in self.families}) > 1:
            raise ValueError("tasks of the WidowX and of Google's robot: give those of one robot at a time.")
        self.google = self.families[0].startswith("google")
        self.robot, self.fps = ("google_robot", 3) if self.google else ("widowx_bridge", 5)
        self.lens = "overhead_camera" if self.google else "3rd_view_camera"

    @classmethod
    def count_of(cls, family):
        """How many episodes a task has."""
        return len(simpler_episodes(family))

    @classmethod
    def _number(cls, k, n, family):                                   # spread over the task's variants
        return k * cls.count_of(family) // n

    @property
    def max_steps(self):
        """The step limit of the task."""
        kind, task = self.family.split("/")
        return GOOGLE[task] if kind != "widowx" else 120 if self.limits == "cogact" else WIDOWX[task][1]

    @classmethod
    def _ready(cls):
        return _need(cls.suite, "gymnasium", "mani_skill2_real2sim.envs", "mani_skill2_real2sim")

    def _start(self):
        gym, _, package = self._ready()
        name, how, (x, y, yaw), things = simpler_episodes(self.family)[self.seed]
        how = {"robot": "google_robot_static"} | how
        if overlay := how.pop("overlay", None):
            how |= {"rgb_overlay_path": str(Path(package.ASSET_DIR) / "real_inpainting" / f"{overlay}.png"),
                    "rgb_overlay_cameras": [self.lens]}
        mode = ("arm_pd_ee_delta_pose_align_interpolate_by_planner_gripper_pd_joint_target_delta_pos_"
                "interpolate_by_planner" if self.google else
                "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos")
        self.env = gym.make(name, obs_mode="rgbd", control_mode=mode, control_freq=self.fps,
                            sim_freq=513 if self.google else 500, max_episode_steps=self.max_steps,
                            camera_cfgs={"add_segmentation": True}, **how)
        turn = np.array([-math.sin(yaw / 2), 0, 0, math.cos(yaw / 2)])     # w, x, y, z: half round, and yaw
        self.obs, _ = self.env.reset(options={"robot_init_options": {
            "init_xy": np.array([x, y]), "init_rot_quat": turn}, "obj_init_options": dict(things)})
        self.stats, (self.h, self.w) = {}, self._frame().shape[:2]
        self._say(self.env.unwrapped.get_language_instruction())

    def played(self, action):
        """An action (7,) as SimplerEnv takes it; of other sessions than native ones: roll, pitch, yaw."""
        ours = Bench.played(self, action)                             # or an error
        turn = axis_angle(_quaternion(*ours[3:6]))
        return np.array(action, np.float64) if self.native else np.concatenate([ours[:3], turn, ours[6:]])

    def _step(self, action):
        self.obs, _, self.done, _, info = self.env.step(action)
        self.stats = info.get("episode_stats", {})
        self._say(self.env.unwrapped.get_language_instruction())       # of a long task it changes

    def success(self):
        """Is the task done at the last step? Before it, none is."""
        return bool(self.done) and self.count >= self.max_steps

    def _frame(self, camera=None):
        return np.ascontiguousarray(self.obs["image"][self.lens]["rgb"])

    def _feel(self):
        return self.obs["agent"]["qpos"], self.env.unwrapped.tcp.pose.p

    def camera(self, view):
        """The Camera of the one view."""
        lens = self.obs["camera_param"][self.lens]
        return _lens(lens["extrinsic_cv"], lens["intrinsic_cv"], self.h)

    def report(self):
        """SimplerEnv's own facts on an episode, as moved_correct_obj."""
        return {"stats": {name: bool(value) for name, value in self.stats.items()}}


# ManiSkill 3. Action 7 at 20 Hz in [-1, 1], pd_ee_delta_pose: position (1: 0.1 m), roll, pitch, yaw (1: 0.1
# rad; in 3.0.1 with the other sign), gripper 1 open, -1 closed. Success: in any step. The words are ours.
MANISKILL = {   # task: (words, limit [steps] as registered)
    "PickCube-v1": ("pick up the red cube and hold it at the green goal", 50),
    "PushCube-v1": ("push the blue cube onto the target", 50),
    "PullCube-v1": ("pull the blue cube onto the target", 50),
    "StackCube-v1": ("put the red cube on the green cube", 50),
    "LiftPegUpright-v1": ("stand the peg on its end", 50),
    "PlaceSphere-v1": ("put the ball into the bin", 50),
    "PegInsertionSide-v1": ("put the peg into the hole of the box", 100),
    "PlugCharger-v1": ("plug the charger into the socket", 200)}


class ManiSkill(Bench):
    """A task of ManiSkill 3, of a Panda; an episode's number is its seed. State: the joints."""
    suite, title, body, default, fps, film_every = "maniskill", "ManiSkill 3", "panda", "default", 20, 2
    CAMERAS, SIZE, COUNT = ("base_camera", "hand_camera"), (128, 128), 100
    SETS = {"default": tuple(MANISKILL)[:5], "all": tuple(MANISKILL)}
    modes = {"obs_mode": "rgb", "control_mode": "pd_ee_delta_pose"}
    max_steps = property(lambda self: MANISKILL[self.family][1])

    def _words(self, family):
        return MANISKILL[family][0]

    @classmethod
    def _ready(cls):
        return _need(cls.suite, "gymnasium", "torch", "mani_skill.envs")

    def _start(self):
        gym, torch, _ = self._ready()
        name, options = self._asked()
        hand = {"robot_uids": "panda_wristcam"} if "hand_camera" in self.cameras.values() else {}
        draws = "sapien_cuda" if torch.cuda.is_available() else "sapien_cpu"
        self.env = gym.make(name, num_envs=1, sim_backend="physx_cpu", render_backend=draws,
                            max_episode_steps=self.max_steps, **self.modes, **hand)
        self.obs, _ = self.env.reset(seed=self.seed, options=options)
        self._say(self._words(self.family))

    def _asked(self):
        return self.family, {}

    def _step(self, action):
        self.obs, _, _, _, info = self.env.step(action.astype(np.float32))
        self._note(bool(info["success"]))

    def _note(self, success):
        self.done = self.done or success

    def _frame(self, camera):
        return np.ascontiguousarray(self.obs["sensor_data"][camera]["rgb"][0].cpu().numpy())

    def _feel(self):
        hand = self.env.unwrapped.agent.tcp.pose.p[0]
        return self.obs["agent"]["qpos"][0].cpu().numpy(), hand.cpu().numpy()

    def camera(self, view):
        """The Camera of a view."""
        lens = self.obs["sensor_param"][self.cameras.get(view, self.CAMERAS[0])]
        return _lens(lens["extrinsic_cv"][0].cpu().numpy(), lens["intrinsic_cv"][0].cpu().numpy(), self.h)


class SimplerPort(ManiSkill):
    """SimplerEnv's four tasks of the WidowX in ManiSkill 3; else as `Simpler`. (The port reads the turn as
    roll, pitch, yaw; who publishes gives it an axis-angle all the same, and so do we.)"""
    suite, title, body, default, fps = "simpler3", "SimplerEnv in ManiSkill 3", "widowx", "widowx", 5
    CAMERAS, SIZE, COUNT, SCALE = ("3rd_view_camera",), (480, 640), 24, 0.03
    SETS = {"widowx": SIMPLER_TASKS["widowx"]}
    robot, film_every, film_ms, modes = "widowx_bridge", 1, 200, {"obs_mode": "rgb+segmentation"}
    played, success, max_steps, _words = Simpler.played, Simpler.success, Simpler.max_steps, Bench._words

    def _asked(self):
        import torch
        name = WIDOWX[self.family.split("/")[1]][0]
        return name.replace("-v0", "-v1"), {"episode_id": torch.tensor([self.seed])}

    def _start(self):
        super()._start()
        self._say(self.env.unwrapped.get_language_instruction()[0])

    def _note(self, success):
        self.done = success


# CALVIN. Action 7 at 30 Hz: position (1: 0.02 m) and roll, pitch, yaw (1: 0.05 rad), relative, gripper 1
# open, -1 closed. State 15: robot_obs. An episode is five instructions, 360 steps each; a failure ends it.
CALVIN_HASH = "13bc4fad80a302e6405e5f4f800cc028789a245409cd12df39b783099ad4860f"
BLOCKS = ("red_block", "blue_block", "pink_block")
SHELVES = ("slider_right", "slider_left")
# What may be asked, in CALVIN's order, and its kind: no two of a kind come in one sequence.
CALVIN_TASKS = {
    **{f"{verb}_{block}_{side}": "move" for verb in ("rotate", "push") for block in BLOCKS
       for side in ("right", "left")},
    **{f"move_slider_{side}": "slider" for side in ("left", "right")}, "open_drawer": "drawer",
    "close_drawer": "drawer", **{f"lift_{block}_{place}": f"lift_{place}" for block in BLOCKS
                                 for place in ("table", "slider", "drawer")},
    **{f"place_in_{place}": "place" for place in ("slider", "drawer")}, "stack_block": "stack",
    "unstack_block": "unstack",
    **{f"turn_{how}_{lamp}": "light" for lamp in ("lightbulb", "led") for how in ("on", "off")},
    "push_into_drawer": "push_into"}
CALVIN_STATE = {"led": (0, 1), "lightbulb": (0, 1), "slider": ("right", "left"), "drawer": ("closed", "open"),
                **dict.fromkeys(BLOCKS, ("table", *SHELVES)), "grasped": (0,)}


@lru_cache
def calvin_states():
    """CALVIN's 192 initial states, in its order; each a dict with the keys of CALVIN_STATE."""
    return [dict(zip(CALVIN_STATE, values)) for values in product(*CALVIN_STATE.values())
            if values.count("table") in (1, 2) and max(map(values.count, SHELVES)) < 2]


def calvin_next(state, task):
    """The states that a task may lead to (none: it cannot be done now), by CALVIN's symbolic rules."""
    (verb, *_, last), opened, held = task.split("_"), state["drawer"] == "open", bool(state["grasped"])
    block = next((block for block in BLOCKS if block in task), None)
    at = {place: [one for one in BLOCKS if state[one] == place] for place in (
        "table", "drawer", "grasped", "stacked_top", "stacked_bottom")}
    if held != (verb in ("place", "stack")):                          # these alone want something in the hand
        new = []
    elif verb in ("rotate", "push") and block:
        new = [{}] * (block in at["table"])
    elif verb == "move":
        new = [{"slider": last}] * (state["slider"] != last)
    elif verb in ("open", "close"):
        new = [{"drawer": "closed" if opened else "open"}] * (opened == (verb == "close"))
    elif verb == "lift":
        there = state[block] in ({*SHELVES} - {f"slider_{state['slider']}"} if last == "slider" else {last})
        new = [{block: "grasped", "grasped": 1}] * (there and (opened or last != "drawer"))
    elif verb == "place":
        place = "drawer" if last == "drawer" else f"slider_{state['slider']}"
        new = [{one: place, "grasped": 0} for one in at["grasped"] if opened or last != "drawer"]
    elif verb == "stack":
        new = [{top: "stacked_top", low: "stacked_bottom", "grasped": 0} for top in at["grasped"]
               for low in at["table"]]
    elif verb == "unstack":
        new = [{top: "table", low: "table"} for top in at["stacked_top"] for low in at["stacked_bottom"]]
    elif verb == "turn":
        new = [{last: 1 - state[last]}] * (state[last] == ("_off_" in task))
    else:                                                             # into the drawer: none else in the way
        new = [{one: "drawer"} for one in at["table"] if opened
               and all(state[other] in SHELVES for other in BLOCKS if other != one)]
    return [state | change for change in new]


def calvin_draw(number, n):
    """The first n sequences, tuples of five task names, of the initial state of this number."""
    rng, names, found = np.random.RandomState(number), list(CALVIN_TASKS), []
    while len(found) < n:
        sequence = tuple(names[i] for i in rng.permutation(len(names))[:5])       # as np.random.choice does
        after = [calvin_states()[number]] if len({CALVIN_TASKS[name] for name in sequence}) == 5 else []
        for task in sequence:
            after = calvin_next(after[0], task) if len(after) == 1 else []
        found += [sequence] * (len(after) == 1)
    return found


def calvin_generate():
    """CALVIN's 1,000 evaluation sequences, made anew in minutes: [(state's number, five names), ...]."""
    shares = map(len, np.array_split(range(1000), len(calvin_states())))
    found = [(i, sequence) for i, n in enumerate(shares) for sequence in calvin_draw(i, n)]
    np.random.RandomState(0).shuffle(found)
    return found


@lru_cache
def calvin_sequences():
    """CALVIN's 1,000 evaluation sequences, [(initial state, five task names), ...]; checked: CALVIN_HASH."""
    from common import read_json
    path = Path(__file__).resolve().parent / "assets" / "calvin_sequences.json"
    names, states = list(CALVIN_TASKS), calvin_states()
    found = [(states[i], tuple(names[k] for k in tasks)) for i, *tasks in read_json(path)["sequences"]]
    if hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() != CALVIN_HASH:
        raise ValueError(f"{path} does not hold CALVIN's sequences: get the file again.")
    return found


def fnv1_32(data):
    """The 32-bit FNV-1 hash of bytes, from 0, as pyhash has it (a str there is UTF-16, little-endian)."""
    h = 0
    for byte in data:
        h = h * 0x01000193 % (1 << 32) ^ byte
    return h


def calvin_layout(state):
    """Where an initial state puts all: (robot_obs (15,), scene_obs (24,)), both float64."""
    robot = np.array([0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963,
                      -1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928,
                      1.0])
    rng = np.random.RandomState(fnv1_32(str(state.values()).encode("utf-16-le")))
    table = [(5.00000896e-02, -1.20000177e-01, 4.59990009e-01),
             (2.29995412e-01, -1.19995140e-01, 4.59990010e-01)]
    shelf = {"slider_left": (-2.40851662e-01, 9.24044687e-02, 4.60990009e-01),
             "slider_right": (7.03416330e-02, 9.24044687e-02, 4.60990009e-01)}
    rng.shuffle(table)
    scene = np.zeros(24)         # slider, drawer, button, switch, lightbulb, led, three blocks: x y z, angles
    scene[:2] = 0.28 * (state["slider"] == "left"), 0.22 * (state["drawer"] == "open")
    scene[3:6] = 0.088 * state["lightbulb"], state["lightbulb"], state["led"]
    slots = {"red_block": 0, "blue_block": int(state["red_block"] == "table"), "pink_block": 1}
    for i, block in zip((6, 12, 18), BLOCKS):
        scene[i:i + 3] = shelf.get(state[block], table[slots[block]])
        scene[i + 5] = rng.uniform(math.pi / 2 - math.pi / 8, math.pi / 2 + math.pi / 8)
    return robot, scene


class Calvin(Bench):
    """One of CALVIN's 1,000 sequences of five instructions, in scene D.

    The environment is reset once a sequence, the session with every instruction. order "sharded" builds the
    environment anew for each sequence (its reset leaves traces: 2 mm later on), "official" keeps one. One at
    a time in a process: pybullet's robot draws its base into the first one's world. CALVIN_EGL=1: on a GPU.
    """
    suite, title, body, default, robot, BATCH = "calvin", "CALVIN", "panda", "D", "calvin", 1
    fps, film_every, SIZE, COUNT, CAMERAS, LIMIT = 30, 3, (200, 200), 1000, ("static", "gripper"), 360
    kept, SETS = [], {"D": ("D",)}
    max_steps = property(lambda self: self.began + self.LIMIT)        # of the present instruction

    def _words(self, family):
        return "move away from the table"                             # none of the 34

    @classmethod
    def _ready(cls):
        return _need(cls.suite, "calvin_env", "hydra", "omegaconf", "calvin_env.envs.tasks")

    def _build(self):
        """(CALVIN's environment, the judge of its tasks, the 34 instructions), by its own settings."""
        package, hydra, omega, tasks = self._ready()
        load, merge = omega.OmegaConf.load, omega.OmegaConf.merge
        conf = Path(package.__file__).resolve().parents[1] / "conf"
        words = conf.parents[1] / "calvin_models" / "conf" / "annotations" / "new_playtable_validation.yaml"
        if not words.is_file():
            raise ValueError(f"{words}, the instructions, is missing: calvin_env must lie in a clone of "
                             f"CALVIN: {PARTS['calvin'][0]['calvin_env']}.")
        about = omega.OmegaConf.create({
            "seed": 0, "use_vr": False, "data_path": str(conf.parent / "data"),
            "robot": merge(load(conf / "robot/panda.yaml"), load(conf / "robot/panda_longer_finger.yaml")),
            "scene": load(conf / "scene/calvin_scene_D.yaml"), "env": load(conf / "env/play_table_env.yaml"),
            "cameras": {name: load(conf / f"cameras/cameras/{name}.yaml") for name in self.CAMERAS}})
        env = hydra.utils.instantiate(about.env, show_gui=False, use_vr=False, use_scene_info=True,
                                      use_egl=bool(os.environ.get("CALVIN_EGL")))
        judge = tasks.Tasks(load(conf / "tasks/new_playtable_tasks.yaml").tasks)
        return env, judge, {name: texts[0] for name, texts in load(words).items()}

    def _start(self):
        state, self.chain = calvin_sequences()[self.seed]
        if self.order == "sharded" or self.seed == 0:                 # nobody's traces, of no earlier run
            self._drop()
        self.kept[:] = self.kept or [self._build()]
        self.env, self.judge, self.texts = self.kept[0]
        robot, scene = calvin_layout(state)
        self.obs, self.solved = self.env.reset(robot_obs=robot, scene_obs=scene), 0
        self._next()

    def _next(self):
        self.began, self.before = self.count, self.env.get_info()
        self._say(self.texts[self.chain[self.solved]])

    def _step(self, action):
        self.obs, _, _, info = self.env.step(action)
        if self.judge.get_task_info_for_set(self.before, info, {self.chain[self.solved]}):
            self.solved += 1
            self.done = self.solved == len(self.chain)
            if not self.done:
                self._next()

    def _frame(self, camera):
        return np.ascontiguousarray(self.obs["rgb_obs"][f"rgb_{camera}"])          # the gripper's: 84 x 84

    def _feel(self):
        return self.obs["robot_obs"], self.obs["robot_obs"][:3]

    def camera(self, view):
        """The Camera of a view, by OpenGL's matrix: right, up, backwards."""
        name = self.cameras.get(view, self.CAMERAS[0])
        lens = next(lens for lens in self.env.cameras if lens.name == name)
        pose = np.reshape(lens.viewMatrix if name == "static" else lens.view_matrix, (4, 4)).T
        return Camera(-pose[:3, :3].T @ pose[:3, 3], pose[:3, :3] * [[1], [-1], [-1]], math.radians(lens.fov))

    def report(self):
        """The five tasks, and how many of them were done in a row."""
        return {"chain": list(self.chain), "solved": self.solved}

    def close(self):
        """Keep the environment for the next sequence, if that is the order."""
        if self.order == "sharded":
            self._drop()

    def _drop(self):
        for env, *_ in self.kept:
            env.close()
            env.ownsPhysicsClient = False                             # else it closes the next one's, too
        self.kept.clear()


SIMS = {"tabletop": Tabletop, "metaworld": MetaWorld, "libero": Libero, "simpler": Simpler,
        "simpler3": SimplerPort, "calvin": Calvin, "maniskill": ManiSkill}
# What a simulator consists of: {module: how it is installed}, one of these libraries: how they are.
_OPENGL = tuple(GL.values()), "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (or libosmesa6)"
_VULKAN = ("vulkan",), "apt-get install libvulkan1 mesa-vulkan-drivers (without a GPU: Mesa 25 or newer)"
_SIMPLER = ("git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv && git -C SimplerEnv "
            "checkout --recurse-submodules 4ab7178 && "
            "pip install -e SimplerEnv/ManiSkill2_real2sim -e SimplerEnv")
_CALVIN = ("git clone --recurse-submodules https://github.com/mees/calvin && git -C calvin checkout "
           "--recurse-submodules fa03f01 && pip install -e calvin/calvin_env pybullet==3.2.7 "
           "hydra-core==1.3.2 gym==0.26.2")
_MANISKILL = "pip install mani_skill==3.0.1 sapien==3.0.3"
PARTS = {
    "tabletop": ({"numpy": "pip install -e ."}, (), ""),
    "metaworld": (dict.fromkeys(("metaworld", "mujoco", "gymnasium", "packaging"), "pip install "
                                "metaworld==3.1.1 mujoco==3.3.0 gymnasium==1.4.0 packaging"), *_OPENGL),
    "libero": (dict.fromkeys(("libero", "robosuite", "bddl", "mujoco"), "pip install hf-libero==0.1.4 "
                             "mujoco==3.3.2; hf download lerobot/libero-assets --repo-type dataset "
                             "--local-dir ~/.cache/libero/assets"), *_OPENGL),
    "simpler": ({"sapien": "pip install sapien==2.2.2 'numpy<2'",
                 **dict.fromkeys(("mani_skill2_real2sim", "simpler_env"), _SIMPLER)}, *_VULKAN),
    "simpler3": (dict.fromkeys(("mani_skill", "sapien"), _MANISKILL + "; python -m "
                               "mani_skill.utils.download_asset bridge_v2_real2sim"), *_VULKAN),
    "calvin": (dict.fromkeys(("pybullet", "hydra", "gym", "quaternion", "git", "cv2", "calvin_env"), _CALVIN),
               (), ""),
    "maniskill": (dict.fromkeys(("mani_skill", "sapien"), _MANISKILL), *_VULKAN),
}
# Flags that not every simulator has a use for, and those that have one.
OWN_FLAGS = {"body": ("tabletop",), "fast_render": ("metaworld",), "image_size": ("tabletop", "metaworld"),
             "gripper": ("metaworld", "libero", "simpler", "simpler3", "calvin", "maniskill"),
             "order": ("libero", "calvin"), "env_seed": ("libero",), "limits": ("simpler", "simpler3")}
# Published success [%] of a method in a simulator, and where it stands; of other pairs: none is known.
_COGACT = {
    "source": "CogACT, paper's tables; WidowX with 120 steps", "google_vm/pick_coke_can": 91.3,
    "google_vm/move_near": 85.0, "google_vm/drawer": 71.8, "google_vm/apple_in_drawer": 50.9,
    "google_vm": 74.8, "google_va/pick_coke_can": 89.6, "google_va/move_near": 80.8, "google_va/drawer": 28.3,
    "google_va/apple_in_drawer": 46.6, "google_va": 61.3, "widowx/spoon_on_towel": 71.7,
    "widowx/carrot_on_plate": 50.8, "widowx/stack_cube": 15.0, "widowx/eggplant_in_basket": 67.5,
    "widowx": 51.3}
PUBLISHED = {
    "tabletop": "none: a simulator of this project",
    "metaworld": "none: no paper of the five methods has Meta-World",
    "maniskill": "none: no paper of the five methods has a success rate in ManiSkill 3",
    ("libero", "vla0"): {"source": "VLA-0, paper's Table I", "libero_spatial": 97.0, "libero_object": 97.8,
                         "libero_goal": 96.2, "libero_10": 87.6, "mean": 94.7},
    ("libero", "robobrain_x0"): {"source": "RoboBrain-X0, README's bars, +-0.1", "libero_spatial": 97.8,
                                 "libero_object": 99.4, "libero_goal": 96.2, "libero_10": 91.8, "mean": 96.3},
    ("simpler", "cogact"): _COGACT, ("simpler3", "cogact"): _COGACT | {
        "source": _COGACT["source"] + "; of the original SimplerEnv, not of the port"},
    ("calvin", "robovlms"): {"source": "RoboVLMs' README, KosMos, trained on ABC (on ABCD: 96.7, 93.0, 89.9, "
                             "86.5, 82.6; length 4.49)", "1 in a row": 98.0, "2 in a row": 93.6,
                             "3 in a row": 85.4, "4 in a row": 77.8, "5 in a row": 70.4, "mean": 70.4,
                             "length": 4.25}}
# What a method's publication does its own way, unless something else is asked for; stored with the results.
DEFAULTS = {("libero", "vla0"): {"env_seed": 7}, ("simpler", "cogact"): {"limits": "cogact"},
            ("simpler3", "cogact"): {"limits": "cogact"}}


# ---- Evaluation: many episodes at once, one batched inference for all that need a chunk -------------------

CONTROLS = ("swap", "blank", "random", "expert")
NO_MODEL = ("random", "expert")  # controls that act without one
FILM = 192                       # pixels per side of an episode in film.gif


def dataset_name(embodiment="gripper"):
    """What the recordings of a body, and their statistics, are called: tabletop, tabletop_dual."""
    return "tabletop" + f"_{embodiment}" * (embodiment != "gripper")


def wilson(k, n, z=1.96):
    """The 95 % Wilson interval of k successes in n episodes, (low, high) in [0, 1]."""
    if n == 0:
        return 0.0, 1.0
    p, centre = k / n, (k / n + z * z / 2 / n) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _world(seed, family, split, control, sim, settings):
    """An environment at the start of an evaluation episode."""
    env = SIMS[sim]((family,), split, **settings)
    env.lay_out(seed)
    if control == "swap":
        env.swap()
    return env


def _look(env, control):
    """What the policy gets to see."""
    seen = env.observe()
    if control == "blank":
        seen["images"] = {view: np.zeros_like(picture) for view, picture in seen["images"].items()}
    return seen


class Tape:
    """What is recorded of an episode while it is played: what was seen and done."""

    def __init__(self, env):
        self.env, self.seen, self.done, self.path = env, [], [], []

    def add(self, seen, action):
        """seen: an observation, as from `observe`; action: what is done next."""
        action = action if isinstance(self.env, Tabletop) else self.env.played(action)
        self.seen.append(seen)
        self.done.append(np.asarray(action, np.float32))
        self.path.append(self.env.track())

    def episodes(self, families):
        """What LeRobotWriter.add takes, a dict for each instruction in turn (most have one), of N steps:
        images, actions, state, instruction, and as features waypoints (N, 10), as in a sample; each camera's
        intrinsics (N, 9), extrinsics (N, 16), as observed; seed (N,) and family (N,), a number in `families`.
        """
        env, steps = self.env, zip(self.seen, self.done, self.path)
        for instruction, part in groupby(steps, lambda step: step[0]["instruction"]):
            seen, done, path = zip(*part)
            n, images, matrices = len(done), {}, {}
            for view in env.views:
                images[view] = np.stack([one["images"][view] for one in seen])
                for what in ("intrinsics", "extrinsics"):
                    matrices[f"{view}.{what}"] = np.stack([one[what][view].ravel() for one in seen])
            yield {"images": images, "actions": np.stack(done), "instruction": instruction,
                   "state": np.stack([one["state"] for one in seen]),
                   "waypoints": waypoints_of(env, path).reshape(n, 10), **matrices,
                   "seed": np.full(n, env.seed), "family": np.full(n, families.index(env.family))}


def _session(env, model, method, unnorm_key, execute):
    """A Policy for this environment; of a method that knows its robot, one that acts as that wants it."""
    robot = getattr(env, "robot", "")
    env.native = robot in getattr(method, "ROBOTS", ())
    if robot == "google_robot" and not env.native:
        raise ValueError("Google's robot has a relative gripper: only cogact and robovlms drive it.")
    how = {"robot": robot} if env.native else {}
    return method.Policy(model, unnorm_key=unnorm_key, execute=execute, **how)


def run_wave(jobs, model, method, split, control="", unnorm_key=None, execute=None, film=None,
             tick=lambda: None, embodiment="gripper", sim="tabletop", settings={}, tapes=None, **act):
    """Play the episodes `jobs` = [(seed, family), ...] side by side; model None: control random or expert.

    film: {number in jobs: []}, each gets its episode's pictures (FILM, FILM, 3). tick: called when an episode
    ends. sim, settings: which of SIMS, and more of its arguments. tapes: a list that gets every job's Tape.
    act: more keywords for model.act. Returns a dict per job: task, seed, success, steps, instruction (what
    the policy was told), parse_failed (how many unreadable outputs). Of a model that says what it does
    (info["subtasks"]) also said, [right, all]; of two goals: goals, reached (see Tabletop) and, of a model
    that says when it is done (info["finished"]), finished: asked after the success.
    """
    settings = {"views": (), **settings, "embodiment": embodiment}
    if model is not None:
        settings |= {"views": model.cfg.views, "image_size": model.cfg.image_size}
    envs = [_world(seed, family, split, control, sim, settings) for seed, family in jobs]
    policies = [_session(env, model, method, unnorm_key, execute) for env in envs] if model else []
    chance, film = [np.random.default_rng([env.seed, 3]) for env in envs], film or {}
    if tapes is not None:
        tapes += [Tape(env) for env in envs]
    rows, failed, said, live = {}, [0] * len(envs), [[] for _ in envs], list(range(len(envs)))
    while live:
        need = [i for i in live if policies and policies[i].needs_chunk]
        seen, chunks = {i: _look(envs[i], control) for i in (need if tapes is None else live)}, {}
        if need:
            out, info = model.act([policies[i].ask(seen[i]) for i in need], unnorm_key=unnorm_key, **act)
            chunks = dict(zip(need, out))                              # (T, A) each
            if any(info.get("subtasks", ())):
                for i, sentence in zip(need, info["subtasks"]):
                    said[i] += [sentence == right for right in [envs[i].expert()[1]] if right is not None]
            for i, bad in zip(need, info.get("parse_failed", [])):
                failed[i] += bool(bad)
                policies[i].parse_failed = bool(bad)                   # vla0's averages no such chunk
        for i in list(live):
            env = envs[i]
            if policies:                                              # no picture: its queue is not empty
                action = policies[i].step(seen.get(i) or env.told(), chunks.get(i))
            else:
                action = env.random_action(chance[i]) if control == "random" else env.expert()[0]
            if i in film and env.count % env.film_every == 0:
                points = getattr(policies[i], "points", None) if policies else None
                film[i].append(with_points(env.picture("third", FILM, FILM)[0], points))
            if tapes is not None:
                tapes[i].add(seen[i], action)
            told = env.instruction
            env.advance(action)
            if policies and env.instruction != told:                  # CALVIN's next of five: begin anew
                policies[i].reset()
            if not env.success() and env.count < env.max_steps:
                continue
            live.remove(i)
            rows[i] = {"task": env.family, "seed": env.seed, "success": env.success(), "steps": env.count,
                       "instruction": env.instruction, "parse_failed": failed[i],
                       **(env.report() if isinstance(env, Bench) else {})}
            if said[i]:
                rows[i]["said"] = [sum(said[i]), len(said[i])]
            if len(env.goals) > 1:
                rows[i] |= {"goals": [goal.family for goal in env.goals], "reached": env.reached}
                if policies and env.success():
                    info = model.act([policies[i].ask(_look(env, control))], unnorm_key=unnorm_key, **act)[1]
                    rows[i] |= {"finished": bool(end) for end in info.get("finished", ())}
            if i in film:
                film[i] += [env.picture("third", FILM, FILM)[0]] * 3  # a longer look
            env.close()
            tick()
    return [rows[i] for i in range(len(jobs))]


def _play(wave, model, method, seed, filmed, record, start, tick=lambda: None, **how):
    """A wave (number of its first job, jobs) -> its rows, {family: film}, [what LeRobotWriter adds, ...]."""
    first, jobs = wave
    if model is not None:
        import torch
        torch.manual_seed(seed + first)                               # whoever plays it, and whenever
    film = {i: [] for i in range(len(jobs)) if first + i in filmed}
    tapes = [] if record else None
    rows = run_wave(jobs, model, method, film=film, tapes=tapes, tick=tick, **how)
    rows, taped = [{"episode": i, **row} for i, row in enumerate(rows, start + first)], []
    for row, tape in zip(rows, tapes or ()):                          # a demonstration that fails is not one
        new = [*tape.episodes(record)] if row["success"] or how["control"] != "expert" else []
        row["recorded"], taped = len(new), taped + new
    return rows, {jobs[i][1]: np.stack(frames) for i, frames in film.items()}, taped


LOADED = []                      # of a worker process: its model and method


def _play_in_worker(load, how, wave):
    if how["control"] in NO_MODEL:
        return _play(wave, None, None, **how)
    LOADED[:] = LOADED or load()
    return _play(wave, *LOADED, **how)


def _journal(path, about, waves):
    """Cut the journal of an interrupted evaluation `about` the same to its whole waves; return their rows.

    The journal of a finished evaluation (its results are not older), of another one, or of one that is
    played in one go, is begun anew.
    """
    from common import atomic_write
    from tqdm import tqdm
    rows, head = [], json.dumps(about)
    results = path.with_name(f"results{path.stem.removeprefix('episodes')}.json")
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        found, *lines = text.split("\n")[:-1] or [""]                 # no torn last line
        for first, jobs in waves if found == head else ():
            with suppress(ValueError):
                part = [json.loads(line) for line in lines[first:first + len(jobs)]]
                whole = [row for row in part if isinstance(row, dict) and "success" in row]
                rows += part if len(whole) == len(jobs) else []
        if len(rows) == sum(len(jobs) for _, jobs in waves):
            if results.is_file() and results.stat().st_mtime_ns >= path.stat().st_mtime_ns:
                rows = []
        elif found != head and lines:
            tqdm.write(f"{path}: {len(lines)} episodes of an evaluation with other settings or versions are "
                       "overwritten, its results, too; another --out keeps both.")
        elif rows and _in_one_go(about["suite"], about["settings"]):
            tqdm.write(f"--order official: CALVIN's one environment remembers the sequences before, so the "
                       f"{len(rows)} that were played before the interruption are played again.")
            rows = []
    text = "".join(f"{line}\n" for line in [head, *map(json.dumps, rows)])
    atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))
    return rows


def _write_arrays(arrays, path):
    with open(path, "wb") as file:                                    # of a name alone, numpy makes another
        np.savez(file, **arrays)


def _play_all(waves, play, about, out, writer, bar):
    """Play the waves that the journal in `out` lacks: (rows of all, {family: film}).

    play: waves -> what `_play` returns of each, in order; writer: a LeRobotWriter, or None; bar: tqdm's.
    """
    from common import atomic_write
    rows, film, tail = [], {}, _tail(about)
    if out:
        journal, reel = out / f"episodes{tail}.jsonl", out / f".film{tail}.npz"
        rows = _journal(journal, about | {"of": bar.total, "recorded": writer is not None}, waves)
        if rows and reel.is_file():
            with np.load(reel) as found:
                film = dict(found)
    bar.n = bar.initial = len(rows)
    done = sum(row.get("recorded", 0) for row in rows)
    if writer is not None and len(writer) < done:
        raise ValueError(f"{writer.folder} holds {len(writer)} episodes, of {done} that were recorded before "
                         f"the interruption. Delete {journal} to begin anew.")
    for new, reels, episodes in play([wave for wave in waves if wave[0] >= len(rows)]):
        for done, episode in enumerate(episodes, done + 1):
            if done > len(writer):
                writer.add(**episode)
        rows, film = rows + new, film | reels
        if out and reels:
            atomic_write(reel, partial(_write_arrays, film))
        if out:
            with open(journal, "a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(row)}\n" for row in new))
                file.flush()
                os.fsync(file.fileno())
        bar.update(len(rows) - bar.n)
        bar.set_postfix_str(f"{sum(row['success'] for row in rows)} of {len(rows)} succeed")
    return rows, film


def _writer(folder, about, model):
    from data import LeRobotWriter
    size = about["settings"].get("image_size", 64) if model is None else model.cfg.image_size
    if np.any(np.mod(size, 2)):
        raise ValueError(f"--record: pictures of {size} pixels; a video wants even numbers. Choose others.")
    fps = SIMS[about["suite"]](about["families"], embodiment=about["embodiment"]).fps
    general = {*made_with(""), "MUJOCO_GL"}                           # the simulator's own versions count
    made_from = about | {"made_with": {k: x for k, x in about["made_with"].items() if k not in general}}
    return LeRobotWriter(folder, fps, f"{about['suite']}, {about['embodiment']}", made_from=made_from)


def evaluate(model, method, families=DEFAULT_FAMILIES, episodes=200, split="eval", start=0, batch=64,
             control="", unnorm_key=None, execute=None, seed=0, out=None, progress=True, checkpoint=None,
             embodiment="gripper", sim="tabletop", settings={}, record=None, workers=0, load=None, **act):
    """Closed-loop success of `model` over `episodes` unseen episodes; `families` take turns.

    model, method: a model and its module; may be None with control "random" or "expert". start: the split's
    first episode to play. batch: episodes side by side. control: "swap" (the instruction names something
    else), "blank" (black pictures), "random", "expert". seed: of torch's generator, for the model's noise
    (which episode gets which depends on `batch`). out: folder for results.json, film.gif and episodes.jsonl
    (of another simulator, body, control: results-SIM-BODY-CONTROL.json); from the last, an evaluation that
    was killed goes on, to the same numbers. checkpoint: what the results should say of it, as from `origin`.
    embodiment: one of BODIES; unnorm_key, if not given: with another than the first, or where the model has
    several statistics, `dataset_name`. sim: one of SIMS; settings: more of its arguments. record: folder for
    the episodes as a LeRobot v3.0 set (of the expert's: those that succeed). workers: processes that play,
    each with the (model, method) that load() gives; 0: this one. act: more keywords for model.act. Returns
    what results.json holds: success and its interval (Wilson, 95 %), the same for each task, every episode,
    settings, versions. ValueError, before the first episode, for what does not fit.
    """
    from tqdm import tqdm
    model, world = None if control in NO_MODEL else model, SIMS[sim]
    who = getattr(method, "__name__", "")
    settings = {key: x for key, x in (DEFAULTS.get((sim, who), {}) | settings).items()
                if key != "gripper" or model is not None}
    if world is not Tabletop:
        points = world is MetaWorld and model is not None and method.PREDICTS == "waypoints"
        embodiment = "arm" if points else getattr(world, "body", "sawyer")
    unnorm_key = _unnorm_key(world, families, settings, embodiment, model, method, unnorm_key, execute)
    if model is None and control not in NO_MODEL:
        raise ValueError("there is no model to evaluate; without one, control is random or expert.")
    _check(sim, families, episodes, split, start, batch, control, embodiment, settings, workers)
    if model is not None:
        _check_model(model, method, families, split, unnorm_key, execute, embodiment, sim, settings)
    out, record = out and Path(out), record and Path(record)
    for flag, folder in (("--out", out), ("--record", record)):
        if folder:
            claim(folder, flag)
    execute = execute or model.cfg.execute if model is not None else execute
    jobs, begin = world.jobs(families, episodes, split, start), time.time()
    waves = [(i, jobs[i:i + batch]) for i in range(0, episodes, batch)]
    firsts = {family: i for i, (_, family) in reversed([*enumerate(jobs)])}                 # of each family
    filmed = sorted(firsts.values())[:10] if out and (model or record or world is Tabletop) else ()
    known = PUBLISHED.get((sim, who), PUBLISHED.get(sim, "not measured by its authors"))
    about = {"suite": sim, "version": VERSION, "split": split, "families": list(families),
             "embodiment": embodiment, "control": control, "start": start, "seed": seed, "batch": batch,
             "execute": execute, "unnorm_key": unnorm_key, "act": act, "settings": settings,
             "checkpoint": checkpoint, "made_with": made_with(getattr(model, "device", "cpu"), sim)}
    how = dict(seed=seed, filmed=filmed, record=record and list(families), start=start, split=split, sim=sim,
               control=control, unnorm_key=unnorm_key, execute=execute, embodiment=embodiment,
               settings=settings, **act)
    writer = record and _writer(record, about, model)
    with tqdm(total=episodes, desc=f"episodes ({control})" if control else "episodes",
              disable=not progress) as bar:
        def play(waves):
            if not workers:
                return (_play(wave, model, method, tick=bar.update, **how) for wave in waves)
            from data import _in_processes
            return _in_processes(partial(_play_in_worker, load, how), waves, workers)
        rows, film = _play_all(waves, play, about, out, writer, bar)
    if writer:
        writer.close()
    results = about | {**summary(rows, families), "seconds": round(time.time() - begin, 1), "episodes": rows,
                       "published": known}
    if out:
        save(results, film, out)
    return results


def _unnorm_key(world, families, settings, embodiment, model, method, unnorm_key, execute):
    """Whose statistics undo the normalization: those asked for; the body's own, the robot's."""
    if unnorm_key is not None or model is None:
        return unnorm_key
    if issubclass(world, Bench):
        session = _session(world(families, **settings), model, method, None, execute)
        return getattr(session, "unnorm_key", None)
    name = dataset_name(embodiment) if world is Tabletop else world.suite
    several = len(model.stats or ()) > 1 and name in model.stats
    return name if embodiment in BODIES[1:] or several else None


def _in_one_go(sim, settings):
    """Do episodes hang on those before them, so that one process plays all, from the first on?"""
    return sim == "calvin" and settings.get("order") == "official"


def _check(sim, families, episodes, split, start, batch, control, embodiment, settings, workers):
    """Everything that can be wrong is wrong now: before a model is loaded, not after the first bar."""
    if control and control not in CONTROLS:
        raise ValueError(f"control={control!r}: choose one of {', '.join(CONTROLS)}.")
    if episodes < 1 or batch < 1:
        raise ValueError(f"episodes={episodes}, batch={batch}: both must be at least 1.")
    if sim == "tabletop" and embodiment not in BODIES:
        raise ValueError(f"embodiment={embodiment!r}: episodes are played by {' or '.join(BODIES)}.")
    env = SIMS[sim](families, split, **settings)
    if isinstance(env, Bench) and control == "expert":
        raise ValueError(f"{env.title} has no expert; --control random, or a checkpoint.")
    if sim == "calvin" and batch > 1:
        raise ValueError(f"batch={batch}: of CALVIN one sequence at a time is played in a process; --workers "
                         "plays several.")
    if _in_one_go(sim, settings) and workers > 1:
        raise ValueError(f"--order official --workers {workers}: CALVIN's one environment remembers the "
                         "sequences before, so one process plays all; leave out --workers, or --order.")
    env.jobs(families, episodes, split, start)
    env._ready()


def _check_model(model, method, families, split, unnorm_key, execute, embodiment, sim, settings):
    from common import pick_stats
    seen = {"views": model.cfg.views, "image_size": model.cfg.image_size}
    env = SIMS[sim](families, split, **settings | seen, embodiment=embodiment)
    if method.PREDICTS == "actions":
        pick_stats(model.stats, unnorm_key)
    elif isinstance(env, Bench):
        raise ValueError(f"{method.__name__} predicts points, {env.title} wants actions: it is played in "
                         "tabletop or metaworld.")
    _session(env, model, method, unnorm_key, execute)


def summary(rows, families):
    """Rates with their Wilson intervals: over all rows, and per family; of two goals also the order."""
    def rate(rows):
        wins = sum(r["success"] for r in rows)
        return {"success": wins / max(len(rows), 1), "interval": wilson(wins, len(rows))}
    by_task = {f: [r for r in rows if r["task"] == f] for f in families}
    return {**rate(rows), "tasks": {f: {**rate(mine), "episodes": len(mine)} for f, mine in by_task.items()},
            "mean_steps": round(float(np.mean([r["steps"] for r in rows])), 1),
            "parse_failed": sum(r["parse_failed"] for r in rows), **_decomposition(rows),
            **_averages(rows, by_task)}


def _averages(rows, by_task):
    """Of tasks GROUP/NAME: each group's mean of its tasks' rates. Of CALVIN's: 1 to 5 in a row, length."""
    groups, out = {}, {}
    for task, mine in by_task.items():
        if "/" in task and mine:
            groups.setdefault(task.split("/")[0], []).append(float(np.mean([r["success"] for r in mine])))
    if groups:
        out["averages"] = {group: float(np.mean(rates)) for group, rates in groups.items()}
    if solved := [r["solved"] for r in rows if "solved" in r]:
        out["averages"] = {f"{n} in a row": float(np.mean([k >= n for k in solved])) for n in range(1, 6)}
        out["length"] = float(np.mean(solved))
    return out


def _decomposition(rows):
    """Of two goals: shares of episodes that reach the first, both, and of these in order; of the successes of
    a model that says when it is done: where it does. Of a model that names sub-tasks: those right."""
    def share(found):
        return float(np.mean(found)) if len(found) else 0.0
    pairs, out = [r for r in rows if "reached" in r], {}
    said, ended = [r["said"] for r in rows if "said" in r], [r["finished"] for r in pairs if "finished" in r]
    if pairs:
        out["goals"] = {"first": share([0 in r["reached"] for r in pairs]),
                        "both": share([len(r["reached"]) == 2 for r in pairs]),
                        "in_order": share([r["reached"] == [0, 1] for r in pairs if len(r["reached"]) == 2])}
        out["goals"] |= {"finished": share(ended)} if ended else {}
    return out | ({"subtasks_right": float(np.divide(*np.sum(said, axis=0)))} if said else {})


def origin(ckpt):
    """A checkpoint's path, and the sha256 of its weights file (None: it is a hub id)."""
    path, digest = Path(ckpt), hashlib.sha256()
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        return {"path": str(ckpt), "sha256": None}
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"path": str(ckpt), "sha256": digest.hexdigest()}


_packages = lru_cache(packages_distributions)                         # of modules: PIL is Pillow's


def made_with(device, sim="tabletop"):
    """Versions, commit ("-dirty": changed since; "": not a git checkout) and hardware, for the record.

    sim: whose packages, and commits of clones, are named, too; of MuJoCo also what it draws with.
    """
    modules, names = PARTS[sim][0], _packages() if issubclass(SIMS[sim], Bench) else {}
    found = {"python": platform.python_version()}
    found |= {"MUJOCO_GL": os.environ.get("MUJOCO_GL")} if "mujoco" in modules else {}
    for name in ("torch", "transformers", "numpy", "pillow", *modules):
        name = names.get(name, [name])[0]
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    for name in {"mani_skill2_real2sim", "calvin_env"} & {*modules}:
        if file := getattr(sys.modules.get(name), "__file__", None):
            found[f"{name}'s commit"] = _commit(Path(file).resolve().parents[1])
    commit = _commit(Path(__file__).resolve().parent)
    return {**found, "commit": commit, "hardware": f"{device}, {platform.machine()}, {os.cpu_count()} cores"}


def _commit(here):
    git = ["git", "--no-optional-locks", f"--git-dir={here / '.git'}", f"--work-tree={here}"]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git + describe, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):                      # no git here: nothing to record
        return ""


def claim(out, flag="--out"):
    """Check that results can be written into `out` before the work, not after it. Leaves nothing behind."""
    folder = out = Path(out)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{flag} {out}: {folder} is a file; the results need a folder, choose another.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ValueError(f"{flag} {out}: {folder} cannot be written ({e.strerror}); choose another.") from e


def _tail(about):
    """What joins the names of result files: another simulator, another body, the control."""
    sim = about["suite"] != "tabletop" and about["suite"]
    body = about["embodiment"] in BODIES[1:] and about["embodiment"]
    return "".join(f"-{x}" for x in (sim, body, about["control"]) if x)


def save(results, film, out):
    """results.json (whole or absent) and film.gif in `out`; simulator, body and control join their names."""
    from common import atomic_write, write_json
    tail = _tail(results)
    try:
        write_json(out / f"results{tail}.json", results)
        if film:
            atomic_write(out / f"film{tail}.gif", lambda part: write_film(film, results, part))
        (out / f".film{tail}.npz").unlink(missing_ok=True)
    except OSError:
        print_table(results)                                          # a full disk: the numbers are not lost
        raise


def with_points(picture, points):
    """A copy of an uint8 (h, w, 3) picture with a path of points (n, 2) in [0, 1], the first one ringed.

    points None: a method that predicts none, and the picture itself.
    """
    if points is None:
        return picture
    page = Image.fromarray(picture)
    draw, path = ImageDraw.Draw(page), [(float(u) * page.width, float(v) * page.height) for u, v in points]
    draw.line(path, fill=(0, 255, 90), width=2)
    draw.circle(path[0], 4, outline=(255, 0, 0), width=2)
    return np.asarray(page)


def write_film(film, results, path):
    """One GIF: an episode of each family side by side, with its instruction, in the simulator's own time.

    film: {family: uint8 (n, FILM, FILM, 3)}; results: where its first episode is found.
    """
    world, told = SIMS[results["suite"]], {}
    for row in results["episodes"]:
        told.setdefault(row["task"], (row["instruction"], row["success"]))
    film = {family: (*told[family], film[family]) for family in results["families"] if family in film}
    length = max(len(frames) for *_, frames in film.values())
    pages = []
    for k in range(length):
        page = Image.new("RGB", ((FILM + 4) * len(film), FILM + 30), "white")
        for j, (instruction, success, frames) in enumerate(film.values()):
            page.paste(Image.fromarray(frames[min(k, len(frames) - 1)]), ((FILM + 4) * j, 0))
            words = instruction.split()
            half = (len(words) + 1) // 2 if len(instruction) > 30 else len(words)
            text = " ".join(words[:half]) + "\n" + " ".join(words[half:])
            text += " [done]" if success and k >= len(frames) - 3 else ""
            ImageDraw.Draw(page).multiline_text(((FILM + 4) * j + 2, FILM + 1), text, fill="black", spacing=1)
        pages.append(page.quantize(64))
    pages[0].save(path, "GIF", save_all=True, append_images=pages[1:], duration=world.film_ms, loop=0)


def _lines(results):
    """{name: (rate, interval or None, episodes)} of a table: its tasks, groups of them, all."""
    rows = {name: (r["success"], r["interval"], r["episodes"]) for name, r in results["tasks"].items()}
    rows |= {name: (rate, None, "") for name, rate in results.get("averages", {}).items()}
    return rows | {"mean": (results["success"], results["interval"], len(results["episodes"]))}


def _known(results):
    """What is published on what was played: on a group of tasks, or all, if none of them is missing."""
    if results["control"] or not isinstance(results["published"], dict):
        return {}
    world, played = SIMS[results["suite"]], {*results["families"]}
    groups = world.SETS | {"mean": world.SETS[world.default]}
    return {name: x for name, x in results["published"].items() if {*groups.get(name, ())} <= played}


def print_comparison(found):
    """Several checkpoints side by side. found: {name: results of `evaluate`}."""
    lines = {name: _lines(results) for name, results in found.items()}
    tasks = list(next(iter(lines.values())))
    wide, columns = max(map(len, tasks)), [max(8, len(name)) for name in found]
    print(f"\n{'success':<{wide}} " + " ".join(f"{name:>{n}}" for name, n in zip(found, columns)))
    for task in tasks:
        rates = (f"{lines[name][task][0]:>{n}.1%}" for name, n in zip(found, columns))
        print(f"{task:<{wide}} " + " ".join(rates))


def print_table(results):
    """The results of `evaluate`, a line per task family."""
    control = f", body {results['embodiment']}" if results["embodiment"] in BODIES[1:] else ""
    control += f", control: {results['control']}" if results["control"] else ""
    wide = max(8, *map(len, results["tasks"]))
    known = _known(results)
    print(f"\n{'task':<{wide}} {'success':>8} {'95 % interval':>16} {'episodes':>9} "
          + "  published" * bool(known) + f"  {results['suite']}, split {results['split']}{control}")
    for name, (rate, interval, n) in _lines(results).items():
        low, high = interval or (0, 0)
        print(f"{name:<{wide}} {rate:>7.1%} {f'{low:.1%} .. {high:.1%}' if interval else '':>16} {n:>9} "
              + (f"{known.get(name, '-'):>11}" if known else ""))
    if results["suite"] != "tabletop" and not results["control"]:
        print(f"published: {known.get('source') or results['published']}")
    if "length" in results:
        print(f"average length {results['length']:.2f}" + f", published {known.get('length')}" * bool(known))
    print(f"mean steps {results['mean_steps']}, {results['seconds']} s"
          + (f", {results['parse_failed']} unreadable outputs" if results["parse_failed"] else "")
          + (f", sub-tasks right {results['subtasks_right']:.1%}" if "subtasks_right" in results else ""))
    if "goals" in results:
        shares = (f"{what.replace('_', ' ')} {rate:.1%}" for what, rate in results["goals"].items())
        print(f"two goals: {', '.join(shares)}")


# ---- Command line -----------------------------------------------------------------------------------------

def flags():
    """The command line's flags, as a Parser."""
    from common import METHODS, Parser, within
    p = Parser(__doc__, prog="eval_sim.py")

    what = p.add_argument_group("what")
    what.add_argument("--ckpt", nargs="+", help="checkpoint to evaluate: our folder, an official release, or "
                      "a hub id; several: one after the other, and a table of all")
    what.add_argument("--model", choices=METHODS, help="its method (default: what its config.json says)")
    what.add_argument("--preset", help="preset of an official checkpoint that does not name its own")
    what.add_argument("--control", choices=(*CONTROLS, "all"),
                      help="swap: instruction of another object; blank: black pictures; random: random "
                           "actions; expert: the scripted one; all: plain, then swap, blank and random")
    what.add_argument("--expert", action="store_true", help="as --control expert")
    what.add_argument("--replay", metavar="SET", help="play recorded actions in a fresh world and compare: "
                      "tabletop (the expert, recorded now), a folder that data.py made, or one of --record")
    what.add_argument("--check", action="store_true", help="is the simulator there? Versions, what is "
                      "missing and how it is installed; one picture, a few steps")

    sim = p.add_argument_group("simulator")
    sim.add_argument("--sim", choices=SIMS, help="which simulator (default: tabletop); simpler3: "
                     "SimplerEnv's tasks of the WidowX in ManiSkill 3")
    sim.add_argument("--families", "--tasks", dest="families", help="tabletop: all, or some of "
                     f"{','.join(FAMILIES + PAIRS)} (default: {','.join(DEFAULT_FAMILIES)}; all: the six of "
                     "one goal). metaworld: mt10 (default), mt50, or names, as reach,door-open. libero: "
                     "libero (default: four suites), one, libero_90, or names, as libero_goal/3. simpler: "
                     "widowx (default), google_vm, google_va, or names, as widowx/stack_cube. maniskill: "
                     "default, all, or names")
    sim.add_argument("--body", choices=BODIES, help="gripper (default): one arm; dual: two")
    sim.add_argument("--split", choices=SPLITS, help="eval (default): unseen scenes; hard: also unseen "
                     "colour-shape pairs, phrasings and camera pose; metaworld: eval, train, val")
    sim.add_argument("--episodes", type=within(1, 10**6), help="how many in all (default: 200; metaworld: 10 "
                     "per task; others: all that the benchmark has)")
    sim.add_argument("--batch", type=within(1), help="episodes played side by side (default: 64; metaworld, "
                     "libero: 10, calvin: 1, others: 4)")
    sim.add_argument("--workers", type=within(1), help="processes that play (default: only this one); the "
                     "numbers are those of one")
    sim.add_argument("--fast-render", action="store_true", default=None, help="metaworld: no shadows, no "
                     "smooth edges, eight times as fast; not the official pictures")
    sim.add_argument("--gripper", choices=("openvla",), help="of a model trained with --data "
                     "lerobot=DIR,gripper=openvla (1 = open, 0 = closed)")
    sim.add_argument("--order", choices=ORDERS, help="libero, calvin: sharded (default), every episode by "
                     "itself; official: after those before it, as the official scripts do (calvin: in one "
                     "process, in one go)")
    sim.add_argument("--env-seed", type=within(0), help="libero: of fixtures' places (default: 0, vla0: 7)")
    sim.add_argument("--limits", choices=LIMITS, help="simpler, simpler3: stock step limits, or cogact's "
                     "(its default): 120 for all of the WidowX")
    sim.add_argument("--views", help="cameras that are recorded without a model (default: third)")
    sim.add_argument("--image-size", type=within(2), help="their pixels per side (default: tabletop 64, "
                     "metaworld 224)")

    policy = p.add_argument_group("policy")
    policy.add_argument("--unnorm-key", help="whose action statistics to use; needed if there are several")
    policy.add_argument("--execute", type=within(1), help="actions played per chunk (default: the preset's)")
    policy.add_argument("--tokenizer", help="tokenizer folder or hub id, if the checkpoint has none")
    policy.add_argument("--seed", type=within(0), help="seed of the noise that the model draws (default: 0)")
    policy.add_argument("--device", help="auto (default), cpu, cuda, mps, ...")
    policy.add_argument("--attn", help="attention kernel: auto (default), flash, sdpa, eager")
    policy.add_argument("--graphs", action="store_true", default=None, help="act by CUDA graphs")
    policy.add_argument("--int8", action="store_true", default=None, help="vla0, robobrain_x0, on a "
                        "CPU: write with matrices of 8 bits: sooner if large, and not the same numbers")

    output = p.add_argument_group("output")
    output.add_argument("--out", type=Path, help="folder for results.json and film.gif (default: CKPT/eval, "
                        "or ./eval when CKPT is no folder)")
    output.add_argument("--record", metavar="DIR", type=Path, help="write the episodes as a LeRobot v3.0 "
                        "set, for train.py --data lerobot=DIR (of the expert: those that succeed)")
    return p


def parse(argv=None):
    """Flags -> checked arguments. One that the run would ignore is an error."""
    a = flags().parse_args(argv)
    policy = ("model", "preset", "unnorm_key", "execute", "tokenizer", "seed", "device", "attn",
              "graphs", "int8")
    a.control = "expert" if a.expert and not a.control else a.control
    if a.expert and a.control != "expert":
        raise ValueError(f"--expert and --control {a.control}: give one of them.")
    plays, drawn = ("ckpt", "control", "batch", "record", "workers", *policy), ("views", "image_size")
    asked, a.sim = a.sim, a.sim or "tabletop"
    idle = [(f"--sim {a.sim}", [name for name in OWN_FLAGS if a.sim not in OWN_FLAGS[name]])]
    if a.check:
        idle += [("--check", (*plays, "replay", "families", "split", "body", "episodes", "views", "gripper"))]
    elif a.replay:
        chosen = () if a.replay == "tabletop" else ("families", "split", "body")
        idle += [(f"--replay {a.replay}", (*plays, "out", "fast_render", "gripper", *drawn, *chosen))]
    elif a.control in NO_MODEL:
        unseen = () if a.record else (*drawn, "fast_render")
        idle += [(f"--control {a.control}", ("gripper", *policy, *unseen))]
    else:
        idle += [("an evaluation of --ckpt", drawn), ("--control all", ("record",) * (a.control == "all")),
                 ("several --ckpt", ("record",) * (len(a.ckpt or ()) > 1))]
    if a.replay and asked and not a.check:
        raise ValueError(f"--replay {a.replay} has no use for --sim; leave it out.")
    for run, names in idle:
        if given := [name for name in names if getattr(a, name) is not None]:
            raise ValueError(f"{run} has no use for --{given[0].replace('_', '-')}; leave it out.")
    if not (a.ckpt or a.replay or a.check or a.control in NO_MODEL):
        raise ValueError("--ckpt is missing: which checkpoint should be evaluated? (Only --replay, --check "
                         f"and --control {' or '.join(NO_MODEL)} need none.)")
    world, a.ckpt = SIMS[a.sim], list(dict.fromkeys(a.ckpt or ()))
    for name, default in (("split", "eval"), ("batch", world.BATCH), ("seed", 0), ("device", "auto"),
                          ("attn", "auto"), ("control", ""), ("workers", 0), ("families", world.default),
                          ("body", BODIES[0])):
        setattr(a, name, default if getattr(a, name) is None else getattr(a, name))
    suffix = "-v3" if world is MetaWorld else ""
    a.families = tuple(dict.fromkeys(one for name in a.families.split(",")
                                     for one in world.SETS.get(name, (name.removesuffix(suffix),))))
    given = {"views": a.views and tuple(a.views.split(",")), "image_size": a.image_size,
             **{name: getattr(a, name) for name in OWN_FLAGS if name not in ("body", "image_size")}}
    if a.record and a.control in NO_MODEL:
        given |= {"views": given["views"] or ("third",)}
    a.settings = {name: value for name, value in given.items() if value is not None}
    world(a.families, a.split, **a.settings)                          # an unknown family is an error here
    a.episodes = a.episodes or (200 if world is Tabletop else sum(map(world.count_of, a.families)))
    return a


def find_method(ckpt, model=None):
    """The module of a checkpoint's method (`model`: of one that does not say)."""
    from common import METHODS, choose, method_of
    name = method_of(ckpt, model)
    choose(f"{ckpt} is of a method that is not here,", name, METHODS)    # never import what a download names
    return importlib.import_module(name)


def load_model(a, method, ckpt, **how):
    """A checkpoint's model as --preset, --tokenizer, --attn, --device, --graphs and --int8 say."""
    import torch
    from common import Graphs, captured, device
    where = device(a.device)
    if a.graphs and where.type != "cuda":
        raise ValueError(f"--graphs: CUDA graphs need a CUDA device, this is {where}; leave it out.")
    if a.int8 and where.type == "cuda":
        raise ValueError("--int8 is for a CPU: torch's GPU kernel is no faster than bf16; leave it out.")
    if a.int8 and not hasattr(method.Config, "int8"):
        raise ValueError("--int8 is for methods that write actions word by word, vla0 and robobrain_x0; "
                         f"{method.__name__} does not: leave it out.")
    gc.collect()                                                      # graphs hold the model before this one
    model = method.from_pretrained(ckpt, preset=a.preset, tokenizer=a.tokenizer, attn=a.attn, device=where,
                                   **how, **({"int8": True} if a.int8 else {}))
    if a.graphs:
        model.graphs = Graphs(partial(captured, stream=torch.cuda.Stream(where)))
    return model


def other_gripper(a, ckpt):
    """A warning if a checkpoint of train.py learned another meaning of the gripper than it is asked for."""
    from common import read_json
    told, data = Path(ckpt, "training_state", "run.json"), ""
    with suppress(ValueError, KeyError, TypeError, OSError):
        data = str(read_json(told)["args"]["data"]) if told.is_file() else ""
    learned, asked = "gripper=openvla" in data, a.gripper == "openvla"
    if a.sim == "tabletop" or not data or learned == asked:
        return ""
    return (f"warning: {ckpt} was trained with --data {data}: "
            f"{'give' if learned else 'leave out'} --gripper openvla, or its gripper moves the wrong way.")


def load(a, method, ckpt):
    """The model of a checkpoint, ready to act; prints what it is."""
    from common import device, pick_attention
    where = device(a.device)
    attn = pick_attention(a.attn, where)
    model = load_model(a, method, ckpt)
    if problem := other_gripper(a, ckpt):
        print(problem, file=sys.stderr)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    attn += ", CUDA graphs" * bool(a.graphs) + ", 8 bits" * bool(a.int8)
    print(f"{method.__name__}, {size:.2f} M parameters, from {ckpt}, on {where}, attention {attn}; plays "
          f"{a.execute or model.cfg.execute} of the {model.cfg.horizon} actions of a chunk")
    return model


def reload(argv, ckpt):
    """What a worker process evaluates: (model, method), loaded anew from the same flags."""
    a = parse(argv)
    method = find_method(ckpt, a.model)
    return load(a, method, ckpt), method


def _outs(a):
    """The folder of each checkpoint's results."""
    if len(a.ckpt) < 2:
        return [a.out or (Path(*a.ckpt) / "eval" if a.ckpt and Path(*a.ckpt).is_dir() else Path("eval"))]
    names = ["-".join(Path(ckpt).parts[-2:]) for ckpt in a.ckpt]
    names = [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return [a.out / name if a.out else Path(ckpt) / "eval" if Path(ckpt).is_dir() else Path("eval") / name
            for ckpt, name in zip(a.ckpt, names)]


class _Done:
    """What a series of evaluations (--control all, several --ckpt) has finished, should it be interrupted."""

    def __init__(self, a, out, n):
        from common import read_json
        self.path, self.kept = out / ".series.json", {"about": None, "done": {}}
        if n > 1:                                                     # else there is nothing to remember
            about = {key: str(value) for key, value in vars(a).items() if key not in ("workers", "out")}
            self.kept["about"] = about | {"from": list(map(origin, a.ckpt)), "version": VERSION,
                                          "made_with": made_with("", a.sim)}
            if self.path.is_file() and (found := read_json(self.path)).get("about") == self.kept["about"]:
                self.kept = found

    def results(self, out, control):
        """Those of a finished evaluation; None: it is to be played."""
        from common import read_json
        name, written = self.kept["done"].get(f"{out} {control}", ("", 0))
        path = Path(out, name)                                        # (another run may have written there)
        return read_json(path) if path.is_file() and path.stat().st_mtime_ns == written else None

    def add(self, out, control, results):
        """One evaluation is finished."""
        from common import write_json
        path = Path(out, f"results{_tail(results)}.json")
        self.kept["done"][f"{out} {control}"] = [path.name, path.stat().st_mtime_ns]
        if self.kept["about"]:
            write_json(self.path, self.kept)


def check(a):
    """Print what the simulator of --sim consists of, and let it draw and move. Returns the exit code."""
    modules, libraries, how = PARTS[a.sim]
    missing = {module: told for module, told in modules.items() if find_spec(module) is None}
    if platform.system() == "Linux" and libraries and not any(map(find_library, libraries)):
        missing[" or ".join(f"lib{name}" for name in libraries)] = how
    if a.sim in ("metaworld", "libero") and not missing:
        SIMS[a.sim]._ready()                                          # it chooses MUJOCO_GL
    for part, told in missing.items():
        print(f"missing {part}: {told}")
    for name, found in made_with("cpu", a.sim).items():
        if found is not None:
            print(f"{name} {found}")
    if missing:
        print(f"{a.sim}: {len(missing)} parts are missing")
        return 1
    claim(out := a.out or Path())
    out.mkdir(parents=True, exist_ok=True)
    path, env, begin = out / f"check-{a.sim}.png", SIMS[a.sim](**a.settings), time.time()
    chance = np.random.default_rng(0)
    env.lay_out(seed := env.jobs(env.families[:1], 1, "eval")[0][0])
    Image.fromarray(env.picture("third")[0]).save(path)
    while env.count < 20 and not env.success():
        env.advance(env.random_action(chance) if isinstance(env, Bench) else env.expert()[0])
    print(f"{a.sim}, seed {seed}, {env.instruction!r}: built, drawn ({path}), {env.count} steps played: "
          f"{time.time() - begin:.1f} s")
    return 0


def main(argv=None):
    """python eval_sim.py ...; returns the exit code."""
    from common import device, pick_attention
    a = parse(argv)
    if a.check:
        return check(a)
    if a.replay:
        from tqdm import tqdm
        recorded = recordings(a.replay, a.families, a.split, a.episodes, a.body)
        rows, worst = replay(tqdm(recorded, desc="replay", unit="episode"))
        print(f"replayed {len(rows)} recorded episodes: {sum(r['success'] for r in rows)} succeed, "
              f"largest state error {worst:.1e}")
        return int(not worst <= 1e-3)                                 # 1: not the world it was recorded in
    found, outs, controls = {}, _outs(a), ("", *CONTROLS[:3]) if a.control == "all" else (a.control,)
    for out in outs:
        claim(out)
    _check(a.sim, a.families, a.episodes, a.split, 0, a.batch, controls[0], a.body, a.settings, a.workers)
    tasks = ", ".join(a.families) if len(a.families) < 11 else f"{len(a.families)} tasks"
    print(f"{a.episodes} episodes of {tasks}; "
          + (f"body {a.body}; " if a.sim == "tabletop" else f"{a.sim}; ")
          + f"split {a.split}; {a.batch} side by side" + f", in {a.workers} processes" * bool(a.workers))
    done = _Done(a, outs[0], len(outs) * len(controls))
    for ckpt, out in zip(a.ckpt or [None], outs):
        method, model, weights = find_method(ckpt, a.model) if ckpt else None, None, None
        for control in controls:
            results, acts = done.results(out, control), control not in NO_MODEL
            if results is None:
                if acts and model is None:
                    model, weights = load(a, method, ckpt), origin(ckpt)
                checkpoint = weights | {
                    "preset": a.preset, "tokenizer": a.tokenizer,
                    "attn": pick_attention(a.attn, device(a.device)),
                    **{name: True for name in ("graphs", "int8") if getattr(a, name)}} if acts else None
                results = evaluate(
                    model, method, a.families, a.episodes, a.split, 0, a.batch, control, a.unnorm_key,
                    a.execute, a.seed, out, checkpoint=checkpoint, embodiment=a.body, sim=a.sim,
                    settings=a.settings, record=a.record, workers=a.workers,
                    load=partial(reload, argv or sys.argv[1:], ckpt))
                done.add(out, control, results)
            print_table(results)
            found[f"{ckpt} {control}".strip()] = results
    if len(outs) > 1:
        print_comparison(found)
    if done.kept["about"]:
        done.path.unlink(missing_ok=True)                             # the next series is a new one
    print(f"results and film in {', '.join(map(str, outs))}"
          + f", the recording in {a.record}" * bool(a.record))


if __name__ == "__main__":
    from common import cli
    cli(main)
