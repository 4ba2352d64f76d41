"""Groups of parameters: by kind of module, by layer, by name, by the caller's function.

    B_simple of a group = sum_p tr(Sigma_p) / sum_p |G_p|^2

Both are sums over parameters, so a group may be formed after the fact. How far its two sums can be trusted is known
exactly where the group was tracked step by step (``NoiseScale(groups=...)``), and bounded otherwise.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gnsfx.errors import OptionError
from gnsfx.noise import estimators, intervals
from gnsfx.noise.intervals import Estimate, Interval

Grouping = str | Mapping[str, str | re.Pattern[str] | Iterable[str]] | Callable[..., Hashable | None]
KINDS = ("module type", "layer")


@dataclass(frozen=True, slots=True)
class GroupStats:
    """Averages of one parameter or of a group of them.

    tr_sigma: tr(Sigma), total variance of a per-example gradient, in units of the gradient squared.
    g_sq: |G|^2, squared norm of the true gradient. Unbiased, hence negative at times while it is not yet detected.
    parameters, elements: how many tensors and how many numbers the group holds.
    estimates: of the group itself where it was tracked, of its members otherwise.
    """

    tr_sigma: float
    g_sq: float
    parameters: int
    elements: int
    estimates: tuple[Estimate, ...] = field(default=(), repr=False)

    @property
    def b_simple(self) -> float:
        """tr(Sigma) / |G|^2, in examples; NaN while ``g_sq`` is not positive."""
        return estimators.noise_scale(self.tr_sigma, self.g_sq)

    def interval(self, level: float = 0.95) -> Interval:
        """Confidence interval of ``b_simple``, in examples; wider than need be for a group that was not tracked."""
        if len(self.estimates) == 1:
            return intervals.ratio_interval(self.estimates[0], level)
        return intervals.of_sum(self.estimates, level)


NOTHING = GroupStats(math.nan, math.nan, 0, 0)


def total(members: Sequence[GroupStats]) -> GroupStats:
    """The group of several groups, whose covariances are not known."""
    if not members:
        return NOTHING
    return GroupStats(
        tr_sigma=math.fsum(stats.tr_sigma for stats in members),
        g_sq=math.fsum(stats.g_sq for stats in members),
        parameters=sum(stats.parameters for stats in members),
        elements=sum(stats.elements for stats in members),
        estimates=tuple(estimate for stats in members for estimate in stats.estimates),
    )


def group_function(grouping: Grouping, model: nn.Module) -> Callable[[str, nn.Parameter], Hashable | None]:
    """(name, parameter) -> group, None to leave it out.

    Raises:
        OptionError: a grouping of another kind.
    """
    if grouping == "module type":
        owner = {id(p): type(m).__name__ for m in reversed([*model.modules()]) for p in m.parameters(recurse=False)}
        return lambda name, parameter: owner.get(id(parameter), "other")
    if grouping == "layer":
        return lambda name, parameter: name.rpartition(".")[0] or name
    if isinstance(grouping, Mapping):
        patterns = {group: _matching(match) for group, match in grouping.items()}
        return lambda name, parameter: next((group for group, match in patterns.items() if match(name)), "other")
    if callable(grouping):
        try:
            inspect.signature(grouping).bind("", None)
        except TypeError:
            return lambda name, parameter: grouping(name)
        return grouping
    raise OptionError(
        f"by_group({grouping!r}): expected 'module type', 'layer', a mapping from group to a regular expression or "
        "names, or a callable (name) or (name, parameter)."
    )


def _matching(match: str | re.Pattern[str] | Iterable[str]) -> Callable[[str], Any]:
    if isinstance(match, str | re.Pattern):
        try:
            return re.compile(match).search
        except re.error as error:
            raise OptionError(f"groups: {match!r} is no regular expression: {error}.") from error
    if isinstance(match, Iterable):
        return frozenset(match).__contains__
    raise OptionError(f"groups: {match!r}: expected a regular expression or a collection of names of parameters.")


def in_order(grouping: Grouping, members: Mapping[str, GroupStats]) -> dict[str, GroupStats]:
    """The groups in the order that the caller named them."""
    order = [*map(str, grouping), "other"] if isinstance(grouping, Mapping) else members
    return {group: members[group] for group in order if group in members}


def describe(stats: GroupStats) -> str:
    """Noise scale with its interval and what it is made of, for a line of text."""
    if not stats.parameters:
        return "nothing measured yet"
    return f"b_simple={show(stats)}, tr_sigma={_size(stats.tr_sigma)}, g_sq={_size(stats.g_sq)}"


def show(stats: GroupStats) -> str:
    """``212 [160..290] examples``, ``at least 160 examples`` or ``not yet detected``: never a number that is none."""
    interval = stats.interval()
    if interval.bounded and not math.isnan(stats.b_simple):
        return f"{stats.b_simple:.3g} [{interval}] examples"
    return f"{interval} examples" if interval.detected else str(interval)


def _size(number: float) -> str:
    """Of what cannot be negative: an unbiased estimate below zero says that it is small."""
    return f"{max(number, 0.0):.3g}" if math.isfinite(number) else "?"


def table(rows: Iterable[tuple[str, GroupStats]]) -> str:
    """One line per group."""
    lines = [f"{'':24}{'numbers':>12}{'B_simple':>10}  {'95% interval':18}{'tr(Sigma)':>11}{'|G|^2':>11}"]
    for group, stats in rows:
        lines.append(f"{group:24.24}{stats.elements:>12,}{_columns(stats)}")
    return "\n".join(lines)


def _columns(stats: GroupStats) -> str:
    if not stats.parameters:
        return f"{'':>10}  not measured"
    interval = stats.interval()
    value = f"{stats.b_simple:.4g}" if interval.bounded and not math.isnan(stats.b_simple) else ""
    return f"{value:>10}  {interval!s:18}{_size(stats.tr_sigma):>11}{_size(stats.g_sq):>11}"
