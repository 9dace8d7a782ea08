"""
Drive a robot over HTTP: load a checkpoint, take pictures and an instruction, answer actions in robot units.

    pip install -e ".[serve]"
    python serve.py --ckpt runs/cogact-tiny/last               # http://127.0.0.1:8000, for this machine only
    python serve.py --ckpt CogACT/CogACT-Base --model cogact --unnorm-key bridge_orig --tokenizer FOLDER

    POST /v1/act    {"instruction": "pick up the red cube", "images": {view: base64 of a PNG or JPEG file},
                     "state"?: [S numbers], "unnorm_key"?: str, "mode"?: "chunk" or "step", "session"?: str}
                 -> {"actions": [[A numbers], ... T rows], "infer_ms": number, "info": {...}}
    POST /v1/reset  {"session"?: str}: forget the session's past. Call it before every episode in mode "step".
    GET  /v1/info   method, horizon, action_dim, views and their sizes, norm keys, ...
    GET  /healthz   200: the model is loaded and has answered once (before that, nothing listens on the port)

Mode "chunk" (the default) keeps nothing: the next T actions, of which the client plays as many as it likes.
Mode "step" (the default with --execute k): one action, T = 1, of the session's own Policy (queue, ensemble).
Units and conventions (frame, rotation, gripper) are those of the dataset `unnorm_key`. A client's mistake is
4xx, ours 5xx, always {"error": "one line"}; a robot never receives NaN. A method that predicts points (a0)
answers "waypoints", [[u, v], ... T rows] in [0, 1] of the picture, instead of "actions", in mode "chunk"
only: motion needs depth and the camera's matrices, and is made beside the robot, by a0.Policy.
"""
import asyncio
import base64
import difflib
import hmac
import importlib
import io
import ipaddress
import json
import socket
import struct
import sys
import threading
import time
import zlib
from collections import OrderedDict, deque
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from PIL import Image

from common import Parser, cli, device, is_text, pick_stats, within
from eval_sim import find_method

MAX_BODY = 32 * 2**20          # bytes of one request
MAX_IMAGES = 8
MAX_SIDE = 4096                # pixels of an image, read from its header before anything is decoded
MAX_TEXT = 2000                # characters of the instruction, and of every other text but images
MAX_SESSIONS = 64              # the session unused for longest is forgotten first
BODY_SECONDS = 30              # that a client has to send its request
JSON_NAMES = {str: "a string", dict: "an object", list: "a list", bool: "true or false", int: "a number",
              float: "a number", type(None): "nothing"}


class Refused(Exception):
    """An answer other than actions: an HTTP status and one line for the client."""

    def __init__(self, status, message):
        super().__init__(" ".join(str(message).split())[:1000])
        self.status = status


# ---- Reading a request: everything is checked here, then trusted -------------------------------------------

