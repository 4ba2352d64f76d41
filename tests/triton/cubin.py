"""Compiling what Triton kernels' host functions launch, for a Hopper GPU on a machine that has none.

Host functions are called with tensors that hold no data (device "meta"); each launch becomes a cubin instead.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.triton import sass

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
REGISTERS, SHARED, OF_ALL, THREADS = 65536, 232448, 233472, 2048
"""Of one multiprocessor: registers, bytes that one program may have and that all may, of which each takes 1,024 more; threads."""


class CompileOnly:
    """Enough of a driver for the usual specialisation to run; nothing is launched."""

    launcher_cls = utils = None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return 9, 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def map_python_to_cpp_type(self, kind: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)


@dataclass
class Cubin:
    """A kernel with its settings (tile, regime, warps, ...), what it takes of the chip, and what it does."""

    kernel: str
    dtypes: tuple[torch.dtype, ...]
    settings: dict[str, Any]
    registers: int
    stack: int  # bytes of registers that did not fit
    shared: int
    warnings: list[str]
    binary: bytes = field(repr=False)
    code: sass.Code = field(default_factory=list, repr=False)

    @property
    def threads(self) -> int:
        return 32 * self.settings.get("num_warps", 4)

    @property
    def resident(self) -> int:
        """How many programs fit a multiprocessor at a time."""
        registers = -(-self.registers // 8) * 8 * self.threads
        return min(REGISTERS // registers, OF_ALL // (self.shared + 1024), THREADS // self.threads)

    def __str__(self) -> str:
        dtypes = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        tile = " ".join(f"{name.lower()}={value or 0:d}" for name, value in self.settings.items())
        return f"{self.kernel} {','.join(dtypes)} {tile}: {self.registers} registers, {self.stack} spilled, {self.shared} shared, {self.resident} fit"

    def faults(self, spills: int = 0) -> list[str]:
        """What no kernel may have: more spills than allowed, more of anything than a multiprocessor has, doubts of the assembler."""
        found = [f"the assembler warns: {warning}" for warning in self.warnings]
        if self.stack > spills:
            found.append(f"{self.stack} bytes of spills, {spills} allowed")
        if -(-self.registers // 8) * 8 * self.threads > REGISTERS:
            found.append(f"{self.registers} registers x {self.threads} threads do not fit")
        if self.shared > SHARED:
            found.append(f"{self.shared} bytes of shared memory do not fit")
        return found


@contextmanager
def launches(at: Callable[..., Any]) -> Iterator[None]:
    """Call ``at(kernel, args, settings)`` for each launch, and launch nothing."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        at(self, args, settings)

    with mock.patch.object(JITFunction, "run", run):
        yield


_known: dict[str, Cubin] = {}  # by the compiler's hash: what was compiled once is not compiled, and not read, again


def compiled(calls: Callable[[], object]) -> list[Cubin]:
    """A cubin for each different kernel that ``calls`` launches."""
    driver.set_active(CompileOnly())
    build = JITFunction.run
    found: dict[str, Cubin] = {}

    def compile(kernel: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        printed = io.StringIO()
        with redirect_stdout(printed):
            binary = build(kernel, *args, grid=(1,), warmup=True, **settings)
        if binary.hash not in _known:
            dtypes = tuple(
                arg.base.dtype if isinstance(arg, TensorDescriptor) else arg.dtype
                for arg in args
                if isinstance(arg, torch.Tensor | TensorDescriptor)
            )
            _known[binary.hash] = _read(kernel.__name__, dtypes, settings, binary, printed.getvalue())
        found[binary.hash] = _known[binary.hash]

    with launches(compile), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        calls()
    new = [cubin for cubin in found.values() if not cubin.code]
    for cubin, code in zip(new, sass.disassemble(NVDISASM, [cubin.binary for cubin in new]), strict=True):
        cubin.code = code
    return list(found.values())


def _read(kernel: str, dtypes: tuple[torch.dtype, ...], settings: dict[str, Any], binary: Any, log: str) -> Cubin:
    registers, stack = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes stack frame", log)
    assert registers and stack, log
    warnings = [line for line in log.splitlines() if "Potential Performance Loss" in line or "warning" in line]
    takes = int(registers[1]), int(stack[1]), binary.metadata.shared
    return Cubin(kernel, dtypes, settings, *takes, warnings, binary.asm["cubin"])
