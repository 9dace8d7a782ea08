"""common.py: the parts that all methods share."""
import errno
import json
import os
import random
import resource
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import common
from common import ChunkEnsemble, UniformBins, attention, atomic_folder, atomic_write, normalize, unnormalize

# ---- Devices, ranks, seeds --------------------------------------------------------------------------------

def test_device_auto_is_the_accelerator_or_the_cpu():
    there = torch.accelerator.is_available()
    assert common.device("auto").type == (torch.accelerator.current_accelerator().type if there else "cpu")
    assert common.device("cpu") == common.device(torch.device("cpu")) == torch.device("cpu")


def test_device_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="'nope' does not exist"):
        common.device("nope")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="'cuda' was asked for; this machine has only a CPU"):
        common.device("cuda")


def test_ranks_come_from_the_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert common.rank_info() == (0, 0, 1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert common.rank_info() == (5, 1, 8)
    for wrong in ("0", "-1", "two", "5"):
        monkeypatch.setenv("WORLD_SIZE", wrong)
        with pytest.raises(ValueError, match=f"are 5, 1, {wrong}: unset"):
            common.rank_info()


def test_keyed_draws_depend_on_the_key_only():
    draw = lambda *key: torch.randn(4, generator=common.keyed_generator(*key))  # noqa: E731
    a = draw(1, 2)
    torch.randn(100)
    assert torch.equal(draw(1, 2), a)
    assert len({draw(*key)[0].item() for key in ((1, 2), (2, 1), (1,), (1, 2, 0), (-1, 2), (2**62, 2))}) == 6
    assert common.keyed_rng(3).random() == common.keyed_rng(3).random() != common.keyed_rng(4).random()


def test_keyed_draws_are_the_same_in_every_process_and_version():
    assert common.hash64(7, 9) == 3403627492551251141
    assert common.keyed_rng(7, 9).integers(1 << 40) == 76348769540


def test_seed_everything_repeats_all_generators():
    draws = []
    for _ in range(2):
        common.seed_everything(3)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]


# ---- Attention --------------------------------------------------------------------------------------------

def qkv(B=2, L=9, H=3, K=8, M=None, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, H, K, generator=g).to(device, dtype) for n in (L, M or L, M or L)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_eager_and_sdpa_agree(causal, masked):
    if causal and masked:
        return
    q, k, v = qkv()
    mask = torch.arange(9)[None, None, None] < torch.tensor([9, 5])[:, None, None, None] if masked else None
    eager, sdpa = (attention(q, k, v, kind, causal, mask) for kind in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, rtol=1e-5, atol=1e-6)
    assert eager.shape == (2, 9, 3, 8)
    if masked:                                                 # what is masked is not looked at
        v[1, 5:] = 100
        torch.testing.assert_close(attention(q, k, v, "sdpa", mask=mask), sdpa)
    if causal:
        v[:, 4:] = 100
        torch.testing.assert_close(attention(q, k, v, "eager", True)[:, :4], eager[:, :4])


def test_attention_takes_keys_of_another_length():
    q, k, v = qkv(M=4)
    torch.testing.assert_close(attention(q, k, v, "eager"), attention(q, k, v, "sdpa"), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or common.pick_attention("auto", "cuda") != "flash",
                    reason="needs CUDA and flash-attn")
@pytest.mark.parametrize("causal", [False, True])
def test_flash_and_sdpa_agree(causal):
    q, k, v = qkv(L=64, K=32, dtype=torch.bfloat16, device="cuda")
    flash, sdpa = (attention(q, k, v, kind, causal) for kind in ("flash", "sdpa"))
    torch.testing.assert_close(flash, sdpa, rtol=2e-2, atol=2e-2)
    q, k, v = qkv(device="cuda")                               # 32-bit floats go through SDPA
    torch.testing.assert_close(attention(q, k, v, "flash"), attention(q, k, v, "sdpa"))


def test_attention_choice():
    assert common.pick_attention("auto", "cpu") == "sdpa" and common.pick_attention("eager", "cpu") == "eager"
    assert common.hf_attention("flash") == "flash_attention_2"
    with pytest.raises(ValueError, match="'flash' needs CUDA and flash-attn"):
        common.pick_attention("flash", "cpu")
    with pytest.raises(ValueError, match="choose one of auto, flash, sdpa, eager"):
        common.pick_attention("fast")


# ---- The tiny tokenizer -----------------------------------------------------------------------------------

