"""Compiled graphs and random numbers do not pass from test to test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
