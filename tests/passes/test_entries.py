"""Sums of squares of single numbers against per-example autograd, over models whose parameters have them.

``SAMPLE = MODELS`` compares the whole table, in a minute and a half.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from gnsfx import collector
from gnsfx.coverage import coverage
from tests import oracle
from tests.passes.models import MATMULS, Model
from tests.passes.test_measure import SYMBOLIC, Cast, build, named
from tests.zoo import floats, squares

WHOLE = {"reduction", "lift", "materialise", "rows", "whole", "shared"}  # paths that know the single numbers, always
SOME = {"outer", "segments", "ghost", "fused"}  # of one position per example, or of rows that all look up
# fmt: off
SAMPLE = ("linear_2d", "linear_3d", "batch_last", "reused", "matvec_3d", "attention_with_bias_kv", "low_rank_table", "positions",
          "repeated_positions", "position_rows", "layer_norm", "layer_norm_2d", "group_norm", "norm_reused", "temperature",
          "channel_scale", "class_token", "prelu", "rows_of_examples", "bias_of_everything", "sum_only", "padded_bias",
          "stacked_bias", "triangle", "complex", "conv2d", "conv_weight_norm", "masked", "scaled", "lora", "weight_norm_dim_1",
          "symmetric", "checkerboard", "sum_of_two_parameters", "weight_decay_alone", "cross_entropy_mean")
# fmt: on


def compare(name: str, dynamic: bool | None = None, **options: object) -> set[str]:
    """Train one step, compare what there is with the oracle, and say for which paths there was something."""
    torch._dynamo.reset()
    model, losses, train = build(name)
    truth = oracle.elementwise_sq_sums(model, losses(model))
    options = {"gns.inner": "eager", "gns.elementwise": True, **options}
    train(torch.compile(model, backend="gns", dynamic=dynamic, options=options)).backward()
    found = collector.elementwise_sq_sums(model)
    paths = {row.name: row.path for row in coverage(model) if row.name in truth}
    assert {n for n, path in paths.items() if path in WHOLE} <= set(found)
    assert {paths[n] for n in found} <= WHOLE | SOME
    for n, sums in found.items():
        assert sums.shape == truth[n].shape and sums.dtype is torch.float64
        largest = max(float(t.max()) for t in truth.values())
        bound = oracle.tolerance(torch.float64)
        # a number whose contributions cancel is rounding of those that do not
        torch.testing.assert_close(
            sums, truth[n], rtol=1e-9, atol=largest * bound * bound + 1e-14 * float(truth[n].max())
        )
        torch.testing.assert_close(sums.sum(), collector.sq_norms(model)[n], rtol=1e-9, atol=largest * bound * bound)
    return {paths[n] for n in found}


@pytest.mark.parametrize("name", SAMPLE)
def test_model(name: str) -> None:
    compare(name)


@pytest.mark.parametrize("name", SYMBOLIC[::3])
def test_symbolic_sizes(name: str) -> None:
    compare(name, dynamic=True)


@pytest.mark.parametrize("name", MATMULS[::6])
def test_paths_that_never_make_the_contributions_have_none(name: str) -> None:
    found = compare(name, **{"gns.path": "ghost"})
    assert "materialise" not in found
    assert "ghost" not in found or "outer" in compare(name), "only outer products are known without a stack"


def test_every_kind_of_path_is_among_them() -> None:
    kinds = {
        "reduction": "layer_norm",
        "lift": "checkerboard",
        "outer": "linear_2d",
        "segments": "repeated_positions",
        "rows": "rows_of_examples",
        "shared": "weight_decay_alone",
    }
    assert all(path in compare(name) for path, name in kinds.items())
    assert "materialise" in compare("linear_3d", **{"gns.path": "materialise"})


@pytest.mark.parametrize("name", ["layer_norm", "linear_2d", "conv_weight_norm", "positions", "cross_entropy_mean"])
def test_single_precision(name: str) -> None:
    model, losses, train = build(name)
    truth = oracle.elementwise_sq_sums(model, losses(model))
    torch._dynamo.reset()
    options = {"gns.inner": "eager", "gns.elementwise": True}
    train(torch.compile(Cast(model.float()), backend="gns", options=options)).backward()
    bound = oracle.tolerance(torch.float32)
    for n, sums in collector.elementwise_sq_sums(model).items():
        assert sums.dtype is torch.float32
        torch.testing.assert_close(sums.double(), truth[n], rtol=0, atol=bound * float(truth[n].max()))


def test_bf16_contributions_are_squared_in_single_precision() -> None:
    model = nn.Linear(4, 4).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.elementwise": True})
    compiled(torch.randn(3, 257, 4).bfloat16()).sum().backward()
    found = collector.elementwise_sq_sums(model)
    assert found["bias"].tolist() == [3 * 257.0**2] * 4  # bf16 has no 257


@pytest.mark.parametrize("size", [(1 << 17) - 1, 1 << 17, (1 << 17) + 1])
def test_only_parameters_up_to_a_size(size: int) -> None:
    torch._dynamo.reset()
    model = Model(lambda m, x: (x * m.w[:4]).sum(-1, keepdim=True) + m.v, w=nn.Parameter(torch.randn(size)),
                  v=nn.Parameter(torch.zeros(1))).double()  # fmt: skip
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.elementwise": True})
    squares(compiled(floats(3, 4))).mean().backward()
    assert set(collector.elementwise_sq_sums(model)) == {"v"} | ({"w"} if size <= 1 << 17 else set())
    assert set(collector.sq_norms(model)) == set(named(model))


def test_outer_products_turned_and_scaled() -> None:
    torch._dynamo.reset()
    weights = {"w": nn.Parameter(torch.randn(4, 3)), "v": nn.Parameter(torch.randn(3, 4))}
    model = Model(lambda m, x: linear(x, m.w.t().contiguous() * 0.5).sin() * linear(x, -m.v), **weights).double()
    x = floats(5, 4)
    truth = oracle.elementwise_sq_sums(model, squares(model(x)))
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.elementwise": True})
    squares(compiled(x)).mean().backward()
    assert {row.path for row in coverage(model)} == {"outer"}
    for name, sums in collector.elementwise_sq_sums(model).items():
        torch.testing.assert_close(sums, truth[name])
    assert set(truth) == set(collector.elementwise_sq_sums(model))