def test_tiny_tokenizer_ids_are_frozen():
    """The weights under assets/ were trained with these ids: words may only be added at the end."""
    vocab = common.tiny_tokenizer().get_vocab()
    assert len(vocab) == max(vocab.values()) + 1 <= 512
    wanted = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "<pad>": 4, "\n": 5, "\t": 6, "!": 7, "~": 100,
              "▁In": 101, "▁red": 113, "▁cube": 126, "▁plate": 138, "▁pick": 145, "▁put": 151, "▁left": 203,
              "▁balls": 324, "Out": 325}
    assert {token: vocab[token] for token in wanted} == wanted


def test_tiny_tokenizer_never_meets_unknown_ascii_and_gives_the_text_back():
    tokenizer = common.tiny_tokenizer()
    texts = ["pick up the red cube", "In: What action?\nOut:", "xyzzy-42 (two  spaces)\tTab", "512 43 0 1000",
             "".join(map(chr, range(33, 127))), "Cubes CUBES cubes"]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids[0] == 1 and 0 not in ids
        assert tokenizer.decode(ids[1:]) == text
    assert 0 in tokenizer("café").input_ids


def test_tiny_tokenizer_digits_and_words_are_single_tokens():
    tokenizer = common.tiny_tokenizer()
    count = lambda text: len(tokenizer(text).input_ids) - 1  # noqa: E731
    assert count("the red cube") == 3 and count("512") == 4    # a lone space first, then one token per digit
    assert count("7 8 9") == 6
    assert tokenizer("Out: </s>").input_ids[-2:] == [3, 2]     # special tokens are read


# ---- Action statistics ------------------------------------------------------------------------------------

def test_statistics_in_one_pass_equal_numpy():
    x = np.random.default_rng(0).normal(size=(500, 7)).astype(np.float32)
    stats = common.ActionStatistics()
    for part in np.split(x, [3, 100, 101]):
        stats.add(part)
    got = stats.result(mask=[True] * 6 + [False])
    y = x.astype(np.float64)
    for name, want in (("mean", y.mean(0)), ("std", y.std(0)), ("min", y.min(0)), ("max", y.max(0)),
                       ("q01", np.quantile(y, 0.01, axis=0)), ("q99", np.quantile(y, 0.99, axis=0))):
        np.testing.assert_allclose(got["action"][name], want, rtol=1e-12)
    assert (got["num_transitions"], got["num_trajectories"]) == (500, 4)
    assert got["action"]["mask"] == [True] * 6 + [False] and json.loads(json.dumps(got)) == got
    with pytest.raises(ValueError, match="holds no actions"):
        common.ActionStatistics().result()


@pytest.mark.parametrize("kind", ["q99", "minmax", "meanstd"])
def test_unnormalize_inverts_normalize(kind):
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    x[:, 2] = 0.25                                             # a dim that never varies
    s = common.ActionStatistics()
    s.add(x)
    stats = s.result(mask=[True, True, True, False])["action"]
    inside = np.clip(x, stats["q01"], stats["q99"]) if kind == "q99" else x
    y = normalize(inside, stats, kind)
    assert y.dtype == np.float32
    assert (y[:, 2] == 0).all() and np.array_equal(y[:, 3], inside[:, 3].astype(np.float32))
    back = unnormalize(y, stats, kind)
    assert back.dtype == np.float64
    np.testing.assert_allclose(back, inside, atol=1e-6)
    if kind != "meanstd":
        assert np.abs(normalize(10 * x, stats, kind)[:, :3]).max() == 1


def test_normalization_errors():
    stats = {"q01": [0.0] * 3, "q99": [1.0] * 3, "min": [0.0] * 3, "max": [1.0] * 3}
    with pytest.raises(ValueError, match="4 numbers, the statistics 3"):
        normalize(np.zeros((2, 4)), stats)
    with pytest.raises(ValueError, match="4 numbers, the statistics 3"):
        unnormalize(np.zeros((2, 4)), stats)
    with pytest.raises(ValueError, match="choose q99, minmax or meanstd"):
        normalize(np.zeros((2, 3)), stats, "q95")
    for lacking in ("q01", "min"):
        with pytest.raises(ValueError, match=f"the statistics have no {lacking}, only"):
            normalize(np.zeros((2, 3)), {name: x for name, x in stats.items() if name != lacking})


def test_pick_stats():
    a, b = {"q01": [0.0], "q99": [1.0], "mask": [True]}, {"min": [1.0], "extra": "x"}
    one, two = {"a": {"action": a}}, {"a": {"action": a}, "b": {"action": b}}
    assert common.pick_stats(one) == a and common.pick_stats(two, "b") == b
    with pytest.raises(ValueError, match=r"unnorm_key='c'.*\['a', 'b'\]"):
        common.pick_stats(two, "c")
    with pytest.raises(ValueError, match="no unnorm_key was given"):
        common.pick_stats(two)
    with pytest.raises(ValueError, match="no dataset statistics"):
        common.pick_stats({})
    for wrong in ({}, None, [1], {"action": {}}, {"action": 3}, {"action": a | {"q99": [1.0, 2.0]}},
                  {"action": a | {"mask": []}}, {"action": a | {"q01": [np.nan]}}, {"action": {"q01": 3}}):
        with pytest.raises(ValueError, match="dataset_statistics.json, 'x': no action statistics"):
            common.pick_stats({"x": wrong})


