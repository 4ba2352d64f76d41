"""Small models by family. Each entry builds (model, call): ``call(model)`` returns one loss per example."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Case = tuple[nn.Module, Callable[[nn.Module], Tensor]]
ZOO: dict[str, Callable[[], Case]] = {}
B = 4


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    ZOO[function.__name__] = function
    return function


def squares(output: Tensor) -> Tensor:
    """A loss per row that is nonlinear, so that no gradient is the same for two examples."""
    return (output.flatten(1).sin() + output.flatten(1) ** 2 / 3).sum(1)


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def on(*inputs: Tensor, loss: Callable[[Tensor], Tensor] = squares) -> Callable[[nn.Module], Tensor]:
    return lambda model: loss(model(*inputs))


def ids(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(vocabulary, shape)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return (
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-1)
        .view_as(targets)
        .sum(1)
    )


class MLP(nn.Module):
    def __init__(self, *widths: int, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x


@case
def mlp() -> Case:
    return MLP(5, 7, 4).double(), on(floats(B, 5))


@case
def mlp_3d() -> Case:
    return MLP(5, 7, 4).double(), on(floats(B, 3, 5))


@case
def mlp_4d_batch_equals_everything() -> Case:
    return MLP(B, B, B).double(), on(floats(B, B, B, B))


class GPT(nn.Module):
    """GPT-2 style: learned positions, pre-norm blocks, fused qkv, tied head."""

    def __init__(
        self, V: int = 11, T: int = 6, D: int = 8, H: int = 2, layers: int = 2, tied: bool = True, ckpt: bool = False
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(T, D)
        self.blocks = nn.ModuleList(GPTBlock(D, H) for _ in range(layers))
        self.norm, self.head, self.ckpt = nn.LayerNorm(D), nn.Linear(D, V, bias=False), ckpt
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.ckpt else block(x)
        return self.head(self.norm(x))


class GPTBlock(nn.Module):
    def __init__(self, D: int, H: int) -> None:
        super().__init__()
        self.ln1, self.ln2, self.H = nn.LayerNorm(D), nn.LayerNorm(D), H
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        B_, T, D = x.shape
        q, k, v = (t.view(B_, T, self.H, -1).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B_, T, D)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


def language(model: nn.Module, T: int = 6, V: int = 11) -> Case:
    tokens, targets = ids(V, B, T), ids(V, B, T)
    targets[1, 2:] = -1  # a short example
    return model.double(), lambda m: token_losses(m(tokens), targets)


@case
def gpt_tied() -> Case:
    return language(GPT())


@case
def gpt_untied() -> Case:
    return language(GPT(tied=False))


@case
def gpt_checkpointed() -> Case:
    return language(GPT(ckpt=True))


@case
def gpt_batch_equals_context() -> Case:
    return language(GPT(T=B, D=B, H=2), T=B)


class RMSNorm(nn.Module):
    """Hand-written, as in Llama."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x: Tensor) -> Tensor:
    T, d = x.shape[-2:]
    angles = torch.arange(T, dtype=x.dtype)[:, None] / 100 ** (torch.arange(0, d, 2, dtype=x.dtype) / d)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Llama(nn.Module):
    """RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    def __init__(self, V: int = 11, D: int = 8, H: int = 4, G: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(LlamaLayer(D, H, G) for _ in range(layers))
        self.norm, self.head = RMSNorm(D), nn.Linear(D, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class LlamaLayer(nn.Module):
    def __init__(self, D: int, H: int, G: int) -> None:
        super().__init__()
        self.n1, self.n2, self.H, self.G = RMSNorm(D), RMSNorm(D), H, G
        self.q, self.k = nn.Linear(D, D, bias=False), nn.Linear(D, D * G // H, bias=False)
        self.v, self.o = nn.Linear(D, D * G // H, bias=False), nn.Linear(D, D, bias=False)
        self.gate, self.up, self.down = (
            nn.Linear(D, 12, bias=False),
            nn.Linear(D, 12, bias=False),
            nn.Linear(12, D, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        B_, T, D = x.shape
        h = self.n1(x)
        q = rotate(self.q(h).view(B_, T, self.H, -1).transpose(1, 2))
        k, v = (f(h).view(B_, T, self.G, -1).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.repeat_interleave(self.H // self.G, 1) for t in (rotate(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B_, T, D)
        x = x + self.o(y)
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@case
def llama() -> Case:
    return language(Llama())


class Bert(nn.Module):
    """Post-norm encoder with token types, a padding mask and a pooled classifier."""

    def __init__(self, V: int = 11, T: int = 5, D: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.word, self.position, self.kind = nn.Embedding(V, D, padding_idx=0), nn.Embedding(T, D), nn.Embedding(2, D)
        self.norm = nn.LayerNorm(D)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True), 2)
        self.pool, self.classify = nn.Linear(D, D), nn.Linear(D, classes)

    def forward(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])[None]
        x = self.norm(self.word(tokens) + self.position(positions) + self.kind(kinds))
        x = self.encoder(x, src_key_padding_mask=tokens == 0)
        return self.classify(torch.tanh(self.pool(x[:, 0])))


@case
def bert() -> Case:
    tokens = ids(10, B, 5) + 1
    tokens[0, 3:] = 0
    labels = ids(3, B)
    kinds = ids(2, B, 5)
    return Bert().double(), lambda m: F.cross_entropy(m(tokens, kinds), labels, reduction="none")


class ViT(nn.Module):
    def __init__(self, D: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, D, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 5, D))
        self.block, self.scale = GPTBlock(D, 2), nn.Parameter(torch.ones(D))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.position
        return self.head(self.norm(x + self.scale * self.block(x))[:, 0])


@case
def vit() -> Case:
    return ViT().double(), on(floats(B, 3, 8, 8))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm1, self.depthwise = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, dilation=2, padding=2, groups=4)
        self.norm2, self.up = nn.GroupNorm(3, 12), nn.ConvTranspose2d(12, 6, 3, stride=2, output_padding=1, groups=2)
        self.circular = nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)), inplace=True)
        x = F.max_pool2d(self.depthwise(x), 2)
        x = F.silu(self.norm2(self.grouped(x)))
        x = F.avg_pool2d(self.circular(self.up(x)), 2, ceil_mode=True)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@case
def convnet() -> Case:
    return ConvNet().double(), on(floats(B, 3, 9, 9))


@case
def convnet_channels_last() -> Case:
    return ConvNet().double().to(memory_format=torch.channels_last), on(
        floats(B, 3, 9, 9).to(memory_format=torch.channels_last)
    )


class Conv13(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = nn.Conv1d(2, 4, 3, padding="same", dilation=2), nn.Conv3d(1, 2, 2, stride=(1, 2, 1))
        self.norm = nn.InstanceNorm1d(4, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.one(x))
        return self.three(y.view(y.shape[0], 1, 2, 2, -1)).flatten(1)


@case
def conv_1d_3d() -> Case:
    return Conv13().double(), on(floats(B, 2, 5))


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.padded, self.shared = nn.Embedding(9, 4, padding_idx=2), nn.Embedding(9, 4)
        self.temperature, self.prelu = nn.Parameter(torch.tensor(0.7)), nn.PReLU(4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.padded(tokens) * self.temperature
        return self.prelu((x + self.shared(tokens)).mean(1)) @ self.shared.weight.T


@case
def embeddings() -> Case:
    return Embeddings().double(), on(ids(9, B, 5))


class Reused(nn.Module):
    """One layer with different lengths, once on a detached input, once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        y = y + self.a(y[:, :2]).mean(1, keepdim=True) + self.norm(self.a(y.detach()))
        return F.linear(y, self.a.weight.t())


