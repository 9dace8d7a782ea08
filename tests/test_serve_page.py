"""The page at /, what it asks the server for (simulator, questions), /metrics; in a browser where one is."""
import base64
import hashlib
import importlib
import io
import re
import shutil
import urllib.request
from html.parser import HTMLParser

import eval_sim
import numpy as np
import pytest
import serve
import torch
from PIL import Image
from test_methods import make
from test_serve import ROOT, encoded, picture, request, running, statistics, tiny_model

HTML = (ROOT / "assets/index.html").read_text(encoding="utf-8")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-headless-shell")


def get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return answer.headers, answer.read().decode()


def figures(call):
    """/metrics -> {name with labels: number}; every name has one type, said before its values."""
    headers, text = get(call.url + "/metrics")
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    types = re.findall(r"^# TYPE (\w+) (?:gauge|counter|summary)$", text, re.M)
    rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert len(set(types)) == len(types) and all(any(name.startswith(t) for t in types) for name in rows)
    return {name: float(value) for name, value in rows.items()}


@pytest.fixture(scope="module")
def model():
    return tiny_model({"tabletop": statistics(0.05), "other": statistics(2.0)})


@pytest.fixture(scope="module")
def call(model):
    with running(model, unnorm_key="tabletop", execute=2) as call:
        yield call


# ---- The page is one file --------------------------------------------------------------------------------

def test_page_loads_nothing_from_elsewhere_and_its_script_finds_what_it_asks_for(call):
    class Page(HTMLParser):
        ids, links = [], []

        def handle_starttag(self, tag, attributes):
            self.ids += [value for name, value in attributes if name == "id"]
            self.links += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]
            assert not any(name == "style" or name.startswith("on") for name, _ in attributes)    # CSP
    Page().feed(HTML)
    assert Page.links == ["data:,"] and len(set(Page.ids)) == len(Page.ids)
    script = re.search("<script>(.*?)</script>", HTML, re.S)[1]
    asked = set(re.findall(r'(?:\$|tell|guarded|fill)\("([a-z]+)"', script))
    assert len(asked) > 20 and asked <= set(Page.ids), asked - set(Page.ids)
    assert set(re.findall(r"https?://[^\s\"']+", HTML)) == {"http://www.w3.org/2000/svg"}      # only a name
    assert not re.search(r"@import|url\(|importScripts|\beval\b|innerHTML|WebSocket", HTML)
    paths = set(re.findall(r'ask\("([^"]+)"', script))
    assert paths == {"/v1/info", "/v1/act", "/v1/ask", "/v1/sim", "/v1/sim/step"}
    assert all(call(path, None if path == "/v1/info" else {})[0] in (200, 400, 404) for path in paths)


def test_page_comes_with_a_policy_that_lets_only_itself_run(model):
    with running(model, unnorm_key="tabletop", token="sesame") as call:
        headers, text = get(call.url + "/")
        assert text == HTML and headers["Content-Type"].startswith("text/html")
        for tag in ("style", "script"):
            own = hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", HTML, re.S)[1].encode()).digest()
            policy = headers["Content-Security-Policy"]
            assert f"{tag}-src 'sha256-{base64.b64encode(own).decode()}'" in policy
        assert policy.startswith("default-src 'none'; ")
        for path, body in (("/v1/sim", {}), ("/v1/sim/step", {}), ("/v1/ask", {}), ("/metrics", None)):
            assert call(path, body)[0] == 401


@pytest.mark.parametrize("page, status", [
    ("http://evil.example", 403), ("http://[", 403), ("null", 403), ("http://HERE", 200),
    ("http://rebound.example:80", 403)])
def test_pages_of_elsewhere_and_names_that_can_be_rebound_cannot_drive(call, page, status):
    here = call.url.removeprefix("http://")
    host = page.removeprefix("http://") if "rebound" in page else here
    assert call("/v1/act", request(mode="chunk"), Origin=page.replace("HERE", here), Host=host)[0] == status


# ---- The simulator ----------------------------------------------------------------------------------------

def test_simulator_plays_what_the_policy_says(call, model):
    status, scene = call("/v1/sim", {"family": "pick", "seed": 5})
    env = eval_sim.Tabletop(("pick",), "eval", model.cfg.views, model.cfg.image_size)
    env.lay_out(eval_sim.seeds("eval", 1, 5)[0])
    assert status == 200 and (scene["instruction"], scene["steps"], scene["seed"]) == (env.instruction, 0, 5)
    shown = np.array(Image.open(io.BytesIO(base64.b64decode(scene["picture"]))))
    assert np.array_equal(shown, env.picture("third", 320, 320)[0])
    torch.manual_seed(1)
    want = model.act([env.observe()], unnorm_key="tabletop")[0][0]
    torch.manual_seed(1)
    for k in range(2):
        status, told = call("/v1/sim/step", {"sim": scene["sim"]})
        assert status == 200 and told["steps"] == k + 1 and ("actions" in told) == (k == 0), told
        np.testing.assert_allclose(told["action"], want[k], atol=1e-6)
        env.advance(want[k])
    shown = np.array(Image.open(io.BytesIO(base64.b64decode(told["picture"]))))
    assert np.abs(shown.astype(int) - env.picture("third", 320, 320)[0]).mean() < 0.1
    told = call("/v1/sim/step", {"sim": scene["sim"], "instruction": "push the ball"})[1]
    assert told["instruction"] == "push the ball" and "actions" in told      # other words, a new chunk


