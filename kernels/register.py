"""How an op enters ``torch.ops.gnsfx``: its schema, its kernel for every device, its fake kernel."""

from collections.abc import Callable

import torch

# Kept across importlib.reload: an op disappears with the Library that defined it.
_LIBRARY: torch.library.Library = globals().get("_LIBRARY") or torch.library.Library("gnsfx", "FRAGMENT")

_TAGS = (
    torch.Tag.pt2_compliant_tag,
    # Any strides will do; without this Inductor copies an input whose layout differs from the traced one.
    torch.Tag.flexible_layout,
)


def register(schema: str, kernel: Callable, fake: Callable) -> None:
    """Define an op; what is defined already stays as it is."""
    name = schema.partition("(")[0]
    if hasattr(torch.ops.gnsfx, name):  # a second import; the first one's kernels stay
        return
    _LIBRARY.define(schema, tags=_TAGS)
    # Inputs of a call outside a graph may require grad, which out= arguments inside the kernels would refuse.
    _LIBRARY.impl(name, torch.no_grad()(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gnsfx::{name}", fake, lib=_LIBRARY)
