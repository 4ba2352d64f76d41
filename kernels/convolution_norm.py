"""Weight gradient of a convolution together with the squared norms of its per-example parts.

    grad_output [B, R, O, *out], input [B, R, C, *in], weight [O, C/groups, *kernel]
        ->  grad_weight (as weight), sq_norms [B]

R rows of the convolution's batch belong to one example; without that dimension one row does. A transposed weight is [C, O/groups, *kernel].
On a CPU with a C++ compiler the per-example gradients of most convolutions live in registers only, see
``native/convolution.cpp`` and ``native/depthwise.cpp``. Every other method yields them [chunk, *weight.shape], squared and added while in the cache.
"""

import ctypes
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gnsfx.kernels import native
from gnsfx.kernels.accumulate import accumulate_dtype, square_sums
from gnsfx.kernels.mm_norm import mm_sq_norm
from gnsfx.kernels.tiling import FEW_CHANNELS, budget_for, convolution_method, example_chunk


@dataclass(frozen=True)
class _Convolution:
    """The arguments of ``aten.convolution`` that are not tensors, one entry per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def weight_gradient(self, grad_output: Tensor, input: Tensor, weight: Tensor, groups: int) -> Tensor:
        """[rows, O, *out], [rows, C, *in] -> gradient of ``weight``, of which only shape and dtype matter."""
        mask = (False, True, False)
        grad_output, input = _regular(grad_output), _regular(input)
        return torch.ops.aten.convolution_backward(
            grad_output, input, weight, None, self.stride, self.padding, self.dilation,
            self.transposed, self.output_padding, groups, mask,
        )[1]  # fmt: skip


def convolution_sq_norm(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Weight gradient in shape and dtype of ``weight`` (examples added in fp32 or fp64) and squared norms [B]."""
    dims = weight.dim() - 2
    if grad_output.dim() == weight.dim():
        grad_output, input = grad_output.unsqueeze(1), input.unsqueeze(1)
    lists = (tuple(p) * dims if len(p) == 1 else tuple(p) for p in (stride, padding, dilation, output_padding))
    stride, padding, dilation, output_padding = lists
    convolution = _Convolution(stride, padding, dilation, transposed, output_padding, groups)
    if found := _in_registers(grad_output, input, weight, convolution):
        return found
    positions = math.prod((input if transposed else grad_output).shape[3:])
    method = convolution_method(weight.shape, stride, padding, dilation, transposed, groups, positions)
    if method == "matmul":
        return _patch_matmul(grad_output, input, weight)
    dtype = accumulate_dtype(input.dtype)
    if input.device.type == "cpu" and input.dtype == torch.float16:
        grad_output, input = grad_output.to(dtype), input.to(dtype)  # fp16 has too little range for a partial sum
    gradients = {"taps": _taps, "grouped": _grouped, "loop": _loop}[method]
    grad = torch.zeros(weight.shape, dtype=dtype, device=input.device)
    sq_norms = []
    for products in gradients(grad_output, input, weight, convolution):
        products = products.to(dtype)
        sq_norms.append(square_sums(products.flatten(1)))
        grad.add_(products[0] if len(products) == 1 else products.sum(0))
    return grad.to(weight.dtype), torch.cat(sq_norms) if sq_norms else grad.new_zeros(0)


