"""What was decided for one parameter: measured on a path, or refused while compiling, or refused in the steps that break a
condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from gnsfx.kernels import cost
from gnsfx.passes.attach_collectors import REFUSED
from gnsfx.passes.budget import Work
from gnsfx.passes.emit import Emitter
from gnsfx.passes.joint_graph import source_line
from gnsfx.passes.state import Mixed

if TYPE_CHECKING:
    from gnsfx.passes.select_path import Choice

aten = torch.ops.aten


@dataclass(slots=True)
class Record:
    """What was decided for one parameter. ``costs`` holds every candidate path, in arithmetic of ``dtype``, ``extra`` the seconds that the path
    taken is expected to add to the gradient (0 where nothing is known); ``condition`` says why a run may refuse it;
    ``entries`` is the sum of squares over the examples of every single number, where it was asked for and is known; ``work``
    what estimating it would take, where that is possible; ``variance`` (B,) of an estimate."""

    slot: int
    shape: tuple[Any, ...]
    status: str = "measured"
    operation: str = ""
    path: str = ""
    reason: str = ""
    costs: Mapping[str, cost.Cost] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    extra: float = 0.0
    sq_norm: Node | None = None
    entries: Node | None = None
    condition: str = ""
    work: Work | None = None
    variance: Node | None = None

    def take(self, choice: Choice) -> None:
        """The path that was chosen, with its costs."""
        self.path, self.costs, self.extra = choice.path, choice.costs, choice.extra
        self.reason, self.dtype = choice.note, choice.dtype


def explain_mixed(mixed: Mixed) -> str:
    """The reason with the op and the user's source line."""
    node, line = mixed.node, source_line(mixed.node)
    where = f" (at {node.target}" + (f", {line}" if line else "") + ")" if node is not None else ""
    return mixed.reason + where


def refuse(record: Record, mixed: Mixed) -> Record:
    record.status, record.path = "refused", ""
    record.operation = str(mixed.node.target) if mixed.node is not None else ""
    record.reason = explain_mixed(mixed)
    return record


def refuse_where(record: Record, broken: Sequence[Node], reason: str, emit: Emitter) -> None:
    """Let what was measured be ``REFUSED`` in a run where any of the 0-d booleans ``broken`` is true."""
    assert record.sq_norm is not None
    record.condition = reason
    record.sq_norm = _refused_where(record.sq_norm, broken, emit)
    if record.entries is not None:
        record.entries = _refused_where(record.entries, broken, emit)


def _refused_where(node: Node, broken: Sequence[Node], emit: Emitter) -> Node:
    value = node.meta["val"]
    refused = emit(aten.full.default, [], REFUSED, dtype=value.dtype, device=value.device, pin_memory=False)
    for condition in broken:
        node = emit(aten.where.self, condition, refused, node)
    return node
