"""Parameters without a layer: temperatures, scales, shifts, tables of positions, class tokens."""

from __future__ import annotations

from tests.programs.draft import Draft, Value, const, replaced, step
from tests.programs.layers import inside


@step(3)
def lone_parameter(d: Draft, v: Value) -> Value | None:
    """Temperatures, scales, shifts and position tables."""
    kind = d.pick(
        ("temperature", "scale", "channel", "full", "sliced", "positions", "token", "clamp", "einsum", "matvec")
    )
    if kind == "temperature" or not v.free:
        return d.like(
            v,
            d.pick(
                (
                    f"{v} * {d.parameter()}.exp()",
                    f"{v} / (1 + {d.parameter()} ** 2)",
                    f"{v} * {d.parameter()}",
                    f"({v} + {d.parameter()})",
                )
            ),
        )
    a = d.pick(v.free)
    n, behind = v.sizes[a], v.rank - 1 - a
    spread = f"[:{', None' * behind}]" if behind else ""
    if kind in ("scale", "channel"):
        w = f"{d.parameter(n)}{spread}" if kind == "scale" else d.parameter(n, *[1] * behind)
        return d.like(v, f"{v} {d.pick(('*', '+', '-'))} {w}")
    if kind == "full":
        shape = [1 if i == v.batch or d.chance(0.2) else s for i, s in enumerate(v.sizes)]
        return d.like(v, f"{v} {d.pick('+*')} {d.parameter(*shape)}")
    if kind == "sliced":
        return d.like(
            v, f"{v} * {d.parameter(n + 2)}[{d.pick((f':{v.shape[a].text}', f'2:2 + {v.shape[a].text}'))}]{spread}"
        )
    if kind == "positions" and inside(v) and a != v.rank - 1:
        m = d.table(n + d.rng.randint(0, 2), v.last)
        rest = "[:" + ", None" * (v.rank - 2 - a) + "]" if a != v.rank - 2 else ""
        return d.like(v, f"{v} + {m}(torch.arange({v.shape[a].text})){rest}")
    if kind == "token":
        shape = [1 if i == v.batch else s for i, s in enumerate(v.sizes)]
        shape[a] = 1
        token = f"{d.parameter(*shape)}.expand({', '.join(v.shape[v.batch].text if i == v.batch else '-1' for i in range(v.rank))})"
        order = (token, v.name) if d.chance(0.7) else (v.name, token)
        return d.bind(f"torch.cat(({', '.join(order)}), {a})", replaced(v.shape, a, n + 1), v)
    if kind == "clamp" and not d.smooth:
        return d.like(v, f"torch.maximum({v}, {d.parameter(n)}{spread}) + {v}.clamp({d.parameter(n)}{spread} - 1)")
    letters = "abcdef"[: v.rank]
    if kind == "einsum" and v.rank <= 4:
        O = d.width()
        per = d.chance(0.3) and len(v.free) > 1
        b = d.pick([x for x in v.free if x != a]) if per else a
        weight = (letters[b] if per else "") + letters[a] + "o"
        sizes = [*([v.sizes[b]] if per else []), n, O]
        out = letters.replace(letters[a], "o")
        return d.bind(
            f"torch.einsum('{letters},{weight}->{out}', {v}, {d.parameter(*sizes)})", replaced(v.shape, a, const(O)), v
        )
    if kind == "matvec" and inside(v) and v.rank > 2:
        return d.bind(f"{v} @ {d.parameter(v.last)}", v.shape[:-1], v)
    return None
