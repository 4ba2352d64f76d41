"""A program while it is being written: its lines, its modules, and the shapes and examples of its values.

Sizes carry the text that a program computes them with, so that a program keeps its meaning for symbolic sizes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Size:
    value: int
    text: str


def const(value: int) -> Size:
    return Size(value, str(value))


ONE = const(1)


def times(*sizes: Size) -> Size:
    parts = [s for s in sizes if s.text != "1"]
    return Size(math.prod(s.value for s in sizes), " * ".join(s.text for s in parts) or "1")


@dataclass(frozen=True)
class Value:
    """Dimension ``batch`` has size outer * B * inner, the example is the middle factor."""

    name: str
    shape: tuple[Size, ...]
    batch: int = 0
    outer: Size = ONE
    inner: Size = ONE

    def __str__(self) -> str:
        return self.name

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def free(self) -> list[int]:
        """Dimensions without the examples."""
        return [d for d in range(self.rank) if d != self.batch]

    @property
    def last(self) -> int:
        return self.shape[-1].value

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(s.value for s in self.shape)

    @property
    def plain(self) -> bool:
        return self.outer.value == self.inner.value == 1


@dataclass(frozen=True)
class Input:
    """``kind`` is "floats", or the number of classes of integers; ``batch`` the dimension of the examples."""

    name: str
    kind: str | int
    shape: tuple[int, ...]
    batch: int | None = 0


@dataclass
class Draft:
    rng: random.Random
    pool: tuple[int, ...]
    B: Size
    smooth: bool = False
    inputs: list[Input] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    ids: list[tuple[Value, int]] = field(default_factory=list)
    tables: list[tuple[str, int, int]] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)
    count: int = 0

    # ---------------------------------------------------------------------------------------------- random choices

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options: Sequence) -> any:  # type: ignore[valid-type]
        return self.rng.choice(options)

    def width(self) -> int:
        """A feature size; it collides with other sizes most of the time."""
        return self.pick(self.pool) if self.chance(0.8) else self.rng.randint(1, 5)

    def smoothly(self, x: str) -> str:
        """A nonlinear function of ``x`` that stays small."""
        return f"{x}.{self.pick(('tanh', 'sin', 'sigmoid', 'atan'))}()"

    # ------------------------------------------------------------------------------------------------------- names

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def module(self, constructor: str, again: float = 0.35) -> str:
        """A module made by ``constructor``, sometimes one that the program uses already."""
        if constructor in self.made and self.chance(again):
            return self.made[constructor]
        name = f"self.{self.name('m')}"
        self.init.append(f"{name} = {constructor}")
        self.made[constructor] = name
        return name

    def parameter(self, *shape: int, again: float = 0.25) -> str:
        numbers = ", ".join(map(str, shape))
        return self.module(f"nn.Parameter(torch.randn({numbers}))" if shape else "nn.Parameter(torch.rand(()))", again)

    def buffer(self, value: str) -> str:
        name = self.name("c")
        self.init.append(f'self.register_buffer("{name}", {value})')
        return f"self.{name}"

    def table(self, V: int, D: int, options: str = "") -> str:
        name = self.module(f"nn.Embedding({V}, {D}{options})")
        self.tables.append((name, V, D))
        return name

    def add_input(self, prefix: str, kind: str | int, shape: Sequence[Size], batch: int = 0) -> Value:
        name = self.name(prefix)
        self.inputs.append(Input(name, kind, tuple(s.value for s in shape), batch))
        return Value(name, tuple(shape), batch)

    # ------------------------------------------------------------------------------------------------------ values

    def bind(
        self, expression: str, shape: Sequence[Size | int], v: Value, batch: int | None = None,
        outer: Size | None = None, inner: Size | None = None,
    ) -> Value:  # fmt: skip
        """A line ``h = expression``. A size given as a number is read off the result in later lines."""
        name = self.name("h")
        self.body.append(f"{name} = {expression}")
        sizes = tuple(s if isinstance(s, Size) else Size(s, f"{name}.shape[{d}]") for d, s in enumerate(shape))
        found = Value(name, sizes, v.batch if batch is None else batch, outer or v.outer, inner or v.inner)
        self.values.append(found)
        return found

    def like(self, v: Value, expression: str) -> Value:
        return self.bind(expression, v.shape, v)

    def peers(self, v: Value, test: Callable[[Value], bool] = lambda _: True) -> list[Value]:
        """Earlier values with the examples at the same place."""
        return [
            u
            for u in self.values
            if (u.batch, u.outer.value, u.inner.value, u.rank) == (v.batch, v.outer.value, v.inner.value, v.rank)
            and u.shape[u.batch].value == v.shape[v.batch].value
            and test(u)
        ]


Step = Callable[[Draft, Value], Value | None]
STEPS: list[tuple[float, Step]] = []
COUPLING: list[Step] = []


def step(weight: float = 1.0) -> Callable[[Step], Step]:
    """Enter a step: it continues the program from a value, or says None where it does not apply."""

    def enter(function: Step) -> Step:
        STEPS.append((weight, function))
        return function

    return enter


def couples(function: Step) -> Step:
    """Enter a step in which examples interact."""
    COUPLING.append(function)
    return function


def replaced(shape: Sequence[Size], at: int, size: Size | int) -> list[Size | int]:
    return [size if d == at % len(shape) else s for d, s in enumerate(shape)]


def index(rank: int, at: int, what: str) -> str:
    """``[:, :, what]`` with ``what`` at dimension ``at``."""
    return "[" + ", ".join([*[":"] * at, what]) + "]"
