"""Tuning with a timer that knows the winner, the GPU timer's program, and the parallel warm-up."""

import dataclasses
import threading

import jax.numpy as jnp
import pytest

from jax_fp8gemm import ffi
from jax_fp8gemm.jit import timer, tuned, warmup
from jax_fp8gemm.jit.autotune import autotune
from jax_fp8gemm.jit.choose import Choice, choose, ranked
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import H200
from jax_fp8gemm.jit.launch import LaunchPlan
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.jit.toolchain import CompileError

PROBLEM = GemmProblem(4096, 7168, 2048)


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", str(tmp_path))


@pytest.fixture
def fake_compiler(monkeypatch):
    """Cubins that name their configuration; a configuration in the returned set does not compile."""
    broken = set()

    def compile_fake(problem, config):
        if config in broken:
            raise CompileError("ptxas fatal")
        return repr(config).encode()

    monkeypatch.setattr(warmup, "compile_kernel", compile_fake)
    return broken


class FakeTimer:
    """Takes 10 us for `winner` and 20 for others, and now and then ten times as long."""

    def __init__(self, winner):
        self.winner, self.order = winner, []

    def __call__(self, problem, plans):
        return [self._sampler(plan.cubin.decode()) for plan in plans]

    def _sampler(self, name):
        calls = []

        def sample():
            self.order.append(name)
            calls.append(name)
            hiccup = 10 if len(calls) % 3 == 1 else 1
            return hiccup * (10e-6 if name == repr(self.winner) else 20e-6)

        return sample


def test_the_winner_is_found_in_spite_of_hiccups_and_remembered(fake_compiler):
    winner = ranked(PROBLEM, H200)[7][0]
    entries, path = autotune(
        [PROBLEM], num_candidates=10, num_rounds=5, samplers=FakeTimer(winner), progress=False)
    assert entries == [tuned.Entry(PROBLEM, winner, pytest.approx(10.0))]
    assert path == tuned.user_table(H200)
    assert choose(PROBLEM, H200) == Choice(winner, "your table")


def test_candidates_are_timed_in_turns(fake_compiler):
    fake = FakeTimer(None)
    autotune([PROBLEM], num_candidates=3, num_rounds=4, samplers=fake, progress=False)
    count = len(set(fake.order))
    assert count >= 3
    assert len(fake.order) == 4 * count
    assert fake.order == fake.order[:count] * 4


def test_todays_choice_takes_part(fake_compiler):
    today = GemmConfig(64, 8, 4, 1)
    tuned.add(tuned.user_table(H200), H200, [tuned.Entry(PROBLEM, today, 1.0)])
    fake = FakeTimer(today)
    entries, _ = autotune([PROBLEM], num_candidates=2, num_rounds=1, samplers=fake, progress=False)
    best = ranked(PROBLEM, H200)[0][0]
    assert {repr(today), repr(best)} <= set(fake.order)
    assert entries[0].config == today


def test_a_candidate_that_does_not_compile_is_left_out(fake_compiler, caplog):
    first, second = (config for config, _ in ranked(PROBLEM, H200)[:2])
    fake_compiler.add(first)
    entries, _ = autotune(
        [PROBLEM], num_candidates=2, num_rounds=1, samplers=FakeTimer(second), progress=False)
    assert entries[0].config == second
    assert "ptxas fatal" in caplog.text


def test_no_candidate_that_compiles_is_an_error(monkeypatch):
    def fail(problem, config):
        raise CompileError("ptxas fatal")

    monkeypatch.setattr(warmup, "compile_kernel", fail)
    with pytest.raises(CompileError, match="ptxas fatal"):
        autotune([PROBLEM], num_candidates=2, samplers=FakeTimer(None), progress=False)


def test_tuning_needs_a_folder_for_its_results(monkeypatch):
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", "none")
    with pytest.raises(ValueError, match="JAX_FP8GEMM_CACHE_DIR: expected a folder"):
        autotune([PROBLEM], samplers=FakeTimer(None), progress=False)


def test_progress_is_shown(fake_compiler, capsys):
    autotune([PROBLEM], num_candidates=1, num_rounds=1, samplers=FakeTimer(None))
    shown = capsys.readouterr().err
    assert "compiling" in shown
    assert "timing 4096x7168x2048 bf16" in shown
    assert "100%" in shown


PLAN = LaunchPlan(b"cubin", "fp8_gemm", (1, 1, 1), (1, 1, 1), 384, 1024, ())


