"""Step time next to plain torch.compile, eager PyTorch and other tools that compute per-example gradient norms.

    python benchmarks/step_time.py                                       # every model, without other tools
    python benchmarks/step_time.py --models demo vit --variants all norm
    python benchmarks/step_time.py --peers --models demo                 # next to other tools: pip install '.[peers]'
    python benchmarks/step_time.py --device cuda --autocast bfloat16

A step is forward, backward, the norms (noise.step() for gnsfx), AdamW with PyTorch's defaults and zero_grad. All variants
take turns in one process, in an order that rotates, so that whatever slows the machine slows all of them. A turn is as
many steps as fill --turn seconds; where there are several, the first is left out, since it finds the caches full of the
variant before. Every variant has --copies copies of the model, made in different orders, which take turns too: where a
copy lies in memory is worth some percent.

    ratio      to plain torch.compile, taken within each round: the median over the rounds, the interval that holds the
               true median in 95% of cases, and the quartiles
    fastest    ratio of the fastest rounds, which other programs on the machine disturb least
    bare       ratio without AdamW and zero_grad
    / eager    ratio to eager PyTorch
    norms      the norms that the variant returns, against per-example autograd in float64 on four examples

"plain again" is plain torch.compile once more: what it is away from 1 is what this table cannot tell apart from nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gnsfx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import common, models, peers
from benchmarks.models import Case, Training, training_of

OURS: dict[str, dict[str, Any]] = {
    "all": {},
    "norm": {"gns.params": "norm"},
    "per-example": {"gns.per_example": True},
    "budget": {"gns.budget": 0.01},
}
PLAIN, AGAIN, EAGER = "plain", "plain again", "eager"
UNREAD = "unread"  # compiled as "all", without a NoiseScale
EXAMPLES_CHECKED = 4


@dataclass(frozen=True, slots=True)
class Step:
    """``measure``: forward, backward and the norms. ``finish``: optimizer and zero_grad."""

    measure: Callable[[], object]
    finish: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Setting:
    """How models run: ``optimizer`` "adamw", "fused" or "none"; ``autocast`` a dtype or None."""

    device: str
    autocast: torch.dtype | None
    dtype: torch.dtype
    optimizer: str
    inner: str

    def casting(self) -> AbstractContextManager[Any]:
        kind = torch.device(self.device).type
        return torch.autocast(kind, self.autocast, enabled=self.autocast is not None)


def compiled_training(case: Case, variant: str, inner: str = "inductor") -> Training:
    """The training loss of a case as plain torch.compile, as gnsfx or eager runs it."""
    training = training_of(case.module)
    if variant == EAGER:
        return training
    if variant in (PLAIN, AGAIN):
        return torch.compile(training, backend=models.ALIKE[inner])  # pyright: ignore[reportReturnType]
    return torch.compile(training, backend="gns", options={**OURS.get(variant, {}), "gns.inner": inner})  # type: ignore[return-value]


def make_step(case: Case, variant: str, setting: Setting) -> Step:
    """A training step of its own copy of the model."""
    case = replace(case, module=copy.deepcopy(case.module))
    parameters = list(case.module.parameters())
    if variant in peers.NAMES:
        measure_norms = peers.load(variant)(case)

        def measure() -> None:
            with setting.casting():
                norms = measure_norms(case.inputs, case.targets)
            for vector in norms.values():
                vector.sum()
    else:
        training = compiled_training(case, variant, setting.inner)
        noise = gnsfx.NoiseScale(case.module) if variant in OURS else None

        def measure() -> None:
            with setting.casting():
                loss = training(case.inputs, case.targets)
            loss.backward()
            if noise:
                noise.step()

    optimizer = None
    if setting.optimizer != "none":
        fused = True if setting.optimizer == "fused" else None
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=fused)

    def finish() -> None:
        if optimizer:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    return Step(measure, finish)


def turn(step: Step, repeats: int, device: str) -> tuple[float, float]:
    """Seconds per step: all of it, and without ``finish``, which on a GPU is not known."""
    if repeats > 1:
        step.measure()
        step.finish()
    common.synchronise(device)
    start, apart = time.perf_counter(), 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        step.measure()
        apart += time.perf_counter() - begin
        step.finish()
    common.synchronise(device)
    bare = math.nan if torch.device(device).type == "cuda" else apart / repeats
    return (time.perf_counter() - start) / repeats, bare


def norms_of(case: Case, variant: str, inner: str) -> tuple[dict[str, Tensor], set[str]]:
    """Name -> [B] squared norms of what each example adds to the gradient, or [1] where only their sum is known; and the
    names of those that are estimates."""
    case = replace(case, module=copy.deepcopy(case.module))
    if variant in peers.NAMES:
        return peers.load(variant)(case)(case.inputs, case.targets), set()
    training = compiled_training(case, variant, inner)
    training(case.inputs, case.targets).backward()
    estimated = {row.name for row in gnsfx.coverage(case.module) if row.status == "estimated"}
    if variant == "per-example":
        return gnsfx.per_example_sq_norms(case.module), estimated
    return {name: norm[None] for name, norm in gnsfx.sq_norms(case.module).items()}, estimated


def judge(case: Case, variant: str) -> str:
    """What the norms of a variant are worth: "right", or what is missing, wrong or an estimate."""
    names = [name for name, parameter in case.module.named_parameters() if parameter.requires_grad]
    found, estimated = norms_of(case, variant, "eager")
    counts = {
        "wrong": len(peers.wrong_names(case, {name: norms for name, norms in found.items() if name not in estimated})),
        "missing": 0 if variant == "norm" else len(set(names) - set(found)),
        "estimated": len(estimated),
    }
    return ", ".join(f"{count} of {len(names)} {what}" for what, count in counts.items() if count) or "right"


def reason(error: BaseException) -> str:
    """The first line of an error, short."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:100]


