"""Which parameters are measured, how, and why the others are not.

    records of every graph that a parameter came in with      what the passes decided
    + refusals while training                                 a cross term that was lost, a gradient from elsewhere
    + what never came in                                      frozen, left out by gns.params, in no compiled graph
    = one row per parameter

Where a parameter is in several graphs (a batch of another size, a branch in Python) it is refused if any of them
refuses it, and measured if any of them measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from gnsfx import collector, diagnosis, leaves, unmeasured
from gnsfx.capture import EMPTY
from gnsfx.passes.record import Record

InRun = Mapping[leaves.Collector, Mapping[int, str]]
Status = Literal["measured", "estimated", "refused", "not compiled", "unused"]
STATUSES: tuple[Status, ...] = ("measured", "estimated", "refused", "not compiled", "unused")
FROZEN = "frozen: requires_grad is False"
NEVER_CALLED = (
    "no compiled graph uses it and it has no gradient: no forward pass reached it since it was added to the model, "
    "or its module is not called"
)
ELSEWHERE = 'it gets its gradient from eager code or from a graph compiled with another backend; compile the module that uses it with backend="gns"'


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter.

    Attributes:
        name: as in ``model.named_parameters()``.
        shape: of the parameter; numbers only, () for a scalar.
        status: ``"measured"`` (exact), ``"estimated"`` (unbiased), ``"refused"`` (cannot be exact), ``"not compiled"``
            (in no graph compiled with ``backend="gns"``) or ``"unused"`` (nothing to measure: frozen, not selected, no gradient).
        operation: the op that ends in its gradient, or the one at which it was refused.
        path: how it is measured, empty where it is not.
        reason: why it has this status, empty where there is nothing to say.
    """

    name: str
    shape: tuple[int, ...]
    status: Status
    operation: str = ""
    path: str = ""
    reason: str = ""


class Coverage(Sequence[Row]):
    """The rows in the order of ``model.named_parameters()``; ``print`` shows them as a table."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def counts(self) -> dict[str, int]:
        """How many parameters have each status that occurs."""
        return {s: n for s in STATUSES if (n := sum(row.status == s for row in self._rows))}

    def __str__(self) -> str:
        header = ("parameter", "shape", "status", "operation", "path", "reason")
        notes: dict[str, str] = {}
        cells = [
            (r.name, format_shape(r.shape), r.status, r.operation, r.path, footnote(r.reason, notes))
            for r in self._rows
        ]
        summary = ", ".join(f"{n} {status}" for status, n in self.counts().items()) or "no parameters"
        return "\n".join([align([header, *cells]), *(f"{mark} {reason}" for reason, mark in notes.items()), summary])

    def __repr__(self) -> str:
        return f"Coverage({', '.join(f'{n} {status}' for status, n in self.counts().items())})"


def coverage(model: nn.Module) -> Coverage:
    """One row per parameter of ``model``: what is measured, on which path, and why the others are not.

    ``model`` is the compiled module, the module inside it, or one compiled in place; the names are those that its own
    ``named_parameters()`` gives. Call it after a forward pass: compiling happens there. What the passes did is kept
    with the compiled graph, also where that comes from the compile caches.
    """
    seen = any(leaves.collectors_of(p) for p in model.parameters())
    everything = None if seen else diagnosis.diagnose(model)
    hint, in_run = diagnosis.skipped(model), diagnosis.refused_in_run(model)
    return Coverage(_row(name, parameter, everything, hint, in_run) for name, parameter in model.named_parameters())


def count_estimated(model: nn.Module) -> int:
    """How many parameters are estimated. Without ``gns.budget`` that is none, and no graph is asked."""
    if all(owner.graph.capture.plan.budget is None for owner in diagnosis.compiled(model)):
        return 0
    return coverage(model).counts().get("estimated", 0)


def _row(name: str, parameter: nn.Parameter, everything: str | None, hint: str, in_run: InRun) -> Row:
    shape = tuple(parameter.shape)
    if not parameter.requires_grad:
        return Row(name, shape, "unused", reason=FROZEN)
    found = [_of_graph(c, slot, in_run.get(c, {})) for c, slot in leaves.collectors_of(parameter)]
    if found:
        status, operation, _, reason = min(found, key=lambda row: _PRECEDENCE.index(row[0]))
        if status != "refused" and unmeasured.is_foreign(parameter):
            return Row(name, shape, "refused", operation, reason=unmeasured.FOREIGN)
        if status != "refused" and (left_out := unmeasured.left_out(parameter)) is not None:
            return Row(name, shape, "unused", operation, reason=left_out)
        if status != "refused" and (in_part := unmeasured.measured_in_part(parameter)) is not None:
            return Row(name, shape, "refused", operation, reason=in_part)
        paths = dict.fromkeys(row[2] for row in found if row[2]) if status != "refused" else {}
        return Row(name, shape, status, operation, " | ".join(paths), reason)
    if (left_out := unmeasured.left_out(parameter)) is not None:
        return Row(name, shape, "unused", reason=left_out)
    reason = everything or (NEVER_CALLED if parameter.grad is None else f"{ELSEWHERE}.{hint}" if hint else ELSEWHERE)
    return Row(name, shape, "not compiled", reason=reason)


_PRECEDENCE: tuple[Status, ...] = ("refused", "estimated", "measured", "unused", "not compiled")


def _of_graph(owner: leaves.Collector, slot: int, in_run: Mapping[int, str]) -> tuple[Status, str, str, str]:
    record: Record = owner.graph.report.records[slot]
    reason = owner.refused.get(slot) or in_run.get(slot)
    if reason is None and owner.graph.empty:
        return "unused", "", "", EMPTY
    if reason is None and record.status in ("measured", "estimated") and (coupled := owner.coupled()) is not None:
        reason = f"{collector.DOWNSTREAM}: {coupled}"
    if reason is not None:
        return "refused", record.operation, "", reason
    return record.status, record.operation, record.path, record.reason  # type: ignore[return-value]


def format_shape(shape: Sequence[Any]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def footnote(reason: str, notes: dict[str, str]) -> str:
    """The reason, or the mark under which ``notes`` (reason -> mark) keeps it where it is too long for a cell."""
    return reason if len(reason) <= 40 else notes.setdefault(reason, f"[{len(notes) + 1}]")


def align(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of cells as lines of a table under the first row; ``right`` columns are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)) if len(lines) > 1 else "", *lines[1:]]).rstrip()
