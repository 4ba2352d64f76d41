"""Ops that ``torch.func.vmap`` cannot take, or takes wrongly, as functions that it can.

_trilinear(i1, i2, i3, ...)     -> the product with all dimensions in place, summed
convert_element_type(a, dtype)  -> a where that would round the squares
"""

from __future__ import annotations

import math
from typing import Any

import torch

aten, prims = torch.ops.aten, torch.ops.prims


def _trilinear(
    i1: Any, i2: Any, i3: Any, expand1: Any, expand2: Any, expand3: Any, sumdim: Any, unroll_dim: int = 1
) -> Any:
    for dims, position in ((expand1, 0), (expand2, 1), (expand3, 2)):
        for dim in sorted(dims):
            i1, i2, i3 = (t.unsqueeze(dim) if i == position else t for i, t in enumerate((i1, i2, i3)))
    return (i1 * i2 * i3).sum(sumdim)


def _weight_norm_backward(grad_w: Any, v: Any, g: Any, norms: Any, dim: int) -> tuple[Any, Any]:
    """Of w = v * g / ||v||, the norm over all dimensions but ``dim``."""
    projected = (grad_w * v).sum([d for d in range(v.dim()) if d != dim], keepdim=True)
    return g / norms * (grad_w - v * projected / norms**2), projected / norms


def _stacked_slice_scatter(self: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    B = src.shape[0] if self.shape[0] == 1 else self.shape[0]
    self, src = (t.expand(B, *t.shape[1:]) for t in (self, src))
    return torch.slice_scatter(self, src, dim % (self.dim() - 1) + 1, start, end, step)


def _cdist_backward(grad: Any, x1: Any, x2: Any, p: float, cdist: Any) -> Any:
    """PyTorch's own batching rule is wrong where only the gradient is batched (2.13)."""
    if p == 2:
        share = torch.where(cdist == 0, 0, grad / cdist)
        return x1 * share.sum(-1, keepdim=True) - share @ x2
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    size, grad, cdist = difference.abs(), grad.unsqueeze(-1), cdist.unsqueeze(-1)
    if p == math.inf:
        slope = (size == cdist).to(size.dtype)
    else:
        slope = torch.zeros_like(size) if p == 0 else (size / cdist) ** (p - 1)
    return torch.where(difference == 0, 0, difference.sign() * slope * grad).sum(-2)


def _convert(a: Any, dtype: torch.dtype) -> Any:
    """A gradient is not rounded below the dtype in which its squares are summed."""
    narrower = a.dtype.is_floating_point and dtype.is_floating_point and dtype.itemsize < a.dtype.itemsize
    return a if narrower else a.to(dtype)


LIFT_AS: dict[Any, Any] = {
    aten._trilinear.default: _trilinear,
    aten._weight_norm_interface_backward.default: _weight_norm_backward,
    prims.convert_element_type.default: _convert,
    aten._to_copy.default: lambda a, dtype=None, **_: a if dtype is None else _convert(a, dtype),
    prims.rev.default: torch.flip,
    prims.fma.default: lambda a, b, c: a * b + c,
    aten._cdist_backward.default: _cdist_backward,
    aten.copy.default: lambda self, src, *_: src.expand(self.shape),
}
"""What ``torch.func.vmap`` is given in place of ops that have no batching rule."""

LIFT_STACKED: dict[Any, Any] = {aten.slice_scatter.default: _stacked_slice_scatter}
"""The same without ``vmap``, whose rules fix symbolic sizes: all tensors have the examples in front, or a 1 there."""
