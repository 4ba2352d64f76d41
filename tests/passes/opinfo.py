"""PyTorch's own operator database as a witness: what the rules claim of its samples, against numbers.

    python -m tests.passes.opinfo                      # all operators: minutes
    python -m tests.passes.opinfo --only linalg --verbose

A sample is traced forward and backward by AOTAutograd with the decompositions that gnsfx compiles with. Then one
dimension after the other is taken for the batch, and each node of the joint graph is checked by running it twice:

    batched     no row of another example moves when the rows of some examples are replaced
    partial     replacing all examples changes it by the sum of what replacing each part of them changes
    shared      nothing moves; a statistic of the batch is held fixed for the nodes behind it
    the norms   of the shared arguments are those of per-example autograd in eager mode
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from gnsfx.passes.attach_collectors import slots as leaf_slots
from gnsfx.passes.joint_graph import read_joint_graph
from gnsfx.passes.pipeline import Plan, rewrite
from gnsfx.passes.propagate import States, propagate
from gnsfx.passes.state import Batched, Mixed, Partial, Routed, Shared, describe
from tests.passes.traced import (
    Choice,
    Traced,
    choices,
    copied,
    evaluate,
    is_random,
    labels,
    numbers_rows,
    operators,
    other,
    quiet,
    samples_of,
)

DEFECTS = ("the rule for", "measuring it failed")


@dataclass(slots=True)
class Outcome:
    """``wrong``: claims that the numbers contradict. ``missing``: ops without a rule, and how often one was asked for."""

    cases: int = 0
    compared: int = 0
    wrong: list[str] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    rows: Counter[Any] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, other: Outcome) -> None:
        self.cases, self.compared = self.cases + other.cases, self.compared + other.compared
        self.wrong += other.wrong
        for name in ("missing", "refused", "rows", "skipped"):
            getattr(self, name).update(getattr(other, name))


# ------------------------------------------------------------------------------------------------------- the checks


def differs(a: Tensor, b: Tensor) -> Tensor:
    if not (a.is_floating_point() or a.is_complex()):
        return a != b
    scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
    return ~torch.isclose(a, b, rtol=rtol(a), atol=rtol(a) * scale, equal_nan=True)


def rtol(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps * 2.0**22 if value.dtype in (torch.float64, torch.complex128) else 1e-3


class Check:
    """One sample with one choice of the batch dimension."""

    def __init__(self, traced: Traced, choice: Choice) -> None:
        self.traced, (self.B, self.inputs) = traced, choice
        self.states: States = propagate(traced.view, dict(self.inputs), self.B)
        self.held = any(isinstance(s, Routed) or numbers_rows(n, s) for n, s in self.states.items())
        self.outcome = Outcome(cases=1)

    def replaced(self, examples: Sequence[int]) -> dict[Node, Any]:
        """Values of the nodes with other rows for these examples; shared values stay what they were."""
        base, env = self.traced.values, dict(self.traced.values)
        for node, state in self.states.items():
            if node.op == "placeholder" and isinstance(state, (Batched, Routed)) and not self._routes(base[node]):
                mine = labels(state, base[node], self.B, base)
                assert mine is not None
                chosen = torch.isin(mine, torch.tensor(list(examples)))
                env[node] = torch.where(chosen, other(base[node], state, self.B), base[node])
        for node in self.traced.graph.nodes:
            if node.op != "call_function" or is_random(node) or all(env[a] is base[a] for a in node.all_input_nodes):
                continue
            state = self.states.get(node)
            if isinstance(state, Mixed) or (state is None and not isinstance(node.meta.get("val"), (tuple, list))):
                continue
            value = evaluate(node, env)
            if self._routes(value):
                continue
            if isinstance(state, Shared):
                if not state.doubt and isinstance(value, Tensor) and bool(differs(value, base[node]).any()):
                    self.wrong(node, "moves with the examples")
                continue
            env[node] = value
        return env

    def _routes(self, value: Any) -> bool:
        """Where rows are chosen or counted by data, the choice is held fixed: integers have no gradient, and name the examples."""
        return self.held and isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())

    def wrong(self, node: Node, what: str) -> None:
        text = f"{node.target} claimed {describe(self.states[node])}: {what}"
        self.outcome.wrong.append(f"{text} [{', '.join(f'x{i} {describe(s)}' for i, s in self.inputs.items())}]")

    def run(self) -> Outcome:
        base, last = self.traced.values, self.B - 1
        for node, state in self.states.items():
            self._count(node, state)
        groups = [[0], list(range(1, self.B))] + ([[last], list(range(last))] if last > 1 else [])
        try:
            moved = [self.replaced(g) for g in groups]
            everything = self.replaced(range(self.B))
        except RuntimeError as error:
            self.outcome.skipped[f"other values are not accepted: {str(error)[:80]}"] += 1
            return self.outcome
        bad: set[Node] = set()
        for node, state in self.states.items():
            value = base.get(node)
            if not isinstance(value, Tensor) or not value.numel() or any(a in bad for a in node.all_input_nodes):
                continue
            before = len(self.outcome.wrong)
            if isinstance(state, (Batched, Routed)):
                self._batched(node, state, value, groups, moved)
            elif isinstance(state, Partial):
                for one, rest in zip(moved[::2], moved[1::2], strict=True):
                    self._partial(node, value, one[node], rest[node], everything[node])
            if len(self.outcome.wrong) > before:
                bad.add(node)
        self._norms()
        return self.outcome

    def _count(self, node: Node, state: Any) -> None:
        for s in state if isinstance(state, tuple) else (state,):
            if isinstance(s, Mixed) and s.node is node:
                reason = s.reason
                if reason.startswith("no rule for"):
                    self.outcome.missing[reason.removeprefix("no rule for ")] += 1
                elif reason.startswith(DEFECTS):
                    self.outcome.wrong.append(reason)
                else:
                    self.outcome.refused[f"{node.target}: {reason}"] += 1
            elif not isinstance(s, (Mixed, Shared)) and node.op == "call_function":
                self.outcome.rows[node.target] += 1

    def _batched(self, node: Node, state: Batched | Routed, value: Tensor, groups: Any, moved: Any) -> None:
        mine = labels(state, value, self.B, self.traced.values)
        if mine is None:
            self.wrong(node, f"the shape is {list(value.shape)} and there are {self.B} examples")
            return
        for group, env in zip(groups, moved, strict=True):
            still = ~torch.isin(mine, torch.tensor(group))
            if bool((differs(env[node], value) & still).any()):
                self.wrong(node, "rows of other examples move")
                return

    def _partial(self, node: Node, value: Tensor, one: Tensor, rest: Tensor, everything: Tensor) -> None:
        if not (
            value.isfinite().all() and everything.isfinite().all() and one.isfinite().all() and rest.isfinite().all()
        ):
            return
        scale = max(float(v.abs().max()) for v in (value, one, rest, everything))
        error = float(((everything - value) - (one - value) - (rest - value)).abs().max())
        if error > rtol(value) * scale:
            self.wrong(node, f"not a sum over examples: off by {error:.1e} beside {scale:.1e}")

    # ------------------------------------------------------------------------------------------------ the norms

    def _norms(self) -> None:
        """Rewrite the graph and compare norms with eager autograd, where every result has its rows per example."""
        traced = self.traced
        slots = tuple(
            i
            for i, t in enumerate(traced.inputs)
            if t.requires_grad and i not in self.inputs and i in traced.view.grads
        )
        where, state = next(iter(self.inputs.items()))
        results = [(n, self.states.get(n)) for i, n in sorted(traced.view.results.items())][
            : len(traced.view.results) - 2
        ]
        results = [(n, s, i) for i, (n, s) in enumerate(results)]
        if not slots or traced.random:
            return
        plan = Plan(
            slots, dict(self.inputs), (where, state.dim, int(state.outer * state.inner)), None, slots, 1 << 30, "auto"
        )
        graph = copied(traced.graph)
        for slot, shape in zip(leaf_slots(graph), [(2, len(slots) + 1), (len(slots), self.B)], strict=True):
            slot.meta["val"] = slot.meta["val"].new_empty(shape)
        report = rewrite(graph, plan)
        view = read_joint_graph(graph)
        env = traced.run(graph, view, {})
        for index, gradient in traced.view.grads.items():
            if index < len(traced.inputs) and bool(differs(env[view.grads[index]], traced.values[gradient]).any()):
                self.outcome.wrong.append(f"the gradient of x{index} changes when it is measured: {report.records}")
        for record in report.records:
            if record.status == "refused" and record.reason.startswith(DEFECTS):
                self.outcome.wrong.append(record.reason)
        tangents = {n: t for t, n in traced.view.tangents.items()}
        if any(n in tangents and not isinstance(s, (Batched, Routed)) for n, s, _ in results):
            return
        truth = self._truth([(i, s, traced.values[tangents[n]]) for n, s, i in results if n in tangents], slots)
        if truth is None:
            return
        norms = env[view.grads[len(traced.inputs) + 1]]
        largest = max((float(t.max()) for t in truth), default=0.0)
        for row, record, expected in zip(norms, report.records, truth, strict=True):
            if record.status != "measured" or not expected.isfinite().all():
                continue
            self.outcome.compared += 1
            error = float((row - expected).abs().max())
            tolerance = 1e-3 if traced.inputs[record.slot].dtype != torch.float64 else 1e-9
            if not error <= tolerance * float(expected.max()) + tolerance**2 * largest:
                self.outcome.wrong.append(
                    f"norms of x{record.slot} by {record.operation} ({record.path}): off by {error:.1e} beside {float(expected.max()):.1e}"
                    f" [{', '.join(f'x{i} {describe(s)}' for i, s in self.inputs.items())}]"
                )

    def _truth(
        self, results: list[tuple[int, Batched | Routed, Tensor]], slots: tuple[int, ...]
    ) -> list[Tensor] | None:
        """(B,) squared norms of the gradient of each example's part of the results, per shared argument."""
        inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in self.traced.inputs]
        outputs = self.traced.call(*inputs)
        rows: list[list[Tensor]] = []
        for b in range(self.B):
            weights = []
            for i, state, tangent in results:
                mine = labels(state, outputs[i], self.B, self.traced.values)
                if mine is None:
                    return None
                weights.append(torch.where(mine == b, tangent, torch.zeros_like(tangent)))
            grads = torch.autograd.grad([outputs[i] for i, _, _ in results], [inputs[i] for i in slots], weights,
                                        retain_graph=True, allow_unused=True)  # fmt: skip
            rows.append([torch.zeros(()).double() if g is None else g.abs().square().sum().double() for g in grads])
        return [torch.stack(column) for column in zip(*rows, strict=True)]


