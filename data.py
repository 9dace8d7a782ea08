"""
Data: one sample format for every dataset and method, the tabletop dataset, and who reads which sample when.

   simulator's expert -> shards in the cache -> dataset[i] -> sample -> method.prepare, .collate -> batch
   my_file.py:make_dataset -------------------> dataset[i] --^
   LIBERO's HDF5 -> manifest.jsonl, pictures -> dataset[i] --^
   LeRobot's, LIBERO's, ... folder, as it is -> dataset[i] --^

THE SAMPLE: a dict, one per (episode, frame), of numpy arrays and strings; nothing normalized or resized.

   images          {view: (h, w, 3) uint8}      RGB; views may differ in size
   instruction     str                          the task in words; never empty
   state           (S,) float32                 proprioception, robot units
   actions         (T, A) float32               the commands from this frame on, robot units, gripper last
   loss_mask       (T,) bool                    False beyond the episode's end
   dataset         str                          whose statistics normalize the actions (the unnorm_key)
 optional, for the methods that learn from them:
   subtask         str                          what is being done now ("pick up the red cube")
   done            bool                         True: all is done, and subtask may be "" (told two goals)
   unforeseen      bool                         True: loss_mask has holes before the episode's end, where the
                                                actions answer to what had not happened yet
   waypoints       (5, 2) float32               (x, y) right and down, [0, 1] of the image: contact, path; a
                                                sample without actions for a0 needs no state, loss_mask
   embodiment      str                          which robot and control convention
   class           str                          kind of task or object: a0.py --test reports each one's error
   history_images  {view: (n, h, w, 3) uint8}   earlier frames, oldest first
   history_actions (n, A) float32               the action at each of them
   action_text     str                          the actions as numbers in text, some digits hidden as X; a
                                                method that writes text (vla0) takes it instead of `actions`
   conversations   [{"from", "value"}, ...]     human and gpt in turn (robobrain_x0): it does alone, with
                                                `images` in the order of the text's <image>, and `dataset`
   action_codes    [[int, ...], ...]            with it: the codes of each <action_token>, if no `actions`

An observation (what a policy sees) is the same dict with only images, instruction and state. Normalizing,
resizing and augmenting is the work of a method's `prepare`. In the tabletop set, actions are the expert's
labels at 5 Hz: dx dy dz [m], droll dpitch dyaw [rad], gripper [0 closed .. 1 open]; beyond the end, no
motion and the last gripper. The body "dual" (--data tabletop@dual) has twice these numbers: right arm, left.

    python data.py --make                   # the default training set, into ~/.cache/plainvla
    python data.py build-manifest --hdf5 LIBERO --out DIR    # then train.py --data DIR/manifest.jsonl
    python data.py hoi4d-frames --root DIR/HOI4D_release     # its videos -> frames, for two of A0's sets
    python data.py hoi4d-metadata --root DIR --definitions HOI4D-Instructions/definitions  # masks -> centres
    train.py --data maniskill=DIR+hoi4d=DIR: any of A0_FORMS in the unzipped A0-Dataset; a0=DIR: all five
    train.py --data lerobot=DIR, libero=DIR (HDF5), calvin=DIR, rlds=DIR: recorded episodes; see RECORDED
    python data.py PATH --sheet FILE.png    # what it holds, what in it is damaged, some frames; PATH: a
                                            # folder or file of any of these forms, or what --data takes
    train.py --model robovlms --set config=FILE.json: CALVIN, or your episodes, as an official JSON says
    python data.py robobrain-process ANNOTATION.json --out DIR    # AgileX's mp4 and HDF5 -> DIR/train.jsonl
    train.py --model robobrain_x0 --data robobrain=DIR/train.jsonl+robobrain=VQA.jsonl,weight=0.1
"""
import contextlib
import csv
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import mmap
import os
import random
import re
import signal
import sys
import tarfile
import threading
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import cache, cached_property, partial
from multiprocessing import get_context, parent_process
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

import eval_sim
from common import (ActionStatistics, ArrayUnpickler, Parser, atomic_write, check_config, check_stats, choose,
                    cli, hash64, is_text, pick_stats, rank_info, read_json, within, write_json)

NAME = "tabletop"                          # the unnorm_key of the embedded dataset
EPISODES = {"train": 2000, "val": 64}      # default sizes (other splits: 64)
SHARD_EPISODES = 16                        # what an interruption costs at most; more in sets above 8,192


# ---- The format, checked ----------------------------------------------------------------------------------

def check_sample(sample, where="sample", horizon=None, action_dim=None, state_dim=None, views=(),
                 actions=True):
    """Return `sample` if it has the format above, else raise one ValueError that names the field.

    horizon, action_dim, state_dim: the T, A, S to insist on (None: any). views: names `images` must hold.
    actions=False: an observation. Waypoints do for actions, where 2 numbers are an action (a0).
    """
    if not isinstance(sample, dict):
        raise ValueError(f"{where}: wanted a dict (see the top of data.py), found {type(sample).__name__}.")
    wanted = ["images", "instruction", "state"] + (["actions", "loss_mask", "dataset"] if actions else [])
    if actions and "waypoints" in sample and "actions" not in sample and action_dim in (None, 2):
        wanted, actions = ["images", "instruction", "dataset"], False
    if actions and "conversations" in sample:              # a method may read these alone
        wanted, views, horizon, actions = ["conversations", "dataset"], (), None, "actions" in sample
        check_talk(sample["conversations"], where)
    for key in wanted:
        if key not in sample:
            raise ValueError(f"{where}: no {key!r}; it has {list(sample)}, wanted {wanted}.")
    for key in ("images", "history_images"):
        if key in sample and not (isinstance(sample[key], dict) and any(sample[key])
                                  and all(map(is_text, sample[key]))):
            raise ValueError(f"{where}: {key!r} must be a dict {{view: array}} with at least one view, "
                             f"each with a name, found {' '.join(repr(sample[key])[:60].split())}.")
        size = ("n",) * (key != "images") + ("h", "w", 3)
        for view, image in sample.get(key, {}).items():
            _check_array(f"{where}: {key}[{view!r}]", image, np.uint8, size)
    for view in views:
        if view not in sample["images"]:
            raise ValueError(f"{where}: no view {view!r} in 'images', found {sorted(sample['images'])}. "
                             "Rename it there, or choose the model's views (--set views=...).")
    for key in ("instruction", "dataset", "subtask", "embodiment", "action_text", "class"):
        over = key == "subtask" and sample.get("done") and sample.get(key) == ""
        if key in sample and not is_text(sample[key]) and not over:
            raise ValueError(f"{where}: {key!r} must be a string that is not empty, found {sample[key]!r}.")
    if "state" in sample:
        _check_array(f"{where}: 'state'", sample["state"], np.float32, (state_dim or "S",))
    if actions:
        shape = (horizon or "T", action_dim or "A")
        _check_array(f"{where}: 'actions'", sample["actions"], np.float32, shape)
        _check_array(f"{where}: 'loss_mask'", sample["loss_mask"], np.bool_, (len(sample["actions"]),))
        if not sample["loss_mask"].any() and "action_text" not in sample:
            raise ValueError(f"{where}: 'loss_mask' is False everywhere; leave a sample without actions out.")
    if "waypoints" in sample:
        _check_array(f"{where}: 'waypoints'", sample["waypoints"], np.float32, (5, 2))
    return sample


def _check_array(what, x, dtype, shape):
    """`shape`: a number is that size, a letter any size but 0 (of a picture: or 1)."""
    wanted = f"{np.dtype(dtype)} ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    if not isinstance(x, np.ndarray):
        raise ValueError(f"{what} must be a numpy array {wanted}, found {type(x).__name__}.")
    fits = [n > (size in "hw") if isinstance(size, str) else n == size for n, size in zip(x.shape, shape)]
    if x.dtype != dtype or x.ndim != len(shape) or not all(fits):
        raise ValueError(f"{what} is {x.dtype} {x.shape}, wanted {wanted}.")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        at = np.argwhere(~np.isfinite(x))[0].tolist()
        raise ValueError(f"{what} is {x[tuple(at)]} at {at}, wanted finite numbers. Repair this frame, or "
                         "leave it out.")


# ---- What all sets share ----------------------------------------------------------------------------------

class Samples(torch.utils.data.Dataset):
    """A set of samples in episodes: [i] is one. What a subclass has or may replace:

    at (E + 1,): the first index of each episode, then len(); without it, each sample is one of its own.
    damaged: [(number, why), ...] of what was left out. tasks: the instructions. PART, UNIT: what is numbered,
    what an index counts. view, facts, check: for `report`.
    """
    PART, UNIT, tasks, damaged, stats = "episode", "frames", (), (), {}

    @cached_property
    def at(self):
        """The first index of each episode, and the end."""
        return np.arange(len(self) + 1)

    def __len__(self):
        return int(self.at[-1])

    def place(self, index):
        """(episode, frame in it) of an index; IndexError beyond the end, where an iteration stops."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        episode = int(np.searchsorted(self.at, index, side="right")) - 1
        return episode, int(index - self.at[episode])

    def facts(self):
        """Lines that say what the set is."""
        return ()

    def check(self):
        """Yield (number, why) of damage that only a look at every sample shows; `tasks` are known then."""
        tasks = {}
        for i in tqdm(range(len(self)), "samples", disable=None):
            try:
                tasks[check_sample(self[i], f"sample {i}").get("instruction", "")] = 0
            except ValueError as e:
                yield i, str(e)
        self.tasks = self.tasks or [*filter(None, tasks)]

    def whole(self, damaged):
        """(first index, beyond the last) of each episode in which nothing is damaged."""
        return [(a, b) for a, b in zip(self.at[:-1].tolist(), self.at[1:].tolist())
                if not any(i in damaged for i in range(a, b))]


@contextlib.contextmanager
def _noted(damaged):
    """A ValueError becomes a line of the list `damaged`; of None, it stays an error."""
    try:
        yield
    except ValueError as e:
        if damaged is None:
            raise
        damaged.append((str(e), str(e)))


# ---- The tabletop dataset: made on first use --------------------------------------------------------------

def tabletop(split="train", episodes=None, families=None, views=("third",), image_size=64, horizon=8,
             history=1, cache=None, workers=None, embodiment="gripper"):
    """The simulator's expert as a dataset (`Episodes`): generated on first use, with a bar, then only opened.

    families: task families (None: the default ones). views: cameras, image_size x image_size pixels each.
    history: frames that a sample shows, at most; the newest is `images`, the others `history_images`.
    cache: the folder that holds generated sets (None: $XDG_CACHE_HOME/plainvla, else ~/.cache/plainvla).
    workers: processes that generate (None: one per usable core; 0: this one); no byte depends on them.
    embodiment: one of eval_sim.BODIES; the dataset's name is that of eval_sim.dataset_name.
    After an interruption, whole shards are kept. Raises ValueError for unknown names and for a torn shard.
    """
    families, views = tuple(families or eval_sim.DEFAULT_FAMILIES), tuple(views)
    episodes = EPISODES.get(split, 64) if episodes is None else episodes
    choose("embodiment: the expert cannot drive", embodiment, eval_sim.BODIES)
    eval_sim.Tabletop(families, split, views, embodiment=embodiment)    # an unknown name is an error here
    seeds = eval_sim.seeds(split, episodes)
    if min(episodes, horizon, image_size) < 1:
        raise ValueError(f"episodes={episodes}, horizon={horizon}, image_size={image_size}: at least 1 each.")
    made_from = {"split": split, "episodes": episodes, "families": families, "views": views,
                 "image_size": image_size, "simulator": eval_sim.VERSION}
    made_from |= {"embodiment": embodiment} if embodiment != "gripper" else {}
    base = Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "plainvla").expanduser()
    folder = base / "-".join([_name(made_from), split, "+".join(families), "+".join(views), f"{image_size}px",
                              f"{episodes}ep", f"v{eval_sim.VERSION}"])
    if not _is_made(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"--cache {base} cannot be used ({e.strerror}); give another folder.") from e
        with _one_at_a_time(folder / ".lock"):             # all ranks of a run come here; the first works
            if not _is_made(folder):
                _generate(folder, made_from, seeds, workers)
    return Episodes(folder, horizon, history)


def _name(made_from):
    return eval_sim.dataset_name(made_from.get("embodiment", "gripper"))


def _is_made(folder):
    path = folder / "manifest.json"
    return path.exists() and all((folder / shard["file"]).exists() for shard in _manifest(folder)["shards"])


@contextlib.contextmanager
def _one_at_a_time(path):
    try:
        import fcntl
    except ImportError:                # Windows: two processes would write the same bytes, atomically
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _generate(folder, made_from, seeds, workers):
    """Record the episodes of the missing shards in order; write each shard once full, then the manifest."""
    for left in folder.glob(".*.part"):                    # of a run that was killed while writing
        left.unlink(missing_ok=True)
    workers = usable_cores() if workers is None else workers
    size = max(SHARD_EPISODES, -(-len(seeds) // 512))
    shards = {f"shard-{i // size:05d}.safetensors": seeds[i:i + size] for i in range(0, len(seeds), size)}
    missing = {file: part for file, part in shards.items() if not _is_whole(folder / file)}
    todo = [seed for part in missing.values() for seed in part]
    settings = {key: x for key, x in made_from.items() if key not in ("episodes", "simulator")}
    recorded = _in_processes(partial(eval_sim.record_episode, **settings), todo, workers)
    print(f"generating {len(todo)} episodes in {workers} processes into {folder}", file=sys.stderr)
    with contextlib.closing(recorded), tqdm(total=len(seeds), initial=len(seeds) - len(todo), unit="episode",
                                            desc=f"{_name(made_from)} {made_from['split']}") as bar:
        for file, part in missing.items():
            episodes = []
            for _ in part:
                episodes.append(next(recorded))
                bar.update()
            atomic_write(folder / file, partial(_write_shard, episodes))
    _write_manifest(folder, shards, made_from)


def usable_cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _in_processes(function, jobs, workers):
    """Yield function(job) in the order of `jobs`, computed by `workers` new processes of one thread each."""
    if workers == 0 or not jobs:
        yield from map(function, jobs)
        return
    # spawn, not fork: the caller may hold threads and a GPU. The price: its script needs a `__main__` guard.
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), _start_worker)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"                    # inherited by the workers, started inside `map`
    results = pool.map(function, jobs)
    os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)
    try:
        yield from results
    except BaseException:                                  # Ctrl-C: what is being computed is not waited for
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C is for the parent ...
    def leave_with_parent():                               # ... and a parent that is killed takes them along
        parent_process().join()
        os._exit(1)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def _write_shard(episodes, path):
    """Episodes -> one safetensors file: their frames in a row; facts per episode, as JSON, in its header."""
    episodes = [e for e in episodes if e["success"]]       # a demonstration that fails is not one
    if not episodes:
        raise ValueError("the expert failed in every episode of a shard; these tasks cannot be recorded.")
    def joined(values):
        return np.concatenate(list(values))                                              # (frames, ...)
    tensors = {key: joined(e[key] for e in episodes) for key in ("state", "actions", "executed", "waypoints")}
    for view in episodes[0]["images"]:
        tensors[f"images.{view}"] = joined(e["images"][view] for e in episodes)
    sentences = sorted({s for e in episodes for s in e["subtasks"]})
    tensors["subtask"] = np.array([sentences.index(s) for e in episodes for s in e["subtasks"]], np.int32)
    facts = [{"seed": e["seed"], "family": e["family"], "instruction": e["instruction"],
              "frames": len(e["actions"])} for e in episodes]
    save_file(tensors, path, {NAME: json.dumps({"episodes": facts, "subtasks": sentences})})


def _write_manifest(folder, files, made_from):
    statistics, shards = ActionStatistics(), []
    for file in files:
        shard = Shard(folder / file)
        actions = shard.read("actions")
        statistics.add(actions, trajectories=len(shard.episodes))
        shards.append({"file": file, "bytes": shard.path.stat().st_size, "sha256": _sha256(shard.path),
                       "episodes": len(shard.episodes), "frames": len(actions)})
    stats = statistics.result(mask=([True] * 6 + [False]) * (actions.shape[1] // 7))     # not the grippers
    about = {"made_from": made_from, "stats": {_name(made_from): stats}, "shards": shards}
    write_json(folder / "manifest.json", about)


# ---- The tabletop dataset: read from memory maps ----------------------------------------------------------

class Shard:
    """One file of a set, memory-mapped; only what is asked for is copied. ValueError when it is torn."""

    def __init__(self, path):
        try:
            self.path, self.file = path, safe_open(path, "np")
            facts = json.loads(self.file.metadata()[NAME])
            self.episodes, self.subtasks = facts["episodes"], facts["subtasks"]
            sum(e["frames"] for e in self.episodes)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing. Run again with the same settings to make it.") from None
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as e:
            raise _torn(path, e) from None

    def read(self, name, start=None, end=None):
        """Frames start .. end-1 of one tensor: (frames, ...)."""
        return self.file.get_slice(name)[start:end]


def _torn(path, found):
    return ValueError(f"{path} is torn or changed: {found}. Delete it and run again: only it is made again.")


def _is_whole(path):
    try:
        return bool(Shard(path))
    except ValueError:
        return False


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _manifest(folder):
    path = Path(folder) / "manifest.json"
    if not os.path.isdir(folder):
        found = "a file" if os.path.lexists(folder) else "nothing"
        raise ValueError(f"{folder}: {found} is there; the folder of a set is wanted.")
    if not path.exists():
        raise ValueError(f"{folder} has no manifest.json: it is no finished set of `python data.py --make` "
                         "(nor LeRobot's, with meta/info.json, nor LIBERO's, with *.hdf5, nor RLDS, with "
                         "features.json, nor CALVIN's, with lang_annotations, nor RoboBrain-X0's, with "
                         f"*.tar, nor one of A0's, {', '.join(A0_FORMS)}).")
    try:
        manifest = read_json(path)
        list(map(eval_sim.VIEWS.index, manifest["made_from"]["views"]))      # an unknown one is a ValueError
        pick_stats(manifest["stats"], _name(manifest["made_from"]))
        like = {"file": "x", "bytes": 1, "sha256": "x"}
        for shard in manifest["shards"] or [{}]:
            check_config({name: shard[name] for name in like}, like)
        return manifest
    except (ValueError, KeyError, TypeError) as e:
        raise _torn(path, e) from None


class Episodes(Samples):
    """A generated folder as a dataset: [i] is a frame's sample, `sample(episode, frame)` the same by name.

    stats: {name: {"action": {...}, ...}}. episodes: a dict each: seed, family, instruction, frames, shard,
    start (its first frame in the shard).
    """

    def __init__(self, folder, horizon=8, history=1):
        self.folder, self.horizon, self.history = Path(folder), horizon, history
        manifest = _manifest(folder)
        self.stats, self.made_from = manifest["stats"], manifest["made_from"]
        self.name, self.embodiment = _name(self.made_from), self.made_from.get("embodiment", "gripper")
        self.files, self.shards, self.episodes = [], {}, []
        for entry in manifest["shards"]:
            path, start = self.folder / entry["file"], 0
            if path.exists() and path.stat().st_size != entry["bytes"]:
                raise _torn(path, f"{path.stat().st_size} bytes, the manifest says {entry['bytes']}")
            for facts in Shard(path).episodes:
                self.episodes.append({**facts, "shard": len(self.files), "start": start})
                start += facts["frames"]
            self.files.append(path)
        self.at = np.cumsum([0] + [e["frames"] for e in self.episodes])
        self.tasks = sorted({e["instruction"] for e in self.episodes})

    def __getitem__(self, index):
        return self.sample(*self.place(index))

    def __getstate__(self):
        return {**self.__dict__, "shards": {}}             # a copy in another process opens its own files

    def _shard(self, number):
        if number not in self.shards:
            self.shards[number] = Shard(self.files[number])
        return self.shards[number]

    def sample(self, episode, frame):
        """The sample of one frame; its actions are the expert's labels from there on."""
        e = self.episodes[episode]
        shard, i, n = self._shard(e["shard"]), e["start"] + frame, min(self.horizon, e["frames"] - frame)
        labels = shard.read("actions", i, i + n)                                         # (n, A), n <= T
        bumped = (labels != shard.read("executed", i, i + n)).any(1)                     # (n,)
        counts = np.zeros(self.horizon, bool)          # what follows a bump answers to it, and nobody could
        counts[:n] = np.cumsum(bumped) - bumped == 0   # have foreseen it at this frame: it does not count
        actions = np.zeros((self.horizon, labels.shape[1]), np.float32)                  # (T, A)
        actions[:n], actions[n:, 6::7] = labels, labels[-1, 6::7]  # the rest: no motion, the last gripper
        views, subtask = self.made_from["views"], shard.subtasks[shard.read("subtask", i, i + 1)[0]]
        past, first = {}, max(e["start"], i - self.history + 1)
        if self.history > 1:
            past = {"history_images": {view: shard.read(f"images.{view}", first, i) for view in views},
                    "history_actions": shard.read("actions", first, i)}                  # (n, .), n < history
        return {**past, "images": {view: shard.read(f"images.{view}", i, i + 1)[0] for view in views},
                "instruction": e["instruction"], "state": shard.read("state", i, i + 1)[0],
                "actions": actions, "loss_mask": counts, "dataset": self.name,
                "subtask": subtask, "waypoints": shard.read("waypoints", i, i + 1)[0],
                "embodiment": self.embodiment, **({} if subtask else {"done": True}),
                **({} if counts[:n].all() else {"unforeseen": True})}

    def recording(self, episode):
        """A whole episode: its facts, and images.<view>, state, actions, executed, ... as (frames, ...)."""
        e = self.episodes[episode]
        shard, end = self._shard(e["shard"]), e["start"] + e["frames"]
        return {**e, **{name: shard.read(name, e["start"], end) for name in shard.file.keys()}}

    def facts(self):
        """Yield what it was made from, and how many of each family."""
        size, families = sum(path.stat().st_size for path in self.files) / 1e6, [
            e["family"] for e in self.episodes]
        yield f"{NAME}, {size:.0f} MB in {len(self.files)} shards, {eval_sim.CONTROL_HZ} frames per second"
        yield "made from    " + ", ".join(f"{key}={value}" for key, value in self.made_from.items())
        yield "families     " + ", ".join(f"{x} {families.count(x)}" for x in sorted(set(families)))

    def check(self):
        """Yield (why, why): shards that are not as their checksum says."""
        for entry in _manifest(self.folder)["shards"]:
            if _sha256(path := self.folder / entry["file"]) != entry["sha256"]:
                why = str(_torn(path, "its checksum is not the manifest's"))
                yield why, why


