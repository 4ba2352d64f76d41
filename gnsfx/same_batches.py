"""All graphs of one backward pass must have seen the same number of examples.

    sizes of the graphs so far    {8}       fine
                                  {8, 4}    in one of them dimension 0 is not the batch: all of them are refused

Collectors tell as their norms arrive, so the first graphs are refused when a later one is found to differ.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gnsfx._torch import never_trace

if TYPE_CHECKING:
    from gnsfx.leaves import Collector

never_trace(__name__)
DIFFERENT_BATCHES = (
    "the compiled graphs of one backward saw different numbers of examples ({found}), so dimension 0 is not the batch in one of "
    "them; mark its inputs with gnsfx.mark_batch, or compile the code between the graphs too"
)
_batches: dict[str, Any] = {"backward": -1, "sizes": set(), "collectors": set()}


def compare_batches(collector: Collector, sizes: Sequence[int]) -> None:
    """Refuse every graph of the running backward once two of them saw different numbers of examples."""
    if _batches["backward"] != collector.begun:
        _batches.update(backward=collector.begun, sizes=set(), collectors=weakref.WeakSet())
    _batches["sizes"].update(sizes)
    _batches["collectors"].add(collector)
    if len(_batches["sizes"]) < 2:
        return
    found = " and ".join(map(str, sorted(_batches["sizes"])[:2]))
    for other in _batches["collectors"]:
        other.refused.update(dict.fromkeys(range(len(other.parameters)), DIFFERENT_BATCHES.format(found=found)))
