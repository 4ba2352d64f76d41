"""s_b = sum over table rows v of |sum of g_bt over the positions t with id v|^2, for every example b.

    ids sorted within each example, order [B, T], sorted_ids [B, T], g [B, T, D]  ->  norms [pieces * column blocks, B]

Sorting puts the positions of one table row side by side. A program owns the runs that begin in its piece of the sorted
positions, and follows the last one to its end: nothing is shared, and g is read once. Its bounds are known before its
loop starts, so that rows are on their way while others are added.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl
from gnsfx.kernels.embedding_norm import SKIPPED
from gnsfx.kernels.triton import plan

WARPS, STAGES = 1, 4
_SKIPPED = tl.constexpr(SKIPPED)


@triton.jit
def _behind(ids, T, at):
    """The first position behind the run that holds ``at``."""
    here = tl.load(ids + at)
    low = at + 1
    high = T
    while low < high:
        middle = (low + high) // 2
        if tl.load(ids + middle) == here:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["B", "T", "PIECES"])
def embedding_sq_norm(
    order, sorted_ids, g, norms, B, T, D, PIECES, g_b, g_t,
    PIECE: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part, b = tl.program_id(0) % (PIECES * tl.cdiv(D, BLOCK_D)), tl.program_id(0) // (PIECES * tl.cdiv(D, BLOCK_D))
    piece = part % PIECES
    cols = part // PIECES * BLOCK_D + tl.arange(0, BLOCK_D)
    example = tl.cast(b, tl.int64)
    ids, order, g = sorted_ids + example * T, order + example * T, g + example * g_b
    first = piece * PIECE
    stop = tl.minimum(first + PIECE, T)
    if first > 0:
        if tl.load(ids + first) == tl.load(ids + first - 1):  # of the piece before
            first = _behind(ids, T, first)
    last = first
    if first < stop:
        last = _behind(ids, T, stop - 1)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for at in tl.range(first, last, num_stages=STAGES):
        current = tl.load(ids + at)
        begins = tl.load(ids + at - 1, mask=at > first, other=0) != current
        row = tl.load(order + at)
        # what is skipped may hold anything
        read = (cols < D) & (tl.cast(current, tl.int64) != _SKIPPED)
        values = tl.load(g + row * g_t + cols, mask=read, other=0.0).to(tl.float32)
        squares += tl.where(begins, acc * acc, 0.0)
        acc = tl.where(begins, values, acc + values)
    squares += acc * acc
    tl.store(norms + tl.cast(part, tl.int64) * B + b, tl.sum(squares))


def embedding_norms(ids: Tensor, g: Tensor, piece: int = plan.PIECE) -> Tensor:
    """ids [B, T], g [B, T, D] -> norms [k, B], parts to be added. ``piece``: sorted positions of a program."""
    (B, T), D = ids.shape, g.shape[2]
    in_order, order = ids.contiguous().sort(dim=1, stable=True)  # a sort keeps strides
    g = g if g.stride(2) == 1 else g.contiguous()
    pieces, blocks = triton.cdiv(T, piece), triton.cdiv(D, plan.LOOKUP_COLUMNS)
    norms = torch.empty((pieces * blocks, B), dtype=torch.float32, device=g.device)
    embedding_sq_norm[(pieces * blocks * B,)](
        order, in_order, g, norms, B, T, D, pieces, g.stride(0), g.stride(1),
        PIECE=piece, BLOCK_D=plan.LOOKUP_COLUMNS, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return norms
