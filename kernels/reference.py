"""What the ops compute, in the most obvious PyTorch: dense per-example gradients, one einsum each. Slow and large.

The specification, and the oracle of the tests: call it with fp64 inputs for the truth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def mm_sq_norm_ref(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """x [B,E,T,I], g [B,E,T,O] -> grad [E,I,O], sq_norms [B]."""
    per_example = torch.einsum("beti,beto->beio", x, g)
    return per_example.sum(0), per_example.square().sum((1, 2, 3))


def ghost_sq_norm_ref(x: Tensor, g: Tensor) -> Tensor:
    """x [B,E,T,I], g [B,E,T,O] -> sq_norms [B]; the same number as that of ``mm_sq_norm_ref``."""
    return mm_sq_norm_ref(x, g)[1]


def embedding_sq_norm_ref(ids: Tensor, g: Tensor) -> Tensor:
    """ids [B,T], g [B,T,D] -> sq_norms [B]; <sum of rows, sum of rows> is a Gram masked to pairs of equal ids."""
    same = (ids.unsqueeze(1) == ids.unsqueeze(2)).to(g.dtype)
    return torch.einsum("bsd,btd,bst->b", g, g, same)


def convolution_sq_norm_ref(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """grad_output [B,R,O,..], input [B,R,C,..] -> grad_weight, sq_norms [B]; autograd of one example at a time."""
    settings = (stride, padding, dilation, transposed, output_padding, groups)
    per_example = []
    with torch.enable_grad():
        for g, x in zip(grad_output, input, strict=True):
            leaf = torch.zeros_like(weight, requires_grad=True)
            output = torch.ops.aten.convolution(x, leaf, None, *settings)
            per_example += torch.autograd.grad(output, leaf, g)
    stacked = torch.stack(per_example)
    return stacked.sum(0), stacked.square().flatten(1).sum(1)


def tied_sq_norm_ref(ids: Tensor, g: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """ids [B,S], g [B,S,D], x [B,T,D], h [B,T,V] -> sq_norms [B] of onehot^T g + h^T x, added before squaring."""
    return _tied(ids, g, x, h).square().sum((1, 2))


def tied_mm_ref(ids: Tensor, g: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """The same, added up over examples: [V,D]."""
    return _tied(ids, g, x, h).sum(0)


def _tied(ids: Tensor, g: Tensor, x: Tensor, h: Tensor) -> Tensor:
    onehot = torch.nn.functional.one_hot(ids.long(), h.shape[2]).to(g.dtype)
    return torch.einsum("bsv,bsd->bvd", onehot, g) + torch.einsum("btv,btd->bvd", h, x)


def collect_ref(sq_norms: Sequence[Tensor]) -> Tensor:
    """n tensors [B] -> [n, B]."""
    return torch.stack(list(sq_norms))
