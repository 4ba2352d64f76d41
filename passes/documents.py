"""Packed documents: several examples in one row, told apart by document ids that are an input of the model.

tokens (1, T) with ids (1, T)           -> routed(1) by the ids
q @ k.T, softmax, p @ v                 -> rows and columns belong to documents; what crosses between them must be zero

That documents do not see each other is the caller's word. It is checked in every step, where the graph shows attention:
a mask that leaves two documents open to each other, or a weight between them that is not zero, turns all norms into
``REFUSED``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from gnsfx._torch import known
from gnsfx.passes.emit import Emitter
from gnsfx.passes.joint_graph import JointGraph
from gnsfx.passes.propagate import States
from gnsfx.passes.record import Record, refuse_where
from gnsfx.passes.rules.nn import ATTENTION
from gnsfx.passes.rules.packed import STATISTICS_OF_ROWS
from gnsfx.passes.rules.table import arguments
from gnsfx.passes.segments import expression
from gnsfx.passes.state import BOUNDARIES, Ids, Partial, Routed, Size, State, product

aten, ops = torch.ops.aten, torch.ops.gnsfx
CROSSES = (
    "in this step documents see each other, or their ids are out of range: attention needs a mask that keeps them apart"
)


@dataclass(frozen=True, slots=True)
class Documents:
    """Positions of graph inputs: ``ids`` holds document ids, or boundaries; ``inputs`` have them along ``ndim`` leading dimensions."""

    ids: int
    boundaries: bool
    inputs: tuple[int, ...]
    ndim: int

    def places(self, shape: Sequence[Size]) -> Size:
        """How many documents there can be, for ids of this shape."""
        return shape[0] - 1 if self.boundaries else product(shape)

    def numbering(self, view: JointGraph, examples: Size) -> Ids:
        return Ids(view.inputs[self.ids], 1, examples, BOUNDARIES if self.boundaries else None, packed=True)

    def positions(self, view: JointGraph) -> dict[int, Sequence[Size]]:
        """The leading shape, one entry for each position, of the packed inputs."""
        found = {i: view.inputs[i].meta["val"].shape for i in self.inputs if i in view.inputs}
        return {i: shape[: self.ndim] for i, shape in found.items()}

    def states(self, view: JointGraph, examples: Size) -> dict[int, State]:
        ids, states = self.numbering(view, examples), {}
        for index, shape in self.positions(view).items():
            dims = [d for d, size in enumerate(shape) if not known(size == 1)] or [self.ndim - 1]
            states[index] = Routed(tuple(dims), ids)
        return states

    def count(self, view: JointGraph, emit: Emitter) -> Node | None:
        """The number of documents in the batch as a node, where it is not the number of places."""
        if self.boundaries:
            return None
        with emit.at(view.output):
            return emit(ops.count_ids.default, view.inputs[self.ids])


def keep_apart(
    records: Sequence[Record], view: JointGraph, states: States, emit: Emitter, documents: Documents
) -> None:
    """Let all norms be ``REFUSED`` in a run where documents see each other."""
    shape = next(iter(documents.positions(view).values()), None)
    measured = [r for r in records if r.sq_norm is not None]
    if shape is None or not measured:
        return
    ids, positions = documents.numbering(view, emit.examples), product(shape)
    with emit.at(view.output):
        wrong = emit(ops.misnumbered.default, ids.rows, emit.size(positions), ids.column)
        for value, rows, columns, mask in _promises(view, states):
            arguments_ = [value, list(rows), list(columns), mask, *expression(emit, ids)]
            wrong = emit(aten.logical_or.default, wrong, emit(ops.crosses.default, *arguments_))
        for record in measured:
            refuse_where(record, [wrong], CROSSES, emit)


def _promises(view: JointGraph, states: States) -> list[tuple[Node, Sequence[int], Sequence[int], bool]]:
    """(value, dimensions of rows, of columns, whether it is a mask) of all that must not cross between documents."""
    found: dict[Node, tuple[Node, Sequence[int], Sequence[int], bool]] = {}
    for node in view.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in ATTENTION and isinstance(q := states.get(arguments(node)["query"]), Routed):
            bound = arguments(node)
            mask: Any = bound.get("attn_mask", bound.get("attn_bias"))
            if mask is None:
                continue  # its result is mixed
            lead = mask.meta["val"].dim() - 4
            rows = [d + lead for d in q.dims]
            found[mask] = (mask, rows, [*rows[:-1], rows[-1] + 1], True)
            continue
        after = states.get(node)
        if (
            node.target in STATISTICS_OF_ROWS
            or not isinstance(after, (Routed, Partial))
            or getattr(after, "across", ())
        ):
            continue
        for value in node.all_input_nodes:
            if isinstance(state := states.get(value), Routed) and state.across:
                found[value] = (value, state.dims, state.across, False)
    return list(found.values())
