"""Models that exercise one contraction or one map behind it each; ``tests/zoo.py`` has the families.

Each entry builds (model, losses, train): ``losses(model)`` gives the loss of each example in eager mode, ``train(model)`` the
scalar that the training step differentiates, by default the mean of the losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnsfx.marks import mark_batch
from tests.zoo import floats, ids, squares

B = T = 3
Losses = Callable[[nn.Module], Tensor]
Case = tuple[nn.Module, Losses, Losses]
Build = Callable[[], tuple[nn.Module, Losses]]
MODELS: dict[str, Callable[[], Case]] = {}
MATMULS: list[str] = []
"""Those whose parameters end in matrix products, so that every path applies."""


class Model(nn.Module):
    """A module from parts and a function of them."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def model(name: str, build: Build, matmul: bool = False) -> None:
    def case() -> Case:
        module, losses = build()
        return module.double(), losses, lambda m: losses(m).mean()

    MODELS[name] = case
    if matmul:
        MATMULS.append(name)


def rows(function: Callable[..., Any], *shapes: tuple[int, ...], batch: int = 0, **parts: Callable[[], Any]) -> Build:
    """A model of floating point inputs whose result has the examples in dimension ``batch``."""

    def build() -> tuple[nn.Module, Losses]:
        inputs = [mark_batch(floats(*s), batch) for s in shapes]
        return Model(function, **{n: p() for n, p in parts.items()}), lambda m: squares(m(*inputs).movedim(batch, 0))

    return build


def tokens(function: Callable[..., Any], *shape: int, **parts: Callable[[], Any]) -> Build:
    def build() -> tuple[nn.Module, Losses]:
        values = ids(7, *shape)
        return Model(function, **{n: p() for n, p in parts.items()}), lambda m: squares(m(values))

    return build


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


def linear(i: int, o: int, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o, bias=bias)


def table(v: int = 7, d: int = 3, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Embedding(v, d, **options)


# -------------------------------------------------------------------------------------------------- matrix products
# fmt: off

model("linear_2d", rows(lambda m, x: m.a(x), (B, 4), a=linear(4, 2)), matmul=True)
model("linear_3d", rows(lambda m, x: m.a(x), (B, T, 4), a=linear(4, 2)), matmul=True)
model("linear_4d", rows(lambda m, x: m.a(x), (B, T, B, 3), a=linear(3, 3)), matmul=True)
model("folded_rows", rows(lambda m, x: m.b(m.a(x.flatten(0, 1)).tanh()).unflatten(0, x.shape[:2]), (B, T, 4),
      a=linear(4, 3), b=linear(3, 2)), matmul=True)
model("time_first", rows(lambda m, x: m.b(m.a(x).tanh()), (T, B, 4), batch=1, a=linear(4, 3), b=linear(3, 2)), matmul=True)
model("time_first_folded", rows(lambda m, x: m.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]), (T, B, 4), batch=1,
      a=linear(4, 3)), matmul=True)
model("batch_last", rows(lambda m, x: (m.w @ x).tanh(), (4, B), batch=1, w=parameter(2, 4)), matmul=True)
model("picture", rows(lambda m, x: m.a(x), (2, 4, 4, 3), a=linear(3, 2)), matmul=True)
model("two_views", rows(lambda m, x, y: torch.cat(m.a(torch.cat((x, y))).tanh().chunk(2), -1), (B, 4), (B, 4),
      a=linear(4, 3)), matmul=True)
model("three_views_of_rows", rows(lambda m, x: torch.stack(m.a(torch.cat((x, 2 * x, x.flip(1)))).chunk(3), 1),
      (B, T, 4), a=linear(4, 3)), matmul=True)
model("one_token", rows(lambda m, x: m.b(m.a(x).tanh()), (B, 1, 4), a=linear(4, 3), b=linear(3, 2)), matmul=True)
model("one_example", rows(lambda m, x: m.b(m.a(x).tanh()), (1, T, 4), a=linear(4, 3), b=linear(3, 2)))
model("one_of_two_views", rows(lambda m, x: m.a(torch.cat((x, x.sin()))).chunk(2)[0], (B, 4), a=linear(4, 3)), matmul=True)
model("selected_rows", rows(lambda m, x: m.a(x).index_select(1, m.i), (B, T, 4), a=linear(4, 3),
      i=lambda: torch.tensor([0, 0, 2])), matmul=True)
