"""s_b = sum over distinct ids v of || sum_{t: ids_bt = v} g_bt ||^2: the norm of an embedding's per-example gradient.

    ids [B, T], g [B, T, D]  ->  sq_norms [B]

Rows of one example that share an id are summed into one segment; there are at most B * T segments, so nothing has the
size of the table. On a CPU with a C++ compiler every row is read once, see ``native/embedding.cpp``.
"""

import ctypes

import torch
from torch import Tensor

from gnsfx.kernels import native
from gnsfx.kernels.accumulate import accumulate_dtype, square_sums
from gnsfx.kernels.factors import same_leading
from gnsfx.kernels.tiling import budget_for, example_chunk

SKIPPED = -(1 << 62)
"""The id of positions that give no gradient (padding), whatever their row of g holds; no table has so many rows."""

_Rows = ctypes.c_int64 * 8


def embedding_sq_norm(ids: Tensor, g: Tensor) -> Tensor:
    """Squared norms [B]. Ids may be any integers; positions with ``SKIPPED`` count as zeros."""
    same_leading(2, ids, g)
    if (found := _in_one_pass(ids, g)) is not None:
        return found
    B, T = ids.shape
    dtype = accumulate_dtype(g.dtype)
    sq_norms = torch.zeros(B, dtype=dtype, device=g.device)
    chunk = example_chunk(B, T * g.shape[2], dtype.itemsize, 2 * budget_for(g.device.type))
    for start in range(0, B if T else 0, chunk):
        examples = slice(start, start + chunk)
        rows = without_skipped(ids[examples], g[examples])
        _segment_sq_norms(ids[examples], rows.to(dtype), sq_norms[examples])
    return sq_norms


def is_skipped(ids: Tensor) -> Tensor:
    """Where ids are SKIPPED. In 32 bits the comparison would be with zero."""
    return ids.long() == SKIPPED


def without_skipped(ids: Tensor, g: Tensor) -> Tensor:
    """g [b, T, D] with zeros in the rows that are skipped."""
    skipped = is_skipped(ids)
    if skipped.is_cpu and not skipped.any():
        return g
    return g.masked_fill(skipped.unsqueeze(2), 0)


def _in_one_pass(ids: Tensor, g: Tensor) -> Tensor | None:
    """By the C++ kernel, where there is one."""
    if not (ids.is_cpu and g.is_cpu and g.numel()):
        return None
    kernel = native.function("embedding.cpp", "embedding_sq_norm", g.dtype)
    if kernel is None:
        return None
    ids = ids.long()
    sq_norms = g.new_empty(g.shape[0], dtype=accumulate_dtype(g.dtype))
    rows = _Rows(*g.shape, *ids.stride(), *g.stride())
    addresses = ctypes.addressof(rows), ids.data_ptr(), g.data_ptr(), None, sq_norms.data_ptr()
    kernel(*addresses, torch.get_num_threads())
    return sq_norms


def _segment_sq_norms(ids: Tensor, g: Tensor, out: Tensor) -> None:
    """out [b] += squared norms of the segments of each example; g [b, T, D] in the accumulate dtype."""
    b, T = ids.shape
    segment, example, segments = _segments(ids)
    g = g.reshape(b * T, -1)
    rows = g.new_zeros(segments, g.shape[1])
    # scatter_add_ with an expanded index has a parallel row kernel on the CPU; index_add_ runs row by row.
    rows.scatter_add_(0, segment.unsqueeze(1).expand_as(g), g)
    out.index_add_(0, example, square_sums(rows))


def _segments(ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """Number the distinct (example, id) pairs: segment of each position [b*T], example of each segment, their count.

    Sorting each example's own ids needs no composite key, so no id is too large or too negative.
    """
    b, T = ids.shape
    ordered, position = ids.sort(dim=1)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[:, 1:], ordered[:, :-1], out=starts[:, 1:])
    rank = starts.flatten().cumsum(0).sub_(1).view(b, T)
    segment = torch.empty_like(rank).scatter_(1, position, rank).flatten()
    # Reading the count back would stall a GPU; there the unused segments stay zero rows of example 0.
    segments = int(rank[-1, -1]) + 1 if ids.device.type == "cpu" else b * T
    owner = torch.arange(b, device=ids.device).unsqueeze(1).expand(b, T).flatten()
    return segment, rank.new_zeros(segments).scatter_(0, segment, owner), segments
