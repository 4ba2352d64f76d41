"""Norm layers as a CUDA device gets them: one op for dx, scale, shift and their norms; here it runs its torch twin on the CPU.

The rewrite is made to happen for CPU tensors, and held against per-example autograd in fp64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from gnsfx import collector
from gnsfx.coverage import coverage
from gnsfx.inner import RewritePass, decompositions
from gnsfx.kernels import gpu
from gnsfx.kernels.triton import plan
from gnsfx.passes import norm_layers
from gnsfx.passes.find_rms_norms import _added
from gnsfx.passes.pipeline import Plan
from tests import oracle
from tests.gnsfx.test_models import compiled_like_autograd

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own


@pytest.fixture(autouse=True)
def cuda_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "kernels_on", lambda device: frozenset({"norm"}))


class Fused(torch.autograd.Function):
    """``F.rms_norm`` as CUDA traces it; CPUs have no such op and trace what it consists of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, normalized: list[int]) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = (wide.square().mean(list(range(-len(normalized), 0)), keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x, rstd, weight)
        ctx.normalized = normalized
        return (wide * rstd * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        if not torch.compiler.is_compiling():  # CPUs have no kernel for it
            xhat, wg, own = x * rstd, grads[0] * weight, list(range(x.dim() - len(ctx.normalized), x.dim()))
            dx = rstd * (wg - xhat * (wg * xhat).mean(own, keepdim=True))
            return dx, (grads[0] * xhat).sum(list(range(own[0]))), None
        return *aten._fused_rms_norm_backward(*grads, x, ctx.normalized, rstd, weight, [True, True]), None


class RMS(nn.Module):
    def __init__(self, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return Fused.apply(x, self.weight, [self.weight.shape[0]])


class HuggingFace(RMS):
    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6)).to(dtype)


class Meta(RMS):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.float()).type_as(x) * self.weight

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class PyTorch(RMS):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


class Gemma(Meta):
    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(x.float()) * (1 + self.weight.float())).type_as(x)


class Root(RMS):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class T5(RMS):
    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


class Net(nn.Module):
    """in [B, T, 6] -> norms of width D between two projections -> losses [B]."""

    def __init__(self, norm: nn.Module, D: int = 8, around: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, D), norm, nn.Linear(D, 3)
        self.around = around or (lambda norm, x: norm(x))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(self.around(self.norm, hidden)).float().square().flatten(1).sum(1)


def layer(D: int = 8, **settings: Any) -> nn.LayerNorm:
    norm = nn.LayerNorm(D, **settings)
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return norm


def frozen(norm: nn.Module, name: str) -> nn.Module:
    norm.get_parameter(name).requires_grad_(False)
    return norm


def positions_first(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.transpose(0, 1).contiguous()).transpose(0, 1)


def folded(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.reshape(-1, x.shape[-1])).view(x.shape)


