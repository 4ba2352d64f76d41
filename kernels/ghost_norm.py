"""s_b = ||x_b^T g_b||_F^2 = <x_b x_b^T, g_b g_b^T>, from two T x T Gram matrices and without the [I, O] product.

    x [B, E, T, I], g [B, E, T, O]  ->  sq_norms [B]

Cheap when T is short. The sum cancels where the per-example gradient is much smaller than its factors, so Grams are
never rounded below fp32, and the result is clamped at zero.
"""

import torch
from torch import Tensor

from gnsfx.kernels.accumulate import accumulate_dtype
from gnsfx.kernels.tiling import budget_for, gram_tiles


def ghost_sq_norm(x: Tensor, g: Tensor) -> Tensor:
    """Squared norms [B] of the per-example products, in blocks of positions; only one half of the symmetric Grams."""
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
