"""Which dimension of a tensor indexes examples: what the user marked, and what a compiled graph knows of its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from gnsfx._torch import WeakIdKeyDictionary
from gnsfx.errors import GnsError
from gnsfx.passes.state import State

UNMARKED: Final = object()
_marks: Any = WeakIdKeyDictionary()
_produced: Any = WeakIdKeyDictionary()


@dataclass(frozen=True, slots=True)
class Packed:
    """The mark of a packed input: document ids of every position, or the positions at which documents begin and end."""

    ids: Tensor
    boundaries: bool


def mark_batch(
    tensor: Tensor, dim: int | None = 0, *, ids: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Say which dimension of an input indexes examples, where the default (dimension 0) is wrong.

    Mark the tensor before the first call of the compiled model: the mark is read while compiling.

    Several documents packed into one row are examples of their own with ``ids`` or ``cu_seqlens``. That tensor must be an
    input of the compiled model too, and inputs of the same leading shape count as packed like it. Documents must not see
    each other: attention needs a mask that keeps them apart, which is checked in every step; where it does not, every
    parameter is refused. Norms per example are indexed by document id.

    Args:
        tensor: an input of the compiled model.
        dim: the dimension; None where the tensor is shared by all examples (a mask, a table of positions).
        ids: integers of shape (rows, positions) or (positions,), for each position its document. Ids differ between all
            documents of the batch and are less than the number of positions; -1 is padding.
        cu_seqlens: integers of shape (documents + 1,), where documents begin and end along a row: 0, ..., positions.

    Returns:
        The same tensor.

    Raises:
        GnsError: not a tensor, a dimension that it does not have, or ids that do not fit it.
    """
    if not isinstance(tensor, Tensor):
        raise GnsError(f"mark_batch takes a tensor, not {type(tensor).__name__}.")
    documents = ids if ids is not None else cu_seqlens
    if documents is not None:
        _marks[tensor] = Packed(_fitting(tensor, documents, ids is None), ids is None)
        return tensor
    if dim is not None:
        if not -tensor.dim() <= dim < tensor.dim():
            raise GnsError(
                f"mark_batch(dim={dim}): the tensor has {tensor.dim()} dimensions, shape {list(tensor.shape)}."
            )
        dim %= tensor.dim()
    _marks[tensor] = dim
    return tensor


def _fitting(tensor: Tensor, documents: Tensor, boundaries: bool) -> Tensor:
    shape, integers = list(tensor.shape), not documents.is_floating_point() and documents.dtype is not torch.bool
    if boundaries:
        fits, wanted = documents.dim() == 1 and documents.numel() > 1, "cu_seqlens of shape [documents + 1]"
    else:
        fits, wanted = (
            list(documents.shape) == shape[: documents.dim()] and documents.dim() in (1, 2),
            f"ids of shape {shape[:2]}",
        )
    if not fits or not integers:
        raise GnsError(
            f"mark_batch: expected integer {wanted} for a tensor of shape {shape}, got {documents.dtype} {list(documents.shape)}."
        )
    return documents


def marked(tensor: Tensor) -> Any:
    """The marked dimension, None for shared, ``Packed`` for a packed input, ``UNMARKED`` without a mark."""
    return _marks.get(tensor, UNMARKED)


def record(tensor: Tensor, graph: Any, output: int, examples: int | None) -> None:
    """Remember that ``tensor`` is result ``output`` of ``graph``, whose ``output_state`` knows its state, for so many examples."""
    _produced[tensor] = (graph, output, examples)


def source(tensor: Tensor) -> tuple[Any, int, int | None] | None:
    """The graph that made ``tensor``, the result that it is, and the number of examples; None for any other tensor."""
    return _produced.get(tensor)


def produced(tensor: Tensor) -> State | None:
    """The state recorded by the compiled graph that made ``tensor``; None for any other tensor."""
    found = _produced.get(tensor)
    return None if found is None else found[0].output_state(found[1])
