"""A whole measured step whose ops launch the Triton kernels, against per-example autograd: all of the CUDA path but the GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnsfx.errors import GnsWarning
from gnsfx.kernels import gpu, gpu_checks, machine
from gnsfx.kernels.norm_backward import agrees
from gnsfx.kernels.triton import embedding_norm, mm_norm, norm_backward, plan
from tests import oracle, zoo
from tests.passes.test_gpu_rewrite import as_on_cuda, compiled_like_autograd

f32 = torch.float32
HOSTS = {  # what starts each kernel
    "mm_norm": (mm_norm, "product_norms"),
    "gram_norm": (mm_norm, "gram_norms"),
    "embedding_norm": (embedding_norm, "embedding_norms"),
    "norm_backward": (norm_backward, "norm_backward"),
}
INTERPRETED = [
    n for n, tile in enumerate(plan.TILES) if tile != plan.REDUCE
]  # that takes an addition by the copy engine


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each kernel was launched from CPU tensors, which take what CUDA tensors take."""
    torch._dynamo.reset()
    as_on_cuda(monkeypatch, {*gpu.MULTIPLIED, f32})
    monkeypatch.setattr(gpu, "launches_on", lambda device: True)
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(gpu, "_trusted", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    machine.machine_for.cache_clear()
    counts: Counter[str] = Counter()

    def count(kernel: str, module: Any, name: str) -> None:
        host = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: (counts.update([kernel]), host(*args, **more))[1])

    for kernel, host in HOSTS.items():
        count(kernel, *host)
    yield counts
    machine.machine_for.cache_clear()


class Block(nn.Module):
    """Tables, both kinds of norm layer, projections of one input, odd positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.at = nn.Embedding(16, 8, padding_idx=3), nn.Embedding(5, 8)
        self.before, self.after = nn.LayerNorm(8), nn.RMSNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, o, bias=False) for o in (8, 8, 16))
        self.out, self.head = nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.at(torch.arange(tokens.shape[1]))
        y = self.before(x)
        y = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return self.head(self.after(x + self.out(y)))


def block(B: int = 3, T: int = 5) -> zoo.Case:
    torch.manual_seed(0)
    model, tokens, targets = Block(), zoo.ids(16, B, T), zoo.ids(16, B, T)
    return model, lambda m: zoo.token_losses(m(tokens), targets)


@pytest.mark.parametrize(("path", "kernel"), [("fused", "mm_norm"), ("ghost", "gram_norm")])
def test_a_step(path: str, kernel: str, ran: Counter[str]) -> None:
    compiled_like_autograd(block(), oracle.tolerance(f32), **{"gns.path": path})
    assert set(ran) == {kernel, "embedding_norm", "norm_backward"}
    assert set(gpu._trusted.values()) == {True}


@pytest.mark.parametrize("tile", INTERPRETED)
def test_products_pass_the_check_on_a_device(tile: int, ran: Counter[str]) -> None:
    assert gpu_checks.product_is_right(tile, [torch.empty(3, 5, 8, dtype=torch.float16)] * 2)


@pytest.mark.parametrize("tile", range(len(plan.GRAMS)))
def test_grams_pass_the_check_on_a_device(tile: int, ran: Counter[str]) -> None:
    x = torch.empty(3, 5, 8, dtype=torch.float16)
    assert gpu_checks.gram_is_right(tile, [x, x.transpose(0, 1).contiguous().transpose(0, 1)])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("regime", plan.row_regimes(8))
def test_norm_layers_pass_the_check_on_a_device(regime: int, count: int) -> None:
    x, rows = torch.empty(3, 5, 8, dtype=torch.float16), torch.empty(3, 5)
    more = [x] * (count - 1) + [None] * (3 - count)
    assert agrees((x, x, rows, rows, rows[0], x, *more), True, regime)


def test_the_check_knows_no_default_device(ran: Counter[str]) -> None:
    x, rows = torch.empty(3, 5, 8), torch.empty(3, 5)
    with torch.device("meta"):
        assert gpu_checks.lookup_is_right(rows.long(), x)
        assert agrees((x, x, None, rows, None, None, None, None), False, plan.CHUNK)


@pytest.mark.parametrize("kernel", HOSTS)
def test_a_wrong_kernel_is_not_used(kernel: str, ran: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that are off by a hundredth: a warning names the kernel, and the step's numbers are right."""
    module, name = HOSTS[kernel]
    right = getattr(module, name)

    def off(*args: Any, **more: Any) -> Any:
        found = right(*args, **more)
        if isinstance(found, Tensor):
            return found * 1.01
        at = 3 if kernel == "norm_backward" else len(found) - 1
        return [each * 1.01 if n == at else each for n, each in enumerate(found)]

    monkeypatch.setattr(module, name, off)
    with pytest.warns(GnsWarning, match=f"the CUDA kernel {kernel} "):
        compiled_like_autograd(
            block(), oracle.tolerance(f32), **{"gns.path": "ghost" if kernel == "gram_norm" else "fused"}
        )
