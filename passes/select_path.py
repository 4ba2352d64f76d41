"""Which path measures a contraction: costs from shapes, the cheapest under the memory cap. Knows no graph surgery."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from gnsfx._torch import known, size_hint
from gnsfx.kernels import cost
from gnsfx.passes.contractions import Convolution, Lookup, Matmul
from gnsfx.passes.emit import Emitter
from gnsfx.passes.state import Size


@dataclass(frozen=True, slots=True)
class Choice:
    path: str
    costs: dict[str, cost.Cost]


@dataclass(frozen=True, slots=True)
class Planner:
    """``forced`` is a path taken wherever it applies ("auto": the cheapest); ``memory`` the cap in bytes."""

    examples: Size
    memory: int
    forced: str = "auto"

    def matmul(self, found: Matmul, emit: Emitter) -> Choice:
        rows = found.x.node.meta["val"].shape[found.x.state.dim]
        one = known(rows == self.examples)
        return self._choose(*found.sizes(self.examples), one, found.node.meta["val"])

    def factors(self, x: Node, g: Node, emit: Emitter) -> Choice:
        """For x (B, E, T, I) and g (B, E, T, O)."""
        B, E, T, I = (size_hint(s) for s in x.meta["val"].shape)  # noqa: E741
        return self._choose(B, E, T, I, size_hint(g.meta["val"].shape[-1]), known(x.meta["val"].shape[2] == 1), x.meta["val"])

    def _choose(self, B: int, E: int, T: int, I: int, O: int, one: bool, value: torch.Tensor) -> Choice:  # noqa: E741
        device = value.device.type
        costs = cost.matmul_paths(B, E, T, I, O, value.dtype.itemsize, device)
        if value.dtype in (torch.bfloat16, torch.float16):  # these compute the gradient beside the norms, see measure
            plain = cost.plain_matmul(B, E, T, I, O, value.dtype.itemsize)
            costs |= {name: costs[name] + plain for name in ("materialise", "chunked")}
        if not (one and E == 1):
            costs.pop("outer", None)
        if self.forced in costs:
            return Choice(self.forced, costs)
        return Choice(cost.cheapest(costs, cost.MACHINES.get(device, cost.MACHINES["cuda"]), value.dtype, self.memory), costs)

    def lookup(self, found: Lookup) -> Choice:
        return Choice("segments", cost.embedding_paths(*found.sizes(self.examples), found.node.meta["val"].dtype.itemsize))

    def convolution(self, found: Convolution) -> Choice:
        return Choice("convolution", {})

    def memory_note(self, stack: torch.Tensor) -> str:
        """What a path that must materialise says when it needs more than the cap."""
        size = size_hint(stack.numel()) * stack.dtype.itemsize
        return f"needs {size / 2**20:.0f} MiB for the per-example gradients" if size > self.memory else ""
