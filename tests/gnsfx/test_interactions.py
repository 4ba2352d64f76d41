"""Examples that meet each other: refused by parameter name, with the op and the user's line; all others stay exact."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnsfx import collector
from gnsfx.coverage import coverage
from gnsfx.errors import GnsWarning
from tests import oracle
from tests.zoo import floats, squares

EAGER = {"gns.inner": "eager", "gns.per_example": True}
B = D = 4
PERMUTED = torch.tensor([2, 0, 3, 1])


class Net(nn.Module):
    """``own`` works on each example alone, and is a result of its own: its parameters must stay exact."""

    def __init__(self, meet: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.own, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3), nn.Linear(D, 2)
        self.t, self.meet = nn.Parameter(torch.tensor(0.3)), meet

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.own(x), self.meet(self, x)


def losses(results: tuple[Tensor, Tensor]) -> Tensor:
    return squares(results[0]) + squares(results[1])


class ClippedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad / grad.norm()


def centred_gradient(x: Tensor) -> Tensor:
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda g: g - g.mean(0))
    return x


def pair(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    return m.a(x), m.b(x.flip(1))


def clip(u: Tensor, v: Tensor) -> Tensor:
    scores = F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).T
    both = [F.cross_entropy(s, torch.arange(B), reduction="none") for s in (scores, scores.T)]
    return torch.stack(both, 1)


def simclr(u: Tensor, v: Tensor) -> Tensor:
    z = F.normalize(torch.cat((u, v)), dim=-1)
    scores = (z @ z.T).masked_fill(torch.eye(2 * B, dtype=torch.bool), -1e9)
    return F.cross_entropy(scores, torch.arange(2 * B).roll(B), reduction="none").view(2, B).T


def covariance(u: Tensor, v: Tensor) -> Tensor:
    centred = u - u.mean(0)
    return (u - v).square() + (centred.T @ centred / B).fill_diagonal_(0).square().sum()


def correlation(u: Tensor, v: Tensor) -> Tensor:
    u, v = ((z - z.mean(0)) / z.std(0) for z in (u, v))
    return (u.T @ v / B - torch.eye(D)).square().sum().expand(B, 1)


A, BOTH, REST = {"a"}, {"a", "b"}, {"head"}
MEETINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], set[str], str]] = {
    "mixup": (lambda m, x: m.head(0.3 * m.a(x) + 0.7 * m.a(x)[PERMUTED]), A | REST, "other examples"),
    "mixup of inputs": (lambda m, x: m.head(m.a(0.3 * x + 0.7 * x[torch.randperm(B)])), A | REST, "other examples"),
    "cutmix": (lambda m, x: m.head(torch.where(x > 0, m.a(x), m.a(x).flip(0))), A | REST, "moves examples"),
    "shift": (lambda m, x: m.head(torch.cat((m.a(x)[1:], m.a(x)[:1]))), A | REST, "takes some examples"),
    "first example in the input": (lambda m, x: m.head(m.a(x - x[0])), A | REST, "takes some examples"),
    "attention between examples": (
        lambda m, x: m.head(F.scaled_dot_product_attention(m.a(x)[None], x[None], x[None])[0]),
        A | REST,
        "examples with other examples",
    ),
    "halves": (lambda m, x: m.head(m.a(x).view(2, 2, D).flip(0).view(B, D)), A | REST, "splits the examples"),
    "pairs": (lambda m, x: m.head((m.a(x)[:, None] - m.b(x)[None]).tanh().sum(1)), BOTH | REST, "along dimension"),
    "einsum": (lambda m, x: torch.einsum("bi,ci->bc", *pair(m, x)), BOTH, "in-batch negatives"),
    "convolution along the batch": (
        lambda m, x: m.head(F.conv1d(m.a(x).T[None], m.b.weight[:, None, :3], padding=1, groups=D)[0].T),
        A | REST | {"b.weight"},
        "works across dimension",
    ),
    "pooling along the batch": (lambda m, x: m.head(F.avg_pool1d(m.a(x).T[None], 3, 1, 1)[0].T), A | REST, "works across dimension"),
    "spectrum of the batch": (lambda m, x: m.head(torch.fft.fft(m.a(x), dim=0).real), A | REST, "transforms along the batch"),
    "deviation of the batch": (lambda m, x: m.head(m.a(x)) * m.b(x).std(0).mean(), {"b"}, "examples interact"),
    "normalised over everything": (lambda m, x: m.head(F.layer_norm(m.a(x), (B, D))), A, "examples interact"),
    "divided by the norm": (lambda m, x: m.head(m.a(x) / m.a(x).norm()), A, "examples interact"),
    "weights over the batch": (lambda m, x: m.head(m.a(x) * m.b(x).mean(1, keepdim=True).softmax(0)), {"b"}, "examples interact"),
    "a clipped gradient": (lambda m, x: m.head(ClippedGradient.apply(m.a(x))), A, "summed over the batch"),  # type: ignore[arg-type]
    "a centred gradient": (lambda m, x: m.head(centred_gradient(m.a(x))), {"a.weight"}, "examples interact"),
    "clip": (lambda m, x: clip(*pair(m, x)) * m.t.exp(), BOTH, "in-batch negatives"),
    "simclr": (lambda m, x: simclr(*pair(m, x)) * m.t.exp(), BOTH, "in-batch negatives"),
    "covariance": (lambda m, x: covariance(*pair(m, x)), A, "summed over the batch"),
    "correlation": (lambda m, x: correlation(*pair(m, x)), BOTH, "examples interact"),
    "ranked list": (lambda m, x: -m.a(x)[:, :1].log_softmax(0) * m.b(x)[:, :1].detach().softmax(0), A, "examples interact"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
@pytest.mark.parametrize("name", MEETINGS)
def test_examples_that_meet(name: str) -> None:
    meet, before, reason = MEETINGS[name]
    torch.manual_seed(0)
    model, x = Net(meet).double(), floats(B, D)
    truth = oracle.per_example_sq_norms(model, losses(model(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GnsWarning)
        losses(torch.compile(model, backend="gns", options=EAGER)(x)).mean().backward()
    refused = {row.name: row.reason for row in coverage(model) if row.status == "refused"}
    got_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    expected = {n for n in got_gradient if n in before or n.split(".")[0] in before}
    assert expected <= set(refused) and not {"own.weight", "own.bias"} & set(refused)
    assert any(reason in refused[n] for n in expected), refused
    assert all(" (at " in refused[n] and "test_interactions.py" in refused[n] for n in expected), refused
    found = collector.per_example_sq_norms(model)
    assert set(found) == got_gradient - set(refused)
    assert oracle.names_beyond(found, {n: truth[n] for n in found}, oracle.tolerance(torch.float64)) == []


def test_a_loss_compiled_by_itself() -> None:
    """The coupling is in a graph behind the model's."""
    model, x = nn.Sequential(nn.Linear(D, D), nn.Tanh()).double(), floats(B, D)
    compiled = torch.compile(model, backend="gns", options=EAGER)
    loss = torch.compile(lambda z: simclr(z, z.flip(1)).mean(), backend="gns", options=EAGER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GnsWarning)
        loss(compiled(x)).backward()
    rows = coverage(model)
    assert (
        {row.status for row in rows}
        == {"refused"}
        == {"refused" if m.refusal else "measured" for m in collector.measurements(model)}
    )
    assert "later graph" in rows[0].reason and "in-batch negatives" in rows[0].reason
