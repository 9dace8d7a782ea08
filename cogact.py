"""
CogACT: a vision-language model thinks, a small diffusion transformer acts.
Paper: https://arxiv.org/abs/2411.19650    Official code: https://github.com/microsoft/CogACT

   images (B, V, 224, 224, 3) -> DINOv2 | SigLIP -> (B, 256, 2176) -> projector -> (B, 256, 4096) -+
                                                                                                   v
   "move sponge near apple" -> prompt -> tokens ------------------------------> Llama-2 -> last hidden states
                                                                                                   |
                                     cognition feature z (B, 1, 4096): that of the last token  <---+
                                                       |
   noise (B, 16, 7) --> DiT (z and time are one more token), 10 DDIM steps, guidance 1.5
                                                       --> chunk (B, 16, 7) in [-1, 1]
                                                       --> gripper to 0/1, the rest un-normalized (unnorm_key)

What is special: one VLM forward per chunk, not one per action; the VLM's gradient comes only through z;
everything is trained with the DiT's noise-prediction error alone. No robot state and no history go in.

Actions: dx dy dz [m], droll dpitch dyaw [rad], deltas per control step; gripper absolute, 1 open, 0 closed.

    python cogact.py                                                  # tiny demo, CPU, no download
    python cogact.py --export runs/cogact/last out/checkpoints/me.pt  # our checkpoint -> the official layout
    torchrun --standalone --nproc_per_node=8 train.py --model cogact --preset base --init FILE.pt --data ...
"""
import functools
import math
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from common import (ChunkEnsemble, Graphs, Parser, adaptive_weights, atomic_write, attention, check_config,
                    check_fit, check_observation, choose, cli, hf_attention, keyed_generator, keyed_rng,
                    load_config, load_weights, normalize, pick_attention, pick_stats, read_json, resolve,
                    save_folder, tiny_tokenizer, unnormalize, write_json)
from common import device as pick_device


# ---- Config -----------------------------------------------------------------------------------------------

@dataclass
class Config:
    """Sizes, the sampler, the data's form and the recipe of one model; a preset is one of these."""
    # what goes in and out
    views: tuple = ("third",)         # cameras, in order, by their names in the sample (official: one camera)
    image_size: int = 224             # side of the square picture the towers see [pixels]
    horizon: int = 16                 # T: actions in one chunk (official: future_action_window_size + 1)
    action_dim: int = 7               # A: dx dy dz [m], droll dpitch dyaw [rad], gripper [0 closed .. 1 open]
    gripper_index: int = 6            # the dim thresholded to 0/1, not normalized; -1: none
    state_dim: int = 0                # S: length of a state that comes along; checked, never read; 0: any
    # vision: DINOv2 ViT-L/14 with registers, SigLIP so400m/14 (timm's sizes)
    patch_size: int = 14
    dino_width: int = 1024
    dino_depth: int = 24              # the last block of each tower is in the checkpoint, and never run
    dino_heads: int = 16
    dino_mlp: int = 4096
    registers: int = 4                # DINOv2's extra tokens, beside its class token
    layer_scale: float = 1e-5         # DINOv2's LayerScale when made from scratch
    siglip_width: int = 1152
    siglip_depth: int = 27
    siglip_heads: int = 16
    siglip_mlp: int = 4304            # int(1152 * 3.7362)
    # language: Llama-2-7B
    llm_width: int = 4096             # D: also the width of the cognition feature
    llm_depth: int = 32
    llm_heads: int = 32
    llm_mlp: int = 11008
    llm_init: float = 0.02            # standard deviation of fresh weights
    vocab: int = 32064                # 32000 + <PAD>, rounded up to a multiple of 64
    bos_id: int = 1                   # <s>
    space_id: int = 29871             # "▁": training prompts end in "Out: </s>", a lone space precedes </s>
    eos_id: int = 2                   # </s>: its hidden state is the cognition feature
    pad_id: int = 32000               # <PAD>, on the right
    tokenizer: str = "meta-llama/Llama-2-7b-hf"   # "tiny", a folder or file, or a hub id (this one is gated)
    # action head: DiT-B
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    frequencies: int = 256            # channels of the time step's sinusoid
    num_train_steps: int = 100        # diffusion steps the noise schedule is made of
    repeated_diffusion_steps: int = 8 # R: noisy copies of a chunk per VLM forward; see Model.loss
    condition_dropout: float = 0.1    # how often z is replaced by `uncondition` in training
    # acting
    sampler: str = "ddim"             # or "ddpm": all num_train_steps, with fresh noise at each
    sample_steps: int = 10            # of DDIM
    cfg_scale: float = 1.5            # guidance; <= 1 switches it off
    execute: int = 1                  # actions played per chunk; 1: predict at every step and ensemble
    ensemble_horizon: int = 2         # chunks averaged, the newest counts (2 Google robot, 7 WidowX)
    ensemble_alpha: float = 0.1
    center_crop: bool = False         # the official server's 0.9-area crop; published SIMPLER numbers: none
    control_hz: float = 5.0           # rate of the recorded actions [Hz]
    compute: str = "auto"             # VLM arithmetic: bf16 | fp32 | auto = bf16 autocast on CUDA (official)
    # data
    augment: bool = True              # crop and colour augmentation of training pictures
    train_resize: str = "lanczos"     # or "bicubic"; of training pictures only, see prepare
    padding: str = "neutral"          # beyond an episode's end: neutral = no motion, and in the loss (the
    #                                   official recipe, made finite); faithful = to the bit; mask = not in it
    data: str = ""                    # train.py's --data when none is given
    # training (official conf/vla.py and readme: 8 GPUs x 32)
    lr: float = 2e-5
    head_lr: float = 0.0              # of the DiT, which starts from nothing; 0: lr (official)
    lr_schedule: str = "constant"     # constant | cosine
    warmup: int = 0                   # steps
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0            # global gradient norm
    ema: float = 0.0                  # decay of an average of all weights (official: of the DiT); 0: none
    batch: int = 32                   # samples per process
    steps: int = 135_000              # paper: 135K
    init: str = ""                    # weights that train.py starts from, a path beside it; "": none
    seed: int = 42

    def __post_init__(self):
        ids = ("bos_id", "space_id", "eos_id", "pad_id")
        check_config(
            vars(self), vars(Config), multiples=(
                ("image_size", "patch_size"), ("dino_width", "dino_heads"), ("siglip_width", "siglip_heads"),
                ("llm_width", "llm_heads", 2), ("width", "heads"), ("frequencies", 2)),
            least={**dict.fromkeys((*ids, "state_dim", "warmup", "seed"), 0), "gripper_index": -1},
            most={"execute": "horizon", "ensemble_horizon": "horizon", "condition_dropout": 1},
            below={**dict.fromkeys(ids, "vocab"), "gripper_index": "action_dim", "ema": 1, "betas": 1,
                   "seed": 2**63},
            choices={"padding": ("neutral", "faithful", "mask"), "sampler": ("ddim", "ddpm"),
                     "compute": ("auto", "bf16", "fp32"), "train_resize": ("lanczos", "bicubic"),
                     "lr_schedule": ("constant", "cosine")})


PRESETS = {
    "small": Config(width=384, depth=6, heads=4),          # DiT-S, 12 M; heads of 96
    "base": Config(),                                      # DiT-B, 89 M: the checkpoint of the paper's tables
    "large": Config(width=1024, depth=24, heads=16),       # DiT-L, 308 M
    "tiny": Config(                                        # 1.6 M trained parameters, for two CPU cores
        image_size=96, patch_size=12, dino_width=64, dino_depth=4, dino_heads=2, layer_scale=1.0,
        dino_mlp=256, siglip_width=64, siglip_depth=4, siglip_heads=2, siglip_mlp=239, llm_width=128,
        llm_depth=4, llm_heads=4, llm_mlp=256, llm_init=0.06, vocab=512, space_id=3, pad_id=4,
        tokenizer="tiny", width=96, depth=3, heads=4, horizon=8, execute=4, cfg_scale=2.0, augment=False,
        train_resize="bicubic", padding="mask", data="tabletop", lr=3e-4, head_lr=2.4e-3,
        lr_schedule="cosine", warmup=50, batch=32, steps=2000, init="assets/cogact_tiny_trunk.safetensors"),
}
PREDICTS = "actions"              # of a sample; see the top of common.py


def configure(cfg, **overrides):
    """`cfg` with other values; an unknown name is a ValueError with the nearest match."""
    for name in overrides:
        choose("cogact.Config has no field", name, [f.name for f in fields(Config)])
    return replace(cfg, **overrides)


# ---- Text, pictures, actions: what goes into the model ----------------------------------------------------

