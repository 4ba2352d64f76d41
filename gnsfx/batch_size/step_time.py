"""How long a step takes: t0 + t1 B, fitted to the steps so far.

    B      examples per step           t0    seconds that do not depend on B: optimizer, communication, launches
    t1     seconds per example         t0/t1 the only thing the time-optimal batch size sqrt(B_simple t0/t1) needs

Robust against pauses (evaluation, checkpoints, compilation): the median of the steps of each batch size, then a line
through the medians, weighted by their standard errors. With one batch size only, t0 and t1 cannot be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median
from typing import NamedTuple

from gnsfx.errors import OptionError
from gnsfx.noise.intervals import Interval

_KEPT = 64  # the latest steps of each batch size
_ENOUGH = 3  # steps of one batch size, so that one that was interrupted does not matter
_FLOOR = 0.005  # relative error of a median at best: clocks and machines drift


class StepTime(NamedTuple):
    """t0 in seconds, t1 in seconds per example, and the 95% interval of t0/t1, in examples."""

    t0: float
    t1: float
    ratio: Interval

    def seconds(self, batch_size: float) -> float:
        """Of one step."""
        return self.t0 + self.t1 * batch_size


def given(step_time: tuple[float, float]) -> StepTime:
    """That of known (t0, t1).

    Raises:
        OptionError: not t0 >= 0 and t1 > 0.
    """
    t0, t1 = step_time
    if not (0 <= t0 < math.inf and 0 < t1 < math.inf):
        raise OptionError(f"step_time={step_time!r}: expected t0 >= 0 in seconds and t1 > 0 in seconds per example.")
    return StepTime(t0, t1, Interval(t0 / t1, t0 / t1))


class StepTimes:
    """The times of the steps so far, by batch size."""

    def __init__(self) -> None:
        self.seconds: dict[int, list[float]] = {}
        self._last: int | None = None
        self._since, self._ticks = math.nan, 0

    def add(self, batch_size: int, seconds: float) -> None:
        """One step. The first one with another batch size than before is left out: it may compile."""
        if batch_size == self._last:
            self._keep(batch_size, seconds)
        self._last, self._since = batch_size, math.nan

    def tick(self, batch_size: int, now: float, window: int) -> None:
        """The end of a step, by the clock of the host. Kept is the mean of ``window`` steps.

        Single steps would be wrong: a GPU runs behind the host, which waits for it every so many steps only.
        """
        if batch_size != self._last or math.isnan(self._since):
            self._since, self._ticks = now, 0
        else:
            self._ticks += 1
            if self._ticks >= window:
                self._keep(batch_size, (now - self._since) / self._ticks)
                self._since, self._ticks = now, 0
        self._last = batch_size

    def interrupt(self) -> None:
        """A step of another kind: the next one is the first again."""
        self._last = None

    def _keep(self, batch_size: int, seconds: float) -> None:
        if 0 < seconds < math.inf:
            kept = self.seconds.setdefault(batch_size, [])
            kept.append(seconds)
            del kept[:-_KEPT]

    def fit(self) -> StepTime | str:
        """The fit, or why there is none."""
        sizes = {batch: times for batch, times in sorted(self.seconds.items()) if len(times) >= _ENOUGH}
        if len(sizes) < 2:
            seen = ", ".join(map(str, sizes)) or "none"
            return f"t0 and t1 cannot be told apart before steps of two batch sizes were timed (so far: {seen})"
        points = [(batch, *_median(times)) for batch, times in sizes.items()]
        return fit_line(points)

    def state(self) -> dict[str, list[float]]:
        """Plain types, for a checkpoint."""
        return {str(batch): list(times) for batch, times in self.seconds.items()}

    def load(self, state: Mapping[str, Iterable[float]]) -> None:
        """Go on from ``state()``."""
        self.seconds = {int(batch): [*times] for batch, times in state.items()}
        self.interrupt()


def fit_line(points: Iterable[tuple[float, float, float]]) -> StepTime | str:
    """Weighted least squares through (batch size, seconds, standard error); or why it says nothing.

    The interval of t0/t1 is by the delta method. The standard errors are scaled up where the points miss the line by
    more than they say.
    """
    x, y, errors = zip(*points, strict=True)
    w = [1 / error**2 for error in errors]
    total = math.fsum(w)
    x_mean, y_mean = (math.fsum(a * b for a, b in zip(w, v, strict=True)) / total for v in (x, y))
    spread = math.fsum(a * (b - x_mean) ** 2 for a, b in zip(w, x, strict=True))
    slope = math.fsum(a * (b - x_mean) * (c - y_mean) for a, b, c in zip(w, x, y, strict=True)) / spread
    start = y_mean - slope * x_mean
    misfit = math.fsum(a * (c - start - slope * b) ** 2 for a, b, c in zip(w, x, y, strict=True))
    scale = max(1.0, misfit / max(len(x) - 2, 1))
    var_slope, cov, var_start = scale / spread, -scale * x_mean / spread, scale * (1 / total + x_mean**2 / spread)
    if slope <= 1.96 * math.sqrt(var_slope):
        return f"step time does not clearly grow with the batch from {x[0]:g} to {x[-1]:g} examples"
    ratio = start / slope
    error = 1.96 * math.sqrt(max(var_start - 2 * ratio * cov + ratio**2 * var_slope, 0.0)) / slope
    return StepTime(start, slope, Interval(max(ratio - error, 0.0), max(ratio + error, 0.0)))


def _median(times: list[float]) -> tuple[float, float]:
    """The median and its standard error, both robust: 1.4826 is sd/MAD, 1.2533 se(median)/se(mean) of a Gaussian."""
    middle = median(times)
    sd = 1.4826 * median(abs(t - middle) for t in times)
    return middle, math.hypot(1.2533 * sd / math.sqrt(len(times)), _FLOOR * middle)
