"""Gathers, scatters and lookups.

table[ids], ids (B, T)                       index batched -> batched(0)
x[arange(B), position]                       each example picks in itself -> batched(0)
table.index_put(ids, g, accumulate=True)     backward of a lookup -> partial
x[permutation]                               examples are picked by the index -> mixed
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from gnsfx._torch import known
from gnsfx.passes.rules.table import Op, aligned, overloads, rule
from gnsfx.passes.state import Batched, Mixed, Shared, Size, State, reshape, rows, same_fold, same_sizes

aten, prims = torch.ops.aten, torch.ops.prims
PICKED = "indexes the examples themselves"


@rule(*overloads("aten.embedding.default"), linear=["weight"])
def embedding_rule(op: Op) -> State:
    return op.mixed(PICKED) if op.batched("weight") else op.state("indices")


@rule(*overloads("aten.embedding_dense_backward.default"), linear=["grad_output"])
def embedding_backward_rule(op: Op) -> State:
    g, ids = op.state("grad_output"), op.state("indices")
    if isinstance(g, Batched) and isinstance(ids, Batched) and not (g.dim == ids.dim and same_fold(g, ids)):
        return op.mixed("the examples lie along different dimensions of indices and gradient")
    if isinstance(g, Batched) and g.dim == len(op.shape("grad_output")) - 1:
        return g.at(1)  # the width is batched, not the rows
    if op["scale_grad_by_freq"]:
        return op.mixed("scale_grad_by_freq divides by how often an index occurs in the whole batch")
    return op.contracted()


class Layout:
    """How advanced indexing maps dimensions: indices broadcast to ``shape`` and land at ``start`` of the result."""

    def __init__(self, op: Op, indices: list[Node | None]) -> None:
        self.where = [i for i, x in enumerate(indices) if x is not None]
        self.nodes = [x for x in indices if x is not None]
        self.masks = any(x.meta["val"].dtype in (torch.bool, torch.uint8) for x in self.nodes)
        self.shape: tuple[Size, ...] = tuple(torch.broadcast_shapes(*(op.shape(x) for x in self.nodes)))
        adjacent = self.where[-1] - self.where[0] + 1 == len(self.where)
        self.start = self.where[0] if adjacent else 0

    def outside(self, dim: int) -> int:
        """Where a dimension of the indexed tensor that is not indexed lands in the result."""
        before = dim - sum(w < dim for w in self.where)
        return before if before < self.start else before + len(self.shape)

    def inside(self, dim: int, ndim: int) -> int | None:
        """The dimension of the indexed tensor that lands at ``dim`` of the result, None for an indexed one."""
        return next((d for d in range(ndim) if d not in self.where and self.outside(d) == dim), None)


def own_index(op: Op, node: Node, state: Batched) -> Batched | None:
    """Where ``node`` is ``arange(rows)`` up to views: the axis along which each row of ``state`` names itself."""
    if node.target is prims.iota.default:
        plain = node.kwargs.get("start") == 0 and node.kwargs.get("step") == 1
        length: Any = node.args[0]
        length = length.meta["val"] if isinstance(length, Node) else length
        return state.at(0) if plain and known(length == rows(state, op.examples)) else None
    if node.target in (aten.arange.default, aten.arange.start_step):
        plain = node.target is aten.arange.default or (node.args[0] == 0 and (len(node.args) < 3 or node.args[2] == 1))
        return state.at(0) if plain and known(node.meta["val"].shape[0] == rows(state, op.examples)) else None
    if node.target in (
        aten.view.default,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.clone.default,
        aten.slice.Tensor,
        prims.convert_element_type.default,
    ):
        source = node.args[0]
        assert isinstance(source, Node)
        if node.target is aten.slice.Tensor and not same_sizes(op.shape(node), op.shape(source)):
            return None
        found = own_index(op, source, state)
        if found is None or node.target in (aten.clone.default, aten.slice.Tensor, prims.convert_element_type.default):
            return found
        if node.target is aten.expand.default:
            return found.at(found.dim + len(op.shape(node)) - len(op.shape(source)))
        return reshape(found, op.shape(source), op.shape(node), op.examples)
    return None


@rule(
    *overloads("aten.index.Tensor", "aten._unsafe_index.Tensor", "aten._unsafe_masked_index.default"), linear=["self"]
)
def index_rule(op: Op) -> State:
    layout, own = Layout(op, op["indices"]), op.state("self")
    nodes = layout.nodes + ([op["mask"]] if "mask" in op.args else [])
    index = aligned(op, layout.nodes, layout.shape)
    if isinstance(index, Mixed):
        return index
    if "mask" in op.args and isinstance(op.state("mask"), Batched) and not isinstance(index, Batched):
        return op.mixed("a mask that depends on the example over an index that does not")
    if layout.masks:
        return op.mixed("selects rows by a boolean mask; the example of a row then depends on the data")
    del nodes
    if not isinstance(own, Batched):
        return index.at(layout.start + index.dim) if isinstance(index, Batched) else Shared()
    if own.dim not in layout.where:
        return (
            op.mixed("an index that depends on the example over a dimension beside the batch")
            if isinstance(index, Batched)
            else own.at(layout.outside(own.dim))
        )
    axis = own_axis(op, layout, own)
    if axis is None or (isinstance(index, Batched) and (index.dim != axis or not same_fold(index, own))):
        return op.mixed(PICKED)
    return own.at(layout.start + axis)


def own_axis(op: Op, layout: Layout, state: Batched) -> int | None:
    """The axis of the broadcast indices along which the batched dimension is indexed by ``arange``."""
    if state.dim not in layout.where:
        return None
    node = layout.nodes[layout.where.index(state.dim)]
    found = own_index(op, node, state)
    return None if found is None else found.dim + len(layout.shape) - len(op.shape(node))


@rule(*overloads("aten.index_put.default", "aten._unsafe_index_put.default", "aten._unsafe_masked_index_put_accumulate.default"),
      linear=["self values"])  # fmt: skip
def index_put_rule(op: Op) -> State:
    layout, own, ndim = Layout(op, op["indices"]), op.state("self"), len(op.shape("self"))
    if layout.masks:
        return op.mixed("writes rows chosen by a boolean mask; the example of a row then depends on the data")
    index = aligned(op, layout.nodes, layout.shape)
    if isinstance(index, Mixed):
        return index
    width = len(layout.shape) + ndim - len(layout.where)
    at: list[Batched] = [index.at(layout.start + index.dim)] if isinstance(index, Batched) else []
    for name in ("values", "mask"):
        state = op.state(name) if name in op.args else None
        if isinstance(state, Batched):
            at.append(state.at(state.dim + width - len(op.shape(name))))
    if any(s.dim != at[0].dim or not same_fold(s, at[0]) for s in at):
        return op.mixed("the examples lie along different dimensions of indices and values")
    if not at:  # only self is batched
        assert isinstance(own, Batched)
        return op.mixed("writes into some examples of the batch") if own.dim in layout.where else own
    written = at[0]
    beside = layout.inside(written.dim, ndim)
    if beside is not None:  # the examples lie along a dimension that is not indexed
        here = written.at(beside)
        return (
            op.mixed(PICKED) if isinstance(own, Batched) and (own.dim != beside or not same_fold(own, here)) else here
        )
    for position in layout.where:
        candidate = written.at(position)
        axis = own_axis(op, layout, candidate)
        if axis is not None and layout.start + axis == written.dim:
            fits = not isinstance(own, Batched) or (own.dim == position and same_fold(own, candidate))
            return (
                candidate
                if fits and known(op.shape("self")[position] == rows(candidate, op.examples))
                else op.mixed(PICKED)
            )
    if isinstance(own, Batched):
        return op.mixed(PICKED)
    if not op.args.get("accumulate", True):
        return op.mixed("several examples may write the same row")
    return op.contracted()


@rule(*overloads("aten.gather.default"), linear=["self"])
def gather_rule(op: Op) -> State:
    dim, own, index = op.dim(op["dim"]), op.state("self"), op.state("index")
    if isinstance(own, Batched) and own.dim == dim:
        return op.mixed(PICKED)
    found = own if isinstance(own, Batched) else index
    assert isinstance(found, Batched)
    if isinstance(own, Batched) and isinstance(index, Batched) and (own.dim != index.dim or not same_fold(own, index)):
        return op.mixed(PICKED)
    if found.dim != dim and not known(op.shape("self")[found.dim] == op.shape("index")[found.dim]):
        return op.mixed("gathers from some examples of the batch")
    return found


SCATTERS = overloads("aten.scatter.src", "aten.scatter.value", "aten.scatter_add.default")


@rule(*overloads("aten.scatter_reduce.two"))  # some of its reductions are not linear
@rule(*SCATTERS, linear=["self src"])
def scatter_rule(op: Op) -> State:
    dim = op.dim(op["dim"])
    names = [n for n in ("self", "index", "src") if n in op.args]
    batched = op.batched(*names)
    first = next(iter(batched.values()))
    if any(s.dim != first.dim or not same_fold(s, first) for s in batched.values()):
        return op.mixed("the examples lie along different dimensions of index and source")
    if first.dim != dim:
        sizes = [op.shape(n)[first.dim] for n in names]
        return (
            first if all(known(s == sizes[0]) for s in sizes) else op.mixed("scatters into some examples of the batch")
        )
    adds = "scatter_add" in str(op.node.target) or op.args.get("reduce") in ("sum", "add")
    return op.contracted() if adds and "self" not in batched else op.mixed("several examples may write the same row")


@rule(*overloads("aten.index_add.default"), linear=["self source"])
def index_add_rule(op: Op) -> State:
    """Backward of ``index_select``: rows of ``source`` are added to the rows of ``self`` that ``index`` names."""
    dim, own, source = op.dim(op["dim"]), op.state("self"), op.state("source")
    written = [s for s in (source, op.state("index")) if isinstance(s, Batched)]
    if isinstance(source, Batched) and source.dim != dim and not op.batched("index"):
        if isinstance(own, Batched) and (own.dim != source.dim or not same_fold(own, source)):
            return op.mixed("the examples lie along different dimensions of two arguments")
        return source
    if not written:
        assert isinstance(own, Batched)
        return op.mixed("writes into some examples of the batch") if own.dim == dim else own
    along = not isinstance(source, Batched) or source.dim == dim
    if isinstance(own, Batched) or not along or not all(same_fold(s, written[0]) for s in written):
        return op.mixed(PICKED)
    return op.contracted()


@rule(*overloads("aten.searchsorted.Tensor"))
def searchsorted_rule(op: Op) -> State:
    own = op.state("sorted_sequence")
    if op.batched("sorter"):
        return op.mixed("an order that depends on the example")
    if isinstance(own, Batched):
        last = own.dim == len(op.shape("sorted_sequence")) - 1
        return op.mixed(PICKED) if last else aligned(op, [op["sorted_sequence"], op["self"]])
    return op.state("self")


@rule(*overloads("aten.embedding_renorm.default"))
def embedding_renorm_rule(op: Op) -> State:
    """``max_norm`` rescales rows of the table that the batch uses; nothing differentiates it."""
    return op.mixed(PICKED) if op.batched("self") else op.contracted()


@rule(*overloads("aten.index_reduce.default"))
def index_reduce_rule(op: Op) -> State:
    own, source, dim = op.state("self"), op.state("source"), op.dim(op["dim"])
    if op.batched("index"):
        return op.mixed(PICKED)
    found = own if isinstance(own, Batched) else source
    assert isinstance(found, Batched)
    if isinstance(source, Batched) and (found.dim != source.dim or not same_fold(found, source)):
        return op.mixed("the examples lie along different dimensions of index and source")
    return op.mixed("several examples may write the same row") if found.dim == dim else found


@rule(*overloads("aten.multinomial.default"))
def multinomial_rule(op: Op) -> State:
    """One draw from each row of probabilities."""
    state = op.state("self")
    assert isinstance(state, Batched)
    return state if state.dim == 0 and len(op.shape()) == 2 else op.mixed("draws examples")
