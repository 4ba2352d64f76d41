"""Measured norms beside per-example autograd, on one batch.

    measured    the rewritten graph of a private copy of the model             s_b, s = sum_b s_b
    truth       the same graph as AOTAutograd traced it, nothing of ours       c_b = J^T (tangents of example b), |c_b|^2

Both start from the same random numbers and run the same random ops in the same order, so dropout masks agree. What the
tangents of example b are depends on where the loss is:

    loss returns (B,)                      those of losses[b] / B
    loss returns a scalar                  those of the scalar, with the rows of all other examples set to zero
    the model's output is the loss         example b runs alone, with its part of the random numbers of the batch; then
                                           c_b = w_b g_b with sum_b w_b g_b = g, which gives the weights w_b
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
from torch.fx import GraphModule, Interpreter, Node

from gnsfx import _torch, backend, collector, marks
from gnsfx.config import Options
from gnsfx.coverage import Row, align, coverage, footnote
from gnsfx.errors import GnsError, GnsWarning, VerificationError
from gnsfx.explain import options_of, unchanged
from gnsfx.passes.state import Batched

TERMS = 2**20
HALVES = (torch.bfloat16, torch.float16)
SAMPLERS = ("rand", "bernoulli", "normal", "multinomial", "uniform", "exponential", "poisson", "geometric", "cauchy", "log_normal", "binomial")
PASS_LOSS = (
    "Return the logits from the model and pass loss=, a callable that turns the model's output into one loss per example: "
    "gnsfx.verify(model, *inputs, loss=lambda output: losses of shape (B,))."
)
Grads = list[Tensor | None]
"""One entry per trainable parameter; None where no gradient reaches it."""


@dataclass(frozen=True, slots=True)
class Checked:
    """One measured parameter beside the truth.

    Attributes:
        measured, expected: sum over examples of the squared norms.
        relative_error: of the sum or of the worst example, whichever is larger.
        gradient_error: of ``p.grad``, relative to the sum of the norms of its contributions.
        example: the worst one.
        wrong: what is beyond the tolerance, in words; empty if nothing is.
    """

    name: str
    measured: float
    expected: float
    relative_error: float
    gradient_error: float
    example: int
    wrong: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared.

    Attributes:
        parameters: those that are measured.
        skipped: coverage rows of all others, with the reason.
        examples: size of the batch.
        dtype: in which both sides were computed.
        rtol: relative tolerance on squared norms, as given or derived.
    """

    parameters: tuple[Checked, ...]
    skipped: tuple[Row, ...]
    examples: int
    dtype: torch.dtype
    rtol: float

    @property
    def max_relative_error(self) -> float:
        """The largest over all parameters; 0 if nothing was compared."""
        return max((p.relative_error for p in self.parameters), default=0.0)

    @property
    def refused(self) -> dict[str, str]:
        """Parameter name -> reason."""
        return {row.name: row.reason for row in self.skipped if row.status == "refused"}

    def by_parameter(self) -> dict[str, float]:
        """Parameter name -> largest relative error of its squared norms."""
        return {p.name: p.relative_error for p in self.parameters}

    def __str__(self) -> str:
        notes: dict[str, str] = {}
        rows = [("parameter", "measured", "expected", "relative error", "")]
        rows += [(p.name, f"{p.measured:.6g}", f"{p.expected:.6g}", f"{p.relative_error:.1e}", p.wrong) for p in self.parameters]
        rows += [(r.name, "", "", "", footnote(f"{r.status}: {r.reason}", notes)) for r in self.skipped]
        summary = (
            f"{len(self.parameters)} parameters compared with per-example autograd on {self.examples} examples in "
            f"{str(self.dtype).removeprefix('torch.')}; largest relative error {self.max_relative_error:.1e}, tolerance {self.rtol:.1e}"
        )
        return "\n".join([align(rows, (1, 2, 3)), *(f"{mark} {reason}" for reason, mark in notes.items()), summary])


