"""The noise scale from how gradients differ between ranks: coarse, with no graph code in it, to check the fine one by.

    g_r    gradient of rank r before the all-reduce, over all its backward passes      g = (1/W) sum_r g_r = p.grad
    c_r = g_r / W                                                                      units are ranks, W2 = 1/W
    q = sum_r |c_r|^2,  with |g|^2 into the pair for W units                            gnsfx.noise.estimators.unbiased_pair
    tr(Sigma) of an example = tr Cov(g) * n,   n = 1/W2 of the examples                gnsfx.noise.gather

Its expectation is that of the estimate from single examples. With W units instead of n its variance is far larger, and
it needs two ranks. |g_r|^2 is taken when autograd has added a parameter's gradient up, which is before
DistributedDataParallel, whose hooks come later, averages it; its communication is left as it is.
Source: McCandlish et al. (arXiv 1812.06162), appendix A, with B_small the batch of a rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gnsfx import collector, distributed
from gnsfx._torch import OptimizedModule, current_backward
from gnsfx.errors import GnsError, NotMeasuredError, OptionError
from gnsfx.noise import estimators
from gnsfx.noise.estimators import Pair

CALL = "RankDifference.step()"


class RankDifference:
    """The unbiased pair with ranks as units, summed over steps.

    Args:
        model: ``DistributedDataParallel``, compiled or not, over two ranks at least.

    Use::

        difference = RankDifference(ddp_model)
        loss.backward()                  # all but the last backward pass of a step under no_sync()
        difference.step()                # where noise.step() is, and before it
        difference.b_simple              # examples

    Raises:
        OptionError: another kind of model, or one rank.
    """

    def __init__(self, model: nn.Module) -> None:
        wrapper = model._orig_mod if isinstance(model, OptimizedModule) else model
        if not isinstance(wrapper, DistributedDataParallel):
            raise OptionError(f"RankDifference({type(wrapper).__name__}): expected DistributedDataParallel.")
        self._wrapper, self._group = wrapper, wrapper.process_group
        self.ranks = dist.get_world_size(self._group)
        if self.ranks < 2:
            raise OptionError("RankDifference needs two ranks at least; this process group has one.")
        self._parameters = [p for p in wrapper._module_parameters if p.requires_grad]
        self._squares: list[Tensor | None] = [None] * len(self._parameters)
        self._reduced: set[int] = set()  # the backward passes that ended in an all-reduce
        self._sums, self.steps = torch.zeros(3, dtype=torch.float64), 0
        weak = weakref.ref(self)
        for slot, parameter in enumerate(self._parameters):
            hook = lambda p, slot=slot: (me := weak()) and me._take(slot, p)  # noqa: E731
            parameter.register_post_accumulate_grad_hook(hook)

    def _take(self, slot: int, parameter: Tensor) -> None:
        if self._wrapper.require_backward_grad_sync:
            self._reduced.add(current_backward())
        self._squares[slot] = _square(parameter.grad)

    @torch.no_grad()
    def step(self, *micro_batches: int) -> Pair:
        """Take in the step that ends here. Collective: every rank calls it. No host synchronisation on CUDA.

        Args:
            micro_batches: the number of examples of each backward pass of this rank; by default what the compiled graphs
                saw, before ``noise.step()`` starts them anew.

        Returns:
            tr(Sigma) and |G|^2 of this step alone, 0-d tensors, in units of the gradient squared; the same on all ranks. Not
            finite, and left out of the averages, if one rank alone had examples.

        Raises:
            NotMeasuredError: the number of examples is not known.
            GnsError: the gradients were averaged more than once, or a rank does not come.
        """
        sizes = micro_batches or collector.totals(self._wrapper.module).micro_batches
        with distributed.telling_others(self._group, CALL, self._parameters[0].device):
            vector = self._own(sizes)
        q, grad_sq, total, inverse, units = distributed.all_reduce(vector, self._group, CALL).unbind()
        examples = estimators.effective_of_micro_batches(total, inverse)
        between = estimators.unbiased_pair(grad_sq, q / self.ranks**2, units)
        pair = Pair(between.tr_sigma * examples / units, between.g_sq)
        self._squares, self._reduced = [None] * len(self._parameters), set()
        news = torch.where(units > 1, torch.stack([*pair, units.new_ones(())]), 0)
        self._sums, self.steps = self._sums.to(vector.device) + news, self.steps + 1
        return pair

    def _own(self, sizes: Sequence[int | None]) -> Tensor:
        """What this rank adds to the sums, [5]."""
        known = [size for size in sizes if size]
        if not sizes or len(known) < sum(size != 0 for size in sizes):
            raise NotMeasuredError(
                "RankDifference.step() does not know the number of examples. Give that of each backward pass, as in step(8, 8), or call it "
                "before noise.step()."
            )
        if len(self._reduced) > 1:
            raise GnsError(
                f"RankDifference.step(): the gradients were averaged over ranks {len(self._reduced)} times since the last step, so those of "
                "one rank are lost. Run all backward passes of a step but the last under model.no_sync()."
            )
        squares = [square for square in self._squares if square is not None]
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if not squares:
            raise NotMeasuredError("RankDifference.step(): no backward pass ran since the last step.")
        local = torch.stack([s.double() for s in squares]).sum()
        share = distributed.grad_sq_shares(grads, self._group).double().sum()
        # As in gnsfx.noise.gather: a pass is one of those of its rank. A rank without examples is no unit.
        A = len(sizes)
        numbers = [len(known) / A, sum(1 / size for size in known) / A**2, float(bool(known))]
        passes = torch.tensor(numbers, dtype=torch.float64)
        return torch.cat([torch.stack([local, share]), passes.to(local.device, non_blocking=True)])

    @property
    def tr_sigma(self) -> float:
        """Average over the steps, in units of the gradient squared; NaN without any."""
        return self._mean(0)

    @property
    def g_sq(self) -> float:
        """Average over the steps: unbiased, not positive while it is not detected."""
        return self._mean(1)

    @property
    def b_simple(self) -> float:
        """The ratio of the averages, in examples; NaN while |G|^2 is not detected."""
        return estimators.noise_scale(self.tr_sigma, self.g_sq)

    def _mean(self, which: int) -> float:
        value, steps = float(self._sums[which]), float(self._sums[2])
        return value / steps if steps else float("nan")


def _square(grad: Any) -> Tensor:
    return torch.linalg.vector_norm(
        grad, dtype=torch.float64 if grad.dtype is torch.float64 else torch.float32
    ).square()