model("reused", rows(lambda m, x: m.a(m.a(x).tanh()) + m.a(x[:, :2]).mean(1, keepdim=True), (B, T, 3),
      a=linear(3, 3)), matmul=True)
model("reused_2d_and_3d", rows(lambda m, x: m.a(x.mean(1)).unsqueeze(1) * m.a(x), (B, T, 3), a=linear(3, 3)), matmul=True)
model("reused_scaled", rows(lambda m, x: 2 * F.linear(x, m.w) - F.linear(x.tanh(), -m.w / 3), (B, T, 3),
      w=parameter(2, 3)), matmul=True)
model("reused_negated", rows(lambda m, x: (lambda w: F.linear(x, w).sin() * F.linear(x.cos(), w))(-m.w / 2), (B, T, 3),
      w=parameter(2, 3)), matmul=True)
model("reused_transposed", rows(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t()), (B, T, 3),
      w=parameter(2, 3)), matmul=True)
model("reused_square_transposed", rows(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t()), (B, T, 3),
      w=parameter(3, 3)), matmul=True)
model("reused_through_a_view", rows(lambda m, x: (lambda u: F.linear(F.linear(x, u).sin(), u) * F.linear(x.cos(), m.w))(m.w.t()), (B, T, 3),
      w=parameter(3, 3)), matmul=True)
model("einsum", rows(lambda m, x: torch.einsum("bti,io->bto", x, m.w), (B, T, 3), w=parameter(3, 3)), matmul=True)
model("einsum_heads", rows(lambda m, x: torch.einsum("btd,dhk->bhtk", x, m.w), (B, T, 4), w=parameter(4, 2, 3)), matmul=True)
model("einsum_per_position", rows(lambda m, x: torch.einsum("btd,tdh->bth", x, m.w), (B, T, 4), w=parameter(T, 4, 2)),
      matmul=True)
model("einsum_sum", rows(lambda m, x: torch.einsum("btd,dh->bh", x, m.w), (B, T, 4), w=parameter(4, 2)), matmul=True)
model("einsum_bilinear", rows(lambda m, x, y: torch.einsum("bi,bj,ijk->bk", x, y, m.w), (B, 3), (B, 4), w=parameter(3, 4, 2)))
model("bilinear_of_rows", rows(lambda m, x: F.bilinear(m.rows, x, m.w), (B, 4), w=parameter(2, 3, 4), rows=lambda: torch.randn(B, 3)))
model("bmm_with_shared_weights", rows(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), (B, T, 4),
      w=parameter(T, 4, 2)), matmul=True)
model("matvec", rows(lambda m, x: (x @ m.w)[:, None], (B, 3), w=parameter(3)))
model("matvec_3d", rows(lambda m, x: x @ m.w, (B, T, 3), w=parameter(3)))
model("attention", rows(lambda m, x: m.a(x, x, x)[0], (B, T, 4), a=lambda: nn.MultiheadAttention(4, 2, batch_first=True)))
model("attention_time_first", rows(lambda m, x: m.a(x, x, x, need_weights=False)[0], (T, B, 4), batch=1,
      a=lambda: nn.MultiheadAttention(4, 2)))
model("attention_learned_mask", rows(lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.w),
      (B, 2, T, 4), w=parameter(T, T)))
model("attention_with_bias_kv", rows(lambda m, x: m.a(x, x, x)[0], (B, T, 4),
      a=lambda: nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)))

# ---------------------------------------------------------------------------------------------- tables and lookups

