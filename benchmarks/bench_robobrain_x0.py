"""bench.py for RoboBrain-X0: transformers and its generate(), and our decoding in its ways."""
import dataclasses
import functools

import bench_vla0
import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from bench import HIGH, LOW, STATS, count, now, per_layer
from transformers.vision_utils import get_vision_position_ids

import robobrain_x0 as x0


class BenchWords(x0.Words):
    """Callable as a tokenizer of text."""

    def __call__(self, text):
        return self.text(text)


class Rule(hf.LogitsProcessor):
    """Codes of one whole chunk, or <EOA>, then the end. grammar None: anything but the end.

    Its first call tells when the prefill was over.
    """

    def __init__(self, cfg, grammar):
        self.cfg, self.grammar, self.begin = cfg, grammar, None

    def __call__(self, ids, scores):
        cfg, g = self.cfg, self.grammar
        if self.begin is None:
            self.begin, self.prompt = now(ids.device), ids.shape[1]
        ok = torch.zeros_like(scores, dtype=torch.bool)
        for row, said in zip(ok, ids[:, self.prompt:].tolist()):
            codes = [i - cfg.action_id for i in said if i != cfg.eoa_id]
            if g is None or said[-1:] == [cfg.eoa_id] or cfg.im_end_id in said:
                row[cfg.im_end_id], row[:] = True, g is None or row
                continue
            units, last = int(g.count[codes].sum()), int(g.after[codes[-1]]) if codes else 0
            row[cfg.action_id:cfg.action_id + cfg.codes] = (
                g.table[last + g.slot[min(units, g.size)]] & (g.count <= g.size - units)).to(row.device)
            row[cfg.eoa_id], row[cfg.im_end_id] = not said, units >= g.least and last == 0
        return scores.masked_fill(~ok, float("-inf"))


class PlainX0(bench_vla0.PlainVLA0):
    """RoboBrain-X0 of transformers' whole model, around the very modules of ours, and its generate()."""

    def fed(self, batch, cfg):
        ids, pixels = batch["ids"], x0.to_pixels(batch["patches"], cfg)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "image_grid_thw": batch["grid"].to(ids.device),
                "pixel_values": pixels.to(self.whole.model.visual.dtype),
                "mm_token_type_ids": (ids == cfg.image_id).int()}

    @torch.no_grad()
    def generate(self, fed, cfg, grammar):
        """-> (ids of each row, up to the end; seconds since the prefill)."""
        rule, least = Rule(cfg, grammar), cfg.max_new_tokens if grammar is None else None
        ids = self.whole.generate(**fed, logits_processor=[rule], do_sample=False, use_cache=True,
                                  min_new_tokens=least, max_new_tokens=cfg.max_new_tokens)
        seconds, end = now(ids.device) - rule.begin, cfg.im_end_id
        rows = ids[:, rule.prompt:].tolist()
        return [row[:row.index(end) + 1] if end in row else row for row in rows], seconds


class CountedWriter(x0.Writer):
    """Remembers the width of every pass."""
    widths = ()

    def go(self, window):
        self.widths = [*self.widths, window]
        super().go(window)


