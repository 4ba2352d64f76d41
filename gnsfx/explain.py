"""What was done to a model's graphs: the table of parameters with the cost of every path, and the graphs before and after.

    explain(model, *args)   captures the forward pass afresh, on these inputs      --trace, rewrite-->  Explanation
    explain(model)          takes the graphs that training has already compiled    --trace, rewrite-->  Explanation

No code is generated. Training does not notice: buffers, parameters, random numbers, collectors and compiled graphs are
afterwards what they were.
"""

from __future__ import annotations

import difflib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from gnsfx import _torch, backend, collector
from gnsfx.capture import read_capture, trains
from gnsfx.config import Options, split_options
from gnsfx.coverage import FROZEN, Row, align, coverage, footnote, format_shape
from gnsfx.errors import GnsError
from gnsfx.kernels.cost import MACHINES, Cost, seconds
from gnsfx.page import HEADER, LEGEND, NUMBERS, page
from gnsfx.passes.pipeline import Report
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

    def relative(self, path: str) -> float | None:
        """Modelled time of a path as a multiple of the plain gradient's."""
        plain = self.record.costs.get("plain")
        return None if plain is None else self._seconds(self.record.costs[path]) / self._seconds(plain)

    def _seconds(self, cost: Cost) -> float:
        return seconds(cost, MACHINES.get(self.device, MACHINES["cuda"]), self.dtype)

    def lines(self, notes: dict[str, str]) -> Iterator[tuple[str, ...]]:
        """Cells under ``HEADER``: the parameter with the path taken, then every candidate."""
        record = self.record
        start = (self.name, format_shape(record.shape), str(len(record.shape)), record.operation)
        why = self._why()
        if not record.costs:
            yield (*start, _mark(record.path or record.status, record.path), "", "", "", "", footnote(why, notes))
            return
        for path, cost in record.costs.items():
            relative = self.relative(path)
            time = _count(self._seconds(cost), ("s", "ms", "us"), 1e-3) if relative is None else f"{relative:.2f}x"
            flops, traffic = cost.flops + cost.accumulate_flops, cost.bytes + cost.cache_bytes
            numbers = (_count(flops, ("", "k", "M", "G", "T")), _size(traffic), _size(cost.memory), time)
            label = _mark(record.path if path == self.taken else path, path == self.taken)
            yield (*start, label, *numbers, footnote(why, notes) if path == self.taken else "")
            start = ("", "", "", "")

    def _why(self) -> str:
        record = self.record
        if record.status != "measured":
            return f"{record.status}: {record.reason}"
        others = [p for p in record.costs if p not in ("plain", self.taken)]
        quicker = (
            [p for p in others if self._seconds(record.costs[p]) < self._seconds(record.costs[self.taken])]
            if self.taken
            else []
        )
        if not others:
            chosen = "the only path"
        elif self.taken == self.forced:
            chosen = f"gns.path={self.forced!r}"
        elif quicker:
            chosen = f"least time under the memory cap; {' and '.join(quicker)} would need more"
        else:
            chosen = "least time"
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
            lines.append((row.name, format_shape(row.shape), str(len(row.shape)), "", row.status, "", "", "", "", why))
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


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Show how ``model`` is measured: the path taken for each parameter, what the others would cost, the graphs rewritten.

    With inputs, ``model(*args, **kwargs)`` runs once, forward only, and is captured afresh with the options of the
    compiled model (the defaults if it is not compiled); that needs memory for a copy of its parameters and buffers.
    Without inputs, the graphs that it has already compiled are traced again.

    Args:
        model: a compiled module, one compiled in place, or an ordinary one.
        args, kwargs: inputs of its forward pass.

    Raises:
        GnsError: no inputs, and no graph was compiled yet.
    """
    if args or kwargs:
        graphs, names = _captured(model, args, kwargs), {id(p): n for n, p in model.named_parameters()}
        explained = tuple(_explain_graph(g, [names.get(id(p), "?") for p in g.parameters]) for g in graphs)
        return Explanation(explained, tuple(_others(model, {id(p) for g in graphs for p in g.parameters})))
    return _explain_compiled(model)


# ---------------------------------------------------------------------------------------------- graphs already compiled


def _explain_compiled(model: nn.Module) -> Explanation:
    names = {p: n for n, p in model.named_parameters()}
    found: dict[Any, list[str]] = {}
    for owner in collector.compiled(model):
        live = [r() for r in owner.parameters]
        found.setdefault(owner.graph, [names.get(p, "?") if p is not None else "?" for p in live])
    if not found:
        raise GnsError(
            f"nothing to explain: {collector.diagnose(model)} Or pass the inputs of a forward pass: gnsfx.explain(model, *args)."
        )
    graphs = tuple(_explain_graph(graph, named) for graph, named in found.items())
    shown = {e.name for g in graphs for e in g.parameters}
    return Explanation(graphs, tuple(row for row in coverage(model) if row.name not in shown))


def _explain_graph(graph: backend.CapturedGraph, names: Sequence[str]) -> GraphExplanation:
    report: Report = backend.trace(graph, keep_text=True)
    parameters = []
    for name, record, position in zip(names, report.records, graph.capture.plan.slots, strict=True):
        value = graph._fake_inputs[position]
        parameters.append(Explained(name, record, value.dtype, value.device.type, graph.capture.plan.forced))
    return GraphExplanation(tuple(parameters), report.before, report.after, _plan_in_words(graph))


def _plan_in_words(graph: backend.CapturedGraph) -> str:
    plan = graph.capture.plan
    if plan.documents is not None:
        return f"packed documents, told apart by {_name_of_input(graph, plan.documents.ids)}"
    if plan.batch is None:
        return "no batch dimension"
    index, dim, *fold = plan.batch
    size = _torch.size_hint(graph._fake_inputs[index].shape[dim]) // (fold[0] if fold else 1)
    return f"{size} examples along dimension {dim} of {_name_of_input(graph, index)}"


def _name_of_input(graph: backend.CapturedGraph, index: int) -> str:
    name = getattr(_torch.sources_of(graph._original)[index], "name", f"input {index}")
    return str(name() if callable(name) else name)


# ------------------------------------------------------------------------------------------------------ a fresh capture


class TracedGraph(backend.CapturedGraph):
    """Runs the captured graph as it is, so that the graphs behind a graph break get their inputs."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], options: Options) -> None:
        capture = read_capture(gm, inputs, options)
        super().__init__(gm, inputs, capture, options)
        self.parameters = [inputs[i] for i in capture.plan.slots]

    def __call__(self, *args: Any) -> Any:
        results = self._original(*args)
        self.record_results(results, None)
        return results


