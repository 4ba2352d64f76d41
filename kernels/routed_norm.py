"""Contractions over rows whose example is data: s_b = sum_e ||sum_{i in e, ids_i = b} x_i^T g_i||^2.

    x [E, N, I], g [E, N, O]                 E independent contractions over N rows each
    x [N, I], g [N, O], offsets [E]          grouped: rows offsets[e - 1] .. offsets[e] belong to contraction e

The rows of one example and one contraction are brought together by a sort, then multiplied as one block: nothing is
computed that the gradient itself does not need, and one [I, O] product exists at a time. For norms alone on a CPU with
a C++ compiler see ``native/routed.cpp``.
"""

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gnsfx.kernels import native
from gnsfx.kernels.accumulate import accumulate_dtype, square_sums

SHUT = -5e3
"""Scores that are lower than others by so much have an attention weight of exactly zero."""


def example_ids(
    rows: Tensor, column: int | None, takes: Sequence[Tensor], inner: int, total: int, examples: int
) -> Tensor:
    """The example of each row [N]: ``rows[takes[0]].. % total // inner % examples``.

    With a ``column``, ``rows`` is a mask: the coordinates along that dimension of its nonzero entries. Column -1: ``rows``
    are the positions where documents begin and end.
    """
    if column == -1:
        found = torch.arange(rows.shape[0] - 1, device=rows.device).repeat_interleave(rows.diff())
    else:
        found = rows.flatten() if column is None else rows.nonzero()[:, column]
    for take in takes:
        at = take.flatten()
        found = found[at.nonzero()[:, 0] if at.dtype == torch.bool else at.long()]
    return found.long().remainder(total).div(inner, rounding_mode="floor").remainder(examples)


def routed_sq_norm(x: Tensor, g: Tensor, offsets: Tensor | None, ids: Tensor, examples: int) -> Tensor:
    """Squared norms [B] for ids [E * N], or [N] where every contraction has the same rows."""
    if (found := _without_products(x, g, offsets, ids, examples)) is not None:
        return found
    sq_norms = torch.zeros(examples, dtype=accumulate_dtype(x.dtype), device=x.device)
    for _, b, product in _products(x, g, offsets, ids, examples):
        sq_norms[b] += square_sums(product.reshape(1, -1))[0]
    return sq_norms


_Routed = ctypes.c_int64 * 12
_NATIVE = {torch.float32: "routed_sq_norm_fp32", torch.bfloat16: "routed_sq_norm_bf16"}


def _without_products(x: Tensor, g: Tensor, offsets: Tensor | None, ids: Tensor, examples: int) -> Tensor | None:
    """By the C++ kernel, where there is one."""
    dtype = x.dtype
    if not (x.is_cpu and g.dtype == dtype and dtype in _NATIVE and x.numel() and g.numel()):
        return None
    kernel = native.function("routed.cpp", _NATIVE[dtype], dtype)
    if kernel is None:
        return None
    x, g = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, g))
    ids = ids.contiguous()
    if offsets is None:
        (E, N), at, address = x.shape[:2], (x.stride(0), x.stride(1), g.stride(0), g.stride(1)), 0
    else:
        offsets = offsets.long().contiguous()
        E, N, at, address = len(offsets), len(x), (0, x.stride(0), 0, g.stride(0)), offsets.data_ptr()
    assert len(ids) in ((N, E * N) if offsets is None else (N,)), "one id for each row"
    step = N if len(ids) > N else 0
    routed = _Routed(examples, E, N, x.shape[-1], g.shape[-1], *at, step, ids.data_ptr(), address)
    sq_norms = torch.empty(examples, dtype=torch.float32)
    addresses = ctypes.addressof(routed), x.data_ptr(), g.data_ptr(), None, sq_norms.data_ptr()
    kernel(*addresses, torch.get_num_threads())
    return sq_norms


def routed_product(x: Tensor, g: Tensor, offsets: Tensor | None, ids: Tensor, examples: int) -> Tensor:
    """The stack of all P_b [B, E, I, O], in the accumulate dtype."""
    E = x.shape[0] if offsets is None else offsets.shape[0]
    stack = x.new_zeros(examples, E, x.shape[-1], g.shape[-1], dtype=accumulate_dtype(x.dtype))
    for e, b, product in _products(x, g, offsets, ids, examples):
        stack[b, e] = product
    return stack


