"""What XLA inlines on Auto axes names no stack frames: their numbers would be those of another table."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.extend import source_info_util
from jax.sharding import PartitionSpec as P

from jax_fp8gemm import fp8_gemm, fp8_gemm_ragged_k, fp8_gemm_ragged_m, permute, quantize_swiglu
from jax_fp8gemm.mesh import auto
from jaxprs import equations
from meshes import AUTO, normal, run, scaled, weights

SIZES = jnp.array([5, 0, 9, 7], jnp.int32)
TOKENS, EXPERTS = scaled(24, 512), weights(4, 512, 512)
CALLS = {
    "a sum over devices": (fp8_gemm, (TOKENS, weights(512, 512)), (P(None, "x"), P(None, "x"))),
    "groups of rows": (fp8_gemm_ragged_m, (TOKENS, EXPERTS, SIZES), (P(), P("x"), P())),
    "groups of columns": (fp8_gemm_ragged_k, (TOKENS, scaled(512, 512), SIZES), (P(), P("x"), P())),
    "an exchange": (quantize_swiglu, (normal(24, 1024),), (P(None, "x"),)),
    "a sort": (partial(permute, num_experts=4), (normal(24, 512), SIZES[:, None].repeat(6, 0)), (P(), P())),
}


@pytest.fixture
def frames(monkeypatch):
    """The innermost stack frame of all that a device is told to run, as text; "" where there is none."""
    run_without_frames, frames = auto._run_without_frames, []

    def record(function, *operands):
        program = jax.make_jaxpr(partial(run_without_frames, function))(*operands)
        frames.extend(source_info_util.summarize(eqn.source_info) for eqn in equations(program.jaxpr))
        return run_without_frames(function, *operands)

    monkeypatch.setattr(auto, "_run_without_frames", record)
    return frames


@pytest.mark.parametrize("name", CALLS)
def test_no_instruction_names_a_stack_frame(frames, name):
    run(AUTO, *CALLS[name])
    assert set(frames) == {""}


def test_frames_are_named_where_nothing_prevents_it():
    program = jax.make_jaxpr(lambda x: x + 1)(1.0)
    assert [source_info_util.summarize(eqn.source_info).split(":")[0] for eqn in program.eqns] == [__file__]
