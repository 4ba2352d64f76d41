"""The total noise scale from that of the norm layers: those are measured in every step, everything in some.

    R = tr(Sigma) / |G|^2          phi = R_total / R_norm, from the full steps: both from the same examples
    B_simple ~ R_norm phi          R_norm averaged over all recent steps

log phi is a function of four averages over full steps, x = (S_total, G_total, S_norm, G_norm), log R_norm of two over
all steps, y = (S_norm, G_norm). With a = the slopes of log R_norm and b = those of log phi, to first order

    Var log B_simple = a'Var(y)a + b'Var(x)b + 2 rho sd(a'y) sd(b'x)

The two share the examples of the full steps. Steps are independent, so Cov(y, x) = C_yx X / (W_y W_x) with the sum
X = sum over full steps of c_y c_x f, the decays c of both averages, and C_yx the covariance within a step, which the full
steps show:

    rho = (a'C_yx b) / sqrt(a'C_yy a  b'C_xx b)  X / sqrt(E_y E_x)        both factors at most 1 in size

So when all steps are full and nothing decays, what phi and R_norm share cancels, and when full steps are rare the
errors add up as independent ones. Ends are exp(log B_simple -+ t sd), with Welch and Satterthwaite's degrees of freedom;
nothing is said before every |G|^2 in it is detected.

phi is not a constant of nature: 1.4 has been published, 2 and more seen. So it is averaged over the last full steps only,
and whether it moves is tested (:mod:`gnsfx.noise.drift`). After an alarm it goes on from the newest block of full steps alone.
The interval is about phi over this memory and counts no drift within it as error: until a slow drift is told, it can miss
the truth of the moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gnsfx.noise import drift, moments
from gnsfx.noise.drift import Drift, around, exp_or_nan
from gnsfx.noise.intervals import MIN_STEPS, UNKNOWN, Interval
from gnsfx.noise.moments import Averages, Matrix

_DETECTED = 3.0  # standard errors by which |G|^2 has to be away from 0: the logarithm is then nearly linear
_SIZES = (moments.length(2), moments.length(4), moments.length(4), 2, 1, drift.LENGTH)
LENGTH = sum(_SIZES)
_LOG_PHI = (1.0, -1.0, -1.0, 1.0)


class _Parts(NamedTuple):
    recent: Tensor  # y, all steps
    older: Tensor  # x, full steps
    newer: Tensor  # x, full steps of the running block, not in older
    shared: Tensor  # X of older and newer
    half_life: Tensor  # of older, in degrees of freedom; 0 until the first full step
    drift: Tensor


def empty(like: Tensor) -> Tensor:
    """A state without steps: one row of numbers with the device and dtype of ``like`` (float64, float32 on MPS)."""
    return like.new_zeros(LENGTH)


def step(state: Tensor, norm: Tensor, total: Tensor | None, decay: Tensor | float, memory: float) -> Tensor:
    """The state after one more step. Launches device work only.

    Args:
        state: from :func:`empty`.
        norm: [3], the unbiased tr(Sigma) and |G|^2 of the norm layers in this step and its degrees of freedom 1/W2 - 1, of
            any value where these are not positive.
        total: [3], the same of everything; None where only norm layers were measured.
        decay: weight of the past in the average of R_norm.
        memory: full steps of the size of the first one after which an older one counts half in phi.
    """
    parts = _split(state)
    recent = moments.join(parts.recent, moments.one(norm[:2], norm[2]), decay)
    shared = parts.shared * decay
    if total is None:
        return torch.cat([recent, parts.older, parts.newer, shared, parts.half_life, parts.drift])
    freedom = torch.minimum(norm[2], total[2]).clamp(min=0)
    newer = moments.join(parts.newer, moments.one(torch.cat([total[:2], norm[:2]]), freedom))
    half_life = torch.where(parts.half_life > 0, parts.half_life, memory * freedom)
    shared = shared + torch.stack([torch.zeros_like(freedom), freedom])
    return torch.cat([recent, parts.older, newer, shared, half_life, parts.drift])


def close_block(state: Tensor, look: int) -> Tensor:
    """The state after the running block has joined the older full steps, or replaced them where phi moved.

    A block in which a |G|^2 is not detected goes on. ``look``: how many blocks were closed before, from 0. Launches device
    work only.
    """
    parts = _split(state)
    log, variance, n_eff, detected = _log_phi(parts.newer)
    news, moved = drift.compare(parts.drift, log, variance, n_eff, look)
    decay = torch.exp2(-parts.newer[-3] / torch.where(parts.half_life > 0, parts.half_life, 1)).squeeze()
    older = torch.where(moved, parts.newer, moments.join(parts.older, parts.newer, decay))
    shared = torch.where(moved, 0, decay * parts.shared[0]) + parts.shared[1]
    none, zero = torch.zeros_like(parts.newer), torch.zeros_like(shared)
    closed = torch.cat([parts.recent, older, none, torch.stack([shared, zero]), parts.half_life, news])
    return torch.where(detected, closed, state)


def rows(state: Tensor) -> Tensor:
    """What :func:`read` takes, on the device, to be moved to the host with whatever else is read."""
    parts = _split(state)
    full = moments.join(parts.older, parts.newer)
    return torch.cat([parts.recent, full, parts.shared.sum()[None], drift.rows(parts.drift)])


def read(values: list[float]) -> Prediction:
    """The prediction from the host numbers of :func:`rows`."""
    two, four = moments.length(2), moments.length(4)
    recent, full, (shared, *moved) = values[:two], values[two : two + four], values[two + four :]
    return Prediction(moments.read(recent), moments.read(full), shared, Drift(*moved))


@dataclass(frozen=True, slots=True)
class Prediction:
    """The total as the norm layers tell it.

    recent: averages of (tr(Sigma), |G|^2) of the norm layers over all steps. full: those of the total and of the norm layers
    over full steps. shared: the sum X of the module docstring. drift: how often phi moved.
    """

    recent: Averages
    full: Averages
    shared: float
    drift: Drift

    @property
    def factor(self) -> float:
        """phi = R_total / R_norm; NaN while a |G|^2 is not positive."""
        return exp_or_nan(_log_of(self.full.mean, _LOG_PHI))

    def factor_interval(self, level: float = 0.95) -> Interval:
        """Interval of ``factor``; (0, inf) before it is detected."""
        return self._ratio_interval(_LOG_PHI, level)

    @property
    def slopes(self) -> tuple[float, float]:
        """tr(Sigma) and |G|^2 of the total over those of the norm layers; ``factor`` is their ratio."""
        s_total, g_total, s_norm, g_norm = self.full.mean
        return (s_total / s_norm if s_norm > 0 else math.nan, g_total / g_norm if g_norm > 0 else math.nan)

    def slope_intervals(self, level: float = 0.95) -> tuple[Interval, Interval]:
        """Intervals of both ``slopes``."""
        return self._ratio_interval((1.0, 0.0, -1.0, 0.0), level), self._ratio_interval((0.0, 1.0, 0.0, -1.0), level)

    @property
    def tr_sigma(self) -> float:
        """Predicted tr(Sigma) of everything, in units of the gradient squared."""
        return self.recent.mean[0] * self.slopes[0]

    @property
    def g_sq(self) -> float:
        """Predicted |G|^2 of everything."""
        return self.recent.mean[1] * self.slopes[1]

    @property
    def b_simple(self) -> float:
        """Predicted total noise scale, in examples; NaN while a |G|^2 is not positive."""
        return exp_or_nan(_log_of(self.recent.mean, (1.0, -1.0)) + _log_of(self.full.mean, _LOG_PHI))

    def interval(self, level: float = 0.95) -> Interval:
        """Interval of ``b_simple`` in examples, with the errors of the norm layers and of the factor; (0, inf): unknown."""
        log = math.log(self.b_simple) if self.b_simple > 0 else math.nan
        if not (_is_detected(self.recent, (1,)) and _is_detected(self.full, (1, 3)) and math.isfinite(log)):
            return UNKNOWN
        a, b = _slopes_of(self.recent.mean, (1.0, -1.0)), _slopes_of(self.full.mean, _LOG_PHI)
        var_a, var_b = _form(a, self.recent.cov, a), _form(b, self.full.cov, b)
        padded = [0.0, 0.0, *a]
        own = _form(padded, self.full.cov, padded) * var_b
        weights = math.sqrt(self.recent.squares * self.full.squares)
        rho = _form(padded, self.full.cov, b) / math.sqrt(own) * self.shared / weights if own > 0 else 0.0
        rho = min(max(rho, -1.0), 1.0)
        variance = var_a + var_b + 2 * rho * math.sqrt(var_a * var_b)
        return around(log, variance, _freedom(var_a, self.recent.n_eff, var_b, self.full.n_eff), level)

    def _ratio_interval(self, powers: tuple[float, ...], level: float) -> Interval:
        used = tuple(i for i in (1, 3) if powers[i])
        log = _log_of(self.full.mean, powers)
        if not (_is_detected(self.full, used) and math.isfinite(log)):
            return UNKNOWN
        slopes = _slopes_of(self.full.mean, powers)
        return around(log, _form(slopes, self.full.cov, slopes), self.full.n_eff - 1, level)


def _split(state: Tensor) -> _Parts:
    return _Parts(*state.split(_SIZES))


def _log_phi(row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log phi of the averages in a row, its variance, n_eff, and whether both |G|^2 are detected. On the device."""
    mean = row[:4]
    one = torch.ones_like(mean[0])
    powers = torch.stack([one * power for power in _LOG_PHI])  # made on the device: a copy to it would wait
    spread, n_eff = moments.variance(row, powers / mean)
    detected = (mean > 0).all() & (n_eff >= MIN_STEPS)
    for i in (1, 3):
        unit = torch.stack([one * (i == j) for j in range(4)])
        detected = detected & (mean[i] > _DETECTED * moments.variance(row, unit)[0].sqrt())
    return (powers * mean.clamp(min=0).log()).sum(), spread, n_eff, detected


