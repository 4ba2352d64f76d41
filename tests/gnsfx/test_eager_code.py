"""Eager code between compiled graphs: rows that it keeps in place are measured, rows that it moves are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gnsfx import per_example_sq_norms
from gnsfx.coverage import coverage
from tests import oracle
from tests.zoo import floats, squares

B, T, D = 3, 5, 4
KEEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "pointwise": lambda h: h.sin() + 1,
    "layer": lambda h: torch.nn.functional.layer_norm(h, (D,)) @ torch.eye(D, dtype=h.dtype),
    "fold_and_back": lambda h: h.reshape(B * T, D).tanh().view(B, T, D),
    "select": lambda h: h[:, 0],
    "transpose": lambda h: h.transpose(1, 2).cos().transpose(1, 2),
    "cat": lambda h: torch.cat([h, h.cos()], 1),
}
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "experts": lambda h: h.flatten(0, 1)[torch.tensor([0, 4, 11])],
    "order": lambda h: h[torch.tensor([1, 2, 0])],
    "time_first": lambda h: h.transpose(0, 1)[:B],
    "slice": lambda h: h[1:],
    "flip": lambda h: h.flip(0),
    "other_fold": lambda h: h.reshape(T, B, D),
    "views": lambda h: torch.cat([h, h.cos()]),
    "sum": lambda h: h.sum(0),
    "both_factors": lambda h: (h[:, 0, :B] @ h[:, 0, :B]).repeat(1, 2)[:, :D],
}
MEETS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h - h.mean(0),
    "norm": lambda h: h / h.norm(),
    "softmax": lambda h: h.softmax(0),
    "layer_norm": lambda h: torch.nn.functional.layer_norm(h, h.shape),
    "attention": lambda h: (h.flatten(1) @ h.flatten(1).T @ h.flatten(1)).view(h.shape),
    "as_one_sequence": lambda h: torch.nn.functional.scaled_dot_product_attention(*[h.flatten(1)[None]] * 3)[0].view(
        h.shape
    ),
    "broadcast": lambda h: h[:, :B] + h[:, 0],
}
"""Examples meet, and as many rows as there were come out."""


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)


def trained(between: Callable[[Tensor], Tensor]) -> tuple[TwoParts, Tensor]:
    model, x = TwoParts().double(), floats(B, T, D)
    options = {"gns.inner": "eager", "gns.per_example": True}
    first, second = (torch.compile(m, backend="gns", options=options) for m in (model.first, model.second))
    squares(second(between(first(x)))).mean().backward()
    return model, x


@pytest.mark.parametrize("name", KEEPS)
def test_rows_in_place_are_measured(name: str) -> None:
    model, x = trained(KEEPS[name])
    truth = oracle.per_example_sq_norms(model, squares(model.second(KEEPS[name](model.first(x)))))
    assert {row.status for row in coverage(model)} == {"measured"}
    assert oracle.names_beyond(per_example_sq_norms(model), truth, oracle.tolerance(torch.float64)) == []


@pytest.mark.parametrize("name", MOVES)
def test_rows_that_moved_are_refused(name: str) -> None:
    model, _ = trained(MOVES[name])
    rows = {row.name: row for row in coverage(model)}
    assert rows["second.weight"].status == rows["second.bias"].status == "refused"
    assert "eager code" in rows["second.weight"].reason or "numbers of examples" in rows["second.weight"].reason


@pytest.mark.parametrize("name", MEETS)
def test_examples_that_meet_refuse_what_lies_before(name: str) -> None:
    rows = coverage(trained(MEETS[name])[0])
    assert {row.status for row in rows} == {"refused"}
    assert "eager code" in rows[0].reason and "later graph" in rows[0].reason


def test_a_time_first_result_goes_on_in_eager_code() -> None:
    """As many positions as examples: only the first graph knows which dimension is which."""
    model, x = TwoParts().double(), floats(T, T, D)
    options = {"gns.inner": "eager"}
    first = torch.compile(lambda x: model.first(x).transpose(0, 1), backend="gns", options=options)
    squares(torch.compile(model.second, backend="gns", options=options)(first(x) * 2)).mean().backward()
    assert {row.status for row in coverage(model)} == {"refused"}


def test_graphs_that_see_other_batches() -> None:
    """Frames as examples in one graph, clips in the other: without a gradient between them only the sizes tell."""
    model, x = TwoParts().double(), floats(B, T, D)
    options = {"gns.inner": "eager"}
    frames, clips = (torch.compile(m, backend="gns", options=options) for m in (model.first, model.second))
    (squares(frames(x.view(B * T, D))).mean() + squares(clips(x)).mean()).backward()
    assert {row.status for row in coverage(model)} == {"refused"}
    assert "3 and 15" in coverage(model)[0].reason
    model.zero_grad()
    squares(clips(x)).mean().backward()
    assert {row.name: row.status for row in coverage(model)}["second.weight"] == "measured"


class Rows(nn.Module):
    """Rows of the input, which needs no gradient, picked before the first layer; ``nonzero`` breaks the graph."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        self.a, self.folded = nn.Linear(D, D), folded

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        if self.folded:
            return self.a(x[keep])
        rows = x.repeat_interleave(2, 0)
        where = keep.repeat_interleave(2).nonzero().flatten()
        return torch.zeros(len(rows), D, dtype=x.dtype).index_add(0, where, self.a(rows[where])).view(len(x), 2, D)


def test_rows_named_by_eager_code() -> None:
    """The graph in front has no parameter, but knows where the examples are in what it hands over."""
    model, x, keep = Rows(False).double(), floats(4, D), torch.tensor([True, False, True, True])
    truth = oracle.per_example_sq_norms(model, squares(model(x, keep)))
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.per_example": True})
    squares(compiled(x, keep)).mean().backward()
    assert oracle.names_beyond(per_example_sq_norms(model), truth, oracle.tolerance(torch.float64)) == []


def test_rows_made_by_eager_code_are_refused() -> None:
    model, x, keep = Rows(True).double(), floats(B, T, D), torch.rand(B, T) > 0.3
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager"})
    with pytest.warns(UserWarning, match="no input of the compiled graph carries a batch dimension"):
        squares(compiled(x, keep)).mean().backward()
    assert {row.status for row in coverage(model)} == {"refused"}
