"""The ops of CUDA graphs where their torch twins run, and who may run the kernels: everything but the kernels themselves."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gnsfx.errors import GnsWarning
from gnsfx.kernels import embedding_norm, gpu, gpu_ops, ops, reference
from gnsfx.kernels.embedding_norm import SKIPPED
from gnsfx.kernels.triton import plan

gns = torch.ops.gnsfx
CPU = torch.device("cpu")
TILES, GRAMS = range(len(plan.TILES)), range(len(plan.GRAMS))
sizes = st.sampled_from((1, 2, 3, 5, 8, 17))
widths = st.sampled_from((1, 5, 8, 130))
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@settings(max_examples=40)
@given(B=sizes, T=sizes, I=widths, O=widths, tile=st.sampled_from(TILES))
def test_products(B: int, T: int, I: int, O: int, tile: int) -> None:
    x, g = random(B, T, I), random(B, T, O)
    grad, parts = gns.mm_norm_parts(x, g, tile)
    truth, norms = reference.mm_sq_norm_ref(x.unsqueeze(1), g.unsqueeze(1))
    torch.testing.assert_close(grad, truth[0])
    torch.testing.assert_close(parts.sum(0), norms)
    assert parts.shape == (plan.product_parts(I, O, tile), B)


@settings(max_examples=40)
@given(
    B=sizes,
    T=st.sampled_from((1, 3, 40)),
    I=widths,
    O=st.lists(widths, min_size=1, max_size=3),
    tile=st.sampled_from(GRAMS),
)
def test_grams(B: int, T: int, I: int, O: list[int], tile: int) -> None:
    x, g = random(B, T, I), [random(B, T, o) for o in O]
    for each, parts in zip(g, gns.gram_norm_parts(x, g, tile), strict=True):
        truth = reference.ghost_sq_norm_ref(x.unsqueeze(1), each.unsqueeze(1))
        torch.testing.assert_close(parts.sum(0), truth, rtol=1e-8, atol=1e-9)
        assert parts.shape == (plan.gram_parts(T, tile), B)


@settings(max_examples=40)
@given(B=sizes, T=sizes, D=widths, V=st.sampled_from((1, 3, 50)), narrow=st.booleans(), skipping=st.booleans())
def test_lookups(B: int, T: int, D: int, V: int, narrow: bool, skipping: bool) -> None:
    generator = torch.Generator().manual_seed(B + T)
    ids, g = torch.randint(-V, V, (B, T), generator=generator), random(B, T, D)
    skipped = torch.rand(B, T, generator=generator) < 0.3
    truth = reference.embedding_sq_norm_ref(ids, g * ~skipped.unsqueeze(2) if skipping else g)
    if skipping:
        ids[skipped], g[skipped] = SKIPPED, float("nan")
    elif narrow:
        ids = ids.to(torch.int32)
    parts = gns.embedding_norm_parts(ids, g)
    torch.testing.assert_close(parts.sum(0), truth)
    assert parts.shape == (plan.embedding_parts(T, D), B)


def test_ids_in_32_bits_are_none_of_them_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """-2^62 in 32 bits is zero: without the C++ kernel the rows of id 0 would be left out."""
    monkeypatch.setattr(embedding_norm, "_in_one_pass", lambda ids, g: None)
    ids, g, x, h = torch.tensor([[0, 0, 1]]), random(1, 3, 2), random(1, 4, 2), random(1, 4, 5)
    for op in (gns.embedding_sq_norm, gns.embedding_norm_parts):
        torch.testing.assert_close(op(ids.to(torch.int32), g), op(ids, g))
    torch.testing.assert_close(gns.tied_cross(ids.to(torch.int32), g, x, h), gns.tied_cross(ids, g, x, h))


def test_a_tied_table_has_no_row_below_zero() -> None:
    g, x, h = random(1, 3, 2), random(1, 4, 2), random(1, 4, 5)
    with pytest.raises(RuntimeError, match="out of bounds"):
        gns.tied_cross(torch.tensor([[0, -1, 1]]), g, x, h)


@pytest.mark.parametrize("shape", [(0, 5, 8, 8), (3, 0, 8, 8), (3, 5, 0, 8), (3, 5, 8, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_at_all(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, T, I, O = shape
    x, g = random(B, T, I, dtype=dtype), random(B, T, O, dtype=dtype)
    grad, parts = gns.mm_norm_parts(x, g, 0)
    assert grad.shape == (I, O) and not grad.any()
    lookups = gns.embedding_norm_parts(torch.zeros(B, T).long(), g)
    everything = [parts, *gns.gram_norm_parts(x, [g, g], 1), lookups]
    for each in everything:
        assert each.shape[1] == B and each.dtype == torch.float32
        assert not each.any() or (each is lookups and g.numel())
    assert gns.collect(everything).shape == (4, B)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck(tile: int, dtype: torch.dtype) -> None:
    x, g = random(3, 70, 130, dtype=dtype), random(3, 70, 140, dtype=dtype)
    ids = torch.arange(3 * 70).view(3, 70) % 7
    torch.library.opcheck(gns.mm_norm_parts.default, (x, g, tile), test_utils=CHECKS)
    torch.library.opcheck(gns.gram_norm_parts.default, (x, [g, x], tile), test_utils=CHECKS)
    torch.library.opcheck(gns.embedding_norm_parts.default, (ids, g), test_utils=CHECKS)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e5])
def test_rows_that_fp16_cannot_hold_under_autocast(size: float) -> None:
    ids, g = torch.tensor([[0, 0, 1], [2, 3, 1]]), random(2, 3, 8).float() * size
    x, h = random(2, 4, 8, dtype=torch.float16), random(2, 4, 5, dtype=torch.float16)
    truth = gns.tied_cross(ids, g.double(), x.double(), h.double())
    torch.testing.assert_close(gns.tied_cross(ids, g, x, h).double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shift", [True, False])
def test_results_start_where_inductor_takes_them_to(shift: bool) -> None:
    x, g, rstd = random(3, 5, 7).float(), random(3, 5, 9).float(), random(3, 5).float()
    results = (
        gns.norm_backward(x, x, None, rstd, None, shift),
        gns.mm_norm_parts(x, g, 1),
        gns.gram_norm_parts(x, [g] * 3, 2),
    )
    for each in (t for found in results for t in found):
        assert each.storage_offset() * each.element_size() % 16 == 0


@pytest.mark.parametrize("op", ["mm_sq_norm", "product_sq_norm", "ghost_sq_norm"])
@pytest.mark.parametrize("fake", [True, False])
def test_factors_of_other_batches_are_no_sum(op: str, fake: bool) -> None:
    device = "meta" if fake else "cpu"
    x, g = torch.ones(3, 1, 4, 8, device=device), torch.ones(4, 1, 4, 8, device=device)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"first 3 sizes|PyTorch refused"
    ):  # the C++ op says the second
        getattr(gns, op)(x, g)
    with pytest.raises(ValueError, match="first 2 sizes"):
        gns.mm_norm_parts(x[:, 0], g[:, 0], 0)
    with pytest.raises(ValueError, match="first 2 sizes"):
        gns.gram_norm_parts(x[:, 0], [x[:, 0], g[:, 0]], 0)


def test_collect_adds_and_clamps_parts_alone() -> None:
    """What is [B] may be an estimate below zero, or say that it is refused."""
    rows = [
        random(3),
        random(5, 3),
        torch.full((3,), float("-inf")),
        random(2, 3),
        random(5, 3) - 9,
        random(1, 3).float(),
    ]
    found = gns.collect(rows)
    for row, each in zip(found, rows, strict=True):
        torch.testing.assert_close(row, each.double() if each.dim() == 1 else each.double().sum(0).clamp(min=0))
    torch.library.opcheck(gns.collect.default, (rows,), test_utils=CHECKS)


class Count(TorchDispatchMode):
    """Operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **kwargs or {})


