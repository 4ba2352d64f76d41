"""P read from the state of an optimizer against what the optimizer does: without momentum its update is -lr P g."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from gnsfx.errors import GnsError
from gnsfx.noise import diagonal
from gnsfx.noise.preconditioned import preconditioner

NO_MOMENTUM: dict[str, Any] = {"betas": (0.0, 0.9)}
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "adam": (Adam, NO_MOMENTUM),
    "adam_large_eps": (Adam, NO_MOMENTUM | {"eps": 0.3}),
    "adam_without_eps": (Adam, NO_MOMENTUM | {"eps": 0.0}),
    "amsgrad": (Adam, NO_MOMENTUM | {"amsgrad": True}),
    "adam_one_by_one": (Adam, NO_MOMENTUM | {"foreach": False}),
    "adam_fused": (Adam, NO_MOMENTUM | {"fused": True}),
    "adamw": (AdamW, NO_MOMENTUM | {"weight_decay": 0.0}),
    "nadam": (NAdam, NO_MOMENTUM),
    "radam": (RAdam, NO_MOMENTUM),
    "adamax": (Adamax, NO_MOMENTUM | {"eps": 0.2}),
    "rmsprop": (RMSprop, {"alpha": 0.9}),
    "rmsprop_centered": (RMSprop, {"alpha": 0.9, "centered": True}),
    "adagrad": (Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    "sgd": (SGD, {}),
}


def train(
    name: str, steps: int, rates: tuple[float, ...] = (0.01,)
) -> tuple[Optimizer, list[nn.Parameter], list[Tensor]]:
    """Random gradients, a group for each rate; returns the last update of each parameter by its gradient and the largest rate."""
    torch.manual_seed(0)
    kind, options = OPTIMIZERS[name]
    parameters = [nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in rates]
    optimizer = kind([{"params": [p], "lr": lr} for p, lr in zip(parameters, rates, strict=True)], **options)
    applied = []
    for _ in range(steps):
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.randn_like(p) * torch.logspace(-2, 1, 4)
        optimizer.step()
        applied = [(b - p.detach()) / p.grad / max(rates) for b, p in zip(before, parameters, strict=True)]
    return optimizer, parameters, applied


@pytest.fixture(params=["host", "device"])
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps as the optimizer keeps them on the host, and as it keeps them on a device: those must stay tensors."""
    if request.param == "device":
        monkeypatch.setattr(diagonal, "_number", lambda value: value)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("steps", [1, 4, 30])  # RAdam rectifies from the 6th
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_what_the_optimizer_multiplies_with(name: str, steps: int) -> None:
    optimizer, (p,), (applied,) = train(name, steps)
    found = preconditioner(optimizer, p)
    torch.testing.assert_close(found, applied, rtol=1e-5, atol=0)
    torch.testing.assert_close(preconditioner(optimizer, p, 2), applied.square(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", ["adam", "rmsprop", "sgd"])
def test_groups_with_other_learning_rates(name: str) -> None:
    optimizer, parameters, applied = train(name, 7, (0.01, 0.04, 0.0))
    for p, expected in zip(parameters, applied, strict=True):
        torch.testing.assert_close(preconditioner(optimizer, p), expected, rtol=1e-9, atol=1e-12)


def test_a_warm_up_that_starts_at_zero() -> None:
    optimizer, (p,), _ = train("adam", 3, (0.01,))
    expected = preconditioner(optimizer, p)
    optimizer.param_groups[0]["lr"] = 0.0
    assert torch.equal(preconditioner(optimizer, p), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_without_a_gradient_have_none(name: str) -> None:
    """1 / eps would be the largest of all."""
    if name in ("sgd", "adagrad"):
        return
    kind, options = OPTIMIZERS[name]
    p = nn.Parameter(torch.randn(4))
    optimizer = kind([p], lr=0.1, **options)
    for _ in range(8):
        p.grad = torch.randn(4) * torch.tensor([1.0, 0.0, 1.0, 0.0])
        optimizer.step()
    found = preconditioner(optimizer, p)
    assert (
        found is not None and found.isfinite().all() and ((found > 0) == torch.tensor([True, False, True, False])).all()
    )


def test_low_precision_is_read_in_single_precision() -> None:
    p = nn.Parameter(torch.randn(4).bfloat16())
    optimizer = Adam([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    found = preconditioner(optimizer, p)
    v = optimizer.state[p]["exp_avg_sq"].float()
    torch.testing.assert_close(found, 1 / ((v / (1 - 0.999)).sqrt() + 1e-8))


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "sgd"])
def test_there_is_none_before_the_first_update(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    p = nn.Parameter(torch.randn(4))
    assert preconditioner(kind([p], lr=0.1, **options), p) is None


def test_errors() -> None:
    p, q = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    with pytest.raises(GnsError, match=r"LBFGS is not known to. Expected one of torch\.optim: Adam, AdamW"):
        preconditioner(LBFGS([p]), p)
    with pytest.raises(GnsError, match="none of the measured parameters is in the Adam that was given"):
        preconditioner(Adam([p]), q)
