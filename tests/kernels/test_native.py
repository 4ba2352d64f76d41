"""The C++ kernels against the reference in fp64, and what becomes of the ops where they cannot be built."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gnsfx.errors import GnsWarning
from gnsfx.kernels import ghost_norm, native, ops, reference
from gnsfx.kernels.convolution_norm import convolution_sq_norm
from gnsfx.kernels.mm_norm import mm_sq_norm, product_sq_norm
from gnsfx.kernels.native import build

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # B, E, T, I, O
    "one of everything": (1, 1, 1, 1, 1),
    "B = T = I = O": (7, 1, 7, 7, 7),
    "examples in two blocks": (30, 1, 17, 20, 40),
    "one position, many examples": (500, 1, 1, 15, 33),
    "pieces of a long example": (2, 1, 801, 29, 47),
    "as long as a block": (2, 2, 384, 14, 32),
    "two parts of rows": (2, 2, 5, 801, 31),
    "more panels than groups": (2, 1, 3, 5, 2117),
    "whole tiles": (3, 1, 64, 28, 64),
}


def factors(B, E, T, I, O, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(B, E, T, n, generator=generator, dtype=torch.float64).to(dtype) for n in (I, O))
    return x, g


def products(x, g, **options):
    found = native.products(x, g, **options)
    if found is None:
        pytest.skip(f"no kernel for {x.dtype} on this machine")
    return found


def check(x, g, grad, sq_norms):
    """Within the worst case of sums in the accumulate dtype, and of one rounding of the gradient."""
    truth, sq_truth = reference.mm_sq_norm_ref(x.double(), g.double())
    u = torch.finfo(sq_norms.dtype).eps / 2
    B, _, T, _ = x.shape
    absolute = torch.einsum("beti,beto->eio", x.double().abs(), g.double().abs())
    rounding = torch.finfo(x.dtype).eps / 2 * (truth.abs() + absolute * (B + T + 2) * u)
    smallest = torch.finfo(x.dtype).tiny
    assert (grad.double() - truth).abs().sub((B + T + 2) * u * absolute + rounding + smallest).max() <= 0
    each = torch.einsum("beti,beto->beio", x.double(), g.double())
    error = (T + 2) * u * torch.einsum("beti,beto->beio", x.double().abs(), g.double().abs())
    worst = (2 * each.abs() * error + error.square()).sum((1, 2, 3)) + 100 * u * sq_truth
    assert (sq_norms.double() - sq_truth).abs().sub(worst + 1e-30).max() <= 0


@pytest.mark.parametrize("dtype", (*DTYPES, torch.int64), ids=str)
def test_the_planner_expects_what_there_is(dtype):
    assert native.expected(dtype) == (native.function("mm_norm.cpp", "mm_sq_norm", dtype) is not None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype):
    x, g = factors(*shape, dtype)
    grad, sq_norms = products(x, g)
    assert grad.dtype == dtype
    check(x, g, grad, sq_norms)
    torch.testing.assert_close(products(x, g, summed=False)[1], sq_norms, rtol=0, atol=0)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (9, 3, 12, 40, 70)]),
    order=st.permutations(range(4)),
    steps=st.tuples(*[st.integers(1, 3)] * 4),
    dtype=st.sampled_from(DTYPES),
)
def test_strides(sizes, order, steps, dtype):
    def strided(value):
        room = torch.full([n * s for n, s in zip(value.shape, steps, strict=True)], float("nan"), dtype=dtype)
        room = room.permute(order).contiguous().permute([order.index(d) for d in range(4)])
        return room[tuple(slice(None, None, s) for s in steps)].copy_(value)

    x, g = factors(*sizes, dtype)
    x, g = strided(x), strided(g)
    check(x, g, *products(x, g))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (9, 6, 12, 70, 40)]),  # B, T, S, V, D
    long=st.sampled_from((1, 300, 1000)),  # beyond one byte of an id, one part of rows, one piece of positions
    flipped=st.booleans(),
    skipped=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_rows_of_a_tied_table(sizes, long, flipped, skipped, dtype):
    B, T, S, V, D = sizes
    T, V = (T, V * long) if flipped else (min(T * long, 1000), V)
    h, x = factors(B, 1, T, min(V, 2000), D, dtype)
    ids = torch.randint(h.shape[3], (S, B), generator=torch.Generator().manual_seed(1)).T
    rows = (
        factors(B, 1, D, S, 1, dtype, seed=2)[0][:, 0].mT if flipped else factors(B, 1, S, D, 1, dtype, seed=2)[0][:, 0]
    )
    if skipped:
        ids, rows = ids.clone(), rows.clone()
        ids[-1, 0], rows[-1, 0] = ops.SKIPPED, float("nan")
    # as if each row were one more position, with a one where its id is
    ones = torch.zeros(B, S, h.shape[3], dtype=dtype).scatter_(2, ids.clamp(min=0).unsqueeze(2), 1)
    clean = rows.masked_fill((ids == ops.SKIPPED).unsqueeze(2), 0)
    longer = torch.cat([h[:, 0], ones], 1).unsqueeze(1), torch.cat([x[:, 0], clean], 1).unsqueeze(1)
    check(*longer, *products(h, x, added=(ids, rows)))


def test_an_id_beyond_the_table_is_refused():
    h, x = factors(2, 1, 3, 7, 5)
    for wrong in (7, -1):
        with pytest.raises(IndexError, match="1 of the ids are no row of a table of 7"):
            products(h, x, added=(torch.tensor([[0, 6], [wrong, 1]]), torch.ones(2, 2, 5)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_that_do_not_change_with_the_example(dtype):
    x, g = factors(4, 2, 5, 9, 11, dtype)
    x = x[:1].expand(4, -1, -1, -1)
    check(x, g, *products(x, g))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_number_of_threads_changes_no_bit(shape):
    x, g = factors(*shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(products(x, g))
    finally:
        torch.set_num_threads(before)
    for grad, sq_norms in results[1:]:
        assert torch.equal(grad, results[0][0]) and torch.equal(sq_norms, results[0][1])


@pytest.mark.parametrize("shape", [(64, 1, 16, 96, 96), (4, 1, 1500, 64, 64)], ids=str)
def test_errors_are_those_of_torch(shape):
    # Both round each product and each sum; ours adds up in blocks. Typical errors differ by chance: a factor of two.
    x, g = factors(*shape)
    truth, sq_truth = reference.mm_sq_norm_ref(x.double(), g.double())
    grad, sq_norms = products(x, g)
    plain = torch.mm(x.flatten(0, 2).T, g.flatten(0, 2))
    ours, theirs = ((v.double() - truth[0]).square().mean().sqrt() for v in (grad[0], plain))
    assert ours <= 2 * theirs
    assert ((sq_norms.double() - sq_truth) / sq_truth).abs().max() < 5e-7


def test_sixteen_bits_are_rounded_once():
    x, g = factors(50, 1, 20, 30, 30, torch.bfloat16)
    exact = reference.mm_sq_norm_ref(x.double(), g.double())[0]
    grad, _ = products(x, g)
    ours, nearest = (grad.double() - exact).abs(), (exact.to(torch.bfloat16).double() - exact).abs()
    assert ours.square().mean() <= 1.01 * nearest.square().mean()


@pytest.mark.parametrize("value", (float("inf"), float("nan")))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_with_its_example(value, dtype):
    x, g = factors(5, 1, 3, 20, 37, dtype)
    x[2, 0, 1, 17] = value
    grad, sq_norms = products(x, g)
    assert sq_norms.isfinite().tolist() == [True, True, False, True, True]
    assert value != float("inf") or sq_norms[2] == value
    assert not grad[0, 17].isfinite().any() and grad[0, :17].isfinite().all() and grad[0, 18:].isfinite().all()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    B=st.sampled_from((1, 3, 20)),
    groups=st.sampled_from((1, 5, 37, 70)),
    channels=st.sampled_from((1, 1, 2, 3, 9)),
    outputs=st.sampled_from((1, 1, 2)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 33)),
    kernel=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 12), st.integers(0, 5)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    transposed=st.booleans(),
    last=st.booleans(),
)
def test_convolutions_in_groups(
    B, groups, channels, outputs, size, kernel, stride, padding, dilation, transposed, last
):
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(groups * outputs, channels, *kernel)
    arguments = stride, padding, dilation, False, (0, 0), groups
    x = torch.randn(B, groups * channels, *size, generator=generator)
    g = torch.ops.aten.convolution(x, weight.zero_(), None, *arguments)
    g = torch.randn(g.shape, generator=generator)
    if last:
        x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
    if transposed:  # what is left over behind the last patch is the padding of the output
        x, g, arguments = g, x, (stride, padding, dilation, True, _rest(x, g, weight, arguments), groups)
    grad, sq_norms = convolution_sq_norm(g, x, weight, *arguments)
    wide = (g.double().unsqueeze(1), x.double().unsqueeze(1), weight.double())
    truth, sq_truth = reference.convolution_sq_norm_ref(*wide, *arguments)
    worst, sq_worst = reference.convolution_sq_norm_ref(*(t.abs() for t in wide), *arguments)
    terms = (B + g[0, 0].numel() + x[0, 0].numel() + 8) * torch.finfo(torch.float32).eps
    assert ((grad - truth).abs() <= terms * worst + 1e-30).all()
    assert ((sq_norms - sq_truth).abs() <= (terms + weight.numel() * 1e-7) * sq_worst + 1e-30).all()


def _rest(x, g, weight, arguments):
    reached = zip(x.shape[2:], g.shape[2:], weight.shape[2:], *arguments[:3], strict=True)
    return [n - ((p - 1) * s - 2 * pad + d * (k - 1) + 1) for n, p, k, s, pad, d in reached]


def test_there_is_one_openmp_runtime():
    products(*factors(2, 1, 2, 3, 3))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    lines = maps.read_text(encoding="utf-8").splitlines()
    names = {Path(line.split()[-1]).resolve() for line in lines if "omp" in Path(line.split()[-1]).name}
    assert len({name for name in names if name.name.startswith(("libgomp", "libomp", "libiomp"))}) == 1


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("T", (1, 3, 4, 5, 8, 11, 16))
def test_grams_of_few_positions(T, dtype):
    x, g = factors(7, 2, T, 37, 16, dtype)
    x, g = x[::2], g.transpose(1, 2).contiguous().transpose(1, 2)[::2]
    found = ghost_norm._of_few_positions(x, g)
    truth = reference.mm_sq_norm_ref(x.double(), g.double())[1]
    torch.testing.assert_close(found.double(), truth, rtol=60 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(torch.ops.gnsfx.ghost_sq_norm(x, g), found)
    signs = torch.tensor([1.0, -1.0], dtype=dtype).repeat(8)[: T - T % 2].view(-1, 1)  # the positions cancel
    opposite = [t[:, :, :1].expand(-1, -1, T - T % 2, -1).contiguous() for t in (x, g)]
    assert T == 1 or (ghost_norm._of_few_positions(opposite[0], opposite[1] * signs) >= 0).all()
    x[1, 0, T - 1, 3] = float("nan")
    assert ghost_norm._of_few_positions(x, g).isnan().tolist() == [False, True, False, False]


def test_other_grams_are_left_to_torch():
    x, g = factors(3, 1, 17, 5, 6)
    assert ghost_norm._of_few_positions(x, g) is None
    x, g = x[:, :, :4], g[:, :, :4]
    for left, right in (
        (x.mT.contiguous().mT, g),
        (x, g[..., ::2]),
        (x[:0], g[:0]),
        (x.half(), g.half()),
        (x, g.double()),
    ):
        assert ghost_norm._of_few_positions(left, right) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ops_give_what_the_kernel_gives(dtype):
    """They come to it without Python; what it cannot take goes to the torch code."""
    x, g = factors(5, 2, 6, 9, 11, dtype)
    x, g = x[::2, :, 1:, ::3].requires_grad_(), g.transpose(2, 3).contiguous().transpose(2, 3)[::2, :, 1:]
    grad, sq_norms = products(x, g)
    for _ in range(2):  # the first call waits for the build
        both = torch.ops.gnsfx.mm_sq_norm(x, g)
        assert both[0].dtype == dtype and both[0].device == grad.device and both[0].is_contiguous()
        assert torch.equal(both[0], grad) and torch.equal(both[1], sq_norms)
        assert torch.equal(torch.ops.gnsfx.product_sq_norm(x, g), sq_norms)
    empty = torch.ops.gnsfx.mm_sq_norm(x[:0], g[:0])
    assert empty[0].shape == grad.shape and not empty[0].any() and empty[1].shape == (0,)


def test_a_call_needs_no_python(monkeypatch):
    x, g = factors(2, 1, 3, 4, 5)
    products(x, g)
    if native._dispatch is None or native._dispatch.wait() is None:
        pytest.skip("no C interface in this PyTorch")
    monkeypatch.setattr(native, "products", lambda *_, **__: pytest.fail("called"))
    torch.ops.gnsfx.mm_sq_norm(x, g)
    torch.ops.gnsfx.product_sq_norm(x, g)


# ------------------------------------------------------------------------------------------------ building and loading


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """As in a new process with an empty cache folder, which is returned."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GNSFX_CACHE_DIR", str(folder))
    monkeypatch.setattr(native, "_libraries", {})
    monkeypatch.setattr(native, "_functions", {})
    return folder


