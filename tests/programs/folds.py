"""Steps that move the examples: folds, windows, several views of each example, and the way back; and steps that mix examples."""

from __future__ import annotations

from tests.programs.draft import ONE, Draft, Size, Value, const, couples, index, replaced, step, times


@step(2.5)
def fold(d: Draft, v: Value) -> Value | None:
    """(B, T, D) -> (B*T, D), (T, B, D) -> (T*B, D)."""
    if v.rank < 2:
        return None
    a = d.pick([a for a in (v.batch - 1, v.batch) if 0 <= a < v.rank - 1])
    out = [*v.shape[:a], times(v.shape[a], v.shape[a + 1]), *v.shape[a + 2 :]]
    text = f"flatten({a}, {a + 1})" if d.chance(0.6) else f"reshape({', '.join(s.text for s in out)})"
    if a == v.batch:
        return d.bind(f"{v}.{text}", out, v, batch=a, inner=times(v.inner, v.shape[a + 1]))
    return d.bind(f"{v}.{text}", out, v, batch=a, outer=times(v.shape[a], v.outer))


@step(2)
def unfold(d: Draft, v: Value) -> Value | None:
    if v.plain or v.rank > 4:
        return None
    return plain(d, v)


def plain(d: Draft, v: Value) -> Value:
    """The examples in a dimension of their own."""
    parts = [s for s in (v.outer, d.B, v.inner) if s is d.B or s.value > 1]
    at = v.batch + (v.outer.value > 1)
    if len(parts) == 1:
        return v
    text = ", ".join(s.text for s in parts)
    return d.bind(
        f"{v}.unflatten({v.batch}, ({text}))", [*v.shape[: v.batch], *parts, *v.shape[v.batch + 1 :]], v, at, ONE, ONE
    )


