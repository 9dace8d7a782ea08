"""
Drive a robot over HTTP: load a checkpoint, take pictures and an instruction, answer actions in robot units.

    pip install -e ".[serve]"
    python serve.py --ckpt runs/cogact-tiny/last               # http://127.0.0.1:8000, for this machine only
    python serve.py --ckpt CogACT/CogACT-Base --model cogact --unnorm-key bridge_orig --tokenizer FOLDER

    POST /v1/act    {"instruction": "pick up the red cube", "images": {view: base64 of a PNG or JPEG file},
                     "state"?: [S numbers], "unnorm_key"?: str, "mode"?: "chunk" or "step", "session"?: str}
                 -> {"actions": [[A numbers], ... T rows], "infer_ms": number, "info": {...}}
    POST /v1/stream {the same, mode "chunk"} -> lines of JSON: {"action": [A numbers]} as each one is decoded
                    (VLA-0; else all at the end), then {"infer_ms": number}, or {"error": line}: then stop
    POST /v1/reset  {"session"?: str}: forget the session's past. Call it before every episode in mode "step".
    POST /v1/ask    {"question", "ability", "image"}: RoboBrain-X0 points, boxes or traces in a picture
    POST /v1/sim    {"family"?, "seed"?, "body"?, "sim"?: one to replace}: a scene of eval_sim's tabletop
    POST /v1/sim/step   {"sim", "instruction"?, "unnorm_key"?}: the policy plays one step of it
    GET  /v1/info   method, horizon, action_dim, views and their sizes, norm keys, ...
    GET  /healthz   200: the model is loaded and has answered once (before that, nothing listens on the port)
    GET  /metrics   latency, queue, errors, failed predictions, sessions: Prometheus' text form
    GET  /          a page for people: try a picture, watch the tabletop (assets/index.html, all in one file)

Mode "chunk" (the default) keeps nothing: the next T actions, of which the client plays as many as it likes.
Mode "step" (the default with --execute k): one action, T = 1, of the session's own Policy (queue, ensemble).
Units and conventions (frame, rotation, gripper) are those of the dataset `unnorm_key`. A client's mistake is
4xx, ours 5xx, always {"error": "one line"}; a robot never receives NaN. A method that predicts points (a0)
answers "waypoints", [[u, v], ... T rows] in [0, 1] of the picture, instead of "actions", in mode "chunk"
only: motion needs depth and the camera's matrices, and is made beside the robot, by a0.Policy.

Requests that wait while the model is busy are then asked together (--batch), in the order in which they came;
a lone robot waits for nobody. On SIGTERM whatever was begun is answered, what comes later is refused (503).

--wire NAME[,NAME] answers clients of other projects as well, at the paths that they know (table WIRES). What
they call their cameras is matched to the model's views by name, else by kind: wrist, left or right wrist,
other; pictures that the model does not look at are left out. What belongs to a robot (queue, ensemble)
belongs to its connection, or to a session that its address names: http://HOST:8000/act?session=arm1
With a session there, or --execute, one action is answered, else the whole chunk. Also there: ?unnorm_key=KEY,
and a token: http://robot:TOKEN@HOST:8000. What is wrong is 4xx, in sockets an error frame, in all formats.
"""
import asyncio
import base64
import difflib
import hashlib
import hmac
import importlib.util
import inspect
import io
import ipaddress
import json
import math
import re
import secrets
import socket
import struct
import sys
import threading
import time
import traceback
import zlib
from collections import Counter, OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from PIL import Image

from common import Parser, choose, cli, device, is_text, pick_stats, within
from eval_sim import (BODIES, EMBODIMENTS, FAMILIES, PAIRS, Tabletop, dataset_name, find_method, load_model,
                      seeds)

MAX_BODY = 32 * 2**20          # bytes of one request
MAX_IMAGES = 8
MAX_SIDE = 4096                # pixels of an image, read from its header before anything is decoded
MAX_TEXT = 2000                # characters of the instruction, and of every other text but images
MAX_STATE = 1000               # numbers
MAX_SESSIONS = 64              # the session unused for longest is forgotten first
MAX_SIMS = 8                   # simulators: likewise
BODY_SECONDS = 30              # that a client has to send its request
SESSION_SECONDS = 3600         # without a request, until a session is forgotten
DRAIN_SECONDS = 25             # after SIGTERM, to answer what was begun
JSON_NAMES = {str: "a string", dict: "an object", list: "a list", bool: "true or false", int: "a number",
              float: "a number", type(None): "nothing", np.ndarray: "an array"}
# what Pillow raises on torn and hostile files
TORN = (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)


class Refused(Exception):
    """An answer other than actions: an HTTP status and one line for the client."""

    def __init__(self, status, message):
        super().__init__(" ".join(str(message).split())[:1000])
        self.status = status


# ---- Reading a request: everything is checked here, then trusted -------------------------------------------

def parse(raw, fields, more=False, hook=None, long=()):
    """The bytes of a request -> a dict. fields: {name: JSON kind of its value} of what may be in it.

    more: other fields may be there too, of any kind; hook: json's object_hook; long: texts of any length.
    """
    try:
        body = json.loads(raw, object_hook=hook)
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"the body is not JSON: {e}. Send one UTF-8 JSON object.") from e
    if not isinstance(body, dict):
        raise Refused(400, f"the body is {JSON_NAMES[type(body)]}; send an object with {', '.join(fields)}.")
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name not in fields and more:
            continue
        if name not in fields:
            near = difflib.get_close_matches(name[:100], fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}."
            raise Refused(400, f"unknown field {name[:100]!r}; {hint}")
        if not isinstance(value, fields[name]):
            found = JSON_NAMES[type(value)]
            raise Refused(400, f'"{name}" must be {JSON_NAMES[fields[name]]}, found {found}.')
        if isinstance(value, str) and name not in long and len(value) > MAX_TEXT:
            raise Refused(413, f'"{name}" has {len(value):,} characters, at most {MAX_TEXT} are taken.')
    return body


def read_base64(name, text):
    """base64 -> bytes."""
    if not isinstance(text, str):
        raise Refused(400, f"{name} must be a string (base64), found {JSON_NAMES[type(text)]}.")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as e:
        raise Refused(400, f"{name} is not base64 ({e}); no line breaks, no data: prefix.") from e


def open_image(name, raw):
    """The bytes of a PNG or JPEG file -> a Pillow image that is not decoded yet, of a size that may be."""
    try:
        image = Image.open(io.BytesIO(raw), formats=("PNG", "JPEG"))         # reads the header only
    except TORN as e:
        raise Refused(400, f"{name} ({len(raw):,} bytes) is no whole PNG or JPEG file.") from e
    if max(image.size) > MAX_SIDE:
        w, h = image.size
        raise Refused(413, f"{name} is {w} x {h} pixels, at most {MAX_SIDE} per side are taken.")
    return image


def read_image(name, raw):
    """The bytes of a PNG or JPEG file -> uint8 (h, w, 3) RGB."""
    image = open_image(name, raw)
    if image.mode != "RGB":                                                  # alpha, grey, depth
        raise Refused(400, f"{name} has Pillow mode {image.mode!r}; send 8-bit RGB.")
    try:
        image.load()
    except TORN as e:
        raise Refused(400, f"{name} ({len(raw):,} bytes) is no whole PNG or JPEG file.") from e
    return np.array(image)                                                   # (h, w, 3)


