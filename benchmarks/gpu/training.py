"""Section 3: whole training steps through Inductor next to per-example autograd in fp64.

norms        of every parameter and example: off by no more than what eager autograd, one example at a time and in the
             same dtype, makes of them when its own rounding errors are twice as large
gradients    no further from the truth than twice those of plain torch.compile, which are rounded elsewhere
"""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import gnsfx
from benchmarks import common, models
from benchmarks.gpu import calls, nets
from benchmarks.gpu.bench import UNIT, Bench, Cases, Row
from benchmarks.models import losses_of, training_of
from tests import oracle

SIZES = {
    "gpt2": {"batch": 5, "context": 80, "width": 128, "layers": 2, "heads": 2, "vocabulary": 512},
    "llama": {"batch": 5, "context": 80, "width": 128, "hidden": 352, "layers": 2, "heads": 2, "vocabulary": 512},
    "vit": {"batch": 5, "image": 36, "patch": 4, "width": 128, "layers": 2, "heads": 2, "classes": 16},
}
SMALL = {
    "gpt2": {"batch": 5, "context": 8, "width": 16, "layers": 1, "heads": 2, "vocabulary": 11},
}
TWICE = 2.0
"""How much larger another order of rounding may make an error of the same kind."""


@dataclass(frozen=True)
class Run:
    """``batches``: of how many examples each step is; the last one is looked at. ``hand``: RMSNorm written out."""

    name: str
    model: str
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = False
    mode: str | None = None
    dynamic: bool = False
    path: str = "auto"
    hand: bool = False
    batches: Sequence[int] = (5,)


RUNS = (
    Run("GPT", "gpt2"),
    Run("Llama", "llama"),
    Run("GPT, autocast", "gpt2", torch.float32, autocast=True),
    Run("GPT, CUDA graphs", "gpt2", mode="reduce-overhead", batches=(5, 5, 5, 5)),
    Run("GPT, dynamic batch", "gpt2", dynamic=True, batches=(5, 3, 4)),
    Run("Llama, RMSNorm by hand", "llama", hand=True),
    Run("GPT, fused", "gpt2", path="fused"),
    Run("GPT, ghost", "gpt2", path="ghost"),
    Run("ViT", "vit"),
    Run("GPT, fp32", "gpt2", torch.float32),
)
QUICK = RUNS[:1]

COLUMNS: tuple[common.Column, ...] = (
    ("model", lambda row: row["case"]),
    ("norms", lambda row: f"{row['norms']:.2f}" if "norms" in row else ""),
    ("gradients", lambda row: f"{row['gradients']:.2f}" if "gradients" in row else ""),
    ("roundings apart", lambda row: f"{row['apart']:.2f}" if "apart" in row else ""),
    ("kernels", lambda row: ", ".join(row.get("kernels") or ())),
    ("", lambda row: "" if row.get("right") else "WRONG"),
)
"""Norms and gradients as a part of what is allowed, of the worst parameter."""


def cases(bench: Bench) -> Cases:
    for run in QUICK if bench.quick else RUNS:
        if bench.cuda or run.mode is None:
            yield run.name, partial(check, bench, run)


def check(bench: Bench, run: Run) -> Row:
    torch.compiler.reset()
    gc.collect()
    case = nets.build(run.model, (SMALL if bench.quick else SIZES)[run.model], bench.device, run.dtype)
    module = nets.by_hand(case.module) if run.hand else case.module
    inputs, targets, last = case.inputs, case.targets, run.batches[-1]

    inner = "eager" if bench.quick else "inductor"
    plain = torch.compile(training_of(module), backend=models.ALIKE[inner], dynamic=run.dynamic)
    plain = step_of(module, bench, run, plain)
    plain(inputs[:last], targets[:last])
    beside = oracle.gradients(module)
    with calls.kernels_only():
        settings: dict[str, Any] = {"path": run.path, "mode": run.mode, "dynamic": run.dynamic, "inner": inner}
        ours = gnsfx.compile(training_of(module), per_example=True, **settings)
        step = step_of(module, bench, run, ours)
        for batch in run.batches:
            step(inputs[:batch], targets[:batch])
        found = {name: norms.clone() for name, norms in gnsfx.per_example_sq_norms(module).items()}
        gradients = oracle.gradients(module)
        kernels = calls.launched(bench, lambda: step(inputs[:last], targets[:last]))

    inputs, targets = inputs[:last], targets[:last]
    true = per_example(copy.deepcopy(module).double(), _double(inputs), targets, bench, autocast=False)
    eager = per_example(module, inputs, targets, bench, run.autocast)
    paths = Counter(row.path or row.status for row in gnsfx.coverage(module))
    expected = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    missing = sorted(set(expected) - found.keys())
    norms = {name: norms_off(found[name], true[name], eager[name]) for name in found}
    off = {name: gradient_off(gradients[name], beside[name], true[name].sum(0)) for name in expected}
    unit = UNIT[torch.bfloat16 if run.autocast else run.dtype]
    rounded = {name: _relative(gradients[name], beside[name]) / unit for name in expected}
    worst, further = max(norms, key=lambda n: norms[n]), max(off, key=lambda n: off[n])
    right = not missing and norms[worst] <= 1 and off[further] <= 1 and kernels != []
    return {
        "norms": norms[worst], "worst": worst, "gradients": off[further], "worst gradient": further,
        "apart": max(rounded.values()), "missing": missing, "kernels": kernels,
        "paths": dict(paths), "right": right,
    }  # fmt: skip


def step_of(
    module: nn.Module, bench: Bench, run: Run, training: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], None]:
    def step(inputs: Tensor, targets: Tensor) -> None:
        if run.mode:
            torch.compiler.cudagraph_mark_step_begin()
        module.zero_grad(set_to_none=True)
        with casting(bench, run.autocast):
            loss = training(inputs, targets)
        loss.backward()

    return step


def casting(bench: Bench, enabled: bool) -> Any:
    return torch.autocast(bench.device.type, torch.bfloat16, enabled=enabled)


def per_example(module: nn.Module, inputs: Tensor, targets: Tensor, bench: Bench, autocast: bool) -> dict[str, Tensor]:
    """Name -> [B, *shape] in fp64: what each example adds to the gradient, by eager autograd."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    with casting(bench, autocast):
        losses = losses_of(module(inputs), targets)
    rows = []
    for loss in losses / len(losses):
        rows.append([g.double() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def norms_off(found: Tensor, true: Tensor, eager: Tensor) -> float:
    """Largest error of squared norms as a part of what is allowed: (n + e)^2 - n^2 for errors e of twice eager's."""
    n, e = true.flatten(1).norm(dim=1), TWICE * (eager - true).flatten(1).norm(dim=1).max()
    allowed = 2 * n * e + e * e + oracle.tolerance(torch.float32) * n * n
    return _largest((found.double() - n * n).abs(), allowed)


def gradient_off(found: Tensor, plain: Tensor, true: Tensor) -> float:
    """Distance from the truth as a part of what is allowed."""
    allowed = TWICE * (plain.double() - true).norm() + oracle.tolerance(torch.float32) * true.norm()
    return _largest((found.double() - true).norm(), allowed)


def _largest(error: Tensor, allowed: Tensor) -> float:
    return (error / allowed.clamp(min=1e-300)).nan_to_num(nan=float("inf")).max().item()


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item()


def _double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs
