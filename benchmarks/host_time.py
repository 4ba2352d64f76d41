"""What a measured step costs on the host, whatever the device does: microseconds of our own Python, and torch operations.

    python benchmarks/host_time.py
    python benchmarks/host_time.py --parameters 60 300 1000 --optimizer --out host_time

forward: from the call of a compiled graph to its inner callable and back. hooks: of autograd, at the graph and at every
parameter. step: noise.step(), with the averages that it brings up to date at each 16th. The model is made of tiny layers, so
that nothing else is there to see. Operations are dispatched ones that are no views; on a GPU each is a launch or none.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gnsfx
from gnsfx.compiled_graph import CompiledGraph
from gnsfx.leaves import Collector
from gnsfx.tracked import Tracked

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import common

WIDTH = 8
STEPS = 64  # a multiple of those that the averages take in at once
PARTS = {
    "forward": ((CompiledGraph, "__call__"),),
    "hooks": ((Collector, "begin"), (Collector, "passed"), (Collector, "end"), (Tracked, "_arriving")),
    "step": ((gnsfx.NoiseScale, "step"),),
}


class Net(nn.Module):
    """Blocks of four parameters each."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(parameters // 4))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


class Operations(TorchDispatchMode):
    """Counts what is dispatched inside and makes a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class Clock:
    """Seconds and operations by part: functions of ours are wrapped, and what they call that is not ours taken out."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: Counter[str] = Counter()
        self.counting = False
        for part, functions in PARTS.items():
            for owner, name in functions:
                setattr(owner, name, self.wrap(getattr(owner, name), part))

    def wrap(self, function: Any, part: str, sign: int = 1) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.counting:
                with Operations() as operations:
                    result = function(*args, **kwargs)
                self.operations[part] += sign * operations.count
                return result
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[part] += sign * (time.perf_counter() - start)
            return result

        return timed


def measure(clock: Clock, parameters: int, params: str, with_optimizer: bool) -> dict[str, Any]:
    """A row: microseconds and operations per step, by part."""
    torch.manual_seed(0)
    model = Net(parameters)
    options = {"gns.inner": "eager", "gns.params": params, "gns.elementwise": with_optimizer}
    compiled, x = torch.compile(model, backend="gns", options=options), torch.randn(4, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    noise = gnsfx.NoiseScale(model, optimizer=optimizer if with_optimizer else None)

    def steps(count: int) -> None:
        for _ in range(count):
            compiled(x).backward()
            noise.step()
            optimizer.step()
            optimizer.zero_grad()

    steps(STEPS // 2)
    clock.seconds.clear()
    clock.operations.clear()
    steps(STEPS)
    clock.counting = True
    steps(STEPS)
    clock.counting = False
    row: dict[str, Any] = {"parameters": len([*model.parameters()]), "params": params, "optimizer": with_optimizer}
    row |= {f"{part}_us": 1e6 * clock.seconds[part] / STEPS for part in PARTS}
    row |= {f"{part}_operations": clock.operations[part] / STEPS for part in PARTS}
    return row | {"total_us": sum(row[f"{part}_us"] for part in PARTS)}


def _number(name: str) -> Callable[[common.Row], str]:
    return lambda row: f"{row[name]:.0f}" if name.endswith("us") else f"{row[name]:.1f}"


COLUMNS: tuple[common.Column, ...] = (
    ("parameters", lambda row: str(row["parameters"])),
    ("measured", lambda row: row["params"]),
    ("optimizer", lambda row: "yes" if row["optimizer"] else "no"),
    *(column for p in PARTS for column in ((f"{p} us", _number(f"{p}_us")), ("ops", _number(f"{p}_operations")))),
)


def main() -> None:
    assert __doc__
    parser = common.parser_of(__doc__)
    parser.add_argument("--parameters", type=int, nargs="+", default=[60, 300, 1000], help="default %(default)s")
    parser.add_argument("--params", nargs="+", choices=("all", "norm"), default=["norm", "all"])
    parser.add_argument("--optimizer", action="store_true", help="also with NoiseScale(optimizer=)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = Clock()
    clock_inner(clock)
    cases = [(n, p, False) for n in args.parameters for p in args.params]
    cases += [(n, "all", True) for n in args.parameters if args.optimizer]
    rows = [measure(clock, *case) for case in cases]
    print(common.text_table(COLUMNS, rows))
    about = f"gnsfx {gnsfx.__version__}, {STEPS} steps each"
    print(about)
    if args.out:
        record = {"schema": "gnsfx.host_time/1", "settings": common.settings(args), "machine": common.machine()}
        text = f"{__doc__[__doc__.index('forward:') :]}\n{about}"
        common.save(args.out, "Host time", text, COLUMNS, rows, record)


def clock_inner(clock: Clock) -> None:
    """Takes the inner callable, which is the user's own forward pass, out of ``forward``."""
    before = CompiledGraph.__init__

    def init(self: CompiledGraph, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        self._inner = clock.wrap(self._inner, "forward", -1)

    CompiledGraph.__init__ = init


if __name__ == "__main__":
    main()
