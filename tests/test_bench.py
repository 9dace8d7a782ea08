"""benchmarks/bench.py: rows, checks, counts and refusals. No timing is asserted."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench  # noqa: E402
import cogact  # noqa: E402
import common  # noqa: E402
import eval_sim  # noqa: E402
import vla0  # noqa: E402

QUICK = "--rounds 1 --inner 1 --warmup 0 --check"
SMALL = "--set horizon=1 execute=1 llm_depth=2 vit_depth=1 full_attention=0 image_size=48"       # of vla0
NUMBERS = ("ms ratio flops bytes floor_ms x_floor mfu ops saved_bytes forwards tokens_in tokens_out "
           "peak_tflops peak_tbps mem_peak_bytes batch rounds inner").split()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run("vla0 infer") -> (exit code, rows): tiny, on the CPU, two different inputs."""
    monkeypatch.setattr(bench, "INPUTS", 2)

    def call(flags, *more):
        out = tmp_path / "rows.jsonl"
        out.unlink(missing_ok=True)
        code = bench.main([*flags.split(), "--out", str(out), *more])
        return code, [json.loads(line) for line in out.read_text().splitlines()]
    return call


def valid(rows):
    """Every row has all fields, in order; what is absent is null, not 0; the table can be printed."""
    for row in rows:
        assert list(row) == bench.FIELDS and row["schema"] == 1
        for name in NUMBERS:
            assert row[name] is None or (math.isfinite(row[name]) and row[name] > 0), (name, row)
    bench.print_table(rows)
    return rows


# ---- every WHAT writes rows -------------------------------------------------------------------------------

def agree(rows):
    for row in valid(rows):
        assert row["ms"] and row["note"]
        if row["variant"] != "cold":
            assert row["baseline"] and row["ratio"] and not row["check"].startswith("DIFFERS")
            assert row["model"] == "cogact" or row["variant"] == "jpeg" or row["check"] == "texts equal"
    return [row["variant"] for row in rows]


@pytest.mark.parametrize("method", bench.METHODS)
def test_every_variant_agrees_with_plain_transformers(run, method):
    code, rows = run(f"{method} infer {QUICK} {SMALL if method == 'vla0' else ''}")
    known = bench.METHODS[method]
    assert code == 0 and agree(rows) == [v for v in known.variants["infer"] if v not in known.cuda_only]


def test_decode_times_what_comes_after_the_prefill(run):
    code, rows = run(f"cogact decode {QUICK}")
    assert code == 0 and agree(rows) == ["eager"] and rows[0]["forwards"] == 10
    code, rows = run(f"vla0 decode {QUICK} --variant eager,spec:oracle {SMALL}")
    assert code == 0 and agree(rows) == ["eager", "spec:oracle"]
    assert rows[0]["forwards"] == rows[0]["tokens_out"] - 1 > rows[1]["forwards"]


@pytest.mark.parametrize("method", bench.METHODS)
def test_train_and_loader_agree_with_their_baselines(run, method):
    code, rows = run(f"{method} train {QUICK} --batch 2")
    assert code == 0 and rows[0]["mfu"] and rows[0]["check"].startswith("differ by") and rows[0]["batch"] == 2
    valid(rows)
    code, rows = run(f"{method} loader {QUICK} --batch 2")
    assert code == 0 and [r["check"] for r in valid(rows)] == ["batches as made inline"] * 2


def test_ceiling_and_baseline_none(run):
    code, rows = run(f"vla0 ceiling {QUICK}")
    assert code == 0 and rows[0]["peak_tflops"] and rows[1]["peak_tbps"] and rows[0]["model"] is None
    valid(rows)
    code, rows = run(f"cogact decode {QUICK} --baseline none")
    assert code == 0 and rows[0]["ms"] and rows[0]["ratio"] is rows[0]["baseline"] is rows[0]["check"] is None


