r"""
Closed-loop evaluation, and the simulator it uses by default: a tabletop in numpy, no physics engine, no download.

    python eval_sim.py --ckpt runs/cogact-tiny/last                            # success per task, Wilson intervals, GIF, JSON
    python eval_sim.py --ckpt runs/cogact-tiny/last --families all --episodes 300
    python eval_sim.py --ckpt runs/cogact-tiny/last --control swap             # also: blank, random (they must fail)
    python eval_sim.py --replay tabletop                                       # play recorded actions: the first thing to check

The tabletop, in one picture (metres; a right-handed frame whose origin lies on the table):

        x, away from the robot = up in the picture
        ^      +--------------------+       third-person camera: behind and above the robot, looking along +x
        |      |  o    []     /\    |       wrist camera: on the gripper, looking down between the fingers
    y <-+      |     (plate)        |       "left" is +y: the left side of the third-person picture
   left        +--------------------+

Action, 7 numbers at CONTROL_HZ: dx dy dz [m], droll dpitch dyaw [rad] in the table's frame, gripper 1 = open, 0 = closed.
State, 8 numbers: x y z [m] of the point between the finger tips, roll pitch yaw [rad], the two finger positions [m].
Contact is kinematic: fingers push what they touch sideways, close around what is between them, and what they let go
drops onto what is below. Everything follows from the seed. Sections: solids and pictures, the world, the expert,
episodes, evaluation.
"""
import argparse
import importlib
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

VERSION = 1                      # of the simulator: part of every dataset cache's name; raise it when a pixel or an action changes
CONTROL_HZ = 5
STATE_DIM = 8
FAMILIES = ("pick", "put", "push", "stack", "turn", "side")
DEFAULT_FAMILIES = ("pick", "put", "push")
VIEWS = ("third", "wrist")

# ---------------------------------------------------------------------------------------------------------------------
# Solids and pictures: rays against convex solids, exact perspective, flat shading, a shadow on the table
# ---------------------------------------------------------------------------------------------------------------------
COLOURS = {"red": (214, 40, 40), "green": (44, 160, 60), "blue": (40, 84, 214), "yellow": (240, 208, 40),
           "purple": (150, 60, 190), "orange": (242, 130, 28)}
NEUTRAL = {"plate": (236, 236, 230), "box": (96, 72, 52)}
TABLE, FLOOR, STEEL, FINGER = (176, 160, 140), (70, 76, 84), (128, 132, 138), (28, 28, 32)
LIGHT = np.array([0.25, 0.30, 1.0]) / np.linalg.norm([0.25, 0.30, 1.0])     # towards the lamp
AMBIENT = 0.5


class Solid(NamedTuple):
    """A convex solid around its own origin: {p : normals @ p <= offsets}, or a ball when `radius` > 0."""
    normals: np.ndarray          # (P, 3) unit, outward
    offsets: np.ndarray          # (P,) [m]
    vertices: np.ndarray         # (M, 3) corners (of a ball: of its bounding cube)
    radius: float = 0.0


def cuboid(sx, sy, sz):
    """A box with edges sx, sy, sz [m]."""
    half = np.array([sx, sy, sz]) / 2
    signs = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)])
    return Solid(np.vstack([np.eye(3), -np.eye(3)]), np.concatenate([half, half]), signs * half)


def frustum(sides, bottom, top, height):
    """A right frustum: a prism (bottom = top), a pyramid (top = 0) or, with many sides, a cylinder. Radii to the edges [m]."""
    angle = np.arange(sides) * 2 * np.pi / sides
    slope = np.stack([np.cos(angle) * height, np.sin(angle) * height, np.full(sides, bottom - top)], 1)
    slope /= np.linalg.norm(slope, axis=1, keepdims=True)
    at = np.stack([np.cos(angle) * bottom, np.sin(angle) * bottom, np.full(sides, -height / 2)], 1)
    normals = np.vstack([slope, [[0, 0, 1], [0, 0, -1]]])
    offsets = np.concatenate([(slope * at).sum(1), [height / 2, height / 2]])
    corner = angle + np.pi / sides
    ring = np.stack([np.cos(corner), np.sin(corner)], 1) / np.cos(np.pi / sides)
    vertices = np.vstack([np.c_[ring * r, np.full(sides, z)] for r, z in ((bottom, -height / 2), (top, height / 2))])
    return Solid(normals, offsets, vertices)


def ball(radius):
    """A ball of this radius [m]."""
    return cuboid(2 * radius, 2 * radius, 2 * radius)._replace(radius=radius)


