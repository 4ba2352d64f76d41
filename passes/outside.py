"""Results of parameters alone that leave the graph: a pruned weight kept on its module, a cached one, a temperature.

How examples use such a result outside is not known. Mostly nothing does: its tangent is zero, and the norms are exact. A
tangent that is not zero turns the norms of the gradients that depend on it into ``REFUSED``, while the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from gnsfx.passes.attach_collectors import REFUSED
from gnsfx.passes.emit import Emitter
from gnsfx.passes.joint_graph import JointGraph
from gnsfx.passes.measure import Record, explain_mixed
from gnsfx.passes.propagate import States
from gnsfx.passes.rules.table import STATISTIC
from gnsfx.passes.state import Mixed, Shared

aten = torch.ops.aten
OUTSIDE = (
    "a result computed from parameters alone leaves the compiled graph, and how examples use it there is not known"
)


def find_outside(view: JointGraph, states: States) -> list[Node]:
    """The tangents of results that no example has a part in; a statistic of the batch, such as the loss, is none of them."""
    return [
        tangent
        for tangent, output in view.tangents.items()
        if isinstance(state := states.get(output), Shared) and state.doubt != STATISTIC  # type: ignore[arg-type]
    ]


def reached_from(tangents: Sequence[Node]) -> set[Node]:
    """The nodes that depend on any of them."""
    found, stack = set(tangents), list(tangents)
    while stack:
        fresh = [user for user in stack.pop().users if user not in found]
        found.update(fresh)
        stack += fresh
    return found


def guard(record: Record, gradient: Node, emit: Emitter, view: JointGraph, outside: Sequence[Node]) -> None:
    """Let the norms be ``REFUSED`` in a run where a tangent that the gradient depends on is not zero."""
    tangents = [t for t in outside if gradient in reached_from([t])]
    if record.sq_norm is None or not tangents:
        return
    record.condition = explain_mixed(Mixed(OUTSIDE, view.tangents[tangents[0]]))
    value = record.sq_norm.meta["val"]
    with emit.at(view.output):
        refused = emit(aten.full.default, [], REFUSED, dtype=value.dtype, device=value.device, pin_memory=False)
        for tangent in tangents:
            used = emit(aten.any.default, emit(aten.ne.Scalar, tangent, 0))
            record.sq_norm = emit(aten.where.self, used, refused, record.sq_norm)