def verify(
    model: nn.Module, *args: Any, loss: Callable[[Any], Tensor] | None = None, rtol: float | None = None, **kwargs: Any
) -> Verification:
    """Compare the norms of every measured parameter with per-example autograd on this batch.

    Works on a private copy of the model, compiled as a whole with the options of ``model`` and without code generation,
    in float64 where the model runs in it and in its own dtype otherwise: what is verified is the rewritten graph, not the
    code the inner compiler makes of it. The model, its gradients, buffers and collectors and the random numbers stay as
    they are. It takes B + 2 passes and memory for B gradients.

    The tolerance: |s_b - t_b| <= rtol t_b + 2 sqrt(t_b) d + d^2 + f. ``rtol`` is ``2 eps sqrt(2^20)``, the random walk of
    rounding in a sum of a million terms, twice because the norm is squared; ``eps`` is that of the least precise dtype
    that gradients pass through, with float32 sums and four roundings of the result for half precision. ``d`` is four times
    the rounding of the truth itself: the distance, for this parameter, between the sum of the contributions and the
    gradient of the whole batch. ``f = (rtol N)^2``, with N the largest norm of any contribution: a gradient that cancels
    to zero (a bias before a normalisation) is rounding alone. ``p.grad`` is compared in the same way.

    Args:
        model: a compiled module, one compiled in place, or an ordinary one.
        args, kwargs: inputs of its forward pass.
        loss: turns the output of the model into one loss per example, (B,), whose mean is trained, or into a scalar, if
            each row of the output (dimension 0, or the one marked on the inputs) belongs to one example. None: the output,
            or its ``loss``, is the loss; a scalar one takes a model whose examples can run alone.
        rtol: relative tolerance on squared norms.

    Raises:
        VerificationError: norms, or a gradient, differ; names each parameter with measured and expected values.
        GnsError: the truth cannot be had this way (the loss does not fit the batch, examples cannot run alone), with what
            to do instead; or nothing is trained or compiled.
    """
    problem = _Problem(model, args, kwargs, loss)
    measured = problem.measure_in_double() or problem.measure()
    with_truth = problem.truth(measured) if any(r.status == "measured" for r in measured.coverage) else None
    report = _compare(problem, measured, with_truth, rtol)
    _raise_if_wrong(report)
    return report


@dataclass(slots=True)
class _Measured:
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
    tangents: list[Tensor | None]
    parts: list[list[Tensor | None]] | None
    batch_dims: list[int | None] = field(default_factory=list)


@dataclass(slots=True)
class _Truth:
    contributions: list[Grads]
    whole: Grads