def rotation(roll, pitch, yaw):
    """R = Rz(yaw) Ry(pitch) Rx(roll), (3, 3)."""
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    return np.array([[cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
                     [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
                     [-sp, cp * sr, cp * cr]])


class Camera:
    """A pinhole camera. `eye` (3,) [m]; `axes` (3, 3) with rows right, down, forward in the world; `fov` [rad], vertical."""

    def __init__(self, eye, axes, fov):
        self.eye, self.axes, self.fov = np.asarray(eye, float), axes, fov

    @classmethod
    def look_at(cls, eye, target, fov, up=(0.0, 0.0, 1.0)):
        """A camera at `eye` that sees `target` in the middle of its picture."""
        forward = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
        right = np.cross(forward, up) / np.linalg.norm(np.cross(forward, up))
        return cls(eye, np.stack([right, np.cross(forward, right), forward]), fov)

    def intrinsics(self, h, w):
        """K, (3, 3), in pixels; pixel centres at half-integers."""
        f = h / 2 / math.tan(self.fov / 2)
        return np.array([[f, 0, w / 2], [0, f, h / 2], [0, 0, 1.0]])

    def extrinsics(self):
        """World to camera, (4, 4): x right, y down, z forward."""
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = self.axes, -self.axes @ self.eye
        return pose

    def rays(self, h, w):
        """One direction per pixel, (h, w, 3), whose forward component is 1 (so that a ray's length is its depth)."""
        f = h / 2 / math.tan(self.fov / 2)
        u, v = np.meshgrid((np.arange(w) + 0.5 - w / 2) / f, (np.arange(h) + 0.5 - h / 2) / f)
        return u[..., None] * self.axes[0] + v[..., None] * self.axes[1] + self.axes[2]

    def project(self, points, h, w):
        """World points (..., 3) -> pixel coordinates x, y (..., 2)."""
        p = (np.asarray(points) - self.eye) @ self.axes.T
        f = h / 2 / math.tan(self.fov / 2)
        z = np.maximum(p[..., 2:], 1e-6)
        return p[..., :2] / z * f + np.array([w / 2, h / 2])


def _hit(solid, pose, at, origin, dirs):
    """Where rays enter a solid with rotation `pose` at `at`: distance (n,) (inf = miss) and shade (n,) in [0, 1]."""
    o, d = (origin - at) @ pose, dirs @ pose                                # local: o (3,) or (n, 3), d (n, 3)
    if solid.radius:
        a, b, c = (d * d).sum(-1), (d * o).sum(-1), (o * o).sum(-1) - solid.radius ** 2
        root = b * b - a * c
        enter = (-b - np.sqrt(np.maximum(root, 0))) / a
        light = (o + enter[:, None] * d) @ (LIGHT @ pose) / solid.radius
        return np.where((root > 0) & (enter > 1e-6), enter, np.inf), AMBIENT + (1 - AMBIENT) * np.maximum(light, 0)
    speed = d @ solid.normals.T                                             # (n, P), < 0 where the ray enters a half-space
    t = (solid.offsets - o @ solid.normals.T) / np.where(speed == 0, 1e-12, speed)
    inwards = np.where(speed < 0, t, -np.inf)
    face = inwards.argmax(1)
    enter = inwards[np.arange(len(face)), face]
    leave = np.where(speed > 0, t, np.inf).min(1)
    shade = AMBIENT + (1 - AMBIENT) * np.maximum(solid.normals @ (LIGHT @ pose), 0)
    return np.where((enter < leave) & (enter > 1e-6), enter, np.inf), shade[face]


def _window(pixels, h, w):
    """The slice of the picture that holds these projected points, with a pixel of margin."""
    (x0, y0), (x1, y1) = np.floor(pixels.min(0)).astype(int) - 1, np.ceil(pixels.max(0)).astype(int) + 1
    return slice(max(y0, 0), max(min(y1, h), 0)), slice(max(x0, 0), max(min(x1, w), 0))


def render(parts, camera, h, w):
    """Draw solids on the table.

    parts: list of (owner, Solid, rotation (3, 3), position (3,), colour). Returns rgb uint8 (h, w, 3), depth float32 (h, w)
    [m along the optical axis] and owner int16 (h, w): -1 table, -2 beyond its edge, else the part's owner.
    """
    rays, eye = camera.rays(h, w), camera.eye
    depth = np.where(rays[..., 2] < -1e-6, -eye[2] / np.minimum(rays[..., 2], -1e-6), 1e3)        # the plane z = 0
    ground = eye + depth[..., None] * rays
    on_table = (np.abs(ground[..., 0]) < 0.26) & (np.abs(ground[..., 1]) < 0.28) & (depth < 1e3)
    colour = np.where(on_table[..., None], TABLE, FLOOR).astype(float)
    owner = np.where(on_table, -1, -2).astype(np.int16)
    for _, solid, pose, at, _ in parts:                                     # shadows on the table, before the solids
        corners = solid.vertices @ pose.T + at
        rows, cols = _window(camera.project(corners - corners[:, 2:] / LIGHT[2] * LIGHT, h, w), h, w)
        points = ground[rows, cols].reshape(-1, 3)
        if len(points):
            dark = np.isfinite(_hit(solid, pose, at, points, np.broadcast_to(LIGHT, points.shape))[0])
            window = colour[rows, cols]
            window[dark.reshape(window.shape[:2]) & (owner[rows, cols] == -1)] = np.multiply(TABLE, 0.6)
    for who, solid, pose, at, paint in parts:
        corners = solid.vertices @ pose.T + at
        if ((corners - eye) @ camera.axes[2]).min() < 0.005:                # reaches behind the lens: look everywhere
            rows, cols = slice(0, h), slice(0, w)
        else:
            rows, cols = _window(camera.project(corners, h, w), h, w)
        dirs = rays[rows, cols]
        if dirs.size == 0:
            continue
        t, shade = _hit(solid, pose, at, eye, dirs.reshape(-1, 3))
        near = (t < depth[rows, cols].reshape(-1)).reshape(dirs.shape[:2])
        depth[rows, cols][near] = t.reshape(near.shape)[near]
        colour[rows, cols][near] = shade.reshape(near.shape)[near][:, None] * np.array(paint, float)
        owner[rows, cols][near] = who
    return np.rint(np.clip(colour, 0, 255)).astype(np.uint8), depth.astype(np.float32), owner


# ---------------------------------------------------------------------------------------------------------------------
# The world: objects, the gripper, kinematic contact, tasks
# ---------------------------------------------------------------------------------------------------------------------
class Shape(NamedTuple):
    """What the contact rules need to know of a shape [m]."""
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
PLATE = (frustum(16, 0.058, 0.064, 0.010), 0.010)                          # solid, height of its upper face
BOX_IN, BOX_WALL, BOX_FLOOR = 0.120, 0.028, 0.008                          # inner edge, height of the walls, floor [m]
BOX_PARTS = [(cuboid(BOX_IN, BOX_IN, BOX_FLOOR), (0, 0, BOX_FLOOR / 2))] + [
    (cuboid(*((0.008, BOX_IN + 0.016) if i else (BOX_IN + 0.016, 0.008)), BOX_WALL),
     (i * (BOX_IN / 2 + 0.004), j * (BOX_IN / 2 + 0.004), BOX_WALL / 2)) for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))]
CONTAINERS = {"plate": 0.066, "box": 0.072}                                # radius kept free around it [m]
REACH = np.array([[-0.18, -0.20, 0.012], [0.18, 0.20, 0.26]])              # of the point between the finger tips [m]
FIELD = np.array([[-0.15, -0.17], [0.15, 0.17]])                           # where objects start [m]
MAX_GAP, FINGER_SPEED, FINGER_RADIUS = 0.084, 0.042, 0.009                 # [m], [m per step], [m]
MAX_DELTA, MAX_TURN = 0.05, 0.35                                           # an action is clipped to this [m], [rad]
THIRD = dict(eye=(-0.30, 0.0, 0.50), target=(0.022, 0.0, 0.035), fov=0.76)
STEPS = {"pick": 40, "put": 60, "push": 50, "stack": 60, "turn": 50, "side": 60}                 # limit per episode

