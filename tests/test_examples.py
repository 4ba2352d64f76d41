"""The examples run as a person runs them, and bad input to the demo is one line and exit code 2."""

import ast
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gnsfx

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--steps 12 --batch 4 --context 16 --layers 1 --width 32 --heads 2 --log-every 2".split()


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("train_gpt", ROOT / "examples/train_gpt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command):
    finished = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_quickstart():
    assert "B_simple" in (printed := run(ROOT / "examples/quickstart.py"))
    assert "Linear" in printed and "LayerNorm" in printed and "200 steps" in printed


def test_quickstart_is_fifteen_lines():
    tree = ast.parse((ROOT / "examples/quickstart.py").read_text())
    lines = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)} - {1}  # the docstring
    assert len(lines) <= 15


@pytest.mark.slow
def test_demo_measures_everything(tmp_path):
    printed = run(ROOT / "examples/train_gpt.py", *SMALL, "--out", tmp_path)
    for word in ("embedding", "attention", "MLP", "norm", "total", "validation loss"):
        assert word in printed
    header, *steps, end = records(tmp_path)
    assert (
        header["kind"] == "header"
        and header["schema"] == "gnsfx.train_gpt/1"
        and header["units"]["b_simple"] == "examples"
    )
    assert [step["step"] for step in steps] == [0, 2, 4, 6, 8, 10, 11]
    assert end["kind"] == "end" and end["validation_loss"] > 0
    noise = steps[-1]["noise"]
    assert list(noise) == ["total", "embedding", "attention", "MLP", "norm"]
    groups = sum(noise[group]["tr_sigma"] for group in ("embedding", "attention", "MLP", "norm"))
    assert noise["total"]["tr_sigma"] == pytest.approx(groups)
    assert (tmp_path / "noise.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.slow
def test_demo_measures_norms_only_and_appends_to_the_log(tmp_path):
    for _ in range(2):
        run(ROOT / "examples/train_gpt.py", *SMALL, "--params", "norm", "--out", tmp_path)
    kinds = [record["kind"] for record in records(tmp_path)]
    assert kinds.count("header") == kinds.count("end") == 2
    assert list(records(tmp_path)[-2]["noise"]) == ["total", "norm"]


@pytest.mark.slow
def test_demo_without_gnsfx_keeps_the_log_when_interrupted(demo, tmp_path, monkeypatch, capsys):
    batches = iter(range(5))
    draw = demo.Text.batch

    def batch(self, size):
        if next(batches) == 4:
            raise KeyboardInterrupt
        return draw(self, size)

    monkeypatch.setattr(demo.Text, "batch", batch)
    assert demo.main([*SMALL, "--plain", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().out
    assert [record["kind"] for record in records(tmp_path)] == ["header", "step", "step", "end"]


def test_bad_input_is_one_line(demo, tmp_path, capsys):
    short, latin, folder = tmp_path / "short.txt", tmp_path / "latin.txt", tmp_path / "out"
    short.write_text("To be, or not to be")
    latin.write_bytes("déjà vu".encode("latin-1") * 100)
    taken = tmp_path / "taken"
    taken.write_text("a file where a folder is wanted")
    cases = {
        (
            "--text",
            short,
        ): "the text has 19 characters, too few to train and validate with a context of 16: give at least 34",
        ("--text", latin): "latin.txt is not UTF-8 text (byte 1): convert it first",
        ("--text", tmp_path / "none.txt"): "none.txt: No such file or directory",
        ("--text", tmp_path): "Is a directory",
        ("--out", taken): "File exists. Choose another folder with --out",
        ("--out", taken / "deeper"): "Not a directory. Choose another folder with --out",
    }
    for arguments, expected in cases.items():
        assert demo.main([*SMALL, "--out", str(folder), *map(str, arguments)]) == 2
        output = capsys.readouterr()
        assert expected in output.err
        assert output.err.startswith("train_gpt: ") and output.err.count("\n") == 1 and not output.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "0"], "expected a positive whole number, got '0'"),
        (["--batch", "-3"], "--batch"),
        (["--width", "33"], "--width 33 is not a multiple of --heads 2"),
        (["--params", "some"], "invalid choice"),
    ],
)
def test_bad_options_exit_with_2(demo, arguments, expected, capsys):
    with pytest.raises(SystemExit) as caught:
        demo.main([*SMALL, *arguments])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_the_code_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2))
    names = {
        "torch": torch,
        "gnsfx": gnsfx,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "loss_fn": nn.functional.mse_loss,
        "loader": [(torch.randn(16, 8), torch.randn(16, 2)) for _ in range(12)],
        "tokens": torch.zeros(1, 6, dtype=torch.long),
        "documents": torch.tensor([[0, 0, 1, 1, 1, -1]]),
        "boundaries": torch.tensor([0, 2, 6]),
        "compiled": lambda tokens, documents: None,
        "batches": itertools.repeat((torch.randn(16, 8), torch.randn(16, 2))),
        "steps": 3,
    }
    plain, tenth, controller, whole, packed = blocks
    for block in (plain, tenth, packed):
        exec(block, names)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False):
        exec(whole, names)
    noise = names["noise"]
    assert noise.steps == 12 + 2 and noise.coverage_share == 1
    assert set(noise.by_group()) == {"Linear", "LayerNorm"}
    exec(controller, names)
    assert names["controller"].steps == 3
