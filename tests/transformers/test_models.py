"""Whole models of ``transformers``: every parameter that gets a gradient is measured, exactly, or refused for a known reason."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("transformers", reason="an optional extra: make test-models")

from tests.transformers.compare import compare
from tests.transformers.models import MODELS

EAGER_ATTENTION = ["Llama", "Gemma 2", "BERT", "Swin", "Whisper"]


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    found = compare(MODELS[name])
    assert found.wrong == []
    assert [r.name for r in found.missing if not re.search(MODELS[name].refused, f"{r.name}: {r.reason}")] == []


@pytest.mark.parametrize("name", EAGER_ATTENTION)
def test_eager_attention(name: str) -> None:
    found = compare(MODELS[name], attention="eager")
    assert (found.wrong, found.missing) == ([], [])
