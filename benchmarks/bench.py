"""
Time and count the methods beside plain library modules that do the same thing, in the same process.

    python benchmarks/bench.py all count --device meta --size official   # FLOPs, bytes, ops: no memory needed
    python benchmarks/bench.py vla0 infer --check                 # tiny, CPU: host overhead, not speed-up
    python benchmarks/bench.py vla0 all --device cuda --size official --check --out results/h200.jsonl
    python benchmarks/bench.py all infer --device cuda --size official --check --graphs     # by CUDA graphs
    python benchmarks/bench.py vla0 decode --ckpt runs/vla0-tiny/last --episodes 10   # a robot's own drafts
    python benchmarks/bench.py loader --rounds 3                  # every recorded form: see bench_loader.py
    python benchmarks/bench.py serve --rounds 20 --inner 20       # server and formats: see bench_serve.py
    python benchmarks/bench.py --diff old.jsonl new.jsonl

ceiling   this machine: a matrix product [TFLOP/s], a copy [TB/s, read plus write]
infer     pictures and token ids on the device -> tokens, or a chunk; variant jpeg: the whole path, JPEG bytes
          -> robot units; cold: model made, first call
decode    what repeats: tokens after the prefill, denoising steps after the VLM
train     forward, backward, clipping, AdamW (learning rate 0: both sides keep the same weights)
loader    JPEG bytes -> a batch of tensors, without augmentation
count     FLOPs, bytes of weights and keys moved, ops, bytes saved for backward, parameters

Our side is A, the plain modules B: order A B B A ..., one ratio B / A per round; median and quartiles are
given. Weights are random (never zeros), inputs differ from call to call. `forwards`: passes of what repeats,
after the prefill. `ops`: dispatched operations that compute (not views; attention is one). What was not
measured is null; `detail` holds what has no field. The floor of a stage is the larger of FLOPs / peak and
bytes / copy rate; stages add up. Peaks are of the same run; on the meta device they are an H200's.

A method joins with a file bench_NAME.py beside this: its plain modules, and a class Method (see Bench).
"""
import argparse
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
sys.modules.setdefault("bench", sys.modules[__name__])         # run as a script: the bench_NAME.py import it
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

import common  # noqa: E402
import data  # noqa: E402
import eval_sim  # noqa: E402
import train  # noqa: E402
from common import choose, keyed_rng, within  # noqa: E402

METHODS = [path.stem.removeprefix("bench_") for path in sorted(HERE.glob("bench_*.py"))
           if path.stem not in ("bench_loader", "bench_serve")]
WHATS = ("ceiling", "infer", "decode", "train", "loader", "count")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
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
COLUMNS = """
model what variant ms ratio ratio_q25 ratio_q75 forwards tokens_out x_floor mfu flops bytes floor_ms
peak_tflops peak_tbps ops saved_bytes mem_peak_bytes check
""".split()


def new_row(args, **known):
    """All fields, null unless known here or given."""
    device, about = torch.device(args.device), Path("/proc/cpuinfo")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if name == "cpu":
        found = re.search(r"model name\s*: (.*)", about.read_text()) if about.is_file() else None
        name = f"{found[1] if found else platform.processor() or 'cpu'}, {torch.get_num_threads()} threads"
    commit, _, dirty = eval_sim.made_with(device)["commit"].partition("-")
    return dict.fromkeys(FIELDS) | {
        "schema": 1, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": commit or None,
        "dirty": bool(dirty) if commit else None, "device": name, "torch": torch.__version__,
        "transformers": transformers.__version__, "cuda": torch.version.cuda, "dtype": args.dtype,
        "load": round(os.getloadavg()[0], 2)} | known


def show(value):
    """A cell of the table: large numbers with k, M, G ..."""
    if value is None or isinstance(value, str):
        return value or "-"
    return train.short(value).rstrip() if value >= 10_000 else f"{value:.4g}"


