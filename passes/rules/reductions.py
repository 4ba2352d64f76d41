"""Reductions and scans.

sum over T of (B, T, D)                batched(0) -> batched(0)
sum over B of (B, D), backward         batched(0) -> partial: a weight-gradient contraction
mean over B, forward                   batched(0) -> shared: a statistic, until a gradient is broadcast back
cumsum, sort, softmax along B          mixed: every example meets every other
"""

from __future__ import annotations

from gnsfx.passes.rules.table import Op, overloads, rule
from gnsfx.passes.state import Batched, Partial, State, same_fold

SUMS = overloads("aten.sum.dim_IntList", "aten.sum.default", "aten.mean.dim", "aten.mean.default")
STATISTICS = overloads(
    "aten.amax.default", "aten.amin.default", "aten.any.default", "aten.any.dim", "aten.any.dims", "aten.all.default",
    "aten.all.dim", "aten.all.dims", "aten.prod.default", "aten.prod.dim_int", "aten.argmax.default", "aten.argmin.default", "aten.max.default",
    "aten.min.default", "aten.max.dim", "aten.min.dim", "aten.var.correction", "aten.var_mean.correction", "aten.std.correction",
    "aten.logsumexp.default", "aten.linalg_vector_norm.default", "aten.median.dim", "aten.median.default", "aten.nanmedian.dim",
    "aten.nanmedian.default", "aten.mode.default", "aten.kthvalue.default",
    "aten.nansum.default", "aten.count_nonzero.dim_IntList", "aten.std_mean.correction",
)  # fmt: skip
SCANS = overloads(
    "aten.cumprod.default", "aten.logcumsumexp.default", "aten.cummax.default", "aten.cummin.default",
    "aten.sort.default", "aten.sort.stable", "aten.topk.default", "aten._softmax.default", "aten._log_softmax.default",
    "aten._softmax_backward_data.default", "aten._log_softmax_backward_data.default", "prims.prepare_softmax_online.default",
)  # fmt: skip


NONE_IS_NONE = overloads("aten.any.dims", "aten.all.dims")
"""For every other reduction an empty list of dimensions means all of them."""


def removed(op: Op) -> list[int]:
    """The dimensions that a reduction removes."""
    dims = op.args.get("dim")
    if dims == [] and op.node.target in NONE_IS_NONE:
        return []
    if dims is None or dims == []:
        return list(range(len(op.shape("self"))))
    return [op.dim(d) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def reduce(op: Op) -> State | None:
    """The state after a reduction, None where the examples themselves are reduced."""
    state, dims = op.state("self"), removed(op)
    assert isinstance(state, Batched)
    if state.dim in dims:
        return None
    return state if op.args.get("keepdim") else state.at(state.dim - sum(d < state.dim for d in dims))


@rule(*SUMS, linear=["self"])
def sum_rule(op: Op) -> State:
    return reduce(op) or op.contracted()


@rule(*STATISTICS)
def statistic_rule(op: Op) -> State | tuple[State, ...]:
    return statistic(op, reduce(op))


def statistic(op: Op, kept: State | None) -> State | tuple[State, ...]:
    """The states of the results of a nonlinear reduction; ``kept`` is None where the examples themselves are reduced."""
    state = kept or op.contracted()
    if isinstance(state, Partial):
        state = op.mixed("a nonlinear statistic over the examples of a gradient")
    value = op.node.meta["val"]
    return (state,) * len(value) if isinstance(value, (tuple, list)) else state


@rule(*SCANS)
@rule(*overloads("aten.cumsum.default"), linear=["self"])
def scan_rule(op: Op) -> State | tuple[State, ...]:
    name = "self" if "self" in op.args else "grad_output" if "grad_output" in op.args else next(iter(op.args))
    states = [s for a in (name, "output") if a in op.args and isinstance(s := op.state(a), Batched)]
    state: State = states[0]
    if states[0].dim == op.dim(op["dim"], of=name):
        state = op.mixed("runs along the batch dimension")
    elif any(s.dim != states[0].dim or not same_fold(s, states[0]) for s in states):
        state = op.mixed("the examples lie along different dimensions of two arguments")
    value = op.node.meta["val"]
    return (state,) * len(value) if isinstance(value, (tuple, list)) else state


@rule(*overloads("aten.glu.default", "aten.glu_backward.default"))
def glu_rule(op: Op) -> State:
    """Halves dimension ``dim``, and its backward doubles it; the others broadcast."""
    states = [s for a in ("grad_output", "self") if a in op.args and isinstance(s := op.state(a), Batched)]
    if states[0].dim == op.dim(op["dim"]):
        return op.mixed("gates examples with other examples")
    if any(s.dim != states[0].dim or not same_fold(s, states[0]) for s in states):
        return op.mixed("the examples lie along different dimensions of two arguments")
    return states[0]
