"""grad = sum_b x_b^T g_b with s_b = |x_b^T g_b|_F^2 in one pass: the product of one example never leaves the registers.

    x [B, T, I], g [B, T, O]  ->  grad parts [Z, I, O], norms [tiles, B]

    for each example:  acc = 0;  for t: acc += x_t^T g_t;   norms[tile, b] = sum(acc^2);   total += acc

Descriptors have three dimensions, so that rows behind the last position of an example read as zero and never as those of
the next one. The loop over examples is flattened into that over positions: the loads of the next example are in flight
while this one is squared.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl
from gnsfx.kernels.triton import plan
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit(do_not_specialize=["B", "T", "PER"])
def mm_sq_norm(
    x, g, grad, norms, B, T, I, O, PER,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Two accumulators. Program (tile, z) owns a tile of the gradient and ``PER`` examples."""
    tile, z = tl.program_id(0), tl.program_id(1)
    across, down = tl.cdiv(O, BLOCK_O), tl.cdiv(I, BLOCK_I)
    band = tile // (GROUP * across)
    height = tl.minimum(GROUP, down - band * GROUP)
    i = (band * GROUP + tile % (GROUP * across) % height) * BLOCK_I
    o = tile % (GROUP * across) // height * BLOCK_O
    total = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    first = z * PER
    for b in tl.range(first, tl.minimum(first + PER, B), flatten=True):
        acc = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
        for t in tl.range(0, tl.cdiv(T, BLOCK_T)):
            xs = x.load([b, t * BLOCK_T, i]).reshape(BLOCK_T, BLOCK_I)
            gs = g.load([b, t * BLOCK_T, o]).reshape(BLOCK_T, BLOCK_O)
            if UPCAST:
                xs, gs = xs.to(tl.float32), gs.to(tl.float32)
            acc = tl.dot(tl.trans(xs), gs, acc)
        tl.store(norms + tl.cast(tile, tl.int64) * B + b, tl.sum(acc * acc))
        total += acc
    rows = tl.cast(z, tl.int64) * I + i + tl.arange(0, BLOCK_I)
    cols = o + tl.arange(0, BLOCK_O)
    mask = ((i + tl.arange(0, BLOCK_I)) < I)[:, None] & (cols < O)[None, :]
    tl.store(grad + rows[:, None] * O + cols[None, :], total.to(grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "T"])
