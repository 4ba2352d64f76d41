"""A few hundred random programs; the long run is ``python -m tests.programs``."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gnsfx.passes import measure, propagate, terms
from gnsfx.passes.rules import RULES
from gnsfx.passes.state import Batched, Mixed, Partial
from tests.programs.check import check, in_double, interacts
from tests.programs.generate import generate

SHARDS, EACH = 8, 30
some = settings(max_examples=EACH, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
                phases=[Phase.generate, Phase.shrink])  # fmt: skip


@pytest.mark.parametrize("shard", range(SHARDS))
def test_programs(shard: int) -> None:
    """Every gradient as in eager mode, every measured norm true, every refusal with a reason."""

    @some
    @given(st.integers(0, 9999), st.integers(0, 8))
    def clean(seed: int, left_out: int) -> None:
        program = generate(10000 * shard + seed, 8 - left_out)
        outcome = check(program)
        assert outcome.kind in ("clean", "skipped"), f"{outcome.kind}: {outcome.detail}\n{program}"

    clean()


def test_the_same_for_ever() -> None:
    for seed in range(20):
        assert generate(seed) == generate(seed)


def test_examples_meet_only_where_they_are_meant_to() -> None:
    for seed in range(100):
        program = generate(seed)
        if not program.coupled:
            assert not interacts(program, *in_double(program.build(), program.data())), str(program)


# ------------------------------------------------------------------------------------------------ the check can fail


def first_term(gradient: object, states: object) -> object:
    """The cross term of a weight that is used twice is dropped."""
    found = terms.find_terms(gradient, states)  # type: ignore[arg-type]
    return found[:1] if found else found


def without_scale(gradient: object, states: object) -> object:
    found = terms.find_terms(gradient, states)  # type: ignore[arg-type]
    return found and [replace(t, scale=1.0) for t in found]


def apart(op: object) -> object:
    """Examples that are summed up along the batch are taken for those that they were."""
    return op.state("self" if "self" in op.args else "a")  # type: ignore[attr-defined]


def summed_anyway(node: object, states: dict) -> object:
    return Mixed("") if any(isinstance(states.get(n), Mixed) for n in node.all_input_nodes) else Partial()  # type: ignore[attr-defined]


def first_dimension(op: object) -> object:
    """The examples are always in front."""
    state = op.state("self")  # type: ignore[attr-defined]
    return Batched(0, state.outer, state.inner)


PLANTED = {
    "cross term": (measure, "find_terms", first_term),
    "scale": (measure, "find_terms", without_scale),
    "coupling": (propagate, "_linear", summed_anyway),
}
RULES_PLANTED = {
    "along the batch": (("aten.cumsum.default", "aten.flip.default", "prims.rev.default"), apart),
    "permute": (("aten.permute.default",), first_dimension),
}


def noticed(where: str = "", most: int = 60) -> bool:
    programs = (p for p in map(generate, range(10000)) if where in p.source and p.coupled >= bool(where))
    return any(check(p).kind in ("wrong", "gradient") for p in itertools.islice(programs, most))


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_defect_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*PLANTED[name])
    assert noticed()


@pytest.mark.parametrize("name", RULES_PLANTED)
def test_a_planted_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, function = RULES_PLANTED[name]
    for op in ops:
        space, packet, overload = op.split(".")
        target = getattr(getattr(getattr(torch.ops, space), packet), overload)
        if target in RULES:
            monkeypatch.setitem(RULES, target, function)
    assert noticed("cumsum" if name == "along the batch" else "")
