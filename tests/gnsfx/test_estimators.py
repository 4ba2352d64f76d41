"""The unbiased pair against Monte Carlo truth, and against the estimators that look like it."""

import math

import pytest
import torch

from gnsfx import estimators

DIM, BATCH, STEPS = 4, 16, 40_000
B_TRUE = 57.5


@pytest.fixture(scope="module")
def world():
    """Truth, and for many steps the contributions c_b of a mean loss: G, tr(Sigma), [steps, B, D]."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([2.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    tr_sigma = scales.square().sum()
    mean = torch.full((DIM,), math.sqrt(tr_sigma / B_TRUE / DIM), dtype=torch.float64)
    # Skewed noise: nothing here may rest on it being Gaussian.
    noise = torch.empty(STEPS, BATCH, DIM, dtype=torch.float64).exponential_(generator=generator) - 1
    return mean, tr_sigma, mean + noise * scales


def sums(contributions):
    """|g|^2 and q of every step."""
    return contributions.sum(1).square().sum(-1), contributions.square().sum((1, 2))


def assert_unbiased(estimates, truth):
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - truth) < 4 * error
    assert error < 0.05 * truth, "the test would not notice a bias"


def test_pair_is_unbiased(world):
    mean, tr_sigma, examples = world
    pair = estimators.unbiased_pair(*sums(examples / BATCH), BATCH)
    assert_unbiased(pair.g_sq, mean.square().sum())
    assert_unbiased(pair.tr_sigma, tr_sigma)


def test_pair_is_unbiased_for_unequal_weights(world):
    mean, tr_sigma, examples = world
    weights = torch.arange(1.0, BATCH + 1, dtype=torch.float64)
    weights /= weights.sum()
    kish = estimators.effective_examples(weights)
    assert 1 < kish < BATCH
    pair = estimators.unbiased_pair(*sums(examples * weights[:, None]), kish)
    assert_unbiased(pair.g_sq, mean.square().sum())
    assert_unbiased(pair.tr_sigma, tr_sigma)


def test_the_naive_pair_is_not(world):
    """|gbar|^2 for |G|^2 saturates at the batch size: B_plug = B_s / (1 + B_s / B)."""
    _, _, examples = world
    grad_sq, sq_norm = sums(examples / BATCH)
    plugged = (BATCH * sq_norm.mean() - grad_sq.mean()) / grad_sq.mean()
    expected = B_TRUE / (1 + B_TRUE / BATCH)
    assert plugged < BATCH
    assert plugged == pytest.approx(expected, rel=0.1)


def test_ratio_of_averages_not_average_of_ratios(world):
    _, _, examples = world
    grad_sq, sq_norm = sums(examples / BATCH)
    pair = estimators.unbiased_pair(grad_sq, sq_norm, BATCH)
    assert (pair.g_sq < 0).float().mean() > 0.05, "single steps do come out negative"
    terms = estimators.pooled_terms(grad_sq, sq_norm, torch.full_like(grad_sq, BATCH))
    averages = estimators.pooled_pair(terms.sum(1))
    ours = estimators.noise_scale(float(averages.tr_sigma), float(averages.g_sq))
    assert ours == pytest.approx(B_TRUE, rel=0.05)
    assert abs((pair.tr_sigma / pair.g_sq).median() - B_TRUE) > 5 * abs(ours - B_TRUE)
    clamped_first = pair.tr_sigma.mean() / pair.g_sq.clamp(min=0).mean()
    assert clamped_first < 0.95 * B_TRUE


def test_pooled_terms_are_the_pair_times_its_freedom():
    grad_sq, sq_norm = torch.rand(2, 7, dtype=torch.float64)
    examples = torch.arange(2.0, 9.0, dtype=torch.float64)
    terms = estimators.pooled_terms(grad_sq, sq_norm, examples)
    pooled, direct = estimators.pooled_pair(terms), estimators.unbiased_pair(grad_sq, sq_norm, examples)
    torch.testing.assert_close(pooled.tr_sigma, direct.tr_sigma)
    torch.testing.assert_close(pooled.g_sq, direct.g_sq)
    torch.testing.assert_close(terms[2], examples - 1)


def test_steps_without_freedom_add_nothing():
    grad_sq, sq_norm, examples = torch.tensor([[0.0, 3.0], [0.0, 3.0], [0.0, 1.0]])
    assert torch.equal(estimators.pooled_terms(grad_sq, sq_norm, examples), torch.zeros(3, 2))


def test_pooling_steps_of_different_size_is_unbiased(world):
    mean, tr_sigma, examples = world
    total = torch.zeros(3, dtype=torch.float64)
    for part, size in zip(examples.chunk(4), (2, 5, 9, 16), strict=True):
        grad_sq, sq_norm = sums(part[:, :size] / size)
        total += estimators.pooled_terms(grad_sq, sq_norm, torch.full_like(grad_sq, size)).sum(1)
    pair = estimators.pooled_pair(total)
    assert pair.tr_sigma == pytest.approx(float(tr_sigma), rel=0.02)
    assert pair.g_sq == pytest.approx(float(mean.square().sum()), rel=0.1)


def test_b_simple_does_not_depend_on_the_loss_scale(world):
    """A sum loss, a mean loss and a loss scale differ by a factor on every contribution."""
    _, _, examples = world
    for factor in (1.0, 1 / BATCH, 65536.0):
        pair = estimators.unbiased_pair(*sums(examples[:1] * factor), BATCH)
        ratio = pair.tr_sigma / pair.g_sq
        reference = estimators.unbiased_pair(*sums(examples[:1]), BATCH)
        torch.testing.assert_close(ratio, reference.tr_sigma / reference.g_sq)


def test_decay_counts_examples():
    half_life = estimators.half_life_of(0.9, 32)
    one = estimators.step_decay(torch.tensor(32.0), half_life)
    two = estimators.step_decay(torch.tensor(64.0), half_life)
    assert float(one) == pytest.approx(0.9)
    assert float(two) == pytest.approx(0.81)
    assert float(estimators.step_decay(torch.tensor(0.0), half_life)) == 1
    assert float(estimators.step_decay(torch.tensor(100.0), 100)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("tr_sigma", "g_sq", "expected"),
    [
        (6.0, 2.0, 3.0),
        (-1e-12, 2.0, 0.0),
        (6.0, 0.0, math.nan),
        (6.0, -1.0, math.nan),
        (6.0, math.nan, math.nan),
        (math.nan, 1.0, math.nan),
        (math.inf, 1.0, math.nan),
        (1e300, 1e-300, math.nan),
    ],
)
def test_noise_scale_is_never_negative_or_infinite(tr_sigma, g_sq, expected):
    assert estimators.noise_scale(tr_sigma, g_sq) == pytest.approx(expected, nan_ok=True)
