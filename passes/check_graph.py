"""What a rewritten joint graph must satisfy, checked after every rewrite.

The forward outputs and every gradient keep shape, dtype and device; no plumbing op is left; every new node has
metadata; the graph is well formed.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from gnsfx.errors import GraphError
from gnsfx.passes.state import same_sizes

Signature = list[tuple[torch.Size, torch.dtype, torch.device] | None]


def signature(graph: Graph) -> Signature:
    values = [n.meta.get("val") if isinstance(n, Node) else None for n in graph.output_node().args[0]]  # type: ignore[union-attr]
    return [(v.shape, v.dtype, v.device) if isinstance(v, torch.Tensor) else None for v in values]


def check_graph(graph: Graph, before: Signature) -> None:
    """Raises GraphError naming the first output or node that breaks the contract."""
    for position, (old, new) in enumerate(zip(before, signature(graph), strict=True)):
        if (old is None) != (new is None) or (old is not None and new is not None and not _same(old, new)):
            raise GraphError(f"rewriting changed output {position} of the joint graph from {old} to {new}.")
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in (torch.ops.gnsfx.probe.default, torch.ops.gnsfx.probe_backward.default):
            raise GraphError(f"{node} is left in the rewritten graph.")
        if "val" not in node.meta and node.users:  # an assertion returns nothing
            raise GraphError(f"{node} has no metadata.")
    graph.lint()


def _same(a: tuple, b: tuple) -> bool:
    return same_sizes(a[0], b[0]) and a[1:] == b[1:]
