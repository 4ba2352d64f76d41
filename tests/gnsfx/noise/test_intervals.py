"""Intervals of the noise scale: what they must hold, how often they do, and what they say when little is known."""

import math
import random
import statistics

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks import monte_carlo, synthetic
from gnsfx.errors import OptionError
from gnsfx.noise import intervals
from gnsfx.noise.intervals import UNKNOWN, Estimate, Interval, of_sum, one_step, ratio_interval

spread = st.floats(1e-3, 10)
levels = st.floats(0.05, 0.99)


@st.composite
def estimates(draw):
    sd_s, sd_g, correlation = draw(spread), draw(spread), draw(st.floats(-0.95, 0.95))
    means = draw(st.floats(0.01, 100)), draw(st.floats(-20, 20))
    return Estimate(*means, sd_s**2, correlation * sd_s * sd_g, sd_g**2, draw(st.floats(3, 500)))


def times(estimate, factor):
    """Of gradients larger by sqrt(factor)."""
    moments = (m * factor**2 for m in (estimate.var_tr_sigma, estimate.cov, estimate.var_g_sq))
    return Estimate(estimate.tr_sigma * factor, estimate.g_sq * factor, *moments, estimate.n_eff)


loadings = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=3, max_size=3)


def loaded(means, loads, n_eff=30.0):
    """An estimate whose errors in S and G are these loadings on three independent factors."""
    moments = (math.fsum(load[i] * load[j] for load in loads) for i, j in ((0, 0), (0, 1), (1, 1)))
    return Estimate(*means, *moments, n_eff)


@pytest.mark.parametrize(
    ("interval", "text", "bounded", "detected"),
    [
        (Interval(160.4, 290.2), "160..290", True, True),
        (Interval(1.234, 12345), "1.23..12,300", True, True),
        (Interval(160, math.inf), "at least 160", False, True),
        (Interval(0, 3), "0..3", True, True),
        (UNKNOWN, "not yet detected", False, False),
    ],
)
def test_what_an_interval_says(interval, text, bounded, detected):
    assert (str(interval), interval.bounded, interval.detected) == (text, bounded, detected)


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile", "within"),
    [  # tables of Student's t; the error is on the safe side
        (0.975, 2, 4.3027, 0.05),
        (0.975, 3, 3.1824, 0.015),
        (0.975, 5, 2.5706, 0.003),
        (0.975, 10, 2.2281, 5e-4),
        (0.975, 30, 2.0423, 1e-4),
        (0.975, 1e9, 1.95996, 1e-5),
        (0.95, 5, 2.0150, 1e-3),
        (0.995, 10, 3.1693, 2e-3),
    ],
)
def test_t_quantile(probability, freedom, quantile, within):
    found = intervals.t_quantile(probability, freedom)
    assert -2e-5 < found / quantile - 1 < within
    assert intervals.t_tail(found, freedom) == pytest.approx(1 - probability, rel=1e-9)


def covers(x, mu):
    k_low, k_high = intervals._quantiles(x, 1e9, 0.95)
    return (0 if k_high is None else x - k_high) <= mu <= x + k_low


@pytest.mark.parametrize("mu", [0.02, 0.4, 1.0, 1.7, 2.5, 5.0])
def test_quantiles_are_those_of_feldman_and_cousins(mu):
    """Their construction by brute force: take observations in the order of likelihood ratio until 95% are in."""
    width = 0.002
    grid = [k * width for k in range(round((mu - 7) / width), round((mu + 7) / width))]
    ranked = sorted(grid, key=lambda x: (x - mu) ** 2 - min(x, 0.0) ** 2)
    accepted, mass = [], 0.0
    while mass < 0.95:
        x = ranked[len(accepted)]
        accepted.append(x)
        mass += width * math.exp(-((x - mu) ** 2) / 2) / math.sqrt(2 * math.pi)
    for end, inward in ((min(accepted), 0.01), (max(accepted), -0.01)):
        if end > -2.6:  # where theirs goes on falling, and ours stops
            assert covers(end + inward, mu)
            assert not covers(end - inward, mu)


