"""The rewrite for CUDA devices and what Inductor makes of it, shown without one, in a process of its own with Triton."""

import shutil
import subprocess
import sys

import pytest
import torch

from tests.triton.releases import NEWEST, ROOT, environment, folder

REASONS = {
    f"Triton {NEWEST} is not there: `make test` installs it where there is a wheel for it": not folder(NEWEST).exists(),
    "this PyTorch has CUDA itself": torch.version.cuda is not None,
    "the numbers are those of torch 2.13": not torch.__version__.startswith("2.13"),
    "there is no C++ compiler": shutil.which("c++") is None,
}


@pytest.mark.slow
def test_on_fake_cuda_tensors() -> None:
    for reason, holds in REASONS.items():
        if holds:
            pytest.skip(reason)
    command = [sys.executable, "-m", "tests.cuda"]
    inside = {name: value for name, value in environment(NEWEST).items() if not name.startswith("PYTEST_")}
    found = subprocess.run(command, cwd=ROOT, env=inside, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " passed" in found.stdout and " skipped" not in found.stdout
