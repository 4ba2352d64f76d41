"""The ordered list of what happens to a joint graph.

read_joint_graph    which node is which input, tangent, gradient
propagate           where the example is in every node
measure             for each parameter: s_b on the cheapest path, or a refusal with a reason
attach_collectors   the norms become the gradient of the collector leaf
check_graph         outputs and gradients keep their meaning
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, Node

import gnsfx.kernels.ops  # noqa: F401  (defines torch.ops.gnsfx)
from gnsfx._torch import size_hint
from gnsfx.kernels.ops import start_builds
from gnsfx.passes.add_gradients import add_gradients
from gnsfx.passes.add_residuals import add_residuals
from gnsfx.passes.attach_collectors import attach_collectors
from gnsfx.passes.budget import Item, spend
from gnsfx.passes.check_graph import check_graph, signature
from gnsfx.passes.documents import Documents, keep_apart
from gnsfx.passes.emit import Emitter
from gnsfx.passes.estimate import Estimator
from gnsfx.passes.find_rms_norms import find_rms_norms
from gnsfx.passes.joint_graph import JointGraph, read_joint_graph
from gnsfx.passes.measure import Measurer
from gnsfx.passes.measure_norms import NormLayer
from gnsfx.passes.norm_layers import decompose, norm_layers, settle
from gnsfx.passes.outside import OUTSIDE, find_outside, guard
from gnsfx.passes.plain_step import memory_cap, plain_seconds
from gnsfx.passes.propagate import States
from gnsfx.passes.record import Record, explain_mixed, refuse
from gnsfx.passes.select_path import Planner
from gnsfx.passes.share_grams import share_grams
from gnsfx.passes.state import Batched, Mixed, Shared, Size, State, describe, quotient, same_place


@dataclass(frozen=True, slots=True)
class Plan:
    """What the backend decided from the captured graph alone, so that it holds even where this pass does not run.

    Attributes:
        slots: positions, among the graph inputs, of the parameters to measure.
        states: states of the graph inputs that are not shared.
        batch: (input, dim, fold) such that the size there is fold * B: where B is read off.
        parameters: positions of all trainable parameters, measured or not.
        refusal: a reason to refuse every parameter, found before tracing.
        memory: cap in bytes, None for a share of what the step holds; forced: a path, or "auto".
        elementwise: (slot, how many numbers) of the parameters whose squares are also kept number by number.
        budget: share of the step's time that measuring may take; None: all of it is exact.
        per_example: whether the norms of single examples are kept.
        inputs: how many inputs the captured graph has; the leaves come behind them.
    """

    slots: tuple[int, ...]
    states: dict[int, State]
    batch: tuple[int, int, int] | None
    refusal: str | None
    parameters: tuple[int, ...]
    memory: int | None
    forced: str
    documents: Documents | None = None
    elementwise: tuple[tuple[int, int], ...] = ()
    budget: float | None = None
    per_example: bool = False
    inputs: int = 0

    @property
    def leaves(self) -> int:
        """How many tensors the norms arrive in: sums, those of single examples, those of single numbers."""
        return 1 + (self.per_example and bool(self.slots)) + bool(self.elementwise)

    @property
    def seed(self) -> int | None:
        """With a budget, the position of the input that random numbers are made of."""
        return None if self.budget is None else self.inputs + self.leaves

    def count(self, shape: Callable[[int], Sequence[Size]]) -> Size | None:
        """The number of examples, or of places for documents, given the shapes of the inputs; None where it is not known."""
        if self.documents is not None:
            return self.documents.places(shape(self.documents.ids))
        if self.batch is None:
            return None
        index, dim, fold = self.batch
        return quotient(shape(index)[dim], fold)


@dataclass(slots=True)
class Report:
    """What the passes did to one graph; ``before`` and ``after`` only where they were asked for."""

    records: list[Record] = field(default_factory=list)
    outputs: list[State | tuple | None] = field(default_factory=list)
    coupled: str | None = None
    before: str = ""
    after: str = ""


def rewrite(graph: Graph, plan: Plan, keep_text: bool = False) -> Report:
    """Rewrite a joint graph in place so that the collector's gradient is the norms of the parameters in ``plan.slots``."""
    report = Report()
    contract = signature(graph)
    view = read_joint_graph(graph)
    source = plan.documents.ids if plan.documents else plan.batch[0] if plan.batch else None
    found = plan.count(lambda i: view.inputs[i].meta["val"].shape) if source in view.inputs else None
    examples: Size = 1 if found is None else found
    inputs = plan.states
    if plan.documents is not None and found is not None:
        inputs = {**inputs, **plan.documents.states(view, examples)}
    refusal = plan.refusal
    if refusal is None and found is None:
        refusal = "the input that carries the batch dimension is not an input of the joint graph"
    kept = dict(plan.elementwise)
    apart = refusal is not None or plan.documents is not None
    view, states = settle(view, inputs, examples, plan.slots, kept, apart)
    if keep_text:
        report.before = print_graph(graph, states)
    results = [view.results.get(i) for i in range(max(view.results, default=-1) + 1)]
    report.outputs = [states.get(n) if n is not None else None for n in results]
    outside = find_outside(view, states)
    report.coupled = find_coupling(view, states, plan, refusal, outside)
    emit = Emitter(graph, examples)
    planner = Planner(examples, memory_cap(view, plan.memory), plan.forced)
    if refusal is None:
        planner = replace(planner, grams=share_grams(view, states, plan.slots, planner))
    spelled = {} if refusal is not None else find_rms_norms(view, states, emit, plan.slots, frozenset(kept))
    estimator, excess = Estimator(emit), ""
    if plan.budget is not None and refusal is None:
        estimator, excess = choose_estimates(view, states, emit, planner, plan, spelled)
    measurer = Measurer(view, states, emit, planner, estimator, spelled)
    for index in plan.slots:
        gradient, parameter = view.grads.get(index), view.inputs.get(index)
        record = Record(index, tuple(parameter.meta["val"].shape) if parameter is not None else ())
        report.records.append(record)
        if refusal is not None:
            refuse(record, Mixed(refusal))
        elif gradient is None:
            record.status, record.reason = "unused", "it gets no gradient in this graph"
        else:
            measurer.measure(record, gradient)
            if index in kept:
                record.entries = measurer.entries(record, gradient)
            guard(record, gradient, emit, view, outside)
    measurer.apply()
    if excess and not estimator.chosen:
        costliest = max(report.records, key=lambda record: record.extra)
        costliest.reason = "; ".join(filter(None, (costliest.reason, excess)))
    count = None
    if plan.documents is not None and found is not None:
        keep_apart(report.records, view, states, emit, plan.documents)
        count = plan.documents.count(view, emit)
    norms = [(r.sq_norm, r.status) for r in report.records]
    entries = [(r.entries, r.status, kept[r.slot]) for r in report.records if r.slot in kept]
    variances = None if plan.budget is None else [r.variance for r in report.records]
    attach_collectors(graph, emit, norms, entries, count, report.coupled is not None, variances)
    graph.eliminate_dead_code()
    add_residuals(graph, emit)
    add_gradients(graph, emit)
    decompose(graph, list(norm_layers(graph)), examples)
    check_graph(graph, contract)
    start_builds(graph)
    if keep_text:
        report.after = print_graph(graph, states)
    return report


