"""A parameter used more than once: s_b = |sum_i P_ib|^2, with the cross terms.

sum_i x_i^T g_i                    one product over the concatenated positions
sum_i onehot(ids_i)^T g_i          one lookup of the concatenated rows
onehot(ids)^T rows + x^T g         tied: |E_b|^2 + 2 <E_b, H_b> + |H_b|^2, or one kernel for the whole table
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from gnsfx.kernels.ops import start_build
from gnsfx.passes.contractions import Lookup, Matmul
from gnsfx.passes.emit import Emitter
from gnsfx.passes.estimate import Estimator
from gnsfx.passes.joint_graph import JointGraph
from gnsfx.passes.measure_lookups import lookup_norms
from gnsfx.passes.measure_products import Products
from gnsfx.passes.record import Record
from gnsfx.passes.select_path import Planner
from gnsfx.passes.stacks import Stacks
from gnsfx.passes.terms import Term

aten, ops = torch.ops.aten, torch.ops.gnsfx


@dataclass(frozen=True, slots=True)
class Sums:
    """``single`` measures a gradient of one term."""

    emit: Emitter
    planner: Planner
    estimator: Estimator
    stacks: Stacks
    view: JointGraph
    products: Products
    single: Callable[[Record, Term], Record]

    def measure(self, record: Record, terms: list[Term]) -> Record | None:
        """The measurement of the sum without its ``outer``; None where the terms have no common form."""
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
                assert rows is not None
                record.path, record.sq_norm = "segments", lookup_norms(self.emit, ids, rows)
                return record
            else:  # the table is (V, D): x carries the rows, g the width
                assert rows is not None
                squeezed = [self.emit(aten.squeeze.dim, f, 1) for f in (g, x)]
                head = matmuls[0].contraction
                assert isinstance(head, Matmul)
                own = head.node.meta["val"].dtype
                if len(matmuls) > 1 or (dtype != own and not self.planner.multiprocessors(head)):
                    record.path, record.sq_norm = "tied", self.emit(ops.tied_sq_norm.default, ids, rows, *squeezed)
                    return record
                if dtype != own:  # of h the columns of the ids are read: no copy in another dtype for that
                    squeezed[1] = self.emit(aten.squeeze.dim, self._oriented(matmuls[0], own)[0], 1)
                elif self._table(record, matmuls[0], [ids, rows, *squeezed], (x, g)):
                    return record
                parts = [lookup_norms(self.emit, ids, rows)]
                parts.append(self.emit(aten.mul.Tensor, self.emit(ops.tied_cross.default, ids, rows, *squeezed), 2.0))
        if parts:
            assert ids is not None and rows is not None
            return self._tied(record, matmuls[0], parts, (ids, rows))
        assert x is not None and g is not None
        choice = self.planner.factors(x, g)
        self.products.measure(record, choice, root, x, g)
        return record

    def _table(self, record: Record, head: Term, both: list[Node], factors: tuple[Node, Node]) -> bool:
        """The whole gradient of a tied table by one kernel, where that would take the head's norms along anyway."""
        assert isinstance(head.contraction, Matmul)
        choice, node = self.planner.matmul(head.contraction), head.contraction.node
        takes_along = choice.path == "fused" and not choice.ours and self.planner.sums_in_fp32(node)
        if record.slot in self.estimator.chosen or not takes_along:
            return False
        record.take(choice)
        self.estimator.matmul(record, choice, *factors)
        start_build(node.meta["val"])
        table = self.emit(ops.tied_mm_sq_norm.default, *both)
        record.path, record.sq_norm = f"tied, {choice.path}", self.emit(operator.getitem, table, 1)
        self.stacks.replace(head.root, self.emit(operator.getitem, table, 0))
        return True

    def _tied(self, record: Record, head: Term, parts: list[Node], looked_up: tuple[Node, Node]) -> Record:
        """|E_b + H_b|^2 = |E_b|^2 + 2 <E_b, H_b> + |H_b|^2, the last on the cheapest path of the head's own contraction."""
        assert isinstance(head.contraction, Matmul)
        alone = self.single(replace(record), replace(head, transposed=False))
        record.path, record.costs, record.extra = f"tied, {alone.path}", alone.costs, alone.extra
        record.dtype = alone.dtype
        record.status, record.reason = alone.status, alone.reason
        record.work, record.variance = alone.work, alone.variance
        ids, rows = (n.meta["val"].shape for n in looked_up)
        self.planner.add_tied(record, ids, rows, head.contraction)
        with self.emit.at(self.view.output):
            total = alone.sq_norm
            for part in parts:
                total = self.emit(aten.add.Tensor, total, part)
            # where the head is an estimate the sum may be negative: clamped it would not be unbiased
            record.sq_norm = total if alone.variance is not None else self.emit(aten.clamp_min.default, total, 0)
        return record

    def _oriented(self, term: Term, dtype: torch.dtype) -> tuple[Node, Node]:
        assert isinstance(term.contraction, Matmul)
        x, g = term.contraction.factors(self.emit)
        x, g = (g, x) if term.transposed else (x, g)
        g = self.emit.times(g, term.scale)
        return self.emit.cast(x, dtype), self.emit.cast(g, dtype)

    def _looked_up(self, term: Term, dtype: torch.dtype) -> tuple[Node, Node]:
        assert isinstance(term.contraction, Lookup)
        ids, g = term.contraction.marked(self.emit)
        return self.emit.cast(ids, torch.int64), self.emit.cast(self.emit.times(g, term.scale), dtype)

    def _concatenate(self, parts: list[Node], dim: int) -> Node:
        return parts[0] if len(parts) == 1 else self.emit(aten.cat.default, parts, dim)
