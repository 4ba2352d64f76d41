"""Which steps measure everything, which parameters are the norm layers, and the state of the prediction: the host side.

    step   1       2 .. first + 1     then
           norm    everything         everything in every ``every``-th step, norm layers in the others

The first step tells which parameters the norm layers are: those that a graph compiled to measure ``"norm"`` measures. All
is decided by counting steps on the host, so every rank decides the same. What a step did measure is looked up, not
assumed: a loop that never uses ``measuring()`` gets full steps alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from gnsfx import unmeasured
from gnsfx.backend import measuring
from gnsfx.collector import Totals
from gnsfx.errors import NotMeasuredError, OptionError, StateError
from gnsfx.noise import predict
from gnsfx.noise.predict import Prediction

FIRST = 16  # full steps at the start
BLOCK = 16  # full steps between two looks at phi
MEMORY = 32  # full steps after which an older one counts half in phi
NO_NORM_LAYER = (
    "predict_total needs normalisation layers, and no trainable parameter of this model is the scale or shift of one. Use "
    "NoiseScale(model) without it."
)
NEVER_NORM = (
    "predict_total has yet to see a step that measured the norm layers alone, which tells them from the rest. Run the "
    "forward passes of each step inside `with noise.measuring():`."
)
OTHER_LAYERS = (
    "other norm layers were measured than in the first step ({}), so that their ratio to the total is another one. Call "
    "noise.reset() where the model changes."
)


class FullSteps:
    """The loop's side of the prediction; ``every`` N-th step measures everything.

    Use::

        with full_steps.measuring():                    # around the forward passes of the step
            loss = compiled(x)
        loss.backward()
        found = collector.totals(model)
        full = full_steps.take(found)                   # None: nothing to predict from yet
        full_steps.step(norm, total if full else None, decay)

    Raises:
        OptionError: ``every`` is not a whole number from 2.
    """

    def __init__(self, every: int, first: int = FIRST, memory: float = MEMORY) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 2:
            raise OptionError(f"every={every!r}: expected a whole number of steps, 2 at least, such as 10.")
        self.every, self.first, self.memory = every, first, memory
        self.names: frozenset[str] | None = None  # of the norm layers' parameters
        self.reset()

    def reset(self) -> None:
        """Forget all steps; which parameters the norm layers are is found anew."""
        self.names = self._state = None
        self._steps = self._full = self._looks = 0

    @property
    def full(self) -> bool:
        """Whether the coming step is to measure everything."""
        return 1 <= self._steps <= self.first or (self._steps > 0 and self._steps % self.every == 0)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Around the forward passes of a step: all its micro-batches the same."""
        with measuring("all" if self.full else "norm"):
            yield

    def take(self, found: Totals, examples: Tensor | None = None) -> bool:
        """Whether the step measured everything, from ``totals`` before they are cleared. Call it once per step.

        examples: over all ranks that reached each parameter; one transfer where this rank has none in the first step, and
        so learns from the others which the norm layers are.

        Raises:
            NotMeasuredError: no norm layer, or others than before; everything was measured before norm layers were known.
        """
        pairs = list(zip(found.names, found.parameters, found.refusals, strict=True))
        measured = frozenset(name for name, _, refusal in pairs if refusal is None)
        whole = not any(
            refusal is not None and refusal in (unmeasured.left_out(p), unmeasured.MEASURED_IN_PART)
            for _, p, refusal in pairs
        )
        if not measured:
            if not whole:
                raise NotMeasuredError(NO_NORM_LAYER)
            if self.names is None and examples is not None:
                self.names = (
                    frozenset(n for n, many in zip(found.names, examples.tolist(), strict=True) if many) or None
                )
            whole = self.full  # a rank without examples: the others go by the same count
            self._steps += 1
            return whole
        if whole and self.names is None:
            raise NotMeasuredError(NEVER_NORM)
        names = measured if self.names is None else self.names
        if missing := names - measured if whole else names ^ measured:
            raise NotMeasuredError(OTHER_LAYERS.format(", ".join(sorted(missing)[:3])))
        self.names = names
        self._steps += 1
        return whole

    def step(self, norm: Tensor, total: Tensor | None, decay: Tensor | float) -> None:
        """Take in a step; arguments as for :func:`gnsfx.noise.predict.step`. No host synchronisation."""
        state = predict.empty(norm) if self._state is None else self._state.to(norm)
        self._state = predict.step(state, norm, total, decay, self.memory)
        if total is not None:
            self._full += 1
            if self._full % BLOCK == 0:
                self._state = predict.close_block(self._state, self._looks)
                self._looks += 1

    @property
    def rows(self) -> Tensor | None:
        """The numbers to move to the host, for :func:`gnsfx.noise.predict.read`; None before the first step."""
        return None if self._state is None else predict.rows(self._state)

    def read(self) -> Prediction | None:
        """The prediction, by one transfer; None before the first step."""
        rows = self.rows
        return None if rows is None else predict.read(rows.tolist())

    def state_dict(self) -> dict[str, Any]:
        """Everything that later numbers depend on."""
        return {
            "every": self.every,
            "names": sorted(self.names or ()),
            "steps": self._steps,
            "full": self._full,
            "looks": self._looks,
            "row": None if self._state is None else self._state.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any], renamed: Mapping[str, str] | None = None) -> None:
        """Go on from ``state_dict()``; ``every`` stays that of this object. ``renamed``: names in it to names in the model.

        Raises:
            StateError: something is missing or unknown, or the row has another length. What is there stays as it is.
        """
        expected = {"names", "steps", "full", "looks", "row"}
        if missing := sorted(expected - set(state)):
            raise StateError(f"the state of the prediction lacks {', '.join(missing)}.")
        row = state["row"]
        if row is not None and getattr(row, "shape", None) != (predict.LENGTH,):
            raise StateError(f"the state of the prediction is damaged: its row is not {predict.LENGTH} numbers.")
        if renamed is not None and (unknown := sorted(set(state["names"]) - set(renamed))):
            raise StateError(
                f"the state of the prediction is that of another model: it has no {', '.join(unknown[:3])}."
            )
        self.names = frozenset(name if renamed is None else renamed[name] for name in state["names"]) or None
        self._steps, self._full, self._looks = state["steps"], state["full"], state["looks"]
        self._state = None if row is None else row.clone()
