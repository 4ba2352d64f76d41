"""``flex_attention``: the higher-order op that takes the score and mask functions as graphs of their own.

query (B, H, T, D), key and value (B, G, S, D)      batched(0) -> batched(0), logsumexp batched(0)
backward                                            three gradients batched(0)
                                                    tensors read by score_mod: one gradient for all examples -> mixed

A mask carries no gradient, so the tensors it reads need not be looked at: the query, key and value of one example reach
the result of that example alone, whatever is masked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from gnsfx._torch import known
from gnsfx.passes.rules.table import Op, rule
from gnsfx.passes.state import Batched, Shared, State, same_fold

FORWARD = ("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "score_buffers")
BACKWARD = ("query", "key", "value", "out", "logsumexp", "grad_out", "grad_logsumexp", "score_mod", "joint", "block_mask", "scale",
            "kernel_options", "score_buffers")  # fmt: skip
CAPTURED = "score_mod reads this tensor, and the attention kernel gives it one gradient for all examples"


@rule(torch.ops.higher_order.flex_attention)
def flex_rule(op: Op) -> State | tuple[State, ...]:
    bound: dict[str, Any] = dict(zip(FORWARD, op.node.args, strict=False))
    state = _rows(op, bound, FORWARD[:3])
    empty = [known(v.numel() == 0) for v in op.node.meta["val"]]  # maximal scores that were not asked for
    return tuple(Shared() if e and isinstance(state, Batched) else state for e in empty)


@rule(torch.ops.higher_order.flex_attention_backward)
def flex_backward_rule(op: Op) -> State | tuple[State, ...]:
    bound: dict[str, Any] = dict(zip(BACKWARD, op.node.args, strict=False))
    state = _rows(op, bound, BACKWARD[:7])
    captured = op.mixed(CAPTURED) if bound["score_buffers"] else Shared()
    return state, state, state, captured


def _rows(op: Op, bound: dict[str, Any], names: tuple[str, ...]) -> State:
    if any(isinstance(op.state(b), Batched) and b.meta["val"].is_floating_point() for b in bound["score_buffers"]):
        return op.mixed("score_mod reads a tensor that depends on the example")
    found: Batched | None = None
    for name in names:
        state = op.state(bound[name])
        if not isinstance(state, Batched):
            continue
        if state.dim != 0:
            return op.mixed("the examples lie along another dimension than the first")
        if found is not None and not same_fold(found, state):
            return op.mixed("the examples are folded differently in two arguments")
        found = state
    sizes = [op.shape(bound[n])[0] for n in names if isinstance(bound[n], Node)]
    if not all(known(s == sizes[0]) for s in sizes):
        return op.mixed("attends from every example to one sequence, whose gradient is summed over them")
    return found or Shared()
