"""How a budget is spent: what is cheap stays exact, the rest is estimated within what is left, the least if nothing is."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gnsfx.kernels import cost
from gnsfx.kernels.cost import Cost
from gnsfx.kernels.machine import machine_for
from gnsfx.passes.budget import WORTH, Item, Spending, Work, spend

PLAIN = 10.0  # seconds


def work(seconds: float, examples: int = 16) -> Work:
    """A contraction whose exact norms by themselves take so many seconds; to read its factors takes a hundredth of that, and
    so does a column."""
    flops = seconds / _second_of(Cost(flops=1.0))
    read = seconds / 100 / examples / _second_of(Cost(bytes=1.0))
    return Work(examples, Cost(flops=flops / 100), read, Cost(flops=flops), torch.float32, "cpu")


def _second_of(amount: Cost) -> float:
    return cost.seconds(amount, machine_for("cpu"), torch.float32)


def items(*seconds: float | None, examples: int = 16) -> list[Item]:
    """None: a bias, say, that takes nothing and has no estimate."""
    return [Item(i, 100.0, s or 0.0, None if s is None else work(s, examples)) for i, s in enumerate(seconds)]


def spent(found: Spending, given_: list[Item]) -> float:
    return sum(found.estimates[i.slot].seconds if i.slot in found.estimates else i.exact for i in given_)


def test_what_fits_is_exact() -> None:
    assert not spend(items(0.02, None, 0.05, 0.02), PLAIN, 0.01).estimates


def test_the_costly_ones_are_estimated() -> None:
    found = spend(items(3.0, 0.01, None, 0.02, 2.0), PLAIN, 0.01)
    assert sorted(found.estimates) == [0, 4]
    assert not found.excess
    assert "30.00% of the step" in found.estimates[0].reason


def test_the_budget_is_used() -> None:
    """Another rung would not fit."""
    given_ = items(1.0, 1.0, 1.0)
    assert 0.02 * PLAIN < spent(spend(given_, PLAIN, 0.05), given_) <= 0.05 * PLAIN


def test_too_small_a_budget_says_so() -> None:
    found = spend(items(1.0, 2.0), PLAIN, 1e-9)
    assert sorted(found.estimates) == [0, 1]
    assert all(e.reason.startswith("gns.budget=1e-09: exactly it would take") for e in found.estimates.values())
    assert all("the least that measuring takes is" in e.reason for e in found.estimates.values())
    assert "the least that measuring takes is" in found.excess


def test_where_nothing_can_be_estimated_it_says_so() -> None:
    found = spend([Item(0, 10.0, 5.0, None)], PLAIN, 0.01)
    assert not found.estimates
    assert found.excess == "gns.budget=0.01: the least that measuring takes is 50.00% of the step"


def test_estimates_of_every_example_leave_none_out() -> None:
    found = spend(items(1.0, 2.0), PLAIN, 0.01, whole_batch=True)
    assert all(e.examples == e.of and e.columns for e in found.estimates.values())


def test_one_example_is_exact() -> None:
    assert not spend(items(1.0, examples=1), PLAIN, 1e-6).estimates


def test_names_of_paths() -> None:
    both, sketch = (spend(items(1.0), PLAIN, 1e-9, whole).estimates[0] for whole in (False, True))
    assert both.path in ("subsample m=2 of 16", "subsample m=2 of 16 + sketch r=2")
    assert sketch.path == "sketch r=2"


@given(
    st.lists(st.floats(1e-4, 5.0) | st.none(), min_size=1, max_size=8),
    st.sampled_from([1e-4, 1e-3, 0.01, 0.1, 1.0]),
    st.sampled_from([2, 3, 16, 100]),
    st.booleans(),
)
def test_within_the_budget_or_excused(
    seconds: list[float | None], budget: float, examples: int, whole_batch: bool
) -> None:
    given_ = items(*seconds, examples=examples)
    found = spend(given_, PLAIN, budget, whole_batch)
    assert bool(found.excess) == (spent(found, given_) > budget * PLAIN)
    exact = [i.exact for i in given_ if i.work is not None and i.slot not in found.estimates]
    for slot, estimate in found.estimates.items():
        assert 2 <= estimate.examples <= examples and (estimate.columns >= 2 or estimate.examples < examples)
        assert estimate.seconds <= WORTH * given_[slot].exact
        assert all(given_[slot].exact >= other for other in exact)


@given(st.floats(0.01, 5.0), st.sampled_from([2, 16, 100]))
def test_more_seconds_mean_less_variance(seconds: float, examples: int) -> None:
    found = [
        spend(items(seconds, examples=examples), PLAIN, budget).estimates.get(0) for budget in (1e-6, 1e-3, 0.01, 0.1)
    ]
    variances = [0.0 if e is None else e.variance for e in found]
    assert variances == sorted(variances, reverse=True)
