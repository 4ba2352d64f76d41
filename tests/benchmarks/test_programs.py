"""Every program has --help, and a tiny run of it prints its table and writes it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import common, compile_time, memory, models, paths, scaling, step_time

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAMS = sorted(path for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text())
TINY = ["--small", "--inner", "eager"]
QUICK = ["--rounds", "2", "--turn", "0.001", "--copies", "1"]


@pytest.fixture
def in_process(monkeypatch, capsys):
    """What a program runs in a process of its own runs in this one."""

    def fresh(program, arguments, environment=None):
        program = {"compile_time": compile_time, "memory": memory}[Path(program).stem]
        program.main(arguments)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(common, "fresh", fresh)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_help(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out


def written(out):
    assert "|---" in out.with_suffix(".md").read_text()
    return json.loads(out.with_suffix(".json").read_text())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention under vmap
def test_step_time(tmp_path, capsys):
    out = tmp_path / "step_time"
    arguments = ["--models", "demo", "mlp", "--variants", "all", "norm", "--peers", "vmap", "swap"]
    step_time.main([*arguments, *TINY, *QUICK, "--out", str(out)])
    printed, read = capsys.readouterr().out, written(out)
    assert "Noise floor" in printed and "plain again" in printed
    judged = {(row["model"], row["variant"]): row["norms"] for row in read["rows"]}
    assert judged["demo", "all"] == judged["demo", "norm"] == judged["demo", "vmap"] == judged["mlp", "swap"] == "right"
    assert judged["demo", "swap"] == "1 of 16 wrong, 1 of 16 missing"
    assert judged["mlp", "norm"] == "no norm layers"
    assert {len(times["whole"]) for times in read["seconds"]["demo"].values()} == {2}


@pytest.mark.parametrize("checked", [[], ["--no-check"]])
def test_a_tool_that_cannot_run_is_a_row_of_the_table(checked, monkeypatch, capsys):
    def prepare(case):
        raise ValueError("cannot do this model\nat all")

    monkeypatch.setattr(step_time.peers, "load", lambda name: prepare)
    step_time.main(["--models", "mlp", "--variants", "--peers", "vmap", *checked, *TINY, *QUICK])
    assert "ValueError: cannot do this model\n" in capsys.readouterr().out


def test_memory(tmp_path, in_process):
    memory.main(["--models", "mlp", "--variants", "all", *TINY, "--out", str(tmp_path / "memory")])
    plain, measured = written(tmp_path / "memory")["rows"]
    assert plain["ratio"] == 1 and 0 < plain["before"] < plain["peak"]
    assert 0.5 < measured["ratio"] < 10


def test_peak_is_what_is_alive_at_once():
    def run():
        for _ in range(2):
            first = torch.empty(1 << 20, dtype=torch.uint8)
            second = torch.empty(2 << 20, dtype=torch.uint8)
            del first, second
        torch.empty(1 << 20, dtype=torch.uint8)

    assert memory.allocation_peak(run) == 3 << 20


def test_memory_between_steps_counts_storages_once():
    before = memory.live_bytes()
    kept = torch.empty(1 << 20, dtype=torch.uint8)
    views = [kept[1:], kept.view(2, -1)]
    assert memory.live_bytes() - before == 1 << 20 and views


def test_compile_time(tmp_path, in_process):
    compile_time.main(
        ["--depths", "1", "2", "--variants", "all", "--rounds", "1", *TINY, "--out", str(tmp_path / "time")]
    )
    rows = written(tmp_path / "time")["rows"]
    assert len(rows) == 8 and {row["cache"] for row in rows} == {"cold", "warm"}
    assert all("per layer" in row for row in rows if row["layers"] == 2)


def test_scaling(tmp_path):
    arguments = ["--series", "batch", "--values", "2", "--variants", "all", *TINY, *QUICK]
    scaling.main([*arguments, "--out", str(tmp_path / "scaling")])
    assert [row["value"] for row in written(tmp_path / "scaling")["rows"]] == [2]


@pytest.mark.parametrize("name", models.MODELS)
def test_losses_of_examples_average_to_the_loss(name):
    case = models.build(name, small=True)
    outputs = case.module(case.inputs)
    torch.testing.assert_close(models.losses_of(outputs, case.targets).mean(), models.loss_of(outputs, case.targets))


def test_choices_on_a_cuda_device_are_modelled(tmp_path, monkeypatch, capsys):
    """Without one, and the table says that nothing was timed."""
    out = tmp_path / "paths_cuda"
    monkeypatch.setattr(sys, "argv", ["paths", "--device", "cuda", "--modelled", "--out", str(out)])
    paths.main()
    read = written(out)
    assert capsys.readouterr().out.endswith("modelled; nothing was timed\n") and read["timed"] is False
    assert "nothing timed" in out.with_suffix(".md").read_text().splitlines()[0]
    assert {row["taken"] for row in read["rows"]} == {"outer", "ghost", "fused", "materialise"}
