"""One Gram for several contractions with a factor in common: the input of q, k and v, or of gate and up.

    s_b = <x_b x_b^T, q_b q_b^T>,  <x_b x_b^T, k_b k_b^T>,  <x_b x_b^T, v_b v_b^T>        x_b x_b^T is computed once

Decided for all of them at once: the Gram is shared where it and what each contraction then adds take less time than the
cheapest path of each alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from gnsfx.kernels import cost
from gnsfx.kernels.machine import machine_for
from gnsfx.passes.contractions import Factor, Matmul
from gnsfx.passes.joint_graph import JointGraph
from gnsfx.passes.plain_step import VIEWS
from gnsfx.passes.propagate import States
from gnsfx.passes.select_path import Planner
from gnsfx.passes.state import Partial, describe
from gnsfx.passes.terms import find_terms

MOST_POSITIONS = 256
"""The Gram is held until all have used it; longer positions take other paths anyway."""


@dataclass(frozen=True, eq=False, slots=True)
class SharedGram:
    """``first``: the contraction that comes first in the graph, before which the Gram is computed; ``side`` says of which of
    its factors: 0 is x, 1 is g. ``costs``: of all that use it; the first one pays for the Gram."""

    first: Matmul
    side: int
    costs: dict[Node, cost.Cost]


def share_grams(view: JointGraph, states: States, slots: Sequence[int], planner: Planner) -> dict[Node, SharedGram]:
    """Contraction -> the Gram that it uses, for those that are quicker with one."""
    if planner.forced not in ("auto", "ghost"):
        return {}
    groups: dict[tuple[int, str], dict[Node, Matmul]] = {}
    for slot in slots:
        for found in _matmuls(view.grads.get(slot), states):
            if found.sizes(planner.examples)[2] <= MOST_POSITIONS:
                for side, factor in enumerate((found.x, found.g)):
                    groups.setdefault((side, _name(factor)), {})[found.node] = found
    shared: dict[Node, SharedGram] = {}
    together = [(side, members) for (side, _), members in groups.items() if len(members) > 1]
    order = {node: i for i, node in enumerate(view.graph.nodes)} if together else {}
    for side, members in together:
        free = sorted((m for n, m in members.items() if n not in shared), key=lambda m: order[m.node])
        gram = _decide(free, side, planner)
        if gram is not None:
            shared.update(dict.fromkeys(gram.costs, gram))
    return shared


def _decide(members: Sequence[Matmul], side: int, planner: Planner) -> SharedGram | None:
    if len(members) < 2:
        return None
    value = members[0].node.meta["val"]
    machine, itemsize, device = machine_for(value.device.type), value.dtype.itemsize, value.device.type
    B, E, T, *widths = members[0].sizes(planner.examples)
    gram = cost.gram(B, E, T, widths[side], itemsize, device)
    if gram.memory > planner.memory:
        return None
    gain, costs, first = -cost.seconds(gram, machine, value.dtype), {}, None
    for found in members:
        *_, I, O = found.sizes(planner.examples)
        alone = planner.matmul(found)
        together = alone.costs["plain"] + cost.with_gram(B, E, T, (O, I)[side], itemsize, device)
        saved = alone.seconds[alone.path] - cost.seconds(together, machine, value.dtype)
        if alone.path != "outer" and together.memory <= planner.memory and saved > 0:
            first = first or found
            gain += saved
            costs[found.node] = together
    if first is None or len(costs) < 2 or gain <= 0:
        return None
    costs[first.node] += gram
    return SharedGram(first, side, costs)


def _matmuls(gradient: Node | None, states: States) -> list[Matmul]:
    if gradient is None or not isinstance(states.get(gradient), Partial):
        return []
    terms = find_terms(gradient, states) or []
    found = [t.contraction for t in terms if isinstance(t.contraction, Matmul)]
    return [m for m in found if len(terms) == 1 and not m.node.meta["val"].dtype.is_complex]


def _name(factor: Factor) -> str:
    """The same for two values that are the same views of one node."""
    node, views = factor.node, []
    while node.target in VIEWS and isinstance(node.args[0], Node):
        views.append(f"{node.target}{node.args[1:]}{node.kwargs}")
        node = node.args[0]
    return f"{node.name} {views} {describe(factor.state)}"
