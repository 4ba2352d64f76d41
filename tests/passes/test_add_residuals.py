"""Residual connections become an operand of the norm layer's backward, and gradients and norms stay what they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

from gnsfx.passes import pipeline
from gnsfx.passes.emit import Emitter
from tests import oracle
from tests.passes.test_norm_layers import HuggingFace, Net, compare, cuda_rewrite, folded, layer, positions_first

__all__ = ["cuda_rewrite"]
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own

CASES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], int]] = {
    "alone": (lambda norm, x: norm(x), 0),
    "added": (lambda norm, x: x + norm(x), 1),
    "scaled": (lambda norm, x: x + 2 * norm(x), 1),
    "comes later": (lambda norm, x: 0.5 * x + norm(x), 0),
    "two connections": (lambda norm, x: x + x.sin() + norm(x), 1),
    "folded": (lambda norm, x: x + folded(norm, x), 1),
    "laid out otherwise": (lambda norm, x: x + positions_first(norm, x), 0),
}


@pytest.mark.parametrize("norm", [layer, HuggingFace], ids=["layer norm", "written out"])
@pytest.mark.parametrize("name", CASES)
def test_residual(name: str, norm: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    around, expected = CASES[name]
    add, added = pipeline.add_residuals, []

    def look(graph: Graph, emit: Emitter) -> None:
        add(graph, emit)
        added.append(sum("residual" in n.kwargs for n in graph.nodes))

    monkeypatch.setattr(pipeline, "add_residuals", look)
    compare(Net(norm(8), around=around), torch.randn(4, 6, 6), oracle.tolerance(torch.float32), 1)
    assert added == [expected]
