"""The seed of the random numbers of one call of a graph that estimates, apart from everybody else's generators.

A sequence of its own for each rank, the same in every run of a program, and no state of PyTorch, NumPy or ``random`` is
read or advanced. It is not saved with a run: an estimate is unbiased whatever was drawn before, so one that goes on from a
checkpoint may start the sequence again.
"""

from __future__ import annotations

import functools
import random

import torch
import torch.distributed as dist
from torch import Tensor

from gnsfx._torch import never_trace

never_trace(__name__)


def draw_seed(device: torch.device) -> Tensor:
    """0-d int64 below 2^32, on the device, without a copy from the host to wait for."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return torch.full((), _sequence(rank).getrandbits(32), dtype=torch.int64, device=device)


@functools.cache
def _sequence(rank: int) -> random.Random:
    return random.Random(rank)
