"""How fast a device is: a few constants, shipped for some devices, measured by ``python -m gnsfx.calibrate`` for any.

    seconds of a path = sum over kinds of work of amount / rate        the amounts are in kernels/cost.py

What was measured lies in a file per device, made by hand and never by training: a graph compiled today and one compiled
tomorrow are rewritten alike. A file that is broken, or of another machine, is left alone with a notice.
"""

import functools
import json
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from gnsfx.errors import GnsWarning
from gnsfx.kernels import gpu
from gnsfx.kernels.cache_folder import cache_folder

FORMAT = 1
"""Of the file. Another one is not read."""


@dataclass(frozen=True)
class Machine:
    """Rates of one device, per second. ``measured`` is false where nobody timed this very device.

    flops_*: multiplications and additions of the library's matrix multiply, at its best.
    fused_*: the same of the kernel that takes norms along (``mm_sq_norm``); 0 where there is none.
    operand_bytes, result_bytes: of a matrix multiply, read and written; what makes small ones slower than large ones.
    bandwidth: bytes through memory; cache_bandwidth: bytes through a buffer that stays in the cache.
    calls: torch operations dispatched. mixed_matmul: whether bf16 can be multiplied into fp32.
    reused_bytes, fresh_bandwidth: a larger block is mapped anew each time it is allocated, at this rate.

    The last seven are of our CUDA kernels, and asked of nothing else: FLOPs of a weight gradient by tiles of each size, of
    Grams by blocks of 128 positions and by smaller ones; entries squared; bytes added to memory by the copy engine. For an
    H200 that nobody timed: 0.8, 0.7 and 0.9 of the library's rate by tiles, 0.55 and 0.4 by Grams, which read more for what
    they multiply; 128 x 128 entries squared in 750 cycles; half of what the copy engine adds hidden by the next product.
    Choices depend on ratios, and other GPUs have similar ones.
    """

    flops_fp32: float
    flops_bf16: float
    flops_fp64: float
    fused_fp32: float
    fused_bf16: float
    fused_fp64: float
    operand_bytes: float
    result_bytes: float
    bandwidth: float
    cache_bandwidth: float
    calls: float
    fresh_bandwidth: float
    reused_bytes: float
    mixed_matmul: bool = False
    measured: bool = False
    large_flops: float = 630e12
    small_flops: float = 550e12
    reduce_flops: float = 710e12
    gram_flops: float = 430e12
    small_gram_flops: float = 320e12
    squares: float = 5e12
    reduce_bytes: float = 5e12

    def fused(self, dtype: torch.dtype) -> float:
        """Rate of our own kernel; 0 where there is none. It multiplies fp16 as fp32."""
        return {torch.float64: self.fused_fp64, torch.bfloat16: self.fused_bf16}.get(dtype, self.fused_fp32)


CUDA_KERNELS = (
    "large_flops",
    "small_flops",
    "reduce_flops",
    "gram_flops",
    "small_gram_flops",
    "squares",
    "reduce_bytes",
)
"""Constants of our CUDA kernels; fields of a Cost have the same names."""

MACHINES: Mapping[str, Machine] = {
    # Fitted by gnsfx.calibrate on 2 threads of a Zen 4 server, torch 2.13. Blocks above 32 MiB go back to the kernel at
    # once (glibc), and every page of them faults again.
    "cpu": Machine(
        flops_fp32=188e9,
        flops_bf16=355e9,
        flops_fp64=92e9,
        fused_fp32=193e9,
        fused_bf16=350e9,
        fused_fp64=96e9,
        operand_bytes=26e9,
        result_bytes=75e9,
        bandwidth=29e9,
        cache_bandwidth=150e9,
        calls=190e3,
        fresh_bandwidth=3.5e9,
        reused_bytes=32 << 20,
        measured=True,
    ),
    # H200, modelled: tensor-core bf16 and HBM as in data sheets less the usual losses, never timed by us. Calls are
    # queued ahead of the device, so most of their host time is hidden.
    "cuda": Machine(
        flops_fp32=50e12,
        flops_bf16=790e12,
        flops_fp64=50e12,
        fused_fp32=0,
        fused_bf16=0,
        fused_fp64=0,
        operand_bytes=20e12,
        result_bytes=8e12,
        bandwidth=4.3e12,
        cache_bandwidth=4.3e12,
        calls=1e6,
        fresh_bandwidth=1e15,
        reused_bytes=1 << 40,
        mixed_matmul=True,
    ),
}


