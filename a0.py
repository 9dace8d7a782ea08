"""
A0: where to touch and where to move, as five points in the picture; the robot's own control does the rest.
Paper: https://arxiv.org/abs/2504.12636    Official code: https://github.com/A-embodied/A0

   reference frame, current frame -> padded, (B, 2, 384, 384, 3) -> SigLIP, frozen -> E_ref, E (B, 729, 1152)
        position offset: E - E_ref | E (B, 1458, 1152) -> img_adaptor -> (B, 1458, 2048) ---+ odd blocks
   "pick up the mug" -> tokens -> Qwen2.5-7B, frozen  -> lang_adaptor -> (B, L, 2048) ------+ even blocks
                                                                                            v cross-attention
   noisy points (B, 5, 2) -> state_adaptor -> [time step | 5 points] (B, 6, 2048) -> 28 blocks -> clean points
        5 steps of DPM-Solver++ ----------------------------------> points (B, 5, 2) in [0, 1] of the picture
                                                                   -> depth, camera -> contact and path in 3-D

What is special: no robot state or action goes in or comes out, so one model serves any arm. The network
predicts the clean points, not the noise. Both encoders stay frozen and are in no official checkpoint.

Points: (u, v) = (x / width, y / height) of the original, unpadded picture, right and down. Point 0 is the
contact, points 1-4 say where the object goes then. Action execution was never released: that section is ours.

    python a0.py                                                      # tiny demo, CPU, no download
    python a0.py --image x.png --instruction "pick up the mug"        # -> x_points.png, x.json
    python a0.py --test maniskill --ckpt JianZhangAI/A0-1B --data DIR # the official metrics
    python a0.py --test tabletop --ckpt runs/a0-tiny/last --plot e.png # and each point's error
    torchrun --nproc_per_node=2 train.py --model a0 --preset 1b --init JianZhangAI/A0-1B-pretrain --data ...
"""
import functools
import importlib
import math
import re
import sys
from collections import OrderedDict, deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import (PreTrainedTokenizerFast, Qwen2Config, Qwen2Model, SiglipVisionConfig,
                          SiglipVisionModel)

from common import (Graphs, Parser, atomic_write, attention, check_config, check_fit, check_observation,
                    choose, cli, hash64, keyed_generator, keyed_rng, lean, load_config, load_weights,
                    pick_attention, read_json, resolve, save_folder, tiny_tokenizer, write_json)
from common import device as pick_device


# ---- Config -----------------------------------------------------------------------------------------------

