"""The table and the graphs, and that looking at a model changes nothing about it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnsfx import collector
from gnsfx.errors import GnsError
from gnsfx.explain import explain
from gnsfx.explanation import Explained, Explanation
from gnsfx.kernels.cost import matmul_paths
from gnsfx.passes.record import Record

EAGER = {"gns.inner": "eager"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.second = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.second(F.dropout(self.bn(self.first(x)), 0.5))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.norm = nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.hidden(self.embedding(tokens))))


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        torch._dynamo.graph_break()
        return self.b(y)


def parameters_of(explanation: Explanation) -> dict[str, str]:
    return {p.name: p.record.status for g in explanation.graphs for p in g.parameters}


def test_table_has_every_candidate_with_its_cost() -> None:
    found = explain(Sequence(), torch.randint(7, (5, 6)))
    (graph,) = found.graphs
    (hidden,) = (p for p in graph.parameters if p.name == "hidden.weight")
    assert set(hidden.record.costs) == {"plain", "materialise", "fused", "ghost"}
    assert hidden.taken == hidden.record.path != "plain"
    assert hidden.relative("plain") == 1.0 < hidden.relative(hidden.taken)
    assert hidden.relative(hidden.taken) == min(hidden.relative(p) for p in hidden.record.costs if p != "plain")
    lines = found.table.splitlines()
    header = "parameter shape rank operation path FLOPs bytes memory time of plain bound by why"
    assert " ".join(lines[0].split()) == header
    at = next(i for i, line in enumerate(lines) if line.startswith("hidden.weight"))
    block = lines[at : at + 4]
    assert re.search(r"hidden\.weight\s+4x4\s+2\s+mm\s+plain\s+960\s+1 KiB\s+0\s+[\d.]+ us\s+1\.00x\s+calls", block[0])
    assert sum(f"* {hidden.taken}" in line for line in block) == 1
    for path in ("materialise", "fused", "ghost"):
        assert any(
            re.search(
                rf"{path}\s+[\d.]+( k)?\s+[\d.]+ [KM]?i?B\s+(0|[\d.]+ [KM]?i?B)\s+[\d.]+ us\s+[\d.]+x\s+\w+", line
            )
            for line in block
        )


def test_why_a_path_won_in_one_clause() -> None:
    costs = matmul_paths(8, 1, 64, 1024, 1024, 4, native=True)

    def why(path: str, forced: str = "auto", reason: str = "", names: tuple[str, ...] = tuple(costs)) -> str:
        record = Record(0, (256, 512), path=path, reason=reason, costs={n: costs[n] for n in names})
        notes: dict[str, str] = {}
        lines = Explained("w", record, torch.float32, "cpu", forced).lines(notes)
        cell = next(cells for cells in lines if cells[4][0] == "*")[-1]
        return next((text for text, mark in notes.items() if mark == cell), cell)

    assert re.fullmatch(r"least time; materialise takes 1\.\d\dx", why("fused"))
    assert why("ghost", "ghost") == "gns.path='ghost'"
    assert why("materialise").startswith("least time under the memory cap; fused would need more")
    assert why("fused", names=("plain", "fused")) == "the only path"
    assert why("fused", names=("plain", "fused"), reason="needs 9 MiB").endswith("the only path; needs 9 MiB")


def test_graphs_before_and_after() -> None:
    found = explain(Sequence(), torch.randint(7, (5, 6)))
    assert "gnsfx.probe_backward" in found.before and "gnsfx.collect" not in found.before
    assert "gnsfx.collect" in found.after and "gnsfx.probe" not in found.after
    assert "batched(0)" in found.before
    assert found.diff.startswith("--- before\n+++ after\n@@")
    counts = found.graphs[0].op_counts
    assert counts["gnsfx.collect.default"] == 1 and counts["gnsfx.probe.default"] == -1
    assert "5 examples along dimension 0 of L['tokens']" in str(found) and "+1 gnsfx.collect.default" in str(found)


def test_leaves_no_trace() -> None:
    model = Net()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    found = explain(compiled, torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
    assert parameters_of(found)["_orig_mod.first.weight"] == "refused"
    assert parameters_of(found)["_orig_mod.second.weight"] == "measured"
    assert torch.equal(state, torch.get_rng_state())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.steps == 0 and model.training
    assert all(p.grad is None for p in model.parameters())
    assert not collector.compiled(model)


def test_compiled_graphs_stay_and_do_not_become_dynamic() -> None:
    """More looks than Dynamo's recompile limit: the model still trains compiled, with static sizes, and compiles once."""
    model, compiles = Broken(), []

    def counting(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compiles.append([x for x in inputs if not isinstance(x, Tensor)])
        return gm.forward

    compiled = torch.compile(model, backend=counting)
    for rows in range(2, 12):
        explain(compiled, torch.randn(rows, 3))
    assert compiles == []
    compiled(torch.randn(5, 3))
    explain(compiled, torch.randn(6, 3))
    compiled(torch.randn(5, 3))
    assert compiles == [[], []]


def test_reading_does_not_disturb_a_step() -> None:
    model = Sequence()
    compiled = torch.compile(model, backend="gns", options=EAGER)
    tokens = torch.randint(7, (5, 6))
    output = compiled(tokens)
    explain(compiled, tokens)
    output.square().sum().backward()
    first = collector.sq_norms(model)
    explain(compiled)
    explain(compiled, tokens)
    assert all(torch.equal(value, first[name]) for name, value in collector.sq_norms(model).items())


@pytest.mark.parametrize("how", ["plain", "wrapped", "in place"])
def test_every_way_to_compile(how: str) -> None:
    model: nn.Module = Sequence()
    if how == "wrapped":
        model = torch.compile(model, backend="gns", options=EAGER)
    elif how == "in place":
        model.compile(backend="gns", options=EAGER)
    found = explain(model, torch.randint(7, (5, 6)))
    assert list(parameters_of(found)) and set(parameters_of(found)) == {n for n, _ in model.named_parameters()}


def test_only_the_compiled_submodules_are_explained() -> None:
    model = nn.Sequential(Broken(), nn.Linear(2, 2))
    model[0].compile(backend="gns", options=EAGER)
    found = explain(model, torch.randn(5, 3))
    assert list(parameters_of(found)) == ["0.a.weight", "0.a.bias", "0.b.weight", "0.b.bias"]
    assert [row.name for row in found.others] == ["1.weight", "1.bias"]


def test_options_of_the_compiled_model_are_used() -> None:
    compiled = torch.compile(Sequence(), backend="gns", options={**EAGER, "gns.path": "ghost", "gns.params": "all"})
    found = explain(compiled, torch.randint(7, (5, 6)))
    (hidden,) = (p for g in found.graphs for p in g.parameters if p.name.endswith("hidden.weight"))
    assert hidden.taken == "ghost"
    assert "gns.path='ghost'" in next(cells[-1] for cells in hidden.lines({}) if cells[4] == "* ghost")


def test_selection() -> None:
    compiled = torch.compile(Sequence(), backend="gns", options={**EAGER, "gns.params": "norm"})
    found = explain(compiled, torch.randint(7, (5, 6)))
    assert list(parameters_of(found)) == ["_orig_mod.norm.weight", "_orig_mod.norm.bias"]
    assert "_orig_mod.hidden.weight" in found.table and "not selected by gns.params" in found.table


def test_without_inputs() -> None:
    model = Broken()
    with pytest.raises(GnsError, match=r"nothing to explain: .*gnsfx\.explain\(model, \*args\)"):
        explain(model)
    torch.compile(model, backend="gns", options=EAGER)(torch.randn(5, 3)).sum().backward()
    found = explain(model)
    assert len(found.graphs) == 2 and set(parameters_of(found).values()) == {"measured"}
    assert "# graph 1 of 2" in found.before and "# graph 2 of 2" in found.diff


def test_refused_parameters_appear_with_reason() -> None:
    table = explain(Net(), torch.randn(5, 3)).table
    assert re.search(r"first\.weight\s+4x3\s+2\s+\S+\s+refused", table)
    assert "refused: " in table and "self.bn(self.first(x))" in table


def test_html_is_one_self_contained_page(tmp_path: Path) -> None:
    found = explain(Net(), torch.randn(5, 3))
    page = found.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not re.search(r"(?i)https?://|<script|<link|src=|url\(", page)
    assert (
        "second.weight" in page
        and "class='add'" in page
        and "class='del'" in page
        and "<summary>Before</summary>" in page
    )
    assert "<tr class='refused'>" in page and "self.bn(self.first(x))" in page
    assert page.count("<table>") == page.count("</table>") == 1


def test_unwritable_path(tmp_path: Path) -> None:
    found = explain(Broken(), torch.randn(5, 3))
    with pytest.raises(
        GnsError, match=r"cannot write the explanation to .*missing.*No such file.*existing, writable folder"
    ):
        found.to_html(tmp_path / "missing" / "page.html")
    with pytest.raises(GnsError, match="cannot write the explanation"):
        found.to_html(tmp_path)


def test_convolution_and_reduction_have_costs() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    (graph,) = explain(Convolution(), torch.randn(4, 2, 6, 5)).graphs
    costs = {p.name: p.record.costs for p in graph.parameters}
    assert costs["conv.weight"]["plain"].flops == 2 * 4 * (4 * 3) * (3 * 2 * 3 * 3)
    assert costs["conv.bias"]["reduction"].bytes > 0 and costs["conv.weight"]["convolution"].calls > 0