model("embedding", tokens(lambda m, i: m.e(i), B, T, e=table()))
model("embedding_1d", tokens(lambda m, i: m.e(i), B, e=table()))
model("embedding_padding", tokens(lambda m, i: m.e(i), B, T, e=table(padding_idx=2)))
model("embedding_scaled_by_frequency", tokens(lambda m, i: m.e(i), B, T, e=table(scale_grad_by_freq=True)))
model("embedding_twice", tokens(lambda m, i: m.e(i) * m.e((i + 1) % 7).sum(1, keepdim=True), B, T, e=table()))
model("tied", tokens(lambda m, i: F.linear(m.a(m.e(i)).tanh(), m.e.weight), B, T, e=table(), a=linear(3, 3)), matmul=True)
model("tied_1d", tokens(lambda m, i: F.linear(m.a(m.e(i)).tanh(), m.e.weight), B, e=table(), a=linear(3, 3)), matmul=True)
model("tied_matmul", tokens(lambda m, i: m.e(i).tanh() @ m.e.weight.T, B, T, e=table()), matmul=True)
model("tied_scaled", tokens(lambda m, i: m.e(i).tanh() @ m.e.weight.T * 0.5, B, T, e=table(padding_idx=0)), matmul=True)
model("tied_two_heads", tokens(lambda m, i: F.linear(m.e(i).sin(), m.e.weight) * F.linear(m.e(i).cos(), m.e.weight),
      B, T, e=table()), matmul=True)
model("tied_pooled", tokens(lambda m, i: F.linear(m.e(i).mean(1), m.e.weight), B, T, e=table()), matmul=True)


def _tied_module() -> tuple[nn.Module, Losses]:
    values, part = ids(7, B, T), Model(lambda m, i: m.head(m.e(i).tanh()), e=nn.Embedding(7, 3), head=nn.Linear(3, 7, bias=False))
    part.head.weight = part.e.weight
    return part, lambda m: squares(m(values))


model("tied_module", _tied_module, matmul=True)
model("transposed_table", tokens(lambda m, i: F.embedding(i, m.w.t()).tanh() @ m.w, B, T, w=parameter(3, 7)))
model("scaled_table", tokens(lambda m, i: F.embedding(i, m.w * 2), B, T, w=parameter(7, 3)))
model("raw_index", tokens(lambda m, i: m.w[i], B, T, w=parameter(7, 3)))
model("index_of_two", tokens(lambda m, i: m.w[i, i % 2], B, T, w=parameter(7, 2, 3)))
model("index_behind", tokens(lambda m, i: m.w[:, i].movedim(0, -1), B, T, w=parameter(3, 7)))
model("negative_index", tokens(lambda m, i: m.w[i - 7] + m.w[i], B, T, w=parameter(7, 3)))
model("index_select", rows(lambda m, x: x @ m.w.index_select(0, m.i).t(), (B, T, 3), w=parameter(5, 3),
      i=lambda: torch.tensor([4, 0, 0])))
model("positions", tokens(lambda m, i: m.e(i) + m.p(torch.arange(T)), B, T, e=table(), p=table(T + 2)))
model("repeated_positions", rows(lambda m, x: x * m.p(m.i), (B, 4, 3), p=table(3), i=lambda: torch.tensor([0, 2, 2, 0])))
model("position_rows", rows(lambda m, x: x * m.w[: x.shape[1]], (B, T, 3), w=parameter(5, 3)))
model("relative_positions",
      rows(lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.p(m.i).movedim(-1, 0)), (B, 2, T, 4),
      p=table(2 * T - 1, 2), i=lambda: torch.arange(T)[:, None] - torch.arange(T)[None] + T - 1))
model("gathered", tokens(lambda m, i: m.w.expand(B, 7).gather(1, i), B, T, w=parameter(7)))
model("bag", tokens(lambda m, i: m.e(i), B, T, e=lambda: nn.EmbeddingBag(7, 3, mode="mean")))
model("one_hot", tokens(lambda m, i: m.a(F.one_hot(i, 7).to(m.a.weight.dtype)), B, T, a=linear(7, 3)), matmul=True)

# ------------------------------------------------------------------------------------------- reductions and scales

