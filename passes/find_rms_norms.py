"""RMSNorm written out in the model: its backward, found in the joint graph by its shape.

    h = x.float();  h * rsqrt(h.pow(2).mean(-1) + eps)   times w, before or after it is cast back     (Llama, Gemma, ...)

Each spelling is traced, forward and backward, at the shapes and dtypes of a candidate, and the trace laid over the graph
from the gradient of the scale on. What differs anywhere stays as it is: another gradient into rstd, say.

    dw = sum_rows g xhat                                  matched from here: g, x, rstd
    dx = (g w) rstd + h (mean part)                       two terms of one sum: dx of our op, and nothing
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from gnsfx._torch import known, tree_flatten
from gnsfx.kernels import gpu
from gnsfx.passes.contractions import Reduction
from gnsfx.passes.emit import Emitter
from gnsfx.passes.joint_graph import JointGraph
from gnsfx.passes.measure_norms import NormLayer
from gnsfx.passes.norm_layers import memory_order, rows_match, shapes_fit
from gnsfx.passes.propagate import States
from gnsfx.passes.rms_spellings import AS_IS, EPS, ROOTS, SPELLINGS, Trace, seen, trace_spelling
from gnsfx.passes.state import Partial, Size, same_sizes
from gnsfx.passes.terms import find_terms

aten, prims = torch.ops.aten, torch.ops.prims
COMMUTE = (aten.add.Tensor, aten.mul.Tensor)
FARTHEST = 8
"""How many nodes behind the sum of a scale's gradient the root is looked for."""


def find_rms_norms(
    view: JointGraph, states: States, emit: Emitter, slots: tuple[int, ...], entries: frozenset[int]
) -> dict[Node, NormLayer]:
    """Gradient of a scale -> its layer, for parameters to measure whose gradient is nothing else.

    ``entries``: those of which the contributions have to exist.
    """
    found: dict[Node, NormLayer] = {}
    traces: dict[Any, Trace | None] = {}
    taken: set[Node] = set()
    sums = dict(_sums(view, states, slots, entries))
    order = {n: i for i, n in enumerate(view.graph.nodes)} if sums else {}
    for node, dtype in sums.items():
        try:
            layers = [m.layer(order, states, emit.examples) for m in _matches(node, dtype, traces, emit)]
        except Exception:  # what is not found is measured as ever
            continue
        for layer in filter(None, layers):
            replaced = {*layer.gradients.values(), *layer.vanish}
            if not replaced & taken:
                taken |= replaced
                found[node] = layer
                break
    return found


def _sums(
    view: JointGraph, states: States, slots: tuple[int, ...], entries: frozenset[int]
) -> Iterator[tuple[Node, torch.dtype]]:
    for slot in slots:
        gradient = view.grads.get(slot)
        if gradient is None or slot in entries or not isinstance(states.get(gradient), Partial):
            continue
        if "norm" not in gpu.kernels_on(gradient.meta["val"].device):
            continue
        terms = find_terms(gradient, states) or ()
        if len(terms) == 1 and isinstance(terms[0].contraction, Reduction):
            yield terms[0].contraction.node, gradient.meta["val"].dtype


def _input_of(node: Node) -> Node | None:
    """The input of a norm layer that a sum may be the scale's gradient of, behind the root of its mean square."""
    level = [node.args[0]]
    for _ in range(FARTHEST):
        level = [n for n in dict.fromkeys(level) if isinstance(n, Node)]
        for n in level:
            if n.target in ROOTS:
                return _squared(n)
        level = [a for n in level for a in n.all_input_nodes]
    return None


def _squared(root: Node) -> Node | None:
    node = root
    for target in ((aten.add.Tensor, aten.add.Scalar), (aten.mean.dim,), (aten.pow.Tensor_Scalar,)):
        node = node.args[0]  # type: ignore[assignment]
        if not isinstance(node, Node) or node.target not in target:
            return None
    h = node.args[0]
    cast = isinstance(h, Node) and h.target is prims.convert_element_type.default
    return h.args[0] if cast else h  # type: ignore[return-value, union-attr]


def _matches(node: Node, dtype: torch.dtype, traces: dict[Any, Trace | None], emit: Emitter) -> Iterator[Match]:
    x = _input_of(node)
    if x is None:
        return
    value = x.meta["val"]
    if not value.dim() or value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return
    for narrow in dict.fromkeys((dtype, torch.float32)):
        for spelling in SPELLINGS:
            key = (spelling, narrow, value.dtype, *map(str, value.shape))
            if key not in traces:
                traces[key] = trace_spelling(spelling, value, narrow, emit)
            trace = traces[key]
            if trace is not None and (match := Match(trace)).found(node):
                yield match


# --------------------------------------------------------------------------------------------------------- matching


