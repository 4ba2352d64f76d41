"""Every op against its reference in fp64, elementwise, within the rounding that its dtype makes unavoidable."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gnsfx.kernels.ops  # noqa: F401 -- defines torch.ops.gnsfx
from gnsfx.kernels import native, reference, tiling
from gnsfx.kernels.embedding_norm import SKIPPED

gns = torch.ops.gnsfx

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
dtypes = st.sampled_from(DTYPES)
sizes = st.sampled_from((1, 2, 3, 5, 8, 17, 33))
layouts = st.sampled_from(("contiguous", "permuted", "sliced", "expanded"))
seeds = st.integers(0, 2**16)
either_scratch = pytest.mark.parametrize("scratch", ("native", "cached", "tiny"))
property_test = settings(deadline=None, max_examples=40, derandomize=True)


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Random tensor of this shape whose memory is laid out as named; "expanded" repeats one entry along dimension 2."""
    shape = tuple(shape)
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    match layout:
        case "permuted":
            order = list(reversed(range(full.dim())))
            return full.permute(order).contiguous().permute(order)
        case "sliced":
            wide = full.new_full([2 * n + 1 for n in shape], float("nan"))
            view = wide[tuple(slice(1, 2 * n + 1, 2) for n in shape)]
            return view.copy_(full)
        case "expanded":
            return full.narrow(2, 0, 1).expand(shape)
    return full


@contextmanager
def scratch_of(size: str) -> Iterator[None]:
    """All but "native" is torch code alone; "tiny" shrinks every tile to a few elements, so that small shapes pass through all loops."""
    with pytest.MonkeyPatch.context() as patch:
        if size != "native":
            patch.setattr(native, "function", lambda *_: None)
        if size == "tiny":
            patch.setattr(tiling, "CPU_BUDGET", 256)
            patch.setattr(tiling, "_MIN_EDGE", 2)
            patch.setattr(tiling, "_GRAM_BLOCK", 3)
        yield


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def accumulated(dtype: torch.dtype) -> float:
    return roundoff(torch.float64 if dtype == torch.float64 else torch.float32)


def assert_within(actual: Tensor, truth: Tensor, bound: Tensor) -> None:
    """|actual - truth| <= bound everywhere, the bound being the worst case of a correct computation."""
    assert actual.shape == truth.shape
    error = (actual.double() - truth).abs()
    excess = (error - bound * 1.01 - 1e-30).max().item() if error.numel() else 0.0
    assert excess <= 0, f"error {error.max().item():.3e} exceeds its bound by {excess:.3e}"


