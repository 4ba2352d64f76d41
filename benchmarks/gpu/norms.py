"""Section 4: the backward of norm layers, bytes that must move / seconds, next to a copy and to Inductor's own backward.

Bytes: x, g and dx once, the statistics and the scale's gradient; what a kernel moves beyond that is its own affair.
Inductor's backward is that of PyTorch's operation, compiled alone, and has no norms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.gpu import calls
from benchmarks.gpu.bench import Bench, Cases, Row
from benchmarks.gpu.correctness import norm_arguments
from benchmarks.gpu.timing import copies, copy_rate, seconds

WIDTHS = [(8, 1024, 768), (16, 1024, 1024), (16, 1024, 2048), (8, 2048, 4096), (4, 2048, 8192), (2, 2048, 16384)]
CUTS = [(64, 128, 1024), (512, 64, 1024), (100, 200, 1024), (1, 8192, 4096)]  # other ways to cut the rows
TINY = [(3, 16, 64)]

COLUMNS: tuple[common.Column, ...] = (
    ("norm", lambda row: row["case"]),
    ("us", lambda row: f"{1e6 * row['seconds']:.1f}" if "seconds" in row else ""),
    ("of a copy", lambda row: f"{row['of_copy']:.0%}" if "of_copy" in row else ""),
    ("Inductor, without norms", lambda row: f"{row['inductor_of_copy']:.0%}" if "inductor_of_copy" in row else ""),
    ("ratio", lambda row: f"{row['ratio']:.2f}" if "ratio" in row else ""),
)


def cases(bench: Bench) -> Cases:
    copied: list[float] = []
    for shape in TINY if bench.quick else [*WIDTHS, *CUTS]:
        for kind in ("layer", "rms"):
            yield f"{kind} {shape}", partial(rate, bench, shape, kind == "rms", copied)


def rate(bench: Bench, shape: tuple[int, int, int], rms: bool, copied: list[float]) -> Row:
    if not copied:
        copied.append(copy_rate(bench))
    B, T, D = shape
    moved = 6 * B * T * D + (4 if rms else 8) * B * T + (6 if rms else 12) * D
    sets = copies(bench, lambda: arguments(bench, shape, rms), moved)
    with calls.kernels_only():
        ours = seconds(bench, partial(calls.norm_backward_parts, shift=not rms), sets)
    row: dict[str, Any] = {
        "norm": "rms" if rms else "layer", "B": B, "T": T, "D": D, "dtype": "bfloat16",
        "bytes": moved, "copy": copied[0], "seconds": ours, "of_copy": moved / ours / copied[0],
    }  # fmt: skip
    plain = seconds(bench, inductor(D, rms, "aot_eager_decomp_partition" if bench.quick else "inductor"), sets)
    return row | {"inductor": plain, "inductor_of_copy": moved / plain / copied[0], "ratio": ours / plain}


def arguments(bench: Bench, shape: tuple[int, int, int], rms: bool) -> tuple[Any, ...]:
    g, x, mean, rstd, weight = norm_arguments(bench, shape, torch.bfloat16, rms)
    return g, x, mean, rstd, weight.to(torch.bfloat16)


def inductor(D: int, rms: bool, backend: str) -> Callable[..., Any]:
    """(g, x, mean, rstd, weight) -> gradients, as Inductor compiles PyTorch's backward."""

    def layer_backward(g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor) -> Any:
        if rms:
            return torch.ops.aten._fused_rms_norm_backward(g, x, [D], rstd.unsqueeze(2), weight, [True, True])
        stats = mean.unsqueeze(2), rstd.unsqueeze(2)  # type: ignore[union-attr]
        return torch.ops.aten.native_layer_norm_backward(g, x, [D], *stats, weight, weight, [True, True, True])

    torch.compiler.reset()
    return torch.no_grad()(torch.compile(layer_backward, backend=backend, dynamic=False))