def in_the_middle(norm: nn.Module, x: Tensor) -> Tensor:
    B, T, D = x.shape
    parts = x.view(B, 2, T // 2, D).permute(1, 0, 2, 3).contiguous()
    return norm(parts).permute(1, 0, 2, 3).reshape(B, T, D)


def two_dimensions(norm: nn.Module, x: Tensor) -> Tensor:
    B, T, D = x.shape
    return norm(x.view(B, T, 2, D // 2)).reshape(B, T, D)


def residual(norm: nn.Module, x: Tensor) -> Tensor:
    return x + norm(x) + norm.weight * x.sin()  # type: ignore[operator]


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "layer norm": (lambda: Net(layer()), 1),
    "without a shift": (lambda: Net(layer(bias=False)), 1),
    "without parameters": (lambda: Net(nn.LayerNorm(8, elementwise_affine=False)), 0),
    "the scale is frozen": (lambda: Net(frozen(layer(), "weight")), 1),
    "the shift is frozen": (lambda: Net(frozen(layer(), "bias")), 1),
    "both are frozen": (lambda: Net(frozen(frozen(layer(), "bias"), "weight")), 0),
    "positions first": (lambda: Net(layer(), around=positions_first), 1),
    "folded": (lambda: Net(layer(), around=folded), 1),
    "examples in the middle": (lambda: Net(layer(), around=in_the_middle), 1),
    "two dimensions": (lambda: Net(layer((2, 4)), around=two_dimensions), 1),  # type: ignore[arg-type]
    "added to its input": (lambda: Net(layer(), around=lambda norm, x: x + norm(x)), 1),
    "twice": (lambda: Net(layer(), around=lambda norm, x: norm(norm(x).sin())), 0),
    "and used elsewhere": (lambda: Net(layer(), around=residual), 0),
    "wide": (lambda: Net(layer(130), 130), 1),
    "fused rms": (lambda: Net(RMS(8)), 1),
    "fused rms, positions first": (lambda: Net(RMS(8), around=positions_first), 1),
}


def emitted(model: nn.Module, call: Callable[[nn.Module], Tensor], **options: Any) -> tuple[Any, list[str]]:
    """One step of the compiled model; the ops of its rewritten graphs."""
    torch._dynamo.reset()
    targets: list[str] = []
    keep = RewritePass.__call__

    def look(self: RewritePass, graph: torch.fx.Graph) -> None:
        keep(self, graph)
        targets.extend(str(n.target) for n in graph.nodes if n.op == "call_function")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewritePass, "__call__", look)
        dynamic = options.pop("dynamic", None)
        chosen = {"gns.inner": "eager", "gns.per_example": True, **options}
        compiled: Any = torch.compile(model, backend="gns", dynamic=dynamic, options=chosen)
        model.zero_grad()
        losses = call(compiled)
        losses.mean().backward()
    return compiled, targets


def exact(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Norms and gradients in fp64, from the parameters and inputs as they are."""
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    with wide():
        model.double()
        losses = model(x.double())
        norms = oracle.per_example_sq_norms(model, losses)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        gradients = dict(zip(named, torch.autograd.grad(losses.mean(), list(named.values())), strict=True))
    for name, p in model.named_parameters():
        p.data = p.data.to(dtypes[name])
    return norms, gradients


@contextlib.contextmanager
def wide() -> Iterator[None]:
    """Models upcast to fp32 inside; the truth does not."""
    with pytest.MonkeyPatch.context() as patch:
        to: Callable[..., Tensor] = Tensor.to
        widened = lambda v: torch.float64 if v is torch.float32 else v  # noqa: E731
        patch.setattr(Tensor, "float", lambda self: self.double())
        patch.setattr(Tensor, "to", lambda self, *a, **k: to(self, *map(widened, a), **k))
        yield


def compare(model: nn.Module, x: Tensor, bound: float, expected: int | None, **options: Any) -> None:
    truth, gradients = exact(model, x)
    _, targets = emitted(model, lambda compiled: compiled(x), **options)
    assert [(r.name, r.reason) for r in coverage(model) if r.status != "measured" and r.name in truth] == []
    if expected is not None:
        assert sum("gnsfx.norm_backward" in t for t in targets) == expected
    assert not any("norm_backward" in t and "gnsfx" not in t for t in targets)
    assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, bound) == []
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, expected_grad in gradients.items():
        found = model.get_parameter(name).grad
        assert found is not None
        torch.testing.assert_close(found.double(), expected_grad, rtol=bound, atol=bound * largest)


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    torch.manual_seed(0)
    build, expected = MODELS[name]
    compare(build(), torch.randn(4, 6, 6), oracle.tolerance(torch.float32), expected)


@pytest.mark.parametrize("name", ["layer norm", "positions first", "examples in the middle", "fused rms"])
def test_sizes_that_are_symbols(name: str) -> None:
    torch.manual_seed(0)
    compare(MODELS[name][0](), torch.randn(4, 6, 6), oracle.tolerance(torch.float32), 1, dynamic=True)


SPELLINGS = {"hugging face": HuggingFace, "meta": Meta, "pytorch": PyTorch, "gemma": Gemma, "root": Root, "t5": T5}
AROUND: dict[str, Callable[..., Tensor]] = {
    "alone": lambda norm, x: norm(x),
    "added to its input": lambda norm, x: x + norm(x),
    "positions first": positions_first,
    "folded": folded,
}


def side_by_side(around: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """Norm layers that read one value, so that its gradient is a long sum."""
    return lambda norms, x: sum(AROUND[around](norm, x) for norm in norms)  # type: ignore[union-attr]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("around", AROUND)
def test_written_out(around: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    norms = nn.ModuleList(spelling(8) for spelling in SPELLINGS.values())
    model = Net(norms, around=side_by_side(around))
    compare(model, torch.randn(4, 6, 6), oracle.tolerance(torch.float32), len(SPELLINGS), dynamic=dynamic)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "bf16, fp32 parameters", "autocast"])
def test_dtypes(dtypes: str) -> None:
    torch.manual_seed(0)
    norms = nn.ModuleList([layer(), *(spelling(8) for spelling in SPELLINGS.values())])
    narrow = torch.float16 if dtypes == "fp16" else torch.bfloat16
    model, x = Net(norms, around=side_by_side("alone")), torch.randn(4, 6, 6)
    if dtypes != "autocast":
        model, x = model.to(narrow), x.to(narrow)
    if "fp32" in dtypes:
        norms.float()
        model.around = lambda norms, x: side_by_side("alone")(norms, x).to(x.dtype)
    with torch.autocast("cpu", narrow, enabled=dtypes == "autocast"):
        compare(model, x, 16 * torch.finfo(narrow).eps, len(norms))


@pytest.mark.parametrize("name", ["gpt_checkpointed", "bert", "torch_transformer"])
def test_whole_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64, where the twin takes what the kernel does not."""
    monkeypatch.setattr(norm_layers, "norm_takes", lambda D, *values: True)
    compiled_like_autograd(name)


class Spied(Meta):
    """Something else reads the root of the mean square, or the normalised input, and has a gradient."""

    def __init__(self, D: int, what: str) -> None:
        super().__init__(D)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        xhat = x * root
        return xhat * self.weight + (root if self.what == "root" else xhat).sin()


class Elsewhere(Meta):
    """A mean square over other numbers than those that are scaled."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.sin().pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one position": (lambda: Net(layer()), (4, 6)),
    "one example": (lambda: Net(layer()), (1, 5, 6)),
    "too wide": (lambda: Net(layer(16385), 16385), (2, 2, 6)),
    "fp64": (lambda: Net(layer()).double(), (4, 6, 6)),
    "another gradient into the root": (lambda: Net(Spied(8, "root")), (4, 6, 6)),
    "another gradient into the normalised input": (lambda: Net(Spied(8, "xhat")), (4, 6, 6)),
    "another mean square": (lambda: Net(Elsewhere(8)), (4, 6, 6)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_fit_is_measured_as_ever(name: str) -> None:
    torch.manual_seed(0)
    build, shape = OTHERS[name]
    model = build()
    compare(model, torch.randn(shape, dtype=next(model.parameters()).dtype), oracle.tolerance(torch.float32), 0)


def test_what_is_not_measured_stays_as_it_is() -> None:
    model = Net(layer())
    _, targets = emitted(
        model, lambda compiled: compiled(torch.randn(4, 6, 6)), **{"gns.params": lambda name, _: "norm" not in name}
    )
    assert not any("norm_backward" in t for t in targets)


def test_the_contributions_of_single_numbers_are_kept() -> None:
    model, x = Net(layer()), torch.randn(4, 6, 6)
    truth = oracle.elementwise_sq_sums(model, model(x))
    _, targets = emitted(model, lambda compiled: compiled(x), **{"gns.elementwise": True})
    assert not any("norm_backward" in t for t in targets)
    found = collector.elementwise_sq_sums(model)
    torch.testing.assert_close(found["norm.weight"], truth["norm.weight"])


@pytest.mark.filterwarnings("ignore::gnsfx.errors.GnsWarning")
def test_a_refusal_names_the_line() -> None:
    """Also behind a norm layer that was decomposed in place."""
    model = Net(layer(4), 8, lambda norm, x: norm(x.permute(1, 2, 0)).permute(2, 0, 1))
    emitted(model, lambda compiled: compiled(torch.randn(4, 6, 6)))
    reasons = {r.name: r.reason for r in coverage(model) if r.status == "refused"}
    assert "aten.sub.Tensor" in reasons["first.weight"] and "test_norm_layers.py" in reasons["first.weight"]


def test_caches_tell_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def uuid() -> object:
        rewriting = RewritePass(Plan((), {}, None, None, (), None, "auto"), lambda report: None)
        decompositions(rewriting, [torch.zeros(1)])
        return rewriting.uuid()

    here = uuid()
    monkeypatch.setattr(gpu, "kernels_on", lambda device: frozenset())
    assert here != uuid()


@pytest.mark.parametrize("read", [False, True], ids=["summed alone", "read between"])
def test_both_terms_of_dx_belong_to_one_sum(read: bool) -> None:
    graph = torch.fx.Graph()
    rest, one, other = (graph.placeholder(name) for name in ("rest", "one", "other"))
    between = graph.call_function(aten.add.Tensor, (rest, one))
    total = graph.call_function(aten.add.Tensor, (between, other))
    graph.output((total, between) if read else total)
    assert _added(one, other) is not read


def test_kernels_are_tried_in_the_regime_they_run_in() -> None:
    for D in (1, 20, 64, 100, 256, 768, 1024, 4096, 5000, 16384):
        for regime, (B, T, multiprocessors) in plan.row_regimes(D).items():
            assert plan.cut_rows(B, T, D, multiprocessors).regime == regime


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 5), st.integers(1, 7), st.sampled_from([1, 3, 8, 64, 65, 130]),
    st.sampled_from([layer, RMS, *SPELLINGS.values()]), st.sampled_from(list(AROUND)), st.booleans(),
)  # fmt: skip
def test_any_shape(B: int, T: int, D: int, norm: Any, around: str, dynamic: bool) -> None:
    torch.manual_seed(B + 10 * T + D)
    model = Net(norm(D), D, around=AROUND[around])
    compare(model, torch.randn(B, T, 6), 8 * oracle.tolerance(torch.float32), None, dynamic=dynamic)
