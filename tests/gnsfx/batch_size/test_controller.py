"""The closed loop: what it decides, that it is always possible, that it comes to rest, and that it says why."""

import itertools
import json
import math
import random
import sys
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gnsfx.batch_size.controller import BatchSizeController
from gnsfx.batch_size.decision import Rules, decide
from gnsfx.batch_size.step_time import StepTimes, fit_line
from gnsfx.batch_size.unit import BatchUnit
from gnsfx.errors import GnsWarning, OptionError, StateError
from gnsfx.noise.intervals import Interval
from tests.gnsfx.batch_size.stub_noise import StubNoise, train


def make(noise, **options):
    quick = {"micro_batch": 8, "bounds": (8, 512), "period": 1, "warm_up": 0, "min_steps": 1}
    return BatchSizeController(noise, **{**quick, **options})


def once(noise, **options):
    """The controller after one decision at 64 examples."""
    noise.tick(64)
    controller = make(noise, **{"start": 64, **options})
    controller.step(seconds=1.0)
    return controller


B = "B_simple = 212"
DECISIONS = [
    # b_simple, interval, options, batch, reason
    (212, (160, 290), {}, 128, f"{B} (160..290) examples is above 64: 64 -> 128 (at most x2 per change)."),
    (212, (160, 290), {"max_factor": 8}, 160, f"{B} (160..290) examples is above 64: 64 -> 160."),
    (212, (165, 290), {"max_factor": 8, "bounds": (8, 100)}, 96, "64 -> 96 (the bound)."),
    (212, (160, 290), {"ratio": 0.5}, 80, f"0.5 times {B} (160..290) examples is above 64: 64 -> 80."),
    (212, (160, 290), {"bounds": (8, 64)}, 64, "is above 64, the upper bound: the batch stays 64."),
    (75, (70, 81), {}, 64, "B_simple = 75 (70..81) examples does not call for a change: the batch stays 64."),
    (90, (81, 95), {"micro_batch": 32, "bounds": (32, 512)}, 64, "reaches no multiple of 32 examples"),
    (212, (78, 2900), {}, 64, "does not call for a change"),
    (30, (20, 40), {}, 64, "is below 64, but shrinking is off: the batch stays 64."),
    (30, (20, 40), {"shrink": True}, 40, "B_simple = 30 (20..40) examples is below 64: 64 -> 40."),
    (3, (2, 4), {"shrink": True}, 32, "is below 64: 64 -> 32 (at most x2 per change)."),
    (3, (2, 4), {"shrink": True, "bounds": (64, 512)}, 64, "is below 64, the lower bound"),
    (3, (2, 4), {"shrink": True, "bounds": (48, 512), "max_factor": 8}, 48, "64 -> 48 (the bound)."),
    (900, (800, 999), {"max_factor": 1.2, "micro_batch": 32, "bounds": (32, 512)}, 96, "64 -> 96 (at most x1.2"),
    (900, (800, 999), {"max_factor": 1.2}, 72, "64 -> 72 (at most x1.2"),
    (3, (2, 4), {"shrink": True, "max_factor": 1.01}, 56, "64 -> 56 (at most x1.01"),
    (math.nan, (100, math.inf), {}, 96, "B_simple, at least 100 examples, is above 64: 64 -> 96."),
    (math.nan, (50, math.inf), {"shrink": True}, 64, "B_simple, at least 50 examples, does not call for growth"),
    (math.nan, (0, math.inf), {"shrink": True}, 64, "B_simple is not yet detected after 64 examples: the batch stays"),
    (212, (math.nan, math.nan), {}, 64, "not yet detected"),
    (212, (290, 160), {}, 64, "not yet detected"),
    (212, (math.inf, math.inf), {}, 64, "not yet detected"),
]


@pytest.mark.parametrize(("b_simple", "interval", "options", "batch", "why"), DECISIONS)
def test_decisions_and_their_reasons(b_simple, interval, options, batch, why):
    controller = once(StubNoise(b_simple, interval), **options)
    assert controller.batch_size == batch
    assert why in controller.reason
    assert [change.after for change in controller.changes] == ([batch] if batch != 64 else [])


