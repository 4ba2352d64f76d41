"""Each configuration of our matrix and lookup kernels, held against fp64 on small inputs before its numbers are used.

The inputs are more than one tile in every direction, no multiple of one, and laid out as those that are waiting. With terms
x y added up in fp32, n at a time, a sum is off by n 2^-23 sum |x y| at most (tensor cores truncate), and a square of it
by twice that times the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gnsfx.kernels import gpu
from gnsfx.kernels.embedding_norm import SKIPPED, is_skipped
from gnsfx.kernels.triton import plan

_UNIT = 2.0**-23
_EXAMPLES = 3


def product_is_right(tile: int, factors: Sequence[Tensor]) -> bool:
    """Whether ``mm_norm_parts`` may use its kernel with this tile, for factors [B, T, I], [B, T, O] like these."""
    device, dtype, orders = _kind(factors)
    t = plan.TILES[tile]

    def check() -> bool:
        from gnsfx.kernels.triton import mm_norm

        x, g = _made([(2 * t.t + 5, t.i + 48), (2 * t.t + 5, t.o + 80)], orders, dtype, device)
        products, magnitudes = _products(x, g)
        grad, sizes = products.sum(0), magnitudes.sum(0)
        terms = x.shape[0] * x.shape[1]
        good = True
        for processors in (1, gpu.multiprocessors(device)):  # examples in one run, and each in its own
            if t == plan.REDUCE:
                found, parts = mm_norm.product_norms_reduced(x, g, processors)
            else:
                found, parts = mm_norm.product_norms(x, g, processors, t)
            near = torch.finfo(dtype).eps / 2 * grad.abs() + 2 * terms * _UNIT * sizes
            good &= bool(((found.double() - grad).abs() <= near).all())
            good &= _same(parts, products, magnitudes, x.shape[1])
        return good

    return gpu.trusted(("mm_norm", f"{t.i}x{t.o}", *_in_words(dtype, orders)), device, check)


def gram_is_right(tile: int, factors: Sequence[Tensor]) -> bool:
    """Whether ``gram_norm_parts`` may use its kernel with this tile, for x and then each g like these."""
    device, dtype, orders = _kind(factors)
    t = plan.GRAMS[tile]

    def check() -> bool:
        from gnsfx.kernels.triton import mm_norm

        x, *g = _made([(2 * t.t + 5, t.k + 16 * (2 + i)) for i in range(len(factors))], orders, dtype, device)
        found = mm_norm.gram_norms(x, g, t)
        left = x.double() @ x.double().mT, x.double().abs() @ x.double().abs().mT
        good = True
        for each, parts in zip(g, found, strict=True):
            right = each.double() @ each.double().mT, each.double().abs() @ each.double().abs().mT
            truth = (left[0] * right[0]).sum((1, 2))
            near = 2 * (x.shape[2] + each.shape[2] + x.shape[1]) * _UNIT * (left[1] * right[1]).sum((1, 2))
            good &= bool(((parts.sum(0).double() - truth).abs() <= near).all())
        return good

    return gpu.trusted(("gram_norm", f"{t.t}x{t.k}", *_in_words(dtype, orders)), device, check)


def lookup_is_right(ids: Tensor, g: Tensor) -> bool:
    """Whether ``embedding_norm_parts`` may use its kernel for ids [B, T] and rows [B, T, D] of these dtypes."""
    device = g.device

    def check() -> bool:
        from gnsfx.kernels.triton import embedding_norm

        T, D = 2 * plan.PIECE + 5, plan.LOOKUP_COLUMNS + 48
        (rows,) = _made([(T, D)], (False,), g.dtype, device)
        at = torch.arange(T, device=device)
        chosen = torch.stack([at % 7, at % 2, at * 0 + 3]).to(ids.dtype)
        if ids.dtype == torch.int64:
            chosen[0, ::5] = SKIPPED
        onehot = (chosen.unsqueeze(2) == torch.arange(7, device=device)).double()
        products, magnitudes = _products(onehot, rows)
        rows[is_skipped(chosen)] = float("nan")
        return _same(embedding_norm.embedding_norms(chosen, rows), products, magnitudes, T)

    return gpu.trusted(("embedding_norm", *_in_words(ids.dtype, ()), *_in_words(g.dtype, ())), device, check)


def _kind(factors: Sequence[Tensor]) -> tuple[torch.device, torch.dtype, tuple[bool, ...]]:
    """Device, dtype, and for each factor [B, T, K] whether positions come before examples in memory."""
    orders = tuple(min(t.shape[:2]) > 1 and t.stride(0) < t.stride(1) for t in factors)
    return factors[0].device, factors[0].dtype, orders


def _in_words(dtype: torch.dtype, orders: Sequence[bool]) -> list[str]:
    """bfloat16, and for each factor which of examples and positions is the outer dimension in memory."""
    return [str(dtype).removeprefix("torch."), *("TB" if positions_first else "BT" for positions_first in orders)]


def _made(
    sizes: Sequence[tuple[int, int]], orders: Sequence[bool], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Random factors [B, T, K], the same in every run: drawn on the CPU, so that no generator of a device moves on."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for (T, K), positions_first in zip(sizes, orders, strict=True):
        shape = (T, _EXAMPLES, K) if positions_first else (_EXAMPLES, T, K)
        values = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
        made.append(values.transpose(0, 1) if positions_first else values)
    return made


def _products(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """x_b^T g_b [B, I, O] in fp64, and the same of absolute values."""
    x, g = x.double(), g.double()
    return x.mT @ g, x.abs().mT @ g.abs()


def _same(parts: Tensor, products: Tensor, magnitudes: Tensor, terms: int) -> bool:
    """Whether parts [k, B] add up to the squared norms of products that were sums of so many terms."""
    truth = products.square().sum((1, 2))
    # and the squares themselves are added in trees, of fewer than 2^10 in a row
    near = 4 * terms * _UNIT * (products.abs() * magnitudes).sum((1, 2)) + 2**10 * _UNIT * truth
    return bool(((parts.sum(0).double() - truth).abs() <= near).all())