def load_tokenizer(cfg, folder=None):
    """The tokenizer in a checkpoint folder, else `cfg.tokenizer`: "tiny", a folder or file, a hub id."""
    if cfg.tokenizer == "tiny":
        return tiny_tokenizer()
    own = folder is not None and (Path(folder) / "tokenizer.json").is_file()
    path = Path(folder) if own else resolve(cfg.tokenizer, ["tokenizer.json"], "--tokenizer")
    path = path / "tokenizer.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(f"--tokenizer {cfg.tokenizer}: Llama-2's tokenizer.json is needed, {path} is none.")
    # The file itself states Llama-2's rules (legacy spaces, merges, <s> in front). transformers' own
    # LlamaTokenizer would derive them anew from tokenizer.model, and splits double spaces differently.
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>",
                                       unk_token="<unk>")
    except Exception as e:                                     # tokenizers raises nothing more specific
        raise ValueError(f"--tokenizer: {path} is torn or no Llama-2 tokenizer.json: {str(e)[:60]}.") from e


def build_prompt(instruction):
    """The prompt up to "Out:", as in training (OpenVLA's PurePromptBuilder: spaces inside stay)."""
    question = f"What action should the robot take to {instruction.lower()}?"
    return f"In: {question.replace('<image>', '').strip()}\nOut:"


def encode_prompt(instruction, cfg, tokenizer):
    """Token ids, list: <s> prompt ▁ </s>. Training tokenizes "...Out: </s>" as one string: the same ids."""
    ids = list(tokenizer(build_prompt(instruction), add_special_tokens=True).input_ids)
    ids = (ids if ids[:1] == [cfg.bos_id] else [cfg.bos_id] + ids) + [cfg.space_id, cfg.eos_id]
    if max(*ids, cfg.pad_id) >= cfg.vocab:
        raise ValueError(f"--tokenizer {cfg.tokenizer}: token {max(*ids, cfg.pad_id)} is beyond the model's "
                         f"vocab={cfg.vocab}; use the tokenizer (and pad_id) it was trained with.")
    return ids


def resize(image, size, how=Image.Resampling.BICUBIC):
    """uint8 (h, w, 3) -> (size, size, 3), aspect ratio not kept; PIL's antialiased filters."""
    same = image.shape[:2] == (size, size)
    return image if same else np.array(Image.fromarray(image).resize((size, size), how))


