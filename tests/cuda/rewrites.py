"""Which ops the training graphs of GPT, Llama and ViT get for a Hopper GPU, parameters in bf16 and under autocast.

Run by ``python -m tests.cuda``, in a process that has Triton and no GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from gnsfx.config import Options
from gnsfx.inner import eager_compile
from gnsfx.kernels.triton import plan
from gnsfx.passes.norm_layers import NORM_BACKWARDS
from tests.cuda.traced import Captured, capture, rewritten

AUTOCAST: dict[str, Any] = {"dtype": torch.float32, "autocast": True}
NORM_CASES = [("gpt", {}), ("llama", {}), ("llama, nn.RMSNorm", {}), ("gpt", AUTOCAST), ("llama", AUTOCAST),
              ("vit", AUTOCAST)]  # fmt: skip
ALL_CASES = [("gpt", {}), ("gpt, short", {}), ("llama", {}), ("llama, short", {}), ("vit", {}),
             ("llama, short", AUTOCAST)]  # fmt: skip
NORMS = 5  # two layers with two, and the last
ADDED = {"gpt": NORMS - 1, "llama": NORMS - 1, "vit": NORMS - 1}
"""Norm layers beside which there is a residual connection: all but the last one."""
WIDE = {"gpt": 0, "llama": 0, "vit": 1}
"""Norm layers whose output gradient is in fp32 under autocast: zeros but for the class token."""
SUMS = {"gpt": [1] * NORMS, "llama": [1, 2, 2, 3, 3], "vit": [1] * NORMS}
"""How many output gradients norm layers add up: of the head, of gate and up, of q, k and v."""
LOOKUPS = {"gpt": 2, "llama": 1, "vit": 0}
WEIGHTS = {"gpt": 9, "llama": 15, "vit": 9}  # of two layers and the head
GRAMS = {"gpt": 9, "llama": 9, "vit": 8}
"""q, k and v have the Gram of their input in common, gate and up too; the head of ViT has one position."""


def ops(graph: Graph) -> Counter[str]:
    called = (str(n.target) for n in graph.nodes if n.op == "call_function")
    return Counter(t.removeprefix("gnsfx.").removesuffix(".default") for t in called if t.startswith("gnsfx."))


def kind(name: str) -> str:
    return name.split(",")[0]


@pytest.mark.parametrize(("name", "setting"), NORM_CASES)
def test_norm_layers(name: str, setting: dict[str, Any]) -> None:
    captured = capture(name, **setting)
    graph, report = rewritten(captured, Options(params="norm"))
    assert ops(graph) == {"norm_backward": NORMS, "collect": 1}
    assert {(r.status, r.path) for r in report.records} == {("measured", "norm")}
    assert not any(n.target in NORM_BACKWARDS for n in graph.nodes)
    layers = [n for n in graph.nodes if n.target is torch.ops.gnsfx.norm_backward.default]
    assert sum("residual" in n.kwargs for n in layers) == ADDED[kind(name)]
    assert sorted(1 + ("g2" in n.kwargs) + ("g3" in n.kwargs) for n in layers) == SUMS[kind(name)]
    wide = [n for n in layers if n.args[0].meta["val"].dtype == torch.float32]  # type: ignore[union-attr]
    assert len(wide) == (WIDE[kind(name)] if setting else 0)


@pytest.mark.parametrize(("name", "setting"), ALL_CASES)
def test_all_parameters(name: str, setting: dict[str, Any]) -> None:
    graph, report = rewritten(capture(name, **setting), Options(params="all"))
    assert {r.status for r in report.records} == {"measured"}, [r.reason for r in report.records]
    found = ops(graph)
    assert found["norm_backward"] == NORMS and found["collect"] == 1
    assert found["embedding_norm_parts"] == LOOKUPS[kind(name)]
    assert found["tied_cross"] == (kind(name) == "gpt")
    assert not any(n.target in NORM_BACKWARDS for n in graph.nodes)
    elsewhere = {"norm_backward", "collect", "embedding_norm_parts", "tied_cross", "convolution_sq_norm"}
    assert set(found) <= elsewhere | {"mm_norm_parts", "gram_norm_parts"}, "an op for CPUs"
    paths = Counter(r.path.removeprefix("tied, ") for r in report.records)
    if "short" in name or kind(name) == "vit":
        assert found["gram_norm_parts"] == GRAMS[kind(name)]
        assert paths["ghost"] == WEIGHTS[kind(name)] - (kind(name) == "vit")
    else:
        assert found["mm_norm_parts"] == paths["fused"] > 0
        assert paths["fused"] + paths["materialise"] == WEIGHTS[kind(name)]
    tiles = {"mm_norm_parts": plan.TILES, "gram_norm_parts": plan.GRAMS}
    for node in graph.nodes:
        made = tiles.get(str(node.target).removeprefix("gnsfx.").removesuffix(".default"))
        assert made is None or 0 <= node.args[2] < len(made)


def test_a_dynamic_batch_gets_no_guards() -> None:
    name = "llama, one block"
    captured = capture(name, dynamic=True)
    mode = torch._guards.detect_fake_mode(captured.inputs)
    assert mode is not None and mode.shape_env is not None
    with torch.enable_grad():
        eager_compile(captured.gm, captured.inputs, None)
    before = {str(guard.expr) for guard in mode.shape_env.guards}
    graph, _ = rewritten(captured, Options(params="all"))
    added = {str(guard.expr) for guard in mode.shape_env.guards} - before
    assert not added and ops(graph) == ops(rewritten(capture(name), Options(params="all"))[0])
    assert isinstance(
        next(n for n in graph.nodes if n.target is torch.ops.gnsfx.norm_backward.default).meta["val"][0].shape[0],
        torch.SymInt,
    )


class Split(nn.Module):
    """The table stays on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 16, device="cpu")
        self.out, self.norm = nn.Linear(16, 16, device="cuda"), nn.LayerNorm(16, device="cuda")

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.out(self.table(tokens).to("cuda"))).square().mean((1, 2))


def test_norms_of_several_devices_meet_on_one() -> None:
    kept: list[Captured] = []
    torch._dynamo.reset()
    with FakeTensorMode(shape_env=ShapeEnv()):
        model, tokens = Split(), torch.zeros(4, 8, dtype=torch.int64)
        torch.compile(model, backend=lambda gm, inputs: (kept.append(Captured(gm, inputs, False)), gm.forward)[1])(
            tokens
        )
    graph, report = rewritten(kept[0], Options(params="all"))
    assert {r.status for r in report.records} == {"measured"}, [r.reason for r in report.records]
    (collect,) = graph.find_nodes(op="call_function", target=torch.ops.gnsfx.collect.default)
    assert {n.meta["val"].device.type for n in collect.args[0]} == {"cuda"}
