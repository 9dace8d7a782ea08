"""
RoboVLMs: any vision-language model, four ways of using it, five heads: what matters in building a policy?
Paper: https://arxiv.org/abs/2412.14058    Official code: https://github.com/Robot-VLAs/RoboVLMs

   images (B, W, V, h, w, 3) -> backbone.see -> (B, W, V, P, D) ---+
                                                                   v
   "push the red cube" -> prompt -> words -->  <s> | gripper | static | text ... | ACT | </s> -> backbone.lm
                                                                                    |
   one_step      W = 1, one row         hidden state of the learned query token ACT, (B, W, D)
   interleaved   W frames in one row                                                |
   policy_head   W rows; history is     mlp | lstm | gpt | diffusion  <-------------+
                 in the head (lstm, gpt)       |
                                        arm (B, W, K, 6), gripper (B, W, K); the newest frame's chunk acts
   one_step + discrete: no ACT and no head; the 7 K words after the prompt are the chunk's bins

What is special: nothing but the switches (ADAPTERS, CELLS). Released: KosMos-2, policy_head, lstm, 16 frames,
asked at every step. A session's `memory` keeps what older frames became (policy_head: their ACT states;
interleaved: their picture tokens), so only the newest is looked at. Your own VLM: a Backbone with __init__
and `see`, its name in ADAPTERS, its sizes in BACKBONES (examples/own_vlm.py: 30 lines).

Actions: dx dy dz [m], droll dpitch dyaw [rad], deltas per control step; gripper absolute, 1 open, 0 closed
(gripper="signed", as CALVIN: +1 open, -1 closed; its deltas are in 0.02 m and 0.05 rad, cut at 1).

    python robovlms.py                                         # tiny demo, CPU, no download
    python train.py --model robovlms --set backbone=paligemma formulation=interleaved head=mlp
    python train.py --model robovlms --set config=FILE.json --init KOSMOS_FOLDER       # an official JSON
"""
import functools
import math
import re
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from torch import nn
from transformers.initialization import no_init_weights

import common
from common import (ChunkEnsemble, Graphs, UniformBins, attention, check_config, check_fit,
                    check_observation, choose, cli, exponential_weights, hf_attention, keyed_rng, lean,
                    load_config, load_weights, normalize, pick_attention, pick_stats, read_json, resolve,
                    save_folder, tiny_tokenizer, unnormalize, word_loss)
from common import device as pick_device


# ---- Config -----------------------------------------------------------------------------------------------

# Formulation -> heads that fit. policy_head: the history is in the head, so heads without one are one_step;
# discrete: upstream trains and uses only one_step alike; video (undocumented): all frames, one text, one row.
CELLS = {"one_step": ("mlp", "lstm", "gpt", "diffusion", "discrete"),
         "interleaved": ("mlp", "lstm", "gpt", "diffusion"),
         "policy_head": ("lstm", "gpt"), "video": ("mlp",)}
PARTS = ("nothing", "vision", "embeddings", "language", "resampler")           # what can be frozen
SIGLIP = dict(vit_width=1152, vit_depth=27, vit_heads=16, vit_mlp=4304)
SEVEN_B = dict(llm_width=4096, llm_depth=32, llm_heads=32, llm_kv_heads=32, llm_head_dim=128, llm_mlp=11008)
BACKBONES = {   # public sizes (UForm's ViT: not known) and official training, where not as KosMos-2's
    "kosmos": {},
    "paligemma": dict(SIGLIP, llm_width=2048, llm_depth=18, llm_heads=8, llm_kv_heads=1, llm_head_dim=256,
                      llm_mlp=16384, vocab=257216, pad_id=0, tokenizer="google/paligemma-3b-pt-224"),
    "llava": dict(SEVEN_B, image_size=336, vocab=32064, pad_id=32001, freeze=("embeddings",),
                  tokenizer="llava-hf/llava-1.5-7b-hf"),
    "qwen": dict(SEVEN_B, image_size=448, vit_width=1664, vit_depth=48, vit_mlp=8192, image_tokens=256,
                 vocab=151936, pad_id=151643, image_start_id=151857, image_end_id=151858, bos=False,
                 eos=False, freeze=("vision",), tokenizer="Qwen/Qwen-VL"),
    "moondream": dict(SIGLIP, image_size=378, llm_width=2048, llm_depth=24, llm_heads=32, llm_mlp=8192,
                      vocab=51200, pad_id=50256, resampler=True, tokenizer="vikhyatk/moondream2"),
    "uform": dict(llm_width=1024, llm_depth=24, llm_heads=16, llm_kv_heads=16, llm_mlp=2816, vocab=151936,
                  pad_id=151643, tokenizer="unum-cloud/uform-gen2-qwen-500m"),
    "flamingo": dict(llm_width=2560, llm_depth=32, llm_heads=32, llm_mlp=10240, vocab=50434, llm="neox",
                     cross_every=2, image_start_id=50433, image_end_id=50432, lr=1e-4, warmup=0,
                     grad_clip=1.0, weight_decay=0.1, freeze=("vision", "language"),
                     tokenizer="togethercomputer/RedPajama-INCITE-Base-3B-v1")}


@dataclass
class Config:
    """The matrix's cell, sizes, data and recipe of one model; a preset is one of these."""
    # the matrix
    backbone: str = "kosmos"
    formulation: str = "policy_head"
    head: str = "lstm"
    read: str = "auto"                # query: learned ACT tokens | all, text, vision: max-pooled states
    #                                   of these tokens | auto: query, but all for Flamingo
    history: int = 16                 # W: frames that go in (official: window_size)
    horizon: int = 10                 # K: actions in one chunk (official: fwd_pred_next_n)
    latent: int = 1                   # n: copies of ACT, or tokens that are left after pooling
    fill_zero: bool = False           # hide ACT from attention (mask 0), as the official switch does
    resampler: bool = False           # a perceiver makes resampler_latents tokens of each picture's tokens
    resampler_depth: int = 6
    resampler_latents: int = 64
    # what goes in and out
    views: tuple = ("third", "wrist") # cameras: static, then (optionally) the gripper's
    image_size: int = 224             # side of the square picture [pixels]; aspect ratio is not kept
    action_dim: int = 7               # A: dx dy dz, droll dpitch dyaw, and the last one is the gripper
    state_dim: int = 0                # S: length of a state that comes along; checked; 0: any
    gripper: str = "unit"             # in the data and for the robot: unit = 0/1 | signed = -1/+1; 1 is open
    norm_min: float = -0.65           # arm: clipped to this range, then scaled to [-1, 1]
    norm_max: float = 0.65
    regular: tuple = (0.0, 1.0)       # then (x - mean) / (std + 1e-6); (0, 1): off
    mu_law: int = 0                   # then sign(x) ln(1 + mu |x|) / ln(1 + mu); 0: off
    n_bin: int = 256                  # discrete: bins over [-1, 1] of each action dim
    action_base: int = 0              # discrete: ids go down from here; 0: see ActionTokens
    prompt: str = "wrapper"           # wrapper: the official evaluation's text | openx: Open-X' | plain
    # vision: CLIP ViT-L/14
    vit_width: int = 1024
    vit_depth: int = 24
    vit_heads: int = 16
    vit_mlp: int = 4096
    patch_size: int = 14
    image_tokens: int = 64            # P: latents per picture (kosmos, qwen, uform)
    # language: KosMos-2's decoder
    llm_width: int = 2048             # D
    llm_depth: int = 24
    llm_heads: int = 32
    llm_kv_heads: int = 32
    llm_head_dim: int = 64            # (only Gemma's differs from llm_width / llm_heads)
    llm_mlp: int = 8192
    llm_init: float = 0.02            # standard deviation of fresh weights
    dropout: float = 0.1              # KosMos-2's, in training
    vocab: int = 65037
    llm: str = "mpt"                  # flamingo: mpt | neox
    cross_every: int = 1              # flamingo: gated cross-attention before each n-th block
    bos: bool = True                  # does the tokenizer define <s>? then pictures go after the first token
    eos: bool = True                  # ... </s>? then ACT goes before the last token
    pad_id: int = 1
    image_start_id: int = 0           # qwen: around pictures; flamingo: <image>
    image_end_id: int = 0             # qwen: around pictures; flamingo: <|endofchunk|>
    tokenizer: str = "microsoft/kosmos-2-patch14-224"    # "tiny", a folder, or a hub id
    # action head
    width: int = 1024
    depth: int = 0                    # layers; 0: official (lstm 4, gpt 8, diffusion 12)
    heads: int = 8                    # of gpt and diffusion
    mlp_widths: tuple = (1024, 512, 256)                 # hidden layers of the arm's and the gripper's MLP
    num_train_steps: int = 100        # diffusion
    # acting
    execute: int = 1                  # actions played per chunk; with a history always 1
    ensemble_horizon: int = 1         # predictions averaged for each moment (official: 1, none)
    published_step: bool = False      # interleaved: act on the oldest frame, as the released wrapper does
    official_decode: bool = False     # discrete: a word that is no action is an extreme one, as officially
    control_hz: float = 5.0           # rate of the recorded actions [Hz]
    compute: str = "auto"             # bf16 | fp32 | auto = bf16 autocast on CUDA, in training only: released
    #                                   policies were trained with "16" and are evaluated in float32
    # data
    augment: bool = True              # random shift of training pictures
    shift: tuple = (10, 4)            # by at most this, static and gripper camera [pixels]
    traj_cons: bool = True            # shifts are drawn from 1 .. 2 pad (as officially), not from 0
    tcp_rel: bool = False             # actions are in the gripper's frame, and are turned back for the robot
    data: str = ""
    # training (official: CALVIN 5 epochs, Open-X 50,000 steps)
    gripper_weight: float = 0.01      # of the gripper's loss (arm_gripper_loss_ratio)
    freeze: tuple = ("nothing",)      # of PARTS; language: all of the VLM but vision and embeddings
    train_layers: int = 0             # of a frozen language model the last n blocks train
    lora: int = 0                     # rank of its adapters, as train.py --lora; 0: none
    lr: float = 2e-5
    head_lr: float = 0.0              # of the action head, which starts from nothing; 0: lr (official)
    lr_schedule: str = "constant"     # constant | cosine
    warmup: int = 5000                # steps (CALVIN: a quarter of an epoch)
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 0.0            # 0: none. The official trainer's 1.0 is overwritten by an absent key
    ema: float = 0.0
    batch: int = 4                    # samples per process
    steps: int = 50_000
    init: str = ""                    # weights that train.py starts from, a path beside it; "": none
    seed: int = 123

    def __post_init__(self):
        ids = ("pad_id", "image_start_id", "image_end_id")
        zero = (*ids, "state_dim", "warmup", "seed", "depth", "mu_law", "action_base", "shift",
                "train_layers", "lora")
        check_config(
            vars(self), vars(Config),
            multiples=(("image_size", "patch_size"), ("vit_width", "vit_heads"), ("llm_width", "llm_heads")),
            least={**dict.fromkeys(zero, 0), "norm_min": -math.inf, "n_bin": 2, "action_dim": 2},
            most={"execute": "horizon", "ensemble_horizon": "horizon"},
            below={**dict.fromkeys(ids, "vocab"), "ema": 1, "betas": 1, "seed": 2**63,
                   "norm_min": "norm_max"},
            choices={"backbone": tuple(BACKBONES), "formulation": tuple(CELLS), "head": CELLS["one_step"],
                     "read": ("auto", "query", "all", "text", "vision"), "gripper": ("unit", "signed"),
                     "prompt": ("wrapper", "openx", "plain"), "llm": ("mpt", "neox"),
                     "compute": ("auto", "bf16", "fp32"), "lr_schedule": ("constant", "cosine")})
        if self.backbone != "kosmos" and self.init.startswith("assets/"):
            self.init = ""                                     # the tiny trunk is KosMos-2's
        heads, flamingo = CELLS[self.formulation], self.backbone == "flamingo"
        head_width = {"gpt": self.width, "diffusion": self.llm_width}.get(self.head, 0)
        wrong = {                                              # what is wrong: is it?
            f"{self.formulation} goes with {', '.join(heads)}": self.head not in heads,
            f"history={self.history}, but one step is one frame":
                self.formulation == "one_step" and self.history > 1,
            f"execute={self.execute}, but {self.history} frames must be consecutive":
                self.execute > 1 and self.history > 1,
            "Flamingo's pictures are not in the row: one_step or policy_head, not discrete, read=all":
                flamingo and (self.formulation in ("interleaved", "video") or self.resampler
                              or self.head == "discrete" or self.reading != "all"),
            f"latent={self.latent} of a gpt head needs width = llm_width = {self.llm_width}":
                self.head == "gpt" and self.latent > 1 and self.width != self.llm_width,
            f"{head_width} is no multiple of heads={self.heads}": head_width % self.heads > 0,
            f"views={self.views}, but there are a static and a gripper camera": len(self.views) > 2,
            f"train_layers={self.train_layers}, but freeze has no language":
                self.train_layers > 0 and "language" not in self.freeze,
            f"freeze={self.freeze}, but parts are {', '.join(PARTS)}": not set(self.freeze) <= {*PARTS}}
        for text in [text for text in wrong if wrong[text]][:1]:
            name = f"backbone={self.backbone} formulation={self.formulation} head={self.head}"
            raise ValueError(f"{name}: {text}.")

    @property
    def reading(self):
        """`read`, with "auto" resolved."""
        return self.read if self.read != "auto" else "all" if self.backbone == "flamingo" else "query"

    @property
    def head_depth(self):
        """Layers of the head: `depth`, or the official number."""
        return self.depth or {"lstm": 4, "gpt": 8, "diffusion": 12}.get(self.head, 0)