def prepare(
    case: Case, variants: Sequence[str], setting: Setting, copies: int
) -> tuple[dict[str, list[Step]], dict[str, str]]:
    """The steps of each variant that runs, warm, one per copy; and why the others do not."""
    steps: dict[str, list[Step]] = {variant: [] for variant in variants}
    failed: dict[str, str] = {}
    for number in range(copies):
        for variant in common.progress(common.rotated(variants, number), f"{case.name}, copy {number + 1}: compiling"):
            if variant in failed:
                continue
            try:
                step = make_step(case, variant, setting)
                for _ in range(2):
                    step.measure()
                    step.finish()
            except Exception as error:  # of another tool: shown in its row
                if variant not in peers.NAMES:
                    raise
                failed[variant] = reason(error)
            else:
                steps[variant].append(step)
    return {variant: found for variant, found in steps.items() if variant not in failed}, failed


def measure(
    steps: dict[str, list[Step]], rounds: int, seconds: float, device: str, label: str
) -> dict[str, list[tuple[float, float]]]:
    """Variant -> (seconds per step, without ``finish``) for each round."""
    repeats = {v: max(1, round(seconds / turn(found[0], 1, device)[0])) for v, found in steps.items()}
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in steps}
    for number in common.progress(range(rounds), label):
        for variant in common.rotated(list(steps), number):
            step = steps[variant][number % len(steps[variant])]
            times[variant].append(turn(step, repeats[variant], device))
    return times


def time_variants(
    case: Case, variants: Sequence[str], setting: Setting, args: argparse.Namespace, label: str
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, str]]:
    """Seconds of each round, see ``measure``, and why other variants do not run."""
    steps, failed = prepare(case, variants, setting, args.copies)
    gc.collect()
    gc.disable()
    times = measure(steps, args.rounds, args.turn, setting.device, f"{label}round")
    gc.enable()
    return times, failed


