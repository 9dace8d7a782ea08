"""
A checkpoint of any of our methods that predict actions, as a policy of LeRobot: its evaluation, recording
and training loops take it like one of their own. (A0 predicts points: robots want a0.Policy beside them.)

    pip install "lerobot>=0.6" -e .             # Python 3.12, torch 2.11: what both projects allow
    import lerobot_policy                       # registers the type "plainvla"; this folder in sys.path
    config = lerobot_policy.PlainvlaConfig(checkpoint="runs/cogact-tiny/last", cameras={"third": "front"})
    policy = lerobot_policy.PlainvlaPolicy(config)
    action = policy.select_action(batch)        # (B, A) in the robot's units

batch, as LeRobot makes it: observation.images.NAME float (B, 3, h, w) in [0, 1], observation.state (B, S) if
the method takes one, task: a list of B instructions; to train on also action (B, T, A) in the robot's units
and action_is_pad (B, T) bool. Nothing is normalized outside: our files do it, with their own statistics, so
LeRobot's pre- and postprocessor leave numbers as they are. A prediction that could not be read is an error.
"""
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

try:
    from lerobot.configs import NormalizationMode, PreTrainedConfig
    from lerobot.optim import AdamWConfig
    from lerobot.policies.pretrained import PreTrainedPolicy
    from lerobot.processor import make_default_pre_post_processors
except ImportError as e:
    raise ImportError(f'{e.name or e}: this adapter needs LeRobot; run: pip install "lerobot>=0.6"') from e

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import pick_stats  # noqa: E402
from eval_sim import find_method  # noqa: E402


