"""
The small parts that all five methods share: seeds and devices, the attention choice, a loss in pieces, CUDA
graphs, the tiny tokenizer, action statistics and normalization, quantizers, chunk ensembling, safe checkpoint
files. They take tensors and numbers, never a config or a model. What makes a method the method is in its
own file.

How a method file is used; train.py, eval_sim.py and serve.py need only these names of it:

    Config, PRESETS           a flat dataclass; {"base": Config(...), ..., "tiny": Config(...)}
    PREDICTS                  which part of a sample act() predicts: "actions" (in robot units), or
                              "waypoints", of which Policy.step makes actions
    load_tokenizer(cfg)       the tokenizer of cfg.tokenizer ("tiny" is built here, nothing is downloaded)
    prepare(sample, cfg, tokenizer, stats, key=None, train=False)
                              one sample or observation -> dict of CPU tensors; runs in loader workers, knows
                              no weights; `key` (an int) fixes every random draw made for the sample
    collate(prepared, cfg)    list of those -> batch: dict of tensors
    Model(cfg, tokenizer, stats, attn)
                              forward(batch), loss(batch) -> (scalar, dict to log), blocks(),
                              act(observations, unnorm_key) -> (chunks (B, T, A) in robot units, info),
                              param_groups(lr, weight_decay), save_pretrained(folder, card={})
    from_pretrained(path_or_id, ...)
                              our folder, the official release, or a hub id -> Model
    Policy(model, unnorm_key, execute)
                              reset(), needs_chunk, step(observation, chunk=None) -> one action;
                              ask(observation) -> the observation as model.act wants it: with what the session
                              remembers (a draft, earlier pictures), if the method uses any
    and, where a method has them: read_official_config(path) -> (Config, notes); ema_decay(step, most);
                              fit(cfg, tokenizer, dataset, stats): what the tokenizer learns from the data,
                              before the first step of a new run; weigh(batch): of how many things (tokens,
                              actions) loss(batch) is the mean, on the CPU; Model.resized, Model.unread:
                              weights that --init may bring in another shape, or that are not wanted

A sample is described at the top of data.py; an observation is one with only images, instruction and state.

A checkpoint folder: config.json {"method", "preset", "config", "origin", "version"}, model.safetensors
(official parameter names), dataset_statistics.json, README.md (model card), tokenizer files unless "tiny".
Statistics: {dataset: {"action": {mean, std, min, max, q01, q99, mask}, num_transitions, num_trajectories}}.
"""
import argparse
import contextlib
import difflib
import errno
import hashlib
import importlib.util
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import sys
import textwrap
import threading
import zipfile
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

VERSION = 1                          # of the checkpoint folder's layout
STATISTICS = ("mean", "std", "min", "max", "q01", "q99", "mask")
METHODS = tuple(sorted(p.stem for p in Path(__file__).resolve().parent.glob("*.py")
                       if "\nPRESETS = " in p.read_text(encoding="utf-8")))    # the method files beside this


# ---- Devices, ranks, seeds --------------------------------------------------------------------------------

