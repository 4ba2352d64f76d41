"""Steps that measure less, or nothing: every version of a graph is compiled once, and no step reads another one's norms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gnsfx
from gnsfx import backend, collector, compiled_graph, leaves, unmeasured
from gnsfx.errors import NotMeasuredError, OptionError
from tests import oracle, zoo

EAGER = {"gns.inner": "eager"}
Call = Callable[[nn.Module], Tensor]


class Compiles(list[str]):
    """What each graph was compiled to measure, in order."""


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Compiles:
    seen, real = Compiles(), backend.inner_compile

    def counted(gm: Any, inputs: Any, options: Any, patches: Any, rewriting: Any) -> Any:
        seen.append("nothing" if rewriting is None else str(options.params))
        return real(gm, inputs, options, patches, rewriting)

    for module in (backend, compiled_graph):
        monkeypatch.setattr(module, "inner_compile", counted)
    return seen


def batch(examples: int = 4, T: int = 6) -> Call:
    tokens, targets = zoo.ids(11, examples, T), zoo.ids(11, examples, T)
    return lambda model: zoo.token_losses(model(tokens), targets)


def norms_of(model: nn.Module) -> set[str]:
    kinds = (nn.LayerNorm, zoo.RMSNorm)
    return {f"{m}.{p}" for m, k in model.named_modules() if isinstance(k, kinds) for p, _ in k.named_parameters()}


def backward(compiled: nn.Module, selection: Any, *calls: Call) -> None:
    for call in calls:
        with gnsfx.measuring(selection):
            loss = call(compiled).mean()
        loss.backward()


def check(model: nn.Module, names: set[str], *calls: Call) -> None:
    """Exactly these are measured, and as per-example autograd says."""
    found = [oracle.per_example_sq_norms(model, call(model)) for call in calls]
    truth = {name: torch.cat([f[name] for f in found]).sum()[None] for name in names}
    measured = {name: value[None] for name, value in gnsfx.sq_norms(model).items()}
    assert measured.keys() == truth.keys()
    assert oracle.names_beyond(measured, truth, oracle.tolerance(torch.float64)) == []
    totals = collector.totals(model)
    assert totals.values is not None
    assert totals.values.shape == (2, len(names))
    assert set(totals.values[1].tolist()) == {float(sum(len(call(model)) for call in calls))}


def reasons(model: nn.Module) -> set[str | None]:
    return {m.refusal for m in collector.measurements(model)} - {None}


@pytest.mark.parametrize(
    ("make", "order", "set_to_none"),
    [
        (zoo.GPT, "norm all norm norm all", True),
        (zoo.GPT, "all norm norm all", False),
        (zoo.Llama, "all off norm off all norm", True),  # its norm layers are written by hand
    ],
)
def test_alternating_steps(make: Callable[..., nn.Module], order: str, set_to_none: bool, compiles: Compiles) -> None:
    model = make(layers=1).double()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    every, norms = {n for n, _ in model.named_parameters()}, norms_of(model)
    assert norms
    for selection in order.split():
        model.zero_grad(set_to_none)
        calls = [batch(), batch()]
        backward(compiled, {"off": False}.get(selection, selection), *calls)
        if selection == "off":
            with pytest.raises(NotMeasuredError):
                gnsfx.sq_norms(model)
        else:
            check(model, every if selection == "all" else norms, *calls)
        if selection == "norm" and "all" in compiles:
            assert reasons(model) <= {unmeasured.NOT_SELECTED, "not selected by gns.params='norm'"}
            status = {row.name: row.status for row in gnsfx.coverage(model)}
            assert status == {n: "measured" if n in norms else "unused" for n in every}
    names = {"off": "nothing"}
    assert sorted(compiles) == sorted({names.get(s, s) for s in order.split()})


@pytest.mark.parametrize("order", [("norm", "all"), ("all", "norm"), (False, "all"), ("all", False)])
def test_micro_batches_of_one_step_measured_differently(order: tuple[Any, Any]) -> None:
    model = zoo.GPT(layers=1).double()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    every, norms = {n for n, _ in model.named_parameters()}, norms_of(model)
    for set_to_none, before in itertools.product([True, False], [None, "all", "norm"]):
        if before is not None:
            backward(compiled, before, batch())
            model.zero_grad(set_to_none)
        calls = [batch(), batch()]
        for selection, call in zip(order, calls, strict=True):
            backward(compiled, selection, call)
        if False in order:
            assert reasons(model) <= {unmeasured.FOREIGN, unmeasured.MEASURED_IN_PART}
            with pytest.raises(NotMeasuredError):
                gnsfx.sq_norms(model)
        else:
            check(model, norms, *calls)
            refused = {row.name for row in gnsfx.coverage(model) if row.status == "refused"}
            assert refused == every - norms
        model.zero_grad(set_to_none)
        backward(compiled, "all", *calls)
        check(model, every, *calls)
        model.zero_grad(set_to_none)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_alternating_with_the_collectors_cleared_as_a_noise_scale_does(set_to_none: bool) -> None:
    model = zoo.GPT(layers=1).double()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    every = {n for n, _ in model.named_parameters()}
    for selection in ("norm", "all", "norm", "norm", "all", "all", False, "all"):
        calls = [batch(), batch()]
        backward(compiled, selection, *calls)
        if selection:
            check(model, every if selection == "all" else norms_of(model), *calls)
            collector.totals(model).clear()
        model.zero_grad(set_to_none)


def test_a_switch_is_no_reason_to_read_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they are zeroed in place, which cannot be told from the host."""
    model = zoo.GPT(layers=1).double()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    monkeypatch.setattr(torch, "_foreach_norm", lambda *_: pytest.fail("the gradients were read"))
    for selection in ("all", "norm", "all", "norm", "norm", "all"):
        backward(compiled, selection, batch())
        collector.totals(model).clear()
        model.zero_grad()


