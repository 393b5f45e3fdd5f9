"""Legality of configurations: every reason for a rejection, and what the kernel's own counts say."""

import dataclasses

import pytest

from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import H200
from jax_fp8gemm.jit.legal import consumer_registers, least_stages, loop_fmas, rejection
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.jit.tile import num_places, num_tiles

DENSE = GemmProblem(4096, 7168, 2048)
LEGAL = GemmConfig(128, 128, 6, out_buffers=1)


@pytest.mark.parametrize(("change", "reason"), [
    ({"block_m": 0}, "block_m 0 is not in 1..256"),
    ({"block_n": 264}, "block_n 264 is not in 1..256"),
    ({"block_m": 96}, "block_m 96 is no multiple of wgmma's 64 rows"),
    ({"block_n": 100}, "block_n 100 is no multiple of 8"),
    ({"block_m": 64, "block_n": 24}, "block_n 24 is no multiple of 2 consumers x 8"),
    ({"swap_ab": True, "block_n": 96}, "block_n 96 is no multiple of wgmma's 64 rows"),
    ({"num_consumers": 4}, "num_consumers 4 is not in (1, 2, 3)"),
    ({"num_stages": 1}, "num_stages 1 is below 2"),
    ({"raster_group": 0}, "raster_group 0 is below 1"),
    ({"out_buffers": 0}, "out_buffers 0 is below 1"),
    ({"cluster_m": 2, "cluster_n": 2}, "cluster 2x2 is none of 1x1, 2x1, 1x2"),
    ({"cluster_m": 4}, "cluster 4x1 is none of 1x1, 2x1, 1x2"),
    ({"cluster_m": 2, "block_n": 120}, "cluster_m 2 needs block_n in steps of 16"),
    ({"cluster_n": 2, "swap_ab": True, "block_m": 8, "num_consumers": 1},
     "cluster_n 2 needs block_m in steps of 16"),
    ({"split_k": 3}, "split_k 3 is none of 1, 2, 4, 8"),
    ({"split_k": 2, "cluster_m": 2}, "split-K and multicast both need the cluster"),
    ({"block_m": 64, "num_consumers": 1, "partials": 4, "num_stages": 3}, "partials 4 hold 4 stages, of 3"),
    ({"split_k": 2, "num_stages": 2}, "the partial tile does not fit into 2 stages: it takes 3"),
    ({"block_m": 256, "partials": 3},
     "partials 3 is no multiple of a consumer's 2 products for a block of K"),
    ({"partials": 3, "block_n": 112}, "about 268 registers a thread, above 232"),
    ({"block_n": 256}, "about 300 registers a thread, above 232"),
    ({"block_m": 192, "block_n": 136, "num_consumers": 3, "num_stages": 4},
     "about 164 registers a thread, above 152"),
    # 7 x 32768 of tiles, 16384 of output, 7 x (4 x (128 + 4) + 16) of scales and barriers, to whole KiB
    ({"num_stages": 7}, "249856 bytes of shared memory, above 232448"),
])
def test_rejection_says_why(change, reason):
    assert rejection(DENSE, LEGAL, H200) is None
    assert rejection(DENSE, dataclasses.replace(LEGAL, **change), H200) == reason


def test_split_k_depends_on_the_problem():
    split = GemmConfig(128, 64, 4, split_k=8)
    short = GemmProblem(64, 256, 640)
    assert rejection(short, dataclasses.replace(split, split_k=4), H200) is None
    assert rejection(short, split, H200) == "split_k 8 is more than the 5 blocks of K"
    invariant = dataclasses.replace(short, batch_invariant=True)
    half = dataclasses.replace(split, split_k=2)
    assert rejection(invariant, half, H200) == "batch_invariant forbids split-K"


def test_limited_device_rejects_what_would_not_keep_to_the_limit():
    problem, split = GemmProblem(64, 2048, 4096), GemmConfig(64, 64, 8, split_k=4)
    assert num_tiles(problem, split) * 4 == 128
    assert rejection(problem, split, H200.limited_to(128)) is None
    assert rejection(problem, split, H200.limited_to(127)) == (
        "split-K takes 128 CTAs at once, more than the limit of 127 SMs")
    pair = GemmConfig(64, 64, 8, cluster_m=2)
    assert rejection(problem, pair, H200.limited_to(1)) == "a cluster of 2 is more than 1 SMs"


def test_num_tiles_counts_the_tiles_that_fill_a_cluster():
    problem = GemmProblem(130, 300, 128, batch=3)
    assert num_tiles(problem, GemmConfig(64, 128, 4)) == 3 * 3 * 3
    assert num_tiles(problem, GemmConfig(64, 128, 4, cluster_m=2)) == 3 * 4 * 3
    assert num_tiles(problem, GemmConfig(64, 128, 4, cluster_n=2)) == 3 * 3 * 4


@pytest.mark.parametrize(("config", "registers", "scales"), [
    (GemmConfig(128, 128, 6), 64 + 64 + 40, 0),  # 64 x 128 a consumer
    (GemmConfig(256, 128, 4), 128 + 64 + 40, 0),  # 128 x 128
    (GemmConfig(128, 192, 4), 96 + 96 + 40, 4),  # two blocks of rhs scales
    (GemmConfig(128, 176, 4), 88 + 88 + 40, 8),  # three
    (GemmConfig(64, 128, 6), 32 + 32 + 40, 0),  # Q divided: 64 x 64
    (GemmConfig(256, 128, 4, partials=2), 128 + 2 * 64 + 40, 0),
    (GemmConfig(16, 128, 6, swap_ab=True), 8 + 8 + 40, 4),  # 64 x 16, and 4 scales of tokens
    (GemmConfig(16, 64, 6, 1, swap_ab=True), 8 + 8 + 40, 4),
    (GemmConfig(192, 96, 4, 3), 48 + 48 + 24, 4),  # three consumers keep less
])
def test_registers_of_a_consumer(config, registers, scales):
    assert consumer_registers(DENSE, config) == registers + scales
    per_row = dataclasses.replace(DENSE, rhs_scale_rows=1)  # scales are read as they are multiplied
    spared = 16 if config.num_consumers < 3 else 0
    assert consumer_registers(per_row, config) == registers - spared


def test_a_copy_of_the_loop_for_each_place():
    config = GemmConfig(64, 208, 4)  # 104 columns a consumer: multiples of eight
    assert num_places(DENSE, config) == 13
    assert loop_fmas(DENSE, config) == 13 * 52
    two = dataclasses.replace(config, partials=2)
    assert "2028 FMAs in loops for 13 places" in rejection(DENSE, two, H200)
    assert num_places(DENSE, GemmConfig(128, 208, 4)) == 8
    assert num_places(DENSE, GemmConfig(128, 128, 4)) == num_places(DENSE, GemmConfig(64, 64, 4, 1)) == 1
    assert num_places(dataclasses.replace(DENSE, rhs_scale_rows=1), config) == 1


def test_least_stages_hold_the_padded_partial_tile():
    for block_m, block_n in ((64, 64), (64, 128), (128, 128), (128, 192), (8, 64)):
        config = GemmConfig(block_m, block_n, 2, swap_ab=block_m < 64, split_k=2)
        stage, partial = (block_m + block_n) * 128, 4 * block_m * (block_n + 8)
        least = least_stages(config)
        assert least * stage >= partial
        assert (least == 2 or (least - 1) * stage < partial)
        assert least_stages(dataclasses.replace(config, split_k=1)) == 2
