"""Train a small character-level GPT on English text, and watch the gradient noise scale of every layer.

    python examples/train_gpt.py                      # text that ships with Python, about a minute on two cores
    python examples/train_gpt.py --text my.txt        # your own
    python examples/train_gpt.py --plain              # the same without gnsfx, to compare

Everything that has to do with gnsfx is marked "gns" below: one word at torch.compile, one line in the loop.
Writes OUT/log.jsonl (one run after another, one line every few steps, flushed) and OUT/noise.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import gnsfx

GROUPS = {
    "embedding": r"^(tokens|positions)\.",  # the head is tied to the token embedding
    "attention": r"\.attention\.",
    "MLP": r"\.mlp\.",
    "norm": r"norm",
}
SCHEMA = "gnsfx.train_gpt/1"
UNITS = {
    "loss": "nats per character",
    "examples": "sequences",
    "b_simple": "examples",
    "low, high": "examples; the ends of the 95% interval, high is null where there is only a lower bound",
    "tr_sigma": "gradient squared, per example",
    "g_sq": "gradient squared",
    "seconds": "since the first step, which compiles",
}
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


class UserError(Exception):
    """Something to put right on the command line: printed as one line."""


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(D, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.apply(self._init)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.2.weight")):  # GPT-2: residual branches start small
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:  # [B, T], [B, T] -> mean loss
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Text:
    """Characters as numbers; the last tenth is for validation."""

    def __init__(self, text: str, context: int) -> None:
        self.context = context
        self.vocabulary = sorted(set(text))
        ids = torch.tensor([*map({c: i for i, c in enumerate(self.vocabulary)}.__getitem__, text)])
        held_out = max(len(text) // 10, context + 1)
        if len(text) - held_out <= context:
            raise UserError(
                f"the text has {len(text)} characters, too few to train and validate with a context of {context}: "
                f"give at least {2 * context + 2} with --text, or a smaller --context"
            )
        self.train, self.held_out = ids[:-held_out], ids[-held_out:]

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Windows drawn at random, independently: (ids, the ids that follow), both [B, T]."""
        starts = torch.randint(len(self.train) - self.context, (size, 1))
        windows = self.train[starts + torch.arange(self.context + 1)]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    @torch.no_grad()
    def validation_loss(self, model: GPT, size: int) -> float:
        """Mean over the held-out text in windows that do not overlap."""
        count = (len(self.held_out) - 1) // self.context
        ids, targets = (self.held_out[i : i + count * self.context].view(count, -1) for i in (0, 1))
        pairs = zip(ids.split(size), targets.split(size), strict=True)
        return sum(float(model(x, y)) * len(x) for x, y in pairs) / count


class Log:
    """One JSON object per line, flushed: what was written survives whatever ends the run."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / "log.jsonl"
            self.file: TextIO = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}. Choose another folder with --out") from None
        self.records: list[dict[str, Any]] = []

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, kind: str, **values: Any) -> None:
        record = {"kind": kind, **values}
        self.records.append(record)
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()


def read_text(path: Path | None) -> str:
    if path is None:
        topics = pydoc_data.topics.topics
        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None


def finite(value: float) -> float | None:
    """JSON has no NaN: what is not known (yet) is null."""
    return value if math.isfinite(value) else None


def statistics(noise: gnsfx.NoiseScale) -> dict[str, dict[str, Any]]:
    """B_simple with its interval, tr(Sigma) and |G|^2 of the total and of every group."""
    found = {}
    for name, stats in {"total": noise, **noise.by_group()}.items():
        low, high = stats.interval()
        values = {"b_simple": stats.b_simple, "low": low, "high": high, "tr_sigma": stats.tr_sigma, "g_sq": stats.g_sq}
        found[name] = {key: finite(value) for key, value in values.items()}
    return found


def warm_up(args: argparse.Namespace) -> int:
    """Steps."""
    return max(args.steps // 20, 1)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up over a twentieth of the run, then a cosine to a tenth."""
    first = warm_up(args)
    if step < first:
        return args.lr * (step + 1) / first
    progress = (step - first) / max(args.steps - first, 1)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def train(
    args: argparse.Namespace, text: Text, model: GPT, log: Log, console: Console
) -> tuple[gnsfx.NoiseScale | None, bool]:
    """The noise scale, if measured, and whether the run came to its end."""
    if args.plain:
        compiled, noise = torch.compile(model), None
    else:
        compiled = torch.compile(model, backend="gns", options={"gns.params": args.params})  # gns
        noise = gnsfx.NoiseScale(model, groups=GROUPS)  # gns
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.1)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("compiling", total=args.steps)
        try:
            for step in range(args.steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args)
                loss = compiled(*text.batch(args.batch))
                loss.backward()
                if noise:
                    if step == warm_up(args):
                        noise.reset()  # gns: the first gradients are unlike all others
                    noise.step()  # gns: after backward, before clipping
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if step % args.log_every == 0 or step == args.steps - 1:
                    line = write_step(log, step, args, loss.item(), noise, time.perf_counter() - start)
                    progress.update(bar, description=line)
                    if not console.is_terminal and step % (10 * args.log_every) == 0:
                        console.print(f"step {step:5}  {line}")
                progress.update(bar, completed=step + 1)
        except KeyboardInterrupt:
            console.print(f"interrupted; {log.path} keeps what was measured")
            return noise, False
    return noise, True


