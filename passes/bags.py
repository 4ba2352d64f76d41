"""Contractions of embedding bags: the gradient of one row of the result goes to every table row in its bag.

2-D input, or mode max     Lookup        ids (B, T) and g (B, T, D), as for an embedding
offsets                    RaggedBags    P_b = sum over the indices i of b's bags of onehot(ids_i)^T g_bag(i)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from gnsfx.passes.contractions import Contraction, Lookup
from gnsfx.passes.emit import Emitter, accumulate_dtype
from gnsfx.passes.find_contractions import contraction
from gnsfx.passes.propagate import States
from gnsfx.passes.rows import flat
from gnsfx.passes.rules.bags import MAX, MEAN, bag_length, bags
from gnsfx.passes.rules.table import Op, arguments, overloads
from gnsfx.passes.state import Batched, Size

aten, prims = torch.ops.aten, torch.ops.prims


@contraction(*overloads("aten._embedding_bag_backward.default"))
def bag_contraction(node: Node, states: States) -> Contraction | None:
    op = arguments(node)
    length = bag_length(op["offsets"], op["indices"])
    if length is None and op["mode"] != MAX:
        state = states[op["grad"]]
        return RaggedBags(node, state) if isinstance(state, Batched) else None

    def build(emit: Emitter) -> tuple[Node, Node, Node | None]:
        state = bags(Op(node, states, emit.examples, True), "grad")
        assert isinstance(state, Batched)
        if op["mode"] == MAX:
            return _largest(emit, node, state)
        assert length is not None
        return _all(emit, node, state, length)

    return Lookup(node, build, op["num_weights"])


def _all(emit: Emitter, node: Node, state: Batched, length: Size) -> tuple[Node, Node, Node | None]:
    """The gradient of a bag reaches each of its indices: ids (B, n*L), g (B, n*L, D) for n bags per example."""
    op = arguments(node)
    count, width = emit.shape(op["grad"])
    ids = emit.split(emit.view(op["indices"], [count, length]), state)
    g = emit(aten.unsqueeze.default, emit.split(_mean(emit, node), state), 2)
    g = emit(aten.expand.default, g, [emit.size(s) for s in (*emit.shape(ids), width)])
    if op["per_sample_weights"] is not None:
        weights = emit.split(emit.view(op["per_sample_weights"], [count, length]), state)
        g = emit(aten.mul.Tensor, g, emit(aten.unsqueeze.default, weights, -1))
    keep = emit(aten.unsqueeze.default, emit(aten.ne.Scalar, ids, op["padding_idx"]), -1)
    return flat(emit, ids, g, 2, keep)


def _largest(emit: Emitter, node: Node, state: Batched) -> tuple[Node, Node, Node | None]:
    """Column d of the gradient of a bag reaches the row that was largest there: ids (B, n*D), g (B, n*D, D)."""
    op = arguments(node)
    ids, g = emit.split(op["maximum_indices"], state), emit.split(op["grad"], state)
    width = emit.shape(g)[-1]
    column = _iota(emit, width, ids)
    own = emit(aten.eq.Tensor, emit(aten.unsqueeze.default, column, 1), column)
    zero = _zeros(emit, [], g)
    g = emit(aten.where.self, own, emit(aten.unsqueeze.default, g, -1), zero)
    filled = emit(aten.gt.Scalar, emit.split(op["bag_size"], state), 0)
    keep = emit.view(filled, [*emit.shape(filled), 1, 1])
    keep = emit(aten.expand.default, keep, [emit.size(s) for s in (*emit.shape(ids), 1)])
    return flat(emit, ids, g, 2, keep)


def _mean(emit: Emitter, node: Node) -> Node:
    """The gradient of the sum over a bag."""
    op = arguments(node)
    if op["mode"] != MEAN:
        return op["grad"]
    size = emit(aten.clamp_min.default, op["bag_size"], 1)
    return emit(aten.div.Tensor, op["grad"], emit(aten.unsqueeze.default, size, 1))


def _iota(emit: Emitter, length: Size, like: Node) -> Node:
    return emit(prims.iota.default, emit.size(length), start=0, step=1, dtype=torch.int64, device=like.meta["val"].device,
                requires_grad=False)  # fmt: skip


def _zeros(emit: Emitter, shape: list[Size], like: Node) -> Node:
    value = like.meta["val"]
    sizes = [emit.size(s) for s in shape]
    return emit(aten.full.default, sizes, 0, dtype=value.dtype, device=value.device, pin_memory=False)


@dataclass(frozen=True, slots=True)
class RaggedBags(Contraction):
    """``state``: where the examples are among the bags, the rows of the gradient."""

    state: Batched

    def rows(self, emit: Emitter) -> tuple[Node, Node]:
        """For each index i: the row example * V + ids_i of the stack of all tables, and the gradient (n, D) that it gets."""
        op = arguments(self.node)
        ids, starts = op["indices"], emit.shape(op["grad"])[0]
        offsets = emit(aten.slice.Tensor, op["offsets"], 0, 0, emit.size(starts))
        position = emit.cast(_iota(emit, emit.shape(ids)[0], ids), offsets.meta["val"].dtype)
        bag = emit(aten.sub.Tensor, emit(aten.searchsorted.Tensor, offsets, position, right=True), 1)
        g = emit(aten.index.Tensor, _mean(emit, self.node), [bag])
        if op["per_sample_weights"] is not None:
            g = emit(aten.mul.Tensor, g, emit(aten.unsqueeze.default, op["per_sample_weights"], 1))
        keep = emit(aten.unsqueeze.default, emit(aten.ne.Scalar, ids, op["padding_idx"]), 1)
        g = emit(aten.where.self, keep, g, _zeros(emit, [], g))
        g = emit.cast(g, accumulate_dtype(g.meta["val"].dtype))
        example = emit(aten.remainder.Tensor, _floor(emit, bag, self.state.inner),
                       _scalar(emit, emit.examples, bag))  # fmt: skip
        return emit(aten.add.Tensor, emit(aten.mul.Tensor, example, emit.size(op["num_weights"])), ids), g

    def sq_norm(self, emit: Emitter) -> Node:
        """Rows that are equal are added, then squared: by sorting, so that nothing is larger than the gradients (n, D)."""
        op = arguments(self.node)
        row, g = self.rows(emit)
        n, width = emit.shape(g)
        ordered = emit(aten.sort.default, row)
        row, order = (emit(operator.getitem, ordered, i) for i in (0, 1))
        before = emit(aten.constant_pad_nd.default, emit(aten.slice.Tensor, row, 0, 0, -1), [1, 0], -1)
        group = emit(aten.cumsum.default, emit.cast(emit(aten.ne.Tensor, row, before), torch.int64), 0)
        group = emit(aten.sub.Tensor, group, 1)
        total = emit(
            aten.index_put.default, _zeros(emit, [n, width], g), [group], emit(aten.index.Tensor, g, [order]), True
        )
        example = emit(aten.index_put.default, _zeros(emit, [n], row), [group],
                       _floor(emit, row, op["num_weights"]))  # fmt: skip
        return emit(aten.index_put.default, _zeros(emit, [emit.examples], g), [example], emit.square(total), True)

    def materialise(self, emit: Emitter) -> Node:
        row, g = self.rows(emit)
        table = _zeros(emit, [emit.examples * arguments(self.node)["num_weights"], emit.shape(g)[1]], g)
        stack = emit(aten.index_put.default, table, [row], g, True)
        return emit.view(stack, [emit.examples, *emit.shape(self.node)])


def _scalar(emit: Emitter, size: Size, like: Node) -> Node:
    return emit(
        aten.full.default, [], emit.size(size), dtype=torch.int64, device=like.meta["val"].device, pin_memory=False
    )


def _floor(emit: Emitter, node: Node, size: Size) -> Node:
    return emit(aten.div.Tensor_mode, node, _scalar(emit, size, node), rounding_mode="floor")
