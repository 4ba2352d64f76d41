"""What cannot be exact is refused by parameter name, with the op and the user's source line; the rest stays exact."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gnsfx import NoiseScale, collector
from gnsfx.coverage import coverage
from gnsfx.errors import GnsWarning
from tests import oracle, zoo

EAGER = {"gns.inner": "eager", "gns.per_example": True}


def refusals(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> dict[str, str]:
    """Train one step; the warning must name what is refused."""
    compiled = torch.compile(model, backend="gns", options=EAGER)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(compiled).sum().backward()
    refused = {m.name: m.refusal for m in collector.measurements(model) if m.refusal}
    text = "\n".join(str(w.message) for w in caught if w.category is GnsWarning)
    assert all(name in text for name in list(refused)[:5])
    return refused


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.norm, self.after = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.norm(self.before(x))))


def test_batch_norm_in_training_refuses_what_lies_before_it() -> None:
    model, x = Normalised().double(), zoo.floats(5, 4)
    refused = refusals(model, zoo.on(x))
    assert set(refused) == {"before.weight", "before.bias"}
    assert "examples interact" in refused["before.weight"] and "forward" in refused["before.weight"]
    # the truth of what lies behind: the statistics are constants for it
    with torch.no_grad():
        hidden = model.norm(model.before(x))
    losses = zoo.squares(model.after(torch.tanh(hidden)))
    truth = oracle.per_example_sq_norms(model.after, losses, torch.ones_like(losses))
    found = collector.per_example_sq_norms(model)
    assert oracle.names_beyond({n: found[f"after.{n}"] for n in truth}, truth, oracle.tolerance(torch.float64)) == []
    assert "norm.weight" in found and "norm.bias" in found


def test_batch_norm_in_eval_mode_is_exact() -> None:
    model, x = Normalised().double().eval(), zoo.floats(5, 4)
    losses = zoo.squares(model(x))
    truth = oracle.per_example_sq_norms(model, losses, torch.ones_like(losses))
    assert refusals(model, zoo.on(x)) == {}
    assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, oracle.tolerance(torch.float64)) == []


class Contrastive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        return torch.logsumexp(z @ z.T, 1)


def test_in_batch_negatives() -> None:
    refused = refusals(Contrastive().double(), lambda m: m(zoo.floats(4, 4)))
    assert set(refused) == {"encode.weight", "encode.bias"}
    assert "in-batch negatives" in refused["encode.weight"] and "z @ z.T" in refused["encode.weight"]


CROSSINGS = {
    "first example": lambda x: x + x[0],
    "roll": lambda x: x * x.roll(1, 0),
    "sort": lambda x: x * x.sort(0).values,
    "flip": lambda x: x * x.flip(0),
    "cumsum": lambda x: x.cumsum(0),
    "softmax over the batch": lambda x: x.softmax(0) * x,
    "centred": lambda x: x - x.mean(0),
    "permuted": lambda x: x * x[torch.tensor([1, 0, 3, 2])],
    "half": lambda x: torch.cat((x[:2], x[2:] * x[:2])),
    "largest": lambda x: x * x.amax(0),
    "attention across the batch": lambda x: (x @ x.T).softmax(1) @ x,
}


class Crossing(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)))


@pytest.mark.parametrize("kind", CROSSINGS)
def test_examples_that_interact(kind: str) -> None:
    refused = refusals(Crossing(CROSSINGS[kind]).double(), zoo.on(zoo.floats(4, 4)))
    assert {"before.weight", "before.bias"} <= set(refused)


@torch.library.custom_op("gnsfx_tests::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    return x * x


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


twist.register_autograd(lambda ctx, grad: twist(grad), setup_context=lambda ctx, inputs, output: None)


def test_an_op_without_a_rule() -> None:
    model, x = Crossing(twist).double(), zoo.floats(3, 4)
    refused = refusals(model, zoo.on(x))
    assert set(refused) == {"before.weight", "before.bias", "after.weight", "after.bias"}
    assert refused["after.weight"].startswith("no rule for gnsfx_tests.twist.default (at gnsfx_tests.twist.default, ")
    assert "self.function(self.before(x))" in refused["after.weight"]


def test_a_parameter_without_any_gradient() -> None:
    model = Crossing(torch.special.bessel_j0).double()
    torch.compile(model, backend="gns", options=EAGER)(zoo.floats(3, 4)).sum().backward()
    reasons = {m.name: m.refusal for m in collector.measurements(model) if m.refusal}
    assert set(reasons) == {"before.weight", "before.bias"}
    assert all("gradient is None" in reason for reason in reasons.values())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x).square().sum() + self.b(y).square().sum()


def test_an_input_with_another_batch_size() -> None:
    refused = refusals(TwoInputs().double(), lambda m: m(zoo.floats(4, 4), zoo.floats(6, 4)))
    assert set(refused) == {"b.weight", "b.bias"}
    assert "['y'] has 6 rows where the batch has 4" in refused["b.weight"] and "mark_batch" in refused["b.weight"]


def test_marks_that_contradict_each_other() -> None:
    from gnsfx import mark_batch

    x, y = mark_batch(zoo.floats(4, 4)), mark_batch(zoo.floats(3, 4))
    refused = refusals(TwoInputs().double(), lambda m: m(x, y))
    assert set(refused) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert "x'] has 4, L['y'] has 3" in refused["a.weight"]


class Generator(nn.Module):
    """Its examples are made inside: nothing says which dimension they are."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.randn(x.shape[0], 4, dtype=x.dtype)).square().sum()


