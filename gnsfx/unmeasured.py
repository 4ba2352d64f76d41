"""Why the gradient of a parameter is not measured, or not all of it, as far as the host knows."""

from __future__ import annotations

import weakref

from torch import nn

from gnsfx._torch_distributed import fsdp_parameter, is_fsdp1
from gnsfx.tracked import MEASURED, UNSELECTED, tracked_of

FOREIGN = (
    "its gradient has a part that no compiled graph measured: it is also used in eager code, in a graph compiled with another backend, "
    "or under gnsfx.measuring(False); compile the module that contains all uses"
)
NOT_SELECTED = "not selected in this step, by gnsfx.measuring or gns.params"
MEASURED_IN_PART = (
    "some backward passes since its gradient was last zeroed measured it and others were told not to; "
    "put all micro-batches of a step under the same gnsfx.measuring"
)
FSDP1 = (
    "FullyShardedDataParallel flattens parameters into one, so that the graphs do not see it; use "
    "torch.distributed.fsdp.fully_shard"
)

# ids of living parameters -> why no compiled graph measures it: it cannot, it was told not to
_refused: dict[int, tuple[weakref.ref[nn.Parameter], str]] = {}
_left_out: dict[int, tuple[weakref.ref[nn.Parameter], str]] = {}


def _remember(registry: dict[int, tuple[weakref.ref[nn.Parameter], str]], parameter: nn.Parameter, reason: str) -> None:
    """The latest reason, of the parameter that the model knows: under FSDP a graph gets a stand-in."""
    stands_in = fsdp_parameter(parameter)
    owner = parameter if stands_in is None else stands_in.sharded
    key, forget = id(owner), registry.pop  # the module's globals are gone when the interpreter ends
    registry[key] = weakref.ref(owner, lambda _: forget(key, None)), reason


def leave_out(parameter: nn.Parameter, reason: str) -> None:
    """Remember that a graph saw a parameter and was told not to measure it."""
    _remember(_left_out, parameter, reason)


def left_out(parameter: nn.Parameter) -> str | None:
    """Why no graph was to measure a parameter; for one that some graphs measure, why not since it was last zeroed."""
    tracked = tracked_of(parameter)
    if tracked is None:
        return _left_out[id(parameter)][1] if id(parameter) in _left_out else None
    return NOT_SELECTED if tracked.parts == UNSELECTED else None


def refuse_whole(parameter: nn.Parameter, reason: str) -> None:
    """Remember why a graph that saw a parameter cannot measure it."""
    _remember(_refused, parameter, reason)


def refused_whole(parameter: nn.Parameter) -> str | None:
    if id(parameter) in _refused:
        return _refused[id(parameter)][1]
    return FSDP1 if is_fsdp1(parameter) else None


def measured_in_part(parameter: nn.Parameter) -> str | None:
    """Why the norms since a gradient was last zeroed are not those of all of it, though the graphs know every part."""
    tracked = tracked_of(parameter)
    return MEASURED_IN_PART if tracked is not None and tracked.parts == MEASURED | UNSELECTED else None


def is_foreign(parameter: nn.Parameter) -> bool:
    """Whether ``.grad`` has a part that no compiled graph measured."""
    tracked = tracked_of(parameter)
    return tracked is not None and tracked.foreign
