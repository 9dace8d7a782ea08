"""serve.py --wire: each format's client, written from the formats' descriptions, against the real server."""
import base64
import copy
import dataclasses
import http.client
import importlib
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import serve
import torch
from common import cli
from golden_cases import Recordings
from PIL import Image
from test_methods import STATS, make
from test_serve import encoded, picture, png_header, statistics, tiny_model

ROOT = Path(__file__).resolve().parent.parent
msgpack = pytest.importorskip("msgpack", reason='pip install -e ".[serve]"')
pytest.importorskip("websockets", reason='pip install -e ".[serve]"')
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

TEXT = "pick up the red cube"


# ---- Clients -----------------------------------------------------------------------------------------------

class Client:
    """Requests over one kept connection."""

    def __init__(self, port, service):
        self.port, self.service = port, service
        self.http = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def __call__(self, path, body=None, kind="application/json", **headers):
        """(status, JSON, or the list of a stream's lines)."""
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": kind} | {k.replace("_", "-"): v for k, v in headers.items()}
        self.http.request("GET" if body is None else "POST", path, raw, headers)
        answer = self.http.getresponse()
        text = answer.read().decode()
        if "ndjson" in answer.headers["Content-Type"]:
            return answer.status, [json.loads(line) for line in text.splitlines()]
        return answer.status, json.loads(text)

    def socket(self, path="/", user="", **headers):
        return connect(f"ws://{user}127.0.0.1:{self.port}{path}", compression=None, max_size=None,
                       additional_headers={k.replace("_", "-"): v for k, v in headers.items()})


@contextmanager
def running(model, wire=(), **options):
    sock = serve.bind("127.0.0.1", 0)
    app = serve.create_app(model, wire=serve.pick_wires(wire) if wire else (), **options)
    server = serve.create_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Client(sock.getsockname()[1], app.state.service)
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()
    sock.close()


def png(image):
    return base64.b64decode(encoded(image))


def json_numpy(x):
    x = np.asarray(x)
    return {"__numpy__": base64.b64encode(x.tobytes()).decode(), "dtype": x.dtype.str, "shape": [*x.shape]}


def from_json_numpy(x):
    return np.frombuffer(base64.b64decode(x["__numpy__"]), x["dtype"]).reshape(x["shape"])


def form(**files):
    """multipart/form-data of files -> (body, content type)."""
    body = b"".join(b'--x7\r\nContent-Disposition: form-data; name="%s"; filename="f"\r\n\r\n%s\r\n'
                    % (name.encode(), content) for name, content in files.items())
    return body + b"--x7--\r\n", "multipart/form-data; boundary=x7"


def saved(x):
    """VLA-0: base64 of np.save's bytes."""
    file = io.BytesIO()
    np.save(file, x)
    return base64.b64encode(file.getvalue()).decode()


def packed(x):
    """openpi: maps with bytes for keys."""
    def default(a):
        return {b"__ndarray__": True, b"data": a.tobytes(), b"dtype": a.dtype.str, b"shape": a.shape}
    return msgpack.packb(x, default=default)


def unpacked(raw):
    def array(v):
        return np.frombuffer(v[b"data"], v[b"dtype"]).reshape(v[b"shape"]) if b"__ndarray__" in v else v
    return msgpack.unpackb(raw, object_hook=array)


