"""bf16, f16 or f32 -> ScaledArray, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_fp8gemm import reference, reference_moe
from jax_fp8gemm.jit.problem import MASKED, RAGGED_M
from jax_fp8gemm.operation import IMPLEMENTATIONS, bind_or_reference, is_plain_jnp, match_varying
from jax_fp8gemm.quantize_primitives import quantize_p, quantize_swiglu_p, quantize_transposed_p
from jax_fp8gemm.scaling import FLOAT8_DTYPES, GRANULARITIES, ROW_BLOCKS, ScaledArray, is_array

INPUT_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))


def quantize(
    x: Float[Array, "*batch R C"],
    granularity: tuple[int, int] = ROW_BLOCKS,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    *,
    implementation: str | None = None,
) -> ScaledArray:
    """Quantise to FP8 with one f32 scale per block.

    A block's scale is its largest magnitude divided by the largest FP8 number (448 for e4m3, 57344 for e5m2),
    so that no finite element saturates; values are rounded to nearest, ties to even. `reference.quantize`
    defines every bit, the same on every platform, inside and outside of `jit`.

    * All-zero blocks get the smallest scale, 2^-63, and zeros; so do blocks whose largest magnitude is below
      what that scale can tell from zero. The product of two scales is then never subnormal.
    * NaN and infinities become NaN, alone: the scale is that of the block's finite elements.
    * The last blocks of R and C may be partial; zero-sized axes are fine. A C that is a multiple of 8 is
      fastest.

    On Hopper this is one kernel, also under `vmap`, and its scales lie in memory as the GEMMs want them. On a
    mesh every device quantises its shard, if that is whole blocks; else the axis is gathered.

    Args:
      x: [*, R, C] bfloat16, float16 or float32; C is the axis that a GEMM will contract.
      granularity: (1, 128) for activations, (128, 128) for weights.
      dtype: float8_e4m3fn or float8_e5m2.
      implementation: None takes the kernel on Hopper GPUs, unless a size is symbolic (`jax.export`), and
        plain jnp elsewhere, with the same bits; "hopper" insists on the kernel; "reference" takes jnp
        (`reference.quantize`) everywhere.

    Returns:
      A ScaledArray of the shape of x.

    Raises:
      ValueError: x has fewer than two axes or another dtype, or granularity, dtype or implementation is none
        of those above.
      NotImplementedError: the kernel that implementation="hopper" insists on does not exist.

    Example:
      >>> x = quantize(jnp.ones((4, 256), jnp.bfloat16))
      >>> x.shape, x.scales.shape
      ((4, 256), (4, 2))
    """
    x, dtype = jnp.asarray(x), jnp.dtype(dtype)
    check_quantizable("quantize", x, dtype, implementation)
    if granularity not in GRANULARITIES:
        raise ValueError(f"quantize: expected a granularity of {GRANULARITIES}, got {granularity!r}")
    with jax.named_scope("fp8_quantize"):
        if is_plain_jnp(x, implementation=implementation):
            return ScaledArray(*reference.quantize(x, granularity=granularity, dtype=dtype), granularity)
        values, scales = quantize_p.bind(with_batch_axis(x), granularity=granularity, dtype=dtype,
                                         implementation=implementation, mapped=mapped_axes(x))
        return scaled_array(x, values, scales, granularity)


def quantize_swiglu(
    x: Float[Array, "*batch M 2F"],
    *,
    group_sizes: Int32[Array, " G"] | None = None,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    implementation: str | None = None,
) -> ScaledArray:
    """Quantise silu(gate) * up, the activation between the GEMMs of a feed-forward layer, in one pass.

    gate is the first half of x's columns and up the second; silu(gate) = gate / (1 + exp(-gate)). All of it
    is f32 arithmetic, without a rounding to bfloat16 in between; `quantize` of that, with blocks of 1 x 128,
    is the result. `exp` differs between platforms in its last bits, so that scales may, and values whose
    exact number is next to the middle between two of the FP8 format.

    `group_sizes` are those of the GEMM before, on the device; what makes no sense in them counts as there
    (`fp8_gemm_ragged_m`, `fp8_gemm_masked`):

    * x [M, 2F], rows sorted by group: rows past the sum are not read, and come out as zeros with the smallest
      scale;
    * x [G, M, 2F], masked: rows of x[g] from group_sizes[g] on are neither read nor written, and time follows
      the others. On Hopper they hold whatever memory held; elsewhere they are NaN.

    On a mesh, sharded columns of x are exchanged, once, for the same part of gate and of up on each device;
    rows that are sorted by group cannot be sharded.

    Args:
      x: [*, M, 2F] bfloat16, float16 or float32; an F that is a multiple of 8 is fastest.
      group_sizes: [G] int32, with x as above.
      dtype: float8_e4m3fn or float8_e5m2.
      implementation: as for `quantize`; "reference" takes `reference.quantize_swiglu`.

    Returns:
      A ScaledArray [*, M, F] of granularity (1, 128).

    Raises:
      ValueError: an argument that does not fit: its name, what was expected, what came.
      NotImplementedError: the kernel that implementation="hopper" insists on does not exist.

    Example:
      >>> h = quantize_swiglu(jnp.ones((4, 512), jnp.bfloat16), group_sizes=jnp.array([1, 2], jnp.int32))
      >>> h.shape, dequantize(h)[2, 0], dequantize(h)[3, 0]
      ((4, 256), Array(0.730469, dtype=bfloat16), Array(0, dtype=bfloat16))
    """
    x, dtype = jnp.asarray(x), jnp.dtype(dtype)
    check_quantizable("quantize_swiglu", x, dtype, implementation)
    if x.shape[-1] % 2:
        raise ValueError(
            f"quantize_swiglu: x: expected an even number of columns, gate and up, got shape {x.shape}")
    kind, sizes = None, []
    if group_sizes is not None:
        kind = _kind_of_groups(x, group_sizes)
        sizes = [group_sizes[None] if kind == RAGGED_M else group_sizes]
    with jax.named_scope("fp8_quantize_swiglu"):
        operands = match_varying(with_batch_axis(x), *sizes)
        values, scales = bind_or_reference(quantize_swiglu_p, reference.quantize_swiglu, *operands, kind=kind,
                                           dtype=dtype, implementation=implementation, mapped=mapped_axes(x))
        return scaled_array(x, values, scales, ROW_BLOCKS)


def quantize_transposed(
    x: Float[Array, "T N"],
    group_sizes: Int32[Array, " G"],
    *,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    implementation: str | None = None,
) -> ScaledArray:
    """Quantise along the tokens of each group: an operand of `fp8_gemm_ragged_k`, for weight gradients.

    Tokens are sorted by group, as for `fp8_gemm_ragged_m`. In the result they are columns, and every group
    begins at a multiple of 128: group g has the ceil(group_sizes[g] / 128) blocks of 128 columns after those
    of group g - 1, and a block's scale is that of its tokens. All other columns are zeros, and blocks of them
    have the smallest scale. K is `ragged_k_size(T, G)`, enough for any sizes: these stay on the device.

    On Hopper this is one kernel, also under `vmap`. On a mesh N may be sharded; T cannot, outside of
    `jax.shard_map`, as tokens are sorted over all devices.

    Args:
      x: [T, N] bfloat16, float16 or float32; an N that is a multiple of 8 is fastest.
      group_sizes: [G] int32. A negative one counts as zero; tokens that do not exist are left out.
      dtype: float8_e4m3fn or float8_e5m2.
      implementation: as for `quantize`; "reference" takes `reference_moe.quantize_transposed`.

    Returns:
      A ScaledArray [N, K] of granularity (1, 128).

    Raises:
      ValueError: an argument that does not fit: its name, what was expected, what came.
      NotImplementedError: the kernel that implementation="hopper" insists on does not exist.

    Example:
      >>> tokens = 2 ** jnp.arange(5, dtype=jnp.bfloat16)[:, None] * jnp.ones((5, 64), jnp.bfloat16)
      >>> columns = dequantize(quantize_transposed(tokens, jnp.array([2, 3])))
      >>> columns.shape, columns[0, :3], columns[0, 128:132]
      ((64, 256), Array([1, 2, 0], dtype=bfloat16), Array([4, 8, 16, 0], dtype=bfloat16))
    """
    x, dtype = jnp.asarray(x), jnp.dtype(dtype)
    check_quantizable("quantize_transposed", x, dtype, implementation)
    if x.ndim != 2:
        raise ValueError(
            f"quantize_transposed: x: expected [T, N], got shape {x.shape}; use jax.vmap for more")
    check_is_int32("quantize_transposed: group_sizes", group_sizes)
    if group_sizes.ndim != 1:
        raise ValueError(
            f"quantize_transposed: group_sizes: expected one axis, got shape {group_sizes.shape}")
    with jax.named_scope("fp8_quantize_transposed"):
        operands = match_varying(with_batch_axis(x), jnp.asarray(group_sizes).reshape(1, -1))
        values, scales = bind_or_reference(quantize_transposed_p, reference_moe.quantize_transposed,
                                           *operands, dtype=dtype, implementation=implementation)
        return scaled_array(x, values, scales, ROW_BLOCKS)


def check_quantizable(function, x, dtype, implementation, name="x"):
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"{function}: expected {name} of dtype bfloat16, float16 or float32, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"{function}: expected {name} with at least two axes, got shape {x.shape}")
    if dtype not in FLOAT8_DTYPES:
        raise ValueError(f"{function}: expected dtype float8_e4m3fn or float8_e5m2, got {dtype}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{function}: implementation: expected one of {IMPLEMENTATIONS}, got {implementation!r}")


def check_is_int32(name, group_sizes):
    if not is_array(group_sizes) or group_sizes.dtype != jnp.int32:
        came = group_sizes.dtype if is_array(group_sizes) else type(group_sizes).__name__
        raise ValueError(f"{name}: expected an int32 array, got {came}")


def _kind_of_groups(x, group_sizes):
    check_is_int32("quantize_swiglu: group_sizes", group_sizes)
    if x.ndim not in (2, 3):
        raise ValueError(f"quantize_swiglu: x: expected [M, 2F] or [G, M, 2F] with group_sizes, got shape "
                         f"{x.shape}; use jax.vmap for more")
    if group_sizes.ndim != 1 or (x.ndim == 3 and group_sizes.shape != x.shape[:1]):
        expected = "one axis" if x.ndim == 2 else f"shape {x.shape[:1]}, as x has shape {x.shape}"
        raise ValueError(f"quantize_swiglu: group_sizes: expected {expected}, got shape {group_sizes.shape}")
    return RAGGED_M if x.ndim == 2 else MASKED


def with_batch_axis(x):
    return x if x.ndim > 2 else x.reshape(1, *x.shape)


def mapped_axes(*arrays):
    """The axes in front of the batch axis, as mapped over: each of them may be sharded by itself."""
    return ((True,) * len(arrays),) * (arrays[0].ndim - 3)


def scaled_array(x, values, scales, granularity):
    """The results for x, without the batch axis where x has none."""
    if x.ndim == 2:
        values, scales = (y.reshape(y.shape[1:]) for y in (values, scales))
    return ScaledArray(values, scales, granularity)


def dequantize(array: ScaledArray, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Float[Array, "*batch R C"]:
    """Values times scales: the product in f32, rounded once to `dtype`.

    Args:
      array: of shape [*, R, C].
      dtype: of the result.

    Returns:
      [*, R, C] of `dtype`.

    Raises:
      ValueError: array is no ScaledArray, or its values and scales do not fit together.

    Example:
      >>> dequantize(quantize(jnp.full((4, 256), 3.0)))[0, 0]
      Array(3, dtype=bfloat16)
    """
    if not isinstance(array, ScaledArray):
        raise ValueError(f"dequantize: expected a ScaledArray, got {type(array).__name__}")
    array.validate("dequantize: array")
    return reference.dequantize(array.values, array.scales, array.granularity).astype(dtype)