def product_bounds(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 per-example products [B,E,I,O], the worst error of each, and the product of absolute values."""
    products = torch.einsum("beti,beto->beio", x.double(), g.double())
    absolute = torch.einsum("beti,beto->beio", x.double().abs(), g.double().abs())
    rounded = roundoff(x.dtype) if x.dtype == torch.bfloat16 else 0.0  # the one piece that a CPU must round
    return products, (x.shape[2] + 2) * accumulated(x.dtype) * absolute + rounded * absolute, absolute


def square_bound(products: Tensor, errors: Tensor, dtype: torch.dtype) -> Tensor:
    """Worst error of the sum of squares of ``products`` [B, ...] known only up to ``errors``."""
    products, errors = products.flatten(1), errors.flatten(1)
    squares = products.square().sum(1)
    summing = (products.shape[1] + 8) * accumulated(dtype) * squares
    return (2 * products.abs() * errors + errors.square()).sum(1) + summing


@either_scratch
@property_test
@given(
    B=sizes, E=st.sampled_from((1, 2, 3)), T=sizes, I=sizes, O=sizes, dtype=dtypes, lx=layouts, lg=layouts, seed=seeds
)
def test_mm_sq_norm(scratch, B, E, T, I, O, dtype, lx, lg, seed):
    x, g = make((B, E, T, I), dtype, lx, seed), make((B, E, T, O), dtype, lg, seed + 1)
    with scratch_of(scratch):
        grad, sq_norms = (gns.mm_sq_norm if scratch == "native" else gns._mm_sq_norm)(x, g)
    truth, sq_truth = reference.mm_sq_norm_ref(x.double(), g.double())
    products, errors, absolute = product_bounds(x, g)
    assert grad.dtype == dtype
    assert sq_norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    adding = (B + 2) * accumulated(dtype) * absolute.sum(0)
    assert_within(grad, truth, errors.sum(0) + adding + roundoff(dtype) * truth.abs())
    assert_within(sq_norms, sq_truth, square_bound(products, errors, dtype))


@either_scratch
@property_test
@given(
    B=sizes, E=st.sampled_from((1, 2, 3)), T=sizes, I=sizes, O=sizes, dtype=dtypes, lx=layouts, lg=layouts, seed=seeds
)
def test_ghost_sq_norm(scratch, B, E, T, I, O, dtype, lx, lg, seed):
    x, g = make((B, E, T, I), dtype, lx, seed), make((B, E, T, O), dtype, lg, seed + 1)
    with scratch_of(scratch):
        sq_norms = gns.ghost_sq_norm(x, g)
    grams = [torch.einsum("besk,betk->best", t.double().abs(), t.double().abs()) for t in (x, g)]
    terms = (I + O + E * T * T + 8) * accumulated(dtype)
    assert_within(
        sq_norms, reference.ghost_sq_norm_ref(x.double(), g.double()), terms * (grams[0] * grams[1]).sum((1, 2, 3))
    )
    assert (sq_norms >= 0).all()


@pytest.mark.parametrize("shape", [(2, 1, 600, 40, 24), (3, 2, 300, 8, 5), (8, 1, 256, 700, 30)], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_ghost_blocks_over_positions(shape, dtype):
    B, E, T, I, O = shape
    x, g = make((B, E, T, I), dtype, "contiguous", 0), make((B, E, T, O), dtype, "permuted", 1)
    truth = reference.ghost_sq_norm_ref(x.double(), g.double())
    torch.testing.assert_close(gns.ghost_sq_norm(x, g).double(), truth, rtol=1e-5, atol=0)


@either_scratch
@property_test
@given(
    B=sizes,
    T=sizes,
    D=sizes,
    V=sizes,
    dtype=dtypes,
    layout=layouts,
    base=st.sampled_from((0, -3, 2**62, -(2**63))),
    skipped=st.sampled_from((0.0, 0.4, 1.0)),
    seed=seeds,
)
def test_embedding_sq_norm(scratch, B, T, D, V, dtype, layout, base, skipped, seed):
    # Every second id differs from its neighbour in the upper half of its bits only.
    ids = torch.randint(V, (T, B), generator=torch.Generator().manual_seed(seed)).t()
    ids = base + ids // 2 + ids % 2 * 2**33
    g = make((B, T, D), dtype, layout, seed)
    skip = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < skipped
    with scratch_of(scratch):
        sq_norms = gns.embedding_sq_norm(ids.masked_fill(skip, SKIPPED), g)
    rows = g.double().masked_fill(skip.unsqueeze(2), 0)
    bound = reference.embedding_sq_norm_ref(ids, rows.abs()) * (2 * T + T * D + 8) * accumulated(dtype)
    assert_within(sq_norms, reference.embedding_sq_norm_ref(ids, rows), bound)


@either_scratch
@property_test
@given(B=sizes, S=sizes, T=sizes, D=sizes, V=sizes, dtype=dtypes, layout=layouts, skipped=st.booleans(), seed=seeds)
def test_tied_sq_norm(scratch, B, S, T, D, V, dtype, layout, skipped, seed):
    ids = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(seed))
    g, x, h = (make(s, dtype, layout, seed + i) for i, s in enumerate(((B, S, D), (B, T, D), (B, T, V))))
    skip = (ids == 0) & skipped
    with scratch_of(scratch):
        sq_norms = gns.tied_sq_norm(ids.masked_fill(skip, SKIPPED), g, x, h)
        grad, same = gns.tied_mm_sq_norm(ids.masked_fill(skip, SKIPPED), g, x, h)
    g = g.masked_fill(skip.unsqueeze(2), 0)
    truth = reference.tied_sq_norm_ref(ids, g.double(), x.double(), h.double())
    worst = reference.tied_sq_norm_ref(ids, g.double().abs(), x.double().abs(), h.double().abs())
    terms = (2 * (S + T + D + V) + S * T + T * T + D * V + 16) * accumulated(dtype)
    rounded = 3 * roundoff(dtype) if dtype == torch.bfloat16 else 0.0
    assert_within(sq_norms, truth, (terms + rounded) * worst)
    assert_within(same, truth, (terms + rounded) * worst)
    table, size = (reference.tied_mm_ref(ids, *(f(t.double()) for t in (g, x, h))) for f in (torch.clone, torch.abs))
    assert grad.dtype == dtype
    assert_within(grad, table, (B + S + T + 2) * accumulated(dtype) * size + 2 * roundoff(dtype) * size)


# A row for each method and feature: weight, input size, stride, padding, dilation, transposed, output padding, groups.
CONVOLUTIONS = {
    "1d": ((6, 4, 3), (11,), [2], [1], [1], False, [0], 1),
    "1d-depthwise-causal": ((6, 1, 4), (9,), [1], [3], [1], False, [0], 6),
    "1d-transposed": ((4, 3, 4), (7,), [2], [1], [1], True, [1], 2),
    "2d": ((6, 4, 3, 3), (9, 8), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
    "2d-uneven": ((6, 2, 3, 2), (9, 8), [2, 1], [1, 0], [1, 2], False, [0, 0], 2),
    "2d-pointwise": ((6, 4, 1, 1), (9, 8), [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    "2d-pointwise-strided": ((6, 4, 1, 1), (9, 8), [2, 2], [0, 0], [1, 1], False, [0, 0], 1),
    "2d-patches": ((5, 3, 2, 4), (9, 11), [2, 4], [0, 0], [1, 1], False, [0, 0], 1),
    "2d-patches-one-number": ((5, 3, 2, 2), (9, 11), [2], [0], [1], False, [0], 1),
    "2d-depthwise": ((6, 1, 3, 3), (9, 8), [1, 1], [1, 1], [1, 1], False, [0, 0], 6),
    "2d-depthwise-wide": ((6, 1, 5, 2), (9, 8), [2, 1], [3, 1], [2, 1], False, [0, 0], 6),
    "2d-depth-multiplier": ((8, 1, 3, 2), (9, 8), [1, 1], [0, 0], [1, 1], False, [0, 0], 4),
    "2d-many-channels": ((33, 17, 3, 3), (9, 8), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
    "2d-whole-vectors": ((48, 16, 2, 3), (9, 8), [2, 1], [1, 2], [1, 2], False, [0, 0], 1),
    "2d-transposed": ((4, 6, 3, 2), (5, 6), [2, 3], [1, 0], [1, 2], True, [1, 0], 1),
    "2d-large-weight": ((96, 80, 3, 3), (5, 4), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
    "3d": ((6, 2, 3, 2, 1), (5, 6, 4), [1, 2, 1], [1, 0, 0], [1, 1, 1], False, [0, 0, 0], 2),
    "3d-patches": ((3, 2, 2, 2, 2), (4, 4, 5), [2, 2, 2], [0, 0, 0], [1, 1, 1], False, [0, 0, 0], 1),
}


@either_scratch
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution_sq_norm(scratch, name, dtype):
    weight_shape, size, *arguments = CONVOLUTIONS[name]
    channels = weight_shape[0] if arguments[3] else weight_shape[1] * arguments[5]
    weight = torch.empty(weight_shape, dtype=dtype)
    for seed, (B, R, layout) in enumerate(
        ((1, 1, "contiguous"), (3, 1, "sliced"), (3, 2, "permuted"), (2, 3, "expanded"))
    ):
        input = make((B, R, channels, *size), dtype, layout, seed)
        output = torch.ops.aten.convolution(input.flatten(0, 1).double(), weight.double(), None, *arguments)
        grad_output = make((B, R, *output.shape[1:]), dtype, layout, seed + 9)
        with scratch_of(scratch):
            grad, sq_norms = gns.convolution_sq_norm(grad_output, input, weight, *arguments)
        doubles = grad_output.double(), input.double(), weight.double()
        truth, sq_truth = reference.convolution_sq_norm_ref(*doubles, *arguments)
        worst, sq_worst = reference.convolution_sq_norm_ref(*(t.abs() for t in doubles), *arguments)
        terms = (B + R * output[0, 0].numel() + 8) * accumulated(dtype) + 2 * roundoff(dtype)
        assert grad.dtype == dtype
        assert_within(grad, truth, terms * worst)
        assert_within(sq_norms, sq_truth, (2 * terms + weight.numel() * accumulated(dtype)) * sq_worst)


@pytest.mark.parametrize("found", DTYPES, ids=str)
def test_collect(found):
    rows = [torch.arange(3.0), torch.ones(6, dtype=found)[::2]]
    result = gns.collect(rows)
    assert result.dtype == (torch.float64 if found == torch.float64 else torch.float32)
    torch.testing.assert_close(result.double(), reference.collect_ref([r.double() for r in rows]))
