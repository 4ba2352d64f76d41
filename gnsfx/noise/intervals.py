"""Confidence intervals of B_simple = S / G, where S estimates tr(Sigma) and G estimates |G|^2.

Fieller: for the true ratio R, S - R G has mean 0 and variance v(R) = v_SS - 2 R v_SG + R^2 v_GG, so

    {R: -k_high <= (S - R G) / sqrt(v(R)) <= k_low}

holds the true ratio as often as the quantiles k say, whether |G|^2 is far from 0 or not. When it is not, the set has
no upper end: the data bound B_simple from below only.

The quantiles. With Student's t on n_eff - 1 degrees of freedom on both sides the set would be exact, but empty, or
bounded by absurdly large numbers, when G comes out negative, which it does although |G|^2 cannot be. Feldman and
Cousins ("Unified approach to the classical statistical analysis of small signals", Phys. Rev. D 57, 1998) give the
interval for a mean mu >= 0 seen as x with unit variance: never empty, same coverage for every mu. Here x = G / sd(G),

    k_low = mu_high(x) - x        k_high = x - mu_low(x)         no upper end if mu_low(x) = 0

which are t_975 on both sides as soon as x > 2 t_975.

Why not the interval R exp(+-t sd(log R)): near the limit of detection it holds the truth in as few as 85% of runs
where 95% are claimed. Fieller's set with t_975 on both sides is as well calibrated as this one, but empty in up to 3%
of runs, and its lower bounds reach a hundred times the truth; these, about three times. Of this one,
benchmarks/monte_carlo.py finds, after a full window: 93% to 97% for batch sizes from 4 to 1024 and noise scales from 1
to 10,000, low rank, heavy tails and token means among them, whether the answers are bounded or not; up to 99% where the
batch size changes within the window. After 4 to 12 steps the averages are not yet Gaussian: 92% for low rank; and of
batches of 4 in which one example in 20 is five times as large, 54% to 91%: most such runs have seen too few of those.

The steps are taken to be independent and the true values constant over the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from gnsfx.errors import OptionError

MIN_STEPS = 3.0  # effective; with fewer the variance itself is not known

_NORMAL = NormalDist()


class Interval(NamedTuple):
    """Ends of an interval of B_simple, in examples. ``high`` is inf for a lower bound; (0, inf): nothing is known."""

    low: float
    high: float

    @property
    def bounded(self) -> bool:
        """Whether there is an upper end."""
        return math.isfinite(self.high)

    @property
    def detected(self) -> bool:
        """Whether anything is known: False for (0, inf) only."""
        return self.low > 0 or self.bounded

    def __str__(self) -> str:
        if self.bounded:
            return f"{_three_digits(self.low)}..{_three_digits(self.high)}"
        return f"at least {_three_digits(self.low)}" if self.detected else "not yet detected"


UNKNOWN = Interval(0.0, math.inf)


def check_level(level: float) -> None:
    """Raises OptionError."""
    if not 0 < level < 1:
        raise OptionError(f"interval(level={level!r}): expected a number between 0 and 1, such as 0.95.")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Averages over steps, and the (co)variances of these averages.

    tr_sigma, g_sq: in units of the gradient squared; the (co)variances in that unit squared.
    n_eff: how many steps the averages are worth. The variances are NaN below 2 steps.
    """

    tr_sigma: float
    g_sq: float
    var_tr_sigma: float
    cov: float
    var_g_sq: float
    n_eff: float

    def residual_sd(self, ratio: float) -> float:
        """Standard deviation of S - ratio G."""
        variance = self.var_tr_sigma - 2 * ratio * self.cov + ratio * ratio * self.var_g_sq
        return math.sqrt(max(variance, 0.0))


def ratio_interval(estimate: Estimate, level: float = 0.95) -> Interval:
    """Interval of B_simple from averages over steps, in examples."""
    return of_sum([estimate], level)


