"""Every row of the rule table against numbers.

The truth of ``batched``: change all entries of one example, and see which entries of the result move.
The truth of ``partial``: the result is a sum of one term per example.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_flatten, tree_map

from gnsfx.passes.propagate import _linear
from gnsfx.passes.rules import LINEAR, RULES, Op
from gnsfx.passes.rules.pointwise import is_pointwise, pointwise_rule
from gnsfx.passes.rules.table import arguments
from gnsfx.passes.state import Batched, Mixed, Partial, Shared, describe
from tests.passes.samples import SAMPLES, B, Input, Made, Sample


class Call:
    """A sample as one node of a graph, with two independent draws of its inputs."""

    def __init__(self, sample: Sample) -> None:
        torch.manual_seed(0)
        self.sample, self.graph = sample, Graph()
        self.states: dict[Node, Any] = {}
        self.values: dict[Node, Any] = {}
        self.others: dict[Node, Any] = {}
        is_leaf = lambda a: isinstance(a, (Input, Made))  # noqa: E731
        self.inputs: dict[Input, Node] = {}
        leaves = [
            a for a in tree_flatten((sample.args, sample.kwargs), is_leaf=is_leaf)[0] if isinstance(a, (Input, Made))
        ]
        for leaf in dict.fromkeys(leaves):
            self._add(leaf)
        args, kwargs = tree_map(lambda a: self._node(a), (sample.args, sample.kwargs), is_leaf=is_leaf)
        self.node = self.graph.call_function(sample.op, args, kwargs)
        device = "meta" if sample.truth == "meta" else "cpu"
        self.node.meta["val"] = self.run(self.values) if device == "cpu" else self._meta()
        self.op = Op(self.node, self.states, B, sample.tangent)

    def _add(self, leaf: Any) -> Node:
        if isinstance(leaf, Made):
            args = [self._add(a) if isinstance(a, (Input, Made)) else a for a in leaf.args]
            node = self.graph.call_function(leaf.target, tuple(args), leaf.kwargs)
            value = leaf.target(*[self.values[a] if isinstance(a, Node) else a for a in args], **leaf.kwargs)
            self.values[node] = self.others[node] = value
        else:
            node = self.graph.placeholder(f"x{len(self.values)}")
            self.values[node] = leaf.draw()
            self.others[node] = leaf.draw() if leaf.state is not None else self.values[node]
            if leaf.state is not None:
                self.states[node] = leaf.state
        node.meta["val"] = self.values[node]
        self.inputs[leaf] = node
        return node

    def _node(self, a: Any) -> Any:
        return self.inputs[a] if isinstance(a, (Input, Made)) else a

    def run(self, values: dict[Node, Any]) -> Any:
        torch.manual_seed(1)
        pick = lambda a: values[a].clone() if isinstance(a, Node) else a  # noqa: E731
        args, kwargs = tree_map(pick, (self.node.args, self.node.kwargs))
        return self.node.target(*args, **kwargs)  # type: ignore[operator]

    def _meta(self) -> Any:
        try:
            return self.run(self.values)
        except NotImplementedError:  # an op for other devices: its results look like its first tensor
            heads = next(iter(self.values.values()))
            count = len(self.sample.expect)
            lse = heads.new_empty(heads.shape[:3])
            return (
                (heads,) * count
                if self.sample.tangent
                else (heads, lse, *[heads.new_empty(()) for _ in range(count - 2)])
            )

    @property
    def claim(self) -> Any:
        if self.sample.op not in RULES and not is_pointwise(self.sample.op):
            return (Shared(),) * len(outputs(self.node.meta["val"]))
        return RULES.get(self.sample.op, pointwise_rule)(self.op)

    def replaced(self, examples: list[int]) -> list[torch.Tensor]:
        """Results with the rows of these examples taken from the second draw."""
        values = dict(self.values)
        for node, state in self.states.items():
            rows = torch.isin(labels(state, self.values[node].shape[state.dim]), torch.tensor(examples))
            shape = [-1 if d == state.dim else 1 for d in range(self.values[node].dim())]
            values[node] = torch.where(rows.view(shape), self.others[node], self.values[node])
        return outputs(self.run(values))


def labels(state: Batched, rows: int) -> torch.Tensor:
    """Which example each row of the batched dimension belongs to."""
    assert rows == state.outer * B * state.inner, f"{describe(state)} of a dimension of size {rows}"
    return torch.arange(rows) // int(state.inner) % B


def outputs(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def names(samples: dict[Any, list[Sample]]) -> list[Any]:
    return [pytest.param(s, id=f"{op}-{i}") for op, group in samples.items() for i, s in enumerate(group)]


# ----------------------------------------------------------------------------------------------------------- checks


def check_batched(call: Call, state: Batched, index: int) -> None:
    before = outputs(call.node.meta["val"])[index]
    mine = labels(state, before.shape[state.dim])
    moved_at_all = False
    for b in range(B):
        after = call.replaced([b])[index]
        moved = ~torch.isclose(after, before, rtol=1e-9, atol=1e-12, equal_nan=True)
        moved_at_all |= bool(moved.any())
        elsewhere = moved.movedim(state.dim, 0)[mine != b]
        assert not elsewhere.any(), f"claimed {describe(state)}, but rows of other examples move with example {b}"
    random = torch.Tag.nondeterministic_seeded in call.sample.op.tags
    assert moved_at_all or random or not before.is_floating_point(), "no entry moved at all: the sample shows nothing"


def check_partial(call: Call, index: int) -> None:
    """f is a sum of one term per example: replacing all of them changes it by the sum of the single changes."""
    before = outputs(call.node.meta["val"])[index]
    changes = [call.replaced([b])[index] - before for b in range(B)]
    torch.testing.assert_close(call.replaced(list(range(B)))[index] - before, sum(changes))
    assert any(c.abs().max() > 1e-6 for c in changes), "no example contributes: the sample shows nothing"
    zeros = {
        n: torch.zeros_like(v) if n in call.states and v.is_floating_point() else v for n, v in call.values.items()
    }
    if any(v.is_floating_point() for n, v in call.values.items() if n in call.states):
        assert outputs(call.run(zeros))[index].abs().max() < 1e-9, (
            "no sum of contributions: it has a part that no example owns"
        )


def check_shared(call: Call, index: int) -> None:
    """A constant, or a statistic of the batch: blind to the order of the examples."""
    before = outputs(call.node.meta["val"])[index]
    permuted = dict(call.values)
    for node, state in call.states.items():
        value = call.values[node]
        split = value.unflatten(state.dim, (int(state.outer), B, int(state.inner)))
        permuted[node] = split.roll(1, state.dim + 1).flatten(state.dim, state.dim + 2)
    after = outputs(call.run(permuted))[index]
    if before.is_floating_point() or before.dtype is torch.bool:  # numbers of examples (argmax) move with the order
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("sample", names(SAMPLES))
def test_rule(sample: Sample) -> None:
    call = Call(sample)
    if sample.expect == "none":
        assert call.node.meta["val"] is None
        return
    claims = outputs(call.claim)
    if isinstance(claims[0], Mixed) and len(claims) == 1 and isinstance(sample.expect, tuple):
        claims *= len(sample.expect)
    found = tuple(describe(c) for c in claims)
    assert found == (sample.expect if isinstance(sample.expect, tuple) else (sample.expect,)), [
        c.reason for c in claims if isinstance(c, Mixed)
    ]
    for index, (state, value) in enumerate(zip(claims, outputs(call.node.meta["val"]), strict=True)):
        if isinstance(state, Batched):
            labels(state, value.shape[state.dim])
        if sample.truth != "check":
            continue
        if isinstance(state, Batched):
            check_batched(call, state, index)
        elif isinstance(state, Partial):
            check_partial(call, index)
        elif isinstance(state, Shared):
            check_shared(call, index)


def test_every_rule_has_a_sample() -> None:
    """Higher-order ops hold graphs of their own: test_modules.py has whole models of them."""
    assert [str(op) for op in RULES if op not in SAMPLES and isinstance(op, torch._ops.OpOverload)] == []


# -------------------------------------------------------------------------------------------- ops tagged as pointwise


def tagged() -> list[Any]:
    found = []
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, overload)
            if is_pointwise(op) and not op._schema.is_mutable and op not in RULES:
                found.append(op)
    return found


def guess(op: Any, draw: Any) -> tuple[list[Any], dict[str, Any]] | None:
    """Arguments by type, None where that does not work."""
    args, kwargs = [], {}
    for a in op._schema.arguments:
        kind = str(a.type)
        value: Any = a.default_value
        if kind == "Tensor":
            value = draw()
        elif kind == "Optional[Tensor]" or value is not None or "Optional" in kind:
            pass
        else:
            value = {"number": 0.5, "int": 1, "float": 0.5, "bool": False, "str": "none"}.get(kind)
        if a.kwarg_only:
            kwargs[a.name] = value
        else:
            args.append(value)
    try:
        op(*tree_map(lambda a: a.draw() if isinstance(a, Input) else a, args), **kwargs)
    except Exception:
        return None
    return args, kwargs


def test_ops_tagged_pointwise_are_pointwise() -> None:
    """The tag is trusted for ops without a row: here for every op of aten whose arguments can be guessed."""
    state, checked = Batched(1), 0
    draws = (
        lambda: Input(lambda: torch.rand(2, B, 3, dtype=torch.float64) * 0.8 + 0.1, state),
        lambda: Input(lambda: torch.rand(2, B, 3, dtype=torch.complex128), state),
        lambda: Input(lambda: torch.randint(1, 5, (2, B, 3)), state),
        lambda: Input(lambda: torch.rand(2, B, 3) > 0.5, state),
    )
    for op in tagged():
        found = next((g for draw in draws if (g := guess(op, draw)) is not None), None)
        if found is None:
            continue
        call = Call(Sample(op, tuple(found[0]), found[1], "", False, "check"))
        if not all(isinstance(v, torch.Tensor) for v in outputs(call.node.meta["val"])):
            continue
        claims = outputs(call.claim)
        for index, before in enumerate(outputs(call.node.meta["val"])):
            assert isinstance(claims[index], Batched), f"{op}: {claims[index]}"
            for b in range(B):
                moved = ~torch.isclose(call.replaced([b])[index], before, equal_nan=True)
                assert not moved.movedim(1, 0)[torch.arange(B) != b].any(), f"{op} is tagged pointwise and is not"
        checked += 1
    assert checked > 150


# ------------------------------------------------------------------------------------------------------------ LINEAR


def linear_groups() -> list[Any]:
    return [pytest.param(op, g, id=f"{op}-{'+'.join(sorted(g))}") for op, groups in LINEAR.items() for g in groups]


def members(call: Call, group: frozenset[str]) -> list[Node]:
    """The floating point tensors that are passed under these names."""
    found = []
    for name, value in arguments(call.node).items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if (
                name in group
                and isinstance(item, Node)
                and (call.values[item].is_floating_point() or call.values[item].is_complex())
            ):
                found.append(item)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("op, group", linear_groups())
def test_linear(op: Any, group: frozenset[str]) -> None:
    """Where a sum over examples is let through an op, f(p + q) = f(p) + f(q) and f(3p) = 3f(p)."""
    let_through = 0
    for sample in SAMPLES.get(op, []):
        call = Call(sample)
        nodes = members(call, group)
        if not nodes or not isinstance(_linear(call.node, {n: Partial() for n in nodes}), Partial):
            continue
        let_through += 1
        if sample.truth == "meta":
            continue
        p, q = ({n: torch.randn_like(call.values[n]) for n in nodes} for _ in range(2))
        values = [p, q, {n: p[n] + q[n] for n in nodes}, {n: 3 * p[n] for n in nodes}]
        results = [outputs(call.run({**call.values, **v})) for v in values]
        for one, other, both, three in zip(*results, strict=True):
            torch.testing.assert_close(both, one + other, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(three, 3 * one, rtol=1e-5, atol=1e-5)
    assert let_through, f"no sample of {op} where {sorted(group)} is already summed over examples and may pass"


def test_one_argument_of_a_joint_group_may_be_shared() -> None:
    """``where(mask, partial, shared)``: the shared term is owned by all alike, the rest is linear."""
    call = Call(SAMPLES[torch.ops.aten.where.self][1])
    nodes = members(call, frozenset({"self"}))
    assert isinstance(_linear(call.node, {n: Partial() for n in nodes}), Partial)


@pytest.mark.parametrize("name", ["aten.mul.Tensor", "aten.mm.default", "aten.bmm.default"])
def test_a_product_of_two_sums_is_not_a_sum(name: str) -> None:
    call = next(c for op, group in SAMPLES.items() if str(op) == name for s in group if len((c := Call(s)).values) == 2)
    assert isinstance(_linear(call.node, {n: Partial() for n in call.values}), Mixed)


def test_rules_are_plain_functions_of_the_op() -> None:
    for function in dict.fromkeys(RULES.values()):
        assert list(inspect.signature(function).parameters) == ["op"], function


# ------------------------------------------------------------------------------------- the checks themselves can fail


def planted(name: str, index: int) -> Call:
    space, op, overload = name.split(".")
    return Call(SAMPLES[getattr(getattr(getattr(torch.ops, space), op), overload)][index])


@pytest.mark.parametrize(
    "name, index, claim",
    [
        ("aten.roll.default", 1, Batched(0)),
        ("aten.mm.default", 6, Batched(0)),  # in-batch negatives
        ("aten.view.default", 0, Batched(0, B, 1)),  # folded the wrong way round
        ("aten.slice.Tensor", 3, Batched(0)),
        ("aten.index.Tensor", 8, Batched(0)),
        ("aten.add.Tensor", 4, Batched(0)),
        ("aten.bmm.default", 5, Batched(1)),
    ],
)
def test_a_wrong_batched_is_noticed(name: str, index: int, claim: Batched) -> None:
    call = planted(name, index)
    assert describe(call.claim) != describe(claim)
    with pytest.raises(AssertionError, match="rows of other examples"):
        check_batched(call, claim, 0)


@pytest.mark.parametrize("name, index", [("aten.amax.default", 3), ("aten.mm.default", 6), ("aten.exp.default", 0)])
def test_a_wrong_partial_is_noticed(name: str, index: int) -> None:
    with pytest.raises(AssertionError):
        check_partial(planted(name, index), 0)


@pytest.mark.parametrize("name, index", [("aten.mm.default", 0), ("aten.slice.Tensor", 8), ("aten.cumsum.default", 2)])
def test_a_wrong_shared_is_noticed(name: str, index: int) -> None:
    with pytest.raises(AssertionError):
        check_shared(planted(name, index), 0)
