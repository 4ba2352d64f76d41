"""What each way to a gradient and its per-example norms costs, from shapes alone, and which is cheapest.

Every ``*_paths`` function returns TOTAL costs: the ordinary gradient of the parameter (one matrix multiply, one
convolution, one scatter) is part of each path, so paths compare with each other and with ``plain_matmul``. Sizes are
plain ints; whoever has symbolic ones passes hints.

Times are sums over resources, not their maximum: the kernels of a path run one after the other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch

from gnsfx.kernels.machine import CUDA_KERNELS, Machine
from gnsfx.kernels.tiling import FEW_POSITIONS, budget_for, example_chunk, gram_tiles, matmul_tiles


@dataclass(frozen=True)
class Cost:
    """Work and memory of one path.

    flops: of matrix multiplies in the dtype of the model; other arithmetic hides behind its bytes.
    accumulate_flops: the same in fp32 or fp64 (Grams of bf16, for one). fused_flops: the same in our own kernel.
    operands, results: bytes that these multiplies read and write.
    bytes: through memory; cache_bytes: through a buffer that stays in the cache.
    calls: torch operations dispatched. memory: what is allocated beyond inputs and gradient.
    The last seven are of our CUDA kernels, each at the constant of the machine of its name: kernels/cost_cuda.py.
    """

    flops: float = 0
    bytes: float = 0
    memory: float = 0
    calls: float = 0
    accumulate_flops: float = 0
    cache_bytes: float = 0
    fused_flops: float = 0
    operands: float = 0
    results: float = 0
    large_flops: float = 0
    small_flops: float = 0
    reduce_flops: float = 0
    gram_flops: float = 0
    small_gram_flops: float = 0
    squares: float = 0
    reduce_bytes: float = 0

    @property
    def multiplied(self) -> float:
        """FLOPs of all matrix multiplies, whoever does them."""
        return sum(getattr(self, f.name) for f in fields(Cost) if f.name.endswith("flops"))

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other: work adds up, memory is the larger of the two."""
        both = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)}
        return Cost(**both | {"memory": max(self.memory, other.memory)})


def amounts(cost: Cost, machine: Machine, dtype: torch.dtype) -> dict[str, float]:
    """Work by the constant of the machine that it is done at: seconds are the sum of amount / constant."""
    own = {torch.float64: "flops_fp64", torch.float32: "flops_fp32"}.get(dtype, "flops_bf16")
    if dtype == torch.float16 and not machine.mixed_matmul:  # a CPU has units for bf16 only
        own = "flops_fp32"
    accumulate = own if machine.mixed_matmul or own != "flops_bf16" else "flops_fp32"
    work = {own: cost.flops, own.replace("flops", "fused"): cost.fused_flops}
    work[accumulate] = work.get(accumulate, 0) + cost.accumulate_flops
    work |= {name: amount for name in CUDA_KERNELS if (amount := getattr(cost, name))}
    return work | {
        "operand_bytes": cost.operands,
        "result_bytes": cost.results,
        "bandwidth": cost.bytes,
        "cache_bandwidth": cost.cache_bytes,
        "calls": cost.calls,
        "fresh_bandwidth": cost.memory if cost.memory > machine.reused_bytes else 0,
    }


KINDS = {"calls": "calls", "fresh_bandwidth": "memory", "squares": "flops"}
"""Of the constants; what is not here is "flops" or "bytes" by its name."""


def parts(cost: Cost, machine: Machine, dtype: torch.dtype) -> dict[str, float]:
    """Seconds by what they are spent on: "flops", "bytes" (through memory, cache and multiplies), "calls", "memory" (new pages)."""
    spent: dict[str, float] = dict.fromkeys(("flops", "bytes", "calls", "memory"), 0.0)
    for name, amount in amounts(cost, machine, dtype).items():
        if amount:
            kind = KINDS.get(name, "flops" if "flops" in name or name.startswith("fused") else "bytes")
            spent[kind] += amount / getattr(machine, name)
    return spent


def seconds(cost: Cost, machine: Machine, dtype: torch.dtype) -> float:
    """Time of a path on a machine, for a model of this dtype."""
    return sum(parts(cost, machine, dtype).values())


def bound(cost: Cost, machine: Machine, dtype: torch.dtype) -> str:
    """What most of the time is spent on: a key of ``parts``."""
    spent = parts(cost, machine, dtype)
    return max(spent, key=lambda name: spent[name])


def cheapest(paths: Mapping[str, Cost], machine: Machine, dtype: torch.dtype, memory_cap: float = math.inf) -> str:
    """Name of the quickest path that allocates at most ``memory_cap`` bytes; of the smallest one if none does."""
    allowed = {name: cost for name, cost in paths.items() if cost.memory <= memory_cap}
    if not allowed:
        return min(paths, key=lambda name: paths[name].memory)
    return min(allowed, key=lambda name: seconds(allowed[name], machine, dtype))


