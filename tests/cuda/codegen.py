"""What Inductor makes of a training graph for a Hopper GPU: its kernels and calls, and the bytes that each reads and writes.

Counted as Inductor's own metrics do: a buffer counts once for a kernel that reads it and once for one that writes it, however
often the kernel goes over it, and what lies between the stages of a sum does not count. It is the least that a kernel can move.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
from torch._functorch import config as functorch_config
from torch._inductor import config, ir, scheduler
from torch._inductor.graph import GraphLowering

from gnsfx.config import Options
from gnsfx.inner import inner_compile
from tests.cuda.traced import Captured, rewriting
from tests.triton.cubin import CompileOnly


class Launch(NamedTuple):
    """A kernel of Inductor ("triton") or a call, with the bytes that it reads and writes, by buffer."""

    name: str
    read: dict[str, int]
    written: dict[str, int]


class Generated(NamedTuple):
    """Forward or backward."""

    launches: list[Launch]
    code: str

    def calls(self) -> Counter[str]:
        """How often the code starts kernels of Inductor ("triton", and "sum" for what a kernel left in a workspace) and each op."""
        code = re.sub(r"'torch\.ops\.[^']*'", "", self.code[self.code.rindex("\n    def call(") :])
        found = Counter(re.findall(r"(?:extern_kernels|torch\.ops)\.([\w.]+)\(", code))
        kernels = len(re.findall(r"^\s+triton_\w+\.run\(", code, re.M))
        sums = len(re.findall(r"= workspace_.*\.sum\(", code))
        return found + Counter({"triton": kernels, "sum": sums})

    def bytes(self, *names: str) -> int:
        """Read and written by launches of these names, or by all."""
        found = [one for one in self.launches if not names or one.name in names]
        return sum(n for one in found for n in (*one.read.values(), *one.written.values()))


def generate(captured: Captured, options: Options | None) -> tuple[Generated, Generated]:
    """Forward and backward; ``options`` None: plain Inductor."""
    with _no_execution() as found:
        if options is None:
            with captured.around():
                inner_compile(captured.gm, captured.inputs, Options(), {}, None)
        else:
            rewriting(captured, options, lambda gm, inputs, rewrite: inner_compile(gm, inputs, options, {}, rewrite))
    forward, backward = found
    return forward, backward


@contextmanager
def _no_execution() -> Iterator[list[Generated]]:
    """Code is kept instead of being compiled."""
    found: list[Generated] = []

    def keep(self: GraphLowering) -> Any:
        code, _ = self.codegen()
        launches = [launch for node in self.scheduler.nodes if (launch := _launch(node))]
        found.append(Generated(launches, code.value))
        return SimpleNamespace(call=None)

    triton.runtime.driver.set_active(CompileOnly())
    with (
        mock.patch.object(GraphLowering, "compile_to_module", keep),
        config.patch(fx_graph_cache=False, joint_graph_constant_folding=False),  # constants are folded by running them
        functorch_config.patch(force_non_lazy_backward_lowering=True),
    ):
        yield found


def _launch(node: scheduler.BaseSchedulerNode) -> Launch | None:
    inner: Any = node.node
    if isinstance(node, scheduler.NopKernelSchedulerNode) or isinstance(inner, ir.MultiOutput):
        return None
    name = "triton"
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        name = str(inner.op_overload).removesuffix(".default")
    read, written = (dict(node.get_read_write_buffer_accesses(reads, not reads)) for reads in (True, False))
    return Launch(name, read, written)
