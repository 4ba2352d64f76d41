"""Everything that can be wrong with a measurement is said in plain words, and ordinary runs are left in peace."""

import re
import warnings

import pytest
import torch
from torch import nn

from gnsfx.errors import GnsWarning, NotMeasuredError
from gnsfx.noise.diagnostics import Findings, messages
from gnsfx.noise.intervals import Estimate
from gnsfx.noise.noise_scale import NoiseScale
from gnsfx.noise.tracking import Counts
from tests.gnsfx.noise.one_by_one import data, run


def estimate(tr_sigma, g_sq, n_eff=50.0):
    return Estimate(tr_sigma, g_sq, (0.02 * tr_sigma) ** 2, 0.0, 0.01, n_eff)


ROWS = [
    ("skipped", Findings(Counts(steps=9, examples=56, skipped=2)), r"2 of 9 steps were left out .* NaN or infinite"),
    ("skipped", Findings(Counts(steps=9, skipped=9)), r"all 9 steps were left out"),
    ("nothing", Findings(Counts(steps=9, too_few=9)), r"no rank measured an example in 9 steps"),
    ("too few", Findings(Counts(steps=9, examples=65, too_few=1)), r"1 of 9 steps had fewer than two examples"),
    ("weights", Findings(Counts(steps=9, examples=72, misweighted=3)), r"in 3 of 9 steps the weights"),
    ("left over", Findings(Counts(steps=9, examples=72, left_over=8)), r"in 8 of 9 steps p\.grad still held .* Call zero_grad"),
    ("inconsistent", Findings(Counts(steps=9, examples=72, too_large=1)), r"p\.grad was larger .* Call zero_grad"),
    ("modified", Findings(total=estimate(100, 2), modified=True), r"before gradients are clipped; after scaler\.unscale_"),
    ("too small", Findings(total=estimate(100, -2)), r"p\.grad is smaller .* pass loss_scale="),
    ("memory", Findings(Counts(steps=40, examples=40000), estimate(100, 2, 1.8)), r"worth 1\.8 steps.* Give .* half_life"),
    ("moved", Findings(total=estimate(100, 2), recent=estimate(300, 2)), r"is not that of the average.* Call noise\.reset"),
    ("moved", Findings(total=estimate(100, 9), recent=estimate(20, 2)), r"much larger in older steps.* Call noise\.reset\(\) after warm-up"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "found", "text"), ROWS)
def test_messages(kind, found, text):
    ((said, message),) = messages(found)
    assert said == kind
    assert re.search(text, message)


PEACE = [
    Findings(Counts(steps=100, examples=800)),
    Findings(total=estimate(100, 2), recent=estimate(105, 2)),
    Findings(total=estimate(100, -0.2)),  # not detected: negative within its error
    Findings(total=estimate(100, -2, n_eff=3.0)),
    Findings(Counts(steps=2, examples=56), total=estimate(100, 2, 1.8)),
    Findings(Counts(steps=40, examples=400), total=estimate(100, 2, 1.8), predicted=True),
    Findings(total=estimate(100, 2), recent=estimate(100, 1.8)),  # the last steps say little
]


@pytest.mark.parametrize("found", PEACE)
def test_no_message(found):
    assert list(messages(found)) == []


def test_clipping_before_the_step_is_noticed(source, model):
    noise = NoiseScale(model)
    for seed in range(40):
        model.zero_grad()
        source.backward(model, *data(8, seed))
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        noise.step()
    with pytest.warns(GnsWarning, match=r"p\.grad (is smaller|was changed)"):
        _ = noise.b_simple


def test_a_loss_scale_that_was_undone_without_telling(source, model):
    noise = NoiseScale(model)
    for seed in range(40):
        model.zero_grad()
        source.backward(model, *data(8, seed), scale=1024.0)
        for parameter in model.parameters():
            parameter.grad /= 1024.0
        noise.step()
    with pytest.warns(GnsWarning, match=r"pass loss_scale="):
        _ = noise.b_simple


