"""A small model, and contributions made one by one in place of the collectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gnsfx import collector, diagnosis
from tests.gnsfx.noise.one_by_one import OneByOne


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> OneByOne:
    """Takes the place of the collectors."""
    source = OneByOne()
    monkeypatch.setattr(collector, "totals", source.totals)
    monkeypatch.setattr(diagnosis, "diagnose", source.diagnose)
    return source


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