def read_array(name, data, dtype, shape):
    """bytes, "<f4", [rows, ...] -> array; nothing but plain numbers, and exactly as many as are there."""
    fine = isinstance(dtype, str) and re.fullmatch("[<>=|]?(b1|[iu][1248]|f[248])", dtype) and \
        isinstance(shape, (list, tuple)) and len(shape) < 5 and all(type(n) is int and n > 0 for n in shape)
    if not fine or not isinstance(data, bytes) or len(data) != math.prod(shape) * int(dtype[-1]):
        raise Refused(400, f"{name} is no array of numbers, or torn: dtype {str(dtype)[:20]!r}, shape "
                      f"{str(shape)[:40]}.")
    return np.frombuffer(data, dtype).reshape(shape).copy()                  # writable


def match_views(images, views):
    """Pictures under a client's names -> {view: picture}: by name, else by kind if it is the only one."""
    def kind(name):
        side = re.search("left_wrist|right_wrist", name.lower())
        return side[0] if side else "wrist" if re.search("wrist|gripper|hand", name.lower()) else "other"

    check_count(images)
    kinds, found = {name: kind(name) for name in (*images, *views)}, {}
    for view in views:
        rivals = [v for v in views if v not in images and kinds[v] == kinds[view]]
        alike = [name for name in images if name not in views and kinds[name] == kinds[view]]
        if view not in images and (len(rivals), len(alike)) != (1, 1):
            names = sorted(name[:100] for name in images)
            raise Refused(400, f"there are the pictures {names}, this model looks at {list(views)}; which "
                          f"one is {view!r}? Send it under that name.")
        found[view] = images[view if view in images else alike[0]]
    return found


def check_count(images):
    """Refuse more than MAX_IMAGES."""
    if len(images) > MAX_IMAGES:
        raise Refused(413, f'"images" holds {len(images)} images, at most {MAX_IMAGES} are taken.')


def observe(cfg, instruction, images, state=None):
    """What a client sent -> observation: instruction, images {view: uint8 (h, w, 3)}, if sent state (S,)."""
    if not is_text(instruction):
        raise Refused(400, '"instruction" is missing, empty or no valid Unicode; say what to do.')
    if len(instruction) > MAX_TEXT:
        raise Refused(413, f"the instruction has {len(instruction):,} characters, at most {MAX_TEXT}.")
    for name, image in images.items():
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or max(image.shape) > MAX_SIDE:
            raise Refused(400, f"the picture of {name!r} is {image.dtype} {list(image.shape)}; send uint8 "
                          f"[height, width, 3], RGB, at most {MAX_SIDE} per side.")
    observation = {"instruction": instruction, "images": images}
    if state is not None:
        state = state.tolist() if isinstance(state, np.ndarray) and state.size <= MAX_STATE else state
        numbers = isinstance(state, list) and len(state) <= MAX_STATE
        size = getattr(cfg, "state_dim", 0) or (len(state) if numbers else MAX_STATE)
        fine = numbers and all(type(v) in (int, float) and abs(v) < 1e30 for v in state)     # True is an int
        if not fine or len(state) != size:
            found = f"{len(state)}: {str(state[:20])[:100]}" if numbers else "something else"
            raise Refused(400, f'"state" must be {size} finite numbers, found {found}.')
        observation["state"] = np.asarray(state, np.float32)                 # (S,)
    return observation


def read_observation(body, cfg):
    """A parsed request of ours -> observation. Here the pictures carry the views' names, and no others."""
    images = body.get("images", {})
    check_count(images)
    if set(images) != set(cfg.views):                  # a picture under another name may be of another camera
        found = sorted(view[:100] for view in images)
        raise Refused(400, f'"images" has the views {found}; this model looks at {list(cfg.views)}: '
                      "send exactly these.")
    decoded = {}
    for view, text in images.items():
        decoded[view] = read_image(f"images[{view!r}]", read_base64(f"images[{view!r}]", text))
    return observe(cfg, body.get("instruction"), decoded, body.get("state"))


class Asked(NamedTuple):
    """What a route of another project's format gets: of HTTP the body, of a socket one frame."""
    raw: bytes
    query: dict = {}
    content_type: str = ""
    session: object = None             # the connection's; None: HTTP has none, see `?session=`


# ---- The service: one model in its own thread, one Policy per session --------------------------------------

@dataclass(eq=False)
class Job:
    """What waits for the model. work: a generator (Service.play, or `once`); its future gets (*what that
    returns, milliseconds). alike: jobs equal in this may be asked together, but no two of one session."""
    work: object
    alike: object = None
    session: object = None
    future: Future = field(default_factory=Future)

    def joins(self, jobs):
        """May it be asked together with these, which wait before it?"""
        own = self.session is not None and any(self.session == job.session for job in jobs)
        return self.alike is not None and self.alike == jobs[0].alike and not own


def once(function):
    """A generator that asks nothing, and returns (function(),)."""
    return (function(),)
    yield


class Times:
    """Milliseconds of the newest 10,000 calls, and the number and sum of all."""

    def __init__(self):
        self.newest, self.count, self.sum = deque(maxlen=10_000), 0, 0.0

    def since(self, start):
        """Add the time since `start` (of time.perf_counter)."""
        ms = 1000 * (time.perf_counter() - start)
        self.newest.append(ms)
        self.count, self.sum = self.count + 1, self.sum + ms


def expire(known, most):
    """Drop the first of an OrderedDict, whose values end with when they were used, until there are at most so
    many, all used within SESSION_SECONDS -> what was dropped."""
    gone = []
    while len(known) > most or known and time.monotonic() - next(iter(known.values()))[-1] > SESSION_SECONDS:
        gone.append(known.popitem(last=False)[1])
    return gone


