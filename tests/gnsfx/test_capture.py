"""What is read off a captured graph, on batches of several sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gnsfx import collector
from gnsfx.coverage import coverage
from tests import oracle
from tests.zoo import GPT, floats, ids, squares, token_losses


class WithLoss(nn.Module):
    """The labels meet the logits only after both are flattened, as in the models of ``transformers``."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT(T=8, layers=1)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return token_losses(self.gpt(tokens), labels).sum() / tokens.shape[0]


@pytest.mark.parametrize("marked", [False, True])
def test_lengths_change_with_the_loss_inside(marked: bool) -> None:
    """Dynamo has one symbol for the examples of each input; they are the same examples."""
    model = WithLoss().double()
    compiled = torch.compile(model, backend="gns", options={"gns.per_example": True, "gns.inner": "eager"})
    for B, T in (3, 6), (5, 7), (4, 5):
        tokens, labels = ids(11, B, T), ids(11, B, T)
        if marked:
            for x in (tokens, labels):
                torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
        truth = oracle.per_example_sq_norms(model, token_losses(model.gpt(tokens), labels))
        model.zero_grad()
        compiled(tokens, labels).backward()
        assert [(r.name, r.reason) for r in coverage(model) if r.status != "measured"] == []
        assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, oracle.tolerance(torch.float64)) == []


class Masked(nn.Module):
    """The padding mask is looked up by its own rows and columns, as in the attention masks of ``transformers``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, columns = torch.arange(x.shape[0]), torch.arange(x.shape[1])
        return self.a(x) * mask[rows[:, None], columns[None, :]].unsqueeze(-1)


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(2, 3, 2, stride=2), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.stem(x).permute(0, 2, 3, 1))


@pytest.mark.parametrize("build, shapes", [(Masked, [(4, 5, 3), (4, 5)]), (Patches, [(4, 2, 6, 6)])])
def test_all_sizes_symbolic(build: type[nn.Module], shapes: list[tuple[int, ...]]) -> None:
    model, inputs = build().double(), [floats(*s) for s in shapes]
    compiled = torch.compile(
        model, backend="gns", dynamic=True, options={"gns.per_example": True, "gns.inner": "eager"}
    )
    truth = oracle.per_example_sq_norms(model, squares(model(*inputs)))
    model.zero_grad()
    squares(compiled(*inputs)).mean().backward()
    assert [(r.name, r.reason) for r in coverage(model) if r.status != "measured"] == []
    assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, oracle.tolerance(torch.float64)) == []
