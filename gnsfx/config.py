"""The ``gns.*`` options, one frozen value per compile, and the environment switch for debugging."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from gnsfx.errors import OptionError

Selection = Literal["all", "norm"] | Callable[[str, Any], bool]


@dataclass(frozen=True, slots=True)
class Options:
    """What ``options={"gns.<name>": value}`` and ``gnsfx.compile(<name>=value)`` take.

    params: which parameters to measure: ``"all"``, ``"norm"`` (scales and shifts of normalisation layers), or a
        callable ``(name, parameter) -> bool``.
    per_example: keep the vector of per-example squared norms of every parameter, not only its sum.
    elementwise: keep, for parameters of up to 131,072 numbers, the sum over examples of the squares of every single
        number, where measuring their norms makes the contributions apart: scales, shifts, biases, position rows, and
        weights of layers that see one position per example. For ``gnsfx.collector.elementwise_sq_sums``.
    strict: raise :class:`gnsfx.errors.RefusedError` while compiling if a selected parameter cannot be measured exactly.
    inner: ``"inductor"``, or ``"eager"``, which runs the rewritten graph without code generation.
    path: force one path (``"materialise"``, ``"fused"``, ``"ghost"``) wherever it applies, for tests and benchmarks.
    memory: cap, in bytes, on what the measurement of a parameter allocates at any one time beside its gradient. None: 3% of
        what the step holds (parameters, gradients, saved activations), but at least 4 MiB. The planner takes the quickest
        path under it; coverage gives as reason where no path does with so little.
    budget: share of the step's time that measuring may take, such as 0.01: what is cheap stays exact, the rest is estimated
        without bias, and coverage says so. None: everything is exact.
    """

    params: Selection = "all"
    per_example: bool = False
    elementwise: bool = False
    strict: bool = False
    inner: Literal["inductor", "eager"] = "inductor"
    path: Literal["auto", "materialise", "fused", "ghost"] = "auto"
    memory: int | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.params not in ("all", "norm") and not callable(self.params):
            _reject("params", self.params, '"all", "norm" or a callable (name, parameter) -> bool')
        for name in ("per_example", "elementwise", "strict"):
            if not isinstance(getattr(self, name), bool):
                _reject(name, getattr(self, name), "True or False")
        if self.inner not in ("inductor", "eager"):
            _reject("inner", self.inner, '"inductor" or "eager"')
        if self.path not in ("auto", "materialise", "fused", "ghost"):
            _reject("path", self.path, '"auto", "materialise", "fused" or "ghost"')
        whole = isinstance(self.memory, int) and not isinstance(self.memory, bool) and self.memory >= 0
        if self.memory is not None and not whole:
            _reject("memory", self.memory, "a number of bytes, or None")
        number = isinstance(self.budget, (int, float)) and not isinstance(self.budget, bool)
        if self.budget is not None and not (number and 0 < self.budget < math.inf):
            _reject("budget", self.budget, "a share of the step's time, such as 0.01, or None")


def _reject(name: str, value: Any, expected: str) -> None:
    raise OptionError(f"gns.{name}={value!r}: expected {expected}.")


def known_options() -> list[str]:
    return [f"gns.{field.name}" for field in fields(Options)]


def split_options(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Split the ``options`` of ``torch.compile`` into ours and Inductor's.

    Raises:
        OptionError: a ``gns.*`` option that does not exist, or a value it does not take.
    """
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for key, value in (options or {}).items():
        (ours if key.startswith("gns.") else inductor)[key] = value
    unknown = sorted(set(ours) - set(known_options()))
    if unknown:
        raise OptionError(f"unknown option {', '.join(unknown)}; the options are {', '.join(known_options())}.")
    return replace(Options(), **{key.removeprefix("gns."): value for key, value in ours.items()}), inductor


def debug_level() -> int:
    """GNSFX_DEBUG: 1 prints coverage of every compiled graph, 2 also pass times, 3 also the graphs before and after."""
    return int(os.environ.get("GNSFX_DEBUG", "0") or 0)
