"""A run that was interrupted goes on with the same numbers."""

import io

import pytest
import torch
from torch import nn

from gnsfx import GnsError
from gnsfx.errors import StateError
from gnsfx.noise.noise_scale import NoiseScale
from tests.gnsfx.noise.one_by_one import data, run


def everything(noise):
    rows = {**noise.by_parameter(), **noise.by_group(), **noise.by_group("layer")}
    stats = {name: (row.tr_sigma, row.g_sq, row.interval()) for name, row in rows.items()}
    return noise.b_simple, noise.interval(), noise.steps, noise.examples, noise.coverage_share, stats


def kept(state):
    """Through a file, as torch.load reads it by default."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_run_goes_on_with_the_same_numbers(source, model, cut):
    sizes = [8, 8, 4, 16, 8, 8]
    whole, before, after = (NoiseScale(model, decay=0.9) for _ in range(3))
    for _ in run(source, model, whole, sizes):
        pass
    seeds = iter(range(len(sizes)))
    for seed, size in zip(seeds, sizes[:cut], strict=False):
        model.zero_grad()
        source.backward(model, *data(size, seed))
        before.step()
    after.load_state_dict(kept(before.state_dict()))
    assert cut == 0 or everything(after) == everything(before)
    for seed, size in enumerate(sizes[cut:], cut):
        model.zero_grad()
        source.backward(model, *data(size, seed))
        after.step()
    assert everything(after) == everything(whole)


def test_with_another_decay_it_goes_on_from_the_same_numbers(source, model):
    noise, other = NoiseScale(model, decay=0.9), NoiseScale(model, decay=0.5)
    for _ in run(source, model, noise, [8, 8, 8, 8]):
        pass
    other.load_state_dict(kept(noise.state_dict()))
    assert everything(other) == everything(noise)


def test_looking_changes_nothing(source, model):
    seen, unseen = NoiseScale(model), NoiseScale(model)
    for noise in (seen, unseen):
        for measured in run(source, model, noise, [8, 4, 16] * 7):
            if noise is seen:
                assert measured.freedom > 0 and noise.b_simple and noise.state_dict()
    assert everything(seen) == everything(unseen)


def test_the_state_does_not_follow_later_steps(source, model):
    noise = NoiseScale(model)
    next(run(source, model, noise, [8]))
    state = noise.state_dict()
    copy = state["series"].clone()
    next(run(source, model, noise, [8]))
    assert state["series"].equal(copy)


@pytest.mark.parametrize("wrap", ["compiled", "plain"])
def test_the_wrapping_does_not_matter(source, model, wrap):
    compiled = torch.compile(model, backend="eager")
    first, second = (compiled, model) if wrap == "compiled" else (model, compiled)
    noise = NoiseScale(first)
    model.zero_grad()
    source.backward(first, *data(8))
    noise.step()
    other = NoiseScale(second)
    other.load_state_dict(noise.state_dict())
    assert other.b_simple == noise.b_simple
    assert list(other.by_parameter()) == [name for name, _ in second.named_parameters()]


def test_groups_may_change(source, model):
    noise, other = NoiseScale(model), NoiseScale(model, groups={"norm": r"^1\."})
    for _ in run(source, model, noise, [8, 8, 8, 8]):
        pass
    other.load_state_dict(noise.state_dict())
    assert other.by_group()["norm"].parameters == 2
    assert other.by_group("layer") == noise.by_group("layer")


def test_sums_from_a_device_without_double_precision(source, model):
    noise, other = NoiseScale(model), NoiseScale(model)
    next(run(source, model, noise, [8]))
    state = {key: x.float() if isinstance(x, torch.Tensor) else x for key, x in noise.state_dict().items()}
    other.load_state_dict(state)
    next(run(source, model, other, [8]))
    assert other.state_dict()["series"].dtype == torch.float64 and other.steps == 2


def test_a_group_of_other_parameters_starts_anew(source, model):
    noise, other = NoiseScale(model, groups={"some": "weight"}), NoiseScale(model, groups={"some": "bias"})
    for _ in run(source, model, noise, [8, 8, 8, 8]):
        pass
    other.load_state_dict(noise.state_dict())
    rows = other.by_parameter()
    assert other.by_group()["some"].tr_sigma == pytest.approx(sum(rows[n].tr_sigma for n in rows if "bias" in n))
    assert other.by_group("layer") == noise.by_group("layer")


WIDER = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2))
LONGER = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2), nn.Linear(2, 2))
DAMAGES = [
    ("another model", lambda state: state, WIDER, r"0\.weight has shape \[5, 3\] in the state and shape \[6, 3\] in the model"),
    ("a longer model", lambda state: state, LONGER, r"3\.weight has no such parameter in the state and shape \[2, 2\]"),
    ("another version", lambda state: {**state, "schema": "gnsfx.NoiseScale/9"}, None, r"expected the schema .*/1', got .*/9'"),
    ("something else", lambda state: {"epoch": 3}, None, r"this is not the state of a NoiseScale"),
    ("no dict", lambda state: [1], None, r"this is not the state of a NoiseScale"),
    ("half of it", lambda state: {k: v for k, v in state.items() if k != "counts"}, None, r"lacks counts: was it cut off"),
    ("no shapes", lambda state: {**state, "model": None}, None, r"lacks the shapes of the model"),
    ("a name", lambda state: {**state, "parameters": ["a", *state["parameters"][1:]]}, None, r"damaged: KeyError: 'a'"),
    ("members", lambda state: {**state, "members": [[0], [99]]}, None, r"damaged: IndexError"),
    ("a damaged number", lambda state: {**state, "half_life": "x"}, None, r"half_life should be a tensor of shape \[\]"),
    ("a step", lambda state: {**state, "waiting": {**state["waiting"], "records": [(1, 2, 3)]}}, None, "its last steps: AttributeError"),
    ("a short step", lambda state: {**state, "waiting": shortened(state["waiting"])}, None, "its last steps: RuntimeError"),
    ("a damaged tensor", lambda state: {**state, "series": state["series"][:3]}, None, r"series should be a tensor of shape"),
]  # fmt: skip


def shortened(waiting):
    return {**waiting, "records": [(raw[1:], *rest) for raw, *rest in waiting["records"]]}


@pytest.mark.parametrize(("change", "other", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_state_that_does_not_fit_is_refused_and_nothing_lost(source, model, change, other, message):
    noise = NoiseScale(model)
    next(run(source, model, noise, [8]))
    there = NoiseScale(other or model)
    if other is None:
        next(run(source, model, there, [8]))
    before = repr(there)
    with pytest.raises(StateError, match=message) as caught:
        there.load_state_dict(change(noise.state_dict()))
    assert isinstance(caught.value, GnsError)
    assert repr(there) == before