# Phrasings: the last of each family is never shown in training (split "hard" uses only that one).
PHRASES = {
    "pick": ("pick up the {x}", "lift the {x}", "grab the {x}", "take the {x} off the table"),
    "put": ("put the {x} {on} the {y}", "place the {x} {on} the {y}", "move the {x} {on}to the {y}",
            "set the {x} down {on} the {y}"),
    "push": ("push the {x} to the {side}", "slide the {x} to the {side}", "push the {x} {side}", "shove the {x} to the {side}"),
    "stack": ("stack the {x} on the {y}", "put the {x} on top of the {y}", "place the {x} on top of the {y}",
              "pile the {x} on the {y}"),
    "turn": ("turn the {x} {side}", "rotate the {x} {side}", "spin the {x} {side}", "twist the {x} {side}"),
    "side": ("put the {side} {x} {on} the {y}", "place the {side} {x} {on} the {y}", "move the {side} {x} {on}to the {y}",
             "set the {side} {x} down {on} the {y}"),
}
HELD_OUT = (("red", "ball"), ("green", "bar"), ("blue", "pyramid"), ("purple", "cube"), ("orange", "cylinder"))
SPLITS = ("train", "val", "eval", "pretrain", "hard")                      # disjoint ranges of a million seeds each


def seeds(split, n, start=0):
    """`n` seeds of a split, from its `start`-th on; seeds of two splits never meet."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: the tabletop has {', '.join(SPLITS)}.")
    if not 0 <= start <= start + n <= 1_000_000:
        raise ValueError(f"{n} seeds from {start} on: a split has 1,000,000.")
    base = SPLITS.index(split) * 1_000_000
    return list(range(base + start, base + start + n))


class Thing:
    """One object or container: colour and shape (a container's shape is its name), position of its base, yaw."""

    def __init__(self, colour, shape, xy, yaw):
        self.colour, self.shape, self.yaw = colour, shape, yaw
        self.at = np.array([xy[0], xy[1], 0.0])                            # centre of its lower face [m]
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
        return self.at[2] + (SHAPES[self.shape].height if self.movable else {"plate": PLATE[1], "box": BOX_FLOOR}[self.shape])


# A second body shows that nothing else assumes seven numbers: map an action of yours to the seven above.
EMBODIMENTS = {
    "gripper": (7, lambda a: a),                                           # dx dy dz droll dpitch dyaw gripper
    "gantry": (4, lambda a: np.array([*a[:3], 0, 0, 0, a[3]])),            # dx dy dz gripper
}


class Tabletop:
    """The environment, with Gymnasium's reset and step.

    families: which tasks may come; split: which seeds, colour-shape pairs, phrasings and camera are meant; views: cameras
    to render, of "third" and "wrist"; image_size: height = width in pixels, or (h, w); embodiment: a key of EMBODIMENTS.
    """

    def __init__(self, families=DEFAULT_FAMILIES, split="train", views=("third",), image_size=64, embodiment="gripper"):
        for asked, known, what in ((families, FAMILIES, "families"), (views, VIEWS, "views"),
                                   ((split,), SPLITS, "split"), ((embodiment,), EMBODIMENTS, "embodiment")):
            if wrong := [a for a in asked if a not in known]:
                raise ValueError(f"{what} {', '.join(map(repr, wrong))}: the tabletop knows {', '.join(known)}.")
        self.families, self.split, self.views = tuple(families), split, tuple(views)
        self.h, self.w = (image_size, image_size) if np.isscalar(image_size) else image_size
        self.action_dim, self.to_seven = EMBODIMENTS[embodiment]

    # -- Gymnasium's two verbs
    def reset(self, seed=None, options=None):
        """Lay out the scene of this seed. options["family"] fixes the task's family. Returns (observation, info)."""
        seed = int(np.random.default_rng().integers(1_000_000)) if seed is None else int(seed)
        self.seed, self.rng = seed, np.random.default_rng([VERSION, seed])
        self.family = (options or {}).get("family") or self.families[self.rng.integers(len(self.families))]
        self.max_steps = STEPS[self.family]
        while not self._layout():                                          # about one draw in ten does not fit
            pass
        self.tcp = np.array([*self.rng.uniform(*REACH[:, :2] * 0.85), self.rng.uniform(0.12, 0.19)])
        self.rpy, self.gap, self.held, self.grip_yaw = np.zeros(3), MAX_GAP, None, 0.0
        self.rpy[2] = self.rng.uniform(-0.15, 0.15)
        self.count, self.start = 0, {id(t): (t.at.copy(), t.yaw) for t in self.things}
        self.lifted = False                                                # was X ever carried? (a push must not be)
        shift = 0.2 if self.split == "hard" else 0.0                       # the held-out camera stands 0.2 rad to the side
        eye = rotation(0, 0, shift) @ np.array(THIRD["eye"])
        self.third = Camera.look_at(eye, THIRD["target"], THIRD["fov"])
        return self.observe(), self.info()

    def step(self, action):
        """Play one action (action_dim,). Returns (observation, reward, terminated, truncated, info); reward 1 = success."""
        self.advance(action)
        done = self.success()
        return self.observe(), float(done), done, self.count >= self.max_steps and not done, self.info()

    def advance(self, action):
        """`step` without a picture: move, push, grasp, drop."""
        action = np.asarray(action, float)
        if action.shape != (self.action_dim,) or not np.isfinite(action).all():
            raise ValueError(f"action of shape {action.shape}: this body takes {self.action_dim} finite numbers.")
        action = self.to_seven(action)
        before, self.count = self.tcp.copy(), self.count + 1
        turn = np.clip(action[3:6], -MAX_TURN, MAX_TURN)
        self.rpy = np.clip(self.rpy + turn, [-0.5, -0.5, -1.7], [0.5, 0.5, 1.7])
        for part in range(1, 5):                                           # quarter steps: nothing is jumped over
            self.tcp = np.clip(before + np.clip(action[:3], -MAX_DELTA, MAX_DELTA) * part / 4, *REACH)
            self._carry()
            self._push()
        self._fingers(action[6] > 0.5)

    def observe(self):
        """The observation: images {view: uint8 (h, w, 3)}, state (8,) float32, instruction."""
        roll, pitch, yaw = self.rpy
        state = np.array([*self.tcp, roll, pitch, yaw, self.gap / 2, self.gap / 2], np.float32)
        return {"images": {v: self.picture(v)[0] for v in self.views}, "state": state, "instruction": self.instruction}

    def info(self):
        """success, family, the names of the scene's things, X's and Y's among them, and the step count."""
        return {"success": self.success(), "family": self.family, "objects": [t.name for t in self.things],
                "x": self.x.name, "y": self.y.name if self.y else "", "side": self.side, "steps": self.count}

    # -- the scene
    def _layout(self):
        """Draw objects, containers, the task and its words; False when they do not fit."""
        rng, hard = self.rng, self.split == "hard"
        pairs = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT]
        picked = [pairs[i] for i in rng.permutation(len(pairs))[:rng.integers(3, 5)]]
        targets = {"turn": ["bar"], "side": [s for s in SHAPES if s != "bar"]}.get(self.family, list(SHAPES))
        pool = [p for p in (HELD_OUT if hard else pairs) if p[1] in targets]
        picked[0] = pool[rng.integers(len(pool))]
        if self.family == "stack":                                         # Y: something with a flat top
            flat = [p for p in pairs if SHAPES[p[1]].flat]
            picked[1] = flat[rng.integers(len(flat))]
        if len(set(picked)) < len(picked):
            return False
        if self.family == "side":                                          # X's twin
            picked = [picked[0]] + picked[:3]
        bins = ["plate", "box"] if rng.random() < 0.25 else [("plate", "box")[rng.integers(2)]]
        self.things = []
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
        return self._task()

    def _task(self):
        """Choose X, Y, the side and the words. X is things[0] (or its twin)."""
        rng, bins = self.rng, [t for t in self.things if not t.movable]
        self.x, self.y, self.side = self.things[0], None, ""
        if self.family in ("put", "side"):
            self.y = bins[rng.integers(len(bins))]
        if self.family == "stack":
            self.y = self.things[1]
        if self.family == "push":
            self.side = ("left", "right")[rng.integers(2)]
            if not self._corridor(self.x, self.side):
                return False
        if self.family == "turn":
            self.side = ("left", "right")[rng.integers(2)]
        if self.family == "side":
            first, second = self.things[:2]
            if abs(first.at[1] - second.at[1]) < 0.06:
                return False
            self.side = ("left", "right")[rng.integers(2)]
            self.x = max(first, second, key=lambda t: t.at[1] * (1 if self.side == "left" else -1))
        phrases = PHRASES[self.family]
        self.phrase = phrases[-1] if self.split == "hard" else phrases[rng.integers(len(phrases) - 1)]
        self.instruction = self._words(self.x)
        return True

    def _words(self, x):
        y = self.y.name if self.y else ""
        return self.phrase.format(x=x.name, y=y, side=self.side, on="in" if y == "box" else "on")

    def _corridor(self, x, side):
        """Is there room to come from the other side and push x by 12 cm?"""
        s = 1 if side == "left" else -1
        if x.at[1] * s + 0.12 > 0.20 or x.at[1] * s - 0.075 < -0.20:
            return False
        return all(t is x or abs(t.at[0] - x.at[0]) > t.radius + x.radius + 0.005
                   or not -0.085 < (t.at[1] - x.at[1]) * s < 0.13 + t.radius + x.radius for t in self.things)

    def swap(self):
        """A control: the instruction names another object of the scene, success is still judged on X."""
        others = [t for t in self.things if t.movable and t.name != self.x.name and t is not self.y]
        if self.family == "turn":                                          # only bars are turned: swap the side instead
            self.instruction = self.phrase.format(x=self.x.name, y="", side={"left": "right", "right": "left"}[self.side])
        elif self.family == "side":
            self.instruction = self.phrase.format(x=self.x.name, y=self.y.name, on="in" if self.y.name == "box" else "on",
                                                  side={"left": "right", "right": "left"}[self.side])
        else:
            self.instruction = self._words(others[self.seed % len(others)])

    # -- contact
    def _carry(self):
        """What is held moves and turns with the gripper."""
        if self.held is not None:
            thing, offset, yaw = self.held
            turn = rotation(0, 0, self.rpy[2])
            thing.at, thing.yaw = self.tcp + turn @ offset, self.rpy[2] + yaw
            self.lifted |= thing is self.x and thing.at[2] > 0.02

    def _tools(self):
        """Circles that push: (centre xy, radius, lowest z)."""
        axis = np.array([-np.sin(self.rpy[2]), np.cos(self.rpy[2])])       # fingers open along the gripper's y
        reach = self.gap / 2 + 0.007
        tools = [(self.tcp[:2] + s * reach * axis, FINGER_RADIUS, self.tcp[2] - 0.010) for s in (-1, 1)]
        if self.held is not None:
            tools.append((self.held[0].at[:2], self.held[0].radius, self.held[0].at[2]))
        return tools

    def _push(self):
        """Objects give way to fingers, to what is held and to each other; containers stay."""
        free = [t for t in self.things if t.movable and (self.held is None or t is not self.held[0])]
        moved = []
        for thing in free:
            for centre, radius, low in self._tools():
                away = thing.at[:2] - centre
                overlap = thing.radius + radius - np.hypot(*away)
                if overlap > 0 and thing.at[2] <= low + 1e-9 + (0.02 if low < 0.02 else 0) and low < thing.top - 0.004:
                    thing.at[:2] += away / max(np.hypot(*away), 1e-6) * overlap
                    moved.append(thing)
        for thing in moved:                                                # one round of object against object
            for other in free:
                away = other.at[:2] - thing.at[:2]
                overlap = thing.radius + other.radius - np.hypot(*away)
                if other is not thing and overlap > 0 and abs(other.at[2] - thing.at[2]) < 0.01:
                    other.at[:2] += away / max(np.hypot(*away), 1e-6) * overlap
        for thing in moved:
            thing.at[:2] = np.clip(thing.at[:2], [-0.24, -0.26], [0.24, 0.26])
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
            if not thing.movable:
                continue
            local = (thing.at - self.tcp) @ turn                           # in the gripper's frame
            between = abs(local[1]) < self.gap / 2 and abs(local[0]) < 0.024
            if between and thing.at[2] - 0.004 <= self.tcp[2] <= thing.top - 0.002 and not self._covered(thing):
                width = SHAPES[thing.shape].width
                self.gap = max(self.gap - FINGER_SPEED, width)
                if self.gap <= width + 1e-9:
                    local[1] = 0                                           # the fingers centre it
                    self.held = (thing, local, thing.yaw - self.rpy[2])
                    self._carry()
                return
        self.gap = max(self.gap - FINGER_SPEED, 0.0)

    def _covered(self, thing):
        return any(t is not thing and t.movable and t.at[2] > thing.at[2] + 0.01
                   and np.hypot(*(t.at - thing.at)[:2]) < 0.03 for t in self.things)

    def _support(self, thing):
        """Height of what lies below the centre of `thing`."""
        below = 0.0
        for t in self.things:
            if t is thing or (self.held is not None and t is self.held[0]) or t.top > thing.at[2] + 0.02:
                continue
            off = np.abs(rotation(0, 0, t.yaw).T[:2, :2] @ (thing.at - t.at)[:2])
            inside = {"plate": np.hypot(*off) < 0.062, "box": off.max() < BOX_IN / 2}.get(t.shape, np.hypot(*off) < 0.024)
            if inside and (not t.movable or SHAPES[t.shape].flat):
                below = max(below, t.top)
        return below

    def success(self):
        """Is the task's predicate true of the present state?"""
        x, y, held = self.x, self.y, self.held is not None and self.held[0] is self.x
        (x0, yaw0) = self.start[id(x)]
        if self.family == "pick":
            return bool(held and x.at[2] > 0.05)
        if held:
            return False
        if self.family == "push":
            s, moved = (1 if self.side == "left" else -1), x.at - x0
            return bool(moved[1] * s > 0.08 and abs(moved[0]) < 0.05 and not self.lifted)
        if self.family == "turn":
            turned = (x.yaw - yaw0 + np.pi) % (2 * np.pi) - np.pi
            return bool(turned * (1 if self.side == "left" else -1) > 0.7 and x.at[2] < 0.01)
        on = abs(x.at[2] - y.top) < 0.004
        off = np.abs(rotation(0, 0, y.yaw).T[:2, :2] @ (x.at - y.at)[:2])
        return bool(on and {"plate": np.hypot(*off) < 0.062, "box": off.max() < BOX_IN / 2}.get(y.shape, np.hypot(*off) < 0.024))

    # -- pictures
    def camera(self, view):
        """The Camera of a view, as it stands now."""
        if view == "third":
            return self.third
        turn = rotation(*self.rpy)
        eye = self.tcp + turn @ np.array([-0.085, 0.0, 0.050])
        return Camera.look_at(eye, self.tcp + turn @ np.array([-0.004, 0.0, -0.030]), 1.3, up=turn @ np.array([1.0, 0, 0.2]))

    def parts(self):
        """What there is to draw, for `render`; owner = index into self.things, 100 = the gripper."""
        parts = []
        for i, t in enumerate(self.things):
            turn = rotation(0, 0, t.yaw)
            if t.movable:
                shape = SHAPES[t.shape]
                parts.append((i, shape.solid, turn, t.at + [0, 0, shape.height / 2], COLOURS[t.colour]))
            elif t.shape == "plate":
                parts.append((i, PLATE[0], turn, t.at + [0, 0, PLATE[1] / 2], NEUTRAL["plate"]))
            else:
                parts += [(i, solid, turn, t.at + turn @ np.array(at), NEUTRAL["box"]) for solid, at in BOX_PARTS]
        turn = rotation(*self.rpy)
        for solid, at, colour in ((FINGER_SOLID, (0, self.gap / 2 + 0.007, 0.022), FINGER),
                                  (FINGER_SOLID, (0, -self.gap / 2 - 0.007, 0.022), FINGER),
                                  (PALM_SOLID, (0, 0, 0.066), STEEL), (STEM_SOLID, (0, 0, 0.135), STEEL)):
            parts.append((100, solid, turn, self.tcp + turn @ np.array(at), colour))
        return parts

    def picture(self, view, h=None, w=None):
        """(rgb uint8 (h, w, 3), depth float32 (h, w) [m], owner int16 (h, w)) of one view."""
        return render(self.parts(), self.camera(view), h or self.h, w or self.w)


