"""What the ops promise beyond their values: accuracy of the gradient, memory, fake kernels, torch.compile, imports."""

import gc
import importlib
import math

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import gnsfx.kernels.ops as ops
from gnsfx.kernels import reference, tiling
from gnsfx.kernels.convolution_norm import convolution_sq_norm
from gnsfx.kernels.embedding_norm import embedding_sq_norm
from gnsfx.kernels.ghost_norm import ghost_sq_norm
from gnsfx.kernels.mm_norm import mm_sq_norm
from gnsfx.kernels.tied_norm import tied_mm_sq_norm, tied_sq_norm

gns = torch.ops.gnsfx


def sample(name: str, B: int) -> tuple:
    """Arguments of one op for B examples."""
    randn = torch.randn
    match name:
        case "mm_sq_norm" | "ghost_sq_norm":
            return randn(B, 2, 5, 7), randn(B, 2, 5, 4)
        case "embedding_sq_norm":
            return torch.randint(9, (B, 6)), randn(B, 6, 3)
        case "tied_sq_norm" | "tied_mm_sq_norm":
            return torch.randint(9, (B, 6)), randn(B, 6, 3), randn(B, 5, 3), randn(B, 5, 9)
        case "convolution_sq_norm":
            return randn(B, 1, 6, 9), randn(B, 1, 4, 9), randn(6, 4, 3), [1], [1], [1], False, [0], 1
        case "estimate_sq_norm":
            return randn(B, 2, 5, 7), randn(B, 2, 5, 4), torch.tensor(3), 1, 4, 2, False
        case "estimate_convolution_sq_norm":
            draw = torch.tensor(3), 1, 4, 2
            return randn(B, 1, 6, 9), randn(B, 1, 4, 9), randn(6, 4, 3), [1], [1], [1], False, [0], 1, *draw
        case "collect":
            return ([randn(B), randn(4, B), randn(B).double()],)
        case "mm_norm_parts":
            return randn(B, 5, 130), randn(B, 5, 4), 1
        case "gram_norm_parts":
            return randn(B, 40, 7), [randn(B, 40, 4), randn(B, 40, 3)], 2
        case "embedding_norm_parts":
            return torch.randint(9, (B, 20)), randn(B, 20, 3)
    raise ValueError(name)


NAMES = (
    "mm_sq_norm", "ghost_sq_norm", "embedding_sq_norm", "tied_sq_norm", "tied_mm_sq_norm", "convolution_sq_norm", "collect",
    "estimate_sq_norm", "estimate_convolution_sq_norm", "mm_norm_parts", "gram_norm_parts", "embedding_norm_parts",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(gns, name).default, sample(name, 3), test_utils=checks)


@pytest.mark.parametrize("name", NAMES)
def test_fake_kernel_keeps_the_batch_symbolic(name):
    real = sample(name, 11)
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def symbolic(t: torch.Tensor) -> torch.Tensor:
        batch = DimDynamic.DYNAMIC if t.shape[:1] == (11,) else DimDynamic.STATIC
        context = StatelessSymbolicContext(([batch] + [DimDynamic.STATIC] * (t.dim() - 1))[: t.dim()])
        return mode.from_tensor(t, symbolic_context=context, source=ConstantSource(f"t{id(t)}"))

    arguments = tree_map_only(torch.Tensor, symbolic, real)
    with mode:
        last = tree_leaves(getattr(gns, name)(*arguments))[-1]
    assert isinstance(last.shape[-1], torch.SymInt)
    assert last.dtype == tree_leaves(getattr(gns, name)(*real))[-1].dtype
    assert not mode.shape_env.guards


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # Inductor's own, while it is imported
@pytest.mark.parametrize("name", NAMES)
def test_compiles_once_for_every_batch_size(name):
    def run(*arguments):
        return [t * 2 for t in tree_leaves(getattr(gns, name)(*arguments))]

    torch._dynamo.reset()
    compiled = torch.compile(run, dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B in (11, 13, 8):  # no other dimension has 11: Dynamo would tie equal sizes together
            arguments = sample(name, B)
            for actual, expected in zip(compiled(*arguments), run(*arguments), strict=True):
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(8, 1, 64, 96, 80), (32, 1, 4, 48, 48), (4, 3, 128, 32, 64)], ids=str)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("signal", (0.0, 3.0))
def test_gradient_is_as_good_as_plain_matmul(shape, dtype, signal):
    """No further from the truth than torch's own matmul, up to one rounding of each example's part."""
    B, E, T, I, O = shape
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(B, E, T, I, generator=generator, dtype=torch.float64) + signal).to(dtype)
    g = (torch.randn(B, E, T, O, generator=generator, dtype=torch.float64) + signal).to(dtype)
    truth, sq_norms = reference.mm_sq_norm_ref(x.double(), g.double())
    plain = torch.stack([x[:, e].flatten(0, 1).t() @ g[:, e].flatten(0, 1) for e in range(E)])
    error, plain_error = ((t.double() - truth).norm() for t in (gns.mm_sq_norm(x, g)[0], plain))
    assert error <= plain_error + torch.finfo(dtype).eps / 2 * sq_norms.sum().sqrt()


