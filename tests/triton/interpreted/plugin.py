"""For pytest in the process that runs Triton's interpreter: memory that nothing was written to holds NaN."""

import os
from collections.abc import Iterator

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "tests/triton/test_interpreter.py starts these"


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # with it PyTorch fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)