# ---- Quantizers and ensembles -----------------------------------------------------------------------------

def test_uniform_bins_error_is_half_a_bin():
    bins = UniformBins(256)
    x = np.linspace(-1, 1, 1001)
    assert np.abs(bins.decode(bins.encode(x)) - x).max() <= 1 / 255 + 1e-12
    assert bins.encode([-1, 1, -9, 9]).tolist() == [1, 256, 1, 256]
    assert np.array_equal(bins.encode(bins.decode(np.arange(1, 256))), np.arange(1, 256))


def test_ensemble_picks_what_each_chunk_says_about_now():
    seen = []

    def weights(candidates):
        seen.append(candidates[:, 0].tolist())
        return np.full(len(candidates), 1 / len(candidates))
    ensemble = ChunkEnsemble(3, weights)
    for k in range(4):
        ensemble.step(100 * k + np.arange(5.0)[:, None])       # chunk k says 100 k + i about i steps later
    assert seen == [[0], [1, 100], [2, 101, 200], [102, 201, 300]]
    ensemble.reset()
    assert ensemble.step(np.array([[7.0], [8.0]]))[0] == 7


# ---- Files ------------------------------------------------------------------------------------------------

def test_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    atomic_write(path, lambda part: part.write_text("old"))

    def fails(part):
        part.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="cannot write .*a.txt: No space left on device. Free some space"):
        atomic_write(path, fails)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["a.txt"]