PRESETS = {
    # CALVIN's A, B, C, D or A, B, C, evaluated in D; Open-X, then the WidowX' or the Google robot's data
    **dict.fromkeys(("kosmos_calvin_abcd", "kosmos_calvin_abc"), Config(gripper="signed")),
    **dict.fromkeys(("kosmos_oxe", "kosmos_bridge", "kosmos_fractal"), Config(views=("third",))),
    "paligemma_calvin": Config(backbone="paligemma", gripper="signed", **BACKBONES["paligemma"]),
    "tiny": Config(                                            # 1.4 M parameters, for two CPU cores
        views=("third",), image_size=96, patch_size=12, vit_width=96, vit_depth=4, vit_heads=3, vit_mlp=256,
        image_tokens=64, llm_width=128, llm_depth=4, llm_heads=4, llm_kv_heads=4, llm_head_dim=32,
        llm_mlp=256, llm_init=0.06, dropout=0.0, vocab=512, pad_id=4, image_start_id=509, image_end_id=510,
        n_bin=64, action_base=509, tokenizer="tiny", prompt="plain", resampler_latents=16, width=128, depth=2,
        mlp_widths=(128, 64), history=4, horizon=8, norm_min=-1.0, norm_max=1.0, augment=False,
        gripper_weight=0.05, data="tabletop", lr=3e-4, head_lr=1.5e-3, lr_schedule="cosine", warmup=50,
        grad_clip=1.0, batch=10, steps=3000,
        init="assets/robovlms_tiny_trunk.safetensors"),
}
PREDICTS = "actions"              # of a sample; see the top of common.py


def configure(cfg, **overrides):
    """`cfg` with other values; an unknown name is a ValueError with the nearest match."""
    for name in overrides:
        choose("robovlms.Config has no field", name, [f.name for f in fields(Config)])
    return replace(cfg, **overrides)


# ---- Text, pictures, actions: what goes into the model ----------------------------------------------------

def load_tokenizer(cfg, folder=None):
    """The tokenizer in a checkpoint folder, else `cfg.tokenizer`: "tiny", a folder, a hub id."""
    if cfg.tokenizer == "tiny":
        return tiny_tokenizer()
    own = folder is not None and (Path(folder) / "tokenizer.json").is_file()
    path = Path(folder) if own else resolve(cfg.tokenizer, ["*token*.json"], "--tokenizer")
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"--tokenizer {cfg.tokenizer}: a folder with tokenizer.json is needed.")
    return hf.PreTrainedTokenizerFast.from_pretrained(path)


def wrapper_prompt(backbone, instruction, eos="</s>"):
    """The text that the released training on CALVIN and every evaluation give to this backbone."""
    s = instruction.strip()
    return {"kosmos": f"<grounding>An image of a robot {s}", "paligemma": f"{eos}{s}\n",
            "flamingo": f"<image>{s}<|endofchunk|>{eos}", "llava": s, "qwen": s,
            "uform": f"<image> {s}"}.get(backbone, f"<|endoftext|>{s}")


def openx_prompt(instruction, steps, bos, eos):
    """Open-X' and all discrete texts: Phi's format for every backbone (Qwen has no specials, so the same).

    Every bos is deleted and the end stripped, so an eos that differs from bos stays as a literal.
    """
    wanted = "action" if steps == 1 else f"{steps} step actions"
    text = f"Input: What {wanted} should the robot take to {instruction}?\nOutput: \n{eos or ''}"
    return (text.replace(bos, "") if bos else text).rstrip()


def encode_prompt(instruction, cfg, tokenizer):
    """Token ids, list, as the backbone's own text function calls its tokenizer."""
    eos, discrete = tokenizer.eos_token or "", cfg.head == "discrete"
    text = instruction.strip() if cfg.prompt == "plain" else wrapper_prompt(cfg.backbone, instruction, eos)
    if discrete or cfg.prompt == "openx":
        # CALVIN's discrete prompt names K + 1 steps, Open-X' K: an off-by-one that its training has seen
        steps = cfg.horizon + (cfg.gripper == "signed" and discrete)
        text = openx_prompt(instruction.strip(), steps, tokenizer.bos_token, eos)
    if cfg.tokenizer == "tiny":       # which neither knows the markers nor ends in </s>, as KosMos-2's does
        ids = tokenizer(re.sub(r"<image>|<\|endofchunk\|>|</s>", "", text)).input_ids
        ids = [*ids, *[cfg.image_end_id] * (cfg.backbone == "flamingo"), *[tokenizer.eos_token_id] * cfg.eos]
        ids = [cfg.image_start_id, *ids] if cfg.backbone == "flamingo" else ids
    else:
        special = cfg.backbone != "paligemma" or discrete or cfg.prompt == "openx"
        ids = list(tokenizer(text, add_special_tokens=special, truncation=True, max_length=512).input_ids)
    if max(ids) >= cfg.vocab:
        raise ValueError(f"--tokenizer {cfg.tokenizer}: token {max(ids)} is beyond the model's "
                         f"vocab={cfg.vocab}; use the tokenizer it was trained with.")
    # before actions, without the end that the tokenizer has appended
    return ids[:-1] if discrete and ids[-1] == tokenizer.eos_token_id else ids


class ActionTokens:
    """Actions <-> words: id = base - bin, bins 1 .. n_bin over [low, high]: -1 is base - 1, +1 base - n_bin.

    base: vocabulary without added tokens, less the special tokens, less 10 (reserved).
    """

    def __init__(self, vocab_size, special_map, n_bin=256, low=-1.0, high=1.0, base=0):
        specials = sum(1 if isinstance(v, str) else len(v) for v in special_map.values() if v)
        self.bins, self.base = UniformBins(n_bin, low, high), base or vocab_size - specials - 10
        self.begin, self.end = self.base - n_bin - 1, self.base    # both exclusive

    @classmethod
    def of(cls, cfg, tokenizer):
        """Those of a config and its tokenizer."""
        return cls(tokenizer.vocab_size, tokenizer.special_tokens_map, cfg.n_bin, base=cfg.action_base)

    def encode(self, x):
        """Numbers in [low, high] (beyond: clipped), any shape -> ids."""
        return self.base - self.bins.encode(x)

    def decode(self, ids):
        """Ids -> the centers of their bins; what is no action becomes an extreme one."""
        return self.bins.decode(self.base - np.asarray(ids))

    def holds(self, ids):
        """Which ids are actions: bool, of the same shape."""
        return (ids > self.begin) & (ids < self.end)


def action_row(prompt, chunk, valid, tokens, eos_id, openx=False, past=(), ask=()):
    """One step's training row for the discrete head: ids and labels, (L,) int64.

        prompt ... | (past actions) | (ask ...) | K A action ids | eos
        -100                                    | ids, -100 beyond the segment's end | eos

    chunk: (K, A), gripper -1/+1; valid: (K,). openx: the eos is learned only if the chunk is complete.
    past, ask: actions (n, A) and ids between, as in Open-X' "segment" organization (of no released policy).
    """
    front = [*prompt, *tokens.encode(np.asarray(past)).reshape(-1), *ask]
    ids = tokens.encode(chunk).reshape(-1)                                           # (K A,)
    told = np.where(np.repeat(valid, chunk.shape[1]), ids, -100)
    end = -100 if openx and not np.all(valid) else eos_id
    return torch.tensor([*front, *ids, eos_id]), torch.tensor([*[-100] * len(front), *told, end])


def resize(image, size):
    """uint8 (h, w, 3) -> (size, size, 3); bicubic, no crop, ratio not kept; PIL's antialiased filter."""
    same = image.shape[:2] == (size, size)
    return image if same else np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def random_shift(image, pad, x, y):
    """(h, w, ...) -> the same: the crop at (x, y), 0 .. 2 pad, of the picture with its edges repeated."""
    h, w = image.shape[:2]
    rows, columns = np.clip(np.arange(h) + y - pad, 0, h - 1), np.clip(np.arange(w) + x - pad, 0, w - 1)
    return image[rows[:, None], columns]


def scale_arm(a, low, high):
    """Arm dims: clip to [low, high], then to [-1, 1]; the last dim stays. (..., A) -> (..., A)."""
    return np.concatenate([2 * (np.clip(a[..., :-1], low, high) - low) / (high - low) - 1, a[..., -1:]], -1)


def squash(x, regular=(0, 1), mu=0):
    """Two optional steps, see Config. (N, A) -> (N, A)."""
    # FAITHFUL: "keep the gripper" keeps the last entry along the first axis: of a (N, A) array the last row.
    # Test: test_robovlms.py::test_normalization_matches
    y = x if tuple(regular) == (0, 1) else (x - regular[0]) / (regular[1] + 1e-6)
    y = np.sign(y) * np.log1p(mu * np.abs(y)) / np.log1p(mu) if mu else y
    return np.concatenate([y[:-1], x[-1:]])


def unsquash(y, regular=(0, 1), mu=0):
    """The inverse of `squash`, with its last row too. Any shape."""
    y = np.sign(y) * ((1 + mu) ** np.abs(y) - 1) / mu if mu else y
    return y if tuple(regular) == (0, 1) else y * (regular[1] + 1e-6) + regular[0]


def gripper_label(g, kind):
    """Recorded gripper -> {0, 1}, 1 is open: floor((g + 1) / 2) if "signed", else 1 only where g is 1."""
    return np.floor((g + 1) / 2) if kind == "signed" else np.where(g == 1, 1.0, 0.0)


def normalize_actions(actions, stats, cfg):
    """(N, A) in robot units -> (N, A) float32: arm in [-1, 1], gripper 0/1."""
    if stats.get("mask", [True])[-1]:
        raise ValueError("the statistics' mask is True for the gripper, the last dim; set it to False there.")
    a = squash(scale_arm(normalize(actions, stats), cfg.norm_min, cfg.norm_max), cfg.regular, cfg.mu_law)
    a[:, -1] = gripper_label(actions[:, -1], cfg.gripper)
    return a.astype(np.float32)


def denormalize_actions(arm, is_open, stats, cfg):
    """Arm (..., A - 1) in [-1, 1], is_open (...) bool -> (..., A) float64 in robot units."""
    arm = unsquash(np.asarray(arm), cfg.regular, cfg.mu_law)
    arm = 0.5 * (arm + 1) * (cfg.norm_max - cfg.norm_min) + cfg.norm_min
    a = unnormalize(np.concatenate([arm, is_open[..., None]], -1), stats)
    a[..., -1] = np.where(is_open, 1, -1 if cfg.gripper == "signed" else 0)
    return a


def chunks_of(x, K):
    """(N, ...) -> (N - K + 1, K, ...): what each step predicts; one step on, a chunk is shifted by one."""
    return x[np.arange(len(x) - K + 1)[:, None] + np.arange(K)]


def frames_of(sample, cfg, train, key):
    """The window's pictures, oldest first: uint8 (n, V, h, w, 3), n <= W."""
    images, history = sample["images"], sample.get("history_images", {}) if cfg.history > 1 else {}
    names, rows = cfg.views if cfg.views[0] in images else list(images)[:len(cfg.views)], []
    for v, name in enumerate(names):
        row = [resize(x, cfg.image_size) for x in [*history.get(name, ()), images[name]][-cfg.history:]]
        if cfg.augment and train:
            # FAITHFUL: upstream's default, the "trajectory-consistent" shift, is drawn per frame too,
            # and from 1 .. 2 pad, not 0 .. 2 pad. Test: test_robovlms.py::test_shifts_differ_between_frames
            first = int(cfg.traj_cons)
            rng, pad = np.random.default_rng() if key is None else keyed_rng(key, 1 + v), cfg.shift[v]
            row = [random_shift(x, pad, *rng.integers(first, 2 * pad + 1, 2)) if pad else x for x in row]
        rows.append(np.stack(row))
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"history_images: {[len(row) - 1 for row in rows]} frames of {names}; give as many.")
    return np.stack(rows, 1)


