"""The norms of what lookups add to a table: equal rows of one example are added, then squared.

index_put(zeros, ids (B, T), g (B, T, D))              s_b = |sum_t onehot(ids_bt)^T g_bt|^2     segments
                             one position each         s_b = |g_b|^2                             outer
index_put(zeros, ids (T), sum_b g_b (T, D))            the ids are those of every example        segments
"""

from __future__ import annotations

import torch
from torch.fx import Node

from gnsfx._torch import known
from gnsfx.kernels import gpu
from gnsfx.passes.contractions import Lookup
from gnsfx.passes.emit import Emitter, narrow
from gnsfx.passes.record import Record
from gnsfx.passes.rows import own_rows, skipping, zeros
from gnsfx.passes.rules.indexing import Layout
from gnsfx.passes.rules.table import Op, arguments
from gnsfx.passes.select_path import Planner
from gnsfx.passes.stacks import Stacks
from gnsfx.passes.state import Partial, product, same_sizes

aten, ops = torch.ops.aten, torch.ops.gnsfx
PUTS = (aten.index_put.default, aten._unsafe_index_put.default, aten._unsafe_masked_index_put_accumulate.default)


def measure_lookup(emit: Emitter, planner: Planner, record: Record, found: Lookup) -> None:
    """Each example has rows of its own."""
    record.take(planner.lookup(found))
    with emit.at(found.node):
        ids, g = found.marked(emit)
        outer = record.path == "outer" and known(g.meta["val"].shape[1] == 1)
        if outer:
            ids, g = found.factors(emit)
        record.path = "outer" if outer else "segments"
        record.sq_norm = emit.square(g) if outer else lookup_norms(emit, ids, g)


def lookup_norms(emit: Emitter, ids: Node, g: Node) -> Node:
    """(B,) for ids (B, T) and what they add to a table (B, T, D)."""
    value = g.meta["val"]
    if "embedding" in gpu.kernels_on(value.device) and value.dtype in gpu.LOOKED_UP:
        return emit.add_parts(emit(ops.embedding_norm_parts.default, ids, narrow(g)))
    return emit(ops.embedding_sq_norm.default, ids, g)


def lookup_of_all(emit: Emitter, stacks: Stacks, leaf: Node) -> tuple[Node, Node] | None:
    """Rows gathered once for the whole batch (position embeddings): ids are shared, the values are partial."""
    if leaf.target not in PUTS or leaf.meta["val"].dtype.is_complex:
        return None
    op = arguments(leaf)
    table, values = op["self"], op["values"]
    layout = Layout(Op(leaf, stacks.states, emit.examples, True), op["indices"])
    adds = zeros(table) and op.get("accumulate", True)
    shape = (*layout.shape, *emit.shape(table)[1:])
    exact = same_sizes(shape, emit.shape(values))
    if layout.where != [0] or layout.masks or not adds or not exact or not isinstance(stacks.states[values], Partial):
        return None
    index = layout.nodes[0]
    g = stacks.of(values)
    width = len(layout.shape)
    if "mask" not in op:
        index = own_rows(emit, index, emit.shape(table)[0])
    else:
        index = skipping(emit, index, op["mask"])
    T, D = product(layout.shape), product(shape[width:])
    ids = emit(aten.expand.default, emit.view(index, [1, T]), [emit.size(emit.examples), emit.size(T)])
    return ids, emit.view(g, [emit.examples, T, D])
