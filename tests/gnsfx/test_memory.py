"""The memory cap, by what the allocator reports of real steps: forward and backward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gnsfx
from gnsfx.passes.plain_step import LEAST


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that were alive at once within the call, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    alive = peak = 0
    for change in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += change.nbytes()
        peak = max(peak, alive)
    return peak


def peak(model: nn.Module, x: Tensor, measured: bool = True, **options) -> int:
    """Of a step after those that compile."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="gns", options={f"gns.{k}": v for k, v in options.items()}, dynamic=False)

    def step() -> None:
        with gnsfx.measuring(measured):
            compiled(x).square().mean().backward()
        model.zero_grad()

    step()
    step()
    return allocated(step)


class Blocks(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return x


class Images(nn.Sequential):
    def __init__(self) -> None:
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 32), (32, 64), (64, 64))]
        norms = [nn.GroupNorm(8, c.out_channels) for c in convolutions]
        super().__init__(*[layer for c, n in zip(convolutions, norms, strict=True) for layer in (c, n, nn.ReLU())])


CASES = {
    "transformer, eager": (lambda: Blocks(256, 3), (16, 64, 256), "eager"),
    "transformer, inductor": (lambda: Blocks(256, 3), (16, 64, 256), "inductor"),
    "wide, short, eager": (lambda: Blocks(512, 2), (64, 4, 512), "eager"),
    "images, eager": (Images, (16, 3, 32, 32), "eager"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_holds_hardly_more_than_a_plain_one(case):
    build, shape, inner = CASES[case]
    model, x = build(), torch.randn(shape)
    plain = peak(model, x, measured=False, inner=inner)
    assert peak(model, x, inner=inner) <= 1.03 * plain + LEAST


def test_the_cap_decides_what_may_be_materialised():
    """Eight products of 1 MiB each, held at once or not."""
    model, x = nn.Linear(512, 512, bias=False), torch.randn(8, 16, 512)
    plain = peak(model, x, measured=False, inner="eager")
    materialised = peak(model, x, inner="eager", path="materialise") - plain
    assert materialised >= 8 << 20
    for memory in (1 << 20, 4 << 20, None):
        allowed = LEAST if memory is None else max(memory, 1 << 20)
        assert peak(model, x, inner="eager", memory=memory) - plain <= allowed


def test_coverage_says_who_needs_more_than_the_cap():
    class Spread(nn.Module):
        """Of a parameter that is sorted the contributions are lifted, which needs all of them."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(1 << 12))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w.cumsum(0)

    for memory, reason in (
        (1 << 10, "needs 0.25 MiB for per-example gradients, the cap is 0.000977 MiB (gns.memory)"),
        (None, ""),
    ):
        torch._dynamo.reset()
        model = Spread()
        torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.memory": memory})(
            torch.randn(16, 1 << 12)
        )
        (row,) = gnsfx.coverage(model)
        assert row.status == "measured" and row.reason == reason
