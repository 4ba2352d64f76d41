"""The model of the demo as benchmarks take it: (ids) -> logits. Apart, since the demo needs more than PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from train_gpt import GPT


class DemoGPT(GPT):
    """The model of ``examples/train_gpt.py``, up to its loss."""

    def forward(self, ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)
