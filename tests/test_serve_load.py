"""serve.py under load: many robots at once, clients that leave, a server that is told to stop."""
import http.client
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import serve
from test_methods import make
from test_serve import ROOT, encoded

pytest.importorskip("msgpack", reason='pip install -e ".[serve]"')
pytest.importorskip("websockets", reason='pip install -e ".[serve]"')
from test_serve_wires import TEXT, Client, from_json_numpy, json_numpy, packed, unpacked  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

SMALL = dict(history=4, image_size=48, image_tokens=4, vit_depth=1, llm_depth=2)
method = importlib.import_module("robovlms")


def view(session, k):
    """The picture of a session's k-th step: squares of its own."""
    squares = np.random.default_rng([session, k]).integers(0, 256, (4, 4, 3), np.uint8)
    return np.kron(squares, np.ones((12, 12, 1), np.uint8))


def plan(model, sessions, n):
    """What the replies must be, (sessions, n, 7): each depends on the four last pictures of its session."""
    policies = [method.Policy(model, execute=1) for _ in range(sessions)]
    out = np.array([[policy.step({"instruction": TEXT, "images": {"third": view(s, k)}}) for k in range(n)]
                    for s, policy in enumerate(policies)])
    assert (np.abs(np.diff(out, axis=1)).max(-1) > 5e-6).mean() > 0.98              # a mix-up would be seen
    assert n < 2 or (np.abs(out - np.roll(out, 1, 0)).max(-1) > 5e-6).mean() > 0.98 or sessions == 1
    return out


class Refused(Exception):
    """The server is stopping, and said so."""


def robot(port, session):
    """One of three kinds of client, -> ask(image) -> action (7,)."""
    client, name = Client(port, None), f"robot{session}"
    if session % 3 == 0:
        ws = client.socket().__enter__()
        ws.recv()

        def ask(image):
            ws.send(packed({"image": image, "prompt": TEXT}))
            return unpacked(ws.recv())["actions"][0]
        return ask

    def ask(image):
        if session % 3 == 1:
            about = "/v1/act", {"instruction": TEXT, "images": {"third": encoded(image)}, "session": name}
        else:
            about = f"/act?session={name}", {"image": json_numpy(image), "instruction": TEXT}
        status, answer = client(*about)
        if status == 503:
            raise Refused(answer)
        assert status == 200, answer
        return from_json_numpy(answer) if session % 3 == 2 else answer["actions"][0]
    return ask


def drive(port, wanted, told=None, times=None):
    """Play all sessions at once, each in order -> how each session ended; times: gets each reply's [ms].

    told: an event after which the server may refuse; what is answered must be right even then.
    """
    times, ends = [] if times is None else times, Counter()

    def play(session):
        sent = 0.0
        try:
            ask = robot(port, session)
            for k, want in enumerate(wanted[session]):
                image, sent = view(session, k), time.perf_counter()
                got = ask(image)
                times.append(1000 * (time.perf_counter() - sent))
                np.testing.assert_allclose(got, want, rtol=0, atol=1e-6, err_msg=f"{session}, step {k}")
            ends["all"] += 1
        except (Refused, ConnectionRefusedError) as e:
            ends["refused" if told and told.is_set() else repr(e)] += 1
        except (ConnectionClosed, InvalidStatus) as e:
            said = e.response.status_code if isinstance(e, InvalidStatus) else e.rcvd and e.rcvd.code
            ends["refused" if told and told.is_set() and said in (503, 1012) else repr(e)] += 1
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as e:
            late = told and told.is_set() and sent > told.at                        # never accepted
            ends["too late" if late else repr(e)] += 1
        except Exception as e:
            ends[repr(e)[:300]] += 1
    threads = [threading.Thread(target=play, args=(s,)) for s in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    return ends


def leave(port, rng):
    """A client that goes away: in mid-request, or before its answer."""
    body = {"instruction": TEXT, "images": {"third": encoded(view(99, 0))}, "mode": "chunk"}
    body = json.dumps(body).encode()
    raw = b"POST /v1/act HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    raw = raw % len(body) + body
    if rng.random() < 0.5:
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(raw if rng.random() < 0.5 else raw[:rng.randrange(len(raw))])
        return
    with Client(port, None).socket() as ws:
        ws.send(packed({"image": view(99, 1), "prompt": TEXT}))
        ws.socket.shutdown(socket.SHUT_RDWR)


@contextmanager
def leaving(port):
    """Clients come and go all the time."""
    done = threading.Event()

    def go():
        rng = random.Random(0)
        while not done.wait(0.05):
            try:
                leave(port, rng)
            except OSError:                                    # the server has stopped
                return
    thread = threading.Thread(target=go)
    thread.start()
    yield
    done.set()
    thread.join()


@contextmanager
def serving(model, **options):
    """A server in a thread -> (port, service, stop): stop() does what SIGTERM does."""
    sock = serve.bind("127.0.0.1", 0)
    app = serve.create_app(model, wire=["openpi", "openvla"], execute=1, **options)
    server = serve.create_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)

    def stop():
        server.should_exit = True
    yield sock.getsockname()[1], app.state.service, stop
    stop()
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def model():
    return make(method, **SMALL)