_Shape = ctypes.c_int64 * 27
_NATIVE = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _in_registers(
    grad_output: Tensor, input: Tensor, weight: Tensor, convolution: _Convolution
) -> tuple[Tensor, Tensor] | None:
    """By a C++ kernel, where there is one and it knows this convolution."""
    dims, groups, tensors = weight.dim() - 2, convolution.groups, (grad_output, input, weight)
    if dims > 2 or not all(t.is_cpu and t.dtype == weight.dtype and t.numel() for t in tensors):
        return None
    # A transposed convolution is the adjoint of a convolution, in which input and output change places.
    inner, outer = (input, grad_output) if convolution.transposed else (grad_output, input)
    source = source_of(weight.shape, groups)
    kernel = _kernel(source, weight.dtype)
    if kernel is None:
        return None
    lists = convolution.stride, convolution.padding, convolution.dilation
    numbers = [(first, *rest) if dims == 2 else (n, first) for n, (first, *rest) in zip((1, 0, 1), lists, strict=True)]
    if dims == 1:
        inner, outer, weight = inner.unsqueeze(3), outer.unsqueeze(3), weight.unsqueeze(2)
    grad, sq_norms = torch.empty(weight.shape, dtype=torch.float32), torch.zeros(len(inner), dtype=torch.float32)
    apart = 1 if source == "depthwise" else groups
    for g, x, part in zip(inner.chunk(apart, 2), outer.chunk(apart, 2), grad.chunk(apart), strict=True):
        sizes = (*g.shape, *x.shape[2:], *weight.shape[2:], *numbers[0], *numbers[1], *numbers[2])
        shape = _Shape(*sizes, *g.stride(), *x.stride(), groups // apart)
        norms = torch.empty_like(sq_norms)
        pointers = (t.data_ptr() for t in (x, g, part, norms))
        kernel(ctypes.addressof(shape), *pointers, torch.get_num_threads())
        sq_norms += norms
    return (grad if dims == 2 else grad.squeeze(2)).to(weight.dtype), sq_norms


def source_of(weight: Sequence[int], groups: int) -> str:
    """Which of the C++ sources has the kernel for weights of this shape; a transposed one has the outputs of a group second."""
    return "depthwise" if groups > 1 and weight[1] <= FEW_CHANNELS else "convolution"


def _kernel(source: str, dtype: torch.dtype) -> Any:
    name = _NATIVE.get(dtype)
    return native.function(f"{source}.cpp", f"{source}_sq_norm_{name}", dtype) if name else None


def _patch_matmul(grad_output: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Patches do not overlap, so the columns [B, R*positions, C*kernel] are a permuted view of the input."""
    B, _, O, *out = grad_output.shape
    kernel = weight.shape[2:]
    for d, (n, k) in enumerate(zip(out, kernel, strict=True)):
        # Split every spatial dimension into (position, offset); a remainder that no patch reached is dropped.
        input = input.narrow(3 + 2 * d, 0, n * k).unflatten(3 + 2 * d, (n, k))
    dims = len(out)
    positions, offsets = [3 + 2 * d for d in range(dims)], [4 + 2 * d for d in range(dims)]
    columns = input.permute(0, 1, *positions, 2, *offsets).reshape(B, 1, -1, weight[0].numel())
    rows = grad_output.flatten(3).permute(0, 1, 3, 2).reshape(B, 1, -1, O)
    grad, sq_norms = mm_sq_norm(rows, columns)
    return grad.view(weight.shape).to(weight.dtype), sq_norms


def _taps(grad_output: Tensor, input: Tensor, weight: Tensor, convolution: _Convolution) -> Iterator[Tensor]:
    """Depthwise: P_b[c, 0, k] = sum over rows and positions of input shifted by k, times grad_output."""
    dtype = accumulate_dtype(input.dtype)
    kernel, out = weight.shape[2:], grad_output.shape[3:]
    sides = [p for p in reversed(convolution.padding) for _ in range(2)]
    reduce = (1, *range(3, grad_output.dim()))
    chunk = _chunk(grad_output.shape[0], grad_output[0].numel(), input)
    for start in range(0, grad_output.shape[0], chunk):
        g = grad_output[start : start + chunk].to(dtype)
        x = F.pad(input[start : start + chunk].to(dtype), sides)
        products = g.new_empty(g.shape[0], *weight.shape)
        for tap in itertools.product(*map(range, kernel)):
            window = [slice(None)] * 3
            for k, n, s, d in zip(tap, out, convolution.stride, convolution.dilation, strict=True):
                window.append(slice(k * d, k * d + (n - 1) * s + 1, s))
            products[(..., 0, *tap)] = (x[tuple(window)] * g).sum(reduce)
        yield products


def _grouped(grad_output: Tensor, input: Tensor, weight: Tensor, convolution: _Convolution) -> Iterator[Tensor]:
    """A chunk of examples side by side as groups: rows [R, chunk*C, *in], weight [chunk*O, C/groups, *kernel]."""
    chunk = _chunk(grad_output.shape[0], weight.numel(), input)
    for start in range(0, grad_output.shape[0], chunk):
        g = grad_output[start : start + chunk].transpose(0, 1).flatten(1, 2)
        x = input[start : start + chunk].transpose(0, 1).flatten(1, 2)
        count = min(chunk, grad_output.shape[0] - start)
        wide = x.new_empty(1).expand(count * weight.shape[0], *weight.shape[1:])
        yield convolution.weight_gradient(g, x, wide, count * convolution.groups).view(count, *weight.shape)


def _loop(grad_output: Tensor, input: Tensor, weight: Tensor, convolution: _Convolution) -> Iterator[Tensor]:
    shape = input.new_empty(1).expand(weight.shape)
    for g, x in zip(grad_output.unbind(0), input.unbind(0), strict=True):
        yield convolution.weight_gradient(g, x, shape, convolution.groups).unsqueeze(0)


def _regular(rows: Tensor) -> Tensor:
    """The strides of a new tensor: from others along dimensions of size one PyTorch takes it for channels_last, and fails."""
    return rows.view(-1).view(rows.shape) if rows.is_contiguous() else rows


def _chunk(B: int, per_example: int, like: Tensor) -> int:
    return example_chunk(B, per_example, accumulate_dtype(like.dtype).itemsize, budget_for(like.device.type))
