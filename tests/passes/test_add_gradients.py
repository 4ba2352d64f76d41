"""Sums of gradients behind a norm layer become operands of its backward, and gradients and norms stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

from gnsfx.passes import pipeline
from gnsfx.passes.emit import Emitter
from tests import oracle
from tests.passes.test_norm_layers import HuggingFace, Net, compare, cuda_rewrite, layer

__all__ = ["cuda_rewrite"]
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own


class Several(nn.Module):
    """A norm layer whose output several projections read; ``also``: what else does, before them."""

    def __init__(self, norm: nn.Module, projections: int, also: Callable[[Tensor], Tensor] = torch.zeros_like) -> None:
        super().__init__()
        self.norm, self.also = norm, also
        self.each = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(projections))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return sum((each(y).sin() for each in self.each), self.also(y))


class Shifted(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.shift = norm, nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.shift


class Beside(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


CASES: dict[str, tuple[Callable[[nn.Module], nn.Module], int]] = {
    "one": (lambda norm: Several(norm, 1), 1),
    "two": (lambda norm: Several(norm, 2), 2),
    "three": (lambda norm: Several(norm, 3), 3),
    "four": (lambda norm: Several(norm, 4), 1),
    "one is not in memory": (lambda norm: Several(norm, 2, torch.cos), 1),
    "something else reads the sum": (lambda norm: Several(Shifted(norm), 2), 1),
    "beside a residual connection": (lambda norm: Beside(Several(norm, 3)), 3),
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many gradients each layer reads."""
    add, found = pipeline.add_gradients, []

    def look(graph: Graph, emit: Emitter) -> None:
        add(graph, emit)
        layers = (n for n in graph.nodes if n.target is torch.ops.gnsfx.norm_backward.default)
        found.extend(1 + sum(name in n.kwargs for name in ("g2", "g3")) for n in layers)

    monkeypatch.setattr(pipeline, "add_gradients", look)
    yield found


@pytest.mark.parametrize("norm", [layer, HuggingFace], ids=["layer norm", "written out"])
@pytest.mark.parametrize("name", CASES)
def test_terms(name: str, norm: Callable[[int], nn.Module], read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gnsfx.kernels.triton.plan.row_gradients", lambda *sizes: 3)  # of fp32 too
    torch.manual_seed(0)
    around, expected = CASES[name]
    compare(Net(around(norm(8))), torch.randn(4, 6, 6), oracle.tolerance(torch.float32), 1)
    assert read == [expected]


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, 3), (torch.float32, 1)], ids=str)
def test_wide_gradients_are_left_alone(dtype: torch.dtype, expected: int, read: list[int]) -> None:
    """Programs that add them up would take twice the memory of a multiprocessor."""
    compare(Net(Several(layer(8), 3)).to(dtype), torch.randn(4, 6, 6, dtype=dtype), oracle.tolerance(dtype), 1)
    assert read == [expected]
