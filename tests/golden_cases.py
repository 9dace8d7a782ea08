"""
Recordings of official code, found through a manifest, and compared at the tolerances written there.

    GOLDEN_DIR/<method>/manifest.json        default: tests/golden
    THIRD_PARTY_DIR/<method>/FILE            files not ours to copy; only tests that need one may skip
    TOKENIZER_DIR/<name>                     real vocabularies (optional)

A test file says which function replays which kind of case, and checks that no entry is left over:

    GOLDEN = Recordings("cogact")

    @GOLDEN.replays("dit_forward")
    def test_dit_forward(case):
        got = ...                             # from case.config and case["in.x"]
        case.compare("out.eps", got)

After its test, every tensor that is not an input, a weight or for information must have been compared.
"""
import fnmatch
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
REPORT = []            # (method, kind, file, tensors, largest difference, share of the bound)


class Case:
    """One entry of a manifest: its config, its tensors (or JSON), the comparison with what was recorded."""

    def __init__(self, method, folder, entry, third_party):
        self.method, self.folder, self.entry, self.third_party = method, folder, entry, third_party
        self.file, self.kind, self.config = entry["file"], entry["kind"], entry["config"]
        self.seen, self.worst, self.share = set(), 0.0, 0.0

    def __repr__(self):
        return self.file

    def path(self, name):
        """Where a file of the recordings is; a third-party file that is not there skips the test."""
        if name not in self.third_party:
            return self.folder / name
        root = os.environ.get("THIRD_PARTY_DIR")
        path = Path(root) / self.method / name if root else None
        if path is None or not path.is_file():
            pytest.skip(f"{name} is a third party's file; set THIRD_PARTY_DIR")
        return path

    def json(self, name=None):
        return json.loads(self.path(name or self.file).read_text(encoding="utf-8"))

    def load(self):
        self.tensors = load_file(self.path(self.file)) if self.file.endswith(".safetensors") else {}
        self.seen, self.worst, self.share = set(), 0.0, 0.0
        return self

    def __getitem__(self, name):
        return self.tensors[name]

    def __contains__(self, name):
        return name in self.tensors

    def weights(self, prefix=None):
        """The tensors under a prefix (default: config's weight_prefix), without it."""
        prefix = self.config["weight_prefix"] if prefix is None else prefix
        return {name[len(prefix):]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def tolerance(self, name):
        match = (lambda key: name.count("/") == key.count("/") and fnmatch.fnmatchcase(name, key)) \
            if self.file.endswith(".json") else (lambda key: fnmatch.fnmatchcase(name, key))
        keys = [key for key in self.entry["tolerance"] if match(key)]
        assert len(keys) == 1, f"{self.file}: {name} matches {len(keys)} tolerances, one is needed"
        return self.entry["tolerance"][keys[0]]

    def compare(self, name, got, want=None, part=...):
        """`got` is what the recording holds under `name` (or `want`), at the manifest's tolerance.

        part: an index, when only a part of the recorded tensor can be produced.
        """
        self.seen.add(name)
        want, rule = self[name] if want is None else want, self.tolerance(name)
        want, got = (x.numpy(force=True) if isinstance(x, torch.Tensor) else x for x in (want, got))
        if rule == "exact" and not isinstance(want, np.ndarray):
            assert got == want, f"{self.file}: {name} differs"
            return
        want, got = np.asarray(want)[part], np.asarray(got)
        assert got.shape == want.shape, f"{self.file}: {name} has shape {got.shape}, recorded {want.shape}"
        if rule == "exact":
            assert np.array_equal(got, want), f"{self.file}: {name} is not equal, largest difference " \
                f"{np.abs(got.astype(np.float64) - want).max()}"
            return
        got, want = got.astype(np.float64), want.astype(np.float64)
        assert np.array_equal(np.isnan(got), np.isnan(want)), f"{self.file}: {name}: NaN must meet NaN"
        difference, size = np.abs(np.nan_to_num(got) - np.nan_to_num(want)), np.abs(np.nan_to_num(want))
        scale = size if rule.get("rel_to") == "element" else size.max(initial=0)
        bound = np.broadcast_to(rule.get("abs", 0) + rule.get("rel", 0) * scale, difference.shape)
        if rule.get("statistic") == "median":
            difference, bound = np.median(difference), bound.max(initial=0)
        share = np.max(difference / np.maximum(bound, 1e-300), initial=0)
        self.worst, self.share = max(self.worst, np.max(difference, initial=0)), max(self.share, share)
        assert share <= 1, f"{self.file}: {name}: difference {np.max(difference)} is {share:.3g} of the bound"

    def finish(self):
        """Nothing that was recorded as an output may have been forgotten."""
        known = [*self.entry.get("inputs", []), *self.entry.get("weights", []), *self.entry.get("info", [])]
        forgotten = [n for n in self.tensors if n not in self.seen and
                     not any(fnmatch.fnmatchcase(n, key) for key in known)]
        assert not forgotten, f"{self.file}: never compared: {forgotten[:8]}"
        assert self.seen, f"{self.file}: the test compared nothing"
        REPORT.append((self.method, self.kind, self.file, len(self.seen), self.worst, self.share))


class Recordings:
    """All entries of one method's manifest."""

    def __init__(self, method):
        self.folder = Path(os.environ.get("GOLDEN_DIR") or HERE / "golden") / method
        self.replayed, self.problem, self.cases = set(), "", []
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            self.cases = [Case(method, self.folder, e, manifest["third_party"]) for e in manifest["files"]]
        except (OSError, ValueError, KeyError) as e:
            self.problem = f"{self.folder}/manifest.json: {e!r}"

    def replays(self, kind):
        """Mark a test function as the one for `kind`: it runs once per entry, and gets the loaded case."""
        def mark(function):
            self.replayed.add(kind)
            cases = [case for case in self.cases if case.kind == kind]
            if not cases:                                      # these recordings have none of this kind
                return None

            def test(case):
                function(case.load())
                case.finish()
            test.__doc__ = function.__doc__
            return pytest.mark.golden(pytest.mark.parametrize("case", cases, ids=repr)(test))
        return mark

    def check(self, *others):
        """To be called by a test: the manifest is there, finds something, and every entry has its test.

        others: test files beside the caller's that replay some of the kinds.
        """
        assert not self.problem, self.problem
        assert self.cases, f"{self.folder}/manifest.json lists no files"
        replayed = self.replayed.union(*(re.findall(r'\.replays\("(\w+)"\)', (HERE / name).read_text("utf-8"))
                                         for name in others))
        unknown = {f"{c.file}: {c.kind}" for c in self.cases if c.kind not in replayed}
        assert not unknown, f"no test replays these kinds: {sorted(unknown)}"
        gone = [c.file for c in self.cases
                if c.file not in c.third_party and not (self.folder / c.file).exists()]    # folders, too
        assert not gone, f"{self.folder} lacks {gone}"


def tokenizer_path(name):
    """The tokenizer.json of a real vocabulary in TOKENIZER_DIR, or None."""
    root = Path(os.environ.get("TOKENIZER_DIR") or "/nowhere")
    places = (root / name / "tokenizer.json", root / f"{name}.json", root / "tokenizer.json")
    return next((path for path in places if path.is_file()), None)


def hashed(key, shape, rule, name):
    """A float32 tensor whose values are a hash of its key: large weights that need not be stored.

    key: full key; rule: the manifest's hash_rule; name: the key without prefix and module (for amplitudes).
    """
    offset = rule["offset"]["start"]
    for byte in key.encode():
        offset = (offset * rule["offset"]["multiplier"] + byte) % rule["offset"]["modulus"]
    n = ((np.arange(int(np.prod(shape)), dtype=np.uint64) + offset) % 2**32).astype(np.uint32)
    for op in rule["mix"]:
        n = n ^ (n >> np.uint32(op["bits"])) if op["op"] == "xor_shift_right" else n * np.uint32(op["by"])
    u = n.astype(np.float64) / rule["u"]["divide_by"] - rule["u"]["then_subtract"]
    for r in rule["rules"]:
        suffix = any(map(name.endswith, r.get("suffix_any", [])))
        inside = any(part in name for part in r.get("contains_any", []))
        match = {"suffix_any or contains_any": suffix or inside, "contains_any": inside, "always": True,
                 "min_dims and contains_none": len(shape) >= r.get("min_dims", 0) and
                 not any(x in name for x in r.get("contains_none", []))}[r["match"]]
        if match:
            break
    amp = np.sqrt(3 / np.prod(shape[1:])) if isinstance(r["amp"], str) else r["amp"]
    value = np.float32(r["add"]) + (2 * amp * u).astype(np.float32)
    return torch.from_numpy(value.astype(np.float32).reshape(shape))