@given(estimates(), levels)
def test_ends_satisfy_fieller(estimate, level):
    """(S - R G)^2 = t^2 v(R) at both ends, as soon as |G|^2 is well above its error."""
    t = intervals.t_quantile((1 + level) / 2, estimate.n_eff - 1)
    if estimate.g_sq < 2.01 * t * math.sqrt(estimate.var_g_sq):
        return
    found = ratio_interval(estimate, level)
    assert found.low <= estimate.tr_sigma / estimate.g_sq <= found.high < math.inf
    for end in found:
        if end > 0:
            variance = estimate.var_tr_sigma - 2 * end * estimate.cov + end**2 * estimate.var_g_sq
            assert abs(estimate.tr_sigma - end * estimate.g_sq) == pytest.approx(t * math.sqrt(variance), rel=1e-6)
        else:
            assert estimate.tr_sigma <= t * math.sqrt(estimate.var_tr_sigma)


@given(estimates(), levels, levels)
@example(Estimate(9.0, -4.0, 1.0, 0.0, 0.25, 22.0), 0.5, 0.9)
def test_more_confidence_is_a_wider_interval(estimate, level, other):
    narrow, wide = (ratio_interval(estimate, level) for level in sorted((level, other)))
    assert wide.low <= narrow.low * (1 + 1e-9)
    assert wide.high >= narrow.high * (1 - 1e-9)


@given(estimates(), st.sampled_from([1e-12, 1 / 65536**2, 1 / 32, 1e12]))
def test_no_change_with_the_scale_of_the_gradient(estimate, factor):
    """Sum or mean loss, loss scale: not even which kind of answer it is."""
    assert ratio_interval(times(estimate, factor)) == pytest.approx(ratio_interval(estimate), rel=1e-6)


@given(loadings, loadings, st.floats(0.1, 50), st.floats(0.1, 50))
@example([(0.0, 0.0), (0.0, 0.0), (1.0, 0.25)], [(0.0, 0.0), (1.0, 0.25), (1.0, 0.0)], 1.0, 0.5)
def test_a_sum_is_never_surer_than_with_its_covariance(a, b, tr_sigma, g_sq):
    both = [(x[0] + y[0], x[1] + y[1]) for x, y in zip(a, b, strict=True)]
    known = ratio_interval(loaded((2 * tr_sigma, 2 * g_sq), both))
    unknown = of_sum([loaded((tr_sigma, g_sq), a), loaded((tr_sigma, g_sq), b)])
    assert unknown.low <= known.low * (1 + 1e-6)
    assert unknown.high >= known.high * (1 - 1e-6)


@given(estimates())
def test_a_sum_of_equal_parts_loses_nothing(estimate):
    whole, parts = ratio_interval(estimate), of_sum([estimate] * 5)
    assert parts.low == pytest.approx(whole.low, rel=1e-6)
    if estimate.g_sq > 2 * intervals.t_quantile(0.975, estimate.n_eff - 1) * math.sqrt(estimate.var_g_sq):
        assert parts.high == pytest.approx(whole.high, rel=1e-6)
    else:
        assert parts.high >= whole.high


def test_a_sum_knows_its_variances_no_better_than_its_least_known_part():
    few, many = (Estimate(10.0, 5.0, 0.1, 0.0, 0.1, n_eff) for n_eff in (4, 400))
    assert of_sum([few, many]) == of_sum([few, few]) != of_sum([many, many])


