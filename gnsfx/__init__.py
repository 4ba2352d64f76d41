"""Exact per-example gradient norms and the gradient noise scale, from ``torch.compile(model, backend="gns")``."""

from gnsfx.backend import compile, measuring
from gnsfx.batch_size.controller import BatchSizeController
from gnsfx.batch_size.run_log import RunLog, read_log
from gnsfx.batch_size.schedule import BatchSizeSchedule
from gnsfx.collector import elementwise_sq_sums, per_example_sq_norms, sq_norms
from gnsfx.coverage import coverage
from gnsfx.errors import GnsError
from gnsfx.explain import explain
from gnsfx.marks import mark_batch
from gnsfx.noise.independence import IndependenceCheck
from gnsfx.noise.noise_scale import NoiseScale
from gnsfx.noise.rank_difference import RankDifference
from gnsfx.passes.rules import register_rule
from gnsfx.verify import verify

__version__ = "0.1.0"

__all__ = [
    "BatchSizeController",
    "BatchSizeSchedule",
    "GnsError",
    "IndependenceCheck",
    "NoiseScale",
    "RankDifference",
    "RunLog",
    "__version__",
    "compile",
    "coverage",
    "elementwise_sq_sums",
    "explain",
    "mark_batch",
    "measuring",
    "per_example_sq_norms",
    "read_log",
    "register_rule",
    "sq_norms",
    "verify",
]
