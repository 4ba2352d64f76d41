"""What :mod:`gnsfx.calibrate` times on a CUDA device, and the constants that a table of such times gives.

    x [B, T, I], g [B, T, O], B T = 16,384      "fused N", "ghost N"   our kernels with entry N of plan.TILES, plan.GRAMS
                                                "materialise"          products in fp32 in memory, by the library

Events on the device's own queue are read, so that what the host takes to start a kernel does not count; the cache is
written over before each call. Nothing is in fp64, which most of these devices have next to no units for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import gnsfx.kernels.ops  # noqa: F401  (defines the ops)
from gnsfx.kernels import gpu
from gnsfx.kernels.cost import Cost, matmul_paths, plain_matmul
from gnsfx.kernels.cost_cuda import ALL_GRAMS, ALL_TILES, CHOSEN, ghost, materialise, product

Shape = tuple[int, int, int, int]
Run = Callable[[], object]

SHAPES: Mapping[torch.dtype, tuple[Shape, ...]] = {
    torch.bfloat16: (
        (256, 64, 768, 768), (256, 64, 4096, 4096), (128, 128, 768, 3072), (64, 256, 2048, 2048), (32, 512, 768, 3072),
        (16, 1024, 768, 768), (16, 1024, 4096, 4096), (8, 2048, 768, 3072), (4, 4096, 4096, 4096), (4, 4096, 768, 768),
    ),
    torch.float32: ((256, 64, 768, 768), (64, 256, 768, 3072), (16, 1024, 768, 768), (4, 4096, 2048, 2048)),
}  # fmt: skip
"""B, T, I, O: the widths of a small and of a large model, results of a few tiles and of many."""
COLD = 256 << 20
"""Bytes, more than the cache of any device holds; to write them takes longer than the host needs to start a call."""
LONGEST_GRAM = 2048
"""Positions; beyond, Grams take long and are never chosen."""
LARGEST_STACK = 2 << 30
"""Bytes of all products; beyond, they may not fit beside what else is on the device."""


def costs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Cost]:
    """Of all that :func:`runs` may have."""
    B, T, I, O = shape
    if not _ours(dtype, device):
        return matmul_paths(B, 1, T, I, O, dtype.itemsize, "cuda")
    return ways(shape, gpu.multiprocessors(device))


def ways(shape: Shape, multiprocessors: int) -> dict[str, Cost]:
    """Of each way to a gradient of 16 bits and its norms, and of the gradient alone under "plain"."""
    B, T, I, O = shape
    found = {"plain": plain_matmul(B, 1, T, I, O, 2), "materialise": materialise(B, T, I, O)}
    found |= {f"fused {tile}": product(B, T, I, O, tile, multiprocessors) for tile in ALL_TILES}
    return found | {f"ghost {tile}": ghost(B, T, I, O, tile, multiprocessors) for tile in ALL_GRAMS}


def runs(x: Tensor, g: Tensor) -> dict[str, Run]:
    """What runs each of :func:`costs`."""
    flat, rows, ops = x.flatten(0, 1).t(), g.flatten(0, 1), torch.ops.gnsfx

    def plain() -> Tensor:
        return flat @ rows

    def wide() -> tuple[Tensor, Tensor]:
        stack = _in_fp32(x.mT, g)
        return stack.sum(0).to(x.dtype), torch.linalg.vector_norm(stack, dim=(1, 2)).square_()

    if not _ours(x.dtype, x.device):
        x4, g4 = x.unsqueeze(1), g.unsqueeze(1)
        both = {"fused": lambda: ops.mm_sq_norm(x4, g4), "ghost": lambda: (plain(), ops.ghost_sq_norm(x4, g4))}
        return {"plain": plain, "materialise": wide, **both}
    found: dict[str, Run] = {"plain": plain}
    if 4 * x.shape[0] * x.shape[2] * g.shape[2] <= LARGEST_STACK:
        found["materialise"] = wide
    for tile in CHOSEN:
        found[f"fused {tile}"] = lambda tile=tile: _added(ops.mm_norm_parts(x, g, tile))
    if x.shape[1] <= LONGEST_GRAM:
        for tile in ALL_GRAMS:
            found[f"ghost {tile}"] = lambda tile=tile: _added((plain(), ops.gram_norm_parts(x, [g], tile)[0]))
    return found


def events(device: torch.device) -> Callable[[Run], float]:
    """A timer: seconds that the device works on a call."""
    scratch = torch.empty(COLD, dtype=torch.uint8, device=device)

    def timed(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return timed


def of_rows(rows: Iterable[Mapping[str, Any]], multiprocessors: int) -> Iterable[tuple[str, Cost, float]]:
    """Way, cost, seconds of every number in a table: rows with ``B``, ``T``, ``I``, ``O`` and ``times``, seconds by way; others
    are of cases that failed."""
    for row in rows:
        if "times" not in row:
            continue
        known = ways((row["B"], row["T"], row["I"], row["O"]), multiprocessors)
        yield from ((name, known[name], taken) for name, taken in row["times"].items() if name in known)


def _ours(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and "products" in gpu.kernels_on(device)


def _in_fp32(left: Tensor, right: Tensor) -> Tensor:
    if left.is_cuda and left.dtype != torch.float32:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def _added(both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return both[0], both[1].sum(0).clamp_min(0)
