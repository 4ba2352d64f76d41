"""The running sums against the same sums written out, and the variance that they claim against its definition."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gnsfx.noise import series

value = st.floats(-100, 100)
freedom = st.one_of(st.just(0.0), st.floats(0.5, 50))
decay = st.floats(0.05, 1)
history = st.lists(st.tuples(value, value, freedom, decay), min_size=1, max_size=12)


def run(steps, dtype=torch.float64):
    """One column, from (tr_sigma, g_sq, freedom, decay) of every step."""
    state = series.empty(1, torch.zeros((), dtype=dtype))
    for step in steps:
        state = series.step(state, *(torch.tensor([number], dtype=dtype) for number in step))
    return state[:, 0].tolist()


def written_out(steps):
    """The nine numbers by their definitions."""
    steps = [(s, g, f, math.prod(d for *_, d in steps[t + 1 :])) for t, (s, g, f, _) in enumerate(steps)]
    steps = [step for step in steps if step[2] > 0]
    W = math.fsum(d * f for *_, f, d in steps)
    mean_s = math.fsum(d * f * s for s, _, f, d in steps) / W
    mean_g = math.fsum(d * f * g for _, g, f, d in steps) / W
    centred = [(s - mean_s, g - mean_g, d * f) for s, g, f, d in steps]
    return [
        mean_s,
        mean_g,
        math.fsum(w * s * s for s, _, w in centred),
        *[math.fsum(w * s * g for s, g, w in centred)] * 2,
        math.fsum(w * g * g for _, g, w in centred),
        W,
        math.fsum(d for *_, d in steps),
        math.fsum(d * d * f for *_, f, d in steps),
    ]


@given(history)
def test_running_sums_are_the_sums(steps):
    if any(f > 0 for _, _, f, _ in steps):
        assert run(steps) == pytest.approx(written_out(steps), rel=1e-9, abs=1e-9)
    else:
        assert run(steps) == [0.0] * series.SERIES_ROWS


@given(history)
def test_steps_without_freedom_only_decay(steps):
    steps = [(s, g, f or 1.0, d) for s, g, f, d in steps]
    idle = [(math.nan, math.inf, f, 0.5) for f in (0.0, -1.0)]
    mean_s, mean_g, *moments, W, D, E = run(steps)
    decayed = [mean_s, mean_g, *(m / 4 for m in moments), W / 4, D / 4, E / 16]
    assert run([*idle, *steps, *idle]) == pytest.approx(decayed)


def test_columns_are_independent():
    steps = torch.rand(6, 3, 5, dtype=torch.float64)
    decays = torch.rand(6, 5, dtype=torch.float64)
    state = series.empty(5, steps)
    for step, d in zip(steps, decays, strict=True):
        state = series.step(state, *step, d)
    for k in range(5):
        alone = [(*step[:, k].tolist(), float(d[k])) for step, d in zip(steps, decays, strict=True)]
        assert state[:, k].tolist() == pytest.approx(run(alone))


def test_variance_of_the_mean_is_unbiased():
    """Over all signs of x_t = 3 +- sqrt(C / f_t), so that the expectation is a finite sum."""
    freedoms, decays, C = (7.0, 1.0, 3.0, 15.0, 2.0), (1.0, 0.9, 0.5, 0.8, 0.7), 2.0
    means, claims = [], []
    for signs in itertools.product((-1, 1), repeat=len(freedoms)):
        x = [3 + sign * math.sqrt(C / f) for sign, f in zip(signs, freedoms, strict=True)]
        read = series.read(run(list(zip(x, [-2 * v for v in x], freedoms, decays, strict=True))))
        means.append(read.tr_sigma)
        claims.append((read.var_tr_sigma, read.cov, read.var_g_sq))
    true = math.fsum((m - 3) ** 2 for m in means) / len(means)
    claimed = [math.fsum(claim) / len(claims) for claim in zip(*claims, strict=True)]
    assert claimed == pytest.approx([true, -2 * true, 4 * true], rel=1e-12)


@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_n_eff_of_equal_steps(steps):
    beta = 0.99
    expected = (1 + beta) / (1 - beta) * (1 - beta**steps) / (1 + beta**steps)
    assert series.read(run([(1.0, 1.0, 5.0, beta)] * steps)).n_eff == pytest.approx(expected)


def test_small_spread_on_a_large_mean():
    steps = [(1e9 + k % 2, 1e9 - k % 2, 3.0, 1.0) for k in range(1000)]
    read = series.read(run(steps))
    assert read.var_tr_sigma == pytest.approx(0.25 / 999)
    assert read.cov == pytest.approx(-0.25 / 999)


def test_single_precision():
    generator = torch.Generator().manual_seed(0)
    steps = [(1 + x, 1 - x, 3.0, 0.99) for x in torch.randn(500, generator=generator).tolist()]
    assert run(steps, torch.float32) == pytest.approx(run(steps), rel=500 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(("steps", "n_eff"), [(0, 0.0), (1, 1.0)])
def test_nothing_is_claimed_before_the_second_step(steps, n_eff):
    read = series.read(run([(2.0, 1.0, 3.0, 0.9)] * steps + [(0.0, 0.0, 0.0, 0.9)]))
    assert read.n_eff == n_eff
    assert math.isnan(read.var_g_sq)
    assert math.isnan(read.tr_sigma) == (steps == 0)


def test_all_decayed_away_is_nothing():
    assert series.read(run([(2.0, 1.0, 3.0, 1.0)] * 3 + [(0.0, 0.0, 0.0, 1e-200)] * 2)).n_eff == 0


def test_a_step_does_not_wait_for_the_device():
    """Meta tensors have no values to wait for."""
    ones = torch.ones(4, device="meta")
    assert series.step(series.empty(4, ones), ones, ones, ones, ones[0]).shape == (9, 4)
