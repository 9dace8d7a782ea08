"""bench.py for VLA-0: transformers and its generate(), and our decoding in all its ways."""
import dataclasses
import functools
import math
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from bench import DTYPES, Bench, count, now, per_layer
from torch import nn
from transformers.vision_utils import get_vision_position_ids

import eval_sim
import vla0
from common import keyed_rng, pick_stats


PASS = "pass counts: ops of one decoded layer, one new token per row"


class Rule(hf.LogitsProcessor):
    """The official rule, twelve tokens; with grammar those that keep a chunk well formed: in strings.

    Its first call tells when the prefill was over.
    """

    def __init__(self, cfg, symbol):
        self.cfg, self.symbol, self.begin = cfg, symbol, None

    def __call__(self, ids, scores):
        if self.begin is None:
            self.begin, self.prompt = now(ids.device), ids.shape[1]
        out = torch.full_like(scores, float("-inf"))
        for row, said in enumerate(ids[:, self.prompt:]):
            text = "".join(self.symbol.get(i, "") for i in said.tolist()) if self.cfg.grammar else ""
            legal = [i for i, s in self.symbol.items() if not self.cfg.grammar or self.follows(text, s)]
            out[row, legal] = scores[row, legal]
        return out

    def follows(self, text, symbol):
        number, done = text.rpartition(" ")[2], text.count(" ")
        if symbol.isdigit():
            return number != "0" and int(number + symbol) <= self.cfg.num_bins
        last = done + 1 == self.cfg.horizon * self.cfg.action_dim
        return bool(number) and last == (symbol == "")


class PlainVLA0(nn.Module):
    """VLA-0 of transformers' whole model, around the very modules of ours, and its generate()."""

    def __init__(self, cfg, model):
        super().__init__()
        about = hf.Qwen2_5_VLConfig(
            text_config=model.model.config.to_dict(), vision_config=model.visual.config.to_dict(),
            image_token_id=cfg.image_id, video_token_id=cfg.vocab - 1, tie_word_embeddings=True,
            vision_start_token_id=cfg.vision_start_id, vision_end_token_id=cfg.vision_end_id)
        about._attn_implementation = model.model.config._attn_implementation
        with torch.device("meta"):
            self.whole = hf.Qwen2_5_VLForConditionalGeneration(about).eval()
        self.whole.model.visual, self.whole.model.language_model = model.visual, model.model
        self.whole.lm_head.weight = model.model.embed_tokens.weight
        self.whole.generation_config = hf.GenerationConfig(eos_token_id=cfg.im_end_id,
                                                           pad_token_id=cfg.pad_id)
        self.symbol = dict(zip(cfg.legal, [*vla0.SYMBOLS, ""]))            # the end is no character

    def fed(self, batch, cfg):
        """What the processor of transformers would hand over."""
        ids, (pixels, grid) = batch["ids"], vla0.patchify(batch["images"].flatten(0, 1), cfg)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "image_grid_thw": grid.to(ids.device),
                "pixel_values": pixels.to(self.whole.model.visual.dtype),
                "mm_token_type_ids": (ids == cfg.image_id).int()}

    @torch.no_grad()
    def generate(self, fed, cfg, first=False, **how):
        """-> (texts, seconds since the prefill). first: stop when the first timestep's numbers stand."""
        rule = Rule(cfg, self.symbol)
        if first:
            how["stopping_criteria"] = [lambda ids, scores, **_: (
                ids[:, rule.prompt:] == cfg.space_id).sum(1) >= cfg.action_dim]
        ids = self.whole.generate(**fed, logits_processor=[rule], do_sample=False, use_cache=True,
                                  max_new_tokens=cfg.max_new_tokens,
                                  repetition_penalty=cfg.repetition_penalty, **how)
        seconds, said = now(ids.device) - rule.begin, ids[:, rule.prompt:].tolist()
        return ["".join(self.symbol.get(i, "") for i in row) for row in said], seconds

    def loss(self, batch, cfg):
        labels = torch.full_like(batch["ids"].flatten(), -100)
        labels[batch["rows"] + 1] = batch["targets"]
        return self.whole(**self.fed(batch, cfg), labels=labels.view_as(batch["ids"])).loss


class CountedWriter(vla0.Writer):
    """Remembers the width of every pass."""
    widths = ()

    def go(self, window):
        self.widths = [*self.widths, window]
        super().go(window)


