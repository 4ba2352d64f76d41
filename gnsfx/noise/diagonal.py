"""The diagonal that an optimizer divides by, read from its state: P of the last update, with everything left where it is.

    Adam, AdamW, NAdam    1 / (sqrt(v / (1 - beta2^t)) + eps)              v: the largest so far, with amsgrad
    RAdam                 r sqrt(1 - beta2^t) / (sqrt(v) + eps)            1 where it does not rectify
    RMSprop               1 / (sqrt(v) + eps)                              v less the squared mean, if centered
    Adagrad               1 / ((1 + (t - 1) lr_decay) (sqrt(v) + eps))
    Adamax                1 / u
    SGD                   1

t is the number of updates so far. Groups with different learning rates are told apart by a factor: their own rate by the
largest. Corrections of the first moment, the same for all parameters of one age, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from gnsfx.errors import GnsError

Scalar = float | Tensor  # a 0-d tensor where the optimizer keeps it on the device: it stays there
_TINY = torch.finfo(torch.float32).tiny


class Diagonal(NamedTuple):
    """P of one parameter: gain / (stretch * sqrt(moment) + eps), and 0 where moment is 0; without a moment it is ``gain``.

    Where v is 0 there never was a gradient, and 1/eps would say that the curvature is known, and tiny.
    """

    moment: Callable[[Mapping[str, Any]], Tensor] | None  # of ``state``; computed when it is needed: it may be a copy
    stretch: Scalar = 1.0
    eps: Scalar = 0.0
    gain: Scalar = 1.0
    state: Mapping[
        str, Any
    ] = {}  # of the optimizer. Not bound to ``moment``: a closure each wakes the garbage collector


def read_diagonals(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[Diagonal | None]:
    """P of each parameter; None for one that is not the optimizer's, or had no update yet. No host synchronisation.

    Raises:
        GnsError: an optimizer without a diagonal that is known, or of another model.
    """
    reader = next((r for kind, r in READERS.items() if isinstance(optimizer, kind)), None)
    if reader is None:
        known = ", ".join(kind.__name__ for kind in READERS)
        raise GnsError(
            f"the preconditioned noise scale needs an optimizer that divides by a diagonal; {type(optimizer).__name__} is not "
            f"known to. Expected one of torch.optim: {known} (of a wrapper, the optimizer inside). Or use NoiseScale without one."
        )
    groups = optimizer.param_groups
    rates = dict(zip(map(id, groups), _relative_rates([group["lr"] for group in groups]), strict=True))
    if any(hasattr(p, "device_mesh") for p in parameters):
        raise GnsError(
            "the preconditioned noise scale does not know parameters that are sharded over ranks (FSDP2); DistributedDataParallel "
            "works. Use NoiseScale without an optimizer."
        )
    group_of = {id(p): group for group in groups for p in group["params"]}
    if not any(id(p) in group_of for p in parameters):
        raise GnsError(
            f"none of the measured parameters is in the {type(optimizer).__name__} that was given. Give the optimizer of this "
            "model, made from its parameters as they are now."
        )
    states = [optimizer.state.get(p, {}) for p in parameters]
    found: list[Diagonal | None] = []
    for parameter, state, step in zip(parameters, states, _steps(states), strict=True):
        group = group_of.get(id(parameter))
        # On a device a step may be 0 too, if the first was skipped: then all moments are 0, and P with them.
        if group is None or not (reader is _sgd or isinstance(step, Tensor) or step):
            found.append(None)
            continue
        moment, stretch, eps, gain, _ = reader(state, group, step)
        found.append(Diagonal(moment, stretch, eps, gain * rates[id(group)], state))
    return found


def _steps(states: Sequence[Mapping[str, Any]]) -> list[Any]:
    """How many updates each parameter had: numbers, those of tensors on the CPU read together, and tensors elsewhere."""
    steps = [state.get("step", 0.0) for state in states]
    known = [step for step in steps if isinstance(step, Tensor) and step.is_cpu]
    numbers = iter(torch.stack(known).flatten().tolist() if known else ())
    return [next(numbers) if isinstance(s, Tensor) and s.is_cpu else s for s in steps]


def _number(value: Any) -> Any:
    """A step, rate or factor as a float, unless that would wait for a device."""
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def _relative_rates(rates: Sequence[Any]) -> list[Any]:
    """Learning rates by the largest of them; 1 where all are 0."""
    rates = [_number(rate) for rate in rates]
    devices = [rate.device for rate in rates if isinstance(rate, Tensor)]
    if not devices:
        largest = max(rates)
        return [rate / largest if largest > 0 else 1.0 for rate in rates]
    stacked = torch.stack([torch.as_tensor(rate, device=devices[0]) if isinstance(rate, Tensor) else
                           torch.full((), rate, device=devices[0]) for rate in rates])  # fmt: skip
    return [*torch.where(stacked.amax() > 0, stacked / stacked.amax(), 1).unbind()]


def _exp_avg_sq(state: Mapping[str, Any]) -> Tensor:
    return real(state["exp_avg_sq"])


def _max_exp_avg_sq(state: Mapping[str, Any]) -> Tensor:
    return real(state["max_exp_avg_sq"])


def _adam(state: Mapping[str, Any], group: Mapping[str, Any], step: Any) -> Diagonal:
    moment = _max_exp_avg_sq if group.get("amsgrad") else _exp_avg_sq
    correction = 1 - _number(group["betas"][1]) ** step
    if isinstance(correction, Tensor):
        correction = correction.clamp_min(_TINY)
    return Diagonal(moment, correction**-0.5, group["eps"])


def _radam(state: Mapping[str, Any], group: Mapping[str, Any], step: Any) -> Diagonal:
    beta = _number(group["betas"][1])
    correction, longest = 1 - beta**step, 2 / (1 - beta) - 1
    if isinstance(correction, Tensor):
        correction = correction.clamp_min(_TINY)
    length = longest - 2 * step * beta**step / correction
    eps = group["eps"]

    plain = Diagonal(_exp_avg_sq, 0.0, 1.0)  # 1 wherever there was a gradient
    if not isinstance(length, Tensor):
        if length <= 5:
            return plain
        return Diagonal(_exp_avg_sq, 1.0, eps, (correction * _rectified(length, longest)) ** 0.5)
    on = length > 5
    gain = torch.where(on, correction * _rectified(length, longest), 1).sqrt()
    return Diagonal(_exp_avg_sq, on.to(gain), torch.where(on, eps, 1.0).to(gain), gain)


def _rectified(length: Any, longest: Any) -> Any:
    return (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)


def _adamax(state: Mapping[str, Any], group: Mapping[str, Any], step: Any) -> Diagonal:
    eps = group["eps"]  # already in u
    return Diagonal(lambda state: (real(state["exp_inf"]) - eps).clamp_min(0).square(), 1.0, eps)


def _rmsprop(state: Mapping[str, Any], group: Mapping[str, Any], step: Any) -> Diagonal:
    def moment(state: Mapping[str, Any]) -> Tensor:
        squares = real(state["square_avg"])
        return (squares - real(state["grad_avg"]).square()).clamp_min(0) if group["centered"] else squares

    return Diagonal(moment, 1.0, group["eps"])


def _adagrad(state: Mapping[str, Any], group: Mapping[str, Any], step: Any) -> Diagonal:
    slower = 1 + (step - 1) * group["lr_decay"]
    return Diagonal(lambda state: real(state["sum"]), 1.0, group["eps"], 1 / slower)


def _sgd(state: Mapping[str, Any], group: Mapping[str, Any], step: Any) -> Diagonal:
    return Diagonal(None)


Reader = Callable[[Mapping[str, Any], Mapping[str, Any], Any], Diagonal]
READERS: dict[type[Optimizer], Reader] = {
    Adam: _adam,
    AdamW: _adam,
    NAdam: _adam,
    RAdam: _radam,
    Adamax: _adamax,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
    SGD: _sgd,
}


def real(tensor: Tensor) -> Tensor:
    """In float32 at least, complex numbers as pairs, sparse rows in their places."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
