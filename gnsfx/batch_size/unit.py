"""The batch sizes that are possible: micro_batch examples on each of world_size ranks, accumulation times.

batch size = micro_batch * world_size * accumulation            accumulation = 1, 2, 3, ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from gnsfx.errors import OptionError


@dataclass(frozen=True, slots=True)
class BatchUnit:
    """The smallest possible batch, of which all others are multiples. Everything in examples, over all ranks."""

    micro_batch: int
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("micro_batch", "world_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name}={value!r}: expected a positive whole number.")

    @staticmethod
    def of(micro_batch: int, world_size: int | None, group: Any = None) -> BatchUnit:
        """With world_size None: the ranks of ``group``, or of the default group, or 1 where there is none."""
        if world_size is None:
            running = dist.is_available() and dist.is_initialized()
            world_size = dist.get_world_size(group) if running else 1
        return BatchUnit(micro_batch, world_size)

    @property
    def size(self) -> int:
        """Examples in one micro-batch of every rank."""
        return self.micro_batch * self.world_size

    def __str__(self) -> str:
        return f"{self.size} examples (micro_batch {self.micro_batch} x world_size {self.world_size})"

    def floor(self, batch: float) -> int:
        """The largest multiple up to ``batch``; 0 if there is none."""
        return math.floor(batch / self.size) * self.size

    def ceil(self, batch: float) -> int:
        """The smallest multiple from ``batch`` on, at least one unit."""
        return max(math.ceil(batch / self.size), 1) * self.size

    def nearest(self, batch: float, low: int, high: int) -> int:
        """The multiple closest to ``batch`` among those from ``low`` to ``high``; of two, the larger."""
        return min(max(math.floor(batch / self.size + 0.5) * self.size, low), high)

    def accumulation(self, batch: int) -> int:
        """Micro-batches that each rank runs for this batch."""
        return batch // self.size

    def check(self, batch: Any, what: str) -> int:
        """``batch`` itself, if it is possible.

        Raises:
            OptionError: naming the nearest possible values.
        """
        if isinstance(batch, bool) or not isinstance(batch, int | float) or not math.isfinite(batch) or batch <= 0:
            raise OptionError(f"{what}: got {batch!r}, expected a positive number of examples.")
        if batch % self.size:
            raise OptionError(f"{what}: {batch:g} is no multiple of {self}. {self._nearest_values(batch, batch)}")
        return int(batch)

    def inside(self, low: Any, high: Any, what: str) -> tuple[int, int]:
        """The smallest and the largest possible batch from ``low`` to ``high``.

        Raises:
            OptionError: there is none, naming the nearest; or the bounds are not 0 < low <= high.
        """
        numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in (low, high))
        if not (numbers and 0 < low <= high):
            raise OptionError(f"{what}: got {low!r} and {high!r}, expected examples with 0 < low <= high.")
        lowest, highest = self.ceil(low), self.floor(high)
        if lowest > highest:
            raise OptionError(
                f"{what}: no multiple of {self} lies from {low:g} to {high:g}. {self._nearest_values(low, high)}"
            )
        return lowest, highest

    def _nearest_values(self, low: float, high: float) -> str:
        below, above = self.floor(low), self.ceil(high)
        values = f"{below} and {above}" if below else f"{above}"
        return f"Nearest possible: {values}; or choose another micro_batch."
