"""Norms of what lookups add to a table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from gnsfx.kernels import reference
from gnsfx.kernels.embedding_norm import SKIPPED
from gnsfx.kernels.triton import embedding_norm
from tests.triton.interpreted.numbers import DTYPES, expect, random

SHAPES = [(3, 17, 48, 5), (2, 1, 8, 3), (1, 33, 300, 100), (3, 12, 16, 1), (4, 4, 4, 4)]


def some_ids(B: int, T: int, V: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def check(ids: Tensor, g: Tensor, piece: int) -> None:
    """With ids that stand side by side, in the reference, as rows of a small table; skipped ones as zeros."""
    rows = g.double().masked_fill((ids == SKIPPED).unsqueeze(2), 0.0)
    _, dense = ids.unique(return_inverse=True)
    found = embedding_norm.embedding_norms(ids, g, piece).sum(0)
    expect(found, reference.embedding_sq_norm_ref(dense, rows), terms=g[0].numel())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, T, D, V = shape
    ids = some_ids(B, T, V)
    ids[-1] = 0  # one run, longer than those of all others
    for piece in (4, 16):
        check(ids, random(B, T, D, dtype=dtype), piece)


@seed(0)
@settings(max_examples=15, database=None, deadline=None, phases=[Phase.generate])
@given(*(st.integers(1, n) for n in (3, 24, 20, 6)), st.integers(2, 9), st.integers(0, 99))
def test_any_ids(B: int, T: int, D: int, V: int, piece: int, draw: int) -> None:
    """Runs that end where a piece does, or go on through several."""
    check(some_ids(B, T, V, draw).sort(1)[0], random(B, T, D, seed=draw), piece)


def test_ids_that_are_skipped_and_any_integers() -> None:
    ids = torch.tensor([[SKIPPED, 5, -100, 5, SKIPPED], [SKIPPED] * 5, [-100, -100, 2**40, 7, 7]])
    g = random(3, 5, 24)
    g[ids == SKIPPED] = float("nan")
    for piece in (2, 3, 16):
        check(ids, g, piece)
    check(ids.clamp(-100, 7).int(), random(3, 5, 24), 2)


@pytest.mark.parametrize("view", ["positions first", "columns of a wider one", "every other column", "expanded"])
def test_views(view: str) -> None:
    ids = some_ids(3, 10, 4)
    g = {
        "positions first": random(10, 3, 16).transpose(0, 1),
        "columns of a wider one": random(3, 10, 40)[..., 8:24],
        "every other column": random(3, 10, 32)[..., ::2],
        "expanded": random(3, 1, 16).expand(3, 10, 16),
    }[view]
    check(ids.t().contiguous().t() if view == "positions first" else ids, g, 4)