def test_batches_of_several_and_bf16(run, monkeypatch):
    monkeypatch.setattr(bench.train, "measured_peak", lambda *_: 1e11)     # bf16 products are slow on a CPU
    for flags in (f"vla0 infer --batch 3 --variant spec:prev {SMALL}",
                  f"vla0 infer --dtype bf16 --variant spec:oracle {SMALL}",
                  "cogact infer --batch 3 --variant eager", "cogact infer --dtype bf16 --variant eager"):
        code, rows = run(f"{flags} {QUICK}")
        assert code == 0 and rows[0]["ms"] and rows[0]["check"], rows


# ---- --check ----------------------------------------------------------------------------------------------

def broken(run, flags):
    code, rows = run(f"{flags} {QUICK}")
    assert code == 1 and rows[0]["check"].startswith("DIFFERS") and rows[0]["ms"] is rows[0]["ratio"] is None
    valid(rows)


def test_check_refuses_a_broken_decoder(run, monkeypatch):
    accept = vla0.Writer.commit

    def believe_the_draft(self, said):                         # verification forgotten: guesses stand
        K, at = said.shape[1], self.count[:, None] + 1 + self.spots[:said.shape[1]]
        return accept(self, self.text.gather(1, at) if K > 1 else said)
    monkeypatch.setattr(vla0.Writer, "commit", believe_the_draft)
    broken(run, f"vla0 decode --variant spec:prev {SMALL}")


def test_check_refuses_a_broken_sampler(run, monkeypatch):
    unguided = lambda self, x, c, scale: self.net.denoise(x, c[:len(x)])           # noqa: E731
    monkeypatch.setattr(cogact.ActionModel, "guided", unguided)
    broken(run, "cogact decode")


def test_check_refuses_other_batches_and_losses(run, monkeypatch):
    loss = bench.CogACT.loss
    monkeypatch.setattr(bench.CogACT, "loss", lambda self, batch, i: 1.001 * loss(self, batch, i))
    broken(run, "cogact train --batch 1")


# ---- counts -----------------------------------------------------------------------------------------------

def by_variant(rows):
    return {row["variant"]: row for row in valid(rows)}


@pytest.mark.parametrize("method", bench.METHODS)
def test_counts_on_meta_equal_those_of_a_real_run(run, method):
    (_, meta), (_, real) = (run(f"{method} count --dtype fp32 --device {d}") for d in ("meta", "cpu"))
    for a, b in zip(by_variant(meta).values(), by_variant(real).values()):
        for name in ("flops", "bytes", "saved_bytes", "tokens_in"):
            assert a[name] == b[name], (a["variant"], name, a[name], b[name])
        if a["variant"] == "pass":
            assert a["detail"] == b["detail"]


@pytest.mark.slow
def test_official_counts_are_those_of_performance_md(run):
    """FLOPs within 3 % (section 2), parameters to the last one; twelve head rows; ops of a decoded layer."""
    found = by_variant(run("vla0 count --device meta --size official")[1])
    assert abs(found["inference"]["flops"] / 3.16e12 - 1) < 0.03
    assert abs(found["train"]["flops"] / 10.0e12 - 1) < 0.03
    assert abs(found["inference"]["bytes"] / 1247e9 - 1) < 0.03
    assert (found["inference"]["tokens_in"], found["inference"]["tokens_out"]) == (225, 224)
    assert found["parameters"]["detail"]["all"]["parameters"] == 3_754_622_976
    for of in ("fp32", "bf16"):
        assert found["pass"]["detail"][of]["head_rows"] == 12
    assert found["pass"]["detail"]["fp32"]["ops_per_layer"] <= 28
    found = by_variant(run("cogact count --device meta --size official")[1])
    assert abs(found["inference"]["flops"] / 4.12e12 - 1) < 0.03
    assert abs(found["train"]["flops"] / 12.3e12 - 1) < 0.03
    assert found["inference"]["tokens_in"] == 281