bounds = st.tuples(st.integers(1, 20), st.integers(1, 40)).map(sorted)
ends = st.floats(0, 1e6)


@given(
    bounds,
    st.integers(1, 50),
    st.integers(1, 5),
    st.integers(1, 8),
    ends,
    ends | st.just(math.inf),
    st.floats(0, 1),
    st.floats(1.01, 8),
    st.booleans(),
)
def test_invariants(multiples, start, micro, world, a, b, hysteresis, factor, shrink):
    unit, (low, high) = BatchUnit(micro, world), sorted((a, b))
    rules = Rules(unit, *(k * unit.size for k in multiples), hysteresis, factor, shrink)
    batch = min(max(start, multiples[0]), multiples[1]) * unit.size
    wanted = Interval(low, high)
    after, why = decide(batch, wanted, "B_simple", rules)
    assert rules.low <= after <= rules.high and after % unit.size == 0 and why.endswith(".")
    assert (after, why) == decide(batch, wanted, "B_simple", rules)
    if after > batch:
        assert batch * (1 + hysteresis) <= low and after <= low
    if after < batch:
        assert shrink and high <= batch / (1 + hysteresis) and after >= high
    assert after <= max(batch * factor, batch + unit.size) and after >= min(batch / factor, batch - unit.size)
    # The same interval never takes it back.
    again, _ = decide(after, wanted, "B_simple", rules)
    assert (again >= after) if after >= batch else (again <= after)


@given(bounds, st.integers(1, 30), st.integers(1, 200))
def test_a_batch_outside_the_bounds_comes_inside(multiples, micro, batch):
    rules = Rules(BatchUnit(micro), *(k * micro for k in multiples), 0.25, 2.0, False)
    after, why = decide(batch * micro, Interval(0, math.inf), "nothing", rules)
    assert rules.low <= after <= rules.high
    assert ("outside the bounds" in why) == (after != batch * micro)


@settings(max_examples=30)
@given(st.floats(20, 2000), st.sampled_from([0.02, 0.1]), st.integers(0, 10**6))
def test_it_reaches_the_low_end_within_the_hysteresis_and_stays(truth, spread, seed):
    noise = StubNoise(truth, spread=spread, seed=seed)
    controller = make(noise, bounds=(8, 8192), period=20, shrink=True)
    sizes = train(controller, noise, 1500)
    low = truth * math.exp(-1.96 * spread)
    # Five sd of log B_simple either way; the last multiple of 8 below counts as reached.
    assert low * math.exp(-5 * spread) / 1.25 - 8 <= sizes[-1] <= max(truth * math.exp(3.1 * spread), 8)
    assert len({*sizes[1000:]}) <= 2


@pytest.mark.parametrize(("spread", "most"), [(0.05, 0), (0.1, 2), (0.2, 30)])
def test_a_constant_noise_scale_does_not_make_it_flap(spread, most):
    """Ten runs of 10,000 steps, 500 decisions each, a memory of 100 steps. Reversals of direction, in all of them."""
    reversals = 0
    for seed in range(10):
        noise = StubNoise(212.0, spread=spread, seed=seed)
        controller = make(noise, bounds=(8, 1024), period=20, min_steps=50, shrink=True)
        train(controller, noise, 10_000)
        up = [change.after > change.before for change in controller.changes]
        reversals += sum(a != b for a, b in itertools.pairwise(up))
        assert 212 / 1.25 * math.exp(-5 * spread) < controller.batch_size < 212 * math.exp(3 * spread)
    assert reversals <= most


def test_warm_up_period_and_pauses():
    noise = StubNoise(10_000.0, spread=0.01)
    controller = make(noise, warm_up=40, period=15, min_steps=20, max_factor=2)
    train(controller, noise, 140)
    assert [change.step for change in controller.changes] == [45, 75, 105, 135]
    controller = make(StubNoise(10_000.0, spread=0.01), min_examples=1000)
    train(controller, controller.noise, 200)
    gaps = [b.examples - a.examples for a, b in zip(controller.changes, controller.changes[1:], strict=False)]
    assert gaps and min(gaps) >= 1000


