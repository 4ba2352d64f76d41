"""What CUDA kernels cost: never less than the work there is, steps where blocks and multiprocessors end, and the choices."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import paths_cuda
from gnsfx.kernels import cost_cuda
from gnsfx.kernels.cost import cheapest, matmul_paths, plain_matmul, seconds
from gnsfx.kernels.machine import CUDA_KERNELS, MACHINES
from gnsfx.kernels.triton import plan

CUDA = MACHINES["cuda"]
TABLE = Path(__file__).parents[2] / "benchmarks/results/paths_cuda_modelled.json"
REDUCE = plan.TILES.index(plan.REDUCE)
counts = st.integers(1, 300)
positions = st.sampled_from((1, 2, 17, 64, 65, 512, 1000, 4096))
widths = st.sampled_from((8, 64, 136, 768, 3072, 4096))
multiprocessors = st.sampled_from((1, 78, 132, 148))
tiles = st.sampled_from(list(cost_cuda.ALL_TILES))


def time(cost) -> float:
    return seconds(cost, CUDA, torch.bfloat16)


def candidates(B, T, I, O, count=132, memory=math.inf):
    """Path -> cost as on a device with our kernels, and the tiles."""
    tiles = cost_cuda.matmul_tiles(B, T, I, O, count, CUDA, memory)
    paths = matmul_paths(B, 1, T, I, O, 2, "cuda") | cost_cuda.matmul_paths(B, T, I, O, tiles, count)
    return {name: cost for name, cost in paths.items() if name != "plain"}, tiles


def choice(B, T, I, O, memory=math.inf) -> str:
    return cheapest(candidates(B, T, I, O, memory=memory)[0], CUDA, torch.bfloat16, memory)


@given(B=counts, T=positions, I=widths, O=widths, count=multiprocessors, tile=tiles)
def test_a_kernel_does_at_least_the_work_there_is(B, T, I, O, count, tile):
    found = cost_cuda.product(B, T, I, O, tile, count)
    assert found.multiplied >= plain_matmul(B, 1, T, I, O, 2).flops
    assert found.squares >= B * I * O / plan.TILES[tile].resident
    assert found.memory >= 4 * B and math.isfinite(time(found))


@given(B=counts, T=positions, K=widths, count=multiprocessors, tile=st.sampled_from(list(cost_cuda.ALL_GRAMS)))
def test_a_gram_multiplies_at_least_one_half_and_reads_all(B, T, K, count, tile):
    found = cost_cuda.gram(B, T, K, tile, count)
    assert found.multiplied >= B * T * (T + 1) * K
    assert found.bytes + found.multiplied / cost_cuda.HIDES_A_BYTE >= 2 * B * T * K
    assert not found.memory


@given(B=counts, T=positions, I=widths, O=widths, tile=tiles)
def test_twice_the_work_never_costs_less(B, T, I, O, tile):
    """But for what round numbers in plan.cut_products take from the best way to split examples."""
    once = 0.95 * time(cost_cuda.product(B, T, I, O, tile, 132))
    for more in ((2 * B, T, I, O), (B, 2 * T, I, O), (B, T, 2 * I, O), (B, T, I, 2 * O)):
        assert time(cost_cuda.product(*more, tile, 132)) >= once
    few, many = (time(cost_cuda.ghost(b, T, I, O, 0, 132)) for b in (B, 2 * B))
    assert many >= few


@pytest.mark.parametrize("tile", cost_cuda.ALL_TILES)
def test_positions_are_whole_blocks(tile):
    """Rows behind the last position are multiplied as zeros."""
    costs = [cost_cuda.product(8, T, 1024, 1024, tile, 132).multiplied for T in (1, 64, 65, 128)]
    assert costs[0] == costs[1] < costs[2] == costs[3] == 2 * costs[0]


def test_one_block_more_than_multiprocessors_is_a_round_more():
    full, more = (cost_cuda.product(1, 4096, 128 * n, 128, 0, 132) for n in (132, 133))
    assert more.large_flops == 2 * full.large_flops


@given(B=counts, T=positions, I=widths, O=widths, count=multiprocessors, tile=tiles)
def test_runs_cover_all_examples_and_beat_one_run(B, T, I, O, count, tile):
    cut = plan.cut_products(B, T, I, O, count, plan.TILES[tile])
    assert (cut.runs - 1) * cut.each < B <= cut.runs * cut.each and cut.programs == cut.blocks * cut.runs
    whole = T + plan.SQUARE + plan.TILES[tile].t
    assert -(-cut.programs // count) * cut.each * T <= -(-cut.blocks // count) * B * whole


def test_examples_are_split_where_blocks_alone_leave_the_machine_idle():
    assert plan.cut_products(16, 1024, 4096, 4096, 132, plan.LARGE).runs == 1
    assert plan.cut_products(16, 1024, 768, 3072, 132, plan.LARGE).runs > 1  # 144 blocks: a second round for 12 of them
    assert cost_cuda.product(16, 1024, 768, 3072, 0, 132).memory >= 4 * 2 * 768 * 3072


def test_a_shared_gram_is_counted_once():
    B, T, I, O = 64, 128, 768, 3072
    left, right = cost_cuda.gram(B, T, I, 0, 132), cost_cuda.with_gram(B, T, O, 0, 132)
    assert cost_cuda.ghost(B, T, I, O, 0, 132) == plain_matmul(B, 1, T, I, O, 2) + left + right


@pytest.mark.parametrize(("I", "O"), paths_cuda.WIDTHS)
def test_ghost_for_few_positions_and_products_for_many(I, O):
    chosen = {T: choice(16384 // T, T, I, O) for T in paths_cuda.POSITIONS}
    assert chosen[1] == "outer"
    assert {chosen[T] for T in (16, 64, 128)} == {"ghost"}
    assert chosen[1024] == "fused"
    assert chosen[8192] == "materialise"  # of two examples


def test_materialise_gives_way_to_the_memory_cap():
    B, T, I, O = 2, 8192, 4096, 4096
    assert choice(B, T, I, O) == "materialise" and choice(B, T, I, O, memory=64 << 20) == "fused"
    assert candidates(B, T, I, O)[0]["fused"].memory < 1 << 20


def test_tiles_without_sums_of_their_own_are_taken_under_a_cap():
    """Small tiles in two runs are quicker here, large ones hold no sum of a run."""
    B, T, I, O = 2, 4096, 768, 2048
    (free, quick), (capped, within) = candidates(B, T, I, O), candidates(B, T, I, O, memory=1 << 20)
    assert plan.TILES[quick["fused"]] is plan.SMALL and free["fused"].memory > 4 * 2 * I * O
    assert plan.TILES[within["fused"]] is plan.LARGE and capped["fused"].memory < 1 << 20


@given(B=counts, T=positions, I=widths, O=widths, count=multiprocessors)
def test_what_nothing_but_a_gpu_can_run_is_never_chosen(B, T, I, O, count):
    paths, tiles = candidates(B, T, I, O, count)
    assert tiles["fused"] != REDUCE and not paths["fused"].reduce_flops
    assert set(tiles) == {"fused", "ghost"} and tiles["ghost"] in cost_cuda.ALL_GRAMS
    assert candidates(B, T, I, O, count) == (paths, tiles)


def test_blocks_of_grams_follow_the_positions():
    def block(B: int, T: int) -> int:
        return plan.GRAMS[cost_cuda.gram_tile(B, T, 132, CUDA)].t

    assert (block(1024, 16), block(256, 64), block(16, 2048)) == (32, 64, 128)


def test_norms_of_a_norm_layer_are_nearly_free():
    paths = cost_cuda.norm_paths(8, 1024, 768, 2)
    assert 1 < time(paths["norm"]) / time(paths["plain"]) < 1.01


def test_lookups_read_the_gradient_once():
    paths = cost_cuda.embedding_paths(8, 1024, 768, 50257, 2)
    assert set(paths) == {"plain", "segments"}
    assert paths["segments"].bytes - paths["plain"].bytes < 1.1 * 2 * 8 * 1024 * 768
    assert set(cost_cuda.embedding_paths(8, 1, 768, 50257, 2)) == {"plain", "segments", "outer"}


def test_every_constant_is_used():
    product = [cost_cuda.product(8, 512, 768, 768, tile, 132) for tile in cost_cuda.ALL_TILES]
    grams = [cost_cuda.gram(8, 512, 768, tile, 132) for tile in cost_cuda.ALL_GRAMS]
    for name in CUDA_KERNELS:
        assert getattr(CUDA, name) > 0 and any(getattr(cost, name) for cost in [*product, *grams]), name


def test_the_committed_table_is_what_the_model_says():
    """Else: ``python -m benchmarks.paths --device cuda --modelled --out benchmarks/results/paths_cuda_modelled``."""
    kept = json.loads(TABLE.read_text(encoding="utf-8"))
    assert kept["timed"] is False and "nothing timed" in TABLE.with_suffix(".md").read_text(encoding="utf-8")
    for row, now in zip(kept["rows"], map(asdict, paths_cuda.rows()), strict=True):
        assert (row["shape"], row["taken"], row["tile"]) == (list(now["shape"]), now["taken"], now["tile"])
        assert row["seconds"] == pytest.approx(now["seconds"], rel=1e-5)
