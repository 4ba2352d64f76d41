"""GPT, Llama blocks and ViT with their loss, on fake CUDA tensors: sizes are real ones, and nothing holds memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, HEADS, V = 768, 12, 50304


class Block(nn.Module):
    """Pre-norm, fused qkv, biases; as in GPT-2 and in ViT."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.ln1, self.ln2, self.causal = nn.LayerNorm(D), nn.LayerNorm(D), causal
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t, HEADS) for t in self.qkv(self.ln1(x)).split(D, -1))
        x = x + self.proj(attention(q, k, v, self.causal))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Learned positions, tied head."""

    def __init__(self, T: int, layers: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(T, D)
        self.blocks = nn.ModuleList(Block(True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class RMSNorm(nn.Module):
    """Written by hand, as in Llama: normalised in fp32, scaled in the dtype that came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class LlamaBlock(nn.Module):
    """Rotary positions, grouped queries, SwiGLU, no biases."""

    def __init__(self, norm: type[nn.Module], inner: int = 2048, groups: int = 4) -> None:
        super().__init__()
        self.n1, self.n2, self.groups = norm(D), norm(D), groups
        self.q, self.o = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.k, self.v = (nn.Linear(D, D * groups // HEADS, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(D, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.n1(x)
        q, k = rotate(heads(self.q(h), HEADS), cos, sin), rotate(heads(self.k(h), self.groups), cos, sin)
        k, v = (t.repeat_interleave(HEADS // self.groups, 1) for t in (k, heads(self.v(h), self.groups)))
        x = x + self.o(attention(q, k, v, True))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    def __init__(self, T: int, norm: type[nn.Module] = RMSNorm, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(LlamaBlock(norm) for _ in range(layers))
        self.norm, self.head = norm(D), nn.Linear(D, V, bias=False)
        self.register_buffer("cos", torch.ones(T, D // HEADS))
        self.register_buffer("sin", torch.ones(T, D // HEADS))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class ViT(nn.Module):
    """Patches by a convolution, a class token, learned positions."""

    def __init__(self, patches: int, layers: int = 2, classes: int = 1000) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, D, 16, 16)
        self.token, self.position = nn.Parameter(torch.ones(1, 1, D)), nn.Parameter(torch.ones(1, patches + 1, D))
        self.blocks = nn.ModuleList(Block(False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, classes)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        x = self.patch(images.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.position
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)[:, 0]).float(), targets)


def heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


@dataclass(frozen=True)
class Case:
    """A model, and the shapes of its inputs; ``activation``: numbers in a residual stream."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, Tensor]]
    activation: int


def language(build: Callable[[int], nn.Module], B: int, T: int) -> Case:
    def inputs() -> tuple[Tensor, Tensor]:
        return ids(B, T), ids(B, T)

    return Case(lambda: build(T), inputs, B * T * D)


def vision(B: int) -> Case:
    def inputs() -> tuple[Tensor, Tensor]:
        return torch.empty(B, 3, 224, 224, device="cuda"), ids(B)

    return Case(lambda: ViT(196), inputs, B * 197 * D)


def ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="cuda")


CASES = {
    "gpt": language(GPT, 8, 1024),
    "gpt, short": language(GPT, 64, 128),
    "llama": language(Llama, 8, 1024),
    "llama, short": language(Llama, 64, 128),
    "llama, one block": language(lambda T: Llama(T, layers=1), 64, 128),
    "llama, nn.RMSNorm": language(lambda T: Llama(T, nn.RMSNorm), 8, 1024),
    "vit": vision(64),
}
