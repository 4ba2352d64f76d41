"""What all benchmarks share: taking turns, ratios and how far they can be trusted, tables, saving.

times [variant][round] --ratios within a round--> median, quartiles, 95% interval of the median, ratio of the fastest

Variants take turns in an order that rotates, so that whatever slows the machine slows all of them, and ratios are taken
within a round. The median of n ratios lies between the order statistics whose ranks a fair coin thrown n times holds in
95% of cases: no assumption on their distribution.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]  # heading, and the text of a row


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the ratios of all rounds. ``lower`` and ``upper`` quartile; ``low..high`` holds the median in 95% of cases."""

    median: float
    lower: float
    upper: float
    low: float
    high: float
    fastest: float


def median_ranks(count: int, level: float = 0.95) -> tuple[int, int]:
    """Ranks from 0 of the order statistics between which the median lies with probability ``level`` or more.

    All of them where ``count`` is too small for that.
    """
    below, rank = 2.0**-count, 0
    while rank < (count - 1) // 2 and below + math.comb(count, rank + 1) * 2.0**-count <= (1 - level) / 2:
        rank += 1
        below += math.comb(count, rank) * 2.0**-count
    return (rank, count - 1 - rank) if count else (0, 0)


def compare(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Ratios of ``values`` to ``base``, round by round."""
    ratios = sorted(value / reference for value, reference in zip(values, base, strict=True))
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    first, last = median_ranks(len(ratios))
    return Spread(median, lower, upper, ratios[first], ratios[last], min(values) / min(base))


def seconds(step: Callable[[], object], repeats: int = 1, device: str = "cpu") -> float:
    """Per call, of ``repeats`` calls in a row; what they queued on the device included."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def take_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1, device: str = "cpu", label: str = ""
) -> dict[str, list[float]]:
    """Seconds per call: variant -> one number per round."""
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for turn in progress(range(rounds), label):
        for variant in rotated(list(steps), turn):
            times[variant].append(seconds(steps[variant], repeats, device))
    return times


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """Another one first in each turn, and every second time around in the opposite order: nobody always has the same
    neighbour before it, who leaves the caches as they are."""
    first = turn % len(names)
    order = [*names[first:], *names[:first]]
    return order[::-1] if turn // len(names) % 2 else order


def progress(items: Iterable[Any], label: str) -> Iterator[Any]:
    """The items, counted on standard error where that is a terminal."""
    shown = sys.stderr.isatty()
    total = f" of {len(items)}" if isinstance(items, Sequence) else ""  # type: ignore[arg-type]
    for count, item in enumerate(items, 1):
        if shown:
            print(f"\r\033[K{label} {count}{total}", end="", file=sys.stderr, flush=True)
        yield item
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """For whoever waits."""
    print(text, file=sys.stderr, flush=True)


def fresh(program: str | Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """Run a program in a new interpreter; the last line it prints, as JSON.

    Raises:
        RuntimeError: it failed; the message is the end of what it said.
    """
    command = [sys.executable, str(program), *arguments]
    finished = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError("\n".join(finished.stderr.strip().splitlines()[-5:]))
    return json.loads(finished.stdout.strip().splitlines()[-1])


def text_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Padded to columns; the first is flush left."""
    cells = [[heading for heading, _ in columns], *([text(row) for _, text in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    number = [any(cell[:1].isdigit() for cell in column[1:]) for column in zip(*cells, strict=True)]
    places = [str.rjust if right else str.ljust for right in number]
    lines = ["  ".join(place(cell, w) for place, cell, w in zip(places, row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    head = [f"| {' | '.join(heading for heading, _ in columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join(head + [f"| {' | '.join(text(row) for _, text in columns)} |" for row in rows])


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a number of seconds depends on."""
    return {
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that every program has."""
    parser.add_argument("--threads", type=int, help="of PyTorch; default: as many as it takes")
    parser.add_argument("--out", type=Path, help="also write OUT.md and OUT.json, e.g. benchmarks/results/NAME")


def parser_of(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return parser


def add_models(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Which models, how large, and what becomes of those that are not among them."""
    every = list(names)
    parser.add_argument("--models", nargs="+", choices=every, default=every, metavar="NAME")
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--keep", action="store_true", help="keep what OUT.json says about other models")


def add_inner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor", help="eager: for tests")


def add_child(parser: argparse.ArgumentParser) -> None:
    """What a process of its own is to do, as JSON."""
    parser.add_argument("--child", help=argparse.SUPPRESS)


def save(
    out: Path, title: str, about: str, columns: Sequence[Column], rows: Sequence[Row], record: Mapping[str, Any]
) -> None:
    """OUT.md with the table, OUT.json with ``record`` and the rows. ``about``: lines below the title."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", about.strip(), "", markdown_table(columns, rows), ""]
    out.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    whole = json.dumps(plain({**record, "rows": list(rows)}), indent=1, allow_nan=False)
    out.with_suffix(".json").write_text(whole + "\n", encoding="utf-8")


def kept(out: Path | None, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of OUT.json about models other than ``names``: long tables can be made in pieces."""
    path = out and out.with_suffix(".json")
    if not path or not path.exists():
        return []
    rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["model"] not in names]
    return [{name: _as_spread(value) for name, value in row.items()} for row in rows]


def _as_spread(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == set(Spread.__slots__):
        return Spread(**{name: math.nan if number is None else number for name, number in value.items()})
    return value


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Without paths, which say nothing about the numbers."""
    return {name: value for name, value in vars(args).items() if not isinstance(value, Path)}


def plain(value: Any) -> Any:
    """As JSON has it: no NaN, no dataclasses, four digits of seconds and ratios are plenty."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return plain(asdict(value)) if isinstance(value, Spread) else value
