"""Measures how fast this machine is, for the choice between paths: ``python -m gnsfx.calibrate``.

    seconds of a path = sum_k amount_k / rate_k     amounts from kernels/cost.py, seconds from the clock  ->  rates

A few contractions of different shapes run on every path, as in a backward pass; the rates are the least-squares solution of
the relative errors, drawn a little to the shipped ones where these shapes say nothing. The result goes into a file
(``$GNSFX_CACHE_DIR``, else ``~/.cache/gnsfx``) that every later run reads. Training never measures by itself. Models
compiled before keep their paths until they are compiled again.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import gnsfx.kernels.ops  # noqa: F401  (defines the ops)
from gnsfx import calibrate_cuda
from gnsfx.kernels.cost import Cost, amounts, matmul_paths, seconds
from gnsfx.kernels.machine import CUDA_KERNELS, Machine, cache_file, default, read, without_missing, write

Shape = tuple[int, int, int, int]
Run = Callable[[], object]
Timer = Callable[[Run], float]
Costs = Callable[[Shape, torch.dtype, torch.device], Mapping[str, Cost]]

SHAPES: Sequence[Shape] = (
    (32, 1, 512, 512), (8, 4, 512, 512), (32, 8, 256, 512), (32, 16, 192, 192), (4, 16, 1024, 2048), (64, 32, 64, 64),
    (8, 64, 512, 512), (4, 128, 640, 640), (24, 128, 640, 640), (8, 256, 256, 256), (4, 512, 192, 512), (2, 1024, 384, 384),
)  # fmt: skip
"""B, T, I, O: short and long positions, narrow and wide layers, products that fit a cache and some that do not."""

FITTED = (
    "flops_fp32", "flops_bf16", "flops_fp64", "fused_fp32", "fused_bf16", "fused_fp64", "operand_bytes", "result_bytes",
    "bandwidth", "cache_bandwidth", "calls", "fresh_bandwidth", *CUDA_KERNELS,
)  # fmt: skip
LIMIT = 45.0
"""Seconds after which no further shape is begun; on a machine that compiles so slowly the rest stays as shipped."""
TRUSTED = 0.3
"""Median error of the fitted model above which it is not kept: idle machines are at a tenth."""
PULL = 0.02
"""Weight of the shipped constants, in measurements: what no shape depends on stays as shipped."""


@dataclass(frozen=True)
class Timing:
    """One path at one shape: its work and the seconds it took."""

    path: str
    cost: Cost
    dtype: torch.dtype
    seconds: float


# --------------------------------------------------------------------------------------------------------- measuring


def paths(x: Tensor, g: Tensor) -> dict[str, Run]:
    """x [B, T, I], g [B, T, O] -> what runs each path; "plain" is the gradient alone."""
    flat, rows = x.flatten(0, 1).t(), g.flatten(0, 1)
    x4, g4, ops = x.unsqueeze(1), g.unsqueeze(1), torch.ops.gnsfx
    rounds = x.dtype in (torch.bfloat16, torch.float16)

    def outer() -> tuple[Tensor, Tensor]:
        return flat @ rows, (x[:, 0].float() ** 2).sum(1) * (g[:, 0].float() ** 2).sum(1)

    def materialise() -> tuple[Tensor, Tensor]:
        stack = torch.bmm(x.mT, g)
        wide = stack.float() if rounds else stack
        return (flat @ rows if rounds else wide.sum(0)), (wide * wide).sum((1, 2))

    found: dict[str, Run] = {
        "plain": lambda: flat @ rows,
        "fused": lambda: ops.mm_sq_norm(x4, g4),
        "ghost": lambda: (flat @ rows, ops.ghost_sq_norm(x4, g4)),
        "materialise": torch.compile(materialise, dynamic=False, fullgraph=True),
    }
    if x.shape[1] == 1:
        found["outer"] = torch.compile(outer, dynamic=False, fullgraph=True)
    return found


def fastest(functions: Mapping[str, Run], timer: Timer, rounds: int) -> dict[str, float]:
    """Seconds of one call of each: they take turns, and the quickest round counts, which others disturb least."""
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            best[name] = min(best[name], timer(function))
    return best


def timer_for(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Seconds of one call, by a clock; on a CUDA device by events on its queue."""
    if device.type == "cuda":
        return calibrate_cuda.events(device)

    def timed(run: Run) -> float:
        start = clock()
        run()
        return clock() - start

    return timed


