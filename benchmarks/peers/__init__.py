"""Other ways to per-example gradient norms, each with the same face.

(case) --prepare--> measure;  (inputs, targets) --measure--> {name: |c_b|^2 [B]}, and p.grad as training leaves it

c_b is what example b adds to p.grad under a mean loss, the gradient of its own loss over B. A parameter that a tool does
not see has no entry. Nothing here is imported before it is asked for: the tools are an optional extra.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.models import Case, losses_of
from tests import oracle

Measure = Callable[[Tensor, Tensor], dict[str, Tensor]]
Prepare = Callable[[Case], Measure]

# name -> file and function, and whether it holds the contributions of all parameters at once: B x P numbers
PEERS = {
    "opacus-hooks": ("opacus_hooks.prepare_hooks", True),
    "opacus-functorch": ("opacus_hooks.prepare_functorch", True),
    "opacus-ghost": ("opacus_ghost.prepare", False),
    "backpack": ("backpack_l2.prepare", False),
    "vmap": ("vmap_grad.prepare", True),
    "vmap-compiled": ("vmap_grad.prepare_compiled", True),
    "swap": ("layer_swap.prepare", False),
    "swap-compiled": ("layer_swap.prepare_compiled", False),
}
NAMES = tuple(PEERS)


def load(name: str) -> Prepare:
    """Raises ``ImportError`` where the tool is not installed."""
    file, _, function = PEERS[name][0].partition(".")
    return getattr(importlib.import_module(f"{__name__}.{file}"), function)


def too_large(name: str, case: Case, gibibytes: float) -> str:
    """Why a peer is not run, if it would hold more than that."""
    needed = case.size["batch"] * case.parameters * 4 / 2**30
    return f"not run: holds {needed:.1f} GiB of contributions" if PEERS[name][1] and needed > gibibytes else ""


def wrong_names(case: Case, found: dict[str, Tensor]) -> list[str]:
    """Parameters whose norms in ``found`` are not those of per-example autograd in float64.

    ``found`` has [B] for each, or [1] for the sum over the examples.
    """
    exact = copy.deepcopy(case.module).double()
    inputs = case.inputs.double() if case.inputs.is_floating_point() else case.inputs
    truth = oracle.per_example_sq_norms(exact, losses_of(exact(inputs), case.targets))
    shared = {
        name: norms if len(found[name]) > 1 else norms.sum()[None] for name, norms in truth.items() if name in found
    }
    bent = [name for name in shared if found[name].shape != shared[name].shape]
    alike = {name: norms for name, norms in shared.items() if name not in bent}
    off = oracle.names_beyond(found, alike, oracle.tolerance(torch.float32))
    return bent + [line.partition(":")[0] for line in off]
