"""One program, compiled and compared with per-example autograd in fp64."""

from __future__ import annotations

import copy
import linecache
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gnsfx import collector
from gnsfx.coverage import coverage
from tests import oracle
from tests.programs.generate import Program

Norms = dict[str, Tensor]
HUGE = 1e8
SPREAD = 16
"""A measured number may be this much farther from the truth than another legitimate computation of it."""


@dataclass
class Outcome:
    """``kind``: "clean", "wrong" (a norm), "gradient", "error" (an exception), "skipped" (not finite), "invalid" (the program), or
    "torch": PyTorch's own compiler, without gnsfx, fails, gives another gradient than eager mode, or rounds as badly."""

    seed: int
    kind: str = "clean"
    detail: str = ""
    parameters: int = 0
    measured: int = 0
    coupled: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Truth:
    norms: Norms
    grads: Norms
    scale: float
    """The largest square of a gradient or loss: what is smaller by the square of the precision is rounding."""


def check(program: Program, inner: str = "eager") -> Outcome:
    start = time.perf_counter()
    outcome = Outcome(program.seed)
    linecache.cache[f"<program {program.seed}>"] = (0, None, program.source.splitlines(keepends=True), "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _check(program, outcome, inner)
        except Exception as error:
            outcome.kind, outcome.detail = "invalid", f"{type(error).__name__}: {error}"[:600]
    linecache.cache.pop(f"<program {program.seed}>", None)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _check(program: Program, outcome: Outcome, inner: str) -> None:
    model, inputs = program.build(), program.data()
    lower(model, inputs, program.dtype)
    exact = truth(*in_double(model, inputs))
    largest = max((float(g.abs().max()) for g in exact.grads.values()), default=0.0)
    if not largest < HUGE:
        outcome.kind = "skipped"
        return
    outcome.coupled = program.coupled or interacts(program, *in_double(model, inputs))
    less = single(model, inputs) if program.dtype is torch.float64 else None
    apart = spread(exact, second_opinion(program, model, inputs), less)
    outcome.parameters = len(exact.norms)
    try:
        loss = train(program, model, program.marked(inputs), inner)
        loss.backward()
        rows = {row.name: row for row in coverage(model)}
        norms = collector.per_example_sq_norms(model) if any(r.status == "measured" for r in rows.values()) else {}
    except Exception as error:
        outcome.kind = "error" if plain_runs(program, model, inputs) else "torch"
        outcome.detail = f"{type(error).__name__}: {error}"[-1500:]
        return
    off = wrong(program, model, rows, norms, exact, apart[0])
    different = gradients_off(program, model, exact, apart[1])
    if off:
        outcome.kind, outcome.detail = "wrong", "; ".join(off)
    elif different:
        outcome.kind, outcome.detail = "gradient", "; ".join(different)
    if off and not different and same_rounding(program, model, inputs, norms):
        outcome.kind = "torch"
    elif off or different:
        train(program, model, program.marked(inputs), None).backward()
        outcome.kind = "torch" if gradients_off(program, model, exact, apart[1]) else outcome.kind
    dead = {n for n, t in exact.norms.items() if not t.any()}
    kept = [
        r
        for r in rows.values()
        if r.status in ("measured", "unused") or (r.status == "not compiled" and r.name in dead)
    ]
    outcome.measured = len(kept)
    outcome.refused = {r.name: r.reason for r in rows.values() if r not in kept}
    if any(not reason for reason in outcome.refused.values()):
        outcome.kind, outcome.detail = "error", "a parameter is refused without a reason"


def train(program: Program, model: nn.Module, inputs: list[Tensor], inner: str | None) -> Tensor:
    """The loss of a step; without ``inner`` the same decompositions and nothing of gnsfx."""
    torch._dynamo.reset()
    model.zero_grad()
    if inner is None:
        compiled = torch.compile(model, backend="aot_eager_decomp_partition", dynamic=program.dynamic)
    else:
        options = {"gns.inner": inner, "gns.per_example": True, "gns.path": program.path}
        compiled = torch.compile(model, backend="gns", dynamic=program.dynamic, options=options)
    with casting(program):
        out = compiled(*inputs)
        if program.ends == "body":
            return model.loss(out, *inputs)  # type: ignore[operator]
        return out.sum() if program.ends == "each" else out


def plain_runs(program: Program, model: nn.Module, inputs: list[Tensor]) -> bool:
    try:
        train(program, model, program.marked(inputs), None).backward()
    except Exception:
        return False
    return True


def casting(program: Program) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if program.autocast else nullcontext()


def lower(model: nn.Module, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Parameters, buffers and inputs in the dtype of the program."""
    model.to(dtype)
    inputs[:] = [x.to(dtype) if x.is_floating_point() else x for x in inputs]


def in_double(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[nn.Module, list[Tensor]]:
    return copy.deepcopy(model).double(), [x.double() if x.is_floating_point() else x for x in inputs]


def truth(model: nn.Module, inputs: Sequence[Tensor]) -> Truth:
    each = contributions(model, inputs)
    norms = oracle.per_example_sq_norms(model, each, torch.ones_like(each))
    parameters = trainable(model)
    grads = torch.autograd.grad(each.sum(), list(parameters.values()), allow_unused=True)
    filled = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}
    scale = max([float(t.max()) for t in norms.values()] + [float(each.detach().abs().max()) ** 2])
    return Truth(norms, filled, scale)


def contributions(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    return model.each(model.body(*inputs), *inputs)  # type: ignore[operator]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def second_opinion(program: Program, model: nn.Module, inputs: Sequence[Tensor]) -> Truth:
    """The same numbers in the dtype of the program, after a change by as much as rounding."""
    size = torch.finfo(program.dtype).eps if coarse(program) else oracle.tolerance(program.dtype)

    def moved(x: Tensor) -> Tensor:
        return (
            x * (1 + size * (2 * torch.rand(x.shape, dtype=torch.float64) - 1)).to(x.dtype)
            if x.is_floating_point()
            else x
        )

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(moved(p))
    with casting(program):
        return truth(twin, [moved(x) for x in inputs])


def same_rounding(program: Program, model: nn.Module, inputs: list[Tensor], norms: Norms) -> bool:
    """Whether the graph without gnsfx, run backward for one example at a time, is as far from the truth: the program is ill-conditioned."""
    torch._dynamo.reset()
    body = torch.compile(lambda *xs: model.body(*xs), backend="aot_eager_decomp_partition")  # type: ignore[operator]
    with casting(program):
        each = model.each(body(*inputs), *inputs)  # type: ignore[operator]
    plain = oracle.per_example_sq_norms(model, each, torch.ones_like(each))
    bound = oracle.tolerance(torch.bfloat16, terms=16) if coarse(program) else oracle.tolerance(program.dtype)
    return (
        oracle.names_beyond({n: norms[n].double() for n in norms}, {n: plain[n].double() for n in norms}, bound) == []
    )


def single(model: nn.Module, inputs: Sequence[Tensor]) -> Truth:
    model, inputs = copy.deepcopy(model), list(inputs)
    lower(model, inputs, torch.float32)
    return truth(model, inputs)


def spread(exact: Truth, other: Truth, less: Truth | None) -> tuple[dict[str, float], dict[str, float]]:
    """How far legitimate computations of the norms and of the gradients are apart.

    Beside the second opinion, for fp64 the error of fp32 shrunk by the precision that it lacks: rounding inside the network.
    """
    shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps

    def apart(a: Norms, b: Norms, c: Norms | None) -> dict[str, float]:
        found = {n: float((a[n] - b[n].double()).abs().max()) for n in a}
        return found if c is None else {n: found[n] + shrink * float((a[n] - c[n].double()).abs().max()) for n in a}

    return apart(exact.norms, other.norms, less and less.norms), apart(exact.grads, other.grads, less and less.grads)


def interacts(program: Program, model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether the contribution of an example changes with the inputs of the first one."""
    changed = [x.clone() for x in inputs]
    for x, other, i in zip(changed, program.data(2), program.inputs, strict=True):
        if i.name[0] in "xi":
            x.select(i.batch or 0, 0).copy_(other.select(i.batch or 0, 0))
    with torch.no_grad():
        before, after = (contributions(copy.deepcopy(model), x) for x in (inputs, changed))
    return not torch.allclose(before[1:], after[1:], rtol=1e-9, atol=1e-12)


def wrong(
    program: Program, model: nn.Module, rows: dict, norms: Norms, exact: Truth, spread: dict[str, float]
) -> list[str]:
    """Measured parameters that differ from the truth by more than rounding."""
    bound = unit(program)
    floor = bound * exact.scale * bound
    off = []
    sums = collector.sq_norms(model) if norms else {}
    for name, expected in exact.norms.items():
        if rows[name].status == "unused" and float(expected.max()) > floor:
            off.append(f"{name} is said to be unused: {expected.tolist()}")
        if rows[name].status != "measured":
            continue
        if name not in norms:
            off.append(f"{name} is said to be measured and is not")
            continue
        found = norms[name].double()
        allowed = bound * float(expected.max()) + floor + SPREAD * spread[name]
        error = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
        total = abs(float(sums[name].double()) - float(expected.sum()))
        if not (error <= allowed and total <= allowed * max(len(expected), 1)):
            off.append(
                f"{name} ({rows[name].operation}, {rows[name].path}): {found.tolist()} is not {expected.tolist()}"
            )
    return off


def gradients_off(program: Program, model: nn.Module, exact: Truth, spread: dict[str, float]) -> list[str]:
    bound = unit(program)
    largest = max(exact.scale**0.5, max((float(g.abs().max()) for g in exact.grads.values()), default=0.0))
    off = []
    for name, p in trainable(model).items():
        expected = exact.grads[name]
        found = torch.zeros_like(expected) if p.grad is None else p.grad.double()
        error = float((found - expected).abs().max())
        if not error <= bound * largest + SPREAD * spread[name]:
            off.append(f"{name}: off by {error:.2e} beside {largest:.2e}")
    return off


def coarse(program: Program) -> bool:
    """Whether single operations round by more than the bound of :func:`oracle.tolerance` is made for."""
    return program.autocast or program.dtype is torch.bfloat16


def unit(program: Program) -> float:
    return oracle.tolerance(torch.bfloat16, terms=256) if coarse(program) else oracle.tolerance(program.dtype)
