"""Backward of LayerNorm and RMSNorm with per-example norms: x and g are read once, dx is written once.

    xhat = (x - mean) rstd        dx = rstd (w g - mean_D(w g) - xhat mean_D(w g xhat))        (RMSNorm: mean = 0, no mean_D(w g))
    dgamma_b = sum_t g xhat       dbeta_b = sum_t g       s_b = |dgamma_b|^2, |dbeta_b|^2

Stage one: each program walks rows of one example at a time and adds g xhat and g up in registers. No program adds rows
of two examples into one accumulator, so the sums that a plain kernel would write anyway are the per-example parts:

    chunk   program (b, c) owns piece c of example b                         few examples, many rows
    whole   a program owns several examples and squares each in registers    many examples, few rows
    flat    a program owns a run of rows, one slot for each example in it    what divides badly

Stage two adds the slots of every example, squares the sums, and adds the examples: a program for each block of columns.
"""

import math

import torch
from torch import Tensor

import triton
import triton.language as tl
from gnsfx.kernels.norm_backward import empty_as_laid
from gnsfx.kernels.triton import plan

CHUNK, WHOLE, FLAT = tl.constexpr(plan.CHUNK), tl.constexpr(plan.WHOLE), tl.constexpr(plan.FLAT)
COLUMNS = tl.constexpr(plan.COLUMNS)
SLOTS_AT_ONCE = 32


