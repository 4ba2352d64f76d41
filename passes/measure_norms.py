"""The norms of a norm layer's contributions: one op computes them, the gradients of scale and shift, and that of the input.

    backward(g, x, mean, rstd, w) -> dx, dw, db     ->     norm_backward(g, x, mean, rstd, w) -> dx, dw, db, |dw_b|^2, |db_b|^2

The op takes [B, T, D]. Examples folded elsewhere are put in front, and the gradients back to where they were.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.fx import Node

from gnsfx._torch import known
from gnsfx.passes.contractions import Contraction
from gnsfx.passes.emit import Emitter, narrow
from gnsfx.passes.norm_layers import NormGradient, in_order, memory_order
from gnsfx.passes.propagate import States
from gnsfx.passes.record import Record
from gnsfx.passes.rules.table import arguments
from gnsfx.passes.select_path import Planner
from gnsfx.passes.stacks import Stacks
from gnsfx.passes.state import Batched, Size, product

aten, ops = torch.ops.aten, torch.ops.gnsfx


@dataclass(frozen=True, slots=True)
class NormLayer:
    """The backward of one norm layer. ``normalized``: how many trailing dimensions are one row.

    Attributes:
        at: where the op is written; all of its operands come before.
        gradients: result of our op (0 dx, 1 scale, 2 shift) -> the nodes that it replaces, None where nobody reads it.
        vanish: nodes whose value becomes part of dx.
    """

    at: Node
    g: Node
    x: Node
    mean: Node | None
    rstd: Node
    weight: Node | None
    normalized: int
    gradients: Mapping[int, Node]
    vanish: tuple[Node, ...] = ()


def layer_of(backward: Node) -> NormLayer:
    """A backward that was not decomposed."""
    op = arguments(backward)
    gradients = {int(user.args[1]): user for user in backward.users if user.users}  # type: ignore[arg-type]
    return NormLayer(
        backward, op["grad_out"], op["input"], op.get("mean"), op["rstd"], op["weight"],
        len(op["normalized_shape"]), gradients,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Norms:
    """``spelled``: gradient of a scale -> its layer, for layers that are written out in the graph."""

    emit: Emitter
    planner: Planner
    states: States
    stacks: Stacks
    spelled: Mapping[Node, NormLayer] = field(default_factory=dict)
    _written: dict[Node, Node] = field(default_factory=dict)

    def measures(self, found: Contraction) -> bool:
        return isinstance(found, NormGradient) or found.node in self.spelled

    def measure(self, record: Record, found: Contraction) -> None:
        if isinstance(found, NormGradient):
            backward, index = found.node.args
            assert isinstance(backward, Node) and isinstance(index, int)
            layer = None
        else:
            layer, index = self.spelled[found.node], 1
            backward = layer.at
        if backward not in self._written:
            self._written[backward] = self._write(layer or layer_of(backward))
        both = self._written[backward]
        record.take(self.planner.norm_layer(both.args[1].meta["val"]))  # type: ignore[union-attr]
        with self.emit.at(backward):
            record.sq_norm = self.emit.add_parts(self.emit(operator.getitem, both, index + 2))

    def _write(self, layer: NormLayer) -> Node:
        emit, state = self.emit, self.states[layer.x]
        assert isinstance(state, Batched)
        with emit.at(layer.at):
            x, g = (self._rows(n, state, layer.normalized) for n in (layer.x, narrow(layer.g)))
            shape = emit.shape(x)[:2]
            root = layer.rstd
            if root.target is aten.sqrt.default:
                root = emit(aten.reciprocal.default, root)
            mean, rstd = (n if n is None else self._statistic(n, state, shape) for n in (layer.mean, root))
            weight = layer.weight if layer.weight is None else self._flat(layer.weight)
            swapped = _positions_first(layer, state)
            both = emit(ops.norm_backward.default, g, x, mean, rstd, weight, 2 in layer.gradients, swapped)
            for index, node in layer.gradients.items():
                value = emit(operator.getitem, both, index)
                if index == 0:
                    value = self._back(value, state, layer)
                self.stacks.replace(node, value)
            for node in layer.vanish:
                like = node.meta["val"]
                zero = emit(aten.full.default, [], 0, dtype=like.dtype, device=like.device, pin_memory=False)
                zeros = emit(aten.expand.default, zero, [emit.size(s) for s in emit.shape(node)])
                self.stacks.replacements.append((node, zeros))
        return both

    def _rows(self, node: Node, state: Batched, normalized: int) -> Node:
        """(..., outer*B*inner, ..., *normalized) -> [B, T, D]."""
        split = self.emit.split(node, state)
        shape = self.emit.shape(split)
        axis = len(shape) - normalized
        return self._merged(split, [1, axis, len(shape)])

    def _statistic(self, node: Node, state: Batched, rows: tuple[Size, ...]) -> Node:
        split = self.emit.split(node, state)
        return self.emit.view(self._merged(split, [1, len(self.emit.shape(split))]), rows)

    def _merged(self, node: Node, ends: list[int]) -> Node:
        """Dimensions merged in runs that end before ``ends``; copied where they do not follow each other in memory.

        To ask PyTorch whether a view of symbolic sizes is possible may add guards, and it says yes where it is not.
        """
        shape, value = self.emit.shape(node), node.meta["val"]
        runs = [range(a, b) for a, b in pairwise([0, *ends])]
        apart = any(
            not known(value.stride(a) == shape[b] * value.stride(b))
            for run in runs
            for a, b in pairwise([d for d in run if not known(shape[d] == 1)])
        )
        if apart:
            node = self.emit(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.emit.view(node, [product([shape[d] for d in run]) for run in runs])

    def _flat(self, weight: Node) -> Node:
        return self.emit.view(weight, [product(self.emit.shape(weight))])

    def _back(self, dx: Node, state: Batched, layer: NormLayer) -> Node:
        """[B, T, D] -> the shape of the input, lying in memory as it was traced."""
        emit, shape, dim = self.emit, self.emit.shape(layer.x), state.dim
        fold = [] if _alone(state) else [state.outer, state.inner]
        outer = dim + 1 if fold else dim  # dimensions in front of the examples
        parts = emit.view(dx, [emit.examples, *shape[:dim], *fold, *shape[dim + 1 :]])
        rest = len(emit.shape(parts))
        value = emit.permute(parts, [*range(1, outer + 1), 0, *range(outer + 1, rest)])
        if fold:
            value = self._merged(value, [*range(1, dim + 1), *range(dim + 3, rest + 1)])
        order = memory_order(layer.gradients[0].meta["val"])
        if order is None or in_order(value.meta["val"], order):
            return value
        value = emit(aten.clone.default, emit.permute(value, order), memory_format=torch.contiguous_format)
        return emit.permute(value, [order.index(d) for d in range(len(order))])


def _positions_first(layer: NormLayer, state: Batched) -> bool:
    """Whether dx of shape (B, T, ..) or (T, B, ..) is to lie in memory with the positions first."""
    dx = layer.gradients.get(0)
    if dx is None or dx.meta["val"].dim() - layer.normalized != 2 or not _alone(state):
        return False
    order = memory_order(dx.meta["val"])
    return order is not None and order.index(1 - state.dim) < order.index(state.dim)


def _alone(state: Batched) -> bool:
    return known(state.outer == 1) and known(state.inner == 1)
