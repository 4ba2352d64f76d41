"""One row per parameter, with the right status and a reason that says what to do."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from gnsfx import collector
from gnsfx.coverage import STATUSES, Coverage, coverage
from gnsfx.errors import GnsWarning

EAGER = {"gns.inner": "eager"}


class Net(nn.Module):
    """The first layer lies before batch statistics; ``idle`` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.second = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.norm, self.idle = nn.LayerNorm(2), nn.Linear(2, 2)
        self.second.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.bn(self.first(x))))


def train(model: nn.Module, *inputs: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GnsWarning)
        model(*inputs).square().sum().backward()


def by_name(model: nn.Module) -> dict[str, tuple[str, str]]:
    return {row.name: (row.status, row.reason) for row in coverage(model)}


def test_every_status() -> None:
    model = Net()
    train(torch.compile(model, backend="gns", options=EAGER), torch.randn(5, 3))
    rows = coverage(model)
    assert [row.name for row in rows] == [name for name, _ in model.named_parameters()]
    assert {row.status for row in rows} <= set(STATUSES)
    found = by_name(model)
    assert {n for n, (s, _) in found.items() if s == "measured"} == {
        "bn.weight",
        "bn.bias",
        "second.weight",
        "norm.weight",
        "norm.bias",
    }
    assert found["second.bias"] == ("unused", "frozen: requires_grad is False")
    status, reason = found["first.weight"]
    assert status == "refused" and "aten." in reason and "self.bn(self.first(x))" in reason and "line" in reason
    assert found["idle.weight"][0] == "not compiled" and "not called" in found["idle.weight"][1]
    assert {row.name: row.path for row in rows}["second.weight"] == "outer"
    assert {row.name: row.shape for row in rows}["second.weight"] == (2, 4)


def test_table_is_aligned_and_long_reasons_are_footnotes() -> None:
    model = Net()
    train(torch.compile(model, backend="gns", options=EAGER), torch.randn(5, 3))
    rows = coverage(model)
    lines = str(rows).splitlines()
    assert lines[0].split() == ["parameter", "shape", "status", "operation", "path", "reason"]
    column = lines[0].index("status")
    for line, row in zip(lines[2:], rows, strict=False):
        assert line.startswith(row.name) and line[column:].startswith(row.status)
    assert lines[-1] == "5 measured, 1 refused, 2 not compiled, 1 unused" == repr(rows)[9:-1]
    assert any(line.startswith("[1] ") and "self.bn(self.first(x))" in line for line in lines)
    assert max(map(len, lines[: len(rows) + 2])) < 120


def test_is_a_sequence() -> None:
    rows = coverage(Net())
    assert isinstance(rows, Coverage) and len(rows) == len(list(rows)) == 9 and rows[0].name == "first.weight"
    assert str(Coverage([])).endswith("no parameters")


def test_names_are_those_of_the_model_passed() -> None:
    model = Net()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    train(compiled, torch.randn(5, 3))
    for one in (model, compiled):
        assert [row.name for row in coverage(one)] == [name for name, _ in one.named_parameters()]
        assert set(collector.sq_norms(one)) == {row.name for row in coverage(one) if row.status == "measured"}


def test_before_any_forward() -> None:
    model = Net()
    torch.compile(model, backend="gns", options=EAGER)
    status, reason = by_name(model)["norm.weight"]
    assert status == "not compiled" and 'backend="gns"' in reason


def test_in_place_sequential_compiles_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model.compile(backend="gns", options=EAGER)
    train(model, torch.randn(5, 3))
    status, reason = by_name(model)["0.weight"]
    assert status == "not compiled" and "Sequential.compile() compiled no graph" in reason


def test_in_place() -> None:
    model = Net()
    model.compile(backend="gns", options=EAGER)
    train(model, torch.randn(5, 3))
    assert by_name(model)["norm.weight"] == ("measured", "")


def test_added_after_compilation() -> None:
    model = Net()
    train(torch.compile(model, backend="gns", options=EAGER), torch.randn(5, 3))
    model.late = nn.Linear(2, 2)
    status, reason = by_name(model)["late.weight"]
    assert status == "not compiled" and "added" in reason


def test_gradient_from_eager_code_only() -> None:
    model = Net()
    train(torch.compile(model, backend="gns", options=EAGER), torch.randn(5, 3))
    model.idle(torch.randn(5, 2)).sum().backward()
    status, reason = by_name(model)["idle.weight"]
    assert status == "not compiled" and "eager" in reason


def test_gradient_from_eager_code_too() -> None:
    model = Net()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    train(compiled, torch.randn(5, 3))
    model.norm(torch.randn(5, 2)).square().sum().backward()
    assert by_name(model)["norm.weight"][0] == "refused"
    assert by_name(model)["second.weight"][0] == "measured"


@pytest.mark.parametrize("params", ["norm", lambda name, parameter: name.startswith(("norm", "bn"))])
def test_selection(params: object) -> None:
    model = Net()
    train(torch.compile(model, backend="gns", options={**EAGER, "gns.params": params}), torch.randn(5, 3))
    found = by_name(model)
    assert found["norm.weight"][0] == "measured"
    assert found["first.weight"][0] == "unused" and "gns.params=" in found["first.weight"][1]


def test_selection_that_leaves_out_whole_blocks() -> None:
    """Blocks compiled one by one share one graph: the parameters of the second come in at run time."""
    blocks = nn.ModuleList(Block() for _ in range(2))
    for block in blocks:
        block.compile(backend="gns", options={**EAGER, "gns.params": "norm"})
    x = torch.randn(5, 3)
    blocks[1](blocks[0](x)).sum().backward()
    assert [row.status for row in coverage(blocks)] == ["unused"] * 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


class Branching(nn.Module):
    """Refused in one of its two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor, coupled: bool) -> Tensor:
        y = self.linear(x)
        return self.bn(y) if coupled else y


def test_refused_in_one_of_two_graphs() -> None:
    model = Branching()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    train(compiled, torch.randn(5, 3), False)
    assert by_name(model)["linear.weight"][0] == "measured"
    train(compiled, torch.randn(5, 3), True)
    assert by_name(model)["linear.weight"][0] == "refused"
    assert by_name(model)["bn.weight"][0] == "measured"


def test_two_batch_sizes_are_one_row() -> None:
    model = Block()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    for rows in (5, 4, 7):
        train(compiled, torch.randn(rows, 3))
    assert [row.status for row in coverage(model)] == ["measured"] * 2


def test_after_a_compile_cache_hit() -> None:
    """The passes did not run in this process: the graphs are traced again."""
    model = Net()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    for rows in (5, 4):
        train(compiled, torch.randn(rows, 3))
    before = by_name(model)
    for owner in collector.compiled(model):
        owner.graph._report = owner.graph._refusals = None
    assert by_name(model) == before


def test_twice_in_one_backward_is_refused() -> None:
    model = Block()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    compiled(compiled(torch.randn(5, 3))).sum().backward()
    status, reason = by_name(model)["linear.weight"]
    assert status == "refused" and "cross term" in reason


def test_behind_a_graph_break_and_batch_norm() -> None:
    """Mutated buffers come first among the outputs of a joint graph: they must not be taken for its results."""
    model = Broken()
    train(torch.compile(model, backend="gns", options=EAGER), torch.randn(5, 3))
    assert by_name(model)["head.weight"] == ("measured", "")


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.head = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        torch._dynamo.graph_break()
        return self.head(y)