@functools.cache
def machine_for(device_type: str) -> Machine:
    """The measured constants of this device, or those that are shipped. Read once per process."""
    return without_missing(read(device_type) or default(device_type), device_type)


def without_missing(machine: Machine, device_type: str) -> Machine:
    """The same without C++ kernels where there is no compiler for them, or nothing that they are quick on."""
    from gnsfx.kernels import native

    dtypes = {"fused_fp32": torch.float32, "fused_bf16": torch.bfloat16, "fused_fp64": torch.float64}
    missing = {name: 0.0 for name, dtype in dtypes.items() if device_type != "cpu" or not native.expected(dtype)}
    return replace(machine, **missing)


def default(device_type: str) -> Machine:
    """What is shipped for a device of this type; an accelerator that nobody described counts as a GPU."""
    return MACHINES.get(device_type, MACHINES["cuda"])


def in_force() -> tuple[tuple[str, Machine, tuple[str, ...], int], ...]:
    """All that a choice between paths depends on besides the graph; part of the compile caches' key.

    Of each type of device: its constants, the CUDA kernels of ours that run there, its multiprocessors.
    """
    return tuple((name, machine_for(name), *_kernels(name)) for name in MACHINES)


def _kernels(device_type: str) -> tuple[tuple[str, ...], int]:
    if device_type == "cuda" and not torch.cuda.is_initialized():
        return (), 0  # no tensor is there, and to ask would make a context
    device = torch.device(device_type)
    kernels = tuple(sorted(gpu.kernels_on(device)))
    return kernels, gpu.multiprocessors(device) if kernels else 0


def fingerprint(device_type: str) -> dict[str, str]:
    """What the constants belong to."""
    found = {"torch": ".".join(torch.__version__.split(".")[:2])}
    if device_type == "cuda":
        return {**found, "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    return {**found, "processor": _processor(), "threads": str(torch.get_num_threads())}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'unknown'}, {platform.machine()}"


def cache_file(device_type: str) -> Path:
    """A file of the cache folder per device and number of threads."""
    threads = f"-{torch.get_num_threads()}" if device_type == "cpu" else ""
    return cache_folder() / f"{device_type}{threads}.json"


def read(device_type: str) -> Machine | None:
    """The constants in the file of this device; None, with a notice, where they are of no use, and where there are none."""
    path = cache_file(device_type)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(path, device_type, f"it cannot be read ({error})")
    try:
        found = json.loads(text)
        constants, of, version = found["constants"], found["of"], found["format"]
        machine = Machine(**constants)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return _ignored(path, device_type, f"it is damaged ({type(error).__name__}: {error})")
    if version != FORMAT:
        return _ignored(path, device_type, f"it has format {version}, expected {FORMAT}")
    if not _usable(machine):
        return _ignored(path, device_type, "it holds a constant that is no positive number")
    own = fingerprint(device_type)
    if of != own:
        differs = next((k for k in own if not isinstance(of, dict) or of.get(k) != own[k]), "device")
        there = of.get(differs) if isinstance(of, dict) else of
        return _ignored(
            path, device_type, f"it is of another machine ({differs}: {there!r}, here {own.get(differs)!r})"
        )
    return machine


def write(machine: Machine, device_type: str) -> Path:
    """Keep the constants of this device; raises OSError where the file cannot be written."""
    path = cache_file(device_type)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "of": fingerprint(device_type), "constants": asdict(machine)}
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    machine_for.cache_clear()
    return path


def _usable(machine: Machine) -> bool:
    for field in fields(Machine):
        value = getattr(machine, field.name)
        if field.type in ("bool", bool):
            if not isinstance(value, bool):
                return False
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        elif not (1 <= value <= 1e30 or (value == 0 and field.name.startswith("fused"))):
            return False
    return True


def _ignored(path: Path, device_type: str, why: str) -> None:
    warnings.warn(
        f"gnsfx: the machine constants in {path} are ignored: {why}. The shipped ones are used; "
        f"`python -m gnsfx.calibrate --device {device_type}` measures this machine.",
        GnsWarning,
        stacklevel=2,
    )
