"""When to change the batch size B, given the interval low..high of the batch size that is wanted.

    low  >= B (1 + hysteresis)     grow, to low at most:    all that the interval is sure of
    high <= B / (1 + hysteresis)   shrink, to high at least, where shrinking is allowed
    otherwise                      stay

After a change B lies at the near end of the interval. A change back would need an interval that is disjoint from this
one, by the hysteresis: that is why a constant noise scale does not make the batch size flap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gnsfx.batch_size.policy import Decision
from gnsfx.batch_size.unit import BatchUnit
from gnsfx.noise.intervals import Interval


@dataclass(frozen=True, slots=True)
class Rules:
    """low, high: bounds, possible batch sizes themselves. max_factor: per change; one unit is always allowed."""

    unit: BatchUnit
    low: int
    high: int
    hysteresis: float
    max_factor: float
    shrink: bool


def decide(batch: int, wanted: Interval, because: str, rules: Rules) -> Decision:
    """The batch size that follows ``batch``, all in examples. ``because`` opens the sentence that explains it."""
    if not rules.low <= batch <= rules.high:
        inside = min(max(batch, rules.low), rules.high)
        return Decision(inside, f"{batch} is outside the bounds {rules.low}..{rules.high}: {batch} -> {inside}.")
    if not (0 <= wanted.low <= wanted.high and math.isfinite(wanted.low)) or not wanted.detected:
        return Decision(batch, f"{because}: the batch stays {batch}.")
    margin = 1 + rules.hysteresis
    if wanted.low >= batch * margin:
        return _grow(batch, wanted.low, because, rules)
    if wanted.bounded and wanted.high <= batch / margin:
        if rules.shrink:
            return _shrink(batch, wanted.high, because, rules)
        return Decision(batch, f"{because} is below {batch}, but shrinking is off: the batch stays {batch}.")
    if wanted.bounded:
        return Decision(batch, f"{because} does not call for a change: the batch stays {batch}.")
    return Decision(batch, f"{because} does not call for growth: the batch stays {batch}.")


def _grow(batch: int, low: float, because: str, rules: Rules) -> Decision:
    if batch == rules.high:
        return Decision(batch, f"{because} is above {batch}, the upper bound: the batch stays {batch}.")
    cap = max(rules.unit.floor(batch * rules.max_factor), batch + rules.unit.size)
    supported = rules.unit.floor(low)
    after = min(supported, cap, rules.high)
    if after <= batch:
        return Decision(
            batch, f"{because} is above {batch}, but reaches no multiple of {rules.unit}: it stays {batch}."
        )
    return Decision(after, f"{because} is above {batch}: {batch} -> {after}{_limit(after, supported, cap, rules)}.")


def _shrink(batch: int, high: float, because: str, rules: Rules) -> Decision:
    if batch == rules.low:
        return Decision(batch, f"{because} is below {batch}, the lower bound: the batch stays {batch}.")
    cap = min(rules.unit.ceil(batch / rules.max_factor), batch - rules.unit.size)
    supported = rules.unit.ceil(high)
    after = max(supported, cap, rules.low)
    if after >= batch:
        return Decision(
            batch, f"{because} is below {batch}, but reaches no multiple of {rules.unit}: it stays {batch}."
        )
    return Decision(after, f"{because} is below {batch}: {batch} -> {after}{_limit(after, supported, cap, rules)}.")


def _limit(after: int, supported: int, cap: int, rules: Rules) -> str:
    if after == supported:
        return ""
    return f" (at most x{rules.max_factor:g} per change)" if after == cap else " (the bound)"
