"""NoiseScale on contributions made here one by one, so that only its own arithmetic is under test."""

import inspect
import itertools
import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gnsfx import collector, unmeasured
from gnsfx.errors import GnsError, GnsWarning, NotMeasuredError, OptionError
from gnsfx.noise import estimators
from gnsfx.noise.intervals import one_step
from gnsfx.noise.noise_scale import NoiseScale
from gnsfx.noise.waiting import MOST
from tests.gnsfx.noise.one_by_one import data, definition, run


def test_one_step_is_the_definition(source, model):
    noise = NoiseScale(model)
    (measured,) = run(source, model, noise, [12])
    tr_sigma, g_sq = definition(model, *data(12))
    assert measured.tr_sigma == pytest.approx(tr_sigma, rel=1e-5)
    assert measured.g_sq == pytest.approx(g_sq, rel=1e-5)
    assert measured.examples == 12
    assert (noise.tr_sigma, noise.g_sq) == pytest.approx((measured.tr_sigma, measured.g_sq))
    assert noise.b_simple == pytest.approx(tr_sigma / g_sq, rel=1e-5)
    assert noise.b_simple == pytest.approx(measured.b_simple)
    assert (noise.steps, noise.examples, noise.skipped, noise.coverage_share) == (1, 12, 0, 1.0)
    assert source.cleared == 1


def test_accumulation_is_one_larger_step(source, model):
    whole, parts = NoiseScale(model), NoiseScale(model)
    next(run(source, model, whole, [12]))
    model.zero_grad()
    x, y = data(12)
    for chunk in zip(x.split(4), y.split(4), strict=True):
        source.backward(model, *chunk, scale=1 / 3)
    parts.step()
    assert (parts.tr_sigma, parts.g_sq) == pytest.approx((whole.tr_sigma, whole.g_sq), rel=1e-5)
    assert parts.examples == 12


def test_average_is_of_numerators_and_denominators(source, model):
    noise = NoiseScale(model, decay=0.5)
    steps = list(run(source, model, noise, [8, 8, 8]))
    weights = [0.25, 0.5, 1.0]
    for name in ("tr_sigma", "g_sq"):
        expected = sum(w * getattr(m, name) for w, m in zip(weights, steps, strict=True)) / sum(weights)
        assert getattr(noise, name) == pytest.approx(expected)
    assert noise.b_simple == pytest.approx(estimators.noise_scale(noise.tr_sigma, noise.g_sq))


@pytest.mark.parametrize("options", [{"decay": 0.5}, {"half_life": 8}])
def test_decay_is_in_examples_and_weights_are_degrees_of_freedom(source, model, options):
    noise = NoiseScale(model, **options)
    steps = list(run(source, model, noise, [8, 4, 16]))
    weights = [7 * 0.5 ** (20 / 8), 3 * 0.5 ** (16 / 8), 15]
    expected = sum(w * m.tr_sigma for w, m in zip(weights, steps, strict=True)) / sum(weights)
    assert noise.tr_sigma == pytest.approx(expected)


def test_steps_that_grew_a_hundred_times_leave_a_memory_of_many(source, model):
    def after(sizes, **options):
        noise = NoiseScale(model, **options)
        for seed, size in enumerate(sizes):
            model.zero_grad()
            x = torch.full((size, 3), 1 / 3)
            source.backward(model, x, 5 + 0.1 * data(size, seed)[1])
            noise.step()
        return noise

    assert after([2] * 5 + [256] * 5).interval().bounded
    brief = after([2] + [64] * 24, half_life=10)
    with pytest.warns(GnsWarning, match=r"worth 1 steps, too few for an interval"):
        assert not brief.interval().detected


