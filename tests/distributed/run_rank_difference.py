"""Ranks as units: the formula, and the expectation that single examples as units have."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gnsfx
from gnsfx.noise.rank_difference import RankDifference
from tests.distributed.ranks import OPTIONS, close, fails, same_bits, world

STEPS, EACH = 200, 4


def one_step_by_hand(rank: int, ranks: int) -> None:
    """Against the gradients of all ranks, taken one by one; two passes of unequal size."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    wrapped = DistributedDataParallel(model)
    difference = RankDifference(wrapped)
    data = [[torch.randn(2 + r + i, 3, dtype=torch.float64) for i in range(2)] for r in range(ranks)]
    with wrapped.no_sync():
        (wrapped(data[rank][0]).square().sum(1).mean() / 2).backward()
    (wrapped(data[rank][1]).square().sum(1).mean() / 2).backward()
    pair = difference.step(*(len(x) for x in data[rank]))
    gradients = []
    for passes in data:
        loss = sum(model(x).square().sum(1).mean() / 2 for x in passes)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])]))
    stacked = torch.stack(gradients)
    examples = (2 * ranks) ** 2 / sum(1 / len(x) for passes in data for x in passes)
    between = stacked.var(0).sum()  # unbiased, of a rank
    close(float(pair.tr_sigma), float(between / ranks * examples), 1e-12, "tr(Sigma)")
    close(float(pair.g_sq), float(stacked.mean(0).square().sum() - between / ranks), 1e-12, "|G|^2")
    same_bits(float(pair.tr_sigma))
    wrapped.zero_grad()
    x = data[rank][0][: 0 if rank == 0 else None]
    (wrapped(x).square().sum() / max(len(x), 1)).backward()
    pair = difference.step(len(x))  # without the first rank
    assert bool(pair.tr_sigma.isfinite()) == (ranks > 2) and math.isfinite(difference.tr_sigma)
    if ranks > 2:
        g = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(
            model(passes[0]).square().sum(1).mean(), [*model.parameters()])]) for passes in data[1:]]) * (ranks - 1) / ranks  # fmt: skip
        examples = (ranks - 1) ** 2 / sum(1 / len(passes[0]) for passes in data[1:])
        close(float(pair.tr_sigma), float(g.var(0).sum() / (ranks - 1) * examples), 1e-12, "tr(Sigma), a rank idle")
    wrapped(data[rank][0]).sum().backward()
    wrapped(data[rank][0]).sum().backward()
    fails(lambda: difference.step(1, 1), "2 times", "no_sync")


class Score(nn.Module):
    """The gradient of its mean is the mean of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def agreement_in_expectation(rank: int, ranks: int) -> None:
    """Gradients x_b + G of a linear model, at fixed weights: the two estimates differ by their standard errors."""
    torch.manual_seed(rank)
    model = Score()
    wrapped = torch.compile(DistributedDataParallel(model), backend="gns", options=OPTIONS)
    difference, noise = RankDifference(wrapped), gnsfx.NoiseScale(wrapped, half_life=1e9)
    pairs = []
    for _ in range(STEPS):
        model.zero_grad()
        wrapped(torch.randn(EACH, 6) + 0.5).mean().backward()
        fine = difference.step()
        coarse = noise.step()
        pairs.append([float(fine.tr_sigma), float(fine.g_sq), coarse.tr_sigma, coarse.g_sq])
    values = torch.tensor(pairs, dtype=torch.float64)
    for name, truth, column in (("tr(Sigma)", 6.0, 0), ("|G|^2", 1.5, 1)):
        for which in (column, column + 2):
            mean, error = values[:, which].mean(), values[:, which].std() / STEPS**0.5
            assert abs(mean - truth) < 4 * error, f"{name}: {mean} +- {error}, expected {truth}"
    assert values[:, 0].std() > 2 * values[:, 2].std()  # what single examples are for
    close(difference.tr_sigma, float(values[:, 0].mean()), 1e-9, "average")
    same_bits(difference.b_simple)


if __name__ == "__main__":
    with world() as (rank, ranks):
        one_step_by_hand(rank, ranks)
        agreement_in_expectation(rank, ranks)
        print(f"rank {rank}: done", flush=True)
        dist.barrier()