def test_it_reads_the_noise_scale_only_when_it_decides():
    noise, reads = StubNoise(100.0, spread=0.1), []
    given_interval = noise.interval
    noise.interval = lambda level: reads.append(level) or given_interval(level)
    train(make(noise, period=10, warm_up=30, level=0.9), noise, 100)
    assert reads == [0.9] * 8


def test_never_detected_and_all_skipped_keep_the_batch_and_warn_once():
    noise = StubNoise()
    controller = make(noise, start=64)
    with pytest.warns(GnsWarning, match="not yet detected after .* in 10 looks: the batch stays 64") as told:
        train(controller, noise, 50)
    assert len(told) == 1 and controller.batch_size == 64

    noise = StubNoise()
    noise.tick(64)
    noise.skipped = noise.steps
    controller = make(noise, start=64)
    controller.step()
    assert controller.reason == "B_simple was not measured: all 1 steps were skipped as not finite: the batch stays 64."
    controller = make(StubNoise())
    controller.step()
    assert "noise.step() was not called" in controller.reason


def test_a_noise_scale_that_is_lost_keeps_the_last_good_batch():
    noise = StubNoise(1000.0, spread=0.05)
    controller = make(noise)
    train(controller, noise, 10)
    before = controller.batch_size
    noise.truth = math.nan
    train(controller, noise, 5)
    assert controller.batch_size == before > 8 and "not yet detected" in controller.reason


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"micro_batch": 16, "bounds": (17, 31)}, "Nearest possible: 16 and 32"),
        ({"micro_batch": 16, "world_size": 4, "bounds": (8, 32)}, "Nearest possible: 64;"),
        ({"bounds": (64, 8)}, "0 < low <= high"),
        ({"bounds": 64}, "the smallest and the largest"),
        ({"start": 12}, "start: 12 is no multiple of 8"),
        ({"start": 1024}, "outside the bounds, 8..512"),
        ({"target": "speed"}, "target='speed'"),
        ({"ratio": 0}, "ratio=0"),
        ({"level": 95}, "level=95"),
        ({"hysteresis": -0.1}, "hysteresis=-0.1"),
        ({"max_factor": 1}, "max_factor=1"),
        ({"period": 0}, "period=0"),
        ({"warm_up": -1}, "warm_up=-1"),
        ({"step_time": (1.0, 0.0)}, "step_time="),
        ({"noise": object()}, r"expected a gnsfx\.NoiseScale"),
    ],
)
def test_bad_options(options, complaint):
    with pytest.raises(OptionError, match=complaint):
        make(**{"noise": StubNoise(), **options})


def test_a_loop_that_does_not_follow_the_batch_size_is_told_once():
    noise = StubNoise(1000.0, spread=0.01)
    controller = make(noise, period=5)
    with pytest.warns(GnsWarning, match="saw 8 examples per step, where this controller counts 16: does each") as told:
        for _ in range(20):
            noise.tick(8)
            controller.step()
    assert len(told) == 1


def timed(controller, noise, steps, t0, t1, seed=0):
    """Train with steps that take t0 + t1 B, 3% of noise, and a pause of a minute now and then."""
    rng = random.Random(seed)
    for _ in range(steps):
        noise.tick(controller.batch_size)
        seconds = (t0 + t1 * controller.batch_size) * (1 + 0.03 * rng.gauss(0, 1))
        controller.step(seconds=seconds + 60 * (rng.random() < 0.05))


