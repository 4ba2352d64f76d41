"""Kernels for rows whose example is data, against loops in fp64 that mask one example at a time."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import gnsfx.kernels.ops  # noqa: F401  (defines torch.ops.gnsfx)
from gnsfx.kernels import native
from gnsfx.kernels.routed_norm import count_ids, crosses, example_ids, misnumbered
from tests.oracle import tolerance

gns = torch.ops.gnsfx
sizes = st.integers(1, 5)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
few = settings(max_examples=40, deadline=None, derandomize=True)


def draw(*shape: int, dtype: torch.dtype, strided: bool) -> Tensor:
    """Values that bf16 represents; every other entry of something larger where ``strided``."""
    whole = torch.randint(-8, 9, (*shape[:-1], 2 * shape[-1])).div(4).to(dtype)
    return whole[..., ::2] if strided else whole[..., : shape[-1]].contiguous()


def pack(rows: Tensor, examples: int) -> list[Any]:
    return [rows, None, [], 1, examples, examples]


def close(found: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    bound = tolerance(torch.float32 if dtype is torch.bfloat16 else dtype)
    torch.testing.assert_close(found.double(), truth, rtol=bound, atol=bound)


@few
@given(sizes, sizes, st.integers(0, 9), sizes, sizes, dtypes, st.booleans(), st.booleans(), st.integers(0, 99))
def test_products(B: int, E: int, N: int, I: int, O: int, dtype: Any, strided: bool, own: bool, seed: int) -> None:
    """Independent contractions, with rows of their own or the same for all."""
    torch.manual_seed(seed)
    x, g = (draw(E, N, K, dtype=dtype, strided=strided) for K in (I, O))
    ids = torch.randint(B, (E, N) if own else (N,))
    each = ids.expand(E, N)
    truth = torch.stack(
        [torch.einsum("eni,eno,en->eio", x.double(), g.double(), (each == b).double()) for b in range(B)]
    )
    close(gns.routed_sq_norm(x, g, None, *pack(ids, B)), truth.square().sum((1, 2, 3)), dtype)
    close(gns.routed_product(x, g, None, *pack(ids, B)), truth, dtype)


@few
@given(sizes, sizes, st.integers(0, 9), sizes, sizes, dtypes, st.booleans(), st.integers(0, 99))
def test_groups(B: int, E: int, N: int, I: int, O: int, dtype: Any, strided: bool, seed: int) -> None:
    """Rows in groups, some of them empty, the last rows perhaps in none."""
    torch.manual_seed(seed)
    x, g = (draw(N, K, dtype=dtype, strided=strided) for K in (I, O))
    offsets, ids = torch.randint(N + 1, (E,)).sort().values.int(), torch.randint(B, (N,))
    position = torch.arange(N)
    truth = torch.zeros(B, E, I, O, dtype=torch.float64)
    for b in range(B):
        for e in range(E):
            start = int(offsets[e - 1]) if e else 0
            keep = ((ids == b) & (position >= start) & (position < offsets[e])).double()
            truth[b, e] = torch.einsum("ni,no,n->io", x.double(), g.double(), keep)
    close(gns.routed_sq_norm(x, g, offsets, *pack(ids, B)), truth.square().sum((1, 2, 3)), dtype)
    close(gns.routed_product(x, g, offsets, *pack(ids, B)), truth, dtype)


LONG = {  # B, E, N, I, O: segments that are multiplied, or whose pairs are, in whole tiles and parts of them
    "pairs": (7, 3, 65, 70, 90),
    "pairs in pieces": (2, 1, 30, 1100, 50),
    "products": (2, 2, 90, 29, 67),
    "large products": (2, 1, 2100, 66, 71),
    "more rows than a Gram has": (1, 1, 1030, 1050, 1060),
}


@pytest.mark.parametrize("native_code", (True, False), ids=("native", "torch"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", LONG.values(), ids=LONG)
def test_long_segments(shape: tuple[int, ...], dtype: Any, native_code: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typical errors, of sums that are rounded at random, stay far below the worst ones."""
    if not native_code:
        monkeypatch.setattr(native, "function", lambda *_: None)
    B, E, N, I, O = shape
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(E, N, K, generator=generator, dtype=torch.float64).to(dtype) for K in (I, O))
    ids = torch.randint(B, (N,), generator=generator)
    x[0, N // 2, I // 2] *= 50
    truth = [x[:, ids == b].double().mT @ g[:, ids == b].double() for b in range(B)]
    found = gns.routed_sq_norm(x, g, None, *pack(ids, B))
    u = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), torch.stack([t.square().sum() for t in truth]), rtol=8 * u, atol=0)
    offsets = torch.arange(1, E + 1).mul(N).int()
    flat = gns.routed_sq_norm(x.flatten(0, 1), g.flatten(0, 1), offsets, *pack(ids.repeat(E), B))
    torch.testing.assert_close(flat, found, rtol=8 * u, atol=0)


