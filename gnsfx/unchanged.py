"""A forward pass that leaves no trace on the model.

parameters, buffers, attributes of modules, random numbers     kept -> forward pass -> put back where they changed
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass does to parameters, buffers, attributes of modules and random numbers.

    What did not change is not written to: a backward pass that is still to come may have saved it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    values = [(t, t.detach().clone()) for t in tensors]
    modules = [
        (m, dict(vars(m)), {k: dict(vars(m)[k]) for k in ("_parameters", "_buffers", "_modules")})
        for m in model.modules()
    ]
    devices = sorted({t.device.index for t in tensors if t.is_cuda})
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        for module, attributes, registered in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for key, entries in registered.items():
                vars(module)[key].clear()
                vars(module)[key].update(entries)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # batch_norm writes without counting a version
                    tensor.copy_(value)
