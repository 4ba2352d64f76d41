"""Attention within packed documents: values whose rows and columns belong to documents.

(H, T, d) @ (H, d, T)                  rows routed @ columns routed -> routed(1), across 2
softmax along the columns              -> routed(1), across 2
(H, T, T) @ (H, T, d)                  contracted over the columns -> routed(1)
(H, T, T)^T @ (H, T, d), backward      contracted over the rows -> routed(1): the gradient of keys and values

Where rows or columns are summed, an entry between two documents would carry one into the other. ``documents.py`` checks
in every step that those are zero, so that it does not matter by which of the two an entry is assigned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gnsfx._torch import known
from gnsfx.passes.rules.nn import ATTENTION
from gnsfx.passes.rules.pointwise import UNTAGGED, is_pointwise, tensors
from gnsfx.passes.rules.reductions import removed
from gnsfx.passes.rules.routing import MEETS, SPLIT, into, permuted, routed
from gnsfx.passes.rules.table import Op, Rule, overloads
from gnsfx.passes.state import Batched, Partial, Routed, Shared, Size, State, product, same_ids, same_rows

ACROSS: dict[Any, Rule] = {}
"""Asked where an argument has documents along rows and columns."""
STATISTICS_OF_ROWS = overloads("aten.amax.default", "aten.argmax.default")
"""The largest score is subtracted before the exponential and has no part in the result, open to other documents or not."""
UNMASKED = "documents attend to each other: attention over packed documents needs a mask that keeps them apart"


across = into(ACROSS)


def across_rule(target: Any) -> Rule | None:
    return ACROSS.get(target) or (together_rule if is_pointwise(target) or target in UNTAGGED else None)


def of(op: Op, name: str) -> Routed:
    state = op.state(name)
    assert isinstance(state, Routed)
    return state


def together_rule(op: Op) -> State | tuple[State, ...]:
    """Broadcasting: what has documents along rows or columns alone meets what has them along both."""
    out = len(op.shape())
    states = [(v, s) for v in tensors(op) if not isinstance(s := op.state(v), Shared)]
    moved = []
    for value, state in states:
        if not isinstance(state, Routed):
            return op.mixed(MEETS)
        shift = out - len(op.shape(value))
        here = Routed(tuple(d + shift for d in state.dims), state.ids, tuple(d + shift for d in state.across))
        if not all(known(op.shape()[d] == op.shape(value)[d - shift]) for d in (*here.dims, *here.across)):
            return op.mixed(MEETS)
        moved.append(here)
    full = next(s for s in moved if s.across)
    fits = all(
        same_ids(s.ids, full.ids) and (s.across or s.dims) in (full.across, full.dims) and s.dims in (full.dims, full.across)
        and (not s.across or s.dims == full.dims)
        for s in moved
    )  # fmt: skip
    return full if fits else op.mixed(MEETS)


def mapped(op: Op, state: Routed, place: dict[int, int | None]) -> State:
    """The state with every dimension moved to ``place``; None where it is lost."""
    dims, columns = ([place.get(d) for d in group] for group in (state.dims, state.across))
    if any(d is None for d in (*dims, *columns)):
        return op.mixed(SPLIT)
    return Routed(tuple(dims), state.ids, tuple(columns))  # type: ignore[arg-type]


def places(before: Sequence[Size], after: Sequence[Size]) -> dict[int, int | None]:
    """Where a row-major reshape leaves each dimension that keeps its size and what lies before it."""
    found: dict[int, int | None] = {}
    for dim, size in enumerate(before):
        same = [
            a
            for a in range(len(after))
            if known(product(after[:a]) == product(before[:dim])) and known(after[a] == size)
        ]
        found[dim] = same[-1] if same else None
    return found


@across("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.unsqueeze.default", "aten.squeeze.default",
        "aten.squeeze.dim", "aten.squeeze.dims")  # fmt: skip
def reshape_rule(op: Op) -> State:
    return mapped(op, of(op, "self"), places(op.shape("self"), op.shape()))


@across("aten.expand.default")
def expand_rule(op: Op) -> State:
    before, after = op.shape("self"), op.shape()
    shift = len(after) - len(before)
    return mapped(
        op, of(op, "self"), {d: d + shift for d in range(len(before)) if known(before[d] == after[d + shift])}
    )


@across("aten.permute.default", "aten.transpose.int", "aten.t.default")
def permute_rule(op: Op) -> State:
    order = permuted(op)
    return mapped(op, of(op, "self"), {d: order.index(d) for d in order})


@across("aten._softmax.default", "aten._softmax_backward_data.default")
def softmax_rule(op: Op) -> State:
    names = [n for n in ("self", "grad_output", "output") if n in op.args]
    states = [op.state(n) for n in names]
    first = states[0]
    if not isinstance(first, Routed) or (op.dim(op["dim"], names[0]),) != first.across:
        return op.mixed(SPLIT)
    return first if all(isinstance(s, Routed) and same_rows(s, first) for s in states) else op.mixed(MEETS)


@across("aten.sum.dim_IntList", "aten.sum.default", *map(str, STATISTICS_OF_ROWS))
def reduce_rule(op: Op) -> State:
    state, dims = of(op, "self"), removed(op)
    gone = [bool(set(group) & set(dims)) for group in (state.dims, state.across)]
    if all(gone):
        return op.contracted()
    shift = {d: d if op.args.get("keepdim") else d - sum(r < d for r in dims) for d in range(len(op.shape("self")))}
    if not any(gone):
        return mapped(op, state, shift)  # type: ignore[arg-type]
    kept = state.across if gone[0] else state.dims
    return Routed(tuple(shift[d] for d in kept), state.ids)


@across("aten.mm.default", "aten.bmm.default")
def mm_rule(op: Op) -> State:
    """One side has documents along rows and columns; the other has them along the contracted dimension, or not at all."""
    lead = len(op.shape()) - 2
    a, b = op.state("self"), op.state("mat2")
    full, other, inner, inner_of_other, free = (
        (a, b, lead + 1, lead, lead) if isinstance(a, Routed) and a.across else (b, a, lead, lead + 1, lead + 1)
    )
    assert isinstance(full, Routed)
    if isinstance(other, (Batched, Partial)) or (isinstance(other, Routed) and other.across):
        return op.mixed(MEETS)
    if isinstance(other, Routed) and not (other.dims == (inner_of_other,) and same_ids(other.ids, full.ids)):
        return op.mixed(MEETS)
    return Routed((free,), full.ids) if (inner,) in (full.dims, full.across) else op.mixed(MEETS)


@across("aten.embedding_dense_backward.default", "aten.index_put.default", "aten._unsafe_index_put.default",
        "aten._unsafe_masked_index_put_accumulate.default")  # fmt: skip
def table_rule(op: Op) -> State:
    """A table looked up for pairs of positions (relative distances): each pair belongs to the document of its row."""
    g = op.state("grad_output" if "grad_output" in op.args else "values")
    others = [v for v in tensors(op) if op.state(v) is not g and not isinstance(op.state(v), Shared)]
    return (
        op.contracted() if isinstance(g, Routed) and not others and op.args.get("accumulate", True) else op.mixed(MEETS)
    )


@routed(*map(str, ATTENTION))
def attention_rule(op: Op) -> State | tuple[State, ...]:
    """(R, H, T, d) operands of packed documents, and a mask (R, 1, T, T) that keeps them apart."""
    operands = [n for n in ("grad_out", "query", "key", "value") if n in op.args]
    states = [op.state(n) for n in operands]
    mask: Any = op.args.get("attn_mask", op.args.get("attn_bias"))
    count = len(op.node.meta["val"])
    first = states[0]
    if not isinstance(first, Routed) or not all(isinstance(s, Routed) and same_rows(s, first) for s in states):
        return (op.mixed(MEETS),) * count
    if not first.ids.packed or first.dims not in ((2,), (0, 2)):
        return (op.mixed(SPLIT),) * count
    if mask is None:
        return (op.mixed(UNMASKED),) * count
    shape = op.shape(mask)
    whole = len(shape) == 4 and all(known(shape[d] == op.shape("query")[d]) for d in first.dims)
    if not whole or not known(shape[3] == shape[2]) or not isinstance(op.state(mask), Shared):
        return (op.mixed(UNMASKED),) * count

    def fits(value: Any) -> bool:
        shape = getattr(value, "shape", ())
        return len(shape) > 2 and all(known(shape[d] == op.shape("query")[d]) for d in first.dims)

    return tuple(first if fits(v) else Shared() for v in op.node.meta["val"])
