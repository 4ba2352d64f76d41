"""torch.func: the gradient of the loss of one example, vectorised over the batch. P_b for all b at once, then |P_b|^2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.models import Case, loss_of
from benchmarks.peers import Measure


def prepare(case: Case, compiled: bool = False) -> Measure:
    parameters = dict(case.module.named_parameters())
    buffers = dict(case.module.named_buffers())

    def loss(values: dict[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
        return loss_of(functional_call(case.module, (values, buffers), inputs[None]), target[None])

    def norms_and_gradients(values: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Any:
        stacks = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(values, inputs, targets)
        B = len(inputs)
        norms = {name: stack.flatten(1).square().sum(1) / B**2 for name, stack in stacks.items()}
        return norms, {name: stack.mean(0) for name, stack in stacks.items()}

    run: Any = torch.compile(norms_and_gradients, fullgraph=True) if compiled else norms_and_gradients

    def measure(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        norms, gradients = run({name: p.detach() for name, p in parameters.items()}, inputs, targets)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        return norms

    return measure


def prepare_compiled(case: Case) -> Measure:
    return prepare(case, compiled=True)