class Service:
    """What the routes do, apart from HTTP. The model has answered once when __init__ returns; `run` is its
    thread, which begins and ends with the server."""

    def __init__(self, model, unnorm_key=None, execute=None, checkpoint="", wire=(), official=False, batch=8,
                 **options):
        self.model, self.cfg, self.options = model.eval(), model.cfg, options
        self.wire, self.official, self.asked_key, self.batch = wire, official, unnorm_key, batch
        self.method = importlib.import_module(type(model).__module__)
        self.points = self.method.PREDICTS != "actions"                      # no robot's units
        if self.points and (unnorm_key or execute):
            raise ValueError(f"--unnorm-key, --execute: {self.method.__name__} answers points in the "
                             "picture, no actions; leave them out.")
        if self.points and wire:
            raise ValueError(f"--wire {','.join(wire)}: {self.method.__name__} answers points in the "
                             "picture, these formats carry actions; leave it out.")
        if "robobrain" in wire:
            check_robot(self.method, self.cfg)
        if unnorm_key is None and len(model.stats) == 1 and not self.points:
            unnorm_key, = model.stats
        self.unnorm_key, self.execute = unnorm_key, execute
        self.waiting, self.came, self.stopped = deque(), threading.Condition(), False
        self.pool = ThreadPoolExecutor(2 * MAX_SESSIONS, "request")          # threads that read and wait
        self.draining, self.under_way = False, 0     # SIGTERM came; requests that are not answered yet
        self.times = {"": Times()}                   # of paths: from request to answer; "": of the model
        self.asked, self.errors, self.flaws = 0, Counter(), Counter()        # observations, statuses, kinds
        self.sessions = OrderedDict()                # name: (key, instruction), Policy, when it was used
        self.sims = OrderedDict()                    # name: its Tabletop, a lock, when it was used
        key = next(iter(model.stats), None) if unnorm_key is None else unnorm_key
        size = self.cfg.image_size
        if not self.points:
            pick_stats(model.stats, key)                                     # a wrong --unnorm-key fails here
        try:
            installed = version("plainvla")
        except PackageNotFoundError:
            installed = "not installed"
        self.info = {"method": self.method.__name__, "preset": model.preset, "checkpoint": checkpoint,
                     "predicts": self.method.PREDICTS, "version": installed,
                     "device": str(model.device), "attention": model.attn,
                     "graphs": model.graphs.capture is not None,
                     "views": {view: [size, size] if size else None for view in self.cfg.views},   # None: any
                     "state_dim": getattr(self.cfg, "state_dim", 0),
                     "horizon": self.cfg.horizon, "action_dim": self.cfg.action_dim,
                     "control_hz": getattr(self.cfg, "control_hz", None),
                     "norm_keys": sorted(model.stats), "unnorm_key": unnorm_key,
                     "mode": "step" if execute else "chunk", "execute": self.policy(key).execute,
                     "wire": list(wire), "abilities": [*getattr(self.method, "ABILITIES", ())],
                     "sim": {body: list(FAMILIES + PAIRS) for body in BODIES if self.fits(body)}}
        black = {view: np.zeros((size or 240, size or 320, 3), np.uint8) for view in self.cfg.views}
        state = np.zeros(self.info["state_dim"], np.float32)
        for _ in range(2 if model.graphs.capture else 1):      # what no graph can hold fails here, not later
            (answer,) = self.predict([{"images": black, "instruction": "warm up", "state": state}], key)
            if isinstance(answer, Exception):
                raise answer
        self.times, self.asked = {"": Times()}, 0                            # the first one is slow

    def policy(self, key):
        """A fresh Policy: what one session remembers."""
        return self.method.Policy(self.model, unnorm_key=key, execute=self.execute)

    def flaw(self, kind, line):
        """The error for a prediction that nobody may get, which is counted."""
        self.flaws[kind] += 1
        return Refused(500, line)

    # -- the model's thread, and its queue

    def aside(self, function, *args):
        """function(*args) in a thread of its own -> what the event loop awaits for its result."""
        return asyncio.get_running_loop().run_in_executor(self.pool, function, *args)

    def queue(self, job):
        """Put a job into the queue -> its future."""
        with self.came:
            if self.stopped:
                raise Refused(503, "the server has stopped.")
            self.waiting.append(job)
            self.came.notify()
        return job.future

    def do(self, function):
        """What function() returns, in the model's thread, after all that came before."""
        return self.queue(Job(once(function))).result()[0]

    def stop(self):
        """End the threads, after what waits."""
        with self.came:
            self.stopped = True
            self.came.notify()
        self.pool.shutdown(wait=False)

    def run(self):
        """Answer what waits, in order. What came while the model was busy goes together, if it is alike;
        for company nobody waits."""
        while True:
            with self.came:
                self.came.wait_for(lambda: self.waiting or self.stopped)
                if not self.waiting:
                    return
                jobs = [self.waiting.popleft()]
                while self.waiting and len(jobs) < self.batch and self.waiting[0].joins(jobs):
                    jobs.append(self.waiting.popleft())
            start = time.perf_counter()
            asked = [(job, ask) for job in jobs if (ask := self.advance(job, start)) is not None]
            answers = self.predict([ask for _, ask in asked], jobs[0].alike[0]) if asked else ()
            for (job, _), answer in zip(asked, answers):
                self.advance(job, start, answer)

    def advance(self, job, start, answer=None):
        """Let a job go on with the model's answer -> what it asks, or None: it ended, its future is set."""
        try:
            return job.work.throw(answer) if isinstance(answer, Exception) else job.work.send(answer)
        except StopIteration as end:
            job.future.set_result((*end.value, 1000 * (time.perf_counter() - start)))        # without waiting
        except ValueError as e:                                              # a check of the method's own
            job.future.set_exception(Refused(400, e))
        except Exception as e:                                               # whoever asked hears of it
            job.future.set_exception(e)

    def predict(self, observations, key):
        """One inference -> for each observation ((T, A) finite, info), or what is wrong with it."""
        start, n = time.perf_counter(), len(observations)
        try:
            chunks, info = self.model.act(observations, unnorm_key=key, **self.options)
        except Exception as e:
            if isinstance(e, ValueError) and n > 1:            # the fault of one of them, not of the others
                return [answer for each in observations for answer in self.predict([each], key)]
            return [Refused(400, e) if isinstance(e, ValueError) else e] * n
        self.times[""].since(start)                                          # act has waited for the device
        self.asked += n
        failed, said = np.broadcast_to(info.get("parse_failed", False), n), info.get("subtasks", [""] * n)
        return [self.judge(*each) for each in zip(chunks, failed, said, strict=True)]

    def judge(self, chunk, failed, said):
        """A chunk (T, A), could its answer not be read, its sub-task -> (chunk, info), or what is wrong."""
        if not np.isfinite(chunk).all():
            return self.flaw("not_finite", "the model's actions are not finite; none were sent. Check the "
                             "checkpoint.")
        if failed:
            return self.flaw("parse_failed", "the model's answer could not be read as actions; none were "
                             "sent. Ask again.")
        return chunk, {"subtask": said} if said else {}

    def play(self, observation, key, mode, session):
        """A generator: yields what to ask the model, takes its answer, returns ((T, A), info). In mode "step"
        that is one action of the session's Policy; an error forgets the session, as its past has a gap."""
        if mode == "chunk":
            return (yield observation)
        instruction = observation["instruction"]
        known, policy, _ = self.sessions.pop(session, (None, None, 0))
        if known != (key, instruction):
            policy = self.policy(key)
        chunk, info = (yield policy.ask(observation)) if policy.needs_chunk else (None, {})
        action = policy.step(observation, chunk)                             # (A,)
        self.sessions[session] = (key, instruction), policy, time.monotonic()        # at the end: the newest
        expire(self.sessions, MAX_SESSIONS)
        return action[None], info if chunk is None else {**info, "chunk": chunk}

    def answer(self, observation, key=None, mode="chunk", session=None):
        """An observation -> ((T, A), info, milliseconds): all formats ask for this. T is 1 in mode "step"."""
        arrays = {**observation, **observation["images"]}
        shapes = {name: x.shape for name, x in arrays.items() if isinstance(x, np.ndarray)}
        return self.queue(Job(self.play(observation, key, mode, session), (key, shapes, set(observation)),
                              (session,) if mode == "step" else None)).result()

    def read(self, raw):
        """The body of /v1/act -> (observation, key, mode, session)."""
        body = parse(raw, {"instruction": str, "images": dict, "state": list, "unnorm_key": str, "mode": str,
                           "session": str})
        key, mode = body.get("unnorm_key", self.unnorm_key), body.get("mode", self.info["mode"])
        if mode not in ("chunk", "step"):
            raise Refused(400, f'"mode" is {mode[:100]!r}; choose "chunk" or "step".')
        if self.points and (mode == "step" or key):
            raise Refused(400, f'{self.method.__name__} answers points in the picture: mode "chunk", no '
                          '"unnorm_key". a0.Policy, beside the robot, makes them motion.')
        return read_observation(body, self.cfg), key, mode, body.get("session")

    def act(self, asked):
        """The answer to POST /v1/act."""
        observation, key, mode, session = self.read(asked.raw)
        actions, info, ms = self.answer(observation, key, mode, session)
        return {self.method.PREDICTS: actions.tolist(), "infer_ms": round(ms, 3),
                "info": {"mode": mode, "unnorm_key": key, **{k: v for k, v in info.items() if k != "chunk"}}}

    def decode(self, observation, key):
        """Yield the chunk's rows, each as soon as it is decoded where the method can, else all at the end."""
        if not hasattr(self.model, "stream"):
            (answer,) = self.predict([observation], key)
            if isinstance(answer, Exception):
                raise answer
            yield from answer[0]
            return
        steps = self.model.stream(observation, unnorm_key=key, **self.options)
        start = time.perf_counter()
        while True:
            try:
                _, row = next(steps)
            except StopIteration as end:
                problem = end.value
                break
            if not np.isfinite(row).all():
                raise self.flaw("not_finite", "an action is not finite; stop. Check the checkpoint.")
            yield row
        if problem:
            raise self.flaw("parse_failed", f"the model's answer breaks off: {problem}. Stop, ask again.")
        self.times[""].since(start)

    def rows(self, observation, key):
        """The rows of `decode`, which runs in the model's thread."""
        rows = SimpleQueue()
        job = Job(once(lambda: [rows.put(row) for row in self.decode(observation, key)]))
        job.future.add_done_callback(lambda _: rows.put(None))
        self.queue(job)
        while (row := rows.get()) is not None:
            yield row
        job.future.result()                                                  # or what went wrong

    def stream(self, asked):
        """The lines that answer POST /v1/stream."""
        observation, key, mode, _ = self.read(asked.raw)
        if mode == "step":
            raise Refused(400, 'a stream is of one chunk: "mode" must be "chunk".')
        start = time.perf_counter()
        for row in self.rows(observation, key):
            yield {self.method.PREDICTS.removesuffix("s"): row.tolist()}
        yield {"infer_ms": round(1000 * (time.perf_counter() - start), 3)}

    def mode_of(self, asked):
        """Of another project's request: single actions for a named session, or with --execute."""
        return "step" if "session" in asked.query else self.info["mode"]

    def ask(self, asked, instruction, images, state=None, key=None, mode=None):
        """What another project's client sent, read so far -> ((T, A), milliseconds).

        images: {its name of the camera: array}. A state is left out where the model takes none.
        """
        observation = observe(self.cfg, instruction, match_views(images, self.cfg.views),
                              state if self.info["state_dim"] else None)
        mode, session = mode or self.mode_of(asked), asked.session or asked.query.get("session")
        if mode == "step" and not session:                    # queues never belong to whoever comes along
            raise Refused(400, "single actions need a session: add ?session=NAME to the address.")
        key = key or asked.query.get("unnorm_key", self.unnorm_key)
        actions, _, ms = self.answer(observation, key, mode, session)
        return actions, ms

    def forget(self, session):
        """Forget what a session remembers, after what it asked before; was there anything?"""
        return self.do(lambda: self.sessions.pop(session, None) is not None)

    def reset(self, asked):
        """The answer to POST /v1/reset."""
        session = parse(asked.raw or b"{}", {"session": str}).get("session")
        return {"forgotten": self.forget(session)}

    # -- what the page asks for

    def ask_ability(self, asked):
        """The answer to POST /v1/ask: {"text", "points" (n, 2) or "boxes" (n, 4), in [0, 1], "infer_ms"}."""
        body = parse(asked.raw, {"question": str, "ability": str, "image": str}, long=("image",))
        if not self.info["abilities"]:
            raise Refused(400, f"{self.method.__name__} answers no questions; a robobrain_x0 does.")
        image, ability = read_image("image", read_base64("image", body.get("image"))), body.get("ability", "")
        question, start = body.get("question"), time.perf_counter()
        observe(self.cfg, question, {"image": image})                        # is it a text?
        found, text = self.do(lambda: self.model.answer(image, question, ability))
        value = {"text": text, "infer_ms": round(1000 * (time.perf_counter() - start), 3)}
        if isinstance(found, np.ndarray):                                    # (n, 2) or (n, 4) [pixels]
            scale = np.resize(image.shape[1::-1], found.shape[1])
            value["points" if len(scale) == 2 else "boxes"] = (found / scale).clip(0, 1).tolist()
        return value

    def sim_key(self, body):
        """Whose statistics actions of this body of the tabletop have."""
        name = dataset_name(body)
        return None if self.points else name if name in self.model.stats else self.unnorm_key

    def fits(self, body):
        """Can the model act with this body of the tabletop?"""
        try:
            Tabletop(views=self.cfg.views, embodiment=body)
            stats = {} if self.points else pick_stats(self.model.stats, self.sim_key(body))
        except ValueError:                                                   # it looks at other cameras
            return False
        return EMBODIMENTS[body][0] == len(next(iter(stats.values()), [0] * 7))

    def sim_start(self, asked):
        """The answer to POST /v1/sim: a new scene, as `sim_view` shows it."""
        body = parse(asked.raw or b"{}", {"family": str, "seed": int, "body": str, "sim": str})
        robot = body.get("body", next(iter(self.info["sim"]), None))
        if robot not in self.info["sim"]:
            raise Refused(400, f"this model acts with {list(self.info['sim']) or 'no body'} of the tabletop.")
        try:
            env = Tabletop((body.get("family", FAMILIES[0]),), "eval", self.cfg.views,
                           self.cfg.image_size or (240, 320), robot)
            env.lay_out(seeds("eval", 1, body.get("seed", secrets.randbelow(10**6)))[0])
        except ValueError as e:
            raise Refused(400, e) from e
        name = secrets.token_hex(8)
        with self.came:
            old = [self.sims.pop(body["sim"])] if body.get("sim") in self.sims else []
            self.sims[name] = env, threading.Lock(), time.monotonic()
            old += expire(self.sims, MAX_SIMS)
        for gone, *_ in old:
            self.forget(gone)
        return self.sim_view(name, env)

    def sim_step(self, asked):
        """The answer to POST /v1/sim/step: the scene after one action of the policy, and that action."""
        body = parse(asked.raw, {"sim": str, "instruction": str, "unnorm_key": str})
        name = body.get("sim")
        with self.came:
            env, turn, _ = self.sims.pop(name, (None, None, 0))
            if env is None:
                raise Refused(404, "there is no such simulator (any more); begin one: POST /v1/sim.")
            self.sims[name] = env, turn, time.monotonic()                    # at the end: the newest
        with turn:
            if env.success() or env.count >= env.max_steps:
                raise Refused(409, "this episode is over; begin another: POST /v1/sim.")
            env.instruction = body.get("instruction", env.instruction)
            seen = env.observe()
            observe(self.cfg, env.instruction, seen["images"])               # is it a text?
            key = body.get("unnorm_key", self.sim_key(env.embodiment))
            (action,), info, ms = self.answer(seen, key, "step", env)
            try:
                env.advance(action)
            except ValueError as e:                                          # another body's statistics
                raise Refused(400, e) from e
            if "chunk" in info:
                info[self.method.PREDICTS] = info.pop("chunk").tolist()
            return {**self.sim_view(name, env), **info, "action": action.tolist(), "infer_ms": round(ms, 3)}

    def sim_view(self, name, env):
        """A simulator as JSON; picture: base64 of a PNG file of the third-person camera."""
        file = io.BytesIO()
        Image.fromarray(env.picture("third", 320, 320)[0]).save(file, "PNG")
        return {"sim": name, "body": env.embodiment, "instruction": env.instruction, "steps": env.count,
                "max_steps": env.max_steps, "success": env.success(), "seed": env.seed % 10**6,
                "picture": base64.b64encode(file.getvalue()).decode()}

    # -- what the operator sees

    def failed(self, status):
        """Count an error."""
        with self.came:
            self.errors[status] += 1

    def metrics(self):
        """Prometheus' text form. Quantiles are of the newest 10,000 calls."""
        spent = []
        for path, times in sorted(self.times.items()):                       # "": the model alone
            of, newest = f'path="{path or "model"}"', [*times.newest] or [0]
            spent += [(f'{{{of},quantile="{q}"}}', np.quantile(newest, q) / 1000) for q in (0.5, 0.95, 0.99)]
            spent += [(f"_sum{{{of}}}", times.sum / 1000), (f"_count{{{of}}}", times.count)]
        errors = [(f'{{code="{code}",kind="{HTTPStatus(code).phrase}"}}', n)
                  for code, n in sorted(self.errors.items())]
        flaws = [(f'{{kind="{kind}"}}', self.flaws[kind]) for kind in ("parse_failed", "not_finite")]
        rows = {"queue_length gauge": len(self.waiting), "requests_under_way gauge": self.under_way,
                "sessions gauge": len(self.sessions), "simulators gauge": len(self.sims),
                "observations_total counter": self.asked, "errors_total counter": errors,
                "failed_predictions_total counter": flaws, "seconds summary": spent}
        text = ""
        for name, found in rows.items():
            text += f"# TYPE plainvla_{name}\n"
            for label, value in found if isinstance(found, list) else [("", found)]:
                text += f"plainvla_{name.split()[0]}{label} {value:.9g}\n"
        return text

    def summary(self):
        """p50, p95 and p99 of the inference times, in words."""
        newest = self.times[""].newest
        if not newest:
            return "no inferences"
        p50, p95, p99 = np.percentile(newest, [50, 95, 99])
        return f"the last {len(newest)} inferences: p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms"