def resize_for_training(image, size):
    """As `resize`, with TensorFlow's Lanczos3: in floats, so that overshoot is cut off only at the end."""
    if image.shape[:2] == (size, size):
        return image
    channels = [Image.fromarray(c.astype(np.float32)) for c in np.moveaxis(image, -1, 0)]
    x = np.stack([c.resize((size, size), Image.Resampling.LANCZOS) for c in channels], -1)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def deploy_crop(image, size, shift_left=0, area=0.9):          # uint8 (h, w, 3) -> (size, size, 3)
    """The official server's view: central square, of it the central `area`; Lanczos. shift_left: unused."""
    h, w, _ = image.shape
    side = min(h, w)                                         # official: landscape only; here any aspect ratio
    left, top = min(max((w - side) // 2 - shift_left, 0), w - side), (h - side) // 2
    image = resize(image[top:top + side, left:left + side], size, Image.Resampling.LANCZOS)
    side = int(size * math.sqrt(area))
    start = int((size - side) * 0.5)
    return resize(image[start:start + side, start:start + side], size, Image.Resampling.LANCZOS)


def crop_and_resize(x, y0, x0, side):
    """Bilinear, corners aligned: row i of the output is row y0 (h - 1) + i side of x. x: float (h, w, 3)."""
    h, w, _ = x.shape
    rows, cols = y0 * (h - 1) + np.arange(h) * side, x0 * (w - 1) + np.arange(w) * side
    r, c = np.clip(rows.astype(int), 0, h - 2), np.clip(cols.astype(int), 0, w - 2)
    fr, fc = (rows - r)[:, None, None].astype(np.float32), (cols - c)[None, :, None].astype(np.float32)
    x = x[:, c] * (1 - fc) + x[:, c + 1] * fc
    return x[r] * (1 - fr) + x[r + 1] * fr


def rgb_to_hsv(x):
    """(h, w, 3) in [0, 1] -> hue, saturation, value, each (h, w) in [0, 1]."""
    high, span = x.max(-1), x.max(-1) - x.min(-1)
    r, g, b = np.moveaxis(x, -1, 0)
    some, bright = np.where(span > 0, span, 1), np.where(high > 0, high, 1)
    hue = np.where(high == r, (g - b) / some, np.where(high == g, (b - r) / some + 2, (r - g) / some + 4))
    return hue / 6 % 1, span / bright, high


def hsv_to_rgb(hue, saturation, value):
    """The inverse of rgb_to_hsv: each channel is `value` less a trapezoid over the hue."""
    k = (np.array([5, 3, 1], np.float32) + hue[..., None] * 6) % 6                     # (h, w, 3)
    return value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def augment_stages(image, y0, x0, side, brightness, contrast, saturation, hue):
    """The official augmentation's five operations in turn; yields float (h, w, 3) in [0, 1] after each."""
    x = np.clip(crop_and_resize(image.astype(np.float32) / 255, y0, x0, side), 0, 1)
    yield x
    x = np.clip(x + np.float32(brightness), 0, 1)
    yield x
    mean = x.mean((0, 1))                                                              # per channel
    x = np.clip((x - mean) * np.float32(contrast) + mean, 0, 1)
    yield x
    h, s, v = rgb_to_hsv(x)
    x = np.clip(hsv_to_rgb(h, np.clip(s * np.float32(saturation), 0, 1), v), 0, 1)
    yield x
    h, s, v = rgb_to_hsv(x)
    yield np.clip(hsv_to_rgb((h + np.float32(hue)) % 1, s, v), 0, 1)


def to_uint8(x):
    """[0, 1] -> uint8 as TensorFlow's convert_image_dtype does it: times 255.5, then cut off."""
    return (x * 255.5).astype(np.uint8)


def augment(image, rng):
    """Random crop and colours for a training picture, uint8 in and out (official: dlimp's augment_image)."""
    side = math.sqrt(0.9)                                                           # area 0.9 exactly, square
    # FAITHFUL: the official code draws both offsets with one stateless seed, so they are equal, and crops
    # slide along the diagonal only. Test: test_cogact.py::test_crops_slide_along_the_diagonal_only
    y0 = x0 = rng.uniform(0, 1 - side)
    colours = rng.uniform(-0.2, 0.2), rng.uniform(0.8, 1.2), rng.uniform(0.8, 1.2), rng.uniform(-0.05, 0.05)
    *_, x = augment_stages(image, y0, x0, side, *colours)
    return to_uint8(x)


def binarize_gripper(gripper):
    """(N,) recorded opening -> 0/1: above 0.95 open, below 0.05 closed, in between the state reached next."""
    # FAITHFUL: in-between values at an episode's end become its raw last value, e.g. 0.3.
    # Test: test_cogact.py::test_data_transforms_match
    out, state = np.empty(len(gripper), np.float32), gripper[-1]
    for i in reversed(range(len(gripper))):
        state = 1 if gripper[i] > 0.95 else 0 if gripper[i] < 0.05 else state
        out[i] = state
    return out


def absolute_gripper(command):
    """(N,) relative commands, > 0.1 closes, < -0.1 opens, else hold -> (N,) 1 open, 0 closed.

    Before the first command the gripper is taken to be in the other state; without any command, open.
    """
    command = np.where(command > 0.1, 0, np.where(command < -0.1, 1, -1))              # -1: hold
    given = command[command >= 0]
    out, state = np.empty(len(command), np.float32), 1 - given[0] if len(given) else 1
    for i, c in enumerate(command):
        state = c if c >= 0 else state
        out[i] = state
    return out


def bridge_actions(actions, states):
    """BridgeData V2 as CogACT trains on it: movements are the poses actually reached, not the commanded ones.

    (N, 7), (N, 7) -> (N - 2, 7), for frames 1 .. N - 2; the gripper is the commanded one, binarized.
    The official data recipe: for your reader of the real dataset (nothing here calls it).
    """
    moved = states[2:, :6] - states[1:-1, :6]
    return np.concatenate([moved, binarize_gripper(actions[:, 6])[1:-1, None]], 1).astype(np.float32)


def rt1_actions(world_vector, rotation_delta, gripper_closedness):
    """RT-1 (fractal) and kuka, for your reader: (N, 3), (N, 3), (N, 1) relative gripper command -> (N, 7)."""
    gripper = absolute_gripper(gripper_closedness[:, 0])[:, None]
    return np.concatenate([world_vector, rotation_delta, gripper], 1).astype(np.float32)


def neutral_action(stats, faithful=False):
    """The normalized action that means "no motion", (A,): what 0 becomes (not 0!), by the training formula.

    Officially it is not clipped, so a dim with a constant value other than 0 gives millions. Ours is clipped,
    and 0 for constant dims, as in `normalize`. faithful=True: as in the official loader.
    """
    q01, q99 = np.asarray(stats["q01"], np.float64), np.asarray(stats["q99"], np.float64)
    neutral = 2 * (0 - q01) / (q99 - q01 + 1e-8) - 1
    if not faithful:
        neutral = np.where(np.asarray(stats["min"]) == np.asarray(stats["max"]), 0, np.clip(neutral, -1, 1))
    return neutral.astype(np.float32)


def pad_chunk(chunk, valid, stats, faithful=False):
    """Fill the steps beyond an episode's end: no motion, and the gripper (any unmasked dim) as it was last.

    chunk: (T, A) normalized, valid: (T,) True up to the episode's last step. Returns (T, A) float32.
    """
    moving = np.asarray(stats.get("mask", np.ones(chunk.shape[1], bool)), bool)        # (A,)
    after = np.where(moving, neutral_action(stats, faithful), chunk[valid][-1])        # (A,)
    return np.where(valid[:, None], chunk, after).astype(np.float32)


def check_gripper(stats, index):
    """A ValueError for statistics that scale the gripper, which is a switch: decode_actions makes it 0/1."""
    if index >= 0 and "mask" in stats and stats["mask"][index]:
        raise ValueError(f"the statistics' mask is True at gripper_index={index}; set it to False there.")


def prepare(sample, cfg, tokenizer, stats=None, key=None, train=False):
    """One sample (or observation) -> a dict of CPU tensors; runs in loader workers, knows no weights.

    images (V, h, w, 3) uint8, ids (L,) int64; with actions also actions (T, A) normalized and loss_mask (T,).
    key: an int that fixes all random draws made for this sample (here augmentation, in Model.loss the noise).
    """
    check_observation(sample, cfg.views, cfg.state_dim)
    images = sample["images"]
    images = [images[view] for view in cfg.views] if cfg.views[0] in images else list(images.values())
    if cfg.center_crop and not train:
        images = [deploy_crop(image, cfg.image_size) for image in images]
    # FAITHFUL: TensorFlow's Lanczos3 in training, PIL's bicubic in use (a center_crop has the size already).
    # Test: test_cogact.py::test_pictures_are_lanczos_in_training_and_bicubic_in_use
    fit = resize_for_training if train and cfg.train_resize == "lanczos" else resize
    images = [fit(image, cfg.image_size) for image in images]
    if cfg.augment and train:
        rng = np.random.default_rng() if key is None else keyed_rng(key, 1)
        images = [augment(image, rng) for image in images]
    out = {"images": torch.from_numpy(np.stack(images)),                               # (V, h, w, 3)
           "ids": torch.tensor(encode_prompt(sample["instruction"], cfg, tokenizer))}  # (L,)
    if "actions" in sample:
        actions = np.asarray(sample["actions"], np.float32)
        if actions.shape != (cfg.horizon, cfg.action_dim):
            raise ValueError(f"actions: (horizon, action_dim) = {(cfg.horizon, cfg.action_dim)} is expected, "
                             f"found {actions.shape}. Set these two, or fix the data.")
        action_stats = pick_stats(stats, sample.get("dataset"))
        valid = np.asarray(sample.get("loss_mask", np.ones(cfg.horizon)), bool)        # (T,)
        if valid.shape != (cfg.horizon,) or not valid.any():
            raise ValueError(f"loss_mask={valid.astype(int).tolist()}: {cfg.horizon} values, not all 0, are "
                             "expected; leave a sample without actions out.")
        # gripper left un-normalized: its mask is False, see common.normalize
        actions = pad_chunk(normalize(actions, action_stats), valid, action_stats, cfg.padding == "faithful")
        check_gripper(action_stats, cfg.gripper_index)
        out["actions"] = torch.from_numpy(actions)                                     # (T, A)
        out["loss_mask"] = torch.from_numpy(valid if cfg.padding == "mask" else np.ones_like(valid))
    if key is not None:
        out["key"] = torch.tensor(key)
    return out


def collate(prepared, cfg):
    """List of prepared samples -> batch; ids are padded on the right, `length` (B,) counts the real ones."""
    batch = {name: torch.stack([p[name] for p in prepared]) for name in prepared[0] if name != "ids"}
    batch["length"] = torch.tensor([len(p["ids"]) for p in prepared])                  # (B,)
    batch["ids"] = nn.utils.rnn.pad_sequence([p["ids"] for p in prepared], True, cfg.pad_id)    # (B, L)
    return batch


# ---- Building blocks --------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=256)
def constant(values, device):
    """A float32 tensor of fixed numbers, put on a device once; later calls copy and wait for nothing."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def init_linear(module):
    """Xavier-uniform weight and zero bias for a Linear; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Attention(nn.Module):
    """Self-attention over all tokens; q, k, v in one projection (timm's names, ViT and DiT alike)."""

    def __init__(self, width, heads, attn):
        super().__init__()
        self.heads, self.attn = heads, attn
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        """(B, L, D) -> (B, L, D)."""
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).unbind(2)     # each (B, L, H, K)
        return self.proj(attention(q, k, v, self.attn).reshape(B, L, D))               # (B, L, D)


class MLP(nn.Module):
    """Linear, GELU, Linear; gelu: none (exact) | tanh."""

    def __init__(self, width, hidden, gelu="none"):
        super().__init__()
        self.fc1, self.fc2, self.gelu = nn.Linear(width, hidden), nn.Linear(hidden, width), gelu

    def forward(self, x):
        """(B, L, D) -> (B, L, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class LayerScale(nn.Module):
    """A learned factor per channel, which starts at `value` (DINOv2)."""

    def __init__(self, width, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x):
        """(B, L, D) -> (B, L, D)."""
        return x * self.gamma


class ViTBlock(nn.Module):
    """Pre-norm transformer block. GELU is exact (erf) in both towers, not SigLIP's usual tanh form."""

    def __init__(self, width, heads, hidden, layer_scale, attn):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads, attn), MLP(width, hidden)
        scale = functools.partial(LayerScale, width, layer_scale) if layer_scale else nn.Identity
        self.ls1, self.ls2 = scale(), scale()

    def forward(self, x):
        """(B, L, D) -> (B, L, D)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class AttentionPool(nn.Module):
    """SigLIP's pooling head. CogACT never runs it: it is here because checkpoints carry its parameters."""

    def __init__(self, width, hidden):
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj, self.norm, self.mlp = nn.Linear(width, width), nn.LayerNorm(width), MLP(width, hidden)


def sincos_2d(side, width):
    """2-D sine-cosine position embedding (1, side * side, width): half of the channels say y, half say x."""
    omega = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * omega                                        # (side, width/4)
    one = torch.cat([angle.sin(), angle.cos()], 1)                                     # (side, width/2)
    y, x = one[:, None].expand(side, side, -1), one[None].expand(side, side, -1)
    return torch.cat([y, x], 2).reshape(1, side * side, -1)


