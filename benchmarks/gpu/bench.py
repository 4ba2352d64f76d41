"""What every section is given, and what it gives: cases, each a name and a function that returns a row.

section: Bench -> (name, () -> row) ...      a row with "right": False is a wrong number; one that raises is an error
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Row = Mapping[str, Any]
Cases = Iterator[tuple[str, Callable[[], Row]]]

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""What one rounding to the nearest may be off, as a part of the number."""


def sums(terms: int) -> float:
    """Room for the order in which so many fp32 numbers are added: rounding errors add up as a random walk does."""
    return 2.0**-18 + 2.0**-24 * terms**0.5


@dataclass(frozen=True)
class Bench:
    """``quick``: tiny sizes, to see that everything runs."""

    device: torch.device
    quick: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).to(dtype)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, device=self.device, generator=self.generator)


def error(found: Tensor, truth: Tensor) -> float:
    """Largest difference, as a part of the largest entry; infinite where one is not a number."""
    if found.shape != truth.shape:
        raise ValueError(f"shape {tuple(found.shape)}, expected {tuple(truth.shape)}")
    if not truth.numel():
        return 0.0
    off = (found.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-300)
    return off.nan_to_num(nan=float("inf")).item()


def judged(pairs: Mapping[str, tuple[Tensor, Tensor, float]]) -> dict[str, Any]:
    """What each of several results is off and may be -> the row of the worst."""
    off = {name: (error(found, truth), allowed) for name, (found, truth, allowed) in pairs.items()}
    worst = max(off, key=lambda name: off[name][0] / off[name][1])
    return {"worst": worst, "error": off[worst][0], "allowed": off[worst][1], "right": off[worst][0] <= off[worst][1]}