def device(name="auto"):
    """The torch.device to run on: "auto" is the accelerator torch finds (CUDA, MPS, XPU ...), else the CPU.

    On a machine with several accelerators, "auto" is the one of this process' LOCAL_RANK.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        if found is None:
            return torch.device("cpu")
        several = torch.accelerator.device_count() > 1
        return torch.device(found.type, rank_info()[1]) if several else torch.device(found.type)
    try:
        wanted = torch.device(name)
    except RuntimeError as e:
        raise ValueError(f"device {name!r} does not exist; choose auto, cpu, cuda or mps.") from e
    if wanted.type not in ("cpu", "meta") and (found is None or wanted.type != found.type):
        have = found.type if found else "only a CPU"
        raise ValueError(f"device {name!r} was asked for; this machine has {have}. Use --device auto.")
    return wanted


def rank_info():
    """(rank, local rank, world size) as torchrun sets them; (0, 0, 1) without a launcher."""
    found = [os.environ.get(*of) for of in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))]
    if not all(x.isdecimal() for x in found) or max(map(int, found[:2])) >= int(found[2]):
        raise ValueError(f"RANK, LOCAL_RANK, WORLD_SIZE are {', '.join(found)}: unset them, or use torchrun.")
    return tuple(map(int, found))


def seed_everything(seed):
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def hash64(*ints):
    """A 63-bit hash of integers: the seed of everything drawn for them, whatever process draws it."""
    packed = b"".join(struct.pack("<q", int(i)) for i in ints)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def keyed_generator(*ints):
    """A CPU torch.Generator that depends on the integers only."""
    return torch.Generator().manual_seed(hash64(*ints))


def keyed_rng(*ints):
    """A numpy Generator that depends on the integers only."""
    return np.random.default_rng(hash64(*ints))


# ---- Attention --------------------------------------------------------------------------------------------

ATTENTION = ("auto", "flash", "sdpa", "eager")


def pick_attention(kind="auto", device="cpu"):
    """Resolve --attn: auto is flash-attn's kernels when installed and on CUDA, else torch's SDPA."""
    if kind not in ATTENTION:
        raise ValueError(f"attention {kind!r} does not exist; choose one of {', '.join(ATTENTION)}.")
    on_cuda = torch.device(device).type == "cuda"
    installed = importlib.util.find_spec("flash_attn") is not None
    if kind == "flash" and not (on_cuda and installed):
        have = "is installed" if installed else "is not installed (README has the line)"
        raise ValueError(f"attention 'flash' needs CUDA and flash-attn; the device is "
                         f"{torch.device(device).type}, and flash-attn {have}. Use --attn auto.")
    return ("flash" if on_cuda and installed else "sdpa") if kind == "auto" else kind


def hf_attention(kind):
    """The name transformers uses for our attention kind."""
    return {"flash": "flash_attention_2", "sdpa": "sdpa", "eager": "eager"}[kind]


def attention(q, k, v, kind="sdpa", causal=False, mask=None):
    """Scaled dot-product attention. q: (B, L, H, K), k and v: (B, M, H, K) -> (B, L, H, K).

    mask: bool, broadcastable to (B, H, L, M), True = may look. flash-attn's kernels know neither masks nor
    32-bit floats: those calls go through SDPA, with the same numbers up to rounding.
    """
    if kind == "flash" and mask is None and q.dtype in (torch.float16, torch.bfloat16):
        from flash_attn import flash_attn_func
        return flash_attn_func(q, k, v, causal=causal)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, L, K)
    if kind != "eager":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)
    score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5              # (B, H, L, M)
    if causal:
        mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        score = score.masked_fill(~mask, float("-inf"))
    weight = score.softmax(-1, dtype=torch.float32).to(v.dtype)        # in 32 bits, as inside of SDPA
    return (weight @ v).transpose(1, 2)


class Kernels(TorchDispatchMode):
    """While it is entered, `names` collects which attention kernels run, by their names in PyTorch."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_")
        self.names |= {name} if "attention" in name or "flash_attn" in name else set()
        return func(*args, **(kwargs or {}))

    def __str__(self):
        return ", ".join(sorted(self.names)) or "matrix products"


# ---- Less memory in training ------------------------------------------------------------------------------

LARGE = 2**26                        # numbers in a tensor (268 MB of float32) beyond which these two act


def lean(f, x):
    """f(x), and f is cheap: of a large x, what f keeps for the backward pass is computed again there."""
    if not x.requires_grad or x.numel() <= LARGE // 64:
        return f(x)
    return checkpoint(f, x, use_reentrant=False, preserve_rng_state=False)


