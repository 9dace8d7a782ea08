"""
How many tokens does an action cost, and what is lost? RoboBrain-X0's action tokenizers on the same chunks.

    python examples/action_tokens.py                                     # the tabletop's chunks of 30 steps
    python examples/action_tokens.py --data chunks.npy --out FOLDER      # your own (n, T, A), in robot units
    python examples/action_tokens.py --data lerobot=MT10,gripper=openvla # recordings of Meta-World

FAST+ and OmniSAT are fitted on nine tenths of the chunks (a data set: on its training set); uniform bins (256
per number, as in RT-2 and OpenVLA) need no fit. All see the same 1 % and 99 % quantiles, and are measured on
what the fit has not seen: the distance [mm] and angle [degrees] between a step's motion and what comes back,
and how often the gripper does the opposite. --out keeps both tokenizers and the statistics: name FOLDER as
`fast` or `omnisat` (--set), and put the statistics beside an official checkpoint.
"""
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import robobrain_x0 as x0  # noqa: E402
from common import Parser, cli, pick_stats, within, write_json  # noqa: E402


class Bins:
    """Each number by itself, in one of n equally wide bins of [-1, 1]."""

    def __init__(self, n=256):
        self.n = n

    def encode(self, chunk):
        return np.clip((chunk + 1) / 2 * self.n, 0, self.n - 1).astype(int).ravel().tolist()

    def decode(self, codes, T, D):
        return (np.array(codes).reshape(T, D) + 0.5) / self.n * 2 - 1, ""


def of_file(path):
    """An .npy of raw chunks (n, T, A) -> (normalized chunks with their statistics, others, statistics)."""
    try:
        chunks = np.load(path, allow_pickle=False)
        n, T, A = chunks.shape
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: an .npy file of chunks (n, T, A) in robot units is wanted: {e}") from e
    stats = x0.quantile_stats(chunks.reshape(-1, A))
    rows = [(x, stats) for x in x0.normalize(chunks, stats)]
    return [row for i, row in enumerate(rows) if i % 10], rows[::10], {"action.eepose": stats}


def of_dataset(spec, n, **how):
    """The same of a data set that train.py knows: n chunks spread over it, a tenth as many to measure.

    Meta-World's 4 numbers (1 is 1 cm; an effort of the gripper) become the 7 of an arm that does not turn;
    the statistics, which fit only the 4, are None.
    """
    def arm(numbers):
        x = np.asarray(numbers)
        return np.concatenate([x[..., :3] / 100, 0 * x[..., :3], x[..., 3:]], -1) if x.shape[-1] == 4 else x

    train, val = (data.open_dataset(spec, split, **how) for split in ("train", "val"))
    stats = data.dataset_statistics(train)
    scales = {name: {key: arm(row) for key, row in pick_stats(stats, name).items() if key in ("q01", "q99")}
              for name in stats}

    def rows(part, n):
        picked = [part[int(i)] for i in np.linspace(0, len(part) - 1, min(n, len(part)))]
        of = [scales[row["dataset"]] for row in picked]
        return [(x0.normalize(arm(row["actions"]), s), s) for row, s in zip(picked, of)]
    four = any(len(pick_stats(stats, name)["q01"]) == 4 for name in stats)
    return rows(train, n), rows(val or train, -(-n // 10)), None if four else stats


def measure(tokenizer, held_out):
    """One row of the table: tokens per chunk, errors of position, rotation, gripper."""
    counts, mm, degrees, wrong = [], [], [], []
    for x, stats in held_out:
        codes = tokenizer.encode(x)
        chunk, problem = tokenizer.decode(codes, *x.shape)
        if problem:
            raise ValueError(f"{type(tokenizer).__name__} cannot read what it wrote: {problem}.")
        a, b = (x0.denormalize(c, stats).reshape(len(c), -1, 7) for c in (chunk, x))           # (T, arms, 7)
        turns = x0.quat_delta(x0.rotvec_to_quat(a[..., 3:6]), x0.rotvec_to_quat(b[..., 3:6]))
        counts.append(len(codes))
        mm.append(np.linalg.norm(a[..., :3] - b[..., :3], axis=-1) * 1000)
        degrees.append(np.degrees(np.linalg.norm(turns, axis=-1)))
        wrong.append((a[..., 6] > 0.5) != (b[..., 6] > 0.5))
    mm, degrees, wrong = (np.concatenate([x.ravel() for x in column]) for column in (mm, degrees, wrong))
    return (f"{np.mean(counts):.1f} | {max(counts)} | {mm.mean():.2f} | {mm.max():.1f} | "
            f"{degrees.mean():.3f} | {degrees.max():.2f} | {wrong.mean():.2%}")


def main():
    p = Parser(__doc__)
    p.add_argument("--data", default="tabletop", help="as for train.py, or an .npy file")
    p.add_argument("--preset", default="3b", choices=[*x0.PRESETS], help="whose sizes the tokenizers get")
    p.add_argument("--horizon", type=within(1), default=30, help="actions per chunk (a file has its own)")
    p.add_argument("--image-size", type=within(1), default=96, help="of the data set (nobody looks at it)")
    p.add_argument("--chunks", type=within(1), default=8000, help="to fit on; measured are a tenth as many")
    p.add_argument("--cache", help="folder for generated data (default ~/.cache/plainvla)")
    p.add_argument("--out", type=Path, help="folder for the tokenizers and statistics")
    a = p.parse_args()
    how = {"horizon": a.horizon, "image_size": a.image_size} | ({"cache": a.cache} if a.cache else {})
    read = of_file(a.data) if a.data.endswith(".npy") else of_dataset(a.data, a.chunks, **how)
    (seen, held_out, stats), T = read, len(read[0][0][0])
    if a.out and stats is None:
        raise ValueError(f"--out {a.out}: {a.data} has 4 numbers, measured as an arm's 7: no tokenizer "
                         "of these would fit it. Leave --out out.")
    print(f"{a.data}: {len(seen)} chunks of {T} steps to fit on, {len(held_out)} others measured\n\n"
          "| tokenizer | tokens per chunk | most | mm, mean | max | degrees, mean | max | gripper wrong | "
          "fitted in |\n" + "|---" * 9 + "|")
    for name, kind in (("FAST+", "fast"), ("OmniSAT", "omnisat"), ("uniform bins", "")):
        begin, tokenizer = time.time(), Bins()
        if kind:
            cfg = x0.configure(x0.PRESETS[a.preset], tokens=kind, horizon=T, execute=1)
            tokenizer = x0.fit_actions(cfg, [x for x, _ in seen])
        took = time.time() - begin
        print(f"| {name} | {measure(tokenizer, held_out)} | {took:.0f} s |", flush=True)
        if a.out and kind:
            a.out.mkdir(parents=True, exist_ok=True)
            tokenizer.save(a.out)
            write_json(a.out / "action_stats.json", stats)


if __name__ == "__main__":
    cli(main)
