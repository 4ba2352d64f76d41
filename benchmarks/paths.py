"""The planner's table: every path to a weight gradient and its norms timed, next to the one that the planner takes.

    python -m benchmarks.paths
    python -m benchmarks.paths --dtype bfloat16 --threads 2 --modelled --out benchmarks/results/paths
    python -m benchmarks.paths --device cuda --modelled        the choices there: no timing, no device (paths_cuda.py)

A row is a contraction x [B, T, I], g [B, T, O]: the plain gradient in microseconds, every path as a multiple of it (each
includes the gradient), the path taken (*) and its time over that of the quickest. The paths of a row take turns; the
fastest of the rounds counts. "materialise" and "outer" run as Inductor compiles them, the others are ops.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass

import torch

from benchmarks import common, paths_cuda
from gnsfx.calibrate import factors, fastest, paths, timer_for
from gnsfx.kernels.cost import cheapest, matmul_paths, seconds
from gnsfx.kernels.machine import machine_for

SHAPES = [
    (16, 1, 256, 256), (64, 1, 1024, 1024), (256, 1, 768, 768), (16, 1, 768, 3072),
    (64, 4, 256, 256), (16, 8, 256, 256), (16, 8, 1024, 1024), (32, 8, 768, 768),
    (64, 16, 128, 128), (16, 16, 256, 256), (16, 16, 768, 768), (4, 16, 768, 3072), (16, 16, 1024, 1024),
    (16, 64, 128, 128), (16, 64, 128, 384), (16, 64, 128, 512), (16, 64, 512, 128), (16, 64, 128, 103),
    (64, 64, 128, 128), (64, 64, 256, 256), (4, 64, 768, 768), (8, 64, 768, 768), (8, 64, 768, 3072),
    (8, 128, 256, 256), (8, 128, 256, 1024), (8, 128, 384, 96), (16, 128, 768, 768), (4, 128, 768, 2304),
    (16, 256, 128, 128), (4, 256, 768, 768), (8, 197, 192, 576), (8, 197, 768, 192), (4, 512, 256, 688),
    (4, 1024, 128, 128), (4, 1024, 256, 256), (2, 1024, 768, 768), (256, 32, 64, 64), (128, 49, 96, 288),
]  # fmt: skip
"""B, T, I, O."""


@dataclass(frozen=True)
class Row:
    """``times``: seconds of every path, and of the gradient alone under "plain"; ``modelled``: what the cost model says."""

    shape: tuple[int, int, int, int]
    dtype: str
    times: dict[str, float]
    modelled: dict[str, float]
    taken: str

    @property
    def best(self) -> str:
        return min((p for p in self.times if p != "plain"), key=lambda p: self.times[p])

    @property
    def regret(self) -> float:
        """Time of the path taken over that of the quickest."""
        return self.times[self.taken] / self.times[self.best]


def measure(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, rounds: int) -> Row:
    torch.compiler.reset()
    times = fastest(paths(*factors(shape, dtype, device)), timer_for(device), rounds)
    machine = machine_for(device.type)
    B, T, I, O = shape
    costs = matmul_paths(B, 1, T, I, O, dtype.itemsize, device.type, machine.fused(dtype) > 0)
    modelled = {name: seconds(c, machine, dtype) for name, c in costs.items()}
    costs.pop("plain")
    return Row(shape, str(dtype).removeprefix("torch."), times, modelled, cheapest(costs, machine, dtype))


def columns(modelled: bool) -> list[common.Column]:
    def ratio(name: str) -> common.Column:
        def cell(row: common.Row) -> str:
            if name not in row["times"]:
                return ""
            beside = f"/{row['modelled'][name] / row['times']['plain']:.2f}" if modelled else ""
            return f"{'*' * (name == row['taken'])}{row['times'][name] / row['times']['plain']:.2f}{beside}"

        return name, cell

    return [
        ("B, T, I, O", lambda row: ", ".join(map(str, row["shape"]))),
        ("dtype", lambda row: row["dtype"]),
        ("plain us", lambda row: f"{1e6 * row['times']['plain']:.0f}"),
        *map(ratio, ("outer", "fused", "ghost", "materialise")),
        ("regret", lambda row: f"{row['regret']:.2f}"),
    ]


def summary(rows: list[common.Row]) -> str:
    regrets = [row["regret"] for row in rows]
    near = sum(r <= 1.1 for r in regrets)
    return (
        f"{near} of {len(rows)} within 10% of the best; mean {statistics.fmean(regrets):.3f}, worst {max(regrets):.2f}"
    )


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16", "float64")
    )
    parser.add_argument("--rounds", type=int, default=15, help="default %(default)s")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--modelled", action="store_true", help="behind each ratio the one that the cost model gives")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and args.modelled:
        show_modelled(args)
        return
    cases = [(dtype, shape) for dtype in args.dtype for shape in SHAPES[: args.shapes]]
    found = [
        measure(shape, getattr(torch, dtype), torch.device(args.device), args.rounds)
        for dtype, shape in common.progress(cases, "shape")
    ]
    rows: list[common.Row] = [{**asdict(row), "regret": row.regret} for row in found]
    print(common.text_table(columns(args.modelled), rows))
    print(summary(rows))
    if args.out:
        record = {"schema": "gnsfx.paths/1", "settings": common.settings(args), "machine": common.machine(args.device)}
        assert __doc__
        about = f"{__doc__[__doc__.index('A row is') :]}\n{summary(rows)}."
        common.save(args.out, "The planner's table", about, columns(args.modelled), rows, record)


def show_modelled(args: argparse.Namespace) -> None:
    """The choices on a CUDA device, and no time that anybody took."""
    rows = [asdict(row) for row in paths_cuda.rows()]
    print(common.text_table(paths_cuda.COLUMNS, rows))
    print("modelled; nothing was timed")
    if args.out:
        record = {"schema": "gnsfx.paths_cuda/1", "settings": common.settings(args), "timed": False}
        assert paths_cuda.__doc__
        about = paths_cuda.__doc__[paths_cuda.__doc__.index("A row is") :]
        title = "The planner's choices on a CUDA device: modelled, nothing timed"
        common.save(args.out, title, about, paths_cuda.COLUMNS, rows, record)


if __name__ == "__main__":
    main()