@step(1.5)
def windows(d: Draft, v: Value) -> Value | None:
    """(B, 2*w, D) -> (B*2, w, D), as of Swin."""
    a = v.batch + 1
    if a >= v.rank or v.sizes[a] % 2:
        return None
    x = f"{v}.roll(1, {a})" if d.chance(0.4) else v.name
    half = Size(v.sizes[a] // 2, f"{v}.shape[{a}] // 2")
    out = [*v.shape[: v.batch], times(v.shape[v.batch], const(2)), half, *v.shape[a + 1 :]]
    if d.chance(0.5):
        text = f"{x}.unflatten({a}, (2, -1)).flatten({v.batch}, {a})"
    else:
        text = f"{x}.reshape({', '.join(f'({s.text})' if '//' in s.text else s.text for s in out)})"
    return d.bind(text, [s if i != a else s.value for i, s in enumerate(out)], v, inner=times(v.inner, const(2)))


@step(2)
def views(d: Draft, v: Value) -> Value | None:
    """Two or three views of each example along the batch: in turn, or one view after the other."""
    if v.sizes[v.batch] > 16:
        return None
    b, k = v.batch, d.rng.randint(2, 3)
    kind = d.pick(("cat", "repeat", "interleave", "stack", "crops"))
    rows = times(const(k), v.shape[b])
    if kind == "cat":
        others = d.peers(v, lambda u: u.sizes == v.sizes)
        parts = [v.name, *(d.smoothly(d.pick(others).name) for _ in range(k - 1))]
        return d.bind(
            f"torch.cat(({', '.join(parts)}), {b})", replaced(v.shape, b, rows), v, outer=times(const(k), v.outer)
        )
    if kind == "repeat":
        counts = ", ".join(str(k) if i == b else "1" for i in range(v.rank))
        return d.bind(f"{v}.repeat({counts})", replaced(v.shape, b, rows), v, outer=times(const(k), v.outer))
    if kind == "interleave":
        return d.bind(f"{v}.repeat_interleave({k}, {b})", replaced(v.shape, b, rows), v, inner=times(v.inner, const(k)))
    if kind == "stack":
        return d.bind(f"torch.stack(({v}, {v}.sin()), {b}).flatten({b}, {b + 1})", replaced(v.shape, b, times(const(2), v.shape[b])), v,
                      outer=times(const(2), v.outer))  # fmt: skip
    return d.bind(f"torch.stack(({v}, {v} * 2), {b + 1}).flatten({b}, {b + 1})", replaced(v.shape, b, times(v.shape[b], const(2))), v,
                  inner=times(v.inner, const(2)))  # fmt: skip


@step(2)
def views_together(d: Draft, v: Value) -> Value | None:
    """Views of an example meet again."""
    b = v.batch
    if v.outer.value > 1:
        k = v.outer.value
        rows = times(d.B, v.inner)
        if k == 2 and d.chance(0.6):
            how = d.pick(("chunk(2, {b})", "split({rows}, {b})", "tensor_split(2, {b})"))
            d.body.append(f"a, b = {v}.{how.format(b=b, rows=rows.text)}")
            return d.bind(d.pick(("a * b", "a - b.tanh()", "b", "a")), replaced(v.shape, b, rows), v, outer=ONE)
        if d.chance(0.5):
            return d.bind(
                f"{v}.unflatten({b}, ({v.outer.text}, -1)).mean({b})", replaced(v.shape, b, rows), v, outer=ONE
            )
        which = f":{rows.text}" if d.chance(0.5) else f"-{rows.text}:" if "*" not in rows.text else f"-({rows.text}):"
        return d.bind(f"{v}{index(v.rank, b, which)}", replaced(v.shape, b, rows), v, outer=ONE)
    if v.inner.value > 1:
        rows = times(v.outer, d.B)
        text = d.pick(
            ("mean({})", "amax({})", "sum({})", "select({}, 0)")
            if not d.smooth
            else ("mean({})", "sum({})", "select({}, 0)")
        )
        return d.bind(
            f"{v}.unflatten({b}, (-1, {v.inner.text})).{text.format(b + 1)}", replaced(v.shape, b, rows), v, inner=ONE
        )
    return None


@step(0.7)
def per_example_weights(d: Draft, v: Value) -> Value | None:
    """A hypernetwork: a weight for each example, made from its own features."""
    if v.rank != 3 or v.batch != 0 or v.last > 4:
        return None
    I, O = v.last, d.rng.randint(1, 3)
    m = d.module(f"nn.Linear({I}, {I * O})")
    weight = f"{m}({v}.mean(1)).unflatten(-1, ({I}, {O}))"
    text = f"torch.bmm({v}, {weight})" if d.chance(0.6) else f"torch.einsum('bti,bio->bto', {v}, {weight})"
    return d.bind(text, [*v.shape[:2], const(O)], v)


# ------------------------------------------------------------------------------------------------- examples that meet


@couples
def batch_norm(d: Draft, v: Value) -> Value | None:
    if v.batch != 0 or not 2 <= v.rank <= 4 or v.sizes[0] * (v.sizes[2] if v.rank > 2 else 1) < 2:
        return None
    m = d.module(f"nn.BatchNorm{max(v.rank - 2, 1)}d({v.sizes[1]}, track_running_stats={d.chance(0.5)})")
    return d.like(v, f"{m}({v})")


@couples
def statistic(d: Draft, v: Value) -> Value:
    b = v.batch
    return d.like(v, d.pick((
        f"{v} - {v}.mean({b}, keepdim=True)", f"{v} / (0.5 + {v}.abs().amax({b}, keepdim=True))", f"{v} / (1 + {v}.norm())",
        f"{v} * {v}.sum({b}, keepdim=True).tanh()", f"{v} - {v}.detach().mean({b}, keepdim=True)", f"{v} * {v}.mean()",
    )))  # fmt: skip


@couples
def moved(d: Draft, v: Value) -> Value:
    b = v.batch
    return d.like(v, d.pick((
        f"{v} + {v}.roll(1, {b})", f"{v} * {v}.flip({b})", f"{v}.softmax({b})", f"{v}.cumsum({b})", f"{v}.sort({b}).values",
        f"{v} + {v}{index(v.rank, b, ':1')}", f"{v} * {v}.select({b}, -1).unsqueeze({b})",
    )))  # fmt: skip


@couples
def negatives(d: Draft, v: Value) -> Value | None:
    """In-batch negatives, attention over the batch."""
    if v.rank != 2 or v.batch != 0:
        return None
    if d.chance(0.5):
        return d.like(v, f"({v} @ {v}.t()).softmax(-1) @ {v}")
    return d.bind(f"{v} @ {v}.t()", [v.shape[0], v.shape[0]], v)
