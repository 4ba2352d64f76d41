"""Norm layers whose backward is one op of the joint graph: those that are measured as such stay, the others are decomposed.

    native_layer_norm_backward(g, x, dims, mean, rstd, w, b)    ->  dx, dw, db       as traced where a device has our kernel
    _fused_rms_norm_backward(g, x, dims, rstd, w)               ->  dx, dw
                                                                ->  what PyTorch decomposes them to, where ours does not fit

Ours fits where dw or db is all of the gradient of a parameter to measure, and an example has several positions. Whatever else
may be is then measured as on any other device.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from gnsfx._torch import known, select_decomp_table, size_hint, tree_map
from gnsfx.errors import GraphError
from gnsfx.kernels import gpu
from gnsfx.kernels.ops import norm_takes
from gnsfx.passes.contractions import Factor, Lifted
from gnsfx.passes.emit import Emitter
from gnsfx.passes.find_contractions import contraction
from gnsfx.passes.joint_graph import JointGraph, fake, read_joint_graph
from gnsfx.passes.propagate import States, propagate
from gnsfx.passes.rules.table import arguments, overloads
from gnsfx.passes.state import Batched, Partial, Shared, Size, State, product, same_place, same_sizes
from gnsfx.passes.terms import find_terms

NORM_BACKWARDS = frozenset(
    overloads("aten.native_layer_norm_backward.default", "aten._fused_rms_norm_backward.default")
)


class NormGradient(Lifted):
    """The gradient of a norm layer's scale or shift: result 1 or 2 of its backward."""


@contraction(*((op, index) for op in NORM_BACKWARDS for index in (1, 2)))
def norm_contraction(node: Node, states: States) -> NormGradient | None:
    op = arguments(node.args[0])  # type: ignore[arg-type]
    operands = [op[name] for name in ("grad_out", "input", "mean", "rstd") if op.get(name) is not None]
    return NormGradient(node, tuple(Factor(n, s) for n in operands if isinstance(s := states.get(n), Batched)))


def settle(
    view: JointGraph,
    inputs: Mapping[int, State],
    examples: Size,
    slots: Collection[int],
    entries: Collection[int],
    apart: bool,
) -> tuple[JointGraph, States]:
    """Decompose the norm layers that ours does not fit, and propagate: the graph and its states.

    ``slots``: parameters to measure, ``entries``: those of which the squares of single numbers are kept; ``apart``: decompose
    all of them.
    """
    left = list(norm_layers(view.graph))
    if not left:
        return view, propagate(view, inputs, examples)
    apart = apart or known(examples == 1)
    view = _without(view, [n for n in left if apart or not fits(n, examples)], examples)
    states = propagate(view, inputs, examples)
    left = list(norm_layers(view.graph))
    if not left:
        return view, states
    wanted = measured_alone(view, states, slots, entries)
    misfits = [n for n in left if n not in wanted or not apart_by_example(n, states)]
    if misfits:
        view = _without(view, misfits, examples)
        states = propagate(view, inputs, examples)
    return view, states


def norm_layers(graph: Graph) -> Iterator[Node]:
    return (n for n in graph.nodes if n.target in NORM_BACKWARDS)


def _without(view: JointGraph, misfits: Sequence[Node], examples: Size) -> JointGraph:
    decompose(view.graph, misfits, examples)
    return read_joint_graph(view.graph) if misfits else view


# ------------------------------------------------------------------------------------------------------- what fits


def fits(node: Node, examples: Size) -> bool:
    """Whether shapes, dtypes and strides are those that our op takes and gives back."""
    op = arguments(node)
    weight, bias = op["weight"], op.get("bias")
    x, g = op["input"].meta["val"], op["grad_out"].meta["val"]
    out = x.dtype if weight is None else weight.meta["val"].dtype
    if bias is not None and bias.meta["val"].dtype != out:
        return False
    dx = node.meta["val"][0]
    values = [g, x, *(n.meta["val"] for n in (weight, bias) if n is not None)]
    return shapes_fit(values, tuple(op["normalized_shape"]), examples) and (dx is None or memory_order(dx) is not None)


def shapes_fit(values: Sequence[torch.Tensor], normalized: Sequence[Size], examples: Size) -> bool:
    """``values``: output gradient, input, and what else is read."""
    g, x = values[:2]
    D = product(tuple(normalized))
    if not isinstance(D, int) or not norm_takes(D, *values) or "norm" not in gpu.kernels_on(x.device):
        return False
    trailing = tuple(x.shape[x.dim() - len(normalized) :])
    rows = product(tuple(x.shape[: x.dim() - len(normalized)]))
    return same_sizes(trailing, normalized) and same_sizes(g.shape, x.shape) and not known(rows == examples)


