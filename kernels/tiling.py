"""How the ops cut their work into cache-sized pieces: pure functions of shapes, shared with the cost model.

A per-example product [I, O] is written once and read twice (square, add), so on a CPU it should never leave the cache,
and on any device B of them should never exist at once. Sizes are plain ints.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

CPU_BUDGET = 4 << 20
"""Bytes of one scratch buffer on a CPU: measured flat from 1 to 8 MiB where two cores have 2 MiB of L2 and 32 of L3."""

CUDA_BUDGET = 256 << 20
"""Bytes of one scratch buffer on a GPU: enough products at once to fill the machine (modelled, not measured)."""

_MIN_EDGE = 256
"""No product is cut thinner than this: thinner ones cost more in the matrix multiply than they save in the cache."""


def budget_for(device_type: str) -> int:
    """Bytes of scratch that an op may hold on a device of this type."""
    return CPU_BUDGET if device_type == "cpu" else CUDA_BUDGET


class MatmulTiles(NamedTuple):
    """Largest extent, along each letter, of one product x_b^T g_b computed at once."""

    examples: int
    contractions: int
    rows: int
    columns: int

    def calls(self, B: int, E: int, I: int, O: int) -> int:
        """How many such products cover [B, E, I, O]."""
        batches = _pieces(B, self.examples) * _pieces(E, self.contractions)
        return batches * _pieces(I, self.rows) * _pieces(O, self.columns)


def matmul_tiles(B: int, E: int, I: int, O: int, itemsize: int, budget: int) -> MatmulTiles:
    """Tiles of the [B, E, I, O] products that hold at most ``budget`` bytes, as whole as they can be.

    Examples are separated first, then contractions, then the longer edge of the product.
    """
    room = max(1, budget // itemsize)
    rows, columns = I, O
    if I * O > room:
        if I >= O:
            rows = min(I, max(_MIN_EDGE, room // max(O, 1)))
        else:
            columns = min(O, max(_MIN_EDGE, room // max(I, 1)))
    fits = max(1, room // max(1, rows * columns))
    contractions = max(1, min(E, fits))
    examples = max(1, min(B, fits // contractions))
    return MatmulTiles(examples, contractions, rows, columns)


class GramTiles(NamedTuple):
    """Largest extent, along each letter, of one pair of Gram matrices held at once."""

    examples: int
    contractions: int
    positions: int

    def calls(self, B: int, E: int, T: int) -> int:
        """How many pairs of Gram blocks cover [B, E, T, T], counting only one of (i, j) and (j, i)."""
        blocks = _pieces(T, self.positions)
        return _pieces(B, self.examples) * _pieces(E, self.contractions) * blocks * (blocks + 1) // 2


FEW_POSITIONS = 16
"""Up to here the Grams of one example stay in registers (C++ kernel); beyond, a batched matrix multiply is as quick."""

_GRAM_BLOCK = 256
"""Positions of one Gram block: with more blocks the symmetric half is skipped, with smaller ones the multiply slows."""


def gram_tiles(B: int, E: int, T: int, itemsize: int, budget: int) -> GramTiles:
    """Tiles of the two [B, E, T, T] Grams that hold at most ``budget`` bytes."""
    positions = max(1, min(T, _GRAM_BLOCK))
    fits = max(1, budget // (2 * itemsize * positions * positions))
    contractions = max(1, min(E, fits))
    examples = max(1, min(B, fits // contractions))
    return GramTiles(examples, contractions, positions)


def example_chunk(B: int, per_example: int, itemsize: int, budget: int) -> int:
    """How many examples of ``per_example`` elements each fit the budget; at least one, at most B."""
    return max(1, min(B, budget // max(1, per_example * itemsize)))


def _pieces(size: int, piece: int) -> int:
    return -(-size // max(1, piece))


FEW_CHANNELS = 8
"""Our own kernel does groups of so few input channels side by side, and one group of more after another."""

_GROUPED_WEIGHT = 1 << 16
"""Largest weight whose examples are worth computing as groups of one convolution; oneDNN collapses beyond it."""

_IMAGE_POSITIONS = 2048
"""oneDNN has a kernel for the first layer of an image model, which groups would switch off; small images gain more."""


def convolution_method(
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
    positions: int,
) -> str:
    """The fastest way (of four, measured) to the per-example weight gradients of a convolution, from shapes alone.

    "taps"     depthwise: one product and sum per kernel offset. oneDNN is quick only for 3 x 3
    "matmul"   1 x 1, or patches that tile the input: columns are a view, so this is ``mm_sq_norm``
    "grouped"  small weights: a chunk of examples become groups of one convolution
    "loop"     everything else, and images of few channels: one convolution per example

    ``positions`` is the number of places of one row that the kernel visits.
    """
    kernel = tuple(weight[2:])
    if not transposed:
        depthwise = groups == weight[0] and weight[1] == 1 and groups > 1
        if depthwise and len(kernel) <= 2 and kernel != (3, 3):
            return "taps"
        tiled = tuple(stride) == kernel or (math.prod(kernel) == 1 and all(s == 1 for s in stride))
        dense = all(d == 1 or k == 1 for d, k in zip(dilation, kernel, strict=True))
        if groups == 1 and tiled and dense and not any(padding):
            return "matmul"
    image = groups == 1 and weight[1] < 4 and positions >= _IMAGE_POSITIONS
    return "grouped" if math.prod(weight) <= _GROUPED_WEIGHT and not image else "loop"


_SLOW_FP32 = 4
"""How much slower a CPU with bf16 units multiplies fp32 than bf16; Grams of bf16 must be fp32."""


def head_method(T: int, I: int, O: int, upcast: bool) -> str:
    """The norms alone of x^T g, x [T, I], g [T, O], by "ghost" or "products": whichever multiplies for less time."""
    ghost = T * min(T, (T + _GRAM_BLOCK) / 2) * (I + O) * (_SLOW_FP32 if upcast else 1)
    return "ghost" if ghost < T * I * O else "products"