def factors(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """x [B, T, I], g [B, T, O]."""
    B, T, I, O = shape
    seed = torch.Generator(device).manual_seed(0)
    x, g = (torch.randn(B, T, n, generator=seed, device=device).to(dtype) for n in (I, O))
    return x, g


def measure(
    device: torch.device,
    machine: Machine,
    shapes: Sequence[tuple[Shape, torch.dtype]],
    timer: Timer,
    rounds: int = 7,
    runs: Callable[[Tensor, Tensor], Mapping[str, Run]] = paths,
    costs: Costs | None = None,
    follow: Callable[[Sequence], Iterable] = iter,
) -> list[Timing]:
    """Time every path at every shape; ``costs`` are those of what ``runs`` runs, without them the ordinary paths'."""
    timings, costs = probes(device, timer, rounds), costs or functools.partial(costs_of, machine)
    late = time.monotonic() + LIMIT
    for shape, dtype in follow(shapes):
        if time.monotonic() > late:
            break
        torch.compiler.reset()
        known = costs(shape, dtype, device)
        times = fastest(runs(*factors(shape, dtype, device)), timer, rounds)
        timings += [Timing(path, known[path], dtype, taken) for path, taken in times.items()]
    return timings


def costs_of(machine: Machine, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Cost]:
    B, T, I, O = shape
    return matmul_paths(B, 1, T, I, O, dtype.itemsize, device.type, machine.fused(dtype) > 0)


def probes(device: torch.device, timer: Timer, rounds: int) -> list[Timing]:
    """What no path has alone: a copy through memory, and operations with nothing to do."""
    size, few = 1 << (30 if device.type == "cuda" else 26), 20
    source, target, one = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (size, size, 1))
    functions = {"copy": lambda: target.copy_(source), "calls": lambda: [one.add_(0) for _ in range(few)]}
    work = {"copy": Cost(bytes=2 * size), "calls": Cost(calls=few)}
    times = fastest(functions, timer, rounds)
    return [Timing(name, work[name], torch.float32, taken) for name, taken in times.items()]


# ----------------------------------------------------------------------------------------------------------- fitting


def fit(timings: Sequence[Timing], start: Machine) -> Machine:
    """The constants that explain the timings best, in relative errors; all positive, near those of ``start`` where free."""
    names = [name for name in FITTED if getattr(start, name)]
    scale = torch.tensor([1 / getattr(start, name) for name in names], dtype=torch.float64)
    rows = []
    for timing in timings:
        work = amounts(timing.cost, start, timing.dtype)
        rows.append([work.get(name, 0.0) / timing.seconds for name in names])
    # unknown: how many times slower than shipped each rate is
    A = torch.tensor(rows, dtype=torch.float64).view(-1, len(names)) * scale
    gram = A.T @ A + PULL * torch.eye(len(names), dtype=torch.float64)
    right = A.sum(0) + PULL
    slower = torch.ones(len(names), dtype=torch.float64)
    for _ in range(2000):  # coordinate descent; the problem is convex
        for k in range(len(names)):
            rest = right[k] - gram[k] @ slower + gram[k, k] * slower[k]
            slower[k] = (rest / gram[k, k]).clamp(min=1e-2)
    rates = {name: 1 / float(s * f) for name, s, f in zip(names, scale, slower, strict=True)}
    return replace(start, **rates, measured=True)


