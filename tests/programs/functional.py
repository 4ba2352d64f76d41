"""Steps without modules: pointwise, reductions, scans, views, gathers, products of values, and lone parameters."""

from __future__ import annotations

from tests.programs.draft import Draft, Value, const, index, replaced, step, times
from tests.programs.layers import inside

SMOOTH = ("{}.tanh()", "{}.sin()", "F.gelu({})", "F.silu({})", "{}.sigmoid()", "F.softplus({})", "F.gelu({}, approximate='tanh')",
          "{} ** 2 / 4", "{} * {}.sigmoid()", "-{} * 0.5", "1 / (1 + {}.square())", "{} - {}.detach().tanh()", "{}.float().to({}.dtype).cos()",
          "torch.addcmul({}, {}, {}, value=0.1)", "torch.lerp({}, {}.cos(), 0.3)", "{}.exp().clamp(max=9.0)", "F.mish({})")  # fmt: skip
SHARP = ("{}.relu()", "{}.abs()", "F.leaky_relu({})", "{}.clamp(-1, 1)", "F.elu({})", "torch.where({} > 0, {}, {} * 0.3)", "F.hardswish({})",
         "{}.masked_fill({} > 1, 0.0)", "torch.maximum({}, {}.cos())", "F.hardtanh({})")  # fmt: skip


@step(3)
def pointwise(d: Draft, v: Value) -> Value:
    text = d.pick(SMOOTH if d.smooth or d.chance(0.6) else SHARP)
    if ".float" in text:
        text = "{}.cos()"
    return d.like(v, text.replace("{}", v.name))


@step(2)
def residual(d: Draft, v: Value) -> Value | None:
    others = d.peers(v, lambda u: u.sizes == v.sizes and u is not v)
    return d.like(v, f"{v} {d.pick(('+', '*', '-', '+ 0.5 *'))} {d.pick(others)}") if others else None


@step(2)
def along(d: Draft, v: Value) -> Value | None:
    """A map along a dimension without examples."""
    if not v.free:
        return None
    a = d.pick(v.free)
    texts = ["softmax({a})", "log_softmax({a})", "cumsum({a})", "flip({a})", "roll(1, {a})", "roll(-1, {a})"]
    texts += [] if d.smooth else ["sort({a}).values", "sort({a}, descending=True).values", "cummax({a}).values"]
    other = d.pick(v.free)
    if other != a:
        texts += [f"flip({a}, {other})", f"roll((1, 1), ({a}, {other}))", f"softmax({a}).cumsum({other})"]
    if d.chance(0.15):
        return d.like(v, f"F.normalize({v}, dim={a})")
    return d.like(v, f"{v}.{d.pick(texts).format(a=a)}")


@step(2)
def reduction(d: Draft, v: Value) -> Value | None:
    if v.rank < 3:
        return None
    a = d.pick(v.free)
    texts = [
        "mean({})",
        "sum({})",
        "logsumexp({})",
        "softmax({0}).mean({0})",
        "square().mean({}).add(0.1).sqrt()",
        "prod({})",
    ]
    texts += (
        [] if d.smooth else ["amax({})", "max({}).values", "median({}).values", "norm(dim={})", "var({}, correction=0)"]
    )
    texts += ["select({}, -1)", "select({}, 0)", "mean({}) * 2"]
    if d.smooth:
        texts.remove("prod({})")
    if d.chance(0.3):
        text = d.pick(("mean({}, keepdim=True)", "sum({}, keepdim=True)"))
        return d.like(v, f"{v} - {v}.{text.format(a)}")
    out = [s for i, s in enumerate(v.shape) if i != a]
    return d.bind(f"{v}.{d.pick(texts).format(a)}", out, v, batch=v.batch - (a < v.batch))


