"""One step as one vector: what the collectors, ``p.grad`` and the caller know, over all micro-batches and all ranks.

    rank r      q_r = sum over its examples of |c_b|^2,  n_r,  and of the weights  sum w, sum w^2
    all ranks   p.grad is the mean over W ranks, so c_b counts 1/W:   q = sum_r q_r / W^2,   n = sum_r n_r
    weights     1/W2 = (sum w)^2 / sum w^2                             given: the same scale on all ranks
                1/W2 = A^2 / sum_a 1/b_a                               A backward passes, each a mean over b_a examples

One all-reduce carries all of it. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gnsfx import collector, distributed
from gnsfx.errors import OptionError
from gnsfx.noise import estimators
from gnsfx.noise.preconditioned import Terms
from gnsfx.norms import squared_norms

Weights = Tensor | Sequence[Tensor]
# Of weights in single precision that should add up to the tokens.
_TOLERANCE = 1e-4


class Sums(NamedTuple):
    """One step over all micro-batches and ranks. Tensors on the device; rows over the P trainable parameters.

    sq_norm: q = sum over examples of |c_b|^2. grad_sq: |g|^2. examples: n, by parameter. refused, gap: positive where it
    could not be measured, and where it has a gradient that was not measured on some rank. effective: 1/W2 of the step, 0-d.
    tokens: 0-d, 0 where not given. usable: 0-d, 1 unless something is not finite. misweighted: 0-d, 1 where the weights
    cannot be those of the step. scaled: [3, P], q and |g|^2 in the metric of the optimizer, NaN where that is not known,
    and 1 where they are exact; None without an optimizer.
    """

    sq_norm: Tensor
    grad_sq: Tensor
    examples: Tensor
    refused: Tensor
    gap: Tensor
    effective: Tensor
    tokens: Tensor
    usable: Tensor
    misweighted: Tensor
    scaled: Tensor | None = None


def gather(
    found: collector.Totals,
    *,
    loss_scale: float | Tensor,
    weights: Weights | None,
    tokens: float | Tensor | None,
    reduction: str,
    group: Any,
    call: int,
    like: Tensor,
    scaled: tuple[Terms | None] | None = None,
) -> Sums:
    """The sums of the step that ends here, with the device and dtype of ``like``.

    Args:
        call: a number that is the same on all ranks.
        scaled: with an optimizer, what this rank knows of its metric, None being nothing.

    Raises:
        OptionError: as many weights as examples were not given, or they do not add up to ``tokens``.
        GnsError: the other ranks are not at the same step, or do not answer.
    """
    P, dtype = len(found.names), like.dtype
    rows = _rows(found, loss_scale, like, group)
    refused = rows[0] == -torch.inf  # what a compiled graph puts where it cannot measure
    finite = (rows[:2].isfinite() | refused).all()
    rows = torch.where(finite & ~refused, rows, 0)
    rows[3:] += refused.to(dtype)
    if scaled is not None:
        rows = torch.cat([rows, _scaled_rows(found, scaled[0], loss_scale, rows)])
    scalars = torch.cat([_scalars(found, weights, tokens, rows[2].amax()), (~finite).to(dtype)[None]])
    sums = torch.cat([rows.flatten(), scalars])
    ranks = 1
    if group is not None:
        ranks = group.size()
        sums = distributed.all_reduce(sums, group, "noise.step()", step=call)
    rows, (passes, inverse, w, w_sq, given, counted, broken) = sums[: -len(scalars)], sums[-len(scalars) :].unbind()
    rows, *others = rows.view(-1, P).split(5)
    rows[0] /= ranks**2
    n = rows[2].amax()
    by_weights = w.square() / torch.where(w_sq > 0, w_sq, 1)
    by_passes = estimators.effective_of_micro_batches(passes, inverse)
    equal = n if reduction == "sum" else torch.where(inverse > 0, by_passes, n)
    usable = (broken == 0).to(dtype)
    weighted = w_sq > 0
    off = (given > 0) & weighted & ((w - given).abs() > _TOLERANCE * given)
    off |= weighted & (counted != n)
    return Sums(
        *rows.unbind(),
        scaled=_known(others[0], ranks) if others else None,
        effective=torch.where(weighted, by_weights, equal),
        tokens=given,
        usable=usable,
        misweighted=off.to(dtype),
    )


def device_of(found: collector.Totals) -> torch.device:
    return found.values.device if found.values is not None else found.parameters[0].device


def is_idle(found: collector.Totals) -> bool:
    """Whether no backward pass ran on this rank, as far as can be told."""
    return not {*found.refusals} - {collector.NOT_COMPILED, collector.UNREACHED, collector.ZEROED}


def _rows(found: collector.Totals, loss_scale: float | Tensor, like: Tensor, group: Any) -> Tensor:
    """What this rank knows of every parameter, [5, P]: q, its share of |g|^2, n, refused, gap."""
    device = like.device
    rows = like.new_zeros(5, len(found.names))
    at = tuple(i for i, p in enumerate(found.parameters) if p.grad is not None)
    if at:
        rows[1].index_copy_(0, collector.index(at, device), grad_sq_shares(found.parameters, group).to(rows))
    measured = tuple(i for i, reason in enumerate(found.refusals) if reason is None)
    if found.values is not None:
        rows[::2][:2].index_copy_(1, collector.index(measured, device), found.values.to(rows))
    rows[0] = rows[0] / loss_scale / loss_scale
    gaps = tuple(i for i in at if found.refusals[i] is not None)
    if gaps:
        rows[4].index_fill_(0, collector.index(gaps, device), 1)
    # A parameter that no backward pass of this rank reached has contributions of zero here, if others measured it.
    refused = tuple(i for i in gaps if found.refusals[i] != collector.UNREACHED)
    if refused:
        rows[3].index_fill_(0, collector.index(refused, device), 1)
    return rows


def _scaled_rows(found: collector.Totals, scaled: Terms | None, loss_scale: float | Tensor, like: Tensor) -> Tensor:
    """q and |g|^2 in the metric of the optimizer, whether this rank knows them, and whether they are exact, [4, P]."""
    rows = like.new_zeros(4, like.shape[1])
    if scaled is None:
        return rows
    q, grad_sq, exact = (part.to(like) for part in scaled)
    known = q.isfinite() & grad_sq.isfinite()
    here = torch.stack([q / loss_scale / loss_scale, grad_sq, torch.ones_like(q), exact])
    measured = tuple(i for i, reason in enumerate(found.refusals) if reason is None)
    return rows.index_copy_(1, collector.index(measured, like.device), torch.where(known, here, 0))


def _known(rows: Tensor, ranks: int) -> Tensor:
    """[3, P]; p.grad, and so |g|^2 in any metric, is the same on all ranks that know it."""
    q, grad_sq, knowing, exact = rows
    known = torch.where(knowing > 0, knowing, torch.nan)
    return torch.stack([q / ranks**2 + 0 * known, grad_sq / known, exact / known])


def grad_sq_shares(parameters: Sequence[torch.nn.Parameter], group: Any) -> Tensor:
    """This rank's part of |g|^2 of each parameter with a gradient, in float32 at least, without a kernel per parameter."""
    grads = [g for p in parameters if (g := p.grad) is not None]
    return squared_norms(grads) if group is None else distributed.grad_sq_shares(grads, group)