model("layer_norm", rows(lambda m, x: m.a(x), (B, T, 4), a=lambda: nn.LayerNorm(4)))
model("layer_norm_2d", rows(lambda m, x: m.a(x), (B, T, 4), a=lambda: nn.LayerNorm((T, 4), bias=False)))
model("layer_norm_time_first", rows(lambda m, x: m.a(x), (T, B, 4), batch=1, a=lambda: nn.LayerNorm(4)))
model("rms_norm", rows(lambda m, x: m.a(x), (B, T, 4), a=lambda: nn.RMSNorm(4)))
model("group_norm", rows(lambda m, x: m.a(x), (B, 4, 5), a=lambda: nn.GroupNorm(2, 4)))
model("norm_reused", rows(lambda m, x: m.a(m.a(x).tanh() + x), (B, T, 4), a=lambda: nn.LayerNorm(4)))
model("temperature", rows(lambda m, x: (x * m.w).sin() / m.v.exp(), (B, T, 4), w=parameter(), v=parameter()))
model("threshold", rows(lambda m, x: x.clamp(-2 * m.w, 2 * m.w) * x, (B, T, 4), w=lambda: nn.Parameter(torch.tensor(0.2))))
model("layer_scale", rows(lambda m, x: x + m.w * x.tanh(), (B, T, 4), w=parameter(4)))
model("channel_scale", rows(lambda m, x: x * m.w, (B, 4, 5), w=parameter(4, 1)))
model("class_token", rows(lambda m, x: torch.cat((m.w.expand(x.shape[0], -1, -1), x), 1) * 2, (B, T, 4), w=parameter(1, 1, 4)))
model("prelu", rows(lambda m, x: m.b(m.a(x)), (B, 4, 5), a=lambda: nn.PReLU(4), b=lambda: nn.PReLU()))
model("rows_of_examples", rows(lambda m, x: x * m.w, (B, T, 4), w=parameter(B, 1, 4)))
model("bias_of_everything", rows(lambda m, x: x + m.w, (B, T, 4), w=parameter(B, T, 4)))
model("sum_only", rows(lambda m, x: (x + m.w).sum(-1), (B, T, 4), w=parameter(1, 4)))
model("clamped", rows(lambda m, x: torch.maximum(x, m.w) + x.clamp(m.w - 1, m.w), (B, T, 4), w=parameter(4)))
model("padded_bias", rows(lambda m, x: x + F.pad(m.w, (1, 0)), (B, T, 4), w=parameter(3)))
model("cut_from_the_end", rows(lambda m, x: x * m.w[:-1] + m.v[-1] * m.u[-5:-1], (B, T, 4), w=parameter(5), v=parameter(2, 4), u=parameter(6)))
model("stacked_bias", rows(lambda m, x: x + torch.stack((m.w, m.v, m.w)).flatten(), (B, T, 6), w=parameter(2), v=parameter(2)))
model("repeated_bias", rows(lambda m, x: x * m.w.repeat(2) + m.w.repeat_interleave(2), (B, T, 6), w=parameter(3)))
model("cumulated_bias", rows(lambda m, x: x * m.w.cumsum(0), (B, T, 4), w=parameter(4)))
model("triangle", rows(lambda m, x: m.w.tril() @ x, (B, T, 4), w=parameter(T, T)))
model("softmax_of_a_parameter", rows(lambda m, x: x * m.w.softmax(0), (B, T, 4), w=parameter(4)))
model("complex",
      rows(lambda m, x: torch.view_as_real(torch.fft.rfft(x, dim=1) * torch.view_as_complex(m.w)).flatten(1), (B, 4), w=parameter(3, 2)))

# ----------------------------------------------------------------------------------------------------- convolutions

CONVS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "conv1d": ((2, 6), lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2, groups=2)),
    "conv1d_same": ((2, 6), lambda: nn.Conv1d(2, 4, 3, padding="same", padding_mode="replicate")),
    "conv2d": ((4, 5, 6), lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), groups=2)),
    "conv2d_depthwise": ((4, 5, 5), lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False)),
    "conv2d_depthwise_dilated": ((4, 7, 7), lambda: nn.Conv2d(4, 4, (2, 3), groups=4, dilation=2, stride=2, padding=1)),
    "conv2d_reflect": ((2, 5, 5), lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect")),
    "conv2d_circular": ((2, 5, 5), lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", dilation=2)),
    "conv3d": ((2, 4, 4, 4), lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), groups=2)),
    "conv_transposed_1d": ((4, 4), lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)),
    "conv_transposed_2d": ((3, 3, 4), lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, dilation=2, output_padding=(1, 0))),
    "conv_transposed_3d": ((2, 3, 3, 3), lambda: nn.ConvTranspose3d(2, 2, 2, stride=(2, 1, 1))),
}
for name, (shape, build) in CONVS.items():
    model(name, rows(lambda m, x: m.a(x), (B, *shape), a=build))
model("conv_pointwise", rows(lambda m, x: m.a(x), (B, 3, 4, 4), a=lambda: nn.Conv2d(3, 3, 1)))
model("conv_folded", rows(lambda m, x: m.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]), (B, T, 2, 5),
      a=lambda: nn.Conv1d(2, 3, 3)))
