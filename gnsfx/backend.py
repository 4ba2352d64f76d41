"""The ``torch.compile`` backend: plain Inductor, with the collector's leaf added to the graph and the pass configured.

captured graph --read_capture--> Plan --add_leaves--> graph + leaf --inner compiler + rewrite--> callable
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gnsfx import _torch, marks
from gnsfx._torch_distributed import is_dtensor
from gnsfx.calls import Collectors
from gnsfx.capture import EMPTY, Capture, read_capture, trains
from gnsfx.config import Options, Selection, split_options
from gnsfx.errors import GnsWarning, RefusedError
from gnsfx.inner import Compiled, RewritePass, eager_compile, inner_compile
from gnsfx.passes.attach_collectors import REFUSED, add_leaves
from gnsfx.passes.pipeline import Report
from gnsfx.passes.state import Batched, Mixed, Routed, Shared, State
from gnsfx.unmeasured import leave_out, refuse_whole

SPLIT = (
    "a parameter of its graph is a DTensor, split over ranks (tensor parallelism), where an example's contribution is on no rank as a whole; "
    "data parallelism, by DistributedDataParallel or fully_shard, is measured"
)
UNOWNED = (
    "it has a gradient from an empty batch, as of a penalty on the weights in the loss, which no example owns; "
    "skip backward for such a batch, or leave the penalty out of its loss"
)
MISREAD = (
    "input {} has its examples elsewhere than in the call that the graph was compiled for, and the same size; compile the "
    "module that contains both uses"
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


class CapturedGraph:
    """One captured graph with what the backend knows of it; not compiled."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], capture: Capture, options: Options) -> None:
        self.capture, self.options, self.empty = capture, options, capture.plan.refusal == EMPTY
        self._original = gm
        values = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
        self._fake_inputs = [v if v is not None else x for v, x in zip(values, inputs, strict=True)]
        self._report: Report | None = None
        self._refusals: dict[int, str] | None = None
        self._apart: bool | None = None
        # graph -> {(input, output): whether the examples are where they were}
        self._places: Any = weakref.WeakKeyDictionary()
        self._outputs = len(gm.graph.output_node().args[0])  # type: ignore[arg-type]
        self.collectors = Collectors(
            self,
            capture.plan.slots,
            [inputs[i] for i in capture.plan.slots],
            capture.plan.count,
            capture.assumed,
            options.per_example,
            next((v.device for v in inputs if isinstance(v, Tensor) and v.requires_grad), torch.device("cpu")),
            capture.plan.elementwise,
            capture.unselected,
        )
        leaves = 1 + (options.per_example and bool(capture.plan.slots)) + bool(capture.plan.elementwise)
        self._leaves = [f"gns_leaf_{i}" for i in range(leaves)]

    def _keep(self, report: Report) -> None:
        self._report = report

    @property
    def report(self) -> Report:
        """What the passes did. On a compile-cache hit they did not run, so the graph is traced again when asked."""
        if self._report is None:
            trace(self)
        assert self._report is not None
        return self._report

    def output_state(self, index: int) -> State | None:
        """State of a result with sizes as numbers, for the graph behind a graph break."""
        state = self.report.outputs[index] if index < len(self.report.outputs) else None
        if isinstance(state, Batched):
            return Batched(state.dim, _torch.size_hint(state.outer), _torch.size_hint(state.inner))
        if isinstance(state, Routed):
            return Mixed("rows chosen by data cross a graph break; compile both graphs as one, with fullgraph=True")
        return state if isinstance(state, (Shared, Mixed)) else None

    def note_unselected(self, args: Sequence[Any]) -> None:
        """Called for each tuple of parameters that comes in."""
        chosen = self.options.params
        selection = repr(chosen) if isinstance(chosen, str) else getattr(chosen, "__qualname__", "a callable")
        for index in self.capture.unselected:
            leave_out(args[index], f"not selected by gns.params={selection}")

    def record_results(self, results: Sequence[Any], examples: int | None) -> None:
        for index, result in enumerate(results):
            if isinstance(result, Tensor) and result.dim():
                marks.record(result, self, index, examples)

    def misread(self, args: Sequence[Any]) -> str | None:
        """Why an input has its examples elsewhere than the input this graph was compiled for; its sizes do not tell."""
        for index in self.capture.unmarked:
            found, mark = marks.source(args[index]), marks.marked(args[index])
            if (found is not None or mark is not marks.UNMARKED) and not self._same_place(
                index, found, mark, args[index]
            ):
                return MISREAD.format(self.capture.unmarked[index])
        return None

    def _same_place(self, index: int, found: tuple[Any, int, int | None] | None, mark: Any, value: Tensor) -> bool:
        expected = self.capture.plan.states.get(index, Shared())
        if mark is not marks.UNMARKED or found is None:
            return (expected.dim if isinstance(expected, Batched) else None) == mark
        graph, output, examples = found
        checked = self._places.setdefault(graph, {})
        if (index, output) not in checked:
            checked[index, output] = _alike(expected, graph.output_state(output))
        fold = expected.outer * expected.inner if isinstance(expected, Batched) else 0
        return checked[index, output] and (not fold or examples is None or value.shape[expected.dim] == examples * fold)  # type: ignore[union-attr]

    @property
    def refusals(self) -> dict[int, str]:
        """Slot -> reason. No example owes anything to an empty batch: what it adds is zero, or found in the run."""
        if self._refusals is None and self.empty:
            self._refusals = {}
        if self._refusals is None:
            self._refusals = {i: r.reason for i, r in enumerate(self.report.records) if r.status == "refused"}
        return self._refusals

    def refusal_of(self, slot: int, norms: Tensor | None) -> str | None:
        """Why a slot is refused. After a compile-cache hit the flags in the norms are read once, instead of tracing."""
        if (
            self._refusals is None
            and self._report is None
            and norms is not None
            and not (norms[0, :-1] == REFUSED).any()
        ):
            self._refusals = {}
        return self.refusals.get(slot)

    def refused_in_run(self, norms: Tensor) -> dict[int, str]:
        """Slots that are measured otherwise and were refused in the runs since the last zero, with the reason. Costs one
        synchronisation where a run may refuse anything."""
        known = self._report is not None and not self.empty
        if known and not any(r.condition for r in self._report.records):  # pyright: ignore[reportOptionalMemberAccess]
            return {}
        slots = (norms[0, :-1] == REFUSED).nonzero().flatten().tolist()
        if self.empty:
            return dict.fromkeys(slots, UNOWNED)
        return {s: reason for s in slots if (reason := self.report.records[s].condition)}

    def coupled(self, norms: Tensor | None) -> str | None:
        """Why a gradient that this graph hands to an earlier one is not apart by example; None if all are."""
        if self.empty:
            return None
        if self._report is None and self._apart is None and norms is not None:
            self._apart = not bool(norms[0, -1] == REFUSED)  # after a compile-cache hit, once
        if self._report is None and self._apart is not False:
            return None
        return self.report.coupled