def print_table(rows):
    """One line per row; columns that say nothing are left out."""
    columns = [[name, *(show(row[name]) for row in rows)] for name in COLUMNS if any(r[name] for r in rows)]
    for line in zip(*([cell.ljust(max(map(len, column))) for cell in column] for column in columns)):
        print("  ".join(line).rstrip())
    for note in sorted({row["note"] for row in rows if row["note"]}):
        print(f"note: {note}")


def read_rows(path):
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
        if len(rows) < number or not isinstance(rows[-1], dict) or not {"schema", *KEY} <= rows[-1].keys():
            raise ValueError(f"{path}, line {number}: no row of bench.py (a JSON object of schema 1).")
    return rows


def diff(old, new):
    """Print how rows of `new` differ from those of `old` of the same key; of equal keys, the last counts."""
    def by_key(path, without=()):
        return {tuple(r[k] for k in KEY if k not in without): r for r in read_rows(path)}
    without = () if by_key(old).keys() & by_key(new).keys() else ("device",)
    a, b = by_key(old, without), by_key(new, without)
    for key in (*b, *(a.keys() - b.keys())):
        x, y = a.get(key, {}), b.get(key, {})
        told = [] if x and y else [f"only in {new if y else old}"]
        same = all(x.get(k) == y.get(k) for k in ("torch", "device"))
        for name in ("ratio", "x_floor", *["ms"] * same, "flops", "bytes", "ops", "saved_bytes", "forwards"):
            if x.get(name) and y.get(name):
                change = f" ({(y[name] / x[name] - 1) * 100:+.1f} %)"
                told.append(f"{name} {show(x[name])} -> {show(y[name])}{change}")
                if name == "ratio" and x["ratio_q25"] <= y["ratio_q75"] and y["ratio_q25"] <= x["ratio_q75"]:
                    told[-1] += ", inconclusive"
        print(f"{' '.join(map(str, key[:4])):<40} {'; '.join(told) or 'nothing to compare'}")


# ---- Measuring --------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Case:
    """A thing to do, and the same thing done by plain modules. Sides: functions of the call's number.

    repeats: they return (output, seconds of what repeats), and only that is timed.
    """
    ours: object
    base: object = None
    same: object = None                        # (ours' output, base's, call number) -> (equal?, in words)
    floor: object = None                       # () -> list of Stage
    about: dict = dataclasses.field(default_factory=dict)      # fields of the row
    repeats: bool = False


def now(device):
    """The time [s] when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def clock(device, side, calls, host=False, repeats=False):
    """Milliseconds per call of side(i) for i in calls: on CUDA between two events, as launches run ahead.

    host: as a robot waits for it, host work included.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    begin = now(device)
    for event in events[:1]:
        event.record()
    outs = [side(i) for i in calls]
    for event in events[1:]:
        event.record()
    ms = (now(device) - begin) * 1e3
    ms = events[0].elapsed_time(events[1]) if events and not host else ms
    return (sum(seconds * 1e3 for _, seconds in outs) if repeats else ms) / len(calls)


def sm_clock(device):
    """The GPU's clock [MHz]; None where it cannot be asked (CPU; no pynvml)."""
    with contextlib.suppress(ModuleNotFoundError, RuntimeError):
        return torch.cuda.clock_rate(device) if device.type == "cuda" else None


def warm_up(device, side, args):
    """Call it `warmup` times, then until two rounds agree within 5 % (five at most)."""
    clock(device, side, range(args.warmup))
    before = math.inf
    for _ in range(5):
        ms = clock(device, side, range(args.inner))
        if abs(ms / before - 1) < 0.05:
            return
        before = ms


