"""The norms of a matrix product's contributions, on the path that the planner chose.

P_b = x_b^T g_b for x (B, E, T, I), g (B, E, T, O)

outer           s_b = |x_b|^2 |g_b|^2                     one position: the gradient stays
ghost           s_b = sum_tu <x_t, x_u> <g_t, g_u>        the gradient stays; a Gram may serve several products
fused           grad, s = one kernel over x and g         in bf16 and fp16 the norms alone, and the gradient stays
materialise     stack of all P_b, grad = its sum

Where our CUDA kernels multiply (``Choice.ours``: bf16 and fp16, E = 1) products are in fp32, and the gradient is their sum rounded
once: "fused" gives it, "materialise" adds the stack up. Norms come in parts, and one kernel multiplies one Gram with up to three
others.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from gnsfx.kernels.ops import start_build
from gnsfx.passes.emit import Emitter, accumulate_dtype
from gnsfx.passes.estimate import Estimator
from gnsfx.passes.record import Record
from gnsfx.passes.select_path import Choice, Planner
from gnsfx.passes.share_grams import SharedGram
from gnsfx.passes.stacks import Stacks, rounds

aten, ops = torch.ops.aten, torch.ops.gnsfx


@dataclass(frozen=True, slots=True)
class Products:
    """Those of one graph; a Gram that several of them use is written once."""

    emit: Emitter
    planner: Planner
    estimator: Estimator
    stacks: Stacks
    _grams: dict[SharedGram, Node] = field(default_factory=dict)
    _blocks: dict[tuple[SharedGram, Node], tuple[Node, Node]] = field(default_factory=dict)

    def measure(self, record: Record, choice: Choice, node: Node, x: Node, g: Node) -> None:
        """``node`` = sum_b x_b^T g_b (E, I, O up to a view) for x (B, E, T, I) and g (B, E, T, O)."""
        emit = self.emit
        record.take(choice)
        with emit.at(node):
            if self.estimator.matmul(record, choice, x, g):
                return
            if choice.path == "fused":
                start_build(x.meta["val"])
            if choice.path == "outer":
                record.sq_norm = emit(aten.mul.Tensor, emit.square(x), emit.square(g))
            elif choice.ours and choice.path == "ghost":
                record.sq_norm = self._by_blocks(choice.tile, node, *(self._alone(f) for f in (x, g)))
            elif choice.ours and choice.path == "fused":
                both = emit(ops.mm_norm_parts.default, self._alone(x), self._alone(g), choice.tile)
                record.sq_norm = emit.add_parts(emit(operator.getitem, both, 1))
                self.stacks.replace(node, emit(operator.getitem, both, 0))
            elif choice.path == "ghost" and (shared := self.planner.grams.get(node)) is not None:
                record.sq_norm = emit(ops.gram_sq_norm.default, self._gram(shared), (g, x)[shared.side])
            elif choice.path == "ghost":
                record.sq_norm = emit(ops.ghost_sq_norm.default, x, g)
            elif choice.path == "fused" and rounds(node) and not self.planner.sums_in_fp32(node):
                record.sq_norm = emit(ops.product_sq_norm.default, x, g)
            elif choice.path == "fused":
                both = emit(ops.mm_sq_norm.default, x, g)
                record.sq_norm = emit(operator.getitem, both, 1)
                self.stacks.replace(node, emit(operator.getitem, both, 0))
            else:
                (B, E, T, I), O = emit.shape(x), emit.shape(g)[-1]
                left = emit.permute(emit.view(x, [B * E, T, I]), [0, 2, 1])
                right = emit.view(g, [B * E, T, O])
                products = _in_fp32(emit, left, right) if choice.ours else emit(aten.bmm.default, left, right)
                stack = emit.view(products, [B, *emit.shape(node)])
                self.stacks.keep(node, stack)
                record.sq_norm = emit.square(stack)
                if not rounds(stack):
                    self.stacks.replace_by_sum(node, stack)

    def _alone(self, factor: Node) -> Node:
        """(B, 1, T, K) -> (B, T, K)."""
        B, _, T, K = self.emit.shape(factor)
        return self.emit.view(factor, [B, T, K])

    def _by_blocks(self, tile: int, node: Node, x: Node, g: Node) -> Node:
        """(B,) of x (B, T, I), g (B, T, O). Of contractions with a factor in common the last one's place has one op for all."""
        emit, shared = self.emit, self.planner.grams.get(node)
        if shared is None:
            return emit.add_parts(emit(operator.getitem, emit(ops.gram_norm_parts.default, x, [g], tile), 0))
        common, own = (x, g) if shared.side == 0 else (g, x)
        last = shared.together(node)[-1]
        if (shared, last) not in self._blocks:
            behind = last.next
            with emit.at(behind):
                self._blocks[shared, last] = emit(ops.gram_norm_parts.default, common, [own], tile), behind
            others: list[Node] = []
        else:
            common, others, _ = self._blocks[shared, last][0].args  # type: ignore[assignment]
            emit.give(self._blocks[shared, last][0], common, [*others, own], tile)
        block, behind = self._blocks[shared, last]
        with emit.at(behind):
            return emit.add_parts(emit(operator.getitem, block, len(others)))

    def _gram(self, shared: SharedGram) -> Node:
        if shared not in self._grams:
            with self.emit.at(shared.first.node):
                self._grams[shared] = self.emit(ops.gram.default, shared.first.factors(self.emit)[shared.side])
        return self._grams[shared]


def _in_fp32(emit: Emitter, left: Node, right: Node) -> Node:
    """Products of 16-bit factors in fp32: what the library of a CUDA device writes as well as it writes 16 bits."""
    if left.meta["val"].device.type == "cuda":
        return emit(aten.bmm.dtype, left, right, torch.float32)
    dtype = accumulate_dtype(left.meta["val"].dtype)
    return emit(aten.bmm.default, *(emit.cast(factor, dtype) for factor in (left, right)))