def test_rows_that_cancel_have_no_negative_norm() -> None:
    """One row of x for all, rows of g that sum to zero: the terms of the Grams cancel but for their rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, generator=generator).expand(1, 6 * 200, 64)
    g = torch.randn(200, 6, 64, generator=generator)
    g[:, 5] = -g[:, :5].sum(1)
    found = gns.routed_sq_norm(x, g.view(1, -1, 64), None, *pack(torch.arange(200).repeat_interleave(6), 200))
    assert (found >= 0).all()
    # six roundings of terms that are at most 6 sum |g|^2 |x|^2 together
    assert (found <= 6 * 6 * torch.finfo(torch.float32).eps * x[0, 0].square().sum() * g.square().sum((1, 2))).all()


@pytest.mark.parametrize("value", (float("inf"), float("nan")))
@pytest.mark.parametrize("sizes", ((60, 70), (3, 37)), ids=("pairs", "products"))
@pytest.mark.parametrize("factor", (0, 1))
def test_what_is_not_finite_stays_with_its_example(factor: int, sizes: tuple[int, int], value: float) -> None:
    x, g = factors = [torch.ones(1, 12, K) for K in sizes]
    factors[factor][0, 5, 2] = value
    found = gns.routed_sq_norm(x, g, None, *pack(torch.arange(12) % 3, 3))
    assert found.isfinite().tolist() == [True, True, False]
    assert value != float("inf") or found[2] == value


@few
@given(sizes, st.integers(0, 9), sizes, sizes, st.integers(0, 2), st.integers(0, 2), dtypes, st.integers(0, 99))
def test_tables(B: int, N: int, V: int, O: int, products: int, lookups: int, dtype: Any, seed: int) -> None:
    torch.manual_seed(seed)
    if not products + lookups:
        return
    x, g, at, values = [], [], [], []
    truth, ids = torch.zeros(B, V, O, dtype=torch.float64), torch.randint(B, (N,))
    for _ in range(products):
        x.append(draw(N, V, dtype=dtype, strided=True))
        g.append(draw(N, O, dtype=dtype, strided=False))
        truth += torch.stack([x[-1].double().t() @ (g[-1].double() * (ids == b)[:, None]) for b in range(B)])
    for _ in range(lookups):
        at.append(torch.randint(V, (N,)))
        values.append(draw(N, O, dtype=dtype, strided=False))
        for b in range(B):
            truth[b].index_add_(0, at[-1], values[-1].double() * (ids == b)[:, None])
    close(gns.routed_tied_sq_norm(x, g, at, values, V, *pack(ids, B)), truth.square().sum((1, 2)), dtype)


@few
@given(sizes, sizes, sizes, sizes, dtypes, st.permutations(range(3)), st.integers(1, 2), st.integers(0, 99))
def test_sums_and_masks(B: int, P: int, Q: int, R: int, dtype: Any, order: list[int], count: int, seed: int) -> None:
    torch.manual_seed(seed)
    values, dims = draw(P, Q, R, dtype=dtype, strided=True), order[:count]
    shape = [values.shape[d] for d in dims]
    ids = torch.randint(B, (int(torch.tensor(shape).prod()),))
    ordered = sorted(dims)
    grid = ids.view(shape).permute([dims.index(d) for d in ordered])
    grid = grid.reshape([values.shape[d] if d in dims else 1 for d in range(3)])
    masked = torch.stack([values.double() * (grid == b) for b in range(B)])
    close(gns.mask_by_example(values, dims, *pack(ids, B)), masked, dtype)
    close(gns.sum_by_example(values, dims, *pack(ids, B)), masked.sum([d + 1 for d in dims]), dtype)


def test_numbering() -> None:
    """Row numbers, coordinates of a mask, boundaries, and what is taken of them; negative rows count from the end."""
    rows = torch.tensor([5, 0, 3, -1])
    assert example_ids(rows, None, [], 2, 6, 3).tolist() == [2, 0, 1, 2]
    assert example_ids(rows, None, [torch.tensor([3, 0]), torch.tensor([False, True])], 2, 6, 3).tolist() == [2]
    mask = torch.tensor([[0, 1, 0], [1, 0, 1]])
    assert example_ids(mask, 0, [], 1, 2, 2).tolist() == [0, 1, 1]
    assert example_ids(mask, 1, [], 1, 3, 3).tolist() == [1, 0, 2]
    assert example_ids(torch.tensor([0, 2, 2, 5]), -1, [], 1, 3, 3).tolist() == [0, 0, 2, 2, 2]


def test_documents_apart() -> None:
    ids, zero = torch.tensor([0, 0, 1]), torch.zeros(2, 3, 3)
    zero[:, :2, :2] = zero[:, 2, 2] = 1
    assert not crosses(zero, [1], [2], False, ids, 2)
    zero[1, 0, 2] = 1e-30
    assert crosses(zero, [1], [2], False, ids, 2)
    assert crosses(torch.ones(1, 1, 3, 3, dtype=torch.bool).tril(), [2], [3], True, ids, 2)
    scores = torch.full((2, 1, 3, 3), -1e9)
    both = torch.tensor([[0, 0, 1], [2, 3, 3]]).flatten()
    assert crosses(scores, [0, 2], [0, 3], True, both, 4)  # shut everywhere is open to all alike
    scores.diagonal(dim1=2, dim2=3).zero_()
    assert not crosses(scores, [0, 2], [0, 3], True, both, 4)
    scores[1, 0, 2, 0] = 0.0
    assert crosses(scores, [0, 2], [0, 3], True, both, 4)
    assert [bool(misnumbered(torch.tensor(v), 3, None)) for v in ([0, 2, -1], [0, 3, 1], [-2, 0, 0])] == [
        False,
        True,
        True,
    ]
    assert [bool(misnumbered(torch.tensor(v), 3, -1)) for v in ([0, 1, 3], [0, 2], [1, 3], [0, 2, 1, 3])] == [
        False,
        True,
        True,
        True,
    ]
    assert count_ids(torch.tensor([4, -1, 4, 0])) == 2


@pytest.mark.parametrize(
    "name", ["routed_sq_norm", "routed_product", "routed_tied_sq_norm", "sum_by_example", "mask_by_example", "crosses"]
)
def test_opcheck(name: str) -> None:
    x, g, ids = torch.randn(2, 4, 3), torch.randn(2, 4, 5), pack(torch.tensor([0, 2, 1, 0]), 3)
    arguments = {
        "routed_tied_sq_norm": ([x[0]], [g[0]], [torch.tensor([1, 0, 2, 2])], [g[1]], 3, *ids),
        "sum_by_example": (x, [1], *ids),
        "mask_by_example": (x, [1], *ids),
        "crosses": (torch.randn(4, 4), [0], [1], False, *ids),
    }.get(name, (x, g, None, *ids))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(gns, name).default, arguments, test_utils=checks)
