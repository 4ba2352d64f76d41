"""Two textbook intervals of a ratio, to compare with gnsfx.noise.intervals on the same estimates. None: the set is empty."""

from __future__ import annotations

import math

from gnsfx.noise.intervals import Estimate, Interval, t_quantile


def fieller(estimate: Estimate, level: float = 0.95) -> Interval | None:
    """Fieller's set with the same quantile on both sides, restricted to ratios that are not negative."""
    t = t_quantile((1 + level) / 2, estimate.n_eff - 1)
    S, G = estimate.tr_sigma, estimate.g_sq
    a = G * G - t * t * estimate.var_g_sq
    b = S * G - t * t * estimate.cov
    c = S * S - t * t * estimate.var_tr_sigma
    root = math.sqrt(max(b * b - a * c, 0.0))
    if a <= 0:
        return Interval(c / (b + root) if c > 0 else 0.0, math.inf)
    return Interval(max((b - root) / a, 0.0), (b + root) / a) if G > 0 else None


def log_delta(estimate: Estimate, level: float = 0.95) -> Interval | None:
    """R exp(+-t sd(log R)) where |G|^2 differs from 0 by its t-test; Fieller's lower bound where it does not."""
    t = t_quantile((1 + level) / 2, estimate.n_eff - 1)
    S, G = estimate.tr_sigma, estimate.g_sq
    if t * math.sqrt(estimate.var_g_sq) >= G:
        return fieller(estimate, level)
    variance = estimate.var_tr_sigma / S**2 - 2 * estimate.cov / (S * G) + estimate.var_g_sq / G**2
    factor = math.exp(t * math.sqrt(max(variance, 0.0)))
    return Interval(S / G / factor, S / G * factor)
