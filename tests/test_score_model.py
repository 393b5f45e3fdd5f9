"""The cost model against measurements, and what compares them."""

import gzip
import json
import pathlib
import statistics
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last, so that an installed jax_fp8gemm goes before the checkout's

from benchmarks import score_model  # noqa: E402
from jax_fp8gemm.jit.config import GemmConfig  # noqa: E402
from jax_fp8gemm.jit.cost import cost  # noqa: E402
from jax_fp8gemm.jit.device import H200, find_device  # noqa: E402
from jax_fp8gemm.jit.problem import GemmProblem  # noqa: E402

PROBLEM = GemmProblem(4096, 4096, 4096)
LARGE, SMALL = GemmConfig(256, 128, 4, cluster_n=2, out_buffers=1), GemmConfig(64, 64, 8)


# Sweep, device, dense and grouped problems.
SWEEPS = [("2026-11-21-sweep-h200", H200, 103, 29),
          ("2026-11-26-sweep-h100", find_device("NVIDIA H100 80GB HBM3"), 25, 28)]


@pytest.fixture(scope="module", params=SWEEPS, ids=lambda sweep: sweep[0])
def scores(request):
    """Of the dense problems, and of the grouped ones."""
    name, device, *counts = request.param
    found, times = score_model.read(ROOT / "benchmarks" / "results" / f"{name}.json.gz")
    assert found == device
    scores = [score_model.score(problem, configs, device) for problem, configs in times.items()]
    parts = [[each for each in scores if each.problem.is_grouped == grouped] for grouped in (False, True)]
    assert [len(part) for part in parts] == counts
    return parts


# Where groups' sizes scatter, time depends on more than the problem says.
@pytest.mark.parametrize(("grouped", "most"), [(False, 1.25), (True, 1.3)])
@pytest.mark.parametrize("ratio", ["choice_ratio", "candidate_ratio"])
def test_what_the_model_prefers_is_nearly_the_fastest(scores, ratio, grouped, most):
    """Among all measured configurations, and among the model's first candidates."""
    ratios = [getattr(score, ratio) for score in scores[grouped]]
    assert statistics.geometric_mean(ratios) <= 1.05
    assert max(ratios) <= most


def test_a_score_has_the_times_of_the_choice_and_of_the_fastest():
    assert cost(PROBLEM, LARGE, H200).seconds < cost(PROBLEM, SMALL, H200).seconds
    score = score_model.score(PROBLEM, {LARGE: 30.0, SMALL: 20.0}, H200)
    assert (score.fastest, score.choice) == ((SMALL, 20.0), (LARGE, 30.0))
    assert score.choice_ratio == 1.5
    text = score_model.report([score], limit=1)
    assert "geometric mean 1.500, worst 1.500, 1 problems" in text
    assert str(SMALL) in text


def test_a_sweep_is_read_whether_compressed_or_not(tmp_path):
    config = {"block_m": 64, "block_n": 64, "num_stages": 8}
    rows = [{"config": config, "median_us": 20.0, "bits": "same"},
            {"config": {**config, "raster_group": 99}, "median_us": 19.0},
            {"config": {"block_m": 256, "block_n": 256, "num_stages": 8}, "median_us": 1.0},
            {"config": {"block_m": 64, "block_n": 96, "num_stages": 8}, "failure": "hangs"},
            {"label": "DeepGEMM", "median_us": 21.0}]
    text = json.dumps({"device": "NVIDIA H200", "problems": [
        {"problem": {"m": 64, "n": 4096, "k": 4096}, "rows": rows}]})
    plain, packed = tmp_path / "sweep.json", tmp_path / "sweep.json.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    expected = {GemmProblem(64, 4096, 4096): {GemmConfig(64, 64, 8, raster_group=1): 19.0}}
    assert score_model.read(plain) == score_model.read(packed) == (H200, expected)
