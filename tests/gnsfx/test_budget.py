"""Estimates on a budget through the whole of it: unbiased, labelled, drawn afresh in each step, and nothing else touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gnsfx
from gnsfx import collector, draws
from gnsfx.errors import OptionError
from gnsfx.kernels.cost import Cost
from gnsfx.noise.intervals import one_step
from gnsfx.passes import pipeline
from gnsfx.passes.budget import Estimate, Item, Spending
from tests import oracle, zoo

OPTIONS = {"gns.inner": "eager", "gns.budget": 0.01}
ERRORS = 5.0  # standard errors
Call = Callable[[nn.Module], Tensor]


@pytest.fixture(autouse=True)
def same_draws() -> Iterator[None]:
    draws._sequence.cache_clear()
    yield
    draws._sequence.cache_clear()


def estimate_all(monkeypatch: pytest.MonkeyPatch, examples: int, columns: int) -> None:
    """Whatever can be estimated is, so: what the models here cost is not worth an estimate."""

    def spend(items: Sequence[Item], plain: float, budget: float, whole_batch: bool = False) -> Spending:
        sizes = {i.slot: i.work.examples for i in items if i.work is not None}
        drawn = {s: B if whole_batch else min(examples, B) for s, B in sizes.items()}
        why = 0.0, Cost(), "so the test says"
        return Spending({s: Estimate(drawn[s], columns, B, *why) for s, B in sizes.items()})

    monkeypatch.setattr(pipeline, "spend", spend)


def batch(examples: int = 4, T: int = 6) -> Call:
    tokens, targets = zoo.ids(11, examples, T), zoo.ids(11, examples, T)
    return lambda model: zoo.token_losses(model(tokens), targets)


def compile(model: nn.Module, **more: object) -> nn.Module:
    return torch.compile(model, backend="gns", options=OPTIONS | {f"gns.{k}": v for k, v in more.items()})  # type: ignore[return-value]


def statuses(model: nn.Module) -> dict[str, str]:
    return {row.name: row.status for row in gnsfx.coverage(model)}


def repeated(model: nn.Module, compiled: nn.Module, call: Call, times: int) -> tuple[Tensor, Tensor, list[str]]:
    """q [times, P] and its estimated variance, of one batch over and over."""
    sums, variances, names = [], [], []
    for _ in range(times):
        oracle.run(compiled, call)
        found = collector.totals(model)
        assert found.values is not None and found.variances is not None
        sums.append(found.values[0].clone())
        variances.append(found.variances.clone())
        names = [n for n, refusal in zip(found.names, found.refusals, strict=True) if refusal is None]
    return torch.stack(sums), torch.stack(variances), names


def unbiased(draws_: Tensor, truth: Tensor) -> Tensor:
    """Where the mean of draws [N, P] is within standard errors of the truth [P], or of rounding for what is exact."""
    error = draws_.std(0) / math.sqrt(len(draws_))
    return (draws_.mean(0) - truth).abs() <= ERRORS * error + 1e-9 * truth.abs() + 1e-20


WAYS = [("gpt_tied", 3, 2), ("convnet", 4, 2), ("convnet", 2, 0), ("reused", 3, 2)]


@pytest.mark.parametrize(("name", "examples", "columns"), WAYS)
def test_sums_and_variances_are_unbiased(
    monkeypatch: pytest.MonkeyPatch, name: str, examples: int, columns: int
) -> None:
    estimate_all(monkeypatch, examples, columns)
    model, call = zoo.ZOO[name]()
    sums, variances, names = repeated(model, compile(model), call, 60)
    truth = oracle.per_example_sq_norms(model, call(model))
    expected = torch.stack([truth[n].sum() for n in names])
    assert unbiased(sums, expected).all()
    estimated = torch.tensor([statuses(model)[n] == "estimated" for n in names])
    assert estimated.any()
    assert not variances[:, ~estimated].any()
    off = ((sums - expected).square() - variances)[:, estimated]
    assert unbiased(off, torch.zeros(off.shape[1])).all()
    total, spread = sums.sum(1, True), variances.sum(1, True)  # errors of parameters are independent
    assert unbiased((total - expected.sum()).square() - spread, torch.zeros(1)).all()


LARGE = {"llama", "bert", "torch_transformer", "convnet", "convnet_channels_last"}
LIKE_GPT = {name for name in zoo.ZOO if name.startswith("gpt")}


@pytest.mark.parametrize("name", sorted({*zoo.ZOO} - LARGE - LIKE_GPT))
def test_every_model_is_measured_or_estimated(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    estimate_all(monkeypatch, 4, 2)
    model, call = zoo.ZOO[name]()
    sums, _, names = repeated(model, compile(model), call, 12)
    assert {*statuses(model).values()} <= {"measured", "estimated"}
    truth = oracle.per_example_sq_norms(model, call(model))
    assert unbiased(sums, torch.stack([truth[n].sum() for n in names])).all()


def test_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate_all(monkeypatch, 2, 3)
    model, call = zoo.ZOO["gpt_untied"]()
    oracle.run(compile(model, strict=True), call)
    rows = {row.name: row for row in gnsfx.coverage(model)}
    assert rows["blocks.0.qkv.weight"].status == "estimated"
    assert rows["blocks.0.qkv.weight"].path == "subsample m=2 of 4 + sketch r=3"
    assert rows["blocks.0.qkv.weight"].reason == "so the test says"
    assert rows["blocks.0.ln1.weight"].status == rows["wte.weight"].status == "measured"
    table = gnsfx.explain(model).table
    assert "* subsample m=2 of 4 + sketch r=3" in table
    assert "estimated: so the test says" in table
    noise = gnsfx.NoiseScale(model)
    noise.step()
    estimated = sum(row.status == "estimated" for row in rows.values())
    assert f"{estimated} parameters are estimated" in noise.summary()


def test_never_by_default(model: nn.Module) -> None:
    oracle.run(compile(model, budget=None), batch())
    assert "estimated" not in statuses(model).values()
    assert collector.totals(model).variances is None


def test_a_summary_without_a_budget_asks_no_graph(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    oracle.run(compile(model, budget=None), batch())
    noise = gnsfx.NoiseScale(model)
    noise.step()
    monkeypatch.setattr("gnsfx.diagnosis.refused_in_run", lambda _: pytest.fail("it may wait for the device"))
    assert "estimated" not in noise.summary()


def test_fresh_in_each_step_and_the_same_in_each_run(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    estimate_all(monkeypatch, 4, 2)
    compiled, call = compile(model), batch()
    first, _, names = repeated(model, compiled, call, 3)
    estimated = torch.tensor([statuses(model)[n] == "estimated" for n in names])
    assert (first[0] != first[1])[estimated].all() and (first[1] != first[2])[estimated].all()
    assert (first[0] == first[1])[~estimated].all()
    torch.manual_seed(17)  # of the user: has nothing to do with it
    draws._sequence.cache_clear()
    assert torch.equal(repeated(model, compiled, call, 3)[0], first)


def test_ranks_draw_apart() -> None:
    assert draws._sequence(0).getrandbits(32) != draws._sequence(1).getrandbits(32)


class Noisy(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(width, 2 * width), nn.Dropout(0.3), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.up(x).relu()))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_training_is_untouched(monkeypatch: pytest.MonkeyPatch, inner: str) -> None:
    """Gradients of what is estimated have the bits of plain ones, dropout masks and random state are those of a plain run."""
    estimate_all(monkeypatch, 3, 2)
    model, x = Noisy(), torch.randn(5, 7, 8)
    compiled = compile(model, inner=inner)

    def run() -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(3)
        oracle.run(compiled, lambda model: model(x).square().sum((1, 2)))
        return oracle.gradients(model), torch.get_rng_state()

    with gnsfx.measuring(False):
        plain, state = run()
    measured, after = run()
    assert statuses(model)["up.weight"] == statuses(model)["down.weight"] == "estimated"
    assert torch.equal(state, after)
    for name in ("up.weight", "down.weight"):
        assert torch.equal(plain[name], measured[name]), name


def test_accumulation(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    estimate_all(monkeypatch, 3, 2)
    compiled, calls = compile(model), [batch(), batch(), batch()]

    def values() -> Tensor:
        found = collector.totals(model)
        assert found.values is not None and found.variances is not None
        return torch.cat([found.values, found.variances[None]])

    apart = []
    for call in calls:
        oracle.run(compiled, call)
        apart.append(values().clone())
    draws._sequence.cache_clear()
    model.zero_grad()
    for call in calls:
        call(compiled).mean().backward()
    torch.testing.assert_close(values(), torch.stack(apart).sum(0))


def test_other_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all of them; where there are no more examples than are drawn, all are taken. One alone is exact."""
    estimate_all(monkeypatch, 3, 0)
    model = Noisy().double().eval()

    def batch(n: int) -> Call:
        x = zoo.floats(n, 7, 8)
        return lambda model: model(x).square().sum((1, 2))

    compiled: Any = torch.compile(model, backend="gns", options=OPTIONS, dynamic=True)
    for n in (5, 4, 3, 2):
        call = batch(n)
        sums, variances, names = repeated(model, compiled, call, 1)
        if n <= 3:
            truth = oracle.per_example_sq_norms(model, call(model))
            torch.testing.assert_close(sums[0], torch.stack([truth[name].sum() for name in names]))
        assert variances.any() == (n > 3)
    assert len(collector.compiled(model)) == 1
    torch._dynamo.reset()
    oracle.run(compile(model), batch(1))
    assert {r.status for r in collector.compiled(model)[-1].graph.report.records} == {"measured"}