class ViT(nn.Module):
    """A timm vision transformer, read out before its last block: patch features without the final norm.

        DINOv2:   cls | 4 registers | patches (P)      the prefix has no position, and is dropped at the end
        SigLIP:   patches (P)                          registers=0, no class token either
    """

    def __init__(self, cfg, width, depth, heads, hidden, registers, layer_scale, attn):
        super().__init__()
        patches = (cfg.image_size // cfg.patch_size) ** 2
        conv = nn.Conv2d(3, width, cfg.patch_size, stride=cfg.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        self.pos_embed = nn.Parameter(torch.empty(1, patches, width))
        self.prefix = 1 + registers if registers else 0
        if registers:
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
            self.reg_token = nn.Parameter(torch.empty(1, registers, width))
        else:
            self.attn_pool = AttentionPool(width, hidden)
        self.blocks = nn.ModuleList(ViTBlock(width, heads, hidden, layer_scale, attn) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def init_weights(self):
        """For towers made from scratch; for the official sizes, train.py's --init brings trained ones."""
        self.apply(init_linear)
        _, P, D = self.pos_embed.shape
        nn.init.xavier_uniform_(self.patch_embed["proj"].weight.flatten(1))
        nn.init.zeros_(self.patch_embed["proj"].bias)
        # from where things are to be found: tiny towers learn it sooner from these than from random ones
        with torch.no_grad():
            self.pos_embed.copy_(0.5 * sincos_2d(math.isqrt(P), D))
        for token in (self.cls_token, self.reg_token) if self.prefix else (self.attn_pool.latent,):
            nn.init.normal_(token, std=0.02)

    def forward(self, pixels):
        """(N, 3, h, w) -> (N, P, D)."""
        N = pixels.shape[0]
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)            # (N, P, D)
        x = x + self.pos_embed
        if self.prefix:
            x = torch.cat([self.cls_token.expand(N, -1, -1), self.reg_token.expand(N, -1, -1), x], 1)
        for block in self.blocks[:-1]:                                             # nobody reads the last one
            x = block(x)                                                           # (N, prefix + P, D)
        return x[:, self.prefix:]


# ---- The vision-language model ----------------------------------------------------------------------------

DINO_PIXELS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # mean, standard deviation of R, G, B
SIGLIP_PIXELS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def normalize_pixels(images, mean, std):
    """uint8 (N, h, w, 3) -> float32 (N, 3, h, w), on the images' device."""
    x = images.permute(0, 3, 1, 2).float() / 255                                       # (N, 3, h, w)
    mean, std = (constant(v, x.device)[:, None, None] for v in (mean, std))            # (3, 1, 1)
    return (x - mean) / std


class VisionBackbone(nn.Module):
    """Both towers look at the same picture; their channels side by side, DINOv2 first."""

    def __init__(self, cfg, attn):
        super().__init__()
        self.dino_featurizer = ViT(cfg, cfg.dino_width, cfg.dino_depth, cfg.dino_heads, cfg.dino_mlp,
                                   cfg.registers, cfg.layer_scale, attn)
        self.siglip_featurizer = ViT(cfg, cfg.siglip_width, cfg.siglip_depth, cfg.siglip_heads,
                                     cfg.siglip_mlp, 0, 0, attn)

    def forward(self, images):
        """uint8 (N, h, w, 3) -> (N, P, dino width + siglip width)."""
        return torch.cat([self.dino_featurizer(normalize_pixels(images, *DINO_PIXELS)),
                          self.siglip_featurizer(normalize_pixels(images, *SIGLIP_PIXELS))], 2)


class Projector(nn.Module):
    """Patch features -> the language model's embedding space ("no-align+fused-gelu-mlp")."""

    def __init__(self, width, out):
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, out),
                                       nn.GELU(), nn.Linear(out, out))

    def forward(self, x):
        """Features of both towers (B, P, .) -> the language model's width (B, P, D)."""
        return self.projector(x)


class LLMBackbone(nn.Module):
    """Llama-2 from transformers, under the official name `llm`."""

    def __init__(self, cfg, attn):
        super().__init__()
        attn = "sdpa" if attn == "flash" and cfg.compute == "fp32" else attn           # flash: 16 bits only
        self.llm = LlamaForCausalLM(LlamaConfig(
            vocab_size=cfg.vocab, hidden_size=cfg.llm_width, intermediate_size=cfg.llm_mlp,
            num_hidden_layers=cfg.llm_depth, num_attention_heads=cfg.llm_heads,
            num_key_value_heads=cfg.llm_heads, rms_norm_eps=1e-5, max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
            initializer_range=cfg.llm_init, bos_token_id=cfg.bos_id, eos_token_id=cfg.eos_id, use_cache=False,
            attn_implementation=hf_attention(attn)))

    def forward(self, rows):
        """Embeddings (B, L, D) -> hidden states after the final norm (B, L, D). Causal; no head, no cache.

        The layers are called one by one: LlamaModel.forward would first look into the positions, and so wait
        for the device. No padding mask is needed: padding is on the right, where a causal model's real tokens
        cannot see it, and without a mask SDPA and flash-attn run their causal kernels.
        """
        model, L = self.llm.model, rows.shape[1]
        positions = torch.arange(L, device=rows.device)[None]                          # (1, L)
        rotary, mask = model.rotary_emb(rows, position_ids=positions), None
        if model.config._attn_implementation == "eager":       # it knows no other way to be causal
            mask = torch.full((1, 1, L, L), float("-inf"), device=rows.device).triu(1)
        for layer in model.layers:
            rows = layer(rows, attention_mask=mask, position_embeddings=rotary)
        return model.norm(rows)


# ---- The action head --------------------------------------------------------------------------------------

class Embedder(nn.Module):
    """One Linear: actions -> the DiT's width."""

    def __init__(self, width_in, width):
        super().__init__()
        self.linear = nn.Linear(width_in, width)

    def forward(self, x):
        """(B, T, A) -> (B, T, D)."""
        return self.linear(x)


def sinusoid(t, dim, max_period=10000):
    """Diffusion steps t (n,), as they are (0..99) -> (n, dim) float32, cosines first."""
    half = dim // 2
    f = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None].float() * f                                                     # (n, dim/2)
    return torch.cat([angle.cos(), angle.sin()], 1)


