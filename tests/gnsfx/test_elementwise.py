"""Sums of squares of single numbers through the life of a training run: accumulation, zeroing, several graphs, caches."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gnsfx
from gnsfx import collector
from gnsfx.errors import NotMeasuredError
from tests import oracle, zoo
from tests.gnsfx.test_refusals import Temperature

OPTIONS = {"gns.inner": "eager", "gns.elementwise": True}
Call = Callable[[nn.Module], Tensor]
VECTORS = {"wpe.weight", "norm.weight", "norm.bias"} | {
    f"blocks.0.{n}" for n in ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "qkv.bias", "proj.bias", "up.bias", "down.bias")
}  # fmt: skip


def batch(examples: int = 4, T: int = 6) -> Call:
    tokens, targets = zoo.ids(11, examples, T), zoo.ids(11, examples, T)
    return lambda model: zoo.token_losses(model(tokens), targets)


def agree(model: nn.Module, *calls: Call) -> None:
    """What is there is the sum over the calls, and the vectors of the model are."""
    found = collector.elementwise_sq_sums(model)
    assert set(found) >= VECTORS & {n for n, _ in model.named_parameters()}
    truths = [oracle.elementwise_sq_sums(model, call(model)) for call in calls]
    for name, sums in found.items():
        torch.testing.assert_close(
            sums, torch.stack([t[name] for t in truths]).sum(0), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="gns", options=OPTIONS)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation(model: nn.Module, compiled: nn.Module, set_to_none: bool) -> None:
    calls = [batch(), batch(), batch(3, 5)]
    for _ in range(2):
        model.zero_grad(set_to_none)
        for n, call in enumerate(calls):
            call(compiled).mean().backward()
            agree(model, *calls[: n + 1])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_one_parameter_that_starts_anew(model: nn.Module, compiled: nn.Module, set_to_none: bool) -> None:
    first, second = batch(), batch()
    first(compiled).mean().backward()
    if set_to_none:
        model.norm.weight.grad = None
    else:
        model.norm.weight.grad.zero_()
    second(compiled).mean().backward()
    found = collector.elementwise_sq_sums(model)
    alone, both = (oracle.elementwise_sq_sums(model, call(model)) for call in (second, first))
    torch.testing.assert_close(found["norm.weight"], alone["norm.weight"])
    torch.testing.assert_close(found["norm.bias"], alone["norm.bias"] + both["norm.bias"])


def test_a_step_of_the_noise_scale_starts_anew(model: nn.Module, compiled: nn.Module) -> None:
    noise, call = gnsfx.NoiseScale(model), batch()
    call(compiled).mean().backward()
    noise.step()
    call(compiled).mean().backward()  # into the same gradients
    agree(model, call)


def test_dynamic_shapes_compile_once(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="gns", options=OPTIONS, dynamic=True)
    for call in (batch(4, 6), batch(3, 6), batch(5, 4)):
        model.zero_grad()
        call(compiled).mean().backward()
        agree(model, call)
    assert len(collector.compiled(model)) == 1


def test_several_graphs(model: nn.Module) -> None:
    for block in model.blocks:
        block.compile(backend="gns", options=OPTIONS)
    call = batch()
    call(model).mean().backward()
    found = collector.elementwise_sq_sums(model)
    assert all(name.startswith("blocks.0") for name in found) and {n for n in VECTORS if "blocks" in n} <= set(found)
    model.blocks[0]._compiled_call_impl = None
    truth = oracle.elementwise_sq_sums(model, call(model))
    for name, sums in found.items():
        torch.testing.assert_close(sums, truth[name])


def test_two_uses_in_one_backward_are_absent(model: nn.Module, compiled: nn.Module) -> None:
    call = batch()
    (call(compiled).mean() + call(compiled).mean()).backward()
    assert collector.elementwise_sq_sums(model) == {}


def test_beside_norms_of_examples(model: nn.Module) -> None:
    """Three leaves: each gets its own."""
    call = batch()
    compiled = torch.compile(model, backend="gns", options={**OPTIONS, "gns.per_example": True})
    truth = oracle.per_example_sq_norms(model, call(model))
    call(compiled).mean().backward()
    agree(model, call)
    assert oracle.names_beyond(gnsfx.per_example_sq_norms(model), truth, oracle.tolerance(torch.float64)) == []


@pytest.mark.parametrize("used", [True, False])
def test_what_a_run_refuses_is_absent(used: bool) -> None:
    model, x = Temperature().double(), zoo.floats(4, 4)
    compiled = torch.compile(model, backend="gns", options=OPTIONS)
    for outside in (used, not used):
        model.zero_grad()
        out, scale = compiled(x)
        zoo.squares(out * scale if outside else out).mean().backward()
        assert set(collector.elementwise_sq_sums(model)) == {"a.weight", "a.bias"} | (set() if outside else {"scale"})


def test_nothing_is_measured_otherwise_than_without_it() -> None:
    torch.manual_seed(0)
    results = []
    state, call = zoo.GPT().double().state_dict(), batch()
    for options in ({"gns.inner": "eager"}, OPTIONS):
        torch._dynamo.reset()
        model = zoo.GPT().double()
        model.load_state_dict(state)
        call(torch.compile(model, backend="gns", options=options)).mean().backward()
        results.append((oracle.gradients(model), collector.sq_norms(model)))
    for plain, kept in zip(*results, strict=True):
        assert plain.keys() == kept.keys() and all(torch.equal(plain[n], kept[n]) for n in plain)


def test_without_the_option_a_reading_says_what_to_do(model: nn.Module) -> None:
    batch()(torch.compile(model, backend="gns", options={"gns.inner": "eager"})).mean().backward()
    with pytest.raises(NotMeasuredError, match=r'compile with options=\{"gns.elementwise": True\}'):
        collector.elementwise_sq_sums(model)


WARM = """
import sys, torch, gnsfx
from gnsfx import inner, collector
from tests import zoo
runs = []
rewrite = inner.rewrite
inner.rewrite = lambda *a, **k: (runs.append(1), rewrite(*a, **k))[1]
torch.manual_seed(0)
model = zoo.MLP(4, 4, 4)
kept = sys.argv[1] == "True"
gnsfx.compile(model, elementwise=kept)(torch.randn(3, 2, 4)).square().sum().backward()
found = collector.elementwise_sq_sums(model) if kept else {}
print(len(runs), {n: s.tolist() for n, s in found.items()})
"""


@pytest.mark.slow
def test_compile_caches(tmp_path, monkeypatch) -> None:
    """A graph with sums of single numbers is another graph than the one without; a second process reads either again."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    kept = [True, True, False]
    outputs = [
        subprocess.run([sys.executable, "-c", WARM, str(k)], capture_output=True, text=True, check=True).stdout
        for k in kept
    ]
    assert [int(out.split()[0]) for out in outputs] == [1, 0, 1]
    assert outputs[0].split(maxsplit=1)[1] == outputs[1].split(maxsplit=1)[1]
    assert set(ast.literal_eval(outputs[1].split(maxsplit=1)[1])) >= {"layers.0.bias", "layers.1.bias"}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_inductor(model: nn.Module, dynamic: bool | None) -> None:
    compiled = torch.compile(model, backend="gns", options={"gns.elementwise": True}, dynamic=dynamic)
    calls = [batch(), batch(3)]
    for call in calls:
        call(compiled).mean().backward()
    agree(model, *calls)