def fit_table(rows: Iterable[Mapping[str, Any]], multiprocessors: int, start: Machine) -> Machine:
    """The constants of a CUDA device from a table of seconds, as benchmarks/gpu makes them: rows with ``B``, ``T``, ``I``, ``O``
    and ``times``, seconds by way ("plain", "fused N", "ghost N", "materialise"), in 16 bits."""
    found = calibrate_cuda.of_rows(rows, multiprocessors)
    return fit([Timing(way, known, torch.bfloat16, taken) for way, known, taken in found], start)


def errors(timings: Sequence[Timing], machine: Machine) -> list[float]:
    """|modelled - measured| / measured of every timing."""
    return [abs(seconds(t.cost, machine, t.dtype) / t.seconds - 1) for t in timings]


# ----------------------------------------------------------------------------------------------------------- program


def programs(device: torch.device) -> tuple[Callable[[Tensor, Tensor], Mapping[str, Run]], Costs | None]:
    """What runs on such a device, and what it costs."""
    return (calibrate_cuda.runs, calibrate_cuda.costs) if device.type == "cuda" else (paths, None)


def shapes_for(device: torch.device) -> list[tuple[Shape, torch.dtype]]:
    """On a CPU all in fp32, some in bf16, a few in fp64: compiling "materialise" is what takes the time."""
    if device.type == "cuda":
        return [(shape, dtype) for dtype, shapes in calibrate_cuda.SHAPES.items() for shape in shapes]
    picked = {torch.float32: SHAPES, torch.bfloat16: SHAPES[::3], torch.float64: SHAPES[3:8:4]}
    return [(shape, dtype) for dtype, shapes in picked.items() for shape in shapes]


def follow(items: Sequence) -> Iterator:
    """Shows how far it is: a bar of ``rich`` where that is installed, else a line that counts."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        yield from _count(items)
        return
    yield from track(items, "measuring", console=Console(stderr=True), transient=True)


def _count(items: Sequence) -> Iterator:
    for i, item in enumerate(items, 1):
        print(f"\rmeasuring {i}/{len(items)}", end="", file=sys.stderr, flush=True)
        yield item
    print(file=sys.stderr)


def table(device_type: str, found: Machine) -> str:
    """The constants beside those that are shipped."""
    shipped = default(device_type)
    lines = [f"{'per second':18}{'shipped':>12}{'here':>12}"]
    for name in FITTED:
        if device_type == "cuda" or name not in CUDA_KERNELS:
            lines.append(f"{name:18}{getattr(shipped, name):12.3g}{getattr(found, name):12.3g}")
    return "\n".join(lines)


def show(device_type: str) -> str:
    found, path = read(device_type), cache_file(device_type)
    if found is None:
        return f"{table(device_type, default(device_type))}\nas shipped: nothing usable in {path}"
    return f"{table(device_type, found)}\nread from {path}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gnsfx.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default %(default)s")
    parser.add_argument("--show", action="store_true", help="print the constants in force; measure nothing")
    parser.add_argument("--rounds", type=int, default=7, help="of which the quickest counts; default %(default)s")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: as many as it takes")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.show:
        print(show(args.device))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gnsfx.calibrate: there is no CUDA device here; expected one for --device cuda.", file=sys.stderr)
        return 2
    device, shipped = torch.device(args.device), without_missing(default(args.device), args.device)
    start = time.perf_counter()
    timings = measure(device, shipped, shapes_for(device), timer_for(device), args.rounds, *programs(device), follow)
    found = fit(timings, shipped)
    print(table(args.device, found))
    off = statistics.median(errors(timings, found))
    print(f"{len(timings)} timings in {time.perf_counter() - start:.0f} s; the model is off by {off:.0%} in the median")
    if off > TRUSTED:
        print(
            f"gnsfx.calibrate: nothing was kept: more than {TRUSTED:.0%} off, as on a machine that is busy with other "
            "work. Run it again when that is done.",
            file=sys.stderr,
        )
        return 1
    try:
        print(f"written to {write(found, args.device)}")
    except OSError as error:
        print(
            f"gnsfx.calibrate: nothing was kept: {error}. Set GNSFX_CACHE_DIR to a folder that can be written.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
