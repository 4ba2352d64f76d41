"""One small all-reduce per step, and the rule for which ranks share a step.

    sums over ranks       gnsfx.channel: the same bits on every rank, or an error within a time-out
    |g|^2                 a share on each rank, so that the sum has it once

Which ranks share a step: those over which the gradients are averaged. That is known of a model that is or contains
``DistributedDataParallel``, whose graphs ran inside one, or that holds parameters of ``fully_shard``. Any other model in an
initialised world is taken to be trained by this rank alone, unless the caller names a group.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gnsfx._torch import WeakIdKeyDictionary
from gnsfx._torch_distributed import dtensor_layout, fsdp_groups, is_dtensor, replicating
from gnsfx.channel import channel_of
from gnsfx.collector import NOT_COMPILED, UNREACHED, Totals, index
from gnsfx.errors import GnsError, GnsWarning
from gnsfx.leaves import collectors_of
from gnsfx.norms import squared_norms

TIMEOUT = 60.0  # seconds; assign to it before the first step
NOT_AVERAGED = (
    "its gradient is not averaged over the ranks: DistributedDataParallel or fully_shard was told to leave it out, or does "
    "not hold it"
)
_MANUAL = "Pass the ranks over which the gradients are averaged: NoiseScale(model, process_group=...)"


def all_reduce(
    vector: Tensor, group: Any, what: str, *, step: int | None = None, timeout: float | None = None
) -> Tensor:
    """The sum of ``vector`` over the ranks of ``group``, the same bits on each of them. Collective.

    On CPU this waits and checks at once. On CUDA it waits for nothing: what the header says is read at a later call, when
    it has arrived.

    Args:
        vector: 1-d, floating point, of the same length on all ranks. Steps are exact in its dtype up to 2^24 in float32.
        what: who calls, for messages; calls of one kind are counted together.
        step: a number that must be the same on all ranks; by default the count of these calls on this rank.
        timeout: seconds until a rank that does not come is an error, ``TIMEOUT`` by default; on CUDA the process group's
            watchdog acts on it, with the number of the first call.

    Raises:
        GnsError: a rank did not come in time, is at another step, or brings a vector of another length.
    """
    timeout = TIMEOUT if timeout is None else timeout
    return channel_of(group, timeout).sum(vector, what, step, timeout)


@contextmanager
def telling_others(group: Any, what: str, device: torch.device) -> Iterator[None]:
    """Around what a rank does before it calls :func:`all_reduce` with a float64 vector on ``device``: an error there is one on
    all ranks, at once. Without it the others would wait for the time-out, which ends all sums."""
    try:
        yield
    except Exception:
        if group is not None:
            like = torch.zeros((), dtype=torch.float64, device=device)
            channel_of(group, TIMEOUT).withdraw(what, like, TIMEOUT)
        raise


def broadcast_decision(values: Sequence[float], group: Any, *, timeout: float | None = None) -> list[float]:
    """The numbers of the first rank of ``group``, on all of its ranks. Collective; waits for them.

    Raises:
        GnsError: as :func:`all_reduce`.
    """
    timeout = TIMEOUT if timeout is None else timeout
    channel = channel_of(group, timeout)
    kept = channel.place(torch.tensor(list(values), dtype=torch.float64))
    if dist.get_rank(group) != 0:
        kept = torch.zeros_like(kept)
    found = channel.sum(kept, "a decision about the batch size", None, timeout).tolist()
    channel.check()
    return found


def grad_sq_shares(grads: Sequence[Tensor], group: Any) -> Tensor:
    """This rank's part of each |g|^2, [n], such that the sum over the ranks of ``group`` is |g|^2 exactly once.

        plain tensor, the same on all W ranks      |g|^2 / W
        DTensor on a mesh of M ranks, R replicas   |local shard|^2 * M / (R W)

    Without a group W = 1: the step is one of this rank alone.

    In float32 at least; no host synchronisation, no kernel per gradient.

    Raises:
        GnsError: a DTensor that is a sum still to be taken.
    """
    world = 1 if group is None else dist.get_world_size(group)
    locals_, factors = [], []
    for grad in grads:
        local, ranks, replicas = dtensor_layout(grad)
        if local is None:
            raise GnsError(
                f"noise.step() found a gradient of shape {list(grad.shape)} with the placement Partial: it is a sum over ranks that "
                "was not taken yet. Call noise.step() after the gradients are reduced."
            )
        locals_.append(local)
        factors.append(ranks / (replicas * world))
    found = squared_norms(locals_)
    return found * _constant(tuple(factors), found.dtype, found.device)


def group_of(model: nn.Module) -> Any:
    """The process group over which the gradients of ``model`` are averaged; None where each rank has a step of its own.

    Raises:
        GnsError: parts of the model are averaged over different ranks, or with another divisor than their number.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    if (known := _groups.get(model)) is not None and (group := known()) is not None:
        return group
    found = {id(w.process_group): w.process_group for w in _wrappers(model)}
    for mesh, divisor in fsdp_groups(model):
        if divisor is not None and divisor != mesh.size():
            raise GnsError(
                f"the gradients are divided by {divisor:g} and summed over {mesh.size()} ranks (set_gradient_divide_factor), so they are "
                "no mean over ranks. Scale the loss instead."
            )
        group = _group_of_mesh(mesh)
        found[id(group)] = group
    if len(found) > 1:
        sizes = sorted({dist.get_world_size(g) for g in found.values()})
        raise GnsError(
            f"parts of the model are averaged over different process groups, of {' and '.join(map(str, sizes))} ranks. Make one NoiseScale for "
            f"each part. {_MANUAL}."
        )
    group = next(iter(found.values()), None)
    if group is None or dist.get_world_size(group) == 1:
        if group is None and dist.get_world_size() > 1:
            _tell(model)
        return None  # not kept: it may be wrapped later
    _groups[model] = weakref.ref(group)
    return group


