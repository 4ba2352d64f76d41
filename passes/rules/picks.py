"""Rows taken out of the batch by data, and put back: mixture of experts, packed positions, boolean masks.

nonzero(mask)                          mask batched -> routed(0): the coordinates name the rows they came from
x[rows], rows (n,)                     x batched -> routed(0): row i belongs to the example of row rows[i] of x
argsort(expert_of_row)                 integers along the batch -> routed(0)
zeros.index_add(0, rows, y)            y routed by the same rows -> batched again

The gradient of row i reaches exactly the example that owns the row it was taken from, whatever the numbers are: an
integer carries no gradient itself. Indices made of constants alone (a roll, a flip) are left to the ordinary rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from gnsfx._torch import known
from gnsfx.passes.rules.indexing import PICKED, SCATTERS, Layout
from gnsfx.passes.rules.naming import bare, inverse_of, mask_of, name_rows, positions_of
from gnsfx.passes.rules.routing import MEETS, ROUTED, SPLIT, along_rule, routed, together
from gnsfx.passes.rules.table import Op, overloads
from gnsfx.passes.state import (
    Batched,
    Ids,
    Mixed,
    Routed,
    Shared,
    Size,
    State,
    divides,
    product,
    quotient,
    same_ids,
    same_place,
    same_rows,
    same_sizes,
)

aten = torch.ops.aten
ELSEWHERE = "rows chosen by data are written elsewhere than they came from"


def follow(op: Op, own: Batched | Routed, index: Node, size: Size) -> Ids | Batched | Mixed:
    """Examples of the rows that ``index`` (n,) takes from a dimension of size ``size`` along which ``own`` has its examples."""
    if isinstance(own, Batched):
        return name_rows(index, own.inner, size, op.examples)
    undone, ids = inverse_of(index), own.ids
    if undone is not None and undone is ids.rows and not ids.takes:
        return in_order(op, ids, op.shape(index)[0])
    return Ids(ids.rows, ids.inner, ids.total, ids.column, (*ids.takes, positions_of(index)))


def in_order(op: Op, ids: Ids, length: Size) -> Batched | Mixed:
    """The state of ``length`` rows for which the permutation ``ids.rows`` was undone."""
    block = ids.inner * op.examples
    if not known(ids.rows.meta["val"].numel() == length) or not divides(block, length):
        return op.mixed(PICKED)
    return Batched(0, quotient(length, block), ids.inner)


def data_dependent(op: Op, index: Node) -> bool:
    """Whether an index comes from the examples or the caller, not from constants (a roll) or the weights."""
    state = op.state(index)
    return isinstance(state, (Batched, Routed)) or (isinstance(state, Shared) and state.doubt is not None)


def gather_rows(op: Op, indices: list[Node | None]) -> State | None:
    """``x[rows]`` and ``x[mask]`` where the rows of the batch are picked by data; None where it is something else."""
    own, mask = op.state("self"), _mask(indices)
    if mask is not None:
        return _masked_rows(op, own, *mask)
    if not isinstance(own, (Batched, Routed)):
        return None
    layout = Layout(op, indices)
    dim = own.dim if isinstance(own, Batched) else own.dims[0]
    if layout.masks or dim not in layout.where or (isinstance(own, Routed) and len(own.dims) != 1):
        return None
    index = layout.nodes[layout.where.index(dim)]
    shape = (*[1] * (len(layout.shape) - len(op.shape(index))), *op.shape(index))
    axes = [a for a, size in enumerate(shape) if not known(size == 1)] or [len(shape) - 1]
    if not (isinstance(own, Routed) or data_dependent(op, index)) or not all(
        known(shape[a] == layout.shape[a]) for a in axes
    ):
        return None
    found = follow(op, own, index, op.shape("self")[dim])
    if isinstance(found, Mixed):
        return found
    if isinstance(found, Batched):
        return found.at(layout.start + axes[0]) if len(axes) == 1 else op.mixed(PICKED)
    return Routed(tuple(layout.start + a for a in axes), found)


def _mask(indices: Sequence[Node | None]) -> tuple[Node, int] | None:
    """The boolean mask that is the only index, and the dimension at which it starts."""
    nodes = [(i, x) for i, x in enumerate(indices) if x is not None]
    if len(nodes) == 1 and nodes[0][1].meta["val"].dtype is torch.bool:
        return nodes[0][1], nodes[0][0]
    return None


def _masked_rows(op: Op, own: State, mask: Node, start: int) -> State:
    """(.., *mask.shape, ..)[mask] -> (.., n, ..)"""
    width, chosen = len(op.shape(mask)), op.state(mask)
    if not isinstance(own, (Batched, Routed)):
        if not isinstance(chosen, Batched):
            return op.mixed(MEETS)
        return Routed((start,), Ids(mask_of(mask), chosen.inner, op.shape(mask)[chosen.dim], chosen.dim))
    dims = own.dims if isinstance(own, Routed) else (own.dim,)
    inside = [start <= d < start + width for d in dims]
    if not any(inside):
        if isinstance(chosen, (Batched, Routed)):
            return op.mixed("a mask that depends on the example over a dimension beside the batch")
        moved = [d if d < start else d - width + 1 for d in dims]
        return own.at(moved) if isinstance(own, Routed) else own.at(moved[0])
    if isinstance(own, Batched):
        return Routed((start,), Ids(mask_of(mask), own.inner, op.shape("self")[own.dim], own.dim - start))
    if width != 1 or len(dims) != 1:
        return op.mixed(SPLIT)
    ids = own.ids
    return Routed((start,), Ids(ids.rows, ids.inner, ids.total, ids.column, (*ids.takes, mask_of(mask))))


def put_rows(op: Op, target: str, indices: list[Node | None], values: str) -> State | None:
    """Routed rows written back to where they came from are batched again; None where they go anywhere else."""
    own, value = op.state(target), op.state(values)
    if not isinstance(value, Routed):
        return _unsorted(op, indices, value)
    mask, shape = _mask(indices), op.shape(target)
    if mask is not None:
        (node, start), column = mask, value.ids.column
        if column is None or column >= len(op.shape(node)):
            return None
        ids = Ids(mask_of(node), value.ids.inner, shape[start + column], column)
        back = _back(op, value, (start,), ids, Batched(start + column, 1, ids.inner), shape)
    else:
        layout = Layout(op, indices)
        back = None
        if len(op.shape(values)) != len(layout.shape) + len(shape) - len(layout.where):
            return None
        for dim, index in zip(layout.where, layout.nodes, strict=True):
            at = tuple(layout.start + a for a in range(len(layout.shape)))
            whole = known(product(op.shape(index)) == product(layout.shape))
            before = _untaken(op, value.ids, index, shape[dim])
            if before is not None and value.dims == at:
                back = Routed((dim,), before)
            factor = name_rows(index, 1, shape[dim], op.examples).inner
            if whole and back is None and divides(factor, value.ids.inner):
                inner = quotient(value.ids.inner, factor)
                ids = name_rows(index, inner, shape[dim], op.examples)
                back = _back(op, value, at, ids, Batched(dim, 1, inner), shape)
    if back is None:
        return None
    return back if isinstance(own, Shared) or same_place(own, back) else op.mixed(MEETS)


def _untaken(op: Op, ids: Ids, index: Node, size: Size) -> Ids | None:
    """The examples of the ``size`` rows out of which ``index`` took those of ``ids``."""
    if not ids.takes or ids.takes[-1] is not positions_of(index):
        return None
    before = Ids(ids.rows, ids.inner, ids.total, ids.column, ids.takes[:-1])
    source = before.takes[-1] if before.takes else ids.rows if ids.column is None else None
    plain = source is not None and source.meta["val"].dtype not in (torch.bool, torch.uint8)
    return before if plain and known(product(op.shape(source)) == size) else None


def _unsorted(op: Op, indices: list[Node | None], value: State) -> State | None:
    """Backward of undoing a sort: rows in the order of the batch return to the sorted order."""
    index = indices[0] if len(indices) == 1 else None
    perm = inverse_of(index) if index is not None else None
    if perm is None or not isinstance(value, Batched) or value.dim != 0 or not isinstance(op.state("self"), Shared):
        return None
    assert index is not None
    same = known(op.shape(perm)[0] == op.shape("self")[0]) and known(op.shape(index)[0] == op.shape("values")[0])
    return Routed((0,), Ids(perm, value.inner, op.shape("self")[0])) if same else None


def _back(
    op: Op, value: Routed, at: tuple[int, ...], ids: Ids, place: Batched, shape: Sequence[Size]
) -> Batched | None:
    """``place`` with its outer factor, where rows written to ``ids`` are those that ``value`` was taken from."""
    block = op.examples * place.inner
    if not set(value.dims) <= set(at) or not same_ids(ids, value.ids) or not divides(block, shape[place.dim]):
        return None
    return Batched(place.dim, quotient(shape[place.dim], block), place.inner)


@routed("aten.index.Tensor", "aten._unsafe_index.Tensor")
def index_rule(op: Op) -> State:
    found = gather_rows(op, op["indices"])
    if found is not None:
        return found
    own, layout = op.state("self"), Layout(op, op["indices"])
    if isinstance(own, Routed):
        if (
            layout.masks
            or any(d in layout.where for d in own.dims)
            or any(not isinstance(op.state(n), Shared) for n in layout.nodes)
        ):
            return op.mixed(MEETS)
        return own.at([layout.outside(d) for d in own.dims])
    index = together(op, layout.nodes, layout.shape)
    if isinstance(own, Batched) or not isinstance(index, Routed):
        return index if isinstance(index, Mixed) else op.mixed(MEETS)
    return index.at([layout.start + d for d in index.dims])


@routed("aten.index_put.default", "aten._unsafe_index_put.default", "aten._unsafe_masked_index_put_accumulate.default")
def index_put_rule(op: Op) -> State:
    source = op.state(op["indices"][0]) if len(op["indices"]) == 1 else None
    if inverse_of(op.node) is not None and isinstance(source, Routed):
        return in_order(op, source.ids, op.shape()[0])
    back = put_rows(op, "self", op["indices"], "values")
    if back is not None:
        return back
    layout = None if _mask(op["indices"]) else Layout(op, op["indices"])
    if layout is None or layout.masks or not isinstance(op.state("self"), Shared):
        return op.mixed(MEETS)
    value, width = op.state("values"), len(layout.shape) + len(op.shape("self")) - len(layout.where)
    index, mask = together(op, layout.nodes, layout.shape), op.state("mask") if "mask" in op.args else Shared()
    if isinstance(mask, Batched) or (isinstance(mask, Routed) and not same_place(index, mask)):  # (*index shape, 1, ..)
        return op.mixed(MEETS)
    here = index.at([layout.start + d for d in index.dims]) if isinstance(index, Routed) else None
    there = value.at([d + width - len(op.shape("values")) for d in value.dims]) if isinstance(value, Routed) else None
    if isinstance(index, Mixed) or isinstance(value, Batched) or (here and there and not same_rows(here, there)):
        return op.mixed(MEETS)
    if not op.tangent:
        return op.mixed(ELSEWHERE)
    return op.contracted() if op.args.get("accumulate", True) else op.mixed("several examples may write the same row")


def vector(node: Node, dim: int) -> Node | None:
    """The (n,) index that was expanded along every dimension but ``dim``, as ``scatter_add`` and ``gather`` want it."""
    while node.target in (aten.expand.default, aten.repeat.default, aten.clone.default):
        before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
        if len(before) != len(after) or not known(before[dim] == after[dim]):
            return None
        node = node.args[0]  # type: ignore[assignment]
    shape = node.meta["val"].shape
    return bare(node) if all(known(s == 1) for d, s in enumerate(shape) if d != dim) else None


@routed(*map(str, SCATTERS), "aten.index_add.default", "aten.index_copy.default")
def scatter_rule(op: Op) -> State:
    """Along another dimension everything stays in its row; along the rows they return to where they came from, or are summed."""
    dim, names = op.dim(op["dim"]), [n for n in ("self", "index", "src", "source") if n in op.args]
    if not any(dim in s.dims for n in names if isinstance(s := op.state(n), Routed)):
        inside = len(op.shape("index")) == len(op.shape()) and _same_leading(op, dim)
        return together(op, [op[n] for n in names], op.shape("index")) if inside else op.mixed(MEETS)
    values = names[-1]
    index = op["index"] if len(op.shape("index")) == 1 else vector(op["index"], dim)
    if index is not None and (back := put_rows(op, "self", [None] * dim + [index], values)) is not None:
        return back
    rows = [op["index"], op[values]]
    aligned = index is not None or isinstance(together(op, rows, op.shape("index")), Routed)
    fits = "add" in str(op.node.target) and aligned and isinstance(op.state("self"), Shared)
    if not op.tangent:
        return op.mixed(ELSEWHERE)
    return op.contracted() if fits and not any(isinstance(op.state(v), Batched) for v in rows) else op.mixed(MEETS)


def _same_leading(op: Op, dim: int) -> bool:
    names = [n for n in ("self", "index", "src") if n in op.args]
    sizes = [[s for d, s in enumerate(op.shape(n)) if d != dim] for n in names]
    return all(known(a == b) for other in sizes[1:] for a, b in zip(sizes[0], other, strict=True))


@routed("aten.gather.default", "aten.index_select.default")
def gather_rule(op: Op) -> State:
    dim, own = op.dim(op["dim"]), op.state("self")
    along = dim in own.dims if isinstance(own, Routed) else isinstance(own, Batched) and own.dim == dim
    if not along:
        return (
            together(op, [op["self"], op["index"]], op.shape("index"))
            if "gather" in str(op.node.target)
            else op.mixed(MEETS)
        )
    return picked_along(op, own, dim) or op.mixed(MEETS)


def picked_along(op: Op, own: State, dim: int) -> State | None:
    """``gather`` along the batch with one index per row, expanded over the other dimensions."""
    index = op["index"] if len(op.shape("index")) == 1 else vector(op["index"], dim)
    single = isinstance(own, Batched) or (isinstance(own, Routed) and len(own.dims) == 1)
    if index is None or not single or not data_dependent(op, op["index"]):
        return None
    found = follow(op, own, index, op.shape("self")[dim])  # type: ignore[arg-type]
    return Routed((dim,), found) if isinstance(found, Ids) else found.at(dim) if isinstance(found, Batched) else found


# Asked before the ordinary rules: does the op pick rows out of the batch by data? None where it does not.


def nonzero_rule(op: Op) -> State | None:
    state = op.state("self")
    if isinstance(state, Batched):
        return Routed((0,), Ids(mask_of(op["self"]), state.inner, op.shape("self")[state.dim], state.dim))
    if not isinstance(state, Routed) or len(op.shape("self")) != 1:
        return None
    ids = state.ids
    return Routed((0,), Ids(ids.rows, ids.inner, ids.total, ids.column, (*ids.takes, positions_of(op.node))))


def sort_rule(op: Op) -> tuple[State, ...] | None:
    """Integers sorted along the batch: nothing differentiates them, and their positions say where each row came from."""
    state, order = op.state("self"), next((u for u in op.node.users if u.args[1] == 1), None)
    whole = isinstance(state, Batched) and len(op.shape("self")) == 1 and order is not None
    if not whole or op["self"].meta["val"].is_floating_point():
        return None
    assert isinstance(state, Batched) and order is not None
    found = Routed((0,), Ids(order, state.inner, op.shape("self")[0]))
    return found, found


def count_rule(op: Op) -> State | None:
    """A running count: integers carry no gradient from one example to another."""
    return None if op["self"].meta["val"].is_floating_point() else op.state("self")


def masked_select_rule(op: Op) -> State | None:
    own, mask = op.state("self"), op["mask"]
    whole = same_sizes(op.shape(mask), op.shape("self"))
    if not isinstance(own, Batched) or not whole:
        return None
    return Routed((0,), Ids(mask_of(mask), own.inner, op.shape("self")[own.dim], own.dim))


def gathered_rule(op: Op) -> State | None:
    return gather_rows(op, op["indices"])


def gathered_along_rule(op: Op) -> State | None:
    own, dim = op.state("self"), op.dim(op["dim"])
    return picked_along(op, own, dim) if isinstance(own, Batched) and own.dim == dim else None


def put_rule(op: Op) -> State | None:
    """``y[mask] = value``, one value that all share, writes entry by entry; rows in order may return to a sorted order."""
    found, own = _mask(op["indices"]), op.state("self")
    if found is None:
        return _unsorted(op, op["indices"], op.state("values"))
    if not isinstance(op.state("values"), Shared):
        return None
    mask, start = found
    states = [own] if isinstance(own, Batched) else []
    if isinstance(state := op.state(mask), Batched):
        states.append(state.at(state.dim + start))
    return states[0] if all(same_place(s, states[0]) for s in states) else None


PICKS: dict[Any, Callable[[Op], State | tuple[State, ...] | None]] = {}
"""Asked before the ordinary rule where an argument is batched: ops that may pick rows out of the batch by data."""
for names, pick in (
    (("aten.nonzero.default",), nonzero_rule),
    (("aten.sort.default", "aten.sort.stable"), sort_rule),
    (("aten.cumsum.default",), count_rule),
    (("aten.masked_select.default",), masked_select_rule),
    (("aten.index.Tensor", "aten._unsafe_index.Tensor"), gathered_rule),
    (("aten.index_put.default", "aten._unsafe_index_put.default"), put_rule),
    (("aten.gather.default", "aten.index_select.default"), gathered_along_rule),
):
    PICKS.update(dict.fromkeys(overloads(*names), pick))


@routed("aten.sort.default", "aten.sort.stable")
def sort_routed_rule(op: Op) -> tuple[State, ...]:
    """The argsort of a permutation undoes it; any other sort of integers takes the rows in its own order."""
    state, order = op.state("self"), next((u for u in op.node.users if u.args[1] == 1), None)
    assert isinstance(state, Routed)
    if order is None or len(op.shape("self")) != 1 or op["self"].meta["val"].is_floating_point():
        return along_rule(op)  # type: ignore[return-value]
    ids = state.ids
    if inverse_of(order) is ids.rows and not ids.takes:
        return (in_order(op, ids, op.shape("self")[0]),) * 2
    return (Routed((0,), Ids(ids.rows, ids.inner, ids.total, ids.column, (*ids.takes, order))),) * 2


ROUTED[aten.nonzero.default] = lambda op: nonzero_rule(op) or op.mixed(SPLIT)


@routed("aten.masked_scatter.default")
def masked_scatter_rule(op: Op) -> State:
    """Backward of ``masked_select``: the selected entries return to their places."""
    source, mask, shape = op.state("source"), mask_of(op["mask"]), op.shape("self")
    if not isinstance(source, Routed) or not isinstance(op.state("self"), Shared):
        return op.mixed(MEETS)
    ids = source.ids
    if ids.column is None or ids.rows is not mask or ids.takes or not same_sizes(op.shape(mask), shape):
        return op.mixed(MEETS)
    return Batched(ids.column, quotient(ids.total, ids.inner * op.examples), ids.inner)
