"""The unbiased pair against Monte Carlo truth, and against the estimators that look like it."""

import itertools
import math

import pytest
import torch

from gnsfx.noise import estimators, series

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
    ours = estimators.noise_scale(float(pair.tr_sigma.mean()), float(pair.g_sq.mean()))
    assert ours == pytest.approx(B_TRUE, rel=0.05)
    assert abs((pair.tr_sigma / pair.g_sq).median() - B_TRUE) > 5 * abs(ours - B_TRUE)
    clamped_first = pair.tr_sigma.mean() / pair.g_sq.clamp(min=0).mean()
    assert clamped_first < 0.95 * B_TRUE


SIZES = (7, 2, 5)


def test_weights_of_unequal_micro_batches():
    """The loss of each is its own mean, divided by their number: w = 1 / (A b_m)."""
    weights = torch.cat([torch.full((b,), 1 / (len(SIZES) * b), dtype=torch.float64) for b in SIZES])
    passes, inverse = torch.tensor([[3.0, 0.0, 4.0], [sum(1 / b for b in SIZES), 0.0, 4 / 5]], dtype=torch.float64)
    found = estimators.effective_of_micro_batches(passes, inverse)
    assert found.tolist() == pytest.approx([float(estimators.effective_examples(weights)), 0, 20])
    assert found[0] == pytest.approx(10.678, abs=1e-3)


def test_unequal_micro_batches_are_unbiased(world):
    mean, tr_sigma, examples = world
    weights = torch.cat([torch.full((b,), 1 / (len(SIZES) * b), dtype=torch.float64) for b in SIZES])
    kish = estimators.effective_examples(weights)
    pair = estimators.unbiased_pair(*sums(examples[:, : sum(SIZES)] * weights[:, None]), kish)
    assert_unbiased(pair.g_sq, mean.square().sum())
    assert_unbiased(pair.tr_sigma, tr_sigma)


def test_expectation_over_all_outcomes():
    """h is one of four points with equal probability: the average over all 4^4 steps is the expectation itself."""
    points = torch.tensor([[3.0, 0.0], [1.0, 2.0], [-2.0, 5.0], [0.0, -1.0]], dtype=torch.float64)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    steps = torch.stack([points[list(chosen)] for chosen in itertools.product(range(4), repeat=4)])
    pair = estimators.unbiased_pair(*sums(steps * weights[:, None]), estimators.effective_examples(weights))
    G = points.mean(0)
    assert pair.g_sq.mean() == pytest.approx(float(G.square().sum()), rel=1e-12)
    assert pair.tr_sigma.mean() == pytest.approx(float((points - G).square().sum(1).mean()), rel=1e-12)


def test_token_means_of_unequal_lengths():
    """c_b = a_b h_b / N. With Kish's count the pair is unbiased; taken for equal, it is off by what is known."""
    lengths = torch.tensor([1.0, 1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    tr_sigma, g_sq, n = 3.0, 0.5, len(lengths)
    weights = lengths / lengths.sum()
    w2 = weights.square().sum()
    expected = g_sq + tr_sigma * w2, (tr_sigma + g_sq) * w2  # E |g|^2 and E q
    pair = estimators.unbiased_pair(*expected, estimators.effective_examples(lengths))
    assert [float(x) for x in pair] == pytest.approx([tr_sigma, g_sq])
    taken_for_equal = estimators.unbiased_pair(*expected, n)
    spread = float(lengths.var(correction=0) / lengths.mean() ** 2)
    assert taken_for_equal.g_sq == pytest.approx(g_sq * (1 - spread / (n - 1)))


def test_steps_of_different_size_average_without_bias(world):
    mean, tr_sigma, examples = world
    state = series.empty(1, examples)
    for part, size in zip(examples.chunk(40), (2, 5, 9, 16) * 10, strict=True):
        for step in part[:25, :size]:
            pair = estimators.unbiased_pair(*sums(step[None] / size), size)
            state = series.step(state, *pair, torch.full((1,), size - 1.0), torch.tensor(1.0))
    read = series.read(state[:, 0].tolist())
    assert abs(read.tr_sigma - tr_sigma) < 4 * math.sqrt(read.var_tr_sigma)
    assert abs(read.g_sq - mean.square().sum()) < 4 * math.sqrt(read.var_g_sq)
    assert math.sqrt(read.var_tr_sigma) < 0.05 * tr_sigma


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
