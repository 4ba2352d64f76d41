"""What Inductor generates for plain and rewritten graphs: bytes and launches, in forward and backward together.

Run by ``python -m tests.cuda``. Bytes are in units of one residual stream, B * T * D numbers of 16 bits: a pass over it reads
or writes one. The least that kernels can move is counted, for plain graphs and for ours.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from gnsfx.config import Options
from gnsfx.passes import pipeline
from tests.cuda.codegen import Generated, generate
from tests.cuda.models import CASES
from tests.cuda.traced import capture

MORE = {("gpt", "norm"): -0.9, ("llama", "norm"): -6.1, ("vit", "norm"): 1.7, ("gpt", "all"): -10.2}
"""What our graphs move beyond plain ones. Where it is more, our op needs in memory what Inductor's kernel has in registers:

    llama   nothing: six passes are won in the first layer, whose inputs Inductor reads twice
    vit     the gradient behind the class token is written with zeros for all other positions, in whatever number of layers
"""
CALLS = {("gpt", "norm"): -7, ("llama", "norm"): 9, ("vit", "norm"): -6, ("gpt", "all"): 17}
"""The same of launches. For RMSNorm, without a shift, Inductor has a kernel, a sum and a cast; we have two kernels, of which the
second one adds slots. With all parameters there are kernels for squares that read nothing large, two for a bias or a product."""
READS = ("gnsfx.embedding_norm_parts", "gnsfx.gram_norm_parts", "gnsfx.tied_cross")
"""Ops beside gradients that stay: they read what was read before. What tied_cross gathers counts as all of the logits."""
INSIDE = {"gnsfx.norm_backward.default": 1, "gnsfx.collect.default": 4}
"""Launches of our ops beyond the first."""


@functools.cache
def generated(name: str, params: str | None) -> tuple[Generated, ...]:
    return generate(capture(name), None if params is None else Options(params=params))


def moved(graphs: tuple[Generated, ...], *names: str) -> int:
    return sum(graph.bytes(*names) for graph in graphs)


def launches(graphs: tuple[Generated, ...]) -> int:
    calls = sum((graph.calls() for graph in graphs), Counter[str]())
    return sum(count * (1 + INSIDE.get(name, 0)) for name, count in calls.items())


def unit(name: str) -> int:
    return 2 * CASES[name].activation


@pytest.mark.parametrize(("name", "params"), MORE)
def test_no_pass_is_added(name: str, params: str) -> None:
    plain, ours = generated(name, None), generated(name, params)
    products = [one for graph in ours for one in graph.launches if one.name == "aten.bmm.dtype_out"]
    # products of single examples are written, read to be squared, and read to be added
    own = moved(ours, *READS) + 3 * sum(sum(one.written.values()) for one in products)
    assert (moved(ours) - moved(plain) - own) / unit(name) < MORE[name, params] + 0.1
    assert launches(ours) - launches(plain) <= CALLS[name, params]


def test_a_layer_reads_and_writes_once() -> None:
    """g, x and the residual connection are read, dx is written: four passes, and three for the last layer. Llama has up to three g."""
    for name, expected in (("gpt", [3, 4, 4, 4, 4]), ("llama", [3, 5, 5, 6, 6])):
        _, backward = generated(name, "norm")
        layers = [one for one in backward.launches if one.name == "gnsfx.norm_backward"]
        passes = sorted(sum((*one.read.values(), *one.written.values())) / unit(name) for one in layers)
        assert all(0 <= found - each < 0.01 for found, each in zip(passes, expected, strict=True))


LOST = {"add_residuals": ("gpt", 6), "add_gradients": ("llama", 8)}
"""dx is written and read once more beside three layers (beside the first the embeddings add it), sums of gradients beside four."""


@pytest.mark.parametrize("name", LOST)
def test_a_pass_more_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = LOST[name]
    monkeypatch.setattr(pipeline, name, lambda graph, emit: None)
    apart = generate(capture(model), Options(params="norm"))
    lost = (moved(apart) - moved(generated(model, "norm"))) / unit(model)
    assert lost > expected - 0.1
