"""The preconditioned pair of one step: its exact parts against per-example autograd and known moments, the others as stated."""

from __future__ import annotations

import itertools
import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from gnsfx import collector
from gnsfx.errors import OptionError
from gnsfx.noise import diagonal
from gnsfx.noise.estimators import unbiased_pair
from gnsfx.noise.preconditioned import Terms, preconditioner, terms
from tests import oracle, zoo
from tests.gnsfx.test_elementwise import OPTIONS, VECTORS, batch
from tests.gnsfx.test_refusals import Temperature


def grouped(kind: Callable[..., Optimizer], **options: Any) -> Callable[[nn.Module], Optimizer]:
    """Vectors in a group of their own, with another learning rate and eps."""

    def build(model: nn.Module) -> Optimizer:
        vectors = [p for p in model.parameters() if p.dim() < 2]
        rest = [p for p in model.parameters() if p.dim() > 1]
        return kind([{"params": vectors, "lr": 0.002, "eps": 1e-3}, {"params": rest}], lr=0.01, **options)

    return build


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": grouped(AdamW, weight_decay=0.1),
    "amsgrad": grouped(Adam, amsgrad=True, betas=(0.8, 0.9)),
    "rmsprop": grouped(RMSprop, centered=True),
}


def measured(
    model: nn.Module, optimizer: Optimizer, power: int = 1, kept: bool = True
) -> dict[str, tuple[float, float, bool]]:
    """Name -> q_W, |g|_W^2, exact."""
    found = collector.totals(model)
    pair = terms(found, collector.entry_sums(found) if kept else {}, optimizer, power)
    assert isinstance(pair, Terms)
    names = [n for n, reason in zip(found.names, found.refusals, strict=True) if reason is None]
    return dict(zip(names, zip(*(row.tolist() for row in pair), strict=True), strict=True))


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        batch()(model).mean().backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_against_autograd(name: str, power: int) -> None:
    """Over two micro-batches. Where it is not exact, it is the plain noise scale of the parameter, weighed."""
    model = zoo.GPT(layers=1).double()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 3)
    compiled, calls = torch.compile(model, backend="gns", options=OPTIONS), [batch(), batch(3)]
    truths = [oracle.elementwise_sq_sums(model, call(model)) for call in calls]
    for call in calls:
        call(compiled).mean().backward()
    found = measured(model, optimizer, power)
    assert {n for n, (_, _, exact) in found.items() if exact} >= VECTORS
    assert not all(exact for _, _, exact in found.values())
    for n, p in model.named_parameters():
        W = preconditioner(optimizer, p, power)
        q_W, grad_sq, exact = found[n]
        assert p.grad is not None and W is not None
        squares = truths[0][n] + truths[1][n]
        expected = (W * squares).sum() if exact else squares.sum() * (W * p.grad**2).sum() / p.grad.square().sum()
        torch.testing.assert_close(q_W, float(expected), rtol=1e-9, atol=0, msg=lambda m, n=n: f"{n}: {m}")
        torch.testing.assert_close(grad_sq, float((W * p.grad**2).sum()), rtol=1e-9, atol=0)


def test_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.GPT(layers=1).double()
    optimizer = OPTIMIZERS["adamw"](model)
    train(model, optimizer, 2)
    batch()(torch.compile(model, backend="gns", options=OPTIONS)).mean().backward()
    together = measured(model, optimizer)
    monkeypatch.setattr("gnsfx.noise.preconditioned._CHUNK", 100)
    apart = measured(model, optimizer)
    most = max(p.numel() for p in model.parameters()) * torch.finfo(torch.float64).eps  # of sums in another order
    assert apart == {name: pytest.approx(row, rel=most) for name, row in together.items()}


class Scale(nn.Module):
    """The gradient of an example is its row."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(n, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).sum(1)


@pytest.mark.parametrize("power", [1, 2])
def test_unbiased_for_known_moments(power: int) -> None:
    """Rows from N(G, D): the pair averages to tr(W D) and G' W G, within four standard errors."""
    torch.manual_seed(0)
    G, D, B, steps = torch.tensor([1.0, 0.1, -0.3, 0.0]).double(), torch.tensor([0.2, 3.0, 1.0, 0.5]).double(), 6, 1500
    model = Scale(4)
    optimizer = Adam([model.w], lr=0.1)
    model.w.grad = torch.tensor([3.0, 0.1, 0.7, 1.0]).double()
    optimizer.step()
    W = preconditioner(optimizer, model.w, power)
    compiled = torch.compile(model, backend="gns", options=OPTIONS)
    pairs = []
    for _ in range(steps):
        model.zero_grad()
        compiled(G + D.sqrt() * torch.randn(B, 4, dtype=torch.float64)).mean().backward()
        q_W, grad_sq, exact = measured(model, optimizer, power)["w"]
        assert exact
        pairs.append(torch.stack(unbiased_pair(torch.tensor(grad_sq), torch.tensor(q_W), float(B))))
    found = torch.stack(pairs).double()
    expected = torch.stack([(W * D).sum(), (W * G**2).sum()])
    z = (found.mean(0) - expected) / (found.std(0) / steps**0.5)
    assert (z.abs() < 4).all(), z