def _tell(model: nn.Module) -> None:
    """Once its graphs have run: until then a wrapper may still come."""
    if model not in _told and any(collectors_of(p) for p in model.parameters()):
        _told[model] = True
        warnings.warn(
            f"gns: torch.distributed runs on {dist.get_world_size()} ranks, but nothing says that the gradients of this model are averaged over "
            f"them, so each rank measures its own step. If they are, by hand: {_MANUAL}.",
            GnsWarning,
            stacklevel=4,
        )


def only_averaged(found: Totals, model: nn.Module) -> Totals:
    """The same, where parameters that the wrapper of ``model`` leaves out are refused: their gradients are of this rank alone."""
    wrapped = {id(p) for wrapper in _wrappers(model) for p in wrapper._module_parameters}
    averaged = [is_dtensor(p) or id(p) in wrapped for p in found.parameters]
    if all(averaged):
        return found
    refusals = [r if ok or r is not None else NOT_AVERAGED for r, ok in zip(found.refusals, averaged, strict=True)]
    values, variances = found.values, found.variances
    if values is not None:
        kept = [r is None for r, old in zip(refusals, found.refusals, strict=True) if old is None]
        columns = tuple(i for i, keep in enumerate(kept) if keep)
        if variances is not None:
            variances = variances.index_select(0, index(columns, values.device))
        values = values.index_select(1, index(columns, values.device)) if columns else None
    return replace(found, refusals=refusals, values=values, variances=variances)


def with_untouched(found: Totals) -> Totals:
    """The same, where a parameter that no code of this rank has used since its last step is unreached: its gradient is of the
    other ranks. It is watched from the first step in which no compiled graph has it, and not yet known in that one."""
    refusals = list(found.refusals)
    for i, (parameter, reason) in enumerate(zip(found.parameters, refusals, strict=True)):
        if reason != NOT_COMPILED or parameter.grad is None or is_dtensor(parameter):
            continue
        if parameter not in _touched:
            _touched[parameter] = touched = [True]
            parameter.register_hook(lambda _, touched=touched: touched.__setitem__(0, True))
        if not _touched[parameter][0]:
            refusals[i] = UNREACHED
        _touched[parameter][0] = False
    return replace(found, refusals=refusals)


def _wrappers(model: nn.Module) -> Iterator[DistributedDataParallel]:
    """Of the modules of ``model``, or that ran its graphs."""
    found: dict[int, Any] = {id(m): m for m in model.modules() if isinstance(m, DistributedDataParallel)}
    found.update((id(wrapper), wrapper) for wrapper in replicating(model))
    for parameter in model.parameters() if not found else ():
        for collector, _ in collectors_of(parameter):
            if collector.wrapper is not None and (wrapper := collector.wrapper()) is not None:
                found[id(wrapper)] = wrapper
    yield from found.values()


def _group_of_mesh(mesh: Any) -> Any:
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    raise GnsError(
        f"the parameters are sharded on a mesh of shape {tuple(mesh.shape)}, a part of the world. {_MANUAL}."
    )


_groups: Any = WeakIdKeyDictionary()  # model -> group; weakly, as in gnsfx.channel
_told: Any = WeakIdKeyDictionary()
_touched: Any = WeakIdKeyDictionary()  # parameter -> [whether a gradient came to it since the last step]
_constants: dict[Any, Tensor] = {}


def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device; kept, because copying it to a GPU would wait for the GPU."""
    key = values, dtype, device
    if key not in _constants:
        _constants.clear()
        _constants[key] = torch.tensor(values, dtype=dtype, device=device)
    return _constants[key]
