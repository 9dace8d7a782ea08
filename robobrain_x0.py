"""
RoboBrain-X0: one vocabulary of motions for many bodies. The model may first name the next sub-task, in words.
Paper: none; the announced tokenizer: https://arxiv.org/abs/2510.09667 (OmniSAT)
Official code: https://github.com/FlagOpen/RoboBrain-X0 (serving, data), FlagScale (training)

   cameras, each (h, w, 3) -> 320 x 240 -> Qwen2.5-VL's tower -> 99 tokens of 2048 each --+
                                                                                          v
   "You are controlling an Agilex dual-arm robot ..." -> tokens -------> Qwen2.5-VL-3B, unchanged
                                                                                          |
   "pick up the cup" <boa> 812 40 1977 3 ... <|im_end|>    (sub-task, then action codes) <+
                             |
                             +-> FAST+: BPE -> integers -> inverse DCT -> chunk (30, 14) in [-1, 1]
                                                -> un-normalize by 1 % and 99 % quantiles -> deltas
                                                   -> added up from the robot's pose: 30 poses

What is special: no head and no new weights. The 2048 last ordinary words of Qwen's vocabulary mean action
codes. An action of one arm is 7 numbers: dx dy dz [m], a rotation vector [rad], both in the base frame, and
the gripper's next (absolute) value in the data's unit; of two arms the right one comes first.

Two tokenizers of actions: FAST+ (the released checkpoints') and OmniSAT, of which only the idea is published
(a B-spline's control points, residual codebooks); what is ours in it is said there.

    python robobrain_x0.py                                            # tiny demo, CPU, no download
    python examples/action_tokens.py --data chunks.npy --out FOLDER   # one's own action tokenizers, measured
    python examples/abilities.py questions.jsonl CKPT FOLDER          # pointing, boxes, trajectories, scored
    torchrun --standalone --nproc_per_node=8 train.py --model robobrain_x0 --preset 3b --init ID --data ...
"""
import base64
import codecs
import functools
import io
import itertools
import math
import re
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, vision_utils
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (Qwen2_5_VLTextConfig,
                                                                     Qwen2_5_VLVisionConfig)

from common import (Graphs, atomic_write, check_config, check_fit, check_observation, choose, cli,
                    hf_attention, keyed_generator, linear, load_config, load_weights, pick_attention,
                    pick_stats, read_json, resolve, save_folder, tiny_tokenizer, to_int8, word_loss)
from common import device as pick_device

# ---- Config ---------------------------------------------------------------------------------------------

@dataclass
class Config:
    """Sizes, tokens, decoding and the recipe of one model; a preset is one of these."""
    # what goes in and out
    views: tuple = ("cam_high", "cam_right_wrist", "cam_left_wrist")   # cameras, in the prompt's order
    robot: str = "agilex"             # whose prompt (ROBOTS); a sample's `embodiment` comes first
    prompt: str = ""                  # "": the official sentences; else ours, with {images} {robot} {task}
    subtask: bool = True              # name the sub-task first (official: SUBTASK_MODE)
    image_size: int = 0               # side of a square picture [pixels]; 0: 320 x 240, as officially
    min_pixels: int = 3136            # a picture is enlarged, or
    max_pixels: int = 12_845_056      # shrunk, to multiples of patch_size * merge_size between these
    depth: float = 0.0                # one more picture: the first view's depth, black from here [m]; 0: no
    horizon: int = 30                 # T: actions in one chunk
    chunks: int = 1                   # chunks in one answer, at most
    action_dim: int = 14              # A: 7 per arm, of the body that has the most; others have fewer
    gripper_open: float = 1.0         # the gripper to hold when none is known (tabletop: 1 = open)
    state_dim: int = 0                # length of a state that comes along; checked, never read; 0: any
    # actions as codes
    tokens: str = "fast"              # fast (released) | omnisat
    codes: int = 2048                 # action ids that the vocabulary has room for
    fast: str = "physical-intelligence/fast"     # its tokenizer.json: file, folder, hub id; or "fit": made
    #                                   when training starts, from the training data
    fast_scale: float = 10.0          # DCT coefficients are rounded after this
    fast_min: int = -354              # the coefficient that becomes character 0
    fast_vocab: int = 2048            # entries of a vocabulary that is made
    omnisat: str = ""                 # its codebooks: file, folder; or "fit"
    points: int = 0                   # N: control points of a spline; 0: as many as actions
    degree: int = 1
    levels: tuple = (2, 1, 1)         # L: codes per degree of freedom of position, rotation, gripper
    entries: int = 2048               # K: codewords per group and level
    tolerance: float = 0.12           # a larger error (of [-1, 1]) is repaired by one more code
    # vision: Qwen2.5-VL's tower
    patch_size: int = 14
    merge_size: int = 2               # merge_size x merge_size patches become one token
    temporal_patch_size: int = 2      # a still picture is two equal frames
    vit_width: int = 1280
    vit_depth: int = 32
    vit_heads: int = 16
    vit_mlp: int = 3420
    window_size: int = 112            # most blocks attend inside windows of this size [pixels]
    full_attention: tuple = (7, 15, 23, 31)      # blocks that see the whole picture
    # language: Qwen2.5-3B
    llm_width: int = 2048
    llm_depth: int = 36
    llm_heads: int = 16
    llm_kv_heads: int = 2
    llm_mlp: int = 11008
    llm_init: float = 0.02            # standard deviation of fresh weights
    vocab: int = 151936
    rope_theta: float = 1e6
    mrope_section: tuple = (16, 24, 24)          # rotary frequencies that turn with time, row, column
    # text
    system: str = "You are a helpful assistant."     # "": no system turn
    action_id: int = 149_595          # code 0; the others follow, up to 151642
    pad_id: int = 151_643
    im_start_id: int = 151_644
    im_end_id: int = 151_645          # ends the answer
    vision_start_id: int = 151_652
    vision_end_id: int = 151_653
    image_id: int = 151_655
    boa_id: int = 151_665             # <boa>: from here on, actions
    eoa_id: int = 151_666             # <EOA>: the task is done
    split_id: int = 151_667           # between two chunks; the servers cut here, and call it <eoa>
    tokenizer: str = "BAAI/RoboBrain-X0-Preview"     # of text: "tiny", a folder or file, or a hub id
    # acting
    execute: int = 30                 # actions played per chunk; none overlap (official clients: 20 or 30)
    constrained: bool = True          # text and codes never mix, a chunk always decodes; False: as officially
    lenient: str = "none"             # codes that make no chunk: none (hold the pose) | server | strict | v2
    temperature: float = 0.0          # 0: greedy; the official Franka server: 0.2
    repetition_penalty: float = 1.0   # of generation_config.json
    max_new_tokens: int = 768         # official; a constrained answer ends by itself
    max_words: int = 64               # tokens of a constrained sub-task
    draft: str = "previous"           # speculate with: previous (answer) | none; the answer is the same
    window: int = 8                   # tokens read per pass when speculating
    int8: bool = False                # passes of at most 32 tokens read matrices of 8 bits: other answers
    # training
    data: str = ""
    vision_lr: float = 0.1            # the tower's learning rate, as a share of lr
    lr: float = 5e-5
    lr_schedule: str = "cosine"       # constant | cosine
    warmup: int = 30                  # steps
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0            # 0: off
    ema: float = 0.0
    batch: int = 32                   # samples per process (official: 256 in all)
    steps: int = 330
    init: str = ""
    seed: int = 42

    def __post_init__(self):
        ids = [name for name in vars(self) if name.endswith("_id")]
        zero = ("image_size", "full_attention", "state_dim", "points", "warmup", "seed", *ids)
        check_config(
            vars(self), vars(Config), multiples=(("llm_width", "llm_heads", 2), ("vit_width", "vit_heads", 2),
                                                 ("llm_heads", "llm_kv_heads")),
            least={**dict.fromkeys(zero, 0), "fast_min": -1_000_000, "gripper_open": -np.inf},
            most={"execute": "horizon", "vision_lr": 1, "points": "horizon"},
            below={**dict.fromkeys(ids, "vocab"), "ema": 1, "betas": 1, "full_attention": "vit_depth",
                   "seed": 2**63},
            choices={"tokens": ("fast", "omnisat"), "lenient": ("none", "server", "strict", "v2"),
                     "draft": ("previous", "none"), "lr_schedule": ("constant", "cosine")})
        if 2 * sum(self.mrope_section) != self.llm_width // self.llm_heads:
            raise ValueError(f"mrope_section={self.mrope_section} must sum to half a head, "
                             f"{self.llm_width // self.llm_heads // 2}.")
        try:
            self.prompt.format(images="", robot="", task="")
        except (LookupError, ValueError) as e:
            raise ValueError(f"prompt={self.prompt!r}: {{images}}, {{robot}}, {{task}} are filled in, found "
                             f"{e}.") from e
        inside = [name for name in ids if 0 <= getattr(self, name) - self.action_id < self.codes]
        if inside != ["action_id"] or self.action_id + self.codes > self.vocab:
            raise ValueError(f"{self.codes} codes from action_id={self.action_id} on must fit into vocab="
                             f"{self.vocab}, and hold no other id, found {inside}.")
        if -self.fast_min < self.fast_scale * self.horizon ** 0.5:
            raise ValueError(f"fast_min={self.fast_min}: with fast_scale={self.fast_scale} and horizon="
                             f"{self.horizon}, coefficients go down to "
                             f"{-int(self.fast_scale * self.horizon ** 0.5 + 0.5)}; lower fast_min.")
        if self.lenient == "server" and self.horizon != 30:
            raise ValueError(f"lenient='server' makes 30 actions, horizon={self.horizon}: choose strict.")
        if self.tokens == "omnisat" and (len(self.levels) != 3 or self.entries > self.codes):
            raise ValueError(f"omnisat wants three levels, found {self.levels}, and room for entries="
                             f"{self.entries}, there are codes={self.codes}.")

    @property
    def legal(self):
        """Ids that an answer without words is made of: the codes, then <boa>, <EOA>, split, end."""
        return [*range(self.action_id, self.action_id + self.codes), self.boa_id, self.eoa_id, self.split_id,
                self.im_end_id]


PRESETS = {
    "3b": Config(),                                            # BAAI/RoboBrain-X0-Preview
    "tiny": Config(                                            # 1 M parameters, for two CPU cores
        views=("third",), robot="gripper", prompt="{images}robot {robot} task: {task}", subtask=True,
        image_size=96, min_pixels=144, patch_size=12, merge_size=1, vit_width=64, vit_depth=4, vit_heads=2,
        vit_mlp=128, full_attention=(0, 1, 2, 3), llm_width=128, llm_depth=4, llm_heads=4, llm_kv_heads=2,
        llm_mlp=256, llm_init=0.06, vocab=1552, rope_theta=1e4, mrope_section=(4, 6, 6), horizon=4,
        action_dim=14, codes=1024, fast="assets/robobrain_x0_tiny_actions", fast_min=-21, fast_vocab=128,
        omnisat="assets/robobrain_x0_tiny_actions", entries=128, system="", action_id=512,
        pad_id=1536, im_start_id=1537, im_end_id=1538, vision_start_id=1539, vision_end_id=1540,
        image_id=1541, boa_id=1542, eoa_id=1543, split_id=1544, tokenizer="tiny", execute=3, max_words=16,
        window=4, data="tabletop+tabletop@dual", vision_lr=1.0, lr=6e-4, warmup=50, weight_decay=1e-10,
        batch=32, steps=3400, init="assets/robobrain_x0_tiny_trunk.safetensors"),
}
PREDICTS = "actions"              # of a sample; see the top of common.py


def configure(cfg, **overrides):
    """`cfg` with other values; an unknown name is a ValueError with the nearest match."""
    for name in overrides:
        choose("robobrain_x0.Config has no field", name, [f.name for f in fields(Config)])
    return replace(cfg, **overrides)


# ---- Rotations and poses ----------------------------------------------------------------------------------
# All (..., n) float64. Quaternions are x y z w; Euler angles "xyz" about fixed axes: R = Rz(c) Ry(b) Rx(a);
# 6-D: the first, then the second column of R. A delta is a rotation from the left, in the base frame.

def quat_multiply(p, q):
    """p * q: first q turns, then p."""
    (a, w), (b, v) = (p[..., :3], p[..., 3:]), (q[..., :3], q[..., 3:])
    return np.concatenate([w * b + v * a + np.cross(a, b), w * v - (a * b).sum(-1, keepdims=True)], -1)


def unit(x):
    """x scaled to length 1 along the last axis; what has no direction is a ValueError."""
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    if not (np.isfinite(norm) & (norm > 0)).all():
        raise ValueError(f"a rotation of length {norm.min()} has no direction; send a unit quaternion.")
    return x / norm


def rotvec_to_quat(v):
    """Rotation vectors (..., 3) [rad] -> unit quaternions xyzw (..., 4)."""
    angle = np.linalg.norm(v, axis=-1, keepdims=True)
    return np.concatenate([0.5 * np.sinc(angle / (2 * np.pi)) * v, np.cos(angle / 2)], -1)


def quat_to_rotvec(q):
    """Of the shorter way: an angle in [0, pi]."""
    q = unit(q)
    half = np.arctan2(np.linalg.norm(q[..., :3], axis=-1, keepdims=True), np.abs(q[..., 3:]))
    return np.where(q[..., 3:] < 0, -2.0, 2.0) * q[..., :3] / np.sinc(half / np.pi)


def euler_to_quat(euler):
    """Angles about the fixed axes x, then y, then z (..., 3) [rad] -> unit quaternions xyzw (..., 4)."""
    x, y, z = (rotvec_to_quat(euler[..., i:i + 1] * np.eye(3)[i]) for i in range(3))
    return quat_multiply(z, quat_multiply(y, x))


