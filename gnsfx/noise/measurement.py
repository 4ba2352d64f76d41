"""What one step measured, by itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gnsfx import collector
from gnsfx.errors import NotMeasuredError
from gnsfx.noise import estimators, intervals
from gnsfx.noise.gather import Weights
from gnsfx.noise.groups import NOTHING, GroupStats, describe


class StepMeasurement:
    """What one step measured, by itself: unbiased and noisy. Reading the first value is one transfer."""

    def __init__(
        self,
        total: Callable[[], Tensor],
        sq_norms: Callable[[], Tensor] | None,
        weights: Sequence[Tensor] | None,
        estimated: Tensor | None = None,
    ) -> None:
        """``total``: [4], tr(Sigma), |G|^2, degrees of freedom and the number of examples. ``sq_norms``: [n], |c_b|^2. Both are
        worked out when they are asked for. ``estimated``: 0-d, the variance of their sum as far as they are estimates."""
        self._total, self._sq_norms, self._weights, self._estimated = total, sq_norms, weights, estimated
        self._tensor: Tensor | None = None
        self._values: tuple[float, float, float, int] | None = None

    def _read(self) -> tuple[float, float, float, int]:
        if self._values is None:
            tr_sigma, g_sq, freedom, examples = self.values.tolist()
            used = freedom > 0
            self._values = tr_sigma if used else math.nan, g_sq if used else math.nan, freedom, int(examples)
        return self._values

    @property
    def values(self) -> Tensor:
        """[4] on the device: tr(Sigma), |G|^2, degrees of freedom, 0 where the step could not be used, and examples."""
        if self._tensor is None:
            with torch.no_grad():
                self._tensor = self._total()
        return self._tensor

    @property
    def tr_sigma(self) -> float:
        """tr(Sigma) from this step alone; NaN if it could not be used (fewer than two examples, or not finite)."""
        return self._read()[0]

    @property
    def g_sq(self) -> float:
        """|G|^2 from this step alone. Unbiased: averages of it are right because it may be negative."""
        return self._read()[1]

    @property
    def b_simple(self) -> float:
        """Their ratio, in examples; NaN where ``g_sq`` is not positive. Never average it: read ``NoiseScale``."""
        return estimators.noise_scale(self.tr_sigma, self.g_sq)

    @property
    def freedom(self) -> float:
        """1/W2 - 1, the weight of this step in averages: one less than the number of examples that count the same."""
        return self._read()[2]

    @property
    def examples(self) -> int:
        """Examples in the step, over all its micro-batches and ranks; 0 if a gradient was not finite."""
        return self._read()[3]

    def interval(self, level: float = 0.95) -> intervals.Interval:
        """Interval of ``b_simple`` from this step alone: conservative, see :func:`gnsfx.noise.intervals.one_step`.

        Raises:
            NotMeasuredError: the norms of single examples were not kept, or the step is one of several ranks.
        """
        if self._sq_norms is None:
            raise NotMeasuredError(
                "an interval from one step needs the norms of single examples, on one rank: compile with "
                'options={"gns.per_example": True}. NoiseScale.interval() needs several steps instead.'
            )
        tr_sigma, g_sq, freedom, _ = self._read()
        sq_norms = self._sq_norms().tolist()
        if not freedom > 0 or math.isnan(tr_sigma):
            return intervals.UNKNOWN
        weights = None if self._weights is None else torch.cat([w.flatten() for w in self._weights]).tolist()
        grad_sq = g_sq * freedom / (1 + freedom) + math.fsum(sq_norms)
        extra = 0.0 if self._estimated is None else float(self._estimated)
        return intervals.one_step(sq_norms, grad_sq, weights, level, extra)

    def __repr__(self) -> str:
        tr_sigma, g_sq, _, examples = self._read()
        stats = NOTHING if math.isnan(g_sq) else GroupStats(tr_sigma, g_sq, 1, 0)
        return f"StepMeasurement({examples} examples, {describe(stats)})"


def per_example(found: collector.Totals, loss_scale: float | Tensor) -> Callable[[], Tensor] | None:
    """|c_b|^2 over all measured parameters, [n], over the micro-batches in turn, when it is called; None where single norms
    are not kept."""
    if not found.collectors or not all(leaf.per_example for leaf in found.collectors):
        return None
    slots: dict[collector.Collector, list[int]] = {}
    for places in found.places:
        for leaf, slot in places:
            slots.setdefault(leaf, []).append(slot)
    passes: dict[int, list[tuple[tuple[int, ...], Tensor]]] = {}
    for leaf, measured in slots.items():
        backwards = [backward for backward, _ in leaf.backwards(range(len(leaf.parameters)))]
        rows = [x.grad for x in leaf.per_example]
        if len(rows) != len(backwards):
            return None
        for backward, row in zip(backwards, rows, strict=True):
            if row is None or (backward in passes and passes[backward][0][1].shape[1] != row.shape[1]):
                return None
            passes.setdefault(backward, []).append((tuple(measured), row))
    scale = loss_scale.clone() if isinstance(loss_scale, Tensor) else loss_scale  # a GradScaler writes to its own
    return functools.partial(_sum_of_rows, [passes[b] for b in sorted(passes)], scale) if passes else None


def _sum_of_rows(passes: Sequence[Sequence[tuple[tuple[int, ...], Tensor]]], loss_scale: float | Tensor) -> Tensor:
    sums = []
    for graphs in passes:
        own = [row.index_select(0, collector.index(measured, row.device)) for measured, row in graphs]
        # -inf where only the graph knows that it is refused
        sums.append(functools.reduce(torch.add, [torch.where(rows >= 0, rows, 0).sum(0) for rows in own]))
    return torch.cat(sums) / loss_scale / loss_scale


def variance_of_estimates(found: collector.Totals, loss_scale: float | Tensor) -> Tensor | None:
    """Of q over all measured parameters, 0-d: their errors are independent. None where everything is exact."""
    return None if found.variances is None else found.variances.sum() / loss_scale**4


def weights_of(found: collector.Totals, weights: Weights | None, reduction: str) -> Sequence[Tensor] | None:
    """What each example counts, up to a factor; None: all the same."""
    if weights is not None:
        return [weights] if isinstance(weights, Tensor) else list(weights)
    sizes = found.micro_batches
    if reduction == "sum" or len(set(sizes)) < 2 or None in sizes:
        return None
    return [torch.full((b,), 1 / b) for b in sizes if b]