LAST_CACHE = 32 << 20
"""Bytes of a stack that is still in some cache when it is read."""
NATIVE_SCRATCH = 3 << 19
"""Bytes in which our own kernel packs, of one thread."""
SQUARE_ROWS = 3
"""To square and add the products of one example takes our own kernel as long as so many positions more."""


def gemm(batch: int, M: int, N: int, K: int, itemsize: int) -> Cost:
    """[batch, M, K] times [batch, K, N]."""
    read, written = itemsize * batch * K * (M + N), itemsize * batch * M * N
    return Cost(flops=2 * batch * M * N * K, operands=read, results=written, calls=1)


def plain_matmul(B: int, E: int, T: int, I: int, O: int, itemsize: int) -> Cost:
    """The weight gradient [E, I, O] alone, without norms."""
    return gemm(E, I, O, B * T, itemsize)


def matmul_paths(
    B: int, E: int, T: int, I: int, O: int, itemsize: int, device_type: str = "cpu", native: bool = False
) -> dict[str, Cost]:
    """Gradient [E, I, O] and norms [B] of x [B, E, T, I], g [B, E, T, O]; the gradient alone under "plain".

    "outer"        T == 1: ||x_b||^2 ||g_b||^2 beside the plain matmul (E == 1, or a sum over E of such products)
    "materialise"  bmm to [B, E, I, O] in the graph, summed and squared by the inner compiler
    "fused"        the op ``mm_sq_norm``: one ``native`` kernel, or products in a buffer that stays in the cache
    "ghost"        the plain matmul and the op ``ghost_sq_norm``

    A gradient of 16 bits is not made of rounded products: "materialise", and "fused" without our own kernel, multiply twice.
    """
    plain = plain_matmul(B, E, T, I, O, itemsize)
    beside = plain if itemsize < 4 else Cost()
    paths = {"plain": plain}
    paths["materialise"] = beside + _materialise(B, E, T, I, O, itemsize, device_type)
    paths["fused"] = (Cost() if native else beside) + _fused(B, E, T, I, O, itemsize, device_type, native)
    few = native and 1 < T <= FEW_POSITIONS and itemsize >= 4
    paths["ghost"] = plain + (_few(B, E, T, I, O) if few else _ghost(B, E, T, I, O, itemsize, device_type))
    if T == 1:
        paths["outer"] = plain + Cost(bytes=itemsize * B * E * (I + O))
    return paths


def embedding_paths(B: int, T: int, D: int, V: int, itemsize: int, device_type: str = "cpu") -> dict[str, Cost]:
    """Gradient [V, D] and norms [B] of ids [B, T], g [B, T, D]; the gradient alone under "plain".

    "outer"     T == 1: no id can repeat, s_b = ||g_b||^2
    "segments"  the op ``embedding_sq_norm``
    """
    plain = Cost(bytes=itemsize * (B * T * D + 2 * V * D), calls=2)
    paths = {"plain": plain, "segments": plain + segments(B, T, D, itemsize, device_type)}
    if T == 1:
        paths["outer"] = plain + Cost(bytes=itemsize * B * D, calls=1)
    return paths


def reduction_paths(B: int, T: int, N: int, itemsize: int) -> dict[str, Cost]:
    """Gradient [N] and norms [B] of a sum over examples and positions of [B, T, N] (bias, norm scale and shift).

    "plain"      the sum alone
    "reduction"  partial sums [B, N] in the graph, then their sum and their squares
    """
    partial = B * N * accumulate_itemsize(itemsize)
    plain = Cost(bytes=itemsize * B * T * N, calls=1)
    return {"plain": plain, "reduction": plain + Cost(cache_bytes=3 * partial, memory=partial)}


def tied_rest(B: int, S: int, T: int, D: int, itemsize: int, device_type: str = "cpu") -> Cost:
    """What a table adds to its head (x [B, T, D]) when it is an embedding too (ids [B, S]): segments and ``tied_cross``."""
    picked = B * S * T * accumulate_itemsize(itemsize)
    scratch = min(picked, budget_for(device_type))
    cross = Cost(memory=scratch, calls=12, accumulate_flops=2 * B * S * T * D, cache_bytes=4 * picked)
    return segments(B, S, D, itemsize, device_type) + cross


