"""Squared norms of gradients, against sums in fp64: |G|^2 is a small difference of large numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gnsfx.norms import squared_norms

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


@given(shapes=SHAPES, dtype=st.sampled_from(DTYPES))
def test_small_tensors(shapes, dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    truth = torch.stack([t.to(torch.complex128).abs().square().sum() for t in tensors])
    found = squared_norms(tensors)
    assert found.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 10_000_019])
def test_many_numbers(size, dtype):
    """All of one sign and size, where a long chain loses most. Fused norms are off by 5e-4 here."""
    tensor = torch.rand(size).to(dtype)
    (found,) = squared_norms([tensor])
    assert float(found) == pytest.approx(float(tensor.double().square().sum()), rel=3e-6)


def test_a_gradient_that_is_not_contiguous():
    tensor = torch.rand(300, 400).t()
    short = torch.rand(3)
    found = squared_norms([short, tensor, short])
    truth = [float(t.double().square().sum()) for t in (short, tensor, short)]
    assert found.tolist() == pytest.approx(truth, rel=1e-6)


def test_a_sparse_gradient():
    rows = torch.sparse_coo_tensor(torch.tensor([[1, 1, 4]]), torch.ones(3, 2), (5, 2), check_invariants=True)
    assert squared_norms([rows, torch.ones(3)]).tolist() == [10.0, 3.0]