class TimestepEmbedder(nn.Module):
    """Diffusion steps -> the DiT's width: a sinusoid, then two Linears."""

    def __init__(self, width, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        """Steps t (n,) -> (n, D)."""
        # the sinusoid is made in float32 whatever the weights are, then cast to their type
        return self.mlp(sinusoid(t, self.frequencies).to(self.mlp[0].weight.dtype))    # (n, D)


class ConditionEmbedder(nn.Module):
    """Cognition feature -> the DiT's width. `uncondition` replaces z before the Linear: it has z's width."""

    def __init__(self, width_in, width):
        super().__init__()
        self.linear = nn.Linear(width_in, width)
        self.uncondition = nn.Parameter(torch.empty(1, width_in))

    def forward(self, z, drop=None):
        """z: (B, 1, D), drop: (B,) True = without condition -> (B, 1, width)."""
        if drop is not None:
            z = torch.where(drop[:, None, None], self.uncondition.to(z.dtype), z)      # (B, 1, D)
        return self.linear(z)


class DiTBlock(nn.Module):
    """Pre-norm, norms without parameters, tanh GELU. No adaLN: the condition is a token like any other."""

    def __init__(self, width, heads, hidden, attn):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn, self.mlp = Attention(width, heads, attn), MLP(width, hidden, "tanh")

    def forward(self, x):
        """(B, L, D) -> (B, L, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """A norm without parameters and a Linear to actions; no adaLN."""

    def __init__(self, width, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)

    def forward(self, x):
        """(B, L, D) -> (B, L, A)."""
        return self.linear(self.norm_final(x))


class DiT(nn.Module):
    """Predicts the noise eps in a noisy chunk x_t, given the step t and the cognition feature z.

        tokens:  c | x_1 ... x_T      c = embedding of t + embedding of z; learned positions on all T + 1
    """

    def __init__(self, cfg, attn):
        super().__init__()
        self.x_embedder = Embedder(cfg.action_dim, cfg.width)
        self.history_embedder = Embedder(cfg.action_dim, cfg.width)                   # never used, see UNUSED
        self.t_embedder = TimestepEmbedder(cfg.width, cfg.frequencies)
        self.z_embedder = ConditionEmbedder(cfg.llm_width, cfg.width)
        self.positional_embedding = nn.Parameter(torch.empty(cfg.horizon + 1, cfg.width))
        self.blocks = nn.ModuleList(DiTBlock(cfg.width, cfg.heads, round(cfg.width * cfg.mlp_ratio), attn)
                                    for _ in range(cfg.depth))
        self.final_layer = FinalLayer(cfg.width, cfg.action_dim)

    def init_weights(self):
        """Official initialization: the last layer starts at zero, so a fresh head predicts eps = 0."""
        self.apply(init_linear)
        for linear in (self.x_embedder.linear, self.history_embedder.linear, self.z_embedder.linear,
                       self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.z_embedder.uncondition, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.normal_(self.positional_embedding, std=self.positional_embedding.shape[1] ** -0.5)

    def denoise(self, x, c):
        """x: (B, T, A), condition token c: (B, 1, D) -> eps (B, T, A)."""
        tokens = torch.cat([c, self.x_embedder(x)], 1) + self.positional_embedding     # (B, 1 + T, D)
        for block in self.blocks:
            tokens = block(tokens)
        return self.final_layer(tokens)[:, 1:]                                         # (B, T, A)

    def forward(self, x, t, z, drop=None):
        """x (B, T, A), t (B,) original steps, z (B, 1, D), drop (B,) True = without z -> eps (B, T, A)."""
        return self.denoise(x, self.t_embedder(t)[:, None] + self.z_embedder(z, drop))


def cosine_betas(steps, offset=0.008, max_beta=0.999):
    """beta_i of the "squaredcos_cap_v2" schedule (Nichol & Dhariwal 2021), float64 (steps,)."""
    u = np.arange(steps + 1, dtype=np.float64) / steps
    alpha_bar = np.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def schedule(betas):
    """Everything a sampler needs, from betas (n,), float64. Variance "fixed small": that of the posterior."""
    abar = np.cumprod(1 - betas)
    prev = np.append(1.0, abar[:-1])                           # alpha_bar of the next cleaner step
    variance = betas * (1 - prev) / (1 - abar)
    return {"betas": betas, "alphas_cumprod": abar, "alphas_cumprod_prev": prev,
            "sqrt_alphas_cumprod": np.sqrt(abar), "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1), "posterior_variance": variance,
            # at t = 0 the variance is 0, its log -inf: the value of t = 1 stands in (no noise is added there)
            "posterior_log_variance_clipped": np.log(np.append(variance[1:2], variance[1:])),
            "posterior_mean_coef1": betas * np.sqrt(prev) / (1 - abar),
            "posterior_mean_coef2": (1 - prev) * np.sqrt(1 - betas) / (1 - abar)}


def ddim_timesteps(total, steps):
    """The original steps that a DDIM chain visits, ascending: 0, s, 2 s, ...; the smallest s that fits.

    FAITHFUL: 10 of 100 end at 90, not 99, though the chain starts there from pure noise.
    Test: test_cogact.py::test_sampling_matches_official_trace
    """
    if steps == 1:
        return [total // 2]                                    # officially {50} of 100
    for stride in range(1, total):
        if len(range(0, total, stride)) == steps:
            return list(range(0, total, stride))
    possible = sorted({1, *(len(range(0, total, stride)) for stride in range(1, total))})
    raise ValueError(f"{steps} DDIM steps cannot be spread evenly over {total}; choose one of {possible}.")


def respace(betas, timesteps):
    """betas of the shorter chain that visits only `timesteps`, float64."""
    abar = np.cumprod(1 - betas)[timesteps]
    return 1 - abar / np.append(1.0, abar[:-1])


@functools.lru_cache
def sampler_table(sampler, total, steps):
    """(timesteps, rows of coefficients k), noisiest step first; float64, rounded to float32 once, when used.

    x0 = k0 x - k1 eps;   DDIM: x <- k2 x0 + k3 eps;   DDPM: x <- k2 x0 + k3 x + k4 noise
    """
    if (sampler, steps) not in (("ddim", steps), ("ddpm", None), ("ddpm", total)):
        raise ValueError(f"sampler={sampler!r}, steps={steps}: choose ddim, or ddpm (always {total} steps).")
    timesteps = ddim_timesteps(total, steps) if sampler == "ddim" else list(range(total))
    s = schedule(respace(cosine_betas(total), timesteps) if sampler == "ddim" else cosine_betas(total))
    columns = [s["sqrt_recip_alphas_cumprod"], s["sqrt_recipm1_alphas_cumprod"]]
    if sampler == "ddim":
        columns += [np.sqrt(s["alphas_cumprod_prev"]), np.sqrt(1 - s["alphas_cumprod_prev"])]
    else:
        sigma = np.exp(0.5 * s["posterior_log_variance_clipped"])
        columns += [s["posterior_mean_coef1"], s["posterior_mean_coef2"], np.append(0, sigma[1:])]
    return tuple(timesteps[::-1]), tuple(map(tuple, np.stack(columns, 1)[::-1].tolist()))


class ActionModel(nn.Module):
    """The DiT (`net`), its training loss and its samplers."""

    def __init__(self, cfg, attn="sdpa"):
        super().__init__()
        self.net = DiT(cfg, attn)
        self.num_train_steps = cfg.num_train_steps

    def add_noise(self, x, noise, t):
        """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise. x, noise: (n, T, A), t: (n,) -> (n, T, A)."""
        s = schedule(cosine_betas(self.num_train_steps))
        a, b = (constant(tuple(s[name]), x.device)[t][:, None, None]                   # (n, 1, 1)
                for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"))
        return a * x + b * noise

    def loss(self, actions, z, noise, t, drop=None, loss_mask=None):
        """Noise-prediction error of R noisy copies. actions: (B, T, A), z: (B, 1, D), loss_mask: (B, T) bool.

        noise: (R B, T, A), t and drop: (R B,); copy r of sample i is row r B + i.
        """
        R = noise.shape[0] // actions.shape[0]
        x, z = actions.repeat(R, 1, 1), z.repeat(R, 1, 1)                           # (R B, T, A), (R B, 1, D)
        z = z.to(self.net.positional_embedding.dtype)
        eps = self.net(self.add_noise(x, noise, t), t, z, drop)                     # (R B, T, A)
        error = (eps.float() - noise) ** 2                     # in float32 also when autocast made eps bf16
        if loss_mask is not None:
            # Divided by all entries, masked or not: every real action counts the same, and the gradient of a
            # batch does not depend on how the batch is split over processes.
            error = error * loss_mask.repeat(R, 1)[:, :, None]                      # (R B, T, A)
        return error.mean()

    def guided(self, x, c, cfg_scale):
        """Classifier-free guidance as one batch. x: (B, T, A), c: (2B, 1, D) [with z; without] -> (B, T, A).

        Both halves share one state x, so only B rows of it are carried. cfg_scale <= 1: c is (B, 1, D).
        """
        if cfg_scale <= 1:
            return self.net.denoise(x, c)
        cond, uncond = self.net.denoise(torch.cat([x, x]), c).chunk(2)                 # each (B, T, A)
        # Guidance. PAPER!=CODE: the paper's numbers are from code that sliced a wrong axis, guiding only the
        # first 7 of 16 steps. The released code (since January 2025) guides all T steps and all A numbers.
        # Test: test_cogact.py::test_guidance_reaches_every_step_and_every_channel
        return uncond + cfg_scale * (cond - uncond)

    def sample(self, z, noise, steps, cfg_scale=1.5, sampler="ddim", step_noise=None, trace=None):
        """Denoise a chunk: z (B, 1, D), noise (B, T, A) -> (B, T, A), normalized, not clipped.

        steps: of DDIM; DDPM: None. step_noise: (num_train_steps, B, T, A) of DDPM, first used first. trace: a
        list that receives (x, x0) of every step. All that the loop needs is on the device before it starts.
        """
        B, net, device, drop = len(z), self.net, z.device, None
        timesteps, coefficients = sampler_table(sampler, self.num_train_steps, steps)
        table = constant(coefficients, device)                                                 # (n, 4 or 5)
        times = net.t_embedder(constant(timesteps, device))[:, None, None]             # (n, 1, 1, D)
        if cfg_scale > 1:                                      # rows with z, then rows without
            z, drop = torch.cat([z, z]), torch.arange(2 * B, device=device) >= B
        cond = net.z_embedder(z, drop)                                                 # (B or 2B, 1, D)
        x = noise
        for i, k in enumerate(table):
            eps = self.guided(x, times[i] + cond, cfg_scale)                           # (B, T, A)
            x0 = k[0] * x - k[1] * eps
            if sampler == "ddim":
                x = k[2] * x0 + k[3] * eps
            else:
                fresh = torch.randn_like(x) if step_noise is None else step_noise[i]
                x = k[2] * x0 + k[3] * x + k[4] * fresh
            if trace is not None:
                trace.append((x, x0))
        return x


# ---- The model --------------------------------------------------------------------------------------------

# Parameters of the official checkpoints that no computation reads: kept, so that checkpoints load strictly
# and are written back whole; frozen; never run.
UNUSED = {
    "vision_backbone.dino_featurizer.blocks.-1": "features are taken before the last block",
    "vision_backbone.siglip_featurizer.blocks.-1": "features are taken before the last block",
    "vision_backbone.dino_featurizer.norm": "features are taken before the final norm",
    "vision_backbone.siglip_featurizer.norm": "features are taken before the final norm",
    "vision_backbone.siglip_featurizer.attn_pool": "all patch features are used, not the pooled one",
    "llm_backbone.llm.lm_head": "no word is ever predicted, in training neither",
    "action_model.net.history_embedder": "past_action_window_size is always 0",
}
MODULES = ("vision_backbone", "projector", "llm_backbone", "action_model")


def decode_actions(samples, stats, gripper_index=6):
    """Sampler output (..., T, A) float32 -> (normalized float32, in robot units float64)."""
    a = np.clip(np.asarray(samples, np.float32), -1, 1)
    if gripper_index >= 0:                                     # a switch: 0 closed, 1 open
        a[..., gripper_index] = np.where(a[..., gripper_index] < 0.5, 0, 1)
    actions = unnormalize(a, stats)            # gripper left un-normalized: its mask is False
    check_gripper(stats, gripper_index)
    return a, actions


class Model(nn.Module):
    """CogACT. The four modules carry the official names.

    preset, origin: for the record in saved checkpoints; fresh: modules that a checkpoint did not hold.
    """
    graphs = Graphs()                  # off; Graphs(common.captured): act() with CUDA graphs

    def __init__(self, cfg, tokenizer=None, stats=None, attn="auto"):
        super().__init__()
        self.cfg, self.tokenizer, self.stats = cfg, tokenizer, stats or {}
        self.preset, self.origin, self.fresh = "custom", {}, []
        if cfg.sampler == "ddim":                              # wrong now, not at the first validation
            ddim_timesteps(cfg.num_train_steps, cfg.sample_steps)
        self.attn = attn = "sdpa" if attn == "auto" else attn  # no device is known yet; sdpa runs on all
        self.vision_backbone = VisionBackbone(cfg, attn)
        self.projector = Projector(cfg.dino_width + cfg.siglip_width, cfg.llm_width)
        self.llm_backbone = LLMBackbone(cfg, attn)             # transformers initializes it
        self.action_model = ActionModel(cfg, attn)
        self.vision_backbone.dino_featurizer.init_weights()
        self.vision_backbone.siglip_featurizer.init_weights()
        self.projector.apply(init_linear)
        self.action_model.net.init_weights()
        for path in UNUSED:
            module = self
            for name in path.split("."):
                module = module[-1] if name == "-1" else getattr(module, name)
            module.requires_grad_(False)

    @property
    def device(self):
        """Where the weights are."""
        return self.action_model.net.positional_embedding.device

    def precision(self):
        """The autocast region around the VLM: bf16 on CUDA (officially always) unless cfg.compute differs."""
        compute, kind = self.cfg.compute, self.device.type
        if compute == "auto" and kind != "cuda":
            return nullcontext()
        return torch.autocast(kind, torch.bfloat16, enabled=compute != "fp32")

    def forward(self, batch):
        """batch: images (B, V, h, w, 3) uint8, ids (B, L), length (B,) -> cognition feature z (B, 1, D)."""
        images, ids = batch["images"], batch["ids"]
        B, V, h, w, _ = images.shape
        with self.precision():
            patches = self.projector(self.vision_backbone(images.view(B * V, h, w, 3)))     # (B V, P, D)
            patches = patches.reshape(B, -1, patches.shape[-1])                             # (B, V P, D)
            text = self.llm_backbone.llm.model.embed_tokens(ids)                            # (B, L, D)
            #  <s> | patches ... | prompt tokens ... | ▁ | </s> | <PAD> ...
            #   1  |  V P = 256  |      varies       | 1 |  1   | 0 or more
            rows = torch.cat([text[:, :1], patches, text[:, 1:]], 1)                        # (B, V P + L, D)
            hidden = self.llm_backbone(rows)                                                # (B, V P + L, D)
        # the cognition feature: the hidden state of </s>, the last real token
        last = patches.shape[1] + batch["length"] - 1                                       # (B,)
        return hidden[torch.arange(B, device=hidden.device), last][:, None]                 # (B, 1, D)

    def draw(self, batch, B):
        """Noise, steps and dropped conditions for R copies of each sample: (R B, T, A), (R B,), (R B,) bool.

        Drawn per sample from batch["key"], on the CPU, so that they do not depend on how many processes share
        the batch; without keys, from torch's generator. Leave batch["key"] on the CPU: else reading it waits.
        """
        R, cfg = self.cfg.repeated_diffusion_steps, self.cfg
        generators = [keyed_generator(k) for k in batch["key"].tolist()] if "key" in batch else [None] * B
        draws = [(torch.randn(R, cfg.horizon, cfg.action_dim, generator=g),    # diffusion noise first
                  torch.randint(cfg.num_train_steps, (R,), generator=g),
                  torch.rand(R, generator=g) < cfg.condition_dropout) for g in generators]
        return [torch.stack(d, 1).flatten(0, 1).to(self.device, non_blocking=True) for d in zip(*draws)]

    def loss(self, batch, noise=None, t=None, drop=None):
        """Noise-prediction loss (paper sec. 3.3). Pass `noise`, `t` and `drop` to replay a recorded step.

        batch["actions"]: (B, T, A) normalized; noise: (R B, T, A); t, drop: (R B,); what is None is drawn,
        `drop` in training only. Returns (scalar, to log).
        """
        B, T, A = batch["actions"].shape
        if (T, A) != (self.cfg.horizon, self.cfg.action_dim):
            raise ValueError(f"actions: chunks of {(T, A)} came; the model's (horizon, action_dim) is "
                             f"{(self.cfg.horizon, self.cfg.action_dim)}. Set these two, or fix the data.")
        # PAPER!=CODE: paper and released configs say R = 8 noisy copies; the public training script never
        # passes the number on and always makes 4. Here the setting counts, and is 8.
        # Test: test_cogact.py::test_repeated_diffusion_steps_are_honoured
        drawn = self.draw(batch, B)
        noise, t = drawn[0] if noise is None else noise, drawn[1] if t is None else t
        drop = drawn[2] if drop is None and self.training else drop
        loss = self.action_model.loss(batch["actions"], self(batch), noise, t, drop, batch.get("loss_mask"))
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def decide(self, batch, noise, steps=None, cfg_scale=None):
        """A batch as for forward, noise (B, T, A), all on the device -> (B, T, A), normalized, unclipped."""
        cfg = self.cfg
        steps = cfg.sample_steps if steps is None and cfg.sampler == "ddim" else steps
        how = steps, cfg.cfg_scale if cfg_scale is None else cfg_scale, cfg.sampler

        def work(noise, *tensors):
            z = self(dict(zip(batch, tensors)))                                        # (B, 1, D)
            # DiT and sampler run in float32, whatever the VLM ran in, whatever autocast is on around us
            with torch.autocast(self.device.type, enabled=False):
                return self.action_model.sample(z.float(), noise, *how)
        return self.graphs(work, noise, *batch.values(), key=how)

    @torch.no_grad()
    def act(self, observations, unnorm_key=None, noise=None, cfg_scale=None, steps=None):
        """A list of raw observations -> (chunks (B, T, A) float32 in robot units, info).

        noise: (B, T, A), else drawn on the CPU from torch's generator. info, each (B, T, A): `samples` before
        the clip, `normalized` after it, `actions` in float64.
        """
        cfg, stats = self.cfg, pick_stats(self.stats, unnorm_key)
        if not observations:
            raise ValueError("act() needs at least one observation.")
        self.tokenizer = self.tokenizer or load_tokenizer(cfg)
        keep = ("images", "instruction", "state")
        seen = [{name: o[name] for name in keep if name in o} for o in observations]
        batch = collate([prepare(o, cfg, self.tokenizer) for o in seen], cfg)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        shape = len(seen), cfg.horizon, cfg.action_dim                                 # diffusion noise:
        noise = torch.randn(shape) if noise is None else torch.as_tensor(noise, dtype=torch.float32)
        if noise.shape != shape:
            raise ValueError(f"noise of shape {shape} = (B, T, A) is expected, found {tuple(noise.shape)}.")
        samples = self.decide(batch, noise.to(self.device), steps, cfg_scale).cpu().numpy()    # (B, T, A)
        normalized, actions = decode_actions(samples, stats, cfg.gripper_index)
        return actions.astype(np.float32), {"samples": samples, "normalized": normalized, "actions": actions}

    def blocks(self):
        """The modules to shard, checkpoint or compile one by one, in order of use."""
        towers = (self.vision_backbone.dino_featurizer, self.vision_backbone.siglip_featurizer)
        return [*(block for tower in towers for block in tower.blocks[:-1]),
                *self.llm_backbone.llm.model.layers, *self.action_model.net.blocks]

    def param_groups(self, lr, weight_decay):
        """For the optimizer: all that trains; weight decay (officially 0) where dims are two or more."""
        head, groups = set(self.action_model.parameters()), {}
        for p in self.parameters():
            if p.requires_grad:
                groups.setdefault((p in head, p.ndim >= 2), []).append(p)
        return [{"params": params, "lr": in_head and self.cfg.head_lr or lr,
                 "weight_decay": weight_decay * matrix} for (in_head, matrix), params in groups.items()]

    def save_pretrained(self, folder, card=None, state=None):
        """Write our checkpoint folder. card: more lines for README.md {name: text}; state: other weights."""
        lines = {"method": "CogACT (https://arxiv.org/abs/2411.19650)", "preset": self.preset, **self.origin,
                 "datasets": ", ".join(self.stats) or "none", **(card or {})}
        text = "# CogACT\n\n" + "".join(f"- {name}: {value}\n" for name, value in lines.items())
        if self.cfg.tokenizer != "tiny" and self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)             # config.json, the last, makes it valid
        save_folder(folder, "cogact", self.preset, asdict(self.cfg), state or self.state_dict(), self.stats,
                    text, self.origin)


# ---- Acting on a robot ------------------------------------------------------------------------------------

# SimplerEnv's two robots: statistics, chunks averaged, steps a gripper command is held (WidowX: never read).
ROBOTS = {"google_robot": ("fractal20220817_data", 2, 10), "widowx_bridge": ("bridge_orig", 7, 1)}


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
    """A session with one robot: chunks in, one action per control step out.

    execute: actions played per chunk (default: the config's). 1: a chunk for every step, and the adaptive
    ensemble over the last `ensemble_horizon` of them (ensemble=False: just its first action). More: a queue.
    robot: None, or "google_robot" / "widowx_bridge": actions as SimplerEnv's environments take them.
    """

    def __init__(self, model, unnorm_key=None, execute=None, robot=None, ensemble=None, ensemble_horizon=None,
                 ensemble_alpha=None, action_scale=1.0):
        cfg, self.model, self.robot, self.action_scale = model.cfg, model, robot, action_scale
        if robot not in (None, *ROBOTS):
            raise ValueError(f"robot={robot!r} does not exist; choose one of {', '.join(ROBOTS)}, or none.")
        if robot and (cfg.action_dim, cfg.gripper_index) != (7, 6):
            raise ValueError(f"robot={robot!r} needs action_dim=7, gripper_index=6; this model has "
                             f"{cfg.action_dim} and {cfg.gripper_index}. Leave robot out.")
        key, horizon, self.hold = ROBOTS[robot] if robot else (None, cfg.ensemble_horizon, 0)
        self.unnorm_key = key if unnorm_key is None and key in model.stats else unnorm_key
        self.execute = cfg.execute if execute is None else execute
        if not 1 <= self.execute <= cfg.horizon:
            raise ValueError(f"execute={execute}: chunks have {cfg.horizon} actions; set 1 to {cfg.horizon}.")
        if ensemble and self.execute > 1:
            raise ValueError(f"execute={self.execute}: the ensemble needs a new chunk at every step. Set "
                             "execute=1 or ensemble=False.")
        ensemble = self.execute == 1 if ensemble is None else ensemble
        horizon = horizon if ensemble_horizon is None else ensemble_horizon
        if (ensemble or ensemble_horizon is not None) and not 1 <= horizon <= cfg.horizon:
            raise ValueError(f"ensemble_horizon={horizon}: choose 1 to {cfg.horizon}, a chunk's actions.")
        self.gripper, self.ensemble = cfg.gripper_index, None
        if ensemble:
            alpha = cfg.ensemble_alpha if ensemble_alpha is None else ensemble_alpha
            weights = functools.partial(adaptive_weights, alpha=alpha)
            self.ensemble = ChunkEnsemble(horizon, weights)
        elif (ensemble_horizon, ensemble_alpha) != (None, None):
            raise ValueError(f"ensemble_horizon={ensemble_horizon} and ensemble_alpha={ensemble_alpha} do "
                             "nothing without an ensemble; set execute=1 or leave them out.")
        if action_scale != 1 and not robot:
            raise ValueError(f"action_scale={action_scale} needs a robot: {', '.join(ROBOTS)}.")
        self.reset()

    def reset(self, instruction=None):
        """Forget everything; call between episodes. (A new instruction does it by itself.)"""
        self.instruction, self.queue = instruction, deque()
        self.prev, self.sticky, self.count, self.held = None, False, 0, 0.0           # Google robot's gripper
        if self.ensemble:
            self.ensemble.reset()

    @property
    def needs_chunk(self):
        """True when the next step wants a fresh chunk."""
        return not self.queue

    def ask(self, observation):
        """The observation as model.act wants it: CogACT looks at nothing else."""
        return observation

    def step(self, observation, chunk=None):
        """The action for now, (A,) float64. chunk: (T, A) in robot units if model.act was already asked."""
        if not observation.get("instruction"):
            raise ValueError("the observation has no instruction: say in words what the robot should do.")
        if observation["instruction"] != self.instruction:
            self.reset(observation["instruction"])
        if self.needs_chunk:
            if chunk is None:
                chunk = self.model.act([observation], self.unnorm_key)[1]["actions"][0]
            chunk = np.asarray(chunk, np.float64)                                # (T, A)
            self.queue.extend([self.ensemble.step(chunk)] if self.ensemble else chunk[:self.execute])
        self.raw = action = self.queue.popleft()                                 # (A,) before post-processing
        if self.robot:
            return self.simpler_action(action)
        action = action.copy()
        if self.ensemble and self.gripper >= 0:          # an average of 0s and 1s (official server: the same)
            action[self.gripper] = action[self.gripper] > 0.5
        return action

    def simpler_action(self, a):
        """(7,) -> what SimplerEnv takes: world vector (3), axis * angle (3), gripper (1)."""
        move, turn = a[:3] * self.action_scale, euler_to_axis_angle(*a[3:6]) * self.action_scale
        if self.robot == "widowx_bridge":
            return np.array([*move, *turn, 1.0 if a[6] > 0.5 else -1.0])
        return np.array([*move, *turn, self.sticky_gripper(a[6])])

    def sticky_gripper(self, opening):
        """Google robot: a change of the opening becomes a relative command (+1 close), held for 10 steps."""
        # FAITHFUL: `prev` follows the opening only when a command starts, so small differences leak through.
        # Test: test_cogact.py::test_simpler_policy_matches
        self.prev = opening if self.prev is None else self.prev
        relative = self.prev - opening
        if abs(relative) > 0.5 and not self.sticky:
            self.sticky, self.held, self.prev = True, relative, opening
        if self.sticky:
            self.count, relative = self.count + 1, self.held
        if self.count == self.hold:
            self.sticky, self.count, self.held = False, 0, 0.0
        return relative


# ---- Checkpoints: ours and the official ones ---------------------------------------------------------------

DIT_NAMES = {"small": "DiT-S", "base": "DiT-B", "large": "DiT-L"}                  # preset: the authors' name
DIT_WIDTHS = {PRESETS[name].width: name for name in DIT_NAMES}                     # width: preset
LICENSE = "MIT (CogACT, OpenVLA); it contains Llama 2, whose Community License applies"


def read_sizes(state):
    """Config fields that can be read off the shapes of official parameters {"module.name": tensor}."""
    def count(prefix):
        return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})

    def shape(name):
        if getattr(state.get(name), "ndim", 0) < 2 or not state[name].numel():
            raise ValueError(f"parameter {name} is missing, or no matrix; give a released CogACT or "
                             "openvla-7b-prismatic.")
        return tuple(state[name].shape)

    dino, siglip, llm, net = ("vision_backbone.dino_featurizer.", "vision_backbone.siglip_featurizer.",
                              "llm_backbone.llm.model.", "action_model.net.")
    patch = shape(dino + "patch_embed.proj.weight")[-1]
    sizes = {"patch_size": patch, "image_size": patch * math.isqrt(shape(dino + "pos_embed")[1]),
             "registers": shape(dino + "reg_token")[1]}
    for name, tower in (("dino", dino), ("siglip", siglip)):
        hidden, width = shape(tower + "blocks.0.mlp.fc1.weight")[:2]
        sizes |= {f"{name}_width": width, f"{name}_depth": count(tower + "blocks."), f"{name}_mlp": hidden}
    vocab, width = shape(llm + "embed_tokens.weight")[:2]
    sizes |= {"vocab": vocab, "llm_width": width, "llm_depth": count(llm + "layers."),
              "llm_mlp": shape(llm + "layers.0.mlp.gate_proj.weight")[0]}
    if any(name.startswith(net) for name in state):
        width, action_dim = shape(net + "x_embedder.linear.weight")[:2]
        sizes |= {"width": width, "action_dim": action_dim, "depth": count(net + "blocks."),
                  "horizon": shape(net + "positional_embedding")[0] - 1,
                  "mlp_ratio": shape(net + "blocks.0.mlp.fc1.weight")[0] / width,
                  "frequencies": shape(net + "t_embedder.mlp.0.weight")[1]}
    return sizes


def read_about(path):
    """A config.json as a dict; {} when there is none."""
    about = read_json(path) if path.is_file() else {}
    if {type(about.get(k, {})) for k in ("vla", "plainvla")} != {dict}:
        raise ValueError(f"{path} is not the config of a checkpoint; copy it again, or take it away.")
    return about


def read_official(path, preset, overrides):
    """An official .pt -> (config, {"module.name": tensor}, statistics, preset)."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    loaded = load_weights(path)
    released = loaded.get("model") if isinstance(loaded, dict) else None
    # an averaged copy of the DiT ("ema_diffusion") is left out, as by the official loader's default
    parts = set(released) - {"ema_diffusion"} if isinstance(released, dict) else set()
    wrong = (parts | {"action_model"}) ^ set(MODULES)
    wrong |= {m for m in parts if not isinstance(released[m], dict)}
    if wrong:
        raise ValueError(f"{path} holds {sorted(parts) or 'no model'}; missing or unknown: {sorted(wrong)}. "
                         "Start from CogACT's or openvla-7b-prismatic's .pt (plain Prismatic lacks vision).")
    # checkpoint keys are mapped: official model[module][name] -> "module.name"; nothing is renamed
    state = {f"{m}.{name}": tensor for m in MODULES for name, tensor in released.get(m, {}).items()}
    about, stats, sizes = read_about(run / "config.json"), run / "dataset_statistics.json", read_sizes(state)
    vla = about.get("vla", about)                              # the DiT's size goes by either of these names
    named = vla.get("action_model_type") or vla.get("diffusion_model_type")
    named = next((size for size, name in DIT_NAMES.items() if name == named), "base")
    size = DIT_WIDTHS.get(sizes["width"], "custom") if "width" in sizes else preset or named
    choose("there is no preset", size, [*PRESETS, "custom"])
    if preset not in (None, size):
        raise ValueError(f"preset {preset!r} was asked for, {path} is {size!r}; leave the preset out.")
    base = configure(PRESETS.get(size, PRESETS["base"]), **about.get("plainvla", {}))
    for width, heads in (("dino_width", "dino_heads"), ("siglip_width", "siglip_heads"),
                         ("llm_width", "llm_heads"), ("width", "heads")):
        if sizes.get(width, getattr(base, width)) != getattr(base, width) and heads not in overrides:
            raise ValueError(f"{path}: {width}={sizes[width]} is no official size, and the number of heads "
                             f"cannot be read from shapes; set {heads}.")
    cfg = configure(base, **{**sizes, **overrides})
    return cfg, state, read_json(stats) if stats.is_file() else {}, size


def find_official(path):
    """The .pt file that `path` (itself, a run folder or a hub snapshot) means."""
    files = [path] if path.is_file() and path.suffix == ".pt" else sorted(path.glob("checkpoints/*.pt"))
    if len(files) != 1:
        found = f"there are {len(files)} of these: name one" if files else "neither is there"
        raise ValueError(f"{path}: give the folder with config.json and model.safetensors, or one with one "
                         f"checkpoints/*.pt; {found}.")
    return files[0]


def from_pretrained(path_or_id, *, preset=None, tokenizer=None, attn="auto", device="cpu", dtype=None,
                    allow_fresh=False, **overrides):
    """Load a checkpoint: our folder, an official .pt (or its run folder), or a hub id of either.

    tokenizer: a path or hub id, or a tokenizer. dtype: "bf16" casts the VLM's matrices once instead of in
    every call, with the same numbers as autocast and half the memory (for acting, not for training); "fp32"
    computes in float32 on CUDA too; None: as cfg.compute says. overrides: other Config values. allow_fresh:
    also take a .pt without action_model, as OpenVLA's (openvla-7b-prismatic): training starts from it, with a
    fresh head that must drive no robot; `model.fresh` and a warning say so.
    ValueError: not there, torn, of another method, of another size.
    """
    device, dtype = pick_device(device), str(dtype or "").removeprefix("torch.")
    dtype = {"bfloat16": "bf16", "float32": "fp32"}.get(dtype, dtype)
    if dtype not in ("", "bf16", "fp32"):
        raise ValueError(f"dtype={dtype!r} does not exist; choose bf16 or fp32.")
    path = resolve(path_or_id, ["*.json", "model.safetensors", "checkpoints/*.pt"])
    if isinstance(tokenizer, (str, Path)):
        overrides["tokenizer"], tokenizer = str(tokenizer), None
    if dtype:
        overrides["compute"] = dtype
    weights, fresh, own_tokenizer = path / "model.safetensors", [], None
    if weights.is_file() or "method" in read_about(path / "config.json"):
        saved = load_config(path, "cogact")
        if preset not in (None, saved["preset"]):
            raise ValueError(f"preset {preset!r} was asked for, {path} is {saved['preset']!r}; leave it out.")
        cfg, preset = configure(Config(), **{**saved["config"], **overrides}), saved["preset"]
        origin, own_tokenizer = saved["origin"], None if "tokenizer" in overrides else path
        state, stats = load_weights(weights), read_json(path / "dataset_statistics.json")
    else:
        weights = find_official(path)
        cfg, state, stats, preset = read_official(weights, preset, overrides)
        origin = {"started from": str(path_or_id), "license": LICENSE}
        if not any(name.startswith("action_model.") for name in state):
            if not allow_fresh:
                raise ValueError(f"{weights} holds only a VLM, no action_model: it cannot act. Train first: "
                                 f"train.py --model cogact --init {weights}")
            print(f"warning: {weights} holds only a VLM, no action_model: it starts fresh.", file=sys.stderr)
            head, fresh = ActionModel(cfg), ["action_model"]
            head.net.init_weights()
            state |= head.state_dict(prefix="action_model.")

    # "flash" may be asked for a model that goes from here to CUDA later (train.py), so the machine decides
    where = "cuda" if attn == "flash" and torch.cuda.is_available() else device
    with torch.device("meta"):                                 # shapes only; the file's tensors move in below
        model = Model(cfg, attn=pick_attention(attn, where))
    check_fit(model.state_dict(), state, weights)
    matrices = {f"{name}.{kind}" for name, module in model.named_modules() for kind in ("weight", "bias")
                if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith("action_model.")}
    for name, tensor in state.items():      # whatever type the file has; one by one: never two copies of all
        half = dtype == "bf16" and name in matrices            # as autocast: norms, embeddings stay float32
        state[name] = tensor.to(torch.bfloat16 if half else torch.float32)
    model.load_state_dict(state, assign=True)
    llama = model.llm_backbone.llm
    llama.model.rotary_emb = LlamaRotaryEmbedding(llama.config)                # its table is in no checkpoint
    model.tokenizer = load_tokenizer(cfg, own_tokenizer) if tokenizer is None else tokenizer
    model.stats, model.preset, model.origin, model.fresh = stats, preset, origin, fresh
    return model.to(device).eval()


def save_official(model, path):
    """Write `path` (.pt) in the official layout, and config.json and dataset_statistics.json beside."""
    path = Path(path)
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    about, stats = run / "config.json", run / "dataset_statistics.json"
    if path.suffix != ".pt" or any(file.exists() for file in (path, about, stats)):
        raise ValueError(f"{path}: name a new file NEW/checkpoints/NAME.pt; nothing in {run} is overwritten.")
    parts = {m: {k: v.float().cpu() for k, v in getattr(model, m).state_dict().items()} for m in MODULES}
    atomic_write(path, lambda part: torch.save({"model": parts}, part))
    kind = DIT_NAMES.get(DIT_WIDTHS.get(model.cfg.width), "custom")
    vla = {"base_vlm": "prism-dinosiglip-224px+7b", "action_model_type": kind,
           "future_action_window_size": model.cfg.horizon - 1}
    write_json(stats, model.stats)
    write_json(about, {"vla": vla, "plainvla": asdict(model.cfg)})


# ---- Demo -------------------------------------------------------------------------------------------------

def demo():
    """Overfit two synthetic samples with the tiny preset (about 10 s on one core), then act on them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)                                   # matrices this small gain nothing from more
    cfg, rng, start = PRESETS["tiny"], np.random.default_rng(0), time.time()
    low, high = [-0.1] * 6 + [0], [0.1] * 6 + [1]
    stats = {"synthetic": {"action": {"q01": low, "q99": high, "min": low, "max": high,
                                      "mask": [True] * 6 + [False]}}}
    samples = [{"images": {"third": np.full((64, 64, 3), rgb, np.uint8)}, "dataset": "synthetic",
                "instruction": f"pick up the {colour} cube",
                "actions": np.tile(np.append(rng.uniform(-0.1, 0.1, 6), gripper), (cfg.horizon, 1))}
               for colour, rgb, gripper in (("red", (255, 0, 0), 0), ("green", (0, 160, 0), 1))]
    model = Model(cfg, load_tokenizer(cfg), stats)
    batch = collate([prepare(s, cfg, model.tokenizer, stats, train=True) for s in samples], cfg)
    optimizer = torch.optim.AdamW(model.param_groups(2e-3, 0.0))
    for step in range(101):
        loss, log = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:3d} | loss {log['loss']:.3f} | {time.time() - start:.1f} s", flush=True)
    chunks, _ = model.eval().act(samples)                                              # (2, T, A)
    for sample, chunk in zip(samples, chunks):
        print(f"{sample['instruction']}: wanted {np.round(sample['actions'][0], 2)} at every step, "
              f"predicted\n{np.round(chunk, 2)}")


def main():
    """The command line: the demo, or --export."""
    parser = Parser("CogACT: tiny demo, or export to the official layout.")
    parser.add_argument("--export", nargs=2, metavar=("CKPT", "OUT.pt"), help="write CKPT the official way")
    export = parser.parse_args().export
    if not export:
        return demo()
    save_official(from_pretrained(export[0]), export[1])
    print(f"wrote {export[1]}")


if __name__ == "__main__":
    cli(main)
