"""What ``torch.compile`` hands over: options, modes, plain Inductor where nothing is to be measured."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import gnsfx
from gnsfx import backend, collector
from gnsfx.config import known_options
from gnsfx.coverage import coverage
from gnsfx.errors import GnsError, OptionError
from tests import oracle, zoo

EAGER = {"gns.inner": "eager"}


def statuses(model: nn.Module) -> dict[str, str]:
    return {row.name: row.status for row in coverage(model)}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"gns.parms": "all"}, r"unknown option gns\.parms; the options are gns\.params, gns\.per_example"),
        ({"gns.params": "norms"}, r"gns\.params='norms': expected \"all\", \"norm\" or a callable"),
        ({"gns.per_example": 1}, r"gns\.per_example=1: expected True or False"),
        ({"gns.inner": "eagre"}, r"gns\.inner='eagre': expected \"inductor\" or \"eager\""),
        ({"gns.memory": -1}, r"gns\.memory=-1: expected a number of bytes"),
    ],
)
def test_an_option_that_does_not_exist(option: dict[str, object], message: str) -> None:
    compiled = torch.compile(zoo.MLP(3, 3), backend="gns", options=option)
    with pytest.raises(Exception, match=message):
        compiled(torch.randn(2, 3))


def test_keywords_are_checked_at_once() -> None:
    with pytest.raises(OptionError, match=r"gns\.inner='no': expected"):
        gnsfx.compile(zoo.MLP(3, 3), inner="no")
    assert issubclass(OptionError, GnsError)
    assert "gns.params" in known_options()


def test_the_keyword_form() -> None:
    model = zoo.MLP(3, 4, 2)
    compiled = gnsfx.compile(model, params=lambda name, p: name.endswith("weight"), inner="eager", fullgraph=True)
    compiled(torch.randn(5, 3)).square().sum().backward()
    assert set(gnsfx.sq_norms(model)) == {"layers.0.weight", "layers.1.weight"}
    assert statuses(model)["layers.0.bias"] == "unused"


@pytest.mark.parametrize("name", ["gpt_untied", "llama", "bert", "convnet"])
def test_norm_layers_only(name: str) -> None:
    model, call = zoo.ZOO[name]()
    compiled = torch.compile(model, backend="gns", options={**EAGER, "gns.params": "norm", "gns.per_example": True})
    truth = oracle.per_example_sq_norms(model, call(model))
    oracle.run(model, lambda _: call(compiled))
    kinds = (nn.LayerNorm, nn.GroupNorm, zoo.RMSNorm)
    expected = {
        f"{prefix}.{n}" for prefix, m in model.named_modules() if isinstance(m, kinds) for n, _ in m.named_parameters()
    }
    found = gnsfx.per_example_sq_norms(model)
    assert set(found) == expected
    assert oracle.names_beyond(found, {n: truth[n] for n in found}, oracle.tolerance(torch.float64)) == []


def test_strict_raises_and_names_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    compiled = torch.compile(model, backend="gns", options={**EAGER, "gns.strict": True})
    with pytest.raises(Exception, match=r"2 parameters cannot be measured exactly:\n  0\.weight: "):
        compiled(torch.randn(4, 3))


def test_without_trainable_parameters_it_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "CompiledGraph", None)  # would fail if it were reached
    model = zoo.MLP(3, 3).requires_grad_(False)
    assert torch.compile(model, backend="gns", options=EAGER)(torch.randn(2, 3)).shape == (2, 3)
    with torch.no_grad():
        assert torch.compile(zoo.MLP(3, 3), backend="gns", options=EAGER)(torch.randn(2, 3)).shape == (2, 3)


def test_frozen_and_unused_parameters() -> None:
    model = zoo.MLP(3, 3, 3)
    model.layers[0].weight.requires_grad_(False)
    model.extra = nn.Parameter(torch.zeros(2))
    torch.compile(model, backend="gns", options=EAGER)(torch.randn(4, 3)).sum().backward()
    found = statuses(model)
    assert found["layers.0.weight"] == "unused" and found["extra"] == "not compiled"
    assert found["layers.0.bias"] == found["layers.1.weight"] == "measured"


def test_an_empty_batch() -> None:
    model = zoo.MLP(3, 3)
    compiled = torch.compile(model, backend="gns", options=EAGER)
    compiled(torch.randn(0, 3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    found = collector.totals(model)
    assert found.micro_batches == (0,) and found.values is not None and not found.values.any()
    assert set(statuses(model).values()) == {"unused"}
    compiled(torch.randn(2, 3)).sum().backward()
    assert sum(b or 0 for b in collector.totals(model).micro_batches) == 2
    assert set(statuses(model).values()) == {"measured"}


def test_an_empty_batch_with_a_penalty_that_no_example_owns() -> None:
    model = zoo.MLP(3, 3)
    compiled = torch.compile(
        lambda x: model(x).sum() + model.layers[0].weight.square().sum(), backend="gns", options=EAGER
    )
    compiled(torch.randn(0, 3)).backward()
    refused = {m.name: m.refusal for m in collector.measurements(model)}
    assert "no example owns" in (refused["layers.0.weight"] or "") and refused["layers.0.bias"] is None


def test_one_example_owns_the_whole_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    model[1].eval()
    compiled(zoo.floats(1, 3)).square().sum().backward()
    for name, norm in gnsfx.sq_norms(model).items():
        torch.testing.assert_close(norm, model.get_parameter(name.removeprefix("_orig_mod.")).grad.square().sum())


def test_nan_gradients_stay_visible_and_training_goes_on() -> None:
    model = zoo.MLP(3, 3)
    compiled = torch.compile(model, backend="gns", options=EAGER)
    compiled(torch.full((2, 3), float("nan"))).sum().backward()
    assert all(norm.isnan() for norm in gnsfx.sq_norms(model).values())
    model.zero_grad()
    compiled(torch.randn(2, 3)).sum().backward()
    assert all(norm.isfinite() for norm in gnsfx.sq_norms(model).values())


def test_state_dict_and_module_are_untouched() -> None:
    model = zoo.GPT(layers=1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    compiled = torch.compile(model, backend="gns", options=EAGER)
    zoo.token_losses(compiled(zoo.ids(11, 2, 4)), zoo.ids(11, 2, 4)).mean().backward()
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)


ENTRY_POINT = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(3, 2))
compiled = torch.compile(model, backend="gns", dynamic=False, fullgraph=True, options={"epilogue_fusion": True})
compiled(torch.randn(4, 3)).sum().backward()
gnsfx = sys.modules["gnsfx"]
print(sorted(gnsfx.sq_norms(model)))
"""


@pytest.mark.slow
def test_the_entry_point_needs_no_import() -> None:
    done = subprocess.run([sys.executable, "-c", ENTRY_POINT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['0.bias', '0.weight']"


@pytest.mark.slow
def test_a_mode_and_the_users_own_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from gnsfx import _torch

    seen = []

    class Own(_torch.CustomGraphPass):
        def __call__(self, graph) -> None:
            seen.append(len(graph.nodes))

        def uuid(self):
            return None

    model, x = zoo.MLP(3, 4, 2).double(), zoo.floats(4, 3)
    with _torch.inductor_config.patch(joint_custom_pre_pass=Own()):
        compiled = gnsfx.compile(model, params="all", mode="max-autotune-no-cudagraphs")
        zoo.squares(compiled(x)).mean().backward()
    assert seen
    truth = {n: t.sum()[None] for n, t in oracle.per_example_sq_norms(model, zoo.squares(model(x))).items()}
    found = {n: s[None] for n, s in collector.sq_norms(model).items()}
    assert oracle.names_beyond(found, truth, oracle.tolerance(torch.float64)) == []
