"""A batch size that follows the noise scale, in closed loop.

    target="data":  B = ratio * B_simple              one pass over the data costs 1 + B/B_simple times the least data
                                                      and 1 + B_simple/B times the fewest steps. The norm test
                                                      B >= B_simple / theta^2 is ratio = 1 / theta^2.
    target="time":  B = sqrt(B_simple * t0/t1)        minimises (1 + B_simple/B) (t0 + t1 B), steps times seconds per step

Both need B_simple as an interval: the batch grows when the low end asks for it, and shrinks, if allowed, when the high
end does (gnsfx.batch_size.decision). Source: McCandlish et al., arXiv 1812.06162, section 2.3 and appendix D.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch.distributed as dist

from gnsfx.batch_size.coupling import LearningRate
from gnsfx.batch_size.decision import Rules, decide
from gnsfx.batch_size.policy import BatchPolicy, Decision
from gnsfx.batch_size.step_time import StepTime, StepTimes, given
from gnsfx.batch_size.unit import BatchUnit
from gnsfx.errors import GnsWarning, OptionError
from gnsfx.noise.intervals import UNKNOWN, Interval

_PATIENCE = 10  # looks without a noise scale before a warning


class NoiseReading(Protocol):
    """What a controller reads of :class:`gnsfx.NoiseScale`: all in examples, and the same on every rank."""

    @property
    def b_simple(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def examples(self) -> int: ...
    @property
    def skipped(self) -> int: ...
    def interval(self, level: float = 0.95) -> Interval: ...


class BatchSizeController(BatchPolicy):
    """Batch size from the noise scale that is measured on the way.

    Args:
        noise: a :class:`gnsfx.NoiseScale`. Its ``step()`` comes before this object's.
        micro_batch: examples in one backward pass of one rank.
        bounds: smallest and largest batch size, in examples over all ranks.
        start: batch size to start with; the smallest unless given.
        world_size: data-parallel ranks; those of the noise scale's process group unless given.
        target: ``"data"``, ratio * B_simple; or ``"time"``, the batch size with the shortest time. That one needs steps
            of two batch sizes; until then the rule for data decides.
        ratio: batch size wanted, as a multiple of B_simple; for ``"data"``.
        step_time: (t0 in seconds, t1 in seconds per example) where known; measured unless given:
            the seconds given to ``step()``, or means over ``period`` steps by the clock.
        level: of the intervals.
        hysteresis: the interval must ask for this much more (or less) than the batch size, relatively.
        shrink: whether the batch size may go down.
        max_factor: per change. One micro-batch per rank more or less is always allowed.
        period: steps from one decision to the next. Deciding reads the noise scale, which waits for the device.
        warm_up: steps before the first decision.
        min_steps, min_examples: from one change to the next.
        lr, beta2: as in :class:`gnsfx.batch_size.schedule.BatchSizeSchedule`.

    While the noise scale is not detected the batch size stays, and so it does after it was lost. ``reason`` says why,
    at any time. With several ranks, rank 0 decides.

    Use::

        controller = BatchSizeController(noise, micro_batch=8, bounds=(8, 512))
        for _ in range(controller.accumulation): ...     # micro-batches, each with its backward()
        noise.step(); optimizer.step(); optimizer.zero_grad()
        if change := controller.step():
            change.apply(optimizer)

    Raises:
        OptionError: bounds that no possible batch size meets, naming the nearest; or another bad argument.
    """

    def __init__(
        self,
        noise: NoiseReading,
        *,
        micro_batch: int,
        bounds: tuple[int, int],
        start: int | None = None,
        world_size: int | None = None,
        target: Literal["data", "time"] = "data",
        ratio: float = 1.0,
        step_time: tuple[float, float] | None = None,
        level: float = 0.95,
        hysteresis: float = 0.25,
        shrink: bool = False,
        max_factor: float = 2.0,
        period: int = 20,
        warm_up: int = 100,
        min_steps: int = 50,
        min_examples: int = 0,
        lr: LearningRate = "sqrt",
        beta2: bool = True,
    ) -> None:
        _check(hasattr(noise, "b_simple"), "noise", noise, "a gnsfx.NoiseScale")
        self.noise = noise
        unit = BatchUnit.of(micro_batch, world_size, self._group)
        self._world_size_is_given = world_size is not None
        if not (isinstance(bounds, Sequence) and len(bounds) == 2):
            raise OptionError(f"bounds={bounds!r}: expected the smallest and the largest batch size, in examples.")
        low, high = unit.inside(*bounds, f"bounds={tuple(bounds)}")
        if start is not None and not low <= unit.check(start, "start") <= high:
            raise OptionError(f"start={start}: outside the bounds, {low}..{high} examples.")
        _check(target in ("data", "time"), "target", target, '"data" or "time"')
        _check(0 < ratio < math.inf, "ratio", ratio, "a positive number")
        _check(0 < level < 1, "level", level, "a number between 0 and 1, such as 0.95")
        _check(0 <= hysteresis < math.inf, "hysteresis", hysteresis, "a number from 0 on, such as 0.25")
        _check(1 < max_factor <= math.inf, "max_factor", max_factor, "a number above 1")
        _check(period >= 1, "period", period, "a number of steps from 1 on")
        for name, value in (("warm_up", warm_up), ("min_steps", min_steps), ("min_examples", min_examples)):
            _check(value >= 0, name, value, "a number from 0 on")
        super().__init__(unit, low if start is None else start, lr, beta2)
        self._rules = Rules(unit, low, high, hysteresis, max_factor, shrink)
        self._target, self._ratio, self._level = target, ratio, level
        self._period, self._warm_up, self._min_steps, self._min_examples = period, warm_up, min_steps, min_examples
        self._known_time = None if step_time is None else given(step_time)
        self._times = StepTimes()
        self._blind_looks = 0
        self._last_look: tuple[int, ...] | None = None  # steps and examples of the noise scale, and of this object
        self._compared = False

    @property
    def step_time(self) -> StepTime | str:
        """t0 + t1 B of the steps of this rank so far; or why it is not known."""
        return self._times.fit() if self._known_time is None else self._known_time

    @property
    def _group(self) -> Any:
        return getattr(self.noise, "process_group", None)

    def _take(self, examples: int, tokens: int | None, seconds: float | None) -> None:
        if examples != self.batch_size:
            self._times.interrupt()
        elif seconds is not None:
            self._times.add(self.batch_size, seconds)
        else:
            self._times.tick(self.batch_size, time.perf_counter(), self._period)

    def _decide(self) -> Decision | None:
        last = self.changes[-1] if self.changes else None
        too_soon = last is not None and (
            self.steps - last.step < self._min_steps or self.examples - last.examples < self._min_examples
        )
        if self.steps < self._warm_up or self.steps % self._period or too_soon:
            return None
        b_simple, interval, step_time = self._agreed()
        self._compare_examples()
        wanted, because = self._wanted(b_simple, interval, step_time)
        self._blind_looks = 0 if interval.detected else self._blind_looks + 1
        if self._blind_looks == _PATIENCE:
            warnings.warn(
                f"{because} in {_PATIENCE} looks: the batch stays {self.batch_size}.", GnsWarning, stacklevel=3
            )
        return decide(self.batch_size, wanted, because, self._rules)

    def _compare_examples(self) -> None:
        """Warn once if the noise scale saw steps of another size than this object counts."""
        look = (self.noise.steps - self.noise.skipped, self.noise.examples, self.steps, self.examples)
        before, self._last_look = self._last_look, look
        seen_steps, seen, steps, examples = (a - b for a, b in zip(look, before or look, strict=True))
        if (
            self._compared
            or min(seen_steps, steps, examples) <= 0
            or 0.9 < seen / seen_steps / (examples / steps) < 1.1
        ):
            return
        self._compared = True
        warnings.warn(
            f"noise.step() saw {seen / seen_steps:.4g} examples per step, where this controller counts {examples / steps:.4g}: "
            f"does each rank run controller.accumulation micro-batches of {self.unit.micro_batch} examples per step? Tell a "
            "step of another size, step(examples=...); packed documents are an example each.",
            GnsWarning,
            stacklevel=4,
        )

    def _agreed(self) -> tuple[float, Interval, StepTime | None]:
        """What the decision rests on, the same on all ranks: what rank 0 reads and measures."""
        interval = self.noise.interval(self._level)
        found = self.step_time if self._target == "time" else ""
        fit = [math.nan] * 4 if isinstance(found, str) else [found.t0, found.t1, *found.ratio]
        values = [self.noise.b_simple, *interval, *fit]
        group = self._group
        if group is not None:
            from gnsfx.distributed import broadcast_decision

            ranks = dist.get_world_size(group)
            if not self._world_size_is_given and ranks != self.unit.world_size:
                raise OptionError(
                    f"the noise scale is that of {ranks} ranks, but batch sizes were made for {self.unit.world_size}: "
                    "give world_size=, the number of ranks that share a step."
                )
            values = broadcast_decision(values, group)
        b_simple, low, high, t0, t1, ratio_low, ratio_high = values
        usable = 0 <= low <= high and math.isfinite(low)
        fitted = StepTime(t0, t1, Interval(ratio_low, ratio_high)) if math.isfinite(t1) else None
        return b_simple, Interval(low, high) if usable else UNKNOWN, fitted

    def _wanted(self, b_simple: float, interval: Interval, step_time: StepTime | None) -> tuple[Interval, str]:
        """The interval of the batch size that is wanted, in examples, and in words."""
        if not interval.detected:
            return interval, self._nothing_known()
        noise = _words("B_simple", b_simple, interval)
        if self._target == "time" and step_time is not None:
            wanted = Interval(*map(time_optimal, interval, step_time.ratio))
            best = time_optimal(b_simple, max(step_time.t0 / step_time.t1, 0.0))
            times = f"t0 = {step_time.t0:.3g} s, t1 = {step_time.t1:.3g} s per example"
            return wanted, f"{_words('sqrt(B_simple t0/t1)', best, wanted)}, with {noise}, {times},"
        if self._target == "time":
            noise = f"step time not yet known (see step_time), so by the rule for data {noise}"
        if self._ratio != 1:
            noise = f"{self._ratio:g} times {noise}"
        return Interval(self._ratio * interval.low, self._ratio * interval.high), noise

    def _nothing_known(self) -> str:
        steps, skipped = self.noise.steps, self.noise.skipped
        if not steps:
            return "B_simple was not measured: noise.step() was not called since the start or the last reset()"
        if skipped >= steps:
            return f"B_simple was not measured: all {steps} steps were skipped as not finite"
        return f"B_simple is not yet detected after {self.noise.examples:,} examples"

    def _extra_state(self) -> dict[str, Any]:
        return {"step_times": self._times.state(), "blind_looks": self._blind_looks}

    def _load_extra(self, state: Mapping[str, Any]) -> None:
        looks = state["blind_looks"]
        self._times.load(state["step_times"])
        self._blind_looks = looks


def time_optimal(b_simple: float, ratio: float) -> float:
    """sqrt(B_simple t0/t1), in examples, for ratio = t0/t1. 0 where t0 is 0, whatever B_simple."""
    return math.sqrt(b_simple * ratio) if ratio else 0.0


def _words(name: str, value: float, interval: Interval) -> str:
    """B_simple = 212 (160..290) examples; or: B_simple, at least 160 examples,"""
    if not interval.bounded:
        return f"{name}, {interval} examples,"
    return f"{name} = {value:.3g} ({interval}) examples" if math.isfinite(value) else f"{name} = {interval} examples"


def _check(fine: bool, name: str, value: object, expected: str) -> None:
    if not fine:
        raise OptionError(f"{name}={value!r}: expected {expected}.")
