"""What was done to a model's graphs, asked of the model: which graphs they are, traced and rewritten once more.

    explain(model, *args)   captures the forward pass afresh, on these inputs      --trace, rewrite-->  Explanation
    explain(model)          takes the graphs that training has already compiled    --trace, rewrite-->  Explanation

No code is generated. Training does not notice: buffers, parameters, random numbers, collectors and compiled graphs are
afterwards what they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from gnsfx import _torch, diagnosis
from gnsfx.capture import read_capture, trains
from gnsfx.captured_graph import CapturedGraph, trace
from gnsfx.config import Options, split_options
from gnsfx.coverage import FROZEN, Row, coverage
from gnsfx.errors import GnsError
from gnsfx.explanation import Explained, Explanation, GraphExplanation
from gnsfx.passes.pipeline import Report
from gnsfx.unchanged import unchanged


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Show how ``model`` is measured: the path taken for each parameter, what the others would cost, the graphs rewritten.

    With inputs, ``model(*args, **kwargs)`` runs once, forward only, and is captured afresh with the options of the
    compiled model (the defaults if it is not compiled); that needs memory for a copy of its parameters and buffers.
    Without inputs, the graphs that it has already compiled are traced again.

    Args:
        model: a compiled module, one compiled in place, or an ordinary one.
        args, kwargs: inputs of its forward pass.

    Raises:
        GnsError: no inputs, and no graph was compiled yet.
    """
    if args or kwargs:
        graphs, names = _captured(model, args, kwargs), {id(p): n for n, p in model.named_parameters()}
        explained = tuple(_explain_graph(g, [names.get(id(p), "?") for p in g.parameters]) for g in graphs)
        return Explanation(explained, tuple(_others(model, {id(p) for g in graphs for p in g.parameters})))
    return _explain_compiled(model)


# ---------------------------------------------------------------------------------------------- graphs already compiled


def _explain_compiled(model: nn.Module) -> Explanation:
    names = {p: n for n, p in model.named_parameters()}
    found: dict[Any, list[str]] = {}
    for owner in diagnosis.compiled(model):
        live = [r() for r in owner.parameters]
        found.setdefault(owner.graph, [names.get(p, "?") if p is not None else "?" for p in live])
    if not found:
        raise GnsError(
            f"nothing to explain: {diagnosis.diagnose(model)} Or pass the inputs of a forward pass: gnsfx.explain(model, *args)."
        )
    graphs = tuple(_explain_graph(graph, named) for graph, named in found.items())
    shown = {e.name for g in graphs for e in g.parameters}
    return Explanation(graphs, tuple(row for row in coverage(model) if row.name not in shown))


def _explain_graph(graph: CapturedGraph, names: Sequence[str]) -> GraphExplanation:
    report: Report = trace(graph, keep_text=True)
    parameters = []
    for name, record, position in zip(names, report.records, graph.capture.plan.slots, strict=True):
        value = graph._fake_inputs[position]
        parameters.append(Explained(name, record, value.dtype, value.device.type, graph.capture.plan.forced))
    return GraphExplanation(tuple(parameters), report.before, report.after, _plan_in_words(graph))


def _plan_in_words(graph: CapturedGraph) -> str:
    plan = graph.capture.plan
    if plan.documents is not None:
        return f"packed documents, told apart by {_name_of_input(graph, plan.documents.ids)}"
    if plan.batch is None:
        return "no batch dimension"
    index, dim, *fold = plan.batch
    size = _torch.size_hint(graph._fake_inputs[index].shape[dim]) // (fold[0] if fold else 1)
    return f"{size} examples along dimension {dim} of {_name_of_input(graph, index)}"


def _name_of_input(graph: CapturedGraph, index: int) -> str:
    name = getattr(_torch.sources_of(graph._original)[index], "name", f"input {index}")
    return str(name() if callable(name) else name)


# ------------------------------------------------------------------------------------------------------ a fresh capture


class TracedGraph(CapturedGraph):
    """Runs the captured graph as it is, so that the graphs behind a graph break get their inputs."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], options: Options) -> None:
        capture = read_capture(gm, inputs, options)
        super().__init__(gm, inputs, capture, options)
        self.parameters = [inputs[i] for i in capture.plan.slots]

    def __call__(self, *args: Any) -> Any:
        results = self._original(*args)
        self.record_results(results, None)
        return results


def _captured(model: nn.Module, args: Any, kwargs: Any) -> list[TracedGraph]:
    options = options_of(model)
    graphs: list[TracedGraph] = []

    def capture(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        if not trains(inputs) or not read_capture(gm, inputs, options).plan.slots:
            return gm.forward
        graphs.append(TracedGraph(gm, inputs, options))
        return graphs[-1]

    run = model if is_compiled(model) else torch.compile(model)
    with unchanged(model), _torch.private_graphs(capture), torch.enable_grad():
        run(*args, **kwargs)
    return graphs


def _others(model: nn.Module, seen: set[int]) -> Iterator[Row]:
    for name, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        shape = tuple(parameter.shape)
        if not parameter.requires_grad:
            yield Row(name, shape, "unused", reason=FROZEN)
        else:
            yield Row(name, shape, "not compiled", reason="not selected by gns.params, or no captured graph uses it")


def is_compiled(model: nn.Module) -> bool:
    """Whether calling the model, or a module in it, goes through ``torch.compile``."""
    return any(
        isinstance(m, _torch.OptimizedModule) or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


def options_of(model: nn.Module) -> Options:
    """The ``gns.*`` options the model was compiled with, the defaults where that cannot be told."""
    for owner in diagnosis.compiled(model):
        return owner.graph.options
    for module in model.modules():
        if (given := _torch.options_of(module)) is not None:
            return split_options(given)[0]
    return Options()
