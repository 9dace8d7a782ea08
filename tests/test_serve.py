"""serve.py: the real server on a loopback port, driven by the standard library's client."""
import base64
import dataclasses
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

import a0
import cogact
import serve
from common import cli

ROOT = Path(__file__).resolve().parent.parent


def statistics(scale):
    """One dataset's entry of dataset_statistics.json: six dims in [-scale, scale], the gripper as it is."""
    low, high = [-scale] * 6 + [0.0], [scale] * 6 + [1.0]
    return {"action": {"mean": [0.0] * 7, "std": [1.0] * 7, "min": low, "max": high, "q01": low, "q99": high,
                       "mask": [True] * 6 + [False]}, "num_transitions": 10, "num_trajectories": 1}


def tiny_model(stats, **changes):
    torch.manual_seed(0)
    cfg = dataclasses.replace(cogact.PRESETS["tiny"], state_dim=8, **changes)
    model = cogact.Model(cfg, cogact.load_tokenizer(cfg), stats).eval()
    last = model.action_model.net.final_layer.linear         # zero when fresh: the chunk would be the noise
    torch.nn.init.normal_(last.weight, std=0.02)
    return model


@contextmanager
def running(model, **options):
    """A server in a thread; yields call(path, body=None, **headers) -> (status, JSON)."""
    sock = serve.bind("127.0.0.1", 0)
    app = serve.create_app(model, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()

    def call(path, body=None, **headers):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        try:
            asked = urllib.request.Request(call.url + path, data, headers)
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)
    call.url, call.service = "http://{}:{}".format(*sock.getsockname()), app.state.service
    while not server.started:
        time.sleep(0.01)
    yield call
    server.should_exit = True
    thread.join(10)
    sock.close()


@pytest.fixture(scope="module")
def model():
    return tiny_model({"tabletop": statistics(0.05), "other": statistics(2.0)})


@pytest.fixture(scope="module")
def call(model):
    with running(model, unnorm_key="tabletop") as call:
        yield call


def picture(h=64, w=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def encoded(array, form="PNG", **how):
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **how)
    return base64.b64encode(file.getvalue()).decode()


def request(**changes):
    """A good request with changes; `name=...` leaves a field out."""
    body = {"instruction": "pick up the red cube", "images": {"third": encoded(picture())}, "state": [0] * 8}
    return {k: v for k, v in (body | changes).items() if v is not ...}


def png_header(w, h):
    """The first bytes of a PNG file that claims w x h pixels."""
    raw = b"\x89PNG\r\n\x1a\n"
    for content in (b"IHDR" + struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0), b"IDAT"):
        raw += struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    return base64.b64encode(raw).decode()


# ---- What a client gets ------------------------------------------------------------------------------------

def test_act_answers_what_the_model_predicts_in_robot_units(call, model):
    torch.manual_seed(3)
    status, answer = call("/v1/act", request())
    torch.manual_seed(3)
    observation = {"instruction": "pick up the red cube", "images": {"third": picture()}}
    chunks, _ = model.act([observation], unnorm_key="tabletop")
    assert status == 200 and np.array_equal(np.float32(answer["actions"]), chunks[0])   # PNG is lossless
    assert np.shape(answer["actions"]) == (8, 7) and answer["infer_ms"] > 0
    assert answer["info"] == {"mode": "chunk", "unnorm_key": "tabletop"}


def test_unnorm_key_of_the_request_wins(call):
    torch.manual_seed(3)
    small = np.array(call("/v1/act", request())[1]["actions"])
    torch.manual_seed(3)
    large = np.array(call("/v1/act", request(unnorm_key="other"))[1]["actions"])
    np.testing.assert_allclose(large[:, :6], small[:, :6] * 40, rtol=1e-4)
    assert np.array_equal(large[:, 6], small[:, 6])


def test_jpeg_and_any_picture_size_are_taken(call):
    status, answer = call("/v1/act", request(images={"third": encoded(picture(48, 100), "JPEG")}, state=...))
    assert status == 200, answer


def test_health_and_info_describe_the_server(call):
    assert call("/healthz") == (200, {"status": "ok"})
    status, info = call("/v1/info")
    assert status == 200 and info["method"] == "cogact" and info["norm_keys"] == ["other", "tabletop"]
    assert (info["horizon"], info["action_dim"], info["state_dim"]) == (8, 7, 8)
    assert info["views"] == {"third": [96, 96]} and info["execute"] == 4 and info["mode"] == "chunk"


def test_requests_at_the_same_time_are_all_answered(call):
    with ThreadPoolExecutor(6) as pool:
        assert [s for s, _ in pool.map(lambda _: call("/v1/act", request()), range(12))] == [200] * 12