@dataclass
class Config:
    """Sizes, the sampler, the data's form and the recipe of one model; a preset is one of these."""
    # what goes in and out
    views: tuple = ("current",)       # the one camera, by its name in the sample
    image_size: int = 384             # side of the square picture that SigLIP sees [pixels]
    pad: str = "center"               # center | topleft: where a picture lies in its square; see pad_square
    history: int = 2                  # F: frames, reference and current; 1 (pre-training): current only
    poa: bool = True                  # position offset: the reference's features become current - reference
    reference: str = "first"          # frame that Policy shows beside the current one: first (of the session)
    #                                   | none (grey, as the official script for single pictures)
    horizon: int = 5                  # T: points, the contact first
    action_dim: int = 2               # A: u right, v down, [0, 1] of the original picture
    # frozen encoders: a folder, a hub id, or "tiny" (made here, and then a part of our checkpoints)
    vision: str = "google/siglip-so400m-patch14-384"
    text: str = "Qwen/Qwen2.5-7B"
    tokenizer: str = "Qwen/Qwen2.5-7B"
    text_cache: str = ""              # folder that keeps Qwen2's features of each text; "": memory only
    patch_size: int = 14
    siglip_width: int = 1152          # channels of SigLIP's features, and of Qwen2's
    qwen_width: int = 3584
    vocab: int = 152064               # tokens that Qwen2 knows
    pad_id: int = 151643              # <|endoftext|>, on the right
    max_text: int = 1024              # tokens of an instruction at most: rows of its position table
    # the denoiser
    width: int = 2048                 # D
    depth: int = 28
    heads: int = 32
    norm: str = "variance"            # as timm 1.0.3 computed it | rms, a true RMS norm; see Norm
    num_train_steps: int = 1000       # diffusion steps of the noise schedule
    sample_steps: int = 5             # of DPM-Solver++ when acting
    execute: int = 5                  # points played per call
    compute: str = "auto"             # arithmetic: bf16 | fp32 | auto = bf16 autocast on CUDA
    # the arm that `Policy` moves; defaults: the tabletop's
    max_step: float = 0.045           # longest motion in one control step [m]
    max_turn: float = 0.3             # and turn [rad]
    grip_steps: int = 2               # control steps in which the gripper opens or closes
    grip_width: float = 0.084         # what fits between the open fingers [m]
    table: float = 0.006              # what is lower in the base frame is no thing [m]
    reach: float = 0.8                # farthest from the base that the hand goes [m]
    miss: float = 0.04                # farthest from a thing that the contact may be [of the picture's width]
    # data
    single_image: float = 0.0         # share of training without reference; official readers do it: 0.4
    condition_mask: float = 0.0       # how often training hides a frame, or the text (cond_mask_prob)
    augment: bool = True              # crop (15 %) and rotate (15 %) frames and points in training
    faithful_crop: bool = False       # take the crop's geometry from the wrong frame; see augment_frames
    image_aug: bool = True            # change colours, add noise and blur (20 % of the frames) in training
    faithful_bf16: bool = False       # points, noise and alpha_bar in bf16; see Model.denoising_loss
    data: str = ""
    # training (official readme: 2 GPUs x 100)
    lr: float = 1e-4
    lr_schedule: str = "constant"     # constant | cosine
    warmup: int = 500                 # steps; officially counted once per process, so 250 on 2 GPUs
    betas: tuple = (0.9, 0.999)
    weight_decay: float = 1e-2        # on everything: norms, biases and position tables too
    grad_clip: float = 0.0            # officially 1.0 is set, but under DeepSpeed nothing clips; 0: off
    ema: float = 0.0                  # official 0.9999, kept in bf16 and never used; see ema_decay
    batch: int = 100                  # samples per process
    steps: int = 30_000
    init: str = ""                    # weights that train.py starts from; "": none
    seed: int = 42

    def __post_init__(self):
        check_config(
            vars(self), vars(Config), multiples=(("width", "heads"), ("width", 4), ("qwen_width", 8)),
            least={"pad_id": 0, "warmup": 0, "seed": 0, "depth": 2, "action_dim": 2},
            most={"single_image": 1, "condition_mask": 1, "history": 2, "action_dim": 2, "execute": "horizon",
                  "sample_steps": "num_train_steps", "patch_size": "image_size"},
            below={"pad_id": "vocab", "ema": 1, "betas": 1, "seed": 2**63},
            choices={"pad": ("center", "topleft"), "norm": ("variance", "rms"),
                     "reference": ("first", "none"), "compute": ("auto", "bf16", "fp32"),
                     "lr_schedule": ("constant", "cosine")})
        if len(self.views) > 1:
            raise ValueError(f"views={self.views!r}: one camera is wanted, A0 points in its picture.")

    patches = property(lambda self: (self.image_size // self.patch_size) ** 2)     # P: of one frame, 27 x 27


PRESETS = {
    "1b": Config(),                                            # JianZhangAI/A0-1B
    "170m": Config(width=1024, depth=14),                      # JianZhangAI/A0-170M; heads of 32 channels
    "pretrain": Config(horizon=1, history=1, execute=1, steps=80_000),     # A0-1B-pretrain: a point on PixMo
    "tiny": Config(                                            # 1.2 M parameters train, for two CPU cores
        views=("third",), image_size=96, vision="tiny", text="tiny", tokenizer="tiny", patch_size=12,
        siglip_width=64, qwen_width=64, vocab=512, pad_id=4, max_text=256, width=128, depth=6, heads=4,
        reference="none", augment=False, image_aug=False, data="tabletop", lr=3e-4, lr_schedule="cosine",
        warmup=50, weight_decay=0.0, grad_clip=1.0, batch=32, steps=3600,
        init="assets/a0_tiny_trunk.safetensors"),
}
PREDICTS = "waypoints"            # of a sample; see the top of common.py


def configure(cfg, **overrides):
    """`cfg` with other values; an unknown name is a ValueError with the nearest match."""
    for name in overrides:
        choose("a0.Config has no field", name, [f.name for f in fields(Config)])
    return replace(cfg, **overrides)


# ---- Text and pictures: what goes into the model ----------------------------------------------------------

GREY = 127                             # int(0.5 * 255): around pictures, and of a frame that is missing


# twin: vla0.load_tokenizer
def load_tokenizer(cfg, folder=None):
    """The tokenizer in a checkpoint folder, else `cfg.tokenizer`: "tiny", a folder or file, a hub id."""
    if cfg.tokenizer == "tiny":
        return tiny_tokenizer()
    own = folder is not None and (Path(folder) / "tokenizer.json").is_file()
    path = Path(folder) if own else resolve(cfg.tokenizer, ["tokenizer.json"], "--tokenizer")
    path = path / "tokenizer.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(f"--tokenizer {cfg.tokenizer}: Qwen2's tokenizer.json is needed, {path} is none.")
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def encode_text(instruction, cfg, tokenizer):
    """The instruction as it is, no template, no <s>: list of ids."""
    ids = list(tokenizer(instruction, add_special_tokens=False).input_ids)
    if len(ids) > cfg.max_text or max(ids) >= cfg.vocab or cfg.pad_id in ids:
        raise ValueError(f"instruction {instruction[:60]!r}: {len(ids)} tokens up to {max(ids)}; at most "
                         f"max_text={cfg.max_text} below vocab={cfg.vocab} other than pad_id are taken.")
    return ids


def pad_square(image, pad):
    """uint8 (h, w, 3) -> (side, side, 3), grey around it."""
    # FAITHFUL: the official training pads below and on the right (topleft), all official test and inference
    # scripts on both sides (center). Here one setting, stored in the checkpoint, holds for both.
    # Test: test_a0.py::test_training_and_inference_pad_alike
    h, w, _ = image.shape
    side = max(h, w)
    top, left = ((side - h) // 2, (side - w) // 2) if pad == "center" else (0, 0)
    return np.pad(image, ((top, side - h - top), (left, side - w - left), (0, 0)), constant_values=GREY)


# twin: cogact.resize
def resize(image, size, how=Image.Resampling.BICUBIC):
    """uint8 (h, w, 3) -> (size, size, 3), aspect ratio not kept; PIL's antialiased filters."""
    same = image.shape[:2] == (size, size)
    return image if same else np.array(Image.fromarray(image).resize((size, size), how))


def crop(frames, points, centre, ratio=0.85):
    """Cut a box around `centre` (x, y) [pixels of frame 0]; points (T, 2). Unchanged if a point were lost."""
    h, w, _ = frames[0].shape
    ch, cw = int(h * ratio), int(w * ratio)
    left, top = centre[0] - cw // 2, centre[1] - ch // 2
    moved = points * [w, h] - [left, top]
    if not ((moved >= 0) & (moved < [cw, ch])).all():
        return frames, points
    # a box of odd size may overrun the border by one pixel: then the picture is that much short
    return [f[top:top + ch, left:left + cw] for f in frames], moved / [cw, ch]


def rotate(frames, points, degrees):
    """Turn frames and points (T, 2) counter-clockwise about the middle of frame 0; they may leave [0, 1]."""
    h, w, _ = frames[0].shape
    cx, cy, c, s = w // 2, h // 2, math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.array([[c, s, (1 - c) * cx - s * cy], [-s, c, s * cx + (1 - c) * cy]])
    back = matrix[:, :2].T                                     # from the result's pixels to the frame's
    start = 0.5 - back @ (matrix[:, 2] + 0.5)                  # PIL counts from corners, not pixel centres
    how = (w, h), Image.Transform.AFFINE, np.column_stack([back, start]).ravel(), Image.Resampling.BILINEAR
    turned = [np.array(Image.fromarray(f).transform(*how, fillcolor=(GREY,) * 3)) for f in frames]
    return turned, np.column_stack([points * [w, h], np.ones(len(points))]) @ matrix.T / [w, h]


def augment_frames(frames, points, cfg, rng):
    """Random crop and rotation, the same for both frames. frames: [reference or None,] current."""
    # FAITHFUL (a switch): officially the sizes are frame 0's, even if that is the 384 x 384 filler: a picture
    # becomes its top-left corner, and one label in ten is wrong. Ours: a missing frame has the current one's
    # size. Test: test_a0.py::test_crop_follows_the_current_frame_unless_faithful
    size = (cfg.image_size, cfg.image_size, 3) if cfg.faithful_crop else frames[-1].shape
    seen = [np.full(size, GREY, np.uint8) if f is None else f for f in frames]
    if rng.random() < 0.15:
        h, w, _ = seen[0].shape
        y, x = int(h * 0.85) // 2, int(w * 0.85) // 2
        seen, points = crop(seen, points, (rng.integers(x, w - x + 1), rng.integers(y, h - y + 1)))
    if rng.random() < 0.15:
        seen, points = rotate(seen, points, rng.uniform(-30, 30))
    return [None if f is None else s for f, s in zip(frames, seen)], points


def jitter(image, rng):
    """torchvision's ColorJitter(0.3, 0.4, 0.5, 0.03) on a PIL picture: four changes in random order."""
    for i in rng.permutation(4):
        f = rng.uniform(-1, 1) * (0.3, 0.4, 0.5, 0.03)[i]
        if i < 3:
            change = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
            image = change(image).enhance(1 + f)
        else:
            hsv = np.array(image.convert("HSV")) + np.uint8([int(f * 255) % 256, 0, 0])     # hue wraps around
            image = Image.frombytes("HSV", image.size, hsv.tobytes()).convert("RGB")
    return image


def add_grain(image, rng):
    """Gaussian, Laplace or Poisson noise on a PIL picture, for each channel its own or one for all."""
    x, scale = np.asarray(image), rng.uniform(0, 0.05 * 255)
    shape, kind = (*x.shape[:2], 3 if rng.random() < 0.5 else 1), rng.integers(3)
    grain = rng.poisson(scale, shape) if kind == 0 else (rng.normal, rng.laplace)[kind - 1](0, scale, shape)
    return Image.fromarray(np.clip(np.rint(x + grain), 0, 255).astype(np.uint8))


def blur(image, rng):
    """A PIL picture: 1/2 as it is, 1/4 blurred by motion, 1/12 each a Gaussian, average and median filter."""
    kind, size = rng.integers(12), int(rng.integers(3, 37))
    if kind >= 3:
        filters = (ImageFilter.GaussianBlur(rng.uniform(0, 3)), ImageFilter.BoxBlur(size % 6 / 2 + 0.5),
                   ImageFilter.MedianFilter(size % 9 + 3 | 1))
        return image.filter(filters[kind - 3]) if kind < 6 else image
    x, r, angle, end = np.asarray(image, np.float32), size // 2 + 1, 2 * math.pi * rng.random(), rng.random()
    padded, (h, w, _), out = np.pad(x, ((r, r), (r, r), (0, 0)), "edge"), x.shape, 0
    for i, weight in zip(np.arange(size) - (size - 1) / 2, np.linspace(end, 1 - end, size)):
        top, left = r + round(i * math.sin(angle)), r + round(i * math.cos(angle))
        out += np.float32(weight / (0.5 * size)) * padded[top:top + h, left:left + w]
    return Image.fromarray(np.clip(np.rint(out), 0, 255).astype(np.uint8))


def spoil(frame, rng):
    """One frame in five gets noise and blur, other colours, or both (official image_aug, there by imgaug)."""
    kind, image = rng.integers(15), Image.fromarray(frame)     # 0: noise and blur, 1: both, 2: colours
    image = jitter(image, rng) if kind in (1, 2) else image
    for step in (add_grain, blur)[::rng.choice((1, -1))] if kind in (0, 1) else ():
        image = step(image, rng)
    return np.asarray(image)


def pick_frames(sample, cfg):
    """[reference (h, w, 3) or None, current (h, w, 3)]; with cfg.history 1: [current]."""
    view, past = cfg.views[0], sample.get("history_images")
    past = {} if past is None else past
    if not isinstance(past, dict):
        raise ValueError("history_images: a dict {view: uint8 array (1, h, w, 3)} is expected, found "
                         f"{type(past).__name__}.")
    now, before = (p.get(view, next(iter(p.values()), None)) for p in (sample["images"], past))
    if before is not None and (len(past) > 1 and view not in past or np.shape(before)[1:] != now.shape
                               or not len(before) or np.asarray(before).dtype != np.uint8):
        raise ValueError(f"history_images: {{{view!r}: uint8 array {(1, *now.shape)}}} is expected, as large "
                         f"as the current picture, found { {k: np.shape(x) for k, x in past.items()} }.")
    return [None if before is None else before[0], now][-cfg.history:]                 # [0]: the oldest


def prepare(sample, cfg, tokenizer, stats=None, key=None, train=False):
    """One sample (or observation) -> a dict of CPU tensors; runs in loader workers, knows no weights.
    images (F, h, w, 3) uint8, ids (L,) int64; with waypoints also these, (T, 2) float32. A missing frame is
    grey. key: an int that fixes all random draws made for this sample. stats: not needed."""
    check_observation(sample, cfg.views)
    frames, ids = pick_frames(sample, cfg), encode_text(sample["instruction"], cfg, tokenizer)
    points = sample.get("waypoints")
    if points is not None:
        points = np.asarray(points, np.float64)[:cfg.horizon]                          # (T, 2)
        if points.shape != (cfg.horizon, 2) or not np.isfinite(points).all():
            raise ValueError(f"waypoints: {cfg.horizon} points of 2 finite numbers are expected, found shape "
                             f"{np.shape(sample['waypoints'])}. Set horizon, or fix the data.")
    if train:
        rng = np.random.default_rng() if key is None else keyed_rng(key, 1)
        frames[:-1] = [None if rng.random() < cfg.single_image else f for f in frames[:-1]]
        if cfg.augment and points is not None:
            frames, points = augment_frames(frames, points, cfg, rng)
        frames = [spoil(f, rng) if cfg.image_aug and f is not None else f for f in frames]
        frames = [None if rng.random() < cfg.condition_mask else f for f in frames]
        ids = [cfg.pad_id] if rng.random() < cfg.condition_mask else ids               # "no text"
    filler = np.full((cfg.image_size, cfg.image_size, 3), GREY, np.uint8)
    images = [filler if f is None else resize(pad_square(f, cfg.pad), cfg.image_size) for f in frames]
    out = {"images": torch.from_numpy(np.stack(images)), "ids": torch.tensor(ids)}     # (F, h, w, 3), (L,)
    out |= {} if points is None else {"waypoints": torch.from_numpy(points.astype(np.float32))}
    return out | ({} if key is None else {"key": torch.tensor(key)})


def collate(prepared, cfg):
    """List of prepared samples -> batch; ids are padded on the right, mask (B, L) is True for real tokens."""
    batch = {name: torch.stack([p[name] for p in prepared]) for name in prepared[0] if name != "ids"}
    batch["ids"] = nn.utils.rnn.pad_sequence([p["ids"] for p in prepared], True, cfg.pad_id)    # (B, L)
    return batch | {"mask": batch["ids"] != cfg.pad_id}


# ---- Building blocks --------------------------------------------------------------------------------------

class Norm(nn.Module):
    """Scales (..., D) to a spread of one, times a learned weight; kind: Config.norm."""

    def __init__(self, width, kind):
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.ones(width)), kind

    def forward(self, x):
        """(..., D) -> (..., D)."""
        # FAITHFUL: timm 1.0.3 calls this RmsNorm, but divides by the standard deviation (mean subtracted,
        # n - 1; x itself is not centred). The released weights were trained with it; newer timm (and apex,
        # where installed) has the true one, "rms". Test: test_a0.py::test_norm_is_timms_variance_form
        square = x.var(-1, keepdim=True) if self.kind == "variance" else x.square().mean(-1, keepdim=True)
        return (x * torch.rsqrt(square + 1e-6) * self.weight).to(x.dtype)    # autocast: q and k stay in bf16


def mlp(width, out):
    """(B, L, D) -> (B, L, out), no expansion."""
    fc1, fc2 = nn.Linear(width, width), nn.Linear(width, out)
    return nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(approximate="tanh"), fc2=fc2))


