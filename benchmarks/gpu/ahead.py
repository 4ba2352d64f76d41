"""Beside sections 2 and 3, which take no times: compiling what section 6 runs, so that it finds most of it in Inductor's cache.

Seconds are those of the first step, while other processes compile too. Which of several kernels is the fastest is found out
again later, where nothing else runs.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from benchmarks import common
from benchmarks.gpu import steps
from benchmarks.gpu.bench import Bench, Cases, Row
from benchmarks.step_time import AGAIN

COLUMNS: tuple[common.Column, ...] = (
    ("model, variant", lambda row: row["case"]),
    ("seconds", lambda row: f"{row['seconds']:.0f}" if "seconds" in row else ""),
)


def cases(bench: Bench) -> Cases:
    for run in steps.runs(bench):
        for variant in steps.VARIANTS:
            if variant != AGAIN:
                yield f"{run.name}, {variant}", partial(first_step, bench, run, variant)


def first_step(bench: Bench, run: steps.Run, variant: str) -> Row:
    torch.compiler.reset()
    steps.allocated(bench)  # what the case before held is given back to the device: others work on it
    case, setting = steps.prepared(bench, run)
    begin = time.perf_counter()
    with steps.tuned_anew():
        steps.once(steps.make(case, variant, setting))
    common.synchronise(setting.device)
    return {"seconds": time.perf_counter() - begin}
