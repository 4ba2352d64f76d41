"""Swapping layer classes, as in "Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise Scale in
Transformers" (Gray et al., arXiv 2411.00999), written from its description.

Linear: P_b = g_b^T x_b, s_b = |P_b|^2, grad W = sum_b P_b, in one backward ("simultaneous"); Embedding: the rows of every
example are added up apart; LayerNorm: the sums over positions come first, per example, the sum over examples after.

Other layers, and weights used outside of their module, have no norms. Norms come out as the gradient of a number per
example that each layer adds nothing with, so that the layers can be compiled whole. Two things are better than there:
an input with one position per example takes |g_b|^2 |x_b|^2, and the norms are kept per example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import Case, training_of
from benchmarks.peers import Measure


def by_example(x: Tensor) -> Tensor:
    """[B, ..., D] -> [B, T, D]"""
    return x.reshape(len(x), -1, x.shape[-1])


def squares(x: Tensor) -> Tensor:
    """[B, ...] -> [B]"""
    return x.flatten(1).square().sum(1)


class LinearFunction(torch.autograd.Function):
    """x [B, ..., I], weight [O, I], bias [O]; two probes [B]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *probes: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        x_b, g_b = by_example(x), by_example(grads[0])
        if x_b.shape[1] == 1:
            weight_norms = squares(g_b) * squares(x_b)
            weight_grad = g_b[:, 0].T @ x_b[:, 0]
        else:
            stack = g_b.mT @ x_b
            weight_norms, weight_grad = squares(stack), stack.sum(0)
        if not ctx.needs_input_grad[2]:
            return grads[0] @ weight, weight_grad, None, weight_norms, None
        bias_b = g_b.sum(1)
        return grads[0] @ weight, weight_grad, bias_b.sum(0), weight_norms, squares(bias_b)


class EmbeddingFunction(torch.autograd.Function):
    """ids [B, ...], weight [V, D]; a probe [B]."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, probe: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        B, D = len(ids), grads[0].shape[-1]
        places = ids.reshape(B, -1) + ctx.rows * torch.arange(B, device=ids.device)[:, None]
        stack = grads[0].new_zeros(B * ctx.rows, D)
        stack = stack.index_add(0, places.flatten(), grads[0].reshape(-1, D)).view(B, ctx.rows, D)
        return None, stack.sum(0), squares(stack)


class LayerNormFunction(torch.autograd.Function):
    """x [B, ..., D], weight [D], bias [D]; two probes [B]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *probes: Tensor | None) -> Tensor:
        y, mean, scale = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, scale, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, mean, scale, weight = ctx.saved_tensors
        normal, g = (x - mean) * scale, grads[0]
        weight_b, bias_b = by_example(g * normal).sum(1), by_example(g).sum(1)
        inner = g * weight
        along = (inner * normal).mean(-1, keepdim=True)
        x_grad = scale * (inner - inner.mean(-1, keepdim=True) - normal * along)
        return x_grad, weight_b.sum(0), bias_b.sum(0), None, squares(weight_b), squares(bias_b)


class Swapped(nn.Module):
    """In place of ``layer``: its parameters under their names, and a probe of B zeros for each."""

    def __init__(self, layer: nn.Module, batch: int) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            parameter = getattr(layer, name, None)
            self.register_parameter(name, parameter)
            probe = None if parameter is None else nn.Parameter(parameter.new_zeros(batch))
            self.register_parameter(f"{name}_probe", probe)


class Linear(Swapped):
    def forward(self, x: Tensor) -> Any:
        return LinearFunction.apply(x, self.weight, self.bias, self.weight_probe, self.bias_probe)


class Embedding(Swapped):
    def forward(self, ids: Tensor) -> Any:
        return EmbeddingFunction.apply(ids, self.weight, self.weight_probe)


class LayerNorm(Swapped):
    def __init__(self, layer: nn.LayerNorm, batch: int) -> None:
        super().__init__(layer, batch)
        self.eps = layer.eps

    def forward(self, x: Tensor) -> Any:
        return LayerNormFunction.apply(x, self.weight, self.bias, self.eps, self.weight_probe, self.bias_probe)


CLASSES: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.LayerNorm: LayerNorm,
}


def swap(module: nn.Module, batch: int) -> nn.Module:
    """Every layer of a known class replaced, in place."""
    for name, child in module.named_children():
        if type(child) in CLASSES:
            setattr(module, name, CLASSES[type(child)](child, batch))
        else:
            swap(child, batch)
    return module


def prepare(case: Case, backend: str | None = None) -> Measure:
    swap(case.module, len(case.inputs))
    training: Any = training_of(case.module)
    training = torch.compile(training, backend=backend, fullgraph=True) if backend else training
    probes = {n.removesuffix("_probe"): p for n, p in case.module.named_parameters() if n.endswith("_probe")}

    def measure(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        training(inputs, targets).backward()
        norms = {name: probe.grad for name, probe in probes.items() if probe.grad is not None}
        for probe in probes.values():
            probe.grad = None
        return norms

    return measure


def prepare_compiled(case: Case) -> Measure:
    return prepare(case, "inductor")
