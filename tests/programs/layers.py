"""Steps that apply layers of ``torch.nn``."""

from __future__ import annotations

from tests.programs.draft import Draft, Value, const, index, replaced, step


def inside(v: Value) -> bool:
    """Whether the last dimension is one of features."""
    return v.batch != v.rank - 1


def make_linear(d: Draft, I: int, O: int, again: float = 0.35) -> str:
    return d.module(f"nn.Linear({I}, {O}{', bias=False' if d.chance(0.25) else ''})", again)


@step(4)
def linear(d: Draft, v: Value) -> Value | None:
    if not inside(v):
        return None
    O = d.width()
    x = f"{v}.detach()" if d.chance(0.05) else f"{v}"
    return d.bind(f"{make_linear(d, v.last, O)}({x})", replaced(v.shape, -1, const(O)), v)


@step(2.5)
def shared_linear(d: Draft, v: Value) -> Value | None:
    """One layer several times: on other lengths, detached, transposed, in a loop."""
    if not inside(v):
        return None
    I, O = v.last, d.width()
    kind = d.pick(("shorter", "detached", "pooled", "transposed", "loop", "scaled"))
    out = replaced(v.shape, -1, const(O))
    dims = [a for a in v.free if a != v.rank - 1]
    m = make_linear(d, I, I if kind in ("loop",) else O)
    if kind in ("shorter", "pooled") and dims:
        a = d.pick(dims)
        part = (
            f"{v}{index(v.rank, a, ':1' if d.chance(0.5) else '::2')}"
            if kind == "shorter"
            else f"{v}.mean({a}, keepdim=True)"
        )
        return d.bind(f"{m}({v}) {d.pick('+*')} {d.smoothly(f'{m}({part})')}.sum({a}, keepdim=True)", out, v)
    if kind == "detached":
        return d.bind(f"{d.smoothly(f'{m}({v})')} * {m}({v}.detach())", out, v)
    if kind == "transposed":
        return d.like(v, f"F.linear({d.smoothly(f'{m}({v})')}, {m}.weight.t())")
    if kind == "loop":
        h = f"{v}"
        for _ in range(d.rng.randint(2, 3)):
            h = d.smoothly(f"{m}({h})")
        return d.like(v, h)
    return d.bind(f"{m}({v}) + 2 * F.linear({d.smoothly(f'{v}')}, -{m}.weight / 3)", out, v)


@step(2)
def norm(d: Draft, v: Value) -> Value | None:
    if not inside(v):
        return None
    both = v.rank > 2 and v.batch < v.rank - 2 and d.chance(0.2)
    if v.last * (v.sizes[-2] if both else 1) < 2:
        return None  # all that comes before would get a gradient of rounding alone
    shape = f"({v.sizes[-2]}, {v.last})" if both else f"{v.last}"
    options = d.pick(("", "", ", bias=False"))
    kind = "nn.RMSNorm" if d.chance(0.4) else "nn.LayerNorm"
    m = d.module(f"{kind}({shape}{options if kind == 'nn.LayerNorm' else ''})")
    return d.like(v, f"{m}({v})")


@step(1.5)
def channel_norm(d: Draft, v: Value) -> Value | None:
    if v.batch != 0 or v.rank < 2:
        return None
    C = v.sizes[1]
    spatial = 1
    for s in v.sizes[2:]:
        spatial *= s
    if v.rank in (3, 4) and spatial > 1 and d.chance(0.4):
        m = d.module(f"nn.InstanceNorm{v.rank - 2}d({C}, affine=True)")
    else:
        groups = d.pick([g for g in range(1, C + 1) if C % g == 0])
        if C // groups * spatial < 2:
            return None
        m = d.module(f"nn.GroupNorm({groups}, {C})")
    return d.like(v, f"{m}({v})")