def adaptor(width_in, width, layers):
    """Features of an encoder, or points, -> the denoiser's width: Linear layers, tanh GELU between."""
    later = [(nn.GELU(approximate="tanh"), nn.Linear(width, width)) for _ in range(layers - 1)]
    return nn.Sequential(nn.Linear(width_in, width), *(module for pair in later for module in pair))


class Attention(nn.Module):
    """Self-attention over the six tokens, no mask; q and k are normalized per head."""

    def __init__(self, width, heads, norm, attn):
        super().__init__()
        self.heads, self.attn = heads, attn
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = Norm(width // heads, norm), Norm(width // heads, norm)

    def forward(self, x):
        """(B, L, D) -> (B, L, D)."""
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).unbind(2)     # each (B, L, H, K)
        x = attention(self.q_norm(q), self.k_norm(k), v, self.attn)                    # (B, L, H, K)
        return self.proj(x.reshape(B, L, D))                                           # (B, L, D)


class CrossAttention(nn.Module):
    """Tokens look at a condition, which is not normalized."""

    def __init__(self, width, heads, norm, attn):
        super().__init__()
        self.heads, self.attn = heads, attn
        self.q, self.kv, self.proj = (nn.Linear(width, n * width) for n in (1, 2, 1))
        self.q_norm, self.k_norm = Norm(width // heads, norm), Norm(width // heads, norm)

    def keys_values(self, c, mask=None):
        """c (B, M, D), mask (B, M) True = may look -> keys and values (B, M, H, K), mask (B, 1, 1, M)."""
        B, M, D = c.shape
        k, v = self.kv(c).view(B, M, 2, self.heads, D // self.heads).unbind(2)         # each (B, M, H, K)
        if mask is not None:                                   # a row without any text looks at zeros, where
            some = mask.any(1, keepdim=True)                   # the official code (torch 2.1) got NaN
            v, mask = v * some[:, :, None, None], (mask | ~some)[:, None, None]
        return lean(self.k_norm, k), v, mask

    def forward(self, x, k, v, mask=None):
        """x (B, L, D); k, v, mask as from keys_values -> (B, L, D)."""
        B, L, D = x.shape
        q = self.q_norm(self.q(x).view(B, L, self.heads, D // self.heads))             # (B, L, H, K)
        return self.proj(attention(q, k, v, self.attn, mask=mask).reshape(B, L, D))    # (B, L, D)


class Block(nn.Module):
    """Pre-norm: self-attention, cross-attention to one of the two conditions, MLP. No gates, no dropout."""

    def __init__(self, cfg, attn):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (Norm(cfg.width, cfg.norm) for _ in range(3))
        self.attn = Attention(cfg.width, cfg.heads, cfg.norm, attn)
        self.cross_attn = CrossAttention(cfg.width, cfg.heads, cfg.norm, attn)
        self.ffn = mlp(cfg.width, cfg.width)

    def forward(self, x, c, mask=None, kept=None):
        """x (B, L, D), c (B, M, D), mask (B, M) -> (B, L, D). kept: a dict in which the condition's keys and
        values stay from call to call: they depend neither on x nor on t, and are nearly all of the work."""
        kept = {} if kept is None else kept
        if not kept:
            kept["seen"] = self.cross_attn.keys_values(c, mask)
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), *kept["seen"])
        return x + self.ffn(self.norm3(x))


# twin: cogact.sinusoid
def sinusoid(t, dim, max_period=10000):
    """Diffusion steps t (n,), as they are (0..99) -> (n, dim) float32, cosines first."""
    half = dim // 2
    f = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None].float() * f                                                     # (n, dim/2)
    return torch.cat([angle.cos(), angle.sin()], 1)


def sincos(positions, width):
    """Positions (n,) -> (n, width) float64, sines first."""
    angle = np.asarray(positions, np.float64)[:, None] * 10000.0 ** (-np.arange(width // 2) / (width / 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], 1)


def image_table(sizes, width):
    """sizes (frames, cameras, patches) -> (product, D): those above 1 share the channels, others get none."""
    table, coded = np.zeros((*map(abs, sizes), width)), [axis for axis, n in enumerate(sizes) if n > 1]
    for i, axis in enumerate(coded):
        share, others = width // len(coded) // 2 * 2, [a for a in range(len(sizes)) if a != axis]
        table[..., i * share:(i + 1) * share] = np.expand_dims(sincos(range(sizes[axis]), share), others)
    return table.reshape(-1, width)


def position_tables(cfg):
    """First values of the three trained tables {name: (1, n, D)}."""
    T, D, half = cfg.horizon, cfg.width, cfg.width // 2
    # half of the channels say time step (0) or point (1), the others which point. SigLIP and Qwen2 have coded
    # the order of patches and words already: no code for these (a negative size, position 0 everywhere)
    points = np.concatenate([sincos([0] + [1] * T, half), sincos([0, *range(T)], half)], 1)
    tables = {"x_pos_embed": points, "lang_cond_pos_embed": sincos(np.zeros(cfg.max_text), D),
              "img_cond_pos_embed": image_table((cfg.history, 1, -cfg.patches), D)}
    return {name: torch.from_numpy(table).float()[None] for name, table in tables.items()}


class Denoiser(nn.Module):
    """Predicts the clean points from noisy ones, the time step, text and pictures.

        tokens:  t | point 0 (contact) | points 1 ... 4     even blocks look at the text, odd ones at pictures
    """

    def __init__(self, cfg, attn="sdpa"):
        super().__init__()
        time = nn.Sequential(nn.Linear(256, cfg.width), nn.SiLU(), nn.Linear(cfg.width, cfg.width))
        self.t_embedder = nn.ModuleDict({"mlp": time})
        self.blocks = nn.ModuleList(Block(cfg, attn) for _ in range(cfg.depth))
        # what the paper calls the spatial information aggregation layer: a norm and an MLP
        self.final_layer = nn.Sequential(OrderedDict(
            norm_final=Norm(cfg.width, cfg.norm), ffn_final=mlp(cfg.width, cfg.action_dim)))
        for module in self.modules():                          # official first values
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(time[0].weight, std=0.02)
        nn.init.normal_(time[2].weight, std=0.02)
        nn.init.zeros_(self.final_layer.ffn_final.fc2.weight)  # a fresh model predicts (0, 0)
        for name, table in position_tables(cfg).items():
            setattr(self, name, nn.Parameter(torch.empty(table.shape).copy_(table)))

    def forward(self, x, t, lang, img, mask=None, kept=None):
        """x (B, T, D) embedded points, t (B,) or (1,), lang (B, L, D), img (B, F P, D), mask (B, L) of the
        text -> (B, T, A). kept: a dict for each block, see there."""
        t = self.t_embedder["mlp"](sinusoid(t, 256).to(x.dtype))[:, None].expand(len(x), -1, -1)   # (B, 1, D)
        x = torch.cat([t, x], 1) + self.x_pos_embed                                    # (B, 1 + T, D)
        conditions = ((lang + self.lang_cond_pos_embed[:, :lang.shape[1]], mask),
                      (img + self.img_cond_pos_embed, None))
        for i, block in enumerate(self.blocks):
            x = block(x, *conditions[i % 2], kept[i] if kept else None)
        return self.final_layer(x)[:, 1:]                                              # (B, T, A)


# twin: cogact.cosine_betas
def cosine_betas(steps, offset=0.008, max_beta=0.999):
    """beta_i of the "squaredcos_cap_v2" schedule (Nichol & Dhariwal 2021), float64 (steps,)."""
    u = np.arange(steps + 1, dtype=np.float64) / steps
    alpha_bar = np.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


@functools.lru_cache
def alpha_bar(total, device="cpu"):
    """(total,): the product of 1 - beta, in float32 as diffusers computes it."""
    return torch.cumprod(1 - torch.from_numpy(cosine_betas(total)).float(), 0).to(device)


def add_noise(x, noise, t, total):
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise, all of it in x's type, as officially."""
    abar = alpha_bar(total, x.device).to(x.dtype)[t][:, None, None]                    # (B, 1, 1)
    return abar ** 0.5 * x + (1 - abar) ** 0.5 * noise


@functools.lru_cache
def sampler_table(total, steps):
    """(time steps, sigmas, rows (a, b, r)) of DPM-Solver++(2M), noisiest first, float32; see solver_step."""
    times = np.linspace(0, total - 1, steps + 1)[:0:-1].round().astype(int)
    sigma = torch.cat([((1 - alpha_bar(total)) / alpha_bar(total))[times] ** 0.5, torch.zeros(1)])
    alpha = 1 / (sigma ** 2 + 1) ** 0.5
    s = sigma * alpha
    h = (alpha.log() - s.log()).diff()                                                 # of lambda, (steps,)
    a, b, r = s[1:] / s[:-1], alpha[1:] * (torch.exp(-h) - 1), torch.zeros(steps)
    # r = 0 (first order) in the first and the last step. The last one goes to sigma = 0, where lambda is
    # infinite: a = 0, b = -1, so the answer is the last prediction itself.
    r[1:-1] = 1 / (h[:-2] / h[1:-1])
    return times.tolist(), sigma, list(zip(a, b, r))           # 0-d tensors: in bf16, diffusers' rounding


def solver_step(x, m, before, a, b, r):
    """x_t, the prediction m of now and the one before -> the next x; float32 inside, m's type outside."""
    x = a * x.float() - b * m
    return (x - 0.5 * b * (r * (m - before)) if r else x).to(m.dtype)


def ema_decay(step, most=0.9999, power=0.75, inv_gamma=1.0, after=0, least=0.0):
    """The official average's decay at optimizer step `step` (0-based): the first two copy the weights."""
    s = max(0, step - after - 1)
    return 0.0 if s <= 0 else min(max(1 - (1 + s / inv_gamma) ** -power, least), most)


# ---- The model --------------------------------------------------------------------------------------------

class Model(nn.Module):
    """A0. `model` (the denoiser) and the three adaptors carry the official names, and are all that trains.
    preset, origin: for the record in saved checkpoints; fresh: parameters that a checkpoint did not hold."""
    resized = ("model.x_pos_embed", "model.img_cond_pos_embed")    # by horizon and history, 1 in pre-training
    graphs = Graphs()                  # off; Graphs(common.captured): act() with CUDA graphs

    def __init__(self, cfg, tokenizer=None, stats=None, attn="auto"):
        super().__init__()
        self.cfg, self.tokenizer, self.stats = cfg, tokenizer, stats or {}
        self.preset, self.origin, self.fresh = "custom", {}, []
        self.attn = "sdpa" if attn == "auto" else attn         # no device is known yet; sdpa runs on all
        self.model = Denoiser(cfg, self.attn)
        self.lang_adaptor = adaptor(cfg.qwen_width, cfg.width, 2)      # these keep PyTorch's own first values
        self.img_adaptor = adaptor(cfg.siglip_width, cfg.width, 2)
        self.state_adaptor = adaptor(cfg.action_dim, cfg.width, 3)     # of the noisy points
        # kept from call to call: encoders of the hub (a plain dict, so they are in no state_dict), features
        self.loaded, self.pictures, self.texts = {}, {}, {}
        self.register_load_state_dict_post_hook(lambda model, _: vars(model).update(pictures={}, texts={}))
        self.build_encoders()

    def build_encoders(self):
        """The small encoders that are made here and belong to the checkpoint; None for those of the hub."""
        cfg, self.siglip, self.qwen = self.cfg, None, None
        if cfg.vision == "tiny":
            self.siglip = SiglipVisionModel(SiglipVisionConfig(
                hidden_size=cfg.siglip_width, intermediate_size=4 * cfg.siglip_width, num_hidden_layers=4,
                num_attention_heads=2, image_size=cfg.image_size, patch_size=cfg.patch_size,
                vision_use_head=False, attn_implementation="sdpa")).requires_grad_(False)
        if cfg.text == "tiny":
            if cfg.text_cache:
                raise ValueError("text_cache keeps what a released text encoder says; this one is 'tiny'.")
            self.qwen = Qwen2Model(Qwen2Config(
                vocab_size=cfg.vocab, hidden_size=cfg.qwen_width, intermediate_size=2 * cfg.qwen_width,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa",
                rope_parameters={"rope_type": "default", "rope_theta": 1e6})).requires_grad_(False)

    def encoder(self, own, kind, where):
        """`own`, if it was made here; else the frozen encoder `where`, loaded when first needed, in bf16."""
        if own is None and kind not in self.loaded:
            path = resolve(where, ["config.json", "*.safetensors", "*.index.json"], kind.__name__)
            dtype = torch.float32 if self.cfg.compute == "fp32" else torch.bfloat16
            self.loaded[kind] = kind.from_pretrained(path, dtype=dtype).requires_grad_(False)
        return self.loaded[kind].to(self.device) if own is None else own

    device = property(lambda self: self.model.x_pos_embed.device)

    def precision(self):
        """The autocast region around all networks: bf16 on CUDA unless cfg.compute differs."""
        compute, kind = self.cfg.compute, self.device.type
        if compute == "auto" and kind != "cuda":
            return nullcontext()
        return torch.autocast(kind, torch.bfloat16, enabled=compute != "fp32")

    @torch.no_grad()
    def see(self, images, keep=False):
        """uint8 (N, h, w, 3) -> SigLIP's last hidden state (N, P, D). keep: what the last such call has
        seen (the reference frame, the grey one) is not encoded again. On a CPU equal pictures are encoded
        once in any case: half of a batch may be grey."""
        if not keep and images.device.type != "cpu":
            return self.graphs(self.encode, images, key="encode")
        keys, known = [hash(image.numpy().tobytes()) for image in images], self.pictures if keep else {}
        new = {k: image for k, image in zip(keys, images) if k not in known}
        if new:
            pictures = torch.stack([*new.values()]).to(self.device)
            known = known | dict(zip(new, self.graphs(self.encode, pictures, key="encode")))
        if keep:
            self.pictures = {k: known[k] for k in keys}
        return torch.stack([known[k].to(self.device) for k in keys])

    def encode(self, images):
        """uint8 pictures (N, h, w, 3) -> SigLIP's features (N, P, W)."""
        siglip = self.encoder(self.siglip, SiglipVisionModel, self.cfg.vision)
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 255              # (N, 3, h, w)
        return siglip(((pixels - 0.5) / 0.5).to(siglip.dtype)).last_hidden_state

    @torch.no_grad()
    def read(self, ids, mask):
        """ids, mask (B, L) -> Qwen2's features (B, L, D), 0 where padded. Each text is computed once, alone,
        and kept: in memory, and in the folder cfg.text_cache."""
        cfg, rows = self.cfg, [tuple(row[:n]) for row, n in zip(ids.tolist(), mask.sum(1).tolist())]
        self.texts = self.texts if len(self.texts) < 4096 else {}
        for row in set(rows) - self.texts.keys():
            file = Path(cfg.text_cache) / cfg.text.replace("/", "--") / f"{hash64(*row):016x}.safetensors"
            if cfg.text_cache and file.is_file():
                self.texts[row] = load_weights(file)["features"]
                continue
            words = torch.tensor([row or (cfg.pad_id,)], device=self.device)           # (1, L)
            hidden = self.encoder(self.qwen, Qwen2Model, cfg.text)(words, use_cache=False).last_hidden_state
            self.texts[row] = hidden[0, :len(row)]
            if cfg.text_cache:
                atomic_write(file, functools.partial(save_file, {"features": self.texts[row].cpu()}))
        out = self.texts[rows[0]].new_zeros(*ids.shape, cfg.qwen_width, device=self.device)
        for i, row in enumerate(rows):
            out[i, :len(row)] = self.texts[row]
        return out

    def forward(self, batch, keep=False):
        """batch: images (B, F, h, w, 3) uint8, ids, mask (B, L) -> features: what the frozen encoders say,
        text (B, L, D of Qwen2), mask (B, L), pictures (B, F P, D of SigLIP). keep: see `see`."""
        images, mask = batch["images"], batch["mask"].to(self.device)
        with self.precision():
            text = self.read(batch["ids"], batch["mask"])
            seen = self.see(images.flatten(0, 1), keep).unflatten(0, images.shape[:2])     # (B, F, P, D)
        # PAPER!=CODE: the paper's "position offset attention" is no attention in the code: the reference's
        # features become current - reference. Test: test_a0.py::test_poa_subtracts_the_reference
        if self.cfg.poa and self.cfg.history == 2:
            seen = torch.stack([seen[:, 1] - seen[:, 0], seen[:, 1]], 1)
        return text, mask, seen.flatten(1, 2)

    def adapt(self, features):
        """Features as from forward -> the denoiser's conditions: text, pictures (B, ., D), mask of text."""
        (text, mask, pictures), dtype = features, self.model.x_pos_embed.dtype
        return self.lang_adaptor(text.to(dtype)), self.img_adaptor(pictures.to(dtype)), mask       # (B, ., D)

    def denoise(self, x, t, conditions, kept=None):
        """Noisy points (B, T, 2), t (B,) or (1,) -> clean points (B, T, 2), float32."""
        x = self.state_adaptor(x.to(self.model.x_pos_embed.dtype))                     # (B, T, D)
        return self.model(x, t, *conditions, kept).float()

    def denoising_loss(self, features, points, noise, t):
        """The error of the predicted points. features: as from forward; points, noise (B, T, 2); t (B,)."""
        if self.cfg.faithful_bf16:
            # FAITHFUL (a switch): officially points, noise and alpha_bar are bf16, a grid of 4 to 8 pixels
            # in a picture 1920 wide. Ours: float32. Test: test_a0.py::test_bf16_targets_only_when_asked
            points, noise = points.bfloat16(), noise.bfloat16()
        noised = add_noise(points, noise, t, self.cfg.num_train_steps)                 # (B, T, 2)
        with self.precision():
            pred, points = self.denoise(noised, t, self.adapt(features)), points.float()
            mse, l1 = F.mse_loss(pred, points), F.l1_loss(pred, points)
        # FAITHFUL: the official code weighs the points by 0.6, 0.1, 0.1, 0.1, 0.1, but after averaging over
        # them: a constant 1/5. Test: test_a0.py::test_waypoint_weights_are_a_constant_factor
        loss = 0.2 * mse
        return loss, {"loss": loss.detach(), "mse": mse.detach(), "l1": l1.detach()}

    def loss(self, batch, noise=None, t=None):
        """Training loss; batch["waypoints"]: (B, T, 2). Pass `noise` (B, T, 2) and `t` (B,) to replay a step;
        else they are drawn per sample from batch["key"], on the CPU; without, from torch's generator."""
        cfg, points = self.cfg, batch.get("waypoints")
        if points is None or points.shape[1:] != (cfg.horizon, cfg.action_dim):
            raise ValueError(f"waypoints: {cfg.horizon} points per sample are expected, found "
                             f"{points if points is None else tuple(points.shape[1:])}. Look at the data.")
        generators = map(keyed_generator, batch["key"].tolist()) if "key" in batch else [None] * len(points)
        draws = [(torch.randn(cfg.horizon, cfg.action_dim, generator=g),    # noise before t, as officially
                  torch.randint(cfg.num_train_steps, (), generator=g)) for g in generators]
        drawn = [torch.stack(d).to(self.device, non_blocking=True) for d in zip(*draws)]
        return self.denoising_loss(self(batch), points, drawn[0] if noise is None else noise,
                                   drawn[1] if t is None else t)

    def sample(self, features, noise):
        """features as from forward, noise (B, T, 2) float32 -> points (B, T, 2), not clipped."""
        return self.graphs(self.solve, noise, *features, key="solve")

    def solve(self, noise, *features):
        """As `sample`: what a CUDA graph holds."""
        times, _, rows = sampler_table(self.cfg.num_train_steps, self.cfg.sample_steps)
        with self.precision():
            conditions, x, m = self.adapt(features), noise, None
            kept = [{} for _ in self.model.blocks]             # keys and values, the same in all steps
            for t, row in zip(times, rows):
                t = torch.full((1,), t, device=self.device)
                before, m = m, self.denoise(x, t, conditions, kept)
                x = solver_step(x, m, before, *row)
        return x

    @torch.no_grad()
    def act(self, observations, unnorm_key=None, noise=None):
        """A list of raw observations -> (points (B, T, 2) float32 in [0, 1] of the original picture, info).

        history_images of an observation: the reference frame; without, grey stands for it. noise: (B, T, 2),
        else drawn on the CPU. info["pixels"]: points x (width, height). unnorm_key: not needed.
        """
        if not (isinstance(observations, list | tuple) and all(isinstance(o, dict) for o in observations)
                and observations):
            raise ValueError("act() needs at least one observation, in a list, each a dict; found "
                             f"{' '.join(repr(observations)[:40].split())}.")
        cfg, shape = self.cfg, (len(observations), self.cfg.horizon, self.cfg.action_dim)
        noise = torch.randn(shape) if noise is None else torch.as_tensor(noise, dtype=torch.float32)
        if noise.shape != shape:
            raise ValueError(f"noise of shape {shape} = (B, T, A) is expected, found {tuple(noise.shape)}.")
        self.tokenizer = self.tokenizer or load_tokenizer(cfg)
        seen = [{**o, "waypoints": None} for o in observations]
        features = self(collate([prepare(o, cfg, self.tokenizer) for o in seen], cfg), keep=True)
        points = self.sample(features, noise.to(self.device)).cpu().numpy()            # (B, T, 2)
        size = np.array([[pick_frames(o, cfg)[-1].shape[1::-1]] for o in seen], np.float32)    # (B, 1, 2)
        return points, {"pixels": points * size}

    def blocks(self):
        """The modules to shard, checkpoint or compile one by one, in order of use."""
        return list(self.model.blocks)

    def param_groups(self, lr, weight_decay):
        """For the optimizer: all but the encoders; weight decay on all of it, as officially."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr,
                 "weight_decay": weight_decay}]

    def save_pretrained(self, folder, card=None, state=None):
        """Write our checkpoint folder. card: more lines for README.md {name: text}; state: other weights."""
        lines = {"method": "A0 (https://arxiv.org/abs/2504.12636)", "preset": self.preset, **self.origin,
                 **(card or {})}
        text = "# A0\n\n" + "".join(f"- {name}: {value}\n" for name, value in lines.items())
        if self.cfg.tokenizer != "tiny" and self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)             # config.json, the last, makes it valid
        save_folder(folder, "a0", self.preset, asdict(self.cfg), state or self.state_dict(), self.stats, text,
                    self.origin)


# ---- Action execution: from points to poses ---------------------------------------------------------------
#
#   point 0, depth, camera -> the surface around it -> grasp, or the side to push from --+
#   points 1 .. 4, camera  -> rays, met at the height that the manner says --------------+-> targets
#        targets (x y z [m], yaw [rad], gripper) -> actions (n, 7), one per control step
#
# The paper describes this stage, nothing of it was released. There a grasp sampler proposes grasps, and a VLM
# picks the height of each waypoint. Here geometry proposes them, and the instruction's verb picks.

MANNERS = {"slide": ("push", "slide", "shove"), "lift": ("pick", "lift", "grab", "take"),
           "place": ("put", "place", "move", "set", "stack", "pile")}


def depth_at(depth, points, window=2):
    """Depth (T,) [m] at points (T, 2) in [0, 1]: the median of what is valid in (2 window + 1)^2 pixels.
    depth: (h, w) [m]; 0, negative and NaN are invalid. ValueError where none is valid, or outside."""
    (h, w), out = np.shape(depth), []
    for x, y in np.asarray(points, np.float64) * (w, h):
        rows, columns = (slice(max(0, int(c) - window), max(0, int(c) + window + 1)) for c in (y, x))
        near = np.asarray(depth, np.float64)[rows, columns]
        near = near[np.isfinite(near) & (near > 0)]
        if not (0 <= x <= w and 0 <= y <= h and near.size):
            raise ValueError(f"point ({x:.1f}, {y:.1f}): no valid depth within {window} pixels of it in a "
                             f"depth picture of {w} x {h}. Look again, or move the camera.")
        out.append(np.median(near))
    return np.array(out)


def back_project(points, depth, K, size, pose=None):
    """Points (T, 2) in [0, 1], depth (T,) [m], intrinsics K (3, 3), size (w, h) -> (T, 3) [m]: in the
    camera's frame, or with the camera's pose (4, 4), base from camera, in the robot's base frame."""
    pixels = np.column_stack([np.asarray(points, np.float64) * size, np.ones(len(points))])      # u, v, 1
    X = np.linalg.solve(np.asarray(K, np.float64), pixels.T).T * np.asarray(depth, np.float64)[:, None]
    return X if pose is None else X @ np.asarray(pose)[:3, :3].T + np.asarray(pose)[:3, 3]


def nearest_grasp(grasps, contact):
    """The index of the grasp whose position (G, 3) is nearest to the contact (3,), both in one frame."""
    return int(np.linalg.norm(np.asarray(grasps, np.float64) - contact, axis=1).argmin())


def manner_of(instruction):
    """How the path is meant: slide (on the table), lift, or place (up, over, down). The first verb says, but
    "pick up ... and put ..." places. ValueError: no verb."""
    words = re.findall(r"\w+|,", instruction.lower())
    said = [(manner, before) for before, word in zip(["", *words], words)
            for manner, verbs in MANNERS.items() if word in verbs]
    if said:
        then = any(manner == "place" and before in ("and", "then", ",") for manner, before in said)
        return "place" if said[0][0] == "lift" and then else said[0][0]
    known = ", ".join(verb for verbs in MANNERS.values() for verb in verbs)
    raise ValueError(f"instruction={instruction!r}: no verb says how high the path runs; use one of {known}, "
                     "or Policy(manner=...).")


def cloud(depth, K, pose):
    """Depth (h, w) [m along the optical axis] -> (h, w, 3) [m] in the base frame, NaN where it is invalid.
    K (3, 3) [pixels]; pose (4, 4): base from camera (x right, y down, z forward)."""
    h, w = depth.shape
    points = (np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1) + 0.5) / (w, h)    # pixel centres
    valid = np.where(np.isfinite(depth) & (depth > 0), depth, np.nan)
    return back_project(points.reshape(-1, 2), valid.ravel(), K, (w, h), pose).reshape(h, w, 3)


def meet(point, size, K, pose, height):
    """Where the ray through a point (2,) in [0, 1] is `height` [m] above the base: (2,). size: (w, h)."""
    ray, eye = back_project([point], [1.0], K, size, pose)[0] - pose[:3, 3], pose[:3, 3]
    if ray[2] > -1e-6 or height >= eye[2]:
        raise ValueError(f"point {np.round(point, 3).tolist()} is above the horizon: out of reach.")
    return (eye + ray * (height - eye[2]) / ray[2])[:2]


def thing_at(points, pixel, solid, miss):
    """The connected surface nearest to a pixel (x, y), bool (h, w); points (h, w, 3), solid (h, w): where.
    ValueError if it is further away than `miss`, of the width."""
    rows, columns = np.nonzero(solid)
    if not len(rows):
        raise ValueError("no valid depth above the table in the whole picture. Look at the depth camera.")
    away = np.hypot(columns + 0.5 - pixel[0], rows + 0.5 - pixel[1]) / len(solid[0])       # (n,)
    first = away.argmin()
    if away[first] > miss:
        raise ValueError(f"the contact is {away[first]:.0%} of the picture's width away from any thing.")
    part, todo = np.zeros_like(solid), [(rows[first], columns[first])]
    while todo:
        r, c = todo.pop()
        part[r, c] = True
        for a, b in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            inside = 0 <= a < len(solid) and 0 <= b < len(solid[0])
            if inside and solid[a, b] and not part[a, b] and np.abs(points[a, b] - points[r, c]).max() < 0.02:
                todo.append((a, b))
    return part


def side_normals(points, part):
    """Where the visible sides of a thing face, seen from above: (k, 2). points (h, w, 3), part (h, w)."""
    right, down = points[:-1, 1:] - points[:-1, :-1], points[1:, :-1] - points[:-1, :-1]
    normal = np.cross(right, down)                                                     # (h - 1, w - 1, 3)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True).clip(1e-12)
    return normal[part[:-1, :-1] & part[:-1, 1:] & part[1:, :-1] & (np.abs(normal[..., 2]) < 0.5), :2]


def grasp_yaw(centre, thing, others, normals, width):
    """The hand's yaw [rad] with free places for its fingers, which open along its y axis, and the thing
    narrow between them, its sides flat against hand and fingers. centre (2,), thing (n, 3), others (m, 3)
    [m], normals (k, 2); width [m] of the open hand."""
    def cost(yaw):
        axis, across = np.array([[-np.sin(yaw), np.cos(yaw)], [np.cos(yaw), np.sin(yaw)]])
        wide = np.ptp((thing[:, :2] - centre) @ axis)
        askew = 1 - np.abs(normals @ np.stack([axis, across], 1)).max(1).mean() if len(normals) else 0
        tips = centre + np.array([[-1], [1]]) * (width / 2 + 0.007) * axis             # (2, 2)
        near = np.linalg.norm(others[None, :, :2] - tips[:, None], axis=-1) < 0.016    # (2, m)
        return near.any(1).sum() + 2 * (wide > width) + wide + 0.02 * askew, abs(yaw)
    return min(np.linspace(-1.2, 1.2, 13), key=cost)


def resting_place(point, size, K, pose, top, others):
    """Where a thing of height `top` [m] rests when its middle is seen at `point`: ((2,), height) [m]."""
    for floor in np.arange(0.075, -0.001, -0.005):             # the highest surface that fits, else the table
        xy = meet(point, size, K, pose, floor + top / 2)
        under = others[np.linalg.norm(others[:, :2] - xy, axis=-1) < 0.015, 2]
        if len(under) and np.quantile(under, 0.9) >= floor - 0.003:
            return xy, np.quantile(under, 0.9)
    return xy, 0.0


def plan(points, depth, K, pose, hand, manner, cfg, grasps=None):
    """Points (5, 2) in [0, 1] -> targets to meet in order: (xyz (3,) [m], yaw [rad], gripper: 1 is open).

    depth, K, pose: as for `cloud`; hand (3,) [m]: where the gripper is, which is no thing. grasps (G, 4):
    x y z yaw of a sampler, of which the one nearest to the contact is taken (as in the paper), not ours.
    ValueError: no depth, no finite number, or a point that cannot be reached.
    """
    if not np.isfinite(points).all():
        raise ValueError(f"points {np.round(points, 2).tolist()}: finite numbers are expected.")
    seen, (h, w) = cloud(depth, K, pose), depth.shape                                  # (h, w, 3)
    over = np.linalg.norm(seen[..., :2] - hand[:2], axis=-1) < 0.075                   # of the hand
    solid = (seen[..., 2] > cfg.table) & (seen[..., 2] < np.where(over, min(hand[2] - 0.012, 0.1), 0.1))
    part = thing_at(seen, points[0] * [w, h], solid, cfg.miss)
    thing, others = seen[part], seen[solid & ~part]                                    # (n, 3), (m, 3)
    centre, top = (thing[:, :2].min(0) + thing[:, :2].max(0)) / 2, thing[:, 2].max()
    clear = max(top, others[:, 2].max(initial=0)) + 0.03                               # above all that stands
    if manner == "slide":
        end = meet(points[-1], (w, h), K, pose, top / 2)
        way = (end - centre) / max(np.linalg.norm(end - centre), 1e-6)
        half = np.abs((thing[:, :2] - centre) @ way).max()
        start = centre - way * (half + 0.034)
        spots = [(start, clear), (start, 0.02), (end - way * half, 0.02), (end - way * half, clear)]
        return [(np.array([*xy, z]), 0.0, 0) for xy, z in spots]
    if grasps is None:
        yaw = grasp_yaw(centre, thing, others, side_normals(seen, part), cfg.grip_width)
        z = max(0.45 * top, 0.018)
    else:
        grasps = np.asarray(grasps, np.float64)
        if grasps.shape != (len(grasps), 4) or not grasps.size or not np.isfinite(grasps).all():
            raise ValueError("grasps: rows x y z yaw of finite numbers, at least one, are expected, found "
                             f"{' '.join(str(grasps).split())[:60]}. Look at the grasp sampler.")
        contact = back_project(points[:1], depth_at(depth, points[:1]), K, (w, h), pose)[0]
        *centre, z, yaw = grasps[nearest_grasp(grasps[:, :3], contact)]
    targets = [(centre, clear + 0.02, 1), (centre, z, 1), (centre, z, 0), (centre, clear + z, 0)]
    if manner == "place":
        end, floor = resting_place(points[-1], (w, h), K, pose, top, others)
        via = [meet(point, (w, h), K, pose, clear) for point in points[2:-1]]
        targets += [(xy, clear + z, 0) for xy in (*via, end)]
        targets += [(end, floor + z + 0.006, 0), (end, floor + z + 0.006, 1), (end, clear + z, 1)]
    return [(np.array([*xy, height]), yaw, grip) for xy, height, grip in targets]


def to_actions(targets, hand, yaw, gripper, cfg):
    """Targets -> (n, 7): dx dy dz [m], droll dpitch dyaw [rad], gripper; each within one control step.
    hand (3,), yaw, gripper: where the arm is now."""
    rows = []
    for at, turn, grip in targets:
        still = cfg.grip_steps if grip != gripper else 0
        n = int(np.ceil(max(np.abs(at - hand).max() / cfg.max_step, abs(turn - yaw) / cfg.max_turn)))
        rows += [np.array([0, 0, 0, 0, 0, 0, grip])] * still
        rows += [np.array([*(at - hand) / max(n, 1), 0, 0, (turn - yaw) / max(n, 1), grip])] * n
        hand, yaw, gripper = at, turn, grip
    return np.array(rows, np.float64)


def read_robot(observation, view):
    """What motion needs: state (8,), depth (h, w) [m], K (3, 3), pose (4, 4), base from camera, of the camera
    `view`, or of the first that has depth. ValueError: something is missing, or of another kind."""
    wanted = {"state": "(8,)", "depth": "(h, w)", "intrinsics": "(3, 3)", "extrinsics": "(4, 4)"}
    missing = [name for name in wanted if name not in observation]
    if missing:
        raise ValueError(f"the observation has no {', '.join(missing)}; points become motion "
                         "with the arm's state, depth and the camera's matrices.")
    depth, out = observation["depth"], []
    view = next(iter(depth), view) if isinstance(depth, dict) and view not in depth else view
    for name, shape in wanted.items():
        given = observation[name]
        if name != "state":
            given = given.get(view, "nothing") if isinstance(given, dict) else "no dict {view: array}"
        x = np.asarray(np.nan if isinstance(given, str) else given, np.float64)
        fits = x.ndim == 2 and x.size if name == "depth" else str(x.shape) == shape and np.isfinite(x).all()
        matrix, of = name.endswith("trinsics"), "" if name == "state" else f" of camera {view!r}"
        if not fits or (matrix and abs(np.linalg.det(x)) < 1e-9):
            raise ValueError(f"{name}{of}: numbers {shape}{', invertible' * matrix} are expected, found "
                             f"shape {x.shape}: {' '.join(str(given).split())[:60]}.")
        out.append(x)
    return *out[:3], np.linalg.inv(out[3])


class Policy:
    """A session with one arm: points in, one action (7,) per control step out, until the path is played.

    manner: slide, lift or place (None: the instruction's verb says). grasps: a grasp sampler, a function of
    the observation; see `plan`. An observation also holds state (x y z [m], roll pitch yaw [rad], the
    fingers' distances [m]), and {view: array} of depth, intrinsics, extrinsics (camera from base): see
    eval_sim.Tabletop.observe. Where no path can be planned the pose is held, and `problem` says why; then
    the arm looks again.
    """

    def __init__(self, model, unnorm_key=None, execute=None, manner=None, grasps=None):
        self.model, self.manner, self.grasps = model, manner, grasps
        self.execute = model.cfg.execute if execute is None else execute
        if self.execute not in range(1, model.cfg.horizon + 1):
            raise ValueError(f"execute={execute}: a chunk has {model.cfg.horizon} points; set 1 to that.")
        if manner not in (None, *MANNERS):
            raise ValueError(f"manner={manner!r}: choose {', '.join(MANNERS)}.")
        self.reset()

    def reset(self, instruction=None):
        """Forget everything; call between episodes. (A new instruction does it by itself.)"""
        self.instruction, self.queue, self.problem = instruction, deque(), ""
        self.first = self.points = None

    needs_chunk = property(lambda self: not self.queue)        # True when the next step wants fresh points

    def ask(self, observation):
        """The observation as model.act wants it: with the session's first picture as reference frame."""
        if self.model.cfg.reference == "none":
            return observation
        known = self.first is not None and observation["instruction"] == self.instruction
        past = self.first if known else observation["images"]
        return {**observation, "history_images": {view: image[None] for view, image in past.items()}}

    def step(self, observation, chunk=None):
        """The action for now, (7,) float64. chunk: points (T, 2) if model.act was already asked."""
        if observation.get("instruction") != self.instruction:
            self.reset(observation.get("instruction"))
        if self.needs_chunk:
            check_observation(observation, self.model.cfg.views)
            chunk = self.model.act([self.ask(observation)])[0][0] if chunk is None else chunk
            if np.shape(chunk) != (self.model.cfg.horizon, 2):
                raise ValueError(f"chunk: points ({self.model.cfg.horizon}, 2) are expected, found "
                                 f"shape {np.shape(chunk)}.")
            self.points, self.first = np.asarray(chunk, np.float64), self.first or observation["images"]
            self.queue.extend(self.to_arm(observation))
        return self.queue.popleft()

    def to_arm(self, observation):
        """self.points -> actions (n, 7) for where the arm is now."""
        state, depth, K, pose = read_robot(observation, self.model.cfg.views[0])
        gripper = float(state[6] + state[7] > self.model.cfg.grip_width / 2)
        try:
            manner, self.problem = self.manner or manner_of(self.instruction), ""
            grasps = self.grasps(observation) if self.grasps else None
            targets = plan(self.points[:self.execute], depth, K, pose, state[:3], manner, self.model.cfg,
                           grasps)
            far = max(np.linalg.norm(xyz) for xyz, *_ in targets)
            if far > self.model.cfg.reach:
                raise ValueError(f"the path goes {far:.2f} m away from the base, reach is "
                                 f"{self.model.cfg.reach} m.")
            return to_actions(targets, state[:3], state[5], gripper, self.model.cfg)
        except ValueError as e:
            self.problem = str(e)
            print(f"warning: {e} The pose is held.", file=sys.stderr)
            return np.array([[0, 0, 0, 0, 0, 0, gripper]], np.float64)


# ---- Checkpoints: ours and the official ones --------------------------------------------------------------

LICENSE = "MIT (A0); SigLIP and Qwen2.5-7B, which it needs, are Apache 2.0"
OFFICIAL = ("model.safetensors", "pytorch_model.bin", "pytorch_model/mp_rank_00_model_states.pt")


def read_sizes(state):
    """Config fields that can be read off the shapes of official parameters."""
    def shape(name, dims=2):
        if getattr(state.get(name), "ndim", 0) != dims or not state[name].numel():
            raise ValueError(f"parameter {name} is missing, or of another kind; give a checkpoint of A0.")
        return state[name].shape
    _, tokens, width = shape("model.x_pos_embed", 3)
    return {"width": width, "horizon": tokens - 1, "max_text": shape("model.lang_cond_pos_embed", 3)[1],
            "depth": len({name.split(".")[2] for name in state if name.startswith("model.blocks.")}),
            "heads": width // shape("model.blocks.0.attn.q_norm.weight", 1)[0],
            "qwen_width": shape("lang_adaptor.0.weight")[1], "siglip_width": shape("img_adaptor.0.weight")[1]}


def read_official(path, overrides):
    """An official file -> (config, {name: tensor}, preset): sizes by shapes, noise plan by config.json."""
    loaded = load_weights(path)
    state = loaded.get("module", loaded) if isinstance(loaded, dict) else {}           # DeepSpeed nests
    state = {str(name): x for name, x in state.items()} if isinstance(state, dict) else {}
    sizes = read_sizes(state)
    beside = (folder / "config.json" for folder in (path.parent, path.parent.parent))
    about = next((read_json(file) for file in beside if file.is_file()), {})           # flat, or nested
    nested = about.get("config")
    plan = (nested if isinstance(nested, dict) else about).get("noise_scheduler") or {}
    if not isinstance(plan, dict):
        raise ValueError(f"{path}: noise_scheduler in its config.json is {str(plan)[:40]}, not an object.")
    if (plan.get("prediction_type", "sample"), plan.get("beta_schedule", "squaredcos_cap_v2")) != \
            ("sample", "squaredcos_cap_v2"):
        raise ValueError(f"{path}: its config.json has another noise schedule than A0: {plan}.")
    sizes |= {ours: plan[name] for ours, name in (("num_train_steps", "num_train_timesteps"),
              ("sample_steps", "num_inference_timesteps")) if name in plan}
    preset = "pretrain" if sizes["horizon"] == 1 else {2048: "1b", 1024: "170m"}.get(sizes["width"], "custom")
    cfg = configure(PRESETS.get(preset, Config()), **{**sizes, "execute": sizes["horizon"], **overrides})
    tokens = (*getattr(state.get("model.img_cond_pos_embed"), "shape", ()), 0, 0)[1]
    if tokens not in (cfg.patches, 2 * cfg.patches):
        raise ValueError(f"{path} is for {tokens} patches, a frame has {cfg.patches}; set image_size.")
    return configure(cfg, **{"history": tokens // cfg.patches, **overrides}), state, preset


def from_pretrained(path_or_id, *, preset=None, tokenizer=None, attn="auto", device="cpu", dtype=None,
                    allow_fresh=False, **overrides):
    """Load a checkpoint: our folder, an official .safetensors, .bin or .pt (or its folder), or a hub id.

    tokenizer: a path or hub id, or a tokenizer. dtype: "bf16" casts the weights (as officially), "fp32"
    computes in float32 on CUDA too. overrides: other Config values. allow_fresh: tables of other sizes start
    anew, with a warning: the pre-trained model (one point, one frame) can begin a run with five and two.
    """
    device, dtype = pick_device(device), str(dtype or "").removeprefix("torch.")
    dtype = {"bfloat16": "bf16", "float32": "fp32"}.get(dtype, dtype)
    if dtype not in ("", "bf16", "fp32"):
        raise ValueError(f"dtype={dtype!r} does not exist; choose bf16 or fp32.")
    path = resolve(path_or_id, ["*.json", *OFFICIAL])
    if isinstance(tokenizer, (str, Path)):
        overrides["tokenizer"], tokenizer = str(tokenizer), None
    overrides |= {"compute": dtype} if dtype else {}
    weights = path if path.is_file() else next((path / n for n in OFFICIAL if (path / n).is_file()), path)
    own = (path / "config.json").is_file() and "method" in read_json(path / "config.json")
    if own:
        saved, state = load_config(path, "a0"), load_weights(path / "model.safetensors")
        cfg, found = configure(Config(), **{**saved["config"], **overrides}), saved["preset"]
        origin, stats = saved["origin"], read_json(path / "dataset_statistics.json")
    else:
        cfg, state, found = read_official(weights, overrides)
        origin, stats = {"started from": str(path_or_id), "license": LICENSE}, {}
    if preset not in (None, found):
        raise ValueError(f"preset {preset!r} was asked for, {path} is {found!r}; leave the preset out.")
    where = "cuda" if attn == "flash" and torch.cuda.is_available() else device        # it may go there later
    with torch.device("meta"):                                 # shapes only; the file's tensors move in below
        model = Model(cfg, attn=pick_attention(attn, where))
    model.build_encoders()                                     # not on meta: no checkpoint has their tables
    want = model.state_dict()
    for name in [n for n in model.resized if allow_fresh and n in state and state[n].shape != want[n].shape]:
        print(f"warning: {weights}: {name} {tuple(state[name].shape)} is left out, it starts fresh with "
              f"{tuple(want[name].shape)}.", file=sys.stderr)
        state[name] = position_tables(cfg)[name.removeprefix("model.")]
        model.fresh.append(name)
    check_fit(want, state, weights)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model.load_state_dict({name: tensor.to(kind) for name, tensor in state.items()}, assign=True)
    if tokenizer is None and (own or cfg.tokenizer == "tiny"):                         # a hub's: when needed
        tokenizer = load_tokenizer(cfg, None if "tokenizer" in overrides else path)
    model.tokenizer, model.stats, model.preset, model.origin = tokenizer, stats, found, origin
    return model.to(device).eval()


# ---- Official metrics, one picture, demo ------------------------------------------------------------------

TESTS = {"maniskill": ["maniskill"], "droid": ["droid_cotrack", "droid_molmo_sam2"], "hoi4d": ["hoi4d"],
         "hoi4d_frame": ["hoi4d_frame"], "tabletop": []}       # --test: forms of data.a0_dataset
SCENES = 200                                                   # of the tabletop


def metrics(pred, truth, size, drop_last=False, bf16=False):
    """(mse, mae, mae of the contact) [pixels], means over points and coordinates. pred, truth: (T, 2) in
    [0, 1]; size: (w, h). Officially, ManiSkill's last point is dropped, and pixels are bf16."""
    size = torch.tensor(size)
    pred = (torch.as_tensor(pred).to(torch.bfloat16 if bf16 else torch.float32) * size).float()
    error = pred - (torch.as_tensor(truth).double() * size).float()                    # (T, 2)
    error = error[:-1] if drop_last else error
    return error.square().mean().item(), error.abs().mean().item(), error[0].abs().mean().item()


def official_test(model, dataset, form, bf16=False):
    """The official metrics over a test set, and per class (or set); how far each point is from where it
    should be, (n, T) [% of the picture's width]. Each sample has noise of its own."""
    rows, away, classes, shape = [], [], {}, (1, model.cfg.horizon, model.cfg.action_dim)
    for i in tqdm(range(len(dataset)), desc=form):
        sample, noise = dataset[i], torch.randn(shape, generator=keyed_generator(0, i))
        h, w, _ = pick_frames(sample, model.cfg)[-1].shape
        points = model.act([sample], noise=noise)[0][0]
        truth = sample["waypoints"][:len(points)]              # the first, where one is predicted
        rows.append(metrics(points, truth, (w, h), form == "maniskill" and len(points) > 1, bf16))
        away.append(100 * np.hypot(*((points - truth) * [1, h / w]).T))                # (T,)
        classes.setdefault(sample.get("class", sample["dataset"]), []).append(rows[-1][1])
    found = dict(zip(("mse", "mae", "mae_first"), np.mean(rows, 0).tolist()))
    by_class = {name: float(np.mean(maes)) for name, maes in sorted(classes.items())}
    return {**found, "samples": len(rows), "per_class_mae": by_class}, np.array(away)


def tabletop_test(model, spec):
    """Scenes that no training has seen, as the evaluation lays them out, with the way that an undisturbed
    expert goes: a list of samples. (Of a data set's episodes most begin disturbed, and are bumped later: no
    model could foresee that.)"""
    data, sim = map(importlib.import_module, ("data", "eval_sim"))
    sets, scenes = data.tabletop_sets(spec), []
    if [body for body, _ in sets] != ["gripper"]:
        raise ValueError(f"--data {spec}: --test tabletop is of tabletop, or tabletop:FAMILY,FAMILY.")
    families = sets[0][1] or sim.DEFAULT_FAMILIES
    for seed in sim.seeds("eval", SCENES):
        episode = sim.record_episode(seed, families, "eval", model.cfg.views,
                                     model.cfg.image_size, clean=True)
        seen = {"images": {view: frames[0] for view, frames in episode["images"].items()},
                "instruction": episode["instruction"]}
        scenes.append({**Policy(model).ask(seen), "waypoints": episode["waypoints"][0],
                       "dataset": data.NAME, "class": episode["family"]})
    return scenes


def show_errors(away, file):
    """Print how far points were away, (n, T) [% of the width], and draw it into `file` if one is given."""
    columns = {"contact": away[:, 0], **{f"point {i}": away[:, i] for i in range(1, away.shape[1])}}
    columns |= {"path": away[:, 1:].mean(1)} if away.shape[1] > 1 else {}
    picture = Image.new("RGB", (70 * len(columns) + 20, 260), "white")
    pen, scale = ImageDraw.Draw(picture), 190 / max(1e-6, *(np.quantile(c, 0.9) for c in columns.values()))
    pen.text((10, 5), f"error [% of the picture's width], {len(away)} samples: mean, quartiles", "black")
    print("% of the width    mean  median  9 in 10 below")
    for i, (name, column) in enumerate(columns.items()):
        low, middle, high, most = np.quantile(column, (0.25, 0.5, 0.75, 0.9))
        print(f"{name:14} {column.mean():7.2f} {middle:7.2f} {most:14.2f}")
        x, top = 70 * i + 20, 230 - scale * column.mean()
        pen.rectangle((x, top, x + 40, 230), "lightgrey")
        pen.line((x + 20, 230 - scale * high, x + 20, 230 - scale * low), "black", 2)
        pen.text((x, 235), name, "black")
        pen.text((x, 217), f"{column.mean():.2f}", "black")
    if file:
        picture.save(file)


def show(model, file, instruction):
    """Predict for one picture; draws contact and path into <stem>_points.png, pixels go to <stem>.json."""
    picture = Image.open(file).convert("RGB")
    target, drawn = file.with_suffix(".json"), file.with_name(f"{file.stem}_points.png")
    if target.exists() and read_json(target).get("method") != "a0":
        raise ValueError(f"{target} is there already, and not ours; move it away, or rename the picture.")
    seen = {"images": {model.cfg.views[0]: np.array(picture)}, "instruction": instruction}
    pixels = model.act([seen])[1]["pixels"][0]                 # (T, 2)
    pen, r = ImageDraw.Draw(picture), max(picture.size) / 80
    pen.line(pixels.ravel().tolist(), (0, 255, 0), max(2, int(r / 3)))
    for i, xy in enumerate(pixels):                            # the contact is the large red dot
        pen.ellipse([*(xy - r / (1 + i)), *(xy + r / (1 + i))], (0, 255, 0) if i else (255, 0, 0))
    picture.save(drawn)
    write_json(target, {"method": "a0", **seen, "images": str(file), "pixels": pixels.tolist()})
    print(f"pixels (x, y): {np.round(pixels, 1).tolist()}\nwrote {drawn} and {target}")


def demo():
    """Overfit two synthetic samples with the tiny preset (seconds on one core), then act on them."""
    torch.set_num_threads(1)                                   # matrices this small gain nothing from more
    cfg, samples = PRESETS["tiny"], []
    for colour, rgb, x in (("red", (255, 0, 0), 24), ("green", (0, 160, 0), 72)):
        image = np.full((96, 96, 3), 220, np.uint8)
        image[40:56, x - 8:x + 8] = rgb
        samples.append({"images": {"third": image}, "instruction": f"pick up the {colour} cube",
                        "waypoints": np.linspace((x / 96, 0.5), (0.5, 0.2), cfg.horizon)})
    model = Model(cfg, load_tokenizer(cfg))
    batch = collate([prepare(s, cfg, model.tokenizer) for s in samples], cfg)
    optimizer = torch.optim.AdamW(model.param_groups(1e-3, 0.0))
    for step in range(61):
        loss, log = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:3d} | loss {log['loss']:.5f}", flush=True)
    for sample, points in zip(samples, model.eval().act(samples)[0]):
        both = np.hstack([sample["waypoints"], points]).round(2)                       # (T, 4)
        print(f"{sample['instruction']}: wanted (x, y), predicted (x, y)\n{both}")


def main():
    """The command line: the demo, points in one picture, or the official metrics."""
    p = Parser("A0: tiny demo, points in one picture, or the official metrics.")
    p.add_argument("--image", type=Path, help="a picture: draws NAME_points.png, writes NAME.json beside it")
    p.add_argument("--instruction", help="with --image: what to do, in words")
    p.add_argument("--test", choices=tuple(TESTS), help=f"a test set; tabletop: {SCENES} unseen scenes")
    p.add_argument("--data", help="with --test: the folder of that dataset, or tabletop:pick,put (families)")
    p.add_argument("--plot", type=Path, help="with --test: draw the error of each point into this PNG")
    p.add_argument("--bf16-pixels", action="store_true", help="with --test: pixels in bf16, as officially")
    p.add_argument("--first-frame", action="store_true", help="with --test: the reference is the segment's "
                   "first frame, as officially in training; else the frame before, as in tests")
    p.add_argument("--pad", choices=("center", "topleft"), help="where a picture lies: officially "
                   "topleft in training, center in tests; default: as saved")
    p.add_argument("--ckpt", default="JianZhangAI/A0-1B", help="checkpoint folder, file, or hub id")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    a = p.parse_args()
    given = {name for name, value in vars(a).items() if value} - {"ckpt", "device"}
    takes = {"image", "instruction", "pad"} if a.image else {"test", "data", "plot"} if a.test else set()
    if a.test and TESTS[a.test]:
        takes |= {"bf16_pixels", "pad", *["first_frame"] * (a.test != "hoi4d_frame")}
    if given - takes or (a.image and not a.instruction) or (a.test and TESTS[a.test] and not a.data):
        p.error("--image goes with --instruction, --test with --data (tabletop does without); found "
                f"{', '.join(sorted(given)) or 'nothing'}")
    if a.plot and (a.plot.suffix.lower() != ".png" or not a.plot.parent.is_dir()):
        raise ValueError(f"--plot {a.plot}: a file NAME.png in a folder that exists is wanted.")
    if a.image:
        Image.open(a.image).close()                            # before gigabytes are loaded
    torch.manual_seed(0)
    if not (a.image or a.test):
        return demo()
    model = from_pretrained(a.ckpt, device=a.device, **{"pad": a.pad} if a.pad else {})
    if a.image:
        return show(model, a.image, a.instruction)
    dataset = tabletop_test(model, a.data or "tabletop") if a.test == "tabletop" else \
        torch.utils.data.ConcatDataset([importlib.import_module("data").a0_dataset(
            form, a.data, "test", first_frame=a.first_frame) for form in TESTS[a.test]])
    if not len(dataset):
        raise ValueError(f"--data {a.data}: no test sample of {a.test}; give the unzipped A0-Dataset.")
    found, away = official_test(model, dataset, a.test, bf16=a.bf16_pixels)
    for name, value in found.items():
        print(f"{name}: {value}")
    show_errors(away, a.plot)


if __name__ == "__main__":
    cli(main)
