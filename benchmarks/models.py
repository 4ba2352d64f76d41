"""The models that all benchmarks share: a list of names, each with what it maps to what.

inputs [B, ...] --module--> outputs [B, ..., classes] --cross entropy, mean over all targets--> loss

``build`` makes one, of the size at which a step takes 50 to 500 ms on two cores, or of any other size. Every target of an
example counts the same, so example b contributes the mean of its own losses over B; ``losses_of`` gives these means.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALIKE = {"inductor": "inductor", "eager": "aot_eager"}  # gns.inner -> the backend it is compared with


@dataclass(frozen=True, slots=True)
class Case:
    """A module, and one batch for it. ``size``: the arguments it was built with."""

    name: str
    module: nn.Module
    inputs: Tensor
    targets: Tensor
    size: dict[str, int]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())


class Training(nn.Module):
    """(inputs, targets) -> the mean loss: what a training step compiles."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return loss_of(self.module(inputs), targets)


def training_of(module: nn.Module) -> Training:
    """A ``Training`` with code of its own: compiled graphs are kept per code object, and no more than eight of them."""
    forward = Training.forward
    own = FunctionType(forward.__code__.replace(), forward.__globals__, "forward")
    return type("Training", (Training,), {"forward": own})(module)


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def losses_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """[B]: the loss of every example, the mean over its targets."""
    losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(targets), -1).mean(1)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class RotaryAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        B, T, D = x.shape
        q, k, v = (part(x).view(B, T, self.heads, -1).transpose(1, 2) for part in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(rotate(q, cosine, sine), rotate(k, cosine, sine), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Pairs (x_i, x_{i + half}) turned by an angle that grows with the position."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1)


class LlamaBlock(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.RMSNorm(width), RotaryAttention(width, heads)
        self.norm_2, self.mlp = nn.RMSNorm(width), SwiGLU(width, hidden)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x), cosine, sine)
        return x + self.mlp(self.norm_2(x))


class Llama(nn.Module):
    """RMSNorm, SwiGLU, rotary positions, no biases; the head is not tied."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, vocabulary: int, context: int, width: int, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, hidden, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        half = width // heads // 2
        angles = torch.outer(torch.arange(context), 10_000 ** -(torch.arange(half) / half))
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Of a ViT, or, ``causal``, of GPT-2."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(self.norm_2(x))


class ViT(nn.Module):
    """Patches by a convolution, a class token and learned positions that belong to no layer."""

    def __init__(self, image: int, patch: int, width: int, layers: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class ConvBlock(nn.Module):
    """A residual block; it halves the image where the width changes."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = 1 if before == width else 2
        self.conv_1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_1, self.norm_2 = (nn.GroupNorm(8, width) for _ in range(2))
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(before, width, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_2(self.conv_2(F.relu(self.norm_1(self.conv_1(x)))))
        return F.relu(y + self.skip(x))


class ConvNet(nn.Module):
    """A small ResNet with GroupNorm: ``stages`` stages of ``layers`` blocks, twice as wide each."""

    def __init__(self, width: int, stages: int, layers: int, classes: int) -> None:
        super().__init__()
        widths = [width << stage for stage in range(stages) for _ in range(layers)]
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.GroupNorm(8, width)
        self.blocks = nn.Sequential(*(ConvBlock(before, after) for before, after in pairwise([width, *widths])))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(images))))
        return self.head(x.mean(dim=(2, 3)))


def mlp(features: int, width: int, layers: int, classes: int) -> nn.Sequential:
    widths = [features, *[width] * layers]
    hidden = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(width, classes))


def token_batch(batch: int, context: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ids as frequent as words are: the k-th about as often as 1/k. (ids, the ids that follow), both [B, T]."""
    ids = (torch.rand(batch, context + 1) * math.log(vocabulary)).exp().long() - 1
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def image_batch(batch: int, image: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, image, image), torch.randint(classes, (batch,))


def make_gpt(batch: int, context: int, width: int, layers: int, heads: int, vocabulary: int):
    from benchmarks.demo import DemoGPT

    return DemoGPT(vocabulary, context, width, layers, heads), token_batch(batch, context, vocabulary)


def make_llama(batch: int, context: int, width: int, hidden: int, layers: int, heads: int, vocabulary: int):
    return Llama(vocabulary, context, width, hidden, layers, heads), token_batch(batch, context, vocabulary)


def make_vit(batch: int, image: int, patch: int, width: int, layers: int, heads: int, classes: int):
    return ViT(image, patch, width, layers, heads, classes), image_batch(batch, image, classes)


def make_convnet(batch: int, image: int, width: int, stages: int, layers: int, classes: int):
    return ConvNet(width, stages, layers, classes), image_batch(batch, image, classes)


def make_mlp(batch: int, features: int, width: int, layers: int, classes: int):
    return mlp(features, width, layers, classes), (torch.randn(batch, features), torch.randint(classes, (batch,)))


@dataclass(frozen=True, slots=True)
class Recipe:
    """``size``: the usual one. ``small``: one that runs in a moment."""

    about: str
    make: Callable[..., tuple[nn.Module, tuple[Tensor, Tensor]]]
    size: dict[str, int]
    small: dict[str, int]


def recipe(
    about: str, make: Callable[..., tuple[nn.Module, tuple[Tensor, Tensor]]], size: Sequence[int], small: Sequence[int]
) -> Recipe:
    """With sizes in the order of the parameters of ``make``."""
    names = list(inspect.signature(make).parameters)
    return Recipe(about, make, dict(zip(names, size, strict=True)), dict(zip(names, small, strict=True)))


MODELS = {
    "demo": recipe("the GPT of the demo, head tied", make_gpt, (16, 64, 128, 5, 4, 103), (4, 8, 16, 1, 2, 11)),
    "gpt768": recipe(
        "GPT blocks as wide as those of GPT-2, head tied", make_gpt, (4, 128, 768, 2, 12, 4096), (3, 8, 32, 1, 2, 17)
    ),
    "llama": recipe(
        "RMSNorm, SwiGLU, rotary positions, no biases, head not tied",
        make_llama, (8, 128, 256, 688, 4, 4, 1000), (4, 8, 16, 24, 1, 2, 11),
    ),
    "vit": recipe(
        "patches by a convolution, class token, learned positions",
        make_vit, (32, 64, 8, 192, 4, 3, 100), (4, 8, 4, 16, 1, 2, 5),
    ),
    "convnet": recipe("a ResNet with GroupNorm", make_convnet, (32, 32, 32, 3, 1, 10), (4, 8, 8, 2, 1, 5)),
    "mlp": recipe("linear layers and GELU, a large batch", make_mlp, (1024, 784, 1024, 3, 10), (8, 6, 8, 2, 3)),
}  # fmt: skip


def build(
    name: str, size: Mapping[str, int] | None = None, *, small: bool = False, device: str = "cpu", seed: int = 0
) -> Case:
    """One of ``MODELS``; ``size`` overrides parts of its usual size, ``small`` is for tests."""
    recipe = MODELS[name]
    chosen = {**(recipe.small if small else recipe.size), **(size or {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, (inputs, targets) = recipe.make(**chosen)
    return Case(name, module.to(device), inputs.to(device), targets.to(device), chosen)


def has_norms(name: str) -> bool:
    """Whether there is anything to measure with ``gns.params="norm"``."""
    module = build(name, small=True).module
    return any(isinstance(layer, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) for layer in module.modules())
