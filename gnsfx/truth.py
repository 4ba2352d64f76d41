"""One batch through the rewritten graphs and through the untouched ones: what is measured, and what is true.

    Problem.measure    a private copy of the model, rewritten       norms, gradients, and the tangents of its output
    Problem.truth      the same, as AOTAutograd traced it           the contribution of each example

:mod:`gnsfx.verify` says where the truth comes from.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gnsfx import _torch, backend, collector, marks
from gnsfx.config import Options
from gnsfx.coverage import Row, coverage
from gnsfx.errors import GnsError, GnsWarning
from gnsfx.explain import options_of
from gnsfx.passes.state import Batched
from gnsfx.replay import PASS_LOSS, Tape, Taped
from gnsfx.unchanged import unchanged
from gnsfx.weighed import Grads, weigh

Tangents = Sequence[Tensor | None]
"""One entry per differentiable tensor of the model's output; None where the loss does not use it."""


@dataclass(slots=True)
class Measured:
    """One pass through the rewritten graphs.

    ``outputs`` and ``tangents`` are the differentiable tensors of the model's output, and the gradient of the loss with
    respect to them; ``parts`` holds such tangents per example where the loss gives them.
    """

    coverage: list[Row]
    norms: dict[str, Tensor]
    sums: dict[str, Tensor]
    grads: Grads
    examples: int
    outputs: list[Tensor]
    tangents: Tangents
    parts: list[Tangents] | None
    batch_dims: list[int | None] = field(default_factory=list)


@dataclass(slots=True)
class Truth:
    contributions: list[Grads]
    whole: Grads