@pytest.mark.parametrize("problem", [
    GemmProblem(7, 256, 512),
    GemmProblem(7, 256, 512, batch=3, rhs_batched=False, rhs_scale_rows=1, out_dtype="f32"),
    GemmProblem(7, 256, 512, batch=2, lhs_batched=False, accumulate=True, out_dtype="f32", lhs_dtype="e5m2"),
    GemmProblem(40, 256, 512, kind="ragged_m", groups=3, batch=2, rhs_batched=False),
    GemmProblem(40, 256, 512, kind="masked", groups=3, expected_m=9, rhs_scale_rows=1),
    GemmProblem(40, 256, 1024, kind="ragged_k", groups=3, rhs_scale_rows=1, out_dtype="f32", accumulate=True),
], ids=["dense", "batched", "accumulating", "ragged_m", "masked", "ragged_k"])
def test_the_timed_program_is_the_kernels_and_nothing_else(problem):
    operands = [timer.random_operands(problem, seed) for seed in range(3)]
    accumulator = (jnp.ones(problem.out_shape),) * problem.accumulate
    lowered = timer.chain(problem, PLAN).trace(operands, accumulator).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count(f"custom_call @{ffi.TARGET}") == 3
    work = [line for line in text.splitlines() if "stablehlo." in line and "custom_call" not in line]
    assert work
    assert all("stablehlo.transpose" in line for line in work), "XLA turns these into layouts"
    call = next(line for line in text.splitlines() if f"custom_call @{ffi.TARGET}" in line)
    signature = call.split(" : (")[-1]
    assert signature.count("tensor<") == 4 + problem.is_grouped + problem.accumulate + 1
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for arrays in operands for x in arrays)
    assert jnp.unique(operands[0][0].astype(jnp.float32)).size > 40
    assert not jnp.array_equal(operands[0][0], operands[1][0])


@pytest.mark.parametrize(("problem", "shapes", "size"), [
    (GemmProblem(7, 256, 512), [(1, 7, 512), (1, 4, 7), (1, 256, 512), (1, 2, 4)], None),
    (GemmProblem(7, 256, 512, batch=3, rhs_batched=False, rhs_scale_rows=1),
     [(3, 7, 512), (3, 4, 7), (1, 256, 512), (1, 4, 256)], None),
    (GemmProblem(40, 256, 512, kind="ragged_m", groups=3, batch=2, rhs_batched=False),
     [(2, 40, 512), (2, 4, 40), (1, 3, 256, 512), (1, 3, 2, 4), (2, 3)], 14),
    (GemmProblem(40, 256, 512, kind="masked", groups=3, expected_m=9, rhs_scale_rows=1),
     [(1, 3, 40, 512), (1, 3, 4, 40), (1, 3, 256, 512), (1, 3, 4, 256), (1, 3)], 9),
    (GemmProblem(40, 256, 1024, kind="ragged_k", groups=3, rhs_scale_rows=1),
     [(1, 40, 1024), (1, 8, 40), (1, 256, 1024), (1, 8, 256), (1, 3)], 384),
], ids=["dense", "batched", "ragged_m", "masked", "ragged_k"])
def test_operands_are_those_of_the_call_and_groups_have_their_expected_tokens(problem, shapes, size):
    operands = timer.random_operands(problem, 0)
    assert [x.shape for x in operands] == shapes
    if problem.is_grouped:
        assert operands[4].dtype == jnp.int32
        assert jnp.unique(operands[4]).tolist() == [size]


def test_masked_rows_that_nobody_reads_make_no_chain_cold():
    few = GemmProblem(4096, 256, 512, kind="masked", groups=4, expected_m=8)
    assert timer._num_calls(few) == 64, "weights of 0.5 MB"


@pytest.mark.parametrize("problem", [GemmProblem(1, 128, 128), GemmProblem(64, 2112, 7168),
                                     GemmProblem(8192, 8192, 8192), GemmProblem(1, 129280, 65536)])
def test_a_chain_reads_more_than_l2_holds_where_it_can(problem):
    calls, size = timer._num_calls(problem), (problem.m + problem.n) * problem.k
    assert 1 <= calls <= 64
    assert (calls * size <= 4e9 or calls == 1)
    assert calls * size > 100e6 or calls == 64


@pytest.mark.parametrize(("seconds", "runs"), [(2e-3, 10), (50e-3, 1)])
def test_a_sample_is_as_many_runs_of_all_plans(monkeypatch, seconds, runs):
    started = []

    def chain(problem, plan):
        def run(operands, accumulator):
            started.append(plan)
            now[0] += seconds * len(plan)
            return jnp.zeros(())
        return run

    now = [0.0]
    monkeypatch.setattr(timer, "chain", chain)
    monkeypatch.setattr(timer, "_num_calls", lambda problem: 4)
    monkeypatch.setattr(timer.time, "perf_counter", lambda: now[0])
    samplers = timer.gpu_samplers(GemmProblem(7, 256, 512), ["a", "bb"])
    for plan, sample in zip(["a", "bb"], samplers, strict=True):
        started.clear()
        assert sample() == pytest.approx(seconds * len(plan) / 4)
        assert started == [plan] * runs


def test_warmup_compiles_each_kernel_once_side_by_side(monkeypatch):
    both, compiled = threading.Barrier(2, timeout=20), []

    def compile_fake(problem, config):
        both.wait()  # broken unless two are in work at once
        compiled.append((problem, config))
        return b"cubin"

    monkeypatch.setattr(warmup, "compile_kernel", compile_fake)
    other = dataclasses.replace(PROBLEM, n=4096)
    assert warmup.warmup([PROBLEM, other, PROBLEM], device=H200, num_threads=2, progress=False) == 2
    assert sorted(p.n for p, _ in compiled) == [4096, 7168]
    assert all(config == choose(problem, H200).config for problem, config in compiled)


def test_warmup_raises_what_does_not_compile(monkeypatch):
    def fail(problem, config):
        raise CompileError("ptxas fatal")

    monkeypatch.setattr(warmup, "compile_kernel", fail)
    with pytest.raises(CompileError, match="ptxas fatal"):
        warmup.warmup([PROBLEM], device=H200, progress=False)
