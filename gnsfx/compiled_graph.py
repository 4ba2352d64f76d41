"""A captured graph as the callable that Dynamo gets: our leaves go in with the inputs, the probe comes out with the results.

UntrainedGraph    inputs          -> plain          -> results                            nothing to measure
CompiledGraph     inputs + leaves -> inner compiler -> results + probe -> results         a call is watched until its backward
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from gnsfx import _torch
from gnsfx.capture import Capture, read_capture
from gnsfx.captured_graph import CapturedGraph
from gnsfx.config import Options
from gnsfx.errors import GnsWarning, RefusedError
from gnsfx.inner import Compiled, RewritePass, inner_compile
from gnsfx.passes.attach_collectors import add_leaves


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
        self._inner = inner_compile(
            add_leaves(gm, self._leaves, self._seed), [*inputs, *leaves], options, patches, rewriting
        )
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
        self._find_report(node)
        places = {r.output_nr: i for i, r in enumerate(results) if isinstance(r, Tensor) and r.grad_fn is node}
        call.watch(node, lambda output: self.output_state(places[output]) if output in places else None)
        self.record_results(results, call.examples)
        return results

    def _shape(self, args: Sequence[Any]) -> Any:
        """DDP cuts a graph into several and runs each on stand-ins, so as to know the inputs of the next."""
        results = tuple(self._inner(*args, *self.collectors.fake_leaves(args)))
        self._find_report(results[self._outputs].grad_fn)
        self.record_results(results[: self._outputs], None)
        return results[: self._outputs]

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