def test_groups_are_sums_over_parameters(source, model):
    noise = NoiseScale(model)
    for _ in run(source, model, noise, [8, 8]):
        pass
    rows = noise.by_parameter()
    assert list(rows) == [name for name, _ in model.named_parameters()]
    groups = noise.by_group()
    assert list(groups) == ["Linear", "LayerNorm"]
    linear = [rows[name] for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    assert groups["Linear"].tr_sigma == pytest.approx(sum(row.tr_sigma for row in linear))
    assert groups["Linear"].g_sq == pytest.approx(sum(row.g_sq for row in linear))
    assert groups["Linear"].b_simple == pytest.approx(groups["Linear"].tr_sigma / groups["Linear"].g_sq)
    assert (groups["Linear"].parameters, groups["Linear"].elements) == (4, 32)
    assert sum(row.tr_sigma for row in groups.values()) == pytest.approx(noise.tr_sigma)


def test_ways_to_group(source, model):
    noise = NoiseScale(model)
    next(run(source, model, noise, [8]))
    by_regex = noise.by_group({"first": r"^0\.", "biases": r"bias$"})
    assert {group: row.parameters for group, row in by_regex.items()} == {"first": 2, "biases": 2, "other": 2}
    by_names = noise.by_group({"head": ["2.weight", "2.bias"]})
    assert {group: row.parameters for group, row in by_names.items()} == {"head": 2, "other": 4}
    by_name = noise.by_group(lambda name: name.rpartition(".")[2])
    assert {group: row.parameters for group, row in by_name.items()} == {"weight": 3, "bias": 3}
    by_rank = noise.by_group(lambda name, parameter: f"rank {parameter.ndim}" if parameter.ndim > 1 else None)
    assert {group: row.parameters for group, row in by_rank.items()} == {"rank 2": 2}
    with pytest.raises(OptionError, match=r"by_group\('rows'\): expected 'module type'"):
        noise.by_group("rows")


def test_reading_is_one_transfer(source, model, monkeypatch):
    noise = NoiseScale(model)
    next(run(source, model, noise, [8]))
    transfers = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: transfers.append(tensor.shape) or tolist(tensor))
    noise.summary(), noise.b_simple, noise.by_parameter(), noise.by_group(), repr(noise)
    assert len(transfers) == 1


def test_step_does_not_synchronise(source, model):
    """On the meta device every read of a value raises."""
    for name, parameter in (model := model.to("meta")).named_parameters():
        parameter.grad = torch.empty_like(parameter)
        source.sq_norm[name] = torch.empty((), device="meta")
    noise, sq_norm = NoiseScale(model), source.sq_norm
    for _ in range(MOST + 1):
        source.sq_norm, source.examples = sq_norm, torch.empty((), device="meta")
        measured = noise.step()
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        _ = measured.b_simple