def targets_of(sample, cfg, stats, n):
    """What the n frames are to predict: chunks (n, K, A) normalized, and which of it counts, (n, K) bool."""
    future, K, A = np.asarray(sample["actions"], np.float32), cfg.horizon, cfg.action_dim
    if future.shape != (K, A):
        raise ValueError(f"actions: (horizon, action_dim) = {(K, A)} is expected, found {future.shape}. Set "
                         "these two, or fix the data.")
    valid = np.asarray(sample.get("loss_mask", np.ones(K)), bool)                    # (K,)
    if valid.shape != (K,) or not valid.any():
        raise ValueError(f"loss_mask={valid.astype(int).tolist()}: {K} values, not all 0, are wanted; leave "
                         "a sample without actions out.")
    past = np.asarray(sample.get("history_actions", np.zeros((0, A))), np.float32)
    known = len(past) >= n - 1                                 # else only the newest frame is trained
    past = past[len(past) - n + 1:] if known else np.zeros((n - 1, A), np.float32)
    actions = normalize_actions(np.concatenate([past, future]), pick_stats(stats, sample.get("dataset")), cfg)
    mask = chunks_of(np.concatenate([np.ones(n - 1, bool), valid]), K)              # (n, K)
    mask[:-1] &= known
    return chunks_of(actions, K), mask


def prepare(sample, cfg, tokenizer, stats=None, key=None, train=False):
    """One sample (or observation) -> a dict of CPU tensors; runs in loader workers, knows no weights.

    images (n, V, h, w, 3) uint8, n <= W frames: sample["history_images"] and the newest; ids (L,) int64. With
    actions (and "history_actions" (n - 1, A), those of the earlier frames) also actions (n, K, A) normalized
    and loss_mask (n, K); for the discrete head instead ids with the actions in them, and labels (L,).
    key: an int that fixes all random draws made for this sample.
    """
    check_observation(sample, cfg.views, cfg.state_dim)
    images, ids = frames_of(sample, cfg, train, key), encode_prompt(sample["instruction"], cfg, tokenizer)
    out = {"images": torch.from_numpy(images), "ids": torch.tensor(ids)}
    if "actions" in sample:
        actions, mask = targets_of(sample, cfg, stats, len(images))
        if cfg.head == "discrete":
            actions[..., -1] = 2 * actions[..., -1] - 1        # words for -1 and +1
            out["ids"], out["labels"] = action_row(ids, actions[0], mask[0], ActionTokens.of(cfg, tokenizer),
                                                   tokenizer.eos_token_id, cfg.gripper != "signed")
        else:
            newest = slice(-1 if cfg.formulation == "video" else 0, None)     # video: one chunk, the newest's
            out["actions"], out["loss_mask"] = (torch.from_numpy(x[newest]) for x in (actions, mask))
    return out


def collate(prepared, cfg):
    """List of prepared samples -> batch. Everything is padded on the right; mask (B, L): True = a real token.

    Windows that lack frames (an episode's beginning) get black ones after the newest, where no causal model
    looks, and nothing is predicted.
    """
    fill = {"ids": cfg.pad_id, "labels": -100}
    batch = {name: nn.utils.rnn.pad_sequence([p[name] for p in prepared], True, fill.get(name, 0))
             for name in prepared[0]}
    length = torch.tensor([len(p["ids"]) for p in prepared])                         # (B,)
    batch["mask"] = torch.arange(batch["ids"].shape[1]) < length[:, None]            # (B, L)
    return batch


def weigh(batch):
    """Of how many actions, or with the discrete head words, loss(batch) is the mean."""
    return (batch["labels"] != -100).sum() if "labels" in batch else batch["loss_mask"].sum()


# ---- Building blocks --------------------------------------------------------------------------------------

# twin: cogact.constant
@functools.lru_cache(maxsize=256)
def constant(values, device):
    """A float32 tensor of fixed numbers, put on a device once; later calls copy and wait for nothing."""
    return torch.tensor(values, dtype=torch.float32, device=device)


# twin: cogact.normalize_pixels
def normalize_pixels(images, mean, std):
    """uint8 (N, h, w, 3) -> float32 (N, 3, h, w), on the images' device."""
    x = images.permute(0, 3, 1, 2).float() / 255                                       # (N, 3, h, w)
    mean, std = (constant(v, x.device)[:, None, None] for v in (mean, std))            # (3, 1, 1)
    return (x - mean) / std


def feed_forward(dim):
    """(..., dim) -> the same, OpenFlamingo's: no biases."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(),
                         nn.Linear(4 * dim, dim, bias=False))


class CrossAttention(nn.Module):
    """x (N, L, D) asks memory (N, M, Dv); no biases; the norms are the caller's. mask: bool (N, 1, L, M)."""

    def __init__(self, dim, dim_memory, dim_head, heads, *norms):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim_memory, 2 * dim_head * heads, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)
        for name in norms:
            self.add_module(name, nn.LayerNorm(dim))

    def forward(self, x, memory, mask=None):
        """-> (N, L, D): what x found in memory, no residual."""
        qkv = self.to_q(x), *self.to_kv(memory).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in qkv)                         # (N, ., H, K)
        return self.to_out(attention(q, k, v, mask=mask).flatten(2))                       # (N, L, D)


class PerceiverResampler(nn.Module):
    """Any number of picture tokens (N, P, D) -> (N, num_latents, D), OpenFlamingo's."""

    def __init__(self, dim, depth, num_latents, dim_head=64, heads=8):
        super().__init__()
        self.latents, self.norm = nn.Parameter(torch.randn(num_latents, dim)), nn.LayerNorm(dim)
        attn = lambda: CrossAttention(dim, dim, dim_head, heads, "norm_media", "norm_latents")  # noqa: E731
        self.layers = nn.ModuleList(nn.ModuleList([attn(), feed_forward(dim)]) for _ in range(depth))

    def forward(self, x):
        """(N, P, D) -> (N, num_latents, D)."""
        latents = self.latents.expand(len(x), -1, -1)
        for attn, ff in self.layers:
            asking = attn.norm_latents(latents)                # keys and values: media ++ latents
            latents = latents + attn(asking, torch.cat([attn.norm_media(x), asking], 1))
            latents = latents + ff(latents)
        return self.norm(latents)


class GatedCrossAttention(nn.Module):
    """Words look at media. Starts as the identity: both gates are 0."""

    def __init__(self, dim, dim_visual, dim_head=64, heads=8):
        super().__init__()
        self.attn, self.ff = CrossAttention(dim, dim_visual, dim_head, heads, "norm"), feed_forward(dim)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, media, look):
        """x (N, L, D), media (N, M, n, Dv), look (N, L, M): which words see which media -> (N, L, D)."""
        some = look.any(-1, keepdim=True)                      # a word before the first <image> sees nothing
        mask = (look | ~some).repeat_interleave(media.shape[2], -1)[:, None]               # (N, 1, L, M n)
        seen = self.attn(self.attn.norm(x), media.flatten(1, 2), mask) * some           # to_out has no bias
        x = x + seen * self.attn_gate.tanh()
        return x + self.ff(x) * self.ff_gate.tanh()


# ---- Backbones --------------------------------------------------------------------------------------------

CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)    # mean, std of RGB
HALF_PIXELS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class Backbone(nn.Module):
    """What the model needs of a VLM, given a `vision_tower` and a `language_model` of transformers.

    An adapter makes these (the language model first: train.py --lora takes the first) and has see(pixels):
    (N, 3, h, w) -> picture tokens (N, P, D), in the units of word embeddings.
    """
    pixels = CLIP_PIXELS
    tower = property(lambda self: self.vision_tower["vision_model"])
    decoder = property(lambda self: self.language_model.base_model)
    embedding = property(lambda self: self.language_model.get_input_embeddings())

    def patches(self, pixels):
        """(N, 3, h, w) -> the tower's features of the patches (N, P, vit_width); CLIP's class token leads."""
        return self.tower(pixel_values=pixels).last_hidden_state

    def words(self, ids):
        """(B, L) -> embeddings (B, L, D)."""
        return F.embedding(ids, self.embedding.weight)

    def lm(self, rows, mask=None, cache=None):
        """Rows (B, N, D), mask (B, N) -> hidden states after the final norm (B, N, D), causal."""
        return self.decoder(inputs_embeds=rows, attention_mask=mask, past_key_values=cache,
                            use_cache=cache is not None).last_hidden_state

    def logits(self, hidden):
        """(..., D) -> (..., vocab)."""
        head = getattr(self.language_model, "lm_head", None)   # taken away where it is tied to the embedding
        return F.linear(hidden, self.embedding.weight) if head is None else head(hidden)

    def layers(self):
        """The blocks, in order of use."""
        tower = self.tower.encoder
        return [*(tower.layer if hasattr(tower, "layer") else tower.layers), *self.decoder.layers]

    def parts(self):
        """The modules that cfg.freeze names."""
        return {"vision": self.vision_tower, "embeddings": self.embedding, "language": self}


def llm_sizes(cfg, attn):
    """What the configs of transformers' language models call the sizes."""
    return dict(vocab_size=cfg.vocab, hidden_size=cfg.llm_width, intermediate_size=cfg.llm_mlp,
                num_hidden_layers=cfg.llm_depth, num_attention_heads=cfg.llm_heads,
                num_key_value_heads=cfg.llm_kv_heads, max_position_embeddings=8192, pad_token_id=cfg.pad_id,
                initializer_range=cfg.llm_init, use_cache=False, attn_implementation=hf_attention(attn))


def vit_sizes(cfg, attn, **also):
    """... and those of its vision towers."""
    return dict(hidden_size=cfg.vit_width, intermediate_size=cfg.vit_mlp, num_hidden_layers=cfg.vit_depth,
                num_attention_heads=cfg.vit_heads, image_size=cfg.image_size, patch_size=cfg.patch_size,
                attn_implementation=hf_attention(attn)) | also


def vit(kind, cfg, attn, **also):
    """A native tower, kind: CLIPVision (less the final norm, for retrieval only) | SiglipVision | Dinov2."""
    tower = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**vit_sizes(cfg, attn, **also)))
    if kind == "CLIPVision":
        tower.post_layernorm = nn.Identity()
    return nn.ModuleDict({"vision_model": tower})


class Kosmos(Backbone):
    """KosMos-2: CLIP -> 64 latents; a decoder with sub-norms and sinusoidal positions."""

    def __init__(self, cfg, attn):
        super().__init__()
        attn = "sdpa" if attn == "flash" else attn             # transformers' KosMos-2 has no flash attention
        text = dict(vocab_size=cfg.vocab, embed_dim=cfg.llm_width, layers=cfg.llm_depth, ffn_dim=cfg.llm_mlp,
                    attention_heads=cfg.llm_heads, dropout=cfg.dropout, attention_dropout=cfg.dropout,
                    init_std=cfg.llm_init, pad_token_id=1)     # positions start at pad_token_id + 1 = 2
        native = hf.Kosmos2ForConditionalGeneration(hf.Kosmos2Config(
            text_config=text, vision_config=vit_sizes(cfg, attn), latent_query_num=cfg.image_tokens,
            attn_implementation=hf_attention(attn)))
        self.text_model, self.vision_model = native.text_model, native.vision_model
        self.image_to_text_projection = native.image_to_text_projection
        self.image_to_text_projection.x_attn.is_causal = False             # transformers 5.17 says True
        del self.text_model.lm_head                            # tied

    language_model = property(lambda self: self.text_model)
    vision_tower = property(lambda self: self.vision_model)
    tower = property(lambda self: self.vision_model.model)
    decoder = property(lambda self: self.text_model.model)

    def see(self, pixels):
        """(N, 3, h, w) -> latents (N, 64, D)."""
        x = self.tower.post_layernorm(self.patches(pixels))                            # all 257 tokens
        return self.image_to_text_projection(F.normalize(x, dim=-1))[0]                # (N, 64, D)