class Bodies(torch.utils.data.ConcatDataset):
    """Several sets, one after the other; stats: those of each, by its name.

    weights: how often a set's frames are drawn, 1 is once in an epoch. Of N frames and weight w, the set has
    M = round(w N) places of an epoch; the j-th draws, by its key, one of frames j N / M .. (j + 1) N / M.
    """

    def __init__(self, sets, weights=None):
        super().__init__(sets)
        self.stats = {name: stats for part in sets for name, stats in part.stats.items()}
        places = [max(1, round(w * len(part))) for w, part in zip(weights or [1] * len(sets), sets)]
        self.cumulative_sizes = np.cumsum(places).tolist()

    def __getitem__(self, index):
        return self.draw(index, 0)

    def draw(self, index, key):
        """The sample at a place of the epoch that `key` (63 bits) belongs to: (seed, epoch, index) hashed."""
        if not 0 <= index < len(self):
            raise IndexError(f"place {index} of {len(self)}")
        number = int(np.searchsorted(self.cumulative_sizes, index, side="right"))
        start, end = [0, *self.cumulative_sizes][number:number + 2]
        part = self.datasets[number]
        return part[((index - start << 32) + (key & 0xFFFFFFFF)) * len(part) // (end - start << 32)]


class Chained(torch.utils.data.ConcatDataset):
    """Several sets, one after the other, each with its own draw(index, key), or sample(index, rng)."""

    def draw(self, index, key, how="draw"):
        """The sample at `index`, drawn by its own set."""
        number = int(np.searchsorted(self.cumulative_sizes, index, side="right"))
        return getattr(self.datasets[number], how)(index - [0, *self.cumulative_sizes][number], key)

    def sample(self, index, rng):
        """The sample at `index`, as its own set gives it."""
        return self.draw(index, rng, "sample")


# ---- VLA-0's community form (Allenfree/VLA-0): built from LIBERO's HDF5 -----------------------------------

FIELDS = ("instruction", "image_path", "target_action_text", "H", "D")       # of a line
CAMERAS = ("obs/agentview_rgb", "obs/eye_in_hand_rgb")                       # left, right half of a picture


def build_manifest(hdf5, out, horizon=8, num_bins=1000, workers=None):
    """LIBERO's files *.hdf5 in the folder `hdf5`, or one below -> the number of samples now in `out`.

    out/manifest.jsonl: one object per frame, but for the last `horizon` of a demonstration. out/images: both
    cameras, tiled as stored: upside down, so a policy trained on them must not turn its frames.
    out/action_stats.npz: min and max of all the actions. Targets are clean (the original bakes X into a fifth
    of the digits, and learns it). Run again after an interruption: the result is the same, to the byte.
    ValueError: damaged files, or an `out` built from something else.
    """
    hdf5, out = Path(hdf5), Path(out)
    files = _libero_files(hdf5)
    if not files or min(horizon, num_bins) < 1:
        raise ValueError(f"{hdf5}: {len(files)} files *.hdf5 in it and one folder below; horizon={horizon}, "
                         f"num_bins={num_bins}. At least 1 each: give the folder that holds LIBERO's suites.")
    low, high, demos = _scan(files, horizon)
    counts = [max(0, frames - horizon) for *_, frames in demos]
    made_from = {"files": {path.relative_to(hdf5).as_posix(): path.stat().st_size for path in files},
                 "actions": {"min": low.tolist(), "max": high.tolist()}, "horizon": horizon,
                 "num_bins": num_bins, "samples": sum(counts)}
    (out / "images").mkdir(parents=True, exist_ok=True)
    write = partial(_write_samples, out, low, high, horizon, num_bins)
    beside = {"action_stats.npz": partial(_write_limits, made_from["actions"])}
    return _write_lines(out / "manifest.jsonl", made_from, write, [(path, demo) for path, demo, _ in demos],
                        counts, beside, workers)


def _write_lines(path, made_from, write, items, counts, beside, workers):
    """The lines of write((*item, number of its first line, how many of its lines are there)), in order.

    counts: each item's lines. beside: {file in that folder: its writer}. Interrupted, it goes on.
    """
    starts = np.cumsum([0] + counts).tolist()
    with _one_at_a_time(path.parent / ".lock"):
        done = _whole_lines(path, made_from, beside)
        jobs = [(*item, start, max(0, done - start))
                for item, start, end in zip(items, starts, starts[1:]) if end > max(start, done)]
        written = _in_processes(write, jobs, usable_cores() if workers is None else workers)
        with (contextlib.closing(written), open(path, "ab") as file,
              tqdm(total=starts[-1], initial=done, unit="sample", desc=str(path.parent)) as bar):
            for lines in written:
                file.write("".join(lines).encode())
                file.flush()
                bar.update(len(lines))
    return starts[-1]


def _scan(files, horizon):
    """Look at every action and shape -> (min (D,), max (D,), [(file, demonstration, frames)])."""
    low, high, demos = [], [], []
    for path in tqdm(files, "actions", unit="file"):
        with _hdf5(path) as file:
            for demo in sorted(file["data"], key=lambda name: (len(name), name)):   # demo_10 after demo_9
                actions = file[f"data/{demo}/actions"][:].astype(np.float32)        # (frames, D)
                third, wrist = (file[f"data/{demo}/{name}"] for name in CAMERAS)
                where, D = f"{path}, {demo}", len(low[0]) if low else "D"
                _check_array(f"{where}: actions", actions, np.float32, ("T", D))
                if not (third.shape == wrist.shape == (len(actions), *third.shape[1:3], 3)
                        and third.dtype == wrist.dtype == np.uint8):
                    raise ValueError(f"{where}: pictures {third.dtype} {third.shape} and {wrist.dtype} "
                                     f"{wrist.shape}, wanted twice uint8 ({len(actions)}, h, w, 3).")
                low.append(actions.min(0))
                high.append(actions.max(0))
                demos.append((path, demo, len(actions)))
    if not any(frames > horizon for *_, frames in demos):
        raise ValueError(f"{files[0]} (1 of {len(files)}): no demonstration has more than {horizon} frames.")
    return np.min(low, 0), np.max(high, 0), demos


@contextlib.contextmanager
def _hdf5(path):
    with _layout(path, Libero.FORM), _open_hdf5(path) as file:
        yield file


def _whole_lines(path, made_from, beside):
    """Claim the folder, or count the lines of an earlier run of the same `made_from`; a torn one is cut."""
    out, about = path.parent, path.with_name("built_from.json")
    if not any(x.exists() for x in (about, path, *map(out.joinpath, beside))):
        write_json(about, made_from)
    found = read_json(about) if about.exists() else {}
    other = [key for key in made_from if found.get(key) != made_from[key]]
    if other:
        raise ValueError(f"{out} was built from something else ({', '.join(other)} differ). Give another "
                         "--out, or delete it.")
    for left in out.glob(".*.part"):                       # of a run that was killed while writing
        left.unlink()
    for name, writer in beside.items():
        atomic_write(out / name, writer)
    done = size = 0
    with open(path, "ab+") as file:
        file.seek(0)
        for raw in file:
            try:
                json.loads(raw[:raw.index(b"\n")])
            except ValueError:
                break
            done, size = done + 1, size + len(raw)
        file.truncate(size)
    return done


def _write_limits(limits, path):
    """Under both names: the original writes mins and maxs, then looks for action_mins and action_maxs."""
    limits = {f"{name}s": np.array(values, np.float32) for name, values in limits.items()}
    with open(path, "wb") as file:
        np.savez(file, **limits, **{f"action_{name}": values for name, values in limits.items()})


def community_encode(actions, low, high, num_bins):
    """Actions (..., D) -> integers as the original makes them; all in float32.

    FAITHFUL: 1e-6 more range, which decoding does not know. A dimension that never varies becomes 0.
    Test: test_data.py::test_builder_writes_the_recorded_integers_and_text
    """
    x = (actions - low) / (high - low + np.float32(1e-6)) * np.float32(num_bins)
    return np.clip(np.rint(x), 0, num_bins).astype(int)


def _write_samples(out, low, high, horizon, num_bins, job):
    """Write the pictures of one demonstration; return its lines.

    job: (file, demonstration, number of the sample that starts at its frame 0, the frame to begin with).
    """
    path, demo, number, first = job
    with _hdf5(path) as file:
        actions = file[f"data/{demo}/actions"][:].astype(np.float32)
        pictures = np.concatenate([file[f"data/{demo}/{name}"][:] for name in CAMERAS], 2)
    instruction = path.stem.replace("_demo", "").replace("_", " ").strip()       # a scene's name stays in
    q, lines = community_encode(actions, low, high, num_bins), []                # (frames, D)
    for t in range(first, len(q) - horizon):
        image = f"images/{number + t:08d}.png"
        Image.fromarray(pictures[t]).save(out / image)
        text = " ".join(map(str, q[t:t + horizon].ravel().tolist()))
        line = dict(zip(FIELDS, (instruction, image, text, horizon, q.shape[1])))
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


# ---- VLA-0's community form: read -------------------------------------------------------------------------

class Manifest(Samples):
    """A manifest.jsonl, the original's or built here: [i] is a sample. All lines are checked at once.

    `actions` are decoded from the text, which comes along as `action_text`. Digits hidden as X in the file
    are inputs, never targets: their number is reported; in `actions`, such an integer is the middle of its
    range (as in the original) and its step does not count (loss_mask). No state is in the files: one zero.
    split: every 20th episode is "val", the rest "train". A line goes on with the episode of the line before
    if it has its instruction and its actions one step later (X fits any digit): neighbours are never parted.
    split="all", horizon=None (the first line's): to look at. damaged: a list for the lines left out, else
    they are an error.
    """
    PART = "line"

    def __init__(self, path, split="train", horizon=8, name="libero_hdf5", damaged=None):
        assert split in ("train", "val", "all"), split
        self.path, self.name, about = Path(path), name, Path(path).parent / "built_from.json"
        made_from = read_json(about) if about.exists() else {}
        self.num_bins = made_from.get("num_bins", 1000)
        self.low, self.high = self._limits()
        self.shape = (horizon, len(self.low))
        rows, first, at, episode, before = [], [], 0, -1, ("", None)
        with _layout(self.path, "VLA-0's form"), open(path, "rb") as file:
            for number, raw in enumerate(tqdm(file, str(path), unit="line", disable=rank_info()[0] > 0), 1):
                start, at = at, at + len(raw)
                with _noted(damaged):
                    line, q = self._parse(raw, number)
                    old = before[1][1:] if line["instruction"] == before[0] else None    # (H - 1, D)
                    episode += old is None or bool(((old != q[:-1]) & (old >= 0) & (q[:-1] >= 0)).any())
                    rows.append((number, start, episode, line["target_action_text"].count("X")))
                    first.append(q[0].astype(np.int32))
                    before = line["instruction"], q
        self.damaged, whole = damaged or (), len(rows) + len(damaged or ())
        if whole != max(wanted := made_from.get("samples", whole), 1):
            raise ValueError(f"{path} holds {len(rows)} samples of {wanted or 'at least 1'}; run "
                             "build-manifest again: it goes on where it was interrupted.")
        if not rows:
            raise ValueError(self.damaged[0][1])
        statistics = ActionStatistics()
        statistics.add(self._decode(np.stack(first)), trajectories=episode + 1)
        self.stats = {name: statistics.result([True] * (self.shape[1] - 1) + [False])}
        self.stats[name]["action"].update(min=self.low.tolist(), max=self.high.tolist())
        rows = np.array(rows)
        kept = (rows[:, 2] % 20 == 19) == (split == "val")
        self.rows = rows if split == "all" else rows[kept]                               # (N, 4)
        self.at = np.append(np.flatnonzero(np.diff(self.rows[:, 2], prepend=-1)), len(self.rows))
        hidden = self.rows[:, 3]
        if hidden.any() and rank_info()[0] == 0:
            print(f"{path}, {split}: {hidden.sum():,} digits are hidden as X, in {(hidden > 0).sum():,} of "
                  f"{len(self):,} samples; they are inputs, never targets.", file=sys.stderr)

    def _limits(self):
        """What the integers' ends stand for, (D,) float32 each; for the two names see `_write_limits`."""
        beside, above = (folder / "action_stats.npz" for folder in self.path.resolve().parents[:2])
        path = beside if beside.exists() else above
        try:
            with np.load(path) as file:
                low, high = (file[name if name in file else f"action_{name}"].astype(np.float32)
                             for name in ("mins", "maxs"))
            if low.ndim == 1 and low.shape == high.shape and (low <= high).all():
                return low, high
            reason = f"min {low.tolist()}, max {high.tolist()}"
        except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as e:
            reason = str(e).partition("\n")[0]
        raise ValueError(f"{path}, the range of the actions of {self.path}, cannot be read: {reason}")

    def _parse(self, raw, number):
        """A line -> (its object, its integers (H, D), -1 where digits are hidden)."""
        where = f"{self.path}, line {number}"
        try:
            line = json.loads(raw)
            *texts, H, D = (line[key] for key in FIELDS)
        except (ValueError, LookupError, TypeError) as e:
            raise ValueError(f"{where} is torn, or has not all of {', '.join(FIELDS)}: {e}") from None
        self.shape = self.shape[0] or H, self.shape[1]
        if (H, D) != self.shape:
            raise ValueError(f"{where}: H={H}, D={D}; the model's horizon is {self.shape[0]}, the statistics "
                             f"have {self.shape[1]} numbers. Set horizon, or build another manifest.")
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{where}: {', '.join(FIELDS[:3])} must be strings that are not empty.")
        q = [-1 if "X" in word else int(word) for word in re.findall("[0-9X]+", texts[2])]
        if len(q) != H * D or max(q) > self.num_bins or re.search("[^0-9X ]|  |^ | $", texts[2]):
            raise ValueError(f"{where}: wanted {H * D} integers in 0..{self.num_bins}, with a space between, "
                             f"digits perhaps X; found {texts[2]!r}.")
        return line, np.array(q).reshape(H, D)

    def _decode(self, q):
        """Integers (..., D) -> robot units, float32. Hidden ones are the middle (500), as there."""
        q = np.where(q < 0, self.num_bins // 2, q)
        return (q / self.num_bins * (self.high - self.low) + self.low).astype(np.float32)

    def facts(self):
        """Yield its form, horizon and integers."""
        yield f"VLA-0's manifest.jsonl; horizon {self.shape[0]}, integers 0 .. {self.num_bins}"

    def __getitem__(self, index):
        self.place(index)
        number, at = self.rows[index, :2].tolist()
        with open(self.path, "rb") as file:
            file.seek(at)
            line, q = self._parse(file.readline(), number)
        path = self.path.parent / line["image_path"]       # absolute in the original's, where it was written
        path = path if path.exists() else self.path.parent / "images" / path.name
        try:
            third, wrist = np.split(np.array(Image.open(path).convert("RGB")), 2, axis=1)       # (h, w, 3)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise ValueError(f"{self.path}, line {number}: {path} is no picture of two halves: {e}") from None
        return {"images": {"third": third, "wrist": wrist}, "instruction": line["instruction"],
                "state": np.zeros(1, np.float32), "actions": self._decode(q), "loss_mask": (q >= 0).all(1),
                "dataset": self.name, "action_text": line["target_action_text"]}


# ---- A0's forms: waypoints, no actions --------------------------------------------------------------------
# Below the unzipped A0-Dataset (of the authors' absolute paths in its files, the ends count):
#   maniskill/TASK/label/out*.json                   points [pixels] and pictures per frame, from `start` on
#   droid_cotrack/, droid_molmo_sam2/ episode*.json  points [fractions] and pictures per frame, from 0 on
#   hoi4d_metadata/**/metadata.json                  an object's centre [pixels] per frame, and events; from
#                                                    HOI4D's own masks: see hoi4d_metadata
#   hoi4d_frame/                                     4 points [pixels] for chosen frames
#   HOI4D_release/**/align_rgb/00000.jpg, ...        the frames of both: see hoi4d_frames
#   pixmo-points/*.parquet or .json, images/*        points [percent]; pictures, by the SHA-256 of their URL

def a0_dataset(form, root, split="train", seed=0, first_frame=None, single_image=None, pictures=None,
               damaged=None):
    """One of `A0_FORMS`, below `root` or in it: [i] is a window of episode i, the same each time.

    `draw(i, key)` draws another window for each key; `sample(i, rng)` takes rng's randint, choice and random,
    in the official order. Waypoints may leave the image, as officially; far outside, they are an error.
    split: "train" or "test"; without a split file, drawn by `seed` and not written.
    first_frame: the reference (history_images) is the segment's first frame, else the one before (None: in
    training). single_image: how often there is none (None: 0.4 in training, 0.3 for hoi4d_frame; 0 in tests).
    pictures: HOI4D_release, or pixmo's images, if elsewhere. Episodes left out are counted on stderr; what
    else is wrong is a ValueError once it is met (the original prints it, and reads another episode), or of
    the files that say what there is, a line of the list `damaged`.
    """
    choose("A0 has no form", form, list(A0_FORMS))
    root, (reader, names, *_) = Path(root).expanduser().resolve(), A0_FORMS[form]
    if not root.is_dir() or split not in ("train", "test"):
        raise ValueError(f"{form}={root}, split={split!r}: give the unzipped A0-Dataset, and train or test.")
    root = next((root / name for name in names if (root / name).is_dir()), root)
    return reader(form, root, split, seed, first_frame, single_image, pictures, damaged)


@contextlib.contextmanager
def _layout(path, form="A0's sets"):
    """Whatever is wrong with a file is one ValueError that names it."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, OSError, EOFError, SyntaxError, RuntimeError,
            zlib.error, zipfile.BadZipFile, Image.DecompressionBombError) as e:
        if type(e) is ValueError and str(path.parent) in str(e):   # one of ours
            raise
        make = " HOI4D's frames come from data.py hoi4d-frames." * (path.parent.name == "align_rgb")
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise ValueError(f"{path} is not as in {form}: {reason}. Copy it again.{make}") from None


class A0Set(Samples):
    """What the forms share. A subclass finds its episodes and reads them:

    row(path, content) -> what `read` needs besides, or a str: why it is left out (or an index() of its own).
    read(path, *row, rng) -> (instruction, points (up to 5, 2), current picture, reference picture or None,
    the class by which the official tests average, or "").
    """
    UNIT = "windows"

    def __init__(self, form, root, split, seed, first_frame, single_image, pictures, damaged=None):
        train, loud = split == "train", rank_info()[0] == 0
        self.form, self.root, self.split, self.seed, self.noted = form, root, split, seed, damaged
        self.first_frame = train if first_frame is None else first_frame
        often = 0.3 if form == "hoi4d_frame" else 0.4
        self.single_image = often * train if single_image is None else single_image
        beside = "images" if form == "pixmo-points" else "../HOI4D_release"
        self.pictures = Path(pictures or root / beside).expanduser().resolve()
        rows = list(tqdm(self.index(), f"{form} {split}", unit="episode", leave=False, disable=not loud))
        self.rows = [(path, *row) for path, row in rows if not isinstance(row, str)]
        self.damaged = damaged or ()
        if loud and (left := [row for _, row in rows if isinstance(row, str)]):
            why = ", ".join(f"{left.count(reason):,} {reason}" for reason in sorted(set(left)))
            print(f"{root}, {split}: {len(self):,} episodes; left out: {why}.", file=sys.stderr)
        if train and not self.rows and not damaged:
            raise ValueError(f"{root}: no episode of {form} to train on. Is it the right folder, and whole?")

    def index(self):
        """Yield (path, row or why it is left out) of this split's episodes."""
        listed = self.root / f"train_test_split{'_droid' * (self.form == 'droid_molmo_sam2')}.json"
        paths = self.share(sorted(self.root.glob(A0_FORMS[self.form][2])))
        if listed.is_file():
            with _layout(listed):
                names = [PurePosixPath(name).parts for name in read_json(listed)[self.split]]
                paths = (self.first([self.root.joinpath(*name[i:]) for i in range(len(name))],
                                    f"{listed} names it") for name in names)
        for path in filter(None, paths):
            with _noted(self.noted), _layout(path):
                yield path, self.row(path, read_json(path))

    def share(self, items):
        """This split's part of them (officially drawn without a seed, and kept in the user's folder)."""
        random.Random(hash64(self.seed)).shuffle(items)
        train = int(len(items) * A0_FORMS[self.form][3])
        return items[:train] if self.split == "train" else items[train:]

    def first(self, paths, why):
        """The first of these files that is there; none is a ValueError."""
        with _noted(self.noted):
            if path := next((path for path in paths if path.is_file()), None):
                return path
            raise ValueError(f"{paths[0]} is missing; {why}. Unzip the set again, or take it out there.")

    def facts(self):
        """Yield its form and split."""
        yield f"A0's {self.form}, {self.split}; of each episode, one window is drawn in an epoch"

    def picture(self, path):
        """(h, w, 3) uint8, RGB."""
        with _layout(path), Image.open(path) as file:
            return np.array(file.convert("RGB"))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.draw(index, hash64(self.seed, 0, index))

    def draw(self, index, key):
        """The sample of episode `index` whose window `key` draws."""
        return self.sample(index, random.Random(key))

    def sample(self, index, rng):
        """The sample of episode `index`, drawn from `rng` (Python's random.Random) in the official order."""
        path = self.rows[index][0]
        with _layout(path):
            instruction, points, current, reference, kind = self.read(*self.rows[index], rng)
            xy = np.array(points, np.float64).reshape(-1, 2)                              # (up to 5, 2)
        alone = rng.random() < self.single_image or reference is None          # the last draw, as officially
        image = self.picture(current)                                                     # (h, w, 3)
        h, w = image.shape[:2]
        xy = xy / (1 if self.form.startswith(("droid", "pixmo")) else (w, h))
        xy = np.concatenate([xy, xy[-1:].repeat(5 - len(xy), 0)])                         # (5, 2)
        if not (np.abs(xy - 0.5) < 1.5).all():             # NaN; or the points have another unit
            raise ValueError(f"{path}: waypoints {np.round(xy, 2).tolist()}, in fractions of {current} "
                             f"({w} x {h}), are far outside. Is it the right picture? Else take them out.")
        sample = {"images": {"current": image}, "waypoints": xy.astype(np.float32),
                  "instruction": instruction, "dataset": self.form} | ({"class": kind} if kind else {})
        if not alone:
            sample["history_images"] = {"current": (before := self.picture(reference))[None]}   # (1, h, w, 3)
            if before.shape != image.shape:
                raise ValueError(f"{reference} is {before.shape}, {current} {image.shape}. Copy both again.")
        return check_sample(sample, str(path))


class Tracked(A0Set):
    """maniskill, droid_cotrack, droid_molmo_sam2: where an object's point went."""

    def row(self, path, episode):
        """() for an episode of 6 frames or more that is valid, else why it is left out."""
        about, found = episode["metadata"], min(len(episode["waypoints2d"]), len(episode["cam_highs"]))
        start, end = about["validRange"]["start"], about["validRange"]["end"]
        if start < 0 or not found or end - 5 - start * (self.form == "maniskill") >= found:
            raise ValueError(f"{path}: validRange {start}..{end}, {found} points or pictures. Copy it again.")
        return () if end - start >= 5 and about.get("is_valid", True) else "too short, or marked not valid"

    def read(self, path, rng):
        """A window of 5 points, 4 or 5 frames apart, from a frame drawn in the range on."""
        about, points, pictures = map(read_json(path).get, ("metadata", "waypoints2d", "cam_highs"))
        start, end, instruction = *map(about["validRange"].get, ("start", "end")), about["instructions"]
        if isinstance(instruction, list):                  # droid_cotrack's
            instruction = rng.choice([text for text in instruction if text])
        at, stride = rng.randint(start, end - 5), rng.choice([5, 4])
        # points[0] and pictures[0] belong to the frame `zero`, pictures are named from `folder`
        zero, folder = (start, path.parents[1]) if self.form == "maniskill" else (0, self.root)
        window = points[at - zero:min(at + 4 * stride, len(points) + zero) + 1 - zero:stride]
        if self.form == "maniskill":
            # FAITHFUL: the last point is the episode's, wherever the window ends.
            # Test: test_data_a0.py::test_last_waypoint_of_a_maniskill_window_is_the_episodes
            window[-1] = points[-1]
        before = start if self.first_frame else max(at - 1, zero)
        kind = folder.name if self.form == "maniskill" else ""                 # the task's folder
        return instruction, window, folder / pictures[at - zero], folder / pictures[before - zero], kind


class Hoi4d(A0Set):
    """hoi4d: an object's way through an event."""

    def row(self, path, clip):
        """(its events that fit: (name, first, last frame),), or why the clip is left out."""
        centers, events = [frame["center"] for frame in clip["frames"]], []
        if not centers:
            raise ValueError(f"{path}: its list of frames is empty. Take the file out.")
        if not all(centers) or any(frame["frame_index"] != i for i, frame in enumerate(clip["frames"])):
            return "with frames or centres missing"
        for event in clip["events_frame"]:
            start, end = event["start_frame"], event["end_frame"]
            last = min(end, len(centers) - 1)              # (officially one too many if there are `end`)
            if event["event"] not in ("rest", "Reachout", "Stop") and end - start > 5 <= last - start:
                events.append((event["event"], start, last))
        return (events,) if events else "without an event of 6 frames"       # (officially an endless loop)

    def read(self, path, events, rng):
        """A drawn event's 5 points, from a drawn frame (tests: the first) to its end."""
        clip, (event, start, end) = read_json(path), rng.choice(events)
        at = rng.randint(start, end - 5) if self.split == "train" else start
        before = start if self.first_frame else max(at - 1, 0)
        current, reference = (self.pictures / clip["image_dir"] / f"{i:05d}.jpg" for i in (at, before))
        points = [clip["frames"][i]["center"] for i in np.linspace(at, end, 5).astype(int)]
        what = clip["label_name"]
        return f"Task: {clip['task_name']}. {event} {what}.", points, current, reference, what


class Hoi4dFrame(A0Set):
    """hoi4d_frame: four points for a frame, made five; the reference is always the frame before."""

    def index(self):
        """Yield (points, row) of the frames that the table calls good, by the best of their points."""
        listed, table = self.root / "hoi4d_frame_metadata.json", self.root / "HOI4D_points_rectification.csv"
        splits, whole = ("train", "val") if self.split == "train" else ("test",), read_json(listed)
        with _layout(listed):
            entries = {entry["id"]: (entry["index"].replace(" ", "_"), int(entry["img"]), entry["object"],
                                     entry.get("instruction") or self.say(**entry))
                       for split in splits for entry in whole[split]}
        with _layout(table), open(table, encoding="utf-8-sig", newline="") as file:
            for line in csv.DictReader(file):
                number, sources = int(line["id"]), [s for s in ("base", "manual", "molmo") if line[s] == "1"]
                if number in entries and not sources:
                    yield table, "without good points"
                elif number in entries:
                    clip, frame, thing, instruction = entries[number]
                    name = f"HOI4D_points_molmo/{{}}/{number}_points2d_{sources[0]}.npy"
                    if sources[0] == "base":
                        name = f"HOI4D_points/{{}}/{clip}/{frame:05d}/points2d.npy"
                    path = self.first([self.root / name.format(split) for split in splits], f"{table} has it")
                    if path:
                        yield path, (line["instruction"] or instruction, clip, frame, thing)

    def say(self, action, object, kpst_part=(), **_):
        """The instruction of a frame without one, as officially."""
        cabinet = object == "Storage Furniture" and "Body of the Cabinet" in kpst_part
        part = next((part for part in ("Drawer", "Door") if cabinet and part in kpst_part), None)
        if part and action in ("open", "close"):
            return f"{action} the {part.lower()} of the cabinet body in the storage furniture."
        return f"{ {'pickup': 'pick up', 'putdown': 'put down'}.get(action, action)} the {object.lower()}"

    def read(self, path, instruction, clip, frame, thing, rng):
        """Its four points and one more between the last two, in pixels."""
        points = np.load(path, allow_pickle=False).astype(np.float64)
        points = (points[0] if path.name == "points2d.npy" else points).reshape(4, 2)
        points = np.insert(points, 3, (points[2] + points[3]) / 2, 0)                     # (5, 2)
        folder, numbers = self.pictures / clip / "align_rgb", (frame, max(frame - 1, 0))
        return instruction, points, *(folder / f"{i:05d}.jpg" for i in numbers), thing


class PixmoPoints(A0Set):
    """pixmo-points, to pre-train on: a label and its one point, as all five waypoints; no reference."""

    def index(self):
        """Yield (picture, (label, point)) of the rows with one point and a picture that opens."""
        with _layout(self.pictures):
            files = {path.stem: path for path in self.pictures.iterdir() if path.suffix != ".tmp"}
        mine = set()
        for name in self.share(sorted(files)):
            with contextlib.suppress(OSError), Image.open(files[name]):
                mine.add(name)
            if name not in mine:                               # a download that failed may leave a message
                yield files[name], "no picture"
        for table in sorted([*self.root.rglob("*.parquet"), *self.root.glob("*.json")]):
            with _noted(self.noted), _layout(table):
                for row in self.table(table):
                    name, points = hashlib.sha256(row["image_url"].encode()).hexdigest(), row["points"]
                    if len(points) != 1 or not is_text(row["label"]) or name not in files:
                        yield table, "without a label, one point and a downloaded picture"
                    elif name in mine:
                        yield files[name], (row["label"], (points[0]["x"] / 100, points[0]["y"] / 100))

    def table(self, path):
        """The rows of a .json (a list, or an object per line) or .parquet, dicts."""
        if path.suffix == ".json":                             # a list, or an object per line
            text = path.read_text(encoding="utf-8")
            return json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
        batches = _optional("pyarrow.parquet", path).ParquetFile(path).iter_batches()
        return itertools.chain.from_iterable(batch.to_pylist() for batch in batches)

    def read(self, path, label, point, rng):
        """The label and its point, in fractions."""
        return label, [point], path, None, ""


def _optional(module, path):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{path} needs a package; run: pip install {module.partition('.')[0]}") from None


A0_FORMS = {       # form: reader, names of its folder; without a split file: episodes, training's share
    "hoi4d_frame": (Hoi4dFrame, ["hoi4d_frame"]),
    "hoi4d": (Hoi4d, ["hoi4d_metadata", "HOI4D_metadata"], "**/metadata.json", 0.8),
    "droid_cotrack": (Tracked, ["droid_cotrack", "droid-cotrack"], "episode*.json", 0.9),
    "maniskill": (Tracked, ["maniskill"], "*/label/out*.json", 0.8),
    "droid_molmo_sam2": (Tracked, ["droid_molmo_sam2", "droid-molmo-sam2"], "episode*.json", 0.9),
    "pixmo-points": (PixmoPoints, ["pixmo-points", "pixmo_points"], "", 0.99)}
OFFICIAL_MIXTURE = {"a0": list(A0_FORMS)[:5]}              # every episode is as likely as any other


def hoi4d_frames(root, workers=None):
    """HOI4D's align_rgb/image.mp4 below `root` -> 00000.jpg, ... beside it, 15 per second; how many videos.

    As HOI4D's decode.py (ffmpeg's `fps` filter). Interrupted, it goes on; .frames.json: a video is done.
    """
    videos = sorted(Path(root).glob("**/align_rgb/image.mp4"))
    if not videos:
        raise ValueError(f"{root}: no align_rgb/image.mp4 below it. Give HOI4D_release, unzipped.")
    done = _in_processes(_decode_video, videos, usable_cores() if workers is None else workers)
    return len(list(tqdm(done, "HOI4D", len(videos), unit="video")))


def _decode_video(path):
    about, size, number = path.with_name(".frames.json"), path.stat().st_size, 0
    if not about.exists() or read_json(about).get("bytes") != size:
        for number, image in enumerate(_at_15_hz(path), 1):
            if not (frame := path.with_name(f"{number - 1:05d}.jpg")).exists():
                atomic_write(frame, partial(image.save, format="JPEG", quality=95))
        write_json(about, {"bytes": size, "frames": number})


def _at_15_hz(path):
    av = _optional("av", path)
    with _layout(path), av.open(str(path)) as video:
        graph, stream = av.filter.Graph(), video.streams.video[0]
        graph.link_nodes(graph.add_buffer(template=stream), graph.add("fps", "15"), graph.add("buffersink"))
        graph.configure()
        for frame in itertools.chain(video.decode(stream), [None]):
            graph.push(frame)
            with contextlib.suppress(av.BlockingIOError, av.EOFError):
                while True:
                    yield graph.pull().to_image(src_colorspace="ITU601")   # as decode.py: the YUV as it is


# What moves in a category: labels of its masks, where that is not 1 (C4: 4 where the task is the drawer's).
MOVES = {"C6": [3], "C8": [3, 5], "C14": [3], "C17": [3], "C18": [4]}
AROUND = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]    # (x, y), clockwise


def label_colours(n):
    """RGB of the labels 0 .. n - 1 in HOI4D's masks, (n, 3) uint8: PASCAL VOC's map.

    A label's bits are dealt to red, green, blue in turn, the first ones into their highest bits.
    """
    labels = np.arange(n)
    dealt = [sum((labels >> (3 * j + c) & 1) << (7 - j) for j in range(3)) for c in range(3)]
    return np.stack(dealt, 1).astype(np.uint8)


def outline(inside):
    """The outer border of the topmost thing in bool (h, w), clockwise: a list of its pixels (x, y)."""
    (h, w), start = inside.shape, tuple(map(int, np.unravel_index(inside.argmax(), inside.shape)))[::-1]
    border, (x, y), way, first = [], start, 0, None
    while True:
        for way in [(way + turn) % 8 for turn in range(5, 13)]:            # from the left behind, clockwise
            nx, ny = x + AROUND[way][0], y + AROUND[way][1]
            if 0 <= nx < w and 0 <= ny < h and inside[ny, nx]:
                break
        else:
            return [start]                                                 # one pixel, alone
        if ((x, y), way) == (start, first):
            return border
        first = way if first is None else first
        border.append((x, y))
        x, y = nx, ny


def mask_centre(mask, labels, largest=False):
    """[x, y], whole pixels cut off, of the things with these labels in a mask's RGB (h, w, 3); None: nowhere.

    The mean of their pixels; or `largest`: of the area (Green's formula, as cv2.moments does it for a
    contour) within the largest of their outer borders. A border without an area has no centre.
    """
    inside = (mask[:, :, None] == label_colours(256)[labels]).all(-1).any(-1)                      # (h, w)
    if not largest or not inside.any():
        return [int(at.mean()) for at in np.nonzero(inside)[::-1]] if inside.any() else None
    best, centre = 0.0, None
    while inside.any():
        x, y = np.array(border := outline(inside), np.float64).T
        nx, ny = np.roll(x, -1), np.roll(y, -1)
        cross = x * ny - nx * y
        if abs(area := cross.sum() / 2) > best:
            centre = [int((cross * (a + b)).sum() * (1 / 6) / area) for a, b in ((x, nx), (y, ny))]
            best = abs(area)
        left = Image.fromarray(inside)                                     # without it, and all within it
        ImageDraw.Draw(left).polygon(border * 2, fill=0, outline=0)
        inside = np.array(left)
    return centre


def hoi4d_metadata(root, definitions, workers=None):
    """HOI4D's masks and events below `root` -> root/hoi4d_metadata/CLIP/metadata.json; how many clips.

    It reads HOI4D_annotations/CLIP/2Dseg/shift_mask (or mask)/00000.png, ... and action/color.json of each;
    clips without masks (most of HOI4D's own validation set) are counted on stderr. definitions: the folder
    of that name in HOI4D-Instructions. Interrupted, it goes on.
    """
    root, definitions = Path(root).expanduser(), Path(definitions).expanduser()
    clips = sorted(path.parents[1] for path in (root / "HOI4D_annotations").glob("**/action/color.json"))
    if not clips:
        raise ValueError(f"{root}: no HOI4D_annotations/**/action/color.json in it. Unzip HOI4D's "
                         "annotations there.")
    tables = []
    for path in (definitions / "task/task_definitions.csv", definitions / "motion segmentation/label.csv"):
        with _layout(path), open(path, encoding="utf-8-sig", newline="") as file:
            tables.append({row["Category ID"]: row for row in csv.DictReader(file)})
    work = partial(_write_metadata, root, tables)
    done = _in_processes(work, clips, usable_cores() if workers is None else workers)
    made = sum(tqdm(done, "HOI4D", len(clips), unit="clip"))
    if made < len(clips):
        print(f"{root}: {len(clips) - made:,} clips have no masks, and are left out.", file=sys.stderr)
    return made


def _write_metadata(root, tables, clip):
    """True when the clip has its file; False if it has no masks."""
    name, marks = clip.relative_to(root / "HOI4D_annotations"), clip / "action" / "color.json"
    if (file := root / "hoi4d_metadata" / name / "metadata.json").is_file():
        return True
    with _layout(marks):
        category, task = re.search(r"(C\d+)/.*(T\d+)$", name.as_posix()).groups()     # ZY1/H1/C5/N1/S1/s1/T1
        words = tables[0][category][task].lower()
        labels = MOVES.get(category, [4 if category == "C4" and "drawer" in words else 1])
        part, whole = tables[1][category][f"Lable {labels[0]}"], tables[0][category]["Category"]     # (sic)
        events = _hoi4d_events(read_json(marks))
    folder = clip / "2Dseg" / "shift_mask"                                 # moved to fit the pictures
    folder = folder if folder.is_dir() else folder.with_name("mask")
    masks, centres = {int(path.stem): path for path in folder.glob("*.png") if path.stem.isdecimal()}, []
    for i in range(max(masks, default=-1) + 1):
        if i in masks:
            with _layout(masks[i]), Image.open(masks[i]) as picture:
                centres.append(mask_centre(np.array(picture.convert("RGB")), labels, category == "C8"))
        else:
            centres.append(None)
    if not centres:
        return False
    during = [next((e["event"] for e in events if e["start_frame"] <= i <= e["end_frame"]), None)
              for i in range(len(centres))]
    write_json(file, {
        "image_dir": f"{name.as_posix()}/align_rgb", "task_name": words,
        "label_name": part if part == whole or " of " in part else f"{part} of {whole}",
        "frames": [{"frame_index": i, "center": at, "event": event}
                   for i, (at, event) in enumerate(zip(centres, during))],
        "events_frame": events})
    return True


def _hoi4d_events(about):
    """What is done when [s], said in one of two ways -> in frames, 15 per second."""
    names, marks = ("startTime", "endTime"), about.get("events")
    if marks is None:
        names, marks = ("hdTimeStart", "hdTimeEnd"), about["markResult"]["marks"]
    length = {key.lower(): value for key, value in about.get("info", {}).items()}.get("duration", 20)
    rate = 15 * (2 if float(length) == 10 else 1)                          # these clips last 20 s, too
    return [{"id": mark.get("id", i), "event": mark["event"], "start_frame": int(mark[names[0]] * rate),
             "end_frame": int(mark[names[1]] * rate)} for i, mark in enumerate(marks)]


# ---- RoboVLMs' forms: CALVIN on disk, windows of whole episodes --------------------------------------------
# --data FILE.json: what the official JSON's train_dataset (validation: val_dataset) says.
#   DIR/{training,validation}/episode_0000042.npz    rgb_static, rgb_gripper, rel_actions, robot_obs
#   DIR/training/lang_annotations/auto_lang_ann.npy  pickled: info.indx (start, end), language.ann, .task

# what acts here, with its default
CALVIN = {"skip_frames": 1, "few_shot": False, "partial_data": False, "exclude_tasks": (), "tcp_rel": False}
WINDOWS = {"window_sample": "sliding", "organize_type": "interleave", "left_pad": True}
# acts in Config (pad), or is Config's (window, chunk), or train.py's (batch): no news in a data block
ELSEWHERE = ("type", "data_dir", "data_root_dir", "data_mix", "rgb_pad", "gripper_pad", "traj_cons",
             "window_size", "fwd_pred_next_n", "batch_size", "num_workers", "train", "datasets")


def calvin_windows(segments, W, K, skip_frames=1):
    """Segments [(start, end)] -> of N windows: the segment (N,), frames (N, W + K), which count (N, W + K).

    Frame `end` is never a target: what lies beyond a segment shows it, and does not count.
    """
    starts = [(number, s) for number, (first, end) in enumerate(segments)
              for s in range(first, end - W + 1, skip_frames)]
    which, at = (np.array(x, np.int64) for x in zip(*starts)) if starts else (np.zeros(0, np.int64),) * 2
    frames = at[:, None] + np.arange(W + K)                                              # (N, W + K)
    ends = np.array([end for _, end in segments], np.int64)[which][:, None]              # (N, 1)
    return which, np.minimum(frames, ends), frames < ends


def episode_windows(n, W, K, window_sample="sliding", left_pad=True):
    """An episode of n frames -> frames of each window (N, W + K), which count (N, W + K).

    W - 1 earlier frames, the newest, K later ones; beyond the ends the first or last frame, not counted.
    left_pad=False: no window without all its earlier frames. "range": each window W times, of which the j-th
    counts the first j frames not.
    """
    frames = np.arange(0 if left_pad else W - 1, n)[:, None] + np.arange(1 - W, K + 1)   # (N, W + K)
    counts = (frames >= 0) & (frames < n)
    if window_sample == "range":
        frames, counts = frames.repeat(W, 0), counts.repeat(W, 0)
        counts &= np.arange(W + K) >= np.tile(np.arange(W), len(frames) // W)[:, None]
    return frames.clip(0, n - 1), counts


class Calvin(torch.utils.data.Dataset):
    """CALVIN's language segments, a window each sample: W frames, K actions from the newest on (rel_actions).

    few_shot: True (the first ten segments of each task; the official list is not public), or as partial_data
    a JSON file {"segments": [[start, end], ...]} of the wanted ones. tcp_rel: actions in the gripper's frame.
    """

    def __init__(self, root, split, horizon, history, views, **options):
        from robovlms import gripper_frame, official_stats
        o = self.options = CALVIN | options
        self.folder = calvin_folder(root, split)
        self.stats, self.horizon, self.history = official_stats("calvin"), horizon, history
        self.turn = gripper_frame if o["tcp_rel"] else lambda actions, state: actions
        self.views = dict(zip(views, ("rgb_static", "rgb_gripper")))
        language = calvin_language(self.folder / "lang_annotations" / "auto_lang_ann.npy")
        lists = [set(map(tuple, read_json(o[key])["segments"])) for key in ("few_shot", "partial_data")
                 if isinstance(o[key], str)]
        if o["partial_data"] is True:
            raise ValueError("partial_data=true: the official list is not public; name a JSON file "
                             "{'segments': [[start, end], ...]} instead.")
        seen, self.segments, self.texts = {}, [], []
        for segment, text, task in zip(*language):
            seen[task] = seen.get(task, 0) + 1
            if (task not in o["exclude_tasks"] and (o["few_shot"] is not True or seen[task] <= 10)
                    and all(segment in wanted for wanted in lists)):
                self.segments.append(segment)
                self.texts.append(text)
        windows = calvin_windows(self.segments, history, horizon, o["skip_frames"])
        self.which, self.frames, self.counts = windows

    def __len__(self):
        return len(self.which)

    def __getitem__(self, index):
        W, K, ids, keys = self.history, self.horizon, self.frames[index], ("rel_actions", "robot_obs")
        frames = {}                                            # a frame that is shown twice is read once
        for i, n in enumerate(ids[:W + K - 1]):
            wanted = [*keys, *(self.views.values() if i < W else ())]
            if n not in frames:
                frames[n] = calvin_frame(self.folder, n, wanted)
        rows = [frames[n] for n in ids[:W + K - 1]]
        actions, state = (np.stack([row[key] for row in rows]).astype(np.float32) for key in keys)
        actions = self.turn(actions, state)
        pictures = {view: np.stack([row[key] for row in rows[:W]]) for view, key in self.views.items()}
        return {**_newest(pictures, actions, W), "loss_mask": self.counts[index][W - 1:W + K - 1],
                "state": state[W - 1], "instruction": self.texts[self.which[index]], "dataset": "calvin"}


def calvin_folder(root, split):
    """The folder training or validation in CALVIN's `root`, or beside it; to train on, `root` itself may do.

    No folder validation for another split than "train" is a ValueError.
    """
    root = Path(root).expanduser()
    if split == "train":
        return next(filter(Path.is_dir, [root / "training"]), root)
    if found := next(filter(Path.is_dir, [root / "validation", root.with_name("validation")]), None):
        return found
    raise ValueError(f"{root}: there is no folder validation, in it or beside it. Copy it there, or train "
                     "without validation (--val-every 0).")


def calvin_frame(folder, number, keys=None):
    """{key: array} of folder/episode_0000042.npz (None: all keys). ValueError: missing, torn, or without."""
    with _layout(path := folder / f"episode_{number:07d}.npz", "CALVIN"), np.load(path) as file:
        return {key: file[key] for key in keys or file.files}


def calvin_language(path):
    """auto_lang_ann.npy, a pickle of which only arrays are read -> segments, texts, tasks."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            about = ArrayUnpickler(file).load().item()
        return [tuple(map(int, pair)) for pair in about["info"]["indx"]], *(
            [str(text) for text in about["language"][key]] for key in ("ann", "task"))
    except Exception as e:                                     # a pickle can be torn in every way there is
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{path} holds no language of CALVIN: {reason}. data_dir must hold training/ and "
                         "validation/, as unzipped.") from e


def _newest(pictures, actions, W):
    """Windows of W frames and actions from the oldest frame on -> the sample's images, history, actions."""
    past = {"history_images": {view: x[:-1] for view, x in pictures.items()},
            "history_actions": actions[:W - 1]} if W > 1 else {}
    return {**past, "images": {view: x[-1] for view, x in pictures.items()},
            "actions": actions[W - 1:]}


class Windows(Samples):
    """Windows of whole episodes, as the Open-X loader cuts them; frames that do not count are left out.

    episodes: [i] is a dict of images {view: (n, h, w, 3) uint8}, actions (n, A), instruction, and (optional)
    state (n, S), dataset. organize_type="segment" is left padding and "range"; see `episode_windows`.
    """
    UNIT = "windows"

    def __init__(self, episodes, horizon, history, **options):
        o = WINDOWS | options
        choose("window_sample: there is no", o["window_sample"], ("sliding", "range"))
        choose("organize_type: there is no", o["organize_type"], ("interleave", "segment"))
        how = ("range", True) if o["organize_type"] == "segment" else (o["window_sample"], o["left_pad"])
        self.episodes, self.horizon, self.history = episodes, horizon, history
        self.stats = getattr(episodes, "stats", None)
        self.windows = partial(episode_windows, W=history, K=horizon, window_sample=how[0], left_pad=how[1])
        self.lengths = [len(episodes[e]["actions"]) for e in range(len(episodes))]
        self.at = np.cumsum([0] + [len(self.windows(n)[0]) for n in self.lengths])

    def __getitem__(self, index):
        (e, i), last = self.place(index), self.history - 1
        frames, counts = (x[i] for x in self.windows(self.lengths[e]))
        episode, first = self.episodes[e], int(np.argmax(counts))          # 0 .. W - 1: the first that counts
        frames = frames[first:last + self.horizon]
        actions = np.array(episode["actions"], np.float32)[frames]
        pictures = {view: x[frames[:last - first + 1]] for view, x in episode["images"].items()}
        state = np.asarray(episode.get("state", np.zeros((frames[-1] + 1, 1))), np.float32)
        return {**_newest(pictures, actions, last - first + 1), "instruction": episode["instruction"],
                "state": state[frames[last - first]], "dataset": episode.get("dataset", "episodes"),
                "loss_mask": counts[last:last + self.horizon]}


class Trajectories(torch.utils.data.Dataset):
    """`Recorded` episodes for `Windows`: [i] is all of one; pictures are decoded when they are indexed."""

    def __init__(self, recorded):
        self.recorded, self.stats = recorded, recorded.stats

    def __len__(self):
        return len(self.recorded.kept)

    def __getitem__(self, i):
        r = self.recorded
        rows = r._rows(int(r.at[i]), int(r.at[i + 1]))
        return {"images": {view: Pictures(r, i, rows, key) for view, key in r.views.items()},
                "actions": rows["actions"], "state": rows["state"], "dataset": r.name,
                "instruction": r.tasks[int(rows["task"][0])]}


class Pictures:
    """One camera's pictures of an episode: [frames (n,)] are (n, h, w, 3) uint8."""

    def __init__(self, recorded, i, rows, key):
        self.recorded, self.number, self.rows, self.key = recorded, recorded.kept[i][0], rows, key

    def __getitem__(self, frames):
        rows = {name: x[frames] for name, x in self.rows.items()}
        return self.recorded.pictures(self.number, rows, self.key)


def official_sets(path, split, horizon, history, views, cache=None):
    """Yield (where it is said, set) of each block of the train_dataset or val_dataset of an official JSON."""
    from robovlms import read_official_json
    key = "train_dataset" if split == "train" else "val_dataset"
    about = read_official_json(path)
    blocks = about.get(key) or []
    blocks = blocks if isinstance(blocks, list) else blocks.get("datasets", [blocks])
    if not blocks and split == "train":
        raise ValueError(f"--data {path}: it has no train_dataset; add the block, or give other --data.")
    for block in blocks:
        block, where = {"tcp_rel": bool(about.get("tcp_rel"))} | block, f"--data {path}, {key}"
        acts = {"DiskCalvinDataset": CALVIN, "OpenVLADataset": WINDOWS}
        choose(f"{where}: type: there is no", block.get("type"), tuple(acts))
        acts = acts[block["type"]]
        ignored = [k for k in block if k not in (*acts, *ELSEWHERE) and not (k == "tcp_rel" and not block[k])]
        if ignored and rank_info()[0] == 0:
            print(f"{where}: no effect: {', '.join(ignored)}", file=sys.stderr)
        options = {k: block[k] for k in acts if k in block}
        if acts is CALVIN:
            if "data_dir" not in block:
                raise ValueError(f"{where}: data_dir, CALVIN's folder, is missing.")
            data = Calvin(block["data_dir"], split, horizon, history, views, **options)
        else:
            source, _, name = str(block.get("data_root_dir")).rpartition(":")
            if source.endswith(".py"):
                data = Windows(_episodes(source, name, split), horizon, history, **options)
            else:
                data = _openx(block, where, split, horizon, history, views, cache, options)
        if not len(data) and split == "train":
            raise ValueError(f"{where}: no window of {history} frames is left; look at its data and options.")
        yield where, data


def official_dataset(path, split, horizon, history, views, expect, cache=None):
    """What the train_dataset or val_dataset of an official JSON describes; None: no validation set."""
    found = official_sets(path, split, horizon, history, views, cache)
    sets = [Checked(data, where, expect) for where, data in found if len(data)]
    whole = Chained(sets) if len(sets) > 1 else sets[0] if sets else None
    if len(sets) > 1 and all(x.stats for x in sets):
        whole.stats = {name: entry for x in sets for name, entry in x.stats.items()}
    return whole


def _openx(block, where, split, horizon, history, views, cache, options):
    """The windows of data_mix, a mixture or one set, in data_root_dir; every 20th episode validates."""
    root, mix = block.get("data_root_dir"), block.get("data_mix")
    if not (is_text(root) and is_text(mix) and Path(root).is_dir()):
        raise ValueError(f"{where}: data_root_dir={root!r}, data_mix={mix!r}: wanted a folder of sets (see "
                         "RLDS) and a mixture or set in it; or my_file.py:make_episodes (see Windows).")
    named = _mixture(root, mix, {}) if mix in MIXTURES else [("rlds", Path(root) / mix, {"weight": 1})]
    sets = [Windows(Trajectories(Rlds(folder, split, views=views, cache=cache)), horizon, history, **options)
            for _, folder, _ in named]
    kept = [(one, float(about["weight"])) for one, (*_, about) in zip(sets, named) if len(one)]
    return Bodies(*map(list, zip(*kept))) if kept else []


def _episodes(path, name, split):
    """The episodes that a user's function makes."""
    with _blame(f"{path}:{name}"):
        make = _user_function(path, name)
        return make(**({"split": split} if "split" in inspect.signature(make).parameters else {}))


# ---- RoboBrain-X0's forms: AgileX's recordings, JSONL, WebDataset's shards ---------------------------------
#   ANNOTATION.json   {group: [{raw_task, task, frame: {start_frame, end_frame},
#                               data: {high, left, right: mp4, state: HDF5}}, ...]}; frames count from 1
#   OUT/train.jsonl   a sample per line: raw_task, task, image [paths], conversations, action_eepose_token and
#                     action_qpos_token, action and state {eepose, qpos}: paths of .npy files
#   *.tar             NAME.json (conversations), .jpgs (paths, pickled), .metadata (JSON: the other fields)
# The HDF5 holds action (N, 14), poses: right arm, left arm, each x y z [m], Euler xyz [rad], gripper [m]; and
# qpos (N, 14): 6 joints [rad], gripper, likewise.

AGILEX = "AgileX's recordings"
AGILEX_VIEWS = {"cam_high": "high", "right_wrist": "right", "left_wrist": "left"}
GRIPPER_ZERO = {"company": (-0.00203000009059906, -0.0006300000241026282),     # right, left, when closed
                "company2nd": (-0.0016799999866634607, -0.0028699999675154686), "none": (0.0, 0.0)}
SOURCES = {"RoboBrain_Robotic_AGXCompany": "company", "RoboBrain_Robotic_AGXCompany2": "company",
           "RoboBrain_Robotic_Agilex_2nd": "company2nd"}       # a folder above the recording


class AgilexItem(NamedTuple):
    """One annotated segment of a recording."""
    number: int                       # in the annotation's order
    raw_task: str                     # the whole task
    task: str                         # what is done in this segment
    start: int                        # first and last frame, from 1 on
    end: int
    zero: tuple                       # what the right and the left gripper report when they are closed
    files: dict                       # {high, left, right, state: Path}


def agilex_items(path, root, source=None):
    """The segments of an annotation file, and why others are left out: ([AgilexItem, ...], [str, ...]).

    root: folder of the files that are not at their absolute path. source: one of GRIPPER_ZERO; None: by the
    folders' names. An unknown source, or a file of another form, is a ValueError.
    """
    items, missing = [], []
    with _layout(Path(path), AGILEX):
        for number, item in enumerate(itertools.chain(*read_json(path).values())):
            where, data, frame = f"{path}, item {number}", item["data"], item["frame"]
            about = item["raw_task"], item["task"], frame["start_frame"], frame["end_frame"]
            if [type(x) for x in about] != [str, str, int, int] or not all(map(is_text, about[:2])):
                raise ValueError(f"{where}: two texts and two whole numbers are wanted, found {about}.")
            known = [SOURCES[name] for name in PurePosixPath(data["high"]).parts if name in SOURCES]
            if not (source or known):
                raise ValueError(f"{where}: unknown source: {data['high']} is not in {', '.join(SOURCES)}. "
                                 f"Say whose gripper it is: --source {'|'.join(GRIPPER_ZERO)}.")
            try:
                files = {name: _below(root, data[name], where) for name in (*AGILEX_VIEWS.values(), "state")}
                items.append(AgilexItem(number, *about, GRIPPER_ZERO[source or known[0]], files))
            except ValueError as e:
                missing.append(str(e))
    return items, missing


def _below(root, path, where):
    """The file that an official set names; of the authors' absolute paths, an end is looked for in `root`."""
    parts = PurePosixPath(path).parts
    ways = (root.joinpath(*parts[i:]) for i in range(len(parts)))
    if (found := next((way for way in ways if way.is_file()), None)) is None:
        raise ValueError(f"{where}: {path} is missing, there and in {root}. Copy it, or name its root.")
    return found


def _agilex_read(item):
    """(poses, joints), (N, 14) float64 each, of a segment's whole recording; a closed gripper is 0."""
    path = item.files["state"]
    with _layout(path, AGILEX), _open_hdf5(path) as file:
        if set(file) != {"action", "qpos"}:
            raise ValueError(f"{path}: action and qpos are wanted, and no more, found {', '.join(file)}.")
        both = [file[name][:].astype(np.float64) for name in ("action", "qpos")]
    for name, x in zip(("action", "qpos"), both):
        _check_array(f"{path}: {name}", x, np.float64, (len(both[0]), 14))
        x[:, 6::7] -= item.zero
    sizes = [len(both[0])] + [len(Video(item.files[name]).times()) for name in AGILEX_VIEWS.values()]
    if not 1 <= item.start <= item.end <= min(sizes):
        raise ValueError(f"{path}, item {item.number}: frames {item.start} .. {item.end} are wanted; the "
                         f"rows, and the videos {', '.join(AGILEX_VIEWS)} have {sizes}.")
    return both


def agilex_chunks(poses, start, end, chunk=30, step=1, every=3):
    """The frames that a segment's samples are made of, (samples, step * chunk + 1), the one seen first.

    poses: (N, 14); start, end: first and last frame, from 1 on. A frame whose 14 numbers are those of the one
    before is left out, but for the first. A sample begins at every third frame left (10 Hz of 30), and at the
    last from which a chunk fits; past the end the last frame stays. Less than half a chunk: no sample.
    (Official data_process.py)
    """
    frames, T = np.arange(start - 1, end), step * chunk
    frames = frames[np.append(True, (poses[frames[1:]] != poses[frames[1:] - 1]).any(1))]
    starts = np.arange(max(1, len(frames) - T) if len(frames) >= 0.5 * T else 0)
    starts = starts[(starts % every == 0) | (starts == len(starts) - 1)]
    return frames[np.minimum(starts[:, None] + np.arange(T + 1), len(frames) - 1)]


def agilex_rows(poses, joints, step=1):
    """Frames (step n + 1, 14) -> {"action_eepose", "action_qpos", "state_qpos": (n, 14), "state_eepose":
    (n, 20)}: robobrain_x0.pose_deltas, joint_deltas, state_6d."""
    import robobrain_x0 as x0
    return {"action_eepose": x0.pose_deltas(poses, step), "action_qpos": x0.joint_deltas(joints, step),
            "state_eepose": x0.state_6d(poses[:-step:step]), "state_qpos": joints[:-step:step]}


def robobrain_process(annotation, out, robot="agilex", subtask=False, chunk=30, step=1, every=3, source=None,
                      root=None, fast=None, paraphrases=None, skip=False, workers=None):
    """AgileX's recordings -> out/train.jsonl, images, .npy, normal_stats.json. Returns how many samples.

    robot, subtask: whose training prompt, in which mode. step: frames from one action to the next; chunk,
    every: see `agilex_chunks`. source, root: see `agilex_items` (root None: beside the annotation). fast:
    FAST+'s tokenizer.json (None: no codes are written). paraphrases: JSON {raw_task: [text, ...]}, of which
    the first is asked. skip: leave out what is damaged, else it is a ValueError. Interrupted, it goes on.

    FAITHFUL: statistics count frames start + 1 .. end + 1, repeated ones too; samples others (official
    normal.py). Test: test_data_robobrain.py::test_statistics_count_other_frames_than_the_samples
    """
    import robobrain_x0 as x0
    choose("of two arms and three cameras there is no", robot,
           [name for name, body in x0.ROBOTS.items() if (body.arms, len(body.cameras)) == (2, 3)])
    out, key = Path(out), x0.ROBOTS[robot].stats[subtask]
    found, damaged = agilex_items(annotation, Path(root or Path(annotation).parent).resolve(), source)
    asked, kept, counts, parts = read_json(paraphrases) if paraphrases else {}, [], [], {}
    for item in tqdm(found, "recordings", unit="segment", disable=None):
        try:
            if paraphrases and not any(map(is_text, asked.get(item.raw_task, [])[:1])):
                raise ValueError(f"{paraphrases} has no text for {item.raw_task!r}.")
            poses, joints = _agilex_read(item)
        except ValueError as e:
            damaged.append(str(e))
            continue
        kept.append((item,))
        counts.append(len(agilex_chunks(poses, item.start, item.end, chunk, step, every)))
        span = slice(item.start, item.end + 1)
        for name, x in agilex_rows(poses[span], joints[span], step).items():
            parts.setdefault(key if name == "action_eepose" else name.replace("_", "."), []).append(x)
    for why in damaged if skip else ():
        print(f"left out: {why}", file=sys.stderr)
    if damaged and not skip or not sum(counts):
        why = f"{damaged[0]} --skip leaves them out." if damaged else "all are shorter than half a chunk."
        raise ValueError(f"{annotation}: {len(damaged)} segments are damaged, {len(kept)} are not: {why}")
    stats = {name: x0.quantile_stats(np.concatenate(x)) for name, x in parts.items()}
    how = {"robot": robot, "subtask": subtask, "chunk": chunk, "step": step, "every": every}
    texts = {"annotation": annotation, "fast": fast, "paraphrases": paraphrases}
    made_from = {**how, **{name: path and _sha256(path) for name, path in texts.items()}, "stats": stats,
                 "segments": [item.number for item, in kept], "samples": sum(counts)}
    out.mkdir(parents=True, exist_ok=True)
    beside = {"normal_stats.json": lambda part: part.write_text(json.dumps(stats, indent=1))}
    return _write_lines(out / "train.jsonl", made_from, partial(_write_agilex, out, how, fast, stats, asked),
                        kept, counts, beside, workers)


def _write_agilex(out, how, fast, stats, asked, job):
    """Write a segment's pictures and numbers; return its lines but for the first `done`.

    FAITHFUL: the task is what follows the last ": " of an earlier prompt, which ended in a period (official
    data_postprocess.py). Test: test_data_robobrain.py::test_the_prompt_is_the_official_one
    """
    import robobrain_x0 as x0
    (item, _, done), step, kinds, lines = job, how["step"], ("eepose", "qpos"), []
    poses, joints = _agilex_read(item)
    rows = agilex_chunks(poses, item.start, item.end, how["chunk"], step, how["every"])     # (n, step T + 1)
    images, arrays = (f"{kind}/{item.number:06d}" for kind in ("images", "action_token"))
    for folder in (images, arrays):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for view, name in AGILEX_VIEWS.items():
        video, frames = Video(item.files[name]), rows[:, 0]
        times = video.times()[frames]
        for at in range(0, len(rows), 64):                     # so many in memory
            for frame, x in zip(frames[at:], video.at(times[at:at + 64])):
                small = Image.fromarray(x).resize((320, 240), Image.Resampling.BOX)         # cv2's INTER_AREA
                small.save(out / images / f"{view}_{frame}.jpg", quality=95)
    tokenizer, keys = fast and x0.Fast.load(fast), list(stats)         # of the poses, the joints, ...
    text = x0.training_prompt(how["robot"], how["subtask"], asked.get(item.raw_task, [item.raw_task])[0],
                              f"{item.task}.".split(": ")[-1])
    talk = [{"from": "human", "value": text},
            {"from": "gpt", "value": f"{item.task}<boa>" * how["subtask"] + "<action_token>"}]
    for row in rows:
        numbers = agilex_rows(poses[row], joints[row], step)
        for name, key in zip(("action_eepose", "action_qpos"), keys if fast else ()):
            x = x0.normalize(numbers[name], stats[key])
            numbers[f"{name}_token"] = np.array([tokenizer.encode(x)])                      # (1, codes)
        path = {name: f"{arrays}/{name}_{row[0]}.npy" for name in numbers}
        for name, x in numbers.items():
            np.save(out / path[name], x)
        line = {"raw_task": item.raw_task, "task": item.task,
                "image": [f"{images}/{view}_{row[0]}.jpg" for view in AGILEX_VIEWS],
                **{f"action_{kind}_token": path.get(f"action_{kind}_token") for kind in kinds},
                **{part: {kind: path[f"{part}_{kind}"] for kind in kinds} for part in ("state", "action")},
                "conversations": talk}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines[done:]


def check_talk(talk, where):
    """The gpt's texts in [{"from": "human", "value": text}, {"from": "gpt", "value": text}, ...]; an odd
    number of turns begins with the system's. Anything else is a ValueError."""
    good = isinstance(talk, list) and all(isinstance(turn, dict) and isinstance(turn.get("value"), str)
                                          for turn in talk)
    turns = talk[len(talk) % 2:] if good else []
    if not turns or [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"{where}: conversations: human and gpt in turn are wanted, gpt last, each with a "
                         f"text as its value, found {' '.join(repr(talk)[:80].split())}.")
    return [turn["value"] for turn in turns[1::2]]


def training_picture(image):
    """A PIL picture -> uint8 (h, w, 3) as the official training makes it: of 32^2 to 768^2 pixels, sides of
    at least 28, none 200 times the other. (Coordinates in answers stay as they were, also officially.)"""
    (w, h), bound = image.size, 768 * 768
    if not 32 * 32 <= w * h <= bound:
        scale = math.sqrt((bound if w * h > bound else 32 * 32) / (w * h))
        image = image.resize((max(1, int(w * scale)), max(1, int(h * scale))))
    image = image.convert("RGB")
    w, h = (max(side, 28) for side in image.size)
    w, h = 180 * h if w > 200 * h else w, 180 * w if h > 200 * w else h
    return np.array(image if (w, h) == image.size else image.resize((w, h), Image.Resampling.NEAREST))


class RoboBrain(Samples):
    """An official JSONL, or a folder of WebDataset's shards (*.tar): [i] is the sample of row i.

    It has conversations, dataset, and images if there are any, called as `views` if these are as many, else
    "0", "1", ... A row that teaches actions (<action_token>) has what other methods read, too: instruction,
    subtask, state, actions; or action_codes (lists of FAST+'s) if it names no actions, or with codes=file. If
    it names neither, the model learns a sentence (robobrain_x0.answer_ids).

    Options: action=eepose | qpos; codes=file; stats=FILE, official (else *stat*.json beside it, else they are
    computed); root=DIR of what is not at its absolute path (else its folder); name, val, weight: `Recorded`.
    All rows are read once, to find what is wrong. Rows of one folder of pictures: on one side of the split.
    horizon=None: any; noted: a list for damaged rows, else they are an error.
    """
    FORM, PART, UNIT = "RoboBrain-X0's sets", "row", "samples"
    OPTIONS = {"action": "eepose", "codes": "", "stats": "", "root": "", "name": "", "val": "20",
               "weight": "1"}
    state, views, told = "state", {}, {}

    def __init__(self, root, split="train", horizon=8, history=1, views=(), cache=None, episodes=None,
                 points=False, options={}, noted=None):
        path, self.names, self.horizon = Path(root).expanduser().resolve(), views, horizon
        self.noted = noted
        self.open = Opened(partial(open, mode="rb"))
        self.options = o = self.OPTIONS | options
        for key in options:
            choose(f"{path}: there is no option", key, self.OPTIONS)
        for key, known in (("action", ("eepose", "qpos")), ("codes", ("", "file"))):
            choose(f"{path}: {key}: there is no", o[key], known)
        self.files = [path] if path.suffix == ".jsonl" and path.is_file() else sorted(path.rglob("*.tar"))
        if not self.files or not o["val"].isdecimal():
            raise ValueError(f"{path}, val={o['val']}: give a .jsonl file or a folder of .tar shards, and a "
                             "number, 0 for no validation.")
        self.folder, self.action = path if path.is_dir() else path.parent, f"action.{o['action']}"
        self.root = Path(o["root"] or self.folder).expanduser().resolve()
        self.name = o["name"] or (path.parent.name if path.stem == "train" else path.stem)
        rows, val = [], int(o["val"])
        for place in tqdm(self.scan(), str(path), unit="row", disable=rank_info()[0] > 0 or None):
            with _noted(noted):
                row, _ = self.row(place)
                named = [bool(row["asks"]) and self.named(row, part) is not None for part in ("action", None)]
                of = PurePosixPath(str(row["image"][0])).parent if any(named) and row["image"] else row
                rows.append((*place, *named, zlib.crc32(repr(of).encode(errors="replace"))))
        self.damaged = () if noted is None else noted
        rows, about = np.array(rows, np.int64).reshape(-1, 11), path.with_name("built_from.json")
        about = read_json(about) if path.name == "train.jsonl" and about.is_file() else {}
        if len(rows) + len(self.damaged) != (wanted := about.get("samples", len(rows) + len(self.damaged))):
            raise ValueError(f"{path} holds {len(rows)} samples of {wanted}; run robobrain-process again: it "
                             "goes on where it was interrupted.")
        self.rows = rows[(rows[:, 10] % max(1, val) == val - 1) == (split == "val")][:episodes]
        self.kept, self.stats = set(self.rows[:, 10].tolist()), {}
        with _noted(noted):
            if split == "train" and self.rows[:, 8:10].any():
                self.stats = {self.name: self._stats()}

    def scan(self):
        """Yield every row's place: file, number in it; byte and size of its JSON, pictures, other fields."""
        for f, path in enumerate(self.files):
            if path.suffix == ".tar":
                with _noted(self.noted):
                    yield from ((f, *place) for place in _shard(path))
                continue
            with _layout(path, self.FORM), open(path, "rb") as file:
                for number, raw in enumerate(file, 1):
                    yield f, number, file.tell() - len(raw), len(raw), 0, 0, 0, 0

    def facts(self):
        """Yield its form, files, and how many rows name actions or their codes."""
        acts, codes = self.rows[:, 8:10].sum(0)
        yield (f"RoboBrain-X0's {self.files[0].suffix[1:]}, {len(self.files)} files, {len(self.kept)} "
               f"recordings or texts; {acts} rows name {self.action}, {codes} its codes")

    def row(self, place):
        """(a row as in the JSONL; where it is). image is a list; asks: the set of how many <action_token> an
        answer has, of those that have any."""
        (f, number, *spans), raw = place, []
        tar = self.files[f].suffix == ".tar"
        where = f"{self.files[f]}, {'sample' if tar else 'line'} {number}"
        file = self.open(self.files[f])
        for at, size in zip(spans[::2], spans[1::2]):
            file.seek(at)
            raw.append(file.read(size))
        try:
            row = json.loads(raw[0])
            if tar:
                row = json.loads(raw[2] or "{}") | (row if isinstance(row, dict) else {"conversations": row})
                row["image"] = raw[1] and ArrayUnpickler(io.BytesIO(raw[1])).load()
            talk = [{"from": turn.get("from", turn.get("role")),
                     "value": turn.get("value", turn.get("content"))} for turn in row["conversations"]]
        except Exception as e:                                 # a pickle can be torn in every way there is
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            raise ValueError(f"{where} is torn, or not as in {self.FORM}: {reason}. Copy it again.") from None
        answers, asked = check_talk(talk, where), "".join(turn["value"] for turn in talk[len(talk) % 2::2])
        images = row.get("image") or []
        images = images if isinstance(images, list) else [images]
        if asked.count("<image>") != len(images) or "<video>" in asked:
            raise ValueError(f"{where}: {len(images)} pictures, but its text has {asked.count('<image>')}, "
                             f"and {asked.count('<video>')} videos, which cannot be read.")
        asks = {n for answer in answers if (n := answer.count("<action_token>"))}
        return row | {"image": images, "conversations": talk, "asks": asks}, where

    def named(self, row, part=None):
        """What a row names as its actions' codes, or as its `part` (action, state): a list, or None."""
        found = row.get(f"{self.action.replace('.', '_')}_token")
        found = (row.get(part) or {}).get(self.options["action"]) if part else found
        return [found] if isinstance(found, str) or found and isinstance(found[0], int) else found or None

    def numbers(self, row, where, part=None):
        """These, read: a list of arrays."""
        out = []
        for x in self.named(row, part) or ():
            if isinstance(x, str):
                with _layout(path := _below(self.root, x, where), self.FORM):
                    x = np.load(path)
                    if not np.isfinite(x).all():
                        raise ValueError("not all its numbers are finite")
            out.append(np.asarray(x))
        return out

    def _stats(self):
        given = self.options["stats"]
        for path in [Path(given)] if given else sorted(self.folder.glob("*stat*.json"))[:1]:
            found = read_json(path)
            for entry in (found.get(self.action), found.get(f"{self.action}.delta"), found.get(self.name)):
                if isinstance(entry, dict) and "quantiles_low_" in entry:
                    return {"action": {"q01": entry["quantiles_low_"], "q99": entry.get("quantiles_high_")}}
                if isinstance(entry, dict) and "action" in entry:
                    return entry
            raise ValueError(f"{path} has no statistics of {self.action}, only of {', '.join(found)}.")
        statistics = ActionStatistics()
        for place in tqdm(self.rows[self.rows[:, 8] > 0].tolist(), f"{self.name}: statistics", disable=None):
            statistics.add(np.concatenate(self.numbers(*self.row(place[:8]), "action")))
        if not statistics.actions:
            raise ValueError(f"{self.folder}: rows name codes, no actions, and no statistics tell what these "
                             "stand for. Put the official file (*stat*.json) there, or name it: stats=FILE.")
        return statistics.result()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.place(index)
        row, where = self.row(self.rows[index, :8].tolist())
        pictures = [self.picture(image, where) for image in row["image"]]
        names = self.names if len(self.names) == len(pictures) else map(str, range(len(pictures)))
        sample = {"conversations": row["conversations"], "dataset": self.name}
        sample |= {"images": dict(zip(names, pictures))} if pictures else {}
        coded = self.named(row) and (self.options["codes"] or not self.named(row, "action"))
        found = self.numbers(row, where, None if coded else "action") if row["asks"] else []
        if found and coded:
            sample["action_codes"] = [np.ravel(x).tolist() for x in found]
            ids = list(itertools.chain(*sample["action_codes"]))
            n, sound = len(found), set(map(type, ids)) == {int} and 0 <= min(ids) <= max(ids) < 2048
        elif found:
            sample["actions"] = np.concatenate(found, dtype=np.float32)
            T = self.horizon or len(sample["actions"]) / max(row["asks"])
            n, sound, state = len(sample["actions"]) / T, True, self.numbers(row, where, "state")
            sample |= {"loss_mask": np.ones(len(sample["actions"]), bool), "instruction": row.get("raw_task"),
                       "subtask": row.get("task"), "state": np.float32(state[0][0] if state else [0])}
        if found and not (sound and row["asks"] == {n}):
            raise ValueError(f"{where}: a chunk per <action_token> is wanted, of the model's horizon "
                             f"{self.horizon} or of codes 0 .. 2047: {row['asks']}, found {n:g}.")
        return sample

    def picture(self, image, where):
        """A picture of a row, by its path (or, in shards, the file), as `training_picture` makes it."""
        inside = isinstance(image, bytes)
        path = Path(where) if inside else _below(self.root, image, where)
        with _layout(path, self.FORM), Image.open(io.BytesIO(image) if inside else path) as file:
            return training_picture(file)


def _shard(path):
    """Yield the samples of a WebDataset shard: number; byte and size of .json, .jpgs, .metadata."""
    kinds, found, why = ("json", "jpgs", "metadata"), {}, "the two empty blocks at its end are missing"
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                if member.isfile() and kind in kinds:
                    found.setdefault((folder, key), {})[kind] = (member.offset_data, member.size)
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            whole = file.read(1024) == bytes(1024)
    except (tarfile.TarError, OSError, EOFError) as e:
        whole, why = False, str(e)
    if not whole:
        raise ValueError(f"{path} is cut off, or no plain tar file: {why}. Copy it again.")
    for number, (key, parts) in enumerate(found.items()):
        if "json" not in parts:
            raise ValueError(f"{path}: sample {'/'.join(key)} has no .json. Make the shard anew.")
        yield number, *itertools.chain(*(parts.get(kind, (0, 0)) for kind in kinds))


# ---- Recorded episodes: what LeRobot's and LIBERO's forms share --------------------------------------------
# --data lerobot=DIR, libero=, calvin=, rlds=, or DIR alone; or several: lerobot=DIR,weight=2+libero=DIR2
#   weight=2                      each frame is drawn twice in an epoch (0.1: every tenth)
#   third=, state=, action=       which column; else USUAL's names in order, then the cameras in the set's
#   name=, embodiment=            the unnorm_key (else the folder's name); the samples' `embodiment`
#   gripper=openvla               the last number g becomes 1 - clip(g, 0, 1): 1 = open, of LIBERO's -1 = open
#                                 (CALVIN's is 1 = open: it becomes clip(g, 0, 1))
#   gripper=none                  no number is a gripper's. (Else the last is, if always in [-1, 1]: it is not
#                                 normalized.)
#   val=20                        every 20th episode validates (0: none)
#   damaged=skip                  damaged episodes are left out; else they are an error
#   rotate=0, noops=keep          LIBERO: pictures as stored; also the steps without a command

USUAL = {"action": ("action", "actions"), "state": ("observation.state", "state"),
         "third": ("image", "image_0", "agentview_rgb", "top", "front", "cam_high", "exterior_image_1_left",
                   "rgb_static"),
         "wrist": ("wrist_image", "image2", "eye_in_hand_rgb", "wrist", "hand", "cam_right_wrist",
                   "rgb_gripper")}
FRAMES = 64                    # files that a worker keeps open, each with its decoder
TABLE = 2                      # version of the table in the cache; who changes what it holds raises it
TOLERANCE = 1e-4               # s; a frame that far from its time is another one (official: tolerance_s)


class Opened:
    """open(*what), for the last `most` of them not done anew.

    A fork gets none of its parent's: they are neither read nor closed there, since no decoder survives that.
    """

    def __init__(self, open, most=FRAMES):
        self.open, self.most, self.files = open, most, {}

    def __getstate__(self):
        return self.__dict__ | {"files": {}}

    def __call__(self, *what):
        mine = self.files.setdefault(os.getpid(), {})
        file = mine.pop(what) if what in mine else self.open(*what)
        while len(mine) >= self.most:
            mine.pop(next(iter(mine)))
        mine[what] = file                                      # the last in order
        return file


class Recorded(Samples):
    """Recorded episodes: [i] is the sample of frame i; stats: {name: {"action": {...}}} of these episodes.

    horizon: actions from a frame on; beyond the episode's end, the last again, not counted (loss_mask).
    history: frames shown, with those before. views: {view: camera} is chosen among the set's; (): all.
    points: samples without actions, if there are waypoints (for a0). One pass over all rows makes a table and
    the statistics, kept in the cache for as long as no file changes. damaged: [(episode, why), ...].

    A subclass finds episodes, files, tasks, cameras (`find`); reads rows (`scan`: number, and columns or why
    not) and pictures (`pictures`); `check` looks for damage that a pass over the rows does not see.
    """
    OPTIONS = {"action": "", "state": "", "name": "", "embodiment": "", "gripper": "", "val": "20",
               "damaged": "", "weight": "1"}
    told = {}
    OPENING = -1                           # the gripper's command that opens it, for gripper=openvla

    def __init__(self, root, split="train", horizon=8, history=1, views=(), cache=None, episodes=None,
                 points=False, options={}):
        self.root, self.horizon, self.history = Path(root).expanduser().resolve(), horizon, history
        self.options = o = self.OPTIONS | options
        for key in options:
            choose(f"{self.root}: there is no option", key, [*self.OPTIONS, *views])
        for key, known in (("gripper", ("", "openvla", "none")), ("damaged", ("", "skip"))):
            choose(f"{self.root}: {key}: there is no", o[key], known)
        if not o.get("val", "0").isdecimal():
            raise ValueError(f"{self.root}: val={o['val']!r}: a number is wanted, 0 for none.")
        self.name, self.views, val = o["name"] or self.root.name, dict.fromkeys(views), int(o.get("val", 0))
        self.columns, self.split = [], split
        self.find()
        self.chosen = [i for i in range(len(self.episodes)) if "val" not in o
                       or (val > 0 and i % val == val - 1) == (split == "val")][:episodes]
        self.table, self.kept, self.damaged, self.stats = Opened(_open_table, 1), [], [], {}
        if self.chosen:
            self._index(cache)
        self.at = np.cumsum([0] + [n for _, n in self.kept])
        self.points = points and "waypoints" in self.columns

    def choose_columns(self, columns, cameras):
        """Find action, state and the views among the names there are: as asked for, else by USUAL."""
        self.action, self.state = (self._column(key, columns, columns) for key in ("action", "state"))
        if not self.action:
            raise ValueError(f"{self.root}: no action ({', '.join(USUAL['action'])}) among {columns}. Name "
                             "the column: --data ...=DIR,action=COLUMN.")
        self.choose_views(cameras)

    def _column(self, what, known, short):
        if asked := self.options.get(what):
            choose(f"{self.root}: {what}: there is no column", asked, known)
        usual = (what, *USUAL.get(what, ()))
        return asked or next((known[short.index(name)] for name in usual if name in short), None)

    def choose_views(self, cameras):
        """Find each view's camera: as asked for, by USUAL, in order. No views are asked for: all."""
        short = [re.sub(r"^observation\.(images\.)?", "", key) for key in cameras]
        found = {view: self._column(view, cameras, short) for view in self.views}
        left = [key for key in cameras if key not in found.values()]
        self.views = ({view: key or (left.pop(0) if left else None) for view, key in found.items()}
                      or dict(zip(short, cameras)))
        if None in self.views.values():
            raise ValueError(f"{self.root}: cameras {cameras}, views wanted {list(found)}. Choose the "
                             "model's views (--set views=third), or a camera: --data ...=DIR,wrist=CAMERA.")

    def _index(self, cache):
        """Read every row once, or what an earlier run kept in the cache."""
        base = Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "plainvla").expanduser()
        marks = [(str(path), *_mark(path)) for path in self.files]
        options = {key: x for key, x in self.options.items() if key != "weight"}
        about = json.dumps([TABLE, str(self.root), options, self.views, self.chosen, marks])
        path = base / f"{self.root.name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.safetensors"
        self.path = path
        try:
            base.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"--cache {base} cannot be used ({e.strerror}); give another folder.") from e
        with _one_at_a_time(base / ".recorded.lock"):
            if not path.exists():
                atomic_write(path, self._write_table)
        try:
            facts = json.loads(self.table(path).metadata()["recorded"])
            self.kept, self.damaged, self.stats = facts["kept"], facts["damaged"], facts["stats"]
            self.columns, self.tasks = facts["columns"], facts.get("tasks", self.tasks)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as e:
            raise _torn(path, e) from None
        if self.damaged and self.options["damaged"] != "skip":
            path.unlink(missing_ok=True)                       # it may be mended when it is asked for again
            raise ValueError(f"{self.root}: {len(self.damaged)} of {len(self.chosen)} episodes are damaged: "
                             f"{self.damaged[0][1].rstrip('.')}. python data.py {self.root} lists them all; "
                             "damaged=skip leaves them out.")

    def _write_table(self, path):
        kept, damaged, parts, statistics, like = [], [], {}, ActionStatistics(), {}
        for number, found in self.scan():
            if not isinstance(found, str):
                try:
                    for name, key in (("actions", "A"), ("state", "S")):
                        shape = ("n", like.setdefault(name, found[name].shape[-1]) or key)
                        _check_array(f"{self.where(number)}: {name}", found[name], np.float32, shape)
                    if self.options["gripper"] == "openvla":
                        g = found["actions"][:, -1].clip(0, 1)
                        found["actions"][:, -1] = g if self.OPENING == 1 else 1 - g
                except ValueError as e:
                    found = str(e)
            if isinstance(found, str):
                damaged.append([number, found])
                continue
            kept.append([number, len(found["actions"])])
            statistics.add(found["actions"])
            for name, x in found.items():
                parts.setdefault(name, []).append(x)
        tensors, stats = {name: np.concatenate(x) for name, x in parts.items()}, {}
        if kept:
            last = tensors["actions"][:, -1]
            gripper = self.options["gripper"] != "none" and (self.OPENING == 1 or np.abs(last).max() <= 1)
            stats = {self.name: statistics.result([True] * (tensors["actions"].shape[1] - 1) + [not gripper])}
        facts = {"kept": kept, "damaged": damaged, "stats": stats, "columns": list(tensors),
                 "tasks": self.tasks}
        save_file(tensors or {"actions": np.zeros((0, 1), np.float32)}, path, {"recorded": json.dumps(facts)})

    def __getitem__(self, index):
        """The index-th frame. With damaged=skip, where one of its pictures turns out damaged: the first frame
        of the next episode that is whole, and a warning."""
        episode, damage = self.place(index)[0], None
        for e in range(episode, episode + len(self.kept)):
            try:
                return self._sample(int(self.at[e % len(self.kept)]) if damage else index)
            except ValueError as why:
                if self.options["damaged"] != "skip":
                    raise
                damage = why
                warnings.warn(f"{why}; damaged=skip shows another episode's first frame", stacklevel=2)
        raise damage

    def _sample(self, index):
        e, _ = self.place(index)
        start, end = int(self.at[e]), int(self.at[e + 1])
        first, T, n = max(start, index - self.history + 1), self.horizon, min(self.horizon, end - index)
        rows = self._rows(first, index + n)                                # from the oldest frame shown
        shown = {name: x[:index - first + 1] for name, x in rows.items()}
        actions = np.concatenate([rows["actions"], rows["actions"][-1:].repeat(T - n, 0)])
        number, W = self.kept[e][0], index - first + 1
        pictures = {view: self.pictures(number, shown, key) for view, key in self.views.items()}
        sample = {**_newest(pictures, actions, W), "loss_mask": np.arange(T) < n, "state": shown["state"][-1],
                  "instruction": self.tasks[int(shown["task"][-1])], "dataset": self.name}
        if "waypoints" in rows:
            sample["waypoints"] = shown["waypoints"][-1].reshape(5, 2)
        if self.options["embodiment"]:
            sample["embodiment"] = self.options["embodiment"]
        return {k: x for k, x in sample.items() if not (self.points and k in ("actions", "loss_mask"))}

    def _rows(self, start, end):
        """Rows start .. end-1 of the table, all columns."""
        table = self.table(self.path)
        return {name: table.get_slice(name)[start:end] for name in self.columns}

    def recording(self, episode):
        """The whole of the episode-th episode here: instruction, images {view: (n, h, w, 3)}, actions, ..."""
        (number, n), start = self.kept[episode], int(self.at[episode])
        rows = self._rows(start, start + n)
        return {**rows, "instruction": self.tasks[int(rows["task"][0])],
                "images": {view: self.pictures(number, rows, key) for view, key in self.views.items()}}

    def unreadable(self, number, i, cameras):
        """What is wrong with a picture of the i-th episode here, or ""."""
        try:
            for key in cameras:
                x = self.pictures(number, self._rows(int(self.at[i]), int(self.at[i + 1])), key)
                _check_array(f"{self.where(number)}: {key}", x, np.uint8, ("n", "h", "w", 3))
        except ValueError as e:
            return str(e)
        return ""

    def check(self):
        """Yield (episode, why): pictures that do not open."""
        for i, (number, _) in enumerate(tqdm(self.kept, "pictures", disable=None)):
            if why := self.unreadable(number, i, self.views.values()):
                yield number, why

    def whole(self, damaged):
        """(first index, beyond the last) of each episode that is not damaged."""
        spans = zip(self.at, self.at[1:])
        return [span for span, (number, _) in zip(spans, self.kept) if number not in damaged]