def _materialise(B: int, E: int, T: int, I: int, O: int, itemsize: int, device_type: str) -> Cost:
    """Products are written once and read twice: Inductor does not fuse two reductions of [B, I, O] into one loop."""
    memory = B * E * I * O * itemsize
    passes = memory if itemsize < 4 else 2 * memory
    cached = memory <= LAST_CACHE
    read = Cost(cache_bytes=passes, calls=2) if cached else Cost(bytes=passes, calls=2)
    return gemm(B * E, I, O, T, itemsize) + read + Cost(memory=memory)


def _fused(B: int, E: int, T: int, I: int, O: int, itemsize: int, device_type: str, native: bool) -> Cost:
    """What ``mm_sq_norm`` costs in all."""
    accumulate = accumulate_itemsize(itemsize)
    if native:
        work = gemm(E, I, O, B * T, itemsize)
        flops = 2 * B * E * I * O * (T + SQUARE_ROWS)
        return replace(work, flops=0, fused_flops=flops, memory=NATIVE_SCRATCH + 512 * B * E, calls=2)
    tiles = matmul_tiles(B, E, I, O, accumulate, budget_for(device_type))
    calls = tiles.calls(B, E, I, O)
    tile = tiles.examples * tiles.contractions * tiles.rows * tiles.columns
    memory = tile * (accumulate + (itemsize if itemsize < accumulate else 0))
    squares = Cost(0, 0, memory, 10 + 4 * calls + B * E, 0, accumulate_bytes(itemsize) * B * E * I * O)
    return gemm(B * E, I, O, T, itemsize) + squares


def _ghost(B: int, E: int, T: int, I: int, O: int, itemsize: int, device_type: str) -> Cost:
    """What ``ghost_sq_norm`` costs."""
    accumulate = accumulate_itemsize(itemsize)
    tiles = gram_tiles(B, E, T, accumulate, budget_for(device_type))
    calls = tiles.calls(B, E, T)
    S = tiles.positions
    blocks = -(-T // S)
    pairs = blocks * (blocks + 1) // 2
    product = gemm(B * E * pairs, S, S, I, accumulate) + gemm(B * E * pairs, S, S, O, accumulate)
    upcast = device_type == "cpu" and itemsize < accumulate
    copied = product.operands * (1 + itemsize / accumulate) if upcast else 0.0
    memory = 2 * tiles.examples * tiles.contractions * S**2 * accumulate
    rest = Cost(memory=memory, calls=6 + calls * (12 if upcast else 5), cache_bytes=1.5 * product.results + copied)
    return replace(product, flops=0, accumulate_flops=product.flops, calls=0) + rest


def _few(B: int, E: int, T: int, I: int, O: int) -> Cost:
    """What ``ghost_sq_norm`` costs in our own kernel: half of the Grams, from factors in a cache."""
    return Cost(accumulate_flops=2 * B * E * T * T * (I + O), calls=3)


def gram(B: int, E: int, T: int, K: int, itemsize: int, device_type: str = "cpu") -> Cost:
    """What the op ``gram`` costs, for T of one block: [B, E, T, T] of x [B, E, T, K]."""
    accumulate = accumulate_itemsize(itemsize)
    product = gemm(B * E, T, T, K, accumulate)
    upcast = device_type == "cpu" and itemsize < accumulate
    copied = product.operands * (1 + itemsize / accumulate) if upcast else 0.0
    work = replace(product, flops=0, accumulate_flops=product.flops, calls=8 if upcast else 3)
    return work + Cost(memory=product.results, cache_bytes=copied)


def with_gram(B: int, E: int, T: int, K: int, itemsize: int, device_type: str = "cpu") -> Cost:
    """What the op ``gram_sq_norm`` costs: the Gram of the other factor [B, E, T, K], times the one that is there."""
    own = gram(B, E, T, K, itemsize, device_type)
    return own + Cost(cache_bytes=1.5 * own.results, calls=3)


def segments(B: int, T: int, D: int, itemsize: int, device_type: str) -> Cost:
    """What ``embedding_sq_norm`` costs in torch: upcast, zero, scatter and square rows, and a sort of ids.

    The C++ kernel takes less. Nothing is chosen by this number: lookups of several positions have no other path."""
    accumulate = accumulate_itemsize(itemsize)
    chunk = example_chunk(B, T * D, accumulate, 2 * budget_for(device_type))
    rounds = -(-B // chunk)
    rows = B * T * D
    return Cost(0, itemsize * rows, 2 * chunk * T * D * accumulate, 4 + 18 * rounds, 0, 6 * rows * accumulate)


def accumulate_itemsize(itemsize: int) -> int:
    return max(itemsize, 4)


def accumulate_bytes(itemsize: int) -> int:
    """Per element of a product: read to square, read to add, total read and written; a copy if rounded."""
    accumulate = accumulate_itemsize(itemsize)
    return 4 * accumulate + (2 * itemsize if itemsize < accumulate else 0)
