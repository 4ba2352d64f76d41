"""Tiles cover their problem, hold what they may, and the convolution method is what the table in its docstring says."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnsfx.kernels.tiling import convolution_method, example_chunk, gram_tiles, head_method, matmul_tiles

MiB = 1 << 20
extents = st.integers(1, 5000)


@given(B=extents, E=st.integers(1, 64), I=extents, O=extents, itemsize=st.sampled_from((4, 8)))
def test_matmul_tiles_hold_at_most_the_budget(B, E, I, O, itemsize):
    tiles = matmul_tiles(B, E, I, O, itemsize, 4 * MiB)
    assert all(1 <= tile <= size for tile, size in zip(tiles, (B, E, I, O), strict=True))
    edge = min(I, O)  # a product that is wide both ways keeps its shorter edge whole
    assert math.prod(tiles) * itemsize <= max(4 * MiB, 256 * edge * itemsize)
    assert tiles.calls(B, E, I, O) == math.prod(-(-s // t) for s, t in zip((B, E, I, O), tiles, strict=True))


def test_small_products_are_one_call_and_large_ones_one_example_each():
    assert matmul_tiles(16, 2, 32, 32, 4, 4 * MiB).calls(16, 2, 32, 32) == 1
    assert matmul_tiles(16, 1, 768, 768, 4, 4 * MiB) == (1, 1, 768, 768)
    assert matmul_tiles(16, 1, 50000, 768, 4, 4 * MiB) == (1, 1, 1365, 768)


@given(B=extents, E=st.integers(1, 64), T=extents)
def test_gram_tiles_hold_at_most_the_budget(B, E, T):
    tiles = gram_tiles(B, E, T, 4, 4 * MiB)
    assert 2 * 4 * tiles.examples * tiles.contractions * tiles.positions**2 <= 4 * MiB
    blocks = -(-T // tiles.positions)
    pairs = len([(i, j) for i in range(blocks) for j in range(i + 1)])
    assert tiles.calls(B, E, T) == -(-B // tiles.examples) * -(-E // tiles.contractions) * pairs


def test_example_chunk_is_at_least_one_and_at_most_all():
    assert example_chunk(8, 10 * MiB, 4, MiB) == 1
    assert example_chunk(8, 1, 4, MiB) == 8
    assert example_chunk(8, 0, 4, MiB) == 8


@pytest.mark.parametrize(
    ("weight", "stride", "padding", "dilation", "transposed", "groups", "method"),
    [
        ((96, 1, 7, 7), [1, 1], [3, 3], [1, 1], False, 96, "taps"),
        ((256, 1, 4), [1], [3], [1], False, 256, "taps"),
        ((96, 1, 3, 3), [1, 1], [1, 1], [1, 1], False, 96, "grouped"),
        ((64, 256, 1, 1), [1, 1], [0, 0], [1, 1], False, 1, "matmul"),
        ((64, 256, 1, 1), [2, 2], [0, 0], [1, 1], False, 1, "grouped"),
        ((192, 3, 16, 16), [16, 16], [0, 0], [1, 1], False, 1, "matmul"),
        ((192, 3, 16, 16), [16, 16], [1, 0], [1, 1], False, 1, "loop"),
        ((64, 64, 3, 3), [1, 1], [1, 1], [1, 1], False, 1, "grouped"),
        ((256, 256, 3, 3), [1, 1], [1, 1], [1, 1], False, 1, "loop"),
        ((64, 32, 2, 2), [2, 2], [0, 0], [1, 1], True, 1, "grouped"),
    ],
)
def test_convolution_method(weight, stride, padding, dilation, transposed, groups, method):
    assert convolution_method(weight, stride, padding, dilation, transposed, groups, positions=100) == method


def test_convolution_of_a_large_image_is_not_grouped():
    arguments = (64, 3, 7, 7), [2, 2], [3, 3], [1, 1], False, 1
    assert convolution_method(*arguments, positions=14 * 14) == "grouped"
    assert convolution_method(*arguments, positions=112 * 112) == "loop"


def test_head_method_follows_the_positions():
    assert head_method(64, 768, 50257, upcast=False) == "ghost"
    assert head_method(4096, 768, 50257, upcast=False) == "products"
    assert head_method(512, 768, 50257, upcast=True) == "products"
