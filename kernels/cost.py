"""What each way to a gradient and its per-example norms costs, from shapes alone, and which is cheapest.

Every ``*_paths`` function returns TOTAL costs: the ordinary gradient of the parameter (one matrix multiply, one
convolution, one scatter) is part of each path, so paths compare with each other and with ``plain_matmul``. Sizes are
plain ints; whoever has symbolic ones passes hints.

Times are sums over resources, not their maximum: the kernels of a path run one after the other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gnsfx.kernels.tiling import budget_for, convolution_method, example_chunk, gram_tiles, head_method, matmul_tiles


@dataclass(frozen=True)
class Cost:
    """Work and memory of one path.

    Only flops of matrix multiplies count; other arithmetic hides behind its bytes. ``flops`` run in the dtype of the
    model, ``accumulate_flops`` in fp32 or fp64 (Grams of bf16, for one). ``bytes`` pass through memory, ``cache_bytes``
    through a scratch buffer that the tiles keep in the cache. ``memory`` is what the path allocates beyond its inputs
    and the gradient, ``calls`` how many torch operations it dispatches.
    """

    flops: float = 0
    bytes: float = 0
    memory: float = 0
    calls: float = 0
    accumulate_flops: float = 0
    cache_bytes: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other: work adds up, memory is the larger of the two."""
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            max(self.memory, other.memory),
            self.calls + other.calls,
            self.accumulate_flops + other.accumulate_flops,
            self.cache_bytes + other.cache_bytes,
        )


@dataclass(frozen=True)
class Machine:
    """Rates of one device, per second. ``measured`` is false where the numbers are arithmetic from data sheets.

    ``fresh_bandwidth`` is the rate at which an allocator maps new pages; allocations up to ``reused_bytes`` are
    recycled and cost nothing.
    """

    flops_fp32: float
    flops_bf16: float
    flops_fp64: float
    bandwidth: float
    cache_bandwidth: float
    call_seconds: float
    measured: bool
    mixed_matmul: bool = False
    reused_bytes: float = math.inf
    fresh_bandwidth: float = math.inf

    def flops(self, dtype: torch.dtype) -> float:
        """Rate of matrix multiplies of this dtype."""
        return {torch.float64: self.flops_fp64, torch.float32: self.flops_fp32}.get(dtype, self.flops_bf16)

    def accumulate_flops(self, dtype: torch.dtype) -> float:
        """Rate of matrix multiplies of this dtype whose result must not be rounded to it."""
        if self.mixed_matmul or dtype in (torch.float32, torch.float64):
            return self.flops(dtype)
        return self.flops_fp32


MACHINES: Mapping[str, Machine] = {
    # Fitted to 50 shapes in fp32 and bf16 on 2 threads of a Zen 5 server, torch 2.13 (test_cost.py keeps 44 of the
    # 100 rows). On 24 others the choice took 1.04 times the best on average, 1.57 at worst.
    # The last two are glibc: blocks above 32 MiB go back to the kernel at once, and every page faults again.
    "cpu": Machine(
        flops_fp32=225e9,
        flops_bf16=900e9,
        flops_fp64=110e9,
        bandwidth=60e9,
        cache_bandwidth=110e9,
        call_seconds=1.5e-6,
        measured=True,
        reused_bytes=32 << 20,
        fresh_bandwidth=3.4e9,
    ),
    # H200, modelled: tensor-core bf16 and HBM as in data sheets less the usual losses, never timed by us. Calls are
    # queued ahead of the device, so most of their host time is hidden.
    "cuda": Machine(
        flops_fp32=50e12,
        flops_bf16=790e12,
        flops_fp64=50e12,
        bandwidth=4.3e12,
        cache_bandwidth=4.3e12,
        call_seconds=1e-6,
        measured=False,
        mixed_matmul=True,
    ),
}


def seconds(cost: Cost, machine: Machine, dtype: torch.dtype) -> float:
    """Time of a path on a machine, for a model of this dtype."""
    fresh = cost.memory / machine.fresh_bandwidth if cost.memory > machine.reused_bytes else 0.0
    return (
        cost.flops / machine.flops(dtype)
        + cost.accumulate_flops / machine.accumulate_flops(dtype)
        + cost.bytes / machine.bandwidth
        + cost.cache_bytes / machine.cache_bandwidth
        + cost.calls * machine.call_seconds
        + fresh
    )


