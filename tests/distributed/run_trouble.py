"""What goes wrong in practice: a rank without examples, out of step, with another model, or gone."""

from __future__ import annotations

import copy
import math
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gnsfx
from gnsfx import collector, distributed
from gnsfx.errors import GnsError
from tests import zoo
from tests.distributed.ranks import OPTIONS, Batch, Truth, batch, close, fails, same_bits, small, world

SECONDS = 2.0


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="gns", options=OPTIONS)


def shares_add_up(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (ranks,))
    tall, wide, odd = torch.randn(5, 3), torch.randn(4, 2 * ranks).double(), torch.randn(1, 3)
    grads: list[Tensor] = [
        tall,
        distribute_tensor(tall, mesh, [Shard(0)]),
        distribute_tensor(wide, mesh, [Shard(1)]),
        distribute_tensor(odd, mesh, [Shard(0)]),
        distribute_tensor(tall, mesh, [Replicate()]),
    ]
    expected = [tall, tall, wide, odd, tall]
    if ranks == 4:
        grid = init_device_mesh("cpu", (2, 2))
        grads.append(distribute_tensor(tall, grid, [Replicate(), Shard(0)]))
        half = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]
        grads.append(distribute_tensor(tall, half, [Shard(0)]))
        expected += [tall, tall]
    group = dist.group.WORLD
    found = distributed.all_reduce(distributed.grad_sq_shares(grads, group), group, "shares")
    for value, grad in zip(found.tolist(), expected, strict=True):
        close(value, float(grad.double().square().sum()), 1e-6, "|g|^2")
    assert any(isinstance(g, DTensor) for g in grads)
    values = [1.5, -math.inf, math.nan, float(rank)] if rank == 0 else [7.0, 7.0, 7.0, float(rank)]
    got = distributed.broadcast_decision(values, group)
    assert got[:2] == [1.5, -math.inf] and math.isnan(got[2]) and got[3] == 0.0


def each_rank_its_own_model(rank: int, ranks: int) -> None:
    """Nothing says that these gradients are averaged, so no rank waits for another."""
    model = small()
    noise = gnsfx.NoiseScale(compiled(model))
    if rank == 0:
        zoo.token_losses(noise.model(batch(0, 4)[0]), batch(0, 4)[1]).mean().backward()
        noise.step()
        assert noise.examples == 4 and distributed.group_of(noise.model) is None


def a_parameter_that_is_left_out(rank: int, ranks: int) -> None:
    for wrap in ("ddp", "fsdp"):
        model = small()
        if wrap == "ddp":
            model._ddp_params_and_buffers_to_ignore = ["embed.weight"]
            wrapped = compiled(DistributedDataParallel(model))
        else:
            wrapped = compiled(
                fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)), ignored_params={model.embed.weight})
            )
        noise = gnsfx.NoiseScale(wrapped)
        zoo.token_losses(wrapped(batch(rank, 4)[0]), batch(rank, 4)[1]).mean().backward()
        found = distributed.only_averaged(collector.totals(model), wrapped)
        refused = [n for n, r in zip(found.names, found.refusals, strict=True) if r is not None]
        assert refused == ["embed.weight"] and found.refusals[0] == distributed.NOT_AVERAGED, (wrap, found.refusals)
        noise.step()
        assert "embed.weight" not in "".join(noise.by_parameter())


def what_is_refused(rank: int, ranks: int) -> None:
    """By name and with a reason; training goes on."""
    mesh = init_device_mesh("cpu", (ranks,))

    def reasons(wrapped: nn.Module) -> dict[str, str | None]:
        """Of a copy that was trained for one step."""
        torch._dynamo.reset()
        zoo.token_losses(wrapped(batch(rank, 4)[0]), batch(rank, 4)[1]).mean().backward()
        found = collector.totals(wrapped)
        assert any(p.grad is not None for p in found.parameters)
        return dict(zip(found.names, found.refusals, strict=True))

    split = small()
    for block in split.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    assert all("tensor parallelism" in str(reason) for reason in reasons(compiled(split)).values())
    flat = FullyShardedDataParallel(small(), device_id=torch.device("cpu"), use_orig_params=True)
    assert all("fully_shard" in str(reason) for reason in reasons(compiled(flat)).values())
    tied = small()
    tied.head.weight = tied.embed.weight
    found = reasons(compiled(DistributedDataParallel(tied, bucket_cap_mb=0.004)))
    refused = {name.rpartition("module.")[2]: reason for name, reason in found.items() if reason}
    assert [*refused] == ["embed.weight"] and "optimize_ddp" in str(refused["embed.weight"]), refused
    sharded = fully_shard(small(), mesh=mesh)
    assert not any(reasons(compiled(sharded)).values())
    sharded.zero_grad(set_to_none=False)
    assert all("set_to_none" in str(reason) for reason in reasons(compiled(sharded)).values())
    sharded.zero_grad()
    assert not any(reasons(compiled(sharded)).values())
    summed = fully_shard(small(), mesh=mesh)
    summed.set_gradient_divide_factor(1.0)
    assert not any(reasons(compiled(summed)).values())
    fails(lambda: distributed.group_of(summed), "divided by 1", f"{ranks} ranks")


