"""Every test compiles from nothing, with the same random numbers."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from torch import nn

from gnsfx import collector
from tests.gnsfx.noise.one_by_one import OneByOne

# The same examples every time, on a machine of any speed.
hypothesis.settings.register_profile("gnsfx", deadline=None, derandomize=True)
hypothesis.settings.load_profile("gnsfx")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> OneByOne:
    """Takes the place of the collectors."""
    source = OneByOne()
    for name in ("totals", "diagnose"):
        monkeypatch.setattr(collector, name, getattr(source, name))
    return source


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
