"""examples/lerobot_policy.py, where LeRobot is installed (it wants Python 3.12 and an older torch)."""
import importlib
import sys

import numpy as np
import pytest
import torch
from test_methods import ROOT, make

pytest.importorskip("lerobot", reason='pip install "lerobot>=0.6"')
sys.path.append(str(ROOT / "examples"))
import lerobot_policy  # noqa: E402
from lerobot.policies import get_policy_class, make_pre_post_processors  # noqa: E402

TASKS = ["pick up the red cube", "push the ball to the left"]


def batch_of(steps=0):
    torch.manual_seed(1)
    batch = {"observation.images.front": torch.rand(2, 3, 40, 48), "observation.state": torch.zeros(2, 8),
             "task": TASKS}
    return batch | ({"action": torch.rand(2, steps, 7) - 0.5} if steps else {})


@pytest.fixture(scope="module", params=["cogact", "vla0", "robovlms", "robobrain_x0"])
def policy(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make(importlib.import_module(request.param)).save_pretrained(folder)
    config = lerobot_policy.PlainvlaConfig(checkpoint=str(folder), cameras={"third": "front"}, device="cpu")
    return get_policy_class("plainvla")(config)


def test_policy_gives_the_chunk_of_act_and_plays_it(policy):
    model, batch = policy.model, batch_of()
    seen = [{"instruction": task, "images": {"third": (x * 255).round().byte().permute(1, 2, 0).numpy()}}
            for task, x in zip(TASKS, batch["observation.images.front"])]
    torch.manual_seed(2)
    want = model.act(seen)[0]
    torch.manual_seed(2)
    chunk = policy.predict_action_chunk(batch)
    assert chunk.dtype == torch.float32 and np.array_equal(chunk.numpy(), want)
    policy.reset()
    before, after = make_pre_post_processors(policy.config)
    execute = importlib.import_module(policy.method.__name__).Policy(model).execute
    torch.manual_seed(2)
    for k in range(min(execute, 2)):
        action = after(policy.select_action(before(batch)))
        if execute > 1:                                        # else it is an average of chunks
            np.testing.assert_allclose(action, want[:, k], atol=1e-6)
        assert action.shape == (2, 7)


def test_policy_trains_by_the_method_s_own_loss(policy):
    policy.train()
    loss, logs = policy(batch_of(policy.config.horizon))
    loss.backward()
    grads = [p.grad for group in policy.get_optim_params() for p in group["params"]]
    assert any(g is not None and g.abs().max() > 0 for g in grads)
    assert torch.isfinite(loss) and all(type(value) is float for value in logs.values())
    assert policy.config.action_delta_indices == [*range(policy.config.horizon)]


def test_what_is_missing_is_named(policy, tmp_path):
    batch = batch_of()
    batch["observation.images.top"] = batch.pop("observation.images.front")
    with pytest.raises(ValueError, match="no observation.images.front, only observation.images.top"):
        policy.select_action(batch)
    make(importlib.import_module("a0")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a0 predicts waypoints"):
        lerobot_policy.PlainvlaPolicy(lerobot_policy.PlainvlaConfig(checkpoint=str(tmp_path), device="cpu"))


def test_lerobot_saves_and_loads_it(policy, tmp_path):
    with torch.no_grad():
        next(policy.model.parameters()).add_(0.5)              # other weights than the checkpoint's
    policy.save_pretrained(tmp_path)
    again = lerobot_policy.PlainvlaPolicy.from_pretrained(tmp_path)
    chunks = []
    for one in (policy, again):
        torch.manual_seed(2)
        chunks.append(one.predict_action_chunk(batch_of()))
    assert torch.equal(*chunks)
