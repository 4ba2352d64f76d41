"""Calibration: the fit finds the constants that made the timings, and the program says what it does."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch

from gnsfx import calibrate
from gnsfx.calibrate import FITTED, SHAPES, Timing, errors, fastest, fit, main, measure, probes
from gnsfx.kernels.cost import Cost, matmul_paths, seconds
from gnsfx.kernels.machine import MACHINES, cache_file, fingerprint, machine_for

SHIPPED = MACHINES["cpu"]
CPU = torch.device("cpu")
SLOW = replace(SHIPPED, **{name: getattr(SHIPPED, name) * (0.5, 0.8, 1.7)[i % 3] for i, name in enumerate(FITTED)})


def timings(machine, dtypes=(torch.float32, torch.bfloat16, torch.float64)):
    """What a clock would show on this machine if the model were the truth."""
    found = [
        Timing("copy", c, torch.float32, seconds(c, machine, torch.float32)) for c in (Cost(bytes=1e9), Cost(calls=20))
    ]
    for dtype, (B, T, I, O) in itertools.product(dtypes, SHAPES):
        for path, cost in matmul_paths(B, 1, T, I, O, dtype.itemsize, "cpu", True).items():
            found.append(Timing(path, cost, dtype, seconds(cost, machine, dtype)))
    return found


def ticking(step: float):
    return itertools.count(0, step).__next__


def test_the_fit_finds_the_constants_that_made_the_timings():
    found = fit(timings(SLOW), SHIPPED)
    assert max(errors(timings(SLOW), found)) < 0.03 < max(errors(timings(SLOW), SHIPPED))
    for name in FITTED:
        assert getattr(found, name) == pytest.approx(getattr(SLOW, name), rel=0.2), name
    assert found.measured and found.reused_bytes == SHIPPED.reused_bytes


def test_what_no_timing_tells_stays_as_shipped():
    found = fit(timings(SLOW, (torch.float32,)), SHIPPED)
    assert found.flops_fp64 == pytest.approx(SHIPPED.flops_fp64)
    assert found.flops_fp32 == pytest.approx(SLOW.flops_fp32, rel=0.2)
    nothing = fit([], SHIPPED)
    assert all(getattr(nothing, name) == pytest.approx(getattr(SHIPPED, name)) for name in FITTED)


def test_the_fit_never_leaves_the_positive_numbers():
    absurd = [replace(t, seconds=1e-9 if i % 2 else 1.0) for i, t in enumerate(timings(SLOW))]
    assert all(getattr(fit(absurd, SHIPPED), name) > 0 for name in FITTED)


def test_measurements_follow_the_clock_alone():
    """Two runs with the same clock are the same; every path of every shape is timed, whatever order they ran in."""
    shapes = [((2, 1, 8, 8), torch.float32), ((2, 4, 8, 16), torch.float32)]
    runs = []

    def run(x, g):
        return {name: (lambda name=name: runs.append(name)) for name in ("plain", "fused", "ghost")}

    first, second = (measure(CPU, SHIPPED, shapes, 2, ticking(0.5), run, iter) for _ in range(2))
    assert first == second and fit(first, SHIPPED) == fit(second, SHIPPED)
    assert [t.path for t in first] == ["copy", "calls", *["plain", "fused", "ghost"] * 2]
    assert {t.seconds for t in first} == {0.5}
    assert runs[:6] == ["plain", "fused", "ghost"] * 2  # once to warm up, then in turns


def test_the_fastest_round_counts():
    clock = iter([0, 5, 10, 12, 20, 23]).__next__  # rounds of 5, 2 and 3 seconds
    assert fastest({"a": lambda: None}, CPU, 3, clock) == {"a": 2}


def test_real_paths_agree_with_each_other():
    """What is timed is what the paths do."""
    x, g = calibrate.factors((3, 5, 8, 6), torch.float32, CPU)
    runs = calibrate.paths(x, g)
    gradient = runs.pop("plain")()
    norms = torch.einsum("bti,bto->bio", x, g).square().sum((1, 2))
    for run in runs.values():
        found, sq_norms = run()
        torch.testing.assert_close(found.reshape(8, 6), gradient)
        torch.testing.assert_close(sq_norms, norms)
    assert len(probes(CPU, 1, ticking(1.0))) == 2


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The program with a model in place of the clock, and a cache of its own."""
    monkeypatch.setenv("GNSFX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "measure", lambda *_, **__: timings(SLOW))
    return tmp_path / "cache"


def test_the_program_writes_what_later_runs_read(quick, capsys, monkeypatch, real_read):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert f"written to {cache_file('cpu')}" in out and "flops_fp32" in out and "off by" in out
    monkeypatch.setattr("gnsfx.kernels.machine.read", real_read)
    machine_for.cache_clear()
    assert machine_for("cpu").bandwidth == pytest.approx(SLOW.bandwidth, rel=0.2)
    machine_for.cache_clear()


def test_what_a_busy_machine_measures_is_not_kept(quick, capsys, monkeypatch):
    noisy = [replace(t, seconds=t.seconds * (0.2, 1, 9)[i % 3]) for i, t in enumerate(timings(SLOW))]
    monkeypatch.setattr(calibrate, "measure", lambda *args, **kwargs: noisy)
    assert main([]) == 1
    assert "busy with other work" in capsys.readouterr().err and not cache_file("cpu").exists()


def test_show_measures_nothing(quick, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "measure", None)
    assert main(["--show"]) == 0
    assert "as shipped: nothing usable in" in capsys.readouterr().out and not quick.exists()


def test_a_folder_that_cannot_be_written(quick, capsys):
    quick.write_text("a file where the folder should be")
    assert main([]) == 1
    assert "nothing was kept" in (err := capsys.readouterr().err) and "GNSFX_CACHE_DIR" in err


def test_help_and_wrong_arguments(capsys):
    for arguments, code in ((["--help"], 0), (["--device", "abacus"], 2), (["--rounds", "x"], 2)):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == code
    assert "python -m gnsfx.calibrate" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert main(["--device", "cuda"]) == 2 and "no CUDA device" in capsys.readouterr().err
    assert fingerprint("cuda")["processor"] == "none"


def test_progress_with_and_without_rich(capsys, monkeypatch):
    assert list(calibrate.follow([1, 2, 3])) == [1, 2, 3]
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    capsys.readouterr()
    assert list(calibrate.follow([1, 2, 3])) == [1, 2, 3]
    assert "measuring 3/3" in capsys.readouterr().err
