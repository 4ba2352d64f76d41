"""A read-only view of an AOTAutograd joint graph: which node is which input, tangent and gradient, by descriptor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from gnsfx._torch import GradAOTOutput, PlainAOTInput, PlainAOTOutput, TangentAOTInput
from gnsfx.errors import GraphError


@dataclass(slots=True)
class JointGraph:
    """``inputs`` and ``grads`` are keyed by the position of the input in the captured graph.

    Attributes:
        tangents: tangent placeholder -> the forward output that it is the tangent of (None where it is not in the graph).
        results: position in the captured graph's results -> node; mutated buffers come before them among the outputs.
        backward: the nodes that depend on a tangent.
    """

    graph: Graph
    inputs: dict[int, Node] = field(default_factory=dict)
    grads: dict[int, Node] = field(default_factory=dict)
    tangents: dict[Node, Node | None] = field(default_factory=dict)
    results: dict[int, Node] = field(default_factory=dict)
    backward: set[Node] = field(default_factory=set)

    @property
    def output(self) -> Node:
        return self.graph.output_node()


def read_joint_graph(graph: Graph) -> JointGraph:
    """Raises GraphError where the graph carries no descriptors, for then nothing in it can be told apart."""
    view = JointGraph(graph)
    output = graph.output_node()
    flat = list(output.args[0])  # type: ignore[arg-type]
    descriptors = output.meta.get("desc")
    if descriptors is None or len(descriptors) != len(flat):
        raise GraphError("the joint graph has no output descriptors; expected AOTAutograd of torch >= 2.11.")
    by_descriptor = {
        d: node for d, node in zip(descriptors, flat, strict=True) if d is not None and isinstance(node, Node)
    }
    for node in graph.nodes:
        if node.op != "placeholder":
            if any(a in view.backward for a in node.all_input_nodes):
                view.backward.add(node)
            continue
        descriptor = node.meta.get("desc")
        if isinstance(descriptor, PlainAOTInput):
            view.inputs[descriptor.idx] = node
        elif isinstance(descriptor, TangentAOTInput):
            view.tangents[node] = by_descriptor.get(descriptor.output)
            view.backward.add(node)
    view.results = {d.idx: node for d, node in by_descriptor.items() if isinstance(d, PlainAOTOutput)}
    for descriptor, node in by_descriptor.items():
        if isinstance(descriptor, GradAOTOutput) and isinstance(descriptor.grad_of, PlainAOTInput):
            view.grads[descriptor.grad_of.idx] = node
    return view


def source_line(node: Node | None) -> str | None:
    """The user's line of code that a node comes from: ``file:line in function: code``."""
    trace = (node.meta.get("stack_trace") or "") if node is not None else ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith("File ")]
    own = [i for i in frames if f"{torch.__name__}/nn/" not in lines[i].replace("\\", "/")] or frames
    if not own:
        return None
    at = own[-1]
    code = next((line for line in lines[at + 1 : at + 2] if not line.startswith("File ")), "")
    return f"{lines[at].removeprefix('File ')}: {code}".rstrip(": ")


def fake(value: Any) -> Any:
    """A node's metadata value, other arguments as they are."""
    return value.meta["val"] if isinstance(value, Node) else value
