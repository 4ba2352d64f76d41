"""Groups of parameters: sums, and how far they can be trusted."""

import math
import re

import pytest
import torch
from torch import nn

from gnsfx.errors import OptionError
from gnsfx.noise.intervals import ratio_interval
from gnsfx.noise.noise_scale import NoiseScale
from tests.gnsfx.noise.one_by_one import run


@pytest.fixture
def noise(source, model):
    noise = NoiseScale(model, groups={"ends": r"^[02]\."})
    for _ in run(source, model, noise, [8, 8, 4, 16, 8, 8, 8, 8]):
        pass
    return noise


def test_layers(noise):
    layers = noise.by_group("layer")
    assert list(layers) == ["0", "1", "2"]
    rows = noise.by_parameter()
    assert layers["1"].tr_sigma == pytest.approx(rows["1.weight"].tr_sigma + rows["1.bias"].tr_sigma)
    assert layers["1"].parameters == 2


def test_the_groups_asked_for_are_the_default(noise, source, model):
    assert list(noise.by_group()) == ["ends", "other"]
    assert list(noise.by_group("module type")) == ["Linear", "LayerNorm"]
    assert list(NoiseScale(model, groups="layer").by_group()) == []


def test_a_tracked_group_is_no_wider_than_the_bound_for_any_other(noise):
    """The same parameters as a group that was tracked and as one that was not."""
    tracked = noise.by_group()["ends"]
    bounded = noise.by_group(lambda name: name[0] in "02")["True"]
    assert (tracked.tr_sigma, tracked.g_sq) == pytest.approx((bounded.tr_sigma, bounded.g_sq))
    assert (tracked.parameters, tracked.elements) == (bounded.parameters, bounded.elements)
    assert len(tracked.estimates) == 1 and len(bounded.estimates) == 4
    (a, b), (c, d) = tracked.interval(), bounded.interval()
    assert c <= a <= b <= d


def test_the_interval_of_a_tracked_group_is_that_of_its_own_series(source, model):
    """By hand: means and covariance of the steps, weighted by their freedom."""
    noise = NoiseScale(model, half_life=1e12)
    steps = list(run(source, model, noise, [8, 8, 4, 16, 8]))
    pairs = torch.tensor([[m.tr_sigma, m.g_sq] for m in steps], dtype=torch.float64)
    f = torch.tensor([m.examples - 1.0 for m in steps], dtype=torch.float64)
    mean = (f[:, None] * pairs).sum(0) / f.sum()
    centred = pairs - mean
    n_eff = len(f) * f.sum() / f.sum()
    of_mean = (f[:, None, None] * centred[:, :, None] * centred[:, None, :]).sum(0) / f.sum() / (n_eff - 1)
    (estimate,) = noise._read().total.estimates
    expected = [*mean, of_mean[0, 0], of_mean[0, 1], of_mean[1, 1], n_eff]
    found = [
        estimate.tr_sigma,
        estimate.g_sq,
        estimate.var_tr_sigma,
        estimate.cov,
        estimate.var_g_sq,
        estimate.n_eff,
    ]
    assert found == pytest.approx([float(v) for v in expected], rel=1e-6)
    assert noise.interval(0.9) == ratio_interval(estimate, 0.9)


def test_summary_has_a_line_per_group_and_an_interval(noise):
    lines = noise.summary().splitlines()
    assert "95% interval" in lines[0]
    assert [line.split()[0] for line in lines[1:4]] == ["ends", "other", "total"]
    assert lines[-1].startswith("B_simple in examples. 8 steps; 68 examples.")


def test_nothing_that_is_no_number_is_shown(source, model):
    """One step tells a noise scale, but not how far it can be trusted."""
    noise = NoiseScale(model)
    next(run(source, model, noise, [8]))
    assert noise.interval() == (0, math.inf)
    for text in (noise.summary(), repr(noise), str(noise.interval())):
        assert "not yet detected" in text and "inf" not in text and "nan" not in text


def test_a_group_can_be_empty_for_a_while(source):
    """A layer that takes part from the second step on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    noise = NoiseScale(model)
    model[1].requires_grad_(False)
    for _ in run(source, model, noise, [8]):
        assert set(noise.by_group()) == {"Linear"}
    model[1].requires_grad_(True)
    for _ in run(source, model, noise, [8]):
        assert set(noise.by_group()) == {"Linear", "LayerNorm"}


def test_groups_of_any_name_and_compiled_expressions(noise):
    by_number = noise.by_group({0: "weight", 1: re.compile("bias")})
    assert list(by_number) == ["0", "1"]
    assert by_number == noise.by_group(lambda name: int("bias" in name))


@pytest.mark.parametrize("match", ["(", 3])
def test_a_group_that_nothing_can_match_is_told(noise, match):
    with pytest.raises(OptionError, match=r"expected a regular expression|is no regular expression"):
        noise.by_group({"a": match})


def test_a_group_called_total_is_not_the_total(noise):
    lines = noise.summary(lambda name: "total" if "bias" in name else None).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["total", "12"], ["total", "42"]]
