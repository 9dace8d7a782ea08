"""
What matters in building a policy? The matrix of RoboVLMs, checked and compared.

    python examples/robovlms_matrix.py cells                         # README's table: which cells work
    python examples/robovlms_matrix.py compare --out runs/compare    # formulations and heads of one backbone

cells: tiny models of random weights; 20 steps on one batch of two samples, the loss before and after; then
each acts, is saved, loaded, and acts alike. A cell that fails ends the command.
compare: the same tabletop data, steps and seeds for each cell, one training after the other by train.py's
defaults, a chunk asked for at every step, success with a 95 % interval. What is in --out is not done again.
"""
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import robovlms  # noqa: E402
from common import Parser, choose, cli, read_json, within  # noqa: E402
from robovlms import ADAPTERS, CELLS, PRESETS  # noqa: E402

LOW, HIGH = [-0.1] * 6 + [0.0], [0.1] * 6 + [1.0]
STATS = {"toy": {"action": {"q01": LOW, "q99": HIGH, "min": LOW, "max": HIGH, "mask": [True] * 6 + [False]}}}
COMPARED = [("one_step", "mlp"), ("one_step", "discrete"), ("interleaved", "mlp"), ("policy_head", "lstm"),
            ("policy_head", "gpt"), ("one_step", "diffusion"), ("video", "mlp")]


def fits(backbone, formulation, head):
    """Does this cell exist? (Config says why not.)"""
    try:
        cell(backbone, formulation, head)
    except ValueError:
        return False
    return True


def cell(backbone, formulation, head):
    """The tiny preset's Config for a cell, smaller still."""
    return replace(
        PRESETS["tiny"], backbone=backbone, formulation=formulation, head=head, init="", horizon=2,
        history=1 if formulation == "one_step" else 3, vit_depth=2, llm_depth=2, image_size=48,
        image_tokens=4, resampler_depth=1, resampler_latents=4, resampler=backbone == "moondream")


def samples(cfg):
    rng = np.random.default_rng(0)
    for i in range(2):
        n, frames = cfg.history - 1, rng.integers(0, 255, (cfg.history, 40, 48, 3), np.uint8)
        action = np.append(rng.uniform(-0.1, 0.1, 6), i).astype(np.float32)
        yield {"images": {v: frames[-1] for v in cfg.views},
               "history_images": {v: frames[:-1] for v in cfg.views},
               "history_actions": np.tile(action, (n, 1)), "actions": np.tile(action, (cfg.horizon, 1)),
               "instruction": "pick up the red cube", "dataset": "toy"}


def learn(cfg, folder, steps=20):
    """Loss before and after; then it acts, is saved, loaded, and acts alike."""
    torch.manual_seed(0)
    tokenizer, rows = robovlms.load_tokenizer(cfg), list(samples(cfg))
    model = robovlms.Model(cfg, tokenizer, STATS)
    prepared = [robovlms.prepare(s, cfg, tokenizer, STATS, key=1, train=True) for s in rows]
    batch = robovlms.collate(prepared, cfg)
    noise = torch.randn(2 * cfg.history, cfg.horizon, cfg.action_dim), torch.arange(2 * cfg.history) * 9
    optimizer, losses = torch.optim.AdamW(model.param_groups(2e-3, 0.0)), []
    for _ in range(steps):
        loss, _ = model.loss(batch, *noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval().save_pretrained(folder)
    acted = []
    for m in (model, robovlms.from_pretrained(folder)):
        torch.manual_seed(0)
        acted.append(m.act(rows)[0])
    if not (np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0] and np.allclose(*acted, atol=1e-6)):
        raise ValueError(f"{cfg.backbone} {cfg.formulation} {cfg.head}: losses {losses}, actions {acted}.")
    return losses[0], losses[-1]


def cells():
    """A row per backbone, a column per formulation; in it the heads, with the loss before and after."""
    start, count = time.time(), 0
    print("| backbone | " + " | ".join(CELLS) + " |\n" + "|---" * (1 + len(CELLS)) + "|")
    for backbone in ADAPTERS:
        row = []
        for formulation, heads in CELLS.items():
            found = []
            for head in heads:
                if fits(backbone, formulation, head):
                    with tempfile.TemporaryDirectory() as folder:
                        first, last = learn(cell(backbone, formulation, head), folder)
                    found.append(f"{head} {first:.2g} > {last:.1g}")
                    count += 1
            row.append(", ".join(found) or "-")
        print(f"| {backbone} | " + " | ".join(row) + " |", flush=True)
    print(f"\n{count} cells: loss before > after 20 steps on one batch ({time.time() - start:.0f} s). "
          "What is missing does not exist:")
    for name, why in {
            "policy_head with mlp, diffusion, discrete": "the history is in the head, and these keep none",
            "interleaved with discrete": "upstream trains it so, but acts on one frame",
            "video with others than mlp": "one chunk for all frames, so there is one step for the head",
            "flamingo with interleaved, video, discrete": "its pictures are not in the row of words"}.items():
        print(f"- {name}: {why}")


def compare(a):
    """Train and evaluate the COMPARED cells of one backbone; print a table."""
    choose("--backbone: there is no", a.backbone, tuple(ADAPTERS))
    rows = []
    for formulation, head in COMPARED:
        if not fits(a.backbone, formulation, head):
            continue
        out = a.out / f"{a.backbone}-{formulation}-{head}"
        if not (out / "eval" / "results.json").is_file():
            history = [] if formulation != "one_step" else ["history=1", "execute=1"]
            command = [sys.executable, ROOT / "train.py", "--model", "robovlms", "--out", out, "--overwrite",
                       "--steps", a.steps, "--eval-episodes", a.episodes, "--set", f"backbone={a.backbone}",
                       f"formulation={formulation}", f"head={head}", *history, *a.set]
            command += ["--cache", a.cache] if a.cache else []
            if subprocess.run(list(map(str, command))).returncode:
                raise ValueError(f"{out}: the training of this cell failed, see above; mend it, call again.")
        result = read_json(out / "eval" / "results.json")
        log = (out / "metrics.jsonl").read_text().splitlines()
        ms = [json.loads(line)["ms"] for line in log if '"ms"' in line]
        rows.append((formulation, head, result, float(np.median(ms))))
    print(f"\n| formulation | head | success | 95 % interval | ms per training step |\n|{'---|' * 5}")
    for formulation, head, result, ms in rows:
        rate, (low, high) = 100 * result["success"], (100 * x for x in result["interval"])
        print(f"| {formulation} | {head} | {rate:.1f} % | {low:.1f} .. {high:.1f} | {ms:.0f} |")


def main():
    p = Parser(__doc__)
    p.add_argument("what", choices=("cells", "compare"))
    p.add_argument("--backbone", default="kosmos", help="compare: whose cells")
    p.add_argument("--steps", type=within(1), default=3000, help="compare: optimizer steps of each")
    p.add_argument("--episodes", type=within(1), default=200, help="compare: episodes of each")
    p.add_argument("--out", type=Path, default=Path("runs/compare"), help="compare: a folder for the runs")
    p.add_argument("--cache", help="compare: train.py's")
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="compare: other Config values")
    a = p.parse_args()
    cells() if a.what == "cells" else compare(a)


if __name__ == "__main__":
    cli(main)
