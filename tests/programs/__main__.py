"""The long run: many random programs against per-example autograd.

    python -m tests.programs --seeds 0:5000 --jobs 2 --out runs/programs    resumes where it stopped
    python -m tests.programs --show 123                                     the program as text, and its outcome
    python -m tests.programs --shrink 123                                   its shortest beginning with that outcome

``--out`` gets ``outcomes.jsonl``, a line per program, and ``summary.md``. Exit status 1 if any program was not clean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BAD = ("wrong", "gradient", "error", "invalid")
PER_PROCESS = 250
"""A process is replaced after so many programs: compiling leaks a little."""
PATIENCE = 180.0
"""Seconds without a result after which a process is given up."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.programs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0:300", help="first:end")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/programs"))
    parser.add_argument("--inner", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--show", type=int)
    parser.add_argument("--shrink", type=int)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.show is not None or options.shrink is not None:
        return look(options)
    first, end = map(int, options.seeds.split(":"))
    if options.worker:
        return work(range(first, end), options.inner)
    return run(range(first, end), options)


def look(options: argparse.Namespace) -> int:
    from tests.programs.check import check
    from tests.programs.generate import generate

    program = generate(options.show if options.show is not None else options.shrink)
    outcome = check(program, options.inner)
    if options.shrink is not None:
        for length in range(9):
            shorter = generate(options.shrink, length)
            found = check(shorter, options.inner)
            if (found.kind, bool(found.refused)) == (outcome.kind, bool(outcome.refused)):
                program, outcome = shorter, found
                break
    print(program)
    print(json.dumps(asdict(outcome), indent=1))
    return int(outcome.kind in BAD)


def work(seeds: range, inner: str) -> int:
    """A process of the long run: a line of JSON per program."""
    from tests.programs.check import Outcome, check
    from tests.programs.generate import generate

    logging.disable(logging.WARNING)
    for seed in seeds:
        try:
            outcome = check(generate(seed), inner)
        except Exception as error:
            outcome = Outcome(seed, "invalid", f"{type(error).__name__}: {error}")
        print(json.dumps(asdict(outcome)), flush=True)
    return 0


def run(seeds: range, options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "outcomes.jsonl"
    done = {o["seed"]: o for o in read(log)}
    missing = [s for s in seeds if s not in done]
    pieces: queue.Queue[list[int]] = queue.Queue()
    for piece in consecutive(missing, PER_PROCESS):
        pieces.put(piece)
    results: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threads = [
        threading.Thread(target=serve, args=(pieces, results, options.inner), daemon=True) for _ in range(options.jobs)
    ]
    for thread in threads:
        thread.start()
    running, start = len(threads), time.monotonic()
    with log.open("a", encoding="utf-8") as file, progress(len(missing)) as advance:
        while running:
            outcome = results.get()
            if outcome is None:
                running -= 1
                continue
            done[outcome["seed"]] = outcome
            file.write(json.dumps(outcome) + "\n")
            file.flush()
            advance(outcome)
    outcomes = [done[s] for s in seeds if s in done]
    text = summary(seeds, outcomes, time.monotonic() - start if missing else 0.0, len(missing))
    (options.out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    return int(len(outcomes) < len(seeds) or any(o["kind"] in BAD for o in outcomes))


def read(log: Path) -> Iterator[dict[str, Any]]:
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that was stopped
                yield json.loads(line)


def consecutive(seeds: list[int], most: int) -> Iterator[list[int]]:
    piece: list[int] = []
    for seed in seeds:
        if piece and (seed != piece[-1] + 1 or len(piece) == most):
            yield piece
            piece = []
        piece.append(seed)
    if piece:
        yield piece


def serve(pieces: queue.Queue, results: queue.Queue, inner: str) -> None:
    """Feed processes with seeds; one that dies or hangs costs the program it was at."""
    while True:
        try:
            piece = pieces.get_nowait()
        except queue.Empty:
            results.put(None)
            return
        at, end = piece[0], piece[-1] + 1
        while at < end:
            lines, process = start_worker(at, end, inner)
            while (line := next_line(lines)) is not None:
                results.put(json.loads(line))
                at += 1
            process.kill()
            if at < end:
                code = process.wait()
                results.put({"seed": at, "kind": "error", "detail": f"the process ended with {code} or hung", "parameters": 0,
                             "measured": 0, "coupled": False, "refused": {}, "seconds": PATIENCE})  # fmt: skip
                at += 1


def start_worker(at: int, end: int, inner: str) -> tuple[queue.Queue[str | None], subprocess.Popen]:
    command = [sys.executable, "-m", "tests.programs", "--worker", "--seeds", f"{at}:{end}", "--inner", inner]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"seed"'):
                lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    return lines, process


def next_line(lines: queue.Queue[str | None]) -> str | None:
    try:
        return lines.get(timeout=PATIENCE)
    except queue.Empty:
        return None


@contextlib.contextmanager
def progress(total: int) -> Iterator[Any]:
    """``advance(outcome)``: a bar where rich is installed, else a line now and then."""
    counts: Counter[str] = Counter()

    def told(outcome: dict[str, Any]) -> str:
        counts[outcome["kind"]] += 1
        return ", ".join(f"{n} {kind}" for kind, n in counts.items())

    try:
        from rich.progress import Progress
    except ImportError:

        def advance(outcome: dict[str, Any]) -> None:
            text = told(outcome)
            if counts.total() % 100 == 0 or outcome["kind"] in BAD:
                print(f"{counts.total()}/{total}: {text}", flush=True)

        yield advance
        return
    with Progress() as bar:
        task = bar.add_task("programs", total=total)

        def advance_bar(outcome: dict[str, Any]) -> None:
            bar.update(task, advance=1, description=told(outcome))
            if outcome["kind"] in BAD:
                bar.console.print(f"{outcome['seed']} {outcome['kind']}: {outcome['detail'][:200]}", markup=False)

        yield advance_bar


def summary(seeds: range, outcomes: list[dict[str, Any]], seconds: float, ran: int) -> str:
    kinds = Counter(o["kind"] for o in outcomes)
    apart = [o for o in outcomes if not o["coupled"] and o["kind"] != "skipped"]
    coupled = [o for o in outcomes if o["coupled"]]
    total, refused = sum(o["parameters"] for o in apart), sum(len(o["refused"]) for o in apart)
    lines = [
        f"# Random programs, seeds {seeds.start} to {seeds.stop - 1}",
        f"{len(outcomes)} programs: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()),
        f"Programs whose examples do not interact: {len(apart)}, {total} parameters, {refused} refused ({refused / max(total, 1):.2%})",
        f"Programs whose examples interact: {len(coupled)}, {sum(o['parameters'] for o in coupled)} parameters, "
        f"{sum(len(o['refused']) for o in coupled)} refused",
    ]
    if ran:
        lines.append(f"{ran} run now in {seconds:.0f} s, {ran / seconds:.2f} a second")
    for title, group in (("do not interact", apart), ("interact", coupled)):
        reasons: dict[str, list[int]] = {}
        for o in group:
            for reason in o["refused"].values():
                reasons.setdefault(general(reason), []).append(o["seed"])
        lines += [
            "",
            f"## Refusals where examples {title}",
            *(
                f"- {len(s)}: {r} (seeds {sorted(set(s))[:6]})"
                for r, s in sorted(reasons.items(), key=lambda x: -len(x[1]))
            ),
        ]
    lines += [
        "",
        "## Not clean",
        *(f"- {o['seed']} {o['kind']}: {o['detail'][:300]}" for o in outcomes if o["kind"] in (*BAD, "torch")),
    ]
    return "\n".join(lines) + "\n"


def general(reason: str) -> str:
    """A reason without its line, sizes and names."""
    reason = re.sub(r" \(at ([^,)]*).*", r" (\1)", reason, flags=re.S)
    return re.sub(r"\[[^]]*\]", "[...]", re.sub(r"\bs\d+\b", "s", reason))[:200]


if __name__ == "__main__":
    sys.exit(main())
