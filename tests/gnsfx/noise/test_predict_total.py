"""NoiseScale(predict_total=True): norm layers in every step, everything in some, and never one taken for the other."""

import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gnsfx.errors import NotMeasuredError, OptionError
from gnsfx.noise.noise_scale import NoiseScale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        return self.b(self.norm(self.a(x)).relu())


def batch(seed, size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    return x, x[:, :4] + 0.5 * torch.randn(size, 4, generator=generator)


def steps(model, noise, seeds):
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager"})
    for seed in seeds:
        x, y = batch(seed)
        with noise.measuring():
            loss = F.mse_loss(compiled(x), y)
        loss.backward()
        yield noise.step()
        model.zero_grad()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_the_prediction_and_what_it_is_made_of(net):
    whole, predicted = NoiseScale(net, half_life=1e12), NoiseScale(net, predict_total=True, every=5, half_life=1e12)
    full = []
    for seed, measured in enumerate(steps(net, predicted, range(80))):
        if math.isnan(measured.tr_sigma):
            assert measured.examples == 16
        else:
            full.append(seed)
    assert full == [*range(1, 17), *range(20, 80, 5)]
    for _ in steps(net, whole, range(80)):
        pass
    assert predicted.prediction is not None and predicted.prediction.factor > 0
    # The weights stand still, so that both estimate the same numbers; the prediction from fewer full steps.
    assert predicted.interval(0.999).low < whole.b_simple < predicted.interval(0.999).high
    assert predicted.b_simple == pytest.approx(predicted.prediction.b_simple)
    norm = whole.by_group()["LayerNorm"]
    recent = predicted.by_group()["LayerNorm"]
    assert (recent.tr_sigma, recent.g_sq) == pytest.approx((norm.tr_sigma, norm.g_sq), rel=1e-5)


def test_groups_are_of_the_full_steps(net):
    predicted = NoiseScale(net, predict_total=True, every=5, half_life=1e12)
    full = [m for m in steps(net, predicted, range(30)) if not math.isnan(m.tr_sigma)]
    linear, norm = (predicted.by_group()[kind] for kind in ("Linear", "LayerNorm"))
    total = sum(m.tr_sigma for m in full) / len(full)
    rows = predicted.by_parameter()
    assert set(rows) == {name for name, _ in net.named_parameters()}
    assert linear.tr_sigma == pytest.approx(sum(rows[n].tr_sigma for n in rows if "norm" not in n))
    assert linear.tr_sigma < total < linear.tr_sigma + 2 * norm.tr_sigma
    assert predicted.coverage_share == 1.0


def test_it_goes_on_from_its_state(net):
    one, two = (NoiseScale(net, predict_total=True, every=4) for _ in range(2))
    for _ in steps(net, one, range(20)):
        pass
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two.load_state_dict(torch.load(file))
    assert (two.b_simple, two.interval(), two.prediction) == (one.b_simple, one.interval(), one.prediction)
    for noise in (one, two):
        for _ in steps(net, noise, range(20, 40)):
            pass
    assert (two.b_simple, two.interval()) == (one.b_simple, one.interval())


def test_its_state_fits_other_wrappings_and_one_without_prediction_starts_anew(net):
    one, plain = NoiseScale(net, predict_total=True, every=4), NoiseScale(net)
    for noise in (one, plain):
        for _ in steps(net, noise, range(20)):
            pass
    other = NoiseScale(torch.compile(net, backend="eager"), predict_total=True, every=4)
    other.load_state_dict(one.state_dict())
    for _ in steps(net, other, range(4)):
        pass
    assert other.prediction is not None and other.steps == 24
    other.load_state_dict(plain.state_dict())
    assert other.prediction is None and other.b_simple == plain.b_simple


def test_nothing_that_is_no_number_is_shown(net):
    noise = NoiseScale(net, predict_total=True, every=4)
    next(iter(steps(net, noise, range(1))))
    assert "nan" not in repr(noise) + noise.summary()


def test_a_loop_without_the_context_is_told(net):
    noise = NoiseScale(net, predict_total=True)
    compiled = torch.compile(net, backend="gns", options={"gns.inner": "eager"})
    x, y = batch(0)
    F.mse_loss(compiled(x), y).backward()
    with pytest.raises(NotMeasuredError, match=r"with noise\.measuring\(\)"):
        noise.step()


def test_every_is_checked(net):
    with pytest.raises(OptionError, match="every=1: expected a whole number"):
        NoiseScale(net, predict_total=True, every=1)


def test_without_it_the_context_does_nothing(net):
    noise = NoiseScale(net)
    for measured in steps(net, noise, range(2)):
        assert measured.tr_sigma > 0
    assert noise.prediction is None
