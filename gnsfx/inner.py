"""The compiler inside the backend: Inductor, or AOTAutograd alone with ``gns.inner="eager"``, and our pass as either runs it."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from gnsfx import _torch
from gnsfx.config import Options, debug_level
from gnsfx.kernels import gpu
from gnsfx.kernels.machine import in_force
from gnsfx.passes.kept_report import pack
from gnsfx.passes.norm_layers import NORM_BACKWARDS
from gnsfx.passes.pipeline import Plan, Report, rewrite
from gnsfx.passes.rules import RULES
from gnsfx.passes.state import describe

Compiled = Callable[..., Any]


class RewritePass(_torch.CustomGraphPass):
    """The pass as Inductor sees it. Its uuid keeps the compile caches on."""

    def __init__(self, plan: Plan, keep: Callable[[Report], None], keep_text: bool = False, before: Any = None) -> None:
        self.plan, self.keep, self.keep_text, self.before = plan, keep, keep_text, before
        self._kept: bytes | None = None
        self.kernels: frozenset[str] = frozenset()

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self.before is not None:
            self.before(graph)
        keep_text = self.keep_text or debug_level() >= 3
        report = rewrite(graph, self.plan, keep_text)
        self._kept = pack(report)
        self.keep(report)
        if debug_level() >= 1:
            _print_debug(report)

    def kept(self) -> bytes | None:
        """The report, for who finds the compiled graph in a cache; None before the pass has run."""
        return self._kept

    def uuid(self) -> Any:
        before = self.before.uuid() if self.before is not None else ()
        if before is None:
            return None  # the user's own pass does not want its graphs cached
        plan = self.plan
        states = {i: describe(s) for i, s in plan.states.items()}
        extra = sorted(str(op) for op in RULES)
        return (
            sources_hash(),
            plan.slots,
            tuple(states.items()),
            plan.batch,
            plan.documents,
            plan.refusal,
            plan.parameters,
            plan.memory,
            in_force(),
            tuple(sorted(self.kernels)),
            plan.forced,
            plan.elementwise,
            plan.budget,
            plan.seed,
            plan.per_example,
            tuple(extra),
            before,
        )


def _print_debug(report: Report) -> None:
    for record in report.records:
        print(
            f"gns: input {record.slot} {list(record.shape)}: {record.status} {record.operation} {record.path} {record.reason}".rstrip()
        )
    if report.before:
        print(f"gns: before\n{report.before}\ngns: after\n{report.after}")


_hash: str | None = None


def sources_hash() -> str:
    """Hash of everything that decides what the rewritten graph looks like."""
    global _hash
    if _hash is None:
        root = pathlib.Path(__file__).parent
        digest = hashlib.sha256()
        for folder in ("passes", "kernels"):
            for path in sorted((root / folder).rglob("*.py")):
                digest.update(path.read_bytes())
        _hash = digest.hexdigest()
    return _hash


def inner_compile(
    gm: GraphModule, inputs: Sequence[Any], options: Options, patches: dict[str, Any], rewriting: RewritePass | None
) -> Compiled:
    if options.inner == "eager":
        return eager_compile(gm, inputs, rewriting)
    if rewriting is None:
        inner: Any = _torch.compile_fx(gm, list(inputs), config_patches=patches or None)
        return inner
    before = patches.pop("joint_custom_pre_pass", None) or _torch.inductor_config.joint_custom_pre_pass
    rewriting.before = before
    measured: Any = _torch.compile_fx(
        gm,
        list(inputs),
        inner_compile=_torch.compiler_that_keeps(rewriting.kept),
        config_patches={**patches, "joint_custom_pre_pass": rewriting},
        decompositions=decompositions(rewriting, inputs),
    )
    return measured


def decompositions(rewriting: RewritePass | None, inputs: Sequence[Any]) -> dict[Any, Callable[..., Any]] | None:
    """Inductor's decompositions without those of norm layers' backwards, where a device has our kernel; None: all of them."""
    if rewriting is None:
        return None
    devices = {value.device for value in inputs if isinstance(value, torch.Tensor)}
    rewriting.kernels = frozenset().union(*map(gpu.kernels_on, devices))
    return _torch.decompositions_without(NORM_BACKWARDS) if "norm" in rewriting.kernels else None


def eager_compile(gm: GraphModule, inputs: Sequence[Any], rewriting: RewritePass | None) -> Compiled:
    """Inductor's decompositions and our pass, no code generation."""

    def partition(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        if rewriting is not None:
            rewriting(joint.graph)
            joint.recompile()
        return _torch.default_partition(joint, joint_inputs, **kwargs)

    compiler = _torch.aot_autograd(
        fw_compiler=lambda graph, _: _torch.make_boxed_func(graph.forward),
        partition_fn=partition,
        decompositions=decompositions(rewriting, inputs) or _torch.select_decomp_table(),
    )
    return compiler(gm, list(inputs))
