"""Which gradients were zeroed since the last backward, where ``.grad`` is not None.

    zero_grad(set_to_none=False)     the gradient is all zero: one pass over those that were written to, no host sync
    sharded gradients                a part may be zero where the rest is not: refused instead
    measured in some steps only      norms of other graphs end with the gradients that they belong to

A gradient that is None is seen where a backward begins, in :mod:`gnsfx.leaves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gnsfx._torch import never_trace
from gnsfx._torch_distributed import is_dtensor
from gnsfx.tracked import MEASURED, Tracked

if TYPE_CHECKING:
    from gnsfx.leaves import Collector

never_trace(__name__)
ZEROED_IN_PARTS = (
    "its sharded gradient was written to between two backward passes, and whether it was zeroed cannot be told from one shard; use "
    "zero_grad(set_to_none=True), or call noise.step() once per step"
)


def first_gradient(collector: Collector) -> Tensor | None:
    """The largest number in the first gradient that is there and not from another graph in this step: one tells whether
    all were zeroed."""
    for slot, parameter, others in collector.live():
        grad = parameter.grad
        if grad is None or grad.layout is not torch.strided or not all(c.taken for c, _ in others):
            continue
        if collector.tracked[slot].parts != MEASURED:  # another pass of this step, that did not measure it
            continue
        return None if is_dtensor(grad) else torch.linalg.vector_norm(grad.detach(), float("inf"))
    return None


def expect_untouched(tracked: Tracked, holders: Sequence[tuple[Collector, int]]) -> None:
    """A part of a gradient may be zero where the rest is not, so zeroing in place cannot be seen here: what is held of
    before may or may not belong to the gradient still."""
    if tracked.settled != tracked.stamp():
        for collector, at in holders:
            if collector.leaf.grad is not None:
                collector.refused[at] = ZEROED_IN_PARTS


def begin_unselected(unselected: Sequence[tuple[int, Tracked]], stale: dict[Collector, list[int]]) -> None:
    """What other graphs measured of parameters that one was told not to measure ends with their gradients."""
    doubtful: list[Tracked] = []
    for _, tracked in unselected:
        grads = tracked.gradients()
        if grads and tracked.parts & MEASURED and tracked.fsdp is None:
            doubtful.append(tracked)
        elif not grads:
            for collector, at in tracked.collectors:
                if collector.leaf.grad is not None:
                    stale.setdefault(collector, []).append(at)
    # Only where a step was measured otherwise than the last, and zeroed without set_to_none, or not at all:
    if doubtful:
        grads = [grad for tracked in doubtful for grad in tracked.gradients()]
        norms = torch._foreach_norm(grads, float("inf"))  # pyright: ignore[reportPrivateImportUsage]
        for tracked, norm in zip(doubtful, torch.stack([n.double() for n in norms]).tolist(), strict=True):
            if not norm:
                tracked.reset()
                for collector, at in tracked.collectors:
                    stale.setdefault(collector, []).append(at)


def clear_zeroed(collector: Collector, slots: list[int]) -> None:
    """``zero_grad(set_to_none=False)``: gradients that are all zero start anew. One pass over them, no host sync."""
    live = [(s, p) for s in slots if (p := collector.parameters[s]()) is not None and p.grad is not None]
    grads: list[Any] = [p.grad for _, p in live]
    norms = torch._foreach_norm(grads, float("inf"))  # pyright: ignore[reportPrivateImportUsage]
    zeroed = torch.stack([n.to(torch.float32) for n in norms]) == 0
    holders = {c for s, _ in live for c, _ in collector.tracked[s].collectors}
    on_host = any(c.refused or c.per_example or c._backwards for c in holders)
    if on_host or any(collector.tracked[s].parts & ~MEASURED for s, _ in live):  # must follow, by a synchronisation
        gone: dict[Collector, list[int]] = {}
        for (slot, _), zero in zip(live, zeroed.tolist(), strict=True):
            if zero:
                collector.tracked[slot].reset()
                for holder, at in collector.tracked[slot].collectors:
                    gone.setdefault(holder, []).append(at)
        for holder, at in gone.items():
            holder.clear(at)
    for position, (slot, _) in enumerate(live):
        for holder, at in collector.tracked[slot].collectors:
            total = holder.leaf.grad
            if total is not None:
                total[:, at] = torch.where(zeroed[position], torch.zeros_like(total[:, at]), total[:, at])
            if (entries := holder.entries_of(at)) is not None:
                entries.masked_fill_(zeroed[position], 0)
