"""The norms of a matrix product's contributions, on the path that the planner chose.

P_b = x_b^T g_b for x (B, E, T, I), g (B, E, T, O)

outer           s_b = |x_b|^2 |g_b|^2                     one position: the gradient stays
ghost           s_b = sum_tu <x_t, x_u> <g_t, g_u>        the gradient stays; a Gram may serve several products
fused           grad, s = one kernel over x and g         in bf16 and fp16 the norms alone, and the gradient stays
materialise     stack of all P_b, grad = its sum
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from gnsfx.kernels.ops import start_build
from gnsfx.passes.emit import Emitter
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
                products = emit(aten.bmm.default, left, emit.view(g, [B * E, T, O]))
                stack = emit.view(products, [B, *emit.shape(node)])
                self.stacks.keep(node, stack)
                record.sq_norm = emit.square(stack)
                if not rounds(node):
                    self.stacks.replace_by_sum(node, stack)

    def _gram(self, shared: SharedGram) -> Node:
        if shared not in self._grams:
            with self.emit.at(shared.first.node):
                self._grams[shared] = self.emit(ops.gram.default, shared.first.factors(self.emit)[shared.side])
        return self._grams[shared]
