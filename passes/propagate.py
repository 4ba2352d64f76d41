"""State propagation: where the example is in every node of a joint graph.

    joint graph, states of its inputs -> {node: state}

Two things go beyond asking the rule table node by node.

*Tangents.* A tangent carries the examples where the forward output does. In the backward, the gradient of a batched
value is batched the same way, even before it has met anything that depends on the example: the backward of
``loss = out.sum()`` is an ``expand`` of a scalar. Autograd's sequence numbers pair the backward nodes of an op with
its forward nodes, and the shapes say which argument the gradient belongs to. Where that is not unique the value is
*shared, with a doubt*, and a gradient that rests on the doubt is refused.

*Linearity.* The backward is linear in the tangents, so a value already summed over examples may still pass through
linear ops with shared arguments: f(sum_b P_b) = sum_b f(P_b).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from gnsfx._torch import known
from gnsfx.passes.joint_graph import JointGraph
from gnsfx.passes.rules import LINEAR, RULES, Op
from gnsfx.passes.rules.packed import across_rule
from gnsfx.passes.rules.picks import PICKS
from gnsfx.passes.rules.pointwise import CONSTANT, is_pointwise, pointwise_rule
from gnsfx.passes.rules.routing import routed_rule
from gnsfx.passes.rules.table import STATISTIC, arguments
from gnsfx.passes.state import (
    Batched,
    Mixed,
    Partial,
    Routed,
    Shared,
    Size,
    State,
    divides,
    product,
    same_place,
    same_sizes,
)

States = dict[Node, Any]
ACCUMULATION = "Gradient addition node"
PICKED_OUTSIDE = (
    "rows picked out of the batch by an index leave the compiled graph, and which example owns them there is not known"
)
UNKNOWN = "it is one of the results of something that is not an op"
UNPAIRED = "whether its examples are summed here could not be told from the graph"
COUPLED = "a gradient summed over the batch is combined with single examples again, so the examples interact (batch statistics?)"


def propagate(view: JointGraph, inputs: Mapping[int, State], examples: Size) -> States:
    """States of all nodes. ``inputs`` gives the states of the graph inputs; those left out are shared.

    Nodes with several results have a tuple of states; nodes that are not tensors have none.
    """
    states: States = {node: inputs.get(index, Shared()) for index, node in view.inputs.items()}
    forward = [n for n in view.graph.nodes if n not in view.backward]
    regions: dict[int, list[Node]] = defaultdict(list)
    for node in forward:
        _visit(node, states, examples, view, regions)
        if node.op == "call_function" and "seq_nr" in node.meta:
            regions[node.meta["seq_nr"]].append(node)
    for tangent, output in view.tangents.items():
        if output is None or output not in states:
            states[tangent] = Mixed("the tangent of an output that is not in the graph", tangent)
        elif isinstance(states[output], Shared):
            states[tangent] = Shared()  # of parameters alone: see outside.py
        elif isinstance(found := states[output], Routed) and not _named(found, output, states, inputs, examples):
            states[tangent] = Mixed(PICKED_OUTSIDE, output)
        else:
            states[tangent] = states[output]
    for node in view.graph.nodes:
        if node in view.backward and node not in view.tangents:
            _visit(node, states, examples, view, regions)
    return states


def _named(state: Routed, output: Node, states: States, inputs: Mapping[int, State], examples: Size) -> bool:
    """Whether the rows can only be those of the examples that they are named after. Row 3 of ``x[mask]``, or of 7 rows
    picked for 4 examples, is never example 3; row 3 of ``x[index]`` may be, where the rows of the index are examples."""
    index, count = state.ids.rows, product([output.meta["val"].shape[d] for d in state.dims])
    if any(s.ids.rows is index for s in inputs.values() if isinstance(s, Routed)):  # packed documents
        return not state.ids.takes
    if state.ids.column is not None:
        return True
    return not divides(examples, count) or (index.op == "placeholder" and isinstance(states[index], Shared))


def _visit(node: Node, states: States, examples: Size, view: JointGraph, regions: Mapping[int, list[Node]]) -> None:
    if node.op != "call_function" or node in states:
        if node.op == "get_attr":
            states[node] = Shared()
        return
    if node.target is operator.getitem:
        source = states.get(node.args[0])  # type: ignore[arg-type]
        if isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):  # a tuple in a tuple: higher-order ops
            index: Any = node.args[1]
            states[node] = source[index] if isinstance(source, tuple) else source or Mixed(UNKNOWN, node)
        return
    value = node.meta.get("val")
    if not isinstance(value, (torch.Tensor, tuple, list)):
        return  # a size
    state = _state(node, states, examples, node in view.backward, regions)
    if isinstance(value, (tuple, list)) and not isinstance(state, tuple):
        state = (state,) * len(value)
    states[node] = state


def _state(node: Node, states: States, examples: Size, tangent: bool, regions: Mapping[int, list[Node]]) -> Any:
    incoming = [(n, states[n]) for n in node.all_input_nodes if n in states]
    flat = [s for _, state in incoming for s in (state if isinstance(state, tuple) else (state,))]
    for state in flat:
        if isinstance(state, Mixed):
            return state
    if any(isinstance(s, Partial) for s in flat):
        return _overwritten(node, states) or _linear(node, states)
    if all(isinstance(s, Shared) for s in flat):
        doubts = [s.doubt for s in flat if s.doubt]
        doubt = STATISTIC if STATISTIC in doubts else next(iter(doubts), None) or _random(node)
        return _cotangent(node, Shared(doubt), states, regions) if tangent else Shared(doubt)
    if any(isinstance(s, Routed) for s in flat):
        wide = any(isinstance(s, Routed) and s.across for s in flat)
        rule, pick = (across_rule if wide else routed_rule)(node.target), None
    else:
        rule = RULES.get(node.target) or (pointwise_rule if is_pointwise(node.target) else None)
        pick = PICKS.get(node.target)
    try:
        op = Op(node, states, examples, tangent)
        picked = pick(op) if pick else None
        return picked or (rule(op) if rule else Mixed(f"no rule for {node.target}", node))
    except Exception as error:  # a defect in a rule must not stop anybody's training
        return Mixed(f"the rule for {node.target} failed with {type(error).__name__}: {error}", node)


def _random(node: Node) -> str | None:
    """Rows of a random tensor may be examples that the graph makes itself."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return f"it depends on {node.target} but on no batched input" if seeded else None


