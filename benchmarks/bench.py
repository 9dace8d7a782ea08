"""
Time and count the methods beside plain library modules that do the same thing, in the same process.

    python benchmarks/bench.py all count --device meta --size official   # FLOPs, bytes, ops: no memory needed
    python benchmarks/bench.py vla0 infer --check                 # tiny, CPU: host overhead, not speed-up
    python benchmarks/bench.py vla0 all --device cuda --size official --check --out results/h200.jsonl
    python benchmarks/bench.py vla0 decode --ckpt runs/vla0-tiny/last --episodes 10   # a robot's own drafts
    python benchmarks/bench.py --diff old.jsonl new.jsonl

WHAT      ceiling   this machine: a matrix product [TFLOP/s], a copy [TB/s, read plus write]
          infer     pictures and token ids on the device -> tokens, or a chunk; variant jpeg: the whole path,
                    JPEG bytes -> robot units; cold: model made, first call
          decode    what repeats: tokens after the prefill, denoising steps after the VLM
          train     forward, backward, clipping, AdamW (learning rate 0: both sides keep the same weights)
          loader    JPEG bytes -> a batch of tensors, without augmentation
          count     FLOPs, bytes of weights and keys moved, ops, bytes saved for backward, parameters

Our side is A, the plain modules B: order A B B A ..., one ratio B / A per round; median and quartiles are
given. Weights are random (never zeros), inputs differ from call to call. `forwards`: passes of what repeats,
after the prefill. `ops`: dispatched operations that compute (not views; attention is one). What was not
measured is null; `detail` holds what has no field. The floor of a stage is the larger of FLOPs / peak and
bytes / copy rate; stages add up. Peaks are measured in the same run; on the meta device they are an H200's.

A method joins as a class below (CogACT, VLA0): its plain modules, variants, one inference in counted stages.
"""
import argparse
import contextlib
import dataclasses
import functools
import gc
import io
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, flop_registry  # noqa: E402

import cogact  # noqa: E402
import common  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402
import vla0  # noqa: E402

WHATS = ("ceiling", "infer", "decode", "train", "loader", "count")
REFERENCE = (790.0, 4.3, "H200 reference")     # TFLOP/s bf16, TB/s: where nothing can be measured
INPUTS = 4                                     # different inputs that calls take in turn


# ---- Rows: one JSON object per line -----------------------------------------------------------------------

FIELDS = """
schema time commit dirty model what variant size device torch transformers cuda dtype attn compile weights
batch tokens_in tokens_out forwards draft warmup rounds inner ms ms_p10 ms_p90 per_s baseline baseline_ms
ratio ratio_q25 ratio_q75 flops bytes peak_tflops peak_tbps peaks floor_ms x_floor mfu mem_peak_bytes ops
saved_bytes data_wait_ms check load note detail
""".split()
KEY = ("model", "what", "variant", "size", "device", "dtype", "batch")      # what --diff matches rows by


@functools.cache
def git(*command):
    """What git says of this folder; None without git."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *command]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def device_of(name):
    """meta, or a device that computes."""
    return torch.device("meta") if name == "meta" else common.device(name)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    about = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", about.read_text()) if about.is_file() else None
    return f"{found[1] if found else platform.processor() or 'cpu'}, {torch.get_num_threads()} threads"


def new_row(args, device, **known):
    """All fields, null unless known here or given."""
    changed, load = git("status", "--porcelain", "--untracked-files=no"), None
    with contextlib.suppress(OSError):
        load = round(os.getloadavg()[0], 2)
    row = dict.fromkeys(FIELDS) | {
        "schema": 1, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "load": load,
        "commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed),
        "device": device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda,
        "transformers": transformers.__version__, "dtype": args.dtype}
    return row | known


def show(value):
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def part(name, unit=1.0, what=None):
    """row -> its field in that unit, if the row is of that `what`."""
    return lambda r: r[name] / unit if r[name] is not None and what in (None, r["what"]) else None


COLUMNS = {
    "model": lambda r: r["model"], "what": lambda r: r["what"], "variant": lambda r: r["variant"],
    "ms": part("ms"), "ratio": part("ratio"),
    "q25..q75": lambda r: r["ratio"] and f"{r['ratio_q25']:.3g}..{r['ratio_q75']:.3g}",
    "passes": part("forwards"), "tokens": part("tokens_out"),
    "/pass": lambda r: (r["detail"] or {}).get("tokens_per_pass"), "x floor": part("x_floor"),
    "MFU": part("mfu"), "GFLOP": part("flops", 1e9), "GB": part("bytes", 1e9), "floor ms": part("floor_ms"),
    "TFLOP/s": part("peak_tflops", what="ceiling"), "TB/s": part("peak_tbps", what="ceiling"),
    "ops": part("ops"), "saved MB": part("saved_bytes", 1e6), "memory MB": part("mem_peak_bytes", 1e6),
    "check": lambda r: r["check"]}


def print_table(rows):
    """One line per row; columns that say nothing are left out."""
    body = [[show(of(r)) for of in COLUMNS.values()] for r in rows]
    keep = [i for i in range(len(COLUMNS)) if any(line[i] != "-" for line in body)]
    lines = [list(COLUMNS), *body]
    width = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(line[i].ljust(width[i]) for i in keep).rstrip())
    for note in sorted({r["note"] for r in rows if r["note"]}):
        print(f"note: {note}")


def read_rows(path):
    rows = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}.") from e
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or row.get("schema") != 1 or not set(KEY) <= row.keys():
            raise ValueError(f"{path}, line {number}: no row of bench.py (a JSON object of schema 1).")
        rows.append(dict.fromkeys(FIELDS) | row)
    return rows


def diff(old, new):
    """Print how rows of `new` differ from those of `old` of the same key; of equal keys, the last counts."""
    def by_key(rows, without=()):
        return {tuple(r[k] for k in KEY if k not in without): r for r in rows}
    old_rows, new_rows = read_rows(old), read_rows(new)
    without = () if by_key(old_rows).keys() & by_key(new_rows).keys() else ("device",)
    a, b = by_key(old_rows, without), by_key(new_rows, without)
    for key in b:
        name = " ".join(map(str, key[:4]))
        if key not in a:
            print(f"{name:<40} only in {new}")
            continue
        x, y, told = a[key], b[key], []
        same = (x["torch"], x["device"]) == (y["torch"], y["device"])
        counted = ("flops", "bytes", "ops", "saved_bytes", "forwards") if y["ms"] is None else ("forwards",)
        for field in ("ratio", "x_floor", *(("ms",) if same else ()), *counted):
            if x[field] is None or y[field] is None:
                continue
            change = f" ({(y[field] / x[field] - 1) * 100:+.1f} %)" if x[field] else ""
            told.append(f"{field} {show(x[field])} -> {show(y[field])}{change}")
            if field == "ratio" and x["ratio_q25"] <= y["ratio_q75"] and y["ratio_q25"] <= x["ratio_q75"]:
                told[-1] += ", inconclusive"
        print(f"{name:<40} {'; '.join(told) or 'nothing to compare'}")
    for key in a.keys() - b.keys():
        print(f"{' '.join(map(str, key[:4])):<40} only in {old}")


# ---- Measuring --------------------------------------------------------------------------------------------

class Timed(NamedTuple):
    """What a side returns when only a part of its call counts."""
    output: object
    seconds: float


@dataclasses.dataclass
class Case:
    """A thing to do, and the same thing done by plain modules. Sides: functions of the call's number."""
    ours: object
    base: object = None
    same: object = None                        # (ours' output, base's, call number) -> (equal?, in words)
    about: dict = dataclasses.field(default_factory=dict)      # fields of the row
    floor: object = None                       # () -> list of Stage
    once: bool = False                         # a single call, no warm-up


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device, side, calls):
    """Seconds per call of side(i) for i in calls: between two events on CUDA, where launches run ahead."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    wait(device)
    begin, own = time.perf_counter(), []
    for event in events[:1]:
        event.record()
    for i in calls:
        out = side(i)
        own += [out.seconds] if isinstance(out, Timed) else []
    for event in events[1:]:
        event.record()
    wait(device)
    seconds = events[0].elapsed_time(events[1]) / 1e3 if events else time.perf_counter() - begin
    return (sum(own) if own else seconds) / len(calls)


def latency(device, side, i):
    """Seconds of one call as a robot waits for it, host work included."""
    wait(device)
    begin = time.perf_counter()
    side(i)
    wait(device)
    return time.perf_counter() - begin


def sm_clock(device):
    """The GPU's clock [MHz]; None where it cannot be asked (CPU; no pynvml)."""
    with contextlib.suppress(ModuleNotFoundError, RuntimeError):
        return torch.cuda.clock_rate(device) if device.type == "cuda" else None


def warm_up(device, sides, args):
    """Call each side `warmup` times, then until two rounds agree within 5 % (five at most)."""
    for side in sides:
        for i in range(args.warmup):
            clock(device, side, [i])
        before = 0.0
        for _ in range(5 if args.warmup else 0):
            now = clock(device, side, range(args.inner))
            if abs(now / before - 1 if before else 1) < 0.05:
                break
            before = now