def no_examples_on_one_rank(rank: int, ranks: int) -> None:
    """An empty batch through DDP adds zero to the gradient, so the others count (W - 1) / W: B_simple is theirs."""
    model = small()
    plain = copy.deepcopy(model)
    wrapped = compiled(DistributedDataParallel(model))
    noise = gnsfx.NoiseScale(model)
    for step in range(3):
        wrapped.zero_grad()
        empty = step % ranks if step < 2 else ranks
        batches = [[batch(10 * step + r, 0 if r == empty else 3 + r)] for r in range(ranks)]
        tokens, targets = batches[rank][0]
        (zoo.token_losses(wrapped(tokens), targets).sum() / max(len(tokens), 1)).backward()
        assert collector.totals(model).micro_batches == (len(tokens),)
        one = noise.step()
        truth = Truth(plain, [b for r, b in enumerate(batches) if r != empty])
        scale = ((ranks - (empty < ranks)) / ranks) ** 2
        truth.q = {name: q * scale for name, q in truth.q.items()}
        truth.grad_sq = {name: g * scale for name, g in truth.grad_sq.items()}
        truth.check_pair(one, [*truth.q], 1e-9, f"rank {empty} empty")
    same_bits(noise.b_simple)


def averaged_by_hand(rank: int, ranks: int) -> None:
    """No wrapper, a named group, and a step in which the last rank runs no backward at all."""
    model = small()
    plain = copy.deepcopy(model)
    wrapped = compiled(model)
    noise = gnsfx.NoiseScale(wrapped, process_group=dist.group.WORLD)
    for step in range(2):
        model.zero_grad()
        idle = step == 1 and rank == ranks - 1
        batches: list[list[Batch]] = [[batch(10 * step + r, 3)] for r in range(ranks)]
        if not idle:
            tokens, targets = batches[rank][0]
            zoo.token_losses(wrapped(tokens), targets).mean().backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
        one = noise.step()
        active = ranks - (step == 1)
        truth = Truth(plain, batches[:active])
        scale = (active / ranks) ** 2
        truth.q = {name: q * scale for name, q in truth.q.items()}
        truth.grad_sq = {name: g * scale for name, g in truth.grad_sq.items()}
        if active > 1:
            truth.check_pair(one, [*truth.q], 1e-9, f"by hand, step {step}")
        assert one.examples == 3 * active
    same_bits(noise.tr_sigma)


def nothing_but_padding_on_one_rank(rank: int, ranks: int) -> None:
    """A mean over the tokens of all ranks; the last rank has none of them, or not even an example."""
    model = small()
    plain = copy.deepcopy(model)
    wrapped = compiled(DistributedDataParallel(model))
    noise = gnsfx.NoiseScale(wrapped)
    for step, examples in enumerate((3, 0)):
        wrapped.zero_grad()
        batches = [[batch(10 * step + r, examples if r == ranks - 1 else 4)] for r in range(ranks)]
        counts = [torch.arange(1, 1 + len(b[0][0])) * (r < ranks - 1) for r, b in enumerate(batches)]
        whole = sum(int(c.sum()) for c in counts)
        tokens, targets = batches[rank][0]
        ((zoo.token_losses(wrapped(tokens), targets) * counts[rank]).sum() * ranks / whole).backward()
        one = noise.step(weights=counts[rank])
        truth = Truth(plain, batches, [[c / whole] for c in counts])
        truth.check_pair(one, [*truth.q], 1e-6, f"{examples} padded examples")
    same_bits(noise.b_simple_tokens)


def idle_from_the_start(rank: int, ranks: int) -> None:
    """The last rank, which knows neither the norm layers nor an update yet, runs no backward pass in the first step."""
    for options in ({"optimizer": True}, {"predict_total": True}):
        model = small()
        wrapped = compiled(model)
        adam = torch.optim.Adam(model.parameters())
        options = {key: adam if key == "optimizer" else value for key, value in options.items()}
        noise = gnsfx.NoiseScale(wrapped, process_group=dist.group.WORLD, **options)
        for step in range(3):
            model.zero_grad()
            if step == 1 or rank < ranks - 1:
                with noise.measuring():
                    losses = zoo.token_losses(wrapped(batch(10 * step + rank, 3)[0]), batch(10 * step + rank, 3)[1])
                losses.mean().backward()
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
            assert noise.step().examples == 3 * (ranks - (step != 1))
            adam.step()
        same_bits(noise.tr_sigma)
        assert noise.coverage_share == 1.0, options


def norm_layers_of_shards(rank: int, ranks: int) -> None:
    model = small()
    wrapped = compiled(fully_shard(model, mesh=init_device_mesh("cpu", (ranks,))))
    noise = gnsfx.NoiseScale(wrapped, predict_total=True)
    for _ in range(2):
        wrapped.zero_grad()
        with noise.measuring():
            losses = zoo.token_losses(wrapped(batch(rank, 4)[0]), batch(rank, 4)[1])
        losses.mean().backward()
        one = noise.step()
    truth = Truth(small(), [[batch(r, 4)] for r in range(ranks)])
    truth.check_pair(one, [*truth.q], 1e-9, "the first full step")


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, left: bool) -> Tensor:
        return (self.left if left else self.right)(x).square().sum(1)


