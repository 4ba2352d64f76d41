"""Bias and coverage of the noise scale and its interval, on synthetic gradients whose Sigma and G are known.

    python benchmarks/monte_carlo.py
    python benchmarks/monte_carlo.py --quick
    python benchmarks/monte_carlo.py --out benchmarks/results/monte_carlo

Each row is many independent runs: what NoiseScale reads after ``--steps`` steps at its default decay of 0.99 per step.

    bias        of the averages of tr(Sigma) and |G|^2, in standard errors over the runs: a standard normal if unbiased
    95%         how often the interval holds the true noise scale, in percent, with its standard error
    only low    share of runs whose interval is a lower bound, and how often those hold the truth
    B_simple    median over the runs that have an upper end, relative to the truth; where most do
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gnsfx.noise import estimators, intervals, series

sys.path.insert(0, str(Path(__file__).resolve().parent))
from other_intervals import fieller, log_delta
from synthetic import LOG_NORMAL, LOW_RANK, OUTLIERS, WORLDS, Steps, World, draw, draw_clusters, draw_examples

BATCHES = (4, 16, 64, 256, 1024)
NOISE_SCALES = (1, 10, 100, 1000, 10_000)
DECAY = 0.99
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is simulated."""

    steps: int
    runs: int
    batches: tuple[int, ...] = BATCHES
    noise_scales: tuple[int, ...] = NOISE_SCALES


def run_series(steps: Steps, batch: int) -> torch.Tensor:
    """[8, runs]: the series after all steps, as NoiseScale keeps it."""
    half_life = estimators.half_life_of(DECAY, batch)
    state = series.empty(steps.grad_sq.shape[1], like=steps.grad_sq)
    for grad_sq, sq_norm, effective, examples in zip(*steps, strict=True):
        pair = estimators.unbiased_pair(grad_sq, sq_norm, effective)
        decay = estimators.step_decay(examples, half_life)
        state = series.step(state, pair.tr_sigma, pair.g_sq, effective - 1, decay)
    return state


def judge(steps: Steps, batch: int, noise_scale: float, tr_sigma: float = 1.0, unit: int = 1) -> Row:
    """Bias and coverage. ``tr_sigma`` of the unit of the steps; ``unit`` converts to examples."""
    state = run_series(steps, batch)
    estimates = [series.read(column) for column in state.T.tolist()]
    found = [intervals.ratio_interval(estimate) for estimate in estimates]
    held = [interval.low * unit <= noise_scale <= interval.high * unit for interval in found]
    low_only = [ok for ok, interval in zip(held, found, strict=True) if not interval.bounded]
    ratios = [
        estimate.tr_sigma / estimate.g_sq * unit / noise_scale
        for estimate, interval in zip(estimates, found, strict=True)
        if interval.bounded
    ]
    return {
        "true": noise_scale,
        "bias_tr_sigma": _in_standard_errors(state[0], tr_sigma),
        "bias_g_sq": _in_standard_errors(state[1], tr_sigma * unit / noise_scale),
        "coverage": _share(held),
        "coverage_se": _standard_error(held),
        "low_only": len(low_only) / len(found),
        "low_only_coverage": _share(low_only),
        "ratio": float(torch.tensor(ratios).median()) if ratios else math.nan,
    }


def main_table(size: Size, generator: torch.Generator) -> Iterator[Row]:
    for world in WORLDS:
        for batch in size.batches:
            for noise_scale in size.noise_scales:
                steps = draw(world, batch, noise_scale, size.steps, size.runs, generator)
                yield {"world": world.name, "batch": batch} | judge(steps, batch, noise_scale)


def short_table(size: Size, generator: torch.Generator) -> Iterator[Row]:
    """After few steps: the variances are themselves uncertain."""
    for world in WORLDS[:3]:
        for count in (4, 12, 32):
            for batch in (4, 64):
                for noise_scale in (1, 100, 10_000):
                    steps = draw(world, batch, noise_scale, count, size.runs, generator)
                    yield {"world": f"{world.name}, {count} steps", "batch": batch} | judge(steps, batch, noise_scale)


def correlated_table(size: Size, generator: torch.Generator) -> Iterator[Row]:
    """Clusters of 4 examples with correlation 0.3. The noise of the batch mean is 1.9 times that of independent ones."""
    members, correlation = 4, 0.3
    inflation = 1 + (members - 1) * correlation
    for batch in (64, 1024):
        for noise_scale in size.noise_scales:
            simple = noise_scale / inflation
            seen = draw_clusters(batch, simple, members, correlation, size.steps, size.runs, generator)
            for name, steps, unit in zip(("per example", "per cluster"), seen, (1, members), strict=True):
                row = judge(steps, batch, noise_scale, tr_sigma=inflation / unit, unit=unit)
                yield {"world": name, "batch": batch} | row


