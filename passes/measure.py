"""The rewrite: for one parameter's gradient, nodes that compute s_b = |f(P_b)|^2 for every example b.

    permutation of one contraction     s_b = |P_b|^2                 on the path with the lowest cost
    sum of contractions                s_b = |sum_i P_ib|^2          one longer contraction, or the tied kernel
    any other linear map f             s_b = |f(P_b)|^2              f lifted over the stack of all P_b
    shared (a term no example owns)    s_b = |g|^2 / B^2             each example gets 1/B of it, before squaring
    batched (a row per example)        s_b = |g_b|^2
    mixed                              refused, with the node's reason and the user's source line

Numerics: the gradient itself changes by rounding at most (a sum over examples in fp32, fp64 for fp64); on the paths
outer, ghost and segments, and for bf16 and fp16 on all, it keeps its bits, because the contraction stays as it is.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import replace

import torch
from torch.fx import Node

from gnsfx._torch import known, size_hint
from gnsfx.errors import GraphError
from gnsfx.passes.bags import RaggedBags
from gnsfx.passes.contractions import (
    BiasReduction,
    Convolution,
    Lookup,
    Matmul,
    Reduction,
    own_rows,
    without,
    zeros,
)
from gnsfx.passes.emit import Emitter, accumulate_dtype
from gnsfx.passes.entries import STACKED, sum_entries
from gnsfx.passes.joint_graph import JointGraph
from gnsfx.passes.propagate import States
from gnsfx.passes.record import Record, refuse
from gnsfx.passes.rules.indexing import Layout
from gnsfx.passes.rules.table import Op, arguments
from gnsfx.passes.segments import RoutedLookup, RoutedMatmul, RoutedSum, expression, sq_norm_of_sum
from gnsfx.passes.select_path import Choice, Planner
from gnsfx.passes.stacks import Stacks, rounds
from gnsfx.passes.state import Batched, Mixed, Partial, Routed, Shared, product, same_sizes
from gnsfx.passes.terms import Term, find_terms, peel

aten, ops = torch.ops.aten, torch.ops.gnsfx
PUTS = (aten.index_put.default, aten._unsafe_index_put.default, aten._unsafe_masked_index_put_accumulate.default)


class Measurer:
    """Writes the measurements of one graph. Contractions are rewritten once, however many gradients use them."""

    def __init__(self, view: JointGraph, states: States, emit: Emitter, planner: Planner) -> None:
        self.view, self.states, self.emit, self.planner = view, states, emit, planner
        self._gathered: set[Node] = set()  # tables from which all examples look up the same rows
        self._singles: dict[Node, Record] = {}
        self.stacks = Stacks(states, emit)
        self._without_weight: list[Node] = []

    def apply(self) -> None:
        """Put the rewritten gradients in place. Until then the graph reads as it was traced."""
        self.stacks.apply()
        for backward in self._without_weight:
            mask = [arguments(backward)["output_mask"][0], False, arguments(backward)["output_mask"][2]]
            backward.args = (*backward.args[:10], mask)
            kept = zip(backward.meta["val"], mask, strict=True)
            backward.meta["val"] = tuple(value if keep else None for value, keep in kept)

    def measure(self, record: Record, gradient: Node) -> Record:
        """Write the measurement of one gradient, or refuse it: a defect here must not stop anybody's training."""
        written, masked = len(self.stacks.replacements), len(self._without_weight)
        try:
            found = self._measure(record, gradient)
            if found.sq_norm is not None and known(found.sq_norm.meta["val"].shape[0] != self.emit.examples):
                raise GraphError("its norms are not one per example")
            return found
        except Exception as error:
            del self.stacks.replacements[written:], self._without_weight[masked:]
            record.sq_norm = None
            return refuse(record, Mixed(f"measuring it failed with {type(error).__name__}: {error}", gradient))

    def _measure(self, record: Record, gradient: Node) -> Record:
        if known(self.emit.examples == 1):  # the one example owns the whole gradient, however it was computed
            with self.emit.at(self.view.output):
                record.operation, record.path = str(gradient.target).removeprefix("aten."), "whole"
                record.sq_norm = self.emit.square(self.emit(aten.unsqueeze.default, gradient, 0))
            return record
        state = self.states.get(gradient, Shared())
        if isinstance(state, tuple):
            state = Mixed("a tuple is returned as a gradient", gradient)
        if isinstance(state, Shared) and state.doubt:
            state = Mixed(f"the gradient passes through no batched input: {state.doubt}", gradient)
        if isinstance(state, Mixed):
            return refuse(record, state)
        if isinstance(state, Partial):
            return self._partial(record, gradient)
        with self.emit.at(self.view.output):
            if isinstance(state, Batched):
                record.operation, record.path = "one row per example", "rows"
                record.sq_norm = self.emit.square(self.emit.split(gradient, state))
            elif isinstance(state, Routed):
                record.operation, record.path = "rows chosen by data", "rows"
                own = [gradient, list(state.dims), *expression(self.emit, state.ids)]
                record.sq_norm = self.emit.square(self.emit(ops.mask_by_example.default, *own))
            else:
                record.operation, record.path = "term of no example", "shared"
                record.sq_norm = self._of_all(gradient)
        return record

    def entries(self, record: Record, gradient: Node) -> Node | None:
        """sum_b c_b^2 of every number, where measuring the record gave it; see :mod:`gnsfx.passes.entries`."""
        if record.sq_norm is None:
            return None
        written, path = len(self.stacks.replacements), record.path
        stack = self.stacks.of if path in STACKED or (path == "segments" and self._gathers(gradient)) else None
        try:
            with self.emit.at(self.view.output):
                return sum_entries(gradient, path, self.states, self.emit, stack)
        except Exception:
            del self.stacks.replacements[written:]
            return None

    def _gathers(self, gradient: Node) -> bool:
        """Whether all examples look up the same rows, so that the rows of each are there, and its table is small enough."""
        value = gradient.meta["val"]
        size = size_hint(self.emit.examples) * size_hint(value.numel()) * accumulate_dtype(value.dtype).itemsize
        return peel(gradient)[0] in self._gathered and size <= self.planner.memory

    # ------------------------------------------------------------------------------------------- partial gradients

    def _partial(self, record: Record, gradient: Node) -> Record:
        terms = find_terms(gradient, self.states)
        if terms and (done := self._routed_table(record, terms)):
            return done
        if terms and len(terms) == 1:
            return self._single(record, terms[0])
        if terms and (done := self._combined(record, terms)):
            with self.emit.at(self.view.output):
                done.sq_norm = self._scaled(done.sq_norm, terms[0].outer)
            return done
        leaf, scale, _ = peel(gradient)
        record.operation = str(leaf.target).removeprefix("aten.").removesuffix(".default")
        with self.emit.at(self.view.output):
            lookup = self._lookup_of_partial(leaf)
            if lookup is not None:
                record.path = "segments"
                self._gathered.add(leaf)
                record.sq_norm = self._scaled(self.emit(ops.embedding_sq_norm.default, *lookup), scale)
                return record
            record.path = "lift"
            stack = self.stacks.of(gradient)
            record.sq_norm = self.emit.square(stack)
        record.reason = self.planner.memory_note(stack.meta["val"])
        return record

    def _routed_table(self, record: Record, terms: list[Term]) -> Record | None:
        """A table that routed rows look up, and perhaps are multiplied with; one product alone has a path of its own."""
        scalar = terms[0].contraction.node.meta["val"].dim() == 0
        if scalar or (len(terms) == 1 and not isinstance(terms[0].contraction, RoutedLookup)):
            return None
        with self.emit.at(self.view.output):
            norms = sq_norm_of_sum(self.emit, terms, terms[0].contraction.node.meta["val"].shape[0])
            if norms is None:
                return None
            norms = self._scaled(norms, terms[0].outer)
        record.operation = " + ".join(t.contraction.operation for t in terms)
        record.path, record.sq_norm = "segments", norms
        return record

    def _single(self, record: Record, term: Term) -> Record:
        found = term.contraction
        record.operation = found.operation
        known_ = self._singles.get(found.node)
        if known_ is not None:  # two parameters added to one weight have the same gradient
            record.path, record.costs, record.sq_norm = known_.path, known_.costs, known_.sq_norm
        elif isinstance(found, Matmul) and not found.node.meta["val"].dtype.is_complex:
            choice = self.planner.matmul(found)
            self._matmul(record, choice, found.node, *self._factors(found))
        elif isinstance(found, Lookup) and not found.node.meta["val"].dtype.is_complex:
            record.path, record.costs = "segments", self.planner.lookup(found).costs
            with self.emit.at(found.node):
                record.sq_norm = self.emit(ops.embedding_sq_norm.default, *found.factors(self.emit))
        elif isinstance(found, Convolution) and not found.node.meta["val"].dtype.is_complex:
            record.path, record.costs = "convolution", self.planner.convolution(found).costs
            record.sq_norm = self._convolution(found)
        elif isinstance(found, (RoutedMatmul, RaggedBags)) and not found.node.meta["val"].dtype.is_complex:
            record.path = "segments"
            with self.emit.at(found.node):
                record.sq_norm = found.sq_norm(self.emit)
        else:
            record.path = "reduction" if isinstance(found, RoutedSum) else "lift"
            if isinstance(found, (Reduction, BiasReduction)):
                record.path, record.costs = "reduction", self.planner.reduction(found).costs
            with self.emit.at(found.node):
                record.sq_norm = self.emit.square(self.stacks.of(found.node))
        self._singles.setdefault(found.node, replace(record))
        with self.emit.at(self.view.output):
            record.sq_norm = self._scaled(record.sq_norm, term.scale)
        return record

    def _factors(self, found: Matmul) -> tuple[Node, Node]:
        with self.emit.at(found.node):
            return found.factors(self.emit)

    def _matmul(self, record: Record, choice: Choice, node: Node, x: Node, g: Node) -> None:
        """``node`` = sum_b x_b^T g_b (E, I, O up to a view) for x (B, E, T, I) and g (B, E, T, O)."""
        emit = self.emit
        record.path, record.costs = choice.path, choice.costs
        with emit.at(node):
            if choice.path == "outer":
                record.sq_norm = emit(aten.mul.Tensor, emit.square(x), emit.square(g))
            elif choice.path == "ghost":
                record.sq_norm = emit(ops.ghost_sq_norm.default, x, g)
            elif choice.path == "chunked" and rounds(node):
                record.sq_norm = emit(ops.product_sq_norm.default, x, g)
            elif choice.path == "chunked":
                both = emit(ops.mm_sq_norm.default, x, g)
                record.sq_norm = emit(operator.getitem, both, 1)
                self.stacks.replace(node, emit(operator.getitem, both, 0))
            else:
                (B, E, T, I), O = emit.shape(x), emit.shape(g)[-1]
                left = emit.view(emit.permute(x, [0, 1, 3, 2]), [B * E, I, T])
                stack = emit.view(emit(aten.bmm.default, left, emit.view(g, [B * E, T, O])), [B, E, I, O])
                self.stacks.keep(node, emit.view(stack, [B, *emit.shape(node)]))
                record.sq_norm = emit.square(stack)
                if not rounds(node):
                    self.stacks.replace_by_sum(node, stack)

    def _convolution(self, found: Convolution) -> Node:
        emit, backward = self.emit, found.node.args[0]
        assert isinstance(backward, Node)
        op = arguments(backward)
        with emit.at(found.node):
            g, x = found.factors(emit)
            both = emit(ops.convolution_sq_norm.default, g, x, op["weight"], *[op[n] for n in (
                "stride", "padding", "dilation", "transposed", "output_padding", "groups")])  # fmt: skip
            norms, weight = emit(operator.getitem, both, 1), emit(operator.getitem, both, 0)
        if rounds(found.node):
            return norms
        self.stacks.replace(found.node, weight)
        self._without_weight.append(backward)
        return norms

    # --------------------------------------------------------------------------------------- sums of several terms

    def _combined(self, record: Record, terms: list[Term]) -> Record | None:
        """A parameter used more than once: sum_i x_i^T g_i is one contraction over the concatenated positions."""
        matmuls = [t for t in terms if isinstance(t.contraction, Matmul)]
        lookups = [t for t in terms if isinstance(t.contraction, Lookup)]
        plain = all(t.transposed is not None and t.contraction.node.meta["val"].dim() == 2 for t in terms)
        complex_ = any(t.contraction.node.meta["val"].dtype.is_complex for t in terms)
        if len(matmuls) + len(lookups) < len(terms) or not plain or complex_ or any(t.transposed for t in lookups):
            return None
        root = terms[0].root
        with self.emit.at(root):
            dtype = functools.reduce(torch.promote_types, (t.contraction.node.meta["val"].dtype for t in terms))
            pairs = [self._oriented(t, dtype) for t in matmuls]
            x, g = (self._concatenate([p[i] for p in pairs], 2) for i in (0, 1)) if pairs else (None, None)
            looked = [self._looked_up(t, dtype) for t in lookups]
            ids, rows = (self._concatenate([p[i] for p in looked], 1) for i in (0, 1)) if looked else (None, None)
            record.operation = " + ".join(t.contraction.operation for t in terms)
            parts: list[Node] = []
            if ids is None:
                assert x is not None and g is not None
            elif x is None or g is None:
                record.path, record.sq_norm = "segments", self.emit(ops.embedding_sq_norm.default, ids, rows)
                return record
            else:  # the table is (V, D): x carries the rows, g the width
                squeezed = [self.emit(aten.squeeze.dim, f, 1) for f in (g, x)]
                if len(matmuls) > 1 or x.meta["val"].dtype != matmuls[0].contraction.node.meta["val"].dtype:
                    record.path, record.sq_norm = "tied", self.emit(ops.tied_sq_norm.default, ids, rows, *squeezed)
                    return record
                parts = [self.emit(ops.embedding_sq_norm.default, ids, rows)]
                parts.append(self.emit(aten.mul.Tensor, self.emit(ops.tied_cross.default, ids, rows, *squeezed), 2.0))
        if parts:
            return self._tied(record, matmuls[0], parts)
        assert x is not None and g is not None
        choice = self.planner.factors(x, g)
        self._matmul(record, choice, root, x, g)
        return record

    def _tied(self, record: Record, head: Term, parts: list[Node]) -> Record:
        """|E_b + H_b|^2 = |E_b|^2 + 2 <E_b, H_b> + |H_b|^2, the last on the cheapest path of the head's own contraction."""
        assert isinstance(head.contraction, Matmul)
        alone = self._single(replace(record), replace(head, transposed=False))
        record.path, record.costs = f"tied, {alone.path}", alone.costs
        with self.emit.at(self.view.output):
            total = alone.sq_norm
            for part in parts:
                total = self.emit(aten.add.Tensor, total, part)
            record.sq_norm = self.emit(aten.clamp_min.default, total, 0)
        return record

    def _oriented(self, term: Term, dtype: torch.dtype) -> tuple[Node, Node]:
        assert isinstance(term.contraction, Matmul)
        x, g = term.contraction.factors(self.emit)
        x, g = (g, x) if term.transposed else (x, g)
        g = self._scaled(g, term.scale, squared=False)
        return self.emit.cast(x, dtype), self.emit.cast(g, dtype)

    def _looked_up(self, term: Term, dtype: torch.dtype) -> tuple[Node, Node]:
        assert isinstance(term.contraction, Lookup)
        ids, g = term.contraction.factors(self.emit)
        return self.emit.cast(ids, torch.int64), self.emit.cast(self._scaled(g, term.scale, squared=False), dtype)

    def _concatenate(self, parts: list[Node], dim: int) -> Node:
        return parts[0] if len(parts) == 1 else self.emit(aten.cat.default, parts, dim)

    # --------------------------------------------------------------------------------------------------- helpers

    def _of_all(self, gradient: Node) -> Node:
        """(B,) of |g / B|^2."""
        emit = self.emit
        total = emit.square(emit(aten.unsqueeze.default, emit.share(gradient), 0))
        return emit(aten.expand.default, total, [emit.size(emit.examples)])

    def _lookup_of_partial(self, leaf: Node) -> tuple[Node, Node] | None:
        """Rows gathered once for the whole batch (position embeddings): ids are shared, the values are partial."""
        if leaf.target not in PUTS or leaf.meta["val"].dtype.is_complex:
            return None
        op = arguments(leaf)
        table, values = op["self"], op["values"]
        layout = Layout(Op(leaf, self.states, self.emit.examples, True), op["indices"])
        adds = zeros(table) and op.get("accumulate", True)
        shape = (*layout.shape, *self.emit.shape(table)[1:])
        exact = same_sizes(shape, self.emit.shape(values))
        if layout.where != [0] or layout.masks or not adds or not exact or not isinstance(self.states[values], Partial):
            return None
        emit, index = self.emit, layout.nodes[0]
        g = self.stacks.of(values)
        width = len(layout.shape)
        if "mask" not in op:
            index = own_rows(emit, index, self.emit.shape(table)[0])
        else:
            index, g = without(emit, index, g, op["mask"])
        T, D = product(layout.shape), product(shape[width:])
        ids = emit(aten.expand.default, emit.view(index, [1, T]), [emit.size(emit.examples), emit.size(T)])
        return ids, emit.view(g, [emit.examples, T, D])

    def _scaled(self, node: Node | None, scale: float, squared: bool = True) -> Node:
        assert node is not None
        return self.emit.times(node, scale * scale if squared else scale)
