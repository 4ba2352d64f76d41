"""Section 1: the machine, and the ceilings that everything else is measured against."""

from __future__ import annotations

import contextlib
import importlib.metadata
import subprocess
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu.bench import Bench, Cases, Row
from benchmarks.gpu.timing import copies, copy_rate, seconds

PRODUCTS = [
    (768, 768, 16384),
    (768, 3072, 16384),
    (4096, 4096, 16384),
    (8192, 8192, 8192),
]  # rows, columns, summed over

COLUMNS: tuple[common.Column, ...] = (
    ("ceiling", lambda row: row["case"]),
    ("rate", lambda row: f"{row['rate'] / 1e12:.3g} T{row['unit']}/s" if "rate" in row else ""),
)


def cases(bench: Bench) -> Cases:
    yield "machine", lambda: {"machine": about(bench)}
    yield "copy", lambda: {"rate": copy_rate(bench), "unit": "B"}
    for I, O, N in [(32, 48, 64)] if bench.quick else PRODUCTS:
        yield f"cuBLAS, bf16, {I} x {O}, over {N}", lambda I=I, O=O, N=N: product_rate(bench, I, O, N)


def product_rate(bench: Bench, I: int, O: int, N: int) -> Row:
    sets = copies(bench, lambda: (bench.random(N, I), bench.random(N, O)), 2 * N * (I + O))
    taken = seconds(bench, lambda x, g: torch.mm(x.t(), g), sets)
    return {"rate": 2 * I * O * N / taken, "unit": "FLOP", "I": I, "O": O, "N": N, "seconds": taken}


def about(bench: Bench) -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {**common.machine(bench.device.type), "triton": None}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    if bench.cuda:
        shown = torch.cuda.get_device_properties(bench.device)
        found |= {"cuda": torch.version.cuda, "driver": driver(), "multiprocessors": shown.multi_processor_count}
        found |= {
            "memory": shown.total_memory,
            "capability": f"{shown.major}.{shown.minor}",
            "L2": getattr(shown, "L2_cache_size", None),
        }
    return found


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
