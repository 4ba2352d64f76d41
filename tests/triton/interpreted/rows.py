"""The backward of norm layers with per-example norms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from gnsfx.kernels.norm_backward import twin
from gnsfx.kernels.triton import norm_backward, plan
from tests.triton.interpreted.numbers import DTYPES, UNIT, expect, random

# (B, T, D) and a number of multiprocessors that sends the shape to the regime
SHAPES = {
    "chunk": ((3, 17, 96), 4, plan.CHUNK),
    "whole": ((13, 5, 33), 4, plan.WHOLE),
    "whole, one position": ((9, 1, 20), 2, plan.WHOLE),
    "flat": ((5, 70, 20), 4, plan.FLAT),
    "flat, boundaries that coincide": ((5, 24, 20), 4, plan.FLAT),
    "one example": ((1, 40, 70), 4, plan.CHUNK),
    "one row": ((1, 1, 7), 4, plan.CHUNK),
    "one column": ((3, 5, 1), 4, plan.CHUNK),
    "all alike": ((8, 8, 8), 2, plan.WHOLE),
    "wide": ((2, 3, 600), 2, plan.CHUNK),
}
ROUNDED = ("chunk", "whole", "flat")  # also in 16 bits


def check(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    rms: bool,
    multiprocessors: int,
    positions_first: bool = False,
    residual: Tensor | None = None,
    *more: Tensor,
) -> None:
    B, T, D = x.shape
    exact = x.double()
    mean = None if rms else exact.mean(2)
    rstd = ((exact if mean is None else exact - mean.unsqueeze(2)).square().mean(2) + 1e-5).rsqrt()
    statistics = (None if mean is None else mean.float(), rstd.float())
    w, r = (None if t is None else t.double() for t in (weight, residual))
    truth = twin(sum((m.double() for m in more), g.double()), exact, mean, rstd, w, not rms, residual=r)
    found = norm_backward.norm_backward(
        g, x, *statistics, weight, not rms, multiprocessors, positions_first, residual, *more
    )
    rounded = UNIT[x.dtype if weight is None else weight.dtype]
    largest = sum((m.double().abs() for m in more), g.double().abs())
    summands = (largest * rstd.unsqueeze(2) * (1 if w is None else w)).abs().max()
    # a mean of numbers around 1 costs the digits that the subtraction cancels
    expect(found[0], truth[0], UNIT[x.dtype], terms=D, summands=summands.item())
    expect(found[1], truth[1], rounded, terms=B * T)
    expect(found[3].sum(0), truth[3].sum(0), terms=T * D)
    assert found[3].shape == truth[3].shape and found[4].shape == truth[4].shape
    assert all(t.storage_offset() * t.element_size() % 16 == 0 for t in found), "Inductor takes results to be aligned"
    assert (
        found[0].stride()
        == (torch.empty(T, B, D).transpose(0, 1) if positions_first else torch.empty(B, T, D)).stride()
    )
    if not rms:
        expect(found[2], truth[2], rounded, terms=B * T)
        expect(found[4].sum(0), truth[4].sum(0), terms=T * D)


def cases() -> list[tuple[str, torch.dtype]]:
    return [(name, dtype) for name in SHAPES for dtype in (DTYPES if name in ROUNDED else DTYPES[:1])]


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(("name", "dtype"), cases(), ids=str)
def test_every_regime(name: str, dtype: torch.dtype, rms: bool) -> None:
    (B, T, D), multiprocessors, regime = SHAPES[name]
    assert plan.cut_rows(B, T, D, multiprocessors).regime == regime
    x, g = random(B, T, D, dtype=dtype) * 2 + 1, random(B, T, D, dtype=dtype, seed=1)
    weight = None if name.startswith("one") else random(D, seed=2)
    residual = random(B, T, D, dtype=dtype, seed=3) if dtype == torch.float16 else None
    check(x, g, weight, rms, multiprocessors, residual=residual)


@seed(0)
@settings(max_examples=12, database=None, deadline=None, phases=[Phase.generate])
@given(st.integers(1, 9), st.integers(1, 24), st.integers(1, 40), st.integers(1, 6), st.booleans())
def test_any_shape(B: int, T: int, D: int, multiprocessors: int, rms: bool) -> None:
    check(random(B, T, D), random(B, T, D, seed=1), random(D, seed=2), rms, multiprocessors)


@pytest.mark.parametrize("spread", ["strided rows", "positions first", "every other column", "expanded"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_any_strides(spread: str, rms: bool) -> None:
    B, T, D = 3, 6, 40
    make = {
        "strided rows": lambda s: random(B, T, 2 * D, seed=s)[..., :D],
        "positions first": lambda s: random(T, B, D, seed=s).transpose(0, 1),
        "every other column": lambda s: random(B, T, 2 * D, seed=s)[..., ::2],
        "expanded": lambda s: random(B, 1, D, seed=s).expand(B, T, D),
    }[spread]
    usual = [random(B, T, D, seed=n) for n in range(3)]
    for n in range(3):
        x, g, residual = (make(n) if at == n else usual[at] for at in range(3))
        check(x, g, random(2 * D)[::2], rms, 2, positions_first=spread == "positions first", residual=residual)


SUMS = [
    ("chunk", 2, "contiguous"), ("chunk", 3, "contiguous"), ("whole", 2, "alike"), ("whole", 3, "every other column"),
    ("flat", 3, "alike"), ("chunk", 2, "otherwise"), ("one row", 3, "otherwise"),
]  # fmt: skip


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(("name", "count", "spread"), SUMS)
def test_a_sum_of_gradients(name: str, count: int, spread: str, rms: bool) -> None:
    (B, T, D), multiprocessors, _ = SHAPES[name]
    laid = {
        "contiguous": lambda s: random(B, T, D, dtype=torch.float16, seed=s),
        "alike": lambda s: random(T, B, D, dtype=torch.float16, seed=s).transpose(0, 1),
        "otherwise": lambda s: random(B, T, D, seed=s) if s % 2 else random(T, B, D, seed=s).transpose(0, 1),
        "every other column": lambda s: random(B, T, 2 * D, seed=s)[..., ::2],
    }[spread]
    x, residual = random(B, T, D), random(B, T, D, seed=1) if count == 3 else None
    first, *more = (laid(s) for s in range(2, 2 + count))
    check(x, first, random(D, seed=9), rms, multiprocessors, False, residual, *more)


def test_an_example_is_not_read_by_another() -> None:
    """Sums of an example that is not a number stay its own: in every regime, and where programs own several examples."""
    for (B, T, D), multiprocessors, _ in (SHAPES[name] for name in ("chunk", "whole", "flat")):
        x, g = random(B, T, D), random(B, T, D, seed=1)
        x[1] = float("nan")
        mean, rstd = x.mean(2), x.square().mean(2)
        *_, gamma, beta = norm_backward.norm_backward(g, x, mean, rstd, None, True, multiprocessors)
        assert gamma.sum(0).isnan().nonzero().tolist() == [[1]] and bool((beta.sum(0) > 0).all())


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_the_twin_is_autograd(rms: bool) -> None:
    x, weight, shift = (random(*s).double() for s in ((4, 6, 10), (10,), (10,)))
    x.requires_grad_()
    w, s = (p.expand(4, 1, 10).clone().requires_grad_() for p in (weight, shift))
    g = random(4, 6, 10, seed=1).double()
    norm = torch.nn.functional.rms_norm if rms else torch.nn.functional.layer_norm
    dx, dw, ds = torch.autograd.grad(norm(x, (10,), eps=1e-5) * w + s, (x, w, s), g)
    center = x.detach().mean(2, keepdim=True) * (not rms)
    rstd = ((x.detach() - center).square().mean(2) + 1e-5).rsqrt()
    found = twin(g, x.detach(), None if rms else center.squeeze(2), rstd, weight, True)
    norms = [d.square().sum((1, 2)) for d in (dw, ds)]
    for a, b in zip(
        (*found[:3], *(n.sum(0) for n in found[3:])), (dx, dw.sum((0, 1)), ds.sum((0, 1)), *norms), strict=True
    ):
        torch.testing.assert_close(a, b)
