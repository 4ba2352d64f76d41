"""Every way to wrap and compile: what one process finds on the examples of all ranks, every rank finds, bit by bit."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gnsfx
from gnsfx import collector
from tests import zoo
from tests.distributed.ranks import OPTIONS, Truth, batch, close, plain_name, same_bits, small, world

SMALL = {"bucket_cap_mb": 0.004}
Wrap = Callable[[nn.Module, dict[str, Any]], nn.Module]


def outside(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    return torch.compile(DistributedDataParallel(model, **options), backend="gns", options=OPTIONS)


def inside(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    return DistributedDataParallel(torch.compile(model, backend="gns", options=OPTIONS), **options)


def blocks(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="gns", options=OPTIONS)
    return DistributedDataParallel(model, **options)


def shard_whole(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    return torch.compile(fully_shard(model, **options), backend="gns", options=OPTIONS)


def shard_blocks(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="gns", options=OPTIONS)
        fully_shard(block, **options)
    return fully_shard(model, **options)


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# name: how, options, sizes of the backward passes of rank r, set_to_none
CASES: dict[str, tuple[Wrap, dict[str, Any], Callable[[int], Sequence[int]], bool]] = {
    "outside": (outside, {}, lambda r: [4], True),
    "outside, several graphs, unequal": (outside, SMALL, lambda r: [3 + r], True),
    "outside, accumulation, zeroed in place": (outside, SMALL, lambda r: [3, 2 + r], False),
    "outside, unequal numbers of passes": (outside, {}, lambda r: [3, 2][: 1 + r % 2], True),
    "inside, accumulation": (inside, {}, lambda r: [3, 2 + r], True),
    "inside, views of buckets": (inside, {**SMALL, "gradient_as_bucket_view": True}, lambda r: [2 + r, 2 + r], True),
    "inside, views zeroed in place": (inside, {**SMALL, "gradient_as_bucket_view": True}, lambda r: [3, 3], False),
    "outside, unused allowed": (outside, {**SMALL, "find_unused_parameters": True}, lambda r: [2 + r], True),
    "inside, static graph": (inside, {**SMALL, "static_graph": True}, lambda r: [2 + r], True),
    "blocks, accumulation": (blocks, SMALL, lambda r: [3 + r, 3 + r], True),
    "sharded whole": (shard_whole, {}, lambda r: [3 + r], True),
    "sharded whole, kept, accumulation": (shard_whole, {"reshard_after_forward": False}, lambda r: [3, 2 + r], True),
    "sharded blocks, accumulation": (shard_blocks, {}, lambda r: [2 + r, 3], True),
    "sharded blocks, zeroed in place": (shard_blocks, {}, lambda r: [3], False),
    "sharded whole, bf16": (shard_whole, {"mp_policy": BF16}, lambda r: [3 + r], True),
}
# on a mesh of two replicas of two shards
HYBRID = {"sharded hybrid": (shard_whole, {"hybrid": True}, lambda r: [2 + r, 3], True)}


def delayed(wrapped: nn.Module, last: bool) -> Any:
    """``no_sync`` of DDP, ``set_requires_gradient_sync`` of FSDP."""
    module = getattr(wrapped, "_orig_mod", wrapped)
    if isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext() if last else module.no_sync()
    module.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def check(name: str, rank: int, ranks: int) -> None:
    wrap, options, sizes, set_to_none = {**CASES, **HYBRID}[name]
    model = small(2 if wrap in (blocks, shard_blocks) or "several" in name else 1)
    plain = copy.deepcopy(model)
    tolerance = 5e-2 if "bf16" in name else 1e-9
    if wrap in (shard_whole, shard_blocks):
        shape = (2, ranks // 2) if options.get("hybrid") else (ranks,)
        dims = ("replicate", "shard") if len(shape) == 2 else None
        options = {k: v for k, v in options.items() if k != "hybrid"}
        options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=dims)
        if "bf16" in name:
            model.float()
            plain.bfloat16()
    wrapped = wrap(model, options)
    given = {"inside": model, "blocks": wrapped}.get(
        name.split(",")[0], wrapped
    )  # the wrapper, what it holds, the compiled one
    noise = gnsfx.NoiseScale(given)
    for step in range(2):
        wrapped.zero_grad(set_to_none)
        batches = [[batch(100 * step + 10 * r + i, n) for i, n in enumerate(sizes(r))] for r in range(ranks)]
        mine = batches[rank]
        for i, (tokens, targets) in enumerate(mine):
            with delayed(wrapped, i == len(mine) - 1):
                losses = zoo.token_losses(wrapped(tokens), targets)
                (losses.mean() / len(mine)).backward()
        truth, local = Truth(plain, batches), Truth(plain, [mine])
        found = collector.totals(model)
        assert found.values is not None and found.micro_batches == tuple(sizes(rank)), (name, found.refusals[:1])
        measured = [plain_name(n) for n, r in zip(found.names, found.refusals, strict=True) if r is None]
        expected = [n for n in truth.q if wrap not in (blocks, shard_blocks) or n.startswith("blocks.")]
        assert measured == expected, (name, {*expected} - {*measured}, [r for r in found.refusals if r][:1])
        for n, q, examples in zip(measured, *found.values.tolist(), strict=True):
            close(q, local.q[n], tolerance, f"{name}: {n}")
            assert examples == sum(sizes(rank))
        one = noise.step()
        truth.check_pair(one, expected, tolerance, name)
    for value in (noise.tr_sigma, noise.g_sq, noise.b_simple, *noise.interval()):
        same_bits(value)
    alone = gnsfx.NoiseScale(plain)
    alone.load_state_dict(noise.state_dict())
    assert (alone.tr_sigma, alone.g_sq, alone.examples) == (noise.tr_sigma, noise.g_sq, noise.examples), name


if __name__ == "__main__":
    with world() as (rank, ranks):
        for name in sys.argv[1:] or CASES:
            check(name, rank, ranks)
            print(f"rank {rank}: {name}", flush=True)
