"""Contractions: the nodes where *batched* turns into *partial*, as records the planner and the rewrite understand.

    mm((I, B*T), (B*T, O))                         Matmul       P_b = x_b^T g_b
    sum((B, T, D), [0, 1])                         Reduction    P_b = sum_t g_bt
    index_put(zeros, ids, g, accumulate)           Lookup       P_b = onehot(ids_b)^T g_b
    convolution_backward(g, x, w)[1]               Convolution  P_b = the same op on one example
    anything else whose rule says partial          Lifted       P_b = the op under torch.func.vmap

Each record can ``materialise`` the stack of all P_b, (B, *shape of the node).
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

from gnsfx._torch import select_decomp_table, size_hint, tree_flatten, tree_unflatten
from gnsfx.passes.emit import Emitter, accumulate_dtype
from gnsfx.passes.propagate import States
from gnsfx.passes.rules.indexing import Layout
from gnsfx.passes.rules.reductions import SUMS, removed
from gnsfx.passes.rules.table import LINEAR, Op, arguments, overloads
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
        if x.meta["val"].dim() == 3:
            x, g = emit(aten.unsqueeze.default, x, 1), emit(aten.unsqueeze.default, g, 1)
        return emit.permute(x, [0, 1, 3, 2]), g

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
        op = arguments(self.node)
        shape = emit.shape(self.node)
        split = self.g.split(emit)
        dims = removed(Op(self.node, {}, emit.examples, True))
        dtype = accumulate_dtype(self.node.meta["val"].dtype)
        if self.node.meta["val"].dtype.is_complex:
            total = emit(aten.sum.dim_IntList, split, [d + 1 for d in dims])
        else:
            total = emit(aten.sum.dim_IntList, split, [d + 1 for d in dims], False, dtype=dtype)
        if "mean" in str(self.node.target):
            count = product([emit.shape(op["self"])[d] for d in dims])
            total = emit(aten.div.Tensor, total, emit.size(count))
        return emit.view(total, [emit.examples, *shape])


@dataclass(frozen=True, slots=True)
class Lookup(Contraction):
    """P_b = onehot(ids_b)^T g_b; ``ids`` (B, T) row numbers and ``g`` (B, T, D) are written by ``factors``."""

    build: Callable[[Emitter], tuple[Node, Node]]
    rows: Size

    def factors(self, emit: Emitter) -> tuple[Node, Node]:
        return self.build(emit)

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


# ------------------------------------------------------------------------------------------------------- the table

Builder = Callable[[Node, States], Contraction | None]
CONTRACTIONS: dict[Any, Builder] = {}


def contraction(*targets: Any) -> Callable[[Builder], Builder]:
    def enter(builder: Builder) -> Builder:
        CONTRACTIONS.update(dict.fromkeys(targets, builder))
        return builder

    return enter


def find_batched(node: Node, states: States) -> Contraction | None:
    """The record of a node whose operands are batched and whose result is partial, else None."""
    op = node.args[0] if node.target is operator.getitem else node
    assert isinstance(op, Node)
    batched = [n for n in dict.fromkeys(op.all_input_nodes) if isinstance(states.get(n), Batched)]
    if not batched:
        return None
    builder = CONTRACTIONS.get((op.target, node.args[1]) if op is not node else op.target)
    found = builder(node, states) if builder else None
    return found or Lifted(node, tuple(Factor(n, states[n]) for n in batched))


@contraction(*overloads("aten.mm.default", "aten.bmm.default"))
def matmul_contraction(node: Node, states: States) -> Contraction | None:
    a, b = node.args
    assert isinstance(a, Node) and isinstance(b, Node)
    last = node.meta["val"].dim() - 1  # the contracted dimension is the last one of a and the one before of b
    found = next(s for n in (a, b) if isinstance(s := states.get(n), Batched))
    return Matmul(node, Factor(a, found.at(last)), Factor(b, found.at(last - 1)))


@contraction(*SUMS)
def sum_contraction(node: Node, states: States) -> Contraction | None:
    g = node.args[0]
    assert isinstance(g, Node)
    return Reduction(node, Factor(g, states[g]))


@contraction((aten.convolution_backward.default, 1))
def convolution_contraction(node: Node, states: States) -> Contraction | None:
    op = arguments(node.args[0])  # type: ignore[arg-type]
    found = next(s for n in ("grad_output", "input") if isinstance(s := states.get(op[n]), Batched))
    return Convolution(node, Factor(op["grad_output"], found), Factor(op["input"], found))


@contraction((aten.convolution_backward.default, 2))
def convolution_bias_contraction(node: Node, states: States) -> Contraction | None:
    g = arguments(node.args[0])["grad_output"]  # type: ignore[arg-type]
    state = states.get(g)
    return BiasReduction(node, Factor(g, state)) if isinstance(state, Batched) else None


@dataclass(frozen=True, slots=True)
class BiasReduction(Contraction):
    """P_b = sum over rows and space of the output gradient (rows, O, ...)."""

    g: Factor

    def materialise(self, emit: Emitter) -> Node:
        split = self.g.split(emit)  # (B, R, O, ...)
        dims = [1, *range(3, split.meta["val"].dim())]
        return emit(aten.sum.dim_IntList, split, dims, False, dtype=accumulate_dtype(split.meta["val"].dtype))


@contraction(*overloads("aten._trilinear.default"))
def trilinear_contraction(node: Node, states: States) -> Contraction | None:
    """A shared operand that has the examples' dimension is split as well: whole, it would broadcast against one example."""
    op = arguments(node)
    inserted = {op[f"i{k}"]: op[f"expand{k}"] for k in "123"}
    found, at = next((s, a) for a in inserted if isinstance(s := states.get(a), Batched))
    dim = [d for d in range(node.args[0].meta["val"].dim() + len(op["expand1"])) if d not in inserted[at]][found.dim]  # type: ignore[union-attr]
    having = [a for a, dims in inserted.items() if dim not in dims]
    return Lifted(node, tuple(Factor(a, found.at(dim - sum(d < dim for d in inserted[a]))) for a in having))


