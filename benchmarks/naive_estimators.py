"""Usual shortcuts to the noise scale, on the same synthetic data as gnsfx: what each gets wrong.

    python benchmarks/naive_estimators.py
    python benchmarks/naive_estimators.py --out benchmarks/results/naive_estimators      (.svg, .md and .json)

Three experiments with known truth. Averages decay by 0.99 per step and are read after 400 steps; medians and quartiles
are over independent runs.

    within a step     gradients at fixed weights, noise scale 300, batch sizes from 8 to 1024
    across steps      SGD on a noisy quadratic: shortcuts that take a second batch at weights that have moved
    token means       losses averaged over the tokens of examples of unequal length
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gnsfx.noise import estimators, intervals, series

sys.path.insert(0, str(Path(__file__).resolve().parent))
from monte_carlo import DECAY, run_series
from synthetic import WORLDS, Steps, draw, draw_clusters

STEPS, RANKS, TRUTH = 400, 2, 300
BATCHES = (8, 16, 32, 64, 128, 256, 512, 1024)
SHOWN_BATCH = 32  # in the table
RATES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
SHOWN_RATE = 0.4
LENGTH_SCALES = (1, 3, 10, 30, 100)
SHOWN_SCALE = 1


# What is wrong with it, and where it is found.
SHORTCUTS = {
    "plug-in": (
        "|g|² contains the noise: B_s / (1 + B_s/B), below the batch size always",
        "tensight, Cockpit's norm test",
    ),
    "mean of ratios": ("a ratio of noisy numbers has no mean", "one of two orders in Composer's NoiseScaleMonitor"),
    "clamp, then average": ("the mean of max(0, x) is larger than that of x", "fairscale AdaScale"),
    "negative: keep the last": ("leaves out just the steps that say |G|² is small", "ALF"),
    "ranks as small batches": ("unbiased, but 2 numbers per step in place of all examples", "k-diffusion, KungFu"),
    "successive batches": ("noise of one batch moves the weights of the next", "gpt-neox, fastai batch-size-finder"),
    "product with the last": (
        "the last update went along its own noise",
        "AdaptDL on one rank: the difference, same cause",
    ),
    "product with momentum": ("the same, for as many steps as momentum remembers", ""),
    "examples of equal weight": ("adds the squared variation of the lengths to B_s", "tools without weights"),
}


def average(values: Tensor) -> Tensor:
    """[steps, runs] -> [runs], decayed."""
    weights = DECAY ** torch.arange(len(values) - 1, -1, -1, dtype=values.dtype)
    return (weights[:, None] * values).sum(0) / weights.sum()


def of_pair(steps: Steps, unit: int = 1) -> tuple[Tensor, Tensor]:
    """tr(Sigma) of an example and |G|^2 of every step, from units of so many examples."""
    pair = estimators.unbiased_pair(steps.grad_sq, steps.sq_norm, steps.examples / unit)
    return pair.tr_sigma * unit, pair.g_sq


def keep_last(ratios: Tensor) -> Tensor:
    """Every ratio that is not positive replaced by the one before; the first by the first positive one of its run."""
    kept = ratios.clone()
    first = (ratios > 0).to(torch.int8).argmax(0)
    last = ratios.gather(0, first[None])[0]
    for t, ratio in enumerate(ratios):
        last = torch.where(ratio > 0, ratio, last)
        kept[t] = last
    return kept


def within_a_step(runs: int, batch: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Steps]:
    """B_simple / truth of each shortcut, [runs], and the steps it was seen on."""
    steps, ranks = draw_clusters(batch, TRUTH, batch // RANKS, 0.0, STEPS, runs, generator, dimension=100)
    tr_sigma, g_sq = of_pair(steps)
    rank_tr_sigma, rank_g_sq = of_pair(ranks, batch // RANKS)
    found = {
        "plug-in": average(tr_sigma) / average(steps.grad_sq),
        "mean of ratios": average(tr_sigma / g_sq),
        "clamp, then average": average(tr_sigma) / average(g_sq.clamp(min=0)),
        "negative: keep the last": average(keep_last(tr_sigma / g_sq)),
        "ranks as small batches": average(rank_tr_sigma) / average(rank_g_sq),
    }
    return {name: ratio / TRUTH for name, ratio in found.items()}, steps


def across_steps(runs: int, rate: float, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor, Steps]:
    """|G|^2 of each shortcut and its true average, [runs], and the steps.

    SGD at ``rate`` on 50 directions with curvatures from 0.02 to 1 that has come to rest, and one that falls steadily.
    """
    batch, curvatures = 32, torch.logspace(-1.7, 0, 50, dtype=torch.float64)
    slope, noise, successive, beta = 0.04, (51 * batch) ** -0.5, 5, 0.9
    at_rest = (rate / (curvatures * (2 - rate * curvatures))).sqrt() * noise
    weights = torch.randn(runs, 50, dtype=torch.float64, generator=generator) * at_rest
    momentum = torch.zeros(runs, 51, dtype=torch.float64)
    gradients, momenta, true = [], [], []
    for _ in range(STEPS):
        clean = torch.cat([curvatures * weights, torch.full((runs, 1), slope, dtype=torch.float64)], dim=1)
        gradient = clean + noise * torch.randn(runs, 51, dtype=torch.float64, generator=generator)
        gradients.append(gradient)
        momenta.append(momentum)
        true.append(clean.square().sum(1))
        weights = weights - rate * gradient[:, :50]
        momentum = beta * momentum + (1 - beta) * gradient
    g, m = torch.stack(gradients), torch.stack(momenta)
    freedom = torch.full(g.shape[:2], 51.0 * (batch - 1), dtype=torch.float64)
    within = 2 / 51 * torch._standard_gamma(freedom / 2, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
    grad_sq = g.square().sum(-1)
    examples = torch.full_like(grad_sq, batch)
    steps = Steps(grad_sq, grad_sq / batch + within / batch**2, examples, examples)
    blocks = g.view(STEPS // successive, successive, runs, 51)
    big, small = blocks.mean(1).square().sum(-1), blocks.square().sum(-1).mean(1)
    found = {
        "successive batches": average(((successive * big - small) / (successive - 1)).repeat_interleave(successive, 0)),
        "product with the last": average((g[1:] * g[:-1]).sum(-1)),
        "product with momentum": average((g * m).sum(-1)[50:]),
    }
    return found, average(torch.stack(true)), steps


def token_means(runs: int, noise_scale: float, generator: torch.Generator) -> tuple[dict[str, Tensor], Steps]:
    """Noise of the batch over |G|^2, relative to the truth, [runs], and the steps.

    Of the batch, because an example of the one estimate is one of any length, of the other one of average weight.
    """
    steps = draw(next(world for world in WORLDS if world.name == "token mean"), 64, noise_scale, STEPS, runs, generator)
    tr_sigma, g_sq = of_pair(steps)
    of_batch = average(tr_sigma / steps.examples) / average(g_sq)
    return {"examples of equal weight": of_batch / (noise_scale * average(1 / steps.effective))}, steps


def ours(steps: Steps) -> tuple[Tensor, list[intervals.Interval]]:
    """B_simple [runs] and the intervals, of gnsfx."""
    state = run_series(steps, int(steps.examples[0, 0]))
    estimates = [series.read(column) for column in state.T.tolist()]
    return state[0] / state[1], [intervals.ratio_interval(estimate) for estimate in estimates]


def quartiles(values: Tensor) -> list[float]:
    return values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()


def judge_ours(steps: Steps, truth: Tensor | float) -> dict[str, Any]:
    """Estimate / truth, an example of its interval / truth, and the coverage."""
    ratio, found = ours(steps)
    truths = torch.as_tensor(truth, dtype=ratio.dtype).expand(len(ratio)).tolist()
    held = [interval.low <= true <= interval.high for interval, true in zip(found, truths, strict=True)]
    ends = [(i.low / true, i.high / true) for i, true in zip(found, truths, strict=True)]
    low, high = torch.tensor(ends, dtype=ratio.dtype).median(0).values.tolist()
    return {"ours": quartiles(ratio / torch.tensor(truths)), "interval": [low, high], "coverage": sum(held) / len(held)}


def experiments(runs: int, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """A record for each setting; quartiles relative to the truth, 1 everywhere if right."""
    for batch in BATCHES:
        found, steps = within_a_step(runs, batch, generator)
        shortcuts = {name: quartiles(values) for name, values in found.items()}
        yield {"panel": "within a step", "x": batch, "shortcuts": shortcuts, **judge_ours(steps, TRUTH)}
    for rate in RATES:
        found, true, steps = across_steps(runs, rate, generator)
        shortcuts = {name: quartiles(values / true.mean()) for name, values in found.items()}
        record = judge_ours(steps, 1 / true)
        record["ours"] = quartiles(run_series(steps, 32)[1] / true)
        yield {"panel": "across steps", "x": rate, "shortcuts": shortcuts, **record}
    for noise_scale in LENGTH_SCALES:
        found, steps = token_means(runs, noise_scale, generator)
        shortcuts = {name: quartiles(values) for name, values in found.items()}
        yield {"panel": "token means", "x": noise_scale, "shortcuts": shortcuts, **judge_ours(steps, noise_scale)}


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    shown = {"within a step": SHOWN_BATCH, "across steps": SHOWN_RATE, "token means": SHOWN_SCALE}
    yield "| shortcut | what is wrong | seen in | / truth | gnsfx / truth | its 95% interval, / truth | holds |"
    yield "|---|---|---|--:|--:|--:|--:|"
    for record in records:
        if record["x"] != shown[record["panel"]]:
            continue
        for name, found in record["shortcuts"].items():
            wrong, seen = SHORTCUTS[name]
            low, high = record["interval"]
            numbers = f"{_spread(found)} | {_spread(record['ours'])} | {low:.2f}..{high:.2f} | {record['coverage']:.0%}"
            yield f"| {name} | {wrong.replace('|', '&#124;')} | {seen} | {numbers} |"


def _spread(found: list[float]) -> str:
    low, median, high = found
    return f"{median:.2f} ({low:.2f}..{high:.2f})"


PANELS: Mapping[str, tuple[str, str, Callable[[Any], None]]] = {
    "within a step": (f"batch size (noise scale {TRUTH})", "B_simple / truth", lambda axes: axes.set_ylim(0.02, 3)),
    "across steps": ("learning rate x largest curvature", "|G|² / truth", lambda axes: axes.set_ylim(-1.1, 1.6)),
    "token means": (
        "noise scale, in examples (batch size 64)",
        "tr Cov(g) / |G|², relative to the truth",
        lambda axes: axes.set_ylim(0.8, 2.2),
    ),
}


def draw_figure(records: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gnsfx"  # the same file every time
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axes, (name, (x_label, y_label, limits)) in zip(panels, PANELS.items(), strict=True):
        rows = [record for record in records if record["panel"] == name]
        x = [row["x"] for row in rows]
        low, median, high = zip(*(row["ours"] for row in rows), strict=True)
        axes.fill_between(x, low, high, color="black", alpha=0.15, linewidth=0)
        axes.plot(x, median, color="black", linewidth=2.5, label="gnsfx (middle half)")
        for shortcut in rows[0]["shortcuts"]:
            medians = [row["shortcuts"][shortcut][1] for row in rows]
            dashed = shortcut == "ranks as small batches"
            (line,) = axes.plot(x, medians, "--" if dashed else "o-", markersize=3, label=shortcut)
            if dashed:  # its spread is what is wrong with it
                low, _, high = zip(*(row["shortcuts"][shortcut] for row in rows), strict=True)
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xscale="log", xlabel=x_label, ylabel=y_label, title=name)
        if name == "within a step":
            axes.set_yscale("log")
        limits(axes)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400, help="per setting; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--out", type=Path, help="also write OUT.svg (needs matplotlib), OUT.md and OUT.json")
    args = parser.parse_args()

    start = time.perf_counter()
    records = list(experiments(args.runs, torch.Generator().manual_seed(args.seed)))
    lines = list(table(records))
    print("\n".join(lines))
    print(f"{args.runs} runs of {STEPS} steps per setting, {time.perf_counter() - start:.0f} s")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = (
            f"Within a step: batch size {SHOWN_BATCH}, noise scale {TRUTH}. Across steps: |G|^2 at learning rate "
            f"{SHOWN_RATE}. Token means: noise scale {SHOWN_SCALE}. Median and middle half of {args.runs} runs; the "
            "interval is the median of its ends."
        )
        head = ["# Shortcuts to the noise scale", "", (__doc__ or "").split("\n")[0], "", settings, ""]
        image = ["", f"![Each relative to the truth]({args.out.name}.svg)", ""]
        args.out.with_suffix(".md").write_text("\n".join([*head, *lines, *image]))
        args.out.with_suffix(".json").write_text(json.dumps({"runs": args.runs, "records": records}, indent=1))
        draw_figure(records, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
