"""The truth: per-example autograd. Nothing here knows how gnsfx works.

The contribution of example b is the gradient of what it adds to the training loss, ``weights[b] * losses[b]``, taken in
eager mode from one forward pass of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def per_example_sq_norms(model: nn.Module, losses: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Parameter name -> (B,) squared norms; ``losses`` (B,) with its autograd graph, ``weights`` 1/B by default."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    B = losses.shape[0]
    weights = torch.full_like(losses, 1 / B) if weights is None else weights
    rows = []
    for b in range(B):
        grads = torch.autograd.grad(losses[b] * weights[b], parameters, retain_graph=True, allow_unused=True)
        zero = losses.new_zeros(())
        rows.append([zero if g is None else _square(g) for g in grads])
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def elementwise_sq_sums(model: nn.Module, losses: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Parameter name -> tensor shaped like the parameter: the squares of each number's contributions, summed."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    weights = torch.full_like(losses, 1 / losses.shape[0]) if weights is None else weights
    sums = [torch.zeros_like(p) for p in parameters]
    for b in range(losses.shape[0]):
        grads = torch.autograd.grad(losses[b] * weights[b], parameters, retain_graph=True, allow_unused=True)
        sums = [s if g is None else s + g.square() for s, g in zip(sums, grads, strict=True)]
    return dict(zip(names, sums, strict=True))


def _square(grad: Tensor) -> Tensor:
    grad = grad.to_dense() if grad.is_sparse else grad
    return (torch.view_as_real(grad) if grad.is_complex() else grad).square().sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def run(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> Tensor:
    """Zero the gradients, call, and train on the mean of the losses it returns."""
    model.zero_grad(set_to_none=True)
    losses = call(model)
    losses.mean().backward()
    return losses


def tolerance(dtype: torch.dtype, terms: int = 4096) -> float:
    """Rounding of a sum of that many terms: eps * sqrt(terms), times two because a square doubles relative errors."""
    return 2 * torch.finfo(dtype).eps * terms**0.5


def names_beyond(found: dict[str, Tensor], truth: dict[str, Tensor], bound: float) -> list[str]:
    """Parameters whose norms are off by more than ``bound`` relative to their largest, with the error.

    A gradient that cancels to zero (a bias before a normalisation) is rounding alone, about ``bound`` of the model's
    largest gradient, so its square is compared with the square of that.
    """
    floor = bound * max((float(t.max()) for t in truth.values()), default=0.0) * bound
    off = []
    for name, expected in truth.items():
        error = float((found[name].to(expected.dtype) - expected).abs().max())
        if not error <= bound * float(expected.max()) + floor:
            off.append(f"{name}: {error:.2e} beside {float(expected.max()):.2e}")
    return off