# ---- Batching, on its own ---------------------------------------------------------------------------------

def test_who_waits_is_asked_together_in_order_and_who_is_alone_never_waits(model):
    sizes, held, go, act = [], threading.Event(), threading.Event(), model.act

    def slow(observations, **how):
        sizes.append(len(observations))
        held.set()
        go.wait(30)
        return act(observations, **how)
    with serving(model, batch=3) as (port, service, _):
        done, model.act = [], slow
        seen = {"instruction": TEXT, "images": {"third": view(0, 0)}}
        threads = []

        def ask(i, name):
            more = {"state": np.zeros(8, np.float32)} if name == "g" else {}
            service.answer({**seen, **more}, None, "step", name)
            done.append(i)
        for i, name in enumerate("abccdefg"):
            threads.append(threading.Thread(target=ask, args=(i, name)))
            threads[-1].start()
            held.wait(30)
            while len(service.waiting) < i:                    # the first is asked at once, the others wait
                time.sleep(0.001)
        go.set()
        for thread in threads:
            thread.join(30)
        model.act = act
    # a alone; b and c; c again, d, e (three at most); f; g is unlike: it also has a state
    assert sizes == [1, 2, 3, 1, 1] and sorted(done) == [*range(8)] and done.index(2) < done.index(3)


def test_a_bad_request_of_a_batch_is_its_own(model):
    """What only the model's own check finds: the others of its batch are answered as if it were not there."""
    held, go, act, answers = threading.Event(), threading.Event(), model.act, {}

    def picky(observations, **how):
        held.set()
        go.wait(30)
        if any(o["instruction"] == "bad" for o in observations):
            raise ValueError("this model knows no such word")
        return act(observations, **how)
    with serving(model) as (port, service, _):
        model.act, images = picky, {"third": view(0, 0)}

        def ask(i, words):
            try:
                answers[i] = service.answer({"instruction": words, "images": images}, None, "chunk")[0]
            except serve.Refused as e:
                answers[i] = e.status
        threads = [threading.Thread(target=ask, args=each) for each in enumerate([TEXT, TEXT, "bad", TEXT])]
        for i, thread in enumerate(threads):
            thread.start()
            held.wait(30)
            while len(service.waiting) < i:
                time.sleep(0.001)
        go.set()
        for thread in threads:
            thread.join(30)
        model.act = act
    want = act([{"instruction": TEXT, "images": images}])[0][0]
    assert answers.pop(2) == 400 and len(answers) == 3
    for got in answers.values():
        np.testing.assert_allclose(got, want, atol=1e-6)


# ---- Load -------------------------------------------------------------------------------------------------

def test_sessions_at_once_get_their_own_replies_in_order(model):
    wanted = plan(model, 7, 8)
    act, first = model.act, []

    def held(observations, **how):                             # the first waits until others wait behind it
        while not first and len(service.waiting) < 2:
            time.sleep(0.001)
        first.append(observations)
        return act(observations, **how)
    with serving(model) as (port, service, _), leaving(port):
        model.act = held
        assert drive(port, wanted) == {"all": 7}
        assert service.asked > service.times[""].count                   # some went together
        model.act = act


