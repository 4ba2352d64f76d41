"""Pointwise ops: the result has the example where the broadcast arguments have it.

    (B, T, D) + (D,) -> (B, T, D)          batched(0), shared -> batched(0)

Every op tagged pointwise falls under one rule; the rows here are the untagged ones and the linear ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from gnsfx._torch import known, tree_flatten
from gnsfx.passes.rules.table import LINEAR, Op, aligned, overloads, rule
from gnsfx.passes.state import Batched, Shared, State


def tensors(op: Op) -> list[Node]:
    """Every tensor argument of a node, lists flattened."""
    leaves = tree_flatten((op.node.args, op.node.kwargs))[0]
    return [a for a in leaves if isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor)]


def pointwise_rule(op: Op) -> State | tuple[State, ...]:
    value = op.node.meta["val"]
    if isinstance(value, (tuple, list)):  # an empty buffer carries nothing
        return tuple(Shared() if known(v.numel() == 0) else aligned(op, tensors(op), tuple(v.shape)) for v in value)
    return aligned(op, tensors(op))


def is_pointwise(target: Any) -> bool:
    return torch.Tag.pointwise in getattr(target, "tags", ())


UNTAGGED = overloads(
    "aten.clone.default", "aten.copy.default", "aten._to_copy.default", "aten.native_dropout_backward.default",
    "aten.bernoulli.p", "aten.bernoulli.default", "aten.bernoulli.Tensor", "aten.rand_like.default", "aten.randn_like.default",
    "aten.randint_like.default", "aten.randint_like.low_dtype", "aten.normal_functional.default", "aten.uniform.default",
    "aten.fill.Tensor", "aten.masked_fill.Tensor", "aten.polar.default", "aten.complex.default", "aten.view_as_real.default",
    "aten.view_as_complex.default", "aten.real.default", "aten.imag.default", "aten._conj.default", "aten._conj_physical.default",
    "aten.conj_physical.default", "aten.resolve_conj.default", "aten._neg_view.default", "aten.resolve_neg.default", "aten._prelu_kernel.default",
    "aten._prelu_kernel_backward.default", "aten.where.self", "aten.rrelu_with_noise_functional.default", "aten.alias.default", "aten.detach.default",
    "aten.lift_fresh_copy.default", "aten.log_sigmoid_forward.default", "aten.log_sigmoid_backward.default",
    "aten.glu_backward.default", "prims.convert_element_type.default", "prims.fma.default", "prims.div.default", "prims.device_put.default",
    "aten._assert_tensor_metadata.default", "aten._cast_Float.default", "prims._inductor_prims.default",
)  # fmt: skip
UNTAGGED = [op for op in dict.fromkeys(UNTAGGED) if not is_pointwise(op) and "glu_backward" not in str(op)]


@rule(*[op for op in UNTAGGED if "view_as" not in str(op)])
def untagged_rule(op: Op) -> State | tuple[State, ...]:
    return pointwise_rule(op)


@rule(*overloads("aten.bucketize.Tensor"))
def bucketize_rule(op: Op) -> State:
    return op.mixed("sorts values between those of the examples") if op.batched("boundaries") else op.state("self")


@rule(*overloads("aten.fake_quantize_per_tensor_affine_cachemask.default",
                 "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default",
                 "aten.fake_quantize_per_channel_affine_cachemask.default"))  # fmt: skip
def fake_quantize_rule(op: Op) -> tuple[State, ...]:
    """The quantised value, and where it was in range."""
    others = [n for n in ("scale", "zero_point", "fake_quant_enabled") if n in op.args]
    return (
        op.mixed("quantises with a scale that depends on the example") if op.batched(*others) else op.state("self"),
    ) * 2


@rule(*overloads("aten.view_as_real.default", "aten.view_as_complex.default"), linear=["self"])
def complex_view_rule(op: Op) -> State:
    state = op.state("self")  # the dimension of size 2 is the last one: it comes or goes behind the example
    if isinstance(state, Batched) and state.dim == len(op.shape()):
        return op.mixed("takes examples for real and imaginary parts")
    return state


CONSTANT = set(overloads(
    "aten.full_like.default", "aten.zeros_like.default", "aten.ones_like.default", "aten.empty_like.default", "aten.new_zeros.default",
    "aten.new_ones.default", "aten.new_full.default", "aten.new_empty.default", "aten.empty_permuted.default", "aten.new_empty_strided.default",
))  # fmt: skip
"""These take sizes from an argument, nothing else."""


@rule(*CONSTANT)
def constant_rule(op: Op) -> State:
    return Shared()


def linear(groups: list[str], *names: str) -> None:
    for target in overloads(*names):
        LINEAR[target] = tuple(frozenset(group.split()) for group in groups)


linear(["self other"], "aten.add.Tensor", "aten.sub.Tensor", "aten.where.self")
linear(["self", "other"], "aten.mul.Tensor")
linear(["self"], "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar", "aten.neg.default", "aten.clone.default",
       "aten._to_copy.default", "aten.alias.default", "aten.detach.default", "aten.real.default",
       "aten.imag.default", "aten._conj.default", "aten._conj_physical.default", "aten.conj_physical.default", "aten.resolve_conj.default",
       "aten._neg_view.default", "aten.resolve_neg.default", "aten.lift_fresh_copy.default")  # fmt: skip
linear(["a"], "prims.convert_element_type.default", "prims.device_put.default")
linear(["a c", "b c"], "prims.fma.default")
linear(["src", "self src"], "aten.copy.default")