def _open_table(path):
    return safe_open(path, "np")


def _mark(path):
    try:
        return (about := path.stat()).st_size, about.st_mtime_ns
    except OSError:
        return ()


# ---- LeRobot v2.0, v2.1, v3.0: read ------------------------------------------------------------------------
#   meta/info.json                             version, fps, features, the names of the files below
#   meta/tasks.jsonl      v3.0: .parquet       a task's number and text
#   meta/episodes.jsonl   v3.0: */*.parquet    an episode's length; v3.0: where it is in files of many
#   data/**/*.parquet                          a row per frame; a picture of dtype "image" is in it
#   videos/**/*.mp4                            pictures of dtype "video", found by their time
# meta/stats.json is not read: its quantiles are means of each episode's, and no quantiles of the whole.

class LeRobot(Recorded):
    """A LeRobot folder as samples; see `Recorded`."""
    FORM = "LeRobot v2.0, v2.1 or v3.0"

    def find(self):
        """Read meta: features, tasks, episodes, their files. ValueError: another version, no episode."""
        path = self.root / "meta" / "info.json"
        self.about = read_json(path)
        with _layout(path, self.FORM):
            self.version, self.fps = self.about["codebase_version"], float(self.about["fps"])
            self.kinds = {key: about["dtype"] for key, about in self.about["features"].items()}
            if self.version not in ("v2.0", "v2.1", "v3.0") or not 0 < self.fps < 1e4:
                raise ValueError(f"{path}: version {self.version!r}, fps {self.fps:g}; {self.FORM} is read. "
                                 "Convert it with lerobot's own scripts.")
        cameras = [key for key, kind in self.kinds.items() if kind in ("video", "image")]
        self.choose_columns([key for key in self.kinds if key not in cameras], cameras)
        self.data_files, self.videos = Opened(_open_parquet), Opened(Video)
        self.groups = Opened(self._group, 4)
        for module in ("pyarrow.parquet", "av") if "video" in self.kinds.values() else ("pyarrow.parquet",):
            _optional(module, self.root)
        self.tasks = self._tasks()
        with _layout(path, self.FORM):
            self.episodes = self._episodes()
        if not self.episodes:
            raise ValueError(f"{self.root}: meta lists no episodes. Copy the folder again.")
        used = {file: 0 for e in self.episodes for file in (e["data"], *(v[0] for v in e["videos"].values()))}
        self.files = [*sorted((self.root / "meta").rglob("*.*")), *used]

    def _tasks(self):
        old, pq = self.version < "v3", _optional("pyarrow.parquet", self.root)
        with _layout(path := self.root / "meta" / ("tasks.jsonl" if old else "tasks.parquet"), self.FORM):
            rows = _json_lines(path) if old else pq.read_table(path).to_pylist()
            # the text is pandas' index: its column is called __index_level_0__, or task
            texts = {row.pop("task_index"): next(iter(row.values()), "") for row in rows}
        return [texts.get(i, "") for i in range(max(texts, default=-1) + 1)]

    def _episodes(self):
        """A dict each: index, length, data (file), videos {camera: (file, from [s], to or None)}."""
        about, videos = self.about, [key for key in self.views.values() if self.kinds[key] == "video"]
        if self.version < "v3":
            with _layout(path := self.root / "meta" / "episodes.jsonl", self.FORM):
                rows, per = _json_lines(path), about["chunks_size"]
            named = [({}, {"episode_chunk": row["episode_index"] // per} | row) for row in rows]
        else:
            wanted = ["data/chunk_index", "data/file_index"]
            each = [f"videos/{key}/{x}" for key in videos
                    for x in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
            named, pq = [], _optional("pyarrow.parquet", self.root)
            for path in sorted((self.root / "meta" / "episodes").glob("*/*.parquet")):
                with _layout(path, self.FORM):
                    table = pq.read_table(path, columns=["episode_index", "length", *wanted, *each])
                    rows = table.to_pylist()
                named += [(row, {key[5:]: row[key] for key in wanted} | row) for row in rows]
        found = []
        for row, names in sorted(named, key=lambda one: one[1]["episode_index"]):
            e = {"index": names["episode_index"], "length": int(names["length"]), "videos": {},
                 "data": self.root / about["data_path"].format(**names)}
            for key in videos:
                at = {x: row.get(f"videos/{key}/{x}") for x in ("chunk_index", "file_index")}
                path = self.root / about["video_path"].format(**names | at, video_key=key)
                span = (row.get(f"videos/{key}/{x}_timestamp") for x in ("from", "to"))
                e["videos"][key] = (path, *span)
            found.append(e)
        return found

    def where(self, number):
        """The file and episode that `number` is."""
        return f"{self.episodes[number]['data']}, episode {self.episodes[number]['index']}"

    def scan(self):
        """Yield (number, the episode's columns or what is wrong with it)."""
        files = {}
        for number in self.chosen:
            files.setdefault(self.episodes[number]["data"], []).append(number)
        for path, numbers in tqdm(files.items(), f"{self.name}: rows", unit="file", disable=None):
            try:
                rows = self._read(path)
            except ValueError as e:
                yield from ((number, str(e)) for number in numbers)
                continue
            for number in numbers:
                yield number, self._take(number, rows)

    def _read(self, path):
        """The columns of a file, sorted by episode and frame: neither the order of rows is to be trusted."""
        wanted = {"actions": self.action, "state": self.state, "episode": "episode_index",
                  "frame": "frame_index", "time": "timestamp", "task": "task_index"}
        if self.about["features"].get("waypoints", {}).get("shape") == [10]:
            wanted["waypoints"] = "waypoints"
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        with _layout(path, self.FORM):
            file, _ = self.data_files(path)
            missing = [key for key in wanted.values() if key and key not in file.schema_arrow.names]
            if missing:
                raise ValueError(f"{path} has no column {missing[0]!r}, only {file.schema_arrow.names}")
            table = file.read([key for key in wanted.values() if key])
            rows = {name: _numbers(table[key], key) for name, key in wanted.items() if key}
            order = np.lexsort((rows["frame"], rows["episode"]))
            rows.setdefault("state", np.zeros(len(order)))
            for name in {"actions", "state", "waypoints"} & set(rows):
                rows[name] = rows[name].reshape(len(order), -1).astype(np.float32)
        return {name: x[order] for name, x in rows.items()} | {"row": order}

    def _take(self, number, rows):
        """An episode's columns out of its file's, or what is wrong with it."""
        e = self.episodes[number]
        start, end = np.searchsorted(rows["episode"], [e["index"], e["index"] + 1])
        found = {name: rows[name][start:end] for name in rows if name not in ("episode", "frame")}
        if end - start != e["length"] or (rows["frame"][start:end] != np.arange(end - start)).any():
            return f"{self.where(number)} has {end - start} rows, wanted frames 0 .. {e['length'] - 1} once"
        if not all(0 <= task < len(self.tasks) and is_text(self.tasks[task]) for task in set(found["task"])):
            return f"{self.where(number)}: a row's task_index has no text in meta/tasks"
        late = np.abs(found["time"] - np.arange(end - start) / self.fps).max(initial=0)
        if e["videos"] and late > 0.5 / self.fps:
            return f"{self.where(number)}: timestamps are up to {late:.3f} s off frame / fps ({self.fps:g})"
        for path, start, end in e["videos"].values():
            if not path.is_file():
                return f"{path} is missing"
            try:
                last = self.videos(path, self.fps).end
            except ValueError as error:
                return str(error)
            if last < (start or 0) + (e["length"] - 0.5) / self.fps:
                return f"{path}, episode {e['index']}: the video ends at {last:.3f} s, before the rows do"
            if end is not None and abs((end - start) * self.fps - e["length"]) > 0.5:
                return (f"{path}, episode {e['index']}: {end - start:.3f} s for {e['length']} frames, but "
                        f"info.json's fps is {self.fps:g}")
        return found

    def pictures(self, number, rows, key):
        """One camera at these rows: (n, h, w, 3) uint8, decoded from its mp4 or the parquet file."""
        e = self.episodes[number]
        if self.kinds[key] == "video":
            path, start, _ = e["videos"][key]
            return self.videos(path, self.fps).at((start or 0.0) + rows["time"].astype(np.float64))
        with _layout(e["data"], self.FORM):
            starts, found = self.data_files(e["data"])[1], []
            for row in rows["row"].tolist():
                group = int(np.searchsorted(starts, row, side="right")) - 1
                cell = self.groups(e["data"], group, key)[row - int(starts[group])].as_py()
                with Image.open(io.BytesIO(cell["bytes"])) as picture:
                    found.append(np.array(picture.convert("RGB")))
            return np.stack(found)

    def _group(self, path, group, key):
        return self.data_files(path)[0].read_row_group(group, columns=[key])[key]

    def check(self):
        """Yield (episode, why): videos that are torn, short, or of another fps; pictures that do not open."""
        needed, half = {}, 0.5 / self.fps
        for i, (number, _) in enumerate(self.kept):
            for path, start, _ in self.episodes[number]["videos"].values():
                needed.setdefault(path, []).append((number, i, start or 0))
        for path, uses in tqdm(needed.items(), "videos", disable=None):
            try:
                video = self.videos(path, self.fps)
                times, most = np.append(video.times(), math.inf), max(TOLERANCE, video.stream.time_base)
            except ValueError as e:
                yield from ((number, str(e)) for number, *_ in uses)
                continue
            for number, i, start in uses:                      # as Video.at looks for them
                t = start + self._rows(int(self.at[i]), int(self.at[i + 1]))["time"].astype(np.float64)
                far = np.abs(times[np.searchsorted(times, t - half)] - t) > most
                if far.any():
                    yield number, f"{path}: no frame at {t[far][0]:.4f} s, of episode {number}"
        inside = [key for key in self.views.values() if self.kinds[key] == "image"]
        for i, (number, n) in enumerate(self.kept if inside else ()):
            if why := self.unreadable(number, i, inside):
                yield number, why

    def facts(self):
        """Yield version, robot, fps and features, as info.json says."""
        yield f"LeRobot {self.version}, robot {self.about.get('robot_type')}, {self.fps:g} frames per second"
        for key, about in self.about["features"].items():
            yield f"feature {key}: {about['dtype']} {about.get('shape')} {about.get('names') or ''}"


def _json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _open_parquet(path):
    """The file, and the first row of each row group."""
    file = _optional("pyarrow.parquet", path).ParquetFile(path)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return file, np.cumsum([0, *sizes])[:-1]


def _numbers(column, name):
    """A column of numbers or of lists of n -> (rows,) or (rows, n)."""
    import pyarrow as pa
    import pyarrow.compute as pc
    rows, x = len(column), column.combine_chunks()
    x = pa.concat_arrays(x.chunks) if isinstance(x, pa.ChunkedArray) else x
    if pa.types.is_nested(x.type):
        if x.null_count or len(pc.list_value_length(x).unique()) != 1:
            raise ValueError(f"column {name}: rows of several lengths, or empty ones")
        x = x.flatten()
    if x.null_count:
        raise ValueError(f"column {name}: {x.null_count} numbers are missing")
    x = x.to_numpy(zero_copy_only=False)
    return x if len(x) == rows else x.reshape(rows, -1)


class Video:
    """An open mp4: at(times) gives its frames. A ValueError names the file: torn, too short, another fps.

    fps: what it has to be; None: as it is.
    """

    def __init__(self, path, fps=None):
        self.path = path
        with _layout(path, "an mp4"):
            self.file = _optional("av", path).open(str(path))
            self.stream = self.file.streams.video[0]
            self.stream.codec_context.thread_count = 1         # the workers are the threads
            rate, length = float(self.stream.average_rate), self.stream.duration
            ticks = (self.stream.start_time or 0) + (length or math.inf)
            self.end, self.fps = float(self.stream.time_base) * ticks, fps or rate
        if abs(rate - self.fps) > 0.01 * self.fps:
            raise ValueError(f"{path} has {rate:g} frames per second, info.json's fps is {fps:g}: its frames "
                             "do not belong to the rows. Convert the video, or correct the fps.")

    def at(self, times):
        """The frames at these times [s], ascending: (n, h, w, 3) uint8, RGB."""
        pictures, decoded, last = [], None, math.inf
        with _layout(self.path, "an mp4"):
            for t in times.tolist():
                if not 0 < t - last < 8 / self.fps:            # far from the last: go there by the index
                    self.file.seek(round(t / self.stream.time_base), stream=self.stream)
                    decoded = self.file.decode(self.stream)
                frame = next((frame for frame in decoded if frame.time >= t - 0.5 / self.fps), None)
                if frame is None or abs(frame.time - t) > max(TOLERANCE, self.stream.time_base):
                    found = "it ends before" if frame is None else f"the nearest is at {frame.time:.4f} s"
                    raise ValueError(f"{self.path}: no frame at {t:.4f} s, {found}. Copy the video again.")
                pictures.append(frame.to_ndarray(format="rgb24"))
                last = frame.time
        return np.stack(pictures)

    def times(self):
        """When its frames are shown [s], ascending, (n,): of those in the file, whatever its header says."""
        with _layout(self.path, "an mp4"):
            self.file.seek(0, stream=self.stream)
            shown = [packet.pts for packet in self.file.demux(self.stream) if packet.pts is not None]
            return np.sort(np.array(shown, np.float64)) * float(self.stream.time_base)


# ---- LIBERO's HDF5: read -----------------------------------------------------------------------------------
#   SUITE/TASK_demo.hdf5: data/demo_7/actions, obs/agentview_rgb, eye_in_hand_rgb, ee_states, gripper_states
# Pictures are stored upside down, against every released checkpoint and every other form: turned by 180
# degrees here. The task is the file's name without its scene, as in the released sets. A step without a
# command (no-op) is left out; those sets are then rendered anew, and without the demonstrations that fail.

class Libero(Recorded):
    """LIBERO's files as samples; see `Recorded`. State: position, axis-angle, 2 gripper joints."""
    FORM = "LIBERO's HDF5"
    OPTIONS = Recorded.OPTIONS | {"rotate": "1", "noops": "drop"}

    def find(self):
        """List files, demonstrations, tasks. ValueError: none, or no pictures."""
        for key, known in (("rotate", ("0", "1")), ("noops", ("keep", "drop"))):
            choose(f"{self.root}: {key}: there is no", self.options[key], known)
        self.files = _libero_files(self.root)
        if not self.files:
            raise ValueError(f"{self.root}: no *.hdf5 in it or one folder below. Give LIBERO's folder.")
        self.open, self.episodes, self.tasks, cameras = Opened(_open_hdf5, 16), [], [], None
        for path in self.files:
            words = re.sub(r"_demo$", "", path.stem).split("_")
            scene = max([i + 1 for i, word in enumerate(words) if "SCENE" in word], default=0)
            self.tasks.append(" ".join(words[scene:]))
            try:
                demos, obs = self._demos(path)
            except ValueError as e:
                self.episodes.append({"file": path, "demo": "", "why": str(e)})
                continue
            if not cameras:                                    # agentview first
                cameras = sorted(key for key in obs if key.endswith("_rgb"))
                self.choose_columns(["actions", *obs], cameras)
            self.episodes += [{"file": path, "demo": demo, "task": len(self.tasks) - 1} for demo in demos]
        if not cameras:
            raise ValueError(self.episodes[0].get("why", f"{self.root}: no pictures in its demonstrations."))

    def _demos(self, path):
        """A file's demonstrations in order, demo_10 after demo_9, and what the first one observes."""
        with _layout(path, self.FORM):
            data = self.open(path)["data"]
            demos = sorted(data, key=lambda name: (len(name), name))
            if not demos:
                raise ValueError("it holds no demonstration")
            return demos, list(data[demos[0]]["obs"])

    def where(self, number):
        """The file and demonstration that `number` is."""
        return f"{self.episodes[number]['file']}, {self.episodes[number]['demo']}"

    def scan(self):
        """Yield (number, the demonstration's columns or what is wrong with it)."""
        for number in tqdm(self.chosen, f"{self.name}: actions", unit="demonstration", disable=None):
            e = self.episodes[number]
            try:
                yield number, e.get("why") or self._take(number, e)
            except ValueError as error:
                yield number, str(error)

    def _take(self, number, e):
        with _layout(e["file"], self.FORM):
            demo = self.open(e["file"])[f"data/{e['demo']}"]
            actions, obs = demo[self.action][:].astype(np.float32), demo["obs"]
            parts = [self.state] if self.state else [
                *(["ee_states"] if "ee_states" in obs else ["ee_pos", "ee_ori"]), "gripper_states"]
            state = np.concatenate([obs[key][:].astype(np.float32) for key in parts], 1)
            sizes = {key: len(obs[key]) for key in (*self.views.values(), *parts)}
            if set(sizes.values()) != {len(actions)}:
                return f"{self.where(number)}: {len(actions)} actions, but {sizes}"
            keep = np.flatnonzero(~no_ops(actions) | (self.options["noops"] == "keep"))
        if not len(keep):
            return f"{self.where(number)}: no step commands anything"
        return {"actions": actions[keep], "state": state[keep], "row": keep,
                "task": np.full(len(keep), e["task"])}

    def pictures(self, number, rows, key):
        """One camera at these rows: (n, h, w, 3) uint8, upright."""
        e = self.episodes[number]
        with _layout(e["file"], self.FORM):
            found = self.open(e["file"])[f"data/{e['demo']}/obs/{key}"][rows["row"]]      # (n, h, w, 3)
        return np.ascontiguousarray(found[:, ::-1, ::-1]) if self.options["rotate"] == "1" else found

    def facts(self):
        """Yield how many files there are."""
        yield f"LIBERO's HDF5, {len(self.files)} files"


def no_ops(actions):
    """Steps (n,) that command nothing: no motion in actions (n, 7), and the gripper's command as before."""
    still = np.linalg.norm(actions[:, :6], axis=1) < 1e-4
    still[1:] &= actions[1:, -1] == actions[:-1, -1]
    return still


def _open_hdf5(path):
    try:
        return _optional("h5py", path).File(path, "r")
    except BlockingIOError:
        raise ValueError(f"{path} is open elsewhere, to be written; close it there, or copy it.") from None


def _libero_files(root):
    return sorted([*root.glob("*.hdf5"), *root.glob("*/*.hdf5")])


# ---- RLDS: TensorFlow's records, read ----------------------------------------------------------------------
#   SET/1.0.0/features.json, dataset_info.json       the features of a step; how many records a file holds
#   SET/1.0.0/SET-train.tfrecord-00000-of-00002      a record is an episode: each feature's steps in a row
# --data rlds=DIR/SET; rlds=DIR,mixture=bridge_rt_1: the sets of that mixture in DIR, with its weights
#   split=train                 which of its splits
#   like=bridge_orig            what OXE says of that set; else of the set's own name; else `action` as it is
#   sets=FILE.json              more entries for OXE: {"my_robot": [third, wrist, state, action], ...}
#   action=, state=             a recipe, as in OXE
# A recipe names a step's features, one after the other: action[:6], observation/state[-1:] or just state, and
# 0; around them 1-x; clip(x): to [0, 1]; moved(x): the next step's less this one's; euler(x): of quaternions
# xyzw; zlib(x): float32, packed; binary(x), absolute(x): cogact.binarize_gripper, cogact.absolute_gripper.

RELATIVE = "world_vector rotation_delta absolute(gripper_closedness_action)"
CLOSED = "world_vector rotation_delta 1-clip(gripper_closedness_action)"
BRIDGE, SIX = "moved(observation/state[:6]) binary(action[-1:])", "action[:6] 1-clip(action[-1:])"
OXE = {    # set: third and wrist camera, state, action (7 numbers, the last 1 = open), steps that are kept
    "bridge_orig": ("image_0", "", "state[:6] 0 state[-1:]", BRIDGE, "1:-1"),
    "bridge_dataset": ("image_0", "", "state[:6] 0 state[-1:]", BRIDGE, "1:-1"),
    "bridge": ("image", "", "state[:6] 0 state[-1:]", BRIDGE.replace("binary(action[-1:])", "open_gripper"),
               "1:-1"),
    "fractal20220817_data": ("image", "", "base_pose_tool_reached gripper_closed", RELATIVE),
    "kuka": ("image", "", "zlib(clip_function_input/base_pose_tool_reached) zlib(gripper_closed)", RELATIVE),
    "taco_play": ("rgb_static", "rgb_gripper", "robot_obs[:6] 0 robot_obs[7:8]",
                  "rel_actions_world[:6] clip(rel_actions_world[-1:])"),
    "jaco_play": ("image", "image_wrist", "end_effector_cartesian_pos[:6] 0 end_effector_cartesian_pos[-1:]",
                  "world_vector 0 0 0 absolute(gripper_closedness_action)"),
    "berkeley_cable_routing": ("image", "wrist45_image", "robot_state 0", "world_vector rotation_delta 0"),
    "roboturk": ("front_rgb", "", "0 0 0 0 0 0 0 0", CLOSED),
    "viola": ("agentview_rgb", "eye_in_hand_rgb", "joint_states gripper_states", CLOSED),
    "berkeley_autolab_ur5": ("image", "hand_image", "robot_state[6:14]", RELATIVE),
    "toto": ("image", "", "state 0", "world_vector rotation_delta open_gripper"),
    "language_table": ("rgb", "", "effector_translation 0 0 0 0 0 0", "action 0 0 0 0 1-0"),
    "stanford_hydra_dataset": ("image", "wrist_image", "state[:3] state[7:10] 0 state[-3:-2]",
                               "action[:6] 1-action[-1:]"),
    "austin_buds_dataset": ("image", "wrist_image", "state[:8]", SIX),
    "austin_sailor_dataset": ("image", "wrist_image", "state", SIX),
    "austin_sirius_dataset": ("image", "wrist_image", "state", SIX),
    "utaustin_mutex": ("image", "wrist_image", "state[:8]", SIX),
    "nyu_franka_play_dataset": ("image", "", "state[-6:] 0 0", "action[-8:-2] clip(action[-2:-1])"),
    "furniture_bench_dataset": ("image", "wrist_image", "state[:7] state[-1:]",
                                "action[:3] euler(action[3:7]) 1-clip(action[-1:])"),
    "ucsd_kitchen_dataset": ("image", "", "state[:7] 0", "action[:-1]"),
    "dlr_edan_shared_control": ("image", "", "state 0", "action[:6] 1-action[-1:]"),
    "iamlab_cmu_pickup_insert": ("image", "wrist_image", "state[:8]",
                                 "action[:3] euler(action[3:7]) action[7:8]"),
    "berkeley_fanuc_manipulation": ("image", "wrist_image", "state[:6] 0 state[6:7]",
                                    "action 1-observation/state[6:7]"),
    "cmu_stretch": ("image", "", "state[:3] 0 0 0 0 state[-1:]", "action[:-1]"),
    "bc_z": ("image", "", "present/xyz present/axis_angle 0 present/sensed_close",
             "future/xyz_residual[:3] future/axis_angle_residual[:3] 1-future/target_close[:1]"),
    "fmb_dataset": ("image_side_1", "image_wrist_1", "eef_pose state_gripper_pose", "action"),
    "dobbe": ("wrist_image", "", "state", "action"),
    "custom_finetuning": ("image", "", "", "action"),
    **dict.fromkeys([f"libero_{suite}_no_noops" for suite in ("spatial", "object", "goal", "10")],
                    ("image", "wrist_image", "state", SIX))}
VERSIONS = {"bc_z": "0.1.0"}                               # its later versions are broken

# How often a set's frames are drawn, as published (openvla, prismatic/vla/datasets/rlds/oxe/mixtures.py)
SOUP = {"kuka": 0.8341046294, "bridge_orig": 1, "taco_play": 2, "jaco_play": 1, "berkeley_cable_routing": 1,
        "roboturk": 2, "viola": 2, "berkeley_autolab_ur5": 2, "toto": 1, "stanford_hydra_dataset": 2,
        "austin_buds_dataset": 1, "nyu_franka_play_dataset": 3, "furniture_bench_dataset": 0.1,
        "ucsd_kitchen_dataset": 2, "austin_sailor_dataset": 1, "austin_sirius_dataset": 1,
        "dlr_edan_shared_control": 1, "iamlab_cmu_pickup_insert": 1, "utaustin_mutex": 1,
        "berkeley_fanuc_manipulation": 2, "cmu_stretch": 1}
RT_1, EXTERNAL = "fractal20220817_data", "_converted_externally_to_rlds"
MIXTURES = {
    "bridge": {"bridge_orig": 1}, "rt_1": {RT_1: 1}, "bridge_rt_1": {"bridge_orig": 1, RT_1: 1},
    "oxe_magic_soup": {RT_1: 0.54087122203, **SOUP, "language_table": 0.1},
    "oxe_magic_soup_plus_minus": {RT_1: 1, **SOUP, "bc_z": 0.2, "fmb_dataset": 1, "dobbe": 0.2}}
TEXTS = ("language_instruction", "natural_language_instruction", "instruction")


def crc_table():
    """What a byte does to a CRC32C (Castagnoli's polynomial, reflected): (256,) uint32."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
    return table


CRC = crc_table()


def masked_crc(data, lanes=512):
    """The checksum of bytes as a TFRecord has it: CRC32C, rotated by 15 bits, plus a constant.

    Many bytes go through side by side, in lanes; beside them the 32 bits of a register that sees only zeros,
    which tell what a lane does to what came before it: registers add up (exclusive or).
    """
    x, state = np.frombuffer(data, np.uint8), 0xFFFFFFFF
    if (length := len(x) // lanes) >= 64:
        steps = np.concatenate([x[:lanes * length].reshape(lanes, length), np.zeros((32, length), np.uint8)])
        register = np.append(np.zeros(lanes, np.uint32), np.uint32(1) << np.arange(32, dtype=np.uint32))
        for step in np.ascontiguousarray(steps.T):                                       # (lanes + 32,)
            register = (register >> np.uint32(8)) ^ CRC[(register & np.uint32(255)) ^ step]
        alone, bits = register[:lanes].tolist(), register[lanes:].tolist()
        for lane in alone:
            for i in range(32):
                lane ^= bits[i] if state >> i & 1 else 0
            state = lane
        x = x[lanes * length:]
    table = CRC.tolist()
    for byte in x.tolist():
        state = state >> 8 ^ table[(state ^ byte) & 255]
    state ^= 0xFFFFFFFF
    return ((state >> 15 | state << 17) + 0xA282EAD8) & 0xFFFFFFFF


def tfrecords(buffer, path):
    """(start, end) of each record's payload in a TFRecord file's bytes. ValueError: it is torn there."""
    at, size, number = 0, len(buffer), 0
    while at < size:
        length = int.from_bytes(buffer[at:at + 8], "little")
        whole = size >= at + 16 and masked_crc(buffer[at:at + 8]) == _u32(buffer, at + 8)
        if not whole or at + 16 + length > size:
            raise ValueError(f"{path} is {'cut off' if whole else 'torn'} in record {number}, at byte {at:,} "
                             f"of {size:,}")
        yield at + 12, at + 12 + length
        at, number = at + 16 + length, number + 1


def _u32(buffer, at):
    return int.from_bytes(buffer[at:at + 4], "little")


def _varint(b, at):
    value = shift = 0
    while True:
        value, shift, at = value | (b[at] & 127) << shift, shift + 7, at + 1
        if b[at - 1] < 128:
            return value, at


def _fields(b, at, end):
    """(field number, start, end) of each field of a protocol buffer message."""
    while at < end:
        tag, at = _varint(b, at)
        length, at = _varint(b, at) if tag & 7 == 2 else (4 if tag & 7 == 5 else _varint(b, at)[1] - at, at)
        if tag & 7 not in (0, 2, 5) or at + length > end:
            raise ValueError(f"a field of {length} bytes at {at} goes beyond its message's end, {end}")
        yield tag >> 3, at, at + length
        at += length


def read_example(b, start, end):
    """A tf.train.Example at b[start:end] -> {feature: (kind, [(start, end), ...] of its values)}.

    kind 1: strings, a span each; 2: float32, 3: varints, any number of them in a span.
    """
    found = {}
    for _, *features in _fields(b, start, end):
        for _, *entry in _fields(b, *features):
            key, value = sorted(_fields(b, *entry))[:2]
            for kind, *values in _fields(b, *value[1:]):
                found[bytes(b[key[1]:key[2]]).decode()] = kind, [span[1:] for span in _fields(b, *values)]
    return found


def feature_values(b, kind, spans):
    """A feature's values: a list of bytes, float32 (n,) or int64 (n,)."""
    parts = [bytes(b[start:end]) for start, end in spans]
    if kind != 3:
        return parts if kind == 1 else np.frombuffer(b"".join(parts), "<f4")
    x = np.frombuffer(b"".join(parts), np.uint8)
    first = np.flatnonzero(np.append(True, x[:-1] < 128)[:len(x)])         # a varint ends below 128
    place = np.arange(len(x)) - first.repeat(np.diff([*first, len(x)]))
    shifted = (x & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(shifted, first).view(np.int64) if len(x) else np.zeros(0, np.int64)


def read_features(node, name=""):
    """features.json's tree -> {feature as a record names it: (dtype, shape, whether an encoded picture)}."""
    if inner := node.get("sequence"):
        return read_features(inner["feature"], name)
    if inner := node.get("featuresDict"):
        return {key: about for part, below in inner["features"].items()
                for key, about in read_features(below, f"{name}/{part}" if name else part).items()}
    about = node.get("image") or node.get("tensor") or {}
    shape = [int(n) for n in about.get("shape", {}).get("dimensions", [])]
    return {name: (about.get("dtype", "string"), shape, "image" in node)}


def quaternion_to_euler(q):
    """(n, 4) xyzw -> (n, 3) [rad]: about the fixed x, y, z axes in turn; where y is +-90 degrees, z = 0."""
    x, y, z, w = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    sin = (2 * (w * y - x * z)).clip(-1, 1)
    free = np.abs(sin) < 1 - 1e-6
    roll = np.where(free, np.arctan2(2 * (x * w + y * z), 1 - 2 * (x * x + y * y)), 2 * np.arctan2(x, w))
    yaw = np.where(free, np.arctan2(2 * (z * w + x * y), 1 - 2 * (y * y + z * z)), 0)
    return np.stack([roll, np.arcsin(sin), yaw], 1)


def _gripper(rule, x):
    import cogact
    return getattr(cogact, rule)(x[:, 0])[:, None]


RECIPES = {
    "clip": lambda x: x.clip(0, 1), "moved": lambda x: np.diff(x, axis=0, append=x[-1:]),
    "euler": quaternion_to_euler, "binary": partial(_gripper, "binarize_gripper"),
    "absolute": partial(_gripper, "absolute_gripper"),
    "zlib": lambda x: np.stack([np.frombuffer(zlib.decompress(row), "<f4") for row in x])}


def recipe_column(term, read):
    """One term of a recipe -> (n, k) float32. read(feature): (n, .), or the bytes of n steps."""
    if term.startswith("1-"):
        return 1 - recipe_column(term[2:], read)
    if called := re.fullmatch(r"(\w+)\((.+)\)", term):
        return RECIPES[called[1]](recipe_column(called[2], read))
    name, cut = re.fullmatch(r"([^\[]+)(?:\[(-?\d*:-?\d*)\])?", term).groups()
    x = read(name)
    return x if cut is None else _cut(x.T, cut).T


def _cut(x, cut):
    """x[1:-1] for "1:-1"; all of it for ""."""
    return x[slice(*(int(n) if n else None for n in (cut or ":").split(":")))]


def decode_picture(data):
    """A JPEG's or PNG's bytes -> (h, w, 3) uint8. With simplejpeg, a JPEG's pixels are TensorFlow's."""
    if data[:2] == b"\xff\xd8" and (simplejpeg := _simplejpeg()):
        return simplejpeg.decode_jpeg(data, fastdct=True)
    with Image.open(io.BytesIO(data)) as picture:
        return np.array(picture.convert("RGB"))


@cache
def _simplejpeg():
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


class Rlds(Recorded):
    """A set of tensorflow-datasets as samples; see `Recorded`. Episodes without any text are left out."""
    FORM, OPENING = "RLDS of tensorflow-datasets", 1
    OPTIONS = Recorded.OPTIONS | {"split": "train", "like": "", "sets": ""}

    @property
    def told(self):
        """What else the line about an opened set says."""
        return {"JPEG": "simplejpeg (TensorFlow's pixels)" if _simplejpeg() else (
            "pillow (up to 7 levels off TensorFlow's; pip install simplejpeg)")}

    def find(self):
        """Read features.json and dataset_info.json: features, files, records, the recipe of this set."""
        o, folder, number = self.options, self.root, r"\d+\.\d+\.\d+"
        if not (folder / "features.json").is_file():
            found = {path.parent.name: path.parent for path in folder.glob("*/features.json")}
            if not found:
                raise ValueError(f"{folder}: no features.json in it or one folder below. Of several sets, "
                                 "name one (rlds=DIR/SET), or a mixture (rlds=DIR,mixture=bridge).")
            newest = max(found, key=lambda version: [int(n) for n in re.findall(r"\d+", version)])
            if (wanted := VERSIONS.get(folder.name, newest)) not in found:
                raise ValueError(f"{folder}: found {', '.join(sorted(found))}; of this set version {wanted} "
                                 "is wanted, others are broken. Get it, or name a version's folder.")
            folder = found[wanted]
        set_name = (folder.parent if re.fullmatch(number, folder.name) else folder).name
        self.name, self.open = o["name"] or set_name, Opened(partial(open, mode="rb"))
        with _layout(path := folder / "features.json", self.FORM):
            features = read_features(read_json(path))
            self.features = {key[6:]: about for key, about in features.items() if key.startswith("steps/")}
            if not self.features:
                raise ValueError("no feature `steps`: a record is no episode")
        self._recipe(set_name.removesuffix(EXTERNAL))
        with _layout(path := folder / "dataset_info.json", self.FORM):
            about = read_json(path)
            choose(f"{path}: fileFormat: cannot read", about.get("fileFormat", "tfrecord"), ["tfrecord"])
            split = {split["name"]: split for split in about["splits"]}
            choose(f"{folder}: split: there is no", o["split"], split)
            lengths = [int(n) for n in split[o["split"]]["shardLengths"]]
            name = split[o["split"]].get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
            known = {"DATASET": about["name"], "SPLIT": o["split"], "FILEFORMAT": "tfrecord"}
            shards = [folder / name.format(**known, SHARD_X_OF_Y=f"{i:05d}-of-{len(lengths):05d}")
                      for i in range(len(lengths))]
        self.files = [folder / "features.json", path, *shards]
        self.episodes = [{"file": file, "record": i} for file, n in zip(shards, lengths) for i in range(n)]
        self.tasks = []                                    # known once all rows were read

    def _recipe(self, name):
        """How this set is read: self.action, .state (recipes), .keep (a slice), .text, .views."""
        o, entries = self.options, dict(OXE)
        if o["sets"]:
            entries |= read_json(o["sets"])
        if o["like"]:
            choose(f"{self.root}: like: there is no entry", o["like"], entries)
        plain = ("", "", "state" * ("observation/state" in self.features), "action")
        entry = entries.get(o["like"] or name, plain)
        if not isinstance(entry, (list, tuple)) or [*map(type, entry)] not in ([str] * 4, [str] * 5):
            raise ValueError(f"{o['sets']}: {name}: wanted [third, wrist, state, action], found {entry}.")
        self.options = o = o | {view: o.get(view) or key for view, key in zip(("third", "wrist"), entry)
                                if view in self.views}
        self.action, self.state = o["action"] or entry[3], o["state"] or entry[2]
        o |= {"action": self.action, "state": self.state, "keep": [*entry, ""][4]}     # of the table's name
        absent = [view for view in ("third", "wrist") if view in self.views and not o[view]]
        cameras = [key.removeprefix("observation/") for key, (dtype, shape, encoded) in self.features.items()
                   if encoded and dtype == "uint8" and shape[-1:] == [3] and key.startswith("observation/")]
        if absent and entry is not plain:
            raise ValueError(f"{self.root}: OXE knows no camera for the view {absent[0]!r} of this set, only "
                             f"{cameras} are there. Choose other views, or name one: {absent[0]}=CAMERA.")
        self.choose_views(cameras)
        self.text = self.find_feature(TEXTS, ("", "observation/"))
        self.keys = {what: {name: self.find_feature([name], where)
                            for name in re.findall(r"[a-zA-Z_][\w/]*(?![\w/(])", recipe)}
                     for what, recipe, where in (("actions", self.action, ("action/", "", "observation/")),
                                                 ("state", self.state, ("observation/", "")))}
        for what, recipe in (("actions", self.action), ("state", self.state or "0"), ("keep", o["keep"])):
            try:                                           # with ones for numbers
                sizes = [len(_cut(np.ones(99), recipe))] if what == "keep" else [
                    recipe_column(term, partial(self._ones, self.keys[what])).shape[1]
                    for term in recipe.split()]
            except (LookupError, ValueError, TypeError, AttributeError, zlib.error):
                sizes = [0]
            if not all(sizes or [0]):
                raise ValueError(f"{self.root}: {what}: cannot be made as {recipe!r} says, of "
                                 f"{', '.join(self.features)}; see data.py, RLDS, for how it is written.")

    def _ones(self, keys, name):
        """What `_values` reads of two steps, if all numbers were ones."""
        dtype, shape, _ = self.features[keys.get(name, name)] if name != "0" else ("float32", [1], False)
        if dtype in ("string", "bytes"):
            return [zlib.compress(np.ones(8, "<f4").tobytes())] * 2
        return np.ones((2, math.prod(shape)), np.float32)

    def find_feature(self, names, where):
        """The first feature of a step called as one of `names`, after one of the prefixes `where`."""
        for key in (before + name for name in names for before in where):
            if key in self.features:
                return key
        raise ValueError(f"{self.root}: a step has no {' or '.join(names)}, only {', '.join(self.features)}. "
                         "Name what stands for it (action=, state=, like=, sets=; see data.py, OXE).")

    def where(self, number):
        """The file and record that `number` is."""
        return f"{self.episodes[number]['file']}, record {self.episodes[number]['record']}"

    def _records(self, numbers):
        """Yield (number, (bytes of its file, start, end)) of these episodes, or (number, what is wrong)."""
        files = {}
        for number in numbers:
            e = self.episodes[number]
            files.setdefault(e["file"], {})[e["record"]] = number
        for path, left in tqdm(files.items(), f"{self.name}: records", unit="file", disable=None):
            why = f"{path}: dataset_info.json says that it holds more records"
            try:
                with _layout(path, self.FORM), _mapped(path) as b:
                    for record, span in enumerate(tfrecords(b, path)):
                        if record in left:
                            yield left.pop(record), (b, *span)
            except ValueError as e:
                why = str(e)
            yield from ((number, why) for number in left.values())

    def scan(self):
        """Yield (number, the episode's columns or what is wrong with it) of those with a text."""
        self.numbers = {}
        for number, at in self._records(self.chosen):
            if (found := at if isinstance(at, str) else self._take(number, *at)) is not None:
                yield number, found

    def _take(self, number, b, start, end):
        """An episode's columns, or what is wrong with it, or None: no text, or no step that is kept."""
        try:
            found = read_example(b, start, end)
            texts = self._values(b, found, {}, self.text)
            if isinstance(texts, np.ndarray):                                            # code points (n, .)
                texts = ["".join(map(chr, row)).partition("\0")[0].encode() for row in texts.astype(int)]
            n, texts = len(texts), [text.decode("utf-8", "replace").strip() for text in texts]
            whole = {}
            for name, recipe in (("actions", self.action), ("state", self.state or "0")):
                read = partial(self._values, b, found, self.keys[name], steps=n)
                whole[name] = np.concatenate([recipe_column(term, read) for term in recipe.split()], 1)
            spans = {f"at {key}": np.array(found[f"steps/observation/{key}"][1])
                     for key in self.views.values()}
            first, rows = next(filter(None, texts), None), _cut(np.arange(n), self.options["keep"])
            if first is None or not len(rows):
                return None
            told = [self.numbers.setdefault(texts[i] or first, len(self.numbers)) for i in rows]
            self.tasks = list(self.numbers)
            return {**{name: x[rows].astype(np.float32) for name, x in whole.items()}, "task": np.array(told),
                    **{name: x[rows] for name, x in spans.items()}}
        except (LookupError, ValueError, TypeError, zlib.error) as e:
            return f"{self.where(number)} is not as features.json says: {type(e).__name__}: {e}"

    def _values(self, b, found, keys, name, steps=None):
        """A feature of all steps, by its name in a recipe: a list of bytes, or numbers (n, k)."""
        if name == "0":
            return np.zeros((steps, 1), np.float32)
        key = keys.get(name, name)
        values, size = feature_values(b, *found[f"steps/{key}"]), math.prod(self.features[key][1])
        n = len(values) if isinstance(values, list) else len(values) / size
        if steps not in (None, n):
            raise ValueError(f"{key} has {n:g} steps, not {steps}")
        return values if isinstance(values, list) else values.reshape(-1, size).astype(np.float32)

    def pictures(self, number, rows, key):
        """One camera at these rows: (n, h, w, 3) uint8, decoded."""
        e, found = self.episodes[number], []
        with _layout(e["file"], self.FORM):
            file = self.open(e["file"])
            for start, end in rows[f"at {key}"].tolist():
                file.seek(start)
                found.append(decode_picture(file.read(end - start)))
            return np.stack(found)

    def check(self):
        """Yield (episode, why): records whose bytes do not fit their checksum, pictures that do not open."""
        places = {number: i for i, (number, _) in enumerate(self.kept)}
        for number, at in self._records(places):
            if isinstance(at, str):
                why = at
            elif masked_crc(at[0][at[1]:at[2]]) != _u32(at[0], at[2]):
                why = f"{self.where(number)}: its checksum does not fit its bytes"
            else:
                why = self.unreadable(number, places[number], self.views.values())
            if why:
                yield number, why

    def facts(self):
        """Yield files, recipes, how JPEGs are decoded, features."""
        left = len(self.chosen) - len(self.kept) - len(self.damaged)
        yield (f"RLDS, {len(self.files) - 2} files, split {self.options['split']}; {left} episodes left out: "
               "no text, or no step that counts")
        yield f"action       {self.action}"
        yield f"state        {self.state or 'zeros'}"
        yield f"JPEG         {self.told['JPEG']}"
        for key, (dtype, shape, _) in self.features.items():
            yield f"feature {key}: {dtype} {shape}"


@contextlib.contextmanager
def _mapped(path):
    """A file's bytes, read where they are looked at."""
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"{path} is {'empty' if path.is_file() else 'missing'}")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as b:
        yield b


# ---- CALVIN's frames: read ---------------------------------------------------------------------------------

class CalvinSegments(Recorded):
    """CALVIN's language segments as episodes; see `Recorded`. Relative actions (gripper 1: open), robot_obs.

    A segment's frame `end` is no target, as in RoboVLMs. split "val" is the folder validation. For the table
    in the cache, a frame that is replaced is no news: only the folder and the annotations are looked at.
    """
    FORM, OPENING = "CALVIN", 1
    OPTIONS = {key: x for key, x in Recorded.OPTIONS.items() if key != "val"} | {
        "action": "rel_actions", "state": "robot_obs"}

    def find(self):
        """Read the language segments. ValueError: none, or another form."""
        self.folder = calvin_folder(self.root, self.split)
        language = self.folder / "lang_annotations" / "auto_lang_ann.npy"
        self.segments, texts, _ = calvin_language(language)
        self.tasks = sorted(set(texts))
        self.numbers = [self.tasks.index(text) for text in texts]
        self.episodes, self.files = self.segments, [language, self.folder]
        if not self.segments:
            raise ValueError(f"{language} lists no segments.")
        first = calvin_frame(self.folder, self.segments[0][0])
        self.choose_columns([*first], [key for key, x in first.items() if x.ndim == 3 and x.shape[2] == 3])

    def where(self, number):
        """The folder and frames that `number` is."""
        return f"{self.folder}, frames {self.segments[number][0]} to {self.segments[number][1]}"

    def scan(self):
        """Yield (number, the segment's columns or what is wrong with it)."""
        for number in tqdm(self.chosen, f"{self.name}: actions", unit="segment", disable=None):
            rows = np.arange(*self.segments[number])
            try:
                read = [calvin_frame(self.folder, n, (self.action, self.state)) for n in rows]
                found = {name: np.stack([x[key] for x in read]).astype(np.float32) for name, key in
                         (("actions", self.action), ("state", self.state)) if len(rows)}
            except ValueError as e:
                found = f"{self.where(number)}: {e}"
            if found:
                told = {"task": np.full(len(rows), self.numbers[number]), "row": rows}
                yield number, found if isinstance(found, str) else found | told

    def pictures(self, number, rows, key):
        """One camera at these rows: (n, h, w, 3) uint8."""
        return np.stack([calvin_frame(self.folder, n, (key,))[key] for n in rows["row"]])

    def facts(self):
        """Yield its split and how many segments there are."""
        yield f"CALVIN, {self.folder.name}: {len(self.segments)} language segments, 30 frames per second"


RECORDED = {"lerobot": LeRobot, "libero": Libero, "rlds": Rlds, "calvin": CalvinSegments,
            "robobrain": RoboBrain}


def form_of(folder):
    """Which of RECORDED a folder is, or None."""
    marks = {"lerobot": ["meta/info.json"], "libero": ["*.hdf5", "*/*.hdf5"],
             "calvin": ["lang_annotations/auto_lang_ann.npy", "training/lang_annotations/auto_lang_ann.npy"],
             "rlds": ["features.json", "*/features.json", "*/*/features.json"],
             "robobrain": ["*.tar", "*/*.tar"]}
    return next((form for form, names in marks.items() if any(map(any, map(folder.glob, names)))), None)


def _mixture(root, name, options):
    """The sets of one of MIXTURES below `root`, as recorded_sets gives them."""
    choose(f"--data rlds={root}: there is no mixture", name, MIXTURES)
    found = {key: next(filter(Path.is_dir, (Path(root).expanduser() / (key + end) for end in ("", EXTERNAL))),
                       None) for key in MIXTURES[name]}
    if missing := [key for key, path in found.items() if not path]:
        raise ValueError(f"--data rlds={root},mixture={name}: {len(missing)} of {len(found)} sets are not "
                         f"there: {', '.join(missing)}. Get them, or name those you have: "
                         "rlds=DIR/SET,weight=2+rlds=...")
    times = _weight(f"rlds={root},mixture={name}", options)
    return [("rlds", str(found[key]), {**options, "weight": str(w * times)})
            for key, w in MIXTURES[name].items()]


def _weight(spec, options):
    try:
        weight = float(options.get("weight", 1))
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"--data {spec}: weight={options['weight']}: a number above 0 is wanted.")
    return weight


def recorded_sets(spec):
    """[(form, folder, options), ...] of a --data of recorded episodes (first may be tabletop), else []."""
    if Path(spec).is_dir():
        return [(form, spec, {})] if (form := form_of(Path(spec))) else []
    parts = [part.partition("=") for part in re.split(r"\+(?=[\w-]+=)", spec)]
    made = [(NAME, parts.pop(0)[0], {})] if len(parts) > 1 and tabletop_sets(parts[0][0]) else []
    if not all(form in RECORDED for form, *_ in parts):
        return []
    split = [(form, *re.split(r",(?=\w+=)", rest)) for form, _, rest in parts]
    sets = [(form, folder, dict(x.split("=", 1) for x in options)) for form, folder, *options in split]
    return made + [one for form, folder, options in sets for one in (
        _mixture(folder, options.pop("mixture"), options) if form == "rlds" and "mixture" in options
        else [(form, folder, options)])]


def recorded_dataset(spec, split, views, expect, made, **how):
    """The sets that --data SPEC names, one after the other, checked; None if none validates. made: opens the
    tabletop's."""
    sets, weights = [], []
    for form, folder, options in recorded_sets(spec):
        if not Path(folder).expanduser().is_dir() and form not in (NAME, "robobrain"):
            raise ValueError(f"--data {spec}: {folder} is no folder.")
        weight = _weight(spec, options)
        data = made(folder) if form == NAME else RECORDED[form](
            folder, split, views=views, points=expect["action_dim"] == 2, options=options, **how)
        sets += [data] if len(data) else []
        weights += [weight] if len(data) else []
        if form != NAME and split == "train" and rank_info()[0] == 0:
            read = {**data.views, "action": data.action,
                    "state": data.state or "its usual columns, or zeros", **data.told}
            read = ", ".join(f"{what}={column}" for what, column in read.items())
            print(f"{folder}: {len(data):,} frames, {len(data.kept):,} episodes; left out: "
                  f"{len(data.damaged):,} damaged; {read}", file=sys.stderr)
    names = [getattr(data, "name", NAME) for data in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"--data {spec}: sets of one name in {names}; name them: lerobot=DIR,name=mine.")
    if not sets and split != "train":
        return None
    if not sets:
        raise ValueError(f"--data {spec}: no episode is left to train on; val=0 keeps all of them for it.")
    data = Bodies(sets, weights) if len(sets) > 1 or weights[0] != 1 else sets[0]
    if len(sets) > 1 and split == "train" and rank_info()[0] == 0:
        shares = np.diff([0, *data.cumulative_sizes]) / len(data)
        print("samples: " + ", ".join(f"{x:.1%} {name}" for x, name in zip(shares, names)), file=sys.stderr)
    data = Checked(data, f"--data {spec}", expect)
    return data if data[0] else None


# ---- LeRobot v3.0: written ---------------------------------------------------------------------------------

class LeRobotWriter:
    """Writes a LeRobot v3.0 folder: add() one episode after the other, close() after the last (`with` does).

    An episode has files of its own (v3.0 allows it), the last of them its row in meta/episodes. Killed at any
    moment, len(writer) whole episodes are there; a new writer goes on after them, to the same bytes. close()
    derives the rest from the episodes: tasks, stats.json (with the quantiles of all rows), info.json, without
    which it is no dataset yet. video: H.264, a key frame every 2, else PNG in the parquet files, lossless.
    made_from: what the episodes depend on; going on with other values is a ValueError.
    """

    def __init__(self, folder, fps, robot_type=None, video=True, made_from=None):
        self.folder, self.fps, self.video = Path(folder).expanduser(), fps, video
        self.about = {"fps": fps, "robot_type": robot_type, "video": video, "made_from": made_from or {}}
        self.begun, self.pq = self.folder / "meta" / "recording.json", _optional("pyarrow.parquet", folder)
        begun = read_json(self.begun) if self.begun.exists() else {}
        self.features = begun.pop("features", None)
        left = [*self.folder.rglob(".*.part")]                 # of a run that was killed while writing
        others = [path for path in self.folder.rglob("*") if path.is_file() and path not in left]
        if others and begun != json.loads(json.dumps(self.about)):
            raise ValueError(f"{self.folder} is not empty, and no recording of the same: found {begun}, "
                             f"wanted {self.about}. Give another folder, or delete it.")
        for path in left:
            path.unlink(missing_ok=True)
        self.rows = []
        while (path := self._path("meta/episodes", len(self))).exists():
            with _layout(path, "LeRobot v3.0"):
                self.rows += self.pq.read_table(path).to_pylist()
        self.tasks = list(dict.fromkeys(task for row in self.rows for task in row["tasks"]))

    def __len__(self):
        return len(self.rows)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()

    def _path(self, folder, number, ending="parquet"):
        return self.folder / folder / f"chunk-{number // 1000:03d}" / f"file-{number % 1000:03d}.{ending}"

    def add(self, images, actions, state, instruction, **more):
        """images {view: (n, h, w, 3) uint8}, actions (n, A), state (n, S), more {feature: (n,) or (n, k)}."""
        n, number = len(actions), len(self)
        cameras = {f"observation.images.{view}": np.asarray(x) for view, x in images.items()}
        columns = {"observation.state": np.asarray(state, np.float32),
                   "action": np.asarray(actions, np.float32),
                   **{name: np.asarray(x) for name, x in more.items()}}
        self._claim(number, n, cameras, columns, instruction)
        if instruction not in self.tasks:
            self.tasks.append(instruction)
        start, index = self.rows[-1]["dataset_to_index"] if self.rows else 0, np.arange(n)
        data = columns | {"timestamp": (index / self.fps).astype(np.float32), "frame_index": index,
                          "episode_index": np.full(n, number), "index": start + index,
                          "task_index": np.full(n, self.tasks.index(instruction))}
        chunk, file = divmod(number, 1000)
        row = {"episode_index": number, "tasks": [instruction], "length": n, "data/chunk_index": chunk,
               "data/file_index": file, "dataset_from_index": start, "dataset_to_index": start + n}
        stats = {key: lerobot_stats(x) for key, x in {**cameras, **data}.items()}
        for key, x in cameras.items():
            if self.video:
                atomic_write(self._path(f"videos/{key}", number, "mp4"), partial(_write_video, x, self.fps))
                row |= {f"videos/{key}/chunk_index": chunk, f"videos/{key}/file_index": file,
                        f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": n / self.fps}
            else:
                data[key] = x
        row |= {f"stats/{key}/{name}": x for key, one in stats.items() for name, x in one.items()}
        row |= {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
        for folder, table in (("data", data), ("meta/episodes", {key: [x] for key, x in row.items()})):
            table = _parquet_table(table)                      # to read a picture is to read its row group
            atomic_write(self._path(folder, number), partial(self.pq.write_table, table, row_group_size=16))
        self.rows.append(row)

    def _claim(self, number, n, cameras, columns, instruction):
        """Check an episode; the first one's features are those of all."""
        kind = {"dtype": "video" if self.video else "image", "names": ["height", "width", "channels"]}
        features = {key: kind | {"shape": list(x.shape[1:])} for key, x in cameras.items()}
        features |= {key: {"dtype": str(x.dtype), "shape": list(x.shape[1:]) or [1], "names": None}
                     for key, x in columns.items()}
        for key, x in {**cameras, **columns}.items():
            fits = x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3 if key in cameras else (
                x.ndim in (1, 2) and x.dtype.kind in "biuf")
            if len(x) != n or not n or not fits or not is_text(instruction):
                raise ValueError(f"episode {number}, {instruction!r}: {key} is {x.dtype} {x.shape} of {n} "
                                 "frames; wanted numbers (n,) or (n, k), pictures (n, h, w, 3) uint8.")
            if key in cameras and self.video and (x.shape[1] % 2 or x.shape[2] % 2):
                raise ValueError(f"{key}: {x.shape[2]} x {x.shape[1]} pixels; a video wants even numbers. "
                                 "Change the size, or write pictures (video=False).")
        if self.features not in (None, features):
            raise ValueError(f"episode {number} has features {features}, the recording {self.features}.")
        if self.features is None:
            self.features = features
            write_json(self.begun, self.about | {"features": features})

    def close(self):
        """Write tasks, stats.json and info.json: now it is a dataset."""
        if not self.rows:
            return
        pa = _optional("pyarrow", self.folder)
        tasks = pa.table({"task_index": [*range(len(self.tasks))], "__index_level_0__": self.tasks})
        about = {"index_columns": ["__index_level_0__"], "column_indexes": [], "pandas_version": "2.2.0",
                 "columns": [{"name": name, "field_name": field, "pandas_type": kind, "numpy_type": numpy,
                              "metadata": None} for name, field, kind, numpy in (
                                  ("task_index", "task_index", "int64", "int64"),
                                  (None, "__index_level_0__", "unicode", "object"))]}
        tasks = tasks.replace_schema_metadata({"pandas": json.dumps(about)})
        atomic_write(self.folder / "meta" / "tasks.parquet", partial(self.pq.write_table, tasks))
        number = {"dtype": "int64", "shape": [1], "names": None}
        features = self.features | {"timestamp": number | {"dtype": "float32"}} | dict.fromkeys(
            ("frame_index", "episode_index", "index", "task_index"), number)
        for key, feature in features.items():
            if feature["dtype"] == "video":
                h, w, _ = feature["shape"]
                features[key] = feature | {"info": {
                    "video.height": h, "video.width": w, "video.codec": "h264", "video.pix_fmt": "yuv420p",
                    "video.is_depth_map": False, "video.fps": self.fps, "video.channels": 3,
                    "has_audio": False}}
        stats = {key: self._whole(key, feature) for key, feature in features.items()}
        write_json(self.folder / "meta" / "stats.json", stats)
        write_json(self.folder / "meta" / "info.json", {
            "codebase_version": "v3.0", "robot_type": self.about["robot_type"], "total_episodes": len(self),
            "total_frames": self.rows[-1]["dataset_to_index"], "total_tasks": len(self.tasks),
            "chunks_size": 1000, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "fps": self.fps,
            "splits": {"train": f"0:{len(self)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
            if self.video else None, "features": features})

    def _whole(self, key, feature):
        """A feature's statistics over all episodes: of all rows, for pictures out of each episode's."""
        if feature["dtype"] not in ("video", "image"):
            paths = [self._path("data", i) for i in range(len(self))]
            return lerobot_stats(np.concatenate([_numbers(self.pq.read_table(path, columns=[key])[key], key)
                                                 for path in paths]))
        low, high, mean, std = (np.array([row[f"stats/{key}/{name}"] for row in self.rows])     # (E, 3, 1, 1)
                                for name in ("min", "max", "mean", "std"))
        share = np.array([row[f"stats/{key}/count"][0] for row in self.rows], np.float64)
        total, share = int(share.sum()), (share / share.sum())[:, None, None, None]
        middle = (share * mean).sum(0)
        found = {"min": low.min(0), "max": high.max(0), "mean": middle,
                 "std": np.sqrt((share * (std**2 + (mean - middle)**2)).sum(0))}
        return {name: x.tolist() for name, x in found.items()} | {"count": [total]}


def lerobot_stats(x):
    """Statistics of (n,), (n, k): lists (k,); of pictures (n, h, w, 3): per channel, 0 .. 1, (3, 1, 1)."""
    shares, pictures = (1, 10, 50, 90, 99), x.ndim == 4
    if pictures:                                               # at most 100 of them; their levels are counted
        x, v = x[::-(-len(x) // 100)], np.arange(256)[:, None] / 255
        n = np.stack([np.bincount(x[..., c].ravel(), minlength=256) for c in range(3)], 1)      # (256, 3)
        mean, below = (n * v).sum(0) / n[:, 0].sum(), n.cumsum(0) / n[:, 0].sum()
        found = {"min": x.min((0, 1, 2)) / 255, "max": x.max((0, 1, 2)) / 255, "mean": mean,
                 "std": np.sqrt((n * (v - mean)**2).sum(0) / n[:, 0].sum())}
        found |= {f"q{q:02d}": (below >= q / 100).argmax(0) / 255 for q in shares}
    else:
        x = x.reshape(len(x), -1).astype(np.float64)
        found = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
        found |= {f"q{q:02d}": np.quantile(x, q / 100, 0) for q in shares}
    shape = (3, 1, 1) if pictures else (-1,)
    return {name: value.reshape(shape).tolist() for name, value in found.items()} | {"count": [len(x)]}


def _parquet_table(columns):
    """{name: (n,), (n, k), a list, or pictures (n, h, w, 3)} -> an Arrow table; pictures become PNGs."""
    import pyarrow as pa
    arrays = {}
    for name, x in columns.items():
        if isinstance(x, np.ndarray) and x.ndim == 4:
            files = [io.BytesIO() for _ in x]
            for file, picture in zip(files, x):
                Image.fromarray(picture).save(file, "PNG")
            cells = [{"bytes": file.getvalue(), "path": None} for file in files]
            arrays[name] = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        elif isinstance(x, np.ndarray) and x.ndim == 2 and x.shape[1] > 1:
            arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
        else:
            arrays[name] = pa.array(x.ravel() if isinstance(x, np.ndarray) else x)
    return pa.table(arrays)


def _write_video(pictures, fps, path):
    av = _optional("av", path)
    with av.open(str(path), "w", format="mp4") as file:
        # LeRobot's own choice, SVT-AV1, makes its caller a real-time process if root calls it: not here
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001),
                                 options={"g": "2", "crf": "18", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")))
        file.mux(stream.encode())


# ---- --data: the tabletop, or a function of yours ---------------------------------------------------------

def open_dataset(spec=NAME, split="train", horizon=8, views=("third",), image_size=64, action_dim=None,
                 state_dim=None, history=1, **options):
    """The dataset that `--data SPEC` names.

    "tabletop", "tabletop:pick,put", "tabletop@dual:all": the embedded set, of a body (gripper) and families;
    `options` go to `tabletop`. "tabletop+tabletop@dual": both bodies' (`Bodies`), `episodes` of each.
    "PATH/manifest.jsonl": VLA-0's community form (see `Manifest`); no validation set if too short: None.
    "maniskill=DIR+hoi4d=DIR": A0's forms, mixed; "a0=DIR": the official five. "val" is their test split.
    "lerobot=DIR", "libero=", "calvin=", "rlds=" or DIR, options after commas: `Recorded`, and above it.
    "robobrain=FILE.jsonl", or a folder of shards: `RoboBrain`. These and the tabletop mix by weight:
    "tabletop+tabletop@dual+robobrain=VQA.jsonl,weight=0.1", the tabletop first.
    "FILE.json": the train_dataset or val_dataset of an official RoboVLMs configuration.
    "my_file.py:make_dataset": your function, called with those of split, horizon, views, image_size and
    history that it takes by name. It returns something with len() and [i], or an iterable (see `loader`); an
    attribute `stats` of it replaces the statistics pass. Samples are checked as they are read, the first one
    at once. A function that takes no `split` has no validation set: None for any split but "train".
    """
    path, _, name = spec.rpartition(":")
    expect = {"horizon": horizon, "views": views, "action_dim": action_dim, "state_dim": state_dim}
    if spec.endswith(".jsonl") and Path(spec).is_file():
        data = Checked(Manifest(spec, split, horizon), spec, expect)
        return data if len(data) and data[0] else None
    if recorded_sets(spec):
        made = partial(open_dataset, split=split, **expect, image_size=image_size, history=history, **options)
        return recorded_dataset(spec, split, views, expect, made, horizon=horizon, history=history, **options)
    if spec.endswith(".json"):
        return official_dataset(spec, split, horizon, history, views, expect, options.get("cache"))
    if path.endswith(".py"):
        offered = {"split": split, "horizon": horizon, "views": views, "image_size": image_size,
                   "history": history}
        return _user_dataset(path, name, offered, expect)
    parts = [part.partition("=") for part in re.split(r"\+(?=[\w-]+=)", spec)]
    if all(equals for _, equals, _ in parts) and not Path(spec).exists():
        if action_dim not in (None, 2) or options:
            raise ValueError(f"--data {spec} has points, no actions: it is for a0, with no tabletop flags.")
        data = Chained([a0_dataset(form, root, "train" if split == "train" else "test")
                        for name, _, root in parts for form in OFFICIAL_MIXTURE.get(name, [name])])
        return data if len(data) else None
    if named := tabletop_sets(spec):
        chosen, bodies = options.pop("families", None), [body for body, _ in named]
        for body, families in named:                       # before the first of them is generated
            choose("embodiment: the expert cannot drive", body, eval_sim.BODIES)
            eval_sim.Tabletop(families or chosen or eval_sim.FAMILIES, split, views, embodiment=body)
        most = max(eval_sim.EMBODIMENTS[body][0] for body in bodies)
        if len(set(bodies)) < len(bodies):
            raise ValueError(f"--data {spec}: name each body once, with all its families: {NAME}:pick,two.")
        if action_dim not in (None, 2) and action_dim < most:              # 2: a0's points
            raise ValueError(f"--data {spec} has actions of {most} numbers, the model {action_dim}: change "
                             f"it (--set action_dim={most}), or the body.")
        sets = [tabletop(split, families=families or chosen, views=views, image_size=image_size,
                         horizon=horizon, history=history, embodiment=body, **options)
                for body, families in named]
        return Bodies(sets) if len(sets) > 1 else sets[0]
    found = "a folder" if Path(spec).is_dir() else "a file" if Path(spec).exists() else "nothing there"
    raise ValueError(f"--data {spec}: found {found}. Give {NAME}, {NAME}@dual:pick,put, {NAME}:all, "
                     "lerobot=DIR, libero=DIR, calvin=DIR, rlds=DIR, robobrain=FILE.jsonl, a manifest.jsonl, "
                     "maniskill=DIR (A0's sets), or my_file.py:make_dataset (your own reader; README has one "
                     "of 15 lines).")


def tabletop_sets(spec):
    """[(body, families or None: the default ones), ...] of a --data that names tabletop sets; else []."""
    parts = [re.fullmatch(rf"{NAME}(?:@([^:]*))?(?::(.*))?", part) for part in spec.split("+")]
    return [("gripper" if part[1] is None else part[1],
             eval_sim.FAMILIES if part[2] == "all" else tuple(part[2].split(",")) if part[2] else None)
            for part in parts] if all(parts) else []


def _user_function(path, name):
    if not Path(path).is_file():
        raise ValueError(f"--data {path}:{name}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"user_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(path).resolve().parent))      # last: it finds its helpers, shadows none of ours
    with _blame(path):
        spec.loader.exec_module(module)
    choose(f"{path} has no function", name, [n for n, value in vars(module).items() if callable(value)])
    return getattr(module, name)


def _user_dataset(path, name, offered, expect):
    make = _user_function(path, name)
    takes = inspect.signature(make).parameters
    if offered["split"] != "train" and "split" not in takes:
        return None
    make = partial(make, **{key: value for key, value in offered.items() if key in takes})
    with _blame(f"{path}:{name}"):
        data = make()
    if _has_items(data):
        dataset = Checked(data, f"{path}:{name}", expect)
    elif hasattr(data, "__iter__"):
        dataset = CheckedStream(make, f"{path}:{name}", expect, getattr(data, "stats", None))
    else:
        raise ValueError(f"{path}:{name} returned {type(data).__name__}; wanted len() and [i], or iter().")
    if next(_each(dataset), None) is None:
        raise ValueError(f"{path}:{name} returned an empty dataset.")
    return dataset


@contextlib.contextmanager
def _blame(where):
    """Whatever a user's code raises is one ValueError that says where."""
    try:
        yield
    except (Exception, SystemExit) as e:
        if isinstance(e, ValueError) and where.partition(", sample")[0] in str(e):
            raise                                          # of check_sample, of a Manifest: it says where
        reason = (str(e).splitlines() or ["no message"])[0][:300]
        raise ValueError(f"{where}: {type(e).__name__}: {reason} (PLAINVLA_TRACEBACK=1 shows where)") from e


def _has_items(dataset):
    """Can it be read in any order? (torch's IterableDataset inherits a [i] that only raises.)"""
    return (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
            and not isinstance(dataset, torch.utils.data.IterableDataset))


def _each(dataset):
    return (dataset[i] for i in range(len(dataset))) if _has_items(dataset) else iter(dataset)


class Checked(Samples):
    """A user's dataset with len() and [i], every sample checked as it is read."""
    PART, UNIT = "sample", "samples"

    def __init__(self, data, where, expect):
        self.data, self.where, self.expect, self.stats = data, where, expect, getattr(data, "stats", None)

    def __len__(self):
        with _blame(f"{self.where}, len()"):
            return len(self.data)

    def __getitem__(self, index):
        return self.draw(index, 0)

    def draw(self, index, key):
        """The checked sample at `index`; of weighted sets, the one that `key` draws there."""
        with _blame(where := f"{self.where}, sample {index}"):
            weighted = isinstance(self.data, Bodies)
            sample = self.data.draw(index, key) if weighted else self.data[index]
            return check_sample(sample, where, **self.expect)


class CheckedStream(torch.utils.data.IterableDataset):
    """A user's iterable, made anew for every pass (a generator is read only once), each sample checked."""

    def __init__(self, make, where, expect, stats=None):
        self.make, self.where, self.expect, self.stats = make, where, expect, stats

    def __iter__(self):
        with _blame(self.where):
            samples = iter(self.make())
        for index in itertools.count():
            with _blame(f"{self.where}, sample {index}"):
                if (sample := next(samples, self)) is self:
                    return
            yield check_sample(sample, f"{self.where}, sample {index}", **self.expect)


def dataset_statistics(dataset):
    """{dataset name: {"action": {mean, std, min, max, q01, q99, mask}, ...}}: `dataset.stats`, or one pass.

    The pass counts each action whose loss_mask is True, in every sample that holds it, and takes the last
    dimension for the gripper (mask False: not normalized). Where that is wrong, give the dataset `stats`.
    """
    if getattr(dataset, "stats", None) not in (None, {}):
        return check_stats(dataset.stats, f"{getattr(dataset, 'where', 'the dataset')}, stats")
    found, total = {}, len(dataset) if _has_items(dataset) else None
    bar = tqdm(_each(dataset), "action statistics", total, unit="sample", disable=rank_info()[0] > 0)
    for sample in bar:
        if "actions" not in sample:                        # waypoints: nothing is normalized
            return {}
        statistics = found.setdefault(sample["dataset"], ActionStatistics())
        statistics.add(sample["actions"][sample["loss_mask"]], trajectories=0)           # (<= T, A)
    mask = [True] * (sample["actions"].shape[1] - 1) + [False]
    return {name: {**statistics.result(mask), "num_trajectories": None} for name, statistics in found.items()}


# ---- Which sample when: a function of (seed, epoch, index) and nothing else -------------------------------

def shuffled(index, n, seed, epoch):
    """Which of n samples stands at position `index` of this epoch's random order.

    The order is a permutation that is never stored, so any position costs the same and a resume has nothing
    to replay: four Feistel rounds permute the numbers below the next power of 4; from n on, once more.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)                     # bits
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(4):
            left, right = right, left ^ (hash64(seed, epoch, turn, right) & low)
        index = left << half | right
        if index < n:
            return index


class Sampler:
    """Endless batches of (dataset index, key) for one rank; `sampler[step]` is any one of them.

    Positions 0, 1, 2, ... run through epoch after epoch, each in its own order. Step k takes the
    G = batch * world positions from k G on, and rank r the r-th part of them: the same samples whatever the
    number of processes. An epoch's last batch is filled from the next. key: an int64 for the random draws of
    this sample in this epoch.
    """

    def __init__(self, n, batch, rank=0, world=1, seed=0, start_step=0, shuffle=True):
        if n < 1 or batch < 1:
            raise ValueError(f"batch={batch} of {n} samples: both must be at least 1.")
        self.n, self.batch, self.rank, self.world = n, batch, rank, world
        self.seed, self.start_step, self.shuffle = seed, start_step, shuffle

    def __getitem__(self, step):
        first, drawn = (step * self.world + self.rank) * self.batch, []
        for position in range(first, first + self.batch):
            epoch, index = divmod(position, self.n)
            key = hash64(self.seed, epoch, index)
            drawn.append((shuffled(index, self.n, self.seed, epoch) if self.shuffle else index, key))
        return drawn

    def __iter__(self):
        step = self.start_step
        while True:
            yield self[step]
            step += 1


def loader(dataset, prepare, collate, batch, rank=0, world=1, seed=0, start_step=0, workers=0, shuffle=True,
           pin=False):
    """Yield collate([prepare(sample, key=key), ...]) for ever: `batch` samples per process and step.

    start_step: batches the run has had; what follows is what an uninterrupted run would see. workers:
    processes that read ahead (0: read here). pin: page-locked memory, for CUDA.
    An iterable is read in its own order, here, again and again: every process reads all of it and keeps its
    share, and a resume reads past what was had. For shuffling, workers and speed, give it len() and [i].
    """
    if not _has_items(dataset):
        yield from _stream(dataset, prepare, collate, batch, rank, world, seed, start_step)
        return
    if workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")       # else it warns when workers are forked
    sampler = Sampler(len(dataset), batch, rank, world, seed, start_step, shuffle)
    batches = torch.utils.data.DataLoader(
        _Batches(dataset, prepare, collate), batch_size=None, sampler=sampler, collate_fn=_unchanged,
        num_workers=workers, prefetch_factor=4 if workers else None, pin_memory=pin,
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator())                                   # its own: torch's stays as it was
    for item in batches:
        if isinstance(item, ValueError):
            raise item
        yield item


class _Batches(torch.utils.data.Dataset):
    """[[(index, key), ...]] -> a batch, made in a worker. A ValueError is returned: its one line survives."""

    def __init__(self, dataset, prepare, collate):
        self.dataset, self.prepare, self.collate = dataset, prepare, collate

    def __getitem__(self, drawn):
        try:
            draw = getattr(self.dataset, "draw", lambda index, key: self.dataset[index])
            return self.collate([self.prepare(draw(index, key), key=key) for index, key in drawn])
        except ValueError as error:
            return error


def _leave_signals_to_parent(worker):
    """A SIGTERM to the whole process group (Slurm's way) must not take the batches away before the save."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _unchanged(batch):
    return batch


def _stream(dataset, prepare, collate, batch, rank, world, seed, start_step):
    position, mine = 0, []
    while True:
        before = position
        for sample in dataset:
            step, part = divmod(position // batch, world)
            if part == rank and step >= start_step:
                mine.append(prepare(sample, key=hash64(seed, 0, position)))
            position += 1
            if len(mine) == batch:
                yield collate(mine)
                mine = []
        if position == before:
            raise ValueError("the dataset's iterator gave nothing (again): it must start anew each time.")


# ---- Command line -----------------------------------------------------------------------------------------

def contact_sheet(spans, path, episodes=6, frames=6, height=96):
    """Write a PNG: a row for each of several episodes, frames from its first to its last, its task above.

    spans: [(data, first, beyond the last i), ...] of the episodes; data: [i] is a sample. All views are
    shown, and waypoints.
    """
    rows = []
    for e in np.unique(np.linspace(0, len(spans) - 1, episodes).round().astype(int)):
        data, start, end = spans[e]
        chosen = np.unique(np.linspace(start, end - 1, frames).round().astype(int))
        samples = [data[i] for i in chosen.tolist()]
        text = samples[0].get("instruction") or samples[0]["conversations"][-1]["value"]
        rows.append((f"{end - start} {data.UNIT}: {text}", []))
        for sample in samples:
            for x in sample.get("images", {}).values():
                picture = Image.fromarray(x).resize((max(1, round(x.shape[1] * height / len(x))), height))
                points = sample.get("waypoints", np.zeros((0, 2))) * picture.size
                ImageDraw.Draw(picture).line([tuple(xy) for xy in points.tolist()], (255, 0, 0), 2)
                rows[-1][1].append(picture)
    width = max([200, *(sum(x.width for x in row) for _, row in rows)])
    sheet = Image.new("RGB", (width, len(rows) * (height + 16)))
    for i, (text, row) in enumerate(rows):
        ImageDraw.Draw(sheet).text((3, i * (height + 16) + 2), text.encode("ascii", "replace").decode())
        for picture, left in zip(row, itertools.accumulate([0, *(x.width for x in row)])):
            sheet.paste(picture, (left, i * (height + 16) + 16))
    atomic_write(path, partial(sheet.save, format="PNG"))
    print(f"contact sheet {path}")


def look_at(spec):
    """Yield (its name, set) of all that a path or a --data holds, each as whole as it is."""
    path, parts = Path(spec).expanduser(), [part.partition("=") for part in re.split(r"\+(?=[\w-]+=)", spec)]
    source, _, name = spec.rpartition(":")
    below = [form for form, (_, names, *_) in A0_FORMS.items()
             if path.is_dir() and (path.name in names or any((path / name).is_dir() for name in names))]
    if (path / "manifest.json").is_file():
        yield spec, Episodes(path)
    elif found := recorded_sets(spec):
        for form, folder, options in found:
            reader = RECORDED.get(form)
            choose(f"{spec}: cannot look at", form, RECORDED)
            usual = {key: x for key, x in (("val", "0"), ("damaged", "skip")) if key in reader.OPTIONS}
            how = {"horizon": None, "noted": []} if reader is RoboBrain else {}
            yield f"{form}={folder}", reader(folder, options=usual | options, **how)
    elif spec.endswith(".jsonl") and path.is_file():
        with _layout(path, "VLA-0's or RoboBrain-X0's form"), open(path, "rb") as file:
            first = file.readline()
        if path.name == "manifest.jsonl" or b'"target_action_text"' in first:
            yield spec, Manifest(path, "all", None, damaged=[])
        else:
            yield from look_at(f"robobrain={spec}")
    elif spec.endswith(".json") and path.is_file():
        from robovlms import read_official_config
        cfg, _ = read_official_config(path)
        for split in ("train", "val"):
            for where, data in official_sets(path, split, cfg.horizon, cfg.history, cfg.views):
                for one in getattr(data, "datasets", [data] * bool(len(data))):
                    yield f"{where}, {len(one)} windows of {cfg.history} + {cfg.horizon} frames", (
                        CalvinSegments(one.folder, split, options={"damaged": "skip"})
                        if isinstance(one, Calvin) else getattr(one.episodes, "recorded", one))
    elif source.endswith(".py"):
        yield spec, _user_dataset(source, name, {"split": "train", "horizon": 8, "views": ("third",),
                                                 "image_size": 64, "history": 1}, {})
    elif below or all(equals for _, equals, _ in parts):
        for form, root in [(form, path) for form in below] or [(form, root) for form, _, root in parts]:
            for form in OFFICIAL_MIXTURE.get(form, [form]):
                for split in ("train", "test"):
                    yield f"{form}={root}, {split}", a0_dataset(form, root, split, damaged=[])
    else:
        _manifest(path)                                        # says what is looked for


def report(name, data):
    """Print what a set holds, look at all its files, and list what is damaged. Returns the damaged parts."""
    if not hasattr(data, "check"):                             # a user's iterable
        raise ValueError(f"{name} has no len() and [i]: it can only be trained on.")
    damaged = dict([*data.damaged, *data.check()])
    frames, total = np.diff(data.at), len(getattr(data, "episodes", range(len(data) + len(data.damaged))))
    lengths = (f", {min(frames)} to {max(frames)} in an episode, median {np.median(frames):.0f}"
               if max(frames, default=1) > 1 else "")
    print(f"{name}: {total} {data.PART}s, {len(damaged)} of them damaged; {len(data)} {data.UNIT}{lengths}; "
          f"{len(data.tasks)} tasks")
    tasks = [*data.tasks[:4], *["..."] * (len(data.tasks) > 4)]
    print(*data.facts(), f"tasks        {'; '.join(tasks)}", sep="\n")
    good = data.whole(damaged)
    for key, value in data[int(good[0][0])].items() if good else ():
        shown = {view: x.shape for view, x in value.items()} if key.endswith("images") else repr(value)[:99]
        print(f"sample       {key}: {value.shape if isinstance(value, np.ndarray) else shown}")
    stats = data.stats or (dataset_statistics(data) if good and not damaged else {})
    for kind, entry in ((kind, one[kind]) for one in stats.values() for kind in one):
        for key in ("q01", "q99", "mean", "std", "mask") if isinstance(entry, dict) else ():
            if entry.get(key) is not None:
                print(f"{kind} {key:5} " + " ".join(f"{x:8.4f}" for x in entry[key]))
    for number, why in sorted(damaged.items(), key=lambda one: str(one[0]).zfill(9)):
        print(f"damaged      {why}" if number == why else f"damaged      {data.PART} {number}: {why}")
    return damaged


def describe(spec, sheet=None):
    """Print a `report` of all that a path or a --data holds; sheet: FILE.png. ValueError: what is damaged."""
    if sheet and (Path(sheet).suffix != ".png" or Path(spec).resolve() in Path(sheet).resolve().parents):
        raise ValueError(f"--sheet {sheet}: give a FILE.png that is not in {spec}.")
    spans, stale, damaged = [], [], 0
    for name, data in look_at(spec):
        damaged += len(found := report(name, data))
        stale += [data.path] if found and isinstance(data, Recorded) and data.chosen else []
        spans += [(data, int(a), int(b)) for a, b in data.whole(found)]
    if sheet and spans:
        contact_sheet(spans, sheet)
    for path in stale:                                         # as in Recorded._index
        path.unlink(missing_ok=True)
    if not spans and not damaged:
        raise ValueError(f"{spec}: no sample is in it.")
    if damaged:
        raise ValueError(f"{spec}: {damaged} parts are damaged (listed above). Copy them again, or train "
                         "with damaged=skip, where that is an option.")


NEEDED = {"required": True}
COMMANDS = {       # name: what it does, the function, what is said then, its arguments
    "build-manifest": (
        "LIBERO's HDF5 -> manifest.jsonl with pictures and statistics, for train.py --data.", build_manifest,
        "{:,} samples; train on them with --data {out}/manifest.jsonl", [
            ("--hdf5", "folder with the suites (libero_spatial, ...) in it", NEEDED),
            ("--out", "folder to write, or to finish after an interruption", NEEDED),
            ("--horizon", "actions per sample", {"type": within(1), "default": 8}),
            ("--num-bins", "actions become integers 0 .. this", {"type": within(1), "default": 1000})]),
    "hoi4d-frames": ("HOI4D's mp4 files -> the frames A0's sets look at.", hoi4d_frames,
                     "{:,} videos are decoded", [
                         ("--root", "HOI4D_release, to go on with after an interruption", NEEDED)]),
    "hoi4d-metadata": (
        "HOI4D's masks and events -> the hoi4d_metadata that A0's set of that name reads.", hoi4d_metadata,
        "{:,} clips have their metadata.json", [
            ("--root", "folder with HOI4D_annotations, to go on with", NEEDED),
            ("--definitions", "folder of that name in HOI4D-Instructions", NEEDED)]),
    "robobrain-process": (
        "AgileX's recordings -> train.jsonl, pictures and statistics, as RoboBrain-X0 has them.",
        robobrain_process, "{:,} samples; train on them with --data robobrain={out}/train.jsonl", [
            ("annotation", "JSON: {group: [{raw_task, task, frame, data}, ...]}", {}),
            ("--out", "folder to write, or to finish after an interruption", NEEDED),
            ("--root", "where files lie that are not at their absolute path", {"type": Path}),
            ("--source", "whose gripper zero (default: by folder)", {"choices": GRIPPER_ZERO}),
            ("--robot", "whose prompt: agilex, r1lite, a2d, ...", {"default": "agilex"}),
            ("--subtask", "the answer names the sub-task first", {"action": "store_true"}),
            ("--paraphrases", "JSON {raw_task: [text, ...]}: the first is asked", {"type": Path}),
            ("--fast", "FAST+'s tokenizer.json, to write the actions' codes too", {"type": Path}),
            ("--chunk", "actions per sample", {"type": within(1), "default": 30}),
            ("--step", "frames from one action to the next", {"type": within(1), "default": 1}),
            ("--every", "frames from one sample to the next", {"type": within(1), "default": 3}),
            ("--skip", "leave out what is damaged", {"action": "store_true"})])}


def run_command(name, arguments):
    """python data.py NAME ...: call its function with what the arguments say."""
    about, function, said, known = COMMANDS[name]
    parser = Parser(about, prog=f"data.py {name}")
    for argument, told, how in known:
        parser.add_argument(argument, help=told, **how)
    parser.add_argument("--workers", type=within(0), help="processes that work (default: one per core)")
    args = vars(parser.parse_args(arguments))
    print(said.format(function(**args), **args))


def main():
    """python data.py --make, or FOLDER, or a command."""
    if next(iter(sys.argv[1:]), None) in COMMANDS:
        return run_command(sys.argv[1], sys.argv[2:])
    known = ",".join(eval_sim.FAMILIES + eval_sim.PAIRS)
    parser = Parser("Make the tabletop dataset, or describe one. LIBERO: data.py build-manifest --help.")
    parser.add_argument("folder", nargs="?", help="describe what this folder, file or --data holds")
    parser.add_argument("--make", action="store_true", help="generate a set, or finish an interrupted one")
    parser.add_argument("--split", default="train", help=f"one of {', '.join(eval_sim.SPLITS)}")
    parser.add_argument("--episodes", type=within(1, 10**6), help=f"how many (default {EPISODES})")
    parser.add_argument("--families", default="", help=f"all, or some of {known} (default: the first three)")
    parser.add_argument("--body", default="gripper", help=f"one of {', '.join(eval_sim.BODIES)}")
    parser.add_argument("--views", default="third", help=f"cameras, some of {','.join(eval_sim.VIEWS)}")
    parser.add_argument("--image-size", type=within(1), default=64, help="pixels per side")
    parser.add_argument("--cache", help="folder that holds generated sets (default: ~/.cache/plainvla)")
    parser.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet: frames of some episodes")
    parser.add_argument("--workers", type=within(0), help="processes that generate (default: one per core)")
    args = parser.parse_args()
    if args.make == bool(args.folder):
        raise ValueError("give either --make or the folder of a set (python data.py --help).")
    if args.make:
        data = open_dataset(f"{NAME}@{args.body}:{args.families}", args.split, views=args.views.split(","),
                            image_size=args.image_size, episodes=args.episodes, cache=args.cache,
                            workers=args.workers)
        args.folder = str(data.folder)
        print(data.folder)
    describe(args.folder, args.sheet)


if __name__ == "__main__":
    cli(main)
