"""How kernels are called: through the ops that graphs hold, so that dispatch and trust are part of it.

x [B, T, I], g [B, T, O] --way--> (gradient [I, O], norms [B])
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import gnsfx.kernels.gpu_ops  # noqa: F401  (defines the ops)
from benchmarks.gpu.bench import Bench
from gnsfx.errors import GnsWarning
from gnsfx.kernels import gpu
from gnsfx.kernels import triton as triton_files
from gnsfx.kernels.triton import plan

Way = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def fused(tile: int) -> Way:
    def way(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        grad, parts = torch.ops.gnsfx.mm_norm_parts(x, g, tile)
        return grad, norms_of(parts)

    return way


def grams(tile: int) -> Callable[[Tensor, list[Tensor]], list[Tensor]]:
    """x and several g -> norms of each: the Gram of x is made once."""
    return lambda x, factors: [norms_of(parts) for parts in torch.ops.gnsfx.gram_norm_parts(x, factors, tile)]


def ghost(tile: int) -> Way:
    return lambda x, g: (plain(x, g), grams(tile)(x, [g])[0])


def materialise(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Every example's product in fp32, in memory."""
    if x.is_cuda:
        products = torch.bmm(x.mT, g, out_dtype=torch.float32)
    else:
        products = torch.bmm(x.mT.float(), g.float())
    return products.sum(0).to(x.dtype), torch.linalg.vector_norm(products, dim=(1, 2)).square_()


def plain(x: Tensor, g: Tensor) -> Tensor:
    """The gradient alone."""
    return torch.mm(x.flatten(0, 1).t(), g.flatten(0, 1))


def product_ways() -> dict[str, Way]:
    """Name -> way: "fused N" and "ghost N" with entry N of the tiles that the planner chooses from."""
    ways: dict[str, Way] = {f"fused {tile}": fused(tile) for tile in range(len(plan.TILES))}
    return ways | {f"ghost {tile}": ghost(tile) for tile in range(len(plan.GRAMS))}


def norm_backward_parts(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, shift: bool, *more: Any
) -> tuple[Tensor, ...]:
    """dx, dgamma, dbeta, parts of the norms of both; a graph adds the parts of all its layers at once."""
    return torch.ops.gnsfx.norm_backward(g, x, mean, rstd, weight, shift, *more)


def norm_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The same with norms [B]."""
    *gradients, gamma_parts, beta_parts = norm_backward_parts(*arguments)
    return *gradients, norms_of(gamma_parts), norms_of(beta_parts)


def embedding_norms(ids: Tensor, g: Tensor) -> Tensor:
    return norms_of(torch.ops.gnsfx.embedding_norm_parts(ids, g))


def norms_of(parts: Tensor) -> Tensor:
    return parts.sum(0).clamp_min(0)


@contextmanager
def kernels_only() -> Iterator[None]:
    """A kernel that is not trusted is an error here, where in training its twin takes over and a warning says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", GnsWarning)
        yield


def launched(bench: Bench, run: Callable[[], object]) -> list[str] | None:
    """Names of our kernels that ran on the device within the call; None where no profiler tells."""
    if not bench.cuda:
        return None
    if torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler, about its own set-up
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    return sorted(names & ours()) if names else None


def ours() -> set[str]:
    """Names of all our Triton kernels."""
    found = set()
    for module in pkgutil.iter_modules(triton_files.__path__, f"{triton_files.__name__}."):
        members = vars(importlib.import_module(module.name))
        found |= {name for name, value in members.items() if type(value).__name__ == "JITFunction"}
    return found


def untrusted() -> list[str]:
    """Configurations whose numbers were not those of their twins."""
    return [" ".join(map(str, key)) if isinstance(key, tuple) else str(key) for (key, _), good in _known() if not good]


def _known() -> list[tuple[Any, bool]]:
    return list(gpu._trusted.items())
