"""Decayed running averages of the per-step pair x_t = (tr(Sigma)_t, |G|^2_t), with the covariance of the averages.

Step t counts with its degrees of freedom f_t = 1/W2 - 1 and with d_t, the product of all later decays. A column keeps

    W = sum d f    D = sum d    E = sum d^2 f            over the steps with f > 0
    mean = sum d f x / W
    M = sum d f (x - mean)(x - mean)'                    the upper triangle: SS, SG, GG

by West's update ("Updating mean and variance estimates", CACM 22, 1979), which subtracts no large numbers:

    W' = decay W + f    delta = x - mean    mean' = mean + (f / W') delta    M' = decay M + f (1 - f / W') delta delta'

With Var(x_t) = C / f_t and independent steps

    Var(mean) = sum (d f)^2 C / f / W^2 = C E / W^2
    E M = sum d f C / f - W Var(mean) = C (D - E / W)
    Var(mean) ~ (M / W) / (n_eff - 1),  n_eff = D W / E

where n_eff is the number of steps that the average is worth: (sum d)^2 / sum d^2 if all f are equal, 1 after one step.
Var(x_t) = C / f_t is exact for tr(Sigma) of Gaussian examples. For |G|^2 of steps of different size it is a model:
part of its variance falls as 1 / (f B), see ``gnsfx.noise.intervals``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gnsfx.noise.intervals import Estimate

SERIES_ROWS = 8  # mean S, mean G, M_SS, M_SG, M_GG, W, D, E


def empty(columns: int, like: Tensor) -> Tensor:
    """A series [8, columns] without steps, with the device and dtype of ``like`` (float64, float32 on MPS)."""
    return like.new_zeros(SERIES_ROWS, columns)


def step(series: Tensor, tr_sigma: Tensor, g_sq: Tensor, freedom: Tensor, decay: Tensor) -> Tensor:
    """The series [8, K] after one more step. Launches device work only.

    Args:
        series: [8, K].
        tr_sigma, g_sq: [K], the unbiased pair of the step; anything, also NaN, where ``freedom`` is not positive.
        freedom: [K], 1/W2 - 1. Where it is not positive the column has nothing this step and only decays.
        decay: factor for everything older, 0-d or [K].
    """
    mean, moment, (mass, steps, squares) = series[:2], series[2:5], series[5:]
    used = freedom > 0
    freedom = torch.where(used, freedom, 0).to(series.dtype)
    mass = decay * mass + freedom
    share = torch.where(used, freedom / mass, 0)
    delta = torch.where(used, torch.stack([tr_sigma, g_sq]).to(series.dtype) - mean, 0)
    spread = torch.stack([delta[0] * delta[0], delta[0] * delta[1], delta[1] * delta[1]])
    return torch.cat(
        [
            mean + share * delta,
            decay * moment + freedom * (1 - share) * spread,
            torch.stack([mass, decay * steps + used, decay * decay * squares + freedom]),
        ]
    )


def read(column: Sequence[float]) -> Estimate:
    """What a column of 8 host numbers says. All NaN, with n_eff = 0, before its first step."""
    tr_sigma, g_sq, m_ss, m_sg, m_gg, mass, steps, squares = column
    if not (mass > 0 and squares > 0):
        return Estimate(math.nan, math.nan, math.nan, math.nan, math.nan, 0.0)
    n_eff = steps * mass / squares
    scale = 1 / (mass * (n_eff - 1)) if n_eff > 1 else math.nan
    return Estimate(tr_sigma, g_sq, m_ss * scale, m_sg * scale, m_gg * scale, n_eff)
