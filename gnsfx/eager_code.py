"""Eager code between compiled graphs: does dimension 0 of what it hands over still index the examples?

A graph behind a graph break takes dimension 0 of an intermediate that no compiled graph recorded. That is right where
the code in between works row by row, and wrong where it picks rows (experts), reorders or transposes them. Autograd
remembers what that code did, so every node it left behind must be one that keeps rows in place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gnsfx.passes.state import Batched

MOST_NODES = 10_000
STATES = "gnsfx.states"  # key in the metadata of an autograd node: number of a result -> where its examples are
ROW_BY_ROW = {f"{name}Backward{n}" for n in range(4) for name in (
    "Abs", "Add", "Addcmul", "Addmm", "Alias", "Bmm", "Clamp", "ClampMax", "ClampMin", "Clone", "Cos", "Div", "Elu", "Embedding", "Erf", "Exp",
    "Gelu", "HardtanhBackward", "Hardswish", "LeakyRelu", "Linear", "Log", "LogSigmoid", "MaskedFill", "Mm", "Mul", "NativeDropout",
    "NativeGroupNorm", "Neg", "Pow", "Reciprocal", "Relu", "Rsqrt", "Rsub", "Sigmoid", "Silu", "Sin",
    "Softplus", "Sqrt", "Sub", "Tanh", "ToCopy", "Where", "Convolution", "MkldnnConvolution", "MaxPool2DWithIndices", "AvgPool2D",
    "FakeQuantizePerTensorAffineCachemask", "FakeQuantizePerTensorAffineCachemaskTensorQparams", "FakeQuantizePerChannelAffineCachemask",
    "AdaptiveAvgPool2D", "ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention", "ScaledDotProductEfficientAttention",
)}  # fmt: skip
VIEWS = {
    f"{name}Backward{n}"
    for n in range(4)
    for name in ("View", "UnsafeView", "Reshape", "ReshapeAlias", "Unsqueeze", "Squeeze", "Expand")
}
BESIDE = {f"{name}Backward{n}" for n in range(4) for name in (
    "Slice", "Select", "Cat", "Split", "SplitWithSizes", "Unbind", "Narrow", "Softmax", "SafeSoftmax", "LogSoftmax", "Cumsum", "Transpose", "Permute",
    "Mean", "Sum", "NativeLayerNorm", "FusedRmsNorm",
)}  # fmt: skip
"""These are harmless along any dimension but the first."""
HANDED_ON = {
    "RegisterPreBackwardFunctionBackward",
    "RegisterPostBackwardFunctionBackward",
    "_DDPSinkBackward",
}
"""Of FSDP and DDP: every result is the operand of the same number."""
LEFT_FACTOR = {
    "AddmmBackward0": 1,
    "MmBackward0": 0,
    "LinearBackward0": 0,
    "ConvolutionBackward0": 0,
    "MkldnnConvolutionBackward0": 0,
}
"""The operand whose rows are those of the result; each of these depends on all rows of the others."""
MOVED = (
    "it takes rows from eager code ({}) that may pick, reorder, fold or mix examples; compile that code too "
    "(torch.compile(fullgraph=True), or torch._dynamo.config.capture_dynamic_output_shape_ops = True for experts)"
)


def moved_rows(tensor: Tensor, producer: str) -> str | None:
    """Why dimension 0 of an intermediate may not index the examples; None where every eager node keeps rows in place.

    The walk ends at leaves and at results of compiled graphs (their nodes carry ``producer`` in their metadata), which must
    have as many examples in dimension 0. On the way rows may be folded: (B, T, D) -> (B*T, D) and back.
    """
    rows = tensor.shape[0]
    stack: list[tuple[Any, int, int]] = [(tensor.grad_fn, tensor.output_nr, rows)]
    ours = _computed_from(tensor.grad_fn, producer)
    seen = set()
    while stack:
        node, output, size = stack.pop()
        if node is None or (node, size) in seen:
            continue
        if _size(node, output) != size:
            if node in ours:
                return MOVED.format(node.name())  # a statistic of the batch, or examples elsewhere
            continue  # no part of the batch: a weight, a table
        seen.add((node, size))
        name, before = node.name().rsplit("::", 1)[-1], [edge for edge in node.next_functions if edge[0] is not None]
        if producer in node.metadata:
            state = node.metadata[STATES](output)
            moved = size != rows or not (isinstance(state, Batched) and state.dim == 0)
        elif len(seen) > MOST_NODES or not before or all(n.name().endswith("AccumulateGrad") for n, _ in before):
            moved = (
                name not in ROW_BY_ROW
                and not node.name().endswith("AccumulateGrad")
                and size == rows != _size(*before[0])
            )
        elif name in HANDED_ON:
            moved = False
            stack.append((*node.next_functions[output], size))
        elif name in VIEWS:
            folded = _size(*before[0])
            moved = not folded or (folded % rows if before[0][0] in ours else folded % size and size % folded)
            stack.append((*before[0], folded or 0))
        else:
            kept = any(_size(*edge) == size for edge in before)
            moved = not (kept and (name in ROW_BY_ROW or (name in BESIDE and _beside(node))))
            moved = moved or any(edge[0] in ours for edge in _meeting_all_rows(node, name))
            stack += [(*edge, size) for edge in before]
        if moved:
            return MOVED.format(name)
    return None


def _computed_from(node: Any, producer: str) -> set[Any]:
    """The nodes behind ``node`` that were computed from results of compiled graphs."""
    users: dict[Any, list[Any]] = {node: []}
    stack, ends = [node], []
    while stack:
        node = stack.pop()
        if producer in node.metadata or len(users) > MOST_NODES:
            ends.append(node)
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in users:
                users[following] = []
                stack.append(following)
            if following is not None:
                users[following].append(node)
    found = set(ends)
    while ends:
        fresh = [user for user in users[ends.pop()] if user not in found]
        found.update(fresh)
        ends += fresh
    return found


def _meeting_all_rows(node: Any, name: str) -> list[Any]:
    """The operands that each row of the result depends on as a whole: a right factor, a value with fewer dimensions."""
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    if name in LEFT_FACTOR:
        return [e for i, e in enumerate(node.next_functions) if i != LEFT_FACTOR[name] and e[0] is not None]
    return [edge for edge in edges if name in ROW_BY_ROW and len(_shape(*edge)) != len(_shape(node))]


def _beside(node: Any) -> bool:
    """Whether an op works along another dimension than the first. Negative ones are stored as unsigned numbers."""
    name = node.name()
    if name.startswith("Permute"):
        return node._saved_dims[0] == 0
    ndim = len(_shape(node)) + name.startswith(("Select", "Unbind"))
    if name.startswith(("NativeLayerNorm", "FusedRmsNorm")):
        return len(getattr(node, "_saved_normalized_shape", range(ndim))) < ndim
    if name.startswith(("Mean", "Sum")):
        saved, ndim = getattr(node, "_saved_dim", None) or (), len(getattr(node, "_saved_self_sym_sizes", ())) or 1
    else:
        saved = [getattr(node, f"_saved_{field}", None) for field in ("dim", "dim0", "dim1")]
    dims = [d - (1 << 64) if d >= 1 << 63 else d for d in saved if isinstance(d, int)]
    return bool(dims) and all(d % ndim != 0 for d in dims)


def _shape(node: Any, output: int = 0) -> tuple[Any, ...]:
    metadata = getattr(node, "_input_metadata", None)
    return tuple(metadata[output].shape) if metadata and output < len(metadata) else ()


def _size(node: Any, output: int = 0) -> int | None:
    """Dimension 0 of a result of the op that left ``node`` behind."""
    shape = _shape(node, output)
    return int(shape[0]) if shape else None
