"""Estimates of s_b = ||P_b||_F^2, P_b = x_b^T g_b, from m of the B examples, each exactly or through r random columns.

    column k    q_bk = ||x_b^T (g_b r_bk)||^2,  r_bk independent signs         E q_bk = s_b
                Var q_bk = 2 (||A||_F^2 - sum_i A_ii^2),  A = P_b^T P_b        at most 2 s_b^2
    sketch      s_b ~ mean_k q_bk,                                             variance ~ var_k(q_bk) / r
    subsample   sum_b s_b ~ (B / m) sum over m examples without replacement    variance ~ B^2 (1 - m/B) var_b(s_b) / m

With both, the two stages of Cochran, *Sampling Techniques* (1977), section 10.4: the variance of the first stage from the
scatter of the estimates of the m examples, plus B / m times the sum of their own. All are unbiased: sums and variances.
Signs are drawn for each example anew, so errors of examples do not add up coherently as they would with one matrix for
all; the mean over r columns of B examples is as good as B r columns of one.

Random numbers are a pure function of ``seed`` (0-d int64, below 2^32) and ``salt``: no generator is read or advanced.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gnsfx.kernels.accumulate import accumulate_dtype
from gnsfx.kernels.convolution_norm import convolution_sq_norm
from gnsfx.kernels.ghost_norm import ghost_sq_norm
from gnsfx.kernels.mm_norm import product_sq_norm

_MASK = 0xFFFFFFFF
_STEP = 0x9E3779B1


def estimate_sq_norm(
    x: Tensor, g: Tensor, seed: Tensor, salt: int, examples: int, columns: int, gram: bool
) -> tuple[Tensor, Tensor]:
    """x [B, E, T, I], g [B, E, T, O] -> estimates [B] of the squared norms, and of the variance [B] of each.

    Both add up to the estimate of the sum and its variance. The estimates of examples that are not among the ``examples``
    drawn are zero, and the variance is then spread evenly. ``columns`` 0: the examples drawn are exact, by their Grams
    where ``gram`` says so.
    """
    B = x.shape[0]
    at = _sample(seed, salt, B, examples)
    if columns and g.shape[3] > x.shape[3]:  # mix the narrower side: fewer signs
        x, g = g, x
    pairs = _take(at, x, g)
    if columns:
        shape = (min(examples, B), g.shape[1], columns, g.shape[3])
        signs = _signs(seed, salt, shape, g.dtype, _unit(g.shape[3])).chunk(len(pairs))
        draws = torch.cat([_columns(x_, g_, own) for (x_, g_), own in zip(pairs, signs, strict=True)])
        return _estimate(draws / _unit(g.shape[3]) ** 2, at, B)
    exact = ghost_sq_norm if gram else product_sq_norm
    return _estimate(torch.cat([exact(x_, g_) for x_, g_ in pairs])[:, None], at, B)


def estimate_convolution_sq_norm(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    seed: Tensor,
    salt: int,
    examples: int,
    columns: int,
) -> tuple[Tensor, Tensor]:
    """The same for ``convolution_sq_norm``: grad_output [B, R, O, ..], input [B, R, C, ..] -> [B], [B].

    A column mixes the output channels of each group into one, so its weight gradient is that of a thin convolution.
    """
    B = input.shape[0]
    at = _sample(seed, salt, B, examples)
    pairs = _take(at, input, grad_output)
    settings = (stride, padding, dilation, transposed, output_padding, groups)
    if not columns:
        exact = [convolution_sq_norm(g, x, weight, *settings)[1] for x, g in pairs]
        return _estimate(torch.cat(exact)[:, None], at, B)
    own = grad_output.shape[2] // groups
    shape = (min(examples, B), 1, groups, columns, own)
    signs = _signs(seed, salt, shape, grad_output.dtype, _unit(own)).chunk(len(pairs))
    thin = weight[:, :1] if transposed else weight[:groups]
    found = []
    for (x, g), drawn in zip(pairs, signs, strict=True):
        mixed = torch.matmul(drawn, g.unflatten(2, (groups, own)).flatten(4)).unflatten(4, g.shape[3:])
        columns_of = [mixed[:, :, :, k].contiguous() for k in range(columns)]  # each [b, R, groups, ..]
        found.append(torch.stack([convolution_sq_norm(h, x, thin, *settings)[1] for h in columns_of], 1))
    return _estimate(torch.cat(found) / _unit(own) ** 2, at, B)


def _take(at: Tensor | None, x: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The examples drawn. On a CPU as views, one by one: copies of a few examples take longer than estimating from them."""
    if at is None:
        return [(x, g)]
    if x.device.type != "cpu":
        return [(x.index_select(0, at), g.index_select(0, at))]
    return [(x[b : b + 1], g[b : b + 1]) for b in at.tolist()]