def forked(main, error_file, **limits):
    """Run cli(main) in a forked process with resource limits; returns its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for name, value in limits.items():
                resource.setrlimit(getattr(resource, name), (value, value))
            with open(error_file, "w") as sys.stderr:
                common.cli(main)
        except SystemExit as e:
            code = e.code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("kind", ["json", "safetensors", "pt"])
def test_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, kind):
    """A limit on the size of files stands for a full disk: writing fails in the middle."""
    tensors, path = {"x": torch.zeros(100000)}, tmp_path / "out" / "file"
    write = {"json": lambda: common.write_json(path, list(range(100000))),
             "safetensors": lambda: atomic_write(path, lambda part: save_file(tensors, part)),
             "pt": lambda: atomic_write(path, lambda part: torch.save(tensors, part))}[kind]
    code = forked(write, tmp_path / "error", RLIMIT_FSIZE=20000)
    error = (tmp_path / "error").read_text()
    assert code == 2 and error.startswith("error: cannot write") and len(error.splitlines()) == 1, error
    assert os.listdir(path.parent) == []


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "ck"
    with pytest.raises(RuntimeError):
        with atomic_folder(out) as part:
            (part / "a").write_text("1")
            raise RuntimeError("interrupted")
    assert os.listdir(tmp_path) == []
    for text in ("1", "2"):
        with atomic_folder(out) as part:
            (part / "a").write_text(text)
        assert (out / "a").read_text() == text and os.listdir(tmp_path) == ["ck"]
    (tmp_path / ".ck.1.part").mkdir()                          # left by a killed run
    os.replace(out, tmp_path / ".ck.1.old.part")               # killed between taking the old and putting the new
    with pytest.raises(RuntimeError):
        with atomic_folder(out) as part:
            raise RuntimeError("interrupted")
    assert (out / "a").read_text() == "2" and os.listdir(tmp_path) == ["ck"]
    with atomic_folder(out) as part:
        pass
    assert os.listdir(tmp_path) == ["ck"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        with atomic_folder(tmp_path / "file"):
            pass


def test_killed_while_saving_leaves_no_half_checkpoint(tmp_path):
    def main():
        with atomic_folder(tmp_path / "ck") as part:
            (part / "a").write_text("1")
            os.kill(os.getpid(), 9)
    assert forked(main, tmp_path / "error") == -9
    assert not (tmp_path / "ck").exists()


def test_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(OSError, match="cannot write"):
            common.save_folder(folder, "cogact", "tiny", {}, {"x": torch.zeros(1)})


def test_checkpoint_folder_round_trip(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    common.save_folder(tmp_path / "ck", "cogact", "tiny", {"lr": 1.0}, {"x": x, "half": x.half().T}, {"a": 1},
                       "# card", {"license": "MIT"})
    config = common.load_config(tmp_path / "ck", "cogact")
    assert config == {"method": "cogact", "preset": "tiny", "config": {"lr": 1.0},
                      "origin": {"license": "MIT"}, "version": common.VERSION}
    got = common.load_weights(tmp_path / "ck" / "model.safetensors")
    assert torch.equal(got["x"], x) and torch.equal(got["half"], x.half().T)
    assert (tmp_path / "ck" / "README.md").read_text() == "# card"
    assert all(f.stat().st_mode & 0o044 for f in (tmp_path / "ck").iterdir())        # others may read it


def test_wrong_config_is_one_clear_line(tmp_path):
    def write(text):
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="cannot read .*config.json"):
        common.load_config(tmp_path)
    for text, words in (("{", "cannot read"), ("[]", "not an object"), ('{"method": "x"}', "not the config"),
                        ("null", "not an object"), ("\0", "cannot read.*Copy it again"),
                        ('{"method": "cogact", "config": {}, "version": null}', "version is None"),
                        ('{"method": ["cogact"], "config": {}}', "method is"),
                        ('{"method": "a0", "config": {}}', "checkpoint of 'a0', 'cogact' was asked for"),
                        ('{"method": "cogact", "config": {}, "version": 99}', "version 99")):
        write(text)
        with pytest.raises(ValueError, match=words) as caught:
            common.load_config(tmp_path, "cogact")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_torn_weights_are_one_clear_line(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    tensors = {"x": torch.randn(1000), "y": torch.randn(1000)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    assert torch.equal(common.load_weights(path)["x"], tensors["x"])
    data = path.read_bytes()
    for content in (data[:-1], data[:len(data) // 2], data[:20], b"", b"\0" * 1000, data[100:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is torn, or no weights file") as caught:
            common.load_weights(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no weights file"):
        common.load_weights(tmp_path / "nothing.pt")


def test_weights_are_mapped_not_read(tmp_path):
    """Opening 120 MB of weights costs a fraction of that in memory (both formats)."""
    big = {"x": torch.zeros(30_000_000)}
    save_file(big, tmp_path / "w.safetensors")
    torch.save(big, tmp_path / "w.pt")
    del big
    def main():
        grown = []
        for name in ("w.safetensors", "w.pt"):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            common.load_weights(tmp_path / name)
            grown.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        (tmp_path / "grown").write_text(json.dumps(grown))
    assert forked(main, tmp_path / "error") == 0
    assert max(json.loads((tmp_path / "grown").read_text())) * (1 if sys.platform == "darwin" else 1024) < 60e6


def test_method_of(tmp_path):
    (tmp_path / "config.json").write_text('{"method": "a0", "config": {}}')
    assert common.method_of(tmp_path) == common.method_of(tmp_path, "a0") == "a0"
    with pytest.raises(ValueError, match="checkpoint of 'a0'"):
        common.method_of(tmp_path, "cogact")
    (tmp_path / "config.json").write_text('{"vla": {}}')
    assert common.method_of(tmp_path, "cogact") == "cogact"
    with pytest.raises(ValueError, match="add --model"):
        common.method_of(tmp_path)


def test_resolve_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert common.resolve(tmp_path, []) == tmp_path
    common.write_json(tmp_path / "run" / "last" / "config.json", {})
    with pytest.raises(ValueError, match="is a whole run; give its newest checkpoint: .*run/last"):
        common.resolve(tmp_path / "run", [])
    with pytest.raises(ValueError, match="--init some/where/else: no such file"):
        common.resolve("some/where/else", [], "--init")
    with pytest.raises(ValueError, match="checkpoint nobody/nothing: not a local path.*offline"):
        common.resolve("nobody/nothing", ["*.json"])


# ---- Command line -----------------------------------------------------------------------------------------

def test_cli_turns_user_errors_into_one_line(capsys, monkeypatch):
    def fails(error):
        def main():
            raise error
        with pytest.raises(SystemExit) as caught:
            common.cli(main)
        assert caught.value.code == 2
        return capsys.readouterr().err
    assert fails(ValueError("bad\nvalue")) == "error: bad value\n"
    assert fails(ValueError("'x..' in .. : no.. Use y..")) == "error: 'x..' in .. : no. Use y.\n"
    missing = FileNotFoundError(2, "No such file", "x.json")
    assert fails(missing) == "error: [Errno 2] No such file: 'x.json'\n"
    monkeypatch.setenv("PLAINVLA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad"):
        fails(ValueError("bad"))
    with pytest.raises(SystemExit) as caught:
        common.cli(lambda: None)
    assert caught.value.code == 0
