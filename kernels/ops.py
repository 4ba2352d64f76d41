"""The ops that gnsfx puts into a graph, as ``torch.ops.gnsfx.*``: schemas, fake kernels and implementations.

They enter a joint graph after autograd has run, so none has a derivative. Letters: B examples, E independent
contractions, T positions, I in, O out, V vocab, D width. Squared norms are fp32, or fp64 where the inputs are fp64.

| op                    | arguments                                  | results                            |
|-----------------------|--------------------------------------------|------------------------------------|
| mm_sq_norm            | x [B,E,T,I], g [B,E,T,O]                   | grad [E,I,O], sq_norms [B]         |
| ghost_sq_norm         | x [B,E,T,I], g [B,E,T,O]                   | sq_norms [B]                       |
| gram                  | x [B,E,T,K]                                | [B,E,T,T] of x x^T                 |
| gram_sq_norm          | gram of x [B,E,T,T], g [B,E,T,O]           | sq_norms [B]: ghost_sq_norm's      |
| embedding_sq_norm     | ids [B,T], g [B,T,D]                       | sq_norms [B]                       |
| convolution_sq_norm   | grad_output [B,(R,)O,..], input [B,(R,)C,..], weight, .. | grad_weight, sq_norms [B] |
| tied_sq_norm          | ids [B,S], g [B,S,D], x [B,T,D], h [B,T,V] | sq_norms [B]                       |
| tied_mm_sq_norm       | as above                                   | grad [V,D] of both uses, sq_norms [B] |
| tied_cross            | as above                                   | <onehot^T g, h^T x> [B]            |
| product_sq_norm       | x [B,E,T,I], g [B,E,T,O]                   | sq_norms [B]: mm_sq_norm's second  |
| collect               | n tensors [B] or parts [k,B]               | [n, B]                             |
| routed_sq_norm        | x [E,N,I], g [E,N,O], or [N,I], [N,O] and offsets [E]; ids | sq_norms [B]       |
| routed_product        | as above                                   | [B,E,I,O]                          |
| routed_tied_sq_norm   | n x [N,V], n g [N,O], m rows [N], m values [N,O], V; ids | sq_norms [B]         |
| sum_by_example        | values, dims; ids                          | [B, *sizes that are not in dims]   |
| mask_by_example       | values, dims; ids                          | [B, *values.shape]                 |
| crosses               | values, dims of rows, of columns, mask; ids | 0-d bool                          |
| misnumbered           | ids, positions, column                     | 0-d bool                           |
| count_ids             | ids                                        | 0-d fp32                           |
| estimate_sq_norm      | x, g as above; seed, salt, examples, columns, gram | sq_norms [B], variances [B] |
| estimate_convolution_sq_norm | as convolution_sq_norm; seed, salt, examples, columns | sq_norms [B], variances [B] |

``ids`` stands for (rows, column, takes, inner, total, examples), which ``example_ids`` turns into the example of each row.
They go in as one because their number is data, and only an op's inside may see such sizes without guards.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gnsfx.kernels import gpu_ops as gpu_ops  # more of torch.ops.gnsfx
from gnsfx.kernels import native
from gnsfx.kernels.accumulate import accumulate_dtype
from gnsfx.kernels.convolution_norm import convolution_sq_norm, source_of
from gnsfx.kernels.embedding_norm import SKIPPED as SKIPPED
from gnsfx.kernels.embedding_norm import embedding_sq_norm
from gnsfx.kernels.factors import same_leading
from gnsfx.kernels.ghost_norm import FEW_POSITIONS_DTYPES, ghost_sq_norm, gram_sq_norm, shared_gram
from gnsfx.kernels.mm_norm import mm_sq_norm, product_sq_norm
from gnsfx.kernels.norm_backward import norm_takes as norm_takes
from gnsfx.kernels.norm_backward import sum_taken as sum_taken
from gnsfx.kernels.register import register
from gnsfx.kernels.routed_norm import (
    count_ids,
    crosses,
    example_ids,
    mask_by_example,
    misnumbered,
    routed_product,
    routed_sq_norm,
    routed_tied_sq_norm,
    sum_by_example,
)
from gnsfx.kernels.sketch import estimate_convolution_sq_norm, estimate_sq_norm
from gnsfx.kernels.tied_norm import tied_cross, tied_mm_sq_norm, tied_sq_norm


def start_build(value: Tensor) -> None:
    """Build what contractions of such a tensor need in the background, while the graph is compiled."""
    if value.device.type == "cpu" and value.dtype in native.DTYPES:
        native.start(value.dtype)


_SOURCES = {"embedding_sq_norm": "embedding.cpp", "tied_sq_norm": "embedding.cpp", "routed_sq_norm": "routed.cpp"}


def start_builds(graph: torch.fx.Graph) -> None:
    """Build what the ops of a rewritten graph need in the background, while it is compiled."""
    for node in graph.nodes:
        name = str(node.target).removeprefix("gnsfx.").removesuffix(".default")
        source = _SOURCES.get(name)
        if name == "convolution_sq_norm":
            source = f"{source_of(node.args[2].meta['val'].shape, node.args[8])}.cpp"
        elif name == "ghost_sq_norm" and node.args[1].meta["val"].dtype in FEW_POSITIONS_DTYPES:
            source = "gram_norm.cpp"
        if source:
            value = node.args[1].meta["val"]
            if value.device.type == "cpu" and value.dtype in native.DTYPES:
                native.start(value.dtype, source)


def collect(sq_norms: Sequence[Tensor]) -> Tensor:
    """n tensors of floating dtype, norms [B] or parts [k, B] of some -> norms [n, B] in fp32, or fp64 if any is fp64.

    Parts are added here, all that come in as many at once; their sum is clamped at zero, while what is [B] stays as it is.
    """
    dtype = accumulate_dtype(*(s.dtype for s in sq_norms))
    rows = [s if s.dtype == dtype else s.to(dtype) for s in sq_norms]  # there are hundreds
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if row.dim() == 2:
            groups.setdefault(row.shape[0], []).append(i)
    if groups:
        sums = [torch.cat([rows[i] for i in own]).unflatten(0, (len(own), k)).sum(1) for k, own in groups.items()]
        added = torch.cat(sums).clamp_(min=0)
        for i, total in zip((i for own in groups.values() for i in own), added.unbind(), strict=True):
            rows[i] = total
    return torch.stack(rows)


def _fake_mm(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    same_leading(3, x, g)
    B, E, _, I = x.shape
    return x.new_empty(E, I, g.shape[3]), x.new_empty(B, dtype=accumulate_dtype(x.dtype))


def _fake_ghost(x: Tensor, g: Tensor) -> Tensor:
    same_leading(3, x, g)
    return x.new_empty(x.shape[0], dtype=accumulate_dtype(x.dtype))


def _fake_gram(x: Tensor) -> Tensor:
    B, E, T, _ = x.shape
    return x.new_empty(B, E, T, T, dtype=accumulate_dtype(x.dtype))


def _fake_embedding(ids: Tensor, g: Tensor) -> Tensor:
    same_leading(2, ids, g)
    return g.new_empty(g.shape[0], dtype=accumulate_dtype(g.dtype))


def _fake_convolution(grad_output: Tensor, input: Tensor, weight: Tensor, *_) -> tuple[Tensor, Tensor]:
    sq_norms = input.new_empty(input.shape[0], dtype=accumulate_dtype(input.dtype))
    return weight.new_empty(weight.shape), sq_norms


def _fake_tied(ids: Tensor, g: Tensor, x: Tensor, h: Tensor) -> Tensor:
    same_leading(2, ids, g)
    same_leading(2, x, h)
    same_leading(1, g, x)
    return g.new_empty(g.shape[0], dtype=accumulate_dtype(g.dtype, h.dtype))


def _fake_tied_mm(ids: Tensor, g: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(h.shape[2], x.shape[2]), _fake_tied(ids, g, x, h)


def _fake_routed(x: Tensor, g: Tensor, offsets: Tensor | None, *ids) -> Tensor:
    return x.new_empty(ids[-1], dtype=accumulate_dtype(x.dtype))


def _fake_product(x: Tensor, g: Tensor, offsets: Tensor | None, *ids) -> Tensor:
    E = x.shape[0] if offsets is None else offsets.shape[0]
    return x.new_empty(ids[-1], E, x.shape[-1], g.shape[-1], dtype=accumulate_dtype(x.dtype))


def _fake_tied_rows(
    x: Sequence[Tensor], g: Sequence[Tensor], at: Sequence[Tensor], values: Sequence[Tensor], *ids
) -> Tensor:
    both = (*g, *values)
    return both[0].new_empty(ids[-1], dtype=accumulate_dtype(*(t.dtype for t in (*x, *both))))


def _fake_sum_by_example(values: Tensor, dims: Sequence[int], *ids) -> Tensor:
    dtype = values.dtype if values.is_complex() else accumulate_dtype(values.dtype)
    return values.new_empty(ids[-1], *[s for d, s in enumerate(values.shape) if d not in dims], dtype=dtype)


def _fake_mask_by_example(values: Tensor, dims: Sequence[int], *ids) -> Tensor:
    return values.new_empty(ids[-1], *values.shape)


def _with_ids(kernel: Callable) -> Callable:
    """The kernel with its last two arguments, ids and examples, in place of the expression that names the ids."""
    return lambda *args: kernel(*args[:-6], example_ids(*args[-6:]), args[-1])


def _fake_estimate(x: Tensor, g: Tensor, *_) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


def _fake_collect(sq_norms: Sequence[Tensor]) -> Tensor:
    dtype = accumulate_dtype(*(s.dtype for s in sq_norms))
    return sq_norms[0].new_empty(len(sq_norms), sq_norms[0].shape[-1], dtype=dtype)


# On CPUs native/dispatch.cpp takes over the first of each pair, and calls the second where it has no kernel.
for _own in ("", "_"):
    register(f"{_own}mm_sq_norm(Tensor x, Tensor g) -> (Tensor, Tensor)", mm_sq_norm, _fake_mm)
    register(f"{_own}product_sq_norm(Tensor x, Tensor g) -> Tensor", product_sq_norm, _fake_ghost)
register("ghost_sq_norm(Tensor x, Tensor g) -> Tensor", ghost_sq_norm, _fake_ghost)
register("gram(Tensor x) -> Tensor", shared_gram, _fake_gram)
register("gram_sq_norm(Tensor other, Tensor g) -> Tensor", gram_sq_norm, lambda other, g: _fake_ghost(g, g))
register("embedding_sq_norm(Tensor ids, Tensor g) -> Tensor", embedding_sq_norm, _fake_embedding)
register(
    "convolution_sq_norm(Tensor grad_output, Tensor input, Tensor weight, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups) -> (Tensor, Tensor)",
    convolution_sq_norm,
    _fake_convolution,
)
register("tied_sq_norm(Tensor ids, Tensor g, Tensor x, Tensor h) -> Tensor", tied_sq_norm, _fake_tied)
register(
    "tied_mm_sq_norm(Tensor ids, Tensor g, Tensor x, Tensor h) -> (Tensor, Tensor)", tied_mm_sq_norm, _fake_tied_mm
)
register("tied_cross(Tensor ids, Tensor g, Tensor x, Tensor h) -> Tensor", tied_cross, _fake_tied)
register("collect(Tensor[] sq_norms) -> Tensor", collect, _fake_collect)

_IDS = "Tensor rows, int? column, Tensor[] takes, SymInt inner, SymInt total, SymInt examples"
_FACTORS = f"Tensor x, Tensor g, Tensor? offsets, {_IDS}"
register(f"routed_sq_norm({_FACTORS}) -> Tensor", _with_ids(routed_sq_norm), _fake_routed)
register(f"routed_product({_FACTORS}) -> Tensor", _with_ids(routed_product), _fake_product)
register(
    f"routed_tied_sq_norm(Tensor[] x, Tensor[] g, Tensor[] at, Tensor[] values, SymInt table, {_IDS}) -> Tensor",
    _with_ids(routed_tied_sq_norm),
    _fake_tied_rows,
)
register(
    f"sum_by_example(Tensor values, int[] dims, {_IDS}) -> Tensor", _with_ids(sum_by_example), _fake_sum_by_example
)
register(
    f"mask_by_example(Tensor values, int[] dims, {_IDS}) -> Tensor", _with_ids(mask_by_example), _fake_mask_by_example
)
register(
    f"crosses(Tensor values, int[] along, int[] across, bool mask, {_IDS}) -> Tensor",
    _with_ids(crosses),
    lambda values, *_: values.new_empty((), dtype=torch.bool),
)
register(
    "misnumbered(Tensor rows, SymInt positions, int? column) -> Tensor",
    misnumbered,
    lambda rows, *_: rows.new_empty((), dtype=torch.bool),
)
register("count_ids(Tensor rows) -> Tensor", count_ids, lambda rows: rows.new_empty((), dtype=torch.float32))

_DRAW = "Tensor seed, int salt, int examples, int columns"
register(
    f"estimate_sq_norm(Tensor x, Tensor g, {_DRAW}, bool gram) -> (Tensor, Tensor)", estimate_sq_norm, _fake_estimate
)
register(
    "estimate_convolution_sq_norm(Tensor grad_output, Tensor input, Tensor weight, SymInt[] stride, SymInt[] padding, "
    f"SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups, {_DRAW}) -> (Tensor, Tensor)",
    estimate_convolution_sq_norm,
    _fake_estimate,
)
