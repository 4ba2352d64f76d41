"""One model of the table beside per-example autograd."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gnsfx import collector
from gnsfx.coverage import Row, coverage
from tests import oracle
from tests.transformers.models import Entry


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of one model.

    Attributes:
        measured: how many of the ``trained`` parameters, those that get a gradient.
        missing: coverage rows of the other trained ones.
        error: the largest relative error of the squared norms of single examples; ``bound`` is what rounding allows.
        wrong: what is beyond the bound, in norms and in gradients.
    """

    measured: int
    trained: int
    missing: list[Row]
    error: float
    bound: float
    wrong: list[str]


def compare(entry: Entry, inner: str = "eager", attention: str = "sdpa") -> Comparison:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = entry.build(attention), entry.inputs()
    dtypes = Dtypes()
    with dtypes, experts_in_any_dtype(model):
        losses = entry.losses(model(**inputs), inputs)
    bound = oracle.tolerance(max(dtypes.seen, key=lambda d: torch.finfo(d).eps))
    truth = oracle.per_example_sq_norms(model, losses, torch.ones_like(losses))
    losses.sum().backward()
    gradients = oracle.gradients(model)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Dynamo says of code that is not ours; the coverage is looked at below
        compiled = torch.compile(model, backend="gns", options={"gns.per_example": True, "gns.inner": inner})
        output = compiled(**inputs)
    loss = output.get("loss", None)
    loss = entry.losses(output, inputs).sum() if loss is None else loss
    torch.testing.assert_close(loss.detach(), losses.detach().sum(), rtol=bound, atol=0, check_dtype=False)
    loss.backward()
    rows = {r.name: r for r in coverage(model)}
    trained = {n: t for n, t in truth.items() if n in gradients}
    missing = [rows[n] for n in trained if rows[n].status != "measured"]
    norms = collector.per_example_sq_norms(model) if len(missing) < len(trained) else {}
    truth = {n: t for n, t in trained.items() if rows[n].status == "measured"}
    wrong = oracle.names_beyond(norms, truth, bound)
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in oracle.gradients(model).items():
        if not float((gradient - gradients[name]).abs().max()) <= bound * largest:
            wrong.append(f"the gradient of {name}")
    return Comparison(len(truth), len(trained), missing, relative_error(norms, truth, bound), bound, wrong)


def relative_error(norms: dict[str, Tensor], truth: dict[str, Tensor], bound: float) -> float:
    """Of the worst parameter, on the scale of :func:`tests.oracle.names_beyond`."""
    floor = bound * max((float(t.max()) for t in truth.values()), default=0.0)
    return max((float((norms[n] - t).abs().max() / (t.max() + floor)) for n, t in truth.items()), default=0.0)


class Dtypes(TorchDispatchMode):
    """The floating point dtypes that a forward pass computes in: many models have float32 written into their code."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {torch.float64}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.dim()]
        self.seen |= {x.dtype for x in leaves if x.is_floating_point()}
        return result


@contextmanager
def experts_in_any_dtype(model: nn.Module) -> Iterator[None]:
    """Outside of compiled code the grouped matrix product takes no float64; the loop over the experts does."""
    own: Any = getattr(model.config, "_experts_implementation", None)
    change: Any = model.set_experts_implementation if own == "grouped_mm" else lambda _: None
    change("eager")
    yield
    change(own)