def message(kind, payload, seq=1):
    """vla-eval: pictures as PNG, other arrays as maps with text for keys."""
    def default(a):
        if a.ndim == 3:
            return {"__image__": True, "format": "png", "data": png(a), "shape": [*a.shape]}
        return {"__ndarray__": True, "data": a.tobytes(), "dtype": a.dtype.str, "shape": [*a.shape]}
    return msgpack.packb({"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0}, default=default)


def from_message(raw):
    def array(v):
        return np.frombuffer(v["data"], v["dtype"]).reshape(v["shape"]) if "__ndarray__" in v else v
    return msgpack.unpackb(raw, object_hook=array)


def ask_openvla(client, image, query=""):
    status, answer = client(f"/act{query}", {"image": json_numpy(image), "instruction": TEXT})
    assert status == 200, answer
    return from_json_numpy(answer)


def ask_oft(client, image):
    request = {"full_image": json_numpy(image), "wrist_image": json_numpy(image), "instruction": TEXT,
               "state": json_numpy(np.zeros(8))}
    status, answer = client("/act", {"encoded": json.dumps(request)})
    assert status == 200 and isinstance(answer, str), answer
    return np.stack([from_json_numpy(row) for row in json.loads(answer)])


def ask_cogact(client, image, query=""):
    body, kind = form(images=png(image), json=json.dumps({"task_description": TEXT}).encode())
    status, answer = client(f"/api/inference{query}", body, kind)
    assert status == 200, answer
    return np.array(answer)


def ask_vla0(client, image):
    request = {"base64_rgb": [saved(image)], "state": [0] * 8, "instr": TEXT}
    status, answer = client("/predict_base64", request)
    assert status == 200, answer
    return np.array(answer)


def ask_vla0_stream(client, image):
    request = {"base64_rgb": [saved(np.asfortranarray(image))], "state": [0] * 8, "instr": TEXT}
    status, answer = client("/predict_base64_stream", request)
    assert status == 200 and answer.pop()["time_taken"] > 0, answer
    assert [line["index"] for line in answer] == list(range(len(answer)))
    return np.array([line["value"] for line in answer])


def ask_ours_stream(client, image):
    status, answer = client("/v1/stream", {"instruction": TEXT, "images": {"third": encoded(image)}})
    assert status == 200 and answer.pop()["infer_ms"] > 0, answer
    return np.array([line["action"] for line in answer])


def ask_openpi(client, image):
    with client.socket() as ws:
        assert unpacked(ws.recv())["horizon"]                               # the server speaks first
        ws.send(packed({"observation/image": image, "observation/wrist_image": image,
                        "observation/state": np.zeros(8), "prompt": TEXT}))
        answer = unpacked(ws.recv())
        assert answer["server_timing"]["infer_ms"] > 0
        return answer["actions"]


def observation(image):
    return {"instruction": TEXT, "images": {"third": image}, "state": np.zeros(8, np.float32)}


ASK = [ask_openvla, ask_oft, ask_cogact, ask_vla0, ask_vla0_stream, ask_ours_stream, ask_openpi]


@pytest.fixture(scope="module", params=["cogact", "vla0", "robovlms", "robobrain_x0"])
def client(request):
    """A server of every method that answers actions, with all formats that get on with one another."""
    how = {"state_dim": 8} | ({"draft": "none"} if request.param in ("vla0", "robobrain_x0") else {})
    model = make(importlib.import_module(request.param), **how)
    with running(model, "openvla,cogact,vla0,openpi") as client:
        yield client


@pytest.mark.parametrize("ask", ASK)
def test_every_format_gets_the_chunk_that_act_gives(client, ask):
    model, image = client.service.model, picture(40, 52, seed=1)
    torch.manual_seed(3)
    chunks, info = model.act([observation(image)])
    torch.manual_seed(3)
    got = ask(client, image)
    want = info.get("actions", chunks)[0][:len(np.atleast_2d(got))]
    np.testing.assert_allclose(np.atleast_2d(got), want, rtol=1e-6, atol=1e-6)
    assert got.shape == ((7,) if ask is ask_openvla else chunks[0].shape) and np.abs(want).max() > 1e-3


def test_vla_eval_plays_the_chunk_step_by_step_and_an_episode_starts_anew(client):
    with running(client.service.model, "vla-eval") as harness, harness.socket() as ws:
        assert harness("/health") == (200, {"status": "ok"})

        def say(kind, payload, seq=1):
            ws.send(message(kind, payload, seq))
            return from_message(ws.recv())
        hello = say("hello", {"harness_version": "0.8.0", "protocol_version": 1}, seq=9)
        assert (hello["type"], hello["seq"], hello["payload"]["protocol_version"]) == ("hello", 9, 1)
        assert hello["payload"]["observation_params"] == {"send_state": True}
        image = picture(32, 32, seed=2)
        seen = {"images": {"agentview": image, "wrist": picture()}, "states": np.zeros(8),
                "task_description": TEXT}
        execute, model = harness.service.info["execute"], client.service.model
        torch.manual_seed(4)
        chunk = model.act([observation(image)])[0][0]
        for _ in range(2):
            ws.send(message("episode_start", {"task": {}}))                         # not answered
            torch.manual_seed(4)
            answers = [say("observation", seen, seq) for seq in range(execute)]
            assert [(a["type"], a["seq"]) for a in answers] == [("action", seq) for seq in range(execute)]
            np.testing.assert_allclose([a["payload"]["actions"] for a in answers], chunk[:execute], atol=1e-6)


# ---- Sessions ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model():
    return tiny_model({"tabletop": statistics(0.05), "other": statistics(2.0)})


def test_the_address_names_session_and_statistics(model):
    image = picture()
    with running(model, "openvla,cogact", unnorm_key="tabletop") as client:
        torch.manual_seed(5)
        chunk = ask_cogact(client, image)
        torch.manual_seed(5)
        other = ask_cogact(client, image, "?unnorm_key=other")
        np.testing.assert_allclose(other[:, :6], chunk[:, :6] * 40, rtol=1e-4)
        for ask in (ask_openvla, ask_cogact):
            torch.manual_seed(5)
            first = [ask(client, image, "?session=a")]
            ask(client, image, "?session=b")
            first += [ask(client, image, "?session=a") for _ in range(3)]
            np.testing.assert_allclose(first, chunk[:4], rtol=1e-6)
            assert client("/v1/reset", {"session": "a"}) == (200, {"forgotten": True})
        assert client("/act?unnorm_key=no", {"image": json_numpy(image), "instruction": TEXT})[0] == 400
    with running(model, "openvla,cogact,openpi", unnorm_key="tabletop", execute=3) as client:
        status, answer = client("/act", {"image": json_numpy(image), "instruction": TEXT})
        assert status == 400 and "add ?session=NAME to the address" in answer["error"]
        torch.manual_seed(5)
        np.testing.assert_allclose(ask_cogact(client, image, "?session=a"), chunk[0], rtol=1e-6)


def test_a_connection_is_a_session_and_is_forgotten_with_it(model):
    image, other = picture(seed=1), picture(seed=2)
    request = {"image": image, "prompt": TEXT}
    with running(model, "openpi", unnorm_key="tabletop", execute=3) as client:
        with client.socket() as a, client.socket() as b:
            a.recv(), b.recv()

            def step(ws, **changes):
                ws.send(packed(request | changes))
                return unpacked(ws.recv())["actions"]
            torch.manual_seed(5)
            chunk = model.act([observation(image)], unnorm_key="tabletop")[0][0]
            torch.manual_seed(5)
            played = [step(a)]
            step(b, image=other)
            played += [step(a), step(a)]
            assert played[0].shape == (1, 7) and len(client.service.sessions) == 2
            np.testing.assert_allclose(np.concatenate(played), chunk[:3], rtol=1e-6)
        until = time.time() + 60
        while client.service.sessions and time.time() < until:
            time.sleep(0.01)
        assert not client.service.sessions


def test_a_reader_that_stalls_or_leaves_holds_up_nobody(model):
    with running(model, "vla0,openpi", unnorm_key="tabletop") as client:
        request = json.dumps({"base64_rgb": [saved(picture())], "state": [], "instr": TEXT}).encode()
        for _ in range(3):
            stalled = Client(client.port, client.service).http
            stalled.request("POST", "/predict_base64_stream", request, {"Content-Type": "application/json"})
            with client.socket() as ws:                                     # closed before its answer
                ws.recv()
                ws.send(packed({"image": picture(), "prompt": TEXT}))
            assert len(ask_vla0(client, picture())) == model.cfg.horizon
            stalled.close()
        assert ask_openpi(client, picture()).shape == (8, 7) and not client.service.sessions


def test_points_are_streamed_too():
    model = make(importlib.import_module("a0"))
    with running(model) as client:
        torch.manual_seed(2)
        want = model.act([observation(picture())])[0][0]
        torch.manual_seed(2)
        request = {"instruction": TEXT, "images": {"third": encoded(picture())}}
        status, (*rows, last) = client("/v1/stream", request)
        assert status == 200 and "infer_ms" in last
        np.testing.assert_allclose([row["waypoint"] for row in rows], want, atol=1e-6)
        status, answer = client("/v1/stream", {"instruction": TEXT, "images": {}})
        assert status == 400 and "looks at ['third']" in answer["error"]


def test_streams_end_with_an_error_not_with_numbers():
    vla0 = importlib.import_module("vla0")
    model = make(vla0, draft="none")
    with running(model, "vla0") as client:
        model.cfg = dataclasses.replace(model.cfg, max_new_tokens=45)      # the text ends within its chunk
        request = {"base64_rgb": [saved(picture())], "instr": TEXT}
        assert client("/predict_base64", request)[0] == 500
        status, (*steps, last) = client("/predict_base64_stream", request)
        assert status == 200 and 1 <= len(steps) < 4 and "breaks off" in last["error"], (steps, last)
        model.cfg = dataclasses.replace(model.cfg, max_new_tokens=9)       # before its first step
        status, answer = client("/predict_base64_stream", request)
        assert status == 500 and "breaks off" in answer["error"]


# ---- Whose picture is it -----------------------------------------------------------------------------------

@pytest.mark.parametrize("sent, views, want", [
    ("image", "third", "image"), ("image wrist_image", "third", "image"), ("third x", "third", "third"),
    ("image wrist_image", "third wrist", "image wrist_image"),
    ("wrist agentview", "third wrist", "agentview wrist"),
    ("rgb_static rgb_gripper", "third wrist", "rgb_static rgb_gripper"),
    ("full_image left_wrist_image right_wrist_image", "cam_high cam_right_wrist cam_left_wrist",
     "full_image right_wrist_image left_wrist_image"),
    ("cam_high cam_low cam_left_wrist cam_right_wrist", "cam_low cam_right_wrist", "cam_low cam_right_wrist"),
    ("image", "third wrist", None), ("a b", "third", None), ("", "third", None), ("a", "b c", None),
    ("b a", "b c", "b a"), ("left_wrist_image", "wrist", None), ("b", "b c", None)])
def test_pictures_find_their_view_by_name_then_by_kind_or_not_at_all(sent, views, want):
    images, views = {name: name for name in sent.split()}, views.split()
    if want is None:
        with pytest.raises(serve.Refused, match="this model looks at"):
            serve.match_views(images, views)
    else:
        assert [*serve.match_views(images, views).items()] == [*zip(views, want.split())]


def test_aloha_and_droid_forms_are_read(model):
    with running(model, "openpi", unnorm_key="tabletop") as client, client.socket() as ws:
        ws.recv()
        image = picture(48, 52)
        aloha = {"cam_high": image.transpose(2, 0, 1), "cam_left_wrist": picture()}
        forms = [{"images": aloha, "state": np.zeros(8)},
                 {"observation/exterior_image_1_left": image, "observation/wrist_image_left": picture(),
                  "observation/joint_position": np.zeros(7), "observation/gripper_position": np.zeros(1)}]
        for body in forms:
            torch.manual_seed(3)
            want = model.act([{"instruction": TEXT, "images": {"third": image}}], unnorm_key="tabletop")[0][0]
            torch.manual_seed(3)
            ws.send(packed(body | {"prompt": TEXT}))
            np.testing.assert_allclose(unpacked(ws.recv())["actions"], want, atol=1e-6)


# ---- RoboBrain's robots ------------------------------------------------------------------------------------

x0 = importlib.import_module("robobrain_x0")
SERVED = [name for name, r in x0.ROBOTS.items() if r.name]


def robobrain(robot, **changes):
    """A small RoboBrain-X0 of one robot, with its statistics."""
    torch.manual_seed(0)
    r = x0.ROBOTS[robot]
    small = dict(patch_size=20, merge_size=2, window_size=80, vit_width=16, vit_depth=2, vit_mlp=16,
                 full_attention=(1,), llm_width=32, llm_depth=2, llm_mlp=32, llm_init=0.3, max_words=5,
                 mrope_section=(1, 1, 2), fast_min=-60)
    about = dict(robot=robot, prompt="", views=r.cameras, horizon=30, action_dim=7 * r.arms, image_size=0)
    cfg = dataclasses.replace(x0.PRESETS["tiny"], **small | about | changes)
    low = [-0.01] * cfg.action_dim
    stats = {name: {"action": {"q01": low, "q99": [0.01] * len(low)}} for name in r.stats}
    return x0.Model(cfg, x0.load_tokenizer(cfg), stats).eval()


def robot_request(robot, **changes):
    r = x0.ROBOTS[robot]
    pose = ([0.1, 0, 0, 0, 0, 0, 1, 0.5] if r.rotation == "quat" else [0.1] * 7) * r.arms
    images = dict.fromkeys(r.cameras, encoded(picture(48, 64)))
    return {"eef_pose": pose, "instruction": "Pick up", "images": images, "state": "ignored"} | changes


@pytest.fixture(scope="module", params=["franka"])
def robot(request):
    with running(robobrain(request.param), "robobrain,openvla", checkpoint="runs/x0") as client:
        client.robot = request.param
        yield client


def test_a_robot_gets_the_chunk_of_act_added_to_its_pose(robot):
    model, request, r = robot.service.model, robot_request(robot.robot), x0.ROBOTS[robot.robot]
    assert robot("/health")[1]["model_loaded"] and robot("/info")[1]["endpoints"]["/infer"] == "POST"
    assert robot("/info")[1]["model_path"] == "runs/x0"
    torch.manual_seed(1)
    status, answer = robot("/infer", request)
    assert status == 200 and answer["success"] and answer["processing_time"] > 0, answer
    seen = dict(zip(r.cameras, x0.request_images(robot.robot, request["images"])))
    torch.manual_seed(1)
    seen = {"instruction": "Pick up", "images": seen}
    _, info = model.act([seen], unnorm_key=r.stats[1], temperature=r.temperature)
    want = x0.integrate(robot.robot, request["eef_pose"], info["actions"][0])
    np.testing.assert_allclose(answer["eepose"], want, atol=1e-9)
    assert np.shape(answer["eepose"]) == (30, r.pose_dim) and answer["subtask"] == info["subtasks"][0]


def test_robots_wrong_requests_are_4xx_and_5xx_only_officially(robot):
    name, cameras = robot.robot, x0.ROBOTS[robot.robot].cameras
    wrong = [{"eef_pose": [1, 2]}, {"images": {}}, {"instruction": 7}, {"eef_pose": [float("nan")] * 16},
             {"instruction": "x" * 3000}]
    wrong += [{"images": dict.fromkeys(cameras, image)}
              for image in ("no base64", png_header(9000, 9000), encoded(picture(), "GIF"))]
    with running(robot.service.model, "robobrain", official=True) as official:
        for changes in wrong:
            status, answer = robot("/infer", robot_request(name, **changes))
            assert 400 <= status < 500 and answer["success"] is False and answer["error"], answer
            status, answer = official("/infer", robot_request(name, **changes))
            assert status == 500 and answer["success"] is False and answer["error"], answer
        for client in (robot, official):
            assert client("/infer", {"instruction": "x"})[0] == 400


def test_failed_decodes_are_422_and_hold_the_pose_unless_official():
    model, request = robobrain("franka"), robot_request("franka")
    with running(model, "robobrain") as ours, running(model, "robobrain", official=True) as official:
        model.complete = lambda *_: [model.cfg.action_id + 3, model.cfg.im_end_id]          # no chunk
        status, answer = ours("/infer", request)
        assert status == 422 and not answer["decode_ok"] and answer["eepose"] == [request["eef_pose"]] * 30
        status, answer = official("/infer", request)
        assert (status, len(answer["eepose"])) == (200, 30) and "Parsing failed" in answer["subtask"]


def test_an_unnorm_key_stands_for_the_statistics_that_a_robot_looks_up():
    model = robobrain("a2d")
    model.stats = {"mine": next(iter(model.stats.values()))}
    with running(model, "robobrain") as client:
        status, answer = client("/infer", robot_request("a2d"))
        assert status == 400 and "statistics for 'action.eepose.delta' are missing" in answer["error"]
    with running(model, "robobrain", unnorm_key="mine") as client:
        assert client("/infer", robot_request("a2d"))[0] == 200


GOLDEN = Recordings("robobrain_x0")


@pytest.mark.slow
@pytest.mark.golden
def test_recorded_requests_of_all_robots_get_the_recorded_answers():
    """Official mode; the model says the recorded ids. Without the other's vocabulary: what needs none."""
    case, sent = (next(c for c in GOLDEN.cases if c.kind == kind)
                  for kind in ("server_cases", "server_requests"))
    c, seen, words = case.config, 0, case.config["text_vocabulary"]
    path = Path(os.environ.get("THIRD_PARTY_DIR", "none")) / "robobrain_x0/fast_tokenizer.json"
    ids = {name: getattr(x0.Config, name) for name in vars(x0.Config) if name.endswith("_id")}
    model = robobrain("agilex", temperature=0.0)

    def decode(ids):
        said = [words.get(str(i), c["text_unknown"]) for i in ids if i < c["special_from"]]
        return "".join(word for word in said if not word.startswith("<|"))

    with running(model, "robobrain", official=True) as client:
        for want, run in zip(case.json(), sent.json()["cases"], strict=True):
            said, service = want.get("generated_token_ids"), client.service
            if not run.get("model_loaded", True) or said and not path.is_file():
                continue
            service.cfg = model.cfg = dataclasses.replace(
                model.cfg, **ids, robot=want["robot"], subtask=run["subtask_mode"], vocab=151_936, codes=2048,
                fast_min=-354)
            model.complete, model.stats = lambda *_, said=said: said, {}
            if said:
                model.stats = {key: {"action": value} for key, value in want["stats"].items()}
                model.tokenizer = x0.Words(model.tokenizer.text, x0.Fast.load(path))
                model.tokenizer.decode = decode
            for request in run["requests"]:
                status, got = client(request["path"], request["json"])
                expected = want.get(request["path"][1:], [want.get("status"), want.get("response")])
                expected = expected if isinstance(expected, list) else [200, expected]
                got.pop("processing_time", None)
                poses = [each.pop("eepose", []) for each in (got, expected[1])]
                np.testing.assert_allclose(*poses, rtol=0, atol=1e-9)
                assert [status, got] == expected, (run["index"], got)
                seen += 1
    assert seen >= (40 if path.is_file() else 10)


@pytest.mark.slow
def test_the_script_serves_another_robot_with_the_statistics_beside_the_checkpoint(tmp_path):
    """pytest tests/test_serve_wires.py -m slow -k the_script"""
    model = robobrain("a2d")
    model.save_pretrained(tmp_path)                            # a2d and r1lite are alike, but for the gripper
    stats = {"action.eepose": next(iter(model.stats.values()))}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(stats))
    command = [sys.executable, ROOT / "serve.py", "--ckpt", tmp_path, "--port", "0", "--device", "cpu",
               "--wire", "robobrain", "--robot", "r1lite"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        port = next(line for line in server.stdout if "serving on" in line).split("127.0.0.1:")[1].split()[0]
        client = Client(int(port), None)
        assert client("/info")[1]["service_name"] == "RoboBrain Robotics API for R1-Lite"
        status, answer = client("/infer", robot_request("r1lite"))
        assert status == 200 and np.shape(answer["eepose"]) == (30, 16), answer
    finally:
        server.terminate()
        assert "the last 1 inferences: p50" in server.communicate(timeout=60)[0]


# ---- What a client or the one who starts the server can get wrong ------------------------------------------

@pytest.mark.parametrize("wire, words", [
    ("openpi,vla-eval", "--wire openpi,vla-eval: both answer at /; choose one"),
    ("openvla,vla0,robobrain", "--wire vla0,robobrain: both answer at /health; choose one"),
    ("openvla,openvla", "both answer at /act"),
    ("opnpi", "there is no format 'opnpi'; did you mean 'openpi'"), ("openpi,", "there is no format ''")])
def test_formats_that_collide_or_do_not_exist_are_one_clear_line(wire, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--ckpt", "not/read", "--port", "0", "--wire", wire])
    with pytest.raises(SystemExit) as leave:
        cli(serve.main)
    lines = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and len(lines) == 1 and words in lines[0], lines


def test_what_a_model_cannot_speak_is_said_at_the_start(model, monkeypatch, capsys, tmp_path):
    for changes, size in (({"action_dim": 7}, "30 x 7"), ({"horizon": 20}, "20 x 14")):
        with pytest.raises(ValueError, match=f"agilex plays chunks of 30 x 14, this checkpoint's are {size}"):
            serve.create_app(robobrain("agilex", **changes), wire=["robobrain"])
    with pytest.raises(ValueError, match="'libero' has no such service; set --robot to one of a2d"):
        serve.create_app(robobrain("libero"), wire=["robobrain"])
    with pytest.raises(ValueError, match="RoboBrain-X0's deltas, this is a checkpoint of cogact"):
        serve.create_app(model, unnorm_key="other", wire=["robobrain"])
    with pytest.raises(ValueError, match="a0 answers points in the picture, these formats carry actions"):
        serve.create_app(make(importlib.import_module("a0")), wire=["openvla"])
    model.save_pretrained(tmp_path)
    for flags in (["--official"], ["--robot", "a2d"]):
        monkeypatch.setattr(sys, "argv", ["serve.py", "--ckpt", str(tmp_path), "--port", "0", *flags])
        with pytest.raises(SystemExit):
            cli(serve.main)
        assert "are for --wire robobrain; add it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "msgpack", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match='msgpack is not installed; run: pip install -e'):
        serve.pick_wires("openpi")


def test_a_token_in_the_address_is_enough_and_web_pages_of_elsewhere_are_refused(model):
    basic = "Basic " + base64.b64encode(b"robot:sesame").decode()
    with running(model, "cogact,openpi", unnorm_key="tabletop", token="sesame") as client:
        for header in (basic, "Bearer sesame", "Api-Key sesame"):
            assert client("/v1/info", Authorization=header)[0] == 200
        with client.socket(user="robot:sesame@") as ws:
            assert unpacked(ws.recv())["method"] == "cogact"
        with client.socket(Authorization="Api-Key sesame") as ws:
            assert unpacked(ws.recv())["method"] == "cogact"
        for header in (basic[:-4], "Basic !", "sesame", "Bearer", "Digest sesame", "Basic " + "\xe9"):
            assert client("/v1/info", Authorization=header)[0] == 401
        for headers, status in (({}, 401), ({"Authorization": "Api-Key no"}, 401),
                                ({"Authorization": "Api-Key sesame", "Origin": "http://evil.example"}, 403)):
            with pytest.raises(InvalidStatus) as refused, client.socket(**headers):
                pass
            assert refused.value.response.status_code == status
        body, kind = form(images=b"", json=b"{}")
        for page, status in (("http://evil.example", 403), (f"http://127.0.0.1:{client.port}", 400)):
            assert client("/api/inference", body, kind, Authorization=basic, Origin=page)[0] == status


IMAGE = picture(16, 16)
FORM = form(images=base64.b64decode(encoded(IMAGE)), json=b"@@")
ROUTES = {                                                     # path: (a good request, how it becomes bytes)
    "/act": {"image": json_numpy(IMAGE), "instruction": TEXT, "unnorm_key": "toy",
             "state": json_numpy(np.zeros(8))},
    "/predict_base64": {"base64_rgb": [saved(IMAGE)], "state": [0.0] * 8, "instr": TEXT},
    "/predict_base64_stream": {"base64_rgb": [saved(IMAGE)], "state": [0.0] * 8, "instr": TEXT},
    "/v1/act": {"instruction": TEXT, "images": {"third": encoded(IMAGE)}, "state": [0.0] * 8, "session": "a"},
    "/v1/stream": {"instruction": TEXT, "images": {"third": encoded(IMAGE)}, "mode": "chunk"},
    "/api/inference": {"task_description": TEXT}, "/v1/reset": {"session": "a"},
    "/v1/sim/step": {"sim": "a", "instruction": TEXT, "unnorm_key": "toy"},
    "/v1/sim": {"family": "pick", "seed": 5, "body": "gripper", "sim": "a"},
    "/v1/ask": {"question": TEXT, "ability": "pointing", "image": encoded(IMAGE)}}
JUNK = [None, True, -1, 0, 2**63, 1e308, float("nan"), "", "x" * 3000, "pick \n", [], {}, [[[]]], {"a": {}},
        {"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}, {"__numpy__": [], "dtype": {}, "shape": "3"},
        {"__numpy__": "AAAA", "dtype": "<f4", "shape": [2**40]}, "AAAA", "data:image/png;base64,AA",
        [float("inf")] * 8, ["a"] * 8, [None] * 99]
FRAMES = [*JUNK[:3], *JUNK[6:15], {b"__ndarray__": True, b"data": b"", b"dtype": "|O", b"shape": [2]},
          {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [-1]},
          {"__image__": 1, "format": "png", "data": b"GIF89a"}, {"__image__": 1, "format": [], "data": "x"},
          {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<M8[s]", b"shape": [1]}, np.full(8, np.nan),
          {b"__npgeneric__": True, b"data": {}, b"dtype": "<f4"}, np.zeros((9, 9)), msgpack.Timestamp(1),
          msgpack.ExtType(5, b"x"), {b"__ndarray__": [], "__image__": {}}]


def mutate(value, rng, junk):
    """`value` with one node somewhere replaced, removed, or given a strange neighbour."""
    value = copy.deepcopy(value)
    node, parents = value, []
    while isinstance(node, (dict, list)) and node and (not parents or rng.random() < 0.6):
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        parents.append((node, key))
        node = node[key]
    holder, key = parents[-1] if parents else ({}, "")
    what = rng.random()
    if what < 0.15:
        del holder[key]
    elif what < 0.25 and isinstance(holder, dict):
        holder[rng.choice(["imge", "", "x" * 300, "third", "wrist", "mode"])] = rng.choice(junk)
    else:
        holder[key] = rng.choice(junk)
    return value


def damage(raw, rng):
    """Some bytes torn off, or changed."""
    raw = bytearray(raw)
    if rng.random() < 0.4:
        return bytes(raw[:rng.randrange(len(raw))])
    for _ in range(rng.choice([1, 3, 30])):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def bad_bodies(path, n, rng):
    """Bodies for a route: mutated requests, damaged bytes, deep nesting."""
    for i in range(n):
        body = json.dumps(mutate(ROUTES[path], rng, JUNK) if i % 3 else ROUTES[path]).encode()
        if path == "/act" and i % 5 == 0:
            body = json.dumps({"encoded": body.decode()}).encode()
        if path == "/api/inference":
            body = FORM[0].replace(b"@@", body)
        if i % 3 == 0:
            body = damage(body, rng)
        yield body if i % 50 else b'{"instruction": ' + b"[" * 100_000


@pytest.fixture(scope="module")
def wild():
    model = make(importlib.import_module("cogact"), state_dim=8)
    with running(model, "openvla,cogact,vla0,openpi") as client, running(model, "vla-eval") as harness:
        client.harness = harness
        yield client


@pytest.mark.slow
@pytest.mark.parametrize("path", ROUTES)
def test_bad_requests_of_every_route_are_4xx(wild, path, n=40):
    rng, statuses = random.Random(path), []
    kind = FORM[1] if path == "/api/inference" else "application/json"
    for body in bad_bodies(path, n, rng):
        status, answer = wild(path, body, kind)
        statuses.append(status)
        if status != 200:
            assert 400 <= status < 500 and list(answer) == ["error"], (body, answer)
            assert "\n" not in answer["error"] and "Traceback" not in answer["error"]
    assert sum(status >= 400 for status in statuses) > (0.4 if path == "/v1/reset" else 0.6) * n
    good = json.dumps(ROUTES[path]).encode()
    status, _ = wild(path, FORM[0].replace(b"@@", good) if path == "/api/inference" else good, kind)
    assert status == {"/v1/sim/step": 404, "/v1/ask": 400}.get(path, 200)       # no such scene, no ability


@pytest.mark.slow
def test_bad_requests_of_robots_are_4xx(robot, monkeypatch, n=40):
    monkeypatch.setattr(robot.service.model, "complete", lambda *_: [])     # a good request: 422, no motion
    rng, good = random.Random(0), robot_request(robot.robot)
    for i in range(n):
        body = json.dumps(mutate(good, rng, JUNK) if i % 3 else good).encode()
        status, answer = robot("/infer", damage(body, rng) if i % 3 == 0 else body)
        assert 400 <= status < 500 and answer["success"] is False, (body, answer)
        assert "\n" not in answer["error"] and "Traceback" not in answer["error"]


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["openpi", "vla-eval"])
def test_bad_frames_are_answered_by_an_error_and_the_next_good_one_by_actions(wild, wire, n=40):
    rng, errors = random.Random(wire), 0
    seen = {"images": {"third": IMAGE}, "states": np.zeros(8), "task_description": TEXT}
    good = {"openpi": {"image": IMAGE, "state": np.zeros(8), "prompt": TEXT},
            "vla-eval": {"type": "observation", "payload": seen, "seq": 3, "timestamp": 0.0}}[wire]
    with (wild if wire == "openpi" else wild.harness).socket() as ws:
        if wire == "openpi":
            ws.recv()
        for i in range(n):
            raw = packed(mutate(good, rng, FRAMES) if i % 3 else good)
            raw = damage(raw, rng) if i % 3 == 0 else raw
            raw = raw if i % 25 else ("text", b"\x91" * 50_000, b"\xdd\xff\xff\xff\xff", b"")[i // 25 % 4]
            ws.send(raw)
            if wire == "vla-eval":                             # some messages need no answer: ask once more
                ws.send(packed(good | {"type": "hello", "seq": 77}))
            while True:
                answer = ws.recv()
                if wire == "openpi":
                    errors += isinstance(answer, str)
                    assert isinstance(answer, bytes) or "\n" not in answer and "Traceback" not in answer
                    break
                answer = from_message(answer)
                errors += answer["type"] == "error"
                if answer["seq"] == 77:
                    break
        ws.send(packed(good))
        answer = unpacked(ws.recv())
        assert errors > 0.4 * n and "actions" in (answer if wire == "openpi" else answer["payload"])


@pytest.mark.slow
@pytest.mark.long
def test_20_000_bad_requests(wild, robot, monkeypatch):
    """pytest tests/test_serve_wires.py -m long -k 20_000   (minutes)"""
    for path in ROUTES:
        test_bad_requests_of_every_route_are_4xx(wild, path, n=500 if path == "/v1/sim" else 2000)
    for wire in ("openpi", "vla-eval"):
        test_bad_frames_are_answered_by_an_error_and_the_next_good_one_by_actions(wild, wire, n=2000)
    test_bad_requests_of_robots_are_4xx(robot, monkeypatch, n=1500)


def test_nothing_is_unpickled(wild, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)
    evil = np.array([Evil()], object)
    status, answer = wild("/predict_base64", {"base64_rgb": [saved(evil)], "instr": TEXT})
    assert status == 400 and "is no array of numbers" in answer["error"]
    body = {"image": {"__numpy__": saved(evil), "dtype": "|O", "shape": [1]}, "instruction": TEXT}
    assert wild("/act", body)[0] == 400 and not (tmp_path / "made").exists()
    assert "pickle" not in (ROOT / "serve.py").read_text()


def test_a_frame_over_the_limit_ends_that_connection_only(wild):
    with wild.socket() as ws, wild.socket() as other:
        ws.recv(), other.recv()
        with pytest.raises(ConnectionClosed):
            ws.send(bytes(serve.MAX_BODY + 1))
            ws.recv()
        other.send(packed({"image": IMAGE, "prompt": TEXT}))
        assert unpacked(other.recv())["actions"].shape == (4, 7)


def test_readmes_socket_client_runs_as_written(wild, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    client = [block for block in blocks if "ws://127.0.0.1:8000" in block]
    assert client, "README shows no client for the socket"
    Image.fromarray(picture(120, 160)).save(tmp_path / "camera.png")
    code = client[0].replace("127.0.0.1:8000", f"127.0.0.1:{wild.port}")
    played = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert played.returncode == 0 and len(re.findall(r"-?\d+\.\d+", played.stdout)) >= 7, played.stderr


# ---- Other projects' own clients (slow: they are fetched from PyPI) ----------------------------------------

OPENPI = """
import sys, numpy as np
from openpi_client import websocket_client_policy
client = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
assert client.get_server_metadata()["method"]
image = np.load(sys.argv[2])
out = client.infer({"observation/image": image, "observation/wrist_image": image,
                    "observation/state": np.zeros(8), "prompt": "pick up the red cube"})
np.save(sys.argv[3], out["actions"])
try:
    client.infer({"prompt": ""})
except RuntimeError as e:
    print(e)
assert client.infer({"image": image, "prompt": "again"})["actions"].shape == out["actions"].shape
"""
VLA_EVAL = """
import asyncio, sys, numpy as np
from vla_eval.connection import Connection
async def main():
    image, out = np.load(sys.argv[2]), []
    async with Connection(f"ws://127.0.0.1:{sys.argv[1]}") as harness:
        assert harness.server_info["observation_params"] == {"send_state": True}
        await harness.start_episode({"task": {"name": "x"}})
        for _ in range(3):
            seen = {"images": {"agentview": image}, "states": np.zeros(8),
                    "task_description": "pick up the red cube"}
            out.append((await harness.act(seen))["actions"])
        await harness.end_episode({"success": True})
        try:
            await harness.act({"images": {}, "task_description": ""})
        except RuntimeError as e:
            print(e)
    np.save(sys.argv[3], out)
asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("wire, package, script", [
    ("openpi", "openpi-client typing_extensions", OPENPI), ("vla-eval", "vla-eval", VLA_EVAL)])
def test_their_own_clients_get_the_chunk_of_act(model, tmp_path, wire, package, script):
    """pytest tests/test_serve_wires.py -m long -k own_clients

    PyPI, a throw-away environment, 3 minutes. Passed with vla-eval 0.8.0 and with openpi-client 0.1.2, which
    forgets to ask for typing_extensions.
    """
    install = f"{sys.executable} -m venv {tmp_path}/venv && {tmp_path}/venv/bin/pip install -q {package}"
    made = subprocess.run(install, shell=True, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"pip install {package} failed: {made.stderr.strip().splitlines()[-1][:200]}")
    np.save(tmp_path / "image.npy", picture(40, 52, seed=1))
    with running(model, wire, unnorm_key="tabletop") as client:
        torch.manual_seed(3)
        seen = {"instruction": TEXT, "images": {"third": picture(40, 52, seed=1)}}
        chunk = model.act([seen], unnorm_key="tabletop")[0][0]
        torch.manual_seed(3)
        files = tmp_path / "image.npy", tmp_path / "out.npy"
        played = subprocess.run([tmp_path / "venv/bin/python", "-c", script, str(client.port), *files],
                                capture_output=True, text=True, timeout=120)
        assert played.returncode == 0 and "there are the pictures []" in played.stdout, played.stderr
    got = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(got, chunk[:len(got)], atol=1e-6)
    assert len(got) == (8 if wire == "openpi" else 3)