def test_single_examples(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """With per_example none is left out, and the interval of one step counts the variance."""
    estimate_all(monkeypatch, 2, 4)
    compiled, call = compile(model, per_example=True), batch(6, 6)
    truth = oracle.per_example_sq_norms(model, call(model))
    noise, rows = gnsfx.NoiseScale(model), []
    for _ in range(60):
        oracle.run(compiled, call)
        rows.append({n: v.clone() for n, v in gnsfx.per_example_sq_norms(model).items()})
    for name, expected in truth.items():
        assert unbiased(torch.stack([row[name] for row in rows]), expected).all(), name
    found = collector.totals(model)
    assert found.variances is not None and found.values is not None
    extra, norms = float(found.variances.sum()), torch.stack([*rows[-1].values()]).sum(0).tolist()
    grad_sq = math.fsum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert extra > 0
    wide = one_step(norms, grad_sq, extra_variance=extra)
    step = noise.step().interval()
    assert (step.low, step.high) == pytest.approx((wide.low, wide.high))


def test_noise_scale_is_unbiased(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """tr(Sigma) and |G|^2 of a step are linear in q: their mean over draws is what exact norms give."""
    call = batch(6, 6)
    oracle.run(compile(model, budget=None), call)
    exact = gnsfx.NoiseScale(model).step()
    torch._dynamo.reset()
    estimate_all(monkeypatch, 3, 2)
    compiled, noise, found = compile(model), gnsfx.NoiseScale(model), []
    for _ in range(100):
        oracle.run(compiled, call)
        step = noise.step()
        found.append(torch.tensor([step.tr_sigma, step.g_sq], dtype=torch.float64))
    assert unbiased(torch.stack(found), torch.tensor([exact.tr_sigma, exact.g_sq], dtype=torch.float64)).all()
    assert noise.coverage_share == 1.0


def test_verify_compares_exact_norms(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    estimate_all(monkeypatch, 2, 2)
    compiled, call = compile(model), batch()
    oracle.run(compiled, call)
    tokens, targets = zoo.ids(11, 4, 6), zoo.ids(11, 4, 6)
    report = gnsfx.verify(compiled, tokens, loss=lambda logits: zoo.token_losses(logits, targets))
    assert len(report.parameters) == len(list(model.parameters()))


def test_in_the_metric_of_the_optimizer_an_estimate_is_not_exact(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # one number for each parameter: exact norms stay exact
    shares = {}
    for estimated in (False, True):
        torch._dynamo.reset()
        if estimated:
            estimate_all(monkeypatch, 2, 2)
        compiled, noise = compile(model, budget=1e9), gnsfx.NoiseScale(model, optimizer=optimizer)
        for _ in range(3):
            oracle.run(compiled, batch())
            noise.step()
        shares[estimated] = noise.preconditioned.exact_share
    assert shares[False] == pytest.approx(1.0)
    assert shares[True] < 0.9


@pytest.mark.parametrize("budget", [0, -0.01, True, "1%", math.nan, math.inf])
def test_what_is_no_budget(budget: object) -> None:
    with pytest.raises(OptionError, match=r"gns\.budget=.*: expected a share of the step's time, such as 0\.01"):
        gnsfx.compile(nn.Linear(2, 2), budget=budget)  # type: ignore[arg-type]


def test_a_real_budget_estimates_the_costliest() -> None:
    """Nothing patched: Grams of 128 positions, and a budget that leaves no room for them."""
    model, x = Noisy(256), torch.randn(16, 128, 256)
    compiled = gnsfx.compile(model, budget=1e-6, inner="eager", path="ghost")
    oracle.run(compiled, lambda m: m(x).square().sum((1, 2)))
    found = {row.name: row for row in gnsfx.coverage(model)}
    assert found["up.weight"].status == "estimated"
    assert found["up.bias"].status == "measured"
    assert found["up.weight"].reason.startswith("gns.budget=1e-06: exactly it would take")
