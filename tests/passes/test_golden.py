"""The rewritten graphs of five small models, as text. ``EXPECTTEST_ACCEPT=1`` writes them anew.

One line a node: op, dtype and shape, state where the node was there before. Names of nodes are left out: they differ
between versions of PyTorch. The text is of torch 2.13; other versions decompose differently.
"""

from __future__ import annotations

import os
import pathlib
import re

import pytest
import torch
from torch import nn

from gnsfx import collector
from gnsfx.captured_graph import trace
from tests.passes.models import Model
from tests.zoo import GPT, floats, ids, squares

GOLDEN = pathlib.Path(__file__).parent / "golden"
pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith("2.13"), reason="the golden graphs are those of torch 2.13"
)

MODELS = {
    "mlp": lambda: (Model(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(4, 5), b=nn.Linear(5, 2)), floats(3, 4)),
    "gpt": lambda: (GPT(V=7, T=4, D=6, H=2, layers=1), ids(7, 3, 4)),
    "conv": lambda: (
        Model(lambda m, x: m.b(m.a(x).relu().flatten(1)), a=nn.Conv2d(2, 3, 3), b=nn.Linear(12, 2)),
        floats(3, 2, 4, 4),
    ),
    "norm": lambda: (
        Model(lambda m, i: m.a(m.e(i)), e=nn.Embedding(7, 4, padding_idx=0), a=nn.LayerNorm(4)),
        ids(7, 3, 2),
    ),
    "reused": lambda: (Model(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(4, 4)), floats(3, 2, 4)),
}


def text(name: str) -> str:
    torch._dynamo.reset()
    model, x = MODELS[name]()
    model = model.double()
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager"})
    squares(compiled(x)).mean().backward()
    (found,) = collector.compiled(model)
    return condense(trace(found.graph, keep_text=True).after)


def condense(graph: str) -> str:
    """``view = aten.view.default(primals_1, [6, 4]): float64[6, 4]  # batched(0)`` -> ``aten.view  float64[6, 4]  batched(0)``."""
    lines = []
    for line in graph.splitlines():
        found = re.fullmatch(r"\w+ = ([\w.]+|<[^>]*>)\(.*\): (.*?)  # (.*)", line)
        if found:
            op, shape, state = found.groups()
            if op.startswith("<"):  # getitem
                continue
            lines.append("  ".join(part for part in (op.removesuffix(".default"), shape, state) if part))
        elif not line.startswith("return"):
            lines.append(re.sub(r"^\w+: (.*?)  # ", r"input  \1  ", line).rstrip())
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", MODELS)
def test_golden(name: str) -> None:
    found, path = text(name), GOLDEN / f"{name}.expected"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(found)
    assert path.exists() and found == path.read_text(), (
        "the rewritten graph changed; look at the diff of EXPECTTEST_ACCEPT=1"
    )


def test_the_text_does_not_depend_on_the_run() -> None:
    assert text("reused") == text("reused")