def test_random_examples_that_meet_no_input() -> None:
    refused = refusals(Generator().double(), lambda m: m(zoo.floats(3, 4)))
    assert set(refused) == {"a.weight", "a.bias"}


class Weighted(nn.Module):
    """A loss that is linear and weighted by what no input touches: the gradient alone does not say what is an example."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.a, self.shift = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))
        self.register_buffer("weights", torch.arange(1.0, rows + 1)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return ((self.a(x) + self.shift) * self.weights).sum()


@pytest.mark.parametrize("dropout", [False, True])
def test_a_linear_loss_with_weights_per_example(dropout: bool) -> None:
    model, x = Weighted(5).double(), zoo.floats(5, 4)
    assert refusals(model, lambda m: m(x)) == {}
    losses = ((model.a(x) + model.shift) * model.weights).sum(1)
    truth = oracle.per_example_sq_norms(model, losses, torch.ones_like(losses))
    assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, oracle.tolerance(torch.float64)) == []


class Dotted(nn.Module):
    """The first gradient in the backward is that of a vector of the batch or of one that all share: they look alike."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        self.register_buffer("weights", torch.arange(1.0, rows + 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.dot(x * self.scale + self.shift, self.weights)


def test_a_gradient_that_may_be_of_one_argument_or_the_other() -> None:
    refused = refusals(Dotted(5).double(), lambda m: m(zoo.floats(5)))
    assert "could not be told from the graph" in refused["shift"]


class Regularised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.free = nn.Linear(4, 3), nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        penalty = (self.a.weight + self.a.bias[:, None]).square().sum() + (
            self.free @ self.free.T - torch.eye(5)
        ).square().sum()
        return self.a(x).sin().sum() + 0.1 * penalty


def test_a_term_of_no_example_belongs_to_all_alike() -> None:
    model, x = Regularised().double(), zoo.floats(6, 4)
    assert refusals(model, lambda m: m(x)) == {}
    penalty = (model.a.weight + model.a.bias[:, None]).square().sum() + (
        model.free @ model.free.T - torch.eye(5)
    ).square().sum()
    losses = model.a(x).sin().sum(1) + 0.1 * penalty / 6
    truth = oracle.per_example_sq_norms(model, losses, torch.ones_like(losses))
    assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, oracle.tolerance(torch.float64)) == []


