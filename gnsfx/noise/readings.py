"""What is read of a noise scale: values, intervals, groups, a table. Each reading is one transfer, until the next step."""

from __future__ import annotations

import math
import warnings

from torch import nn

from gnsfx.coverage import count_estimated
from gnsfx.errors import GnsWarning, OptionError
from gnsfx.noise.diagnostics import NOTES, messages
from gnsfx.noise.full_steps import FullSteps
from gnsfx.noise.groups import KINDS, Grouping, GroupStats, describe, group_function, in_order, table, total
from gnsfx.noise.intervals import Interval, check_level
from gnsfx.noise.optimizer_noise import OptimizerNoise, OptimizerStats
from gnsfx.noise.predict import Prediction
from gnsfx.noise.reading import Host, Reading, read
from gnsfx.noise.tracking import TOTAL, Tracked, stats_of
from gnsfx.noise.waiting import Waiting

# Of the steps that its members know: a group that was tracked for fewer, as after loading, is summed from its members.
_AS_LONG = 0.99


class Readings:
    """The reading half of :class:`gnsfx.NoiseScale`, of what the other half keeps."""

    model: nn.Module
    _host: Host
    _waiting: Waiting | None
    _reading: Reading | None
    _warned: set[str]
    _groupings: dict[str, Grouping]
    _own: Grouping | None
    _predicting: FullSteps | None
    _weighing: OptimizerNoise | None

    @property
    def _tracked(self) -> Tracked | None:
        """The averages with all steps."""
        return None if self._waiting is None else self._waiting.now()

    @property
    def b_simple(self) -> float:
        """Total noise scale tr(Sigma) / |G|^2, in examples; NaN while the average of |G|^2 is not positive, or nothing was measured."""
        return self._read().total.b_simple

    @property
    def b_simple_tokens(self) -> float:
        """The same in tokens; NaN also where ``step`` was not told of tokens."""
        return self.b_simple * self.tokens_per_example

    def interval(self, level: float = 0.95, unit: str = "examples") -> Interval:
        """Confidence interval of ``b_simple``: ``low`` and ``high``, inf where there is only a lower bound.

        It is about the average over the memory of this object (``half_life``), and counts no drift within it as error.

        Args:
            level: probability that it holds the truth.
            unit: ``"examples"`` or ``"tokens"``.

        Raises:
            OptionError: a level outside (0, 1), another unit.
        """
        check_level(level)
        if unit not in ("examples", "tokens"):
            raise OptionError(f'interval(unit={unit!r}): expected "examples" or "tokens".')
        found = self._read().total.interval(level)
        factor = 1.0 if unit == "examples" else self.tokens_per_example
        return Interval(0.0, math.inf) if math.isnan(factor) else Interval(found.low * factor, found.high * factor)

    @property
    def tokens_per_example(self) -> float:
        """Tokens per effective example, 1/W2 of them in a step, averaged like the rest; NaN where not told."""
        counts = self._read().counts
        return counts.tokens / counts.effective if counts.effective > 0 else math.nan

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
        return int(self._read().counts.steps)

    @property
    def examples(self) -> int:
        """Examples in the steps that were used, of all ranks."""
        return int(self._read().counts.examples)

    @property
    def skipped(self) -> int:
        """Steps left out because a gradient or a norm was NaN or infinite."""
        return int(self._read().counts.skipped)

    @property
    def coverage_share(self) -> float:
        """Share of the trainable numbers that the last step measured, from 0 to 1.

        Parameters without a gradient in that step are not counted as missing: there was nothing to measure.
        """
        return self._host.share({*self._read().excluded, *self._host.unselected}) if self._waiting else 0.0

    @property
    def prediction(self) -> Prediction | None:
        """With ``predict_total``: the factor from the norm layers to the total, its interval, and whether it moved."""
        return self._read().prediction

    @property
    def preconditioned(self) -> OptimizerStats:
        """With ``optimizer``: the noise scale in its metric, with its interval and the share that is exact.

        Raises:
            OptionError: no optimizer was given.
        """
        if self._weighing is None:
            raise OptionError("noise.preconditioned: give the optimizer, NoiseScale(model, optimizer=optimizer).")
        return self._read().preconditioned

    @property
    def tr_sigma_share(self) -> float:
        """At least this share of the tr(Sigma) of all gradients is measured, from 0 to 1.

        A bound, because the variance of what is not measured is at most its squared norm: E |g|^2 >= tr Cov(g).
        """
        return self._read().share

    def by_parameter(self) -> dict[str, GroupStats]:
        """Statistics of each measured parameter, in the order of ``model.named_parameters()``. One transfer.

        A parameter that some steps do not reach is averaged over those that do; the total counts zero for it in the others.
        """
        return dict(self._read().parameters)

    def by_group(self, grouping: Grouping | None = None) -> dict[str, GroupStats]:
        """Statistics of groups of parameters: numerators and denominators are summed, then divided. One transfer.

        Args:
            grouping: ``"module type"``, the class of the module that owns the parameter; ``"layer"``, that module; or a
                mapping from group to a regular expression that is searched in the parameter's name, or to a collection of
                names, where the first match wins and the rest is the group ``"other"``; or a callable ``(name)`` or
                ``(name, parameter)`` that returns the group, or None to leave the parameter out. Groups go by their
                ``str``. Default: the groups
                given to ``NoiseScale``, else ``"module type"``.

        Raises:
            OptionError: a grouping of another kind.
        """
        if grouping is None:
            grouping = self._own if self._own is not None else KINDS[0]
        group_of = group_function(grouping, self.model)
        reading = self._read()
        members: dict[str, list[str]] = {}
        for name in reading.parameters:
            group = group_of(name, self._host.parameters[name])
            if group is not None:
                members.setdefault(str(group), []).append(name)
        title = next((t for t, tracked in self._groupings.items() if tracked is grouping or tracked == grouping), None)
        rows = {}
        for group, names in members.items():
            parts = [reading.parameters[name] for name in names]
            own = reading.groups.get((title, group)) if title is not None else None
            if own is None or own.n_eff < _AS_LONG * min(part.estimates[0].n_eff for part in parts):
                rows[group] = total(parts)
            else:
                rows[group] = stats_of(own, [self._host.parameters[name] for name in names])
        return in_order(grouping, rows)

    def summary(self, grouping: Grouping | None = None) -> str:
        """A table of the groups and the total, as text."""
        reading = self._read()
        lines = [table([*self.by_group(grouping).items(), (TOTAL, reading.total)])]
        lines.append(f"B_simple in examples. {reading.describe()}")
        if estimated := count_estimated(self.model):
            lines.append(
                f"{estimated} parameters are estimated, without bias (gns.budget); gnsfx.coverage(model) names them."
            )
        if self._waiting and reading.excluded:
            lines.append(self._host.coverage_text(reading.excluded))
        lines += [text for kind, text in messages(reading.findings) if kind in NOTES]
        return "\n".join(lines)

    def __repr__(self) -> str:
        if self._waiting is None:
            return "NoiseScale(no step yet)"
        reading = self._read()
        return f"NoiseScale({describe(reading.total)}, steps={reading.counts.steps:.0f})"

    def _read(self) -> Reading:
        if self._reading is None:
            tracked = self._tracked
            if tracked is None:
                return Reading()
            self._reading = read(tracked, self._host, self._predicting, self._weighing)
        for kind, text in messages(self._reading.findings):
            if kind not in NOTES:
                self._warn(kind, text)
        if self._reading.excluded:
            self._warn("coverage", self._host.coverage_text(self._reading.excluded))
        return self._reading

    def _warn(self, kind: str, text: str, stacklevel: int = 4) -> None:
        """Once per kind, at the line that called ``step()`` or read a value."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, GnsWarning, stacklevel=stacklevel)
