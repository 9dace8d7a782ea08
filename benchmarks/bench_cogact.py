"""bench.py for CogACT: plain modules as one writes it from the paper, and our side."""
import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from bench import Bench, Stage, count
from torch import nn

import cogact
from common import keyed_generator, pick_stats


class PlainCogACT(nn.Module):
    """CogACT of transformers' towers and Llama, and torch's TransformerEncoderLayer as DiT block.

    All hidden states, the word head, a scheduler that looks its numbers up step by step.
    """

    def __init__(self, cfg, model):
        super().__init__()

        def sizes(tower):
            names = {"hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "heads"}
            return {"image_size": cfg.image_size, "patch_size": cfg.patch_size, "hidden_act": "gelu"} | {
                theirs: getattr(cfg, f"{tower}_{ours}") for theirs, ours in names.items()}
        self.cfg, self.llm, self.net = cfg, model.llm_backbone.llm, model.action_model.net
        self.projector, vits = model.projector.projector, model.vision_backbone.children()
        self.towers = nn.ModuleList([
            hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(
                num_register_tokens=cfg.registers, mlp_ratio=cfg.dino_mlp // cfg.dino_width,
                **sizes("dino"))),
            hf.SiglipVisionModel(hf.SiglipVisionConfig(
                vision_use_head=False, intermediate_size=cfg.siglip_mlp, **sizes("siglip")))])
        self.alphas = np.cumprod(1 - cogact.cosine_betas(cfg.num_train_steps))
        with torch.no_grad():
            for tower, vit in zip(self.towers, vits):
                self.fill(tower, vit)
            self.blocks = nn.ModuleList(map(self.encoder_layer, self.net.blocks))
        for module in self.towers.modules():                   # matrices cast once, if ours are
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(self.projector[0].weight.dtype)
        self.to(model.device)

    def fill(self, tower, vit):
        """Copy a tower's weights to where transformers keeps them (names differ between its versions)."""
        for name, p in tower.named_parameters():
            *path, module, leaf = name.split(".")
            numbers = [int(part) for part in path if part.isdecimal()]
            if numbers:                                        # query or q_proj, fc1, dense or o_proj ...
                block = vit.blocks[numbers[0]]
                if leaf == "lambda1":
                    value = getattr(block, f"ls{module[-1]}").gamma
                elif module[0] in "qkv":
                    value = getattr(block.attn.qkv, leaf).chunk(3)["qkv".index(module[0])]
                else:
                    ours = getattr(block, f"norm{module[-1]}") if "norm" in module else block.attn.proj
                    value = getattr(getattr(block.mlp, module, ours), leaf)
            elif "patch" in name:
                value = getattr(vit.patch_embed["proj"], leaf)
            elif "position" in name:                           # DINOv2: none for our class token
                value = F.pad(vit.pos_embed, (0, 0, p.numel() // p.shape[-1] - vit.pos_embed.shape[1], 0))
            elif "cls" in name or "register" in name:
                value = vit.cls_token if "cls" in name else vit.reg_token
            else:                                              # the last norm, the mask token: not read
                continue
            p.copy_(value.view_as(p))

    def encoder_layer(self, block):
        layer = nn.TransformerEncoderLayer(
            block.mlp.fc2.out_features, block.attn.heads, block.mlp.fc1.out_features, dropout=0.0,
            activation=functools.partial(F.gelu, approximate="tanh"), layer_norm_eps=1e-6, batch_first=True,
            norm_first=True)
        layer.linear1, layer.linear2, attn = block.mlp.fc1, block.mlp.fc2, layer.self_attn
        attn.in_proj_weight, attn.in_proj_bias = block.attn.qkv.weight, block.attn.qkv.bias
        attn.out_proj.load_state_dict(block.attn.proj.state_dict())
        for norm in (layer.norm1, layer.norm2):                # DiT's have no parameters
            norm.requires_grad_(False)
        return layer

    def forward(self, batch):
        """-> cognition feature (B, 1, D)."""
        images, ids, device = batch["images"], batch["ids"], batch["ids"].device       # (B, V, h, w, 3)
        pictures = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        seen, P = [], (self.cfg.image_size // self.cfg.patch_size) ** 2
        for tower, pixels in zip(self.towers, (cogact.DINO_PIXELS, cogact.SIGLIP_PIXELS)):
            mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in pixels)
            states = tower((pictures - mean) / std, output_hidden_states=True).hidden_states
            seen.append(states[-2][:, -P:])                                            # (B V, P, .)
        patches = self.projector(torch.cat(seen, 2)).unflatten(0, images.shape[:2]).flatten(1, 2)
        text = self.llm.get_input_embeddings()(ids)
        rows = torch.cat([text[:, :1], patches.to(text.dtype), text[:, 1:]], 1)        # (B, V P + L, D)
        last = patches.shape[1] + batch["length"] - 1
        mask = torch.arange(rows.shape[1], device=device) <= last[:, None]
        if rows.is_meta:                                       # there, padding cannot be looked for
            N = rows.shape[1]
            mask = torch.ones(len(rows), 1, N, N, dtype=torch.bool, device="meta").tril()
        else:
            mask = mask.long()
        out = self.llm(inputs_embeds=rows, attention_mask=mask, output_hidden_states=True)
        return out.hidden_states[-1][torch.arange(len(ids), device=device), last][:, None]

    def noise_of(self, x, t, z):
        """eps (B, T, A) of noisy chunks x at steps t (B,)."""
        net = self.net
        c = net.t_embedder.mlp(cogact.sinusoid(t, self.cfg.frequencies))[:, None] + net.z_embedder.linear(z)
        x = torch.cat([c, net.x_embedder.linear(x)], 1) + net.positional_embedding
        for block in self.blocks:
            x = block(x)
        return net.final_layer(x)[:, 1:]

    @torch.no_grad()
    def sample(self, z, x):
        """DDIM with guidance as the official sampler goes about it: numpy tables, look-ups in every step."""
        cfg, B = self.cfg, len(x)
        steps = cogact.ddim_timesteps(cfg.num_train_steps, cfg.sample_steps)
        guided, kept = cfg.cfg_scale > 1, self.alphas[steps]
        before = np.append(1.0, kept[:-1])
        both = torch.cat([z, self.net.z_embedder.uncondition.expand(B, 1, -1)]) if guided else z

        def look_up(values, k):
            index = torch.full((B,), k, device=x.device)
            return torch.from_numpy(values).to(x.device)[index].float()[:, None, None]
        for k in reversed(range(len(steps))):
            t = torch.full((len(both),), steps[k], device=x.device)
            eps = self.noise_of(torch.cat([x, x]) if guided else x, t, both)
            if guided:
                eps, free = eps.chunk(2)
                eps = free + cfg.cfg_scale * (eps - free)
            x0 = look_up(np.sqrt(1 / kept), k) * x - look_up(np.sqrt(1 / kept - 1), k) * eps
            eps = (look_up(np.sqrt(1 / kept), k) * x - x0) / look_up(np.sqrt(1 / kept - 1), k)
            x = x0 * look_up(np.sqrt(before), k) + look_up(np.sqrt(1 - before), k) * eps
        return x

    def loss(self, batch, noise, t, drop):
        R = self.cfg.repeated_diffusion_steps
        z = self(batch).repeat(R, 1, 1).float()
        z = torch.where(drop[:, None, None], self.net.z_embedder.uncondition, z)
        kept = torch.from_numpy(self.alphas).to(t.device)[t].float()[:, None, None]
        x = kept.sqrt() * batch["actions"].repeat(R, 1, 1) + (1 - kept).sqrt() * noise
        return F.mse_loss(self.noise_of(x, t, z).float(), noise)


class Method(Bench):
    """Variants: eager; jpeg, cold: see above; hf-compile: the baseline with its VLM compiled."""
    module, official, prompt, prompt_text = cogact, "base", 25, staticmethod(cogact.build_prompt)
    pixels = cogact.DINO_PIXELS, cogact.SIGLIP_PIXELS
    baseline, plain = "transformers-eager, DiT of nn.TransformerEncoderLayer", PlainCogACT

    def adapt(self, cfg):
        """The meta device knows no autocast."""
        return dataclasses.replace(cfg, compute="auto") if self.device.type == "meta" else cfg

    def cast(self, model):
        """As from_pretrained(dtype="bf16"): the VLM's matrices; norms, embeddings and DiT stay float32."""
        for name, module in model.named_modules() if self.device.type != "meta" else ():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith("action_model."):
                module.to(self.dtype)

    def itemsize(self, name):
        """Bytes per number of parameter `name` when acting."""
        return 4 if name.startswith("action_model.") else self.dtype.itemsize

    def tokens_in(self, batch):
        patches = (self.cfg.image_size // self.cfg.patch_size) ** 2
        return batch["ids"].shape[1] + batch["images"].shape[1] * patches

    def noise(self, i):
        shape = self.args.batch, self.cfg.horizon, self.cfg.action_dim
        return torch.randn(shape, generator=keyed_generator(i, 3)).to(self.device)

    @torch.no_grad()
    def denoise(self, z, i):
        how = self.cfg.sample_steps, self.cfg.cfg_scale, self.cfg.sampler
        return self.model.graphs(lambda z, noise: self.model.action_model.sample(z, noise, *how), z.float(),
                                 self.noise(i), key="denoise")

    @torch.no_grad()
    def run(self, batch, i):
        return self.model.decide(batch, self.noise(i))

    @torch.no_grad()
    def base_run(self, batch, i, model=None):
        with self.model.precision():
            z = (model or self.base)(batch)
        return self.base.sample(z.float(), self.noise(i))

    def act(self, observations, i):
        return self.model.act(observations, noise=self.noise(i))[0]

    def base_act(self, observations, i):
        samples = self.base_run(self.collate(observations), i).cpu().numpy()
        return cogact.decode_actions(samples, pick_stats(self.model.stats), self.cfg.gripper_index)[1]

    @torch.no_grad()
    def decode(self, variant):
        z = [self.model(batch).float() for batch in self.batches]
        return self.case(lambda i: self.denoise(z[i % len(z)], i),
                         lambda i: self.base.sample(z[i % len(z)], self.noise(i)),
                         floor=lambda: self.stages()[-1:], forwards=self.cfg.sample_steps)

    def draws(self, i):
        """noise (R B, T, A), steps (R B,), dropped conditions (R B,): the same for both sides."""
        cfg, g = self.cfg, keyed_generator(i, 4)
        n = cfg.repeated_diffusion_steps * self.args.batch
        drawn = (torch.randn(n, cfg.horizon, cfg.action_dim, generator=g), torch.randint(
            cfg.num_train_steps, (n,), generator=g), torch.rand(n, generator=g) < cfg.condition_dropout)
        return [x.to(self.device) for x in drawn]

    def loss(self, batch, i):
        return self.model.loss(batch, *self.draws(i))[0]

    def base_loss(self, batch, i):
        return self.base.loss(batch, *self.draws(i))

    @torch.no_grad()
    def stages(self):
        model, batch, watched = self.model, self.batch(0), self.watched()
        images = batch["images"].flatten(0, 1)
        with model.precision():
            vision, seen = count(lambda: model.vision_backbone(images), watched, "vision towers")
            projector, _ = count(lambda: model.projector(seen), watched, "projector")
        whole, z = count(lambda: model(batch), watched)
        head, _ = count(lambda: self.denoise(z, 0), watched, "DiT")
        rest = (w - v - p for w, v, p in zip(whole[1:4], vision[1:4], projector[1:4]))
        return [vision, projector, Stage("language model", *rest), head]

