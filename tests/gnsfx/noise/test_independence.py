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
