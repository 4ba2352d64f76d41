"""Writing nodes into a joint graph, with metadata, and the layouts every measurement starts from.

split    (..., outer*B*inner, ...)      -> (B, ..., outer*inner, ...)     the example axis in front
square   (B, ...)                       -> (B,)                           in fp32, or fp64 for fp64
lift     f(partial, shared)             -> (B, ...)                       f applied to each example, by vmap
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from gnsfx._torch import (
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
from gnsfx.passes.lift_as import LIFT_AS, LIFT_STACKED
from gnsfx.passes.rules.table import overloads
from gnsfx.passes.sizes import Sizes
from gnsfx.passes.state import Batched, Size, same_sizes
from gnsfx.passes.strides import RESHAPES, overlaps, permuted, view_value

aten, prims = torch.ops.aten, torch.ops.prims


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Squares and their sums: fp64 for fp64 (and complex128), else fp32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def narrow(node: Node) -> Node:
    """Behind a cast of 16 bits to fp32, for ops that widen what they read themselves: as an input it would be written once more."""
    cast: Any = node
    while cast.target is aten.expand.default and same_sizes(cast.meta["val"].shape, cast.args[0].meta["val"].shape):
        cast = cast.args[0]
    if cast.target is not prims.convert_element_type.default or cast.meta["val"].dtype != torch.float32:
        return node
    return cast.args[0] if cast.args[0].meta["val"].dtype in (torch.bfloat16, torch.float16) else node


WRITES = set(overloads("aten.index_put.default", "aten._unsafe_index_put.default", "aten.scatter.src", "aten.scatter.value",
                       "aten.scatter_add.default", "aten.scatter_reduce.two", "aten.index_add.default", "aten.index_copy.default",
                       "aten.slice_scatter.default", "aten.select_scatter.default", "aten.diagonal_scatter.default",
                       "aten.as_strided_scatter.default", "aten.masked_scatter.default"))  # fmt: skip
"""Inductor runs these in place on their first argument, also where that is an expanded value whose entries share memory."""


class Emitter:
    """Inserts nodes with metadata; ``with emit.at(node)`` says where."""

    def __init__(self, graph: Graph, examples: Size) -> None:
        self.graph, self.examples = graph, examples
        values = [n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        mode = detect_fake_mode(values)
        if mode is None:
            raise GraphError("the joint graph has no fake tensors; expected AOTAutograd of torch >= 2.11.")
        self.fake_mode = mode
        self._sizes = Sizes(graph)
        self._traced = set(graph.nodes)
        self._like: Node | None = None
        self.parts: dict[Node, Node] = {}

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
        if target in WRITES and overlaps(args[0].meta["val"]):
            args = (self(aten.clone.default, args[0], memory_format=torch.contiguous_format), *args[1:])
        return self._insert(target, args, kwargs, self._value(target, args, kwargs))

    def give(self, node: Node, *args: Any) -> None:
        """Other arguments, which are there before ``node`` is."""
        node.args, node.meta["val"] = args, self._value(node.target, args, node.kwargs)

    def _value(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        values = tree_map(fake, (args, dict(kwargs)))
        with self.fake_mode:
            return target(*values[0], **values[1])

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        if self._like is not None and "stack_trace" in self._like.meta:
            node.meta["stack_trace"] = self._like.meta["stack_trace"]
        node.meta["partitioner_tag"] = "is_backward"
        return node

    def size(self, size: Size) -> int | Node:
        """A size as an argument: an int, or a node that computes it."""
        return self._sizes(size)

    # ------------------------------------------------------------------------------------------------- layouts

    def shape(self, node: Node) -> tuple[Size, ...]:
        return tuple(map(simplified, node.meta["val"].shape))

    def view(self, node: Node, shape: Sequence[Size]) -> Node:
        """A reshape that copies only where strides demand it; one of a reshape written here as one of its source."""
        symbolic = any(isinstance(s, torch.SymInt) for s in shape)
        for source in reversed(self._reshaped(node)):
            if same_sizes(self.shape(source), shape):
                return source
            # with symbolic sizes, to ask whether strides allow a view may add guards
            value = self._viewed(source, shape) if not symbolic or source is node else None
            if value is not None:
                return self._insert(aten.view.default, (source, [self.size(s) for s in shape]), {}, value)
        node = self(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self(aten.view.default, node, [self.size(s) for s in shape])

    def _viewed(self, node: Node, shape: Sequence[Size]) -> torch.Tensor | None:
        with self.fake_mode:
            return view_value(node.meta["val"], shape)

    def _reshaped(self, node: Node) -> list[Node]:
        """A node and, for a reshape written here, its source, and so on.

        Not behind a reshape of the traced graph: where that is the operand of a matrix multiply, Inductor holds it in memory
        already, and what lies behind it would be computed and stored once more.
        """
        found = [node]
        while found[-1].target in RESHAPES and found[-1] not in self._traced:
            found.append(found[-1].args[0])  # type: ignore[arg-type]
        return found

    def permute(self, node: Node, dims: Sequence[int]) -> Node:
        """One of a permutation is written as one of its source."""
        dims = [d % len(dims) for d in dims]
        while dims != list(range(len(dims))) and node.target is aten.permute.default:
            node, inner = permuted(node)
            dims = [inner[d] for d in dims]
        return node if dims == list(range(len(dims))) else self(aten.permute.default, node, dims)

    def split(self, node: Node, state: Batched) -> Node:
        """(..., outer*B*inner, ...) -> (B, ..., outer*inner, ...): example b is ``result[b]``, with the rank of ``node``."""
        if node.target is aten.permute.default:
            source, dims = permuted(node)
            return self.permute(self.split(source, state.at(dims[state.dim])), [0, *[d + 1 for d in dims]])
        shape, dim = self.shape(node), state.dim
        if known(state.outer == 1):
            own = shape[dim] if known(state.inner == 1) else self.examples
            parts = self.view(node, [*shape[:dim], own, state.inner, *shape[dim + 1 :]])
            return self.permute(parts, [dim, *[d for d in range(len(shape) + 1) if d != dim]])
        sizes = [*shape[:dim], state.outer, self.examples, state.inner, *shape[dim + 1 :]]
        parts = self.view(node, sizes)  # splitting one dimension never copies
        front = self.permute(parts, [dim + 1, *[d for d in range(len(sizes)) if d != dim + 1]])
        return self.view(front, [self.examples, *shape[:dim], state.outer * state.inner, *shape[dim + 1 :]])

    def front(self, node: Node, state: Batched) -> Node:
        """(..., B, ...) -> (B, ...): the dimension of the examples, where nothing is folded into it, in front."""
        return self.permute(node, [state.dim, *[d for d in range(node.meta["val"].dim()) if d != state.dim]])

    def times(self, node: Node, factor: float) -> Node:
        return node if factor == 1.0 else self(aten.mul.Tensor, node, factor)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        return node if node.meta["val"].dtype == dtype else self(prims.convert_element_type.default, node, dtype)

    def sum(self, node: Node, dims: Sequence[int], dtype: torch.dtype) -> Node:
        """In fp32, or fp64 for fp64 ``dtype``; complex numbers as they are."""
        if node.meta["val"].dtype.is_complex:
            return self(aten.sum.dim_IntList, node, list(dims)) if dims else node
        dtype = accumulate_dtype(dtype)
        return self(aten.sum.dim_IntList, node, list(dims), False, dtype=dtype) if dims else self.cast(node, dtype)

    def square(self, node: Node) -> Node:
        """(B, ...) -> (B,): squared norm of every example."""
        value = node.meta["val"]
        if value.dtype.is_complex:
            node = self(aten.view_as_real.default, node)
        node = self.cast(node, accumulate_dtype(value.dtype))
        squares = self(aten.mul.Tensor, node, node)
        dims = list(range(1, node.meta["val"].dim()))
        return self(aten.sum.dim_IntList, squares, dims) if dims else squares

    def add_parts(self, parts: Node) -> Node:
        """(k, B) -> (B,): squared norms that come in parts. Where nothing else is done with them, ``collect`` adds the parts itself."""
        total = self(aten.clamp_min.default, self(aten.sum.dim_IntList, parts, [0]), 0)
        self.parts[total] = parts
        return total

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
            if target in LIFT_STACKED:
                shared = [d is None and isinstance(v, torch.Tensor) for v, d in zip(values, in_dims, strict=True)]
                stacks = [v.unsqueeze(0) if alone else v for v, alone in zip(values, shared, strict=True)]
                args, kwargs = tree_unflatten([stacks[position[a]] if isinstance(a, Node) else a for a in flat], spec)
                return LIFT_STACKED[target](*args, **kwargs)
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
