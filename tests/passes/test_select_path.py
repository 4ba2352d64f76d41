"""The planner: forced paths, the memory cap, and what it says the choice costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gnsfx.explain import explain
from gnsfx.passes.select_path import Planner

extents = st.sampled_from((1, 2, 16, 200, 1024))


def choose(planner: Planner, B: int, T: int, I: int, O: int, dtype: torch.dtype = torch.float32):
    return planner._choose(B, 1, T, I, O, T == 1, torch.empty(0, dtype=dtype))


@given(B=extents, T=extents, I=extents, O=extents, cap=st.sampled_from((0, 1 << 12, 1 << 20, 1 << 24, 1 << 40)))
def test_the_choice_is_the_quickest_under_the_cap(B, T, I, O, cap):
    choice = choose(Planner(B, cap), B, T, I, O)
    paths = {name: cost for name, cost in choice.costs.items() if name != "plain"}
    allowed = [name for name, cost in paths.items() if cost.memory <= cap]
    taken = paths[choice.path].memory
    if allowed:
        assert choice.path in allowed and not choice.note
        assert choice.seconds[choice.path] == min(choice.seconds[name] for name in allowed)
    else:
        assert taken == min(cost.memory for cost in paths.values()) > cap and "gns.memory" in choice.note
    assert choice.extra == max(choice.seconds[choice.path] - choice.seconds["plain"], 0)


@pytest.mark.parametrize("path", ("materialise", "fused", "ghost"))
def test_a_forced_path_is_taken_whatever_it_costs(path):
    assert choose(Planner(8, 0, path), 8, 64, 512, 512).path == path
    assert choose(Planner(8, 1 << 40, path), 8, 1, 512, 512).path == path


def test_the_reason_names_both_sizes():
    assert choose(Planner(8, 1 << 20, "materialise"), 8, 64, 512, 512).note == (
        "needs 8 MiB for per-example gradients, the cap is 1 MiB (gns.memory)"
    )


def test_positions_looked_up_once_are_told_apart_from_bags():
    """One id per example cannot repeat: its row is the contribution."""
    for shape, path in (((5,), "outer"), ((5, 3), "segments")):
        (graph,) = explain(nn.Embedding(7, 4), torch.randint(7, shape)).graphs
        assert [p.record.path for p in graph.parameters] == [path]


def test_a_tied_table_costs_more_than_its_head():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids).tanh() @ self.table.weight.t()

    model = torch.compile(Tied(), backend="gns", options={"gns.path": "ghost"})
    (graph,) = explain(model, torch.randint(50, (4, 9))).graphs
    (tied,) = graph.parameters
    head = choose(Planner(4, 1 << 30, "ghost"), 4, 9, 50, 16)
    assert tied.record.path == f"tied, {tied.taken}" and tied.relative(tied.taken) > 1
    assert tied.record.extra > head.extra
