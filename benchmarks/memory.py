"""Peak memory of a training step next to plain torch.compile.

    python benchmarks/memory.py
    python benchmarks/memory.py --models gpt768 --variants all per-example opacus-hooks
    python benchmarks/memory.py --device cuda

Every variant runs in a fresh process: a few steps to compile and to make the optimizer's state, then the step that counts
(forward, backward, norms, AdamW, zero_grad).

    before     MiB of tensors alive between steps: parameters, state of the optimizer, the batch, collectors
    peak       MiB alive at once within the step. On a CPU: "before" and the allocations and frees of the step added up, as
               PyTorch's allocator reports them, which Inductor's buffers and ours go through; on a GPU: max_memory_allocated
    ratio      of the peaks, to plain
    of step    ratio of what the step adds to "before"
    RSS rise   MiB by which the resident set of the process rose within a step of its own: a check that sees all memory,
               whoever allocated it, but in pages, and with what the C library has left over
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import common, models, peers
from benchmarks.step_time import EAGER, OURS, PLAIN, Setting, Step, make_step, reason

MIB = 2**20


def live_bytes() -> int:
    """Of all storages on the CPU that a tensor in Python holds."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (Tensor, nn.Parameter) and item.device.type == "cpu" and item.layout == torch.strided:
            with contextlib.suppress(NotImplementedError):  # a stand-in of torch.func, whose tensor is in the list too
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def allocation_peak(run: Callable[[], object]) -> int:
    """The most bytes on the CPU that were alive at once within the call, beyond those before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    recorded: Any = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    changes = [e for e in recorded if e.name() == "[memory]" and e.device_type().name == "CPU"]
    alive = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        alive += change.nbytes()
        peak = max(peak, alive)
    return peak


def resident(field: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most since ``forget_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def resident_rise(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident set rose within the call; None where the system does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def measure(step: Step, device: str) -> dict[str, Any]:
    """MiB before and at the peak."""

    def run() -> None:
        step.measure()
        step.finish()

    for _ in range(3):
        run()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return {"before": before / MIB, "peak": torch.cuda.max_memory_allocated() / MIB, "rss": None}
    rise = resident_rise(run)
    before = live_bytes()
    peak = before + allocation_peak(run)
    return {"before": before / MIB, "peak": peak / MIB, "rss": None if rise is None else rise / MIB}


def child(job: dict[str, Any]) -> dict[str, Any]:
    """What the process of one variant prints."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    case = models.build(job["model"], small=job["small"], device=job["device"])
    if told := peers.too_large(job["variant"], case, job["memory"]) if job["variant"] in peers.NAMES else "":
        return {"failed": told}
    autocast = getattr(torch, job["autocast"]) if job["autocast"] else None
    setting = Setting(job["device"], autocast, torch.float32, "adamw", job["inner"])
    try:
        return measure(make_step(case, job["variant"], setting), job["device"])
    except Exception as error:  # of another tool: shown in its row
        if job["variant"] not in peers.NAMES:
            raise
        return {"failed": reason(error)}


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """``rows`` of one model, the first of them plain."""
    plain = rows[0]
    for row in rows:
        if "peak" in row:
            row["ratio"] = row["peak"] / plain["peak"]
            row["of step"] = (row["peak"] - row["before"]) / (plain["peak"] - plain["before"])


def _mib(name: str) -> Callable[[common.Row], str]:
    return lambda row: f"{row[name]:.1f}" if row.get(name) is not None else ""


COLUMNS: tuple[common.Column, ...] = (
    ("model", lambda row: row["model"]),
    ("variant", lambda row: row["variant"]),
    ("before", _mib("before")),
    ("peak", _mib("peak")),
    ("ratio", lambda row: f"{row['ratio']:.3f}" if "ratio" in row else ""),
    ("of step", lambda row: f"{row['of step']:.3f}" if "of step" in row else ""),
    ("RSS rise", _mib("rss")),
    ("", lambda row: row.get("failed", "")),
)


def main(argv: Sequence[str] | None = None) -> None:
    assert __doc__
    parser = common.parser_of(__doc__)
    common.add_models(parser, models.MODELS)
    parser.add_argument("--variants", nargs="+", choices=[*OURS, EAGER, *peers.NAMES], default=[EAGER, *OURS])
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="default: none")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB a peer may hold for norms; default %(default)s")
    common.add_inner(parser)
    common.add_child(parser)
    args = parser.parse_args(argv)
    if args.child:
        return print(json.dumps(child(json.loads(args.child))))

    rows = common.kept(args.out, args.models) if args.keep else []
    shared = {name: getattr(args, name) for name in ("device", "autocast", "memory", "inner", "small", "threads")}
    for name in args.models:
        found = []
        for variant in common.progress([PLAIN, *args.variants], f"{name}: variant"):
            if variant == "norm" and not models.has_norms(name):
                continue
            job = json.dumps({**shared, "model": name, "variant": variant})
            found.append({"model": name, "variant": variant, **common.fresh(__file__, ["--child", job])})
        add_ratios(found)
        rows += found
    print(common.text_table(COLUMNS, rows))
    if args.out:
        about = __doc__[__doc__.index("Every variant") :]
        record = {"schema": "gnsfx.memory/1", "settings": common.settings(args), "machine": common.machine(args.device)}
        common.save(args.out, "Peak memory", about, COLUMNS, rows, record)


if __name__ == "__main__":
    main()
