"""The random numbers of a batch, replayed for one example that runs alone.

the whole batch     rand((B, T)) -> u          recorded
example b alone     rand((1, T)) -> u[b]       replayed
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from gnsfx.errors import GnsError

SAMPLERS = (
    "rand",
    "bernoulli",
    "normal",
    "multinomial",
    "uniform",
    "exponential",
    "poisson",
    "geometric",
    "cauchy",
    "log_normal",
    "binomial",
)
PASS_LOSS = (
    "Return the logits from the model and pass loss=, a callable that turns the model's output into one loss per example: "
    "gnsfx.verify(model, *inputs, loss=lambda output: losses of shape (B,))."
)


class Tape:
    """The random numbers of the whole batch, and where replaying them for one example has got to."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []
        self.example: tuple[int, int] | None = None
        self._position = 0

    def rewind(self, b: int, B: int) -> None:
        self.example, self._position = (b, B), 0

    def next(self, like: Tensor, op: Any) -> Tensor:
        """The part of the next sample that belongs to the example."""
        assert self.example is not None
        b, B = self.example
        if self._position >= len(self.samples):
            raise GnsError(f"an example that runs alone draws more random numbers than the batch ({op}). {PASS_LOSS}")
        whole = self.samples[self._position]
        self._position += 1
        if whole.shape == like.shape:
            return whole
        differ = [d for d in range(like.dim()) if like.dim() == whole.dim() and like.shape[d] != whole.shape[d]]
        if len(differ) != 1 or whole.shape[differ[0]] != B * like.shape[differ[0]]:
            raise GnsError(
                f"random numbers of shape {list(whole.shape)} ({op}) have no part of shape {list(like.shape)} for one of {B} examples. {PASS_LOSS}"
            )
        return whole.narrow(differ[0], b * like.shape[differ[0]], like.shape[differ[0]])


class Taped(Interpreter):
    """Runs a graph, recording what random ops return, or replaying it."""

    def __init__(self, gm: GraphModule, tape: Tape) -> None:
        super().__init__(gm)
        self.tape = tape

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if torch.Tag.nondeterministic_seeded not in getattr(n.target, "tags", ()):
            return result
        if isinstance(result, Tensor) and n.target._schema.name.split("::")[1].startswith(SAMPLERS):  # type: ignore[union-attr]
            if self.tape.example is not None:
                return self.tape.next(result, n.target)
            self.tape.samples.append(result)
        elif self.tape.example is not None and _draws(n):
            raise GnsError(
                f"the loss is computed inside the model, and the random numbers of {n.target} cannot be replayed for single examples. {PASS_LOSS}"
            )
        return result


def _draws(node: Node) -> bool:
    """Attention ops are random only with dropout."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    if "dropout_p" not in names:
        return True
    position = names.index("dropout_p")
    return bool(node.kwargs.get("dropout_p", node.args[position] if position < len(node.args) else 0.0))
