"""The releases of Triton that kernels are tested with, each in a folder of its own: all other tests run without Triton.

python -m tests.triton.releases          # installs what is missing; `make test` does
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PINNED = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
assert _PINNED, "constraints.txt names no release of Triton"
NEWEST, OLDEST = _PINNED[1], "3.6.0"
RELEASES = (NEWEST, OLDEST)


def folder(release: str) -> Path:
    return Path(sys.prefix) / f"triton-{release}"


def environment(release: str, **extra: str) -> dict[str, str]:
    """For a process that has a release of Triton, in front of what is installed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return {**inherited, "PYTHONPATH": str(folder(release)), "OMP_NUM_THREADS": "1", **extra}


def install(release: str) -> bool:
    """There are no wheels for some platforms: the tests that need one are skipped there, and say so."""
    half = folder(release).with_suffix(".part")
    shutil.rmtree(half, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(half),
        f"triton=={release}",
    ]
    if subprocess.run(command).returncode:
        return False
    half.replace(folder(release))
    return True


def main() -> None:
    for release in RELEASES:
        if not folder(release).exists() and not install(release):
            print(f"Triton {release} could not be installed: the tests of kernels/triton that need it are skipped")


if __name__ == "__main__":
    main()
