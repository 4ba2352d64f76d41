"""A training run as a file of JSON objects, one per line, that survives whatever ends the run.

    {"kind": "header", "schema": "gnsfx.run/1", "units": {...}, "settings": {...}}
    {"kind": "step", "step": 120, "batch_size": 64, "b_simple": 212.3, "b_simple_low": 160.1, "b_simple_high": null, ...}

What is not known is null. ``b_simple_high`` is null too while the data bound B_simple from below only; ``unbounded``
tells. Each line is flushed. A file that exists is gone on with, under another header.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor

from gnsfx.batch_size.policy import BatchPolicy, Change, Stage
from gnsfx.errors import GnsWarning, OptionError, StateError
from gnsfx.noise.intervals import Interval
from gnsfx.noise.noise_scale import NoiseScale

SCHEMA = "gnsfx.run/1"
UNITS = {
    "batch_size": "examples per step, over all ranks",
    "examples": "all so far",
    "tokens": "all so far",
    "seconds": "per step",
    "b_simple": "examples",
    "b_simple_low": "examples",
    "b_simple_high": "examples",
    "tr_sigma": "gradient squared, per example",
    "g_sq": "gradient squared",
    "pair": "of this step alone: tr_sigma, g_sq, their weight (freedom) and examples",
}


class RunLog:
    """Append a line per step to ``path``.

    Use::

        with RunLog("run.jsonl", settings={"lr": 1e-3}) as log:
            measured = noise.step()
            log.write(step=step, noise=noise, measured=measured, policy=schedule, loss=loss.item())

    Writing reads the noise scale, which waits for the device: every tenth step is often enough.

    Raises:
        StateError: ``path`` exists and is not such a log.
    """

    def __init__(self, path: str | Path, *, settings: Mapping[str, Any] | None = None, level: float = 0.95) -> None:
        self.path, self.level = Path(path), level
        torn = False
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb") as existing:
                _check_header(existing.readline().decode("utf-8", "replace"), self.path)
                existing.seek(-1, 2)
                torn = existing.read(1) != b"\n"
        self._file = self.path.open("a", encoding="utf-8")
        self._last: tuple[int, float] | None = None  # step and time of the last line
        self._logged_changes = 0
        if torn:  # what was half-written stays a line of its own
            self._file.write("\n")
        self._put(
            {"kind": "header", "schema": SCHEMA, "units": UNITS, "level": level, "settings": dict(settings or {})}
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; every line is already in it."""
        self._file.close()

    def write(
        self,
        *,
        step: int,
        noise: NoiseScale | None = None,
        measured: Any = None,
        policy: BatchPolicy | None = None,
        examples: int | None = None,
        tokens: int | None = None,
        seconds: float | None = None,
        batch_size: int | None = None,
        **scalars: Any,
    ) -> None:
        """One line.

        Args:
            step: steps done before this one; read_log puts lines in order by it.
            noise: averages and interval are written.
            measured: what ``noise.step()`` returned: the pair of this step.
            policy: schedule or controller, after its ``step()``: its changes since the last line are written, and
                examples, tokens and batch size, where not given.
            examples, tokens: so far. batch_size: of this step, in examples.
            seconds: per step; the time since the last line, divided by the steps, unless given.
            scalars: anything else: numbers, texts, lists of these. A tensor of one number is one.

        Raises:
            OptionError: a scalar that JSON cannot hold, by name; or a step that is no whole number.
        """
        if isinstance(step, bool) or not isinstance(step, Integral):
            raise OptionError(f"RunLog.write(step={step!r}): expected a whole number, the steps done before this one.")
        changes = policy.changes[self._logged_changes :] if policy is not None else []
        if policy is not None:
            examples = policy.examples if examples is None else examples
            tokens = policy.tokens if tokens is None else tokens
            last = policy.changes[-1] if policy.changes else None
            used = last.before if last is not None and last.step == policy.steps else policy.batch_size
            batch_size = used if batch_size is None else batch_size
        elif batch_size is None and measured is not None:
            batch_size = measured.examples
        now = time.perf_counter()
        if seconds is None and self._last is not None and step > self._last[0]:
            seconds = (now - self._last[1]) / (step - self._last[0])
        record: dict[str, Any] = {"kind": "step", "step": step, "batch_size": batch_size}
        record |= {"examples": examples, "tokens": tokens, "seconds": seconds}
        if noise is not None:
            low, high = noise.interval(self.level)
            known = Interval(low, high).detected
            record |= {
                "b_simple": noise.b_simple,
                "b_simple_low": low if known else None,
                "b_simple_high": high,
                "unbounded": math.isinf(high),
                "tr_sigma": noise.tr_sigma,
                "g_sq": noise.g_sq,
            }
        if measured is not None:
            pair = {"tr_sigma": measured.tr_sigma, "g_sq": measured.g_sq, "examples": measured.examples}
            record["pair"] = pair | {"freedom": getattr(measured, "freedom", max(measured.examples - 1, 0))}
        if changes:
            record["changes"] = [dataclasses.asdict(change) for change in changes]
        if taken := scalars.keys() & {*record, "pair", "changes"}:
            raise OptionError(f"RunLog.write: {', '.join(sorted(taken))} is written already; use another name.")
        self._put(record | scalars)
        self._last, self._logged_changes = (step, now), self._logged_changes + len(changes)

    def _put(self, record: Mapping[str, Any]) -> None:
        plain = {key: _plain(value, key) for key, value in record.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()


@dataclass(frozen=True, slots=True)
class Run:
    """A log that was read. steps: the records of kind "step", in order. notices: what was wrong with the file."""

    header: dict[str, Any]
    steps: list[dict[str, Any]]
    notices: list[str] = field(default_factory=list)

    @property
    def changes(self) -> list[Change]:
        """Every change of the batch size, in order. A resumed run writes those before it again."""
        found = (Change(**change) for record in self.steps for change in record.get("changes", ()))
        return [*{change.step: change for change in found}.values()]

    @property
    def stages(self) -> list[Stage]:
        """The batch sizes of the run, for :mod:`gnsfx.batch_size.export`; from its lines where it had no policy."""
        lines = [record for record in self.steps if record.get("batch_size")]
        if not lines:
            return []
        first, later = lines[0]["batch_size"], []
        if changes := self.changes:
            first = changes[0].before
            later = [Stage(change.after, change.step, change.examples, change.tokens) for change in changes]
        else:
            for before, now in pairwise(lines):
                if now["batch_size"] != before["batch_size"]:
                    begin = before["step"] + 1, before.get("examples"), before.get("tokens")
                    later.append(Stage(now["batch_size"], *begin))
        return [Stage(first, 0, 0, 0 if lines[0].get("tokens") is not None else None), *later]


def read_log(path: str | Path) -> Run:
    """Read a log. A run that was resumed at an earlier step counts from there on as the later part says.

    Warns (GnsWarning) of lines that are not whole, such as the last one of a run that was killed, and leaves them out.

    Raises:
        StateError: no such log, or one of another schema.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    header = _check_header(lines[0], path)
    steps: list[dict[str, Any]] = []
    notices: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _record(line)
        if record is None:
            end = "the last line is" if number == len(lines) else f"line {number} is"
            notices.append(f"{path}: {end} not whole and was left out; was the run interrupted?")
        elif record.get("kind") == "header":
            header = _check_header(line, path)
        elif record.get("kind") == "step" and isinstance(record.get("step"), int):
            while steps and steps[-1]["step"] >= record["step"]:
                steps.pop()
            steps.append(record)
    for notice in notices:
        warnings.warn(notice, GnsWarning, stacklevel=2)
    return Run(header, steps, notices)


def scalars(
    noise: NoiseScale, policy: BatchPolicy | None = None, prefix: str = "gns", level: float = 0.95
) -> dict[str, float]:
    """Names with slashes and numbers, for TensorBoard, Weights & Biases and others; what is not known is left out.

    In TensorBoard: ``for name, value in scalars(noise).items(): writer.add_scalar(name, value, step)``.
    """
    low, high = noise.interval(level)
    values = {
        "b_simple": noise.b_simple,
        "b_simple_lo": low if Interval(low, high).detected else math.nan,
        "b_simple_hi": high,
        "tr_sigma": noise.tr_sigma,
        "g_sq": noise.g_sq,
        "examples": noise.examples,
        "coverage": getattr(noise, "coverage_share", math.nan),
    }
    if policy is not None:
        values |= {"batch_size": policy.batch_size, "accumulation": policy.accumulation, "lr_scale": policy.lr_scale}
    return {f"{prefix}/{name}": float(value) for name, value in values.items() if math.isfinite(value)}


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _check_header(line: str, path: str | Path) -> dict[str, Any]:
    found = (_record(line) or {}).get("schema")
    if found != SCHEMA:
        what = f"schema {found!r}" if found else "no schema"
        raise StateError(f"{path}: expected a log of schema {SCHEMA!r}, found {what} in a header. Use another file.")
    return json.loads(line)


def _plain(value: Any, name: str) -> Any:
    """As JSON holds it: NaN and infinity are null."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):  # also those of numpy
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, name) for inner in value]
    if isinstance(value, Path):
        return str(value)
    raise OptionError(f"RunLog: {name}={value!r} is not a number, a text or a list of these.")
