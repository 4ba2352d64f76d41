"""Writing nodes into a joint graph: metadata, symbolic sizes, and the two layouts every measurement starts from.

split    (..., outer*B*inner, ...)      -> (B, ..., outer*inner, ...)     the example axis in front
square   (B, ...)                       -> (B,)                           in fp32, or fp64 for fp64
lift     f(partial, shared)             -> (B, ...)                       f applied to each example, by vmap
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from gnsfx._torch import (
    FloorDiv,
    Mod,
    PythonMod,
    TangentAOTInput,
    detect_fake_mode,
    known,
    select_decomp_table,
    simplified,
    tree_flatten,
    tree_map,
    tree_unflatten,
)
from gnsfx.errors import GraphError
from gnsfx.passes.joint_graph import fake
from gnsfx.passes.rules.table import overloads
from gnsfx.passes.state import Batched, Size, same_sizes

aten, prims = torch.ops.aten, torch.ops.prims


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Squares and their sums: fp64 for fp64 (and complex128), else fp32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def _trilinear(
    i1: Any, i2: Any, i3: Any, expand1: Any, expand2: Any, expand3: Any, sumdim: Any, unroll_dim: int = 1
) -> Any:
    for dims, position in ((expand1, 0), (expand2, 1), (expand3, 2)):
        for dim in sorted(dims):
            i1, i2, i3 = (t.unsqueeze(dim) if i == position else t for i, t in enumerate((i1, i2, i3)))
    return (i1 * i2 * i3).sum(sumdim)


def _weight_norm_backward(grad_w: Any, v: Any, g: Any, norms: Any, dim: int) -> tuple[Any, Any]:
    """Of w = v * g / ||v||, the norm over all dimensions but ``dim``."""
    projected = (grad_w * v).sum([d for d in range(v.dim()) if d != dim], keepdim=True)
    return g / norms * (grad_w - v * projected / norms**2), projected / norms


def _slice_scatter(self: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    size = self.shape[dim]  # an end behind it means "up to the end", and has no batching rule
    beyond = isinstance(end, int) and (end >= 2**62 or (isinstance(size, int) and end > size))
    start, end = (at + size if isinstance(at, int) and at < 0 else at for at in (start, end))  # nor has a negative one
    return torch.slice_scatter(self, src, dim, start, None if beyond else end, step)


def _cdist_backward(grad: Any, x1: Any, x2: Any, p: float, cdist: Any) -> Any:
    """PyTorch's own batching rule is wrong where only the gradient is batched (2.13)."""
    if p == 2:
        share = torch.where(cdist == 0, 0, grad / cdist)
        return x1 * share.sum(-1, keepdim=True) - share @ x2
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    size, grad, cdist = difference.abs(), grad.unsqueeze(-1), cdist.unsqueeze(-1)
    if p == math.inf:
        slope = (size == cdist).to(size.dtype)
    else:
        slope = torch.zeros_like(size) if p == 0 else (size / cdist) ** (p - 1)
    return torch.where(difference == 0, 0, difference.sign() * slope * grad).sum(-2)


def _convert(a: Any, dtype: torch.dtype) -> Any:
    """A gradient is not rounded below the dtype in which its squares are summed."""
    narrower = a.dtype.is_floating_point and dtype.is_floating_point and dtype.itemsize < a.dtype.itemsize
    return a if narrower else a.to(dtype)


LIFT_AS: dict[Any, Any] = {
    aten._trilinear.default: _trilinear,
    aten._weight_norm_interface_backward.default: _weight_norm_backward,
    prims.convert_element_type.default: _convert,
    aten._to_copy.default: lambda a, dtype=None, **_: a if dtype is None else _convert(a, dtype),
    prims.rev.default: torch.flip,
    prims.fma.default: lambda a, b, c: a * b + c,
    aten.slice_scatter.default: _slice_scatter,
    aten._cdist_backward.default: _cdist_backward,
    aten.copy.default: lambda self, src, *_: src.expand(self.shape),
}
"""What ``torch.func.vmap`` is given in place of ops that have no batching rule."""


COMBINE: dict[Any, Any] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
}
"""How symbolic sizes are made of others."""


WRITES = set(overloads("aten.index_put.default", "aten._unsafe_index_put.default", "aten.scatter.src", "aten.scatter.value",
                       "aten.scatter_add.default", "aten.scatter_reduce.two", "aten.index_add.default", "aten.index_copy.default",
                       "aten.slice_scatter.default", "aten.select_scatter.default", "aten.diagonal_scatter.default",
                       "aten.as_strided_scatter.default", "aten.masked_scatter.default"))  # fmt: skip
