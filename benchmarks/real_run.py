"""A real run: a character GPT on English text, once with a fixed batch and once with the batch following the noise scale.

    python benchmarks/real_run.py                  # three seeds, about a quarter of an hour on two cores
    python benchmarks/real_run.py --quick          # one short seed
    python benchmarks/real_run.py --out DIR        # DIR/real_run.json, .md and .svg

Printed per seed and as mean and standard deviation over the seeds:
    how B_simple and its interval move, from warm-up over the first tenth of what follows to the end
    Pearson's r and the slope between the B_simple of the norm layers alone and of all parameters, over the run
    tokens and seconds until the closed loop reaches the validation loss at which the fixed batch ended, relative to it

Both runs have the same seed, micro-batches, tokens and learning rate per batch size (square-root rule), warm-up over a
twentieth, where the noise scale starts anew, and constant then: with a decay, the loss at a number of tokens would
depend on where the run means to end.
Seconds are of training alone, after compiling. The runs of a pair take turns of a hundred micro-batches, so that
whatever slows the machine slows both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import gnsfx
from gnsfx import GnsError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from train_gpt import GPT, Text, read_text

NORM = {"norm": r"norm"}
TURN = 100  # micro-batches
UNSEEN = {"b_simple": math.nan, "low": 0.0, "high": math.inf}  # of a run too short for an interval with two ends


class Run:
    """One training run, a turn at a time. ``records``: what was seen, one dict per look."""

    def __init__(self, closed: bool, text: Text, args: argparse.Namespace, seed: int) -> None:
        torch.manual_seed(seed)
        self.args, self.text = args, text
        self.model = GPT(len(text.vocabulary), args.context, args.width, args.layers, heads=4)
        self.compiled = torch.compile(self.model, backend="gns")
        self.noise = gnsfx.NoiseScale(self.model, groups=NORM, half_life=args.half_life)
        low = args.start if closed else args.fixed
        self.policy = gnsfx.BatchSizeController(
            self.noise,
            micro_batch=args.micro,
            bounds=(low, args.largest if closed else low),
            warm_up=args.warm_up,
            period=10,
            min_steps=20,
            lr=None,
            beta2=False,
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.1)
        self.random = torch.Generator().manual_seed(seed)
        self.tokens, self.seconds, self.micros, self.looked, self.warm = 0, 0.0, 0, -math.inf, False
        self.records: list[dict[str, Any]] = []
        with torch.no_grad():
            text.validation_loss(self.model, args.fixed)

    @property
    def done(self) -> bool:
        return self.tokens >= self.args.tokens

    def turn(self) -> None:
        """At least ``TURN`` micro-batches."""
        until = self.micros + TURN
        while self.micros < until and not self.done:
            start = time.perf_counter()
            self._step()
            if len(self.records) > 1:  # the first steps compile
                self.seconds += time.perf_counter() - start
            if self.tokens - self.looked >= self.args.tokens / 60 or self.done:
                self._look()

    def _step(self) -> None:
        batch, args = self.policy.batch_size, self.args
        warm_up = min((self.tokens + 1) / (args.tokens / 20), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * math.sqrt(batch / args.fixed) * warm_up
        for _ in range(self.policy.accumulation):
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self.random.get_state())
                x, y = self.text.batch(args.micro)
                self.random.set_state(torch.get_rng_state())
            (self.compiled(x, y) * (args.micro / batch)).backward()
            self.micros += 1
        if warm_up == 1 and not self.warm:
            self.warm = True
            self.noise.reset()
        self.noise.step(tokens=batch * args.context)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens += batch * args.context
        self.policy.step(tokens=batch * args.context)

    def _look(self) -> None:
        self.looked = self.tokens
        low, high = self.noise.interval()
        norm = self.noise.by_group()["norm"]
        self.records.append(
            {
                "tokens": self.tokens,
                "seconds": self.seconds,
                "loss": self.text.validation_loss(self.model, self.args.fixed),
                "batch": self.policy.batch_size,
                "b_simple": self.noise.b_simple,
                "low": low,
                "high": high,
                "norm": norm.b_simple,
            }
        )


def reached(records: Sequence[dict[str, Any]], loss: float, key: str) -> float:
    """Where the loss was first reached, between two looks by a straight line; NaN if never."""
    for before, after in itertools.pairwise(records):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / max(before["loss"] - after["loss"], 1e-12)
            return before[key] + min(max(share, 0.0), 1.0) * (after[key] - before[key])
    return math.nan


def correlation(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Pearson's r and the least-squares slope of the second on the first."""
    x, y = zip(*pairs, strict=True)
    fit = statistics.linear_regression(x, y)
    return statistics.correlation(x, y), fit.slope


def width(record: dict[str, Any]) -> float:
    """log(high / low): 0.1 is about plus or minus 5%."""
    return math.log(record["high"] / record["low"]) if record["low"] > 0 else math.inf


