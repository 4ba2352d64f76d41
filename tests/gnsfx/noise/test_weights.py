"""Examples that do not count the same: padded sequences, micro-batches of different size. Truth: sums over pairs.

With sum w = 1 and independent h_b, sum over pairs of c_i . c_j / sum over pairs of w_i w_j is an unbiased |G|^2, and
tr Cov(g) what is left of |g|^2.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gnsfx import collector
from gnsfx.errors import GnsWarning, OptionError
from gnsfx.noise.noise_scale import NoiseScale
from tests.gnsfx.noise.one_by_one import OneByOne, data, run


def contributions(model, x, y, weights):
    """c_b = w_b h_b of every example, [n, numbers], in fp64, with weights that sum to 1."""
    rows = []
    for example in range(len(x)):
        loss = F.mse_loss(model(x[example]), y[example]) * weights[example]
        rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, [*model.parameters()])]))
    return torch.stack(rows).double()


def by_pairs(rows, weights):
    """tr(Sigma) in units of effective examples, and |G|^2."""
    products, factors = rows @ rows.T, torch.outer(weights, weights)
    off = ~torch.eye(len(rows), dtype=torch.bool)
    g_sq = products[off].sum() / factors[off].sum()
    return float((rows.sum(0).square().sum() - g_sq) / weights.square().sum()), float(g_sq)


def weighted_step(source, model, noise, x, y, shares, **options):
    model.zero_grad()
    for i in range(len(x)):
        source.backward(model, x[i : i + 1], y[i : i + 1], scale=float(shares[i]))
    source.sizes = (len(x),)
    return noise.step(**options)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=9))
def test_token_means(lengths):
    torch.manual_seed(0)
    model, source = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)), OneByOne()
    x, y = data(len(lengths))
    weights = torch.tensor(lengths)
    shares = weights.double() / weights.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collector, "totals", source.totals)
        noise = NoiseScale(model)
        found = weighted_step(source, model, noise, x, y, shares, weights=weights)
    tr_sigma, g_sq = by_pairs(contributions(model, x, y, shares), shares)
    size = abs(g_sq) + tr_sigma
    assert found.tr_sigma == pytest.approx(tr_sigma, rel=1e-4, abs=1e-4 * size)
    assert found.g_sq == pytest.approx(g_sq, rel=1e-4, abs=1e-4 * size)
    assert noise.tokens_per_example == pytest.approx(sum(lengths) * float(shares.square().sum()))


def test_equal_weights_change_nothing(source, model):
    plain, weighted = NoiseScale(model), NoiseScale(model)
    (one,) = run(source, model, plain, [8])
    model.zero_grad()
    source.backward(model, *data(8))
    two = weighted.step(weights=torch.full((8,), 3.0))
    assert (one.tr_sigma, one.g_sq, one.examples) == (two.tr_sigma, two.g_sq, two.examples)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_unequal_micro_batches(source, model, reduction):
    """A mean over 2 examples counts each for more than a mean over 7; with sums all count the same."""
    sizes = [7, 2, 5]
    x, y = data(14)
    by_mean = [1 / (3 * size) for size in sizes for _ in range(size)]
    weights = torch.tensor(by_mean if reduction == "mean" else [1 / 14] * 14).double()
    for part, (xs, ys) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
        source.backward(model, xs, ys, scale=1 / 3 if reduction == "mean" else sizes[part] / 14)
    noise = NoiseScale(model, reduction=reduction)
    found = noise.step(tokens=140)
    tr_sigma, g_sq = by_pairs(contributions(model, x, y, weights), weights)
    assert (found.tr_sigma, found.g_sq, found.examples) == pytest.approx((tr_sigma, g_sq, 14), rel=1e-4)
    assert noise.tokens_per_example == pytest.approx(140 * float(weights.square().sum()))
    if reduction == "mean":
        assert 1 / float(weights.square().sum()) == pytest.approx(10.7, abs=0.05)  # Kish


def test_a_sum_instead_of_a_mean_gives_the_same_noise_scale(source, model):
    mean, total = NoiseScale(model), NoiseScale(model)
    (one,) = run(source, model, mean, [8])
    (two,) = run(source, model, total, [8], scale=8.0)
    assert two.b_simple == pytest.approx(one.b_simple)
    assert two.tr_sigma == pytest.approx(64 * one.tr_sigma)


def test_tokens(source, model):
    noise = NoiseScale(model, decay=0.5)
    for tokens in (80, 160, 160):
        model.zero_grad()
        source.backward(model, *data(8))
        noise.step(tokens=tokens)
    assert noise.tokens_per_example == pytest.approx((80 / 4 + 160 / 2 + 160) / (8 / 4 + 8 / 2 + 8))
    assert noise.b_simple_tokens == pytest.approx(noise.b_simple * noise.tokens_per_example)
    low, high = noise.interval()
    assert noise.interval(unit="tokens") == (low * noise.tokens_per_example, high * noise.tokens_per_example)


def test_without_tokens_there_is_no_number_in_tokens(source, model):
    noise = NoiseScale(model)
    for _ in run(source, model, noise, [8, 8]):
        pass
    assert math.isnan(noise.b_simple_tokens) and str(noise.interval(unit="tokens")) == "not yet detected"


BAD = [
    ({"weights": torch.ones(7)}, r"got 7 weights for 8 examples"),
    ({"weights": [torch.ones(4), torch.ones(3)]}, r"got 7 weights for 8 examples"),
    ({"weights": -torch.ones(8)}, r"not negative"),
    ({"weights": torch.zeros(8)}, r"not all zero"),
    ({"weights": torch.tensor([math.inf] + 7 * [1.0])}, r"neither NaN nor infinite"),
    ({"tokens": torch.ones(8)}, r"expected one number, got a tensor of shape \[8\]"),
    ({"tokens": math.nan}, r"tokens=nan\): expected the number of tokens"),
    ({"tokens": -5}, r"tokens=-5\.0\): expected the number of tokens"),
    ({"loss_scale": 0.0}, r"loss_scale=0\.0\): expected one positive number"),
    ({"loss_scale": torch.ones(3)}, r"expected one positive number"),
    ({"weights": torch.full((8,), 10), "tokens": 96}, r"tokens=96\): the weights add up to 80"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_weights_are_told_and_lose_nothing(source, model, options, message):
    noise = NoiseScale(model)
    next(run(source, model, noise, [8]))
    before = noise.b_simple, noise.steps
    model.zero_grad()
    source.backward(model, *data(8, 1))
    with pytest.raises(OptionError, match=message):
        noise.step(**options)
    assert (noise.b_simple, noise.steps) == before
    noise.step(weights=torch.ones(8))  # the step itself is still there
    assert noise.steps == 2


UNSEEN = [
    {"weights": torch.full((8,), 10), "tokens": 96},
    {"weights": torch.tensor([math.nan] + 7 * [1.0])},
    {"weights": torch.full((8,), math.nan)},
    {"weights": torch.tensor([-1.0] + 7 * [1.0])},
    {"weights": torch.zeros(8)},
]


@pytest.mark.parametrize("options", UNSEEN)
def test_what_only_the_device_knows_is_counted_there(source, model, monkeypatch, options):
    """On a GPU nothing is compared on the host; the step is left out and told of when something is read."""
    monkeypatch.setattr("gnsfx.noise.given._check", lambda *arguments: None)
    noise, clean = NoiseScale(model), NoiseScale(model)
    for _ in run(source, model, clean, [8]):
        pass
    next(run(source, model, noise, [8]))
    model.zero_grad()
    source.backward(model, *data(8, 1))
    noise.step(**options)
    with pytest.warns(GnsWarning, match=r"in 1 of 2 steps the weights were not as many .* the step was left out"):
        assert noise.tr_sigma == pytest.approx(clean.tr_sigma)


def test_tokens_that_only_the_device_knows_leave_no_trace(source, model, monkeypatch):
    monkeypatch.setattr("gnsfx.noise.given._check_tokens", lambda tokens: None)
    noise = NoiseScale(model)
    for tokens in (80.0, math.nan, math.inf, -1.0):
        model.zero_grad()
        source.backward(model, *data(8))
        noise.step(tokens=tokens)
    assert noise.tokens_per_example == pytest.approx(10)


def test_one_example_with_all_the_weight_is_told(source, model):
    noise = NoiseScale(model)
    source.backward(model, *data(8))
    noise.step(weights=torch.tensor([1.0] + 7 * [0.0]))
    with pytest.warns(GnsWarning, match="fewer than two examples"):
        assert math.isnan(noise.tr_sigma)


def test_weights_as_numbers(source, model):
    noise, same = NoiseScale(model), NoiseScale(model)
    for one, weights in ((noise, list(range(1, 9))), (same, torch.arange(1, 9))):
        model.zero_grad()
        source.backward(model, *data(8))
        one.step(weights=weights)
    assert noise.tr_sigma == same.tr_sigma
