"""The rewrite: for one parameter's gradient, nodes that compute s_b = |f(P_b)|^2 for every example b.

    permutation of one contraction     s_b = |P_b|^2                 measure_products, _lookups, _convolutions, _norms
    sum of contractions                s_b = |sum_i P_ib|^2          measure_sums
    any other linear map f             s_b = |f(P_b)|^2              f lifted over the stack of all P_b
    shared (a term no example owns)    s_b = |g|^2 / B^2             each example gets 1/B of it, before squaring
    batched (a row per example)        s_b = |g_b|^2
    mixed                              refused, with the node's reason and the user's source line

Numerics: the gradient itself changes by rounding at most: where it becomes a sum over examples, that is one in fp32 (fp64
for fp64), rounded once. On the paths outer, ghost and segments it keeps its bits, because the contraction stays as it is; in
bf16 and fp16 also on convolution, and on fused and materialise where no kernel of ours multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from gnsfx._torch import known, size_hint
from gnsfx.errors import GraphError
from gnsfx.passes.bags import RaggedBags
from gnsfx.passes.contractions import BiasReduction, Convolution, Lookup, Matmul, Reduction
from gnsfx.passes.emit import Emitter, accumulate_dtype
from gnsfx.passes.entries import STACKED, sum_entries
from gnsfx.passes.estimate import Estimator
from gnsfx.passes.joint_graph import JointGraph
from gnsfx.passes.measure_convolutions import Convolutions
from gnsfx.passes.measure_lookups import lookup_norms, lookup_of_all, measure_lookup
from gnsfx.passes.measure_norms import NormLayer, Norms
from gnsfx.passes.measure_products import Products
from gnsfx.passes.measure_sums import Sums
from gnsfx.passes.propagate import States
from gnsfx.passes.record import Record, refuse
from gnsfx.passes.segments import RoutedLookup, RoutedMatmul, RoutedSum, expression, sq_norm_of_sum
from gnsfx.passes.select_path import Planner
from gnsfx.passes.stacks import Stacks
from gnsfx.passes.state import Batched, Mixed, Partial, Routed, Shared
from gnsfx.passes.terms import Term, find_terms, peel

aten, ops = torch.ops.aten, torch.ops.gnsfx


class Measurer:
    """Writes the measurements of one graph. Contractions are rewritten once, however many gradients use them."""

    def __init__(
        self,
        view: JointGraph,
        states: States,
        emit: Emitter,
        planner: Planner,
        estimator: Estimator | None = None,
        spelled: Mapping[Node, NormLayer] | None = None,
    ) -> None:
        self.view, self.states, self.emit, self.planner = view, states, emit, planner
        self.estimator = estimator or Estimator(emit)
        self._gathered: set[Node] = set()  # tables from which all examples look up the same rows
        self._singles: dict[Node, Record] = {}
        self.stacks = Stacks(states, emit)
        parts = (emit, planner, self.estimator, self.stacks)
        self.products, self.convolutions = Products(*parts), Convolutions(*parts)
        self.sums = Sums(*parts, view, self.products, self._single)
        self.norms = Norms(emit, planner, states, self.stacks, spelled or {})

    def apply(self) -> None:
        """Put the rewritten gradients in place. Until then the graph reads as it was traced."""
        self.stacks.apply()
        self.convolutions.apply()

    def measure(self, record: Record, gradient: Node) -> Record:
        """Write the measurement of one gradient, or refuse it: a defect here must not stop anybody's training."""
        written, masked = len(self.stacks.replacements), len(self.convolutions.without_weight)
        try:
            found = self._measure(record, gradient)
            if found.sq_norm is not None and known(found.sq_norm.meta["val"].shape[0] != self.emit.examples):
                raise GraphError("its norms are not one per example")
            return found
        except Exception as error:
            del self.stacks.replacements[written:], self.convolutions.without_weight[masked:]
            record.sq_norm = record.variance = record.work = None
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
        if terms and (done := self.sums.measure(record, terms)):
            with self.emit.at(self.view.output):
                self._scale(done, terms[0].outer)
            return done
        leaf, scale, _ = peel(gradient)
        record.operation = str(leaf.target).removeprefix("aten.").removesuffix(".default")
        with self.emit.at(self.view.output):
            lookup = lookup_of_all(self.emit, self.stacks, leaf)
            if lookup is not None:
                record.path = "segments"
                self._gathered.add(leaf)
                record.sq_norm = self._scaled(lookup_norms(self.emit, *lookup), scale)
                return record
            record.path = "lift"
            stack = self.stacks.of(gradient)
            record.sq_norm = self.emit.square(stack)
        record.extra, record.reason = self.planner.lift(stack.meta["val"]), self.planner.stacked(stack.meta["val"])
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
            record.path, record.costs, record.sq_norm = known_.path, known_.costs, known_.sq_norm  # extra was counted
            record.work, record.dtype = known_.work, known_.dtype
        elif isinstance(found, Matmul) and not found.node.meta["val"].dtype.is_complex:
            choice = self.planner.matmul(found)
            with self.emit.at(found.node):
                x, g = found.factors(self.emit)
            self.products.measure(record, choice, found.node, x, g)
        elif isinstance(found, Lookup) and not found.node.meta["val"].dtype.is_complex:
            measure_lookup(self.emit, self.planner, record, found)
        elif self.norms.measures(found):
            self.norms.measure(record, found)
        elif isinstance(found, Convolution) and not found.node.meta["val"].dtype.is_complex:
            self.convolutions.measure(record, found)
        elif isinstance(found, (RoutedMatmul, RaggedBags)) and not found.node.meta["val"].dtype.is_complex:
            record.path = "segments"
            with self.emit.at(found.node):
                record.sq_norm = found.sq_norm(self.emit)
        else:
            record.path = "reduction" if isinstance(found, RoutedSum) else "lift"
            if isinstance(found, (Reduction, BiasReduction)):
                record.take(self.planner.reduction(found))
            with self.emit.at(found.node):
                stack = self.stacks.of(found.node)
                record.sq_norm = self.emit.square(stack)
            if not record.costs:
                record.extra, record.reason = (
                    self.planner.lift(stack.meta["val"]),
                    self.planner.stacked(stack.meta["val"]),
                )
        if record.variance is None:  # an estimate for each, so that their errors are independent
            self._singles.setdefault(found.node, replace(record))
        with self.emit.at(self.view.output):
            self._scale(record, term.scale)
        return record

    # --------------------------------------------------------------------------------------------------- helpers

    def _of_all(self, gradient: Node) -> Node:
        """(B,) of |g / B|^2."""
        emit = self.emit
        total = emit.square(emit(aten.unsqueeze.default, emit.share(gradient), 0))
        return emit(aten.expand.default, total, [emit.size(emit.examples)])

    def _scale(self, record: Record, scale: float) -> None:
        """Of contributions that are so many times larger."""
        record.sq_norm = self._scaled(record.sq_norm, scale)
        if record.variance is not None:
            record.variance = self.emit.times(record.variance, scale**4)

    def _scaled(self, node: Node | None, scale: float) -> Node:
        assert node is not None
        return self.emit.times(node, scale * scale)