def cheapest(paths: Mapping[str, Cost], machine: Machine, dtype: torch.dtype, memory_cap: float = math.inf) -> str:
    """Name of the quickest path that allocates at most ``memory_cap`` bytes; of the smallest one if none does."""
    allowed = {name: cost for name, cost in paths.items() if cost.memory <= memory_cap}
    if not allowed:
        return min(paths, key=lambda name: paths[name].memory)
    return min(allowed, key=lambda name: seconds(allowed[name], machine, dtype))


def plain_matmul(B: int, E: int, T: int, I: int, O: int, itemsize: int) -> Cost:
    """The weight gradient [E, I, O] alone, without norms."""
    return Cost(flops=2 * B * E * T * I * O, bytes=itemsize * E * (B * T * (I + O) + I * O), calls=1)


def matmul_paths(B: int, E: int, T: int, I: int, O: int, itemsize: int, device_type: str = "cpu") -> dict[str, Cost]:
    """Gradient [E, I, O] and norms [B] of x [B, E, T, I], g [B, E, T, O].

    "outer"        T == 1: ||x_b||^2 ||g_b||^2 beside the plain matmul (E == 1, or a sum over E of such products)
    "materialise"  bmm to [B, E, I, O] in the graph, summed and squared by the inner compiler
    "chunked"      the op ``mm_sq_norm``
    "ghost"        the plain matmul and the op ``ghost_sq_norm``
    """
    plain = plain_matmul(B, E, T, I, O, itemsize)
    paths = {"materialise": _materialise(B, E, T, I, O, itemsize, device_type)}
    paths["chunked"] = plain + _chunked(B, E, I, O, itemsize, device_type)
    paths["ghost"] = plain + _ghost(B, E, T, I, O, itemsize, device_type)
    if T == 1:
        paths["outer"] = plain + Cost(bytes=itemsize * B * E * (I + O), calls=1)
    return paths


def embedding_paths(B: int, T: int, D: int, V: int, itemsize: int, device_type: str = "cpu") -> dict[str, Cost]:
    """Gradient [V, D] and norms [B] of ids [B, T], g [B, T, D].

    "outer"     T == 1: no id can repeat, s_b = ||g_b||^2
    "segments"  the op ``embedding_sq_norm``
    """
    plain = Cost(bytes=itemsize * (B * T * D + 2 * V * D), calls=2)
    paths = {"segments": plain + _segments(B, T, D, itemsize, device_type)}
    if T == 1:
        paths["outer"] = plain + Cost(bytes=itemsize * B * D, calls=1)
    return paths


