"""
bench.py serve: what serve.py and its formats cost on top of model.act(), for one robot on this machine.

    OMP_NUM_THREADS=1 python benchmarks/bench.py serve --rounds 20 --inner 20
    python benchmarks/bench.py serve --variant openpi,v1-jpeg --out serve.jsonl

The script itself runs in a process of its own, with a tiny RoboVLMs that looks at two cameras and draws no
noise; this process is the robot, sends two pictures of 224 x 224 and waits for the actions. Requests and
act() in this process take turns, on the same pictures.

ms           from the pictures in the robot's memory to the actions in it: encoding, sockets, decoding, act()
baseline_ms  act() alone
detail       overhead_ms: the median (beside it p10 and p99) of ms less the time that the server says the
             model took (where its format says so), else less act() of that turn; bytes: of a request
"""
import base64
import contextlib
import dataclasses
import http.client
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import bench
import robovlms
from common import choose, keyed_rng

VIEWS, SIDE, TEXT = ("third", "wrist"), 224, "pick up the red cube"
ROOT = Path(__file__).resolve().parent.parent


def pictures(i):
    """{view: smooth noise}: PNG and JPEG find in it about what they find in a real picture."""
    small = keyed_rng(i, 5).integers(0, 256, (len(VIEWS), 28, 28, 3), np.uint8)
    return {view: np.array(Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            for view, x in zip(VIEWS, small)}


@contextlib.contextmanager
def server(model):
    """serve.py with this model in a process of its own -> its port."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        command = [sys.executable, ROOT / "serve.py", "--ckpt", folder, "--device", "cpu", "--port", "0",
                   "--wire", "openpi,openvla,vla0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                                   env=os.environ | {"PYTHONUNBUFFERED": "1"})
        try:
            line = next((line for line in process.stdout if "serving on" in line), None)
            if line is None:
                raise ValueError("serve.py did not start; its message stands above.")
            yield int(line.split("127.0.0.1:")[1].split()[0])
        finally:
            process.terminate()
            process.communicate()


# ---- Robots: each connects once, then asks(images) -> (actions (T, A), the model's milliseconds or None) ---

def encoded(image, form, **how):
    """base64 of a PNG or JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **how)
    return base64.b64encode(file.getvalue()).decode()


def saved(image):
    """base64 of np.save's bytes."""
    file = io.BytesIO()
    np.save(file, image)
    return base64.b64encode(file.getvalue()).decode()


def numbers(image):
    """json-numpy."""
    return {"__numpy__": base64.b64encode(image).decode(), "dtype": "|u1", "shape": image.shape}


def http_robot(port, path, body, read):
    """body(images) -> the request's JSON, read(the answer's) -> what asks returns."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(images):
        raw = json.dumps(body(images)).encode()
        link.request("POST", path, raw, {"Content-Type": "application/json"})
        answer = link.getresponse()
        value = json.loads(answer.read())
        if answer.status != 200:
            raise ValueError(f"{path} answered {answer.status}: {value}.")
        ask.bytes = len(raw)
        return read(value)
    return ask


def v1_robot(port, form, **how):
    """Our own format, with pictures as PNG or JPEG files."""
    return http_robot(port, "/v1/act", lambda images: {"instruction": TEXT, "images": {
        view: encoded(image, form, **how) for view, image in images.items()}},
        lambda value: (np.array(value["actions"]), value["infer_ms"]))


def openvla_robot(port):
    """OpenVLA-OFT's format."""
    def read(rows):
        return np.stack([np.frombuffer(base64.b64decode(x["__numpy__"]), x["dtype"]) for x in rows]), None
    return http_robot(port, "/act", lambda images: {
        "full_image": numbers(images["third"]), "wrist_image": numbers(images["wrist"]),
        "instruction": TEXT}, read)


def vla0_robot(port):
    """VLA-0's format."""
    return http_robot(port, "/predict_base64", lambda images: {
        "instr": TEXT, "state": [0.0] * 8, "base64_rgb": [saved(images[view]) for view in VIEWS]},
        lambda value: (np.array(value), None))


