"""Steps whose weight is computed from parameters: merged, masked, normalised, quantised, generated, tied."""

from __future__ import annotations

from tests.programs.draft import Draft, Value, const, replaced, step
from tests.programs.layers import inside


def weight(d: Draft, O: int, I: int) -> str:
    """An expression of shape (O, I)."""
    w = d.parameter(O, I)
    kinds = ["plain", "lora", "masked", "weight_norm", "standardised", "quantised", "hyper", "sum", "transposed", "sliced", "joined", "softmax",
             "squared", "spectral", "scaled", "repeated", "flattened", "where", "triangle", "cumulated", "noise"]  # fmt: skip
    kind = d.pick(kinds)
    if kind == "lora":
        r = d.rng.randint(1, 2)
        return f"({w} + {d.parameter(O, r)} @ {d.parameter(r, I)})"
    if kind == "masked":
        return f"({w} * {d.buffer(f'(torch.rand({O}, {I}) > 0.4).float()')})"
    if kind == "weight_norm":
        if d.chance(0.5):
            return f"torch._weight_norm({w}, {d.parameter(O, 1)}, 0)"
        return f"({d.parameter(O, 1)} * {w} / {w}.norm(dim=1, keepdim=True))"
    if kind == "standardised":
        return f"(({w} - {w}.mean(1, keepdim=True)) / ({w}.var(1, keepdim=True, correction=0) + 0.1).sqrt())"
    if kind == "quantised" and not d.smooth:
        return f"({w} + (({w} * 4).round() / 4 - {w}).detach())"
    if kind == "hyper":
        z = d.rng.randint(1, 3)
        return f"{d.module(f'nn.Linear({z}, {O * I})')}({d.parameter(z)}).view({O}, {I})"
    if kind == "sum":
        return f"({w} + {d.parameter(O, I, again=0.0)})"
    if kind == "transposed":
        return f"{d.parameter(I, O)}.t()"
    if kind == "sliced":
        return f"{d.parameter(O + 1, I + 2)}[1:, :{I}]"
    if kind == "joined" and O > 1:
        return f"torch.cat(({d.parameter(O - 1, I)}, {d.parameter(1, I)}))"
    if kind == "softmax":
        return f"{w}.softmax({d.pick((0, 1))})"
    if kind == "squared":
        return d.pick((f"({w} ** 2)", f"{w}.exp()", f"{w}.tanh()", f"F.normalize({w}, dim=1)"))
    if kind == "spectral":
        u, v = d.buffer(f"F.normalize(torch.rand({O}), dim=0)"), d.buffer(f"F.normalize(torch.rand({I}), dim=0)")
        return f"({w} / (1 + torch.dot({u}, torch.mv({w}, {v})).square()))"
    if kind == "scaled":
        return d.pick((f"({w} * 0.5)", f"(-{w})", f"({w} * {d.parameter()})", f"({w} / 3).clone()"))
    if kind == "repeated" and O % 2 == 0:
        return d.pick((f"{d.parameter(O // 2, I)}.repeat(2, 1)", f"{d.parameter(O // 2, I)}.repeat_interleave(2, 0)"))
    if kind == "flattened":
        return d.pick(
            (
                f"{d.parameter(O * I)}.view({O}, {I})",
                f"{d.parameter(I)}.expand({O}, {I})",
                f"{w}.flip(0)",
                f"{w}.roll(1, 1)",
            )
        )
    if kind == "where":
        return f"torch.where({d.buffer(f'torch.rand({O}, {I}) > 0.5')}, {w}, 0.1)"
    if kind == "triangle":
        return f"{w}.{d.pick(('tril', 'triu'))}()"
    if kind == "cumulated":
        return f"{w}.cumsum({d.pick((0, 1))})"
    if kind == "noise":
        return f"({w} + {d.buffer(f'torch.randn({O}, {I})')} * {w}.detach().abs())"
    return w


