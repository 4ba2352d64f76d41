"""Contraction records: the stack of P_b that each writes into the graph, against one example at a time.

The truth takes the op as it stands and zeroes the gradient of all other examples.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node

import gnsfx.kernels.ops  # noqa: F401  (defines torch.ops.gnsfx)
from gnsfx.passes.contractions import (
    BiasReduction,
    Contraction,
    Convolution,
    Lifted,
    Lookup,
    Matmul,
    Reduction,
)
from gnsfx.passes.emit import Emitter
from gnsfx.passes.norm_layers import NormGradient
from gnsfx.passes.state import Batched
from gnsfx.passes.terms import find_contraction

aten = torch.ops.aten
DTYPES = st.sampled_from([torch.float64, torch.float32])
SIZE = st.integers(1, 3)
examples = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@dataclass(frozen=True)
class Fold:
    """A batched dimension of size outer*B*inner."""

    outer: int
    B: int
    inner: int

    @property
    def rows(self) -> int:
        return self.outer * self.B * self.inner

    def at(self, dim: int) -> Batched:
        return Batched(dim, self.outer, self.inner)

    def only(self, value: Tensor, dim: int, b: int) -> Tensor:
        """``value`` with the rows of all examples but one zeroed."""
        mine = torch.arange(self.rows) // self.inner % self.B == b
        return value * mine.view([-1 if d == dim else 1 for d in range(value.dim())])


FOLDS = st.builds(Fold, SIZE, SIZE, SIZE)


class OneOp:
    """A graph of one op. ``batched`` gives the states of its inputs by position, ``linear`` the positions whose rows of
    other examples may be zeroed to leave one example alone."""

    def __init__(
        self,
        fold: Fold,
        target: Any,
        args: list[Any],
        batched: dict[int, Batched],
        linear: list[int],
        result: int | None = None,
    ) -> None:
        self.fold, self.target, self.args, self.batched, self.linear, self.result = (
            fold,
            target,
            args,
            batched,
            linear,
            result,
        )
        self.graph, self.mode = Graph(), FakeTensorMode()
        self.inputs: dict[Node, Tensor] = {}
        self.at: dict[int, Node] = {}
        nodes = [self._input(i, a) for i, a in enumerate(args)]
        self.node = self._call(target, tuple(nodes))
        if result is not None:
            self.node = self._call(operator.getitem, (self.node, result))
        self.output = self.graph.output((self.node,))
        self.states = {self.at[i]: state for i, state in batched.items()}

    def _input(self, position: int, value: Any) -> Any:
        if isinstance(value, list) and value and all(v is None or isinstance(v, Tensor) for v in value):
            return [None if v is None else self._input(position, v) for v in value]
        if not isinstance(value, Tensor):
            return value
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        node.meta["val"] = self.mode.from_tensor(value)
        self.inputs[node] = value
        self.at[position] = node
        return node

    def _call(self, target: Any, args: tuple[Any, ...]) -> Node:
        node = self.graph.call_function(target, args)
        pick = lambda a: a.meta["val"] if isinstance(a, Node) else a  # noqa: E731
        with self.mode:
            node.meta["val"] = target(*torch.fx.node.map_arg(args, pick))
        return node

    def alone(self, b: int) -> Tensor:
        values = dict(self.inputs.items())
        for position in self.linear:
            node = self.at[position]
            values[node] = self.fold.only(values[node], self.batched[position].dim, b)
        found = Interpreter(GraphModule(torch.nn.Module(), self.graph)).run(*values.values())
        return found[0]

    def check(self, kind: type[Contraction]) -> None:
        truth = torch.stack([self.alone(b) for b in range(self.fold.B)])
        found = find_contraction(self.node, self.states)
        assert type(found) is kind, found
        emit = Emitter(self.graph, self.fold.B)
        with emit.at(self.output):
            stack = found.materialise(emit)
        self.output.args = ((stack,),)
        assert stack.meta["val"].shape == truth.shape
        value = Interpreter(GraphModule(torch.nn.Module(), self.graph)).run(*self.inputs.values())[0]
        tight = 1e-12 if truth.dtype is torch.float64 else 1e-5
        torch.testing.assert_close(value.to(truth.dtype), truth, rtol=tight, atol=tight)


def floats(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype)


@examples
@given(FOLDS, SIZE, SIZE, st.sampled_from(["both", "x", "g"]), DTYPES)
def test_mm(fold: Fold, I: int, O: int, batched: str, dtype: torch.dtype) -> None:
    states = {0: fold.at(1), 1: fold.at(0)}
    if batched != "both":
        states = {0: states[0]} if batched == "x" else {1: states[1]}
    args = [floats(dtype, I, fold.rows), floats(dtype, fold.rows, O)]
    OneOp(fold, aten.mm.default, args, states, list(states)[:1]).check(Matmul)


@examples
@given(FOLDS, SIZE, SIZE, SIZE, DTYPES)
def test_bmm(fold: Fold, E: int, I: int, O: int, dtype: torch.dtype) -> None:
    args = [floats(dtype, E, I, fold.rows), floats(dtype, E, fold.rows, O)]
    OneOp(fold, aten.bmm.default, args, {0: fold.at(2), 1: fold.at(1)}, [0]).check(Matmul)


@examples
@given(FOLDS, st.integers(0, 2), st.sets(st.integers(0, 2)), st.booleans(), st.booleans(), DTYPES)
def test_reduction(fold: Fold, dim: int, others: set[int], keepdim: bool, mean: bool, dtype: torch.dtype) -> None:
    sizes = [2, 3, 2]
    sizes[dim] = fold.rows
    op = aten.mean.dim if mean else aten.sum.dim_IntList
    args = [floats(dtype, *sizes), sorted({dim, *others}), keepdim]
    OneOp(fold, op, args, {0: fold.at(dim)}, [0]).check(Reduction)


@examples
@given(FOLDS, st.booleans(), DTYPES)
def test_reduction_of_everything(fold: Fold, mean: bool, dtype: torch.dtype) -> None:
    op = aten.mean.default if mean else aten.sum.default
    OneOp(fold, op, [floats(dtype, 2, fold.rows)], {0: fold.at(1)}, [0]).check(Reduction)


@examples
@given(FOLDS, SIZE, st.integers(0, 1), st.integers(-1, 3), DTYPES)
def test_embedding_dense_backward(fold: Fold, T: int, dim: int, padding: int, dtype: torch.dtype) -> None:
    lead = (fold.rows, T) if dim == 0 else (T, fold.rows)
    args = [floats(dtype, *lead, 2), torch.randint(4, lead), 4, padding, False]
    OneOp(fold, aten.embedding_dense_backward.default, args, {0: fold.at(dim), 1: fold.at(dim)}, [0]).check(Lookup)


@examples
@given(
    FOLDS, SIZE, st.integers(0, 1), st.sampled_from(["one", "two", "negative", "shared ids", "shared values"]), DTYPES
)
def test_index_put(fold: Fold, T: int, dim: int, kind: str, dtype: torch.dtype) -> None:
    lead = (fold.rows, T) if dim == 0 else (T, fold.rows)
    low = -4 if kind == "negative" else 0
    indices: list[Tensor | None] = [torch.randint(low, 4, lead)]
    table = torch.zeros(4, 2, dtype=dtype)
    if kind == "two":
        indices, table = [*indices, torch.randint(3, (lead[1],))], torch.zeros(4, 3, 2, dtype=dtype)
    values = floats(dtype, *lead, 2)
    one = OneOp(fold, aten.index_put.default, [table, indices, values, True], {2: fold.at(dim)}, [2])
    zero = one.node.graph.find_nodes(op="placeholder")[0]
    _zeros_in_graph(one, zero)
    if kind != "shared ids":
        first = next(n for n, v in one.inputs.items() if v is indices[0])
        one.states[first] = fold.at(dim)
    one.check(Lookup)


def _zeros_in_graph(one: OneOp, table: Node) -> None:
    """The table that a lookup's backward adds into is ``full(0)`` in a joint graph."""
    value = one.inputs.pop(table)
    with one.graph.inserting_before(next(n for n in one.graph.nodes if n.op == "call_function")):
        full = one.graph.call_function(aten.full.default, (list(value.shape), 0), {"dtype": value.dtype})
    full.meta["val"] = table.meta["val"]
    table.replace_all_uses_with(full)
    one.graph.erase_node(table)