def quat_to_euler(q):
    """Angles in [-pi, pi], [-pi/2, pi/2], [-pi, pi]; where b = +-pi/2 leaves c open, c = 0."""
    m = np.moveaxis(quat_to_matrix(q), (-2, -1), (0, 1))                            # (3, 3, ...)
    cos_b = np.hypot(m[0, 0], m[1, 0])
    locked = cos_b < 1e-7
    a = np.where(locked, np.arctan2(-m[1, 2], m[1, 1]), np.arctan2(m[2, 1], m[2, 2]))
    c = np.where(locked, 0.0, np.arctan2(m[1, 0], m[0, 0]))
    return np.stack([a, np.arctan2(-m[2, 0], cos_b), c], -1)


def quat_to_matrix(q):
    """Quaternions xyzw (..., 4) -> rotation matrices (..., 3, 3)."""
    q = unit(q)[..., None, :]
    columns = quat_multiply(quat_multiply(q, np.eye(3, 4)), q * [-1, -1, -1, 1])    # the axes, turned
    return columns[..., :3].swapaxes(-1, -2)                                        # (..., 3, 3)


def matrix_to_quat(m):
    """By the largest of the four ways to divide, so that nothing small is divided by."""
    (a, b, c), (d, e, f), (g, h, i) = np.moveaxis(m, (-2, -1), (0, 1))
    ways = np.array([[1 + a - e - i, b + d, c + g, h - f], [b + d, 1 + e - a - i, f + h, c - g],
                     [c + g, f + h, 1 + i - a - e, d - b], [h - f, c - g, d - b, 1 + a + e + i]])
    best = np.argmax([a, e, i, a + e + i], 0)                  # way k divides by 4 (x, y, z, w)[k] squared
    return unit(np.take_along_axis(np.moveaxis(ways, (0, 1), (-2, -1)), best[..., None, None], -2)[..., 0, :])


def matrix_to_6d(m):
    """Rotation matrices (..., 3, 3) -> their first two columns, one after the other (..., 6)."""
    return np.concatenate([m[..., :, 0], m[..., :, 1]], -1)


def matrix_from_6d(d6):
    """Gram-Schmidt: (..., 6) of any length and angle -> rotation matrices."""
    first = unit(d6[..., :3])
    third = unit(np.cross(first, d6[..., 3:]))
    return np.stack([first, np.cross(third, first), third], -1)


def quat_delta(now, later):
    """The rotation vector that turns `now` into `later`, from the left. (Officially `later` is first flipped
    to now's side; the shorter way is taken anyhow.)"""
    return quat_to_rotvec(quat_multiply(unit(later), unit(now) * [-1, -1, -1, 1]))


def joint_deltas(joints, step=1):
    """Joints (step T + 1, 7 per arm: 6 angles, gripper) -> (T, 7 per arm): differences, the next gripper."""
    q = np.asarray(joints, np.float64)[::step]
    out = np.diff(q, axis=0)
    out[:, 6::7] = q[1:, 6::7]
    return out


def pose_deltas(poses, step=1):
    """Poses (step T + 1, 7 per arm: x y z, Euler, gripper) -> actions (T, 7 per arm), of every step-th pose.

    Row i: from pose i to pose i + 1; the gripper is that of i + 1 (official compute_eepose_delta).
    """
    p = np.asarray(poses, np.float64)[::step]
    out, turns = joint_deltas(p), euler_to_quat(p.reshape(len(p), -1, 7)[..., 3:6])     # (T + 1, arms, 4)
    out.reshape(len(out), -1, 7)[..., 3:6] = quat_delta(turns[:-1], turns[1:])
    return out


def pose_deltas_summed(poses, step):
    """As `pose_deltas`, but one-step deltas are summed, rotation vectors too (official compute_delta_v2)."""
    one = pose_deltas(poses)
    one = one[:len(one) // step * step].reshape(-1, step, one.shape[1])             # (T, step, A)
    return np.where(np.arange(one.shape[2]) % 7 == 6, one[:, -1], one.sum(1))


def state_6d(poses):
    """Poses (T, 7 per arm) -> the state (T, 10 per arm) that data sets store: x y z, 6-D, gripper. It is in
    the data; the model does not read it."""
    p = np.asarray(poses, np.float64).reshape(len(poses), -1, 7)
    turn = matrix_to_6d(quat_to_matrix(euler_to_quat(p[..., 3:6])))
    return np.concatenate([p[..., :3], turn, p[..., 6:]], -1).reshape(len(p), -1)


@dataclass(frozen=True)
class Robot:
    """One body: how its prompt names it, how its official server speaks (methods sheet 3.3, 7.4, 7.5)."""
    called: str                       # in the prompt
    name: str = ""                    # of its service ("": it has none)
    port: int = 0
    cameras: tuple = ("cam_head", "cam_right_wrist", "cam_left_wrist")
    arms: int = 2
    effector: str = "(EEF) poses"
    hands: str = "EEF, and"           # "... control the right arm {hands} the last 7 ..." without sub-task
    seen: tuple = ("are: ", "are: ")  # "Your current visual inputs ..." without and with sub-task
    hz: int = 30
    horizon: int = 30
    rotation: str = "quat"            # of the pose that is sent and answered: quat | euler
    gripper: str = "raw"              # raw | clip to [0, 1] | invert: 1 - g, clipped
    reported: float = 1.0             # the gripper that it reports, in units of the one that it is told
    bgr: bool = False                 # swap red and blue before the model sees it
    stats: tuple = ("action.eepose", "action.eepose")          # key without and with sub-task
    temperature: float = 0.0
    version: str = "1.0.0"            # 2.0.0: two more options for generate(), and /health tells the GPU
    tells_path: bool = True           # /health tells the model's path
    incomplete: str = "Incomplete or malformed request data"
    unloaded: str = "Model not loaded, please check service status"

    @property
    def pose_dim(self):
        """Numbers in a reported pose: position, rotation and gripper of each arm."""
        return self.arms * (8 if self.rotation == "quat" else 7)


ROBOTS = {
    # FAITHFUL: red and blue are swapped for A2D and R1-Lite, though R1-Lite's client already sends RGB.
    # Test: test_robobrain_x0.py::test_red_and_blue_are_swapped_for_a2d_and_r1lite_only
    "a2d": Robot("an A2D dual-arm", "A2D", 5004, gripper="invert", bgr=True, seen=("are: ", "are:"),
                 stats=("action.eepose.delta",) * 2),
    "franka": Robot("a Franka single-arm", "Franka", 5002, ("cam_front", "cam_wrist"), 1, gripper="clip",
                    seen=("include: ", "are "), temperature=0.2, version="2.0.0",
                    incomplete="Request data is incomplete or in the wrong format"),
    "agilex": Robot("an Agilex dual-arm", "Agilex", 5001, ("cam_high", "cam_right_wrist", "cam_left_wrist"),
                    effector="poses (EEPose)", hands="EEPose and", rotation="euler", reported=10.0,
                    version="2.0.0", incomplete="Request data is incomplete or in incorrect format"),
    "r1lite": Robot("an r1lite dual-arm", "R1-Lite", 5003, bgr=True, tells_path=False,
                    stats=("action.eepose.delta", "action.eepose"), unloaded="Model not loaded"),
    # These have no service: LIBERO's prompts, and the two bodies of our tabletop.
    "libero": Robot("a Franka single-arm", cameras=("agentview", "wrist"), arms=1, hz=10, horizon=10,
                    seen=("include: ", "are ")),
    "gripper": Robot("a tabletop single-arm", cameras=("third",), arms=1, hz=5),
    "dual": Robot("a tabletop dual-arm", cameras=("third",), hz=5),
}


def robot_of(name):
    """The Robot of that name; an unknown one is a ValueError with the nearest match."""
    choose("there is no robot", name, list(ROBOTS))
    return ROBOTS[name]


def read_pose(robot, pose):
    """What a robot sent as `eef_pose`, (pose_dim,) or (1, pose_dim), -> (arms, 7 or 8) float64."""
    body, p = robot_of(robot), np.zeros(0)
    with suppress(TypeError, ValueError):                      # no numbers, or rows of several lengths
        p = np.array(pose, np.float64).squeeze()
    if p.shape != (body.pose_dim,) or not np.isfinite(p).all():
        raise ValueError(f"eef_pose={pose!r:.60}: {robot} sends {body.pose_dim} finite numbers, right arm "
                         "first.")
    return p.reshape(body.arms, -1)


def integrate(robot, pose, deltas):
    """The pose a robot sent + actions (T, 7 per arm) -> absolute poses (T, pose_dim), as it expects them."""
    body, p, out = robot_of(robot), read_pose(robot, pose), []
    to_quat, back = (unit, unit) if body.rotation == "quat" else (euler_to_quat, quat_to_euler)
    for d in np.asarray(deltas, np.float64).reshape(len(deltas), body.arms, 7):
        turned = quat_multiply(rotvec_to_quat(d[:, 3:6]), to_quat(p[:, 3:-1]))
        grip = 1 - d[:, 6:] if body.gripper == "invert" else d[:, 6:]
        grip = grip if body.gripper == "raw" else np.clip(grip, 0, 1)
        p = np.concatenate([p[:, :3] + d[:, :3], back(turned), grip], 1)            # (arms, 7 or 8)
        out.append(p.ravel())
    return np.stack(out)


# ---- Normalization ----------------------------------------------------------------------------------------

def scale_offset(stats, x):
    """(scale, offset), each (A,), of statistics as in an official file, or as in ours (q01, q99), for actions
    x (..., A)."""
    if "scale_" in stats:
        scale, offset = (np.asarray(stats[name], np.float64) for name in ("scale_", "offset_"))
    elif "q01" in stats and "q99" in stats:
        low, high = (np.asarray(stats[name], np.float64) for name in ("q01", "q99"))
        scale = 2 / (high - low + 1e-8)
        offset = -1 - low * scale
    else:
        raise ValueError(f"the statistics have no q01 and q99, only {', '.join(stats)}; compute them anew.")
    if np.shape(x)[-1] != len(scale):
        raise ValueError(f"actions have {np.shape(x)[-1]} numbers, the statistics {len(scale)}; choose those "
                         "of the same robot.")
    return scale, offset


def quantile_stats(x):
    """Actions (n, A) -> the four lists of an official statistics file.

    A dimension that never varies gets the scale 2e8: it becomes -1, and -1 becomes its value again.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"statistics: finite actions (n, A) are expected, found shape {x.shape}.")
    low, high = np.quantile(x, [0.01, 0.99], axis=0)
    values = low, high, *scale_offset({"q01": low, "q99": high}, x)
    return dict(zip(("quantiles_low_", "quantiles_high_", "scale_", "offset_"), [v.tolist() for v in values]))


def normalize(x, stats, clip=True):
    """Actions (..., A) in robot units -> [-1, 1] float64; the gripper is treated like the rest."""
    scale, offset = scale_offset(stats, x)
    x = np.asarray(x, np.float64) * scale + offset
    return np.clip(x, -1, 1) if clip else x


def body_stats(stats, key, observations):
    """(the statistics to act by, their size A): of data set `key`, else the only ones of the body's size."""
    sizes = {7 * ROBOTS[o["embodiment"]].arms for o in observations if o.get("embodiment") in ROBOTS}
    fits = [name for name, x in stats.items() if {len(q) for q in x["action"].values()} == sizes]
    found = pick_stats(stats, fits[0] if key is None and len(fits) == 1 else key)
    A = len(next(iter(found.values())))
    if sizes - {A}:
        raise ValueError(f"unnorm_key={key!r} has statistics of {A} numbers, the observations are of bodies "
                         f"with {sorted(sizes)}: act for one body at a time, with its own statistics.")
    return found, A


def denormalize(x, stats):
    """The inverse, without clipping. Note that 0 is the middle of the quantiles, not "no motion"."""
    scale, offset = scale_offset(stats, x)
    return (np.asarray(x, np.float64) - offset) / scale


# ---- Actions as codes: FAST+ ------------------------------------------------------------------------------

@functools.cache
def dct_matrix(T):
    """(T, T): its product with (T, D) is the orthonormal DCT-II along time, its transpose the inverse."""
    k, t = np.arange(T)[:, None], np.arange(T)
    return np.sqrt(np.where(k, 2.0, 1.0) / T) * np.cos(np.pi * (2 * t + 1) * k / (2 * T))


def finite(chunk):
    """A chunk (T, D) as float64; NaN and infinity, which no code can say, are a ValueError."""
    if not np.isfinite(chunk).all():
        raise ValueError("the actions hold NaN or infinity; look at the data, or leave that sample out.")
    return np.asarray(chunk, np.float64)


class Grammar(NamedTuple):
    """Which code may follow, in T x D numbers: state = after[last code] + slot[n], n = units begun so far.

    A chunk is whole when least <= n <= size and after[last code] = 0.
    """
    size: int                         # units of a chunk, at most
    least: int                        # and at least
    count: torch.Tensor               # (codes,) units that a code begins
    after: torch.Tensor               # (codes,)
    slot: torch.Tensor                # (size + 1,)
    table: torch.Tensor               # (states, codes) bool: may it follow?


# The byte that each character of a byte-level vocabulary stands for (GPT-2's alphabet).
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}