@given(estimates())
def test_below_zero_says_less_the_further_it_is_sure(estimate):
    """A |G|^2 that comes out negative is a lower bound of a sensible size, however negative."""
    negative = Estimate(100.0, -abs(estimate.g_sq), 1.0, 0.0, 1.0, estimate.n_eff)
    found = ratio_interval(negative)
    assert not found.bounded
    # At most what |G|^2 = sd / 2 would give, and tr(Sigma) two and a half standard deviations up.
    assert 0 < found.low < 250


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(math.nan, math.nan, math.nan, math.nan, math.nan, 0), UNKNOWN),
        (Estimate(6.0, 2.0, math.nan, math.nan, math.nan, 1.0), UNKNOWN),
        (Estimate(6.0, 2.0, 0.1, 0.0, 0.1, 2.9), UNKNOWN),
        (Estimate(6.0, math.nan, 0.1, 0.0, 0.1, 50), UNKNOWN),
        (Estimate(math.inf, 1.0, 0.1, 0.0, 0.1, 50), UNKNOWN),
        (Estimate(6.0, 2.0, 0.0, 0.0, 0.0, 50), Interval(3.0, 3.0)),
        (Estimate(6.0, -2.0, 0.0, 0.0, 0.0, 50), UNKNOWN),
        (Estimate(0.0, 0.0, 0.0, 0.0, 0.0, 50), UNKNOWN),
        (Estimate(0.0, 2.0, 0.0, 0.0, 0.0, 50), Interval(0.0, 0.0)),
    ],
)
def test_limit_cases(estimate, expected):
    assert ratio_interval(estimate) == pytest.approx(expected)
    assert of_sum([estimate, estimate]) == pytest.approx(expected)


def test_no_parts_is_nothing():
    assert of_sum([]) == UNKNOWN


@pytest.mark.parametrize("world", synthetic.WORLDS, ids=lambda world: world.name)
@pytest.mark.parametrize(("batch", "noise_scale"), [(4, 1), (4, 10_000), (64, 300), (1024, 10_000)])
def test_coverage_and_bias(world, batch, noise_scale):
    """The benchmark in small: its bands, widened by three standard errors of this many runs."""
    generator = torch.Generator().manual_seed(batch + noise_scale)
    steps = synthetic.draw(world, batch, noise_scale, 250, 400, generator)
    row = monte_carlo.judge(steps, batch, noise_scale)
    assert abs(row["bias_tr_sigma"]) < 4
    assert abs(row["bias_g_sq"]) < 4
    assert 0.93 - 3 * row["coverage_se"] < row["coverage"]
    assert row["coverage"] < 0.97 + 3 * row["coverage_se"]


def test_both_regimes_are_seen():
    """Otherwise the coverage above would be that of one kind of answer."""
    kinds = []
    for noise_scale in (1, 10_000):
        steps = synthetic.draw(synthetic.WORLDS[0], 16, noise_scale, 250, 100, torch.Generator().manual_seed(0))
        kinds.append(monte_carlo.judge(steps, 16, noise_scale)["low_only"])
    assert kinds[0] == 0
    assert kinds[1] > 0.5


def cover_one_step(world, batch, noise_scale, runs=400, constant=False):
    generator = torch.Generator().manual_seed(batch)
    norms, grad_sq = synthetic.draw_examples(world, batch, noise_scale, runs, generator, constant)
    found = [one_step(*step) for step in zip(norms.tolist(), grad_sq.tolist(), strict=True)]
    return sum(i.low <= noise_scale <= i.high for i in found) / runs


ONE_STEP_WORLDS = (
    synthetic.World("isotropic", ((1.0, 64, 1.0),)),
    synthetic.World("low rank", synthetic.LOW_RANK),
    synthetic.World("heavy tails", ((1.0, 64, 1.0),), synthetic.LOG_NORMAL),
)


@pytest.mark.parametrize("world", ONE_STEP_WORLDS, ids=lambda world: world.name)
@pytest.mark.parametrize(("batch", "noise_scale"), [(8, 1), (32, 30), (256, 30), (64, 1000)])
def test_one_step_covers(world, batch, noise_scale):
    assert cover_one_step(world, batch, noise_scale) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 400)


def test_one_step_does_not_cover_noise_of_constant_length():
    """As its docstring warns: should this fail, take the warning out."""
    assert cover_one_step(ONE_STEP_WORLDS[0], 64, 1000, constant=True) < 0.8


def contributions(batch=64, noise_scale=10, runs=1):
    generator = torch.Generator().manual_seed(1)
    norms, grad_sq = synthetic.draw_examples(ONE_STEP_WORLDS[0], batch, noise_scale, runs, generator)
    return norms[0].tolist(), float(grad_sq[0])