def measure(case, device, args):
    """The row's fields of time: A B B A ..., a ratio per round."""
    sides, before = [side for side in (case.ours, case.base) if side], sm_clock(device)
    found = {name: getattr(args, name) for name in ("rounds", "inner", "warmup")}
    times = [[] for _ in sides]
    for side in sides if args.warmup else ():
        warm_up(device, side, args)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        alone = statistics.median(clock(device, sides[0], [i], host=True) for i in range(args.rounds))
        found |= {"mem_peak_bytes": torch.cuda.max_memory_allocated(device), "detail": {"latency_ms": alone}}
    for r in range(args.rounds):
        for k in range(len(sides))[::1 if r % 2 == 0 else -1]:
            calls = range(r * args.inner, (r + 1) * args.inner)
            times[k].append(clock(device, sides[k], calls, repeats=case.repeats))
    after = sm_clock(device)
    if before and after < 0.95 * before:
        return found | {"note": f"discarded: the clock fell from {before} to {after} MHz"}
    found |= dict(zip(("ms_p10", "ms", "ms_p90"), np.percentile(times[0], [10, 50, 90]).tolist()))
    if case.base:
        quartiles = np.percentile(np.divide(times[1], times[0]), [25, 50, 75]).tolist()
        found |= dict(zip(("ratio_q25", "ratio", "ratio_q75"), quartiles))
        found["baseline_ms"] = statistics.median(times[1])
    return found | {"per_s": args.batch / found["ms"] * 1e3}


@functools.cache
def ceilings(device, dtype):
    """(TFLOP/s of a matrix product, TB/s of a copy, where from), here and now."""
    if device.type == "meta":
        return REFERENCE
    a = torch.randn(2**30 if device.type == "cuda" else 2**26, device=device)
    b = torch.empty_like(a)
    ms = min(clock(device, lambda i: b.copy_(a), [0]) for _ in range(4))
    return train.measured_peak(device, dtype) / 1e12, 2 * a.nbytes / ms / 1e9, "this run"


# ---- Counting ---------------------------------------------------------------------------------------------

class Stage(NamedTuple):
    """A part of the work: its cost, and how often it runs."""
    name: str
    flops: int
    bytes: int
    ops: int
    times: float = 1


