"""Reading the norms of a model: all at once for the estimator, by name for the user."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gnsfx.diagnosis import compiled, diagnose, refused_in_run
from gnsfx.errors import NotMeasuredError
from gnsfx.leaves import Collector, collectors_of
from gnsfx.parameters import trainable
from gnsfx.tracked import MEASURED, standing_in, tracked_of
from gnsfx.unmeasured import FOREIGN, left_out, measured_in_part, refused_whole

NOT_COMPILED = "no compiled graph measures it"
ZEROED = "its gradient is None: no backward pass reached it, or it was zeroed; read before optimizer.zero_grad()"
UNREACHED = "no backward pass of a compiled graph has reached it since its gradient was last zeroed"
DOWNSTREAM = "the examples interact in a later graph of the same model"


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


@dataclass(frozen=True, slots=True)
class Totals:
    """All measured parameters at once: what :class:`Measurement` says, without a tensor per parameter.

    Attributes:
        names, parameters, refusals: one entry per trainable parameter; the refusal is None where it is measured.
        values: (2, number of measured parameters): sums over examples of |c_b|^2, and numbers of examples.
        micro_batches: the number of examples of each backward pass in them, in order; None where it is data (packed
            documents). A parameter that some of these passes did not reach has fewer examples than their sum.
        places: per trainable parameter the collectors and slots that measured it; empty where none did.
        variances: (number of measured parameters,): estimated, of the sums, 0 where they are exact; None without a budget.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    refusals: list[str | None]
    values: Tensor | None
    collectors: list[Collector]
    micro_batches: tuple[int | None, ...] = ()
    places: list[list[tuple[Collector, int]]] = field(default_factory=list)
    variances: Tensor | None = None

    def clear(self) -> None:
        """Start a new step."""
        for collector in self.collectors:
            collector.clear(range(len(collector.parameters)))
            collector.taken = True

    @property
    def left_over(self) -> list[Tensor]:
        """Positive, 0-d, where gradients still held an earlier step when this one began."""
        return [left for c in self.collectors if (left := c.left_over) is not None]


def totals(model: nn.Module) -> Totals:
    """Everything measured since the gradients were last zeroed. No host synchronisation, but for the first reading after
    a compile-cache hit."""
    names, parameters = trainable(model)
    refusals, places = [], []
    offsets: dict[Collector, int] = {}
    slots_of: dict[Collector, list[int]] = {}
    columns: list[int] = []  # of the leaves side by side
    owners: list[int] = []  # for each column the measured parameter
    measured = width = 0
    asked: dict[Collector, _Said | None] = {}
    for parameter in parameters:
        refusal, entries = _entries(parameter, asked)
        refusals.append(refusal)
        places.append(entries)
        for collector, slot in entries:
            if collector not in offsets:
                offsets[collector] = width
                width += len(collector.parameters) + 1
                slots_of[collector] = []
            slots_of[collector].append(slot)
            columns.append(offsets[collector] + slot)
            owners.append(measured)
        measured += refusal is None
    if standing_in():
        parameters = [_owner(parameter) for parameter in parameters]
    if not measured:
        return Totals(names, parameters, refusals, None, [])
    grads = [g for c in offsets if (g := c.leaf.grad) is not None]
    device, dtype = grads[0].device, max((g.dtype for g in grads), key=lambda d: d.itemsize)
    rows = max(len(g) for g in grads)
    values = (
        grads[0]
        if len(grads) == 1
        else torch.cat([_with_rows(g.to(device=device, dtype=dtype), rows) for g in grads], 1)
    )
    if columns == list(range(width - 1)):
        values = values[:, :-1]
    else:
        values = values.index_select(1, index(tuple(columns), device))
    if len(owners) > measured:
        values = values.new_zeros(len(values), measured).index_add_(1, index(tuple(owners), device), values)
    variances = values[2] if rows > 2 else None
    return Totals(names, parameters, refusals, values[:2], list(offsets), _micro_batches(slots_of), places, variances)


