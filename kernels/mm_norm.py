"""grad = sum_b x_b^T g_b together with s_b = ||x_b^T g_b||_F^2, and no product x_b^T g_b in memory.

    x [B, E, T, I], g [B, E, T, O]  ->  grad [E, I, O], sq_norms [B]

The matrix multiply is the one a plain weight gradient does; what is added is one square and one addition per element of
a product. On a CPU with a C++ compiler it is still in registers then, see ``native/mm_norm.cpp``; else it is in one
small buffer that stays in the cache.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gnsfx.kernels import native
from gnsfx.kernels.accumulate import accumulate_dtype, square_sums
from gnsfx.kernels.factors import same_leading
from gnsfx.kernels.tiling import budget_for, matmul_tiles

_SUM_AT_ONCE = 1 << 14
"""Products smaller than this are added by one reduction over examples, larger ones each by its own addition."""


def mm_sq_norm(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Weight gradient [E, I, O] in the dtype of ``x`` and squared norms [B] of its per-example parts.

    Examples are added in fp32 (fp64 for fp64), and the sum is rounded once. Without a C++ compiler a CPU multiplies bf16
    into bf16 only, so there the gradient is a matrix multiply of its own.
    """
    same_leading(3, x, g)
    if (found := native.products(x, g)) is not None:
        return found
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        left, right = x.permute(1, 3, 0, 2).flatten(2), g.transpose(0, 1).flatten(1, 2)
        return torch.bmm(left, right), product_sq_norm(x, g)
    B, E, _, I = x.shape
    dtype = accumulate_dtype(x.dtype)
    grad = torch.zeros(E, I, g.shape[3], dtype=dtype, device=x.device)
    sq_norms = torch.zeros(B, dtype=dtype, device=x.device)
    for b, entries, product in _products(x, g):
        sq_norms[b].add_(square_sums(product.flatten(1)))
        _add_examples(grad[entries], product)
    return grad.to(x.dtype), sq_norms


def product_sq_norm(x: Tensor, g: Tensor) -> Tensor:
    """Only the squared norms [B] of ``x_b^T g_b``, for callers that have the gradient already."""
    same_leading(3, x, g)
    if (found := native.products(x, g, summed=False)) is not None:
        return found[1]
    sq_norms = torch.zeros(x.shape[0], dtype=accumulate_dtype(x.dtype), device=x.device)
    for b, _, product in _products(x, g):
        sq_norms[b].add_(square_sums(product.flatten(1)))
    return sq_norms


def _products(x: Tensor, g: Tensor) -> Iterator[tuple[slice, tuple[slice, slice, slice], Tensor]]:
    """Tiles of the products: examples, entries of [E, I, O], and x_b^T g_b [b, e, i, o] valid until the next one."""
    B, E, _, I = x.shape
    O = g.shape[3]
    dtype = accumulate_dtype(x.dtype)
    tiles = matmul_tiles(B, E, I, O, dtype.itemsize, budget_for(x.device.type))
    scratch = x.new_empty(math.prod(tiles), dtype=dtype)
    on_cpu = x.device.type == "cpu"
    rounded = x.new_empty(math.prod(tiles)) if on_cpu and x.dtype == torch.bfloat16 else None
    for i, o, e, b in itertools.product(
        _slices(I, tiles.rows), _slices(O, tiles.columns), _slices(E, tiles.contractions), _slices(B, tiles.examples)
    ):
        left, right = x[b, e, :, i].flatten(0, 1).mT, g[b, e, :, o].flatten(0, 1)
        shape = (left.shape[0], left.shape[1], right.shape[2])
        out = scratch[: math.prod(shape)].view(shape)
        if rounded is not None:
            out.copy_(torch.bmm(left, right, out=rounded[: math.prod(shape)].view(shape)))
        elif x.dtype == dtype:
            torch.bmm(left, right, out=out)
        elif on_cpu:  # fp16 has too little range for a product that is not the final gradient
            torch.bmm(left.to(dtype), right.to(dtype), out=out)
        else:
            torch.bmm(left, right, out_dtype=dtype, out=out)
        yield b, (e, i, o), out.unflatten(0, (-1, e.stop - e.start))


def _add_examples(grad: Tensor, product: Tensor) -> None:
    """grad [e, I, O] += sum over examples of product [b, e, I, O]."""
    if product.shape[0] > 1 and grad.numel() <= _SUM_AT_ONCE:
        grad.add_(product.sum(0))
    else:
        for example in product.unbind(0):
            grad.add_(example)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, max(step, 1))]
