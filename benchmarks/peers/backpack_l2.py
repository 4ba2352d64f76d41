"""BackPACK's BatchL2Grad: hooks on modules, squared norms of the contributions as ``p.batch_l2`` [B]."""

from __future__ import annotations

from backpack import backpack, extend  # pyright: ignore[reportMissingImports]
from backpack.extensions import BatchL2Grad  # pyright: ignore[reportMissingImports]
from torch import Tensor

from benchmarks.models import Case, loss_of
from benchmarks.peers import Measure


def prepare(case: Case) -> Measure:
    module = extend(case.module)
    names = {parameter: name for name, parameter in module.named_parameters()}

    def measure(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with backpack(BatchL2Grad()):
            loss_of(module(inputs), targets).backward()
        norms = {name: p.batch_l2 for p, name in names.items() if hasattr(p, "batch_l2")}
        for parameter in names:
            if hasattr(parameter, "batch_l2"):
                del parameter.batch_l2
        return norms

    return measure