"""Inductor runs these in place on their first argument, also where that is an expanded value whose entries share memory."""


def _overlaps(value: torch.Tensor) -> bool:
    return any(
        known(stride == 0) and not known(size == 1) for size, stride in zip(value.shape, value.stride(), strict=True)
    )


class Emitter:
    """Inserts nodes with metadata; ``with emit.at(node)`` says where."""

    def __init__(self, graph: Graph, examples: Size) -> None:
        self.graph, self.examples = graph, examples
        values = [n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        mode = detect_fake_mode(values)
        if mode is None:
            raise GraphError("the joint graph has no fake tensors; expected AOTAutograd of torch >= 2.11.")
        self.fake_mode = mode
        self._sizes: dict[Any, Node] = {}
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            if node.op != "placeholder":
                continue
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self._sizes.setdefault(value.node.expr, node)
        self._like: Node | None = None

    @contextmanager
    def at(self, node: Node) -> Iterator[None]:
        """Insert before ``node``, with its place in the user's source."""
        before, self._like = self._like, node
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._like = before

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        if target in WRITES and _overlaps(args[0].meta["val"]):
            args = (self(aten.clone.default, args[0], memory_format=torch.contiguous_format), *args[1:])
        node = self.graph.call_function(target, args, kwargs)
        values = tree_map(fake, (args, kwargs))
        with self.fake_mode:
            node.meta["val"] = target(*values[0], **values[1])
        if self._like is not None and "stack_trace" in self._like.meta:
            node.meta["stack_trace"] = self._like.meta["stack_trace"]
        node.meta["partitioner_tag"] = "is_backward"
        return node

    def size(self, size: Size) -> int | Node:
        """A size as an argument: an int, or a node that computes it."""
        size = simplified(size)
        if not isinstance(size, torch.SymInt):
            return size
        expression = sympy.sympify(size.node.expr)
        if expression.is_Integer:
            return int(expression)
        return self._expression(expression)

    def _expression(self, expression: Any) -> int | Node:
        if expression.is_Integer:
            return int(expression)
        if expression in self._sizes:
            return self._sizes[expression]
        found = self._from_inputs(expression)
        if found is None and (type(expression) in COMBINE or _is_power(expression)):
            combine = COMBINE.get(type(expression), operator.mul)
            factors = [expression.args[0]] * int(expression.args[1]) if _is_power(expression) else expression.args
            parts = [self._expression(part) for part in factors]
            found = parts[0]
            for part in parts[1:]:
                found = self._sym(combine, found, part)
        if not isinstance(found, Node):
            raise GraphError(f"the size {expression} cannot be computed from the graph inputs.")
        self._sizes[expression] = found
        return found

    def _from_inputs(self, expression: Any) -> Node | None:
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if node.op != "placeholder" or not isinstance(value, torch.Tensor):
                continue
            if isinstance(node.meta.get("desc"), TangentAOTInput):
                continue  # the forward does not have it
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and sympy.sympify(size.node.expr) == expression:
                    return self._sym(aten.sym_size.int, node, dim)
        return None

    def _sym(self, target: Any, *args: Any) -> Node:
        last = max((n for n in self.graph.nodes if n.op == "placeholder"), key=lambda n: self._order.get(n, -1))
        anchor = max([last, *[a for a in args if isinstance(a, Node)]], key=lambda n: self._rank(n))
        with self.graph.inserting_after(anchor):
            node = self.graph.call_function(target, args)
        node.meta["val"] = target(*[fake(a) for a in args])
        return node

    def _rank(self, node: Node) -> int:
        return next(i for i, n in enumerate(self.graph.nodes) if n is node)

    # ------------------------------------------------------------------------------------------------- layouts

    def shape(self, node: Node) -> tuple[Size, ...]:
        return tuple(map(simplified, node.meta["val"].shape))

    def view(self, node: Node, shape: Sequence[Size]) -> Node:
        """A reshape that copies only where strides demand it."""
        own = self.shape(node)
        if same_sizes(own, shape):
            return node
        if not _viewable(node.meta["val"], shape, self.fake_mode):
            node = self(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self(aten.view.default, node, [self.size(s) for s in shape])

    def permute(self, node: Node, dims: Sequence[int]) -> Node:
        return node if list(dims) == list(range(len(dims))) else self(aten.permute.default, node, list(dims))

    def split(self, node: Node, state: Batched) -> Node:
        """(..., outer*B*inner, ...) -> (B, ..., outer*inner, ...): example b is ``result[b]``, with the rank of ``node``."""
        shape, dim = self.shape(node), state.dim
        if known(state.outer == 1) and known(state.inner == 1):
            parts = self(aten.unsqueeze.default, node, dim + 1)
            return self.permute(parts, [dim, *[d for d in range(len(shape) + 1) if d != dim]])
        sizes = [*shape[:dim], state.outer, self.examples, state.inner, *shape[dim + 1 :]]
        parts = self(aten.view.default, node, [self.size(s) for s in sizes])  # splitting one dimension never copies
        front = self.permute(parts, [dim + 1, *[d for d in range(len(sizes)) if d != dim + 1]])
        return self.view(front, [self.examples, *shape[:dim], state.outer * state.inner, *shape[dim + 1 :]])

    def times(self, node: Node, factor: float) -> Node:
        return node if factor == 1.0 else self(aten.mul.Tensor, node, factor)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        return node if node.meta["val"].dtype == dtype else self(prims.convert_element_type.default, node, dtype)

    def square(self, node: Node) -> Node:
        """(B, ...) -> (B,): squared norm of every example."""
        value = node.meta["val"]
        if value.dtype.is_complex:
            node = self(aten.view_as_real.default, node)
        node = self.cast(node, accumulate_dtype(value.dtype))
        squares = self(aten.mul.Tensor, node, node)
        dims = list(range(1, node.meta["val"].dim()))
        return self(aten.sum.dim_IntList, squares, dims) if dims else squares

    def share(self, node: Node) -> Node:
        """What each example owns of a term that no example owns: 1/B."""
        value = node.meta["val"]
        if not value.dtype.is_floating_point and not value.dtype.is_complex:
            return node
        return self(aten.div.Tensor, node, self.size(self.examples))

    def lift(
        self, node: Node, per_example: Mapping[Node, Node], scaled: Mapping[Node, Node], index: int | None = None
    ) -> Node:
        """``node`` with each argument of ``per_example`` replaced by its (B, ...) version, by ``torch.func.vmap``.

        ``scaled`` replaces shared terms (each example owns 1/B of them); ``index`` picks one of several results.
        """
        target: Any = node.target
        flat, spec = tree_flatten((node.args, node.kwargs))
        nodes = list(dict.fromkeys(a for a in flat if isinstance(a, Node)))
        sources = [per_example.get(n, scaled.get(n, n)) for n in nodes]
        in_dims = tuple(0 if n in per_example else None for n in nodes)
        position = {n: i for i, n in enumerate(nodes)}

        def apply(*values: Any) -> Any:
            args, kwargs = tree_unflatten([values[position[a]] if isinstance(a, Node) else a for a in flat], spec)
            result = LIFT_AS.get(target, target)(*args, **kwargs)
            return result if index is None else result[index]

        def batched(*values: Any) -> Any:
            return torch.func.vmap(apply, in_dims=in_dims, randomness="same")(*values)

        with self.fake_mode:
            traced = make_fx(batched, decomposition_table=select_decomp_table())(*[n.meta["val"] for n in sources])
        return self.inline(traced.graph, sources)

    def inline(self, graph: Graph, inputs: Sequence[Node]) -> Node:
        """Copy the nodes of a traced graph with one result to here."""
        env: dict[Node, Any] = dict(zip((n for n in graph.nodes if n.op == "placeholder"), inputs, strict=True))
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = tree_map(lambda a: env.get(a, a) if isinstance(a, Node) else a, (node.args, node.kwargs))
                env[node] = self(node.target, *args, **kwargs)
            elif node.op == "output":
                return env[node.args[0]]
            elif node.op != "placeholder":
                raise GraphError(f"a lifted op holds a constant ({node.format_node()}).")
        raise GraphError("a lifted op returns nothing.")


def _is_power(expression: Any) -> bool:
    return isinstance(expression, sympy.Pow) and bool(expression.args[1].is_Integer and expression.args[1] > 0)


def _viewable(value: torch.Tensor, shape: Sequence[Size], mode: Any) -> bool:
    try:
        with mode:
            aten.view.default(value, list(shape))
    except (RuntimeError, ValueError):
        return False
    return True
