"""The loop around the prediction: which steps measure everything, and what each of them says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gnsfx
from gnsfx import collector
from gnsfx.errors import NotMeasuredError, OptionError, StateError
from gnsfx.noise import estimators, full_steps, predict
from gnsfx.noise.full_steps import FullSteps
from tests import zoo

EAGER = {"gns.inner": "eager"}


def train(model: nn.Module, compiled: nn.Module, noise: FullSteps, steps: int, B: int = 4) -> list[bool]:
    """Two micro-batches a step. Returns which steps measured everything."""
    kinds = []
    for _ in range(steps):
        for _ in range(2):
            tokens, targets = zoo.ids(11, B, 6), zoo.ids(11, B, 6)
            with noise.measuring():
                loss = zoo.token_losses(compiled(tokens), targets).mean() / 2
            loss.backward()
        found = collector.totals(model)
        kinds.append(noise.take(found))
        assert noise.names is not None
        rows = [sums(model, found, names) for names in (noise.names, set(found.names))]
        noise.step(rows[0], rows[1] if kinds[-1] else None, 0.9)
        found.clear()
        model.zero_grad()
    return kinds


def sums(model: nn.Module, found: collector.Totals, names: frozenset[str] | set[str]) -> Tensor:
    measured = [(n, p) for n, p, r in zip(found.names, found.parameters, found.refusals, strict=True) if r is None]
    assert found.values is not None
    at = [i for i, (n, _) in enumerate(measured) if n in names]
    q, n = found.values[0, at].sum(), found.values[1, 0]
    grad_sq = torch.stack([measured[i][1].grad.square().sum() for i in at]).sum()  # type: ignore[union-attr]
    return torch.stack([*estimators.unbiased_pair(grad_sq, q, n), n - 1])


def compiled_gpt() -> tuple[nn.Module, nn.Module]:
    model = zoo.GPT(layers=1).double()
    return model, torch.compile(model, backend="gns", options=EAGER)


def test_the_order_of_steps_and_where_a_run_goes_on() -> None:
    model, compiled = compiled_gpt()
    noise = FullSteps(every=5, first=3)
    assert train(model, compiled, noise, 11) == [False, *3 * [True], False, True, *4 * [False], True]
    assert noise.names == {n for n, _ in model.named_parameters() if "ln" in n or "norm" in n}
    state, random = noise.state_dict(), torch.random.get_rng_state()
    later = train(model, compiled, noise, 6)
    resumed = FullSteps(every=5, first=3)
    resumed.load_state_dict(state)
    torch.random.set_rng_state(random)
    assert train(model, compiled, resumed, 6) == later
    assert noise.read() == resumed.read()
    prediction = noise.read()
    assert prediction is not None
    assert prediction.full.n_eff > prediction.recent.n_eff / 4 > 0
    noise.reset()
    assert noise.read() is None
    assert train(model, compiled, noise, 2) == [False, True]


def test_the_prediction_is_that_of_the_sums() -> None:
    model, compiled = compiled_gpt()
    noise = FullSteps(every=2, first=1, memory=1e9)
    train(model, compiled, noise, 4)
    found = noise.read()
    assert found is not None
    s_total, g_total, s_norm, g_norm = found.full.mean
    assert found.slopes == (
        s_total / s_norm,
        pytest.approx(g_total / g_norm, nan_ok=True) if g_norm > 0 else found.slopes[1],
    )
    assert found.tr_sigma == pytest.approx(found.recent.mean[0] * s_total / s_norm)


def test_blocks_close_by_the_count_of_full_steps() -> None:
    noise = FullSteps(every=2)
    step = torch.tensor([3.0, 1.0, 7.0]).double()
    for _ in range(full_steps.BLOCK):
        noise.step(step * torch.rand(3).double(), step * (1 + torch.rand(3).double()), 0.9)
    assert noise.state_dict()["looks"] == 1


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.wte(tokens).tanh())


def test_bad_use_is_told() -> None:
    for every in (1, 0, 2.5, True):
        with pytest.raises(OptionError, match="every"):
            FullSteps(every)  # type: ignore[arg-type]
    model = Nothing().double()
    with pytest.raises(NotMeasuredError, match="needs normalisation layers"):
        train(model, torch.compile(model, backend="gns", options=EAGER), FullSteps(4), 1)
    model, compiled = compiled_gpt()
    zoo.token_losses(compiled(zoo.ids(11, 4, 6)), zoo.ids(11, 4, 6)).mean().backward()
    with pytest.raises(NotMeasuredError, match=r"with noise\.measuring"):
        FullSteps(4).take(collector.totals(model))
    with pytest.raises(StateError, match="lacks full"):
        FullSteps(4).load_state_dict({})
    noise = FullSteps(4)
    with pytest.raises(StateError, match=f"not {predict.LENGTH}"):
        noise.load_state_dict(noise.state_dict() | {"row": torch.zeros(3)})


def test_norm_layers_that_change_are_told() -> None:
    model, compiled = compiled_gpt()
    noise = FullSteps(every=4, first=1)
    train(model, compiled, noise, 2)
    assert noise.names is not None
    model.get_parameter(sorted(noise.names)[0]).requires_grad_(False)
    with pytest.raises(NotMeasuredError, match="other norm layers"):
        train(model, compiled, noise, 1)


def test_a_rank_without_examples_counts_on() -> None:
    model, compiled = compiled_gpt()
    noise = FullSteps(every=4, first=2)
    train(model, compiled, noise, 1)
    assert noise.full
    assert noise.take(collector.totals(model))
    assert train(model, compiled, noise, 3) == [True, False, True]


def test_measuring_is_that_of_the_package() -> None:
    with FullSteps(3).measuring(), gnsfx.measuring(True):
        pass