model("conv_time_first", rows(lambda m, x: m.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]), (T, B, 2, 5), batch=1,
      a=lambda: nn.Conv1d(2, 3, 3)))
model("conv_one_position", rows(lambda m, x: m.a((x @ m.w).transpose(1, 2)), (B, 1, 4), w=parameter(4, 4),
      a=lambda: nn.Conv1d(4, 4, 3, stride=2, padding=1)))
model("conv_one_position_lifted", rows(lambda m, x: m.a((x @ m.w).transpose(1, 2)), (B, 1, 4), w=parameter(4, 4),
      a=lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3, stride=2, padding=1))))
model("conv_two_views", rows(lambda m, x, y: torch.cat(m.a(torch.cat((x, y))).tanh().chunk(2), 1), (B, 2, 5),
      (B, 2, 5), a=lambda: nn.Conv1d(2, 3, 3)))
model("conv_reused", rows(lambda m, x: m.a(m.a(x).tanh()), (B, 2, 7), a=lambda: nn.Conv1d(2, 2, 3)))
model("conv_weight_norm", rows(lambda m, x: m.a(x), (B, 2, 5),
      a=lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 3))))
model("conv_standardised",
      rows(lambda m, x: F.conv1d(x, (m.w - m.w.mean((1, 2), True)) / m.w.std((1, 2), keepdim=True)), (B, 2, 5), w=parameter(3, 2, 3)))
model("conv_functional", rows(lambda m, x: F.conv_transpose1d(F.conv1d(x, m.w).tanh(), m.w), (B, 2, 5), w=parameter(3, 2, 3)))
model("conv_unfold", rows(lambda m, x: F.unfold(x, 2).transpose(1, 2) @ m.w, (B, 2, 3, 3), w=parameter(8, 3)))
model("conv_channels_last", rows(lambda m, x: m.a(x.to(memory_format=torch.channels_last)), (B, 2, 5, 5),
      a=lambda: nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)))

# ------------------------------------------------------------------------------------------------ maps behind the sum

model("masked", rows(lambda m, x: F.linear(x, m.w * m.mask), (B, T, 4), w=parameter(2, 4),
      mask=lambda: (torch.rand(2, 4) > 0.5).double()))
model("scaled", rows(lambda m, x: F.linear(x, m.w * 0.5) + F.linear(x, -m.v), (B, T, 4), w=parameter(2, 4),
      v=parameter(2, 4)), matmul=True)
model("masked_and_plain", rows(lambda m, x: F.linear(x, m.w * m.mask) * F.linear(x, m.w), (B, T, 4), w=parameter(2, 4),
      mask=lambda: (torch.rand(2, 4) > 0.5).double()))
model("merged_lora", rows(lambda m, x: F.linear(x, m.w + 0.5 * m.b @ m.a), (B, T, 4), w=parameter(3, 4),
      a=parameter(2, 4), b=parameter(3, 2)))
model("lora", rows(lambda m, x: F.linear(x, m.w) + F.linear(F.linear(x, m.a), m.b), (B, T, 4), w=parameter(3, 4),
      a=parameter(2, 4), b=parameter(3, 2)),
      matmul=True)
model("weight_norm", rows(lambda m, x: m.a(x), (B, T, 4), a=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))))
model("weight_norm_dim_1", rows(lambda m, x: m.a(x), (B, T, 4),
      a=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3), dim=1)))
model("spectral_norm", rows(lambda m, x: m.a(x), (B, T, 4),
      a=lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval()))
model("hyper", rows(lambda m, x: F.linear(x, m.a(m.z).view(3, 4)), (B, T, 4), a=linear(2, 12), z=lambda: torch.randn(2)))
model("symmetric", rows(lambda m, x: x @ (m.w + m.w.t()), (B, T, 3), w=parameter(3, 3)))
model("sliced_weight", rows(lambda m, x: F.linear(x, m.w[:2]) * F.linear(x, m.w[2:]), (B, T, 3), w=parameter(4, 3)))
model("concatenated_weight", rows(lambda m, x: F.linear(x, torch.cat((m.w, m.v, m.w))), (B, T, 3), w=parameter(2, 3),
      v=parameter(1, 3)))
