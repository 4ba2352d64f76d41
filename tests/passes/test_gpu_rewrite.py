"""The graphs that CUDA devices get, held by numbers against per-example autograd: on the CPU, where the ops run their twins.

Kernels that take 16 bits alone are said to take fp64 as well, so that nothing but a wrong graph can make a difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gnsfx
from gnsfx import collector
from gnsfx.coverage import coverage
from gnsfx.explain import explain
from gnsfx.kernels import gpu, machine
from tests import oracle, zoo
from tests.passes.test_documents import compare as compare_documents
from tests.passes.test_documents import sdpa
from tests.passes.test_measure import build, compare

EAGER = {"gns.inner": "eager", "gns.per_example": True}
EXACT = oracle.tolerance(torch.float64)


def as_on_cuda(monkeypatch: pytest.MonkeyPatch, multiplied: set[torch.dtype]) -> None:
    """CPU tensors take the rewrite of a Hopper GPU, on paths that are quick there."""
    monkeypatch.setattr(gpu, "kernels_on", lambda device: frozenset({"norm", "products", "embedding"}))
    monkeypatch.setattr(gpu, "MULTIPLIED", frozenset(multiplied))
    monkeypatch.setattr(gpu, "LOOKED_UP", frozenset({*multiplied, torch.float32}))
    monkeypatch.setitem(machine.MACHINES, "cpu", machine.MACHINES["cuda"])


@pytest.fixture(autouse=True)
def cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    as_on_cuda(monkeypatch, {*gpu.MULTIPLIED, torch.float64})
    machine.machine_for.cache_clear()
    yield
    machine.machine_for.cache_clear()


def ops_of(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """How often each op of ours is in the graph."""
    (graph,) = explain(model, *inputs).graphs
    return {n.removeprefix("gnsfx.").removesuffix(".default"): c for n, c in graph.op_counts.items() if "gnsfx" in n}


def compiled_like_autograd(case: zoo.Case, bound: float = EXACT, **options: object) -> nn.Module:
    model, call = case
    truth = oracle.per_example_sq_norms(model, call(model))
    oracle.run(model, call)
    gradients = oracle.gradients(model)
    compiled = torch.compile(model, backend="gns", options={**EAGER, **options})
    oracle.run(model, lambda _: call(compiled))
    assert [(row.name, row.reason) for row in coverage(model) if row.status != "measured"] == []
    assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, bound) == []
    largest = max(float(g.abs().max()) for g in gradients.values())
    for n, g in oracle.gradients(model).items():
        torch.testing.assert_close(g, gradients[n], rtol=bound, atol=bound * largest)
    return compiled


@pytest.mark.parametrize(
    "name", ["gpt_tied", "llama", "vit", "embeddings", "reused", "folded", "attentive", "time_first"]
)
def test_zoo(name: str) -> None:
    compiled_like_autograd(zoo.ZOO[name]())


class Aligned(nn.Module):
    """Widths in multiples of 8, so that everything has a kernel: a table with two uses, q, k, v, gate and up, a fold."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8, padding_idx=3)
        self.at = nn.Embedding(6, 8)
        self.q, self.k, self.v, self.up = (nn.Linear(8, o, bias=False) for o in (8, 8, 16, 24))
        self.out, self.twice = nn.Linear(24, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.at(torch.arange(tokens.shape[1]))
        q, k, v = self.q(x), self.k(x), self.v(x)
        y = F.scaled_dot_product_attention(q, k, v).repeat(1, 1, 2)[..., :24] * self.up(x)
        return self.head(self.twice(self.twice(self.out(y).tanh())))


def aligned(B: int = 4, T: int = 6, **options: bool) -> zoo.Case:
    model, tokens, targets = Aligned(**options).double(), zoo.ids(16, B, T), zoo.ids(16, B, T)
    return model, lambda m: zoo.token_losses(m(tokens), targets)


@pytest.mark.parametrize("path", ["auto", "materialise", "fused", "ghost"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_path(path: str, tied: bool) -> None:
    compiled_like_autograd(aligned(tied=tied), **{"gns.path": path})


def test_what_is_written() -> None:
    """Grams of one input are multiplied once, three at a time; all parts meet in one op, and are added there alone."""
    model = Aligned(tied=False).double()
    for path, expected in {
        "fused": {"mm_norm_parts": 7, "embedding_norm_parts": 2, "collect": 1},
        "ghost": {"gram_norm_parts": 5, "embedding_norm_parts": 2, "collect": 1},
    }.items():
        compiled = torch.compile(model, backend="gns", options={**EAGER, "gns.path": path})
        (graph,) = explain(compiled, zoo.ids(16, 4, 6)).graphs
        assert {n: graph.op_counts.get(f"gnsfx.{n}.default", 0) for n in expected} == expected, path
        assert "clamp_min" not in graph.after
        factors = re.findall(r"gram_norm_parts.default\(\w+, \[([^\]]*)\]", graph.after)
        assert sorted(len(names.split(",")) for names in factors) == ([] if path == "fused" else [1, 1, 1, 1, 3])


@pytest.mark.parametrize(
    "name", ["tied", "two_views", "embedding_padding", "linear_3d", "conv2d", "cross_entropy_mean"]
)
def test_models(name: str) -> None:
    compare(build(name))


def test_rows_of_packed_documents() -> None:
    compare_documents(sdpa, 2)


def test_numbers_one_by_one() -> None:
    model, call = aligned(T=1, tied=False)
    compiled = torch.compile(model, backend="gns", options={**EAGER, "gns.elementwise": True})
    truth = oracle.elementwise_sq_sums(model, call(model))
    call(compiled).mean().backward()
    found = collector.elementwise_sq_sums(model)
    assert {"q.weight", "up.weight", "out.bias"} <= set(found)
    for name, sums in found.items():
        torch.testing.assert_close(sums, truth[name])


@pytest.mark.parametrize("path", ["fused", "ghost"])
def test_one_graph_for_all_batches(path: str) -> None:
    model, _ = aligned()
    compiled = torch.compile(model, backend="gns", options={**EAGER, "gns.path": path}, dynamic=True)
    for B, T in ((4, 6), (3, 5), (6, 6), (7, 2)):
        tokens, targets = zoo.ids(16, B, T), zoo.ids(16, B, T)
        truth = oracle.per_example_sq_norms(model, zoo.token_losses(model(tokens), targets))
        oracle.run(model, lambda _, t=tokens, y=targets: zoo.token_losses(compiled(t), y))
        assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, EXACT) == []
    assert len(collector.compiled(model)) == 1


@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        ("auto", torch.bfloat16),
        ("materialise", torch.bfloat16),
        ("fused", torch.bfloat16),
        ("ghost", torch.float16),
        ("fused", torch.float32),
    ],
)
def test_dtypes(path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms as near to fp64 as a few roundings allow; the gradient is the plain one, or its sum rounded once more."""
    monkeypatch.undo()
    as_on_cuda(monkeypatch, {torch.bfloat16, torch.float16})
    model = Aligned().to(dtype)
    exact, tokens, targets = Aligned().double(), zoo.ids(16, 4, 6), zoo.ids(16, 4, 6)
    exact.load_state_dict(model.state_dict())
    truth = oracle.per_example_sq_norms(exact, zoo.token_losses(exact(tokens), targets))
    compiled = torch.compile(model, backend="gns", options={**EAGER, "gns.path": path})

    def step() -> dict[str, Tensor]:
        oracle.run(model, lambda _: zoo.token_losses(compiled(tokens), targets))
        return oracle.gradients(model)

    with gnsfx.measuring(False):
        plain = step()
    for name, gradient in step().items():
        unit = torch.finfo(dtype).eps
        # the plain gradient of a layer with two uses is the sum of two that were rounded, ours is not
        near = (unit if name == "twice.weight" else 1e-6) * float(plain[name].abs().max())
        torch.testing.assert_close(gradient, plain[name], rtol=unit, atol=near)
    bound = oracle.tolerance(dtype, terms=32)  # roundings between the loss and the first table
    assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, bound) == []
    kinds = {torch.float32: "mm_sq_norm"}.get(dtype, "mm_norm_parts")
    if path == "fused":
        assert kinds in ops_of(compiled, tokens)


def test_autocast_with_a_tied_table() -> None:
    """The table is in fp32 and its head in bf16: no copy of the gradient of all logits in fp32."""
    model, call = aligned()
    model.float()
    truth = oracle.per_example_sq_norms(model, call(model))
    compiled = torch.compile(model, backend="gns", options=EAGER)
    with torch.autocast("cpu", torch.bfloat16):
        found, losses = ops_of(compiled, zoo.ids(16, 4, 6)), call(compiled)
    assert "tied_cross" in found and "tied_sq_norm" not in found
    losses.mean().backward()
    assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, oracle.tolerance(torch.bfloat16, 32)) == []
