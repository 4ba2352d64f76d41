"""What is known of one parameter: which collectors measure it, and whether all of its gradient came through them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from gnsfx._torch import current_backward, never_trace
from gnsfx._torch_distributed import FsdpParameter, fsdp_parameter, is_dtensor

never_trace(__name__)
# id of a living parameter -> Tracked; a WeakIdKeyDictionary is ten times slower to ask
_tracked: dict[int, Tracked] = {}
# what a gradient is made of: measured, from a graph told not to measure it, from elsewhere
MEASURED, UNSELECTED, FOREIGN = 1, 2, 4


_created = [0]
_standing_in: list[weakref.ref[Tracked]] = []
_of_shard: dict[int, weakref.ref[Tracked]] = {}


def tracked_of(parameter: nn.Parameter) -> Tracked | None:
    """Of a parameter that came into a graph, or of the sharded one that it stands in for."""
    found = _tracked.get(id(parameter))
    return _of_shards(parameter) if found is None and _standing_in and is_dtensor(parameter) else found


def _of_shards(parameter: nn.Parameter) -> Tracked | None:
    """Asked of the living: ``load_state_dict(assign=True)`` and the like put other sharded parameters in place."""
    known = _of_shard.get(id(parameter))
    for reference in _standing_in if known is None else (known, *_standing_in):
        tracked = reference()
        if tracked is not None and tracked.owner() is parameter:
            _of_shard[id(parameter)] = reference
            return tracked
    return None


def created() -> int:
    """How many parameters have been tracked so far; while it stays the same, so does the answer of ``tracked_of``, except
    under FSDP."""
    return _created[0]


def standing_in() -> bool:
    """Whether graphs may have seen other parameters in place of those of the model, as under FSDP."""
    return bool(_standing_in)


def _address(tensor: Tensor) -> int:
    if type(tensor) is Tensor:
        try:
            return tensor.data_ptr()  # asking for the layout first takes longer
        except RuntimeError:  # sparse
            return id(tensor)
    return tensor.data_ptr() if not is_dtensor(tensor) and tensor.layout is torch.strided else id(tensor)


class Tracked:
    """One parameter; ``collectors`` are pairs of a :class:`gnsfx.leaves.Collector` and the slot in it."""

    __slots__ = (
        "__weakref__",
        "_arrived",
        "_hook",
        "_landed",
        "_part",
        "_parts",
        "collectors",
        "expected",
        "fsdp",
        "parameter",
        "settled",
    )

    def __init__(self, parameter: nn.Parameter) -> None:
        self.collectors: list[tuple[Any, int]] = []
        self.expected: tuple[int, int, int] | None = None
        key, forget = id(parameter), _tracked.pop  # the module's globals are gone when the interpreter ends
        self.parameter = weakref.ref(parameter, lambda _: forget(key, None))
        _tracked[key] = self
        _created[0] += 1
        self.fsdp: FsdpParameter | None = fsdp_parameter(parameter)
        self.settled: Any = None  # under FSDP the state of the gradient at the end of the last backward
        if self.fsdp is not None:
            _standing_in[:] = [*(r for r in _standing_in if r() is not None), weakref.ref(self)]
        self._part = MEASURED  # of what is expected
        self._parts = FOREIGN if self.gradients() else 0
        self._arrived: tuple[int, Any] | None = None
        self._landed: tuple[int, int, Any] | None = (
            None  # of the last gradient: address, version, what was there before
        )
        self._hook = parameter.register_hook(self._arriving).id

    def expect(self, grad: Tensor | None, task: int, part: int = MEASURED) -> None:
        """Note what should arrive, behind all hooks of the user, which may put another gradient in its place."""
        self.expected, self._part = None if grad is None else (task, _address(grad), grad._version), part
        parameter = self.parameter()
        if parameter is None or not (hooks := parameter._backward_hooks) or len(hooks) == 1:
            return
        if next(reversed(hooks)) != self._hook and self._hook in hooks:
            hooks[self._hook] = hooks.pop(self._hook)  # autograd does not see move_to_end

    def _arriving(self, grad: Tensor | None) -> None:
        """A gradient is about to be added to ``.grad``. Autograd sums all paths first: a single one keeps address and version."""
        if self._arrived is not None:
            self._resolve()
        parameter = None if self.fsdp is not None else self.parameter()
        before = None if parameter is not None and parameter.grad is None else self.stamp()
        if grad is None:
            ours, self._landed = True, None
        else:
            address, version = _address(grad), grad._version
            ours = self.expected == (current_backward(), address, version)
            self._landed = address, version, before
        self._arrived, self.expected = (self._part if ours else FOREIGN, before), None

    def writes(self) -> int:
        """How often ``.grad`` was written to in place since autograd added to it last; 0 where that cannot be told."""
        now = self.stamp()
        if self._landed is None or now is None or len(now) > 1 or self.fsdp is not None:
            return 0
        ((address, version),), (arrived, first, before) = now, self._landed
        if before is None:
            # Taken over as it came; or copied into a new tensor (other strides, or still in use elsewhere), which is a write.
            return version - first if address == arrived else max(version - 1, 0)
        return max(version - before[0][1] - 1, 0) if before[0][0] == address else 0

    def owner(self) -> nn.Parameter | None:
        """The parameter as the model and the optimizer know it."""
        return self.parameter() if self.fsdp is None else self.fsdp.sharded

    def gradients(self) -> list[Tensor]:
        """What holds the gradient since the last zero; empty where that is None."""
        if self.fsdp is not None:
            return self.fsdp.gradients()
        parameter = self.parameter()
        return [] if parameter is None or parameter.grad is None else [parameter.grad]

    def has_gradient(self) -> bool:
        """Whether ``gradients()`` has any, in less time."""
        if self.fsdp is not None:
            return bool(self.fsdp.gradients())
        parameter = self.parameter()
        return parameter is not None and parameter.grad is not None

    def stamp(self) -> Any:
        """Differs once anything was written to the gradient; None where there is none."""
        if self.fsdp is not None:
            return tuple((_address(grad), grad._version) for grad in self.gradients()) or None
        parameter = self.parameter()  # by itself: this runs for every parameter in every backward
        grad = None if parameter is None else parameter.grad
        return None if grad is None else ((_address(grad), grad._version),)

    def _resolve(self) -> None:
        """``torch.autograd.grad`` runs the hook too, but adds nothing to ``.grad``: only what was added counts."""
        if self._arrived is None:
            return
        (part, before), self._arrived = self._arrived, None
        if before is not None:
            self._parts |= part if self.stamp() != before else 0
        elif self.has_gradient():
            self._parts = part

    @property
    def parts(self) -> int:
        """What ``.grad`` is made of since it was last None or found to be zero: MEASURED | UNSELECTED | FOREIGN."""
        if self._arrived is not None:
            self._resolve()
        return self._parts

    @property
    def foreign(self) -> bool:
        """Whether ``.grad`` has a part that came from elsewhere."""
        return bool(self.parts & FOREIGN)

    def reset(self) -> None:
        self._arrived, self._parts = None, 0
