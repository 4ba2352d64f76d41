"""How models are really written: sharing, broadcasting, folding, reparametrising, and what code does around a graph.

Each function takes the module and a batch; the module's parts are given beside it. Everything must be measured, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from gnsfx import per_example_sq_norms, sq_norms
from gnsfx.coverage import coverage
from tests import oracle
from tests.passes.models import Model, linear, parameter, table
from tests.zoo import MLP, GPTBlock, floats, ids, squares

B, T, D = 3, 4, 4
CASES: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {}
EAGER = {"gns.inner": "eager", "gns.per_example": True}


def rows(name: str, function: Callable[..., Any], *shapes: tuple[int, ...], **parts: Callable[[], Any]) -> None:
    """The result, or the first of several, has a row per example."""

    def build() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        inputs = [floats(*s) for s in shapes or [(B, T, D)]]
        model = Model(function, **{n: p() for n, p in parts.items()}).double()
        return model, lambda m: squares(m(*inputs))

    CASES[name] = build


def tokens(name: str, function: Callable[..., Any], **parts: Callable[[], Any]) -> None:
    def build() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        values = ids(7, B, T)
        return Model(function, **{n: p() for n, p in parts.items()}).double(), lambda m: squares(m(values))

    CASES[name] = build


def assert_exact(build: Callable[[], Any], compiled: Callable[[nn.Module], Any] | None = None) -> None:
    """Every parameter with a gradient is measured, like per-example autograd says; gradients are those of eager mode."""

    def fresh() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        torch.manual_seed(0)
        return build()

    model, losses = fresh()
    truth = oracle.per_example_sq_norms(model, losses(model))
    model, losses = fresh()
    losses(model).mean().backward()
    gradients = oracle.gradients(model)
    model, losses = fresh()
    losses((compiled or compile_)(model)).mean().backward()
    assert [(r.name, r.reason) for r in coverage(model) if r.name in gradients and r.status != "measured"] == []
    norms, sums, bound = per_example_sq_norms(model), sq_norms(model), oracle.tolerance(torch.float64)
    truth = {n: t for n, t in truth.items() if n in norms}
    assert set(gradients) <= set(truth)
    assert oracle.names_beyond(norms, truth, bound) == []
    assert (
        oracle.names_beyond({n: s[None] for n, s in sums.items()}, {n: t.sum()[None] for n, t in truth.items()}, bound)
        == []
    )
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, expected in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=bound, atol=bound * largest)


def compile_(model: nn.Module) -> Any:
    return torch.compile(model, backend="gns", options=EAGER)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


# fmt: off
# ------------------------------------------------------------------------------------------------ shared in one example

rows("albert", lambda m, x: torch.cat((m.a(m.a(x)), m.a(x[:, :2]), m.a(x.detach())), 1), a=lambda: GPTBlock(D, 2))
tokens("factorised_table", lambda m, i: F.linear(F.linear(m.a(m.p(m.e(i))), m.p.weight.t()), m.e.weight),
       e=table(7, 3), p=linear(3, 4), a=lambda: GPTBlock(D, 2))
tokens("table_in_slices", lambda m, i: torch.cat((F.linear(m.e(i), m.e.weight[:3]), F.linear(m.e(i), m.e.weight[3:])), -1), e=table(7, 4))

# -------------------------------------------------------------------------------------- looked up once, then broadcast


def _heads(x: Tensor) -> tuple[Tensor, ...]:
    return x.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _t5(m: Any, x: Tensor) -> Tensor:
    q, k, v = _heads(m.qkv(x))
    distance = torch.arange(T)[None] - torch.arange(T)[:, None]
    buckets = (distance > 0).long() * 4 + distance.abs().clamp(max=3)
    return ((q @ k.mT + m.table(buckets).permute(2, 0, 1).unsqueeze(0)).softmax(-1) @ v).transpose(1, 2).flatten(2)


def _swin(m: Any, x: Tensor) -> Tensor:
    """Shifted windows of 2 x 2 with a table of relative positions and a mask for each window."""
    n = x.shape[0]
    x = torch.roll(x, (-1, -1), (1, 2)).view(n, 2, 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, D)
    q, k, v = _heads(m.qkv(x))
    scores = q @ k.mT + m.table[m.index.view(-1)].view(4, 4, 2).permute(2, 0, 1)
    scores = (scores.view(-1, 4, 2, 4, 4) + m.mask[None, :, None]).view(-1, 2, 4, 4)
    x = m.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, D))
    return torch.roll(x.view(n, 2, 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 4, D), (1, 1), (1, 2))


def _swin_v2(m: Any, x: Tensor) -> Tensor:
    """Cosine attention, a clamped scale, and positions from a small network."""
    q, k, v = _heads(m.qkv(x))
    bias = 16 * torch.sigmoid(m.net(m.coordinates)[torch.arange(T)[:, None] - torch.arange(T) + T - 1]).permute(2, 0, 1)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * m.scale.clamp(max=4).exp() + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


rows("t5", _t5, qkv=linear(4, 12), table=table(8, 2))
rows("swin", _swin, (B, 4, 4, D), qkv=linear(4, 12), out=linear(4, 4), table=parameter(9, 2), index=lambda: torch.randint(9, (4, 4)),
     mask=lambda: torch.randn(4, 4, 4))
rows("swin_v2", _swin_v2, qkv=linear(4, 12), net=lambda: MLP(2, 5, 2), coordinates=lambda: torch.randn(2 * T - 1, 2), scale=parameter(2, 1, 1))
rows("queries", lambda m, x: m.a(m.q.weight[None].repeat(x.shape[0], 1, 1), x, x)[0], q=table(3, D),
     a=lambda: nn.MultiheadAttention(D, 2, batch_first=True))
rows("two_tokens", lambda m, x: torch.cat((m.c.expand(x.shape[0], -1, -1), m.d + x.new_zeros(x.shape[0], 1, D), x), 1) + m.p,
     c=parameter(1, 1, D), d=parameter(D), p=parameter(1, T + 2, D))
rows("mask_token", lambda m, x: m.a(torch.where(x[..., :1] > 0, m.token, x)), token=parameter(D), a=linear(D, 2))
rows("masked_autoencoder",
     lambda m, x: (lambda order: m.a(torch.cat((x.gather(1, order[:, :2, None].expand(-1, -1, D)), m.token.repeat(x.shape[0], 2, 1)), 1)
                                     .gather(1, order.argsort(1)[..., None].expand(-1, -1, D))))(x[..., 0].argsort(1)),
     token=parameter(1, 1, D), a=linear(D, 2))
rows("mixed_layers", lambda m, x: (torch.stack((x, m.a(x), x.sin())) * m.w.softmax(0)[:, None, None, None]).sum(0), w=parameter(3), a=linear(D, D))
rows("first_state", lambda m, x: m.c(x[:, 1], m.c(x[:, 0], m.h.expand(x.shape[0], -1))), h=parameter(1, 3), c=lambda: nn.GRUCell(D, 3))
rows("carried_state", lambda m, x: m.b(m.h).tanh() + m.a(x[:, 0]), h=lambda: torch.randn(B, D), a=linear(D, D), b=linear(D, D))

# ------------------------------------------------------------------------------------------------------------- folding

rows("interleaved", lambda m, x: m.a(m.e(x).repeat_interleave(2, 0) * m.c.repeat(x.shape[0], 1)).view(x.shape[0], 2, -1), (B, D),
     e=linear(D, D), a=linear(D, 3), c=parameter(2, D))
rows("every_other_row", lambda m, x, y: (lambda z: z[::2] * z[1::2])(m.a(torch.stack((x, y), 1).flatten(0, 1)).tanh()), (B, D), (B, D),
     a=linear(D, 3))
rows("one_of_three", lambda m, x: m.a(m.e(x).repeat_interleave(6, 0)[1::3]).tanh()[1::2], (B, D), e=linear(D, D), a=linear(D, 3))
rows("beams", lambda m, x: m.a((m.e(x)[:, None] + m.q).flatten(0, 1)).log_softmax(-1).view(x.shape[0], -1).topk(3).values, (B, D),
     e=linear(D, D), a=linear(D, 3), q=parameter(2, D))
rows("crops", lambda m, x: m.g(m.a(x.flatten(0, 1))).relu().mean((2, 3)).unflatten(0, x.shape[:2]).amax(1), (B, 2, 3, 5, 5),
     a=lambda: nn.Conv2d(3, 4, 3), g=lambda: nn.GroupNorm(2, 4))
rows("triplet", lambda m, *x: (lambda a, p, n: torch.stack(((a - p).norm(dim=-1), (a - n).norm(dim=-1)), 1))(*m.a(torch.cat(x)).split(x[0].shape[0])),
     (B, D), (B, D), (B, D), a=linear(D, 3))
rows("heads_first", lambda m, x: (lambda q: ((q @ q.mT).softmax(-1) @ q).view(2, *x.shape[:2], -1).permute(1, 2, 0, 3))(
     m.a(x).view(*x.shape[:2], 2, 2).permute(2, 0, 1, 3).flatten(0, 1)), a=linear(D, D))
rows("axial", lambda m, x: (lambda r: m.a(r, r, r)[0].unflatten(0, x.shape[:2]).transpose(1, 2).reshape(-1, 3, D))(x.flatten(0, 1)).view(x.shape),
     (B, 3, 3, D), a=lambda: nn.MultiheadAttention(D, 2, batch_first=True))

# ---------------------------------------------------------------------------------------------------- reparametrisation

for kind, wrap in {
    "l1": lambda a: prune.l1_unstructured(a, "weight", 0.4),
    "structured": lambda a: prune.ln_structured(a, "weight", 0.4, n=2, dim=0),
    "twice": lambda a: prune.random_unstructured(prune.random_unstructured(a, "weight", 0.3), "bias", 0.3),
}.items():
    rows(f"pruned_{kind}", lambda m, x: m.a(m.a(x).tanh()), a=lambda wrap=wrap: wrap(nn.Linear(D, D)))
for kind, make in {"weight_norm": parametrizations.weight_norm, "spectral_norm": parametrizations.spectral_norm,
                   "orthogonal": lambda a: parametrizations.orthogonal(a, orthogonal_map="cayley")}.items():
    rows(kind, lambda m, x: m.a(m.a(x).tanh()), a=lambda make=make: make(nn.Linear(D, D)))


def _cached(m: Any, x: Tensor) -> Tensor:
    with parametrize.cached():
        return m.a(m.a(x).tanh())


rows("cached", _cached, a=lambda: parametrizations.weight_norm(nn.Linear(D, D)))
rows("dora", lambda m, x: (lambda w: F.linear(x, m.m * w / w.norm(dim=1, keepdim=True).detach()))(m.w + m.b @ m.a), w=parameter(3, D),
     a=parameter(2, D), b=parameter(3, 2), m=parameter(3, 1))
rows("kronecker", lambda m, x: F.linear(x, torch.kron(m.a, m.b)), a=parameter(2, 2), b=parameter(3, 2))
rows("circulant", lambda m, x: F.linear(x, m.w[(torch.arange(D)[:, None] - torch.arange(D)) % D]), w=parameter(D))
rows("standardised_by_batch_norm", lambda m, x: F.conv1d(x, F.batch_norm(m.w.reshape(1, 3, -1), None, None, training=True).view_as(m.w)),
     w=parameter(3, T, 2))
rows("modulated_convolution", lambda m, x, s: F.conv2d(x.reshape(1, -1, 5, 5), F.normalize(m.w[None] * m.a(s)[:, None, :, None, None], dim=2)
     .flatten(0, 1), groups=x.shape[0]).unflatten(1, (x.shape[0], -1))[0], (B, 2, 5, 5), (B, D), w=parameter(3, 2, 3, 3), a=linear(D, 2))
rows("modulated_transposed", lambda m, x, s: F.conv_transpose1d(x.reshape(1, -1, 5), (m.w * m.a(s)[:, :, None, None]).flatten(0, 1),
     groups=x.shape[0]).unflatten(1, (x.shape[0], -1))[0], (B, 2, 5), (B, D), w=parameter(2, 3, 2), a=linear(D, 2))
rows("repeated_kernel", lambda m, x: F.conv1d(x.flatten(0, 1)[None], m.w.repeat(x.shape[0], 1, 1), groups=2 * x.shape[0])
     .unflatten(1, (x.shape[0], 2))[0], (B, 2, 6), w=parameter(2, 1, 3))
rows("weights_of_each_example", lambda m, x: torch.bmm(x, m.a(x.mean(1)).view(-1, D, 3)), a=linear(D, 3 * D))
rows("weights_of_coordinates", lambda m, x: F.linear(x, m.a(m.z).view(D, D)), a=lambda: MLP(2, 5, 1), z=lambda: torch.randn(D * D, 2))
rows("straight_through", lambda m, x: F.linear(x, m.w + ((m.w * 4).round() / 4 - m.w).detach()), w=parameter(3, D))
rows("fake_quantised", lambda m, x: F.linear(torch.fake_quantize_per_tensor_affine(m.a(x), 0.1, 0, -8, 7), m.w), a=linear(D, 3), w=parameter(2, 3))
rows("learned_step", lambda m, x: (lambda s, w: F.linear(x, ((w.round() - w).detach() + w) * s))(
     (m.s - m.s / 9).detach() + m.s / 9, (m.w / m.s).clamp(-8, 7)), w=parameter(3, D), s=lambda: nn.Parameter(torch.tensor(0.3)))
rows("codebook", lambda m, x: (lambda z: (lambda q: torch.cat((z + (q - z).detach(), q - z.detach()), -1))(
     m.e(torch.cdist(z.flatten(0, 1), m.e.weight).argmin(-1).view(z.shape[:2]))))(m.a(x)), a=linear(D, 3), e=table(6, 3))

# ---------------------------------------------------------------------------------------------- writes, hooks and calls


def _written(m: Any, x: Tensor) -> Tensor:
    """A table is filled piece by piece with parameters, and goes on in place."""
    w = torch.zeros_like(m.buffer)
    w.copy_(m.a.weight)
    w[:, 1] = m.a.bias
    w[2:, 2:] += m.b.weight[:2, :2]
    w[0] = m.b.weight[1] * 2
    return F.linear(x, w.mul_(2)) + m.b(x)


def _filled(m: Any, x: Tensor) -> Tensor:
    """The same with values of each example, time first."""
    out = x.new_zeros(x.shape[1] + 1, x.shape[0], D)
    for t in range(x.shape[1]):
        out[t] = m.a(x[:, t])
    out[-1] = m.b.bias
    return m.b(out).transpose(0, 1)


def _kept(m: Any, x: Tensor) -> Tensor:
    m.kept = m.a.weight * 2
    return F.linear(x, m.kept)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * 3 * ctx.saved_tensors[0] ** 2


def _hooked(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    if h.requires_grad:
        h.register_hook(lambda g: g * 2)
    return m.b(h)


def _averaged(m: Any, x: Tensor) -> Tensor:
    """A momentum encoder follows inside the graph."""
    with torch.no_grad():
        m.buffer.mul_(0.9).add_(0.1 * m.a.weight)
    return m.a(x) * F.linear(x, m.buffer)


two = {"a": linear(D, D), "b": linear(D, D), "buffer": lambda: torch.randn(D, D)}
rows("written", _written, **two)
rows("filled", _filled, **two)
rows("kept", _kept, a=linear(D, D))
rows("own_function", lambda m, x: m.b(Cube.apply(m.a(x))), **two)
rows("hooked", _hooked, **two)
rows("averaged", _averaged, **two)
rows("ensemble", lambda m, x: torch.vmap(lambda w: F.linear(x, w).tanh(), out_dims=1)(torch.stack((m.a.weight, m.b.weight))), **two)
rows("gradient_of_a_network", lambda m, x: torch.func.grad(lambda z: m.b(m.a(z).tanh()).sin().sum())(x), **two)
rows("functional_call", lambda m, x: torch.func.functional_call(m.a, {"weight": m.b.weight * 2, "bias": m.a.bias}, (x,)), **two)
# fmt: on


class Step(nn.Module):
    """``forward`` runs inside or around what is compiled; returns one loss per example."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.head, self.function = nn.ModuleList(MLP(D, 6, D) for _ in range(2)), nn.Linear(D, 2), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _plain(m: Step, x: Tensor) -> Tensor:
    for block in m.blocks:
        x = x + block(x)
    return squares(m.head(x))


