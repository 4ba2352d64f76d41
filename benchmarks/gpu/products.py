"""Section 5: a weight gradient with its norms, every way as a multiple of cuBLAS's time for the gradient alone.

    x [B, T, I], g [B, T, O], bf16, B T = 16,384    "fused N", "ghost N": the ops with entry N of plan.TILES, plan.GRAMS
    *           what the planner would take; regret: its time over that of the quickest

Each way includes the gradient. Shared Grams are not in here: "ghost" makes that of x for one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu import calls
from benchmarks.gpu.bench import Bench, Cases, Row
from benchmarks.gpu.timing import copies, seconds
from gnsfx.calibrate import fit_table
from gnsfx.calibrate_cuda import ways
from gnsfx.kernels import cost, cost_cuda, gpu
from gnsfx.kernels.machine import CUDA_KERNELS, machine_for

WIDTHS = [(768, 768), (768, 3072), (4096, 4096)]
POSITIONS = (1024, 256, 4096, 64, 512, 2048, 128, 8192)  # what is left out for want of time is not one end
TOKENS = 16384
LARGEST = 4 << 30  # bytes of products
LONGEST = 4096  # positions, beyond which Grams cost too much to be worth the wait
WAYS = ("fused", "ghost", "materialise")


def cases(bench: Bench) -> Cases:
    shapes = [(I, O, T) for T in POSITIONS for I, O in WIDTHS]
    for I, O, T in [(16, 24, 8)] if bench.quick else shapes:
        B = 4 if bench.quick else max(1, TOKENS // T)
        yield f"{I} x {O}, T = {T}", partial(rates, bench, (B, T, I, O))


def rates(bench: Bench, shape: tuple[int, int, int, int]) -> Row:
    B, T, I, O = shape
    sets = copies(bench, lambda: (bench.random(B, T, I), bench.random(B, T, O)), 2 * (B * T * (I + O) + I * O))
    runs: dict[str, Callable[..., Any]] = {"plain": calls.plain, **calls.product_ways()}
    if 4 * B * I * O <= LARGEST:
        runs["materialise"] = calls.materialise
    times: dict[str, float] = {}
    fell_out: dict[str, str] = {}
    for name, way in runs.items():
        if T > LONGEST and name.startswith("ghost"):
            continue
        try:
            with calls.kernels_only():
                times[name] = seconds(bench, way, sets, 0.08)
        except Exception as error:  # of one way: the others are worth their row
            fell_out[name] = f"{type(error).__name__}: {error}"[:300]
    taken, modelled = planned(bench, shape)
    best = min((name for name in times if name != "plain"), key=lambda name: times[name])
    row: dict[str, Any] = {"B": B, "T": T, "I": I, "O": O, "dtype": "bfloat16", "times": times, "modelled": modelled}
    row |= {"taken": taken, "best": best, "tflops": 2 * B * T * I * O / times["plain"] / 1e12}
    if taken in times:
        row["regret"] = times[taken] / times[best]
    return row | ({"failed": str(fell_out), "right": False} if fell_out else {})


def planned(bench: Bench, shape: tuple[int, int, int, int]) -> tuple[str, dict[str, float]]:
    """The way that the planner takes on such a device, and the seconds it expects of all of them."""
    B, T, I, O = shape
    machine, count = machine_for("cuda"), gpu.multiprocessors(bench.device)
    tiles = cost_cuda.matmul_tiles(B, T, I, O, count, machine, float("inf"))
    path = cost.cheapest(cost_cuda.matmul_paths(B, T, I, O, tiles, count), machine, torch.bfloat16)
    modelled = {name: cost.seconds(each, machine, torch.bfloat16) for name, each in ways(shape, count).items()}
    return f"{path} {tiles[path]}" if path in tiles else path, modelled


def constants(rows: Sequence[Row], multiprocessors: int) -> dict[str, dict[str, float]]:
    """The planner's constants: as shipped, and as the rows above have them."""
    shipped = machine_for("cuda")
    found = fit_table(rows, multiprocessors, shipped)
    names = ("flops_bf16", "bandwidth", *CUDA_KERNELS)
    return {name: {"shipped": getattr(shipped, name), "here": getattr(found, name)} for name in names}


def _cell(way: str) -> common.Column:
    def text(row: common.Row) -> str:
        found = {n: t for n, t in row.get("times", {}).items() if n.partition(" ")[0] == way}
        if not found:
            return ""
        marks = {name: "*" * (name == row["taken"]) for name in found}
        return " ".join(f"{marks[name]}{found[name] / row['times']['plain']:.2f}" for name in sorted(found))

    return way, text


COLUMNS: tuple[common.Column, ...] = (
    ("I x O, T", lambda row: row["case"]),
    ("plain TFLOP/s", lambda row: f"{row['tflops']:.0f}" if "tflops" in row else ""),
    *map(_cell, WAYS),
    ("regret", lambda row: f"{row['regret']:.2f}" if "regret" in row else ""),
)
