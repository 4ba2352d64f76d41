"""Steps as vectors: what the collectors, ``p.grad`` and the caller know, over all micro-batches and all ranks.

    rank r      q_r = sum over its examples of |c_b|^2,  n_r,  and of the weights  sum w, sum w^2
    all ranks   p.grad is the mean over W ranks, so c_b counts 1/W:   q = sum_r q_r / W^2,   n = sum_r n_r
    weights     1/W2 = (sum w)^2 / sum w^2                             given: the same scale on all ranks
                w = 1 / (A_r b)                                        a mean over b examples, one of A_r passes of its rank

At the step itself :func:`gather` puts the numbers side by side, as they come, into a :class:`Record`; :func:`total` makes sums of
many records at once, later. With several ranks each step is summed at once, by one all-reduce. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gnsfx import collector, distributed
from gnsfx._torch_distributed import is_dtensor
from gnsfx.noise import estimators
from gnsfx.noise.given import NUMBERS, TOLERANCE, Weights, check_scale, numbers_of
from gnsfx.noise.preconditioned import Terms
from gnsfx.norms import squared_norms

CALL = "noise.step()"


class Sums(NamedTuple):
    """K steps, each over all micro-batches and ranks. Tensors on the device.

    [K, P], of the P trainable parameters: sq_norm: q = sum over examples of |c_b|^2. grad_sq: |g|^2. examples: those that
    reached it. refused, gap: positive where it could not be measured, and where it has a gradient that was not measured on
    some rank.

    [K], of the steps: n: examples. effective: 1/W2. tokens: 0 where not given. usable: 1 unless something is not finite.
    misweighted: 1 where the weights cannot be those of the step. left_over: 1 where gradients held an earlier step when this
    one began.

    scaled: [K, 3, P], q and |g|^2 in the metric of the optimizer, NaN where that is not known, and 1 where they are exact;
    None without one.
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


class Kind(NamedTuple):
    """What the numbers of a record are; steps of one kind are summed up side by side.

    grads, measured, gaps, refused: positions of the parameters with a gradient, with norms, with a gradient and no norms,
    and of those the ones that some code of this rank used. tensors: which of the ``NUMBERS`` only the device knows. left: how
    many flags tell of gradients of an earlier step. scaled: whether the metric of the optimizer is there, None where it is
    not asked for. ranks: of which the record is the sum, 0 where it is what one process knows, as it came.
    """

    parameters: int
    grads: tuple[int, ...]
    measured: tuple[int, ...]
    gaps: tuple[int, ...]
    refused: tuple[int, ...]
    tensors: tuple[int, ...]
    left: int
    scaled: bool | None
    reduction: str
    ranks: int = 0


class Record(NamedTuple):
    """One step as it came: raw [L] on the device, with the ``NUMBERS`` that the host knows, and what all that is."""

    raw: Tensor
    numbers: tuple[float, ...]
    kind: Kind


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
) -> Record:
    """The step that ends here, for :func:`total`. A handful of device operations, but for several ranks.

    Args:
        call: a number that is the same on all ranks.
        like: with the device and dtype of sums.
        scaled: with an optimizer, what this rank knows of its metric, None being nothing.

    Raises:
        OptionError: as many weights as examples were not given, or they do not add up to ``tokens``; numbers that cannot be.
        GnsError: the other ranks are not at the same step, or do not answer.
    """
    with distributed.telling_others(group, CALL, like.device):
        check_scale(loss_scale)
        numbers = [loss_scale, *numbers_of(found, weights, tokens, alone=group is None)]
        record = _record(found, numbers, group, like, scaled, reduction)
        if group is None:
            return record
        sums = local_sums([record], like)[0]
    ranks = group.size()
    sums = distributed.all_reduce(sums, group, CALL, step=call)
    lost = sums[-1].isnan()  # a rank had an error to raise
    sums = torch.where(lost, 0, sums)
    sums[-1] += lost
    return Record(
        sums, (), Kind(len(found.names), (), (), (), (), (), 0, None if scaled is None else True, reduction, ranks)
    )


