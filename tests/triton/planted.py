"""Kernels with one fault each, which the compile gate must find: it is worth nothing if it lets them through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gnsfx.kernels.triton import embedding_norm, mm_norm, plan
from tests.triton.cubin import Cubin
from tests.triton.gate import H100, call_lookups, call_norms, empty, multiplies

B, T, I, O = 8, 1024, 768, 3072
f32 = torch.float32


class Planted(NamedTuple):
    name: str
    call: Callable[[], object]
    fault: str  # what the gate must say of it
    rule: Callable[[Cubin], list[str]] | None = None  # where the kernel is none of ours


def with_tile(tile: plan.Tiles) -> Callable[[], object]:
    return lambda: mm_norm.product_norms(empty(B, T, I), empty(B, T, O), H100, tile)


def with_rows(D: int, B: int = B, T: int = T, whole: int = plan.WHOLE_UP_TO, **changes: int) -> Callable[[], object]:
    """A norm layer with a tile that is not the plan's, and regime whole up to a width that is not the plan's."""
    tile = plan.row_tile(D)._replace(**changes)

    def call() -> None:
        with mock.patch.multiple(plan, row_tile=lambda D, size=2: tile, WHOLE_UP_TO=whole):
            call_norms(B, T, D, False, torch.bfloat16, f32, H100)

    return call


def rows_with_all_registers() -> None:
    with mock.patch.object(plan, "row_registers", lambda tile, regime: None):
        call_norms(B, T, 1024, False, torch.bfloat16, f32, H100)


@triton.jit
def _drained(x, g, norms, B, T, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """One loop over all examples, whose positions are counted by hand."""
    b = 0
    t = 0
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in tl.range(0, B * tl.cdiv(T, BLOCK_T)):
        xs = x.load([b, t, 0]).reshape(BLOCK_T, BLOCK)
        gs = g.load([b, t, 0]).reshape(BLOCK_T, BLOCK)
        acc = tl.dot(tl.trans(xs), gs, acc)
        t += BLOCK_T
        if t >= T:
            tl.store(norms + b, tl.sum(acc * acc))
            acc = tl.zeros((BLOCK, BLOCK), tl.float32)
            t = 0
            b += 1


@triton.jit
def _nested(x, g, norms, B, T, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """A loop over positions in one over examples: each example starts with nothing on its way."""
    for b in tl.range(0, B):
        acc = tl.zeros((BLOCK, BLOCK), tl.float32)
        for t in tl.range(0, tl.cdiv(T, BLOCK_T)):
            xs = x.load([b, t * BLOCK_T, 0]).reshape(BLOCK_T, BLOCK)
            gs = g.load([b, t * BLOCK_T, 0]).reshape(BLOCK_T, BLOCK)
            acc = tl.dot(tl.trans(xs), gs, acc)
        tl.store(norms + b, tl.sum(acc * acc))


@triton.jit
def _by_pointers(x, g, norms, B, T, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles that threads load themselves."""
    cols = tl.arange(0, BLOCK)
    for b in tl.range(0, B, flatten=True):
        acc = tl.zeros((BLOCK, BLOCK), tl.float32)
        for t in tl.range(0, tl.cdiv(T, BLOCK_T)):
            rows = b * T + t * BLOCK_T + tl.arange(0, BLOCK_T)
            xs = tl.load(x + rows[:, None] * BLOCK + cols[None, :])
            gs = tl.load(g + rows[:, None] * BLOCK + cols[None, :])
            acc = tl.dot(tl.trans(xs), gs, acc)
        tl.store(norms + b, tl.sum(acc * acc))


@triton.jit
def _without_tensor_cores(x, g, norms, B, T, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    for b in tl.range(0, B, flatten=True):
        acc = tl.zeros((BLOCK, BLOCK), tl.float32)
        for t in tl.range(0, tl.cdiv(T, BLOCK_T)):
            xs = x.load([b, t * BLOCK_T, 0]).reshape(BLOCK_T, BLOCK).to(tl.float32)
            gs = g.load([b, t * BLOCK_T, 0]).reshape(BLOCK_T, BLOCK).to(tl.float32)
            acc = tl.dot(tl.trans(xs), gs, acc, input_precision="ieee")
        tl.store(norms + b, tl.sum(acc * acc))


def with_kernel(kernel: Any, block: int = 128, warps: int = 8, **settings: int) -> Callable[[], object]:
    def call() -> None:
        x = empty(B, T, block)
        operand = x if kernel is _by_pointers else TensorDescriptor.from_tensor(x, [1, 64, block])
        options = {"num_warps": warps, "num_stages": 4, **settings}
        kernel[(1,)](operand, operand, empty(B, dtype=f32), B, T, BLOCK_T=64, BLOCK=block, **options)

    return call


def lookups_one_by_one() -> None:
    with mock.patch.object(embedding_norm, "STAGES", 1):
        call_lookups(B, T, I, torch.bfloat16)


NOT_ALIGNED, SPILLS, DRAINED = "loads of 16 bytes", "bytes of spills", "tiles on their way before a loop"
PLANTED = [
    Planted("two accumulators that take all registers", with_tile(plan.LARGE._replace(o=256)), SPILLS),
    Planted("two accumulators in half as many threads", with_tile(plan.LARGE._replace(warps=4)), SPILLS),
    Planted("eight stages of tiles", with_tile(plan.LARGE._replace(stages=8)), "shared memory do not fit"),
    Planted("examples that are counted in the loop", with_kernel(_drained), DRAINED, multiplies),
    Planted("examples that drain the pipeline", with_kernel(_nested), DRAINED, multiplies),
    Planted("tiles without the copy engine", with_kernel(_by_pointers), "tiles on their way", multiplies),
    Planted("a multiply without tensor cores", with_kernel(_without_tensor_cores, 32, 4), "loops multiply", multiplies),
    Planted(
        "registers for half as many threads",
        with_kernel(_nested, 256, 32, maxnreg=128),
        "threads do not fit",
        Cubin.faults,
    ),
    Planted("rows whose programs fit one at a time", rows_with_all_registers, "programs fit a multiprocessor"),
    Planted("rows that are not aligned", with_rows(767), NOT_ALIGNED),
    Planted("rows with two stages", with_rows(1024, stages=2), "none is in flight"),
    Planted("rows with one stage", with_rows(1024, stages=1), "no loop loads asynchronously"),
    Planted("totals of rows that are too wide for them", with_rows(8192, 1024, 16, whole=8192), SPILLS),
    Planted("lookups one by one", lookups_one_by_one, "no loop loads asynchronously"),
]
