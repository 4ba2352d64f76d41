"""What else changes with the batch size: learning rate and beta2 of the optimizer.

    B -> B'        lr    -> lr * (B'/B)^(1/2)   "sqrt", for Adam and its kin     (Malladi et al., arXiv 2205.10287)
                         -> lr * (B'/B)         "linear", for SGD                (Goyal et al., arXiv 1706.02677)
                   beta2 -> beta2^(B'/B)        the same half-life in examples   (Marek et al., arXiv 2507.07101)

Weight decay stays. PyTorch multiplies it by the learning rate, so decoupled decay per step follows the learning rate.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from gnsfx.errors import GnsWarning, OptionError

LearningRate = Literal["sqrt", "linear"] | None

# Where optimizers and LR schedulers keep learning rates: OneCycleLR writes max_lr and min_lr into the groups.
_GROUP_KEYS = ("lr", "initial_lr", "max_lr", "min_lr")
_SCHEDULER_KEYS = ("base_lrs", "max_lrs")


def check_rule(rule: Any) -> LearningRate:
    """Raises OptionError unless ``rule`` is "sqrt", "linear" or None."""
    if rule not in ("sqrt", "linear", None):
        raise OptionError(f"lr={rule!r}: expected 'sqrt', 'linear' or None (the learning rate stays).")
    return rule


def lr_factor(rule: LearningRate, before: int, after: int) -> float:
    """Factor on the learning rate when the batch changes, 1 for None."""
    ratio = after / before
    return {"sqrt": ratio**0.5, "linear": ratio, None: 1.0}[rule]


def scale_optimizer(optimizer: torch.optim.Optimizer, factor: float, power: float, scheduler: Any = None) -> None:
    """Multiply every learning rate by ``factor`` and raise every beta2 (RMSprop: alpha) to ``power``.

    scheduler: the LR scheduler, if there is one. Schedulers that compute the rate anew at each step (LambdaLR, all of
        transformers) do it from base rates of their own, which are scaled too. A floor like ``eta_min`` stays.
    """
    for group in optimizer.param_groups:
        for key in _GROUP_KEYS:
            if group.get(key) is not None:
                group[key] = _scaled(group[key], factor)
        if "betas" in group and power != 1:
            first, second, *rest = group["betas"]
            group["betas"] = (first, second**power, *rest)
        elif isinstance(optimizer, torch.optim.RMSprop):
            group["alpha"] = group["alpha"] ** power
    for each in _flat(scheduler):
        for key in _SCHEDULER_KEYS:
            if hasattr(each, key):
                setattr(each, key, [_scaled(rate, factor) for rate in getattr(each, key)])
    if scheduler is None and factor != 1 and any("initial_lr" in group for group in optimizer.param_groups):
        warnings.warn(
            "the optimizer has an LR scheduler, which may set the learning rate back at its next step: pass it too, "
            "change.apply(optimizer, scheduler).",
            GnsWarning,
            stacklevel=3,
        )


def _scaled(rate: float | Tensor, factor: float) -> float | Tensor:
    # In place: graphs and fused optimizers hold on to a learning rate that is a tensor.
    return rate.mul_(factor) if isinstance(rate, Tensor) else rate * factor


def _flat(scheduler: Any) -> Iterator[Any]:
    """The scheduler and those within (SequentialLR, ChainedScheduler); a wrapper like accelerate's is opened."""
    if scheduler is None:
        return
    if not isinstance(scheduler, LRScheduler) and hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    if not isinstance(scheduler, LRScheduler):
        raise OptionError(f"scheduler={scheduler!r}: expected an LR scheduler of PyTorch.")
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _flat(inner)