def test_the_share_of_the_noise_that_is_covered(source, model):
    whole, part = NoiseScale(model), NoiseScale(model)
    for _ in run(source, model, whole, [8] * 10):
        pass
    assert whole.tr_sigma_share == 1
    source.refused = {"0.weight": "examples interact in aten.mean"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in run(source, model, part, [8] * 10):
            pass
        truth = part.tr_sigma / whole.tr_sigma
        assert 0.3 * truth < part.tr_sigma_share < truth  # a bound from below
        assert part.coverage_share == pytest.approx(27 / 42)


def test_a_move_is_a_note_and_no_warning(source, model):
    noise = NoiseScale(model, decay=0.98)
    for seed in range(110):
        x, y = data(8, seed)
        model.zero_grad()
        source.backward(model, x, y + (50 if seed < 30 else 0))
        noise.step()
    assert "gradients were much larger in older steps" in noise.summary()


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def unscale(model):
    for parameter in model.parameters():
        parameter.grad /= 4


WRITES = [  # between backward and step, loss_scale, whether that is wrong
    ((), 1.0, False),
    ((clip,), 1.0, True),
    ((unscale,), 1.0, True),
    ((unscale,), 4.0, False),
    ((unscale, clip), 4.0, True),
    ((unscale,), torch.tensor(4.0), False),
]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize(("writes", "loss_scale", "wrong"), WRITES)
def test_what_writes_to_gradients_between_backward_and_step(model, writes, loss_scale, wrong, passes, set_to_none):
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager"})
    noise = NoiseScale(model)
    for seed in range(3):
        for _ in range(passes):
            x, y = data(8, seed)
            (nn.functional.mse_loss(compiled(x), y) * float(loss_scale) / passes).backward()
        for write in writes:
            write(model)
        noise.step(loss_scale=loss_scale)
        clip(model)  # where it belongs
        model.zero_grad(set_to_none=set_to_none)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _ = noise.b_simple
    assert any("was changed between backward and noise.step()" in str(w.message) for w in caught) is wrong


def compiled_as(model):
    return torch.compile(model, backend="gns", options={"gns.inner": "eager"})


def backward(compiled, seed, **options):
    x, y = data(8, seed)
    nn.functional.mse_loss(compiled(x), y).backward(**options)


def test_copied_gradients_are_not_taken_for_changed_ones(model):
    """Autograd copies a gradient that is in use elsewhere, which shows as a write."""
    compiled, noise, seen = compiled_as(model), NoiseScale(model), []
    model[0].weight.register_hook(seen.append)
    for seed in range(3):
        model.zero_grad()
        backward(compiled, seed)
        noise.step()
    _ = noise.b_simple  # warnings are errors here


def test_a_later_parameter_that_is_clipped_alone_is_noticed(model):
    compiled, noise = compiled_as(model), NoiseScale(model)
    for seed in range(3):
        model.zero_grad()
        backward(compiled, seed)
        clip(model[2])
        noise.step()
    with pytest.warns(GnsWarning, match=r"was changed between backward and noise\.step\(\)"):
        _ = noise.b_simple


@pytest.mark.parametrize("zeroed", ["never", "each second step"])
@pytest.mark.parametrize("clipped", [False, True])
def test_gradients_of_an_earlier_step_are_noticed_and_left_out(model, zeroed, clipped):
    compiled, noise, clean = compiled_as(model), NoiseScale(model, half_life=1e12), NoiseScale(model, half_life=1e12)
    right = range(0, 1 if zeroed == "never" else 6, 2)
    for seed in range(6):
        if seed in right:
            model.zero_grad()
        backward(compiled, seed)
        noise.step()
        if clipped:
            clip(model)
    for seed in right:
        model.zero_grad()
        backward(compiled, seed)
        clean.step()
    missed = 6 - len(right)
    with pytest.warns(GnsWarning, match=rf"in {missed} of 6 steps p\.grad still held gradients of an earlier"):
        assert noise.tr_sigma == pytest.approx(clean.tr_sigma)


def zero_behind_autograd(model):
    for parameter in model.parameters():
        parameter.grad.data.zero_()


@pytest.mark.parametrize("zero", [nn.Module.zero_grad, lambda m: m.zero_grad(set_to_none=False), zero_behind_autograd])
def test_zeroed_gradients_are_of_no_earlier_step(model, zero):
    compiled, noise = compiled_as(model), NoiseScale(model)
    for seed in range(4):
        backward(compiled, seed)
        noise.step()
        x, y = data(8, seed)
        torch.autograd.grad(nn.functional.mse_loss(compiled(x), y), [*model.parameters()])
        zero(model)
    assert noise.tr_sigma > 0  # warnings are errors here


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_second_step_says_that_the_first_took_everything(model, zeroed):
    compiled, noise, other = compiled_as(model), NoiseScale(model), NoiseScale(model)
    backward(compiled, 0)
    noise.step()
    if zeroed:
        model.zero_grad()
    with pytest.raises(NotMeasuredError, match=r"since noise\.step\(\) took the last one\. Call it once per step"):
        other.step()
    model.zero_grad()
    x, y = data(8, 0)
    torch.autograd.grad(nn.functional.mse_loss(compiled(x), y), [*model.parameters()])
    with pytest.raises(NotMeasuredError, match=r"torch\.autograd\.grad and backward\(inputs=\.\.\.\) fill no \.grad"):
        other.step()


class Either(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x, first):
        return (self.one if first else self.two)(x)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_branch_that_was_not_taken_is_no_gap(set_to_none):
    model = Either()
    compiled, noise = compiled_as(model), NoiseScale(model)
    for seed in range(6):
        model.zero_grad(set_to_none=set_to_none)
        x, y = data(8, seed)
        nn.functional.mse_loss(compiled(x, seed % 2 == 0), y).backward()
        noise.step()
    assert noise.coverage_share == 1.0 and len(noise.by_parameter()) == 4
