"""One forward pass through one compiled graph: which collector it reports to, and where its inputs came from."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gnsfx._torch import WeakIdKeyDictionary, detect_fake_mode, never_trace
from gnsfx._torch_distributed import active_wrapper
from gnsfx.capture import Capture
from gnsfx.draws import draw_seed
from gnsfx.eager_code import STATES, moved_rows
from gnsfx.leaves import Collector, entries_row
from gnsfx.marks import produced

never_trace(__name__)
PRODUCER = "gnsfx"  # key in the metadata of an autograd node
MOST_EAGER_NODES = 10_000


class Call:
    """One forward pass through one graph."""

    __slots__ = ("begun", "collector", "epoch", "examples", "leaves", "moved", "per_example", "used")

    def __init__(
        self,
        collector: Collector,
        per_example: Tensor | None,
        examples: int | None,
        moved: str | None,
        seed: Tensor | None = None,
    ) -> None:
        self.collector, self.per_example, self.examples, self.moved = collector, per_example, examples, moved
        self.leaves = [leaf for leaf in (collector.leaf, per_example, collector.entries, seed) if leaf is not None]
        self.begun: int | None = None
        self.used, self.epoch = False, 0

    def watch(self, node: Any, state_of: Callable[[int], Any]) -> None:
        """``node`` is the compiled backward; ``state_of`` says where the examples are in each result, by its number."""
        metadata_of(node)[PRODUCER], metadata_of(node)[STATES] = weakref.ref(self.collector), state_of
        self.collector.locate(node)
        # these must not hold the node: a cycle through C++ is never freed
        node.register_prehook(lambda _: self.collector.begin(self))
        node.register_hook(lambda grads, _: self.collector.passed(grads))


def metadata_of(node: Any) -> dict[str, Any]:
    """A dict that lives as long as the autograd node; PyTorch's stubs call it a method."""
    return node.metadata


def producers(tensor: Tensor) -> list[Collector]:
    """The collectors of the compiled graphs whose results a tensor was computed from, with eager code in between."""
    found, stack, seen = [], [tensor.grad_fn], set()
    while stack and len(seen) < MOST_EAGER_NODES:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reference = metadata_of(node).get(PRODUCER)
        collector = reference() if reference is not None else None
        if collector is not None:
            found.append(collector)
        else:
            stack += [following for following, _ in node.next_functions]
    return found


class Collectors:
    """The collectors of one graph, one for each tuple of parameters it was called with."""

    def __init__(self, graph: Any, capture: Capture, inputs: Sequence[Any]) -> None:
        """``inputs``: those that the graph is compiled for."""
        self._graph, self._plan, self._assumed = graph, capture.plan, capture.assumed
        self._slots = capture.plan.slots
        elementwise = capture.plan.elementwise
        starts = itertools.accumulate((n for _, n in elementwise), initial=0)
        self._spans = {
            self._slots.index(i): slice(start, start + n) for (i, n), start in zip(elementwise, starts, strict=False)
        }
        self._per_example = capture.plan.per_example and bool(self._slots)
        self._budgeted = capture.plan.budget is not None
        parameters = [inputs[i] for i in self._slots]
        double = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
        self._dtype = torch.float64 if double else torch.float32
        trained = (v for v in inputs if isinstance(v, Tensor) and v.requires_grad)
        devices = Counter(v.device for v in parameters) or Counter(v.device for v in trained)
        # where the fewest norms have to be copied
        self._device = max(devices, key=devices.__getitem__, default=torch.device("cpu"))
        self._of: Any = WeakIdKeyDictionary()  # first parameter -> {ids: Collector}
        self._all_slots = (*self._slots, *capture.unselected)
        # a graph without parameters has one collector
        self._without = None if self._all_slots else {}
        self._inputs: list[int] | None = None  # all others

    def call(self, args: Sequence[Any]) -> Call:
        all_of_them = [args[i] for i in self._all_slots]
        of_first = self._without if self._without is not None else self._of.setdefault(all_of_them[0], {})
        key = tuple(map(id, all_of_them))
        collector = of_first.get(key)
        if collector is None or not collector.belongs_to(all_of_them):
            parameters, unselected = all_of_them[: len(self._slots)], all_of_them[len(self._slots) :]
            collector = of_first[key] = Collector(
                self._graph, parameters, self._dtype, self._device, self._spans, unselected, self._rows
            )
            self._graph.note_unselected(args)
        wrapper = active_wrapper()
        if wrapper is not None and (collector.wrapper is None or collector.wrapper() is not wrapper):
            collector.wrapper = weakref.ref(wrapper)
        per_example, examples = None, self._examples(args)
        if self._per_example:
            per_example = self._row_per_slot(examples)
        moved = None
        if self._inputs is None:
            self._inputs = sorted({*range(len(args))} - {*self._all_slots})  # parameters come from no graph
        for index in self._inputs:
            value = args[index]
            if isinstance(value, Tensor) and value.grad_fn is not None:
                for earlier in producers(value):
                    earlier.later.add(collector)
                if index in self._assumed and moved is None and produced(value) is None:
                    moved = moved_rows(value, PRODUCER)
        seed = draw_seed(self._device) if self._budgeted else None
        return Call(collector, per_example, examples, moved, seed)

    @property
    def _rows(self) -> int:
        """Sums, numbers of examples, and with a budget the variance of the sums."""
        return 3 if self._budgeted else 2

    def _examples(self, inputs: Sequence[Any]) -> Any:
        return self._plan.count(lambda i: inputs[i].shape)

    def _row_per_slot(self, examples: Any) -> Tensor:
        """A leaf for the norms of single examples."""
        size = 1 if examples is None else examples
        return torch.zeros(len(self._slots), size, dtype=self._dtype, device=self._device, requires_grad=True)

    def fake_leaves(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Leaves for the compiler: (n, B), and static ones, whose length would turn symbolic with a dynamic batch."""
        mode = detect_fake_mode(list(inputs))
        assert mode is not None
        leaf = torch.zeros(self._rows, len(self._slots) + 1, dtype=self._dtype, device=self._device, requires_grad=True)
        leaves: list[Tensor] = [mode.from_tensor(leaf, static_shapes=True)]
        if self._per_example:
            with mode:
                leaves.append(self._row_per_slot(self._examples(inputs)))
        if (entries := entries_row(self._spans, self._dtype, self._device)) is not None:
            leaves.append(mode.from_tensor(entries, static_shapes=True))
        if self._budgeted:
            leaves.append(mode.from_tensor(torch.zeros((), dtype=torch.int64, device=self._device), static_shapes=True))
        return leaves
