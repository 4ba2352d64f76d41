"""NoiseScale(optimizer=...): the pair of per-example autograd, weighed by what the optimizer divides by."""

import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gnsfx.errors import OptionError
from gnsfx.noise.noise_scale import NoiseScale
from gnsfx.noise.preconditioned import preconditioner


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4)).double()


def truth(net, optimizer, x, y, power):
    """tr(W Sigma) and G'WG of one batch by the definition, W = P^power."""
    rows = []
    for b in range(len(x)):
        grads = torch.autograd.grad(F.mse_loss(net(x[b]), y[b]), [*net.parameters()])
        weights = [preconditioner(optimizer, p, power).sqrt() for p in net.parameters()]
        rows.append(torch.cat([(g * w).flatten() for g, w in zip(grads, weights, strict=True)]))
    rows = torch.stack(rows)
    tr_sigma = rows.var(0).sum()
    return float(tr_sigma), float(rows.mean(0).square().sum() - tr_sigma / len(x))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("elementwise", [True, False])
def test_one_step_by_the_definition(net, elementwise, power):
    options = {"gns.inner": "eager", "gns.elementwise": elementwise}
    compiled, optimizer = torch.compile(net, backend="gns", options=options), torch.optim.AdamW(net.parameters())
    x, y = torch.randn(16, 6).double(), torch.randn(16, 4).double()
    noise = NoiseScale(net, optimizer=optimizer, power=power)
    for update in range(2):
        F.mse_loss(compiled(x), y).backward()
        if update:
            expected = truth(net, optimizer, x, y, power)
        noise.step()
        if not update:
            assert math.isnan(noise.preconditioned.b_simple), "there is no P before the first update"
        optimizer.step()
        optimizer.zero_grad()
    found = noise.preconditioned
    assert found.exact_share == pytest.approx(1.0 if elementwise else 0.0)
    if elementwise:
        assert (found.tr_sigma, found.g_sq) == pytest.approx(expected, rel=1e-6)
    else:
        assert found.tr_sigma == pytest.approx(expected[0], rel=1.0)


def test_interval_and_state(net):
    options = {"gns.inner": "eager", "gns.elementwise": True}
    compiled, optimizer = torch.compile(net, backend="gns", options=options), torch.optim.Adam(net.parameters())
    noise = NoiseScale(net, optimizer=optimizer)
    for _ in range(12):
        x = torch.randn(16, 6).double()
        F.mse_loss(compiled(x), x[:, :4]).backward()
        noise.step()
        optimizer.step()
        optimizer.zero_grad()
    low, high = noise.preconditioned.interval()
    assert 0 < low < noise.preconditioned.b_simple < high
    file, other = io.BytesIO(), NoiseScale(net, optimizer=optimizer)
    torch.save(noise.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert other.preconditioned == noise.preconditioned


def test_arguments_are_checked(net):
    with pytest.raises(OptionError, match="give the optimizer"):
        _ = NoiseScale(net).preconditioned
    with pytest.raises(OptionError, match="power=3"):
        NoiseScale(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), power=3)
