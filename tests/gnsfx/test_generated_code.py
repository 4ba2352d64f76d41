"""What Inductor generates for a rewritten graph, next to plain: the same forward, and no pass over activations that plain lacks.

Passes are counted in the fused loops and library calls that Inductor is about to write: each tensor of activation size that one
of them reads or writes counts once. No C++ is compiled for it, and nothing of the backward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.scheduler import Scheduler
from torch._inductor.virtualized import V

import gnsfx
from gnsfx import _torch
from tests import zoo

B, T, D, WORDS = 4, 64, 32, 48
ACTIVATION = B * T * D * 4
"""Bytes of the narrowest activation: half as much is a pass, and 1 / T of it, a number per example and column, is not."""


@dataclass
class Generated:
    """Per loop or library call the bytes of each tensor that it reads or writes; what the forward keeps for the backward."""

    forward: list[list[int]] = field(default_factory=list)
    backward: list[list[int]] = field(default_factory=list)
    saved: list[tuple[int, ...]] = field(default_factory=list)

    def passes(self) -> int:
        return sum(size >= ACTIVATION / 2 for node in self.backward for size in node)


@contextmanager
def recording(found: Generated) -> Iterator[None]:
    codegen = Scheduler.codegen

    def record(scheduler: Scheduler) -> None:
        sizes = [[*n.get_read_write_buffer_accesses(True, True).values()] for n in scheduler.nodes]
        (found.backward if V.graph.is_backward else found.forward).extend(sizes)
        codegen(scheduler)

    def compile_nothing(*_: Any, **__: Any) -> Callable[..., None]:
        return lambda *_: None

    def keep(tensor: Tensor) -> Tensor:
        found.saved.append((tensor.numel(), tensor.element_size()))
        return tensor

    with (
        torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True),
        _torch.inductor_config.patch(fx_graph_cache=False),
        mock.patch.object(Scheduler, "codegen", record),
        mock.patch.object(AsyncCompile, "cpp_pybinding", compile_nothing),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        yield


class Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())


def generate(build: Callable[[], nn.Module], params: str | None) -> Generated:
    """``params``: None for plain Inductor."""
    torch._dynamo.reset()
    found, model = Generated(), Loss(build())
    compiled: Any = torch.compile(model) if params is None else gnsfx.compile(model, params=params)
    with recording(found):
        compiled(zoo.ids(WORDS, B, T), zoo.ids(WORDS, B, T))
    return found


GPT = partial(zoo.GPT, WORDS, T, D, 2, layers=1, tied=False)
LLAMA = partial(zoo.Llama, WORDS, D, 4, 2, layers=1)


@pytest.mark.parametrize(
    ("build", "more"),
    [(GPT, {"all": 4}), (LLAMA, {"norm": 0, "all": 2})],  # a table's norms: its rows without padding, written and read
    ids=["gpt", "llama"],
)
def test_as_plain(build: Callable[[], nn.Module], more: dict[str, int]) -> None:
    plain = generate(build, None)
    assert plain.forward and plain.backward and plain.saved
    for params, passes in more.items():
        found = generate(build, params)
        assert len(found.forward) == len(plain.forward) + 1
        assert sum(map(sum, found.forward)) == sum(map(sum, plain.forward)) + 4, "the probe is one number"
        assert sorted(found.saved) == sorted(plain.saved)
        assert found.passes() <= plain.passes() + passes