def convolution_paths(
    B: int,
    R: int,
    weight: Sequence[int],
    out: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
    itemsize: int,
    device_type: str = "cpu",
) -> dict[str, Cost]:
    """Gradient of ``weight`` and norms [B]; ``out`` is the grid that the kernel visits (a transposed one's input).

    "per_example"  the op ``convolution_sq_norm``, which picks its own method
    """
    n, positions = math.prod(weight), math.prod(out)
    read = itemsize * B * R * positions * (weight[0] + weight[1] * groups)
    accumulate = _accumulate_itemsize(itemsize)
    chunk = example_chunk(B, n, accumulate, budget_for(device_type))
    method = convolution_method(weight, stride, padding, dilation, transposed, groups, positions)
    rounds = B if method == "loop" else -(-B // chunk)
    per_round = math.prod(weight[2:]) * 3 if method == "taps" else 12
    memory = n * accumulate * (1 if method == "loop" else chunk)
    work = Cost(2 * B * R * positions * n, read, memory, 10 + rounds * per_round)
    return {"per_example": work + Cost(cache_bytes=_accumulate_bytes(itemsize) * B * n)}


def reduction_paths(B: int, T: int, N: int, itemsize: int) -> dict[str, Cost]:
    """Gradient [N] and norms [B] of a sum over examples and positions of [B, T, N] (bias, norm scale and shift).

    "materialise"  partial sums [B, N] in the graph, then their sum and their squares
    """
    partial = B * N * _accumulate_itemsize(itemsize)
    return {"materialise": Cost(0, itemsize * B * T * N + 3 * partial, partial, calls=3)}


def tied_paths(B: int, S: int, T: int, D: int, V: int, itemsize: int, device_type: str = "cpu") -> dict[str, Cost]:
    """Gradient [V, D] and norms [B] of a table used as embedding (ids [B, S]) and as head (x [B, T, D], h [B, T, V]).

    "tied"  both plain gradients and the op ``tied_sq_norm``
    """
    plain = plain_matmul(B, 1, T, D, V, itemsize) + Cost(bytes=itemsize * (B * S * D + 2 * V * D), calls=2)
    accumulate = _accumulate_itemsize(itemsize)
    rounded = device_type == "cpu" and itemsize < accumulate
    if head_method(T, D, V, rounded) == "ghost":
        head = _ghost(B, 1, T, D, V, itemsize, device_type)
    else:
        head = Cost(flops=plain.flops) + _chunked(B, 1, D, V, itemsize, device_type)
    picked = B * S * T * accumulate
    cross = Cost(0, 0, min(picked, budget_for(device_type)), 12, 2 * B * S * T * D, 4 * picked)
    return {"tied": plain + head + _segments(B, S, D, itemsize, device_type) + cross}


def _materialise(B: int, E: int, T: int, I: int, O: int, itemsize: int, device_type: str) -> Cost:
    """Products are written once and read twice: Inductor does not fuse two reductions of [B, I, O] into one loop."""
    plain = plain_matmul(B, E, T, I, O, itemsize)
    memory = B * E * I * O * itemsize
    cached = memory <= budget_for(device_type)
    bytes = 0 if cached else 3 * memory
    return plain + Cost(0, bytes, memory, 2, 0, 3 * memory if cached else 0)


def _chunked(B: int, E: int, I: int, O: int, itemsize: int, device_type: str) -> Cost:
    """What ``mm_sq_norm`` adds to its multiplies."""
    accumulate = _accumulate_itemsize(itemsize)
    tiles = matmul_tiles(B, E, I, O, accumulate, budget_for(device_type))
    calls = tiles.calls(B, E, I, O)
    tile = tiles.examples * tiles.contractions * tiles.rows * tiles.columns
    memory = tile * (accumulate + (itemsize if itemsize < accumulate else 0)) + E * I * O * accumulate
    return Cost(0, 0, memory, 18 + 12 * calls, 0, _accumulate_bytes(itemsize) * B * E * I * O)


def _ghost(B: int, E: int, T: int, I: int, O: int, itemsize: int, device_type: str) -> Cost:
    """What ``ghost_sq_norm`` costs."""
    accumulate = _accumulate_itemsize(itemsize)
    tiles = gram_tiles(B, E, T, accumulate, budget_for(device_type))
    calls = tiles.calls(B, E, T)
    blocks = -(-T // tiles.positions)
    entries = B * E * T * T * (blocks + 1) / (2 * blocks)
    upcast = device_type == "cpu" and itemsize < accumulate
    read = B * E * T * (I + O) * (blocks + 1) / 2
    memory = 2 * tiles.examples * tiles.contractions * tiles.positions**2 * accumulate
    cache_bytes = 4 * accumulate * entries + (read * (itemsize + 2 * accumulate) if upcast else 0)
    bytes = 0 if upcast else read * itemsize
    return Cost(0, bytes, memory, 12 + calls * (20 if upcast else 8), 2 * entries * (I + O), cache_bytes)


def _segments(B: int, T: int, D: int, itemsize: int, device_type: str) -> Cost:
    """What ``embedding_sq_norm`` costs: upcast, zero, scatter and square rows, and a sort of ids."""
    accumulate = _accumulate_itemsize(itemsize)
    chunk = example_chunk(B, T * D, accumulate, 2 * budget_for(device_type))
    rounds = -(-B // chunk)
    rows = B * T * D
    return Cost(0, itemsize * rows, 2 * chunk * T * D * accumulate, 4 + 18 * rounds, 0, 6 * rows * accumulate)


def _accumulate_itemsize(itemsize: int) -> int:
    return max(itemsize, 4)


def _accumulate_bytes(itemsize: int) -> int:
    """Per element of a product: write, read to square, read to add, total read and written; a copy if rounded."""
    accumulate = _accumulate_itemsize(itemsize)
    return 5 * accumulate + (2 * itemsize if itemsize < accumulate else 0)
