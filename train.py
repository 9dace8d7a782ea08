"""
Train any method of this folder: one process on a CPU or many on GPUs, by the same flat loop.

    python train.py --model cogact                             # tiny, tabletop, CPU: train, evaluate, film
    torchrun --standalone --nproc_per_node=2 train.py --model cogact       # the same on two cores, but sooner
    python train.py --model cogact --preset base --data my_file.py:make_dataset --init FOLDER --dry-run
    torchrun --standalone --nproc_per_node=8 train.py --model cogact --preset base --data ... --shard
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py ...
    python train.py --model cogact --out runs/mine --resume    # go on after a kill; the flags are remembered

The recipe (lr, schedule, batch, steps, EMA ...) is the preset's; `--set name=value` changes any field of the
method's Config. The method is MODEL.py, the samples and their order data.py. Here: run() at the end, one loop
of five titled paragraphs; above it the flags and the functions that it calls.

OUT/step-000400/   a checkpoint folder (see common.py); with EMA its weights are the average
    training_state/run.json            the flags, the step, and the files of the state:
    training_state/state.safetensors   exp_avg/NAME, exp_avg_sq/NAME, step/NAME of the optimizer; rng/RANK;
                                       weights/NAME where model.safetensors holds something else (EMA, LoRA)
    .../state-K-of-N.safetensors       instead, of N processes: each writes the rows it holds, in a thread;
                                       any number of processes can read them
OUT/last           link to the newest checkpoint
OUT/metrics.jsonl  a line per status line, the same numbers
"""
import atexit
import contextlib
import dataclasses
import functools
import gc
import importlib
import importlib.util
import inspect
import json
import math
import os
import resource
import shutil
import signal
import sys
import textwrap
import time
import uuid
from ast import literal_eval
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain, islice, repeat
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import common
import data
import eval_sim
from common import METHODS, check_config, choose, within

HERE = Path(__file__).resolve().parent
NEVER = 2**62                                                  # "no step": larger than any
PATIENCE = timedelta(hours=2)                                  # of a process that waits for another
WARM_UP = 3                                                    # steps before those that --bench counts
KEPT = [getattr(torch.ops.aten, name).default for name in (    # --checkpointing selective: not computed again
    "mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu")]


# ---- Flags ------------------------------------------------------------------------------------------------

def flags():
    """The command line, in four groups."""
    p = common.Parser(__doc__, prog="train.py")
    add = p.add_argument_group("what").add_argument
    add("--model", required=True, help=f"the method, a file of this folder: {', '.join(METHODS)}")
    add("--preset", default="tiny", help="a key of the method's PRESETS")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="other Config values")
    add("--init", help="weights to start from: folder, file, hub id, or none (default: the preset's)")
    add("--tokenizer", help="tokenizer folder or hub id (default: the preset's)")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    add("--dry-run", action="store_true", help="only one real batch: prompt, shapes, loss, memory")
    add("--bench", type=within(1), metavar="K", help="only measure: 3 steps, then K timed; writes nothing")
    add("--synthetic", action="store_true", help="with --bench: one batch again and again, no loader")

    add = p.add_argument_group("data").add_argument
    add("--data", help="tabletop, tabletop:all, my_file.py:make_dataset (default: the preset's)")
    add("--data-episodes", type=within(1, 10**6), help="tabletop episodes to train on (default: data.py's)")
    add("--cache", help="folder for generated data (default ~/.cache/plainvla)")
    add("--workers", type=within(0), help="loader processes per rank (default: 0 on a CPU, else up to 8)")
    add("--val-every", type=within(0), default=500, help="steps between validations; 0: never")
    add("--val-samples", type=within(1), default=256, help="held-out samples per validation, over all ranks")

    add = p.add_argument_group("optimization").add_argument
    add("--steps", type=within(1), help="optimizer steps (default: the preset's)")
    add("--batch", type=within(1), help="samples per process and pass (default: the preset's; CPUs share it)")
    add("--global-batch", type=within(1), help="samples per step; gradients are accumulated to reach it")
    add("--ema", type=within(0.0, 1.0), help="decay of averaged weights; 0: none (default: the preset's)")
    add("--seed", type=within(0), help="of first weights, order and draws (default: the preset's)")
    add("--device", default="auto", help="auto, cpu, cuda, mps ...")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="of the arithmetic, weights stay fp32; auto: bf16 on CUDA, else fp32")
    add("--attn", choices=common.ATTENTION, default="auto", help="attention kernel")
    add("--shard", action="store_true", help="FSDP2: split weights and optimizer over the processes")
    add("--checkpointing", nargs="?", const="full", choices=("full", "selective"),
        help="recompute blocks in the backward pass: less memory; selective: not their matrix products")
    add("--official-mean", action="store_true",
        help="mean over processes and passes, not over all tokens: see Step (without weigh: always so)")
    add("--lora", type=within(0), default=0, metavar="R",
        help="train rank-R adapters of the language model, whose own weights freeze (in bf16, if that is the "
             "arithmetic); all else as usual; saved merged")
    add("--compile", action="store_true", help="torch.compile, block by block")

    add = p.add_argument_group("output").add_argument
    add("--out", type=Path, help="folder of the run (default: runs/MODEL-PRESET)")
    add("--overwrite", action="store_true", help="replace the run that is in --out")
    add("--save-every", type=within(0), default=500, help="steps between checkpoints; 0: only the last")
    add("--keep", type=within(0), default=2, help="how many of the newest checkpoints stay; 0: all")
    add("--log-every", type=within(1), default=20, help="steps between status lines")
    add("--eval-episodes", type=within(0, 10**6), help="closed loop, at the end (default: tabletop 200)")
    add("--tensorboard", action="store_true", help="write TensorBoard events into --out")
    add("--wandb", metavar="PROJECT", help="log to this Weights & Biases project")
    return p


