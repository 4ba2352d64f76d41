"""Every kernel becomes a Hopper cubin without a fault, with the newest and the oldest Triton; planted bad ones do not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton.releases import RELEASES, ROOT, environment, folder


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_the_gate(release: str, tmp_path: Path) -> None:
    if not folder(release).exists():
        pytest.skip(
            f"{folder(release)} is not there: `make test` installs Triton {release} where there is a wheel for it"
        )
    command = [sys.executable, "-m", "tests.triton.gate"]
    found = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(release, TRITON_CACHE_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, (
        "\n".join(line for line in found.stdout.splitlines() if "FAULT" in line) + found.stderr
    )
    assert found.stdout.startswith(f"Triton {release}, sm_90") and " 0 faults" in found.stdout
