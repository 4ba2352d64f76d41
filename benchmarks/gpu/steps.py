"""Section 6: whole training steps next to plain torch.compile, all variants in turns within one process.

    off     compiled by gnsfx, measuring(False)
    norm    norm layers alone
    all     every parameter

A step is forward, backward, noise.step(), fused AdamW and zero_grad; parameters and activations are bf16. "plain again" is
plain torch.compile once more: what it is away from 1 is the noise floor. peak: bytes that a variant needs at most, its
parameters and optimizer included, next to plain. syncs: waits for the device within a step.
"""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch._inductor.config

import gnsfx
from benchmarks import common, step_time
from benchmarks.gpu import calls, nets
from benchmarks.gpu.bench import Bench, Cases, Row
from benchmarks.models import Case
from benchmarks.step_time import AGAIN, PLAIN, Setting, Step

VARIANTS = (PLAIN, AGAIN, "off", "norm", "all")


@dataclass(frozen=True)
class Run:
    """``autocast``: parameters in fp32, arithmetic in bf16."""

    name: str
    model: str
    size: dict[str, int]
    autocast: bool = False


RUNS = (
    Run(
        "GPT, 124M", "gpt2",
        {"batch": 16, "context": 1024, "width": 768, "layers": 12, "heads": 12, "vocabulary": 50304},
    ),
    Run(
        "Llama blocks", "llama",
        {"batch": 4, "context": 2048, "width": 4096, "hidden": 11008, "layers": 3, "heads": 32, "vocabulary": 4096},
    ),
    Run(
        "GPT, 124M, autocast", "gpt2",
        {"batch": 16, "context": 1024, "width": 768, "layers": 12, "heads": 12, "vocabulary": 50304},
        autocast=True,
    ),
)  # fmt: skip
QUICK = Run("tiny GPT", "gpt2", {"batch": 4, "context": 8, "width": 16, "layers": 1, "heads": 2, "vocabulary": 11})
ROUNDS, TURN = 12, 0.25  # seconds of a turn

COLUMNS: tuple[common.Column, ...] = (
    ("model", lambda row: row["case"]),
    ("plain ms", lambda row: f"{1e3 * row['seconds'][PLAIN]:.1f}" if "seconds" in row else ""),
    *(
        (variant, lambda row, variant=variant: _ratio(row, variant)) for variant in VARIANTS[1:]
    ),
    ("peak off / norm / all", lambda row: _slashed(row, "peak ratio", "{:.3f}")),
    ("syncs off / norm / all", lambda row: _slashed(row, "syncs", "{}")),
)  # fmt: skip


def _ratio(row: common.Row, variant: str) -> str:
    if variant not in row.get("ratio", {}):
        return ""
    spread = row["ratio"][variant]
    return f"{spread['median']:.3f} ({spread['low']:.3f}..{spread['high']:.3f})"


def _slashed(row: common.Row, name: str, form: str) -> str:
    found = row.get(name) or {}
    return " / ".join(form.format(found[v]) for v in ("off", "norm", "all") if found.get(v) is not None)


def cases(bench: Bench) -> Cases:
    for run in runs(bench):
        yield run.name, partial(compare, bench, run)


def runs(bench: Bench) -> Sequence[Run]:
    return (QUICK,) if bench.quick else RUNS


def tuned_anew() -> AbstractContextManager[Any]:
    """Within it Inductor keeps no notes of which kernels are the fastest: they may come from a machine that was busy."""
    return torch._inductor.config.patch(autotune_local_cache=False)


def prepared(bench: Bench, run: Run) -> tuple[Case, Setting]:
    dtype = torch.float32 if run.autocast else torch.bfloat16
    case = nets.build(run.model, run.size, bench.device, dtype)
    optimizer = "fused" if bench.cuda else "adamw"
    casting = torch.bfloat16 if run.autocast else None
    return case, Setting(str(bench.device), casting, dtype, optimizer, "eager" if bench.quick else "inductor")


def compare(bench: Bench, run: Run) -> Row:
    torch.compiler.reset()
    gc.collect()
    case, setting = prepared(bench, run)
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    waits: dict[str, int] = {}
    with calls.kernels_only(), tuned_anew():
        for variant in VARIANTS:
            before = allocated(bench)
            steps[variant] = make(case, variant, setting)
            for _ in range(3):
                once(steps[variant])
            if bench.cuda:
                peaks[variant], waits[variant] = peak(steps[variant]) - before, syncs(steps[variant])
        kernels = {v: calls.launched(bench, partial(once, steps[v])) for v in ("norm", "all")}
        rounds, turn = (2, 1e-3) if bench.quick else (ROUNDS, TURN)
        gc.collect()
        gc.disable()
        measured = step_time.measure({v: [s] for v, s in steps.items()}, rounds, turn, setting.device, "round")
        gc.enable()
    times = {variant: [whole for whole, _ in values] for variant, values in measured.items()}
    return {
        "parameters": case.parameters, "size": run.size, "times": times,
        "seconds": {v: statistics.median(values) for v, values in times.items()},
        "ratio": {v: common.compare(values, times[PLAIN]) for v, values in times.items()},
        "peak": peaks, "peak ratio": {v: bytes_ / peaks[PLAIN] for v, bytes_ in peaks.items()},
        "syncs": waits, "kernels": kernels, "right": not any(waits[v] > waits[PLAIN] for v in waits) and [] not in kernels.values(),
    }  # fmt: skip


def make(case: Case, variant: str, setting: Setting) -> Step:
    if variant != "off":
        return step_time.make_step(case, variant, setting)
    step = step_time.make_step(case, step_time.UNREAD, setting)

    def measure() -> None:
        with gnsfx.measuring(False):
            step.measure()

    return replace(step, measure=measure)


def once(step: Step) -> None:
    step.measure()
    step.finish()


def allocated(bench: Bench) -> int:
    if not bench.cuda:
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def peak(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    once(step)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def syncs(step: Step) -> int:
    """How often the host waits for the device in 16 steps: averages are brought up to date in one of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(16):
                once(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)