def of_sum(estimates: Iterable[Estimate], level: float = 0.95) -> Interval:
    """Interval of (sum of S_p) / (sum of G_p) when the covariance between the parts p is not known: conservative.

    sd(sum_p (S_p - R G_p)) <= sum_p sd(S_p - R G_p) by Cauchy-Schwarz, whatever the covariance. Exact for one part.
    """
    check_level(level)
    parts = list(estimates)
    tr_sigma, g_sq = (math.fsum(getattr(part, name) for part in parts) for name in ("tr_sigma", "g_sq"))
    n_eff = min((part.n_eff for part in parts), default=0.0)
    sd_s, sd_g = (math.fsum(math.sqrt(getattr(p, name)) for p in parts) for name in ("var_tr_sigma", "var_g_sq"))
    if not (n_eff >= MIN_STEPS and all(map(math.isfinite, (tr_sigma, g_sq, sd_s, sd_g)))) or max(g_sq, sd_g) <= 0:
        return UNKNOWN
    x = g_sq / sd_g if sd_g else math.inf
    k_low, k_high = _quantiles(x, n_eff - 1, level)
    if len(parts) > 1:
        # sd(G) is a bound here, and the quantile for a smaller x would be smaller.
        two_sided = t_quantile((1 + level) / 2, n_eff - 1)
        k_high = two_sided if x > two_sided else None
    unit = (abs(tr_sigma) + sd_s) / (abs(g_sq) + sd_g)

    def residual(ratio: float, k: float) -> float:
        return tr_sigma - ratio * g_sq - k * math.fsum(part.residual_sd(ratio) for part in parts)

    low = 0.0 if residual(0.0, k_low) <= 0 else _crossing(lambda ratio: residual(ratio, k_low), unit)
    high = math.inf if k_high is None else _crossing(lambda ratio: residual(ratio, -k_high), unit)
    return Interval(low, high)


def one_step(
    sq_norms: Sequence[float],
    grad_sq: float,
    weights: Sequence[float] | None = None,
    level: float = 0.95,
    extra_variance: float = 0.0,
) -> Interval:
    """Interval of B_simple from one step, in examples: conservative, and wide unless the step is large.

    Args:
        sq_norms: |c_b|^2 of the n contributions.
        grad_sq: |sum_b c_b|^2.
        weights: w_b of any scale; None: all equal. Examples of weight 0 do not count.
        level: confidence.
        extra_variance: of q = sum_b |c_b|^2 when it is itself an estimate, in the unit of q squared.

    With h_b = c_b / w_b, Q = q / W2 estimates E|h|^2 = tr(Sigma) + |G|^2, so B_simple + 1 is the ratio of Q and the
    unbiased G. The variance v = Var|h|^2 is measured. That of G,

        Var G = 4 u A1 + 2 T2 A2,   u = G'Sigma G,   T2 = tr(Sigma^2)
        A1 = sum w^2 (1-w)^2 / (1-W2)^2,   A2 = (W2^2 - sum w^4) / (1-W2)^2   (1/n and 1/(n(n-1)) for equal weights)

    is not, but it is bounded. If |h|^2 varies at least as much as it would for Gaussian noise, v >= 4 u + 2 T2; and
    u <= |G|^2 sqrt(T2) always. The largest Var G under both, for p = |G|^2, is at

        u = p^2 (sqrt(1 + v / (2 p^2)) - 1),   2 T2 = v - 4 u

    A ratio is kept if |p - G| <= t (p sd(Q) / Q + sd(G; p)) with p = Q / (B_simple + 1): a sum of standard deviations,
    as the correlation is not known either. A G below 0 is taken as 0.

    Assumes tails no lighter than Gaussian and all h_b with one covariance; then 95% hold in 94% (noise of rank 1, most
    answers lower bounds) to 100% of steps. A tail that the few examples of a small step do not show is not covered. Where
    |h_b - G| is constant (unit-sphere noise, normalised gradients), v is too small and the interval too narrow.
    """
    check_level(level)
    weights = [1.0] * len(sq_norms) if weights is None else weights
    counted = [(sq_norm, w) for sq_norm, w in zip(sq_norms, weights, strict=True) if w]
    q, total = math.fsum(sq_norm for sq_norm, _ in counted), math.fsum(w for _, w in counted)
    if not (q > 0 and total > 0 and math.isfinite(q + grad_sq + extra_variance)):
        return UNKNOWN
    # In units of q.
    kept = [(sq_norm / q, w / total) for sq_norm, w in counted]
    grad_sq, extra = grad_sq / q, extra_variance / q / q
    w2 = math.fsum(w * w for _, w in kept)
    w4 = math.fsum(w**4 for _, w in kept)
    n_eff = w2 * w2 / w4
    if n_eff < MIN_STEPS:
        return UNKNOWN
    second = 1 / w2
    g_sq = (grad_sq - 1) / (1 - w2)
    v = math.fsum((sq_norm / w - w * second) ** 2 for sq_norm, w in kept) / w2 / (1 - 1 / n_eff)
    sd_second = math.sqrt(v / n_eff + extra / w2**2)
    a1 = math.fsum((w * (1 - w)) ** 2 for _, w in kept) / (1 - w2) ** 2
    a2 = (w2 * w2 - w4) / (1 - w2) ** 2
    t = t_quantile((1 + level) / 2, n_eff - 1)

    def margin(p: float) -> float:
        u = p * (math.sqrt(p * p + v / 2) - p)
        return t * (p * sd_second / second + math.sqrt(4 * u * a1 + (v - 4 * u) * a2 + extra / (1 - w2) ** 2))

    least = max(g_sq, 0.0)
    most = _bisect(lambda p: margin(p) - (p - least), least, second)
    fewest = _bisect(lambda p: g_sq - p - margin(p), 0.0, least) if g_sq > margin(0.0) else 0.0
    return Interval(max(second / most - 1, 0.0), second / fewest - 1 if fewest else math.inf)