@dataclass(slots=True)
class Match:
    """``at``: node of the trace -> node of the graph."""

    trace: Trace
    at: dict[Node, Node] = field(default_factory=dict)
    sums: tuple[Node, ...] = ()

    def found(self, scale: Node) -> bool:
        """Whether the graph is that of the trace; ``sums`` are then dx, or the two terms of it."""
        if not self._same(self.trace.scale, scale):
            return False
        if self.trace.cast is not None:
            self.sums = tuple(itertools.islice(self._find(self.trace.cast), 1))
            return bool(self.sums)
        first, second = self.trace.terms
        for one in self._find(first):
            for other in self._find(second):
                if _added(one, other):
                    self.sums = (one, other)
                    return True
        return False

    def layer(self, order: Mapping[Node, int], states: States, examples: Size) -> NormLayer | None:
        trace, at = self.trace, self.at
        if not {trace.x, trace.w, trace.g, trace.root} <= at.keys():
            return None
        g, x, w, root, scale = (at[n] for n in (trace.g, trace.x, trace.w, trace.root, trace.scale))
        values = [n.meta["val"] for n in (g, x, w)]
        place = rows_match([g, x, root], w, x.meta["val"].dim() - 1, states)
        if not place or not shapes_fit(values, (x.meta["val"].shape[-1],), examples):
            return None
        if not all(memory_order(n.meta["val"]) for n in self.sums):
            return None
        first = min((scale, *self.sums), key=order.__getitem__)
        if any(order[n] > order[first] for n in (g, x, w, root)):
            return None
        return NormLayer(first, g, x, None, root, w, 1, {0: self.sums[0], 1: scale}, self.sums[1:])

    def _find(self, wanted: Node) -> Iterator[Node]:
        """What a node of the trace may be in the graph, from what is known of its operands on; ``at`` goes along."""
        if wanted in self.at:
            yield self.at[wanted]
            return
        before = dict(self.at)
        for operand in map(seen, wanted.all_input_nodes):
            if operand.op == "placeholder" and operand not in self.at:
                continue
            for start in self._find(operand):
                within = dict(self.at)
                for user in _users(start):
                    if self._same(wanted, user):
                        yield user
                    self.at = dict(within)
        self.at = before

    def _same(self, wanted: Node, node: Any) -> bool:
        if not isinstance(node, Node):
            return False
        wanted, node = seen(wanted), seen(node)
        if wanted in self.at:
            return self.at[wanted] is node
        if wanted.op == "placeholder":
            same = _alike(wanted.meta["val"], node.meta.get("val"))
        elif wanted.target is not node.target or _keywords(wanted) != _keywords(node):
            return False
        else:
            same = self._same_arguments(_plain(wanted), _plain(node))
            if not same and wanted.target in COMMUTE and isinstance(wanted.args[1], Node):
                same = self._same_arguments(wanted.args, tuple(reversed(node.args)))
        if same:
            self.at[wanted] = node
        return same

    def _same_arguments(self, wanted: Any, found: Any) -> bool:
        pairs = tree_flatten(wanted), tree_flatten(found)
        if pairs[0][1] != pairs[1][1]:
            return False
        before = dict(self.at)
        if all(self._same_argument(a, b) for a, b in zip(pairs[0][0], pairs[1][0], strict=True)):
            return True
        self.at = before
        return False

    def _same_argument(self, wanted: Any, found: Any) -> bool:
        value = wanted.meta.get("val") if isinstance(wanted, Node) else wanted
        if isinstance(value, Tensor):
            return self._same(wanted, found)
        other = found.meta.get("val") if isinstance(found, Node) else found
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            return isinstance(other, (int, torch.SymInt)) and known(value == other)
        if isinstance(value, float) and value == EPS:
            return isinstance(other, (float, torch.SymFloat)) or (isinstance(other, Tensor) and other.dim() == 0)
        return type(value) is type(other) and value == other


def _plain(node: Node) -> tuple[Any, ...]:
    """Arguments, with dimensions counted from the front."""
    if node.target is not aten.mean.dim:
        return node.args
    source, dims, *rest = node.args
    return source, [d % source.meta["val"].dim() for d in dims], *rest  # type: ignore[union-attr]


def _keywords(node: Node) -> dict[str, Any]:
    """Without the dtype that a sum has anyway: autocast names it."""
    own = node.args[0].meta["val"].dtype if node.target is aten.sum.dim_IntList else None  # type: ignore[union-attr]
    return {k: v for k, v in node.kwargs.items() if k != "dtype" or v != own}


def _alike(wanted: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == wanted.dtype and same_sizes(value.shape, wanted.shape)


def _users(node: Node) -> Iterator[Node]:
    for user in node.users:
        if user.target in AS_IS:
            yield from _users(user)
        else:
            yield user


def _added(one: Node, other: Node) -> bool:
    """Whether two terms are used in one sum alone, and nobody reads it where only one of them is in it."""
    return len(one.users) == len(other.users) == 1 and bool(set(_sums_of(one)) & set(_sums_of(other)))


def _sums_of(node: Node) -> Iterator[Node]:
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target is not aten.add.Tensor or node.kwargs or node.args[0] is node.args[1]:
            return
        yield node
