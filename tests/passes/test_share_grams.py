"""One Gram for contractions with a factor in common: chosen where it pays, never where it does not, and exact."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gnsfx
from gnsfx.explain import explain
from tests import oracle

EAGER = {"gns.inner": "eager"}


class Attention(nn.Module):
    """q, k and v of one input; ``apart`` gives each an input of its own."""

    def __init__(self, width: int, apart: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        y, z = (x.sin(), x.cos()) if self.apart else (x, x)
        return F.scaled_dot_product_attention(self.q(x), self.k(y), self.v(z))


def ops_of(model: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """How many Grams are shared, use one, and are computed by ghost_sq_norm."""
    (graph,) = explain(model, x).graphs
    counts = graph.op_counts
    return tuple(counts.get(f"gnsfx.{op}.default", 0) for op in ("gram", "gram_sq_norm", "ghost_sq_norm"))  # type: ignore[return-value]


def test_three_projections_of_one_input_share_its_gram():
    assert ops_of(Attention(2048), torch.randn(2, 24, 2048)) == (1, 3, 0)
    assert ops_of(Attention(2048, apart=True), torch.randn(2, 24, 2048))[:2] == (0, 0)


def test_long_positions_and_single_ones_take_other_paths():
    assert ops_of(Attention(64), torch.randn(4, 128, 64)) == (0, 0, 0)
    assert ops_of(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)) == (0, 0, 0)


def test_no_gram_is_held_beyond_the_memory_cap():
    model = torch.compile(Attention(512), backend="gns", options={**EAGER, "gns.memory": 100})
    assert ops_of(model, torch.randn(8, 3, 512)) == (0, 0, 3)


def test_the_first_one_pays_and_the_reason_says_so():
    (graph,) = explain(Attention(2048), torch.randn(2, 24, 2048)).graphs
    costs = [p.record.costs["ghost"] for p in graph.parameters]
    assert (
        len({c.accumulate_flops for c in costs}) == 2
        and sum(c.accumulate_flops for c in costs) == 4 * 2 * 2 * 24 * 24 * 2048
    )
    assert all("one Gram for 3 contractions" in p.record.reason for p in graph.parameters)


@pytest.mark.parametrize("positions", (20, 40))
def test_norms_and_gradients_are_exact(positions: int):
    torch.manual_seed(0)
    model = Attention(24).double()
    x = torch.randn(5, positions, 24, dtype=torch.float64)
    compiled = torch.compile(
        model, backend="gns", options={**EAGER, "gns.path": "ghost", "gns.per_example": True}, dynamic=False
    )
    assert ops_of(compiled, x) == (1, 3, 0)
    losses = model(x).square().flatten(1).sum(1)
    truth = oracle.per_example_sq_norms(model, losses)
    losses.mean().backward()
    gradients = oracle.gradients(model)
    model.zero_grad()
    compiled(x).square().flatten(1).sum(1).mean().backward()
    found = gnsfx.per_example_sq_norms(model)
    assert not oracle.names_beyond(found, truth, oracle.tolerance(torch.float64))
    assert not oracle.names_beyond(oracle.gradients(model), gradients, oracle.tolerance(torch.float64))
