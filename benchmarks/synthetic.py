"""Steps of synthetic per-example gradients with known Sigma and G, drawn without drawing the gradients.

A step of ``batch`` examples h_b ~ N(G, s_l^2 Sigma) in strata l of equal scale s_l and weight w_l needs only

    |g|^2 = |sum_b w_b h_b|^2        q = sum_b w_b^2 |h_b|^2 = sum_l w_l^2 (n_l |mean_l|^2 + squares within the stratum)

The squares within are chi-square with (n_l - 1) m degrees of freedom for every eigenvalue of multiplicity m. The means
are Gaussian, and only their inner products count: by Bartlett's decomposition of a Wishart matrix, L vectors in many
dimensions are as good as L triangular ones. So a step costs the same for any batch size and dimension, and is exact.

tr(Sigma) = 1 throughout, so |G|^2 = 1 / noise scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """A distribution of per-example gradients.

    spectrum: (eigenvalue of Sigma in any unit, multiplicity, share of |G|^2 in this eigenspace) for each eigenvalue.
    strata: (probability, scale of the noise, weight in the loss) for each kind of example.
    batches: the batch size of successive steps relative to the largest, in turn.
    """

    name: str
    spectrum: tuple[tuple[float, int, float], ...] = ((1.0, 1000, 1.0),)
    strata: tuple[tuple[float, float, float], ...] = ((1.0, 1.0, 1.0),)
    batches: tuple[float, ...] = (1.0,)


class Steps(NamedTuple):
    """|g|^2, q, effective examples 1/W2, and examples; each [steps, runs]."""

    grad_sq: Tensor
    sq_norm: Tensor
    effective: Tensor
    examples: Tensor


LOG_NORMAL = tuple((0.05, math.exp(0.5 * NormalDist().inv_cdf((k + 0.5) / 20)), 1.0) for k in range(20))
OUTLIERS = ((0.95, 1.0, 1.0), (0.05, 5.0, 1.0))
LOW_RANK = tuple((0.5**k, 1, 0.2) for k in range(5))

WORLDS = (
    World("isotropic"),
    World("low rank", spectrum=LOW_RANK),
    World("heavy tails", strata=OUTLIERS),
    World("token mean", strata=((0.5, 1.0, 1.0), (0.3, 1.0, 3.0), (0.2, 1.0, 10.0))),
    World("batch varies", batches=(1.0, 0.25, 0.5)),
)


def draw(world: World, batch: int, noise_scale: float, steps: int, runs: int, generator: torch.Generator) -> Steps:
    """Independent ``steps`` of each of the ``runs``."""
    relative = torch.tensor(world.batches, dtype=torch.float64)[torch.arange(steps) % len(world.batches)]
    examples = (relative * batch).round().clamp(min=2)[:, None].expand(steps, runs)
    probability, scale, weight = torch.tensor(world.strata, dtype=torch.float64).unbind(1)
    counts = _multinomial(examples, probability, generator)
    weight = weight / (counts * weight).sum(-1, keepdim=True)
    scale = scale / (probability * scale.square()).sum().sqrt()  # of the noise: E s^2 = 1

    eigenvalues, multiplicity, share = torch.tensor(world.spectrum, dtype=torch.float64).unbind(1)
    eigenvalues = eigenvalues / (eigenvalues * multiplicity).sum()
    grad_sq, sq_norm = torch.zeros(2, steps, runs, dtype=torch.float64)
    for value, many, part in zip(eigenvalues, multiplicity, share, strict=True):
        noise = _triangular(len(probability), int(many) - 1, (steps, runs), generator)
        along = torch.randn(steps, runs, len(probability), 1, dtype=torch.float64, generator=generator)
        sd = (value * counts).sqrt() * scale * weight  # of the weighted sum over a stratum
        signal = (part / noise_scale).sqrt() * counts * weight
        sums = sd[..., None] * torch.cat([along, noise], dim=-1)
        sums[..., 0] += signal
        grad_sq += sums.sum(-2).square().sum(-1)
        sq_norm += (sums.square().sum(-1) / counts.clamp(min=1)).sum(-1)
        within = _chi_square((counts - 1) * many, generator)
        sq_norm += (value * (scale * weight).square() * within).sum(-1)
    return Steps(grad_sq, sq_norm, 1 / (counts * weight.square()).sum(-1), examples)


def draw_clusters(
    batch: int,
    noise_scale: float,
    size: int,
    correlation: float,
    steps: int,
    runs: int,
    generator: torch.Generator,
    dimension: int = 1000,
) -> tuple[Steps, Steps]:
    """Isotropic steps whose examples come in clusters: seen per example, and with the cluster as the unit.

    Within a cluster of ``size`` the noise of two examples has ``correlation``; each example alone has tr(Sigma) = 1.
    """
    clusters = batch // size
    between = correlation + (1 - correlation) / size  # tr Cov of the mean of a cluster
    world = World("clusters", spectrum=((1.0, dimension, 1.0),))
    seen = draw(world, clusters, noise_scale * between, steps, runs, generator)
    grad_sq, cluster_sq = between * seen.grad_sq, between * seen.sq_norm
    freedom = torch.full_like(grad_sq, dimension * clusters * (size - 1))
    within = (1 - correlation) / dimension * _chi_square(freedom, generator)
    example_sq = cluster_sq / size + within / batch**2
    examples = torch.full_like(grad_sq, batch)
    per_example = Steps(grad_sq, example_sq, examples, examples)
    return per_example, Steps(grad_sq, cluster_sq, examples / size, examples)


def draw_examples(
    world: World, batch: int, noise_scale: float, runs: int, generator: torch.Generator, constant: bool = False
) -> tuple[Tensor, Tensor]:
    """|c_b|^2 [runs, batch] and |g|^2 [runs] of single steps of a mean loss, from the gradients themselves.

    ``constant``: the noise of every example has the same length.
    """
    probability, scale, _ = torch.tensor(world.strata, dtype=torch.float64).unbind(1)
    scale = scale / (probability * scale.square()).sum().sqrt()
    kind = torch.multinomial(probability, runs * batch, replacement=True, generator=generator).view(runs, batch)
    eigenvalues, multiplicity, share = torch.tensor(world.spectrum, dtype=torch.float64).unbind(1)
    many = multiplicity.long()
    variance = (eigenvalues / (eigenvalues * multiplicity).sum()).repeat_interleave(many)
    mean = (share / multiplicity / noise_scale).sqrt().repeat_interleave(many)
    noise = torch.randn(runs, batch, len(mean), dtype=torch.float64, generator=generator) * variance.sqrt()
    noise = noise / noise.norm(dim=-1, keepdim=True) if constant else noise * scale[kind][..., None]
    contributions = (mean + noise) / batch
    return contributions.square().sum(-1), contributions.sum(1).square().sum(-1)


def _multinomial(total: Tensor, probability: Tensor, generator: torch.Generator) -> Tensor:
    """[..., L] counts that add up to ``total`` [...]."""
    counts, left, mass = [], total.clone(), 1.0
    for p in probability[:-1].tolist():
        count = torch.binomial(left, torch.full_like(left, p / mass), generator=generator)
        counts.append(count)
        left, mass = left - count, mass - p
    return torch.stack([*counts, left], dim=-1)


def _triangular(vectors: int, dimension: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[*shape, vectors, k]: standard Gaussian vectors of ``dimension``, turned so that few coordinates are not 0."""
    kept = min(vectors, dimension)
    noise = torch.randn(*shape, vectors, kept, dtype=torch.float64, generator=generator)
    if dimension < vectors:
        return noise
    noise = noise.tril(-1)
    for k in range(vectors):
        noise[..., k, k] = _chi_square(torch.full(shape, float(dimension - k), dtype=torch.float64), generator).sqrt()
    return noise


def _chi_square(freedom: Tensor, generator: torch.Generator) -> Tensor:
    """0 where there is no freedom."""
    halves = (freedom / 2).clamp(min=0.5)
    drawn = 2 * torch._standard_gamma(halves, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
    return torch.where(freedom > 0, drawn, 0)