@triton.jit
def _add_rows(
    x, g, g2, g3, r, mean, rstd, dx, b, lo, hi, T, D, x_b, x_t, g_b, g_t, r_b, r_t, dx_b, dx_t, cols, in_row, scaled,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, RMS: tl.constexpr, STAGES: tl.constexpr,
    HAS_R: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """Write dx of the positions lo..hi of example b; return their sums of g xhat and of g, [BLOCK_D] each."""
    example = tl.cast(b, tl.int64)
    x += example * x_b
    g += example * g_b
    g2 += example * g_b
    g3 += example * g_b
    r += example * r_b
    dx += example * dx_b
    mean += example * T
    rstd += example * T
    gamma = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    beta = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in tl.range(lo, hi, BLOCK_R, num_stages=STAGES):
        rows = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_R)
        inside = rows < hi
        mask = inside[:, None] & in_row[None, :]
        xs = tl.load(x + rows[:, None] * x_t + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        gs = tl.load(g + rows[:, None] * g_t + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if GRADIENTS >= 2:
            gs += tl.load(g2 + rows[:, None] * g_t + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if GRADIENTS == 3:
            gs += tl.load(g3 + rows[:, None] * g_t + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + rows, mask=inside, other=0.0).to(tl.float32)
        if RMS:
            xhat = xs * scale[:, None]
        else:
            center = tl.load(mean + rows, mask=inside, other=0.0).to(tl.float32)
            xhat = tl.where(mask, (xs - center[:, None]) * scale[:, None], 0.0)
        wg = gs * scaled[None, :]
        if RMS:
            along = tl.sum(wg * xhat, axis=1) / D
            out = wg - xhat * along[:, None]
        else:
            level, along = tl.reduce((wg, wg * xhat), 1, _add_pairs)
            out = wg - (level / D)[:, None] - xhat * (along / D)[:, None]
            beta += gs
        out *= scale[:, None]
        if HAS_R:
            out += tl.load(r + rows[:, None] * r_t + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + rows[:, None] * dx_t + cols[None, :], out.to(dx.dtype.element_ty), mask=mask)
        gamma += gs * xhat
    return tl.sum(gamma, axis=0), tl.sum(beta, axis=0)


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit(do_not_specialize=["B", "T", "R", "PIECES"])
def backward_rows(
    x, g, g2, g3, w, r, mean, rstd, dx, gamma_slots, beta_slots, gamma_norms, beta_norms,
    B, T, D, R, PIECES, x_b, x_t, g_b, g_t, r_b, r_t, dx_b, dx_t,
    REGIME: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, RMS: tl.constexpr,
    HAS_W: tl.constexpr, HAS_R: tl.constexpr, HAS_BETA: tl.constexpr, GRADIENTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stage one. ``R``: rows (chunk, flat) or examples (whole) of a program; ``PIECES`` of an example, for chunk."""
    p = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    in_row = cols < D
    scaled = tl.where(in_row, 1.0, 0.0)
    if HAS_W:
        scaled = tl.load(w + cols, mask=in_row, other=0.0).to(tl.float32)
    if REGIME == CHUNK:
        lo = p % PIECES * R
        gamma, beta = _add_rows(
            x, g, g2, g3, r, mean, rstd, dx, p // PIECES, lo, tl.minimum(lo + R, T),
            T, D, x_b, x_t, g_b, g_t, r_b, r_t, dx_b, dx_t, cols, in_row, scaled,
            BLOCK_D, BLOCK_R, RMS, STAGES, HAS_R, GRADIENTS,
        )  # fmt: skip
        slot = tl.cast(p, tl.int64) * D
        tl.store(gamma_slots + slot + cols, gamma, mask=in_row)
        if HAS_BETA:
            tl.store(beta_slots + slot + cols, beta, mask=in_row)
    elif REGIME == FLAT:
        lo = p * R
        hi = tl.minimum(lo + R, B * T)
        for b in tl.range(lo // T, (hi - 1) // T + 1):
            gamma, beta = _add_rows(
                x, g, g2, g3, r, mean, rstd, dx, b, tl.maximum(lo - b * T, 0), tl.minimum(hi - b * T, T),
                T, D, x_b, x_t, g_b, g_t, r_b, r_t, dx_b, dx_t, cols, in_row, scaled,
                BLOCK_D, BLOCK_R, RMS, STAGES, HAS_R, GRADIENTS,
            )  # fmt: skip
            slot = tl.cast(p + b, tl.int64) * D
            tl.store(gamma_slots + slot + cols, gamma, mask=in_row)
            if HAS_BETA:
                tl.store(beta_slots + slot + cols, beta, mask=in_row)
    else:
        gamma_total = tl.zeros((BLOCK_D,), tl.float32)
        beta_total = tl.zeros((BLOCK_D,), tl.float32)
        for b in tl.range(p * R, tl.minimum(p * R + R, B)):
            gamma, beta = _add_rows(
                x, g, g2, g3, r, mean, rstd, dx, b, 0, T, T, D, x_b, x_t, g_b, g_t, r_b, r_t, dx_b, dx_t,
                cols, in_row, scaled, BLOCK_D, BLOCK_R, RMS, STAGES, HAS_R, GRADIENTS,
            )  # fmt: skip
            _store_whole(gamma_norms + b, tl.sum(gamma * gamma), B, D, BLOCK_D)
            gamma_total += gamma
            if HAS_BETA:
                _store_whole(beta_norms + b, tl.sum(beta * beta), B, D, BLOCK_D)
                beta_total += beta
        slot = tl.cast(p, tl.int64) * D
        tl.store(gamma_slots + slot + cols, gamma_total, mask=in_row)
        if HAS_BETA:
            tl.store(beta_slots + slot + cols, beta_total, mask=in_row)


@triton.jit
def _store_whole(norms, value, B, D, BLOCK_D: tl.constexpr):
    """The first part is all there is, the others are zero."""
    part = tl.arange(0, (BLOCK_D + COLUMNS - 1) // COLUMNS)
    tl.store(norms + part.to(tl.int64) * B, tl.where(part == 0, value, 0.0), mask=part < tl.cdiv(D, COLUMNS))


@triton.jit(do_not_specialize=["B", "T", "R", "PIECES", "SLOTS"])
def add_slots(
    slots, total, norms, B, T, D, R, PIECES, SLOTS, total_which, norms_which,
    REGIME: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stage two for dgamma and dbeta: ``total`` [2, D], and ``norms`` [2, column blocks, B], parts to be added.
    Both lie ``total_which`` and ``norms_which`` numbers apart."""
    block, which = tl.program_id(0), tl.program_id(1)
    slots += tl.cast(which, tl.int64) * SLOTS * D
    total += which * total_which
    norms += tl.cast(which, tl.int64) * norms_which + tl.cast(block, tl.int64) * B
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = cols < D
    total_sum = tl.zeros((BLOCK_C,), tl.float32)
    examples = B
    if REGIME == WHOLE:
        examples = 1
    for b in tl.range(0, examples):
        if REGIME == CHUNK:
            first = b * PIECES
            stop = first + PIECES
        elif REGIME == FLAT:
            first = b * T // R + b
            stop = ((b + 1) * T - 1) // R + b + 1
        else:
            first = 0
            stop = SLOTS
        acc = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
        for at in tl.range(first, stop, BLOCK_S):
            rows = tl.cast(at, tl.int64) + tl.arange(0, BLOCK_S)
            mask = (rows < stop)[:, None] & in_row[None, :]
            acc += tl.load(slots + rows[:, None] * D + cols[None, :], mask=mask, other=0.0)
        part = tl.sum(acc, axis=0)
        total_sum += part
        if REGIME != WHOLE:
            tl.store(norms + b, tl.sum(part * part))
    tl.store(total + cols, total_sum.to(total.dtype.element_ty), mask=in_row)


def norm_backward(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, shift: bool,
    multiprocessors: int, positions_first: bool = False, residual: Tensor | None = None,
    g2: Tensor | None = None, g3: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x, residual, g and what is added to g [B, T, D]; mean (None: RMSNorm), rstd [B, T] -> dx + residual, dgamma, dbeta, and
    parts of their norms [k, B]."""
    B, T, D = x.shape
    dx = empty_as_laid(x, positions_first)
    x, rstd = _rows(x), rstd.contiguous()
    gradients = _alike([t for t in (g, g2, g3) if t is not None])
    count, g = len(gradients), gradients[0]
    r = g if residual is None else _rows(residual)
    mean = rstd if (rms := mean is None) else mean.contiguous()
    weight = None if weight is None else weight.contiguous()
    cut, tile = plan.cut_rows(B, T, D, multiprocessors), plan.row_tile(D, x.element_size())
    slots = torch.empty((1 + shift, cut.slots, D), dtype=torch.float32, device=x.device)
    norms = _apart((1 + shift, plan.row_parts(D), B), torch.float32, x.device)
    backward_rows[(cut.programs,)](
        x, *gradients, *[g] * (3 - count), x if weight is None else weight, r, mean, rstd,
        dx, slots[0], slots[-1], norms[0], norms[-1],
        B, T, D, cut.rows, cut.pieces, *x.stride()[:2], *g.stride()[:2], *r.stride()[:2], *dx.stride()[:2],
        REGIME=cut.regime, BLOCK_D=tile.block_d, BLOCK_R=tile.block_r, RMS=rms, HAS_W=weight is not None,
        HAS_R=residual is not None, HAS_BETA=shift, GRADIENTS=count, STAGES=tile.stages, num_warps=tile.warps,
        maxnreg=plan.row_registers(tile, cut.regime),
    )  # fmt: skip
    totals = _apart((1 + shift, D), x.dtype if weight is None else weight.dtype, x.device)
    add_slots[(plan.row_parts(D), 1 + shift)](
        slots, totals, norms, B, T, D, cut.rows, cut.pieces, cut.slots, totals.stride(0), norms.stride(0),
        REGIME=cut.regime, BLOCK_C=plan.COLUMNS, BLOCK_S=SLOTS_AT_ONCE, num_warps=4,
    )  # fmt: skip
    return dx, totals[0], totals[1:].flatten(), norms[0], norms[1:].flatten(0, 1)


def _apart(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Empty, and each entry of the first dimension at a multiple of 16 bytes: Inductor takes every result of an op to start at one."""
    step = -(-math.prod(shape[1:]) // 16) * 16
    return torch.empty_strided(
        shape, (step, *(math.prod(shape[d:]) for d in range(2, len(shape) + 1))), dtype=dtype, device=device
    )


def _rows(x: Tensor) -> Tensor:
    """Each row in one piece."""
    return x if x.stride(2) == 1 else x.contiguous()


def _alike(gradients: list[Tensor]) -> list[Tensor]:
    """Each row in one piece, and all with the same strides."""
    gradients = [_rows(g) for g in gradients]
    alike = len({g.stride() for g in gradients}) == 1
    return gradients if alike else [g.contiguous() for g in gradients]
