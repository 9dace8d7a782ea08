"""
bench.py loader: samples/s of data.loader for every recorded form at every method's official picture size.

    python benchmarks/bench.py loader --rounds 3                    # all forms, all methods; two workers
    python benchmarks/bench.py loader --variant rlds,calvin --out loader.jsonl

Sets are made here, of the sizes that are on people's disks: LeRobot 256 x 256 (H.264, and PNG in parquet),
LIBERO 128 x 128 (HDF5), CALVIN 200 x 200 (npz), RLDS 256 x 256 (JPEG), the tabletop 64 x 64 (safetensors).
A sample is read at a random frame, with the tiny preset's chunk, and goes through the method's `prepare` and
`collate`, without augmentation.

ratio     the median over rounds, in each of which both are timed in turn (2 s each)
quiet     the same by the cores' time, of two workers and the loop: the ratio if nothing else runs here
loop      the plain way, in the main process: open the file, read the frame and its actions, resize by
          pillow (RoboBrain-X0: twice, as its servers and then Qwen's rule do), to float tensors, prompt to
          ids, stack
decode    the share, of a worker's time for a sample, of what every loader has to do: reading, decoding,
          resizing by pillow. Above 0.5, it is decode-bound: twice the cores give at most twice the samples.
read, prep, loop   a core's time for one sample [ms], whatever else the machine does: to read it, to prepare
          and collate it; the loop's for all
"""
import dataclasses
import importlib
import io
import json
import random
import statistics
import struct
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from common import choose, tiny_tokenizer

OFFICIAL = {"a0": "1b", "cogact": "base", "robobrain_x0": "3b", "robovlms": "paligemma_calvin", "vla0": "3b"}
LOOK = ("image_size", "crop", "min_pixels", "max_pixels", "patch_size", "merge_size")
EPISODES, FRAMES, TEXT = 8, 64, "put the red cube on the plate"


