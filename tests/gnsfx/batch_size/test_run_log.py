"""The run log holds what was written, whatever ended the run, and names its units."""

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gnsfx.batch_size.policy import Stage
from gnsfx.batch_size.run_log import SCHEMA, UNITS, RunLog, read_log, scalars
from gnsfx.batch_size.schedule import BatchSizeSchedule
from gnsfx.errors import GnsWarning, OptionError, StateError
from tests.gnsfx.batch_size.stub_noise import StubNoise

PAIR = SimpleNamespace(tr_sigma=3.0, g_sq=-0.1, examples=16)


def schedule():
    return BatchSizeSchedule(examples=[(0, 16), (48, 32)], micro_batch=16)


def write(path, steps, policy, noise, out="a"):
    with RunLog(path, settings={"lr": 1e-3, "out": Path(out)}) as log:
        for step in steps:
            noise.tick(policy.batch_size)
            policy.step(tokens=policy.batch_size * 10)
            log.write(step=step, noise=noise, measured=PAIR, policy=policy, loss=torch.tensor(0.5 + step), seconds=0.1)


def test_what_is_written_is_read(tmp_path):
    policy, noise = schedule(), StubNoise(100.0, (80, 130))
    write(tmp_path / "run.jsonl", range(6), policy, noise)
    first = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[0])
    assert first["schema"] == SCHEMA and first["units"] == UNITS and first["settings"] == {"lr": 1e-3, "out": "a"}
    run = read_log(tmp_path / "run.jsonl")
    assert run.notices == [] and [record["step"] for record in run.steps] == [*range(6)]
    assert [record["batch_size"] for record in run.steps] == [16, 16, 16, 32, 32, 32]
    record = run.steps[2]
    assert (record["examples"], record["tokens"], record["loss"], record["seconds"]) == (48, 480, 2.5, 0.1)
    assert (record["b_simple"], record["b_simple_low"], record["b_simple_high"]) == (100.0, 80, 130)
    assert record["unbounded"] is False
    assert record["pair"] == {"tr_sigma": 3.0, "g_sq": -0.1, "examples": 16, "freedom": 15}
    assert run.changes == policy.changes and run.stages == policy.stages
    assert [len(record.get("changes", ())) for record in run.steps] == [0, 0, 1, 0, 0, 0]


def test_every_line_is_in_the_file_at_once(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write(step=0, loss=1.0)
        assert read_log(tmp_path / "run.jsonl").steps[0]["loss"] == 1.0


@pytest.mark.parametrize(
    ("b_simple", "interval", "low", "high", "unbounded"),
    [
        (100.0, (80, 130), 80, 130, False),
        (math.nan, (80, math.inf), 80, None, True),
        (math.nan, (0, math.inf), None, None, True),
        (5.0, (0, 9), 0, 9, False),
    ],
)
def test_what_is_not_known_is_null_and_left_out_of_scalars(tmp_path, b_simple, interval, low, high, unbounded):
    noise = StubNoise(b_simple, interval)
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write(step=0, noise=noise, loss=math.nan)
    (record,) = read_log(tmp_path / "run.jsonl").steps
    assert (record["b_simple_low"], record["b_simple_high"], record["unbounded"]) == (low, high, unbounded)
    assert record["loss"] is None
    named = scalars(noise)
    assert ("gns/b_simple" in named) == math.isfinite(b_simple)
    assert (named.get("gns/b_simple_lo"), named.get("gns/b_simple_hi")) == (low, high)
    assert all(type(value) is float for value in named.values())


def test_scalars_of_a_policy():
    named = scalars(StubNoise(100.0, (80, 130)), schedule(), prefix="train/gns")
    assert named["train/gns/batch_size"] == 16 and named["train/gns/lr_scale"] == 1
    assert named["train/gns/b_simple_hi"] == 130


def test_a_run_killed_while_writing_is_read_up_to_there_and_goes_on(tmp_path):
    path, policy, noise = tmp_path / "run.jsonl", schedule(), StubNoise(100.0, (80, 130))
    write(path, range(6), policy, noise)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.warns(GnsWarning, match="the last line is not whole and was left out"):
        run = read_log(path)
    assert [record["step"] for record in run.steps] == [*range(5)] and len(run.notices) == 1

    policy, noise = schedule(), StubNoise(100.0, (80, 130))
    policy.step(tokens=160), policy.step(tokens=160)  # as of a checkpoint after two steps
    write(path, range(2, 8), policy, noise, out="b")
    with pytest.warns(GnsWarning, match="line 7 is not whole"):
        run = read_log(path)
    assert [record["step"] for record in run.steps] == [*range(8)]
    assert run.changes == policy.changes and len(run.changes) == 1
    assert run.header["settings"]["out"] == "b"


@pytest.mark.parametrize("cut", range(1, 200, 7))
def test_any_cut_is_tolerated(tmp_path, cut):
    path, policy = tmp_path / "run.jsonl", schedule()
    write(path, range(4), policy, StubNoise(100.0, (80, 130)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = read_log(path)
    # Cut off just the newline, the line is still whole.
    assert len(told) == len(run.notices) == (cut > 1)
    assert len(run.steps) == (4 if cut == 1 else 3)


def test_seconds_are_measured_unless_given(tmp_path, monkeypatch):
    clock = iter([10.0, 14.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    with RunLog(tmp_path / "run.jsonl") as log:
        for step in (0, 8, 9):
            log.write(step=step, batch_size=4)
    assert [record["seconds"] for record in read_log(tmp_path / "run.jsonl").steps] == [None, 0.5, 1.0]


@pytest.mark.parametrize("text", ['{"kind": "header", "schema": "gnsfx.run/9"}\n', '{"loss": 1}\n', "epoch,loss\n"])
def test_other_files_are_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    for use in (read_log, RunLog):
        with pytest.raises(StateError, match=r"expected a log of schema 'gnsfx.run/1'"):
            use(path)
    assert path.read_text() == text


def test_bad_scalars_are_named(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        with pytest.raises(OptionError, match="grad="):
            log.write(step=0, grad=torch.zeros(3))
        with pytest.raises(OptionError, match="g_sq is written already"):
            log.write(step=0, noise=StubNoise(1.0, (1, 2)), g_sq=3)
        with pytest.raises(OptionError, match="changes is written already"):
            log.write(step=0, changes="many")
        with pytest.raises(OptionError, match=r"step=1\.0\): expected a whole number"):
            log.write(step=1.0)
    assert read_log(tmp_path / "run.jsonl").steps == []


def test_numbers_of_numpy_are_numbers(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write(step=np.int64(3), loss=np.float32(0.5), best=np.float64("inf"))
    (record,) = read_log(tmp_path / "run.jsonl").steps
    assert (record["step"], record["loss"], record["best"]) == (3, 0.5, None)


def test_stages_of_a_run_without_a_policy_are_those_of_its_lines(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        for step, batch in enumerate([16, 16, 32, 32, 64]):
            log.write(step=step, batch_size=batch, examples=(16, 32, 64, 96, 160)[step])
    assert read_log(tmp_path / "run.jsonl").stages == [Stage(16, 0, 0), Stage(32, 2, 32), Stage(64, 4, 96)]
