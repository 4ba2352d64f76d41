"""A random program from a seed: a module as text, its inputs, and its loss as a sum of contributions of examples.

    generate(seed)            the program; the same for ever
    generate(seed, length)    its first ``length`` steps

A program has four functions: ``body`` (the network), ``each`` (the contribution of every example to the loss, the
definition of the truth), ``loss`` (their sum, written as people write it) and ``forward``, which is compiled: it ends
with the body, with ``each`` or with the loss.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from gnsfx.marks import mark_batch
from tests.programs import folds, functional, layers, modern, parameters, weights  # noqa: F401  (fill the table of steps)
from tests.programs.draft import COUPLING, STEPS, Draft, Input, Size, Value, const
from tests.programs.folds import plain
from tests.programs.parameters import lone_parameter
from tests.programs.weights import embedding

MOST_ELEMENTS = 1500
REGULARISERS = ("0.1 * sum(p.square().sum() for p in self.parameters())", "0.05 * next(self.parameters()).abs().sum()")


@dataclass(frozen=True)
class Program:
    seed: int
    source: str
    inputs: tuple[Input, ...]
    ends: str
    dtype: torch.dtype
    autocast: bool
    dynamic: bool | None
    path: str
    coupled: bool

    def __str__(self) -> str:
        shapes = ", ".join(
            f"{i.name}: {i.kind if i.kind == 'floats' else f'ints below {i.kind}'} {list(i.shape)}"
            + (f" batch {i.batch}" if i.batch else "")
            for i in self.inputs
        )
        how = f"{str(self.dtype).removeprefix('torch.')}{' autocast' * self.autocast}, dynamic={self.dynamic}, path={self.path}"
        return f"# seed {self.seed}: {how}{', coupled' * self.coupled}\n# {shapes}\n{self.source}"

    def build(self) -> nn.Module:
        """The module in fp64, with no parameter at a special value."""
        torch.manual_seed(self.seed)
        scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
        exec(compile(self.source, f"<program {self.seed}>", "exec"), scope)  # its lines appear in reasons: see sources
        model = scope["Program"]()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
        return model.double()

    def data(self, draw: int = 1) -> list[Tensor]:
        torch.manual_seed(self.seed + draw)
        return [self._input(i) for i in self.inputs]

    def _input(self, i: Input) -> Tensor:
        if i.kind == "floats":
            return torch.randn(i.shape, dtype=torch.float64)
        if i.kind == "weights":
            return torch.rand(i.shape, dtype=torch.float64) + 0.5
        found = torch.randint(abs(int(i.kind)), i.shape)
        if int(i.kind) < 0:  # targets with positions to ignore
            found[torch.rand(i.shape) < 0.3] = -100
            found.view(-1)[-1] = 0
        return found

    def marked(self, inputs: list[Tensor]) -> list[Tensor]:
        return [mark_batch(x, i.batch) if i.batch else x for x, i in zip(inputs, self.inputs, strict=True)]


def generate(seed: int, length: int | None = None) -> Program:
    rng = random.Random(seed)
    dtype, autocast = rng.choices(
        ((torch.float64, False), (torch.float32, False), (torch.float32, True), (torch.bfloat16, False)), (75, 17, 4, 4)
    )[0]
    dynamic, path = (
        rng.random() < 0.05 or None,
        rng.choices(("auto", "materialise", "fused", "ghost"), (70, 10, 10, 10))[0],
    )
    coupled = rng.random() < 0.12
    steps = rng.randint(2, 8)
    steps = steps if length is None else min(length, steps)
    pool = tuple(rng.sample(range(1, 6), 2))
    examples = rng.choices((1, 2, 3, 4, pool[0]), (1, 4, 4, 3, 6))[0]
    d = Draft(random.Random(f"{seed} steps"), pool, Size(examples, "B"), smooth=autocast or dtype is torch.bfloat16)
    v = begin(d, rng)
    where = rng.randrange(max(steps, 1)) if coupled else None
    for number in range(steps):
        v = further(d, v)
        if number == where or (coupled and steps < (where or 0) + 1 == number + 1):
            v = mixed(d, v)
    while not any("nn." in line and used(line, d.body) for line in d.init):
        v = lone_parameter(d, v) or v
    source, ends = finish(d, v, random.Random(f"{seed} loss"))
    return Program(seed, source, tuple(d.inputs), ends, dtype, autocast, dynamic, path, coupled)


def begin(d: Draft, rng: random.Random) -> Value:
    """The inputs, and the first value."""
    T, D = Size(d.width(), "T"), const(d.width())
    kind = rng.choices(
        ("tokens", "rows", "steps", "time first", "channels", "picture", "volume"), (4, 3, 6, 1.5, 2, 3, 0.3)
    )[0]
    if kind == "tokens":
        V = d.pick((d.B.value + 1, 5, d.width() + 1))
        i = d.add_input("i", V, (d.B, T))
        d.body.append(f"B, T = {i}.shape")
        d.ids.append((i, V))
        if d.chance(0.2):  # one token for each example
            one = Value(f"{i}[:, 0]", (d.B,))
            return d.bind(f"{embedding(d, V, D.value)}({one})", (d.B, D), one)
        return d.bind(f"{embedding(d, V, D.value)}({i})", (d.B, T, D), i)
    if kind == "time first":
        x = d.add_input("x", "floats", (T, d.B, D), batch=1)
        d.body.append(f"T, B = {x}.shape[:2]")
    else:
        space = {
            "rows": (),
            "steps": (T,),
            "channels": (T,),
            "picture": (T, const(d.width())),
            "volume": (const(2), const(2), const(d.width())),
        }[kind]
        first = {"channels": (D,), "picture": (D,), "volume": (D,)}.get(kind, ())
        x = d.add_input("x", "floats", (d.B, *first, *space, *([] if first else [D])))
        d.body.append(f"B = {x}.shape[0]")
        if T in space:
            d.body.append(f"T = {x}.shape[{1 + len(first)}]")
        if kind == "steps" and d.chance(0.4):
            V = d.width() + 1
            d.ids.append((d.add_input("i", V, (d.B, T)), V))
    d.values.append(x)
    return x


def further(d: Draft, v: Value) -> Value:
    """One step that applies and keeps the value small."""
    by_name = sorted(STEPS, key=lambda entry: entry[1].__name__)  # whatever the order of imports
    rates, steps = zip(*by_name, strict=True)
    for _ in range(40):
        state = len(d.init), len(d.body), len(d.values), len(d.inputs), len(d.tables), dict(d.made)
        found = d.rng.choices(steps, rates)[0](d, v)
        if found is not None and math.prod(found.sizes) <= MOST_ELEMENTS and found.rank <= 5:
            return found
        for kept, values in zip(state, (d.init, d.body, d.values, d.inputs, d.tables), strict=False):
            del values[kept:]
        d.made = state[-1]
    return v


def mixed(d: Draft, v: Value) -> Value:
    for _ in range(20):
        found = d.pick(COUPLING)(d, v)
        if found is not None:
            return found
    return v


def finish(d: Draft, v: Value, rng: random.Random) -> tuple[str, str]:
    """The loss, and the text of the whole module."""
    body, d.rng = d.body, rng
    results = [v]
    if d.chance(0.15):
        results.append(d.pick(d.values))
    d.body = settled = []
    values = [front(d, u) for u in results]
    made = {line.split(" = ")[0] for line in settled} | set(map(str, results))
    if set(re.findall(r"\bh\d+", "\n".join(settled))) - made:  # a size is read off a value inside the network
        body, settled, results = [*body, *settled], [], values
    lines, each, loss = losses(d, values)
    ends = d.pick(("body", "body", "each", "loss", "loss"))
    if ends == "loss" and d.chance(0.25):
        extra = d.pick(REGULARISERS)
        each, loss = f"{each} + {extra} / {d.B.text}", f"{loss} + {extra}"
    names = ", ".join(i.name for i in d.inputs)
    out = ", ".join(map(str, results))
    sizes = [line for line in body if line.split(" = ")[0] in ("B", "T", "B, T", "T, B")]
    shared = [*sizes, f"{out} = out", *settled, *lines]
    forward = {
        "body": f"self.body({names})",
        "each": f"self.each(self.body({names}), {names})",
        "loss": f"self.loss(self.body({names}), {names})",
    }
    functions = [
        ("__init__(self)", ["super().__init__()", *(x for x in d.init if used(x, body))]),
        (f"body(self, {names})", [*body, f"return {out}"]),
        (f"each(self, out, {names})", [*shared, f"return {each}"]),
        (f"loss(self, out, {names})", [*shared, f"return {loss}"]),
        (f"forward(self, {names})", [f"return {forward[ends]}"]),
    ]
    text = ["class Program(nn.Module):"]
    for head, content in functions:
        text += [f"    def {head}:", *(f"        {line}" for line in content)]
    return "\n".join(text) + "\n", ends


def used(line: str, body: list[str]) -> bool:
    """Whether the network uses what a line of the constructor makes."""
    name = re.findall(r"\b[mc]\d+", line)[0]
    return re.search(rf"\b{name}\b", "\n".join(body)) is not None


def front(d: Draft, v: Value) -> Value:
    """The examples in dimension 0, apart."""
    v = plain(d, v)
    if v.batch == 0:
        return v
    return d.bind(f"{v}.movedim({v.batch}, 0)", [v.shape[v.batch], *(v.shape[a] for a in v.free)], v, batch=0)


def losses(d: Draft, values: list[Value]) -> tuple[list[str], str, str]:
    """Lines, the contribution of each example, and their sum."""
    v = values[0]
    rest = math.prod(v.sizes[1:])
    C = v.last if v.rank > 1 else 0
    kind = d.rng.choices(
        ("squares", "plain", "mse", "entropy", "binary", "huber"),
        (4, 2, 2, 4 if C > 1 and len(values) == 1 else 0, 1, 1),
    )[0]
    if kind == "entropy":
        return entropy(d, v, rest // C)
    flat = [f"{u}.reshape(B, -1)" for u in values]
    lines = [f"y = {flat[0] if len(flat) == 1 else f'torch.cat(({flat[0]}, {flat[1]}), 1)'}"]
    width = sum(math.prod(u.sizes[1:]) for u in values)
    if kind == "plain":
        if d.chance(0.5):
            return lines, "y.sum(1) / y.numel()", "y.mean()" if len(values) > 1 else f"{v}.mean()"
        return lines, "y.sum(1)", "y.sum()" if len(values) > 1 else f"{v}.sum()"
    if kind in ("mse", "huber", "binary"):
        t = d.add_input("t", "weights" if kind == "binary" else "floats", (d.B, const(width)))
        name = {"mse": "mse_loss", "huber": "smooth_l1_loss", "binary": "binary_cross_entropy_with_logits"}[kind]
        reduced = d.pick(("mean", "sum"))
        one = f"F.{name}(y, {t}, reduction='none').sum(1)" + (" / y.numel()" if reduced == "mean" else "")
        return lines, one, f"F.{name}(y, {t}, reduction='{reduced}')"
    lines.append("l = (y.sin() + y ** 2 / 3).sum(1)")
    return lines, *d.pick((("l / B", "l.mean()"), ("l", "l.sum()"), weighted(d)))


def weighted(d: Draft) -> tuple[str, str]:
    w = d.add_input("w", "weights", (d.B,))
    return d.pick(((f"l * {w}", f"(l * {w}).sum()"), (f"l * {w} / {w}.sum()", f"(l * {w}).sum() / {w}.sum()")))


def entropy(d: Draft, v: Value, K: int) -> tuple[list[str], str, str]:
    """Cross entropy of every position; targets of -100 do not count."""
    ignore = d.chance(0.5)
    t = d.add_input("t", -v.last if ignore else v.last, (d.B, const(K)))
    smooth = ", label_smoothing=0.1" if d.chance(0.2) else ""
    logits = f"{v}.reshape(-1, {v.last})" if d.chance(0.7) or v.rank == 2 else f"{v}.flatten(0, -2)"
    lines = [f"z = {logits}", f"t = {t}.reshape(-1)"]
    one = f"F.cross_entropy(z, t, reduction='none'{smooth}).view(B, {K}).sum(1)"
    kind = d.pick(("mean", "sum", "tokens"))
    if kind == "tokens":  # the mean over the positions of each example
        each = f"{one} / ({t} >= 0).sum(1).clamp(min=1)"
        return [*lines, f"l = {each}"], "l / B", "l.mean()"
    if kind == "mean":
        return lines, f"{one} / (t >= 0).sum()", f"F.cross_entropy(z, t{smooth})"
    return lines, one, f"F.cross_entropy(z, t, reduction='sum'{smooth})"
