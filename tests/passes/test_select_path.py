"""The planner: forced paths, the memory cap, and what it says the choice costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gnsfx.explain import explain
from gnsfx.kernels import gpu
from gnsfx.kernels.triton import plan
from gnsfx.passes import select_path
from gnsfx.passes.select_path import Choice, Planner

extents = st.sampled_from((1, 2, 16, 200, 1024))


def choose(
    planner: Planner,
    B: int,
    T: int,
    I: int,
    O: int,
    dtype: torch.dtype = torch.float32,
    E: int = 1,
    device: str = "cpu",
) -> Choice:
    with FakeTensorMode():
        value = torch.empty(0, dtype=dtype, device=device)
    return planner._choose(B, E, T, I, O, T == 1, value, select_path._multiprocessors(value, E, I, O))


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


# ------------------------------------------------------------------------------------------------------- CUDA kernels


@pytest.fixture
def kernels(monkeypatch):
    """As if our CUDA kernels ran on the CPU."""
    monkeypatch.setattr(gpu, "kernels_on", lambda device: frozenset({"products", "embedding", "norm"}))


@given(B=extents, T=extents, I=st.sampled_from((8, 12, 128, 768)), O=st.sampled_from((8, 129, 1024)), E=st.integers(1, 2),
       dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32, torch.float64)))  # fmt: skip
def test_our_kernels_multiply_what_fits_them_and_nothing_else_changes(B, T, I, O, E, dtype):
    def on(*names: str) -> Choice:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, "kernels_on", lambda device: frozenset(names))
            return choose(Planner(B, 1 << 40), B, T, I, O, dtype, E, "cuda")

    before, found = on(), on("products")
    assert on("norm", "embedding") == before  # an older GPU
    fits = dtype.itemsize == 2 and E == 1 and I % 8 == 0 and O % 8 == 0
    assert found.ours == fits and not before.ours and before.tile == 0
    if not fits:
        assert found == before
    elif found.path == "fused":
        assert plan.TILES[found.tile] in (plan.LARGE, plan.SMALL) and "tiles of" in found.note
    elif found.path == "ghost":
        assert found.tile in range(len(plan.GRAMS)) and "positions" in found.note


@pytest.mark.parametrize("path", ("fused", "ghost", "materialise"))
def test_a_forced_path_has_its_tile(kernels, path):
    found = choose(Planner(8, 1 << 40, path), 8, 512, 768, 768, torch.bfloat16)
    assert found.path == path and found.ours
    assert set(found.costs) == {"plain", "materialise", "fused", "ghost"}


def test_under_the_cap_our_kernels_hold_next_to_nothing(kernels):
    found = choose(Planner(4, 0), 4, 4096, 1024, 1024, torch.bfloat16)
    assert found.costs[found.path].memory < 1 << 20 and "gns.memory" in found.note and "; " in found.note


def test_sizes_that_are_not_known_do_not_fit(kernels):
    """A graph with dynamic widths is kept for widths that the copy engine cannot read."""

    class Half(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(width, 64, bias=False, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    for width, ours in ((64, True), (60, False)):
        model = torch.compile(Half(width), backend="gns", options={"gns.path": "fused"})
        (graph,) = explain(model, torch.randn(4, 9, width, dtype=torch.bfloat16)).graphs
        (weight,) = graph.parameters
        assert weight.taken == "fused" and ("tiles of" in weight.record.reason) == ours
        assert graph.op_counts.get("gnsfx.mm_norm_parts.default", 0) == ours


def test_explain_shows_the_tile_and_the_modelled_time(kernels):
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    table = explain(layer, torch.randn(4, 300, 64, dtype=torch.bfloat16)).table
    taken = next(line for line in table.splitlines() if "* " in line)
    assert "tiles of" in table or "positions" in table, taken


def test_a_lookup_costs_what_its_cuda_kernel_costs(kernels):
    model = nn.Embedding(500, 64)
    (graph,) = explain(model, torch.randint(500, (4, 32))).graphs
    (table,) = graph.parameters
    assert table.taken == "segments" and table.record.costs["segments"].calls - table.record.costs["plain"].calls == 4


def test_norm_layers_cost_next_to_nothing():
    found = Planner(8, 1 << 40).norm_layer(torch.empty(8, 1024, 768, dtype=torch.bfloat16))
    assert found.path == "norm" and 0 < found.extra < 0.01 * found.seconds["plain"]
