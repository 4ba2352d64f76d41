"""Section 2: every op next to the same sums in fp64, over dtypes and shapes that divide badly.

A kernel that the package does not trust is an error here: in training PyTorch's operations would take its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.gpu import calls
from benchmarks.gpu.bench import UNIT, Bench, Cases, Row, judged, sums
from gnsfx.kernels import gpu, reference
from gnsfx.kernels.ops import SKIPPED
from gnsfx.kernels.triton import plan

NORMS = [
    (3, 17, 96), (5, 1, 256), (30, 5, 64), (8, 1024, 768), (1, 7, 16384), (300, 5, 64), (37, 100, 4096), (2, 33, 8192),
    (1, 1, 1024), (5, 70, 20), (3, 40, 770), (100, 200, 1024), (1, 1, 8),
]  # fmt: skip
PRODUCTS = [
    (3, 17, 48, 40), (1, 1, 64, 64), (5, 130, 264, 136), (8, 1000, 768, 776), (40, 33, 128, 1024), (2, 64, 100, 36),
    (1, 300, 512, 256), (200, 1, 128, 128),
]  # fmt: skip
LOOKUPS = [(3, 17, 48, 5), (1, 1, 8, 3), (5, 1, 300, 7), (8, 1024, 768, 50257), (4, 300, 520, 2), (2, 2048, 64, 1)]
EPS = 1e-5
FEW, SOME = 3, 5
"""Of each list, the first so many: where it should be quick, and in dtypes but the first."""

COLUMNS: tuple[common.Column, ...] = (
    ("case", lambda row: row["case"]),
    ("worst result", lambda row: str(row.get("worst", ""))),
    ("error", lambda row: f"{row['error']:.1e}" if isinstance(row.get("error"), float) else ""),
    ("allowed", lambda row: f"{row['allowed']:.1e}" if "allowed" in row else ""),
    ("", lambda row: "" if row.get("right") else "WRONG"),
)


def cases(bench: Bench) -> Cases:
    yield "where kernels run", lambda: kernels_there(bench)
    for name, check, *arguments in _checks(bench):
        yield f"{name} {' '.join(_word(a) for a in arguments)}", partial(_run, bench, check, *arguments)
    yield "collect of whole norms and parts", partial(_run, bench, collect)
    yield "all of them trusted", lambda: {"right": not calls.untrusted(), "untrusted": calls.untrusted()}


def _checks(bench: Bench) -> Iterator[tuple[Any, ...]]:
    """Everything in bf16 first: where time runs out it is the least likely to be wrong that is left."""
    dtypes = (torch.bfloat16,) if bench.quick else (torch.bfloat16, torch.float32, torch.float16)
    for dtype in dtypes:
        most = None if dtype == torch.bfloat16 else SOME
        norms, products, lookups = (shapes[: FEW if bench.quick else most] for shapes in (NORMS, PRODUCTS, LOOKUPS))
        for shape in norms:
            yield from (("norm", norm, shape, dtype, kind) for kind in ("layer", "rms"))
        for shape in products:
            yield from (("product", product, shape, dtype, tile) for tile in range(len(plan.TILES)))
            yield from (("Gram", gram, shape, dtype, tile) for tile in range(len(plan.GRAMS)))
        yield from (("lookup", lookup, shape, dtype) for shape in lookups)
        for layout in LAYOUTS:
            yield "norm", norm, (6, 50, 384), dtype, "layer", layout
            yield "product", product, (6, 50, 128, 64), dtype, 1, layout
            yield "Gram", gram, (6, 50, 128, 64), dtype, 1, layout
        if dtype == torch.bfloat16:
            yield "norm", norm, (6, 50, 384), dtype, "bare"
            yield "norm", norm, (6, 50, 384), dtype, "narrow"
            yield "norm", norm, (6, 50, 384), dtype, "added"
            yield "norm", norm, (6, 50, 384), dtype, "summed"


def _run(bench: Bench, check: Any, *arguments: Any) -> Row:
    with calls.kernels_only():
        return judged(check(bench, *arguments))


def _word(value: Any) -> str:
    return str(value).removeprefix("torch.")


def kernels_there(bench: Bench) -> Row:
    """On a GPU without any kernel of ours all that follows would hold PyTorch against itself."""
    found = sorted(gpu.kernels_on(bench.device))
    return {"worst": ", ".join(found) or "none", "right": "norm" in found if bench.cuda else not found}


# ------------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = ("transposed", "wide", "shifted", "expanded")


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same numbers [B, T, D] in memory as strides of real graphs have them."""
    if layout == "transposed":
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "wide":  # a part of something wider: the rows of q among those of q, k and v
        return torch.cat([value, value, value], dim=2).narrow(2, value.shape[2], value.shape[2])
    if layout == "shifted":  # rows begin where no copy engine can begin
        return torch.cat([value[..., :3], value], dim=2).narrow(2, 3, value.shape[2])
    if layout == "expanded":  # the gradient of a sum
        return value[:, :1].expand_as(value)
    return value


# -------------------------------------------------------------------------------------------------------------- checks

Pairs = dict[str, tuple[Tensor, Tensor, float]]