def test_decoded_layer_takes_at_most_28_ops(run):
    layer = by_variant(run("vla0 count --device meta --dtype fp32")[1])["pass"]["detail"]["fp32"]
    assert layer["ops_per_layer"] <= 28 < layer["transformers_ops_per_layer"] and layer["head_rows"] == 12


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


# ---- the CUDA graph's bookkeeping, without CUDA -----------------------------------------------------------

@torch.no_grad()
def test_graphed_pass_writes_the_same_text():
    args = bench.parse(["vla0", "decode"])
    args.batch = 2
    b = bench.VLA0(args, "decode")
    cfg, none = b.changed("graph"), [None] * 2
    graphed = bench.Graphed(b.writer(b.batch(0), cfg, none))
    for i in (1, 0):
        assert graphed.finish(b.writer(b.batch(i), cfg, none)) == b.finish(b.writer(b.batch(i), cfg, none))


# ---- the closed loop --------------------------------------------------------------------------------------

def test_closed_loop_writes_equal_texts_in_every_way(run, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_sim, "STEPS", dict.fromkeys(eval_sim.STEPS, 8))
    cfg = vla0.configure(vla0.PRESETS["tiny"], horizon=2, execute=2, llm_init=0.12)
    model = vla0.Model(cfg, vla0.load_tokenizer(cfg), bench.STATS)
    model.save_pretrained(tmp_path / "ckpt")
    code, rows = run("vla0 decode --episodes 1 --rounds 2", "--ckpt", str(tmp_path / "ckpt"))
    found = by_variant(rows)
    assert code == 0 and list(found) == list(bench.VLA0.closed_loop)
    chunks = found["eager"]["detail"]["chunks"]
    assert chunks > 1 and all(r["check"].startswith(f"texts of {chunks} chunks equal") for r in rows)
    assert found["spec:prev"]["forwards"] < found["grammar"]["forwards"] <= found["grammar"]["tokens_out"]


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
    ("", "MODEL and WHAT are wanted"),
    ("vla infer", "there is no 'vla'; did you mean 'vla0'"),
    ("vla0 inferr", "did you mean 'infer'"),
    ("vla0 infer --variant spec:pref", "did you mean 'spec:prev'"),
    ("vla0 infer --variant graph", "exists on CUDA only"),
    ("cogact infer --variant grammar", "no 'grammar'"),
    ("vla0 infer --device meta", "can only count"),
    ("vla0 infer --size official --device cpu", "takes hours"),
    ("vla0 infer --device gpu", "device 'gpu' does not exist"),
    ("vla0 infer --rounds 0", "--rounds 0: it must be at least 1"),
    ("vla0 infer --set horison=3", "did you mean 'horizon'"),
    ("all infer --set horizon=3", "for one method"),
    ("vla0 train --ckpt x", "for infer, decode and loader"),
    ("vla0 infer --ckpt nowhere", "nowhere: no such file"),
    ("vla0 decode --episodes 3", "plays a trained model"),
    ("vla0 infer --no-such-flag", "unrecognized arguments"),
    ("vla0 infer --out /no/such/folder/x.jsonl", "there is no folder"),
    ("--diff /no/a /no/b", "cannot read /no/a"),
])
def test_refusals_say_what_to_do(flags, words):
    with pytest.raises(ValueError) as e:
        bench.main(flags.split())
    assert words in str(e.value) and len(str(e.value).splitlines()) == 1


def test_a_mistake_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as e:
        common.cli(lambda: bench.main(["vla0", "infer", "--batch", "two"]))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: argument --batch") and err.count("\n") == 1


@pytest.mark.slow
def test_rss_measures_each_side_in_its_own_process(run):
    _, (row,) = run("cogact decode --rss --rounds 1 --inner 1 --warmup 0")
    assert min(row["mem_peak_bytes"], row["detail"]["baseline_mem_peak_bytes"]) > 1e8