@pytest.fixture
def answer(tmp_path):
    """Builds, or finds, a library that answers with the macro's value."""
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return ANSWER; }\n')
    return lambda number: build.load(str(source), f"ANSWER={number}").answer()


def test_a_library_is_built_once(fresh, answer, monkeypatch):
    assert answer(1) == 1 and answer(2) == 2
    assert len(list(fresh.iterdir())) == 2
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    assert answer(1) == 1


def test_a_damaged_library_is_built_again(fresh, answer):
    answer(3)
    (path,) = fresh.iterdir()
    whole = path.read_bytes()
    path.unlink()  # it is mapped into this process
    path.write_bytes(whole[: len(whole) // 2])
    assert answer(3) == 3
    assert len(path.read_bytes()) == len(whole) and list(fresh.iterdir()) == [path]


def test_the_name_follows_the_processor(fresh, answer, monkeypatch):
    for processor in ("one", "another"):
        monkeypatch.setattr(build, "processor", lambda p=processor: p)
        answer(4)
    assert len(list(fresh.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_replaced(fresh, answer):
    fresh.write_text("a file")
    assert answer(5) == 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_compiler_torch_computes(fresh, monkeypatch, dtype):
    def none():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(build, "compiler_and_openmp", none)
    x, g = factors(4, 2, 9, 10, 11, dtype)
    assert native.products(x, g) is None
    grad, sq_norms = mm_sq_norm(x, g)
    truth, sq_truth = reference.mm_sq_norm_ref(x.double(), g.double())
    tolerance = 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(grad.double(), truth, rtol=tolerance, atol=tolerance * 4)
    torch.testing.assert_close(sq_norms.double(), sq_truth, rtol=tolerance, atol=0)
    torch.testing.assert_close(product_sq_norm(x, g), sq_norms)


def test_a_compiler_that_fails_is_told_once(fresh, monkeypatch):
    monkeypatch.setattr(build, "_FLAGS", ("--no-such-flag",))
    x, g = factors(2, 1, 2, 3, 3)
    with pytest.warns(GnsWarning, match=r"C\+\+ kernels cannot be used.*no-such-flag"):
        assert native.products(x, g) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mm_sq_norm(x, g)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_during_the_build_builds_for_itself(tmp_path):
    script = """
import os, torch
from gnsfx.kernels import native
torch.set_num_threads(1)
native.start(torch.float32)
child = os.fork()
grad, _ = native.products(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3))
assert (grad == 2).all()
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = {**os.environ, "GNSFX_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, env=environment, timeout=120)
    assert len(list(tmp_path.glob("mm_norm-*"))) == 1


@pytest.mark.parametrize("shape", [(0, 1, 2, 3, 4), (2, 0, 2, 3, 4), (2, 1, 0, 3, 4), (2, 1, 2, 0, 4), (2, 1, 2, 3, 0)])
def test_nothing_to_multiply(shape):
    B, E, _, I, O = shape
    grad, sq_norms = mm_sq_norm(*factors(*shape))
    assert grad.shape == (E, I, O) and sq_norms.shape == (B,) and not grad.any() and not sq_norms.any()