@pytest.mark.parametrize(("t0", "t1"), [(0.8, 0.02), (0.05, 0.01), (3.0, 0.01)])
@pytest.mark.parametrize("truth", [100.0, 1000.0])
def test_the_time_optimal_batch(t0, t1, truth):
    noise = StubNoise(truth, spread=0.02)
    controller = make(noise, target="time", period=20, shrink=True, bounds=(8, 2048))
    timed(controller, noise, 1500, t0, t1)
    best = math.sqrt(truth * t0 / t1)
    assert best / 1.5 - 8 <= controller.batch_size <= best * 1.5 + 8
    fit = controller.step_time
    assert (fit.t1, fit.seconds(64)) == (pytest.approx(t1, rel=0.1), pytest.approx(t0 + 64 * t1, rel=0.1))
    # B* is where the time to a given progress is shortest.
    time_at = lambda batch: (1 + truth / batch) * (t0 + t1 * batch)  # noqa: E731
    assert time_at(controller.batch_size) < 1.06 * min(map(time_at, range(1, 4096)))


def test_step_time_is_not_known_before_the_batch_changed():
    noise = StubNoise(6.0, spread=0.01)
    controller = make(noise, target="time")
    timed(controller, noise, 50, 1.0, 0.1)
    assert controller.step_time == (
        "t0 and t1 cannot be told apart before steps of two batch sizes were timed (so far: 8)"
    )
    assert controller.batch_size == 8 and "by the rule for data B_simple = 6" in controller.reason


def test_a_known_step_time_decides_at_once():
    controller = once(StubNoise(400, (390, 410)), target="time", step_time=(0.9, 0.01), max_factor=10)
    assert controller.batch_size == 184  # sqrt(390 * 90) = 187.3
    assert controller.reason == (
        "sqrt(B_simple t0/t1) = 190 (187..192) examples, with B_simple = 400 (390..410) examples, t0 = 0.9 s, "
        "t1 = 0.01 s per example, is above 64: 64 -> 184."
    )
    free = once(StubNoise(400, (390, math.inf)), target="time", step_time=(0, 0.01), shrink=True)
    assert free.batch_size == 32 and "sqrt(B_simple t0/t1) = " in free.reason


@given(st.floats(0.01, 10), st.floats(1e-4, 1), st.lists(st.integers(1, 4096), min_size=2, max_size=6, unique=True))
def test_the_line_is_found(t0, t1, batches):
    fit = fit_line([(b, t0 + t1 * b, 1e-7 * (t0 + t1 * b)) for b in batches])
    assume(not isinstance(fit, str))
    assert fit.t1 == pytest.approx(t1, rel=1e-4) and fit.t0 == pytest.approx(t0, rel=1e-3, abs=1e-4)
    assert fit.ratio.low <= t0 / t1 * (1 + 1e-6) and t0 / t1 * (1 - 1e-6) <= fit.ratio.high


def test_the_interval_of_t0_over_t1_covers():
    """500 fits to steps with 5% of noise at two batch sizes: 95% +- four standard errors."""
    rng, covered = random.Random(0), 0
    for _ in range(500):
        points = []
        for batch in (32, 64, 128):
            seconds = 1.0 + 0.02 * batch
            points.append((batch, seconds * (1 + 0.01 * rng.gauss(0, 1)), 0.01 * seconds))
        low, high = fit_line(points).ratio
        covered += low <= 50 <= high
    assert covered / 500 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 500))


def test_steps_that_say_nothing_are_not_fitted():
    times = StepTimes()
    for batch in (8, 8, 8, 8, 16, 16):
        times.add(batch, 1.0)
    assert times.seconds == {8: [1.0] * 3, 16: [1.0]}  # the first step of each may compile
    for _ in range(3):
        times.add(16, 1.0)
    assert times.fit() == "step time does not clearly grow with the batch from 8 to 16 examples"
    assert "does not clearly grow" in str(fit_line([(8, 1.0, 0.1), (16, 1.1, 0.1)]))
    times.add(16, math.nan)
    times.add(16, -1.0)
    assert times.seconds[16] == [1.0] * 4


