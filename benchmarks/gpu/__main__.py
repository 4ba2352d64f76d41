"""``python -m benchmarks.gpu``: see :mod:`benchmarks.gpu.program`."""

import os
import signal
import sys
import tempfile

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, which ends the processes of sections
    with tempfile.TemporaryDirectory(prefix="gnsfx_gpu_", ignore_cleanup_errors=True) as folder:
        # before PyTorch looks: a home that cannot be written must not matter, and compile caches of others must not help
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "GNSFX_CACHE_DIR"):
            os.environ.setdefault(name, f"{folder}/{name.lower()}")
        from benchmarks.gpu.program import main

        sys.exit(main())