class Method(bench_vla0.Method):
    """n tokens: 100 at official size, else 24 (eager); constrained answers are as long as they get."""
    module, official, prompt, pixels, plain = x0, "3b", 500, [x0.PIXELS], PlainX0
    how = {"eager": (False, False),                            # (constrained?, own answer as draft?)
           "constrained": (True, False), "spec:oracle": (True, True),
           "int8": (True, False),                              # as constrained, with matrices of 8 bits
           "jpeg": (True, False), "cold": (False, False)}
    variants = bench_vla0.Bench.variants | {"infer": tuple(how), "decode": tuple(how)[:4]}
    cuda_only, closed_loop = {}, None

    def adapt(self, cfg):
        """As for VLA-0; nothing is downloaded; actions without words; a prompt of exactly 500 tokens."""
        about = {"prompt": "{images}robot {robot} task: {task}"} if self.args.size == "official" else {}
        return dataclasses.replace(super().adapt(cfg), fast="fit", subtask=False, max_new_tokens=768, **about)

    @functools.cached_property
    def model(self):
        """With a body's statistics: the official prompt speaks of two arms."""
        model, arms = super().model, x0.ROBOTS[self.cfg.robot].arms
        words = getattr(model.tokenizer, "text", model.tokenizer)
        model.tokenizer = BenchWords(words, x0.load_actions(self.cfg))
        if not self.args.ckpt:
            model.stats = {name: {"action": {k: list(v) * arms for k, v in stats["action"].items()}}
                           for name, stats in STATS.items()}
        return model

    def real_grid(self, visual, args, kwargs):
        rows, columns = self.batch_grid
        grid = torch.tensor([[1, rows, columns]] * (len(args[0]) // (rows * columns)))
        places = get_vision_position_ids(grid, self.cfg.merge_size)
        return args, {**kwargs, "grid_thw": grid, "position_ids": places.to("meta")}

    @functools.cached_property
    def batch_grid(self):
        """Patches of a picture: rows, columns."""
        cfg, side = self.cfg, (self.cfg.image_size,) * 2 if self.cfg.image_size else (240, 320)
        h, w = x0.smart_resize(*side, cfg.patch_size * cfg.merge_size, cfg.min_pixels, cfg.max_pixels)
        return h // cfg.patch_size, w // cfg.patch_size

    def prompt_text(self, instruction):
        return x0.human_turn({"instruction": instruction}, self.cfg, False, False)

    def sample(self, i):
        """Of all arms (but the loader has statistics of one); smooth: about 120 ids at official size."""
        sample, low, high = super().sample(i), np.array(LOW), np.array(HIGH)
        wave = np.sin(np.arange(self.cfg.horizon)[:, None] / 10 + np.arange(len(LOW)) + i)     # (T, A)
        smooth = (low + high) / 2 + (high - low) * np.where(np.arange(len(LOW)) < 6, 0.2 * wave, wave > 0)
        sample["actions"] = smooth.clip(low, high).astype(np.float32)
        arms = 1 if self.what == "loader" else x0.ROBOTS[self.cfg.robot].arms
        return sample | {"actions": np.tile(sample["actions"], arms)}

    def collate(self, samples):
        stats = self.model.stats
        rows = [x0.prepare(s, self.cfg, self.model.tokenizer, stats) for s in samples]
        return {k: v if k == "grid" else v.to(self.device) for k, v in x0.collate(rows, self.cfg).items()}

    def tokens_out(self):
        return 100 if self.args.size == "official" else 24

    def changed(self, variant):
        arms = x0.ROBOTS[self.cfg.robot].arms
        limit = {} if self.how[variant][0] else {"max_new_tokens": self.tokens_out()}
        return dataclasses.replace(self.cfg, action_dim=7 * arms, int8=variant == "int8", **limit)

    # -- answers

    def grammar(self, cfg, variant):
        actions = self.model.tokenizer.actions
        return actions.grammar(cfg.horizon, cfg.action_dim) if self.how[variant][0] else None

    @torch.no_grad()
    def writer(self, batch, variant, drafts=None):
        """A Writer after its prefill."""
        cfg, rows = self.changed(variant), self.model.embed(batch)
        mode, grammar = "actions" if self.how[variant][0] else "free", self.grammar(cfg, variant)
        with self.model.reading(cfg.int8) as reader:
            return CountedWriter(cfg, reader, batch, rows, mode, grammar, drafts or [None] * len(rows),
                                 graphs=self.model.graphs)

    @torch.no_grad()
    def finish(self, writer):
        return writer.run().answers()

    def run(self, batch, i):
        return self.finish(self.writer(batch, "constrained"))

    def act(self, observations, i):
        return self.model.act(observations, draft="none")[0]

    def base_act(self, observations, i):
        cfg = self.changed("jpeg")
        answers, _ = self.base.generate(self.base.fed(self.collate(observations), cfg), cfg,
                                        self.grammar(cfg, "jpeg"))
        chunks = np.stack([self.chunk(a) for a in answers])
        return x0.denormalize(chunks, self.model.stats["synthetic"]["action"]).astype(np.float32)

    def written(self, variant):
        """Writing answers; of `decode`, only what comes after the prefill counts."""
        cfg, batches, repeats = self.changed(variant), self.batches, self.what == "decode"
        fed, grammar, drafts = [self.base.fed(b, cfg) for b in batches], self.grammar(cfg, variant), [None]
        if self.how[variant][1]:
            drafts = [self.run(batch, i) for i, batch in enumerate(batches)]

        def ours(i):
            writer = self.writer(self.batch(i), variant, drafts[i % len(drafts)])
            begin, answers = now(self.device), self.finish(writer)
            return (answers, now(self.device) - begin) if repeats else answers

        def base(i):
            out = self.base.generate(fed[i % len(fed)], cfg, grammar)
            return out if repeats else out[0]
        writers = []
        for i, batch in enumerate(batches):                    # one by one: they may share the graphs' memory
            writers.append(self.writer(batch, variant, drafts[i % len(drafts)]))
            self.finish(writers[-1])
            vars(writers[-1]).update({k: getattr(writers[-1], k).clone() for k in ("passes", "count")})
        passes, tokens = (torch.cat([getattr(w, k) for w in writers]).float().mean().item()
                          for k in ("passes", "count"))
        told = "own output: an upper bound" if self.how[variant][1] else "none"
        about = {"tokens_in": self.tokens_in(batches[0]), "forwards": round(passes, 2), "draft": told,
                 "tokens_out": round(tokens, 1),
                 "detail": {"tokens_per_pass": round((tokens - 1) / passes, 2)}}
        if not self.args.ckpt:
            about["weights"] = "random, row of the end token zero"
        if cfg.int8:                                           # approximate: how far off is told instead
            return self.case(ours, base, self.off, repeats=repeats, **about)
        return self.case(ours, base, self.same, lambda: self.floor(variant, writers), repeats, **about)

    def off(self, ours, base, i):
        """How far the chunks of approximate answers are off, of all inputs up to i."""
        a, b = (np.stack([self.chunk(ids) for ids in answers]) for answers in (ours, base))
        self.gaps = [*(self.gaps if i else []), *np.abs(a - b)]
        equal = sum(not gap.any() for gap in self.gaps)
        return True, (f"{equal} of {len(self.gaps)} chunks equal, off by {np.mean(self.gaps):.3f}, at most "
                      f"{np.max(self.gaps):.2f}, of -1 .. 1")

    def chunk(self, answer):
        """Ids of a constrained answer -> its first chunk (T, A), normalized."""
        cfg = self.changed("int8")
        codes = x0.parse_answer(answer, cfg, False, str)[1][0]
        return self.model.tokenizer.actions.decode(codes, cfg.horizon, cfg.action_dim)[0]

    def same(self, ours, base, i):
        """Are the ids equal? A near tie of two logits may fall otherwise, by rounding; how near is told."""
        near = 1e-4 if self.dtype == torch.float32 else 1e-1
        gaps = [self.gap({k: v[row:row + 1] for k, v in self.batch(i).items() if k not in ("patches", "grid")}
                         | self.pictures(i, row, len(ours)), a, b)
                for row, (a, b) in enumerate(zip(ours, base)) if a != b]
        return max(gaps, default=0) <= near, "ids equal" if not gaps else (
            f"{len(gaps)} of {len(ours)} answers differ where logits are {max(gaps):.1e} apart, "
            f"bound {near:.0e}")

    def pictures(self, i, row, n):
        return {k: self.batch(i)[k].chunk(n)[row] for k in ("patches", "grid")}

    @torch.no_grad()
    def gap(self, batch, a, b):
        """How far apart the logits are where answers a and b of a batch of one first differ."""
        at = next((j for j, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)) - 1)
        spoken = torch.tensor([a[:at]], dtype=torch.long, device=self.device)
        places = (batch["length"] + batch["delta"] + torch.arange(at, device=self.device)).expand(1, 3, -1)
        longer = batch | {"ids": torch.cat([batch["ids"], spoken], 1),
                          "positions": torch.cat([batch["positions"], places], 2)}
        logits = F.linear(self.model(longer)[0, -1], self.model.model.embed_tokens.weight).float()
        return (logits[a[at]] - logits[b[at]]).abs().item()

    # -- counts

    @torch.no_grad()
    def stages(self, widths=None, variant="eager"):
        """widths: of the passes after the prefill; None: tokens_out() of them, one by one."""
        batch, widths = self.batch(0), [1] * (self.tokens_out() - 1) if widths is None else widths
        vision, rows = count(lambda: self.model.embed(batch), self.watched(), "vision tower")
        cfg = dataclasses.replace(self.changed(variant), window=max(widths, default=1))
        with self.model.reading() as reader:                   # it fuses weights: these are read
            fused = [(t, t.itemsize) for layer in reader.layers for t in layer]
            drafts = [[0]] * len(rows) if max(widths, default=1) > 1 else [None] * len(rows)
            prefill, writer = count(lambda: x0.Writer(cfg, reader, batch, rows, "free", None, drafts), fused,
                                    "prefill")
            fused.append((writer.cache, writer.cache.itemsize))
            passes = [count(lambda: writer.read(w), fused, f"pass of {w}", widths.count(w))[0]
                      for w in sorted(set(widths))]
        return [vision, prefill, *passes]

    def counts(self):
        """Also the ops of one decoded layer."""
        yield from bench_vla0.Bench.counts(self)
        place = self.batch(0)["length"][:, None]
        with torch.no_grad(), self.model.reading() as reader:
            cache, x = self.writer(self.batch(0), "eager").cache, reader.embedding[None, :1]
            x = x.expand(len(place), 1, -1)                                                # (B, 1, D)
            ops = per_layer(reader, lambda: reader(x, place.expand(3, -1, 1), place, cache))
        yield "pass", {"ops": ops, "note": bench_vla0.PASS}

    def floor(self, variant, writers):
        """Stages with the widths that passes really had (the host looks late), a mean over the inputs."""
        widths = [w for writer in writers for w in writer.widths[:int(writer.passes.max())]]
        vision, prefill, *passes = self.stages(widths, variant)
        passes = [s._replace(times=s.times / len(writers)) for s in passes]
        return passes if self.what == "decode" else [vision, prefill, *passes]