def _columns(x: Tensor, g: Tensor, signs: Tensor) -> Tensor:
    """q [b, columns] for signs [b, E, columns, O], in the unit of the signs."""
    # The few columns go first: as the last dimension of a product they cost eight times as much on a CPU.
    mixed = torch.bmm(signs.flatten(0, 1), g.flatten(0, 1).mT)  # [b E, columns, T]
    rows = torch.bmm(mixed, x.flatten(0, 1)).to(accumulate_dtype(x.dtype))  # [b E, columns, I]
    return rows.square().sum(2).unflatten(0, g.shape[:2]).sum(1)


def _estimate(draws: Tensor, at: Tensor | None, B: int) -> tuple[Tensor, Tensor]:
    """draws [m, r] of the examples ``at`` (None: all B) -> estimates [B] and their variances [B]."""
    m, r = draws.shape
    found = draws.mean(1)
    own = draws.var(1) / r if r > 1 else torch.zeros_like(found)
    if at is None:
        return found, own
    share = B / m
    variance = share * ((B - m) * found.var() + own.sum())
    return found.new_zeros(B).index_copy_(0, at, found * share), (variance / B).repeat(B)


def _unit(n: int) -> float:
    """A power of two near 1/sqrt(n): sums of n entries with such signs are of the size of an entry, also in half precision."""
    return 2.0 ** -math.ceil(math.log2(n) / 2)


def _signs(seed: Tensor, salt: int, shape: Sequence[int], dtype: torch.dtype, size: float) -> Tensor:
    """Independent entries of +size and -size, 32 of each random word."""
    count = math.prod(shape)
    words = _words(seed, salt, -(-count // 32))
    octets = words.view(torch.uint8).view(-1, 8)[:, :4]  # the upper half of a word below 2^32 is empty
    places = torch.arange(8, dtype=torch.uint8, device=seed.device)
    bits = ((octets.unsqueeze(2) >> places) & 1).flatten()[:count].view(list(shape))
    return bits.to(dtype).mul_(2 * size).sub_(size)


def _sample(seed: Tensor, salt: int, B: int, examples: int) -> Tensor | None:
    """``examples`` of B numbers without replacement, all subsets equally likely; None: all of them."""
    return None if examples >= B else _words(seed, ~salt, B).argsort()[:examples].sort().values


def _words(seed: Tensor, salt: int, count: int) -> Tensor:
    """[count] numbers below 2^32 that depend on seed, salt and place as good as at random.

    The mixer is lowbias32 of Wellons' hash prospector; no product exceeds 2^63, so nothing relies on overflow.
    """
    # A large step: of neighbouring seeds, places that are counted by one would be permutations of each other.
    z = torch.arange(0, count * _STEP, _STEP, device=seed.device).bitwise_xor_(seed ^ _salt(salt))
    z &= _MASK
    z ^= z >> 16
    z *= 0x21F0AAAD
    z &= _MASK
    z ^= z >> 15
    z *= 0x735A2D97
    z &= _MASK
    return z.bitwise_xor_(z >> 15)


def _salt(salt: int) -> int:
    """Neighbouring salts far apart: the same mixer, on the host."""
    z = salt & _MASK
    z = ((z ^ z >> 16) * 0x21F0AAAD) & _MASK
    z = ((z ^ z >> 15) * 0x735A2D97) & _MASK
    return z ^ z >> 15