def one_step_table(size: Size, generator: torch.Generator) -> Iterator[Row]:
    """Intervals from the per-example norms of a single step. The last two worlds are outside of what it assumes."""
    flat = ((1.0, 64, 1.0),)
    worlds = [World("isotropic", flat), World("low rank", LOW_RANK), World("heavy tails, log-normal", flat, LOG_NORMAL)]
    beyond = [World("1 in 20 five times as large", flat, OUTLIERS), World("constant length of h - G", flat)]
    for world in worlds + beyond:
        for batch in (4, 16, 64, 256):
            for noise_scale in size.noise_scales[:4]:
                norms, grad_sq = draw_examples(world, batch, noise_scale, size.runs, generator, world is beyond[1])
                found = [intervals.one_step(*step) for step in zip(norms.tolist(), grad_sq.tolist(), strict=True)]
                held = [interval.low <= noise_scale <= interval.high for interval in found]
                low_only = [ok for ok, interval in zip(held, found, strict=True) if not interval.bounded]
                yield {
                    "world": world.name,
                    "batch": batch,
                    "true": noise_scale,
                    "coverage": _share(held),
                    "coverage_se": _standard_error(held),
                    "low_only": len(low_only) / len(found),
                    "low_only_coverage": _share(low_only),
                }


def other_table(size: Size, generator: torch.Generator) -> Iterator[Row]:
    """Other intervals on the same estimates: extremes over all batch sizes and noise scales."""
    kinds = {"gnsfx": intervals.ratio_interval, "Fieller": fieller, "log-delta": log_delta}
    for world in WORLDS[:4]:
        cells = {kind: [] for kind in kinds}
        for batch in size.batches:
            for noise_scale in size.noise_scales:
                state = run_series(draw(world, batch, noise_scale, size.steps, size.runs // 2, generator), batch)
                estimates = [series.read(column) for column in state.T.tolist()]
                for kind, interval_of in kinds.items():
                    found = [interval_of(estimate) for estimate in estimates]
                    held = [i is not None and i.low <= noise_scale <= i.high for i in found]
                    farthest = max(i.low / noise_scale for i in found if i is not None)
                    cells[kind].append((_share(held), found.count(None) / len(found), farthest))
        for kind, values in cells.items():
            coverage, empty, farthest = zip(*values, strict=True)
            yield {
                "world": world.name,
                "interval": kind,
                "lowest": min(coverage),
                "mean": sum(coverage) / len(coverage),
                "highest": max(coverage),
                "empty": max(empty),
                "farthest": max(farthest),
            }


TABLES: dict[str, Callable[[Size, torch.Generator], Iterator[Row]]] = {
    "After a full window": main_table,
    "After few steps": short_table,
    "Correlated examples": correlated_table,
    "One step": one_step_table,
    "Other intervals": other_table,
}


def summary(rows: list[Row]) -> str:
    """What to look at first: the extremes, next to what chance alone would give."""
    bias = [row[name] for row in rows for name in ("bias_tr_sigma", "bias_g_sq")]
    root_mean = math.sqrt(sum(z * z for z in bias) / len(bias))
    answers = sum(row["low_only"] for row in rows)
    held = sum(row["low_only"] * row["low_only_coverage"] for row in rows if row["low_only"]) / max(answers, 1e-9)
    lines = [
        f"Bias in standard errors: root mean square {root_mean:.2f} (1 if unbiased), largest {max(map(abs, bias)):.2f} "
        f"of {len(bias)}.",
        *(
            f"Coverage {name}: {100 * min(shares):.1f}% to {100 * max(shares):.1f}%, mean "
            f"{100 * sum(shares) / len(shares):.2f}%; {sum(0.93 <= share <= 0.97 for share in shares)} of {len(shares)} rows "
            "between 93% and 97%."
            for name, shares in (
                ("at constant batch size", [r["coverage"] for r in rows if r["world"] != "batch varies"]),
                ("where the batch size varies", [r["coverage"] for r in rows if r["world"] == "batch varies"]),
                ("where most answers are lower bounds", [r["coverage"] for r in rows if r["low_only"] > 0.5]),
            )
            if shares
        ),
        f"Of all lower bounds, {100 * held:.1f}% hold.",
    ]
    return "\n".join(f"- {line}" for line in lines)


COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("world", "world", lambda row: row["world"]),
    ("interval", "interval", lambda row: row["interval"]),
    ("batch", "B", lambda row: str(row["batch"])),
    ("true", "noise scale", lambda row: f"{row['true']:,}"),
    ("bias_tr_sigma", "bias tr(Sigma)", lambda row: f"{row['bias_tr_sigma']:+.2f}"),
    ("bias_g_sq", "bias G^2", lambda row: f"{row['bias_g_sq']:+.2f}"),
    ("coverage", "95%", lambda row: f"{100 * row['coverage']:.1f} ± {100 * row['coverage_se']:.1f}"),
    ("low_only", "only low", lambda row: f"{row['low_only']:.0%}"),
    ("low_only_coverage", "hold", lambda row: f"{row['low_only_coverage']:.1%}" if row["low_only"] else ""),
    ("ratio", "B_simple", lambda row: f"{row['ratio']:.2f}" if row["low_only"] < 0.5 else ""),
    ("lowest", "least coverage", lambda row: f"{row['lowest']:.1%}"),
    ("mean", "mean", lambda row: f"{row['mean']:.1%}"),
    ("highest", "most", lambda row: f"{row['highest']:.1%}"),
    ("empty", "empty, at most", lambda row: f"{row['empty']:.1%}"),
    ("farthest", "low / truth, at most", lambda row: f"{row['farthest']:.1f}"),
)


def markdown(rows: list[Row]) -> Iterator[str]:
    columns = [(title, text) for name, title, text in COLUMNS if name in rows[0]]
    yield f"| {' | '.join(title for title, _ in columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join(text(row) for _, text in columns)} |"


def _in_standard_errors(values: torch.Tensor, truth: float) -> float:
    return float((values.mean() - truth) / values.std() * math.sqrt(len(values)))


def _share(held: list[bool]) -> float:
    return sum(held) / len(held) if held else math.nan


def _standard_error(held: list[bool]) -> float:
    """Agresti-Coull, so that it is not 0 where all held."""
    share = (sum(held) + 2) / (len(held) + 4)
    return math.sqrt(share * (1 - share) / (len(held) + 4))


def _without_nan(row: Row) -> Row:
    """NaN is no JSON."""
    return {name: None if value != value else value for name, value in row.items()}


def _followed(rows: Iterable[Row], name: str) -> Iterator[Row]:
    """The rows, with their number on standard error where that is a terminal."""
    for count, row in enumerate(rows, 1):
        if sys.stderr.isatty():
            print(f"\r{name}: {count} rows", end="", file=sys.stderr, flush=True)
        yield row
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="per run; default %(default)s")
    parser.add_argument("--runs", type=int, default=2000, help="per row; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer rows and runs, in seconds")
    parser.add_argument("--out", type=Path, help="also write OUT.md and OUT.json")
    args = parser.parse_args()

    size = Size(150, 150, (4, 64, 1024), (1, 100, 10_000)) if args.quick else Size(args.steps, args.runs)
    generator = torch.Generator().manual_seed(args.seed)
    start, results, lines = time.perf_counter(), {}, []
    for name, table in TABLES.items():
        rows = results[name] = list(_followed(table(size, generator), name))
        description = (table.__doc__ or "").strip()
        lines += [f"## {name}", "", *([description, ""] if description else [])]
        if table is main_table:
            lines += [summary(rows), ""]
        lines += [*markdown(rows), ""]
    print("\n".join(lines))
    print(f"{size.runs} runs of {size.steps} steps, {time.perf_counter() - start:.0f} s")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about = (__doc__ or "").split("\n\n")
        about[2] = (
            f"Each row is {size.runs} independent runs: what NoiseScale reads after {size.steps} steps at its default decay."
        )
        head = ["# Monte Carlo", "", about[0], "", f"{about[2]}\n\n```\n{about[3].rstrip()}\n```", ""]
        args.out.with_suffix(".md").write_text("\n".join(head + lines))
        settings = {"steps": size.steps, "runs": size.runs, "seed": args.seed, "decay": DECAY}
        plain = {name: [_without_nan(row) for row in rows] for name, rows in results.items()}
        args.out.with_suffix(".json").write_text(json.dumps({"settings": settings, "rows": plain}, indent=1))


if __name__ == "__main__":
    main()