class Ops(TorchDispatchMode):
    """Counts computing ops, and the bytes of watched tensors that matrix products and attention read."""

    def __init__(self, watched):
        """watched: (tensor, bytes per number)."""
        super().__init__()
        self.ops, self.bytes, self.fused = 0, 0, False
        self.keep = watched                                    # storages are known by address: they must live
        self.size = {t.untyped_storage()._cdata: size for t, size in watched}

    def read(self, *tensors):
        self.bytes += sum(t.numel() * self.size.get(t.untyped_storage()._cdata, 0) for t in tensors
                          if isinstance(t, torch.Tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        view |= func.overloadpacket is torch.ops.aten._unsafe_view         # its schema does not say so
        self.ops += not view and not self.fused
        if func.overloadpacket in flop_registry and not self.fused:
            self.read(*args)
        return func(*args, **(kwargs or {}))

    def attend(self, func, args, run):
        """Attention or F.rms_norm: one op, as on CUDA, whatever this device makes of it."""
        self.ops, self.fused = self.ops + 1, True
        if func is F.scaled_dot_product_attention:
            self.read(*args[1:3])                              # keys and values, perhaps of a cache
        try:
            return run()
        finally:
            self.fused = False


class Fused(TorchFunctionMode):
    """Hands attention and F.rms_norm to `handle`(function, arguments, call)."""

    def __init__(self, handle):
        super().__init__()
        self.handle = handle

    def __torch_function__(self, func, types, args=(), kwargs=None):
        run = functools.partial(func, *args, **(kwargs or {}))
        fused = func in (F.scaled_dot_product_attention, F.rms_norm, torch.rms_norm)
        return self.handle(func, args, run) if fused else run()


def count(work, watched=(), name="", times=1):
    """Run work() once -> (its Stage, what it returned)."""
    ops = Ops(watched)
    # in its plain form, attention's products are counted on every device
    with FlopCounterMode(display=False) as flops, ops, Fused(ops.attend), sdpa_kernel(SDPBackend.MATH):
        out = work()
    return Stage(name, flops.get_total_flops(), ops.bytes, ops.ops, times), out


class Kept(torch.autograd.Function):
    """Stands for fused attention: keeps what its kernels keep, inputs, output and a number per row."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def saved_bytes(work, parameters):
    """Bytes that work() keeps for the backward pass, distinct storages, parameters not counted."""
    kept = {}

    def note(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()             # alive: no address comes twice
        return x

    def handle(func, args, run):
        return Kept.apply(*args[:3]) if func is F.scaled_dot_product_attention else run()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), Fused(handle):
        work()
    for p in parameters:
        kept.pop(p.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def per_layer(owner, work):
    """Ops of one layer: what the second of owner.layers adds."""
    layers, ops = owner.layers, []
    for depth in (1, 2):
        owner.layers = layers[:depth]
        ops.append(count(work)[0].ops)
    owner.layers = layers
    return ops[1] - ops[0]


def priced(stages, peaks):
    """Fields of the row: FLOPs, bytes, and the time [ms] that they need at these peaks."""
    flops, moved = (round(sum(getattr(s, k) * s.times for s in stages)) for k in ("flops", "bytes"))
    least = sum(s.times * max(s.flops / peaks[0], s.bytes / peaks[1]) for s in stages) / 1e9
    return {"flops": flops, "bytes": moved, "floor_ms": least or None} | dict(
        zip(("peak_tflops", "peak_tbps", "peaks"), peaks))


# ---- A method under test: what all of them share ----------------------------------------------------------

LOW, HIGH = [-0.1] * 6 + [0.0], [0.1] * 6 + [1.0]
STATS = {"synthetic": {"action": {"min": LOW, "max": HIGH, "q01": LOW, "q99": HIGH, "mean": [0.0] * 6 + [0.5],
                                  "std": [0.05] * 6 + [0.5], "mask": [True] * 6 + [False]}}}


def words(text, **_):
    """Stands in for a tokenizer that would have to be downloaded: an id for every word and sign."""
    ids = [100 + zlib.crc32(w.encode()) % 300 for w in re.findall(r"\w+|[^\w\s]", text)]
    return SimpleNamespace(input_ids=ids)


class Jpegs:
    """Samples whose pictures are JPEG bytes, decoded when asked for, as a loader's worker does."""

    def __init__(self, samples):
        def packed(picture):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=90)
            return file.getvalue()
        self.samples = [{**s, "images": {v: packed(p) for v, p in s["images"].items()}} for s in samples]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        s = self.samples[i % len(self)]
        return {**s, "images": {v: np.array(Image.open(io.BytesIO(f))) for v, f in s["images"].items()}}


class Bench:
    """One method at one size, for one WHAT. Its bench_NAME.py says what is its own:

    module; official: its preset, prompt: its tokens there; prompt_text(instruction); pixels: mean and
    deviation of each tower's input; cast(model) to what it acts in, itemsize(parameter's name) there;
    baseline, plain: the plain modules, in words and as a class; run, base_run(batch, i): one inference; act,
    base_act(observations, i): in robot units; decode(variant): a Case; loss, base_loss(batch, i); stages():
    one inference, counted in parts; frozen_flops(batch), if part of it does not train.
    """
    closed_loop = None                                         # variants that --episodes compares
    variants = {"infer": ("eager", "jpeg", "cold", "hf-compile"), "decode": ("eager",), "train": ("step",),
                "loader": ("inline", "workers:2")}
    cuda_only = {"hf-compile": "on a CPU compiling takes minutes and shows nothing"}

    def __init__(self, args, what):
        self.args, self.what = args, what
        self.device, self.dtype = torch.device(args.device), DTYPES[args.dtype]
        wanted = SimpleNamespace(
            model=self.module.__name__, preset=self.official if args.size == "official" else "tiny",
            set=args.set, dtype=args.dtype, **dict.fromkeys(("steps", "batch", "ema", "seed", "tokenizer")))
        self.cfg = self.adapt(train.configure(self.module, wanted))
        if args.ckpt:
            given = {name: getattr(self.cfg, name) for name in (item.partition("=")[0] for item in args.set)}
            self.model = self.module.from_pretrained(args.ckpt, device=self.device, dtype=args.dtype, **given)
            self.cfg = self.model.cfg

    def adapt(self, cfg):
        """What this device, or random weights, need otherwise."""
        return cfg

    @functools.cached_property
    def model(self):
        tokenizer = self.module.load_tokenizer(self.cfg) if self.cfg.tokenizer == "tiny" else words
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

    @functools.cached_property
    def base(self):
        with torch.device(self.device):
            return self.plain(self.cfg, self.model).eval()

    # -- inputs: those of call i are the same for both sides

    def observation(self, i, instruction=None):
        """Pictures of 8 x 8 coloured squares."""
        squares = {v: keyed_rng(i * 8 + k, 1).integers(0, 256, (8, 8, 3), np.uint8)
                   for k, v in enumerate(self.cfg.views)}
        return {"images": {v: np.kron(s, np.ones((32, 32, 1), np.uint8)) for v, s in squares.items()},
                "instruction": instruction or self.instruction}

    @functools.cached_property
    def instruction(self):
        """At official size, as long as makes the prompt of performance.md."""
        text = "pick up the red cube"
        if self.args.size == "tiny" or self.args.ckpt:
            return text
        look = self.module.prepare(self.observation(0, text), self.cfg, self.model.tokenizer)
        return text + " please" * (self.prompt - len(look["ids"]))

    def sample(self, i):
        """An observation with actions (T, A) in the range of STATS."""
        actions = keyed_rng(i, 2).uniform(LOW, HIGH, (self.cfg.horizon, len(LOW)))
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

    def tokens_in(self, batch):
        return batch["ids"].shape[1]

    def tokens_out(self):
        return None

    # -- cases

    def case(self, ours, base, same=None, floor=None, repeats=False, **about):
        """A Case; `base` only if a baseline is wanted, tensors compared unless `same` says how."""
        wanted = self.args.baseline != "none"
        return Case(ours, base if wanted else None, same or self.close, floor,
                    ({"baseline": self.baseline} if wanted else {}) | about, repeats)

    def close(self, ours, base, i=0):
        """Are two tensors equal up to rounding? -> (bool, in words)."""
        bound = 1e-4 if self.dtype == torch.float32 else 5e-2
        a, b = (torch.as_tensor(x).double() for x in (ours, base))
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        return error <= bound, f"differ by {error:.1e} of the largest value, bound {bound:.0e}"

    def infer(self, variant):
        B, base = self.args.batch, lambda i: self.base_run(self.batch(i), i)
        if variant == "cold":                                  # a model made, and its first call
            def first(i):
                fresh = type(self)(self.args, self.what)
                return fresh.run(fresh.batch(0), 0)
            return Case(first, about={"note": "cold: random weights are made, not loaded"})
        if variant == "jpeg":                                  # JPEG bytes -> actions in robot units
            files = Jpegs([self.observation(i) for i in range(INPUTS * B)])
            return self.case(*(lambda i, act=act: act([files[i * B + b] for b in range(B)], i)
                               for act in (self.act, self.base_act)))
        if variant == "hf-compile":
            fast = torch.compile(self.base)
            return self.case(lambda i: self.base_run(self.batch(i), i, fast), base, compile="default")
        return self.case(lambda i: self.run(self.batch(i), i), base, floor=self.stages,
                         tokens_in=self.tokens_in(self.batch(0)))

    def train(self, variant):
        """A training step of each side; their losses are compared."""
        def stepper(loss, model, **how):
            parameters = [p for p in model.train().parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=0.0, **how)

            def step(i):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                    value = loss(self.batch(i), i)
                value.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                return value.detach()
            return step
        base = stepper(self.base_loss, self.base) if self.args.baseline != "none" else None
        return self.case(stepper(self.loss, self.model, fused=True), base, weights="random, float32",
                         tokens_in=self.tokens_in(self.batch(0)))

    def loader(self, variant):
        """Batches from JPEG files: data.loader, against a loop in the main process."""
        cfg, tokenizer, B = self.cfg, self.model.tokenizer, self.args.batch
        files, size = Jpegs([self.sample(i) for i in range(8 * B)]), (cfg.image_size, cfg.image_size)
        prepare = functools.partial(self.module.prepare, cfg=cfg, tokenizer=tokenizer, stats=STATS)
        collate = functools.partial(self.module.collate, cfg=cfg)
        batches, inline = (data.loader(files, prepare, collate, B, workers=n)
                           for n in (int(variant.partition(":")[2] or 0), 0))

        def base(i):
            """As one first writes it: pictures to float tensors, prompts to ids, one after the other."""
            rows = []
            for sample in (files[i * B + k] for k in range(B)):
                pictures = [np.array(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC))
                            for p in sample["images"].values()]
                pixels = [(torch.from_numpy(p).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
                          for p in pictures for mean, std in self.pixels]
                ids = torch.tensor(tokenizer(self.prompt_text(sample["instruction"])).input_ids)
                rows.append((torch.stack(pixels), ids, torch.from_numpy(sample["actions"])))
            return [torch.stack(column) for column in zip(*rows)]

        def same(a, b, i):
            one = next(inline)
            return all(torch.equal(a[k], one[k]) for k in one), "batches as made inline"
        return self.case(lambda i: next(batches), base, same, attn=None, weights=None,
                         **{"baseline": "PIL in the main process"} if self.args.baseline != "none" else {})

    # -- counts

    def frozen_flops(self, batch):
        """Those of the loss's forward pass that have no backward pass."""
        return 0

    def watched(self):
        return [(p, self.itemsize(name)) for name, p in self.model.named_parameters()]

    def counts(self):
        """Yield (variant, fields): inference, a training sample, parameters, the baseline's sample."""
        stages, model = self.stages(), self.model
        yield "inference", priced(stages, ceilings(self.device, self.dtype)) | {
            "tokens_in": self.tokens_in(self.batch(0)), "tokens_out": self.tokens_out(),
            "ops": round(sum(s.ops * s.times for s in stages)),
            "detail": {s.name: s._asdict() for s in stages}}
        batch = self.collate([self.sample(i) for i in range(self.args.batch)])
        kind, work = next(model.train().parameters()).dtype, lambda: self.loss(batch, 0)
        forward, _ = count(work)
        yield "train", {
            "flops": 3 * forward.flops - 2 * self.frozen_flops(batch), "ops": forward.ops,
            "tokens_in": self.tokens_in(batch), "saved_bytes": saved_bytes(work, model.parameters()),
            "note": "train counts: 3 x forward of what trains; ops and saved bytes of the forward pass, "
            f"in {str(kind).removeprefix('torch.')}"}
        parts = {name: {"parameters": sum(p.numel() for p in m.parameters()), "bytes": sum(
            p.numel() * self.itemsize(f"{name}.{n}") for n, p in m.named_parameters())}
            for name, m in model.eval().named_children()}
        whole = {k: sum(of[k] for of in parts.values()) for k in ("parameters", "bytes")}
        yield "parameters", {"bytes": whole["bytes"], "detail": {"all": whole, **parts}}
        if self.args.baseline != "none":
            model.train(), self.base.train()
            with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
                kept = saved_bytes(lambda: self.base_loss(batch, 0), self.base.parameters())
            model.eval(), self.base.eval()
            yield "train, baseline", {"saved_bytes": kept, "baseline": self.baseline}


# ---- Command line -----------------------------------------------------------------------------------------

class Parser(common.Parser):
    parse_args = argparse.ArgumentParser.parse_args            # here, --device meta is of use


def flags():
    p = Parser(__doc__, prog="benchmarks/bench.py")
    add = p.add_argument_group("what").add_argument
    add("model", nargs="?", default="", help=f"{', '.join(METHODS)}, or all; or loader, or serve")
    add("what", nargs="?", default="", help=f"{', '.join(WHATS)}, or all")
    add("--size", choices=("official", "tiny"), default="tiny", help="of the model")
    add("--variant", help="names with commas between; default: all that this device can do")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="other Config values")
    add("--ckpt", help="a checkpoint instead of random weights (infer, decode, loader)")
    add("--episodes", type=within(1), help="with --ckpt: play so many, and compute their chunks again")
    add("--diff", nargs=2, metavar=("OLD", "NEW"), help="compare two files of rows; nothing is run")

    add = p.add_argument_group("how").add_argument
    add("--device", default="auto", help="cuda, cpu, or meta (count only)")
    add("--dtype", choices=tuple(DTYPES), help="default: fp32 on a CPU, else bf16")
    add("--batch", type=within(1), help="observations or samples per call (default: 1; train and loader 8)")
    add("--baseline", choices=("hf", "none"), default="hf", help="plain transformers beside it, or nothing")
    add("--rounds", type=within(1), default=9, help="ratios taken")
    add("--inner", type=within(1), default=5, help="calls of a side per round")
    add("--warmup", type=within(0), default=3, help="calls before, then until two rounds agree; 0: none")
    add("--graphs", action="store_true", help="infer and decode of our side by CUDA graphs (common.Graphs)")
    add("--check", action="store_true", help="compare outputs first: no speed where they differ, exit code 1")

    add = p.add_argument_group("output").add_argument
    add("--out", type=Path, help="append the rows to this file (default: print them)")
    return p