@case
def reused() -> Case:
    return Reused().double(), on(floats(B, 3, 4))


class Reparametrised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(6, 2))
        self.base = nn.Linear(5, 6)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
        self.register_buffer("mask", (torch.rand(3, 3) > 0.4).double())
        self.pruned = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.base.weight + self.lora_b @ self.lora_a, self.base.bias))
        return F.linear(self.normed(x), self.pruned.weight * self.mask, self.pruned.bias)


@case
def reparametrised() -> Case:
    return Reparametrised().double(), on(floats(B, 4, 5))


class Folded(nn.Module):
    """(B*T, D), windows, and two views of each example concatenated along the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        B_, T, D = x.shape
        x = torch.tanh(self.a(x.reshape(B_ * T, D))).view(B_ * T // 2, 2, D)
        x = torch.tanh(self.b(x)).view(B_, T, D)
        z = self.c(torch.cat((x, x.flip(1) * 2)))
        return (z[:B_] * z[B_:]).sum(1)


@case
def folded() -> Case:
    return Folded().double(), on(floats(B, 6, 4))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


@case
def recurrent() -> Case:
    return Recurrent().double(), on(floats(B, 3, 3))


class Attentive(nn.Module):
    """MultiheadAttention, a learned bias over heads, einsum with a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.bias, self.mix = nn.Parameter(torch.randn(2, 3, 3)), nn.Parameter(torch.randn(8, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        q, k, v = (torch.einsum("btd,dhk->bhtk", z, self.mix) for z in (x, y, x + y))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


@case
def attentive() -> Case:
    return Attentive().double(), on(floats(B, 3, 8))


@case
def torch_transformer() -> Case:
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True).double()
    return model, on(floats(B, 3, 8), floats(B, 2, 8))


@case
def bilinear() -> Case:
    return nn.Bilinear(3, 4, 2).double(), on(floats(B, 3), floats(B, 4))


class OwnRows(nn.Module):
    """A gather at a position of each example, and a parameter added before a linear loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shift = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        return self.a(x)[torch.arange(x.shape[0]), last] + self.shift


@case
def own_rows() -> Case:
    return OwnRows().double(), on(floats(B, 3, 4), ids(3, B))


@case
def time_first() -> Case:
    import gnsfx.marks

    x = gnsfx.marks.mark_batch(floats(3, B, 5), 1)
    return MLP(5, 6, 4).double(), lambda model: squares(model(x).transpose(0, 1))
