"""The size arithmetic of states against brute force: every entry of a tensor is labelled with its example."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from gnsfx._torch import simplified
from gnsfx.passes.state import Batched, Shared, Size, describe, divides, product, quotient, reshape, rows

SIZE = st.integers(1, 4)
many = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def owners(state: Batched, shape: list[int], B: int) -> Tensor:
    """The example of every entry of a value with this state."""
    mine = torch.arange(shape[state.dim]) // int(state.inner) % B
    return mine.view([-1 if d == state.dim else 1 for d in range(len(shape))]).expand(shape)


def truths(labels: Tensor, B: int) -> list[Batched]:
    """Every state that explains the labels."""
    shape, found = list(labels.shape), []
    for dim, size in enumerate(shape):
        for inner in range(1, size + 1):
            if size % (B * inner) == 0:
                state = Batched(dim, size // (B * inner), inner)
                if torch.equal(owners(state, shape, B), labels):
                    found.append(state)
    return found


def factorisations(size: int) -> list[list[int]]:
    """All ways to write a size as an ordered product of up to four factors, with ones in between."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return [list(f) for n in (1, 2, 3, 4) for f in itertools.product(divisors, repeat=n) if product(f) == size]


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[Batched, list[int], list[int], int]:
    B, outer, inner = draw(SIZE), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    before = [*draw(st.lists(SIZE, max_size=2)), outer * B * inner]
    dim = len(before) - 1
    before += draw(st.lists(SIZE, max_size=2))
    total = product(before)
    assume(total <= 200)
    # half of the time cut where the axis is, so that not nearly all reshapes lose it
    pre, post = product(before[:dim]) * outer, inner * product(before[dim + 1 :])
    if draw(st.booleans()):
        after = [*draw(st.sampled_from(factorisations(int(pre)))), B, *draw(st.sampled_from(factorisations(int(post))))]
        at = draw(st.integers(0, len(after) - 1))
        after = [*after[:at], int(product(after[at : at + 2])), *after[at + 2 :]]  # and fold two neighbours
    else:
        after = draw(st.sampled_from(factorisations(int(total))))
    return Batched(dim, outer, inner), before, after, B


@many
@given(reshapes())
def test_reshape(case: tuple[Batched, list[int], list[int], int]) -> None:
    """What is claimed is true, and where a state exists it is found, whatever sizes are equal to each other or one."""
    state, before, after, B = case
    labels = owners(state, before, B).reshape(after)
    found, true = reshape(state, before, after, B), truths(labels, B)
    if found is None and B > 1:  # one example owns all entries, whatever the shape
        assert true == [], f"{describe(true[0])} was missed"
    if found is not None:
        assert rows(found, B) == after[found.dim]
        assert torch.equal(owners(found, after, B), labels), f"{describe(found)} is wrong"


@many
@given(reshapes(), st.integers(0, 3))
def test_reshape_there_and_back(case: tuple[Batched, list[int], list[int], int], _: int) -> None:
    state, before, after, B = case
    found = reshape(state, before, after, B)
    if found is not None and B > 1:
        back = reshape(found, after, before, B)
        assert back is not None and (back.dim, back.outer, back.inner) == (state.dim, state.outer, state.inner)


def symbol(env: ShapeEnv, name: str, hint: int) -> Size:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    made = env.create_symbol(hint, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return env.create_symintnode(made, hint=hint, source=ConstantSource(name))


@pytest.mark.parametrize("B, T", [(5, 7), (4, 4)])
def test_symbolic_reshape_adds_no_guards(B: int, T: int) -> None:
    """The batch, and a length of the same or another size, as symbols: the answer is known without looking at a number."""
    env = ShapeEnv(duck_shape=False)
    b, t = symbol(env, "b", B), symbol(env, "t", T)
    cases = [
        (Batched(0), [b, t, 6], [b * t, 6], (0, 1, t)),
        (Batched(0, 1, t), [b * t, 6], [b, t, 6], (0, 1, 1)),
        (Batched(0, 1, t), [b * t, 6], [b, t, 2, 3], (0, 1, 1)),
        (Batched(1), [t, b, 6], [t * b, 6], (0, t, 1)),
        (Batched(0, t, 1), [t * b, 6], [t, b, 6], (1, 1, 1)),
        (Batched(0, 2, 1), [2 * b, t], [2, b, t], (1, 1, 1)),
        (Batched(0), [b, t, 6], [b, t * 6], (0, 1, 1)),
        (Batched(0), [b, 6], [1, b, 6], (1, 1, 1)),
    ]
    for state, before, after, expected in cases:
        found = reshape(state, before, after, b)
        assert found is not None, (state, before, after)
        assert found.dim == expected[0]
        assert [str(s) for s in (found.outer, found.inner)] == [str(s) for s in expected[1:]]
    assert reshape(Batched(0), [b, t], [t, b], b) is None
    assert env.guards == []


def test_symbolic_sizes_that_are_one_symbol() -> None:
    """B == T in the first batch makes both the same symbol; folding and unfolding must come out simplified."""
    env = ShapeEnv()
    s = symbol(env, "s", 3)
    there = reshape(Batched(0), [s, s, 6], [s * s, 6], s)
    assert there is not None
    assert [str(x) for x in (there.outer, there.inner)] == ["1", str(s)]
    back = reshape(there, [s * s, 6], [s, s, 6], s)
    assert back is not None
    assert (back.dim, str(back.outer), str(back.inner)) == (0, "1", "1")


def test_symbolic_sizes_known_on_one_side() -> None:
    """A number that stands for a symbol behind the axis: the number of elements tells what the algebra does not."""
    env = ShapeEnv()
    s = symbol(env, "s", 4)
    for state, before, after in [
        (Batched(0), [s, s, 4], [s, 2, s // 2, 4]),
        (Batched(0, 1, 2 * s + 4), [s * (2 * s + 4)], [s, 12]),
        (Batched(1), [s // 2, s, 4], [2, s, 4]),
    ]:
        found = reshape(state, before, after, s)
        assert found is not None
        assert (found.dim, str(found.outer), str(found.inner)) == (state.dim, "1", "1")


def test_symbolic_floor_division_that_leaves_a_rest() -> None:
    """(s - 1) // 2 is no (s - 1) / 2: half of the lengths would be off by one."""
    env = ShapeEnv()
    s = symbol(env, "s", 6)
    assert str(simplified((s - 1) // 2)) == str((s - 1) // 2)
    assert str(simplified((s * s - s) // s)) == str(s - 1)
    assert not divides(2, s - 1)
    assert not divides(2, s * s + s)
    assert divides(s, s * s + s)


@many
@given(st.integers(0, 12), st.integers(0, 12))
def test_divides_and_quotient(divisor: int, value: int) -> None:
    assert divides(divisor, value) == (divisor == value or (divisor != 0 and value % divisor == 0))
    if divisor and value % divisor == 0:
        assert quotient(value, divisor) == value // divisor


def test_describe() -> None:
    assert describe(Batched(1)) == "batched(1)"
    assert describe((Batched(0, 2, 3), Shared())) == "(batched(0, 2*B*3), shared)"
