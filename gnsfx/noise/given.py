"""What the caller of ``noise.step()`` gives beside the gradients: loss scale, weights of the examples, tokens.

    weights w of n examples    ->    sum w, sum w^2, and how many of them are numbers that a weight can be
    passes over b_1, b_2, ...  ->    n = sum b, and sum 1/(A b)^2 b, for where no weights are given

What can be said without waiting for the device is checked at once; the rest is counted there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gnsfx import collector
from gnsfx.errors import OptionError

Weights = Tensor | Sequence[Tensor]
# Of weights in single precision that should add up to the tokens.
TOLERANCE = 1e-4
# Of this rank: the loss scale, examples that are known to the host, sums over the passes of A_r w b and of its square by b,
# sum w, sum w^2, tokens, the number of weights.
NUMBERS = ("scale", "n", "passes", "inverse", "w", "w_sq", "tokens", "counted")


def numbers_of(
    found: collector.Totals, weights: Weights | None, tokens: float | Tensor | None, alone: bool
) -> list[float | Tensor]:
    """The ``NUMBERS`` behind the loss scale."""
    sizes = [b for b in found.micro_batches if b != 0]
    known = [b for b in sizes if b is not None]
    all_known = len(known) == len(sizes)
    divisor = len(found.micro_batches) or 1
    inverse = sum(1 / b for b in known) / divisor**2 if all_known else 0.0
    passes = [sum(known), len(sizes) / divisor, inverse]
    _check_tokens(tokens)
    if weights is None:
        return [*passes, 0.0, 0.0, 0.0 if tokens is None else tokens, 0.0]
    each = [weights] if isinstance(weights, Tensor) else list(weights)
    flat = torch.cat([torch.as_tensor(w).detach().flatten() for w in each]) if each else torch.zeros(0)
    _check(flat, tokens, sum(known) if all_known else None, alone)
    if tokens is None:
        tokens = 0.0 if flat.is_floating_point() else flat.sum()
    flat = flat.to(_dtype(flat))
    valid = (flat >= 0) & flat.isfinite()
    return [*passes, flat.sum(), flat.square().sum(), tokens, valid.sum()]


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _check_tokens(tokens: float | Tensor | None) -> None:
    """What can be said of them without waiting for the device."""
    if isinstance(tokens, Tensor):
        if tokens.numel() != 1:
            raise OptionError(
                f"noise.step(tokens=...): expected one number, got a tensor of shape {list(tokens.shape)}. The tokens of single "
                "examples are their weights: noise.step(weights=...)."
            )
        if tokens.device.type != "cpu":
            return
    if tokens is not None and not 0 <= float(tokens) < math.inf:
        raise OptionError(f"noise.step(tokens={float(tokens)}): expected the number of tokens that are in the loss.")


def check_scale(scale: Any) -> None:
    number = scale if isinstance(scale, float | int) else math.nan
    if isinstance(scale, Tensor) and scale.numel() == 1:
        number = 1.0 if scale.device.type != "cpu" else float(scale)
    if not number > 0:
        raise OptionError(f"noise.step(loss_scale={scale!r}): expected one positive number, or a GradScaler.")


def _check(weights: Tensor, tokens: float | Tensor | None, examples: int | None, alone: bool) -> None:
    """What can be said of the weights without waiting for the device; the rest is counted there. One of several ranks may
    have nothing but padding."""
    if examples is not None and len(weights) != examples:
        raise OptionError(
            f"noise.step(weights=...) got {len(weights)} weights for {examples} examples. Give one weight per example, over "
            "all micro-batches of the step on this rank: a tensor, or a list with a tensor per micro-batch."
        )
    if weights.device.type != "cpu":
        return
    weights = weights.double()
    if not (weights >= 0).all() or not weights.sum().isfinite() or (alone and len(weights) and not weights.sum() > 0):
        raise OptionError(
            "noise.step(weights=...): expected weights that are not negative, not all zero, and neither NaN nor infinite."
        )
    if isinstance(tokens, Tensor) and tokens.device.type != "cpu":
        return
    if tokens is not None and abs(float(weights.sum()) - float(tokens)) > TOLERANCE * float(tokens):
        raise OptionError(
            f"noise.step(weights=..., tokens={float(tokens):g}): the weights add up to {float(weights.sum()):g}. Expected the "
            "number of tokens of each example that count in the loss; leave out tokens for weights of another kind."
        )
