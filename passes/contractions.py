"""Contractions: the nodes where *batched* turns into *partial*, as records the planner and the rewrite understand.

    mm((I, B*T), (B*T, O))                    Matmul           P_b = x_b^T g_b
    sum((B, T, D), [0, 1])                    Reduction        P_b = sum_t g_bt
    index_put(zeros, ids, g, accumulate)      Lookup           P_b = onehot(ids_b)^T g_b
    convolution_backward(g, x, w)[1]          Convolution      P_b = the same op on one example
    convolution_backward(g, x, w)[2]          BiasReduction    P_b = sum over rows and space of g_b
    anything else whose rule says partial     Lifted           P_b = the op under torch.func.vmap

Each record can ``materialise`` the stack of all P_b, (B, *shape of the node). Which node is which:
:mod:`gnsfx.passes.find_contractions`.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from gnsfx._torch import known, select_decomp_table, size_hint, tree_flatten, tree_unflatten
from gnsfx.passes.emit import Emitter, accumulate_dtype
from gnsfx.passes.rows import skipping, without
from gnsfx.passes.rules.reductions import removed
from gnsfx.passes.rules.table import LINEAR, Op, arguments
from gnsfx.passes.state import Batched, Size, product

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Factor:
    """An operand of a contraction and where the examples are in it."""

    node: Node
    state: Batched

    def split(self, emit: Emitter) -> Node:
        return emit.split(self.node, self.state)


@dataclass(frozen=True, slots=True)
class Contraction(ABC):
    """Base of the records. ``node`` is the value sum_b P_b in the graph."""

    node: Node

    @property
    def operation(self) -> str:
        node = self.node.args[0] if self.node.target is operator.getitem else self.node
        return str(node.target).removeprefix("aten.").removesuffix(".default")  # type: ignore[union-attr]

    @abstractmethod
    def materialise(self, emit: Emitter) -> Node:
        """(B, *shape of the node): the stack of all P_b."""


@dataclass(frozen=True, slots=True)
class Matmul(Contraction):
    """P_b = x_b^T g_b for x (E, I, outer*B*inner) and g (E, outer*B*inner, O); E is absent for ``mm``."""

    x: Factor
    g: Factor

    def sizes(self, examples: Size) -> tuple[int, int, int, int, int]:
        """B, E, T, I, O as concrete hints."""
        shape = self.node.meta["val"].shape
        E, (I, O) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
        B = size_hint(examples)
        rows = self.x.node.meta["val"].shape[self.x.state.dim]
        return B, size_hint(E), max(size_hint(rows) // max(B, 1), 1), size_hint(I), size_hint(O)

    def factors(self, emit: Emitter) -> tuple[Node, Node]:
        """x (B, E, T, I) and g (B, E, T, O)."""
        x, g = self.x.split(emit), self.g.split(emit)
        x = emit.permute(x, [*range(x.meta["val"].dim() - 2), -1, -2])
        if x.meta["val"].dim() == 3:
            x, g = (emit.view(f, [(s := emit.shape(f))[0], 1, *s[1:]]) for f in (x, g))
        return x, g

    def materialise(self, emit: Emitter) -> Node:
        x, g = self.x.split(emit), self.g.split(emit)
        if x.meta["val"].dim() == 3:
            return emit(aten.bmm.default, x, g)
        (B, E, I, _), O = emit.shape(x), emit.shape(g)[-1]
        flat = [emit.view(f, [B * E, *emit.shape(f)[2:]]) for f in (x, g)]
        return emit.view(emit(aten.bmm.default, *flat), [B, E, I, O])


@dataclass(frozen=True, slots=True)
class Reduction(Contraction):
    """P_b = the sum (or mean over all examples) of one example's rows."""

    g: Factor

    def materialise(self, emit: Emitter) -> Node:
        op, state = arguments(self.node), self.g.state
        shape = emit.shape(self.node)
        dims = removed(Op(self.node, {}, emit.examples, True))
        if known(state.outer == 1) and known(state.inner == 1) and state.dim in dims:  # nothing of it is left to sum
            rows, summed = emit.front(self.g.node, state), [d + (d < state.dim) for d in dims if d != state.dim]
        else:
            rows, summed = self.g.split(emit), [d + 1 for d in dims]
        total = emit.sum(rows, summed, self.node.meta["val"].dtype)
        if "mean" in str(self.node.target):
            count = product([emit.shape(op["self"])[d] for d in dims])
            total = emit(aten.div.Tensor, total, emit.size(count))
        return emit.view(total, [emit.examples, *shape])