def memory_order(value: torch.Tensor) -> list[int] | None:
    """The dimensions as they lie in memory, the outermost first; None where entries have gaps or share memory. Adds no guard."""
    order = sorted(range(value.dim()), key=lambda d: -size_hint(value.stride(d)))
    return order if in_order(value, order) else None


def in_order(value: torch.Tensor, order: Sequence[int]) -> bool:
    """Whether the entries lie in memory without gaps, with the dimensions in that order."""
    step: Size = 1
    for d in reversed(order):
        if not known(value.shape[d] == 1):
            if not known(value.stride(d) == step):
                return False
            step = step * value.shape[d]
    return True


def apart_by_example(node: Node, states: States) -> bool:
    """Whether the rows of the output gradient and of the input are those of the same examples."""
    op = arguments(node)
    operands = [op[n] for n in ("grad_out", "input", "mean", "rstd") if op.get(n) is not None]
    axis = len(op["input"].meta["val"].shape) - len(op["normalized_shape"])
    return rows_match(operands, op["weight"], axis, states)


def rows_match(operands: Sequence[Node], weight: Node | None, axis: int, states: States) -> bool:
    found = [states.get(n) for n in operands]
    first = found[0]
    if not isinstance(first, Batched) or first.dim >= axis or not all(same_place(s, first) for s in found):
        return False
    shared = Shared() if weight is None else states.get(weight)
    return isinstance(shared, Shared)


def measured_alone(view: JointGraph, states: States, slots: Collection[int], entries: Collection[int]) -> set[Node]:
    """Norm layers with a parameter to measure whose gradient is nothing else, and no part of any other such gradient.

    Where the squares of single numbers are kept the contributions have to exist, which they do not inside our op.
    """
    alone, entangled = set(), set()
    for slot in slots:
        gradient = view.grads.get(slot)
        if gradient is None or not isinstance(states.get(gradient), Partial):
            continue
        terms = find_terms(gradient, states) or ()
        single = len(terms) == 1 and slot not in entries and isinstance(terms[0].contraction, NormGradient)
        (alone if single else entangled).update(_behind(gradient, states))
    return alone - entangled


def _behind(gradient: Node, states: States) -> Iterable[Node]:
    """The norm layers that a gradient comes from by way of what is summed over the examples."""
    stack, seen = [gradient], {gradient}
    while stack:
        node = stack.pop()
        if node.target is operator.getitem and node.args[0].target in NORM_BACKWARDS:  # type: ignore[union-attr]
            yield node.args[0]  # type: ignore[misc]
            continue
        fresh = [n for n in node.all_input_nodes if isinstance(states.get(n), Partial) and n not in seen]
        seen.update(fresh)
        stack += fresh


# -------------------------------------------------------------------------------------------------- decomposition


def decompose(graph: Graph, nodes: Collection[Node], examples: Size) -> None:
    """Put PyTorch's decomposition in the place of each node, with its metadata: the user's line, and autograd's number."""
    emit = Emitter(graph, examples) if nodes else None
    for node in nodes:
        assert emit is not None
        results = _decomposed(node, emit)
        for user in list(node.users):
            assert user.target is operator.getitem
            value = results[user.args[1]]  # type: ignore[index]
            if user.users:
                user.replace_all_uses_with(value)
            graph.erase_node(user)
        graph.erase_node(node)


def _decomposed(node: Node, emit: Emitter) -> Sequence[Node]:
    inputs = list(dict.fromkeys(node.all_input_nodes))

    def apply(*values: Any) -> tuple[Any, ...]:
        env = dict(zip(inputs, values, strict=True))
        args, kwargs = tree_map(lambda a: env.get(a, a) if isinstance(a, Node) else a, (node.args, node.kwargs))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with emit.fake_mode:
        traced = make_fx(apply, decomposition_table=select_decomp_table())(*map(fake, inputs))
    env: dict[Node, Any] = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    kept = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta", "partitioner_tag")}
    with emit.at(node):
        for inner in traced.graph.nodes:
            if inner.op == "output":
                return [env.get(a, a) for a in inner.args[0]]
            if inner.op == "call_function":
                args, kwargs = tree_map(
                    lambda a: env.get(a, a) if isinstance(a, Node) else a, (inner.args, inner.kwargs)
                )
                env[inner] = emit(inner.target, *args, **kwargs)
                env[inner].meta.update(kept)
                if "partitioner_tag" in node.meta:
                    env[inner].meta["partitioner_tag"] = node.meta["partitioner_tag"]
                else:
                    env[inner].meta.pop("partitioner_tag", None)
            elif inner.op != "placeholder":
                raise GraphError(f"the decomposition of {node.target} holds a constant ({inner.format_node()}).")
    raise GraphError(f"the decomposition of {node.target} returns nothing.")
