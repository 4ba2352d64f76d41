"""The life of a training run: what belongs to one step, and what must never be counted."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn

import gnsfx
from gnsfx import collector, leaves, unmeasured
from gnsfx.errors import NotMeasuredError
from tests import oracle, zoo

EAGER = {"gns.inner": "eager"}
Call = Callable[[nn.Module], Tensor]


def batch(examples: int = 4, T: int = 6) -> Call:
    tokens, targets = zoo.ids(11, examples, T), zoo.ids(11, examples, T)
    return lambda model: zoo.token_losses(model(tokens), targets)


def truth(model: nn.Module, *calls: Call) -> dict[str, Tensor]:
    found = [oracle.per_example_sq_norms(model, call(model)) for call in calls]
    return {name: torch.cat([f[name] for f in found]).sum()[None] for name in found[0]}


def agree(model: nn.Module, expected: dict[str, Tensor]) -> None:
    measured = {n: s[None] for n, s in collector.sq_norms(model).items()}
    assert oracle.names_beyond(measured, expected, oracle.tolerance(torch.float64)) == []


@pytest.fixture
def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="gns", options=EAGER)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_with_smaller_and_shorter_batches(
    model: nn.Module, compiled: nn.Module, set_to_none: bool
) -> None:
    calls = [batch(), batch(), batch(3, 5), batch(2, 4)]
    for _ in range(2):
        model.zero_grad(set_to_none)
        for n, call in enumerate(calls):
            call(compiled).mean().backward()
            agree(model, truth(model, *calls[: n + 1]))
    assert {float(m.examples) for m in collector.measurements(model)} == {13.0}


def test_sizes_of_the_micro_batches(model: nn.Module, compiled: nn.Module) -> None:
    for set_to_none in (True, False, True):
        model.zero_grad(set_to_none)
        for n, call in ((4, batch()), (3, batch(3, 5)), (2, batch(2))):
            call(compiled).mean().backward()
            assert collector.totals(model).micro_batches[-1] == n
        found = collector.totals(model)
        assert found.micro_batches == (4, 3, 2)
    found.clear()
    torch.autograd.grad(batch()(compiled).mean(), list(model.parameters()))
    batch(3, 5)(compiled).mean().backward()
    assert collector.totals(model).micro_batches == (3,)
    model.norm.weight.grad = model.norm.bias.grad = None
    batch(2)(compiled).mean().backward()
    found = collector.totals(model)
    assert found.micro_batches == (3, 2) and found.values is not None
    assert sorted({*found.values[1].tolist()}) == [2.0, 5.0]


def test_sizes_of_micro_batches_that_are_data_are_not_told() -> None:
    model = zoo.MLP(4, 4)
    x, ids = torch.randn(1, 6, 4), torch.tensor([[0, 0, 1, 1, 2, -1]])
    gnsfx.mark_batch(x, ids=ids)
    compiled = torch.compile(lambda x, ids: model(x) * (ids >= 0)[..., None], backend="gns", options=EAGER)
    compiled(x, ids).square().sum().backward()
    found = collector.totals(model)
    assert found.micro_batches == (None,) and found.values is not None and found.values[1].tolist() == [3.0, 3.0]


def test_zeroing_in_place_clears_what_a_graph_of_other_shapes_refused(model: nn.Module, compiled: nn.Module) -> None:
    call, other = batch(), batch(3, 5)
    (call(compiled).mean() + call(compiled).mean()).backward()
    model.zero_grad(set_to_none=False)
    other(compiled).mean().backward()
    agree(model, truth(model, other))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroing_between_forward_and_backward(model: nn.Module, compiled: nn.Module, set_to_none: bool) -> None:
    first, second = batch(), batch()
    first(compiled).mean().backward()
    loss = second(compiled).mean()
    model.zero_grad(set_to_none)
    loss.backward()
    agree(model, truth(model, second))


def test_two_forwards_then_two_backwards(model: nn.Module, compiled: nn.Module) -> None:
    first, second = batch(), batch()
    losses = [first(compiled).mean(), second(compiled).mean()]
    for loss in losses:
        loss.backward()
    agree(model, truth(model, first, second))


def test_one_backward_through_two_forwards_is_refused_until_zeroed(model: nn.Module, compiled: nn.Module) -> None:
    call = batch()
    (call(compiled).mean() + call(compiled).mean()).backward()
    assert all(
        (m.refusal and "one backward" in m.refusal) or "no compiled graph" in (m.refusal or "")
        for m in collector.measurements(model)
    )
    model.zero_grad()
    call(compiled).mean().backward()
    agree(model, truth(model, call))


def test_two_backwards_through_one_forward_are_refused(model: nn.Module, compiled: nn.Module) -> None:
    with torch._functorch.config.patch(donated_buffer=False):  # plain Inductor needs this too
        losses = batch()(compiled)
        losses.mean().backward(retain_graph=True)
        losses.sum().backward()
    assert {m.refusal for m in collector.measurements(model)} == {leaves.TWICE_THROUGH_ONE_FORWARD}


def test_eager_use_of_a_measured_parameter_is_refused(model: nn.Module, compiled: nn.Module) -> None:
    call = batch()
    (call(compiled).mean() + model.head.weight.square().sum()).backward()
    refused = {m.name: m.refusal for m in collector.measurements(model) if m.refusal}
    assert refused == {"wte.weight": unmeasured.FOREIGN}
    model.zero_grad()
    call(compiled).mean().backward()
    agree(model, truth(model, call))


def test_autograd_grad_fills_nothing_and_spoils_nothing(model: nn.Module, compiled: nn.Module) -> None:
    call = batch()
    call(compiled).mean().backward()
    torch.autograd.grad(call(compiled).mean(), list(model.parameters()))
    agree(model, truth(model, call))
    model.zero_grad()
    torch.autograd.grad(call(compiled).mean(), list(model.parameters()))
    with pytest.raises(NotMeasuredError, match=r"autograd\.grad"):
        gnsfx.sq_norms(model)


def test_measuring_some_steps_only(model: nn.Module, compiled: nn.Module) -> None:
    call = batch()
    for step in range(4):
        model.zero_grad()
        with gnsfx.measuring(step % 2 == 0):
            loss = call(compiled).mean()
        loss.backward()
        if step % 2 == 0:
            agree(model, truth(model, call))
        else:
            with pytest.raises(NotMeasuredError, match="no compiled graph measured"):
                gnsfx.sq_norms(model)


def test_no_grad_and_eval_are_plain(model: nn.Module, compiled: nn.Module) -> None:
    call = batch()
    compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(call(compiled), call(model))
    with pytest.raises(NotMeasuredError, match="no parameter of this model"):
        gnsfx.sq_norms(model)
    compiled.train()
    call(compiled).mean().backward()
    agree(model, truth(model, call))


def test_two_models_and_a_deleted_one(model: nn.Module, compiled: nn.Module) -> None:
    first, second = batch(), batch()
    other = zoo.GPT(layers=1).double()
    other_compiled = torch.compile(other, backend="gns", options=EAGER)
    first(compiled).mean().backward()
    second(other_compiled).mean().backward()
    agree(model, truth(model, first))
    agree(other, truth(other, second))
    references = [weakref.ref(other), weakref.ref(collector.compiled(other)[0])]
    del other, other_compiled
    gc.collect()
    assert [r() for r in references] == [None, None]
    agree(model, truth(model, first))


class Stack(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.blocks = nn.ModuleList(zoo.GPTBlock(8, 2) for _ in range(blocks))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_blocks_compiled_one_by_one_share_a_graph() -> None:
    model = Stack().double()
    plain, call = copy.deepcopy(model), batch()
    for block in model.blocks:
        block.compile(backend="gns", options=EAGER)
    call(model).mean().backward()
    expected = truth(plain, call)
    agree(model, {n: t for n, t in expected.items() if n.startswith("blocks")})
    collectors = collector.compiled(model)
    assert len(collectors) == 3 and len({id(c.graph) for c in collectors}) == 1
    assert {m.name for m in collector.measurements(model) if m.refusal} == {"embed.weight", "head.weight", "head.bias"}


def test_compiled_in_place_and_a_submodule() -> None:
    for part in ("all", "blocks.0"):
        model = Stack(1).double()
        plain, call = copy.deepcopy(model), batch()
        (model if part == "all" else model.get_submodule(part)).compile(backend="gns", options=EAGER)
        call(model).mean().backward()
        expected = truth(plain, call)
        agree(model, expected if part == "all" else {n: t for n, t in expected.items() if n.startswith(part)})


class Broken(nn.Module):
    """Time-first and folded intermediates cross two graph breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x)).transpose(0, 1).contiguous()
        torch._dynamo.graph_break()
        x = torch.tanh(self.b(x)).transpose(0, 1).reshape(-1, 4)
        torch._dynamo.graph_break()
        return self.c(x).view(4, 3, 4)