def write_step(
    log: Log, step: int, args: argparse.Namespace, loss: float, noise: gnsfx.NoiseScale | None, seconds: float
) -> str:
    """Log one step; returns what the progress bar shows."""
    examples = (step + 1) * args.batch
    measured = statistics(noise) if noise else {}
    log.write(
        "step",
        step=step,
        examples=examples,
        tokens=examples * args.context,
        seconds=round(seconds, 3),
        loss=finite(loss),
        lr=learning_rate(step, args),
        noise=measured,
    )
    shown = f"loss {loss:.3f}"
    if noise:
        shown += f"  B_simple {noise.interval()}"
    return shown


def noise_table(noise: gnsfx.NoiseScale, context: int) -> Table:
    title = f"Gradient noise scale in examples; an example is a sequence of {context} characters"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("group", no_wrap=True)
    for heading in ("parameters", "B_simple", "95% interval", "tr(Sigma)", "share", "|G|^2"):
        table.add_column(heading, justify="right", no_wrap=True)
    groups = noise.by_group()
    rows = [(name, stats, sum([stats.elements])) for name, stats in groups.items()]
    for name, stats, elements in [*rows, ("total", noise, sum(elements for *_, elements in rows))]:
        if name == "total":
            table.add_section()
        table.add_row(
            name,
            f"{elements:,}",
            f"{stats.b_simple:,.4g}" if stats.interval().bounded else "",
            str(stats.interval()),
            f"{stats.tr_sigma:.3g}",
            f"{stats.tr_sigma / noise.tr_sigma:.1%}",
            f"{max(stats.g_sq, 0.0):.3g}",
        )
    return table


def draw(log: Log, path: Path) -> None:
    """Loss, and B_simple by group, over the tokens seen."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    steps = [record for record in log.records if record["kind"] == "step"]
    tokens = [record["tokens"] for record in steps]
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    upper.plot(tokens, [record["loss"] for record in steps], color="black")
    upper.set_ylabel("loss, nats per character")
    for name in steps[-1]["noise"]:
        values = [record["noise"].get(name, {}).get("b_simple") or math.nan for record in steps]
        lower.plot(tokens, values, label=name, linewidth=2.5 if name == "total" else 1.2)
    known = [r for r in steps if r["noise"].get("total", {}).get("high") is not None]
    ends = ([r["noise"]["total"][end] for r in known] for end in ("low", "high"))
    lower.fill_between([r["tokens"] for r in known], *ends, alpha=0.2, linewidth=0, label="total, 95%")
    lower.set_yscale("log")
    lower.set_ylabel("B_simple, examples")
    lower.set_xlabel("tokens")
    for axes in (upper, lower):
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    if steps[-1]["noise"]:
        lower.legend()
    figure.savefig(path)
    pyplot.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(
        description="Train a small character-level GPT and print the gradient noise scale of its layers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=500)
    parser.add_argument("--batch", type=positive, default=16, help="sequences per step")
    parser.add_argument("--context", type=positive, default=64, help="characters per sequence")
    parser.add_argument("--layers", type=positive, default=5)
    parser.add_argument("--width", type=positive, default=128)
    parser.add_argument("--heads", type=positive, default=4)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--text", type=Path, help="a UTF-8 file instead of the documentation that ships with Python")
    parser.add_argument("--out", type=Path, default=Path("runs/train_gpt"), help="folder of log.jsonl and noise.svg")
    parser.add_argument("--params", choices=("all", "norm"), default="all", help="which parameters to measure")
    parser.add_argument("--log-every", type=positive, default=5, help="steps per line of the log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="plain torch.compile, nothing measured")
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--width {args.width} is not a multiple of --heads {args.heads}")
    return args


def run(args: argparse.Namespace, console: Console) -> int:
    torch.manual_seed(args.seed)
    text = Text(read_text(args.text), args.context)
    model = GPT(len(text.vocabulary), args.context, args.width, args.layers, args.heads)
    size = sum(parameter.numel() for parameter in model.parameters())
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    with Log(args.out) as log:
        log.write("header", schema=SCHEMA, units=UNITS, settings=settings, parameters=size, torch=torch.__version__)
        console.print(
            f"{size:,} parameters; {len(text.train):,} characters to train on, {len(text.held_out):,} held out"
        )
        noise, finished = train(args, text, model, log, console)
        if not any(record["kind"] == "step" for record in log.records):
            return INTERRUPTED
        loss = text.validation_loss(model, args.batch)
        log.write("end", validation_loss=finite(loss), finished=finished)
    console.print(f"validation loss {loss:.3f} nats per character")
    if noise:
        console.print(noise_table(noise, args.context))
    plot = args.out / "noise.svg"
    draw(log, plot)
    console.print(f"log {log.path}   plot {plot}")
    return 0 if finished else INTERRUPTED


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args, Console())
    except UserError as error:
        print(f"train_gpt: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
