"""Which path measures a contraction: costs from shapes, the cheapest under the memory cap. Knows no graph surgery."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from gnsfx._torch import known, size_hint
from gnsfx.kernels import cost, cost_cuda, gpu
from gnsfx.kernels.cost_convolution import convolution_paths
from gnsfx.kernels.machine import Machine, machine_for
from gnsfx.passes.contractions import BiasReduction, Convolution, Lookup, Matmul, Reduction
from gnsfx.passes.rules.table import arguments
from gnsfx.passes.state import Size

if TYPE_CHECKING:
    from gnsfx.passes.record import Record
    from gnsfx.passes.share_grams import SharedGram


@dataclass(frozen=True, slots=True)
class Choice:
    """``costs`` holds every candidate path, and under "plain" the gradient without norms; ``seconds`` the time of each, for
    arithmetic in ``dtype``. ``note`` says where the path needs more memory than it may, and the tiles of a CUDA kernel.

    ``ours``: whether our CUDA kernels multiply these factors: "fused" and "ghost" are theirs, with the argument ``tile``, and
    "materialise" is in fp32."""

    path: str
    costs: Mapping[str, cost.Cost]
    seconds: Mapping[str, float]
    dtype: torch.dtype
    note: str = ""
    ours: bool = False
    tile: int = 0

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
        sizes, value = found.sizes(self.examples), found.node.meta["val"]
        alone = self._choose(*sizes, one, value, self.multiprocessors(found))
        if (shared := self.grams.get(found.node)) is None:
            return alone
        costs = {**alone.costs, "ghost": shared.costs[found.node]}
        note = f"one Gram for {len(shared.together(found.node))} contractions"
        tile = self.gram_tile(found) if alone.ours else 0
        return replace(self._timed("ghost", costs, value), note=note, ours=alone.ours, tile=tile)

    def multiprocessors(self, found: Matmul) -> int:
        """Of the device, where our CUDA kernels multiply such factors; 0 elsewhere."""
        value = found.node.meta["val"]
        return _multiprocessors(value, value.shape[0] if value.dim() == 3 else 1, *value.shape[-2:])

    def gram_tile(self, found: Matmul) -> int:
        """Of the op ``gram_norm_parts``: the same for all contractions of as many examples and positions."""
        B, _, T, *_ = found.sizes(self.examples)
        machine = machine_on(found.node.meta["val"].device)
        return cost_cuda.gram_tile(B, T, self.multiprocessors(found), machine)

    def gram(self, found: Matmul, side: int) -> cost.Cost:
        """Of the Gram of one factor, x or g, that several contractions use."""
        return self._gram(found, side, cost.gram, cost_cuda.gram)

    def with_gram(self, found: Matmul, side: int) -> cost.Cost:
        """Of the norms, where the Gram of the factor ``side`` is there."""
        return self._gram(found, 1 - side, cost.with_gram, cost_cuda.with_gram)

    def _gram(
        self, found: Matmul, side: int, torch_op: Callable[..., cost.Cost], ours: Callable[..., cost.Cost]
    ) -> cost.Cost:
        B, E, T, *widths = found.sizes(self.examples)
        if multiprocessors := self.multiprocessors(found):
            return ours(B, T, widths[side], self.gram_tile(found), multiprocessors)
        value = found.node.meta["val"]
        return torch_op(B, E, T, widths[side], value.dtype.itemsize, value.device.type)

    def factors(self, x: Node, g: Node) -> Choice:
        """For x (B, E, T, I) and g (B, E, T, O)."""
        value, (_, E, T, I), O = x.meta["val"], x.meta["val"].shape, g.meta["val"].shape[-1]
        B, *sizes = (size_hint(s) for s in value.shape)
        hints = B, sizes[0], sizes[1], sizes[2], size_hint(O)
        return self._choose(*hints, known(T == 1), value, _multiprocessors(value, E, I, O))

    def _choose(
        self, B: int, E: int, T: int, I: int, O: int, one: bool, value: torch.Tensor, multiprocessors: int = 0
    ) -> Choice:
        device = value.device.type
        machine, tiles = machine_on(value.device), {}
        costs = cost.matmul_paths(B, E, T, I, O, value.dtype.itemsize, device, machine.fused(value.dtype) > 0)
        if multiprocessors:
            tiles = cost_cuda.matmul_tiles(B, T, I, O, multiprocessors, machine, self.memory)
            costs |= cost_cuda.matmul_paths(B, T, I, O, tiles, multiprocessors)
        if not (one and E == 1):
            costs.pop("outer", None)
        paths = {name: c for name, c in costs.items() if name != "plain"}
        taken = self.forced if self.forced in paths else cost.cheapest(paths, machine, value.dtype, self.memory)
        choice = self._timed(taken, costs, value)
        if not multiprocessors:
            return choice
        notes = (choice.note, cost_cuda.tile_in_words(taken, tiles[taken]) if taken in tiles else "")
        return replace(choice, note="; ".join(filter(None, notes)), ours=True, tile=tiles.get(taken, 0))

    def sums_in_fp32(self, node: Node) -> bool:
        """Whether the C++ kernel of ``mm_sq_norm`` adds products of 16 bits before it rounds them: then its gradient is as good
        as the plain one. Our CUDA kernels do so wherever a choice is ``ours``."""
        value = node.meta["val"]
        return machine_for(value.device.type).fused(value.dtype) > 0

    def lookup(self, found: Lookup) -> Choice:
        value = found.node.meta["val"]
        sizes = found.sizes(self.examples)
        if "embedding" in gpu.kernels_on(value.device) and value.dtype in gpu.LOOKED_UP:
            costs = cost_cuda.embedding_paths(*sizes, value.dtype.itemsize)
        else:
            costs = cost.embedding_paths(*sizes, value.dtype.itemsize, value.device.type)
        return self._timed("outer" if "outer" in costs else "segments", costs, value)

    def convolution(self, found: Convolution) -> Choice:
        value = found.node.meta["val"]
        op = arguments(found.node.args[0])  # type: ignore[arg-type]
        g, x = (op[n].meta["val"].shape for n in ("grad_output", "input"))
        out = [size_hint(s) for s in (x if op["transposed"] else g)[2:]]
        B = size_hint(self.examples)
        settings = (op["stride"], op["padding"], op["dilation"], op["transposed"], op["groups"])
        costs = convolution_paths(
            B, max(size_hint(g[0]) // max(B, 1), 1), [size_hint(s) for s in value.shape], out, *settings, value.dtype.itemsize, value.device.type,
            machine_on(value.device).fused(value.dtype) > 0,
        )  # fmt: skip
        return self._timed("convolution", costs, value)

    def reduction(self, found: Reduction | BiasReduction) -> Choice:
        """B, T, N: what is summed over is B * T."""
        value, read = found.node.meta["val"], found.g.node.meta["val"]
        B, N = size_hint(self.examples), max(size_hint(value.numel()), 1)
        T = max(size_hint(read.numel()) // max(B * N, 1), 1)
        return self._timed("reduction", cost.reduction_paths(B, T, N, read.dtype.itemsize), read)

    def norm_layer(self, value: torch.Tensor) -> Choice:
        """For the input [B, T, D] of a norm layer whose backward is our CUDA kernel's."""
        B, T, D = (size_hint(s) for s in value.shape)
        return self._timed("norm", cost_cuda.norm_paths(B, T, D, value.dtype.itemsize), value)

    def _timed(self, path: str, costs: Mapping[str, cost.Cost], value: torch.Tensor) -> Choice:
        machine = machine_on(value.device)
        ordered = {"plain": costs["plain"], **costs}
        times = {name: cost.seconds(c, machine, value.dtype) for name, c in ordered.items()}
        return Choice(path, ordered, times, value.dtype, self.over(costs[path].memory))

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


def machine_on(device: torch.device) -> Machine:
    """The constants of a device; where our CUDA kernels run, those of CUDA devices."""
    return machine_for("cuda" if gpu.kernels_on(device) else device.type)


def _multiprocessors(value: torch.Tensor, contractions: Size, *widths: Size) -> int:
    """Known to fit whatever the symbolic sizes are: a graph that is kept must not change with its batch."""
    aligned = all(known(width % cost_cuda.ALIGNMENT == 0) for width in widths)
    fits = aligned and known(contractions == 1) and value.dtype in gpu.MULTIPLIED
    return gpu.multiprocessors(value.device) if fits and "products" in gpu.kernels_on(value.device) else 0


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:.3g} MiB"