def measure(fixed: Run, closed: Run) -> dict[str, float]:
    """What is printed of one seed."""
    records = fixed.records
    known = [r for r in records if math.isfinite(r["high"])]
    early, late = (known[max(len(known) // 10, 1)], known[-1]) if len(known) > 1 else (UNSEEN, UNSEEN)
    pairs = [(r["norm"], r["b_simple"]) for r in known if r["norm"] > 0]
    r, slope = correlation(pairs) if len(pairs) > 1 else (math.nan, math.nan)
    end = records[-1]
    tokens, seconds = (reached(closed.records, end["loss"], key) for key in ("tokens", "seconds"))
    start = [
        UNSEEN,
        *(r for r in closed.records if r["tokens"] <= closed.args.tokens / 20 and math.isfinite(r["high"])),
    ][-1]
    return {
        "B_simple in warm-up, closed loop": start["b_simple"],
        "B_simple, early": early["b_simple"],
        "B_simple, late": late["b_simple"],
        "rise": late["b_simple"] / early["b_simple"],
        "log width, early": width(early),
        "log width, late": width(late),
        "r, norm to total": r,
        "slope, norm to total": slope,
        "median of total / norm": statistics.median(b / a for a, b in pairs) if pairs else math.nan,
        "loss, fixed": end["loss"],
        "loss, closed loop": closed.records[-1]["loss"],
        "last batch, closed loop": closed.records[-1]["batch"],
        "tokens to the loss of fixed": tokens / end["tokens"],
        "seconds to the loss of fixed": seconds / end["seconds"],
        "seconds, whole run": closed.records[-1]["seconds"] / end["seconds"],
    }


def seeds(args: argparse.Namespace, text: Text) -> Iterator[tuple[Run, Run]]:
    for seed in range(args.seeds):
        torch._dynamo.reset()
        pair = Run(False, text, args, seed), Run(True, text, args, seed)
        while not all(run.done for run in pair):
            for run in pair:
                run.turn()
            share = min(run.tokens for run in pair) / args.tokens
            print(f"\rseed {seed + 1} of {args.seeds}: {share:.0%}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        yield pair


def table(rows: Sequence[dict[str, float]]) -> str:
    lines = ["| | " + " | ".join(f"seed {i}" for i in range(len(rows))) + " | mean ± sd |"]
    lines.append("|---|" + "---:|" * (len(rows) + 1))
    for key in rows[0]:
        values = [row[key] for row in rows]
        spread = f"{statistics.fmean(values):.3g} ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
        lines.append(f"| {key} | " + " | ".join(f"{value:.3g}" for value in values) + f" | {spread} |")
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """For JSON: six digits, and null for what is no number."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def draw(pairs: Sequence[tuple[Run, Run]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gnsfx"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for pair in pairs:
        for run, color in zip(pair, ("tab:gray", "tab:blue"), strict=True):
            rows = run.records
            tokens = [row["tokens"] for row in rows]
            axes[0].plot(tokens, [row["loss"] for row in rows], color=color, linewidth=1)
            axes[2].plot(tokens, [row["batch"] for row in rows], color=color, linewidth=1)
        rows = [row for row in pair[0].records if math.isfinite(row["high"])]
        tokens = [row["tokens"] for row in rows]
        axes[1].plot(tokens, [row["b_simple"] for row in rows], color="tab:gray", linewidth=1)
        axes[1].fill_between(
            tokens, [r["low"] for r in rows], [r["high"] for r in rows], color="tab:gray", alpha=0.2, linewidth=0
        )
    titles = ("validation loss, nats per character", "B_simple, sequences, 95%", "batch, sequences")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[2].set_yscale("log", base=2)
    for name, color in (("fixed batch", "tab:gray"), ("closed loop", "tab:blue")):
        axes[0].plot([], [], color=color, label=name)
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=float, default=2e6, help="characters per run")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--micro", type=int, default=8, help="sequences per micro-batch")
    parser.add_argument("--fixed", type=int, default=64, help="sequences per step of the fixed batch")
    parser.add_argument("--start", type=int, default=8, help="sequences per step at the start of the closed loop")
    parser.add_argument("--largest", type=int, default=512)
    parser.add_argument("--warm-up", type=int, default=50, help="steps before the closed loop acts")
    parser.add_argument("--half-life", type=float, default=2000, help="of the averages, in sequences")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the fixed batch")
    parser.add_argument("--quick", action="store_true", help="one seed of a tenth of the tokens")
    parser.add_argument("--out", type=Path, help="folder for real_run.json, .md and .svg")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.tokens = 1, args.tokens / 10
    try:
        pairs = list(seeds(args, Text(read_text(None), args.context)))
    except GnsError as error:
        print(f"real_run: {error}", file=sys.stderr)
        return 2
    rows = [measure(*pair) for pair in pairs]
    text = table(rows)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        command = f"`python benchmarks/real_run.py --seeds {args.seeds} --tokens {args.tokens:g}`, torch {torch.__version__}, CPU"
        (args.out / "real_run.md").write_text(f"{command}\n\n{text}\n")
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        records = [{"fixed": f.records, "closed": c.records} for f, c in pairs]
        document = {"settings": settings, "torch": torch.__version__, "rows": rows, "records": records}
        (args.out / "real_run.json").write_text(json.dumps(plain(document), allow_nan=False) + "\n")
        draw(pairs, args.out / "real_run.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
