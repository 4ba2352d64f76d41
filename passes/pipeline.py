"""The ordered list of what happens to a joint graph.

read_joint_graph    which node is which input, tangent, gradient
propagate           where the example is in every node
measure             for each parameter: s_b on the cheapest path, or a refusal with a reason
attach_collectors   the norms become the gradient of the collector leaf
check_graph         outputs and gradients keep their meaning
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Graph

import gnsfx.kernels.ops  # noqa: F401  (defines torch.ops.gnsfx)
from gnsfx.passes.attach_collectors import attach_collectors
from gnsfx.passes.check_graph import check_graph, signature
from gnsfx.passes.emit import Emitter
from gnsfx.passes.joint_graph import read_joint_graph
from gnsfx.passes.measure import Measurer, Record, refuse
from gnsfx.passes.propagate import propagate
from gnsfx.passes.select_path import Planner
from gnsfx.passes.state import Mixed, Size, State, describe, quotient


@dataclass(frozen=True, slots=True)
class Plan:
    """What the backend decided from the captured graph alone, so that it holds even where this pass does not run.

    Attributes:
        slots: positions, among the graph inputs, of the parameters to measure.
        states: states of the graph inputs that are not shared.
        batch: (input, dim, fold) such that the size there is fold * B: where B is read off.
        refusal: a reason to refuse every parameter, found before tracing.
        memory: cap in bytes; forced: a path, or "auto".
    """

    slots: tuple[int, ...]
    states: dict[int, State]
    batch: tuple[int, int, int] | None
    refusal: str | None
    memory: int
    forced: str


@dataclass(slots=True)
class Report:
    """What the passes did to one graph; ``before`` and ``after`` only where they were asked for."""

    records: list[Record] = field(default_factory=list)
    outputs: list[State | tuple | None] = field(default_factory=list)
    before: str = ""
    after: str = ""


def rewrite(graph: Graph, plan: Plan, keep_text: bool = False) -> Report:
    """Rewrite a joint graph in place so that the collector's gradient is the norms of the parameters in ``plan.slots``."""
    report = Report()
    contract = signature(graph)
    view = read_joint_graph(graph)
    examples: Size = 1
    if plan.batch is not None and plan.batch[0] in view.inputs:
        index, dim, fold = plan.batch
        examples = quotient(view.inputs[index].meta["val"].shape[dim], fold)
    states = propagate(view, plan.states, examples)
    if keep_text:
        report.before = print_graph(graph, states)
    results = [view.results.get(i) for i in range(max(view.results, default=-1) + 1)]
    report.outputs = [states.get(n) if n is not None else None for n in results]
    emit = Emitter(graph, examples)
    measurer = Measurer(view, states, emit, Planner(examples, plan.memory, plan.forced))
    for index in plan.slots:
        gradient, parameter = view.grads.get(index), view.inputs.get(index)
        record = Record(index, tuple(parameter.meta["val"].shape) if parameter is not None else ())
        report.records.append(record)
        if plan.refusal is not None:
            refuse(record, Mixed(plan.refusal))
        elif gradient is None:
            record.status, record.reason = "unused", "it gets no gradient in this graph"
        else:
            measurer.measure(record, gradient)
    measurer.apply()
    attach_collectors(graph, emit, [(r.sq_norm, r.status) for r in report.records], examples)
    graph.eliminate_dead_code()
    check_graph(graph, contract)
    if keep_text:
        report.after = print_graph(graph, states)
    return report


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