class Operations(TorchDispatchMode):
    """Counts those that are no views: on a GPU each is a launch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_launches_do_not_grow_with_the_model(source, monkeypatch):
    found_at = []
    for layers in (3, 40):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)), nn.Linear(3, 2))
        noise, counts = NoiseScale(model), []
        for seed in range(MOST):
            model.zero_grad()
            source.backward(model, *data(4, seed))
            found = source.totals(model)
            with monkeypatch.context() as patch, Operations() as operations:
                patch.setattr(collector, "totals", lambda model, found=found: found)
                noise.step()
            counts.append(operations.count)
        assert max(counts[1:-1]) <= 10
        assert sum(counts) <= 25 * MOST, "the averages take in all steps at once: 240 launches, 15 for each of them"
        found_at.append(counts)
    assert found_at[0] == found_at[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out(source, model, bad):
    clean, noise = NoiseScale(model), NoiseScale(model)
    for _ in run(source, model, clean, [8, 8]):
        pass
    next(run(source, model, noise, [8]))
    x, y = data(8, 5)
    x[3, 1] = bad
    model.zero_grad()
    source.backward(model, x, y)
    measured = noise.step()
    assert math.isnan(measured.b_simple) and math.isnan(measured.g_sq)
    model.zero_grad()
    source.backward(model, *data(8, 1))
    noise.step()
    with pytest.warns(GnsWarning, match=r"1 of 3 steps were left out .* NaN or infinite; noise\.skipped counts them"):
        assert noise.b_simple == pytest.approx(clean.b_simple)
    assert (noise.skipped, noise.steps, noise.examples) == (1, 3, 16)  # and no second warning


@pytest.mark.parametrize("size", [0, 1])
def test_fewer_than_two_examples_say_nothing(source, model, size):
    noise, clean = NoiseScale(model), NoiseScale(model)
    for _ in run(source, model, clean, [8]):
        pass
    next(run(source, model, noise, [8]))
    model.zero_grad()
    source.backward(model, *data(size, 3))
    for name, parameter in model.named_parameters():  # an empty batch leaves gradients of zero
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        source.sq_norm.setdefault(name, torch.zeros(()))
    measured = noise.step()
    assert measured.examples == size and math.isnan(measured.tr_sigma)
    with pytest.warns(GnsWarning, match=r"1 of 2 steps had fewer than two examples.* Use a larger batch, or call"):
        assert noise.g_sq == pytest.approx(clean.g_sq, rel=0.05)
    assert "1 with fewer than two examples" in noise.summary()


def test_only_single_examples_give_nan_and_never_zero_division(source, model):
    noise = NoiseScale(model)
    for _ in run(source, model, noise, [1, 1]):
        pass
    with pytest.warns(GnsWarning, match="2 of 2 steps"):
        assert math.isnan(noise.b_simple)
    assert "nothing measured yet" in repr(noise)
    assert "not measured" in noise.summary()


def test_undetected_gradient_reads_nan_and_says_so(source, model):
    noise = NoiseScale(model)
    for sign, parameter in zip(itertools.cycle([1.0, -1.0]), model.parameters(), strict=False):
        parameter.grad = torch.full_like(parameter, 1e-3 * sign)
    for name, parameter in model.named_parameters():
        source.sq_norm[name] = parameter.grad.square().sum() * 2
    source.examples = torch.tensor(4.0)
    noise.step()
    assert noise.g_sq < 0 < noise.tr_sigma
    assert math.isnan(noise.b_simple)
    assert "not yet detected" in repr(noise) and "not yet detected" in noise.summary()
    assert "-" not in noise.summary().splitlines()[1].removeprefix("Linear")


def test_refused_parameters_are_left_out_and_named_once(source, model):
    source.refused = {"1.weight": "examples interact in aten.mean", "1.bias": "examples interact in aten.mean"}
    noise = NoiseScale(model)
    with pytest.warns(GnsWarning) as caught:
        for _ in range(2):
            model.zero_grad()
            source.backward(model, *data(8))
            line = inspect.currentframe().f_lineno + 1
            noise.step()
    (warning,) = caught
    assert str(warning.message) == (
        "2 of 6 trainable parameters, 23.8% of the numbers, are not in the noise scale. 1.weight, 1.bias: examples "
        "interact in aten.mean. See gnsfx.coverage(model)."
    )
    assert (warning.filename, warning.lineno) == (__file__, line)
    assert noise.coverage_share == pytest.approx(32 / 42)
    assert set(noise.by_parameter()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert "2 of 6 trainable parameters" in noise.summary()


def test_a_refusal_known_to_the_compiled_graph_only(source, model):
    """A graph from the cache brings -inf instead of a reason."""
    reference, noise = NoiseScale(model), NoiseScale(model)
    for _ in run(source, model, reference, [8]):
        pass
    model.zero_grad()
    source.sq_norm = {name: torch.tensor(-math.inf) for name in ("1.weight", "1.bias")}
    source.backward(model, *data(8))  # nothing added to -inf brings it back
    noise.step()
    with pytest.warns(
        GnsWarning,
        match=r"2 of 6 trainable parameters.* 1\.weight, 1\.bias: refused in the graph or on another rank\. See",
    ):
        rows = noise.by_parameter()
    expected = reference.by_parameter()
    assert set(rows) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert rows["0.weight"].tr_sigma == pytest.approx(expected["0.weight"].tr_sigma)
    assert (noise.skipped, noise.coverage_share) == (0, pytest.approx(32 / 42))


def test_what_the_user_left_out_is_no_reason_to_warn(source, model, monkeypatch):
    monkeypatch.setattr(unmeasured, "left_out", lambda parameter: "not selected" if parameter.ndim > 1 else None)
    source.refused = dict.fromkeys(("0.weight", "2.weight"), "no compiled graph measures it")
    noise = NoiseScale(model)
    next(run(source, model, noise, [8]))
    assert set(noise.by_parameter()) == {"0.bias", "1.weight", "1.bias", "2.bias"}
    assert noise.coverage_share == pytest.approx(17 / 42)


def test_a_parameter_without_gradient_is_no_gap(source, model):
    model.unused = nn.Parameter(torch.ones(3))
    noise = NoiseScale(model)
    next(run(source, model, noise, [8]))
    assert noise.coverage_share == 1.0
    assert "unused" not in noise.by_parameter()


def test_a_parameter_added_later_gets_its_own_average(source, model):
    noise = NoiseScale(model)
    model[2].requires_grad_(False)
    model.requires_grad_(False)[0].requires_grad_(True)
    x, y = data(8)

    def step():
        model.zero_grad()
        active = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for example in range(8):
            grads = torch.autograd.grad(F.mse_loss(model(x[example]), y[example]) / 8, [*active.values()])
            for (name, parameter), grad in zip(active.items(), grads, strict=True):
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
                source.sq_norm[name] = source.sq_norm.get(name, torch.zeros(())) + grad.square().sum()
        source.examples = torch.tensor(8.0)
        return noise.step()

    step()
    before = noise.by_parameter()
    assert list(before) == ["0.weight", "0.bias"]
    model.requires_grad_(True)
    step()
    after = noise.by_parameter()
    assert len(after) == 6
    assert after["0.weight"].tr_sigma == pytest.approx(before["0.weight"].tr_sigma)


def test_parameters_in_another_order_keep_their_averages(source, model):
    """As parametrizations and weight norm leave them."""
    noise = NoiseScale(model)
    next(run(source, model, noise, [8]))
    before = noise.by_parameter()
    weight = model[0].weight
    del model[0].weight
    model[0].weight = weight
    next(run(source, model, noise, [8]))
    after = noise.by_parameter()
    assert [*after][:2] == ["0.bias", "0.weight"]
    assert {name: row.tr_sigma for name, row in after.items()} == pytest.approx(
        {name: row.tr_sigma for name, row in before.items()}
    )


def test_stale_gradients_are_noticed(source, model):
    noise = NoiseScale(model)
    x, y = data(4)
    for _ in range(40):  # never zeroed
        source.backward(model, x, y)
        noise.step()
    with pytest.warns(GnsWarning, match=r"p\.grad was larger than the measured examples .* Call zero_grad\(\)"):
        _ = noise.b_simple


def test_loss_scale_is_taken_out(source, model):
    plain, scaled = NoiseScale(model), NoiseScale(model)
    next(run(source, model, plain, [8]))
    for scale in (1024.0, torch.tensor(1024.0)):
        model.zero_grad()
        source.backward(model, *data(8), scale=1024.0)
        for parameter in model.parameters():
            parameter.grad /= 1024.0
        scaled.step(loss_scale=scale)
        assert (scaled.tr_sigma, scaled.g_sq) == pytest.approx((plain.tr_sigma, plain.g_sq), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(source, model, dtype):
    reference, noise = NoiseScale(model), NoiseScale(model.to(dtype))
    x, y = data(8)
    source.backward(model, x.to(dtype), y.to(dtype))
    source.sq_norm = {name: norm.float() for name, norm in source.sq_norm.items()}
    noise.step()
    model.float().zero_grad()
    source.backward(model, x, y)
    reference.step()
    assert noise.tr_sigma == pytest.approx(reference.tr_sigma, rel=0.05 if dtype is torch.bfloat16 else 1e-5)


def test_nothing_measured_tells_why(source, model):
    source.reason = "No graph of this model was compiled. Call torch.compile(model, backend='gns')."
    with pytest.raises(NotMeasuredError) as caught:
        NoiseScale(model).step()
    assert str(caught.value) == source.reason
    assert isinstance(caught.value, GnsError)


def test_step_after_zero_grad_tells_so(source, model):
    source.backward(model, *data(4))
    source.refused = {name: collector.ZEROED for name, _ in model.named_parameters()}
    with pytest.raises(NotMeasuredError, match=r"gradient is None.* before optimizer\.zero_grad\(\)"):
        NoiseScale(model).step()


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": 0}, {"half_life": 0}, {"half_life": -5}])
def test_options_are_checked(model, options):
    (name, value), *_ = options.items()
    with pytest.raises(OptionError, match=rf"{name}={value!r}: expected"):
        NoiseScale(model, **options)


def test_before_the_first_step(source, model):
    noise = NoiseScale(model)
    assert math.isnan(noise.b_simple) and noise.by_parameter() == {} and noise.coverage_share == 0
    assert repr(noise) == "NoiseScale(no step yet)"
    assert "0 steps" in noise.summary()


def test_reset_forgets(source, model):
    noise = NoiseScale(model)
    next(run(source, model, noise, [8]))
    noise.reset()
    assert math.isnan(noise.b_simple) and noise.steps == 0


def test_values_are_plain_floats(source, model):
    noise = NoiseScale(model)
    measured = next(run(source, model, noise, [8]))
    values = [noise.b_simple, noise.tr_sigma, noise.g_sq, measured.b_simple, noise.coverage_share]
    assert all(type(value) is float for value in values)
    json.dumps([values, measured.examples, noise.steps])


def test_no_warning_in_an_ordinary_run(source, model):
    noise = NoiseScale(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in run(source, model, noise, [8, 8, 5]):
            repr(noise), noise.summary()


@pytest.mark.parametrize("compile_as", ["wrapper", "in place"])
def test_with_the_real_collectors(compile_as):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))

        def forward(self, x):
            return self.layers(x)

    torch.manual_seed(0)
    model, (x, y) = Net(), data(12)
    tr_sigma, g_sq = definition(model, x, y)
    if compile_as == "wrapper":
        called = torch.compile(model, backend="gns", options={"gns.inner": "eager"})
    else:
        model.compile(backend="gns", options={"gns.inner": "eager"})
        called = model
    noise = NoiseScale(called)
    for _ in range(2):  # the second step starts anew
        F.mse_loss(called(x), y).backward()
        measured = noise.step()
        called.zero_grad()
        assert (measured.tr_sigma, measured.g_sq, measured.examples) == pytest.approx((tr_sigma, g_sq, 12), rel=1e-4)
    assert (noise.tr_sigma, noise.g_sq) == pytest.approx((tr_sigma, g_sq), rel=1e-4)
    assert noise.coverage_share == 1 and set(noise.by_group()) == {"Linear", "LayerNorm"}


def test_one_step_has_an_interval_where_single_norms_are_kept():
    """The same as from the norms of a loop over the examples, over two micro-batches of different size."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)), data(64)
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.per_example": True})
    noise, sizes = NoiseScale(model), [40, 24]
    shares = torch.cat([torch.full((b,), 1 / (2 * b)) for b in sizes])
    for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
        (F.mse_loss(compiled(xs), ys) / 2).backward()
    grad_sq = sum(float(p.grad.square().sum()) for p in model.parameters())
    measured = noise.step()
    rows = []
    for example in range(64):
        grads = torch.autograd.grad(F.mse_loss(model(x[example]), y[example]) * shares[example], [*model.parameters()])
        rows.append(sum(float(g.square().sum()) for g in grads))
    low, high = measured.interval(0.9)
    assert (low, high) == pytest.approx(one_step(rows, grad_sq, shares.tolist(), 0.9), rel=1e-3)
    assert low < measured.b_simple < high


