"""Unbiased estimates of |G|^2 and tr(Sigma) from one step, for any weights. Pure tensor functions.

One step adds up n independent contributions, c_b = w_b h_b with E h_b = G, Cov h_b = Sigma and sum_b w_b = 1:

    g = sum_b c_b         q = sum_b |c_b|^2         W2 = sum_b w_b^2     (1/n when all weights are equal)

    |G|^2  ~  (|g|^2 - q) / (1 - W2)
    V      ~  (q - W2 |g|^2) / (1 - W2)             V = tr Cov(g), the noise power of this step
    tr(Sigma) = V / W2                              B_simple = tr(Sigma) / |G|^2, in examples
                                                    in tokens: V N / |G|^2 for a step of N tokens, that is
                                                    B_simple times N W2, the tokens per effective example

Both are exactly unbiased, whatever the distribution of h_b. The usual |g|^2 in place of the first is not: it contains
V, so its ratio saturates at the batch size. The c_b are what enters g, so a mean loss needs no correction; of a sum
loss, or under a loss scale, both estimates are larger by one factor, and B_simple is the same.

Weights of a step with gradient accumulation over A backward passes (of all ranks): each is the mean of its own b_m
examples and all count the same, so w = 1 / (A b_m) and 1/W2 = A^2 / sum_m 1/b_m, which is A b_m for equal passes. Where the
ranks have different numbers A_r of passes, each divides by its own, and a pass counts 1/A_r in A and 1/A_r^2 in the sum.

Steps are averaged numerator and denominator apart, never the ratio (``gnsfx.noise.series``), and count by their degrees of
freedom f = 1/W2 - 1, as variances are pooled.
Source: McCandlish et al., "An empirical model of large-batch training" (arXiv 1812.06162), appendix A, in the form for
small batches of one example and any weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Estimates of tr(Sigma) and |G|^2, of any one shape. Unbiased, so ``g_sq`` may come out negative."""

    tr_sigma: Tensor
    g_sq: Tensor


def effective_examples(weights: Tensor) -> Tensor:
    """1/W2 for weights [n] of any scale: Kish's count, n when all are equal and less otherwise. 0-d."""
    return weights.sum().square() / weights.square().sum()


def effective_of_micro_batches(passes: Tensor, inverse_sizes: Tensor) -> Tensor:
    """1/W2 of ``passes`` = A backward passes with ``inverse_sizes`` = sum of 1/b_m, of any one shape; 0 without any.

    Both are sums, so those of several ranks add up. Leave out passes without examples: they add nothing to the gradient.
    """
    return passes.square() / torch.where(inverse_sizes > 0, inverse_sizes, 1)


def unbiased_pair(grad_sq: Tensor, sq_norm: Tensor, examples: Tensor | float) -> Pair:
    """The pair of one step.

    ``grad_sq`` = |g|^2 and ``sq_norm`` = q, of any one shape; ``examples`` = 1/W2 (the number of examples, or
    ``effective_examples`` of their weights), broadcast against them. NaN or inf where ``examples`` is 1.
    """
    noise = sq_norm - grad_sq / examples
    free = 1 - 1 / examples
    return Pair(tr_sigma=examples * noise / free, g_sq=(grad_sq - sq_norm) / free)


def step_decay(examples: Tensor, half_life: Tensor | float) -> Tensor:
    """Factor for the old sums at a step of so many examples: the past counts half after ``half_life`` examples.

    Counting examples rather than steps keeps the memory the same in data when the batch size changes.
    """
    return torch.exp2(-examples / half_life)


def half_life_of(decay: float, examples: Tensor | float) -> Tensor | float:
    """Half-life in examples of an average that decays by ``decay`` in (0, 1) per step of so many ``examples``."""
    return examples * (math.log(0.5) / math.log(decay))


def noise_scale(tr_sigma: float, g_sq: float) -> float:
    """B_simple = tr(Sigma) / |G|^2 of averaged estimates: NaN unless |G|^2 is positive, never negative or infinite."""
    if not (g_sq > 0 and math.isfinite(g_sq) and math.isfinite(tr_sigma)):
        return math.nan
    ratio = max(tr_sigma, 0.0) / g_sq
    return ratio if math.isfinite(ratio) else math.nan
