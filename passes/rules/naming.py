"""Which rows an integer tensor names: row numbers read back through views, divisions and gathers to where they were made.

nonzero(mask)[:, d]                    the coordinates of the entries that the mask selects
argsort(ids) // k                      k copies of each row, in sorted order
order[kept]                            some of the rows that ``order`` names
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from gnsfx._torch import known
from gnsfx.passes.rules.table import overloads
from gnsfx.passes.state import Ids, Size, divides, same_sizes

aten = torch.ops.aten
SAME = set(overloads("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.unsqueeze.default", "aten.squeeze.default",
                     "aten.squeeze.dim", "aten.squeeze.dims", "aten.alias.default", "aten.clone.default", "aten.detach.default",
                     "prims.convert_element_type.default", "aten._to_copy.default", "aten.lift_fresh_copy.default"))  # fmt: skip


def bare(node: Node) -> Node:
    """The node behind views and copies that keep the integers and their order."""
    while node.target in SAME and isinstance(node.args[0], Node) and _keeps(node.args[0], node):
        node = node.args[0]
    return node


def mask_of(node: Node) -> Node:
    """The node behind copies of a mask, whose shape matters."""
    while node.target in SAME and isinstance(source := node.args[0], Node) and source.meta["val"].dtype is torch.bool:
        if not same_sizes(source.meta["val"].shape, node.meta["val"].shape):
            break
        node = source
    return node


def _keeps(source: Node, target: Node) -> bool:
    """Whether a conversion holds every integer that there may be; a boolean is no integer, it indexes otherwise."""
    a, b = source.meta["val"].dtype, target.meta["val"].dtype
    if a == b:
        return True
    if torch.bool in (a, b) or a.is_floating_point or b.is_floating_point or a.is_complex or b.is_complex:
        return False
    return torch.iinfo(b).min <= torch.iinfo(a).min and torch.iinfo(a).max <= torch.iinfo(b).max


def name_rows(index: Node, inner: Size, total: Size, examples: Size) -> Ids:
    """The examples of the rows that ``index`` picks out of a dimension of size ``total`` = outer * B * inner."""
    node, takes = bare(index), ()
    while True:
        if node.target in (aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode):
            by, floor = (
                node.args[1],
                node.target is aten.floor_divide.default or node.kwargs.get("rounding_mode") == "floor",
            )
            if not isinstance(by, int) or not floor:
                break
            inner, total, node = inner * by, total * by, bare(node.args[0])  # type: ignore[arg-type]
        elif node.target in (aten.remainder.Scalar, aten.fmod.Scalar) and divides(inner * examples, node.args[1]):  # type: ignore[arg-type]
            node = bare(node.args[0])  # type: ignore[arg-type]
        elif node.target is aten.index.Tensor and len(node.args[1]) == 1 and node.args[0].meta["val"].dim() == 1:  # type: ignore
            takes, node = (positions_of(node.args[1][0]), *takes), bare(node.args[0])  # type: ignore
        else:
            break
    coordinate = coordinate_of(node)
    if coordinate is not None:
        mask, column = coordinate
        return Ids(mask, inner, total, column, takes)
    return Ids(node, inner, total, None, takes)


def coordinate_of(node: Node) -> tuple[Node, int] | None:
    """(mask, d) where ``node`` is column d of ``nonzero(mask)``."""
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, Node):
        column: Any = node.args[1]
        along = source.args[1] if len(source.args) > 1 else 0
        if source.target is not aten.unbind.int or along not in (1, -1):
            return None
        source = bare(source.args[0])  # type: ignore[arg-type]
    elif node.target is aten.select.int and node.args[1] in (1, -1):
        source, column = bare(node.args[0]), node.args[2]  # type: ignore[arg-type]
    elif node.target is aten.nonzero.default and node.meta["val"].shape[1] == 1:
        source, column = node, 0
    else:
        return None
    if source.target is not aten.nonzero.default:
        return None
    mask: Any = source.args[0]
    return mask_of(mask), column % mask.meta["val"].dim()


def positions_of(index: Node) -> Node:
    """A mask and its ``nonzero`` take the same positions."""
    coordinate = coordinate_of(bare(index))
    if index.meta["val"].dtype is torch.bool:
        return mask_of(index)
    same = coordinate is not None and coordinate[0].meta["val"].dim() == 1
    return coordinate[0] if coordinate and same and coordinate[0].meta["val"].dtype is torch.bool else bare(index)


def inverse_of(index: Node) -> Node | None:
    """The permutation that ``index`` undoes: ``argsort`` of an argsort, or positions written to where they came from."""
    node = bare(index)
    if _is_argsort(node):
        inner = bare(node.args[0].args[0])  # type: ignore
        return inner if _is_argsort(inner) else None
    if node.target is not aten.index_put.default or (len(node.args) > 3 and node.args[3]) or len(node.args[1]) != 1:  # type: ignore
        return None
    source, values = bare(node.args[1][0]), node.args[2]  # type: ignore
    counts = values.target is torch.ops.prims.iota.default and (values.kwargs["start"], values.kwargs["step"]) == (0, 1)  # type: ignore
    length = node.meta["val"].shape[0]
    same = node.meta["val"].dim() == 1 and known(values.meta["val"].shape[0] == length)  # type: ignore[union-attr]
    return source if counts and same and _is_argsort(source) else None


def _is_argsort(node: Node) -> bool:
    sorts = overloads("aten.sort.default", "aten.sort.stable")
    ascending = node.target is operator.getitem and node.args[1] == 1 and node.args[0].target in sorts  # type: ignore
    if not ascending:
        return False
    call: Any = node.args[0]
    descending = call.kwargs.get(
        "descending", call.args[-1] if isinstance(call.args[-1], bool) and len(call.args) > 2 else False
    )
    return call.args[0].meta["val"].dim() == 1 and not descending