def test_simulators_end_are_bounded_and_expire(model, monkeypatch):
    monkeypatch.setattr(serve, "MAX_SIMS", 2)
    monkeypatch.setitem(eval_sim.STEPS, "pick", 1)
    with running(model, unnorm_key="tabletop") as call:
        names = [call("/v1/sim", {"family": "pick"})[1]["sim"] for _ in range(3)]
        statuses = [call("/v1/sim/step", {"sim": name})[0] for name in (names[0], names[2], names[2])]
        assert statuses == [404, 200, 409] and len(call.service.sessions) == 1
        other = call("/v1/sim", {"sim": names[2]})[1]["sim"]                 # replaced: forgotten
        assert [*call.service.sims] == [names[1], other] and not call.service.sessions
        for name, (*known, used) in [*call.service.sims.items()]:
            call.service.sims[name] = *known, used - serve.SESSION_SECONDS - 1
        assert [call("/v1/sim", {})[1]["sim"]] == [*call.service.sims]


@pytest.mark.parametrize("path, body, status, words", [
    ("/v1/sim", {"family": "juggle"}, 400, "families 'juggle'"), ("/v1/sim", {"seed": -1}, 400, "1,000,000"),
    ("/v1/sim", {"seed": "x"}, 400, '"seed" must be a number'),
    ("/v1/sim", {"body": "dual"}, 400, "acts with ['gripper']"),
    ("/v1/sim/step", {}, 404, "no such simulator"),
    ("/v1/ask", {"question": "where?", "image": encoded(picture())}, 400, "cogact answers no questions")])
def test_wrong_requests_of_a_page_are_one_line(call, path, body, status, words):
    found, answer = call(path, body)
    assert found == status and words in answer["error"] and "\n" not in answer["error"], answer


def test_points_drive_the_simulator_and_two_arms_have_theirs():
    with running(make(importlib.import_module("a0"))) as call:
        scene = call("/v1/sim", {"seed": 3})[1]
        status, told = call("/v1/sim/step", {"sim": scene["sim"]})
        assert status == 200 and np.shape(told["waypoints"]) == (5, 2), told
        assert np.shape(told["action"]) == (7,)
    x0 = importlib.import_module("robobrain_x0")
    model, two = make(x0, draft="none"), statistics(0.05)["action"]
    two = {name: values * 2 for name, values in two.items()}
    model.stats = {"tabletop": statistics(0.05), "tabletop_dual": {"action": two}}
    with running(model, unnorm_key="tabletop") as call:
        assert [*call("/v1/info")[1]["sim"]] == ["gripper", "dual"]
        scene = call("/v1/sim", {"body": "dual"})[1]
        status, told = call("/v1/sim/step", {"sim": scene["sim"]})
        assert status == 200 and np.shape(told["action"]) == (14,), told


def test_a_robobrain_points_into_a_picture(monkeypatch):
    model = make(importlib.import_module("robobrain_x0"), draft="none", max_new_tokens=8)
    said = {"pointing": np.array([[10, 20], [40, 40]]), "grounding": np.array([[0, 0, 20, 10]])}
    with running(model) as call:
        body = {"question": "where is the cup?", "image": encoded(picture(40, 80))}
        status, answer = call("/v1/ask", body | {"ability": "general"})      # the real one, in its own words
        assert status == 200 and isinstance(answer["text"], str) and set(answer) == {"text", "infer_ms"}
        assert call("/v1/ask", body | {"ability": "pointng"})[0] == 400
        monkeypatch.setattr(model, "answer", lambda image, question, ability: (said[ability], "text"))
        assert call("/v1/ask", body | {"ability": "pointing"})[1]["points"] == [[0.125, 0.5], [0.5, 1.0]]
        assert call("/v1/ask", body | {"ability": "grounding"})[1]["boxes"] == [[0, 0, 0.25, 0.25]]


# ---- Metrics ----------------------------------------------------------------------------------------------

