"""The compile gate: everything that the host functions can launch as a Hopper cubin, and planted bad kernels that must fail.

    PYTHONPATH=.venv/triton-3.7.1 python -m tests.triton.gate          # needs Triton, no GPU; about a minute on two cores

What it cannot see is wrong results (the interpreter's tests do), races and time.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
import triton
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from gnsfx.kernels.triton import embedding_norm, mm_norm, norm_backward, plan
from tests.triton import sass
from tests.triton.cubin import Cubin, compiled, launches

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
H100 = 132  # multiprocessors
WIDTHS = (32, 64, 96, 256, 512, 768, 1024, 1536, 2048), (2560, 4096, 5120, 8192, 16384)  # a process for each half
REGIMES = {plan.CHUNK: (8, 1024), plan.WHOLE: (1024, 16), plan.FLAT: (100, 1024)}
"""B and T that lead to each regime where a width has it."""
ROW_SPILLS = {(256, 1): 16, (512, 1): 16, (1024, 1): 16, (1024, 2): 8, (1024, 3): 24, (16384, 1): 304}
"""Bytes that a thread may spill that goes over rows of this BLOCK_D, with so many output gradients. The 1,024 threads of the widest
rows have 64 registers each; a few numbers are moved out of the way of a loop over rows in regime flat, most of them by Triton 3.6."""


def empty(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def call_norms(
    B: int, T: int, D: int, rms: bool, dtype: torch.dtype, weight: torch.dtype, multiprocessors: int, adds: bool = True,
    gradients: int = 1,
) -> None:  # fmt: skip
    """``adds``: to the gradient that reaches the input by other ways. ``gradients`` of the output, in 16 bits where they are several."""
    x, statistics, w = empty(B, T, D, dtype=dtype), empty(B, T, dtype=f32), empty(D, dtype=weight)
    mean, residual = None if rms else statistics, x if adds else None
    g, *more = [x if gradients == 1 else empty(B, T, D, dtype=f16 if dtype == f16 else bf16)] * gradients
    norm_backward.norm_backward(g, x, mean, statistics, w, not rms, multiprocessors, False, residual, *more)


def call_products(B: int, T: int, I: int, O: int, dtype: torch.dtype, multiprocessors: int) -> None:
    x, g = empty(B, T, I, dtype=dtype), empty(B, T, O, dtype=dtype)
    for tile in plan.TILES:
        if tile == plan.REDUCE:
            mm_norm.product_norms_reduced(x, g, multiprocessors)
        else:
            mm_norm.product_norms(x, g, multiprocessors, tile)
    for tile in plan.GRAMS:
        for count in range(1, mm_norm.MOST_FACTORS + 1):
            mm_norm.gram_norms(x, [g] * count, tile)


def call_lookups(B: int, T: int, D: int, dtype: torch.dtype) -> None:
    for ids in (torch.int64, torch.int32):
        embedding_norm.embedding_norms(empty(B, T, dtype=ids), empty(B, T, D, dtype=dtype))


def shipped(half: int) -> None:
    """Calls of everything, in two halves. What fp16 and bf16 have in common, all but the conversion of a number, is called once."""
    for D in WIDTHS[half]:
        for B, T in REGIMES.values():
            for rms in (False, True):
                call_norms(B, T, D, rms, bf16, f32, H100)
                call_norms(B, T, D, rms, f32, f32, H100)
                if D == 1024:
                    call_norms(B, T, D, rms, f16, f16, H100)
                    call_norms(B, T, D, rms, bf16, bf16, H100)
                    call_norms(B, T, D, rms, bf16, f32, H100, adds=False)
                    call_norms(B, T, D, rms, bf16, f32, H100, gradients=2)
                for dtype in (bf16, f32) if D in (1024, 4096, 8192) else ():
                    if plan.row_gradients(D, rms, dtype.itemsize, 2) == 3:
                        call_norms(B, T, D, rms, dtype, f32, H100, gradients=3)
    if half:
        return
    for dtype in (bf16, f16):
        call_products(8, 1024, 768, 3072, dtype, H100)
    call_products(64, 256, 256, 256, bf16, H100)  # in runs of examples, whose sums are in fp32
    for dtype in (bf16, f32):
        call_lookups(8, 1024, 768, dtype)


def compiled_half(half: int) -> list[Cubin]:
    return compiled(partial(shipped, half))


def rows(cubin: Cubin) -> list[str]:
    """The widest rows have no registers left: they alone may spill in their loop and, in fp32, read without a third stage."""
    widest = cubin.settings["BLOCK_D"] == plan.LARGEST_ROW
    spills = sum(sass.count(body, sass.SPILL) for body in sass.loops(cubin.code, sass.ASYNC_LOAD))
    pairs = cubin.settings["num_warps"] <= 8 and cubin.settings["REGIME"] != plan.WHOLE
    return [
        *fit(cubin, 2 if pairs else 1),
        *reads_wide(cubin, 1 + cubin.settings["GRADIENTS"]),
        *([] if widest and cubin.dtypes[0] == f32 else reads_ahead(cubin)),
        *([f"{spills} spills in the loop over rows"] if spills and not widest else []),
    ]


def multiplies(cubin: Cubin) -> list[str]:
    """By tensor cores, from tiles that the copy engine brings while others are multiplied."""
    wide = cubin.settings["BLOCK_T"] >= 64 or "BLOCK_I" in cubin.settings
    ahead = sass.copies_ahead(cubin.code, sass.TENSOR_CORE if wide else sass.SMALL_TENSOR_CORE)
    expected = 2 * (cubin.settings["num_stages"] - 1)
    tile = tuple(cubin.settings.get(name) for name in ("BLOCK_T", "BLOCK_I", "BLOCK_O"))
    found = fit(cubin, next((t.resident for t in plan.TILES if (t.t, t.i, t.o) == tile), 1))
    found += (
        [] if len(ahead) == 1 + cubin.settings.get("COUNT", 0) else [f"{len(ahead)} loops multiply by tensor cores"]
    )
    for before, each in ahead:
        if before < expected or each < 2:
            found.append(
                f"{before} tiles on their way before a loop and {each} more each round, {expected} and 2 expected"
            )
    if wide and not sass.count(cubin.code, sass.MULTIPLY_IN_FLIGHT):
        found.append("every multiply is waited for before the next one starts")
    return found


def reduces(cubin: Cubin) -> list[str]:
    found = sass.count(cubin.code, sass.REDUCE_OUT)
    return multiplies(cubin) + ([] if found >= 2 else [f"{found} additions by the copy engine, 2 expected"])


def fit(cubin: Cubin, least: int) -> list[str]:
    """As many programs at a time as the plan counts on, so that some compute while others wait."""
    return [] if cubin.resident >= least else [f"{cubin.resident} programs fit a multiprocessor, {least} expected"]


def reads_wide(cubin: Cubin, least: int) -> list[str]:
    found = sass.count(cubin.code, sass.WIDE_LOAD)
    return [] if found >= least else [f"{found} loads of 16 bytes, {least} expected"]


def reads_ahead(cubin: Cubin) -> list[str]:
    left = sass.waits(cubin.code)
    if not left:
        return ["no loop loads asynchronously"]
    return [] if min(left) > 0 else ["the loop waits for all its loads: none is in flight while it computes"]


RULES: dict[str, Callable[[Cubin], list[str]]] = {
    "backward_rows": rows,
    "add_slots": lambda cubin: reads_wide(cubin, 2),
    "mm_sq_norm": multiplies,
    "mm_sq_norm_reduce": reduces,
    "gram_sq_norm": multiplies,
    "embedding_sq_norm": lambda cubin: [*reads_wide(cubin, 1), *reads_ahead(cubin)],
}


def faults(cubin: Cubin) -> list[str]:
    rule = RULES.get(cubin.kernel)
    if rule is None:
        return [f"there is no rule for {cubin.kernel}"]
    rows = cubin.settings.get("BLOCK_D", 0), cubin.settings.get("GRADIENTS", 0)
    return cubin.faults(ROW_SPILLS.get(rows, 0)) + rule(cubin)


def configuration(kernel: str, given: dict[str, Any]) -> tuple[Any, ...]:
    """What the gate covers: how a kernel cuts its work. With a shift, a weight, something to add to it and several gradients it
    takes more than without them; the number of programs is a constant of the compiler for one kernel."""
    own = ("HAS_W", "HAS_R", "HAS_BETA", "GRADIENTS", "PROGRAMS")
    return kernel, *sorted((k, v) for k, v in given.items() if k not in own)


def missing(covered: set[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """What host functions launch for shapes of all kinds that is not in ``covered``."""
    launched: set[tuple[Any, ...]] = set()

    @seed(0)
    @settings(max_examples=300, database=None, deadline=None)
    @given(*_sizes(2000, 4096, plan.LARGEST_ROW, 16384), st.sampled_from((H100, 114, 108, 78, 16)), st.booleans())
    def sweep(B: int, T: int, D: int, O: int, multiprocessors: int, rms: bool) -> None:
        call_norms(B, T, D, rms, bf16, f32, multiprocessors)
        call_products(B, T, max(8, D // 8 * 8), max(8, O // 8 * 8), bf16, multiprocessors)
        call_lookups(B, T, D, bf16)

    with launches(lambda kernel, args, given: launched.add(configuration(kernel.__name__, given))):
        sweep()
    return launched - covered


def _sizes(*most: int) -> list[st.SearchStrategy[int]]:
    """Sizes of all magnitudes."""
    return [st.floats(0, 1).map(lambda share, n=n: max(1, round(n**share))) for n in most]


def main() -> None:
    from tests.triton.planted import PLANTED

    print(f"Triton {triton.__version__}, sm_90")
    with ProcessPoolExecutor(len(WIDTHS), multiprocessing.get_context("spawn")) as pool:
        kernels = [cubin for half in pool.map(compiled_half, range(len(WIDTHS))) for cubin in half]
    bad = 0
    for cubin in kernels:
        found = faults(cubin)
        bad += bool(found)
        print(f"{cubin}{'  FAULT: ' * bool(found)}{'; '.join(found)}")
    for lost in missing({configuration(cubin.kernel, cubin.settings) for cubin in kernels}):
        bad += 1
        print("FAULT: not compiled here, but launched for some shapes:", *lost)
    for planted in PLANTED:
        found = [fault for cubin in compiled(planted.call) for fault in (planted.rule or faults)(cubin)]
        seen = any(planted.fault in fault for fault in found)
        bad += not seen
        print(f"planted: {planted.name:60} {'; '.join(found) if seen else f'FAULT: it is not found, but {found}'}")
    print(f"{len(kernels)} kernels, {len(PLANTED)} planted bad ones, {bad} faults")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
