"""s_b of one table [V, D] that is both the embedding and the output head: P_b = onehot(ids_b)^T g_b + h_b^T x_b.

    ids [B, S], g [B, S, D]   input side: tokens and the gradient of their embeddings
    x [B, T, D], h [B, T, V]  output side: the head's input and the gradient of its logits

    s_b = ||onehot^T g||^2 + ||h^T x||^2 + 2 sum_{s,t} h[b, t, ids_bs] <g_bs, x_bt>

The cross term needs only the columns of h that occur as ids: a [T, S] gather times a [T, S] Gram. A kernel that forms
h_b^T x_b in registers needs none of this: the rows g_b are added to the product there.
"""

import torch
from torch import Tensor

from gnsfx.kernels import native
from gnsfx.kernels.accumulate import accumulate_dtype
from gnsfx.kernels.embedding_norm import embedding_sq_norm, is_skipped, without_skipped
from gnsfx.kernels.factors import same_leading
from gnsfx.kernels.ghost_norm import ghost_sq_norm, gram
from gnsfx.kernels.mm_norm import mm_sq_norm, product_sq_norm
from gnsfx.kernels.tiling import budget_for, example_chunk, head_method


def tied_sq_norm(ids: Tensor, g: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """Squared norms [B] of the sum of both gradients, clamped at zero; nothing of size B * V * D is formed."""
    dtype = accumulate_dtype(g.dtype, h.dtype)
    method = head_method(x.shape[1], x.shape[2], h.shape[2], x.device.type == "cpu" and x.dtype == torch.bfloat16)
    head = ghost_sq_norm if method == "ghost" else product_sq_norm
    sq_norms = head(x.unsqueeze(1), h.unsqueeze(1)).to(dtype)
    sq_norms += embedding_sq_norm(ids, g)
    return sq_norms.add_(tied_cross(ids, g, x, h), alpha=2).clamp_(min=0)


def tied_mm_sq_norm(ids: Tensor, g: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The table's gradient sum_b P_b [V, D], in the dtype of ``x`` and with both sides in it, and squared norms [B].

    ``g``, ``x`` and ``h`` have one dtype. Ids may be SKIPPED. Raises IndexError for one that is no row of the table.
    """
    same_leading(2, ids, g)
    same_leading(1, g, x)
    found = native.products(h.unsqueeze(1), x.unsqueeze(1), added=(ids, g))
    if found is not None:
        return found[0].squeeze(0), found[1]
    grad, sq_norms = mm_sq_norm(h.unsqueeze(1), x.unsqueeze(1))
    rows, index = without_skipped(ids, g).to(sq_norms.dtype), ids.masked_fill(is_skipped(ids), 0)
    grad = grad.squeeze(0).to(sq_norms.dtype).index_add_(0, index.flatten(), rows.flatten(0, 1))
    sq_norms += embedding_sq_norm(ids, g)
    return grad.to(x.dtype), sq_norms.add_(tied_cross(ids, g, x, h), alpha=2).clamp_(min=0)


def tied_cross(ids: Tensor, g: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """<onehot^T g, h^T x> [B], over blocks of examples and of the head's positions."""
    (B, S), T = ids.shape, x.shape[1]
    same_leading(2, ids, g)
    same_leading(2, x, h)
    same_leading(1, g, x)
    dtype = accumulate_dtype(g.dtype, h.dtype)
    # fp16 has too little range for what autocast keeps in fp32
    multiplied = dtype if x.dtype == torch.float16 and g.dtype != x.dtype else x.dtype
    budget = budget_for(g.device.type)
    positions = example_chunk(T, S, dtype.itemsize, budget)
    examples = example_chunk(B, positions * S, dtype.itemsize, budget)
    cross = g.new_zeros(B, dtype=dtype)
    for b0 in range(0, B, examples):
        b = slice(b0, b0 + examples)
        rows = without_skipped(ids[b], g[b])
        valid = ids[b].masked_fill(is_skipped(ids[b]), 0)  # any other id that is no row is an error of gather
        for t0 in range(0, T, positions):
            t = slice(t0, t0 + positions)
            index = valid.unsqueeze(1).expand(-1, min(positions, T - t0), -1).long()
            picked = h[b, t].gather(2, index).to(dtype)
            inner = gram(x[b, None, t].to(multiplied), rows.unsqueeze(1).to(multiplied)).squeeze(1)
            cross[b].add_(picked.mul_(inner).sum((1, 2)))
    return cross
