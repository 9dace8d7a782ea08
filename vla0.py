"""
VLA-0: a vision-language model writes the next robot actions as plain numbers. Nothing is added to it.
Paper: https://arxiv.org/abs/2510.13054    Official code: https://github.com/NVlabs/vla0

   cameras (V, h, w, 3) -> crop, tile side by side -> (224, 448, 3) -> Qwen2.5-VL's tower -> (128, 2048) -+
                                                                                                          v
   "put the bowl on the plate" -> chat text -> tokens -----------------------> Qwen2.5-VL-3B, unchanged --+
   "497 500 439 421 491 465 0 491 ..." <- one token per digit and per space, greedy, 12 of 151936 legal <-+
            |
            +--> 8 x 7 integers in 0..1000 -> chunk (B, 8, 7) in robot units, by the data's min and max

What is special: no new tokens, no head, no state input. In training, random characters of the answer are
hidden in the input (not in the target), so that a number is read off the picture, not off the digits before.
Decoding is speculative and exact, with the previous chunk as draft; the hiding may help it to be accepted.

Actions: LIBERO's dx dy dz, drx dry drz in [-1, 1] (deltas), gripper -1 open, +1 closed. Tabletop: see
eval_sim.py.

    python vla0.py                                                    # tiny demo, CPU, no download
    python vla0.py --stats dataset_stats.pkl dataset_statistics.json  # the official pickle, read safely
    torchrun --standalone --nproc_per_node=8 train.py --model vla0 --preset 3b --init ID --data ...
"""
import argparse
import functools
import io
import random
import re
import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerFast, vision_utils
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (Qwen2_5_VLTextConfig,
                                                                     Qwen2_5_VLVisionConfig)

from common import (ArrayUnpickler, ChunkEnsemble, Graphs, check_config, check_fit, check_observation,
                    choose, cli, hash64, hf_attention, keyed_generator, linear, load_config, load_weights,
                    pick_attention, pick_stats, read_json, resolve, save_folder, tiny_tokenizer, to_int8,
                    word_loss, write_json)
from common import device as pick_device

# ---- Config ---------------------------------------------------------------------------------------------

SYSTEM = ("Analyze the input image and predict robot actions for the next {H} timesteps. Each action has {D} "
          "dimensions. Output a single sequence of {HD} integers (0-{bins} each), representing the {H} "
          "timesteps sequentially. Provide only space separated numbers. Nothing else.")


@dataclass
class Config:
    """Sizes, the text's form, decoding and the recipe of one model; a preset is one of these."""
    # what goes in and out
    views: tuple = ("third", "wrist")  # cameras, in order (official: agentview, wrist)
    tile: bool = True                 # side by side in one picture; False: one picture per camera
    image_size: int = 224             # of each camera's picture after the crop [pixels]; 0: as it came
    crop: float = 0.875           # share of height and width kept: anywhere in training, else the centre
    horizon: int = 8                  # H: actions in one chunk
    action_dim: int = 7               # D
    num_bins: int = 1000              # actions become integers 0 .. num_bins, by the data's min and max
    gripper_index: int = 6            # -1: none
    gripper_open: float = -1.0        # its value when open (LIBERO: -1)
    delta: bool = True                # actions are changes, so zeros hold the pose; False: absolute targets
    state_dim: int = 0                # S: length of a state that comes along; checked, never read; 0: any
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
    system: str = SYSTEM              # "": no system turn
    vision_id: bool = False           # write "Picture 1: " before a picture; see from_pretrained
    digit_id: int = 15                # "0"; the other nine follow
    space_id: int = 220
    newline_id: int = 198
    mask_id: int = 30                 # "?", stands for a hidden character
    pad_id: int = 151643
    im_start_id: int = 151644
    im_end_id: int = 151645           # ends the answer
    vision_start_id: int = 151652
    vision_end_id: int = 151653
    image_id: int = 151655
    tokenizer: str = "Qwen/Qwen2.5-VL-3B-Instruct"   # "tiny", a folder or file, or a hub id
    # acting
    execute: int = 1                  # actions played per chunk
    ensemble: str = "1"           # of overlapping chunks: official "1", "2"; community "integer"; "none"
    ensemble_horizon: int = 8         # chunks averaged, the newest counts
    ensemble_weight: float = 0.5      # version 2: chunk k calls ago weighs this to the power k
    grammar: bool = True              # only well-formed chunks; False: the official mask of 12 tokens alone
    strict: bool = False              # malformed text: the official fallbacks instead of ours
    repetition_penalty: float = 1.05  # of generation_config.json (Qwen2.5-VL-Instruct ships 1.05)
    temperature: float = 0.0         # 0: greedy, as in the LIBERO evaluation; the official server: 0.1
    draft: str = "previous"           # previous (chunk) | none: no chunk as draft; the text is the same
    redraft: str = "jacobi"           # after a wrong guess: jacobi, guess this pass' words | align, keep the
    #                                   draft; both move along where a number grows or shrinks
    window: int = 0                   # tokens read per pass; 0: the whole draft; 1: symbol by symbol
    int8: bool = False                # passes of at most 32 tokens read matrices of 8 bits: other texts, and
    #                                   with them the text depends on the draft
    max_new_tokens: int = 1024        # official; a number that it cuts is dropped: parse_failed
    # data and training
    mask_max: float = 0.4             # at most this share of the answer's characters is hidden ...
    mask_none: float = 0.1            # ... and none in this share of the samples
    jitter: tuple = (0.2, 0.2, 0.2, 0.05)        # brightness, contrast, saturation, hue: half-widths
    padding: str = "repeat"           # beyond an episode's end: repeat the last action (official) | mask
    data: str = ""
    lr: float = 4e-5                  # official 5e-6 per GPU x 8 GPUs; never scaled here
    lr_schedule: str = "constant"     # constant | cosine
    warmup: int = 0                   # steps
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-10
    grad_clip: float = 0.0            # 0: off
    ema: float = 0.0
    batch: int = 8                    # samples per process
    steps: int = 24 * 34_183          # 24 "epochs", in each of which every GPU sees all the data
    init: str = ""
    seed: int = 42

    def __post_init__(self):
        ids = [name for name in vars(self) if name.endswith("_id") and name != "vision_id"]
        zero = ("image_size", "full_attention", "state_dim", "window", "warmup", "seed", *ids)
        check_config(
            vars(self), vars(Config), multiples=(("llm_width", "llm_heads", 2), ("vit_width", "vit_heads", 2),
                                                 ("llm_heads", "llm_kv_heads")),
            least={**dict.fromkeys(zero, 0), "gripper_index": -1, "gripper_open": -np.inf},
            most={"execute": "horizon", "crop": 1, "mask_max": 1, "mask_none": 1},
            below={**dict.fromkeys(ids, "vocab"), "gripper_index": "action_dim", "ema": 1, "betas": 1,
                   "full_attention": "vit_depth", "seed": 2**63},
            choices={"ensemble": ("1", "2", "integer", "none"), "draft": ("previous", "none"),
                     "redraft": ("jacobi", "align"), "padding": ("repeat", "mask"),
                     "lr_schedule": ("constant", "cosine")})
        if 2 * sum(self.mrope_section) != self.llm_width // self.llm_heads:
            raise ValueError(f"mrope_section={self.mrope_section} must sum to half a head, "
                             f"{self.llm_width // self.llm_heads // 2}.")

    @property
    def legal(self):
        """Ids of the twelve symbols an answer is made of: 0-9, space, end. Their index is a symbol."""
        return [*range(self.digit_id, self.digit_id + 10), self.space_id, self.im_end_id]

    @property
    def digits(self):
        """Digits of the largest integer."""
        return len(str(self.num_bins))


