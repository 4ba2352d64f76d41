"""Breadth: functions, one small model each. The same as ``modules.py``, for what is no layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.models import B, Build, T, linear, parameter, rows, table, tokens
from tests.passes.modules import layer, module, of_parameter, through

# ------------------------------------------------------------------------------------------------- selective scans


def _mamba(m: Any, x: Tensor) -> Tensor:
    delta, b, c = F.softplus(m.d(x)), m.b(x), m.c(x)  # (B, T, D), (B, T, N), (B, T, N)
    a = torch.exp(delta.unsqueeze(-1) * -m.log_a.exp())
    u = delta.unsqueeze(-1) * b.unsqueeze(2) * x.unsqueeze(-1)
    h, out = torch.zeros_like(u[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + u[:, t]
        out.append((h * c[:, t].unsqueeze(1)).sum(-1))
    return torch.stack(out, 1) + m.skip * x


def _mamba_cumsum(m: Any, x: Tensor) -> Tensor:
    delta, b, c = F.softplus(m.d(x)), m.b(x), m.c(x)
    a = (delta.unsqueeze(-1) * -m.log_a.exp()).cumsum(1)
    u = delta.unsqueeze(-1) * b.unsqueeze(2) * x.unsqueeze(-1)
    h = torch.exp(a) * (u * torch.exp(-a)).cumsum(1)
    return (h * c.unsqueeze(2)).sum(-1) + m.skip * x


def _mamba_log(m: Any, x: Tensor) -> Tensor:
    a = (-F.softplus(m.d(x))).cumsum(1)
    return (
        torch.logcumsumexp(m.b(x) - a.mean(-1, keepdim=True), 1).exp().sum(-1, keepdim=True)
        + m.skip * x
        + m.c(x).sum(-1, keepdim=True) * m.log_a.sum()
    )


for name, scan in {"loop": _mamba, "cumsum": _mamba_cumsum, "logcumsumexp": _mamba_log}.items():
    module(
        f"mamba_{name}",
        rows(scan, (B, 4, 3), d=linear(3, 3), b=linear(3, 2), c=linear(3, 2), log_a=parameter(3, 2), skip=parameter(3)),
    )


def _wkv(m: Any, x: Tensor) -> Tensor:
    shifted = F.pad(x, (0, 0, 1, -1))
    k, v, r = (f(x * mix + shifted * (1 - mix)) for f, mix in ((m.k, m.mix[0]), (m.v, m.mix[1]), (m.r, m.mix[2])))
    top = bottom = torch.zeros_like(x[:, 0])
    largest, out = top - 1e38, []
    for t in range(x.shape[1]):
        q = torch.maximum(largest, m.first + k[:, t])
        a, b = torch.exp(largest - q), torch.exp(m.first + k[:, t] - q)
        out.append((a * top + b * v[:, t]) / (a * bottom + b))
        q = torch.maximum(largest - m.decay.exp(), k[:, t])
        a, b = torch.exp(largest - m.decay.exp() - q), torch.exp(k[:, t] - q)
        top, bottom, largest = a * top + b * v[:, t], a * bottom + b, q
    return m.o(r.sigmoid() * torch.stack(out, 1))


module(
    "rwkv",
    rows(
        _wkv,
        (B, 4, 3),
        k=linear(3, 3),
        v=linear(3, 3),
        r=linear(3, 3),
        o=linear(3, 3),
        mix=parameter(3, 3),
        first=parameter(3),
        decay=parameter(3),
    ),
)
module(
    "conv_state_space",
    rows(
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x, n=8, dim=1) * torch.fft.rfft(m.k, n=8, dim=0), n=8, dim=1)[
            :, :4
        ],
        (B, 4, 3),
        k=parameter(4, 3),
    ),
)


def cparameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape, dtype=torch.complex128))


def _s4d(m: Any, x: Tensor) -> Tensor:
    dt = m.log_dt.exp()
    a = -m.log_a_real.exp() + 1j * m.a_imag
    c = torch.view_as_complex(m.c) * (torch.exp(dt[:, None] * a) - 1) / a
    k = 2 * torch.einsum("hn,hnl->hl", c, torch.exp((dt[:, None] * a)[..., None] * torch.arange(x.shape[-1]))).real
    y = torch.fft.irfft(torch.fft.rfft(x, n=2 * x.shape[-1]) * torch.fft.rfft(k, n=2 * x.shape[-1]), n=2 * x.shape[-1])
    return y[..., : x.shape[-1]] + x * m.d[:, None]


module(
    "s4d",
    rows(
        _s4d,
        (B, 2, 4),
        log_dt=parameter(2),
        log_a_real=parameter(2, 3),
        a_imag=parameter(2, 3),
        c=parameter(2, 3, 2),
        d=parameter(2),
    ),
)


def _complex_loop(m: Any, x: Tensor) -> Tensor:
    decay = torch.polar(m.r.sigmoid(), m.angle)
    h, out = torch.zeros(x.shape[0], 3, dtype=decay.dtype), []
    for t in range(x.shape[1]):
        h = decay * h + x[:, t] @ m.b
        out.append((h @ m.c).real)
    return torch.stack(out, 1)


module(
    "lru_loop",
    rows(
        lambda m, x: _complex_loop(m, x.to(torch.complex128)),
        (B, T, 2),
        r=parameter(3),
        angle=parameter(3),
        b=cparameter(2, 3),
        c=cparameter(3, 2),
    ),
)

# ---------------------------------------------------------------------------------------- Fourier and complex numbers

TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "fft": lambda x: torch.fft.fft(x, norm="ortho"),
    "ifft": lambda x: torch.fft.ifft(x, dim=1),
    "rfft": lambda x: torch.fft.rfft(x, norm="forward"),
    "irfft": lambda x: torch.fft.irfft(x),
    "hfft": lambda x: torch.fft.hfft(x),
    "ihfft": lambda x: torch.fft.ihfft(x),
    "fft2": lambda x: torch.fft.fft2(x, norm="backward"),
    "rfft2": lambda x: torch.fft.rfft2(x),
    "irfft2": lambda x: torch.fft.irfft2(x, s=(3, 4)),
    "fftn": lambda x: torch.fft.fftn(x, dim=(1, 2)),
    "ifftn": lambda x: torch.fft.ifftn(x, dim=(1, 2)),
    "rfftn": lambda x: torch.fft.rfftn(x, dim=(1, 2)),
    "irfftn": lambda x: torch.fft.irfftn(x, dim=(1, 2)),
    "fftshift": lambda x: torch.fft.fftshift(torch.fft.fft(x), dim=(1,)),
    "stft": lambda x: torch.stft(
        x.flatten(1), 4, hop_length=2, return_complex=True, window=torch.ones(4, dtype=x.dtype)
    ),
    "istft": lambda x: torch.istft(
        torch.stft(x.flatten(1), 4, hop_length=2, return_complex=True, window=torch.hann_window(4, dtype=x.dtype)),
        4,
        hop_length=2,
        window=torch.hann_window(4, dtype=x.dtype),
    ),
    "angle": lambda x: torch.complex(x, x.sin()).angle(),
    "abs_of_complex": lambda x: torch.complex(x, x.cos()).abs(),
    "polar": lambda x: torch.polar(x, x),
    "complex_exp": lambda x: torch.exp(1j * x),
    "conj": lambda x: torch.complex(x, x.sin()).conj() * (1 + 2j),
    "complex_pow": lambda x: torch.complex(x, x.sin()) ** 2,
    "sgn": lambda x: torch.sgn(torch.complex(x, x.cos())),
}
for name, function in TRANSFORMS.items():
    module(name, through(function, 4, 6))
module("fnet", rows(lambda m, x: m.a(torch.fft.fft2(x).real), (B, 4, 3), a=linear(3, 2)))
module(
    "spectral_conv",
    rows(
        lambda m, x: torch.fft.irfft2(torch.einsum("bixy,ioxy->boxy", torch.fft.rfft2(x)[..., :2, :2], m.w), s=(4, 4)),
        (B, 2, 4, 4),
        w=cparameter(2, 3, 2, 2),
    ),
)
module(
    "spectral_conv_real",
    rows(
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(m.w), dim=1),
        (B, 4, 3),
        w=parameter(3, 3, 2),
    ),
)
module(
    "complex_linear",
    rows(
        lambda m, x: torch.view_as_real(F.linear(torch.complex(x, x.sin()), m.w, m.b)),
        (B, T, 4),
        w=cparameter(3, 4),
        b=cparameter(3),
    ),
)
module(
    "complex_linear_2d",
    rows(
        lambda m, x: torch.view_as_real((torch.complex(x, x.sin()) @ m.w) * m.s),
        (B, 4),
        w=cparameter(4, 3),
        s=cparameter(3),
    ),
)
module(
    "complex_reused",
    rows(lambda m, x: torch.view_as_real(torch.complex(x, x.sin()) @ m.w @ m.w.conj().t()), (B, 4), w=cparameter(4, 3)),
)
module(
    "complex_embedding",
    tokens(lambda m, i: torch.view_as_real(m.w[i] * m.p), B, T, w=cparameter(7, 3), p=cparameter(T, 3)),
)
module(
    "complex_of_two",
    rows(
        lambda m, x: torch.view_as_real(torch.complex(x, x) @ torch.complex(m.re, m.im)),
        (B, T, 3),
        re=parameter(3, 2),
        im=parameter(3, 2),
    ),
)
module(
    "complex_conv",
    rows(
        lambda m, x: torch.view_as_real(F.conv1d(torch.complex(x, x.sin()), m.w, m.b)),
        (B, 2, 5),
        w=cparameter(3, 2, 2),
        b=cparameter(3),
    ),
)
module(
    "rotary_complex",
    rows(
        lambda m, x: torch.view_as_real(
            torch.view_as_complex((x * m.w).unflatten(-1, (-1, 2)))
            * torch.polar(torch.ones(T, 2, dtype=torch.float64), m.f * torch.arange(T)[:, None])
        ).flatten(-2),
        (B, 2, T, 4),
        w=parameter(4),
        f=parameter(2),
    ),
)

# --------------------------------------------------------------------------------------------------------- matrices

SQUARE: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix_exp": torch.matrix_exp,
    "inverse": lambda w: torch.linalg.inv(w + 4 * torch.eye(3)),
    "det": lambda w: torch.linalg.det(w)[..., None],
    "slogdet": lambda w: torch.linalg.slogdet(w)[1][..., None],
    "cholesky": lambda w: torch.linalg.cholesky(w @ w.mT + torch.eye(3)),
    "qr": lambda w: torch.linalg.qr(w)[0],
    "svd": lambda w: torch.linalg.svd(w)[1],
    "svdvals": torch.linalg.svdvals,
    "eigvalsh": torch.linalg.eigvalsh,
    "eigh": lambda w: torch.linalg.eigh(w + w.mT)[0],
    "solve": lambda w: torch.linalg.solve(w + 4 * torch.eye(3), w),
    "solve_triangular": lambda w: torch.linalg.solve_triangular(w.tril() + 4 * torch.eye(3), w, upper=False),
    "cholesky_solve": lambda w: torch.cholesky_solve(w, torch.linalg.cholesky(w @ w.mT + torch.eye(3))),
    "matrix_power": lambda w: torch.linalg.matrix_power(w, 3),
    "multi_dot": lambda w: w @ w @ w,
    "lu": lambda w: torch.linalg.lu(w)[2],
    "nuclear_norm": lambda w: torch.linalg.matrix_norm(w, "nuc")[..., None],
    "spectral": lambda w: torch.linalg.matrix_norm(w, 2)[..., None],
    "frobenius": lambda w: torch.linalg.matrix_norm(w)[..., None],
    "trace": lambda w: w.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True),
    "cross": lambda w: torch.linalg.cross(w, w.mT),
    "householder": lambda w: torch.linalg.householder_product(w.tril(), w[..., 0, :].tanh()),
}
for name, function in SQUARE.items():
    module(f"{name}_of_examples", through(function, 3, 3))
    module(
        f"{name}_of_a_parameter",
        rows(lambda m, x, function=function: x * function(m.w).reshape(-1)[:3], (B, T, 3), w=parameter(3, 3)),
    )
module("orthogonal", layer(lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), T, 4))
module(
    "orthogonal_cayley",
    layer(lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="cayley"), T, 4),
)
module(
    "solve_with_examples",
    rows(lambda m, x: torch.linalg.solve(m.w + 4 * torch.eye(4), x), (B, 4, 2), w=parameter(4, 4)),
)
module(
    "solve_with_columns",
    rows(lambda m, x: torch.linalg.solve(m.w + 4 * torch.eye(4), x.t()).t() * 2, (B, 4), w=parameter(4, 4)),
)
module(
    "triangular_with_columns",
    rows(
        lambda m, x: torch.linalg.solve_triangular(m.w.tril() + 4 * torch.eye(4), x.t(), upper=False).t(),
        (B, 4),
        w=parameter(4, 4),
    ),
)
module(
    "mahalanobis",
    rows(
        lambda m, x: torch.linalg.solve_triangular(m.w.tril() + 4 * torch.eye(4), x.unsqueeze(-1), upper=False),
        (B, 4),
        w=parameter(4, 4),
    ),
)

ALGEBRA: dict[str, Build] = {
    "einsum_trace": rows(lambda m, x: torch.einsum("bii,i->b", x, m.w)[:, None], (B, 3, 3), w=parameter(3)),
    "einsum_outer": rows(lambda m, x: torch.einsum("bi,j->bij", x, m.w), (B, 3), w=parameter(4)),
    "einsum_ellipsis": rows(lambda m, x: torch.einsum("...i,ij->...j", x, m.w), (B, T, 2, 3), w=parameter(3, 4)),
    "einsum_three": rows(
        lambda m, x, y: torch.einsum("bti,bsj,hij->bhts", x, y, m.w), (B, T, 3), (B, T + 1, 4), w=parameter(2, 3, 4)
    ),
    "einsum_sum_out": rows(lambda m, x: torch.einsum("bti,ij->b", x, m.w)[:, None], (B, T, 3), w=parameter(3, 4)),
    "einsum_diagonal_weight": rows(lambda m, x: torch.einsum("bti,ii->bti", x, m.w), (B, T, 3), w=parameter(3, 3)),
    "einsum_time_first": rows(
        lambda m, x: torch.einsum("tbi,hio->tbho", x, m.w), (T, B, 3), batch=1, w=parameter(2, 3, 2)
    ),
    "tensordot": rows(lambda m, x: torch.tensordot(x, m.w, dims=([1, 2], [1, 0])), (B, T, 4), w=parameter(4, T, 2)),
    "tensordot_first": rows(
        lambda m, x: torch.tensordot(m.w, x, dims=([1], [2])).movedim(1, 0), (B, T, 4), w=parameter(2, 4)
    ),
    "kron": rows(lambda m, x: x @ torch.kron(m.w, m.v), (B, T, 4), w=parameter(2, 2), v=parameter(2, 3)),
    "kron_of_examples": rows(
        lambda m, x: (x[:, :, None, :, None] * m.w[None, None, :, None, :]).reshape(B, -1), (B, 2, 3), w=parameter(2, 2)
    ),
    "bilinear_layer": rows(lambda m, x, y: m.a(x, y), (B, 3), (B, 4), a=lambda: nn.Bilinear(3, 4, 2)),
    "bilinear_layer_3d": rows(lambda m, x, y: m.a(x, y), (B, T, 3), (B, T, 4), a=lambda: nn.Bilinear(3, 4, 2)),
    "outer": rows(lambda m, x: torch.vmap(torch.outer, (0, None))(x, m.w), (B, 3), w=parameter(4)),
    "addmm": rows(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2), (B, 3), w=parameter(3, 4), b=parameter(4)),
    "baddbmm": rows(
        lambda m, x: torch.baddbmm(m.b, x, m.w.expand(x.shape[0], -1, -1)),
        (B, T, 3),
        w=parameter(3, 4),
        b=parameter(T, 4),
    ),
    "addcmul": rows(
        lambda m, x: torch.addcmul(m.b, x, m.w, value=0.3) + torch.addcdiv(m.b, x, m.w.exp()),
        (B, T, 4),
        w=parameter(4),
        b=parameter(4),
    ),
    "lerp": rows(lambda m, x: torch.lerp(m.b, x, m.w), (B, T, 4), w=parameter(4), b=parameter(4)),
    "chain_matmul": rows(
        lambda m, x: torch.linalg.multi_dot([x, m.w, m.v]), (B, 3), w=parameter(3, 2), v=parameter(2, 4)
    ),
    "cdist": rows(lambda m, x: torch.cdist(x, m.w), (B, T, 3), w=parameter(4, 3)),
    "cdist_2d": rows(lambda m, x: torch.cdist(x, m.w), (B, 3), w=parameter(4, 3)),
    "cdist_p1": rows(lambda m, x: torch.cdist(x, m.w, p=1), (B, T, 3), w=parameter(4, 3)),
    "cdist_of_examples": rows(lambda m, x: torch.cdist(x * m.w, x.sin(), p=1.5), (B, T, 3), w=parameter(3)),
    "pairwise_distance": rows(
        lambda m, x: F.pairwise_distance(x * m.w, m.v), (B, T, 3), w=parameter(3), v=parameter(3)
    ),
    "pdist": rows(
        lambda m, x: torch.vmap(lambda v: (v[:, None] - v[None]).square().sum(-1))(x * m.w), (B, T, 3), w=parameter(3)
    ),
    "batch_matrices": rows(lambda m, x: x @ (m.w + x.mT @ x), (B, T, 4), w=parameter(4, 4)),
}
for name, build in ALGEBRA.items():
    module(name, build)


def _vector_quantiser(straight: bool, flat: bool) -> Build:
    def function(m: Any, x: Tensor) -> Tensor:
        z = m.a(x)
        rows_ = z.flatten(0, 1) if flat else z
        index = torch.cdist(rows_, m.book.weight).argmin(-1)
        q = m.book(index).view_as(z)
        commit = ((q.detach() - z) ** 2).mean(-1, keepdim=True) * 0.25 + ((q - z.detach()) ** 2).mean(-1, keepdim=True)
        return torch.cat((m.b(z + (q - z).detach() if straight else q), commit), -1)

    return rows(function, (B, T, 3), a=linear(3, 2), b=linear(2, 3), book=table(5, 2))


module("vq", _vector_quantiser(False, False))
module("vq_straight_through", _vector_quantiser(True, False))
module("vq_straight_through_folded", _vector_quantiser(True, True))

# ---------------------------------------------------------------------------------------------- functions of a tensor

INDEX = torch.tensor([0, 2, 2, 1])
MASK = torch.tensor([True, False, True, True])
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "cumsum": lambda x: x.cumsum(-1),
    "cumprod": lambda x: x.cumprod(1),
    "cummax": lambda x: x.cummax(1)[0],
    "cummin": lambda x: x.cummin(2)[0],
    "cumulative_trapezoid": lambda x: torch.cumulative_trapezoid(x),
    "diff": lambda x: x.diff(dim=1),
    "index_fill": lambda x: x.index_fill(1, INDEX, 0.5),
    "index_add": lambda x: x.index_add(1, INDEX, x.sin()),
    "index_copy": lambda x: x.index_copy(1, torch.tensor([2, 0]), x[:, 1:3].cos()),
    "index_select": lambda x: x.index_select(1, INDEX),
    "masked_fill": lambda x: x.masked_fill(x > 0.3, -1.0),
    "masked_fill_constant": lambda x: x.masked_fill(MASK, -1.0),
    "masked_scatter": lambda x: x.masked_scatter(MASK.expand_as(x), x.sin()),
    "where": lambda x: torch.where(x > 0, x, x.sin()),
    "write_mask_zero": lambda x: _written(x, lambda y: y.__setitem__(y > 0.2, 0.0)),
    "write_mask_number": lambda x: _written(x, lambda y: y.__setitem__(y > 0.2, 3.0)),
    "write_slice": lambda x: _written(x, lambda y: y.__setitem__((slice(None), slice(1, 3)), 2 * y[:, 2:4])),
    "write_index": lambda x: _written(x, lambda y: y.__setitem__((slice(None), [2, 0]), 0.0)),
    "write_columns_by_mask": lambda x: _written(x, lambda y: y.__setitem__((..., MASK), 0.0)),
    "fill_diagonal": lambda x: _written(x, lambda y: y.diagonal(dim1=1, dim2=2).zero_()),
    "put_in_place": lambda x: _written(x, lambda y: y[:, 0].mul_(2)),
    "scatter_reduce_sum": lambda x: torch.zeros_like(x).scatter_reduce(1, (x > 0).long(), x, "sum"),
    "scatter_reduce_mean": lambda x: x.scatter_reduce(1, (x > 0).long(), x, "mean"),
    "scatter_reduce_amax": lambda x: x.scatter_reduce(2, (x > 0).long(), x.cos(), "amax", include_self=False),
    "scatter_reduce_prod": lambda x: x.scatter_reduce(1, (x > 0).long(), x, "prod"),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(1, (x > 0).long(), x),
    "scatter": lambda x: x.scatter(1, (x[:, :1] > 0).long(), 2 * x[:, :1]),
    "segment_reduce": lambda x: torch.segment_reduce(
        x, "sum", lengths=torch.tensor([[1, 3]]).expand(x.shape[0], -1), axis=1
    ),
    "take_along_dim": lambda x: x.take_along_dim(x.argsort(1), 1),
    "gather": lambda x: x.gather(2, x.argsort(2)),
    "sort": lambda x: x.sort(1)[0],
    "sort_descending": lambda x: x.sort(dim=2, descending=True, stable=True)[0],
    "topk": lambda x: x.topk(2, 1)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "median": lambda x: x.median(1)[0],
    "mode": lambda x: x.mode(1)[0],
    "quantile": lambda x: x.quantile(0.3, 1),
    "nanmedian": lambda x: x.nanmedian(1)[0],
    "max": lambda x: x.max(1)[0],
    "amax": lambda x: x.amax((1, 2))[:, None],
    "aminmax": lambda x: torch.stack(torch.aminmax(x, dim=1)).movedim(1, 0),
    "prod": lambda x: x.prod(2),
    "norm": lambda x: x.norm(dim=1),
    "norm_1": lambda x: x.norm(p=1, dim=(1, 2))[:, None],
    "norm_inf": lambda x: torch.linalg.vector_norm(x, float("inf"), 2),
    "norm_3": lambda x: x.norm(p=3, dim=-1),
    "logsumexp": lambda x: x.logsumexp((1, 2))[:, None],
    "std": lambda x: x.std(1),
    "var": lambda x: x.var((1, 2), correction=0)[:, None],
    "var_mean": lambda x: sum(torch.var_mean(x, 2)),
    "dist": lambda x: torch.vmap(lambda v: torch.dist(v, v.sin()))(x)[:, None],
    "renorm": lambda x: torch.renorm(x.movedim(0, 1), 2, 1, 0.5).movedim(1, 0),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "normalize_1": lambda x: F.normalize(x, p=1, dim=1),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.roll(1, 1), dim=-1),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "diag_embed": lambda x: torch.diag_embed(x),
    "tril": lambda x: x.tril(-1),
    "triu": lambda x: x.triu(1),
    "diagonal": lambda x: x.diagonal(dim1=1, dim2=2),
    "diagonal_scatter": lambda x: x.diagonal_scatter(x[:, 0, :4], dim1=1, dim2=2),
    "slice_scatter": lambda x: x.slice_scatter(x[:, :2], 1, 1, 3),
    "select_scatter": lambda x: x.select_scatter(x[:, 0], 1, 2),
    "as_strided": lambda x: torch.as_strided(x.contiguous(), (B, 2, 8), (16, 8, 1)) if x.shape[1:] == (4, 4) else x,
    "flip": lambda x: x.flip(1, 2),
    "roll": lambda x: x.roll((1, 2), (1, 2)),
    "rot90": lambda x: x.rot90(1, (1, 2)),
    "tile": lambda x: x.tile(1, 2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "repeat_interleave_sizes": lambda x: x.repeat_interleave(torch.tensor([1, 0, 2, 1]), 1, output_size=4),
    "stack": lambda x: torch.stack((x, x.sin()), 1),
    "hstack": lambda x: torch.hstack((x, x.sin())),
    "chunk": lambda x: torch.cat(x.chunk(3, 1)[::-1], 2) if x.shape[1] % 3 == 0 else torch.cat(x.chunk(2, 1)[::-1], 2),
    "unbind": lambda x: sum(x.unbind(1)),
    "movedim": lambda x: x.movedim(1, 2),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "bucketize": lambda x: x * torch.bucketize(x.detach(), torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype)),
    "searchsorted": lambda x: x * torch.searchsorted(x.detach().sort(-1)[0], x.detach()),
    "histogram_soft": lambda x: torch.exp(-(x.unsqueeze(-1) - torch.linspace(-1, 1, 3)).square()).sum(2),
    "round_ste": lambda x: x + (x.round() - x).detach(),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "nan_to_num": lambda x: torch.nan_to_num(x),
    "heaviside": lambda x: torch.heaviside(x.detach(), torch.tensor(0.5, dtype=x.dtype)) * x,
    "copysign": lambda x: torch.copysign(x, x.sin()),
    "hypot": lambda x: torch.hypot(x, x.sin()),
    "atan2": lambda x: torch.atan2(x, x.cos()),
    "xlogy": lambda x: torch.xlogy(x, x.exp()),
    "erfinv": lambda x: torch.erfinv(x.tanh() * 0.9),
    "lgamma": lambda x: torch.lgamma(x.exp()),
    "digamma": lambda x: torch.digamma(x.exp()),
    "polygamma": lambda x: torch.polygamma(2, x.exp()),
    "i0": lambda x: torch.i0(x),
    "i1e": lambda x: torch.special.i1e(x),
    "sinc": lambda x: torch.sinc(x),
    "logit": lambda x: torch.logit(x.sigmoid(), 1e-3),
    "expit_ndtri": lambda x: torch.special.ndtri(x.sigmoid()),
    "log_ndtr": lambda x: torch.special.log_ndtr(x),
    "zeta": lambda x: torch.special.zeta(torch.tensor(2.0, dtype=x.dtype), x.exp()),
    "fmod": lambda x: torch.fmod(x, 0.7),
    "remainder": lambda x: x % 0.7,
    "trapezoid": lambda x: torch.trapezoid(x, dim=1),
    "vander": lambda x: torch.stack([x**k for k in range(3)], -1),
    "polyval": lambda x: ((x + 1) * x + 2) * x,
    "meshgrid": lambda x: torch.vmap(lambda v: sum(torch.meshgrid(v[0], v[1], indexing="ij")))(x),
    "cartesian": lambda x: (x.unsqueeze(2) - x.unsqueeze(1)).flatten(1),
    "one_hot_argmax": lambda x: F.one_hot(x.argmax(-1), 4).to(x.dtype) * x,
    "gumbel_hard": lambda x: (lambda y: F.one_hot(y.argmax(-1), 4).to(y.dtype) - y.detach() + y)(x.softmax(-1)),
    "softmax_1": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(2),
    "to_dtype": lambda x: x.float().double() * 2,
    "expand_unsqueeze": lambda x: x[:, None].expand(-1, 3, -1, -1),
    "vmap_of_rows": lambda x: torch.vmap(lambda v: v @ v.t())(x),
    "bernoulli_mask": lambda x: x * (x > 0),
    "detach_half": lambda x: x * x.detach(),
    "gradient": lambda x: torch.gradient(x, dim=1)[0],
    "split_sizes": lambda x: sum(x.split([2, 2], 1)),
    "tensor_split": lambda x: torch.cat(x.tensor_split((1, 3), 1)[::-1], 1),
    "ravel": lambda x: x.reshape(x.shape[0], -1),
    "cosh": lambda x: x.cosh() + x.asinh() + x.erf() + x.log1p().nan_to_num() + x.expm1(),
    "igamma": lambda x: x * torch.igamma(torch.tensor(2.0, dtype=x.dtype), x.detach().exp()),
}


def _written(x: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    y = x.clone()
    write(y)
    return y


for name, function in FUNCTIONS.items():
    module(name, through(function, 4, 4))

OF_PARAMETERS: dict[str, Build] = {
    "tril_w": of_parameter(torch.tril, 4, 4),
    "triu_w": of_parameter(lambda w: w.triu(1), 4, 4),
    "diag_w": of_parameter(torch.diag, 4),
    "diag_embed_w": of_parameter(lambda w: torch.diag_embed(w, 1), 3),
    "normalize_w": of_parameter(lambda w: F.normalize(w, dim=0), 4, 3),
    "softmax_w": of_parameter(lambda w: w.softmax(1), 4, 3),
    "cumprod_w": of_parameter(lambda w: w.cumprod(0), 4, 3),
    "sort_w": of_parameter(lambda w: w.sort(0)[0], 4, 3),
    "logcumsumexp_w": of_parameter(lambda w: w.logcumsumexp(0), 4, 3),
    "cummax_w": of_parameter(lambda w: w.cummax(0)[0], 4, 3),
    "topk_w": of_parameter(lambda w: w.topk(4, 0)[0], 6, 3),
    "max_w": of_parameter(lambda w: w.max(0)[0], 5, 4, 3),
    "index_fill_w": of_parameter(lambda w: w.index_fill(0, INDEX, 0.0), 4, 3),
    "masked_fill_w": of_parameter(lambda w: w.masked_fill(w < 0, 0.0), 4, 3),
    "scatter_w": of_parameter(
        lambda w: torch.zeros(4, 3, dtype=w.dtype).scatter_add(0, INDEX[:, None].expand(-1, 3), w), 4, 3
    ),
    "gather_w": of_parameter(lambda w: w.gather(0, INDEX[:, None].expand(-1, 3)), 4, 3),
    "index_w": of_parameter(lambda w: w[INDEX], 4, 3),
    "unfold_w": of_parameter(lambda w: w.unfold(0, 4, 1).t(), 6),
    "flip_w": of_parameter(lambda w: w.flip(0), 4, 3),
    "roll_w": of_parameter(lambda w: w.roll(1, 0), 4, 3),
    "fft_w": of_parameter(lambda w: torch.fft.rfft(w, dim=0).real, 6, 3),
    "norm_w": of_parameter(lambda w: w / w.norm(), 4, 3),
    "std_w": of_parameter(lambda w: w / w.std(0), 4, 3),
    "prod_w": of_parameter(lambda w: w * w.prod(), 4, 3),
    "logsumexp_w": of_parameter(lambda w: w - w.logsumexp(0), 4, 3),
    "kron_w": of_parameter(lambda w: torch.kron(w, w), 2, 2),
    "expand_w": of_parameter(lambda w: w.expand(4, 3), 3),
    "interpolate_w": of_parameter(lambda w: F.interpolate(w[None, None], (4, 3), mode="bilinear")[0, 0], 2, 2),
    "avg_pool_w": of_parameter(lambda w: F.avg_pool2d(w[None, None], 2)[0, 0], 8, 6),
    "conv_w": of_parameter(lambda w: F.conv1d(w[None], torch.ones(3, 6, 2, dtype=w.dtype))[0].t(), 6, 5),
    "bicubic_w": of_parameter(
        lambda w: F.interpolate(w[None, None], (4, 3), mode="bicubic", align_corners=True)[0, 0], 2, 2
    ),
    "matrix_exp_w": of_parameter(lambda w: torch.matrix_exp(w - w.t()), 4, 4),
    "cayley_w": of_parameter(
        lambda w: torch.linalg.solve(torch.eye(4) + w - w.t(), torch.eye(4, dtype=w.dtype) - w + w.t()), 4, 4
    ),
    "layer_norm_w": of_parameter(lambda w: F.layer_norm(w, (3,)), 4, 3),
    "group_norm_w": of_parameter(lambda w: F.group_norm(w, 2), 4, 6),
    "pixel_w": of_parameter(lambda w: F.pixel_shuffle(w, 2)[0], 4, 2, 2),
    "max_pool_w": of_parameter(lambda w: F.max_pool2d(w[None], 2)[0], 8, 6),
    "pad_w": of_parameter(lambda w: F.pad(w[None], (1, 1), mode="reflect")[0], 4, 3),
    "where_w": of_parameter(lambda w: torch.where(w > 0, w, 2 * w), 4, 3),
    "repeat_interleave_w": of_parameter(lambda w: w.repeat_interleave(2, 0), 2, 3),
    "glu_w": of_parameter(lambda w: F.glu(w, 1), 4, 6),
    "cdist_w": of_parameter(lambda w: torch.cdist(w, w[:3] + 1), 4, 3),
    "einsum_w": of_parameter(lambda w: torch.einsum("ij,kj->ik", w, w.sin()), 4, 3),
    "take_w": of_parameter(lambda w: w.take(torch.arange(12).view(4, 3)), 5, 3),
    "embedding_w": of_parameter(lambda w: F.embedding(INDEX, w), 4, 3),
    "householder_w": of_parameter(lambda w: torch.eye(4) - 2 * torch.outer(w, w) / w.dot(w), 4),
    "qr_w": of_parameter(lambda w: torch.linalg.qr(w)[0], 4, 3),
    "svd_w": of_parameter(
        lambda w: (lambda u, s, v: (u * s.sqrt()) @ v)(*torch.linalg.svd(w, full_matrices=False)), 4, 3
    ),
    "sdpa_w": of_parameter(lambda w: F.scaled_dot_product_attention(w, w, w)[0], 1, 4, 3),
    "rms_w": of_parameter(lambda w: F.rms_norm(w, (3,)), 4, 3),
    "soft_threshold_w": of_parameter(lambda w: F.softshrink(w, 0.2), 4, 3),
    "median_w": of_parameter(lambda w: w - w.median(), 4, 3),
    "tanh_w": of_parameter(lambda w: w.tanh() * w.detach().abs().max(), 4, 3),
}
for name, build in OF_PARAMETERS.items():
    module(name, build)
