"""Views, permutations, slices, concatenation and padding.

(B, T, D) -> (B*T, D)                  batched(0) -> batched(0, inner=T)
(B, T, H*d) -> (B, H, T, d)            batched(0) -> batched(0)
cat([x1, x2]) of two (B, D)            batched(0) -> batched(0, outer=2)
x[0], x[:2], flip or roll along B      mixed: examples are picked out or moved
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gnsfx._torch import known
from gnsfx.passes.joint_graph import fake
from gnsfx.passes.rules.table import Op, overloads, rule
from gnsfx.passes.state import Batched, Size, State, divides, quotient, reshape, same_fold

NOT_SPLIT = "takes some examples out of the batch"


@rule(*overloads("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.unsqueeze.default",
                 "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.view_copy.default"),
      linear=["self"])  # fmt: skip
def reshape_rule(op: Op) -> State:
    return op.reshaped()


@rule(*overloads("prims.view_of.default"), linear=["a"])
def view_of_rule(op: Op) -> State:
    return op.state("a")


@rule(*overloads("aten.view.dtype"), linear=["self"])  # of a gradient only between complex and real numbers
def view_dtype_rule(op: Op) -> State:
    state = op.state("self")
    assert isinstance(state, Batched)
    if state.dim == len(op.shape()) - 1:
        return op.mixed("reinterprets the batch dimension as another dtype")
    return state


@rule(*overloads("aten.permute.default"), linear=["self"])
def permute_rule(op: Op) -> State:
    state = op.state("self")
    assert isinstance(state, Batched)
    return state.at([op.dim(d) for d in op["dims"]].index(state.dim))


@rule(*overloads("aten.transpose.int", "aten.t.default"), linear=["self"])
def transpose_rule(op: Op) -> State:
    state = op.state("self")
    assert isinstance(state, Batched)
    a, b = (op.dim(op["dim0"]), op.dim(op["dim1"])) if "dim0" in op.args else (0, len(op.shape()) - 1)
    return state.at({a: b, b: a}.get(state.dim, state.dim))


@rule(*overloads("aten.expand.default", "aten.repeat.default"), linear=["self"])
def expand_rule(op: Op) -> State:
    state = op.state("self")
    assert isinstance(state, Batched)
    before, after = op.shape("self"), op.shape()
    here = state.at(state.dim + len(after) - len(before))
    if known(before[state.dim] == after[here.dim]):
        return here
    if divides(before[state.dim], after[here.dim]) and "repeats" in op.args:
        return Batched(here.dim, state.outer * quotient(after[here.dim], before[state.dim]), state.inner)
    return op.mixed("repeats the batch dimension")


@rule(*overloads("aten.slice.Tensor"), linear=["self"])
def slice_rule(op: Op) -> State:
    state, dim = op.state("self"), op.dim(op["dim"])
    assert isinstance(state, Batched)
    if state.dim != dim or known(op.shape("self")[dim] == op.shape()[dim]):
        return state
    block = op.examples * state.inner
    start, length = fake(op["start"] or 0), op.shape()[dim]
    if not known(start >= 0):
        start = start + op.shape("self")[dim]
    whole = known(op["step"] == 1) and divides(block, length) and (known(start == 0) or divides(block, start))
    if _every_nth(op, op.shape("self")[dim], length) and divides(op["step"], state.inner):
        return Batched(dim, state.outer, quotient(state.inner, op["step"]))
    return Batched(dim, quotient(length, block), state.inner) if whole else op.mixed(NOT_SPLIT)


def _every_nth(op: Op, rows: Size, picked: Size) -> bool:
    """Whether a slice takes one of every ``step`` rows, as of views of each example that lie side by side."""
    start, step = fake(op["start"] or 0), op["step"]
    return known(step > 1) and known(start >= 0) and known(start < step) and known(rows == picked * step)


@rule(*overloads("aten.select.int", "aten.select_copy.int"), linear=["self"])
def select_rule(op: Op) -> State:
    state, dim = op.state("self"), op.dim(op["dim"])
    assert isinstance(state, Batched)
    return op.mixed(NOT_SPLIT) if state.dim == dim else state.at(state.dim - (dim < state.dim))


@rule(
    *overloads(
        "aten.split.Tensor", "aten.split_with_sizes.default", "aten.unbind.int", "aten.split_with_sizes_copy.default"
    ),
    linear=["self"],
)
def split_rule(op: Op) -> tuple[State, ...]:
    state, dim = op.state("self"), op.dim(op["dim"])
    assert isinstance(state, Batched)
    parts = op.node.meta["val"]
    if "unbind" in str(op.node.target):
        one: State = op.mixed(NOT_SPLIT) if state.dim == dim else state.at(state.dim - (dim < state.dim))
        return (one,) * len(parts)
    if state.dim != dim:
        return (state,) * len(parts)
    block, start = op.examples * state.inner, 0
    found: list[State] = []
    for part in parts:
        size = part.shape[dim]
        whole = divides(block, size) and (known(start == 0) or divides(block, start))
        found.append(Batched(dim, quotient(size, block), state.inner) if whole else op.mixed(NOT_SPLIT))
        start = start + size
    return tuple(found)


@rule(*overloads("aten.cat.default"), linear=["tensors"])
def cat_rule(op: Op) -> State:
    dim = op["dim"] % len(op.shape())
    tensors = [t for t in op["tensors"] if len(op.shape(t)) == len(op.shape())]
    states = [op.state(t) for t in tensors]
    batched = [s for s in states if isinstance(s, Batched)]
    first = batched[0]
    if any(s.dim != first.dim for s in batched):
        return op.mixed("concatenates values whose examples lie along different dimensions")
    if first.dim != dim:
        return (
            first if all(same_fold(s, first) for s in batched) else op.mixed("concatenates values folded differently")
        )
    if not all(known(s.inner == first.inner) for s in batched):
        return op.mixed("concatenates values folded differently")
    block, outer = op.examples * first.inner, 0
    for tensor, state in zip(tensors, states, strict=True):
        if isinstance(state, Batched):
            outer = outer + state.outer
        elif op.tangent and is_zero(tensor) and divides(block, op.shape(tensor)[dim]):
            outer = outer + quotient(op.shape(tensor)[dim], block)  # the gradient of a view that is not used
        else:
            return op.mixed("concatenates the examples with rows that belong to none")
    return Batched(dim, outer, first.inner)


def is_zero(node: Any) -> bool:
    """Whether a value is known to be zero everywhere."""
    while node.target in (torch.ops.aten.expand.default, torch.ops.aten.view.default, torch.ops.aten.clone.default):
        node = node.args[0]
    return node.target is torch.ops.aten.full.default and isinstance(node.args[1], (int, float)) and node.args[1] == 0


@rule(*overloads("aten.constant_pad_nd.default"), linear=["self"])
def pad_rule(op: Op) -> State:
    state = op.state("self")
    assert isinstance(state, Batched)
    behind = len(op.shape()) - 1 - state.dim
    pads = op["pad"][2 * behind : 2 * behind + 2]  # one in front and one taken away keep the size
    return state if all(known(fake(p) == 0) for p in pads) else op.mixed("pads the batch dimension")


@rule(*overloads("aten.flip.default", "aten.roll.default"), linear=["self"])
@rule(*overloads("prims.rev.default"), linear=["a"])
def move_rule(op: Op) -> State:
    name = "self" if "self" in op.args else "a"
    state, dims = op.state(name), op["dims"]
    assert isinstance(state, Batched)
    if not dims or state.dim in [op.dim(d, of=name) for d in dims]:
        return op.mixed("moves examples along the batch dimension")
    return state


@rule(*overloads("aten.tril.default", "aten.triu.default"), linear=["self"])
def triangle_rule(op: Op) -> State:
    return op.state("self")  # multiplies by a mask of the same shape


@rule(*overloads("aten.diagonal.default", "aten.diagonal_copy.default"), linear=["self"])
def diagonal_rule(op: Op) -> State:
    state, a, b = op.state("self"), op.dim(op["dim1"]), op.dim(op["dim2"])
    assert isinstance(state, Batched)
    if state.dim in (a, b):
        return op.mixed("takes a diagonal through the batch dimension")
    return state.at(state.dim - (a < state.dim) - (b < state.dim))


@rule(*overloads("aten.unfold.default"), linear=["self"])
def unfold_rule(op: Op) -> State:
    state = op.state("self")
    assert isinstance(state, Batched)
    return op.mixed("takes windows along the batch dimension") if state.dim == op.dim(op["dimension"]) else state


@rule(
    *overloads("aten.slice_scatter.default", "aten.select_scatter.default", "aten.diagonal_scatter.default"),
    linear=["self src"],
)
def scatter_view_rule(op: Op) -> State:
    """Backward of slice, select and diagonal: ``src`` is written into a copy of ``self``."""
    target = str(op.node.target)
    own, src = op.state("self"), op.state("src")
    if "diagonal" in target:
        dims = [op.dim(op["dim1"]), op.dim(op["dim2"])]
        back = None
        if isinstance(src, Batched) and src.dim < len(op.shape()) - 2:
            back = src.at([d for d in range(len(op.shape())) if d not in dims][src.dim])
    else:
        dims = [op.dim(op["dim"])]
        back = src.at(src.dim + ("select" in target and src.dim >= dims[0])) if isinstance(src, Batched) else None
    if isinstance(src, Batched) and back is None:
        return op.mixed("writes into a diagonal through the batch dimension")
    at = back or own
    assert isinstance(at, Batched)
    if "slice" in target and at.dim in dims and _every_nth(op, op.shape()[at.dim], op.shape("src")[at.dim]):
        wide = own if back is None else Batched(at.dim, at.outer, at.inner * op["step"])
        assert isinstance(wide, Batched)
        same = not isinstance(own, Batched) or (own.dim == wide.dim and same_fold(own, wide))
        return wide if same and divides(op["step"], wide.inner) else op.mixed("writes into rows of other examples")
    if isinstance(own, Batched) and back is not None and (own.dim != back.dim or not same_fold(own, back)):
        whole = own.dim == back.dim and own.dim in dims
        return (
            own
            if whole and known(own.inner == back.inner) and _whole_blocks(op, own)
            else op.mixed("writes into rows of other examples")
        )
    found = own if isinstance(own, Batched) else back
    assert found is not None
    if found.dim not in dims or known(
        op.shape("self")[found.dim] == op.shape("src")[found.dim] if "slice" in target else False
    ):
        return found
    if "slice" not in target:
        return op.mixed("writes into one example of the batch")
    if isinstance(own, Batched):
        return own if _whole_blocks(op, own) else op.mixed("writes into some examples of the batch")
    rows = op.shape()[found.dim]
    block = op.examples * found.inner
    if divides(block, rows) and _whole_blocks(op, found):
        return Batched(found.dim, quotient(rows, block), found.inner)
    return op.mixed("writes into some examples of the batch")


def _whole_blocks(op: Op, state: Batched) -> bool:
    start = fake(op["start"] or 0)
    block = op.examples * state.inner
    return (
        known(op["step"] == 1)
        and divides(block, op.shape("src")[state.dim])
        and (known(start == 0) or divides(block, start))
    )


@rule(*overloads("aten.as_strided.default", "aten.as_strided_copy.default"))
def as_strided_rule(op: Op) -> State:
    state = op.state("self")
    assert isinstance(state, Batched)
    return _restrided(op, op["self"].meta["val"], state) or op.mixed("reads memory by strides")


@rule(*overloads("aten.as_strided_scatter.default"))
def as_strided_scatter_rule(op: Op) -> State:
    """Backward of a restriding that permutes dimensions: ``src`` fills all of ``self``."""
    value, src = op["self"].meta["val"], op.state("src")
    if not isinstance(src, Batched) or op["storage_offset"]:
        return op.mixed("writes memory by strides")
    dims = _matching(value, op["size"], op["stride"])
    if dims is not None:
        return src.at(dims[src.dim])
    if value.is_contiguous() and _row_major(op, op.shape("src")):
        found = reshape(src, op.shape("src"), op.shape(), op.examples)
        if found is not None:
            return found
    return op.mixed("writes memory by strides")


def _restrided(op: Op, value: Any, state: Batched) -> State | None:
    if op["storage_offset"]:
        return None
    dims = _matching(value, op["size"], op["stride"])
    if dims is not None:
        return state.at(dims.index(state.dim)) if state.dim in dims else None
    if not value.is_contiguous() or not _row_major(op, op.shape()):
        return None
    found = op.reshaped()
    return found if isinstance(found, Batched) else None


def _matching(value: Any, sizes: Any, strides: Any) -> list[int] | None:
    """For each dimension of the restrided value the dimension of ``value`` with its size and stride; None if one has none."""
    here = [d for d in range(value.dim()) if not known(value.shape[d] == 1)]
    found: list[int] = []
    for size, stride in zip(sizes, strides, strict=True):
        if known(fake(size) == 1):
            found.append(-1)
            continue
        same = [
            d
            for d in here
            if known(value.shape[d] == fake(size)) and known(value.stride(d) == fake(stride)) and d not in found
        ]
        if len(same) != 1:
            return None
        found.append(same[0])
    return found if len([d for d in found if d >= 0]) == len(here) else None


def _row_major(op: Op, shape: Sequence[Size]) -> bool:
    """Whether the restrided value of this shape reads all of ``self`` in order."""
    expected: Size = 1
    for size, stride in zip(reversed(shape), reversed(op["stride"]), strict=True):
        if not (known(size == 1) or known(fake(stride) == expected)):
            return False
        expected = expected * size
    return known(expected == op["self"].meta["val"].numel())
