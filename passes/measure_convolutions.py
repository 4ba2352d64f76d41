"""The norms of a convolution's contributions: one op computes them and the weight gradient.

    convolution_backward(g, x, w)[1]     -> convolution_sq_norm(g, x, w): weight gradient, s_b
    convolution_backward, as a whole     -> the same without its weight gradient, which would be computed twice

In bf16 and fp16 the gradient stays what it was.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from gnsfx.passes.contractions import Convolution
from gnsfx.passes.emit import Emitter
from gnsfx.passes.estimate import Estimator
from gnsfx.passes.record import Record
from gnsfx.passes.rules.table import arguments
from gnsfx.passes.select_path import Planner
from gnsfx.passes.stacks import Stacks, rounds

aten, ops = torch.ops.aten, torch.ops.gnsfx


@dataclass(frozen=True, slots=True)
class Convolutions:
    """``without_weight``: (backward of a convolution, the gradient it is to read), in effect from ``apply`` on."""

    emit: Emitter
    planner: Planner
    estimator: Estimator
    stacks: Stacks
    without_weight: list[tuple[Node, Node]] = field(default_factory=list)

    def apply(self) -> None:
        for backward, g in self.without_weight:
            bias = any(user.args[1] == 2 and user.users for user in backward.users)
            mask = [arguments(backward)["output_mask"][0], False, bias]
            backward.args = (g, *backward.args[1:10], mask)
            kept = zip(backward.meta["val"], mask, strict=True)
            backward.meta["val"] = tuple(value if keep else None for value, keep in kept)

    def measure(self, record: Record, found: Convolution) -> None:
        emit, backward, choice = self.emit, found.node.args[0], self.planner.convolution(found)
        assert isinstance(backward, Node)
        op = arguments(backward)
        record.take(choice)
        with emit.at(found.node):
            if self.estimator.convolution(record, choice, *found.factors(emit), op):
                return
        if not rounds(found.node):
            found = replace(found, g=replace(found.g, node=self._channels_last(found.g.node, backward)))
        with emit.at(found.node):
            g, x = found.rows(emit)
            both = emit(ops.convolution_sq_norm.default, g, x, op["weight"], *[op[n] for n in (
                "stride", "padding", "dilation", "transposed", "output_padding", "groups")])  # fmt: skip
            record.sq_norm, weight = emit(operator.getitem, both, 1), emit(operator.getitem, both, 0)
        if rounds(found.node):
            return
        self.stacks.replace(found.node, weight)
        for user in backward.users:
            if user.args[1] == 2:  # oneDNN would compute the weight gradient once more to get at that of the bias
                self.stacks.of(user)
        self.without_weight.append((backward, found.g.node))

    def _channels_last(self, g: Node, backward: Node) -> Node:
        """A CPU convolves images with their channels last. Inductor would write ``g`` once more for each op that reads it."""
        if g.meta["val"].dim() != 4 or not g.meta["val"].is_cpu:
            return g
        with self.emit.at(backward):
            # Inductor drops a clone, and then copies what two ops read as a view.
            own = self.emit(aten.mul.Tensor, g, 1)
            own.meta["val"] = own.meta["val"].contiguous(memory_format=torch.channels_last)
            return own