class Broken(nn.Module):
    """Three graphs; the first and the last have no norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.ln, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        torch._dynamo.graph_break()
        x = self.ln(x)
        torch._dynamo.graph_break()
        return self.head(x)


def test_graphs_without_a_norm_layer(compiles: Compiles) -> None:
    model = Broken().double()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    every = {n for n, _ in model.named_parameters()}
    for selection in ("all", "norm", "norm", "all"):
        model.zero_grad()
        call = batch()
        backward(compiled, selection, call)
        check(model, every if selection == "all" else norms_of(model), call)
        assert reasons(model) <= {unmeasured.NOT_SELECTED}
    assert sorted(compiles) == 3 * ["all"] + 3 * ["norm"]


def test_options_stay_those_of_each_model(compiles: Compiles) -> None:
    plain, detailed = zoo.GPT(layers=1).double(), zoo.GPT(layers=1).double()
    with_options = EAGER | {"gns.per_example": True, "gns.strict": True}
    for model, options in ((plain, EAGER), (detailed, with_options)):
        compiled = torch.compile(model, backend="gns", options=options)
        for selection in ("norm", "all", "norm"):
            model.zero_grad()
            calls = [batch(), batch()]
            backward(compiled, selection, *calls)
            if model is plain:
                with pytest.raises(NotMeasuredError, match="per_example"):
                    gnsfx.per_example_sq_norms(model)
            else:
                found = gnsfx.per_example_sq_norms(model)
                parts = [oracle.per_example_sq_norms(model, call(model)) for call in calls]
                truth = {name: torch.cat([part[name] for part in parts]) for name in found}
                assert found.keys() == (norms_of(model) if selection == "norm" else truth.keys())
                assert oracle.names_beyond(found, truth, oracle.tolerance(torch.float64)) == []
    assert compiles == ["norm", "all"] * 2


def test_what_the_model_was_compiled_for_is_compiled_once(compiles: Compiles) -> None:
    model = zoo.GPT(layers=1).double()
    compiled = torch.compile(model, backend="gns", options=EAGER | {"gns.params": "norm"})
    call = batch()
    for selection in (True, "norm", "all", True, 1, "all"):
        model.zero_grad()
        backward(compiled, selection, call)
    check(model, {n for n, _ in model.named_parameters()}, call)
    assert compiles == ["norm", "all"]


def test_a_selection_of_ones_own(compiles: Compiles) -> None:
    model = zoo.GPT(layers=1).double()
    compiled = torch.compile(model, backend="gns", options=EAGER)

    def is_bias(name: str, parameter: Any) -> bool:
        return name.endswith("bias")

    for selection in (is_bias, True, is_bias):
        model.zero_grad()
        call = batch()
        backward(compiled, selection, call)
    check(model, {n for n, _ in model.named_parameters() if n.endswith("bias")}, call)
    assert len(compiles) == 2


def test_nested_and_after_an_error() -> None:
    model = zoo.GPT(layers=1).double()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    every, call = {n for n, _ in model.named_parameters()}, batch()
    with gnsfx.measuring(False):
        backward(compiled, True, call)
    check(model, every, call)
    with pytest.raises(ZeroDivisionError), gnsfx.measuring(False):
        raise ZeroDivisionError
    model.zero_grad()
    call(compiled).mean().backward()
    check(model, every, call)


@pytest.mark.parametrize("selection", [False, "norm"])
def test_other_backends_are_left_alone(selection: Any) -> None:
    seen: list[int] = []

    def count(gm: Any, inputs: Any) -> Any:
        seen.append(len(inputs))
        return gm.forward

    torch._dynamo.reset()
    model = zoo.GPT(layers=1).double()
    compiled = torch.compile(model, backend="aot_eager")
    call = batch()
    call(compiled)
    with torch.compiler.set_stance("fail_on_recompile"), gnsfx.measuring(selection):
        call(compiled).mean().backward()
    assert all(not leaves.collectors_of(p) for p in model.parameters())
    custom = torch.compile(zoo.GPT(layers=1).double(), backend=count)
    with gnsfx.measuring(selection):
        call(custom).mean().backward()
    assert len(seen) == 1


def test_a_wrapper_of_the_backend_follows() -> None:
    model = zoo.GPT(layers=1).double()
    compiled = torch.compile(model, backend=lambda gm, inputs: backend.gns(gm, inputs, options=EAGER))
    for selection in ("norm", True, "norm"):
        model.zero_grad()
        call = batch()
        backward(compiled, selection, call)
        check(model, norms_of(model) if selection == "norm" else {n for n, _ in model.named_parameters()}, call)


def test_bad_use() -> None:
    with pytest.raises(OptionError, match="nrom"), gnsfx.measuring("nrom"):
        pass

    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with gnsfx.measuring("norm"):
                return x * 2

    with pytest.raises(Exception, match="measuring"):
        torch.compile(Inside(), backend="gns", options=EAGER)(torch.ones(2, requires_grad=True))


def test_through_inductor(compiles: Compiles) -> None:
    model = zoo.GPT(layers=1).double()
    compiled = torch.compile(model, backend="gns")
    every = {n for n, _ in model.named_parameters()}
    for selection in ("norm", "all", False, "norm", "all"):
        model.zero_grad()
        calls = [batch(), batch()]
        backward(compiled, selection, *calls)
        if selection:
            check(model, every if selection == "all" else norms_of(model), *calls)
    assert compiles == ["norm", "all", "nothing"]
