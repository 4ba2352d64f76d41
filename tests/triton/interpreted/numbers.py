"""Random numbers, and how far from fp64 a kernel may be."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Of the last place. Results are rounded to nearest, but for bf16, which the interpreter truncates: half of these would do for the others."""
DTYPES = list(UNIT)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def expect(found: Tensor, truth: Tensor, unit: float = 2.0**-23, terms: int = 1, summands: float = 1e-30) -> None:
    """Within the rounding of a sum of ``terms`` numbers and of the result's dtype, relative to its largest entry, or to the largest
    of the ``summands`` where they cancel."""
    scale = truth.abs().max().clamp(min=summands)
    assert found.shape == truth.shape and torch.isfinite(found).all()
    assert (found.double() - truth).abs().max() / scale <= unit + 2.0**-23 * terms**0.5 * 4
