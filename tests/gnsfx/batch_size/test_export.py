"""Schedules in the form of other tools: read back as these tools read them, they are the schedule."""

import csv
import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnsfx.batch_size.export import (
    to_csv,
    to_levanter,
    to_lightning,
    to_megatron,
    to_olmo,
    to_table,
    with_steps,
    with_tokens,
)
from gnsfx.batch_size.policy import Stage
from gnsfx.batch_size.schedule import BatchSizeSchedule
from gnsfx.errors import GnsWarning, OptionError

DOUBLINGS = [Stage(768, 0, 0, 0), Stage(1536, 120, 92_160, 250 * 10**9), Stage(3072, 300, 368_640, 500 * 10**9)]


def test_the_forms():
    assert to_megatron(DOUBLINGS) == "0:768 250B:1536 500B:3072"
    assert to_megatron(DOUBLINGS, "examples") == "0:768 92160:1536 368640:3072"
    assert to_levanter(DOUBLINGS) == [
        {"start": 0, "value": 768},
        {"start": 120, "value": 1536},
        {"start": 300, "value": 3072},
    ]
    assert to_olmo(DOUBLINGS, tokens_per_example=1024) == {
        "batch_sizes": [768 * 1024, 1536 * 1024, 3072 * 1024],
        "schedule": [0, 250 * 10**9, 500 * 10**9],
    }
    assert to_lightning(DOUBLINGS, batches_per_epoch=360, micro_batch=64, world_size=4) == {0: 3, 1: 6, 4: 12}
    lines = to_table(DOUBLINGS).splitlines()
    assert lines[2].split() == ["120", "92,160", "250,000,000,000", "1,536"]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert to_table([Stage(8, examples=0)]).splitlines()[1].split() == ["-", "0", "-", "8"]
    rows = [*csv.DictReader(io.StringIO(to_csv([*DOUBLINGS, Stage(8, tokens=7)])))]
    assert rows[1] == {
        "from_step": "120",
        "from_example": "92160",
        "from_token": "250000000000",
        "batch_size_examples": "1536",
    }
    assert rows[3]["from_step"] == ""


def megatron_reads(text, sequence_length):
    """Thresholds in samples, by the rules of Megatron-LM's num_microbatches_calculator."""
    sizes, found = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}, []
    for entry in text.split():
        threshold, batch = entry.split(":")
        factor = sizes.get(threshold[-1], 1)
        number = threshold[:-1] if threshold[-1] in sizes else threshold
        found.append((int(float(number) * factor) // sequence_length, int(batch)))
    assert found[0][0] == 0 and all(a[0] < b[0] for a, b in itertools.pairwise(found))
    return found


@given(st.integers(1, 30), st.integers(31, 60), st.integers(1, 10**12))
def test_megatron_reads_the_schedule_back(start, end, span):
    schedule = BatchSizeSchedule.linear(8 * start, 8 * end, tokens=span * 1000, micro_batch=8)
    plan = schedule.plan
    found = megatron_reads(to_megatron(plan), sequence_length=1)
    assert found == [(stage.tokens, stage.batch_size) for stage in plan]


def test_steps_and_tokens_follow_from_examples():
    schedule = BatchSizeSchedule.linear(16, 64, examples=1000, micro_batch=16)
    stages = with_steps(with_tokens(schedule.plan, 128))
    for _ in range(60):
        schedule.step(tokens=schedule.batch_size * 128)
    assert [stage.batch_size for stage in stages] == [16, 32, 48, 64]
    assert all(stage.tokens == 128 * stage.examples for stage in stages)
    # What the loop did comes at most one step of the batch before later, for each change so far.
    for i, (planned, ran) in enumerate(zip(stages, schedule.stages, strict=True)):
        assert abs(planned.step - ran.step) <= i and 0 <= ran.examples - planned.examples < 64
    waits = with_steps([Stage(16, examples=0), Stage(32, examples=100), Stage(64, examples=101)])
    assert [stage.step for stage in waits] == [0, 7, 8]  # 100 examples are over after 7 steps of 16
    in_tokens = BatchSizeSchedule(tokens=[(0, 8), (1000, 16)], micro_batch=8).plan
    assert with_tokens(in_tokens, 64)[1].examples == 16


def test_lightning_moves_changes_to_epochs_and_says_so():
    stages = [Stage(8, 0, 0), Stage(16, 10, 120), Stage(24, 20, 160), Stage(32, 30, 260)]
    with pytest.warns(GnsWarning) as told:
        factors = to_lightning(stages, batches_per_epoch=20, micro_batch=8)
    assert factors == {0: 1, 1: 3, 2: 4}
    # Less than a step is not worth a word: changes wait for the step to end anyway.
    assert to_lightning([Stage(8, 0, 0), Stage(16, 20, 155)], batches_per_epoch=20, micro_batch=8) == {0: 1, 1: 2}
    assert str(told[0].message) == (
        "Lightning changes the accumulation between epochs only. Moved: batch 16 from epoch 0.75 to 1; batch 24 from "
        "epoch 1.00 to 1, in place of another batch size; batch 32 from epoch 1.62 to 2."
    )


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: to_megatron([Stage(8, 0)]), "needs the tokens"),
        (lambda: to_megatron([Stage(8, tokens=5)]), "expected to begin at 0"),
        (lambda: to_megatron(DOUBLINGS, "sequences"), "unit='sequences'"),
        (lambda: to_megatron([]), "needs the tokens"),
        (lambda: to_levanter([Stage(8, tokens=0)]), "needs the step"),
        (lambda: to_olmo([Stage(16, tokens=0), Stage(24, tokens=9)], tokens_per_example=1), "from 16 to 24 examples"),
        (lambda: to_lightning(DOUBLINGS, batches_per_epoch=1, micro_batch=7), "768 is no multiple of 7"),
    ],
)
def test_what_a_form_cannot_say_is_refused(make, complaint):
    with pytest.raises(OptionError, match=complaint):
        make()
