"""The kept walk over a model finds what a new one would, whatever happened to the model in between."""

import pytest
import torch
from torch import nn

from gnsfx.parameters import trainable

CHANGES = {
    "frozen": lambda model: model[0].weight.requires_grad_(False),
    "replaced": lambda model: setattr(model[0], "bias", nn.Parameter(torch.ones(3))),
    "removed": lambda model: model[0].register_parameter("bias", None),
    "another layer": lambda model: model.append(nn.Linear(3, 3)),
    "a layer in place of another": lambda model: model.__setitem__(1, nn.Linear(3, 5)),
    "renamed": lambda model: model._modules.update(last=model._modules.pop("1")),
    "in place of the module's own": lambda model: model[0]._parameters.update(weight=nn.Parameter(torch.ones(3, 3))),
    "tied": lambda model: setattr(model[1], "weight", model[0].weight),
    "nothing": lambda model: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change(change):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before, _ = trainable(model)
    CHANGES[change](model)
    names, parameters = trainable(model)
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert names == [*expected] and all(a is b for a, b in zip(parameters, expected.values(), strict=True))
    assert (names is before) == (change == "nothing")


class Renaming(nn.Sequential):
    def named_parameters(self, *args, **kwargs):
        return ((f"other.{name}", p) for name, p in super().named_parameters(*args, **kwargs))


@pytest.mark.parametrize("own", ["class", "instance"])
def test_names_of_its_own(own):
    model = (Renaming if own == "class" else nn.Sequential)(nn.Linear(3, 3), nn.Linear(3, 3))
    if own == "instance":
        model.named_parameters = lambda: [("weight", model[0].weight)]
    for _ in range(2):
        names, parameters = trainable(model)
        assert names == [name for name, _ in model.named_parameters()]
        assert all(a is b for a, (_, b) in zip(parameters, model.named_parameters(), strict=True))


def test_parameters_may_be_swapped(monkeypatch):
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    trainable(model)
    model.double()
    names, parameters = trainable(model)
    assert names == [name for name, _ in model.named_parameters()] and parameters[0].dtype == torch.float64