model("low_rank_table", tokens(lambda m, i: F.embedding(i, m.a @ m.b), B, T, a=parameter(7, 2), b=parameter(2, 3)))
model("weights_squared", rows(lambda m, x: F.linear(x, m.w**2) + F.linear(x, m.v.exp()), (B, T, 3), w=parameter(2, 3),
      v=parameter(2, 3)))
model("checkerboard", rows(lambda m, x: F.linear(x, torch.where(m.mask, m.w, 0.0)), (B, T, 4), w=parameter(2, 4),
      mask=lambda: torch.rand(2, 4) > 0.5))
model("sum_of_two_parameters", rows(lambda m, x: F.linear(x, m.w + m.v), (B, T, 3), w=parameter(2, 3),
      v=parameter(2, 3)), matmul=True)


# fmt: on
# --------------------------------------------------------------------------------------------- losses inside the graph


def inside(name: str, build: Callable[[], Case]) -> None:
    MODELS[name] = build


def _cross_entropy(reduction: str, smoothing: float = 0.0, weighted: bool = False) -> Callable[[], Case]:
    """The loss is in the compiled region and divided by the number of tokens that count, in the whole batch."""

    def build() -> Case:
        values, targets = ids(7, B, T), ids(7, B, T)
        targets[0, 1:] = -1
        weight = torch.rand(7).double() + 0.5 if weighted else None
        options: dict[str, Any] = {"ignore_index": -1, "label_smoothing": smoothing, "weight": weight}
        part = Model(
            lambda m, i, t: F.cross_entropy(m.a(m.e(i)).flatten(0, 1), t.flatten(), reduction=reduction, **options),
            e=nn.Embedding(7, 4),
            a=nn.Linear(4, 7),
        )

        def losses(m: nn.Module) -> Tensor:
            each = F.cross_entropy(m.a(m.e(values)).flatten(0, 1), targets.flatten(), reduction="none", **options)  # type: ignore[operator]
            count = (targets >= 0).sum() if weight is None else weight[targets[targets >= 0]].sum()
            total = count if reduction == "mean" else 1
            return each.view(B, T).sum(1) / total * B

        return part.double(), losses, lambda m: m(values, targets)

    return build


inside("cross_entropy_mean", _cross_entropy("mean"))
inside("cross_entropy_sum", _cross_entropy("sum"))
inside("cross_entropy_smoothed", _cross_entropy("mean", smoothing=0.1))
inside("cross_entropy_weighted", _cross_entropy("mean", weighted=True))


def _scalar(
    each: Callable[[nn.Module, Tensor], Tensor], extra: Callable[[nn.Module], Any], **parts: Callable[[], Any]
) -> Callable[[], Case]:
    """The compiled function returns mean(each) + extra; no example owns the second term."""

    def build() -> Case:
        x = floats(B, T, 4)
        part = Model(lambda m, v: each(m, v).mean() + extra(m), **{n: p() for n, p in parts.items()}).double()
        return part, lambda m: each(m, x) + extra(m), lambda m: m(x)

    return build


def _each(m: nn.Module, x: Tensor) -> Tensor:
    return squares(m.a(x))  # type: ignore[operator]


inside("weight_decay", _scalar(_each, lambda m: 0.1 * m.a.weight.square().sum(), a=linear(4, 3)))
inside(
    "weight_decay_of_everything",
    _scalar(_each, lambda m: 0.1 * sum(p.square().sum() for p in m.parameters()), a=linear(4, 3)),
)
inside("weight_decay_alone", _scalar(_each, lambda m: 0.1 * m.w.abs().sum(), a=linear(4, 3), w=parameter(3)))
inside("scalar_loss", _scalar(_each, lambda m: 0.0, a=linear(4, 3)))
inside("sum_of_outputs", _scalar(lambda m, x: m.a(x).sum((1, 2)), lambda m: 0.0, a=linear(4, 3)))
inside("mean_of_masked", _scalar(lambda m, x: (m.a(x) * (x[..., :3] > 0)).sum((1, 2)), lambda m: 0.0, a=linear(4, 3)))
inside(
    "huber",
    _scalar(lambda m, x: F.huber_loss(m.a(x), x[..., :3], reduction="none").sum((1, 2)), lambda m: 0.0, a=linear(4, 3)),
)
