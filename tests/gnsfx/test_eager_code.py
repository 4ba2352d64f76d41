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
}


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
