"""bench.py for A0: SigLIP of transformers and a loop that computes everything anew, and our side."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from bench import Bench, Stage, ceilings, count, priced
from torch import nn

import a0
from common import keyed_generator, keyed_rng


class PlainA0(nn.Module):
    """A0 as the official loop goes about it: both frames are encoded, the condition's keys and values are
    computed in every step, and a scheduler looks its numbers up step by step. Texts are given."""

    def __init__(self, cfg, model):
        super().__init__()
        self.cfg, self.net, self.points = cfg, model.model, model.state_adaptor
        self.lang, self.img = model.lang_adaptor, model.img_adaptor
        self.siglip = [model.encoder(model.siglip, hf.SiglipVisionModel, cfg.vision)]  # frozen: not a part
        self.kept = torch.cumprod(1 - torch.from_numpy(a0.cosine_betas(cfg.num_train_steps)).float(), 0)

    @torch.no_grad()
    def see(self, images):
        """uint8 (B, F, h, w, 3) -> current - reference, current (B, F P, D)."""
        pixels, (siglip,) = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1, self.siglip
        seen = siglip(pixels.to(siglip.dtype)).last_hidden_state.unflatten(0, images.shape[:2])
        return torch.cat([seen[:, 1] - seen[:, 0], seen[:, 1]], 1)

    def norm(self, module, x):
        return (x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6) * module.weight).to(x.dtype)

    def attend(self, module, q, k, v, mask=None):
        """q, k, v (B, ., D) -> (B, L, D), queries and keys normalized per head."""
        q, k, v = (x.unflatten(2, (module.heads, -1)).transpose(1, 2) for x in (q, k, v))
        q, k = self.norm(module.q_norm, q), self.norm(module.k_norm, k)
        return module.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def adapt(self, text, mask, pictures):
        dtype = self.net.x_pos_embed.dtype
        return self.lang(text.to(dtype)), mask[:, None, None], self.img(pictures.to(dtype))

    def forward(self, x, t, lang, mask, img):
        """Noisy points (B, T, 2) at step t (B,) -> clean points (B, T, 2)."""
        net, dtype = self.net, self.net.x_pos_embed.dtype
        lang, img = lang + net.lang_cond_pos_embed[:, :lang.shape[1]], img + net.img_cond_pos_embed
        t = net.t_embedder["mlp"](a0.sinusoid(t, 256).to(dtype))[:, None]
        x = torch.cat([t, self.points(x.to(dtype))], 1) + net.x_pos_embed
        for i, block in enumerate(net.blocks):
            c, look = (lang, mask) if i % 2 == 0 else (img, None)
            x = x + self.attend(block.attn, *block.attn.qkv(self.norm(block.norm1, x)).chunk(3, -1))
            q = block.cross_attn.q(self.norm(block.norm2, x))
            x = x + self.attend(block.cross_attn, q, *block.cross_attn.kv(c).chunk(2, -1), look)
            x = x + block.ffn(self.norm(block.norm3, x))
        return net.final_layer.ffn_final(self.norm(net.final_layer.norm_final, x))[:, 1:].float()

    @torch.no_grad()
    def sample(self, x, text, mask, pictures, model=None):
        """DPM-Solver++(2M), its numbers from a table of 1,000 in every step."""
        n, m, conditions = self.cfg.sample_steps, None, self.adapt(text, mask, pictures)
        steps = np.linspace(0, self.cfg.num_train_steps - 1, n + 1).round().astype(int)[::-1].tolist()

        def look_up(i):
            """alpha, sigma, log(alpha / sigma) after i steps."""
            s = ((1 - self.kept[steps[i]]) / self.kept[steps[i]]).sqrt() if i < n else torch.zeros(())
            alpha = 1 / (s ** 2 + 1).sqrt()
            return alpha, s * alpha, alpha.log() - (s * alpha).log()
        for i in range(n):
            (_, s, lam), (alpha, s_next, lam_next), before = look_up(i), look_up(i + 1), m
            t = torch.full((len(x),), steps[i], device=x.device)
            m, h = (model or self)(x, t, *conditions), lam_next - lam
            d = (m - before) * (h / (lam - look_up(i - 1)[2])) / 2 if 0 < i < n - 1 else 0
            x = s_next / s * x - alpha * ((-h).exp() - 1) * (m + d)
        return x

    def loss(self, batch, text, mask, noise, t):
        x, kept = batch["waypoints"], self.kept.to(t.device)[t][:, None, None]
        noised = kept.sqrt() * x + (1 - kept).sqrt() * noise
        return 0.2 * F.mse_loss(self(noised, t, *self.adapt(text, mask, self.see(batch["images"]))), x)


class Words(nn.Module):
    """Stands for Qwen2.5-7B: a text is encoded once and kept, whatever that costs."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, ids, use_cache=False):
        return SimpleNamespace(last_hidden_state=torch.randn(*ids.shape, self.width, device=ids.device))


