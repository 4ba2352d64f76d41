"""Which node is which contraction: a table from ops to functions (node, states) -> record, or None.

    mm, bmm                                        Matmul
    sum, mean                                      Reduction
    convolution_backward, result 1 and 2           Convolution, BiasReduction
    embedding_dense_backward, index_put            Lookup
    what the table does not have, or gives up      Lifted, over all its batched operands

Those of embedding bags are entered by :mod:`gnsfx.passes.bags`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from gnsfx.passes.contractions import (
    BiasReduction,
    Contraction,
    Convolution,
    Factor,
    Lifted,
    Lookup,
    Matmul,
    Reduction,
)
from gnsfx.passes.emit import Emitter
from gnsfx.passes.propagate import States
from gnsfx.passes.rows import flat, own_rows, zeros
from gnsfx.passes.rules.indexing import Layout
from gnsfx.passes.rules.reductions import SUMS
from gnsfx.passes.rules.table import Op, arguments, overloads
from gnsfx.passes.state import Batched, product

aten = torch.ops.aten

Builder = Callable[[Node, States], Contraction | None]
CONTRACTIONS: dict[Any, Builder] = {}


def contraction(*targets: Any) -> Callable[[Builder], Builder]:
    def enter(builder: Builder) -> Builder:
        CONTRACTIONS.update(dict.fromkeys(targets, builder))
        return builder

    return enter


def find_batched(node: Node, states: States) -> Contraction | None:
    """The record of a node whose operands are batched and whose result is partial, else None."""
    op = node.args[0] if node.target is operator.getitem else node
    assert isinstance(op, Node)
    batched = [n for n in dict.fromkeys(op.all_input_nodes) if isinstance(states.get(n), Batched)]
    if not batched:
        return None
    builder = CONTRACTIONS.get((op.target, node.args[1]) if op is not node else op.target)
    found = builder(node, states) if builder else None
    return found or Lifted(node, tuple(Factor(n, states[n]) for n in batched))


@contraction(*overloads("aten.mm.default", "aten.bmm.default"))
def matmul_contraction(node: Node, states: States) -> Contraction | None:
    a, b = node.args
    assert isinstance(a, Node) and isinstance(b, Node)
    last = node.meta["val"].dim() - 1  # the contracted dimension is the last one of a and the one before of b
    found = next(s for n in (a, b) if isinstance(s := states.get(n), Batched))
    return Matmul(node, Factor(a, found.at(last)), Factor(b, found.at(last - 1)))


@contraction(*SUMS)
def sum_contraction(node: Node, states: States) -> Contraction | None:
    g = node.args[0]
    assert isinstance(g, Node)
    return Reduction(node, Factor(g, states[g]))


@contraction((aten.convolution_backward.default, 1))
def convolution_contraction(node: Node, states: States) -> Contraction | None:
    op = arguments(node.args[0])  # type: ignore[arg-type]
    found = next(s for n in ("grad_output", "input") if isinstance(s := states.get(op[n]), Batched))
    return Convolution(node, Factor(op["grad_output"], found), Factor(op["input"], found))


@contraction((aten.convolution_backward.default, 2))
def convolution_bias_contraction(node: Node, states: States) -> Contraction | None:
    g = arguments(node.args[0])["grad_output"]  # type: ignore[arg-type]
    state = states.get(g)
    return BiasReduction(node, Factor(g, state)) if isinstance(state, Batched) else None


@contraction(*overloads("aten._trilinear.default"))
def trilinear_contraction(node: Node, states: States) -> Contraction | None:
    """A shared operand that has the examples' dimension is split as well: whole, it would broadcast against one example."""
    op = arguments(node)
    inserted = {op[f"i{k}"]: op[f"expand{k}"] for k in "123"}
    found, at = next((s, a) for a in inserted if isinstance(s := states.get(a), Batched))
    dim = [d for d in range(node.args[0].meta["val"].dim() + len(op["expand1"])) if d not in inserted[at]][found.dim]  # type: ignore[union-attr]
    having = [a for a, dims in inserted.items() if dim not in dims]
    return Lifted(node, tuple(Factor(a, found.at(dim - sum(d < dim for d in inserted[a]))) for a in having))


@contraction(*overloads("aten.embedding_dense_backward.default"))
def embedding_contraction(node: Node, states: States) -> Contraction | None:
    op = arguments(node)
    g, ids, padding = op["grad_output"], op["indices"], op["padding_idx"]
    state = next(s for n in (g, ids) if isinstance(s := states.get(n), Batched))

    def build(emit: Emitter) -> tuple[Node, Node, Node | None]:
        index = emit.split(ids, state)
        keep = emit(aten.unsqueeze.default, emit(aten.ne.Scalar, index, padding), -1)
        return flat(emit, index, emit.split(g, state), index.meta["val"].dim() - 1, keep)

    return Lookup(node, build, op["num_weights"])


@contraction(
    *overloads(
        "aten.index_put.default", "aten._unsafe_index_put.default", "aten._unsafe_masked_index_put_accumulate.default"
    )
)
def index_put_contraction(node: Node, states: States) -> Contraction | None:
    """Leading dimensions indexed by batched or shared indices, values batched inside the index dimensions."""
    op = arguments(node)
    table, indices, values, mask = op["self"], op["indices"], op["values"], op.get("mask")
    layout = Layout(Op(node, states, 1, True), indices)
    count, width = len(layout.nodes), len(layout.shape)
    rest = table.meta["val"].shape[count:]
    state = next((s for n in (values, *layout.nodes) if isinstance(s := states.get(n), Batched)), None)
    plain = layout.where == list(range(count)) and values.meta["val"].dim() == width + len(rest) and not layout.masks
    if state is None or not plain or not zeros(table):
        return None
    at = states[values].dim if isinstance(states.get(values), Batched) else None
    if at is None:
        node_ = next(n for n in layout.nodes if isinstance(states.get(n), Batched))
        at = states[node_].dim + width - node_.meta["val"].dim()
    if at >= width:
        return None
    sizes = table.meta["val"].shape[:count]

    def build(emit: Emitter) -> tuple[Node, Node, Node | None]:
        row: Node | None = None
        for index, size in zip(layout.nodes, sizes, strict=True):
            if mask is None:
                index = own_rows(emit, index, size)
            row = index if row is None else emit(aten.add.Tensor, emit(aten.mul.Tensor, row, emit.size(size)), index)
        assert row is not None
        row = emit(aten.expand.default, row, [emit.size(s) for s in layout.shape])
        here = state.at(at)
        keep = mask
        if keep is not None:
            keep = emit(aten.expand.default, keep, [emit.size(s) for s in (*layout.shape, *[1] * len(rest))])
            keep = emit.split(keep, here)
        shape = (*layout.shape, *rest)
        g = emit(aten.expand.default, values, [emit.size(s) for s in shape])
        return flat(emit, emit.split(row, here), emit.split(g, here), width, keep)

    return Lookup(node, build, product(sizes))