FINGER_SOLID, PALM_SOLID, STEM_SOLID = cuboid(0.020, 0.014, 0.064), cuboid(0.032, 0.112, 0.024), cuboid(0.026, 0.026, 0.114)

# ---------------------------------------------------------------------------------------------------------------------
# The expert: one action from the present state, no memory; what a policy must learn to see
# ---------------------------------------------------------------------------------------------------------------------
HOVER = 0.105                    # fingers pass above everything on the table [m]


def _toward(env, xy, z, gripper, yaw=0.0, speed=0.04):
    """The action that moves the gripper towards a pose, at most `speed` [m] and 0.3 [rad] per step."""
    flat = np.asarray(xy, float) - env.tcp[:2]
    flat *= min(1.0, speed / max(np.hypot(*flat), 1e-9))
    tilt = np.clip([-env.rpy[0], -env.rpy[1], yaw - env.rpy[2]], -0.3, 0.3)
    return np.array([*flat, np.clip(z - env.tcp[2], -speed, speed), *tilt, float(gripper)])


def _grasp(env, x):
    """Come down over x and close."""
    if env.held is not None:                                               # something else is in the hand: put it down
        return _toward(env, env.tcp[:2], env.tcp[2] + 0.04, 1), "let go"
    off = np.hypot(*(x.at[:2] - env.tcp[:2]))
    grasp_z = max(x.at[2] + SHAPES[x.shape].height * 0.45, REACH[0, 2] + 0.006)
    closing = env.gap < MAX_GAP - 1e-6
    if off < 0.013 and abs(env.tcp[2] - grasp_z) < 0.012:
        return _toward(env, x.at[:2], grasp_z, 0), f"close the gripper on the {x.name}"
    if off > 0.03 and env.tcp[2] < x.top + 0.022 or closing and env.tcp[2] < x.top + 0.022:      # low and beside it: rise
        return _toward(env, env.tcp[:2], HOVER, 1), f"move above the {x.name}"
    z = grasp_z + np.clip((off - 0.012) * 3.5, 0, HOVER - grasp_z)         # a funnel: lower the closer
    return _toward(env, x.at[:2], z, 1), f"move above the {x.name}" if off > 0.03 else f"reach for the {x.name}"


