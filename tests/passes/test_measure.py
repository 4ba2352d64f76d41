"""Measured norms against per-example autograd: one contraction, path or map behind it per model."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from gnsfx import collector
from gnsfx.coverage import coverage
from gnsfx.marks import mark_batch
from tests import oracle
from tests.passes.models import MATMULS, MODELS, Case, Model
from tests.zoo import floats, squares

PATHS = ("materialise", "fused", "ghost")


def compare(
    case: Case, dtype: torch.dtype = torch.float64, dynamic: bool | None = None, **options: object
) -> list[object]:
    """Compile, train one step, compare norms and gradients with eager mode in fp64; returns the rows of the coverage."""
    torch._dynamo.reset()
    model, losses, train = case
    truth = oracle.per_example_sq_norms(model, losses(model))
    gradients = dict(zip(truth, torch.autograd.grad(losses(model).mean(), list(named(model).values())), strict=True))
    compiled = torch.compile(
        model, backend="gns", dynamic=dynamic, options={"gns.inner": "eager", "gns.per_example": True, **options}
    )
    train(compiled).backward()
    found = coverage(model)
    assert [(row.name, row.reason) for row in found if row.status != "measured" and row.name in truth] == []
    bound = oracle.tolerance(dtype)
    assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, bound) == []
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, p in named(model).items():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradients[name], rtol=bound, atol=bound * largest, check_dtype=False)
    return list(found)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def build(name: str) -> Case:
    torch.manual_seed(0)
    return MODELS[name]()


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    compare(build(name))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MATMULS)
def test_path(name: str, path: str) -> None:
    compare(build(name), **{"gns.path": path})


@pytest.mark.parametrize(
    "name",
    [
        "linear_3d",
        "two_views",
        "tied",
        "layer_norm",
        "conv2d",
        "merged_lora",
        "embedding_padding",
        "cross_entropy_mean",
    ],
)
def test_single_precision(name: str) -> None:
    """fp32 throughout, beside the truth of the same numbers in fp64."""
    model, losses, train = build(name)
    truth = oracle.per_example_sq_norms(model, losses(model))
    torch._dynamo.reset()
    compiled = torch.compile(
        Cast(model.float()), backend="gns", options={"gns.inner": "eager", "gns.per_example": True}
    )
    train(compiled).backward()
    found = collector.per_example_sq_norms(model)
    assert all(f.dtype is torch.float32 for f in found.values())
    assert oracle.names_beyond(found, truth, oracle.tolerance(torch.float32)) == []


class Cast(nn.Module):
    """The inputs of the table are fp64."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*[x.float() if x.is_floating_point() else x for x in inputs])


