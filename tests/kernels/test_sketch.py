"""Estimates of squared norms: unbiased, with the variance that the formulas say, and a variance estimate that is unbiased too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import gnsfx.kernels.ops  # noqa: F401  (defines torch.ops.gnsfx)
from gnsfx.kernels import reference
from gnsfx.kernels.sketch import _sample, _signs, _words

gns = torch.ops.gnsfx
DRAWS = 2000
ERRORS = 5.0  # standard errors
# Of 6 examples: how many, by how many columns, exact ones by their Grams, with the factors swapped.
WAYS = [(6, 2, 0, 0), (9, 3, 0, 1), (3, 0, 0, 0), (4, 0, 1, 1), (3, 2, 0, 1), (2, 4, 0, 0)]


def seed(k: int) -> Tensor:
    return torch.tensor(k)


def factors() -> tuple[Tensor, Tensor]:
    """Examples of different size; few positions, so that the contributions have a low rank."""
    generator = torch.Generator().manual_seed(1)
    size = torch.linspace(0.3, 1.2, 6, dtype=torch.float64)[:, None, None, None]
    x = torch.randn(6, 2, 3, 5, generator=generator, dtype=torch.float64) * size
    return x, torch.randn(6, 2, 3, 4, generator=generator, dtype=torch.float64)


def variance_of_columns(x: Tensor, g: Tensor) -> Tensor:
    """[B] of one column: 2 (||A||^2 - sum A_ii^2) for A = P P^T over the narrower side, summed over the contractions."""
    P = torch.einsum("beti,beto->beio", x, g)
    A = P.mT @ P if g.shape[3] <= x.shape[3] else P @ P.mT
    return 2 * (A.square().sum((1, 2, 3)) - A.diagonal(dim1=2, dim2=3).square().sum((1, 2)))


def variance_of_sum(norms: Tensor, of_columns: Tensor, examples: int, columns: int) -> Tensor:
    B = len(norms)
    m = min(examples, B)
    own = B / m * of_columns.sum() / columns if columns else torch.zeros(())
    return B**2 * (1 - m / B) / m * norms.var() + own


def moments(draws: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    sums, variances = (torch.stack([both[i].sum() for both in draws]) for i in (0, 1))
    return sums, variances


def close(found: Tensor, expected: Tensor | float, what: str) -> None:
    """The mean of draws is within standard errors of what is expected."""
    error = found.std() / math.sqrt(len(found))
    assert (found.mean() - expected).abs() <= ERRORS * error + 1e-9 * abs(float(expected)), what


@pytest.mark.parametrize(("examples", "columns", "gram", "swap"), WAYS)
def test_sum_and_variance_are_unbiased(examples: int, columns: int, gram: int, swap: int) -> None:
    x, g = factors()[:: -1 if swap else 1]
    truth = reference.ghost_sq_norm_ref(x, g)
    draws = [gns.estimate_sq_norm(x, g, seed(k), 7, examples, columns, bool(gram)) for k in range(DRAWS)]
    sums, variances = moments(draws)
    expected = variance_of_sum(truth, variance_of_columns(x, g), examples, columns)
    close(sums, truth.sum(), "the sum is biased")
    close((sums - truth.sum()).square(), expected, "its variance is not that of the formula")
    close(variances, expected, "the estimate of its variance is biased")


@pytest.mark.parametrize("columns", [2, 8])
def test_every_example_is_unbiased_and_independent(columns: int) -> None:
    x, g = factors()
    truth, spread = reference.ghost_sq_norm_ref(x, g), variance_of_columns(x, g) / columns
    draws = [gns.estimate_sq_norm(x, g, seed(k), 1, 6, columns, False) for k in range(DRAWS)]
    norms, variances = (torch.stack([both[i] for both in draws]) for i in (0, 1))
    for b in range(6):
        close(norms[:, b], truth[b], f"example {b}")
        close(variances[:, b], spread[b], f"variance of example {b}")
    off = (torch.corrcoef(norms.T) - torch.eye(6)).abs().max()
    assert off < ERRORS / math.sqrt(DRAWS), "errors of examples go together"


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize(("examples", "columns"), [(4, 2), (2, 0), (3, 3)])
def test_convolutions(groups: int, transposed: bool, examples: int, columns: int) -> None:
    g, x = torch.randn(4, 1, 4, 5).double(), torch.randn(4, 1, 6, 5).double()
    weight = torch.empty((6, 4 // groups, 3) if transposed else (4, 6 // groups, 3)).double()
    settings = ([1], [1], [1], transposed, [0], groups)
    truth = reference.convolution_sq_norm_ref(g, x, weight, *settings)[1]
    draws = [
        gns.estimate_convolution_sq_norm(g, x, weight, *settings, seed(k), 3, examples, columns) for k in range(300)
    ]
    sums, variances = moments(draws)
    close(sums, truth.sum(), "the sum is biased")
    close((sums - truth.sum()).square() - variances, 0.0, "the estimate of its variance is biased")


def test_a_batch_smaller_than_the_subsample_is_exact() -> None:
    x, g = factors()
    norms, variances = gns.estimate_sq_norm(x[:3], g[:3], seed(0), 0, 4, 0, False)
    torch.testing.assert_close(norms, reference.ghost_sq_norm_ref(x[:3], g[:3]))
    assert not variances.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_draw_the_same_signs(dtype: torch.dtype) -> None:
    x, g = ((t * 8).round() / 8 for t in factors())
    expected = gns.estimate_sq_norm(x, g, seed(5), 2, 6, 4, False)[0]
    found = gns.estimate_sq_norm(x.to(dtype), g.to(dtype), seed(5), 2, 6, 4, False)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=20 * torch.finfo(dtype).eps, atol=0)


def test_half_precision_does_not_overflow() -> None:
    """Sums of 4096 entries of 2^9 with random signs leave the range of float16, unless they are scaled."""
    x, g = torch.ones(2, 1, 2, 4096).half(), torch.full((2, 1, 2, 8192), 2.0**9).half()
    norms, _ = gns.estimate_sq_norm(x, g, seed(0), 0, 2, 4, False)
    assert norms.isfinite().all()


def test_random_words() -> None:
    """Neighbouring seeds, salts and places have nothing to do with each other; the same ones are the same."""
    assert torch.equal(_words(seed(3), 4, 9), _words(seed(3), 4, 9))
    rows = [_words(seed(s), t, 1 << 12) for s in range(8) for t in range(8)]
    bits = torch.stack([((w[:, None] >> torch.arange(32)) & 1).flatten() for w in rows]).double()
    limit = ERRORS / math.sqrt(bits.shape[1])
    assert (bits.mean(1) - 0.5).abs().max() < limit / 2
    assert (torch.corrcoef(bits) - torch.eye(64)).abs().max() < limit
    assert (torch.corrcoef(bits[0].view(-1, 32).T) - torch.eye(32)).abs().max() < ERRORS / math.sqrt(1 << 12)


def test_subsets_are_equally_likely() -> None:
    drawn = [_sample(seed(k), 2, 5, 2) for k in range(4000)]
    counts = torch.stack([s[0] * 5 + s[1] for s in drawn if s is not None]).bincount(minlength=25)
    counts = counts[counts > 0]
    assert len(counts) == 10
    assert (counts - 400).abs().max() < ERRORS * math.sqrt(400)


def test_signs_are_all_there_is() -> None:
    signs = _signs(seed(1), 1, (3, 7, 5), torch.float32, 0.5)
    assert signs.shape == (3, 7, 5) and signs.abs().eq(0.5).all()


def test_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    gns.estimate_sq_norm(*factors(), seed(0), 0, 3, 2, False)
    assert torch.equal(torch.get_rng_state(), state)
