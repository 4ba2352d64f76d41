"""Are the examples of a batch independent? The noise between backward passes, next to what single examples predict.

    unit m      one backward pass of one rank, with the gradient c_m that it adds          sum_m c_m = g,  K units
    between     V = (sum_m |c_m|^2 - |g|^2 / K) / (1 - 1/K)                                tr Cov(g) from the units
    within      V = tr(Sigma) / (1/W2)                                                     tr Cov(g) from single examples
    ratio       between / within = 1 + (b - 1) rho    for examples that correlate by rho within a pass of b

The ratio is 1 for independent examples. Pieces of one document, frames of one video or an order that is not shuffled make it
larger, and the noise scale, in independent examples, larger by as much than single examples say. Classes that are balanced
on purpose make it smaller.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from gnsfx import distributed
from gnsfx._torch import current_backward
from gnsfx.errors import NotMeasuredError
from gnsfx.noise import series
from gnsfx.noise.intervals import UNKNOWN, Interval, ratio_interval
from gnsfx.noise.measurement import StepMeasurement
from gnsfx.noise.noise_scale import NoiseScale
from gnsfx.norms import squared_norms

_MARGIN = 1.1
_LEVEL = 0.99


class IndependenceCheck:
    """Compares the noise between backward passes with the noise of single examples, over steps.

    It needs two backward passes per step, over all micro-batches and ranks, and costs a norm per parameter in each of them.

    Use::

        check = gnsfx.IndependenceCheck(noise)          # a NoiseScale
        for x, y in micro_batches:
            loss(model(x), y).backward()
        check.step(noise.step())
        print(check)

    Attributes:
        steps: how many steps had two passes and were taken in.
    """

    def __init__(self, noise: NoiseScale) -> None:
        self.noise, self.steps = noise, 0
        self._squares: dict[int, dict[int, Tensor]] = {}  # backward -> id of the parameter -> |gradient|^2
        self._series: Tensor | None = None
        weak = weakref.ref(self)
        self._hooks = []
        for parameter in noise.model.parameters():
            if parameter.requires_grad:
                own = id(parameter)
                hook = lambda grad, own=own: (me := weak()) and me._take(own, grad)  # noqa: E731
                self._hooks.append(parameter.register_hook(hook))

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, parameter: int, grad: Tensor) -> None:
        self._squares.setdefault(current_backward(), {})[parameter] = squared_norms([grad.detach()])[0]

    @torch.no_grad()
    def step(self, measured: StepMeasurement) -> None:
        """Take in the step that ``measured = noise.step()`` was about. No host synchronisation; collective with ranks.

        Raises:
            NotMeasuredError: no backward pass ran since the last call.
        """
        squares, self._squares = self._squares, {}
        group = self.noise.process_group
        if not squares and group is None:
            raise NotMeasuredError("IndependenceCheck.step(): no backward pass ran since the last step.")
        parameters, known = self.noise.measured()
        like = measured.values
        tr_sigma, _, freedom, _ = like
        within = tr_sigma / (freedom + 1)
        nothing = like.new_zeros(())
        units = [torch.stack([one.get(id(p), nothing).to(like) for p in parameters]) for one in squares.values() if one]
        q = torch.where(known, torch.stack(units).sum(0), 0).sum() if units and parameters else nothing
        share = torch.where(known, _grad_sq(parameters, group, like), 0).sum()
        sums = torch.stack([q, share, torch.full_like(q, float(len(units)))])
        if group is not None:
            sums = distributed.all_reduce(sums, group, "IndependenceCheck.step()")
            sums[0] /= group.size() ** 2
        q, grad_sq, K = sums
        used = (K > 1) & (freedom > 0) & sums.isfinite().all() & within.isfinite()
        between = (q - grad_sq / K.clamp(min=2)) / (1 - 1 / K.clamp(min=2))
        if self._series is None:
            self._series = series.empty(1, like)
        weight = torch.where(used, K - 1, 0)
        self._series = series.step(self._series, between[None], within[None], weight[None], torch.ones_like(K))
        self.steps += 1

    def interval(self, level: float = 0.95) -> Interval:
        """Interval of the ratio; (0, inf) before it is known."""
        if self._series is None:
            return UNKNOWN
        return ratio_interval(series.read(self._series[:, 0].tolist()), level)

    @property
    def ratio(self) -> float:
        """Noise between passes over what single examples predict: 1 where examples are independent; NaN before any step."""
        estimate = None if self._series is None else series.read(self._series[:, 0].tolist())
        return float("nan") if estimate is None or not estimate.g_sq > 0 else estimate.tr_sigma / estimate.g_sq

    @property
    def message(self) -> str | None:
        """What to do; None where nothing speaks against independence."""
        found = self.interval(_LEVEL)
        if found.low > _MARGIN:
            return (
                f"the noise between backward passes is {self.ratio:.3g} ({found}) times what single examples predict: the examples "
                "of one pass are correlated (pieces of one document, neighbouring frames, an order that is not shuffled). The "
                "noise scale in independent examples is larger by as much. Shuffle the examples, or let a batch hold one of each cluster."
            )
        if found.high < 1 / _MARGIN:
            return (
                f"the noise between backward passes is {self.ratio:.3g} ({found}) times what single examples predict: the examples "
                "of one pass balance each other (drawn evenly over classes, or in opposite pairs). The noise scale is smaller by as much."
            )
        return None

    def __str__(self) -> str:
        return self.message or f"noise between passes / noise of single examples: {self.interval()} (1: independent)"


def _grad_sq(parameters: list[nn.Parameter], group: object, like: Tensor) -> Tensor:
    """This rank's share of |g|^2 of each parameter."""
    grads = [like.new_zeros(1) if p.grad is None else p.grad for p in parameters]
    if not grads:
        return like.new_zeros(0)
    return (squared_norms(grads) if group is None else distributed.grad_sq_shares(grads, group)).to(like)
