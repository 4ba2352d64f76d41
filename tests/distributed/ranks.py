"""Running a program of this folder in several processes, and what such programs share."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gnsfx.channel import _channels
from gnsfx.errors import GnsError
from gnsfx.noise.measurement import StepMeasurement
from tests import oracle, zoo

ROOT = Path(__file__).parents[2]
OPTIONS = {"gns.inner": os.environ.get("INNER", "eager")}


def launch(program: str, ranks: int, *arguments: str, timeout: float = 120.0, **environment: str) -> str:
    """The output of ``torchrun program``, whose ranks must all succeed. Nothing is left running."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        **environment,
    }
    process = subprocess.Popen(
        [*command, str(Path(__file__).parent / program), *arguments],
        env=variables,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{program} hangs:\n{output[-3000:]}") from None
    assert process.returncode == 0, output[-5000:]
    return output


@contextlib.contextmanager
def world(**options: Any) -> Iterator[tuple[int, int]]:
    """The rank and the number of ranks.

    A thread of a process group that anything still holds may ask for the GIL while the interpreter ends, and that aborts the
    process. ``fully_shard`` holds those of its mesh; ours must end with ``destroy_process_group``.
    """
    dist.init_process_group("gloo", **options)
    dist._DEFAULT_FIRST_BUCKET_BYTES = 2000  # small models in several buckets
    checks.append(dist.new_group())
    yield dist.get_rank(), dist.get_world_size()
    ours = [weakref.ref(checks.pop()), *(channel._group for channel in _channels.values())]
    gc.collect()  # wrappers refer to themselves
    dist.destroy_process_group()
    assert not any(group() for group in ours), "a process group outlives destroy_process_group()"


checks: list[Any] = []  # the process group of the comparisons between ranks


class Block(nn.Module):
    def __init__(self, D: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Small(nn.Module):
    """An embedding, blocks with a normalisation, a head; an empty batch goes through."""

    def __init__(self, blocks: int, D: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, D), nn.Linear(D, 11)
        self.blocks = nn.ModuleList(Block(D) for _ in range(blocks))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def small(blocks: int = 1) -> Small:
    """The same on every rank."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Small(blocks).double()


Batch = tuple[Tensor, Tensor]


def batch(seed: int, examples: int) -> Batch:
    """The same on every rank: the ranks see batches of other seeds."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(11, (2, examples, 6), generator=generator)
    return tokens, targets


class Truth:
    """What one process would have found: per-example autograd over the batches of all ranks.

    The loss of a backward pass is the mean over its examples, divided by the number of passes; ranks are averaged:
    w = 1 / (W A b).
    """

    def __init__(self, plain: nn.Module, batches: list[list[Batch]], weights: list[list[Tensor]] | None = None) -> None:
        """``batches``: of each rank, of each backward pass. ``weights``: other w, likewise, with a sum of one."""
        names = [name for name, p in plain.named_parameters() if p.requires_grad]
        self.q, self.examples, self.w2 = dict.fromkeys(names, 0.0), 0, 0.0
        plain.zero_grad()
        for r, passes in enumerate(batches):
            for i, (tokens, targets) in enumerate(passes):
                n = len(tokens)
                if not n:
                    continue
                losses = zoo.token_losses(plain(tokens), targets)
                weight = torch.full_like(losses, 1 / (len(batches) * len(passes) * n))
                weight = weight if weights is None else weights[r][i].to(losses)
                found = oracle.per_example_sq_norms(plain, losses, weight)
                self.q = {name: self.q[name] + float(found[name].sum()) for name in names}
                self.examples += n
                self.w2 += float(weight.square().sum())
                (zoo.token_losses(plain(tokens), targets) * weight).sum().backward()
        self.grad_sq = {n: float(p.grad.square().sum()) for n, p in plain.named_parameters() if p.grad is not None}

    def check_pair(self, one: StepMeasurement, names: list[str], tolerance: float, what: str) -> None:
        """tr(Sigma) and |G|^2 of these parameters, by the formula for any weights; errors are those of q and |g|^2."""
        q, g = sum(self.q[n] for n in names), sum(self.grad_sq[n] for n in names)
        slack = tolerance * (q + g) / (1 - self.w2)
        tr_sigma, g_sq = (q - self.w2 * g) / (1 - self.w2) / self.w2, (g - q) / (1 - self.w2)
        assert abs(one.tr_sigma - tr_sigma) <= slack / self.w2, f"{what}: tr(Sigma) {one.tr_sigma}, expected {tr_sigma}"
        assert abs(one.g_sq - g_sq) <= slack, f"{what}: |G|^2 {one.g_sq}, expected {g_sq}"
        assert one.examples == self.examples, f"{what}: {one.examples} examples, expected {self.examples}"


def close(found: float, expected: float, tolerance: float, what: str) -> None:
    assert abs(found - expected) <= tolerance * max(abs(expected), 1e-12), f"{what}: {found!r}, expected {expected!r}"


def same_bits(value: float) -> None:
    """On all ranks."""
    values = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(values, torch.tensor([value], dtype=torch.float64), group=checks[0])
    assert len({v.item() for v in values}) == 1, f"the ranks have {[v.item() for v in values]}"


def plain_name(name: str) -> str:
    return name.replace("module.", "").replace("_orig_mod.", "")


def fails(call: Callable[[], object], *words: str) -> None:
    try:
        call()
    except GnsError as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in: {error}"
    else:
        raise AssertionError(f"no error, expected one with {words}")
