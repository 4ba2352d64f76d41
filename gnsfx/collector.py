"""Where the norms arrive: leaf tensors owned per (graph, parameters), and the reading of them per model.

One compiled graph serves every module that shares its code, so the leaf is looked up at each call by the parameters
that came in. ``leaf.grad`` is (2, n): sums over examples of |c_b|^2 and the number of examples, per parameter;
autograd accumulates it like any gradient. What belongs to one step is decided when a backward begins: a parameter whose
``.grad`` is None or zero starts anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnsfx._torch import WeakIdKeyDictionary, current_backward, detect_fake_mode
from gnsfx.errors import NotMeasuredError
from gnsfx.marks import mark_batch
from gnsfx.passes.attach_collectors import REFUSED

__all__ = ["Measurement", "clear", "diagnose", "mark_batch", "measurements", "per_example_sq_norms", "sq_norms"]

_by_parameter: Any = WeakIdKeyDictionary()  # parameter -> [(Collector, slot)]
TWICE_IN_ONE_BACKWARD = (
    "it gets gradient from two compiled graphs, or from one graph called twice, within one backward pass, so the cross term between them is lost; "
    "compile the module that contains both uses"
)
TWICE_THROUGH_ONE_FORWARD = "backward ran twice through one forward pass, so the cross term between the two is lost; add the losses and call backward once"


class Collector:
    """The leaf of one graph for one tuple of parameters."""

    def __init__(self, graph: Any, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self.graph = graph
        self.parameters = [weakref.ref(p) for p in parameters]
        self.leaf = torch.zeros(2, len(parameters), dtype=dtype, device=parameters[0].device, requires_grad=True)
        self.per_example: list[Tensor] = []
        self.refused: dict[int, str] = {}
        self.backward = -1
        self._seen: dict[int, tuple[int, int]] = {}
        for slot, parameter in enumerate(parameters):
            _by_parameter.setdefault(parameter, []).append((self, slot))

    def begin(self, call: Call) -> None:
        """A backward is about to run through ``call``: start anew what was zeroed, refuse what would lose a cross term."""
        task = current_backward()
        if call.backward == task:
            return  # another result of the same call
        again, call.backward = call.backward is not None, task
        twice, self.backward = self.backward == task, task
        fresh: list[int] = []
        suspects: list[int] = []
        for slot, reference in enumerate(self.parameters):
            parameter = reference()
            if parameter is None:
                continue
            others = [(c, s) for c, s in _by_parameter.get(parameter, ()) if c is not self]
            if twice or any(c.backward == task for c, _ in others):
                for collector, at in [(self, slot), *others]:
                    collector.refused[at] = TWICE_IN_ONE_BACKWARD
                continue
            if parameter.grad is None:
                fresh.append(slot)
                self._seen.pop(slot, None)
                for collector, at in others:
                    collector.clear([at])
            elif not self._untouched(slot, parameter.grad):
                suspects.append(slot)
        self.clear(fresh)
        if suspects:
            self._clear_zeroed(suspects)
        if again:
            self.refused.update({s: TWICE_THROUGH_ONE_FORWARD for s in range(len(self.parameters)) if s not in fresh})
        if call.per_example is not None and not any(x is call.per_example for x in self.per_example):
            self.per_example.append(call.per_example)

    def _untouched(self, slot: int, grad: Tensor) -> bool:
        """Whether nothing but accumulation wrote to the gradient since the last backward began."""
        before = self._seen.get(slot)
        self._seen[slot] = (id(grad), grad._version)
        if before is None:
            return grad._version == 0
        return before[0] == id(grad) and grad._version <= before[1] + 1

    def clear(self, slots: Sequence[int]) -> None:
        if not slots:
            return
        for slot in slots:
            self.refused.pop(slot, None)
        if len(slots) == len(self.parameters):
            self.leaf.grad = None
            self.per_example.clear()
        else:
            for total in [self.leaf.grad, *(x.grad for x in self.per_example)]:
                if total is not None:
                    index = torch.tensor(list(slots), device=total.device)
                    total.index_fill_(total.dim() - 1 if total is self.leaf.grad else 0, index, 0)

    def _clear_zeroed(self, slots: list[int]) -> None:
        """``zero_grad(set_to_none=False)``: gradients that are all zero start anew. One pass over them, no host sync."""
        live = [(s, p) for s in slots if (p := self.parameters[s]()) is not None and p.grad is not None]
        norms = torch._foreach_norm([p.grad for _, p in live], float("inf"))
        zeroed = torch.stack([n.to(torch.float32) for n in norms]) == 0
        if self.refused or self.per_example:  # host state must follow: these cost a synchronisation
            self.clear([s for (s, _), z in zip(live, zeroed.tolist(), strict=True) if z])
        for position, (_, parameter) in enumerate(live):
            for collector, at in _by_parameter.get(parameter, ()):
                total = collector.leaf.grad
                if total is not None:
                    total[:, at] = torch.where(zeroed[position], torch.zeros_like(total[:, at]), total[:, at])


class Call:
    """One forward pass through one graph."""

    __slots__ = ("backward", "collector", "leaves", "per_example")

    def __init__(self, collector: Collector, per_example: Tensor | None) -> None:
        self.collector, self.per_example = collector, per_example
        self.leaves = [collector.leaf] if per_example is None else [collector.leaf, per_example]
        self.backward: int | None = None

    def begin(self, grad: Tensor) -> None:
        """Hook of every result: runs before the compiled backward does."""
        self.collector.begin(self)


class Collectors:
    """The collectors of one graph, one for each tuple of parameters it was called with."""

    def __init__(self, graph: Any, slots: Sequence[int], parameters: Sequence[nn.Parameter], batch: tuple[int, int] | None, per_example: bool) -> None:
        self._graph, self._slots, self._batch, self._per_example = graph, tuple(slots), batch, per_example
        double = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
        self._dtype = torch.float64 if double else torch.float32
        self._device = parameters[0].device
        self._of: Any = WeakIdKeyDictionary()  # first parameter -> {ids: Collector}

    def call(self, args: Sequence[Any]) -> Call:
        parameters = [args[i] for i in self._slots]
        of_first = self._of.setdefault(parameters[0], {})
        key = tuple(map(id, parameters))
        collector = of_first.get(key)
        if collector is None or any(r() is not p for r, p in zip(collector.parameters, parameters, strict=True)):
            collector = of_first[key] = Collector(self._graph, parameters, self._dtype)
        per_example = None
        if self._per_example:
            examples = args[self._batch[0]].shape[self._batch[1]] if self._batch else 1
            per_example = torch.zeros(len(parameters), examples, dtype=self._dtype, device=self._device, requires_grad=True)
        return Call(collector, per_example)

    def fake_leaves(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Leaves for the compiler: a static one, or its length would turn symbolic with a dynamic batch, and (n, B)."""
        mode = detect_fake_mode(list(inputs))
        n = len(self._slots)
        assert mode is not None
        leaf = torch.zeros(2, n, dtype=self._dtype, device=self._device, requires_grad=True)
        leaves = [mode.from_tensor(leaf, static_shapes=True)]
        if self._per_example:
            examples = inputs[self._batch[0]].shape[self._batch[1]] if self._batch else 1
            with mode:
                leaves.append(torch.zeros(n, examples, dtype=self._dtype, device=self._device, requires_grad=True))
        return leaves


