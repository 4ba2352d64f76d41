"""What the backend reads off a captured graph before anything is traced: parameters, their names, the batch dimension.

Everything the run-time needs is decided here, because on a compile-cache hit no pass runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from gnsfx import marks
from gnsfx._torch import size_hint
from gnsfx.config import Options
from gnsfx.passes.documents import Documents
from gnsfx.passes.entries import MOST_NUMBERS
from gnsfx.passes.pipeline import Plan
from gnsfx.passes.rules.table import STATISTIC
from gnsfx.passes.state import Batched, Shared, State

NORM_FUNCTIONS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"}
NORMALISES = {"rsqrt", "rsqrt_", "var", "var_mean", "std", "norm"} | NORM_FUNCTIONS
MANY = "mark the batch dimension with gnsfx.mark_batch(tensor, dim), or dim=None for what all examples share"

EMPTY = "the batch is empty"
UNSEEN = (
    "the document ids given to mark_batch are not an input of the compiled graph; pass that very tensor to the model"
)


@dataclass(frozen=True, slots=True)
class Capture:
    """``names`` and ``unselected`` belong to the trainable parameters among the graph inputs, by position; ``assumed`` are the
    intermediates of eager code whose dimension 0 is taken for the examples, ``unmarked`` the names of inputs without a mark."""

    plan: Plan
    names: dict[int, str]
    unselected: tuple[int, ...]
    assumed: frozenset[int]
    unmarked: dict[int, str]


def read_capture(gm: GraphModule, inputs: Sequence[Any], options: Options) -> Capture:
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    names: dict[int, str] = {}
    for index, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
        if isinstance(value, nn.Parameter) and value.requires_grad:
            names[index] = parameter_name(node)
    normalising = modules_that_normalise(gm.graph) if options.params == "norm" else frozenset()
    chosen = tuple(i for i, name in names.items() if selects(options, name, inputs[i], placeholders[i], normalising))
    documents, refusal = packed_inputs(placeholders, inputs)
    if documents is None and refusal is None:
        states, batch, refusal = batch_states(placeholders, inputs)
        if batch is not None:
            tie_batch_sizes(placeholders, states, batch)
    else:
        states, batch = ({} if documents is None else shared_inputs(placeholders, inputs, documents)), None
    kept = tuple((i, n) for i in chosen if (n := numbers_kept(inputs[i], options)))
    plan = Plan(
        chosen, states, batch, refusal, tuple(names), options.memory, options.path, documents, kept,
        options.budget if chosen else None, options.per_example, len(placeholders),
    )  # fmt: skip
    assumed = frozenset(i for i, v in enumerate(inputs) if isinstance(states.get(i), Batched) and _unrecorded(v))
    free = [i for i, v in enumerate(inputs) if isinstance(v, Tensor) and not isinstance(v, nn.Parameter) and v.dim()]
    unmarked = {i: source_name(placeholders[i]) for i in free if marks.marked(inputs[i]) is marks.UNMARKED}
    return Capture(plan, names, tuple(i for i in names if i not in chosen), assumed, unmarked)


def _unrecorded(value: Any) -> bool:
    intermediate = isinstance(value, Tensor) and value.requires_grad and not value.is_leaf
    return intermediate and marks.marked(value) is marks.UNMARKED and marks.produced(value) is None


def source_name(node: Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name: Any = getattr(source, "name", node.name)
    return str(name() if callable(name) else name)


def parameter_name(node: Node) -> str:
    """``L['self']._modules['ln']._parameters['weight']`` -> ``ln.weight``."""
    parts = re.findall(r"\['([^']+)'\]|\.(\w+)|\[(\d+)\]", source_name(node))
    path = [a or b or c for a, b, c in parts]
    keep = [p for p in path if p not in ("_modules", "_parameters", "_buffers")]
    return ".".join(keep[1:]) or node.name


def is_data(node: Node, value: Any) -> bool:
    """A tensor that is neither a parameter nor lives on a module."""
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not is_module_state(node)


def is_module_state(node: Node) -> bool:
    """Buffers and other tensors that live on a module are not inputs that carry examples."""
    source = getattr(node, "_dynamo_source", None)
    kind = getattr(getattr(source, "guard_source", None), "name", "")
    return "NN_MODULE" in kind


# ------------------------------------------------------------------------------------------------------- selection


def selects(options: Options, name: str, parameter: Tensor, node: Node, normalising: Collection[str]) -> bool:
    if callable(options.params):
        return bool(options.params(name, parameter))
    return options.params == "all" or is_norm_parameter(node, parameter, normalising)


def numbers_kept(parameter: Tensor, options: Options) -> int:
    """How many numbers of a parameter have squares of their own; 0 where the option, the size or the dtype says no."""
    small = parameter.numel() <= MOST_NUMBERS and parameter.dtype.is_floating_point
    return parameter.numel() if options.elementwise and small else 0


def is_norm_parameter(node: Node, parameter: Tensor, normalising: Collection[str]) -> bool:
    """Scale or shift of a normalisation layer: a layer of PyTorch, a module called ``...Norm``, or one that normalises."""
    for user in node.users:
        if _called(user) in NORM_FUNCTIONS:
            return True
        module, kind = _module_of(user)
        if parameter.dim() > 1 or module is None:
            continue
        if "norm" in getattr(kind, "__name__", str(kind)).rsplit(".", 1)[-1].lower() or module in normalising:
            return True
    return False


def modules_that_normalise(graph: Graph) -> frozenset[str]:
    """The modules, by their key in ``nn_module_stack``, that divide by a norm or a deviation themselves."""
    found = (_module_of(node)[0] for node in graph.nodes if _called(node) in NORMALISES)
    return frozenset(module for module in found if module is not None)


def _module_of(node: Node) -> tuple[str | None, Any]:
    """The innermost module whose code a node comes from: its key and its class."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return None, None
    module = next(reversed(stack))
    return module, stack[module][1]