PRESETS = {
    "3b": Config(),                                            # ankgoyal/vla0-libero, by its released config
    "3b-paper": Config(lr=5e-6, batch=24, steps=64 * 273_465 // 192),     # the paper's row: 8 x 24, 64 epochs
    "tiny": Config(                                            # 1 M parameters, for two CPU cores
        views=("third",), image_size=96, crop=1.0, jitter=(0, 0, 0, 0), patch_size=12, merge_size=1,
        vit_width=64, vit_depth=4, vit_heads=2, vit_mlp=128, full_attention=(0, 1, 2, 3), llm_width=128,
        llm_depth=4, llm_heads=4, llm_kv_heads=2, llm_mlp=256, llm_init=0.06, vocab=512, rope_theta=1e4,
        mrope_section=(4, 6, 6), horizon=4, num_bins=100, gripper_open=1.0, system="", digit_id=22,
        space_id=3, newline_id=5, mask_id=37, pad_id=4, im_start_id=500, im_end_id=501, vision_start_id=502,
        vision_end_id=503, image_id=504, tokenizer="tiny", execute=3, ensemble="none", window=8,
        repetition_penalty=1.0, padding="mask", data="tabletop", lr=1e-3, lr_schedule="cosine", warmup=50,
        grad_clip=1.0, batch=32, steps=2600, init="assets/vla0_tiny_trunk.safetensors"),
}
PREDICTS = "actions"              # of a sample; see the top of common.py


def configure(cfg, **overrides):
    """`cfg` with other values; an unknown name is a ValueError with the nearest match."""
    for name in overrides:
        choose("vla0.Config has no field", name, [f.name for f in fields(Config)])
    return replace(cfg, **overrides)


# ---- Actions as text ------------------------------------------------------------------------------------

def encode_actions(actions, low, high, num_bins, strict=False):
    """Actions (..., D) in robot units -> (integers (..., D) in 0..num_bins, how many were out of range).

    The arithmetic is that of the statistics' type (official: float32); halves round to even. Out of range is
    clamped; strict=True raises, as officially. A dimension that never varies in the data becomes 0.
    """
    low, high = np.asarray(low), np.asarray(high)
    actions = np.asarray(actions, low.dtype)
    if not np.isfinite(actions).all():
        raise ValueError("the actions hold NaN or infinity; look at the data, or leave that sample out.")
    outside = int(((actions < low) | (actions > high)).sum())
    if strict and outside:
        raise ValueError(f"{outside} action values lie outside the statistics' min and max; recompute these "
                         "from your data.")
    width = np.where(high > low, high - low, np.ones_like(low))
    q = np.rint((np.clip(actions, low, high) - low) / width * low.dtype.type(num_bins))
    return np.where(high > low, q, 0).astype(np.int64), outside


def to_text(integers):
    """(T, D) integers -> "497 500 ...", time first."""
    return " ".join(map(str, np.asarray(integers).ravel().tolist()))


def decode_integers(q, low, high, num_bins):
    """Integers (..., D) -> actions in robot units, in the statistics' type; q / num_bins in float32."""
    low, high = np.asarray(low), np.asarray(high)
    return (np.asarray(q, np.float32) / np.float32(num_bins)) * (high - low) + low


def parse_strict(texts, low, high, num_bins, horizon):
    """The official parser: a batch of texts -> (B, T, D); the midpoint for ALL rows if one cannot be read.

    FAITHFUL: fewer than D numbers in a batch of one give an empty chunk (1, 0, D); numbers beyond num_bins
    are believed. Kept for published protocols. Test: test_vla0.py::test_action_text_matches
    """
    low, high, D = np.asarray(low), np.asarray(high), len(low)
    rows = [text.strip().split(" ") for text in texts]
    readable = r"\s*[+-]?\d+(_\d+)*\s*"                      # what Python's int() takes
    whole = all(re.fullmatch(readable, number) for row in rows for number in row)
    if whole and len({len(row) for row in rows}) == 1:
        q = np.array([[float(number) for number in row] for row in rows])               # (B, n)
        finite = (np.abs(q) < 1e38).all()                                               # in float32
        q = q[:, :q.shape[1] - q.shape[1] % D] if len(rows) == 1 else q
        if q.shape[1] % D == 0 and finite:
            q = q.reshape(len(rows), q.shape[1] // D, D)
            q = np.concatenate([q, np.repeat(q[:, -1:], max(0, horizon - q.shape[1]), 1)], 1)[:, :horizon]
            return decode_integers(q, low, high, num_bins)
    return np.tile((low + high) / 2, (len(rows), horizon, 1))


def parse_safe(text, num_bins, horizon, D):
    """Our parser: one text -> (integers (n, D) of n <= T steps, what was wrong with the text or "").

    Whole steps before the first flaw are kept, numbers are clamped. A flawless text: the official result.
    """
    problem, numbers = "", []
    for word in text.strip().split(" "):
        if not (word.isascii() and word.isdigit()):
            problem = f"{word!r} is no number" if word else "an empty text or a double space"
            break
        numbers.append(min(int(word[:9]), num_bins))
        if int(word[:9]) > num_bins:
            problem = f"{word} is beyond {num_bins}"
    if len(numbers) != horizon * D:
        problem = problem or f"{len(numbers)} numbers instead of {horizon * D}"
    steps = min(len(numbers) // D, horizon)
    return np.array(numbers[:steps * D], np.int64).reshape(steps, D), problem


def bounds(stats):
    """min and max (D,) of a dataset's actions: float32, unless the statistics say float64 (LeRobot's do)."""
    kind = np.dtype(stats.get("dtype", "float32"))
    return np.asarray(stats["min"], kind), np.asarray(stats["max"], kind)


# ---- Text: the chat, the hidden characters, the labels --------------------------------------------------

SPECIAL = {"<|im_start|>": "im_start_id", "<|im_end|>": "im_end_id", "<|vision_start|>": "vision_start_id",
           "<|vision_end|>": "vision_end_id", "<|image_pad|>": "image_id"}


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


def system_message(cfg):
    """The text that stands before every instruction: how many integers, of which range."""
    H, D = cfg.horizon, cfg.action_dim
    return cfg.system.format(H=H, D=D, HD=H * D, bins=cfg.num_bins)


def build_prompt(instruction, cfg, answer=None):
    """Qwen's chat template, filled in. Without an answer it ends where the model begins to write."""
    if "<|" in instruction:
        raise ValueError(f"instruction={instruction!r}: control tokens (<|...|>) are not for instructions.")
    shown = "".join(f"Picture {i}: " * cfg.vision_id + "<|vision_start|><|image_pad|><|vision_end|>"
                    for i in range(1, 2 if cfg.tile else 1 + len(cfg.views)))
    system = f"<|im_start|>system\n{system_message(cfg)}<|im_end|>\n" if cfg.system else ""
    text = f"{system}<|im_start|>user\n{shown}{instruction}<|im_end|>\n<|im_start|>assistant\n"
    return text if answer is None else f"{text}{answer}<|im_end|>\n"


@functools.lru_cache(4096)             # most of a prompt is the same in every sample
def text_ids(tokenizer, text):
    """A piece of text -> its ids, a tuple; no special tokens are added."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def encode_prompt(text, cfg, tokenizer, image_tokens):
    """Chat text -> list of ids; every picture's placeholder is repeated `image_tokens` times."""
    ids = []
    for piece in re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text):
        if piece in SPECIAL:
            ids += [getattr(cfg, SPECIAL[piece])] * (image_tokens if piece == "<|image_pad|>" else 1)
        elif piece:
            ids += text_ids(tokenizer, piece)
    return ids


def answer_ids(text, cfg):
    """One id per character: a pre-tokenizer never glues digits or spaces (X, hidden by others: mask_id)."""
    return [cfg.space_id if c == " " else cfg.mask_id if c in "X?" else cfg.digit_id + int(c) for c in text]


def hidden_characters(n, cfg, rng):
    """Positions among the n characters of an answer that are hidden from the input; rng: a random.Random.

    PAPER!=CODE: the paper says that the target's characters are masked. The code hides them in the input and
    leaves them out of the loss; all other targets are the true digits.
    Test: test_vla0.py::test_masking_matches
    """
    share = 0.0 if rng.random() < cfg.mask_none else rng.uniform(0.0, cfg.mask_max)
    return sorted(rng.sample(range(n), int(n * share)))


def label(prompt, text, cfg, rng=None, valid=None):
    """(ids, labels) of a whole conversation; labels are -100 where nothing is to be learnt.

        prompt ... assistant \\n | 4 ? 7 _ 5 0 0 ... | <|im_end|> | \\n
        -100   ...  -100    -100 | 4 -100 7 _ 5 0 0  | <|im_end|> | \\n        both of the tail are trained

    rng: hides characters (None: does not). valid (T,): steps whose numbers count in the loss.
    """
    answer, tail = answer_ids(text, cfg), [cfg.im_end_id, cfg.newline_id]
    target = [-100 if c in "X?" else i for c, i in zip(text, answer)]
    for i in hidden_characters(len(text), cfg, rng) if rng else ():
        answer[i], target[i] = cfg.mask_id, -100
    if valid is not None:
        step = np.cumsum([c == " " for c in text]) // cfg.action_dim      # a step's last space opens the next
        target = [t if valid[min(s, len(valid) - 1)] else -100 for t, s in zip(target, step)]
    return prompt + answer + tail, [-100] * len(prompt) + target + tail


# ---- Pictures -------------------------------------------------------------------------------------------

def grayscale(x):
    """(V, 3, h, w) -> (V, 1, h, w)."""
    return (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]


def blend(x, other, factor):
    """Between two pictures in [0, 1]: factor 1 is x, 0 is the other, more goes beyond x (as torchvision)."""
    return (factor * x + (1.0 - factor) * other).clamp(0, 1)


def shift_hue(x, shift):
    """Turn the hue of x (V, 3, h, w) in [0, 1] by `shift` turns, by way of HSV (as torchvision)."""
    r, g, b = x.unbind(1)                                                           # (V, h, w) each
    high, low = x.amax(1), x.amin(1)
    gray, span = high == low, high - low
    saturation = span / torch.where(gray, torch.ones_like(high), high)
    div = torch.where(gray, torch.ones_like(span), span)
    rc, gc, bc = (high - r) / div, (high - g) / div, (high - b) / div
    sector = torch.where(high == r, bc - gc, torch.where(high == g, 2.0 + rc - bc, 4.0 + gc - rc))
    hue = (torch.fmod(sector / 6.0 + 1.0, 1.0) + shift) % 1.0
    i = torch.floor(hue * 6.0)
    f, v = hue * 6.0 - i, high
    p, q, t = ((v * (1.0 - saturation * k)).clamp(0, 1) for k in (1.0, f, 1.0 - f))
    sextants = (v, q, p, p, t, v), (t, v, v, q, p, p), (p, p, t, v, v, q)           # of red, green, blue
    table = torch.stack([torch.stack(c) for c in sextants])                         # (3, 6, V, h, w)
    return table.gather(1, (i.long() % 6)[None, None].expand(3, 1, *i.shape))[:, 0].transpose(0, 1)


JITTER = (lambda x, f: blend(x, torch.zeros_like(x), f),                            # brightness
          lambda x, f: blend(x, grayscale(x).mean((1, 2, 3), keepdim=True), f),     # contrast
          lambda x, f: blend(x, grayscale(x), f),                                   # saturation
          shift_hue)


def draw_jitter(cfg, generator=None):
    """(order of the four operations, their factors); one draw for all cameras."""
    order = torch.randperm(4, generator=generator).tolist()
    middle = (1.0, 1.0, 1.0, 0.0)
    return order, [torch.empty(1).uniform_(m - w, m + w, generator=generator).item()
                   for m, w in zip(middle, cfg.jitter)]


def crop_views(images, cfg, generator=None, train=False):
    """Cameras' pictures, uint8 (h, w, 3) each -> (V, 3, s, s) in 0..255 (image_size 0: h x w), float32 if
    one of them had to be resized, else uint8."""
    out = []
    for image in images:
        x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)          # (3, h, w)
        _, h, w = x.shape
        ch, cw = int(h * cfg.crop), int(w * cfg.crop)
        if train:                                                                  # per camera, top then left
            top, left = (int(torch.randint(0, n + 1, (1,), generator=generator)) for n in (h - ch, w - cw))
        else:
            top, left = round((h - ch) / 2), round((w - cw) / 2)
        x = x[:, top:top + ch, left:left + cw]
        size = (cfg.image_size, cfg.image_size) if cfg.image_size else (h, w)
        if tuple(x.shape[1:]) != size:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)       # else grey levels depend on how many threads share it
            x = F.interpolate(x[None].float(), size, mode="bilinear", align_corners=False)[0]
            torch.set_num_threads(threads)
        out.append(x)
    if len({x.shape for x in out}) > 1:
        raise ValueError(f"cameras of sizes {[tuple(x.shape[1:]) for x in out]}: set image_size to bring "
                         "them to one.")
    resized = any(x.is_floating_point() for x in out)
    return torch.stack([x.float() if resized else x for x in out])                  # (V, 3, s, s)


