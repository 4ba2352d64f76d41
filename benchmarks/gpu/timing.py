"""Seconds of work on a device, without what the host needs to start it: calls recorded as a CUDA graph, medians of replays.

Calls take turns over several sets of arguments that together are larger than the L2 cache, as they would be in training,
and their results lie apart.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.bench import Bench

L2_BYTES = 64 << 20
CALLS = 64  # of a graph, at most
GRAPH = 2e-3  # seconds that a graph should run, so that its start does not count
ROUNDS = 200


def copies(bench: Bench, make: Callable[[], Any], bytes_each: int) -> list[Any]:
    """As many sets of arguments as the cache cannot hold twice."""
    count = -(-2 * L2_BYTES // max(bytes_each, 1)) if bench.cuda else 1
    return [make() for _ in range(min(CALLS, max(2, count)))]


def seconds(bench: Bench, call: Callable[..., Any], sets: Sequence[Any], budget: float = 0.12) -> float:
    """Of one call: the median over about ``budget`` seconds, after some that do not count."""
    for arguments in [*sets, *sets][:4]:
        call(*arguments)
    if not bench.cuda:
        return _on_host(call, sets, 0.02 if bench.quick else budget)
    each = _queued(call, sets, 1)
    count = max(len(sets), min(CALLS, int(GRAPH / max(each, 1e-6))))
    rounds = max(5, min(ROUNDS, int(budget / max(each * count, 1e-6))))
    try:
        graph = _record(call, [sets[turn % len(sets)] for turn in range(count)])
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"timed with the host's share, since no CUDA graph could be made: {reason}", stacklevel=2)
        return _queued(call, sets, rounds)
    graph.replay()
    return statistics.median(_between_events(graph.replay) for _ in range(rounds)) / count


def copy_rate(bench: Bench) -> float:
    """Bytes per second, read and written, of a plain copy far larger than the cache."""
    size = 1 << 30 if bench.cuda else 1 << 22
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * size / seconds(bench, target.copy_, [(source,)])


def _record(call: Callable[..., Any], arguments: Sequence[Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    results = []
    with torch.cuda.graph(graph):
        for each in arguments:
            results.append(call(*each))  # kept: memory that is free again would be written twice, in the cache
    return graph


def _queued(call: Callable[..., Any], sets: Sequence[Any], rounds: int) -> float:
    def once() -> None:
        for arguments in sets:
            call(*arguments)

    return statistics.median(_between_events(once) for _ in range(rounds)) / len(sets)


def _between_events(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _on_host(call: Callable[..., Any], sets: Sequence[Any], budget: float) -> float:
    taken: list[float] = []
    while not taken or (sum(taken) < budget and len(taken) < ROUNDS):
        start = time.perf_counter()
        call(*sets[len(taken) % len(sets)])
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
