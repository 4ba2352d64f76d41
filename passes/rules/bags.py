"""Embedding bags: row j of the result is made of the indices from ``offsets[j]`` to ``offsets[j + 1]``.

(B*n, L) indices, offsets 0, L, 2L ..         batched(0, inner=n*L) -> batched(0, inner=n)
indices of any number, offsets (B,)           shared, batched(0) -> batched(0)
backward                                      a gradient with a row per bag -> partial
"""

from __future__ import annotations

import torch
from torch.fx import Node

from gnsfx._torch import known, simplified
from gnsfx.passes.joint_graph import fake
from gnsfx.passes.rules.nn import outputs
from gnsfx.passes.rules.table import Op, overloads, rule
from gnsfx.passes.state import Batched, Mixed, Shared, Size, State, reshape, same_fold

SUM, MEAN, MAX = range(3)
RAGGED = (
    "its bags are cut out of one row of indices by offsets: mark the indices with gnsfx.mark_batch(indices, None), "
    "and the offsets with dim=0 where a bag is an example"
)


def bag_length(offsets: Node, indices: Node) -> Size | None:
    """The length of every bag where the offsets are 0, L, 2L .. up to the number of indices, as for a 2-D input."""
    if offsets.target is not torch.ops.prims.iota.default or offsets.kwargs.get("start") != 0:
        return None
    length, count = fake(offsets.kwargs["step"]), simplified(offsets.meta["val"].shape[0])
    return length if known(length * count == indices.meta["val"].shape[0]) else None


def bags(op: Op, grad: str | None = None) -> State:
    """The state of a value with a row per bag, from the indices, weights and offsets, and from a gradient with such rows."""
    found: list[Batched] = []
    length, count = bag_length(op["offsets"], op["indices"]), op.shape("offsets")[0]
    for name in ("indices", "per_sample_weights"):
        state = op.state(name) if op.args.get(name) is not None else Shared()
        if not isinstance(state, Batched):
            continue
        if length is None:
            return op.mixed(RAGGED)
        row = reshape(state, op.shape(name), (count, length), op.examples)
        if row is None or row.dim != 0:
            return op.mixed("its bags hold indices of several examples")
        found.append(row)
    given = [op.state(n) for n in ("offsets", grad) if n is not None]
    found += [s for s in given if isinstance(s, Batched)]
    if any(s.dim != 0 or not same_fold(s, found[0]) for s in found):
        return op.mixed("the examples lie along different dimensions of indices and gradient")
    return found[0] if found else Shared()


@rule(*overloads("aten._embedding_bag.default", "aten._embedding_bag_forward_only.default"))
def bag_rule(op: Op) -> State | tuple[State, ...]:
    if op.batched("weight"):
        return op.mixed("looks rows up in a table that depends on the example")
    if op.batched("offsets") and op["include_last_offset"]:
        return op.mixed(RAGGED)
    return outputs(op, bags(op))


@rule(*overloads("aten._embedding_bag_backward.default"))
def bag_backward_rule(op: Op) -> State:
    state = bags(op, "grad")
    if isinstance(state, Mixed):
        return state
    if op["scale_grad_by_freq"]:
        return op.mixed("scale_grad_by_freq divides by how often an index occurs in the whole batch")
    return op.mixed("its gradient is sparse") if op["sparse"] else op.contracted()


@rule(*overloads("aten._embedding_bag_per_sample_weights_backward.default"))
def bag_weights_backward_rule(op: Op) -> State:
    state, length = bags(op, "grad"), bag_length(op["offsets"], op["indices"])
    if not isinstance(state, Batched):
        return state
    return op.mixed(RAGGED) if length is None else Batched(0, state.outer, state.inner * length)