class Across(nn.Module):
    """A graph break, and the examples interact behind it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(4, 4), nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "weight":
            weight = self.first.weight * 2
            torch._dynamo.graph_break()
            return self.second(x @ weight)
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        x = torch.tanh(x * 2)
        torch._dynamo.graph_break()
        return self.second(x - x.mean(0) if self.kind == "centred" else x)


@pytest.mark.filterwarnings("ignore:gns. 1 of 1 parameters are refused")
@pytest.mark.parametrize("kind", ["centred", "weight", "apart"])
def test_coupling_in_a_later_graph_reaches_the_earlier_ones(kind: str) -> None:
    model, x = Across(kind).double(), zoo.floats(4, 4)
    compiled = torch.compile(model, backend="gns", options=EAGER)
    zoo.squares(compiled(x)).sum().backward()
    reasons = {
        m.name: m.refusal
        for m in collector.measurements(model)
        if m.refusal and model.get_parameter(m.name).grad is not None
    }
    expected = {"centred": {"first.weight", "first.bias"}, "weight": {"first.weight"}, "apart": set()}
    assert set(reasons) == expected[kind]
    assert kind != "centred" or "later graph" in reasons["first.weight"]


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.scale.exp()


@pytest.mark.parametrize("used", [True, False])
def test_a_parameter_that_leaves_the_graph_by_itself(used: bool) -> None:
    """Refused in a step where its use outside has a gradient, by whoever reads it; exact in any other."""
    model, x = Temperature().double(), zoo.floats(4, 4)
    compiled = torch.compile(model, backend="gns", options=EAGER)
    for outside in (used, not used, used):
        model.zero_grad()
        out, scale = compiled(x)
        zoo.squares(out * scale if outside else out).mean().backward()
        rows = {row.name: (row.status, row.reason) for row in coverage(model)}
        assert set(collector.sq_norms(model)) == {"a.weight", "a.bias"} | (set() if outside else {"scale"})
        assert rows["a.weight"] == rows["a.bias"] == ("measured", "")
        assert rows["scale"][0] == ("refused" if outside else "measured")
        assert not outside or (
            "leaves the compiled graph" in rows["scale"][1] and "self.scale.exp()" in rows["scale"][1]
        )
        noise = NoiseScale(model)
        noise.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GnsWarning)
            assert set(noise.by_parameter()) == {"a.weight", "a.bias"} | (set() if outside else {"scale"})


class LearnedWeight(nn.Module):
    """The examples own the gradient of ``weight``, but unequally: it is the mean of their losses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight = nn.Linear(4, 4), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * zoo.squares(self.a(x)).mean() + 0.1 * self.a.bias.square().sum()


def test_a_parameter_that_scales_a_statistic_of_the_batch() -> None:
    model, x = LearnedWeight().double(), zoo.floats(5, 4)
    refused = refusals(model, lambda m: m(x))
    assert set(refused) == {"weight"} and "statistic of the batch" in refused["weight"]
    losses = 2.0 * zoo.squares(model.a(x)) / 5 + 0.1 * model.a.bias.square().sum() / 5
    truth = oracle.per_example_sq_norms(model.a, losses, torch.ones_like(losses))
    found = collector.per_example_sq_norms(model)
    assert oracle.names_beyond({n: found[f"a.{n}"] for n in truth}, truth, oracle.tolerance(torch.float64)) == []


class Standardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return self.a((x - mean) / std)


def test_vectors_beside_the_input_do_not_outvote_it() -> None:
    model, x = Standardised().double(), zoo.floats(8, 3)
    mean, std = zoo.floats(3), zoo.floats(3).exp()
    truth = oracle.per_example_sq_norms(model, zoo.squares(model(x, mean, std)), torch.ones(8).double())
    assert refusals(model, zoo.on(x, mean, std)) == {}
    assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, oracle.tolerance(torch.float64)) == []


def test_rows_picked_by_an_index_leave_the_graph() -> None:
    """Whether row 2 of ``y[index]`` is example 2 or example ``index[2]`` is for the code outside to say."""
    model, x = zoo.MLP(4, 6, 3).double(), zoo.floats(4, 4)

    def call(m: nn.Module) -> Tensor:
        return zoo.squares(m(x, torch.tensor([1, 1, 3, 0])))

    picked = Picked(model)
    assert len(refusals(picked, call)) == len(list(model.parameters()))


class Picked(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.model(x)[index]
