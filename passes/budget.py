"""Which parameters are estimated, and from how much, so that measuring keeps within a share of the step's time.

    seconds to spend     budget * (plain seconds of the graph) - what has no estimate
    cheapest first       exact as long as the least estimates of all others still fit
    the others           from m of B examples, each by r random columns (kernels/sketch.py) or exactly (r = 0):
                         the least first; then, as long as seconds are left, the step that takes off most variance per second

Variances are compared as var(m, r) = (1 - m/B) / m + 2 / (m r) in units of s^2, for s ~ numbers of the parameter: norms that
scatter as much as they are large, contributions of rank one (the worst case of a sketch). This only decides where the time
goes: the variance that is reported is measured.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from gnsfx.kernels import cost
from gnsfx.kernels.cost import Cost
from gnsfx.kernels.machine import machine_for

LEAST = 2  # of fewer examples or columns no variance can be had
WORTH = 0.5  # an estimate that takes more than this of the exact norms does not pay for its variance
MOST_COLUMNS = 64
# Torch operations dispatched: to draw signs and multiply by them; to pick examples and scatter their estimates.
_CALLS_OF_SKETCH, _CALLS_OF_SAMPLE, _CALLS_OF_EXAMPLE = 60, 40, 4


@dataclass(frozen=True, slots=True)
class Work:
    """What estimating one gradient takes. Sizes are hints.

    Attributes:
        examples: B.
        column: one random column of all examples.
        bytes: of both factors of one example.
        norms: the exact norms of all examples by themselves, beside the gradient.
    """

    examples: int
    column: Cost
    bytes: float
    norms: Cost
    dtype: torch.dtype
    device: str

    def cost(self, examples: int, columns: int) -> Cost:
        """Of an estimate; 0 columns: the examples are exact."""
        m = min(examples, self.examples)
        drawn = Cost(calls=_CALLS_OF_SAMPLE + _CALLS_OF_EXAMPLE * m) if m < self.examples else Cost()
        if not columns:
            return drawn + times(self.norms, m / self.examples)
        sketch = Cost(bytes=m * self.bytes, calls=_CALLS_OF_SKETCH) + times(self.column, m / self.examples * columns)
        return drawn + replace(sketch, calls=_CALLS_OF_SKETCH + columns * self.column.calls)

    def seconds(self, amount: Cost) -> float:
        return cost.seconds(amount, machine_for(self.device), self.dtype)


def times(amount: Cost, factor: float) -> Cost:
    """Of so many times the work, by as many operations."""
    more = {f.name: getattr(amount, f.name) * factor for f in fields(Cost) if f.name != "calls"}
    return replace(amount, **more)


@dataclass(frozen=True, slots=True)
class Estimate:
    """From so many ``examples`` of ``of``, each by ``columns`` random columns, exactly where that is 0."""

    examples: int
    columns: int
    of: int
    seconds: float
    cost: Cost
    reason: str = ""

    @property
    def path(self) -> str:
        """As coverage calls it."""
        subsample = f"subsample m={self.examples} of {self.of}" if self.examples < self.of else ""
        sketch = f"sketch r={self.columns}" if self.columns else ""
        return " + ".join(filter(None, (subsample, sketch)))

    @property
    def variance(self) -> float:
        """Relative, as the module docstring has it."""
        first = (1 - self.examples / self.of) / self.examples
        return first + (2 / (self.examples * self.columns) if self.columns else 0.0)


@dataclass(frozen=True, slots=True)
class Item:
    """A parameter to measure: its numbers, the seconds that measuring it exactly adds, and the work of estimating it, if that
    is possible."""

    slot: int
    numbers: float
    exact: float
    work: Work | None


@dataclass(frozen=True, slots=True)
class Spending:
    """What was decided: slot -> estimate, and, where even the least is more than the budget, by how much."""

    estimates: Mapping[int, Estimate]
    excess: str = ""


def spend(items: Sequence[Item], plain: float, budget: float, whole_batch: bool = False) -> Spending:
    """Which of the items are estimated, and how.

    Args:
        plain: seconds of the step without norms.
        budget: share of it to spend.
        whole_batch: an estimate of every example is asked for, so none may be left out.
    """
    ladders = {item.slot: steps for item in items if (steps := _ladder(item, whole_batch))}
    left = budget * plain - sum(item.exact for item in items if item.slot not in ladders)
    by_cost = sorted((item for item in items if item.slot in ladders), key=lambda item: item.exact)
    least = sum(ladders[item.slot][0].seconds for item in by_cost)
    estimated = by_cost
    for i, item in enumerate(by_cost):
        least -= ladders[item.slot][0].seconds
        if item.exact + least > left:
            break
        left -= item.exact
        estimated = by_cost[i + 1 :]
    weights = {item.slot: item.numbers**2 for item in estimated}
    chosen = _climb({item.slot: ladders[item.slot] for item in estimated}, weights, left)
    spent = sum(chosen[i.slot].seconds if i.slot in chosen else i.exact for i in items)
    excess = f"the least that measuring takes is {_percent(spent, plain)} of the step" if spent > budget * plain else ""
    exact = {item.slot: item.exact for item in items}
    reasons = {
        slot: f"gns.budget={budget:g}: exactly it would take {_percent(exact[slot], plain)} of the step"
        for slot in chosen
    }
    return Spending(
        {s: replace(e, reason="; ".join(filter(None, (reasons[s], excess)))) for s, e in chosen.items()},
        f"gns.budget={budget:g}: {excess}" if excess else "",
    )


def _percent(seconds: float, plain: float) -> str:
    return f"{seconds / plain:.2%}" if plain > 0 else "all"


def _ladder(item: Item, whole_batch: bool) -> list[Estimate]:
    """The estimates that are worth it, from the cheapest: more seconds, less variance, and ever less of it
    per second (the lower convex hull)."""
    work = item.work
    if work is None or work.examples < LEAST:
        return []
    B = work.examples
    sizes = [B] if whole_batch else [*_doubling(LEAST, B), B]
    columns = _doubling(LEAST, MOST_COLUMNS + 1)
    pairs = [(m, r) for m in sizes for r in (*columns, 0) if r or m < B]
    costs = [work.cost(m, r) for m, r in pairs]
    found = [Estimate(m, r, B, work.seconds(c), c) for (m, r), c in zip(pairs, costs, strict=True)]
    steps: list[Estimate] = []
    for new in sorted((e for e in found if e.seconds <= WORTH * item.exact), key=lambda e: (e.seconds, e.variance)):
        if steps and new.variance >= steps[-1].variance:
            continue
        while len(steps) > 1 and _gain(steps[-2], steps[-1]) <= _gain(steps[-1], new):
            steps.pop()
        steps.append(new)
    return steps


def _doubling(first: int, end: int) -> list[int]:
    sizes = [first]
    while sizes[-1] * 2 < end:
        sizes.append(sizes[-1] * 2)
    return [size for size in sizes if size < end]


def _gain(low: Estimate, high: Estimate) -> float:
    """Variance taken off per second."""
    return (low.variance - high.variance) / max(high.seconds - low.seconds, 1e-12)


def _climb(ladders: Mapping[int, list[Estimate]], weights: Mapping[int, float], left: float) -> dict[int, Estimate]:
    """The first rung of every ladder, then the best next one for as long as ``left`` seconds last."""
    chosen = {slot: steps[0] for slot, steps in ladders.items()}
    left -= sum(estimate.seconds for estimate in chosen.values())

    def next_of(slot: int, rung: int) -> list[tuple[float, int, int]]:
        steps = ladders[slot]
        return [(-weights[slot] * _gain(steps[rung], steps[rung + 1]), slot, rung + 1)] if rung + 1 < len(steps) else []

    heap = [entry for slot in ladders for entry in next_of(slot, 0)]
    heapq.heapify(heap)
    while heap:
        _, slot, rung = heapq.heappop(heap)
        extra = ladders[slot][rung].seconds - chosen[slot].seconds
        if extra <= left:
            chosen[slot], left = ladders[slot][rung], left - extra
            for entry in next_of(slot, rung):
                heapq.heappush(heap, entry)
    return chosen
