"""Breadth: the layers, functions and losses of PyTorch, one small model each.

``through(f, *shape)`` puts a parameter in front of a function and one behind it, so that its backward is in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnsfx.marks import mark_batch
from tests.passes.models import B, Build, Case, Losses, Model, T, linear, parameter, rows, table, tokens
from tests.zoo import floats, ids, squares

MODULES: dict[str, Callable[[], Case]] = {}


def module(name: str, build: Build) -> None:
    def case() -> Case:
        part, losses = build()
        return part.double(), losses, lambda m: losses(m).mean()

    assert name not in MODULES, name
    MODULES[name] = case


def real(value: Tensor) -> Tensor:
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def layer(build: Callable[[], nn.Module], *shape: int) -> Build:
    return rows(lambda m, x: m.a(x), (B, *shape), a=build)


def through(function: Callable[[Tensor], Tensor], *shape: int) -> Build:
    return rows(lambda m, x: real(function(x * m.w)) * m.v, (B, *shape), w=parameter(*shape), v=parameter())


def of_parameter(function: Callable[[Tensor], Tensor], *shape: int, of: int = 4) -> Build:
    """``x @ function(w)``: the map is behind the sum over examples."""
    return rows(lambda m, x: x @ function(m.w), (B, T, of), w=parameter(*shape))


def targets(
    function: Callable[[Tensor, Tensor], Tensor], *shape: int, classes: int = 5, of: tuple[int, ...] | None = None
) -> Build:
    """A loss per example of the output of a layer and integer targets, summed over what is left of ``shape``."""

    def build() -> tuple[nn.Module, Losses]:
        x, t = floats(B, *shape, 4), ids(classes, B, *(shape if of is None else of))
        part = Model(lambda m, v, y: function(m.a(v), y), a=nn.Linear(4, classes))
        return part, lambda m: m(x, t).flatten(1).sum(1) if m(x, t).dim() > 1 else m(x, t)

    return build


def values(function: Callable[..., Tensor], *shape: int, others: int = 1, positive: bool = False) -> Build:
    """A loss per entry of the output of a layer and floating point targets of the same shape."""

    def build() -> tuple[nn.Module, Losses]:
        x = floats(B, *shape, 4)
        t = [floats(B, *shape, 4).sigmoid() if positive else floats(B, *shape, 4) for _ in range(others)]
        part = Model(lambda m, v, *y: function(m.a(v), *y), a=nn.Linear(4, 4))
        return part, lambda m: m(x, *t).reshape(B, -1).sum(1)

    return build


# ----------------------------------------------------------------------------------------------------- convolutions

for n in (1, 2, 3):
    size = (7, 6, 5)[:n]
    conv, back = getattr(nn, f"Conv{n}d"), getattr(nn, f"ConvTranspose{n}d")
    module(f"conv{n}d_depthwise", layer(lambda conv=conv: conv(3, 6, 2, groups=3), 3, *size))
    module(
        f"conv{n}d_grouped_strided_dilated",
        layer(lambda conv=conv: conv(4, 6, 2, stride=2, dilation=2, padding=1, groups=2), 4, *size),
    )
    for mode in ("circular", "reflect", "replicate"):
        module(
            f"conv{n}d_{mode}",
            layer(lambda conv=conv, mode=mode: conv(2, 3, 3, padding=1, padding_mode=mode), 2, *size),
        )
    module(f"conv{n}d_same", layer(lambda conv=conv: conv(2, 3, 3, padding="same", dilation=2), 2, *size))
    module(f"conv{n}d_transposed_depthwise", layer(lambda back=back: back(3, 6, 2, stride=2, groups=3), 3, *size))
    module(
        f"conv{n}d_transposed_dilated",
        layer(lambda back=back: back(2, 3, 2, stride=2, dilation=3, padding=1, output_padding=1), 2, *size),
    )
    module(f"conv{n}d_lazy", layer(lambda conv=conv: conv(B, B, B), B, *size))
module(
    "conv2d_channels_last",
    rows(
        lambda m, x: m.b(m.a(x.to(memory_format=torch.channels_last))),
        (B, 4, 5, 5),
        a=lambda: nn.Conv2d(4, 4, 3, groups=2).to(memory_format=torch.channels_last),
        b=lambda: nn.Conv2d(4, 2, 1),
    ),
)
module(
    "conv3d_channels_last",
    rows(
        lambda m, x: m.a(x.to(memory_format=torch.channels_last_3d)),
        (B, 2, 4, 4, 4),
        a=lambda: nn.Conv3d(2, 3, 2).to(memory_format=torch.channels_last_3d),
    ),
)
module(
    "conv_of_single_examples",
    rows(lambda m, x: torch.stack([m.a(v) for v in x.unbind(1)], 1), (B, T, 2, 6), a=lambda: nn.Conv1d(2, 3, 3)),
)
module(
    "conv_separable",
    rows(
        lambda m, x: m.b(m.a(x)).relu(),
        (B, 4, 5, 5),
        a=lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
        b=lambda: nn.Conv2d(4, 3, 1),
    ),
)
module(
    "conv_patches", rows(lambda m, x: m.a(x).flatten(2).transpose(1, 2), (B, 3, 6, 6), a=lambda: nn.Conv2d(3, 4, 2, 2))
)
module("conv_causal", rows(lambda m, x: m.a(F.pad(x, (2, 0))), (B, 3, 6), a=lambda: nn.Conv1d(3, 3, 3)))

# ------------------------------------------------------------------------------------------ pooling, resampling, folding

POOLS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), (2, 6)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False), (2, 5, 6)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2, divisor_override=3), (2, 4, 4, 5)),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), (2, 6)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, stride=2, padding=1), (2, 5, 6)),
    "max_pool2d_dilated": (lambda x: F.max_pool2d(x, 2, dilation=2, ceil_mode=True), (2, 5, 6)),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), (2, 4, 4, 5)),
    "max_pool2d_indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], (2, 4, 6)),
    "lp_pool1d": (lambda x: F.lp_pool1d(x, 2, 2), (2, 6)),
    "lp_pool2d": (lambda x: F.lp_pool2d(x, 2, 2), (2, 6, 6)),
    "lp_pool3d": (lambda x: F.lp_pool3d(x, 2, 2), (2, 4, 4, 4)),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 3), (2, 7)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), (2, 5, 7)),
    "adaptive_avg_pool2d_even": (lambda x: F.adaptive_avg_pool2d(x, 1), (2, 5, 7)),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 2), (2, 3, 4, 5)),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 3), (2, 7)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (2, 3)), (2, 5, 7)),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, 2), (2, 3, 4, 5)),
    "max_unpool1d": (lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2), (2, 6)),
    "max_unpool2d": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (2, 4, 6)),
    "max_unpool3d": (lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), (2, 4, 4, 4)),
    "nearest1d": (lambda x: F.interpolate(x, scale_factor=2), (2, 3)),
    "nearest2d": (lambda x: F.interpolate(x, size=(5, 7)), (2, 3, 4)),
    "nearest3d": (lambda x: F.interpolate(x, scale_factor=2), (2, 2, 3, 2)),
    "nearest_exact": (lambda x: F.interpolate(x, size=(5, 7), mode="nearest-exact"), (2, 3, 4)),
    "nearest_down": (lambda x: F.interpolate(x, size=(2, 2)), (2, 5, 4)),
    "linear1d": (lambda x: F.interpolate(x, size=7, mode="linear"), (2, 3)),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (2, 3, 4)),
    "bilinear_corners": (lambda x: F.interpolate(x, size=(5, 6), mode="bilinear", align_corners=True), (2, 3, 4)),
    "bilinear_antialias": (lambda x: F.interpolate(x, size=(2, 3), mode="bilinear", antialias=True), (2, 5, 6)),
    "bicubic": (lambda x: F.interpolate(x, size=(5, 6), mode="bicubic"), (2, 3, 4)),
    "bicubic_antialias": (lambda x: F.interpolate(x, size=(2, 3), mode="bicubic", antialias=True), (2, 5, 6)),
    "trilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), (2, 2, 3, 2)),
    "area": (lambda x: F.interpolate(x, size=(2, 3), mode="area"), (2, 5, 6)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (8, 3, 2)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (2, 4, 6)),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (4, 2, 3)),
    "unfold_images": (lambda x: F.unfold(x, 2, padding=1, stride=2), (2, 4, 5)),
    "fold_images": (lambda x: F.fold(x, (4, 5), 2), (8, 12)),
    "pad_constant": (lambda x: F.pad(x, (1, 2, 0, -1), value=3.0), (2, 4, 5)),
    "pad_reflect1d": (lambda x: F.pad(x, (1, 2), mode="reflect"), (2, 5)),
    "pad_reflect2d": (lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), (2, 4, 5)),
    "pad_reflect3d": (lambda x: F.pad(x, (1, 1, 0, 1, 1, 0), mode="reflect"), (2, 4, 4, 5)),
    "pad_replicate2d": (lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), (2, 4, 5)),
    "pad_circular2d": (lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"), (2, 4, 5)),
}
for name, (function, shape) in POOLS.items():
    module(name, through(function, *shape))
GRID = torch.linspace(-1.1, 1.1, 16, dtype=torch.float64).view(2, 4, 2)
module(
    "grid_sample",
    rows(
        lambda m, x: F.grid_sample(x * m.w, (GRID * m.g).tanh().expand(x.shape[0], -1, -1, -1), align_corners=False),
        (B, 2, 5, 5),
        w=parameter(2, 5, 5),
        g=parameter(2, 4, 2),
    ),
)
module(
    "grid_sample_nearest",
    rows(
        lambda m, x: F.grid_sample(
            x * m.w, GRID.expand(x.shape[0], -1, -1, -1), mode="nearest", padding_mode="border", align_corners=True
        ),
        (B, 2, 5, 5),
        w=parameter(2, 5, 5),
    ),
)
module(
    "grid_sample_bicubic",
    rows(
        lambda m, x: F.grid_sample(
            x * m.w, GRID.expand(x.shape[0], -1, -1, -1), mode="bicubic", padding_mode="reflection", align_corners=False
        ),
        (B, 2, 5, 5),
        w=parameter(2, 5, 5),
    ),
)
module(
    "grid_sample_3d",
    rows(
        lambda m, x: F.grid_sample(x * m.w, (x[:, 0, :2, :2, :, None] * m.g).tanh(), align_corners=False),
        (B, 2, 4, 4, 4),
        w=parameter(2, 4, 4, 4),
        g=parameter(3),
    ),
)
module(
    "spatial_transformer",
    rows(
        lambda m, x: F.grid_sample(
            x,
            F.affine_grid(m.a(x.flatten(1)).view(-1, 2, 3), x.shape, align_corners=False),  # pyright: ignore
            align_corners=False,
        ),
        (B, 2, 4, 4),
        a=linear(32, 6),
    ),
)
module(
    "affine_grid_3d",
    rows(
        lambda m, x: F.affine_grid(m.a(x).view(-1, 3, 4), [x.shape[0], 1, 2, 3, 2], align_corners=True),
        (B, 4),
        a=linear(4, 12),
    ),
)

# ----------------------------------------------------------------------------------------------------- embedding bags


def bag(mode: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.EmbeddingBag(7, 3, mode=mode, **options)


for mode in ("sum", "mean", "max"):
    module(f"bag_{mode}", tokens(lambda m, i: m.e(i), B, T + 1, e=bag(mode)))
    module(f"bag_{mode}_padding", tokens(lambda m, i: m.e(i), B, T + 1, e=bag(mode, padding_idx=2)))
    module(f"bag_{mode}_reused", tokens(lambda m, i: m.e(i) * m.e((i + 1) % 7).cos(), B, T, e=bag(mode)))
module(
    "bag_weighted",
    rows(
        lambda m, x: m.e(m.i.expand(x.shape[0], -1), per_sample_weights=x),
        (B, 4),
        e=bag("sum"),
        i=lambda: torch.tensor([0, 3, 3, 6]),
    ),
)
module(
    "bag_learned_weights",
    tokens(lambda m, i: m.e(i, per_sample_weights=m.w.expand(i.shape[0], -1)), B, 4, e=bag("sum"), w=parameter(4)),
)
module("bag_of_folded", tokens(lambda m, i: m.e(i.flatten(0, 1)).unflatten(0, i.shape[:2]), B, T, 4, e=bag("mean")))


def offsets(mode: str, last: bool) -> Build:
    def build() -> tuple[nn.Module, Losses]:
        flat, start = ids(7, 10), torch.tensor([0, 2, 7] + [10] * last)
        part = Model(lambda m, i, o, x: m.e(i, o) * x, e=nn.EmbeddingBag(7, 3, mode=mode, include_last_offset=last))
        x = floats(B, 3)
        return part, lambda m: squares(m(mark_batch(flat, None), mark_batch(start, None), mark_batch(x, 0)))

    return build


for mode in ("sum", "mean", "max"):
    for last in (False, True):
        module(f"bag_{mode}_offsets{'_last' * last}", offsets(mode, last))

# --------------------------------------------------------------------------------------------------------- attention


def attention(batch_first: bool, call: Callable[..., Any], *inputs: tuple[int, ...], **options: Any) -> Build:
    at = 0 if batch_first else 1

    def build() -> tuple[nn.Module, Losses]:
        sizes = [(B, T + k, d) if batch_first else (T + k, B, d) for k, d in inputs]
        x = [mark_batch(floats(*s), at) for s in sizes]
        part = Model(call, a=nn.MultiheadAttention(4, 2, batch_first=batch_first, **options))
        return part, lambda m: squares(m(*x).movedim(at, 0))

    return build


def _self(m: Any, x: Tensor, **options: Any) -> Tensor:
    return m.a(x, x, x, **options)[0]


def _weights(m: Any, x: Tensor, **options: Any) -> Tensor:
    out, weights = m.a(x, x, x, **options)
    at = 0 if m.a.batch_first else 1
    return torch.cat((out.movedim(at, 0).flatten(1), weights.flatten(1)), 1).unsqueeze(1 - at)


CAUSAL = torch.triu(torch.full((T + 1, T + 1), float("-inf"), dtype=torch.float64), 1)
for first in (True, False):
    tag = "batch_first" if first else "time_first"
    module(f"mha_{tag}", attention(first, _self, (0, 4)))
    module(f"mha_weights_{tag}", attention(first, _weights, (0, 4)))
    module(
        f"mha_weights_of_heads_{tag}", attention(first, lambda m, x: _weights(m, x, average_attn_weights=False), (0, 4))
    )
    module(f"mha_flash_{tag}", attention(first, lambda m, x: _self(m, x, need_weights=False), (0, 4)))
    module(
        f"mha_causal_{tag}",
        attention(first, lambda m, x: _self(m, x, attn_mask=CAUSAL, is_causal=True, need_weights=False), (1, 4)),
    )
    module(f"mha_mask_{tag}", attention(first, lambda m, x: _self(m, x, attn_mask=CAUSAL), (1, 4)))
    module(f"mha_cross_{tag}", attention(first, lambda m, q, k: m.a(q, k, k)[0], (0, 4), (2, 4)))
    module(
        f"mha_kdim_vdim_{tag}",
        attention(first, lambda m, q, k, v: m.a(q, k, v)[0], (0, 4), (2, 3), (2, 5), kdim=3, vdim=5),
    )
    module(f"mha_bias_kv_{tag}", attention(first, _self, (0, 4), add_bias_kv=True, bias=False))
    module(f"mha_zero_attn_{tag}", attention(first, _self, (0, 4), add_zero_attn=True))
    module(
        f"mha_bias_kv_zero_attn_{tag}",
        attention(first, lambda m, x: _self(m, x, need_weights=False), (0, 4), add_bias_kv=True, add_zero_attn=True),
    )
    module(
        f"mha_padding_{tag}",
        attention(
            first,
            lambda m, x: _self(m, x, key_padding_mask=x.sum(-1).t() > 9 if not m.a.batch_first else x.sum(-1) > 9),
            (0, 4),
        ),
    )
module(
    "mha_learned_mask",
    rows(
        lambda m, x: m.a(x, x, x, attn_mask=m.w)[0],
        (B, T, 4),
        a=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        w=parameter(T, T),
    ),
)
module(
    "mha_mask_per_head",
    rows(
        lambda m, x: m.a(x, x, x, attn_mask=m.w.repeat(B, 1, 1))[0],
        (B, T, 4),
        a=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        w=parameter(2, T, T),
    ),
)
module(
    "sdpa_grouped",
    rows(
        lambda m, x: F.scaled_dot_product_attention(x * m.w, x[:, :2] * m.v, x[:, :2], enable_gqa=True, is_causal=True),
        (B, 4, T, 4),
        w=parameter(4),
        v=parameter(4),
    ),
)
module(
    "sdpa_dims_5",
    rows(
        lambda m, x: F.scaled_dot_product_attention(x * m.w, x * m.v, x),
        (B, 2, 2, T, 4),
        w=parameter(4),
        v=parameter(4),
    ),
)

for norm_first in (False, True):
    tag = "_pre" if norm_first else ""
    o: dict[str, Any] = {"dim_feedforward": 5, "dropout": 0.0, "norm_first": norm_first}
    module(f"encoder_layer{tag}", layer(lambda o=o: nn.TransformerEncoderLayer(4, 2, batch_first=True, **o), T, 4))
    module(
        f"encoder_layer_time_first{tag}",
        rows(
            lambda m, x: m.a(x),
            (T, B, 4),
            batch=1,
            a=lambda o=o: nn.TransformerEncoderLayer(4, 2, activation="gelu", **o),
        ),
    )
    module(
        f"encoder{tag}",
        rows(
            lambda m, x: m.a(x, mask=CAUSAL, is_causal=True),
            (B, T + 1, 4),
            a=lambda o=o: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(4, 2, batch_first=True, **o), 2, nn.LayerNorm(4), enable_nested_tensor=False
            ),
        ),
    )
    module(
        f"decoder_layer{tag}",
        rows(
            lambda m, x, y: m.a(x, y),
            (B, T, 4),
            (B, T + 1, 4),
            a=lambda o=o: nn.TransformerDecoderLayer(4, 2, batch_first=True, **o),
        ),
    )
    module(
        f"decoder{tag}",
        rows(
            lambda m, x, y: m.a(x, y, tgt_mask=CAUSAL, tgt_is_causal=True),
            (T + 1, B, 4),
            (T + 2, B, 4),
            batch=1,
            a=lambda o=o: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, **o), 2),
        ),
    )
    module(
        f"transformer{tag}",
        rows(
            lambda m, x, y: m.a(x, y),
            (B, T + 1, 4),
            (B, T, 4),
            a=lambda o=o: nn.Transformer(4, 2, 1, 1, batch_first=True, **o),
        ),
    )

# --------------------------------------------------------------------------------------------------- recurrent cells


def unrolled(cell: Callable[[], nn.Module], lstm: bool = False) -> Build:
    def function(m: Any, x: Tensor) -> Tensor:
        h: Any = x.new_zeros(x.shape[0], 4)
        state, out = (h, h.clone()) if lstm else h, []
        for t in range(x.shape[1]):
            state = m.a(x[:, t], state)
            out.append(state[0] if lstm else state)
        return torch.stack(out, 1)

    return rows(function, (B, T, 3), a=cell)


module("rnn_cell", unrolled(lambda: nn.RNNCell(3, 4)))
module("rnn_cell_relu", unrolled(lambda: nn.RNNCell(3, 4, nonlinearity="relu", bias=False)))
module("gru_cell", unrolled(lambda: nn.GRUCell(3, 4)))
module("lstm_cell", unrolled(lambda: nn.LSTMCell(3, 4), lstm=True))

# ------------------------------------------------------------------------------------------------------ normalisation

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer_norm_plain": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)), (T, 4)),
    "layer_norm_3d": (lambda: nn.LayerNorm((T, 2, 4)), (T, 2, 4)),
    "rms_norm_2d": (lambda: nn.RMSNorm((T, 4), eps=1e-3), (T, 4)),
    "rms_norm_plain": (lambda: nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4, elementwise_affine=False)), (T, 4)),
    "local_response_norm": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.LocalResponseNorm(2)), (4, 5)),
    "group_norm_4d": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)), (2, 3, 3)),
    "group_norm_2d": (lambda: nn.Sequential(nn.Linear(3, 6), nn.GroupNorm(2, 6)), (3,)),
    "group_norm_plain": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(4, 4, affine=False)), (2, 3, 3)),
    "instance_norm1d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4, affine=True)), (2, 5)),
    "instance_norm2d": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.InstanceNorm2d(4)), (2, 3, 3)),
    "instance_norm3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True)), (2, 3, 3, 2)),
    "instance_norm_tracked": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
        (2, 5),
    ),
    "instance_norm_eval": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval()),
        (2, 5),
    ),
    "batch_norm_eval": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4).eval(), nn.Conv2d(4, 2, 1)),
        (2, 3, 3),
    ),
    "batch_norm1d_eval": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval()), (3,)),
    "batch_norm_eval_plain": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4, affine=False).eval()),
        (2, 3),
    ),
    "weight_norm_old": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 2), dim=0), (2, 4, 4)),
    "spectral_norm_conv": (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 2)).eval(), (2, 4, 4)),
    "prelu_channels": (lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.PReLU(4)), (2, 5)),
    "embedding_like_linear": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Unflatten(1, (4, T))), (T, 4)),
    "swiglu": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU()), (T, 4)),
    "glu_channels": (lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.GLU(1)), (2, 5)),
    "softmax2d": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Softmax2d()), (2, 3, 3)),
    "adaptive_softmax_like": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LogSoftmax(-1)), (T, 4)),
    "upsample_layer": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.ZeroPad2d(1)),
        (2, 3, 3),
    ),
    "rrelu_eval": (lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU()).eval(), (T, 4)),
    "dropout_eval": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval(), (T, 4)),
    "identity": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Identity()), (T, 4)),
}
for name, (build_layer, shape) in LAYERS.items():
    module(name, layer(build_layer, *shape))
for activation in (
    "ReLU",
    "ReLU6",
    "LeakyReLU",
    "ELU",
    "CELU",
    "SELU",
    "GELU",
    "SiLU",
    "Mish",
    "Hardswish",
    "Hardtanh",
    "Hardshrink",
    "Softshrink",
    "Tanhshrink",
    "Softplus",
    "Softsign",
    "LogSigmoid",
    "Sigmoid",
    "Tanh",
    "Softmin",
    "Threshold",
):
    arguments = (0.1, 20.0) if activation == "Threshold" else (1,) if activation == "Softmin" else ()
    module(
        f"activation_{activation.lower()}",
        layer(lambda a=activation, r=arguments: nn.Sequential(nn.Linear(4, 4), getattr(nn, a)(*r)), T, 4),
    )

module("adaptive_log_softmax", targets(lambda x, y: F.nll_loss(x.log_softmax(-1), y, reduction="none")))
module("embedding_max_norm", tokens(lambda m, i: m.e(i), B, T, e=table(max_norm=1.0)))
module("embedding_renormed", tokens(lambda m, i: F.embedding(i, torch.renorm(m.w, 2, 0, 1.0)), B, T, w=parameter(7, 3)))
module(
    "embedding_normalised",
    tokens(
        lambda m, i: F.normalize(m.e(i), dim=-1) @ F.normalize(m.e.weight, dim=-1).T * m.s.exp(),
        B,
        T,
        e=table(),
        s=parameter(),
    ),
)
module(
    "embedding_ragged",
    tokens(
        lambda m, i: (m.e(i) * (i != 0).unsqueeze(-1)).sum(1) / (i != 0).sum(1, keepdim=True).clamp(min=1),
        B,
        4,
        e=table(),
    ),
)

# -------------------------------------------------------------------------------------------------------------- losses

LOSSES: dict[str, Build] = {
    "loss_cross_entropy": targets(lambda x, y: F.cross_entropy(x, y, reduction="none")),
    "loss_cross_entropy_smoothed": targets(
        lambda x, y: F.cross_entropy(
            x, y, reduction="none", label_smoothing=0.2, weight=torch.rand(5, dtype=x.dtype).fill_(0.7)
        )
    ),
    "loss_cross_entropy_2d": targets(
        lambda x, y: F.cross_entropy(x.movedim(-1, 1), y, reduction="none", ignore_index=1), 2, 3
    ),
    "loss_nll_2d": targets(
        lambda x, y: F.nll_loss(x.log_softmax(-1).movedim(-1, 1).contiguous(), y, reduction="none"), 2, 3
    ),
    "loss_nll_3d": targets(lambda x, y: F.nll_loss(x.log_softmax(-1).movedim(-1, 1), y, reduction="none"), 2, 2, 3),
    "loss_multi_margin": targets(lambda x, y: F.multi_margin_loss(x, y, reduction="none")),
    "loss_multi_margin_p2": targets(lambda x, y: F.multi_margin_loss(x, y, p=2, margin=0.5, reduction="none")),
    "loss_soft_targets": values(lambda x, y: F.cross_entropy(x, y.softmax(-1), reduction="none")),
    "loss_bce": values(lambda x, y: F.binary_cross_entropy(x.sigmoid(), y, reduction="none"), positive=True),
    "loss_bce_logits": values(
        lambda x, y: F.binary_cross_entropy_with_logits(
            x, y, pos_weight=torch.full((4,), 2.0, dtype=x.dtype), reduction="none"
        ),
        T,
        positive=True,
    ),
    "loss_mse": values(lambda x, y: F.mse_loss(x, y, reduction="none"), T),
    "loss_l1": values(lambda x, y: F.l1_loss(x, y, reduction="none"), T),
    "loss_smooth_l1": values(lambda x, y: F.smooth_l1_loss(x, y, reduction="none", beta=0.5), T),
    "loss_huber": values(lambda x, y: F.huber_loss(x, y, reduction="none"), T),
    "loss_kl": values(lambda x, y: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="none"), T),
    "loss_kl_log": values(
        lambda x, y: F.kl_div(x.log_softmax(-1), y.log_softmax(-1), reduction="none", log_target=True), T
    ),
    "loss_poisson": values(lambda x, y: F.poisson_nll_loss(x, y, full=True, reduction="none"), positive=True),
    "loss_gaussian": values(lambda x, y: F.gaussian_nll_loss(x, y, x.exp(), reduction="none", full=True), T),
    "loss_hinge_embedding": values(lambda x, y: F.hinge_embedding_loss(x, y.sign(), reduction="none"), T),
    "loss_margin_ranking": values(lambda x, y, z: F.margin_ranking_loss(x, y, z.sign(), reduction="none"), others=2),
    "loss_soft_margin": values(lambda x, y: F.soft_margin_loss(x, y.sign(), reduction="none"), T),
    "loss_multilabel_soft_margin": values(
        lambda x, y: F.multilabel_soft_margin_loss(x, y.round(), reduction="none"), positive=True
    ),
    "loss_triplet": values(lambda x, y, z: F.triplet_margin_loss(x, y, z, reduction="none"), others=2),
    "loss_triplet_swap": values(
        lambda x, y, z: F.triplet_margin_loss(x * 1.0, y, z, swap=True, reduction="none"), others=2
    ),
    "loss_triplet_distance": values(
        lambda x, y, z: F.triplet_margin_with_distance_loss(
            x, y, z, distance_function=lambda a, b: (a - b).abs().sum(-1), reduction="none"
        ),
        others=2,
    ),
    "loss_cosine_embedding": values(lambda x, y: F.cosine_embedding_loss(x, y, y[:, 0].sign(), reduction="none")),
    "loss_dice": values(
        lambda x, y: 1 - 2 * (x.sigmoid() * y).sum((1, 2)) / (x.sigmoid() + y).sum((1, 2)), T, positive=True
    ),
    "loss_focal": values(
        lambda x, y: (1 - x.sigmoid()) ** 2 * F.binary_cross_entropy_with_logits(x, y, reduction="none"),
        T,
        positive=True,
    ),
    "loss_contrastive_within": values(
        lambda x, y: F.cross_entropy(
            (F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT).flatten(0, 1),
            torch.arange(T).repeat(B),
            reduction="none",
        ),
        T,
    ),
    "loss_wasserstein": values(lambda x, y: (x.sort(1)[0] - y.sort(1)[0]).abs(), T),
    "loss_elbo": values(lambda x, y: 0.5 * (x[..., :2].square() + x[..., 2:].exp() - x[..., 2:] - 1), T),
}
for name, build in LOSSES.items():
    module(name, build)


def ctc() -> tuple[nn.Module, Losses]:
    x, t = floats(B, 6, 4), torch.randint(1, 5, (B, 2))
    part = Model(
        lambda m, v, y: F.ctc_loss(
            m.a(v).log_softmax(-1).transpose(0, 1), y, torch.full((B,), 6), torch.full((B,), 2), reduction="none"
        ),
        a=nn.Linear(4, 5),
    )
    return part, lambda m: m(x, t)


module("loss_ctc", ctc)
