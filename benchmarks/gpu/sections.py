"""The sections, and one of them run: case by case, each a row of plain JSON the moment it is there.

cases --run--> rows, and at last {"end": error, warnings, seconds}
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu import ahead, correctness, device, norms, products, sanitizer, steps, training
from benchmarks.gpu.bench import Bench, Cases, Row

Keep = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Section:
    """``turn``: sections of the same turn run at the same time, which those that take times cannot.

    ``share``: of the whole time, until the turn is over. ``judged``: whether it is trouble if something is left out.
    """

    title: str
    module: ModuleType
    turn: int
    share: float
    judged: bool = True


SECTIONS = {
    "device": Section("The machine's ceilings", device, 0, 0.05),
    "correctness": Section("Ops next to fp64", correctness, 1, 0.25),
    "training": Section("Training steps next to per-example autograd in fp64", training, 1, 0.25),
    "ahead": Section("Compiling ahead", ahead, 1, 0.25, judged=False),
    "norms": Section("Backward of norm layers", norms, 2, 0.18),
    "products": Section("Weight gradients with norms", products, 3, 0.14),
    "steps": Section("Step time next to plain torch.compile", steps, 4, 0.38),
}
SANITIZER = Section("compute-sanitizer", sanitizer, 0, 1)
ALL = {**SECTIONS, "sanitizer": SANITIZER}


class Lost(Exception):
    """The GPU is lost to this process, as it is after an access that was not allowed."""


def run(name: str, bench: Bench, seconds: float, keep: Keep) -> None:
    """Every case of a section, until they are done, or the seconds are over, or the GPU is lost."""
    begin, left_out, error = time.monotonic(), 0, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            cases: Cases = ALL[name].module.cases(bench)
            for case, function in cases:
                if time.monotonic() - begin > seconds:
                    left_out += 1
                    continue
                keep(row := run_case(name, case, function))
                if bench.cuda and "failed" in row:
                    see_whether_lost(row["failed"])
        except Exception as trouble:
            traceback.print_exc()
            error = f"{type(trouble).__name__}: {first_line(trouble)}"
    if left_out and not error:
        error = f"out of time: {left_out} of its cases were left out"
    told = sorted({f"{w.category.__name__}: {w.message}"[:300] for w in caught})
    keep({"end": error, "warnings": told, "seconds": round(time.monotonic() - begin, 1)})


def run_case(name: str, case: str, function: Callable[[], Row]) -> dict[str, Any]:
    begin = time.monotonic()
    try:
        row = {"case": case, "right": True, **function()}
    except Exception as trouble:
        traceback.print_exc()
        row = {"case": case, "right": False, "failed": f"{type(trouble).__name__}: {first_line(trouble)}"}
    common.note(f"  {name}  {case}  {time.monotonic() - begin:.1f} s{'' if row['right'] else '  WRONG'}")
    return common.plain(row)


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]


def see_whether_lost(reason: str) -> None:
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:  # whatever the driver says
        raise Lost(f"the GPU was lost in the middle of a case: {reason}") from None
