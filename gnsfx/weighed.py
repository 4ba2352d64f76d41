"""What each example adds to the gradient of the batch, where examples ran alone because the loss is inside the model.

grad = sum_b w_b g_b      g_b: gradient of the loss of example b alone; all w_b 1/B, or 1, or the least squares solution
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnsfx.errors import GnsError
from gnsfx.replay import PASS_LOSS

Grads = list[Tensor | None]
"""One entry per trainable parameter; None where no gradient reaches it."""


def weigh(alone: list[Grads], whole: Grads, dtype: torch.dtype) -> list[Grads]:
    """w_b g_b for gradients g_b of examples that ran alone, with sum_b w_b g_b = the gradient of the batch."""
    B = len(alone)
    columns = torch.stack([_flat(g, whole) for g in alone], 1)
    target = _flat(whole, whole)
    scale = float(target.norm()) or 1.0
    bound = 10 * torch.finfo(dtype).eps ** 0.5
    ones = torch.ones(B, dtype=columns.dtype)

    def residual(weights: Tensor) -> float:
        return float((columns @ weights - target).norm()) / scale

    candidates = [ones / B, ones]
    weights = min(candidates, key=residual)
    if not residual(weights) <= bound:
        solution = torch.linalg.lstsq(columns, target[:, None], driver="gelsd")
        weights = solution.solution[:, 0]
        if not residual(weights) <= bound:
            raise GnsError(
                "the loss is computed inside the model, and the gradient of the batch is no weighted sum of the gradients of its examples "
                f"run alone (relative residual {residual(weights):.1e}): examples interact, draw other random numbers, or the batch "
                f"dimension of an input is not the first. {PASS_LOSS}"
            )
        present = int((columns.norm(dim=0) > 0).sum())
        if int(solution.rank) < present:
            raise GnsError(
                "the loss is computed inside the model, and the gradients of its examples are linearly dependent, so their weights in the "
                f"loss cannot be told apart. {PASS_LOSS}"
            )
    return [[None if g is None else g * float(w) for g in grads] for grads, w in zip(alone, weights, strict=True)]


def _flat(grads: Grads, like: Grads) -> Tensor:
    parts = [(g if g is not None else torch.zeros_like(t)) for g, t in zip(grads, like, strict=True) if t is not None]
    return torch.cat([_real(p).reshape(-1).to("cpu", torch.float64) for p in parts])


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def square(grad: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if grad is None else _real(grad).to(torch.float64).square().sum().cpu()