def smart_resize(h, w, factor, pixels):
    """Qwen's rule for the size a picture of h x w is brought to: multiples of `factor`, about `pixels`."""
    h2, w2 = max(factor, round(h / factor) * factor), max(factor, round(w / factor) * factor)
    if h2 * w2 != pixels:
        scale = (h * w / pixels) ** 0.5
        to = np.floor if h2 * w2 > pixels else np.ceil
        h2, w2 = (max(factor, int(to(side / scale / factor)) * factor) for side in (h, w))
    return h2, w2


def prepare_images(images, cfg, generator=None, train=False):
    """Cameras' pictures, uint8 (h, w, 3) each -> what the tower sees: uint8 (N, h, w, 3); tiled: N = 1."""
    x = crop_views(images, cfg, generator, train)                                   # (V, 3, s, s)
    if train and any(cfg.jitter):
        x = x / 255.0
        order, factors = draw_jitter(cfg, generator)
        for i in order:
            x = JITTER[i](x, factors[i])
        x = x * 255.0
    x = x.to(torch.uint8).permute(0, 2, 3, 1)                                       # truncated (V, s, s, 3)
    V, h, w, _ = x.shape
    x = x.permute(1, 0, 2, 3).reshape(1, h, V * w, 3) if cfg.tile else x            # side by side
    to = smart_resize(*x.shape[1:3], cfg.patch_size * cfg.merge_size, x.shape[1] * x.shape[2])
    if to != tuple(x.shape[1:3]):
        x = torch.from_numpy(np.stack([Image.fromarray(p.numpy()).resize(to[::-1], Image.Resampling.BICUBIC)
                                       for p in x]))
    return x.contiguous()


