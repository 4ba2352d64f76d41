"""Which path measures a contraction: costs from shapes, the cheapest under the memory cap. Knows no graph surgery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from gnsfx._torch import known, size_hint
from gnsfx.kernels import cost
from gnsfx.kernels.machine import machine_for
from gnsfx.passes.contractions import BiasReduction, Convolution, Lookup, Matmul, Reduction
from gnsfx.passes.rules.table import arguments
from gnsfx.passes.state import Size

if TYPE_CHECKING:
    from gnsfx.passes.record import Record
    from gnsfx.passes.share_grams import SharedGram


@dataclass(frozen=True, slots=True)
class Choice:
    """``costs`` holds every candidate path, and under "plain" the gradient without norms; ``seconds`` the time of each.
    ``note`` says where the path needs more memory than it may."""

    path: str
    costs: Mapping[str, cost.Cost]
    seconds: Mapping[str, float]
    note: str = ""

    @property
    def extra(self) -> float:
        """Seconds that the path adds to the gradient itself."""
        return max(self.seconds.get(self.path, 0.0) - self.seconds.get("plain", 0.0), 0.0)


@dataclass(frozen=True, slots=True)
class Planner:
    """``forced`` is a path taken wherever it applies ("auto": the cheapest); ``memory`` the cap in bytes.
    ``grams`` says which contractions have a Gram in common, see :mod:`gnsfx.passes.share_grams`."""

    examples: Size
    memory: int
    forced: str = "auto"
    grams: Mapping[Node, SharedGram] = field(default_factory=dict)

    def matmul(self, found: Matmul) -> Choice:
        rows = found.x.node.meta["val"].shape[found.x.state.dim]
        one = known(rows == self.examples)
        alone = self._choose(*found.sizes(self.examples), one, found.node.meta["val"])
        if (shared := self.grams.get(found.node)) is None:
            return alone
        costs = {**alone.costs, "ghost": shared.costs[found.node]}
        note = f"one Gram for {len(shared.costs)} contractions"
        return replace(self._timed("ghost", costs, found.node.meta["val"]), note=note)

    def factors(self, x: Node, g: Node) -> Choice:
        """For x (B, E, T, I) and g (B, E, T, O)."""
        B, E, T, I = (size_hint(s) for s in x.meta["val"].shape)
        return self._choose(
            B, E, T, I, size_hint(g.meta["val"].shape[-1]), known(x.meta["val"].shape[2] == 1), x.meta["val"]
        )

    def _choose(self, B: int, E: int, T: int, I: int, O: int, one: bool, value: torch.Tensor) -> Choice:
        device = value.device.type
        machine = machine_for(device)
        costs = cost.matmul_paths(B, E, T, I, O, value.dtype.itemsize, device, machine.fused(value.dtype) > 0)
        if not (one and E == 1):
            costs.pop("outer", None)
        paths = {name: c for name, c in costs.items() if name != "plain"}
        taken = self.forced if self.forced in paths else cost.cheapest(paths, machine, value.dtype, self.memory)
        return self._timed(taken, costs, value)

    def sums_in_fp32(self, node: Node) -> bool:
        """Whether ``mm_sq_norm`` adds products of 16 bits before it rounds them: then its gradient is as good as the plain one."""
        value = node.meta["val"]
        return machine_for(value.device.type).fused(value.dtype) > 0

    def lookup(self, found: Lookup) -> Choice:
        value = found.node.meta["val"]
        sizes = found.sizes(self.examples)
        costs = cost.embedding_paths(*sizes, value.dtype.itemsize, value.device.type)
        return self._timed("outer" if "outer" in costs else "segments", costs, value)

    def convolution(self, found: Convolution) -> Choice:
        value = found.node.meta["val"]
        op = arguments(found.node.args[0])  # type: ignore[arg-type]
        g, x = (op[n].meta["val"].shape for n in ("grad_output", "input"))
        out = [size_hint(s) for s in (x if op["transposed"] else g)[2:]]
        B = size_hint(self.examples)
        settings = (op["stride"], op["padding"], op["dilation"], op["transposed"], op["groups"])
        costs = cost.convolution_paths(
            B, max(size_hint(g[0]) // max(B, 1), 1), [size_hint(s) for s in value.shape], out, *settings, value.dtype.itemsize, value.device.type,
            machine_for(value.device.type).fused(value.dtype) > 0,
        )  # fmt: skip
        return self._timed("convolution", costs, value)

    def reduction(self, found: Reduction | BiasReduction) -> Choice:
        """B, T, N: what is summed over is B * T."""
        value, read = found.node.meta["val"], found.g.node.meta["val"]
        B, N = size_hint(self.examples), max(size_hint(value.numel()), 1)
        T = max(size_hint(read.numel()) // max(B * N, 1), 1)
        return self._timed("reduction", cost.reduction_paths(B, T, N, read.dtype.itemsize), read)

    def _timed(self, path: str, costs: Mapping[str, cost.Cost], value: torch.Tensor) -> Choice:
        machine = machine_for(value.device.type)
        ordered = {"plain": costs["plain"], **costs}
        times = {name: cost.seconds(c, machine, value.dtype) for name, c in ordered.items()}
        return Choice(path, ordered, times, self.over(costs[path].memory))

    def lift(self, stack: torch.Tensor) -> float:
        """Seconds to write the contributions of all examples, and to read them twice."""
        size = size_hint(stack.numel()) * stack.dtype.itemsize
        work = cost.Cost(bytes=3 * size, memory=size, calls=3)
        return cost.seconds(work, machine_for(stack.device.type), stack.dtype)

    def add_tied(self, record: Record, ids: Sequence[Size], rows: Sequence[Size], head: Matmul) -> None:
        """Add to the costs of a head what its table costs as an embedding: ids [B, S], rows [B, S, D]."""
        value = head.node.meta["val"]
        B, S, D = (size_hint(s) for s in (*ids, rows[-1]))
        T = head.sizes(self.examples)[2]
        rest = cost.tied_rest(B, S, T, D, value.dtype.itemsize, value.device.type)
        record.costs = {name: c if name == "plain" else c + rest for name, c in record.costs.items()}
        record.extra += cost.seconds(rest, machine_for(value.device.type), value.dtype)

    def stacked(self, stack: torch.Tensor) -> str:
        """What a path that must hold the contributions of all examples says when they are more than the cap."""
        return self.over(size_hint(stack.numel()) * stack.dtype.itemsize)

    def over(self, needed: float) -> str:
        """The reason in coverage for a path that has to allocate more than the cap."""
        if needed <= self.memory:
            return ""
        return (
            f"needs {_mebibytes(needed)} for per-example gradients, the cap is {_mebibytes(self.memory)} (gns.memory)"
        )


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:.3g} MiB"
