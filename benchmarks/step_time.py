"""Step time of the demo model: plain torch.compile next to backend="gns".

    python benchmarks/step_time.py
    python benchmarks/step_time.py --batch 8 --context 128 --width 256 --layers 4 --json step_time.json

A step is forward, backward, noise.step() where there is one, AdamW and zero_grad. The variants take turns in one
process, in an order that rotates, so that whatever slows the machine slows all of them. The ratio is taken within each
round; its median over the rounds is printed with the quartiles. "fastest" is the ratio of the fastest rounds, which
other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gnsfx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from train_gpt import GPT

VOCABULARY = 103  # of the demo's text
Step = Callable[[], None]


def make_step(variant: str, model: GPT, batch: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> Step:
    """One training step of a copy of ``model``, compiled here: variant "plain", "all" or "norm"."""
    model = copy.deepcopy(model)
    if variant == "plain":
        compiled, noise = torch.compile(model), None
    else:
        compiled = torch.compile(model, backend="gns", options={"gns.params": variant})
        noise = gnsfx.NoiseScale(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = compiled(*batch)
        loss.backward()
        if noise:
            noise.step()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Step, repeats: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(steps: dict[str, Step], rounds: int, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step: variant -> one number per round."""
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    order = list(steps)
    for _ in range(rounds):
        for variant in order:
            times[variant].append(seconds(steps[variant], repeats, device))
        order = [*order[1:], order[0]]
    return times


def report(times: dict[str, list[float]]) -> list[dict[str, float | str]]:
    rows = []
    for variant, values in times.items():
        ratios = [value / plain for value, plain in zip(values, times["plain"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        milliseconds = 1e3 * statistics.median(values)
        fastest = min(values) / min(times["plain"])
        row = {"variant": variant, "ms": milliseconds, "ratio": median, "low": low, "high": high, "fastest": fastest}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="default %(default)s")
    parser.add_argument("--context", type=int, default=64, help="default %(default)s")
    parser.add_argument("--layers", type=int, default=5, help="default %(default)s")
    parser.add_argument("--width", type=int, default=128, help="default %(default)s")
    parser.add_argument("--heads", type=int, default=4, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=40, help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="steps in a row of each variant; default %(default)s")
    parser.add_argument("--variants", nargs="+", choices=("all", "norm"), default=["all", "norm"])
    parser.add_argument("--device", default="cpu", help="default %(default)s; on cuda the forward runs in bfloat16")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: as many as it takes")
    parser.add_argument("--json", type=Path, help="also write the times of every round to this file")
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = GPT(VOCABULARY, args.context, args.width, args.layers, args.heads).to(device)
    ids, targets = torch.randint(VOCABULARY, (2, args.batch, args.context), device=device).unbind()
    steps = {variant: make_step(variant, model, (ids, targets), device) for variant in ("plain", *args.variants)}
    for step in steps.values():  # compiles
        seconds(step, 3, device)
    times = measure(steps, args.rounds, args.repeats, device)

    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, batch {args.batch} x {args.context}, {device}, torch {torch.__version__}")
    print(
        f"{'':8}{'ms/step':>10}{'ratio':>10}{'quartiles':>18}{'fastest':>10}   ({args.rounds} rounds of {args.repeats} steps)"
    )
    rows = report(times)
    for row in rows:
        spread = f"{row['low']:>10.3f} ..{row['high']:>5.3f}"
        print(f"{row['variant']:8}{row['ms']:>10.2f}{row['ratio']:>10.3f}{spread}{row['fastest']:>10.3f}")
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows, "seconds": times}, indent=1))


if __name__ == "__main__":
    main()
