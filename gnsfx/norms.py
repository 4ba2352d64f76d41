"""|g|^2 of many gradients at once: in float32 at least, without a kernel per tensor on a GPU.

On CPU a fused norm adds a tensor up in a few long chains: in float32 it is low by 2e-5 for a million numbers and 5e-4 for
ten million, where |G|^2 = (|g|^2 - q) / (1 - W2) needs the difference of two numbers that are nearly the same. So

    long tensors      norms of pieces, and then their sum: near 1e-6 at most
    all others        their norms
    short tensors     side by side in one, in float64, then one sum each: an operation costs more than they do
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gnsfx._torch import flatten_dense_tensors

_SHORT = 1 << 10
_LONG = 1 << 16


class _Plan(NamedTuple):
    """Which tensors are short, their sizes and places, which are not, and whose piece each of theirs is."""

    short: tuple[int, ...]
    lengths: Tensor
    places: Tensor
    others: tuple[int, ...]
    owners: Tensor


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """[n], one number per tensor; float64 if any of them is. Complex numbers by their absolute values."""
    tensors = [t.coalesce().values() if t.layout is torch.sparse_coo else t for t in tensors]
    dtypes = {t.dtype for t in tensors}
    if any(dtype.is_complex for dtype in dtypes):
        tensors = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        dtypes = {t.dtype for t in tensors}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    if tensors[0].device.type != "cpu":
        return _norms(tensors, dtype, dtypes).square()
    plan = _plan(tuple([t.numel() for t in tensors]))
    found = torch.zeros(len(tensors), dtype=dtype)
    if plan.short:
        flat = flatten_dense_tensors([tensors[i] for i in plan.short]).to(torch.float64, copy=True).square_()
        found.index_copy_(
            0, plan.places, torch.segment_reduce(flat, "sum", lengths=plan.lengths, unsafe=True).to(dtype)
        )
    if plan.others:
        pieces: list[Tensor] = []
        for tensor in [tensors[i] for i in plan.others]:
            pieces += (tensor,) if tensor.numel() <= _LONG else tensor.reshape(-1).split(_LONG)
        found.index_add_(0, plan.owners, _norms(pieces, dtype, dtypes).square_())
    return found


def _norms(tensors: Sequence[Tensor], dtype: torch.dtype, dtypes: set[torch.dtype]) -> Tensor:
    wider = None if dtypes == {dtype} else dtype  # asking for what is there already takes time
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=wider))  # pyright: ignore[reportPrivateImportUsage]


@functools.lru_cache(maxsize=64)
def _plan(sizes: tuple[int, ...]) -> _Plan:
    short = tuple(i for i, size in enumerate(sizes) if size <= _SHORT)
    others = tuple(i for i, size in enumerate(sizes) if size > _SHORT)
    owners = [i for i in others for _ in range(-(-sizes[i] // _LONG))]
    lengths = torch.tensor([sizes[i] for i in short], dtype=torch.int64)
    return _Plan(short, lengths, torch.tensor(short), others, torch.tensor(owners))