def _captured(model: nn.Module, args: Any, kwargs: Any) -> list[TracedGraph]:
    options = options_of(model)
    graphs: list[TracedGraph] = []

    def capture(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        if not trains(inputs) or not read_capture(gm, inputs, options).plan.slots:
            return gm.forward
        graphs.append(TracedGraph(gm, inputs, options))
        return graphs[-1]

    run = model if is_compiled(model) else torch.compile(model)
    with unchanged(model), _torch.private_graphs(capture), torch.enable_grad():
        run(*args, **kwargs)
    return graphs


def _others(model: nn.Module, seen: set[int]) -> Iterator[Row]:
    for name, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        shape = tuple(parameter.shape)
        if not parameter.requires_grad:
            yield Row(name, shape, "unused", reason=FROZEN)
        else:
            yield Row(name, shape, "not compiled", reason="not selected by gns.params, or no captured graph uses it")


def is_compiled(model: nn.Module) -> bool:
    """Whether calling the model, or a module in it, goes through ``torch.compile``."""
    return any(
        isinstance(m, _torch.OptimizedModule) or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


def options_of(model: nn.Module) -> Options:
    """The ``gns.*`` options the model was compiled with, the defaults where that cannot be told."""
    for owner in collector.compiled(model):
        return owner.graph.options
    for module in model.modules():
        if (given := _torch.options_of(module)) is not None:
            return split_options(given)[0]
    return Options()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass does to parameters, buffers, attributes of modules and random numbers.

    What did not change is not written to: a backward pass that is still to come may have saved it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    values = [(t, t.detach().clone()) for t in tensors]
    modules = [
        (m, dict(vars(m)), {k: dict(vars(m)[k]) for k in ("_parameters", "_buffers", "_modules")})
        for m in model.modules()
    ]
    devices = sorted({t.device.index for t in tensors if t.is_cuda})
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        for module, attributes, registered in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for key, entries in registered.items():
                vars(module)[key].clear()
                vars(module)[key].update(entries)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # batch_norm writes without counting a version
                    tensor.copy_(value)


# ---------------------------------------------------------------------------------------------------------------- text


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