# ---- Other projects' formats -------------------------------------------------------------------------------
# Each route is a function (service, Asked) -> a JSON value, (status, JSON value), or a generator of lines;
# of a socket: -> the frame to send, bytes or text, or None.

def pictures(*maps):
    """The arrays of three dimensions in some maps, channels last; openpi's ALOHA sends them first."""
    found = {str(name).removeprefix("observation/"): x for each in maps if isinstance(each, dict)
             for name, x in each.items() if isinstance(x, np.ndarray) and x.ndim == 3}
    return {name: x.transpose(1, 2, 0) if x.shape[0] == 3 != x.shape[2] else x for name, x in found.items()}


def from_json(value):
    """json-numpy: {"__numpy__": base64, "dtype", "shape"} -> array."""
    if "__numpy__" not in value:
        return value
    data = read_base64("an array", value["__numpy__"])
    return read_array("an array", data, value.get("dtype"), value.get("shape"))


def to_json(array):
    """Array -> json-numpy."""
    return {"__numpy__": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str,
            "shape": list(array.shape)}


def openvla_act(service, asked):
    """OpenVLA's form, {"image", "instruction", "unnorm_key"?}: one action (A,), without a session the first
    of a fresh chunk; OFT's, {"full_image", other cameras, "state"?, "instruction"}: a list of them. A request
    within {"encoded": its JSON as a string} is answered by a string likewise."""
    known = {"instruction": str, "unnorm_key": str}
    body = parse(asked.raw, known, more=True, hook=from_json)
    double = "encoded" in body
    if double and not isinstance(body["encoded"], str):
        raise Refused(400, '"encoded" must be a string, the JSON of the request.')
    if double:
        body = parse(body["encoded"], known, more=True, hook=from_json)
    actions, _ = service.ask(asked, body.get("instruction"), pictures(body), body.get("state"),
                             body.get("unnorm_key"))
    value = to_json(actions[0]) if "image" in body else [to_json(row) for row in actions]
    return json.dumps(value) if double else value


