"""What our CUDA kernels cost, from shapes and the number of multiprocessors: :mod:`gnsfx.kernels.cost` has the terms.

    programs of a kernel        blocks of the result x runs of examples (or: pairs of blocks of positions x examples)
    rounds                      ceil(programs / multiprocessors): what the busiest multiprocessor has to do
    FLOPs paid for              rounds * multiprocessors * FLOPs of one program, its block and its positions whole

So a result smaller than its blocks, positions that end within a block, and multiprocessors with nothing to do all count.
Rates are those of a multiprocessor that always multiplies. Where programs share one, one of them squares while the others
multiply. A Gram loads ahead while it multiplies, so that it takes the longer of both.

Factors that are not of 16 bits, not of widths in multiples of 8, or of several contractions cost what
:func:`gnsfx.kernels.cost.matmul_paths` says.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from gnsfx.kernels.cost import Cost, cheapest, gemm
from gnsfx.kernels.machine import Machine
from gnsfx.kernels.triton import plan

TILES = {plan.LARGE: "large_flops", plan.SMALL: "small_flops", plan.REDUCE: "reduce_flops"}
"""The constant of the machine that a tile multiplies at."""
ALL_TILES, ALL_GRAMS = range(len(plan.TILES)), range(len(plan.GRAMS))
CHOSEN = (plan.TILES.index(plan.LARGE), plan.TILES.index(plan.SMALL))
"""Tiles that are taken without being asked for. REDUCE adds examples in no fixed order, and nothing but a GPU can run it."""
HIDES_A_BYTE = 100
"""FLOPs that a Gram does in the time that memory takes for a byte: with fewer it waits for its factors."""
SORT_BYTES = 128
"""Through memory, to sort one id and its position: 8 passes over both."""
ALIGNMENT = 8
"""Entries of 16 bits in the 16 bytes that the copy engine moves at least."""


def product(B: int, T: int, I: int, O: int, tile: int, multiprocessors: int) -> Cost:
    """Gradient [I, O] and norms by the op ``mm_norm_parts``: with two accumulators, or added up by the copy engine."""
    tiles = plan.TILES[tile]
    if tiles is plan.REDUCE:
        return _reduced(B, T, I, O, multiprocessors)
    cut = plan.cut_products(B, T, I, O, multiprocessors, tiles)
    rounds = -(-cut.programs // multiprocessors)
    squared = rounds * multiprocessors * tiles.i * tiles.o * cut.each
    partial = 4 * cut.runs * I * O if cut.runs > 1 else 0
    return replace(
        gemm(1, I, O, B * T, 2),
        flops=0,
        squares=squared / min(rounds, tiles.resident),
        bytes=2 * partial,
        memory=partial + 4 * cut.blocks * B,
        calls=1 + 2 * (cut.runs > 1),
        **{TILES[tiles]: 2 * squared * _whole(T, tiles.t)},
    )


def _reduced(B: int, T: int, I: int, O: int, multiprocessors: int) -> Cost:
    """Zeros, the products, and the sum rounded: the sum is in fp32 until then."""
    tiles = plan.REDUCE
    blocks = -(-I // tiles.i) * -(-O // tiles.o)
    squared = -(-blocks * B // multiprocessors) * multiprocessors * tiles.i * tiles.o
    return replace(
        gemm(1, I, O, B * T, 2),
        flops=0,
        reduce_flops=2 * squared * _whole(T, tiles.t),
        squares=squared,
        reduce_bytes=4 * B * I * O,
        bytes=8 * I * O,
        memory=4 * I * O + 4 * blocks * B,
        calls=3,
    )


def gram(B: int, T: int, K: int, tile: int, multiprocessors: int) -> Cost:
    """One factor's [B, T, K] half of the op ``gram_norm_parts``, in which several products share the Gram of one factor."""
    block = plan.GRAMS[tile]
    pairs = plan.gram_parts(T, tile)
    rounds = -(-pairs * B // multiprocessors)
    flops = 2 * rounds * multiprocessors * block.t**2 * _whole(K, block.k)
    flops *= max(64 // block.t, 1)  # half of such a block reads twice as much for what it multiplies
    waits = max(2 * B * T * K - flops / HIDES_A_BYTE, 0)
    return Cost(bytes=waits, **{"gram_flops" if block.t > 64 else "small_gram_flops": flops})


def with_gram(B: int, T: int, K: int, tile: int, multiprocessors: int) -> Cost:
    """The other factor's half, and the parts that both end in."""
    return gram(B, T, K, tile, multiprocessors) + Cost(memory=4 * B * plan.gram_parts(T, tile), calls=1)


def ghost(B: int, T: int, I: int, O: int, tile: int, multiprocessors: int) -> Cost:
    """Gradient [I, O] by the library, norms by the op ``gram_norm_parts`` for one product."""
    left = gram(B, T, I, tile, multiprocessors)
    return gemm(1, I, O, B * T, 2) + left + with_gram(B, T, O, tile, multiprocessors)


def gram_tile(B: int, T: int, multiprocessors: int, machine: Machine) -> int:
    """The quickest blocks of positions, an index into ``plan.GRAMS``; whatever the widths of the factors."""
    tiles = {i: gram(B, T, 64, i, multiprocessors) for i in ALL_GRAMS}
    return _quickest(tiles, machine)


def matmul_tiles(
    B: int, T: int, I: int, O: int, multiprocessors: int, machine: Machine, memory: float
) -> dict[str, int]:
    """Path -> the index of its quickest tile within so many bytes: of ``plan.TILES`` for "fused", of ``plan.GRAMS`` for "ghost"."""
    products = {i: product(B, T, I, O, i, multiprocessors) for i in CHOSEN}
    return {"fused": _quickest(products, machine, memory), "ghost": gram_tile(B, T, multiprocessors, machine)}


def matmul_paths(B: int, T: int, I: int, O: int, tiles: Mapping[str, int], multiprocessors: int) -> dict[str, Cost]:
    """What takes the place of those paths in :func:`gnsfx.kernels.cost.matmul_paths` where our kernels multiply."""
    return {
        "materialise": materialise(B, T, I, O),
        "fused": product(B, T, I, O, tiles["fused"], multiprocessors),
        "ghost": ghost(B, T, I, O, tiles["ghost"], multiprocessors),
    }


def materialise(B: int, T: int, I: int, O: int) -> Cost:
    """Products in fp32, by the library, are written once and read twice: added up, and squared. No second multiply."""
    stack = 4 * B * I * O
    return replace(gemm(B, I, O, T, 2), results=0) + Cost(bytes=3 * stack, memory=stack, calls=2)


def tile_in_words(path: str, tile: int) -> str:
    if path == "ghost":
        return f"blocks of {plan.GRAMS[tile].t} positions"
    return f"tiles of {plan.TILES[tile].i} x {plan.TILES[tile].o}"


def embedding_paths(B: int, T: int, D: int, V: int, itemsize: int) -> dict[str, Cost]:
    """As :func:`gnsfx.kernels.cost.embedding_paths`; "segments" is the op ``embedding_norm_parts``."""
    plain = Cost(bytes=itemsize * (B * T * D + 2 * V * D), calls=2)
    memory = B * (20 * T + 4 * plan.embedding_parts(T, D))
    segments = Cost(bytes=itemsize * B * T * D + SORT_BYTES * B * T, memory=memory, calls=4)
    paths = {"plain": plain, "segments": plain + segments}
    return paths | ({"outer": plain + Cost(bytes=itemsize * B * D, calls=1)} if T == 1 else {})


def norm_paths(B: int, T: int, D: int, itemsize: int) -> dict[str, Cost]:
    """Gradients of input, scale and shift of a norm layer: x and g are read once and dx is written, with norms or without.

    "plain"  as Inductor writes it, in one pass
    "norm"   by the op ``norm_backward``: sums per example and block of columns besides
    """
    plain = Cost(bytes=3 * itemsize * B * T * D, calls=2)
    parts = 2 * 4 * B * -(-D // 64)
    return {"plain": plain, "norm": plain + Cost(bytes=2 * parts, memory=parts)}


def _quickest(tiles: Mapping[int, Cost], machine: Machine, memory: float = float("inf")) -> int:
    named = {str(i): cost for i, cost in tiles.items()}
    return int(cheapest(named, machine, torch.bfloat16, memory))


def _whole(size: int, block: int) -> int:
    return -(-size // block) * block
