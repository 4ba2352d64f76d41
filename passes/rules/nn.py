"""Convolution, pooling, resampling, normalisation, attention and Fourier transforms: ops whose leading dimensions are independent.

convolution_backward((B, O, ...), (B, C, ...))  -> batched(0), partial, partial
convolution of (1, B*C, ...) in B groups        -> batched(1), a weight for each example
scaled_dot_product_attention of (B, H, T, D)    -> batched(0), logsumexp batched(0), random state shared
"""

from __future__ import annotations

import re

import torch

from gnsfx._torch import known, simplified
from gnsfx.passes.joint_graph import fake
from gnsfx.passes.rules.pointwise import tensors
from gnsfx.passes.rules.table import LINEAR, Op, overloads, rule
from gnsfx.passes.state import Batched, Shared, State, divides, quotient, rows, same_fold


def leading(op: Op, names: list[str] | None = None, below: int = 1) -> State:
    """The one state that the batched arguments share, if it lies in the first ``below`` dimensions."""
    values = [op[n] for n in names if op[n] is not None] if names else tensors(op)
    found: Batched | None = None
    for value in values:
        state = op.state(value)
        if not isinstance(state, Batched):
            continue
        if state.dim >= below:
            return op.mixed(f"works across dimension {state.dim}, where the examples lie")
        if found is not None and (found.dim != state.dim or not same_fold(found, state)):
            return op.mixed("the examples lie along different dimensions of two arguments")
        found = state
    return found or Shared()


def outputs(op: Op, state: State) -> State | tuple[State, ...]:
    """The same state for every output that has the batched dimension; random seeds and the like are shared."""
    value = op.node.meta["val"]
    if not isinstance(value, (tuple, list)):
        return state

    def of(v: object) -> State:
        if not isinstance(state, Batched) or not isinstance(v, torch.Tensor):
            return Shared() if isinstance(state, Batched) else state
        shape = tuple(map(simplified, v.shape))
        expected = rows(state, op.examples)
        if len(shape) > state.dim and known(shape[state.dim] == expected):
            return state
        numbers = v.is_floating_point() or v.is_complex()
        open_ = numbers and len(shape) > state.dim and not known(shape[state.dim] != expected)
        return op.mixed("whether this result has a row per example depends on a size") if open_ else Shared()

    return tuple(of(v) for v in value)


def _in_groups(op: Op) -> bool:
    """(1, B*C, ...) with groups that no two examples share: a convolution with a weight for each example."""
    x, groups = op.state("input"), fake(op["groups"])
    return isinstance(x, Batched) and x.dim == 1 and known(x.outer == 1) and divides(op.examples, groups)


@rule(*overloads("aten.convolution.default"))  # with a bias it is not linear
def convolution_rule(op: Op) -> State:
    if _in_groups(op):
        same = all(s.dim == 0 and known(s.outer == 1) for s in op.batched("weight", "bias").values())
        per_example = divides(op.examples, op.shape()[1])
        return (
            Batched(1, 1, quotient(op.shape()[1], op.examples))
            if same and per_example
            else op.mixed("convolves with a weight that depends on another example")
        )
    if op.batched("weight", "bias"):
        return op.mixed("convolves with a weight that depends on the example")
    return leading(op, ["input"])


@rule(*overloads("aten.convolution_backward.default"))
def convolution_backward_rule(op: Op) -> tuple[State, ...]:
    if _in_groups(op):
        g, x, w = (op.state(n) for n in ("grad_output", "input", "weight"))
        if (
            isinstance(g, Batched)
            and g.dim == 1
            and known(g.outer == 1)
            and (not isinstance(w, Batched) or (w.dim == 0 and known(w.outer == 1)))
        ):
            return x, Batched(0, 1, quotient(op.shape("weight")[0], op.examples)), Batched(0, 1, g.inner)
        return (op.mixed("convolves with a weight that depends on another example"),) * 3
    state = leading(op, ["grad_output", "input"])
    if not isinstance(state, Batched) or op.batched("weight"):
        return (op.mixed("convolves with a weight that depends on the example") if op.batched("weight") else state,) * 3
    output = op.state("grad_output")
    return output, op.contracted(), op.contracted() if isinstance(output, Batched) else output


