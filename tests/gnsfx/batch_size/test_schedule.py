"""Open-loop batch sizes: always possible, always inside, what the formula says; optimizer and LR schedulers follow."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gnsfx.batch_size.policy import Change
from gnsfx.batch_size.schedule import BatchSizeSchedule
from gnsfx.batch_size.unit import BatchUnit
from gnsfx.errors import GnsWarning, OptionError, StateError

sizes = st.integers(1, 300)
units = st.builds(BatchUnit, st.integers(1, 40), st.integers(1, 8))


@given(units, sizes, sizes, st.integers(1, 10**6), st.integers(0, 2 * 10**6))
def test_linear_is_possible_inside_and_within_half_a_unit(unit, start, end, span, tokens):
    low, high = sorted((start, end))
    lowest, highest = -(-low // unit.size) * unit.size, high // unit.size * unit.size
    shape = {"tokens": span, "micro_batch": unit.micro_batch, "world_size": unit.world_size}
    if lowest > highest:
        with pytest.raises(OptionError, match=f"Nearest possible: .*{lowest}"):
            BatchSizeSchedule.linear(start, end, **shape)
        return
    schedule = BatchSizeSchedule.linear(start, end, **shape)
    batch = schedule.batch_size_at(tokens=tokens)
    exact = start + (end - start) * min(tokens / span, 1)
    assert batch % unit.size == 0 and low <= batch <= high
    assert schedule.accumulation_at(tokens=tokens) * unit.size == batch
    if lowest <= exact <= highest:
        assert abs(batch - exact) <= unit.size / 2 + 1e-6


@given(units, st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 40)), min_size=1, max_size=6))
def test_the_plan_says_what_the_schedule_does(unit, pairs):
    table = [(at, k * unit.size) for at, k in sorted(dict(pairs).items())]
    schedule = BatchSizeSchedule(examples=table, micro_batch=unit.micro_batch, world_size=unit.world_size)
    plan = schedule.plan
    assert plan[0].examples == 0 and all(a.batch_size != b.batch_size for a, b in itertools.pairwise(plan))
    for at in {0, *(x for y, _ in table for x in (y - 1, y)), *(stage.examples for stage in plan)}:
        (*_, last) = (batch for x, batch in [(0, table[0][1]), *table] if x <= at)
        planned = [stage.batch_size for stage in plan if stage.examples <= at][-1]
        assert schedule.batch_size_at(examples=at) == last == planned


def test_the_plan_of_a_ramp_finds_every_change():
    schedule = BatchSizeSchedule.linear(64, 16, tokens=1000, after=500, micro_batch=8, world_size=2)
    plan = {stage.tokens: stage.batch_size for stage in schedule.plan}
    assert [*plan.values()] == [64, 48, 32, 16]
    for tokens, batch in plan.items():
        assert schedule.batch_size_at(tokens=tokens) == batch
        assert tokens == 0 or schedule.batch_size_at(tokens=tokens - 1) != batch


def test_three_lines_in_a_loop():
    schedule = BatchSizeSchedule.linear(16, 64, tokens=6400, micro_batch=16)
    seen = []
    while (schedule.tokens or 0) < 8000:
        examples = sum(16 for _ in range(schedule.accumulation))
        seen.append(examples)
        schedule.step(tokens=examples * 10)
    assert seen[0] == 16 and seen[-1] == 64 and seen == sorted(seen)
    assert [change.after for change in schedule.changes] == [32, 48, 64]
    first = schedule.changes[0]
    assert (first.before, first.accumulation, first.lr_factor, first.beta2_power) == (16, 2, math.sqrt(2), 2)
    assert first.reason == (
        f"after {first.tokens:,} tokens the schedule says 32 examples (linear from 16 to 64 between 0 and 6,400 tokens)."
    )
    assert schedule.stages[1].step == first.step and schedule.lr_scale == 2


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: BatchSizeSchedule.linear(17, 31, tokens=1e6, micro_batch=16), "Nearest possible: 16 and 32"),
        (lambda: BatchSizeSchedule.linear(3, 5, tokens=1e6, micro_batch=4, world_size=2), "Nearest possible: 8;"),
        (lambda: BatchSizeSchedule(tokens=[(0, 24)], micro_batch=16), "24 is no multiple of 16"),
        (lambda: BatchSizeSchedule(tokens=[(0, 16), (0, 32)], micro_batch=16), "rising"),
        (lambda: BatchSizeSchedule(tokens=[], micro_batch=16), "rising"),
        (lambda: BatchSizeSchedule(tokens={0: 16, 100: 32}, micro_batch=16), "expected pairs"),
        (lambda: BatchSizeSchedule(tokens=[(0, math.nan)], micro_batch=16), "positive number of examples"),
        (lambda: BatchSizeSchedule(micro_batch=16), "either tokens= or examples="),
        (
            lambda: BatchSizeSchedule(tokens=[(0, 16)], examples=[(0, 16)], micro_batch=16),
            "either tokens= or examples=",
        ),
        (lambda: BatchSizeSchedule(tokens=[(0, 16)], micro_batch=0), "micro_batch=0"),
        (lambda: BatchSizeSchedule(tokens=[(0, 16)], micro_batch=16, world_size=-1), "world_size=-1"),
        (lambda: BatchSizeSchedule(tokens=[(0, 16)], micro_batch=16, lr="cube"), "lr='cube'"),
        (lambda: BatchSizeSchedule.linear(16, 32, tokens=0, micro_batch=16), "positive span"),
        (lambda: BatchSizeSchedule.linear(0, 32, tokens=9, micro_batch=16), "0 < low <= high"),
        (lambda: BatchSizeSchedule(tokens=[(0, 16)], micro_batch=16).step(), r"step\(tokens=...\)"),
        (lambda: BatchSizeSchedule(tokens=[(0, 16)], micro_batch=16).step(tokens=-1), "tokens=-1"),
        (lambda: BatchSizeSchedule(tokens=[(0, 16)], micro_batch=16).batch_size_at(examples=3), "counts tokens"),
    ],
)
def test_bad_input_is_refused_with_a_reason(make, complaint):
    with pytest.raises(OptionError, match=complaint):
        make()


def test_tokens_in_some_steps_only_are_refused():
    schedule = BatchSizeSchedule(examples=[(0, 16)], micro_batch=16)
    schedule.step()
    with pytest.raises(OptionError, match="every step or of none"):
        schedule.step(tokens=4)
    assert schedule.steps == 1


def a_change(before=16, after=64, lr="sqrt"):
    schedule = BatchSizeSchedule(examples=[(0, before), (1, after)], micro_batch=16, lr=lr)
    return schedule.step()


@pytest.mark.parametrize(("rule", "factor"), [("sqrt", 2.0), ("linear", 4.0), (None, 1.0)])
def test_the_optimizer_follows(rule, factor):
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5, "betas": (0.8, 0.9), "weight_decay": 0.3}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.99))
    a_change(lr=rule).apply(optimizer)
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"]) == pytest.approx((0.1 * factor, 0.5 * factor))
    assert first["betas"] == (0.9, pytest.approx(0.99**4)) and second["betas"] == (0.8, pytest.approx(0.9**4))
    assert (first["weight_decay"], second["weight_decay"]) == (0.01, 0.3)
    # The half-life, in examples, is what it was.
    assert 64 * math.log(0.5) / math.log(first["betas"][1]) == pytest.approx(16 * math.log(0.5) / math.log(0.99))


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor():
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=rate)
    held = optimizer.param_groups[0]["lr"]
    a_change().apply(optimizer)
    assert optimizer.param_groups[0]["lr"] is held and float(held) == pytest.approx(0.2)


def lambda_lr(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=50)


def warm_up_then_cosine(optimizer):
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    return torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warm, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)], [4]
    )


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def rates(make, change_at, change=None):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.1)
    scheduler, found = make(optimizer), []
    for step in range(20):
        optimizer.step()
        scheduler.step()
        if step == change_at and change:
            change.apply(optimizer, scheduler)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("make", [lambda_lr, one_cycle, warm_up_then_cosine, step_lr])
@pytest.mark.parametrize("change_at", [1, 7])
def test_lr_schedulers_go_on_from_the_new_rate(make, change_at):
    plain, changed = rates(make, change_at), rates(make, change_at, a_change())
    expected = [rate * (2 if step >= change_at else 1) for step, rate in enumerate(plain)]
    assert changed == pytest.approx(expected)


def test_a_scheduler_that_is_not_passed_is_told_of():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    lambda_lr(optimizer)
    with pytest.warns(GnsWarning, match="pass it too"):
        a_change().apply(optimizer)
    with pytest.raises(OptionError, match="expected an LR scheduler"):
        a_change().apply(optimizer, "cosine")


def test_state_goes_on_identically_and_refuses_others():
    def make(**kw):
        return BatchSizeSchedule.linear(16, 256, examples=4000, **{"micro_batch": 16, **kw})

    whole, first, second = make(), make(), make()
    for _ in range(20):
        whole.step(), first.step()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(20):
        assert whole.step() == second.step()
    assert whole.changes == second.changes and all(isinstance(change, Change) for change in second.changes)
    assert whole.state_dict() == second.state_dict()

    state, other = first.state_dict(), make(micro_batch=32)
    for bad in ({**state, "schema": "gnsfx.batch_size.policy/9"}, {**state, "policy": "BatchSizeController"}, {}, None):
        with pytest.raises(StateError, match=r"expected schema 'gnsfx.batch_size.policy/1'"):
            second.load_state_dict(bad)
    with pytest.raises(StateError, match="incomplete"):
        second.load_state_dict({key: value for key, value in state.items() if key != "steps"})
    with pytest.raises(OptionError, match="the batch size in the state"):
        other.load_state_dict({**state, "batch_size": 48})
    assert other.batch_size == 32 and other.steps == 0
    by_tokens = BatchSizeSchedule.linear(16, 256, tokens=4000, micro_batch=16)
    with pytest.raises(StateError, match="did not count them"):
        by_tokens.load_state_dict(state)
    assert by_tokens.steps == 0
