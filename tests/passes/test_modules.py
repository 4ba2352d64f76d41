"""Layers, functions and losses of PyTorch against per-example autograd; what cannot be exact is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import cond
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import tests.passes.functions  # noqa: F401  (fills the table)
from gnsfx import collector
from gnsfx.coverage import coverage
from tests import oracle
from tests.passes.models import B, Case, Model, T, linear, parameter, rows
from tests.passes.modules import MODULES
from tests.passes.test_measure import compare, named
from tests.zoo import floats, squares

REFUSED = {
    "masked_scatter": "no rule for aten.masked_scatter",
    "max_unpool1d": "several examples may write the same row",
    "max_unpool2d": "several examples may write the same row",
    "max_unpool3d": "several examples may write the same row",
    "segment_reduce": "no rule for aten.segment_reduce",
    # nonlinear in a gradient that is already summed over the examples, or written as if it were
    "logcumsumexp_w": "already summed over the batch",
    "matrix_exp_of_a_parameter": "already summed over the batch",
    "matrix_exp_w": "already summed over the batch",
    "orthogonal": "already summed over the batch",
}


def build(name: str) -> Case:
    torch.manual_seed(0)
    return MODULES[name]()


@pytest.mark.parametrize("name", [n for n in MODULES if n not in REFUSED])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_module(name: str) -> None:
    compare(build(name))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:gns")
def test_refused(name: str) -> None:
    assert REFUSED[name] in refusals(build(name))["w" if name != "orthogonal" else "a.parametrizations.weight.original"]


def refusals(case: Case) -> dict[str, str]:
    """Name -> reason of what is not measured; what is measured must be exact, and every gradient what it is in eager mode."""
    torch._dynamo.reset()
    model, losses, train = case
    truth = oracle.per_example_sq_norms(model, losses(model))
    gradients = torch.autograd.grad(losses(model).mean(), list(named(model).values()))
    train(torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.per_example": True})).backward()
    status = {row.name: row.reason for row in coverage(model) if row.status != "measured"}
    exact = {name: norms for name, norms in truth.items() if name not in status}
    if exact:
        found = collector.per_example_sq_norms(model)
        assert oracle.names_beyond(found, exact, oracle.tolerance(torch.float64)) == []
    for p, expected in zip(named(model).values(), gradients, strict=True):
        torch.testing.assert_close(p.grad, expected)
    return status


SYMBOLIC = ["conv2d_grouped_strided_dilated", "conv1d_circular", "avg_pool2d", "max_pool2d", "bilinear", "bag_sum", "bag_mean_padding", "bag_max",
            "mha_batch_first", "mha_cross_time_first", "encoder_layer", "gru_cell", "mamba_cumsum", "s4d", "fft2", "complex_linear", "cdist",
            "vq_straight_through_folded", "solve_with_examples", "einsum_three", "scatter_add", "cumsum", "group_norm_4d", "loss_kl"]  # fmt: skip


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes(name: str) -> None:
    compare(build(name), dynamic=True)


# ------------------------------------------------------------------------------------------------- recurrent networks

RECURRENT: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked, both directions": {"num_layers": 2, "bidirectional": True},
    "without bias": {"bias": False},
    "time first": {"batch_first": False},
    "relu": {"nonlinearity": "relu"},
    "projected": {"proj_size": 2, "num_layers": 2},
}


def recurrence(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    h, _ = m.r(h)
    return m.b(h)


def recurrent(cls: type[nn.RNNBase], **given: Any) -> Case:
    options = {"batch_first": True, **given}
    first = options["batch_first"]
    width = (options.get("proj_size") or 4) * (2 if options.get("bidirectional") else 1)
    shape, batch = ((B, T, 3), 0) if first else ((T, B, 3), 1)
    parts = {"a": linear(3, 3), "r": lambda: cls(3, 4, **options), "b": linear(width, 2)}
    part, losses = rows(recurrence, shape, batch=batch, **parts)()
    return part.double(), losses, lambda m: losses(m).mean()


ONLY = {"relu": nn.RNN, "projected": nn.LSTM}


@pytest.mark.parametrize(
    "cls, name", [(c, n) for c in (nn.RNN, nn.GRU, nn.LSTM) for n in RECURRENT if ONLY.get(n, c) is c]
)
def test_recurrent(cls: type[nn.RNNBase], name: str) -> None:
    with torch._dynamo.config.patch(allow_rnn=True):
        compare(recurrent(cls, **RECURRENT[name]))


def test_recurrent_layers_that_dynamo_leaves_out() -> None:
    """By default it runs them, and what follows in the same function, in eager mode: what it did compile is exact."""
    torch.manual_seed(0)
    found = refusals(recurrent(nn.LSTM))
    assert set(found) == {"r.weight_ih_l0", "r.weight_hh_l0", "r.bias_ih_l0", "r.bias_hh_l0", "b.weight", "b.bias"}
    assert all("set torch._dynamo.config.allow_rnn = True" in reason for reason in found.values())


def packed(m: Any, x: Tensor) -> Tensor:
    sequence = nn.utils.rnn.pack_padded_sequence(x * m.w, [3, 2, 1], batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(m.r(sequence)[0], batch_first=True)[0]


@pytest.mark.parametrize("allowed", [False, True])
def test_packed_sequences(allowed: bool) -> None:
    """Dynamo does not trace their packing."""
    torch.manual_seed(0)
    part, losses = rows(packed, (B, T, 3), w=parameter(3), r=lambda: nn.GRU(3, 2, batch_first=True))()
    with torch._dynamo.config.patch(allow_rnn=allowed):
        found = refusals((part.double(), losses, lambda m: losses(m).mean()))
    assert {"r.weight_ih_l0", "r.weight_hh_l0", "r.bias_ih_l0", "r.bias_hh_l0"} <= set(found)


# ------------------------------------------------------------------------------------------------ higher-order ops


def attend(**options: Any) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: flex_attention(x * m.w, x * m.v, x, **options)  # type: ignore[return-value]


def block_mask(lengths: Tensor) -> Any:
    inside = lambda b, h, q, k: k < lengths[b]  # noqa: E731
    return create_block_mask(inside, B=B, H=None, Q_LEN=8, KV_LEN=8, device="cpu", BLOCK_SIZE=8)


FLEX = {
    "plain": attend(),
    "score": attend(score_mod=lambda s, b, h, q, k: s - (q - k).abs() * (h + 1)),
    "causal": attend(block_mask=create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cpu", BLOCK_SIZE=8)),
    "lengths": attend(block_mask=block_mask(torch.tensor([3, 8, 5]))),
    "grouped": lambda m, x: flex_attention(x * m.w, x[:, :1] * m.v, x[:, :1], enable_gqa=True),
    "biased": lambda m, x: flex_attention(x * m.w, x * m.v, x, score_mod=lambda s, b, h, q, k: s + m.bias[h]),
}  # fmt: skip


@pytest.mark.parametrize("name", FLEX)
@pytest.mark.filterwarnings("ignore:gns", "ignore:.*flex_attention")
def test_flex_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch trains it on GPUs only; on a CPU the same graphs run when it is not asked."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    torch.manual_seed(0)
    bias = {"bias": parameter(2)} if name == "biased" else {}
    part, losses = rows(FLEX[name], (B, 2, 8, 16), w=parameter(16), v=parameter(16), **bias)()
    found = refusals((part.double(), losses, lambda m: losses(m).mean()))
    assert set(found) == set(bias)
    assert all("score_mod reads this tensor" in reason for reason in found.values())


def scanned(m: Any, x: Tensor) -> Tensor:
    combine = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    return associative_scan(combine, ((x * m.w).sigmoid(), x * m.v), dim=1, combine_mode="generic")[1]


def test_associative_scan() -> None:
    torch.manual_seed(0)
    part, losses = rows(scanned, (B, T, 3), w=parameter(3), v=parameter(3))()
    compare((part.double(), losses, lambda m: losses(m).mean()))


@pytest.mark.filterwarnings("ignore:gns")
def test_cond_is_refused_by_name() -> None:
    torch.manual_seed(0)
    branch = lambda m, x: cond(x.sum() > 0, lambda v: v * m.w, lambda v: v.sin() * m.w, (x,)) * m.v  # noqa: E731
    part, losses = rows(branch, (B, T), w=parameter(T), v=parameter(T))()
    found = refusals((part.double(), losses, lambda m: losses(m).mean()))
    assert "no rule for cond" in found["w"]


def test_checkpoint() -> None:
    torch.manual_seed(0)
    part, losses = rows(lambda m, x: checkpoint(lambda v: m.a(v).tanh(), x * m.w, use_reentrant=False), (B, T, 4),
                        w=parameter(4), a=linear(4, 3))()  # fmt: skip
    compare((part.double(), losses, lambda m: losses(m).mean()))


# ----------------------------------------------------------------------------------------------------------- randomness

RANDOM: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout1d": (lambda: nn.Dropout1d(0.4), (3, 4)),
    "dropout2d": (lambda: nn.Dropout2d(0.4), (3, 2, 4)),
    "dropout3d": (lambda: nn.Dropout3d(0.4), (3, 2, 2, 4)),
    "dropout_in_place": (lambda: nn.Dropout(0.4, inplace=True), (3, 4)),
    "alpha_dropout": (lambda: nn.AlphaDropout(0.4), (3, 4)),
    "feature_alpha_dropout": (lambda: nn.FeatureAlphaDropout(0.4), (4, 3, 4)),
    "rrelu": (lambda: nn.RReLU(), (3, 4)),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(4, 2, 5, 0.3, batch_first=True), (3, 4)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random(name: str) -> None:
    """As ``test_dropout``: the truth is the compiled gradient with the tangents of all other examples masked."""
    torch.manual_seed(0)
    layer, shape = RANDOM[name]
    model = Model(lambda m, x: m.b(m.drop(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), drop=layer()).double()
    x = floats(4, *shape)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.per_example": True})

    def step(mask: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        (squares(compiled(x)) * mask).sum().backward()
        return oracle.gradients(model)

    alone = [step(torch.eye(4, dtype=torch.float64)[b]) for b in range(4)]
    step(torch.ones(4, dtype=torch.float64))
    found = collector.per_example_sq_norms(model)
    assert set(found) == set(named(model))
    truth = {n: torch.stack([a[n].square().sum() for a in alone]) for n in found}
    assert oracle.names_beyond(found, truth, oracle.tolerance(torch.float64)) == []
