"""s_b of one table [V, D] that is both the embedding and the output head: P_b = onehot(ids_b)^T g_b + h_b^T x_b.

    ids [B, S], g [B, S, D]   input side: tokens and the gradient of their embeddings
    x [B, T, D], h [B, T, V]  output side: the head's input and the gradient of its logits

    s_b = ||onehot^T g||^2 + ||h^T x||^2 + 2 sum_{s,t} h[b, t, ids_bs] <g_bs, x_bt>

The cross term needs only the columns of h that occur as ids: a [T, S] gather times a [T, S] Gram.
"""

import torch
from torch import Tensor

from gnsfx.kernels.accumulate import accumulate_dtype
from gnsfx.kernels.embedding_norm import embedding_sq_norm
from gnsfx.kernels.ghost_norm import ghost_sq_norm, gram
from gnsfx.kernels.mm_norm import product_sq_norm
from gnsfx.kernels.tiling import budget_for, example_chunk, head_method


def tied_sq_norm(ids: Tensor, g: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """Squared norms [B] of the sum of both gradients, clamped at zero; nothing of size B * V * D is formed."""
    dtype = accumulate_dtype(g.dtype, h.dtype)
    method = head_method(x.shape[1], x.shape[2], h.shape[2], x.device.type == "cpu" and x.dtype == torch.bfloat16)
    head = ghost_sq_norm if method == "ghost" else product_sq_norm
    sq_norms = head(x.unsqueeze(1), h.unsqueeze(1)).to(dtype)
    sq_norms += embedding_sq_norm(ids, g)
    return sq_norms.add_(tied_cross(ids, g, x, h), alpha=2).clamp_(min=0)


def tied_cross(ids: Tensor, g: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """<onehot^T g, h^T x> [B], over blocks of examples and of the head's positions."""
    (B, S), T = ids.shape, x.shape[1]
    dtype = accumulate_dtype(g.dtype, h.dtype)
    budget = budget_for(g.device.type)
    positions = example_chunk(T, S, dtype.itemsize, budget)
    examples = example_chunk(B, positions * S, dtype.itemsize, budget)
    cross = g.new_zeros(B, dtype=dtype)
    for b0 in range(0, B, examples):
        b = slice(b0, b0 + examples)
        for t0 in range(0, T, positions):
            t = slice(t0, t0 + positions)
            index = ids[b].unsqueeze(1).expand(-1, min(positions, T - t0), -1).long()
            picked = h[b, t].gather(2, index).to(dtype)
            inner = gram(x[b, None, t], g[b, None].to(x.dtype)).squeeze(1)
            cross[b].add_(picked.mul_(inner).sum((1, 2)))
    return cross
