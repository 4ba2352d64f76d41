"""Which path measures a contraction: costs from shapes, the cheapest under the memory cap. Knows no graph surgery."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from gnsfx._torch import known, size_hint
from gnsfx.kernels import cost
from gnsfx.passes.contractions import BiasReduction, Convolution, Lookup, Matmul, Reduction
from gnsfx.passes.rules.table import arguments
from gnsfx.passes.state import Size


@dataclass(frozen=True, slots=True)
class Choice:
    """``costs`` holds every candidate path, and under "plain" the gradient without norms."""

    path: str
    costs: dict[str, cost.Cost]


@dataclass(frozen=True, slots=True)
class Planner:
    """``forced`` is a path taken wherever it applies ("auto": the cheapest); ``memory`` the cap in bytes."""

    examples: Size
    memory: int
    forced: str = "auto"

    def matmul(self, found: Matmul) -> Choice:
        rows = found.x.node.meta["val"].shape[found.x.state.dim]
        one = known(rows == self.examples)
        return self._choose(*found.sizes(self.examples), one, found.node.meta["val"])

    def factors(self, x: Node, g: Node) -> Choice:
        """For x (B, E, T, I) and g (B, E, T, O)."""
        B, E, T, I = (size_hint(s) for s in x.meta["val"].shape)
        return self._choose(
            B, E, T, I, size_hint(g.meta["val"].shape[-1]), known(x.meta["val"].shape[2] == 1), x.meta["val"]
        )

    def _choose(self, B: int, E: int, T: int, I: int, O: int, one: bool, value: torch.Tensor) -> Choice:
        device = value.device.type
        costs = cost.matmul_paths(B, E, T, I, O, value.dtype.itemsize, device)
        plain = cost.plain_matmul(B, E, T, I, O, value.dtype.itemsize)
        if value.dtype in (torch.bfloat16, torch.float16):  # these compute the gradient beside the norms, see measure
            costs |= {name: costs[name] + plain for name in ("materialise", "chunked")}
        if not (one and E == 1):
            costs.pop("outer", None)
        if self.forced in costs:
            return Choice(self.forced, {"plain": plain, **costs})
        path = cost.cheapest(costs, cost.MACHINES.get(device, cost.MACHINES["cuda"]), value.dtype, self.memory)
        return Choice(path, {"plain": plain, **costs})

    def lookup(self, found: Lookup) -> Choice:
        return Choice(
            "segments", cost.embedding_paths(*found.sizes(self.examples), found.node.meta["val"].dtype.itemsize)
        )

    def convolution(self, found: Convolution) -> Choice:
        value = found.node.meta["val"]
        op = arguments(found.node.args[0])  # type: ignore[arg-type]
        g, x = (op[n].meta["val"].shape for n in ("grad_output", "input"))
        out = [size_hint(s) for s in (x if op["transposed"] else g)[2:]]
        B = size_hint(self.examples)
        settings = (op["stride"], op["padding"], op["dilation"], op["transposed"], op["groups"])
        costs = cost.convolution_paths(
            B, max(size_hint(g[0]) // max(B, 1), 1), [size_hint(s) for s in value.shape], out, *settings, value.dtype.itemsize, value.device.type
        )  # fmt: skip
        return Choice("convolution", {"convolution": costs["per_example"]})

    def reduction(self, found: Reduction | BiasReduction) -> Choice:
        """B, T, N: what is summed over is B * T."""
        value, read = found.node.meta["val"], found.g.node.meta["val"]
        B, N = size_hint(self.examples), max(size_hint(value.numel()), 1)
        T = max(size_hint(read.numel()) // max(B * N, 1), 1)
        return Choice("reduction", {"reduction": cost.reduction_paths(B, T, N, read.dtype.itemsize)["materialise"]})

    def memory_note(self, stack: torch.Tensor) -> str:
        """What a path that must materialise says when it needs more than the cap."""
        size = size_hint(stack.numel()) * stack.dtype.itemsize
        return f"needs {size / 2**20:.0f} MiB for the per-example gradients" if size > self.memory else ""
