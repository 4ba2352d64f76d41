"""Steps that are not in the averages yet: adding them up together costs hardly more than one of them alone.

noise.step()      a record more                             a handful of device operations
each 16th         averages + 16 records -> averages         some two hundred, once
reading           the same with what there is, on the side: looking changes nothing, so that the averages have the same
                  bits on all ranks, whichever of them looks
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gnsfx.errors import StateError
from gnsfx.noise.gather import Kind, Record, Sums, total
from gnsfx.noise.tracking import Taken, Tracked, measure

MOST = 16
PARTS = ("series", "counts", "refused", "half_life")


@dataclass(slots=True)
class Waiting:
    """The averages without the steps that wait. decay, least_decay: as for :meth:`gnsfx.noise.tracking.Tracked.step`."""

    tracked: Tracked
    decay: float
    least_decay: float
    records: list[Record] = field(default_factory=list)
    _now: Tracked | None = None

    def add(self, record: Record) -> None:
        """Records of one kind wait together."""
        if self.records and self.records[0].kind != record.kind:
            self.commit()
        self.records.append(record)
        self._now = None
        if len(self.records) == MOST:
            self.commit()

    def now(self) -> Tracked:
        """The averages with all steps."""
        if not self.records:
            return self.tracked
        if self._now is None:
            sums = total(self.records, self.tracked.series)
            self._now, _ = self.tracked.step(sums, self.decay, least_decay=self.least_decay)
        return self._now

    def commit(self) -> Tracked:
        """The averages with all steps, and nothing waits."""
        self.tracked = self.now()
        self.records, self._now = [], None
        return self.tracked

    def state(self) -> dict[str, Any] | None:
        """What :func:`restored` goes on from, as plain values and tensors; None where nothing waits."""
        if not self.records:
            return None
        parts = {key: getattr(self.tracked, key).clone() for key in PARTS}
        parts |= {"decay": (self.decay, self.least_decay)}
        return parts | {"records": [(r.raw.clone(), r.numbers, tuple(r.kind)) for r in self.records]}

    def take(self, sums: Sums, left_out: frozenset[str]) -> Taken:
        """Take in one step at once, where something else has to know what became of it."""
        self.tracked, taken = self.commit().step(sums, self.decay, left_out, self.least_decay)
        return taken


def restored(state: Mapping[str, Any] | None, tracked: Tracked, decay: float, least_decay: float) -> Waiting:
    """Steps wait again as they did, so that they are added up in the same sixteens as in a run that was never interrupted, to
    the same bits. ``tracked``: the averages with all of them, to go on from where nothing waited, or decays otherwise now.

    Raises:
        StateError: the parts of ``state`` do not fit each other.
    """
    if state is None:
        return Waiting(tracked, decay, least_decay)
    try:
        if (decay, least_decay) != tuple(state["decay"]):
            return Waiting(tracked, decay, least_decay)
        before = Tracked(tracked.columns, *(state[key].clone() for key in PARTS))
        records = [Record(raw.clone(), tuple(numbers), Kind(*kind)) for raw, numbers, kind in state["records"]]
        waiting = Waiting(before, decay, least_decay, records)
        waiting.now()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StateError(
            f"the state of the NoiseScale is damaged: its last steps: {type(error).__name__}: {error}."
        ) from error
    return waiting


@dataclass(frozen=True, slots=True)
class OneStep:
    """A step by itself, worked out when it is asked for. whole: whether everything was measured."""

    record: Record
    like: Tensor
    whole: bool

    def __call__(self) -> Tensor:
        """[4]: tr(Sigma), |G|^2, freedom, 0 where not everything was measured, and examples."""
        (found,) = measure(total([self.record], self.like)).total()
        return found if self.whole else found * found.new_tensor([1, 1, 0, 1])