@pytest.mark.parametrize("budget", (tiling.CPU_BUDGET, 64))
def test_sum_over_examples_is_not_taken_in_bf16(monkeypatch, budget):
    """300 equal examples: a running sum in bf16 would stop at 256, where its neighbours are 2 apart."""
    monkeypatch.setattr(tiling, "CPU_BUDGET", budget)
    x, g = torch.ones(300, 1, 1, 3, dtype=torch.bfloat16), torch.ones(300, 1, 1, 2, dtype=torch.bfloat16)
    assert (gns.mm_sq_norm(x, g)[0] == 300).all()
    weight = torch.empty(2, 3, 2, dtype=torch.bfloat16)
    arguments = g.view(300, 1, 2, 1), x.view(300, 1, 3, 1).expand(-1, -1, -1, 2), weight, [1], [0], [1], False, [0], 1
    assert (gns.convolution_sq_norm(*arguments)[0] == 300).all()


def test_squares_of_a_long_gradient_do_not_drift():
    x, g = torch.rand(1, 1, 2, 1500), torch.rand(1, 1, 2, 1200)
    truth = reference.ghost_sq_norm_ref(x.double(), g.double())
    torch.testing.assert_close(gns.mm_sq_norm(x, g)[1].double(), truth, rtol=5e-7, atol=0)


@pytest.mark.parametrize("name", NAMES[:4])
def test_nan_is_not_hidden(name):
    arguments = sample(name, 3)
    arguments[1][1].fill_(float("nan"))
    sq_norms = tree_leaves(getattr(gns, name)(*arguments))[-1]
    assert sq_norms.isnan().tolist() == [False, True, False]


class LargestStorage(TorchDispatchMode):
    """Remembers the bytes of the largest storage that an operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for t in tree_leaves(result):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes() if isinstance(t, torch.Tensor) else 0)
        return result


def largest(op, *arguments) -> int:
    with LargestStorage() as seen:
        op(*arguments)
    return seen.bytes


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_nothing_of_the_size_of_all_examples_is_allocated(dtype):
    B, T, V, D, MiB = 16, 8, 3000, 400, 1 << 20
    x, h = torch.randn(B, T, D, dtype=dtype), torch.randn(B, T, V, dtype=dtype)
    ids, g = torch.randint(V, (B, T)), torch.randn(B, T, D, dtype=dtype)
    gradient = V * D * 4
    assert largest(mm_sq_norm, x.unsqueeze(1), h.unsqueeze(1)) <= max(gradient, 4 * MiB)
    assert largest(tied_mm_sq_norm, ids, g, x, h) <= max(gradient, 4 * MiB)
    for op, *arguments in (
        (ghost_sq_norm, x.unsqueeze(1), h.unsqueeze(1)),
        (embedding_sq_norm, ids, g),
        (tied_sq_norm, ids, g, x, h),
    ):
        assert largest(op, *arguments) <= 4 * MiB, op.__name__
    input, grad_output = torch.randn(B, 1, 128, 6, dtype=dtype), torch.randn(B, 1, 256, 6, dtype=dtype)
    weight = torch.empty(256, 128, 3, dtype=dtype)
    arguments = grad_output, input, weight, [1], [1], [1], False, [0], 1
    assert largest(convolution_sq_norm, *arguments) <= math.prod(weight.shape) * 4


def test_long_positions_keep_grams_small():
    x, g = torch.randn(2, 1, 2000, 3), torch.randn(2, 1, 2000, 5)
    assert largest(ghost_sq_norm, x, g) <= 4 << 20


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_require_grad_are_accepted(name):
    arguments = sample(name, 3)
    floats = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    expected = getattr(gns, name)(*arguments)
    for t in floats:
        t.requires_grad_()
    torch.testing.assert_close(getattr(gns, name)(*arguments), expected)


def test_second_import_changes_nothing():
    held = gns.mm_sq_norm.default  # as a compiled graph holds it
    first = dict(vars(ops))
    importlib.reload(ops)
    vars(ops).update(first)  # what other tests take from the module is what the ops run
    gc.collect()  # a Library that nobody holds takes its ops with it
    assert held(*sample("mm_sq_norm", 2))[1].shape == (2,)
    assert gns.mm_sq_norm.default is held


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_off_the_cpu_nothing_is_read_back(dtype):
    """Meta tensors take the branches of a GPU and have no values: an op body that asked for one would raise."""

    def on_meta(t: torch.Tensor) -> torch.Tensor:
        return t.to("meta", dtype if t.is_floating_point() else t.dtype)

    for kernel in (
        mm_sq_norm,
        ghost_sq_norm,
        embedding_sq_norm,
        tied_sq_norm,
        tied_mm_sq_norm,
        convolution_sq_norm,
        ops.collect,
    ):
        sq_norms = tree_leaves(kernel(*tree_map_only(torch.Tensor, on_meta, sample(kernel.__name__, 3))))[-1]
        assert sq_norms.dtype == torch.float32
        assert sq_norms.device.type == "meta"
