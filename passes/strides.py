"""What a view of a value may be, from sizes and strides alone: no node is written here.

(..., a, b, ...) -> (..., a*b, ...)     the same memory, where each stride continues the one behind it; else a copy
permute(permute(source))                one permutation of the source
expand                                  entries that share memory
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from gnsfx._torch import known
from gnsfx.passes.rules.table import overloads
from gnsfx.passes.state import Size

aten = torch.ops.aten


RESHAPES = set(overloads("aten.view.default", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims"))
"""They keep the entries in row-major order and copy nothing."""


def overlaps(value: torch.Tensor) -> bool:
    return any(
        known(stride == 0) and not known(size == 1) for size, stride in zip(value.shape, value.stride(), strict=True)
    )


def view_value(source: torch.Tensor, shape: Sequence[Size]) -> torch.Tensor | None:
    """A fake tensor viewed as ``shape``, None where its strides do not allow it. Called under the fake mode."""
    fixed = source.numel() and all(isinstance(s, int) for s in (*source.shape, *source.stride(), *shape))
    strides = view_strides(source.shape, source.stride(), [int(s) for s in shape]) if fixed else None
    if fixed and strides is None:
        return None
    try:
        value = aten.view.default(source, list(shape))
    except (RuntimeError, ValueError):
        return None
    if strides is None:
        return value
    # PyTorch 2.13 views fake tensors of shape (2, 1, 2, 2) and strides (2, 8, 4, 1) as (4, 2), and real ones not
    steps = zip(value.shape, value.stride(), strides, strict=True)
    return value if all(size == 1 or a == b for size, a, b in steps) else None


def view_strides(shape: Sequence[int], strides: Sequence[int], to: Sequence[int]) -> tuple[int, ...] | None:
    """The strides of a view of a value that is not empty, None where it would have to be copied."""
    left = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    found: list[int] = []
    size, stride = left.pop() if left else (1, 1)
    for wanted in reversed(to):
        while size % wanted:  # take the dimension before, where it continues this one
            if not left or left[-1][1] != size * stride:
                return None
            size *= left.pop()[0]
        found.append(stride)
        size, stride = size // wanted, stride * wanted
        if size == 1 and left:
            size, stride = left.pop()
    return tuple(reversed(found))


def permuted(node: Node) -> tuple[Node, list[int]]:
    """The source and the dimensions of a permutation."""
    source, dims = node.args[:2]
    assert isinstance(source, Node) and isinstance(dims, (list, tuple))
    return source, [d % len(dims) for d in dims]  # type: ignore[operator]
