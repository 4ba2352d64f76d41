"""Linear algebra: the last dimensions are a matrix or a vector, those before them are independent and broadcast.

qr of (B, m, n)                        batched(0) -> batched(0), batched(0)
solve (n, n), (B, n, k)                shared, batched(0) -> batched(0), and the factors shared
solve (n, n), (n, B)                   shared, batched(1) -> batched(1): a column of the result for each
inverse of (n, B)                      mixed: examples meet each other
"""

from __future__ import annotations

from gnsfx._torch import known
from gnsfx.passes.rules.table import Op, overloads, rule
from gnsfx.passes.state import Batched, Shared, State, rows, same_fold, same_sizes

# name: (dimensions of the matrix or vector in each argument, in each result)
CORES: dict[str, tuple[dict[str, int], tuple[int, ...]]] = {
    "_linalg_det": ({"A": 2}, (0, 2, 1)),
    "_linalg_eigh": ({"A": 2}, (1, 2)),
    "_linalg_eigvals": ({"self": 2}, (1,)),
    "_linalg_slogdet": ({"A": 2}, (0, 0, 2, 1)),
    "_linalg_solve_ex": ({"A": 2, "B": 2}, (2, 2, 1, 0)),
    "_linalg_svd": ({"A": 2}, (2, 1, 2)),
    "cholesky": ({"self": 2}, (2,)),
    "cholesky_inverse": ({"self": 2}, (2,)),
    "geqrf": ({"self": 2}, (2, 1)),
    "linalg_cholesky_ex": ({"self": 2}, (2, 0)),
    "linalg_eig": ({"self": 2}, (1, 2)),
    "linalg_householder_product": ({"input": 2, "tau": 1}, (2,)),
    "linalg_inv_ex": ({"A": 2}, (2, 0)),
    "linalg_ldl_factor_ex": ({"self": 2}, (2, 1, 0)),
    "linalg_lu": ({"A": 2}, (2, 2, 2)),
    "linalg_lu_factor_ex": ({"A": 2}, (2, 1, 0)),
    "linalg_matrix_exp": ({"self": 2}, (2,)),
    "linalg_qr": ({"A": 2}, (2, 2)),
    "lu_unpack": ({"LU_data": 2, "LU_pivots": 1}, (2, 2, 2)),
    "triangular_solve": ({"self": 2, "A": 2}, (2, 2)),
}
# linear in the right-hand side, which a weight's gradient may be
SOLVES: dict[str, tuple[dict[str, int], str]] = {
    "cholesky_solve": ({"self": 2, "input2": 2}, "self"),
    "linalg_ldl_solve": ({"LD": 2, "pivots": 1, "B": 2}, "B"),
    "linalg_lu_solve": ({"LU": 2, "pivots": 1, "B": 2}, "B"),
    "linalg_solve_triangular": ({"self": 2, "B": 2}, "B"),
    "ormqr": ({"self": 2, "input2": 1, "input3": 2}, "input3"),
}


def leading_rule(op: Op) -> State | tuple[State, ...]:
    name = str(op.node.target).split(".")[1]
    cores, results = CORES[name] if name in CORES else (SOLVES[name][0], (2,))
    if name == "_linalg_solve_ex":
        a, b = op.shape("A"), op.shape("B")
        if len(b) == 1 or same_sizes(a[:-1], b):  # B is a vector, or one for each matrix
            cores, results = {"A": 2, "B": 1}, (1, 2, 1, 0)
        elif len(a) - 1 == len(b):
            return _all(op, op.mixed("whether a right-hand side is a vector depends on a size"))
    values = op.node.meta["val"]
    column = _column(op, name, cores)
    if column is not None:
        return (column, *[Shared()] * (len(values) - 1)) if isinstance(values, (tuple, list)) else column
    rank = max(len(op.shape(n)) - core for n, core in cores.items())
    found: Batched | None = None
    for argument, core in cores.items():
        state = op.state(argument)
        if not isinstance(state, Batched):
            continue
        lead = len(op.shape(argument)) - core
        if state.dim >= lead:
            return _all(op, op.mixed(f"works across dimension {state.dim}, where the examples lie"))
        here = state.at(state.dim + rank - lead)
        if found is not None and (found.dim != here.dim or not same_fold(found, here)):
            return _all(op, op.mixed("the examples lie along different dimensions of two arguments"))
        found = here
    assert found is not None
    if not isinstance(values, (tuple, list)):
        return _result(op, found, tuple(values.shape), results[0], rank)
    return tuple(_result(op, found, tuple(v.shape), c, rank) for v, c in zip(values, results, strict=True))


def _column(op: Op, name: str, cores: dict[str, int]) -> Batched | None:
    """A X = B solves for each column of B apart, X A = B for each row: where the examples are these and A is shared."""
    side = "B" if name == "_linalg_solve_ex" else SOLVES[name][1] if name in SOLVES else ""
    behind = 1 if op.args.get("left", True) else 2
    if cores.get(side) != 2 or list(op.batched(*cores)) != [side]:
        return None
    state, value = op.state(side), op.node.meta["val"]
    assert isinstance(state, Batched)
    out = (value[0] if isinstance(value, (tuple, list)) else value).dim()
    return state.at(out - behind) if state.dim == len(op.shape(side)) - behind else None


def _all(op: Op, state: State) -> State | tuple[State, ...]:
    values = op.node.meta["val"]
    return (state,) * len(values) if isinstance(values, (tuple, list)) else state


def _result(op: Op, found: Batched, shape: tuple, core: int, rank: int) -> State:
    dim = found.dim + len(shape) - core - rank
    if dim < 0 or shape == (0,) or known(shape[dim] == 1):  # a factor that does not depend on the example
        return Shared()
    fits = known(shape[dim] == rows(found, op.examples))
    return found.at(dim) if fits else op.mixed("the batch dimension is broadcast against another dimension")


rule(*overloads(*(f"aten.{name}.default" for name in CORES)))(leading_rule)
for name, (_, side) in SOLVES.items():
    rule(*overloads(f"aten.{name}.default"), linear=[side])(leading_rule)
