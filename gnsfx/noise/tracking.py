"""What a noise scale keeps on the device: a column of running sums for each parameter and each tracked group.

    one step     q, |g|^2, n of P parameters  ->  (tr(Sigma), |G|^2) of P parameters  ->  summed into K groups
    the series   [9, P + K], see gnsfx.noise.series; decays in examples

Two groups are always there beside the total: ``recent``, the total with a memory eight times shorter, which tells
whether the average lags behind, and ``missing``, an upper bound of tr(Sigma) of what has a gradient and no norm.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gnsfx.collector import index
from gnsfx.noise import estimators, series
from gnsfx.noise.gather import Sums
from gnsfx.noise.groups import Grouping, GroupStats, group_function
from gnsfx.noise.intervals import Estimate

TOTAL, RECENT, MISSING = "total", "recent", "missing"
RECENT_FACTOR = 8
# A memory in examples is a fraction of a step once steps are large enough, and says nothing of its own scatter then.
LEAST_DECAY = 0.9  # a memory of 19 effective steps
# Cauchy-Schwarz says |g|^2 <= n q. Gradients rounded to bfloat16 stay well within this margin. Asked of the total only:
# one parameter's gradient may be zero but for rounding.
_MARGIN = 1.05


class Counts(NamedTuple):
    """Since the start or the last reset, in the order of the device vector.

    tokens and effective decay like the averages: their ratio is the number of tokens per effective example.
    """

    steps: float = 0
    examples: float = 0
    skipped: float = 0
    too_few: float = 0
    too_large: float = 0  # |g|^2 > n q: p.grad holds more than was measured
    misweighted: float = 0
    left_over: float = 0  # gradients were not zeroed before
    tokens: float = 0
    effective: float = 0


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column is what: the parameters, then the groups as pairs of the grouping's name and the group."""

    parameters: tuple[str, ...]
    groups: tuple[tuple[str, str], ...]
    members: tuple[tuple[int, ...], tuple[int, ...]]  # (parameter, group) side by side

    def __len__(self) -> int:
        return len(self.parameters) + len(self.groups)

    def members_of_groups(self, among: frozenset[str]) -> dict[Hashable, frozenset[str]]:
        """Group -> its members, of these parameters."""
        found: dict[Hashable, set[str]] = {group: set() for group in self.groups}
        for p, g in zip(*self.members, strict=True):
            found[self.groups[g]].add(self.parameters[p])
        return {group: among & members for group, members in found.items()}

    def groups_with(self, names: frozenset[str]) -> tuple[int, ...]:
        """The groups that any of these parameters is a member of, and what is missing."""
        found = {g for p, g in zip(*self.members, strict=True) if self.parameters[p] in names}
        return (*sorted(found), len(self.groups) - 1)


def columns_of(parameters: Mapping[str, nn.Parameter], model: nn.Module, groupings: Mapping[str, Grouping]) -> Columns:
    """A column for every trainable parameter and for every group of every grouping."""
    groups: dict[tuple[str, str], int] = {("", name): i for i, name in enumerate((TOTAL, RECENT))}
    pairs = [(i, g) for i in range(len(parameters)) for g in range(2)]
    for title, grouping in groupings.items():
        group_of = group_function(grouping, model)
        for i, (name, parameter) in enumerate(parameters.items()):
            group = group_of(name, parameter)
            if group is not None:
                pairs.append((i, groups.setdefault((title, str(group)), len(groups))))
    groups["", MISSING] = len(groups)
    who, where = zip(*pairs, strict=True)
    return Columns(tuple(parameters), tuple(groups), (who, where))


def _dtype(device: torch.device) -> torch.dtype:
    """MPS has no float64; there the sums are as good as the norms."""
    return torch.float32 if device.type == "mps" else torch.float64


