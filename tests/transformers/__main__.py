"""Write the pass table of ``docs/models.md``: all models, or those named; others keep their row.

python -m tests.transformers "GPT-2" Llama
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tests.transformers.compare import Comparison, compare
from tests.transformers.models import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Whole models

Models of `transformers`, built from tiny configurations with random weights (`tests/transformers/models.py`), in train mode
without dropout, with their own loss where they compute one. For every parameter that gets a gradient, the squared norms of
single examples are compared with per-example autograd of the same model in eager mode, in fp64. Where the code of a model
casts to float32, the tolerance is that of float32; the error is relative to the largest norm of the parameter.

`python -m tests.transformers` writes this table, `make test-models` checks it (with `gns.inner="eager"`).
"""
NOTES = """## What to know

- Contrastive losses compare each example with all others: no contribution of single examples exists, and all is refused.
- BatchNorm in train mode: what lies before the last one is refused.
- Mixtures of experts are exact with `experts_implementation="grouped_mm"` (the default) and `"batched_mm"`. With `"eager"` Dynamo
  leaves the loop over the experts to Python, and every parameter is refused or not compiled.
- The first call of a model that logs a warning breaks its graph there, and a tied table may then be refused ("two compiled graphs").
  With `gradient_checkpointing_enable()` set `model.config.use_cache = False` as well: the warning about it is one of these.
- With blocks compiled one by one, embeddings, the last normalisation and the head are "not compiled", and a table of
  relative positions that one block computes for all others (T5) is refused: compile the whole model to measure these.
"""
COLUMNS = "| model | measured | refused | error, eager | error, Inductor |\n| --- | --- | --- | --- | --- |"


def shown(found: Comparison) -> str:
    return f"{found.error:.0e}" if not found.wrong else f"WRONG: {found.wrong[0]}"


def row(name: str) -> str:
    eager = compare(MODELS[name])
    inductor = compare(MODELS[name], inner="inductor")
    if len(inductor.missing) != len(eager.missing):
        raise AssertionError(f"{name}: {len(inductor.missing)} are missing with Inductor, {len(eager.missing)} without")
    reasons = Counter(re.sub(r" \(at .*", "", r.reason, flags=re.DOTALL) for r in eager.missing)
    refused = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
    errors = [shown(f) if f.measured else "" for f in (eager, inductor)]
    return f"| {name} | {eager.measured} of {eager.trained} | {refused} | {errors[0]} | {errors[1]} |"


def main(names: list[str]) -> None:
    text = PAGE.read_text() if PAGE.exists() else ""
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    for name in names or MODELS:
        rows[name] = row(name)
        print(rows[name], flush=True)
        table = "\n".join(rows[n] for n in MODELS if n in rows)
        versions = f"torch {version('torch').split('+')[0]}, transformers {version('transformers')}."
        PAGE.write_text(f"{HEAD}\n{versions}\n\n{COLUMNS}\n{table}\n\n{NOTES}")


if __name__ == "__main__":
    main(sys.argv[1:])
