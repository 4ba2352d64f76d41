"""The gradient noise scale of a training run: one ``step()`` after backward, numbers whenever they are asked for.

    q_p, n     from the collectors: sum over examples of |c_b|^2 for parameter p, and the number of examples
    |g_p|^2    from ``p.grad``
    state      for every parameter the decayed sums of f tr(Sigma_p), f |G_p|^2 and f  (gnsfx.estimators)
    a group    B_simple = sum_p tr(Sigma_p) / sum_p |G_p|^2: a sum over parameters, so any grouping can be read later

``step()`` only launches device work: nothing is moved to the host, decided or printed there. Reading, of any number of
values, is one transfer. Steps that cannot be used are recognised on the device and told of when something is read.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnsfx import collector, estimators, leaves
from gnsfx.errors import GnsWarning, NotMeasuredError, OptionError

Grouping = str | Mapping[str, str | Iterable[str]] | Callable[..., Hashable | None]

# Cauchy-Schwarz says |g|^2 <= n q. Gradients rounded to bfloat16 stay well within this margin. Asked of the total only:
# one parameter's gradient may be zero but for rounding.
_INCONSISTENT = 1.05


@dataclass(frozen=True, slots=True)
class GroupStats:
    """Averages of one parameter or of a group of them.

    tr_sigma: tr(Sigma), total variance of a per-example gradient, in units of the gradient squared.
    g_sq: |G|^2, squared norm of the true gradient. Unbiased, hence negative at times while it is not yet detected.
    parameters, elements: how many tensors and how many numbers the group holds.
    """

    tr_sigma: float
    g_sq: float
    parameters: int
    elements: int

    @property
    def b_simple(self) -> float:
        """tr(Sigma) / |G|^2, in examples; NaN while |G|^2 is not detected."""
        return estimators.noise_scale(self.tr_sigma, self.g_sq)


class StepMeasurement:
    """What one step measured, by itself: unbiased and noisy. Reading the first value is one transfer."""

    def __init__(self, terms: Tensor, examples: Tensor) -> None:
        self._terms, self._examples = terms, examples
        self._values: list[float] | None = None

    def _read(self) -> list[float]:
        if self._values is None:
            pair = estimators.pooled_pair(self._terms)
            used = (self._terms[2] > 0).any()
            total = [torch.where(used, estimate.nansum(), math.nan) for estimate in pair]
            self._values = torch.stack([*total, self._examples]).tolist()
        return self._values

    @property
    def tr_sigma(self) -> float:
        """tr(Sigma) from this step alone; NaN if it could not be used (fewer than two examples, or not finite)."""
        return self._read()[0]

    @property
    def g_sq(self) -> float:
        """|G|^2 from this step alone. Unbiased: averages of it are right because it may be negative."""
        return self._read()[1]

    @property
    def b_simple(self) -> float:
        """Their ratio, in examples; NaN where ``g_sq`` is not positive. Never average it: read ``NoiseScale``."""
        return estimators.noise_scale(self.tr_sigma, self.g_sq)

    @property
    def examples(self) -> int:
        """Examples in the step, over all its micro-batches; 0 if a gradient was not finite."""
        return int(self._read()[2])

    def __repr__(self) -> str:
        return f"StepMeasurement({self.examples} examples, {_describe(self.tr_sigma, self.g_sq)})"


class NoiseScale:
    """Gradient noise scale of ``model``, in total, by parameter and by group, averaged over the steps so far.

    Args:
        model: the module whose parameters are trained, compiled with ``backend="gns"`` or about to be.
        decay: weight of the past after one step of the usual size, that of the first step. A step twice as large counts
            as two.
        half_life: the same as a number of examples after which the past counts half; replaces ``decay``.

    Use::

        noise = gnsfx.NoiseScale(model)
        loss.backward()        # as often as there are micro-batches
        noise.step()           # before clipping, optimizer.step() and zero_grad()
        noise.b_simple         # examples

    Raises:
        OptionError: ``decay`` outside (0, 1), or a ``half_life`` that is not positive.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.99, half_life: float | None = None) -> None:
        if not 0 < decay < 1:
            raise OptionError(f"decay={decay!r}: expected a number between 0 and 1, both excluded, such as 0.99.")
        if half_life is not None and not half_life > 0:
            raise OptionError(f"half_life={half_life!r}: expected a positive number of examples, or None.")
        self.model = model
        self._decay, self._fixed_half_life = decay, half_life
        self.reset()

    def reset(self) -> None:
        """Forget all steps, for instance after warm-up."""
        self._state: _State | None = None
        self._reading: _Reading | None = None
        self._warned: set[str] = set()

    @torch.no_grad()
    def step(self, *, loss_scale: float | Tensor = 1.0) -> StepMeasurement:
        """Take in the gradients of this step and start the collectors anew. No host synchronisation.

        Call it after the last backward and before anything changes ``p.grad``: clipping, ``optimizer.step``,
        ``zero_grad``.

        Args:
            loss_scale: factor that was on the loss in backward and is no longer on ``p.grad``; with a ``GradScaler``,
                ``scaler.unscale_(optimizer); noise.step(loss_scale=scaler.get_scale())``.

        Raises:
            NotMeasuredError: there is nothing to read, with the reason and what to do.
        """
        found = collector.totals(self.model)
        if found.values is None:
            raise NotMeasuredError(self._why_nothing(found))
        state = self._state = _track(self._state, found, self._fixed_half_life)
        sq_norm, examples = (state.spread(row, found) for row in found.values.unbind())
        sq_norm = sq_norm / loss_scale / loss_scale
        refused = sq_norm == -math.inf  # what a compiled graph puts where it cannot measure
        grad_sq = state.spread(_grad_norms(found), found).square()

        finite = (grad_sq.isfinite() & (sq_norm.isfinite() | refused)).all()
        examples = torch.where(finite, examples, 0)
        used = torch.where(refused, 0, examples)
        # Not a product with the mask: 0 * inf is NaN.
        grad_sq, sq_norm = torch.where(used > 0, grad_sq, 0), torch.where(used > 0, sq_norm, 0)
        terms = estimators.pooled_terms(grad_sq, sq_norm, used)

        largest = examples.amax()
        usual = estimators.half_life_of(self._decay, largest)
        state.half_life = torch.where(state.half_life > 0, state.half_life, usual)
        memory = torch.where(state.half_life > 0, state.half_life, 1)
        state.sums = state.sums * estimators.step_decay(used, memory) + terms
        state.refused = refused.to(state.sums)
        state.counts = state.counts + torch.stack(
            [
                torch.ones_like(largest),
                largest,
                (~finite).to(largest),
                (finite & (largest < 2)).to(largest),
                (grad_sq.sum() > _INCONSISTENT * (used * sq_norm).sum()).to(largest),
            ]
        )
        self._reading = None
        found.clear()
        if state.excluded:
            self._warn("coverage", state.coverage_text(state.excluded), stacklevel=4)
        return StepMeasurement(terms, largest)

    @property
    def b_simple(self) -> float:
        """Total noise scale tr(Sigma) / |G|^2, in examples; NaN while |G|^2 is not detected or nothing was measured."""
        return self._read().total.b_simple

    @property
    def tr_sigma(self) -> float:
        """Total variance of a per-example gradient, in units of the gradient squared; NaN if nothing was measured."""
        return self._read().total.tr_sigma

    @property
    def g_sq(self) -> float:
        """Squared norm of the true gradient. Unbiased: not positive means that it is not detected yet."""
        return self._read().total.g_sq

    @property
    def steps(self) -> int:
        """Calls of ``step`` since the start or the last ``reset``."""
        return self._read().counts.steps

    @property
    def examples(self) -> int:
        """Examples in the steps that were used."""
        return self._read().counts.examples

    @property
    def skipped(self) -> int:
        """Steps left out because a gradient or a norm was NaN or infinite."""
        return self._read().counts.skipped

    @property
    def coverage_share(self) -> float:
        """Share of the trainable numbers that the last step measured, from 0 to 1.

        Parameters without a gradient in that step are not counted as missing: there was nothing to measure.
        """
        return self._state.share({*self._read().excluded, *self._state.unselected}) if self._state else 0.0

    def by_parameter(self) -> dict[str, GroupStats]:
        """Statistics of each measured parameter, in the order of ``model.named_parameters()``. One transfer."""
        return dict(self._read().parameters)

    def by_group(self, grouping: Grouping = "module type") -> dict[str, GroupStats]:
        """Statistics of groups of parameters: numerators and denominators are summed, then divided. One transfer.

        Args:
            grouping: ``"module type"``, the class of the module that owns the parameter; or a mapping from group to a
                regular expression that is searched in the parameter's name, or to a collection of names, where the
                first match wins and the rest is the group ``"other"``; or a callable ``(name)`` or
                ``(name, parameter)`` that returns the group, or None to leave the parameter out.

        Raises:
            OptionError: a grouping of another kind.
        """
        group_of = _group_function(grouping, self.model)
        parameters = self._state.parameters if self._state else {}
        members: dict[str, list[GroupStats]] = {}
        for name, stats in self._read().parameters.items():
            group = group_of(name, parameters[name])
            if group is not None:
                members.setdefault(str(group), []).append(stats)
        order = [*grouping, "other"] if isinstance(grouping, Mapping) else members
        return {group: _total(members[group]) for group in order if group in members}

    def summary(self, grouping: Grouping = "module type") -> str:
        """A table of the groups and the total, as text."""
        reading = self._read()
        lines = [f"{'':24}{'numbers':>12}{'B_simple':>18}{'tr(Sigma)':>12}{'|G|^2':>12}"]
        for group, stats in [*self.by_group(grouping).items(), ("total", reading.total)]:
            lines.append(f"{group:24.24}{stats.elements:>12,}{_columns(stats)}")
        lines.append(f"B_simple in examples. {reading.counts.describe()}")
        if self._state and reading.excluded:
            lines.append(self._state.coverage_text(reading.excluded))
        return "\n".join(lines)

    def __repr__(self) -> str:
        if self._state is None:
            return "NoiseScale(no step yet)"
        reading = self._read()
        return f"NoiseScale({_describe(reading.total.tr_sigma, reading.total.g_sq)}, steps={reading.counts.steps})"

    def _why_nothing(self, found: collector.Totals) -> str:
        if reason := collector.diagnose(self.model):
            return reason
        refused = {name: reason or "" for name, reason in zip(found.names, found.refusals, strict=True)}
        return f"noise.step() found no measured parameter. {_list_reasons(refused)}"

    def _read(self) -> _Reading:
        if self._reading is None:
            if self._state is None:
                return _Reading({}, {}, _Counts(), _total([]))
            self._reading = self._state.read()
        self._report(self._reading)
        return self._reading

    def _report(self, reading: _Reading) -> None:
        counts = reading.counts
        if self._state and reading.excluded:
            self._warn("coverage", self._state.coverage_text(reading.excluded))
        if counts.skipped:
            self._warn(
                "skipped",
                f"{counts.skipped} of {counts.steps} steps were left out of the noise scale because a gradient or a "
                "norm was NaN or infinite; noise.skipped counts them. Does the loss diverge?",
            )
        if counts.too_few:
            self._warn(
                "too few",
                f"{counts.too_few} of {counts.steps} steps had fewer than two examples, from which noise cannot be "
                "told from signal; they count for nothing. Use a larger batch, or call noise.step() once after several "
                "backward passes.",
            )
        if counts.inconsistent:
            self._warn(
                "inconsistent",
                f"in {counts.inconsistent} of {counts.steps} steps p.grad was larger than the measured examples can "
                "account for (|g|^2 > n * sum of squares), so the noise scale is not to be trusted. Call zero_grad() "
                "after every noise.step(), measure all micro-batches of a step or none, and call noise.step() before "
                "anything rescales p.grad.",
            )

    def _warn(self, kind: str, text: str, stacklevel: int = 5) -> None:
        """Once per kind, at the line that called ``step()`` or read a value."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, GnsWarning, stacklevel=stacklevel)


@dataclass(frozen=True, slots=True)
class _Counts:
    """In the order of the device vector."""

    steps: int = 0
    examples: int = 0
    skipped: int = 0
    too_few: int = 0
    inconsistent: int = 0

    def describe(self) -> str:
        left_out = f", {self.skipped} left out as not finite" if self.skipped else ""
        too_few = f", {self.too_few} with fewer than two examples" if self.too_few else ""
        return f"{self.steps} steps{left_out}{too_few}; {self.examples:,} examples."


@dataclass(frozen=True, slots=True)
class _Reading:
    parameters: dict[str, GroupStats]
    excluded: dict[str, str]
    counts: _Counts
    total: GroupStats


@dataclass(slots=True)
class _State:
    """What is kept on the device, a column per trainable parameter, and what of it the host knows."""

    parameters: dict[str, nn.Parameter]
    excluded: dict[str, str]  # name -> reason: has a gradient, but the last step could not measure it
    unselected: set[str]  # has a gradient, and the user chose not to measure it
    sums: Tensor  # [3, P]
    refused: Tensor  # [P], of the last step
    counts: Tensor  # [len(_Counts)]
    half_life: Tensor  # 0-d, examples; 0 until the first step that has any

    def spread(self, values: Tensor, found: collector.Totals) -> Tensor:
        """One number per measured parameter as a vector [P] beside the sums, 0 for the others."""
        values = values.to(self.sums)
        if len(values) == len(found.names):
            return values
        measured = tuple(i for i, reason in enumerate(found.refusals) if reason is None)
        return self.sums.new_zeros(len(found.names)).index_copy_(0, collector.index(measured, values.device), values)

    def read(self) -> _Reading:
        flat = torch.cat([self.sums.flatten(), self.refused, self.counts]).tolist()  # the one transfer
        size = len(self.parameters)
        columns = [flat[row * size : (row + 1) * size] for row in range(4)]
        excluded, stats = dict(self.excluded), {}
        for (name, parameter), tr_sigma, g_sq, freedom, refused in zip(self.parameters.items(), *columns, strict=True):
            if refused:
                excluded[name] = "refused"
            elif freedom > 0 and name not in excluded:
                stats[name] = GroupStats(tr_sigma / freedom, g_sq / freedom, 1, parameter.numel())
        return _Reading(stats, excluded, _Counts(*map(int, flat[4 * size :])), _total(stats.values()))

    def share(self, left_out: Iterable[str]) -> float:
        """Share of the numbers outside ``left_out``."""
        total = sum(parameter.numel() for parameter in self.parameters.values())
        return 1 - sum(self.parameters[name].numel() for name in left_out) / max(total, 1)

    def coverage_text(self, excluded: Mapping[str, str]) -> str:
        return (
            f"{len(excluded)} of {len(self.parameters)} trainable parameters, {1 - self.share(excluded):.1%} of the "
            f"numbers, are not in the noise scale. {_list_reasons(excluded)}"
        )


def _track(state: _State | None, found: collector.Totals, half_life: float | None) -> _State:
    """The state with a column for each trainable parameter of now: new ones start empty, the others go on."""
    parameters = dict(zip(found.names, found.parameters, strict=True))
    if state is None:
        assert found.values is not None
        device = found.values.device
        # MPS has no float64; there the sums are as good as the norms.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        new = torch.zeros(3, len(parameters), device=device, dtype=dtype)
        state = _State(parameters, {}, set(), new, new[0], new.new_zeros(5), new.new_full((), half_life or 0.0))
    elif parameters.keys() != state.parameters.keys():
        columns = dict(zip(state.parameters, state.sums.unbind(1), strict=True))
        state.sums = torch.stack([columns.get(name, state.sums.new_zeros(3)) for name in parameters], dim=1)
    state.parameters = parameters
    gaps = {
        name: reason
        for name, reason in zip(found.names, found.refusals, strict=True)
        if reason is not None and parameters[name].grad is not None
    }
    state.unselected = {name for name in gaps if leaves.left_out(parameters[name]) is not None}
    state.excluded = {name: reason for name, reason in gaps.items() if name not in state.unselected}
    return state


def _grad_norms(found: collector.Totals) -> Tensor:
    """|g| of the measured parameters, in float32 at least, without a kernel per parameter."""
    measured = (p.grad for p, reason in zip(found.parameters, found.refusals, strict=True) if reason is None)
    grads = [torch.view_as_real(g) if g.is_complex() else g for g in measured if g is not None]
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return torch.stack(torch._foreach_norm(grads, 2, dtype=dtype))  # pyright: ignore[reportPrivateImportUsage]


def _total(members: Iterable[GroupStats]) -> GroupStats:
    members = list(members)
    if not members:
        return GroupStats(math.nan, math.nan, 0, 0)
    return GroupStats(
        tr_sigma=math.fsum(stats.tr_sigma for stats in members),
        g_sq=math.fsum(stats.g_sq for stats in members),
        parameters=sum(stats.parameters for stats in members),
        elements=sum(stats.elements for stats in members),
    )


def _group_function(grouping: Grouping, model: nn.Module) -> Callable[[str, nn.Parameter], Any]:
    if grouping == "module type":
        owner = {id(p): type(m).__name__ for m in reversed([*model.modules()]) for p in m.parameters(recurse=False)}
        return lambda name, parameter: owner.get(id(parameter), "other")
    if isinstance(grouping, Mapping):
        patterns = {
            group: re.compile(match).search if isinstance(match, str) else frozenset(match).__contains__
            for group, match in grouping.items()
        }
        return lambda name, parameter: next((group for group, match in patterns.items() if match(name)), "other")
    if callable(grouping):
        try:
            inspect.signature(grouping).bind("", None)
        except TypeError:
            return lambda name, parameter: grouping(name)
        return grouping
    raise OptionError(
        f"by_group({grouping!r}): expected 'module type', a mapping from group to a regular expression or names, or a "
        "callable (name) or (name, parameter)."
    )


def _list_reasons(reasons: Mapping[str, str], shown: int = 3) -> str:
    """The first few reasons, each with the first few names that it holds for, and where to find the others."""
    names_of: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names_of.setdefault(reason, []).append(name)
    parts = [f"{_list_names(names, shown)}: {reason}" for reason, names in names_of.items()]
    return "; ".join(parts[:shown]) + ("; ..." if len(parts) > shown else "") + ". See gnsfx.coverage(model)."


def _list_names(names: Sequence[str], shown: int) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _columns(stats: GroupStats) -> str:
    if not stats.parameters:
        return f"{'not measured':>18}"
    b_simple = "not yet detected" if math.isnan(stats.b_simple) else f"{stats.b_simple:.4g}"
    return f"{b_simple:>18}{stats.tr_sigma:>12.3g}{max(stats.g_sq, 0.0):>12.3g}"


def _describe(tr_sigma: float, g_sq: float) -> str:
    if math.isnan(g_sq):
        return "nothing measured yet"
    b_simple = estimators.noise_scale(tr_sigma, g_sq)
    shown = "not yet detected" if math.isnan(b_simple) else f"{b_simple:.4g} examples"
    return f"b_simple={shown}, tr_sigma={tr_sigma:.3g}, g_sq={max(g_sq, 0.0):.3g}"
