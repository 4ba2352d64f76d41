"""Where the norms arrive: leaf tensors, one for each compiled graph and tuple of parameters it is called with.

One compiled graph serves every module that shares its code, so the leaf is looked up at each call by the parameters
that came in. ``leaf.grad`` is (2, n + 1): sums over examples of |c_b|^2 and the number of examples, per parameter, and a
column that says whether gradients handed to earlier graphs are apart by example; autograd accumulates it like any
gradient. With a budget a third row has the variances of sums that are estimates. A second leaf, where it is asked for,
takes the sums of squares of single numbers, all parameters in one row.
What belongs to one step is decided when a backward begins: a parameter whose ``.grad`` is None or zero starts anew.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gnsfx._torch import current_backward, never_trace
from gnsfx._torch_distributed import after_backward
from gnsfx.same_batches import compare_batches
from gnsfx.tracked import MEASURED, UNSELECTED, Tracked, created, tracked_of
from gnsfx.zeroed import begin_unselected, clear_zeroed, expect_untouched, first_gradient

if TYPE_CHECKING:
    from gnsfx.calls import Call

never_trace(__name__)
TWICE_IN_ONE_BACKWARD = (
    "it gets gradient from two compiled graphs, or from one graph called twice, within one backward pass, so the cross term between them is lost; "
    "compile the module that contains both uses; where DistributedDataParallel cuts the graph, "
    "torch._dynamo.config.optimize_ddp = False keeps it whole"
)
TWICE_THROUGH_ONE_FORWARD = (
    "backward ran twice through one forward pass, so their cross term is lost; add the losses and call backward once"
)


class Collector:
    """The leaf of one graph for one tuple of parameters."""

    def __init__(
        self,
        graph: Any,
        parameters: Sequence[nn.Parameter],
        dtype: torch.dtype,
        device: torch.device,
        spans: Mapping[int, slice],
        unselected: Sequence[nn.Parameter] = (),
        rows: int = 2,
    ) -> None:
        self.graph, self.spans = graph, spans
        self.parameters = [weakref.ref(p) for p in parameters]
        self.unselected = [weakref.ref(p) for p in unselected]
        self.leaf = torch.zeros(rows, len(parameters) + 1, dtype=dtype, device=device, requires_grad=True)
        self.entries = entries_row(spans, dtype, device)
        self.later: weakref.WeakSet[Collector] = weakref.WeakSet()  # whose graphs took a result of this one
        self.per_example: list[Tensor] = []
        self.refused: dict[int, str] = {}
        self.moved: str | None = None  # why the examples were elsewhere than the graph takes them to be
        self.epoch = 0  # counts how often everything was zeroed
        self.taken = False  # what it held was taken as a step, and no backward has left anything since
        # Size of the gradient that the step began with, 0-d: that of an earlier step if not 0.
        self.left_over: Tensor | None = None
        self._found: Tensor | None = None
        self.begun = -1  # the backward that last ran through the graph
        self.accumulated = -1  # the backward that last left something in the leaf
        self._backwards: list[tuple[int, int | None]] = []  # since everything was zeroed, with the number of examples
        self._unowned: list[Tensor | None] = []  # gradients of an empty batch
        self._since: dict[int, int] = {}  # slot -> the backward with which it began, where that is a later one
        self._calls: list[Call] = []
        self._seen: dict[int, tuple[int, int]] = {}
        weak = weakref.ref(self)
        self.leaf.register_post_accumulate_grad_hook(lambda _: (me := weak()) and me.end())
        self.wrapper: weakref.ref[nn.Module] | None = None  # the DistributedDataParallel that ran the graph
        self._positions: list[int | None] | None = None
        self._beside: list[int | None] = []  # the same of the unselected
        self.sharing: dict[Collector, list[tuple[int, int]]] = {}  # of the same parameters: (slot here, slot there)
        self.tracked: list[Tracked] = []
        for slot, parameter in enumerate(parameters):
            tracked = tracked_of(parameter) or Tracked(parameter)
            for other, at in tracked.collectors:
                if other is not self:
                    self.sharing.setdefault(other, []).append((slot, at))
                    other.sharing.setdefault(self, []).append((at, slot))
            tracked.collectors.append((self, slot))
            self.tracked.append(tracked)
        self._sharded = any(tracked.fsdp is not None for tracked in self.tracked)
        self._elsewhere: tuple[int, list[tuple[int, Tracked]]] = -1, []
        self._references = [*self.parameters, *self.unselected]

    def belongs_to(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these are the parameters, the unselected behind the selected; an id may have passed to another one."""
        known = [r() for r in self._references]
        return len(known) == len(parameters) and all(map(operator.is_, known, parameters))

    def coupled(self, seen: set[Collector] | None = None) -> str | None:
        """Why a later graph hands back gradients that are not apart by example; None if all do."""
        seen = {self} if seen is None else seen
        for later in self.later:
            if later in seen:
                continue
            seen.add(later)
            reason = later.moved or later.graph.coupled(later.leaf.grad) or later.coupled(seen)
            if reason is not None:
                return reason
        return None

    def live(self) -> list[tuple[int, nn.Parameter, list[tuple[Collector, int]]]]:
        """(slot, parameter, other collectors of the parameter)."""
        live = [(s, p) for s, r in enumerate(self.parameters) if (p := r()) is not None]
        return [(s, p, [e for e in self.tracked[s].collectors if e[0] is not self]) for s, p in live]

    def begin(self, call: Call) -> None:
        """A backward is about to run through ``call``: start anew what was zeroed since the last one."""
        task = current_backward()
        if call.begun == task:
            return  # another result of the same call
        call.begun = task
        grew = self.accumulated == self.begun  # not after torch.autograd.grad
        if self.begun != task:
            self.begun, self._calls = task, []
        self._calls.append(call)
        if len(self._calls) > 1:
            return
        if self._all_fresh(task):
            return self._begin_anew()
        fresh, suspects = [], []
        stale: dict[Collector, list[int]] = {}
        for slot, parameter, others in self.live():
            if any(c.accumulated == task for c, _ in others):
                continue  # refused below; its gradient of this backward may be there already
            tracked = self.tracked[slot]
            if not tracked.gradients():
                fresh.append(slot)
                self._seen.pop(slot, None)
                for collector, at in others:
                    stale.setdefault(collector, []).append(at)
            elif tracked.fsdp is not None:
                expect_untouched(tracked, [(self, slot), *others])
            elif not self._untouched(slot, parameter.grad, grew) or tracked.parts & ~MEASURED:  # type: ignore[arg-type]
                suspects.append(slot)
        begin_unselected(self.tracked_unselected(), stale)
        self.clear(fresh)
        for collector, slots in stale.items():
            collector.clear(slots)
        if suspects:
            clear_zeroed(self, suspects)
        self._found = first_gradient(self) if self.taken else None
        if self._sharded:
            after_backward(self.settle)

    def _all_fresh(self, task: int) -> bool:
        """Whether no parameter has a gradient yet: the usual begin of a step, told apart because it costs next to nothing."""
        if self._sharded or any(other.accumulated == task for other in self.sharing):
            return False
        for reference in self.parameters:
            parameter = reference()
            if parameter is None or parameter.grad is not None:
                return False
        return True

    def _begin_anew(self) -> None:
        """Everything that was measured of the parameters is over, here and in other collectors of theirs."""
        self._seen.clear()
        stale = {other: [at for _, at in slots] for other, slots in self.sharing.items()}
        begin_unselected(self.tracked_unselected(), stale)
        self.clear(range(len(self.parameters)))
        for collector, slots in stale.items():
            collector.clear(slots)
        self._found = None

    def settle(self) -> None:
        """Under FSDP gradients are reduced behind autograd's back, until the backward ends."""
        for tracked in self.tracked:
            tracked.settled = tracked.stamp() if tracked.fsdp is not None else None

    def tracked_unselected(self) -> list[tuple[int, Tracked]]:
        """Those of the unselected that other graphs measure, by their number."""
        if self._elsewhere[0] != created():
            alive = [(i, p) for i, r in enumerate(self.unselected) if (p := r()) is not None]
            self._elsewhere = created(), [(i, t) for i, p in alive if (t := tracked_of(p)) is not None]
        return self._elsewhere[1]

    def locate(self, node: Any) -> None:
        """Find each parameter among the inputs of the compiled backward; the same at every call."""
        if self._positions is None:
            at = {
                id(v): i
                for i, (edge, _) in enumerate(node.next_functions)
                if (v := getattr(edge, "variable", None)) is not None
            }
            self._positions = [at.get(id(r())) for r in self.parameters]
            self._beside = [at.get(id(r())) for r in self.unselected]

    def passed(self, grads: Sequence[Tensor | None]) -> None:
        """The compiled backward is done: note what each parameter should receive, if nothing else is added to it."""
        assert self._positions is not None
        task = current_backward()
        for tracked, position in zip(self.tracked, self._positions, strict=True):
            tracked.expect(grads[position] if position is not None else None, task)
        if self.graph.empty:
            self._unowned = [grads[i] if i is not None else None for i in self._positions]
        for i, tracked in self.tracked_unselected():
            position = self._beside[i]
            tracked.expect(grads[position] if position is not None else None, task, UNSELECTED)

    def end(self) -> None:
        """The norms of a backward have arrived: refuse what lost a cross term. ``torch.autograd.grad`` never comes here."""
        self.accumulated = self.begun
        if self.taken:
            self.left_over, self.taken = self._found, False
        if self._unowned:
            self._refuse_unowned()
        again = any(call.used and call.epoch == self.epoch for call in self._calls)
        for call in self._calls:
            call.used, call.epoch = True, self.epoch
            if call.per_example is not None and not any(x is call.per_example for x in self.per_example):
                self.per_example.append(call.per_example)
        compare_batches(self, [call.examples for call in self._calls if call.examples is not None])
        packed = self.graph.capture.plan.documents is not None  # then only the device knows how many there are
        self._backwards.append((self.begun, None if packed else self._calls[0].examples))
        self.moved = next((call.moved for call in self._calls if call.moved), self.moved)
        twice = any(other.accumulated == self.accumulated for other in self.sharing)
        if not (self.moved or twice or again or len(self._calls) > 1):
            return
        for slot, _, others in self.live():
            if self.moved:
                self.refused[slot] = self.moved
            shared = [(c, at) for c, at in others if c.accumulated == self.accumulated]
            if shared or len(self._calls) > 1:
                for collector, at in [(self, slot), *shared]:
                    collector.refused[at] = TWICE_IN_ONE_BACKWARD
            elif again:
                self.refused[slot] = TWICE_THROUGH_ONE_FORWARD

    def _refuse_unowned(self) -> None:
        """In an empty batch a gradient that is not zero, as of weight decay in the loss, belongs to no example."""
        found = [(slot, grad) for slot, grad in enumerate(self._unowned) if grad is not None]
        self._unowned = []
        if found and self.leaf.grad is not None:
            norms = torch._foreach_norm([grad for _, grad in found], float("inf"))  # pyright: ignore[reportPrivateImportUsage]
            for (slot, _), norm in zip(found, norms, strict=True):
                self.leaf.grad[0, slot].masked_fill_(norm != 0, -float("inf"))

    def backwards(self, slots: Sequence[int]) -> list[tuple[int, int | None]]:
        """The backward passes whose norms any of the slots holds, each with its number of examples; None where that is data."""
        since = min(self._since.get(slot, 0) for slot in slots) if self._since else 0
        return [backward for backward in self._backwards if backward[0] >= since]

    def _untouched(self, slot: int, grad: Tensor, grew: bool) -> bool:
        """Whether nothing but one accumulation, if ``grew``, wrote to the gradient since the last backward began."""
        before = self._seen.get(slot)
        self._seen[slot] = (id(grad), grad._version)
        if before is None:
            return grad._version == 0
        return before[0] == id(grad) and grad._version <= before[1] + grew

    def clear(self, slots: Sequence[int]) -> None:
        if not slots and self.parameters:
            return
        if self.refused:
            for slot in slots:
                self.refused.pop(slot, None)
        if len(slots) >= len(self.parameters):
            self.epoch += 1
            self.leaf.grad = self.moved = self.left_over = None
            if self.entries is not None:
                self.entries.grad = None
            self.per_example.clear()
            self._backwards.clear()
            self._since.clear()
        else:
            if self._backwards:
                self._since.update(dict.fromkeys(slots, self._backwards[-1][0] + 1))
            for total in [self.leaf.grad, *(x.grad for x in self.per_example)]:
                if total is not None:
                    index = torch.tensor(list(slots), device=total.device)
                    total.index_fill_(total.dim() - 1 if total is self.leaf.grad else 0, index, 0)
            for slot in slots:
                if (entries := self.entries_of(slot)) is not None:
                    entries.zero_()

    def entries_of(self, slot: int) -> Tensor | None:
        """The sums of squares of every number of a parameter, in one row; None where they are not kept or nothing arrived."""
        total = None if self.entries is None else self.entries.grad
        return total[self.spans[slot]] if total is not None and slot in self.spans else None


def entries_row(spans: Mapping[int, slice], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A leaf for all numbers of all parameters in ``spans``."""
    length = max((span.stop for span in spans.values()), default=0)
    return torch.zeros(length, dtype=dtype, device=device, requires_grad=True) if length else None


def collectors_of(parameter: nn.Parameter) -> Sequence[tuple[Collector, int]]:
    tracked = tracked_of(parameter)
    return () if tracked is None else tracked.collectors
