"""Contractions over rows whose example is known only from the data, as records of the same kind as all others.

mm((I, n), (n, O)), both routed         RoutedMatmul   P_b = the product of the rows of b
grouped_mm, backward                    RoutedMatmul   the same, a matrix for each group of rows
sum((n, D), [0]), routed                RoutedSum      P_b = the sum of the rows of b
any other op linear in a routed value   RoutedLift     P_b = the op with all other rows set to zero
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from gnsfx.errors import GraphError
from gnsfx.passes.contractions import Contraction, joint_terms
from gnsfx.passes.emit import Emitter
from gnsfx.passes.propagate import States
from gnsfx.passes.rules.reductions import SUMS, removed
from gnsfx.passes.rules.table import LINEAR, Op, arguments, overloads
from gnsfx.passes.state import Ids, Routed, product

aten, ops = torch.ops.aten, torch.ops.gnsfx
MATMULS = overloads("aten.mm.default", "aten.bmm.default")
GROUPED = "transformers.grouped_mm_fallback_backward.default"


def expression(emit: Emitter, ids: Ids) -> list[Any]:
    """The arguments that stand for ids in the ops of ``kernels/ops.py``."""
    sizes = [emit.size(ids.inner), emit.size(ids.total), emit.size(emit.examples)]
    return [ids.rows, ids.column, list(ids.takes), *sizes]


@dataclass(frozen=True, slots=True)
class RoutedMatmul(Contraction):
    """x (E, N, I) and g (E, N, O), or (N, I) and (N, O) with ``offsets`` (E,); ``x_rows_last``: x is transposed."""

    x: Node
    g: Node
    ids: Ids
    x_rows_last: bool
    offsets: Node | None = None

    def factors(self, emit: Emitter) -> list[Any]:
        x, g = self.x, self.g
        if self.x_rows_last:
            ndim = x.meta["val"].dim()
            x = emit.permute(x, [*range(ndim - 2), ndim - 1, ndim - 2])
        if self.offsets is None and x.meta["val"].dim() == 2:
            x, g = emit(aten.unsqueeze.default, x, 0), emit(aten.unsqueeze.default, g, 0)
        return [x, g, self.offsets, *expression(emit, self.ids)]

    def sq_norm(self, emit: Emitter) -> Node:
        return emit(ops.routed_sq_norm.default, *self.factors(emit))

    def materialise(self, emit: Emitter) -> Node:
        stack = emit(ops.routed_product.default, *self.factors(emit))
        return emit.view(stack, [emit.examples, *emit.shape(self.node)])


@dataclass(frozen=True, slots=True)
class RoutedSum(Contraction):
    """P_b = the sum (or its share of the mean) of the rows of b; dimensions beside ``g.dims`` may be summed too."""

    g: Node
    state: Routed

    def materialise(self, emit: Emitter) -> Node:
        op = Op(self.node, {}, emit.examples, True)
        dims, shape = removed(op), emit.shape(self.g)
        total = emit(ops.sum_by_example.default, self.g, list(self.state.dims), *expression(emit, self.state.ids))
        left = [d for d in range(len(shape)) if d not in self.state.dims]
        others = [1 + left.index(d) for d in dims if d in left]
        if others:
            total = emit(aten.sum.dim_IntList, total, others)
        if "mean" in str(self.node.target):
            total = emit(aten.div.Tensor, total, emit.size(product([shape[d] for d in dims])))
        return emit.view(total, [emit.examples, *emit.shape(self.node)])


@dataclass(frozen=True, slots=True)
class RoutedLift(Contraction):
    """P_b = the op with the rows of all other examples set to zero in ``g``."""

    g: Node
    state: Routed

    def materialise(self, emit: Emitter) -> Node:
        own = emit(ops.mask_by_example.default, self.g, list(self.state.dims), *expression(emit, self.state.ids))
        source, index = (self.node.args if self.node.target is operator.getitem else (self.node, None))[:2]
        assert isinstance(source, Node)
        shared = {a: emit.share(a) for a in joint_terms(source, [self.g])}
        return emit.lift(source, {self.g: own}, shared, index)  # type: ignore[arg-type]


def find_routed(node: Node, states: States) -> Contraction | None:
    """The record of a node with a routed operand and a partial result."""
    source: Any = node.args[0] if node.target is operator.getitem else node
    bound = arguments(source)
    if source.target in MATMULS or source.target is aten._grouped_mm.default:
        found = _matmul(node, bound["self"], bound["mat2"], states, bound.get("offs"))
    elif str(source.target) == GROUPED:
        g = bound["grad_output"]
        found = RoutedMatmul(node, bound["input"], g, states[g].ids, False, bound["offs"])
    elif source.target in SUMS and set(states[bound["self"]].dims) <= set(removed(Op(node, states, 1, True))):
        found = RoutedSum(node, bound["self"], states[bound["self"]])
    else:
        found = None
    return found or _lift(node, bound, states)


def _matmul(node: Node, a: Node, b: Node, states: States, offsets: Node | None) -> RoutedMatmul | None:
    state = states.get(b)
    if not isinstance(state, Routed):
        left = states[a]
        last = node.meta["val"].dim() - 1 if offsets is None else 1
        state = Routed(tuple(last - 1 if d == last else d for d in left.dims), left.ids)
    fits = state.dims == (0,) if b.meta["val"].dim() == 2 else state.dims in ((0, 1), (1,))
    return RoutedMatmul(node, a, b, state.ids, True, offsets) if fits else None


def _lift(node: Node, bound: dict[str, Any], states: States) -> Contraction:
    source: Any = node.args[0] if node.target is operator.getitem else node
    linear = [name for group in LINEAR.get(source.target, ()) for name in group] or ["grad_output", "grad_out"]
    for name in linear:
        value = bound.get(name)
        if isinstance(value, Node) and isinstance(states.get(value), Routed):
            return RoutedLift(node, value, states[value])
    raise GraphError(f"{source.target} is not known to be linear in the rows chosen by data")


def routed_operand(node: Node, states: States) -> bool:
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, Node) and any(isinstance(states.get(n), Routed) for n in source.all_input_nodes)
