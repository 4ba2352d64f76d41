"""Estimates in place of exact norms, where a budget says so: which ops are written, and what they would take.

    exact      s_b on the path that the planner chose; the gradient may be rewritten as the sum of what the norms need
    estimate   (s_b, its variance) = estimate_sq_norm(x, g, seed, ...); the gradient stays the node that it was

The slot of the parameter is the salt of its random numbers, so that errors of different parameters are independent.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from gnsfx._torch import size_hint
from gnsfx.kernels.cost import Cost
from gnsfx.kernels.cost_convolution import convolution_paths
from gnsfx.passes.budget import Estimate, Work
from gnsfx.passes.emit import Emitter

if TYPE_CHECKING:
    from gnsfx.passes.record import Record
    from gnsfx.passes.select_path import Choice

ops = torch.ops.gnsfx
_PASSES_OF_SIGNS = 4  # bits, numbers, scaled, read
BESIDE = ("ghost", "outer")
"""Paths that leave the gradient as it is."""


@dataclass(frozen=True, slots=True)
class Estimator:
    """``seed``: the graph input that random numbers are made of; None without a budget. ``chosen``: slot -> estimate."""

    emit: Emitter
    seed: Node | None = None
    chosen: Mapping[int, Estimate] = field(default_factory=dict)

    def matmul(self, record: Record, choice: Choice, x: Node, g: Node) -> bool:
        """Write the estimate for x (B, E, T, I), g (B, E, T, O), if that was chosen; else note what it would take."""
        estimate = self.chosen.get(record.slot)
        if estimate is not None:
            gram = choice.path in BESIDE  # the norms of outer products are Grams of one position
            self._write(record, estimate, ops.estimate_sq_norm.default, [x, g], [gram])
        elif self.seed is not None:
            (B, E, T, I), O = _sizes(x), _sizes(g)[3]
            read = E * T * (I + O)
            signs = _PASSES_OF_SIGNS * E * min(I, O) * x.meta["val"].dtype.itemsize
            record.work = _work(x, B, Cost(flops=2 * B * read, bytes=B * signs), read, choice)
        return estimate is not None

    def convolution(self, record: Record, choice: Choice, g: Node, x: Node, op: Mapping[str, Any]) -> bool:
        """The same for grad_output (B, R, O, ...), input (B, R, C, ...) and the arguments of ``convolution_backward``."""
        estimate = self.chosen.get(record.slot)
        if estimate is not None:
            names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
            inputs = [g, x, op["weight"], *[op[n] for n in names]]
            self._write(record, estimate, ops.estimate_convolution_sq_norm.default, inputs, [])
        elif self.seed is not None:
            (B, R, O, *out), (_, _, C, *space) = (_sizes(n) for n in (g, x))
            weight, groups, transposed = _sizes(op["weight"]), size_hint(op["groups"]), op["transposed"]
            value, settings = x.meta["val"], (op["stride"], op["padding"], op["dilation"], transposed, groups)
            thin = [weight[0], 1, *weight[2:]] if transposed else [groups, *weight[1:]]
            paths = convolution_paths(
                B, R, thin, space if transposed else out, *settings, value.dtype.itemsize, value.device.type
            )
            mixing, read = R * O * math.prod(out), R * (O * math.prod(out) + C * math.prod(space))
            signs = _PASSES_OF_SIGNS * O * value.dtype.itemsize
            column = paths["convolution"] + Cost(flops=2 * B * mixing, bytes=B * signs)
            record.work = _work(x, B, column, read, choice)
        return estimate is not None

    def _write(self, record: Record, estimate: Estimate, op: Any, inputs: list[Any], rest: list[Any]) -> None:
        assert self.seed is not None
        both = self.emit(op, *inputs, self.seed, record.slot, estimate.examples, estimate.columns, *rest)
        record.sq_norm, record.variance = (self.emit(operator.getitem, both, i) for i in (0, 1))
        record.status, record.path, record.reason = "estimated", estimate.path, estimate.reason
        record.extra = estimate.seconds
        record.costs = {**record.costs, estimate.path: record.costs["plain"] + estimate.cost}


def _norms(choice: Choice) -> Cost:
    """Of a path by itself: some do not form the products that the gradient is a sum of."""
    taken, plain = choice.costs[choice.path], choice.costs["plain"]
    if choice.path not in BESIDE:
        return taken
    return replace(taken, **{f.name: getattr(taken, f.name) - getattr(plain, f.name) for f in fields(Cost)})


def _sizes(node: Node) -> list[int]:
    return [size_hint(s) for s in node.meta["val"].shape]


def _work(x: Node, B: int, column: Cost, read: float, choice: Choice) -> Work:
    value = x.meta["val"]
    return Work(B, column, value.dtype.itemsize * read, _norms(choice), value.dtype, value.device.type)
