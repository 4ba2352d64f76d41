"""Matrix products.

(B*T, I) @ (I, O)                      rows batched -> batched(0)
(I, B*T) @ (B*T, O), backward          both contracted over the examples -> partial: the weight gradient
(B, D) @ (D, B)                        examples meet other examples -> mixed (in-batch negatives)
"""

from __future__ import annotations

from gnsfx.passes.rules.table import Op, overloads, rule
from gnsfx.passes.state import Batched, Shared, State, same_fold

CROSS = "a matrix product of examples with other examples (in-batch negatives, attention across the batch)"
FOLDED = "a matrix product of values folded differently"


def matmul_state(op: Op, left: str, right: str) -> State:
    """State of ``left @ right`` for 2-D, or 3-D with a leading dimension that is not contracted."""
    a, b = op.state(left), op.state(right)
    lead = len(op.shape(left)) - 2
    at_a = a.dim - lead if isinstance(a, Batched) else None  # 0 rows, 1 contracted, negative: leading
    at_b = b.dim - lead if isinstance(b, Batched) else None  # 0 contracted, 1 columns
    if isinstance(a, Batched) and isinstance(b, Batched) and not same_fold(a, b):
        return op.mixed(FOLDED)
    if at_a is None:
        assert isinstance(b, Batched)
        return op.contracted() if at_b == 0 else b
    assert isinstance(a, Batched)
    if at_b is None:
        return op.contracted() if at_a == 1 else a
    if at_a == -1 and at_b == -1:
        return a
    return op.contracted() if (at_a, at_b) == (1, 0) else op.mixed(CROSS)


@rule(*overloads("aten.mm.default", "aten.bmm.default", "aten.mm.dtype", "aten.bmm.dtype"), linear=["self", "mat2"])
def mm_rule(op: Op) -> State:
    return matmul_state(op, "self", "mat2")


@rule(*overloads("aten.dot.default"), linear=["self", "tensor"])
@rule(*overloads("aten.vdot.default"), linear=["self", "other"])
def dot_rule(op: Op) -> State:
    a, b = op.state("self"), op.state("tensor" if "tensor" in op.args else "other")
    if isinstance(a, Batched) and isinstance(b, Batched) and not same_fold(a, b):
        return op.mixed(FOLDED)
    return op.contracted()


@rule(*overloads("aten.mv.default"), linear=["self", "vec"])
def mv_rule(op: Op) -> State:
    a, b = op.state("self"), op.state("vec")
    if isinstance(a, Batched) and a.dim == 0:
        return op.mixed(CROSS) if isinstance(b, Batched) else a
    if isinstance(a, Batched) and isinstance(b, Batched) and not same_fold(a, b):
        return op.mixed(FOLDED)
    return op.contracted()


@rule(*overloads("aten.addmm.default", "aten.baddbmm.default"))
def addmm_rule(op: Op) -> State:
    left, right = ("mat1", "mat2") if "mat1" in op.args else ("batch1", "batch2")
    shared = not isinstance(op.state(left), Batched) and not isinstance(op.state(right), Batched)
    state = Shared() if shared else matmul_state(op, left, right)
    bias = op.state("self")
    if not isinstance(bias, Batched):
        return (
            state
            if isinstance(state, (Batched, Shared))
            else op.mixed("adds to a weight gradient inside a matrix product")
        )
    here = bias.at(bias.dim + len(op.shape()) - len(op.shape("self")))
    if isinstance(state, Batched) and (state.dim != here.dim or not same_fold(state, here)):
        return op.mixed("adds values whose examples lie along different dimensions")
    return state if isinstance(state, Batched) else here if shared else op.mixed(CROSS)


@rule(*overloads("aten._trilinear.default"), linear=["i1", "i2", "i3"])
def trilinear_rule(op: Op) -> State:
    """sum over ``sumdim`` of i1 * i2 * i3, each with size-1 dimensions inserted at ``expandN`` (Bilinear)."""
    found: Batched | None = None
    for number in "123":
        state = op.state(f"i{number}")
        if not isinstance(state, Batched):
            continue
        for dim in sorted(op[f"expand{number}"]):
            state = state.at(state.dim + (dim <= state.dim))
        if found is not None and (found.dim != state.dim or not same_fold(found, state)):
            return op.mixed("the examples lie along different dimensions of two arguments")
        found = state
    assert found is not None
    if found.dim in op["sumdim"]:
        return op.contracted()
    return found.at(found.dim - sum(d < found.dim for d in op["sumdim"]))
