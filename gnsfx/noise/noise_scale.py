"""The gradient noise scale of a training run: one ``step()`` after backward, numbers whenever they are asked for.

    q_p, n     from the collectors: sum over examples of |c_b|^2 for parameter p, and the number of examples
    |g_p|^2    from ``p.grad``
    series     for every parameter and tracked group the averages of tr(Sigma) and |G|^2, and how far they can be trusted
    B_simple   tr(Sigma) / |G|^2, each averaged over steps for itself and summed over parameters first

``step()`` only launches device work: nothing is moved to the host, decided or printed there. Reading, of any number of
values, is one transfer. Steps that cannot be used are recognised on the device and told of when something is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gnsfx import collector, diagnosis, distributed
from gnsfx._torch import scale_of
from gnsfx.errors import NotMeasuredError, OptionError
from gnsfx.noise import saved
from gnsfx.noise.diagnostics import list_reasons
from gnsfx.noise.full_steps import FullSteps
from gnsfx.noise.gather import CALL, Sums, Weights, device_of, gather, is_idle, total
from gnsfx.noise.groups import KINDS, Grouping, group_function
from gnsfx.noise.measurement import StepMeasurement, per_example, variance_of_estimates, weights_of
from gnsfx.noise.optimizer_noise import OptimizerNoise
from gnsfx.noise.reading import Host, Reading
from gnsfx.noise.readings import Readings
from gnsfx.noise.tracking import LEAST_DECAY, Tracked, columns_of
from gnsfx.noise.waiting import OneStep, Waiting, restored


class NoiseScale(Readings):
    """Gradient noise scale of ``model``, in total, by parameter and by group, averaged over the steps so far.

    Args:
        model: the module whose parameters are trained, compiled with ``backend="gns"`` or about to be, alone or in
            DistributedDataParallel or fully_shard.
        decay: weight of the past after one step of the usual size, that of the first step. A step twice as large counts
            as two; but from 0.9 on, the weight after any step is 0.9 at least, so that steps that grew a hundred times
            larger still leave a memory of some twenty of them.
        half_life: the same as a number of examples after which the past counts half; replaces ``decay``.
        groups: groups to track beside the kinds of module and the layers, as :meth:`by_group` takes them; for others the
            intervals are wider than need be.
        reduction: what the loss of one backward pass is over its examples, ``"mean"`` or ``"sum"``. It matters only
            where passes or ranks have different numbers of examples: a mean over fewer of them counts each for more.
        process_group: the ranks that share a step; found from the model by default.
        predict_total: measure the norm layers alone in most steps and everything in each ``every``-th, and predict the
            total from the norm layers. The forward passes of each step belong inside ``with noise.measuring():``.
        optimizer: also the noise scale that this optimizer sees, :attr:`preconditioned`; compile with
            ``options={"gns.elementwise": True}`` for what can be exact. ``power``: see :mod:`gnsfx.noise.preconditioned`.

    Use::

        noise = gnsfx.NoiseScale(model)
        loss.backward()        # as often as there are micro-batches
        noise.step()           # before clipping, optimizer.step() and zero_grad()
        noise.b_simple         # examples
        noise.interval()       # 95%

    Raises:
        OptionError: an argument outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.99,
        half_life: float | None = None,
        groups: Grouping | None = None,
        reduction: str = "mean",
        process_group: Any = None,
        predict_total: bool = False,
        every: int = 10,
        optimizer: Optimizer | None = None,
        power: int = 1,
    ) -> None:
        if not 0 < decay < 1:
            raise OptionError(f"decay={decay!r}: expected a number between 0 and 1, both excluded, such as 0.99.")
        if half_life is not None and not half_life > 0:
            raise OptionError(f"half_life={half_life!r}: expected a positive number of examples, or None.")
        if reduction not in ("mean", "sum"):
            raise OptionError(f'reduction={reduction!r}: expected "mean" or "sum".')
        if groups is not None and groups not in KINDS:
            group_function(groups, model)
        self.model = model
        self._decay, self._half_life, self._reduction = decay, half_life, reduction
        self._least = LEAST_DECAY if half_life is None and decay >= LEAST_DECAY else 0.0
        self._groupings: dict[str, Grouping] = {kind: kind for kind in KINDS}
        self._own = groups
        if groups is not None and groups not in KINDS:
            self._groupings["own"] = groups
        self._group, self._calls = process_group, 0
        self._predicting = FullSteps(every) if predict_total else None
        self._weighing = None if optimizer is None else OptimizerNoise(optimizer, power)
        self.reset()

    @property
    def process_group(self) -> Any:
        """The ranks that share a step; None where there is one rank, or each has a step of its own."""
        return self._group or distributed.group_of(self.model)

    def measured(self) -> tuple[list[nn.Parameter], Tensor]:
        """Those that the last step measured as far as the host knows, and where that is so on the device, [their number]."""
        left_out = {*self._host.excluded, *self._host.unselected}
        at = tuple(i for i, name in enumerate(self._host.parameters) if name not in left_out)
        parameters = [*self._host.parameters.values()]
        tracked = self._tracked
        if tracked is None:
            return [], torch.zeros(0)
        refused = tracked.refused
        return [parameters[i] for i in at], refused[collector.index(at, refused.device)] == 0

    def reset(self) -> None:
        """Forget all steps, for instance after warm-up."""
        self._wait_from(None)
        self._reading: Reading | None = None
        self._host = Host()
        self._warned: set[str] = set()
        if self._predicting is not None:
            self._predicting.reset()
        if self._weighing is not None:
            self._weighing.series = None

    def measuring(self) -> AbstractContextManager[None]:
        """Around the forward passes of a step: with ``predict_total`` it decides what this step measures."""
        return nullcontext() if self._predicting is None else self._predicting.measuring()

    @torch.no_grad()
    def step(
        self,
        *,
        loss_scale: float | Tensor | torch.amp.GradScaler = 1.0,
        weights: Weights | None = None,
        tokens: float | Tensor | None = None,
    ) -> StepMeasurement:
        """Take in the gradients of this step and start the collectors anew. No host synchronisation.

        Call it after the last backward and before anything changes ``p.grad``: clipping, ``optimizer.step``,
        ``zero_grad``. In data-parallel training every rank calls it, also one that had no examples.

        Args:
            loss_scale: factor that was on the loss in backward and is no longer on ``p.grad``, or the ``GradScaler``:
                ``scaler.unscale_(optimizer); noise.step(loss_scale=scaler)``.
            weights: how much each example of this rank counts, [n], over all micro-batches, or a list with a tensor per
                micro-batch; in the same unit on all ranks. For a mean over tokens of padded sequences, the number of
                tokens of each sequence that are in the loss. Equal by default.
            tokens: how many tokens of this rank are in the loss, for values in tokens; the sum of whole-number
                ``weights`` by default.

        Raises:
            NotMeasuredError: there is nothing to read, with the reason and what to do.
            OptionError: weights that are not those of the step.
            GnsError: another rank is at another step, or does not answer.
        """
        scale = scale_of(loss_scale) if isinstance(loss_scale, torch.amp.GradScaler) else loss_scale
        group = self.process_group
        self._calls += 1  # also those that raise: the other ranks went on
        with distributed.telling_others(group, CALL, next(self.model.parameters()).device):
            found = collector.totals(self.model)
            if group is not None and self._group is None:
                found = distributed.only_averaged(found, self.model)
            if group is not None:
                found = distributed.with_untouched(found)
            if found.values is None and (group is None or not is_idle(found) or diagnosis.zeroed(self.model)):
                raise NotMeasuredError(self._why_nothing(found))
            waiting = self._track(found)
            scaled = None if self._weighing is None else (self._weighing.terms(found),)
        like = waiting.tracked.series
        record = gather(
            found,
            loss_scale=scale,
            weights=weights,
            tokens=tokens,
            reduction=self._reduction,
            group=group,
            call=self._calls,
            like=like,
            scaled=scaled,
        )
        at_once = self._predicting is not None or self._weighing is not None
        sums = total([record], like) if at_once else None
        whole = self._predicting is None or sums is None or self._predicting.take(found, sums.examples[0])
        if whole:
            self._host.take(found, group is None, isinstance(scale, Tensor) or scale != 1)
        if sums is None:
            waiting.add(record)
        else:
            self._take_at_once(sums, whole)
        norms = per_example(found, scale) if group is None and whole else None
        shares = None if norms is None else weights_of(found, weights, self._reduction)
        estimated = None if norms is None else variance_of_estimates(found, scale)
        measured = StepMeasurement(OneStep(record, like, whole), norms, shares, estimated)
        self._reading = None
        found.clear()
        if self._host.excluded and "coverage" not in self._warned:
            self._warn("coverage", self._host.coverage_text(self._host.excluded), stacklevel=4)
        return measured

    def _take_at_once(self, sums: Sums, whole: bool) -> None:
        """A step that the prediction or the optimizer's noise scale goes on from."""
        assert self._waiting is not None
        taken = self._waiting.take(sums, frozenset() if whole else self._rest())
        if self._predicting is not None:
            self._predicting.step(taken.of(self._predicting.names), taken.total if whole else None, taken.forget)
        if self._weighing is not None and whole and sums.scaled is not None:
            self._weighing.step(sums.scaled[0], taken)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later numbers depend on, as tensors and plain values; the same on all ranks."""
        prediction = None if self._predicting is None else self._predicting.state_dict()
        return saved.state_dict(self._tracked, self._host, self.model) | {
            "waiting": None if self._waiting is None else self._waiting.state(),
            "prediction": prediction and prediction | {"names": saved.inside(prediction["names"], self.model)},
            "preconditioned": None if self._weighing is None else self._weighing.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``, with the same numbers, on any number of ranks.

        Raises:
            StateError: the state of another model, or of another version. What is there stays as it is.
        """
        tracked, host = saved.load(state, self.model, self._groupings)
        predicting, prediction = self._predicting, state.get("prediction")
        if predicting is not None:
            predicting = FullSteps(predicting.every, predicting.first, predicting.memory)
            if prediction is not None:
                predicting.load_state_dict(prediction, saved.names_of(self.model))
        waiting = None
        if tracked is not None:
            same = tracked.columns == saved.columns_in(state, self.model)
            waiting = restored(state.get("waiting") if same else None, tracked, self._decay, self._least)
        if self._weighing is not None:
            self._weighing.load(state.get("preconditioned"))
        self._wait_from(None)
        self._waiting = waiting
        self._host, self._predicting, self._reading = host, predicting, None

    def _track(self, found: collector.Totals) -> Waiting:
        """The averages with a column for each trainable parameter of now: new ones start empty, the others go on."""
        parameters = dict(zip(found.names, found.parameters, strict=True))
        if self._waiting is None or found.names is not self._names:
            parameters = dict(zip(found.names, found.parameters, strict=True))
            columns = columns_of(parameters, self.model, self._groupings)
            if self._waiting is None:
                self._wait_from(Tracked.empty(columns, device_of(found), self._half_life or 0.0))
            elif columns != self._waiting.tracked.columns:
                self._wait_from(self._waiting.commit().rearranged(columns))
            self._names = found.names
            self._host.parameters = parameters
        assert self._waiting is not None
        if self._waiting.tracked.is_elsewhere(device_of(found)):
            self._waiting.commit().to(device_of(found))
        return self._waiting

    def _wait_from(self, tracked: Tracked | None) -> None:
        """From these averages on."""
        self._waiting = None if tracked is None else Waiting(tracked, self._decay, self._least)
        self._names: list[str] = []  # of the parameters in the last step, as the walk over the model gave them

    def _rest(self) -> frozenset[str]:
        """All but the norm layers."""
        assert self._predicting is not None
        return frozenset(self._host.parameters.keys() - (self._predicting.names or ()))

    def _why_nothing(self, found: collector.Totals) -> str:
        if reason := diagnosis.diagnose(self.model):
            return reason
        refused = {name: reason or "" for name, reason in zip(found.names, found.refusals, strict=True)}
        return f"noise.step() found no measured parameter. {list_reasons(refused)}"
