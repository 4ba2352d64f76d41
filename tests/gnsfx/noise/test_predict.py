"""The predicted total against synthetic gradients of known Sigma and G; many runs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gnsfx.noise import drift, predict
from gnsfx.noise.intervals import UNKNOWN
from gnsfx.noise.predict import Prediction

# norm layers and the rest: |G|^2, tr(Sigma) and the number of parameters
NORM, REST = (0.04, 1.0, 10), (0.24, 10.0, 40)
BLOCK, BATCH = 16, 32


def pair(h: Tensor) -> list[Tensor]:
    """Unbiased tr(Sigma) and |G|^2 from per-example gradients [runs, examples, parameters]."""
    n = h.shape[1]
    grad_sq, q = h.mean(1).square().sum(-1), h.square().sum((1, 2)) / n
    return [(q - grad_sq) * n / (n - 1), (n * grad_sq - q) / (n - 1)]


def simulate(
    runs: int,
    steps: int,
    every: int,
    growth: Callable[[int], float] = lambda step: 1.0,
    memory: float = 32,
    seed: int = 0,
) -> tuple[list[Prediction], float, float]:
    """Predictions after so many steps, the true total and the true ratio. Only tr(Sigma) of the rest grows. All parameters
    of an example are larger or smaller together, so that norm layers and total are correlated."""
    random = torch.Generator().manual_seed(seed)
    state = predict.empty(torch.zeros(runs, dtype=torch.float64)[0]).expand(runs, -1).clone()
    together = 0.2  # relative variance of the common factor
    width = math.sqrt(math.log1p(together))
    freedom = torch.full((runs,), BATCH - 1.0, dtype=torch.float64)
    full = 0
    for step in range(steps):
        factor = torch.empty(runs, BATCH, 1, dtype=torch.float64).log_normal_(-(width**2) / 2, width, generator=random)

        def draw(kind: tuple[float, float, int], scale: float, factor: Tensor = factor) -> list[Tensor]:
            g_sq, tr_sigma, size = kind
            noise = torch.randn(runs, BATCH, size, generator=random, dtype=torch.float64)
            return pair(factor * (math.sqrt(g_sq / size) + math.sqrt(scale * tr_sigma / size) * noise))

        norm = draw(NORM, 1.0)
        rows = torch.stack([*norm, freedom], 1)
        if step < BLOCK or step % every == 0:
            rest = draw(REST, growth(step))
            total = torch.stack([norm[0] + rest[0], norm[1] + rest[1], freedom], 1)
            state = torch.vmap(lambda s, n, t: predict.step(s, n, t, 0.98, memory))(state, rows, total)
            full += 1
            if full % BLOCK == 0:
                look = full // BLOCK - 1
                state = torch.vmap(lambda s, look=look: predict.close_block(s, look))(state)
        else:
            state = torch.vmap(lambda s, n: predict.step(s, n, None, 0.98, memory))(state, rows)
    g_sq = NORM[0] + REST[0]
    spread = [(1 + together) * s + together * g for s, g in ((NORM[1] + growth(steps) * REST[1], g_sq), NORM[1::-1])]
    return (
        [predict.read(row) for row in torch.vmap(predict.rows)(state).tolist()],
        spread[0] / g_sq,
        spread[0] / g_sq / (spread[1] / NORM[0]),
    )


def binomial_range(rate: float, n: int) -> tuple[float, float]:
    """Four standard errors around a rate."""
    error = 4 * math.sqrt(rate * (1 - rate) / n)
    return rate - error, rate + error


@pytest.mark.parametrize(("every", "steps"), [(2, 60), (10, 60), (10, 300)])
def test_intervals_hold_the_truth_as_often_as_they_say(every: int, steps: int) -> None:
    runs = 250
    predictions, b_simple, factor = simulate(runs, steps, every, seed=steps + every)
    low, high = binomial_range(0.95, runs)
    for truth, intervals in (
        (b_simple, [p.interval() for p in predictions]),
        (factor, [p.factor_interval() for p in predictions]),
    ):
        held = sum(i.low <= truth <= i.high for i in intervals) / runs
        assert low <= held <= min(high, 1.0)
        assert sum(i.bounded for i in intervals) > 0.8 * runs
    middle = sorted(p.b_simple for p in predictions)[runs // 2]
    assert middle == pytest.approx(b_simple, rel=0.05)
    assert all(p.tr_sigma / p.g_sq == pytest.approx(p.b_simple) for p in predictions)
    assert all(p.slopes[0] / p.slopes[1] == pytest.approx(p.factor) for p in predictions)
    assert all(i.low < s < i.high for p in predictions for s, i in zip(p.slopes, p.slope_intervals(), strict=True))


def test_an_interval_without_what_both_errors_share_would_be_too_narrow_or_too_wide() -> None:
    """With full steps only, the norm layers cancel: the interval is that of the total itself."""
    predictions, *_ = simulate(100, BLOCK, 1)
    for p in predictions:
        assert p.recent.n_eff <= p.full.n_eff
        if p.interval().bounded:
            mean, cov = p.full.mean, p.full.cov
            own = cov[0][0] / mean[0] ** 2 - 2 * cov[0][1] / mean[0] / mean[1] + cov[1][1] / mean[1] ** 2
            width = math.log(p.interval().high / p.interval().low) / 2
            assert width == pytest.approx(2.1 * math.sqrt(own), rel=0.15)


def test_no_more_false_alarms_than_stated() -> None:
    runs = 200
    predictions, *_ = simulate(runs, 320, 1, seed=1)
    alarms = sum(p.drift.count > 0 for p in predictions) / runs
    assert alarms <= binomial_range(drift.FALSE_ALARMS, runs)[1]


@pytest.mark.parametrize(
    "growth",
    [lambda step: 1.0 if step < 120 else 2.5, lambda step: 1 + 1.5 * min(max(step - 100, 0) / 250, 1)],
    ids=["a jump", "a slow drift"],
)
def test_a_ratio_that_moves_is_told(growth: Callable[[int], float]) -> None:
    predictions, b_simple, factor = simulate(40, 448, 1, growth, seed=2)
    told = [p.drift for p in predictions if p.drift.count]
    assert len(told) >= 0.9 * len(predictions)
    held = sum(p.interval().low <= b_simple <= p.interval().high for p in predictions) / len(predictions)
    assert held > 0.8
    assert all("moved from" in (d.message() or "") and d.log_after > d.log_before for d in told)
    assert sorted(p.factor for p in predictions)[20] == pytest.approx(factor, rel=0.1)


def test_looks_share_the_false_alarms() -> None:
    levels = [
        2 * len(drift.WINDOWS) * (1 - torch.special.ndtr(torch.tensor(drift.threshold(k)).double())) for k in range(999)
    ]
    assert float(sum(levels)) == pytest.approx(drift.FALSE_ALARMS, rel=2e-3)


def test_nothing_is_said_before_there_is_something() -> None:
    state = predict.empty(torch.zeros((), dtype=torch.float64))
    nothing = predict.read(predict.rows(state).tolist())
    assert nothing.interval() == nothing.factor_interval() == UNKNOWN
    assert math.isnan(nothing.b_simple)
    assert nothing.drift.message() is None
    noise_only = torch.tensor([1.0, -0.1, 7.0]).double()
    for _ in range(20):
        state = predict.step(state, noise_only, noise_only, 0.9, 32)
    state = predict.close_block(state, 0)
    unknown = predict.read(predict.rows(state).tolist())
    assert unknown.interval() == unknown.factor_interval() == UNKNOWN
    assert math.isnan(unknown.b_simple)
    assert math.isnan(unknown.factor)


def test_a_step_that_could_not_be_used_changes_nothing_but_the_decay() -> None:
    state = predict.empty(torch.zeros((), dtype=torch.float64))
    for s in (3.0, 4.0, 5.0):
        step = torch.tensor([s, 1 / s, 7.0]).double()
        state = predict.step(state, step, 2 * step, 0.9, 32)
    bad = torch.tensor([math.nan, math.inf, 0.0]).double()
    before, after = (predict.read(predict.rows(s).tolist()) for s in (state, predict.step(state, bad, bad, 1.0, 32)))
    assert before == after