@examples
@given(FOLDS, SIZE, st.booleans(), DTYPES)
def test_masked_index_put(fold: Fold, T: int, wide: bool, dtype: torch.dtype) -> None:
    lead, rest = (fold.rows, T), (2,) if wide else ()
    index, keep = torch.randint(-5, 9, lead), torch.rand(lead) > 0.2
    keep &= (index >= 0) & (index < 4)  # what the mask leaves out may point anywhere
    args = [
        torch.zeros(4, *rest, dtype=dtype),
        keep.view(*lead, *[1] * len(rest)),
        [index],
        floats(dtype, *lead, *rest),
    ]
    one = OneOp(
        fold, aten._unsafe_masked_index_put_accumulate.default, args, {1: fold.at(0), 2: fold.at(0), 3: fold.at(0)}, [3]
    )
    _zeros_in_graph(one, one.node.graph.find_nodes(op="placeholder")[0])
    one.check(Lookup)


@examples
@given(FOLDS, SIZE, DTYPES)
def test_scatter_add_and_inner_indices_are_lifted(fold: Fold, T: int, dtype: torch.dtype) -> None:
    args = [torch.zeros(4, T, dtype=dtype), 0, torch.randint(4, (fold.rows, T)), floats(dtype, fold.rows, T)]
    OneOp(fold, aten.scatter_add.default, args, {2: fold.at(0), 3: fold.at(0)}, [3]).check(Lifted)
    args = [torch.zeros(2, 4, dtype=dtype), [None, torch.randint(4, (fold.rows,))], floats(dtype, 2, fold.rows), True]
    one = OneOp(fold, aten.index_put.default, args, {2: fold.at(1)}, [2])
    one.states[one.at[1]] = fold.at(0)
    one.check(Lifted)


