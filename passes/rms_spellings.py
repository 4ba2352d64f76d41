"""How models write RMSNorm, each as a trace of its forward and backward: what :mod:`gnsfx.passes.find_rms_norms` looks for.

h = x.float();  h * rsqrt(h.pow(2).mean(-1) + eps)   times w, before or after it is cast back
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from gnsfx._torch import select_decomp_table
from gnsfx.passes.emit import Emitter
from gnsfx.passes.rules.table import overloads

aten, prims = torch.ops.aten, torch.ops.prims
EPS = 0.0009765625
"""Stands for any number in its place."""
ROOTS = (aten.rsqrt.default, aten.sqrt.default)
AS_IS = set(overloads("aten.alias.default", "aten.detach.default", "aten.lift_fresh_copy.default"))

Spelling = Callable[[Tensor, Tensor], Tensor]


def _cast_then_scaled(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _scaled_then_cast(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * w).to(x.dtype)


def _of_pytorch(x: Tensor, w: Tensor) -> Tensor:
    """``F.rms_norm`` where the dtypes of input and weight differ, and on CPUs."""
    h = x.float()
    rstd = torch.rsqrt(aten.add.Scalar(h.pow(2).mean(-1, keepdim=True), EPS))
    return (h * rstd * w).type_as(x)


def _divided(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _promoted(x: Tensor, w: Tensor) -> Tensor:
    """T5: only what is squared is cast."""
    return w * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


SPELLINGS: tuple[Spelling, ...] = (_cast_then_scaled, _scaled_then_cast, _of_pytorch, _divided, _promoted)


@dataclass(frozen=True, slots=True)
class Trace:
    """A spelling at some shapes: its operands, and the nodes to find."""

    x: Node
    w: Node
    g: Node
    root: Node
    scale: Node
    terms: tuple[Node, Node]
    cast: Node | None  # of the sum of both terms, where x is narrower


def trace_spelling(spelling: Spelling, value: Tensor, dtype: torch.dtype, emit: Emitter) -> Trace | None:
    """Of CPU tensors: what autograd writes does not depend on the device, and fake CUDA tensors have no autograd here."""

    def both(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
            return torch.autograd.grad(spelling(x, w), (x, w), g)

    with emit.fake_mode, torch.autocast("cpu", enabled=False):
        x = torch.empty(tuple(value.shape), dtype=value.dtype, device="cpu")
        w = torch.empty(value.shape[-1], dtype=dtype, device="cpu")
        g = torch.empty_like(x, dtype=spelling(x, w).dtype)
        graph = make_fx(both, decomposition_table=select_decomp_table())(x, w, g).graph
    return _read(graph)


def _read(graph: Graph) -> Trace | None:
    x, w, g = (n for n in graph.nodes if n.op == "placeholder")
    results: Any = graph.output_node().args[0]
    dx, dw = map(seen, results)
    total = seen(dx.args[0]) if (cast := dx.target is prims.convert_element_type.default) else dx
    roots = [n for n in graph.nodes if n.target in ROOTS]
    while dw.target is not aten.sum.dim_IntList and isinstance(dw.args[0], Node):
        dw = dw.args[0]
    if total.target is not aten.add.Tensor or len(roots) != 1 or dw.target is not aten.sum.dim_IntList:
        return None
    first, second = (seen(n) for n in total.args)
    return Trace(x, w, g, roots[0], dw, (first, second), dx if cast else None)


def seen(node: Any) -> Node:
    while node.target in AS_IS:
        node = node.args[0]
    return node
