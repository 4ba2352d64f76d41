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
from gnsfx.noise import estimators, moments, series
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

    @property
    def memories(self) -> tuple[int, ...]:
        """For each column which memory it has: 0 the usual one, 1 that of the recent total."""
        recent = len(self.parameters) + self.groups.index(("", RECENT))
        return tuple(int(i == recent) for i in range(len(self)))

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


class Measured(NamedTuple):
    """What K steps say. values: [K, 3, P], tr(Sigma), |G|^2 and degrees of freedom. effective: [K], 1/W2, and n: [K],
    examples; 0 where the step cannot be used."""

    values: Tensor
    effective: Tensor
    n: Tensor

    def total(self) -> Tensor:
        """[K, 4], the sums over parameters, the largest freedom, and examples."""
        pair, freedom = self.values.split([2, 1], 1)
        return torch.cat([pair.sum(2), freedom.amax(2), self.n[:, None]], 1)


def measure(sums: Sums) -> Measured:
    """The unbiased pairs of K steps."""
    n = sums.usable * sums.n
    effective = sums.usable * (1 - sums.misweighted) * (1 - sums.left_over) * sums.effective
    # Examples that did not reach a parameter that others did have contributions of zero to it.
    own = effective[:, None] * ((sums.examples > 0) & (sums.refused == 0))
    freedom = (own - 1).clamp(min=0)
    used = freedom > 0
    # Not a product with the mask: 0 * inf is NaN.
    pair = estimators.unbiased_pair(
        torch.where(used, sums.grad_sq, 0), torch.where(used, sums.sq_norm, 0), torch.where(used, own, 2)
    )
    return Measured(torch.stack([*pair, freedom], 1), effective, n)


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
    """A step as it was taken in: (tr(Sigma), |G|^2, freedom) of every parameter [3, P] and of all of them [3], and the factor
    on everything older, 0-d."""

    values: Tensor
    total: Tensor
    forget: Tensor
    names: tuple[str, ...]

    def of(self, names: Collection[str] | None) -> Tensor:
        """The pair and the freedom of some parameters together, [3]."""
        at = tuple(i for i, name in enumerate(self.names) if name in (names or ()))
        own = self.values.index_select(1, index(at, self.values.device))
        return torch.cat([own[:2].sum(1), own[2:].amax(1) if at else own.new_zeros(1)])


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

    def is_elsewhere(self, device: torch.device) -> bool:
        """As after loading, when the model is seen at work for the first time."""
        return self.series.device != device or self.series.dtype != _dtype(device)

    def to(self, device: torch.device) -> None:
        """Move to where the model is."""
        ours = (self.series, self.counts, self.refused, self.half_life)
        moved = (t.to(_dtype(device)).to(device) for t in ours)
        self.series, self.counts, self.refused, self.half_life = moved

    def step(
        self, sums: Sums, decay: float, left_out: frozenset[str] = frozenset(), least_decay: float = 0.0
    ) -> tuple[Tracked, Taken]:
        """What it is after K more steps, and the last of them.

        left_out: parameters that the steps were told not to measure, so that they say nothing of their groups. least_decay:
        weight of the past after a step, however large.
        """
        measured = measure(sums)
        values, _, n = measured
        grouped = self._grouped(measured, sums)
        whole_step = grouped[-1, :, 0].clone()
        if left_out:
            grouped[:, 2].index_fill_(1, index(self.columns.groups_with(left_out), values.device), 0)
        first = n.index_select(0, (n > 0).to(n.dtype).argmax(0, keepdim=True)).squeeze(0)  # that has examples
        usual = estimators.half_life_of(decay, first)
        half_life = torch.where(self.half_life > 0, self.half_life, usual)
        forget = estimators.step_decay(n, torch.where(half_life > 0, half_life, 1)).clamp(min=least_decay)
        # Of every step and all later ones, for the memory of most columns and for that of the recent total.
        memories = torch.stack([forget, forget**RECENT_FACTOR], 1).flip(0).cumprod(0).flip(0)
        whole, later = memories[0], torch.cat([memories[1:], torch.ones_like(memories[:1])])
        which = index(self.columns.memories, values.device)
        columns = torch.cat([values, grouped], 2)
        news = moments.several(columns[:, :2], columns[:, 2], later[:, which])
        refused = (sums.refused > 0) | ((sums.gap > 0) & (sums.examples == 0) & (sums.grad_sq > 0))
        after = Tracked(
            self.columns,
            moments.join(self.series, news, whole[which]),
            self._counted(sums, measured, whole[0], later[:, 0]),
            self.refused if left_out else refused[-1].to(self.refused),
            half_life,
        )
        return after, Taken(values[-1], whole_step, forget[-1], self.columns.parameters)

    def _counted(self, sums: Sums, measured: Measured, whole: Tensor, later: Tensor) -> Tensor:
        """What :class:`Counts` names, after more steps."""
        effective = measured.effective
        alone = (effective <= 1) & (effective == sums.effective) & (sums.misweighted == 0)
        used = measured.values[:, 2] > 0
        larger = torch.where(used, sums.grad_sq - _MARGIN * sums.examples * sums.sq_norm, 0).sum(1) > 0
        news = [
            torch.ones_like(effective),
            measured.n,
            1 - sums.usable,
            sums.usable * ((sums.n < 2) | alone),
            sums.usable * larger,
            sums.misweighted * sums.usable,
            sums.left_over,
        ]
        fading = [sums.tokens * (effective > 0), effective * (sums.tokens > 0)]
        old, averages = self.counts.split([len(news), len(fading)])
        return torch.cat([old + torch.stack(news, 1).sum(0), whole * averages + later @ torch.stack(fading, 1)])

    def _grouped(self, measured: Measured, sums: Sums) -> Tensor:
        """Sums over the members of each group [K, 3, groups]; the freedom is that of the member with most."""
        values, effective, _ = measured
        who, where = (index(positions, values.device) for positions in self.columns.members)
        members = values[:, :, who]
        grouped = values.new_zeros(len(values), 3, len(self.columns.groups))
        where = where.expand(len(values), 2, -1)
        grouped[:, :2].scatter_add_(2, where, members[:, :2])  # index_add_ goes slice by slice on CPU
        grouped[:, 2].scatter_reduce_(1, where[:, 0], members[:, 2], "amax")
        unseen = torch.where((sums.gap > 0) & (values[:, 2] == 0), sums.grad_sq, 0).sum(1)
        missing = torch.stack([effective * unseen, unseen], 1)
        grouped[:, :2, -1] = torch.where(effective[:, None] > 1, missing, 0)
        grouped[:, 2, -1] = (effective - 1).clamp(min=0)
        return grouped

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
