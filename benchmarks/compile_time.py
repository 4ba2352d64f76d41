"""Compile time of the demo model: plain Inductor next to backend="gns", with an empty cache and with a full one.

    python benchmarks/compile_time.py

Every measurement is a fresh process, with its own Inductor cache folder: the first one ("cold") finds it empty, the
second ("warm") finds what the first left. The time is that of the first forward and backward, imports excluded.
Variants take turns; ratios are taken within each round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VARIANTS = ("plain", "all", "norm")


def child(variant: str, layers: int) -> None:
    """Print the seconds of the first forward and backward."""
    import torch

    import gnsfx  # noqa: F401  the imports of the backend are not compile time

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from train_gpt import GPT

    torch.manual_seed(0)
    model = GPT(103, 64, 128, layers, 4)
    options = {} if variant == "plain" else {"backend": "gns", "options": {"gns.params": variant}}
    ids, targets = torch.randint(103, (2, 16, 64)).unbind()
    torch.compile(lambda x: x + 1)(torch.zeros(2))  # starts what every compile needs once
    compiled = torch.compile(model, **options)
    start = time.perf_counter()
    compiled(ids, targets).backward()
    print(time.perf_counter() - start)


def measure(variant: str, layers: int, cache: str) -> float:
    command = [sys.executable, __file__, "--child", variant, "--layers", str(layers)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{variant}: the measured process failed\n{finished.stderr}")
    return float(finished.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=5, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--json", type=Path, help="also write the times of every round to this file")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.layers)

    times: dict[str, dict[str, list[float]]] = {state: {v: [] for v in VARIANTS} for state in ("cold", "warm")}
    for turn in range(args.rounds):
        first = turn % len(VARIANTS)
        for variant in (*VARIANTS[first:], *VARIANTS[:first]):
            with tempfile.TemporaryDirectory() as cache:
                for state in times:
                    times[state][variant].append(measure(variant, args.layers, cache))

    print(f"{args.layers} layers, {args.rounds} rounds")
    print(f"{'':6}{'':8}{'seconds':>10}{'ratio':>10}{'range':>18}")
    for state, variants in times.items():
        for variant, values in variants.items():
            ratios = [value / plain for value, plain in zip(values, variants["plain"], strict=True)]
            median = statistics.median(ratios)
            spread = f"{min(ratios):>10.2f} ..{max(ratios):>5.2f}"
            print(f"{state:6}{variant:8}{statistics.median(values):>10.2f}{median:>10.2f}{spread}")
    if args.json:
        args.json.write_text(json.dumps({"layers": args.layers, "seconds": times}, indent=1))


if __name__ == "__main__":
    main()
