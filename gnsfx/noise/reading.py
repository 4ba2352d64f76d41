"""Reading a noise scale: all host numbers from one transfer, and what the host knows without asking the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gnsfx import collector, unmeasured
from gnsfx.noise import predict
from gnsfx.noise.diagnostics import Findings, list_reasons
from gnsfx.noise.full_steps import FullSteps
from gnsfx.noise.groups import NOTHING, GroupStats
from gnsfx.noise.intervals import Interval
from gnsfx.noise.optimizer_noise import OptimizerNoise, OptimizerStats
from gnsfx.noise.predict import Prediction
from gnsfx.noise.tracking import MISSING, RECENT, TOTAL, Counts, Tracked, share_covered, stats_of
from gnsfx.tracked import tracked_of

_WATCHED = 8  # parameters asked at each step whether anything wrote to their gradients: the first, and the rest in turn
NO_OPTIMIZER = OptimizerStats(math.nan, math.nan, 0, 0)


@dataclass(slots=True)
class Host:
    """What is known without asking the device.

    excluded: name -> reason: has a gradient, but the last step could not measure it. unselected: the user chose not to.
    unreached: has a gradient, but not from a backward pass of this step on this rank.
    written: ``p.grad`` was written to between the last backward pass and ``step``, but for taking the loss scale out.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    unselected: set[str] = field(default_factory=set)
    unreached: set[str] = field(default_factory=set)
    written: bool = False
    _next: int = 0

    def take(self, found: collector.Totals, alone: bool, scaled: bool) -> None:
        """Args:
        alone: whether this rank is the only one; otherwise another may measure what it did not reach, and gradients
            are written to when they are averaged.
        scaled: whether a loss scale was taken out of the gradients, which writes to them once.
        """
        if alone:
            measured = [p for p, r in zip(found.parameters, found.refusals, strict=True) if r is None]
            in_turn = range(self._next, self._next + _WATCHED)
            self._next += _WATCHED
            for p in [*measured[:1], *(measured[i % len(measured)] for i in in_turn if measured)]:
                self.written |= (tracked := tracked_of(p)) is not None and tracked.writes() > scaled
        gaps = {
            name: reason
            for name, p, reason in zip(found.names, found.parameters, found.refusals, strict=True)
            if reason is not None and p.grad is not None
        }
        # Its gradient may be zeros from zero_grad(set_to_none=False), or of another rank: only the device knows.
        self.unreached = {name for name, reason in gaps.items() if reason == collector.UNREACHED}
        gaps = {name: reason for name, reason in gaps.items() if name not in self.unreached}
        self.unselected = {name for name in gaps if unmeasured.left_out(self.parameters[name]) is not None}
        self.excluded = {name: reason for name, reason in gaps.items() if name not in self.unselected}

    def share(self, left_out: set[str]) -> float:
        """Share of the numbers outside ``left_out``."""
        whole = sum(parameter.numel() for parameter in self.parameters.values())
        return 1 - sum(self.parameters[name].numel() for name in left_out) / max(whole, 1)

    def coverage_text(self, excluded: Mapping[str, str]) -> str:
        return (
            f"{len(excluded)} of {len(self.parameters)} trainable parameters, {1 - self.share(set(excluded)):.1%} of the "
            f"numbers, are not in the noise scale. {list_reasons(excluded)}"
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """Host numbers, from one transfer."""

    parameters: dict[str, GroupStats] = field(default_factory=dict)
    groups: dict[Any, Any] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    total: GroupStats = NOTHING
    share: float = math.nan
    findings: Findings = field(default_factory=Findings)
    prediction: Prediction | None = None
    preconditioned: OptimizerStats = NO_OPTIMIZER

    def describe(self) -> str:
        counts = self.counts
        left_out = f", {counts.skipped:.0f} left out as not finite" if counts.skipped else ""
        too_few = f", {counts.too_few:.0f} with fewer than two examples" if counts.too_few else ""
        return f"{counts.steps:.0f} steps{left_out}{too_few}; {counts.examples:,.0f} examples."


@dataclass(frozen=True, slots=True)
class Predicted(GroupStats):
    """The total as the norm layers tell it."""

    prediction: Prediction | None = None

    def interval(self, level: float = 0.95) -> Interval:
        """Interval of ``b_simple``, with the error of the factor from the norm layers to the total."""
        assert self.prediction is not None
        return self.prediction.interval(level)


def read(tracked: Tracked, host: Host, full_steps: FullSteps | None, weighing: OptimizerNoise | None) -> Reading:
    """Everything, by one transfer."""
    more = [
        None if full_steps is None else full_steps.rows,
        None if weighing is None else weighing.series,
    ]
    estimates, refused, counts, numbers = tracked.read(*(m for m in more if m is not None))
    excluded, parameters = dict(host.excluded), {}
    for (name, parameter), gone in zip(host.parameters.items(), refused, strict=True):
        if gone and name not in host.unselected:
            reason = collector.UNREACHED if name in host.unreached else "refused in the graph or on another rank"
            excluded.setdefault(name, reason)
        elif estimates[name].n_eff > 0 and name not in excluded:
            parameters[name] = stats_of(estimates[name], [parameter])
    whole = estimates["", TOTAL]
    stats = stats_of(whole, [host.parameters[name] for name in parameters]) if parameters else NOTHING
    prediction, preconditioned = None, NO_OPTIMIZER
    if more[0] is not None:
        prediction = predict.read(numbers[: more[0].numel()])
        made_of = prediction.tr_sigma, prediction.g_sq, stats.parameters, stats.elements
        stats = Predicted(*made_of, (), prediction)
    if more[1] is not None:
        preconditioned = OptimizerNoise.read(numbers[-more[1].numel() :], stats.parameters, stats.elements)
    missing = estimates["", MISSING].tr_sigma
    return Reading(
        parameters,
        estimates,
        excluded,
        counts,
        stats,
        share_covered(whole.tr_sigma, 0.0 if math.isnan(missing) else missing),
        Findings(
            counts,
            whole,
            estimates["", RECENT],
            modified=host.written,
            predicted=prediction is not None,
            drift=None if prediction is None else prediction.drift.message(),
        ),
        prediction,
        preconditioned,
    )