def picture(e, i, side):
    """Smooth colours, and some of them with an edge: about as large a JPEG as a real scene."""
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    waves = [np.sin(x / (9 + c) + i / 3 + c) * np.cos(y / 14 + e) for c in range(3)]
    noise = np.random.default_rng(i).normal(0, 4, (side, side, 3))
    edges = 40 * ((x // 24 + y // 32 + i) % 2)[..., None]
    return (100 + 50 * np.stack(waves, 2) + edges + noise).clip(0, 255).astype(np.uint8)


def pictures(e, side):
    return np.stack([picture(e, i, side) for i in range(FRAMES)])


def actions(e):
    x = np.random.default_rng(e).uniform(-1, 1, (FRAMES, 7)).astype(np.float32)
    x[:, 6] = x[:, 6] > 0
    return x


# ---- Sets, as others write them ---------------------------------------------------------------------------

def make_lerobot(folder, video=True):
    with data.LeRobotWriter(folder, 10, "arm", video) as writer:
        for e in range(EPISODES):
            points = np.random.default_rng(e).random((FRAMES, 10)).astype(np.float32)
            writer.add({"image": pictures(e, 256)}, actions(e), np.zeros((FRAMES, 8), np.float32), TEXT,
                       waypoints=points)


def make_libero(folder):
    import h5py
    with h5py.File(folder / "put_it_there_demo.hdf5", "w") as file:
        for e in range(EPISODES):
            demo = file.create_group(f"data/demo_{e}")
            demo["actions"], demo["obs/agentview_rgb"] = actions(e), pictures(e, 128)
            demo["obs/ee_states"], demo["obs/gripper_states"] = np.zeros((FRAMES, 6)), np.zeros((FRAMES, 2))


def make_calvin(folder):
    (folder / "training" / "lang_annotations").mkdir(parents=True)
    n, segments = 0, []
    for e in range(EPISODES):
        segments.append((n, n + FRAMES))
        for x, a in zip(pictures(e, 200), actions(e)):
            np.savez_compressed(folder / "training" / f"episode_{n:07d}.npz", rgb_static=x, actions=a,
                                rgb_gripper=x[:84, :84], rel_actions=a, robot_obs=np.zeros(15))
            n += 1
    about = {"info": {"indx": segments}, "language": {"ann": [TEXT] * EPISODES, "task": ["put"] * EPISODES}}
    np.save(folder / "training" / "lang_annotations" / "auto_lang_ann.npy", about, allow_pickle=True)


def message(number, payload):
    """A field of a protocol buffer: bytes."""
    length, size = len(payload), b""
    while length > 127:
        length, size = length >> 7, size + bytes([length & 127 | 128])
    return bytes([number << 3 | 2]) + size + bytes([length]) + payload


def make_rlds(folder):
    tensor = {"tensor": {"dtype": "float32", "shape": {"dimensions": ["7"]}}}
    image = {"image": {"dtype": "uint8", "shape": {"dimensions": ["256", "256", "3"]}}}
    steps = {"action": tensor, "language_instruction": {"text": {}},
             "observation": {"featuresDict": {"features": {"image": image, "state": tensor}}}}
    steps = {"sequence": {"feature": {"featuresDict": {"features": steps}}}}
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": {"steps": steps}}}))
    split = {"name": "train", "shardLengths": [str(EPISODES)]}
    (folder / "dataset_info.json").write_text(json.dumps({"name": "bench", "splits": [split]}))
    with open(folder / "bench-train.tfrecord-00000-of-00001", "wb") as file:
        for e in range(EPISODES):
            jpegs = [io.BytesIO() for _ in range(FRAMES)]
            for jpeg, x in zip(jpegs, pictures(e, 256)):
                Image.fromarray(x).save(jpeg, "JPEG", quality=95)
            numbers = message(2, message(1, actions(e).tobytes()))
            texts = message(1, b"".join(message(1, TEXT.encode()) for _ in range(FRAMES)))
            images = message(1, b"".join(message(1, x.getvalue()) for x in jpegs))
            columns = {"steps/action": numbers, "steps/observation/state": numbers,
                       "steps/language_instruction": texts, "steps/observation/image": images}
            entries = (message(1, message(1, key.encode()) + message(2, x)) for key, x in columns.items())
            record = message(1, b"".join(entries))
            length = struct.pack("<Q", len(record))
            file.write(length + struct.pack("<I", data.masked_crc(length)) + record
                       + struct.pack("<I", data.masked_crc(record)))


# ---- The plain way to read a frame and its actions --------------------------------------------------------

def plain_lerobot(found, e, i, T):
    about = found.episodes[e]
    import pyarrow.parquet as pq
    rows = pq.read_table(about["data"], columns=["action"])["action"].to_pylist()[i:i + T]
    import av
    (path, *_), = about["videos"].values()
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        file.seek(round(i / found.fps / stream.time_base), stream=stream)
        for frame in file.decode(stream):
            if frame.time >= (i - 0.5) / found.fps:
                return frame.to_ndarray(format="rgb24"), rows


def plain_images(found, e, i, T):
    import pyarrow.parquet as pq
    rows = pq.read_table(found.episodes[e]["data"]).slice(i, T)
    return np.array(Image.open(io.BytesIO(rows["observation.images.image"][0].as_py()["bytes"]))), \
        rows["action"].to_pylist()


def plain_libero(found, e, i, T):
    import h5py
    with h5py.File(found.episodes[e]["file"]) as file:
        demo = file[f"data/demo_{e}"]
        return demo["obs/agentview_rgb"][i][::-1, ::-1], demo["actions"][i:i + T]


def plain_calvin(found, e, i, T):
    start, end = found.segments[e]
    numbers = range(start + i, min(start + i + T, end))
    frames = [np.load(found.folder / f"episode_{n:07d}.npz") for n in numbers]
    return frames[0]["rgb_static"], [frame["rel_actions"] for frame in frames]


def plain_rlds(found, e, i, T):
    b = found.episodes[e]["file"].read_bytes()
    record = data.read_example(b, *[*data.tfrecords(b, "")][e])
    jpeg = data.feature_values(b, *record["steps/observation/image"])[i]
    rows = data.feature_values(b, *record["steps/action"]).reshape(-1, 7)
    return np.array(Image.open(io.BytesIO(jpeg))), rows[i:i + T]


def plain_tabletop(found, e, i, T):
    about = found.episodes[e]
    shard, start = data.Shard(found.files[about["shard"]]), about["start"] + i
    rows = shard.read("actions", start, min(start + T, about["start"] + about["frames"]))
    return shard.read("images.third", start, start + 1)[0], rows


FORMS = {"tabletop": (None, plain_tabletop), "lerobot-mp4": (make_lerobot, plain_lerobot),
         "lerobot-png": (partial(make_lerobot, video=False), plain_images), "rlds": (make_rlds, plain_rlds),
         "libero": (make_libero, plain_libero), "calvin": (make_calvin, plain_calvin)}


# ---- Measured ---------------------------------------------------------------------------------------------

def opened(form, folder, cfg, points):
    how = {"horizon": cfg.horizon, "views": ("third",), "cache": folder / "cache"}
    if form == "tabletop":
        found = data.tabletop("train", EPISODES, image_size=64, workers=0, **how)
        return found, [(e, i) for e, n in enumerate(np.diff(found.at)) for i in range(n)]
    reader = data.RECORDED[form.partition("-")[0]]
    options = {key: "0" for key in ("val",) if key in reader.OPTIONS} | {"gripper": "openvla"}
    options |= {"noops": "keep"} if form == "libero" else {"gripper": ""} if form == "rlds" else {}
    found = reader(folder, points=points, options=options, **how)
    return found, [(number, i) for number, n in found.kept for i in range(n)]


def sizes_of(module, cfg):
    """The sizes (w, h) that a method's own recipe brings a picture to, one after the other."""
    if cfg.image_size:
        return [(cfg.image_size, cfg.image_size)]
    h, w = module.smart_resize(240, 320, cfg.patch_size * cfg.merge_size, cfg.min_pixels, cfg.max_pixels)
    return [(320, 240), (w, h)]                            # RoboBrain-X0's


def fitted(x, sizes):
    for size in sizes:
        x = np.array(Image.fromarray(np.ascontiguousarray(x)).resize(size, Image.BICUBIC))
    return x


def loop(found, where, plain, sizes, T, batch):
    """Batches, one sample after the other, as one first writes it."""
    tokenizer = tiny_tokenizer()
    while True:
        rows = []
        for e, i in random.choices(where, k=batch):
            x, a = plain(found, e, i, T)
            x = fitted(x, sizes)
            a = np.array(a, np.float32)
            pixels = (torch.from_numpy(x).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
            rows.append((pixels, torch.tensor(tokenizer(TEXT).input_ids),
                         torch.from_numpy(np.concatenate([a, a[-1:].repeat(T - len(a), 0)]))))
        yield [torch.stack(column) for column in zip(*rows)]


def rate(batches, batch, ahead, seconds):
    """Samples per second in a window of so many seconds, after the batches that were ready `ahead` of it."""
    for _ in range(ahead + 1):
        next(batches)
    start, n = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        next(batches)
        n += batch
    return n / passed


def measure(name, form, folder, batch, rounds, seconds=2.0):
    """A row's numbers for one method and form; None: it learns waypoints, which the form has not."""
    module = importlib.import_module(name)
    points = module.PREDICTS == "waypoints"
    if points and not form.startswith(("lerobot", "tabletop")):
        return None
    official = module.PRESETS[OFFICIAL[name]]
    look = {key: getattr(official, key) for key in LOOK if hasattr(official, key)}
    cfg = dataclasses.replace(module.PRESETS["tiny"], **look, **{"action_dim": 2 if points else 7})
    found, where = opened(form, folder, cfg, points)
    warnings.filterwarnings("ignore", "This DataLoader will create")
    tokenizer, stats, sizes = module.load_tokenizer(cfg), found.stats, sizes_of(module, cfg)
    prepare, collate = (partial(module.prepare, cfg=cfg, tokenizer=tokenizer, stats=stats),
                        partial(module.collate, cfg=cfg))
    spent, n = np.zeros(3), 8 * batch                          # reading, preparing, resizing
    for k in random.choices(range(len(found)), k=n):
        sample, clock = found[k], [time.process_time()]
        for work in (lambda: found[k], lambda: collate([prepare(sample)]),
                     lambda: [fitted(x, sizes) for x in sample["images"].values()]):
            work()
            clock.append(time.process_time())
        spent += np.diff(clock) * 1000 / n                     # ms of a core per sample
    sides = (iter(data.loader(found, prepare, collate, batch, workers=2)), 8), (
        loop(found, where, FORMS[form][1], sizes, cfg.horizon, batch), 0)
    rates = [[rate(side, batch, ahead, seconds) for side, ahead in sides] for _ in range(rounds)]
    (batches, _), clock = sides[1], time.process_time()
    for _ in range(8):
        next(batches)
    plain = (time.process_time() - clock) * 1000 / n
    (ours, base), ratio = map(statistics.median, zip(*rates)), statistics.median(a / b for a, b in rates)
    return {"per_s": ours, "ms": 1000 * batch / ours, "baseline": "a loop in the main process",
            "baseline_ms": 1000 * batch / base, "ratio": ratio, "rounds": rounds,
            "detail": {"image_size": cfg.image_size, "loop_per_s": base, "read_ms": spent[0],
                       "prepare_ms": spent[1], "plain_ms": plain, "quiet": 2 * plain / spent[:2].sum(),
                       "decode": min(1.0, (spent[0] + spent[2]) / spent[:2].sum())}}


def run(args, new_row):
    """Yield the rows: forms (--variant) times methods; print each as a line of a table."""
    forms = args.variant.split(",") if args.variant else list(FORMS)
    for form in forms:
        choose("--variant: loader has no", form, FORMS)
    print(f"{'form':12} {'method':13} {'side':>7} {'samples/s':>9} {'loop/s':>7} {'ratio':>6} {'quiet':>6} "
          f"{'decode':>6} {'read ms':>7} {'prep':>6} {'loop':>6}")
    torch.set_num_threads(1)                               # as in a worker: a loop's threads would only wait
    with tempfile.TemporaryDirectory() as root:
        for form in forms:
            folder = Path(root) / form
            folder.mkdir()
            if make := FORMS[form][0]:
                make(folder)
            for name in OFFICIAL:
                torch.manual_seed(0), random.seed(0)
                if row := measure(name, form, folder, args.batch or 8, args.rounds):
                    d = row["detail"]
                    side = d["image_size"] or "320x240"
                    print(f"{form:12} {name:13} {side:>7} {row['per_s']:9.0f} {d['loop_per_s']:7.0f} "
                          f"{row['ratio']:6.2f} {d['quiet']:6.2f} {d['decode']:6.2f} {d['read_ms']:7.2f} "
                          f"{d['prepare_ms']:6.2f} {d['plain_ms']:6.2f}", flush=True)
                    yield new_row(args, model=name, what="loader", variant=form, size="official",
                                  batch=args.batch or 8) | row
