"""
How well does a RoboBrain-X0 point, box and trace? It is asked the questions of a JSONL; answers are drawn.

    python examples/abilities.py questions.jsonl CKPT FOLDER

A line: {"image": file, "ability": pointing | affordance | grounding | trajectory, "question": text, and the
truth: "mask": file (white: right), "box": [x1, y1, x2, y2] or "points": [[x, y], ...], in pixels}.
"""
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import robobrain_x0 as x0  # noqa: E402
from common import Parser, cli  # noqa: E402


def resample(path, n=20):
    """A path (m, 2) -> n points on it, equally far apart along it."""
    path = np.asarray(path, np.float64)
    along = np.append(0, np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum())
    return np.stack([np.interp(np.linspace(0, along[-1], n), along, x) for x in path.T], 1)


def frechet(p, q):
    """Discrete Frechet distance of two paths (n, 2), (m, 2): the shortest leash that two walkers need."""
    d = np.linalg.norm(np.asarray(p)[:, None] - np.asarray(q), axis=-1)             # (n, m)
    for i, j in np.ndindex(*d.shape):
        before = [d[a, b] for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if min(a, b) >= 0]
        d[i, j] = max(d[i, j], min(before, default=0))
    return float(d[-1, -1])


def score_ability(ability, found, truth):
    """Measures of parse_ability's result: {name: number}; what could not be read counts as the worst.

    truth: of pointing, a mask (h, w) bool; of boxes, x1 y1 x2 y2; of a trajectory, points (n, 2) [pixels].
    """
    if ability == "pointing":
        h, w = np.shape(truth)
        return {"in mask": sum(bool(x < w and y < h and truth[y][x]) for x, y in found) / max(len(found), 1)}
    if ability == "trajectory":
        if not len(found):
            return {"rmse": np.inf, "frechet": np.inf}
        a, b = resample(found), resample(truth)
        return {"rmse": float(np.sqrt(((a - b) ** 2).sum(1).mean())), "frechet": frechet(a, b)}
    if ability not in ("affordance", "grounding"):
        raise ValueError(f"answers to {ability!r} have no measure; there is one for {[*x0.ABILITIES][1:]}.")
    a, b = np.array(found[0] if len(found) else [0] * 4, np.float64), np.array(truth, np.float64)
    both = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    either = sum(np.clip(x[2:] - x[:2], 0, None).prod() for x in (a, b)) - both
    return {"iou": float(both / either) if either > 0 else 0.0}


def draw_ability(image, found):
    """A picture, uint8 (h, w, 3), with points (n, 2), joined in order, or boxes (n, 4) drawn into it."""
    picture, found = Image.fromarray(image), np.asarray(found)
    pen, points = ImageDraw.Draw(picture), found.shape[1] == 2
    for path in [found] if points else found[:, [[0, 1], [2, 1], [2, 3], [0, 3], [0, 1]]]:
        pen.line([tuple(p) for p in path.tolist()], (255, 200, 0), 2)
    for x, y in found if points else ():
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), (255, 0, 0))
    return np.array(picture)


def score(path, checkpoint, folder):
    """Ask a checkpoint a JSONL's questions; print each measure's mean, draw the answers."""
    model, found, root = x0.from_pretrained(checkpoint), {}, Path(path).parent
    Path(folder).mkdir(parents=True, exist_ok=True)
    for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()):
        try:
            row = json.loads(line)
            image = np.array(Image.open(root / row["image"]).convert("RGB"))
            truth = row.get("box") or row.get("points")
            if "mask" in row:
                truth = np.array(Image.open(root / row["mask"]).convert("L")) > 127
            got, _ = model.answer(image, row["question"], row["ability"], temperature=0.0)
            measures = score_ability(row["ability"], got, truth)
        except (OSError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path}, line {n + 1}: {type(e).__name__} {e}; see abilities.py.") from e
        for name, value in measures.items():
            found.setdefault(f"{row['ability']} {name}", []).append(value)
        Image.fromarray(draw_ability(image, got)).save(Path(folder) / f"{n:05d}.png")
    for name, values in found.items():
        print(f"{name:<20} {np.mean(values):8.3f}   ({len(values)} questions)")


def main():
    p = Parser(__doc__)
    p.add_argument("jsonl", help="the questions")
    p.add_argument("ckpt", help="a checkpoint folder or hub id")
    p.add_argument("folder", help="drawings of the answers go here")
    a = p.parse_args()
    score(a.jsonl, a.ckpt, a.folder)


if __name__ == "__main__":
    cli(main)