class _Problem:
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
            raise GnsError(f"verify works on a copy of the model, and {type(self.model).__name__} cannot be copied: {error}") from error
        parameters = list(twin.parameters())  # before unwrapping: the order of the names
        for module in twin.modules():
            for name, child in list(module.named_children()):
                if isinstance(child, _torch.OptimizedModule):
                    setattr(module, name, child._orig_mod)
        self.twin = twin.double() if double else twin
        self.parameters = [p for p in parameters if p.requires_grad]
        self.inputs = _torch.tree_map(lambda x: _private(x, double), (self.args, self.kwargs))
        self.least: torch.dtype = self.parameters[0].dtype
        self.random = torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in {p.device for p in parameters if p.is_cuda}}
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

    def measure_in_double(self) -> _Measured | None:
        """None where the model does not run in float64: an operand of another dtype, a kernel without it."""
        self.prepare(double=True)
        try:
            return self.measure()
        except GnsError:
            raise
        except Exception:
            self.prepare(double=False)
            return None

    def measure(self) -> _Measured:
        def compile_measured(gm: GraphModule, inputs: Sequence[Any]) -> Any:
            options = {f"gns.{n}": getattr(self.options, n) for n in ("params", "per_example", "strict", "inner", "path", "memory")}
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
        return _Measured(rows, norms, sums, grads, examples, outputs, tangents, parts, dims)

    def _differentiate(self, output: Any) -> tuple[list[Tensor], list[Tensor | None], list[list[Tensor | None]] | None]:
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
        parts = None
        if result.dim() == 1:
            B = result.shape[0]
            parts = [list(torch.autograd.grad(result[b] / B, leaves, retain_graph=True, allow_unused=True)) for b in range(B)]
        tangents = list(torch.autograd.grad(result.mean(), leaves, allow_unused=True))
        return outputs, tangents, parts

    def _loss_of(self, output: Any) -> Tensor:
        if self.loss is not None:
            result, what = self.loss(output), "loss(output)"
        else:
            result, what = output["loss"] if isinstance(output, dict) and "loss" in output else getattr(output, "loss", output), "the output"
        if not isinstance(result, Tensor) or result.dim() > 1 or not result.requires_grad:
            shape = f"a tensor of shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise GnsError(f"{what} is {shape}: expected a scalar, or one loss per example, that depends on the model. {PASS_LOSS}")
        if result.numel() == 0:
            raise GnsError("the batch is empty.")
        return result

    # ---------------------------------------------------------------------------------------------------------- truth

    def truth(self, measured: _Measured) -> _Truth:
        tape = _Tape()
        inside = all(o.dim() == 0 for o, t in zip(measured.outputs, measured.tangents, strict=True) if t is not None)
        alone = inside and measured.parts is None and measured.examples > 1
        with _torch.private_graphs(lambda gm, inputs: self._plain(gm, inputs, tape)):
            compiled = torch.compile(self.twin)
            with self._same_start():
                args, kwargs = self.inputs
                outputs = [o for o in _torch.tree_flatten(_tensors(compiled(*args, **kwargs)))[0] if o.requires_grad]
                if len(outputs) != len(measured.outputs):
                    raise GnsError("two passes through the model from the same state gave outputs of different structure.")
                whole = self._pull(outputs, measured.tangents)
                contributions = [] if alone else [self._pull(outputs, part) for part in self._parts(measured)]
            if alone:
                contributions = [self._alone(compiled, tape, b, measured.examples) for b in range(measured.examples)]
        return _Truth(_weigh(contributions, whole, self.least) if alone else contributions, whole)

    def _pull(self, outputs: list[Tensor], tangents: Sequence[Tensor | None]) -> Grads:
        used = [(o, t) for o, t in zip(outputs, tangents, strict=True) if t is not None]
        if not used:
            return [None] * len(self.parameters)
        results, given = zip(*used, strict=True)
        found = torch.autograd.grad(results, self.parameters, given, retain_graph=True, allow_unused=True)
        return [None if g is None else g.to_dense() if g.is_sparse else g for g in found]

    def _parts(self, measured: _Measured) -> Iterator[list[Tensor | None]]:
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
                along = f", and the compiled graph has its examples along dimension {known}" if known is not None else ""
                raise GnsError(f"an output of shape {list(output.shape)} has no rows for each of {B} examples along dimension {dim}{along}. {PASS_LOSS}")
        for b in range(B):
            yield [None if t is None else _only(t, dim, b, B) for t in measured.tangents]

    def _alone(self, compiled: Any, tape: _Tape, b: int, B: int) -> Grads:
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
            raise GnsError(f"the loss is computed inside the model, and example {b} cannot run alone: {error}. {PASS_LOSS}") from error

    def _plain(self, gm: GraphModule, inputs: Sequence[Any], tape: _Tape) -> Any:
        """AOTAutograd with the decompositions of the measured graph, and nothing of ours."""
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor) and value.requires_grad and value.is_floating_point():
                self.least = max(self.least, value.dtype, key=lambda d: torch.finfo(d).eps)
        compiler = _torch.aot_autograd(
            fw_compiler=lambda graph, _: _torch.make_boxed_func(lambda *xs: _Taped(graph, tape).run(*xs)),
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


# ------------------------------------------------------------------------------------------------------- random numbers


class _Tape:
    """The random numbers of the whole batch, and where replaying them for one example has got to."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []
        self.example: tuple[int, int] | None = None
        self._position = 0

    def rewind(self, b: int, B: int) -> None:
        self.example, self._position = (b, B), 0

    def next(self, like: Tensor, op: Any) -> Tensor:
        """The part of the next sample that belongs to the example."""
        assert self.example is not None
        b, B = self.example
        if self._position >= len(self.samples):
            raise GnsError(f"an example that runs alone draws more random numbers than the batch ({op}). {PASS_LOSS}")
        whole = self.samples[self._position]
        self._position += 1
        if whole.shape == like.shape:
            return whole
        differ = [d for d in range(like.dim()) if like.dim() == whole.dim() and like.shape[d] != whole.shape[d]]
        if len(differ) != 1 or whole.shape[differ[0]] != B * like.shape[differ[0]]:
            raise GnsError(f"random numbers of shape {list(whole.shape)} ({op}) have no part of shape {list(like.shape)} for one of {B} examples. {PASS_LOSS}")
        return whole.narrow(differ[0], b * like.shape[differ[0]], like.shape[differ[0]])


class _Taped(Interpreter):
    """Runs a graph, recording what random ops return, or replaying it."""

    def __init__(self, gm: GraphModule, tape: _Tape) -> None:
        super().__init__(gm)
        self.tape = tape

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if torch.Tag.nondeterministic_seeded not in getattr(n.target, "tags", ()):
            return result
        if isinstance(result, Tensor) and n.target._schema.name.split("::")[1].startswith(SAMPLERS):  # type: ignore[union-attr]
            if self.tape.example is not None:
                return self.tape.next(result, n.target)
            self.tape.samples.append(result)
        elif self.tape.example is not None and _draws(n):
            raise GnsError(f"the loss is computed inside the model, and the random numbers of {n.target} cannot be replayed for single examples. {PASS_LOSS}")
        return result


def _draws(node: Node) -> bool:
    """Attention ops are random only with dropout."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    if "dropout_p" not in names:
        return True
    position = names.index("dropout_p")
    return bool(node.kwargs.get("dropout_p", node.args[position] if position < len(node.args) else 0.0))


# ----------------------------------------------------------------------------------------------------------- comparing


def _weigh(alone: list[Grads], whole: Grads, dtype: torch.dtype) -> list[Grads]:
    """w_b g_b for gradients g_b of examples that ran alone, with sum_b w_b g_b = the gradient of the batch."""
    B = len(alone)
    columns = torch.stack([_flat(g, whole) for g in alone], 1)
    target = _flat(whole, whole)
    scale = float(target.norm()) or 1.0
    bound = 10 * torch.finfo(dtype).eps ** 0.5
    ones = torch.ones(B, dtype=columns.dtype)

    def residual(weights: Tensor) -> float:
        return float((columns @ weights - target).norm()) / scale

    candidates = [ones / B, ones]
    weights = min(candidates, key=residual)
    if not residual(weights) <= bound:
        solution = torch.linalg.lstsq(columns, target[:, None], driver="gelsd")
        weights = solution.solution[:, 0]
        if not residual(weights) <= bound:
            raise GnsError(
                "the loss is computed inside the model, and the gradient of the batch is no weighted sum of the gradients of its examples "
                f"run alone (relative residual {residual(weights):.1e}): examples interact, draw other random numbers, or the batch "
                f"dimension of an input is not the first. {PASS_LOSS}"
            )
        present = int((columns.norm(dim=0) > 0).sum())
        if int(solution.rank) < present:
            raise GnsError(
                "the loss is computed inside the model, and the gradients of its examples are linearly dependent, so their weights in the loss cannot be told apart. "
                + PASS_LOSS
            )
    return [[None if g is None else g * float(w) for g in grads] for grads, w in zip(alone, weights, strict=True)]


def _flat(grads: Grads, like: Grads) -> Tensor:
    parts = [(g if g is not None else torch.zeros_like(t)) for g, t in zip(grads, like, strict=True) if t is not None]
    return torch.cat([_real(p).reshape(-1).to("cpu", torch.float64) for p in parts])


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _square(grad: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if grad is None else _real(grad).to(torch.float64).square().sum().cpu()


def relative_tolerance(dtype: torch.dtype) -> float:
    """Of a squared norm computed in ``dtype``; see :func:`verify`."""
    if dtype in HALVES:
        return 2 * (torch.finfo(torch.float32).eps * TERMS**0.5 + 4 * torch.finfo(dtype).eps)
    return 2 * torch.finfo(dtype).eps * TERMS**0.5


def _compare(problem: _Problem, measured: _Measured, truth: _Truth | None, rtol: float | None) -> Verification:
    tolerance = relative_tolerance(problem.least) if rtol is None else rtol
    skipped = tuple(row for row in measured.coverage if row.status != "measured")
    dtype = problem.parameters[0].dtype
    if truth is None:
        return Verification((), skipped, measured.examples, dtype, tolerance)
    expected = torch.stack([torch.stack([_square(g) for g in grads]) for grads in truth.contributions], 1)  # (parameters, B)
    largest = float(expected.max().sqrt()) if expected.isfinite().all() else float("inf")
    checked = []
    for index, name in enumerate(problem.names):
        if name not in measured.sums:
            continue
        parts = [g for grads in truth.contributions if (g := grads[index]) is not None]
        whole, gradient = truth.whole[index], measured.grads[index]
        total = sum(parts[1:], parts[0]) if parts else None
        own = 4 * _distance(total, whole)
        norms = measured.norms[name].cpu().to(torch.float64)
        error = _distance(gradient, whole)
        checked.append(
            _check(name, float(measured.sums[name]), norms, expected[index], own, (tolerance * largest) ** 2, tolerance, error)
        )
    return Verification(tuple(checked), skipped, measured.examples, dtype, tolerance)


def _check(name: str, total: float, norms: Tensor, truth: Tensor, own: float, floor: float, rtol: float, gradient: float) -> Checked:
    B = truth.numel()
    expected = float(truth.sum())
    wrong: list[str] = []
    worst, relative = 0, 0.0
    if norms.numel() != B:
        wrong.append(f"{norms.numel()} per-example norms for {B} examples")
    else:
        off = (norms - truth).abs()
        allowed = rtol * truth + 2 * truth.sqrt() * own + own**2 + floor
        ratios = off / truth.clamp_min(max(own**2 + floor, torch.finfo(torch.float64).tiny))
        worst, relative = int(ratios.nan_to_num(torch.inf).argmax()), float(ratios.nan_to_num(torch.inf).max())
        if not bool((off <= allowed).all()):
            at = int((off / allowed.clamp_min(torch.finfo(torch.float64).tiny)).nan_to_num(torch.inf).argmax())
            wrong.append(f"example {at}: {_beside(float(norms[at]), float(truth[at]))}")
    off_total = abs(total - expected)
    if not off_total <= rtol * expected + 2 * (expected * B) ** 0.5 * own + B * (own**2 + floor):
        wrong.insert(0, _beside(total, expected))
    relative = max(relative, off_total / max(expected, own**2 + floor, torch.finfo(torch.float64).tiny))
    reach = float(truth.sqrt().sum())
    if not gradient <= rtol * reach + own + floor**0.5:
        wrong.append(f"p.grad is off by {gradient:.3g}, its contributions have norm {reach:.3g}")
    return Checked(name, total, expected, relative, gradient / reach if reach else gradient, worst, "; ".join(wrong))


def _beside(measured: float, expected: float) -> str:
    relative = abs(measured - expected) / expected if expected else float("inf")
    return f"measured {measured:.6g}, expected {expected:.6g}, relative difference {relative:.1e}"


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return float(_square(a if b is None else b).sqrt())
    return float(_square(a - b).sqrt())


def _raise_if_wrong(report: Verification) -> None:
    wrong = [p for p in report.parameters if p.wrong]
    if wrong:
        lines = "\n  ".join(f"{p.name}: {p.wrong}" for p in wrong)
        raise VerificationError(
            f"{len(wrong)} of {len(report.parameters)} measured parameters differ from per-example autograd on {report.examples} examples "
            f"(squared norms, relative tolerance {report.rtol:.1e}):\n  {lines}"
        )
