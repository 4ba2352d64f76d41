"""Real processes. Each launch checks many things, for starting takes longest; what they are is in the programs."""

from __future__ import annotations

import sys

import pytest
import torch.distributed as dist

from tests.distributed.ranks import launch, world
from tests.distributed.run_data_parallel import CASES, HYBRID, check

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs gloo and torchrun")


MORE = (
    "outside, unused allowed",
    "inside, static graph",
    "sharded whole, kept, accumulation",
    "sharded blocks, zeroed in place",
    "sharded whole, bf16",
)


def test_two_ranks_find_what_one_process_finds() -> None:
    names = [name for name in CASES if name not in MORE]
    assert launch("run_data_parallel.py", 2, *names).count("rank 1: ") == len(names)


@pytest.mark.filterwarnings("ignore")
def test_one_rank_may_shard_too() -> None:
    with world(store=dist.HashStore(), rank=0, world_size=1) as (rank, ranks):
        check("sharded whole", rank, ranks)


@pytest.mark.more
def test_two_ranks_in_more_ways() -> None:
    assert launch("run_data_parallel.py", 2, *MORE).count("rank 1: ") == len(MORE)


def test_four_ranks_find_what_one_process_finds() -> None:
    names = "outside, several graphs, unequal", "sharded blocks, accumulation", *HYBRID
    assert launch("run_data_parallel.py", 4, *names).count("rank 3: ") == len(names)


@pytest.mark.more
def test_two_ranks_through_inductor() -> None:
    assert "rank 1: sharded whole" in launch("run_data_parallel.py", 2, "outside", "sharded whole", INNER="inductor")


def test_two_ranks_in_trouble() -> None:
    assert "rank 0: survived" in launch("run_trouble.py", 2)


@pytest.mark.more
def test_four_ranks_in_trouble() -> None:
    assert "rank 0: survived" in launch("run_trouble.py", 4)


def test_ranks_as_units() -> None:
    assert launch("run_rank_difference.py", 2).count("done") == 2


@pytest.mark.more
def test_three_ranks_as_units() -> None:
    assert launch("run_rank_difference.py", 3).count("done") == 3
