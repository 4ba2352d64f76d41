"""How the overhead grows with batch, sequence, width and depth of a GPT: it must not.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --series width --rounds 60

Each series varies one size of the model below and leaves the others; a row is timed as in ``step_time.py``, all variants
in turns within one process. Printed are the median ratios to plain torch.compile, each with the interval that holds the
true median in 95% of cases, and "extra", the median milliseconds that measuring all parameters adds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import common, models, step_time
from benchmarks.step_time import AGAIN, OURS, PLAIN

BASE = {"batch": 8, "context": 64, "width": 256, "layers": 2, "heads": 4, "vocabulary": 512}
SERIES = {
    "batch": (2, 4, 8, 16, 32, 64),
    "context": (16, 32, 64, 128, 256, 512),
    "width": (64, 128, 256, 512, 768),
    "layers": (1, 2, 4, 8, 16),
}
LEAST = models.MODELS["demo"].small


def measure(series: str, value: int, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one size."""
    torch._dynamo.reset()
    size = {**(LEAST if args.small else BASE), series: value}
    case = models.build("demo", size, device=args.device, seed=args.seed)
    case.module.to(getattr(torch, args.dtype))
    label = f"{series} {value}: "
    times, _ = step_time.time_variants(case, [PLAIN, AGAIN, *args.variants], step_time.setting_of(args), args, label)
    whole = {variant: [seconds for seconds, _ in values] for variant, values in times.items()}
    row: dict[str, Any] = {"series": series, "value": value, "parameters": case.parameters}
    for variant, values in whole.items():
        row[variant] = common.compare(values, whole[PLAIN])
    row["ms"] = 1e3 * sorted(whole[PLAIN])[len(whole[PLAIN]) // 2]
    return row


def _ratio(variant: str) -> Callable[[common.Row], str]:
    return lambda row: f"{row[variant].median:.3f} ({row[variant].low:.3f}..{row[variant].high:.3f})"


def columns(variants: Sequence[str]) -> list[common.Column]:
    return [
        ("varied", lambda row: f"{row['series']} {row['value']}"),
        ("parameters", lambda row: f"{row['parameters']:,}"),
        ("plain ms", lambda row: f"{row['ms']:.1f}"),
        *((variant, _ratio(variant)) for variant in (AGAIN, *variants)),
        *([("extra", lambda row: f"{row['ms'] * (row['all'].median - 1):.1f}")] if "all" in variants else []),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    assert __doc__
    parser = common.parser_of(__doc__)
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES), metavar="NAME")
    parser.add_argument("--values", nargs="+", type=int, help="other sizes, with one series")
    parser.add_argument("--variants", nargs="+", choices=OURS, default=["all", "norm"])
    step_time.add_arguments(parser)
    parser.add_argument("--small", action="store_true", help="a tiny model")
    args = parser.parse_args(argv)
    if args.values and len(args.series) > 1:
        parser.error("--values needs one --series")
    if args.threads:
        torch.set_num_threads(args.threads)
    shown, rows = columns(args.variants), []
    for series in args.series:
        for value in args.values or SERIES[series]:
            rows.append(measure(series, value, args))
            common.note(common.text_table(shown, rows[-1:]).splitlines()[-1])
    base = LEAST if args.small else BASE
    about = "Model: " + ", ".join(f"{name} {value}" for name, value in base.items())
    print(common.text_table(shown, rows), about, sep="\n")
    if args.out:
        record = {
            "schema": "gnsfx.scaling/1",
            "settings": common.settings(args),
            "machine": common.machine(args.device),
        }
        text = f"{__doc__[__doc__.index('Each series') :]}\n{about}"
        common.save(args.out, "Scaling", text, shown, rows, {**record, "base": base})


if __name__ == "__main__":
    main()
