"""The check itself: it passes on what is right, and fails on numbers that were made wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnsfx import collector, marks
from gnsfx.errors import GnsError, VerificationError
from gnsfx.passes.emit import Emitter
from gnsfx.verify import relative_tolerance, verify

EAGER = {"gns.inner": "eager"}
B, T, V, D = 4, 5, 11, 8


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Transformer(nn.Module):
    """Dropout and a tied head; with targets, the loss is inside: a mean over the tokens that count."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.wte, self.norm, self.last = nn.Embedding(V, D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out, self.head = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, V, bias=False)
        self.drop, self.head.weight = nn.Dropout(p), self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.drop(self.wte(tokens))
        q, k, v = (y.unflatten(-1, (2, D // 2)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        logits = self.head(self.last(x + self.drop(self.out(y))))
        return logits if targets is None else mean_loss(targets)(logits)


def token_data() -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(V, (2, B, T))
    targets[0, 2:] = targets[1, 4:] = -1
    return tokens, targets


def losses(targets: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: (
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        .view_as(targets)
        .sum(1)
    )


def mean_loss(targets: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def gns(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="gns", options={**EAGER, **options})


# ------------------------------------------------------------------------------------------------------------ it holds


def test_transformer_with_dropout() -> None:
    """The loss per example, the scalar outside and the scalar inside see the same masks and the same contributions."""
    model, (tokens, targets) = Transformer(), token_data()
    compiled = gns(model)
    each = verify(compiled, tokens, loss=losses(targets))
    outside = verify(compiled, tokens, loss=mean_loss(targets))
    inside = verify(compiled, tokens, targets)
    for report in (each, outside, inside):
        assert (
            report.max_relative_error < report.rtol < 1e-12 and report.dtype == torch.float64 and report.examples == B
        )
        assert list(report.by_parameter()) == [n for n, _ in compiled.named_parameters()]
        assert not report.skipped and not report.refused
    valid = int((targets >= 0).sum())
    for one, mean, own in zip(each.parameters, outside.parameters, inside.parameters, strict=True):
        assert mean.expected == pytest.approx(own.expected, rel=1e-9)
        assert mean.expected == pytest.approx(one.expected * (B / valid) ** 2, rel=1e-9)


def test_leaves_no_trace() -> None:
    model, (tokens, targets) = Transformer(), token_data()
    compiled = gns(model)
    compiled(tokens, targets).backward()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    grads, norms = [p.grad for p in model.parameters()], collector.sq_norms(model)
    values = [g.clone() for g in grads if g is not None]
    verify(compiled, tokens, targets)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(grads, values, strict=True) if g is not None)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(v, norms[n]) for n, v in collector.sq_norms(model).items())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_loss_module_of_the_caller_keeps_its_gradients() -> None:
    """A parameter in the loss is no parameter of the model."""
    scale = nn.Parameter(torch.ones(()))
    verify(gns(MLP()), torch.randn(B, 3), loss=lambda y: (scale * y).square().sum(1))
    assert scale.grad is None


@pytest.mark.parametrize(
    "compile_", [gns, lambda model: model.compile(backend="gns", options=EAGER), lambda model: None]
)
def test_every_way_to_compile(compile_: Callable[[nn.Module], Any]) -> None:
    model = MLP()
    compiled = compile_(model)
    report = verify(model if compiled is None else compiled, torch.randn(B, 3), loss=lambda y: y.square().sum(1))
    assert len(report.parameters) == 4


def test_one_example() -> None:
    tokens, targets = token_data()
    assert verify(gns(Transformer()), tokens[2:3], targets[2:3]).examples == 1


def test_example_without_tokens() -> None:
    """Alone its loss is 0 / 0; in the batch it adds nothing."""
    tokens, targets = token_data()
    targets[1] = -1
    assert len(verify(gns(Transformer()), tokens, targets).parameters) == 9


def test_output_with_a_loss() -> None:
    class Wrapped(Transformer):
        def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Any:
            return {"loss": super().forward(tokens, targets), "other": tokens}

    assert len(verify(gns(Wrapped()), *token_data()).parameters) == 9


def test_batch_norm_is_listed_not_failed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    report = verify(gns(model), torch.randn(6, 3), loss=lambda y: y.square().sum(1))
    assert list(report.refused) == ["_orig_mod.0.weight", "_orig_mod.0.bias"]
    assert len(report.parameters) == 4
    assert "refused: " in str(report) and "4 parameters compared" in str(report)


def test_frozen_and_unselected_are_listed() -> None:
    model = Transformer()
    model.out.bias.requires_grad_(False)
    report = verify(gns(model, **{"gns.params": "norm"}), token_data()[0], loss=lambda y: y.square().sum((1, 2)))
    assert {p.name for p in report.parameters} == {
        f"_orig_mod.{n}.{k}" for n in ("norm", "last") for k in ("weight", "bias")
    }
    assert all(row.status == "unused" for row in report.skipped)


@pytest.mark.parametrize("path", ["materialise", "fused", "ghost"])
def test_every_path(path: str) -> None:
    tokens, targets = token_data()
    assert len(verify(gns(Transformer(), **{"gns.path": path}), tokens, loss=losses(targets)).parameters) == 9


def test_behind_a_graph_break() -> None:
    class Broken(MLP):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.a(x))
            torch._dynamo.graph_break()
            return self.b(F.dropout(y))

    assert len(verify(gns(Broken()), torch.randn(B, 3), loss=lambda y: y.square().mean()).parameters) == 4


def test_model_that_does_not_run_in_double() -> None:
    class Single(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ torch.eye(2)

    report = verify(gns(Single()), torch.randn(B, 3), loss=lambda y: y.square().sum(1))
    assert report.dtype == torch.float32 and report.rtol == relative_tolerance(torch.float32)


def test_autocast() -> None:
    """Half precision inside: the tolerance is that of bfloat16, both sides round the same activations."""

    class Half(MLP):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    report = verify(gns(Half()), torch.randn(B, 7, 3), loss=lambda y: y.float().square().sum((1, 2)))
    assert report.max_relative_error < report.rtol


def test_half_precision_is_verified_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph is another one than in float64; an error in it alone is found."""
    model, x = MLP().bfloat16(), torch.randn(B, 7, 3, dtype=torch.bfloat16)
    assert verify(gns(model), x, loss=lambda y: y.square().sum((1, 2))).dtype == torch.float64

    def only_in_half(emit: Any, node: Any) -> Any:
        return node if node.meta["val"].dtype == torch.float64 else emit(torch.ops.aten.mul.Tensor, node, 1.5)

    planted(monkeypatch, only_in_half)
    with pytest.raises(VerificationError, match="relative difference 5"):
        verify(gns(model), x, loss=lambda y: y.square().sum((1, 2)))


def test_float32_inside_a_double_model() -> None:
    """A norm in float32 rounds the gradients that pass through it: the tolerance follows."""

    class Casting(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)).float().to(x.dtype))

    report = verify(gns(Casting()), torch.randn(B, 3), loss=lambda y: y.square().sum(1))
    assert report.dtype == torch.float64 and report.rtol == relative_tolerance(torch.float32)


def test_time_first() -> None:
    """Marked inputs: rows of the output are taken along the marked dimension too."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.Linear(3 + 4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h, out = x.new_zeros(x.shape[1], 4), []
            for step in x.unbind(0):
                h = torch.tanh(self.cell(torch.cat([step, h], 1)))
                out.append(h)
            return self.head(torch.stack(out))

    x = marks.mark_batch(torch.randn(T, B, 3), 1)
    assert verify(gns(Recurrent()), x, loss=lambda y: y.square().mean()).examples == B


# -------------------------------------------------------------------------------------------------------------- it fails


def planted(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any, Any], Any]) -> None:
    right = Emitter.square
    monkeypatch.setattr(Emitter, "square", lambda self, *args, **kwargs: wrong(self, right(self, *args, **kwargs)))


@pytest.mark.parametrize("inside", [False, True])
def test_planted_factor(monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    planted(monkeypatch, lambda emit, node: emit(torch.ops.aten.mul.Tensor, node, 1 + 1e-9))
    tokens, targets = token_data()
    with pytest.raises(VerificationError) as caught:
        if inside:
            verify(gns(Transformer()), tokens, targets)
        else:
            verify(gns(Transformer()), tokens, loss=losses(targets))
    text = str(caught.value)
    assert "of 9 measured parameters differ from per-example autograd on 4 examples" in text
    assert "_orig_mod.norm.weight: measured " in text and "expected " in text and "relative difference 1.0e-09" in text


def test_planted_permutation_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is right, the examples are not."""
    planted(monkeypatch, lambda emit, node: emit(torch.ops.aten.flip.default, node, [0]))
    with pytest.raises(VerificationError, match=r"a\.bias: example \d: measured .*, expected .*, relative difference"):
        verify(gns(MLP()), torch.randn(B, 3), loss=lambda y: y.square().sum(1))


def test_planted_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from gnsfx.passes.stacks import Stacks

    right = Stacks.replace_by_sum

    def wrong(self: Any, node: Any, stack: Any) -> None:
        right(self, node, stack)
        old, value = self.replacements.pop()
        with self.emit.at(old):
            self.replacements.append((old, self.emit(torch.ops.aten.mul.Tensor, value, 1 + 1e-9)))

    monkeypatch.setattr(Stacks, "replace_by_sum", wrong)
    with pytest.raises(VerificationError, match=r"a\.bias: p\.grad is off by"):
        verify(gns(MLP()), torch.randn(B, 3), loss=lambda y: y.square().sum(1))


def test_rtol() -> None:
    report = verify(gns(MLP()), torch.randn(B, 3), loss=lambda y: y.square().sum(1), rtol=1e-3)
    assert report.rtol == 1e-3


# ---------------------------------------------------------------------------------------------------------- bad input


def refuses(pattern: str, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(GnsError, match=pattern):
        verify(model, *args, **kwargs)


def test_loss_of_the_wrong_length() -> None:
    refuses(
        r"the loss has 20 values.*counts 4 examples.*mark_batch",
        gns(MLP()),
        torch.randn(B, 5, 3),
        loss=lambda y: y.square().sum(2).flatten(),
    )


def test_no_loss() -> None:
    refuses(r"the output is a tensor of shape \[4, 2\].*lambda output", gns(MLP()), torch.randn(B, 3))
    refuses(r"loss\(output\) is float", gns(MLP()), torch.randn(B, 3), loss=lambda y: 1.0)


def test_output_without_rows() -> None:
    class Turned(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).t()

    refuses(r"output of shape \[2, 4\].*4 examples", gns(Turned()), torch.randn(B, 3), loss=lambda y: y.square().mean())


def test_examples_that_interact_inside() -> None:
    class Coupled(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) - x.mean(0).sum()).square().mean()

    refuses(r"no weighted sum of the gradients of its examples.*pass loss=", gns(Coupled()), torch.randn(B, 3))


def test_gradient_that_is_not_finite() -> None:
    x = torch.randn(B, 3)
    x[2] = torch.inf
    refuses(
        r"gradient of _orig_mod\.a\.weight for example \d is not finite",
        gns(MLP()),
        x,
        loss=lambda y: y.square().sum(1),
    )


def test_nothing_to_verify() -> None:
    refuses("no parameter of the model requires a gradient", gns(MLP().requires_grad_(False)), torch.randn(B, 3))


def test_empty_batch() -> None:
    refuses("the batch is empty", gns(MLP()), torch.randn(0, 3), loss=lambda y: y.square().sum(1))
