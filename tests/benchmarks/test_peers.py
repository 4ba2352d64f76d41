"""The layer swapping and vmap of the benchmarks against per-example autograd; other tools where they are installed."""

import copy
import importlib

import pytest
import torch
from torch import nn

from benchmarks import models, peers
from benchmarks.models import Case, loss_of

LAYERS = {
    "positions": lambda: nn.Sequential(
        nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4, bias=False)
    ),
    "one position": lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4, bias=False)),
}


def case_of(kind):
    inputs, targets = torch.randn(5, 6), torch.randint(4, (5,))
    if kind == "positions":
        inputs, targets = torch.randint(7, (5, 3)), torch.randint(4, (5, 3))
    return Case(kind, LAYERS[kind](), inputs, targets, {"batch": 5})


def measured(case, prepare):
    case = Case(case.name, copy.deepcopy(case.module), case.inputs, case.targets, case.size)
    parameters = dict(case.module.named_parameters())
    norms = prepare(case)(case.inputs, case.targets)
    return norms, {name: parameter.grad for name, parameter in parameters.items()}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does, not we
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_swapping_is_right_and_leaves_the_gradient(kind, backend):
    case = case_of(kind)
    swap = importlib.import_module("benchmarks.peers.layer_swap")
    norms, gradients = measured(case, lambda case: swap.prepare(case, backend))
    assert norms.keys() == dict(case.module.named_parameters()).keys()
    assert peers.wrong_names(case, norms) == []
    loss_of(case.module(case.inputs), case.targets).backward()
    for name, parameter in case.module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_layer_swapping_does_not_see_a_tied_head():
    """What the table shows as wrong and missing is not an accident of its test."""
    case = models.build("demo", small=True)
    norms, _ = measured(case, peers.load("swap"))
    assert peers.wrong_names(case, norms) == ["tokens.weight"]
    assert {name for name, _ in case.module.named_parameters()} - norms.keys() == {"positions.weight"}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention has no batching rule
@pytest.mark.parametrize("name", models.MODELS)
def test_vmap_is_right_on_every_model(name):
    case = models.build(name, small=True)
    norms, _ = measured(case, peers.load("vmap"))
    assert peers.wrong_names(case, norms) == []
    first = next(iter(norms))
    norms[first] = norms[first] * 1.001
    assert peers.wrong_names(case, norms) == [first]


@pytest.mark.parametrize("name", ["opacus-hooks", "opacus-functorch", "opacus-ghost", "backpack"])
@pytest.mark.filterwarnings("ignore")
def test_tools_are_called_rightly(name):
    pytest.importorskip(name.partition("-")[0], reason="a tool of the extra 'peers', which the tests do not install")
    case = models.build("mlp", small=True)
    norms, _ = measured(case, peers.load(name))
    assert len(norms) == 6 and peers.wrong_names(case, norms) == []


def test_what_would_not_fit_is_told():
    case = models.build("mlp", small=True, size={"batch": 1024, "width": 1024})
    assert "GiB" in peers.too_large("vmap", case, 0.5)
    assert not peers.too_large("swap", case, 0.5) and not peers.too_large("vmap", case, 100)