def test_one_step_alone_says_what_an_interval_needs(source, model):
    with pytest.raises(NotMeasuredError, match=r"gns\.per_example.* NoiseScale\.interval\(\) needs several steps"):
        next(run(source, model, NoiseScale(model), [8])).interval()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_grad_scaler(enabled):
    """The loop of the documentation of torch.amp, with a step whose gradients overflow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager"})
    optimizer, scaler = (
        torch.optim.SGD(model.parameters(), lr=0.0),
        torch.amp.GradScaler("cpu", 1024.0, enabled=enabled),
    )
    scaled, plain = NoiseScale(model), NoiseScale(model)
    for seed in range(3):
        x, y = data(8, seed)
        loss = F.mse_loss(compiled(x), y)
        scaler.scale(loss * (math.inf if seed == 1 and enabled else 1)).backward()
        scaler.unscale_(optimizer)
        scaled.step(loss_scale=scaler)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if seed != 1 or not enabled:
            F.mse_loss(compiled(x), y).backward()
            plain.step()
            optimizer.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = scaled.tr_sigma, scaled.g_sq
    assert found == pytest.approx((plain.tr_sigma, plain.g_sq), rel=1e-4)
    assert [str(w.message)[:30] for w in caught] == ["1 of 3 steps were left out of "] * enabled


class Fork(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x, left):
        return (self.left if left else self.right)(x).square().sum(1)


def test_examples_that_do_not_reach_a_parameter_have_contributions_of_zero():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Fork().double()
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager"})
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    for half, left in zip(x, (True, False), strict=True):
        (compiled(half, left).mean() / 2).backward()
    with torch.no_grad():  # the gradient of |Wx + b|^2 is 2 (Wx + b) (x, 1)
        parts = zip(x, (model.left, model.right), strict=True)
        rows = [(2 * layer(half)).square().sum(1) * (half.square().sum(1) + 1) for half, layer in parts]
        q, g = float(torch.cat(rows).sum()) / 64, sum(float(p.grad.square().sum()) for p in model.parameters())
    one = NoiseScale(compiled).step()
    assert (one.tr_sigma, one.g_sq) == pytest.approx(((8 * q - g) * 8 / 7, (g - q) * 8 / 7), rel=1e-9)
    assert one.examples == 8


def test_one_step_takes_the_norms_of_what_it_measured_only():
    """A parameter with a part from eager code is refused by the host: the graph knows nothing of it, and keeps its rows."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)), data(32)
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.per_example": True})
    (F.mse_loss(compiled(x), y) + model[0].weight.square().sum()).backward()
    with pytest.warns(GnsWarning, match="1 of 6 trainable parameters"):
        measured = NoiseScale(model).step()
    kept = [p for name, p in model.named_parameters() if name != "0.weight"]
    losses = [F.mse_loss(model(x[b]), y[b]) / 32 for b in range(32)]
    rows = [sum(float(g.square().sum()) for g in torch.autograd.grad(loss, kept)) for loss in losses]
    grad_sq = sum(float(p.grad.square().sum()) for p in kept)
    assert measured.interval() == pytest.approx(one_step(rows, grad_sq), rel=1e-3)
