"""Rows chosen by data: experts by nonzero, by sort and by groups, capacity, masks, packed positions. Truth is per-example autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnsfx import per_example_sq_norms
from gnsfx.coverage import coverage
from tests import oracle
from tests.passes.models import Case, Model
from tests.passes.test_measure import compare, named
from tests.zoo import floats, squares

B, T, D, E, K = 3, 5, 4, 3, 2
pytestmark = pytest.mark.filterwarnings("ignore:var_mean:UserWarning")  # of an expert without rows


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(D, 6), nn.Linear(6, D), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.silu(self.up(x))))


class Router(nn.Module):
    """Tokens x (N, D), their weights and experts (N, K), between a layer before and a residual."""

    def __init__(self, mix: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.gate = nn.Linear(D, D), nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.table = nn.Parameter(torch.randn(E, D, D))
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        tokens = x.reshape(-1, D)
        scores = self.gate(tokens).softmax(-1)
        weights, experts = scores.topk(K, dim=-1)
        mixed = self.mix(self, tokens, weights / weights.sum(-1, keepdim=True), experts)
        return x + mixed.view_as(x) + (tokens @ self.table[0]).view_as(x)


def loop(m: Router, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    chosen = F.one_hot(experts, E).permute(2, 1, 0)
    for e in range(E):
        slot, token = torch.where(chosen[e])
        out.index_add_(0, token, m.experts[e](x[token]) * weights[token, slot, None])
    return out


def masked(m: Router, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        chosen = (experts == e).any(-1)
        weight = (weights * (experts == e)).sum(-1)
        out[chosen] = out[chosen] + m.experts[e](x[chosen]) * weight[chosen][:, None]
    return out


def sort(m: Router, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    order = experts.flatten().argsort(stable=True)
    token = order // K
    rows = torch.bmm(x[token].unsqueeze(1), m.table[experts.flatten()[order]]).squeeze(1).tanh()
    return torch.zeros_like(x).index_add(0, token, rows * weights.flatten()[order, None])


def unsort(m: Router, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    order = experts.flatten().argsort(stable=True)
    rows = m.experts[0](x.repeat_interleave(K, 0)[order])
    back = rows[order.argsort()].view(-1, K, D)
    return (back * weights.unsqueeze(-1)).sum(1)


def scatter(m: Router, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    order = experts.flatten().argsort(stable=True)
    index = (order // K)[:, None].expand(-1, D)
    rows = m.experts[1](x.gather(0, index)) * weights.flatten()[order, None]
    return torch.zeros_like(x).scatter_add(0, index, rows)


def capacity(m: Router, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Each expert keeps its first few tokens; the position counts over the whole batch, but only as an integer."""
    out = torch.zeros_like(x)
    for e in range(E):
        chosen = (experts == e).any(-1)
        kept = chosen & (chosen.long().cumsum(0) <= 4)
        token = kept.nonzero().squeeze(-1)
        out = out.index_add(0, token, m.experts[e](x[token]))
    return out