def read_form(asked):
    """multipart/form-data -> {name: bytes}."""
    boundary = re.search(r'boundary="?([^";,]+)', asked.content_type)
    mark, parts = b"\r\n--" + (boundary[1] if boundary else "none").encode("latin-1"), {}
    for part in (b"\r\n" + asked.raw).split(mark, MAX_IMAGES)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'[; ]name="?([^";\r]*)', head)
        parts[name[1].decode("latin-1") if name else ""] = content
    return parts


def cogact_inference(service, asked):
    """Two files, `images` (one PNG or JPEG) and `json` {"task_description"}: a chunk as a list of lists, or,
    of a session, one action of its ensemble as a list."""
    parts = read_form(asked)
    if not {"images", "json"} <= set(parts):
        raise Refused(400, f"the form has the parts {sorted(parts)[:9]}; send the files 'images' and 'json'.")
    about = parse(parts["json"], {"task_description": str}, more=True)
    images = {"image": read_image("images", parts["images"])}
    actions, _ = service.ask(asked, about.get("task_description"), images)
    return actions[0].tolist() if service.mode_of(asked) == "step" else actions.tolist()


NPY = re.compile(rb"\x93NUMPY\x01\x00..\{'descr': '([^']{2,4})', 'fortran_order': (True|False), "
                 rb"'shape': \(([\d, ]{1,60})\), *\} *\n", re.S)


def read_npy(name, raw):
    """The bytes of np.save -> array. np.load would take the memory that a header claims before it looks."""
    head = NPY.match(raw)
    if not head:
        raise Refused(400, f"{name} is no file of np.save with plain numbers.")
    shape = [int(n) for n in head[3].split(b",") if n.strip()]
    order = -1 if head[2] == b"True" else 1
    return read_array(name, raw[head.end():], head[1].decode("latin-1"), shape[::order]).transpose(
        range(len(shape))[::order])


def vla0_request(service, asked):
    """{"base64_rgb": one base64 of np.save's bytes per camera, in the model's order, "state", "instr"}."""
    body = parse(asked.raw, {"base64_rgb": list, "state": list, "instr": str}, more=True)
    pictures, views = body.get("base64_rgb", []), service.cfg.views
    if len(pictures) != len(views):
        raise Refused(400, f'"base64_rgb" holds {len(pictures)} pictures; send one each of {list(views)}.')
    images = {view: read_npy(view, read_base64(view, text)) for view, text in zip(views, pictures)}
    return body.get("instr"), images, body.get("state")


def vla0_predict(service, asked):
    """The chunk as a list of lists."""
    return service.ask(asked, *vla0_request(service, asked))[0].tolist()


def vla0_stream(service, asked):
    """Lines {"index", "value"}, each step once, then {"time_taken": seconds}, or {"error": line}."""
    instruction, images, state = vla0_request(service, asked)
    observation = observe(service.cfg, instruction, images, state if service.info["state_dim"] else None)
    start = time.perf_counter()
    for index, row in enumerate(service.rows(observation, asked.query.get("unnorm_key", service.unnorm_key))):
        yield {"index": index, "value": row.tolist()}
    yield {"time_taken": time.perf_counter() - start}


