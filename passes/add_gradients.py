"""Sums of gradients behind a norm layer, as of q, k and v, are added up where the layer's backward reads them.

    norm_backward(add(add(q, k), v), x, ...)     ->     norm_backward(q, x, ..., g2=k, g3=v)

Inductor adds in the kernel that reads the sum. Before an op of ours it would need one of its own: the sum would be written and
read once more. Only results of matrix multiplies are taken apart: they are in memory in either case.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from gnsfx.kernels.ops import sum_taken
from gnsfx.passes.add_residuals import RESHAPES
from gnsfx.passes.emit import Emitter, narrow
from gnsfx.passes.norm_layers import in_order
from gnsfx.passes.state import same_sizes

aten, ops = torch.ops.aten, torch.ops.gnsfx
MULTIPLIES = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


def add_gradients(graph: Graph, emit: Emitter) -> None:
    """In place; a sum of which the layer cannot read all terms stays as it is."""
    layers = graph.find_nodes(op="call_function", target=ops.norm_backward.default)
    for layer in layers:
        g, x, mean, *others = layer.args
        terms = _terms(g)
        values = [term.meta["val"] for term in terms]
        width = x.meta["val"].shape[2]
        if len(terms) > 1 and all(map(_stored, terms)) and sum_taken(width, mean is None, x.meta["val"], *values):
            with emit.at(layer):
                first, *more = (emit.view(term, emit.shape(g)) for term in terms)
            layer.args = (first, x, mean, *others)
            layer.kwargs = layer.kwargs | dict(zip(("g2", "g3"), more, strict=False))
    if layers:
        graph.eliminate_dead_code()


def _terms(node: Node) -> list[Node]:
    """What a sum that nothing else reads consists of, as it lies behind reshapes and casts from 16 bits."""
    source, alone = node, len(node.users) == 1
    while (behind := source.args[0] if source.target in RESHAPES else narrow(source)) is not source:
        assert isinstance(behind, Node)
        source, alone = behind, alone and len(behind.users) == 1
    if not alone or source.target is not aten.add.Tensor or source.kwargs:
        return [source]
    terms = [term for term in source.args if isinstance(term, Node) and _alike(term, source)]
    return [one for term in terms for one in _terms(term)] if len(terms) == 2 else [source]


def _stored(node: Node) -> bool:
    value = node.meta["val"]
    return node.target in MULTIPLIES and in_order(value, range(value.dim()))


def _alike(one: Node, other: Node) -> bool:
    a, b = one.meta["val"], other.meta["val"]
    return isinstance(a, torch.Tensor) and a.dtype == b.dtype and same_sizes(a.shape, b.shape)
