"""What another batch size policy would have done on a run that was recorded.

    progress of one step of batch size B:  1 / (1 + B_simple / B)       1: a step with the true gradient
    the run, step by step              ->  B_simple as a function of progress
    another policy, until the same progress -> its steps, examples, tokens and time (t0 + t1 B per step)

    python -m gnsfx.batch_size.what_if run.jsonl --fixed 64 --linear 16:256:1e6 --ratio 1.0

Source: McCandlish et al., arXiv 1812.06162, section 2.2. What this assumes, and no log can check:

- the loss depends on progress alone, so that runs at equal progress have equal loss; the formula is exact for small
  steps on a quadratic loss with the same curvature in all directions, B_simple standing in for B_noise;
- each batch size runs with its own best learning rate; B_simple does not depend on batch size or learning rate (in
  truth it depends on the learning rate: compare policies that couple it alike);
- generalisation, epochs and warm-up are the same.

Differences of some percent mean nothing. The band repeats all of it with the low and the high end of B_simple. The
first steps, before B_simple is detected, take its first value.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gnsfx.batch_size.controller import BatchSizeController, NoiseReading
from gnsfx.batch_size.policy import BatchPolicy
from gnsfx.batch_size.run_log import Run, read_log
from gnsfx.batch_size.schedule import BatchSizeSchedule
from gnsfx.batch_size.step_time import StepTime, StepTimes, given
from gnsfx.errors import GnsError, OptionError, StateError
from gnsfx.noise.intervals import UNKNOWN, Interval

Policy = int | BatchPolicy | Callable[[NoiseReading], BatchPolicy]


class Outcome(NamedTuple):
    """What a policy needs until the progress of the recorded run. tokens, seconds: None where not known.

    low, high: the number of examples if B_simple lay at the ends of its interval; None without an interval.
    """

    name: str
    steps: int
    examples: int
    tokens: int | None
    seconds: float | None
    last_batch_size: int
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True, slots=True)
class _Knot:
    """B_simple and its interval from some progress on; ends NaN where not known."""

    progress: float
    b_simple: float
    low: float
    high: float


class RecordedNoise:
    """B_simple of a recorded run, as a function of progress: what a controller would have read. Not a NoiseScale."""

    process_group = None
    skipped = 0

    def __init__(self, knots: Sequence[_Knot]) -> None:
        self._knots = knots
        self._starts = [knot.progress for knot in knots]
        self.progress, self.steps, self.examples = 0.0, 0, 0

    @property
    def _knot(self) -> _Knot:
        return self._knots[max(bisect_right(self._starts, self.progress) - 1, 0)]

    @property
    def b_simple(self) -> float:
        return self._knot.b_simple

    def interval(self, level: float = 0.95) -> Interval:
        """Of the level that was recorded, whatever ``level``."""
        knot = self._knot
        if math.isnan(knot.low):
            return UNKNOWN
        return Interval(knot.low, math.inf if math.isnan(knot.high) else knot.high)

    def take(self, batch_size: int) -> None:
        """One step."""
        self.progress += step_progress(batch_size, self.b_simple)
        self.steps += 1
        self.examples += batch_size


def step_progress(batch_size: float, b_simple: float) -> float:
    """Progress of one step, in steps with the true gradient. Both in examples."""
    return batch_size / (batch_size + b_simple)


def replay(
    run: Run,
    policy: Policy,
    *,
    name: str = "",
    step_time: tuple[float, float] | None = None,
    max_steps: int = 10_000_000,
) -> Outcome:
    """What ``policy`` would have needed to make the progress of ``run``.

    Args:
        run: from :func:`gnsfx.batch_size.run_log.read_log`.
        policy: a fixed batch size in examples; a schedule, which is left as it is; or a function that makes the policy
            from the noise scale, such as ``lambda noise: BatchSizeController(noise, ...)``.
        step_time: (t0 in seconds, t1 in seconds per example); fitted to the log unless given.

    Raises:
        StateError: the log holds no noise scale or no batch sizes.
        OptionError: more than ``max_steps`` steps are needed.
    """
    if isinstance(policy, BatchSizeSchedule) and policy.counts == "tokens" and _tokens_per_example(run) is None:
        raise OptionError("the schedule counts tokens, but the log has none: make it count examples (--unit examples).")
    times = _step_time(run, step_time)
    spans = [*_spans(run)]
    outcome = _simulate(run, _knots(spans, "b_simple"), policy, name, times, max_steps)
    ends = [
        _simulate(run, _knots(spans, end), policy, name, times, max_steps).examples if _known(spans, end) else None
        for end in ("low", "high")
    ]
    low, high = sorted(ends, key=lambda x: math.inf if x is None else x)
    return outcome._replace(low=low, high=high) if None not in ends else outcome


def recorded(run: Run) -> Outcome:
    """The run itself, in the same form."""
    spans = [*_spans(run)]
    examples = run.steps[-1].get("examples") or sum(span.steps * span.batch_size for span in spans)
    per_example = _tokens_per_example(run)
    seconds = [span.seconds for span in spans]
    total = None if None in seconds else math.fsum(s.steps * (s.seconds or 0.0) for s in spans)
    tokens = None if per_example is None else round(examples * per_example)
    steps = sum(span.steps for span in spans)
    return Outcome("recorded", steps, examples, tokens, total, spans[-1].batch_size)


class _Span(NamedTuple):
    """Steps that one line of the log stands for."""

    steps: int
    batch_size: int
    seconds: float | None
    b_simple: float
    low: float
    high: float


def _spans(run: Run) -> Iterator[_Span]:
    """The run in pieces; what is not known early is filled in with the first known value."""
    lines = [record for record in run.steps if record.get("batch_size")]
    known = [record for record in lines if _number(record.get("b_simple")) > 0]
    if not known:
        raise StateError(
            f"the log of {len(run.steps)} steps holds no line with a batch_size and a b_simple: was noise= given to "
            "RunLog.write, and was the noise scale ever detected?"
        )
    current, previous = known[0], -1
    for record in lines:
        current = record if _number(record.get("b_simple")) > 0 else current
        noise = (_number(current.get(key)) for key in ("b_simple", "b_simple_low", "b_simple_high"))
        yield _Span(record["step"] - previous, record["batch_size"], record.get("seconds"), *noise)
        previous = record["step"]


def _knots(spans: Sequence[_Span], which: str) -> list[_Knot]:
    """Progress of the run under the assumption that B_simple is its estimate, or one end of its interval."""
    progress, knots = 0.0, []
    for span in spans:
        value = getattr(span, which)
        b_simple = span.b_simple if math.isnan(value) else value
        knots.append(_Knot(progress, b_simple, span.low, span.high))
        progress += span.steps * step_progress(span.batch_size, b_simple)
    return [*knots, _Knot(progress, knots[-1].b_simple, knots[-1].low, knots[-1].high)]


def _known(spans: Sequence[_Span], end: str) -> bool:
    return any(getattr(span, end) > 0 for span in spans)


def _simulate(
    run: Run, knots: Sequence[_Knot], policy: Policy, name: str, times: StepTime | None, max_steps: int
) -> Outcome:
    noise = RecordedNoise(knots)
    goal = knots[-1].progress
    actor = _actor(policy, noise)
    per_example = _tokens_per_example(run)
    seconds, tokens = 0.0, 0.0
    batch_size = actor.batch_size
    while noise.progress < goal * (1 - 1e-9):
        if noise.steps >= max_steps:
            raise OptionError(f"{name or policy}: more than max_steps={max_steps:,} steps to the progress of the run.")
        batch_size = actor.batch_size
        noise.take(batch_size)
        took = None if times is None else times.seconds(batch_size)
        seconds += took or 0.0
        before, tokens = round(tokens), tokens + batch_size * (per_example or 0.0)
        actor.step(tokens=None if per_example is None else round(tokens) - before, seconds=took or 0.0)
    return Outcome(
        name or type(actor).__name__,
        noise.steps,
        noise.examples,
        None if per_example is None else round(tokens),
        None if times is None else seconds,
        batch_size,
    )


def _actor(policy: Policy, noise: RecordedNoise) -> BatchPolicy:
    if isinstance(policy, int):
        if policy < 1:
            raise OptionError(f"a fixed batch size of {policy}: expected a positive number of examples.")
        return BatchSizeSchedule(examples=[(0, policy)], micro_batch=policy, world_size=1)
    if isinstance(policy, BatchSizeSchedule):
        return policy.fresh()
    if isinstance(policy, BatchPolicy):
        raise OptionError(
            "replay(run, controller): give a function that makes it, lambda noise: BatchSizeController(...)."
        )
    return policy(noise)


def _step_time(run: Run, known: tuple[float, float] | None) -> StepTime | None:
    if known is not None:
        return given(known)
    times = StepTimes()
    for record in run.steps:
        if record.get("batch_size") and record.get("seconds"):
            times.add(record["batch_size"], record["seconds"])
    fit = times.fit()
    return None if isinstance(fit, str) else fit


def _tokens_per_example(run: Run) -> float | None:
    last = run.steps[-1] if run.steps else {}
    tokens, examples = last.get("tokens"), last.get("examples")
    return tokens / examples if tokens and examples else None


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def format_table(outcomes: Sequence[Outcome]) -> str:
    """Columns of text; the band is that of examples, for B_simple at the ends of its interval."""
    rows = [("policy", "steps", "examples", "band", "tokens", "seconds", "last batch")]
    for o in outcomes:
        band = "-" if o.low is None else f"{o.low:,}..{o.high:,}"
        tokens, seconds = ("-" if x is None else f"{x:,.0f}" for x in (o.tokens, o.seconds))
        rows.append((o.name, f"{o.steps:,}", f"{o.examples:,}", band, tokens, seconds, str(o.last_batch_size)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)) for row in rows)
    return "\n".join(f"{row[0]:{widths[0]}}  {line}" for row, line in zip(rows, lines, strict=True))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gnsfx.batch_size.what_if",
        description="What another batch size policy would have needed for the progress of a recorded run.",
        epilog="A model, with assumptions that the log cannot check: see the documentation of gnsfx.batch_size.what_if.",
    )
    parser.add_argument("log", help="a file of gnsfx.RunLog")
    parser.add_argument("--fixed", action="append", type=int, default=[], metavar="B", help="a batch size in examples")
    parser.add_argument(
        "--linear", action="append", default=[], metavar="B0:B1:N", help="from B0 to B1 examples over N tokens"
    )
    parser.add_argument(
        "--ratio", action="append", type=float, default=[], metavar="R", help="a controller: B = R x B_simple"
    )
    parser.add_argument("--shrink", action="store_true", help="controllers may shrink the batch")
    parser.add_argument("--time", action="store_true", help="a controller: the batch size with the shortest time")
    parser.add_argument("--micro-batch", type=int, default=1, help="examples; batch sizes are multiples of it")
    parser.add_argument(
        "--bounds", metavar="LOW:HIGH", help="of controllers, in examples; 1 to 64 times the first batch"
    )
    parser.add_argument("--unit", choices=("tokens", "examples"), default="tokens", help="what N in --linear counts")
    parser.add_argument(
        "--step-time", metavar="T0:T1", help="seconds and seconds per example; fitted to the log otherwise"
    )
    return parser.parse_args(argv)


def _numbers(text: str, count: int, option: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        values = []
    if len(values) != count or not all(map(math.isfinite, values)):
        raise OptionError(f"{option} {text}: expected {count} numbers with : between them.")
    return values


def _outcomes(args: argparse.Namespace, run: Run) -> Iterator[Outcome]:
    now = recorded(run)
    yield now
    step_time = None
    if args.step_time:
        t0, t1 = _numbers(args.step_time, 2, "--step-time")
        step_time = (t0, t1)
    for batch in args.fixed:
        yield replay(run, batch, name=f"fixed {batch}", step_time=step_time)
    for text in args.linear:
        start, end, span = _numbers(text, 3, "--linear")
        unit: dict[str, Any] = {args.unit: span}
        schedule = BatchSizeSchedule.linear(start, end, **unit, micro_batch=args.micro_batch, world_size=1)
        yield replay(run, schedule, name=f"linear {text}", step_time=step_time)
    first = next(_spans(run)).batch_size
    low, high = _numbers(args.bounds, 2, "--bounds") if args.bounds else (first, 64 * first)

    def controller(noise: NoiseReading, **choice: Any) -> BatchPolicy:
        settings = {"micro_batch": args.micro_batch, "bounds": (low, high), "world_size": 1, "shrink": args.shrink}
        return BatchSizeController(noise, **settings, **choice)

    for ratio in args.ratio:
        yield replay(
            run, lambda noise, r=ratio: controller(noise, ratio=r), name=f"ratio {ratio:g}", step_time=step_time
        )
    if args.time:
        known = _step_time(run, step_time)
        if known is None:
            raise OptionError(
                "--time: the log does not tell t0 and t1, as the batch size never changed: give --step-time."
            )
        pair = (max(known.t0, 0.0), known.t1)
        yield replay(
            run,
            lambda noise: controller(noise, target="time", step_time=pair),
            name="time-optimal",
            step_time=step_time,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. 2: bad input, told in one line."""
    args = _parse(argv)
    try:
        with warnings.catch_warnings(record=True) as notices:
            warnings.simplefilter("always")
            run = read_log(args.log)
            outcomes = [*_outcomes(args, run)]
    except (GnsError, OSError) as error:
        print(f"what_if: {error}", file=sys.stderr)
        return 2
    for notice in notices:
        print(f"note: {notice.message}", file=sys.stderr)
    print(format_table(outcomes))
    if any(outcome.seconds is None for outcome in outcomes):
        print("seconds: the log does not tell t0 and t1 apart; give --step-time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