def check_robot(method, cfg):
    """A ValueError unless the checkpoint is RoboBrain-X0's and drives one of its robots."""
    if method.__name__ != "robobrain_x0":
        raise ValueError(f"--wire robobrain: its poses are made from RoboBrain-X0's deltas, this is a "
                         f"checkpoint of {method.__name__}; choose another format.")
    robots = {name: r for name, r in method.ROBOTS.items() if r.name}
    r = robots.get(cfg.robot)
    if r is None:
        raise ValueError(f"--wire robobrain: the checkpoint's robot {cfg.robot!r} has no such service; set "
                         f"--robot to one of {', '.join(robots)}.")
    if (cfg.horizon, cfg.action_dim) != (r.horizon, 7 * r.arms):
        raise ValueError(f"--wire robobrain: {cfg.robot} plays chunks of {r.horizon} x {7 * r.arms}, this "
                         f"checkpoint's are {cfg.horizon} x {cfg.action_dim}; choose another --robot.")


def robobrain_infer(service, asked):
    """{"eef_pose", "instruction", "images"} -> {"success", "eepose": 30 absolute poses, "processing_time",
    "subtask"?}. A failed decode is 422 and the pose held, unless --official."""
    x0, model, cfg = service.method, service.model, service.cfg
    words, start = model.tokenizer, time.perf_counter()
    stats = {name: entry["action"] for name, entry in model.stats.items()}
    if service.asked_key:                              # --unnorm-key stands for what this robot looks up
        stats |= dict.fromkeys(x0.ROBOTS[cfg.robot].stats, stats[service.asked_key])
    free = service.official or not cfg.constrained
    mode = "free" if free else "subtask" if cfg.subtask else "actions"
    try:
        body = parse(asked.raw, {"instruction": str}, more=True)
        images = body.get("images")
        for camera, text in images.items() if isinstance(images, dict) else ():
            if camera in x0.ROBOTS[cfg.robot].cameras:       # decode no huge ones, and no other formats
                open_image(camera, read_base64(camera, text))
        status, value = service.do(lambda: x0.infer(
            cfg.robot, body, lambda *a: model.complete(*a, mode), words.decode, words.actions, stats,
            cfg.subtask, service.official, cfg=cfg))
    except Refused as e:
        return 500 if service.official else e.status, {"success": False, "error": str(e)}
    if status == 200:
        value["processing_time"] = time.perf_counter() - start
        service.times[""].since(start)
    service.flaws["parse_failed"] += not value.get("decode_ok", True)
    return status, value


def robobrain_health(service, asked):
    """The official GET /health, with the GPU's memory."""
    import torch
    gpu, gib = None, 2**30
    if service.model.device.type == "cuda":
        gpu = {"name": torch.cuda.get_device_name(),
               "memory_allocated": f"{torch.cuda.memory_allocated() / gib:.2f}GB",
               "memory_reserved": f"{torch.cuda.memory_reserved() / gib:.2f}GB"}
    cfg = service.cfg
    return service.method.health(cfg.robot, cfg.subtask, service.info["checkpoint"], gpu_info=gpu)


def robobrain_info(service, asked):
    """The official GET /info."""
    return service.method.service_info(service.cfg.robot, service.cfg.subtask, service.info["checkpoint"])


def from_msgpack(value):
    """Arrays of openpi (keys are bytes) and of vla-eval (text), and its encoded pictures."""
    v = {name.decode("latin-1") if isinstance(name, bytes) else name: x for name, x in value.items()}
    if v.get("__image__") and v.get("format") in ("png", "jpeg"):
        return read_image("an image", v["data"] if isinstance(v.get("data"), bytes) else b"")
    if v.get("__ndarray__") or v.get("__image__"):
        return read_array("an array", v.get("data"), v.get("dtype"), v.get("shape"))
    return v.get("data") if v.get("__npgeneric__") else value


def unpack(raw):
    """A frame of msgpack -> dict."""
    import msgpack
    if not isinstance(raw, bytes):
        raise Refused(400, "a text frame came; send msgpack in binary frames.")
    try:
        body = msgpack.unpackb(raw, object_hook=from_msgpack)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as e:
        raise Refused(400, f"the frame is not msgpack: {e}") from e
    if not isinstance(body, dict) or not all(isinstance(name, str) for name in body):
        raise Refused(400, "the frame must be a map whose keys are text.")
    return body


def pack(value, keys):
    """keys: how a format writes those of arrays, bytes or str."""
    import msgpack

    def array(x):
        named = {"__ndarray__": True, "data": x.tobytes(), "dtype": x.dtype.str, "shape": list(x.shape)}
        return {name.encode() if keys is bytes else name: value for name, value in named.items()}
    return msgpack.packb(value, default=array)


def openpi(service, asked):
    """A map in, {"actions": (T, A), "server_timing"} out; a text frame is an error. The server speaks first:
    asked.raw None is a new connection."""
    if asked.raw is None:
        return pack(service.info, bytes)
    try:
        body = {name.removeprefix("observation/"): value for name, value in unpack(asked.raw).items()}
        state = body.get("state")
        parts = body.get("joint_position"), body.get("gripper_position")                 # DROID: 7 and 1
        if state is None and all(isinstance(part, np.ndarray) for part in parts):
            state = np.append(*parts)
        actions, ms = service.ask(asked, body.get("prompt"), pictures(body, body.get("images")), state)
    except Refused as e:
        service.failed(e.status)
        return str(e)
    return pack({"actions": actions, "server_timing": {"infer_ms": ms}}, bytes)


def vla_eval(service, asked):
    """Messages {"type", "payload", "seq", "timestamp"}; the client speaks first (hello). Each observation is
    answered by one action (A,), from the connection's Policy; an episode's start and end reset it."""
    if asked.raw is None:
        return None
    seq = 0
    try:
        message = unpack(asked.raw)
        kind, payload, seq = (message.get(name) for name in ("type", "payload", "seq"))
        if not isinstance(kind, str) or not isinstance(payload, dict) or type(seq) is not int:
            seq = 0
            raise Refused(400, 'a message has "type", "payload" (a map), "seq" (an integer), "timestamp".')
        if kind == "hello":
            about = service.info
            wants = {"send_wrist_image": len(about["views"]) > 1, "send_state": about["state_dim"] > 0}
            out = {"harness_version": f"plainvla {about['version']}", "protocol_version": 1,
                   "model_server": about["method"], "capabilities": {},
                   "observation_params": {name: True for name, wanted in wants.items() if wanted}}
        elif kind == "observation":
            state = payload.get("states", payload.get("state"))
            actions, _ = service.ask(asked, payload.get("task_description"), pictures(payload.get("images")),
                                     state, mode="step")
            kind, out = "action", {"actions": actions[0]}
        elif kind in ("episode_start", "episode_end", "error"):
            service.forget(asked.session)
            return None
        else:
            raise Refused(400, f"there is no message type {str(kind)[:40]!r}.")
    except Refused as e:
        service.failed(e.status)
        kind, out = "error", {"error": str(e)}
    return pack({"type": kind, "payload": out, "seq": seq, "timestamp": time.time()}, str)


def healthy(service, asked):
    """The answer to GET /healthz and, in other formats, /health: whoever hears it may ask for actions."""
    return {"status": "ok"}


def page(service, asked):
    """assets/index.html, with headers by which only its own script and style run and nothing else loads."""
    from fastapi import Response
    html = (Path(__file__).resolve().parent / "assets" / "index.html").read_text(encoding="utf-8")
    own = [f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'; "
           for tag, text in re.findall("<(style|script)>(.*?)</", html, re.S)]
    return Response(html, media_type="text/html", headers={
        "Content-Security-Policy": f"default-src 'none'; {''.join(own)}connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'", "X-Content-Type-Options": "nosniff"})