def _alike(expected: State, found: State | None) -> bool:
    if isinstance(expected, Batched) and isinstance(found, Batched):
        folds = zip((expected.outer, expected.inner), (found.outer, found.inner), strict=True)
        return expected.dim == found.dim and all((a == 1) == (b == 1) for a, b in folds)
    return isinstance(expected, Mixed) or (isinstance(expected, Shared) and isinstance(found, Shared))


class UntrainedGraph(CapturedGraph):
    """Plain: it has nothing to measure, but the graphs behind it ask where the examples are in its results."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], inner: Compiled, options: Options) -> None:
        super().__init__(gm, inputs, read_capture(gm, inputs, options), options)
        self._inner = inner

    def __call__(self, *args: Any) -> Any:
        results = self._inner(*args)
        self.record_results(results, self.capture.plan.count(lambda i: args[i].shape))  # type: ignore[arg-type]
        return results


class CompiledGraph(CapturedGraph):
    """Compiled once, called with the parameters of any module that shares its code."""

    def __init__(
        self, gm: GraphModule, inputs: Sequence[Any], capture: Capture, options: Options, patches: dict[str, Any]
    ) -> None:
        super().__init__(gm, inputs, capture, options)
        leaves = self.collectors.fake_leaves(self._fake_inputs)
        rewriting = RewritePass(capture.plan, self._keep)
        self._inner = inner_compile(add_leaves(gm, self._leaves), [*inputs, *leaves], options, patches, rewriting)
        if options.strict:
            self._refuse_strictly()
        elif self._report is not None:
            self._warn()

    def __call__(self, *args: Any) -> Any:
        if _torch.is_fake(next((v for v in args if isinstance(v, Tensor)), None)):
            return self._shape(args)
        call = self.collectors.call(args)
        call.moved = call.moved or self.misread(args)
        results = self._inner(*args, *call.leaves)
        probe, results = results[self._outputs], tuple(results)[: self._outputs]
        node = probe.grad_fn
        places = {r.output_nr: i for i, r in enumerate(results) if isinstance(r, Tensor) and r.grad_fn is node}
        call.watch(node, lambda output: self.output_state(places[output]) if output in places else None)
        self.record_results(results, call.examples)
        return results

    def _shape(self, args: Sequence[Any]) -> Any:
        """DDP cuts a graph into several and runs each on stand-ins, so as to know the inputs of the next."""
        results = tuple(self._inner(*args, *self.collectors.fake_leaves(args)))[: self._outputs]
        self.record_results(results, None)
        return results

    def _refused_names(self) -> list[str]:
        return [f"{self.capture.names[self.capture.plan.slots[i]]}: {reason}" for i, reason in self.refusals.items()]

    def _refuse_strictly(self) -> None:
        if refused := self._refused_names():
            raise RefusedError(f"{len(refused)} parameters cannot be measured exactly:\n  " + "\n  ".join(refused))

    def _warn(self) -> None:
        if refused := self._refused_names():
            shown = "\n  ".join(refused[:5])
            more = f"\n  ... and {len(refused) - 5} more" if len(refused) > 5 else ""
            total = len(self.capture.plan.slots)
            text = f"gns: {len(refused)} of {total} parameters are refused, the others are exact; see gnsfx.coverage(model).\n  {shown}{more}"
            warnings.warn(text, GnsWarning, stacklevel=2)


def trace(graph: CapturedGraph, keep_text: bool = False) -> Report:
    """Trace and rewrite the captured graph once more, compiling nothing, and keep the report."""
    kept: list[Report] = []
    rewriting = RewritePass(graph.capture.plan, kept.append, keep_text)
    leaves = graph.collectors.fake_leaves(graph._fake_inputs)
    gm = add_leaves(graph._original, graph._leaves)
    with torch.enable_grad():
        eager_compile(gm, [*graph._fake_inputs, *leaves], rewriting)
    graph._keep(kept[0])
    return kept[0]
