"""Eager code between compiled graphs: does dimension 0 of what it hands over still index the examples?

A graph behind a graph break takes dimension 0 of an intermediate that no compiled graph recorded. That is right where
the code in between works row by row, and wrong where it picks rows (experts), reorders or transposes them. Autograd
remembers what that code did, so every node it left behind must be one that keeps rows in place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

MOST_NODES = 10_000
ROW_BY_ROW = {f"{name}Backward{n}" for n in range(4) for name in (
    "Abs", "Add", "Addcmul", "Addmm", "Alias", "Bmm", "Clamp", "ClampMax", "ClampMin", "Clone", "Cos", "Div", "Elu", "Embedding", "Erf", "Exp",
    "Gelu", "HardtanhBackward", "Hardswish", "LeakyRelu", "Linear", "Log", "LogSigmoid", "LogSoftmax", "MaskedFill", "Mm", "Mul", "NativeDropout",
    "NativeGroupNorm", "NativeLayerNorm", "FusedRmsNorm", "Neg", "Pow", "Reciprocal", "Relu", "Rsqrt", "Rsub", "Sigmoid", "Silu", "Sin",
    "Softplus", "Sqrt", "Sub", "Tanh", "ToCopy", "Where", "Convolution", "MkldnnConvolution", "MaxPool2DWithIndices", "AvgPool2D",
    "AdaptiveAvgPool2D", "ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention", "ScaledDotProductEfficientAttention",
    "Mean", "Sum",
)}  # fmt: skip
VIEWS = {
    f"{name}Backward{n}"
    for n in range(4)
    for name in ("View", "UnsafeView", "Reshape", "ReshapeAlias", "Unsqueeze", "Squeeze", "Expand")
}
BESIDE = {f"{name}Backward{n}" for n in range(4) for name in ("Slice", "Select", "Cat", "Split", "SplitWithSizes", "Unbind", "Narrow", "Softmax",
                                                              "Cumsum", "Transpose", "Permute")}  # fmt: skip
"""These are harmless along any dimension but the first."""


def moved_rows(tensor: Tensor, producer: str) -> str | None:
    """Why dimension 0 of an intermediate may not index the examples; None where every eager node keeps rows in place.

    The walk ends at leaves and at results of compiled graphs (their nodes carry ``producer`` in their metadata), whose
    dimension 0 must have the size that the intermediate has. On the way rows may be folded: (B, T, D) -> (B*T, D) and back.
    """
    rows = tensor.shape[0]
    stack: list[tuple[Any, int, int]] = [(tensor.grad_fn, tensor.output_nr, rows)]
    seen = set()
    while stack:
        node, output, size = stack.pop()
        if node is None or (node, size) in seen or _size(node, output) != size:
            continue  # what has other rows is no part of the batch: a weight, a table
        seen.add((node, size))
        name, before = node.name().rsplit("::", 1)[-1], [edge for edge in node.next_functions if edge[0] is not None]
        if producer in node.metadata:
            moved = size != rows
        elif len(seen) > MOST_NODES or not before or all(n.name().endswith("AccumulateGrad") for n, _ in before):
            moved = (
                name not in ROW_BY_ROW
                and not node.name().endswith("AccumulateGrad")
                and size == rows != _size(*before[0])
            )
        elif name in VIEWS:
            folded = _size(*before[0])
            moved = not folded or (folded % size and size % folded)
            stack.append((*before[0], folded or 0))
        else:
            kept = any(_size(*edge) == size for edge in before)
            moved = not (kept and (name in ROW_BY_ROW or (name in BESIDE and _beside(node))))
            stack += [(*edge, size) for edge in before]
        if moved:
            return (
                f"it takes rows from eager code ({name}) that may pick, reorder or fold examples; compile that code too "
                "(torch.compile(fullgraph=True), or torch._dynamo.config.capture_dynamic_output_shape_ops = True for experts)"
            )
    return None


def _beside(node: Any) -> bool:
    """Whether an op works along another dimension than the first. Negative ones are stored as unsigned numbers."""
    if node.name().startswith("Permute"):
        return node._saved_dims[0] == 0
    saved = [getattr(node, f"_saved_{field}", None) for field in ("dim", "dim0", "dim1")]
    ndim = len(node._input_metadata[0].shape) + node.name().startswith(("Select", "Unbind"))
    dims = [d - (1 << 64) if d >= 1 << 63 else d for d in saved if isinstance(d, int)]
    return bool(dims) and all(d % ndim != 0 for d in dims)


def _size(node: Any, output: int = 0) -> int | None:
    """Dimension 0 of a result of the op that left ``node`` behind."""
    metadata = getattr(node, "_input_metadata", None)
    shape: Any = metadata[output].shape if metadata and output < len(metadata) else ()
    return int(shape[0]) if len(shape) else None