@st.composite
def convolutions(draw: Any) -> tuple[Any, ...]:
    n = draw(st.integers(1, 3))
    groups, transposed = draw(st.sampled_from([1, 2, 4])), draw(st.booleans())
    each = lambda low, high: [draw(st.integers(low, high)) for _ in range(n)]  # noqa: E731
    kernel, stride, padding, dilation = each(1, 3), each(1, 2), each(0, 2), each(1, 2)
    extra = [draw(st.integers(0, s - 1)) for s in stride] if transposed else [0] * n
    return kernel, stride, padding, dilation, transposed, extra, groups, draw(st.booleans())


def convolve(fold: Fold, conv: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    kernel, stride, padding, dilation, transposed, extra, groups, last = conv
    C, O, n = 4, 8, len(kernel)
    x = floats(dtype, fold.rows, C, *[5 + d for d in range(n)])
    weight = floats(dtype, C, O // groups, *kernel) if transposed else floats(dtype, O, C // groups, *kernel)
    if last and n == 2:
        x, weight = x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last)
    rest = [stride, padding, dilation, transposed, extra, groups]
    try:
        g = torch.randn_like(aten.convolution.default(x, weight, None, *rest))
    except RuntimeError:  # the kernel is larger than the padded input, or the result is empty
        return []
    return [g, x, weight, [O], *rest, [True, True, True]] if g.numel() else []


@settings(examples, max_examples=20)
@given(FOLDS, convolutions(), DTYPES)
def test_convolution(fold: Fold, conv: tuple[Any, ...], dtype: torch.dtype) -> None:
    args = convolve(fold, conv, dtype)
    if args:
        states = {0: fold.at(0), 1: fold.at(0)}
        OneOp(fold, aten.convolution_backward.default, args, states, [0], result=1).check(Convolution)
        OneOp(fold, aten.convolution_backward.default, args, states, [0], result=2).check(BiasReduction)


@examples
@given(FOLDS, st.integers(0, 1), DTYPES)
def test_normalisation_is_lifted(fold: Fold, dim: int, dtype: torch.dtype) -> None:
    lead = (fold.rows, 2) if dim == 0 else (2, fold.rows)
    x, g, at = floats(dtype, *lead, 3), floats(dtype, *lead, 3), fold.at(dim)
    args = [
        g,
        x,
        [3],
        floats(dtype, *lead, 1),
        floats(dtype, *lead, 1).abs(),
        floats(dtype, 3),
        floats(dtype, 3),
        [True] * 3,
    ]
    for result in (1, 2):
        states = {0: at, 1: at, 3: at, 4: at}
        OneOp(fold, aten.native_layer_norm_backward.default, args, states, [0], result).check(NormGradient)


@examples
@given(FOLDS, DTYPES)
def test_vectors_are_lifted(fold: Fold, dtype: torch.dtype) -> None:
    args = [floats(dtype, 2, fold.rows), floats(dtype, fold.rows)]
    OneOp(fold, aten.mv.default, args, {0: fold.at(1), 1: fold.at(0)}, [0]).check(Lifted)
    args = [floats(dtype, fold.rows), floats(dtype, fold.rows)]
    OneOp(fold, aten.dot.default, args, {0: fold.at(0), 1: fold.at(0)}, [0]).check(Lifted)
