"""Every private name of PyTorch that gnsfx relies on, and why. Nothing else may reach into ``torch._*``.

``tests/gnsfx/test_torch_internals.py`` fails by name when a new version moves one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd  # the "eager" inner compiler goes through AOTAutograd alone
from torch._functorch._aot_autograd.descriptors import (  # what each joint-graph input and output means
    GradAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch.aot_autograd import make_boxed_func  # the calling convention AOTAutograd asks of a compiler
from torch._functorch.partitioners import default_partition  # splits the rewritten joint graph for "eager"
from torch._guards import detect_fake_mode  # new metadata must live in the fake mode of the graph
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options  # the meaning of torch.compile(mode=...)
from torch._inductor.compile_fx import compile_fx  # plain Inductor
from torch._inductor.custom_graph_pass import CustomGraphPass  # a pass with a uuid keeps the compile caches on
from torch._inductor.decomposition import select_decomp_table  # rules are written for Inductor's decomposed graphs
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary  # tensors compare elementwise, so weak maps must go by identity

__all__ = [
    "CustomGraphPass",
    "GradAOTOutput",
    "PlainAOTInput",
    "PlainAOTOutput",
    "TangentAOTInput",
    "WeakIdKeyDictionary",
    "aot_autograd",
    "compile_fx",
    "current_backward",
    "default_partition",
    "detect_fake_mode",
    "force_backend",
    "inductor_config",
    "known",
    "list_mode_options",
    "make_boxed_func",
    "select_decomp_table",
    "size_hint",
    "sources_of",
    "tree_flatten",
    "tree_map",
    "tree_unflatten",
]


def known(condition: Any) -> bool:
    """Whether a condition on sizes holds whatever the symbolic sizes are. Adds no guard."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def size_hint(size: Any) -> int:
    """A concrete value of a size for the cost model. Adds no guard; 4096 where the size depends on data."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size.node.hint if size.node.has_hint() else None
    return 4096 if hint is None else int(hint)


def current_backward() -> int:
    """The id of the running ``backward()`` call, -1 outside. Two graphs in one call see the same id."""
    return torch._C._current_graph_task_id()


def sources_of(gm: torch.fx.GraphModule) -> list[Any]:
    """Where Dynamo found each graph input (``L['self']._modules[...]``), None for inputs of its own making."""
    return [getattr(node, "_dynamo_source", None) for node in gm.graph.nodes if node.op == "placeholder"]


@contextmanager
def force_backend(backend: Callable[..., Any]) -> Iterator[None]:
    """Let every ``torch.compile`` called inside use ``backend``; its graphs are cached apart from the others."""
    with torch.compiler.set_stance("default", force_backend=backend):
        yield
