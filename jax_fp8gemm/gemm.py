"""The GEMMs on scaled arrays: checks, documentation, one bind each."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, reshard
from jaxtyping import Array, Float, Float32, Int32

from jax_fp8gemm.mesh.explicit import requested_spec
from jax_fp8gemm.operation import IMPLEMENTATIONS, match_varying
from jax_fp8gemm.primitives import gemm_masked_p, gemm_p, gemm_ragged_k_p, gemm_ragged_m_p
from jax_fp8gemm.scaling import GRANULARITIES, ROW_BLOCKS, ScaledArray, is_array

_OUT_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def fp8_gemm(
    lhs: Float[ScaledArray, "*batch M K"],
    rhs: Float[ScaledArray, "*batch N K"],
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    accumulator: Float32[Array, "*batch M N"] | None = None,
    batch_invariant: bool = False,
    implementation: str | None = None,
    out_sharding: jax.sharding.PartitionSpec | jax.sharding.NamedSharding | None = None,
) -> Float[Array, "*batch M N"]:
    """lhs @ rhs.T of two scaled FP8 arrays, on Hopper's tensor cores; any M, N, K >= 0.

    Every 128 of K are summed in the tensor cores, then added with their scales to an f32 register, in K
    order; `accumulator` comes last, and the result is rounded once. The bits do not change from run to run,
    nor with the tiling, except that a small M or N may have K split into a few parts, which are summed in a
    fixed order.

    K that is no multiple of 16 costs a padded copy of both values; nothing else is padded. Under `vmap`, over
    one operand or both and nested, the call stays one kernel launch. On a mesh each device multiplies its
    shards; a sharded K is summed up in one reduce, in float32.

    Args:
      lhs: [M, K] or [B, M, K], float8_e4m3fn or float8_e5m2, granularity (1, 128).
      rhs: [N, K] or [B, N, K], the same dtypes, granularity (128, 128) or (1, 128).
      out_dtype: bfloat16 or float32.
      accumulator: [M, N] or [B, M, N] float32, added to the product; needs out_dtype=float32. The result
        takes its place in memory where it is donated to `jit`, or is not used afterwards inside of it.
      batch_invariant: never split K, so that a row's bits do not depend on M, at some cost for small M; a
        sharded K is gathered.
      implementation: None takes the kernel on Hopper GPUs and plain jnp elsewhere; "hopper" insists on the
        kernel; "reference" takes jnp (`reference.gemm`) everywhere.
      out_sharding: of the result, on a mesh with Explicit axes; needed where the operands leave it open, as
        where K is sharded.

    Returns:
      [M, N] or [B, M, N] of out_dtype.

    Raises:
      ValueError: an argument that does not fit: its name, what was expected, what came.
      NotImplementedError: implementation="hopper" is lowered for something else, or the kernel would have to
        be compiled for a size that is symbolic (`jax.export`) or does not fit into 31 bits. On Auto mesh axes
        XLA reports it, as a JaxRuntimeError, when it compiles.

    Example:
      >>> w = quantize(jnp.ones((2112, 7168), jnp.bfloat16), granularity=(128, 128))
      >>>
      >>> @jax.jit
      ... def project(x):
      ...     return fp8_gemm(quantize(x), w)
      >>>
      >>> y = project(jnp.ones((64, 7168), jnp.bfloat16))
      >>> y.shape, y.dtype, y[0, 0]
      ((64, 2112), dtype(bfloat16), Array(7168, dtype=bfloat16))
    """
    _check_operands("fp8_gemm", lhs, rhs, lhs_axes=("M K", "B M K"), rhs_axes=("N K", "B N K"))
    if lhs.shape[:-2] != rhs.shape[:-2]:
        raise ValueError(f"fp8_gemm: rhs: expected leading axes {lhs.shape[:-2]}, as in lhs of shape "
                         f"{lhs.shape}, got shape {rhs.shape}; use jax.vmap to share an operand")
    options = _check_options("fp8_gemm", out_dtype, implementation)
    out_shape = *lhs.shape[:-1], rhs.shape[-2]
    extra = [] if accumulator is None else [_check_accumulator("fp8_gemm", accumulator, out_shape, options)]
    return _bind(gemm_p, lhs, rhs, *extra, out_sharding=out_sharding, is_batched=lhs.ndim == 3,
                 batch_invariant=bool(batch_invariant), **options)


def fp8_gemm_ragged_m(
    lhs: Float[ScaledArray, "M K"],
    rhs: Float[ScaledArray, "G N K"],
    group_sizes: Int32[Array, " G"],
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
    out_sharding: jax.sharding.PartitionSpec | jax.sharding.NamedSharding | None = None,
) -> Float[Array, "M N"]:
    """The rows of each group times the rhs of that group: rows sorted by expert, times the experts' weights.

    Group g is the group_sizes[g] rows of lhs after those of group g - 1. Groups may have any size, zero
    included, and begin at any row: nothing is padded or aligned. The sizes stay on the device, and another
    routing neither compiles nor copies anything. Rows past the sum of the sizes are not read, and are zero in
    the result. It is `jax.lax.ragged_dot` for scaled arrays, but for that rhs is [G, N, K].

    On Hopper, a row's bits are those of `fp8_gemm(..., batch_invariant=True)` with the rhs of its group.
    Under `vmap`, over any operands and nested, the call stays one kernel launch.

    On a mesh N and K may be sharded, and G: then each device multiplies the rows of its groups, and one
    reduce puts these together. M cannot, outside of `jax.shard_map`: the rows are sorted over all devices.

    Args:
      lhs: [M, K], float8_e4m3fn or float8_e5m2, granularity (1, 128).
      rhs: [G, N, K], the same dtypes, granularity (128, 128) or (1, 128).
      group_sizes: [G] integers. A negative one counts as zero; rows that do not exist are left out.
      out_dtype: bfloat16 or float32.
      implementation, out_sharding: as for `fp8_gemm`.

    Returns:
      [M, N] of out_dtype.

    Raises:
      ValueError, NotImplementedError: as `fp8_gemm`.

    Example:
      >>> x = quantize(jnp.ones((6, 256), jnp.bfloat16))
      >>> experts = quantize(jnp.ones((3, 128, 256)) * jnp.array([1, 2, 4])[:, None, None], (128, 128))
      >>> y = fp8_gemm_ragged_m(x, experts, jnp.array([2, 0, 3]))
      >>> y.shape, y[:, 0]
      ((6, 128), Array([256, 256, 1024, 1024, 1024, 0], dtype=bfloat16))
    """
    function = "fp8_gemm_ragged_m"
    _check_operands(function, lhs, rhs, lhs_axes=("M K",), rhs_axes=("G N K",))
    group_sizes = as_int32_vector(f"{function}: group_sizes", group_sizes, rhs.shape[0])
    options = _check_options(function, out_dtype, implementation)
    return _bind(gemm_ragged_m_p, lhs, rhs, group_sizes, out_sharding=out_sharding, **options)


def fp8_gemm_masked(
    lhs: Float[ScaledArray, "G M K"],
    rhs: Float[ScaledArray, "G N K"],
    group_sizes: Int32[Array, " G"],
    *,
    expected_group_size: int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
    out_sharding: jax.sharding.PartitionSpec | jax.sharding.NamedSharding | None = None,
) -> Float[Array, "G M N"]:
    """lhs[g] @ rhs[g].T for the first group_sizes[g] rows of every group: for decoding in CUDA graphs.

    Every group has room for M rows, and any number of them may be valid; the sizes stay on the device. The
    cost follows the valid rows. The others are neither read nor written: in the result they hold whatever was
    in memory, NaN included (`reference.gemm_masked` makes them NaN), so mask them before any use that could
    spread it, or read valid rows only.

    On Hopper, a row's bits are those of `fp8_gemm(..., batch_invariant=True)`. Under `vmap`, over any
    operands and nested, the call stays one kernel launch. On a mesh G, M, N and K may be sharded.

    Args:
      lhs: [G, M, K], float8_e4m3fn or float8_e5m2, granularity (1, 128).
      rhs: [G, N, K], the same dtypes, granularity (128, 128) or (1, 128).
      group_sizes: [G] integers. A negative one counts as zero, one above M as M.
      expected_group_size: rows that a group is expected to have, at least 1, M by default. It guides the
        choice of the kernel's configuration; results do not depend on it.
      out_dtype: bfloat16 or float32.
      implementation, out_sharding: as for `fp8_gemm`.

    Returns:
      [G, M, N] of out_dtype.

    Raises:
      ValueError, NotImplementedError: as `fp8_gemm`.

    Example:
      >>> x = quantize(jnp.ones((3, 4, 256), jnp.bfloat16))
      >>> experts = quantize(jnp.ones((3, 128, 256)), (128, 128))
      >>> y = fp8_gemm_masked(x, experts, jnp.array([2, 0, 4]), expected_group_size=2)
      >>> y.shape, y[0, :2, 0]
      ((3, 4, 128), Array([256, 256], dtype=bfloat16))
    """
    function = "fp8_gemm_masked"
    _check_operands(function, lhs, rhs, lhs_axes=("G M K",), rhs_axes=("G N K",))
    if lhs.shape[0] != rhs.shape[0]:
        raise ValueError(f"{function}: rhs: expected G = {lhs.shape[0]} in the first axis, as in lhs of "
                         f"shape {lhs.shape}, got shape {rhs.shape}")
    group_sizes = as_int32_vector(f"{function}: group_sizes", group_sizes, rhs.shape[0])
    if expected_group_size is not None:
        expected_group_size = _as_whole(f"{function}: expected_group_size", expected_group_size, 1)
    options = _check_options(function, out_dtype, implementation)
    return _bind(gemm_masked_p, lhs, rhs, group_sizes, out_sharding=out_sharding,
                 expected_m=expected_group_size, **options)


def fp8_gemm_ragged_k(
    lhs: Float[ScaledArray, "M K"],
    rhs: Float[ScaledArray, "N K"],
    group_sizes: Int32[Array, " G"],
    *,
    accumulator: Float32[Array, "G M N"] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
    out_sharding: jax.sharding.PartitionSpec | jax.sharding.NamedSharding | None = None,
) -> Float[Array, "G M N"]:
    """lhs @ rhs.T over the tokens of each group: the weight gradients of `fp8_gemm_ragged_m`.

    K counts tokens, and every group begins at a multiple of 128: group g is the ceil(group_sizes[g] / 128)
    blocks of 128 columns after those of group g - 1, and what fills up its last block is zero in both
    operands. `quantize_transposed` makes such operands of [tokens, features]. The sizes stay on the device.
    Columns past the last group are not read; a group without tokens is zero, or its accumulator.

    On Hopper, a group's bits are those of `fp8_gemm(..., batch_invariant=True)` over its columns. Under
    `vmap`, over any operands and nested, the call stays one kernel launch. On a mesh M and N may be sharded,
    and G, in the accumulator or by `out_sharding`; K cannot, outside of `jax.shard_map`.

    Args:
      lhs: [M, K], float8_e4m3fn or float8_e5m2, granularity (1, 128).
      rhs: [N, K], the same.
      group_sizes: [G] integers, in tokens. A negative one counts as zero; blocks that do not exist are left
        out.
      accumulator: [G, M, N] float32, added to the product; needs out_dtype=float32. The result takes its
        place in memory where it is donated to `jit`, or is not used afterwards inside of it.
      out_dtype: float32 or bfloat16.
      implementation, out_sharding: as for `fp8_gemm`.

    Returns:
      [G, M, N] of out_dtype.

    Raises:
      ValueError, NotImplementedError: as `fp8_gemm`.

    Example:
      >>> columns = jnp.arange(512)  # 3 tokens of group 0, 130 of group 1, in whole blocks of 128
      >>> is_token = (columns < 3) | (columns >= 128) & (columns < 258)
      >>> x = quantize(jnp.ones((64, 512)) * is_token)
      >>> dw = fp8_gemm_ragged_k(x, x, jnp.array([3, 130]), out_dtype=jnp.bfloat16)
      >>> dw.shape, dw[:, 0, 0]
      ((2, 64, 64), Array([3, 130], dtype=bfloat16))
    """
    function = "fp8_gemm_ragged_k"
    _check_operands(function, lhs, rhs, lhs_axes=("M K",), rhs_axes=("N K",), rhs_granularities=(ROW_BLOCKS,))
    extra = [as_int32_vector(f"{function}: group_sizes", group_sizes)]
    options = _check_options(function, out_dtype, implementation)
    if accumulator is not None:
        out_shape = *extra[0].shape, lhs.shape[0], rhs.shape[0]
        extra.append(_check_accumulator(function, accumulator, out_shape, options))
    return _bind(gemm_ragged_k_p, lhs, rhs, *extra, out_sharding=out_sharding, **options)


def group_sizes_from_ids(ids: Int32[Array, " M"], num_groups: int) -> Int32[Array, " G"]:
    """The group sizes of rows that carry the number of their group, as DeepGEMM's `m_indices` do.

    Ids do not decrease from row to row, except that -1 marks rows of padding. Those belong to the group in
    front of them, leading ones to the first group, and trailing ones to none, like rows of an id that is no
    group: in the result of `fp8_gemm_ragged_m` they are zero.

    Args:
      ids: [M] integers.
      num_groups: G, at least 0.

    Returns:
      [G] int32.

    Raises:
      ValueError: ids are no vector of integers, or num_groups is no whole number.

    Example:
      >>> group_sizes_from_ids(jnp.array([0, 0, -1, -1, 2, 2, 2, -1]), 4)
      Array([4, 0, 3, 0], dtype=int32)
    """
    ids = as_int32_vector("group_sizes_from_ids: ids", ids)
    num_groups = _as_whole("group_sizes_from_ids: num_groups", num_groups, 0)
    is_trailing = lax.cummax(ids, reverse=True) < 0
    groups = jnp.where(is_trailing, num_groups, jnp.maximum(lax.cummax(ids), 0))
    return jnp.diff(jnp.searchsorted(groups, jnp.arange(num_groups + 1))).astype(jnp.int32)


def _bind(primitive, lhs, rhs, *extra, out_sharding, is_batched=False, **params):
    """The call of a primitive on operands without a batch axis, or with one in front of all."""
    with jax.named_scope(primitive.name):
        arrays = [lhs.values, lhs.scales, rhs.values, rhs.scales, *extra]
        operands = match_varying(*(jnp.reshape(x, x.shape if is_batched else (1, *x.shape)) for x in arrays))
        without_batch = (lambda x: x) if is_batched else (lambda x: x.reshape(x.shape[1:]))
        if out_sharding is None:
            return without_batch(*primitive.bind(*operands, **params))
        (shape, _), = primitive.results(operands, **params)
        spec = requested_spec(primitive.name, out_sharding, shape if is_batched else shape[1:],
                              jax.typeof(operands[0]).sharding.mesh)
        out_spec = spec if is_batched else PartitionSpec(None, *spec)
        return reshard(without_batch(*primitive.bind(*operands, out_spec=out_spec, **params)), spec)


def _check_operands(function, lhs, rhs, *, lhs_axes, rhs_axes, rhs_granularities=GRANULARITIES):
    """Axes are the shapes allowed, such as ("M K", "B M K")."""
    for name, array, axes, granularities in (
            ("lhs", lhs, lhs_axes, (ROW_BLOCKS,)), ("rhs", rhs, rhs_axes, rhs_granularities)):
        if not isinstance(array, ScaledArray):
            raise ValueError(
                f"{function}: {name}: expected a ScaledArray (see quantize), got {type(array).__name__}")
        array.validate(f"{function}: {name}")
        if array.ndim not in [len(shape.split()) for shape in axes]:
            expected = " or ".join(f"[{shape.replace(' ', ', ')}]" for shape in axes)
            raise ValueError(f"{function}: {name}: expected {expected}, got shape {array.shape}; use "
                             "jax.vmap for more axes")
        if array.granularity not in granularities:
            raise ValueError(
                f"{function}: {name}: expected a granularity of {granularities}, got {array.granularity}")
    if lhs.shape[-1] != rhs.shape[-1]:
        raise ValueError(f"{function}: rhs: expected K = {lhs.shape[-1]} in the last axis, as in lhs of "
                         f"shape {lhs.shape}, got shape {rhs.shape}")


def _check_options(function, out_dtype, implementation):
    out_dtype = jnp.dtype(out_dtype)
    if out_dtype not in _OUT_DTYPES:
        raise ValueError(f"{function}: out_dtype: expected bfloat16 or float32, got {out_dtype}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{function}: implementation: expected one of {IMPLEMENTATIONS}, got {implementation!r}")
    return {"out_dtype": out_dtype, "implementation": implementation}


def _check_accumulator(function, accumulator, out_shape, options):
    if options["out_dtype"] != jnp.float32:
        raise ValueError(
            f"{function}: out_dtype: expected float32 with an accumulator, got {options['out_dtype']}")
    expected = f"{function}: accumulator: expected float32 of shape {out_shape}"
    if not is_array(accumulator):
        raise ValueError(f"{expected}, got {type(accumulator).__name__}")
    if accumulator.dtype != jnp.float32 or accumulator.shape != out_shape:
        raise ValueError(f"{expected}, got {accumulator.dtype} of shape {accumulator.shape}")
    return accumulator


def _as_whole(name, value, minimum):
    if not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"{name}: expected a whole number of at least {minimum}, got {value!r}")
    return int(value)


def as_int32_vector(name, vector, size=None):
    """The vector as int32, in which what does not fit is the nearest number that does."""
    expected = f"{name}: expected integers of shape ({'G' if size is None else size},)"
    if not is_array(vector):
        raise ValueError(f"{expected}, got {type(vector).__name__}")
    is_vector = len(vector.shape) == 1 and size in (None, *vector.shape)
    if not (is_vector and jnp.issubdtype(vector.dtype, jnp.integer)):
        raise ValueError(f"{expected}, got {vector.dtype} of shape {vector.shape}")
    # NumPy's int64 is clipped before JAX, which without x64 wraps it around, gets to see it.
    given, limits = jnp.iinfo(vector.dtype), jnp.iinfo(jnp.int32)
    if vector.dtype != jnp.int32:
        vector = vector.clip(max(given.min, limits.min), min(given.max, limits.max))
    return jnp.asarray(vector, jnp.int32)