def rows_of(times: dict[str, list[tuple[float, float]]], name: str, norms: dict[str, str]) -> Iterator[dict[str, Any]]:
    whole = {variant: [t for t, _ in values] for variant, values in times.items()}
    bare = {variant: [t for _, t in values] for variant, values in times.items()}
    for variant, values in whole.items():
        spread = common.compare(values, whole[PLAIN])
        yield {
            "model": name,
            "variant": variant,
            "ms": 1e3 * sorted(values)[len(values) // 2],
            "spread": spread,
            "bare": common.compare(bare[variant], bare[PLAIN]),
            "eager": common.compare(values, whole[EAGER]) if EAGER in whole else None,
            "norms": norms.get(variant, ""),
        }


def run(name: str, args: argparse.Namespace, setting: Setting) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one model, and the seconds of every round."""
    torch._dynamo.reset()
    variants = [PLAIN, AGAIN, *args.variants, *args.peers]
    case = models.build(name, small=args.small, device=args.device, seed=args.seed)
    case.module.to(setting.dtype)
    if case.inputs.is_floating_point():
        case = replace(case, inputs=case.inputs.to(setting.dtype))
    failed = {} if models.has_norms(name) else {"norm": "no norm layers"}
    norms: dict[str, str] = {}
    few = {"batch": min(EXAMPLES_CHECKED, case.size["batch"])}
    checked = models.build(name, few, small=args.small, device=args.device, seed=args.seed)
    for variant in [v for v in variants if v in (*OURS, *peers.NAMES) and v not in failed] if args.check else []:
        try:
            norms[variant] = judge(checked, variant)
        except Exception as error:  # of another tool: shown in its row
            if variant in OURS:
                raise
            failed[variant] = reason(error)
    failed |= {v: told for v in args.peers if v not in failed and (told := peers.too_large(v, case, args.memory))}
    runs = [variant for variant in variants if variant not in failed]
    times, others = time_variants(case, runs, setting, args, f"{name}: ")
    failed |= others
    rows = list(rows_of(times, name, norms))
    rows += [{"model": name, "variant": variant, "norms": failed[variant]} for variant in variants if variant in failed]
    return rows, {variant: {"whole": [w for w, _ in t], "bare": [b for _, b in t]} for variant, t in times.items()}


def _of(row: common.Row, name: str, text: Callable[[common.Spread], str]) -> str:
    spread = row.get(name)
    return text(spread) if spread is not None and spread.median == spread.median else ""


COLUMNS: tuple[common.Column, ...] = (
    ("model", lambda row: row["model"]),
    ("variant", lambda row: row["variant"]),
    ("ms", lambda row: f"{row['ms']:.1f}" if "ms" in row else ""),
    ("ratio", lambda row: _of(row, "spread", lambda s: f"{s.median:.3f}")),
    ("95%", lambda row: _of(row, "spread", lambda s: f"{s.low:.3f}..{s.high:.3f}")),
    ("quartiles", lambda row: _of(row, "spread", lambda s: f"{s.lower:.3f}..{s.upper:.3f}")),
    ("fastest", lambda row: _of(row, "spread", lambda s: f"{s.fastest:.3f}")),
    ("bare", lambda row: _of(row, "bare", lambda s: f"{s.median:.3f}")),
    ("/ eager", lambda row: _of(row, "eager", lambda s: f"{s.median:.3f}")),
    ("norms", lambda row: row["norms"]),
)


def floor(rows: Sequence[common.Row]) -> str:
    """What the machine allows to claim."""
    spreads = [row["spread"] for row in rows if row["variant"] == AGAIN]
    off = max(max(abs(s.low - 1), abs(s.high - 1)) for s in spreads)
    return f"Noise floor: plain next to itself is between {1 - off:.3f} and {1 + off:.3f}; smaller differences are nothing."


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    common.add_models(parser, models.MODELS)
    parser.add_argument("--variants", nargs="*", choices=[*OURS, EAGER], default=[EAGER, *OURS])
    parser.add_argument("--peers", nargs="*", choices=peers.NAMES, help="other tools; all of them if none is named")
    add_arguments(parser)
    parser.add_argument("--memory", type=float, default=4.0, help="GiB a peer may hold for norms; default %(default)s")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not compare norms with the truth")
    args = parser.parse_args(argv)
    args.peers = [] if args.peers is None else args.peers or list(peers.NAMES)
    return args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How to time, and what a step is."""
    parser.add_argument("--optimizer", choices=("adamw", "fused", "none"), default="adamw", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=40, help="default %(default)s")
    parser.add_argument("--turn", type=float, default=0.15, help="seconds of a turn; default %(default)s")
    parser.add_argument("--copies", type=int, default=2, help="of the model per variant; default %(default)s")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default %(default)s")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="default: none")
    common.add_inner(parser)
    parser.add_argument("--seed", type=int, default=0)


def setting_of(args: argparse.Namespace) -> Setting:
    autocast = getattr(torch, args.autocast) if args.autocast else None
    return Setting(args.device, autocast, getattr(torch, args.dtype), args.optimizer, args.inner)


def main(argv: Sequence[str] | None = None) -> None:
    assert __doc__
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    setting = setting_of(args)
    rows, times = common.kept(args.out, args.models) if args.keep else [], {}
    for name in args.models:
        found, times[name] = run(name, args, setting)
        rows += found
        common.note(common.text_table(COLUMNS, found) + "\n")
    print(common.text_table(COLUMNS, rows))
    print(floor(rows))
    if args.out:
        about = f"{__doc__[__doc__.index('A step is') :]}\n{floor(rows)}"
        record = {
            "schema": "gnsfx.step_time/1",
            "settings": common.settings(args),
            "machine": common.machine(args.device),
        }
        common.save(args.out, "Step time", about, COLUMNS, rows, {**record, "seconds": times})


if __name__ == "__main__":
    main()
