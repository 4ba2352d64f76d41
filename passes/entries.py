"""Entry by entry: sum_b c_b^2 for every number of a parameter, where measuring its norms made the contributions apart.

    stack (B, ...)               sum_b c_b^2            reduction, lift, materialise; positions looked up by all examples
    outer product                (x^2)^T g^2            one position per example: no stack is needed
    a row per example, B = 1     g^2
    shared                       g^2 / B                each example owns 1/B of it

Everywhere else (ghost, fused, segments, convolution, tied, rows chosen by data) the contributions never exist, and there
is no result. |c_b|^2 does not see how the numbers lie; these sums do, so they follow the gradient through every view.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from gnsfx._torch import known
from gnsfx.passes.contractions import Matmul
from gnsfx.passes.emit import Emitter, accumulate_dtype
from gnsfx.passes.propagate import States
from gnsfx.passes.state import Batched, Partial, Shared
from gnsfx.passes.terms import Term, find_terms

aten = torch.ops.aten
MOST_NUMBERS = 1 << 17
"""The largest parameter whose entries are kept. Fixed before anything is traced, for the collector's leaf has to fit."""
STACKED = ("reduction", "lift", "materialise")
ONE_BY_ONE = ("outer", "fused", "ghost")
"""With one position per example their contributions are outer products."""


def sum_entries(
    gradient: Node, path: str, states: States, emit: Emitter, stack: Callable[[Node], Node] | None
) -> Node | None:
    """The sums in the layout of ``gradient``, in fp32 at least; None where there are none.

    ``path``: on which its norms are measured. ``stack`` writes its contributions (B, ...), where that is affordable. Called
    where nodes can be written at the end of the graph.
    """
    state = states.get(gradient, Shared())
    if gradient.meta["val"].dtype.is_complex:
        return None
    if known(emit.examples == 1) or isinstance(state, Batched):
        return _square(emit, gradient)
    if isinstance(state, Shared):
        return emit(aten.div.Tensor, _square(emit, gradient), emit.size(emit.examples))
    if not isinstance(state, Partial):
        return None
    if path in ONE_BY_ONE:
        terms = find_terms(gradient, states) or ()
        return _outer(emit, terms[0]) if len(terms) == 1 else None
    return emit(aten.sum.dim_IntList, _square(emit, stack(gradient)), [0]) if stack is not None else None


def _square(emit: Emitter, node: Node) -> Node:
    node = emit.cast(node, accumulate_dtype(node.meta["val"].dtype))
    return emit(aten.mul.Tensor, node, node)


def _outer(emit: Emitter, term: Term) -> Node | None:
    found = term.contraction
    if not isinstance(found, Matmul) or term.transposed is None or found.node.meta["val"].dim() != 2:
        return None
    if not known(found.x.node.meta["val"].shape[found.x.state.dim] == emit.examples):  # several positions per example
        return None
    x, g = (_square(emit, emit.view(f, [emit.examples, emit.shape(f)[-1]])) for f in found.factors(emit))
    sums = emit(aten.mm.default, emit.permute(x, [1, 0]), g)
    return emit.times(emit.permute(sums, [1, 0] if term.transposed else [0, 1]), term.scale * term.scale)