class PaliGemma(Backbone):
    """SigLIP -> Linear -> Gemma, causal everywhere (its pre-training saw the prefix in both directions)."""
    pixels = HALF_PIXELS

    def __init__(self, cfg, attn):
        super().__init__()
        self.language_model = hf.GemmaForCausalLM(hf.GemmaConfig(
            **llm_sizes(cfg, attn), head_dim=cfg.llm_head_dim))
        del self.language_model.lm_head                        # tied
        self.vision_tower = vit("SiglipVision", cfg, attn, vision_use_head=False)
        self.multi_modal_projector = nn.ModuleDict({"linear": nn.Linear(cfg.vit_width, cfg.llm_width)})

    def see(self, pixels):
        """(N, 3, h, w) -> (N, P, D), in units of which lm makes the usual ones."""
        x = self.multi_modal_projector["linear"](self.patches(pixels))                 # (N, P, D)
        return x / x.shape[-1] ** 0.5                          # lm multiplies all rows, words and ACT too

    def lm(self, rows, mask=None, cache=None):
        """As Backbone.lm; all rows are multiplied by sqrt(D) first, as Gemma does."""
        # in the rows' type, so 45.25 in bf16. (transformers 5 scales in embed_tokens, `words` does not)
        return super().lm(rows * rows.new_full((), rows.shape[-1] ** 0.5), mask, cache)


class Llava(Backbone):
    """LLaVA-1.5: CLIP's patches before its last block -> MLP -> Llama (upstream: only the MPT variant)."""

    def __init__(self, cfg, attn):
        super().__init__()
        self.language_model = hf.LlamaForCausalLM(hf.LlamaConfig(**llm_sizes(cfg, attn), rms_norm_eps=1e-5))
        self.vision_tower = vit("CLIPVision", cfg, attn, num_hidden_layers=cfg.vit_depth - 1)
        self.multi_modal_projector = nn.ModuleDict({"linear_1": nn.Linear(cfg.vit_width, cfg.llm_width),
                                                    "linear_2": nn.Linear(cfg.llm_width, cfg.llm_width)})

    def see(self, pixels):
        """(N, 3, h, w) -> (N, P, D), without the class token."""
        x, project = self.patches(pixels)[:, 1:], self.multi_modal_projector           # (N, P, vit_width)
        return project["linear_2"](F.gelu(project["linear_1"](x)))                     # (N, P, D)


def grid(side, width):
    """Fixed 2-D sine-cosine positions (side * side, width): half the channels for x, half for y."""
    angle = torch.arange(side)[:, None] * 10000 ** (-torch.arange(width // 4) / (width // 4))
    one = torch.cat([angle.sin(), angle.cos()], 1).expand(side, side, -1)              # (y, x, width / 2): x
    return torch.cat([one, one.transpose(0, 1)], 2).flatten(0, 1)


def resample(places, side):
    """A square table of positions (n, D) -> (side * side, D), bicubic."""
    old = places.T.unflatten(1, (math.isqrt(len(places)), -1))[None].float()           # (1, D, side, side)
    return F.interpolate(old, (side, side), mode="bicubic")[0].flatten(1).T


class Qwen(Backbone):
    """Qwen-VL (v1): ViT -> attention pool -> Qwen-7B, as Qwen2. A picture is start | 256 tokens | end."""

    def __init__(self, cfg, attn):
        super().__init__()
        self.language_model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**llm_sizes(cfg, attn), rms_norm_eps=1e-6))
        self.ids, D = [cfg.image_start_id, cfg.image_end_id], cfg.llm_width
        side = math.isqrt(cfg.image_tokens)
        if side * side != cfg.image_tokens:
            raise ValueError(f"image_tokens={cfg.image_tokens}: Qwen-VL's latents are a grid; set a square.")
        self.vision_tower = vit("SiglipVision", cfg, attn, vision_use_head=False, hidden_act="gelu")
        self.tower.post_layernorm, self.ln_pre = nn.Identity(), nn.LayerNorm(cfg.vit_width, 1e-6)
        self.query = nn.Parameter(torch.randn(cfg.image_tokens, D) * 0.02)
        self.kv_proj, self.proj = nn.Linear(cfg.vit_width, D, bias=False), nn.Linear(D, D, bias=False)
        self.pool = nn.MultiheadAttention(D, max(1, D // 128), batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(D, eps=1e-6) for _ in range(3))
        self.register_buffer("asked", grid(side, D), persistent=False)     # the queries' places, the patches'
        patches = cfg.image_size // cfg.patch_size
        self.register_buffer("places", resample(self.asked, patches), persistent=False)

    def see(self, pixels):
        """(N, 3, h, w) -> (N, 258, D): 256 latents between <img> and </img>."""
        x = self.tower.encoder(inputs_embeds=self.ln_pre(self.tower.embeddings(pixels))).last_hidden_state
        x = self.ln_kv(self.kv_proj(x))                                                # (N, P, D)
        q = (self.ln_q(self.query) + self.asked).expand(len(x), -1, -1)                # (N, 256, D)
        x = self.proj(self.ln_post(self.pool(q, x + self.places, x, need_weights=False)[0]))
        start, end = (self.embedding.weight[i].expand(len(x), 1, -1) for i in self.ids)    # no list: a copy
        return torch.cat([start, x, end], 1)                                           # (N, 258, D)


class MoonDream(Backbone):
    """MoonDream 2: SigLIP -> two-layer MLP -> Phi-1.5; with `resampler`, 64 tokens per picture."""
    pixels = HALF_PIXELS

    def __init__(self, cfg, attn):
        super().__init__()
        self.language_model = hf.PhiForCausalLM(hf.PhiConfig(**llm_sizes(cfg, attn), rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}))
        self.vision_tower = vit("SiglipVision", cfg, attn, vision_use_head=False)
        self.projection = nn.Sequential(nn.Linear(cfg.vit_width, 4 * cfg.llm_width), nn.GELU("tanh"),
                                        nn.Linear(4 * cfg.llm_width, cfg.llm_width))

    def see(self, pixels):
        """(N, 3, h, w) -> (N, P, D)."""
        return self.projection(self.patches(pixels))                                   # (N, P, D)


class UForm(Backbone):
    """UForm-Gen: ViT with layer scale -> Linear -> one decoder layer whose targets are latents -> Qwen1.5."""

    def __init__(self, cfg, attn):
        super().__init__()
        self.language_model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**llm_sizes(cfg, attn), rms_norm_eps=1e-6))
        del self.language_model.lm_head                        # tied
        ratio = cfg.vit_mlp // cfg.vit_width
        self.vision_tower = vit("Dinov2", cfg, attn, mlp_ratio=ratio, use_mask_token=False)
        self.project = nn.Linear(cfg.vit_width, cfg.llm_width)
        self.image_latents = nn.Parameter(torch.randn(1, cfg.image_tokens, cfg.llm_width) * 0.02)
        self.image_pooler = nn.TransformerDecoderLayer(
            cfg.llm_width, cfg.llm_heads, 4 * cfg.llm_width, 0.0, F.silu, batch_first=True, norm_first=True)

    def see(self, pixels):
        """(N, 3, h, w) -> latents (N, image_tokens, D)."""
        x = self.project(self.patches(pixels))                                         # (N, 1 + P, D)
        return self.image_pooler(self.image_latents.expand(len(x), -1, -1), x)         # (N, latents, D)


class FlamingoBlock(nn.Module):
    """A block of the language model that looks at the pictures first; `media` is set before each pass."""

    def __init__(self, block, cross):
        super().__init__()
        self.decoder_layer, self.gated_cross_attn_layer, self.media = block, cross, None

    def forward(self, x, *args, **kwargs):
        """(N, L, D) -> what the language model's own block returns."""
        x = self.gated_cross_attn_layer(x, *self.media) if self.gated_cross_attn_layer else x
        return self.decoder_layer(x, *args, **kwargs)