@step(1)
def several(d: Draft, v: Value) -> Value | None:
    """A reduction over two dimensions, as of a pooled picture."""
    if v.rank < 4:
        return None
    a, b = sorted(d.rng.sample(v.free, 2))
    out = [s for i, s in enumerate(v.shape) if i not in (a, b)]
    text = d.pick(("mean(({}, {}))", "sum(({}, {}))", "logsumexp(({}, {}))", "flatten({0}, {1}).mean({0})"))
    if "flatten" in text and b != a + 1:
        return None
    return d.bind(f"{v}.{text.format(a, b)}", out, v, batch=v.batch - (a < v.batch) - (b < v.batch))


@step(2)
def permute(d: Draft, v: Value) -> Value | None:
    if v.rank < 2:
        return None
    a, b = d.rng.sample(range(v.rank), 2)
    order = list(range(v.rank))
    if v.rank > 2 and d.chance(0.4):
        d.rng.shuffle(order)
        text = f"permute({', '.join(map(str, order))})"
    else:
        order[a], order[b] = b, a
        text = f"transpose({a}, {b})"
    if d.chance(0.3):
        text += ".contiguous()"
    return d.bind(f"{v}.{text}", [v.shape[i] for i in order], v, batch=order.index(v.batch))


@step(1.5)
def cut(d: Draft, v: Value) -> Value | None:
    """Slices and pieces of a dimension."""
    if not v.free:
        return None
    a = d.pick(v.free)
    n = v.sizes[a]
    kind = d.pick(("slice", "stride", "chunk", "split", "narrow", "select", "unbind"))
    if n < 2:
        return None
    if kind == "slice":
        start = d.rng.randint(0, n - 1)
        stop = d.rng.randint(start + 1, n)
        return d.bind(f"{v}{index(v.rank, a, f'{start}:{stop}')}", replaced(v.shape, a, const(stop - start)), v)
    if kind == "stride":
        return d.bind(f"{v}{index(v.rank, a, '::2')}", replaced(v.shape, a, (n + 1) // 2), v)
    if kind == "narrow":
        return d.bind(f"{v}.narrow({a}, 1, {n - 1})", replaced(v.shape, a, const(n - 1)), v)
    if kind in ("chunk", "split") and n % 2 == 0:
        d.body.append(f"a, b = {v}.{'chunk(2' if kind == 'chunk' else f'split({n // 2}'}, {a})")
        return d.bind(d.pick(("a * b.sigmoid()", "a - b", "a * b", "a")), replaced(v.shape, a, const(n // 2)), v)
    if kind == "unbind" and v.rank > 2:
        out = [s for i, s in enumerate(v.shape) if i != a]
        return d.bind(f"{v}.unbind({a})[-1] * {v}.unbind({a})[0]", out, v, batch=v.batch - (a < v.batch))
    if n % 2 == 0:
        return d.bind(f"F.glu({v}, {a})", replaced(v.shape, a, const(n // 2)), v)
    return None


@step(1.5)
def join(d: Draft, v: Value) -> Value | None:
    """Concatenation along a dimension without examples, and stacks."""
    others = d.peers(v, lambda u: u.sizes == v.sizes)
    u = d.pick(others)
    if d.chance(0.3) and v.rank < 5:
        at = d.rng.randint(0, v.rank)
        return d.bind(
            f"torch.stack(({v}, {u}.cos()), {at})",
            [*v.shape[:at], const(2), *v.shape[at:]],
            v,
            batch=v.batch + (at <= v.batch),
        )
    if not v.free:
        return None
    a = d.pick(v.free)
    return d.bind(f"torch.cat(({v}, {d.smoothly(u.name)}), {a})", replaced(v.shape, a, 2 * v.sizes[a]), v)


@step(1)
def pad(d: Draft, v: Value) -> Value | None:
    if not v.free or v.sizes[v.free[-1]] > 6:
        return None
    a = d.pick(v.free)
    before, after = d.rng.randint(0, 2), d.rng.randint(0, 1)
    zeros = "0, 0, " * (v.rank - 1 - a)
    return d.bind(f"F.pad({v}, ({zeros}{before}, {after}))", replaced(v.shape, a, v.sizes[a] + before + after), v)


@step(1.5)
def widen(d: Draft, v: Value) -> Value | None:
    """A new dimension: repeated, or of products."""
    if v.rank > 3 or (v.rank == 1 and v.batch):
        return None
    kind = d.pick(("expand", "outer", "repeat", "interleave"))
    if kind == "outer" and inside(v) and v.rank > 1:
        return d.bind(f"{v}.unsqueeze(-1) * {v}.unsqueeze(-2).sin()", [*v.shape, v.shape[-1]], v)
    if kind in ("repeat", "interleave") and v.free:
        a = d.pick(v.free)
        counts = ", ".join("2" if i == a else "1" for i in range(v.rank))
        text = f"repeat({counts})" if kind == "repeat" else f"repeat_interleave(2, {a})"
        return d.bind(f"{v}.{text}", replaced(v.shape, a, 2 * v.sizes[a]), v)
    at, k = d.rng.randint(0, v.rank), d.rng.randint(2, 3)
    counts = ", ".join(str(k) if i == at else "-1" for i in range(v.rank + 1))
    h = d.bind(
        f"{v}.unsqueeze({at}).expand({counts})",
        [*v.shape[:at], const(k), *v.shape[at:]],
        v,
        batch=v.batch + (at <= v.batch),
    )
    return d.like(h, f"{h} * {d.parameter(*(k if i == at else 1 for i in range(h.rank)))}") if d.chance(0.6) else h


@step(1)
def narrow_down(d: Draft, v: Value) -> Value | None:
    """Flatten two neighbours without examples, or split one."""
    if d.chance(0.5):
        pairs = [a for a in range(v.rank - 1) if v.batch not in (a, a + 1)]
        if not pairs:
            return None
        a = d.pick(pairs)
        out = [*v.shape[:a], times(v.shape[a], v.shape[a + 1]), *v.shape[a + 2 :]]
        text = f"flatten({a}, {a + 1})" if d.chance(0.6) else f"reshape({', '.join(s.text for s in out)})"
        return d.bind(f"{v}.{text}", out, v, batch=v.batch - (a < v.batch))
    even = [a for a in v.free if v.sizes[a] % 2 == 0]
    if not even or v.rank > 4:
        return None
    a = d.pick(even)
    parts = d.pick(((-1, 2), (2, -1)))
    out = [*v.shape[:a], *(const(2) if p == 2 else v.sizes[a] // 2 for p in parts), *v.shape[a + 1 :]]
    return d.bind(f"{v}.unflatten({a}, {parts})", out, v, batch=v.batch + (a < v.batch))


@step(1)
def spatial(d: Draft, v: Value) -> Value | None:
    """Pooling and resampling."""
    if v.batch != 0 or v.rank not in (3, 4):
        return None
    n = v.rank - 2
    kind = d.pick(("avg", "max", "adaptive", "nearest", "linear", "shuffle", "unfold"))
    size = v.sizes[2:]
    if kind == "shuffle" and n == 2 and v.sizes[1] % 4 == 0:
        return d.bind(f"F.pixel_shuffle({v}, 2)", [v.shape[0], v.sizes[1] // 4, 2 * size[0], 2 * size[1]], v)
    if kind == "unfold" and n == 2 and min(size) >= 2:
        return d.bind(f"F.unfold({v}, 2)", [v.shape[0], v.sizes[1] * 4, (size[0] - 1) * (size[1] - 1)], v)
    if kind == "adaptive":
        k = d.rng.randint(1, 2)
        return d.bind(f"F.adaptive_avg_pool{n}d({v}, {k})", [*v.shape[:2], *(const(k) for _ in size)], v)
    if kind == "linear" and max(size) <= 5:
        mode = d.pick(("linear", "linear") if n == 1 else ("bilinear", "bicubic"))
        corners = d.chance(0.3)
        return d.bind(
            f"F.interpolate({v}, scale_factor=2, mode='{mode}', align_corners={corners})",
            [*v.shape[:2], *(2 * s for s in size)],
            v,
        )
    if kind == "nearest" and max(size) <= 5:
        return d.bind(f"F.interpolate({v}, scale_factor=2)", [*v.shape[:2], *(2 * s for s in size)], v)
    if min(size) < 2 or (kind == "max" and d.smooth):
        return None
    stride = d.rng.randint(1, 2)
    out = [(s - 2) // stride + 1 for s in size]
    return d.bind(f"F.{'max' if kind == 'max' else 'avg'}_pool{n}d({v}, 2, {stride})", [*v.shape[:2], *out], v)


@step(2)
def choose(d: Draft, v: Value) -> Value | None:
    """Gathers along dimensions without examples: by constants, by sorting, by indices of each example."""
    if not v.free:
        return None
    a = d.pick(v.free)
    n, k = v.sizes[a], d.rng.randint(1, v.sizes[a])
    kind = d.pick(("select", "index", "topk", "argsort", "mask", "own", "gather", "onehot"))
    if kind in ("select", "index"):
        rows = d.buffer(f"torch.tensor({[d.rng.randrange(n) for _ in range(k)]})")
        text = f"{v}.index_select({a}, {rows})" if kind == "select" else f"{v}{index(v.rank, a, rows)}"
        return d.bind(text, replaced(v.shape, a, const(k)), v)
    if kind == "topk" and not d.smooth:
        return d.bind(f"{v}.topk({k}, {a}).values", replaced(v.shape, a, const(k)), v)
    if kind == "argsort" and not d.smooth:
        return d.like(v, f"{v}.sin().gather({a}, {v}.argsort({a}))")
    if kind == "mask":
        c = d.buffer(f"torch.rand({n}) > 0.5")
        shape = [1] * v.rank
        shape[a] = n
        return d.like(v, f"{v}.masked_fill({c}.view({', '.join(map(str, shape))}), 0.5)")
    if kind == "gather" and not d.smooth:
        return d.bind(f"{v}.gather({a}, {v}.argmax({a}, keepdim=True))", replaced(v.shape, a, const(1)), v)
    if kind == "onehot" and not d.smooth and v.rank < 4 and a == v.rank - 1:
        m = d.table(n, n)
        return d.bind(f"{m}({v}.argmax(-1)) * {v}.sum(-1, keepdim=True)", [*v.shape[:-1], const(n)], v)
    if kind == "own" and v.batch == 0 and v.plain and v.rank > 1:
        i = d.add_input("i", v.sizes[1], (v.shape[0],))
        return d.bind(f"{v}[torch.arange({v.shape[0].text}), {i}]", [v.shape[0], *v.shape[2:]], v)
    return None


@step(1.5)
def product(d: Draft, v: Value) -> Value | None:
    """A matrix product of an example with itself, or of two values of one example."""
    if v.rank != 3 or v.batch != 0:
        return None
    u = d.pick(d.peers(v, lambda u: u.sizes == v.sizes))
    kind = d.pick(("gram", "mix", "einsum", "cdist"))
    if kind == "gram":
        return d.bind(f"({v} @ {u}.transpose(1, 2)).tanh()", [v.shape[0], v.shape[1], v.shape[1]], v)
    if kind == "mix":
        return d.like(v, f"({v} @ {u}.mT).softmax(-1) @ {v}")
    if kind == "einsum":
        return d.bind(f"torch.einsum('bti,btj->bij', {v}, {u}).sin()", [v.shape[0], v.shape[2], v.shape[2]], v)
    if d.smooth:
        return None  # there is no cdist in bf16
    return d.bind(f"torch.cdist({v}, {u}.cos()).square()", [v.shape[0], v.shape[1], v.shape[1]], v)