class Fast:
    """FAST+: DCT along time -> rounded -> characters -> byte-level BPE (paper: arXiv 2501.09747)."""
    fitted = True                     # False: on made-up chunks

    def __init__(self, bpe, scale=10.0, low=-354, codes=2048):
        """bpe: a tokenizers.Tokenizer; low: the coefficient of character 0 (official min_token)."""
        self.bpe, self.scale, self.low, self.codes = bpe, scale, low, codes
        if bpe.get_vocab_size() > codes:
            raise ValueError(f"this FAST vocabulary has {bpe.get_vocab_size()} entries, the model has room "
                             f"for codes={codes}.")

    @classmethod
    def load(cls, path, *how):
        """From a tokenizer.json; how: scale, low, codes. ValueError: it is none, or is too large."""
        try:
            return cls(Tokenizer.from_file(str(path)), *how)
        except Exception as e:                                 # tokenizers raises bare Exceptions
            raise ValueError(f"{path} is no FAST tokenizer.json: {str(e).splitlines()[0]}") from e

    @classmethod
    def fit(cls, chunks, scale=10.0, codes=1024, low=None):
        """One's own vocabulary for normalized chunks, a list of (T, D).

        low=None: as officially, from the data's smallest coefficient on; else every coefficient that actions
        in [-1, 1] can have is in it, and all characters may merge (officially letters with letters only).
        FAITHFUL: officially the first letters are the characters themselves, but the BPE works on bytes: most
        of these letters are never used, and bytes that the data lacks are lost without a word (`encode`
        says so). Test: test_robobrain_x0.py::test_official_fit_loses_what_the_data_lacks
        """
        integers = [np.rint(dct_matrix(len(c)) @ c * scale).astype(int).ravel() for c in chunks]
        official, bound = low is None, int(scale * max(map(len, chunks)) ** 0.5 + 0.5)
        if official:
            low, high = (f(np.concatenate(integers)) for f in (np.min, np.max))
            letters = [chr(i) for i in range(high - low + 1)]
        else:
            known = {b for c in range(-bound - low, bound - low + 1) for b in chr(max(c, 0)).encode()}
            letters = [letter for letter, b in BYTES.items() if b in known]
        if len(letters) - official > codes:
            raise ValueError(f"codes={codes}: there are {len(letters)} letters; raise codes, or lower scale.")
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=official)
        bpe.decoder, bpe.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(vocab_size=codes, min_frequency=2, show_progress=False,
                                      special_tokens=[], initial_alphabet=letters, max_token_length=10000)
        bpe.train_from_iterator(("".join(map(chr, np.maximum(x - low, 0))) for x in integers), trainer)
        return cls(bpe, scale, int(low), codes)

    def save(self, folder):
        """Write fast_tokenizer.json into a folder."""
        atomic_write(Path(folder) / "fast_tokenizer.json",
                     lambda part: part.write_text(self.bpe.to_str(), encoding="utf-8"))

    def encode(self, chunk):
        """A chunk (T, D) in [-1, 1] -> list of codes.

        PAPER!=CODE: the paper's figure writes one dimension after the other; the code writes all dimensions
        of frequency 0, then of frequency 1. Test: test_robobrain_x0.py::test_low_frequencies_come_first
        """
        integers = np.rint(dct_matrix(len(chunk)) @ finite(chunk) * self.scale)
        text = "".join(map(chr, np.maximum(integers - self.low, 0).astype(int).ravel()))
        codes = self.bpe.encode(text, add_special_tokens=False).ids
        if self.bpe.decode(codes) != text:
            raise ValueError("the FAST vocabulary is too small, it lacks a coefficient of this chunk: set "
                             "fast=fit, or make one of such data (python examples/action_tokens.py).")
        return codes

    def coefficients(self, codes):
        """List of codes -> (n,) integers, as the official decoder reads them."""
        return np.array([ord(c) for c in self.bpe.decode(list(codes))], np.int64) + self.low

    def decode(self, codes, T, D):
        """List of codes -> (chunk (T, D) in [-1, 1] but for the rounding, "") or (None, what is wrong)."""
        c = self.coefficients(codes)
        if 0xFFFD in c - self.low:
            return None, "the codes are no valid UTF-8"
        if len(c) != T * D:
            return None, f"{len(c)} coefficients instead of {T} x {D}"
        if np.abs(c).max() > self.scale * T ** 0.5 + 0.5:
            return None, f"a coefficient of {np.abs(c).max()} is beyond what actions in [-1, 1] can have"
        return dct_matrix(T).T @ (c.reshape(T, D) / self.scale), ""

    def official(self, codes, T, D, how="server"):
        """As the released code decodes, whatever comes: "server" | "strict" | "v2" -> (T, D), mostly.

        FAITHFUL: "server" cuts, or fills with zeros, to 30 rows of frequencies (whatever T is), which is a
        motion of another timing; "strict" gives zeros; "v2" cuts or fills the actions. A character that is no
        valid UTF-8 becomes a coefficient of 65179. Test: test_robobrain_x0.py::test_lenient_decoders_differ
        """
        def rows(x, n):
            return np.concatenate([x, np.zeros((max(0, n - len(x)), D))])[:n]
        c = self.coefficients(codes)
        c = c.reshape(-1, D) if len(c) % D == 0 else np.zeros((T, D))
        if len(c) != T and how != "v2":
            c = rows(c, 30) if how == "server" else np.zeros((T, D))
        if not len(c):
            raise ValueError("no codes: the official v2 decoder cannot invert an empty DCT.")
        x = dct_matrix(len(c)).T @ (c / self.scale)
        return rows(x, T) if how == "v2" else x

    @functools.cache
    def grammar(self, T, D):
        """Codes that can follow so that T x D characters come out, each a coefficient that actions can have.

        A unit is a character of 1 or 2 bytes. A code may end inside one: then its first byte is the state.
        """
        bound = self.scale * T ** 0.5 + 0.5
        known = {chr(c - self.low) for c in range(int(np.ceil(-bound)), int(bound) + 1) if 0 <= c - self.low}
        known = {c for c in known if len(c.encode()) <= 2}
        leads = sorted({b"", *(c.encode()[:-1] for c in known)})                    # what may be left over
        words = {k: bytes(map(BYTES.get, word)) for word, k in self.bpe.get_vocab().items()
                 if word and BYTES.keys() >= set(word)}

        def walk(lead, word):
            """(units begun, the byte left over) after the bytes of `word` behind `lead`; None: not valid."""
            reader = codecs.getincrementaldecoder("utf-8")()
            try:
                text, left = reader.decode(lead + word), reader.getstate()[0]
            except UnicodeDecodeError:
                return None
            fits = known >= set(text) and left in leads
            return (len(text) + len(left) - len(lead), left) if fits else None

        states = [b"", *(a for a in leads if a and any(walk(a, w) == (0, b"") for w in words.values()))]
        count, after = torch.zeros(self.codes, dtype=torch.long), torch.zeros(self.codes, dtype=torch.long)
        table = torch.zeros(len(states), self.codes, dtype=torch.bool)
        for k, word in words.items():
            for s, lead in enumerate(states):
                n, left = walk(lead, word) or (0, None)
                if left in states:
                    table[s, k], count[k], after[k] = True, n, states.index(left)
        if not (table[0] & (count == 1)).any():
            raise ValueError("the FAST vocabulary is too small: it has no single coefficient of such chunks.")
        return Grammar(T * D, T * D, count, after, torch.zeros(T * D + 1, dtype=torch.long), table)


# ---- Actions as codes: OmniSAT ----------------------------------------------------------------------------
# Published (arXiv 2510.09667): a B-spline's control points per degree of freedom; three groups, position,
# rotation, gripper; residual vector quantization of each degree of freedom's points; so L codes per degree.
# Ours, as no code is public: sizes, squared distance, EMA training, the numbering of codes, repairs.

GROUPS, GROUP_OF = ("position", "rotation", "gripper"), (0, 0, 0, 1, 1, 1, 2)      # of an arm's 7 numbers


def spline_knots(N, degree):
    """Clamped and uniform on [0, 1]: (N + degree + 1,)."""
    return np.concatenate([np.zeros(degree), np.linspace(0, 1, N - degree + 1), np.ones(degree)])


def spline_basis(T, N, degree):
    """(T, N): the N B-splines at T equally spaced times, both ends included (Cox and de Boor)."""
    knots, u = spline_knots(N, degree), np.linspace(0, 1, T)[:, None]
    b = ((knots[:-1] <= u) & (u < knots[1:])).astype(np.float64)                    # (T, N + degree)
    b[u[:, 0] == 1, N - 1] = 1                                 # the last span has its end
    for p in range(1, degree + 1):
        width = knots[p:] - knots[:-p]
        share = np.divide(u - knots[:-p], width, out=np.zeros((T, len(width))), where=width > 0)
        b = share[:, :-1] * b[:, :-1] + ((width > 0) - share)[:, 1:] * b[:, 1:]
    return b


def spline_fit(basis, ridge=1e-6):
    """(N, T): its product with a chunk (T, D) is the control points (N, D) of least squares."""
    T, N = basis.shape
    if N > T:
        raise ValueError(f"{N} control points for {T} actions: lower points, or raise horizon.")
    return np.linalg.solve(basis.T @ basis + ridge * np.eye(N), basis.T)


def nearest(x, book):
    """x (..., N), codewords (K, N) -> (...,) which is nearest (squared distance, the first of equals)."""
    return (np.square(book).sum(1) / 2 - x @ book.T).argmin(-1)


def residual_quantize(x, books):
    """x (..., N), books (L, K, N) -> (codes (..., L), quantized (..., N), what each level leaves (L,)).

    Level by level the nearest codeword of what is left.
    """
    left, codes, errors = np.asarray(x), [], []
    for book in books:
        codes.append(nearest(left, book))
        left = left - book[codes[-1]]
        errors.append((left ** 2).mean())
    return np.stack(codes, -1), np.asarray(x) - left, np.array(errors)


def train_codebook(x, K, rng, steps=60, decay=0.9):
    """x (n, N) -> K codewords (K, N): k-means whose means are running averages; unused words start anew."""
    book, batch = x[rng.choice(len(x), K, replace=len(x) < K)], 4 * K
    count, total = np.ones(K, x.dtype), book.copy()
    for _ in range(steps):
        rows = x[rng.integers(len(x), size=batch)]
        near = nearest(rows, book)                                                  # (batch,)
        total *= decay
        np.add.at(total, near, (1 - decay) * rows)
        count = (decay * count + (1 - decay) * np.bincount(near, minlength=K)).astype(x.dtype)
        dead = count < 0.05 * batch / K                                             # a twentieth of its share
        total[dead], count[dead] = rows[rng.integers(batch, size=dead.sum())], 1.0
        book = total / count[:, None]
    return book