class Problem:
    """The private copy of the model with its inputs, and the ways to run it."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any, loss: Callable[[Any], Tensor] | None) -> None:
        self.model, self.args, self.kwargs, self.loss = model, args, kwargs, loss
        self.options: Options = replace(options_of(model), inner="eager", strict=False, per_example=True)
        trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not trainable:
            raise GnsError("nothing to verify: no parameter of the model requires a gradient.")
        self.names = [n for n, _ in trainable]

    def prepare(self, double: bool) -> None:
        """Make the copy, and fix the random numbers that every pass starts from."""
        try:
            twin = copy.deepcopy(getattr(self.model, "_orig_mod", self.model))
        except Exception as error:
            raise GnsError(
                f"verify works on a copy of the model, and {type(self.model).__name__} cannot be copied: {error}"
            ) from error
        parameters = list(twin.parameters())  # before unwrapping: the order of the names
        for module in twin.modules():
            for name, child in list(module.named_children()):
                if isinstance(child, _torch.OptimizedModule):
                    setattr(module, name, child._orig_mod)
        self.twin = twin.double() if double else twin
        self.parameters = [p for p in parameters if p.requires_grad]
        self.inputs = _torch.tree_map(lambda x: _private(x, double), (self.args, self.kwargs))
        self.least: torch.dtype = self.parameters[0].dtype
        self.random = (
            torch.get_rng_state(),
            {d: torch.cuda.get_rng_state(d) for d in {p.device for p in parameters if p.is_cuda}},
        )
        self.python_random = random.getstate()

    @contextmanager
    def _same_start(self) -> Iterator[None]:
        with unchanged(self.twin), torch.enable_grad():
            torch.set_rng_state(self.random[0])
            for device, state in self.random[1].items():
                torch.cuda.set_rng_state(state, device)
            random.setstate(self.python_random)
            yield

    # ------------------------------------------------------------------------------------------------------- measured

    def measure_in_double(self) -> Measured | None:
        """None where the model does not run in float64: an operand of another dtype, a kernel without it."""
        self.prepare(double=True)
        try:
            return self.measure()
        except GnsError:
            raise
        except Exception:
            return None

    def measure(self) -> Measured:
        def compile_measured(gm: GraphModule, inputs: Sequence[Any]) -> Any:
            options = {
                f"gns.{n}": getattr(self.options, n)
                for n in ("params", "per_example", "strict", "inner", "path", "memory")
            }
            return backend.gns(gm, inputs, options=options)

        self.twin.zero_grad(set_to_none=True)
        with _torch.private_graphs(compile_measured), self._same_start(), warnings.catch_warnings():
            warnings.simplefilter("ignore", GnsWarning)
            args, kwargs = self.inputs
            output = torch.compile(self.twin)(*args, **kwargs)
            outputs, tangents, parts = self._differentiate(output)
            dims = [_row_dimension(o) for o in outputs]
            torch.autograd.backward(outputs, [_or_zeros(t, o) for t, o in zip(tangents, outputs, strict=True)])
        rows = list(coverage(self.twin))
        by_twin = dict(zip((id(p) for p in self.parameters), self.names, strict=True))
        renamed = {n: by_twin[id(p)] for n, p in self.twin.named_parameters() if id(p) in by_twin}
        rows = [replace(r, name=renamed[r.name]) for r in rows if r.name in renamed]
        found = collector.measurements(self.twin) if any(r.status == "measured" for r in rows) else []
        kept = collector.per_example_sq_norms(self.twin) if any(m.sq_norm is not None for m in found) else {}
        sums = {renamed[m.name]: m.sq_norm for m in found if m.sq_norm is not None}
        for i, row in enumerate(rows):
            if row.status == "measured" and row.name not in sums:
                reason = next(m.refusal for m in found if renamed[m.name] == row.name)
                rows[i] = replace(row, status="unused", path="", reason=reason or "")
        if not sums and all(r.status == "not compiled" for r in rows):
            raise GnsError(f"nothing to verify: {rows[0].reason}")
        examples = max((int(m.examples) for m in found if m.examples is not None), default=0)
        if parts is not None and sums and len(parts) != examples:
            raise GnsError(
                f"the loss has {len(parts)} values, one per example, but the compiled model counts {examples} examples. Mark the batch "
                "dimension of the inputs with gnsfx.mark_batch(tensor, dim), or return one loss per example."
            )
        grads = [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]
        self.twin.zero_grad(set_to_none=True)
        norms = {renamed[n]: v for n, v in kept.items()}
        return Measured(rows, norms, sums, grads, examples, outputs, tangents, parts, dims)

    def _differentiate(self, output: Any) -> tuple[list[Tensor], Tangents, list[Tangents] | None]:
        """Cut the loss off at the model's output, so that its backward pass reaches nothing else of the caller's."""
        flat, spec = _torch.tree_flatten(output)
        at = [i for i, v in enumerate(flat) if isinstance(v, Tensor) and v.requires_grad]
        if not at and isinstance(getattr(output, "loss", None), Tensor):  # a container that PyTorch does not look into
            flat, spec, at = [output.loss], _torch.tree_flatten(output.loss)[1], [0]
        if not at:
            raise GnsError(f"the model's output ({type(output).__name__}) holds no tensor that requires a gradient.")
        outputs = [flat[i] for i in at]
        for i in at:
            flat[i] = flat[i].detach().requires_grad_()
        result = self._loss_of(_torch.tree_unflatten(flat, spec))
        leaves = [flat[i] for i in at]
        parts: list[Tangents] | None = None
        if result.dim() == 1:
            B = result.shape[0]
            parts = [
                list(torch.autograd.grad(result[b] / B, leaves, retain_graph=True, allow_unused=True)) for b in range(B)
            ]
        tangents = list(torch.autograd.grad(result.mean(), leaves, allow_unused=True))
        return outputs, tangents, parts

    def _loss_of(self, output: Any) -> Tensor:
        if self.loss is not None:
            result, what = self.loss(output), "loss(output)"
        else:
            result, what = (
                output["loss"] if isinstance(output, dict) and "loss" in output else getattr(output, "loss", output),
                "the output",
            )
        if not isinstance(result, Tensor) or result.dim() > 1 or not result.requires_grad:
            shape = f"a tensor of shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise GnsError(
                f"{what} is {shape}: expected a scalar, or one loss per example, that depends on the model. {PASS_LOSS}"
            )
        if result.numel() == 0:
            raise GnsError("the batch is empty.")
        return result

    # ---------------------------------------------------------------------------------------------------------- truth

    def truth(self, measured: Measured) -> Truth:
        tape = Tape()
        inside = all(o.dim() == 0 for o, t in zip(measured.outputs, measured.tangents, strict=True) if t is not None)
        alone = inside and measured.parts is None and measured.examples > 1
        with _torch.private_graphs(lambda gm, inputs: self._plain(gm, inputs, tape)):
            compiled = torch.compile(self.twin)
            with self._same_start():
                args, kwargs = self.inputs
                outputs = [o for o in _torch.tree_flatten(_tensors(compiled(*args, **kwargs)))[0] if o.requires_grad]
                if len(outputs) != len(measured.outputs):
                    raise GnsError(
                        "two passes through the model from the same state gave outputs of different structure."
                    )
                whole = self._pull(outputs, measured.tangents)
                contributions = [] if alone else [self._pull(outputs, part) for part in self._parts(measured)]
            if alone:
                contributions = [self._alone(compiled, tape, b, measured.examples) for b in range(measured.examples)]
        return Truth(weigh(contributions, whole, self.least) if alone else contributions, whole)

    def _pull(self, outputs: list[Tensor], tangents: Tangents) -> Grads:
        used = [(o, t) for o, t in zip(outputs, tangents, strict=True) if t is not None]
        if not used:
            return [None] * len(self.parameters)
        results, given = zip(*used, strict=True)
        found = torch.autograd.grad(results, self.parameters, given, retain_graph=True, allow_unused=True)
        return [None if g is None else g.to_dense() if g.is_sparse else g for g in found]

    def _parts(self, measured: Measured) -> Iterator[Tangents]:
        """Tangents of one example after the other."""
        B = measured.examples
        if measured.parts is not None or B == 1:
            yield from measured.parts or [measured.tangents]
            return
        marked = {d for x in _tensors(self.inputs) if isinstance(d := marks.marked(x), int)}
        dim = marked.pop() if len(marked) == 1 else 0
        for output, tangent, known in zip(measured.outputs, measured.tangents, measured.batch_dims, strict=True):
            size = output.shape[dim] if output.dim() > dim else 1
            if tangent is not None and (size % B or (known is not None and known != dim)):
                along = (
                    f", and the compiled graph has its examples along dimension {known}" if known is not None else ""
                )
                raise GnsError(
                    f"an output of shape {list(output.shape)} has no rows for each of {B} examples along dimension {dim}{along}. {PASS_LOSS}"
                )
        for b in range(B):
            yield [None if t is None else _only(t, dim, b, B) for t in measured.tangents]

    def _alone(self, compiled: Any, tape: Tape, b: int, B: int) -> Grads:
        def rows(x: Any) -> Any:
            mark = marks.marked(x) if isinstance(x, Tensor) else None
            dim = 0 if mark is marks.UNMARKED and x.dim() else mark
            if not isinstance(x, Tensor) or not isinstance(dim, int) or (mark is marks.UNMARKED and x.shape[0] != B):
                return x
            one = x.narrow(dim, b, 1).clone()
            return marks.mark_batch(one, dim) if mark is not marks.UNMARKED else one

        args, kwargs = _torch.tree_map(rows, self.inputs)
        tape.rewind(b, B)
        try:
            with self._same_start():
                result = self._loss_of(compiled(*args, **kwargs))
                if not bool(result.isfinite()):  # the mean over no token: it adds nothing to the loss of the batch
                    return [None] * len(self.parameters)
                return self._pull([result], [torch.ones_like(result)])
        except GnsError:
            raise
        except Exception as error:
            raise GnsError(
                f"the loss is computed inside the model, and example {b} cannot run alone: {error}. {PASS_LOSS}"
            ) from error

    def _plain(self, gm: GraphModule, inputs: Sequence[Any], tape: Tape) -> Any:
        """AOTAutograd with the decompositions of the measured graph, and nothing of ours."""
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor) and value.requires_grad and value.is_floating_point():
                self.least = max(self.least, value.dtype, key=lambda d: torch.finfo(d).eps)
        compiler = _torch.aot_autograd(
            fw_compiler=lambda graph, _: _torch.make_boxed_func(lambda *xs: Taped(graph, tape).run(*xs)),
            decompositions=_torch.select_decomp_table(),
            partition_fn=_torch.default_partition,
        )
        return compiler(gm, list(inputs))


def _private(x: Any, double: bool) -> Any:
    """A copy of an input, with its mark."""
    if not isinstance(x, Tensor):
        return x
    found = x.detach().clone()
    found = found.double() if double and found.is_floating_point() else found
    mark = marks.marked(x)
    return found if mark is marks.UNMARKED else marks.mark_batch(found, mark)


def _tensors(tree: Any) -> list[Tensor]:
    tree = tree if _torch.tree_flatten(tree)[0] != [tree] or isinstance(tree, Tensor) else getattr(tree, "loss", tree)
    return [x for x in _torch.tree_flatten(tree)[0] if isinstance(x, Tensor)]


def _or_zeros(tangent: Tensor | None, output: Tensor) -> Tensor:
    return torch.zeros_like(output) if tangent is None else tangent


def _row_dimension(output: Tensor) -> int | None:
    """Where the graph that made an output has its examples; None where that is not known."""
    state = marks.produced(output)
    return state.dim if isinstance(state, Batched) and state.outer == 1 else None


def _only(tangent: Tensor, dim: int, b: int, B: int) -> Tensor:
    each = tangent.shape[dim] // B
    found = torch.zeros_like(tangent)
    found.narrow(dim, b * each, each).copy_(tangent.narrow(dim, b * each, each))
    return found
