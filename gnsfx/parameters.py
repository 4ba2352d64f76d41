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
    """What one walk found. Nothing is kept alive by it."""

    def __init__(self, model: nn.Module) -> None:
        modules, parameters, names = [], [], []
        seen: set[int] = set()
        stack = [("", model)]
        while stack:
            prefix, module = stack.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            modules.append(module)
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    parameters.append(parameter)
                    names.append(prefix + name)
            stack += [(f"{prefix}{name}.", m) for name, m in reversed(module._modules.items()) if m is not None]
        self.modules, self.parameters = [*map(weakref.ref, modules)], [*map(weakref.ref, parameters)]
        self.signature = _signature(modules)
        self.wanted = [parameter.requires_grad for parameter in parameters]
        self.names = [name for name, wanted in zip(names, self.wanted, strict=True) if wanted]

    def trainable(self) -> list[nn.Parameter] | None:
        """The parameters, if a walk would find them again. An id says nothing once its owner is gone."""
        modules = [module for reference in self.modules if (module := reference()) is not None]
        if len(modules) < len(self.modules) or _signature(modules) != self.signature:
            return None
        parameters = [parameter for reference in self.parameters if (parameter := reference()) is not None]
        if len(parameters) < len(self.parameters) or [p.requires_grad for p in parameters] != self.wanted:
            return None
        return [p for p, wanted in zip(parameters, self.wanted, strict=True) if wanted]


def _signature(modules: Sequence[nn.Module]) -> list[list[Any]]:
    """Made by loops that Python does not see: it is asked for in every step."""
    signature: list[list[Any]] = []
    for dicts in ([m._parameters for m in modules], [m._modules for m in modules]):
        held = list(filter(None, dicts))
        signature += (
            list(map(bool, dicts)),
            list(map(len, held)),
            list(chain.from_iterable(held)),
            list(map(id, chain.from_iterable(map(_values, held)))),
        )
    return signature


_values: Any = operator.methodcaller("values")
_walks: Any = WeakIdKeyDictionary()  # model -> _Walk


def trainable(model: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters, in the order of ``model.named_parameters()``, each parameter once. The list of names is the same
    object as long as nothing changed."""
    walk = _walks.get(model)
    parameters = None if walk is None else walk.trainable()
    if walk is None or parameters is None:
        walk = _walks[model] = _Walk(model)
        parameters = walk.trainable()
        assert parameters is not None
    return walk.names, parameters