class OmniSAT:
    """books: of positions, rotations, grippers, (L, K, N) float32 each, shared by all arms.

    A chunk is L codes per degree of freedom, then repairs (ours): a code for each number that is wrong by
    more than `tolerance`; at most `repairs` times as many as there are codes before, the worst first.
    """
    fitted, repairs = True, 8         # fitted: not on made-up chunks

    def __init__(self, books, degree, codes=2048, tolerance=np.inf):
        self.books, self.degree, self.codes = [np.asarray(b, np.float32) for b in books], degree, codes
        self.tolerance, (self.K, self.N) = tolerance, self.books[0].shape[1:]
        if self.K > codes:
            raise ValueError(f"codebooks of {self.K} words need more than codes={codes}.")

    @classmethod
    def load(cls, path, codes=2048):
        """The file that `save` wrote; codes: the model has room for so many. ValueError: another file."""
        held = {name: x.numpy() for name, x in load_weights(path).items()}
        books = [held[name] for name in GROUPS if name in held and held[name].ndim == 3]
        if {*held} != {*GROUPS, "degree", "tolerance"} or len({b.shape[1:] for b in books}) * len(books) != 3:
            raise ValueError(f"{path}: {', '.join(GROUPS)} (L, K, N), degree, tolerance are expected, found "
                             f"{[*held]}.")
        return cls(books, int(held["degree"]), codes, float(held["tolerance"]))

    @classmethod
    def fit(cls, chunks, points, degree, levels, entries, codes=2048, tolerance=np.inf, seed=0):
        """Train the codebooks on normalized chunks, a list of (T, 7 per arm), one level after the other."""
        rng, group = np.random.default_rng(seed), np.array(GROUP_OF)
        arms = [c[:, i:i + 7] for c in chunks for i in range(0, len(cls.groups(c.shape[1])), 7)]   # (T, 7)
        degree = min(degree, points - 1)
        control = spline_fit(spline_basis(len(arms[0]), points, degree)) @ np.stack(arms)        # (n, N, 7)
        control, books = control.swapaxes(1, 2).astype(np.float32), []
        for g, L in enumerate(levels):
            left = control[:, group == g].reshape(-1, points)                       # (n dofs, N)
            books.append(np.zeros((L, entries, points), np.float32))
            for book in books[-1]:
                book[:] = train_codebook(left, entries, rng)
                left = np.concatenate([x - book[nearest(x, book)]
                                       for x in np.array_split(left, len(left) // 4096 + 1)])
        return cls(books, degree, codes, tolerance)

    @staticmethod
    def groups(D):
        """Which group (GROUPS) each of D numbers is in, (D,); a ValueError if these are no arms of 7."""
        if D % 7:
            raise ValueError(f"OmniSAT knows arms of 7 numbers (x y z, rotation, gripper), found {D}.")
        return np.tile(GROUP_OF, D // 7)                                            # (D,)

    def save(self, folder):
        """Write omnisat.safetensors into a folder."""
        held = {**dict(zip(GROUPS, self.books)), "degree": np.array(self.degree),
                "tolerance": np.array(self.tolerance)}
        atomic_write(Path(folder) / "omnisat.safetensors", lambda part: save_file(held, part))

    def places(self, D):
        """(dim, group, level, first code of its range) of each code of a chunk, by dim, then level: (n, 4).

        Ranges of K codes follow each other; where there is no room for all, they begin anew: the place tells.
        """
        L, room = [len(b) for b in self.books], self.codes // self.K
        return np.array([(dim, g, level, (sum(L[:g]) + level) % room * self.K)
                         for dim, g in enumerate(self.groups(D)) for level in range(L[g])])

    def steps(self, T, D):
        """How many repairs a number has: 1, 2 ... times 2 tolerances up, as many down; 0: there are none."""
        return self.codes // (T * D) // 2 * 2 if np.isfinite(self.tolerance) else 0

    def encode(self, chunk):
        """A chunk (T, D) in [-1, 1] -> list of codes."""
        (T, D), step, fixes = np.shape(chunk), 2 * self.tolerance, []
        control = spline_fit(spline_basis(T, self.N, self.degree)) @ finite(chunk)                   # (N, D)
        codes = [residual_quantize(c, self.books[g])[0] for c, g in zip(control.T, self.groups(D))]
        codes, V = (np.concatenate(codes) + self.places(D)[:, 3]).tolist(), self.steps(T, D)
        left = (chunk - self.decode(codes, T, D)[0]).ravel()
        while V and len(fixes) < self.repairs * len(codes) and np.abs(left).max() > self.tolerance:
            worst = int(np.abs(left).argmax())
            j = int(np.clip(np.rint(left[worst] / step), -V // 2, V // 2))
            fixes.append(worst * V + j + V // 2 - (j > 0))
            left[worst] -= step * j
        return codes + sorted(fixes)

    def decode(self, codes, T, D):
        """List of codes -> (chunk (T, D), "") or (None, what is wrong). Without repairs any T will do: a
        spline has no steps."""
        (dim, group, level, first), V = self.places(D).T, self.steps(T, D)
        n, control = len(dim), np.zeros((D, self.N))
        index = np.asarray(codes[:n], np.int64) - first if n <= len(codes) else np.array([-1])
        if not ((index >= 0) & (index < self.K)).all() or any(k >= T * D * V for k in codes[n:]):
            return None, f"these {len(codes)} codes are not {n} codes in the order of OmniSAT, and repairs"
        np.add.at(control, dim, [self.books[g][n, k] for g, n, k in zip(group, level, index)])
        chunk = spline_basis(T, self.N, self.degree) @ control.T                    # (T, D)
        for place, j in (divmod(k, V) for k in codes[n:]):
            chunk.flat[place] += 2 * self.tolerance * (j - V // 2 + (j >= V // 2))
        return chunk, ""

    @functools.cache
    def grammar(self, T, D):
        """Each place has its own range of K codes; then come repairs."""
        V, (bases, slot) = self.steps(T, D), np.unique(self.places(D)[:, 3], return_inverse=True)
        k, n, more = torch.arange(self.codes), len(slot), len(slot) * self.repairs * (V > 0)
        table = torch.stack([*((b <= k) & (k < b + self.K) for b in bases), k < T * D * V])
        slot = torch.from_numpy(np.append(slot, [len(bases)] * (more + 1)))
        return Grammar(n + more, n, torch.ones_like(k), torch.zeros_like(k), slot, table)


# ---- Text: prompts, conversations, labels -----------------------------------------------------------------

EACH = ("Each EEPose here includes 3 delta position(xyz) + 3 delta orientation(axis-angle) + 1 "
        "gripper(opening range)\n\n")
TWO_PARTS = ("Your output must include two components: 1. Immediate sub-task: The specific action you will "
             "execute first to progress toward the overall task; 2. Control tokens: These will be decoded "
             "into a {T}×{D} action sequence to implement the sub-task. ")
ROWS = "sequence has {T} consecutive actions, each with {D} dimensions. "
ONE_PART = "You need to output control tokens that can be decoded into a {T}×{D} action sequence. The " + ROWS
DEMO_TASK = "arrange items on the table and classify them into edible and inedible categories."
NOW = " Currently, focus on completing the subtask: "
# What comes after the last picture in training: (robot, sub-task mode) -> text; of others: the first.
ENDINGS = {None: ".\nYour overall task is: {raw_task}.",
           ("agilex", False): ".\nYour overall task is: {raw_task}" + NOW + "{lan}",
           ("agilex", True): ".\nYour overall task is: {raw_task}",
           ("r1lite_demo", False): ".\nYour overall task is: {raw_task}" + NOW + "{lan}",
           ("libero", False): "\nYour overall task is: {lan}",
           ("libero", True): "\nYour overall task is: {lan}"}
TIDY = {"agilex": ("  ", " ", ""), "r1lite": ("..", ".", ""), "r1lite_demo": ("..", ".", "."),
        "agilex_demo": ("..", ".", ".")}                       # (replace, by, then append)


def official_body(robot, subtask):
    """The sentences up to and with the last picture; <image> stands for each."""
    r, rows, hands = robot_of(robot), "", "EEPose and"
    pictures = "robot front image<image> and robot wrist image<image>"
    if r.arms == 2:
        pictures = "robot front image<image>, right wrist image<image> and left wrist image<image>"
        rows, hands = ("The action " + ROWS, hands) if subtask else ("", r.hands)
        rows += (f"The first 7 dimensions control the right arm {hands} the last 7 dimensions control the "
                 f"left arm {re.split('[ ,]', hands)[0]}. ")
    text = ((TWO_PARTS if subtask else ONE_PART) + rows).format(T=r.horizon, D=7 * r.arms)
    return (f"You are controlling {r.called} robot. Your task is to adjust the end effector {r.effector} at "
            f"{r.hz}Hz to complete a specified task. {text}{EACH}Your current visual inputs "
            f"{r.seen[subtask]}{pictures}")


def serving_prompt(robot, instruction, subtask, strip_period=False):
    """What the official server of a robot asks the model.

    FAITHFUL: no period after the last picture (training has one), "are:robot" for A2D, and an instruction
    that ends in a period gets a second one (strip_period: not). Test: test_robobrain_x0.py::test_server_cases
    """
    x = instruction.lower()
    x = x.strip().removesuffix(".") if strip_period else x
    again = f"{NOW}{x}" if robot == "agilex" and not subtask else ""
    return f"{official_body(robot, subtask)}\nYour overall task is: {x}.{again}"


def training_template(name, subtask):
    """A training prompt with {raw_task} and {lan}. name: a robot, or its variant ("agilex_demo")."""
    robot = name.removesuffix("_demo")
    known = [key for key in ((name, subtask), (robot, subtask)) if key in ENDINGS]
    return official_body(robot, subtask) + ENDINGS[(known + [None])[0]]


def training_prompt(name, subtask, raw_task, task):
    """raw_task: the whole task; task: what is being done now (data sets keep both). Lower-cased."""
    raw_task = DEMO_TASK if name.endswith("_demo") else raw_task.lower()
    text = training_template(name, subtask).replace("{raw_task}", raw_task).replace("{lan}", task.lower())
    if subtask or name not in TIDY:
        return text
    old, new, more = TIDY[name]
    return text.replace(old, new) + more


# Other abilities, as RoboBrain 2.0 was taught them: (question, what is read from the answer). Coordinates are
# pixels of the picture that the model sees. {q}: the question, or the task.
TUPLES = (" Your answer should be formatted as a list of tuples, i.e. [{}], where each tuple contains the x "
          "and y coordinates of a point")
JOINTS = 'You are a robot using the joint control. The task is "{q}". Please predict '
BOX = r"\[" + r"\s*,".join([r"\s*(\d+)"] * 4) + r"\s*\]"
ABILITIES = {
    "general": ("{q}", None),
    "pointing": ("{q}." + TUPLES.format("(x1, y1), (x2, y2), ...") + " satisfying the conditions above. The "
                 "coordinates should indicate the normalized pixel locations of the points in the image.",
                 r"\(\s*(\d+)\s*,\s*(\d+)\s*\)"),
    "affordance": (JOINTS + "a possible affordance area of the end effector.", BOX),
    "trajectory": (JOINTS + "up to 10 key trajectory points to complete the task." +
                   TUPLES.format("[x1, y1], [x2, y2], ...") + ".", r"(\d+),\s*(\d+)"),
    "grounding": ("Please provide the bounding box coordinate of the region this sentence describes: {q}.",
                  BOX),
}


def ability_prompt(ability, q):
    """The question about one picture, which comes first."""
    choose("there is no ability", ability, list(ABILITIES))
    return "<image>" + ABILITIES[ability][0].replace("{q}", q)


def parse_ability(ability, answer):
    """The answer's points (n, 2) or boxes (n, 4: x1 y1 x2 y2) in pixels; of "general": the text itself."""
    pattern = ABILITIES[ability][1]
    if pattern is None:
        return answer
    found = [[int(x) for x in groups] for groups in re.findall(pattern, answer)]
    return np.array(found, np.int64).reshape(-1, re.compile(pattern).groups)


# twin: vla0.text_ids
@functools.lru_cache(4096)             # most of a prompt is the same in every sample
def text_ids(tokenizer, text):
    """A piece of text -> its ids, a tuple; no special tokens are added."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


class Words:
    """The two tokenizers: of text (a transformers one), and of actions (Fast or OmniSAT)."""

    def __init__(self, text, actions):
        self.text, self.actions = text, actions

    def encode(self, text):
        """A text -> its ids, without <s> or the like."""
        return list(text_ids(self.text, text))

    def decode(self, ids):
        """Ids -> their text, special tokens left out."""
        return self.text.decode([int(i) for i in ids], skip_special_tokens=True)


def example_chunks(cfg, n=400):
    """Smooth chunks (n, T, A) in [-1, 1]: what action tokenizers are fitted on where there is no data yet."""
    rng, t = np.random.default_rng(0), np.linspace(0, 1, cfg.horizon)[:, None]
    start, speed, bend = rng.uniform(-1, 1, (3, n, 1, cfg.action_dim))
    x = start * rng.integers(0, 2, start.shape) + speed * t + bend / 2 * np.sin(np.pi * t)
    x[..., 6::7] = np.sign(start[..., 6::7])
    return np.clip(x, -1, 1)


def fit_actions(cfg, chunks):
    """The tokenizer that cfg asks for, fitted on normalized chunks, a list of (T, A) of any bodies."""
    if cfg.tokens == "fast":
        made = Fast.fit(chunks, cfg.fast_scale, min(cfg.fast_vocab, cfg.codes), cfg.fast_min)
        return Fast(made.bpe, made.scale, made.low, cfg.codes)
    return OmniSAT.fit(chunks, cfg.points or cfg.horizon, cfg.degree, cfg.levels, cfg.entries, cfg.codes,
                       cfg.tolerance)


def load_actions(cfg, folder=None):
    """The tokenizer of actions: in a checkpoint's folder, else what cfg.fast or cfg.omnisat names ("fit": one
    for made-up chunks, until `fit` has seen the data)."""
    file = "fast_tokenizer.json" if cfg.tokens == "fast" else "omnisat.safetensors"
    path, wanted = Path(folder or "") / file, getattr(cfg, cfg.tokens)
    if folder is None or not path.is_file():
        if wanted == "fit":
            made_up = fit_actions(cfg, example_chunks(cfg))
            made_up.fitted = False
            return made_up
        if not wanted:
            raise ValueError("tokens=omnisat needs codebooks, and none are published: set omnisat=fit, or "
                             "train some (python examples/action_tokens.py), and set it to their folder.")
        own = Path(__file__).resolve().parent / wanted         # the tiny preset's lie in assets/
        path = own if own.exists() else resolve(wanted, ["tokenizer.json"], cfg.tokens)
        if path.is_dir():
            path = path / file if (path / file).is_file() else path / "tokenizer.json"
    if cfg.tokens == "fast":
        return Fast.load(path, cfg.fast_scale, cfg.fast_min, cfg.codes)
    return OmniSAT.load(path, cfg.codes)


def fit(cfg, words, dataset, stats, n=4000):
    """What train.py calls before a new run: fits the action tokenizer on up to n of the data's own chunks.

    Nothing happens where cfg names one, or --init brought one along. All processes get that of the first.
    """
    if words.actions.fitted:
        return
    box = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        rows = itertools.islice(dataset, n)
        if hasattr(dataset, "__len__"):
            rows = (dataset[i] for i in np.linspace(0, len(dataset) - 1, min(n, len(dataset))).astype(int))
        chunks = [normalize(row["actions"], pick_stats(stats, row["dataset"])) for row in rows
                  if "actions" in row and not row.get("done")]
        chunks = [c for x in chunks for c in np.split(x, len(x) // cfg.horizon)]
        box = [fit_actions(cfg, chunks) if chunks else words.actions]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    words.actions, = box


def load_tokenizer(cfg, folder=None, own=True):
    """The Words in a checkpoint folder, else of `cfg.tokenizer` ("tiny", a folder or file, a hub id).

    own=False: of the folder only the action tokenizer, as another one for text was asked for.
    """
    actions = load_actions(cfg, folder)
    if cfg.tokenizer == "tiny":
        return Words(tiny_tokenizer(), actions)
    path = Path(folder or "") / "tokenizer.json"
    if not (own and folder is not None and path.is_file()):
        path = resolve(cfg.tokenizer, ["tokenizer.json"], "--tokenizer")
        path = path / "tokenizer.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(f"--tokenizer {cfg.tokenizer}: Qwen2's tokenizer.json is needed, {path} is none.")
    return Words(PreTrainedTokenizerFast(tokenizer_file=str(path)), actions)


def answer_ids(value, chunks, words, cfg):
    """What the model is to say. value: as in the data, "<EOA>" | [words <boa>] <action_token> ... | words.

    chunks: a list of lists of codes, or None: then the markers go, and an empty answer becomes a sentence.
    """
    if value == "<EOA>":
        return [cfg.eoa_id]
    if "<action_token>" not in value:
        return words.encode(value) if value.strip() else []
    if not chunks:
        value = value.replace("<action_token>", "").replace("<action_split>", "")
        return words.encode(" ".join(value.split()) or "I understand the task.")
    before, boa, _ = value.partition("<boa>")
    ids = words.encode(before.strip()) if boa and before.strip() else []
    ids += [cfg.boa_id] * bool(ids)
    for i, codes in enumerate(chunks):
        ids += [cfg.split_id] * (i > 0) + [cfg.action_id + c for c in codes]
    return ids


def encode_conversation(turns, chunks, image_tokens, words, cfg):
    """Turns [{"from", "value"}] -> (ids, labels), of one length; labels are -100 where nothing is learnt.

        system ... | user \\n A <vision_start> pad pad <vision_end> . | assistant \\n | 812 40 ... <|im_end|>
        -100   ...                                           -100    |    -100 -100  | 812 40 ... <|im_end|>

    An odd number of turns begins with a system turn. A last value of None: the model is to write it.
    image_tokens: how many tokens each picture takes; chunks: the codes of <action_token>, see answer_ids.
    """
    turns, pictures, newline = list(turns), list(image_tokens), words.encode("\n")
    system, tail = turns.pop(0)["value"] if len(turns) % 2 else cfg.system, [cfg.im_end_id] + newline
    ids, labels = [], []

    def add(role, said):
        ids.extend([cfg.im_start_id] + words.encode(role) + newline)
        labels.extend([-100] * (len(ids) - len(labels)))
        if said is not None:
            ids.extend(said + tail)
            labels.extend(said + tail if role == "assistant" else [-100] * len(said + tail))

    if system:
        add("system", words.encode(system) if system.strip() else [])
    for i, turn in enumerate(turns):
        name, value = ("human", "gpt")[i % 2], turn["value"]
        if turn["from"] != name:
            raise ValueError(f"turn {i} is from {turn['from']!r}; human and gpt take turns, human first.")
        if name == "gpt":
            add("assistant", None if value is None else answer_ids(value, chunks, words, cfg))
            continue
        said = []
        for piece in re.split("(<image>|<video>)", value):     # each text by itself, officially
            if piece in ("<image>", "<video>"):
                if piece == "<video>" or not pictures:
                    raise ValueError(f"{piece} in turn {i}: there are {len(image_tokens)} pictures, and "
                                     "videos cannot be read.")
                said += [cfg.vision_start_id] + [cfg.image_id] * pictures.pop(0) + [cfg.vision_end_id]
            elif piece.strip():
                said += words.encode(piece)
        add("user", said)
    if pictures:
        raise ValueError(f"{len(image_tokens)} pictures, but the text has {len(pictures)} <image> less.")
    return ids, labels


# ---- Pictures -------------------------------------------------------------------------------------------

def smart_resize(h, w, factor, low, high):
    """Qwen's rule for the size of a picture of h x w: multiples of `factor`, low to high pixels."""
    if max(h, w) > 200 * min(h, w):
        raise ValueError(f"a picture of {w} x {h} is too narrow: the sides may differ by a factor of 200.")
    sides = [round(side / factor) * factor for side in (h, w)]
    if math.prod(sides) > high:
        scale = (h * w / high) ** 0.5
        return [max(factor, int(side / scale / factor) * factor) for side in (h, w)]
    if math.prod(sides) < low:
        scale = (low / (h * w)) ** 0.5
        return [math.ceil(side * scale / factor) * factor for side in (h, w)]
    return sides


def resize(image, h, w):
    """uint8 (., ., 3) -> (h, w, 3), bicubic as PIL does it."""
    image = np.ascontiguousarray(image)
    return image if image.shape[:2] == (h, w) else \
        np.array(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))


# mean and standard deviation of R, G, B
PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def patchify(image, cfg):
    """uint8 (h, w, 3) -> (patches (P, 3 patch^2) uint8, grid [1, rows, columns]), resized by Qwen's rule.

    Patches come in merge_size x merge_size blocks; a patch's values by channel, row, column.
    """
    p, m = cfg.patch_size, cfg.merge_size
    h, w = smart_resize(*image.shape[:2], p * m, cfg.min_pixels, cfg.max_pixels)
    x = torch.from_numpy(resize(image, h, w)).view(h // p // m, m, p, w // p // m, m, p, 3)
    x = x.permute(0, 3, 1, 4, 6, 2, 5)                         # rows, columns, in the block twice, 3, y, x
    return x.reshape(h // p * (w // p), -1), [1, h // p, w // p]


def to_pixels(patches, cfg):
    """Patches (P, 3 patch^2) uint8 -> what the tower wants, (P, 3 frames patch^2) float32: equal frames."""
    x = patches.view(len(patches), 3, 1, -1).float() / 255
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in PIXELS)
    return ((x - mean) / std).expand(-1, -1, cfg.temporal_patch_size, -1).flatten(1)


def rope_positions(ids, cfg, grids):
    """M-RoPE positions of a token row: ((3, L) int64: time, row, column; later tokens' position - index).

        text   | picture of rows x columns        | text
        0 1 2  | 3 3 3 ...  3+row ...  3+column   | 3 + max(rows, columns) ...
    """
    out, here, grids = [], 0, iter(grids)
    while len(out) < len(ids):
        if ids[len(out)] != cfg.image_id:
            out.append((here,) * 3)
            here += 1
        else:
            rows, columns = (side // cfg.merge_size for side in next(grids)[1:])
            out += [(here, here + r, here + c) for r in range(rows) for c in range(columns)]
            here += max(rows, columns)
    return torch.tensor(out).T, here - len(ids)


# ---- Samples and batches ----------------------------------------------------------------------------------

def depth_picture(depth, far):
    """Depth (h, w) [m] -> uint8 (h, w, 3): white at 0, black at `far` and where there is none. (Ours: the
    released model was trained on RGB only.)"""
    depth = np.nan_to_num(np.asarray(depth, np.float32), nan=0.0, posinf=far)
    gray = np.rint(255 * (1 - np.clip(depth / far, 0, 1))) * (depth > 0)
    return np.repeat(gray.astype(np.uint8)[..., None], 3, 2)


def human_turn(sample, cfg, subtask, teach):
    """The question to the model: the official sentences (to teach, or to serve), or ours (cfg.prompt)."""
    robot, task = sample.get("embodiment", cfg.robot), sample["instruction"]
    now = sample.get("subtask") or task
    for text in (task, now, robot):
        if "<|" in text or re.search("<(image|video|boa|EOA|action_)", text):
            raise ValueError(f"{text!r}: control tokens (<|...|>, <image>) are not for instructions.")
    if cfg.prompt:
        text = cfg.prompt.format(images="<image>" * len(cfg.views), robot=robot, task=task)
    else:
        r, found = robot_of(robot), (cfg.horizon, cfg.action_dim, len(cfg.views))
        if found != (r.horizon, 7 * r.arms, len(r.cameras)):
            raise ValueError(f"{robot}'s official prompt speaks of (horizon, action_dim, views) = "
                             f"{(r.horizon, 7 * r.arms, len(r.cameras))}, the config has {found}: change "
                             "these, or set a prompt of your own.")
        text = training_prompt(robot, subtask, task, now) if teach else serving_prompt(robot, task, subtask)
    first, _, rest = text.rpartition("<image>")
    return f"{first}<image> and depth image<image>{rest}" if cfg.depth else text


def answer_codes(sample, cfg, words, stats):
    """(codes of each chunk, how many numbers lie beyond the quantiles) of a sample's actions."""
    (n, A), T = np.shape(sample["actions"]), cfg.horizon
    if n not in range(T, cfg.chunks * T + 1, T) or A > cfg.action_dim:
        raise ValueError(f"actions: (horizon, action_dim) = {(T, cfg.action_dim)}, up to chunks={cfg.chunks} "
                         f"times as many rows, are expected, found {(n, A)}. Set these, or fix the data.")
    x = normalize(sample["actions"], pick_stats(stats, sample.get("dataset")), clip=False)
    chunks = [words.actions.encode(c) for c in np.clip(x, -1, 1).reshape(-1, T, A)]
    return chunks, int((np.abs(x) > 1 + 1e-6).sum())


def prepare(sample, cfg, tokenizer, stats=None, key=None, train=False):
    """One sample (or observation) -> a dict of CPU tensors; runs in loader workers, knows no weights.

    patches (P, 3 patch^2) uint8, grid (n, 3), ids (L,), positions (3, L), delta (); with an answer also
    labels (L,) and clamped (). A sample with `conversations` (and images in their order) is learnt word for
    word, `actions` or `action_codes` for <action_token>; but `actions` with cfg.prompt, if there is one.
    `done`: its answer is <EOA>. The method draws nothing; key is for the record.
    """
    talk, clamped = sample.get("conversations"), 0
    chunks, acts = sample.get("action_codes"), "actions" in sample     # [[code, ...], ...]
    if talk is None or cfg.prompt and acts:
        check_observation(sample, cfg.views, cfg.state_dim)
        given, done, now = sample["images"], bool(sample.get("done")), sample.get("subtask") or ""
        images = [given[v] for v in cfg.views] if cfg.views[0] in given else list(given.values())
        subtask = cfg.subtask and (bool(now) or not acts)
        if acts and not done:
            chunks, clamped = answer_codes(sample, cfg, tokenizer, stats)
        value = "<EOA>" if done else f"{now}<boa>" * subtask + "<action_token>"
        talk = [{"from": "human", "value": human_turn(sample, cfg, subtask, acts)},
                {"from": "gpt", "value": value if acts else None}]
        if cfg.depth:
            if cfg.views[0] not in (sample.get("depth") or {}):
                raise ValueError(f"depth={cfg.depth}: the observation has no depth of view {cfg.views[0]!r}.")
            images.append(depth_picture(sample["depth"][cfg.views[0]], cfg.depth))
        size = (cfg.image_size,) * 2 if cfg.image_size else (240, 320)              # as the servers make it
        images = [resize(image, *size) for image in images]
    else:
        images = list((sample.get("images") or {}).values())
        if acts and chunks is None:
            chunks, clamped = answer_codes(sample, cfg, tokenizer, stats)
        if (most := max(itertools.chain(*chunks or ()), default=0)) >= cfg.codes:
            raise ValueError(f"action_codes up to {most}, but codes={cfg.codes}: they are of another model's "
                             "tokenizer. Train on the actions (without codes=file).")
    seen = [patchify(image, cfg) for image in images]
    grids = [grid for _, grid in seen]
    tokens = [rows * columns // cfg.merge_size ** 2 for _, rows, columns in grids]
    ids, labels = encode_conversation(talk, chunks, tokens, tokenizer, cfg)
    if sample.get("unforeseen"):                               # a code tells of the whole chunk: learn words
        labels = [-100 if cfg.action_id <= i < cfg.action_id + cfg.codes else i for i in labels]
    positions, delta = rope_positions(ids, cfg, grids)
    none = torch.zeros(0, 3 * cfg.patch_size ** 2, dtype=torch.uint8)
    out = {"patches": torch.cat([none, *(p for p, _ in seen)]), "positions": positions,
           "grid": torch.tensor(grids).long().view(-1, 3), "ids": torch.tensor(ids),
           "delta": torch.tensor(delta)}
    if talk[-1]["value"] is not None:
        out |= {"labels": torch.tensor(labels), "clamped": torch.tensor(clamped)}
    return out if key is None else out | {"key": torch.tensor(key)}


def collate(prepared, cfg):
    """List of prepared samples -> batch. Rows are padded on the right, where a causal model never looks from.

    patches and grid of all pictures, ids (B, L), positions (B, 3, L), delta, length (B,); with labels also
    rows (n,) and targets (n,): where in the flattened (B L) rows the n learnt ids are predicted, and which.
    """
    L = max(len(p["ids"]) for p in prepared)

    def padded(name, value=0):
        return torch.stack([F.pad(p[name], (0, L - len(p["ids"])), value=value) for p in prepared])

    batch = {name: torch.stack([p[name] for p in prepared]) for name in ("delta", "clamped", "key")
             if name in prepared[0]}
    batch |= {name: torch.cat([p[name] for p in prepared]) for name in ("patches", "grid")}
    batch |= {"length": torch.tensor([len(p["ids"]) for p in prepared]), "ids": padded("ids", cfg.pad_id),
              "positions": padded("positions")}
    if "labels" in prepared[0]:
        labels = padded("labels", -100)                                             # (B, L)
        b, j = (labels != -100).nonzero(as_tuple=True)
        batch["rows"], batch["targets"] = b * L + j - 1, labels[b, j]
    return batch


# twin: vla0.weigh
def weigh(batch):
    """Of how many supervised tokens loss(batch) is the mean."""
    return len(batch["targets"])


# ---- Decoding: the same weights over a cache of fixed size ----------------------------------------------

# twin: vla0.rms_norm
def rms_norm(x, weight, eps=1e-6):
    """Qwen's: normalized in float32 (or wider), cast back, then weighed."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * F.rms_norm(h, h.shape[-1:], None, eps).to(x.dtype)


# twin: vla0.effective
def effective(module):
    """A Linear's weight; of one that carries adapters (--lora), with these added in."""
    if not hasattr(module, "get_delta_weight"):
        return module.weight
    return module.base_layer.weight + sum(module.get_delta_weight(a) for a in module.active_adapters)


# twin: vla0.Reader
class Reader:
    """The language model again, for acting: projections fused, keys and values in a cache of fixed shape.

    alias: let the model's own weights become views of the fused ones, so that no memory is lost and training
    goes on in place; without it (sharded weights, adapters) this is a copy, good for one call.
    """

    def __init__(self, cfg, model, alias):
        self.cfg, self.alias = cfg, alias
        self.head_dim = cfg.llm_width // cfg.llm_heads
        self.layers = []
        for layer in model.layers:
            a, m = layer.self_attn, layer.mlp
            self.layers.append((
                layer.input_layernorm.weight, self.fuse(*map(effective, (a.q_proj, a.k_proj, a.v_proj))),
                self.fuse(a.q_proj.bias, a.k_proj.bias, a.v_proj.bias), effective(a.o_proj),
                layer.post_attention_layernorm.weight,
                self.fuse(effective(m.gate_proj), effective(m.up_proj)), effective(m.down_proj)))
        self.norm, self.embedding = model.norm.weight, model.embed_tokens.weight
        if not alias:                                          # under bf16 FSDP hands out blocks of that type
            self.layers = [[w.to(self.embedding.dtype) for w in layer] for layer in self.layers]
        device = self.embedding.device
        self.legal = torch.tensor(cfg.legal, device=device)
        i = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        self.frequencies = 1.0 / cfg.rope_theta ** (i / self.head_dim)              # (K/2,)
        axis = [a for a, n in enumerate(cfg.mrope_section) for _ in range(n)]       # a frequency's: t, h or w
        self.axis = torch.tensor(axis, device=device)
        self.memory = [p.data_ptr() for p in model.parameters()]
        self.few, self.small, self.version = 0, None, 0        # passes of few tokens: with matrices of 8 bits

    def shrink(self, version):
        """Make the layers with matrices of 8 bits, unless they are of this version of the weights."""
        if self.version != version:
            self.small = [[to_int8(w) if w.ndim == 2 and w.shape[1] % 32 == 0 else w for w in layer]
                          for layer in self.layers]
            self.version = version

    def fuse(self, *parts):
        """Weights (n, D) stacked along n; with `alias` they become views of that."""
        whole = torch.cat([p.detach() for p in parts])
        if self.alias:
            for p, view in zip(parts, whole.split([len(p) for p in parts])):
                p.data = view
        return whole

    def current(self, model):
        """Are these still the model's weights? (Not after a move to another device, or other parameters.)"""
        return self.alias and self.memory == [p.data_ptr() for p in model.parameters()]

    def new_cache(self, B, size):
        """(layers, keys and values, B, kv heads, size, head dim)."""
        shape = (len(self.layers), 2, B, self.cfg.llm_kv_heads, size, self.head_dim)
        return torch.zeros(shape, dtype=self.embedding.dtype, device=self.embedding.device)

    def rotary(self, positions):
        """(3, B, K) -> cosines, signed sines (B, K, 1, head dim); each frequency turns with its own axis."""
        angle = positions.to(torch.float32)[self.axis].movedim(0, -1) * self.frequencies
        cos, sin, dtype = angle.cos(), angle.sin(), self.embedding.dtype            # (B, K, head dim / 2)
        return [torch.cat(pair, -1)[:, :, None].to(dtype) for pair in ((cos, cos), (-sin, sin))]

    def __call__(self, x, positions, slots, cache):
        """K more tokens per row: x (B, K, D), M-RoPE positions (3, B, K), cache slots (B, K) -> (B, K, D).

        A token sees all slots up to its own. Slots behind a row's committed tokens hold leftovers of rejected
        drafts: nobody sees them before they are written again.
        """
        cfg, (B, K, _), M, hd = self.cfg, x.shape, cache.shape[-2], self.head_dim
        Q, KV = cfg.llm_heads, cfg.llm_kv_heads
        G = Q // KV                                                                 # query heads per kv head
        cos, sin = self.rotary(positions)
        row, head, place = (torch.arange(n, device=x.device) for n in (B, KV, M))
        at = row[:, None, None], head, slots[..., None]                             # (B, K, KV) each
        hidden = place > slots[..., None]                                           # (B, K, M)
        mask = torch.zeros((), dtype=x.dtype, device=x.device).masked_fill(hidden, float("-inf"))
        mask = mask[:, None].repeat_interleave(G, 2)                                # (B, 1, K G, M)
        layers = self.small if K <= self.few else self.layers
        for (norm1, qkv, qkv_bias, o, norm2, gate_up, down), kv in zip(layers, cache):
            h = linear(rms_norm(x, norm1), qkv, qkv_bias).view(B, K, Q + 2 * KV, hd)
            qk, v = h.split([Q + KV, KV], 2)
            a, b = qk.chunk(2, -1)
            qk = torch.addcmul(qk * cos, torch.cat([b, a], -1), sin)              # rotated (B, K, Q + KV, hd)
            q, k = qk.split([Q, KV], 2)
            kv[0].index_put_(at, k)
            kv[1].index_put_(at, v)
            q = q.view(B, K, KV, G, hd).transpose(1, 2).reshape(B, KV, K * G, hd)   # a group shares its keys
            h = F.scaled_dot_product_attention(q, kv[0], kv[1], mask)               # (B, KV, K G, hd)
            h = h.view(B, KV, K, G, hd).transpose(1, 2).reshape(B, K, Q * hd)
            x = x + linear(h, o)
            gate, up = linear(rms_norm(x, norm2), gate_up).chunk(2, -1)
            x = x + linear(F.silu(gate) * up, down)
        return rms_norm(x, self.norm)

    def logits(self, hidden):
        """(B, K, D) -> (B, K, 12): only the head rows that can win."""
        return F.linear(hidden, self.embedding[self.legal])


class Writer:
    """B answers being written at once, as vocabulary ids.

        text    ^ | pick up the cup <boa> 812 40 1977 ... <|im_end|>     ^: <boa> where no words are wanted
                  | committed: `count` | draft            slot of text[j] in the cache: prompt length + j - 1

    One pass reads the last committed id and `window` - 1 of the draft behind it, all at their places. Where
    the draft is what the model says given all before it, it is committed; at the first place where it is not,
    the model's word is, and what the model said behind is the next draft (Jacobi). By induction the answer is
    that of id-by-id decoding, for any draft. Everything stays on the device.
    """

    STATE = ("text", "count", "passes", "done", "length", "delta", "prompt", "cache", "noise")

    def __init__(self, cfg, reader, batch, rows, mode, grammar, drafts, seed=None, graphs=Graphs()):
        """rows (B, L, D): the prompts' embeddings; mode: "actions" | "subtask" | "free" (without a grammar);
        drafts: a list of B lists of ids, or None for a row without; graphs: common.Graphs."""
        self.cfg, self.reader, self.length, self.delta = cfg, reader, batch["length"], batch["delta"]
        self.short, device, (B, L, _) = mode == "actions", rows.device, rows.shape
        self.grammar, self.limit = None, cfg.max_new_tokens
        if grammar:                                            # two codes per unit at most, see Fast.grammar
            self.grammar = Grammar(*grammar[:2], *(x.to(device) for x in grammar[2:]))
            self.limit = cfg.chunks * (2 * grammar.size + 1) + 2 + cfg.max_words * (mode == "subtask")
        self.window = cfg.window if any(drafts) else 1
        size = 1 + self.limit + self.window
        text = torch.full((B, size), cfg.pad_id)
        text[:, 0] = cfg.boa_id if self.short else cfg.pad_id
        for row, draft in zip(text, drafts):
            row[1:1 + len(draft or ())] = torch.tensor((draft or [])[:size - 1], dtype=torch.long)
        self.text, self.spots = text.to(device), torch.arange(size, device=device)
        self.count = torch.zeros(B, dtype=torch.long, device=device)
        self.passes, self.done = self.count.clone(), self.count.bool()
        self.heads = reader.legal if self.short else torch.arange(cfg.vocab, device=device)
        at = cfg.legal.index if self.short else int            # an id's place in logits
        self.base, self.boa, self.eoa, self.split, self.end = map(at, (
            cfg.action_id, cfg.boa_id, cfg.eoa_id, cfg.split_id, cfg.im_end_id))
        self.prompt = batch["ids"]
        self.seed = int(torch.randint(2**62, ())) if seed is None and cfg.temperature > 0 else seed
        self.noise = None                                      # of whole answers, where few ids can win
        if self.short and cfg.temperature > 0:
            self.noise = torch.stack([self.draw(b, range(size)) for b in range(B)]).to(device)
        self.cache = reader.new_cache(B, L + size)
        slots = torch.arange(L, device=device).expand(B, L)
        hidden = reader(rows, batch["positions"].transpose(0, 1), slots, self.cache)             # (B, L, D)
        self.commit(self.choose(hidden[torch.arange(B, device=device), self.length - 1][:, None]))
        self.graphs, self.made = graphs, None
        drawn = self.noise is None and cfg.temperature > 0     # on the host, in every pass
        if graphs.capture and reader.alias and not drawn:
            names = [name for name in self.STATE if getattr(self, name) is not None]
            key = id(reader), reader.version, repr(cfg), mode, bool(grammar)
            fixed, self.made = graphs.settle(key, [getattr(self, name) for name in names])
            vars(self).update(zip(names, fixed))

    def go(self, window):
        """One pass, from its CUDA graph if there are any."""
        if self.made is None:
            return self.read(window)
        self.graphs.run(self.made, window, lambda: self.read(window))

    def read(self, window):
        """One pass over `window` ids of every row."""
        self.passes += ~self.done
        at = self.count[:, None] + self.spots[:window]                              # (B, K) in text
        slots = self.length[:, None] + at - 1
        positions = (slots + self.delta[:, None]).expand(3, -1, -1)               # text: the same on all axes
        x = self.reader.embedding[self.text.gather(1, at)]                          # (B, K, D)
        self.commit(self.choose(self.reader(x, positions, slots, self.cache)))

    def choose(self, hidden):
        """Hidden states (B, K, D) that decide the ids count, count + 1, ... -> the model's ids (B, K)."""
        cfg, (B, K, _) = self.cfg, hidden.shape
        before = self.count[:, None] + self.spots[:K]                               # (B, K) prefix ends here
        logits = self.reader.logits(hidden) if self.short else F.linear(hidden, self.reader.embedding)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))        # (B, K, heads)
        if cfg.repetition_penalty != 1.0:                                       # each place by its own prefix
            said = torch.zeros(B, K, cfg.vocab, dtype=torch.bool, device=hidden.device)
            for j in range(K):                                 # (not of the prefix: an id of the prompt)
                past = (self.spots > 0) & (self.spots <= before[:, j:j + 1])        # (B, size)
                past = torch.where(past, self.text, self.prompt[:, :1])
                said[:, j].scatter_(1, torch.cat([self.prompt, past], 1), True)
            p = cfg.repetition_penalty
            penalized = torch.where(logits > 0, logits / p, logits * p)
            logits = torch.where(said[..., self.heads], penalized, logits)
        if self.grammar:
            logits = logits.masked_fill(~self.allowed(before), float("-inf"))
        if self.noise is not None:
            noise = self.noise.gather(1, before[..., None].expand(-1, -1, len(self.heads)))
            logits = logits / cfg.temperature - noise.log()
        elif cfg.temperature > 0:                              # of words: 151,936 per place, made on the host
            noise = torch.stack([self.draw(b, places) for b, places in enumerate(before.tolist())])
            logits = logits / cfg.temperature - noise.to(logits.device).log()
        return self.heads[logits.argmax(-1)]

    def draw(self, row, places):
        """Noise (places, heads) of a row, the same at a place whatever was drafted: so is the answer."""
        return torch.stack([torch.empty(len(self.heads)).exponential_(
            generator=keyed_generator(self.seed, row, i)) for i in places])

    def allowed(self, before):
        """(B, K, heads) bool: what may follow text[: before + 1]: words, <boa>, whole chunks; or <EOA>."""
        cfg, text, g = self.cfg, self.text, self.grammar
        code = text - cfg.action_id
        is_code = (code >= 0) & (code < cfg.codes)
        code = code.clamp(0, cfg.codes - 1)
        split = text == cfg.split_id
        opens = (text == cfg.boa_id) | split                                        # a chunk begins behind it
        begun = torch.where(is_code, g.count[code], 0).cumsum(1)                    # units so far, (B, size)
        units = begun - begun.gather(1, torch.where(opens, self.spots, 0).cummax(1).values)
        acting, number = opens.cumsum(1) > 0, split.cumsum(1)
        last = torch.where(is_code, g.after[code], 0)
        units, acting, number, last = (x.gather(1, before) for x in (units, acting, number, last))   # (B, K)
        done = (text[:, 1:2] == cfg.eoa_id) & (before > 0)                          # <EOA>: only the end
        full = acting & (units >= g.least) & (last == 0)
        fits = g.table[last + g.slot[units.clamp(max=g.size)]] & (g.count <= (g.size - units)[..., None])
        ok = torch.zeros(*before.shape, len(self.heads), dtype=torch.bool, device=text.device)
        ok[..., self.base:self.base + cfg.codes] = fits & (acting & ~done)[..., None]
        if not self.short:
            ok[..., :cfg.action_id] = (~acting & ~done & (before < cfg.max_words))[..., None]
            ok[..., self.boa] = ~acting & ~done & (before > 0)
        ok[..., self.eoa] = before == 0
        ok[..., self.split] = full & ~done & (number + 1 < cfg.chunks)
        ok[..., self.end] = full | done
        return ok

    def commit(self, said):
        """Accept the draft as far as the model agrees (said: (B, K)), and its correction; guess the rest."""
        K, k = said.shape[1], self.spots[:said.shape[1]]
        at = self.count[:, None] + 1 + k                                            # (B, K) in text
        n = ((said == self.text.gather(1, at)).cumprod(1).sum(1) + 1).clamp(max=K)  # (B,) committed now
        end = torch.where(said == self.cfg.im_end_id, k, K).amin(1)                 # the first end
        n = torch.where(self.done, 0, torch.minimum(n, end + 1).minimum(self.limit - self.count))
        self.text.scatter_(1, at, torch.where(self.done[:, None], self.text.gather(1, at), said))
        self.done |= (end < n) | (self.count + n >= self.limit)
        self.count += n

    def run(self):
        """Write to the end; a GPU is looked at once per pass when speculating, else every 16 passes."""
        while not bool(self.done.all()):
            for _ in range(1 if self.window > 1 or not self.text.is_cuda else 16):
                self.go(self.window)
        return self

    def answers(self):
        """What is committed, B lists of ids; the end is in it."""
        return [row[:n] for row, n in zip(self.text[:, 1:].tolist(), self.count.tolist())]


# twin: vla0.windows
@functools.lru_cache(8)
def windows(grids, merge, window, patch, device):
    """What transformers' tower works out in each pass, and reads back from the device: in which order patches
    stand, and who attends to whom. grids: ((rows, columns) of patches, ...), of all pictures; the rest: sizes
    of merged blocks [patches], windows and patches [pixels]. Returns arguments for the tower."""
    def attend(ends):
        """For each size of windows: (that size, their rows (windows, size)), and how to undo this order."""
        starts, sizes = ends[:-1], ends.diff()
        rows = [starts[sizes == n][:, None] + torch.arange(n) for n in sizes.unique().tolist()]
        if len(rows) == 1:
            return ((rows[0].shape[1], None), ), None
        back = torch.cat([of.flatten() for of in rows]).argsort()
        return tuple((of.shape[1], of.to(device)) for of in rows), back.to(device)
    grid = torch.tensor([(1, *sides) for sides in grids])                           # (pictures, 3)
    order, ends = vision_utils.get_vision_window_index(grid, merge, window, patch)
    return {"position_ids": vision_utils.get_vision_position_ids(grid, merge).to(device),
            "window_index": order.to(device), "cu_window_seqlens": attend(ends.long()),
            "cu_seqlens": attend(F.pad(grid.prod(1).cumsum(0), (1, 0)))}


# twin: vla0.WindowAttention
class WindowAttention(qwen.Qwen2_5_VLVisionAttention):
    """The tower's attention: one call for all windows of a size, where transformers makes one for each."""

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
        """(n, D) -> (n, D). cu_seqlens: as `windows` has them, or as transformers."""
        if isinstance(cu_seqlens, torch.Tensor):
            return super().forward(hidden_states, cu_seqlens, position_embeddings, **kwargs)
        n, (groups, back) = len(hidden_states), cu_seqlens
        q, k, v = self.qkv(hidden_states).view(n, 3, self.num_heads, -1).unbind(1)  # (n, H, K)
        parts, qkv = [], (*qwen.apply_rotary_pos_emb_vision(q, k, *position_embeddings), v)
        for size, rows in groups:
            of = (x.unflatten(0, (-1, size)) if rows is None else x[rows] for x in qkv)
            x = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in of))    # (windows, H, size, K)
            parts.append(x.transpose(1, 2).flatten(0, 1))                           # (windows size, H, K)
        x = parts[0] if back is None else torch.cat(parts)[back]
        return self.proj(x.reshape(n, -1))


# ---- The model ------------------------------------------------------------------------------------------

class Model(nn.Module):
    """RoboBrain-X0: Qwen2.5-VL's two parts, `visual` and `model`, named as in checkpoint files.

    preset, origin: for the record in saved checkpoints; fresh: modules that a checkpoint did not hold.
    """
    graphs = Graphs()                  # off; Graphs(common.captured): act() with CUDA graphs

    def __init__(self, cfg, tokenizer=None, stats=None, attn="auto"):
        super().__init__()
        self.cfg, self.tokenizer, self.stats = cfg, tokenizer, stats or {}
        self.preset, self.origin, self.fresh = "custom", {}, []
        self.attn = attn = "sdpa" if attn == "auto" else attn
        self.model = qwen.Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(
            vocab_size=cfg.vocab, hidden_size=cfg.llm_width, intermediate_size=cfg.llm_mlp,
            num_hidden_layers=cfg.llm_depth, num_attention_heads=cfg.llm_heads,
            num_key_value_heads=cfg.llm_kv_heads, rms_norm_eps=1e-6, max_position_embeddings=128_000,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta,
                             "mrope_section": list(cfg.mrope_section)},
            use_sliding_window=False, initializer_range=cfg.llm_init, use_cache=False, bos_token_id=None,
            eos_token_id=None, pad_token_id=None, attn_implementation=hf_attention(attn)))
        self.visual = qwen.Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(
            depth=cfg.vit_depth, hidden_size=cfg.vit_width, num_heads=cfg.vit_heads,
            intermediate_size=cfg.vit_mlp, out_hidden_size=cfg.llm_width, patch_size=cfg.patch_size,
            spatial_merge_size=cfg.merge_size, temporal_patch_size=cfg.temporal_patch_size,
            window_size=cfg.window_size, fullatt_block_indexes=list(cfg.full_attention), hidden_act="silu",
            initializer_range=cfg.llm_init, attn_implementation=hf_attention(attn)))
        for block in self.visual.blocks if attn == "sdpa" else ():
            block.attn.__class__ = WindowAttention
        self.reader = None

    @property
    def device(self):
        """Where the weights are."""
        return self.model.norm.weight.device

    def look(self, patches, grid):
        """Patches, grid (pictures, 3) on the CPU -> the tower's features (tokens, D)."""
        cfg, dtype = self.cfg, self.visual.dtype
        if self.attn != "sdpa":
            return self.visual(patches.to(dtype), grid_thw=grid.to(patches.device)).pooler_output
        sides = tuple(map(tuple, grid[:, 1:].tolist()))
        how = windows(sides, cfg.merge_size, cfg.window_size, cfg.patch_size, patches.device)
        return self.graphs(lambda x: self.visual(x.to(dtype), grid_thw=grid, **how).pooler_output, patches,
                           key=sides)

    def embed(self, batch):
        """The token rows (B, L, D) with the pictures in their places. Patches of floats: pixels already."""
        patches, ids = batch["patches"], batch["ids"]
        rows = self.model.embed_tokens(ids)                                         # (B, L, D)
        if not len(patches):
            return rows
        pixels = patches if patches.is_floating_point() else to_pixels(patches, self.cfg)
        seen = self.look(pixels, batch["grid"])                                     # (tokens, D)
        #  system ... user \n A <|vision_start|> | picture | <|vision_end|> , right ... \n | words <boa> codes
        return rows.masked_scatter((ids == self.cfg.image_id)[..., None], seen.to(rows.dtype))

    def forward(self, batch):
        """patches, grid, ids (B, L), positions (B, 3, L) -> last hidden states (B, L, D).

        No padding mask: padding is on the right, and without a mask the causal kernels (flash too) are used.
        """
        positions = batch["positions"].transpose(0, 1)                              # (3, B, L)
        return self.model(inputs_embeds=self.embed(batch), position_ids=positions, attention_mask=None,
                          use_cache=False).last_hidden_state

    def loss(self, batch):
        """Mean cross-entropy over the learnt tokens of the batch; over processes and passes too, each token
        weighs the same (`weigh`). Returns (scalar, to log)."""
        hidden = self(batch).flatten(0, 1)[batch["rows"]]                           # (n, D)
        if self.reader:
            self.reader.version = 0                            # fused AdamW does not count _version up
        head = functools.partial(F.linear, weight=self.model.embed_tokens.weight)   # tied, (n, N)
        loss = word_loss(hidden, head, batch["targets"], self.cfg.vocab)
        return loss, {"loss": loss.detach(), "clamped": batch["clamped"].float().mean()}

    @contextmanager
    def reading(self, int8=False):
        """A Reader of the present weights; sharded ones (train.py --shard) are gathered while it lives."""
        sharded = [m for m in self.model.modules() if hasattr(m, "unshard")]
        for m in sharded:
            m.unshard()
        adapters = any(hasattr(m, "get_delta_weight") for m in self.model.modules())
        if self.reader is None or not self.reader.current(self.model):
            self.reader = Reader(self.cfg, self.model, alias=not sharded and not adapters)
        if int8:
            self.reader.shrink(1 + sum(p._version for p in self.model.parameters()))
        self.reader.few = 32 * int8                            # with more, computing takes the time
        try:
            yield self.reader
        finally:
            if sharded or adapters:                            # its weights were copies
                self.reader = None
            for m in sharded:
                m.reshard()

    @torch.no_grad()
    def write(self, batch, cfg, mode, drafts=None, seed=None):
        """A batch of prompts -> a Writer that has written. mode, drafts: see Writer."""
        batch = {name: x if name == "grid" else x.to(self.device) for name, x in batch.items()}
        grammar = None if mode == "free" else self.tokenizer.actions.grammar(cfg.horizon, cfg.action_dim)
        with torch.autocast(self.device.type, enabled=False):
            rows = self.embed(batch)                                                # (B, L, D)
            with self.reading(cfg.int8) as reader:
                drafts = drafts or [None] * len(rows)
                return Writer(cfg, reader, batch, rows, mode, grammar, drafts, seed, self.graphs).run()

    def act(self, observations, unnorm_key=None, seed=None, **how):
        """A list of raw observations of one body -> (chunks (B, T, A) float32 in robot units, info).

        An observation may carry `draft` (ids to speculate with) and `last_action`, see Policy.ask. seed: of
        the draws when temperature > 0. how: other Config values for this call. info: subtasks, ids; tokens,
        passes after prefill, parse_failed, finished (B,); problems ("": none); codes: of all chunks of each
        answer; actions (B, T, A) float64. Codes that make no chunk, and <EOA>, hold the pose.
        """
        if not observations:
            raise ValueError("act() needs at least one observation.")
        stats, A = body_stats(self.stats, unnorm_key, observations)
        cfg = configure(self.cfg, action_dim=A, **how)
        T = cfg.horizon
        self.tokenizer = self.tokenizer or load_tokenizer(cfg)
        keep = ("images", "depth", "instruction", "state", "embodiment")
        seen = [{name: o[name] for name in keep if name in o} for o in observations]
        batch = collate([prepare(o, cfg, self.tokenizer) for o in seen], cfg)
        drafts = [o.get("draft") if cfg.draft == "previous" else None for o in observations]
        mode = "free" if not cfg.constrained else "subtask" if cfg.subtask else "actions"
        writer, tokenizer = self.write(batch, cfg, mode, drafts, seed), self.tokenizer.actions
        answers = writer.answers()
        subtasks, codes, finished = zip(*[parse_answer(a, cfg, cfg.subtask, self.tokenizer.decode)
                                          for a in answers])
        actions, problems = [], []
        for (first, *_), end, o in zip(codes, finished, observations, strict=True):
            chunk, problem = (None, "") if end else tokenizer.decode(first, T, A)
            if problem and cfg.lenient != "none":
                chunk = tokenizer.official(first, T, A, cfg.lenient)
            problems.append(problem)
            actions.append(np.tile(hold_pose(cfg, o), (T, 1)) if chunk is None else denormalize(chunk, stats))
        actions = np.asarray(actions, np.float64)                                   # (B, T, A)
        info = {"subtasks": ["" if end and s == NO_BOA else s for s, end in zip(subtasks, finished)],
                "ids": answers, "codes": list(codes), "problems": problems, "actions": actions,
                "tokens": writer.count.cpu().numpy(), "passes": writer.passes.cpu().numpy(),
                "finished": np.array(finished), "parse_failed": np.array([bool(p) for p in problems])}
        return actions.astype(np.float32), info

    def complete(self, prompt, pictures, options, mode="free", seed=None):
        """A prompt with an <image> for each of the pictures, uint8 (h, w, 3) -> generated ids.

        options: as generate_options gives them; mode: see Writer. It is the `write` of `infer`.
        """
        talk = [{"from": "human", "value": prompt}, {"from": "gpt", "value": None}]
        sample = {"conversations": talk, "images": dict(enumerate(pictures))}
        names = ("temperature", "max_new_tokens", "repetition_penalty")
        cfg = configure(self.cfg, **{name: options[name] for name in names if name in options})
        batch = collate([prepare(sample, cfg, self.tokenizer)], cfg)
        return self.write(batch, cfg, mode, seed=seed).answers()[0]

    def answer(self, image, question, ability="general", temperature=0.7, seed=None):
        """A question about one picture, uint8 (h, w, 3) -> (what parse_ability makes of it, the text)."""
        prompt = ability_prompt(ability, question)
        text = self.tokenizer.decode(self.complete(prompt, [image], {"temperature": temperature}, seed=seed))
        return parse_ability(ability, text.strip()), text.strip()

    def blocks(self):
        """The modules to shard, checkpoint or compile one by one, in order of use."""
        return [*self.visual.blocks, *self.model.layers]

    def param_groups(self, lr, weight_decay):
        """For the optimizer: everything trains; the vision tower more slowly (official: a tenth)."""
        parts = (self.visual, lr * self.cfg.vision_lr), (self.model, lr)
        return [{"params": [p for p in part.parameters() if p.requires_grad], "lr": rate,
                 "weight_decay": weight_decay} for part, rate in parts]

    def save_pretrained(self, folder, card=None, state=None):
        """Write our checkpoint folder. card: more lines for README.md {name: text}; state: other weights."""
        lines = {"method": "RoboBrain-X0 (https://github.com/FlagOpen/RoboBrain-X0)", "preset": self.preset,
                 **self.origin, "datasets": ", ".join(self.stats) or "none", **(card or {})}
        text = "# RoboBrain-X0\n\n" + "".join(f"- {name}: {value}\n" for name, value in lines.items())
        if self.tokenizer is not None:
            self.tokenizer.actions.save(folder)
            if self.cfg.tokenizer != "tiny":
                self.tokenizer.text.save_pretrained(folder)
        save_folder(folder, "robobrain_x0", self.preset, asdict(self.cfg), state or self.state_dict(),
                    self.stats, text, self.origin)


# ---- What an answer says, and the official servers' requests ----------------------------------------------

NO_BOA = "Parsing failed: <boa> token not found"               # officially, in the sub-task's place


def parse_answer(ids, cfg, subtask, decode):
    """Generated ids -> (sub-task in words, codes of each chunk, is the task done: <EOA>), as the servers read
    them: they play the first chunk. decode: ids -> text.

    FAITHFUL: codes are all ids of their range, wherever they stand; words between them are dropped.
    Test: test_robobrain_x0.py::test_words_between_codes_are_dropped
    """
    ids, words, chunks = [int(i) for i in ids], "", [[]]
    if subtask and cfg.boa_id in ids:
        at = ids.index(cfg.boa_id)
        words, ids = decode(ids[:at]).strip(), ids[at + 1:]
    elif subtask:
        words = NO_BOA
    for i in ids:
        if i == cfg.split_id:
            chunks.append([])
        elif 0 <= i - cfg.action_id < cfg.codes:
            chunks[-1].append(i - cfg.action_id)
    return words, chunks, cfg.eoa_id in ids and not chunks[0]


def hold_pose(cfg, observation):
    """The action (A,) that keeps the robot where it is: no deltas, the gripper as it was commanded last."""
    hold, last = np.zeros(cfg.action_dim), observation.get("last_action")
    hold[6::7] = cfg.gripper_open if last is None else np.asarray(last, np.float64)[6::7]
    return hold


def request_images(robot, images):
    """The base64 pictures of a request -> list of uint8 (240, 320, 3), in the prompt's order, as the
    processor gets them. Errors are worded as officially."""
    out, body = [], robot_of(robot)
    for camera in body.cameras:
        if not isinstance(images, dict) or camera not in images:
            raise ValueError(f"Missing required image: {camera!r}")
        try:
            image = np.array(Image.open(io.BytesIO(base64.b64decode(images[camera]))).convert("RGB"))
        except Exception as e:                                 # a picture can be torn in every way there is
            raise ValueError("Image processing failed") from e
        out.append(resize(image[..., ::-1] if body.bgr else image, 240, 320))
    return out


def generate_options(robot, cfg=Config):
    """The options that a robot's server gives to generate()."""
    r = robot_of(robot)
    more = {"repetition_penalty": 1.0, "use_cache": True} if r.version == "2.0.0" else {}
    return {"max_new_tokens": 768, "do_sample": r.temperature > 0, "temperature": r.temperature,
            "pad_token_id": cfg.pad_id, "eos_token_id": cfg.im_end_id, **more}


def health(robot, subtask, model_path="", loaded=True, gpu_info=None):
    """GET /health -> (status, JSON)."""
    if not loaded:
        return 503, {"status": "error", "message": "Model not loaded"}
    r, out = robot_of(robot), {"status": "healthy", "model_loaded": True, "subtask_mode": subtask}
    out |= {"model_path": model_path} if r.tells_path else {}
    return 200, out | ({"gpu_info": gpu_info or {}} if r.version == "2.0.0" else {})


def service_info(robot, subtask, model_path=""):
    """GET /info -> JSON."""
    r = robot_of(robot)
    return {"service_name": f"RoboBrain Robotics API for {r.name}", "version": r.version,
            "subtask_mode": subtask, "model_path": model_path,
            "endpoints": {"/health": "GET", "/info": "GET", "/infer": "POST"}}


def infer(robot, body, write, decode, actions, stats, subtask, official=False, cfg=Config):
    """POST /infer -> (status, JSON without processing_time).

    write: (prompt with <image>, pictures, generate_options) -> ids, or None while no model is loaded; decode:
    ids -> text; actions: Fast; stats: an official statistics file {key: {"scale_", "offset_", ...}}.
    FAITHFUL: official=True answers what the released server does: 200 whatever the codes are (zeros become
    the middle of the quantiles), 500 for what a client did wrong. Ours: 422 and the pose held; 400.
    Test: test_robobrain_x0.py::test_failed_decode_holds_the_pose_unless_official
    """
    r = robot_of(robot)
    if write is None:
        return 503, {"success": False, "error": r.unloaded}
    if not isinstance(body, dict) or any(name not in body for name in ("eef_pose", "instruction", "images")):
        return 400, {"success": False, "error": r.incomplete}
    T, D, key = r.horizon, 7 * r.arms, r.stats[subtask]
    try:
        pictures, pose = request_images(robot, body["images"]), read_pose(robot, body["eef_pose"])
        if not isinstance(body["instruction"], str):
            raise ValueError(f"instruction: a text is expected, found {body['instruction']!r:.60}")
        if not stats or key not in stats:
            raise ValueError(f"statistics for {key!r} are missing, there are {sorted(stats or {})}: put the "
                             "file beside the checkpoint, or make one (examples/action_tokens.py).")
        prompt = serving_prompt(robot, body["instruction"], subtask)
        ids = write(prompt, pictures, generate_options(robot, cfg))
        words, chunks, finished = parse_answer(ids, cfg, subtask, decode)
        chunk, problem = actions.decode(chunks[0], T, D)
        if official:
            chunk = actions.official(chunks[0], T, D)
        elif finished or problem:
            pose[:, -1] /= r.reported
            words = "" if finished and words == NO_BOA else words
            out = {"subtask": words} if subtask else {}
            out["eepose"] = np.tile(pose.ravel(), (T, 1)).tolist()
            if finished:
                return 200, {"success": True, "finished": True, **out}
            return 422, {"success": False, "decode_ok": False, **out,
                         "error": f"the codes make no motion: {problem}"}
        poses = integrate(robot, pose.ravel(), denormalize(chunk, stats[key]))
    except ValueError as e:
        return (500 if official else 400), {"success": False, "error": str(e)}
    return 200, {"success": True, "eepose": poses.tolist(), **({"subtask": words} if subtask else {})}


# ---- Acting on a robot ----------------------------------------------------------------------------------

class Policy:
    """A session with one robot: chunks in, one action per control step out. Chunks are played open-loop and
    never overlap (official clients). execute: actions played per chunk (default: the config's)."""

    def __init__(self, model, unnorm_key=None, execute=None):
        self.model, self.unnorm_key = model, unnorm_key
        self.cfg = model.cfg if execute is None else replace(model.cfg, execute=execute)
        self.execute = self.cfg.execute
        self.reset()

    def reset(self, instruction=None):
        """Forget everything; call between episodes. (A new instruction does it.)"""
        self.instruction, self.queue, self.last_action, self.info = instruction, deque(), None, {}

    @property
    def needs_chunk(self):
        """True when the next step wants a fresh chunk."""
        return not self.queue

    def ask(self, observation):
        """The observation as model.act wants it: with the last answer as draft, and the last action."""
        if observation["instruction"] != self.instruction or self.last_action is None:
            return dict(observation)
        draft = {"draft": self.info["ids"][0]} if self.info else {}
        return {**observation, **draft, "last_action": self.last_action}

    def step(self, observation, chunk=None):
        """The action for now, (A,) float64. chunk: (T, A) in robot units if model.act was already asked."""
        if observation["instruction"] != self.instruction:
            self.reset(observation["instruction"])
        if self.needs_chunk:
            if chunk is None:
                self.info = self.model.act([self.ask(observation)], self.unnorm_key)[1]
                chunk = self.info["actions"][0]
            self.queue.extend(np.asarray(chunk, np.float64)[:self.execute])
        self.last_action = self.queue.popleft()
        return self.last_action


# ---- Checkpoints: ours and the official ones ------------------------------------------------------------

LICENSE = "Apache-2.0 (RoboBrain-X0-Preview); it started from Qwen2.5-VL-3B, under the Qwen research licence"
# Names since transformers 4.52, in memory; on disk the older ones are still written.
RENAMED = {"model.language_model.": "model.", "model.visual.": "visual."}
DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp32": torch.float32, "float32": torch.float32}
# Config's names of what config.json says of the language model and of the tower
LLM = {"llm_width": "hidden_size", "llm_depth": "num_hidden_layers", "llm_heads": "num_attention_heads",
       "llm_kv_heads": "num_key_value_heads", "llm_mlp": "intermediate_size", "vocab": "vocab_size"}
VIT = {"vit_width": "hidden_size", "vit_depth": "depth", "vit_heads": "num_heads",
       "vit_mlp": "intermediate_size", "patch_size": "patch_size", "merge_size": "spatial_merge_size",
       "temporal_patch_size": "temporal_patch_size", "window_size": "window_size",
       "full_attention": "fullatt_block_indexes"}


def read_stats(path):
    """An official statistics file, or ours -> our statistics {name: {"action": {"q01", "q99"}}}."""
    out = {}
    for name, entry in read_json(path).items():
        if isinstance(entry, dict) and "action" in entry:
            out[name] = entry
        elif name.startswith("action.") and isinstance(entry, dict) and "quantiles_low_" in entry:
            out[name] = {"action": {"q01": entry["quantiles_low_"], "q99": entry["quantiles_high_"]}}
    if not out:
        raise ValueError(f"{path} holds no action statistics: {{'action.eepose': {{quantiles_low_, "
                         "quantiles_high_, ...}} is expected.")
    return out


def read_official(folder):
    """A folder in Hugging Face's layout -> ({parameter name: tensor}, Config values that it states)."""
    about = read_json(folder / "config.json")
    if about.get("model_type") != "qwen2_5_vl":
        raise ValueError(f"{folder}/config.json is of a {about.get('model_type')!r} model; RoboBrain-X0 is a "
                         "qwen2_5_vl.")
    text, index = about.get("text_config", about), folder / "model.safetensors.index.json"
    rope = text.get("rope_parameters") or text.get("rope_scaling") or about.get("rope_scaling") or {}
    if float(text.get("rms_norm_eps", 1e-6)) != 1e-6 or text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder}/config.json: rms_norm_eps={text.get('rms_norm_eps')}, hidden_act="
                         f"{text.get('hidden_act')}; Qwen2.5-VL has 1e-06 and silu, and so has this file.")
    try:
        sizes = {name: about["vision_config"][theirs] for name, theirs in VIT.items()}
        sizes |= {name: text[theirs] for name, theirs in LLM.items()}
        files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else \
            ["model.safetensors"]
    except KeyError as e:
        raise ValueError(f"{folder}: no {e} in config.json (or the weights' index); is it torn?") from e
    sizes |= {"rope_theta": float(rope.get("rope_theta") or text.get("rope_theta", 1e6)),
              "mrope_section": tuple(rope.get("mrope_section", (16, 24, 24))),
              "image_id": about.get("image_token_id", text.get("image_token_id", Config.image_id))}
    if (folder / "generation_config.json").is_file():
        how = read_json(folder / "generation_config.json")
        sizes["repetition_penalty"] = float(how.get("repetition_penalty", 1))
    state = {}
    for file in files:
        state |= load_weights(folder / file)
    for old, ours in RENAMED.items():
        state = {ours + name.removeprefix(old) if name.startswith(old) else name: t
                 for name, t in state.items()}
    head, words = state.pop("lm_head.weight", None), state.get("model.embed_tokens.weight")     # tied
    if head is not None and words is not None and not torch.equal(head, words):
        raise ValueError(f"{folder}: lm_head.weight is not model.embed_tokens.weight; Qwen2.5-VL-3B and what "
                         "started from it share them, other sizes do not and cannot be loaded.")
    return state, sizes