def _checkpointed(reentrant: bool) -> Callable[[Step, Tensor], Tensor]:
    def forward(m: Step, x: Tensor) -> Tensor:
        for block in m.blocks:
            x = x + checkpoint(block, x, use_reentrant=reentrant)  # type: ignore[operator]
        return squares(m.head(x))

    return forward


def _in_place(model: Step) -> Step:
    model.compile(backend="gns", options=EAGER)
    return model


def _blocks(model: Step) -> Step:
    for part in (*model.blocks, model.head):
        part.forward = torch.compile(part.forward, backend="gns", options=EAGER)
    return model


def _trained_inside(model: Step) -> Callable[[Tensor], None]:
    @torch.compile(backend="gns", options=EAGER)
    def step(x: Tensor) -> None:
        model(x).mean().backward()

    return step


def _offloaded(model: Step) -> Callable[[Tensor], None]:
    compiled = compile_(model)

    def step(x: Tensor) -> None:
        with torch.autograd.graph.save_on_cpu():
            losses = compiled(x)
        losses.mean().backward()

    return step


WAYS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], Any]]] = {
    "in_place": (_plain, _in_place),
    "parts": (_plain, _blocks),
    "parts_in_checkpoints": (_checkpointed(False), _blocks),
    "reentrant_checkpoints": (_checkpointed(True), compile_),
    "backward_inside": (_plain, _trained_inside),
    "offloaded": (_plain, _offloaded),
}


@pytest.mark.parametrize("name", WAYS)
def test_way_to_train(name: str) -> None:
    forward, ways = WAYS[name]
    model, x = Step(_plain).double(), floats(B, T, D).requires_grad_()
    truth = oracle.per_example_sq_norms(model, model(x))
    model.function = forward
    step = ways(model)
    if (losses := step(x)) is not None:
        losses.mean().backward()
    assert {r.status for r in coverage(model)} == {"measured"}
    assert oracle.names_beyond(per_example_sq_norms(model), truth, oracle.tolerance(torch.float64)) == []


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
@pytest.mark.parametrize("name", CASES)
def test_structure(name: str) -> None:
    assert_exact(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pruned_twice", "modulated_convolution", "swin", "every_other_row", "written"])
def test_through_inductor(name: str) -> None:
    assert_exact(CASES[name], lambda m: torch.compile(m, backend="gns", options={"gns.per_example": True}))
