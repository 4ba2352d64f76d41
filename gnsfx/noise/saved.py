"""The state of a noise scale, to be kept with a checkpoint: plain values and tensors, the same on all ranks.

Names are those of the module inside ``torch.compile`` and DistributedDataParallel, so that a run may go on in another
wrapping and on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from gnsfx.errors import StateError
from gnsfx.noise.groups import Grouping
from gnsfx.noise.reading import Host
from gnsfx.noise.series import SERIES_ROWS
from gnsfx.noise.tracking import Columns, Counts, Tracked, columns_of

SCHEMA = "gnsfx.NoiseScale/1"
_KEYS = (
    "model",
    "parameters",
    "groups",
    "members",
    "series",
    "counts",
    "refused",
    "half_life",
    "excluded",
    "unselected",
)


def state_dict(tracked: Tracked | None, host: Host, model: nn.Module) -> dict[str, Any]:
    """Copies, so that the next step does not change them."""
    state: dict[str, Any] = {"schema": SCHEMA, "model": _shapes(model)}
    if tracked is None:
        return state
    names = {name: inner for inner, name in names_of(model).items()}
    return state | {
        "parameters": [names[name] for name in tracked.columns.parameters],
        "groups": [list(group) for group in tracked.columns.groups],
        "members": [list(positions) for positions in tracked.columns.members],
        "series": tracked.series.clone(),
        "counts": tracked.counts.clone(),
        "refused": tracked.refused.clone(),
        "half_life": tracked.half_life.clone(),
        "excluded": {names[name]: reason for name, reason in host.excluded.items()},
        "unselected": [names[name] for name in sorted(host.unselected)],
    }


def load(state: Mapping[str, Any], model: nn.Module, groupings: Mapping[str, Grouping]) -> tuple[Tracked | None, Host]:
    """The state for this model, and what the host knew of it.

    Raises:
        StateError: it is not one, of another version, or of another model.
    """
    schema = state.get("schema") if isinstance(state, Mapping) else None
    if schema != SCHEMA:
        raise StateError(f"this is not the state of a NoiseScale: expected the schema {SCHEMA!r}, got {schema!r}.")
    if not isinstance(state.get("model"), Mapping):
        raise StateError("the state of the NoiseScale is damaged: it lacks the shapes of the model.")
    _compare(state["model"], _shapes(model))
    if "series" not in state:
        return None, Host()
    if missing := [key for key in _KEYS if key not in state]:
        raise StateError(
            f"the state of the NoiseScale lacks {', '.join(missing)}: was it cut off while it was written?"
        )
    try:
        return _restored(state, model, groupings)
    except StateError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"the state of the NoiseScale is damaged: {type(error).__name__}: {error}.") from error


def _restored(state: Mapping[str, Any], model: nn.Module, groupings: Mapping[str, Grouping]) -> tuple[Tracked, Host]:
    names, everything = names_of(model), dict(model.named_parameters())
    parameters = {names[inner]: everything[names[inner]] for inner in state["parameters"]}
    then = columns_in(state, model)
    expected = {
        "series": (SERIES_ROWS, len(then)),
        "counts": (len(Counts()),),
        "refused": (len(parameters),),
        "half_life": (),
    }
    for key, shape in expected.items():
        if not isinstance(state[key], Tensor) or tuple(state[key].shape) != shape:
            raise StateError(
                f"the state of the NoiseScale is damaged: {key} should be a tensor of shape {list(shape)}."
            )
    old = Tracked(then, *(state[key].clone() for key in expected))
    now = old.rearranged(columns_of(parameters, model, groupings))
    now.refused = old.refused
    excluded = {names[inner]: str(reason) for inner, reason in state["excluded"].items()}
    return now, Host(parameters, excluded, {names[inner] for inner in state["unselected"]})


def columns_in(state: Mapping[str, Any], model: nn.Module) -> Columns:
    """What the columns of a state are."""
    names = names_of(model)
    groups = tuple((str(title), str(group)) for title, group in state["groups"])
    who, where = (tuple(map(int, positions)) for positions in state["members"])
    return Columns(tuple(names[inner] for inner in state["parameters"]), groups, (who, where))


def names_of(model: nn.Module) -> dict[str, str]:
    """Name inside the wrappers -> name in ``model.named_parameters()``."""
    wrappers = [n for n, m in model.named_modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    held = sorted((f"{wrapper}.module." if wrapper else "module." for wrapper in wrappers), key=len, reverse=True)
    found = {}
    for name, _ in model.named_parameters():
        inner = name
        for prefix in held:
            if inner.startswith(prefix):
                inner = prefix.removesuffix("module.") + inner.removeprefix(prefix)
        found[inner.replace("_orig_mod.", "")] = name
    return found


def inside(names: Iterable[str], model: nn.Module) -> list[str]:
    """Names in ``model.named_parameters()`` as they are inside the wrappers."""
    inner = {name: inner for inner, name in names_of(model).items()}
    return [inner[name] for name in names if name in inner]


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    parameters = dict(model.named_parameters())
    return {inner: list(parameters[name].shape) for inner, name in names_of(model).items()}


def _compare(then: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> None:
    for name in [*then, *now]:
        if then.get(name) != now.get(name):
            shapes = [f"shape {list(s[name])}" if name in s else "no such parameter" for s in (then, now)]
            raise StateError(
                f"this is the state of another model: {name} has {shapes[0]} in the state and {shapes[1]} in the model. "
                "Load it into the model it was taken from, or start with a new NoiseScale."
            )
