"""Whether phi, the ratio of the total noise scale to that of the norm layers, moves: one look per block of full steps.

Block k gives l_k = log phi with variance v_k. Against the plain average of the m blocks before it,

    z_k = (l_k - mean l) / sqrt(v_k + sum v / m^2)

made a normal deviate by its degrees of freedom (Wallace 1959). While phi stands still these "recursive residuals" are
independent (Brown, Durbin and Evans, "Techniques for testing the constancy of regression relationships over time", 1975), so
sums of the last 1, 2, 4, ... 32 of them, over the root of their number, are normal too. A jump shows in the shortest, a
slow drift in the longest, where every block is on the same side. A small bias of l_k, as logarithms of averages have,
is in all blocks alike.

The k-th look alarms at level alpha / (k (k + 1)), shared by the windows; these sum to alpha, so that is the rate of false
alarms over a run of any length. After an alarm the average starts anew from the newest block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from gnsfx.noise.intervals import UNKNOWN, Interval, check_level, t_quantile

FALSE_ALARMS = 0.01  # per run, whatever its length
WINDOWS = (1, 2, 4, 8, 16, 32)
_RECORD = 7  # count of alarms; log phi, its variance and degrees of freedom before and after the last one
_BLOCKS = WINDOWS[-1]
LENGTH = 4 + 3 * _BLOCKS + _RECORD  # sums: m, l, v, degrees of freedom; the last z, l and v, newest first; the record


def compare(state: Tensor, log: Tensor, variance: Tensor, n_eff: Tensor, look: int) -> tuple[Tensor, Tensor]:
    """The state [LENGTH] after one more block, and whether phi moved, 0-d. Launches device work only.

    Args:
        state: zeros at the start.
        log, variance: of the block, 0-d.
        n_eff: steps in the block.
        look: how many blocks were compared before, from 0.
    """
    sums, *rows, record = state.split((4, _BLOCKS, _BLOCKS, _BLOCKS, _RECORD))
    m, freedom = sums[0], n_eff - 1
    news = torch.stack([torch.ones_like(log), log, variance, freedom])
    t = (log - sums[1] / m) / (variance + sums[2] / m.square()).sqrt()
    size = (freedom * torch.log1p(t.square() / freedom)).sqrt() * (8 * freedom + 1) / (8 * freedom + 3)
    z = torch.where(m > 0, torch.copysign(size, t), 0)
    rows = [torch.cat([new[None], row[:-1]]) for new, row in zip((z, log, variance), rows, strict=True)]
    # A window leaves a block to compare with, hence at most m of the m + 1.
    sizes = [torch.where(w <= m, rows[0][:w].sum().abs() / math.sqrt(w), 0) for w in WINDOWS]
    largest = torch.stack(sizes).amax()
    moved = largest > threshold(look)

    after = torch.zeros_like(news)  # the sums of the window that shows it best
    for window, size in zip(WINDOWS, sizes, strict=True):
        ones = torch.ones_like(log) * window
        own = torch.stack([ones, *(row[:window].sum() for row in rows[1:]), ones * freedom])
        after = torch.where(size == largest, own, after)
    alarm = torch.stack([record[0] + 1, *_average(sums + news - after), *_average(after)])
    newest = torch.cat([torch.ones_like(log)[None], torch.zeros_like(rows[0][1:])])
    anew = torch.cat([news, 0 * rows[0], *(torch.where(newest > 0, row, 0) for row in rows[1:]), alarm])
    return torch.where(moved, anew, torch.cat([sums + news, *rows, record])), moved


def _average(sums: Tensor) -> list[Tensor]:
    """Mean of log phi, its variance and degrees of freedom, of the blocks in the sums."""
    m, logs, variances, freedoms = sums
    return [logs / m, variances / m.square(), freedoms]


def threshold(look: int, false_alarms: float = FALSE_ALARMS) -> float:
    """Normal quantile for the look after ``look`` others, two-sided: 1/(1 2) + 1/(2 3) + ... = 1."""
    return NormalDist().inv_cdf(1 - false_alarms / ((look + 1) * (look + 2)) / (2 * len(WINDOWS)))


def rows(state: Tensor) -> Tensor:
    """What :class:`Drift` takes, on the device."""
    return state[-_RECORD:]


@dataclass(frozen=True, slots=True)
class Drift:
    """How often phi moved, and its logarithm before and after the last time, with variance and degrees of freedom."""

    count: float = 0
    log_before: float = 0
    var_before: float = 0
    freedom_before: float = 0
    log_after: float = 0
    var_after: float = 0
    freedom_after: float = 0

    def message(self, level: float = 0.95) -> str | None:
        """What to tell the user; None where phi never moved."""
        if not self.count:
            return None
        before = _shown(self.log_before, self.var_before, self.freedom_before, level)
        after = _shown(self.log_after, self.var_after, self.freedom_after, level)
        return (
            f"the ratio of the total noise scale to that of the norm layers moved from {before} to {after}. The "
            "predicted total goes on with the new ratio; before, it was off by up to as much. Measure everything more "
            "often (a smaller every), or restart with reset() if the run is in another phase."
        )


def around(log: float, variance: float, freedom: float, level: float) -> Interval:
    """exp of the interval of a logarithm."""
    check_level(level)
    if not (freedom > 0 and math.isfinite(log) and variance >= 0 and math.isfinite(variance)):
        return UNKNOWN
    margin = t_quantile((1 + level) / 2, freedom) * math.sqrt(variance)
    return Interval(exp_or_nan(log - margin), exp_or_nan(log + margin))


def exp_or_nan(log: float) -> float:
    """exp, NaN where there is none to show."""
    return math.exp(log) if math.isfinite(log) and log < 700 else math.nan


def _shown(log: float, variance: float, freedom: float, level: float) -> str:
    return f"{exp_or_nan(log):.3g} ({around(log, variance, freedom, level)})"
