"""Weight gradients that know their norms, and norms by Grams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from gnsfx.kernels import reference
from gnsfx.kernels.triton import mm_norm, plan
from tests.triton.interpreted.numbers import DTYPES, UNIT, expect, random

Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [(3, 17, 48, 40), (1, 1, 16, 8), (5, 33, 24, 64), (4, 16, 32, 32), (8, 8, 8, 8), (2, 70, 8, 136)]
TILE = plan.Tiles(t=16, i=32, o=32, group=2, warps=4, stages=2, resident=1)
GRAM = plan.GramTile(16, 16, 4, 2)


def factors(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    B, T, I, O = shape
    return random(B, T, I, dtype=dtype), random(B, T, O, dtype=dtype, seed=1)


def check_product(x: Tensor, g: Tensor, multiprocessors: int = 1, tile: plan.Tiles = TILE) -> None:
    B, T, I = x.shape
    grad, norms = reference.mm_sq_norm_ref(x.double().unsqueeze(1), g.double().unsqueeze(1))
    found = mm_norm.product_norms(x, g, multiprocessors, tile, upcast=x.dtype == torch.bfloat16)
    expect(found[0], grad[0], UNIT[x.dtype], terms=B * T)
    expect(found[1].sum(0), norms, terms=T * I)


def check_gram(x: Tensor, g: list[Tensor], tile: plan.GramTile = GRAM) -> None:
    found = mm_norm.gram_norms(x, g, tile, upcast=x.dtype == torch.bfloat16)
    for each, parts in zip(g, found, strict=True):
        _, norms = reference.mm_sq_norm_ref(x.double().unsqueeze(1), each.double().unsqueeze(1))
        expect(parts.sum(0), norms, terms=x.shape[1] * (x.shape[2] + each.shape[2]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 8])
def test_products(shape: Shape, dtype: torch.dtype, multiprocessors: int) -> None:
    check_product(*factors(shape, dtype), multiprocessors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grams(shape: Shape, dtype: torch.dtype) -> None:
    x, g = factors(shape, dtype)
    check_gram(x, [g])


@pytest.mark.parametrize("count", [2, 3])
def test_grams_of_several_factors(count: int) -> None:
    x = random(3, 37, 40)
    check_gram(x, [random(3, 37, 8 * (2 + n), seed=n) for n in range(count)])


def test_tiles_that_are_shipped() -> None:
    x, g = factors((2, 70, 136, 264), torch.float16)
    for tile in plan.TILES:
        if tile != plan.REDUCE:  # which takes an addition by the copy engine
            check_product(x, g, 132, tile)
    for gram in plan.GRAMS:
        check_gram(x, [g], gram)


@seed(0)
@settings(max_examples=20, database=None, deadline=None, phases=[Phase.generate])
@given(
    *(st.integers(1, n) for n in (7, 40)),
    *(st.integers(1, 10).map(lambda n: 4 * n) for _ in range(2)),
    st.integers(1, 12),
)
def test_any_shape(B: int, T: int, I: int, O: int, multiprocessors: int) -> None:
    x, g = factors((B, T, I, O))
    check_product(x, g, multiprocessors)
    check_gram(x, [g])


def test_the_next_example_is_never_read() -> None:
    x, g = factors((3, 5, 16, 16))
    x[1], g[1] = float("nan"), float("nan")
    _, norms = mm_norm.product_norms(x, g, 1, TILE)
    assert norms.sum(0).isnan().tolist() == [False, True, False]
    (norms,) = mm_norm.gram_norms(x, [g], GRAM)
    assert norms.sum(0).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "view", ["every other example", "columns of a wider one", "positions first", "expanded", "a single row"]
)
def test_views(view: str) -> None:
    def make(seed: int) -> Tensor:
        return {
            "every other example": lambda: random(6, 9, 32, seed=seed)[::2],
            "columns of a wider one": lambda: random(6, 9, 64, seed=seed)[..., 16:48],
            "positions first": lambda: random(9, 6, 32, seed=seed).transpose(0, 1),
            "expanded": lambda: random(6, 1, 32, seed=seed).expand(6, 9, 32).contiguous(),
            "a single row": lambda: random(1, 9, 32, seed=seed)[:, :1],
        }[view]()

    check_product(make(0), make(1), 3)
    check_gram(make(0), [make(1)])
