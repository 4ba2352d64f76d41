"""Packed documents are the examples: ids or boundaries through ``mark_batch``, attention of every kind within them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnsfx import GnsError, mark_batch, per_example_sq_norms, sq_norms
from gnsfx.collector import measurements
from gnsfx.coverage import coverage
from tests import oracle
from tests.zoo import ids as tokens_of

T, D, H, V = 9, 8, 2, 11
OPTIONS = {"gns.inner": "eager", "gns.per_example": True}
ROW = [0, 0, 0, 1, 1, 2, 2, 2, 2]


class Decoder(nn.Module):
    """One block over packed rows; ``attention`` sees q, k, v (R, H, T, d) and a mask (R, 1, T, T)."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(V, D), nn.Embedding(T, D)
        self.qkv, self.out, self.norm = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.LayerNorm(D)
        self.bias = nn.Embedding(2 * T, H)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.attention = attention

    def forward(self, tokens: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        R, length = tokens.shape
        if documents.dim() == 1:  # boundaries
            documents = torch.searchsorted(documents, torch.arange(length), right=True)[None] - 1
        own = documents[:, :, None] == documents[:, None, :]
        mask = (own & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
        x = self.table(tokens) + self.place(torch.arange(length))
        q, k, v = self.qkv(self.norm(x)).view(R, length, 3, H, D // H).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attention(self, q, k, v, mask).transpose(1, 2).reshape(R, length, D))
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.cross_entropy((x @ self.table.weight.T).flatten(0, 1), targets.flatten(), reduction="none").view(
            R, length
        )


def sdpa(m: Decoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def additive(m: Decoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    lowest = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=lowest)


def by_hand(m: Decoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / 2
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def relative(m: Decoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A table of relative distances, shared by all documents."""
    place = torch.arange(q.shape[2])
    bias = m.bias(place[:, None] - place + T).permute(2, 0, 1)
    scores = torch.where(mask, q @ k.mT + bias, torch.finfo(q.dtype).min)
    return F.dropout(scores.softmax(-1), 0.0) @ v


def open_to_all(m: Decoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones_like(mask).tril())


def open_by_hand(m: Decoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def causal(m: Decoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    documents = torch.tensor([[i + 3 * r for i in ROW] for r in range(rows)])
    return tokens_of(V, rows, T), tokens_of(V, rows, T), documents


def train(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> dict[str, str]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="gns", options={**OPTIONS, **options})
    compiled(*inputs).mean().backward()
    return {row.name: row.status for row in coverage(model)}


def truth(model: nn.Module, inputs: tuple[Tensor, ...], documents: Tensor) -> dict[str, Tensor]:
    """The contribution of a document is the gradient of its own share of the loss."""
    losses = model(*inputs).flatten()
    count = int(documents.max()) + 1
    per_document = torch.zeros(count, dtype=losses.dtype).index_add(0, documents.flatten(), losses)
    return oracle.per_example_sq_norms(
        model, per_document, torch.full((count,), 1 / losses.numel(), dtype=losses.dtype)
    )


def compare(attention: Any, rows: int, boundaries: bool = False, **options: Any) -> None:
    model, (tokens, targets, documents) = Decoder(attention).double(), batch(rows)
    given = torch.tensor([0, 3, 5, 9]) if boundaries else documents
    if attention is not relative:
        model.bias.requires_grad_(False)
    marked = mark_batch(tokens, cu_seqlens=given) if boundaries else mark_batch(tokens, ids=given)
    expected = truth(model, (tokens, targets, given), documents)
    model.zero_grad()
    status = train(model, (marked, targets, given), **options)
    assert {status[n] for n in expected} == {"measured"}
    found = per_example_sq_norms(model)
    count = int(documents.max()) + 1
    assert all(bool((norms[count:] == 0).all()) for norms in found.values())
    bound = oracle.tolerance(torch.float64)
    assert oracle.names_beyond({n: f[:count] for n, f in found.items()}, expected, bound) == []
    assert {int(m.examples) for m in measurements(model) if m.examples is not None} == {count}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("attention", [sdpa, additive], ids=lambda f: f.__name__)
def test_fused_attention(attention: Any, rows: int) -> None:
    compare(attention, rows)


@pytest.mark.parametrize("attention", [by_hand, relative], ids=lambda f: f.__name__)
def test_attention_by_hand(attention: Any) -> None:
    compare(attention, 1)


def test_boundaries() -> None:
    compare(sdpa, 1, boundaries=True)


@pytest.mark.slow
def test_inductor() -> None:
    compare(by_hand, 1, **{"gns.inner": "inductor"})


def test_other_documents_in_the_next_step() -> None:
    """The ids are data: nothing is compiled again, and the count follows."""
    model = Decoder(sdpa).double()
    model.bias.requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="gns", options=OPTIONS)
    for row in (ROW, [0] * T, [4, 4, 1, 1, 1, 0, 0, 7, 7]):
        tokens, targets, documents = tokens_of(V, 1, T), tokens_of(V, 1, T), torch.tensor([row])
        expected = truth(model, (tokens, targets, documents), documents)
        model.zero_grad()
        compiled(mark_batch(tokens, ids=documents), targets, documents).mean().backward()
        found = {n: f[: int(documents.max()) + 1] for n, f in per_example_sq_norms(model).items()}
        assert oracle.names_beyond(found, expected, oracle.tolerance(torch.float64)) == []
        assert {int(m.examples) for m in measurements(model) if m.examples is not None} == {len(set(row))}


def shut(m: Decoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A row with the same low score everywhere attends to all documents alike."""
    scores = torch.full(mask.shape, -1e4, dtype=q.dtype).masked_fill(mask, 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=scores.index_fill(2, torch.tensor([4]), -1e4))


@pytest.mark.parametrize("attention", [open_to_all, open_by_hand, shut], ids=lambda f: f.__name__)
def test_open_attention_is_refused_in_the_step(attention: Any) -> None:
    model, (tokens, targets, documents) = Decoder(attention).double(), batch(1)
    model.bias.requires_grad_(False)
    status = train(model, (mark_batch(tokens, ids=documents), targets, documents))
    assert {s for n, s in status.items() if n != "bias.weight"} == {"refused"}
    assert "see each other" in next(r.reason for r in coverage(model) if r.name == "qkv.weight")
    with pytest.raises(GnsError, match="see each other"):
        sq_norms(model)


def test_attention_without_a_mask_is_refused() -> None:
    model, (tokens, targets, documents) = Decoder(causal).double(), batch(1)
    model.bias.requires_grad_(False)
    with pytest.warns(UserWarning, match="needs a mask"):
        status = train(model, (mark_batch(tokens, ids=documents), targets, documents))
    assert status["qkv.weight"] == status["table.weight"] == "refused"


@pytest.mark.parametrize(
    "mix",
    [
        lambda m, h: m.w @ h,
        lambda m, h: h.roll(1, 1),
        lambda m, h: h[:, (torch.arange(T) + 1) % T],
        lambda m, h: h.cumsum(1),
    ],
    ids=["weights", "roll", "shift", "cumsum"],
)
def test_positions_of_other_documents_are_refused(mix: Any) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.w, self.head = nn.Embedding(V, D), nn.Parameter(torch.randn(T, T)), nn.Linear(D, 1)

        def forward(self, tokens: Tensor, documents: Tensor) -> Tensor:
            return self.head(mix(self, self.table(tokens)).tanh()).squeeze(-1) + 0 * documents

    model, (tokens, _, documents) = Mixing().double(), batch(1)
    with pytest.warns(UserWarning, match="refused"):
        status = train(model, (mark_batch(tokens, ids=documents), documents))
    assert status["table.weight"] == status["head.weight"] == status["head.bias"] == "refused"


def test_ids_out_of_range_are_refused() -> None:
    model, (tokens, targets, documents) = Decoder(sdpa).double(), batch(1)
    model.bias.requires_grad_(False)
    status = train(model, (mark_batch(tokens, ids=(far := documents * 100)), targets, far))
    assert status["out.weight"] == "refused"


def test_bad_marks() -> None:
    tokens = tokens_of(V, 2, T)
    with pytest.raises(GnsError, match="shape"):
        mark_batch(tokens, ids=torch.zeros(T, 2, dtype=torch.long))
    with pytest.raises(GnsError, match="integer"):
        mark_batch(tokens, ids=torch.zeros(2, T))


def test_ids_that_the_model_does_not_take() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(V, D)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table(tokens).square()

    model, (tokens, _, documents) = Plain(), batch(1)
    with pytest.warns(UserWarning, match="not an input of the compiled graph"):
        assert train(model, (mark_batch(tokens, ids=documents),)) == {"table.weight": "refused"}
