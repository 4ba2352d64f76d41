"""The rules for rows chosen by data, against numbers: the rows of one example are perturbed, and only its own may move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from gnsfx.kernels.routed_norm import example_ids
from gnsfx.passes.joint_graph import JointGraph
from gnsfx.passes.propagate import propagate
from gnsfx.passes.rules.packed import ACROSS
from gnsfx.passes.rules.picks import PICKS
from gnsfx.passes.rules.routing import ROUTED
from gnsfx.passes.rules.table import overloads
from gnsfx.passes.state import Batched, Ids, Mixed, Partial, Routed, Shared

aten = torch.ops.aten
B, N, D, O, H = 3, 6, 4, 5, 2
ROWS = torch.tensor([0, 2, 1, 2, 0, 1])
"""The example of each routed row."""


@dataclass(frozen=True)
class Input:
    value: Callable[[], Tensor]
    dims: tuple[int, ...] | None = None
    across: tuple[int, ...] = ()
    batch: int | None = None


def r(*shape: int, at: Any = 0, across: tuple[int, ...] = ()) -> Input:
    dims = at if isinstance(at, tuple) else (at,)
    return Input(lambda: _apart(torch.randn(*shape, dtype=torch.float64), dims, across), dims, across)


def s(*shape: int) -> Input:
    return Input(lambda: torch.randn(*shape, dtype=torch.float64))


def x(*shape: int, at: int = 0) -> Input:
    return Input(lambda: torch.randn(*shape, dtype=torch.float64), batch=at)


def ints(high: int, *shape: int, at: Any = 0) -> Input:
    dims = None if at is None else at if isinstance(at, tuple) else (at,)
    return Input(lambda: torch.randint(high, shape), dims)


def positive(*shape: int) -> Input:
    return Input(lambda: torch.rand(*shape, dtype=torch.float64) + 0.5, (0,))


ROW_NUMBERS = Input(lambda: ROWS, (0,))
ROWS_AGAIN = Input(lambda: ROWS.unsqueeze(1).expand(N, D), (0,))


def _apart(value: Tensor, dims: tuple[int, ...], across: tuple[int, ...]) -> Tensor:
    """Entries between two documents are zero, as a mask leaves them."""
    if not across:
        return value
    shape = [value.shape[d] if d in (*dims, *across) else 1 for d in range(value.dim())]
    return value * (ROWS[:, None] == ROWS[None, :]).view(shape)


Row = tuple[str, tuple[Any, ...], dict[str, Any], bool]
TABLE: list[Row] = []


def sample(name: str, *args: Any, tangent: bool = False, **kwargs: Any) -> None:
    TABLE.extend((str(op), args, kwargs, tangent) for op in overloads(name))


sample("aten.mul.Tensor", r(N, D), s(D))
sample("aten.add.Tensor", r(N, D), r(N, D))
sample("aten.add.Tensor", r(D, N, at=1), r(N))
sample("aten.view.default", r(N, D, 1), [1, N, D])
sample("aten.view.default", r(2, 3, D, at=(0, 1)), [N, D])
sample("aten._unsafe_view.default", r(N, 2, D), [N, 2 * D])
sample("aten.reshape.default", r(N, 2 * D), [N, 2, D])
sample("aten.view_copy.default", r(N, 2 * D), [N, 2, D])
sample("aten.unsqueeze.default", r(N, D), 0)
sample("aten.squeeze.default", r(1, N, D, at=1))
sample("aten.squeeze.dim", r(N, 1, D), 1)
sample("aten.squeeze.dims", r(N, 1, D), [1])
sample("aten.permute.default", r(N, 2, D), [2, 0, 1])
sample("aten.permute.default", r(2, 3, D, at=(0, 1)), [1, 2, 0])
sample("aten.transpose.int", r(N, 2, D), 0, 1)
sample("aten.t.default", r(N, D))
sample("aten.expand.default", r(N, 1), [2, N, D])
sample("aten.slice.Tensor", r(N, D), 1, 1, 3)
sample("aten.flip.default", r(N, D), [1])
sample("aten.constant_pad_nd.default", r(N, D), [1, 2], 0.5)
sample("aten.glu.default", r(N, D), 1)
sample("aten.glu_backward.default", r(N, 2), r(N, D), 1)
for name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "topk"):
    sample(f"aten.{name}.default", r(N, D), *((2,) if name == "topk" else ()), 1)
sample("aten._softmax.default", r(N, D), 1, False)
sample("aten._log_softmax.default", r(N, D), 1, False)
sample("aten._softmax_backward_data.default", r(N, D), r(N, D), 1, torch.float64)
sample("aten._log_softmax_backward_data.default", r(N, D), r(N, D), 1, torch.float64)
sample("prims.prepare_softmax_online.default", r(N, D), 1)
sample("aten.slice_scatter.default", r(N, D), r(N, 2), 1, 0, 2)
sample("aten.select_scatter.default", s(N, D), r(N), 1, 2)
sample("aten.select.int", r(N, D), 1, 2)
sample("aten.select_copy.int", r(N, D), 1, 2)
sample("aten.unbind.int", r(D, N, at=1), 0)
sample("aten.split.Tensor", r(N, D), 2, 1)
sample("aten.split_with_sizes.default", r(N, D), [1, 3], 1)
sample("aten.cat.default", [r(N, D), r(N, D)], 1)
for name in ("sum.dim_IntList", "mean.dim"):
    sample(f"aten.{name}", r(N, D), [1])
    sample(f"aten.{name}", r(N, D), [0], tangent=True)
    sample(f"aten.{name}", r(2, 3, D, at=(0, 1)), [0], tangent=True)
for name in ("sum", "mean"):
    sample(f"aten.{name}.default", r(N, D), tangent=True)
for name, rest in {"amax.default": ([1],), "amin.default": ([1],), "prod.dim_int": (1,), "argmax.default": (1,), "argmin.default": (1,),
                   "max.dim": (1,), "min.dim": (1,), "var.correction": ([1],), "var_mean.correction": ([1],), "std.correction": ([1],),
                   "std_mean.correction": ([1],), "logsumexp.default": ([1],), "linalg_vector_norm.default": (2, [1]), "median.dim": (1,),
                   "mode.default": (1,), "kthvalue.default": (2, 1), "nansum.default": ([1],), "count_nonzero.dim_IntList": ([1],),
                   "nanmedian.dim": (1,)}.items():  # fmt: skip
    sample(f"aten.{name}", r(N, D), *rest)
for name in ("prod", "max", "min", "median", "nanmedian"):
    sample(f"aten.{name}.default", r(N, D))
BOOLS = Input(lambda: torch.rand(N, D) > 0.5, (0,))
for name, rest in {
    "any.dim": (1,),
    "any.dims": ([1],),
    "all.dim": (1,),
    "all.dims": ([1],),
    "any.default": (),
    "all.default": (),
}.items():
    sample(f"aten.{name}", BOOLS, *rest)
sample("aten.mm.default", r(N, D), s(D, O))
sample("aten.mm.default", s(O, D), r(D, N, at=1))
sample("aten.mm.default", r(D, N, at=1), r(N, O), tangent=True)
sample("aten.bmm.default", r(2, 3, D, at=(0, 1)), s(2, D, O))
sample("aten.bmm.default", r(2, D, 3, at=(0, 2)), r(2, 3, O, at=(0, 1)), tangent=True)
sample("aten.bmm.default", r(N, 2, D), r(N, D, O))
sample("aten.addmm.default", s(O), r(N, D), s(D, O))
sample("aten.baddbmm.default", s(2, 1, O), r(2, N, D, at=1), s(2, D, O))
sample("aten.index.Tensor", s(7, D), [ints(7, N)])
sample("aten.index.Tensor", r(N, D), [None, ints(D, 3, at=None)])
sample("aten.index.Tensor", x(B, D), [ROW_NUMBERS])
sample("aten.index.Tensor", r(N, D), [ints(N, 5, at=None)])
sample("aten._unsafe_index.Tensor", x(B, D), [ROW_NUMBERS])
sample("aten.index_put.default", s(B, D), [ROW_NUMBERS], r(N, D), True)
sample("aten.index_put.default", s(7, D), [ints(7, N)], r(N, D), True, tangent=True)
sample("aten._unsafe_index_put.default", s(7, D), [ints(7, N, at=None)], r(N, D), True, tangent=True)
sample("aten._unsafe_masked_index_put_accumulate.default", s(7, D), Input(lambda: torch.rand(N, 1) > 0.3), [ints(7, N, at=None)],
       r(N, D), tangent=True)  # fmt: skip
sample("aten.scatter.src", s(N, 9), 1, ints(9, N, D), r(N, D))
sample("aten.scatter.value", s(N, 9), 1, ints(9, N, D), 0.5)
sample("aten.scatter_add.default", s(N, 9), 1, ints(9, N, D), r(N, D))
sample("aten.scatter_add.default", s(B, D), 0, ROWS_AGAIN, r(N, D))
sample("aten.index_add.default", s(B, D), 0, ROW_NUMBERS, r(N, D))
sample("aten.index_copy.default", s(B, D), 0, ROW_NUMBERS, r(N, D))
sample("aten.gather.default", r(N, D), 1, ints(D, N, 2))
sample("aten.gather.default", x(B, D), 0, ROWS_AGAIN)
sample("aten.index_select.default", x(B, D), 0, ROW_NUMBERS)
sample("aten.embedding.default", s(7, D), ints(7, N))
sample("aten.embedding_dense_backward.default", r(N, D), ints(7, N), 7, -1, False, tangent=True)
sample("aten.sort.default", ints(50, N))
sample("aten.sort.stable", ints(50, N), stable=True)
sample("aten.sort.default", r(N, D), 1)
sample("aten.nonzero.default", Input(lambda: torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool), (0,)))
sample("aten.histc.default", r(N), 4, -3.0, 3.0)
sample("aten.bincount.default", ints(4, N))
sample("aten.native_layer_norm.default", r(N, D), [D], s(D), s(D), 1e-5)
sample("aten._fused_rms_norm.default", r(N, D), [D], s(D), 1e-5)
sample(
    "aten.native_layer_norm_backward.default",
    r(N, D),
    r(N, D),
    [D],
    r(N, 1),
    positive(N, 1),
    s(D),
    s(D),
    [True, True, True],
    tangent=True,
)
sample("aten.zeros_like.default", r(N, D))
sample("aten.mul.Tensor", r(H, N, N, at=1, across=(2,)), r(H, N, 1, at=1))
sample("aten.add.Tensor", r(H, N, N, at=1, across=(2,)), s(N, N))
sample("aten.view.default", r(1, H, N, N, at=2, across=(3,)), [H, N, N])
sample("aten.permute.default", r(H, N, N, at=1, across=(2,)), [0, 2, 1])
sample("aten.transpose.int", r(H, N, N, at=1, across=(2,)), 0, 1)
sample("aten.expand.default", r(1, N, N, at=1, across=(2,)), [H, N, N])
sample("aten._softmax.default", r(H, N, N, at=1, across=(2,)), 2, False)
sample(
    "aten._softmax_backward_data.default",
    r(H, N, N, at=1, across=(2,)),
    r(H, N, N, at=1, across=(2,)),
    2,
    torch.float64,
)
sample("aten.sum.dim_IntList", r(H, N, N, at=1, across=(2,)), [2], True)
sample("aten.sum.dim_IntList", r(H, N, N, at=1, across=(2,)), [1])
sample("aten.sum.dim_IntList", r(H, N, N, at=1, across=(2,)), [0])
sample("aten.amax.default", r(H, N, N, at=1, across=(2,)), [2], True)
sample("aten.bmm.default", r(H, N, N, at=1, across=(2,)), r(H, N, D, at=1))
sample("aten.bmm.default", r(H, N, N, at=2, across=(1,)), r(H, N, D, at=1))
sample("aten.bmm.default", r(H, D, N, at=2), r(H, N, N, at=1, across=(2,)))
sample("aten.mm.default", r(N, N, across=(1,)), s(N, D))
NUMBERED = {id(ROW_NUMBERS), id(ROWS_AGAIN)}
CANNOT = {
    "aten._fused_rms_norm_backward.default",
    "aten._grouped_mm.default",
    "aten.bmm.dtype",
    "aten.empty_like.default",
    "aten.empty_permuted.default",
    "aten.full_like.default",
    "aten.masked_scatter.default",
    "aten.mm.dtype",
    "aten.new_empty.default",
    "aten.new_empty_strided.default",
    "aten.new_full.default",
    "aten.new_ones.default",
    "aten.new_zeros.default",
    "aten.ones_like.default",
}
"""Constants; ops that the CPU does not run; the two that whole models test."""


def leaves(value: Any) -> list[Input]:
    if isinstance(value, (list, tuple)):
        return [i for v in value for i in leaves(v)]
    return [value] if isinstance(value, Input) else []


def put(value: Any, of: Callable[[Input], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(put(v, of) for v in value)
    return of(value) if isinstance(value, Input) else value


def claim(name: str, args: Any, kwargs: Any, tangent: bool, values: dict[int, Tensor]) -> Any:
    """The state of the op in a graph of its own."""
    graph, states, mode = Graph(), {}, FakeTensorMode()
    nodes: dict[int, Any] = {}

    def place(key: int, value: Tensor) -> Any:
        node = graph.placeholder(f"p{len(nodes)}")
        node.meta["val"] = mode.from_tensor(value)
        nodes[key] = node
        return node

    numbers = place(-1, ROWS)
    inputs = {0: numbers}
    ids = Ids(numbers, 1, B, packed=True)
    states[0] = Routed((0,), ids)
    for i in leaves((args, list(kwargs.values()))):
        if id(i) in nodes:
            continue
        if i is ROW_NUMBERS:
            nodes[id(i)] = numbers
            continue
        node = place(id(i), values[id(i)])
        inputs[len(inputs)] = node
        if i.dims is not None:
            states[len(inputs) - 1] = Routed(i.dims, ids, i.across)
        elif i.batch is not None:
            states[len(inputs) - 1] = Batched(i.batch)
    for i in leaves(args):
        if i is ROWS_AGAIN:
            wide = graph.call_function(aten.unsqueeze.default, (numbers, 1))
            wide.meta["val"] = mode.from_tensor(ROWS.unsqueeze(1))
            nodes[id(i)] = graph.call_function(aten.expand.default, (wide, [N, D]))
            nodes[id(i)].meta["val"] = mode.from_tensor(values[id(i)])
    op = next(o for o in overloads(name) if str(o) == name)
    node = graph.call_function(op, put(args, lambda i: nodes[id(i)]), kwargs)
    with torch.no_grad():
        node.meta["val"] = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, run(name, args, kwargs, values))
    if isinstance(node.meta["val"], tuple):
        for k in range(len(node.meta["val"])):
            graph.call_function(__import__("operator").getitem, (node, k)).meta["val"] = node.meta["val"][k]
    view = JointGraph(graph, inputs=inputs)
    if tangent:
        view.backward.add(node)
    found = propagate(view, states, B)[node]
    return found, numbers


def run(name: str, args: Any, kwargs: Any, values: dict[int, Tensor]) -> Any:
    op = next(o for o in overloads(name) if str(o) == name)
    return op(*put(args, lambda i: values[id(i)]), **kwargs)


def owner(state: Any, value: Tensor, results: Any) -> Tensor | None:
    """The example of every entry, as the state claims it."""
    if isinstance(state, Batched):
        shape = [-1 if d == state.dim else 1 for d in range(value.dim())]
        rows = torch.arange(value.shape[state.dim]) // int(state.inner) % B
        return rows.view(shape).expand(value.shape)
    if not isinstance(state, Routed):
        return None
    takes = [results[int(t.args[1])] if t.target is __import__("operator").getitem else t for t in state.ids.takes]
    if any(not isinstance(t, Tensor) for t in takes):
        return None  # rows taken by an input of the sample: whole models test it
    ids = example_ids(ROWS, None, takes, 1, B, B)
    ordered = sorted(state.dims)
    ids = ids.view([value.shape[d] for d in state.dims]).permute([state.dims.index(d) for d in ordered])
    return ids.reshape([value.shape[d] if d in ordered else 1 for d in range(value.dim())]).expand(value.shape)


def masked(i: Input, value: Tensor, b: int) -> Tensor:
    """The input with the rows of all other examples set to zero."""
    assert i.dims is not None
    ids = ROWS.view([value.shape[d] for d in i.dims])
    keep = (ids == b).permute([i.dims.index(d) for d in sorted(i.dims)])
    return value * keep.view([value.shape[d] if d in i.dims else 1 for d in range(value.dim())])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}")
def test_rule(row: Row) -> None:
    name, args, kwargs, tangent = row
    torch.manual_seed(0)
    inputs = list({id(i): i for i in leaves((args, list(kwargs.values())))}.values())
    values = {id(i): i.value() for i in inputs}
    found, _ = claim(name, args, kwargs, tangent, values)
    states = found if isinstance(found, tuple) else (found,)
    assert not any(isinstance(state, Mixed) for state in states), [s.reason for s in states if isinstance(s, Mixed)]
    before = run(name, args, kwargs, values)
    results = before if isinstance(before, (tuple, list)) else (before,)
    floats = [i for i in inputs if (i.dims is not None or i.batch is not None) and values[id(i)].is_floating_point()]
    for state, index in zip(states, range(len(states)), strict=True):
        if isinstance(state, Partial):
            parts = []
            for b in range(B):
                grads = floats[:1] if "norm_backward" in name else floats
                own = {**values, **{id(i): masked(i, values[id(i)], b) for i in grads}}
                own |= {
                    id(i): torch.zeros_like(values[id(i)])
                    for i in inputs
                    if i.dims is None and "put" in name and i is args[0]
                }
                part = run(name, args, kwargs, own)
                parts.append(part[index] if isinstance(part, tuple) else part)
            whole = results[index] - (values[id(args[0])] if "put" in name else 0)
            torch.testing.assert_close(torch.stack(parts).sum(0), whole)
    for b in range(B):
        moved = dict(values)
        for i in floats:
            change = torch.randn_like(values[id(i)])
            if i.batch is not None:
                change = change * (torch.arange(B) == b).view([-1 if d == i.batch else 1 for d in range(change.dim())])
            else:
                change = _apart(masked(i, change, b), i.dims or (), i.across)
            moved[id(i)] = values[id(i)] + change
        after = run(name, args, kwargs, moved)
        after = after if isinstance(after, (tuple, list)) else (after,)
        for state, old, new in zip(states, results, after, strict=True):
            ids = owner(state, old, results)
            if ids is not None and not isinstance(state, Shared):
                assert not bool(((old != new) & (ids != b)).any()), f"{name}: rows of others moved"


def test_every_rule_has_a_sample() -> None:
    sampled = {row[0] for row in TABLE}
    tables = {str(op) for table in (ROUTED, ACROSS) for op in table} - {
        str(op) for op in ROUTED if "scaled_dot_product" in str(op)
    }
    assert sorted(tables - sampled - CANNOT) == []
    assert {str(op) for op in PICKS} <= sampled | {"aten.masked_select.default"}
