"""The trainable parameters of a model with their names, found once and looked at again in every step.

    model.named_parameters()      a walk over all modules, a microsecond and more per parameter
    trainable(model)              are keys and values of every module's two dicts, by identity, those of the last walk?

Anything may change between two steps: layers are frozen, replaced, renamed, moved to a device.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from gnsfx._torch import WeakIdKeyDictionary


class _Walk:
    """Where one walk found what. Nothing is kept alive by it, and no parameter referred to: ``torch.utils.swap_tensors`` takes
    none that is."""

    def __init__(self, model: nn.Module) -> None:
        modules, named = [*model.modules()], [*model.named_parameters()]
        self.modules = [*map(weakref.ref, modules)]
        self.signature, held = _look(modules)
        first = {id(parameter): place for place, parameter in reversed([*enumerate(held)])}
        self.places = [first[id(parameter)] for _, parameter in named]
        self.wanted = [parameter.requires_grad for _, parameter in named]
        self.names = [name for name, parameter in named if parameter.requires_grad]

    def trainable(self) -> list[nn.Parameter] | None:
        """The parameters, if a walk would find them again: those that are there now, under the same names."""
        modules = [module for reference in self.modules if (module := reference()) is not None]
        if len(modules) < len(self.modules):  # an id says nothing once its owner is gone
            return None
        signature, held = _look(modules)
        if signature != self.signature:
            return None
        parameters = [held[place] for place in self.places]
        if [parameter.requires_grad for parameter in parameters] != self.wanted:
            return None
        return [parameter for parameter, wanted in zip(parameters, self.wanted, strict=True) if wanted]


def _look(modules: Sequence[nn.Module]) -> tuple[list[list[Any]], list[Any]]:
    """Keys and identities, and all parameters that the modules hold. Made by loops that Python does not see: it is asked for in
    every step."""
    signature: list[list[Any]] = []
    values: list[list[Any]] = []
    for dicts in ([m._modules for m in modules], [m._parameters for m in modules]):
        held = list(filter(None, dicts))
        values.append(list(chain.from_iterable(map(_values, held))))
        signature += (
            list(map(bool, dicts)),
            list(map(len, held)),
            list(chain.from_iterable(held)),
            list(map(id, values[-1])),
        )
    return signature, values[-1]


_values: Any = operator.methodcaller("values")
_walks: Any = WeakIdKeyDictionary()  # model -> _Walk


def trainable(model: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters, in the order of ``model.named_parameters()``, each parameter once. The list of names is the same
    object as long as nothing changed, unless the model has a ``named_parameters`` of its own: that may go by anything."""
    if getattr(model.named_parameters, "__func__", None) is not nn.Module.named_parameters:
        found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return [*found], [*found.values()]
    walk = _walks.get(model)
    parameters = None if walk is None else walk.trainable()
    if walk is None or parameters is None:
        walk = _walks[model] = _Walk(model)
        parameters = walk.trainable()
        assert parameters is not None
    return walk.names, parameters