@contraction(*overloads("aten.embedding_dense_backward.default"))
def embedding_contraction(node: Node, states: States) -> Contraction | None:
    op = arguments(node)
    g, ids, padding = op["grad_output"], op["indices"], op["padding_idx"]
    state = next(s for n in (g, ids) if isinstance(s := states.get(n), Batched))

    def build(emit: Emitter) -> tuple[Node, Node]:
        index = emit.split(ids, state)
        keep = emit(aten.unsqueeze.default, emit(aten.ne.Scalar, index, padding), -1)
        return flat(emit, index, emit.split(g, state), index.meta["val"].dim() - 1, keep)

    return Lookup(node, build, op["num_weights"])


@contraction(
    *overloads(
        "aten.index_put.default", "aten._unsafe_index_put.default", "aten._unsafe_masked_index_put_accumulate.default"
    )
)
def index_put_contraction(node: Node, states: States) -> Contraction | None:
    """Leading dimensions indexed by batched or shared indices, values batched inside the index dimensions."""
    op = arguments(node)
    table, indices, values, mask = op["self"], op["indices"], op["values"], op.get("mask")
    layout = Layout(Op(node, states, 1, True), indices)
    count, width = len(layout.nodes), len(layout.shape)
    rest = table.meta["val"].shape[count:]
    state = next((s for n in (values, *layout.nodes) if isinstance(s := states.get(n), Batched)), None)
    plain = layout.where == list(range(count)) and values.meta["val"].dim() == width + len(rest) and not layout.masks
    if state is None or not plain or not zeros(table):
        return None
    at = states[values].dim if isinstance(states.get(values), Batched) else None
    if at is None:
        node_ = next(n for n in layout.nodes if isinstance(states.get(n), Batched))
        at = states[node_].dim + width - node_.meta["val"].dim()
    if at >= width:
        return None
    sizes = table.meta["val"].shape[:count]

    def build(emit: Emitter) -> tuple[Node, Node]:
        row: Node | None = None
        for index, size in zip(layout.nodes, sizes, strict=True):
            if mask is None:
                index = own_rows(emit, index, size)
            row = index if row is None else emit(aten.add.Tensor, emit(aten.mul.Tensor, row, emit.size(size)), index)
        assert row is not None
        row = emit(aten.expand.default, row, [emit.size(s) for s in layout.shape])
        here = state.at(at)
        keep = mask
        if keep is not None:
            keep = emit(aten.expand.default, keep, [emit.size(s) for s in (*layout.shape, *[1] * len(rest))])
            keep = emit.split(keep, here)
        shape = (*layout.shape, *rest)
        g = emit(aten.expand.default, values, [emit.size(s) for s in shape])
        return flat(emit, emit.split(row, here), emit.split(g, here), width, keep)

    return Lookup(node, build, product(sizes))


def own_rows(emit: Emitter, index: Node, size: Size) -> Node:
    """``index_put`` takes negative indices: -1 and size - 1 are one row."""
    wrapped = emit(aten.add.Tensor, index, emit.size(size))
    return emit(aten.where.self, emit(aten.lt.Scalar, index, 0), wrapped, index)


def joint_terms(node: Node, summed: Collection[Node]) -> list[Node]:
    """Tensors that the op adds to those in ``summed``: they belong to all examples alike."""
    bound = {k: v if isinstance(v, (list, tuple)) else [v] for k, v in arguments(node).items()}
    names = {k for k, values in bound.items() if any(a in summed for a in values if isinstance(a, Node))}
    group = next((g for g in LINEAR.get(node.target, ()) if names <= g), frozenset())
    terms = [a for k in group for a in bound[k] if isinstance(a, Node) and a not in summed]
    return [a for a in terms if isinstance(a.meta.get("val"), torch.Tensor)]


def zeros(table: Node) -> bool:
    """Whether a value is zero everywhere, so that what is written into it is all there is."""
    if table.target in (aten.full.default, aten.full_like.default):
        return bool(table.args[1] == 0)
    return table.target in (aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)


def flat(emit: Emitter, ids: Node, g: Node, width: int, keep: Node | None) -> tuple[Node, Node]:
    """ids (B, ...) and g (B, ..., *rest) -> (B, T) and (B, T, D); rows that ``keep`` leaves out become zeros in row 0."""
    shape = emit.shape(g)
    T, D = product(shape[1 : width + 1]), product(shape[width + 1 :])
    if keep is not None:
        ids, g = without(emit, ids, g, keep)
    return emit.view(ids, [shape[0], T]), emit.view(g, [shape[0], T, D])


def without(emit: Emitter, ids: Node, g: Node, keep: Node) -> tuple[Node, Node]:
    """Rows that ``keep`` (*ids.shape, 1, ...) leaves out become zeros in row 0."""
    zero, none = ({"dtype": n.meta["val"].dtype, "device": n.meta["val"].device, "pin_memory": False} for n in (g, ids))
    g = emit(aten.where.self, keep, g, emit(aten.full.default, [], 0, **zero))
    filler = emit(aten.full.default, [], 0, **none)
    return emit(aten.where.self, emit.view(keep, list(emit.shape(ids))), ids, filler), g
