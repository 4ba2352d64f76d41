"""The noise scale as the optimizer sees it: contributions weighed by its diagonal preconditioner P, number by number.

The update is -P g with P = gain / (sqrt(v_hat) + eps), so the noise term of the loss change is tr(P H P Sigma) and the signal
term G' P H P G:

    power 1     H ~ P^-1     B_P = tr(P Sigma) / (G' P G)           the optimizer's P is right about the curvature
    power 2     H ~ I        B_P = tr(P^2 Sigma) / |P G|^2          noise of the update itself

Both are the plain noise scale of c_b scaled by W^(1/2), W = P^power, so the unbiased pair holds with

    q_W = sum_j W_j sum_b c_bj^2            |g|_W^2 = sum_j W_j g_j^2

provided that P does not depend on the step that is measured: it is the P of the last update, never the one that the next
update will use. q_W is exact where the sum over b is kept for every number (``gns.elementwise``), and where P is one number for
a whole parameter. Elsewhere q_W ~ q |g|_W^2 / |g|^2: it assumes that all numbers of one parameter have the same noise scale,
so that P weighs parameters against each other and nothing within them. |g|_W^2 is always exact.

How far off that is, measured on a GPT of one block on text with B = 16 and every parameter approximate, over updates 380 to 400
(AdamW with beta2 .999 and .95, RMSprop): q_W of weight matrices is 0.93 to 1.06 of the truth, and B_P 47 for 48, 107 for 133,
192 for 188. With power 2, q_W is 0.78 to 1.06 and B_P 70 for 83, 271 for 248, and 53 for 4857, where a few rows of rare tokens,
with a v that has decayed to nothing, are most of the truth. After 3 updates q_W is 0.2 to 0.8: P is then 1 over the size of a few
gradients, and B_P, exact or not, a number about those, so start after warm-up. (To spread q as v instead of g^2 is worse: B_P
is 19, 58 and 134 with power 1.)

Source: the loss change is equation 2.6 of McCandlish et al. (arXiv 1812.06162) with the gradient replaced by P g.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gnsfx._torch import flatten_dense_tensors
from gnsfx.collector import Totals, index
from gnsfx.errors import OptionError
from gnsfx.noise.diagonal import Diagonal, Scalar, read_diagonals, real

_CHUNK = 1 << 20  # numbers side by side: what is computed of them needs eight times their memory


class Terms(NamedTuple):
    """For each measured parameter of a :class:`gnsfx.collector.Totals`: q_W, |g|_W^2 and whether q_W is exact.

    The first two like ``Totals.values``: q_W is -inf where the parameter was refused in this run, and where the optimizer has
    no P for it: it is not among its parameters, or had no update yet.
    """

    sq_norm: Tensor
    grad_sq: Tensor
    exact: Tensor


@torch.no_grad()
def terms(found: Totals, elementwise: Mapping[str, Tensor], optimizer: Optimizer, power: int = 1) -> Terms | None:
    """The pair of this step, before ``optimizer.step()``; None before the first update. No host synchronisation.

    Args:
        found: of :func:`gnsfx.collector.totals`.
        elementwise: of :func:`gnsfx.collector.entry_sums`; empty: everything is approximate.
        power: 1 or 2, see above.

    Scales like ``found.values`` and ``p.grad``: ranks, weights and loss scale enter q_W as they enter q.

    Raises:
        GnsError: an optimizer without a diagonal preconditioner that is known, or of another model.
        OptionError: another power.
    """
    if power not in (1, 2):
        raise OptionError(f"power={power!r}: expected 1 (curvature like 1/P) or 2 (noise of the update itself).")
    measured = [i for i, reason in enumerate(found.refusals) if reason is None]
    parameters = [found.parameters[i] for i in measured]
    entries = [elementwise.get(found.names[i]) for i in measured]
    diagonals = read_diagonals(optimizer, parameters)
    if found.values is None or all(d is None for d in diagonals):
        return None
    q = found.values[0]
    share = torch.full_like(q, -math.inf)  # of q, where the sums of single numbers are not known
    sums, grad_sq = torch.full_like(q, -math.inf), torch.zeros_like(q)
    exact = torch.zeros_like(q, dtype=torch.bool)
    for at in _chunks(diagonals, parameters):
        chunk, place = [d for i in at if (d := diagonals[i]) is not None], index(at, q.device)
        grads = [_gradient(parameters[i]) for i in at]
        sizes = tuple([g.numel() for g in grads])
        grad = _flat(grads)
        plain = _sums(grad * grad, sizes, like=q)
        if chunk[0].moment is None:
            weight = chunk[0].gain ** power
            share.index_fill_(0, place, weight)
            exact.index_fill_(0, place, True)
            grad_sq.index_copy_(0, place, plain * weight)
            continue
        weights = _weights(chunk, power)
        weighed = _sums((weights * grad).mul_(grad), sizes, like=q)
        grad_sq.index_copy_(0, place, weighed)
        share.index_copy_(0, place, torch.where(plain > 0, weighed / plain, 0))
        kept = [(j, e) for j, i in enumerate(at) if (e := entries[i]) is not None and e.numel()]
        if kept:
            which, squares = zip(*kept, strict=True)
            if len(which) < len(at):
                pieces = weights.split(sizes)
                weights, sizes = _flat([pieces[j] for j in which]), tuple([sizes[j] for j in which])
                place = index(tuple([at[j] for j in which]), q.device)
            square = _flat(squares)
            exact.index_copy_(0, place, square.index_select(0, _starts(sizes, q.device)) > -math.inf)
            sums.index_copy_(0, place, _sums(square * weights, sizes, like=q))
    if found.variances is not None:
        exact &= found.variances == 0
    usable = (share > -math.inf) & (q > -math.inf)
    sq_norm = torch.where(exact & (sums > -math.inf), sums, q * share)
    return Terms(torch.where(usable, sq_norm, -math.inf), grad_sq, exact)


@torch.no_grad()
def preconditioner(optimizer: Optimizer, parameter: Tensor, power: int = 1) -> Tensor | None:
    """P^power of one parameter as the last update applied it, shaped like the parameter, in float32 at least; None before
    its first update. See :mod:`gnsfx.noise.diagonal` for the optimizers and their formulas.

    Raises:
        GnsError: as for :func:`terms`.
    """
    (diagonal,) = read_diagonals(optimizer, [parameter])
    if diagonal is None:
        return None
    if diagonal.moment is None:
        return torch.ones_like(real(parameter)) * diagonal.gain**power
    return _weights([diagonal], power).view(real(parameter).shape)


def _chunks(diagonals: Sequence[Diagonal | None], parameters: Sequence[Tensor]) -> Iterator[tuple[int, ...]]:
    """Positions of the parameters that have a P, those of one kind side by side, as many as fit: with a moment, and with the same
    number."""
    kinds: dict[Any, list[int]] = {}
    for i, diagonal in enumerate(diagonals):
        if diagonal is not None:
            gain = diagonal.gain if isinstance(diagonal.gain, float) else id(diagonal.gain)
            kind = "moment" if diagonal.moment is not None else gain
            kinds.setdefault((kind, parameters[i].dtype, parameters[i].device), []).append(i)
    for positions in kinds.values():
        at: list[int] = []
        size = 0
        for i in positions:
            if at and size + parameters[i].numel() > _CHUNK:
                yield tuple(at)
                at, size = [], 0
            at.append(i)
            size += parameters[i].numel()
        yield tuple(at)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in one row: an operation on many small tensors takes longer than to lay them side by side. Not to be written to:
    one tensor alone is not copied."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else flatten_dense_tensors(tensors)


def _weights(diagonals: Sequence[Diagonal], power: int) -> Tensor:
    """W = P^power of all numbers in one row, in float32 at least."""
    moments = [d.moment(d.state) for d in diagonals if d.moment is not None]
    sizes, moment = tuple([m.numel() for m in moments]), _flat(moments)
    weights = moment.sqrt()
    weights.mul_(_each([d.stretch for d in diagonals], sizes, weights))
    weights.add_(_each([d.eps for d in diagonals], sizes, weights))
    weights.clamp_min_(torch.finfo(torch.float32).tiny)  # eps may be 0
    weights.reciprocal_()
    weights.mul_(_each([d.gain for d in diagonals], sizes, weights))
    weights.mul_(moment.sign())
    return weights.mul_(weights) if power == 2 else weights


def _each(values: Sequence[Scalar], sizes: tuple[int, ...], like: Tensor) -> Scalar:
    """A number for each tensor, for each of its numbers; as it is where it is the same for all."""
    if not any(isinstance(value, Tensor) for value in values):
        if len({*values}) == 1:
            return values[0]
        each = torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
    else:
        each = torch.stack([v.to(like) if isinstance(v, Tensor) else like.new_full((), v) for v in values])
    return each.repeat_interleave(_lengths(sizes, like.device), output_size=len(like))


def _sums(products: Tensor, sizes: tuple[int, ...], like: Tensor) -> Tensor:
    """The sum over each tensor of what is not negative."""
    if len(sizes) == 1:
        return products.sum(0, keepdim=True).to(like)
    if like.device.type == "cpu":  # where norms add up one number after the other: off by 1e-3 for ten million
        lengths = _lengths(sizes, like.device)
        return torch.segment_reduce(products.double(), "sum", lengths=lengths, unsafe=True).to(like)
    return torch.stack([s.to(like) for s in torch._foreach_norm(products.split(sizes), 1)])


@functools.lru_cache(maxsize=64)
def _lengths(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(sizes, device=device)  # cached: copying it to a GPU would wait for the GPU


@functools.lru_cache(maxsize=64)
def _starts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes[:-1])], device=device)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None  # it is measured
    return real(parameter.grad)