class Taken(NamedTuple):
    """A step as it was taken in: (tr(Sigma), |G|^2, freedom) of every parameter [3, P] and of all of them [3], the number of
    examples and the factor on everything older, both 0-d."""

    values: Tensor
    total: Tensor
    examples: Tensor
    forget: Tensor
    names: tuple[str, ...]

    def of(self, names: Collection[str] | None) -> Tensor:
        """The pair and the freedom of some parameters together, [3]."""
        at = tuple(i for i, name in enumerate(self.names) if name in (names or ()))
        own = self.values.index_select(1, index(at, self.values.device))
        return torch.cat([own[:2].sum(1), own[2:].amax(1) if at else own.new_zeros(1)])

    def one(self, whole: bool) -> Tensor:
        """The step by itself, [4]: tr(Sigma), |G|^2, freedom, 0 where not everything was measured, and examples."""
        return torch.cat([self.total[:2], self.total[2:] * whole, self.examples[None]])


@dataclass(slots=True)
class Tracked:
    """The device tensors and what the columns mean."""

    columns: Columns
    series: Tensor  # [9, P + K]
    counts: Tensor  # [len(Counts)]
    refused: Tensor  # [P], of the last step
    half_life: Tensor  # 0-d, examples; 0 until the first step that has any

    @staticmethod
    def empty(columns: Columns, device: torch.device, half_life: float) -> Tracked:
        zeros = torch.zeros((), dtype=_dtype(device), device=device).new_zeros
        sums = series.empty(len(columns), zeros(()))
        return Tracked(columns, sums, zeros(len(Counts())), zeros(len(columns.parameters)), zeros(()) + half_life)

    def rearranged(self, columns: Columns) -> Tracked:
        """For the parameters of now: new ones start empty, and groups that were made of other parameters; the rest goes on."""
        both = frozenset(self.columns.parameters) & frozenset(columns.parameters)
        here, there = (c.members_of_groups(both) for c in (columns, self.columns))
        at = {key: i for i, key in enumerate(_keys(self.columns)) if here.get(key) == there.get(key)}
        new = series.empty(len(columns), self.series)
        kept = [(i, at[key]) for i, key in enumerate(_keys(columns)) if key in at]
        if kept:
            here, there = (torch.tensor(positions, device=new.device) for positions in zip(*kept, strict=True))
            new[:, here] = self.series[:, there]
        refused = self.refused.new_zeros(len(columns.parameters))
        return Tracked(columns, new, self.counts, refused, self.half_life)

    def to(self, device: torch.device) -> None:
        """After loading, when the model is seen at work for the first time."""
        if self.series.device != device or self.series.dtype != _dtype(device):
            ours = (self.series, self.counts, self.refused, self.half_life)
            moved = (t.to(_dtype(device)).to(device) for t in ours)
            self.series, self.counts, self.refused, self.half_life = moved

    def step(self, sums: Sums, decay: float, left_out: frozenset[str] = frozenset(), least_decay: float = 0.0) -> Taken:
        """Take in a step.

        left_out: parameters that it was told not to measure, so that it says nothing of their groups. least_decay: weight of
        the past after the step, however large.
        """
        n = sums.usable * sums.n
        effective = sums.usable * (1 - sums.misweighted) * (1 - sums.left_over) * sums.effective
        # Examples that did not reach a parameter that others did have contributions of zero to it.
        own = effective * ((sums.examples > 0) & (sums.refused == 0))
        freedom = (own - 1).clamp(min=0)
        used = freedom > 0
        # Not a product with the mask: 0 * inf is NaN.
        pair = estimators.unbiased_pair(
            torch.where(used, sums.grad_sq, 0), torch.where(used, sums.sq_norm, 0), torch.where(used, own, 2)
        )
        values = torch.stack([*pair, freedom])
        grouped = self._grouped(values, sums, effective)
        total = grouped[:, 0].clone()
        if left_out:
            grouped[2].index_fill_(0, index(self.columns.groups_with(left_out), values.device), 0)
        usual = estimators.half_life_of(decay, n)
        self.half_life = torch.where(self.half_life > 0, self.half_life, usual)
        forget = estimators.step_decay(n, torch.where(self.half_life > 0, self.half_life, 1)).clamp(min=least_decay)
        forgets = forget.expand(len(self.columns)).clone()
        forgets[len(self.columns.parameters) + self.columns.groups.index(("", RECENT))] = forget**RECENT_FACTOR
        tr_sigma, g_sq, freedoms = torch.cat([values, grouped], 1)
        self.series = series.step(self.series, tr_sigma, g_sq, freedoms, forgets)
        if not left_out:
            self.refused = ((sums.refused > 0) | ((sums.gap > 0) & (sums.examples == 0) & (sums.grad_sq > 0))).to(
                sums.refused
            )
        larger = torch.where(used, sums.grad_sq - _MARGIN * sums.examples * sums.sq_norm, 0).sum() > 0
        self._count(sums, effective, larger, forget)
        return Taken(values, total, n, forget, self.columns.parameters)

    def _count(self, sums: Sums, effective: Tensor, larger: Tensor, forget: Tensor) -> None:
        """What :class:`Counts` names, of one more step."""
        alone = (effective <= 1) & (effective == sums.effective) & (sums.misweighted == 0)
        news = [
            torch.ones_like(effective),
            sums.usable * sums.n,
            1 - sums.usable,
            sums.usable * ((sums.n < 2) | alone),
            sums.usable * larger,
            sums.misweighted * sums.usable,
            sums.left_over,
        ]
        fading = [sums.tokens * (effective > 0), effective * (sums.tokens > 0)]
        old, averages = self.counts[: len(news)], self.counts[len(news) :]
        self.counts = torch.cat([old + torch.stack(news), forget * averages + torch.stack(fading)])

    def _grouped(self, values: Tensor, sums: Sums, effective: Tensor) -> Tensor:
        """Sums over the members of each group [3, K]; the freedom is that of the member with most."""
        who, where = (index(positions, values.device) for positions in self.columns.members)
        K = len(self.columns.groups)
        added = values.new_zeros(2, K).index_add_(1, where, values[:2, who])
        most = values.new_zeros(K).scatter_reduce_(0, where, values[2, who], "amax")
        unseen = torch.where((sums.gap > 0) & (values[2] == 0), sums.grad_sq, 0).sum()
        missing = torch.stack([effective * unseen, unseen])
        added[:, -1] = torch.where(effective > 1, missing, 0)
        most[-1] = (effective - 1).clamp(min=0)
        return torch.cat([added, most[None]])

    def read(self, *more: Tensor) -> tuple[dict[Any, Estimate], list[bool], Counts, list[float]]:
        """Everything as host numbers: by parameter name and by (grouping, group); which were refused; and ``more``. One
        transfer."""
        parts = [self.series.flatten(), self.refused, self.counts, *(m.to(self.series).flatten() for m in more)]
        flat = torch.cat(parts).tolist()
        width, rows = len(self.columns), series.SERIES_ROWS
        estimates = {
            key: series.read([flat[row * width + i] for row in range(rows)])
            for i, key in enumerate(_keys(self.columns))
        }
        flat = flat[rows * width :]
        refused, counts = len(self.columns.parameters), len(Counts())
        whole = Counts(*flat[refused : refused + counts])
        return estimates, [r > 0 for r in flat[:refused]], whole, flat[refused + counts :]


def _keys(columns: Columns) -> list[Hashable]:
    return [*columns.parameters, *columns.groups]


def stats_of(estimate: Estimate, members: Sequence[nn.Parameter]) -> GroupStats:
    """An estimate as the user sees it."""
    numbers = sum(p.numel() for p in members)
    return GroupStats(estimate.tr_sigma, estimate.g_sq, len(members), numbers, (estimate,))


def share_covered(measured: float, missing: float) -> float:
    """Lower bound of the share of tr(Sigma) that is measured: E |g_p|^2 >= tr Cov(g_p) for what is not."""
    whole = measured + missing
    return measured / whole if whole > 0 and math.isfinite(whole) else math.nan