def from_pretrained(path_or_id, *, preset=None, tokenizer=None, attn="auto", device="cpu", dtype=None,
                    **overrides):
    """Load a checkpoint: our folder, the official release, Qwen2.5-VL, or a hub id.

    tokenizer: a path or hub id, or Words. dtype: "bf16" or "fp32"; None: as the file has it. overrides:
    other Config values. ValueError: not there, torn, of another method, of another size.
    """
    device, dtype = pick_device(device), str(dtype or "").removeprefix("torch.")
    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose bf16 or fp32.")
    folder, given = resolve(path_or_id, ["*.json", "*.safetensors"]), isinstance(tokenizer, Words)
    if tokenizer and not given:
        overrides["tokenizer"] = str(tokenizer)
    if "method" in read_json(folder / "config.json"):
        saved = load_config(folder, "robobrain_x0")
        if preset not in (None, saved["preset"]):
            raise ValueError(f"preset {preset!r} was asked for, {folder} is {saved['preset']!r}; leave it "
                             "out.")
        cfg, preset = configure(Config(), **{**saved["config"], **overrides}), saved["preset"]
        origin, state = saved["origin"], load_weights(folder / "model.safetensors")
        stats = read_json(folder / "dataset_statistics.json")
    else:
        preset = preset or "3b"
        choose("there is no preset", preset, list(PRESETS))
        state, sizes = read_official(folder)
        cfg = configure(PRESETS[preset], **{**sizes, **overrides})
        found = sorted(folder.glob("*stat*.json"))             # none in the release; a user's own
        stats = read_stats(found[0]) if found else {}
        origin = {"started from": str(path_or_id), "license": LICENSE}
    where = "cuda" if attn == "flash" and torch.cuda.is_available() else device
    with torch.device("meta"):                                 # shapes only; the file's tensors move in below
        model = Model(cfg, attn=pick_attention(attn, where))
    check_fit(model.state_dict(), state, folder)
    model.load_state_dict(state, assign=True)
    if dtype:
        model.to(DTYPES[dtype])
    model.model.rotary_emb = qwen.Qwen2_5_VLRotaryEmbedding(model.model.config)    # in no file, and in every
    model.visual.rotary_pos_emb = qwen.Qwen2_5_VLVisionRotaryEmbedding(model.visual.config)   # type float32
    model.tokenizer = tokenizer if given else load_tokenizer(cfg, folder, own=not tokenizer)
    model.stats, model.preset, model.origin = stats, preset, origin
    return model.to(device).eval()


