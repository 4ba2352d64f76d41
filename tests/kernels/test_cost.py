"""The cost model: consistent, monotone, and near the best path on shapes that were really timed."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gnsfx.kernels.cost import (
    MACHINES,
    Cost,
    cheapest,
    convolution_paths,
    embedding_paths,
    matmul_paths,
    plain_matmul,
    reduction_paths,
    seconds,
    tied_paths,
)

CPU, CUDA = MACHINES["cpu"], MACHINES["cuda"]
extents = st.sampled_from((1, 2, 7, 64, 300, 4096))

# B, T, I, O, dtype, microseconds of each path: paths compiled by Inductor, minimum of interleaved runs, 2 threads of a
# Zen 5 server, torch 2.13.
MEASURED = [
    (64, 16, 128, 128, torch.float32, {"chunked": 288, "ghost": 256, "materialise": 249}),
    (64, 64, 128, 128, torch.float32, {"chunked": 723, "ghost": 1309, "materialise": 683}),
    (16, 256, 128, 128, torch.float32, {"chunked": 675, "ghost": 3031, "materialise": 620}),
    (4, 1024, 128, 128, torch.float32, {"chunked": 661, "materialise": 617}),
    (16, 1, 256, 256, torch.float32, {"chunked": 208, "ghost": 51, "materialise": 28, "outer": 18}),
    (16, 16, 256, 256, torch.float32, {"chunked": 462, "ghost": 230, "materialise": 340}),
    (64, 64, 256, 256, torch.float32, {"chunked": 3646, "ghost": 3796, "materialise": 3428}),
    (64, 128, 256, 256, torch.float32, {"chunked": 6216, "ghost": 10162, "materialise": 6031}),
    (4, 1024, 256, 256, torch.float32, {"chunked": 2473, "ghost": 14410, "materialise": 2386}),
    (16, 1, 768, 768, torch.float32, {"chunked": 3968, "ghost": 151, "materialise": 214, "outer": 105}),
    (4, 16, 768, 768, torch.float32, {"chunked": 754, "ghost": 397, "materialise": 907}),
    (16, 16, 768, 768, torch.float32, {"chunked": 3150, "ghost": 1508, "materialise": 12002}),
    (4, 64, 768, 768, torch.float32, {"chunked": 1713, "ghost": 1574, "materialise": 1827}),
    (64, 64, 768, 768, torch.float32, {"chunked": 27589, "ghost": 25694, "materialise": 64935}),
    (16, 128, 768, 768, torch.float32, {"chunked": 12339, "ghost": 14365, "materialise": 21028}),
    (4, 256, 768, 768, torch.float32, {"chunked": 5747, "ghost": 8863, "materialise": 5655}),
    (16, 256, 768, 768, torch.float32, {"chunked": 23805, "ghost": 36491, "materialise": 32165}),
    (4, 1024, 768, 768, torch.float32, {"chunked": 22839, "ghost": 58092, "materialise": 21135}),
    (8, 64, 768, 3072, torch.float32, {"chunked": 15795, "ghost": 12722, "materialise": 32582}),
    (16, 16, 1024, 1024, torch.float32, {"chunked": 5664, "ghost": 2613, "materialise": 22345}),
    (64, 1, 1024, 1024, torch.float32, {"chunked": 27939, "ghost": 872, "materialise": 4931, "outer": 663}),
    (8, 128, 384, 96, torch.float32, {"chunked": 492, "ghost": 982, "materialise": 397}),
    (64, 16, 128, 128, torch.bfloat16, {"chunked": 225, "ghost": 183, "materialise": 110}),
    (64, 64, 128, 128, torch.bfloat16, {"chunked": 351, "ghost": 946, "materialise": 231}),
    (16, 256, 128, 128, torch.bfloat16, {"chunked": 299, "ghost": 3175, "materialise": 199}),
    (4, 1024, 128, 128, torch.bfloat16, {"chunked": 235, "materialise": 169}),
    (16, 1, 256, 256, torch.bfloat16, {"chunked": 219, "ghost": 74, "materialise": 30, "outer": 23}),
    (16, 16, 256, 256, torch.bfloat16, {"chunked": 449, "ghost": 182, "materialise": 179}),
    (64, 64, 256, 256, torch.bfloat16, {"chunked": 2183, "ghost": 2661, "materialise": 1097}),
    (64, 128, 256, 256, torch.bfloat16, {"chunked": 2819, "ghost": 7307, "materialise": 1712}),
    (4, 1024, 256, 256, torch.bfloat16, {"chunked": 771, "ghost": 13922, "materialise": 673}),
    (16, 1, 768, 768, torch.bfloat16, {"chunked": 2171, "ghost": 139, "materialise": 254, "outer": 57}),
    (4, 16, 768, 768, torch.bfloat16, {"chunked": 640, "ghost": 221, "materialise": 372}),
    (16, 16, 768, 768, torch.bfloat16, {"chunked": 2358, "ghost": 577, "materialise": 1524}),
    (4, 64, 768, 768, torch.bfloat16, {"chunked": 880, "ghost": 714, "materialise": 543}),
    (64, 64, 768, 768, torch.bfloat16, {"chunked": 14364, "ghost": 10773, "materialise": 29152}),
    (16, 128, 768, 768, torch.bfloat16, {"chunked": 4998, "ghost": 6842, "materialise": 3636}),
    (4, 256, 768, 768, torch.bfloat16, {"chunked": 1750, "ghost": 4894, "materialise": 1348}),
    (16, 256, 768, 768, torch.bfloat16, {"chunked": 7165, "ghost": 20159, "materialise": 5989}),
    (4, 1024, 768, 768, torch.bfloat16, {"chunked": 5700, "ghost": 42202, "materialise": 5172}),
    (8, 64, 768, 3072, torch.bfloat16, {"chunked": 7197, "ghost": 4275, "materialise": 13667}),
    (16, 16, 1024, 1024, torch.bfloat16, {"chunked": 3807, "ghost": 894, "materialise": 10580}),
    (64, 1, 1024, 1024, torch.bfloat16, {"chunked": 11950, "ghost": 260, "materialise": 2026, "outer": 167}),
    (8, 128, 384, 96, torch.bfloat16, {"chunked": 213, "ghost": 768, "materialise": 121}),
]


def regret(B, T, I, O, dtype, times) -> float:
    """Time of the chosen path over that of the best one."""
    paths = matmul_paths(B, 1, T, I, O, dtype.itemsize)
    timed = {name: cost for name, cost in paths.items() if name in times}
    return times[cheapest(timed, CPU, dtype)] / min(times.values())


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: "-".join(map(str, row[:5])))
def test_choice_is_near_the_best(row):
    assert regret(*row) <= 1.25


def test_choices_are_near_the_best_on_average():
    assert statistics.mean(regret(*row) for row in MEASURED) <= 1.05


@given(B=extents, E=st.integers(1, 3), T=extents, I=extents, O=extents, itemsize=st.sampled_from((2, 4, 8)))
def test_every_path_contains_the_plain_gradient(B, E, T, I, O, itemsize):
    paths = matmul_paths(B, E, T, I, O, itemsize)
    assert set(paths) == {"materialise", "chunked", "ghost"} | ({"outer"} if T == 1 else set())
    plain = plain_matmul(B, E, T, I, O, itemsize)
    for cost in paths.values():
        assert cost.flops >= plain.flops and cost.bytes >= plain.bytes
        assert 0 < seconds(plain, CPU, torch.float32) < seconds(cost, CPU, torch.float32) < math.inf


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_ghost_wins_for_short_positions_and_loses_for_long_ones(device, dtype):
    def choice(T: int) -> str:
        paths = matmul_paths(8, 1, T, 2048, 2048, dtype.itemsize, device)
        return cheapest(paths, MACHINES[device], dtype)

    assert choice(1) == "outer"
    assert choice(16) == "ghost"
    assert choice(8192) in ("materialise", "chunked")


def test_memory_cap_is_kept_where_it_can_be():
    paths = {"large": Cost(flops=1, memory=100), "small": Cost(flops=1e9, memory=10)}
    assert cheapest(paths, CPU, torch.float32) == "large"
    assert cheapest(paths, CPU, torch.float32, memory_cap=50) == "small"
    assert cheapest(paths, CPU, torch.float32, memory_cap=5) == "small"


def test_materialise_is_the_only_path_whose_memory_grows_with_the_batch():
    few, many = (matmul_paths(B, 1, 512, 1024, 1024, 4) for B in (8, 800))
    assert many["materialise"].memory == 100 * few["materialise"].memory
    assert many["chunked"].memory == few["chunked"].memory
    assert many["ghost"].memory == few["ghost"].memory


def test_grams_of_bf16_run_at_fp32_speed_unless_the_device_widens():
    cost = Cost(accumulate_flops=1e9)
    assert seconds(cost, CPU, torch.bfloat16) == seconds(cost, CPU, torch.float32)
    assert seconds(cost, CUDA, torch.bfloat16) < seconds(cost, CUDA, torch.float32)


def test_costs_add_up_and_memory_is_the_larger():
    assert Cost(1, 2, 3, 4, 5, 6) + Cost(1, 1, 9, 1, 1, 1) == Cost(2, 3, 9, 5, 6, 7)


def test_other_contractions():
    assert set(embedding_paths(4, 1024, 768, 50257, 4)) == {"segments"}
    assert cheapest(embedding_paths(4, 1, 768, 50257, 4), CPU, torch.float32) == "outer"
    assert embedding_paths(4, 1024, 768, 10, 4)["segments"].memory < 4 * 50257 * 768 * 4
    assert set(reduction_paths(8, 128, 768, 2)) == {"materialise"}
    assert set(tied_paths(4, 128, 128, 256, 5000, 4)) == {"tied"}
    for weight, groups in (((64, 64, 3, 3), 1), ((256, 256, 3, 3), 1), ((96, 1, 7, 7), 96), ((64, 64, 1, 1), 1)):
        paths = convolution_paths(8, 1, weight, (28, 28), [1, 1], [0, 0], [1, 1], False, groups, 4)
        assert seconds(paths["per_example"], CPU, torch.float32) > 0


@given(B=extents, T=extents, D=extents, V=extents, itemsize=st.sampled_from((2, 4, 8)))
def test_more_examples_never_cost_less(B, T, D, V, itemsize):
    for paths in (embedding_paths, lambda B, T, D, V, i: tied_paths(B, T, T, D, V, i)):
        few, many = (paths(b, T, D, V, itemsize) for b in (B, 2 * B))
        for name in few:
            assert seconds(many[name], CPU, torch.float32) >= seconds(few[name], CPU, torch.float32)