def parse(argv):
    """Flags -> (args, the method's module, its Config, the checkpoint to resume from or None)."""
    p, found = flags(), None
    args = p.parse_args(argv)
    choose("--model: there is no method", args.model, METHODS)
    args.out = args.out or Path("runs") / f"{args.model}-{args.preset}"
    if restarted() and (args.out / "run.json").is_file():
        begun = common.read_json(args.out / "run.json").get("launch")
        args.resume |= begun == os.environ["TORCHELASTIC_RUN_ID"]
        args.overwrite &= not args.resume
    if args.resume and args.overwrite:
        raise ValueError("--resume continues the run in --out, --overwrite replaces it: give one of the two.")
    if args.resume:
        if not args.out.is_dir():
            raise ValueError(f"--resume: there is no run in {args.out}. Leave --resume away to start one.")
        found = (checkpoints(args.out) or [None])[-1]
        kept = found / "training_state" / "run.json" if found else args.out / "run.json"
        if kept.is_file():                                     # flags given now override those of the run
            now, args = args, p.parse_args(remembered(p, kept) + (sys.argv[1:] if argv is None else argv))
            args.out, args.resume, args.overwrite = now.out, now.resume, now.overwrite
        elif any(path.name[0] != "." for path in args.out.iterdir()):
            raise ValueError(f"--resume: there is no {kept}, so this is no run. Give another --out, or leave "
                             "--resume away.")
    args.set = list({item.partition("=")[0]: item for item in args.set}.values())      # the last word on each
    module = importlib.import_module(args.model)
    cfg = configure(module, args)
    args.data = args.data or cfg.data
    args.lora = args.lora or getattr(cfg, "lora", 0)
    if not args.data:
        raise ValueError(f"--data is missing: {args.model} {args.preset} has no default data set.")
    tabletop = bool(data.tabletop_sets(args.data))
    for name in ("eval_episodes", "cache", "data_episodes"):
        if getattr(args, name) and not tabletop and os.path.exists(args.data.partition(":")[0]):
            raise ValueError(f"--{name.replace('_', '-')} is for the tabletop; the data is {args.data}.")
    args.eval_episodes = 200 * tabletop if args.eval_episodes is None else args.eval_episodes
    for name in ("tensorboard", "wandb"):
        if getattr(args, name) and importlib.util.find_spec(name) is None:
            raise ValueError(f"--{name} needs it installed: pip install {name}.")
    if args.synthetic and not args.bench or args.bench and args.resume:
        raise ValueError("--synthetic is for measuring: add --bench K." if args.synthetic else
                         "--bench measures a run of its own: leave --resume away.")
    if args.bench:
        cfg = dataclasses.replace(cfg, steps=WARM_UP + args.bench)
        args.val_every = args.save_every = 0
    if args.lora and cfg.ema:
        raise ValueError("--lora and --ema cannot be combined: no average of adapters is kept. Use --ema 0.")
    return args, module, cfg, found


def remembered(parser, path):
    """The flags of a run.json as a command line, which `parser` has checked."""
    kept, words = common.read_json(path).get("args"), []
    for name, value in (kept if isinstance(kept, dict) else {"args": str(kept)}).items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        if value not in (None, []) and value is not False:     # 0 is a value
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    try:
        parser.parse_args(words)
    except ValueError as e:
        raise ValueError(f"--resume: {path} is damaged: {e}") from e
    return words