def _overwritten(node: Node, states: States) -> State | None:
    """Of a gradient already summed over examples some ops take the shape only: the buffer that a copy of it goes into."""
    if node.target in CONSTANT:
        return Shared()
    source = states.get(node.args[1], Shared()) if node.target is torch.ops.aten.copy.default else None  # type: ignore[arg-type]
    return source if isinstance(source, Shared) else None


def _linear(node: Node, states: States) -> State:
    """The state of an op with an argument that is already summed over examples."""
    if node.target not in LINEAR or (node.target is torch.ops.aten.view.dtype and not _keeps_numbers(node)):
        return Mixed(f"no rule for {node.target} of a gradient that is already summed over the batch", node)
    bound = {k: v if isinstance(v, (list, tuple)) else [v] for k, v in arguments(node).items()}
    found = {k: [states[a] for a in values if isinstance(a, Node) and a in states] for k, values in bound.items()}
    if any(isinstance(s, (Batched, Routed)) for values in found.values() for s in values):
        return Mixed(COUPLED, node)
    partial = {k for k, values in found.items() if any(isinstance(s, Partial) for s in values)}
    group = next((g for g in LINEAR[node.target] if partial <= g), None)
    if group is None or bound.get("value", [0]) not in ([0], [None]):
        return Mixed(f"{node.target} is not linear in a gradient that is already summed over the batch", node)
    for state in (s for k in group for s in found.get(k, ())):
        if isinstance(state, Shared) and state.doubt:
            return Mixed(state.doubt, node)
    return Partial()


def _keeps_numbers(node: Node) -> bool:
    """Whether a view as another dtype shows complex numbers as pairs of real ones, or the reverse."""
    before, after = tensors_of(node)[0].meta["val"].dtype, node.meta["val"].dtype
    return before.is_complex != after.is_complex and before.to_real() == after.to_real()


def _cotangent(node: Node, state: Shared, states: States, regions: Mapping[int, list[Node]]) -> State:
    """The state of a backward value that has met no batched value yet: that of the forward value it is the gradient of."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return state
    if str(node.meta.get("stack_trace", "")).strip().startswith(ACCUMULATION):
        return state  # every term is shared, so the forward value is
    number = node.meta.get("seq_nr")
    leaves = any(user.op == "output" or user.meta.get("seq_nr") != number for user in node.users)
    region = regions.get(number, []) if number is not None else []
    arguments_ = [(a, states[a]) for n in region for a in tensors_of(n) if a in states]
    if not arguments_ and _grows(node):
        return Shared(UNPAIRED)  # its forward is not in the graph, and a new dimension may be the batch
    if not leaves or not any(isinstance(s, (Batched, Routed, Mixed)) for _, s in arguments_):
        return state
    same = [s for a, s in arguments_ if _same_shape(a.meta["val"], value)]
    kinds = [s for s in same if isinstance(s, (Batched, Routed, Mixed))]
    if same and len(kinds) == len(same):
        first = kinds[0]
        if isinstance(first, Mixed) or all(same_place(s, first) for s in kinds):
            return first
    if same and not kinds:
        return state
    return Shared(UNPAIRED)


def _grows(node: Node) -> bool:
    """Whether the result has more elements than every argument, as of a broadcast."""
    size = node.meta["val"].numel()
    return not any(known(a.meta["val"].numel() == size) for a in tensors_of(node))


def tensors_of(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return same_sizes(a.shape, b.shape)
