"""bench.py for RoboVLMs: one control step of a session, against the window computed anew, frame by frame."""
import contextlib
import dataclasses
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from bench import Bench, Stage, count
from torch import nn

import common
import robovlms
from common import pick_stats


class PlainRoboVLMs(nn.Module):
    """The same modules used as the paper's picture has it: every frame of the window, one after the other."""

    def __init__(self, cfg, model):
        super().__init__()
        self.cfg, self.model = cfg, model

    def forward(self, images, ids, mask):
        """images (B, W, V, h, w, 3) -> arm (B, W, K, A - 1), gripper logits (B, W, K)."""
        m, (mean, std) = self.model, self.model.backbone.pixels
        seen = []
        for frame in images.unbind(1):                                                 # (B, V, h, w, 3)
            views = []
            for view in frame.unbind(1):                                               # (B, h, w, 3)
                pixels = view.permute(0, 3, 1, 2).float() / 255
                pixels = (pixels - torch.tensor(mean, device=view.device).view(1, 3, 1, 1)) / torch.tensor(
                    std, device=view.device).view(1, 3, 1, 1)
                views.append(m.backbone.see(pixels))                                   # (B, P, D)
            tokens = torch.stack(views, 1)[:, None]                                    # (B, 1, V, P, D)
            seen.append(m.think(tokens, ids, mask) if self.cfg.formulation != "interleaved" else tokens)
        seen = torch.cat(seen, 1)
        return m.act_head(seen if self.cfg.formulation != "interleaved" else m.think(seen, ids, mask))

    def loss(self, batch):
        arm, logit = self(batch["images"], batch["ids"], batch["mask"])
        target, keep = batch["actions"], batch["loss_mask"]
        error = F.huber_loss(arm.float(), target[..., :-1], reduction="none").mean(-1)[keep].mean()
        gripper = F.binary_cross_entropy_with_logits(logit.float(), target[..., -1], reduction="none")
        return error + self.cfg.gripper_weight * gripper[keep].mean()