def _is_detected(averages: Averages, which: tuple[int, ...]) -> bool:
    far = (averages.mean[i] > _DETECTED * math.sqrt(max(averages.cov[i][i], 0.0)) for i in which)
    return averages.n_eff >= MIN_STEPS and all(far)


def _log_of(mean: list[float], powers: tuple[float, ...]) -> float:
    """log of prod mean_i^power_i; NaN where it has none."""
    pairs = [(m, p) for m, p in zip(mean, powers, strict=True) if p]
    return math.fsum(p * math.log(m) for m, p in pairs) if all(m > 0 for m, _ in pairs) else math.nan


def _slopes_of(mean: list[float], powers: tuple[float, ...]) -> list[float]:
    return [p / m if p else 0.0 for m, p in zip(mean, powers, strict=True)]


def _form(left: list[float], matrix: Matrix, right: list[float]) -> float:
    return math.fsum(
        x * value * y for x, line in zip(left, matrix, strict=True) for value, y in zip(line, right, strict=True)
    )


def _freedom(var_a: float, n_a: float, var_b: float, n_b: float) -> float:
    """Of a sum of two variance estimates, after Welch and Satterthwaite."""
    inverse = var_a * var_a / (n_a - 1) + var_b * var_b / (n_b - 1)
    return (var_a + var_b) ** 2 / inverse if inverse > 0 else min(n_a, n_b) - 1