def _three_digits(number: float) -> str:
    """Three significant digits, written out up to a billion."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if 1000 <= rounded < 1e9 else f"{rounded:.3g}"


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t for probability > 0.5, by Wallace's transformation of the normal one (1959).

    Too large by 4% for 2 degrees of freedom and 0.975, 0.2% for 5, 0.04% for 10.
    """
    z = _NORMAL.inv_cdf(probability) * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(z * z / freedom))


def t_tail(x: float, freedom: float) -> float:
    """P(t > x) for x >= 0; the inverse of ``t_quantile``."""
    z = math.sqrt(freedom * math.log1p(x * x / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return _NORMAL.cdf(-z)


def _quantiles(x: float, freedom: float, level: float) -> tuple[float, float | None]:
    """k_low and k_high of the module docstring for x = G / sd(G); None: there is no upper end.

    A mean mu is accepted for x in [x1, mu + k] where x1 = mu - k if that is positive, else (mu^2 - k^2) / (2 mu),
    and k leaves 1 - level outside. Solved for mu with x at one end or at the other.
    """
    outside = 1 - level
    two_sided = t_quantile(1 - outside / 2, freedom)

    def excess(mu: float, k: float, below: float) -> float:
        return t_tail(k, freedom) + t_tail(below, freedom) - outside

    if x >= 0:
        k_low = two_sided
    else:
        mu_high = _bisect(lambda mu: excess(mu, math.sqrt(mu * mu - 2 * mu * x), mu - x), 0.0, two_sided)
        # Not less, or a far outlier would claim too much: at 95% this is met for x < -2.6.
        k_low = max(mu_high, two_sided / 4) - x
    if x >= 2 * two_sided:
        return k_low, two_sided
    if t_tail(max(x, 0.0), freedom) >= min(outside, 0.49):
        return k_low, None
    # Falls short of ``outside`` at mu = 0 and exceeds it at x - two_sided or at x / 2, where k = mu.
    k_high = x - _bisect(lambda mu: -excess(mu, x - mu, (mu * mu + (x - mu) ** 2) / (2 * mu)), 0.0, x / 2)
    return k_low, k_high


def _bisect(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where ``falling`` crosses 0 between ``low`` and ``high``; neither end is evaluated."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def _crossing(falling: Callable[[float], float], unit: float) -> float:
    """The ratio where ``falling`` crosses 0, to full relative precision within a factor of 2^60 of ``unit``."""
    return unit * 2.0 ** _bisect(lambda exponent: falling(unit * 2.0**exponent), -60.0, 60.0)
