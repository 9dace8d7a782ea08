"""benchmarks/bench.py: rows, checks, counts and refusals. No timing is asserted."""
import dataclasses
import inspect
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_methods import Tape, make
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import a0  # noqa: E402
import bench  # noqa: E402
import bench_vla0  # noqa: E402
import cogact  # noqa: E402
import common  # noqa: E402
import eval_sim  # noqa: E402
import robobrain_x0  # noqa: E402
import robovlms  # noqa: E402
import vla0  # noqa: E402

QUICK = "--rounds 1 --inner 1 --warmup 0 --check"
SMALL = {"vla0": "--set horizon=1 execute=1 llm_depth=2 vit_depth=1 full_attention=0 image_size=48",
         "a0": "--set image_size=48 depth=3 width=64 siglip_width=32 qwen_width=32",
         "robobrain_x0": "--set horizon=2 execute=1 llm_depth=2 vit_depth=1 full_attention=0 image_size=48",
         "robovlms": "--set history=3 vit_depth=1 llm_depth=2 image_size=48 image_tokens=4",
         "cogact": "--set dino_depth=2 siglip_depth=2 llm_depth=2 depth=2 image_size=48"}
NUMBERS = ("ms ratio flops bytes floor_ms x_floor mfu ops saved_bytes forwards tokens_in tokens_out "
           "peak_tflops peak_tbps mem_peak_bytes batch rounds inner").split()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run("vla0 infer") -> (exit code, rows): tiny, on the CPU, two different inputs; all rows are valid."""
    monkeypatch.setattr(bench, "INPUTS", 2)

    def call(flags, *more):
        out = tmp_path / "rows.jsonl"
        out.unlink(missing_ok=True)
        code = bench.main([*flags.split(), "--out", str(out), *more])
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        for row in rows:                                       # what is absent is null, not 0
            assert list(row) == bench.FIELDS and row["schema"] == 1
            for name in NUMBERS:
                assert row[name] is None or (math.isfinite(row[name]) and row[name] > 0), (name, row)
        return code, rows
    return call


# ---- every WHAT writes rows -------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("method", bench.METHODS)
@pytest.mark.parametrize("what", ["infer", "decode"])
def test_every_variant_agrees_with_plain_modules(run, method, what):
    code, rows = run(f"{method} {what} {QUICK} {SMALL[method]}")
    known = bench.method(method)
    assert code == 0
    assert [r["variant"] for r in rows] == [v for v in known.variants[what] if v not in known.cuda_only]
    for row in rows:
        assert row["ms"] and row["note"]
        if row["variant"] != "cold":
            assert row["baseline"] and row["ratio"] and not row["check"].startswith("DIFFERS")
            off = row["variant"] == "int8"                     # approximate: how far off is told
            assert ("off by" in row["check"]) == off
            assert method != "vla0" or off or row["variant"] == "jpeg" or row["check"] == "texts equal"
    if what == "decode" and method == "vla0":
        rows = {row["variant"]: row for row in rows}
        assert rows["eager"]["forwards"] == rows["eager"]["tokens_out"] - 1 > rows["spec:oracle"]["forwards"]


@pytest.mark.parametrize("method", bench.METHODS)
def test_train_and_loader_agree_with_their_baselines(run, method):
    code, rows = run(f"{method} train {QUICK} --batch 2 {SMALL[method]}")
    assert code == 0 and rows[0]["mfu"] and rows[0]["check"].startswith("differ by") and rows[0]["batch"] == 2
    code, rows = run(f"{method} loader {QUICK} --batch 2 {SMALL[method]}")
    assert code == 0 and [r["check"] for r in rows] == ["batches as made inline"] * 2


def test_ceiling_and_baseline_none(run):
    code, rows = run(f"vla0 ceiling {QUICK}")
    assert code == 0 and rows[0]["peak_tflops"] and rows[1]["peak_tbps"] and rows[0]["model"] is None
    code, rows = run(f"cogact decode {QUICK} --baseline none {SMALL['cogact']}")
    assert code == 0 and rows[0]["ms"] and rows[0]["ratio"] is rows[0]["baseline"] is rows[0]["check"] is None


@pytest.mark.parametrize("flags", ["--batch 3 --variant {0}", "--dtype bf16 --variant {1}"])
@pytest.mark.parametrize("method, variants", [
    ("vla0", ["spec:prev", "spec:oracle"]), ("cogact", ["eager"] * 2), ("a0", ["kept", "eager"])], ids=str)
def test_batches_of_several_and_bf16(run, monkeypatch, method, variants, flags):
    monkeypatch.setattr(bench.train, "measured_peak", lambda *_: 1e11)     # bf16 products are slow on a CPU
    code, rows = run(f"{method} infer {flags.format(*variants)} {QUICK} {SMALL[method]}")
    assert code == 0 and rows[0]["ms"] and rows[0]["check"], rows


# ---- --check ----------------------------------------------------------------------------------------------

def believe_the_draft(accept, self, said):                     # verification forgotten: guesses stand
    K, at = said.shape[1], self.count[:, None] + 1 + self.spots[:said.shape[1]]
    return accept(self, self.text.gather(1, at) if K > 1 else said)


@pytest.mark.parametrize("flags, place, name, broken", [
    ("vla0 decode --variant spec:prev", vla0.Writer, "commit", believe_the_draft),
    ("cogact decode", cogact.ActionModel, "guided", lambda _, self, x, c, w: self.net.denoise(x, c[:len(x)])),
    ("a0 infer --variant kept", a0.Model, "see", lambda see, self, images, keep=False: see(
        self, images, keep) * (1 if not keep else 0.9)),
    ("cogact train --batch 1", bench.method("cogact"), "loss", lambda loss, *given: 1.001 * loss(*given))])
def test_check_refuses_a_speed_of_wrong_outputs(run, monkeypatch, flags, place, name, broken):
    right = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *given: broken(right, *given))
    code, rows = run(f"{flags} {QUICK} {SMALL[flags.split()[0]]}")
    assert code == 1 and rows[0]["check"].startswith("DIFFERS") and rows[0]["ms"] is rows[0]["ratio"] is None


# ---- counts -----------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("method", bench.METHODS)
def test_counts_on_meta_equal_those_of_a_real_run(run, method):
    (_, meta), (_, real) = (run(f"{method} count --dtype fp32 --device {device} {SMALL[method]}")
                            for device in ("meta", "cpu"))
    for a, b in zip(meta, real, strict=True):
        for name in ("variant", "flops", "bytes", "saved_bytes", "tokens_in"):
            # (torch's encoder layer, CogACT's plain DiT, takes its attention apart on meta)
            plain_dit = method == "cogact" and (a["variant"], name) == ("train, baseline", "saved_bytes")
            assert a[name] == b[name] or plain_dit, (a["variant"], name, a[name], b[name])
    if method == "vla0":
        layer = meta[-1]["detail"]["fp32"]
        assert meta[-1]["detail"] == real[-1]["detail"] and layer["head_rows"] == 12
        assert layer["ops_per_layer"] <= 28 < layer["transformers_ops_per_layer"]


@pytest.mark.slow
@pytest.mark.parametrize("method, acting, training, tokens, moved, parameters", [
    pytest.param("vla0", 3.16e12, 10.0e12, (225, 224), 1247e9, 3_754_622_976, marks=pytest.mark.long),
    ("cogact", 4.12e12, 12.3e12, (281, None), None, 7_630_224_071),
    ("robovlms", 0.39e12, 2 * 9.35e12, (90, None), None, 1_664_485_376 + 41_210_950),      # 16 frames, not 8
    pytest.param("robobrain_x0", 4.9e12, 15.3e12, (500, 100), None, 3_754_622_976, marks=pytest.mark.long),
    ("a0", 1.75e12, 2.46e12, (1478, None), 11.7e9, 1_215_673_346)], ids=str)
def test_official_counts_are_those_of_performance_md(
        monkeypatch, method, acting, training, tokens, moved, parameters):
    """FLOPs and bytes within 3 % (section 2), parameters to the last one: nothing runs that nobody reads."""
    args = bench.parse(f"{method} count --device meta --size official --batch 1".split())
    writes, counts = method in ("vla0", "robobrain_x0"), bench.method(method)(args, "count").counts()
    monkeypatch.setattr(bench_vla0, "DTYPES", [args.dtype])
    found, wanted = {}, {"parameters", "inference", "train", *["pass"] * writes}
    while not wanted <= found.keys():                          # the rows behind: above, at small size
        found |= [next(counts)]
    assert abs(found["inference"]["flops"] / acting - 1) < 0.03
    assert abs(found["train"]["flops"] / training - 1) < 0.03
    assert moved is None or abs(found["inference"]["bytes"] / moved - 1) < 0.03
    assert (found["inference"]["tokens_in"], found["inference"]["tokens_out"]) == tokens
    assert found["parameters"]["detail"]["all"]["parameters"] == parameters
    assert not writes or found["pass"]["ops"] <= 28


@pytest.mark.long
@pytest.mark.parametrize("method", bench.METHODS)
def test_a_sample_of_official_size_keeps_less_than_plain_modules_do(method):
    """pytest tests/test_bench.py -m long; a minute"""
    args = bench.parse(f"{method} count --device meta --size official --batch 1".split())
    found = dict(itertools.islice(bench.method(method)(args, "count").counts(), 4))
    assert found["train"]["saved_bytes"] < found["train, baseline"]["saved_bytes"]


def test_ops_are_what_computes():
    x, w = torch.ones(4, 8), torch.ones(8, 8)
    for ops, work in ((0, lambda: x.view(8, 4).T[:2].unsqueeze(0).expand(3, -1, -1)), (1, lambda: x.add_(1)),
                      (1, lambda: F.linear(x.view(2, 2, 8), w, w[0])), (1, lambda: F.rms_norm(x, (8,), None)),
                      (1, lambda: F.scaled_dot_product_attention(x[None], x[None], x[None]))):
        assert bench.count(work)[0].ops == ops
    stage, _ = bench.count(lambda: F.linear(x, w) + w[0], [(w, 2)])            # w in two bytes per number
    assert (stage.flops, stage.bytes) == (2 * 4 * 8 * 8, 2 * 64)


def test_saved_bytes_counts_storages_once():
    x, w = torch.ones(4, 8, requires_grad=True), torch.ones(8, 8, requires_grad=True)
    assert bench.saved_bytes(lambda: (x @ w).sum(), [w]) == x.nbytes
    assert bench.saved_bytes(lambda: (x.exp() * x.view(8, 4).T.reshape(4, 8)).sum(), [x]) > 0


# ---- what a CUDA graph is to hold --------------------------------------------------------------------------

class Captured(TorchDispatchMode):
    """Refuses what no CUDA graph can hold. On the meta device, reading a number (.item(), bool()), a copy to
    the host and a shape that depends on numbers fail by themselves; here, what comes from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        met = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert all(x.is_meta or not x.ndim for x in met), f"{func}: numbers of the host"
        return out


