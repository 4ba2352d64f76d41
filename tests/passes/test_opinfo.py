"""What the rules claim of PyTorch's own operator database, against numbers: a part of what ``opinfo.py`` does in full."""

from __future__ import annotations

import pytest

from tests.passes.opinfo import Outcome, check_operator
from tests.passes.traced import operators

SHARDS = 4


def check(name: str, samples: int = 2, batches: int = 12) -> None:
    for info in operators():
        if info.name == name:
            assert check_operator(info, samples, batches).wrong == []


@pytest.mark.parametrize("name", ["view_as_complex", "take", "searchsorted", "index_select"])
def test_claims_that_were_wrong_once(name: str) -> None:
    check(name)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_operators(shard: int) -> None:
    """One sample of each fourth operator, with two choices of the batch dimension."""
    total = Outcome()
    for info in operators()[shard :: 4 * SHARDS]:
        total.add(check_operator(info, 1, 2))
    assert total.wrong == []
    assert total.cases > 20