def _with_rows(sums: Tensor, rows: int) -> Tensor:
    """Sums of a graph without a budget beside those of one that has one."""
    return sums if len(sums) == rows else torch.cat([sums, sums.new_zeros(rows - len(sums), sums.shape[1])])


def _micro_batches(slots_of: dict[Collector, list[int]]) -> tuple[int | None, ...]:
    """Graphs that ran in one backward pass saw the same examples."""
    found: dict[int, int | None] = {}
    for collector, slots in slots_of.items():
        for backward, examples in collector.backwards(slots):
            found[backward] = None if examples is None else found.get(backward, examples)
    return tuple(found[backward] for backward in sorted(found))


@functools.lru_cache(maxsize=64)
def index(positions: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions as a tensor on the device."""
    return torch.tensor(positions, device=device)  # cached: copying it to a GPU would wait for the GPU


def _owner(parameter: nn.Parameter) -> nn.Parameter:
    """Where ``.grad`` is: a module under FSDP that is not resharded holds the stand-in."""
    tracked = tracked_of(parameter)
    owner = tracked.owner() if tracked is not None and tracked.fsdp is not None else None
    return parameter if owner is None else owner


class _Said(NamedTuple):
    """What a collector that holds norms says of all its parameters: slot -> refusal, and why all are coupled."""

    refusals: Mapping[int, str]
    coupled: str | None
    nothing: bool


def _say(collector: Collector) -> _Said | None:
    norms = collector.leaf.grad
    if norms is None:
        return None
    refusals = collector.graph.refusals_of(norms)
    coupled = collector.coupled() if collector.later else None
    refusals = {**refusals, **collector.refused} if collector.refused else refusals
    return _Said(refusals, coupled and f"{DOWNSTREAM}: {coupled}", not refusals and coupled is None)


def _entries(
    parameter: nn.Parameter, asked: dict[Collector, _Said | None]
) -> tuple[str | None, list[tuple[Collector, int]]]:
    """Why a parameter is not measured, or where its norms are. ``asked``: what collectors said before."""
    tracked = tracked_of(parameter)
    if tracked is None:
        known = left_out(parameter) if parameter.grad is not None else None
        return known or refused_whole(parameter) or NOT_COMPILED, []
    if parameter.grad is None and not tracked.has_gradient():
        return ZEROED, []
    whole = tracked.parts == MEASURED  # asked once: this runs for every parameter in every step
    if whole and len(tracked.collectors) == 1:
        collector = tracked.collectors[0][0]
        if collector not in asked:
            asked[collector] = _say(collector)
        if (said := asked[collector]) is not None and said.nothing:
            return None, tracked.collectors.copy()
    if not whole and (reason := left_out(parameter) or measured_in_part(parameter)) is not None:
        return reason, []
    entries = []
    for entry in tracked.collectors:
        if entry[0] not in asked:
            asked[entry[0]] = _say(entry[0])
        if asked[entry[0]] is not None:
            entries.append(entry)
    if not entries:
        return (FOREIGN if tracked.foreign else UNREACHED), []
    if not whole and tracked.foreign:
        return next((r for c, s in entries if (r := c.refused.get(s)) is not None), FOREIGN), []
    for collector, slot in entries:
        said: Any = asked[collector]
        reason = said.refusals.get(slot) or said.coupled
        if reason is not None:
            return reason, []
    return None, entries


def measurements(model: nn.Module) -> list[Measurement]:
    """One row per trainable parameter; see :func:`totals`."""
    found = totals(model)
    columns = iter(() if found.values is None else found.values.unbind(1))
    in_run = refused_in_run(model) if found.values is not None else {}
    rows = []
    for name, parameter, refusal in zip(found.names, found.parameters, found.refusals, strict=True):
        sq_norm, examples = next(columns).unbind() if refusal is None else (None, None)
        if sq_norm is not None:
            reasons = (in_run.get(c, {}).get(slot) for c, slot in collectors_of(parameter))
            if (refusal := next(filter(None, reasons), None)) is not None:
                sq_norm = examples = None
        rows.append(Measurement(name, parameter, sq_norm, examples, refusal))
    return rows


def clear(model: nn.Module) -> None:
    """Start a new step."""
    for collector in compiled(model):
        collector.clear(range(len(collector.parameters)))


def sq_norms(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> 0-d tensor: sum over examples of the squared norm of their contribution to ``p.grad``.

    Counted since the gradient was last zeroed (by ``zero_grad`` or ``NoiseScale.step``). Parameters that are refused or
    not compiled are absent; :func:`gnsfx.coverage` lists them with the reason. With ``gns.budget``, unbiased estimates for the
    parameters that it calls estimated.

    Raises:
        NotMeasuredError: there is nothing to read, with the reason and what to do.
    """
    if (reason := diagnose(model)) is not None:
        raise NotMeasuredError(reason)
    rows = measurements(model)
    found = {m.name: m.sq_norm for m in rows if m.sq_norm is not None}
    if rows and not found:
        raise NotMeasuredError(f"no parameter is measured; {rows[0].name}: {rows[0].refusal}")
    return found


def per_example_sq_norms(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> (n,) tensor: squared norm of each example's contribution, in the order they were seen.

    Needs ``options={"gns.per_example": True}``. With gradient accumulation the micro-batches follow each other. With
    ``gns.budget``, unbiased estimates for the parameters that coverage calls estimated.

    Raises:
        NotMeasuredError: there is nothing to read, or the model was compiled without ``per_example``.
    """
    if (reason := diagnose(model)) is not None:
        raise NotMeasuredError(reason)
    found: dict[str, Tensor] = {}
    kept = False
    for m in measurements(model):
        parts = [x.grad[s] for c, s in collectors_of(m.parameter) for x in c.per_example if x.grad is not None]
        kept |= bool(parts)
        if parts and m.sq_norm is not None:
            found[m.name] = torch.cat(parts)
    if not kept:
        raise NotMeasuredError('per-example norms are not kept: compile with options={"gns.per_example": True}.')
    return found


def entry_sums(totals: Totals) -> dict[str, Tensor]:
    """Parameter name -> tensor shaped like the parameter: sum over examples of c_b^2, number by number; all ``-inf`` where
    its path does not give them. Measured parameters without the option, or too large, are absent. No host synchronisation."""
    found: dict[str, Tensor] = {}
    for name, parameter, places in zip(totals.names, totals.parameters, totals.places, strict=False):
        parts = [collector.entries_of(slot) for collector, slot in places]
        if parts and all(part is not None for part in parts):
            rows: list[Tensor] = [part for part in parts if part is not None]
            found[name] = functools.reduce(torch.add, rows).view(parameter.shape)
    return found


def elementwise_sq_sums(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> tensor shaped like the parameter: sum over examples of the squares of each of its numbers.

    Needs ``options={"gns.elementwise": True}``. In float32 at least, counted since the gradient was last zeroed; the numbers
    of a parameter add up to ``sq_norms``. Absent where the contributions never exist one by one: weights that see several
    positions per example, looked-up rows, convolutions, parameters of more than 131,072 numbers, whatever is refused. Costs
    one transfer.

    Raises:
        NotMeasuredError: there is nothing to read, or the model was compiled without ``elementwise``.
    """
    if (reason := diagnose(model)) is not None:
        raise NotMeasuredError(reason)
    found = entry_sums(totals(model))
    if not found and all(c.entries is None for c in compiled(model)):
        raise NotMeasuredError('sums of single squares are not kept: compile with options={"gns.elementwise": True}.')
    first = [sums.flatten()[:1] for sums in found.values()]
    known = torch.cat(first).tolist() if first else []
    return {name: sums for (name, sums), value in zip(found.items(), known, strict=True) if value != -torch.inf}
