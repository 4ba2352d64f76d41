"""Every private name of PyTorch that gnsfx relies on, and why. Nothing else may reach into ``torch._*``.

``tests/gnsfx/test_torch_internals.py`` fails by name when a new version moves one of them.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo import (
    eval_frame,  # hands each call of a compiled function its callback, in _callback_from_stance
    pgo,  # the sizes Dynamo has seen, from which it makes later graphs dynamic
)
from torch._dynamo.backends.common import aot_autograd  # the "eager" inner compiler goes through AOTAutograd alone
from torch._dynamo.convert_frame import (
    CatchErrorsWrapper,  # the callback; graphs are looked up by the backend inside it
    register_bytecode_hook,  # tells which code objects were compiled
)
from torch._dynamo.decorators import forbid_in_graph  # the switch does nothing in the code that it would switch
from torch._dynamo.eval_frame import (
    OptimizedModule,
    _debug_get_cache_entry_list,
    get_compiler_fn,  # wraps a backend as torch.compile does
    innermost_backend,
)
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.trace_rules import (
    add as never_trace,  # autograd hooks run in compiled frames too: loss.backward() in one
)
from torch._functorch._aot_autograd.descriptors import (  # what each joint-graph input and output means
    GradAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch._aot_autograd.utils import (
    make_boxed_func,
)  # the calling convention AOTAutograd asks of a compiler
from torch._functorch.partitioners import default_partition  # splits the rewritten joint graph for "eager"
from torch._guards import detect_fake_mode  # new metadata must live in the fake mode of the graph
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options  # the meaning of torch.compile(mode=...)
from torch._inductor.compile_fx import compile_fx  # plain Inductor
from torch._inductor.custom_graph_pass import CustomGraphPass  # a pass with a uuid keeps the compile caches on
from torch._inductor.decomposition import select_decomp_table  # rules are written for Inductor's decomposed graphs
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod  # how symbolic sizes divide
from torch.utils.weak import WeakIdKeyDictionary  # tensors compare elementwise, so weak maps must go by identity

__all__ = [
    "CustomGraphPass",
    "FloorDiv",
    "FsdpParameter",
    "GradAOTOutput",
    "Mod",
    "OptimizedModule",
    "PlainAOTInput",
    "PlainAOTOutput",
    "PythonMod",
    "TangentAOTInput",
    "WeakIdKeyDictionary",
    "active_wrapper",
    "after_backward",
    "allows_rnn",
    "aot_autograd",
    "compile_fx",
    "current_backward",
    "default_partition",
    "detect_fake_mode",
    "divisible",
    "dtensor_layout",
    "exact_quotient",
    "forbid_in_graph",
    "force_backend",
    "fsdp_groups",
    "fsdp_parameter",
    "graph_key",
    "graphs_apart",
    "inductor_config",
    "is_dtensor",
    "is_fake",
    "is_fsdp1",
    "known",
    "list_mode_options",
    "make_boxed_func",
    "never_trace",
    "options_of",
    "private_graphs",
    "replicating",
    "scale_of",
    "select_decomp_table",
    "simplified",
    "size_hint",
    "sources_of",
    "tree_flatten",
    "tree_map",
    "tree_unflatten",
]


def known(condition: Any) -> bool:
    """Whether a condition on sizes holds whatever the symbolic sizes are. Adds no guard."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def exact_quotient(value: Any, divisor: Any) -> Any:
    """``value / divisor`` where it is known to divide."""
    return simplified(value // divisor)


def divisible(value: Any, divisor: Any) -> bool:
    """Whether a symbolic size is known to be a multiple of another, by algebra where guards do not tell."""
    if not isinstance(value, torch.SymInt):
        return False
    by = divisor.node.expr if isinstance(divisor, torch.SymInt) else divisor
    return _denominator(value.node.expr / by) == 1


def scale_of(scaler: torch.amp.GradScaler) -> Any:
    """Its factor on the loss, as a tensor that stays on the device: ``get_scale`` waits for it."""
    scale = scaler._get_scale_async() if scaler.is_enabled() else None
    return scaler.get_scale() if scale is None else scale


def simplified(size: Any) -> Any:
    """A size without the floor divisions that leave no rest: PyTorch keeps ``(s*s) // s``, and cannot tell that it is s."""
    if not isinstance(size, torch.SymInt) or not size.node.expr.has(FloorDiv):
        return size
    expression = size.node.expr.replace(FloorDiv, _divide)
    if expression.is_Integer:
        return int(expression)
    hint = size_hint(size) if size.node.has_hint() else None
    return size.node.shape_env.create_symintnode(expression, hint=hint)


def _divide(value: Any, divisor: Any) -> Any:
    for rest in (0, divisor - 1):  # exact, or rounded up: arange(0, n * step, step) has n entries
        if _denominator((value - rest) / divisor) == 1:
            return sympy.cancel((value - rest) / divisor)
    return FloorDiv(value, divisor)


def _denominator(quotient: Any) -> Any:
    return sympy.denom(sympy.together(sympy.cancel(quotient)))  # without together() that of s/2 - 1/2 is 1


def size_hint(size: Any) -> int:
    """A concrete value of a size for the cost model. Adds no guard; 4096 where the size depends on data."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size.node.hint if size.node.has_hint() else None
    return 4096 if hint is None else int(hint)


def allows_rnn() -> bool:
    """Whether Dynamo traces nn.RNN, nn.GRU and nn.LSTM."""
    return dynamo_config.allow_rnn


def current_backward() -> int:
    """The id of the running ``backward()`` call, -1 outside. Two graphs in one call see the same id."""
    return torch._C._current_graph_task_id()


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

    @property
    def tensor_parallel(self) -> bool:
        param = self._param()
        return param is not None and param.is_dtensor

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


def is_fake(value: Any) -> bool:
    """Whether a tensor has a shape only, as while compiling."""
    return isinstance(value, FakeTensor)


def sources_of(gm: torch.fx.GraphModule) -> list[Any]:
    """Where Dynamo found each graph input (``L['self']._modules[...]``), None for inputs of its own making."""
    return [getattr(node, "_dynamo_source", None) for node in gm.graph.nodes if node.op == "placeholder"]


@contextmanager
def force_backend(backend: Callable[..., Any]) -> Iterator[None]:
    """Let every ``torch.compile`` called inside use ``backend``; its graphs are cached apart from the others."""
    with torch.compiler.set_stance("default", force_backend=backend):
        yield


_callback_from_stance: Callable[[Any], Any] = eval_frame._callback_from_stance
_apart: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()  # callback -> {key: callback}
_keys: list[Any] = []  # of the graphs that are being compiled


@dataclass(frozen=True, eq=True)
class _Apart:
    """A backend under a key. Dynamo compares backends to find a graph: under another key it finds none of the others."""

    backend: Callable[..., Any]
    key: Any
    compiler_name: str

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        _keys.append(self.key)
        try:
            return self.backend(gm, inputs)
        finally:
            _keys.pop()


def graph_key() -> Any:
    """The key under which the running backend compiles, None outside of ``graphs_apart``."""
    return _keys[-1] if _keys else None


@contextmanager
def graphs_apart(key_of: Callable[[Any], Any]) -> Iterator[None]:
    """Let functions that torch.compile has compiled use graphs of their own inside, one for each key.

    Unlike under ``force_backend`` each keeps its backend with all options. ``key_of`` takes the options given to
    torch.compile, {} for none and None where they cannot be told, and returns None to use the graphs of always.
    """
    before = eval_frame._callback_from_stance
    eval_frame._callback_from_stance = lambda callback: _callback_from_stance(_set_apart(callback, key_of))
    try:
        yield
    finally:
        eval_frame._callback_from_stance = before


def _set_apart(callback: Any, key_of: Callable[[Any], Any]) -> Any:
    if not isinstance(callback, CatchErrorsWrapper):
        return callback  # nothing is compiled here
    backend: Any = innermost_backend(callback)
    ours = getattr(backend, "compiler_fn", backend)
    if isinstance(backend, _Apart) or str(getattr(ours, "__module__", "")).partition(".")[0] == "torch":
        return callback
    key = key_of(backend.kwargs.get("options", {}) if isinstance(getattr(backend, "kwargs", None), dict) else None)
    if key is None:
        return callback
    known = _apart.setdefault(callback, {})
    if key not in known:
        apart: Any = get_compiler_fn(_Apart(backend, key, getattr(backend, "compiler_name", "gns")))
        frames: Any = callback._torchdynamo_orig_backend
        known[key] = CatchErrorsWrapper(frames._clone_with_backend(apart), callback.hooks)
    return known[key]


@contextmanager
def private_graphs(backend: Callable[..., Any]) -> Iterator[None]:
    """Let every ``torch.compile`` called inside use ``backend``, and forget afterwards that it did.

    Dynamo keeps its graphs with the code objects, where they count towards ``recompile_limit``, behind which a model
    silently runs in eager mode, and it makes a size dynamic that it has seen with two values. Neither may follow from
    looking at a model.
    """
    codes: list[Any] = []
    seen = copy.deepcopy(dict(pgo.get_code_state()))
    hook = register_bytecode_hook(lambda code, new_code: codes.append(code))
    try:
        with force_backend(backend), dynamo_config.patch(recompile_limit=64, accumulated_recompile_limit=1 << 16):
            yield
    finally:
        hook.remove()
        for code in codes:
            _forget(code, backend)
        sizes = pgo.get_code_state()
        sizes.clear()
        sizes.update(seen)


def _forget(code: Any, backend: Callable[..., Any]) -> None:
    for entry in _debug_get_cache_entry_list(code):
        state = entry.guard_manager.extra_state
        if entry.backend is not backend or state is None:
            continue
        gone = DeletedGuardManagerWrapper("gnsfx looked at the graph")
        gone.id_matched_objs = {"self": weakref.ref(_forget)}  # matches no frame, so that the entry does not count
        state.invalidate(entry, gone)


def options_of(model: Any) -> dict[str, Any] | None:
    """What was given to ``torch.compile(model, options=...)``; None where that cannot be told."""
    found = getattr(getattr(model, "dynamo_ctx", None), "callback", None)
    while found is not None:
        if isinstance(kwargs := getattr(found, "kwargs", None), dict):
            return kwargs.get("options")
        found = getattr(found, "_torchdynamo_orig_backend", None) or getattr(found, "_torchdynamo_orig_callable", None)
    return None


never_trace(__name__)
