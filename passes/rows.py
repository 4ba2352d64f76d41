"""Rows of a table, by number: what lookups add to them, ready for a table of each example.

ids (B, ...), g (B, ..., D)  -> ids (B, T), g (B, T, D)      flat
left out                     -> ``SKIPPED`` for its id       skipping: of g no copy is made
                             -> zeros for row 0              without
row -1                       -> row V - 1                    own_rows
"""

from __future__ import annotations

import torch
from torch.fx import Node

from gnsfx.kernels.ops import SKIPPED
from gnsfx.passes.emit import Emitter
from gnsfx.passes.state import Size, product

aten = torch.ops.aten


def own_rows(emit: Emitter, index: Node, size: Size) -> Node:
    """``index_put`` takes negative indices: -1 and size - 1 are one row."""
    wrapped = emit(aten.add.Tensor, index, emit.size(size))
    return emit(aten.where.self, emit(aten.lt.Scalar, index, 0), wrapped, index)


def zeros(table: Node) -> bool:
    """Whether a value is zero everywhere, so that what is written into it is all there is."""
    if table.target in (aten.full.default, aten.full_like.default):
        return bool(table.args[1] == 0)
    return table.target in (aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)


def flat(emit: Emitter, ids: Node, g: Node, width: int, keep: Node | None) -> tuple[Node, Node, Node | None]:
    """ids (B, ...), g (B, ..., *rest) and ``keep`` (*ids.shape, 1, ...) -> (B, T), (B, T, D) and (B, T, 1)."""
    shape = emit.shape(g)
    T, D = product(shape[1 : width + 1]), product(shape[width + 1 :])
    keep = emit.view(keep, [shape[0], T, 1]) if keep is not None else None
    return emit.view(ids, [shape[0], T]), emit.view(g, [shape[0], T, D]), keep


def skipping(emit: Emitter, ids: Node, keep: Node) -> Node:
    """ids with ``SKIPPED`` where ``keep`` (*ids.shape, 1, ...) leaves a row out."""
    device = ids.meta["val"].device
    mark = emit(aten.full.default, [], SKIPPED, dtype=torch.int64, device=device, pin_memory=False)
    return emit(aten.where.self, emit.view(keep, list(emit.shape(ids))), emit.cast(ids, torch.int64), mark)


def without(emit: Emitter, ids: Node, g: Node, keep: Node) -> tuple[Node, Node]:
    """Rows that ``keep`` (*ids.shape, 1, ...) leaves out become zeros in row 0."""
    zero, none = ({"dtype": n.meta["val"].dtype, "device": n.meta["val"].device, "pin_memory": False} for n in (g, ids))
    g = emit(aten.where.self, keep, g, emit(aten.full.default, [], 0, **zero))
    filler = emit(aten.full.default, [], 0, **none)
    return emit(aten.where.self, emit.view(keep, list(emit.shape(ids))), ids, filler), g
