"""An explanation as a value: the table of paths with their costs, the difference the rewrite made, the ops it added.

Record           -> Explained           -> lines of the table: every candidate path, the one taken marked
graph as text    -> GraphExplanation    -> diff, op counts
all graphs       -> Explanation         -> table + summary, or a page (:mod:`gnsfx.page`)
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gnsfx.coverage import Row, align, footnote, format_shape
from gnsfx.errors import GnsError
from gnsfx.kernels.cost import Cost, bound, seconds
from gnsfx.kernels.machine import machine_for
from gnsfx.page import HEADER, LEGEND, NUMBERS, page
from gnsfx.passes.record import Record


@dataclass(frozen=True, slots=True)
class Explained:
    """One parameter in one graph. ``dtype`` and ``device`` (a device type) are the parameter's; ``forced`` is ``gns.path``."""

    name: str
    record: Record
    dtype: torch.dtype
    device: str
    forced: str = "auto"

    @property
    def taken(self) -> str:
        """The key of the path taken among ``record.costs``; empty where no cost was modelled."""
        last = self.record.path.rsplit(", ", 1)[-1]
        return last if last in self.record.costs else ""

    def relative(self, path: str) -> float:
        """Modelled time of a path as a multiple of the plain gradient's."""
        return self._seconds(self.record.costs[path]) / self._seconds(self.record.costs["plain"])

    def _seconds(self, cost: Cost) -> float:
        return seconds(cost, machine_for(self.device), self._arithmetic)

    @property
    def _arithmetic(self) -> torch.dtype:
        """Under autocast not that of the parameter."""
        return self.record.dtype or self.dtype

    def lines(self, notes: dict[str, str]) -> Iterator[tuple[str, ...]]:
        """Cells under ``HEADER``: the parameter with the path taken, then every candidate."""
        record = self.record
        start = (self.name, format_shape(record.shape), str(len(record.shape)), record.operation)
        why = self._why()
        if not record.costs:
            yield (*start, _mark(record.path or record.status, record.path), *[""] * 6, footnote(why, notes))
            return
        for path, cost in record.costs.items():
            times = (_count(self._seconds(cost), ("s", "ms", "us"), 1e-3), f"{self.relative(path):.2f}x")
            limit = bound(cost, machine_for(self.device), self._arithmetic)
            traffic = cost.bytes + cost.cache_bytes + cost.operands + cost.results
            numbers = (
                _count(cost.multiplied, ("", "k", "M", "G", "T")),
                _size(traffic),
                _size(cost.memory),
                *times,
                limit,
            )
            label = _mark(record.path if path == self.taken else path, path == self.taken)
            yield (*start, label, *numbers, footnote(why, notes) if path == self.taken else "")
            start = ("", "", "", "")

    def _why(self) -> str:
        record = self.record
        if record.status != "measured":
            return f"{record.status}: {record.reason}"
        times = {p: self._seconds(cost) for p, cost in record.costs.items() if p != "plain"}
        own = times.pop(self.taken, 0.0)
        quicker = [p for p, time in times.items() if time < own]
        if not times or not own:
            chosen = "the only path"
        elif self.taken == self.forced:
            chosen = f"gns.path={self.forced!r}"
        elif quicker:
            chosen = f"least time under the memory cap; {' and '.join(quicker)} would need more"
        else:
            second = min(times, key=lambda path: times[path])
            chosen = f"least time; {second} takes {times[second] / own:.2f}x"
        return f"{chosen}; {record.reason}" if record.reason else chosen


@dataclass(frozen=True, slots=True)
class GraphExplanation:
    """One captured graph.

    Attributes:
        parameters: those that it measures, or refuses to.
        before, after: the joint graph as text, a line for each node: name, op, arguments, dtype and shape, state.
        plan: in words, where the number of examples is read off.
    """

    parameters: tuple[Explained, ...]
    before: str
    after: str
    plan: str

    @property
    def diff(self) -> str:
        """Unified diff from ``before`` to ``after``."""
        return "\n".join(
            difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), "before", "after", lineterm="")
        )

    @property
    def op_counts(self) -> dict[str, int]:
        """Op -> how many more of it there are after the rewrite; negative where there are fewer. Equal counts are left out."""
        before, after = _ops(self.before), _ops(self.after)
        return {op: after[op] - before[op] for op in sorted(before | after) if after[op] != before[op]}