def _called(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


# -------------------------------------------------------------------------------------------------------- the batch


def packed_inputs(placeholders: Sequence[Node], inputs: Sequence[Any]) -> tuple[Documents | None, str | None]:
    """Which inputs hold packed documents, or why that cannot be told; (None, None) where none does."""
    tensors = [v for v in inputs if isinstance(v, Tensor)]
    found = [(v, mark) for v in tensors if isinstance(mark := marks.marked(v), marks.Packed)]
    if not found:
        return None, None
    marked, first = found[0]
    where = next((i for i, v in enumerate(inputs) if v is first.ids), None)
    if where is None:
        return None, UNSEEN
    if any(mark.ids is not first.ids for _, mark in found):
        return None, "two inputs were marked with different document ids"
    leading = marked.shape[:2] if first.boundaries and marked.shape[0] == 1 else marked.shape[: max(first.ids.dim(), 1)]
    packed = tuple(
        i
        for i, (node, v) in enumerate(zip(placeholders, inputs, strict=True))
        if i != where and is_data(node, v) and v.shape[: len(leading)] == leading and marks.marked(v) is not None
    )
    return Documents(where, first.boundaries, packed, len(leading)), None


def shared_inputs(placeholders: Sequence[Node], inputs: Sequence[Any], documents: Documents) -> dict[int, State]:
    """The states of inputs beside packed ones: shared, with a doubt where nothing says so."""
    states: dict[int, State] = {}
    for index, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
        if (
            is_data(node, value)
            and index not in (*documents.inputs, documents.ids)
            and marks.marked(value) is marks.UNMARKED
        ):
            states[index] = Shared(f"input {source_name(node)} does not have the shape of the document ids; {MANY}")
    return states


def batch_states(
    placeholders: Sequence[Node], inputs: Sequence[Any]
) -> tuple[dict[int, State], tuple[int, int, int] | None, str | None]:
    """States of the inputs, where the number of examples is read off, and a reason to refuse everything.

    Order of trust: what the user marked, what the graph that made the tensor recorded, then dimension 0 of the inputs
    whose dimension 0 has the common size. Sizes are those of this call: DDP hands over stand-ins, whose sizes are symbols.
    """
    states: dict[int, State] = {}
    pinned: dict[int, int] = {}
    guesses: dict[int, int] = {}
    folds: dict[int, int] = {}
    for index, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            continue
        mark = marks.marked(value)
        if mark is not marks.UNMARKED:
            if mark is not None:
                states[index] = Batched(mark)
                pinned[index] = size_hint(value.shape[mark])
            continue
        produced = marks.produced(value)
        if produced is not None:
            # what an earlier graph made of all examples owns no gradient of its own here
            states[index] = Shared(STATISTIC) if isinstance(produced, Shared) else produced
            if isinstance(produced, Batched):
                folds[index] = size_hint(produced.outer) * size_hint(produced.inner)
                pinned[index] = size_hint(value.shape[produced.dim]) // folds[index]
            continue
        if not value.requires_grad and source_name(node).startswith("L['___stack"):
            # what broke the graph made it, in eager code that left no trace
            states[index] = Shared(f"eager code at a graph break made an input of shape {list(value.shape)}; {MANY}")
        elif value.dim() and not is_module_state(node):
            guesses[index] = size_hint(value.shape[0])
    wide = {i: n for i, n in guesses.items() if inputs[i].dim() > 1}  # vectors of constants must not outvote the data
    sizes = Counter((pinned or wide or guesses).values())
    if not sizes:
        return states, None, f"no input of the compiled graph carries a batch dimension; {MANY}"
    if len(sizes) > 1 and pinned:
        found = ", ".join(f"{source_name(placeholders[i])} has {n}" for i, n in pinned.items())
        return states, None, f"the batch dimensions contradict each other: {found}; {MANY}"
    # the most frequent size; then not 1, which broadcasts; then the first input
    examples = max(sizes, key=lambda n: (n != 1, sizes[n]))
    where = min((i for i, n in (pinned or wide or guesses).items() if n == examples), key=lambda i: folds.get(i, 1))
    state = states.get(where)
    batch = (where, state.dim if isinstance(state, Batched) else 0, folds.get(where, 1))
    for index, size in guesses.items():
        name = source_name(placeholders[index])
        if size == examples:
            states[index] = Batched(0)
        else:
            states[index] = Shared(f"input {name} has {size} rows where the batch has {examples}; {MANY}")
    return states, batch, None if examples else EMPTY


def tie_batch_sizes(placeholders: Sequence[Node], states: dict[int, State], batch: tuple[int, int, int]) -> None:
    """Let inputs whose examples are the same ones have the same symbolic size: Dynamo makes one for each input, and what
    meets only after a reshape would not be known to fit. A call where the sizes differ is compiled anew."""
    where, dim, fold = batch
    sizes = [_size(placeholders[where], dim)] if fold == 1 else []
    for index, state in states.items():
        if isinstance(state, Batched) and state.outer == state.inner == 1:
            sizes.append(_size(placeholders[index], state.dim))
    symbols = [s for s in sizes if isinstance(s, torch.SymInt) and s.node.has_hint()]
    for size in symbols[1:]:
        bool(size == symbols[0])  # adds the guard


def _size(placeholder: Node, dim: int) -> Any:
    value = placeholder.meta.get("example_value")
    return value.shape[dim] if isinstance(value, Tensor) else None


def trains(inputs: Sequence[Any]) -> bool:
    """Whether there is something to measure: a trainable parameter, or an intermediate of a graph that has one."""
    return torch.is_grad_enabled() and any(
        isinstance(v, Tensor) and v.requires_grad and (isinstance(v, nn.Parameter) or not v.is_leaf) for v in inputs
    )
