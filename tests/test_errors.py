"""Bad input: each mistake raises the error that names the argument, what was expected and what came."""

import jax
import jax.numpy as jnp
import pytest

from jax_fp8gemm import ScaledArray, dequantize, fp8_gemm, quantize
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS

E4M3 = jnp.float8_e4m3fn


def lhs(*shape):
    return quantize(jnp.ones(shape or (16, 256)))


def rhs(*shape):
    return quantize(jnp.ones(shape or (384, 256)), SQUARE_BLOCKS)


def changed(array, **fields):
    """The array with other leaves, as a tree transformation may leave it: unchecked."""
    parts = {"values": array.values, "scales": array.scales, **fields}
    return ScaledArray.tree_unflatten(array.granularity, [parts["values"], parts["scales"]])


def accumulate(accumulator, out_dtype=jnp.float32):
    return fp8_gemm(lhs(), rhs(), out_dtype=out_dtype, accumulator=accumulator)


GEMM_MISTAKES = {
    "lhs is no ScaledArray": (lambda: fp8_gemm(jnp.ones((16, 256)), rhs()), r"lhs: expected a ScaledArray"),
    "rhs is no ScaledArray": (lambda: fp8_gemm(lhs(), jnp.ones((16, 256))), r"rhs: expected a ScaledArray"),
    "wrong values dtype": (
        lambda: fp8_gemm(lhs(), changed(rhs(), values=jnp.ones((384, 256), jnp.int8))),
        r"rhs\.values: expected dtype float8_e4m3fn or float8_e5m2, got int8"),
    "wrong scales dtype": (
        lambda: fp8_gemm(changed(lhs(), scales=jnp.ones((16, 2), jnp.bfloat16)), rhs()),
        r"lhs\.scales: expected dtype float32, got bfloat16"),
    "wrong lhs scales": (
        lambda: fp8_gemm(changed(lhs(), scales=jnp.ones((2, 16))), rhs()),
        r"lhs\.scales: expected shape \(16, 2\) for values of \(16, 256\) .*, got \(2, 16\)"),
    "wrong rhs scales": (
        lambda: fp8_gemm(lhs(), changed(rhs(), scales=jnp.ones((384, 2)))),
        r"rhs\.scales: expected shape \(3, 2\) for values of \(384, 256\) .*, got \(384, 2\)"),
    "no values": (
        lambda: fp8_gemm(changed(lhs(), values=None), rhs()), r"lhs\.values: expected an array, got None"),
    "no scales": (
        lambda: fp8_gemm(lhs(), changed(rhs(), scales=1.0)), r"rhs\.scales: expected an array, got float"),
    "too many axes": (
        lambda: fp8_gemm(lhs(2, 3, 16, 256), rhs(2, 3, 384, 256)),
        r"lhs: expected \[M, K\] or \[B, M, K\], got shape \(2, 3, 16, 256\); use jax.vmap"),
    "a vector": (
        lambda: fp8_gemm(changed(lhs(), values=jnp.ones(256, E4M3)), rhs()),
        r"lhs\.values: expected at least two"),
    "different ranks": (
        lambda: fp8_gemm(lhs(), rhs(2, 384, 256)),
        r"rhs: expected leading axes \(\), .* got shape \(2, 384, 256\)"),
    "different batches": (
        lambda: fp8_gemm(lhs(3, 16, 256), rhs(2, 384, 256)),
        r"rhs: expected leading axes \(3,\), .*use jax\.vmap"),
    "different K": (
        lambda: fp8_gemm(lhs(), rhs(384, 255)),
        r"rhs: expected K = 256 .* shape \(16, 256\), got shape \(384, 255\)"),
    "square blocks on the left": (
        lambda: fp8_gemm(rhs(), rhs()), r"lhs: expected a granularity of \(\(1, 128\),\), got \(128, 128\)"),
    "wrong out_dtype": (
        lambda: fp8_gemm(lhs(), rhs(), out_dtype=jnp.float16),
        r"out_dtype: expected bfloat16 or float32, got float16"),
    "accumulator shape": (
        lambda: accumulate(jnp.ones((16, 383))),
        r"accumulator: expected float32 of shape \(16, 384\), got .*\(16, 383\)"),
    "accumulator dtype": (
        lambda: accumulate(jnp.ones((16, 384), jnp.bfloat16)),
        r"accumulator: expected float32 .*got bfloat16"),
    "accumulator is no array": (
        lambda: accumulate([[0.0] * 384] * 16),
        r"accumulator: expected float32 of shape \(16, 384\), got list"),
    "accumulator and bf16 out": (
        lambda: accumulate(jnp.ones((16, 384)), jnp.bfloat16),
        r"out_dtype: expected float32 with an accumulator"),
    "unknown implementation": (
        lambda: fp8_gemm(lhs(), rhs(), implementation="triton"),
        r"implementation: expected one of .*got 'triton'"),
}


@pytest.mark.parametrize("mistake", GEMM_MISTAKES)
def test_gemm_names_the_mistake(mistake):
    call, message = GEMM_MISTAKES[mistake]
    with pytest.raises(ValueError, match=f"fp8_gemm: {message}"):
        call()


QUANTIZE_MISTAKES = {
    "integers": (
        lambda: quantize(jnp.ones((2, 128), jnp.int32)),
        "x of dtype bfloat16, float16 or float32, got int32"),
    "a vector": (lambda: quantize(jnp.ones(128)), r"x with at least two axes, got shape \(128,\)"),
    "granularity": (lambda: quantize(jnp.ones((2, 128)), (1, 64)), r"granularity of .*, got \(1, 64\)"),
    "dtype": (lambda: quantize(jnp.ones((2, 128)), dtype=jnp.int8), "float8_e4m3fn or float8_e5m2, got int8"),
    "no ScaledArray": (lambda: dequantize(jnp.ones((2, 128))), "expected a ScaledArray, got ArrayImpl"),
    "no values": (
        lambda: dequantize(changed(lhs(), values=None)), r"array\.values: expected an array, got NoneType"),
    "unfit scales": (
        lambda: dequantize(changed(lhs(), scales=jnp.ones((1, 1)))),
        r"expected shape \(16, 2\)"),
}


@pytest.mark.parametrize("mistake", QUANTIZE_MISTAKES)
def test_quantize_names_the_mistake(mistake):
    call, message = QUANTIZE_MISTAKES[mistake]
    with pytest.raises(ValueError, match=f"quantize: .*{message}"):
        call()


def test_hopper_is_insisted_on_in_vain():
    def call(x, w):
        return fp8_gemm(x, w, implementation="hopper")

    message = r"needs an NVIDIA Hopper GPU .*lowered for cpu; implementation=None runs there"
    for run in (call, jax.jit(call)):
        with pytest.raises(NotImplementedError, match=message):
            run(lhs(), rhs())


def test_errors_come_while_tracing():
    with pytest.raises(ValueError, match="expected K = 256"):
        jax.eval_shape(fp8_gemm, lhs(), quantize(jnp.ones((4, 128)), ROW_BLOCKS))
