"""The suite notices each of the mistakes in ``mutations.py``; ``python -m tests.mutations`` says how."""

from __future__ import annotations

import pytest

from tests.mutations import MUTATIONS, Mutation, caught


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "_"))
def test_a_planted_mistake_is_caught(mutation: Mutation) -> None:
    assert caught(mutation), f"{mutation.test} does not notice that {mutation.name}"