def configure(module, args):
    """The preset's Config with --set, --steps, --batch ... applied."""
    choose(f"--preset: {args.model} has no", args.preset, list(module.PRESETS))
    cfg, changes, chosen = module.PRESETS[args.preset], {}, []
    for item in args.set:                                      # robovlms: an official JSON, then other values
        if item.startswith("config=") and hasattr(module, "read_official_config"):
            if args.preset != "tiny":
                raise ValueError(f"--preset {args.preset} and --set {item}: give one of the two.")
            cfg, notes = module.read_official_config(item.partition("=")[2])
            if notes and common.rank_info()[0] == 0:
                print(*notes, sep="\n", file=sys.stderr)
        else:
            chosen.append(item)
    known = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    for item in chosen:
        name, equals, text = item.partition("=")
        choose(f"{args.model}.Config has no field", name, list(known))
        if not equals:
            raise ValueError(f"--set {item}: {name}=VALUE is wanted (it is {known[name]!r} now).")
        changes[name] = value_like(f"--set {item}", text, known[name])
    for name in ("steps", "batch", "ema", "seed", "tokenizer"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    if args.dtype != "auto" and "compute" in known:            # the method's own autocast follows
        changes["compute"] = args.dtype
    cfg = dataclasses.replace(cfg, **changes)
    check_config({n: vars(cfg)[n] for n in ("steps", "batch", "ema")}, vars(type(cfg)), below={"ema": 1})
    return cfg


def value_like(where, text, old):
    """Parse `text` as the type of `old`: numbers, true/false, strings as they are, tuples as a,b,c."""
    if isinstance(old, str):
        return text
    if isinstance(old, tuple):
        parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
        return tuple(value_like(where, part, old[0] if old else "") for part in parts)
    value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    with contextlib.suppress(ValueError, SyntaxError):
        value = literal_eval(text) if value is text else value
    if isinstance(old, int) and isinstance(value, float) and value.is_integer():
        value = int(value)                                     # steps=1e4
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if old is not None and type(value) is not type(old):
        raise ValueError(f"{where}: a value of type {type(old).__name__} is wanted, like {old!r}.")
    return value


def checkpoints(out):
    """The checkpoints of a run, newest last. What is called step-* is whole (see write)."""
    found = (path for path in out.glob("step-*") if path.name[5:].isdigit())
    return sorted(found, key=lambda path: int(path.name[5:]))


# ---- The model, and what is wrapped around it -------------------------------------------------------------

class Step(nn.Module):
    """DDP and FSDP only watch `forward`: calling model.loss past them would train each process alone.

    They take the mean of the processes' gradients. Where a loss is itself a mean, over tokens say, run()
    first weighs it by their number (the method's `weigh`), so that each token of the step counts the same.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        """A batch -> (loss, to log), as the method's `loss`."""
        return self.model.loss(batch)

    def act(self, observations, unnorm_key):
        """Observations -> (chunks, info), as the method's `act`; FSDP gathers weights for it."""
        return self.model.act(observations, unnorm_key)


def first_weights(args, cfg):
    """--init, else the preset's: a file of this folder or a hub id; else "none"."""
    own = HERE / (getattr(cfg, "init", "") or "none")
    return args.init or (str(own) if own.is_file() else getattr(cfg, "init", "") or "none")


def build(module, cfg, args, tokenizer, stats, attn, found, bf16):
    """The model with its first weights: --init, the checkpoint `found`, or from scratch. CPU, float32, but
    what --lora freezes in bf16 if that is the arithmetic."""
    init = first_weights(args, cfg)
    if (found and not args.lora) or init == "none" or init.endswith(".safetensors"):
        model = module.Model(cfg, tokenizer, stats, attn)
        model.fresh = ["everything"]
    else:
        values = {k: v for k, v in dataclasses.asdict(cfg).items() if k != "tokenizer"}
        if "allow_fresh" in inspect.signature(module.from_pretrained).parameters:
            values["allow_fresh"] = True                       # what the file lacks is about to be trained
        model = module.from_pretrained(init, tokenizer=tokenizer, attn=attn, **values)
        model.float()                                          # master weights, whatever the file held
        model.cfg, model.stats = cfg, stats
    if found and not args.lora:                                # LoRA: from the base weights; see restore()
        load_part(model, found / "model.safetensors", "--resume")
        if model.fresh:
            raise ValueError(f"--resume {found}: model.safetensors lacks {model.fresh[0]}, it is another's.")
        model.origin = common.load_config(found).get("origin", {})
    elif init.endswith(".safetensors"):
        load_part(model, Path(init), "--init")
        model.origin = {"started from": Path(init).name}
    model.preset = "custom" if any(item.startswith("config=") for item in args.set) else args.preset
    if args.lora:
        add_lora(model, args.lora, low=bf16)
    return model


@torch.no_grad()
def load_part(model, path, option):
    """Copy a file's tensors into the model: each must fit; what is not in the file is `fresh`."""
    part, own = common.load_weights(path), model.state_dict()
    for name in getattr(model, "unread", ()) if option == "--init" else ():
        part.pop(name, None)
    for name in getattr(model, "resized", ()) if option == "--init" else ():
        if name in part and part[name].shape != own[name].shape:
            print(f"warning: {path}: {name} {tuple(part.pop(name).shape)} is left out, it starts fresh with "
                  f"{tuple(own[name].shape)}.", file=sys.stderr)
    for name, value in part.items():
        if name not in own or own[name].shape != value.shape or not value.is_floating_point():
            has = f"has {tuple(own[name].shape)}" if name in own else "has no such weight"
            raise ValueError(f"{option} {path}: {name} {value.dtype} {tuple(value.shape)} does not fit, this "
                             f"model {has}. Use weights made for this preset, or --init none.")
        own[name].copy_(value)
    begun = {name.split(".")[0] for name in part}              # modules of which nothing came: by one name
    model.fresh = list({name if name.split(".")[0] in begun else name.split(".")[0]: None
                        for name in own if name not in part})


def adaptable(model):
    """(the first model of transformers in it or None, the names of its linear layers that train)."""
    from transformers import PreTrainedModel
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    return found, [name for name, m in found.named_modules()
                   if isinstance(m, nn.Linear) and m.weight.requires_grad] if found else []


def add_lora(model, rank, low=False):
    """Adapters on every linear layer that trains in what comes from transformers; its own weights freeze.

    low: they are kept in bf16, which is what autocast multiplies with in any case; the adapters in float32.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("--lora needs peft: pip install peft.")
    from peft import LoraConfig, inject_adapter_in_model
    backbone, linear = adaptable(model)
    if not linear:
        raise ValueError("--lora: nothing trains here that is of transformers. Leave --lora away.")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear), backbone)
    for base in [m.base_layer for m in backbone.modules() if low and hasattr(m, "get_delta_weight")]:
        base.weight.data = base.weight.data.bfloat16()
        base.forward = functools.partial(low_linear, base)


def low_linear(linear, x):
    """x times bf16 weights: in bf16 under autocast, else (a method's act) in the type of x."""
    weight = linear.weight if torch.is_autocast_enabled(x.device.type) else linear.weight.to(x.dtype)
    return nn.functional.linear(x, weight, linear.bias)


def merge_lora(state):
    """Weights under their official names, adapters added in: W + 2 B A (2 = lora_alpha / r)."""
    merged = {}
    for name, value in state.items():
        if ".base_layer." in name:
            stem, leaf = name.split(".base_layer.")
            if leaf == "weight":
                A, B = (state[f"{stem}.lora_{x}.default.weight"] for x in "AB")
                value = value + 2 * B @ A
            name = f"{stem}.{leaf}"
        if ".lora_" not in name:
            merged[name] = value
    return merged


def wrap(model, args, device, dtype, world):
    """Checkpointing and compile per block, then DDP or FSDP2: the module whose forward is the loss."""
    again = {"context_fn": functools.partial(create_selective_checkpoint_contexts, KEPT)}
    again = again if args.checkpointing == "selective" else {}
    for block in model.blocks():                               # only forward: FSDP's hooks stay outside
        if args.checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **again)
        if args.compile:
            block.forward = torch.compile(block.forward)
    if not args.shard:
        step = Step(model.to(device))
        return nn.parallel.DistributedDataParallel(step, gradient_as_bucket_view=True) if world > 1 else step
    # Blocks are gathered and computed in bf16 and hand on float32, as autocast has it without FSDP. What is
    # in no block is small and stays float32, so act() with its float32 action head runs on a sharded model.
    low = (torch.bfloat16, torch.float32, torch.float32) if dtype == torch.bfloat16 else ()
    mesh = dist.init_device_mesh(device.type, (world,))
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(*low))    # param, reduce, output dtype
    step = fully_shard(Step(model), mesh=mesh)
    register_fsdp_forward_method(step, "act")
    return step


def eager(args):
    """A context in which --compile does nothing."""
    return torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()


def local(tensor):
    """This process' part of a parameter, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(parameter, whole):
    """A whole CPU tensor, placed and split as `parameter` is."""
    whole = whole.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def gather(tensors, keep):
    """{name: whole copy on the CPU} where `keep`, else {}. Collective: all processes, the same names."""
    whole = {}
    for name, t in tensors.items():
        t = t.full_tensor() if isinstance(t, DTensor) else t
        if keep:
            whole[name] = t.detach().to("cpu", copy=True).contiguous()
    return whole


@torch.no_grad()
def swap(params, average):
    """Exchange weights and their average in place (none: nothing happens): bit-exact, its own inverse."""
    for w, a in zip(map(local, params.values()), average):
        kept = w.clone()
        w.copy_(a)
        a.copy_(kept)


def lr_factor(cfg, step):
    """What the learning rate is multiplied by: linear warm-up, then constant, or half a cosine down to 0."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup))
    if cfg.lr_schedule == "constant":
        return warm
    done = max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * done))


# ---- Data -------------------------------------------------------------------------------------------------

def open_data(args, cfg, predicts):
    """(training set, validation set or None) that --data names. predicts: the method's PREDICTS."""
    wanted = {"horizon": cfg.horizon, "views": cfg.views, "image_size": cfg.image_size,
              "action_dim": cfg.action_dim, "state_dim": getattr(cfg, "state_dim", 0) or None}
    if hasattr(cfg, "history") and predicts == "actions":      # waypoints come with their own frames
        wanted["history"] = cfg.history
    where = {"cache": args.cache} if args.cache else {}
    episodes = {"episodes": args.data_episodes} if args.data_episodes else {}
    return (data.open_dataset(args.data, "train", **wanted, **where, **episodes),
            data.open_dataset(args.data, "val", **wanted, **where) if args.val_every else None)


def with_name(prepare, sample, key):
    """A sample -> (its dataset's name, prepared)."""
    return sample["dataset"], prepare(sample, key=key)


def name_apart(collate, items):
    """[(dataset name, prepared sample)] -> (names in this batch, batch)."""
    return sorted({name for name, _ in items}), collate([prepared for _, prepared in items])


