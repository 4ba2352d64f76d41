"""The work of the backend grows with the graph and no faster, counted and not timed: executed lines of our code.

work(n) for a model of n blocks is a + b n, so that work(4 n) - work(2 n) = 2 (work(2 n) - work(n)).
"""

from __future__ import annotations

import pathlib
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gnsfx
from gnsfx import backend, compiled_graph, inner
from tests.zoo import GPT, ids, squares

OURS = tuple(str((pathlib.Path(gnsfx.__file__).parent / room).resolve()) for room in (".", "passes", "kernels"))
COUNTED = ((backend, "read_capture"), (compiled_graph, "add_leaves"), (inner, "rewrite"))


def counting(function: Callable[..., Any], work: Counter[str]) -> Callable[..., Any]:
    """``function``, which adds the lines that Python executes for it in our files to ``work``."""

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        work[pathlib.Path(frame.f_code.co_filename).name] += event == "line"
        return trace

    def call(*args: Any, **kwargs: Any) -> Any:
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return function(*args, **kwargs)
        finally:
            sys.settrace(before)

    return call


def work_of(layers: int, monkeypatch: pytest.MonkeyPatch, params: str) -> Counter[str]:
    work: Counter[str] = Counter()
    torch._dynamo.reset()
    with monkeypatch.context() as patched:
        for module, name in COUNTED:
            patched.setattr(module, name, counting(getattr(module, name), work))
        options = {"gns.inner": "eager", "gns.params": params}
        compiled = torch.compile(GPT(V=7, T=4, D=6, H=2, layers=layers), backend="gns", options=options)
        squares(compiled(ids(7, 3, 4))).mean().backward()
    return work


@pytest.mark.parametrize("params", ["all", "norm"])
def test_the_work_is_linear_in_the_graph(params: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work_of(1, monkeypatch, params)  # what is done once in a process is done
    one, two, four = (work_of(layers, monkeypatch, params) for layers in (1, 2, 4))
    grown = {file: (four[file] - two[file]) / (2 * (two[file] - one[file])) for file in one if two[file] != one[file]}
    assert grown and {file: ratio for file, ratio in grown.items() if abs(ratio - 1) > 0.02} == {}
