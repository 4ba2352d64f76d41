"""Contractions over rows whose example is known only from the data, as records of the same kind as all others.

mm((I, n), (n, O)), both routed         RoutedMatmul   P_b = the product of the rows of b
grouped_mm, backward                    RoutedMatmul   the same, a matrix for each group of rows
sum((n, D), [0]), routed                RoutedSum      P_b = the sum of the rows of b
any other op linear in a routed value   RoutedLift     P_b = the op with all other rows set to zero
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from gnsfx._torch import known
from gnsfx.errors import GraphError
from gnsfx.passes.contractions import Contraction, joint_terms
from gnsfx.passes.emit import Emitter
from gnsfx.passes.propagate import States
from gnsfx.passes.rows import own_rows, without, zeros
from gnsfx.passes.rules.reductions import SUMS, removed
from gnsfx.passes.rules.table import LINEAR, Op, arguments, overloads
from gnsfx.passes.state import Ids, Routed, Size, product, same_ids

if TYPE_CHECKING:
    from gnsfx.passes.terms import Term

aten, ops = torch.ops.aten, torch.ops.gnsfx
MATMULS = overloads("aten.mm.default", "aten.bmm.default")
PUTS = overloads("aten.index_put.default", "aten._unsafe_index_put.default",
                 "aten._unsafe_masked_index_put_accumulate.default")  # fmt: skip
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


@dataclass(frozen=True, slots=True)
class RoutedLookup(Contraction):
    """P_b = onehot(ids_b)^T g_b for one index of the first dimension of a table; every position is a routed row."""

    index: Node
    g: Node
    mask: Node | None
    ids: Ids
    rows: Size

    def factors(self, emit: Emitter) -> tuple[Node, Node]:
        """Table rows (N,) and gradients (N, D); what a mask leaves out becomes zeros."""
        index, g = self.index, self.g
        if self.mask is None:
            index = own_rows(emit, index, self.rows)
        else:
            index, g = without(emit, index, g, self.mask)
        N = product(emit.shape(index))
        return emit.view(index, [N]), emit.view(g, [N, product(emit.shape(g)) // N])

    def materialise(self, emit: Emitter) -> Node:
        return RoutedLift(self.node, self.g, Routed(self._dims(), self.ids)).materialise(emit)

    def _dims(self) -> tuple[int, ...]:
        return tuple(range(self.index.meta["val"].dim()))


def sq_norm_of_sum(emit: Emitter, terms: Sequence[Term], width: Size) -> Node | None:
    """s_b of a table that is looked up and multiplied with the same routed rows (tied embeddings), or only looked up."""
    matmuls = [(t, c) for t in terms if isinstance(c := t.contraction, RoutedMatmul) and c.offsets is None]
    lookups = [(t, c) for t in terms if isinstance(c := t.contraction, RoutedLookup)]
    found = [c for _, c in (*matmuls, *lookups)]
    flat = all(t.transposed is not None and t.contraction.node.meta["val"].dim() == 2 for t in terms)
    if len(found) < len(terms) or not flat or any(t.transposed for t, _ in lookups):
        return None
    if any(not same_ids(c.ids, found[0].ids) or c.node.meta["val"].dtype.is_complex for c in found):
        return None
    x, g, at, values = [], [], [], []
    for term, contraction in matmuls:
        left, right = contraction.factors(emit)[:2]
        left, right = (right, left) if term.transposed else (left, right)
        x.append(emit(aten.squeeze.dim, left, 0))
        g.append(emit.times(emit(aten.squeeze.dim, right, 0), term.scale))
    for term, contraction in lookups:
        index, rows = contraction.factors(emit)
        at.append(index)
        values.append(emit.times(rows, term.scale))
    return emit(ops.routed_tied_sq_norm.default, x, g, at, values, emit.size(width), *expression(emit, found[0].ids))


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
        found = _lookup(node, bound, states)
    return found or _lift(node, bound, states)


def _matmul(node: Node, a: Node, b: Node, states: States, offsets: Node | None) -> RoutedMatmul | None:
    state = states.get(b)
    if not isinstance(state, Routed):
        left = states[a]
        last = node.meta["val"].dim() - 1 if offsets is None else 1
        state = Routed(tuple(last - 1 if d == last else d for d in left.dims), left.ids)
    fits = state.dims == (0,) if b.meta["val"].dim() == 2 else state.dims in ((0, 1), (1,))
    return RoutedMatmul(node, a, b, state.ids, True, offsets) if fits else None


def _lookup(node: Node, bound: dict[str, Any], states: States) -> RoutedLookup | None:
    if node.target is aten.embedding_dense_backward.default:
        index, g = bound["indices"], bound["grad_output"]
        if bound["padding_idx"] >= 0:
            return None
    elif node.target in PUTS and len(bound["indices"]) == 1 and zeros(bound["self"]):
        index, g = bound["indices"][0], bound["values"]
    else:
        return None
    state, positions = states.get(g), index.meta["val"].shape
    integers = index.meta["val"].dtype not in (torch.bool, torch.uint8)
    if not isinstance(state, Routed) or state.across or not integers or list(state.dims) != sorted(state.dims):
        return None
    whole = max(state.dims) < len(positions) and all(
        d in state.dims or known(size == 1) for d, size in enumerate(positions)
    )
    rows = node.meta["val"].shape
    wide = known(g.meta["val"].numel() == product(positions) * product(rows[1:]))
    mask = bound.get("mask")
    fits = mask is None or known(mask.meta["val"].numel() == product(positions))
    return RoutedLookup(node, index, g, mask, state.ids, rows[0]) if whole and wide and fits else None


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
