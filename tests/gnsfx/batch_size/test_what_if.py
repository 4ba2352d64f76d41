"""Replaying a recorded run under another policy, against sums done by hand."""

import math

import pytest

from gnsfx.batch_size import what_if
from gnsfx.batch_size.controller import BatchSizeController
from gnsfx.batch_size.run_log import Run, RunLog, read_log
from gnsfx.batch_size.schedule import BatchSizeSchedule
from gnsfx.batch_size.what_if import format_table, main, recorded, replay
from gnsfx.errors import OptionError, StateError
from tests.gnsfx.batch_size.stub_noise import StubNoise


def a_run(steps=200, batch=32, b_simple=lambda step: 100.0, every=1, band=1.2, seconds=lambda batch: None, tokens=10):
    records = []
    for step in range(every - 1, steps, every):
        b = batch(step) if callable(batch) else batch
        value = b_simple(step)
        records.append(
            {
                "kind": "step",
                "step": step,
                "batch_size": b,
                "seconds": seconds(b),
                "examples": (step + 1) * b if not callable(batch) else None,
                "tokens": (step + 1) * b * tokens if tokens and not callable(batch) else None,
                "b_simple": value,
                "b_simple_low": None if value is None else value / band,
                "b_simple_high": None if value is None else value * band,
            }
        )
    return Run({}, records)


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("other", [1, 8, 32, 100, 4096])
def test_a_constant_noise_scale_and_fixed_batches_in_closed_form(other, every):
    """steps (1 + B_s/B)^-1 is the same for both."""
    outcome = replay(a_run(every=every), other)
    expected = math.ceil(200 / (1 + 100 / 32) * (1 + 100 / other) - 1e-6)
    assert (outcome.steps, outcome.examples, outcome.tokens) == (expected, expected * other, expected * other * 10)
    assert outcome.last_batch_size == other and outcome.seconds is None
    ends = [math.ceil(200 / (1 + b / 32) * (1 + b / other) - 1e-6) * other for b in (100 / 1.2, 120)]
    assert [outcome.low, outcome.high] == sorted(ends)