def parse(raw, fields):
    """The bytes of a request -> a dict. fields: {name: JSON kind of its value} of what may be in it."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"the body is not JSON: {e}. Send one UTF-8 JSON object.") from e
    if not isinstance(body, dict):
        raise Refused(400, f"the body is {JSON_NAMES[type(body)]}; send an object with {', '.join(fields)}.")
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name not in fields:
            near = difflib.get_close_matches(name[:100], fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}."
            raise Refused(400, f"unknown field {name[:100]!r}; {hint}")
        if not isinstance(value, fields[name]):
            found = JSON_NAMES[type(value)]
            raise Refused(400, f'"{name}" must be {JSON_NAMES[fields[name]]}, found {found}.')
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise Refused(413, f'"{name}" has {len(value):,} characters, at most {MAX_TEXT} are taken.')
    return body


def read_image(name, text):
    """base64 of a PNG or JPEG file -> uint8 (h, w, 3) RGB."""
    if not isinstance(text, str):
        raise Refused(400, f"{name} must be a string (base64), found {JSON_NAMES[type(text)]}.")
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as e:
        raise Refused(400, f"{name} is not base64 ({e}); no line breaks, no data: prefix.") from e
    try:
        image = Image.open(io.BytesIO(raw), formats=("PNG", "JPEG"))         # reads the header only
        w, h = image.size
        if max(w, h) > MAX_SIDE:
            raise Refused(413, f"{name} is {w} x {h} pixels, at most {MAX_SIDE} per side are taken.")
        if image.mode != "RGB":                                              # alpha, grey, depth
            raise Refused(400, f"{name} has Pillow mode {image.mode!r}; send 8-bit RGB.")
        image.load()
    # what Pillow raises on torn and hostile files
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError) as e:
        raise Refused(400, f"{name} ({len(raw):,} bytes) is no whole PNG or JPEG file.") from e
    return np.asarray(image)                                                 # (h, w, 3)


def read_observation(body, cfg):
    """A parsed request -> observation: instruction, images {view: uint8 (h, w, 3)}, if sent state (S,)."""
    text, images, state = body.get("instruction", ""), body.get("images", {}), body.get("state")
    if not is_text(text):
        raise Refused(400, '"instruction" is missing, empty or no valid Unicode; say what to do.')
    if len(images) > MAX_IMAGES:
        raise Refused(413, f'"images" holds {len(images)} images, at most {MAX_IMAGES} are taken.')
    if set(images) != set(cfg.views):                  # a picture under another name may be of another camera
        found = sorted(view[:100] for view in images)
        raise Refused(400, f'"images" has the views {found}; this model looks at {list(cfg.views)}: '
                      "send exactly these.")
    observation = {"instruction": text,
                   "images": {view: read_image(f"images[{view!r}]", images[view]) for view in cfg.views}}
    if state is not None:
        size = getattr(cfg, "state_dim", 0) or len(state)
        fine = all(type(v) in (int, float) and abs(v) < 1e30 for v in state)     # isinstance: True is an int
        if len(state) != size or not fine:
            found = f"{len(state)}: {str(state[:20])[:100]}"
            raise Refused(400, f'"state" must be {size} finite numbers, found {found}.')
        observation["state"] = np.asarray(state, np.float32)                 # (S,)
    return observation


# ---- The service: one model, one lock, one Policy per session ----------------------------------------------

class Service:
    """What the routes do, apart from HTTP. The model has answered once when __init__ returns."""

    def __init__(self, model, unnorm_key=None, execute=None, checkpoint="", **options):
        self.model, self.cfg, self.options = model.eval(), model.cfg, options
        self.method = importlib.import_module(type(model).__module__)
        self.points = self.method.PREDICTS != "actions"                      # no robot's units
        if self.points and (unnorm_key or execute):
            raise ValueError(f"--unnorm-key, --execute: {self.method.__name__} answers points in the "
                             "picture, no actions; leave them out.")
        if unnorm_key is None and len(model.stats) == 1 and not self.points:
            unnorm_key, = model.stats
        self.unnorm_key, self.execute = unnorm_key, execute
        self.lock, self.times = threading.Lock(), deque(maxlen=10_000)       # milliseconds
        self.sessions = OrderedDict()                                        # name: key, instruction, Policy
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
                     "views": {view: [size, size] for view in self.cfg.views},
                     "state_dim": getattr(self.cfg, "state_dim", 0),
                     "horizon": self.cfg.horizon, "action_dim": self.cfg.action_dim,
                     "control_hz": getattr(self.cfg, "control_hz", None),
                     "norm_keys": sorted(model.stats), "unnorm_key": unnorm_key,
                     "mode": "step" if execute else "chunk", "execute": self.policy(key).execute}
        black = {view: np.zeros((size, size, 3), np.uint8) for view in self.cfg.views}
        state = np.zeros(self.info["state_dim"], np.float32)
        self.predict({"images": black, "instruction": "warm up", "state": state}, key)
        self.times.clear()                                                   # the first one is slow

    def policy(self, key):
        """A fresh Policy: what one session remembers."""
        return self.method.Policy(self.model, unnorm_key=key, execute=self.execute)

    def predict(self, observation, key):
        """One inference -> ((T, A) finite, info)."""
        start = time.perf_counter()
        chunks, info = self.model.act([observation], unnorm_key=key, **self.options)
        self.times.append(1000 * (time.perf_counter() - start))              # act has waited for the device
        if not np.isfinite(chunks).all():
            raise Refused(500, "the model's actions are not finite; none were sent. Check the checkpoint.")
        if np.any(info.get("parse_failed", False)):
            raise Refused(500, "the model's answer could not be read as actions; none were sent. Ask again.")
        return chunks[0], info

    def step(self, session, key, observation):
        """One action of the session's Policy, (1, A). An error forgets the session: its past has a gap."""
        instruction = observation["instruction"]
        known, last, policy = self.sessions.pop(session, (None, None, None))
        if policy is None or (known, last) != (key, instruction):
            policy = self.policy(key)
        chunk, info = self.predict(policy.ask(observation), key) if policy.needs_chunk else (None, {})
        action = policy.step(observation, chunk)                             # (A,)
        self.sessions[session] = key, instruction, policy                    # to the end: forgotten last
        if len(self.sessions) > MAX_SESSIONS:
            self.sessions.popitem(last=False)
        return action[None], info

    def act(self, raw):
        """The answer to POST /v1/act."""
        body = parse(raw, {"instruction": str, "images": dict, "state": list, "unnorm_key": str, "mode": str,
                           "session": str})
        key, mode = body.get("unnorm_key", self.unnorm_key), body.get("mode", self.info["mode"])
        if mode not in ("chunk", "step"):
            raise Refused(400, f'"mode" is {mode[:100]!r}; choose "chunk" or "step".')
        if self.points and (mode == "step" or key):
            raise Refused(400, f'{self.method.__name__} answers points in the picture: mode "chunk", no '
                          '"unnorm_key". a0.Policy, beside the robot, makes them motion.')
        observation = read_observation(body, self.cfg)
        with self.lock:
            start = time.perf_counter()
            try:
                actions, info = (self.step(body.get("session"), key, observation) if mode == "step" else
                                 self.predict(observation, key))
            except ValueError as e:                                          # a check of the method's own
                raise Refused(400, e) from e
            ms = 1000 * (time.perf_counter() - start)                        # without the queue for the lock
        said = {name: value for name, value in info.items() if isinstance(value, (str, int))}     # no arrays
        return {self.method.PREDICTS: actions.tolist(), "infer_ms": round(ms, 3),
                "info": {"mode": mode, "unnorm_key": key, **said}}

    def reset(self, raw):
        """The answer to POST /v1/reset."""
        session = parse(raw or b"{}", {"session": str}).get("session")
        with self.lock:
            return {"forgotten": self.sessions.pop(session, None) is not None}

    def summary(self):
        """p50 and p95 of the inference times, in words."""
        if not self.times:
            return "no inferences"
        p50, p95 = np.percentile(self.times, [50, 95])
        return f"the last {len(self.times)} inferences: p50 {p50:.1f} ms, p95 {p95:.1f} ms"


