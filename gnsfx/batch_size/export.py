"""A batch size schedule in the form that other tools take.

    stages of a schedule (``schedule.plan``) or of a finished run (``policy.stages``, ``run.stages``)
        -> a table, CSV, Lightning, Megatron-LM, OLMo-core, Levanter

A stage is a batch size and from where on it holds: in steps, in examples or in tokens. Each form says which of these it
needs; ``with_tokens`` and ``with_steps`` fill in what follows from the others.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from gnsfx.batch_size.policy import Stage
from gnsfx.batch_size.unit import BatchUnit
from gnsfx.errors import GnsWarning, OptionError


def with_tokens(stages: Iterable[Stage], tokens_per_example: float) -> list[Stage]:
    """Examples from tokens, or tokens from examples, for examples of a fixed length."""
    filled = []
    for stage in stages:
        if stage.tokens is None and stage.examples is not None:
            stage = stage._replace(tokens=round(stage.examples * tokens_per_example))
        elif stage.examples is None and stage.tokens is not None:
            stage = stage._replace(examples=math.ceil(stage.tokens / tokens_per_example))
        filled.append(stage)
    return filled


def with_steps(stages: Iterable[Stage]) -> list[Stage]:
    """Steps from examples: a change waits for the step under way to end."""
    stages = [*stages]
    begins = _positions(stages, "examples")
    step, filled = 0, stages[:1]
    for i, stage in enumerate(stages[1:], 1):
        step += max(math.ceil((begins[i] - begins[i - 1]) / stages[i - 1].batch_size), 1)
        filled.append(stage._replace(step=step))
    return [filled[0]._replace(step=0), *filled[1:]]


def to_table(stages: Iterable[Stage]) -> str:
    """Columns of text; ``-`` where a number is not known."""
    rows = [("from step", "from example", "from token", "batch size, examples")]
    rows += [
        tuple("-" if x is None else f"{x:,}" for x in (s.step, s.examples, s.tokens, s.batch_size)) for s in stages
    ]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, (12, 16, 20, 20), strict=True)) for row in rows)


def to_csv(stages: Iterable[Stage]) -> str:
    """A header and a line per stage; empty where a number is not known."""
    rows = [(s.step, s.examples, s.tokens, s.batch_size) for s in stages]
    lines = [",".join("" if x is None else str(x) for x in row) for row in rows]
    return "\n".join(["from_step,from_example,from_token,batch_size_examples", *lines, ""])


def to_lightning(
    stages: Sequence[Stage], *, batches_per_epoch: int, micro_batch: int, world_size: int = 1
) -> dict[int, int]:
    """For Lightning's ``GradientAccumulationScheduler``: {epoch: accumulation}. Needs examples.

    batches_per_epoch: length of the data loader of one rank, in micro-batches. Changes are possible between epochs only:
        they go to the nearest one, with a warning if that is a step away or more.

    Raises:
        OptionError: a batch size that is no multiple of micro_batch * world_size, or stages without examples.
    """
    unit = BatchUnit(micro_batch, world_size)
    factors: dict[int, int] = {}
    moved: list[str] = []
    per_epoch = batches_per_epoch * unit.size
    for stage, begin in zip(stages, _positions(stages, "examples"), strict=True):
        epoch = math.floor(begin / per_epoch + 0.5)
        if epoch in factors or abs(epoch * per_epoch - begin) >= stage.batch_size:
            over = ", in place of another batch size" if epoch in factors else ""
            moved.append(f"batch {stage.batch_size} from epoch {begin / per_epoch:.2f} to {epoch}{over}")
        factors[epoch] = unit.accumulation(unit.check(stage.batch_size, "batch size"))
    if moved:
        warnings.warn(
            f"Lightning changes the accumulation between epochs only. Moved: {'; '.join(moved)}.",
            GnsWarning,
            stacklevel=2,
        )
    return factors


def to_megatron(stages: Sequence[Stage], unit: str = "tokens") -> str:
    """For Megatron-LM's ``--step-batch-size-schedule``: ``"0:768 250B:1536"``, batch sizes in sequences.

    Megatron takes the thresholds as tokens if ``--seq-length`` is given, otherwise as samples: ``unit="examples"``.

    Raises:
        OptionError: stages that are not known in this unit, or do not begin at 0.
    """
    begins = _positions(stages, unit)
    return " ".join(f"{_short(at)}:{stage.batch_size}" for at, stage in zip(begins, stages, strict=True))


def to_olmo(stages: Sequence[Stage], *, tokens_per_example: int) -> dict[str, list[int]]:
    """For OLMo-core's ``BatchSizeSchedulerCallback``: batch_sizes and schedule, both in tokens.

    There the schedule is a list of ``Duration.tokens(n)``.

    Raises:
        OptionError: OLMo-core changes batch sizes by whole factors only, and here is another.
    """
    stages = with_tokens(stages, tokens_per_example)
    for before, after in pairwise(stages):
        small, large = sorted((before.batch_size, after.batch_size))
        if large % small or large == small:
            raise OptionError(
                f"OLMo-core changes the batch size by whole factors only, not from {before.batch_size} to "
                f"{after.batch_size} examples. Use a table of doublings."
            )
    return {
        "batch_sizes": [stage.batch_size * tokens_per_example for stage in stages],
        "schedule": _positions(stages, "tokens"),
    }


def to_levanter(stages: Sequence[Stage]) -> list[dict[str, int]]:
    """For Levanter's ``train_batch_size``: a list of start, in steps, and value. Needs steps (``with_steps``)."""
    begins = _positions(stages, "step")
    return [{"start": at, "value": stage.batch_size} for at, stage in zip(begins, stages, strict=True)]


def _positions(stages: Sequence[Stage], unit: str) -> list[int]:
    if unit not in ("step", "examples", "tokens"):
        raise OptionError(f"unit={unit!r}: expected 'examples' or 'tokens'.")
    found: list[Any] = [getattr(stage, unit) for stage in stages]
    if not found or None in found:
        raise OptionError(
            f"this form needs the {unit} at which each batch size begins, and they are not known: see "
            "gnsfx.batch_size.export.with_tokens and with_steps."
        )
    if found[0] != 0 or any(a >= b for a, b in pairwise(found)):
        raise OptionError(f"the batch sizes begin at {found} {unit}: expected to begin at 0 and to rise.")
    return found


def _short(number: int) -> str:
    """250000000000 as 250B, where nothing is lost."""
    for letter, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number and number % size == 0:
            return f"{number // size}{letter}"
    return str(number)
