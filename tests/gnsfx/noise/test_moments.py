"""Sums of averages and covariances: the same as from all steps at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gnsfx.noise import moments


def rows_of(x: Tensor, freedom: Tensor, decay: float) -> Tensor:
    row = torch.zeros(moments.length(x.shape[1]), dtype=x.dtype)
    for values, f in zip(x, freedom, strict=True):
        row = moments.join(row, moments.one(values, f), decay)
    return row


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 12), st.floats(0.3, 1.0), st.integers(0, 10**6))
def test_as_from_all_steps_at_once(d: int, steps: int, decay: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, d, generator=random, dtype=torch.float64) + 3
    freedom = torch.randint(0, 9, (steps,), generator=random).double()
    freedom[-2:] = torch.tensor([3.0, 5.0])
    found = moments.read(rows_of(x, freedom, decay).tolist())
    counts = decay ** torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (freedom > 0)
    weights = counts * freedom
    mean = (weights[:, None] * x).sum(0) / weights.sum()
    centred = x - mean
    squares = (counts * weights).sum()
    n_eff = counts.sum() * weights.sum() / squares
    cov = torch.einsum("t,ti,tj->ij", weights, centred, centred) / weights.sum() / (n_eff - 1)
    torch.testing.assert_close(torch.tensor(found.mean).double(), mean)
    torch.testing.assert_close(torch.tensor(found.cov).double(), cov)
    assert found.n_eff == pytest.approx(float(n_eff))
    assert found.squares == pytest.approx(float(squares))


def test_rows_join_in_any_cut() -> None:
    x, freedom = torch.randn(10, 3, dtype=torch.float64), torch.randint(1, 5, (10,)).double()
    whole = rows_of(x, freedom, 1.0)
    for cut in (0, 1, 4, 10):
        parts = (rows_of(x[part], freedom[part], 1.0) for part in (slice(cut), slice(cut, None)))
        torch.testing.assert_close(moments.join(*parts), whole)


def test_steps_that_say_nothing_leave_nothing() -> None:
    row = rows_of(torch.ones(3, 2, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0]), 0.9)
    for values in ([float("nan"), 1.0], [float("inf"), float("-inf")]):
        nothing = moments.one(torch.tensor(values).double(), torch.tensor(0.0))
        torch.testing.assert_close(moments.join(row, nothing), row)
    assert moments.read(torch.zeros(9).tolist()).n_eff == 0
    assert torch.isnan(moments.variance(moments.one(torch.ones(2), torch.tensor(3.0)), torch.ones(2))[0])