def test_graph_breaks_keep_the_batch_dimension() -> None:
    model = Broken().double()
    call = zoo.on(zoo.floats(4, 3, 4))
    call(torch.compile(model, backend="gns", options=EAGER)).mean().backward()
    assert len(collector.compiled(model)) == 3
    agree(model, truth(model, call))


def test_autocast_bf16() -> None:
    model = zoo.MLP(16, 32, 8)
    x = torch.randn(4, 5, 16)
    compiled = torch.compile(model, backend="gns", options=EAGER)
    with torch.autocast("cpu", torch.bfloat16):
        loss = zoo.squares(compiled(x)).mean()
    loss.backward()
    found = {n: s[None] for n, s in gnsfx.sq_norms(model).items()}
    assert {s.dtype for s in found.values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        losses = zoo.squares(model(x))
    expected = {n: t.sum()[None] for n, t in oracle.per_example_sq_norms(model, losses).items()}
    assert oracle.names_beyond(found, expected, 2 * torch.finfo(torch.bfloat16).eps) == []


def test_dynamic_shapes_compile_once() -> None:
    model = zoo.GPT(layers=1, T=9).double()
    compiled = torch.compile(model, backend="gns", options=EAGER, dynamic=True)
    calls = [batch(4, 6), batch(3, 6), batch(5, 9), batch(2, 3)]
    for call in calls:
        model.zero_grad()
        call(compiled).mean().backward()
        agree(model, truth(model, call))
    assert len(collector.compiled(model)) == 1


WARM = """
import sys, torch
from gnsfx import collector, inner
from tests import zoo
runs = []
rewrite = inner.rewrite
inner.rewrite = lambda *a, **k: (runs.append(1), rewrite(*a, **k))[1]
class Broken(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = zoo.MLP(4, 4), zoo.MLP(4, 4)
    def forward(self, x):
        h = self.first(x)
        torch._dynamo.graph_break()  # the second graph asks where the examples are in what the first one made
        return self.second(h)
torch.manual_seed(0)
model = Broken()
torch.compile(model, backend="gns")(torch.randn(3, 2, 4)).square().sum().backward()
norms = {n: float(s) for n, s in collector.sq_norms(model).items()}
from gnsfx.coverage import coverage
assert {row.status for row in coverage(model)} == {"measured"}
print(len(runs), norms, [(row.path, row.reason) for row in coverage(model)])
"""


@pytest.mark.slow
def test_a_second_process_hits_the_compile_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    outputs = [
        subprocess.run([sys.executable, "-c", WARM], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    (cold, first), (warm, second) = (o.split(maxsplit=1) for o in outputs)
    assert (cold, warm) == ("2", "0")
    assert first == second


def test_zeroing_in_place_after_autograd_grad(model: nn.Module, compiled: nn.Module) -> None:
    first, second = batch(), batch()
    for _ in range(2):
        first(compiled).mean().backward()
    torch.autograd.grad(first(compiled).mean(), list(model.parameters()))
    model.zero_grad(set_to_none=False)
    second(compiled).mean().backward()
    agree(model, truth(model, second))


class Turned(nn.Module):
    """Two blocks of one class share a graph; the second gets its examples in another dimension of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = zoo.MLP(4, 4), zoo.MLP(4, 4)
        self.turn = Transposed()

    def forward(self, x: Tensor) -> Tensor:
        return self.turn(self.second(self.turn(self.first(x))))


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).clone()


def test_a_graph_that_is_reused_for_a_turned_batch() -> None:
    model = Turned().double()
    x = nn.Parameter(zoo.floats(4, 4, 4))
    for part in (model.first, model.second, model.turn):
        part.compile(backend="gns", options=EAGER)
    zoo.squares(model(model.turn(model.turn(x * 1)))).mean().backward()
    refused = {m.name: m.refusal for m in collector.measurements(model)}
    assert all("elsewhere than in the call" in (refused[f"second.layers.0.{n}"] or "") for n in ("weight", "bias"))
    assert all("later graph" in (refused[f"first.layers.0.{n}"] or "") for n in ("weight", "bias"))


@pytest.mark.parametrize("early", [True, False])
def test_a_hook_that_changes_a_gradient(model: nn.Module, compiled: nn.Module, early: bool) -> None:
    """The examples no longer add up to it. A hook that only looks changes nothing, whenever it was registered."""
    call = batch()
    if not early:
        call(compiled).mean().backward()
        model.zero_grad()
    model.head.weight.register_hook(lambda grad: grad * 2)
    model.norm.weight.register_hook(lambda grad: None)
    call(compiled).mean().backward()
    assert {m.name: m.refusal for m in collector.measurements(model) if m.refusal} == {"wte.weight": unmeasured.FOREIGN}


def test_a_position_table_is_one_graph_for_all_lengths() -> None:
    """The rows of a slice lie in the table by example, without a size that is fixed."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Parameter(torch.randn(50, 6).double()), nn.Linear(6, 2).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x + self.table[: x.shape[1]]).square().mean((1, 2))

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Positions()
    compiled = torch.compile(model, backend="gns", options=EAGER, dynamic=True)
    for shape in ((4, 33, 6), (3, 33, 6), (5, 20, 6)):
        x = torch.randn(*shape, dtype=torch.float64)
        truth = oracle.per_example_sq_norms(model, model(x))
        model.zero_grad()
        compiled(x).mean().backward()
        found = gnsfx.sq_norms(model)
        for name, norms in truth.items():
            torch.testing.assert_close(found[name], norms.sum())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
