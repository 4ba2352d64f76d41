"""C++ kernels for CPUs, compiled at first use by the compiler that Inductor needs there anyway, one library per source and dtype.

What they compute is specified by the torch code beside whose ops they stand; it runs instead where there is no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gnsfx._torch import compiler_and_openmp
from gnsfx.errors import GnsWarning
from gnsfx.kernels.accumulate import accumulate_dtype
from gnsfx.kernels.native.build import load, processor

_Shape = ctypes.c_int64 * 21
_DEFINES = {
    torch.float32: "GNSFX_ELEMENT=float",
    torch.float64: "GNSFX_ELEMENT=double",
    torch.bfloat16: "GNSFX_BF16",  # has no kernel where PyTorch multiplies bf16 faster than we would
    torch.float16: "GNSFX_ELEMENT=_Float16",
}
DTYPES = frozenset(_DEFINES)


class _Library:
    """A source compiled with one macro, loaded once per process: in a thread, behind the tracing of the first graph."""

    def __init__(self, source: str, define: str) -> None:
        self._wanted = source, define
        self._thread = threading.Thread(target=self._load, name="gnsfx-build", daemon=True)
        self._trouble = ""
        self._library: ctypes.CDLL | None = None
        self._thread.start()

    def wait(self) -> ctypes.CDLL | None:
        """None where it cannot be had."""
        self._thread.join()
        if self._trouble:
            trouble, self._trouble = self._trouble, ""
            warnings.warn(f"the C++ kernels cannot be used, so norms cost more: {trouble}", GnsWarning, stacklevel=2)
        return self._library

    def _load(self) -> None:
        try:
            self._library = load(*self._wanted)
        except subprocess.CalledProcessError as error:
            self._trouble = f"{error.cmd[0]} says {error.stderr[-500:] or 'nothing'}"
        except OSError as error:
            self._trouble = str(error)
        except RuntimeError:  # no compiler: nothing that anybody did not know
            pass


class _Dispatch(_Library):
    """Calls of the ops that need no Python, once a process; see ``dispatch.cpp``. Without it they take some microseconds more."""

    def _load(self) -> None:
        try:
            library = load(*self._wanted, linked=(f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"))
            if not library.take_over():
                library.use.argtypes, library.use.restype = [ctypes.c_int, ctypes.c_void_p], None
                self._library = library
        except (subprocess.CalledProcessError, OSError, RuntimeError, AttributeError):
            pass  # no compiler, or a PyTorch without the interface


_dispatch: _Dispatch | None = None
_libraries: dict[tuple[str, str], _Library] = {}
_functions: dict[tuple[str, torch.dtype], Any] = {}  # by name and dtype, of libraries that are loaded
_lock = threading.Lock()


def _forget() -> None:
    """A child of fork has none of the threads."""
    global _lock
    _lock = threading.Lock()
    _libraries.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def start(dtype: torch.dtype, source: str = "mm_norm.cpp") -> _Library:
    """Begin to build what is needed for inputs of this dtype, in the background."""
    global _dispatch
    key = source, _DEFINES[dtype]
    with _lock:
        if _dispatch is None:
            _dispatch = _Dispatch("dispatch.cpp", "GNSFX_DISPATCH")
        if key not in _libraries:
            _libraries[key] = _Library(*key)
        return _libraries[key]


def function(source: str, name: str, dtype: torch.dtype) -> Any:
    """``name(shape, x, g, grad, sq_norms, threads)`` of a source compiled for a dtype: five addresses and an int.

    None where it cannot be had. The first call waits for the build.
    """
    if (name, dtype) not in _functions:
        library = start(dtype, source).wait() if dtype in _DEFINES else None
        found = getattr(library, name, None)
        if found is not None:
            found.argtypes, found.restype = [ctypes.c_void_p] * 5 + [ctypes.c_int], None
        _functions[name, dtype] = found
        dispatch = _dispatch.wait() if name == "mm_sq_norm" and found is not None and _dispatch is not None else None
        if dispatch is not None:
            dispatch.use(list(_DEFINES).index(dtype), found)
    return _functions[name, dtype]


@functools.cache
def available() -> bool:
    """Whether there is a compiler. Does not wait for the build, which may still fail."""
    try:
        compiler_and_openmp()
    except RuntimeError:
        return False
    return True


def expected(dtype: torch.dtype) -> bool:
    """Whether the matrix kernels will run for a dtype, as far as that can be told without building them."""
    if dtype == torch.bfloat16:  # as the source decides
        features = processor().split()
        return available() and "avx512_bf16" in features and "amx_bf16" not in features
    return available() and dtype in DTYPES


def products(
    x: Tensor, g: Tensor, summed: bool = True, added: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """x [B, E, T, I], g [B, E, T, O] -> the sum of x_b^T g_b [E, I, O] (empty unless ``summed``) and norms [B].

    With ``added`` = ids [B, S] int64, rows [B, S, O], and E = 1: of x_b^T g_b + onehot(ids_b)^T rows_b. The sum is in the
    dtype of ``x``, rounded once. None where there is no kernel for these factors. Waits for the build.

    Raises:
        IndexError: an id is no row of the table.
    """
    dtype = x.dtype
    if not (x.is_cpu and g.is_cpu and g.dtype == dtype and x.shape[:3] == g.shape[:3]):
        return None
    kernel = function("mm_norm.cpp", "mm_sq_norm", dtype)
    B, E, T, I = x.shape
    O = g.shape[3]
    if kernel is None or 0 in (B, E, T, I, O):
        return None
    grad = x.new_empty((E, I, O) if summed else 0)
    sq_norms = x.new_empty(B, dtype=accumulate_dtype(dtype))
    shape = _Shape(B, E, T, I, O, *x.stride(), *g.stride())
    if added is not None:
        ids, rows = added
        if ids.dtype != torch.int64 or rows.dtype != dtype or E != 1:
            return None
        rows = rows if rows.stride(2) == 1 else rows.contiguous()
        shape[13:20] = [ids.shape[1], *ids.stride(), *rows.stride()[:2], ids.data_ptr(), rows.data_ptr()]
    out = grad.data_ptr() if summed else None
    kernel(ctypes.addressof(shape), x.data_ptr(), g.data_ptr(), out, sq_norms.data_ptr(), torch.get_num_threads())
    if shape[20]:
        raise IndexError(f"{shape[20]} of the ids are no row of a table of {I}")
    return grad, sq_norms
