"""Where our CUDA kernels run, and whether their numbers may be used.

    kernels_on(device)                      what is worth writing into a graph
    trusted(key, device, check)             once per process, configuration and device: kernel = torch twin on small inputs

Says so of every device, also of one that is not there: graphs are rewritten on fake tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings
from collections.abc import Callable, Hashable
from contextlib import nullcontext

import torch

from gnsfx.errors import GnsWarning

MULTIPLIED = frozenset({torch.bfloat16, torch.float16})
"""Dtypes of the factors that the kernels "products" take."""
LOOKED_UP = MULTIPLIED | {torch.float32}
"""Dtypes of the rows that the kernel "embedding" takes. Both add in fp32."""

_HOPPER = (9, 0)
_AMPERE = (8, 0)  # the first with asynchronous copies and bf16
_MULTIPROCESSORS = 132

_trusted: dict[tuple[Hashable, torch.device], bool] = {}
_locks: dict[torch.device, threading.Lock] = {}


def kernels_on(device: torch.device) -> frozenset[str]:
    """Those of "norm", "products", "embedding" that have a CUDA kernel of ours there. "products" takes a Hopper (TMA).

    Empty on CPUs and without Triton. A CUDA device that cannot be asked counts as a Hopper.
    """
    if device.type != "cuda" or torch.version.hip is not None or not _has_triton():
        return frozenset()
    capability = _capability(device)
    if capability < _AMPERE:
        return frozenset()
    return frozenset({"norm", "embedding"} | ({"products"} if capability >= _HOPPER else set()))


def launches_on(device: torch.device) -> bool:
    """Whether an op that has tensors there launches our kernels, and not their twins; tests let Triton's interpreter do so."""
    return device.type == "cuda"


def multiprocessors(device: torch.device) -> int:
    """How many there are; those of an H100 where the device cannot be asked."""
    try:
        return _count(_index(device))
    except (AssertionError, RuntimeError):  # no GPU, no CUDA in this PyTorch, or a child of fork
        return _MULTIPROCESSORS


def trusted(key: Hashable, device: torch.device, check: Callable[[], bool]) -> bool:
    """Whether a kernel configuration may be used on a device.

    ``check`` runs the kernel and its twin on small inputs of its own, and says whether they agree. It is called once per process;
    where it says no or raises, a GnsWarning names the kernel and the answer stays False. While a CUDA graph is captured
    nothing can be checked: what is not known then is False for that call.
    """
    if device.type == "cuda":
        device = torch.device("cuda", _index(device))
    known = _trusted.get((key, device))
    if known is not None:
        return known
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    # A lock of its own for each device: each has a thread in the backward pass, and one may wait for another's collective.
    with _locks.setdefault(device, threading.Lock()):
        if (key, device) not in _trusted:
            _trusted[key, device] = _agrees(key, device, check)
        return _trusted[key, device]


def _agrees(key: Hashable, device: torch.device, check: Callable[[], bool]) -> bool:
    try:
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            agree = check()  # reads the results back, so what goes wrong on the device shows here
        trouble = "" if agree else "its numbers are not those of the same sums in PyTorch"
    except Exception as error:  # whatever a compiler or a driver raises
        trouble = f"{type(error).__name__}: {str(error)[:500]}"
    if trouble:
        name = " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
        message = f"the CUDA kernel {name} is not used on {device}, PyTorch's operations are: {trouble}"
        warnings.warn(message, GnsWarning, stacklevel=2)
    return not trouble


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _capability(device: torch.device) -> tuple[int, int]:
    try:
        return _capability_of(_index(device))
    except (AssertionError, RuntimeError):  # as above
        return _HOPPER


@functools.cache
def _capability_of(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
