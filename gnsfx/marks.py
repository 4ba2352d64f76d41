"""Which dimension of a tensor indexes examples: what the user marked, and what a compiled graph knows of its results."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from gnsfx._torch import WeakIdKeyDictionary
from gnsfx.errors import GnsError
from gnsfx.passes.state import State

UNMARKED: Final = object()
_marks: Any = WeakIdKeyDictionary()
_produced: Any = WeakIdKeyDictionary()


def mark_batch(tensor: Tensor, dim: int | None = 0) -> Tensor:
    """Say which dimension of an input indexes examples, where the default (dimension 0) is wrong.

    Mark the tensor before the first call of the compiled model: the mark is read while compiling.

    Args:
        tensor: an input of the compiled model.
        dim: the dimension; None where the tensor is shared by all examples (a mask, a table of positions).

    Returns:
        The same tensor.

    Raises:
        GnsError: not a tensor, or a dimension that it does not have.
    """
    if not isinstance(tensor, Tensor):
        raise GnsError(f"mark_batch takes a tensor, not {type(tensor).__name__}.")
    if dim is not None:
        if not -tensor.dim() <= dim < tensor.dim():
            raise GnsError(
                f"mark_batch(dim={dim}): the tensor has {tensor.dim()} dimensions, shape {list(tensor.shape)}."
            )
        dim %= tensor.dim()
    _marks[tensor] = dim
    return tensor


def marked(tensor: Tensor) -> Any:
    """The marked dimension, None for shared, ``UNMARKED`` without a mark."""
    return _marks.get(tensor, UNMARKED)


def record(tensor: Tensor, graph: Any, output: int) -> None:
    """Remember that ``tensor`` is result ``output`` of ``graph``, whose ``output_state`` knows its state."""
    _produced[tensor] = (graph, output)


def produced(tensor: Tensor) -> State | None:
    """The state recorded by the compiled graph that made ``tensor``; None for any other tensor."""
    found = _produced.get(tensor)
    return None if found is None else found[0].output_state(found[1])