class Method(Bench):
    """Texts are encoded before. Variants: eager; kept: the reference frame is the last call's current one,
    and its features are kept; jpeg, cold: see above; hf-compile: the baseline with its denoiser compiled."""
    module, official, prompt, prompt_text = a0, "1b", 20, staticmethod(str)
    pixels = (((0.5,) * 3, (0.5,) * 3),)
    baseline, plain = "transformers' SigLIP, a loop that keeps nothing", PlainA0
    variants = Bench.variants | {"infer": ("eager", "kept", "jpeg", "cold", "hf-compile")}

    def adapt(self, cfg):
        """The meta device knows no autocast."""
        return dataclasses.replace(cfg, compute="auto") if self.device.type == "meta" else cfg

    def shake(self, model):
        """And encoders of random weights, where the preset's would be downloaded."""
        super().shake(model)
        if model.siglip is None:
            with torch.device(self.device):
                vision = hf.SiglipVisionModel(hf.SiglipVisionConfig(
                    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                    image_size=384, patch_size=14, vision_use_head=False, attn_implementation="sdpa"))
            model.loaded[hf.SiglipVisionModel] = vision.to(self.dtype).requires_grad_(False)
        if model.qwen is None:
            model.loaded[hf.Qwen2Model] = Words(self.cfg.qwen_width)

    def cast(self, model):
        """As from_pretrained(dtype="bf16"): all of it."""
        model.to(self.dtype)

    def itemsize(self, name):
        """Bytes per number of any parameter when acting."""
        return self.dtype.itemsize

    def watched(self):
        encoders = [p for encoder in self.model.loaded.values() for p in encoder.parameters()]
        return super().watched() + [(p, self.dtype.itemsize) for p in encoders]

    def picture(self, i):
        squares = keyed_rng(i, 1).integers(0, 256, (8, 8, 3), np.uint8)
        return np.kron(squares, np.ones((32, 32, 1), np.uint8))

    def observation(self, i, instruction=None):
        view, = self.cfg.views
        return {"images": {view: self.picture(2 * i)}, "instruction": instruction or self.instruction,
                "history_images": {view: self.picture(2 * i + 1)[None]}}

    def sample(self, i):
        return super().sample(i) | {"waypoints": keyed_rng(i, 2).random((self.cfg.horizon, 2), np.float32)}

    def collate(self, samples):
        """Ids stay on the CPU, where kept texts are looked up; these are encoded now."""
        batch = super().collate(samples)
        rows = [self.module.prepare(s, self.cfg, self.model.tokenizer) for s in samples]
        batch |= {k: v for k, v in self.module.collate(rows, self.cfg).items() if k in ("ids", "mask")}
        if self.device.type == "meta":                         # there, transformers' Qwen2 does not run
            texts, width = (tuple(row["ids"].tolist()) for row in rows), self.cfg.qwen_width
            self.model.texts |= {text: torch.empty(len(text), width, device="meta") for text in texts}
        self.model.read(batch["ids"], batch["mask"])
        return batch

    def tokens_in(self, batch):
        return batch["ids"].shape[1] + self.cfg.history * self.cfg.patches

    def noise(self, i):
        shape = self.args.batch, self.cfg.horizon, self.cfg.action_dim
        return torch.randn(shape, generator=keyed_generator(i, 3)).to(self.device)

    def text(self, batch):
        return self.model.read(batch["ids"], batch["mask"]), batch["mask"].to(self.device)

    @torch.no_grad()
    def run(self, batch, i, keep=False):
        return self.model.sample(self.model(batch, keep), self.noise(i))

    @torch.no_grad()
    def base_run(self, batch, i, model=None):
        with self.model.precision():
            return self.base.sample(self.noise(i), *self.text(batch), self.base.see(batch["images"]), model)

    def act(self, observations, i):
        return self.model.act(observations, noise=self.noise(i))[0]

    def base_act(self, observations, i):
        return self.base_run(self.collate(observations), i).cpu().numpy()

    def infer(self, variant):
        if variant != "kept":
            return super().infer(variant)
        now = [batch["images"][:, 1] for batch in self.batches]                        # each (B, h, w, 3)
        two = [torch.stack([now[i - 1], now[i]], 1) for i in range(len(now))]
        host = [images.cpu() for images in two]                # as in act: what is kept is found by value

        def ours(i):
            return self.run(self.batch(i) | {"images": host[i % len(host)]}, i, keep=True)
        return self.case(ours, lambda i: self.base_run(self.batch(i) | {"images": two[i % len(two)]}, i),
                         floor=lambda: self.stages(frames=1), tokens_in=self.tokens_in(self.batch(0)))

    @torch.no_grad()
    def decode(self, variant):
        features = [self.model(batch) for batch in self.batches]

        def base(i):
            text, mask, pictures = features[i % len(features)]
            with self.model.precision():
                return self.base.sample(self.noise(i), text, mask, pictures)
        ours = torch.no_grad()(lambda i: self.model.sample(features[i % len(features)], self.noise(i)))
        return self.case(ours, base, floor=lambda: self.stages()[1:], forwards=self.cfg.sample_steps)

    def draws(self, i):
        """noise (B, T, 2), steps (B,): the same for both sides."""
        g, B = keyed_generator(i, 4), self.args.batch
        drawn = (torch.randn(B, self.cfg.horizon, self.cfg.action_dim, generator=g),
                 torch.randint(self.cfg.num_train_steps, (B,), generator=g))
        return [x.to(self.device) for x in drawn]

    def loss(self, batch, i):
        return self.model.loss(batch, *self.draws(i))[0]

    def base_loss(self, batch, i):
        return self.base.loss(batch, *self.text(batch), *self.draws(i))

    # -- counts

    @torch.no_grad()
    def frozen_flops(self, batch):
        return count(lambda: self.model.see(batch["images"].flatten(0, 1)))[0].flops

    @torch.no_grad()
    def stages(self, frames=2):
        """frames: how many of the two are encoded (1: the reference's features are kept)."""
        model, batch, watched = self.model, self.batch(0), self.watched()
        images, steps = batch["images"][:, -frames:].flatten(0, 1), self.cfg.sample_steps
        t = torch.tensor(a0.sampler_table(self.cfg.num_train_steps, steps)[0][:1], device=self.device)
        with model.precision():
            vision, _ = count(lambda: model.see(images), watched, "SigLIP")
            features, kept = model(batch), [{} for _ in model.model.blocks]
            adaptors, conditions = count(lambda: model.adapt(features), watched, "adaptors")

            def step():
                return model.denoise(self.noise(0), t, conditions, kept)
            first, _ = count(step, watched)                    # fills `kept`
            again, _ = count(step, watched)
            rest = (x - y for x, y in zip(first[1:4], again[1:4]))
            watched += [(t, t.itemsize) for block in kept for t in block["seen"][:2]]
            return [vision, adaptors, Stage("keys and values", *rest),
                    count(step, watched, "denoising", steps)[0]]

    def counts(self):
        """Also inference with the reference's features kept, and the baseline's."""
        yield from super().counts()
        peaks = ceilings(self.device, self.dtype)
        stages = self.stages(frames=1)
        yield "inference, kept", priced(stages, peaks) | {"detail": {s.name: s._asdict() for s in stages}}
        plain, _ = count(lambda: self.base_run(self.batch(0), 0), self.watched(), "baseline")
        yield "inference, baseline", {"flops": plain.flops, "bytes": plain.bytes, "ops": plain.ops,
                                      "baseline": self.baseline}