def mm_sq_norm_reduce(
    x, g, grad, norms, B, T, I, O,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """One accumulator: each product is squared and added to ``grad`` (a descriptor of fp32 zeros) by the copy engine.

    Tiles are twice as large as with two accumulators, and the main loop is that of a plain multiply. The order in which
    examples are added is not fixed.
    """
    across, down = tl.cdiv(O, BLOCK_O), tl.cdiv(I, BLOCK_I)
    tiles = across * down
    for work in tl.range(tl.program_id(0), tiles * B, PROGRAMS, flatten=True):
        b, tile = work // tiles, work % tiles
        band = tile // (GROUP * across)
        height = tl.minimum(GROUP, down - band * GROUP)
        i = (band * GROUP + tile % (GROUP * across) % height) * BLOCK_I
        o = tile % (GROUP * across) // height * BLOCK_O
        acc = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
        for t in tl.range(0, tl.cdiv(T, BLOCK_T)):
            xs = x.load([b, t * BLOCK_T, i]).reshape(BLOCK_T, BLOCK_I)
            gs = g.load([b, t * BLOCK_T, o]).reshape(BLOCK_T, BLOCK_O)
            acc = tl.dot(tl.trans(xs), gs, acc)
        tl.store(norms + tl.cast(tile, tl.int64) * B + b, tl.sum(acc * acc))
        left, right = tl.split(tl.permute(acc.reshape(BLOCK_I, 2, BLOCK_O // 2), (0, 2, 1)))
        grad.atomic_add([i, o], left)
        grad.atomic_add([i, o + BLOCK_O // 2], right)


@triton.jit(do_not_specialize=["B", "T", "PAIRS"])
def gram_sq_norm(
    x, g0, g1, g2, n0, n1, n2, B, T, I, O0, O1, O2, PAIRS,
    COUNT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """s_b = <x_b x_b^T, g_b g_b^T> for ``COUNT`` factors g: program (b, pair i <= j of blocks of positions) multiplies the Gram
    block of x with that of each g. What is behind ``COUNT`` is not read."""
    b, pair = tl.program_id(0) // PAIRS, tl.program_id(0) % PAIRS
    j = 0
    first = 0
    while first + j + 1 <= pair:
        first += j + 1
        j += 1
    i = pair - first
    left = _gram_block(x, b, i, j, I, BLOCK_T, BLOCK_K, UPCAST)
    weight = tl.where(i == j, 1.0, 2.0)
    at = tl.cast(pair, tl.int64) * B + b
    tl.store(n0 + at, weight * tl.sum(left * _gram_block(g0, b, i, j, O0, BLOCK_T, BLOCK_K, UPCAST)))
    if COUNT > 1:
        tl.store(n1 + at, weight * tl.sum(left * _gram_block(g1, b, i, j, O1, BLOCK_T, BLOCK_K, UPCAST)))
    if COUNT > 2:
        tl.store(n2 + at, weight * tl.sum(left * _gram_block(g2, b, i, j, O2, BLOCK_T, BLOCK_K, UPCAST)))


@triton.jit
def _gram_block(x, b, i, j, K, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr):
    """x_i x_j^T for two blocks of positions of example b; K columns."""
    acc = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for k in tl.range(0, tl.cdiv(K, BLOCK_K)):
        a = x.load([b, i * BLOCK_T, k * BLOCK_K]).reshape(BLOCK_T, BLOCK_K)
        c = x.load([b, j * BLOCK_T, k * BLOCK_K]).reshape(BLOCK_T, BLOCK_K)
        if UPCAST:
            a, c = a.to(tl.float32), c.to(tl.float32)
        acc = tl.dot(a, tl.trans(c), acc)
    return acc


def product_norms(
    x: Tensor, g: Tensor, multiprocessors: int, tiles: plan.Tiles | None = None, upcast: bool = False
) -> tuple[Tensor, Tensor]:
    """x [B, T, I], g [B, T, O] -> grad [I, O] in their dtype, norms [k, B], parts to be added."""
    (B, T, I), O = x.shape, g.shape[2]
    cut = plan.cut_products(B, T, I, O, multiprocessors, tiles or plan.LARGE)
    t = cut.tiles
    whole = cut.runs == 1
    grad = torch.empty((cut.runs, I, O), dtype=x.dtype if whole else torch.float32, device=x.device)
    norms = torch.empty((cut.blocks, B), dtype=torch.float32, device=x.device)
    mm_sq_norm[(cut.blocks, cut.runs)](
        _describe(x, t.t, t.i), _describe(g, t.t, t.o), grad, norms, B, T, I, O, cut.each,
        BLOCK_T=t.t, BLOCK_I=t.i, BLOCK_O=t.o, GROUP=t.group, UPCAST=upcast, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return grad[0] if whole else grad.sum(0).to(x.dtype), norms


def product_norms_reduced(x: Tensor, g: Tensor, multiprocessors: int) -> tuple[Tensor, Tensor]:
    """The same with one accumulator and twice the tile; the gradient is added up in fp32 by the copy engine."""
    (B, T, I), O = x.shape, g.shape[2]
    t = plan.REDUCE
    grad = torch.zeros((I, O), dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(I, t.i) * triton.cdiv(O, t.o)
    norms = torch.empty((blocks, B), dtype=torch.float32, device=x.device)
    programs = min(multiprocessors * t.resident, blocks * B)
    mm_sq_norm_reduce[(programs,)](
        _describe(x, t.t, t.i), _describe(g, t.t, t.o), TensorDescriptor.from_tensor(grad, [t.i, t.o // 2]), norms,
        B, T, I, O, BLOCK_T=t.t, BLOCK_I=t.i, BLOCK_O=t.o, GROUP=t.group, PROGRAMS=programs,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return grad.to(x.dtype), norms


MOST_FACTORS = 3


def gram_norms(x: Tensor, g: Sequence[Tensor], tile: plan.GramTile, upcast: bool = False) -> list[Tensor]:
    """x [B, T, I], up to three g_i [B, T, O_i] -> norms [k, B] for each, parts to be added and clamped at zero."""
    B, T, I = x.shape
    blocks = triton.cdiv(T, tile.t)
    pairs = blocks * (blocks + 1) // 2
    norms = [torch.empty((pairs, B), dtype=torch.float32, device=x.device) for _ in g]
    factors, results = ([*given, *given[:1] * (MOST_FACTORS - len(g))] for given in (list(g), norms))
    gram_sq_norm[(pairs * B,)](
        _describe(x, tile.t, tile.k), *(_describe(each, tile.t, tile.k) for each in factors), *results,
        B, T, I, *(each.shape[2] for each in factors), pairs,
        COUNT=len(g), BLOCK_T=tile.t, BLOCK_K=tile.k, UPCAST=upcast, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return norms


def _describe(x: Tensor, t: int, k: int) -> TensorDescriptor:
    """Blocks [t, k] of one example. The stride of a dimension of size one may be anything, which the copy engine refuses."""
    B, T, K = x.shape
    row = x.stride(1) if T > 1 else K
    return TensorDescriptor(x, [B, T, K], [x.stride(0) if B > 1 else T * row, row, 1], [1, t, k])