def _release(env, x, y):
    """Carry x over y and let go."""
    off = np.hypot(*(y.at[:2] - x.at[:2]))
    rim = {"box": BOX_WALL}.get(y.shape, y.top)
    goal = env.tcp[:2] + (y.at[:2] - x.at[:2])
    low = y.top + 0.006 + env.tcp[2] - x.at[2]                             # the gripper's z when x is about to touch y
    if off > 0.012:
        high = rim + 0.03 + env.tcp[2] - x.at[2]
        if env.tcp[2] < high - 0.02:
            return _toward(env, env.tcp[:2], high + 0.01, 0), f"lift the {x.name}"
        z = max(high - 0.015, env.tcp[2] - 0.03) if off < 0.04 else high
        return _toward(env, goal, z, 0), f"carry the {x.name} to the {y.name}"
    if env.tcp[2] > low + 0.008:
        return _toward(env, goal, low, 0), f"lower the {x.name}"
    return _toward(env, env.tcp[:2], low, 1), f"release the {x.name}"


def _shove(env, x, side):
    """Come down on the far side of x with closed fingers and push it by 10 cm."""
    s = 1.0 if side == "left" else -1.0
    if env.held is not None:
        return _toward(env, env.tcp[:2], env.tcp[2] + 0.02, 1), "let go"
    along, across = (env.tcp[1] - x.at[1]) * s, env.tcp[0] - x.at[0]
    behind = x.at[:2] - np.array([0, s * (x.radius + 0.034)])
    if along < -(x.radius + 0.008) and abs(across) < 0.016 and env.tcp[2] < 0.034 and along > -(x.radius + 0.075):
        goal = [x.at[0], env.tcp[1] + s * 0.035]
        return _toward(env, goal, 0.020, 0), f"push the {x.name} to the {side}"
    off = np.hypot(*(behind - env.tcp[:2]))
    if off > 0.02 and env.tcp[2] < x.top + 0.022:
        return _toward(env, env.tcp[:2], HOVER, 0), f"move beside the {x.name}"
    z = 0.020 + np.clip((off - 0.014) * 3.5, 0, HOVER - 0.020)
    return _toward(env, behind, z, 0), f"move beside the {x.name}"


