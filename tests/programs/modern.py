"""Steps as of larger models: fused and checkpointed blocks, experts, spectra, writes in place, one weight in several roles."""

from __future__ import annotations

from tests.programs.draft import Draft, Value, const, index, replaced, step
from tests.programs.layers import inside, make_linear
from tests.programs.weights import weight


@step(1.5)
def roles(d: Draft, v: Value) -> Value | None:
    """One computed weight, or slices of one parameter, in several places and signs."""
    if not inside(v):
        return None
    I = v.last
    kind = d.pick(("square", "fused", "difference", "row", "table"))
    if kind == "square":
        d.body.append(f"w = {weight(d, I, I)}")
        inner = d.smoothly(f"({v} @ w)")
        return d.like(
            v,
            d.pick(
                (
                    f"{inner} @ w.mT",
                    f"F.linear({inner}, w) - {v} @ w",
                    f"{inner} - F.linear({v}, 2 * w)",
                    f"F.linear({inner}, -w) @ w",
                )
            ),
        )
    O = d.width()
    if kind == "fused":
        w = d.parameter(3 * O, I)
        d.body.append(
            f"q, k, u = ({v} @ {w}.t()).chunk(3, -1)"
            if d.chance(0.5)
            else f"q, k, u = (F.linear({v}, w) for w in {w}.chunk(3))"
        )
        return d.bind(
            d.pick(("q * k.sigmoid() + u", "q - k * u.tanh()", "q * k * 0.5 - u")), replaced(v.shape, -1, const(O)), v
        )
    if kind == "difference":
        a, b = d.parameter(O, I), d.parameter(O, I, again=0.0)
        d.body.append(f"w = {d.pick((f'{a} - {b}', f'{a} * {b}', f'2 * {a} + {b} / 3', f'torch.lerp({a}, {b}, 0.3)'))}")
        return d.bind(
            f"F.linear({v}, w) + {d.smoothly(f'F.linear({v}.cos(), {d.pick((a, b))})')}",
            replaced(v.shape, -1, const(O)),
            v,
        )
    w = d.parameter(O, I)
    if kind == "row":
        return d.bind(f"F.linear({v} * {w}[0], {w}, {w}.sum(1))", replaced(v.shape, -1, const(O)), v)
    a = d.pick([x for x in range(v.rank) if x not in (v.batch, v.rank - 1)] or [-1])
    rows = (
        f"{w}[torch.arange({v.shape[a].text}) % {O}]" + "[:" + ", None" * (v.rank - 2 - a) + "]"
        if a >= 0
        else f"{w}[0]"
    )
    return d.bind(f"F.linear({v} + {rows}, {w})", replaced(v.shape, -1, const(O)), v)


@step(1)
def checkpointed(d: Draft, v: Value) -> Value | None:
    if not inside(v):
        return None
    a, b = make_linear(d, v.last, d.width() + 1, again=0.0), None
    b = make_linear(d, int(d.init[-1].split(", ")[1].rstrip(")")), v.last)
    return d.like(
        v, f"{v} + torch.utils.checkpoint.checkpoint(lambda z: {b}({d.smoothly(f'{a}(z)')}), {v}, use_reentrant=False)"
    )


@step(1)
def experts(d: Draft, v: Value) -> Value | None:
    """Dense experts with gates, all or the best of them."""
    if not inside(v) or v.rank > 3:
        return None
    E, O = d.rng.randint(2, 3), d.width()
    gate = make_linear(d, v.last, E)
    weights = f"{gate}({v}).softmax(-1)"
    if not d.smooth and d.chance(0.5):
        d.body.append(f"g = {weights}")
        weights = (
            "torch.where(g == g.amax(-1, keepdim=True), g, 0.0)"
            if d.chance(0.5)
            else "g.masked_fill(g < g.median(-1, keepdim=True).values, 0.0)"
        )
    if d.chance(0.5):
        parts = ", ".join(f"{make_linear(d, v.last, O, again=0.1)}({v})" for _ in range(E))
        text = f"(torch.stack(({parts}), -1) * ({weights}).unsqueeze(-2)).sum(-1)"
    else:
        text = f"torch.einsum('...i,eio,...e->...o', {v}, {d.parameter(E, v.last, O)}, {weights})"
    return d.bind(text, replaced(v.shape, -1, const(O)), v)


@step(0.7)
def spectrum(d: Draft, v: Value) -> Value | None:
    if not v.free or d.smooth:
        return None
    a = d.pick(v.free)
    n = v.sizes[a]
    m = n // 2 + 1
    if d.chance(0.5):
        return d.bind(f"torch.view_as_real(torch.fft.rfft({v}, dim={a})).sum(-1)", replaced(v.shape, a, const(m)), v)
    w = d.parameter(m, 2)
    behind = f"[:{', None' * (v.rank - 1 - a)}]" if a < v.rank - 1 else ""
    return d.like(
        v, f"torch.fft.irfft(torch.fft.rfft({v}, dim={a}) * torch.view_as_complex({w}){behind}, n={n}, dim={a})"
    )


@step(1)
def written(d: Draft, v: Value) -> Value | None:
    """Writes into a copy."""
    if not v.free:
        return None
    a = d.pick(v.free)
    at = d.rng.randrange(v.sizes[a])
    name = d.name("z")
    d.body.append(f"{name} = {v}.clone()")
    w = d.parameter()
    d.body.append(d.pick((
        f"{name}{index(v.rank, a, str(at))} = {v}.select({a}, 0).sin() * {w}",
        f"{name}{index(v.rank, a, f'{at}:{at + 1}')}.mul_({w})",
        f"{name}.mul_(0.5).add_({w})",
        f"{name}{index(v.rank, a, str(at))} = {w}",
        f"{name}.select({a}, {at}).add_({v}.mean({a}))",
        f"{name} += {v}.flip({a}) * {w}",
    )))  # fmt: skip
    return d.like(v, f"{name} * 1")


@step(0.7)
def transformer(d: Draft, v: Value) -> Value | None:
    if v.rank != 3 or v.batch == 2 or v.last % 2 or v.last < 2:
        return None
    first = f", norm_first={d.chance(0.5)}" if d.chance(0.5) else ""
    m = d.module(
        f"nn.TransformerEncoderLayer({v.last}, 2, {d.width()}, dropout=0.0, batch_first={v.batch == 0}{first})"
    )
    return d.like(v, f"{m}({v})")


@step(0.7)
def contracted(d: Draft, v: Value) -> Value | None:
    """Several dimensions against one parameter."""
    if v.rank < 3 or v.batch != 0:
        return None
    O = d.width()
    w = d.parameter(*v.sizes[-2:], O)
    if d.chance(0.5):
        return d.bind(f"torch.tensordot({v}, {w}.to({v}.dtype), 2)", [*v.shape[:-2], const(O)], v)
    return d.bind(f"{v}.flatten(-2) @ {w}.flatten(0, 1)", [*v.shape[:-2], const(O)], v)
