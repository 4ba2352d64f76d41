"""One step as one vector: what the collectors, ``p.grad`` and the caller know, over all micro-batches and all ranks.

    rank r      q_r = sum over its examples of |c_b|^2,  n_r,  and of the weights  sum w, sum w^2
    all ranks   p.grad is the mean over W ranks, so c_b counts 1/W:   q = sum_r q_r / W^2,   n = sum_r n_r
    weights     1/W2 = (sum w)^2 / sum w^2                             given: the same scale on all ranks
                w = 1 / (A_r b)                                        a mean over b examples, one of A_r passes of its rank

One all-reduce carries all of it. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gnsfx import collector, distributed
from gnsfx._torch_distributed import is_dtensor
from gnsfx.errors import OptionError
from gnsfx.noise import estimators
from gnsfx.noise.preconditioned import Terms
from gnsfx.norms import squared_norms

CALL = "noise.step()"
Weights = Tensor | Sequence[Tensor]
# Of weights in single precision that should add up to the tokens.
_TOLERANCE = 1e-4


class Sums(NamedTuple):
    """One step over all micro-batches and ranks. Tensors on the device; rows over the P trainable parameters.

    sq_norm: q = sum over examples of |c_b|^2. grad_sq: |g|^2. examples: those that reached it. refused, gap: positive where
    it could not be measured, and where it has a gradient that was not measured on some rank. n: examples of the step, 0-d.
    effective: 1/W2 of the step, 0-d.
    tokens: 0-d, 0 where not given. usable: 0-d, 1 unless something is not finite. misweighted: 0-d, 1 where the weights
    cannot be those of the step. left_over: 0-d, 1 where gradients held an earlier step when this one began. scaled: [3, P], q
    and |g|^2 in the metric of the optimizer, NaN where that is not known, and 1 where they are exact; None without one.
    """

    sq_norm: Tensor
    grad_sq: Tensor
    examples: Tensor
    refused: Tensor
    gap: Tensor
    n: Tensor
    effective: Tensor
    tokens: Tensor
    usable: Tensor
    misweighted: Tensor
    left_over: Tensor
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
        OptionError: as many weights as examples were not given, or they do not add up to ``tokens``; numbers that cannot be.
        GnsError: the other ranks are not at the same step, or do not answer.
    """
    P, dtype = len(found.names), like.dtype
    with distributed.telling_others(group, CALL, like.device):
        _check_scale(loss_scale)
        rows = _rows(found, loss_scale, like, group)
        refused = rows[0] == -torch.inf  # what a compiled graph puts where it cannot measure
        finite = (rows[:2].isfinite() | refused).all()
        rows = torch.where(finite & ~refused, rows, 0)
        rows[3:] += refused.to(dtype)
        if scaled is not None:
            rows = torch.cat([rows, _scaled_rows(found, scaled[0], loss_scale, rows)])
        scalars = _scalars(found, weights, tokens, rows[2].amax(), alone=group is None)
        scalars = torch.cat([scalars, _left_over(found, rows), (~finite).to(dtype)[None]])
        sums = torch.cat([rows.flatten(), scalars])
    ranks = 1
    if group is not None:
        ranks = group.size()
        sums = distributed.all_reduce(sums, group, CALL, step=call)
        lost = sums[-1].isnan()  # a rank had an error to raise
        sums = torch.where(lost, 0, sums)
        sums[-1] += lost
    rows, (n, passes, inverse, w, w_sq, given, counted, left, broken) = (
        sums[: -len(scalars)],
        sums[-len(scalars) :].unbind(),
    )
    rows, *others = rows.view(-1, P).split(5)
    rows[0] /= ranks**2
    by_weights = w.square() / torch.where(w_sq > 0, w_sq, 1)
    by_passes = estimators.effective_of_micro_batches(passes, inverse)
    equal = n if reduction == "sum" else torch.where(inverse > 0, by_passes, n)
    usable = (broken == 0).to(dtype)
    weighted = (counted > 0) | (w != 0)  # NaN is not 0
    given = torch.where(given.isfinite(), given.clamp(min=0), 0)  # on a device it is not looked at before
    off = (given > 0) & weighted & ((w - given).abs() > _TOLERANCE * given)
    off |= weighted & ((counted != n) | (w_sq == 0))
    return Sums(
        *rows.unbind(),
        n=n,
        scaled=_known(others[0], ranks) if others else None,
        effective=torch.where(off, 0, torch.where(weighted, by_weights, equal)),
        tokens=given,
        usable=usable,
        misweighted=off.to(dtype),
        left_over=(left > 0).to(dtype),
    )


def _left_over(found: collector.Totals, like: Tensor) -> Tensor:
    """How many graphs began the step with gradients that were not zeroed, [1]."""
    flags = [(size != 0).to(like) for size in found.left_over]
    return torch.stack(flags).sum(0, keepdim=True) if flags else like.new_zeros(1)


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
    if group is None and not any(map(is_dtensor, grads)):
        return squared_norms(grads)
    return distributed.grad_sq_shares(grads, group)


def _scalars(
    found: collector.Totals, weights: Weights | None, tokens: float | Tensor | None, most: Tensor, alone: bool
) -> Tensor:
    """n, sums over the passes of A_r w b and of its square by b, sum w, sum w^2, tokens and the number of weights, of this rank.
    ``most``: the examples of the parameter that most of them reached."""
    sizes, like = [b for b in found.micro_batches if b != 0], most
    known = [b for b in sizes if b is not None]
    all_known = len(known) == len(sizes)
    divisor = len(found.micro_batches) or 1
    passes = (
        most.clamp(min=sum(known)),
        len(sizes) / divisor,
        sum(1 / b for b in known) / divisor**2 if all_known else 0.0,
    )
    _check_tokens(tokens)
    if weights is None:
        given: Any = 0.0 if tokens is None else tokens
        parts = [*passes, 0.0, 0.0, given, 0.0]
    else:
        each = [weights] if isinstance(weights, Tensor) else list(weights)
        flat = torch.cat([torch.as_tensor(w).detach().flatten() for w in each]) if each else torch.zeros(0)
        _check(flat, tokens, sum(known) if all_known else None, alone)
        if tokens is None:
            tokens = 0.0 if flat.is_floating_point() else flat.sum()
        flat = flat.to(like.dtype)
        valid = (flat >= 0) & flat.isfinite()
        parts = [*passes, flat.sum(), flat.square().sum(), tokens, valid.sum()]
    # A copy of a CPU tensor to the device would wait for it; numbers go together, without.
    parts = [float(p) if isinstance(p, Tensor) and p.device.type == "cpu" else p for p in parts]
    numbers = torch.tensor([0.0 if isinstance(p, Tensor) else float(p) for p in parts], dtype=like.dtype)
    numbers = numbers.to(like.device, non_blocking=True)
    for i, part in enumerate(parts):
        if isinstance(part, Tensor):
            numbers[i] = part.detach().to(like)
    return numbers


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


def _check_scale(scale: Any) -> None:
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
    if tokens is not None and abs(float(weights.sum()) - float(tokens)) > _TOLERANCE * float(tokens):
        raise OptionError(
            f"noise.step(weights=..., tokens={float(tokens):g}): the weights add up to {float(weights.sum()):g}. Expected the "
            "number of tokens of each example that count in the loss; leave out tokens for weights of another kind."
        )