def _spin(env, x, side):
    """Grasp x, turn the hand by 75 degrees (its yaw starts near zero), let go."""
    if env.held is None or env.held[0] is not x:
        return _grasp(env, x)
    yaw = 1.3 if side == "left" else -1.3
    if abs(env.rpy[2] - yaw) > 0.12:
        return _toward(env, env.tcp[:2], env.tcp[2], 0, yaw), f"turn the {x.name} {side}"
    return _toward(env, env.tcp[:2], env.tcp[2], 1, yaw), f"release the {x.name}"


def expert(env):
    """The scripted expert: (action (7,) float64, sub-task sentence) for the present state of `env`."""
    x = env.x
    held = env.held is not None and env.held[0] is x
    if env.success():                                                      # afterwards: move away, or hold it up
        if env.family == "pick":
            return _toward(env, env.tcp[:2], min(env.tcp[2] + 0.02, 0.20), 0), f"hold the {x.name}"
        return _toward(env, env.tcp[:2], HOVER + 0.03, env.family != "push", env.rpy[2]), "move away"
    if env.family == "pick":
        return (_toward(env, env.tcp[:2], 0.16, 0), f"lift the {x.name}") if held else _grasp(env, x)
    if env.family == "push":
        return _shove(env, x, env.side)
    if env.family == "turn":
        return _spin(env, x, env.side)
    return _release(env, x, env.y) if held else _grasp(env, x)


# ---------------------------------------------------------------------------------------------------------------------
# Episodes of the expert, with mistakes to recover from
# ---------------------------------------------------------------------------------------------------------------------
AFTER = 3                        # steps recorded after success, so that the end of the task is not cut short
BUMP = 0.06                      # chance per step that something pushes the arm or twitches the gripper


def disturb(env, rng):
    """Start somewhere in the middle: low, closed, turned, or with something already in the hand."""
    kind = rng.random()
    if kind < 0.25:                                                        # anywhere, also low
        env.tcp = rng.uniform([*REACH[0, :2], 0.015], [*REACH[1, :2], 0.12])
        env.gap = rng.choice([0.0, MAX_GAP / 2, MAX_GAP])
        env._push()
    elif kind < 0.45:                                                      # near X
        env.tcp = np.array([*(env.x.at[:2] + rng.normal(0, 0.03, 2)), rng.uniform(0.03, 0.10)])
        env.gap = rng.choice([0.0, MAX_GAP])
    elif kind < 0.60:                                                      # holding X, or another object
        movable = [t for t in env.things if t.movable]
        thing = env.x if rng.random() < 0.7 else movable[rng.integers(len(movable))]
        env.tcp = np.array([*thing.at[:2], thing.at[2] + SHAPES[thing.shape].height * 0.45])
        env.gap = SHAPES[thing.shape].width
        env.held = (thing, np.array([*rng.normal(0, 0.006, 1), 0.0, thing.at[2] - env.tcp[2]]), thing.yaw - env.rpy[2])
        env.tcp = np.array([*rng.uniform(*REACH[:, :2] * 0.9), rng.uniform(0.05, 0.2)])
        if env.family == "push" and thing is env.x:                        # carried: it could not succeed any more
            env.held, thing.at = None, env.start[id(thing)][0].copy()
        env._carry()
    env.tcp = np.clip(env.tcp, *REACH)