def amid(stop, times, count):
    """Call stop() after so many replies -> the event that says so, and when it was."""
    told = threading.Event()

    def wait():
        while len(times) < count:
            time.sleep(0.005)
        told.at = time.perf_counter()
        told.set()
        stop()
    threading.Thread(target=wait, daemon=True).start()
    return told


def test_told_to_stop_every_request_is_answered_or_refused(model):
    wanted, times, act = plan(model, 6, 25), [], model.act
    with serving(model) as (port, service, stop):
        told = amid(stop, times, 40)
        # slow from then on: it must hear of it while there is something left to refuse
        model.act = lambda *a, **how: (time.sleep(0.05 * told.is_set()), act(*a, **how))[1]
        ends = drive(port, wanted, told, times)
        model.act = act
        assert sum(ends.values()) == 6 and set(ends) <= {"refused", "too late"}, ends
        assert 40 <= len(times) < 150
    for _ in range(1000):                                      # its sessions are forgotten after it stopped
        if not service.waiting:
            break
        time.sleep(0.01)
    assert not service.under_way and not service.waiting


@contextmanager
def script(model, folder):
    """The script itself, in a process -> (process, port)."""
    model.save_pretrained(folder)
    command = [sys.executable, ROOT / "serve.py", "--ckpt", folder, "--port", "0", "--device", "cpu",
               "--wire", "openpi,openvla", "--execute", "1"]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        line = next(line for line in server.stdout if "serving on" in line)
        yield server, int(line.split("127.0.0.1:")[1].split()[0])
    finally:
        server.kill()
        server.stdout.close()


def resident(pid):
    """MiB of memory of a process."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return int(next(line for line in file if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_32_sessions_of_200_requests(model, tmp_path, sessions=32, n=200):
    """taskset -c 0,1 pytest tests/test_serve_load.py -m long -s"""
    wanted, times, memory = plan(model, sessions, n), [], []
    with script(model, tmp_path) as (server, port):
        done = threading.Event()

        def watch():
            while not done.wait(0.2):
                memory.append((len(times), resident(server.pid)))
        watcher = threading.Thread(target=watch)
        watcher.start()
        begin = time.perf_counter()
        with leaving(port):
            ends = drive(port, wanted, times=times)
        done.set()
        watcher.join()
        seconds, (p50, p99) = time.perf_counter() - begin, np.percentile(times, [50, 99])
        half, end = next(m for count, m in memory if count >= len(times) / 2), memory[-1][1]
        print(f"\n{len(times)} replies in {seconds:.1f} s, p50 {p50:.1f} ms, p99 {p99:.1f} ms; "
              f"{half:.1f} MiB at half time, {end:.1f} at the end ({100 * (end / half - 1):+.2f} %)")
        assert ends == {"all": sessions} and len(times) == sessions * n and end / half <= 1.02
        server.send_signal(signal.SIGTERM)
        said = server.communicate(timeout=40)[0]
        print(said.splitlines()[-1])
        assert "the last" in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.long
def test_sigterm_amid_32_sessions(model, tmp_path):
    """taskset -c 0,1 pytest tests/test_serve_load.py -m long -s"""
    wanted, times = plan(model, 32, 200), []
    with script(model, tmp_path) as (server, port):
        told = amid(lambda: server.send_signal(signal.SIGTERM), times, 1000)
        ends = drive(port, wanted, told, times)
        said, seconds = server.communicate(timeout=40)[0], time.perf_counter() - told.at
        print(f"\n{len(times)} replies, then {dict(ends)}; ended {seconds:.1f} s after SIGTERM")
        assert sum(ends.values()) == 32 and set(ends) <= {"refused", "too late"} and 1000 <= len(times) < 6400
        assert "the last" in said and "Traceback" not in said and seconds < 30


@pytest.mark.slow
def test_bench_serve_measures_what_the_formats_cost(tmp_path):
    sys.path.append(str(ROOT / "benchmarks"))
    import bench
    out = tmp_path / "rows.jsonl"
    flags = ["serve", "--rounds", "1", "--inner", "2", "--variant", "openpi,v1-png", "--out", str(out)]
    assert bench.main(flags) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["openpi", "v1-png"]
    assert all(row["detail"]["overhead_ms"] > 0 and list(row) == bench.FIELDS for row in rows)
