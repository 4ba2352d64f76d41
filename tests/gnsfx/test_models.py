"""Whole models against per-example autograd: all parameters measured, exactly, and the gradient as it was."""

from __future__ import annotations

import pytest
import torch

from gnsfx import collector
from gnsfx.coverage import coverage
from tests import oracle
from tests.zoo import ZOO

THROUGH_INDUCTOR = ("mlp_3d", "gpt_tied", "llama", "convnet", "reparametrised", "embeddings")


def compiled_like_autograd(name: str, **options: object) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, call = ZOO[name]()
    truth = oracle.per_example_sq_norms(model, call(model))
    oracle.run(model, call)
    gradients = oracle.gradients(model)
    settings = {"gns.per_example": True, "gns.inner": "eager", **options}
    compiled = torch.compile(model, backend="gns", options=settings)
    oracle.run(model, lambda _: call(compiled))
    bound = oracle.tolerance(torch.float64)
    assert [(row.name, row.reason) for row in coverage(model) if row.status != "measured"] == []
    assert oracle.names_beyond(collector.per_example_sq_norms(model), truth, bound) == []
    sums = {n: t.sum()[None] for n, t in truth.items()}
    assert oracle.names_beyond({n: s[None] for n, s in collector.sq_norms(model).items()}, sums, bound) == []
    largest = max(float(g.abs().max()) for g in gradients.values())
    for n, g in oracle.gradients(model).items():
        torch.testing.assert_close(g, gradients[n], rtol=bound, atol=bound * largest)


@pytest.mark.parametrize("name", ZOO)
def test_eager(name: str) -> None:
    compiled_like_autograd(name)


@pytest.mark.parametrize("path", ["materialise", "fused", "ghost"])
@pytest.mark.parametrize("name", ["mlp_3d", "gpt_tied", "reused", "vit"])
def test_every_path(name: str, path: str) -> None:
    compiled_like_autograd(name, **{"gns.path": path})


@pytest.mark.slow
@pytest.mark.parametrize("name", THROUGH_INDUCTOR)
def test_inductor(name: str) -> None:
    compiled_like_autograd(name, **{"gns.inner": "inductor"})
