"""Decayed running averages of the per-step pair x_t = (tr(Sigma)_t, |G|^2_t), with the covariance of the averages.

A column of :mod:`gnsfx.noise.moments` for every parameter and group: step t counts with its degrees of freedom
f_t = 1/W2 - 1 and with d_t, the product of all later decays, so that for Var(x_t) = C / f_t and independent steps

    Var(mean) = sum (d f)^2 C / f / W^2 = C E / W^2          W = sum d f    D = sum d    E = sum d^2 f    where f > 0
    E M = sum d f C / f - W Var(mean) = C (D - E / W)        M = sum d f (x - mean)(x - mean)'
    Var(mean) ~ (M / W) / (n_eff - 1),  n_eff = D W / E

where n_eff is the number of steps that the average is worth: (sum d)^2 / sum d^2 if all f are equal, 1 after one step.
Var(x_t) = C / f_t is exact for tr(Sigma) of Gaussian examples. For |G|^2 of steps of different size it is a model:
part of its variance falls as 1 / (f B), see ``gnsfx.noise.intervals``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gnsfx.noise import moments
from gnsfx.noise.intervals import Estimate

SERIES_ROWS = moments.length(2)  # mean S and G, M (2 x 2), W, D, E


def empty(columns: int, like: Tensor) -> Tensor:
    """A series [9, columns] without steps, with the device and dtype of ``like`` (float64, float32 on MPS)."""
    return like.new_zeros(SERIES_ROWS, columns)


def step(series: Tensor, tr_sigma: Tensor, g_sq: Tensor, freedom: Tensor, decay: Tensor) -> Tensor:
    """The series [9, K] after one more step. Launches device work only.

    Args:
        series: [9, K].
        tr_sigma, g_sq: [K], the unbiased pair of the step; anything, also NaN, where ``freedom`` is not positive.
        freedom: [K], 1/W2 - 1. Where it is not positive the column has nothing this step and only decays.
        decay: factor for everything older, 0-d or [K].
    """
    return moments.join(series, moments.one(torch.stack([tr_sigma, g_sq]).to(series.dtype), freedom), decay)


def read(column: Sequence[float]) -> Estimate:
    """What a column of 9 host numbers says. All NaN, with n_eff = 0, before its first step."""
    (tr_sigma, g_sq), cov, n_eff, _ = moments.read([*column])
    return Estimate(tr_sigma, g_sq, cov[0][0], cov[0][1], cov[1][1], n_eff)