def metrics(service, asked):
    """The answer to GET /metrics, for Prometheus."""
    from fastapi import Response
    return Response(service.metrics(), media_type="text/plain; version=0.0.4")


OURS = {
    "POST /v1/act": Service.act, "POST /v1/stream": Service.stream, "POST /v1/reset": Service.reset,
    "POST /v1/ask": Service.ask_ability, "POST /v1/sim": Service.sim_start,
    "POST /v1/sim/step": Service.sim_step, "GET /v1/info": lambda service, asked: service.info,
    "GET /healthz": healthy, "GET /metrics": metrics, "GET /": page}
WIRES = {
    "openvla": {"POST /act": openvla_act},
    "cogact": {"POST /api/inference": cogact_inference},
    "vla0": {"POST /predict_base64": vla0_predict, "POST /predict_base64_stream": vla0_stream,
             "GET /health": healthy},
    "robobrain": {"POST /infer": robobrain_infer, "GET /health": robobrain_health,
                  "GET /info": robobrain_info},
    "openpi": {"SOCKET /": openpi},
    "vla-eval": {"SOCKET /": vla_eval, "GET /health": healthy}}
NDJSON = "application/x-ndjson"
FORMS = {cogact_inference: "multipart/form-data"}             # of a body; else application/json


def pick_wires(text):
    """--wire -> names. No two may answer at one path, and what they need must be installed."""
    names, taken = [name.strip() for name in text.split(",")], {}
    for name in names:
        choose("there is no format", name, list(WIRES))
        for path in WIRES[name]:
            if path in taken:
                raise ValueError(f"--wire {taken[path]},{name}: both answer at {path.split()[1]}; choose "
                                 "one, or start a second server on another --port.")
            taken[path] = name
    if any(path.startswith("SOCKET") for path in taken):
        for package in ("msgpack", "websockets"):
            if importlib.util.find_spec(package) is None:
                raise ValueError(f'{package} is not installed; run: pip install -e ".[serve]"')
    return names


# ---- HTTP --------------------------------------------------------------------------------------------------

async def read_body(request, form="application/json"):
    """The bytes of a request's body, of that content type, within MAX_BODY and BODY_SECONDS."""
    from starlette.requests import ClientDisconnect
    # Browsers post any other type to any address without asking first: a web page must not move the robot.
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != form:
        raise Refused(415, f"send the header Content-Type: {form}.")

    async def read():
        body, size = bytearray(), 0
        async for part in request.stream():
            size += len(part)
            if size <= MAX_BODY:
                body.extend(part)
            elif size > 4 * MAX_BODY:        # up to here: read and dropped, so that the client hears of it
                break
        if size > MAX_BODY:
            raise Refused(413, f"the body is larger than {MAX_BODY:,} bytes; send smaller images, or JPEG.")
        return bytes(body)
    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except (asyncio.TimeoutError, ClientDisconnect) as e:
        raise Refused(408, f"the request did not arrive within {BODY_SECONDS} s.") from e


def check_caller(headers, token=None):
    """Refuse web pages of elsewhere, and whoever lacks the token. Clients that know of none have it in their
    address: http://robot:TOKEN@HOST becomes Basic; openpi says Api-Key."""
    page = headers.get("origin", "").partition("://")[2]
    if "origin" in headers and page != headers.get("host"):
        raise Refused(403, "a web page of another address asks; it must not move the robot.")
    if page and token is None and not re.fullmatch(r"(localhost|[\d.]+|\[[\da-f:.]+\])(:\d+)?", page):
        raise Refused(403, "open the page by the server's number (http://127.0.0.1:8000), or set --token: "
                      "what a name stands for, its owner can change.")
    kind, _, found = headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        with suppress(ValueError):
            found = base64.b64decode(found).decode("utf-8", "replace").partition(":")[2]
    elif kind.lower() not in ("bearer", "api-key"):
        found = ""
    found = found.strip().encode("utf-8", "replace")
    if token is not None and not hmac.compare_digest(found, token.encode()):
        raise Refused(401, "send the header Authorization: Bearer TOKEN (this server's --token).")


async def lines(service, rows):
    """A generator of JSON values, run in a thread, -> async generator of lines. No reader holds it up, slow
    or gone. What goes wrong before the first line is raised, later it is the last line."""
    queue, loop = asyncio.Queue(), asyncio.get_running_loop()

    def work():
        try:
            for row in rows:
                loop.call_soon_threadsafe(queue.put_nowait, row)
            last = None
        except (Refused, ValueError) as e:                                   # a check of the method's own
            last = e if isinstance(e, Refused) else Refused(400, e)
        except Exception as e:                                               # ours: into the log
            traceback.print_exc()
            last = Refused(500, f"internal error ({type(e).__name__}); see the server's log.")
        loop.call_soon_threadsafe(queue.put_nowait, last)

    async def write(row):
        while row is not None:
            error = isinstance(row, Refused)
            yield json.dumps({"error": str(row)} if error else row, allow_nan=False) + "\n"
            row = None if error else await queue.get()

    service.aside(work)
    first = await queue.get()
    if isinstance(first, Refused):
        raise first
    return write(first)


async def converse(websocket, service, talk):
    """One connection: frames in, frames out, in order. It is a session; what belongs to it goes with it."""
    from fastapi import WebSocketDisconnect
    session, query, raw = object(), dict(websocket.query_params), None     # the server may speak first
    await websocket.accept()
    try:
        while True:
            start, service.under_way = time.perf_counter(), service.under_way + 1
            try:
                answer = await service.aside(talk, service, Asked(raw, query, session=session))
                if answer is not None:
                    await (websocket.send_text if isinstance(answer, str) else websocket.send_bytes)(answer)
            finally:
                service.under_way -= 1
            if raw is not None:
                service.times.setdefault(websocket.scope["path"], Times()).since(start)
            message = await websocket.receive()
            if service.draining:                                             # too late: nobody begins on it
                return await websocket.close(1012, "the server is stopping")
            if message["type"] == "websocket.disconnect":
                return
            raw = message.get("bytes") or message.get("text") or b""
    except WebSocketDisconnect:                                              # it left before its answer
        return
    finally:
        await service.aside(service.forget, session)


def add_route(app, service, reply, verb, path, answer):
    """A route of the tables OURS and WIRES."""
    from fastapi import Request, Response, WebSocket
    from fastapi.responses import StreamingResponse

    async def route(request: Request):
        raw = await read_body(request, FORMS.get(answer, "application/json")) if verb == "POST" else b""
        asked = Asked(raw, dict(request.query_params), request.headers.get("content-type", ""))
        if inspect.isgeneratorfunction(answer):
            return StreamingResponse(await lines(service, answer(service, asked)), media_type=NDJSON)
        # whoever looks (GET) need not wait for a thread, which may all wait for the model
        value = answer(service, asked) if verb == "GET" else await service.aside(answer, service, asked)
        if isinstance(value, Response):
            return value
        return reply(*value[::-1]) if isinstance(value, tuple) else reply(value)

    async def socket_route(websocket: WebSocket):
        await converse(websocket, service, answer)

    if verb == "SOCKET":
        app.add_api_websocket_route(path, socket_route)
    else:
        app.add_api_route(path, route, methods=[verb])