def _record(
    found: collector.Totals,
    numbers: Sequence[float | Tensor],
    group: Any,
    like: Tensor,
    scaled: tuple[Terms | None] | None,
    reduction: str,
) -> Record:
    P = len(found.names)
    at = tuple([i for i, p in enumerate(found.parameters) if p.grad is not None])
    measured = tuple([i for i, reason in enumerate(found.refusals) if reason is None])
    gaps = () if len(measured) == P else tuple(i for i in at if found.refusals[i] is not None)
    # A parameter that no backward pass of this rank reached has contributions of zero here, if others measured it.
    refused = tuple(i for i in gaps if found.refusals[i] != collector.UNREACHED)
    parts = [grad_sq_shares([found.parameters[i] for i in at], group)] if at else []
    if found.values is not None:
        parts.append(found.values.flatten())
    # A copy of a CPU tensor to the device would wait for it; numbers go together, without.
    numbers = [float(x) if isinstance(x, Tensor) and x.device.type == "cpu" else x for x in numbers]
    there = tuple(i for i, x in enumerate(numbers) if isinstance(x, Tensor))
    flags = [*(numbers[i] for i in there), *found.left_over]
    if flags:
        parts.append(torch.stack([torch.as_tensor(x).detach().to(like).reshape(()) for x in flags]))
    if scaled is not None and scaled[0] is not None:
        parts += [part.to(like) for part in scaled[0]]
    raw = torch.cat(parts) if parts else like.new_zeros(0)
    kind = Kind(
        P,
        at,
        measured if found.values is not None else (),
        gaps,
        refused,
        there,
        len(found.left_over),
        None if scaled is None else scaled[0] is not None,
        reduction,
    )
    return Record(raw, tuple(0.0 if isinstance(x, Tensor) else float(x) for x in numbers), kind)


def local_sums(records: Sequence[Record], like: Tensor) -> Tensor:
    """What this rank adds to the sums over ranks in each of K steps of one kind, [K, 5 P + 9], or [K, 9 P + 9] with the metric
    of an optimizer: q, its share of |g|^2, n, refused, gap of every parameter, then numbers of the step."""
    kind, K, device = records[0].kind, len(records), like.device
    raw = torch.stack([record.raw for record in records]).to(like)
    G, M, T = len(kind.grads), len(kind.measured), len(kind.tensors)
    grad_sq, q, n, there, left, scaled = raw.split([G, M, M, T, kind.left, raw.shape[1] - G - 2 * M - T - kind.left], 1)
    numbers = torch.tensor([record.numbers for record in records], dtype=like.dtype).to(device, non_blocking=True)
    if T:
        numbers = numbers.index_copy(1, collector.index(kind.tensors, device), there)
    scale = numbers[:, :1]
    measured = collector.index(kind.measured, device) if M else None
    rows = like.new_zeros(K, 5, kind.parameters)
    if measured is not None:
        rows[:, 0].index_copy_(1, measured, q / scale / scale)
        rows[:, 2].index_copy_(1, measured, n)
    for row, positions, values in ((1, kind.grads, grad_sq), (3, kind.refused, 1.0), (4, kind.gaps, 1.0)):
        if positions:
            place = collector.index(positions, device)
            rows[:, row].index_copy_(1, place, values) if isinstance(values, Tensor) else rows[:, row].index_fill_(
                1, place, values
            )
    refused = rows[:, 0] == -torch.inf  # what a compiled graph puts where it cannot measure
    finite = (rows[:, :2].isfinite() | refused[:, None]).flatten(1).all(1)
    rows = torch.where((finite[:, None] & ~refused)[:, None], rows, 0)
    rows[:, 3:] += refused[:, None]
    if kind.scaled is not None:
        rows = torch.cat([rows, _scaled_rows(scaled, measured, scale, rows[:, :4])], 1)
    _, known, *others = numbers.unbind(1)
    n = torch.maximum(rows[:, 2].amax(1), known)
    scalars = [n, *others, (left != 0).sum(1).to(like), (~finite).to(like)]
    return torch.cat([rows.flatten(1), torch.stack(scalars, 1)], 1)