def measure(case, device, args):
    """The row's fields of time: A B B A ..., a ratio per round."""
    sides = [side for side in (case.ours, case.base) if side]
    if args.side:                                              # of --rss: one side alone
        sides = [case.base if args.side == "base" and case.base else case.ours]
    rounds, inner, before = (1, 1, None) if case.once else (args.rounds, args.inner, sm_clock(device))
    found = {"rounds": rounds, "inner": inner, "warmup": 0 if case.once else args.warmup}
    if not case.once:
        warm_up(device, sides, args)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        alone = statistics.median(latency(device, sides[0], i) for i in range(rounds)) * 1e3
        found |= {"mem_peak_bytes": torch.cuda.max_memory_allocated(device), "detail": {"latency_ms": alone}}
    times = [[] for _ in sides]
    for r in range(rounds):
        calls = range(r * inner, (r + 1) * inner)
        for k in range(len(sides))[::1 if r % 2 == 0 else -1]:
            times[k].append(clock(device, sides[k], calls) * 1e3)
    after = sm_clock(device) if before else None
    if after and after < 0.95 * before:
        return found | {"note": f"discarded: the clock fell from {before} to {after} MHz"}
    return found | spread(times[0], [b / a for a, b in zip(*times)] if len(sides) == 2 else [],
                          statistics.median(times[-1]), args.batch)


def spread(ms, ratios, baseline_ms, batch=1):
    """Fields of time from the ms per call and the ratio of each round."""
    low, middle, high = np.percentile(ms, [10, 50, 90]).tolist()
    found = {"ms": middle, "ms_p10": low, "ms_p90": high, "per_s": batch / middle * 1e3}
    if ratios:
        found |= dict(zip(("ratio_q25", "ratio", "ratio_q75"), np.percentile(ratios, [25, 50, 75]).tolist()))
        found["baseline_ms"] = baseline_ms
    return found


@functools.cache
def ceilings(device, dtype):
    """(TFLOP/s of a matrix product, TB/s of a copy, where from), here and now."""
    if device.type == "meta":
        return REFERENCE
    flops = train.measured_peak(device, dtype)
    n = 2**30 if device.type == "cuda" else 2**26
    a, b = torch.randn(n, device=device), torch.empty(n, device=device)
    seconds = min(clock(device, lambda i: b.copy_(a), [0]) for _ in range(4))
    return flops / 1e12, 2 * a.nbytes / seconds / 1e12, "this run"


# ---- Counting ---------------------------------------------------------------------------------------------

class Stage(NamedTuple):
    """A part of the work: its cost, and how often it runs."""
    name: str
    flops: int
    bytes: int
    ops: int
    times: float = 1


def is_view(func):
    """Does the op only look at its input in another way? (_unsafe_view does; its schema does not say so.)"""
    returns = func._schema.returns
    return func.overloadpacket is torch.ops.aten._unsafe_view or bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns)


