"""The ``torch.compile`` backend: plain Inductor, with the collector's leaf added to the graph and the pass configured.

captured graph --read_capture--> Plan --add_leaves--> graph + leaf --inner compiler + rewrite--> callable
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gnsfx import _torch
from gnsfx._torch_distributed import is_dtensor
from gnsfx.capture import read_capture, trains
from gnsfx.compiled_graph import CompiledGraph, UntrainedGraph
from gnsfx.config import Options, Selection, split_options
from gnsfx.inner import Compiled, inner_compile
from gnsfx.unmeasured import refuse_whole

SPLIT = (
    "a parameter of its graph is a DTensor, split over ranks (tensor parallelism), where an example's contribution is on no rank as a whole; "
    "data parallelism, by DistributedDataParallel or fully_shard, is measured"
)


def compile(
    model: Any = None,
    *,
    params: Any = "all",
    per_example: bool = False,
    elementwise: bool = False,
    strict: bool = False,
    inner: Any = "inductor",
    path: Any = "auto",
    memory: int | None = None,
    budget: float | None = None,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """``torch.compile(model, backend="gns")`` with our options as keywords; see :class:`gnsfx.config.Options`.

    ``options`` are Inductor's, ``mode``, ``dynamic`` and ``fullgraph`` those of ``torch.compile``.

    Raises:
        OptionError: an option that does not exist, or a value it does not take.
    """
    ours = {
        "params": params,
        "per_example": per_example,
        "elementwise": elementwise,
        "strict": strict,
        "inner": inner,
        "path": path,
        "memory": memory,
        "budget": budget,
    }
    given = {f"gns.{k}": v for k, v in ours.items() if v is not None}
    # torch.compile takes a mode or options, not both; a mode is nothing but options
    merged = {**_patches(mode, dict(options or {})), **given}
    split_options(merged)
    return torch.compile(model, backend="gns", options=merged, **kwargs)  # type: ignore[call-overload]


@_torch.forbid_in_graph
@contextmanager
def measuring(enabled: bool | Selection = True) -> Iterator[None]:
    """Measure otherwise in some steps: forward passes inside run another version of the compiled graphs.

    Args:
        enabled: True for what the model was compiled to measure, False for nothing (plain Inductor), or another selection
            in place of ``gns.params``: ``"norm"``, ``"all"``, or a callable, the same object each time. All other options
            stay those of the model.

    Each version is compiled when it is first used, and kept; each counts towards Dynamo's ``recompile_limit``. The
    backward follows the forward it belongs to. Put all micro-batches of a step under the same selection: what only some
    of them measured is refused. Models compiled with a backend of PyTorch are left alone.

    Raises:
        OptionError: not a bool and not a selection.

    Example:
        >>> for step, (x, y) in enumerate(loader):
        ...     with gnsfx.measuring(step % 10 == 0):
        ...         loss = loss_function(model(x), y)
        ...     loss.backward()
    """
    selection: Any = enabled if isinstance(enabled, str) or callable(enabled) else bool(enabled)
    if not isinstance(selection, bool):
        Options(params=selection)  # raises

    def key_of(options: Any) -> Any:
        as_compiled = selection is True or (options is not None and split_options(options)[0].params == selection)
        return None if as_compiled else selection

    with _torch.graphs_apart(key_of):
        yield


def gns(gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Any = None) -> Compiled:
    """Entry point ``gns`` of the group ``torch_dynamo_backends``.

    Raises:
        OptionError: a ``gns.*`` option that does not exist, or a value it does not take.
        RefusedError: ``gns.strict`` and a parameter that cannot be measured exactly.
    """
    ours, inductor = split_options(options)
    patches = _patches(mode, inductor)
    selection = _torch.graph_key()
    if selection is False:
        return inner_compile(gm, example_inputs, ours, patches, None)
    if selection is not None:
        ours = replace(ours, params=selection)
    if any(isinstance(v, nn.Parameter) and is_dtensor(v) for v in example_inputs):
        return _refusing(inner_compile(gm, example_inputs, ours, patches, None))
    if not trains(example_inputs):
        inner = inner_compile(gm, example_inputs, ours, patches, None)
        return (
            UntrainedGraph(gm, example_inputs, inner, ours)
            if any(isinstance(v, Tensor) for v in example_inputs)
            else inner
        )
    capture = read_capture(gm, example_inputs, ours)
    return CompiledGraph(gm, example_inputs, capture, ours, patches)


def _refusing(inner: Compiled) -> Compiled:
    """A graph with parameters split over ranks: plain, but for noting which they are."""

    def call(*args: Any) -> Any:
        for value in args:
            if isinstance(value, nn.Parameter) and value.requires_grad:
                refuse_whole(value, SPLIT)
        return inner(*args)

    return call


def _patches(mode: str | None, inductor: dict[str, Any]) -> dict[str, Any]:
    return {**(_torch.list_mode_options(mode) if mode else {}), **inductor}
