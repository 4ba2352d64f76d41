"""Every private name of PyTorch that gnsfx relies on, and why. Nothing else may reach into ``torch._*``.

``tests/gnsfx/test_torch_internals.py`` fails by name when a new version moves one of them.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
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
    make_boxed_func,  # the calling convention AOTAutograd asks of a compiler
)
from torch._functorch.partitioners import default_partition  # splits the rewritten joint graph for "eager"
from torch._guards import (
    TracingContext,  # holds, while a graph is compiled, the metadata that the compile caches store with it
    detect_fake_mode,  # new metadata must live in the fake mode of the graph
)
from torch._inductor import config as inductor_config
from torch._inductor import (
    cpp_builder,  # the compiler and the OpenMP runtime of Inductor's own code: our kernels share them
    list_mode_options,  # the meaning of torch.compile(mode=...)
)
from torch._inductor.compile_fx import (
    compile_fx,  # plain Inductor
    compile_fx_inner,  # and its part behind AOTAutograd, once for a forward and once for a backward
)
from torch._inductor.custom_graph_pass import CustomGraphPass  # a pass with a uuid keeps the compile caches on
from torch._inductor.decomposition import select_decomp_table  # rules are written for Inductor's decomposed graphs
from torch._subclasses.fake_tensor import FakeTensor
from torch._utils import _flatten_dense_tensors as flatten_dense_tensors  # tensors side by side, in one call
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod  # how symbolic sizes divide
from torch.utils.weak import WeakIdKeyDictionary  # tensors compare elementwise, so weak maps must go by identity

__all__ = [
    "CustomGraphPass",
    "FloorDiv",
    "GradAOTOutput",
    "Mod",
    "OptimizedModule",
    "PlainAOTInput",
    "PlainAOTOutput",
    "PythonMod",
    "TangentAOTInput",
    "WeakIdKeyDictionary",
    "allows_rnn",
    "aot_autograd",
    "compile_fx",
    "compiler_and_openmp",
    "compiler_that_keeps",
    "current_backward",
    "decompositions_without",
    "default_partition",
    "detect_fake_mode",
    "divisible",
    "exact_quotient",
    "flatten_dense_tensors",
    "forbid_in_graph",
    "force_backend",
    "graph_key",
    "graphs_apart",
    "inductor_config",
    "is_fake",
    "kept_with",
    "known",
    "list_mode_options",
    "make_boxed_func",
    "never_trace",
    "options_of",
    "private_graphs",
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


def decompositions_without(targets: Any) -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions but for those of ``targets``, which stay in the graph as they are."""
    return {op: decomposition for op, decomposition in select_decomp_table().items() if op not in targets}


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


# The id of the running ``backward()`` call, -1 outside. Two graphs in one call see the same id.
current_backward: Callable[[], int] = torch._C._current_graph_task_id


def is_fake(value: Any) -> bool:
    """Whether a tensor has a shape only, as while compiling."""
    return isinstance(value, FakeTensor)


def compiler_and_openmp() -> tuple[str, list[str], list[str]]:
    """The C++ compiler that Inductor uses, and what to tell it before and behind the source to get Inductor's OpenMP.

    Two OpenMP runtimes in one process would be two pools of threads that wait for work on the same cores.

    Raises:
        RuntimeError: there is no compiler.
    """
    compiler = cpp_builder.get_cpp_compiler()
    compile, link, includes, folders, libraries, others = cpp_builder._get_openmp_args(compiler)
    before = [*(f"-{flag}" for flag in compile), *(f"-I{path}" for path in includes)]
    behind = [*(f"-{flag}" for flag in link), *(f"-L{path}" for path in folders), *(f"-l{name}" for name in libraries)]
    return compiler, before, [*behind, *others]


def sources_of(gm: torch.fx.GraphModule) -> list[Any]:
    """Where Dynamo found each graph input (``L['self']._modules[...]``), None for inputs of its own making."""
    return [getattr(node, "_dynamo_source", None) for node in gm.graph.nodes if node.op == "placeholder"]


_KEPT = "gnsfx_report"  # an attribute of the metadata, which is pickled as a whole


def compiler_that_keeps(take: Callable[[], bytes | None]) -> Callable[..., Any]:
    """Inductor behind AOTAutograd; what ``take`` returns goes with the compiled graph into the compile caches."""

    def compile_and_keep(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        context = TracingContext.try_get()
        kept = take() if context is not None and context.fw_metadata is not None else None
        if kept is not None:
            setattr(context.fw_metadata, _KEPT, kept)  # type: ignore[union-attr]
        return compile_fx_inner(gm, inputs, **kwargs)

    return compile_and_keep


def kept_with(node: Any) -> bytes | None:
    """What was kept with the compiled graph that made an autograd node, in this process or in one before."""
    return getattr(getattr(getattr(node, "_forward_cls", None), "metadata", None), _KEPT, None)


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