class Method(Bench):
    """With --episodes: observations and drafts of real sessions, against our own decoding token by token."""
    module, official, prompt, pixels = vla0, "3b", 225, [vla0.PIXELS]
    baseline, plain = "transformers-generate-eager", PlainVLA0
    single = {"grammar": False, "draft": "none", "window": 1, "redraft": "align"}
    alone = {"draft": "none", "window": 0}
    how = {
        "eager": single,                                       # the official mask, token by token
        "grammar": alone,                                      # well-formed; a space is read with its number
        "spec:none": alone | {"window": 16, "redraft": "jacobi"},          # guesses from nothing
        "spec:prev": {"redraft": "align", "window": 0},        # a noisy chunk as draft, re-aligned when wrong
        "spec:jacobi": {"redraft": "jacobi", "window": 0},     # ... guessed anew (random weights: by nothing)
        "spec:narrow": {"redraft": "jacobi", "window": 8},     # ... in passes of 8 tokens
        "spec:oracle": {},                                     # the own output as draft: an upper bound
        "int8": alone | {"int8": True},                        # as grammar, with matrices of 8 bits
        "first-step": alone,                                   # until the first timestep's numbers stand
        "first-step:prev": {"redraft": "align"},               # ... with a noisy chunk as draft
        "hf-static": alone, "jpeg": alone, "cold": alone}      # the baseline with its static cache; see above
    variants = Bench.variants | {"infer": tuple(how), "decode": tuple(how)[:8]}
    cuda_only = {}
    closed_loop = ["eager", "grammar", "spec:prev", "spec:jacobi", "spec:narrow", "int8"]    # with --episodes

    def adapt(self, cfg):
        """First weights spread so wide that greedy texts vary (else one digit repeats for ever)."""
        return dataclasses.replace(cfg, llm_init=1.36 / math.sqrt(cfg.llm_width))

    def shake(self, model):
        super().shake(model)
        model.model.embed_tokens.weight[self.cfg.im_end_id] = 0    # never the best: no chunk ends early

    def real_grid(self, visual, args, kwargs):
        """On the meta device: transformers' tower reads its grid on the host, so here it is in numbers."""
        rows, columns = (side // self.cfg.patch_size for side in self.batch(0)["images"].shape[2:4])
        grid = torch.tensor([[1, rows, columns]] * (args[0].shape[0] // (rows * columns)))
        places = get_vision_position_ids(grid, self.cfg.merge_size)
        return args, {**kwargs, "grid_thw": grid, "position_ids": places.to("meta")}

    def cast(self, model):
        model.to(self.dtype)

    def itemsize(self, name):
        return self.dtype.itemsize

    def prompt_text(self, instruction):
        return vla0.build_prompt(instruction, self.cfg)

    def tokens_out(self):
        """Tokens of a chunk whose numbers are as long as they get but for num_bins itself, and the end."""
        return self.cfg.horizon * self.cfg.action_dim * len(str(self.cfg.num_bins))

    def changed(self, variant, **how):
        """The Config of a variant. With random weights the mask alone would never end a text."""
        cfg = dataclasses.replace(self.cfg, **{"grammar": True, **self.how[variant], **how})
        limit = cfg.horizon * cfg.action_dim * (cfg.digits + 1)
        return dataclasses.replace(cfg, max_new_tokens=limit if cfg.grammar or self.args.ckpt else
                                   self.tokens_out())

    # -- texts, and what they are drafted from

    @torch.no_grad()
    def writer(self, batch, cfg, drafts=None):
        """A Writer after its prefill."""
        rows = self.model.embed(batch)
        with self.model.reading(cfg.int8) as reader:
            return CountedWriter(cfg, reader, batch, rows, drafts or [None] * len(rows),
                                 graphs=self.model.graphs)

    @torch.no_grad()
    def finish(self, writer, first=False):
        """Write to the end; or until the first timestep's numbers stand: the last by the space behind it."""
        for _ in writer:
            if first and all(text.count(" ") >= self.cfg.action_dim for text in writer.texts()):
                break
        return writer.texts()

    def run(self, batch, i):
        return self.finish(self.writer(batch, self.changed("grammar")))

    def act(self, observations, i):
        return self.model.act(observations, grammar=True, draft="none", window=0)[0]

    def base_act(self, observations, i):
        cfg = self.changed("jpeg")
        texts, _ = self.base.generate(self.base.fed(self.collate(observations), cfg), cfg)
        low, high = vla0.bounds(pick_stats(self.model.stats))
        return vla0.parse_strict(texts, low, high, cfg.num_bins, cfg.horizon).astype(np.float32)

    @functools.cached_property
    def asked(self):
        """With --episodes: every observation that the model is asked about, with its draft."""
        asked, act, n = [], self.model.act, self.args.episodes
        self.model.act = lambda seen, *key, **how: asked.extend(seen) or act(seen, *key, **how)
        self.success = eval_sim.evaluate(self.model, vla0, episodes=n, batch=min(n, 64))["success"]
        return asked

    @functools.cached_property
    def batches(self):
        return [self.collate([o]) for o in self.asked] if self.args.episodes else super().batches

    def drafts(self, variant):
        """(a list of texts, or None, for every input; the same in words)."""
        top, n, drafts = self.cfg.num_bins, len(self.batches), []
        if self.how[variant].get("draft") == "none":
            return [None] * n, "none"
        if self.args.episodes:
            return [[o.get("draft")] for o in self.asked], "the previous chunk, shifted"
        own = [self.run(batch, i) for i, batch in enumerate(self.batches)]
        if variant == "spec:oracle":
            return own, "own output: an upper bound"
        for rng, texts in zip((keyed_rng(i, 5) for i in range(n)), own):
            noisy = [q + np.rint(rng.laplace(0, top / 200, len(q))).astype(int)
                     for q in (np.array(text.split(), int) for text in texts)]
            drafts.append([vla0.to_text(q.clip(0, top)) for q in noisy])
        return drafts, f"own output, laplace {top / 200:g} bins of {top}"

    # -- cases

    def infer(self, variant):
        return super().infer(variant) if variant in ("cold", "jpeg") else self.written(variant)

    def decode(self, variant):
        return self.written(variant)

    def written(self, variant):
        """Writing texts; of `decode`, only what comes after the prefill counts."""
        cfg, first = self.changed(variant), variant.startswith("first-step")
        (drafts, told), batches, repeats = self.drafts(variant), self.batches, self.what == "decode"
        finish = functools.partial(self.finish, first=first)
        fed = [] if self.args.episodes else [self.base.fed(batch, cfg) for batch in batches]

        def ours(i, cfg=cfg, drafts=drafts, finish=finish):
            writer = self.writer(self.batch(i), cfg, drafts[i % len(drafts)])
            begin, texts = now(self.device), finish(writer)
            return (texts, now(self.device) - begin) if repeats else texts

        def base(i, **how):
            out = self.base.generate(fed[i % len(fed)], cfg, first, **how)
            return out if repeats else out[0]
        about, same = {"tokens_in": self.tokens_in(batches[0])}, functools.partial(self.same, first=first)
        if not self.args.ckpt:
            about["weights"] = "random, row of the end token zero"
        if variant == "hf-static":
            return self.case(functools.partial(base, cache_implementation="static"), base, same, **about)
        writers, texts = [], []
        for batch, of in zip(batches, drafts):                 # one by one: they may share the graphs' memory
            writers.append(self.writer(batch, cfg, of))
            texts += self.finish(writers[-1], first)
            vars(writers[-1]).update({k: getattr(writers[-1], k).clone() for k in ("passes", "count")})
        passes, tokens = (torch.cat([getattr(w, k) for w in writers]).float().mean().item()
                          for k in ("passes", "count"))
        about |= {"draft": told, "forwards": round(passes, 2), "tokens_out": round(tokens, 1),
                  "detail": {"tokens_per_pass": round((tokens - 1) / passes, 2) if passes else None}}
        if self.args.episodes:
            wrong = [vla0.parse_safe(t, cfg.num_bins, cfg.horizon, cfg.action_dim)[1] for t in texts]
            about["detail"] |= {"chunks": len(texts), "malformed": sum(map(bool, wrong)),
                                "success": self.success}
            base = functools.partial(ours, cfg=self.changed(variant, draft="none", window=1, int8=False),
                                     drafts=[None])
            about["baseline"] = "ours, token by token"
        if cfg.int8:                                           # approximate: how far off is told instead
            return self.case(ours, base, self.off, repeats=repeats, **about)
        return self.case(ours, base, same, lambda: self.floor(cfg, writers), repeats, **about)

    def off(self, ours, base, i):
        """How far the integers of approximate texts are off, of all inputs up to i."""
        q, p = (np.array([[int(x) for x in text.split()] for text in texts]) for texts in (ours, base))
        self.gaps = [*(self.gaps if i else []), *np.abs(q - p)]
        equal = sum(not gap.any() for gap in self.gaps)
        return True, (f"{equal} of {len(self.gaps)} texts equal, integers off by {np.mean(self.gaps):.2f} of "
                      f"{self.cfg.num_bins}, at most {np.max(self.gaps)}")

    def same(self, ours, base, i, first=False):
        """Are the texts equal? A near tie of two logits may fall otherwise, by rounding; how near is told."""
        near = 1e-4 if self.dtype == torch.float32 else 1e-1
        if first:                                              # one side may have written more
            D = self.cfg.action_dim
            ours, base = ([" ".join(t.split(" ")[:D]) for t in texts] for texts in (ours, base))
        gaps = [self.gap({k: v[row:row + 1] for k, v in self.batch(i).items()}, a, b)
                for row, (a, b) in enumerate(zip(ours, base)) if a != b]
        return max(gaps, default=0) <= near, "texts equal" if not gaps else (
            f"{len(gaps)} of {len(ours)} texts differ where logits are {max(gaps):.1e} apart, "
            f"bound {near:.0e}")

    @torch.no_grad()
    def gap(self, batch, a, b):
        """How far apart the logits are where texts a and b of a batch of one first differ."""
        cfg, at = self.cfg, len(os.path.commonprefix([a, b]))
        spoken = torch.tensor([vla0.answer_ids(a[:at], cfg)], dtype=torch.long, device=self.device)
        places = (batch["length"] + batch["delta"] + torch.arange(at, device=self.device)).expand(1, 3, -1)
        longer = batch | {"ids": torch.cat([batch["ids"], spoken], 1),
                          "positions": torch.cat([batch["positions"], places], 2)}
        logits = F.linear(self.model(longer)[0, -1], self.model.model.embed_tokens.weight).float()
        said, p = longer["ids"][0].unique(), cfg.repetition_penalty
        logits[said] = torch.where(logits[said] > 0, logits[said] / p, logits[said] * p)
        x, y = ((vla0.answer_ids(text[at:at + 1], cfg) or [cfg.im_end_id])[0] for text in (a, b))
        return (logits[x] - logits[y]).abs().item()

    def loss(self, batch, i):
        return self.model.loss(batch)[0]

    def base_loss(self, batch, i):
        if self.device.type != "meta":
            return self.base.loss(batch, self.cfg)
        whole, labels = self.base.whole, torch.empty_like(batch["ids"])
        hook = self.model.visual.register_forward_pre_hook(self.real_grid, with_kwargs=True)
        with mock.patch.object(self.model, "attn", "as transformers"):
            rows = self.model.embed(batch)
        hook.remove()
        hidden = whole.model.language_model(inputs_embeds=rows, use_cache=False,
                                            position_ids=batch["positions"].transpose(0, 1)).last_hidden_state
        return whole.loss_function(whole.lm_head(hidden), labels, self.cfg.vocab)

    # -- counts

    @torch.no_grad()
    def stages(self, widths=None, cfg=None):
        """widths: of the passes after the prefill; None: a whole chunk, token by token."""
        cfg, batch = cfg or self.changed("eager"), self.batch(0)
        widths = [1] * (self.tokens_out() - 1) if widths is None else widths
        cfg = dataclasses.replace(cfg, window=max(widths, default=1))         # room for the widest pass
        vision, rows = count(lambda: self.model.embed(batch), self.watched(), "vision tower")
        with self.model.reading() as reader:                   # it fuses weights: these are read
            fused, none = [(t, t.itemsize) for layer in reader.layers for t in layer], [None] * len(rows)
            prefill, writer = count(lambda: vla0.Writer(cfg, reader, batch, rows, none), fused, "prefill")
            fused.append((writer.cache, writer.cache.itemsize))
            passes = [count(lambda: writer.read(w), fused, f"pass of {w}", widths.count(w))[0]
                      for w in sorted(set(widths))]
        return [vision, prefill, *passes]

    def floor(self, cfg, writers):
        """Stages with the widths that passes really had (the host looks late), a mean over the inputs."""
        widths = [w for writer in writers for w in writer.widths[:int(writer.passes.max())]]
        vision, prefill, *passes = self.stages(widths, cfg)
        passes = [s._replace(times=s.times / len(writers)) for s in passes]
        return passes if self.what == "decode" else [vision, prefill, *passes]

    def counts(self):
        """Also the ops of one decoded layer, ours and transformers' with its dynamic cache; in both types."""
        yield from super().counts()
        found = {}
        for dtype in DTYPES:
            other = type(self)(SimpleNamespace(**{**vars(self.args), "dtype": dtype}), "count")
            text, cache, batch = other.model.model, hf.DynamicCache(), other.batch(0)
            writer, place = other.writer(batch, other.changed("eager")), batch["length"][:, None]
            new = torch.zeros(1, 8, self.cfg.llm_width, dtype=other.dtype, device=self.device)

            def theirs(n):
                at = torch.zeros(3, 1, n, dtype=torch.long, device=self.device)
                return text(inputs_embeds=new[:, :n], position_ids=at, use_cache=True, past_key_values=cache)
            with torch.no_grad(), other.model.reading() as reader:
                x = reader.embedding[reader.legal[:1]].expand(len(place), 1, -1)                # (B, 1, D)
                theirs(8)
                found[dtype] = {
                    "ops_per_layer": per_layer(
                        reader, lambda: reader(x, place.expand(3, -1, 1), place, writer.cache)),
                    "head_rows": reader.logits(x).shape[-1],
                    "ops_per_pass": count(lambda: writer.read(1))[0].ops,
                    "transformers_ops_per_layer": per_layer(text, lambda: theirs(1))}
        yield "pass", {"ops": found[self.args.dtype]["ops_per_layer"], "detail": found,
                       "note": PASS}

