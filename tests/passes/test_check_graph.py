"""Bad rewrites planted into a graph are caught, each with a message that names what broke."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import Graph, Node

import gnsfx.kernels.ops
import gnsfx.passes.attach_collectors  # noqa: F401  (defines the probe)
from gnsfx.errors import GraphError
from gnsfx.passes.check_graph import check_graph, signature

aten = torch.ops.aten


def call(graph: Graph, target: object, *args: object) -> Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta["val"] = target(*[a.meta["val"] if isinstance(a, Node) else a for a in args])  # type: ignore[operator]
    return node


def small() -> Graph:
    """x -> (exp(x), None, sum(x))."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.randn(2, 3)
    graph.output([call(graph, aten.exp.default, x), None, call(graph, aten.sum.default, x)])
    return graph


def replaced(graph: Graph, position: int, change: Callable[[Node], Node | None]) -> None:
    output = graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    with graph.inserting_before(output):
        values[position] = change(values[position])
    output.args = (values,)


def other_shape(graph: Graph) -> None:
    replaced(graph, 0, lambda n: call(graph, aten.view.default, n, [3, 2]))


def other_rank(graph: Graph) -> None:
    replaced(graph, 2, lambda n: call(graph, aten.unsqueeze.default, n, 0))


def other_dtype(graph: Graph) -> None:
    replaced(graph, 0, lambda n: call(graph, torch.ops.prims.convert_element_type.default, n, torch.float64))


def other_device(graph: Graph) -> None:
    def moved(node: Node) -> Node:
        found = call(graph, aten.neg.default, node)
        found.meta["val"] = found.meta["val"].to("meta")
        return found

    replaced(graph, 0, moved)


def lost(graph: Graph) -> None:
    replaced(graph, 2, lambda n: None)


def appeared(graph: Graph) -> None:
    replaced(graph, 1, lambda n: call(graph, aten.exp.default, graph.find_nodes(op="placeholder")[0]))


@pytest.mark.parametrize(
    "plant, position",
    [(other_shape, 0), (other_rank, 2), (other_dtype, 0), (other_device, 0), (lost, 2), (appeared, 1)],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_outputs_that_change(plant: Callable[[Graph], None], position: int) -> None:
    graph = small()
    before = signature(graph)
    check_graph(graph, before)
    plant(graph)
    with pytest.raises(GraphError, match=f"output {position} of the joint graph"):
        check_graph(graph, before)


def test_an_output_that_is_dropped() -> None:
    graph = small()
    before = signature(graph)
    graph.output_node().args = (list(graph.output_node().args[0])[:2],)  # type: ignore[arg-type]
    with pytest.raises((GraphError, ValueError)):
        check_graph(graph, before)


def test_plumbing_that_is_left() -> None:
    graph = small()
    before = signature(graph)
    replaced(graph, 1, lambda n: None)
    with graph.inserting_before(graph.output_node()):
        call(graph, torch.ops.gnsfx.probe.default, graph.find_nodes(op="placeholder")[0])
    with pytest.raises(GraphError, match=r"probe.* is left"):
        check_graph(graph, before)


def test_a_new_node_without_metadata() -> None:
    graph = small()
    before = signature(graph)

    def bare(node: Node) -> Node:
        middle = graph.call_function(aten.neg.default, (node,))
        found = graph.call_function(aten.neg.default, (middle,))
        found.meta["val"] = node.meta["val"]
        return found

    replaced(graph, 0, bare)
    with pytest.raises(GraphError, match="has no metadata"):
        check_graph(graph, before)


def test_a_node_used_before_it_is_made() -> None:
    graph = small()
    before = signature(graph)
    exp = graph.output_node().args[0][0]  # type: ignore[index]
    first = graph.find_nodes(op="placeholder")[0]
    with graph.inserting_after(first):
        early = graph.call_function(aten.neg.default, (exp,))
        early.meta["val"] = exp.meta["val"]
    replaced(graph, 0, lambda n: early)
    with pytest.raises(RuntimeError, match="before it has been defined"):
        check_graph(graph, before)
