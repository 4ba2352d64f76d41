"""Compile time next to plain Inductor, with an empty cache and with a full one; and how it grows with depth.

    python benchmarks/compile_time.py                              # every model
    python benchmarks/compile_time.py --models demo --rounds 5
    python benchmarks/compile_time.py --depths 2 6 12 24 48        # narrow GPTs, one row per depth

Every measurement is a fresh process with an Inductor cache folder of its own: the first ("cold") finds it empty, the
second ("warm") what the first left. The seconds are what the first forward and backward take longer than the second,
without imports and without what the first compile of a process starts once. Variants take turns, in an order that
rotates; ratios are taken within a round, the median over the rounds is printed with their range. "s per layer" is what a
layer more costs from one depth to the next: it stays the same where compile time is linear in the size of the graph.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import common, models
from benchmarks.step_time import OURS, PLAIN, compiled_training

NARROW = {"batch": 4, "context": 32, "width": 64, "heads": 2, "vocabulary": 103}


def compile_seconds(variant: str, name: str, size: dict[str, int], inner: str) -> float:
    """What the first step of this process takes longer than the second."""
    case = models.build(name, size)
    torch.compile(lambda x: x + 1, backend=models.ALIKE[inner])(torch.zeros(2))
    training = compiled_training(case, variant, inner)
    first, second = (common.seconds(lambda: training(case.inputs, case.targets).backward()) for _ in range(2))
    return first - second


def measure(args: Any, name: str, size: dict[str, int], label: str) -> dict[tuple[str, str], list[float]]:
    """(cold or warm, variant) -> seconds per round."""
    variants = [v for v in args.variants if v != "norm" or models.has_norms(name)]
    times: dict[tuple[str, str], list[float]] = {(s, v): [] for s in ("cold", "warm") for v in variants}
    job = {"name": name, "size": size, "inner": args.inner}
    for turn in range(args.rounds):
        for variant in common.rotated(variants, turn):
            with tempfile.TemporaryDirectory() as cache:
                environment = {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(args.threads or 2)}
                for state in ("cold", "warm"):
                    arguments = ["--child", json.dumps({**job, "variant": variant})]
                    found = common.fresh(__file__, arguments, environment)
                    times[state, variant].append(found)
                    common.note(f"{label} {variant} {state}: {found:.2f} s")
    return times


def rows_of(times: dict[tuple[str, str], list[float]], about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for (state, variant), values in times.items():
        ratios = [value / plain for value, plain in zip(values, times[state, PLAIN], strict=True)]
        yield {
            **about,
            "cache": state,
            "variant": variant,
            "seconds": statistics.median(values),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "times": values,
        }


def add_slopes(rows: Sequence[dict[str, Any]]) -> None:
    """Seconds per layer from the depth before, where there is one."""
    for row in rows:
        before = [
            r
            for r in rows
            if (r["cache"], r["variant"]) == (row["cache"], row["variant"]) and r["layers"] < row["layers"]
        ]
        if before:
            row["per layer"] = (row["seconds"] - before[-1]["seconds"]) / (row["layers"] - before[-1]["layers"])


COLUMNS: tuple[common.Column, ...] = (
    ("model", lambda row: row["model"]),
    ("layers", lambda row: str(row["layers"])),
    ("cache", lambda row: row["cache"]),
    ("variant", lambda row: row["variant"]),
    ("seconds", lambda row: f"{row['seconds']:.2f}"),
    ("ratio", lambda row: f"{row['ratio']:.2f}"),
    ("range", lambda row: f"{row['low']:.2f}..{row['high']:.2f}"),
    ("s per layer", lambda row: f"{row['per layer']:.3f}" if "per layer" in row else ""),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser_of(__doc__)
    common.add_models(parser, models.MODELS)
    parser.add_argument("--depths", nargs="+", type=int, help="layers of narrow GPTs, in place of the models")
    parser.add_argument("--variants", nargs="+", choices=OURS, default=["all", "norm"])
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    common.add_inner(parser)
    common.add_child(parser)
    args = parser.parse_args(argv)
    if args.child:
        job = json.loads(args.child)
        return print(json.dumps(compile_seconds(**job)))

    args.variants = list(dict.fromkeys([PLAIN, *args.variants]))
    if args.depths:
        jobs = [("demo", {**NARROW, "layers": depth}) for depth in sorted(args.depths)]
    else:
        jobs = [(name, models.MODELS[name].small if args.small else models.MODELS[name].size) for name in args.models]
    rows = common.kept(args.out, ["narrow GPT"] if args.depths else args.models) if args.keep else []
    fresh: list[dict[str, Any]] = []
    for name, size in jobs:
        about = {"model": "narrow GPT" if args.depths else name, "layers": size["layers"]}
        fresh += rows_of(measure(args, name, size, f"{about['model']} {size['layers']}"), about)
    if args.depths:
        add_slopes(fresh)
    rows += fresh
    print(common.text_table(COLUMNS, rows))
    if args.out:
        record = {"schema": "gnsfx.compile_time/1", "settings": common.settings(args), "machine": common.machine()}
        about = (__doc__ or "").rpartition("\n\n")[2]
        common.save(args.out, "Compile time", about, COLUMNS, rows, record)


if __name__ == "__main__":
    main()