# ---- Sessions ----------------------------------------------------------------------------------------------

def test_steps_play_the_chunk_and_sessions_do_not_mix(model):
    with running(model, unnorm_key="tabletop", execute=3) as call:
        def step(session, **changes):
            status, answer = call("/v1/act", request(session=session, **changes))
            assert status == 200, answer
            return np.array(answer["actions"])
        torch.manual_seed(5)
        chunk = np.array(call("/v1/act", request(mode="chunk"))[1]["actions"])
        torch.manual_seed(5)
        first = [step("a")]
        torch.manual_seed(6)
        step("b")                                               # another session, other noise, in between
        first += [step("a"), step("a")]
        assert first[0].shape == (1, 7)
        np.testing.assert_allclose(np.concatenate(first), chunk[:3], rtol=1e-6)
        torch.manual_seed(7)
        fourth = step("a")                                      # a new chunk after three actions
        assert not np.allclose(fourth, chunk[3])
        assert call("/v1/reset", {"session": "a"}) == (200, {"forgotten": True})
        assert call("/v1/reset", {"session": "a"}) == (200, {"forgotten": False})
        torch.manual_seed(5)
        np.testing.assert_allclose(step("a")[0], chunk[0], rtol=1e-6)
        torch.manual_seed(5)                                    # a new instruction starts anew as well
        changed = step("a", instruction="push the blue ball")
        torch.manual_seed(5)
        np.testing.assert_allclose(changed, step("c", instruction="push the blue ball"), rtol=1e-6)


def test_number_of_sessions_is_bounded(model, monkeypatch):
    monkeypatch.setattr(serve, "MAX_SESSIONS", 3)
    with running(model, unnorm_key="tabletop") as call:
        for name in ("a", "b", "c", "a", "d"):                          # b is the one unused for longest
            assert call("/v1/act", request(mode="step", session=name))[0] == 200
        assert list(call.service.sessions) == ["c", "a", "d"]


def test_sessions_expire(model):
    with running(model, unnorm_key="tabletop") as call:
        call("/v1/act", request(mode="step", session="a"))
        *known, used = call.service.sessions["a"]
        call.service.sessions["a"] = *known, used - serve.SESSION_SECONDS - 1
        call("/v1/act", request(mode="step", session="b"))
        assert list(call.service.sessions) == ["b"]


def test_reset_without_a_body_forgets_the_nameless_session(call):
    assert call("/v1/act", request(mode="step"))[0] == 200
    assert call("/v1/reset", b"") == (200, {"forgotten": True})


def test_points_come_without_statistics_and_motion_is_refused():
    model = a0.Model(a0.PRESETS["tiny"], a0.load_tokenizer(a0.PRESETS["tiny"])).eval()
    torch.nn.init.normal_(model.model.final_layer.ffn_final.fc2.weight, std=0.2)
    for flags in ({"unnorm_key": "tabletop"}, {"execute": 2}):
        with pytest.raises(ValueError, match="a0 answers points"):
            serve.create_app(model, **flags)
    with running(model) as call:
        torch.manual_seed(3)
        status, answer = call("/v1/act", request(images={"third": encoded(picture(48, 100))}))
        torch.manual_seed(3)
        seen = {"instruction": "pick up the red cube", "images": {"third": picture(48, 100)}}
        points, _ = model.act([seen])
        assert status == 200 and np.array_equal(np.float32(answer["waypoints"]), points[0]), answer
        assert np.shape(answer["waypoints"]) == (5, 2) and call("/v1/info")[1]["predicts"] == "waypoints"
        for wrong in ({"mode": "step"}, {"unnorm_key": "tabletop"}):
            status, answer = call("/v1/act", request(**wrong))
            assert status == 400 and 'answers points in the picture: mode "chunk"' in answer["error"]


# ---- What a client can get wrong ---------------------------------------------------------------------------