def word_loss(hidden, head, targets, vocab):
    """Mean cross-entropy of words: head(hidden (n, D)) -> logits (n, vocab), targets (n,) -> scalar, float32.

    The logits are never whole in memory: rows are taken LARGE // vocab at a time, and their logits computed
    again in the backward pass. In bf16 the head's gradient is rounded once per piece (measured: 0.46 % with
    eight of them, 0.26 % whole).
    """
    def error(rows, words, reduction="sum"):
        return F.cross_entropy(head(rows).float(), words, reduction=reduction)
    size = max(1, LARGE // vocab)
    if len(targets) <= size:
        return error(hidden, targets, "mean")
    return sum(checkpoint(error, *part, use_reentrant=False, preserve_rng_state=False)
               for part in zip(hidden.split(size), targets.split(size))) / len(targets)


# ---- Less time in inference -------------------------------------------------------------------------------

def captured(work, first=None, stream=None):
    """A CUDA graph of work(), which has run before -> (graph, what work returns: always in the same memory).

    first: a graph whose memory it shares, so what comes out is to be read before another one is replayed.
    stream: where it is captured, of the device that work is on. Weights that autocast has cast are neither
    taken from outside nor handed out. ValueError: it cannot be captured, and CUDA is in no state to go on.
    """
    graph = torch.cuda.CUDAGraph()
    torch.clear_autocast_cache()
    try:
        with torch.cuda.graph(graph, first and first.pool(), stream, capture_error_mode="thread_local"):
            out = work()
    except RuntimeError as e:                          # leaving the region raises too, it tells less
        why = str(e.__context__ if isinstance(e.__context__, RuntimeError) else e).splitlines()[0]
        raise ValueError(f"--graphs: no CUDA graph could be made of this ({why}); leave --graphs out, or try "
                         "--attn sdpa.") from e
    finally:
        torch.clear_autocast_cache()
    return graph, out


class Graphs:
    """What a model computes again and again for tensors of the same shapes, as CUDA graphs: one launch each.

    The first time it is computed, the second time captured (which takes a moment), from then on replayed: the
    same kernels, so the same bits. (transformers masks otherwise while a stream is captured: of RoboVLMs'
    other backbones, up to rounding.) Such work reads no number back, and takes nothing from the host but the
    tensors that it is given (tests/test_bench.py looks that it does not). capture: None leaves everything as
    it is. most: sets of shapes that are kept; the one unused for longest goes. Two users of one set must take
    turns. After the weights have moved: new Graphs.
    """

    def __init__(self, capture=None, most=64):
        self.capture, self.most, self.kept, self.first = capture, most, {}, None

    def settle(self, key, tensors):
        """Tensors, brought into the memory that graphs of this key and these shapes work on -> these tensors
        (a list), and what was made there so far: a dict for `run`."""
        key = key, threading.get_ident(), *((x.shape, x.dtype) for x in tensors)  # cuBLAS is of a thread
        fixed, made = self.kept.pop(key, None) or ([x.clone() for x in tensors], {})
        self.kept[key] = fixed, made
        if len(self.kept) > self.most:
            self.kept.pop(next(iter(self.kept)))[1].clear()    # what is in a cycle would go later
        for here, x in zip(fixed, tensors):
            here.copy_(x)
        return fixed, made

    def run(self, made, name, work):
        """work(), on settled tensors; `made` keeps it as `name`. What it returns the next run overwrites."""
        if name not in made:
            out = work()
            made[name] = None
            return out
        if not made[name]:
            made[name] = *self.capture(work, self.first), work    # ... which keeps its tensors alive
            self.first = self.first or made[name][0]
        graph, out, _ = made[name]
        graph.replay()
        return out

    def __call__(self, work, *tensors, key=()):
        """work(*tensors) -> a tensor. key: all else that decides what work does."""
        if self.capture is None:
            return work(*tensors)
        fixed, made = self.settle(key, tensors)
        return self.run(made, "", lambda: work(*fixed)).clone()


def to_int8(w):
    """A matrix (n, D), D a multiple of 32 (else kernels may read beyond it) -> (int8 (n, D), a scale per row
    (n,) bfloat16): off by 0.4 % of a row's largest number."""
    scale = (w.float().abs().amax(1) / 127).clamp(min=1e-30).bfloat16()
    return (w.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def linear(x, w, bias=None):
    """x (..., D) by a matrix (n, D), or by one of `to_int8`, which is multiplied in bfloat16 -> (..., n)."""
    if isinstance(w, torch.Tensor):
        return F.linear(x, w, bias)
    y = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), *w).view(*x.shape[:-1], -1).to(x.dtype)
    return y if bias is None else y + bias


# ---- The tiny tokenizer -----------------------------------------------------------------------------------

# One token per word of the embedded tasks, so that a prompt costs about 22 tokens. Anything else is spelled,
# character by character. The order is frozen, as the weights under assets/ were trained with these ids: new
# words go to the end.
TINY_WORDS = """
In What Out in what action should the robot take to out red green blue yellow purple orange white black gray
grey brown pink cyan cube cylinder ball pyramid bar block brick can sphere cone box bowl plate tray cup lid
drawer button cloth pick up lift grab raise hold put place move set drop lay push slide shove drag stack pile
turn rotate twist spin point find look open close get bring pull press go reach leave keep give show grasp
release carry fetch swivel nudge a an of off on onto into from at it is and between next near left right
front back top middle side away toward towards you me your my clockwise counterclockwise anticlockwise two
one three both other same object thing gripper hand where which color colour shape down over far behind table
edge center centre corner half quarter degrees with without by this that there here be are not no yes please
now then first last above below under beside against inside outside upper lower big small large long short
flat round tall its along across around until so as for x y pixel position image picture camera arm wrist
finger fingers farthest nearest leftmost rightmost closest end start again little bit slightly task done
approach align descend rise home wait stop item items blocks cubes balls
""".split()