def test_metrics_count_what_happened():
    model = tiny_model({"tabletop": statistics(0.05)})
    with running(model) as call:
        for _ in range(3):
            assert call("/v1/act", request(mode="step", session="a"))[0] == 200
        assert call("/v1/act", request(instruction=""))[0] == 400 and call("/nowhere")[0] == 404
        found = figures(call)
        assert found["plainvla_sessions"] == found["plainvla_observations_total"] == 1
        assert found['plainvla_seconds_count{path="/v1/act"}'] == 3 and found["plainvla_queue_length"] == 0
        assert 0 < found['plainvla_seconds{path="/v1/act",quantile="0.5"}'] < 30
        assert found['plainvla_errors_total{code="400",kind="Bad Request"}'] == 1
        assert found['plainvla_errors_total{code="404",kind="Not Found"}'] == 1
        act = model.act
        model.act = lambda *a, **k: (act(*a, **k)[0], {"parse_failed": np.array([True])})
        assert call("/v1/act", request())[0] == 500
        assert figures(call)['plainvla_failed_predictions_total{kind="parse_failed"}'] == 1


# ---- A browser drives it ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser():
    """Playwright's chromium or Debian's: apt-get install chromium-headless-shell; pip install playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except sync_api.Error as e:
            pytest.skip(f"apt-get install chromium-headless-shell: {str(e).splitlines()[0][:100]}")
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(url) -> the page, which must load nothing from elsewhere and log no error."""
    page, wrong, asked = browser.new_page(viewport={"width": 1240, "height": 880}), [], []
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
    page.on("request", lambda r: asked.append(r.url))

    def go(url):
        page.goto(url)
        page.url_of_server = url
        return page
    yield go
    elsewhere = [url for url in asked if not url.startswith((page.url_of_server, "data:"))]
    page.close()
    assert not elsewhere and not [line for line in wrong if "401" not in line], (elsewhere, wrong)


def pixels(page, canvas):
    """A canvas (h, w, 3), as it is shown."""
    return np.array(Image.open(io.BytesIO(page.locator(canvas).screenshot())).convert("RGB")).astype(int)


@pytest.mark.slow
def test_a_person_drops_a_picture_and_sees_points(visit, tmp_path):
    Image.new("RGB", (80, 60), (90, 90, 90)).save(tmp_path / "camera.png")
    model = make(importlib.import_module("a0"))
    last = model.model.final_layer.ffn_final.fc2
    with torch.no_grad():                                      # random weights point outside of the picture
        last.weight.mul_(0.05)
        last.bias.fill_(0.5)
    with running(model) as call:
        page = visit(call.url)
        page.set_input_files("#file-third", tmp_path / "camera.png")
        page.locator("#view-third.full").wait_for()
        before = pixels(page, "#view-third")
        torch.manual_seed(3)
        page.click("#predict")
        page.locator("#said", has_text="round trip").wait_for()
        assert page.get_attribute("#view-third", "data-marks") == "5"
        changed = np.argwhere(np.abs(pixels(page, "#view-third") - before).sum(-1) > 100)    # (n, 2): y, x
        torch.manual_seed(3)
        grey = {"third": np.full((60, 80, 3), 90, np.uint8)}
        points = model.act([{"instruction": "pick up the red cube", "images": grey}])[0][0]  # (5, 2): x, y
        points = points[:, ::-1] * before.shape[:2]
        near = np.linalg.norm(points[:, None] - changed, axis=-1).min(1)                     # (5,) [pixels]
        assert (near < 9).all() and page.locator("#plots svg").count() == 2, near


@pytest.mark.slow
def test_a_person_with_a_token_predicts_and_drives_the_simulator(model, visit, tmp_path):
    Image.fromarray(picture(60, 80)).save(tmp_path / "camera.jpg")
    with running(model, unnorm_key="tabletop", token="sesame") as call:
        page = visit(call.url)
        page.locator("#about", has_text="Authorization: Bearer TOKEN").wait_for()
        page.fill("#token", "sesame")
        page.press("#token", "Enter")
        page.locator("#about", has_text="cogact").wait_for()
        page.click("#predict")
        page.locator("#said.bad", has_text='no picture of the view "third"').wait_for()
        page.set_input_files("#file-third", tmp_path / "camera.jpg")
        page.locator("#view-third.full").wait_for()
        page.select_option("#key", "other")
        page.click("#predict")
        page.locator("#said", has_text="round trip").wait_for()
        assert page.locator("#plots svg").count() == 7
        page.fill("#seed", "7")
        page.click("#fresh")
        page.locator("#told", has_text="step 0 of 40").wait_for()
        first = pixels(page, "#scene")
        for k in range(3):
            page.click("#step")
            page.locator("#told", has_text=f"step {k + 1} of 40").wait_for()
        assert np.abs(pixels(page, "#scene") - first).max() > 50 and page.locator("#played svg").count() == 7
        page.click("#play")
        page.locator("#told", has_text=re.compile(r"step ([6-9]|\d\d) of 40")).wait_for()
        page.click("#play")
        assert page.text_content("#play") == "Play"
