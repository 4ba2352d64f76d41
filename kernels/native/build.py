"""A C++ source beside this file -> a shared library in the cache folder, built once per machine.

The file is named by a hash of all that its content follows from: source, flags, compiler, processor. It is written
under another name and then renamed, so processes that build at the same time cannot see half of one, and it ends with
the hash of its content, so that a damaged one is built again instead of loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gnsfx._torch import compiler_and_openmp
from gnsfx.kernels.cache_folder import cache_folder

_HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
# Inductor's flags for its own code allow the compiler to assume that nothing is infinite or NaN; here that is news.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-march=native" if platform.machine() == "x86_64" else "-mcpu=native",
)
_DIGEST_BYTES = hashlib.sha256().digest_size


def load(source: str, define: str, linked: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of one source with one macro defined, from the cache or built now. ``linked``: flags behind the source.

    Raises:
        RuntimeError: there is no compiler.
        subprocess.CalledProcessError: the compiler refuses the source; its ``stderr`` says why.
        OSError: nothing can be written, or the library cannot be loaded.
    """
    compiler, before, behind = compiler_and_openmp()
    behind = [*behind, *linked]
    path = Path(__file__).parent / source
    command = [compiler, *_FLAGS, *before, f"-D{define}", str(path), *behind]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    parts = [
        *_FLAGS,
        *before,
        define,
        *behind,
        version,
        processor(),
        *(file.read_text(encoding="utf-8") for file in (path, *_HEADERS)),
    ]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    name = f"{path.stem}-{key}.so"
    path = cache_folder() / name
    if not _whole(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _build(command, path)
        except OSError:  # a home that is read-only, or full
            with tempfile.TemporaryDirectory(prefix="gnsfx-") as folder:  # what is loaded needs no name
                _build(command, Path(folder) / name)
                return ctypes.CDLL(str(Path(folder) / name))
    return ctypes.CDLL(str(path))


def _build(command: list[str], path: Path) -> None:
    """Let the command write ``path``, all at once."""
    handle, part = tempfile.mkstemp(suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        subprocess.run([*command, "-o", part], check=True, capture_output=True, text=True)
        content = Path(part).read_bytes()
        Path(part).write_bytes(content + hashlib.sha256(content).digest())
        Path(part).replace(path)
    finally:
        Path(part).unlink(missing_ok=True)


def _whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def processor() -> str:
    """What ``native`` stands for: the processor's model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join([platform.machine(), platform.processor(), *dict.fromkeys(s for s in lines if s.startswith(told))])