@pytest.mark.parametrize("extra", [0.0, 1e-5])
def test_ends_of_one_step(extra):
    """In the terms of per-example gradients g_b = B c_b: at each end p and G are as far apart as the docstring allows."""
    norms, grad_sq = contributions()
    B, squares = len(norms), [len(norms) ** 2 * norm for norm in norms]
    Q, v = statistics.mean(squares), statistics.variance(squares)
    G = (B * grad_sq - Q) / (B - 1)
    t = intervals.t_quantile(0.975, B - 1)
    for R, side in zip(one_step(norms, grad_sq, extra_variance=extra), (1, -1), strict=True):
        p = Q / (R + 1)
        u = p * p * (math.sqrt(1 + v / (2 * p * p)) - 1)
        sd_q = math.sqrt(v / B + B * B * extra)
        sd_g = math.sqrt(4 * u / B + 2 * (u / p) ** 2 / (B * (B - 1)) + extra / (1 - 1 / B) ** 2)
        assert side * (p - G) == pytest.approx(t * (p / Q * sd_q + sd_g), rel=1e-6)


def test_one_step_is_about_one_scale_only():
    norms, grad_sq = contributions()
    found = one_step(norms, grad_sq)
    assert found.bounded
    for factor in (1e-10, 64**2, 65536.0**2):
        assert one_step([norm * factor for norm in norms], grad_sq * factor) == pytest.approx(found)
    assert one_step(norms, grad_sq, weights=[7.0] * 64) == pytest.approx(found)
    order = list(range(64))
    random.Random(0).shuffle(order)
    assert one_step([norms[i] for i in order], grad_sq) == pytest.approx(found)


def test_one_step_leaves_out_examples_of_weight_zero():
    norms, grad_sq = contributions()
    assert one_step([*norms, 0.0], grad_sq, [1.0] * 64 + [0.0]) == pytest.approx(one_step(norms, grad_sq))


@pytest.mark.parametrize("change", [{"level": 0.99}, {"extra_variance": 1e-5}])
def test_one_step_widens(change):
    norms, grad_sq = contributions()
    found, wider = one_step(norms, grad_sq), one_step(norms, grad_sq, **change)
    assert wider.low < found.low < found.high < wider.high


def test_one_step_with_unequal_weights_covers():
    generator = torch.Generator().manual_seed(2)
    weights = torch.tensor([1.0, 2.0, 5.0, 10.0], dtype=torch.float64).repeat(8)
    noise_scale, runs, held = 20, 300, 0
    for _ in range(runs):
        h = torch.randn(32, 30, dtype=torch.float64, generator=generator) / math.sqrt(30) + 1 / math.sqrt(20 * 30)
        c = h * (weights / weights.sum())[:, None]
        found = one_step(c.square().sum(1).tolist(), float(c.sum(0).square().sum()), weights.tolist())
        held += found.low <= noise_scale <= found.high
    assert held / runs > 0.95 - 3 * math.sqrt(0.95 * 0.05 / runs)


@pytest.mark.parametrize(
    ("norms", "grad_sq", "weights"),
    [
        ([], 0.0, None),
        ([1.0], 1.0, None),
        ([1.0, 1.0], 3.0, None),
        ([0.0] * 5, 0.0, None),
        ([math.nan] * 5, 1.0, None),
        ([1.0] * 5, math.inf, None),
        ([1.0] * 5, 9.0, [1.0, 0.0, 0.0, 0.0, 0.0]),
        ([1.0] * 5, 9.0, [0.0] * 5),
    ],
)
def test_one_step_without_enough_to_go_on(norms, grad_sq, weights):
    assert one_step(norms, grad_sq, weights) == UNKNOWN


@pytest.mark.parametrize("level", [95, 0, 1, math.nan])
def test_a_level_that_is_no_probability_is_told(level):
    for interval in (
        lambda: ratio_interval(Estimate(1, 1, 0.1, 0, 0.1, 9), level),
        lambda: one_step([1.0] * 9, 3, None, level),
    ):
        with pytest.raises(OptionError, match=r"interval\(level=.*expected a number between 0 and 1"):
            interval()