GREY = encoded(picture()[..., 0])
BAD = {
    "no instruction": (request(instruction=...), 400, '"instruction" is missing, empty'),
    "blank instruction": (request(instruction=" \n"), 400, "missing, empty"),
    "instruction of another type": (request(instruction=["a"]), 400, "must be a string, found a list"),
    "long instruction": (request(instruction="x" * 2001), 413, "2,001 characters, at most 2000"),
    "half a surrogate": (request(instruction="pick \ud800"), 400, "no valid Unicode"),
    "no images": (request(images=...), 400, "looks at ['third']"),
    "another view": (request(images={"wrist": ""}), 400, "['wrist']; this model looks at ['third']"),
    "a view too many": (request(images={"third": "", "wrist": ""}), 400, "send exactly these"),
    "nine images": (request(images={str(i): "" for i in range(9)}), 413, "9 images, at most 8"),
    "images as a list": (request(images=[GREY]), 400, '"images" must be an object, found a list'),
    "image as pixels": (request(images={"third": [[0]]}), 400, "images['third'] must be a string"),
    "no base64": (request(images={"third": "data:image/png;base64,AA"}), 400, "['third'] is not base64"),
    "no image": (request(images={"third": "AAAA"}), 400, "(3 bytes) is no whole PNG or JPEG"),
    "torn image": (request(images={"third": encoded(picture())[:4000]}), 400, "no whole PNG or JPEG"),
    "a GIF": (request(images={"third": encoded(picture(), "GIF")}), 400, "no whole PNG or JPEG"),
    "grey image": (request(images={"third": GREY}), 400, "mode 'L'; send 8-bit RGB"),
    "one pixel": (request(images={"third": encoded(picture(1, 1))}), 400, "images['third']"),
    "large image": (request(images={"third": png_header(4097, 8)}), 413, "4097 x 8 pixels, at most 4096"),
    "huge image": (request(images={"third": png_header(60000, 60000)}), 400, "no whole PNG or JPEG"),
    "short state": (request(state=[0.0] * 7), 400, '"state" must be 8 finite numbers, found 7'),
    "state with text": (request(state=[0.0] * 7 + ["1"]), 400, "8 finite numbers"),
    "state with true": (request(state=[True] * 8), 400, "8 finite numbers"),
    "state with NaN": (request(state=[float("nan")] * 8), 400, "8 finite numbers"),
    "state with a huge integer": (request(state=[10**400] * 8), 400, "8 finite numbers"),
    "state as a number": (request(state=1), 400, '"state" must be a list, found a number'),
    "unknown unnorm_key": (request(unnorm_key="nope"), 400, "'nope': this checkpoint has statistics for "
                                                            "['other', 'tabletop']"),
    "unknown mode": (request(mode="fast"), 400, 'choose "chunk" or "step"'),
    "unknown field": (request(instructon="a"), 400, "field 'instructon'; did you mean 'instruction'?"),
    "a list": ([1, 2], 400, "the body is a list; send an object"),
    "no JSON": (b"{", 400, "the body is not JSON"),
    "no UTF-8": (b'{"instruction": "\xff"}', 400, "the body is not JSON"),
    "nothing": (b"", 400, "the body is not JSON"),
    "deep JSON": (b"[" * 200_000, 400, "the body is not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_request_is_one_clear_line(call, name):
    body, status, words = BAD[name]
    got, answer = call("/v1/act", body)
    assert (got, list(answer)) == (status, ["error"]), answer
    assert words in answer["error"] and "\n" not in answer["error"] and "Traceback" not in answer["error"]


def test_body_over_the_limit_is_refused_and_the_client_hears_it(call):
    status, answer = call("/v1/act", b'{"instruction": "' + b"x" * (serve.MAX_BODY + 1) + b'"}')
    assert status == 413 and "larger than 33,554,432 bytes" in answer["error"]


def test_a_web_page_cannot_post_without_asking(call):
    status, answer = call("/v1/act", request(), Content_Type="text/plain")
    assert status == 415 and "Content-Type: application/json" in answer["error"]


def test_unknown_route_names_the_routes(call):
    assert call("/act", request())[0] == call("/v1/act/", request())[0] == 404 and call("/v1/act")[0] == 405
    assert "POST /v1/act" in call("/v1/predict", {})[1]["error"]


def test_damaged_pictures_are_never_our_fault(call):
    rng = np.random.default_rng(0)
    for form in ("PNG", "JPEG"):
        whole = base64.b64decode(encoded(picture(), form))
        for _ in range(20):
            torn = bytearray(whole)
            for at in rng.integers(0, len(torn), 6):
                torn[at] = rng.integers(256)
            status, answer = call("/v1/act", request(images={"third": base64.b64encode(torn).decode()}))
            assert status in (200, 400, 413), answer                    # JPEG often survives a flipped byte


@pytest.mark.parametrize("lacking", ["q01", "q99"])
def test_damaged_statistics_are_refused_at_the_start_and_over_http(model, lacking):
    torn = {"action": {k: v for k, v in statistics(1.0)["action"].items() if k != lacking}}
    again = tiny_model({"tabletop": statistics(0.05), "torn": torn})
    with running(again, unnorm_key="tabletop") as call:
        status, answer = call("/v1/act", request(unnorm_key="torn"))
        assert status == 400 and f"no {lacking}" in answer["error"]
    for stats in ({"torn": torn}, {"torn": {}}):
        again.stats = stats
        with pytest.raises((serve.Refused, ValueError), match="statistics"):
            serve.create_app(again)


def test_token_is_asked_for(model):
    with running(model, unnorm_key="tabletop", token="sesame") as call:
        assert call("/healthz")[0] == 200
        assert call("/v1/info")[0] == 401 and call("/v1/reset", {})[0] == 401
        assert call("/v1/act", request(), Authorization="Bearer wrong")[0] == 401
        assert call("/v1/act", request(), Authorization="Bearer sesame")[0] == 200


def test_a_missing_unnorm_key_is_refused_when_there_are_several(model):
    with running(model) as call:
        status, answer = call("/v1/act", request())
        assert status == 400 and "no unnorm_key was given" in answer["error"] and "other" in answer["error"]
        assert call("/v1/act", request(unnorm_key="tabletop"))[0] == 200


def test_actions_that_are_not_finite_never_leave():
    model = tiny_model({"tabletop": statistics(0.05)})
    with running(model) as call:
        assert call("/v1/act", request())[0] == 200
        with torch.no_grad():
            model.action_model.net.final_layer.linear.bias[0] = float("nan")
        for mode in ("chunk", "step"):
            status, answer = call("/v1/act", request(mode=mode))
            assert status == 500 and "not finite" in answer["error"]
        assert not call.service.sessions
        with pytest.raises(serve.Refused, match="not finite"):          # nor does such a model start to serve
            serve.create_app(model)


# ---- The script --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "last"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flags, words", [
    (["--unnorm-key", "nope"], "unnorm_key='nope': this checkpoint has statistics for ['other', 'tabletop']"),
    (["--ckpt", "no/such/folder"], "no/such/folder"),
    (["--graphs"], "--graphs: CUDA graphs need a CUDA device, this is cpu; leave it out"),
    (["--int8"], "--int8 is for methods that write actions word by word, vla0 and robobrain_x0; cogact does not"),
    (["--model", "nope"], "nope"),
    (["--model", "robobrain_x0"], "leave --model out"),
    (["--unnorm-key", ""], "--unnorm-key '' cannot be used"),
    (["--token", " "], "--token ' ' cannot be used"),
    (["--token="], "'--token=' cannot be used"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--device", "meta"], "--device 'meta' cannot"),
    (["--device", "nope"], "nope"),
    (["--execute", "0"], "execute"),
    (["--host", "256.1.1.1"], "--host 256.1.1.1 --port 0"),
    (["--host", "0.0.0.0"], "could move the robot; set --token SECRET, or --no-auth"),
    (["--port", "70000"], "--port: 70000 is not in 0 .. 65535"),
])
def test_a_wrong_flag_is_one_line_and_exit_code_2(checkpoint, flags, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--ckpt", str(checkpoint), "--port", "0", *flags])
    with pytest.raises(SystemExit) as leave:
        cli(serve.main)
    lines = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and len(lines) == 1 and words in lines[0], lines


def test_a_port_in_use_is_one_line_before_anything_is_loaded(checkpoint, call, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--ckpt", "not/read", "--port", call.url.split(":")[-1]])
    with pytest.raises(SystemExit) as leave:
        cli(serve.main)
    assert leave.value.code == 2 and "in use" in capsys.readouterr().err


def test_missing_fastapi_names_the_install_line(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--ckpt", str(checkpoint)])
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(SystemExit) as leave:
        cli(serve.main)
    assert leave.value.code == 2 and 'pip install -e ".[serve]"' in capsys.readouterr().err


@pytest.mark.slow
def test_readme_client_drives_the_real_script(checkpoint, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    client = next(block for block in blocks if "/v1/act" in block)
    Image.fromarray(picture(120, 160)).save(tmp_path / "camera.png")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, ROOT / "serve.py", "--ckpt", checkpoint, "--unnorm-key", "tabletop",
               "--host", "0.0.0.0", "--no-auth", "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        said = ""
        for line in server.stdout:
            said += line
            if "serving on" in line:
                break
        port = int(re.search(r"serving on http://[\d.]+:(\d+)", said).group(1))
        client = client.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        played = subprocess.run([sys.executable, "-c", client], cwd=tmp_path, capture_output=True, text=True)
        assert played.returncode == 0, played.stderr
        assert len(re.findall(r"-?\d+\.\d+", played.stdout)) >= 7, played.stdout
    finally:
        server.send_signal(signal.SIGTERM)
        rest, warned = server.communicate(timeout=60)
    assert "the last 1 inferences: p50" in rest and "method cogact" in said
    assert "warning: listening at 0.0.0.0" in warned and "Traceback" not in warned


def test_project_installs_no_module(tmp_path):
    """Whether the project is installed or not: from another folder, no file of it can be imported."""
    names = [path.stem for path in ROOT.glob("*.py")]
    code = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True)
    assert found.strip() == "[]"
