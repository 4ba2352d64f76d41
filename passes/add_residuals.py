"""Residual connections: what the branch beside a norm layer hands back is added where dx is written.

    dx = norm_backward(g, x, ...)[0];  add(r, dx)     ->     norm_backward(g, x, ..., residual=r)[0]

Inductor adds in the kernel that writes dx. Beside an op of ours it would need one of its own, and write and read dx once more.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from gnsfx.passes.emit import Emitter
from gnsfx.passes.norm_layers import in_order
from gnsfx.passes.state import same_sizes

aten, ops = torch.ops.aten, torch.ops.gnsfx
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def add_residuals(graph: Graph, emit: Emitter) -> None:
    """In place; sums whose other term comes later than the layer stay as they are."""
    layers = graph.find_nodes(op="call_function", target=ops.norm_backward.default)
    order = {node: i for i, node in enumerate(graph.nodes)} if layers else {}
    for layer in layers:
        for dx in [user for user in layer.users if user.target is operator.getitem and user.args[1] == 0]:
            for value, total, other in _sums(dx):
                if _zeros(other):
                    total.replace_all_uses_with(value)
                elif "residual" not in layer.kwargs and order.get(other, len(order)) < order[layer]:
                    with emit.at(layer):
                        residual = emit.view(other, emit.shape(dx))
                    layer.kwargs = {**layer.kwargs, "residual": residual}
                    total.replace_all_uses_with(value)
                else:
                    break
                graph.erase_node(total)


def _sums(dx: Node) -> Iterator[tuple[Node, Node, Node]]:
    """dx or a reshape of it, the sum that alone reads it, and the other term; the next one where that was replaced."""
    value = dx
    while len(value.users) == 1:
        (user,) = value.users
        if user.target in RESHAPES or (user.target is aten.permute.default and _in_rows(user) and _in_rows(value)):
            value = user
        elif user.target is aten.add.Tensor and not user.kwargs and isinstance(other := _other(user, value), Node):
            if not _alike(user, value) or not _alike(other, value):
                return
            yield value, user, other
        else:
            return


def _other(total: Node, value: Node) -> object:
    first, second = total.args
    return first if second is value else second


def _alike(one: Node, other: Node) -> bool:
    """Whether two values have the same dtype, shape and place in memory."""
    a, b = one.meta["val"], other.meta["val"]
    if not isinstance(a, torch.Tensor) or a.dtype != b.dtype or not same_sizes(a.shape, b.shape):
        return False
    return same_sizes(a.stride(), b.stride()) or _zeros(one)


def _in_rows(node: Node) -> bool:
    """Whether entries lie in row-major order; a permutation of one such value into another is a reshape."""
    value = node.meta["val"]
    return in_order(value, range(value.dim()))


def _zeros(node: Node) -> bool:
    full = node.args[0] if node.target is aten.expand.default else node
    return isinstance(full, Node) and full.target is aten.full.default and bool(full.args[1] == 0)
