"""s_b = ||x_b^T g_b||_F^2 = <x_b x_b^T, g_b g_b^T>, from two T x T Gram matrices and without the [I, O] product.

    x [B, E, T, I], g [B, E, T, O]  ->  sq_norms [B]

Cheap when T is short. The sum cancels where the per-example gradient is much smaller than its factors, so Grams are
never rounded below fp32, and the result is clamped at zero. Of a few positions a CPU with a C++ compiler reads both
factors once, see ``native/gram_norm.cpp``.
"""

import ctypes

import torch
from torch import Tensor

from gnsfx.kernels import native
from gnsfx.kernels.accumulate import accumulate_dtype
from gnsfx.kernels.factors import same_leading
from gnsfx.kernels.tiling import FEW_POSITIONS, budget_for, gram_tiles


def ghost_sq_norm(x: Tensor, g: Tensor) -> Tensor:
    """Squared norms [B] of the per-example products, in blocks of positions; only one half of the symmetric Grams."""
    same_leading(3, x, g)
    if (found := _of_few_positions(x, g)) is not None:
        return found
    B, E, T, _ = x.shape
    dtype = accumulate_dtype(x.dtype)
    sq_norms = torch.zeros(B, dtype=dtype, device=x.device)
    tiles = gram_tiles(B, E, T, dtype.itemsize, budget_for(x.device.type))
    for b0 in range(0, B, tiles.examples):
        b = slice(b0, b0 + tiles.examples)
        for e0 in range(0, E, tiles.contractions):
            e = slice(e0, e0 + tiles.contractions)
            for i0 in range(0, T, tiles.positions):
                i = slice(i0, i0 + tiles.positions)
                for j0 in range(0, i0 + 1, tiles.positions):
                    j = slice(j0, j0 + tiles.positions)
                    block = gram(x[b, e, i], x[b, e, j]).mul_(gram(g[b, e, i], g[b, e, j])).sum((1, 2, 3))
                    sq_norms[b].add_(block, alpha=1 if i0 == j0 else 2)
    return sq_norms.clamp_(min=0)


FEW_POSITIONS_DTYPES = (torch.float32, torch.float64)
_Shape = ctypes.c_int64 * 13


def _of_few_positions(x: Tensor, g: Tensor) -> Tensor | None:
    """By the C++ kernel, where there is one for these factors."""
    dtype, (B, E, T, I), O = x.dtype, x.shape, g.shape[3]
    if T > FEW_POSITIONS or dtype not in FEW_POSITIONS_DTYPES or not (x.is_cpu and g.is_cpu and g.dtype == dtype):
        return None
    if x.stride(3) != 1 or g.stride(3) != 1 or x.shape[:3] != g.shape[:3] or 0 in (B, E, T, I, O):
        return None
    kernel = native.function("gram_norm.cpp", "ghost_sq_norm", dtype)
    if kernel is None:
        return None
    sq_norms = x.new_empty(B)
    shape = _Shape(B, E, T, I, O, *x.stride(), *g.stride())
    addresses = ctypes.addressof(shape), x.data_ptr(), g.data_ptr(), None, sq_norms.data_ptr()
    kernel(*addresses, torch.get_num_threads())
    return sq_norms


def shared_gram(x: Tensor) -> Tensor:
    """[B, E, T, T] of x [B, E, T, K], for several contractions with the same factor; meant for T of one block."""
    return gram(x, x)


def gram_sq_norm(other: Tensor, g: Tensor) -> Tensor:
    """Squared norms [B] from the Gram of the other factor [B, E, T, T] and g [B, E, T, O]."""
    same_leading(3, other, g)
    B, E, T, _ = g.shape
    dtype = accumulate_dtype(g.dtype)
    sq_norms = torch.zeros(B, dtype=dtype, device=g.device)
    tiles = gram_tiles(B, E, T, dtype.itemsize, budget_for(g.device.type))
    for b0 in range(0, B, tiles.examples):
        b = slice(b0, b0 + tiles.examples)
        sq_norms[b] = gram(g[b], g[b]).mul_(other[b]).sum((1, 2, 3))
    return sq_norms.clamp_(min=0)


def gram(left: Tensor, right: Tensor) -> Tensor:
    """left [b, e, S, K], right [b, e, T, K] -> left right^T [b, e, S, T] in the accumulate dtype."""
    b, e, S, K = left.shape
    T = right.shape[2]
    dtype = accumulate_dtype(left.dtype)
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if left.dtype == dtype:
        out = torch.bmm(left, right.mT)
    elif left.device.type != "cpu":
        out = torch.bmm(left, right.mT, out_dtype=dtype)
    else:
        # Upcast in slices of K: a whole fp32 copy of a wide operand (the logits' gradient) would be twice its size.
        step = max(64, budget_for("cpu") // (4 * b * e * (S + T)))
        out = torch.zeros(b * e, S, T, dtype=dtype)
        for k in range(0, K, step):
            out.baddbmm_(left[..., k : k + step].to(dtype), right[..., k : k + step].to(dtype).mT)
    return out.view(b, e, S, T)
