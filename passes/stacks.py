"""What each example adds to a value that is summed over the batch, and gradients rewritten as sums of that.

grad = sum_b P_b      ->     stack (B, *shape) of P_b,  grad = its sum        where the sum is no worse than the contraction
f(sum_b P_b)          ->     f lifted over the stack                          for any other linear map f
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch.fx import Node

from gnsfx.passes.contractions import BiasReduction, Matmul, Reduction, joint_terms
from gnsfx.passes.emit import Emitter, accumulate_dtype
from gnsfx.passes.propagate import States
from gnsfx.passes.state import Partial, Shared
from gnsfx.passes.terms import find_contraction

aten = torch.ops.aten


def rounds(node: Node) -> bool:
    """Whether the products of single examples would be rounded below fp32 before they are summed: then the gradient is
    computed as it was, and the norms beside it."""
    return node.meta["val"].dtype in (torch.bfloat16, torch.float16)


class Stacks:
    """Written once for each node. ``replacements``: (gradient, what takes its place), in effect from ``apply`` on."""

    def __init__(self, states: States, emit: Emitter) -> None:
        self.states, self.emit = states, emit
        self.replacements: list[tuple[Node, Node]] = []
        self._known: dict[Node, Node] = {}

    def apply(self) -> None:
        """Put the rewritten gradients in place. Until then the graph reads as it was traced."""
        for node, value in self.replacements:
            node.replace_all_uses_with(value)

    def keep(self, node: Node, stack: Node) -> None:
        """``stack`` is what each example adds to ``node``, however it was written."""
        self._known[node] = stack

    def of(self, node: Node) -> Node:
        """(B, *shape of node): the contribution of each example to a value that is summed over examples."""
        if node in self._known:
            return self._known[node]
        emit, state = self.emit, self.states.get(node, Shared())
        assert isinstance(state, Partial)
        found = find_contraction(node, self.states)
        if found is not None:
            with emit.at(node):
                stack = found.materialise(emit)
                self._known[node] = stack
                summed = isinstance(found, (Reduction, BiasReduction)) or (
                    isinstance(found, Matmul) and not rounds(node)
                )
                if summed:
                    self.replace_by_sum(node, stack)
            return stack
        source = node.args[0] if node.target is operator.getitem else node
        assert isinstance(source, Node)
        inputs = [a for a in dict.fromkeys(source.all_input_nodes) if a in self.states]
        partial = {a: self.of(a) for a in inputs if isinstance(self.states[a], Partial)}
        with emit.at(node):
            dtype = functools.reduce(torch.promote_types, (n.meta["val"].dtype for n in partial.values()))
            if not dtype.is_complex:  # fused ops compute in fp32 inside; what they are lifted to must not round between
                dtype = accumulate_dtype(dtype)
            partial = {a: emit.cast(n, dtype) for a, n in partial.items()}
            shared = {a: emit.share(a) for a in joint_terms(source, partial)}
            others = [a for a in inputs if a not in partial and isinstance(a.meta["val"], torch.Tensor)]
            floating = [a for a in others if a.meta["val"].dtype.is_floating_point]
            shared |= {a: emit.cast(shared.get(a, a), dtype) for a in floating if not dtype.is_complex}
            index: Any = node.args[1] if source is not node else None
            stack = emit.lift(source, partial, shared, index)
        self._known[node] = stack
        return stack

    def replace_by_sum(self, node: Node, stack: Node) -> None:
        total = self.emit.sum(stack, [0], node.meta["val"].dtype)
        self.replace(node, total)

    def replace(self, node: Node, value: Node) -> None:
        """Let ``value`` be the gradient in place of ``node``, with its dtype and shape."""
        value = self.emit.view(self.emit.cast(value, node.meta["val"].dtype), self.emit.shape(node))
        self.replacements.append((node, value))