# ---- HTTP --------------------------------------------------------------------------------------------------

async def read_body(request):
    """The bytes of a request's body, within MAX_BODY and BODY_SECONDS."""
    from starlette.requests import ClientDisconnect
    # Browsers post any other type to any address without asking first: a web page must not move the robot.
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send the header Content-Type: application/json.")
    body, size = bytearray(), 0

    async def read():
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size <= MAX_BODY:
                body.extend(part)
            elif size > 4 * MAX_BODY:        # up to here: read and dropped, so that the client hears of it
                return
    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except (asyncio.TimeoutError, ClientDisconnect) as e:
        raise Refused(408, f"the request did not arrive within {BODY_SECONDS} s.") from e
    if size > MAX_BODY:
        raise Refused(413, f"the body is larger than {MAX_BODY:,} bytes; send smaller images, or JPEG.")
    return bytes(body)


def create_app(model, unnorm_key=None, execute=None, token=None, checkpoint="", **options):
    """The FastAPI application around a loaded model. options: keywords for model.act, e.g. cfg_scale."""
    from fastapi import Depends, FastAPI, Request, Response
    from fastapi.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    service = Service(model, unnorm_key, execute, checkpoint, **options)

    def reply(value, status=200):
        return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")

    def guard(request: Request):
        found = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(found, f"Bearer {token}".encode()):
            raise Refused(401, "send the header Authorization: Bearer TOKEN (this server's --token).")

    @asynccontextmanager
    async def lifespan(app):
        yield
        print(service.summary(), flush=True)

    app = FastAPI(title="plainvla", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.service = service

    @app.post("/v1/act", dependencies=[Depends(guard)])
    async def act(request: Request):
        return reply(await run_in_threadpool(service.act, await read_body(request)))

    @app.post("/v1/reset", dependencies=[Depends(guard)])
    async def reset(request: Request):
        return reply(await run_in_threadpool(service.reset, await read_body(request)))

    @app.get("/v1/info", dependencies=[Depends(guard)])
    async def info():
        return reply(service.info)

    @app.get("/healthz")
    async def healthz():
        return reply({"status": "ok"})

    @app.exception_handler(Refused)
    async def refused(request, e):
        return reply({"error": str(e)}, e.status)

    @app.exception_handler(HTTPException)
    async def no_route(request, e):
        routes = "POST /v1/act, POST /v1/reset, GET /v1/info, GET /healthz"
        asked = f"{request.method} {request.url.path[:200]}"
        return reply({"error": f"{asked}: {e.detail}; there is {routes}."}, e.status_code)

    @app.exception_handler(Exception)        # the traceback goes to the server's own log
    async def failed(request, e):
        return reply({"error": f"internal error ({type(e).__name__}); see the server's log."}, 500)

    return app


def bind(host, port):
    """A socket that does not listen yet: a port in use is reported before minutes of loading."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        return sock
    except OSError as e:
        raise ValueError(f"--host {host} --port {port}: {e.strerror or e}; choose another.") from e


def main():
    p = Parser(__doc__)
    what = p.add_argument_group("what")
    what.add_argument("--ckpt", required=True, help="checkpoint folder, official release, or hub id")
    what.add_argument("--model", help="the method, a file name; default: what the checkpoint says it is")
    what.add_argument("--preset", help="preset of an official checkpoint that does not name its own")
    what.add_argument("--tokenizer", help="tokenizer folder or hub id, for checkpoints that do not carry one")
    what.add_argument("--unnorm-key", help="whose action statistics to use when a request does not say")
    how = p.add_argument_group("inference")
    how.add_argument("--execute", type=within(1), help="answer single actions, so many per chunk, not chunks")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    how.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
                     help="bf16 halves the memory; auto: bf16 on CUDA, else what the checkpoint says")
    how.add_argument("--attn", default="auto", help="auto, flash, sdpa, eager")
    net = p.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets the whole network in")
    net.add_argument("--port", type=within(0, 65535), default=8000, help="port; 0 takes a free one")
    net.add_argument("--token", help="ask (except for /healthz) for the header Authorization: Bearer TOKEN")
    a = p.parse_args()
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise ValueError(f'{e.name} is not installed; run: pip install -e ".[serve]"') from e
    sock = bind(a.host, a.port)
    host, port = sock.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        print(f"warning: listening at {host}: whoever reaches this machine can move the robot"
              f"{'.' if a.token else '; --token asks for a password.'}", file=sys.stderr, flush=True)
    method, where = find_method(a.ckpt, a.model), device(a.device)
    dtype = "bf16" if a.dtype == "auto" and where.type == "cuda" else a.dtype
    model = method.from_pretrained(
        a.ckpt, preset=a.preset, tokenizer=a.tokenizer, attn=a.attn, device=where,
        dtype=None if dtype == "auto" else dtype)
    try:
        app = create_app(model, a.unnorm_key, a.execute, a.token, a.ckpt)
    except Refused as e:
        raise ValueError(f"{a.ckpt} was loaded, but its first inference failed: {e}") from e
    print(" | ".join(f"{name} {value}" for name, value in app.state.service.info.items()))
    sock.listen(128)                         # from here on, requests wait for the server to start
    print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port} (ctrl-c stops)", flush=True)
    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning", limit_concurrency=32)).run(sockets=[sock])
    except KeyboardInterrupt:                # uvicorn has shut down in order, and hands the signal on
        return


if __name__ == "__main__":
    cli(main)
