"""Reading a gradient backwards to the contractions it is made of.

    permute(mm)                  -> one term, transposed
    add(view(mm_1), permute(mm_2)) -> two terms: a weight used twice, a tied table
    sum * 0.5                    -> one term, scale 0.5

Only maps that keep the multiset of entries (up to sign, one number and rounding) are read through; anything else ends
the reading and is lifted per example.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from gnsfx.passes.contractions import Contraction
from gnsfx.passes.find_contractions import find_batched
from gnsfx.passes.propagate import States
from gnsfx.passes.rules.table import overloads
from gnsfx.passes.segments import find_routed, routed_operand
from gnsfx.passes.state import Partial, same_sizes

aten = torch.ops.aten
KEEPS_ORDER = set(overloads("aten.clone.default", "aten.alias.default", "aten.detach.default", "aten._to_copy.default",
                            "prims.convert_element_type.default", "aten.lift_fresh_copy.default"))  # fmt: skip
RESHAPES = set(overloads("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.unsqueeze.default",
                         "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims"))  # fmt: skip
PERMUTES = set(overloads("aten.permute.default", "aten.t.default", "aten.transpose.int"))


@dataclass(frozen=True, slots=True)
class Term:
    """``scale * contraction``, transposed or not (None: reshaped, the orientation is lost).

    ``root`` is the sum of all terms; the gradient is ``outer`` times the root.
    """

    contraction: Contraction
    scale: float
    transposed: bool | None
    root: Node
    outer: float = 1.0


def peel(node: Node) -> tuple[Node, float, bool | None]:
    """Follow maps that permute entries down to the first node that does not: (node, scale, transposed)."""
    scale, transposed = 1.0, False
    while True:
        source = node.args[0] if node.args else None
        if not isinstance(source, Node):
            return node, scale, transposed
        if node.target is aten.neg.default:
            scale = -scale
        elif node.target in PERMUTES:
            if node.meta["val"].dim() != 2:
                transposed = None
            elif transposed is not None and not (node.target is aten.permute.default and list(node.args[1]) == [0, 1]):  # type: ignore[arg-type]
                transposed = not transposed
        elif node.target in RESHAPES:
            if not same_sizes(node.meta["val"].shape, source.meta["val"].shape):
                transposed = None
        elif node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            factor = node.args[1]
            if not isinstance(factor, (int, float)):
                return node, scale, transposed
            scale = scale / factor if "div" in str(node.target) else scale * factor
        elif node.target not in KEEPS_ORDER or _loses(source.meta["val"].dtype, node.meta["val"].dtype):
            return node, scale, transposed
        node = source


def _loses(source: torch.dtype, target: torch.dtype) -> bool:
    return source.is_complex and not target.is_complex


def find_contraction(node: Node, states: States) -> Contraction | None:
    """The record of a node that sums over examples, None for any other."""
    return find_routed(node, states) if routed_operand(node, states) else find_batched(node, states)


def find_terms(gradient: Node, states: States) -> list[Term] | None:
    """The contractions that a gradient is a plain sum of; None where it is anything else.

    Orientations are relative to ``root``, the outermost node that is not a permutation: a norm does not see further out.
    """
    root, scale, transposed = peel(gradient)
    terms = _collect(root, states, root)
    if terms is None:
        return None
    if len(terms) == 1:
        return [replace(t, scale=t.scale * scale, transposed=transposed) for t in terms]
    return [replace(t, outer=scale) for t in terms]


def _collect(node: Node, states: States, root: Node) -> list[Term] | None:
    leaf, scale, transposed = peel(node)
    if not isinstance(states.get(leaf), Partial):
        return None
    found = find_contraction(leaf, states)
    if found is not None:
        return [Term(found, scale, transposed, root)]
    if leaf.target is not aten.add.Tensor or leaf.kwargs.get("alpha", 1) != 1:
        return None
    terms: list[Term] = []
    for part in leaf.args[:2]:
        inner = _collect(part, states, root) if isinstance(part, Node) else None
        if inner is None or not same_sizes(part.meta["val"].shape, leaf.meta["val"].shape):  # type: ignore[union-attr]
            return None
        terms += inner
    return [replace(t, scale=t.scale * scale, transposed=_compose(t.transposed, transposed)) for t in terms]


def _compose(inner: bool | None, outer: bool | None) -> bool | None:
    return None if inner is None or outer is None else inner != outer