def test_a_device_that_runs_behind_the_host_is_timed_right(monkeypatch):
    """The host is through in a millisecond, but for each tenth step, at which it waits for the device."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    controller = make(StubNoise(), period=10, bounds=(8, 16), warm_up=10_000)
    for size in (8, 16):
        controller.batch_size = size
        for step in range(41):
            device = 0.2 + 0.05 * size
            clock[0] += 0.001 if step % 10 else 10 * device - 0.009
            controller.step(examples=5 if step == 40 else None)
    fit = controller.step_time
    assert (fit.t0, fit.t1) == (pytest.approx(0.2), pytest.approx(0.05))
    assert [len(times) for times in controller.state_dict()["step_times"].values()] == [3, 3]


@pytest.mark.parametrize("target", ["data", "time"])
@pytest.mark.parametrize("stop", [7, 100, 333])
def test_resumed_from_a_checkpoint_it_decides_the_same(target, stop):
    def run(upto, controller, noise):
        for step in range(noise.steps, upto):
            noise.tick(controller.batch_size)
            controller.step(seconds=0.5 + 0.01 * controller.batch_size * (1 + 0.1 * math.sin(step)), tokens=7)

    options = {"target": target, "period": 5, "shrink": True}
    noise = StubNoise(300.0, spread=0.2, seed=3)
    whole = make(noise, **options)
    run(500, whole, noise)

    noise = StubNoise(300.0, spread=0.2, seed=3)
    first = make(noise, **options)
    run(stop, first, noise)
    second = make(noise, **options)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict() and second.step_time == first.step_time
    run(500, second, noise)
    if target == "data":  # the first step after a restart is not timed: it compiles
        assert second.changes == whole.changes and second.reason == whole.reason
    else:
        assert [c.after for c in second.changes[:2]] == [c.after for c in whole.changes[:2]]
    assert second.tokens == 500 * 7 and second.steps == 500

    with pytest.raises(StateError, match="incomplete"):
        second.load_state_dict({key: value for key, value in first.state_dict().items() if key != "step_times"})


def test_a_state_outside_the_new_bounds_is_brought_inside_by_the_next_decision():
    noise = StubNoise(5000.0, spread=0.01)
    wide = make(noise, bounds=(8, 1024))
    train(wide, noise, 30)
    narrow = make(noise, bounds=(8, 256))
    narrow.load_state_dict(wide.state_dict())
    change = narrow.step()
    assert (change.before, change.after, change.lr_factor) == (1024, 256, 0.5)
    assert "outside the bounds" in change.reason


def test_rank_0_decides_for_all(monkeypatch):
    """Each rank measures another step time; all follow the first one's."""
    sent = []

    def broadcast_decision(values, group):
        assert group == "the group"
        sent.append(list(values))
        return sent[0] if len(sent) % 2 == 0 else values

    monkeypatch.setitem(sys.modules, "gnsfx.distributed", SimpleNamespace(broadcast_decision=broadcast_decision))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    changes = []
    for step_time in ((0.9, 0.01), (0.1, 0.01)):
        noise = StubNoise(400, (390, 410))
        noise.process_group = "the group"
        controller = make(noise, start=64, target="time", step_time=step_time, max_factor=10, world_size=2)
        noise.tick(64)
        changes.append(controller.step())
    assert changes[0] == changes[1] and changes[0].after == 176


def test_another_number_of_ranks_than_the_noise_scale_has_is_told_of(monkeypatch):
    noise = StubNoise(400, (390, 410))
    controller = make(noise)
    noise.process_group = "found later"
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 4)
    with pytest.raises(OptionError, match=r"that of 4 ranks, but batch sizes were made for 1: give world_size="):
        controller.step()
    monkeypatch.setattr("gnsfx.distributed.broadcast_decision", lambda values, group: values)
    given_by_hand = make(noise, world_size=2)
    assert given_by_hand.step() is not None


def test_a_step_with_other_examples_is_not_timed():
    controller = make(StubNoise(), warm_up=10_000)
    for examples in (8, 8, 5, 8, 8):
        controller.step(examples=examples, seconds=1.0)
    assert controller.state_dict()["step_times"] == {"8": [1.0, 1.0]}
