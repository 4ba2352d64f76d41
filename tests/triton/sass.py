"""What the machine code of a kernel does: its instructions, its loops, and which loads are in flight when it waits."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

COPY_IN = re.compile(r"\bUTMALDG")  # the copy engine reads a tile
REDUCE_OUT = re.compile(r"\bUTMAREDG")
TENSOR_CORE = re.compile(r"\bHGMMA")
SMALL_TENSOR_CORE = re.compile(r"\bHMMA")
SPILL = re.compile(r"\b(?:LDL|STL)\b")
WIDE_LOAD = re.compile(r"\bLDG\.E\.128|\bLDGSTS\.E(?:\.\w+)*\.128")
ASYNC_LOAD = re.compile(r"\bLDGSTS")
MULTIPLY_IN_FLIGHT = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x[1-9]")
ASYNC_WAIT = re.compile(r"\bDEPBAR\.LE SB0, 0x([0-9a-f]+)")  # until so many groups of asynchronous loads are left
_SIZE = 16  # bytes of an instruction
_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(.*?)\s*;")
_JUMP = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")


class Instruction(NamedTuple):
    at: int
    text: str


Code = list[Instruction]


def disassemble(nvdisasm: Path, cubins: Sequence[bytes]) -> list[Code]:
    """All at once: most of what the tool takes is its own start."""
    texts = [_text(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(texts))
        file.flush()
        command = [nvdisasm, "--no-dataflow", "--binary", "SM90a", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = (_LINE.search(line) for line in listing.splitlines())
    everything = [Instruction(int(found[1], 16), found[2]) for found in lines if found]
    assert all(line.at == _SIZE * n for n, line in enumerate(everything))
    ends = [end // _SIZE for end in itertools.accumulate(len(text) for text in texts)]
    return [everything[start:end] for start, end in itertools.pairwise([0, *ends])]


def _text(cubin: bytes) -> bytes:
    """The section of an ELF file with the instructions of its only kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    strings = headers[names][4]
    (found,) = ((at, length) for name, _, _, _, at, length in headers if cubin.startswith(b".text.", strings + name))
    return cubin[found[0] : found[0] + found[1]]


def count(code: Code, pattern: re.Pattern[str]) -> int:
    return sum(bool(pattern.search(line.text)) for line in code)


def loops(code: Code, pattern: re.Pattern[str]) -> list[Code]:
    """The innermost loops in which something occurs, in the order of the program."""
    bodies = {(start, stop): [line for line in code if start <= line.at <= stop] for start, stop in _spans(code)}
    found = {span: body for span, body in bodies.items() if count(body, pattern)}
    return [
        body
        for (start, stop), body in found.items()
        if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in found)
    ]


def copies_ahead(code: Code, multiply: re.Pattern[str]) -> list[tuple[int, int]]:
    """For each loop that multiplies: the copies that were begun before it, and those that each round begins.

    A copy was begun before a loop if none of the loops around that one comes back to the copy.
    """
    found, behind = [], 0
    for body in loops(code, multiply):
        first, last = body[0].at, body[-1].at
        outermost = min(start for start, stop in _spans(code) if start <= first and last <= stop)
        found.append((count([line for line in code if behind < line.at < outermost], COPY_IN), count(body, COPY_IN)))
        behind = last
    return found


def waits(code: Code) -> list[int]:
    """For each loop over asynchronous loads: the groups of them that its wait leaves in flight."""
    found = []
    for body in loops(code, ASYNC_LOAD):
        left = [int(wait[1], 16) for line in body if (wait := ASYNC_WAIT.search(line.text))]
        found.append(min(left, default=0))
    return found


def _spans(code: Code) -> list[tuple[int, int]]:
    """Where loops begin and end.

    What stands behind the last exit are the rare ends of branches, which jump back to where they came from; only a jump that a
    conditional exit skips still belongs to the program.
    """
    exits = [line for line in code if line.text.endswith("EXIT")]
    last = exits[-1].at + _SIZE * (exits[-1].text != "EXIT")
    jumps = ((int(jump[1], 16), line.at) for line in code if (jump := _JUMP.search(line.text)))
    return sorted({(to, at) for to, at in jumps if to < at <= last})
