"""train.py --compile: each kind of block is compiled once, for training only, and no number changes."""
import functools
from collections import Counter

import pytest
import torch
import train
from common import METHODS
from test_train import losses
from test_train_dist import TOY, command

# Graphs that a step needs at most: one per kind of block (A0's read pictures or words).
GRAPHS = {"a0": 2, "cogact": 4, "robobrain_x0": 2, "robovlms": 2, "vla0": 2}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(method, flags) -> (losses, what each pass over a batch did: a Counter of "graph", "call")."""
    seen, forward = [], train.Step.forward

    def backend(graph, inputs):                                # instead of inductor: it only counts
        seen[-1]["graph"] += 1
        return lambda *args: seen[-1].update(["call"]) or graph(*args)

    def step(self, batch):
        seen.append(Counter(blocks=len(self.model.blocks()), trains=int(torch.is_grad_enabled())))
        return forward(self, batch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.Step, "forward", step)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    (tmp_path / "toy.py").write_text(TOY)

    def call(method, flags):
        torch._dynamo.reset(), torch._dynamo.utils.counters.clear(), seen.clear()
        flags = f"--init none --batch 2 --global-batch 2 --out out --overwrite {flags}"
        train.main(command(method, flags).split()[1:])
        return losses(tmp_path / "out"), list(seen)
    return call


@pytest.mark.parametrize("method", [
    name if name in ("cogact", "vla0") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS])
def test_each_kind_of_block_is_compiled_once_and_no_number_changes(run, method):
    found, seen = run(method, "--steps 5 --compile --val-every 2 --val-samples 2")
    first, *others = (done for done in seen if done["trains"])
    assert not first["call"] and len(others) == 4, "the pass whose operations are counted is eager"
    assert all(done["call"] >= done["blocks"] > 0 for done in others)
    assert 0 < others[0]["graph"] <= GRAPHS[method]
    assert sum(done["graph"] for done in others[1:]) <= 1, "prompts of another length: one more, then none"
    assert not any(done["call"] for done in seen if not done["trains"]), "validation is not compiled"
    assert not torch._dynamo.utils.counters["graph_break"]
    plain, seen = run(method, "--steps 5")
    assert found == plain and not any(done["call"] for done in seen)