class Flamingo(Backbone):
    """OpenFlamingo: pictures reach the words by gated cross-attention. (transformers has no MPT-1B.)"""

    def __init__(self, cfg, attn):
        super().__init__()
        if cfg.llm == "mpt":                                   # eager: its mask code knows nothing else
            self.model = hf.MptForCausalLM(hf.MptConfig(
                d_model=cfg.llm_width, n_heads=cfg.llm_heads, n_layers=cfg.llm_depth, vocab_size=cfg.vocab,
                max_seq_len=2048, initializer_range=cfg.llm_init, use_cache=False,
                attn_implementation="eager"))
        else:
            self.model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(
                **llm_sizes(cfg, attn), use_parallel_residual=False, rope_parameters={
                    "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}))
        delattr(self.model, "lm_head" if hasattr(self.model, "lm_head") else "embed_out")     # unused
        self.vision_tower, self.image_id = vit("CLIPVision", cfg, attn), cfg.image_start_id
        self.perceiver = PerceiverResampler(cfg.vit_width, cfg.resampler_depth, cfg.resampler_latents)
        blocks = self.decoder.blocks if cfg.llm == "mpt" else self.decoder.layers
        for i, block in enumerate(blocks):
            cross = None if (i + 1) % cfg.cross_every else GatedCrossAttention(cfg.llm_width, cfg.vit_width)
            blocks[i] = FlamingoBlock(block, cross)
        self.blocks = [*blocks]                                # a plain list: they have their names already

    language_model = property(lambda self: self.model)

    def see(self, pixels):
        """(N, 3, h, w) -> latents (N, 64, vit_width), for the gated cross-attention."""
        return self.perceiver(self.patches(pixels)[:, 1:])                             # (N, 64, vit_width)

    def look(self, ids, mask, tokens):
        """ids, mask (N, L), tokens (N, V, 64, Dv), static before gripper: one medium -> hidden (N, L, D)."""
        seen = (ids == self.image_id).cumsum(1)[..., None] == 1                     # (N, L, 1) since <image>
        for block in self.blocks:
            block.media = tokens.flatten(1, 2)[:, None], seen                          # (N, 1, V 64, Dv)
        return self.lm(self.words(ids), mask)

    def layers(self):
        """The blocks, in order of use."""
        return [*self.tower.encoder.layers, *self.blocks]

    def parts(self):
        """The modules that cfg.freeze names; the gates and the perceiver train always."""
        return super().parts() | {"language": nn.ModuleList(block.decoder_layer for block in self.blocks)}


ADAPTERS = {"kosmos": Kosmos, "paligemma": PaliGemma, "llava": Llava, "qwen": Qwen, "moondream": MoonDream,
            "uform": UForm, "flamingo": Flamingo}


# ---- Action heads -----------------------------------------------------------------------------------------

def trunk(widths, out):
    """The arm's or the gripper's MLP: ReLU between Linears."""
    sizes = [*widths, out]
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.ModuleDict({"mlp": nn.Sequential(*layers[:-1])})


class Head(nn.Module):
    """Features of n tokens per step -> a chunk per step: arm (B, W, K, A - 1), gripper logits (B, W, K).

        n tokens -> max-pooled to `latent`, side by side -> mix: mlp | lstm | gpt over the W steps -> two MLPs
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, width, wide = cfg, cfg.width * cfg.latent, cfg.llm_width * cfg.latent
        if cfg.head == "mlp":
            self.mlp = nn.Sequential(nn.Linear(wide, wide // 2), nn.ReLU(), nn.Linear(wide // 2, width))
        elif cfg.head == "lstm":
            self.rnn = nn.LSTM(wide, width, cfg.head_depth, batch_first=True)
        else:                                                  # fc knows one token; Config refuses more
            self.fc = nn.Identity() if cfg.llm_width == cfg.width else nn.Linear(cfg.llm_width, cfg.width)
            self.gpt = hf.GPT2Model(hf.GPT2Config(
                n_embd=width, n_layer=cfg.head_depth, n_head=cfg.heads, n_positions=cfg.history,
                vocab_size=1))
            del self.gpt.wte                                   # it reads features, not words
            for name, p in self.gpt.named_parameters():        # drawn smaller by transformers, not upstream
                if name.endswith("c_proj.weight"):
                    nn.init.normal_(p, std=0.02)
        self.actions = trunk((width, *cfg.mlp_widths), cfg.horizon * (cfg.action_dim - 1))
        self.gripper = trunk((width, *cfg.mlp_widths), cfg.horizon)
        for module in self.modules() if cfg.head != "gpt" else ():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features):
        """Features (B, W, n, D) -> arm (B, W, K, A - 1) in [-1, 1], gripper logits (B, W, K)."""
        B, W, n, D = features.shape
        x = F.adaptive_max_pool1d(features.flatten(0, 1).transpose(1, 2), self.cfg.latent)  # (B W, D, latent)
        x = x.transpose(1, 2).reshape(B, W, -1)                                            # (B, W, latent D)
        if self.cfg.head == "gpt":
            x = self.gpt(inputs_embeds=self.fc(x), use_cache=False).last_hidden_state
        else:
            x = self.mlp(x) if self.cfg.head == "mlp" else self.rnn(x)[0]                  # (B, W, width)
        arm = self.actions["mlp"](x).tanh().unflatten(-1, (self.cfg.horizon, -1))          # (B, W, K, A - 1)
        return arm, self.gripper["mlp"](x)                                                 # (B, W, K)

    def loss(self, features, actions, mask, noise=None, t=None):
        """actions (B, W, K, A), gripper 0/1; mask (B, W, K). Means over what counts. -> (scalar, to log)"""
        arm, logit = self(features)
        count, is_open = mask.sum().clamp(min=1), actions[..., -1]
        # PAPER!=CODE: the paper writes MSE, the code has Huber with delta 1: half of it for errors below 1.
        # Test: test_robovlms.py::test_huber_is_half_of_mse_for_small_errors
        error = F.huber_loss(arm.float(), actions[..., :-1], reduction="none").mean(-1)
        gripper = F.binary_cross_entropy_with_logits(logit.float(), is_open, reduction="none")
        right = (logit > 0) == (is_open > 0.5)
        arm, gripper, right = ((x * mask).sum() / count for x in (error, gripper, right))
        loss = arm + self.cfg.gripper_weight * gripper
        return loss, {"loss": loss.detach(), "arm": arm.detach(), "gripper": gripper.detach(),
                      "gripper_accuracy": right}

    def act(self, features, last, noise=None):
        """The chunk of step `last` (B,): arm (B, K, A - 1), is the gripper open (B, K)."""
        arm, logit = (x[torch.arange(len(last)), last].float().cpu().numpy() for x in self(features))
        return arm, logit > 0


def cosine_alpha_bar(steps, offset=0.008, most=0.999):
    """alpha_bar of the squared-cosine schedule (Nichol & Dhariwal 2021), float64 (steps,)."""
    u = np.cos((np.arange(steps + 1) / steps + offset) / (1 + offset) * math.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - u[1:] / u[:-1], most))


class DiffusionHead(nn.Module):
    """Denoises each step's chunk. Announced upstream, never shipped: as in the authors' development tree.

        memory: time | condition x latent -> MLP        tokens: x_1 ... x_K, causal, cross-attending memory
    """

    def __init__(self, cfg):
        super().__init__()
        D, A, self.cfg = cfg.llm_width, cfg.action_dim, cfg
        self.input, self.condition, self.output = nn.Linear(A, D), nn.Linear(D, D), nn.Linear(D, A)
        self.position = nn.Parameter(torch.randn(1, cfg.horizon, D) * 0.02)
        self.condition_position = nn.Parameter(torch.randn(1, 1 + cfg.latent, D) * 0.02)
        self.encoder = nn.Sequential(nn.Linear(D, 4 * D), nn.Mish(), nn.Linear(4 * D, D))
        how = dict(activation="gelu", batch_first=True, norm_first=True)
        block = nn.TransformerDecoderLayer(D, cfg.heads, 4 * D, 0.1, **how)
        self.decoder, self.norm = nn.TransformerDecoder(block, cfg.head_depth), nn.LayerNorm(D)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x, t, features):
        """x (N, K, A) noised, t (N,), features (N, n, D) -> the noise (N, K, A)."""
        n, half = 1 + self.cfg.latent, features.shape[-1] // 2
        c = F.adaptive_avg_pool1d(features.transpose(1, 2), self.cfg.latent).transpose(1, 2)  # (N, latent, D)
        angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
        time = torch.cat([angle.sin(), angle.cos()], 1)[:, None]                               # (N, 1, D)
        memory = self.encoder(torch.cat([time, self.condition(c)], 1) + self.condition_position)
        i, s = torch.arange(x.shape[1], device=x.device)[:, None], torch.arange(n, device=x.device)
        y = self.decoder(self.input(x) + self.position, memory, i < i.T, i < s - 1)    # True = may not look
        return self.output(self.norm(y))

    def loss(self, features, actions, mask, noise=None, t=None):
        """One noise level per step. noise (B W, K, A), t (B W,): to replay a draw. -> (scalar, to log)"""
        x, counts = actions.flatten(0, 1), mask.flatten(0, 1)[..., None]                   # (B W, K, A or 1)
        noise = torch.randn_like(x) if noise is None else noise
        t = torch.randint(self.cfg.num_train_steps, (len(x),), device=x.device) if t is None else t
        abar = constant(tuple(cosine_alpha_bar(self.cfg.num_train_steps)), x.device)[t][:, None, None]
        eps = self((abar.sqrt() * x + (1 - abar).sqrt() * noise) * counts, t, features.flatten(0, 1))
        loss = ((eps.float() - noise) ** 2 * counts).sum() / (counts.sum().clamp(min=1) * x.shape[-1])
        return loss, {"loss": loss.detach()}

    def act(self, features, last, noise=None):
        """DDPM: all steps, x0 clipped to [-1, 1], variance fixed-small. noise: (steps, B, K, A) or drawn."""
        z, cfg, n = features[torch.arange(len(last)), last], self.cfg, self.cfg.num_train_steps
        noise = torch.randn(n, len(z), cfg.horizon, cfg.action_dim) if noise is None else noise
        noise, abar = noise.to(z.device), cosine_alpha_bar(n)
        x = noise[0]
        for t in reversed(range(n)):
            a, before = abar[t], abar[t - 1] if t else 1.0     # alpha_bar here, and of the next cleaner step
            eps = self(x, torch.full((len(z),), t, device=z.device), z)
            x0 = ((x - (1 - a) ** 0.5 * eps) / a ** 0.5).clamp(-1, 1)
            x = (before ** 0.5 * (1 - a / before) * x0 + (a / before) ** 0.5 * (1 - before) * x) / (1 - a)
            if t:
                x = x + ((1 - before) / (1 - a) * (1 - a / before)) ** 0.5 * noise[n - t]
        x = x.float().cpu().numpy()                                                        # (B, K, A)
        return np.clip(x[..., :-1], -1, 1), x[..., -1] > 0.5


def discrete_loss(hidden, labels, tokens, dims=7, head=nn.Identity(), vocab=0):
    """Next-word cross-entropy where labels (B, N) are not -100 -> scalar, log. head(hidden (B, N, D)): logits
    (B, N, vocab); where these are LARGE, only of the rows with a label, in pieces.

    Logged over action words only: accuracy of arm and gripper (each `dims`-th), L1 of the decoded actions.
    """
    want = labels[:, 1:]
    if labels.numel() * vocab <= common.LARGE:
        logits = head(hidden)[:, :-1]
        guess, loss = logits.argmax(-1), F.cross_entropy(logits.flatten(0, 1).float(), want.flatten())
    else:
        hidden, want = hidden[:, :-1][want != -100], want[want != -100]                # (n, D), (n,)
        loss = word_loss(hidden, head, want, vocab)
        with torch.no_grad():
            guess = torch.cat([head(rows).argmax(-1) for rows in hidden.split(4096)])
    guess, want = (x[tokens.holds(want)].cpu() for x in (guess, want))                 # (number of words,)
    right, last = (guess == want).float(), torch.arange(len(want)) % dims == dims - 1
    gap = torch.as_tensor(np.abs(tokens.decode(guess) - tokens.decode(want))).mean()
    return loss, {"loss": loss.detach(), "arm_accuracy": right[~last].mean(), "l1": gap,
                  "gripper_accuracy": right[last].mean()}


# ---- The model --------------------------------------------------------------------------------------------

def insert(x, new, at):
    """(B, L, ...), (B, n, ...) -> (B, L + n, ...), `new` before position `at`."""
    return torch.cat([x[:, :at], new, x[:, at:]], 1)


class LeanQuickGELU(hf.activations.QuickGELUActivation):
    """As it was, in less memory. (A class: what is set on one object, --compile compiles for each anew.)"""

    def forward(self, x):
        """x sigmoid(1.702 x), of any shape."""
        return lean(super().forward, x)


class Model(nn.Module):
    """The matrix. preset, origin: for the record; fresh: modules that a checkpoint did not hold."""
    graphs = Graphs()                  # off; Graphs(common.captured): act() with CUDA graphs

    def __init__(self, cfg, tokenizer=None, stats=None, attn="auto"):
        super().__init__()
        self.cfg, self.tokenizer, self.stats = cfg, tokenizer, stats or {}
        self.preset, self.origin, self.fresh = "custom", {}, []
        self.attn = attn = "sdpa" if attn == "auto" else attn  # no device is known yet; sdpa runs on all
        self.backbone = ADAPTERS[cfg.backbone](cfg, attn)
        if cfg.resampler:
            sizes = cfg.resampler_depth, cfg.resampler_latents
            self.vision_resampler = PerceiverResampler(cfg.llm_width, *sizes)
        if cfg.head != "discrete":
            self.act_head = DiffusionHead(cfg) if cfg.head == "diffusion" else Head(cfg)
        self.unread = ("action_token",)                        # of a trunk, where there is no query
        if cfg.head != "discrete" and cfg.reading == "query":
            self.action_token, self.unread = nn.Parameter(torch.zeros(cfg.llm_width)), ()
        self.set_trainable()
        for module in self.backbone.modules():                 # CLIP's x sigmoid(1.702 x): x is enough
            if isinstance(module, hf.activations.QuickGELUActivation):
                module.__class__ = LeanQuickGELU
        if cfg.head != "discrete" and hasattr(self.backbone.language_model, "lm_head"):
            self.backbone.language_model.lm_head.requires_grad_(False)     # carried along, read by nothing

    def set_trainable(self):
        """As cfg.freeze says: the vision tower and the embeddings by their own names, whatever the others."""
        parts, frozen = self.backbone.parts(), self.cfg.freeze
        if "language" in frozen:
            parts["language"].requires_grad_(False)
            for block in self.backbone.layers()[-self.cfg.train_layers:] if self.cfg.train_layers else ():
                block.requires_grad_(True)
        for name in ("vision", "embeddings"):
            parts[name].requires_grad_(name not in frozen)
        if self.cfg.resampler and "resampler" in frozen:
            self.vision_resampler.requires_grad_(False)

    device = property(lambda self: self.backbone.embedding.weight.device)

    def precision(self):
        """The autocast region: see Config.compute."""
        auto = self.cfg.compute == "auto" and self.training and self.device.type == "cuda"
        on = auto or self.cfg.compute == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if on else nullcontext()

    def see(self, pixels):
        """(B, W, V, 3, h, w) normalized -> picture tokens (B, W, V, P, D)."""
        x = self.backbone.see(pixels.flatten(0, 2))                                    # (B W V, P, D)
        return (self.vision_resampler(x) if self.cfg.resampler else x).unflatten(0, pixels.shape[:3])

    def look_at(self, images):
        """uint8 (B, W, V, h, w, 3) -> picture tokens (B, W, V, P, D)."""
        pixels = normalize_pixels(images.flatten(0, 2), *self.backbone.pixels)
        return self.see(pixels.unflatten(0, images.shape[:3]))

    def rows(self, tokens, ids, mask):
        """Picture tokens (B, W, V, P, D), words, mask (B, L) -> embedding rows (., N, D), their mask (., N).

            <s> | gripper (P) | static (P) | text ... | ACT x latent | </s>             one step
             x0 | gripper (P) | static (P) | text ... | K A action words | </s>         ... of `discrete`

        one_step, policy_head: a row per step, (B W, N). interleaved, discrete: all steps in a row, (B, W N).
        video: one step with W P tokens per camera, (B, N). Without <s> pictures come first (discrete: never),
        without </s> ACT last. Words may differ from step to step: (B, W, L).
        """
        cfg, (B, W, V, P, D), discrete = self.cfg, tokens.shape, self.cfg.head == "discrete"
        if cfg.formulation == "video":                         # all gripper frames, then all static ones
            tokens, W, P = tokens.transpose(1, 2).reshape(B, 1, V, W * P, D), 1, W * P
        words, mask = (x.flatten(0, 1) if ids.ndim == 3 else x.repeat_interleave(W, 0)     # (B W, L, .)
                       for x in (self.backbone.words(ids), mask.bool()))
        # FAITHFUL: static is inserted first, gripper then at the same place: so the gripper's tokens lead.
        # Test: test_robovlms.py::test_rows_hold_gripper_static_text_query_end
        pictures, at = tokens.flip(2).reshape(B * W, V * P, D), 1 if discrete else int(cfg.bos)
        rows, mask = insert(words, pictures, at), insert(mask, mask.new_ones(B * W, V * P), at)
        if cfg.reading == "query" and not discrete:
            # FAITHFUL: before the last position of the padded batch, so after a shorter prompt's padding.
            # Test: test_robovlms.py::test_query_of_a_short_prompt_lies_after_its_padding
            at = rows.shape[1] - cfg.eos
            rows = insert(rows, self.action_token.to(rows.dtype).expand(B * W, cfg.latent, D), at)
            mask = insert(mask, mask.new_full((B * W, cfg.latent), not cfg.fill_zero), at)
        if cfg.formulation == "interleaved" or discrete:
            rows, mask = rows.reshape(B, -1, D), mask.reshape(B, -1)
        return rows, mask.long()

    def think(self, tokens, ids, mask):
        """Picture tokens (B, W, V, P, D), words, mask (B, L) -> features (B, W, n, D); video: W = 1."""
        cfg, (B, W), bos, eos = self.cfg, tokens.shape[:2], self.cfg.bos, self.cfg.eos
        if cfg.backbone == "flamingo":
            ids, mask = (x.repeat_interleave(W, 0) for x in (ids, mask))               # (B W, L)
            return self.backbone.look(ids, mask, tokens.flatten(0, 1)).unflatten(0, (B, W))
        hidden = self.backbone.lm(*self.rows(tokens, ids, mask))
        W = 1 if cfg.formulation == "video" else W
        hidden = hidden.reshape(B, W, -1, hidden.shape[-1])                            # (B, W, N, D)
        N, text = hidden.shape[2], ids.shape[1] - bos - eos
        start, end = {"query": (N - eos - cfg.latent, N - eos), "text": (N - text - eos, N - eos),
                      "vision": (int(bos), N - text - eos), "all": (0, N)}[cfg.reading]
        return hidden[:, :, start:end].contiguous()            # in training, the others need not live on

    def forward(self, batch, words=True):
        """images (B, W, V, h, w, 3) uint8, ids and mask (B, L) -> features; the discrete head: logits
        (B, N, vocab), or without `words` the hidden states (B, N, D) that become these."""
        with self.precision():
            tokens = self.look_at(batch["images"])
            if self.cfg.head != "discrete":
                return self.think(tokens, batch["ids"], batch["mask"])
            hidden = self.backbone.lm(*self.rows(tokens, batch["ids"], batch["mask"]))
            return self.backbone.logits(hidden) if words else hidden

    def loss(self, batch, noise=None, t=None):
        """-> (scalar, to log). batch: actions (B, W, K, A) normalized, loss_mask (B, W, K), or labels (B, L).

        noise, t: to replay a draw of the diffusion head.
        """
        cfg = self.cfg
        if cfg.head == "discrete":
            hidden, labels = self(batch, words=False), batch["labels"]
            labels = F.pad(labels, (hidden.shape[1] - labels.shape[1], 0), value=-100)
            self.tokenizer = self.tokenizer or load_tokenizer(cfg)
            with self.precision():
                return discrete_loss(hidden, labels, ActionTokens.of(cfg, self.tokenizer), cfg.action_dim,
                                     self.backbone.logits, cfg.vocab)
        if batch["actions"].shape[2:] != (cfg.horizon, cfg.action_dim):
            raise ValueError(f"actions: chunks {tuple(batch['actions'].shape[2:])} came; (horizon, "
                             f"action_dim) is {(cfg.horizon, cfg.action_dim)}. Set these two, or fix data.")
        features = self(batch)
        with self.precision():
            return self.act_head.loss(features, batch["actions"], batch["loss_mask"], noise, t)

    def decode(self, tokens, ids, count):
        """Greedy words after a prompt: tokens (B, 1, V, P, D), ids (B, L) without padding -> (B, count)."""
        rows, _ = self.rows(tokens, ids, torch.ones_like(ids))
        cache, words = hf.DynamicCache(), []
        for _ in range(count):
            hidden = self.backbone.lm(rows, None, cache)
            words.append(self.backbone.logits(hidden[:, -1]).argmax(-1))               # (B,)
            rows = self.backbone.words(words[-1])[:, None]                             # (B, 1, D)
        return torch.stack(words, 1)

    def frame(self, images, ids):
        """What a new frame is kept as: images (N, 1, V, h, w, 3), prompts (N, L) without padding -> picture
        tokens (N, 1, V, P, D); policy_head: its feature (N, 1, n, D), the history is in the head."""
        def work(images, ids):
            seen = self.look_at(images)
            return self.think(seen, ids, torch.ones_like(ids)) if head else seen
        head = self.cfg.formulation == "policy_head"
        return self.graphs(work, images, ids)

    def act_group(self, group, memories, noise):
        """Prepared observations with prompts of one length -> arm (B, K, A - 1), open (B, K), failed (B,)."""
        cfg, B, counts = self.cfg, len(group), torch.tensor([len(p["images"]) for p in group])
        ids = torch.stack([p["ids"] for p in group]).to(self.device)                   # (B, L)
        images = torch.cat([p["images"] for p in group])[:, None]                    # (frames, 1, V, h, w, 3)
        owner = torch.arange(B).repeat_interleave(counts).to(self.device)
        seen = self.frame(images.to(self.device), ids[owner])                          # (frames, 1, ...)
        if cfg.head == "discrete":
            words = self.decode(seen, ids, cfg.horizon * cfg.action_dim).cpu().numpy()
            tokens = ActionTokens.of(cfg, self.tokenizer)
            a = tokens.decode(words).reshape(B, cfg.horizon, cfg.action_dim)
            return a[..., :-1], a[..., -1] > 0, ~tokens.holds(words).all(1)
        for memory, new in zip(memories, seen[:, 0].split(counts.tolist())):
            memory.extend(new)
        rows = nn.utils.rnn.pad_sequence([torch.stack([*m]) for m in memories], True)  # (B, <= W, ...)
        head = cfg.formulation == "policy_head"
        features = rows if head else self.think(rows, ids, torch.ones_like(ids))
        first = cfg.published_step or cfg.formulation == "video"
        last = torch.tensor([0 if first else len(m) - 1 for m in memories])
        return *self.act_head.act(features, last, noise), np.zeros(B, bool)

    @torch.no_grad()
    def act(self, observations, unnorm_key=None, noise=None):
        """A list of raw observations -> (chunks (B, K, A) float32 in robot units, info).

        `memory` in an observation, a Policy's deque of what earlier frames became, goes on here, only the
        newest picture is looked at; without it, history_images (if any) are the history. info: `actions` in
        float64; `parse_failed` (B,): discrete words that are no actions came, and the chunk holds the pose.
        """
        cfg, stats = self.cfg, pick_stats(self.stats, unnorm_key)
        if not observations:
            raise ValueError("act() needs at least one observation.")
        self.tokenizer = self.tokenizer or load_tokenizer(cfg)
        B, memories = len(observations), [o.get("memory", deque(maxlen=cfg.history)) for o in observations]
        arm, is_open = np.zeros((B, cfg.horizon, cfg.action_dim - 1)), np.zeros((B, cfg.horizon), bool)
        failed, leave = np.zeros(B, bool), ({"actions", "memory"}, {"actions", "memory", "history_images"})
        prepared = [prepare({k: x for k, x in o.items() if k not in leave[bool(m)]}, cfg, self.tokenizer)
                    for o, m in zip(observations, memories)]
        # Prompts of one length at a time: padding would move ACT, and a batch would not equal its members.
        # (video: and windows of one length, as padding would be seen.)
        sizes = [(len(p["ids"]), (cfg.formulation == "video") * min(cfg.history, len(m) + len(p["images"])))
                 for p, m in zip(prepared, memories)]
        for size in dict.fromkeys(sizes):
            at = [i for i, other in enumerate(sizes) if other == size]
            part = noise if noise is None else noise[:, at]
            with self.precision():
                out = self.act_group([prepared[i] for i in at], [memories[i] for i in at], part)
            for whole, got in zip((arm, is_open, failed), out):
                whole[at] = got
        actions = denormalize_actions(arm, is_open, stats, cfg)                        # (B, K, A) float64
        if not cfg.official_decode:
            actions[failed, :, :-1] = 0                        # deltas: no motion
        return actions.astype(np.float32), {"actions": actions, "parse_failed": failed}

    def blocks(self):
        """The modules to shard, checkpoint or compile one by one."""
        return self.backbone.layers()

    def param_groups(self, lr, weight_decay):
        """For AdamW: officially one group; with cfg.head_lr the head is one of its own."""
        groups = {lr: [], self.cfg.head_lr or lr: []}
        for name, p in self.named_parameters():
            if p.requires_grad:
                groups[self.cfg.head_lr or lr if name.startswith("act_head.") else lr].append(p)
        return [{"params": ps, "lr": rate, "weight_decay": weight_decay} for rate, ps in groups.items() if ps]

    def save_pretrained(self, folder, card=None, state=None):
        """Write our checkpoint folder. card: more lines for README.md {name: text}; state: other weights."""
        lines = {"method": "RoboVLMs (https://arxiv.org/abs/2412.14058)", "preset": self.preset,
                 **self.origin, "datasets": ", ".join(self.stats) or "none", **(card or {})}
        text = "# RoboVLMs\n\n" + "".join(f"- {name}: {value}\n" for name, value in lines.items())
        if self.cfg.tokenizer != "tiny" and self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)             # config.json, the last, makes it valid
        save_folder(folder, "robovlms", self.preset, asdict(self.cfg), state or self.state_dict(), self.stats,
                    text, self.origin)


# ---- Acting on a robot ------------------------------------------------------------------------------------

# robot: the dataset whose statistics go with its released policy
ROBOTS = {"calvin": "calvin", "calvin_gripper_frame": "calvin", "google_robot": "fractal20220817_data",
          "widowx_bridge": "bridge_orig"}
BOUNDS = {                                                     # dataset: arm's q01, q99
    "calvin": ([-1.0] * 6, [1.0] * 6),                         # (deltas are in [-1, 1] already)
    "bridge_orig": ([-0.02872725307941437, -0.04170349963009357, -0.026093858778476715, -0.08092105075716972,
                     -0.09288699507713317, -0.20718276381492615],
                    [0.028309678435325586, 0.040855254605412394, 0.040161586627364146, 0.08192047759890528,
                     0.07792850524187081, 0.20382574498653397]),
    "fractal20220817_data": ([-0.22453527510166169, -0.14820013284683228, -0.231589707583189,
                              -0.3517994859814644, -0.4193011274933815, -0.43643461108207704],
                             [0.17824687153100965, 0.14938379630446405, 0.21842354819178575,
                              0.5892666035890578, 0.35272657424211445, 0.44796681255102094])}


def official_stats(*names):
    """The statistics of released policies; the gripper is not normalized, CALVIN is not at all."""
    entry = lambda low, high: {"q01": low, "q99": high, "min": low, "max": high}  # noqa: E731
    return {n: {"action": {**entry(BOUNDS[n][0] + [0.0], BOUNDS[n][1] + [1.0]),
                           "mask": [n != "calvin"] * 6 + [False]}} for n in names}


def turns(angles):
    """Angles (N, 3) [rad], a tensor -> Rx, Ry, Rz, (N, 3, 3) each: the turns about the three axes."""
    (cx, cy, cz), (sx, sy, sz) = angles.cos().T, angles.sin().T
    one, no = torch.ones_like(cx), torch.zeros_like(cx)
    x, y, z = ((one, no, no, no, cx, -sx, no, sx, cx), (cy, no, sy, no, one, no, -sy, no, cy),
               (cz, -sz, no, sz, cz, no, no, no, one))
    return (torch.stack(m, -1).unflatten(-1, (3, 3)) for m in (x, y, z))


def gripper_frame_step(action, pose):
    """CALVIN delta (7,) in the gripper's frame -> in the world, [1/50 m], [1/20 rad]. pose: xyz, rpy (6,)."""
    x, y, z = turns(torch.from_numpy(np.stack([pose[3:6], action[3:6]])))
    old, turn = (z @ y @ x).numpy()
    new = old @ turn
    angles = np.arctan2(new[2, 1], new[2, 2]), -np.arcsin(new[2, 0]), np.arctan2(new[1, 0], new[0, 0])
    return np.concatenate([50 * (old @ action[:3]), 20 * (angles - pose[3:6]), action[6:]])


def gripper_frame(actions, poses, back=False):
    """CALVIN deltas (N, 7) in the world -> in the gripper's frame (tcp_rel); back: from it. poses (N, >= 6).

    In the arrays' own precision: officially float32. Angles are Rx Ry Rz here, their deltas in 1/100 rad.
    """
    def matrix(angles):                                                                # (N, 3) -> (N, 3, 3)
        x, y, z = turns(angles)
        return x @ y @ z
    a, angles = torch.from_numpy(actions), torch.from_numpy(poses[:, 3:6])
    R, turn = matrix(angles), 0.01 * a[:, 3:6]
    new = R @ matrix(turn).inverse() if back else matrix(angles + turn).inverse() @ R
    turn = torch.stack([torch.atan2(-new[:, 1, 2], new[:, 2, 2]), new[:, 0, 2].clamp(-1, 1).asin(),
                        torch.atan2(-new[:, 0, 1], new[:, 0, 0])], -1) - (angles if back else 0)
    turn = 100 * (turn - 2 * math.pi * (turn / (2 * math.pi)).round())                 # in -pi .. pi
    at = (R if back else R.inverse()) @ a[:, :3, None]                                 # (N, 3, 1)
    return torch.cat([at[..., 0], turn, a[:, 6:]], 1).numpy()


# twin: cogact.euler_to_axis_angle
def euler_to_axis_angle(roll, pitch, yaw):
    """R = Rz(yaw) Ry(pitch) Rx(roll), static xyz [rad] -> axis * angle (3,)."""
    # FAITHFUL: the quaternion's sign is left as it falls, so angles up to 2 pi occur.
    # Test: test_cogact.py::test_simpler_policy_matches
    (cr, sr), (cp, sp), (cy, sy) = ((math.cos(a / 2), math.sin(a / 2)) for a in (roll, pitch, yaw))
    w = cr * cp * cy + sr * sp * sy
    v = np.array([sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy])
    length = np.linalg.norm(v)
    return np.zeros(3) if length < 1e-8 else v / length * 2 * math.acos(min(max(w, -1), 1))


class Policy:
    """A session with one robot: chunks in, one action per control step out. It owns the memory of its frames.

    robot: None; "calvin" (the action as it is) or "calvin_gripper_frame" (the delta is in that frame);
    "google_robot" or "widowx_bridge": as SimplerEnv's environments take them.
    """

    def __init__(self, model, unnorm_key=None, execute=None, robot=None):
        cfg, self.model, self.robot = model.cfg, model, robot
        if robot not in (None, *ROBOTS):
            raise ValueError(f"robot={robot!r} does not exist; choose one of {', '.join(ROBOTS)}, or none.")
        key = ROBOTS.get(robot)
        self.unnorm_key = key if unnorm_key is None and key in model.stats else unnorm_key
        self.execute = cfg.execute if execute is None else execute
        if not 1 <= self.execute <= (cfg.horizon if cfg.history == 1 else 1):
            raise ValueError(f"execute={execute}: 1 to {cfg.horizon}, the chunk's actions; with a history of "
                             f"{cfg.history} frames always 1, each frame must be looked at.")
        # predictions of i steps ago have weight r^i, and officially r = 1: a plain average
        self.ensemble = ChunkEnsemble(cfg.ensemble_horizon, exponential_weights, self.execute)
        self.reset()

    def reset(self, instruction=None):
        """Forget everything; call between episodes and sub-tasks. (A new instruction does it by itself.)"""
        self.instruction, self.queue = instruction, deque()
        self.memory = deque(maxlen=self.model.cfg.history)
        self.opened, self.prev, self.held, self.left = 0, None, 0.0, 0   # the gripper's, see simpler_gripper
        self.ensemble.reset()

    @property
    def needs_chunk(self):
        """True when the next step wants a fresh chunk."""
        return not self.queue

    def ask(self, observation):
        """The observation as model.act wants it: with the memory of earlier frames, which act continues."""
        if observation.get("instruction") != self.instruction:
            self.reset(observation.get("instruction"))
        return {**observation, "memory": self.memory}

    def step(self, observation, chunk=None):
        """The action for now, (A,) float64. chunk: (K, A) in robot units if model.act was already asked."""
        if not observation.get("instruction"):
            raise ValueError("the observation has no instruction: say in words what the robot should do.")
        asked = self.ask(observation)
        if self.needs_chunk:
            chunk = self.model.act([asked], self.unnorm_key)[1]["actions"][0] if chunk is None else chunk
            self.queue.extend(self.ensemble.push(np.asarray(chunk, np.float64)))
        self.raw = action = self.queue.popleft()                                 # (A,) before post-processing
        signed = self.model.cfg.gripper == "signed"
        is_open = action[-1] > (0 if signed else 0.5)                           # an average is made 0/1 again
        action = np.append(action[:-1], 1.0 if is_open else -1.0 * signed)
        if self.model.cfg.tcp_rel or self.robot == "calvin_gripper_frame":
            pose = np.asarray(observation.get("state", ()), np.float64).reshape(-1)[:6]
            if len(pose) < 6:
                raise ValueError("the observation has no state, or a short one: actions are in the gripper's "
                                 "frame, so its pose is needed, xyz [m] and roll, pitch, yaw [rad] first.")
        if self.model.cfg.tcp_rel:
            action = gripper_frame(action[None], pose[None], back=True)[0]
        if self.robot in ("google_robot", "widowx_bridge"):
            return np.array([*action[:3], *euler_to_axis_angle(*action[3:6]), self.simpler_gripper(is_open)])
        if self.robot == "calvin_gripper_frame":
            return gripper_frame_step(action, pose)
        return action

    def simpler_gripper(self, is_open):
        """WidowX: opens (+1) at the second prediction in a row, else -1. Google: a change, for 2 steps."""
        if self.robot == "widowx_bridge":
            self.opened = self.opened + 1 if is_open else 0
            return 1.0 if self.opened > 1 else -1.0
        g = 1.0 if is_open else -1.0
        change, self.prev = (0.0 if self.prev is None else self.prev - g), g     # +2 close, -2 open
        if change and not self.left:
            self.held, self.left = change, 2
        self.left, change = max(0, self.left - 1), self.held if self.left else change
        return change


# ---- Checkpoints: ours and the official ones ---------------------------------------------------------------

# never finished upstream; the official code has no other meaning of them either
REFUSED = ("predict_forward", "predict_forward_hand", "predict_caption", "bits")
HEADS = {"FCDecoder": "mlp", "LSTMDecoder": "lstm", "GPTDecoder": "gpt", "DiscreteDecoder": "discrete"}
# our field: its name in an official JSON
KEYS = {"width": "act_head.hidden_size", "depth": "act_head.num_layers", "action_dim": "act_head.action_dim",
        "resampler": "use_vision_resampler", "gripper_weight": "arm_gripper_loss_ratio",
        "lr": "learning_rate", "batch": "batch_size", "warmup": "warmup_steps", "history": "window_size",
        "horizon": "fwd_pred_next_n", "grad_clip": "gradient_clip_val", "steps": "trainer.max_steps",
        "traj_cons": "train_dataset.traj_cons",
        **{key: f"act_head.{key}" for key in ("latent", "fill_zero", "n_bin")},
        **{key: key for key in ("tcp_rel", "seed", "weight_decay", "norm_min", "norm_max", "image_size")}}


def merge(base, new):
    """Nested dicts, the child wins; {"__override__": true} replaces instead."""
    if not (isinstance(base, dict) and isinstance(new, dict)) or new.get("__override__"):
        return {k: v for k, v in new.items() if k != "__override__"} if isinstance(new, dict) else new
    return base | {k: merge(base.get(k), v) for k, v in new.items()}


def read_official_json(path, depth=0):
    """An official JSON as a dict, with what its parents say (theirs first). depth: of parents, so far."""
    path, about = Path(path), read_json(path)
    parent = str(about.pop("parent", None) or "")
    if not parent:
        return about
    found = [p for p in (Path(parent), path.parent / parent) if p.is_file()]
    if not found or depth > 8:
        raise ValueError(f"{path}: its parent {parent} is not there; put it beside." if not found else
                         f"{path}: more than 9 parents, or a circle of them; {parent} comes again.")
    return merge(read_official_json(found[0], depth + 1), about)


class OfficialJSON:
    """An official JSON with its parents. `asked`: the names that were read; the others have no effect."""

    def __init__(self, path):
        self.path, self.about, self.asked = path, read_official_json(path), set()
        blocks = self.about.get("train_dataset")               # of several, the first says whose actions
        blocks = blocks.get("datasets", blocks) if isinstance(blocks, dict) else blocks
        self.about["train_dataset"] = (blocks or [None])[0] if isinstance(blocks, list) else blocks

    def __call__(self, name, default=None):
        """The value of "key" or "part.key"; absent or null: the default. Its type must be the default's."""
        self.asked.add(name)
        part, _, key = name.rpartition(".")
        value = (self(part, {}) if part else self.about).get(key)
        kind = (int, float) if isinstance(default, (int, float)) else type(default)
        if None not in (value, default) and not isinstance(value, kind):
            raise ValueError(f"{self.path}: {name}={value!r}: a value like {default!r} is wanted.")
        return default if value is None else value

    def notes(self):
        """What it says in vain, or what runs otherwise."""
        lora, alpha = self("train_setup.lora_r", 64), self("train_setup.lora_alpha")
        notes = ['precision "16" (fp16 mixed) runs as bf16'] * (self.precision() == "16")
        if self("train_setup.lora_enable", False) and alpha != 2 * lora:
            notes.append(f"lora_alpha={alpha} is twice the rank here")
        if self("trainer.accumulate_grad_batches", 1) != 1:
            notes.append("accumulate_grad_batches: give train.py --global-batch")
        names = [*self.about, *(f"{part}.{key}" for part in ("act_head", "train_setup", "trainer")
                                for key in self(part, {}))]
        return [f"{n}: no effect" for n in names if n not in {*self.asked, "val_dataset"}] + notes

    def precision(self):
        """The trainer's, else train_setup's: "32", "16", "bf16"."""
        found = [self(f"{part}.precision") for part in ("trainer", "train_setup")]
        return str(found[0] or found[1]).removesuffix("-mixed").removesuffix("-true")


def read_official_config(path):
    """An official JSON -> (Config, notes: what of it has no effect, here or upstream, or another one)."""
    if not str(path).strip():
        raise ValueError("config= names no file; config=FILE.json is wanted, an official JSON.")
    ask = OfficialJSON(path)
    for key in REFUSED:
        value = ask(f"train_setup.{key}", False)
        if value and value not in (-1, 16, 32):                # of bits: these are no quantization
            raise ValueError(f"{path}: {key}={value} was never finished upstream. Switch it off.")
    name, W, head = ask("robovlm_name", ask("model")), ask("window_size"), ask("act_head.type")
    for key, value in (("act_head.type", head), ("window_size", W), ("robovlm_name", name),
                       ("fwd_pred_next_n", ask("fwd_pred_next_n"))):
        if value is None:
            raise ValueError(f"{path}: {key} is missing; take the checkpoint's own JSON.")
    name = re.sub("^robo", "", str(name).lower())
    choose(f"{path}: no backbone", name, tuple(BACKBONES))
    choose(f"{path}: act_head.type: no head", head, tuple(HEADS))
    pooled, how = ask("act_head.action_space") == "down_sample", ask("act_head.down_sample")
    if pooled and how != "pooling":
        raise ValueError(f"{path}: act_head.down_sample={how!r} for all tokens; only 'pooling' makes a fixed "
                         "number of them (upstream too).")
    past = {"pre": "interleaved", "video": "video"}.get(ask("act_head.history_type", "post"), "policy_head")
    whole, last = ask("train_setup.freeze_backbone", False), ask("train_setup.train_decoder_layers", -1)
    last = -1 if whole else last                               # of a frozen whole, no layer trains (upstream)
    gates = name == "flamingo" and not ask("train_setup.train_full_decoder", False)     # all else is frozen
    frozen = {"vision": not ask("train_setup.train_vision"), "language": whole or gates or last >= 0,
              "embeddings": not ask("train_setup.train_text_embedding"),
              "resampler": ask("train_setup.freeze_resampler")}
    calvin = "calvin" in str(ask("train_dataset.type", "calvin")).lower()
    rank, mu, law = ask("train_setup.lora_r", 64), ask("mu_val", 255), (ask("x_mean", 0.0), ask("x_std", 1.0))
    values = dict(
        BACKBONES[name], backbone=name, head=HEADS[head], formulation="one_step" if W == 1 else past,
        read=ask("act_head.token_source", "all") if pooled else "auto",
        gripper="signed" if calvin else "unit", augment=calvin,
        data=str(path) if ask("train_dataset") else "",
        views=("third", "wrist") if ask("use_hand_rgb") else ("third",),
        freeze=tuple(part for part in PARTS if frozen.get(part)) or ("nothing",), train_layers=max(0, last),
        compute={"32": "fp32", "bf16": "bf16"}.get(ask.precision(), "auto"),
        lora=rank if ask("train_setup.lora_enable", False) else 0,
        mu_law=mu if ask("use_mu_law") else 0, regular=law if ask("regular_action") else (0.0, 1.0),
        shift=(max(0, ask("train_dataset.rgb_pad", 10)), max(0, ask("train_dataset.gripper_pad", 4))),
        lr_schedule="cosine" if "cosine" in str(ask("scheduler")) else "constant")
    for ours, theirs in KEYS.items():
        if ask(theirs) is not None and (ours, ask(theirs)) != ("steps", -1):
            values[ours] = ask(theirs)
    values |= {} if ask("norm_action", True) else {"norm_min": -1.0, "norm_max": 1.0}
    return configure(Config(), **values), ask.notes()


def rename_official(state):
    """Official names -> ours: without wrappers, tied heads, and the masks that GPT-2 once kept as buffers."""
    parts = "action_token|act_head|backbone|vision_resampler"
    state = {re.sub(rf"^(module\.)?(model\.(?={parts}))?", "", name): t for name, t in state.items()}
    drop = r"backbone\.(text|language)_model\.lm_head\.weight|act_head\.gpt\.h\.\d+\.attn\.(masked_)?bias"
    return {name: t for name, t in state.items() if not re.fullmatch(drop, name)}


# The VLM's public names -> ours, in order; "": dropped; [qkv], [QKV]: fused, split in thirds, or so per head.
# UForm-Gen and OpenFlamingo (three sources): no list of names could be had, so they start from scratch, or
# from a checkpoint of ours. Of Qwen-VL and MoonDream 2 the names are their sources', not read from a file.
HF = ((r"^(model\.)?lm_head\.", "language_model.lm_head."), (r"^model\.(?=multi_modal|vision)", ""),
      (r"^model\.language_model\.", "language_model.model."),
      (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."))
TIED = ((r"^(language|text)_model\.lm_head\.weight", ""),)
LAYER, BLOCK, EMBED = (f"{part}." for part in (
    "language_model.model.layers", "vision_tower.vision_model.encoder.layers",
    "vision_tower.vision_model.embeddings"))
PUBLIC = {
    "kosmos": TIED, "paligemma": (*HF, *TIED),
    "llava": (*HF, (r"^vision_tower.*(layers\.23\.|post_layernorm).*", "")),     # the last block is unused
    "qwen": ((r"transformer\.h\.", LAYER), (r"transformer\.visual\.transformer\.resblocks\.", BLOCK),
             *((rf"(?<={LAYER})(\d+)\.{old}\.", rf"\1.{new}.") for old, new in (
                 ("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm"),
                 ("attn.c_attn", "self_attn.[qkv]_proj"), ("attn.c_proj", "self_attn.o_proj"),
                 ("mlp.w1", "mlp.up_proj"), ("mlp.w2", "mlp.gate_proj"), ("mlp.c_proj", "mlp.down_proj"))),
             *((rf"(?<={BLOCK})(\d+)\.{old}\.", rf"\1.{new}.") for old, new in (
                 ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                 ("mlp.c_proj", "mlp.fc2"), ("attn.in_proj", "self_attn.[QKV]_proj"),
                 ("attn.out_proj", "self_attn.out_proj"))),
             (r"transformer\.wte", "language_model.model.embed_tokens"),
             (r"transformer\.ln_f", "language_model.model.norm"), (r"^lm_head", "language_model.lm_head"),
             (r"transformer\.visual\.conv1", f"{EMBED}patch_embedding"), (r".*attn_pool\.pos_embed", ""),
             (r"transformer\.visual\.positional_embedding", f"{EMBED}position_embedding.weight"),
             (r"transformer\.visual\.attn_pool\.(attn\.)?", lambda m: "pool." if m[1] else ""),
             (r"transformer\.visual\.proj", "proj.weight^T"), (r"transformer\.visual\.", "")),
    "moondream": ((r"vision_encoder\.encoder\.model\.visual\.blocks\.", BLOCK),
                  (r"vision_encoder\.encoder\.model\.visual\.patch_embed\.linear", f"{EMBED}patch_embedding"),
                  (r"vision_encoder\.encoder\.model\.visual\.pos_embed", f"{EMBED}position_embedding.weight"),
                  (r"vision_encoder\.encoder\.model\.visual\.", "vision_tower.vision_model.post_layer"),
                  (r"\.norm([12])\.", r".layer_norm\1."), (r"attn\.qkv", "self_attn.[qkv]_proj"),
                  (r"\.attn\.proj", ".self_attn.out_proj"),
                  (r"vision_encoder\.projection\.mlp\.fc([12])", lambda m: f"projection.{2 * int(m[1]) - 2}"),
                  (r"text_model\.lm_head\.ln", "language_model.model.final_layernorm"),
                  (r"text_model\.lm_head\.linear", "language_model.lm_head"),
                  (r"text_model\.transformer\.embd\.wte", "language_model.model.embed_tokens"),
                  (r"text_model\.transformer\.h\.", LAYER), (r"\.ln\.", ".input_layernorm."),
                  (r"mixer\.Wqkv", "self_attn.[qkv]_proj"), (r"mixer\.out_proj", "self_attn.dense"))}


def rename_public(state, cfg, own):
    """The weights of a VLM as its authors publish them -> {our name: tensor}. own: {our name: our tensor}."""
    if cfg.backbone not in PUBLIC:
        raise ValueError(f"{cfg.backbone}: no list of its public weights' names could be had; start from a "
                         f"checkpoint of ours, or --init none. With a list: {', '.join(PUBLIC)}.")
    out = {}
    for name, t in state.items():
        for old, new in PUBLIC[cfg.backbone]:
            name = re.sub(old, new, name)
        if "[" in name:                                        # q, k, v in a row, or so for each head
            heads = cfg.vit_heads if "[QKV]" in name else 1
            parts = [x.flatten(0, 1) for x in t.unflatten(0, (heads, 3, -1)).unbind(1)]
            name = "backbone." + name.replace("[QKV]", "[qkv]")
            out |= {name.replace("[qkv]", x): part for x, part in zip("qkv", parts)}
        elif name:
            out["backbone." + name.removesuffix("^T")] = t.T if name.endswith("^T") else t
    if cfg.backbone == "qwen":                                 # no bias of patches; its places are 16 x 16
        place = f"backbone.{EMBED}position_embedding.weight"
        out[place] = resample(out[place], cfg.image_size // cfg.patch_size)
        out[f"backbone.{EMBED}patch_embedding.bias"] = torch.zeros_like(out[place][0])
    return {name: t.reshape(own[name].shape) if name in own and t.numel() == own[name].numel() else t
            for name, t in out.items()}


def start_from_public(folder, cfg, attn):
    """A model whose backbone is the VLM in a folder of Hugging Face's layout; the rest is fresh."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"--init {folder}: neither our checkpoint nor *.safetensors or pytorch_model*.bin.")
    model = Model(cfg, attn=attn)
    own = {name: t for name, t in model.state_dict().items() if name.startswith("backbone.")}
    state = rename_public({n: t for file in files for n, t in load_weights(file).items()}, cfg, own)
    check_fit(own, state, folder)
    model.load_state_dict({name: t.float() for name, t in state.items()}, strict=False, assign=True)
    model.fresh, model.preset = [name for name, _ in model.named_children() if name != "backbone"], "custom"
    model.origin = {"started from": str(folder)}
    return model


def from_pretrained(path_or_id, *, preset=None, config=None, tokenizer=None, attn="auto", device="cpu",
                    dtype=None, allow_fresh=False, **overrides):
    """Load a checkpoint: our folder, or an official .pt / .ckpt (of KosMos or PaliGemma) and its JSON.

    allow_fresh: or the backbone's public weights (a folder in Hugging Face's layout), to train from.

    config: the JSON, if neither beside the file nor in ../configs; else `preset`. tokenizer: a path, hub id,
    or tokenizer. dtype: bf16 | fp32. overrides: other Config values. ValueError: not there, torn, another's.
    """
    device, dtype = pick_device(device), str(dtype or "").removeprefix("torch.")
    overrides |= {"compute": {"bfloat16": "bf16", "float32": "fp32"}.get(dtype, dtype)} if dtype else {}
    if isinstance(tokenizer, (str, Path)):
        overrides["tokenizer"], tokenizer = str(tokenizer), None
    wanted = ["*.json", "*.safetensors" if allow_fresh else "model.safetensors"]
    path, own_tokenizer = resolve(path_or_id, wanted), None
    # "flash" may be asked for a model that goes from here to CUDA later (train.py), so the machine decides
    attn = pick_attention(attn, "cuda" if attn == "flash" and torch.cuda.is_available() else device)
    if path.is_dir() and allow_fresh and "method" not in read_json(path / "config.json"):
        cfg = configure(PRESETS[preset] if preset else Config(), **overrides)
        model = start_from_public(path, cfg, attn)
        model.tokenizer = load_tokenizer(cfg, path) if tokenizer is None else tokenizer
        return model.to(device)
    if path.is_dir():
        saved, weights = load_config(path, "robovlms"), path / "model.safetensors"
        if preset not in (None, saved["preset"]):
            raise ValueError(f"preset {preset!r} was asked for, {path} is {saved['preset']!r}; leave it out.")
        cfg, preset = configure(Config(), **{**saved["config"], **overrides}), saved["preset"]
        own_tokenizer, origin = None if "tokenizer" in overrides else path, saved["origin"]
        state, stats = load_weights(weights), read_json(path / "dataset_statistics.json")
    else:
        weights, loaded, origin = path, load_weights(path), {"started from": str(path_or_id)}
        state = loaded.get("state_dict", loaded.get("model_state_dict")) if isinstance(loaded, dict) else None
        beside = (path.with_suffix(".json"), path.parent.parent / "configs" / f"{path.stem}.json")
        config = config or next((p for p in beside if p.is_file() and not preset), None)
        if not isinstance(state, dict) or not (config or preset):
            raise ValueError(f"{path}: a released .pt or .ckpt, with state_dict or model_state_dict in it, "
                             f"and its config=FILE.json are needed (or a preset: {', '.join(PRESETS)}).")
        choose("there is no preset", preset or "tiny", list(PRESETS))
        cfg = read_official_config(config)[0] if config else PRESETS[preset]
        cfg = configure(cfg, **overrides)
        stats = official_stats(*[n for n in BOUNDS if (n == "calvin") == (cfg.gripper == "signed")])
        state, preset = rename_official(state), preset or "custom"
    with no_init_weights():                                    # the file's tensors move in below
        model = Model(cfg, attn=attn)
    check_fit(model.state_dict(), state, weights)
    model.load_state_dict({name: t.float() for name, t in state.items()}, assign=True)
    model.tokenizer = load_tokenizer(cfg, own_tokenizer) if tokenizer is None else tokenizer
    model.stats, model.preset, model.origin = stats, preset, origin
    return model.to(device).eval()


# ---- Demo -------------------------------------------------------------------------------------------------

def demo():
    """Overfit two synthetic samples with the tiny preset (a few seconds on one core), then act on them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)                                   # matrices this small gain nothing from more
    cfg, rng, start = PRESETS["tiny"], np.random.default_rng(0), time.time()
    low, high = [-0.1] * 6 + [0], [0.1] * 6 + [1]
    stats = {"synthetic": {"action": {"q01": low, "q99": high, "min": low, "max": high,
                                      "mask": [True] * 6 + [False]}}}
    samples = []
    for colour, rgb, gripper in (("red", (255, 0, 0), 0), ("green", (0, 160, 0), 1)):
        frames, action = np.full((2, 64, 64, 3), rgb, np.uint8), np.append(rng.uniform(-0.1, 0.1, 6), gripper)
        samples.append({"images": {"third": frames[1]}, "history_images": {"third": frames[:1]},
                        "instruction": f"pick up the {colour} cube", "history_actions": action[None],
                        "actions": np.tile(action, (cfg.horizon, 1)), "dataset": "synthetic"})
    model = Model(cfg, load_tokenizer(cfg), stats)
    batch = collate([prepare(s, cfg, model.tokenizer, stats, train=True) for s in samples], cfg)
    optimizer = torch.optim.AdamW(model.param_groups(2e-3, 0.0))
    for step in range(61):
        loss, log = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 15 == 0:
            print(f"step {step:3d} | loss {log['loss']:.4f} | {time.time() - start:.1f} s", flush=True)
    chunks, _ = model.eval().act(samples)                                              # (2, K, A)
    for sample, chunk in zip(samples, chunks):
        print(f"{sample['instruction']}: wanted {np.round(sample['actions'][0], 2)} at every step, "
              f"predicted\n{np.round(chunk, 2)}")


if __name__ == "__main__":
    cli(demo)