def shared(m: Router, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    return loop(m, x, weights, experts) + m.experts[0](x)


def dropped(m: Router, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    order = experts[:, 0].argsort(stable=True)
    kept = (torch.arange(B * T) % 2 == 0).nonzero().squeeze(-1)
    token = order[kept]
    rows = m.experts[2](x[order])[kept] + x[token]
    return torch.zeros_like(x).index_add(0, token, rows)


def dense(m: Router, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    gates = torch.zeros(len(x), E, dtype=x.dtype).scatter(1, experts, weights)
    every = torch.stack([expert(x) for expert in m.experts], 1)
    return torch.einsum("ne,ned->nd", gates, every)


MIXES = [loop, masked, sort, unsort, scatter, capacity, shared, dropped, dense]


def positions(m: Model, x: Tensor, where: Tensor) -> Tensor:
    """The rows to predict, as flat positions."""
    return m.b(m.a(x).flatten(0, 1)[where])


def unpad(m: Model, x: Tensor, mask: Tensor) -> Tensor:
    """Padding removed before the layers, and put back behind them."""
    where = mask.flatten().nonzero().flatten()
    rows = m.b(m.a(x).flatten(0, 1)[where].tanh())
    return torch.zeros(B * T, D, dtype=x.dtype).index_put((where,), rows).view(B, T, D)


def mask_of(seed: int = 3) -> Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) > 0.4


def routed(mix: Any) -> Case:
    torch.manual_seed(0)
    x = floats(B, T, D)
    model = Router(mix).double()
    losses = lambda m: squares(m(x))  # noqa: E731
    used = {n for n, g in zip(named(model), torch.autograd.grad(losses(model).sum(), list(named(model).values()),
                                                              allow_unused=True), strict=True) if g is not None}  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in used)
    return model, losses, lambda m: losses(m).mean()


@pytest.fixture(autouse=True)
def dynamic_shapes() -> Any:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


@pytest.mark.parametrize("mix", MIXES, ids=lambda f: f.__name__)
def test_experts(mix: Any) -> None:
    compare(routed(mix))


def linears() -> dict[str, Any]:
    return {"a": nn.Linear(D, D), "b": nn.Linear(D, D)}


def test_rows_to_predict() -> None:
    """A loss on rows picked by a boolean mask, or by flat positions of every example."""
    x, mask = floats(B, T, D), mask_of()
    owner = mask.nonzero()[:, 0]

    def picked(m: Model, x: Tensor) -> Tensor:
        return m.b(m.a(x)[mask]).square().sum(-1)

    def by_example(values: Tensor) -> Tensor:
        return torch.zeros(B, dtype=values.dtype).index_add(0, owner, values)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.b(self.a(x)[mask]).square().sum(-1)

    model = Masked().double()
    compare((model, lambda m: by_example(m(x, mask)), lambda m: m(x, mask).sum() / B))
    where = torch.tensor([[0, 3], [5, 9], [12, 14]])
    both = Model(positions, **linears()).double()
    compare(
        (
            both,
            lambda m: squares(m(x, where.flatten()).view(B, 2, D)),
            lambda m: squares(m(x, where.flatten())).sum() / B,
        )
    )
    rows = torch.tensor([1, 6, 7, 14])
    some = Model(positions, **linears()).double()
    losses = lambda m: torch.zeros(B, dtype=x.dtype).index_add(0, rows // T, squares(m(x, rows)))  # noqa: E731
    compare((some, losses, lambda m: squares(m(x, rows)).sum() / B))


SELECTIONS: dict[str, Any] = {
    "flat": lambda h, k: h.flatten(0, 1)[k.flatten()],
    "viewed": lambda h, k: h.view(-1, D)[k.view(-1)],
    "compared": lambda h, k: h.flatten(0, 1)[(k.long() * 2 > 1).flatten()],
    "integers": lambda h, k: h.flatten(0, 1)[k.long().flatten().bool()],
    "nonzero_of_integers": lambda h, k: h.flatten(0, 1)[k.long().flatten().nonzero().squeeze(-1)],
    "narrow": lambda h, k: h.flatten(0, 1)[k.flatten().nonzero().squeeze(-1).to(torch.int8).long()],
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections(name: str) -> None:
    x, mask, select = floats(B, T, D), mask_of(), SELECTIONS[name]
    owner = select(torch.arange(B).view(B, 1, 1).expand(B, T, D).contiguous(), mask)[:, 0]

    class Selected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.b(select(self.a(x), mask)).sin().sum()

    def losses(m: Selected) -> Tensor:
        rows = m.b(select(m.a(x), mask)).sin().sum(-1)
        return torch.zeros(B, dtype=rows.dtype).index_add(0, owner, rows)

    compare((Selected().double(), losses, lambda m: m(x, mask) / B))


def test_more_rows_than_examples_have() -> None:
    """A permutation of twice as many rows, undone."""

    def function(m: Model, x: Tensor, key: Tensor) -> Tensor:
        order = key.flatten().argsort(stable=True)
        return m.b(m.a(x)[order % B][order.argsort()]).view(2, B, -1).transpose(0, 1)

    x, key = floats(B, D), torch.tensor([[2, 0], [1, 1], [0, 2]])
    losses = lambda m: squares(m(x, key))  # noqa: E731
    model = Model(function, **linears()).double()
    truth = oracle.per_example_sq_norms(model, losses(model))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.per_example": True})
    losses(compiled).mean().backward()
    found = {
        n: f
        for n, f in per_example_sq_norms(model).items()
        if {r.name: r for r in coverage(model)}[n].status == "measured"
    }
    assert found and oracle.names_beyond(found, {n: truth[n] for n in found}, oracle.tolerance(torch.float64)) == []


def test_padding_removed() -> None:
    x, mask = floats(B, T, D), mask_of()
    losses = lambda m: squares(m(x, mask))  # noqa: E731
    compare((Model(unpad, **linears()).double(), losses, lambda m: losses(m).mean()))


def test_writing_through_a_mask() -> None:
    def function(m: Model, x: Tensor, mask: Tensor) -> Tensor:
        y = m.a(x)
        y[mask] = 0.5
        return m.b(y)

    x, mask = floats(B, T, D), mask_of()
    losses = lambda m: squares(m(x, mask))  # noqa: E731
    compare((Model(function, **linears()).double(), losses, lambda m: losses(m).mean()))


def test_balance_loss() -> None:
    """Load fractions are counts that nothing differentiates; the loss is linear in each token's probabilities."""

    def function(m: Model, x: Tensor) -> Tensor:
        scores = m.a(x).flatten(0, 1).softmax(-1)
        counts = torch.bincount(scores.argmax(-1), minlength=D).to(x.dtype) / (B * T)
        return (scores * counts).sum(-1).view(B, T).mean(1) + squares(m.b(x))

    x = floats(B, T, D)
    losses = lambda m: m(x)  # noqa: E731
    compare((Model(function, **linears()).double(), losses, lambda m: losses(m).mean()))


@pytest.mark.slow
@pytest.mark.parametrize("mix", [loop, sort], ids=lambda f: f.__name__)
def test_inductor(mix: Any) -> None:
    compare(routed(mix), **{"gns.inner": "inductor"})


@pytest.mark.parametrize(
    "function",
    [lambda m, x, p: m.b(m.a(x) + m.a(x)[p]), lambda m, x, p: m.b(m.a(x)) @ m.b(m.a(x))[p].flatten(1).T[:, :D].T[:1].T],
    ids=["mixup", "cross"],
)
def test_rows_of_others_are_refused(function: Any) -> None:
    x, order = floats(B, D), torch.tensor([2, 0, 1])
    model = Model(function, **linears()).double()
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager"})
    with pytest.warns(UserWarning):
        squares(compiled(x, order)).mean().backward()
    status = {row.name: row.status for row in coverage(model)}
    assert status["a.weight"] == status["a.bias"] == "refused"


def test_any_rows() -> None:
    """Experts that get no row, one row or all of them; sizes that agree with each other."""
    for bias in (-50.0, 50.0):
        torch.manual_seed(0)
        model, x = Router(loop).double(), floats(B, B, D)
        with torch.no_grad():
            model.gate.weight[0] += bias
        losses = lambda m: squares(m(x))  # noqa: E731, B023
        truth = oracle.per_example_sq_norms(model, losses(model))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.per_example": True})
        losses(compiled).mean().backward()
        found = per_example_sq_norms(model)
        measured = {n: t for n, t in truth.items() if n in found}
        assert oracle.names_beyond(found, measured, oracle.tolerance(torch.float64)) == []
