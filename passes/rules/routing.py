"""Rows chosen by data, op by op: what is done to them row by row, and where they are summed.

(n, D) routed by ids, pointwise        -> routed(0), if all rows meet rows of the same ids
(n, D) @ (D, O)                        -> routed(0)
(I, n) @ (n, O), backward              -> partial: the weight gradient
grouped_mm(rows, weights, offsets)     -> routed(0); its backward sums the rows of each group -> partial

``ROUTED`` holds the rules asked when an argument is routed; no other rule ever sees a routed state. Where rows are taken
out of the batch and put back is in ``picks.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gnsfx._torch import known
from gnsfx.errors import RuleError
from gnsfx.passes.rules.matmul import CROSS
from gnsfx.passes.rules.pointwise import UNTAGGED, is_pointwise, tensors
from gnsfx.passes.rules.reductions import SCANS, STATISTICS, SUMS, removed, statistic
from gnsfx.passes.rules.table import Op, Rule, overloads, rule
from gnsfx.passes.state import (
    Batched,
    Mixed,
    Routed,
    Shared,
    Size,
    State,
    product,
    same_ids,
    same_rows,
    same_sizes,
)

aten = torch.ops.aten
ROUTED: dict[Any, Rule] = {}
MEETS = "rows chosen by data meet rows of other examples"
SPLIT = "a dimension along which the rows were chosen by data is cut or reordered"


def into(table: dict[Any, Rule]) -> Callable[..., Callable[[Rule], Rule]]:
    """A decorator that enters a rule into ``table`` for every op of these names."""

    def rules_for(*names: str) -> Callable[[Rule], Rule]:
        def enter(function: Rule) -> Rule:
            for target in overloads(*names):
                if target in table:
                    raise RuleError(f"{target} has a rule already: {table[target].__name__}.")
                table[target] = function
            return function

        return enter

    return rules_for


routed = into(ROUTED)


def routed_rule(target: Any) -> Rule | None:
    found = ROUTED.get(target) or BY_NAME.get(str(target))
    return found or (together_rule if is_pointwise(target) or target in UNTAGGED else None)


def together(op: Op, values: Sequence[Any], shape: Sequence[Size] | None = None) -> State:
    """The state of values that broadcast against each other."""
    out = op.shape() if shape is None else tuple(shape)
    found: Routed | None = None
    for value in values:
        state = op.state(value)
        if isinstance(state, Batched):
            return op.mixed(MEETS)
        if not isinstance(state, Routed):
            continue
        own = op.shape(value)
        here = state.at([d + len(out) - len(own) for d in state.dims])
        if not all(known(own[a] == out[b]) for a, b in zip(state.dims, here.dims, strict=True)):
            return op.mixed("rows chosen by data are broadcast against another dimension")
        if found is not None and not same_rows(found, here):
            return op.mixed(MEETS)
        found = here
    return found or Shared()


def together_rule(op: Op) -> State | tuple[State, ...]:
    value = op.node.meta["val"]
    if isinstance(value, (tuple, list)):
        return tuple(Shared() if known(v.numel() == 0) else together(op, tensors(op), tuple(v.shape)) for v in value)
    return together(op, tensors(op))


def reshape(state: Routed, before: Sequence[Size], after: Sequence[Size]) -> Routed | None:
    """The state after a row-major reshape: an unbroken block of dimensions keeps its order, single ones keep their size."""
    first, last = min(state.dims), max(state.dims) + 1
    if state.dims == tuple(range(first, last)):
        pre, block, post = product(before[:first]), product(before[first:last]), product(before[last:])
        cuts = [(a, b) for a in reversed(range(len(after))) for b in range(a + 1, len(after) + 1)]
        for a, b in cuts:
            sizes = product(after[:a]), product(after[a:b]), product(after[b:])
            if all(known(x == y) for x, y in zip(sizes, (pre, block, post), strict=True)):
                return state.at(range(a, b)) if _may_split(state, before[first:last], after[a:b]) else None
        return None
    dims = []
    for dim in state.dims:
        pre = product(before[:dim])
        match = [a for a in range(len(after)) if known(product(after[:a]) == pre) and known(after[a] == before[dim])]
        if not match:
            return None
        dims.append(match[-1])
    return state.at(dims) if len(set(dims)) == len(dims) else None


def _may_split(state: Routed, before: Sequence[Size], after: Sequence[Size]) -> bool:
    """Rows split into several dimensions again are mostly meant as positions of the batch, to which they do not belong."""
    wide = [[s for s in sizes if not known(s == 1)] for sizes in (before, after)]
    if state.ids.packed or len(wide[1]) <= len(wide[0]):
        return True
    made = [s for s in state.ids.rows.meta["val"].shape if not known(s == 1)]
    return not state.ids.takes and state.ids.column is None and same_sizes(made, wide[1])


@routed("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.unsqueeze.default", "aten.squeeze.default",
        "aten.squeeze.dim", "aten.squeeze.dims", "aten.view_copy.default")  # fmt: skip
def reshape_rule(op: Op) -> State:
    state = op.state("self")
    assert isinstance(state, Routed)
    return reshape(state, op.shape("self"), op.shape()) or op.mixed(SPLIT)


@routed("aten.permute.default", "aten.transpose.int", "aten.t.default")
def permute_rule(op: Op) -> State:
    state, order = op.state("self"), permuted(op)
    assert isinstance(state, Routed)
    return state.at([order.index(d) for d in state.dims])


def permuted(op: Op) -> list[int]:
    """The dimension of the argument that each dimension of the result was."""
    if "dims" in op.args:
        return [op.dim(d) for d in op["dims"]]
    order = list(range(len(op.shape())))
    a, b = (op.dim(op["dim0"]), op.dim(op["dim1"])) if "dim0" in op.args else (0, len(order) - 1)
    order[a], order[b] = b, a
    return order


@routed("aten.expand.default")
def expand_rule(op: Op) -> State:
    state, before, after = op.state("self"), op.shape("self"), op.shape()
    assert isinstance(state, Routed)
    here = [d + len(after) - len(before) for d in state.dims]
    kept = all(known(before[a] == after[b]) for a, b in zip(state.dims, here, strict=True))
    return state.at(here) if kept else op.mixed("rows chosen by data are repeated")


@routed("aten.slice.Tensor", "aten.flip.default", "aten.constant_pad_nd.default", "aten.cumsum.default", "aten.glu.default",
        "aten.glu_backward.default", *[str(t) for t in SCANS if "sort" not in str(t)])  # fmt: skip
def along_rule(op: Op) -> State | tuple[State, ...]:
    """Works along dimensions that are not those of the rows."""
    names = [n for n in ("self", "grad_output", "output", "input") if n in op.args] or [next(iter(op.args))]
    found = [s for n in names if isinstance(s := op.state(n), Routed)]
    state: State = found[0]
    shape = op.shape(names[0])
    if "pad" in op.args:
        dims = {len(shape) - 1 - i // 2 for i, p in enumerate(op["pad"]) if not known(p == 0)}
    else:
        dims = {op.dim(d, names[0]) for d in (op["dims"] if "dims" in op.args else [op["dim"]])}
    if any(not same_rows(found[0], s) for s in found) or op.batched(*names):
        state = op.mixed(MEETS)
    elif dims & set(found[0].dims):
        whole = "start" in op.args and known(op.shape()[op.dim(op["dim"])] == shape[op.dim(op["dim"])])
        state = state if whole else op.mixed(SPLIT)
    value = op.node.meta["val"]
    return (state,) * len(value) if isinstance(value, (tuple, list)) else state


@routed("aten.slice_scatter.default")
def slice_scatter_rule(op: Op) -> State:
    dim = op.dim(op["dim"])
    states = [s for n in ("self", "src") if isinstance(s := op.state(n), Routed)]
    if dim in states[0].dims or op.batched("self", "src") or any(not same_rows(states[0], s) for s in states):
        return op.mixed(SPLIT)
    return states[0]


@routed("aten.select.int", "aten.unbind.int", "aten.select_copy.int")
def select_rule(op: Op) -> State | tuple[State, ...]:
    state, dim = op.state("self"), op.dim(op["dim"])
    assert isinstance(state, Routed)
    one = op.mixed(SPLIT) if dim in state.dims else state.at([d - (dim < d) for d in state.dims])
    value = op.node.meta["val"]
    return (one,) * len(value) if isinstance(value, (tuple, list)) else one


@routed("aten.select_scatter.default")
def select_scatter_rule(op: Op) -> State:
    dim, src, own = op.dim(op["dim"]), op.state("src"), op.state("self")
    if not isinstance(src, Routed) or not isinstance(own, (Shared, Routed)):
        return op.mixed(MEETS)
    here = src.at([d + (d >= dim) for d in src.dims])
    return here if isinstance(own, Shared) or same_rows(own, here) else op.mixed(MEETS)


@routed("aten.split.Tensor", "aten.split_with_sizes.default")
def split_rule(op: Op) -> tuple[State, ...]:
    state, dim = op.state("self"), op.dim(op["dim"])
    assert isinstance(state, Routed)
    return ((op.mixed(SPLIT) if dim in state.dims else state),) * len(op.node.meta["val"])


@routed("aten.cat.default")
def cat_rule(op: Op) -> State:
    dim, states = op["dim"] % len(op.shape()), [op.state(t) for t in op["tensors"]]
    found = [s for s in states if isinstance(s, Routed)]
    if (
        dim in found[0].dims
        or any(isinstance(s, Batched) for s in states)
        or any(not same_rows(found[0], s) for s in found)
    ):
        return op.mixed(MEETS)
    return found[0]


def reduce(op: Op) -> State | None:
    state, dims = op.state("self"), removed(op)
    assert isinstance(state, Routed)
    if set(dims) & set(state.dims):
        return None
    return state if op.args.get("keepdim") else state.at([d - sum(r < d for r in dims) for d in state.dims])


@routed(*map(str, SUMS))
def sum_rule(op: Op) -> State:
    return reduce(op) or op.contracted()


@routed(*map(str, STATISTICS))
def statistic_rule(op: Op) -> State | tuple[State, ...]:
    return statistic(op, reduce(op))


def matmul_state(op: Op, left: str, right: str) -> State:
    """Of ``left @ right``: each dimension is the leading one, a row, a column or contracted."""
    a, b, lead = op.state(left), op.state(right), len(op.shape(left)) - 2
    if isinstance(a, Batched) or isinstance(b, Batched):
        return op.mixed(CROSS)
    roles_a = [("lead", "row", "inner")[d + 1 - lead] for d in a.dims] if isinstance(a, Routed) else None
    roles_b = [("lead", "inner", "column")[d + 1 - lead] for d in b.dims] if isinstance(b, Routed) else None
    if roles_a and roles_b and not (roles_a == roles_b and same_ids(a.ids, b.ids)):  # type: ignore[union-attr]
        assert isinstance(a, Routed) and isinstance(b, Routed)
        if roles_a == ["row"] and roles_b == ["column"] and a.ids.packed and same_ids(a.ids, b.ids):
            return Routed((lead,), a.ids, (lead + 1,))  # attention scores within documents
        return op.mixed(MEETS)
    roles, at = roles_a or roles_b or [], {"lead": 0, "row": lead, "column": lead + 1}
    if "inner" in roles:
        return op.contracted() if op.tangent else op.mixed("a matrix product sums rows chosen by data")
    source = a if roles_a else b
    assert isinstance(source, Routed)
    return source.at([at[r] for r in roles])


@routed("aten.mm.default", "aten.bmm.default", "aten.mm.dtype", "aten.bmm.dtype")
def mm_rule(op: Op) -> State:
    return matmul_state(op, "self", "mat2")


@routed("aten.addmm.default", "aten.baddbmm.default")
def addmm_rule(op: Op) -> State:
    left, right = ("mat1", "mat2") if "mat1" in op.args else ("batch1", "batch2")
    state = (
        matmul_state(op, left, right)
        if any(isinstance(op.state(n), Routed) for n in (left, right))
        else op.mixed(MEETS)
    )
    return state if isinstance(op.state("self"), Shared) and isinstance(state, (Routed, Mixed)) else op.mixed(MEETS)


@routed("aten.native_layer_norm.default", "aten._fused_rms_norm.default")
def layer_norm_rule(op: Op) -> State | tuple[State, ...]:
    state = op.state("input")
    width = len(op.shape("input")) - len(op["normalized_shape"])
    scales = [op.state(n) for n in ("weight", "bias") if n in op.args]
    fits = isinstance(state, Routed) and max(state.dims) < width and all(isinstance(s, Shared) for s in scales)
    return (state if fits else op.mixed(MEETS),) * len(op.node.meta["val"])


@routed("aten.native_layer_norm_backward.default", "aten._fused_rms_norm_backward.default")
def layer_norm_backward_rule(op: Op) -> tuple[State, ...]:
    names = [n for n in ("grad_out", "input", "mean", "rstd") if n in op.args]
    found = [s for n in names if isinstance(s := op.state(n), Routed)]
    width = len(op.shape("input")) - len(op["normalized_shape"])
    if max(found[0].dims) >= width or op.batched(*names) or any(not same_rows(found[0], s) for s in found):
        return (op.mixed(MEETS),) * len(op.node.meta["val"])
    return (found[0],) + (op.contracted(),) * (len(op.node.meta["val"]) - 1)


@routed("aten.full_like.default", "aten.zeros_like.default", "aten.ones_like.default", "aten.empty_like.default", "aten.new_zeros.default",
        "aten.new_ones.default", "aten.new_full.default", "aten.new_empty.default", "aten.empty_permuted.default",
        "aten.new_empty_strided.default")  # fmt: skip
def constant_rule(op: Op) -> State:
    return Shared()


@routed("aten.embedding.default")
def embedding_rule(op: Op) -> State:
    return op.state("indices") if isinstance(op.state("weight"), Shared) else op.mixed(MEETS)


@routed("aten.embedding_dense_backward.default")
def embedding_backward_rule(op: Op) -> State:
    return op.mixed(MEETS) if op.batched("grad_output", "indices") or op["scale_grad_by_freq"] else op.contracted()


@rule(*overloads("aten.histc.default", "aten.bincount.default"))
@routed("aten.histc.default", "aten.bincount.default")
def histogram_rule(op: Op) -> State:
    return op.mixed("a nonlinear statistic over the examples of a gradient") if op.tangent else op.contracted()


@routed("aten._grouped_mm.default")
def grouped_mm_rule(op: Op) -> State:
    """Rows in groups times one matrix a group; or, with two matrices, a contraction over the rows of each group."""
    a, b = op.state("self"), op.state("mat2")
    if isinstance(a, Routed) and a.dims == (0,) and isinstance(b, Shared) and len(op.shape("mat2")) == 3:
        return a
    both = [s.ids for s, dim in ((a, 1), (b, 0)) if isinstance(s, Routed) and s.dims == (dim,)]
    plain = len(op.shape("self")) == len(op.shape("mat2")) == 2
    return op.contracted() if plain and len(both) == 2 and same_ids(*both) else op.mixed(MEETS)


def grouped_fallback_rule(op: Op) -> State:
    rows = op.state("input")
    return (
        rows
        if isinstance(rows, Routed) and rows.dims == (0,) and isinstance(op.state("weight"), Shared)
        else op.mixed(MEETS)
    )


def grouped_fallback_backward_rule(op: Op) -> tuple[State, ...]:
    x, g = op.state("input"), op.state("grad_output")
    fits = isinstance(x, Routed) and isinstance(g, Routed) and x.dims == (0,) and same_rows(x, g)
    return (g, op.contracted()) if fits else (op.mixed(MEETS),) * 2


BY_NAME: dict[str, Rule] = {
    "transformers.grouped_mm_fallback.default": grouped_fallback_rule,
    "transformers.grouped_mm_fallback_backward.default": grouped_fallback_backward_rule,
}
"""Ops that another package defines when it is imported."""
