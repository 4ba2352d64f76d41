"""One Gram for several contractions with a factor in common: the input of q, k and v, or of gate and up.

    s_b = <x_b x_b^T, q_b q_b^T>,  <x_b x_b^T, k_b k_b^T>,  <x_b x_b^T, v_b v_b^T>        x_b x_b^T is computed once

Decided for all of them at once: the Gram is shared where it and what each contraction then adds take less time than the
cheapest path of each alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from gnsfx.kernels import cost
from gnsfx.passes.contractions import Factor, Matmul
from gnsfx.passes.joint_graph import JointGraph
from gnsfx.passes.plain_step import VIEWS
from gnsfx.passes.propagate import States
from gnsfx.passes.select_path import Planner, machine_on
from gnsfx.passes.state import Partial, describe
from gnsfx.passes.terms import find_terms

SAME = {*VIEWS, torch.ops.prims.convert_element_type.default}
MOST_POSITIONS = 256
"""The Gram is held until all have used it; longer positions take other paths anyway. Our CUDA kernels do not hold it."""
AT_ONCE = 3
"""Norms that one call of the op ``gram_norm_parts`` takes."""


@dataclass(frozen=True, eq=False, slots=True)
class SharedGram:
    """``first``: the contraction that comes first in the graph, before which the Gram is computed; ``side`` says of which of
    its factors: 0 is x, 1 is g. ``costs``: of all that use it; of every ``at_once`` the first one pays for the Gram."""

    first: Matmul
    side: int
    costs: dict[Node, cost.Cost]
    at_once: int

    def together(self, node: Node) -> list[Node]:
        """The contractions, in the order of the graph, that have one Gram in common with ``node``."""
        nodes = list(self.costs)
        start = nodes.index(node) // self.at_once * self.at_once
        return nodes[start : start + self.at_once]


def share_grams(view: JointGraph, states: States, slots: Sequence[int], planner: Planner) -> dict[Node, SharedGram]:
    """Contraction -> the Gram that it uses, for those that are quicker with one."""
    if planner.forced not in ("auto", "ghost"):
        return {}
    groups: dict[tuple[int, bool, str], dict[Node, Matmul]] = {}
    for slot in slots:
        for found in _matmuls(view.grads.get(slot), states):
            ours = planner.multiprocessors(found) > 0
            if ours or found.sizes(planner.examples)[2] <= MOST_POSITIONS:
                for side, factor in enumerate((found.x, found.g)):
                    groups.setdefault((side, ours, _name(factor)), {})[found.node] = found
    shared: dict[Node, SharedGram] = {}
    together = [(side, members) for (side, *_), members in groups.items() if len(members) > 1]
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
    machine, gram = machine_on(value.device), planner.gram(members[0], side)
    if gram.memory > planner.memory:
        return None
    gains, costs = {}, {}
    for found in members:
        alone = planner.matmul(found)
        together = alone.costs["plain"] + planner.with_gram(found, side)
        saved = alone.seconds[alone.path] - cost.seconds(together, machine, value.dtype)
        if alone.path != "outer" and together.memory <= planner.memory and saved > 0:
            gains[found.node], costs[found.node] = saved, together
    at_once = AT_ONCE if planner.multiprocessors(members[0]) else len(costs)
    if len(costs) > 1 and len(costs) % at_once == 1:
        costs.popitem()  # it would have a Gram to itself
    paying = list(costs)[:: at_once or 1]
    if len(costs) < 2 or sum(gains[n] for n in costs) <= len(paying) * cost.seconds(gram, machine, value.dtype):
        return None
    for node in paying:
        costs[node] += gram
    return SharedGram(next(m for m in members if m.node in costs), side, costs, at_once)


def _matmuls(gradient: Node | None, states: States) -> list[Matmul]:
    if gradient is None or not isinstance(states.get(gradient), Partial):
        return []
    terms = find_terms(gradient, states) or []
    found = [t.contraction for t in terms if isinstance(t.contraction, Matmul)]
    return [m for m in found if len(terms) == 1 and not m.node.meta["val"].dtype.is_complex]


def _name(factor: Factor) -> str:
    """The same for two values that are the same views and casts of one node: autocast casts an input for each layer."""
    node, views = factor.node, []
    while node.target in SAME and isinstance(node.args[0], Node):
        sizes = map_arg(node.args[1:], lambda n: n.meta["val"])  # symbolic ones are computed anew for each view
        views.append(f"{node.target}{sizes}{node.kwargs}")
        node = node.args[0]
    return f"{node.name} {views} {describe(factor.state)}"