def _products(
    x: Tensor, g: Tensor, offsets: Tensor | None, ids: Tensor, examples: int
) -> Iterator[tuple[int, int, Tensor]]:
    """(contraction, example, x_i^T g_i summed over its rows) for every pair that has rows."""
    if offsets is None:
        E, N = x.shape[:2]
        group = torch.arange(E, device=x.device).repeat_interleave(N)
        x, g, ids = x.flatten(0, 1), g.flatten(0, 1), ids.repeat(E * N // max(ids.shape[0], 1))
    else:
        E, position = offsets.shape[0], torch.arange(x.shape[0], device=x.device)
        group = torch.searchsorted(offsets.long(), position, right=True)
        x, g, ids, group = x[group < E], g[group < E], ids[group < E], group[group < E]
    key = group * examples + ids
    order, dtype = key.argsort(), accumulate_dtype(x.dtype)
    counts = torch.bincount(key, minlength=E * examples).tolist()
    parts = zip(x[order].to(dtype).split(counts), g[order].to(dtype).split(counts), strict=True)
    for pair, (x_b, g_b) in enumerate(parts):
        if len(x_b):
            yield *divmod(pair, examples), x_b.t() @ g_b


def routed_tied_sq_norm(
    x: Sequence[Tensor],
    g: Sequence[Tensor],
    at: Sequence[Tensor],
    values: Sequence[Tensor],
    table: int,
    ids: Tensor,
    examples: int,
) -> Tensor:
    """Squared norms [B] of P_b = sum_k x_kb^T g_kb + sum_k onehot(at_kb)^T values_kb, of shape [table, O].

    x [N, table], g [N, O], at [N], values [N, O] for the same N rows; without x nothing of size table * O exists, else one.
    """
    dtype = accumulate_dtype(*(t.dtype for t in (*x, *g, *values)))
    first = (*g, *values)[0]
    sq_norms = torch.zeros(examples, dtype=dtype, device=first.device)
    order = ids.argsort()
    counts = torch.bincount(ids, minlength=examples).tolist()
    for b, rows in enumerate(order.split(counts)):
        if not len(rows):
            continue
        slots = [a[rows].long() for a in at]
        if not x:
            keys, inverse = torch.cat(slots).unique(return_inverse=True)
            table, slots = len(keys), inverse.split([len(rows)] * len(at))
        total = torch.zeros(table, first.shape[1], dtype=dtype, device=first.device)
        for a, c in zip(x, g, strict=True):
            total.addmm_(a[rows].to(dtype).t(), c[rows].to(dtype))
        for slot, value in zip(slots, values, strict=True):
            total.index_add_(0, slot, value[rows].to(dtype))
        sq_norms[b] = square_sums(total.reshape(1, -1))[0]
    return sq_norms


def sum_by_example(values: Tensor, dims: Sequence[int], ids: Tensor, examples: int) -> Tensor:
    """Sum over ``dims``, whose entries in row-major order belong to the examples ``ids``: [B, *other sizes]."""
    rest = [d for d in range(values.dim()) if d not in dims]
    rows = values.permute(*dims, *rest).flatten(0, len(dims) - 1)
    dtype = values.dtype if values.is_complex() else accumulate_dtype(values.dtype)
    return rows.new_zeros(examples, *rows.shape[1:], dtype=dtype).index_add_(0, ids, rows.to(dtype))


def mask_by_example(values: Tensor, dims: Sequence[int], ids: Tensor, examples: int) -> Tensor:
    """[B, *values.shape]: ``values`` with the rows of all other examples set to zero."""
    rest = [d for d in range(values.dim()) if d not in dims]
    others = ids != torch.arange(examples, device=ids.device).unsqueeze(1)
    others = others.view(examples, *[values.shape[d] for d in dims], *[1] * len(rest))
    places = [1 + [*dims, *rest].index(d) for d in range(values.dim())]
    return values.unsqueeze(0).masked_fill(others.permute(0, *places), 0)


def crosses(
    values: Tensor, rows: Sequence[int], columns: Sequence[int], mask: bool, ids: Tensor, examples: int
) -> Tensor:
    """Whether an entry whose row and column belong to different examples is not zero, or as a ``mask`` not shut (0-d bool)."""
    if mask and values.dtype != torch.bool:  # a row that is shut everywhere is open to all alike
        opened = values > values.amax(-1, keepdim=True) + SHUT
    else:
        opened = values != 0
    others = _spread(ids, rows, values.shape) != _spread(ids, columns, values.shape)
    return (opened & others).any()


def _spread(ids: Tensor, dims: Sequence[int], shape: Sequence[int]) -> Tensor:
    """ids, counted row-major along ``dims``, with size 1 along all other dimensions of ``shape``."""
    ordered = sorted(dims)
    sizes = [shape[d] if d in ordered else 1 for d in range(len(shape))]
    return ids.view([shape[d] for d in dims]).permute([list(dims).index(d) for d in ordered]).view(sizes)


def misnumbered(rows: Tensor, positions: int, column: int | None) -> Tensor:
    """Whether document ids lie outside of -1..positions-1, or boundaries do not run from 0 to ``positions`` (0-d bool)."""
    if column == -1:
        return (rows[0] != 0) | (rows[-1] != positions) | (rows.diff() < 0).any()
    return ((rows < -1) | (rows >= positions)).any()


def count_ids(rows: Tensor) -> Tensor:
    """How many different ids there are that are not padding (0-d fp32)."""
    return (rows.unique() >= 0).sum().float()