def openpi_robot(port):
    """openpi's format, over a socket."""
    import msgpack
    from websockets.sync.client import connect
    link = connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None).__enter__()
    link.recv()                                                # the server speaks first

    def array(x):
        return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}

    def ask(images):
        raw = msgpack.packb({"observation/image": images["third"], "prompt": TEXT,
                             "observation/wrist_image": images["wrist"]}, default=array)
        link.send(raw)
        value, ask.bytes = msgpack.unpackb(link.recv()), len(raw)
        actions = value["actions"]
        actions = np.frombuffer(actions[b"data"], actions[b"dtype"]).reshape(actions[b"shape"])
        return actions, value["server_timing"]["infer_ms"]
    return ask


ROBOTS = {"openpi": openpi_robot, "v1-png": lambda port: v1_robot(port, "PNG"),
          "v1-jpeg": lambda port: v1_robot(port, "JPEG", quality=90), "openvla": openvla_robot,
          "vla0": vla0_robot}


def measure(ask, act, rounds, inner, exact):
    """Requests and act() in turns -> the row's fields. exact: ValueError if their actions differ."""
    spent, alone, over, same = [], [], [], 0.0
    for r in range(rounds + 1):                                # the first is for warming up
        for i in range(inner):
            images = pictures(i)
            sides = [None, None]
            for side in (0, 1) if r % 2 else (1, 0):
                start = time.perf_counter()
                sides[side] = (act(images), None) if side else ask(images)
                (alone if side else spent).append(1000 * (time.perf_counter() - start))
            (got, model_ms), (want, _) = sides
            over.append(spent[-1] - (alone[-1] if model_ms is None else model_ms))
            same = max(same, float(np.abs(got - want).max()))
    if exact and same > 1e-6:
        raise ValueError(f"the server's actions differ by {same:.1e} from act()'s: no time counts.")
    spent, alone, over = (times[inner:] for times in (spent, alone, over))
    low, p50, high = np.percentile(spent, [10, 50, 90]).tolist()
    least, overhead, p99 = np.percentile(over, [10, 50, 99]).tolist()
    return {"ms": p50, "ms_p10": low, "ms_p90": high, "baseline": "act()", "rounds": rounds, "inner": inner,
            "baseline_ms": float(np.median(alone)), "per_s": 1000 / p50, "batch": 1,
            "check": f"actions differ by {same:.1e}" if exact else "JPEG: other pictures, not compared",
            "detail": {"overhead_p10_ms": least, "overhead_ms": overhead, "overhead_p99_ms": p99,
                       "bytes": ask.bytes}}


def run(args, new_row):
    """Yield a row for each form of request; also prints what it costs."""
    for name in args.variant or ():
        choose("--variant: serve has no", name, list(ROBOTS))
    torch.manual_seed(0)
    cfg = dataclasses.replace(robovlms.PRESETS["tiny"], views=VIEWS, history=1)
    model = robovlms.Model(cfg, robovlms.load_tokenizer(cfg), bench.STATS).eval()

    def act(images):
        return model.act([{"instruction": TEXT, "images": images}])[0][0]
    with server(model) as port:
        for name in args.variant or ROBOTS:
            found = measure(ROBOTS[name](port), act, args.rounds, args.inner, name != "v1-jpeg")
            detail = found["detail"]
            print(f"{name:8} {found['ms']:6.2f} ms, act() alone {found['baseline_ms']:.2f}: overhead p10 "
                  f"{detail['overhead_p10_ms']:.2f}, p50 {detail['overhead_ms']:.2f}, p99 "
                  f"{detail['overhead_p99_ms']:.2f} ms; {detail['bytes']:,} bytes; {found['check']}",
                  file=sys.stderr)
            yield new_row(args, model="serve", what="serve", variant=name, size="tiny", weights="random",
                          attn=model.attn, **found)