class Method(Bench):
    """infer: the newest frame, the W - 1 earlier ones as they are kept; decode: the head alone over W states.
    Variants: eager; jpeg, cold: see above; hf-compile: the baseline compiled."""
    module, official, prompt = robovlms, "kosmos_oxe", 25
    prompt_text = staticmethod(lambda text: f"<grounding>An image of a robot {text}")
    pixels = (robovlms.CLIP_PIXELS,)
    baseline, plain = "the whole window, frame by frame", PlainRoboVLMs

    def adapt(self, cfg):
        """No tokenizer is downloaded; the meta device knows no autocast."""
        if cfg.head in ("discrete", "diffusion") or cfg.formulation == "video":
            raise ValueError(f"robovlms: formulation={cfg.formulation} head={cfg.head} is not measured here; "
                             "take one_step, interleaved or policy_head with mlp, lstm or gpt.")
        meta = {"compute": "auto"} if self.device.type == "meta" else {}
        return dataclasses.replace(cfg, tokenizer="tiny", **meta)

    def cast(self, model):
        """Nothing: released policies are evaluated in float32 weights."""

    def itemsize(self, name):
        """Bytes per number of any parameter when acting."""
        return 4

    def sample(self, i):
        """With the frames and actions before it."""
        n, actions = self.cfg.history - 1, super().sample(i)["actions"]
        past = [self.observation(i * 100 + k + 1)["images"] for k in range(n)]
        more = {"history_images": {v: np.stack([p[v] for p in past]) for v in self.cfg.views},
                "history_actions": np.resize(actions, (n, actions.shape[1]))} if n else {}
        return super().sample(i) | more

    def tokens_in(self, batch):
        cfg = self.cfg
        tokens = cfg.resampler_latents if cfg.resampler else cfg.image_tokens
        queries = cfg.latent if cfg.reading == "query" else 0
        return batch["ids"].shape[1] + batch["images"].shape[2] * tokens + queries

    def state(self, batch):
        """What a frame becomes and is kept as."""
        with self.model.precision():
            seen = self.model.frame(batch["images"], batch["ids"])                     # (B, 1, ...)
            if self.cfg.formulation == "one_step":
                return self.model.think(seen, batch["ids"], batch["mask"])
            return seen

    @torch.no_grad()
    def kept(self, i):
        """The states of the W - 1 frames before call i."""
        if not hasattr(self, "states"):
            self.states = [self.state(batch) for batch in self.batches]
        return [self.states[(i - k) % len(self.states)] for k in range(self.cfg.history - 1, 0, -1)]

    def head(self, states, batch):
        """States (B, W, ...) -> the newest step's outputs (B, K A)."""
        with self.model.precision():
            if self.cfg.formulation == "interleaved":
                states = self.model.think(states, batch["ids"], batch["mask"])
            arm, logit = self.model.act_head(states)
        return torch.cat([arm[:, -1].flatten(1), logit[:, -1]], 1)

    @torch.no_grad()
    def run(self, batch, i):
        return self.head(torch.cat([*self.kept(i), self.state(batch)], 1), batch)

    @torch.no_grad()
    def base_run(self, batch, i, model=None):
        frames = [self.batch(i - k)["images"] for k in range(self.cfg.history - 1, 0, -1)]
        window = torch.cat([*frames, batch["images"]], 1)
        with self.model.precision():
            arm, logit = (model or self.base)(window, batch["ids"], batch["mask"])
        return torch.cat([arm[:, -1].flatten(1), logit[:, -1]], 1)

    def act(self, observations, i):
        return self.model.act(observations)[0]

    @torch.no_grad()
    def base_act(self, observations, i):
        batch, cfg = self.collate(observations), self.cfg
        with self.model.precision():
            arm, logit = self.base(batch["images"], batch["ids"], batch["mask"])
        arm, is_open = arm[:, -1].float().cpu().numpy(), logit[:, -1].cpu().numpy() > 0
        return robovlms.denormalize_actions(arm, is_open, pick_stats(self.model.stats), cfg)

    @torch.no_grad()
    def decode(self, variant):
        """The head over a full memory; the baseline hands the states over one by one."""
        self.kept(0)
        windows = [torch.cat([*self.kept(i), self.states[i]], 1) for i in range(len(self.states))]

        def base(i):
            window, batch = windows[i % len(windows)], self.batch(i)
            return self.head(torch.cat(list(window.unbind(1)), 1).view_as(window), batch)
        if self.cfg.head == "lstm" and self.cfg.formulation != "interleaved":
            base = torch.no_grad()(lambda i: self.one_by_one(windows[i % len(windows)]))
        return self.case(torch.no_grad()(lambda i: self.head(windows[i % len(windows)], self.batch(i))), base,
                         floor=lambda: self.stages()[-1:], forwards=1)

    def one_by_one(self, window):
        """An LSTM that is stepped through the window."""
        head, memory = self.model.act_head, None
        with self.model.precision():
            for step in window.flatten(2).unbind(1):                                   # (B, n D)
                out, memory = head.rnn(step[:, None], memory)
            arm = head.actions["mlp"](out).tanh()                                      # (B, 1, K (A - 1))
            return torch.cat([arm[:, -1], head.gripper["mlp"](out)[:, -1]], 1)

    def loss(self, batch, i):
        with contextlib.nullcontext() if torch.is_grad_enabled() else self.frozen():
            return self.model.loss(batch)[0]

    def base_loss(self, batch, i):
        with mock.patch.object(common, "LARGE", 2**62):        # plain modules keep what they keep
            return self.base.loss(batch)

    @contextlib.contextmanager
    def frozen(self):
        """Without gradients the counter stumbles over a view of a weight that has one."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        yield
        for p in trained:
            p.requires_grad_(True)

    @torch.no_grad()
    def stages(self):
        """One control step in counted parts. (Without oneDNN, whose LSTM is one op that nobody counts.)

        The head's weights count as read once: how often an LSTM reads them is its kernel's affair.
        """
        model, batch, watched = self.model, self.batch(0), self.watched()
        with torch.backends.mkldnn.flags(enabled=False), model.precision(), self.frozen():
            pixels = robovlms.normalize_pixels(batch["images"].flatten(0, 2), *model.backbone.pixels)
            vision, _ = count(lambda: model.backbone.patches(pixels), watched, "vision tower")
            whole, z = count(lambda: self.state(batch), watched)
            states = torch.cat([*self.kept(0), z], 1)
            head, _ = count(lambda: self.head(states, batch), name="head over the window")
        head = head._replace(bytes=4 * sum(p.numel() for p in model.act_head.parameters()))
        rest = (w - v for w, v in zip(whole[1:4], vision[1:4]))
        return [vision, Stage("resampler and language model", *rest), head]

    def counts(self):
        with torch.backends.mkldnn.flags(enabled=False):
            yield from super().counts()
