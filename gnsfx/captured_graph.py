"""What the backend knows of one captured graph: its plan, its collectors, its report, and where its results come from.

captured graph + leaves --trace--> joint graph --passes--> Report      refusals, the states of its results
results -> marks -> inputs of the graph behind                         read where that one was told their examples are
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from gnsfx import _torch, marks
from gnsfx.calls import Collectors
from gnsfx.capture import EMPTY, Capture
from gnsfx.config import Options
from gnsfx.inner import RewritePass, eager_compile
from gnsfx.passes.attach_collectors import REFUSED, add_leaves
from gnsfx.passes.kept_report import portable, unpack
from gnsfx.passes.pipeline import Report
from gnsfx.passes.state import Batched, Mixed, Shared, State
from gnsfx.unmeasured import leave_out

UNOWNED = (
    "it has a gradient from an empty batch, as of a penalty on the weights in the loss, which no example owns; "
    "skip backward for such a batch, or leave the penalty out of its loss"
)
MISREAD = (
    "input {} has its examples elsewhere than in the call that the graph was compiled for, and the same size; compile the "
    "module that contains both uses"
)


class CapturedGraph:
    """One captured graph with what the backend knows of it; not compiled."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], capture: Capture, options: Options) -> None:
        self.capture, self.options, self.empty = capture, options, capture.plan.refusal == EMPTY
        self._original = gm
        values = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
        self._fake_inputs = [v if v is not None else x for v, x in zip(values, inputs, strict=True)]
        self._report: Report | None = None
        self._refusals: dict[int, str] | None = None
        self._apart: bool | None = None
        # graph -> {(input, output): whether the examples are where they were}
        self._places: Any = weakref.WeakKeyDictionary()
        self._outputs = len(gm.graph.output_node().args[0])  # type: ignore[arg-type]
        self.collectors = Collectors(self, capture, inputs)
        self._leaves = [f"gns_leaf_{i}" for i in range(capture.plan.leaves)]
        self._seed = ["gns_seed"] if capture.plan.seed is not None else []

    def _keep(self, report: Report) -> None:
        self._report = portable(report)  # the report itself holds the joint graph

    def _find_report(self, node: Any) -> None:
        """On a compile-cache hit the passes did not run; the compiled graph has their report with it."""
        if self._report is None and (kept := _torch.kept_with(node)) is not None:
            self._report = unpack(kept)

    @property
    def report(self) -> Report:
        """What the passes did. Before the first call of a graph from a compile cache it is not known, and traced for."""
        if self._report is None:
            trace(self)
        assert self._report is not None
        return self._report

    def output_state(self, index: int) -> State | None:
        """State of a result with sizes as numbers, for the graph behind a graph break."""
        found = self.report.outputs[index] if index < len(self.report.outputs) else None
        return None if isinstance(found, tuple) else found

    def note_unselected(self, args: Sequence[Any]) -> None:
        """Called for each tuple of parameters that comes in."""
        chosen = self.options.params
        selection = repr(chosen) if isinstance(chosen, str) else getattr(chosen, "__qualname__", "a callable")
        for index in self.capture.unselected:
            leave_out(args[index], f"not selected by gns.params={selection}")

    def record_results(self, results: Sequence[Any], examples: int | None) -> None:
        for index, result in enumerate(results):
            if isinstance(result, Tensor) and result.dim():
                marks.record(result, self, index, examples)

    def misread(self, args: Sequence[Any]) -> str | None:
        """Why an input has its examples elsewhere than the input this graph was compiled for; its sizes do not tell."""
        for index in self.capture.unmarked:
            found, mark = marks.source(args[index]), marks.marked(args[index])
            if (found is not None or mark is not marks.UNMARKED) and not self._same_place(
                index, found, mark, args[index]
            ):
                return MISREAD.format(self.capture.unmarked[index])
        return None

    def _same_place(self, index: int, found: tuple[Any, int, int | None] | None, mark: Any, value: Tensor) -> bool:
        expected = self.capture.plan.states.get(index, Shared())
        if mark is not marks.UNMARKED or found is None:
            return (expected.dim if isinstance(expected, Batched) else None) == mark
        graph, output, examples = found
        checked = self._places.setdefault(graph, {})
        if (index, output) not in checked:
            checked[index, output] = _alike(expected, graph.output_state(output))
        fold = expected.outer * expected.inner if isinstance(expected, Batched) else 0
        return checked[index, output] and (not fold or examples is None or value.shape[expected.dim] == examples * fold)  # type: ignore[union-attr]

    @property
    def refusals(self) -> dict[int, str]:
        """Slot -> reason. No example owes anything to an empty batch: what it adds is zero, or found in the run."""
        if self._refusals is None and self.empty:
            self._refusals = {}
        if self._refusals is None:
            self._refusals = {i: r.reason for i, r in enumerate(self.report.records) if r.status == "refused"}
        return self._refusals

    def refusals_of(self, norms: Tensor | None) -> dict[int, str]:
        """Slot -> reason. After a compile-cache hit the flags in the norms are read once, instead of tracing."""
        if (
            self._refusals is None
            and self._report is None
            and norms is not None
            and not (norms[0, :-1] == REFUSED).any()
        ):
            self._refusals = {}
        return self.refusals

    def refused_in_run(self, norms: Tensor) -> dict[int, str]:
        """Slots that are measured otherwise and were refused in the runs since the last zero, with the reason. Costs one
        synchronisation where a run may refuse anything."""
        known = self._report is not None and not self.empty
        if known and not any(r.condition for r in self._report.records):  # pyright: ignore[reportOptionalMemberAccess]
            return {}
        slots = (norms[0, :-1] == REFUSED).nonzero().flatten().tolist()
        if self.empty:
            return dict.fromkeys(slots, UNOWNED)
        return {s: reason for s in slots if (reason := self.report.records[s].condition)}

    def coupled(self, norms: Tensor | None) -> str | None:
        """Why a gradient that this graph hands to an earlier one is not apart by example; None if all are."""
        if self.empty:
            return None
        if self._report is None and self._apart is None and norms is not None:
            self._apart = not bool(norms[0, -1] == REFUSED)  # after a compile-cache hit, once
        if self._report is None and self._apart is not False:
            return None
        return self.report.coupled


def _alike(expected: State, found: State | None) -> bool:
    if isinstance(expected, Batched) and isinstance(found, Batched):
        folds = zip((expected.outer, expected.inner), (found.outer, found.inner), strict=True)
        return expected.dim == found.dim and all((a == 1) == (b == 1) for a, b in folds)
    return isinstance(expected, Mixed) or (isinstance(expected, Shared) and isinstance(found, Shared))


def trace(graph: CapturedGraph, keep_text: bool = False) -> Report:
    """Trace and rewrite the captured graph once more, compiling nothing, and keep the report."""
    kept: list[Report] = []
    rewriting = RewritePass(graph.capture.plan, kept.append, keep_text)
    leaves = graph.collectors.fake_leaves(graph._fake_inputs)
    gm = add_leaves(graph._original, graph._leaves, graph._seed)
    with torch.enable_grad():
        eager_compile(gm, [*graph._fake_inputs, *leaves], rewriting)
    graph._keep(kept[0])
    return kept[0]
