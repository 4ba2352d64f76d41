"""Results of parameters alone that leave the graph: a pruned weight kept on its module, a cached one, a temperature.

How examples use such a result outside is not known. Mostly nothing does: its tangent is zero, and the norms are exact. A
tangent that is not zero turns the norms of the gradients that depend on it into ``REFUSED``, while the graph runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from gnsfx.passes.emit import Emitter
from gnsfx.passes.joint_graph import JointGraph
from gnsfx.passes.propagate import States
from gnsfx.passes.record import Record, explain_mixed, refuse_where
from gnsfx.passes.rules.table import STATISTIC
from gnsfx.passes.state import Mixed, Shared

aten = torch.ops.aten
OUTSIDE = (
    "a result computed from parameters alone leaves the compiled graph, and how examples use it there is not known"
)


def find_outside(view: JointGraph, states: States) -> dict[Node, set[Node]]:
    """The tangents of results that no example has a part in, and the nodes that depend on each; a statistic of the batch,
    such as the loss, is none of them."""
    return {
        tangent: _reached_from(tangent)
        for tangent, output in view.tangents.items()
        if isinstance(state := states.get(output), Shared) and state.doubt != STATISTIC  # type: ignore[arg-type]
    }


def _reached_from(tangent: Node) -> set[Node]:
    found, stack = {tangent}, [tangent]
    while stack:
        fresh = [user for user in stack.pop().users if user not in found]
        found.update(fresh)
        stack += fresh
    return found


def guard(record: Record, gradient: Node, emit: Emitter, view: JointGraph, outside: Mapping[Node, set[Node]]) -> None:
    """Let the norms be ``REFUSED`` in a run where a tangent that the gradient depends on is not zero."""
    tangents = [t for t, reached in outside.items() if gradient in reached]
    if record.sq_norm is None or not tangents:
        return
    reason = explain_mixed(Mixed(OUTSIDE, view.tangents[tangents[0]]))
    with emit.at(view.output):
        used = [emit(aten.any.default, emit(aten.ne.Scalar, t, 0)) for t in tangents]
        refuse_where(record, used, reason, emit)
