"""Imports point one way: tests, examples -> gnsfx -> passes -> kernels.{ops,cost,machine} -> kernels.* -> torch.

Within gnsfx: the public names -> gnsfx.batch_size -> gnsfx.noise -> everything else.

``gnsfx.errors``, ``gnsfx.config``, ``gnsfx._torch`` and ``gnsfx._torch_distributed`` (the private names of PyTorch) are leaves: anyone may import
them, and they import nothing else of ours. Triton is imported by gnsfx.kernels.triton.* only, and those (but for the plan) in
functions only: the package works where it is not installed.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAVES = {"gnsfx.errors", "gnsfx.config", "gnsfx._torch", "gnsfx._torch_distributed"}
STATISTICS = {
    "gnsfx.noise.estimators",
    "gnsfx.noise.series",
    "gnsfx.noise.intervals",
}  # which benchmarks study by themselves
COSTS = {"gnsfx.kernels.cost", "gnsfx.kernels.cost_convolution", "gnsfx.kernels.cost_cuda"}
DOORS = {"gnsfx.kernels.ops", "gnsfx.kernels.machine", *COSTS}  # all that passes may know of kernels
SHARED = "gnsfx.kernels.gpu"  # but for what both must know: which CUDA kernels run where
TRITON, PLAN = "gnsfx.kernels.triton.", "gnsfx.kernels.triton.plan"


HOST = {"gnsfx.compiled_graph", "gnsfx.leaves", "gnsfx.tracked"}  # what host_time takes the time of
PLANNING = {
    "gnsfx.calibrate",
    "gnsfx.kernels.cost",
    "gnsfx.kernels.cost_cuda",
    "gnsfx.kernels.machine",
}  # which benchmarks/paths.py puts to the test


def modules():
    """Our source files: dotted name -> path. Through the real folders, not through the links to them."""
    for path in sorted([*ROOT.glob("gnsfx/*.py"), *ROOT.glob("gnsfx/noise/*.py"), *ROOT.glob("gnsfx/batch_size/*.py")]):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path
    for folder in ("passes", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(("gnsfx", *parts)).removesuffix(".__init__"), path


SOURCES = dict(modules())


def level(module):
    """Height in the house; an import goes down or stays on its floor."""
    if module in LEAVES:
        return 0
    if module.startswith("gnsfx.passes"):
        return 3
    if module.startswith("gnsfx.kernels"):
        return 2 if module in DOORS else 1
    if module == "gnsfx":
        return 7
    return {"noise": 5, "batch_size": 6}.get(module.split(".")[1], 4)


def imports(tree):
    """(imported module, whether inside a function) for every import statement."""
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or ""), id(node) in inner
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in SOURCES or name in DOORS else node.module), id(node) in inner


def violations(module, source):
    for target, inside in imports(ast.parse(source)):
        top = target.partition(".")[0]
        if top in ("", "passes", "kernels"):
            yield f"{module} imports {target}: the import names are gnsfx.passes.* and gnsfx.kernels.*"
        elif top == "triton" and not module.startswith(TRITON):
            yield f"{module} imports {target}: only files in kernels/triton may"
        elif target.startswith(TRITON) and target != PLAN and not (inside or module.startswith(TRITON)):
            yield f"{module} imports {target}, which needs Triton: only in functions"
        elif top == "gnsfx" and target != module:
            if level(target) > level(module):
                yield f"{module} imports {target}: upward"
            elif level(module) > 2 and level(target) == 1 and target != SHARED:
                yield f"{module} imports {target}: kernels are reached through {' and '.join(sorted(DOORS))}"


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module):
    assert not list(violations(module, SOURCES[module].read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]), ids=lambda p: p.name
)
def test_examples_use_what_is_public(path):
    ours = {target for target, _ in imports(ast.parse(path.read_text(encoding="utf-8"))) if target.startswith("gnsfx")}
    studied = STATISTICS | PLANNING if path.parent.name == "benchmarks" else set()
    studied |= HOST if path.name == "host_time.py" else set()
    assert ours <= {"gnsfx"} | studied


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("gnsfx.passes.emit", "import gnsfx", "upward"),
        ("gnsfx.passes.emit", "from gnsfx.noise import estimators", "upward"),
        ("gnsfx.passes.emit", "def f():\n    from gnsfx.noise.estimators import noise_scale", "upward"),
        ("gnsfx.passes.emit", "from gnsfx.kernels.mm_norm import mm_sq_norm", "kernels are reached through"),
        ("gnsfx.kernels.mm_norm", "from gnsfx.kernels import ops", "upward"),
        ("gnsfx.kernels.ops", "from gnsfx.passes.state import State", "upward"),
        ("gnsfx.errors", "from gnsfx.noise.estimators import noise_scale", "upward"),
        ("gnsfx.noise.series", "from gnsfx.batch_size import unit", "upward"),
        ("gnsfx.collector", "from gnsfx.noise import estimators", "upward"),
        ("gnsfx.noise.estimators", "import kernels", "the import names are"),
        ("gnsfx.noise.estimators", "from .errors import GnsError", "the import names are"),
        ("gnsfx.kernels.mm_norm", "import triton.language as tl", "only files in kernels/triton"),
        ("gnsfx.passes.emit", "def f():\n    import triton", "only files in kernels/triton"),
        ("gnsfx.kernels.gpu_ops", "from gnsfx.kernels.triton import mm_norm", "which needs Triton"),
    ],
)
def test_the_check_can_fail(module, source, complaint):
    (found,) = violations(module, source)
    assert complaint in found