def parameters_of_one_rank(rank: int, ranks: int) -> None:
    """The others count as contributions of zero, once it is known that no code of theirs uses them."""
    torch.manual_seed(0)
    model = Fork().double()
    wrapped = compiled(DistributedDataParallel(model, find_unused_parameters=True))
    noise = gnsfx.NoiseScale(wrapped)
    n = 4 * ranks
    for step in range(3):
        wrapped.zero_grad()
        torch.manual_seed(step)
        data = torch.randn(ranks, 4, 3, dtype=torch.float64)
        wrapped(data[rank], rank == 0).mean().backward()
        one = noise.step()
        rows = [  # the gradient of |Wx + b|^2 is 2 (Wx + b) (x, 1)
            (2 * layer(x)).square().sum(1) * (x.square().sum(1) + 1)
            for x, layer in zip(data, [model.left, *[model.right] * (ranks - 1)], strict=True)
        ]
        q = float(torch.cat(rows).sum()) / n**2
        g = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
        if step:
            close(one.tr_sigma, (n * q - g) / (1 - 1 / n), 1e-9, "tr(Sigma)")
            close(one.g_sq, (g - q) / (1 - 1 / n), 1e-9, "|G|^2")
        assert one.examples == n


def an_error_on_one_rank(rank: int, ranks: int) -> None:
    """An error on all of them, at once, and the next step is as good as any."""
    model = small()
    truth = Truth(copy.deepcopy(model), [[batch(r, 4)] for r in range(ranks)])
    wrapped = compiled(DistributedDataParallel(model))
    noise = gnsfx.NoiseScale(wrapped)
    started = time.monotonic()
    for step in range(4):
        wrapped.zero_grad()
        zoo.token_losses(wrapped(batch(rank, 4)[0]), batch(rank, 4)[1]).mean().backward()
        if step % 2:
            truth.check_pair(noise.step(), [*truth.q], 1e-9, "after an error")
        elif rank == 1 and step:
            wrapped.zero_grad()
            fails(noise.step, "zeroed")
        elif rank == 1:
            fails(lambda: noise.step(weights=torch.ones(5)), "5 weights for 4 examples")
        else:
            fails(noise.step, "rank 1 could not take part", "kept")
    assert noise.steps == 2 and time.monotonic() - started < distributed.TIMEOUT / 2
    same_bits(noise.tr_sigma)


def out_of_step(rank: int, ranks: int) -> None:
    """Each failure leaves its process group behind, so each has one of its own."""

    def reduce(numbers: int, step: int) -> None:
        distributed.all_reduce(torch.ones(numbers), group, "noise.step()", step=step, timeout=SECONDS)

    group = dist.new_group()
    reduce(3, 6)
    other = "rank 0 is at step 8" if rank == 1 else "rank 1 is at step 7"
    fails(lambda: reduce(3, 7 if rank == 1 else 8), "noise.step()", other, f"this one, rank {rank}")
    group = dist.new_group()
    started = time.monotonic()
    fails(lambda: reduce(50 if rank == 0 else 3, 1), "numbers to add up", "same trainable parameters")
    group = dist.new_group()
    reduce(3, 1)
    if rank != ranks - 1:
        fails(lambda: reduce(3, 2), "noise.step(), step 2", "seconds", "did not call it")
        fails(lambda: reduce(3, 3), "no more sums over these ranks", "step 2")
    assert time.monotonic() - started < 4 * SECONDS


def a_rank_that_ends(rank: int, ranks: int) -> None:
    """Without an error of its own, or ``torchrun`` would end the others before they can speak."""
    model = small()
    wrapped = compiled(DistributedDataParallel(model))
    noise = gnsfx.NoiseScale(wrapped)
    distributed.TIMEOUT = SECONDS
    for _ in range(2):
        zoo.token_losses(wrapped(batch(rank, 4)[0]), batch(rank, 4)[1]).mean().backward()
        if _ == 1 and rank == ranks - 1:
            os._exit(0)
        try:
            noise.step()
        except GnsError as error:
            assert _ == 1 and "ended or failed" in str(error)
            print(f"rank {rank}: survived", flush=True)
            assert noise.steps == 1 and noise.examples == 4 * ranks  # the last good state
            os._exit(0)
    raise AssertionError("no error")


if __name__ == "__main__":
    with world() as (rank, ranks):
        for check in (
            shares_add_up,
            each_rank_its_own_model,
            a_parameter_that_is_left_out,
            what_is_refused,
            no_examples_on_one_rank,
            averaged_by_hand,
            nothing_but_padding_on_one_rank,
            idle_from_the_start,
            norm_layers_of_shards,
            parameters_of_one_rank,
            an_error_on_one_rank,
            out_of_step,
            a_rank_that_ends,
        ):
            if sys.argv[1:] and check.__name__ not in sys.argv[1:]:
                continue
            check(rank, ranks)
            print(f"rank {rank}: {check.__name__}", flush=True)