def tiny_tokenizer():
    """A tokenizer built in the process (nothing is downloaded): words of the embedded tasks, else characters.

    Ids: <unk> 0, <s> 1, </s> 2, "▁" (a lone space) 3, <pad> 4, then newline, tab, printable ASCII, words.
    As in sentencepiece, a word carries its leading space ("▁cube"), so decoding gives the text back (but a
    leading space). Digits are always one token each; printable ASCII never becomes <unk>.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    tokens = ["<unk>", "<s>", "</s>", "▁", "<pad>", "\n", "\t"] + [chr(c) for c in range(33, 127)]
    tokens += ["▁" + w for w in TINY_WORDS] + ["Out"]      # it starts a line of the prompt, without a space
    tokens += ["▁user", "▁assistant"]                      # later words
    vocab = {}
    for token in tokens:
        vocab.setdefault(token, len(vocab))
    tok = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix="",
                                     max_input_chars_per_word=1 << 20))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True),
        pre_tokenizers.Split(Regex(r"[^A-Za-z▁]"), "isolated")])
    tok.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>", padding_side="right",
                                   clean_up_tokenization_spaces=False)


# ---- What a user may set, and a robot may send ------------------------------------------------------------

def check_config(values, like, least={}, most={}, below={}, multiples=(), choices={}):
    """A ValueError for the first field of a Config that is of another type than its default, or out of range.

    values: vars(self), where lists (of JSON) become tuples; like: vars(Config), the defaults. Whole numbers
    are at least 1, others finite and at least 0, unless `least` differs; `most`, `below`: numbers or other
    fields. A tuple obeys in every entry, is never empty, and of floats as long as its default. multiples:
    (name, *names or numbers, of whose product it is a multiple).
    """
    numbers = {}
    for name, value in values.items():
        value = values[name] = tuple(value) if isinstance(value, list) else value
        several = isinstance(like[name], tuple) and isinstance(value, tuple)
        items, kind = (value, type(like[name][0])) if several else ((value,), type(like[name]))
        fits = bool(items) and all(type(x) is kind or (kind is float and type(x) is int) for x in items)
        if not fits or (several and kind is float and len(items) != len(like[name])):
            raise ValueError(f"{name}={value!r}: a value like {like[name]!r} is wanted.")
        if value not in choices.get(name, [value]):
            raise ValueError(f"{name}={value!r}: choose {' or '.join(choices[name])}.")
        numbers |= {name: (items, int(kind is int))} if kind in (int, float) else {}
    for name, (items, low) in numbers.items():
        low, top = least.get(name, low), most.get(name, below.get(name, math.inf))
        high = values.get(top, top)
        if not all(low <= x < high or (x == high and name in most) for x in items):
            also = f" and {'at most' if name in most else 'below'} {top}{f'={high}' * (top in values)}"
            raise ValueError(f"{name}={values[name]!r}: at least {low}{also * (high < math.inf)} is wanted.")
    for name, *parts in multiples:
        if values[name] % math.prod(values.get(part, part) for part in parts):
            known = " x ".join(f"{part}={values[part]}" if part in values else f"{part}" for part in parts)
            raise ValueError(f"{name}={values[name]} is no multiple of {known}; change one of them.")


def is_text(x):
    """Is it a string with something in it, and valid Unicode (no half of a surrogate pair)?"""
    return isinstance(x, str) and bool(x.strip()) and not re.search("[\ud800-\udfff]", x)


def check_observation(sample, views, state_dim=0):
    """A ValueError for whatever a user can get wrong about an observation.

    views: the cameras that are looked at; state_dim: the length a state must have if one is there (0: any).
    """
    instruction, images = sample.get("instruction"), sample.get("images")
    if not is_text(instruction):
        raise ValueError(f"instruction={instruction!r}: say in words what the robot should do.")
    if not isinstance(images, dict) or not images:
        found = type(images).__name__ + (" without any" if isinstance(images, dict) else "")
        raise ValueError(f"images: a dict {{view: uint8 array (h, w, 3)}} is expected, found {found}.")
    missing = [view for view in views if view not in images]
    if missing and not len(views) == len(images) == 1:         # one picture for one view needs no name
        raise ValueError(f"images: the model looks at {list(views)}, found {list(images)}. "
                         "Rename the pictures, or set views.")
    for view, image in images.items():
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        if not found.startswith("uint8 (") or image.ndim != 3 or image.shape[2] != 3 or min(image.shape) < 2:
            raise ValueError(f"images[{view!r}]: a uint8 array (h, w, 3), RGB, is expected, found {found}.")
    state = sample.get("state")
    if state_dim and state is not None and np.shape(state) != (state_dim,):
        raise ValueError(f"state: {state_dim} numbers are expected, as in the training data, found shape "
                         f"{np.shape(state)}.")


# ---- Action statistics and normalization ------------------------------------------------------------------

class ActionStatistics:
    """Statistics of a dataset's raw actions in one streaming pass: add() trajectories, then result().

    The values themselves are kept (28 bytes per transition of 7 numbers): exact quantiles need them all.
    """

    def __init__(self):
        self.actions, self.trajectories = [], 0

    def add(self, actions, trajectories=1):
        """actions: (N, A) of one trajectory (or of several, then say how many)."""
        self.actions.append(np.asarray(actions, np.float32))
        self.trajectories += trajectories

    def result(self, mask=None):
        """The dataset's entry of dataset_statistics.json. mask: (A,) True = normalized (default: all)."""
        if not self.actions:
            raise ValueError("the dataset holds no actions; statistics need at least one trajectory.")
        x = np.concatenate(self.actions).astype(np.float64)                  # (N, A)
        q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)                      # linear between order statistics
        values = {"mean": x.mean(0), "std": x.std(0), "min": x.min(0), "max": x.max(0), "q01": q01,
                  "q99": q99}
        mask = [True] * x.shape[1] if mask is None else [bool(m) for m in mask]
        return {"action": {name: v.tolist() for name, v in values.items()} | {"mask": mask},
                "num_transitions": len(x), "num_trajectories": self.trajectories}


