"""What is wrong with a measurement, in plain words: each row has a name, a test on the host numbers, and what to do.

Everything is found from what is read anyway; nothing here looks at the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gnsfx.noise.intervals import MIN_STEPS, UNKNOWN, Estimate, ratio_interval
from gnsfx.noise.tracking import Counts

NOTES = frozenset({"moved"})  # worth knowing, but nothing is wrong: shown in summaries, no warning
# |G|^2 cannot be negative; its estimate is below zero by so many standard errors once in 30,000 readings.
_IMPOSSIBLE = 4.0
_OUTWEIGHED = 3.0
_SOON = 20  # steps after which a memory of so few is no longer the beginning
_LEVEL = 0.999


@dataclass(frozen=True, slots=True)
class Findings:
    """Host numbers of one reading.

    total, recent: averages of the whole model, with the memory that was asked for and with a shorter one.
    modified: ``p.grad`` was written to after backward. predicted: the total comes from the norm layers; drift: what is to be
    said of that.
    """

    counts: Counts = field(default_factory=Counts)
    total: Estimate | None = None
    recent: Estimate | None = None
    modified: bool = False
    predicted: bool = False
    drift: str | None = None


def messages(found: Findings) -> Iterator[tuple[str, str]]:
    """(kind, text) of everything that is to be said."""
    counts = found.counts
    steps = f"{counts.steps:.0f} steps"
    if counts.skipped:
        which = "all" if counts.skipped == counts.steps else f"{counts.skipped:.0f} of"
        yield (
            "skipped",
            f"{which} {steps} were left out of the noise scale because a gradient or a norm was NaN or infinite; "
            "noise.skipped counts them. Does the loss diverge?",
        )
    if counts.steps > counts.skipped and not counts.examples:
        yield (
            "nothing",
            f'no rank measured an example in {steps}. Is the model compiled with backend="gns" on every rank, and '
            "noise.step() called before zero_grad()?",
        )
    elif counts.too_few:
        yield (
            "too few",
            f"{counts.too_few:.0f} of {steps} had fewer than two examples, from which noise cannot be told from signal; "
            "they count for nothing. Use a larger batch, or call noise.step() once after several backward passes.",
        )
    if counts.misweighted:
        yield (
            "weights",
            f"in {counts.misweighted:.0f} of {steps} the weights were not as many as the examples or did not add up to "
            "the tokens, so the step was left out. Give one weight per example: the number of its tokens in the loss.",
        )
    if counts.left_over:
        yield (
            "left over",
            f"in {counts.left_over:.0f} of {steps} p.grad still held gradients of an earlier noise.step(), so the step was left "
            "out. Call zero_grad() after every noise.step(), and noise.step() once for all micro-batches, after the last.",
        )
    if counts.too_large:
        yield (
            "inconsistent",
            f"in {counts.too_large:.0f} of {steps} p.grad was larger than the measured examples can account for (|g|^2 > n * "
            "sum of squares), so the noise scale is not to be trusted. Call zero_grad() after every noise.step(), measure "
            "all micro-batches of a step or none, and call noise.step() before anything rescales p.grad.",
        )
    if found.modified:
        yield (
            "modified",
            "p.grad was changed between backward and noise.step(), so the contributions of the examples no longer add up to "
            "it. Call noise.step() before gradients are clipped; after scaler.unscale_(optimizer), pass "
            "loss_scale=scaler.",
        )
    elif found.total is not None and _impossible(found.total):
        yield (
            "too small",
            "p.grad is smaller than what the examples add up to (|G|^2 comes out below zero by more than "
            f"{_IMPOSSIBLE:g} standard errors). Call noise.step() before gradients are clipped; pass loss_scale= where the "
            "loss was scaled and p.grad is not any more; or the examples of a batch are not independent (drawn in "
            "opposite pairs, or evenly over classes).",
        )
    if found.total is not None and not found.predicted and _forgetful(found.total, counts):
        yield (
            "memory",
            f"the averages of the noise scale are worth {found.total.n_eff:.2g} steps, too few for an interval: their memory is "
            "short for steps of this size. Give NoiseScale a half_life of 20 steps or more, in examples.",
        )
    if found.drift is not None:
        yield "drift", found.drift
    if found.total is not None and found.recent is not None and (moved := _moved(found.total, found.recent)):
        yield "moved", moved


def _forgetful(total: Estimate, counts: Counts) -> bool:
    return counts.steps - counts.skipped - counts.too_few - counts.misweighted >= _SOON and 0 < total.n_eff < MIN_STEPS


def _impossible(total: Estimate) -> bool:
    return total.n_eff >= 10 and total.g_sq < -_IMPOSSIBLE * math.sqrt(max(total.var_g_sq, 0.0))


def _moved(total: Estimate, recent: Estimate) -> str | None:
    """Whether the average still holds what is long gone, such as the first steps of training."""
    if recent.n_eff < 10:
        return None
    advice = "Call noise.reset() after warm-up, or give NoiseScale a shorter half_life."
    for name, then, now, variance in (
        ("tr(Sigma)", total.tr_sigma, recent.tr_sigma, recent.var_tr_sigma),
        ("|G|^2", total.g_sq, recent.g_sq, recent.var_g_sq),
    ):
        if _OUTWEIGHED * (now + _IMPOSSIBLE * math.sqrt(max(variance, 0.0))) < then:
            return (
                f"gradients were much larger in older steps ({name} is {then:.3g} on average and {max(now, 0.0):.3g} in the "
                f"last steps), so the noise scale is still about those. {advice}"
            )
    whole, last = ratio_interval(total, _LEVEL), ratio_interval(recent, _LEVEL)
    if UNKNOWN in (whole, last) or not (last.low > whole.high or whole.low > last.high):
        return None
    return (
        f"the noise scale of the last steps ({last} examples) is not that of the average ({whole} examples), which still "
        f"holds older steps. {advice}"
    )


def list_reasons(reasons: Mapping[str, str], shown: int = 3) -> str:
    """The first few reasons, each with the first few names that it holds for, and where to find the others."""
    names_of: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names_of.setdefault(reason, []).append(name)
    parts = [f"{_list_names(names, shown)}: {reason}" for reason, names in names_of.items()]
    return "; ".join(parts[:shown]) + ("; ..." if len(parts) > shown else "") + ". See gnsfx.coverage(model)."


def _list_names(names: Sequence[str], shown: int) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