class Made(TorchFunctionMode):
    """Refuses tensors made of numbers of the host: these are copied to the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), func.__name__
        return func(*args, **(kwargs or {}))


def tower(model, patches, grid):
    """What `look` hands to its graphs."""
    held = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "graphs", lambda work, x, key: held.append(lambda: work(x)) or work(x))
        model.look(patches, grid)
    return held[0]


def repeated(b):
    """What a method does for an observation once its pictures are in, or repeats: a list of functions."""
    model, batch, cfg = b.model, b.batch(0), b.cfg
    if b.module is vla0:
        patches, grid = vla0.patchify(batch["images"].flatten(0, 1), cfg)
        return [tower(model, patches, grid), *(
            lambda w=b.writer(batch, dataclasses.replace(b.changed(v), window=3)), n=n: w.read(n)
            for v in ("eager", "grammar", "spec:jacobi") for n in (1, 3))]
    if b.module is robobrain_x0:
        made, pixels = [b.writer(batch, "eager")], robobrain_x0.to_pixels(batch["patches"], cfg)
        for how in ({}, {"temperature": 0.7, "repetition_penalty": 1.1}):
            cfg = dataclasses.replace(b.changed("constrained"), window=3, **how)
            rows, grammar = model.embed(batch), b.grammar(cfg, "constrained")
            with model.reading() as reader:
                made.append(robobrain_x0.Writer(cfg, reader, batch, rows, "actions", grammar, [[0]]))
        return [tower(model, pixels, batch["grid"]),
                *(lambda w=w, n=n: w.read(n) for w in made for n in (1, w.window))]
    if b.module is a0:
        features, noise = model(batch), b.noise(0)
        return [lambda: model.sample(features, noise)]
    if b.module is cogact:
        noise, how = b.noise(0), (cfg.sample_steps, cfg.cfg_scale, cfg.sampler)
        return [lambda: model.action_model.sample(model(batch).float(), noise, *how)]
    z = b.state(batch).expand(-1, cfg.history, -1, -1)
    return [lambda: b.state(batch), lambda: b.head(z, batch)]


@pytest.mark.parametrize("method", bench.METHODS)
def test_what_a_graph_would_capture_reads_no_number_and_copies_nothing(method):
    args = bench.parse(f"{method} count --device meta --dtype fp32 --batch 1 {SMALL[method]}".split())
    b = bench.method(method)(args, "infer")
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        for work in repeated(b):
            work()                                             # constants are put on the device once
            with Captured(), Made():
                work()


@pytest.mark.parametrize("backbone", robovlms.ADAPTERS)
def test_a_graph_would_hold_a_frame_of_every_backbone(backbone, monkeypatch):
    if backbone == "flamingo" and "torch.tensor(" in inspect.getsource(masking_utils.eager_mask):
        pytest.skip("this transformers makes MPT's mask of a number of the host: no graph holds that")
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)      # as while a CUDA stream is captured
    model = make(robovlms, backbone=backbone, history=2).to("meta")
    side, views = model.cfg.image_size, len(model.cfg.views)
    images = torch.zeros(1, 1, views, side, side, 3, dtype=torch.uint8, device="meta")
    ids = torch.zeros(1, 9, dtype=torch.long, device="meta")
    with torch.no_grad():
        model.frame(images, ids)
        with Captured(), Made():
            model.frame(images, ids)


@pytest.mark.parametrize("bad", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.cpu() + 1,
                                 lambda x: x + torch.tensor([1.0], device="meta"), lambda x: bool(x.any()),
                                 lambda x: x.copy_(torch.ones(3)), lambda x: torch.unique(x)])
def test_a_graph_refuses(bad):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Captured(), Made():
        bad(torch.ones(3, device="meta"))


@pytest.mark.parametrize("method, variant", [("vla0", "eager"), ("robobrain_x0", "spec:oracle")])
def test_what_is_told_of_writers_is_the_same_with_graphs(method, variant):
    told = []
    for capture in (None, Tape.capture):
        torch.manual_seed(0)
        args = bench.parse(f"{method} decode --variant {variant} --batch 1 --baseline none {SMALL[method]}".split())
        b = bench.method(method)(args, "decode")
        b.model.graphs = common.Graphs(capture)
        case = b.decode(variant)
        told.append((case.about["forwards"], case.about["tokens_out"], [s.times for s in case.floor()]))
    assert told[0] == told[1]


# ---- the closed loop --------------------------------------------------------------------------------------

@pytest.mark.slow
def test_closed_loop_writes_equal_texts_in_every_way(run, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_sim, "STEPS", dict.fromkeys(eval_sim.STEPS, 8))
    cfg = vla0.configure(vla0.PRESETS["tiny"], horizon=2, execute=2, llm_init=0.12, llm_depth=2, vit_depth=1,
                         full_attention=(0,), image_size=48)
    vla0.Model(cfg, vla0.load_tokenizer(cfg), bench.STATS).save_pretrained(tmp_path / "ckpt")
    code, rows = run(f"vla0 decode --episodes 1 {QUICK}", "--ckpt", str(tmp_path / "ckpt"))
    found = {row["variant"]: row for row in rows}
    assert code == 0 and [*found] == bench.method("vla0").closed_loop
    assert all(r["check"] == "texts equal" or name == "int8" for name, r in found.items())
    assert all(r["detail"]["chunks"] == 4 and r["ratio"] for r in rows)
    assert found["spec:prev"]["forwards"] < found["grammar"]["forwards"] < found["grammar"]["tokens_out"]
    assert found["grammar"]["detail"]["malformed"] == 0


# ---- --diff -----------------------------------------------------------------------------------------------

def test_diff_compares_ratios_not_milliseconds_of_other_versions(tmp_path, capsys):
    row = dict.fromkeys(bench.FIELDS) | {
        "schema": 1, "model": "vla0", "what": "infer", "variant": "eager", "size": "tiny", "device": "a",
        "batch": 1, "dtype": "fp32", "torch": "2.12", "ms": 10.0, "x_floor": 4.0}
    row |= {"ratio": 2.0, "ratio_q25": 1.9, "ratio_q75": 2.1}
    other = row | {"torch": "2.13", "ms": 5.0, "x_floor": 2.0, "ratio": 3.0, "ratio_q25": 2.9, "ratio_q75": 4}
    counted = row | dict.fromkeys(("ms", "ratio", "x_floor")) | {"what": "count", "variant": "-", "ops": 28}

    def told(old, new):
        for name, rows in (("old", old), ("new", new)):
            (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        assert not bench.main(["--diff", str(tmp_path / "old"), str(tmp_path / "new")])
        return capsys.readouterr().out
    text = told([row, counted], [other, counted | {"ops": 30}])
    assert "ratio 2 -> 3 (+50.0 %)" in text and "x_floor 4 -> 2 (-50.0 %)" in text and "ms" not in text
    assert "inconclusive" not in text and "ops 28 -> 30 (+7.1 %)" in text
    assert "ms 10 -> 9" in told([row], [row | {"ms": 9.0}]) and "inconclusive" in told([row], [row])
    assert "ratio 2 -> 3" in told([row], [other | {"device": "b"}])        # matched all the same
    assert "only in" in told([row], [row, row | {"variant": "grammar"}])
    (tmp_path / "new").write_text('{"schema": 1}\n')
    with pytest.raises(ValueError, match="line 1: no row of bench.py"):
        bench.main(["--diff", str(tmp_path / "old"), str(tmp_path / "new")])


# ---- refusals ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ("", "MODEL: there is no ''"), ("vla0", "WHAT: there is no ''"),
    ("vla infer", "there is no 'vla'; did you mean 'vla0'"), ("vla0 inferr", "did you mean 'infer'"),
    ("vla0 infer --variant spec:pref", "did you mean 'spec:prev'"),
    ("vla0 infer --graphs", "on CUDA; asked were infer, cpu"), ("cogact infer --variant grammar", "no 'grammar'"),
    ("vla0 infer --device meta", "only count"), ("vla0 infer --size official --device cpu", "takes hours"),
    ("vla0 infer --device gpu", "'gpu' does not exist"), ("vla0 infer --rounds 0", "--rounds: 0 is not"),
    ("vla0 infer --set horison=3", "did you mean 'horizon'"), ("all infer --set horizon=3", "for one method"),
    ("vla0 train --ckpt x", "for infer, decode and loader"), ("vla0 infer --ckpt nowhere", "no such file"),
    ("vla0 decode --episodes 3", "plays a trained model"), ("cogact decode --ckpt x --episodes 3", "plays a"),
    ("vla0 infer --no-such-flag", "unrecognized arguments"), ("vla0 infer --batch two", "--batch: invalid"),
    ("vla0 infer --out /no/such/folder/x.jsonl", "/no/such/folder"), ("--diff /no/a /no/b", "/no/a")])
def test_a_mistake_is_one_line_and_exit_code_2(capsys, flags, words):
    with pytest.raises(SystemExit) as e:
        common.cli(lambda: bench.main(flags.split()))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err, err
