"""An open-loop batch size schedule: a batch size for every number of tokens, or of examples, trained so far.

    linear(16, 256, tokens=1e6):  batch = 16 + (256 - 16) * tokens / 1e6, then 256     rounded to multiples of
    tokens=[(0, 16), (1e6, 64)]:  batch = 16, then 64 from a million tokens on         micro_batch * world_size

Linear in tokens is the schedule of Gray et al., arXiv 2411.00999, figure 9. Their code leaves the learning rate alone:
``lr=None``.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from gnsfx.batch_size.coupling import LearningRate
from gnsfx.batch_size.policy import BatchPolicy, Decision, Stage
from gnsfx.batch_size.unit import BatchUnit
from gnsfx.errors import OptionError, StateError

Table = Iterable[tuple[float, int]]


class BatchSizeSchedule(BatchPolicy):
    """Batch sizes by table, or by :meth:`linear`.

    Args:
        tokens, examples: one of them: pairs (from where on, batch size in examples), in order. Before the first one,
            its batch size holds already.
        micro_batch: examples in one backward pass of one rank.
        world_size: data-parallel ranks; those of the process group unless given.
        lr: how the learning rate follows: ``"sqrt"``, ``"linear"`` or None. The rate to start with belongs to the batch
            size to start with.
        beta2: keep the half-life of beta2 in examples.

    Use::

        schedule = BatchSizeSchedule.linear(16, 256, tokens=1e6, micro_batch=16)
        for _ in range(schedule.accumulation): ...       # in place of a fixed number of micro-batches
        schedule.step(tokens=tokens_of_this_step)        # after optimizer.step()

    counts: "tokens" or "examples".

    Raises:
        OptionError: no such batch size, or a table that is empty or out of order.
    """

    def __init__(
        self,
        *,
        tokens: Table | None = None,
        examples: Table | None = None,
        micro_batch: int,
        world_size: int | None = None,
        lr: LearningRate = "sqrt",
        beta2: bool = True,
    ) -> None:
        unit = BatchUnit.of(micro_batch, world_size)
        self.counts, table = _one_of(tokens, examples)
        points = _points(table, self.counts)
        self._points = [(at, unit.check(batch, f"batch size from {at:,} {self.counts} on")) for at, batch in points]
        self._is_linear = False
        sizes = [batch for _, batch in self._points]
        self._low, self._high = min(sizes), max(sizes)
        super().__init__(unit, sizes[0], lr, beta2)

    @classmethod
    def linear(
        cls,
        start: float,
        end: float,
        *,
        tokens: float | None = None,
        examples: float | None = None,
        after: float = 0,
        micro_batch: int,
        world_size: int | None = None,
        lr: LearningRate = "sqrt",
        beta2: bool = True,
    ) -> BatchSizeSchedule:
        """From ``start`` to ``end`` examples, smaller or larger, over so many tokens (or examples), then ``end``.

        ``after`` as many before, ``start`` holds. Rounded to the nearest possible batch size from start to end.

        Raises:
            OptionError: no possible batch size lies from start to end, or nothing to be linear in.
        """
        by, span = _one_of(tokens, examples)
        if not (0 < span < math.inf and 0 <= after < math.inf):
            raise OptionError(f"linear({by}={span!r}, after={after!r}): expected a positive span and after from 0 on.")
        unit = BatchUnit.of(micro_batch, world_size)
        low, high = unit.inside(min(start, end), max(start, end), f"linear from {start} to {end} examples")
        ends = [(after, unit.nearest(start, low, high)), (after + span, unit.nearest(end, low, high))]
        table: dict[str, Any] = {by: ends}
        self = cls(**table, micro_batch=micro_batch, world_size=unit.world_size, lr=lr, beta2=beta2)
        self._points, self._is_linear = [(after, start), (after + span, end)], True
        self._low, self._high = low, high
        return self

    def batch_size_at(self, *, tokens: float | None = None, examples: float | None = None) -> int:
        """Batch size, in examples, after so many tokens or examples, whichever the schedule counts.

        Raises:
            OptionError: the other unit.
        """
        by, at = _one_of(tokens, examples)
        if by != self.counts:
            raise OptionError(f"batch_size_at({by}=...): this schedule counts {self.counts}.")
        return self.unit.nearest(self._exact(at), self._low, self._high)

    def accumulation_at(self, *, tokens: float | None = None, examples: float | None = None) -> int:
        """Micro-batches of each rank per step, after so many tokens or examples."""
        return self.unit.accumulation(self.batch_size_at(tokens=tokens, examples=examples))

    def fresh(self) -> BatchSizeSchedule:
        """The same schedule, from the beginning."""
        other = copy.copy(self)
        BatchPolicy.__init__(other, self.unit, self._at(0), self._lr, self._beta2)
        return other

    @property
    def plan(self) -> list[Stage]:
        """All batch sizes in order, from the first token or example on, for :mod:`gnsfx.batch_size.export`."""
        found = [(0, self._at(0))]
        ends = [math.ceil(at) for at, _ in self._points]
        for end in ends:
            while (batch := self._at(end)) != found[-1][1]:
                # The first position with another batch size: it is monotone between two points of the table.
                here, there = found[-1][0], end
                while there - here > 1:
                    middle = (here + there) // 2
                    here, there = (middle, there) if self._at(middle) == found[-1][1] else (here, middle)
                found.append((there, self._at(there)))
            found.append((end, batch))
        kept = [pair for i, pair in enumerate(found) if i == 0 or pair[1] != found[i - 1][1]]
        return [Stage(batch, **{self.counts: at}) for at, batch in kept]

    def _at(self, position: float) -> int:
        return self.unit.nearest(self._exact(position), self._low, self._high)

    def _exact(self, position: float) -> float:
        index = bisect_right(self._points, position, key=lambda point: point[0])
        if index == 0 or index == len(self._points) or not self._is_linear:
            return self._points[max(index - 1, 0)][1]
        (x0, y0), (x1, y1) = self._points[index - 1 : index + 1]
        return y0 + (y1 - y0) * (position - x0) / (x1 - x0)

    def _take(self, examples: int, tokens: int | None, seconds: float | None) -> None:
        if self.counts == "tokens" and tokens is None:
            raise OptionError("step(): this schedule counts tokens; give those of this step, step(tokens=...).")

    def _load_extra(self, state: Mapping[str, Any]) -> None:
        if self.counts == "tokens" and state["steps"] and state["tokens"] is None:
            raise StateError("this schedule counts tokens, and the state is of a run that did not count them.")

    def _decide(self) -> Decision:
        position = self.tokens if self.counts == "tokens" else self.examples
        assert position is not None
        batch = self._at(position)
        (x0, y0), (x1, y1) = self._points[0], self._points[-1]
        rule = (
            f"linear from {y0:g} to {y1:g} between {x0:,.0f} and {x1:,.0f} {self.counts}"
            if self._is_linear
            else "by table"
        )
        return Decision(batch, f"after {position:,} {self.counts} the schedule says {batch} examples ({rule}).")


def _one_of(tokens: Any, examples: Any) -> tuple[str, Any]:
    if (tokens is None) == (examples is None):
        raise OptionError(
            "expected either tokens= or examples=, the unit that the schedule counts, not both or neither."
        )
    return ("examples", examples) if tokens is None else ("tokens", tokens)


def _points(table: Table, by: str) -> list[tuple[float, int]]:
    pairs = [*table]
    are_pairs = all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs)
    positions = [pair[0] for pair in pairs] if are_pairs else []
    in_order = all(a < b for a, b in pairwise(positions))
    if not positions or not in_order or not 0 <= positions[0] or not math.isfinite(positions[-1]):
        raise OptionError(f"{by}={pairs!r}: expected pairs ({by}, batch size), {by} rising from 0 or more.")
    return pairs