def parse(argv=None):
    args = flags().parse_args(argv)
    if args.diff:
        return args
    choose("MODEL: there is no", args.model, [*METHODS, "all", "loader", "serve"])
    if args.model in ("loader", "serve"):
        args.device, args.dtype, args.whats, args.models = "cpu", "fp32", [args.model], [args.model]
        args.variant = args.variant.split(",") if args.variant and args.model == "serve" else args.variant
        return args
    choose("WHAT: there is no", args.what, [*WHATS, "all"])
    device = common.device(args.device)
    args.device, args.dtype = str(device), args.dtype or ("fp32" if device.type == "cpu" else "bf16")
    args.models = METHODS if args.model == "all" else [args.model]
    args.whats = [args.what] if args.what != "all" else ["count"] if device.type == "meta" else list(WHATS)
    known = {v: method(m) for m in args.models for w in args.whats for v in method(m).variants.get(w, ())}
    loop = method(args.models[0]).closed_loop if args.ckpt and args.what in ("infer", "decode") else None
    for wrong, message in (
            (device.type == "meta" and args.whats != ["count"],
             f"--device meta holds no numbers, it can only count: {args.what} needs cpu or cuda."),
            (args.size == "official" and device.type == "cpu" and args.whats != ["ceiling"],
             "--size official on a CPU takes hours: take --size tiny, or count with --device meta."),
            ((args.ckpt or args.set) and args.model == "all",
             "--ckpt and --set are for one method: name it."),
            (args.ckpt and not {*args.whats} <= {"infer", "decode", "loader"},
             "--ckpt is for infer, decode and loader; the others use random weights."),
            (args.graphs and (device.type != "cuda" or not {*args.whats} <= {"infer", "decode"}),
             f"--graphs is for infer and decode on CUDA; asked were {args.what}, {device.type}."),
            (args.episodes and not loop,
             "--episodes plays a trained model: bench.py vla0 decode --ckpt CKPT --episodes N.")):
        if wrong:
            raise ValueError(message)
    args.variant = args.variant.split(",") if args.variant else loop if args.episodes else None
    for variant in args.variant or ():
        choose(f"--variant: {args.model} {args.what} has no", variant, [*known] or ["none"])
        why = known[variant].cuda_only.get(variant)
        if why and device.type != "cuda":
            raise ValueError(f"--variant {variant} exists on CUDA only ({why}); the device is {device.type}.")
    return args


