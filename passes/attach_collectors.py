"""Getting the norms out: a leaf tensor whose gradient they become.

    captured graph   (..., leaf) -> (..., probe(leaf))             one more input, one more output, nothing else
    joint graph      grad of leaf = probe_backward(...)   ->       grad of leaf = the norms

Autograd's own accumulation then adds the norms of every backward into ``leaf.grad``: no hooks, no side effects, no
graph breaks, and the compile caches stay valid, because all of it is in the graph. The extra output is dropped before
the caller sees it; being an output of its own, it cannot disturb how the others alias each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from gnsfx.errors import GraphError
from gnsfx.passes.emit import Emitter

aten = torch.ops.aten
REFUSED = float("-inf")
"""In the slot of a refused parameter. A sum of squares is never negative, and nothing added to it brings it back."""

_library = torch.library.Library("gnsfx", "FRAGMENT")
_library.define("probe(Tensor leaf) -> Tensor")
_library.define("probe_backward(Tensor grad, Tensor leaf) -> Tensor")
_library.impl("probe", lambda leaf: leaf.new_zeros(()), "CompositeExplicitAutograd")
_library.impl("probe_backward", lambda grad, leaf: torch.full_like(leaf, REFUSED), "CompositeExplicitAutograd")
torch.library.register_fake("gnsfx::probe", lambda leaf: leaf.new_empty(()), lib=_library)
torch.library.register_fake("gnsfx::probe_backward", lambda grad, leaf: torch.empty_like(leaf), lib=_library)
torch.library.register_autograd(
    "gnsfx::probe",
    lambda ctx, grad: torch.ops.gnsfx.probe_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    lib=_library,
)


def add_leaves(gm: GraphModule, names: Sequence[str], inputs: Sequence[str] = ()) -> GraphModule:
    """A copy of the captured graph with one input and one output more per name, and with more ``inputs`` behind them. Dynamo
    keeps using the original."""
    graph, env = Graph(), {}
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        if node.op == "placeholder":
            env[node]._dynamo_source = getattr(node, "_dynamo_source", None)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    output = graph.output_node()
    leaves = []
    with graph.inserting_after(placeholders[-1]):
        for name in reversed([*names, *inputs]):
            leaf = graph.placeholder(name)
            leaf._dynamo_source = None  # type: ignore[attr-defined]  # as for inputs that no user variable names
            leaves.insert(0, leaf)
    with graph.inserting_before(output):
        probes = [graph.call_function(torch.ops.gnsfx.probe.default, (leaf,)) for leaf in leaves[: len(names)]]
    output.args = ((*output.args[0], *probes),)  # type: ignore[misc]
    copy = GraphModule(gm, graph)
    copy.meta = gm.meta
    if hasattr(gm, "_param_name_to_source"):
        copy._param_name_to_source = gm._param_name_to_source
    return copy


def slots(graph: Graph) -> list[Node]:
    """The gradient slots of the leaves, in the order of the leaves."""
    order = [n for n in graph.nodes if n.op == "placeholder"]
    found = [n for n in graph.nodes if n.target is torch.ops.gnsfx.probe_backward.default]
    return sorted(found, key=lambda n: order.index(n.args[1]))


def attach_collectors(
    graph: Graph,
    emit: Emitter,
    sq_norms: Sequence[tuple[Node | None, str]],
    entries: Sequence[tuple[Node | None, str, int]],
    count: Node | None,
    coupled: bool,
    variances: Sequence[Node | None] | None = None,
) -> None:
    """Let the first leaf's gradient be (2, n + 1): sums over examples, and how many; the second's, if any, (n, B); with
    ``entries`` the last one's all of them in one row.

    ``sq_norms`` holds a (B,) node and the status per slot; without a node the slot says refused, or zero where unused.
    ``entries``: the same for the sums of single numbers, with how many there are.
    ``count``: a 0-d node with the number of examples, where that is data. The last column says refused where the graph
    hands a coupled gradient to the graph before it. ``variances``: with a budget, a (B,) node for each slot that is
    estimated; their sums are a third row, 0 for what is exact.

    Raises:
        GraphError: the graph has no leaf.
    """
    found = slots(graph)
    if not found:
        raise GraphError("the joint graph has no collector.")
    value = found[0].meta["val"]
    like = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    with emit.at(graph.output_node()):
        missing = {s for node, s in sq_norms if node is None}
        constants = {
            s: emit(aten.full.default, [emit.size(emit.examples)], 0.0 if s == "unused" else REFUSED, **like)
            for s in missing
        }
        parts = [node if node is not None else constants[s] for node, s in sq_norms]
        flag = emit(aten.full.default, [1], REFUSED if coupled else 0.0, **like)
        if count is None:
            counts = emit(aten.full.default, [len(parts) + 1], emit.size(emit.examples), **like)
        else:
            counts = emit(aten.expand.default, _on(emit, emit.cast(count, value.dtype), value.device), [len(parts) + 1])
        columns, stacked = [flag, counts], None
        if parts:
            stacked = emit.cast(
                emit(torch.ops.gnsfx.collect.default, [_on(emit, _in_parts(emit, p), value.device) for p in parts]),
                value.dtype,
            )
            columns.insert(0, emit(aten.sum.dim_IntList, stacked, [1]))
        if variances is not None:
            columns += _in_places(emit, [*variances, None], like)
        both = emit.view(emit(aten.cat.default, columns), [2 + (variances is not None), len(parts) + 1])
        results = [both, stacked][: len(found) - bool(entries)]
        if entries:
            results.append(_side_by_side(emit, entries, like))
        for slot, new in zip(found, results, strict=True):
            assert new is not None
            slot.replace_all_uses_with(new)
    for probe in [n for n in graph.nodes if n.target is torch.ops.gnsfx.probe.default]:
        with emit.at(probe):
            constant = emit(aten.full.default, [], 0, dtype=value.dtype, device=value.device, pin_memory=False)
            constant.meta["partitioner_tag"] = "is_forward"
        probe.replace_all_uses_with(constant)


def _in_parts(emit: Emitter, node: Node) -> Node:
    """The parts (k, B) of a sum that is nothing but their sum. Their number is data to no guard."""
    parts = emit.parts.get(node)
    return parts if parts is not None and isinstance(parts.meta["val"].shape[0], int) else node


def _on(emit: Emitter, node: Node, device: torch.device) -> Node:
    """Layers may be on several devices, the leaves are on one."""
    return node if node.meta["val"].device == device else emit(torch.ops.prims.device_put.default, node, device)


def _in_places(emit: Emitter, rows: Sequence[Node | None], like: dict[str, Any]) -> list[Node]:
    """Pieces of a vector: the sums of (B,) nodes where they are, zeros elsewhere."""
    given = [_on(emit, row, like["device"]) for row in rows if row is not None]
    if not given:
        return [emit(aten.full.default, [len(rows)], 0.0, **like)]
    sums = emit(aten.sum.dim_IntList, emit.cast(emit(torch.ops.gnsfx.collect.default, given), like["dtype"]), [1])
    pieces, taken = [], 0
    for here, run in itertools.groupby(rows, lambda row: row is not None):
        length = len(list(run))
        if here:
            pieces.append(emit(aten.slice.Tensor, sums, 0, taken, taken + length))
            taken += length
        else:
            pieces.append(emit(aten.full.default, [length], 0.0, **like))
    return pieces


def _side_by_side(emit: Emitter, entries: Sequence[tuple[Node | None, str, int]], like: dict[str, Any]) -> Node:
    parts = [
        _on(emit, emit.cast(emit.view(node, [numbers]), like["dtype"]), like["device"])
        if node is not None
        else emit(aten.full.default, [numbers], 0.0 if status == "unused" else REFUSED, **like)
        for node, status, numbers in entries
    ]
    return emit(aten.cat.default, parts)
