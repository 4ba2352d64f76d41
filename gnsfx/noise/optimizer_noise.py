"""The noise scale that the optimizer sees: the pair of :mod:`gnsfx.noise.preconditioned`, averaged over steps like the plain one.

series [9, 2]     the sum over all parameters, and over those for which it is exact
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from gnsfx import collector
from gnsfx.errors import OptionError, StateError
from gnsfx.noise import estimators, series
from gnsfx.noise.groups import GroupStats
from gnsfx.noise.preconditioned import Terms, terms
from gnsfx.noise.tracking import Taken


@dataclass(frozen=True, slots=True)
class OptimizerStats(GroupStats):
    """In units of the preconditioned gradient squared.

    exact_share: share of ``tr_sigma`` that is exact; the rest assumes that all numbers of one parameter have the same noise
    scale.
    """

    exact_share: float = 0.0


class OptimizerNoise:
    """What is kept of it.

    Raises:
        OptionError: a power other than 1 and 2.
    """

    def __init__(self, optimizer: Optimizer, power: int) -> None:
        if power not in (1, 2):
            raise OptionError(f"power={power!r}: expected 1 (curvature like 1/P) or 2 (noise of the update itself).")
        self.optimizer, self.power = optimizer, power
        self.series: Tensor | None = None

    def terms(self, found: collector.Totals) -> Terms | None:
        """The terms of this step; None before the optimizer's first update."""
        if found.values is None:
            return None  # one of several ranks, without examples
        return terms(found, collector.entry_sums(found), self.optimizer, self.power)

    def step(self, scaled: Tensor, taken: Taken) -> None:
        """Take in a step. ``scaled``: q_P, |g|_P^2 and 1 where they are exact, [3, P], NaN where P is not known."""
        if self.series is None:
            self.series = series.empty(2, taken.values)
        self.series = self.series.to(taken.values)
        sq_norm, grad_sq, exact = scaled
        freedom = taken.values[2]
        used = (freedom > 0) & sq_norm.isfinite() & grad_sq.isfinite()
        pair = torch.stack(estimators.unbiased_pair(grad_sq, sq_norm, torch.where(used, freedom + 1, 2)))
        pair = torch.where(used, pair, 0)
        sums = torch.stack([pair.sum(1), torch.where(exact == 1, pair, 0).sum(1)], 1)
        most = torch.where(used, freedom, 0).amax()
        self.series = series.step(self.series, sums[0], sums[1], most.expand(2), taken.forget)

    def state(self) -> Tensor | None:
        """For a checkpoint."""
        return None if self.series is None else self.series.clone()

    def load(self, state: Tensor | None) -> None:
        """Go on from ``state()``; None: from the start.

        Raises:
            StateError: of another shape.
        """
        if state is not None and (not isinstance(state, Tensor) or tuple(state.shape) != (series.SERIES_ROWS, 2)):
            raise StateError(f"the state of the preconditioned noise scale is damaged: {state!r}.")
        self.series = None if state is None else state.clone()

    @staticmethod
    def read(numbers: list[float], parameters: int, elements: int) -> OptimizerStats:
        """The averages as host numbers, from the series by rows."""
        whole, exact = (series.read(numbers[column::2]) for column in range(2))
        share = exact.tr_sigma / whole.tr_sigma if whole.tr_sigma > 0 else 0.0
        return OptimizerStats(whole.tr_sigma, whole.g_sq, parameters, elements, (whole,), share)