@dataclass(frozen=True, slots=True)
class BiasReduction(Contraction):
    """P_b = sum over rows and space of the output gradient (rows, O, ...)."""

    g: Factor

    def materialise(self, emit: Emitter) -> Node:
        split = self.g.split(emit)  # (B, R, O, ...)
        dims = [1, *range(3, split.meta["val"].dim())]
        return emit.sum(split, dims, split.meta["val"].dtype)


@dataclass(frozen=True, slots=True)
class Lookup(Contraction):
    """P_b = onehot(ids_b)^T g_b; ``ids`` (B, T) row numbers, ``g`` (B, T, D) and the rows to keep (B, T, 1) are written by ``build``."""

    build: Callable[[Emitter], tuple[Node, Node, Node | None]]
    rows: Size

    def factors(self, emit: Emitter) -> tuple[Node, Node]:
        """ids and g with zeros for row 0 in place of what is left out."""
        ids, g, keep = self.build(emit)
        return (ids, g) if keep is None else without(emit, ids, g, keep)

    def marked(self, emit: Emitter) -> tuple[Node, Node]:
        """ids, ``SKIPPED`` where something is left out, and g as it is: of it no copy is made."""
        ids, g, keep = self.build(emit)
        return (ids, g) if keep is None else (skipping(emit, ids, keep), g)

    def sizes(self, examples: Size) -> tuple[int, int, int, int]:
        """B, T, D, V as concrete hints; T is what the other sizes leave."""
        value = self.node.meta["val"]
        width = product(tuple(value.shape)) // self.rows
        op = arguments(self.node)
        g = next(op[n] for n in ("values", "grad_output", "src", "grad") if n in op)
        count = size_hint(product(tuple(g.meta["val"].shape)))  # type: ignore[union-attr]
        B, D = size_hint(examples), max(size_hint(width), 1)
        return B, max(count // max(B * D, 1), 1), D, size_hint(self.rows)

    def materialise(self, emit: Emitter) -> Node:
        ids, g = self.factors(emit)
        B, T, D = emit.shape(g)
        g = emit.cast(g, accumulate_dtype(g.meta["val"].dtype)) if not g.meta["val"].dtype.is_complex else g
        example = emit(torch.ops.prims.iota.default, emit.size(B), start=0, step=1, dtype=torch.int64,
                       device=ids.meta["val"].device, requires_grad=False)  # fmt: skip
        example = emit(aten.mul.Tensor, emit(aten.unsqueeze.default, example, 1), emit.size(self.rows))
        key = emit.view(emit(aten.add.Tensor, ids, example), [B * T])
        zeros = emit(aten.full.default, [emit.size(B * self.rows), emit.size(D)], 0, dtype=g.meta["val"].dtype,
                     device=g.meta["val"].device, pin_memory=False)  # fmt: skip
        table = emit(aten.index_put.default, zeros, [key], emit.view(g, [B * T, D]), True)
        return emit.view(table, [B, *emit.shape(self.node)])


@dataclass(frozen=True, slots=True)
class Convolution(Contraction):
    """P_b = the weight gradient of one example's rows; ``node`` is result 1 of ``convolution_backward``."""

    g: Factor
    x: Factor

    def factors(self, emit: Emitter) -> tuple[Node, Node]:
        """grad_output (B, R, O, ...) and input (B, R, C, ...)."""
        return self.g.split(emit), self.x.split(emit)

    def rows(self, emit: Emitter) -> tuple[Node, Node]:
        """The factors, or grad_output (B, O, ...) and input (B, C, ...) as they are where R is 1."""
        one = all(known(f.node.meta["val"].shape[0] == emit.examples) for f in (self.g, self.x))
        return (self.g.node, self.x.node) if one else self.factors(emit)

    def materialise(self, emit: Emitter) -> Node:
        """The examples side by side as groups of one convolution."""
        op = arguments(self.node.args[0])  # type: ignore[arg-type]
        rest = [op[n] for n in ("stride", "padding", "dilation", "transposed", "output_padding")]
        value, (first, *kernel) = self.node.meta["val"], emit.shape(self.node)
        zero = emit(aten.full.default, [], 0, dtype=value.dtype, device=value.device, pin_memory=False)
        wide = emit(aten.expand.default, zero, [emit.size(s) for s in (emit.examples * first, *kernel)])
        groups = emit.size(emit.examples * op["groups"])
        rows = [self._side_by_side(emit, f) for f in self.factors(emit)]
        grads = emit(aten.convolution_backward.default, *rows, wide, None, *rest, groups, [False, True, False])
        return emit.view(emit(operator.getitem, grads, 1), [emit.examples, first, *kernel])

    def _side_by_side(self, emit: Emitter, rows: Node) -> Node:
        """(B, R, C, ...) -> (R, B*C, ...), copied: PyTorch fails on the strides that dimensions of size one may have."""
        B, R, C, *space = emit.shape(rows)
        front = emit.permute(rows, [1, 0, *range(2, len(space) + 3)])
        front = emit(aten.clone.default, front, memory_format=torch.contiguous_format)
        return emit(aten.view.default, front, [emit.size(s) for s in (R, B * C, *space)])


@dataclass(frozen=True, slots=True)
class Lifted(Contraction):
    """P_b = the op itself on one example, by ``torch.func.vmap``; the batched operands are ``factors``."""

    factors: tuple[Factor, ...]

    def materialise(self, emit: Emitter) -> Node:
        split = {f.node: f.split(emit) for f in self.factors}
        if self.node.target is not operator.getitem:
            return emit.lift(self.node, split, {a: emit.share(a) for a in joint_terms(self.node, split)})
        source, index = self.node.args
        flat, spec = tree_flatten((source.args, source.kwargs))  # type: ignore[union-attr]
        others = [a for a in dict.fromkeys(flat) if isinstance(a, Node) and a not in split]
        nodes = [*split, *others]

        def one(*values: Any) -> Any:
            env = dict(zip(nodes, values, strict=True))
            args, kwargs = tree_unflatten([env.get(a, a) if isinstance(a, Node) else a for a in flat], spec)
            return source.target(*args, **kwargs)[index]  # type: ignore[operator, union-attr]

        return _vmapped(emit, one, [*split.values(), *others], (0,) * len(split) + (None,) * len(others))


def _vmapped(emit: Emitter, function: Any, inputs: list[Node], in_dims: tuple[int | None, ...]) -> Node:
    batched = torch.func.vmap(function, in_dims=in_dims, randomness="same")
    with emit.fake_mode:
        traced = make_fx(batched, decomposition_table=select_decomp_table())(*[n.meta["val"] for n in inputs])
    return emit.inline(traced.graph, inputs)


def joint_terms(node: Node, summed: Collection[Node]) -> list[Node]:
    """Tensors that the op adds to those in ``summed``: they belong to all examples alike."""
    bound = {k: v if isinstance(v, (list, tuple)) else [v] for k, v in arguments(node).items()}
    names = {k for k, values in bound.items() if any(a in summed for a in values if isinstance(a, Node))}
    group = next((g for g in LINEAR.get(node.target, ()) if names <= g), frozenset())
    terms = [a for k in group for a in bound[k] if isinstance(a, Node) and a not in summed]
    return [a for a in terms if isinstance(a.meta.get("val"), torch.Tensor)]
