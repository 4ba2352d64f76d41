"""The rule table: one row per op, ``rule(op) -> state``. Where is the example axis after this op?

A row is asked only when at least one argument is batched and none is partial or mixed:

    all arguments shared     -> shared, whatever the op                       (no row needed)
    an argument is mixed     -> mixed, the same reason                        (no row needed)
    an argument is partial   -> partial if the op is linear there (``LINEAR``), else mixed
    an argument is batched   -> the op's row in ``RULES``; no row is mixed("no rule for ...")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from gnsfx._torch import known, simplified
from gnsfx.errors import RuleError
from gnsfx.passes.state import Batched, Mixed, Partial, Shared, Size, State, reshape

Rule = Callable[["Op"], "State | tuple[State, ...]"]

STATISTIC = "it is scaled by a statistic of the batch, to which the examples contribute unequally"
"""The doubt of a forward value summed over the examples. It matters only where no batched value is met afterwards."""

RULES: dict[Any, Rule] = {}
"""Op -> rule. Filled by the files of this folder, and by users through :func:`gnsfx.register_rule`."""

LINEAR: dict[Any, tuple[frozenset[str], ...]] = {}
"""Op -> groups of argument names; the op is jointly linear in the arguments of each group."""


class Op:
    """One node as a rule sees it: arguments by schema name, and for each its state and shape.

    Attributes:
        node: the node, for its target and the user's source line.
        examples: the number of examples B of this graph, possibly symbolic.
        tangent: whether the value depends on the tangents (it is part of the backward).
    """

    __slots__ = ("_states", "args", "examples", "node", "tangent")

    def __init__(self, node: Node, states: dict[Node, Any], examples: Size, tangent: bool) -> None:
        self.node, self._states, self.examples, self.tangent = node, states, examples, tangent
        self.args = arguments(node)

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def state(self, value: Any) -> State:
        """State of an argument; what is not a tensor of the graph is shared."""
        if isinstance(value, str):
            value = self.args[value]
        state = self._states.get(value, Shared()) if isinstance(value, Node) else Shared()
        return Mixed("a tuple is used as a tensor", self.node) if isinstance(state, tuple) else state

    def batched(self, *names: str) -> dict[str, Batched]:
        """The batched ones among these arguments, by name."""
        found = {name: self.state(name) for name in names}
        return {name: state for name, state in found.items() if isinstance(state, Batched)}

    def shape(self, value: Any = None) -> tuple[Size, ...]:
        """Shape of an argument (by name or node), or of the result."""
        node = self.node if value is None else self.args[value] if isinstance(value, str) else value
        return tuple(map(simplified, node.meta["val"].shape))

    def dim(self, value: int, of: str = "self") -> int:
        """A possibly negative dimension argument as an index into the shape of ``of``."""
        return value % max(len(self.shape(of)), 1)

    def reshaped(self, name: str = "self") -> State:
        """The state of an argument after a row-major reshape into the shape of the result."""
        state = self.state(name)
        if not isinstance(state, Batched):
            return state
        found = reshape(state, self.shape(name), self.shape(), self.examples)
        return found or self.mixed(
            f"a reshape from {list(self.shape(name))} to {list(self.shape())} splits the examples"
        )

    def contracted(self) -> State:
        """The examples are summed here: a weight-gradient contraction in the backward, a statistic in the forward."""
        return Partial() if self.tangent else Shared(STATISTIC)

    def mixed(self, reason: str) -> Mixed:
        return Mixed(reason, self.node)


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of a node by schema name, defaults filled in; of a higher-order op by position, as it has no schema."""
    if not isinstance(node.target, OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | node.kwargs
    schema = node.target._schema.arguments
    bound: dict[str, Any] = dict(node.kwargs)
    for position, argument in enumerate(schema):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name not in bound:
            bound[argument.name] = argument.default_value
    return bound


def rule(*targets: Any, linear: Sequence[str] = ()) -> Callable[[Rule], Rule]:
    """Enter a rule for ``targets``. ``linear`` lists groups of argument names, ``"self other"``, linear jointly."""

    def enter(function: Rule) -> Rule:
        for target in targets:
            if target in RULES:
                raise RuleError(f"{target} has a rule already: {RULES[target].__name__}.")
            RULES[target] = function
            if linear:
                LINEAR[target] = tuple(frozenset(group.split()) for group in linear)
        return function

    return enter


def overloads(*names: str) -> list[Any]:
    """``"aten.sum.dim_IntList"`` -> OpOverload; a name without overload gives all of them; unknown names are left out,
    because the set of ops differs between the versions of PyTorch that are supported."""
    found = []
    for name in names:
        space, op, *overload = name.split(".")
        packet = getattr(getattr(torch.ops, space), op, None)
        if packet is None:
            continue
        chosen = overload or packet.overloads()
        found += [getattr(packet, o) for o in chosen if o in packet.overloads() and not o.endswith("out")]
    return found


def aligned(op: Op, values: Sequence[Any], shape: Sequence[Size] | None = None) -> State:
    """The state of values that broadcast against each other (aligned from the last dimension), as of ``a + b``.

    Values that index the examples but do not depend on them (masks, ``arange(B)``) may meet a batched value.
    """
    out = op.shape() if shape is None else tuple(shape)
    found: Batched | None = None
    for value in values:
        state = op.state(value)
        if not isinstance(state, Batched):
            continue
        own = op.shape(value)
        here = state.at(state.dim + len(out) - len(own))
        if not known(own[state.dim] == out[here.dim]):
            return op.mixed("the batch dimension of one argument is broadcast against another dimension")
        if found is None:
            found = here
        elif found.dim != here.dim:
            return op.mixed(f"the examples lie along dimension {found.dim} of one argument and {here.dim} of another")
        elif not (known(found.outer == here.outer) and known(found.inner == here.inner)):
            return op.mixed("the examples are folded differently in two arguments")
    return found or Shared()
