"""Noise between backward passes against noise of single examples: 1 if they are independent, b for b copies."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gnsfx.errors import NotMeasuredError
from gnsfx.noise.independence import IndependenceCheck
from gnsfx.noise.noise_scale import NoiseScale


def run(copies, steps=60, passes=4, size=12):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager"})
    noise = NoiseScale(model)
    check = IndependenceCheck(noise)
    for _ in range(steps):
        for _ in range(passes):
            x = torch.randn(size // copies, 4).repeat_interleave(copies, 0)
            y = torch.randn(size // copies, 2).repeat_interleave(copies, 0)
            (F.mse_loss(compiled(x), y) / passes).backward()
        check.step(noise.step())
        model.zero_grad()
    return check


def test_independent_examples():
    check = run(1)
    low, high = check.interval(0.999)
    assert low < 1 < high < 1.5
    assert check.message is None and "(1: independent)" in str(check)
    assert check.steps == 60


def test_copies_are_found_and_counted():
    """b copies are one example: rho = 1, so that the ratio is b, but for the factor (1 - 1/n) of a variance over copies."""
    check = run(3)
    low, high = check.interval(0.999)
    assert low < 3 < high
    assert "are correlated" in (check.message or "") and "Shuffle" in str(check)


def test_one_pass_says_nothing():
    check = run(1, steps=5, passes=1)
    assert str(check.interval()) == "not yet detected" and check.message is None


def test_without_backward_it_says_so():
    model = nn.Linear(2, 2)
    noise = NoiseScale(model)
    with pytest.raises(NotMeasuredError, match="no backward pass ran"):
        IndependenceCheck(noise).step(None)  # type: ignore[arg-type]


def test_hooks_go_with_close():
    model = nn.Linear(2, 2)
    check = IndependenceCheck(NoiseScale(model))
    check.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(3, 2)).sum().backward()
    assert not check._squares


def test_what_the_step_did_not_measure_counts_on_neither_side():
    """In a run where a result of a parameter alone is used outside, only the device knows that it is refused."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.out = nn.Parameter(torch.ones(4)), nn.Linear(4, 2)
            nn.init.constant_(self.out.weight, 5.0)  # most of the noise is in scale

        def forward(self, x):
            return self.out(x * self.scale), self.scale.square()

    model = Net()
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager"})
    noise = NoiseScale(model)
    check = IndependenceCheck(noise)
    for _ in range(40):
        for _ in range(4):
            found, squares = compiled(torch.randn(12, 4))
            ((found - torch.randn(12, 2)).square().mean() + 30 * squares.sum()).div(4).backward()
        measured = noise.step()
        assert float(noise._tracked.refused.sum()) == 1
        check.step(measured)
        model.zero_grad()
    low, high = check.interval(0.999)
    assert low < 1 < high < 1.5
