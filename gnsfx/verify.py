"""Measured norms beside per-example autograd, on one batch.

    measured    the rewritten graph of a private copy of the model             s_b, s = sum_b s_b
    truth       the same graph as AOTAutograd traced it, nothing of ours       c_b = J^T (tangents of example b), |c_b|^2

Both start from the same random numbers and run the same random ops in the same order, so dropout masks agree. What the
tangents of example b are depends on where the loss is:

    loss returns (B,)                      those of losses[b] / B
    loss returns a scalar                  those of the scalar, with the rows of all other examples set to zero
    the model's output is the loss         example b runs alone, with its part of the random numbers of the batch; then
                                           c_b = w_b g_b with sum_b w_b g_b = g, which gives the weights w_b
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnsfx.coverage import Row, align, footnote
from gnsfx.errors import GnsError, VerificationError
from gnsfx.truth import Measured, Problem
from gnsfx.weighed import square

TERMS = 2**20
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Checked:
    """One measured parameter beside the truth.

    Attributes:
        measured, expected: sum over examples of the squared norms.
        relative_error: of the sum or of the worst example, whichever is larger; at most ``rtol`` where the tolerance holds.
        gradient_error: of ``p.grad``, relative to the sum of the norms of its contributions.
        example: the worst one.
        wrong: what is beyond the tolerance, in words; empty if nothing is.
    """

    name: str
    measured: float
    expected: float
    relative_error: float
    gradient_error: float
    example: int
    wrong: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared.

    Attributes:
        parameters: those that are measured.
        skipped: coverage rows of all others, with the reason.
        examples: size of the batch.
        dtype: in which both sides were computed.
        rtol: relative tolerance on squared norms, as given or derived.
    """

    parameters: tuple[Checked, ...]
    skipped: tuple[Row, ...]
    examples: int
    dtype: torch.dtype
    rtol: float

    @property
    def max_relative_error(self) -> float:
        """The largest over all parameters; 0 if nothing was compared."""
        return max((p.relative_error for p in self.parameters), default=0.0)

    @property
    def refused(self) -> dict[str, str]:
        """Parameter name -> reason."""
        return {row.name: row.reason for row in self.skipped if row.status == "refused"}

    def by_parameter(self) -> dict[str, float]:
        """Parameter name -> largest relative error of its squared norms."""
        return {p.name: p.relative_error for p in self.parameters}

    def __str__(self) -> str:
        notes: dict[str, str] = {}
        rows = [("parameter", "measured", "expected", "relative error", "")]
        rows += [
            (p.name, f"{p.measured:.6g}", f"{p.expected:.6g}", f"{p.relative_error:.1e}", p.wrong)
            for p in self.parameters
        ]
        rows += [(r.name, "", "", "", footnote(f"{r.status}: {r.reason}", notes)) for r in self.skipped]
        summary = (
            f"{len(self.parameters)} parameters compared with per-example autograd on {self.examples} examples in "
            f"{str(self.dtype).removeprefix('torch.')}; largest relative error {self.max_relative_error:.1e}, tolerance {self.rtol:.1e}"
        )
        return "\n".join([align(rows, (1, 2, 3)), *(f"{mark} {reason}" for reason, mark in notes.items()), summary])


def verify(
    model: nn.Module, *args: Any, loss: Callable[[Any], Tensor] | None = None, rtol: float | None = None, **kwargs: Any
) -> Verification:
    """Compare the norms of every measured parameter with per-example autograd on this batch.

    Works on a private copy of the model, compiled as a whole with the options of ``model`` and without code generation,
    in float64 where the model runs in it and in its own dtype otherwise (a model in half precision in both): what is
    verified is the rewritten graph, not the code the inner compiler makes of it. ``gns.budget`` is left out: what is compared is
    what would be measured without it, from the same factors that estimates are made of. The model, its gradients, buffers and
    collectors and the random numbers stay as they are. It takes B + 2 passes and memory for B gradients.

    The tolerance: |s_b - t_b| <= rtol t_b + 2 sqrt(t_b) d + d^2 + f. ``rtol`` is ``2 eps sqrt(2^20)``, the random walk of
    rounding in a sum of a million terms, twice because the norm is squared; ``eps`` is that of the least precise dtype
    that gradients pass through, with float32 sums and four roundings of the result for half precision. ``d`` is four times
    the rounding of the truth itself: the distance, for this parameter, between the sum of the contributions and the
    gradient of the whole batch. ``f = (rtol N)^2``, with N the largest norm of any contribution: a gradient that cancels
    to zero (a bias before a normalisation) is rounding alone. ``p.grad`` is compared in the same way.

    Args:
        model: a compiled module, one compiled in place, or an ordinary one.
        args, kwargs: inputs of its forward pass.
        loss: turns the output of the model into one loss per example, (B,), whose mean is trained, or into a scalar, if
            each row of the output (dimension 0, or the one marked on the inputs) belongs to one example. None: the output,
            or its ``loss``, is the loss; a scalar one takes a model whose examples can run alone.
        rtol: relative tolerance on squared norms, in float64 where the model runs in it.

    Raises:
        VerificationError: norms, or a gradient, differ; names each parameter with measured and expected values.
        GnsError: the truth cannot be had this way (the loss does not fit the batch, examples cannot run alone), with what
            to do instead; nothing is trained or compiled; or a gradient is not finite.
    """
    problem = Problem(model, args, kwargs, loss)
    report = None
    if (measured := problem.measure_in_double()) is not None:
        report = _compare(problem, measured, rtol)
        _raise_if_wrong(report)
    if report is None or any(p.dtype in HALVES for p in model.parameters() if p.requires_grad):
        problem.prepare(double=False)
        own = _compare(problem, problem.measure(), None if report is not None else rtol)
        _raise_if_wrong(own)
        report = report or own
    return report


