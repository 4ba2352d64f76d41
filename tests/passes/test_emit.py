"""Views: which strides allow them, against PyTorch's own answer for real tensors."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from gnsfx.passes.strides import view_strides

FACTORS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(FACTORS, st.randoms(use_true_random=False), st.integers(0, 2), st.booleans())
def test_view_strides(shape: list[int], random, ones: int, expanded: bool) -> None:
    value = torch.empty(shape).permute(random.sample(range(len(shape)), len(shape)))
    for _ in range(ones):
        value = value.unsqueeze(random.randint(0, value.dim()))
    if expanded:
        value = value.unsqueeze(0).expand(2, *value.shape)
    numbers = [p for s in value.shape for p in ((2, 2) if s == 4 else (s,))]
    random.shuffle(numbers)
    cut = sorted(random.randint(0, len(numbers)) for _ in range(2))
    to = [math.prod(part) for part in (numbers[: cut[0]], numbers[cut[0] : cut[1]], numbers[cut[1] :])]
    try:
        expected = value.view(to).stride()
    except RuntimeError:
        expected = None
    found = view_strides(value.shape, value.stride(), to)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert all(size == 1 or a == b for size, a, b in zip(to, found, expected, strict=True))
