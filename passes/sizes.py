"""Sizes as arguments of nodes: a number as it is, a symbolic size as the node that computes it from the graph inputs.

s0                  -> the input that is it, or sym_size of an input that has it
s0 * s1, s0 // 2    -> mul(s0, s1), floordiv(s0, 2)      each written once
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from gnsfx._torch import FloorDiv, Mod, PythonMod, TangentAOTInput, simplified
from gnsfx.errors import GraphError
from gnsfx.passes.joint_graph import fake
from gnsfx.passes.state import Size

aten = torch.ops.aten

COMBINE: dict[Any, Any] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
}
"""How symbolic sizes are made of others."""


class Sizes:
    """Written behind the inputs of ``graph``, so that every node can use them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._sizes: dict[Any, Node] = {}
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        for node in self._inputs:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self._sizes.setdefault(value.node.expr, node)

    def __call__(self, size: Size) -> int | Node:
        """A number, or a node.

        Raises:
            GraphError: the size is no sum, product, quotient or remainder of sizes of the inputs.
        """
        size = simplified(size)
        if not isinstance(size, torch.SymInt):
            return size
        expression = sympy.sympify(size.node.expr)
        if expression.is_Integer:
            return int(expression)
        return self._expression(expression)

    def _expression(self, expression: Any) -> int | Node:
        if expression.is_Integer:
            return int(expression)
        if expression in self._sizes:
            return self._sizes[expression]
        found = self._from_inputs(expression)
        if found is None and (type(expression) in COMBINE or _is_power(expression)):
            combine = COMBINE.get(type(expression), operator.mul)
            factors = [expression.args[0]] * int(expression.args[1]) if _is_power(expression) else expression.args
            parts = [self._expression(part) for part in factors]
            found = parts[0]
            for part in parts[1:]:
                found = self._sym(combine, found, part)
        if not isinstance(found, Node):
            raise GraphError(f"the size {expression} cannot be computed from the graph inputs.")
        self._sizes[expression] = found
        return found

    def _from_inputs(self, expression: Any) -> Node | None:
        for node in self._inputs:
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor) or isinstance(node.meta.get("desc"), TangentAOTInput):
                continue  # the forward does not have a tangent
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and sympy.sympify(size.node.expr) == expression:
                    return self._sym(aten.sym_size.int, node, dim)
        return None

    def _sym(self, target: Any, *args: Any) -> Node:
        """Written behind its arguments and all inputs, so that everything else can use it."""
        anchor = max([self._inputs[-1], *[a for a in args if isinstance(a, Node)]])
        with self.graph.inserting_after(anchor):
            node = self.graph.call_function(target, args)
        node.meta["val"] = target(*[fake(a) for a in args])
        return node


def _is_power(expression: Any) -> bool:
    return isinstance(expression, sympy.Pow) and bool(expression.args[1].is_Integer and expression.args[1] > 0)
