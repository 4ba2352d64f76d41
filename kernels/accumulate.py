"""How every op accumulates: in fp64 for fp64 inputs, in fp32 for all others, and never in one long chain."""

import torch
from torch import Tensor

_CHAIN = 4096
_BLOCK = 1024


def accumulate_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which squares, and sums over examples, are taken for inputs of these dtypes."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def square_sums(rows: Tensor) -> Tensor:
    """rows [n, K], contiguous, in an accumulate dtype -> sums of squares [n].

    ``vector_norm`` needs one pass and no temporary, but adds a row up in a few long chains: at K = 600k its fp32 error
    is 1e-5. Norms of blocks, then their sum, cost the same time and keep it near 1e-7.
    """
    K = rows.shape[1]
    if K <= _CHAIN:
        return torch.linalg.vector_norm(rows, dim=1).square_()
    whole = K - K % _BLOCK
    sums = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, _BLOCK)), dim=2).square_().sum(1)
    if whole < K:
        sums.add_(torch.linalg.vector_norm(rows[:, whole:], dim=1).square_())
    return sums
