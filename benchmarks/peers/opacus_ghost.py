"""Opacus' ghost clipping: norms without contributions where it has a formula, one layer's contributions elsewhere.

Its first backward alone: the second, which clips, is not part of measuring.
"""

from __future__ import annotations

from typing import Any

from opacus.grad_sample import GradSampleModuleFastGradientClipping  # pyright: ignore[reportMissingImports]
from torch import Tensor

from benchmarks.models import Case, loss_of
from benchmarks.peers import Measure


def prepare(case: Case) -> Measure:
    names: dict[Any, str] = {parameter: name for name, parameter in case.module.named_parameters()}
    module = GradSampleModuleFastGradientClipping(
        case.module, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
    )

    def measure(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        loss_of(module(inputs), targets).backward()
        return {name: parameter._norm_sample.square() / len(inputs) ** 2 for parameter, name in names.items()}

    return measure