def method(name):
    """The class of a method; its libraries are imported now."""
    return importlib.import_module(f"bench_{name}").Method


def rows_of(name, what, args):
    """Yield the rows of one method (None: of no method, ceiling; "loader": recorded forms) and one WHAT."""
    if name in ("loader", "serve"):
        yield from importlib.import_module(f"bench_{name}").run(args, new_row)
        return
    if what == "ceiling":
        tflops, tbps, where = ceilings(torch.device(args.device), DTYPES[args.dtype])
        for variant, peak in (("matmul", {"peak_tflops": tflops}), ("copy", {"peak_tbps": tbps})):
            yield new_row(args, what="ceiling", variant=variant, peaks=where, **peak)
        return
    args = SimpleNamespace(**{**vars(args), "batch": args.batch or (8 if what in ("train", "loader") else 1)})
    bench = method(name)(args, what)
    row = new_row(args, model=name, what=what, size="checkpoint" if args.ckpt else args.size,
                  batch=args.batch, weights=args.ckpt or "random")
    if what == "count":
        for variant, fields in bench.counts():
            yield row | {"variant": variant} | fields
        return
    if args.graphs:
        bench.model.graphs, row["compile"] = common.Graphs(functools.partial(
            common.captured, stream=torch.cuda.Stream(bench.device))), "CUDA graphs"
    if bench.device.type == "cpu":
        row["note"] = "a CPU ratio at tiny width is host overhead, not speed-up"
    for variant in bench.variants[what]:
        able = bench.device.type == "cuda" or variant not in bench.cuda_only
        able &= variant != "cold" or not args.graphs           # a fresh model has none
        if able and (args.variant is None or variant in args.variant):
            try:
                yield row | {"variant": variant, "attn": bench.model.attn} | fields_of(bench, variant)
            except torch.OutOfMemoryError:
                note = "out of memory: try --baseline none, or a smaller --batch"
                yield row | {"variant": variant, "note": note}