@step(3)
def convolution(d: Draft, v: Value) -> Value | None:
    if v.batch != 0 or v.rank not in (3, 4, 5):
        return None
    n, C, spatial = v.rank - 2, v.sizes[1], v.sizes[2:]
    groups = d.pick([g for g in (1, 1, 2, C) if C % g == 0])
    O = groups * d.rng.randint(1, 2) if groups > 1 else d.width()
    kernel, dilation = d.rng.randint(1, 3), d.pick((1, 1, 2))
    stride, padding = d.pick((1, 1, 2)), d.rng.randint(0, 2)
    options = f"{C}, {O}, {kernel}"
    given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if d.chance(0.25):
        extra = d.rng.randint(0, max(stride, dilation) - 1)
        out = [(s - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1 for s in spatial]
        if min(out) < 1 or extra >= max(stride, dilation):
            return None
        text = "".join(
            f", {k}={x}" for k, x in {**given, "output_padding": extra}.items() if x != (0 if "pad" in k else 1)
        )
        bias = ", bias=False" if d.chance(0.2) else ""
        m = d.module(f"nn.ConvTranspose{n}d({options}{text}{bias})")
        return d.bind(f"{m}({v})", [v.shape[0], const(O), *out], v)
    if min(spatial) + 2 * padding < dilation * (kernel - 1) + 1:
        return None
    out = [(s + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for s in spatial]
    mode = d.pick(("zeros", "zeros", "reflect", "replicate", "circular"))
    if n == 3 or padding == 0 or padding >= min(spatial):
        mode = "zeros"
    text = "".join(f", {k}={x}" for k, x in given.items() if x != (0 if "pad" in k else 1))
    text += ", bias=False" if d.chance(0.2) else ""
    text += f", padding_mode='{mode}'" if mode != "zeros" else ""
    m = d.module(f"nn.Conv{n}d({options}{text})")
    x = f"{v}.contiguous(memory_format=torch.channels_last)" if n == 2 and d.chance(0.1) else f"{v}"
    return d.bind(f"{m}({x})", [v.shape[0], const(O), *out], v)


@step(0.7)
def bilinear(d: Draft, v: Value) -> Value | None:
    if not inside(v) or d.smooth:  # autocast leaves its inputs in two dtypes
        return None
    O = d.width()
    others = d.peers(v, lambda u: u.sizes[:-1] == v.sizes[:-1])
    u = d.pick(others)
    m = d.module(f"nn.Bilinear({v.last}, {u.last}, {O}{', bias=False' if d.chance(0.2) else ''})")
    return d.bind(f"{m}({v}, {u})", replaced(v.shape, -1, const(O)), v)


@step(1.5)
def attention_layer(d: Draft, v: Value) -> Value | None:
    if v.rank != 3 or v.batch == 2:
        return None
    E = v.last
    heads = d.pick([h for h in (1, 2, E) if E % h == 0])
    options = "".join(o for o in (", bias=False", ", add_bias_kv=True") if d.chance(0.15))
    m = d.module(f"nn.MultiheadAttention({E}, {heads}, batch_first={v.batch == 0}{options})")
    L = v.shape[1 - v.batch]
    mask = ""
    if "add_bias_kv" not in options and d.chance(0.3):
        causal = d.buffer(f"torch.ones({L.value}, {L.value}).triu(1).bool()")
        mask = f", attn_mask={causal}[:{L.text}, :{L.text}]"
    weights = ", need_weights=False" if d.chance(0.5) else ""
    others = d.peers(v, lambda u: u.sizes == v.sizes)
    u = d.pick(others) if d.chance(0.3) else v
    return d.like(v, f"{m}({v}, {u}, {u}{mask}{weights})[0]")


@step(1.5)
def own_attention(d: Draft, v: Value) -> Value | None:
    """Heads by hand, with a relative bias, a mask or none."""
    if v.rank != 3 or v.batch != 0:
        return None
    N, T, E = v.shape
    H = d.pick([h for h in (1, 2, 3) if h <= 4])
    size = d.rng.randint(1, 3)
    if d.chance(0.5):
        m = make_linear(d, E.value, 3 * H * size)
        d.body.append(f"q, k, v = {m}({v}).chunk(3, -1)")
    else:
        a, b, c = (make_linear(d, E.value, H * size) for _ in range(3))
        d.body.append(f"q, k, v = {a}({v}), {b}({v}), {c}({v})")
    d.body.append(f"q, k, v = (z.unflatten(-1, ({H}, {size})).transpose(1, 2) for z in (q, k, v))")
    bias = ""
    kind = d.pick(("none", "relative", "learned", "causal"))
    if kind == "relative":
        offsets = d.buffer(f"torch.arange({T.value})[:, None] - torch.arange({T.value})[None] + {T.value - 1}")
        bias = f"{d.table(2 * T.value - 1, H)}({offsets}).permute(2, 0, 1)"
    elif kind == "learned":
        bias = d.parameter(*d.pick(((T.value, T.value), (H, T.value, T.value), (1, H, 1, T.value))))
    elif kind == "causal":
        bias = d.buffer(f"torch.full(({T.value}, {T.value}), -1e4).triu(1)")
    if d.chance(0.5):
        options = f", attn_mask={bias}" if bias and kind != "causal" else ", is_causal=True" if bias else ""
        y = f"F.scaled_dot_product_attention(q, k, v{options})"
    else:
        scores = f"q @ k.transpose(-2, -1) / {size} ** 0.5" + (f" + {bias}" if bias else "")
        if d.chance(0.3):
            y = f"torch.einsum('bhts,bhsd->bhtd', ({scores}).softmax(-1), v)"
        else:
            y = f"({scores}).softmax(-1) @ v"
    y = (
        f"({y}).transpose(1, 2).flatten(2)"
        if d.chance(0.5)
        else f"({y}).transpose(1, 2).reshape({N.text}, {T.text}, {H * size})"
    )
    return d.bind(y, [N, T, const(H * size)], v)


@step(1)
def prelu(d: Draft, v: Value) -> Value | None:
    if d.smooth or v.batch == 1 or v.rank < 2:
        return None
    C = v.sizes[1] if v.batch != 1 and d.chance(0.5) else 1
    return d.like(v, f"{d.module(f'nn.PReLU({C})' if C > 1 else 'nn.PReLU()')}({v})")


@step(1)
def recurrence(d: Draft, v: Value) -> Value | None:
    """A cell, or two lines by hand, over dimension 1."""
    if v.rank != 3 or v.batch == 2:
        return None
    t = 1 - v.batch
    length, I, O = v.sizes[t], v.last, d.width()
    d.body.append(f"s = {v}.new_zeros({v.shape[v.batch].text}, {O})")
    kind = d.pick(("GRUCell", "RNNCell", "hand", "scan"))
    if kind in ("GRUCell", "RNNCell"):
        update = f"{d.module(f'nn.{kind}({I}, {O})')}({v}.select({t}, t), s)"
    elif kind == "hand":
        update = f"({make_linear(d, I, O)}({v}.select({t}, t)) + {make_linear(d, O, O)}(s)).tanh()"
    else:
        update = f"s * {d.parameter(O)}.sigmoid() + {make_linear(d, I, O)}({v}.select({t}, t))"
    if d.chance(0.5):
        d.body += [f"for t in range({length}):", f"    s = {update}"]
        return d.bind("s", [v.shape[v.batch], const(O)], v, batch=0)
    d.body += ["states = []", f"for t in range({length}):", f"    s = {update}", "    states.append(s)"]
    return d.bind(f"torch.stack(states, {t})", replaced(v.shape, -1, const(O)), v)
