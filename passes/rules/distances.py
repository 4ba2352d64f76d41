"""Distances between the rows of two matrices.

cdist of (B*T, M) and a codebook (K, M)       batched(0) -> batched(0)
its backward for the codebook                 the pairs (K, B*T) have the examples behind -> partial
"""

from __future__ import annotations

from collections.abc import Sequence

from gnsfx._torch import known
from gnsfx.passes.rules.table import Op, overloads, rule
from gnsfx.passes.state import Batched, Shared, Size, State, same_fold


@rule(*overloads("aten._cdist_forward.default"))
def cdist_rule(op: Op) -> State:
    """(.., P, M) and (.., R, M) -> (.., P, R)"""
    return pairs(op, op.shape(), [])


@rule(*overloads("aten._cdist_backward.default"), linear=["grad"])
def cdist_backward_rule(op: Op) -> State:
    """Of x1 (.., P, M), from the gradient and the distances (.., P, R)."""
    shape = op.shape("cdist")
    state = pairs(op, shape, ["grad", "cdist"])
    return op.contracted() if isinstance(state, Batched) and state.dim == len(shape) - 1 else state


def pairs(op: Op, shape: Sequence[Size], of_pairs: Sequence[str]) -> State:
    """Where the examples are in a value with an entry per pair of rows; ``of_pairs`` are arguments with such entries."""
    found: Batched | None = None
    for name, behind in [("x1", 2), ("x2", 1), *((n, 0) for n in of_pairs)]:
        state, own = op.state(name), op.shape(name)
        if not isinstance(state, Batched):
            continue
        if behind and state.dim == len(own) - 1:
            return op.mixed("measures distances along the batch dimension")
        rows = bool(behind) and state.dim == len(own) - 2
        here = state.at(len(shape) - behind if rows else state.dim + len(shape) - len(own))
        if not known(own[state.dim] == shape[here.dim]):
            return op.mixed("the batch dimension of one argument is broadcast against another dimension")
        if found is not None and (found.dim != here.dim or not same_fold(found, here)):
            return op.mixed("distances between examples")
        found = here
    return found or Shared()