def norm(bench: Bench, shape: tuple[int, int, int], dtype: torch.dtype, kind: str, layout: str = "") -> Pairs:
    """``kind``: "layer", "rms"; "bare", without scale and shift; "narrow", its scale in the dtype of x; "added", something
    is added to dx, which lies in memory with positions first; "summed", three gradients are added up."""
    B, T, D = shape
    g, x, mean, rstd, weight = norm_arguments(bench, shape, dtype, kind == "rms")
    shift, added = kind not in ("rms", "bare"), bench.random(*shape, dtype=dtype) if kind == "added" else None
    scale = {"bare": None, "narrow": weight.to(dtype)}.get(kind, weight)
    g, x = laid_out(g, layout), laid_out(x, "" if layout == "expanded" else layout)
    more = [bench.random(*shape, dtype=dtype) for _ in range(2)] if kind == "summed" else []
    found = calls.norm_backward(g, x, mean, rstd, scale, shift, added is not None, added, *more)
    dx, gammas, betas = norm_truth(sum((m.double() for m in more), g.double()), x, mean is None, scale)
    dx = dx if added is None else dx + added
    rounded, one, all_ = UNIT[dtype if scale is None else scale.dtype], sums(T), sums(B * T)
    pairs = {"dx": (found[0], dx, UNIT[dtype] + sums(D)), "scale": (found[1], gammas.sum(0), rounded + all_)}
    pairs["scale's norms"] = (found[3], gammas.square().sum(1), one)
    if shift:
        pairs["shift"] = (found[2], betas.sum(0), rounded + all_)
        pairs["shift's norms"] = (found[4], betas.square().sum(1), one)
    return pairs


def norm_truth(g: Tensor, x: Tensor, rms: bool, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and the gradients of scale and shift of every example [B, D], by autograd in fp64."""
    B, _, D = x.shape
    wide = x.double().detach().requires_grad_()
    scale = (torch.ones_like(wide[:, 0]) if weight is None else weight.double().repeat(B, 1)).detach().requires_grad_()
    shift = torch.zeros(B, D, dtype=torch.float64, device=x.device, requires_grad=True)
    centred = wide if rms else wide - wide.mean(2, keepdim=True)
    xhat = centred * (centred.square().mean(2, keepdim=True) + EPS).rsqrt()
    y = xhat * scale.unsqueeze(1) + shift.unsqueeze(1)
    dx, gammas, betas = torch.autograd.grad(y, (wide, scale, shift), g.double())
    return dx, gammas, betas


def norm_arguments(
    bench: Bench, shape: tuple[int, int, int], dtype: torch.dtype, rms: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """g, x, mean, rstd, weight, as the forward pass leaves them."""
    x, g = bench.random(*shape, dtype=dtype) * 2 + 1, bench.random(*shape, dtype=dtype)
    wide = x.double()
    mean = None if rms else wide.mean(2)
    centred = wide if mean is None else wide - mean.unsqueeze(2)
    rstd = (centred.square().mean(2) + EPS).rsqrt().float()
    weight = bench.random(shape[2], dtype=torch.float32)
    return g, x, None if mean is None else mean.float(), rstd, weight


def product(bench: Bench, shape: tuple[int, int, int, int], dtype: torch.dtype, tile: int, layout: str = "") -> Pairs:
    x, (g,) = factors(bench, shape, dtype, layout)
    grad, norms = calls.fused(tile)(x, g)
    true_grad, true_norms = truth(x, g)
    B, T = shape[:2]
    return {"gradient": (grad, true_grad, UNIT[dtype] + sums(B * T)), "norms": (norms, true_norms, sums(T))}


def gram(bench: Bench, shape: tuple[int, int, int, int], dtype: torch.dtype, tile: int, layout: str = "") -> Pairs:
    """Three outputs share one input. The Gram form cancels where products are small next to factors: not with random ones."""
    x, several = factors(bench, shape, dtype, layout, 3)
    found = calls.grams(tile)(x, several)
    pairs = enumerate(zip(found, several, strict=True))
    return {f"norms {n}": (norms, truth(x, g)[1], sums(shape[1])) for n, (norms, g) in pairs}


def factors(
    bench: Bench, shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, outputs: int = 1
) -> tuple[Tensor, list[Tensor]]:
    B, T, I, O = shape
    x = laid_out(bench.random(B, T, I, dtype=dtype), "" if layout == "expanded" else layout)
    return x, [laid_out(bench.random(B, T, O + 8 * n, dtype=dtype), layout) for n in range(outputs)]


def truth(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    grad, norms = reference.mm_sq_norm_ref(x.double().unsqueeze(1), g.double().unsqueeze(1))
    return grad.squeeze(0), norms


def lookup(bench: Bench, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Pairs:
    B, T, D, V = shape
    ids, g = bench.integers(V, B, T), bench.random(B, T, D, dtype=dtype)
    if T > 1:
        ids[:, T // 2] = SKIPPED
    rows = []
    for b in range(B):
        kept = ids[b] != SKIPPED
        table = torch.zeros(V, D, dtype=torch.float64, device=bench.device)
        rows.append(table.index_add_(0, ids[b][kept], g[b][kept].double()).square().sum())
    return {"norms": (calls.embedding_norms(ids, g), torch.stack(rows), sums(T))}


def collect(bench: Bench) -> Pairs:
    """Parts of several heights and whole norms, in any order."""
    B = 5
    parts = [bench.random(*shape, dtype=torch.float32) for shape in [(7, B), (B,), (1, B), (7, B), (130, B)]]
    wide = [p.double() for p in parts]
    true = torch.stack([w if w.dim() == 1 else w.sum(0).clamp_min(0) for w in wide])
    return {"rows": (torch.ops.gnsfx.collect(parts), true, sums(130))}
