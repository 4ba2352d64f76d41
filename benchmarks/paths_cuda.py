"""What the planner takes on a CUDA device, by its model alone: ``python -m benchmarks.paths --device cuda --modelled``.

A row is a contraction x [B, T, I], g [B, T, O] of 16 bits with B T = 16,384; numbers are modelled times over that of the
gradient alone, which each way includes, and * is what the planner takes. Nothing here was timed: the rates of the device are
those that kernels/machine.py ships, unless ``python -m gnsfx.calibrate --device cuda`` has measured it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks import common
from gnsfx.kernels import cost, cost_cuda
from gnsfx.kernels.machine import Machine, machine_for

WIDTHS = [(768, 768), (768, 3072), (4096, 4096), (4096, 14336)]
POSITIONS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TOKENS = 16384
MULTIPROCESSORS = 132
"""Of an H100 or H200."""


@dataclass(frozen=True)
class Row:
    """``seconds``: modelled, of each way, and of the gradient alone under "plain"; ``tile``: of the path taken, in words."""

    shape: tuple[int, int, int, int]
    seconds: dict[str, float]
    taken: str
    tile: str


def choose(shape: tuple[int, int, int, int], machine: Machine) -> Row:
    B, T, I, O = shape
    tiles = cost_cuda.matmul_tiles(B, T, I, O, MULTIPROCESSORS, machine, float("inf"))
    costs = cost.matmul_paths(B, 1, T, I, O, 2, "cuda") | cost_cuda.matmul_paths(B, T, I, O, tiles, MULTIPROCESSORS)
    plain = costs.pop("plain")
    taken = cost.cheapest(costs, machine, torch.bfloat16)
    reduced = cost_cuda.product(B, T, I, O, max(cost_cuda.ALL_TILES), MULTIPROCESSORS)
    every = {"plain": plain, **costs, "copy engine": reduced}
    times = {name: cost.seconds(each, machine, torch.bfloat16) for name, each in every.items()}
    return Row(shape, times, taken, cost_cuda.tile_in_words(taken, tiles[taken]) if taken in tiles else "")


def rows() -> list[Row]:
    machine = machine_for("cuda")
    return [choose((TOKENS // T, T, I, O), machine) for I, O in WIDTHS for T in POSITIONS]


def ratio(name: str) -> common.Column:
    def cell(row: common.Row) -> str:
        if name not in row["seconds"]:
            return ""
        return f"{'*' * (name == row['taken'])}{row['seconds'][name] / row['seconds']['plain']:.2f}"

    return name, cell


COLUMNS: list[common.Column] = [
    ("B, T, I, O", lambda row: ", ".join(map(str, row["shape"]))),
    ("plain us", lambda row: f"{1e6 * row['seconds']['plain']:.0f}"),
    *map(ratio, ("outer", "ghost", "fused", "copy engine", "materialise")),
    ("tile", lambda row: row["tile"]),
]