@step(4)
def computed_weight(d: Draft, v: Value) -> Value | None:
    if not inside(v):
        return None
    O = d.width()
    W = weight(d, O, v.last)
    if d.chance(0.25):
        d.body.append(f"w = {W}")
        text = f"{d.smoothly(f'F.linear({v}, w)')} * F.linear({v}.cos(), w)"
    else:
        bias = f", {d.parameter(O)}" if d.chance(0.3) else ""
        text = f"F.linear({v}, {W}{bias})" if d.chance(0.6) else f"{v} @ {W}.mT"
    return d.bind(text, replaced(v.shape, -1, const(O)), v)


@step(1)
def computed_kernel(d: Draft, v: Value) -> Value | None:
    """A convolution with a computed weight."""
    if v.rank != 3 or v.batch != 0 or v.sizes[2] < 2:
        return None
    C, O = v.sizes[1], d.width()
    W = f"{weight(d, O, C * 2)}.unflatten(1, ({C}, 2))"
    return d.bind(f"F.conv1d({v}, {W})", [v.shape[0], const(O), v.sizes[2] - 1], v)


@step(0.8)
def computed_affine(d: Draft, v: Value) -> Value | None:
    """Normalisation with a computed scale, and scales that are computed from other parameters."""
    if not inside(v):
        return None
    w = d.pick((f"(1 + {d.parameter(v.last)})", f"{d.parameter(v.last)}.softmax(0)", f"{d.parameter(v.last)}.cumsum(0)",
                f"({d.parameter(v.last)} * {d.parameter()})", f"F.pad({d.parameter(v.last + 1)}, (0, -1))"))  # fmt: skip
    return d.like(v, f"F.layer_norm({v}, ({v.last},), {w})" if d.chance(0.5) else f"{v} * {w}")


@step(2)
def tied_head(d: Draft, v: Value) -> Value | None:
    """A table used once more as a matrix."""
    fits = [(m, V, D) for m, V, D in d.tables if v.last in (V, D)]
    if not fits or not inside(v):
        return None
    m, V, D = d.pick(fits)
    if v.last == D:
        text = d.pick((f"F.linear({v}, {m}.weight)", f"{v} @ {m}.weight.t()", f"F.linear({v}, {m}.weight * 0.5)"))
        return d.bind(text, replaced(v.shape, -1, const(V)), v)
    return d.bind(f"{v} @ {m}.weight", replaced(v.shape, -1, const(D)), v)


@step(1.5)
def lookup(d: Draft, v: Value) -> Value | None:
    """Rows of a table by the ids of each example, added to a value of as many positions."""
    fits = [(i, V) for i, V in d.ids if i.rank == v.rank - 1 and i.sizes == v.sizes[:-1]]
    if not fits or not v.plain or v.batch != 0:
        return None
    i, V = d.pick(fits)
    m = embedding(d, V, v.last)
    text = d.pick((f"{v} + {m}({i})", f"{v} * {m}({i}).tanh()", f"{v} + {m}.weight[{i}]", f"{v} + F.embedding({i}, {m}.weight * 2)",
                   f"{v} * F.embedding({i}, {d.parameter(v.last, V)}.t())", f"{v} + F.one_hot({i}, {V}).to({v}.dtype) @ {m}.weight"))  # fmt: skip
    return d.like(v, text)


def embedding(d: Draft, V: int, D: int) -> str:
    return d.table(V, D, f", padding_idx={d.rng.randrange(V)}" if d.chance(0.3) else "")


@step(0.8)
def split_fields(d: Draft, v: Value) -> Value | None:
    """A parameter for each position, as rows of one matrix."""
    if v.rank != 3 or v.batch != 0:
        return None
    O = d.width()
    w = d.parameter(v.sizes[1], v.last, O)
    text = d.pick(
        (
            f"torch.bmm({v}.transpose(0, 1), {w}).transpose(0, 1)",
            f"torch.einsum('bti,tio->bto', {v}, {w})",
            f"({v}.unsqueeze(-2) @ {w}).squeeze(-2)",
        )
    )
    return d.bind(text, [v.shape[0], v.shape[1], const(O)], v)
