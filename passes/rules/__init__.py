"""The rule table. To add a rule: find the file of the op's family, write one decorated function.

pointwise, views, reductions, matmul, indexing, nn, bags, distances, flex, linalg; rows chosen by data: picks, routing, naming.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload, OpOverloadPacket

from gnsfx.errors import RuleError
from gnsfx.passes.rules import (  # noqa: F401  (fill the table)
    bags,
    distances,
    flex,
    indexing,
    linalg,
    matmul,
    nn,
    picks,
    pointwise,
    reductions,
    routing,
    views,
)
from gnsfx.passes.rules.nn import leading, outputs
from gnsfx.passes.rules.table import LINEAR, RULES, Op, Rule, rule
from gnsfx.passes.state import Batched, Mixed, Partial, Shared, State

__all__ = ["LINEAR", "RULES", "Batched", "Mixed", "Op", "Partial", "Shared", "State", "register_rule", "rule"]


def _independent(op: Op) -> State | tuple[State, ...]:
    return outputs(op, leading(op))


FAMILIES: dict[str, Rule] = {"pointwise": pointwise.pointwise_rule, "batch first": _independent}


def register_rule(op: Any, family: str | None = None) -> Callable[[Rule], Rule]:
    """Tell gnsfx where the example axis is after a custom op.

    Args:
        op: the op, ``torch.ops.mylib.myop`` or one overload of it.
        family: ``"pointwise"`` (arguments broadcast) or ``"batch first"`` (dimension 0 of every tensor is the batch and
            the op treats examples apart); the rule is then complete. Without it the result decorates a function
            ``rule(op) -> state``, which sees the arguments by name (``op["x"]``), their states (``op.state("x")``)
            and shapes (``op.shape("x")``), and returns a state, or a tuple of states for an op with several results.

    Raises:
        RuleError: not an op, a family that does not exist, or an op that has a rule already.

    Example:
        >>> gnsfx.register_rule(torch.ops.mylib.swish, "pointwise")
        >>> @gnsfx.register_rule(torch.ops.mylib.pool.default)
        ... def pool_rule(op):
        ...     state = op.state("x")
        ...     return state if state.dim == 0 else op.mixed("pools over the batch")
    """
    if isinstance(op, OpOverloadPacket):
        targets = [getattr(op, name) for name in op.overloads()]
    elif isinstance(op, OpOverload):
        targets = [op]
    else:
        raise RuleError(f"register_rule takes an op such as torch.ops.mylib.myop, not {op!r}.")
    enter = rule(*targets)
    if family is None:
        return enter
    if family not in FAMILIES:
        raise RuleError(f"family={family!r} does not exist; the families are {', '.join(map(repr, FAMILIES))}.")
    enter(FAMILIES[family])
    return lambda function: function