def check_operator(info: Any, samples: int, batches: int) -> Outcome:
    """Some samples of an operator, each with some choices of the batch dimension, spread over all there are."""
    total = Outcome()
    with quiet():
        try:
            found = list(samples_of(info, samples))
        except Exception as error:
            total.skipped[f"no samples: {type(error).__name__}"] += 1
            return total
        for sample in found:
            try:
                traced = Traced(info, sample)
            except Exception as error:
                total.skipped[f"{info.name} is not traced: {type(error).__name__}: {str(error)[:80]}"] += 1
                continue
            every = choices([t.shape for t in traced.inputs])
            for choice in every[:: max(len(every) // batches, 1)][:batches]:
                try:
                    total.add(Check(traced, choice).run())
                except torch.linalg.LinAlgError as error:
                    total.skipped[f"{info.name}: {str(error)[:60]}"] += 1
    total.wrong = [f"{info.name}: {w}" for w in dict.fromkeys(total.wrong)]
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="operators with this in their name")
    parser.add_argument("--samples", type=int, default=8, help="samples per operator")
    parser.add_argument("--batches", type=int, default=12, help="choices of the batch dimension per sample")
    parser.add_argument("--verbose", action="store_true", help="a line per operator")
    options = parser.parse_args()
    total, start = Outcome(), time.time()
    for info in operators():
        if options.only in info.name:
            outcome = check_operator(info, options.samples, options.batches)
            total.add(outcome)
            for line in outcome.wrong:
                print("WRONG", line, flush=True)
            if options.verbose:
                print(f"{info.name}: {outcome.cases} cases, {outcome.compared} norms", flush=True)
    seconds = time.time() - start
    print(f"{total.cases} cases, {total.compared} norms compared, {len(total.wrong)} wrong, {seconds:.0f} s")
    print(f"{len(total.rows)} ops with a claim checked")
    for title, counter in (("no rule", total.missing), ("refused", total.refused), ("skipped", total.skipped)):
        print(f"\n{title}:")
        for name, count in counter.most_common(60):
            print(f"  {count:6} {name}")
    return 1 if total.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