def total(records: Sequence[Record], like: Tensor) -> Sums:
    """The sums of K steps of one kind, with the device and dtype of ``like``. Launches device work only."""
    kind = records[0].kind
    ranks = kind.ranks or 1
    sums = torch.stack([r.raw for r in records]).to(like) if kind.ranks else local_sums(records, like)
    rows, scalars = sums[:, : -len(NUMBERS) - 1], sums[:, -len(NUMBERS) - 1 :]
    n, passes, inverse, w, w_sq, given, counted, left, broken = scalars.unbind(1)
    rows, others = rows.view(len(records), -1, kind.parameters).split([5, 0 if kind.scaled is None else 4], 1)
    q, *others_of_it = rows.unbind(1)
    by_weights = w.square() / torch.where(w_sq > 0, w_sq, 1)
    by_passes = estimators.effective_of_micro_batches(passes, inverse)
    equal = n if kind.reduction == "sum" else torch.where(inverse > 0, by_passes, n)
    weighted = (counted > 0) | (w != 0)  # NaN is not 0
    given = torch.where(given.isfinite(), given.clamp(min=0), 0)  # on a device it is not looked at before
    off = (given > 0) & weighted & ((w - given).abs() > TOLERANCE * given)
    off |= weighted & ((counted != n) | (w_sq == 0))
    return Sums(
        q / ranks**2,
        *others_of_it,
        n=n,
        scaled=None if kind.scaled is None else _known(others, ranks),
        effective=torch.where(off, 0, torch.where(weighted, by_weights, equal)),
        tokens=given,
        usable=(broken == 0).to(like),
        misweighted=off.to(like),
        left_over=(left > 0).to(like),
    )


def device_of(found: collector.Totals) -> torch.device:
    return found.values.device if found.values is not None else found.parameters[0].device


def is_idle(found: collector.Totals) -> bool:
    """Whether no backward pass ran on this rank, as far as can be told."""
    return not {*found.refusals} - {collector.NOT_COMPILED, collector.UNREACHED, collector.ZEROED}


def _scaled_rows(scaled: Tensor, measured: Tensor | None, scale: Tensor, like: Tensor) -> Tensor:
    """q and |g|^2 in the metric of the optimizer, whether this rank knows them, and whether they are exact, [K, 4, P]."""
    rows = torch.zeros_like(like)
    if measured is None or not scaled.shape[1]:
        return rows
    q, grad_sq, exact = scaled.view(len(scaled), 3, -1).unbind(1)
    known = q.isfinite() & grad_sq.isfinite()
    here = torch.stack([q / scale / scale, grad_sq, torch.ones_like(q), exact], 1)
    return rows.index_copy_(2, measured, torch.where(known[:, None], here, 0))


def _known(rows: Tensor, ranks: int) -> Tensor:
    """[K, 3, P]; p.grad, and so |g|^2 in any metric, is the same on all ranks that know it."""
    q, grad_sq, knowing, exact = rows.unbind(1)
    known = torch.where(knowing > 0, knowing, torch.nan)
    return torch.stack([q / ranks**2 + 0 * known, grad_sq / known, exact / known], 1)


def grad_sq_shares(parameters: Sequence[torch.nn.Parameter], group: Any) -> Tensor:
    """This rank's part of |g|^2 of each parameter with a gradient, in float32 at least, without a kernel per parameter."""
    grads = [g for p in parameters if (g := p.grad) is not None]
    if group is None and not any(map(is_dtensor, grads)):
        return squared_norms(grads)
    return distributed.grad_sq_shares(grads, group)
