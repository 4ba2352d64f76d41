"""Opacus: hooks on modules keep every contribution as ``p.grad_sample`` [B, ...]; its norms are taken from there."""

from __future__ import annotations

from typing import Any

from opacus import GradSampleModule  # pyright: ignore[reportMissingImports]
from torch import Tensor

from benchmarks.models import Case, loss_of
from benchmarks.peers import Measure


def prepare_hooks(case: Case, force_functorch: bool = False) -> Measure:
    names: dict[Any, str] = {parameter: name for name, parameter in case.module.named_parameters()}
    module = GradSampleModule(case.module, loss_reduction="mean", force_functorch=force_functorch)

    def measure(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        loss_of(module(inputs), targets).backward()
        B, norms = len(inputs), {}
        for parameter, name in names.items():
            if parameter.grad_sample is not None:
                norms[name] = parameter.grad_sample.flatten(1).square().sum(1) / B**2
                parameter.grad_sample = None
        return norms

    return measure


def prepare_functorch(case: Case) -> Measure:
    return prepare_hooks(case, force_functorch=True)