@pytest.mark.parametrize("path", PATHS)
def test_bf16_gradients_are_as_good_as_plain_ones(path: str) -> None:
    """A sum over examples of products rounded to bf16 would be worse than the product over all rows, rounded once."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 64, 16, 8).bfloat16()
    model = nn.Linear(8, 8, bias=False).bfloat16()
    truth = torch.einsum("bto,bti->oi", g.double(), x.double())
    model(x).backward(g)
    plain = named(model)["weight"].grad.double()
    model.zero_grad()
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.path": path})
    compiled(x).backward(g)
    found = named(model)["weight"].grad.double()
    half = truth.abs() * 2.0**-8 + 2.0**-16 * truth.abs().max()  # rounding to nearest, and fp32 sums before it
    assert bool(((found - truth).abs() <= half).all())
    assert float((found - truth).norm()) <= 1.01 * float((plain - truth).norm())


def test_bf16_contributions_are_summed_in_single_precision() -> None:
    model = nn.Linear(4, 4).bfloat16()
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.per_example": True})
    compiled(torch.randn(3, 257, 4).bfloat16()).sum().backward()
    found = collector.per_example_sq_norms(model)["bias"]  # bf16 has no 257
    assert found.tolist() == [4 * 257.0**2] * 3


def test_a_map_behind_the_sum_is_lifted_in_single_precision() -> None:
    """Of weight norm over rows of one entry the gradient cancels, where the fused backward does not round in between."""
    torch.manual_seed(0)
    model = Model(lambda m, x: nn.functional.linear(x, torch._weight_norm(m.v, m.g, 0)), v=nn.Parameter(torch.randn(4, 1) * 0.1),
                  g=nn.Parameter(torch.randn(4, 1) * 5)).bfloat16()  # fmt: skip
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.per_example": True})
    compiled(torch.randn(2, 1).bfloat16()).float().square().sum().backward()
    found = collector.per_example_sq_norms(model)
    assert bool((found["v"] < 1e-6 * found["g"]).all())


def test_one_position_takes_the_outer_product() -> None:
    for name in ("linear_2d", "one_token", "batch_last"):
        rows = compare(build(name))
        assert [row.path for row in rows if row.name.endswith(("w", "weight"))] == ["outer"] * (
            1 + (name == "one_token")
        ), name


SYMBOLIC = ("linear_3d", "picture", "folded_rows", "time_first", "two_views", "reused", "tied", "repeated_positions", "layer_norm",
            "conv2d", "conv_folded",
            "masked", "embedding_padding", "attention", "cross_entropy_mean")  # fmt: skip


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes(name: str) -> None:
    """B and T have the same size and with it the same symbol."""
    compare(build(name), dynamic=True)


def test_dropout() -> None:
    """The truth is the compiled gradient itself with the tangents of all other examples masked: the same random masks."""
    torch._dynamo.reset()
    model = Model(
        lambda m, x: m.b(m.drop(m.a(m.drop(x)))), a=nn.Linear(4, 5), b=nn.Linear(5, 3), drop=nn.Dropout(0.4)
    ).double()
    x = floats(4, 3, 4)
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.per_example": True})

    def step(mask: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        (squares(compiled(x)) * mask).sum().backward()
        return oracle.gradients(model)

    alone = [step(torch.eye(4, dtype=torch.float64)[b]) for b in range(4)]
    whole = step(torch.ones(4, dtype=torch.float64))
    found = collector.per_example_sq_norms(model)
    for name, norms in found.items():
        torch.testing.assert_close(norms, torch.stack([a[name].square().sum() for a in alone]))
        torch.testing.assert_close(whole[name], sum(a[name] for a in alone))


LAYOUTS = st.sampled_from(["plain", "folded", "time first", "views"])
few = settings(max_examples=24, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def arrangement(layout: str, B: int, T: int, I: int, O: int) -> Case:
    torch.manual_seed(0)

    def function(m: Model, x: Tensor) -> Tensor:
        if layout == "folded":
            return m.a(x.flatten(0, 1)).sin().unflatten(0, x.shape[:2])
        if layout == "views":
            return torch.cat(m.a(torch.cat((x, x.cos()))).sin().tensor_split(2), -1)
        return m.a(x).sin()

    shape, batch = ((T, B, I), 1) if layout == "time first" else ((B, T, I), 0)
    x = mark_batch(floats(*shape), batch)
    losses = lambda m: squares(m(x).movedim(batch, 0))  # noqa: E731
    return Model(function, a=nn.Linear(I, O)).double(), losses, lambda m: losses(m).mean()


@few
@given(
    LAYOUTS,
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["auto", *PATHS]),
)
def test_any_shape(layout: str, B: int, T: int, I: int, O: int, path: str) -> None:
    """Sizes that are equal to each other or one, in every layout, on every path."""
    compare(arrangement(layout, B, T, I, O), **{"gns.path": path})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["plain", "folded", "time first", "views"])
def test_symbolic_layouts(layout: str, path: str) -> None:
    compare(arrangement(layout, 3, 5, 4, 2), dynamic=True, **{"gns.path": path})


CONVOLUTIONS = st.tuples(
    st.integers(1, 3), st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2), st.booleans(),
    st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)  # fmt: skip


@settings(few, max_examples=12)
@given(CONVOLUTIONS, st.integers(1, 3))
def test_any_convolution(conv: tuple, B: int) -> None:
    n, groups, kernel, stride, padding, dilation, transposed, mode = conv
    torch.manual_seed(0)
    cls = getattr(nn, f"Conv{'Transpose' if transposed else ''}{n}d")
    if (n == 3 and mode == "reflect") or transposed:
        mode = "zeros"
    layer = cls(2, 4, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=mode)
    x = floats(B, 2, *[5 + d for d in range(n)])
    losses = lambda m: squares(m(x))  # noqa: E731
    compare((Model(lambda m, v: m.a(v), a=layer).double(), losses, lambda m: losses(m).mean()))