def check_stats(stats, where):
    """The statistics as plain lists; a ValueError if a dataset's are not finite numbers of one length."""
    try:
        plain = json.loads(json.dumps(stats, default=lambda x: x.tolist()))
        for name, entry in plain.items():
            action = {k: entry["action"][k] for k in STATISTICS if k in entry["action"]}
            x = np.array(list(action.values()), np.float64)                 # (n, A)
            if not is_text(name) or x.ndim != 2 or not x.size or not np.isfinite(x).all():
                raise ValueError(f"{name}: {' '.join(str(action).split())[:200]}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ValueError(f"{where}: no action statistics ({type(e).__name__}: {e}). {{dataset: {{'action': "
                         f"{{{', '.join(STATISTICS)}: A finite numbers each}}}}}} is wanted.") from e
    return plain


def pick_stats(stats, key=None):
    """The action statistics of dataset `key`; the key may be left out when there is only one."""
    if not stats:
        raise ValueError("this model has no dataset statistics, so actions cannot be scaled to robot units. "
                         "Put dataset_statistics.json beside the checkpoint.")
    if key is None and len(stats) == 1:
        key = next(iter(stats))
    if key not in stats:
        asked = "no unnorm_key was given" if key is None else f"unnorm_key={key!r}"
        raise ValueError(f"{asked}: this checkpoint has statistics for {sorted(stats)}. "
                         "Choose the dataset recorded on the robot you drive.")
    return check_stats({key: stats[key]}, f"dataset_statistics.json, {key!r}")[key]["action"]


def _bounds(stats, kind, *also):
    """(offset, width, mask) in float64 such that normalized -1 is offset and +1 is offset + width."""
    if kind not in ("q99", "minmax", "meanstd"):
        raise ValueError(f"normalization {kind!r} does not exist; choose q99, minmax or meanstd.")
    low_name, high_name = {"q99": ("q01", "q99"), "minmax": ("min", "max"), "meanstd": ("mean", "std")}[kind]
    missing = [name for name in (low_name, high_name, *also) if name not in stats]
    if missing:
        raise ValueError(f"the statistics have no {', '.join(missing)}, only {', '.join(stats)}; {kind!r} "
                         "normalization needs it. Compute them anew from the dataset.")
    low, high = np.asarray(stats[low_name], np.float64), np.asarray(stats[high_name], np.float64)
    return low, high, np.asarray(stats.get("mask", np.ones(len(low), bool)), bool)


def normalize(x, stats, kind="q99"):
    """Raw actions (..., A) -> normalized, float32.

    kind: "q99" or "minmax" map that range to [-1, 1] and clip; "meanstd" gives z-scores. Dims outside the
    mask stay as they are; dims that never vary in the dataset (min == max) become 0, masked or not.
    """
    low, high, mask = _bounds(stats, kind, "min", "max")
    x = np.asarray(x, np.float32)
    if x.shape[-1] != len(low):
        raise ValueError(f"actions have {x.shape[-1]} numbers, the statistics {len(low)}; are they another "
                         "robot's?")
    if kind == "meanstd":
        y = (x - low) / (high + 1e-8)
    else:
        y = np.clip(2 * (x - low) / (high - low + 1e-8) - 1, -1, 1)   # 1e-8: constant dims do not divide by 0
    y = np.where(mask, y, x)
    constant = np.asarray(stats["min"]) == np.asarray(stats["max"])
    return np.where(constant, 0, y).astype(np.float32)


def unnormalize(a, stats, kind="q99"):
    """Normalized actions (..., A) -> robot units, float64. The inverse of normalize, without its 1e-8."""
    low, high, mask = _bounds(stats, kind)
    a = np.asarray(a)
    if a.shape[-1] != len(low):
        raise ValueError(f"the model's actions have {a.shape[-1]} numbers, the statistics {len(low)}; "
                         "choose statistics of the same robot.")
    if kind == "meanstd":
        y = a * high + low
    else:
        y = 0.5 * (a + 1) * (high - low) + low             # 0.5 (a + 1) in a's own type, the rest in float64
    return np.where(mask, y, a.astype(np.float64))


# ---- Quantizers -------------------------------------------------------------------------------------------

class UniformBins:
    """n equally spaced edges over [low, high]: a number becomes its interval's index, and back its center.

    encode gives 1..n (n only at the upper edge); decode knows n - 1 centers: the error is half a bin at most.
    (OpenVLA's and RoboVLMs' action tokenizers; they then count ids down from the end of the vocabulary.)
    """

    def __init__(self, n=256, low=-1.0, high=1.0):
        self.edges = np.linspace(low, high, n)
        self.centers = (self.edges[:-1] + self.edges[1:]) / 2

    def encode(self, x):
        """Numbers -> bins 1 .. n, of the same shape; what lies outside counts as the edge."""
        return np.digitize(np.clip(x, self.edges[0], self.edges[-1]), self.edges)

    def decode(self, bins):
        """Bins -> the centres of their intervals, of the same shape; a bin that is none: the nearest."""
        return self.centers[np.clip(np.asarray(bins) - 1, 0, len(self.centers) - 1)]


# ---- Chunk ensembling -------------------------------------------------------------------------------------

def adaptive_weights(candidates, alpha=0.1):
    """CogACT's: w_k ~ exp(alpha cos(candidate_k, newest)). candidates: (n, A), oldest first -> (n,)."""
    newest = candidates[-1]
    norms = np.linalg.norm(candidates, axis=1) * np.linalg.norm(newest)  # (n,)
    cosine = candidates @ newest / (norms + 1e-7)                        # an all-zero action has no direction
    weight = np.exp(alpha * cosine)
    return weight / weight.sum()


def exponential_weights(candidates, temperature=0.0):
    """ACT's and SimplerEnv's: w_k ~ exp(-temperature k), k = 0 the oldest. candidates: (n, A) -> (n,)."""
    weight = np.exp(-temperature * np.arange(len(candidates)))
    return weight / weight.sum()


class ChunkEnsemble:
    """Average what the last `horizon` chunks (the newest counts) say about the same moments.

    weights: a function of the candidates (n, A), oldest first; execute: actions played per chunk. A chunk of
    k calls ago has its word on the i-th action from now in row k execute + i, if it is that long.
    """

    def __init__(self, horizon, weights, execute=1):
        self.weights, self.chunks, self.execute = weights, deque(maxlen=horizon), execute

    def reset(self):
        """Forget all chunks: a new episode."""
        self.chunks.clear()

    def push(self, chunk):
        """chunk: (T, A), or a single action (A,). Returns the next `execute` actions, float64."""
        self.chunks.append(np.atleast_2d(np.asarray(chunk, np.float64)))
        age = range((len(self.chunks) - 1) * self.execute, -1, -self.execute)
        single, out = len(self.chunks[-1]) == 1, []
        for i in range(min(self.execute, len(self.chunks[-1]))):
            candidates = np.stack([c[0 if single else a + i] for a, c in zip(age, self.chunks)
                                   if single or a + i < len(c)])
            out.append(self.weights(candidates) @ candidates)  # (n,) @ (n, A)
        return np.stack(out)

    def step(self, chunk):
        """As `push`, for execute = 1: the action for now, (A,) float64."""
        return self.push(chunk)[0]


# ---- Files ------------------------------------------------------------------------------------------------

def _flush(path):
    """Force a file's (or a folder's) content to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _writing(path):
    """Turn whatever the libraries raise when a disk is full or a folder is not one into one clear OSError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as e:      # torch.save: a full disk is a RuntimeError
        if type(e) is RuntimeError and not re.search("writ|iostream|inline_container", str(e)):
            raise
        if "cannot write " in str(e):                          # of a file inside: it has said why
            raise
        reason = os.strerror(e.errno) if getattr(e, "errno", None) else str(e).splitlines()[0]
        raise OSError(getattr(e, "errno", None) or errno.EIO, f"cannot write {path}: {reason}. "
                      "Free some space, or choose another output folder.") from e


def atomic_write(path, writer):
    """Write a file that is either whole or absent: writer(temporary path), flush to the disk, rename."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            writer(part)
            os.chmod(part, 0o644)                          # safetensors makes its files private
            _flush(part)
            os.replace(part, path)
            _flush(path.parent)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()


@contextlib.contextmanager
def atomic_folder(path):
    """`with atomic_folder(path) as part:` fill `part`; it appears at `path` when all of it is on the disk."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, a folder is to be written there; choose another output path.")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in sorted(path.parent.glob(f".{path.name}.*.part")):  # of a run that was killed while saving
            if left.name.endswith(".old.part") and not path.exists():
                os.replace(left, path)                                 # about to be replaced: still good
            shutil.rmtree(left, ignore_errors=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.mkdir()
            yield part
            for file in [f for f in part.rglob("*") if f.is_file()] + [part]:
                _flush(file)
            if path.exists():                                          # replacing: the old one goes last
                os.replace(path, part.with_suffix(".old.part"))
            os.replace(part, path)
            _flush(path.parent)
        finally:
            for left in (part, part.with_suffix(".old.part")):
                shutil.rmtree(left, ignore_errors=True)


def write_json(path, value):
    """Write a value as JSON, whole or not at all."""
    atomic_write(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def read_json(path):
    """Parse a JSON file that holds an object; a missing, torn or other one is one clear ValueError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        reason = f"it holds {str(value)[:40]}, not an object"
    except (OSError, ValueError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
    raise ValueError(f"cannot read {path}: {reason}. Copy it again from where it came.")


def save_folder(folder, method, preset, config, tensors, stats=None, card="", origin=None):
    """Write a checkpoint folder (layout: top of this file). config.json comes last: without it, it is none.

    tensors: {official name: tensor}; stats: dataset_statistics.json; card: the text of README.md.
    """
    folder = Path(folder)
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    about = {"format": "pt", "method": method}
    atomic_write(folder / "model.safetensors", lambda part: save_file(tensors, part, about))
    write_json(folder / "dataset_statistics.json", stats or {})
    atomic_write(folder / "README.md", lambda part: part.write_text(card, encoding="utf-8"))
    write_json(folder / "config.json", {"method": method, "preset": preset, "config": config,
                                        "origin": origin or {}, "version": VERSION})


def load_config(folder, method=None):
    """The config.json of a checkpoint folder; of another method or newer than this code: ValueError."""
    config = {"preset": "custom", "origin": {}, "version": 0, **read_json(Path(folder) / "config.json")}
    kinds = {"method": str, "config": dict, "preset": str, "origin": dict, "version": int}
    wrong = [name for name, kind in kinds.items() if type(config.get(name)) is not kind]
    if wrong:
        raise ValueError(f"{folder}/config.json is not the config of a checkpoint of this project: "
                         f"{wrong[0]} is {str(config.get(wrong[0]))[:40]}. Copy it again.")
    if method and config["method"] != method:
        raise ValueError(f"{folder} is a checkpoint of {config['method']!r}, {method!r} was asked for; "
                         f"use --model {config['method']}.")
    if config["version"] > VERSION:
        raise ValueError(f"{folder} is of version {config['version']}, this code reads {VERSION}: update it.")
    return config


def method_of(path_or_id, model=None):
    """The method of a checkpoint: what its config.json says, or `model` where it says nothing."""
    path = resolve(path_or_id, ["config.json"])
    found = read_json(path / "config.json").get("method") if (path / "config.json").is_file() else None
    if model and found and found != model:
        raise ValueError(f"--model {model}: {path_or_id} is a checkpoint of {found!r}; leave --model out.")
    if not (model or found):
        raise ValueError(f"{path_or_id} does not say of which method it is (an official release?); "
                         "add --model NAME.")
    return model or found


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays and nothing else: no other name is looked up, so nothing in a file is executed."""
    KNOWN = {("numpy", "ndarray"), ("numpy", "dtype"), ("collections", "OrderedDict"), ("_codecs", "encode"),
             *((f"numpy.{core}.{file}", name) for core in ("core", "_core") for file, name in (
                 ("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer")))}

    def find_class(self, module, name):
        """What an array is made of; anything else that a pickle names is a ValueError."""
        if (module, name) not in self.KNOWN:
            raise ValueError(f"it names {module}.{name}, which arrays have no use for")
        return super().find_class(module, name)


def load_weights(path):
    """Tensors of a .safetensors or weights-only .pt file, memory-mapped. Nothing in the file is executed."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, OSError, LookupError,
            ValueError) as e:
        reason = textwrap.shorten((str(e).splitlines() or [type(e).__name__])[0], 160, placeholder=" ...")
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) is torn, or no weights file: {reason}. "
                         "Copy or download it again.") from e


def check_fit(want, have, path):
    """Strict loading with an error message of one line. want: {parameter name: tensor}, have: whatever."""
    def about(t):                                              # any float type fits any other
        kind, shape = getattr(t, "dtype", type(t)), tuple(getattr(t, "shape", ()))
        return shape if getattr(kind, "is_floating_point", False) else f"{kind} {shape}"
    want, have = ({name: about(t) for name, t in tensors.items()} for tensors in (want, have))
    missing, unknown = [n for n in want if n not in have], [n for n in have if n not in want]
    other = [f"{n} {have[n]} instead of {want[n]}" for n in want if n in have and have[n] != want[n]]
    if missing or unknown or other:
        raise ValueError(f"{path} does not fit the model: " + "; ".join(
            f"{len(names)} parameters {what}, e.g. {names[0]}" for names, what in
            ((missing, "missing"), (unknown, "unknown"), (other, "of another kind")) if names) + ".")


def resolve(path_or_id, patterns, option="checkpoint"):
    """A local file or folder as it is; of a hub id "org/name", the files matching `patterns` are downloaded.

    HF_TOKEN, HF_HOME and HF_HUB_OFFLINE work as always with huggingface_hub; its progress bar is shown.
    """
    path = Path(path_or_id).expanduser()
    if (path / "last" / "config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(f"{option} {path_or_id} is a whole run; give its newest checkpoint: {path / 'last'}")
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)):
        raise ValueError(f"{option} {path_or_id}: no such file or folder (nor a hub id, which is org/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError,
                                        RepositoryNotFoundError)
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=list(patterns)))
    except GatedRepoError as e:
        reason = "it is gated: accept its licence on the hub and set HF_TOKEN"
        raise ValueError(f"{option} {path_or_id}: {reason}, or give a local path.") from e
    except RepositoryNotFoundError as e:
        raise ValueError(f"{option} {path_or_id}: neither a local path nor a repository on the hub "
                         "(a private one needs HF_TOKEN).") from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise ValueError(f"{option} {path_or_id}: not a local path, not in the hub's cache, and not to be "
                         f"had now ({type(e).__name__}; offline?). Give a local path.") from e


# ---- Command line -----------------------------------------------------------------------------------------

def choose(complaint, name, known):
    """A ValueError with the nearest match, unless `name` is one of `known`."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
        raise ValueError(f"{complaint} {name!r}; {hint}")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, which takes no empty values and no abbreviated flags."""

    def __init__(self, description, **how):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **how)

    def error(self, message):
        """A flag that cannot be read is a ValueError, as any other mistake."""
        raise ValueError(f"{message} (python {self.prog} --help lists the flags)")

    def parse_args(self, args=None, namespace=None):
        """As argparse's; a flag without its value, and the device "meta", are a ValueError."""
        args = sys.argv[1:] if args is None else list(args)
        for before, text in zip(["", *args], args):            # torch's device "meta" computes nothing
            if re.search(r"(^|=)(--[a-z-]+=\s*|--device=meta)$", f"{before}={text}"):
                self.error(f"{before} {text!r} cannot be used; give another value, or leave the flag out")
        return super().parse_args(args, namespace)


def within(low, high=2**63 - 1):
    """For add_argument(type=...): an int (a float if `low` is one) from low to high."""
    def read(text):
        if not low <= (value := type(low)(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low} .. {high}")
        return value
    read.__name__ = type(low).__name__                         # argparse: "invalid int value: 'ten'"
    return read


def cli(main):
    """Run a script's main(): what a user got wrong (ValueError, OSError) is one line and exit code 2.

    PLAINVLA_TRACEBACK=1 shows the traceback.
    """
    try:
        code = main()
    except (ValueError, OSError) as e:
        if os.environ.get("PLAINVLA_TRACEBACK"):
            raise
        text = e.strerror if isinstance(e, OSError) and e.strerror and not e.filename else str(e)
        text = re.sub(r"(?<=[\w)'])\.\.(?= |$)", ".", " ".join(text.split()))    # a reason's stop, and ours
        print(f"error: {text}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code or 0)
