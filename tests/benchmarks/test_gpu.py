"""``python -m benchmarks.gpu`` runs without a GPU: all its sections on PyTorch's twins, what it writes, and how it fails."""

import json
import sys
import time

import pytest
import torch
from torch._dynamo.backends import registry

from benchmarks.gpu import bench, calls, correctness, program, report, sanitizer, sections
from gnsfx.backend import gns

CPU = ["--device", "cpu", "--quick"]
FIELDS = {
    "device": {"case", "right", "rate", "unit"},
    "correctness": {"case", "right", "worst", "error", "allowed"},
    "training": {"norms", "gradients", "apart", "missing", "kernels"},
    "ahead": {"case", "seconds"},
    "norms": {"norm", "B", "T", "D", "seconds", "of_copy", "inductor_of_copy", "ratio"},
    "products": {"B", "T", "I", "O", "times", "modelled", "taken", "best", "regret"},
    "steps": {"times", "seconds", "ratio", "peak ratio", "syncs", "parameters"},
}


def written(out):
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()


def test_every_section_runs_on_twins_and_is_written(tmp_path, capsys):
    assert program.main([*CPU, "--out", str(tmp_path / "deep/gpu")]) == 0
    assert "all is right" in capsys.readouterr().out
    result, text = written(tmp_path / "deep/gpu")
    assert result["schema"] == program.SCHEMA and result["machine"]["torch"] == torch.__version__
    assert result["sections"].keys() == FIELDS.keys() == sections.SECTIONS.keys()
    for name, section in result["sections"].items():
        assert (section["error"] is None and FIELDS[name] <= section["rows"][-1].keys()) or name == "correctness", name
        assert f"## {sections.SECTIONS[name].title}" in text
    assert {"norm", "product", "Gram", "lookup"} <= {
        r["case"].split()[0] for r in result["sections"]["correctness"]["rows"]
    }
    times = result["sections"]["products"]["rows"][0]["times"]
    assert {"plain", "fused 0", "ghost 0", "materialise"} <= times.keys()
    assert result["constants"].keys() >= {"flops_bf16", "large_flops"}
    assert "|---" in text and "- all is right" in text


@pytest.fixture
def two_sections(monkeypatch):
    """A section with one case that is right, one that is wrong and one that fails; and one that cannot even begin."""

    def fail():
        raise ValueError("no such kernel\nand more")

    def cases(_):
        yield "good", lambda: {"rate": 1.0, "unit": "B"}
        yield "bad", lambda: {"right": False, "worst": "dx", "error": float("inf")}
        yield "failing", fail

    monkeypatch.setattr(sections.SECTIONS["device"].module, "cases", cases)
    monkeypatch.setattr(sections.SECTIONS["norms"].module, "cases", lambda _: fail())


def test_what_fails_is_recorded_and_stops_nothing(two_sections, tmp_path, capsys):
    arguments = ["--sections", "norms", "device", "products", "--out", str(tmp_path / "gpu")]
    assert program.main([*CPU, *arguments]) == 1
    result, text = written(tmp_path / "gpu")
    assert [row["right"] for row in result["sections"]["device"]["rows"]] == [True, False, False]
    assert result["sections"]["norms"]["error"] == "ValueError: no such kernel"
    assert result["sections"]["products"]["error"] is None and result["sections"]["products"]["rows"][0]["right"]
    printed = capsys.readouterr().out
    for line in (
        "device: bad: worst dx, error None",
        "device: failing: ValueError: no such kernel",
        "norms: ValueError",
    ):
        assert line in printed and line in text


def test_a_section_out_of_time_keeps_its_rows(monkeypatch):
    def cases(_):
        yield from ((str(n), lambda: time.sleep(0.1) or {}) for n in range(5))

    monkeypatch.setattr(sections.SECTIONS["device"].module, "cases", cases)
    section = program.in_process("device", bench.Bench(torch.device("cpu"), True), 0.15)
    assert len(section["rows"]) == 2 and section["error"] == "out of time: 3 of its cases were left out"


def test_a_process_of_its_own_needs_little_gives_the_same_rows_and_may_die(tmp_path, monkeypatch):
    for name in ("rich", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HOME", "/nowhere")
    args = program.parse([*CPU, "--sections", "device"])
    found = program.processes(["device"], 60, args)["device"]
    assert found["error"] is None and [row["case"] for row in found["rows"]][:2] == ["machine", "copy"]

    half = 'import sys; open(sys.argv[1], "w").write(\'{"case": "a", "right": true}\\n{"case": "b", "ri\'); '
    for last, reason in [("sys.exit(3)", "status 3"), ("import time; time.sleep(60)", "its time was over")]:
        monkeypatch.setattr(program, "GRACE", 0.0)
        monkeypatch.setattr(program, "command", lambda *a, last=last: [sys.executable, "-c", half + last, str(a[3])])
        dead = program.processes(["device"], 1.0, args)["device"]
        assert [row["case"] for row in dead["rows"]] == ["a"] and reason in dead["error"]


def test_turns_share_the_time():
    turns = program.turns(list(sections.SECTIONS), 100)
    assert [names for names, _ in turns][1] == ["correctness", "training", "ahead"]
    assert [until for _, until in turns] == sorted(until for _, until in turns) and turns[-1][1] == pytest.approx(100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys):
    assert program.main([]) == 2
    assert "--device cpu --quick" in capsys.readouterr().err


def test_an_installed_package_is_not_needed(monkeypatch):
    """From a bare checkout no entry point has told PyTorch of the backend."""
    for name in ("_BACKENDS", "_COMPILER_FNS"):
        monkeypatch.setattr(registry, name, {k: v for k, v in getattr(registry, name).items() if k != "gns"})
    assert "gns" not in registry.list_backends(exclude_tags=())
    program.register()
    assert registry.lookup_backend("gns") is gns


@pytest.mark.parametrize("defect", ["gradient", "norms"])
def test_a_wrong_kernel_is_found(defect, monkeypatch):
    def wrong(tile):
        def way(x, g):
            grad, norms = calls.materialise(x, g)
            return (grad * 1.01, norms) if defect == "gradient" else (grad, norms * (1 + 1e-5))

        return way

    monkeypatch.setattr(calls, "fused", wrong)
    found = {case: run for case, run in correctness.cases(bench.Bench(torch.device("cpu"), True)) if "product" in case}
    assert not any(run()["right"] for run in found.values())


def test_the_last_word_of_the_sanitizer():
    assert sanitizer.summary("x\n========= ERROR SUMMARY: 2 errors\n") == "2 errors"
    assert sanitizer.summary("Device not supported").startswith("no summary: Device")
    rows = {"sanitizer": {"rows": [{"case": "memcheck", "right": False, "summary": "2 errors"}], "error": None}}
    assert list(report.troubles({"sections": rows})) == ["sanitizer: memcheck: summary 2 errors"]