def test_plain_descent_is_the_plain_noise_scale() -> None:
    model = zoo.GPT(layers=1).double()
    batch()(torch.compile(model, backend="gns", options=OPTIONS)).mean().backward()
    for rates, factor in (((0.1, 0.1), 1.0), ((0.1, 0.025), 0.25)):
        head, rest = [model.norm.weight], [p for p in model.parameters() if p is not model.norm.weight]
        optimizer = SGD([{"params": rest, "lr": rates[0]}, {"params": head, "lr": rates[1]}], momentum=0.9)
        found, plain = measured(model, optimizer), collector.sq_norms(model)
        for n, p in model.named_parameters():
            assert p.grad is not None
            by = factor if n == "norm.weight" else 1.0
            assert found[n] == pytest.approx((by * float(plain[n]), by * float(p.grad.square().sum()), True))


def test_parameters_without_an_update_are_left_out() -> None:
    model = zoo.GPT(layers=1).double()
    others = [p for n, p in model.named_parameters() if n != "norm.bias"]
    optimizer = AdamW(others)
    call, compiled = batch(), torch.compile(model, backend="gns", options=OPTIONS)
    call(compiled).mean().backward()
    assert terms(collector.totals(model), {}, optimizer) is None
    model.norm.weight.grad = None  # no update for it
    optimizer.step()
    model.zero_grad()
    call(compiled).mean().backward()
    for kept in (True, False):
        found = measured(model, optimizer, kept=kept)
        assert {n for n, (q_W, _, _) in found.items() if q_W == -float("inf")} == {"norm.bias", "norm.weight"}


def test_what_a_run_refuses_stays_refused() -> None:
    model, x = Temperature().double(), zoo.floats(4, 4)
    optimizer = AdamW(model.parameters())
    compiled = torch.compile(model, backend="gns", options=OPTIONS)
    for _ in range(2):
        optimizer.zero_grad()
        out, scale = compiled(x)
        zoo.squares(out * scale).mean().backward()
        optimizer.step()
    found = measured(model, optimizer)
    assert {n: q_W == -float("inf") for n, (q_W, _, _) in found.items()} == {
        "a.weight": False,
        "a.bias": False,
        "scale": True,
    }


class NoReading(TorchDispatchMode):
    """Nothing goes to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "sgd"])
def test_nothing_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps and rates as the optimizers keep them on a device."""
    monkeypatch.setattr(diagonal, "_number", lambda value: value)
    model = zoo.GPT(layers=1).double()
    optimizer = SGD(model.parameters(), lr=0.1) if name == "sgd" else OPTIMIZERS[name](model)
    train(model, optimizer, 2)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    batch()(torch.compile(model, backend="gns", options=OPTIONS)).mean().backward()
    with NoReading():
        found = collector.totals(model)
        pair = terms(found, collector.entry_sums(found), optimizer)
    monkeypatch.undo()
    again = terms(found, collector.entry_sums(found), optimizer)
    for one, other in zip(pair, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)  # 1 - beta^t in float32


def test_other_powers() -> None:
    model = Scale(2)
    with pytest.raises(OptionError, match=r"power=0.5: expected 1 \(curvature like 1/P\) or 2"):
        terms(collector.totals(model), {}, Adam(model.parameters()), 0.5)  # type: ignore[arg-type]


def test_how_far_the_approximation_is_off() -> None:
    """A small GPT on text, every parameter approximate: a guard on the numbers in the docstring, not a bound on others."""
    torch.manual_seed(0)
    text = "".join(pydoc_data.topics.topics.values())[:50_000]
    data = torch.tensor([*map(sorted(set(text)).index, text)])
    model, B, T = zoo.GPT(V=len(set(text)), T=12, D=16, layers=1), 16, 12
    optimizer = AdamW(model.parameters(), lr=3e-3)

    def losses(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(m(x).flatten(0, 1), y.flatten(), reduction="none").view_as(y).mean(1)

    totals = torch.zeros(3, dtype=torch.float64)  # true, approximate, |g|^2
    for step in itertools.count():
        rows = torch.stack([data[a : a + T + 1] for a in torch.randint(len(data) - T - 1, (B,))])
        x, y = rows[:, :-1], rows[:, 1:]
        optimizer.zero_grad()
        losses(model, x, y).mean().backward()
        if step >= 200:
            squares = oracle.elementwise_sq_sums(model, losses(model, x, y))
            for n, p in model.named_parameters():
                W, e = preconditioner(optimizer, p), squares[n]
                assert W is not None and p.grad is not None
                weighed = (W * p.grad**2).sum()
                totals += torch.stack([(W * e).sum(), e.sum() * weighed / p.grad.square().sum(), weighed])
        if step == 220:
            break
        optimizer.step()
    true, approximate, grad_sq = totals.tolist()
    assert 0.9 < approximate / true < 1.1
    scales = [B * (q - grad_sq / B) / (grad_sq - q) for q in (true, approximate)]
    assert 0.6 < scales[1] / scales[0] < 1.6, scales
