"""Candidates, the cost model's ranking, and the explanation of a choice."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_fp8gemm.jit.choose import _variants, candidates, choose, num_stages, ranked
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.cost import LAUNCH, START, cost
from jax_fp8gemm.jit.device import H200, KNOWN_DEVICES, find_device
from jax_fp8gemm.jit.explain import explain
from jax_fp8gemm.jit.legal import rejection
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.jit.tile import num_tiles, shared_bytes

DENSE_SHAPES = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch):
    monkeypatch.setattr("jax_fp8gemm.jit.choose.tuned.find", lambda problem, device: None)


@given(m=st.integers(1, 5000), n=st.integers(1, 20000),
       k_blocks=st.integers(1, 160), k_tail=st.integers(0, 7),
       batch=st.sampled_from([1, 1, 1, 3]), out_dtype=st.sampled_from(["bf16", "f32"]),
       rhs_scale_rows=st.sampled_from([1, 128]), batch_invariant=st.booleans(),
       limit=st.sampled_from([None, 1, 7, 100]))
@settings(max_examples=60, deadline=None)
def test_every_problem_has_a_legal_choice(m, n, k_blocks, k_tail, limit, **facts):
    problem = GemmProblem(m, n, max(16, 128 * k_blocks - 16 * k_tail), **facts)
    device = H200.limited_to(limit)
    config = choose(problem, device).config
    assert rejection(problem, config, device) is None
    price = cost(problem, config, device)
    assert LAUNCH < price.seconds < 1.0
    assert price.waves * device.num_sms >= num_tiles(problem, config) * config.split_k


def test_candidates_cover_unaligned_tiles_splits_and_clusters():
    found = list(candidates(GemmProblem(64, 7168, 7168), H200))
    assert len(set(found)) == len(found)
    assert {48, 80, 96, 112, 144, 160, 176, 192} <= {c.block_n for c in found}
    assert {8, 16, 24, 32, 64} <= {c.block_m for c in found if c.swap_ab}
    assert {c.split_k for c in found} == {1, 2, 4, 8} or {c.split_k for c in found} == {1, 2, 4}
    assert {(c.cluster_m, c.cluster_n) for c in found} == {(1, 1), (1, 2), (2, 1)}
    assert {64, 128, 192, 256} == {c.block_m for c in candidates(GemmProblem(4096, 7168, 2048), H200)}


@pytest.mark.parametrize("facts", [{}, {"out_dtype": "f32"}, {"rhs_scale_rows": 1}, {"n": 7167}])
def test_stages_fill_shared_memory(facts):
    problem = dataclasses.replace(GemmProblem(4096, 7168, 7168), **facts)
    for block_m, block_n in ((128, 128), (128, 112), (256, 128), (64, 160)):
        config = GemmConfig(block_m, block_n, 2)
        stages = num_stages(problem, config, H200)
        size, next_size = (shared_bytes(problem, dataclasses.replace(config, num_stages=count))
                           for count in (stages, stages + 1))
        assert size <= H200.shared_bytes < next_size or stages == 16


def test_a_cta_with_one_tile_gets_no_more_stages_than_blocks_of_k():
    assert num_stages(GemmProblem(16, 4096, 384), GemmConfig(64, 64, 2), H200) == 3


@pytest.mark.parametrize(("n", "k"), DENSE_SHAPES)
def test_decode_streams_the_weights_through_all_sms(n, k):
    problem = GemmProblem(1, n, k)
    config, price = ranked(problem, H200)[0]
    assert config.swap_ab
    assert config.block_m == 8
    assert price.bound == "memory"
    assert num_tiles(problem, config) * config.split_k >= 64  # of 132 SMs


@pytest.mark.parametrize(("n", "k"), DENSE_SHAPES)
def test_large_problems_get_large_tiles(n, k):
    config, price = ranked(GemmProblem(4096, n, k), H200)[0]
    assert config.block_m * config.block_n >= 128 * 128
    assert config.split_k == 1
    assert price.bound == "tensor"


@pytest.mark.parametrize("m", [64, 128, 4096])
@pytest.mark.parametrize(("n", "k"), DENSE_SHAPES)
def test_the_model_is_within_physics(m, n, k):
    """No faster than the peaks of tensor cores and memory, and within twice what good kernels take."""
    problem = GemmProblem(m, n, k)
    seconds = ranked(problem, H200)[0][1].seconds
    floor = max(problem.flops / 2.2e15, (m + n) * k / 4.8e12)
    assert floor < seconds < 2 * (LAUNCH + max(problem.flops / 1.4e15, (m + n) * k / 3e12))


def test_cost_sees_wave_quantisation():
    config = GemmConfig(128, 128, 6)
    full, one_more = (cost(GemmProblem(128 * tiles, 128, 7168), config, H200) for tiles in (132, 133))
    assert (full.waves, one_more.waves) == (1, 2)
    assert one_more.seconds > 1.3 * full.seconds


def test_split_k_takes_another_wave_where_clusters_do_not_fit():
    """30 clusters of 4 run at once on an H200, not 33."""
    config = GemmConfig(8, 64, 7, 1, swap_ab=True, split_k=4)
    fitting, over = (cost(GemmProblem(1, 64 * tiles, 7168), config, H200) for tiles in (30, 31))
    assert (fitting.waves, over.waves) == (1, 2)
    assert over.start - fitting.start == pytest.approx(START)


@pytest.mark.parametrize(("problem", "winner"), [
    (GemmProblem(64, 2112, 7168), GemmConfig(64, 32, 14, 1, split_k=2, raster_group=1, partials=4)),
    (GemmProblem(1, 7168, 16384), GemmConfig(8, 64, 14, 1, swap_ab=True, raster_group=1, partials=4)),
    (GemmProblem(16, 2112, 7168),
     GemmConfig(16, 64, 14, 1, swap_ab=True, split_k=2, raster_group=1, partials=4)),
    (GemmProblem(8192, 24576, 1536), GemmConfig(192, 128, 4, 3, cluster_n=2, raster_group=16)),
    (GemmProblem(4096, 4096, 7168), GemmConfig(256, 128, 4, cluster_n=2, out_buffers=1)),
    (GemmProblem(256, 32768, 512), GemmConfig(256, 128, 3, cluster_n=2, raster_group=1, out_buffers=4)),
])
def test_measured_winners_are_among_the_variants(problem, winner):
    variants = set()
    for config in candidates(problem, H200):
        if rejection(problem, config, H200) is None:
            price = cost(problem, config, H200)
            variants |= {variant for variant, _ in _variants(problem, config, price, H200)}
    assert winner in variants


def test_cost_sees_wasted_rows():
    problem = GemmProblem(64, 8192, 7168)
    fitting, wasting = (cost(problem, GemmConfig(block_m, 64, 4), H200) for block_m in (64, 256))
    assert fitting.tensor < wasting.tensor
    assert fitting.seconds < wasting.seconds
    assert fitting.fill == 0 < wasting.fill


def test_limit_gives_a_slower_kernel():
    problem = GemmProblem(4096, 4096, 7168)
    assert ranked(problem, H200.limited_to(66))[0][1].seconds > 1.5 * ranked(problem, H200)[0][1].seconds


def test_devices():
    assert H200.limited_to(None) is H200
    assert H200.limited_to(132) is H200
    assert H200.limited_to(10).num_sms == 10
    assert H200.limited_to(10).is_limited
    assert H200.slug == "nvidia-h200"
    assert find_device("NVIDIA H20").num_sms == 78
    unknown = dataclasses.replace(H200, name="NVIDIA H200 NVL", num_sms=120)
    assert find_device("NVIDIA H200 NVL", 120) == unknown
    assert len({device.slug for device in KNOWN_DEVICES}) == len(KNOWN_DEVICES)


def test_explain_shows_candidates_rejections_and_the_winner():
    problem = GemmProblem(64, 2112, 7168)
    text = explain(problem, H200, num_rows=5)
    best = choose(problem, H200).config
    legal, rejected = (sum((rejection(problem, c, H200) is None) is wanted for c in candidates(problem, H200))
                       for wanted in (True, False))
    assert "64x2112x7168 bf16 on NVIDIA H200, 132 SMs" in text
    assert f"{legal} legal candidates" in text
    assert f"{rejected} rejected candidates" in text
    assert "registers a thread, above 240" in text
    assert "above 232" not in text.split("rejected")[0]
    assert text.rstrip().endswith(str(best))
    assert "winner, by the model:" in text
    shown = text.split("rejected")[0].splitlines()
    assert sum("stages" in line for line in shown) == 5
