"""On a machine with a GPU: is every kernel and every gradient right, how fast are they, and what does a training step cost?

    python -m benchmarks.gpu --out gpu              # writes gpu.json and gpu.md; under 9 minutes on one H200
    python -m benchmarks.gpu --sections device correctness --seconds 120
    python -m benchmarks.gpu --sanitizer            # memory errors and races, if compute-sanitizer is there
    python -m benchmarks.gpu --device cpu --quick   # no GPU: only whether the program runs

Run it from the root of the repository; it needs PyTorch and Triton, and nothing installed. Where a machine is lent that
brings back what is written to $OUT:  python -m benchmarks.gpu --out $OUT/gpu

    device        the machine and its ceilings: a copy, cuBLAS
    correctness   every op next to fp64
    training      whole training steps through Inductor next to per-example autograd in fp64
    ahead         meanwhile: compiling what "steps" runs
    norms         backward of norm layers: bytes per second next to a copy and to Inductor
    products      weight gradients with norms: multiples of cuBLAS, and what the planner would choose
    steps         step time, memory and waits next to plain torch.compile

Every section is a process of its own, so that none can take the GPU, or the time, from the others. Sections share --seconds;
what one leaves over the next ones have. Results are written after every section. A case that fails is a row with its
error, and a section that fails or runs out of time keeps the rows it has. The exit status is 1 if anything was wrong,
failed or was left out, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu import products, report, sections
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections import SECTIONS

SCHEMA = "gnsfx.gpu/1"
GRACE = 20.0
"""Seconds that a section may take to notice that its time is over."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: PyTorch finds no CUDA device here. Run it on a machine with an NVIDIA GPU and a PyTorch "
            "built for CUDA, or see with --device cpu --quick that the program itself runs.",
            file=sys.stderr,
        )
        return 2
    bench = Bench(torch.device(args.device), args.quick)
    if args.rows:
        return child(args, bench)
    result: dict[str, Any] = {"schema": SCHEMA, "settings": common.settings(args), "machine": {}, "sections": {}}
    begin = time.monotonic()
    for names, until in turns(args.sections, args.seconds):
        seconds = max(1.0, until - (time.monotonic() - begin))
        if bench.cuda:
            result["sections"].update(processes(names, seconds, args))
        else:
            result["sections"].update({name: in_process(name, bench, seconds) for name in names})
        for row in result["sections"].get("device", {"rows": []})["rows"]:
            result["machine"] = row.get("machine", result["machine"])
        save(result, args.out)
    result["seconds"] = round(time.monotonic() - begin, 1)
    add_constants(result)
    save(result, args.out)
    print(report.summary(result) if args.out else report.text(result))
    return 0 if not list(report.troubles(result)) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, metavar="PREFIX", help="write PREFIX.json and PREFIX.md; default: print")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=500, help="for all sections; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: PyTorch's twins of the kernels")
    parser.add_argument("--sanitizer", action="store_true", help="instead: tiny cases under compute-sanitizer")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # where a child writes its rows
    args = parser.parse_args(argv)
    args.sections = ["sanitizer"] if args.sanitizer else [name for name in SECTIONS if name in args.sections]
    if args.device == "cpu" and (args.sanitizer or not args.quick):
        parser.error("--device cpu is for --quick alone: there is nothing to measure on it here")
    return args


def turns(names: Sequence[str], seconds: float) -> list[tuple[list[str], float]]:
    """Sections that run at the same time, and the second at which they must be done."""
    found = {name: sections.ALL[name] for name in names}
    groups = [list(group) for _, group in groupby(found, key=lambda name: found[name].turn)]
    shares = [found[group[0]].share for group in groups]
    return [(group, seconds * sum(shares[: n + 1]) / sum(shares)) for n, group in enumerate(groups)]


# ------------------------------------------------------------------------------------------------------------- running


def in_process(name: str, bench: Bench, seconds: float) -> dict[str, Any]:
    register()
    kept: list[dict[str, Any]] = []
    sections.run(name, bench, seconds, kept.append)
    return section_of(kept, "")


def processes(names: Sequence[str], seconds: float, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every section in a process of its own, all at once; one that is not done in time is ended."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in names}
        started = {
            name: subprocess.Popen(command(name, seconds, args, files[name]), cwd=common.ROOT, process_group=0)
            for name in names
        }
        late = time.monotonic() + seconds + GRACE
        try:
            reasons = {name: _ended(process, late) for name, process in started.items()}
        finally:
            for process in started.values():
                _end(process)
        return {name: section_of(_lines(files[name]), reasons[name]) for name in names}


def command(name: str, seconds: float, args: argparse.Namespace, rows: Path) -> list[str]:
    program = [sys.executable, "-m", "benchmarks.gpu", "--rows", str(rows), "--seconds", str(seconds)]
    program += ["--sanitizer"] if name == "sanitizer" else ["--sections", name]
    return [*program, "--device", args.device, *(["--quick"] if args.quick else [])]


def child(args: argparse.Namespace, bench: Bench) -> int:
    """One section, whose rows go into a file as they come."""
    register()
    with args.rows.open("a", encoding="utf-8") as file:

        def keep(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        sections.run(args.sections[0], bench, args.seconds, keep)
    return 0


def register() -> None:
    """Without an installed package nobody has told PyTorch which backend "gns" is."""
    from torch._dynamo.backends import registry

    from gnsfx.backend import gns

    if "gns" not in registry.list_backends(exclude_tags=()):
        registry.register_backend(gns, name="gns")


def section_of(kept: Sequence[dict[str, Any]], reason: str) -> dict[str, Any]:
    """Rows, and what the section says of itself at its end; ``reason``: why it may not have come to that."""
    rows = [row for row in kept if "end" not in row]
    for row in kept:
        if "end" in row:
            return {"rows": rows, "error": row["end"], "warnings": row["warnings"], "seconds": row["seconds"]}
    return {"rows": rows, "error": reason or "it ended in the middle of a case", "warnings": []}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]  # the last line may be half there
    return [json.loads(line) for line in whole.splitlines()]


def _ended(process: subprocess.Popen[bytes], late: float) -> str:
    """Waits, at most until ``late``. Why there may be no end among the rows."""
    try:
        status = process.wait(max(0.0, late - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "ended from outside in the middle of a case, since its time was over"
    return f"its process ended with status {status} in the middle of a case"


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ------------------------------------------------------------------------------------------------------------- results


def add_constants(result: dict[str, Any]) -> None:
    rows = [row for row in result["sections"].get("products", {"rows": []})["rows"] if row.get("times")]
    if rows:
        result["constants"] = products.constants(rows, result["machine"].get("multiprocessors") or 132)


def save(result: Mapping[str, Any], out: Path | None) -> None:
    """Whole files take the place of old ones: whoever looks in between finds one or the other."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    contents = {".json": json.dumps(common.plain(result), indent=1, allow_nan=False), ".md": report.markdown(result)}
    for suffix, text in contents.items():
        unfinished = out.with_name(f"{out.name}.part")
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(out.with_name(out.name + suffix))
