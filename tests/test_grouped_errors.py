"""Bad input of the grouped GEMMs: the error names the argument, what was expected and what came."""

import jax.numpy as jnp
import pytest

from jax_fp8gemm import fp8_gemm_masked, fp8_gemm_ragged_k, fp8_gemm_ragged_m, group_sizes_from_ids, quantize
from jax_fp8gemm.scaling import SQUARE_BLOCKS


def lhs(*shape):
    return quantize(jnp.ones(shape or (16, 256)))


def rhs(*shape):
    return quantize(jnp.ones(shape or (3, 384, 256)), SQUARE_BLOCKS)


def sizes_of(*sizes, dtype=jnp.int32):
    return jnp.array(sizes or (1, 2, 3), dtype)


def ragged_m(x=None, w=None, sizes=None, **options):
    return fp8_gemm_ragged_m(lhs() if x is None else x, rhs() if w is None else w,
                             sizes_of() if sizes is None else sizes, **options)


def masked(x=None, w=None, sizes=None, **options):
    return fp8_gemm_masked(lhs(3, 16, 256) if x is None else x, rhs() if w is None else w,
                           sizes_of() if sizes is None else sizes, **options)


def ragged_k(x=None, w=None, sizes=None, **options):
    return fp8_gemm_ragged_k(lhs() if x is None else x, lhs(384, 256) if w is None else w,
                             sizes_of() if sizes is None else sizes, **options)


MISTAKES = {
    "ragged_m": {
        "lhs is no ScaledArray": (lambda: ragged_m(jnp.ones((16, 256))), "lhs: expected a ScaledArray"),
        "lhs has groups": (
            lambda: ragged_m(lhs(3, 16, 256)),
            r"lhs: expected \[M, K\], got shape \(3, 16, 256\); use jax\.vmap for more axes"),
        "rhs has no groups": (
            lambda: ragged_m(w=rhs(384, 256)), r"rhs: expected \[G, N, K\], got shape \(384, 256\)"),
        "square blocks on the left": (
            lambda: ragged_m(rhs(256, 256)), r"lhs: expected a granularity of \(\(1, 128\),\)"),
        "different K": (
            lambda: ragged_m(w=rhs(3, 384, 255)),
            r"rhs: expected K = 256 .* shape \(16, 256\), got shape \(3, 384, 255\)"),
        "too few sizes": (
            lambda: ragged_m(sizes=sizes_of(1, 2)),
            r"group_sizes: expected integers of shape \(3,\), got int32 of shape \(2,\)"),
        "sizes with a batch": (
            lambda: ragged_m(sizes=jnp.ones((2, 3), jnp.int32)),
            r"group_sizes: expected integers of shape \(3,\), got int32 of shape \(2, 3\)"),
        "fractional sizes": (
            lambda: ragged_m(sizes=sizes_of(dtype=jnp.float32)),
            r"group_sizes: expected integers of shape \(3,\), got float32 of shape \(3,\)"),
        "sizes are no array": (
            lambda: ragged_m(sizes=[1, 2, 3]), r"group_sizes: expected integers of shape \(3,\), got list"),
        "out_dtype": (
            lambda: ragged_m(out_dtype=jnp.float16), "out_dtype: expected bfloat16 or float32, got float16"),
        "implementation": (lambda: ragged_m(implementation="triton"), "implementation: .*got 'triton'"),
    },
    "masked": {
        "lhs has no groups": (lambda: masked(lhs()), r"lhs: expected \[G, M, K\], got shape \(16, 256\)"),
        "different G": (
            lambda: masked(lhs(4, 16, 256)),
            r"rhs: expected G = 4 .*shape \(4, 16, 256\), got shape \(3, 384, 256\)"),
        "too many sizes": (
            lambda: masked(sizes=sizes_of(1, 2, 3, 4)), r"group_sizes: expected .* \(3,\), got .* \(4,\)"),
        "no rows expected": (
            lambda: masked(expected_group_size=0), "expected_group_size: expected a whole .* least 1, got 0"),
        "a fraction expected": (
            lambda: masked(expected_group_size=1.5), r"expected_group_size: expected a whole .*got 1\.5"),
        "out_dtype": (
            lambda: masked(out_dtype=jnp.int8), "out_dtype: expected bfloat16 or float32, got int8"),
    },
    "ragged_k": {
        "rhs has groups": (lambda: ragged_k(w=lhs(3, 384, 256)), r"rhs: expected \[N, K\], got shape \(3, "),
        "square blocks on the right": (
            lambda: ragged_k(w=rhs(384, 256)), r"rhs: expected a granularity of \(\(1, 128\),\), got \(12"),
        "different K": (lambda: ragged_k(w=lhs(384, 255)), r"rhs: expected K = 256 "),
        "sizes with a batch": (
            lambda: ragged_k(sizes=jnp.ones((2, 3), jnp.int32)),
            r"group_sizes: expected integers of shape \(G,\), got int32 of shape \(2, 3\)"),
        "accumulator shape": (
            lambda: ragged_k(accumulator=jnp.ones((2, 16, 384))),
            r"accumulator: expected float32 of shape \(3, 16, 384\), got float32 of shape \(2, 16, 384\)"),
        "accumulator and bf16 out": (
            lambda: ragged_k(accumulator=jnp.ones((3, 16, 384)), out_dtype=jnp.bfloat16),
            "out_dtype: expected float32 with an accumulator, got bfloat16"),
    },
}


@pytest.mark.parametrize(("kind", "mistake"), [(kind, name) for kind in MISTAKES for name in MISTAKES[kind]])
def test_names_the_mistake(kind, mistake):
    call, message = MISTAKES[kind][mistake]
    with pytest.raises(ValueError, match=f"fp8_gemm_{kind}: {message}"):
        call()


@pytest.mark.parametrize(("ids", "num_groups", "message"), [
    (jnp.ones(3), 2, r"ids: expected integers of shape \(G,\), got float32 of shape \(3,\)"),
    (jnp.ones((2, 3), jnp.int32), 2, r"ids: expected integers of shape .*got int32 of shape \(2, 3\)"),
    ([0, 1], 2, "ids: expected integers .*got list"),
    (jnp.ones(3, jnp.int32), -1, "num_groups: expected a whole number of at least 0, got -1"),
])
def test_ids_that_are_none(ids, num_groups, message):
    with pytest.raises(ValueError, match=f"group_sizes_from_ids: {message}"):
        group_sizes_from_ids(ids, num_groups)


@pytest.mark.parametrize("call", [ragged_m, masked, ragged_k])
def test_hopper_is_insisted_on_in_vain(call):
    message = r"fp8_gemm_\w+: implementation='hopper' needs an NVIDIA Hopper GPU .*lowered for cpu"
    with pytest.raises(NotImplementedError, match=message):
        call(implementation="hopper")
