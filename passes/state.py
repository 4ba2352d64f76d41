"""Where the example is in a value of the joint graph: five states, and the size arithmetic they need.

A per-example gradient is what data parallelism computes when every rank holds one example, so the states are
those of sharding propagation:

    Shared                     Replicate     the same for every example
    Batched(dim, outer, inner) Shard(dim)    dimension ``dim`` has size outer * B * inner, the example is the middle factor
    Partial                    Partial(sum)  depends on the tangents and is already summed over examples: sum_b P_b
    Routed(dims, ids)          -             a row belongs to the example that an integer tensor of the graph names
    Mixed(reason, node)        -             examples interact here, or no rule is known
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from gnsfx._torch import divisible, exact_quotient, known

Size = int | torch.SymInt


@dataclass(frozen=True, slots=True)
class Shared:
    """Does not depend on the example. ``doubt`` says why that is an assumption; a gradient that rests on it is refused."""

    doubt: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Batched:
    """Dimension ``dim`` has size ``outer * B * inner``; the example is the middle factor."""

    dim: int
    outer: Size = 1
    inner: Size = 1

    def at(self, dim: int) -> Batched:
        return Batched(dim, self.outer, self.inner)


BOUNDARIES = -1


@dataclass(frozen=True, slots=True, eq=False)
class Ids:
    """The example of each row: ``rows[takes[0]][takes[1]].. % total // inner % B``.

    ``rows`` holds row numbers of a dimension of size ``total``, folded as outer * B * inner. With a
    ``column``, ``rows`` is a mask: the row numbers are the coordinates along that dimension of its nonzero entries; with
    ``BOUNDARIES`` it holds the positions at which documents begin and end. ``packed``: the rows are the positions of packed
    documents, which the caller says do not see each other.
    """

    rows: Node
    inner: Size
    total: Size
    column: int | None = None
    takes: tuple[Node, ...] = ()
    packed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """The entries along ``dims``, counted row-major in that order, belong to the examples ``ids``, known only from the data.

    ``across``: dimensions along which the entries have the same examples once more, as the columns of attention scores.
    """

    dims: tuple[int, ...]
    ids: Ids
    across: tuple[int, ...] = ()

    def at(self, dims: Sequence[int]) -> Routed:
        return Routed(tuple(dims), self.ids)


@dataclass(frozen=True, slots=True)
class Partial:
    """Depends on the tangents and is already summed over examples."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """Examples interact at ``node``, or no rule is known for it."""

    reason: str
    node: Node | None = None


State = Shared | Batched | Routed | Partial | Mixed


def describe(state: State | tuple) -> str:
    """One word for error messages and the printed graph."""
    if isinstance(state, tuple):
        return "(" + ", ".join(describe(s) for s in state) + ")"
    if isinstance(state, Routed):
        return f"routed({', '.join(map(str, state.dims))} by {state.ids.rows.name})"
    if isinstance(state, Batched):
        fold = "" if known(state.outer == 1) and known(state.inner == 1) else f", {state.outer}*B*{state.inner}"
        return f"batched({state.dim}{fold})"
    return type(state).__name__.lower()


def same_sizes(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes are known to be equal; adds no guard."""
    return len(a) == len(b) and all(known(x == y) for x, y in zip(a, b, strict=True))


def same_fold(a: Batched, b: Batched) -> bool:
    return known(a.outer == b.outer) and known(a.inner == b.inner)


def same_ids(a: Ids, b: Ids) -> bool:
    """Whether two expressions name the same examples for the same number of rows."""
    return (
        a.rows is b.rows
        and a.column == b.column
        and len(a.takes) == len(b.takes)
        and all(x is y for x, y in zip(a.takes, b.takes, strict=True))
        and known(a.inner == b.inner)
    )


def same_rows(a: Routed, b: Routed) -> bool:
    return a.dims == b.dims and a.across == b.across and same_ids(a.ids, b.ids)


def same_place(a: State | None, b: State | None) -> bool:
    """Whether two values have their examples along the same dimensions, folded or routed alike."""
    if isinstance(a, Routed):
        return isinstance(b, Routed) and same_rows(a, b)
    return isinstance(a, Batched) and isinstance(b, Batched) and a.dim == b.dim and same_fold(a, b)


def rows(state: Batched, examples: Size) -> Size:
    """Size of the batched dimension."""
    return state.outer * examples * state.inner


def product(sizes: Sequence[Size]) -> Size:
    return math.prod(sizes)


def divides(divisor: Size, value: Size) -> bool:
    """Whether ``divisor`` is known to divide ``value``, for symbolic sizes too; never adds a guard."""
    if known(divisor == value) or known(divisor == 1):
        return True
    if not known(divisor != 0):
        return False
    return known(value % divisor == 0) or divisible(value, divisor)  # pyright: ignore[reportOperatorIssue]


def quotient(value: Size, divisor: Size) -> Size:
    if known(divisor == 1):
        return value
    return 1 if known(divisor == value) else exact_quotient(value, divisor)


def reshape(state: Batched, before: Sequence[Size], after: Sequence[Size], examples: Size) -> Batched | None:
    """The state after a row-major reshape of a value of shape ``before`` into ``after``; None where it is lost.

    A reshape keeps row-major order, so the pair (elements before the example axis, elements behind it) is invariant. It
    keeps their number too: what is known of one side of the axis fixes the other, where sizes are symbols.
    """
    pre = product(before[: state.dim]) * state.outer
    post = state.inner * product(before[state.dim + 1 :])
    for dim in range(len(after)):
        head, tail = product(after[:dim]), product(after[dim + 1 :])
        outer = quotient(pre, head) if divides(head, pre) else None
        inner = quotient(post, tail) if divides(tail, post) else None
        if outer is not None and inner is not None and known(outer * examples * inner == after[dim]):
            return Batched(dim, outer, inner)
        if outer is not None and divides(outer * examples, after[dim]):
            return Batched(dim, outer, quotient(after[dim], outer * examples))
        if inner is not None and divides(examples * inner, after[dim]):
            return Batched(dim, quotient(after[dim], examples * inner), inner)
    return None
