"""One table of sample calls, keyed by the same op overloads as the rule table.

    sample("aten.mm.default", x(T, B, at=1), x(B, O, at=0), expect="partial", tangent=True)

``x``, ``ids``, ``mask`` ... describe an argument and where the examples are in it: ``at=0`` or ``at=(dim, outer, inner)``.
``expect`` is the state that the rule must claim, as :func:`gnsfx.passes.state.describe` writes it; a tuple for ops with
several results. Sizes collide on purpose: B, T and D are all 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from gnsfx.passes.rules.table import overloads
from gnsfx.passes.state import Batched

B = T = D = 3
O = 2
aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True, eq=False)
class Input:
    """A tensor argument. ``draw`` makes a value; two draws are independent of each other."""

    draw: Callable[[], torch.Tensor]
    state: Batched | None = None


@dataclass(frozen=True, eq=False)
class Made:
    """An argument that another node of the graph computes from constants."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Sample:
    """``truth``: "check" compares the claim with the numbers, "shape" only with the shapes (random or empty values, ops
    of other devices)."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expect: str | tuple[str, ...]
    tangent: bool
    truth: str


SAMPLES: dict[Any, list[Sample]] = {}


def sample(
    name: str, *args: Any, expect: str | tuple[str, ...], tangent: bool = False, truth: str = "check", **kwargs: Any
) -> None:
    for op in overloads(name):
        SAMPLES.setdefault(op, []).append(Sample(op, args, kwargs, expect, tangent, truth))


def _state(at: int | tuple[int, ...] | None) -> Batched | None:
    return None if at is None else Batched(at) if isinstance(at, int) else Batched(*at)


def x(*shape: int, at: Any = None) -> Input:
    return Input(lambda: torch.randn(shape, dtype=torch.float64), _state(at))


def positive(*shape: int, at: Any = None) -> Input:
    return Input(lambda: torch.rand(*shape, dtype=torch.float64) * 0.8 + 0.1, _state(at))


def z(*shape: int, at: Any = None) -> Input:
    return Input(lambda: torch.randn(*shape, dtype=torch.complex128), _state(at))


def ids(high: int, *shape: int, at: Any = None) -> Input:
    return Input(lambda: torch.randint(high, shape), _state(at))


def mask(*shape: int, at: Any = None) -> Input:
    return Input(lambda: torch.rand(*shape) > 0.5, _state(at))


def drawn(draw: Callable[[], torch.Tensor], at: Any = None) -> Input:
    return Input(draw, _state(at))


def fixed(values: Any, at: Any = None) -> Input:
    return Input(lambda: torch.tensor(values), _state(at))


def zeros(*shape: int) -> Input:
    return Input(lambda: torch.zeros(*shape, dtype=torch.float64))


def view(value: Any, *shape: int) -> Made:
    return Made(aten.view.default, (value, list(shape)))


def iota(length: int) -> Made:
    options = {"start": 0, "step": 1, "dtype": torch.int64, "device": torch.device("cpu"), "requires_grad": False}
    return Made(prims.iota.default, (length,), options)


def half(*shape: int, at: Any = None) -> Input:
    return drawn(lambda: torch.empty(*shape, dtype=torch.float16, device="meta"), at)


BOTH, THREE = ("batched(0)",) * 2, ("batched(0)",) * 3

# ------------------------------------------------------------------------------------------------------- pointwise
# fmt: off

for name in ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.maximum.default", "aten.atan2.default"):
    sample(name, x(B, T, D, at=0), x(D), expect="batched(0)")
    sample(name, x(B, T, D, at=1), x(T, D, at=0), expect="batched(1)")
    sample(name, x(B * T, D, at=(0, 1, T)), x(B * T, 1, at=(0, 1, T)), expect="batched(0, 1*B*3)")
    sample(name, x(2 * B * 2, D, at=(0, 2, 2)), x(2 * B * 2, D), expect="batched(0, 2*B*2)")
    sample(name, x(B, T, D, at=0), x(T, D, at=0), expect="mixed")
    sample(name, x(B, T, D, at=0), x(1, B, at=1), expect="mixed")
    sample(name, x(2 * B, D, at=(0, 2, 1)), x(2 * B, D, at=(0, 1, 2)), expect="mixed")
    sample(name, x(B, 1, at=0), x(1, B, at=1), expect="mixed")  # every pair of examples
for name in ("exp", "gelu", "erf", "neg", "abs", "isnan", "logical_not", "bitwise_not"):
    value = mask(T, B, at=1) if "_not" in name else x(T, B, at=1)
    sample(f"aten.{name}.default", value, expect="batched(1)")
for name in ("log", "rsqrt", "sqrt", "reciprocal"):
    sample(f"aten.{name}.default", positive(B, D, at=0), expect="batched(0)")
sample("aten.where.self", mask(B, T, 1, at=0), x(T, D), x(B, T, D, at=0), expect="batched(0)")
sample("aten.where.self", mask(T, D), x(B, T, D, at=0), x(B, T, D, at=0), expect="batched(0)")
sample("aten.clone.default", x(T, B * 2, at=(1, 1, 2)), expect="batched(1, 1*B*2)")
for name in ("aten.add.Scalar", "aten.sub.Scalar", "aten.mul.Scalar", "aten.div.Scalar", "aten.pow.Tensor_Scalar"):
    sample(name, x(B, D, at=0), 2, expect="batched(0)")
sample("aten.div.Tensor", x(B, D, at=0), positive(D), expect="batched(0)")
sample("aten.clamp.default", x(B, D, at=0), -0.5, 0.5, expect="batched(0)")
sample("aten.threshold_backward.default", x(B, D, at=0), x(B, D, at=0), 0.0, expect="batched(0)", tangent=True)
sample("aten.frexp.Tensor", x(B, D, at=0), expect=BOTH)
sample("prims.convert_element_type.default", x(B, D, at=0), torch.float32, expect="batched(0)")
sample("aten._conj_physical.default", z(B, D, at=0), expect="batched(0)")
sample("aten.conj_physical.default", z(B, D, at=0), expect="batched(0)")
sample("prims.fma.default", x(B, D, at=0), x(B, D), x(B, D, at=0), expect="batched(0)")
sample("prims.fma.default", x(B, B, at=0), x(B, B, at=1), x(B, B), expect="mixed")
sample("aten._weight_norm_interface_backward.default", x(O, D), x(O, D), positive(O, 1), positive(O, 1), 0,
       expect=("shared", "shared"), tangent=True, truth="shape")

# -- pointwise, not tagged
sample("aten.copy.default", x(B, D), x(B, D, at=0), expect="batched(0)")
sample("aten.copy.default", x(T, B, D, at=1), x(B, D, at=0), expect="batched(1)")
sample("aten._to_copy.default", x(T, B, at=1), dtype=torch.float32, expect="batched(1)")
sample("aten.bernoulli.p", x(B, D, at=0), 0.5, expect="batched(0)")
for name in ("aten.bernoulli.default", "aten.bernoulli.Tensor"):
    args = (positive(T, B, at=1),) if "default" in name else (positive(T, B, at=1), positive(T, B, at=1))
    sample(name, *args, expect="batched(1)")
for name in ("aten.rand_like.default", "aten.randn_like.default", "aten.normal_functional.default", "aten.uniform.default"):
    sample(name, x(T, B, at=1), expect="batched(1)", truth="shape")
sample("aten.randint_like.default", x(T, B, at=1), 5, expect="batched(1)", truth="shape")
sample("aten.randint_like.low_dtype", x(T, B, at=1), 2, 5, expect="batched(1)", truth="shape")
sample("aten.fill.Tensor", x(B, D, at=0), x(), expect="batched(0)", truth="shape")
sample("aten.masked_fill.Tensor", x(B, T, D, at=0), mask(B, 1, D, at=0), x(), expect="batched(0)")
sample("aten.masked_fill.Tensor", x(B, T, D, at=0), mask(T, D, at=0), x(), expect="mixed")
sample("aten.polar.default", positive(B, D, at=0), x(D), expect="batched(0)")
sample("aten.complex.default", x(B, D, at=0), x(B, D, at=0), expect="batched(0)")
for name in ("aten.real.default", "aten.imag.default", "aten._conj.default", "aten.resolve_conj.default"):
    sample(name, z(T, B, at=1), expect="batched(1)")
sample("aten.bucketize.Tensor", x(B, T, at=0), drawn(lambda: torch.tensor([-0.5, 0.1, 0.6], dtype=torch.float64)), expect="batched(0)")
sample("aten.bucketize.Tensor", x(T, B), drawn(lambda: torch.randn(B, dtype=torch.float64).sort().values, at=0), expect="mixed")
sample("aten._prelu_kernel.default", x(B, D, T, at=0), positive(1, D, 1), expect="batched(0)")
sample("aten._prelu_kernel_backward.default", x(B, D, at=0), x(B, D, at=0), positive(1, D), expect=BOTH, tangent=True)
sample("aten.rrelu_with_noise_functional.default", x(B, D, at=0), x(B, D), 0.1, 0.3, True, expect=BOTH, truth="shape")
for name in ("aten.alias.default", "aten.detach.default", "aten.lift_fresh_copy.default", "aten._cast_Float.default"):
    sample(name, x(T, 2 * B, at=(1, 2, 1)), expect="batched(1, 2*B*1)")
sample("aten.log_sigmoid_forward.default", x(B, D, at=0), expect=BOTH, truth="shape")  # the buffer is empty on some devices
sample("aten.log_sigmoid_backward.default", x(B, D, at=0), x(B, D, at=0), positive(B, D, at=0), expect="batched(0)", tangent=True)
sample("prims.device_put.default", x(B, D, at=0), torch.device("cpu"), expect="batched(0)")
sample("aten._assert_tensor_metadata.default", x(B, D, at=0), expect="none", truth="shape")
sample("aten.view_as_real.default", z(T, B, at=1), expect="batched(1)")
sample("aten.view_as_complex.default", x(T, B, 2, at=1), expect="batched(1)")

# -- constants with the shape of a batched value
for name, rest in (("full_like", (2.0,)), ("zeros_like", ()), ("ones_like", ()), ("empty_like", ()), ("new_zeros", ([B, 2],)),
                   ("new_ones", ([B, 2],)), ("new_full", ([B], 1.0)), ("new_empty", ([B],)),
                   ("new_empty_strided", ([B, 2], [2, 1]))):
    sample(f"aten.{name}.default", x(B, D, at=0), *rest, expect="shared", truth="shape" if "empty" in name else "check")
sample("aten.empty_permuted.default", [B, D], [0, 1], expect="shared", truth="shape")

# ----------------------------------------------------------------------------------------------------------- views

for name in ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.view_copy.default"):
    sample(name, x(B, T, D, at=0), [B * T, D], expect="batched(0, 1*B*3)")
    sample(name, x(B * T, D, at=(0, 1, T)), [B, T, D], expect="batched(0)")
    sample(name, x(T, B, D, at=1), [T * B, D], expect="batched(0, 3*B*1)")
    sample(name, x(T, D, B, at=2), [T, D * B], expect="batched(1, 3*B*1)")
    sample(name, x(T, B, D, at=1), [T, B * D], expect="batched(1, 1*B*3)")
    sample(name, x(2 * B * 4, D, at=(0, 2, 4)), [2, B, 2, 2 * D], expect="batched(1)")
    sample(name, x(2 * B * 4, D, at=(0, 2, 4)), [2 * B * 2, 2 * D], expect="batched(0, 2*B*2)")
    sample(name, x(B, 4, at=0), [2, 6], expect="mixed")  # an example is cut in two
    sample(name, x(4, B, at=1), [2, 6], expect="batched(1, 2*B*1)")
    sample(name, x(B, D, at=0), [B * D], expect="batched(0, 1*B*3)")
sample("aten.unsqueeze.default", x(T, B, at=1), 0, expect="batched(2)")
sample("aten.unsqueeze.default", x(T, B, at=1), -1, expect="batched(1)")
sample("aten.squeeze.default", x(1, T, B, 1, at=2), expect="batched(1)")
sample("aten.squeeze.dim", x(1, T, B, at=2), 0, expect="batched(1)")
sample("aten.squeeze.dim", x(T, B, at=1), 0, expect="batched(1)")
sample("aten.squeeze.dims", x(1, T, 1, B, at=3), [0, 2], expect="batched(1)")
sample("prims.view_of.default", x(T, B, at=1), expect="batched(1)")
sample("aten.view.dtype", x(B, D, at=0), torch.int32, expect="batched(0)", truth="shape")
sample("aten.view.dtype", x(T, B, at=1), torch.int32, expect="mixed")
sample("aten.view.dtype", z(B, D, at=0), torch.float64, expect="batched(0)")
sample("aten.permute.default", x(B, T, D, at=0), [2, 0, 1], expect="batched(1)")
sample("aten.permute.default", x(T, D, 2 * B, at=(2, 1, 2)), [-1, 0, 1], expect="batched(0, 1*B*2)")
sample("aten.transpose.int", x(T, B, D, at=1), 1, 2, expect="batched(2)")
sample("aten.transpose.int", x(T, B, D, at=1), 0, -1, expect="batched(1)")
sample("aten.t.default", x(T, B, at=1), expect="batched(0)")
sample("aten.t.default", x(B, at=0), expect="batched(0)")
sample("aten.expand.default", x(B, 1, D, at=0), [T, B, D, D], expect="batched(1)")
sample("aten.expand.default", x(2 * B, 1, at=(0, 2, 1)), [-1, T], expect="batched(0, 2*B*1)")
sample("aten.repeat.default", x(B, D, at=0), [2, 1], expect="batched(0, 2*B*1)")
sample("aten.repeat.default", x(B, D, at=0), [T, 1, 2], expect="batched(1)")
sample("aten.repeat.default", x(B * 2, D, at=(0, 1, 2)), [2, 3], expect="batched(0, 2*B*2)")
for start, stop, state in ((0, B, "batched(0)"), (B, 3 * B, "batched(0, 2*B*1)"), (-B, 3 * B, "batched(0)"),
                           (1, 1 + B, "mixed"), (0, 2, "mixed"), (0, 9223372036854775807, "batched(0, 3*B*1)")):
    sample("aten.slice.Tensor", x(3 * B, D, at=(0, 3, 1)), 0, start, stop, expect=state)
sample("aten.slice.Tensor", x(3 * B, D, at=(0, 3, 1)), 0, 0, 3 * B, 3, expect="mixed")
sample("aten.slice.Tensor", x(4 * B, D, at=(0, 1, 4)), 0, 1, 4 * B, 2, expect="batched(0, 1*B*2)")
sample("aten.slice.Tensor", x(4 * B, D, at=(0, 2, 2)), 0, 0, 4 * B, 4, expect="mixed")
sample("aten.slice.Tensor", x(T, B, at=1), 0, 1, 3, expect="batched(1)")
sample("aten.slice.Tensor", x(B * T, D, at=(0, 1, T)), 0, 0, T, expect="mixed")  # the rows of example 0
sample("aten.slice.Tensor", x(B, D, at=0), 0, 1, None, expect="mixed")
for name in ("aten.select.int", "aten.select_copy.int"):
    sample(name, x(B, D, at=0), 0, 0, expect="mixed")
    sample(name, x(B, T, D, at=0), 1, -1, expect="batched(0)")
    sample(name, x(T, D, B, at=2), 0, 1, expect="batched(1)")
    sample(name, x(T, B, at=1), -1, 0, expect="mixed")
sample("aten.split.Tensor", x(B, 4, at=0), 2, 1, expect=BOTH)
sample("aten.split.Tensor", x(2 * B, D, at=(0, 2, 1)), B, expect=BOTH)
sample("aten.split.Tensor", x(2 * B, D, at=(0, 2, 1)), 4, expect=("mixed", "mixed"))
sample("aten.split.Tensor", x(5 * B, D, at=(0, 5, 1)), 2 * B, expect=("batched(0, 2*B*1)", "batched(0, 2*B*1)", "batched(0)"))
for name in ("aten.split_with_sizes.default", "aten.split_with_sizes_copy.default"):
    sample(name, x(B, 4, at=0), [1, 3], -1, expect=BOTH)
    sample(name, x(3 * B, D, at=(0, 3, 1)), [B, 2 * B], expect=("batched(0)", "batched(0, 2*B*1)"))
    sample(name, x(3 * B, D, at=(0, 3, 1)), [1, B, 2 * B - 1], expect=("mixed",) * 3)  # starts inside a block
    sample(name, x(3 * B, D, at=(0, 3, 1)), [B, 1, B, B - 1], expect=("batched(0)", "mixed", "mixed", "mixed"))
sample("aten.unbind.int", x(B, D, at=0), 0, expect=("mixed",) * B)
sample("aten.unbind.int", x(T, B, at=1), 0, expect=THREE)
sample("aten.cat.default", [x(B, D, at=0), x(B, D, at=0)], expect="batched(0, 2*B*1)")
sample("aten.cat.default", [x(2 * B, D, at=(0, 2, 1)), x(B, D, at=0)], expect="batched(0, 3*B*1)")
sample("aten.cat.default", [x(B * 2, D, at=(0, 1, 2)), x(B, D, at=0)], expect="mixed")
sample("aten.cat.default", [x(T, B, at=1), x(1, B)], expect="batched(1)")
sample("aten.cat.default", [x(B, D, at=0), x(1, D)], expect="mixed")
sample("aten.cat.default", [x(B, B, at=0), x(B, B, at=1)], expect="mixed")
sample("aten.cat.default", [Made(aten.full.default, ([2 * B, D], 0.0)), x(B, D, at=0)], expect="batched(0, 3*B*1)", tangent=True)
sample("aten.cat.default", [Made(aten.full.default, ([B, D], 0.0)), x(B, D, at=0)], expect="mixed")
sample("aten.cat.default", [Made(aten.full.default, ([B, D], 1.0)), x(B, D, at=0)], expect="mixed", tangent=True)
sample("aten.cat.default", [x(0), x(B, D, at=0), x(B, O, at=0)], -1, expect="batched(0)")
sample("aten.constant_pad_nd.default", x(B, T, at=0), [1, -1], 0.0, expect="batched(0)")
sample("aten.constant_pad_nd.default", x(B, T, at=0), [1, 1], 7.0, expect="batched(0)")
sample("aten.constant_pad_nd.default", x(T, B, at=1), [1, 0], 0.0, expect="mixed")
sample("aten.constant_pad_nd.default", x(T, B, at=1), [1, -1], 0.0, expect="mixed")  # shifts the examples
for name in ("aten.flip.default", "prims.rev.default"):
    sample(name, x(B, T, at=0), [1], expect="batched(0)")
    sample(name, x(T, B, at=1), [0, 1], expect="mixed")
sample("aten.flip.default", x(T, B, at=1), [-1], expect="mixed")
sample("aten.roll.default", x(B, T, at=0), [1], [-1], expect="batched(0)")
sample("aten.roll.default", x(B, T, at=0), [1], [0], expect="mixed")
sample("aten.roll.default", x(B, T, at=0), [1], expect="mixed")
for name in ("aten.tril.default", "aten.triu.default"):
    sample(name, x(T, B, D, at=1), expect="batched(1)")
    sample(name, x(B, T, D, at=0), 1, expect="batched(0)")
for name in ("aten.diagonal.default", "aten.diagonal_copy.default"):
    sample(name, x(T, B, D, at=1), 0, 0, 2, expect="batched(0)")
    sample(name, x(B, T, D, at=0), 0, -1, -2, expect="batched(0)")
    sample(name, x(B, D, at=0), expect="mixed")
sample("aten.unfold.default", x(B, 5, at=0), 1, 3, 1, expect="batched(0)")
sample("aten.unfold.default", x(5, B, at=1), 0, 3, 2, expect="batched(1)")
sample("aten.unfold.default", x(T, B, at=1), 1, 3, 1, expect="mixed")
sample("aten.slice_scatter.default", x(B, 5, at=0), x(B, 2, at=0), 1, 1, 3, expect="batched(0)")
sample("aten.slice_scatter.default", zeros(2 * B, D), x(B, D, at=0), 0, B, 2 * B, expect="batched(0, 2*B*1)")
sample("aten.slice_scatter.default", x(2 * B, D, at=(0, 2, 1)), x(B, D, at=0), 0, 0, B, expect="batched(0, 2*B*1)")
sample("aten.slice_scatter.default", x(2 * B, D, at=(0, 2, 1)), x(B, D, at=0), 0, 1, 1 + B, expect="mixed")
sample("aten.slice_scatter.default", zeros(2 * B, D), x(B, D, at=0), 0, 0, 2 * B, 2, expect="batched(0, 1*B*2)")
sample("aten.slice_scatter.default", x(2 * B, D, at=(0, 1, 2)), x(B, D, at=0), 0, 1, 2 * B, 2, expect="batched(0, 1*B*2)")
sample("aten.slice_scatter.default", x(2 * B, D, at=(0, 2, 1)), x(B, D, at=0), 0, 1, 2 * B, 2, expect="mixed")
sample("aten.slice_scatter.default", x(B, D, at=0), x(2, D), 0, 0, 2, expect="mixed")
sample("aten.slice_scatter.default", x(B, B, at=1), x(B, B, at=0), 0, 0, B, expect="mixed")
sample("aten.select_scatter.default", x(B, T, D, at=0), x(B, D, at=0), 1, 0, expect="batched(0)")
sample("aten.select_scatter.default", zeros(T, B, D), x(B, D, at=0), 0, 0, expect="batched(1)")
sample("aten.select_scatter.default", x(B, D, at=0), x(D), 0, 0, expect="mixed")
sample("aten.select_scatter.default", x(B, B, D, at=0), x(B, D, at=0), 0, 0, expect="mixed")
sample("aten.diagonal_scatter.default", zeros(T, T, B), x(B, T, at=0), expect="batched(2)")
sample("aten.diagonal_scatter.default", x(B, T, T, at=0), x(B, T, at=0), 0, 1, 2, expect="batched(0)")
sample("aten.diagonal_scatter.default", zeros(B, B), x(B, at=0), expect="mixed")
sample("aten.diagonal_scatter.default", x(B, D, at=0), x(B), expect="mixed")
for name in ("aten.as_strided.default", "aten.as_strided_copy.default"):
    sample(name, x(B, 4, at=0), [4, B], [1, 4], expect="batched(1)")
    sample(name, x(B, 4, at=0), [B, 2, 2], [4, 2, 1], expect="batched(0)")
    sample(name, x(2 * B, D, at=(0, 2, 1)), [2, B, D], [B * D, D, 1], expect="batched(1)")
    sample(name, x(B, 4, at=0), [B, 2], [1, 1], expect="mixed")
    sample(name, x(B, 4, at=0), [2, 4], [4, 1], 4, expect="mixed")
sample("aten.as_strided_scatter.default", zeros(B, 4), x(4, B, at=1), [4, B], [1, 4], expect="batched(0)")
sample("aten.as_strided_scatter.default", zeros(B, 4), x(B, 2, 2, at=0), [B, 2, 2], [4, 2, 1], expect="batched(0)")
sample("aten.as_strided_scatter.default", zeros(B, 4), x(B, at=0), [B], [1], expect="mixed")

# ------------------------------------------------------------------------------------------------ reductions, scans

for name, result in (("sum.dim_IntList", "partial"), ("mean.dim", "partial")):
    sample(f"aten.{name}", x(B, T, D, at=0), [1], expect="batched(0)")
    sample(f"aten.{name}", x(T, D, B, at=2), [0], True, expect="batched(2)")
    sample(f"aten.{name}", x(T, D, B, at=2), [-3, 1], expect="batched(0)")
    sample(f"aten.{name}", x(B, T, D, at=0), [0, 1], expect=result, tangent=True)
    sample(f"aten.{name}", x(2 * B, D, at=(0, 2, 1)), [0], True, expect=result, tangent=True)
    sample(f"aten.{name}", x(B, D, at=0), [], expect=result, tangent=True)
    sample(f"aten.{name}", x(T, B, at=1), [1], expect="shared")
for name in ("sum", "mean"):
    sample(f"aten.{name}.default", x(T, B, at=1), expect="partial", tangent=True)
    sample(f"aten.{name}.default", x(T, B, at=1), expect="shared")
ALONG: dict[str, tuple[Any, ...]] = {"amax.default": ([1],), "amin.default": ([1],), "any.dim": (1,), "any.dims": ([1],), "all.dim": (1,),
         "all.dims": ([1],), "prod.dim_int": (1,), "argmax.default": (1,), "argmin.default": (1,), "max.dim": (1,), "min.dim": (1,),
         "var.correction": ([1],), "var_mean.correction": ([1],), "std.correction": ([1],), "std_mean.correction": ([1],),
         "logsumexp.default": ([1],), "linalg_vector_norm.default": (2, [1]), "median.dim": (1,), "mode.default": (1,),
         "kthvalue.default": (2, 1), "nansum.default": ([1],), "count_nonzero.dim_IntList": ([1],)}
TWO_RESULTS = ("max.dim", "min.dim", "var_mean.correction", "std_mean.correction", "median.dim", "mode.default", "kthvalue.default")
for name, along in ALONG.items():
    kind = mask if name.startswith(("any", "all")) else x
    two = name in TWO_RESULTS

    def every(state: str, two: bool = two) -> Any:
        return (state, state) if two else state

    sample(f"aten.{name}", kind(B, T, D, at=0), *along, expect=every("batched(0)"))
    sample(f"aten.{name}", kind(T, D, 2 * B, at=(2, 2, 1)), *along, expect=every("batched(1, 2*B*1)"))
    sample(f"aten.{name}", kind(T, B, D, at=1), *along, expect=every("shared"))
    if kind is x:
        sample(f"aten.{name}", x(T, B, D, at=1), *along, expect=every("mixed"), tangent=True)
sample("aten.amax.default", x(T, B, at=1), expect="shared")
sample("aten.any.dims", mask(B, D, at=0), None, expect="shared")
sample("aten.all.dims", mask(B, D, at=0), None, expect="shared")
sample("aten.any.dims", mask(B, D, at=0), [], expect="batched(0)")  # unlike every other reduction, [] is none
sample("aten.all.dims", mask(B, D, at=0), [], expect="batched(0)")
sample("aten.linalg_vector_norm.default", x(B, D, at=0), expect="shared")
sample("aten.var.correction", x(B, T, D, at=0), [1, 2], correction=0, keepdim=True, expect="batched(0)")
for name in ("any", "all"):
    sample(f"aten.{name}.default", mask(B, D, at=0), expect="shared")
for name in ("prod", "max", "min"):
    sample(f"aten.{name}.default", x(B, D, at=0), expect="shared")
for name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "topk", "_softmax", "_log_softmax"):
    rest = {"topk": (2,)}.get(name, ())
    tail = {"_softmax": (False,), "_log_softmax": (False,)}.get(name, ())
    two = name in ("cummax", "cummin", "sort", "topk")
    for shape, at, state in (((B, T), 0, "batched(0)"), ((T, 2 * B, D), (1, 2, 1), "batched(1, 2*B*1)"), ((T, B), 1, "mixed")):
        sample(f"aten.{name}.default", x(*shape, at=at), *rest, -1, *tail, expect=(state, state) if two else state)
sample("aten.histc.default", x(B, T, at=0), 4, -3.0, 3.0, expect="shared")
sample("aten.histc.default", x(B, T, at=0), 4, -3.0, 3.0, expect="mixed", tangent=True)
sample("aten.bincount.default", ids(5, B, at=0), expect="shared")
sample("aten.sort.stable", x(B, T, at=0), stable=True, dim=1, expect=BOTH)
sample("aten.sort.stable", x(B, T, at=0), stable=True, dim=0, expect=("mixed", "mixed"))
for name in ("aten._softmax_backward_data.default", "aten._log_softmax_backward_data.default"):
    sample(name, x(B, T, at=0), x(B, T, at=0), -1, torch.float64, expect="batched(0)", tangent=True)
    sample(name, x(B, T, at=0), positive(B, T), 1, torch.float64, expect="batched(0)", tangent=True)
    sample(name, x(B, T), positive(B, T, at=0), 1, torch.float64, expect="batched(0)", tangent=True)
    sample(name, x(B, B, T, at=0), x(B, B, T, at=1), -1, torch.float64, expect="mixed", tangent=True)
    sample(name, x(2 * B, T, at=(0, 2, 1)), x(2 * B, T, at=(0, 1, 2)), -1, torch.float64, expect="mixed", tangent=True)
    sample(name, x(T, B, at=1), x(T, B, at=1), -1, torch.float64, expect="mixed", tangent=True)
sample("prims.prepare_softmax_online.default", x(B, T, at=0), 1, expect=BOTH)
sample("aten.glu.default", x(B, 4, at=0), expect="batched(0)")
sample("aten.glu.default", x(4, B * 2, at=(1, 1, 2)), 0, expect="batched(1, 1*B*2)")
sample("aten.glu.default", x(T, 2 * B, at=(1, 2, 1)), -1, expect="mixed")
sample("aten.glu_backward.default", x(B, 2, at=0), x(B, 4, at=0), -1, expect="batched(0)", tangent=True)
sample("aten.glu_backward.default", x(2, B, at=1), x(4, B), 0, expect="batched(1)", tangent=True)
sample("aten.glu_backward.default", x(B, B, at=0), x(B, 2 * B, at=(1, 2, 1)), -1, expect="mixed", tangent=True)
sample("prims.prepare_softmax_online.default", x(T, B, at=1), 1, expect=("mixed", "mixed"))

# ---------------------------------------------------------------------------------------------------------- matmul

sample("aten.mm.default", x(B * T, D, at=(0, 1, T)), x(D, O), expect="batched(0, 1*B*3)")
sample("aten.mm.default", x(O, D), x(D, B * T, at=(1, 1, T)), expect="batched(1, 1*B*3)")
sample("aten.mm.default", x(D, B * T, at=(1, 1, T)), x(B * T, O, at=(0, 1, T)), expect="partial", tangent=True)
sample("aten.mm.default", x(D, 2 * B, at=(1, 2, 1)), x(2 * B, O, at=(0, 2, 1)), expect="partial", tangent=True)
sample("aten.mm.default", x(D, B, at=1), x(B, O), expect="partial", tangent=True)
sample("aten.mm.default", x(D, B, at=1), x(B, O, at=0), expect="shared")
sample("aten.mm.default", x(B, D, at=0), x(D, B, at=1), expect="mixed")  # in-batch negatives
sample("aten.mm.default", x(B, B, at=0), x(B, D, at=0), expect="mixed")
sample("aten.mm.default", x(D, 2 * B, at=(1, 2, 1)), x(2 * B, O, at=(0, 1, 2)), expect="mixed", tangent=True)
sample("aten.bmm.default", x(B, T, D, at=0), x(B, D, O, at=0), expect="batched(0)")
sample("aten.bmm.default", x(B * 2, T, D, at=(0, 1, 2)), x(B * 2, D, O), expect="batched(0, 1*B*2)")
sample("aten.bmm.default", x(T, B, D, at=1), x(T, D, O), expect="batched(1)")
sample("aten.bmm.default", x(T, O, D), x(T, D, B, at=2), expect="batched(2)")
sample("aten.bmm.default", x(T, D, B, at=2), x(T, B, O, at=1), expect="partial", tangent=True)
sample("aten.bmm.default", x(B, B, D, at=0), x(B, D, O, at=1), expect="mixed")
sample("aten.bmm.default", x(T, B, D, at=1), x(T, D, B, at=2), expect="mixed")  # attention across the batch
for name, lead in (("mm", ()), ("bmm", (2,))):
    low = lambda *shape, at=None: drawn(lambda: torch.empty(*shape, dtype=torch.bfloat16, device="meta"), at)  # noqa: E731
    row = len(lead)
    sample(f"aten.{name}.dtype", low(*lead, B, D, at=row), low(*lead, D, O), torch.float32, expect=f"batched({row})", truth="meta")
    sample(f"aten.{name}.dtype", low(*lead, D, B, at=row + 1), low(*lead, B, O, at=row), torch.float32, expect="partial",
           tangent=True, truth="meta")
for name in ("aten.dot.default", "aten.vdot.default"):
    sample(name, x(B, at=0), x(B, at=0), expect="partial", tangent=True)
    sample(name, x(2 * B, at=(0, 2, 1)), x(2 * B), expect="partial", tangent=True)
    sample(name, x(2 * B, at=(0, 2, 1)), x(2 * B, at=(0, 1, 2)), expect="mixed", tangent=True)
sample("aten.mv.default", x(B, D, at=0), x(D), expect="batched(0)")
sample("aten.mv.default", x(D, B, at=1), x(B, at=0), expect="partial", tangent=True)
sample("aten.mv.default", x(O, B), x(B, at=0), expect="partial", tangent=True)
sample("aten.mv.default", x(O, B, at=1), x(B), expect="partial", tangent=True)
sample("aten.mv.default", x(B, B, at=0), x(B, at=0), expect="mixed")
sample("aten.mv.default", x(D, 2 * B, at=(1, 2, 1)), x(2 * B, at=(0, 1, 2)), expect="mixed", tangent=True)
sample("aten.addmm.default", x(O), x(B * T, D, at=(0, 1, T)), x(D, O), expect="batched(0, 1*B*3)")
sample("aten.addmm.default", x(B, O, at=0), x(B, D, at=0), x(D, O), expect="batched(0)")
sample("aten.addmm.default", x(B, at=0), x(T, D), x(D, B, at=1), expect="batched(1)")
sample("aten.addmm.default", x(B, at=0), x(B, D, at=0), x(D, B), expect="mixed")
sample("aten.addmm.default", x(B, at=0), x(T, D), x(D, B), expect="batched(1)")
sample("aten.addmm.default", x(D, O), x(D, B, at=1), x(B, O, at=0), expect="mixed", tangent=True)
sample("aten.addmm.default", x(O), x(D, B, at=1), x(B, O, at=0), expect="shared")
sample("aten.baddbmm.default", x(T, O), x(B, T, D, at=0), x(B, D, O, at=0), expect="batched(0)")
sample("aten.baddbmm.default", x(B, T, O, at=0), x(B, T, D, at=1), x(B, D, O), expect="mixed")
sample("aten._trilinear.default", x(B, D, at=0), x(O, D, T), x(B, T, at=0), [1, 3], [0], [1, 2], [2, 3], expect="batched(0)")
sample("aten._trilinear.default", x(B, O, at=0), x(B, D, at=0), x(B, T, at=0), [2, 3], [1, 3], [1, 2], [0], expect="partial", tangent=True)
sample("aten._trilinear.default", x(B, D, at=0), x(O, D, T), x(O, T, at=1), [1, 3], [0], [0, 2], [2], expect="mixed")

# -------------------------------------------------------------------------------------------------------- indexing

sample("aten.embedding.default", x(7, D), ids(7, B, T, at=0), expect="batched(0)")
sample("aten.embedding.default", x(7, D), ids(7, T, B * 2, at=(1, 1, 2)), expect="batched(1, 1*B*2)")
sample("aten.embedding.default", x(B, D, at=0), ids(B, T), expect="mixed")
sample("aten.embedding_renorm.default", x(7, D), ids(7, B, T, at=0), 0.5, 2.0, expect="shared")
sample("aten.embedding_renorm.default", x(B, D, at=0), ids(B, T), 0.5, 2.0, expect="mixed")
sample("aten.embedding_dense_backward.default", x(B, T, D, at=0), ids(7, B, T, at=0), 7, -1, False, expect="partial", tangent=True)
sample("aten.embedding_dense_backward.default", x(T, B, D, at=1), ids(7, T, B, at=1), 7, 2, False, expect="partial", tangent=True)
sample("aten.embedding_dense_backward.default", x(2 * B, D, at=(0, 2, 1)), ids(7, 2 * B), 7, -1, False, expect="partial", tangent=True)
sample("aten.embedding_dense_backward.default", x(B, D), ids(7, B, at=0), 7, -1, False, expect="partial", tangent=True)
sample("aten.embedding_dense_backward.default", x(B, B, D, at=0), ids(7, B, B, at=1), 7, -1, False, expect="mixed", tangent=True)
sample("aten.embedding_dense_backward.default", x(B, T, D, at=0), ids(3, B, T, at=0), 3, -1, True, expect="mixed", tangent=True)
sample("aten.embedding_dense_backward.default", x(B, T, T, at=2), ids(7, B, T), 7, -1, False, expect="batched(1)", tangent=True)
for name in ("aten.index.Tensor", "aten._unsafe_index.Tensor"):
    sample(name, x(7, D), [ids(7, B, T, at=0)], expect="batched(0)")
    sample(name, x(B, 7, D, at=0), [None, ids(7, T)], expect="batched(0)")
    sample(name, x(T, 7, B, at=2), [ids(T, 2, 2), ids(7, 2)], expect="batched(2)")
    sample(name, x(T, B, 7, at=1), [ids(T, 2), None, ids(7, 2)], expect="batched(1)")
    sample(name, x(4, B, 7, at=1), [ids(4, 2), None, ids(7, 2)], expect="batched(1)")
    sample(name, x(B, T, D, at=0), [iota(B), ids(T, B, at=0)], expect="batched(0)")
    sample(name, x(B, T, D, at=0), [view(iota(B), B, 1), ids(T, B, 2, at=0)], expect="batched(0)")
    sample(name, x(B, T, D, at=0), [iota(B), ids(T, B)], expect="batched(0)")
    sample(name, x(B, B, D, at=0), [view(iota(B), B, 1), ids(B, B, at=0)], expect="mixed")  # ids[b] of another example
    sample(name, x(B, D, at=0), [ids(B, B)], expect="mixed")  # a permutation
    sample(name, x(B, D, at=0), [ids(B, B, at=0)], expect="mixed")
    sample(name, x(B, 7, D, at=0), [None, ids(7, B, at=0)], expect="mixed")
    sample(name, x(7, T), [ids(7, B, at=0), ids(T, 2, 1)], expect="batched(1)")
    sample(name, x(7, T), [ids(7, B, 1, at=0), ids(T, B, at=0)], expect="mixed")
sample("aten.index.Tensor", x(B, D, at=0), [mask(B, at=0)], expect="mixed")
sample("aten._unsafe_masked_index.default", x(7, D), mask(B, T, 1, at=0), [ids(7, B, T, at=0)], 0.0, expect="batched(0)")
sample("aten._unsafe_masked_index.default", x(B, 7, at=0), mask(B, T), [None, ids(7, T)], 0.0, expect="batched(0)")
sample("aten._unsafe_masked_index.default", x(7), mask(B, at=0), [ids(7, B)], 0.0, expect="mixed")
for name in ("aten.index_put.default", "aten._unsafe_index_put.default"):
    sample(name, zeros(7, D), [ids(7, B, T, at=0)], x(B, T, D, at=0), True, expect="partial", tangent=True)
    sample(name, zeros(7, D), [ids(7, B * T, at=(0, 1, T))], x(B * T, D, at=(0, 1, T)), True, expect="partial", tangent=True)
    sample(name, zeros(7, D), [ids(7, B, T)], x(B, T, D, at=0), True, expect="partial", tangent=True)
    sample(name, zeros(7, D), [ids(7, B, at=0)], x(D), True, expect="partial", tangent=True)
    sample(name, zeros(7, D), [ids(7, B, at=0)], x(B, D, at=0), False, expect="mixed", tangent=True)
    sample(name, zeros(B, 7, D), [None, ids(7, T)], x(B, T, D, at=0), True, expect="batched(0)", tangent=True)
    sample(name, zeros(7, B), [ids(7, T)], x(T, B, at=1), True, expect="batched(1)", tangent=True)
    sample(name, x(B, 7, D, at=0), [None, ids(7, T)], x(B, T, D, at=0), True, expect="batched(0)", tangent=True)
    sample(name, zeros(B, T, D), [iota(B), ids(T, B, at=0)], x(B, D, at=0), True, expect="batched(0)", tangent=True)
    sample(name, x(B, T, D, at=0), [iota(B), ids(T, B, at=0)], x(B, D, at=0), False, expect="batched(0)", tangent=True)
    sample(name, zeros(B, B, D), [view(iota(B), B, 1), ids(B, B, 2, at=0)], x(B, 2, D, at=0), True, expect="batched(0)", tangent=True)
    sample(name, x(B, D, at=0), [ids(B, B)], x(B, D, at=0), True, expect="mixed", tangent=True)
    sample(name, x(B, D, at=0), [ids(B, 2)], x(2, D), True, expect="mixed", tangent=True)
    sample(name, zeros(7, B, D), [ids(7, B, at=0)], x(B, B, D, at=1), True, expect="mixed", tangent=True)
    sample(name, zeros(4, B, 5, D), [ids(4, T), None, ids(5, T)], x(T, B, D, at=1), True, expect="batched(1)", tangent=True)
sample("aten.index_put.default", x(B, D, at=0), [mask(B, at=0)], x(), False, expect="mixed")
sample("aten._unsafe_masked_index_put_accumulate.default", zeros(7, D), mask(B, T, 1, at=0), [ids(7, B, T, at=0)], x(B, T, D, at=0),
       expect="partial", tangent=True)
sample("aten._unsafe_masked_index_put_accumulate.default", zeros(7), mask(B, T), [ids(7, B, T)], x(B, T, at=0), expect="partial", tangent=True)
sample("aten._unsafe_masked_index_put_accumulate.default", zeros(B, 7), mask(T), [None, ids(7, T)], x(B, T, at=0), expect="batched(0)", tangent=True)
sample("aten.gather.default", x(B, 7, at=0), 1, ids(7, B, T, at=0), expect="batched(0)")
sample("aten.gather.default", x(B, 7, at=0), 1, ids(7, B, T), expect="batched(0)")
sample("aten.gather.default", x(7, D), 0, ids(7, B, D, at=0), expect="batched(0)")
sample("aten.gather.default", x(B, 7), -1, ids(7, B, T, at=0), expect="batched(0)")
sample("aten.gather.default", x(B, D, at=0), 0, ids(B, B, D, at=0), expect="mixed")
sample("aten.gather.default", x(B, 7, at=0), 1, ids(7, 2, T), expect="mixed")
sample("aten.gather.default", x(B, B, at=0), 1, ids(B, B, B, at=1), expect="mixed")
SCATTERS = (("scatter.src", ()), ("scatter_add.default", ()), ("scatter_reduce.two", ("sum",)), ("scatter_reduce.two", ("amax",)))
for short, rest in SCATTERS:
    name = f"aten.{short}"
    adds = name != "aten.scatter.src" and rest != ("amax",)
    sample(name, x(B, 7, at=0), 1, drawn(lambda: torch.stack([torch.randperm(7)[:T] for _ in range(B)]), at=0), x(B, T, at=0), *rest,
           expect="batched(0)", tangent=True)
    sample(name, zeros(B, 7), 1, drawn(lambda: torch.randperm(7)[:T].expand(B, T)), x(B, T, at=0), *rest, expect="batched(0)", tangent=True)
    sample(name, zeros(7, T), 0, ids(7, B, T, at=0), x(B, T, at=0), *rest, expect="partial" if adds else "mixed", tangent=True)
    sample(name, x(B, T, at=0), 0, ids(B, B, T, at=0), x(B, T, at=0), *rest, expect="mixed", tangent=True)
    sample(name, zeros(B, 7), 1, ids(7, 2, T), x(B, T, at=0), *rest, expect="mixed", tangent=True)
    sample(name, zeros(B, B), 1, drawn(lambda: torch.arange(B).expand(B, B), at=0), x(B, B, at=1), *rest, expect="mixed", tangent=True)
sample("aten.scatter.value", x(B, 7, at=0), 1, ids(7, B, T, at=0), 0.0, expect="batched(0)", tangent=True)
sample("aten.scatter.value", zeros(B, 7), 1, ids(7, B, T, at=0), -1.0, expect="batched(0)", tangent=True)
sample("aten.scatter.value", x(B, D, at=0), 0, ids(B, B, D), 1.0, expect="mixed", tangent=True)
sample("aten.index_add.default", zeros(B, 7), 1, ids(7, T), x(B, T, at=0), expect="batched(0)", tangent=True)
sample("aten.index_add.default", x(B, 7, at=0), 1, ids(7, T), x(B, T), expect="batched(0)", tangent=True)
sample("aten.index_add.default", zeros(7, T), 0, ids(7, B), x(B, T, at=0), expect="partial", tangent=True)
sample("aten.index_add.default", zeros(7, T), 0, ids(7, B, at=0), x(B, T, at=0), expect="partial", tangent=True)
sample("aten.index_add.default", zeros(B, B), 1, ids(B, B, at=0), x(B, B, at=0), expect="mixed", tangent=True)
sample("aten.index_add.default", x(B, T, at=0), 0, ids(B, B), x(B, T, at=0), expect="mixed", tangent=True)
sample("aten.searchsorted.Tensor", drawn(lambda: torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)), x(T, B, at=1), expect="batched(1)")
sample("aten.searchsorted.Tensor", drawn(lambda: torch.randn(B, T, dtype=torch.float64).sort().values, at=0), x(B, 4, at=0), expect="batched(0)")
sample("aten.searchsorted.Tensor", drawn(lambda: torch.randn(T, B, dtype=torch.float64).sort().values, at=1), x(T, B), expect="mixed")
sample("aten.searchsorted.Tensor", drawn(lambda: torch.randn(B, dtype=torch.float64).sort().values, at=0), x(T), expect="mixed")

# -------------------------------------------------------------------------------------------------- neural networks


def conv(*rest: Any) -> tuple[Any, ...]:
    return rest


CONV1 = ([1], [1], [1], False, [0], 1)
CONV2 = ([2, 1], [1, 0], [1, 2], False, [0, 0], 2)
CONVT = ([2, 2], [0, 0], [1, 1], True, [1, 1], 1)
sample("aten.convolution.default", x(B, D, 5, at=0), x(O, D, 3), x(O), *CONV1, expect="batched(0)")
sample("aten.convolution.default", x(2 * B, D, 5, at=(0, 1, 2)), x(O, D, 3), None, *CONV1, expect="batched(0, 1*B*2)")
sample("aten.convolution.default", x(B, 4, 5, 5, at=0), x(4, 2, 3, 2), None, *CONV2, expect="batched(0)")
sample("aten.convolution.default", x(B, D, 2, 2, at=0), x(D, O, 2, 2), None, *CONVT, expect="batched(0)")
sample("aten.convolution.default", x(T, B, 5, at=1), x(O, B, 3), None, *CONV1, expect="mixed")
OWN1, OWNT = ([1], [1], [1], False, [0], B), ([2], [0], [1], True, [1], 2 * B)
sample("aten.convolution.default", x(T, 2 * B, 5, at=(1, 1, 2)), x(O * B, 2, 3, at=(0, 1, O)), x(O * B, at=(0, 1, O)), *OWN1,
       expect="batched(1, 1*B*2)")  # fmt: skip
sample("aten.convolution.default", x(T, 2 * B, 5, at=(1, 1, 2)), x(O * B, 2, 3), None, *OWN1, expect="batched(1, 1*B*2)")
sample("aten.convolution.default", x(T, 2 * B, 5, at=(1, 2, 1)), x(O * B, 2, 3), None, *OWN1, expect="mixed")
sample("aten.convolution.default", x(T, 2 * B, 5, at=(1, 1, 2)), x(O * B, 2, 3, at=(0, 2, 1)), None, *OWN1, expect="mixed")
sample("aten.convolution.default", x(T, 2 * B, 5, at=(1, 1, 2)), x(2 * B, 3, 2, at=(0, 1, 2)), None, *OWNT, expect="batched(1, 1*B*6)")
sample("aten.convolution.default", x(B, D, 5, at=0), x(B, D, 3, at=0), None, *CONV1, expect="mixed")
sample("aten.convolution.default", x(T, D, 5), x(B, D, 3), x(B, at=0), *CONV1, expect="mixed")
ALL = [True, True, True]
sample("aten.convolution_backward.default", x(B, O, 5, at=0), x(B, D, 5, at=0), x(O, D, 3), [O], *CONV1, ALL,
       expect=("batched(0)", "partial", "partial"), tangent=True)
sample("aten.convolution_backward.default", x(T, O * B, 5, at=(1, 1, O)), x(T, 2 * B, 5, at=(1, 1, 2)), x(O * B, 2, 3, at=(0, 1, O)),
       [O * B], *OWN1, ALL, expect=("batched(1, 1*B*2)", "batched(0, 1*B*2)", "batched(0, 1*B*2)"), tangent=True)
sample("aten.convolution_backward.default", x(T, O * B, 5), x(T, 2 * B, 5, at=(1, 1, 2)), x(O * B, 2, 3), [O * B], *OWN1, ALL,
       expect=("mixed",) * 3, tangent=True)
sample("aten.convolution_backward.default", x(2 * B, O, 5, at=(0, 2, 1)), x(2 * B, D, 5), x(O, D, 3), [O], *CONV1, ALL,
       expect=("batched(0, 2*B*1)", "partial", "partial"), tangent=True)
sample("aten.convolution_backward.default", x(B, 4, 3, 3, at=0), x(B, 4, 5, 5, at=0), x(4, 2, 3, 2), [4], *CONV2, ALL,
       expect=("batched(0)", "partial", "partial"), tangent=True)
sample("aten.convolution_backward.default", x(B, O, 5, 5, at=0), x(B, D, 2, 2, at=0), x(D, O, 2, 2), [O], *CONVT, ALL,
       expect=("batched(0)", "partial", "partial"), tangent=True)
sample("aten.convolution_backward.default", x(B, O, 5), x(B, D, 5, at=0), x(O, D, 3), [O], *CONV1, ALL,
       expect=("shared", "partial", "shared"), tangent=True)
sample("aten.convolution_backward.default", x(B, O, 5, at=0), x(B, D, 5, at=0), x(O, D, 3, at=2), [O], *CONV1, ALL,
       expect=("mixed",) * 3, tangent=True)
sample("aten.convolution_backward.default", x(2 * B, O, 5, at=(0, 2, 1)), x(2 * B, D, 5, at=(0, 1, 2)), x(O, D, 3), [O], *CONV1, ALL,
       expect=("mixed",) * 3, tangent=True)


def spatial(name: str, size: tuple[int, ...], *rest: Any, two: bool = False, backward: tuple[Any, ...] = ()) -> None:
    """Samples with the examples in N, in C, and (mixed) in the last dimension, which here has size B too."""
    for shape, at, state in (((B, 2, *size), 0, "batched(0)"), ((2, 2 * B, *size), (1, 2, 1), "batched(1, 2*B*1)"),
                             ((2, 1, *size[:-1], 2 * B), (1 + len(size), 2, 1), "mixed")):
        sample(f"aten.{name}.default", x(*shape, at=at), *rest, expect=(state, state) if two else state)


for n in (1, 2, 3):
    size = (6,) * n
    spatial(f"avg_pool{n}d", size, [2] * n)
    if n > 1:
        spatial(f"max_pool{n}d_with_indices", size, [2] * n, [2] * n, two=True)
        spatial(f"_adaptive_avg_pool{n}d", size, [3] * n)
        spatial(f"adaptive_max_pool{n}d", size, [3] * n, two=True)
    spatial(f"upsample_nearest{n}d", size, [9] * n)
    spatial(f"reflection_pad{n}d", size, [1, 2] * n)
    spatial(f"replication_pad{n}d", size, [1, 2] * n)
for name, n in (("upsample_linear1d", 1), ("upsample_bilinear2d", 2), ("upsample_trilinear3d", 3), ("upsample_bicubic2d", 2),
                ("_upsample_bilinear2d_aa", 2)):
    spatial(name, (6,) * n, [9] * n, False)
spatial("_unsafe_upsample_nearest2d", (6, 6), [9, 9])


def shapes(n: int) -> list[tuple[tuple[int, ...], Any, str]]:
    return [((B, 2), 0, "batched(0)"), ((2, 2 * B), (1, 2, 1), "batched(1, 2*B*1)")]


for n in (1, 2, 3):
    small, large = (3,) * n, (6,) * n
    for lead, at, state in shapes(n):
        g, own, wide = x(*lead, *small, at=at), x(*lead, *large, at=at), x(*lead, *(9,) * n, at=at)
        args: tuple[Any, ...] = (list((9,) * n), [*lead, *large])
        sample(f"aten.upsample_nearest{n}d_backward.default", wide, *args, expect=state, tangent=True)
        name = {1: "linear1d", 2: "bilinear2d", 3: "trilinear3d"}[n]
        sample(f"aten.upsample_{name}_backward.default", wide, *args, False, expect=state, tangent=True)
        if n == 2:
            sample("aten.upsample_bicubic2d_backward.default", wide, *args, False, expect=state, tangent=True)
            sample("aten._upsample_bilinear2d_aa_backward.default", wide, *args, False, expect=state, tangent=True)
        for kind in ("reflection", "replication"):
            sample(f"aten.{kind}_pad{n}d_backward.default", x(*lead, *(9,) * n, at=at), own, [1, 2] * n, expect=state, tangent=True)
        if n == 1:
            continue
        sample(f"aten.avg_pool{n}d_backward.default", g, own, [2] * n, [2] * n, [0] * n, False, True, None, expect=state, tangent=True)
        sample(f"aten._adaptive_avg_pool{n}d_backward.default", g, own, expect=state, tangent=True)

        def places(lead: tuple[int, ...] = lead, n: int = n) -> torch.Tensor:
            pool = getattr(aten, f"max_pool{n}d_with_indices").default
            return pool(torch.randn(*lead, *(6,) * n, dtype=torch.float64), [2] * n, [2] * n)[1]

        at_ = at
        sample(f"aten.max_pool{n}d_with_indices_backward.default", g, own, [2] * n, [2] * n, [0] * n, [1] * n, False, drawn(places, at_),
               expect=state, tangent=True)
        sample(f"aten.adaptive_max_pool{n}d_backward.default", g, own, drawn(places, at_), expect=state, tangent=True)
        if n == 2:
            sample("aten.max_unpool2d.default", g, drawn(places, at_), [6, 6], expect=state)
            sample("aten.fractional_max_pool2d_backward.default", g, own, [2, 2], [3, 3], drawn(places, at_), expect=state, tangent=True)
            sample("aten.fractional_max_pool2d.default", own, [2, 2], [3, 3], positive(*lead, 2, at=at_), expect=(state, state))
sample("aten.max_pool2d_with_indices_backward.default", x(1, B, 3, 3, at=1), x(1, B, 6, 6), [2, 2], [2, 2], [0, 0], [1, 1], False,
       drawn(lambda: aten.max_pool2d_with_indices.default(torch.randn(1, B, 6, 6), [2, 2])[1]), expect="batched(1)", tangent=True)
sample("aten.avg_pool2d_backward.default", x(2, 1, 3, B, at=3), x(2, 1, 6, 2 * B, at=(3, 1, 2)), [2, 2], [2, 2], [0, 0], False, True, None,
       expect="mixed", tangent=True)
LOW = ([2, 2], [2, 2], [0, 0], [1, 1])
sample("prims._low_memory_max_pool_with_offsets.default", x(B, 2, 6, 6, at=0), *LOW, False, expect=BOTH)
sample("prims._low_memory_max_pool_with_offsets.default", x(2, 1, 6, 2 * B, at=(3, 2, 1)), *LOW, False, expect=("mixed", "mixed"))
sample("prims._low_memory_max_pool_with_offsets.default", x(2, 1, 2 * B, 6, 6, at=(2, 2, 1)), [2] * 3, [2] * 3, [0] * 3, [1] * 3, False,
       expect=("mixed", "mixed"))
sample("prims._low_memory_max_pool_offsets_to_indices.default", drawn(lambda: torch.randint(4, (B, 2, 3, 3), dtype=torch.int8), at=0), [2, 2], [6, 6],
       [2, 2], [0, 0], [1, 1], expect="batched(0)")

GRID = (0, 0, False)
for n in (2, 3):
    image, grid, out = (B, 2, *(4,) * n), (B, *(3,) * n, n), (B, 2, *(3,) * n)
    op = f"aten.grid_sampler_{n}d"
    sample(f"{op}.default", x(*image, at=0), x(*grid, at=0), *GRID, expect="batched(0)")
    sample(f"{op}.default", x(*image), x(*grid, at=0), *GRID, expect="batched(0)")
    sample(f"{op}.default", x(2, B, *image[2:], at=1), x(2, *grid[1:]), *GRID, expect="mixed")
    sample(f"{op}_backward.default", x(*out, at=0), x(*image, at=0), x(*grid, at=0), *GRID, [True, True], expect=BOTH, tangent=True)
sample("aten.im2col.default", x(B, 2, 4, 4, at=0), [2, 2], [1, 1], [0, 0], [1, 1], expect="batched(0)")
sample("aten.im2col.default", x(B, 4, 4, at=0), [2, 2], [1, 1], [0, 0], [1, 1], expect="mixed")  # without a batch dimension
sample("aten.col2im.default", x(B, 8, 9, at=0), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1], expect="batched(0)")
sample("aten.col2im.default", x(4 * B, 9, at=(0, 4, 1)), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1], expect="mixed")
sample("aten.pixel_shuffle.default", x(B, 4, 2, 2, at=0), 2, expect="batched(0)")
sample("aten.pixel_shuffle.default", x(4 * B, 2, 2, at=(0, 4, 1)), 2, expect="mixed")
sample("aten.pixel_unshuffle.default", x(B, 1, 4, 4, at=0), 2, expect="batched(0)")
sample("aten.pixel_unshuffle.default", x(B, 4, 4, at=0), 2, expect="mixed")
sample("aten.channel_shuffle.default", x(B, 4, 2, 2, at=0), 2, expect="batched(0)")
sample("aten.channel_shuffle.default", x(2, 4 * B, 2, 2, at=(1, 2, 2)), 2, expect="mixed")
sample("aten._cdist_forward.default", x(B, T, D, at=0), x(B, 4, D, at=0), 2.0, None, expect="batched(0)")
sample("aten._cdist_forward.default", x(B, D, at=0), x(B, D, at=0), 2.0, None, expect="mixed")
sample("aten._cdist_forward.default", x(B, B, T, D, at=0), x(B, 4, D, at=0), 2.0, None, expect="mixed")
sample("aten._cdist_forward.default", x(B, T, D, at=0), x(4, D), 2.0, None, expect="batched(0)")
sample("aten._cdist_forward.default", x(B, T, D, at=0), x(B, B, 4, D), 2.0, None, expect="batched(1)")
sample("aten._cdist_forward.default", x(2 * B, D, at=(0, 2, 1)), x(4, D), 2.0, None, expect="batched(0, 2*B*1)")
sample("aten._cdist_forward.default", x(4, D), x(B * T, D, at=(0, 1, T)), 1.0, None, expect="batched(1, 1*B*3)")
sample("aten._cdist_forward.default", x(4, B, at=1), x(T, B), 2.0, None, expect="mixed")
sample("aten._cdist_backward.default", x(B, 4, T, at=0), x(4, D), x(B, T, D, at=0), 2.0, positive(B, 4, T, at=0),
       expect="batched(0)", tangent=True)
sample("aten._cdist_backward.default", x(B, T, 4, at=0), x(B, T, D, at=0), x(B, 4, D, at=0), 2.0, positive(B, T, 4, at=0),
       expect="batched(0)", tangent=True)
sample("aten._cdist_backward.default", x(4, B, at=1), x(4, D), x(B, D, at=0), 2.0, positive(4, B, at=1), expect="partial", tangent=True)
sample("aten._cdist_backward.default", x(B, 4, at=0), x(B, D, at=0), x(4, D), 2.0, positive(B, 4, at=0), expect="batched(0)", tangent=True)

sample("aten.native_layer_norm.default", x(B, T, D, at=0), [D], x(D), x(D), 1e-5, expect=THREE)
sample("aten.native_layer_norm.default", x(T, B, D, at=1), [D], None, None, 1e-5, expect=("batched(1)",) * 3)
sample("aten.native_layer_norm.default", x(B * T, D, at=(0, 1, T)), [D], x(D), None, 1e-5, expect=("batched(0, 1*B*3)",) * 3)
sample("aten.native_layer_norm.default", x(T, B, D, at=1), [B, D], None, None, 1e-5, expect=("mixed",) * 3)
sample("aten.native_layer_norm.default", x(B, T, D, at=0), [D], x(D, at=0), None, 1e-5, expect=("mixed",) * 3)
sample("aten._fused_rms_norm.default", x(T, B, D, at=1), [D], x(D), 1e-5, expect=("batched(1)",) * 2)
sample("aten._fused_rms_norm.default", x(B, T, D, at=0), [T, D], None, 1e-5, expect=BOTH)
sample("aten._fused_rms_norm.default", x(T, B, at=1), [B], None, 1e-5, expect=("mixed",) * 2)
for lead, at, state in (((B, T), 0, "batched(0)"), ((T, B), 1, "batched(1)"), ((2 * B,), (0, 2, 1), "batched(0, 2*B*1)")):
    stats = [positive(*lead, 1, at=at), positive(*lead, 1, at=at)]
    sample("aten.native_layer_norm_backward.default", x(*lead, D, at=at), x(*lead, D, at=at), [D], *stats, x(D), x(D), ALL,
           expect=(state, "partial", "partial"), tangent=True)
    low = [half(*lead, D, at=at), half(*lead, D, at=at), [D], half(*lead, 1, at=at), half(D)]  # the op exists on CUDA only
    sample("aten._fused_rms_norm_backward.default", *low, [True, True], expect=(state, "partial"), tangent=True, truth="meta")
sample("aten.native_layer_norm_backward.default", x(T, B, at=1), x(T, B, at=1), [B], x(T, 1), positive(T, 1), x(B), x(B), ALL,
       expect=("mixed",) * 3, tangent=True)
sample("aten._fused_rms_norm_backward.default", half(T, B, at=1), half(T, B, at=1), [B], half(T, 1), half(B), [True, True],
       expect=("mixed",) * 2, tangent=True, truth="meta")
sample("aten.native_group_norm.default", x(B, 4, 5, at=0), x(4), x(4), B, 4, 5, 2, 1e-5, expect=THREE)
sample("aten.native_group_norm.default", x(2 * B, 4, 5, at=(0, 2, 1)), x(4), None, 2 * B, 4, 5, 2, 1e-5, expect=("batched(0, 2*B*1)",) * 3)
sample("aten.native_group_norm.default", x(2, B, 5, at=1), None, None, 2, B, 5, 1, 1e-5, expect=("mixed",) * 3)
sample("aten.native_group_norm_backward.default", x(B, 4, 5, at=0), x(B, 4, 5, at=0), x(B, 2, at=0), positive(B, 2, at=0), x(4), B, 4, 5, 2, ALL,
       expect=("batched(0)", "partial", "partial"), tangent=True)

H = 2


def qkv(batch: int = B, heads: int = H, at: Any = 0) -> list[Input]:
    return [x(batch, heads, n, 4, at=at) for n in (T, 5, 5)]


CPU = "aten._scaled_dot_product_flash_attention_for_cpu"
sample(f"{CPU}.default", *qkv(), expect=BOTH)
sample(f"{CPU}.default", *qkv(), 0.0, True, attn_mask=None, expect=BOTH)
sample(f"{CPU}.default", *qkv(H, 2 * B, (1, 2, 1)), expect=("batched(1, 2*B*1)",) * 2)
sample(f"{CPU}.default", *qkv(), attn_mask=x(B, 1, T, 5, at=0), expect=BOTH)
sample(f"{CPU}.default", *qkv(), attn_mask=x(1, 1, T, 5), expect=BOTH)
sample(f"{CPU}.default", *qkv(B, B, 0), attn_mask=x(1, B, T, 5, at=1), expect=("mixed", "mixed"))
sample(f"{CPU}.default", x(B, H, T, 4, at=0), x(B, H, 5, 4), x(B, H, 5, 4), expect=BOTH)
sample(f"{CPU}.default", x(H, T, B, 4, at=2), x(H, T, B, 4, at=2), x(H, T, B, 4, at=2), expect=("mixed", "mixed"))  # attention across examples
sample(f"{CPU}.default", x(B, B, T, 4, at=0), x(B, B, 5, 4, at=1), x(B, B, 5, 4, at=1), expect=("mixed", "mixed"))
sample(f"{CPU}_backward.default", x(B, H, T, 4, at=0), *qkv(), x(B, H, T, 4, at=0), x(B, H, T, at=0), 0.0, False, expect=THREE, tangent=True)
sample(f"{CPU}_backward.default", x(H, B, T, 4, at=1), *qkv(H, B, 1), x(H, B, T, 4, at=1), x(H, B, T, at=1), 0.0, False,
       expect=("batched(1)",) * 3, tangent=True)


def elsewhere(name: str, *args: Any, expect: tuple[str, ...], **kwargs: Any) -> None:
    """CUDA ops: only shapes are known here. Two examples, as many as a random state has entries."""
    sample(f"aten._scaled_dot_product_{name}.default", *args, expect=expect, truth="meta", **kwargs)


def long(*shape: int) -> Input:
    return drawn(lambda: torch.empty(shape, dtype=torch.int64, device="meta"))


heads, lse, bias = half(B, H, 8, 8, at=0), drawn(lambda: torch.empty(B, H, 8, device="meta"), at=0), half(B, H, 8, 8)
b0 = "batched(0)"
elsewhere("flash_attention", *[heads] * 3, expect=(b0, b0, *["shared"] * 7))
elsewhere("flash_attention_backward", *[heads] * 5, lse, None, None, 8, 8, 0.0, False, long(2), long(), expect=(b0,) * 3, tangent=True)
elsewhere("efficient_attention", *[heads] * 3, bias, True, expect=(b0, b0, "shared", "shared"))
elsewhere("efficient_attention_backward", *[heads] * 4, bias, heads, lse, long(), long(), 0.0, [True] * 4, expect=(b0,) * 4, tangent=True)
elsewhere("cudnn_attention", *[heads] * 3, None, True, expect=(b0, b0, *["shared"] * 7))
elsewhere("cudnn_attention_backward", *[heads] * 5, lse, long(), long(), None, None, None, 8, 8, 0.0, False, expect=(b0,) * 3, tangent=True)
elsewhere("fused_attention_overrideable", *[heads] * 3, bias, expect=(b0, b0, *["shared"] * 7))
elsewhere("fused_attention_overrideable_backward", *[heads] * 4, bias, [True] * 4, heads, lse, None, None, 8, 8, 0.0, False, long(), long(),
          expect=(b0,) * 4, tangent=True)

sample("aten._fft_r2c.default", x(B, 4, at=0), [1], 0, True, expect="batched(0)")
sample("aten._fft_r2c.default", x(T, B, at=1), [1], 0, True, expect="mixed")
sample("aten._fft_c2c.default", z(T, 2 * B, 4, at=(1, 2, 1)), [0, 2], 0, True, expect="batched(1, 2*B*1)")
sample("aten._fft_c2c.default", z(T, B, at=1), [0, -1], 0, True, expect="mixed")
sample("aten._fft_c2r.default", z(B, D, at=0), [1], 0, 4, expect="batched(0)")
sample("aten._fft_c2r.default", z(T, B, at=1), [1], 0, 4, expect="mixed")

# --------------------------------------------------------------------------------------------------- linear algebra


def definite(*shape: int, at: Any = None) -> Input:
    """Symmetric and well conditioned; the identity is added to what is drawn, so that any draw is."""
    return drawn(lambda: (m := torch.randn(*shape, dtype=torch.float64)) @ m.mT + 3 * torch.eye(shape[-1]).double(), at)


def factored(index: int, factor: Any, *shape: int, at: Any = None) -> Input:
    """One of the results of a factorisation."""
    return drawn(lambda: factor(x(*shape).draw())[index], at)


LU, LDL = torch.linalg.lu_factor, lambda m: torch.linalg.ldl_factor(m + m.mT)
for name, count, matrix in (("_linalg_det", 3, x), ("_linalg_slogdet", 4, x), ("linalg_lu", 3, x), ("linalg_lu_factor_ex", 3, x),
                            ("linalg_inv_ex", 2, x), ("linalg_qr", 2, x), ("_linalg_svd", 3, x), ("geqrf", 2, x),
                            ("_linalg_eigh", 2, definite), ("linalg_cholesky_ex", 2, definite), ("linalg_ldl_factor_ex", 3, definite)):  # fmt: skip
    sample(f"aten.{name}.default", matrix(B, 4, T, T, at=0), expect=("batched(0)",) * count)
    sample(f"aten.{name}.default", matrix(2, B, T, T, at=1), expect=("batched(1)",) * count)
    sample(f"aten.{name}.default", matrix(T, B, B, at=1), expect=("mixed",) * count)
for name in ("cholesky", "cholesky_inverse", "linalg_matrix_exp", "_linalg_eigvals"):
    sample(f"aten.{name}.default", definite(B, T, T, at=0), expect="batched(0)")
    sample(f"aten.{name}.default", definite(T, B, B, at=2), expect="mixed")
sample("aten.linalg_eig.default", definite(2 * B, T, T, at=(0, 2, 1)), expect=("batched(0, 2*B*1)",) * 2)
sample("aten.linalg_eig.default", definite(B, B, at=1), expect=("mixed",) * 2)
sample("aten.lu_unpack.default", factored(0, LU, B, T, T, at=0), factored(1, LU, B, T, T, at=0), expect=THREE)
sample("aten.lu_unpack.default", factored(0, LU, T, B, B, at=1), factored(1, LU, T, B, B), expect=("mixed",) * 3)
sample("aten._linalg_solve_ex.default", definite(T, T), x(B, T, O, at=0), expect=("batched(0)", "shared", "shared", "shared"))
sample("aten._linalg_solve_ex.default", definite(B, T, T, at=0), x(B, T, at=0), expect=("batched(0)",) * 4)
sample("aten._linalg_solve_ex.default", definite(T, T), x(T, B, at=1), expect=("batched(1)", "shared", "shared", "shared"))
sample("aten.triangular_solve.default", x(B, T, O, at=0), definite(T, T), expect=("batched(0)", "batched(0)"), truth="shape")
sample("aten.triangular_solve.default", x(T, B, at=1), definite(T, T), expect=("mixed", "mixed"))
for name, *args in (("cholesky_solve", x(B, T, O, at=0), definite(T, T)), ("ormqr", x(B, T, T), x(B, T), x(B, T, O, at=0)),
                    ("linalg_solve_triangular", definite(T, T), x(B, T, O, at=0))):  # fmt: skip
    keywords = {"upper": False} if name == "linalg_solve_triangular" else {}
    sample(f"aten.{name}.default", *args, expect="batched(0)", **keywords)
sample("aten.cholesky_solve.default", x(T, B, at=1), definite(T, T), expect="batched(1)")
sample("aten.ormqr.default", x(T, T), x(T), x(T, B, at=1), expect="batched(1)")
sample("aten.linalg_solve_triangular.default", definite(T, T), x(T, B, at=1), upper=False, expect="batched(1)")
sample("aten.linalg_lu_solve.default", factored(0, LU, T, T), factored(1, LU, T, T), x(B, T, O, at=0), expect="batched(0)")
sample("aten.linalg_lu_solve.default", factored(0, LU, T, T), factored(1, LU, T, T), x(T, B, at=1), expect="batched(1)")
sample("aten.linalg_ldl_solve.default", factored(0, LDL, T, T), factored(1, LDL, T, T), x(B, T, O, at=0), expect="batched(0)")
sample("aten.linalg_ldl_solve.default", factored(0, LDL, T, T), factored(1, LDL, T, T), x(T, B, at=1), expect="batched(1)")
sample("aten.linalg_householder_product.default", x(B, T, T, at=0), x(B, O, at=0), expect="batched(0)")
sample("aten.linalg_householder_product.default", x(B, T, T, at=0), x(B, B, at=1), expect="mixed")

# ----------------------------------------------------------------------------------------------------------- others

sample("aten.median.default", x(B, T, at=0), expect="shared")
sample("aten.nanmedian.default", x(B, T, at=0), expect="shared")
sample("aten.nanmedian.dim", x(B, T, at=0), 1, expect=BOTH)
sample("aten.nanmedian.dim", x(B, T, at=0), 0, tangent=True, expect=("mixed", "mixed"))
sample("prims.div.default", x(B, T, at=0), x(B, T, at=0), expect="batched(0)")
sample("aten.searchsorted.Tensor", x(T), x(T), sorter=ids(T, T, at=0), expect="mixed")
sample("aten.index_reduce.default", x(T, B, at=1), 0, ids(T, O), x(O, B, at=1), "mean", expect="batched(1)")
sample("aten.index_reduce.default", x(T, B), 0, ids(T, O), x(O, B, at=1), "prod", expect="batched(1)")
sample("aten.index_reduce.default", x(T, T), 0, ids(T, B, at=0), x(B, T, at=0), "mean", expect="mixed")
sample("aten.index_reduce.default", x(T, T), 0, ids(T, B), x(B, T, at=0), "mean", expect="mixed")
sample("aten.multinomial.default", positive(B, T, at=0), 2, expect="batched(0)", truth="shape")
sample("aten.multinomial.default", positive(B, at=0), 2, expect="mixed")
sample("aten.multinomial.default", positive(T, B, at=1), 2, expect="mixed")

# embedding bags: bag j is examples' row j; offsets 0, 4, 8 .. cut a (bags, 4) input
STARTS = lambda n: Made(prims.iota.default, (n,), {**iota(n).kwargs, "step": 4})  # noqa: E731
BAG = ("batched(0)", "shared", "batched(0)", "batched(0)")
for name in ("_embedding_bag", "_embedding_bag_forward_only"):
    for mode in range(3):
        sample(f"aten.{name}.default", x(7, D), ids(7, 4 * B, at=(0, 1, 4)), STARTS(B), False, mode, expect=BAG)
    sample(f"aten.{name}.default", x(7, D), ids(7, 8 * B, at=(0, 2, 4)), STARTS(2 * B), False, 2,
           expect=("batched(0, 2*B*1)", "shared", "batched(0, 2*B*1)", "batched(0, 2*B*1)"))
    sample(f"aten.{name}.default", x(7, D), ids(7, 4 * B), STARTS(B), False, 0, False, x(4 * B, at=(0, 1, 4)), expect=BAG)
    sample(f"aten.{name}.default", x(7, D), ids(7, 10), fixed([0, 2, 7], at=0), False, 1, expect=BAG, truth="shape")
    sample(f"aten.{name}.default", x(7, D), ids(7, 10), fixed([0, 2, 10], at=0), False, 0, False, None, True, expect=("mixed",) * 4)
    sample(f"aten.{name}.default", x(7, D), ids(7, B, at=0), fixed([0, 0, 1]), False, 0, expect=("mixed",) * 4)
    sample(f"aten.{name}.default", x(7, D), ids(7, 4 * B, at=(0, 4, 1)), STARTS(B), False, 0, expect=("mixed",) * 4)
    sample(f"aten.{name}.default", x(B, D, at=0), ids(B, 4 * B), STARTS(B), False, 0, expect=("mixed",) * 4)
OF_BAG = (fixed([0] * 4 + [1] * 4 + [2] * 4), fixed([4] * B))
NO_MAX = fixed([0] * B)
for at in (0, None):
    sample("aten._embedding_bag_backward.default", x(B, D, at=at), ids(7, 4 * B, at=(0, 1, 4)), STARTS(B), *OF_BAG, NO_MAX, 7, False, 0, False, None,
           expect="partial", tangent=True)
sample("aten._embedding_bag_backward.default", x(B, D, at=0), ids(7, 4 * B), STARTS(B), *OF_BAG, ids(7, B, D, at=0), 7, False, 2, False, None,
       expect="partial", tangent=True)
RAGGED = (fixed([0, 2, 7]), fixed([0] * 2 + [1] * 5 + [2] * 3))
sample("aten._embedding_bag_backward.default", x(B, D, at=0), ids(7, 10), *RAGGED, fixed([2, 5, 3]), NO_MAX, 7, False, 1, False, None,
       expect="partial", tangent=True)
sample("aten._embedding_bag_backward.default", x(B, D, at=0), ids(7, 4 * B), STARTS(B), *OF_BAG, NO_MAX, 7, True, 0, False, None, expect="mixed",
       tangent=True)
sample("aten._embedding_bag_backward.default", x(B, D, at=1), ids(7, 4 * B), STARTS(B), *OF_BAG, NO_MAX, 7, False, 0, False, None, expect="mixed",
       tangent=True)
sample("aten._embedding_bag_per_sample_weights_backward.default", x(B, D, at=0), x(7, D), ids(7, 4 * B, at=(0, 1, 4)), STARTS(B), OF_BAG[0], 0,
       expect="batched(0, 1*B*4)", tangent=True)
sample("aten._embedding_bag_per_sample_weights_backward.default", x(B, D, at=0), x(7, D), ids(7, 10), *RAGGED, 0, expect="mixed", tangent=True)

for name in ("_neg_view", "resolve_neg"):
    sample(f"aten.{name}.default", z(B, D, at=0), expect="batched(0)")
for mode in ("_upsample_bicubic2d_aa",):
    sample(f"aten.{mode}.default", x(B, 2, 5, 6, at=0), [3, 3], False, expect="batched(0)")
    sample(f"aten.{mode}_backward.default", x(B, 2, 3, 3, at=0), [3, 3], [B, 2, 5, 6], False, expect="batched(0)", tangent=True)

# ----------------------------------------------------------------------------------------------------- quantisation

QUANTISED = (0.1, 0, -8, 7)
ZERO_POINTS = drawn(lambda: torch.tensor([0, 1, 2], dtype=torch.int32))


def floats32(*shape: int, at: Any = None) -> Input:
    return drawn(lambda: torch.randn(shape), at)


sample("aten.fake_quantize_per_tensor_affine_cachemask.default", floats32(B, D, at=0), *QUANTISED, expect=("batched(0)",) * 2)
sample("aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default", floats32(B, D, at=0), fixed([0.1]), fixed([0]), fixed([1]),
       -8, 7, expect=("batched(0)",) * 2)  # fmt: skip
sample("aten.fake_quantize_per_channel_affine_cachemask.default", floats32(B, D, at=0), fixed([0.1, 0.2, 0.3]), ZERO_POINTS, 1, -8, 7,
       expect=("batched(0)",) * 2)  # fmt: skip
sample("aten.fake_quantize_per_channel_affine_cachemask.default", floats32(B, D, at=0), fixed([0.1, 0.2, 0.3], at=0), ZERO_POINTS, 0, -8, 7,
       expect=("mixed",) * 2)  # fmt: skip

# a column of the right-hand side for each example, a row of it in X A = B
sample("aten._linalg_solve_ex.default", x(4, 4), x(4, B, at=1), expect=("batched(1)", "shared", "shared", "shared"))
sample("aten._linalg_solve_ex.default", x(4, 4), x(B, 4, at=0), left=False, expect=("batched(0)", "shared", "shared", "shared"))
sample("aten._linalg_solve_ex.default", x(B, B), x(B, B, at=0), expect=("mixed",) * 4)
sample("aten.linalg_solve_triangular.default", x(4, 4), x(4, 2 * B, at=(1, 2, 1)), upper=False, expect="batched(1, 2*B*1)")
sample("aten.linalg_solve_triangular.default", x(2, 4, 4), x(4, B, at=1), upper=True, expect="batched(2)")