def record_episode(seed, families=DEFAULT_FAMILIES, split="train", views=("third",), image_size=64, clean=False):
    """One episode of the expert, recoveries included (`clean`: none), as arrays.

    Returns images {view: uint8 (N, h, w, 3)}, state float32 (N, 8), actions float32 (N, 7): what the expert would do at each
    frame, executed float32 (N, 7): what was done (they differ where the arm was bumped), instruction, family, subtasks
    (N strings), waypoints float32 (N, 5, 2): in image coordinates [0, 1] of the third-person view, X's contact point and four
    points of its path from there on, success, seed.
    """
    env = Tabletop(families, split, views, image_size)
    env.reset(seed)
    rng = np.random.default_rng([VERSION, seed, 1])
    if not clean:
        disturb(env, rng)
    frames, states, actions, executed, subtasks, path = {v: [] for v in views}, [], [], [], [], []
    left, bump = AFTER, 0
    while left and env.count < env.max_steps * 2:
        seen = env.observe()
        action, subtask = expert(env)
        done = action.copy()
        bump = bump - 1 if bump else 2 * (not clean and rng.random() < BUMP)
        if bump:
            done[:3] += rng.normal(0, 0.02, 3)
            done[6] = 1 - done[6] if rng.random() < 0.1 else done[6]
        for v in views:
            frames[v].append(seen["images"][v])
        states.append(seen["state"])
        actions.append(action)
        executed.append(done)
        subtasks.append(subtask)
        path.append(env.x.at + [0, 0, SHAPES[env.x.shape].height / 2])
        env.advance(done)
        left -= bool(env.success() or left < AFTER)
    N = len(actions)
    moved = np.linalg.norm(np.array(path) - path[0], axis=1) > 0.004
    contact = int(moved.argmax()) if moved.any() else N - 1
    spots = np.array([np.linspace(max(t, contact), N - 1, 5).round().astype(int) for t in range(N)])        # (N, 5)
    waypoints = env.third.project(np.array(path)[spots], 1, 1)                                              # (N, 5, 2)
    return {"images": {v: np.stack(frames[v]) for v in views}, "state": np.array(states, np.float32),
            "actions": np.array(actions, np.float32), "executed": np.array(executed, np.float32),
            "instruction": env.instruction, "family": env.family, "subtasks": subtasks,
            "waypoints": waypoints.astype(np.float32), "success": env.success(), "seed": seed}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: many episodes at once, one batched inference for all that need a chunk
# ---------------------------------------------------------------------------------------------------------------------
METHODS = ("a0", "vla0", "robovlms", "cogact", "robobrain_x0")
CONTROLS = ("swap", "blank", "random", "expert")


def wilson(k, n, z=1.96):
    """The 95 % Wilson interval of k successes in n episodes, (low, high)."""
    if n == 0:
        return 0.0, 1.0
    p, centre = k / n, (k / n + z * z / 2 / n) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def run_wave(jobs, model, method, split, control="", unnorm_key=None, execute=None, film=None, tick=lambda: None, **act):
    """Play the episodes `jobs` = [(seed, family), ...] side by side. Returns one dict per episode.

    film: a dict that collects the frames of the first episode of each family. act: keywords for model.act.
    """
    views, size = (model.cfg.views, model.cfg.image_size) if model else (("third",), 64)
    envs, policies, rows = [], [], []
    for seed, family in jobs:
        env = Tabletop((family,), split, views, size)
        env.observe, look = dict, env.observe                              # a picture only when the policy needs one
        env.reset(seed)
        env.observe = look
        if control == "swap":
            env.swap()
        envs.append(env)
        policies.append(method.Policy(model, unnorm_key=unnorm_key, execute=execute) if model else None)
    live, chance = list(range(len(envs))), [np.random.default_rng([e.seed, 3]) for e in envs]
    frames = {i: [] for i, (_, f) in enumerate(jobs) if film is not None and f not in film and f not in [j[1] for j in jobs[:i]]}
    failed = [0] * len(envs)
    while live:
        need = [i for i in live if policies[i] and policies[i].needs_chunk]
        seen, chunks = {i: envs[i].observe() for i in need}, {}
        if control == "blank":
            for o in seen.values():
                o["images"] = {v: np.zeros_like(p) for v, p in o["images"].items()}
        if need:
            out, info = model.act([seen[i] for i in need], unnorm_key=unnorm_key, **act)
            chunks = dict(zip(need, out))
            for i, bad in zip(need, info.get("parse_failed", [])):
                failed[i] += bool(bad)
        for i in list(live):
            env = envs[i]
            if i in frames:
                frames[i].append(env.picture("third", 192, 192)[0])
            if policies[i]:
                action = policies[i].step(seen.get(i, {"instruction": env.instruction}), chunks.get(i))
            elif control == "random":
                low = np.array([MAX_DELTA] * 3 + [MAX_TURN] * 3)
                action = np.append(chance[i].uniform(-low, low), chance[i].random() < 0.5)
            else:
                action = expert(env)[0]
            env.advance(action)
            if env.success() or env.count >= env.max_steps:
                live.remove(i)
                rows.append({"task": env.family, "seed": env.seed, "success": env.success(), "steps": env.count,
                             "instruction": env.instruction, "parse_failed": failed[i]})
                if i in frames:
                    film[env.family] = (env.instruction, frames[i] + [env.picture("third", 192, 192)[0]] * 3, env.success())
                tick()
    return rows