def test_collect_takes_two_operations_for_each_number_of_parts() -> None:
    rows = [random(k, 3) for k in (1, 2, 3) * 40] + [random(3)] * 5
    with Count() as count:
        ops.collect(rows)
    assert count.number <= 2 * 3 + 3


def test_twins_never_wait_for_a_device() -> None:
    """A graph that is captured may hold no number that the host reads; on the meta device there is none to read."""
    x, g = (torch.empty(3, 70, 136, dtype=torch.bfloat16, device="meta") for _ in range(2))
    ids = torch.empty(3, 70, dtype=torch.int64, device="meta")
    grad, parts = gpu_ops.mm_norm_parts(x, g, 0)
    assert grad.shape == (136, 136)
    assert parts.shape == gns.mm_norm_parts(x, g, 0)[1].shape
    assert [p.shape for p in gpu_ops.gram_norm_parts(x, [g, x], 0)] == [
        p.shape for p in gns.gram_norm_parts(x, [g, x], 0)
    ]
    assert gpu_ops.embedding_norm_parts(ids, g).shape == gns.embedding_norm_parts(ids, g).shape


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_trusted", {})


@pytest.mark.parametrize("fault", ["lies", "raises"])
def test_a_kernel_that_is_wrong_is_named_once_and_never_used(fault: str) -> None:
    calls = []

    def check() -> bool:
        calls.append(1)
        if fault == "raises":
            raise RuntimeError("no such tile")
        return False

    with pytest.warns(
        GnsWarning, match=r"mm_norm 1 .* is not used on cpu.*" + ("no such tile" if fault == "raises" else "numbers")
    ):
        assert not gpu.trusted(("mm_norm", 1, torch.bfloat16), CPU, check)
    with warnings.catch_warnings(action="error"):
        assert not gpu.trusted(("mm_norm", 1, torch.bfloat16), CPU, check)
        assert gpu.trusted(("mm_norm", 2, torch.bfloat16), CPU, lambda: True)
    assert calls == [1]


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    device, capturing = torch.device("cuda", 0), [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert not gpu.trusted("kernel", device, lambda: pytest.fail("checked"))
    capturing[0] = False
    assert gpu.trusted("kernel", device, lambda: True)
    capturing[0] = True
    assert gpu.trusted("kernel", device, lambda: pytest.fail("checked again"))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(gpu, "_has_triton", lambda: True)
    assert gpu.kernels_on(CPU) == frozenset()
    assert gpu.kernels_on(cuda) == {"norm", "products", "embedding"}  # there is none: as on a Hopper
    assert gpu.multiprocessors(cuda) == 132
    monkeypatch.setattr(gpu, "_capability", lambda device: (8, 0))
    assert gpu.kernels_on(cuda) == {"norm", "embedding"}
    monkeypatch.setattr(gpu, "_capability", lambda device: (7, 5))
    assert gpu.kernels_on(cuda) == frozenset()
    monkeypatch.setattr(gpu, "_has_triton", lambda: False)
    assert gpu.kernels_on(cuda) == frozenset()