# mean and standard deviation of R, G, B
PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def patchify(images, cfg):
    """uint8 (N, h, w, 3) -> (patches (N P, 3 * 2 * patch^2) float32, grid (N, 3): frames, rows, columns).

    Patches come in merge_size x merge_size blocks; a patch's values by channel, frame, row, column.
    """
    N, h, w, _ = images.shape
    p, m = cfg.patch_size, cfg.merge_size
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in PIXELS)
    x = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std                     # (N, 3, h, w)
    x = x.view(N, 3, h // p // m, m, p, w // p // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    #   N, rows, columns, row in block, column in block, 3, y, x
    x = x.unsqueeze(6).expand(*x.shape[:6], cfg.temporal_patch_size, p, p)          # equal frames
    grid = torch.tensor([[1, h // p, w // p]] * N)                                  # (the host reads it)
    return x.reshape(N * (h // p) * (w // p), -1), grid


def rope_positions(ids, cfg, grid):
    """M-RoPE positions of a token row: ((3, L) int64: time, row, column; later tokens' position - index).

        text   | picture of rows x columns        | text
        0 1 2  | 3 3 3 ...  3+row ...  3+column   | 3 + max(rows, columns) ...
    """
    return positions_of(bytes(i == cfg.image_id for i in ids), *grid)


@functools.lru_cache(1024)             # the same in most samples
def positions_of(seen, rows, columns):
    """rope_positions of a row where `seen` is 1 for the tokens of pictures, else 0."""
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    picture = torch.stack([torch.zeros_like(r), r, c]).flatten(1)                   # (3, rows * columns)
    parts, here, i = [], 0, 0
    while i < len(seen):
        if seen[i]:
            parts.append(picture + here)
            here, i = here + max(rows, columns), i + rows * columns
        else:
            n = (seen.find(1, i) if 1 in seen[i:] else len(seen)) - i
            parts.append((here + torch.arange(n)).expand(3, n))
            here, i = here + n, i + n
    return torch.cat(parts, 1), here - len(seen)


def prepare(sample, cfg, tokenizer, stats=None, key=None, train=False):
    """One sample (or observation) -> a dict of CPU tensors; runs in loader workers, knows no weights.

    images (N, h, w, 3) uint8, ids (L,), positions (3, L), delta (); with actions (or `action_text`: numbers
    as they stand in a community manifest, digits hidden as X) also labels (L,) and clamped (): how many
    numbers were out of the statistics' range. key: an int that fixes crop, colours, hidden characters.
    """
    check_observation(sample, cfg.views, cfg.state_dim)
    given = sample["images"]
    images = [given[v] for v in cfg.views] if cfg.views[0] in given else list(given.values())
    random_key = int(torch.randint(2**62, ())) if key is None and train else key or 0
    images = prepare_images(images, cfg, keyed_generator(random_key, 1), train)     # (N, h, w, 3)
    grid = [side // cfg.patch_size // cfg.merge_size for side in images.shape[1:3]]
    prompt = encode_prompt(build_prompt(sample["instruction"], cfg), cfg, tokenizer, grid[0] * grid[1])
    ids, labels, clamped = prompt, None, 0
    if "actions" in sample or "action_text" in sample:
        text, valid = sample.get("action_text"), None
        if text is None:
            actions = np.asarray(sample["actions"])
            if actions.shape != (cfg.horizon, cfg.action_dim):
                raise ValueError(f"actions: (horizon, action_dim) = {(cfg.horizon, cfg.action_dim)} is "
                                 f"expected, found {actions.shape}. Set these two, or fix the data.")
            low, high = bounds(pick_stats(stats, sample.get("dataset")))
            q, clamped = encode_actions(actions, low, high, cfg.num_bins)
            text = to_text(q)
            if cfg.padding == "mask" and "loss_mask" in sample:
                valid = np.asarray(sample["loss_mask"], bool)                       # (T,)
        elif max([int(number) for number in re.findall("[0-9]+", text)], default=0) > cfg.num_bins:
            raise ValueError(f"the manifest's numbers go beyond num_bins={cfg.num_bins}: set num_bins to "
                             "what it was made with.")
        rng = random.Random(hash64(random_key, 2)) if train else None
        ids, labels = label(prompt, text, cfg, rng, valid)
    positions, delta = rope_positions(ids, cfg, grid)
    out = {"images": images, "ids": torch.tensor(ids), "positions": positions, "delta": torch.tensor(delta)}
    if labels is not None:
        out |= {"labels": torch.tensor(labels), "clamped": torch.tensor(clamped)}
    if key is not None:
        out["key"] = torch.tensor(key)
    return out


def collate(prepared, cfg):
    """List of prepared samples -> batch. Rows are padded on the right, where a causal model never looks from.

    images (B, N, h, w, 3), ids (B, L), positions (B, 3, L), delta (B,), length (B,); with labels also rows
    (n,) and targets (n,): where in the flattened (B L) rows the n supervised tokens are predicted, and which.
    """
    L = max(len(p["ids"]) for p in prepared)

    def padded(name, value=0):
        return torch.stack([F.pad(p[name], (0, L - len(p["ids"])), value=value) for p in prepared])

    batch = {name: torch.stack([p[name] for p in prepared]) for name in ("images", "delta", "clamped", "key")
             if name in prepared[0]}
    batch |= {"length": torch.tensor([len(p["ids"]) for p in prepared]), "ids": padded("ids", cfg.pad_id),
              "positions": padded("positions")}
    if "labels" in prepared[0]:
        labels = padded("labels", -100)                                             # (B, L)
        b, j = (labels != -100).nonzero(as_tuple=True)
        batch["rows"], batch["targets"] = b * L + j - 1, labels[b, j]
    return batch


def weigh(batch):
    """Of how many supervised tokens loss(batch) is the mean."""
    return len(batch["targets"])


# ---- Decoding: the same weights over a cache of fixed size ----------------------------------------------

SPACE, END = 10, 11                   # symbols; 0-9 are the digits (Config.legal has their ids)
SYMBOLS = "0123456789 "


def rms_norm(x, weight, eps=1e-6):
    """Qwen's: normalized in float32 (or wider), cast back, then weighed."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * F.rms_norm(h, h.shape[-1:], None, eps).to(x.dtype)


def effective(module):
    """A Linear's weight; of one that carries adapters (--lora), with these added in."""
    if not hasattr(module, "get_delta_weight"):
        return module.weight
    return module.base_layer.weight + sum(module.get_delta_weight(a) for a in module.active_adapters)


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
    """B answers being written at once.

        text    _ | 4 9 7 _ 5 0 0 _ 4 3 9 _ 4 2 ...       symbols; a space in front, for a "before"
                  | committed: `count` | draft            slot of text[j] in the cache: prompt length + j - 1

    One pass reads the last committed symbol and `window` - 1 of the draft behind it, all at their places.
    Where the draft is what the model says given all before it, it is committed; at the first place where it
    is not, the model's word is. By induction the text is that of symbol-by-symbol decoding, for any draft: a
    draft can only save passes, and every pass commits at least one symbol. Everything stays on the device.
    """

    STATE = ("text", "count", "passes", "done", "length", "delta", "seen", "cache", "gumbel")

    def __init__(self, cfg, reader, batch, rows, drafts, seed=None, looks=None, graphs=Graphs()):
        """rows (B, L, D): the prompts' embeddings; drafts: a list of B texts, or None for a row without;
        looks: passes per look at the device (None: what is fastest); graphs: common.Graphs."""
        self.cfg, self.reader, self.length, self.delta = cfg, reader, batch["length"], batch["delta"]
        device, (B, L, _) = rows.device, rows.shape
        whole = cfg.horizon * cfg.action_dim * (cfg.digits + 1)
        self.limit = min(cfg.max_new_tokens, whole) if cfg.grammar else cfg.max_new_tokens
        longest = min(self.limit, max([len(d) for d in drafts if d], default=0))
        self.window = cfg.window or (longest + cfg.digits if longest else 1 + cfg.grammar)
        if graphs.capture and self.window > 2 and not cfg.window:      # drafts of all lengths in few shapes
            self.window = -(-self.window // 32) * 32
        self.looks = looks or (1 if self.window > 2 or device.type == "cpu" else 16)
        size = 1 + self.limit + self.window
        text = torch.full((B, size), SPACE)
        for row, draft in zip(text, drafts):
            symbols = [SYMBOLS.find(c) % 12 for c in draft or ""] + [END] * bool(draft)    # unknown: END
            row[1:1 + len(symbols)] = torch.tensor(symbols[:size - 1], dtype=torch.long)
        self.text = text.to(device)
        self.spots = torch.arange(size, device=device)
        self.count = torch.zeros(B, dtype=torch.long, device=device)
        self.passes, self.done = self.count.clone(), self.count.bool()
        self.seen = (batch["ids"][..., None] == reader.legal).any(1)                # (B, 12) in the prompt
        self.gumbel = None
        if cfg.temperature > 0:          # one vector per place, drawn beforehand: the same text for any draft
            g = keyed_generator(int(torch.randint(2**62, ())) if seed is None else seed)
            u = torch.rand(size, B, 12, generator=g).transpose(0, 1)     # for any size: first places first
            self.gumbel = -torch.log(-torch.log(u.clamp(1e-20, 1 - 1e-7))).to(device)
        self.cache = reader.new_cache(B, L + size)
        slots = torch.arange(L, device=device).expand(B, L)
        hidden = reader(rows, batch["positions"].transpose(0, 1), slots, self.cache)             # (B, L, D)
        last = hidden[torch.arange(B, device=device), self.length - 1][:, None]                  # (B, 1, D)
        self.commit(self.choose(reader.logits(last)))
        self.graphs, self.made = graphs, None
        if graphs.capture and reader.alias:                    # (a copy of the weights is of one call)
            names = [name for name in self.STATE if getattr(self, name) is not None]
            fixed, self.made = graphs.settle((id(reader), reader.version, repr(cfg)),
                                             [getattr(self, name) for name in names])
            vars(self).update(zip(names, fixed))

    def go(self, window):
        """One pass, from its CUDA graph if there are any."""
        if self.made is None:
            return self.read(window)
        self.graphs.run(self.made, window, lambda: self.read(window))

    def read(self, window):
        """One pass over `window` symbols of every row."""
        self.passes += ~self.done
        at = self.count[:, None] + self.spots[:window]                              # (B, K) in text
        slots = self.length[:, None] + at - 1
        positions = (slots + self.delta[:, None]).expand(3, -1, -1)               # text: the same on all axes
        x = self.reader.embedding[self.reader.legal[self.text.gather(1, at)]]       # (B, K, D)
        self.commit(self.choose(self.reader.logits(self.reader(x, positions, slots, self.cache))))

    def choose(self, logits):
        """Logits (B, K, 12) of the symbols count, count + 1, ... -> the model's word there, (B, K)."""
        cfg, K = self.cfg, logits.shape[1]
        before = self.count[:, None] + self.spots[:K]                               # where each prefix ends
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if cfg.repetition_penalty != 1.0:                                       # each place by its own prefix
            said = F.one_hot(self.text, 12)
            said[:, 0] = self.seen
            said = said.cumsum(1).gather(1, before[..., None].expand(-1, -1, 12)) > 0
            p = cfg.repetition_penalty
            logits = torch.where(said, torch.where(logits > 0, logits / p, logits * p), logits)
        if cfg.grammar:
            logits = logits.masked_fill(~self.allowed(before), float("-inf"))
        if self.gumbel is not None:
            g = self.gumbel.gather(1, before[..., None].expand(-1, -1, 12))
            logits = logits / cfg.temperature + g
        return logits.argmax(-1)

    def allowed(self, before):
        """(B, K, 12) bool: what may follow text[: before + 1]. Integers 0..num_bins without leading zeros,
        single spaces, exactly horizon x action_dim numbers, then the end."""
        cfg, ends = self.cfg, self.text >= SPACE                                    # (B, size)
        number = ends.cumsum(1).gather(1, before) - 1                               # of the one being written
        start = torch.where(ends, self.spots, 0).cummax(1).values.gather(1, before)
        written = before - start                                                    # its digits so far
        value = torch.zeros_like(before)
        for i in range(cfg.digits):
            digit = self.text.gather(1, (before - i).clamp(min=0))
            value += torch.where(i < written, digit * 10 ** i, 0)
        grown = value[..., None] * 10 + torch.arange(10, device=value.device)     # (B, K, 10)
        fresh = (written == 0)[..., None]
        digits = (grown <= cfg.num_bins) & (fresh | (value > 0)[..., None])
        digits &= (written < cfg.digits)[..., None]
        last = (number >= cfg.horizon * cfg.action_dim - 1)[..., None]
        return torch.cat([digits, ~fresh & ~last, ~fresh & last], -1)

    def commit(self, said):
        """Accept the draft as far as the model agrees (said: (B, K)), and its correction; guess the rest."""
        K, k = said.shape[1], self.spots[:said.shape[1]]
        at = self.count[:, None] + 1 + k                                            # (B, K) in text
        draft = self.text.gather(1, at)
        n = ((said == draft).cumprod(1).sum(1) + 1).clamp(max=K)                    # (B,) committed now
        end = torch.where(said == END, k, K).amin(1)                                # the first end
        n = torch.where(self.done, 0, torch.minimum(n, end + 1).minimum(self.limit - self.count))
        fresh = (k < n[:, None]) | (self.cfg.redraft == "jacobi")
        new = self.text.scatter(1, at, torch.where(fresh & ~self.done[:, None], said, draft))
        self.text.copy_(self.align(self.text, new))            # in place, as all that a graph changes
        self.done |= (end < n) | (self.count + n >= self.limit)
        self.count += n

    def align(self, old, new):
        """A number of `new` that ends before that of `old` takes the rest of it away; one that goes on gets a
        place more. What stands behind moves along. old, new: (B, size) symbols, place by place."""
        ended, longer = ((a >= SPACE) & (b < SPACE) for a, b in ((new, old), (old, new)))
        first = F.pad(torch.where(old >= SPACE, self.spots, -1).cummax(1).values, (1, -1), value=-1) + 1
        gone = F.pad(torch.where(ended, self.spots, -1).cummax(1).values, (1, -1), value=-1) >= first
        length = torch.where(gone, 0, 1 + longer.long())
        to = length.cumsum(1) - length                                              # (B, size)
        size = len(self.spots)
        out = torch.full_like(F.pad(old, (0, 1)), SPACE)                            # one more, for what goes
        out.scatter_(1, torch.where(longer & ~gone, to + 1, size).clamp(max=size), old)
        out.scatter_(1, torch.where(gone, size, to).clamp(max=size), new)
        return out[:, :size]

    def __iter__(self):
        """Write to the end; yields after every look at the device: once per pass when speculating."""
        while True:
            yield self
            left = torch.where(self.done, self.limit, self.count).amin()
            done, first = (int(x) for x in torch.stack([self.done.all().long(), left]).tolist())
            if done:
                return
            window = self.window
            if window > 32:                                                      # few shapes: multiples of 32
                window = min(window, max(32, -(-(window - first) // 32) * 32))
            for _ in range(self.looks):
                self.go(window)

    def texts(self, whole=False):
        """What is committed, as B strings without the end. whole: without a number that may have gone on."""
        rows = [row[:n] for row, n in zip(self.text[:, 1:].tolist(), self.count.tolist())]
        texts = ["".join(SYMBOLS[s] for s in row if s != END) for row in rows]
        return [t[:t.rfind(" ") + 1] if whole and END not in row else t for row, t in zip(rows, texts)]


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
    """VLA-0: Qwen2.5-VL's two parts, `visual` and `model`, under the names they have in checkpoint files.

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
        """The token rows (B, L, D) with the pictures in their places. Needs images and ids of the batch."""
        images, ids = batch["images"], batch["ids"]
        patches, grid = patchify(images.flatten(0, 1), self.cfg)
        seen = self.look(patches, grid)                                                    # (B N P, D)
        #  system ... user \n <|vision_start|> | pictures | <|vision_end|> instruction ... \n | 4 9 7 ...
        rows = self.model.embed_tokens(ids)                                         # (B, L, D)
        return rows.masked_scatter((ids == self.cfg.image_id)[..., None], seen.to(rows.dtype))

    def forward(self, batch):
        """images (B, N, h, w, 3) uint8, ids (B, L), positions (B, 3, L) -> last hidden states (B, L, D).

        No padding mask: padding is on the right, and without a mask the causal kernels (flash too) are used.
        """
        positions = batch["positions"].transpose(0, 1)                              # (3, B, L)
        return self.model(inputs_embeds=self.embed(batch), position_ids=positions, attention_mask=None,
                          use_cache=False).last_hidden_state

    def loss(self, batch):
        """Mean cross-entropy over the supervised tokens of the batch. Returns (scalar, to log).

        Over processes, each token weighs the same (`weigh`); officially each process does: --official-mean.
        """
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
        finally:                                               # also when a stream is broken off
            if sharded or adapters:                            # its weights were copies
                self.reader = None
            for m in sharded:
                m.reshard()

    def write(self, observations, cfg, seed=None, looks=None):
        """Yield a Writer for these observations, again and again as it gets on; see act."""
        turns = self.turns(observations, cfg, seed, looks)
        turn = torch.autocast(self.device.type, enabled=False)(lambda: next(turns, None))
        yield from iter(turn, None)                            # autocast is on again in the caller's turn

    @torch.no_grad()                   # as a decorator, it is off again whenever the caller has its turn
    def turns(self, observations, cfg, seed, looks):
        """Yield the Writer after every `looks` passes, as `act` reads it; see there for the rest."""
        self.tokenizer = self.tokenizer or load_tokenizer(cfg)
        keep = ("images", "instruction", "state")
        seen = [{name: o[name] for name in keep if name in o} for o in observations]
        batch = collate([prepare(o, cfg, self.tokenizer) for o in seen], cfg)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        drafts = [o.get("draft") if cfg.draft == "previous" else None for o in observations]
        rows = self.embed(batch)                                                    # (B, L, D)
        graphs = self.graphs if looks is None else Graphs()    # a stream's memory is its own
        with self.reading(cfg.int8) as reader:
            yield from Writer(cfg, reader, batch, rows, drafts, seed, looks, graphs)

    def act(self, observations, unnorm_key=None, seed=None, **how):
        """A list of raw observations -> (chunks (B, T, D) float32 in robot units, info).

        An observation may carry `draft` (a text to speculate with) and `last_action`, see Policy.ask. seed:
        of the draws when temperature > 0. how: other Config values for this call (grammar, draft, window).
        info: texts; tokens, passes after prefill, parse_failed (B,); problems: what was wrong with each text
        ("": nothing); actions (B, T, D) float64. A text of which nothing can be used holds the pose.
        """
        if not observations:
            raise ValueError("act() needs at least one observation.")
        cfg = configure(self.cfg, **how) if how else self.cfg
        low, high = bounds(pick_stats(self.stats, unnorm_key))
        for writer in self.write(observations, cfg, seed):
            pass
        texts = writer.texts()
        info = {"texts": texts, "tokens": writer.count.cpu().numpy(), "passes": writer.passes.cpu().numpy()}
        actions, problems = [], []
        for text, observation in zip(writer.texts(whole=True), observations):
            q, problem = parse_safe(text, cfg.num_bins, cfg.horizon, cfg.action_dim)
            problems.append(problem)
            if not cfg.strict:                                 # the last whole step fills the chunk
                rows = [*decode_integers(q, low, high, cfg.num_bins)] or [hold_pose(cfg, observation)]
                actions.append(rows + rows[-1:] * (cfg.horizon - len(rows)))
        if cfg.strict:
            actions = parse_strict(texts, low, high, cfg.num_bins, cfg.horizon)
        actions = np.asarray(actions, np.float64)                                   # (B, T, D)
        failed = np.array([bool(p) for p in problems])
        info |= {"parse_failed": failed, "problems": problems, "actions": actions}
        return actions.astype(np.float32), info

    def stream(self, observation, unnorm_key=None, seed=None, **how):
        """Yield (t, action (D,) float64) of one observation, each step once, as soon as its numbers stand.

        It ends at the first flaw in the text, and returns what that is ("": nothing).
        """
        cfg, given = configure(self.cfg, **how) if how else self.cfg, 0
        if cfg.strict:
            raise ValueError("stream() cannot be strict, the official parser needs a whole text: use act().")
        low, high = bounds(pick_stats(self.stats, unnorm_key))
        for writer in self.write([observation], cfg, seed, looks=1):
            text = writer.texts(whole=True)[0]
            q, problem = parse_safe(text, cfg.num_bins, cfg.horizon, cfg.action_dim)
            for action in decode_integers(q[given:], low, high, cfg.num_bins):
                yield given, np.asarray(action, np.float64)
                given += 1
            if text.strip().count(" ") // cfg.action_dim > len(q):                  # no step can follow
                break
        return problem

    def blocks(self):
        """The modules to shard, checkpoint or compile one by one, in order of use."""
        return [*self.visual.blocks, *self.model.layers]

    def param_groups(self, lr, weight_decay):
        """For the optimizer: everything trains, the vision tower too; weight decay (1e-10) on all."""
        train = [p for p in self.parameters() if p.requires_grad]
        return [{"params": train, "lr": lr, "weight_decay": weight_decay}]

    def save_pretrained(self, folder, card=None, state=None):
        """Write our checkpoint folder. card: more lines for README.md {name: text}; state: other weights."""
        lines = {"method": "VLA-0 (https://arxiv.org/abs/2510.13054)", "preset": self.preset, **self.origin,
                 "datasets": ", ".join(self.stats) or "none", **(card or {})}
        text = "# VLA-0\n\n" + "".join(f"- {name}: {value}\n" for name, value in lines.items())
        if self.cfg.tokenizer != "tiny" and self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        save_folder(folder, "vla0", self.preset, asdict(self.cfg), state or self.state_dict(), self.stats,
                    text, self.origin)


# ---- Acting on a robot ----------------------------------------------------------------------------------

# LIBERO as the official evaluation plays it (20 Hz): physics settles for 10 steps that count for nothing,
# frames are turned by 180 degrees, the gripper command is a sign; limits are policy steps.
LIBERO = {"wait_steps": 10, "dummy_action": (0.0,) * 6 + (-1.0,), "seed": 7, "image_size": 256,
          "max_steps": {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520,
                        "libero_90": 400}}


def libero_state(position, quaternion, fingers):
    """LIBERO's state (8,) float32: the hand's place, its turn (from x, y, z, w) as axis x angle, two fingers.

    It is in the data; VLA-0 does not read it.
    """
    x = np.clip(np.asarray(quaternion, np.float64), -1, 1)
    sine = np.sqrt(1 - x[3] ** 2)
    turn = np.zeros(3) if np.isclose(sine, 0) else x[:3] * 2 * np.arccos(x[3]) / sine
    return np.concatenate([position, turn, fingers]).astype(np.float32)


def hold_pose(cfg, observation):
    """The action (D,) that keeps the robot where it is. ValueError when that cannot be known."""
    last = observation.get("last_action")
    if not cfg.delta:
        state = observation.get("state")
        if last is None and np.shape(state) != (cfg.action_dim,):
            raise ValueError("the model's text could not be read, and of these absolute actions no pose to "
                             "hold is known: send a state of action_dim numbers, or use a Policy.")
        return np.asarray(state if last is None else last, np.float64)
    hold = np.zeros(cfg.action_dim)
    if cfg.gripper_index >= 0:
        hold[cfg.gripper_index] = cfg.gripper_open if last is None else last[cfg.gripper_index]
    return hold


def ensemble_weights(candidates, version="1", weight=0.5):
    """VLA-0's: the newest weighs 1, older ones 0.5 (version 1), weight**k (2), 1 (integer). (n, A) -> (n,).

    PAPER!=CODE: the paper describes a plain mean; the released evaluation uses version 1.
    Test: test_vla0.py::test_ensembles_match
    """
    age = np.arange(len(candidates))[::-1]                                          # oldest first
    weight = 1.0 if version == "integer" else weight
    w = np.where(age == 0, 1.0, 0.5) if version == "1" else weight ** age.astype(float)
    return w / w.sum()


def sign_gripper(action, index=6):
    """LIBERO's gripper command: what is not exactly -1 or 1 becomes 1 above zero, else -1."""
    action = np.array(action, np.float64)
    if abs(action[index]) != 1:
        action[index] = 1.0 if action[index] > 0 else -1.0
    return action


class Policy:
    """A session with one robot: chunks in, one action per control step out.

    execute: actions played per chunk (default: the config's); ensemble: of overlapping chunks, "1", "2",
    "integer" (as the community version: the mean of the integers) or "none". robot: None, or "libero": its
    wait steps, turned frames and gripper sign (from Python only: eval_sim.py and serve.py have no flag for
    it). parse_failed: of the last chunk, which is then played as it is; set it before a step with a chunk.
    """

    def __init__(self, model, unnorm_key=None, execute=None, robot=None, ensemble=None, ensemble_horizon=None,
                 ensemble_weight=None):
        cfg, self.model, self.robot, self.unnorm_key = model.cfg, model, robot, unnorm_key
        if robot not in (None, "libero"):
            raise ValueError(f"robot={robot!r} does not exist; choose libero, or none.")
        cfg = replace(cfg, **{k: v for k, v in (("execute", execute), ("ensemble", ensemble),
                                                ("ensemble_horizon", ensemble_horizon),
                                                ("ensemble_weight", ensemble_weight)) if v is not None})
        self.cfg, self.execute = cfg, cfg.execute
        weights = functools.partial(ensemble_weights, version=cfg.ensemble, weight=cfg.ensemble_weight)
        used = cfg.ensemble != "none" and cfg.ensemble_horizon > 1
        if used and cfg.execute >= cfg.horizon:
            print(f"warning: execute={cfg.execute} plays whole chunks of {cfg.horizon}: no two overlap, so "
                  "the ensemble has nothing to average.", file=sys.stderr)
        self.ensemble = ChunkEnsemble(cfg.ensemble_horizon if used else 1, weights, cfg.execute)
        self.parse_failed = False
        self.reset()

    def reset(self, instruction=None):
        """Forget everything; call between episodes. (A new instruction does it, but for the waiting.)"""
        self.instruction, self.queue, self.chunk, self.last_action = instruction, deque(), None, None
        self.ensemble.reset()
        self.waited = 0 if self.robot == "libero" else LIBERO["wait_steps"]

    @property
    def needs_chunk(self):
        """True when the next step wants a fresh chunk."""
        return not self.queue and self.waited >= LIBERO["wait_steps"]

    def ask(self, observation):
        """The observation as model.act wants it: with the draft, the last action; LIBERO's frames turned."""
        extra = {} if self.last_action is None else {"last_action": self.last_action}
        if self.chunk is not None and observation["instruction"] == self.instruction:
            extra["draft"] = self.next_draft()
        if self.robot == "libero":
            extra["images"] = {view: image[::-1, ::-1] for view, image in observation["images"].items()}
        return {**observation, **extra}

    def limits(self):
        """(low, high, num_bins): what turns actions into integers, and back."""
        return *bounds(pick_stats(self.model.stats, self.unnorm_key)), self.cfg.num_bins

    def next_draft(self):
        """The last chunk without the steps that were played; its last step fills the rest."""
        q, _ = encode_actions(self.chunk, *self.limits())
        return to_text(np.concatenate([q[self.execute:], np.repeat(q[-1:], min(self.execute, len(q)), 0)]))

    def average(self):
        """The next `execute` actions: those of the last chunk, averaged with what earlier ones said."""
        if self.parse_failed and not self.cfg.strict:          # holding the pose is no motion to average
            self.ensemble.reset()
            return self.chunk[:self.execute]
        if self.cfg.ensemble != "integer":
            return self.ensemble.push(self.chunk)
        q = self.ensemble.push(encode_actions(self.chunk, *self.limits())[0]).round(6)     # halves are halves
        return decode_integers(np.rint(q), *self.limits()).astype(np.float64)

    def step(self, observation, chunk=None):
        """The action for now, (D,) float64. chunk: (T, D) in robot units if model.act was already asked."""
        if observation["instruction"] != self.instruction:
            waited = self.waited
            self.reset(observation["instruction"])
            self.waited = waited
        if self.waited < LIBERO["wait_steps"]:
            self.waited += 1
            return np.array(LIBERO["dummy_action"])
        if self.needs_chunk:
            if chunk is None:
                _, info = self.model.act([self.ask(observation)], self.unnorm_key)
                chunk, self.parse_failed = info["actions"][0], bool(info["parse_failed"][0])
            if not len(chunk):                                 # the official parser makes such ones
                raise ValueError("the model wrote less than one action; strict=True makes that an empty "
                                 "chunk, as officially. Without it the pose is held.")
            self.chunk = np.asarray(chunk, np.float64)                              # (T, D)
            self.queue.extend(self.average())
        self.last_action = action = self.queue.popleft()
        return sign_gripper(action, self.cfg.gripper_index) if self.robot == "libero" else action


# ---- Checkpoints: ours and the official ones ------------------------------------------------------------

LICENSE = "CC BY-NC 4.0 (VLA-0); it contains Qwen2.5-VL-3B, under the Qwen research licence"
# Names since transformers 4.52, in memory; on disk the older ones are still written.
RENAMED = {"model.language_model.": "model.", "model.visual.": "visual."}


def read_stats(path, name="libero"):
    """The official dataset_stats.pkl (or its JSON) -> our statistics {name: {"action": ...}}."""
    path = Path(path)
    try:
        loaded = read_json(path) if path.suffix == ".json" else \
            ArrayUnpickler(io.BytesIO(path.read_bytes())).load()
        of = loaded["out_ori_act"]
        values = {k: np.asarray(of[k]) for k in ("min", "max")}
    except Exception as e:                                     # a pickle can be torn in every way there is
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{path} holds no action statistics of VLA-0: {reason}") from e
    kind = str(values["min"].dtype) if path.suffix != ".json" else "float32"
    return {name: {"action": {k: v.tolist() for k, v in values.items()} | {"dtype": kind}}}


def read_official(folder):
    """A folder in Hugging Face's layout -> ({parameter name: tensor}, Config values that it states)."""
    about = read_json(folder / "config.json")
    if about.get("model_type") != "qwen2_5_vl":
        raise ValueError(f"{folder}/config.json is of a {about.get('model_type')!r} model; VLA-0 is a "
                         "qwen2_5_vl.")
    text, see = about.get("text_config", about), about["vision_config"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or about.get("rope_scaling") or {}
    if float(text.get("rms_norm_eps", 1e-6)) != 1e-6 or text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder}/config.json: rms_norm_eps={text.get('rms_norm_eps')}, hidden_act="
                         f"{text.get('hidden_act')}; Qwen2.5-VL has 1e-06 and silu, and so has this file.")
    made_by = about.get("transformers_version", "4.51")
    new = tuple(int(n) for n in re.findall(r"\d+", made_by)[:2]) >= (4, 52)
    sizes = {"llm_width": text["hidden_size"], "llm_depth": text["num_hidden_layers"],
             "llm_heads": text["num_attention_heads"], "llm_kv_heads": text["num_key_value_heads"],
             "llm_mlp": text["intermediate_size"], "vocab": text["vocab_size"],
             "rope_theta": float(rope.get("rope_theta") or text.get("rope_theta", 1e6)),
             "mrope_section": tuple(rope.get("mrope_section", (16, 24, 24))),
             "vit_width": see["hidden_size"], "vit_depth": see["depth"], "vit_heads": see["num_heads"],
             "vit_mlp": see["intermediate_size"], "patch_size": see["patch_size"],
             "merge_size": see["spatial_merge_size"], "temporal_patch_size": see["temporal_patch_size"],
             "window_size": see["window_size"], "full_attention": tuple(see["fullatt_block_indexes"]),
             "image_id": about.get("image_token_id", text.get("image_token_id", Config.image_id)),
             "vision_id": new, "repetition_penalty": 1.0}
    if (folder / "generation_config.json").is_file():
        how = read_json(folder / "generation_config.json")
        sizes["repetition_penalty"] = float(how.get("repetition_penalty", 1))
    print(f"{folder}: written by transformers {made_by}, so prompts are rendered with{'' if new else 'out'} "
          f"'Picture 1: ' (vision_id); repetition penalty {sizes['repetition_penalty']}", file=sys.stderr)
    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
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
    """Load a checkpoint: our folder, the official release (or its model_last/), Qwen2.5-VL, or a hub id.

    tokenizer: a path or hub id, or a tokenizer. dtype: "bf16" or "fp32"; None: as the file has it. overrides:
    other Config values. ValueError: not there, torn, of another method, of another size.
    """
    device, dtype = pick_device(device), str(dtype or "").removeprefix("torch.")
    dtype = {"bfloat16": "bf16", "float32": "fp32"}.get(dtype, dtype)
    if dtype not in ("", "bf16", "fp32"):
        raise ValueError(f"dtype={dtype!r} does not exist; choose bf16 or fp32.")
    folder = run = resolve(path_or_id, ["*.json", "*.safetensors", "dataset_stats.pkl", "model_last/*"])
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give the folder that it lies in.")
    if (folder / "model_last").is_dir():
        folder = folder / "model_last"
    else:
        run = folder.parent if folder.name == "model_last" else folder
    if isinstance(tokenizer, (str, Path)):
        overrides["tokenizer"] = str(tokenizer)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: a folder with config.json and model.safetensors is expected; it has no "
                         "config.json.")
    if "method" in read_json(folder / "config.json"):
        saved = load_config(folder, "vla0")
        if preset not in (None, saved["preset"]):
            raise ValueError(f"preset {preset!r} was asked for, {folder} is {saved['preset']!r}; leave it "
                             "out.")
        cfg, preset = configure(Config(), **{**saved["config"], **overrides}), saved["preset"]
        origin, state = saved["origin"], load_weights(folder / "model.safetensors")
        stats = read_json(folder / "dataset_statistics.json")
    else:
        if preset not in (None, *PRESETS):
            raise ValueError(f"preset {preset!r} does not exist; choose one of {', '.join(PRESETS)}.")
        try:
            state, sizes = read_official(folder)
        except KeyError as e:
            raise ValueError(f"{folder}: no {e} in config.json (or the weights' index); is it torn?") from e
        cfg = configure(PRESETS[preset or "3b"], **{**sizes, **overrides})
        names = ("dataset_statistics.json", "dataset_stats.json", "dataset_stats.pkl")
        found = [run / name for name in names if (run / name).is_file()]
        ours = bool(found) and found[0].name == names[0]
        stats = {} if not found else read_json(found[0]) if ours else read_stats(found[0])
        preset, origin = preset or "3b", {"started from": str(path_or_id), "license": LICENSE}
    where = "cuda" if attn == "flash" and torch.cuda.is_available() else device
    with torch.device("meta"):                                 # shapes only; the file's tensors move in below
        model = Model(cfg, attn=pick_attention(attn, where))
    check_fit(model.state_dict(), state, folder)
    model.load_state_dict(state, assign=True)
    if dtype:
        model.to({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    model.model.rotary_emb = qwen.Qwen2_5_VLRotaryEmbedding(model.model.config)    # in no file, and in every
    model.visual.rotary_pos_emb = qwen.Qwen2_5_VLVisionRotaryEmbedding(model.visual.config)   # type float32
    given = tokenizer is not None and not isinstance(tokenizer, (str, Path))
    model.tokenizer = tokenizer if given else load_tokenizer(cfg, None if tokenizer else folder)
    model.stats, model.preset, model.origin = stats, preset, origin
    return model.to(device).eval()


# ---- Demo -----------------------------------------------------------------------------------------------

def demo():
    """Overfit two synthetic samples with the tiny preset (seconds on one core), then act on them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)                                   # matrices this small gain nothing from more
    cfg, rng, start = PRESETS["tiny"], np.random.default_rng(0), time.time()
    low, high = [-0.1] * 6 + [0], [0.1] * 6 + [1]
    stats = {"synthetic": {"action": {"min": low, "max": high}}}
    samples = [{"images": {"third": np.full((96, 96, 3), rgb, np.uint8)}, "dataset": "synthetic",
                "instruction": f"pick up the {colour} cube",
                "actions": np.tile(np.append(rng.uniform(-0.1, 0.1, 6), gripper), (cfg.horizon, 1))}
               for colour, rgb, gripper in (("red", (255, 0, 0), 0), ("green", (0, 160, 0), 1))]
    model = Model(cfg, load_tokenizer(cfg), stats)
    optimizer = torch.optim.AdamW(model.param_groups(2e-3, 0.0))
    for step in range(121):
        batch = collate([prepare(s, cfg, model.tokenizer, stats, step, train=True) for s in samples], cfg)
        loss, log = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:3d} | loss {log['loss']:.3f} | {time.time() - start:.1f} s", flush=True)
    chunks, info = model.eval().act(samples)                                        # (2, T, D)
    for sample, chunk, text in zip(samples, chunks, info["texts"]):
        print(f"{sample['instruction']}: wanted {np.round(sample['actions'][0], 2)} at every step,\n"
              f"wrote {text!r}\nthat is {np.round(chunk[0], 2)} ...")


def main():
    """The command line: the demo, or --stats."""
    parser = argparse.ArgumentParser(description="VLA-0: tiny demo, or official statistics as JSON.")
    parser.add_argument("--stats", nargs=2, metavar=("PKL", "OUT"), help="write dataset_stats.pkl as JSON")
    stats = parser.parse_args().stats
    if not stats:
        return demo()
    write_json(stats[1], read_stats(stats[0]))
    print(f"wrote {stats[1]}")


if __name__ == "__main__":
    cli(main)