class Meter:
    """Around all HTTP routes: counts what is under way and what failed, takes the time of what did not."""

    def __init__(self, app, service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        service, start, status = self.service, time.perf_counter(), 500

        async def sent(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)
        service.under_way += 1
        try:
            await self.app(scope, receive, sent)
        finally:
            service.under_way -= 1
            if status >= 400:
                service.failed(status)
            elif scope["method"] == "POST":
                service.times.setdefault(scope["path"], Times()).since(start)


def create_app(model, unnorm_key=None, execute=None, token=None, checkpoint="", wire=(), official=False,
               batch=8, **options):
    """The FastAPI application around a loaded model. wire: names of WIRES; official: --official; batch: how
    many waiting robots are asked together; options: keywords for model.act, e.g. cfg_scale."""
    from fastapi import Depends, FastAPI, Response
    from fastapi.requests import HTTPConnection
    from starlette.exceptions import HTTPException
    service = Service(model, unnorm_key, execute, checkpoint, wire, official, batch, **options)
    routes = OURS | {path: answer for name in wire for path, answer in WIRES[name].items()}

    def reply(value, status=200):                            # a server that stops sends clients away
        return Response(json.dumps(value, allow_nan=False), status, media_type="application/json",
                        headers={"Connection": "close"} if service.draining else None)

    async def guard(caller: HTTPConnection):
        if caller.scope["type"] != "http" or caller.scope["path"] not in ("/healthz", "/"):
            check_caller(caller.headers, token)                              # the page itself tells nothing
        if service.draining:
            raise Refused(503, "the server is stopping; ask another one, or later.")

    @asynccontextmanager
    async def lifespan(app):
        threading.Thread(target=service.run, name="model", daemon=True).start()
        yield
        service.stop()
        print(service.summary(), flush=True)

    app = FastAPI(title="plainvla", lifespan=lifespan, openapi_url=None, redirect_slashes=False,
                  dependencies=[Depends(guard)])
    app.state.service = service

    @app.exception_handler(Refused)
    async def refused(request, e):
        return reply({"error": str(e)}, e.status)

    @app.exception_handler(HTTPException)
    async def no_route(request, e):
        asked = f"{request.scope.get('method', 'SOCKET')} {request.url.path[:200]}"
        return reply({"error": f"{asked}: {e.detail}; there is {', '.join(routes)}."}, e.status_code)

    @app.exception_handler(Exception)        # the traceback goes to the server's own log
    async def failed(request, e):
        return reply({"error": f"internal error ({type(e).__name__}); see the server's log."}, 500)

    for path, answer in routes.items():
        add_route(app, service, reply, *path.split(), answer)
    app.add_middleware(Meter, service=service)
    return app


def create_server(app):
    """uvicorn, set up: ask a silent client for a sign of life, stop within DRAIN_SECONDS, inflate nothing."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):
            """First what is under way is answered: left alone, uvicorn hangs up on sockets in mid-request."""
            service, start = app.state.service, time.monotonic()
            service.draining = True
            await asyncio.sleep(0.5)                                         # what is still on its way
            while service.under_way and time.monotonic() < start + DRAIN_SECONDS:
                await asyncio.sleep(0.02)
            await super().shutdown(sockets)

    return Server(uvicorn.Config(
        app, log_level="warning", limit_concurrency=2 * MAX_SESSIONS, timeout_keep_alive=60,
        timeout_graceful_shutdown=5, ws_max_size=MAX_BODY, ws_per_message_deflate=False,
        ws_ping_interval=60, ws_ping_timeout=300))


def bind(host, port):
    """A socket that does not listen yet: a port in use is reported before minutes of loading."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)         # without it asyncio sets no TCP_NODELAY: 40 ms
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)          # a request comes in one piece
        sock.bind(address)
        return sock
    except OSError as e:
        raise ValueError(f"--host {host} --port {port}: {e.strerror or e}; choose another.") from e


def main():
    """The script: flags -> a loaded model -> a server, until SIGTERM or ctrl-c. ValueError: what is wrong."""
    p = Parser(__doc__)
    what = p.add_argument_group("what")
    what.add_argument("--ckpt", required=True, help="checkpoint folder, official release, or hub id")
    what.add_argument("--model", help="the method, a file name; default: what the checkpoint says it is")
    what.add_argument("--preset", help="preset of an official checkpoint that does not name its own")
    what.add_argument("--tokenizer", help="tokenizer folder or hub id, for checkpoints that do not carry one")
    what.add_argument("--unnorm-key", help="whose action statistics to use when a request does not say")
    how = p.add_argument_group("inference")
    how.add_argument("--execute", type=within(1), help="answer single actions, so many per chunk, not chunks")
    how.add_argument("--batch", type=within(1), default=8,
                     help="robots that wait for the model are asked together, at most so many")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    how.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
                     help="bf16 halves the memory; auto: bf16 on CUDA, else what the checkpoint says")
    how.add_argument("--attn", default="auto", help="auto, flash, sdpa, eager")
    how.add_argument("--graphs", action="store_true", help="act by CUDA graphs: a GPU waits less")
    how.add_argument("--int8", action="store_true",
                     help="vla0, robobrain_x0, on a CPU: write with matrices of 8 bits: not the same numbers")
    net = p.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", help="0.0.0.0: the whole network, with --token")
    net.add_argument("--port", type=within(0, 65535), default=8000, help="port; 0 takes a free one")
    net.add_argument("--token", help="ask (except for /healthz) for the header Authorization: Bearer TOKEN")
    net.add_argument("--no-auth", action="store_true", help="let everyone in who reaches --host")
    other = p.add_argument_group("other projects' clients")
    other.add_argument("--wire", metavar="NAME[,NAME]", help=f"answer these formats too: {', '.join(WIRES)}")
    other.add_argument("--robot", help="robobrain: a2d, agilex, franka or r1lite; default: the checkpoint's")
    other.add_argument("--official", action="store_true", help="robobrain: as released, failed decodes move")
    a = p.parse_args()
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as e:
        raise ValueError(f'{e.name} is not installed; run: pip install -e ".[serve]"') from e
    if a.token and a.no_auth:
        raise ValueError("--token asks who comes, --no-auth does not; leave one out.")
    wire, sock = pick_wires(a.wire) if a.wire else [], bind(a.host, a.port)
    host, port = sock.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        if not a.token and not a.no_auth:
            raise ValueError(f"--host {a.host}: whoever reaches this machine could move the robot; set "
                             "--token SECRET, or --no-auth if that is meant.")
        who = "has the token" if a.token else "reaches this machine"
        print(f"warning: listening at {host}: whoever {who} can move the robot.", file=sys.stderr, flush=True)
    method, where = find_method(a.ckpt, a.model), device(a.device)
    if "robobrain" not in wire and (a.robot or a.official):
        raise ValueError("--robot and --official are for --wire robobrain; add it, or leave them out.")
    dtype = "bf16" if a.dtype == "auto" and where.type == "cuda" else a.dtype
    model = load_model(a, method, a.ckpt, dtype=None if dtype == "auto" else dtype,
                       **({"robot": a.robot} if a.robot else {}))
    try:
        app = create_app(model, a.unnorm_key, a.execute, a.token, a.ckpt, wire, a.official, a.batch)
    except Refused as e:
        raise ValueError(f"{a.ckpt} was loaded, but its first inference failed: {e}") from e
    print(" | ".join(f"{name} {value}" for name, value in app.state.service.info.items()))
    sock.listen(128)                         # from here on, requests wait for the server to start
    print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port} (ctrl-c stops)", flush=True)
    try:
        create_server(app).run(sockets=[sock])
    except KeyboardInterrupt:                # uvicorn has shut down in order, and hands the signal on
        return


if __name__ == "__main__":
    cli(main)
