"""``python -m tests.cuda [pytest's arguments]``: the tests of this folder that need an H200 that is not there."""

import sys
from pathlib import Path

import tests.cuda.h200  # noqa: F401  (before anything that imports PyTorch)

if __name__ == "__main__":
    import pytest

    files = [str(Path(__file__).with_name(name)) for name in ("rewrites.py", "generated.py")]
    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *files, *sys.argv[1:]]))
