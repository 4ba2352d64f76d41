"""Every Triton kernel, run by Triton's interpreter, against fp64; and the whole step through the kernels.

In processes of their own, with TRITON_INTERPRET=1 from the start. The interpreter has no bf16 arithmetic: kernels upcast what
they load, and the multiplies have a switch for it. It also truncates what it stores as bf16.
"""

import subprocess
import sys

import pytest

from tests.triton.releases import NEWEST, ROOT, environment, folder

FOLDER = "tests/triton/interpreted"


@pytest.mark.slow
@pytest.mark.parametrize("files", ["rows", "products lookups mistakes", "step"])
def test_interpreted(files: str) -> None:
    if not folder(NEWEST).exists():
        pytest.skip(
            f"{folder(NEWEST)} is not there: `make test` installs Triton {NEWEST} where there is a wheel for it"
        )
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", f"{FOLDER.replace('/', '.')}.plugin"]
    command = [sys.executable, "-m", "pytest", *options, *(f"{FOLDER}/{name}.py" for name in files.split())]
    inside = environment(NEWEST, TRITON_INTERPRET="1")
    inside = {name: value for name, value in inside.items() if not name.startswith("PYTEST_")}
    found = subprocess.run(command, cwd=ROOT, env=inside, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-10000:] + found.stderr[-10000:]
    assert " passed" in found.stdout