class Ops(TorchDispatchMode):
    """Counts computing ops, and the bytes of watched tensors that matrix products and attention read."""

    def __init__(self, watched=()):
        """watched: (tensor, bytes per number)."""
        super().__init__()
        self.ops, self.bytes, self.fused = 0, 0, False
        self.keep = [t for t, _ in watched]                    # storages are known by address: they must live
        self.size = {t.untyped_storage()._cdata: size for t, size in watched}

    def read(self, *tensors):
        for t in tensors:
            if isinstance(t, torch.Tensor):
                self.bytes += t.numel() * self.size.get(t.untyped_storage()._cdata, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.fused:
            self.ops += not is_view(func)
            if func.overloadpacket in flop_registry:
                self.read(*args)
        return out


class Fused(TorchFunctionMode):
    """Counts attention and F.rms_norm as one op each, as on CUDA, whatever this device makes of them."""

    def __init__(self, ops):
        super().__init__()
        self.counter = ops

    def __torch_function__(self, func, types, args=(), kwargs=None):
        attention = func is F.scaled_dot_product_attention
        if not attention and func not in (F.rms_norm, torch.rms_norm):
            return func(*args, **(kwargs or {}))
        self.counter.ops += 1
        if attention:
            self.counter.read(*args[1:3])                      # keys and values, perhaps of a cache
        self.counter.fused = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counter.fused = False


def count(work, watched=(), name="", times=1):
    """Run work() once -> (its Stage, what it returned)."""
    ops = Ops(watched)
    # in its plain form, attention's products are counted on every device
    with FlopCounterMode(display=False) as flops, ops, Fused(ops), sdpa_kernel(SDPBackend.MATH):
        out = work()
    return Stage(name, flops.get_total_flops(), ops.bytes, ops.ops, times), out


class Kept(torch.autograd.Function):
    """Stands for fused attention: keeps what its kernels keep, inputs, output and a number per row."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class KeepFused(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return Kept.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def saved_bytes(work, parameters):
    """Bytes that work() keeps for the backward pass, distinct storages, parameters not counted."""
    kept = {}

    def note(x):
        storage = x.untyped_storage()
        kept[storage._cdata] = storage                         # alive, so that no address comes twice
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), KeepFused():
        work()
    for p in parameters:
        kept.pop(p.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def priced(stages, peaks):
    """Fields of the row: FLOPs, bytes, and the time [ms] that they need at these peaks."""
    tflops, tbps, where = peaks
    flops, moved = (round(sum(getattr(s, k) * s.times for s in stages)) for k in ("flops", "bytes"))
    least = sum(s.times * max(s.flops / tflops, s.bytes / tbps) for s in stages) / 1e9
    return {"flops": flops, "bytes": moved, "floor_ms": least or None, "peak_tflops": tflops,
            "peak_tbps": tbps, "peaks": where}


# ---- A method under test: what all of them share ----------------------------------------------------------

STATS = {"synthetic": {"action": {
    "min": [-0.1] * 6 + [0.0], "max": [0.1] * 6 + [1.0], "q01": [-0.1] * 6 + [0.0], "q99": [0.1] * 6 + [1.0],
    "mean": [0.0] * 6 + [0.5], "std": [0.05] * 6 + [0.5], "mask": [True] * 6 + [False]}}}


class Words:
    """Stands in for a tokenizer that would have to be downloaded: an id for every word and sign."""

    def __call__(self, text, **_):
        ids = [100 + zlib.crc32(w.encode()) % 300 for w in re.findall(r"\w+|[^\w\s]", text)]
        return SimpleNamespace(input_ids=ids)


def to_jpeg(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return file.getvalue()


def from_jpeg(file):
    return np.array(Image.open(io.BytesIO(file)).convert("RGB"))


class Jpegs:
    """A data set of JPEG pictures and random actions; decodes when asked, as a loader's worker does."""

    def __init__(self, bench, distinct=8, n=64):
        self.n, self.samples = n, [bench.sample(i) for i in range(distinct)]
        self.files = [{v: to_jpeg(p) for v, p in s["images"].items()} for s in self.samples]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        i %= len(self.samples)
        return {**self.samples[i], "images": {v: from_jpeg(file) for v, file in self.files[i].items()}}


class Bench:
    """One method at one size, for one WHAT. A method below says what is its own:

    module, presets, prompt, baseline (what the plain modules are, in words), pixels (mean, deviation of each
    tower's input), variants, cuda_only {variant: why}; adapt, cast, prompt_text, run (one inference), infer
    and decode (the Case of a variant), loss, base_loss, stages (one inference, counted in parts). `model`,
    `base` (the plain modules around the same weights) and `batches` are made when first used.
    """
    module, presets, prompt, baseline, pixels, cuda_only = None, {}, 0, "", (), {}
    variants = {"train": ("step",), "loader": ("inline", "workers:2")}

    def __init__(self, args, what):
        self.args, self.what, self.device = args, what, device_of(args.device)
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
        self.plain = args.baseline != "none"
        wanted = SimpleNamespace(
            model=self.module.__name__, preset=self.presets[args.size], set=args.set, dtype=args.dtype,
            **dict.fromkeys(("steps", "batch", "ema", "seed", "tokenizer")))
        self.cfg = train.configure(self.module, wanted)
        self.overrides = {name: getattr(self.cfg, name) for name in (i.partition("=")[0] for i in args.set)}
        self.cfg = self.model.cfg if args.ckpt else self.adapt(self.cfg)

    def adapt(self, cfg):
        """What this device, or random weights, need otherwise."""
        return cfg

    def again(self, what=None, cfg=None, **changed):
        """Another one of these with other arguments."""
        other = type(self)(SimpleNamespace(**{**vars(self.args), **changed}), what or self.what)
        if cfg is not None:
            other.cfg = other.adapt(cfg)
        return other

    @functools.cached_property
    def twin(self):
        """The same on the meta device: to count without memory."""
        return self.again(cfg=self.cfg, device="meta", ckpt=None, set=[])

    @functools.cached_property
    def model(self):
        if self.args.ckpt:
            return self.module.from_pretrained(self.args.ckpt, device=self.device, dtype=self.args.dtype,
                                               **self.overrides)
        tokenizer = self.module.load_tokenizer(self.cfg) if self.cfg.tokenizer == "tiny" else Words()
        torch.manual_seed(0)
        with torch.device(self.device):
            model = self.module.Model(self.cfg, tokenizer, STATS).eval()
        if self.what not in ("train", "count"):
            model.requires_grad_(False)
        with torch.no_grad():
            self.shake(model)
            if self.what != "train":                           # training keeps float32 weights under autocast
                self.cast(model)
        return model

    def shake(self, model):
        """No weight stays zero or one: those would hide mistakes, and draw less power."""
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.02)
            elif self.device.type != "meta" and not p.any():
                p.normal_(std=0.02)

    # -- inputs: those of call i are the same for both sides

    def picture(self, i, side=256):
        """Synthetic picture number i, uint8 (side, side, 3): 8 x 8 coloured squares."""
        squares = common.keyed_rng(i, 1).integers(0, 256, (8, 8, 3), np.uint8)
        return np.kron(squares, np.ones((side // 8, side // 8, 1), np.uint8))

    @functools.cached_property
    def instruction(self):
        """At official size, as long as makes the prompt of performance.md."""
        words = "pick up the red cube"
        if self.args.size == "tiny" or self.args.ckpt:
            return words
        sample = {"images": {v: self.picture(0) for v in self.cfg.views}, "instruction": words}
        short = self.prompt - len(self.module.prepare(sample, self.cfg, self.model.tokenizer)["ids"])
        if short < 0:
            raise ValueError(f"the prompt has {self.prompt - short} tokens, not {self.prompt}: shorten it.")
        return words + " please" * short

    def observation(self, i):
        return {"images": {v: self.picture(i * 8 + k) for k, v in enumerate(self.cfg.views)},
                "instruction": self.instruction}

    def sample(self, i):
        """An observation with actions (T, A) in the range of STATS."""
        low, high = (np.array(STATS["synthetic"]["action"][k]) for k in ("min", "max"))
        actions = common.keyed_rng(i, 2).uniform(low, high, (self.cfg.horizon, len(low)))
        actions[:, -1] = actions[:, -1] > 0.5
        return {**self.observation(i), "actions": actions.astype(np.float32), "dataset": "synthetic"}

    def collate(self, samples):
        """Samples or observations -> a batch on the device."""
        rows = [self.module.prepare(s, self.cfg, self.model.tokenizer, STATS) for s in samples]
        return {k: v.to(self.device) for k, v in self.module.collate(rows, self.cfg).items()}

    @functools.cached_property
    def batches(self):
        """INPUTS batches (on the meta device one), each of other pictures."""
        make, B = self.sample if self.what == "train" else self.observation, self.args.batch
        return [self.collate([make(i * B + b) for b in range(B)])
                for i in range(1 if self.device.type == "meta" else INPUTS)]

    def batch(self, i):
        return self.batches[i % len(self.batches)]

    def tokens_in(self):
        return self.batches[0]["ids"].shape[1]

    def tokens_out(self):
        return None

    # -- cases

    def case(self, ours, base=None, same=None, floor=None, **about):
        """A Case; `base` only if a baseline is wanted, tensors compared unless `same` says how."""
        same = same or (lambda a, b, i: self.close(a, b))
        return Case(ours, base if self.plain else None, same, about, floor)

    def close(self, ours, base):
        """Are two tensors equal up to rounding? -> (bool, in words)."""
        bound = 1e-4 if self.dtype == torch.float32 else 5e-2
        a, b = (torch.as_tensor(x).double() for x in (ours, base))
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        return error <= bound, f"differ by {error:.1e} of the largest value, bound {bound:.0e}"

    def cold(self):
        """A model made, and its first call."""
        def run(i):
            fresh = self.again()
            return fresh.run(fresh.batch(0), 0)
        return Case(run, once=True, about={"note": "cold: random weights are made, not loaded"})

    def whole_path(self, chunk, base_chunk):
        """JPEG bytes -> actions in robot units. chunk(observations, i) -> (B, T, A)."""
        B = self.args.batch
        files = [[to_jpeg(p) for p in self.observation(i)["images"].values()] for i in range(INPUTS * B)]

        def observe(i):
            at = range(i % INPUTS * B, (i % INPUTS + 1) * B)
            pictures = [dict(zip(self.cfg.views, map(from_jpeg, files[k]))) for k in at]
            return [{"images": p, "instruction": self.instruction} for p in pictures]
        return self.case(lambda i: chunk(observe(i), i), lambda i: base_chunk(observe(i), i))

    def train(self, variant):
        """A training step of each side; their losses are compared."""
        bf16 = self.dtype == torch.bfloat16
        model = self.model.train()

        def stepper(loss, parameters, **how):
            parameters = [p for p in parameters if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=0.0, **how)

            def step(i):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    value = loss(self.batch(i), i)
                value.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                return value.detach()
            return step
        base = stepper(self.base_loss, self.base.parameters()) if self.plain else None
        return self.case(stepper(self.loss, model.parameters(), fused=True), base, tokens_in=self.tokens_in(),
                         weights="random, float32")

    def loader(self, variant):
        """Batches from JPEG files: data.loader, against a loop in the main process."""
        cfg, tokenizer, files, B = self.cfg, self.model.tokenizer, Jpegs(self), self.args.batch
        prepare = functools.partial(self.module.prepare, cfg=cfg, tokenizer=tokenizer, stats=STATS)
        collate = functools.partial(self.module.collate, cfg=cfg)
        make = functools.partial(data.loader, files, prepare, collate, B)
        batches, inline = make(workers=int(variant.partition(":")[2] or 0)), make()

        def base(i):
            """As one first writes it: pictures to float tensors, prompts to ids, one after the other."""
            rows, size = [], (cfg.image_size, cfg.image_size)
            for sample in (files[i * B + k] for k in range(B)):
                pictures = [np.array(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC))
                            for p in sample["images"].values()]
                pixels = [(torch.from_numpy(p).float() / 255 - mean) / std for p in pictures
                          for mean, std in self.pixels]
                ids = torch.tensor(tokenizer(self.prompt_text(sample["instruction"])).input_ids)
                rows.append((torch.stack(pixels), ids, torch.from_numpy(sample["actions"])))
            return [torch.stack(column) for column in zip(*rows)]

        def same(a, b, i):
            one = next(inline)
            return all(torch.equal(a[k], one[k]) for k in one), "batches as made inline"
        return self.case(lambda i: next(batches), base, same, attn=None, weights=None,
                         baseline="PIL in the main process" if self.plain else None)

    # -- counts

    def itemsize(self, name):
        """Bytes per number of parameter `name` when acting."""
        return self.dtype.itemsize

    def watched(self):
        return [(p, self.itemsize(name)) for name, p in self.model.named_parameters()]

    def counts(self):
        """Yield (variant, fields): inference, a training sample, parameters."""
        stages, peaks = self.stages(), ceilings(self.device, self.dtype)
        yield "inference", priced(stages, peaks) | {
            "tokens_in": self.tokens_in(), "tokens_out": self.tokens_out(),
            "ops": round(sum(s.ops * s.times for s in stages)),
            "detail": {s.name: s._asdict() for s in stages}}
        learner = self.again("train", self.cfg)
        learner.model = self.model.train()
        forward, _ = count(lambda: learner.loss(learner.batch(0), 0))
        kept = saved_bytes(lambda: learner.loss(learner.batch(0), 0), self.model.parameters())
        kind = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        yield "train", {"flops": 3 * forward.flops, "ops": forward.ops, "saved_bytes": kept,
                        "tokens_in": learner.tokens_in(), "note": "train counts: 3 x forward, all of it "
                        f"trained; ops and saved bytes of the forward pass, in {kind}"}
        self.model.eval()
        parts = {name: {"parameters": sum(p.numel() for p in m.parameters()), "bytes": sum(
            p.numel() * self.itemsize(f"{name}.{n}") for n, p in m.named_parameters())}
            for name, m in self.model.named_children()}
        whole = {k: sum(of[k] for of in parts.values()) for k in ("parameters", "bytes")}
        yield "parameters", {"bytes": whole["bytes"], "detail": {"all": whole, **parts}}
        yield from self.more_counts()

    def more_counts(self):
        return ()


# ---- CogACT -----------------------------------------------------------------------------------------------

class PlainCogACT(nn.Module):
    """CogACT of public modules: transformers' towers and Llama, torch's TransformerEncoderLayer as DiT block.

    As one writes it from the paper: all hidden states, the word head, a scheduler that looks its numbers up
    step by step. The weights are those of `model`; the Llama is the very module.
    """

    def __init__(self, cfg, model):
        super().__init__()
        from transformers import (Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig,
                                  SiglipVisionModel)
        both = {"image_size": cfg.image_size, "patch_size": cfg.patch_size, "hidden_act": "gelu"}
        self.cfg, self.llm = cfg, model.llm_backbone.llm
        self.dino = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
            hidden_size=cfg.dino_width, num_hidden_layers=cfg.dino_depth, num_attention_heads=cfg.dino_heads,
            mlp_ratio=cfg.dino_mlp // cfg.dino_width, num_register_tokens=cfg.registers, **both))
        self.siglip = SiglipVisionModel(SiglipVisionConfig(
            hidden_size=cfg.siglip_width, num_hidden_layers=cfg.siglip_depth, vision_use_head=False,
            num_attention_heads=cfg.siglip_heads, intermediate_size=cfg.siglip_mlp, **both))
        self.projector, self.net = model.projector.projector, model.action_model.net
        towers = model.vision_backbone
        with torch.no_grad():
            self.fill(self.dino.embeddings, self.dino.encoder.layer, towers.dino_featurizer)
            self.fill(self.siglip.embeddings, self.siglip.encoder.layers, towers.siglip_featurizer)
            self.blocks = nn.ModuleList(map(self.encoder_layer, self.net.blocks))
        for module in (*self.dino.modules(), *self.siglip.modules()):      # matrices cast once, if ours are
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(self.projector[0].weight.dtype)
        self.alphas = np.cumprod(1 - cogact.cosine_betas(cfg.num_train_steps))
        self.to(model.device)

    def fill(self, embeddings, layers, vit):
        """Copy a tower's weights to where transformers keeps them (names differ between its versions)."""
        conv, positions = vit.patch_embed["proj"], vit.pos_embed[0]
        for name, p in embeddings.named_parameters():
            if "patch" in name:
                p.copy_(conv.bias if name.endswith("bias") else conv.weight)
            elif "position" in name:                           # DINOv2: none for our class token
                missing = p.numel() // p.shape[-1] - len(positions)
                p.copy_(F.pad(positions, (0, 0, missing, 0)).view_as(p))
            elif name != "mask_token":
                p.copy_(vit.cls_token if "cls" in name else vit.reg_token)
        for theirs, ours in zip(layers, vit.blocks):
            qkv = dict(zip("qkv", zip(ours.attn.qkv.weight.chunk(3), ours.attn.qkv.bias.chunk(3))))
            for name, module in theirs.named_modules():
                leaf = name.split(".")[-1]
                if isinstance(module, nn.LayerNorm):
                    module.load_state_dict((ours.norm1 if leaf.endswith("1") else ours.norm2).state_dict())
                elif isinstance(module, nn.Linear):            # query or q_proj, fc1, dense or o_proj ...
                    source = getattr(ours.mlp, leaf) if leaf in ("fc1", "fc2") else ours.attn.proj
                    weight, bias = qkv.get(leaf[0]) or (source.weight, source.bias)
                    module.weight.copy_(weight)
                    module.bias.copy_(bias)
                elif hasattr(module, "lambda1"):
                    module.lambda1.copy_((ours.ls1 if leaf.endswith("1") else ours.ls2).gamma)

    def encoder_layer(self, block):
        width, hidden = block.mlp.fc2.out_features, block.mlp.fc1.out_features
        layer = nn.TransformerEncoderLayer(width, block.attn.heads, hidden, 0.0,
                                           functools.partial(F.gelu, approximate="tanh"), 1e-6, True, True)
        for mine, theirs in ((layer.self_attn.out_proj, block.attn.proj), (layer.linear1, block.mlp.fc1),
                             (layer.linear2, block.mlp.fc2)):
            mine.load_state_dict(theirs.state_dict())
        layer.self_attn.in_proj_weight.copy_(block.attn.qkv.weight)
        layer.self_attn.in_proj_bias.copy_(block.attn.qkv.bias)
        for norm in (layer.norm1, layer.norm2):                # DiT's have no parameters
            norm.requires_grad_(False)
        return layer

    def think(self, batch):
        """-> cognition feature (B, 1, D)."""
        pictures, ids = batch["images"].flatten(0, 1).permute(0, 3, 1, 2).float() / 255, batch["ids"]
        seen, device = [], ids.device
        for tower, pixels, prefix in ((self.dino, cogact.DINO_PIXELS, 1 + self.cfg.registers),
                                      (self.siglip, cogact.SIGLIP_PIXELS, 0)):
            mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in pixels)
            states = tower((pictures - mean) / std, output_hidden_states=True).hidden_states
            seen.append(states[-2][:, prefix:])                                        # (B V, P, .)
        patches = self.projector(torch.cat(seen, 2))
        patches = patches.reshape(len(ids), -1, patches.shape[-1])                     # (B, V P, D)
        text = self.llm.get_input_embeddings()(ids)
        rows = torch.cat([text[:, :1], patches.to(text.dtype), text[:, 1:]], 1)        # (B, V P + L, D)
        last = patches.shape[1] + batch["length"] - 1
        mask = torch.arange(rows.shape[1], device=device) <= last[:, None]
        out = self.llm(inputs_embeds=rows, attention_mask=mask.long(), output_hidden_states=True)
        return out.hidden_states[-1][torch.arange(len(ids), device=device), last][:, None]

    def noise_of(self, x, t, z):
        """eps (B, T, A) of noisy chunks x at steps t (B,)."""
        net = self.net
        c = net.t_embedder.mlp(cogact.sinusoid(t, self.cfg.frequencies))[:, None] + net.z_embedder.linear(z)
        x = torch.cat([c, net.x_embedder.linear(x)], 1) + net.positional_embedding
        for block in self.blocks:
            x = block(x)
        return net.final_layer(x)[:, 1:]

    def sample(self, z, noise):
        """DDIM with guidance as the official sampler goes about it: numpy tables, look-ups in every step."""
        cfg, x, B = self.cfg, noise, len(noise)
        steps = cogact.ddim_timesteps(cfg.num_train_steps, cfg.sample_steps)
        guided, kept = cfg.cfg_scale > 1, self.alphas[steps]
        before = np.append(1.0, kept[:-1])
        both = torch.cat([z, self.net.z_embedder.uncondition.expand(B, 1, -1)]) if guided else z

        def look_up(values, k):
            index = torch.full((B,), k, device=x.device)
            return torch.from_numpy(values).to(x.device)[index].float()[:, None, None]
        for k in reversed(range(len(steps))):
            t = torch.full((len(both),), steps[k], device=x.device)
            eps = self.noise_of(torch.cat([x, x]) if guided else x, t, both)
            if guided:
                eps, free = eps.chunk(2)
                eps = free + cfg.cfg_scale * (eps - free)
            x0 = look_up(np.sqrt(1 / kept), k) * x - look_up(np.sqrt(1 / kept - 1), k) * eps
            eps = (look_up(np.sqrt(1 / kept), k) * x - x0) / look_up(np.sqrt(1 / kept - 1), k)
            x = x0 * look_up(np.sqrt(before), k) + look_up(np.sqrt(1 - before), k) * eps
        return x


class CogACT(Bench):
    """Variants: eager; jpeg, cold: see above; hf-compile: the baseline with its VLM compiled."""
    module, presets, prompt = cogact, {"official": "base", "tiny": "tiny"}, 25
    baseline = "transformers-eager, DiT of nn.TransformerEncoderLayer"
    pixels = [tuple(map(torch.tensor, p)) for p in (cogact.DINO_PIXELS, cogact.SIGLIP_PIXELS)]
    variants = Bench.variants | {"infer": ("eager", "jpeg", "cold", "hf-compile"), "decode": ("eager",)}
    cuda_only = {"hf-compile": "on a CPU compiling takes minutes and shows nothing"}

    @functools.cached_property
    def base(self):
        return PlainCogACT(self.cfg, self.model).train(self.what == "train")

    def adapt(self, cfg):
        """The meta device knows no autocast."""
        return dataclasses.replace(cfg, compute="auto") if self.device.type == "meta" else cfg

    def cast(self, model):
        """As from_pretrained(dtype="bf16"): the VLM's matrices; norms, embeddings and DiT stay float32."""
        for name, module in model.named_modules() if self.device.type != "meta" else ():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith("action_model."):
                module.to(self.dtype)

    def itemsize(self, name):
        return 4 if name.startswith("action_model.") else self.dtype.itemsize

    def prompt_text(self, instruction):
        return cogact.build_prompt(instruction)

    def tokens_in(self):
        cfg, batch = self.cfg, self.batches[0]
        return batch["ids"].shape[1] + batch["images"].shape[1] * (cfg.image_size // cfg.patch_size) ** 2

    # -- cases

    def noise(self, i):
        shape = self.args.batch, self.cfg.horizon, self.cfg.action_dim
        return torch.randn(shape, generator=common.keyed_generator(i, 3)).to(self.device)

    @torch.no_grad()
    def denoise(self, z, i):
        cfg, head = self.cfg, self.model.action_model
        return head.sample(z.float(), self.noise(i), cfg.sample_steps, cfg.cfg_scale, cfg.sampler)

    @torch.no_grad()
    def run(self, batch, i):
        return self.denoise(self.model(batch), i)

    @torch.no_grad()
    def base_run(self, batch, i, think=None):
        with self.model.precision():
            z = (think or self.base.think)(batch)
        return self.base.sample(z.float(), self.noise(i))

    def infer(self, variant):
        if variant == "cold":
            return self.cold()
        if variant == "jpeg":
            act = lambda seen, i: self.model.act(seen, noise=self.noise(i))[0]     # noqa: E731
            return self.whole_path(act, self.base_act)
        run, about = self.run, {"tokens_in": self.tokens_in()}
        if variant == "hf-compile":
            run = functools.partial(self.base_run, think=torch.compile(self.base.think))
            about["compile"] = "default"
        return self.case(lambda i: run(self.batch(i), i), lambda i: self.base_run(self.batch(i), i),
                         floor=self.twin.stages, **about)

    def base_act(self, observations, i):
        samples = self.base_run(self.collate(observations), i).cpu().numpy()
        return cogact.decode_actions(samples, common.pick_stats(self.model.stats), self.cfg.gripper_index)[1]

    @torch.no_grad()
    def decode(self, variant):
        z = [self.model(batch).float() for batch in self.batches]
        base = torch.no_grad()(lambda i: self.base.sample(z[i % len(z)], self.noise(i)))
        return self.case(lambda i: self.denoise(z[i % len(z)], i), base, forwards=self.cfg.sample_steps,
                         floor=lambda: self.twin.stages()[-1:])

    def draws(self, i):
        """noise (R B, T, A), steps (R B,), dropped conditions (R B,): the same for both sides."""
        cfg, g = self.cfg, common.keyed_generator(i, 4)
        n = cfg.repeated_diffusion_steps * self.args.batch
        drawn = (torch.randn(n, cfg.horizon, cfg.action_dim, generator=g),
                 torch.randint(cfg.num_train_steps, (n,), generator=g), torch.rand(n, generator=g))
        noise, t, chance = (x.to(self.device) for x in drawn)
        return noise, t, chance < cfg.condition_dropout

    def loss(self, batch, i):
        return self.model.loss(batch, *self.draws(i))[0]

    def base_loss(self, batch, i):
        (noise, t, drop), R = self.draws(i), self.cfg.repeated_diffusion_steps
        z = self.base.think(batch).repeat(R, 1, 1).float()
        z = torch.where(drop[:, None, None], self.base.net.z_embedder.uncondition, z)
        kept = torch.from_numpy(self.base.alphas).to(self.device)[t].float()[:, None, None]
        x = kept.sqrt() * batch["actions"].repeat(R, 1, 1) + (1 - kept).sqrt() * noise
        return F.mse_loss(self.base.noise_of(x, t, z).float(), noise)

    @torch.no_grad()
    def stages(self):
        model, batch, watched = self.model, self.batch(0), self.watched()
        images = batch["images"].flatten(0, 1)
        vision, seen = count(lambda: model.vision_backbone(images), watched, "vision towers")
        projector, _ = count(lambda: model.projector(seen), watched, "projector")
        whole, z = count(lambda: model(batch), watched)
        head, _ = count(lambda: self.denoise(z, 0), watched, "DiT")
        rest = (w - v - p for w, v, p in zip(whole[1:4], vision[1:4], projector[1:4]))
        return [vision, projector, Stage("language model", *rest), head]


# ---- VLA-0 ------------------------------------------------------------------------------------------------

class Only(transformers.LogitsProcessor):
    """The official rule: twelve tokens. Its first call tells when the prefill was over."""

    def __init__(self, bench):
        self.legal, self.device, self.begin = bench.cfg.legal, bench.device, None

    def __call__(self, ids, scores):
        if self.begin is None:
            wait(self.device)
            self.begin, self.prompt = time.perf_counter(), ids.shape[1]
        return self.allow(scores, [self.legal] * len(ids))

    def allow(self, scores, allowed):
        out = torch.full_like(scores, float("-inf"))
        for row, of, ids in zip(out, scores, allowed):
            row[ids] = of[ids]
        return out


class Grammar(Only):
    """Integers 0..num_bins, single spaces, as many as a chunk has: in strings, as a user writes it."""

    def __init__(self, bench):
        super().__init__(bench)
        self.cfg, self.symbol = bench.cfg, bench.symbol

    def __call__(self, ids, scores):
        super().__call__(ids, scores)
        texts = ["".join(self.symbol.get(i, "") for i in row) for row in ids[:, self.prompt:].tolist()]
        return self.allow(scores, [[i for i in self.legal if self.follows(t, self.symbol[i])] for t in texts])

    def follows(self, text, symbol):
        number, done = text.rpartition(" ")[2], text.count(" ")
        if symbol.isdigit():
            return number != "0" and int(number + symbol) <= self.cfg.num_bins
        last = done + 1 == self.cfg.horizon * self.cfg.action_dim
        return bool(number) and last == (symbol == "")


class FirstStep(transformers.StoppingCriteria):
    """Stops once the first timestep's numbers are written."""

    def __init__(self, bench, rule):
        self.cfg, self.rule = bench.cfg, rule

    def __call__(self, ids, scores, **_):
        return (ids[:, self.rule.prompt:] == self.cfg.space_id).sum(1) >= self.cfg.action_dim


class CountedWriter(vla0.Writer):
    """Remembers the width of every pass."""
    windows = ()

    def read(self, window):
        self.windows = [*self.windows, window]
        super().read(window)


class Graphed:
    """A pass of a Writer as a CUDA graph: a Writer's state is copied in and replayed to its end.

    Elsewhere the pass is just called, so that what is around the graph can be tested.
    """
    STATE = ("text", "count", "passes", "done", "cache", "length", "delta", "seen")

    def __init__(self, writer, window=1):
        self.writer, self.window, self.replay = writer, window, self.step
        self.state = {name: getattr(writer, name).clone() for name in self.STATE}
        if writer.text.is_cuda:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):                    # kernels are chosen before the capture
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            self.replay = graph.replay

    def step(self):
        for name, tensor in self.state.items():
            setattr(self.writer, name, tensor)
        self.writer.read(self.window)
        for name, tensor in self.state.items():                # what is new, not changed in place
            if getattr(self.writer, name) is not tensor:
                tensor.copy_(getattr(self.writer, name))

    def finish(self, writer):
        """Go on where `writer` is after its prefill -> texts."""
        for name, tensor in self.state.items():
            tensor.copy_(getattr(writer, name))
        while not bool(self.state["done"].all()):
            for _ in range(16):
                self.replay()
        for name, tensor in self.state.items():
            setattr(writer, name, tensor)
        return writer.texts()


class Recorder:
    """A model that remembers what it was asked."""

    def __init__(self, model):
        self.model, self.asked = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def act(self, observations, unnorm_key=None, **how):
        self.asked += observations
        return self.model.act(observations, unnorm_key, **how)


class VLA0(Bench):
    """Variants:

    eager           the official mask, token by token
    graph           the same, a pass is a CUDA graph
    grammar         well-formed chunks; a forced space is read with its number
    spec:none       guesses from nothing, 16 wide
    spec:prev       a noisy chunk as draft, kept and re-aligned after a mistake
    spec:jacobi     the same draft, guessed anew in every pass (random weights guess by nothing)
    spec:oracle     the own output as draft: an upper bound
    first-step      until the first timestep's numbers stand; first-step:prev: with a noisy chunk as draft
    hf-static       the baseline with its static cache
    """
    module, presets, prompt = vla0, {"official": "3b", "tiny": "tiny"}, 225
    baseline, pixels = "transformers-generate-eager", [tuple(map(torch.tensor, vla0.PIXELS))]
    how = {"eager": {"grammar": False, "draft": "none", "window": 1, "redraft": "align"},
           "grammar": {"draft": "none", "window": 0},
           "spec:none": {"draft": "none", "window": 16, "redraft": "jacobi"},
           "spec:prev": {"redraft": "align"}, "spec:jacobi": {"redraft": "jacobi"}, "spec:oracle": {},
           "first-step": {"draft": "none", "window": 0}, "first-step:prev": {"redraft": "align"}}
    how |= {"graph": how["eager"], "hf-static": how["grammar"], "jpeg": how["grammar"]}
    decoding = ("eager", "grammar", "spec:none", "spec:prev", "spec:jacobi", "spec:oracle", "graph")
    variants = Bench.variants | {"decode": decoding, "infer": (
        *decoding, "first-step", "first-step:prev", "jpeg", "cold", "hf-static")}
    cuda_only = {"graph": "a pass is captured as a CUDA graph"}
    closed_loop = ("eager", "grammar", "spec:prev", "spec:jacobi")

    @property
    def symbol(self):
        """{token id: character}; the end is no character."""
        return dict(zip(self.cfg.legal, [*vla0.SYMBOLS, ""]))

    def adapt(self, cfg):
        """First weights spread so wide that greedy texts vary (else one digit repeats for ever)."""
        return dataclasses.replace(cfg, llm_init=1.36 / math.sqrt(cfg.llm_width))

    def shake(self, model):
        super().shake(model)
        model.model.embed_tokens.weight[self.cfg.im_end_id] = 0    # never the best: no chunk ends early
        if self.device.type == "meta":
            model.visual.register_forward_pre_hook(self.real_grid, with_kwargs=True)

    def real_grid(self, visual, args, kwargs):
        """On the meta device: the tower reads its grid on the host, so here it is in numbers."""
        from transformers.vision_utils import get_vision_position_ids
        rows, columns = (side // self.cfg.patch_size for side in self.batches[0]["images"].shape[2:4])
        grid = torch.tensor([[1, rows, columns]] * (args[0].shape[0] // (rows * columns)))
        positions = get_vision_position_ids(grid, self.cfg.merge_size).to("meta")
        return args, {**kwargs, "grid_thw": grid, "position_ids": positions}

    def cast(self, model):
        model.to(self.dtype)

    def prompt_text(self, instruction):
        return vla0.build_prompt(instruction, self.cfg)

    # -- ours

    def tokens_out(self):
        """Tokens of a chunk whose numbers are as long as they get but for num_bins itself, and the end."""
        return self.cfg.horizon * self.cfg.action_dim * len(str(self.cfg.num_bins))

    def limit(self, grammar):
        """No more tokens than these: with random weights the mask alone would never end."""
        numbers = self.cfg.horizon * self.cfg.action_dim
        return numbers * (self.cfg.digits + 1) if grammar or self.args.ckpt else self.tokens_out()

    def changed(self, variant):
        how = {"grammar": True, **self.how[variant]}
        return dataclasses.replace(self.cfg, **how, max_new_tokens=self.limit(how["grammar"]))

    def writer(self, batch, cfg, drafts, kind=vla0.Writer):
        """A Writer after its prefill."""
        rows = self.model.embed(batch)
        with self.model.reading() as reader:
            return kind(cfg, reader, batch, rows, drafts)

    def finish(self, writer):
        for _ in writer:
            pass
        return writer.texts()

    def first_step(self, writer):
        """Write until the first timestep's numbers stand: the last of them by the space behind it."""
        for _ in writer:
            if all(text.count(" ") >= self.cfg.action_dim for text in writer.texts()):
                break
        return writer.texts()

    @torch.no_grad()
    def run(self, batch, i):
        return self.finish(self.writer(batch, self.changed("grammar"), [None] * self.args.batch))

    @functools.cached_property
    def own_texts(self):
        """What the model writes, for every input: drafts are made of it."""
        return [self.run(batch, i) for i, batch in enumerate(self.batches)]

    @property
    def bins(self):
        return 5 * self.cfg.num_bins / 1000 if self.args.draft_bins is None else self.args.draft_bins

    def drafts(self, variant, i):
        """(a text or None for every row of input i, the same in words)."""
        if self.how[variant].get("draft") == "none":
            return [None] * self.args.batch, "none"
        own = self.own_texts[i % len(self.batches)]
        if variant == "spec:oracle":
            return own, "own output: an upper bound"
        rng, out, top = common.keyed_rng(i % len(self.batches), 5), [], self.cfg.num_bins
        for text in own:
            q = np.array(text.split(), int)
            q += np.rint(rng.laplace(0, self.bins, len(q))).astype(int)
            out.append(vla0.to_text(q.clip(0, top)))
        return out, f"own output, laplace {self.bins:g} bins of {top}"

    # -- the baseline

    @functools.cached_property
    def base(self):
        """transformers' whole model around the very same modules."""
        from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
        cfg, model = self.cfg, self.model
        with model.reading():                                  # now: it moves weights into fused ones
            about = Qwen2_5_VLConfig(
                text_config=model.model.config.to_dict(), vision_config=model.visual.config.to_dict(),
                image_token_id=cfg.image_id, video_token_id=cfg.vocab - 1, tie_word_embeddings=True,
                vision_start_token_id=cfg.vision_start_id, vision_end_token_id=cfg.vision_end_id)
        about._attn_implementation = model.model.config._attn_implementation
        with torch.device("meta"):
            base = Qwen2_5_VLForConditionalGeneration(about)
        base.model.visual, base.model.language_model = model.visual, model.model
        base.lm_head.weight = model.model.embed_tokens.weight
        base.generation_config = GenerationConfig(eos_token_id=cfg.im_end_id, pad_token_id=cfg.pad_id)
        return base.train(self.what == "train")

    def fed(self, batch):
        """What the processor of transformers would hand over."""
        pixels, grid = vla0.patchify(batch["images"].flatten(0, 1), self.cfg)
        ids = batch["ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": grid,
                "pixel_values": pixels.to(self.model.visual.dtype),
                "mm_token_type_ids": (ids == self.cfg.image_id).int()}

    @torch.no_grad()
    def generate(self, fed, grammar, first=False, **how):
        """-> (texts, seconds since the prefill)."""
        rule = (Grammar if grammar else Only)(self)
        if first:
            how["stopping_criteria"] = [FirstStep(self, rule)]
        ids = self.base.generate(**fed, logits_processor=[rule], do_sample=False, use_cache=True,
                                 max_new_tokens=self.limit(grammar),
                                 repetition_penalty=self.cfg.repetition_penalty, **how)
        wait(self.device)
        seconds = time.perf_counter() - rule.begin
        rows = ids[:, rule.prompt:].tolist()
        return ["".join(self.symbol.get(i, "") for i in row) for row in rows], seconds

    def base_act(self, observations, i):
        texts, _ = self.generate(self.fed(self.collate(observations)), True)
        low, high = vla0.bounds(common.pick_stats(self.model.stats))
        actions = vla0.parse_strict(texts, low, high, self.cfg.num_bins, self.cfg.horizon)
        return actions.astype(np.float32)

    # -- cases

    def infer(self, variant):
        if variant == "cold":
            return self.cold()
        if variant == "jpeg":
            cfg = self.changed(variant)
            how = {"grammar": True, "draft": cfg.draft, "window": cfg.window}
            return self.whole_path(lambda seen, i: self.model.act(seen, **how)[0], self.base_act)
        return self.written(variant, lambda texts, seconds: texts)

    def decode(self, variant):
        return self.written(variant, Timed)

    @torch.no_grad()
    def written(self, variant, result):
        """The Case of writing texts. result: Timed when only what comes after the prefill counts."""
        cfg, first, n = self.changed(variant), variant.startswith("first-step"), len(self.batches)
        drafts, words = zip(*(self.drafts(variant, i) for i in range(n)))
        fed = [self.fed(batch) for batch in self.batches] if self.plain or variant == "hf-static" else ()
        finish = plainly = self.first_step if first else self.finish
        if variant == "graph":
            finish = Graphed(self.writer(self.batch(0), cfg, drafts[0])).finish

        @torch.no_grad()
        def ours(i):
            if variant == "hf-static":
                return result(*self.generate(fed[i % n], True, cache_implementation="static"))
            writer = self.writer(self.batch(i), cfg, drafts[i % n])
            wait(self.device)
            begin = time.perf_counter()
            texts = finish(writer)
            wait(self.device)
            return result(texts, time.perf_counter() - begin)
        about = {"tokens_in": self.tokens_in()}
        if not self.args.ckpt:
            about["weights"] = "random, row of the end token zero"
        if variant != "hf-static":
            about |= {"draft": words[0], **self.passes(cfg, drafts, plainly)}
        return self.case(ours, lambda i: result(*self.generate(fed[i % n], cfg.grammar, first)),
                         functools.partial(self.same, first=first),
                         lambda: self.floor(cfg, drafts, plainly), **about)

    def passes(self, cfg, drafts, finish):
        """Fields of the row: passes after the prefill and tokens of a chunk, means of the inputs."""
        passes, tokens = [], []
        for batch, draft in zip(self.batches, drafts):
            writer = self.writer(batch, cfg, draft)
            finish(writer)
            passes.append(writer.passes.float().mean().item())
            tokens.append(writer.count.float().mean().item())
        return written_fields(statistics.mean(passes), statistics.mean(tokens))

    def same(self, ours, base, i, first=False):
        """Are the texts equal? A near tie of two logits may fall otherwise; how near is told."""
        if first:                                              # one side may have written more
            D = self.cfg.action_dim
            ours, base = ([" ".join(t.split(" ")[:D]) for t in texts] for texts in (ours, base))
        wrong = [(row, a, b) for row, (a, b) in enumerate(zip(ours, base)) if a != b]
        gaps = [self.gap({k: v[row:row + 1] for k, v in self.batch(i).items()}, a, b) for row, a, b in wrong]
        if not gaps:
            return True, "texts equal"
        return max(gaps) <= self.near, (f"{len(gaps)} of {len(ours)} texts differ where logits are "
                                        f"{max(gaps):.1e} apart, bound {self.near:.0e}")

    @property
    def near(self):
        """Logits so near to each other may change places by rounding."""
        return 1e-4 if self.dtype == torch.float32 else 1e-1

    @torch.no_grad()
    def gap(self, batch, a, b):
        """How far apart the logits are where texts a and b of a batch of one first differ."""
        cfg, symbols = self.cfg, {s: i for i, s in self.symbol.items()}
        at = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        spoken = torch.tensor([vla0.answer_ids(a[:at], cfg)], dtype=torch.long, device=self.device)
        places = batch["length"] + batch["delta"] + torch.arange(at, device=self.device)
        longer = batch | {"ids": torch.cat([batch["ids"], spoken], 1), "positions": torch.cat(
            [batch["positions"], places.expand(1, 3, -1)], 2)}
        logits = F.linear(self.model(longer)[0, -1], self.model.model.embed_tokens.weight).float()
        said, p = longer["ids"][0].unique(), cfg.repetition_penalty
        logits[said] = torch.where(logits[said] > 0, logits[said] / p, logits[said] * p)
        x, y = (symbols[text[at:at + 1]] for text in (a, b))
        return (logits[x] - logits[y]).abs().item()

    def loss(self, batch, i):
        return self.model.loss(batch)[0]

    def base_loss(self, batch, i):
        labels = torch.full_like(batch["ids"].flatten(), -100)
        labels[batch["rows"] + 1] = batch["targets"]
        return self.base(**self.fed(batch), labels=labels.view_as(batch["ids"])).loss

    # -- counts

    @torch.no_grad()
    def stages(self, windows=None, cfg=None):
        """windows: widths of the passes after the prefill; None: a whole chunk, token by token."""
        cfg, batch, drafts = cfg or self.changed("eager"), self.batch(0), [None] * self.args.batch
        windows = [1] * (self.tokens_out() - 1) if windows is None else windows
        vision, rows = count(lambda: self.model.embed(batch), self.watched(), "vision tower")
        with self.model.reading() as reader:                   # it fuses weights: these are read
            fused = [(t, self.dtype.itemsize) for layer in reader.layers for t in layer]
            prefill, writer = count(lambda: vla0.Writer(cfg, reader, batch, rows, drafts), fused, "prefill")
            fused.append((writer.cache, writer.cache.itemsize))
            passes = [count(lambda: writer.read(w), fused, f"pass of {w}", windows.count(w))[0]
                      for w in sorted(set(windows))]
        return [vision, prefill, *passes]

    @torch.no_grad()
    def floor(self, cfg, drafts, finish):
        """Stages with the widths that passes really have, a mean over the inputs."""
        widths = []
        for batch, draft in zip(self.batches, drafts):
            writer = self.writer(batch, cfg, draft, CountedWriter)
            finish(writer)
            widths += writer.windows[:int(writer.passes.max())]        # the host looks after several
        vision, prefill, *passes = self.twin.stages(widths, cfg)
        passes = [s._replace(times=s.times / len(self.batches)) for s in passes]
        return passes if self.what == "decode" else [vision, prefill, *passes]

    @torch.no_grad()
    def more_counts(self):
        """Ops of one decoded layer, as the difference of two layers and one; in both number types."""
        found, B = {}, self.args.batch
        for name in ("fp32", "bf16"):
            other = self.again(dtype=name)
            writer = other.writer(other.batch(0), other.changed("eager"), [None] * B)
            with other.model.reading() as reader:
                x = reader.embedding[reader.legal[:1]].expand(B, 1, -1)                # (B, 1, D)
                place, layers, ops = other.batch(0)["length"][:, None], reader.layers, []
                for depth in (1, 2):
                    reader.layers = layers[:depth]
                    ops.append(count(lambda: reader(x, place.expand(3, -1, 1), place, writer.cache))[0].ops)
                reader.layers = layers
                rows = reader.logits(x).shape[-1]
            found[name] = {"ops_per_layer": ops[1] - ops[0], "head_rows": rows,
                           "ops_per_pass": count(lambda: writer.read(1))[0].ops,
                           "transformers_ops_per_layer": other.base_layer_ops()}
        yield "pass", {"ops": found[self.args.dtype]["ops_per_layer"], "detail": found,
                       "note": "pass counts: ops of one decoded layer, one new token per row"}

    def base_layer_ops(self):
        """The same of transformers' own decoding, with its dynamic cache."""
        from transformers import DynamicCache
        text, ops = self.model.model, []
        layers, new = text.layers, functools.partial(torch.zeros, device=self.device)
        for depth in (1, 2):
            text.layers, known = layers[:depth], {"use_cache": True, "past_key_values": DynamicCache()}
            row, at = new(1, 8, self.cfg.llm_width, dtype=self.dtype), new(3, 1, 8, dtype=torch.long)
            text(inputs_embeds=row, position_ids=at, **known)
            row, at = row[:, :1], at[..., :1]
            ops.append(count(lambda: text(inputs_embeds=row, position_ids=at, **known))[0].ops)
        text.layers = layers
        return ops[1] - ops[0]

    # -- closed loop

    def loop_rows(self):
        """Drive episodes, then write every chunk again in every way, from the same observations and drafts.

        Yields the fields of a row for each way. One observation at a time; ms: of a chunk after its prefill.
        """
        import eval_sim
        recorder, args = Recorder(self.model), self.args
        results = eval_sim.evaluate(recorder, vla0, episodes=args.episodes, batch=min(args.episodes, 64))
        asked, wanted = recorder.asked, ["eager", *(set(args.variant or self.closed_loop) - {"eager"})]
        wanted.sort(key=self.closed_loop.index)
        told = {v: [] for v in wanted}                         # [(text, passes, tokens, decode ms, whole ms)]
        self.rewrite(asked[0], self.changed("eager"))          # warm
        for i, observation in enumerate(asked):
            for v in wanted[::1 if i % 2 == 0 else -1]:
                told[v].append(self.rewrite(observation, self.changed(v)))
        rounds = np.array_split(np.arange(len(asked)), min(args.rounds, len(asked)))
        plain = np.array([t[1:] for t in told["eager"]])                               # (chunks, 4)
        for v in wanted:
            fine, check = self.agree(asked, told, v)
            mine = np.array([t[1:] for t in told[v]])
            row = written_fields(*mine[:, :2].mean(0).tolist())
            row["detail"] |= {"chunks": len(asked), "episodes": args.episodes, "success": results["success"],
                              "fewer_passes": round(plain[:, 0].sum() / mine[:, 0].sum(), 2)}
            for k, name in ((3, "whole_"), (2, "")) if fine else ():
                ratios = [plain[part, k].sum() / mine[part, k].sum() for part in rounds]
                of = spread([mine[part, k].mean() for part in rounds], ratios,
                            statistics.median(plain[part, k].mean() for part in rounds))
                row["detail" if name else "fields"] = (
                    row["detail"] | {"whole_ms": of["ms"], "whole_ratio": of["ratio"]} if name else of)
            draft = "none" if self.how[v].get("draft") == "none" else "the previous chunk, shifted"
            yield row.pop("fields", {}) | row | {
                "variant": v, "check": check, "draft": draft, "rounds": len(rounds), "warmup": 1,
                "baseline": "eager: ours, token by token"}

    def rewrite(self, observation, cfg):
        """-> (text, passes, tokens, ms after the prefill, ms in all)."""
        begin = time.perf_counter()
        writing = self.model.write([observation], cfg)
        writer = next(writing)
        wait(self.device)
        filled = time.perf_counter()
        for _ in writing:
            pass
        wait(self.device)
        end = time.perf_counter()
        return (writer.texts()[0], int(writer.passes[0]), int(writer.count[0]), (end - filled) * 1e3,
                (end - begin) * 1e3)

    def agree(self, asked, told, variant):
        """Texts must be those of eager wherever these are well-formed, else those of grammar."""
        cfg, malformed, near = self.cfg, 0, 0
        for i, (mine, plain) in enumerate(zip(told[variant], told["eager"])):
            broken = bool(vla0.parse_safe(plain[0], cfg.num_bins, cfg.horizon, cfg.action_dim)[1])
            malformed += broken
            wanted = told.get("grammar", told[variant])[i][0] if broken else plain[0]
            if mine[0] == wanted or variant == "eager":
                continue
            gap = self.gap(self.collate([asked[i]]), mine[0], wanted)
            if gap > self.near:
                return False, f"DIFFERS: chunk {i}, {mine[0]!r} instead of {wanted!r}, logits {gap:.1e} apart"
            near += 1
        return True, (f"texts of {len(asked)} chunks equal" + f" but for {near} near ties" * bool(near)
                      + f"; {malformed} malformed without grammar" * bool(malformed))


def written_fields(passes, tokens):
    """Fields about a text: passes after the prefill (which gives the first token), tokens with the end."""
    return {"forwards": round(passes, 2), "tokens_out": round(tokens, 1),
            "detail": {"tokens_per_pass": round((tokens - 1) / passes, 2) if passes else None}}


# ---- Command line -----------------------------------------------------------------------------------------

METHODS = {"cogact": CogACT, "vla0": VLA0}


class Parser(argparse.ArgumentParser):
    def error(self, message):                                  # one line, not the whole usage
        raise ValueError(f"{message} (python benchmarks/bench.py --help lists the flags)")


def flags():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("what").add_argument
    add("model", nargs="?", help=f"{', '.join(METHODS)}, or all")
    add("what", nargs="?", help=f"{', '.join(WHATS)}, or all")
    add("--size", choices=("official", "tiny"), default="tiny", help="of the model")
    add("--variant", help="names with commas between; default: all that this device can do")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="other Config values")
    add("--ckpt", help="a checkpoint instead of random weights (infer, decode, loader)")
    add("--episodes", type=int, help="vla0 decode with --ckpt: play so many episodes, decode their chunks")
    add("--draft-bins", type=float, help="Laplace noise of drafts [bins] (default: 5 if there are 1000)")
    add("--diff", nargs=2, metavar=("OLD", "NEW"), help="compare two files of rows; nothing is run")

    add = p.add_argument_group("how").add_argument
    add("--device", default="auto", help="cuda, cpu, or meta (count only)")
    add("--dtype", choices=("bf16", "fp32"), help="default: fp32 on a CPU, else bf16")
    add("--batch", type=int, help="observations or samples per call (default: 1; train and loader 8)")
    add("--baseline", choices=("hf", "none"), default="hf", help="plain transformers beside it, or nothing")
    add("--rounds", type=int, default=9, help="ratios taken")
    add("--inner", type=int, default=5, help="calls of a side per round")
    add("--warmup", type=int, default=3, help="calls before; then until two rounds agree to 5 %%; 0: none")
    add("--check", action="store_true", help="compare outputs first: no speed where they differ, exit code 1")
    add("--rss", action="store_true", help="CPU: peak memory of each side, in a process of its own")
    add("--side", choices=("ours", "base"), help=argparse.SUPPRESS)        # for processes that --rss starts

    add = p.add_argument_group("output").add_argument
    add("--out", type=Path, help="append the rows to this file (default: print them)")
    return p


def parse(argv=None):
    args = flags().parse_args(argv)
    if args.diff:
        return args
    if not args.model or not args.what:
        raise ValueError(f"MODEL and WHAT are wanted: one of {', '.join(METHODS)}, all; and one of "
                         f"{', '.join(WHATS)}, all.")
    train.choose("MODEL: there is no", args.model, [*METHODS, "all"])
    train.choose("WHAT: there is no", args.what, [*WHATS, "all"])
    device = device_of(args.device)
    meta = device.type == "meta"
    args.device, args.dtype = str(device), args.dtype or ("fp32" if device.type == "cpu" else "bf16")
    args.models = list(METHODS) if args.model == "all" else [args.model]
    args.whats = [args.what] if args.what != "all" else ["count"] if meta else list(WHATS)
    args.variant = args.variant.split(",") if args.variant else None
    check_flags(args, device)
    check_variants(args, device)
    return args


def check_flags(args, device):
    """What does not go together is an error, not ignored."""
    for name in ("rounds", "inner", "warmup", "batch", "episodes", "draft_bins"):
        low = 0 if name in ("warmup", "draft_bins") else 1
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least {low}.")
    runs = set(args.whats) - {"count"}
    if device.type == "meta" and runs:
        raise ValueError(f"--device meta holds no numbers, it can only count: {args.what} needs cpu or cuda.")
    if args.size == "official" and device.type == "cpu" and args.whats != ["ceiling"]:
        raise ValueError("--size official on a CPU takes hours and up to 60 GB: take --size tiny, or count "
                         "with --device meta.")
    if (args.ckpt or args.set) and args.model == "all":
        raise ValueError("--ckpt and --set are for one method: name it.")
    if args.ckpt and not set(args.whats) <= {"infer", "decode", "loader"}:
        raise ValueError("--ckpt is for infer, decode and loader; the others use random weights.")
    if args.episodes and not (args.ckpt and (args.model, args.what) == ("vla0", "decode")):
        raise ValueError("--episodes plays a trained model: bench.py vla0 decode --ckpt CKPT --episodes N.")
    if args.rss and device.type != "cpu":
        raise ValueError("--rss is for the CPU; on CUDA peak memory is always told.")
    if args.out and not args.out.resolve().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.resolve().parent}.")


def check_variants(args, device):
    known = {v: METHODS[m] for m in args.models for w in args.whats for v in METHODS[m].variants.get(w, ())}
    for variant in args.variant or ():
        train.choose(f"--variant: {args.model} {args.what} has no", variant, list(known) or ["none"])
        why = known[variant].cuda_only.get(variant)
        if why and device.type != "cuda":
            raise ValueError(f"--variant {variant} exists on CUDA only ({why}); the device is {device.type}.")
        if args.episodes and variant not in VLA0.closed_loop:
            raise ValueError(f"--variant {variant}: with --episodes there are {', '.join(VLA0.closed_loop)}.")


def ceiling_rows(args):
    device, dtype = torch.device(args.device), {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    tflops, tbps, where = ceilings(device, dtype)
    for variant, peak in (("matmul", {"peak_tflops": tflops}), ("copy", {"peak_tbps": tbps})):
        yield new_row(args, device, what="ceiling", variant=variant, peaks=where, **peak)


def rows_of(name, what, args):
    """Yield the rows of one method and one WHAT."""
    batch = args.batch or (8 if what in ("train", "loader") else 1)
    bench = METHODS[name](SimpleNamespace(**{**vars(args), "batch": batch}), what)
    device = bench.device
    if device.type == "cuda":                                  # what came before is no longer needed
        gc.collect()
        torch.cuda.empty_cache()
    known = {"model": name, "what": what, "size": "checkpoint" if args.ckpt else args.size, "batch": batch,
             "weights": args.ckpt or "random"}
    if what == "count":
        for variant, fields in bench.counts():
            yield new_row(args, device, **known, variant=variant) | fields
        return
    known["attn"] = bench.model.attn
    if device.type == "cpu":
        known["note"] = "a CPU ratio at tiny width is host overhead, not speed-up"
    if args.episodes:
        for fields in bench.loop_rows():
            yield new_row(args, device, **known) | fields
        return
    able = [v for v in bench.variants[what] if device.type == "cuda" or v not in bench.cuda_only]
    for variant in able:
        if args.variant is None or variant in args.variant:
            row = new_row(args, device, **known, variant=variant)
            try:
                yield row | fields_of(bench, variant)
            except torch.OutOfMemoryError:
                yield row | {"note": "out of memory: try --baseline none, or a smaller --batch"}


def fields_of(bench, variant):
    """Check, then time one variant."""
    args, device, what = bench.args, bench.device, bench.what
    case = getattr(bench, what)(variant)
    found = ({"baseline": bench.baseline} if case.base else {}) | case.about
    if args.check and case.same and (case.base or what == "loader"):
        for i in range(INPUTS):
            sides = [side(i) for side in (case.ours, case.base) if side]
            a, b = ([s.output if isinstance(s, Timed) else s for s in sides] + [None])[:2]
            fine, words = case.same(a, b, i)
            if not fine:
                return found | {"check": f"DIFFERS: {words}"}
        found["check"] = words
    detail = found.get("detail", {})
    found |= measure(case, device, args)
    found["detail"] = detail | found.get("detail", {})
    peaks = ceilings(device, bench.dtype)
    if case.floor:
        found |= priced(case.floor(), peaks)
    if what == "train":
        forward, _ = count(lambda: bench.twin.loss(bench.twin.batch(0), 0))
        found |= {"flops": 3 * forward.flops, "peak_tflops": peaks[0], "peaks": peaks[2]}
    if found.get("ms"):
        found["x_floor"] = found["ms"] / found["floor_ms"] if found.get("floor_ms") else None
        found["mfu"] = found["flops"] / found["ms"] / peaks[0] / 1e9 if what == "train" else None
    if args.side:
        found["mem_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    elif args.rss:
        found["mem_peak_bytes"] = rss(bench, variant, "ours")
        found["detail"]["baseline_mem_peak_bytes"] = rss(bench, variant, "base") if case.base else None
    return found | {"detail": found["detail"] or None}


def rss(bench, variant, side):
    """Peak memory [bytes] of one call of one side, in a process of its own."""
    args = bench.args
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.jsonl"
        given = {"variant": variant, "size": args.size, "device": "cpu", "dtype": args.dtype, "out": out,
                 "batch": args.batch, "rounds": 1, "inner": 1, "warmup": 0, "side": side,
                 "baseline": args.baseline, "ckpt": args.ckpt, "draft-bins": args.draft_bins}
        given = [x for name, value in given.items() if value is not None for x in (f"--{name}", str(value))]
        done = subprocess.run([sys.executable, __file__, bench.module.__name__, bench.what, *given,
                               *(["--set", *args.set] if args.set else [])], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"--rss: the process of {variant} failed: {done.stderr.strip()[-200:]}")
        return read_rows(out)[0]["mem_peak_bytes"]


def main(argv=None):
    args, rows = parse(argv), []
    if args.diff:
        return diff(*args.diff)
    for what in args.whats:
        sources = [ceiling_rows(args)] if what == "ceiling" else [rows_of(m, what, args) for m in args.models]
        for row in (row for source in sources for row in source):
            rows.append(row)
            if args.out:
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{row['model']} {what} {row['variant']} done", file=sys.stderr)
            else:
                print(json.dumps(row), flush=True)
    print_table(rows)
    return 1 if any((row["check"] or "").startswith("DIFFERS") for row in rows) else 0


if __name__ == "__main__":
    common.cli(main)