def fields_of(bench, variant):
    """Check, then time one variant."""
    args, device, what = bench.args, bench.device, bench.what
    case, peaks = getattr(bench, what)(variant), ceilings(device, bench.dtype)
    found, detail = dict(case.about), case.about.get("detail", {})
    if args.check and case.same and (case.base or what == "loader"):
        for i in range(len(bench.batches)):
            outs = [side(i)[0] if case.repeats else side(i) for side in (case.ours, case.base) if side]
            fine, told = case.same(outs[0], outs[-1], i)
            if not fine:
                return found | {"check": f"DIFFERS: {told}"}
        found["check"] = told
    how = {"rounds": 1, "inner": 1, "warmup": 0} if variant == "cold" else {}
    if args.episodes:                                          # every chunk once; all has run before
        how = {"inner": -(-len(bench.batches) // args.rounds), "warmup": 0}
    found |= measure(case, device, SimpleNamespace(**{**vars(args), **how}))
    found["detail"] = {**detail, **found.get("detail", {})} or None
    if case.floor:
        found |= priced(case.floor(), peaks)
    if what == "train":
        with torch.no_grad():
            forward, _ = count(lambda: bench.loss(bench.batch(0), 0))
        frozen = bench.frozen_flops(bench.batch(0))
        found |= {"flops": 3 * forward.flops - 2 * frozen, "peak_tflops": peaks[0], "peaks": peaks[2]}
    if found.get("ms"):
        found["x_floor"] = found["ms"] / found["floor_ms"] if found.get("floor_ms") else None
        found["mfu"] = found["flops"] / found["ms"] / peaks[0] / 1e9 if what == "train" else None
    return found


def main(argv=None):
    args, rows = parse(argv), []
    if args.diff:
        return diff(*args.diff)
    if args.out:
        args.out.touch()                                       # a folder that is not there is told now
    for what in args.whats:
        models = args.models if what != "ceiling" else [None]
        for row in (row for name in models for row in rows_of(name, what, args)):
            rows.append(row)
            if args.out:
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{row['model']} {what} {row['variant']} done", file=sys.stderr)
            elif args.model != "loader":                       # it prints a table as it goes
                print(json.dumps(row), flush=True)
    if args.model != "loader":
        print_table(rows)
    return 1 if any((row["check"] or "").startswith("DIFFERS") for row in rows) else 0


if __name__ == "__main__":
    common.cli(main)
