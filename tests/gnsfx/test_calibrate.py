"""Calibration: the fit finds the constants that made the timings, and the program says what it does."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch

from gnsfx import calibrate, calibrate_cuda
from gnsfx.calibrate import FITTED, SHAPES, Timing, errors, fastest, fit, fit_table, main, measure, probes, timer_for
from gnsfx.kernels import gpu
from gnsfx.kernels.cost import Cost, matmul_paths, seconds
from gnsfx.kernels.machine import CUDA_KERNELS, MACHINES, cache_file, fingerprint, machine_for

SHIPPED, CUDA = MACHINES["cpu"], MACHINES["cuda"]
CPU = torch.device("cpu")
SLOW, SLOW_CUDA = (
    replace(m, **{name: getattr(m, name) * (0.5, 0.8, 1.7)[i % 3] for i, name in enumerate(FITTED)})
    for m in (SHIPPED, CUDA)
)


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
    return timer_for(CPU, itertools.count(0, step).__next__)


def test_the_fit_finds_the_constants_that_made_the_timings():
    found = fit(timings(SLOW), SHIPPED)
    assert max(errors(timings(SLOW), found)) < 0.03 < max(errors(timings(SLOW), SHIPPED))
    for name in set(FITTED) - set(CUDA_KERNELS):
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

    first, second = (measure(CPU, SHIPPED, shapes, ticking(0.5), 2, run) for _ in range(2))
    assert first == second and fit(first, SHIPPED) == fit(second, SHIPPED)
    assert [t.path for t in first] == ["copy", "calls", *["plain", "fused", "ghost"] * 2]
    assert {t.seconds for t in first} == {0.5}
    assert runs[:6] == ["plain", "fused", "ghost"] * 2  # once to warm up, then in turns


def test_the_fastest_round_counts():
    clock = iter([0, 5, 10, 12, 20, 23]).__next__  # rounds of 5, 2 and 3 seconds
    assert fastest({"a": lambda: None}, timer_for(CPU, clock), 3) == {"a": 2}


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
    assert len(probes(CPU, ticking(1.0), 1)) == 2


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


# ------------------------------------------------------------------------------------------------------- CUDA devices


@pytest.fixture
def kernels(monkeypatch):
    """As if our CUDA kernels ran on the CPU: there the ops run their twins."""
    monkeypatch.setattr(gpu, "kernels_on", lambda device: frozenset({"products"}))


def cuda_timings(machine):
    """What events would show on this device if the model were the truth."""
    found = [
        Timing("copy", c, torch.float32, seconds(c, machine, torch.float32)) for c in (Cost(bytes=2e9), Cost(calls=20))
    ]
    for dtype, shapes in calibrate_cuda.SHAPES.items():
        for shape in shapes:
            for way, cost in calibrate_cuda.costs(shape, dtype, CPU).items():
                if way != "fused 2":  # only benchmarks time the copy engine's sums
                    found.append(Timing(way, cost, dtype, seconds(cost, machine, dtype)))
    return found


def table(machine):
    """Rows as benchmarks/gpu writes them."""
    rows = []
    for B, T, I, O in calibrate_cuda.SHAPES[torch.bfloat16]:
        times = {
            way: seconds(cost, machine, torch.bfloat16) for way, cost in calibrate_cuda.ways((B, T, I, O), 132).items()
        }
        rows.append({"B": B, "T": T, "I": I, "O": O, "times": {**times, "a way of another version": 1.0}})
    return rows


DECIDING = {"flops_bf16", "bandwidth", "large_flops", "small_flops", "gram_flops", "small_gram_flops"}


def test_the_fit_finds_the_constants_of_a_cuda_device(kernels):
    found = fit(cuda_timings(SLOW_CUDA), CUDA)
    off = max(errors(cuda_timings(SLOW_CUDA), CUDA))
    assert (
        max(errors(cuda_timings(SLOW_CUDA), found)) < off / 5
    )  # what few timings tell is drawn to the shipped constants
    for name in DECIDING | {"flops_fp32", "calls"}:
        assert getattr(found, name) == pytest.approx(getattr(SLOW_CUDA, name), rel=0.2), name
    for name in ("flops_fp64", "reduce_flops", "reduce_bytes"):  # not timed
        assert getattr(found, name) == pytest.approx(getattr(CUDA, name)), name


def test_a_table_gives_the_constants_of_our_kernels():
    found = fit_table([*table(SLOW_CUDA), {"case": "one that failed", "right": False}], 132, CUDA)
    for name in DECIDING | {"reduce_flops", "reduce_bytes"}:
        assert getattr(found, name) == pytest.approx(getattr(SLOW_CUDA, name), rel=0.2), name
    assert found.measured and set(CUDA_KERNELS) <= set(FITTED)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_what_is_timed_on_cuda_is_what_its_cost_is_of(kernels, dtype):
    shape = (3, 5, 16, 8)
    x, g = calibrate.factors(shape, dtype, CPU)
    runs = calibrate_cuda.runs(x, g)
    assert runs.keys() <= calibrate_cuda.costs(shape, dtype, CPU).keys()
    assert any(name.startswith("ghost 0") for name in runs) == (dtype != torch.float32)
    norms = torch.einsum("bti,bto->bio", x.double(), g.double()).square().sum((1, 2))
    gradient = runs.pop("plain")()
    for run in runs.values():
        found, sq_norms = run()
        torch.testing.assert_close(found.reshape(16, 8), gradient)
        torch.testing.assert_close(sq_norms.double(), norms, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0)


def test_cuda_devices_are_not_asked_for_fp64():
    shapes = calibrate.shapes_for(torch.device("cuda"))
    assert {dtype for _, dtype in shapes} == {torch.float32, torch.bfloat16}


def test_the_program_for_a_cuda_device(quick, kernels, capsys, monkeypatch, real_read):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "abacus")
    monkeypatch.setattr(calibrate, "timer_for", lambda device: None)
    monkeypatch.setattr(calibrate, "measure", lambda *_, **__: cuda_timings(SLOW_CUDA))
    assert main(["--device", "cuda"]) == 0
    out = capsys.readouterr().out
    assert f"written to {cache_file('cuda')}" in out and "large_flops" in out
    monkeypatch.setattr("gnsfx.kernels.machine.read", real_read)
    machine_for.cache_clear()
    assert machine_for("cuda").large_flops == pytest.approx(SLOW_CUDA.large_flops, rel=0.2)
    machine_for.cache_clear()