def choose_estimates(
    view: JointGraph,
    states: States,
    emit: Emitter,
    planner: Planner,
    plan: Plan,
    spelled: Mapping[Node, NormLayer],
) -> tuple[Estimator, str]:
    """What is estimated within the budget, and why the budget is not kept, if it is not.

    Everything is measured exactly first, on paper: nothing uses the nodes that this writes, and they are dropped at the end.
    """
    assert plan.budget is not None and plan.seed is not None
    plain = plain_seconds(view.graph)
    seed = view.inputs.get(plan.seed)
    paper = Measurer(view, states, emit, planner, Estimator(emit, seed), spelled)
    records = [paper.measure(Record(i, ()), view.grads[i]) for i in plan.slots if i in view.grads]
    items = [
        Item(r.slot, size_hint(view.grads[r.slot].meta["val"].numel()), r.extra, r.work)
        for r in records
        if r.status != "refused"
    ]
    found = spend(items, plain, plan.budget, plan.per_example)
    return Estimator(emit, seed, found.estimates), found.excess


def find_coupling(
    view: JointGraph, states: States, plan: Plan, refusal: str | None, outside: Mapping[Node, set[Node]]
) -> str | None:
    """Why the gradient of an intermediate that came in is not apart by example as the intermediate itself is.

    The graph that made it takes its tangent to be apart: it must then refuse its parameters.
    """
    for index, gradient in view.grads.items():
        if index in plan.parameters or gradient.target is torch.ops.gnsfx.probe_backward.default:
            continue
        if refusal is not None:
            return refusal
        if any(gradient in reached for reached in outside.values()):
            return OUTSIDE
        before, after = states.get(view.inputs[index]), states.get(gradient)
        if isinstance(after, Mixed):
            return explain_mixed(after)
        if isinstance(before, Batched) and same_place(before, after):
            continue
        if isinstance(before, Shared) and isinstance(after, Shared) and not after.doubt:
            continue
        return "a later graph sums its gradient over the examples"
    return None


def print_graph(graph: Graph, states: dict) -> str:
    """The graph, a line a node: name, op, arguments, shape, state."""
    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        shape = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if hasattr(value, "dtype") else ""
        state = describe(states[node]) if node in states else ""
        if node.op == "placeholder":
            lines.append(f"{node.name}: {shape}  # {state}")
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
        else:
            args = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
            lines.append(f"{node.name} = {node.target}({args}): {shape}  # {state}")
    return "\n".join(lines)
