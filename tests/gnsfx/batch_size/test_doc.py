"""The code in docs/batch_size.md runs, and the closed loop in it does what the text says."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import gnsfx
from gnsfx.batch_size.export import to_megatron
from gnsfx.errors import GnsWarning

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "batch_size.md").read_text(encoding="utf-8")
RUN = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHOWN = re.findall(r"```python no-run\n(.*?)```", TEXT, re.DOTALL)


def pairs():
    while True:
        x = torch.randn(4, 6)
        yield x, x.sum(1, keepdim=True) + 3 * torch.randn(4, 1)


def test_the_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    names = {
        "gnsfx": gnsfx,
        "model": torch.compile(model, backend="gns", options={"gns.inner": "eager"}),
        "optimizer": optimizer,
        "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        "loss_fn": nn.functional.mse_loss,
        "batches": pairs(),
    }
    with pytest.warns(GnsWarning, match="between epochs only. Moved: batch 128 from epoch 1.67 to 2; batch 256 from"):
        for block in RUN:
            exec(compile(block, "docs/batch_size.md", "exec"), names)
    controller = names["controller"]
    assert controller.steps == 300 and controller.changes and controller.batch_size > 4
    assert "step 100: batch 4 -> 8 examples, lr x 1.41. B_simple = " in capsys.readouterr().out
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * controller.lr_scale)
    assert to_megatron(names["plan"]).startswith("0:64 166666667:128 ")


def test_what_is_shown_parses():
    assert len(RUN) == 4 and len(SHOWN) == 2
    for block in SHOWN:
        ast.parse(block)