def _scalars(found: collector.Totals, weights: Weights | None, tokens: float | Tensor | None, like: Tensor) -> Tensor:
    """A, sum 1/b, sum w, sum w^2, tokens and the number of weights, of this rank."""
    sizes = [b for b in found.micro_batches if b != 0]
    known = [b for b in sizes if b is not None]
    passes = len(sizes), sum(1 / b for b in known) if len(known) == len(sizes) else 0.0
    if weights is None:
        given: Any = 0.0 if tokens is None else tokens
        parts = [*passes, 0.0, 0.0, given, 0.0]
    else:
        flat = torch.cat([w.detach().flatten() for w in ([weights] if isinstance(weights, Tensor) else weights)])
        _check(flat, tokens, sum(known) if len(known) == len(sizes) else None)
        if tokens is None:
            tokens = 0.0 if flat.is_floating_point() else flat.sum()
        flat = flat.to(like)
        parts = [*passes, flat.sum(), flat.square().sum(), tokens, float(len(flat))]
    numbers = torch.tensor([0.0 if isinstance(p, Tensor) else float(p) for p in parts], dtype=like.dtype)
    numbers = numbers.to(like.device, non_blocking=True)
    for i, part in enumerate(parts):
        if isinstance(part, Tensor):
            numbers[i] = part.detach().to(like)
    return numbers


def _check(weights: Tensor, tokens: float | Tensor | None, examples: int | None) -> None:
    """What can be said of the weights without waiting for the device; the rest is counted there."""
    if examples is not None and len(weights) != examples:
        raise OptionError(
            f"noise.step(weights=...) got {len(weights)} weights for {examples} examples. Give one weight per example, over "
            "all micro-batches of the step on this rank: a tensor, or a list with a tensor per micro-batch."
        )
    if weights.device.type != "cpu":
        return
    if not (weights >= 0).all() or not weights.sum() > 0:
        raise OptionError("noise.step(weights=...): expected weights that are not negative, and not all zero.")
    if isinstance(tokens, Tensor) and tokens.device.type != "cpu":
        return
    if tokens is not None and abs(float(weights.sum()) - float(tokens)) > _TOLERANCE * float(tokens):
        raise OptionError(
            f"noise.step(weights=..., tokens={float(tokens):g}): the weights add up to {float(weights.sum()):g}. Expected the "
            "number of tokens of each example that count in the loss; leave out tokens for weights of another kind."
        )
