"""Backward of LayerNorm and RMSNorm with per-example norms of scale and shift.

    x, g [B, T, D]; mean (None: RMSNorm), rstd [B, T]  ->  dx [B, T, D], dgamma [D], dbeta [D], parts [ceil(D/64), B] of both norms

What a CUDA device runs is in :mod:`gnsfx.kernels.triton.norm_backward`; ``twin`` is its specification, and what runs elsewhere.
"""

import torch
from torch import Tensor

from gnsfx.kernels import gpu
from gnsfx.kernels.accumulate import accumulate_dtype
from gnsfx.kernels.triton import plan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def norm_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    shift: bool,
    positions_first: bool = False,
    residual: Tensor | None = None,
    g2: Tensor | None = None,
    g3: Tensor | None = None,
) -> Results:
    """dx in the dtype of ``x``, dgamma and dbeta in that of ``weight`` (of ``x`` without one), the parts in fp32 (fp64).

    Without ``shift`` dbeta and its parts are empty; the kernel has no RMSNorm with one. ``positions_first``: dx lies in
    memory as [T, B, D]. ``residual`` [B, T, D] is added to dx before that is rounded, and ``g2`` and ``g3`` to ``g``,
    unrounded.
    """
    given = (g, x, mean, rstd, weight, residual, g2, g3)
    if (shift and mean is None) or not _fits(*given) or not _trusted(given, shift):
        return twin(g, x, mean, rstd, weight, shift, positions_first, residual, g2, g3)
    from gnsfx.kernels.triton import norm_backward as kernel

    processors = gpu.multiprocessors(x.device)
    with torch.cuda.device(x.device):
        return kernel.norm_backward(g, x, mean, rstd, weight, shift, processors, positions_first, residual, g2, g3)


def twin(
    g: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    shift: bool,
    positions_first: bool = False,
    residual: Tensor | None = None,
    g2: Tensor | None = None,
    g3: Tensor | None = None,
) -> Results:
    """The same in PyTorch; the norms are the first of the parts, the others are zero."""
    dtype = accumulate_dtype(x.dtype)
    gs = sum((more.to(dtype) for more in (g2, g3) if more is not None), g.to(dtype))
    xs, scale = x.to(dtype), rstd.to(dtype).unsqueeze(2)
    xhat = (xs if mean is None else xs - mean.to(dtype).unsqueeze(2)) * scale
    wg = gs if weight is None else gs * weight.to(dtype)
    dx = wg - xhat * (wg * xhat).mean(2, keepdim=True)
    if mean is not None:
        dx = dx - wg.mean(2, keepdim=True)
    gamma, beta = (gs * xhat).sum(1), gs.sum(1)
    out = x.dtype if weight is None else weight.dtype
    norms = [torch.zeros(plan.row_parts(x.shape[2]), x.shape[0], dtype=dtype, device=x.device) for _ in range(2)]
    for parts, one in zip(norms, (gamma, beta), strict=True):
        parts[0] = one.square().sum(1)
    if not shift:
        beta, norms[1] = beta[:0, :0], norms[1][:0]
    dx = dx * scale if residual is None else dx * scale + residual
    laid = empty_as_laid(x, positions_first).copy_(dx)
    return laid, gamma.sum(0).to(out), beta.sum(0).to(out), norms[0], norms[1]


def empty_as_laid(x: Tensor, positions_first: bool) -> Tensor:
    """[B, T, D] like ``x``, in one piece as it is, or as [T, B, D]."""
    B, T, D = x.shape
    return x.new_empty(T, B, D).transpose(0, 1) if positions_first else x.new_empty(B, T, D)


def norm_takes(D: int, *values: Tensor) -> bool:
    """Whether the kernel takes rows of ``D`` numbers, and tensors of these dtypes."""
    return 0 < D <= plan.LARGEST_ROW and all(v.dtype in _DTYPES for v in values)


def sum_taken(D: int, rms: bool, x: Tensor, *gradients: Tensor) -> bool:
    """Whether the kernel takes these output gradients as a sum that it adds up itself."""
    each = max(g.element_size() for g in gradients)
    return len(gradients) <= plan.row_gradients(D, rms, x.element_size(), each)


def _fits(*tensors: Tensor | None) -> bool:
    g, x, mean, *_, g2, g3 = tensors
    assert g is not None and x is not None
    B, T, D = x.shape
    return (
        gpu.launches_on(x.device)
        and 0 < B * T < 2**30  # the kernel counts rows in 32 bits, and a run of them beyond the last
        and norm_takes(D, *(t for t in tensors if t is not None))
        and sum_taken(D, mean is None, x, g, *(t for t in (g2, g3) if t is not None))
    )


def _trusted(given: tuple[Tensor | None, ...], shift: bool) -> bool:
    x = given[1]
    assert x is not None
    B, T, D = x.shape
    regime = plan.cut_rows(B, T, D, gpu.multiprocessors(x.device)).regime
    dtypes = tuple(str(t.dtype).removeprefix("torch.") if t is not None else "-" for t in given)
    key = ("norm_backward", f"D={D}", ("chunk", "whole", "flat")[regime], *dtypes, "shift" if shift else "-")
    return gpu.trusted(key, x.device, lambda: agrees(given, shift, regime))


def agrees(like: tuple[Tensor | None, ...], shift: bool, regime: int) -> bool:
    """Whether the kernel gives what the twin does in fp64, on numbers of our own; ``like`` gives dtypes, device and width."""
    from gnsfx.kernels.triton import norm_backward as kernel

    _, x, mean, _, weight, residual, *more = like
    assert x is not None
    D = x.shape[2]
    B, T, processors = plan.row_regimes(D)[regime]
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, D), (B, T, D), (D,), (B, T, D), (B, T, D), (B, T, D))
    exact = [torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes]
    center = exact[1].mean(2) / 2
    scale = (exact[1].square().mean(2) + 1e-5).rsqrt()
    made = (exact[0], exact[1], None if mean is None else center, scale, None if weight is None else exact[2])
    made += tuple(m if t is not None else None for t, m in zip((residual, *more), exact[3:], strict=True))
    given = [m if m is None else m.to(x.device, t.dtype) for m, t in zip(made, like, strict=True)]  # type: ignore[union-attr]
    found = kernel.norm_backward(*given[:5], shift, processors, False, *given[5:])  # pyright: ignore[reportCallIssue]
    exactly = [m if m is None else m.cpu().double() for m in given]
    truth = twin(*exactly[:5], shift, False, *exactly[5:])  # pyright: ignore[reportCallIssue]
    pairs = [
        *zip(found[:3], truth[:3], strict=True),
        *((a.sum(0), b.sum(0)) for a, b in zip(found[3:], truth[3:], strict=True)),
    ]
    return all(_close(a.cpu(), b) for a, b in pairs)


def _close(found: Tensor, truth: Tensor) -> bool:
    """Within a few roundings of the result's dtype and of sums in fp32, relative to the largest entry."""
    if truth.numel() == 0:
        return found.numel() == 0
    unit = torch.finfo(found.dtype).eps + 256 * torch.finfo(torch.float32).eps
    return bool((found.double() - truth).abs().max() <= unit * truth.abs().max())
