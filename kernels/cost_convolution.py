"""What the gradient of a convolution's weight and its norms cost: :mod:`gnsfx.kernels.cost` has the terms.

Our own C++ kernel squares the product of one example in registers, as ``mm_sq_norm``. Without it the op picks one of four
ways (:func:`gnsfx.kernels.tiling.convolution_method`), all of which hold products of a chunk of examples.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from gnsfx.kernels.cost import NATIVE_SCRATCH, Cost, accumulate_bytes, accumulate_itemsize
from gnsfx.kernels.tiling import FEW_CHANNELS, budget_for, convolution_method, example_chunk

DEPTHWISE_SUMS = 16
"""In how many sums the kernel of depthwise convolutions adds examples up."""


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
    native: bool = False,
) -> dict[str, Cost]:
    """Gradient of ``weight`` and norms [B]; ``out`` is the grid that the kernel visits (a transposed one's input).

    "plain"        the gradient alone
    "convolution"  the op ``convolution_sq_norm``, which picks its own method; ``native`` if there is our own kernel
    """
    n, positions = math.prod(weight), math.prod(out)
    read = itemsize * B * R * positions * (weight[0] + weight[1] * groups)
    accumulate = accumulate_itemsize(itemsize)
    chunk = example_chunk(B, n, accumulate, budget_for(device_type))
    method = convolution_method(weight, stride, padding, dilation, transposed, groups, positions)
    rounds = B if method == "loop" else -(-B // chunk)
    per_round = math.prod(weight[2:]) * 3 if method == "taps" else 12
    memory = n * accumulate * (1 if method == "loop" else chunk)
    plain = Cost(2 * B * R * positions * n, read, 0, 1)
    if native and len(out) <= 2 and itemsize <= 4:  # in registers, as mm_sq_norm
        few = groups > 1 and weight[1] <= FEW_CHANNELS
        sums, calls = (n * min(B, DEPTHWISE_SUMS), 1) if few else (n, groups)
        own = replace(plain, flops=0, fused_flops=plain.flops, memory=NATIVE_SCRATCH + accumulate * sums, calls=calls)
        return {"plain": plain, "convolution": own if itemsize == 4 else plain + own}
    squares = Cost(memory=memory, calls=10 + rounds * per_round, cache_bytes=accumulate_bytes(itemsize) * B * n)
    return {"plain": plain, "convolution": plain + squares}
