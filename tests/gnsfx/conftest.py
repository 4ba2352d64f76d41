"""Every test compiles from nothing, with the same random numbers."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from torch import nn

from tests import zoo

# The same examples every time, on a machine of any speed.
hypothesis.settings.register_profile("gnsfx", deadline=None, derandomize=True)
hypothesis.settings.load_profile("gnsfx")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def model() -> nn.Module:
    return zoo.GPT(layers=1).double()
