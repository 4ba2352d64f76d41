"""Training graphs of models on fake CUDA tensors, as Dynamo captures them and as our pass leaves them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from gnsfx.capture import read_capture
from gnsfx.config import Options
from gnsfx.inner import Compiled, RewritePass, eager_compile
from gnsfx.passes.attach_collectors import add_leaves
from gnsfx.passes.pipeline import Report
from tests.cuda.models import CASES


@dataclass(frozen=True)
class Captured:
    gm: GraphModule
    inputs: list[Any]
    autocast: bool

    def around(self) -> Any:
        """As in the step that it was captured from."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.autocast)


@functools.cache
def capture(name: str, dtype: torch.dtype = torch.bfloat16, autocast: bool = False, dynamic: bool = False) -> Captured:
    """The graph of a model, parameters in ``dtype``; ``dynamic``: the batch size is symbolic."""
    kept: list[Captured] = []

    def keep(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        kept.append(Captured(gm, inputs, autocast))
        return gm.forward

    torch._dynamo.reset()
    case, shapes = CASES[name], ShapeEnv()
    with FakeTensorMode(shape_env=shapes), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        with torch.device("meta"):
            model = case.build()
        inputs = case.inputs()
        if dynamic:
            (B,) = {x.shape[0] for x in inputs}
            examples = shapes.create_unspecified_symint_and_symbol(B, ConstantSource("examples"), DimDynamic.DYNAMIC)
            inputs = tuple(torch.empty(examples, *x.shape[1:], dtype=x.dtype, device="cuda") for x in inputs)
        torch.compile(on_cuda(model, dtype), backend=keep)(*inputs)
    (found,) = kept
    return found


def on_cuda(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Shared parameters stay shared."""
    moved: dict[Tensor, Tensor] = {}

    def move(x: Tensor) -> Tensor:
        if x not in moved:
            like = torch.empty(x.shape, dtype=dtype, device="cuda")
            moved[x] = nn.Parameter(like) if isinstance(x, nn.Parameter) else like
        return moved[x]

    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            kept.update({name: move(x) for name, x in kept.items() if x is not None})  # type: ignore[misc]
    return model


def rewriting(captured: Captured, options: Options, compiler: Callable[..., Compiled]) -> Report:
    """``compiler(graph, inputs, pass)`` on the captured graph with its collector."""
    reports: list[Report] = []
    plan = read_capture(captured.gm, captured.inputs, options).plan
    mode = torch._guards.detect_fake_mode(captured.inputs)
    assert mode is not None
    with mode:
        leaf = torch.zeros(2, len(plan.slots) + 1, device="cuda", requires_grad=True)
    with captured.around(), torch.enable_grad():
        gm = add_leaves(captured.gm, ["leaf"])
        compiler(gm, [*captured.inputs, leaf], RewritePass(plan, reports.append, keep_text=True))
    return reports[-1]


def rewritten(captured: Captured, options: Options) -> tuple[Graph, Report]:
    """The joint graph behind our pass."""
    kept: list[Graph] = []

    def compiler(gm: GraphModule, inputs: list[Any], rewrite: RewritePass) -> Compiled:
        def both(graph: Graph) -> None:
            rewrite(graph)
            kept.append(graph)

        return eager_compile(gm, inputs, both)  # type: ignore[arg-type]

    report = rewriting(captured, options, compiler)
    return kept[0], report
