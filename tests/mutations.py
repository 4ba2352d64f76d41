"""Planted mistakes: each changes a line of gnsfx while it runs, and a test that is part of the suite must then fail.

    python -m tests.mutations                 # a table of all mistakes, and the test that notices each
    python -m tests.mutations --only tied

The test is run once as the code stands, where it must pass, and once with the mistake.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Mutation:
    """``where`` is ``module:function``; ``old`` occurs in it once. ``test`` is ``module:function`` with its arguments."""

    name: str
    where: str
    old: str
    new: str
    test: str
    arguments: tuple[Any, ...] = ()


def find(path: str) -> Any:
    module, name = path.split(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The code of the function is exchanged, so that every table and module that holds it runs the mistake."""
    function = find(mutation.where)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: {mutation.old!r} is {source.count(mutation.old)} times in {mutation.where}")
    tree = ast.parse(source.replace(mutation.old, mutation.new))
    tree.body[0].decorator_list = []  # type: ignore[attr-defined]
    space: dict[str, Any] = {}
    exec(compile(tree, mutation.where, "exec"), function.__globals__, space)
    right = function.__code__
    function.__code__ = space[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = right


def run(mutation: Mutation) -> None:
    """Raises what the test raises."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        find(mutation.test)(*mutation.arguments)


def caught(mutation: Mutation) -> str | None:
    """What the test says of the mistake, None if nothing. A test that does not exist raises: it would say something of
    any code."""
    find(mutation.test)
    with planted(mutation):
        try:
            run(mutation)
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1].line
            return f"{type(error).__name__} at {' '.join((line or '').split())}"[:120]
    return None


def check_samples(name: str) -> None:
    from tests.passes.samples import SAMPLES
    from tests.passes.test_rules import test_rule

    for samples in [group for op, group in SAMPLES.items() if str(op) == name]:
        for sample in samples:
            test_rule(sample)


def check_experts(name: str) -> None:
    from tests.passes import test_routing

    test_routing.test_experts(getattr(test_routing, name))


def check_for_cuda(path: str) -> None:
    """The graph of a CUDA device, by its ops' twins."""
    import pytest

    from gnsfx.kernels import machine
    from tests.passes import test_gpu_rewrite as rewrite

    with pytest.MonkeyPatch.context() as patch:
        rewrite.as_on_cuda(patch, {torch.float64})
        machine.machine_for.cache_clear()
        rewrite.compiled_like_autograd(rewrite.aligned(), **{"gns.path": path})
    machine.machine_for.cache_clear()


MODEL, PATH, RULE = (
    "tests.passes.test_measure:test_model",
    "tests.passes.test_measure:test_path",
    "tests.mutations:check_samples",
)
REFUSAL = "tests.gnsfx.test_refusals:"
CONTRACTION = "tests.passes.test_contractions:"
RULES, MEASURER, SUMS = "gnsfx.passes.rules.", "gnsfx.passes.measure:Measurer.", "gnsfx.passes.measure_sums:Sums."

SERIES = "tests.gnsfx.noise.test_series:test_running_sums_are_the_sums"
# fmt: off
MUTATIONS = [
    Mutation("permute maps dimensions the wrong way", RULES + "views:permute_rule",
             '[op.dim(d) for d in op["dims"]].index(state.dim)', 'op.dim(op["dims"][state.dim])', RULE, ("aten.permute.default",)),
    Mutation("a fold's outer and inner are swapped", "gnsfx.passes.state:reshape",
             "return Batched(dim, outer, inner)", "return Batched(dim, inner, outer)",
             "tests.passes.test_states:test_reshape"),
    Mutation("a slice of some examples keeps them apart", RULES + "views:slice_rule", "if whole else op.mixed(NOT_SPLIT)", "",
             RULE, ("aten.slice.Tensor",)),
    Mutation("a matrix product of examples with examples passes", RULES + "matmul:matmul_state", "else op.mixed(CROSS)", "else a",
             RULE, ("aten.mm.default",)),
    Mutation("a softmax over the batch passes", RULES + "reductions:scan_rule", 'state = op.mixed("runs along the batch dimension")', "pass",
             RULE, ("aten._softmax.default",)),
    Mutation("a gradient summed over the batch meets examples again", "gnsfx.passes.propagate:_linear",
             "return Mixed(COUPLED, node)", "return found[next(iter(found))][0]",
             REFUSAL + "test_batch_norm_in_training_refuses_what_lies_before_it"),
    Mutation("a product of two sums over the batch passes for a sum", "gnsfx.passes.propagate:_linear", "if partial <= g", "if partial & g",
             "tests.passes.test_rules:test_a_product_of_two_sums_is_not_a_sum", ("aten.mm.default",)),
    Mutation("the doubt about a cotangent is dropped", "gnsfx.passes.propagate:_cotangent",
             "        return state\n    return Shared(UNPAIRED)", "        return state\n    return state",
             REFUSAL + "test_a_gradient_that_may_be_of_one_argument_or_the_other"),
    Mutation("rows picked by an index may leave the graph", "gnsfx.passes.propagate:_named", "return not divides", "return True or not divides",
             REFUSAL + "test_rows_picked_by_an_index_leave_the_graph"),
    Mutation("the coupling flag is dropped", "gnsfx.passes.pipeline:find_coupling", "return explain_mixed(after)", "return None",
             REFUSAL + "test_coupling_in_a_later_graph_reaches_the_earlier_ones", ("centred",)),
    Mutation("a term of a reused weight is dropped", SUMS + "_concatenate", "self.emit(aten.cat.default, parts, dim)", "parts[0]",
             MODEL, ("reused",)),
    Mutation("the cross term of a tied table is dropped", SUMS + "measure", "tied_cross.default, ids, rows, *squeezed), 2.0)",
             "tied_cross.default, ids, rows, *squeezed), 0.0)", PATH, ("tied", "ghost")),
    Mutation("a transposed term is added untransposed", SUMS + "_oriented", "(g, x) if term.transposed else (x, g)", "(x, g)",
             MODEL, ("symmetric",)),
    Mutation("a scale is not squared", MEASURER + "_scaled", "scale * scale", "scale", MODEL, ("scaled",)),
    Mutation("a minus sign between two terms is lost", "gnsfx.passes.terms:peel", "scale = -scale", "pass", MODEL, ("reused_scaled",)),
    Mutation("a term of no example is not shared out", "gnsfx.passes.emit:Emitter.share",
             "return self(aten.div.Tensor, node, self.size(self.examples))", "return node", MODEL, ("weight_decay",)),
    Mutation("a term of no example is left out", "gnsfx.passes.stacks:Stacks.of", "shared = {a: emit.share(a) for a in joint_terms(source, partial)}",
             "shared = {a: emit(aten.mul.Tensor, a, 0.0) for a in joint_terms(source, partial)}", MODEL, ("weight_decay",)),
    Mutation("a mean is not divided", "gnsfx.passes.contractions:Reduction.materialise", 'if "mean" in', 'if "never" in',
             CONTRACTION + "test_reduction"),
    Mutation("padding_idx is ignored", "gnsfx.passes.find_contractions:embedding_contraction",
             "emit(aten.unsqueeze.default, emit(aten.ne.Scalar, index, padding), -1)", "None",
             CONTRACTION + "test_embedding_dense_backward"),
    Mutation("the mask of a lookup is ignored", "gnsfx.passes.find_contractions:index_put_contraction", "keep = mask\n", "keep = None\n",
             MODEL, ("embedding_padding",)),
    Mutation("negative rows are not wrapped", "gnsfx.passes.rows:own_rows", "emit(aten.lt.Scalar, index, 0)",
             "emit(aten.lt.Scalar, index, -99)", MODEL, ("negative_index",)),
    Mutation("a shared factor of a bilinear map is not split", "gnsfx.passes.find_contractions:trilinear_contraction",
             "if dim not in dims]", "if a is at]", MODEL, ("bilinear_of_rows",)),
    Mutation("the groups of a convolution are forgotten", "gnsfx.kernels.convolution_norm:_grouped",
             "count * convolution.groups", "count", MODEL, ("conv2d",)),
    Mutation("the dilation of a depthwise convolution is forgotten", "gnsfx.kernels.convolution_norm:_taps",
             "slice(k * d, k * d + (n - 1) * s + 1, s)", "slice(k, k + (n - 1) * s + 1, s)", MODEL, ("conv2d_depthwise_dilated",)),
    Mutation("contributions in bf16 are rounded before they are summed", "gnsfx.passes.stacks:rounds",
             "return node.meta[\"val\"].dtype in (torch.bfloat16, torch.float16)", "return False",
             "tests.passes.test_measure:test_bf16_gradients_are_as_good_as_plain_ones", ("materialise",)),
    Mutation("squares are summed in the dtype of the model", "gnsfx.passes.emit:accumulate_dtype",
             "torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32", "dtype",
             "tests.passes.test_measure:test_bf16_contributions_are_summed_in_single_precision"),
    Mutation("rows that routing cut out of an example count for the next", RULES + "naming:name_rows",
             "inner, total, node = inner * by, total * by,", "inner, total, node = inner, total * by,", "tests.mutations:check_experts", ("sort",)),
    Mutation("a view as complex numbers takes examples apart", RULES + "pointwise:complex_view_rule",
             "state.dim == len(op.shape())", "False", "tests.passes.test_opinfo:check", ("view_as_complex",)),
    Mutation("a solve with a vector is read as one with a matrix", RULES + "linalg:leading_rule", "if len(b) == 1 or same_sizes(a[:-1], b):",
             "if False:", RULE, ("aten._linalg_solve_ex.default",)),
    Mutation("a transform along the batch passes", RULES + "nn:fft_rule", 'op.mixed("transforms along the batch dimension")', "state",
             RULE, ("aten._fft_c2c.default",)),
    Mutation("the scatter of the steps counts a step against itself", "gnsfx.noise.moments:join", "between = mass * share *",
             "between = newer[-3] *", SERIES),
    Mutation("old steps fade once where they should twice", "gnsfx.noise.moments:join", "older[-1:] * decay * decay", "older[-1:] * decay", SERIES),
    Mutation("the covariance of noise and signal is forgotten", "gnsfx.noise.intervals:Estimate.residual_sd", "- 2 * ratio * self.cov",
             "", "tests.gnsfx.noise.test_intervals:test_ends_satisfy_fieller"),
    Mutation("the pair is that of large batches", "gnsfx.noise.estimators:unbiased_pair", "free = 1 - 1 / examples", "free = 1.0",
             "tests.gnsfx.noise.test_weights:test_token_means"),
    Mutation("a product gets the norms of another one with the same Gram", "gnsfx.passes.measure_products:Products._by_blocks",
             "getitem, block, len(others))", "getitem, block, 0)", "tests.mutations:check_for_cuda", ("ghost",)),
    Mutation("the gradient of the fused kernel is that of another layout", "gnsfx.passes.measure_products:Products.measure",
             "self._alone(x), self._alone(g), choice.tile", "self._alone(g), self._alone(x), choice.tile",
             "tests.mutations:check_for_cuda", ("fused",)),
    Mutation("parts that cancel are not clamped", "gnsfx.kernels.ops:collect", ".clamp_(min=0)", "",
             "tests.kernels.test_gpu_ops:test_collect_adds_and_clamps_parts_alone"),
]
# fmt: on


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mistakes with this in their name")
    options = parser.parse_args()
    survived, start = 0, time.time()
    chosen = [m for m in MUTATIONS if options.only in m.name]
    for mutation in chosen:
        run(mutation)
        noticed = caught(mutation)
        survived += noticed is None
        arguments = f"[{', '.join(map(str, mutation.arguments))}]" if mutation.arguments else ""
        print(
            f"{'caught  ' if noticed else 'SURVIVED'}  {mutation.name}\n          {mutation.test}{arguments}\n          {noticed}",
            flush=True,
        )
    print(f"{len(chosen) - survived} of {len(chosen)} planted mistakes are caught, {time.time() - start:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
