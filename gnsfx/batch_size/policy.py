"""What all batch size policies have in common: the batch size of now, and ``step()``, which may change it.

for _ in range(policy.accumulation): ...backward()      # micro-batches of each rank
noise.step(); optimizer.step(); optimizer.zero_grad()
if change := policy.step(tokens=...):                    # once per optimizer step, on every rank
    change.apply(optimizer)
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gnsfx.batch_size.coupling import LearningRate, check_rule, lr_factor, scale_optimizer
from gnsfx.batch_size.unit import BatchUnit
from gnsfx.errors import OptionError, StateError

_SCHEMA = "gnsfx.batch_size.policy/1"


@dataclass(frozen=True, slots=True)
class Change:
    """The batch size changes from the next step on.

    step, examples, tokens: how much was trained before; tokens None where they were not given.
    before, after: batch sizes in examples, over all ranks. accumulation: micro-batches of each rank from now on.
    lr_factor: factor on the learning rate. beta2_power: exponent on beta2.
    reason: why, with numbers and units.
    """

    step: int
    examples: int
    tokens: int | None
    before: int
    after: int
    accumulation: int
    lr_factor: float
    beta2_power: float
    reason: str

    def apply(self, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> None:
        """Change learning rate and beta2 in the optimizer, and the base rates in its LR scheduler, if it has one.

        Saved with the optimizer's and the scheduler's state: not to be applied again after loading these.

        Raises:
            OptionError: ``scheduler`` is no LR scheduler of PyTorch.
        """
        scale_optimizer(optimizer, self.lr_factor, self.beta2_power, scheduler)

    def __str__(self) -> str:
        return (
            f"step {self.step}: batch {self.before} -> {self.after} examples, lr x {self.lr_factor:.3g}. {self.reason}"
        )


class Stage(NamedTuple):
    """A batch size, in examples, and from where on it holds; None where that is not known in this unit."""

    batch_size: int
    step: int | None = None
    examples: int | None = None
    tokens: int | None = None


class Decision(NamedTuple):
    """A batch size in examples, and why."""

    batch_size: int
    why: str


class BatchPolicy(ABC):
    """Base of :class:`gnsfx.batch_size.schedule.BatchSizeSchedule` and :class:`gnsfx.batch_size.controller.BatchSizeController`.

    batch_size: examples per optimizer step, over all ranks, a multiple of micro_batch * world_size.
    steps, examples, tokens: taken in by ``step()`` so far; tokens None while not given.
    changes: every change so far. reason: why the batch size is what it is.
    """

    def __init__(self, unit: BatchUnit, start: int, lr: LearningRate, beta2: bool) -> None:
        self.unit, self.batch_size, self.first_batch_size = unit, start, start
        self._lr: LearningRate = check_rule(lr)
        self._beta2 = beta2
        self.steps, self.examples = 0, 0
        self.tokens: int | None = None
        self.changes: list[Change] = []
        self.reason: str = f"{start} examples to start with."

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank runs per optimizer step."""
        return self.unit.accumulation(self.batch_size)

    @property
    def lr_scale(self) -> float:
        """All learning rate factors so far, for loops that compute the rate themselves: lr = lr_of(step) * lr_scale."""
        return lr_factor(self._lr, self.first_batch_size, self.batch_size)

    @property
    def stages(self) -> list[Stage]:
        """The batch sizes so far, for :mod:`gnsfx.batch_size.export`."""
        first = Stage(self.first_batch_size, 0, 0, 0 if self.tokens is not None else None)
        return [first, *(Stage(change.after, change.step, change.examples, change.tokens) for change in self.changes)]

    def step(
        self, *, examples: int | None = None, tokens: int | None = None, seconds: float | None = None
    ) -> Change | None:
        """Once after each optimizer step, on every rank. Returns the change, if there is one.

        Args:
            examples: in this step, over all ranks; ``batch_size`` unless given.
            tokens: in this step, over all ranks. In every step or in none.
            seconds: that this step took, device included. Measured by the clock unless given; only needed where
                the time matters.

        Raises:
            OptionError: a negative number, or tokens in some steps only.
        """
        examples = self.batch_size if examples is None else examples
        for name, value in (("examples", examples), ("tokens", tokens), ("seconds", seconds)):
            if value is not None and not value >= 0:
                raise OptionError(f"step({name}={value!r}): expected the {name} of this step, a number from 0 on.")
        if self.steps and (tokens is None) != (self.tokens is None):
            raise OptionError(
                "step(tokens=...): give the tokens of every step or of none; this step differs from the first."
            )
        self._take(examples, tokens, seconds)
        self.steps += 1
        self.examples += int(examples)
        self.tokens = None if tokens is None else (self.tokens or 0) + int(tokens)
        decision = self._decide()
        if decision is None:
            return None
        self.reason = decision.why
        return self._change(decision) if decision.batch_size != self.batch_size else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on, in plain types."""
        return {
            "schema": _SCHEMA,
            "policy": type(self).__name__,
            "batch_size": self.batch_size,
            "first_batch_size": self.first_batch_size,
            "steps": self.steps,
            "examples": self.examples,
            "tokens": self.tokens,
            "reason": self.reason,
            "changes": [dataclasses.asdict(change) for change in self.changes],
            **self._extra_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``. A batch size outside the bounds of now is brought inside by the next ``step()``.

        Raises:
            StateError: the state of something else, or of another version. Nothing is changed then.
            OptionError: this micro_batch and world_size cannot make the batch size in the state. Nothing is changed.
        """
        found = (state.get("schema"), state.get("policy")) if isinstance(state, Mapping) else (None, None)
        if found != (_SCHEMA, type(self).__name__):
            raise StateError(
                f"{type(self).__name__}.load_state_dict: expected schema {_SCHEMA!r} of a {type(self).__name__}, "
                f"got {found[0]!r} of {found[1]!r}."
            )
        try:
            changes = [Change(**change) for change in state["changes"]]
            kept = {key: state[key] for key in ("first_batch_size", "steps", "examples", "tokens", "reason")}
            batch_size = self.unit.check(state["batch_size"], "the batch size in the state")
            self._load_extra(state)
        except (KeyError, TypeError, AttributeError) as error:
            raise StateError(f"{type(self).__name__}.load_state_dict: the state is incomplete ({error}).") from None
        self.batch_size, self.changes = batch_size, changes
        for key, value in kept.items():
            setattr(self, key, value)

    @abstractmethod
    def _decide(self) -> Decision | None:
        """The batch size of the next step; None: not the time to decide."""

    def _take(self, examples: int, tokens: int | None, seconds: float | None) -> None:
        """What else is to be known of a step, before it is counted."""
        return

    def _extra_state(self) -> dict[str, Any]:
        return {}

    def _load_extra(self, state: Mapping[str, Any]) -> None:
        """Raises KeyError, TypeError or AttributeError before anything is changed."""
        return

    def _change(self, decision: Decision) -> Change:
        before, self.batch_size = self.batch_size, decision.batch_size
        change = Change(
            step=self.steps,
            examples=self.examples,
            tokens=self.tokens,
            before=before,
            after=self.batch_size,
            accumulation=self.accumulation,
            lr_factor=lr_factor(self._lr, before, self.batch_size),
            beta2_power=self.batch_size / before if self._beta2 else 1.0,
            reason=decision.why,
        )
        self.changes.append(change)
        return change
