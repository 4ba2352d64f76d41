"""Where what was measured or built for this machine is kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$GNSFX_CACHE_DIR``, else ``$XDG_CACHE_HOME/gnsfx``, else ``~/.cache/gnsfx``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("GNSFX_CACHE_DIR") or Path(base) / "gnsfx")