SPATIAL = overloads(*(f"aten.{name}" for name in (
    "avg_pool1d.default", "avg_pool2d.default", "avg_pool2d_backward.default", "avg_pool3d.default", "avg_pool3d_backward.default",
    "max_pool2d_with_indices.default", "max_pool2d_with_indices_backward.default", "max_pool3d_with_indices.default",
    "max_pool3d_with_indices_backward.default", "_adaptive_avg_pool2d.default", "_adaptive_avg_pool2d_backward.default",
    "_adaptive_avg_pool3d.default", "_adaptive_avg_pool3d_backward.default", "adaptive_max_pool2d.default",
    "adaptive_max_pool2d_backward.default", "adaptive_max_pool3d.default", "adaptive_max_pool3d_backward.default",
    "fractional_max_pool2d.default", "fractional_max_pool2d_backward.default",
    "max_unpool2d.default", "upsample_nearest1d.default", "upsample_nearest1d_backward.default", "upsample_nearest2d.default",
    "upsample_nearest2d_backward.default", "upsample_nearest3d.default", "upsample_nearest3d_backward.default",
    "upsample_linear1d.default", "upsample_linear1d_backward.default", "upsample_bilinear2d.default",
    "upsample_bilinear2d_backward.default", "upsample_trilinear3d.default", "upsample_trilinear3d_backward.default",
    "upsample_bicubic2d.default", "upsample_bicubic2d_backward.default", "_upsample_bilinear2d_aa.default",
    "_upsample_bilinear2d_aa_backward.default",
    "_upsample_bicubic2d_aa.default", "_upsample_bicubic2d_aa_backward.default", "reflection_pad1d.default", "reflection_pad1d_backward.default",
    "reflection_pad2d.default", "reflection_pad2d_backward.default", "reflection_pad3d.default", "reflection_pad3d_backward.default",
    "replication_pad1d.default", "replication_pad1d_backward.default", "replication_pad2d.default", "replication_pad2d_backward.default",
    "replication_pad3d.default", "replication_pad3d_backward.default",
    "_unsafe_upsample_nearest2d.default",
)))  # fmt: skip
SPATIAL += overloads(
    "prims._low_memory_max_pool_with_offsets.default", "prims._low_memory_max_pool_offsets_to_indices.default"
)


@rule(*SPATIAL, linear=[])
def spatial_rule(op: Op) -> State | tuple[State, ...]:
    """Pooling, resampling and padding of the last n dimensions; examples and channels stay apart."""
    found = re.search(r"([123])d", str(op.node.target))
    spatial = int(found.group(1)) if found else len(op["kernel_size"])
    state = leading(op, below=len(op.shape(tensors(op)[0])) - spatial)
    return outputs(op, state)


@rule(*overloads("aten.grid_sampler_2d.default", "aten.grid_sampler_2d_backward.default", "aten.grid_sampler_3d.default",
                 "aten.grid_sampler_3d_backward.default", "aten.im2col.default", "aten.col2im.default", "aten.pixel_shuffle.default",
                 "aten.pixel_unshuffle.default", "aten.channel_shuffle.default"))  # fmt: skip
def first_dimension_rule(op: Op) -> State | tuple[State, ...]:
    name, dims = str(op.node.target), {len(op.shape(t)) for t in tensors(op)}
    if min(dims) < (3 if "col2im" in name else 4 if "im2col" in name or "pixel" in name else 0):
        return op.mixed("takes the examples for channels: there is no batch dimension")
    return outputs(op, leading(op))


@rule(*overloads("aten.native_layer_norm.default", "aten._fused_rms_norm.default"))
def layer_norm_rule(op: Op) -> State | tuple[State, ...]:
    if op.batched("weight") or ("bias" in op.args and op.batched("bias")):
        return (op.mixed("normalises with a scale that depends on the example"),) * len(op.node.meta["val"])
    return outputs(op, leading(op, ["input"], below=len(op.shape("input")) - len(op["normalized_shape"])))


@rule(*overloads("aten.native_layer_norm_backward.default", "aten._fused_rms_norm_backward.default"))
def layer_norm_backward_rule(op: Op) -> tuple[State, ...]:
    names = [n for n in ("grad_out", "input", "mean", "rstd") if n in op.args]
    state = leading(op, names, below=len(op.shape("input")) - len(op["normalized_shape"]))
    rest = op.contracted() if isinstance(state, Batched) else state
    return (state,) + (rest,) * (len(op.node.meta["val"]) - 1)


@rule(*overloads("aten.native_group_norm.default"))
def group_norm_rule(op: Op) -> State | tuple[State, ...]:
    return outputs(op, leading(op, ["input"]))


@rule(*overloads("aten.native_group_norm_backward.default"))
def group_norm_backward_rule(op: Op) -> tuple[State, ...]:
    state = leading(op, ["grad_out", "input", "mean", "rstd"])
    rest = op.contracted() if isinstance(state, Batched) else state
    return state, rest, rest


ATTENTION = overloads(*(f"aten._scaled_dot_product_{kind}{back}.default" for back in ("", "_backward") for kind in (
    "flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention", "fused_attention_overrideable")))  # fmt: skip


@rule(*ATTENTION)
def attention_rule(op: Op) -> State | tuple[State, ...]:
    """(B, H, T, D) operands; a mask broadcasts against (B, H, T, S). Examples may be folded into B or H."""
    masks = [n for n in ("attn_mask", "attn_bias") if isinstance(op.args.get(n), type(op.node))]
    for name in masks:
        state = op.state(name)
        if isinstance(state, Batched) and state.dim + 4 - len(op.shape(name)) != state.dim:
            return outputs(op, op.mixed("the attention mask has its examples along another dimension than the query"))
    return outputs(op, leading(op, below=2))


@rule(*overloads("aten._fft_r2c.default", "aten._fft_c2c.default", "aten._fft_c2r.default"), linear=["self"])
def fft_rule(op: Op) -> State:
    state = op.state("self")
    assert isinstance(state, Batched)
    return op.mixed("transforms along the batch dimension") if state.dim in [op.dim(d) for d in op["dim"]] else state


LINEAR[torch.ops.aten._weight_norm_interface_backward.default] = (frozenset({"grad_w"}),)
for target in (*SPATIAL, torch.ops.aten.convolution_backward.default):
    if "backward" in str(target):
        LINEAR[target] = (frozenset({"grad_output"}),)
