"""What is known of one parameter: which collectors measure it, and whether all of its gradient came through them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from gnsfx._torch import current_backward, never_trace

never_trace(__name__)
# id of a living parameter -> Tracked; a WeakIdKeyDictionary is ten times slower to ask
_tracked: dict[int, Tracked] = {}


def tracked_of(parameter: nn.Parameter) -> Tracked | None:
    return _tracked.get(id(parameter))


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)


class Tracked:
    """One parameter; ``collectors`` are pairs of a :class:`gnsfx.leaves.Collector` and the slot in it."""

    __slots__ = ("_arrived", "_foreign", "_hook", "collectors", "expected", "parameter")

    def __init__(self, parameter: nn.Parameter) -> None:
        self.collectors: list[tuple[Any, int]] = []
        self.expected: tuple[int, int, int] | None = None
        key, forget = id(parameter), _tracked.pop  # the module's globals are gone when the interpreter ends
        self.parameter = weakref.ref(parameter, lambda _: forget(key, None))
        _tracked[key] = self
        self._foreign = False
        self._arrived: tuple[bool, tuple[int, int] | None] | None = None
        self._hook = parameter.register_hook(self._arriving).id

    def expect(self, grad: Tensor | None, task: int) -> None:
        """Note what should arrive, behind all hooks of the user, which may put another gradient in its place."""
        self.expected = None if grad is None else (task, _address(grad), grad._version)
        hooks: Any = getattr(self.parameter(), "_backward_hooks", None)
        if hooks is not None and len(hooks) > 1 and next(reversed(hooks)) != self._hook and self._hook in hooks:
            hooks[self._hook] = hooks.pop(self._hook)  # autograd does not see move_to_end

    def _arriving(self, grad: Tensor | None) -> None:
        """A gradient is about to be added to ``.grad``. Autograd sums all paths first: a single one keeps address and version."""
        self._resolve()
        ours = grad is None or self.expected == (current_backward(), _address(grad), grad._version)
        self._arrived, self.expected = (ours, self._stamp()), None

    def _stamp(self) -> tuple[int, int] | None:
        parameter = self.parameter()
        grad = parameter.grad if parameter is not None else None
        return None if grad is None else (_address(grad), grad._version)

    def _resolve(self) -> None:
        """``torch.autograd.grad`` runs the hook too, but adds nothing to ``.grad``: only what was added counts."""
        if self._arrived is None:
            return
        (ours, before), self._arrived = self._arrived, None
        if self._stamp() != before:
            self._foreign = not ours or (self._foreign and before is not None)

    @property
    def foreign(self) -> bool:
        """Whether ``.grad`` has a part that came from elsewhere."""
        self._resolve()
        return self._foreign

    def reset(self) -> None:
        self._arrived, self._foreign = None, False
