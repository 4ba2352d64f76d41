"""The ops that a graph for a CUDA device gets, as ``torch.ops.gnsfx.*``; their norms are parts [k, B] for ``collect``.

Parts are fp32 (fp64 for fp64); their sum over dim 0, clamped at zero, is the squared norms [B]. k follows from static
shapes and from ``tile`` alone, never from B or from the device. Without our kernel an op runs its torch twin, whose norms
are the first row of the parts; the others are zeros.

| op                   | arguments                         | results                                           |
|----------------------|-----------------------------------|---------------------------------------------------|
| mm_norm_parts        | x [B,T,I], g [B,T,O], tile        | grad [I,O] in x's dtype, parts                    |
| gram_norm_parts      | x [B,T,I], g_i [B,T,O_i], tile    | parts of |x_b^T g_ib|^2, for each g_i             |
| embedding_norm_parts | ids [B,T], g [B,T,D]              | parts; ids that are SKIPPED give nothing          |
| norm_backward        | see ``kernels/norm_backward.py``  | dx, dgamma, dbeta, parts of both                  |
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gnsfx.kernels import gpu, gpu_checks
from gnsfx.kernels.accumulate import accumulate_dtype
from gnsfx.kernels.embedding_norm import embedding_sq_norm
from gnsfx.kernels.factors import same_leading
from gnsfx.kernels.ghost_norm import ghost_sq_norm
from gnsfx.kernels.mm_norm import mm_sq_norm, product_sq_norm
from gnsfx.kernels.norm_backward import empty_as_laid, norm_backward
from gnsfx.kernels.register import register
from gnsfx.kernels.triton import plan


def mm_norm_parts(x: Tensor, g: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """The weight gradient [I, O], added up in fp32 and rounded once, and norms of its per-example parts."""
    same_leading(2, x, g)
    k = plan.product_parts(x.shape[2], g.shape[2], tile)
    readable = _readable(x, g)
    reduced = plan.TILES[tile] == plan.REDUCE
    if reduced and torch.are_deterministic_algorithms_enabled():
        readable = None
    if readable is not None and gpu_checks.product_is_right(tile, readable):
        from gnsfx.kernels.triton import mm_norm

        left, right = readable
        processors = gpu.multiprocessors(x.device)
        with torch.cuda.device_of(x):
            if reduced:
                return mm_norm.product_norms_reduced(left, right, processors)
            return mm_norm.product_norms(left, right, processors, plan.TILES[tile])
    both = x.unsqueeze(1), g.unsqueeze(1)
    if x.is_cpu:
        grad, sq_norms = mm_sq_norm(*both)
        return grad.squeeze(0), _first_of(sq_norms, k)
    return x.flatten(0, 1).mT @ g.flatten(0, 1), _first_of(product_sq_norm(*both), k)


def gram_norm_parts(x: Tensor, g: Sequence[Tensor], tile: int) -> list[Tensor]:
    """Norms of the products of ``x`` with each of up to three factors."""
    same_leading(2, x, *g)
    readable = _readable(x, *g)
    if readable is not None and gpu_checks.gram_is_right(tile, readable):
        from gnsfx.kernels.triton import mm_norm

        with torch.cuda.device_of(x):
            return mm_norm.gram_norms(readable[0], readable[1:], plan.GRAMS[tile])
    k = plan.gram_parts(x.shape[1], tile)
    return [_first_of(ghost_sq_norm(x.unsqueeze(1), each.unsqueeze(1)), k) for each in g]


def embedding_norm_parts(ids: Tensor, g: Tensor) -> Tensor:
    """Norms of what lookups add to a table. Ids may be any integers."""
    same_leading(2, ids, g)
    ours = (
        gpu.launches_on(g.device) and g.numel() and g.dtype in gpu.LOOKED_UP and "embedding" in gpu.kernels_on(g.device)
    )
    if ours and gpu_checks.lookup_is_right(ids, g):
        from gnsfx.kernels.triton import embedding_norm

        with torch.cuda.device_of(g):
            return embedding_norm.embedding_norms(ids, g)
    return _first_of(embedding_sq_norm(ids, g), plan.embedding_parts(*g.shape[1:]))


def _readable(*factors: Tensor) -> list[Tensor] | None:
    """The factors as the copy engine can read them: 16-bit floats whose rows start at multiples of 16 bytes; copied where
    only their layout is in the way. None where our kernels do not run."""
    first = factors[0]
    if (
        not gpu.launches_on(first.device)
        or first.dtype not in gpu.MULTIPLIED
        or "products" not in gpu.kernels_on(first.device)
    ):
        return None
    if any(t.dtype != first.dtype or t.numel() == 0 or t.shape[2] % 8 for t in factors):
        return None
    return [t if _aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in factors]


def _aligned(t: Tensor) -> bool:
    steps = [step for step, size in zip(t.stride()[:2], t.shape[:2], strict=True) if size > 1]
    return t.stride(2) == 1 and t.data_ptr() % 16 == 0 and all(step > 0 and step % 8 == 0 for step in steps)


def _first_of(sq_norms: Tensor, k: int) -> Tensor:
    """Parts [k, B] whose first row is all there is."""
    return torch.nn.functional.pad(sq_norms.unsqueeze(0), (0, 0, 0, k - 1)).contiguous()


def _fake_mm(x: Tensor, g: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    same_leading(2, x, g)
    I, O = x.shape[2], g.shape[2]
    return x.new_empty(I, O), _fake_parts(x, plan.product_parts(I, O, tile))


def _fake_gram(x: Tensor, g: Sequence[Tensor], tile: int) -> list[Tensor]:
    same_leading(2, x, *g)
    return [_fake_parts(x, plan.gram_parts(x.shape[1], tile)) for _ in g]


def _fake_embedding(ids: Tensor, g: Tensor) -> Tensor:
    same_leading(2, ids, g)
    return _fake_parts(g, plan.embedding_parts(*g.shape[1:]))


def _fake_norm(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, shift: bool, first: bool = False, *_
) -> tuple[Tensor, ...]:
    B, _, D = x.shape
    scale = (x if weight is None else weight).new_empty
    parts = [x.new_empty(k, B, dtype=accumulate_dtype(x.dtype)) for k in (plan.row_parts(D), plan.row_parts(D) * shift)]
    return empty_as_laid(x, first), scale(D), scale(D * shift), *parts


def _fake_parts(x: Tensor, k: int) -> Tensor:
    return x.new_empty(k, x.shape[0], dtype=accumulate_dtype(x.dtype))


register("mm_norm_parts(Tensor x, Tensor g, int tile) -> (Tensor, Tensor)", mm_norm_parts, _fake_mm)
register("gram_norm_parts(Tensor x, Tensor[] g, int tile) -> Tensor[]", gram_norm_parts, _fake_gram)
register("embedding_norm_parts(Tensor ids, Tensor g) -> Tensor", embedding_norm_parts, _fake_embedding)
register(
    "norm_backward(Tensor g, Tensor x, Tensor? mean, Tensor rstd, Tensor? weight, bool shift, bool positions_first=False, Tensor? residual=None,"
    " Tensor? g2=None, Tensor? g3=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    norm_backward,
    _fake_norm,
)
