"""Private names of PyTorch's data parallelism, and why; those of the compiler are in :mod:`gnsfx._torch`.

``tests/gnsfx/test_torch_internals.py`` fails by name when a new version moves one of them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def after_backward(callback: Callable[[], None]) -> None:
    """Call back once at the end of the running ``backward()``, behind what DDP and FSDP asked for before."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # pyright: ignore[reportAttributeAccessIssue]


def active_wrapper() -> Any:
    """The ``DistributedDataParallel`` whose forward is running; None outside of one."""
    module = sys.modules.get("torch.nn.parallel.distributed")
    return None if module is None else module.DistributedDataParallel._get_active_ddp_module()


def is_dtensor(value: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none; importing it takes long
    return module is not None and isinstance(value, module.DTensor)


def dtensor_layout(tensor: Tensor) -> tuple[Tensor | None, int, int]:
    """The part on this rank, the number of ranks that hold parts, and how many of them hold the same; no part for a sum
    still to be taken."""
    if not is_dtensor(tensor):
        return tensor, 1, 1
    mesh, replicas = tensor.device_mesh, 1  # pyright: ignore[reportAttributeAccessIssue]
    for dim, placement in enumerate(tensor.placements):  # pyright: ignore[reportAttributeAccessIssue]
        if placement.is_partial():
            return None, mesh.size(), 1
        replicas *= mesh.size(dim) if placement.is_replicate() else 1
    return tensor._local_tensor, mesh.size(), replicas  # pyright: ignore[reportAttributeAccessIssue]


def is_fsdp1(parameter: Tensor) -> bool:
    """Marks that FullyShardedDataParallel leaves on a flat parameter, and on one that it flattened."""
    return getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False)


class FsdpParameter:
    """One parameter of ``fully_shard``: modules hold ``sharded`` at rest, graphs get ``unsharded``.

    Relies on FSDPParamGroup and FSDPParam: where they keep the two, and the gradient between backward passes.
    """

    __slots__ = ("_group", "_param")

    def __init__(self, group: Any, param: Any) -> None:
        self._group, self._param = weakref.ref(group), weakref.ref(param)

    @property
    def sharded(self) -> Any:
        param = self._param()
        return None if param is None else param.sharded_param

    def gradients(self) -> list[Tensor]:
        """All that the gradient since the last zero is made of: not reduced yet, reduced within a part of the mesh, reduced.
        Of the last one both the DTensor, on which users write, and the shard in it, on which FSDP does."""
        group, param = self._group(), self._param()
        if group is None or param is None:
            return []
        unsharded, reduced = getattr(param, "_unsharded_param", None), param.sharded_param.grad
        parts = [
            None if unsharded is None else unsharded.grad,
            param.unsharded_accumulated_grad,
            getattr(group, "_partial_reduce_output", None),
            reduced,
            None if reduced is None else reduced._local_tensor,
        ]
        return [part for part in parts if part is not None]


def fsdp_parameter(parameter: Tensor) -> FsdpParameter | None:
    """What a graph input stands in for under ``fully_shard``; None for any other."""
    state_module = sys.modules.get("torch.distributed._composable_state")
    for reference in [] if state_module is None else list(state_module._module_state_mapping.values()):
        for group in _fsdp_groups(reference()):
            for param in group.fsdp_params:
                if getattr(param, "_unsharded_param", None) is parameter:
                    return FsdpParameter(group, param)
    return None


def fsdp_groups(model: torch.nn.Module) -> Iterator[tuple[Any, float | None]]:
    """Of each part of ``model`` under ``fully_shard`` the mesh, and the divisor of its gradients where it was set."""
    state_module = sys.modules.get("torch.distributed._composable_state")
    if state_module is None:
        return
    for module in model.modules():
        for group in _fsdp_groups(state_module._get_module_state(module)):
            yield group.mesh_info.mesh, group.gradient_divide_factor


def replicating(model: torch.nn.Module) -> list[Any]:
    """The ``DistributedDataParallel`` that ``torch.distributed._composable.replicate`` keeps beside modules of ``model``."""
    state_module = sys.modules.get("torch.distributed._composable_state")
    if state_module is None:
        return []
    states = (state_module._get_module_state(module) for module in model.modules())
    return [wrapper for state in states if (wrapper := getattr(state, "_ddp", None)) is not None]


def _fsdp_groups(state: Any) -> list[Any]:
    found = getattr(state, "_fsdp_param_groups", None)  # one, before torch 2.12
    return [g for g in [getattr(state, "_fsdp_param_group", None)] if g] if found is None else found
