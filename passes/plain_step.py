"""What the step costs without any measurement: a roofline of the joint graph as it was traced, from shapes alone.

seconds   matrix multiplies, convolutions, attention: their FLOPs; all other nodes: the bytes that cross a fusion
bytes     inputs + gradients + what the forward returns or keeps for the backward

Views cost nothing. A pointwise node is read and written once, if anything but another pointwise node reads it: the inner
compiler fuses the rest. Neither number is exact; they scale what a measurement may add.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from gnsfx._torch import size_hint
from gnsfx.kernels import cost
from gnsfx.kernels.machine import machine_for
from gnsfx.passes.joint_graph import JointGraph
from gnsfx.passes.rules.table import arguments

aten = torch.ops.aten
SHARE = 0.03
"""Of what the plain step holds: by so much may measuring raise its peak."""
LEAST = 4 << 20
"""Bytes that a measurement may always allocate: one buffer that stays in the cache."""
VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.t.default,
    aten.transpose.int, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor,
    aten.select.int, aten.alias.default, aten.detach.default, aten.as_strided.default, aten.view_as_real.default,
    aten.view_as_complex.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, operator.getitem,
}  # fmt: skip
MULTIPLIES: dict[object, int] = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
"""Op -> which of its arguments is the left factor."""


def plain_seconds(graph: Graph) -> float:
    """Seconds of forward and backward; 0 for a graph without tensors."""
    return sum(_seconds(node) for node in graph.nodes if node.op == "call_function")


def memory_cap(view: JointGraph, asked: int | None) -> int:
    """Bytes that a measurement may allocate at any one time: what was asked for, else a small share of what the step holds."""
    return max(LEAST, int(SHARE * held_bytes(view))) if asked is None else asked


def held_bytes(view: JointGraph) -> int:
    """Bytes that the step holds at its peak: inputs, gradients, results and saved activations."""
    inputs = sum(_bytes(n) for n in view.graph.nodes if n.op == "placeholder" and n not in view.backward)
    gradients = sum(_bytes(n) for n in set(view.grads.values()))
    return inputs + gradients + sum(_bytes(n) for n in _saved(view))


def _seconds(node: Node) -> float:
    tensor = _tensor(node)
    if tensor is None or node.target in VIEWS:
        return 0.0
    machine = machine_for(tensor.device.type)
    return cost.seconds(_work(node, tensor), machine, tensor.dtype)


def _work(node: Node, tensor: torch.Tensor) -> cost.Cost:
    if node.target in MULTIPLIES:
        at = MULTIPLIES[node.target]
        left, right = (_sizes(a) for a in node.args[at : at + 2])
        batch = math.prod(left[:-2])
        return cost.gemm(batch, left[-2], right[-1], left[-1], tensor.dtype.itemsize)
    moved = _bytes(node) + sum(map(_bytes, node.all_input_nodes))
    name = str(node.target)
    if "convolution" in name:
        return cost.Cost(flops=_convolution_flops(node), bytes=moved, calls=1)
    if "attention" in name:
        return cost.Cost(flops=_attention_flops(node, name), bytes=moved, calls=1)
    if not _pointwise(node):
        return cost.Cost(bytes=sum(map(_bytes, node.all_input_nodes)), calls=1)
    leaves = any(user.op == "output" or not _pointwise(user) for user in node.users)
    return cost.Cost(bytes=_bytes(node) * (2 if leaves else 0), calls=1 if leaves else 0)


def _convolution_flops(node: Node) -> float:
    """Of the forward, and of each of the two gradients that the backward is asked for."""
    op = arguments(node)
    backward = "grad_output" in op
    grid = op["input"] if op["transposed"] else op["grad_output"] if backward else node
    parts = sum(op["output_mask"][:2]) if backward else 1
    positions = math.prod(_sizes(grid)[2:]) * _sizes(grid)[0]
    return 2.0 * positions * math.prod(_sizes(op["weight"])) * parts


def _attention_flops(node: Node, name: str) -> float:
    """Two products of [T, S] with D, and five in the backward; half of them where nobody looks ahead is not counted off."""
    op = arguments(node)
    query, key = (_sizes(op[n]) for n in ("query", "key"))
    return 2.0 * math.prod(query) * key[-2] * (5 if "backward" in name else 2)


def _saved(view: JointGraph) -> Iterator[Node]:
    """Values of the forward, too dear to be computed again, that are returned or that the backward reads through cheap ops."""
    needed = set()
    for node in reversed(list(view.graph.nodes)):
        if node in view.backward or node.op != "call_function":
            continue
        for user in node.users:
            if user in view.backward or (user in needed and (_pointwise(user) or user.target in VIEWS)):
                needed.add(node)
    for node in needed:
        if not _pointwise(node) and node.target not in VIEWS:
            yield node


def _pointwise(node: Node) -> bool:
    return (
        torch.Tag.pointwise in getattr(node.target, "tags", ())
        or node.target is torch.ops.prims.convert_element_type.default
    )


def _tensor(node: Node) -> torch.Tensor | None:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = next((v for v in value if isinstance(v, torch.Tensor)), None)
    return value if isinstance(value, torch.Tensor) else None


def _sizes(node: object) -> list[int]:
    assert isinstance(node, Node)
    tensor = _tensor(node)
    return [size_hint(s) for s in tensor.shape] if tensor is not None else []


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return sum(size_hint(v.numel()) * v.dtype.itemsize for v in values if isinstance(v, torch.Tensor))