# --------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Measurement:
    """One trainable parameter of a model since its gradient was last zeroed.

    Attributes:
        sq_norm: 0-d, sum over examples of |c_b|^2; None where it is not measured, and then ``refusal`` says why.
        examples: 0-d, the number of examples seen.
    """

    name: str
    parameter: nn.Parameter
    sq_norm: Tensor | None
    examples: Tensor | None
    refusal: str | None


def measurements(model: nn.Module) -> list[Measurement]:
    """One row per trainable parameter. No host synchronisation, but for the first reading after a compile-cache hit."""
    return [_measurement(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _measurement(name: str, parameter: nn.Parameter) -> Measurement:
    total: Tensor | None = None
    compiled = _by_parameter.get(parameter, ())
    for collector, slot in compiled:
        reason = collector.refused.get(slot) or refusal_of(collector, slot)
        if collector.leaf.grad is None:
            continue
        if reason is not None:
            return Measurement(name, parameter, None, None, reason)
        column = collector.leaf.grad[:, slot]
        total = column if total is None else total + column
    if total is None:
        reason = "no backward pass has reached it since its gradient was last zeroed" if compiled else "no compiled graph measures it"
        return Measurement(name, parameter, None, None, reason)
    return Measurement(name, parameter, total[0], total[1], None)


def refusal_of(collector: Collector, slot: int) -> str | None:
    """Why the graph refuses a slot. After a compile-cache hit the flag in the data is read once instead of tracing."""
    graph = collector.graph
    if graph._report is None and collector.leaf.grad is not None:
        flags = (collector.leaf.grad[0] == REFUSED).tolist()
        if not any(flags):
            return None
    elif graph._report is None:
        return None
    return graph.refusals.get(slot)


def clear(model: nn.Module) -> None:
    """Start a new step."""
    for parameter in model.parameters():
        for collector, slot in _by_parameter.get(parameter, ()):
            if collector.leaf.grad is not None:
                collector.clear(range(len(collector.parameters)))
            collector.refused.pop(slot, None)


def compiled(model: nn.Module) -> list[Collector]:
    """Every collector of the model's parameters, in the order they were compiled."""
    found = [c for p in model.parameters() for c, _ in _by_parameter.get(p, ())]
    return list(dict.fromkeys(found))


def diagnose(model: nn.Module) -> str | None:
    """Why there is nothing to read at all, as a sentence that says what to do; None if there is something."""
    collectors = compiled(model)
    if any(c.leaf.grad is not None for c in collectors):
        return None
    if collectors:
        if any(c.backward >= 0 for c in collectors):
            return (
                "a backward pass ran, but left nothing in the collectors: torch.autograd.grad and backward(inputs=...) fill no .grad. "
                "Call loss.backward(), then read before optimizer.zero_grad()."
            )
        return "the model is compiled, but no backward pass ran since the last step. Call loss.backward() first."
    if getattr(model, "_compiled_call_impl", None) is not None:
        return (
            f"{type(model).__name__}.compile() compiled no graph: called in place, torch.compile skips classes that live in torch.nn, and "
            'a model that was not called yet. Use model = torch.compile(model, backend="gns"), or put the layers into a class of your own.'
        )
    return (
        'no parameter of this model was seen by a graph compiled with backend="gns" that ran with gradients enabled. '
        'Use model = torch.compile(model, backend="gns") (or model.compile(backend="gns")) and run a forward and backward pass.'
    )


def sq_norms(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> 0-d tensor: sum over examples of the squared norm of their contribution to ``p.grad``.

    Counted since the gradient was last zeroed (by ``zero_grad`` or ``NoiseScale.step``). Parameters that are refused or
    not compiled are absent; :func:`gnsfx.coverage` lists them with the reason.

    Raises:
        NotMeasuredError: there is nothing to read, with the reason and what to do.
    """
    if (reason := diagnose(model)) is not None:
        raise NotMeasuredError(reason)
    return {m.name: m.sq_norm for m in measurements(model) if m.sq_norm is not None}


def per_example_sq_norms(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> (n,) tensor: squared norm of each example's contribution, in the order they were seen.

    Needs ``options={"gns.per_example": True}``. With gradient accumulation the micro-batches follow each other.

    Raises:
        NotMeasuredError: there is nothing to read, or the model was compiled without ``per_example``.
    """
    if (reason := diagnose(model)) is not None:
        raise NotMeasuredError(reason)
    found: dict[str, Tensor] = {}
    kept = False
    for m in measurements(model):
        parts = [x.grad[s] for c, s in _by_parameter.get(m.parameter, ()) for x in c.per_example if x.grad is not None]
        kept |= bool(parts)
        if parts and m.sq_norm is not None:
            found[m.name] = torch.cat(parts)
    if not kept:
        raise NotMeasuredError('per-example norms are not kept: compile with options={"gns.per_example": True}.')
    return found
