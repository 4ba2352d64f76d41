"""The roofline of the plain step: what costs and what does not, and that both numbers are near the truth."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnsfx.inner import eager_compile
from gnsfx.kernels.cost import Cost, seconds
from gnsfx.kernels.machine import MACHINES
from gnsfx.passes.joint_graph import read_joint_graph
from gnsfx.passes.plain_step import LEAST, SHARE, held_bytes, memory_cap, plain_seconds

CPU = MACHINES["cpu"]


class Calls(nn.Module):
    def __init__(self, function, **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def of_joint_graph(model: nn.Module, *inputs: Tensor) -> tuple[float, int]:
    """plain_seconds and held_bytes."""
    found = []

    def look(graph) -> None:
        found.append((plain_seconds(graph), held_bytes(read_joint_graph(graph))))

    torch._dynamo.reset()
    torch.compile(model, backend=lambda gm, values: eager_compile(gm, values, look))(*inputs)
    return found[0]


def flops(amount: float) -> float:
    return seconds(Cost(flops=amount), CPU, torch.float32)


def test_matrix_multiplies_are_most_of_an_mlp():
    model = nn.Sequential(nn.Linear(512, 1024, bias=False), nn.GELU(), nn.Linear(1024, 256, bias=False))
    least = flops(2 * 512 * (512 * 1024 + 2 * 1024 * 256) + 2 * 512 * (512 * 1024))  # no gradient of the input
    found, _ = of_joint_graph(model, torch.randn(512, 512))
    assert least < found < 1.5 * least


def test_convolutions_count_what_the_backward_is_asked_for():
    x, first = torch.randn(4, 32, 20, 20), nn.Conv2d(32, 64, 3, bias=False)
    once = flops(2 * 4 * 18 * 18 * 64 * 32 * 9)
    found, _ = of_joint_graph(first, x)
    assert 2 * once < found < 3 * once  # forward, weight
    found, _ = of_joint_graph(first, x.requires_grad_())
    assert 3 * once < found < 4 * once  # and input


def test_attention_is_counted():
    def attend(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (x @ m.w).view(2, 256, 3, 4, 32).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)

    model = Calls(attend, w=torch.randn(128, 384))
    found, _ = of_joint_graph(model, torch.randn(2, 256, 128))
    assert found > flops(2 * 7 * 2 * 4 * 256 * 256 * 32 + 2 * 2 * (2 * 256 * 128 * 384))


def test_a_chain_of_pointwise_ops_is_one_pass():
    x = torch.randn(1 << 20)
    short, _ = of_joint_graph(Calls(lambda m, x: (x * m.w).sin(), w=torch.ones(1)), x)
    long, _ = of_joint_graph(Calls(lambda m, x: (x * m.w).sin().cos().sin().cos().sin(), w=torch.ones(1)), x)
    assert long < 1.5 * short


def test_views_cost_nothing():
    x = torch.randn(64, 64)
    plain, held = of_joint_graph(Calls(lambda m, x: x @ m.w, w=torch.randn(64, 64)), x)
    viewed, also = of_joint_graph(
        Calls(lambda m, x: (x.t().t().view(8, 8, 64) @ m.w).view(64, 64).unsqueeze(0), w=torch.randn(64, 64)), x
    )
    assert viewed == pytest.approx(plain, rel=0.05) and also == pytest.approx(held, rel=0.3)


def test_held_is_inputs_results_gradients_and_what_is_too_dear_to_compute_again():
    """Of w2 gelu(w1 x) the backward needs w1 x, from which gelu is computed again."""
    model = nn.Sequential(nn.Linear(64, 256, bias=False), nn.GELU(), nn.Linear(256, 32, bias=False))
    parameters = 4 * (64 * 256 + 256 * 32)
    _, held = of_joint_graph(model, torch.randn(100, 64))
    assert held == 2 * parameters + 4 * 100 * (64 + 256 + 32)


def test_cap():
    def cap(asked: int | None, width: int) -> int:
        found = []

        def look(graph) -> None:
            found.append(memory_cap(read_joint_graph(graph), asked))

        torch._dynamo.reset()
        model = nn.Linear(width, width, bias=False)
        torch.compile(model, backend=lambda gm, values: eager_compile(gm, values, look))(torch.randn(2, width))
        return found[0]

    assert cap(None, 8) == LEAST and cap(0, 8) == 0 and cap(123, 8) == 123
    wide = 1 << 13
    assert cap(None, wide) == int(SHARE * (2 * wide * wide + 2 * 2 * wide) * 4)
