"""Samples of PyTorch's operator database as joint graphs, and the places where their examples may be."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_unflatten

from gnsfx._torch import aot_autograd, default_partition, make_boxed_func, select_decomp_table
from gnsfx.passes.attach_collectors import add_leaves
from gnsfx.passes.joint_graph import JointGraph, read_joint_graph
from gnsfx.passes.rules.reductions import SCANS
from gnsfx.passes.state import Batched, Routed

LARGE = 4000  # entries; what is larger is left to other samples


# ------------------------------------------------------------------------------------------------------- the samples


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def operators() -> list[Any]:
    with quiet():
        from torch.testing._internal.common_methods_invocations import op_db
    return list(op_db)


def samples_of(info: Any, limit: int) -> Iterator[Any]:
    """Samples of the operator in double precision where it has it, with tensors small enough."""
    dtypes = info.supported_dtypes("cpu")
    dtype = next(
        (d for d in (torch.float64, torch.float32, torch.int64, torch.bool, torch.complex128) if d in dtypes), None
    )
    if dtype is None:
        return
    torch.manual_seed(0)
    differentiable = info.supports_autograd and dtype.is_floating_point
    kept = 0
    for sample in itertools.islice(info.sample_inputs("cpu", dtype, requires_grad=differentiable), 200):
        tensors = [t for t in tree_flatten((sample.input, sample.args, sample.kwargs))[0] if isinstance(t, Tensor)]
        if any(t.dim() and max(t.shape) > 1 for t in tensors) and all(0 < t.numel() < LARGE for t in tensors):
            yield sample
            kept += 1
            if kept == limit:
                return


class Traced:
    """A sample as a joint graph of its tensors, with the values of all nodes."""

    def __init__(self, info: Any, sample: Any) -> None:
        leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        self.where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.inputs = [leaves[i].detach().clone().requires_grad_(leaves[i].requires_grad) for i in self.where]

        def call(*tensors: Tensor) -> list[Tensor]:
            values = list(leaves)
            for i, t in zip(self.where, tensors, strict=True):
                values[i] = t
            first, args, kwargs = tree_unflatten(values, spec)
            results = tree_flatten(sample.output_process_fn_grad(info.op(first, *args, **kwargs)))[0]
            return [r for r in results if isinstance(r, Tensor)]

        self.call = call
        self.graph = self._trace()
        self.view = read_joint_graph(self.graph)
        self.values = self.run(self.graph, self.view, {})
        self.random = any(is_random(n) for n in self.graph.nodes)

    def _trace(self) -> Graph:
        graph, kept = Graph(), []
        nodes = [graph.placeholder(f"x{i}") for i in range(len(self.inputs))]
        packed = graph.call_function(self.call, tuple(nodes))
        with torch.no_grad():
            count = len(self.call(*[t.detach().clone() for t in self.inputs]))
        graph.output(tuple(graph.call_function(lambda r, i: r[i], (packed, i)) for i in range(count)))
        gm = add_leaves(GraphModule(torch.nn.Module(), graph), ["leaf", "rows"])

        def partition(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            kept.append(copied(joint.graph))
            self.constants = {n.target: getattr(joint, n.target) for n in joint.graph.nodes if n.op == "get_attr"}
            return default_partition(joint, joint_inputs, **kwargs)

        compiler = aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g.forward), partition_fn=partition,
                                decompositions=select_decomp_table())  # fmt: skip
        self.leaves = [torch.zeros(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        with torch.enable_grad():
            compiler(gm, [*self.inputs, *self.leaves])
        return kept[0]

    def placeholders(self, graph: Graph, view: JointGraph) -> dict[Node, Any]:
        values = [t.detach() for t in (*self.inputs, *self.leaves)]
        env = {node: values[index] for index, node in view.inputs.items()}
        tokens = [n for n in graph.nodes if n.op == "placeholder" and n not in env]  # they order side effects
        env |= {n: torch.empty(0) for n in tokens}
        for number, node in enumerate(view.tangents):
            torch.manual_seed(100 + number)
            env[node] = torch.randn(node.meta["val"].shape, dtype=node.meta["val"].dtype)
        return env

    def run(self, graph: Graph, view: JointGraph, fixed: dict[Node, Any]) -> dict[Node, Any]:
        env = self.placeholders(graph, view) | fixed
        for node in graph.nodes:
            if node.op == "get_attr":
                env[node] = self.constants[node.target]
            elif node.op == "call_function" and node not in env:
                env[node] = evaluate(node, env)
        return env


def copied(graph: Graph) -> Graph:
    copy = Graph()
    env: dict[Node, Node] = {}
    copy.output(copy.graph_copy(graph, env))
    copy.output_node().meta = dict(graph.output_node().meta)
    return copy


def evaluate(node: Node, env: dict[Node, Any]) -> Any:
    torch.manual_seed(7)
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or "empty" in str(node.target)


# ------------------------------------------------------------------------------------------- where the examples may be


Choice = tuple[int, dict[int, Batched]]
"""The number of examples, and the state of each batched input."""


def choices(shapes: Sequence[Sequence[int]]) -> list[Choice]:
    """Each dimension alone, all tensors with the same size at the same place together, and both folded."""
    found: list[tuple[int, list[tuple[int, int]]]] = []
    for n in sorted({s for shape in shapes for s in shape if s > 1}):
        for dim in (0, 1, -1, -2):
            group = [(i, dim % len(s)) for i, s in enumerate(shapes) if -len(s) <= dim < len(s) and s[dim] == n]
            if group:
                found.append((n, group))
    found += [(n, [(i, d)]) for i, shape in enumerate(shapes) for d, n in enumerate(shape) if n > 1]
    result: dict[Any, Choice] = {}
    for n, group in found:
        for B, outer, inner in [(n, 1, 1), (n // 2, 2, 1), (n // 2, 1, 2)]:
            if B > 1 and B * outer * inner == n:
                result.setdefault((B, outer, inner, *group), (B, {i: Batched(d, outer, inner) for i, d in group}))
    plain = [c for key, c in result.items() if key[1] == key[2] == 1]
    return plain + [c for key, c in result.items() if key[1] > 1 or key[2] > 1]


def labels(state: Batched | Routed, value: Tensor, B: int, env: dict[Node, Any]) -> Tensor | None:
    """Which example each entry belongs to; None where the claim does not fit the size."""
    dims = state.dims if isinstance(state, Routed) else (state.dim,)
    if any(d >= value.dim() for d in dims):
        return None
    if isinstance(state, Routed):
        rows = env[state.ids.rows]
        rows = rows.flatten() if state.ids.column is None else rows.nonzero()[:, state.ids.column]
        for take in state.ids.takes:
            rows = rows[env[take].flatten()]
        mine = rows % state.ids.total // state.ids.inner % B
    else:
        mine = torch.arange(value.shape[state.dim]) // int(state.inner) % B
        if value.shape[state.dim] != state.outer * B * state.inner:
            return None
    sizes = [value.shape[d] for d in dims]
    if mine.numel() != torch.Size(sizes).numel():
        return None
    spread = mine.view(sizes).permute(sorted(range(len(dims)), key=dims.__getitem__))
    return spread.reshape([value.shape[d] if d in dims else 1 for d in range(value.dim())]).expand(value.shape)


def other(value: Tensor, state: Batched | Routed, B: int) -> Tensor:
    """Other values that the operator accepts in the same place: those of the next example, changed a little."""
    if isinstance(state, Routed):
        return value * 0.9 + 0.1
    split = value.unflatten(state.dim, (int(state.outer), B, int(state.inner)))
    rolled = split.roll(1, state.dim + 1).flatten(state.dim, state.dim + 2)
    if value.is_floating_point() or value.is_complex():
        torch.manual_seed(3)
        return rolled * (0.9 + 0.2 * torch.rand(value.shape).to(value.dtype))
    return rolled


def numbers_rows(node: Node, state: Any) -> bool:
    """Whether integers are counted along the examples, as for the places in a queue."""
    scan = node.target in (torch.ops.aten.cumsum.default, *SCANS)
    return scan and isinstance(state, Batched) and not node.meta["val"].is_floating_point()