def evaluate(model, method, families=DEFAULT_FAMILIES, episodes=200, split="eval", start=0, batch=64, control="",
             unnorm_key=None, execute=None, seed=0, out=None, progress=True, **act):
    """Closed-loop success of `model` (None with control "random" or "expert") over `episodes` unseen episodes.

    method: the model's module. Families take turns. control: "swap" (the instruction names another object), "blank" (black
    pictures), "random", "expert". out: folder for results.json and film.gif. Returns the dict that results.json holds:
    success, interval (Wilson, 95 %), tasks {family: ...}, episodes [...], seconds.
    """
    import torch
    from tqdm import tqdm
    if control and control not in CONTROLS:
        raise ValueError(f"control={control!r}: choose one of {', '.join(CONTROLS)}.")
    torch.manual_seed(seed)                                                # the sampler's noise
    begin, film, rows = time.time(), {} if out else None, []
    jobs = [(s, families[i % len(families)]) for i, s in enumerate(seeds(split, episodes, start))]
    with tqdm(total=episodes, desc=f"episodes{' (' + control + ')' if control else ''}", disable=not progress) as bar:
        for i in range(0, episodes, batch):
            rows += run_wave(jobs[i:i + batch], None if control in ("random", "expert") else model, method, split,
                             control, unnorm_key, execute, film, bar.update, **act)
    rows.sort(key=lambda r: r["seed"])
    tasks = {}
    for f in families:
        mine = [r["success"] for r in rows if r["task"] == f]
        tasks[f] = {"success": sum(mine) / max(len(mine), 1), "interval": wilson(sum(mine), len(mine)), "episodes": len(mine)}
    wins = sum(r["success"] for r in rows)
    results = {"suite": "tabletop", "version": VERSION, "split": split, "control": control, "mean_steps":
               round(float(np.mean([r["steps"] for r in rows])), 1), "success": wins / episodes,
               "interval": wilson(wins, episodes), "tasks": tasks, "parse_failed": sum(r["parse_failed"] for r in rows),
               "seconds": round(time.time() - begin, 1), "torch": torch.__version__, "episodes": rows}
    if out:
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        name = f"results{'-' + control if control else ''}"
        (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        if film:
            write_film(film, out / f"film{'-' + control if control else ''}.gif")
    return results


def write_film(film, path):
    """One GIF: the first episode of each family side by side, with its instruction."""
    length = max(len(frames) for _, frames, _ in film.values())
    pages = []
    for k in range(length):
        page = Image.new("RGB", (196 * len(film), 192 + 30), "white")
        for j, (instruction, frames, success) in enumerate(film.values()):
            page.paste(Image.fromarray(frames[min(k, len(frames) - 1)]), (196 * j, 0))
            words = instruction.split()
            half = (len(words) + 1) // 2 if len(instruction) > 30 else len(words)
            text = " ".join(words[:half]) + "\n" + " ".join(words[half:]) + (" [done]" if success and k >= len(frames) - 3 else "")
            ImageDraw.Draw(page).multiline_text((196 * j + 2, 193), text, fill="black", spacing=1)
        pages.append(page.quantize(64))
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=1000 // CONTROL_HZ, loop=0)


def print_table(results):
    """The results of `evaluate`, a line per task family."""
    rows = [*results["tasks"].items(), ("mean", results | {"episodes": len(results["episodes"])})]
    print(f"\n{'task':<8} {'success':>8} {'95 % interval':>16} {'episodes':>9}   tabletop, split {results['split']}"
          f"{', control: ' + results['control'] if results['control'] else ''}")
    for name, r in rows:
        low, high = r["interval"]
        print(f"{name:<8} {r['success']:>7.1%} {f'{low:.1%} .. {high:.1%}':>16} {r['episodes']:>9}")
    print(f"mean steps {results['mean_steps']}, {results['seconds']} s"
          + (f", {results['parse_failed']} unreadable outputs" if results["parse_failed"] else ""))


def replay(families, episodes, split, size=64):
    """Record episodes of the expert, play what was executed in a fresh world, compare. Returns (rows, largest state error)."""
    rows, worst = [], 0.0
    for seed in seeds(split, episodes):
        record = record_episode(seed, families, split, (), size)
        env = Tabletop(families, split, ("third",), 8)
        env.reset(seed)
        disturb(env, np.random.default_rng([VERSION, seed, 1]))
        for action, state in zip(record["executed"], record["state"]):
            worst = max(worst, float(np.abs(env.observe()["state"] - state).max()))
            env.advance(action)
        rows.append({"task": env.family, "seed": seed, "success": env.success()})
    return rows, worst


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what")
    what.add_argument("--ckpt", help="checkpoint folder (or hub id) to evaluate")
    what.add_argument("--model", choices=METHODS, help="the method; read from the checkpoint's config.json when not given")
    what.add_argument("--preset", help="preset of an official checkpoint that does not name its own")
    what.add_argument("--control", choices=(*CONTROLS, "all"),
                      help="swap: instruction of another object; blank: black pictures; random: random actions; expert: the "
                           "scripted one; all: the plain run, swap, blank and random in turn")
    what.add_argument("--replay", choices=("tabletop",), help="record the expert, play the recorded actions, compare")
    sim = p.add_argument_group("simulator")
    sim.add_argument("--sim", choices=("tabletop",), default="tabletop", help="which simulator")
    sim.add_argument("--families", default=",".join(DEFAULT_FAMILIES), help="task families, comma-separated, or all")
    sim.add_argument("--split", choices=SPLITS, default="eval", help="eval: unseen scenes; hard: also unseen colour-shape "
                     "pairs, phrasings and camera pose")
    sim.add_argument("--episodes", type=int, default=200, help="how many episodes")
    sim.add_argument("--batch", type=int, default=64, help="episodes played side by side")
    sim.add_argument("--seed", type=int, default=0, help="seed of the sampler's noise")
    policy = p.add_argument_group("policy")
    policy.add_argument("--unnorm-key", help="whose action statistics to use; needed when the checkpoint has several")
    policy.add_argument("--execute", type=int, help="actions played per chunk (default: the preset's)")
    policy.add_argument("--tokenizer", help="tokenizer folder or hub id, for checkpoints that do not carry one")
    policy.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    policy.add_argument("--attn", default="auto", help="auto, flash, sdpa, eager")
    p.add_argument("--out", type=Path, help="folder for results.json and film.gif (default: CKPT/eval)")
    a = p.parse_args()
    families = FAMILIES if a.families == "all" else tuple(a.families.split(","))
    Tabletop(families, a.split)                                            # a wrong family fails here
    if not 1 <= a.episodes <= 1_000_000 or a.batch < 1:
        raise ValueError(f"--episodes {a.episodes} --batch {a.batch}: from 1 to 1,000,000 episodes, at least 1 side by side.")
    if a.replay:
        rows, worst = replay(families, a.episodes, a.split)
        wins = sum(r["success"] for r in rows)
        print(f"replayed {len(rows)} recorded episodes: {wins} succeed, largest state error {worst:.1e}")
        return
    model = method = None
    if a.control not in ("random", "expert"):
        if not a.ckpt:
            raise ValueError("--ckpt is missing: which checkpoint should be evaluated? (--control expert needs none)")
        from common import method_of
        method = importlib.import_module(method_of(a.ckpt, a.model))
        model = method.from_pretrained(a.ckpt, preset=a.preset, tokenizer=a.tokenizer, attn=a.attn, device=a.device)
    out = a.out or (Path(a.ckpt) / "eval" if a.ckpt and Path(a.ckpt).is_dir() else Path("eval"))
    for control in ("", "swap", "blank", "random") if a.control == "all" else (a.control or "",):
        results = evaluate(model, method, families, a.episodes, a.split, 0, a.batch, control, a.unnorm_key, a.execute,
                           a.seed, out)
        print_table(results)
    print(f"results and film in {out}")


if __name__ == "__main__":
    from common import cli
    sys.exit(cli(main))