def test_a_noise_scale_that_rises_is_followed_by_progress():
    """Twice: B_s = 10, then 1000. The first half of the run is most of the progress."""
    run = a_run(b_simple=lambda step: 10.0 if step < 100 else 1000.0)
    fast, slow = 100 / (1 + 10 / 32), 100 / (1 + 1000 / 32)
    outcome = replay(run, 320)
    by_hand = fast * (1 + 10 / 320) + slow * (1 + 1000 / 320)
    assert outcome.steps == pytest.approx(by_hand, abs=2)
    # A batch that starts small and ends large needs fewer examples than either fixed batch.
    ramp = replay(run, BatchSizeSchedule(examples=[(0, 8), (100 * 32 // 2, 256)], micro_batch=8))
    assert ramp.examples < replay(run, 256).examples and ramp.steps < replay(run, 8).steps


def descend(policy, until=0.0, steps=None):
    """Expected |w|^2 of SGD on |w|^2 / 2 with noise of tr(Sigma) = 4, where B_simple = 4 / |w|^2, step by step.

    The rate is the best one for each batch size, 0.02 / (1 + B_simple / B), up to one factor.
    """
    energy, records = 1.0, []
    while energy > until and (steps is None or len(records) < steps):
        batch, b_simple = policy.batch_size, 4 / energy
        records.append({"kind": "step", "step": len(records), "batch_size": batch, "b_simple": b_simple})
        rate = 0.02 / (1 + b_simple / batch)
        energy = (1 - rate) ** 2 * energy + rate**2 * 4 / batch
        policy.step()
    return records, energy


@pytest.mark.parametrize("first", [16, 64])
def test_the_model_is_right_where_its_assumptions_hold(first):
    """Another run of the same problem reaches the same loss after the predicted number of steps and examples."""
    records, energy = descend(BatchSizeSchedule(examples=[(0, first)], micro_batch=4), steps=400)
    run = Run({}, records)
    for make in (
        lambda: BatchSizeSchedule(examples=[(0, 128)], micro_batch=4),
        lambda: BatchSizeSchedule.linear(4, 64, examples=8000, micro_batch=4),
        lambda: BatchSizeSchedule.linear(64, 8, examples=8000, micro_batch=4),
    ):
        real, _ = descend(make(), until=energy)
        outcome = replay(run, make())
        assert outcome.steps == pytest.approx(len(real), rel=0.01)
        assert outcome.examples == pytest.approx(sum(record["batch_size"] for record in real), rel=0.01)


def test_the_recorded_policy_gives_the_recorded_run():
    run = a_run(seconds=lambda batch: 0.5)
    same, was = replay(run, 32), recorded(run)
    assert (same.steps, same.examples, same.tokens) == (was.steps, was.examples, was.tokens) == (200, 6400, 64000)
    assert was.seconds == pytest.approx(100)


def test_a_controller_reads_the_recorded_noise_scale():
    run = a_run(steps=2000, b_simple=lambda step: 50.0 + step)
    seen = []

    def make(noise):
        seen.append(BatchSizeController(noise, micro_batch=8, bounds=(8, 512), warm_up=0))
        return seen[-1]

    outcome = replay(run, make, name="closed loop")
    assert outcome.name == "closed loop" and len(seen) == 3  # and both ends of the band
    final = 50 + 2000
    assert outcome.last_batch_size == 512 and final / 1.2 > 512
    reasons = [change.reason for change in seen[0].changes]
    assert reasons and all("B_simple = " in why and " is above " in why for why in reasons)
    with pytest.raises(OptionError, match="give a function that makes it"):
        replay(run, seen[0])


def test_time_comes_from_the_log_or_from_the_caller():
    run = a_run(batch=lambda step: 16 if step < 100 else 64, seconds=lambda batch: 0.3 + 0.01 * batch)
    outcome = replay(run, 32)
    assert outcome.seconds == pytest.approx(outcome.steps * (0.3 + 0.32), rel=1e-3)
    assert replay(run, 32, step_time=(1.0, 0.1)).seconds == pytest.approx(outcome.steps * 4.2)


def test_early_steps_without_a_noise_scale_take_the_first_one():
    run = a_run(b_simple=lambda step: None if step < 50 else 100.0)
    assert replay(run, 64) == replay(a_run(), 64)


def test_without_a_band_there_is_none():
    run = a_run()
    for record in run.steps:
        record["b_simple_high"] = None
    assert (replay(run, 64).low, replay(run, 64).high) == (None, None)


def test_a_schedule_is_left_as_it_is():
    schedule = BatchSizeSchedule.linear(8, 64, tokens=20_000, micro_batch=8)
    schedule.step(tokens=50_000)
    outcome = replay(a_run(), schedule)
    assert schedule.steps == 1 and outcome == replay(a_run(), schedule) and outcome.last_batch_size == 64
    with pytest.raises(OptionError, match="the log has none"):
        replay(a_run(tokens=None), schedule)


def test_a_log_that_says_nothing():
    for run in (Run({}, []), a_run(b_simple=lambda step: None), a_run(batch=0)):
        with pytest.raises(StateError, match="no line with a batch_size and a b_simple"):
            replay(run, 8)
    with pytest.raises(OptionError, match="more than max_steps=10"):
        replay(a_run(), 8, max_steps=10)


@pytest.fixture
def log(tmp_path):
    path, noise = tmp_path / "run.jsonl", StubNoise(100.0, (80, 130))
    policy = BatchSizeSchedule(examples=[(0, 16), (1600, 32)], micro_batch=16)
    with RunLog(path) as file:
        for step in range(200):
            used = policy.batch_size
            policy.step(tokens=used * 10)
            file.write(step=step, noise=noise, policy=policy, seconds=0.1 + 0.01 * used)
    return path


def test_the_command_line(log, capsys):
    arguments = "--fixed 64 --linear 16:256:1e4 --ratio 1.0 --ratio 0.5 --micro-batch 16 --bounds 16:512 --time".split()
    assert main([str(log), *arguments]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["policy", "steps", "examples", "band"]
    names = ["recorded", "fixed 64", "linear 16:256:1e4", "ratio 1", "ratio 0.5", "time-optimal"]
    assert [row[: len(name)] for row, name in zip(rows, names, strict=True)] == names
    run = read_log(log)
    assert recorded(run).examples == 1600 + 32 * 100 and recorded(run).seconds == pytest.approx(100 * 0.26 + 100 * 0.42)

    log.write_bytes(log.read_bytes()[:-9])
    assert main([str(log), "--fixed", "64"]) == 0
    assert "note: " in (told := capsys.readouterr()).err and "not whole" in told.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--linear", "16:256"], "--linear 16:256: expected 3 numbers"),
        (["--linear", "16:256:lots"], "expected 3 numbers"),
        (["--linear", "17:31:1e4", "--micro-batch", "16"], "Nearest possible: 16 and 32"),
        (["--ratio", "1", "--bounds", "3:5", "--micro-batch", "16"], "Nearest possible: 16"),
        (["--fixed", "0"], "a fixed batch size of 0: expected a positive number of examples"),
        (["--fixed", "64", "--step-time", "1:0"], "expected t0 >= 0 in seconds and t1 > 0 in seconds per example"),
    ],
)
def test_bad_input_is_one_line(log, arguments, complaint, capsys):
    assert main([str(log), *arguments]) == 2
    told = capsys.readouterr()
    assert complaint in told.err and told.err.startswith("what_if: ") and told.err.count("\n") == 1 and not told.out
    assert main([str(log) + "x"]) == 2


def test_without_step_times_the_table_says_so(tmp_path, capsys):
    noise = StubNoise(100.0, (80, 130))
    with RunLog(tmp_path / "run.jsonl") as file:
        for step in range(20):
            file.write(step=step, noise=noise, batch_size=16, examples=16 * step + 16, seconds=0.1)
    path = str(tmp_path / "run.jsonl")
    assert main([path, "--fixed", "64"]) == 0 and "give --step-time" in capsys.readouterr().out
    assert main([path, "--time"]) == 2 and "give --step-time" in capsys.readouterr().err
    assert main([path, "--time", "--step-time", "0.1:0.01"]) == 0


def test_the_table_lines_up():
    lines = format_table([recorded(a_run()), replay(a_run(), 4096)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert what_if.__doc__ and "no log can check" in what_if.__doc__
