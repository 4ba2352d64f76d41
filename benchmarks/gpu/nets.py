"""The models of the GPU's benchmarks, from parts of ``benchmarks/models.py``; nothing here needs more than PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import Block, Case, Llama, ViT, image_batch, token_batch


class GPT2(nn.Module):
    """Learned positions, biases, the head tied to the token embedding; 124M with GPT-2's sizes."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


class RMSNormByHand(nn.Module):
    """As in the code of Llama: in fp32, rounded before the scale."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def by_hand(module: nn.Module) -> nn.Module:
    """Every RMSNorm replaced by the written-out one."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.RMSNorm):
                setattr(parent, name, RMSNormByHand(child.weight, child.eps or 1e-6))
    return module


def build(name: str, size: Mapping[str, int], device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    """ "gpt2", "llama" or "vit"; ``size`` is that of the model and the number of examples, "batch"."""
    arguments = {key: value for key, value in size.items() if key != "batch"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kinds: dict[str, Any] = {"gpt2": GPT2, "llama": Llama, "vit": ViT}
        module = kinds[name](**arguments)
        if name == "vit":
            inputs, targets = image_batch(size["batch"], size["image"], size["classes"])
        else:
            inputs, targets = token_batch(size["batch"], size["context"], size["vocabulary"])
    inputs = inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)
    return Case(name, module.to(device, dtype), inputs, targets.to(device), dict(size))