# ----------------------------------------------------------------------------------------------------------- comparing


def relative_tolerance(dtype: torch.dtype) -> float:
    """Of a squared norm computed in ``dtype``; see :func:`verify`."""
    if dtype in HALVES:
        return 2 * (torch.finfo(torch.float32).eps * TERMS**0.5 + 4 * torch.finfo(dtype).eps)
    return 2 * torch.finfo(dtype).eps * TERMS**0.5


def _compare(problem: Problem, measured: Measured, rtol: float | None) -> Verification:
    truth = problem.truth(measured) if any(r.status == "measured" for r in measured.coverage) else None
    tolerance = relative_tolerance(problem.least) if rtol is None else rtol
    skipped = tuple(row for row in measured.coverage if row.status != "measured")
    dtype = problem.parameters[0].dtype
    if truth is None:
        return Verification((), skipped, measured.examples, dtype, tolerance)
    expected = torch.stack(
        [torch.stack([square(g) for g in grads]) for grads in truth.contributions], 1
    )  # (parameters, B)
    if not bool(expected.isfinite().all()):
        index, b = (~expected.isfinite()).nonzero()[0].tolist()
        raise GnsError(
            f"nothing can be verified on this batch: the gradient of {problem.names[index]} for example {b} is not finite."
        )
    largest = float(expected.max().sqrt())
    checked = []
    for index, name in enumerate(problem.names):
        if name not in measured.sums:
            continue
        parts = [g for grads in truth.contributions if (g := grads[index]) is not None]
        whole, gradient = truth.whole[index], measured.grads[index]
        total = sum(parts[1:], parts[0]) if parts else None
        own = 4 * _distance(total, whole)
        norms = measured.norms[name].cpu().to(torch.float64)
        error = _distance(gradient, whole)
        checked.append(
            _check(
                name,
                float(measured.sums[name]),
                norms,
                expected[index],
                own,
                (tolerance * largest) ** 2,
                tolerance,
                error,
            )
        )
    return Verification(tuple(checked), skipped, measured.examples, dtype, tolerance)


def _check(
    name: str, total: float, norms: Tensor, truth: Tensor, own: float, floor: float, rtol: float, gradient: float
) -> Checked:
    B = truth.numel()
    expected = float(truth.sum())
    wrong: list[str] = []
    worst, relative = 0, 0.0
    if norms.numel() != B:
        wrong.append(f"{norms.numel()} per-example norms for {B} examples")
    else:
        off = (norms - truth).abs()
        allowed = rtol * truth + 2 * truth.sqrt() * own + own**2 + floor
        errors = [
            _relative(o, a, t, rtol) for o, a, t in zip(off.tolist(), allowed.tolist(), truth.tolist(), strict=True)
        ]
        worst, relative = max(enumerate(errors), key=lambda pair: pair[1])
        if not bool((off <= allowed).all()):
            wrong.append(f"example {worst}: {_beside(float(norms[worst]), float(truth[worst]))}")
    off_total = abs(total - expected)
    allowed_total = rtol * expected + 2 * (expected * B) ** 0.5 * own + B * (own**2 + floor)
    if not off_total <= allowed_total:
        wrong.insert(0, _beside(total, expected))
    relative = max(relative, _relative(off_total, allowed_total, expected, rtol))
    reach = float(truth.sqrt().sum())
    if not gradient <= rtol * reach + own + floor**0.5:
        wrong.append(f"p.grad is off by {gradient:.3g}, its contributions have norm {reach:.3g}")
    return Checked(name, total, expected, relative, gradient / reach if reach else gradient, worst, "; ".join(wrong))


def _relative(off: float, allowed: float, expected: float, rtol: float) -> float:
    """At most ``rtol`` where the error is allowed: relative to the expected value, or to what its rounding amounts to."""
    scale = allowed / rtol if rtol else expected
    return off / scale if off and scale else 0.0 if off == 0 else float("inf")


def _beside(measured: float, expected: float) -> str:
    relative = abs(measured - expected) / expected if expected else float("inf")
    return f"measured {measured:.6g}, expected {expected:.6g}, relative difference {relative:.1e}"


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return float(square(a if b is None else b).sqrt())
    return float(square(a - b).sqrt())


def _raise_if_wrong(report: Verification) -> None:
    wrong = [p for p in report.parameters if p.wrong]
    if wrong:
        lines = "\n  ".join(f"{p.name}: {p.wrong}" for p in wrong)
        raise VerificationError(
            f"{len(wrong)} of {len(report.parameters)} measured parameters differ from per-example autograd on {report.examples} examples "
            f"(squared norms, relative tolerance {report.rtol:.1e}):\n  {lines}"
        )