@PreTrainedConfig.register_subclass("plainvla")
@dataclass
class PlainvlaConfig(PreTrainedConfig):
    """LeRobot's settings, and ours."""
    checkpoint: str = ""                        # folder or hub id, as for serve.py --ckpt
    method: str | None = None                   # a file name; default: what the checkpoint says it is
    unnorm_key: str | None = None               # whose statistics; may be left out where there is one
    execute: int | None = None                  # actions played per chunk; default: the method's
    cameras: dict[str, str] = field(default_factory=dict)      # our view: LeRobot's NAME, where they differ
    horizon: int = 0                            # T; set from the checkpoint
    lr: float = 2e-5
    weight_decay: float = 0.0
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=lambda: dict.fromkeys(
        ("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY))

    observation_delta_indices = property(lambda self: None)
    action_delta_indices = property(lambda self: list(range(self.horizon)))
    reward_delta_indices = property(lambda self: None)

    def get_optimizer_preset(self):
        """AdamW, as our train.py runs it."""
        return AdamWConfig(lr=self.lr, weight_decay=self.weight_decay, grad_clip_norm=1.0)

    def get_scheduler_preset(self):
        """None: a constant learning rate."""

    def validate_features(self):
        """Nothing to check: the checkpoint knows its cameras, and `observations` names what is missing."""


class PlainvlaPolicy(PreTrainedPolicy):
    """LeRobot's contract over one of our models; a Policy of the method's own for every row of the batch."""
    config_class, name = PlainvlaConfig, "plainvla"

    def __init__(self, config, **_):
        super().__init__(config)
        self.method = find_method(config.checkpoint, config.method)
        if self.method.PREDICTS != "actions":
            raise ValueError(f"{config.checkpoint}: {self.method.__name__} predicts {self.method.PREDICTS}, "
                             "LeRobot's policies answer actions.")
        self.model = self.method.from_pretrained(config.checkpoint, device=torch.device(config.device))
        pick_stats(self.model.stats, config.unnorm_key)        # a wrong key fails here
        config.horizon = self.model.cfg.horizon
        self.reset()

    def _save_pretrained(self, save_directory, state_dict=None):
        own = {name: x.clone() for name, x in self.state_dict().items()}     # fused weights share memory
        super()._save_pretrained(save_directory, state_dict=state_dict or own)

    def get_optim_params(self):
        """The method's parameter groups."""
        return self.model.param_groups(self.config.lr, self.config.weight_decay)

    def reset(self):
        """Forget the episode: history, queues and ensembles."""
        self.policies = []

    def observations(self, batch):
        """LeRobot's batch -> a list of our observations. ValueError names what is missing."""
        names, views = self.config.cameras, self.model.cfg.views
        keys = {view: f"observation.images.{names.get(view, view)}" for view in views}
        if missing := [key for key in (*keys.values(), "task") if key not in batch]:
            raise ValueError(f"the batch has no {', '.join(missing)}, only {', '.join(sorted(batch))}; map "
                             f"the views {list(views)} with PlainvlaConfig.cameras.")
        images = {view: (batch[key].float() * 255).round().byte().movedim(-3, -1).cpu().numpy()
                  for view, key in keys.items()}               # (B, h, w, 3)
        seen = [{"instruction": task, "images": {view: x[i] for view, x in images.items()}}
                for i, task in enumerate(batch["task"])]
        if getattr(self.model.cfg, "state_dim", 0) and "observation.state" in batch:
            for o, state in zip(seen, batch["observation.state"].float().cpu().numpy(), strict=True):
                o["state"] = state                             # (S,)
        return seen

    def ask(self, seen):
        """Observations -> chunks (B, T, A) float32, numpy."""
        chunks, info = self.model.act(seen, unnorm_key=self.config.unnorm_key)
        if np.any(info.get("parse_failed", False)) or not np.isfinite(chunks).all():
            raise ValueError("the model's answer could not be read as actions; stop, and ask again.")
        return chunks

    @torch.no_grad()
    def predict_action_chunk(self, batch, **_):
        """The next actions, (B, T, A) float32 in the robot's units."""
        self.eval()
        return torch.from_numpy(self.ask(self.observations(batch))).to(self.config.device)

    @torch.no_grad()
    def select_action(self, batch, **_):
        """One action for each row, (B, A); new chunks are asked for together."""
        self.eval()
        seen = self.observations(batch)
        if len(self.policies) != len(seen):
            self.policies = [self.method.Policy(self.model, unnorm_key=self.config.unnorm_key,
                                                execute=self.config.execute) for _ in seen]
        rows = list(zip(self.policies, seen))
        need = [i for i, (policy, _) in enumerate(rows) if policy.needs_chunk]
        chunks = dict(zip(need, self.ask([rows[i][0].ask(seen[i]) for i in need]))) if need else {}
        actions = [policy.step(o, chunks.get(i)) for i, (policy, o) in enumerate(rows)]
        return torch.from_numpy(np.array(actions, np.float32)).to(self.config.device)

    def forward(self, batch):
        """The method's own loss -> (scalar, {name: float})."""
        stats, cfg, samples = self.model.stats, self.model.cfg, self.observations(batch)
        name = self.config.unnorm_key or next(iter(stats))
        pad = batch.get("action_is_pad", torch.zeros(batch["action"].shape[:2], dtype=torch.bool))
        for i, sample in enumerate(samples):
            sample |= {"dataset": name, "actions": batch["action"][i].float().cpu().numpy(),
                       "loss_mask": ~pad[i].cpu().numpy()}
        self.model.tokenizer = self.model.tokenizer or self.method.load_tokenizer(cfg)
        keys = torch.randint(2**31, (len(samples),)).tolist()  # of the augmentation's draws
        rows = [self.method.prepare(sample, cfg, self.model.tokenizer, stats, key=key, train=self.training)
                for sample, key in zip(samples, keys)]
        ready = {k: v.to(self.config.device) for k, v in self.method.collate(rows, cfg).items()}
        loss, logs = self.model.loss(ready)
        return loss, {k: float(v) for k, v in logs.items()}


def make_plainvla_pre_post_processors(config, dataset_stats=None):
    """LeRobot's pipelines around the policy: batch, device; numbers as they are."""
    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)
