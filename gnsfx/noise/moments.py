"""Decayed averages of a vector x_t of d numbers per step, with the covariance of the averages, in one row of numbers.

    row = mean [d], M [d, d], W, D, E        W = sum c f    D = sum c    E = sum c^2 f
    mean = sum c f x / W                     M = sum c f (x - mean)(x - mean)'
    Var(mean) ~ (M / W) / (n_eff - 1)        n_eff = D W / E, how many steps the average is worth

where step t counts with its degrees of freedom f_t and with c_t, the product of all later decays, and Var(x_t) = C / f_t.
Two rows of different steps join as Chan, Golub and LeVeque join them ("Updating formulae and a pairwise algorithm for
computing sample variances", 1979); one step is a row by itself, and joining it is West's update.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Matrix = list[list[float]]


class Averages(NamedTuple):
    """Host numbers: averages [d], their covariance [d][d], how many steps they are worth, and the sum E above."""

    mean: list[float]
    cov: Matrix
    n_eff: float
    squares: float


def length(d: int) -> int:
    """How many numbers a row holds."""
    return d + d * d + 3


def one(values: Tensor, freedom: Tensor) -> Tensor:
    """The row of one step: values [d], freedom 0-d. Where ``freedom`` is not positive it is empty, whatever the values.

    Columns side by side, values [d, K] and freedom [K], give K rows as columns.
    """
    used = freedom > 0
    d, *columns = values.shape
    freedom = torch.where(used, freedom, 0).to(values.dtype)
    sums = torch.stack([freedom, used.to(values.dtype), freedom])
    return torch.cat([torch.where(used, values, 0), values.new_zeros(d * d, *columns), sums])


def several(values: Tensor, freedom: Tensor, weight: Tensor) -> Tensor:
    """The row of K steps: values [K, d, C] of C columns, freedom [K, C], weight [K, C]: c above. Of one step it is that of
    :func:`one`, to the last bit, and of many it is what joining them one by one gives, but for rounding."""
    used = freedom > 0
    mass = torch.where(used, freedom, 0) * weight
    whole = mass.sum(0)
    share = mass / torch.where(whole > 0, whole, 1)
    values = torch.where(used[:, None], values, 0)
    mean = (share[:, None] * values).sum(0)
    apart = values - mean
    scatter = ((mass[:, None] * apart)[:, :, None] * apart[:, None]).sum(0)
    sums = torch.stack([whole, torch.where(used, weight, 0).sum(0), (mass * weight).sum(0)])
    return torch.cat([mean, scatter.flatten(0, 1), sums])


def join(older: Tensor, newer: Tensor, decay: Tensor | float = 1.0) -> Tensor:
    """The row of the steps of both; those of ``older`` count less by the factor ``decay``. Launches device work only.

    Or of columns of such rows, with a decay for all or for each.
    """
    d = _dimensions(older)
    mass = older[-3] * decay
    whole = mass + newer[-3]
    share = torch.where(whole > 0, newer[-3] / whole, 0)
    delta = newer[:d] - older[:d]
    between = mass * share * (delta[:, None] * delta[None])
    return torch.cat(
        [
            older[:d] + share * delta,
            older[d:-3] * decay + newer[d:-3] + between.flatten(0, 1),
            whole[None],
            older[-2:-1] * decay + newer[-2:-1],
            older[-1:] * decay * decay + newer[-1:],
        ]
    )


def variance(row: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of slopes' mean, and n_eff, both 0-d on the device. NaN below two steps."""
    d = _dimensions(row)
    mass, steps, squares = row[-3:]
    n_eff = steps * mass / squares
    variance = slopes @ row[d:-3].view(d, d) @ slopes / mass / (n_eff - 1)
    return torch.where(n_eff > 1, variance, math.nan), n_eff


def read(row: list[float]) -> Averages:
    """What a row of host numbers says; NaN where there are too few steps for it."""
    d = _dimensions(row)
    mass, steps, squares = row[-3:]
    n_eff = steps * mass / squares if squares > 0 else 0.0
    scale = 1 / (mass * (n_eff - 1)) if n_eff > 1 else math.nan
    cov = [[row[d + d * i + j] * scale for j in range(d)] for i in range(d)]
    return Averages(row[:d] if n_eff > 0 else [math.nan] * d, cov, n_eff, squares)


def _dimensions(row: Tensor | list[float]) -> int:
    return math.isqrt(len(row) - 2)  # d^2 < d + d^2 + 1 < (d + 1)^2