@dataclass(frozen=True)
class Explanation:
    """What was done to all graphs of a model.

    Attributes:
        graphs: one entry per captured graph that has parameters to measure.
        others: rows of the parameters in none of them, with the reason.
    """

    graphs: tuple[GraphExplanation, ...]
    others: tuple[Row, ...]

    @property
    def table(self) -> str:
        """Parameters with shape, operation and every candidate path: FLOPs, bytes, memory, time; the one taken marked by ``*``."""
        notes: dict[str, str] = {}
        lines: list[tuple[str, ...]] = [HEADER]
        for graph in self.graphs:
            for explained in graph.parameters:
                lines.extend(explained.lines(notes))
        for row in self.others:
            why = footnote(f"{row.status}: {row.reason}", notes)
            lines.append((row.name, format_shape(row.shape), str(len(row.shape)), "", row.status, *[""] * 6, why))
        return "\n".join([align(lines, NUMBERS), *(f"{mark} {reason}" for reason, mark in notes.items()), LEGEND])

    @property
    def before(self) -> str:
        """The joint graphs as AOTAutograd traced them."""
        return self._joined([g.before for g in self.graphs])

    @property
    def after(self) -> str:
        """The joint graphs as they go to the inner compiler."""
        return self._joined([g.after for g in self.graphs])

    @property
    def diff(self) -> str:
        """Unified diff from ``before`` to ``after``."""
        return self._joined([g.diff for g in self.graphs])

    def _joined(self, texts: list[str]) -> str:
        if len(texts) == 1:
            return texts[0]
        return "\n\n".join(f"# graph {i} of {len(texts)}\n{text}" for i, text in enumerate(texts, 1))

    @property
    def summary(self) -> str:
        """Which ops the rewrite added and removed, a line per graph."""
        lines = []
        for i, graph in enumerate(self.graphs, 1):
            change = ", ".join(f"{n:+d} {op}" for op, n in graph.op_counts.items()) or "none"
            lines.append(
                f"graph {i} of {len(self.graphs)} ({graph.plan}): {_nodes(graph.before)} -> {_nodes(graph.after)} ops; {change}"
            )
        return "\n".join(lines) or "no graph with parameters to measure"

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.summary}"

    def __repr__(self) -> str:
        return f"Explanation({len(self.graphs)} graphs, {sum(len(g.parameters) for g in self.graphs)} parameters)"

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page: table, summary, and for each graph the diff and the graph before and after.

        Returns:
            The path written to.

        Raises:
            GnsError: the file cannot be written.
        """
        target = Path(path)
        try:
            target.write_text(page(self), encoding="utf-8")
        except OSError as error:
            raise GnsError(
                f"cannot write the explanation to {str(target)!r}: {error.strerror or error}. Pass a path to a file in an existing, writable folder."
            ) from error
        return target


def _mark(label: str, taken: Any) -> str:
    return f"* {label}" if taken else f"  {label}"


def _count(value: float, units: Sequence[str], step: float = 1e3) -> str:
    """Three digits and a unit; ``units`` go up by ``step``, or down where it is below one."""
    unit = 0
    while unit < len(units) - 1 and (value >= step if step > 1 else 0 < value < 1):
        value, unit = value / step, unit + 1
    return f"{value:.3g} {units[unit]}".rstrip()


def _size(value: float) -> str:
    return _count(value, ("B", "KiB", "MiB", "GiB", "TiB"), 1024) if value else "0"


def _ops(text: str) -> Counter[str]:
    calls = (line.split(" = ", 1)[1] for line in text.splitlines() if " = " in line and not line.startswith("return "))
    return Counter(call.split("(", 1)[0].replace("<built-in function getitem>", "getitem") for call in calls)


def _nodes(text: str) -> int:
    return sum(_ops(text).values())