# ---- Demo -----------------------------------------------------------------------------------------------

def demo():
    """Overfit two synthetic samples with the tiny preset (seconds on one core), then act on them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)                                   # matrices this small gain nothing from more
    cfg, rng, start = configure(PRESETS["tiny"], fast="fit"), np.random.default_rng(0), time.time()
    stats = {"synthetic": {"action": {"q01": [-0.1] * 6 + [0], "q99": [0.1] * 6 + [1]}}}
    samples = [{"images": {"third": np.full((96, 96, 3), rgb, np.uint8)}, "dataset": "synthetic",
                "instruction": f"pick up the {colour} cube", "subtask": f"pick up the {colour} cube",
                "actions": np.tile(np.append(rng.uniform(-0.1, 0.1, 6), gripper), (cfg.horizon, 1))}
               for colour, rgb, gripper in (("red", (255, 0, 0), 0), ("green", (0, 160, 0), 1))]
    model = Model(cfg, load_tokenizer(cfg), stats)
    optimizer = torch.optim.AdamW(model.param_groups(2e-3, 0.0))
    for step in range(41):
        batch = collate([prepare(s, cfg, model.tokenizer, stats, step, train=True) for s in samples], cfg)
        loss, log = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d} | loss {log['loss']:.3f} | {time.time() - start:.1f} s", flush=True)
    chunks, info = model.eval().act(samples)                                        # (2, T, A)
    for sample, chunk, said, codes in zip(samples, chunks, info["subtasks"], info["codes"]):
        print(f"{sample['instruction']}: wanted {np.round(sample['actions'][0], 2)} at every step,\n"
              f"said {said!r} and codes {codes[0]}:\nthat is {np.round(chunk[0], 2)} ...")


if __name__ == "__main__":
    cli(demo)