def to_device(batch, device):
    """All but what the method reads on the CPU: keys, to seed its draws, and the sizes of pictures."""
    return {name: x if name in ("key", "grid") else x.to(device, non_blocking=True)
            for name, x in batch.items()}


def held_out(dataset, n, batch, prepare, collate, rank, world):
    """[(dataset name, samples, batch)]: a rank's share of n samples spread over the set; all have as many."""
    if dataset is None:
        return []
    if hasattr(dataset, "__len__"):
        n = min(n, len(dataset))
        samples = [dataset[i * len(dataset) // n] for i in range(n)]
    else:
        samples = list(islice(dataset, n))
    batches = []
    for name in sorted({s["dataset"] for s in samples}):       # act() takes the statistics of one
        same = [(key, s) for key, s in enumerate(samples) if s["dataset"] == name]
        same = (same * world)[rank::world][:max(1, len(same) // world)]
        for part in (same[i:i + batch] for i in range(0, len(same), batch)):
            batches.append((name, [s for _, s in part], collate([prepare(s, key=key) for key, s in part])))
    return batches


@torch.no_grad()
def validate(wrapped, batches, device, precision, predicts):
    """Loss, and the mean |predicted - recorded| of each dim of sample[predicts] (open loop); all ranks."""
    step = wrapped.module if isinstance(wrapped, nn.parallel.DistributedDataParallel) else wrapped
    loss_sum, seen, wide = 0.0, 0, max(part[0][predicts].shape[1] for _, part, _ in batches)
    error, entries = torch.zeros(2, wide, dtype=torch.float64)     # of each dim; some bodies have fewer
    wrapped.eval()
    with torch.random.fork_rng(devices=[]):                    # the run's own draws stay as they are
        torch.manual_seed(0)
        for name, samples, batch in batches:
            with precision():
                loss_sum += step(to_device(batch, device))[0].item() * len(samples)
            chunks = torch.as_tensor(step.act(samples, name)[0])                           # (B, T, A)
            target = torch.stack([torch.from_numpy(s[predicts])[:chunks.shape[1]] for s in samples])
            mask = torch.ones(target.shape[:2], dtype=torch.bool)                          # (B, T)
            if predicts == "actions":
                mask = torch.stack([torch.from_numpy(s["loss_mask"]) for s in samples])
            A, seen = chunks.shape[2], seen + len(samples)
            error[:A] += ((chunks - target).abs() * mask[..., None]).sum((0, 1))           # (A,)
            entries[:A] += mask.sum()
    wrapped.train()
    if isinstance(step, FSDPModule):                           # without a backward pass the root stays whole,
        step.reshard()                                         # and the next step would use these weights
    total = torch.cat([torch.tensor([loss_sum, seen], dtype=torch.float64), error, entries])
    if dist.is_initialized():
        dist.all_reduce(total)
    error = (total[2:2 + wide] / total[2 + wide:]).tolist()
    return {"val_loss": (total[0] / total[1]).item(), f"val_{predicts[:-1]}_error": error}


# ---- Checkpoints ------------------------------------------------------------------------------------------

def claim(args, about):
    """Check that --out can hold this run, before any work is done. Replaces nothing."""
    out = args.out
    eval_sim.claim(out)
    if not (args.resume and (out / "run.json").is_file()):
        here = checkpoints(out)
        put_back(out)
        if args.resume and checkpoints(out) and not here:
            raise ValueError(f"--resume: the run in {out} was being replaced, now it is back. Give the same "
                             "command again to continue it, or --overwrite instead of --resume.")
    used = out.is_dir() and any(p.name[0] != "." and p.name != "run.json" for p in out.iterdir())
    if used and not (args.resume or args.overwrite):
        raise ValueError(f"--out {out} is not empty. Continue that run with --resume, replace it with "
                         "--overwrite, or choose another --out.")
    if not used:
        common.write_json(out / "run.json", about)


def put_back(out):
    """Undo --overwrite if its run ended or was killed before it saved anything; else forget the old run."""
    old = out / ".replaced"                                    # without a run.json beside it: half filled
    if old.is_dir() and not ((out / "run.json").is_file() and checkpoints(out)):
        (out / "run.json").unlink(missing_ok=True)
        for path in sorted(old.iterdir(), key=lambda path: path.name == "run.json"):
            os.replace(path, out / path.name)
    shutil.rmtree(old, ignore_errors=True)


def clean(args, step, about):
    """Remove what a kill left half-written, log lines after `step`; --overwrite: set the old run aside."""
    out, log = args.out, args.out / "metrics.jsonl"
    for path in out.glob(".*.part"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in (out / "run.json", out / "last", log, *checkpoints(out)) if args.overwrite else ():
        (out / ".replaced").mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, out / ".replaced" / path.name)
    common.write_json(out / "run.json", about)
    settle(args)
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):     # a line that the kill cut in two
            kept += [line + "\n"] if json.loads(line)["step"] <= step else []
    if log.is_file():
        common.atomic_write(log, lambda part: part.write_text("".join(kept), encoding="utf-8"))


def check_same_run(found, args, cfg, dtype):
    """Only a run with the same Config, data and global batch can go on; fewer or more steps are fine.
    With --lora the arithmetic (dtype: "bf16", "fp32") stays, too: frozen weights were rounded to it."""
    names = ("global_batch", "data", "lora", "official_mean")
    then = common.read_json(found / "training_state" / "run.json")
    saved = common.load_config(found, args.model)["config"] | {
        name: then["args"][name] for name in names if name in then["args"]}
    saved |= {"dtype": then["dtype"]} if args.lora and "dtype" in then else {}
    now = json.loads(json.dumps(dataclasses.asdict(cfg))) | {name: getattr(args, name) for name in names}
    now["dtype"] = dtype
    other = [f"{name}: {saved[name]!r} there, {now[name]!r} now" for name in now
             if name not in ("steps", "batch") and name in saved and saved[name] != now[name]]
    if other:
        raise ValueError(f"--resume {found}: that run was another one ({'; '.join(other)}). Leave these "
                         "flags away, or start a new run with --init.")


@torch.no_grad()
def restore(found, optimizer, params, device, rank, weights):
    """Put back the optimizer, the draws, and (`weights`) those that are not in model.safetensors."""
    path, parts = found / "training_state", {}
    for file in common.read_json(path / "run.json").get("state", ["state.safetensors"]):
        for name, x in common.load_weights(path / file).items():       # memory-mapped: not read yet
            parts.setdefault(name, []).append(x)               # rows of it, one process after the other
    state = {name: torch.cat([x.to("meta") for x in xs]) if len(xs) > 1 else xs[0]
             for name, xs in parts.items()}
    want = {name: torch.get_rng_state() if name[:4] == "rng/" else x for name, x in state.items()
            if "rng/" in name[:11]}
    for name, p in params.items():
        moments = {f"step/{name}": torch.zeros(()), f"exp_avg/{name}": p, f"exp_avg_sq/{name}": p}
        want |= moments if moments.keys() & state.keys() else {}
        want |= {f"weights/{name}": p} if weights else {}
    common.check_fit(want, state, path)

    def whole(name):
        return torch.cat(parts[name]) if len(parts[name]) > 1 else state[name]
    for name, p in params.items():
        for kind in ("step", "exp_avg", "exp_avg_sq"):         # none where there never was a gradient
            if f"{kind}/{name}" in state:
                value = whole(f"{kind}/{name}")
                optimizer.state[p][kind] = value.to(p.device) if kind == "step" else like(p, value)
        if f"weights/{name}" in state:
            p.copy_(like(p, whole(f"weights/{name}")))
    if f"rng/{rank}" in state:                                 # else there are more processes than before
        torch.set_rng_state(state[f"rng/{rank}"])
    if f"device_rng/{rank}" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[f"device_rng/{rank}"])
    return int(found.name[5:])


def save(args, model, optimizer, params, average, device, rank):
    """Copies for `write`: of all weights on rank 0, of the rest of what this process holds. Collective."""
    state = {f"{kind}/{name}": x for name, p in params.items()
             for kind, x in optimizer.state.get(p, {}).items()}
    if average or args.lora:
        state |= {f"weights/{name}": p for name, p in params.items()}
    state = {name: local(x).detach().to("cpu", copy=True).contiguous() for name, x in state.items()
             if rank == 0 or isinstance(x, DTensor)}
    state[f"rng/{rank}"] = torch.get_rng_state()
    if device.type != "cpu":
        state[f"device_rng/{rank}"] = torch.get_device_module(device).get_rng_state()
    swap(params, average)
    weights = gather(model.state_dict(), keep=rank == 0)
    swap(params, average)
    return weights, state


def publish(saving, step, args, rank, world):
    """Wait until all have written; let OUT/step-NNNNNN appear. Collective; a failed write ends all, old
    files intact."""
    problem, staged = saving.exception(), staging(args, step)
    if problem and not isinstance(problem, OSError):
        raise problem
    every = [problem and (problem.strerror or str(problem))] * world
    if dist.is_initialized():
        dist.all_gather_object(every, every[0])
    problem = [next(filter(None, every), None)]
    if rank == 0 and not problem[0]:
        try:
            with common.atomic_folder(args.out / f"step-{step:06d}") as part:
                for name in os.listdir(staged):
                    os.replace(staged / name, part / name)
            staged.rmdir()
            settle(args)
            put_back(args.out)                                 # the first one: what it replaces may go
        except OSError as e:
            problem = [e.strerror or str(e)]
    if dist.is_initialized():
        dist.broadcast_object_list(problem)
    if problem[0]:
        raise OSError(problem[0]) if rank == 0 else SystemExit(2)      # one process says it


def staging(args, step):
    """Where the files of a checkpoint lie until all of them are written."""
    return args.out / f".saving-step-{step:06d}.part"


def settle(args):
    """OUT/last to the newest checkpoint, then prune. Also when a run goes on that was killed in between."""
    found, link = checkpoints(args.out), args.out / ".last.part"
    if found:
        link.unlink(missing_ok=True)
        link.symlink_to(found[-1].name)
        os.replace(link, args.out / "last")
    for path in found[:-args.keep] if args.keep else ():
        gone = args.out / f".{path.name}.part"                 # renamed first: what is called step-* is whole
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def write(args, step, model, weights, state, about, rank, world):
    """A thread's work: this process' files of a checkpoint, and on rank 0 those of the model."""
    part = staging(args, step)
    files = [f"state-{i + 1}-of-{world}.safetensors" for i in range(world)]
    files = files if world > 1 else ["state.safetensors"]
    common.atomic_write(part / "training_state" / files[rank], functools.partial(save_file, state))
    if rank == 0:
        command = f"train.py --model {args.model} --preset {args.preset} --data {args.data}"
        weights = merge_lora(weights) if args.lora else weights
        model.save_pretrained(part, {"trained with": command, "steps": step}, state=weights)
        common.write_json(part / "training_state" / "run.json", about | {"step": step, "state": files})


# ---- What is measured and printed -------------------------------------------------------------------------

class Flops(TorchDispatchMode):
    """Counts a training step's FLOPs while its forward pass runs: three of it, one of what is frozen (A0's
    encoders run without gradients). Matrix products and attention; what is computed again does not count."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            times = 3 if torch.is_grad_enabled() else 1
            self.total += times * flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def measured_peak(device, dtype):
    """FLOP/s of a large matrix product, here and now: the denominator of mfu."""
    n = 8192 if device.type != "cpu" else 1024 if dtype == torch.float32 else 256      # emulated there: slow
    best = math.inf
    a = torch.randn(n, n, device=device, dtype=dtype)
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    for _ in range(4):
        wait()
        begin = time.perf_counter()
        a @ a
        wait()
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def memory_used(device):
    """Peak bytes so far, of the accelerator or of this process."""
    if device.type not in ("cpu", "mps"):                      # Apple's memory is one
        return torch.accelerator.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_free(device):
    """Bytes that are free on the device; of a CPU those of the machine."""
    if device.type not in ("cpu", "mps"):
        return torch.accelerator.get_memory_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if sys.platform == "linux" else "SC_PHYS_PAGES"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)


def short(x):
    """1234567 -> '1.23 M'."""
    power = min(int(math.log10(max(x, 1)) // 3), 5)
    return f"{x / 1000**power:.3g} {' kMGTP'[power].strip()}"


def status(step, steps, row):
    """The status line, from a row of metrics.jsonl."""
    return (f"step {step:0{len(str(steps))}}/{steps} | loss {row['loss']:.4f} | lr {row['lr']:.1e} | "
            f"grad {row['grad']:.2f} | {row['ms']:.0f} ms | {row['samples_per_s']:.0f} samples/s | "
            f"mfu {row['mfu']:.1%} | mem {row['mem_gib']:.1f} GiB | data wait {row['data_wait_ms']:.0f} ms")


class Log:
    """metrics.jsonl, and TensorBoard and wandb when asked for."""

    def __init__(self, args, cfg):
        self.board = self.run = None
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(args.out)
        if args.wandb:
            import wandb
            self.run = wandb.init(project=args.wandb, config=dataclasses.asdict(cfg), dir=args.out)
        self.file = open(args.out / "metrics.jsonl", "ab", buffering=0)

    def __call__(self, step, row):
        try:
            self.file.write((json.dumps({"step": step} | row) + "\n").encode())
        except OSError as e:
            why = f"cannot write {self.file.name}: {e.strerror}. Free some space, then --resume."
            raise OSError(why) from e
        row = {name: x for name, x in row.items() if not isinstance(x, list)} | {
            f"{name}/{i}": x for name, xs in row.items() if isinstance(xs, list) for i, x in enumerate(xs)}
        for name, x in row.items() if self.board else ():
            self.board.add_scalar(name, x, step)
        if self.run:
            self.run.log(row, step=step)

    def close(self):
        """Finish all files."""
        self.file.close()
        if self.board:
            self.board.close()
        if self.run:
            self.run.finish()


def stop_if_not_finite(first_bad, names, args, rank, world):
    """End every process if a loss or gradient was not finite: the only place where the host reads that flag.

    first_bad: 0-d tensor on the device, the first such step or NEVER; names: {step: names of its datasets}.
    """
    mine = (int(first_bad), rank, names.get(int(first_bad)))
    every = [mine] * world
    if world > 1:
        dist.all_gather_object(every, mine)
    step, where, sets = min(every, key=lambda bad: bad[0])
    if step == NEVER:
        return
    if rank:
        raise SystemExit(2)                                    # one process says it
    kept = checkpoints(args.out)[-1:]
    raise ValueError(f"the loss or its gradient is not finite at step {step} on rank {where} (data: "
                     f"{', '.join(sets)}). Nothing was saved since; the newest checkpoint is "
                     f"{kept[0] if kept else 'none'}. Look at that data, or lower the learning rate (--set).")


def memory_needed(model, args, cfg, world):
    """{what: bytes of a process}, all that training keeps but activations."""
    weights, trained = (sum(p.nbytes for p in model.parameters() if p.requires_grad or not only) / (
        world if args.shard else 1) for only in (False, True))
    return {"weights": weights, "gradients": trained, "AdamW": 2 * trained, "EMA": trained * (cfg.ema > 0)}


def check_memory(needed, free, args, cfg, model, device):
    """ValueError if an accelerator has too little. (A CPU may yet free some, see --dry-run.)"""
    total = sum(needed.values())
    if device.type == "cpu" or total < free:
        return
    shard = "more" if args.shard else f"--shard over {math.ceil(1.25 * total / free)}"
    (backbone, linear), try_these = adaptable(model), [f"{shard} processes", "a smaller preset"]
    if linear and not (args.lora or args.resume):              # enough, without what trains the backbone?
        frozen, all_that_trains = (
            sum(p.nbytes for p in m.parameters() if p.requires_grad) for m in (backbone, model))
        if total - (total - needed["weights"]) * frozen / all_that_trains < free:
            try_these.insert(0, "--lora 16" + " --ema 0" * (cfg.ema > 0))
    raise ValueError(f"training needs {total / 2**30:.1f} GiB per process for " + ", ".join(
        f"{name} {x / 2**30:.1f}" for name, x in needed.items() if x) + " and more for activations; "
        f"{free / 2**30:.1f} are free on {device}. Try {' or '.join(try_these)}.")


def dry_run(say, wrapped, model, item, needed, device, precision, args, cfg):
    """One batch through loss and gradient: what goes in, what comes out, the memory that a run will take."""
    names, batch = item
    say(f"data      {', '.join(names)}")
    if "ids" in batch:
        say(f"prompt    {model.tokenizer.decode(batch['ids'][0])!r}")
    for name, x in batch.items():
        say(f"{name:<9} {tuple(x.shape)!s:<20} {str(x.dtype)[6:]:<8} {x.min().item()} .. {x.max().item()}")
    stored = {}                                                # what the backward pass needs, by address

    def note(x):
        stored[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with precision(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss, _ = wrapped(to_device(batch, device))
    loss.backward()
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of this batch is {loss.item()}; look at the data above.")
    say(f"loss      {loss.item():.4f}, finite, and its gradient")
    for p in model.parameters():
        stored.pop(local(p).untyped_storage().data_ptr(), None)
    parts = needed | {f"activations of {cfg.batch} samples": sum(stored.values())}
    total, free = sum(parts.values()), memory_free(device)
    say("memory    " + " + ".join(f"{name} {x / 2**30:.2f}" for name, x in parts.items() if x)
        + f" = {total / 2**30:.2f} GiB per process; {free / 2**30:.1f} GiB are free on {device}"
        + (": too little; try " + ", ".join(
            [f"{'' if args.shard else '--shard over '}more processes"] * (device.type != "cpu")
            + ["--checkpointing"] * (args.checkpointing != "full") + ["a smaller --batch"] * (cfg.batch > 1)
            + ["a smaller preset"]) if total > free else ""))


def closed_loop(args, module, attn, device):
    """Let the checkpoint drive the data's bodies in the simulator: success per task, and a film."""
    model = module.from_pretrained(args.out / "last", attn=attn, device=device)
    for body, families in data.tabletop_sets(args.data) or [("gripper", None)]:
        results = eval_sim.evaluate(model, module, families or eval_sim.DEFAULT_FAMILIES, args.eval_episodes,
                                    out=args.out / "eval", checkpoint=eval_sim.origin(args.out / "last"),
                                    embodiment=body)
        eval_sim.print_table(results)
    print(f"film: {args.out / 'eval' / 'film.gif'}   every episode: {args.out / 'eval' / 'results.json'}")


# ---- The run ----------------------------------------------------------------------------------------------

def own_store(shared, rank, world):
    """A part of torchrun's store that only the processes of this start use; collective.

    The store outlives them (torch 2.13): after --max-restarts some would find there where the dead ones
    listened, and wait for them. Rank 0 names a new part and answers each process that has found this name.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        shared.set("part", mine)
        for other in range(1, world):                          # get() waits
            shared.set(shared.get(f"{mine}/{other}").decode(), mine)
        return dist.PrefixStore(mine, shared)
    while not shared.check([mine]):                            # until then it may be a dead one's name
        shared.set(f"{shared.get('part').decode()}/{rank}", mine)
        time.sleep(0.05)
    return dist.PrefixStore(shared.get(mine).decode(), shared)


@functools.cache
def launchers_store():
    """The store that all processes reach; kept, because rank 0 may be its server."""
    return next(dist.rendezvous("env://", timeout=PATIENCE))[0]


def meet(rank, world):
    """own_store of the launcher's store; of a process alone, one of its own."""
    return own_store(launchers_store(), rank, world) if world > 1 else dist.HashStore()


def restarted():
    """Has torchrun --max-restarts started any process again? Collective: a node counts its own failures."""
    here, most = (int(os.environ.get(f"TORCHELASTIC_{x}", "0")) for x in ("RESTART_COUNT", "MAX_RESTARTS"))
    if not most:
        return False
    rank, _, world = common.rank_info()
    store = meet(rank, world)
    store.add("restarts", here)
    store.add("here", 1)
    while store.add("here", 0) < world:
        time.sleep(0.05)
    return store.add("restarts", 0) > 0


def main(argv=None):
    """The command line."""
    with contextlib.ExitStack() as cleanup:                    # bar, log, signals: closed however a run ends
        run(cleanup, *parse(argv))


def run(cleanup, args, module, cfg, found):
    """A training run, from flags to the last checkpoint and its evaluation."""
    begin = time.time()

    # ---- processes, device, arithmetic
    rank, local_rank, world = common.rank_info()
    say = print if rank == 0 else lambda *_: None
    device = common.device(args.device)
    kind = "bf16" if device.type == "cuda" else "fp32"
    if found and args.lora:                                    # as its frozen weights were rounded
        kind = common.read_json(found / "training_state" / "run.json").get("dtype", kind)
    kind = kind if args.dtype == "auto" else args.dtype
    bf16, dtype = kind == "bf16", torch.bfloat16 if kind == "bf16" else torch.float32
    precision = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    attn = common.pick_attention(args.attn, device)
    share = device.type == "cpu" and not args.batch            # processes are cores: the recipe stays
    args.global_batch = args.global_batch or cfg.batch * (1 if share else world)
    if share:
        cfg = dataclasses.replace(cfg, batch=max(1, min(cfg.batch, args.global_batch // world)))
    accumulation, rest = divmod(args.global_batch, cfg.batch * world)
    if rest or not accumulation:
        raise ValueError(f"--global-batch {args.global_batch} is no multiple of batch x processes = "
                         f"{cfg.batch} x {world}; change --batch.")
    if found:
        check_same_run(found, args, cfg, kind)
    about = {"launch": os.environ.get("TORCHELASTIC_RUN_ID"), "dtype": kind, "args": {
        name: x for name, x in vars(args).items()
        if name not in ("out", "resume", "overwrite", "dry_run", "bench", "synthetic")}}
    if rank == 0 and not (args.dry_run or args.bench):
        claim(args, about)
    if device.type != "cpu" and torch.accelerator.device_count() > 1:
        torch.accelerator.set_device_index(local_rank if device.index is None else device.index)
    if world > 1 or args.shard:
        backend = "gloo" if device.type == "cpu" else (
            f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}")
        dist.init_process_group(backend, timeout=PATIENCE, store=meet(rank, world), rank=rank,
                                world_size=world)
        seen = [None] * world
        dist.all_gather_object(seen, str(found))
        if len(set(seen)) > 1:
            raise ValueError(f"--resume: in {args.out}, rank 0 sees {seen[0]}, others {set(seen[1:])}. All "
                             "nodes must see the same files there.")

    # ---- data, model, optimizer
    train, val = open_data(args, cfg, module.PREDICTS)
    stats = data.dataset_statistics(train)
    tokenizer = module.load_tokenizer(cfg, found or (args.init and Path(args.init)))
    if hasattr(module, "fit") and not found:
        module.fit(cfg, tokenizer, train, stats)
    common.seed_everything(cfg.seed)                           # the same first weights on every rank
    model = build(module, cfg, args, tokenizer, stats, attn, found, bf16)
    needed = memory_needed(model, args, cfg, world)
    check_memory(needed, memory_free(device), args, cfg, model, device)
    wrapped = wrap(model, args, device, dtype, world).train()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = params.values()
    if hasattr(model, "param_groups"):
        groups = model.param_groups(cfg.lr, cfg.weight_decay)
    eps = getattr(cfg, "eps", 1e-8)
    optimizer = torch.optim.AdamW(groups, cfg.lr, cfg.betas, eps, cfg.weight_decay, fused=True)
    full_lr = [group["lr"] for group in optimizer.param_groups]
    average = [local(p).detach().clone() for p in params.values()] if cfg.ema else []
    peak = measured_peak(device, dtype)
    torch.manual_seed(common.hash64(cfg.seed, rank))           # dropout differs between ranks
    start = restore(found, optimizer, params, device, rank, cfg.ema or args.lora) if found else 0
    workers = args.workers
    if workers is None:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() // ranks_here)
    prepare = functools.partial(module.prepare, cfg=cfg, tokenizer=tokenizer, stats=stats)
    collate = functools.partial(module.collate, cfg=cfg)
    batches = data.loader(train, functools.partial(with_name, functools.partial(prepare, train=True)),
                          functools.partial(name_apart, collate), cfg.batch, rank, world, cfg.seed,
                          start * accumulation, workers, pin=device.type not in ("cpu", "mps"))

    total, trainable = (sum(p.numel() for p in ps) for ps in (model.parameters(), params.values()))
    values = (f"{name}={str(value).replace(' ', '')}" for name, value in dataclasses.asdict(cfg).items())
    counts = [len(d) if hasattr(d, "__len__") else "no" if d is None else "?" for d in (train, val)]
    say(textwrap.fill(f"{args.model} {args.preset}: {' '.join(values)}", 110, break_on_hyphens=False))
    how = "FSDP" if args.shard else "DDP" if world > 1 else "one process"
    begun = f"weights from {found or first_weights(args, cfg)}; fresh: {', '.join(model.fresh) or 'none'}"
    say(f"parameters {short(total)} total, {short(trainable)} trainable; {begun}")
    say(f"samples per step {args.global_batch} = {cfg.batch} x {world} processes x "
        f"{accumulation} accumulated")
    say(f"data {args.data}: {counts[0]} training and {counts[1]} validation samples, {workers} workers")
    say(f"attention {attn}, device {device}, {kind}, {how}; mfu is a share of "
        f"{short(peak)}FLOP/s, measured now")
    if args.dry_run:
        return dry_run(say, wrapped, model, next(batches), needed, device, precision, args, cfg)

    # ---- ready to write
    first = next(batches)                                      # they can be read: now the old run may go
    batches, log = (repeat(first) if args.synthetic else chain([first], batches)), None
    if rank == 0 and not args.bench:
        cleanup.callback(put_back, args.out)
        clean(args, start, about)
        log = cleanup.enter_context(contextlib.closing(Log(args, cfg)))
    # FAITHFUL: VLA-0 and RoboVLMs train on the mean of their processes' means, whatever these are means over.
    # Test: test_train_dist.py::test_official_mean_is_that_of_the_processes_means
    weigh = getattr(module, "weigh", None) if not args.official_mean else None
    weigh = weigh or (lambda batch: 1)
    checks = held_out(val, args.val_samples, cfg.batch, prepare, collate, rank, world)
    stopped = []                                               # names of signals; more change nothing
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.signal(number, lambda n, _: stopped.append(signal.Signals(n).name))
        cleanup.callback(signal.signal, number, before)
    if args.resume:
        say(f"resuming {found} at step {start}" if found else f"no checkpoint in {args.out} yet: from step 0")
    bar = cleanup.enter_context(tqdm(total=cfg.steps, initial=start, disable=rank > 0, unit="step"))
    first_bad, saving = torch.tensor(NEVER, device=device), None
    writer = cleanup.enter_context(ThreadPoolExecutor(1))
    step, sums, names, waited, flops, clock = start, {}, {}, 0.0, 0, time.perf_counter()

    for step in range(start + 1, cfg.steps + 1):               # `step` are done when this one is
        # ---- data
        before = time.perf_counter()
        micro = [next(batches) for _ in range(accumulation)]
        waited += time.perf_counter() - before
        names[step] = sorted({name for of_batch, _ in micro for name in of_batch})
        weights = [float(weigh(batch)) for _, batch in micro]
        agreed = torch.tensor([sum(weights), bool(stopped), bool(saving and saving.done())],
                              dtype=torch.float64)
        if world > 1:                                          # all do the same (CPU, no sync)
            dist.all_reduce(agreed)
        everything, stop, written = agreed.tolist()

        # ---- forward and backward
        for i, (_, batch) in enumerate(micro):
            last = i + 1 == accumulation                       # gradients travel once per step
            if args.shard:
                wrapped.set_requires_gradient_sync(last)
            elif world > 1:
                wrapped.require_backward_grad_sync = last      # as DDP's no_sync() does
            plain = contextlib.nullcontext()
            counter, kernels = (plain, plain) if flops else (Flops(), common.Kernels())
            # what is compiled while a mode looks on is skipped for good: the pass that is counted stays eager
            with precision(), counter, kernels, plain if flops else eager(args):
                loss, logs = wrapped(to_device(batch, device))
            share = weights[i] / everything
            (loss * share * world).backward()
            loss = loss.detach()                               # the graph goes
            if not flops:
                flops = counter.total * (2 / 3 if args.lora else 1)    # frozen weights need no gradient
                bar.write(f"attention was computed by: {kernels}") if rank == 0 else None
            for name, value in ({"loss": loss} | logs).items():
                sums[name] = sums.get(name, 0) + value.float() * share

        # ---- update
        norm = nn.utils.clip_grad_norm_(params.values(), cfg.grad_clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for i, lr in enumerate(full_lr):
            optimizer.param_groups[i]["lr"] = lr * lr_factor(cfg, step - 1)
        optimizer.step()
        optimizer.zero_grad()
        if average:                                            # a shorter memory in the first steps
            decay = min(cfg.ema, (1 + step) / (10 + step))
            decay = module.ema_decay(step - 1, cfg.ema) if hasattr(module, "ema_decay") else decay
            torch._foreach_lerp_(average, [local(p).detach() for p in params.values()], 1 - decay)
        sums["grad"] = sums.get("grad", 0) + norm / world
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        first_bad = torch.where(finite, first_bad, first_bad.clamp(max=step))

        # ---- log
        leave = stop > 0 or step == cfg.steps
        keep = not args.bench and (leave or (args.save_every and step % args.save_every == 0))
        check = checks and (step == cfg.steps or step % args.val_every == 0)
        bar.update()
        if leave or keep or check or (step == WARM_UP if args.bench else step % args.log_every == 0):
            stop_if_not_finite(first_bad, names, args, rank, world)
            means = torch.stack(list(sums.values())) / len(names)
            if world > 1:
                dist.all_reduce(means)
            seconds = (time.perf_counter() - clock) / len(names)
            row = dict(zip(sums, means.tolist())) | {
                "lr": optimizer.param_groups[0]["lr"], "ms": seconds * 1e3,
                "samples_per_s": args.global_batch / seconds, "mfu": flops * accumulation / seconds / peak,
                "mem_gib": memory_used(device) / 2**30, "data_wait_ms": waited / len(names) * 1e3}
            if rank == 0:
                bar.write(status(step, cfg.steps, row))
            if log:
                log(step, row)
            sums, names, waited = {}, {}, 0.0
        if check:
            swap(params, average)
            with eager(args):                                  # or it takes graphs' places: only 8 are kept
                row = validate(wrapped, checks, device, precision, module.PREDICTS)
            swap(params, average)
            (_, loss), (name, errors) = row.items()
            if log:
                bar.write(f"step {step}/{cfg.steps} | validation loss {loss:.4f} | {name.replace('_', ' ')} "
                          f"{' '.join(f'{e:.4f}' for e in errors)} (open loop, in the data's units)")
                log(step, row)

        # ---- save
        if saving and (keep or written == world):              # in the meantime, threads were writing
            saving = publish(saving, begun, args, rank, world)
        if keep:
            copies = save(args, model, optimizer, params, average, device, rank)
            begun, saving = step, writer.submit(write, args, step, model, *copies, about, rank, world)
            del copies
        if leave:
            saving = saving and publish(saving, begun, args, rank, world)
            break
        if not names:                                          # saving and validation are no step's time
            clock = time.perf_counter()

    # ---- after the last step
    cleanup.close()
    # Memory for the evaluation. And DDP must let go of the process group before that is destroyed: gloo's
    # destructor waits for a thread that may wait for Python (torch 2.13: one run of 20 hung).
    del wrapped, model, optimizer, params, groups, average, checks
    gc.collect()
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))                        # nobody leaves while another needs it
        dist.destroy_process_group()
    if rank:
        return
    if args.bench:
        print(json.dumps({"model": args.model, "preset": args.preset, "processes": world, "batch": cfg.batch,
                          "steps": args.bench, "synthetic": args.synthetic, "peak_flops": peak, **row}))
        return
    if device.type == "cpu":                                   # the other processes' cores are free now
        torch.set_num_threads(torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if step < cfg.steps:
        print(f"stopped by {stopped[0]} after step {step}, all is saved. To go on: python train.py --model "
              f"{args.model} --out {args.out} --resume")
        return
    print(f"trained in {(time.time() - begin) / 60:.1f} minutes: {args.out / 'last'}")
    if args.eval_episodes:
        closed_loop(args, module, attn, device)
    print(f"{(time.time() - begin) / 60:.1f} minutes in all. Next:")
    if data.tabletop_sets(args.data):
        print(f"  python eval_sim.py --ckpt {args.out}/last --families all --episodes 300  # every task\n"
              f"  python eval_sim.py --ckpt {args.out}/last --control all  # wrong words, no picture, random")
    print(f"  python serve.py --ckpt {args.out}/last                    # drive a robot over HTTP")


if __name__ == "__main__":
    try:
        common.cli(main)
    except SystemExit as e:
        # All is written. A thread of torch's may outlive the interpreter (torch 2.13, gloo: one of 20
        # runs ended in "terminate called"), and torchrun then calls the whole run a failure.
        if "TORCHELASTIC_RUN_ID" in os.environ:
            atexit._run_exitfuncs()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(e.code or 0)
        raise
