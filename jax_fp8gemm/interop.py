"""ScaledArray to and from the quantised arrays of other libraries: qwix's QArray."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from jax_fp8gemm.scaling import FLOAT8_DTYPES, ROW_BLOCKS, SQUARE_BLOCKS, ScaledArray, is_array, scale_shape

if TYPE_CHECKING:
    import qwix

_SCALE_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))


def from_qarray(qarray: qwix.QArray) -> ScaledArray:
    """A `qwix.QArray` of FP8 values as a ScaledArray: the same numbers, without a rounding.

    The last axis is the one that a GEMM contracts. A QArray of a weight [K, N] has K first: give its `.mT`.

    A QArray has equal tiles with one scale each. Those that fit are unions of our blocks, of 1 x 128 or 128 x
    128, and their scales are repeated: tiles of 128 or a multiple along the last axis, and of 1, of 128 or a
    multiple along the one before, or one tile for all of an axis. A scale may be shared along leading axes.

    Args:
      qarray: of shape [*, R, C]; values float8_e4m3fn or float8_e5m2, scales bfloat16, float16 or float32,
        no zero point.

    Returns:
      A ScaledArray [*, R, C]; granularity (1, 128) if each row has scales of its own, else (128, 128).

    Raises:
      ValueError: qarray is no QArray, or its rank, dtypes, zero point or tiles do not fit.

    Example:
      >>> import qwix
      >>> w = qwix.quantize(jnp.ones((256, 512)), jnp.float8_e4m3fn, tiled_axes={0: 128, 1: 128})
      >>> from_qarray(w.mT).shape, from_qarray(w.mT).granularity
      ((512, 256), (128, 128))
    """
    _check_qarray(qarray)
    values, scales = qarray.qvalue, jnp.asarray(qarray.scale, jnp.float32)
    *leading, rows, _ = values.shape
    granularity = ROW_BLOCKS if scales.shape[-2] == rows else SQUARE_BLOCKS
    blocks = scale_shape(values.shape, granularity)
    scales = jnp.broadcast_to(scales, (*leading, *scales.shape[-2:]))
    for axis in (-2, -1):
        _check_tiles(axis, values.shape, qarray.scale.shape, granularity[axis])
        scales = jnp.repeat(scales, blocks[axis] // max(scales.shape[axis], 1), axis)
    return ScaledArray(values, scales, granularity)


def to_qarray(array: ScaledArray) -> qwix.QArray:
    """A ScaledArray as a `qwix.QArray`, with the same values and scales. Needs qwix.

    The tiles of a QArray are equal, so that an axis in blocks of 128 must be a multiple of 128, or shorter.

    Args:
      array: of shape [*, R, C].

    Returns:
      A QArray [*, R, C] with float32 scales; a weight for qwix's `dot(x, w)` is its `.mT`.

    Raises:
      ValueError: array is no ScaledArray, or the last of several blocks is a partial one.
      ImportError: qwix is not installed.

    Example:
      >>> qarray = to_qarray(quantize(jnp.ones((4, 256))))
      >>> qarray.scale.shape, qarray.scale_tile_shape
      ((4, 2), (1, 128))
    """
    import qwix

    if not isinstance(array, ScaledArray):
        raise ValueError(f"to_qarray: expected a ScaledArray, got {type(array).__name__}")
    array.validate("to_qarray: array")
    for axis in (-2, -1):
        size, block = array.shape[axis], array.granularity[axis]
        if size > block and size % block:
            raise ValueError(f"to_qarray: array: expected a multiple of {block} in axis {axis}, or less than "
                             f"that, as the tiles of a QArray are equal, got shape {array.shape}")
    return qwix.QArray(array.values, array.scales)


def _check_qarray(qarray):
    if not all(hasattr(qarray, name) for name in ("qvalue", "scale", "zero_point")):
        raise ValueError(f"from_qarray: expected a qwix.QArray, got {type(qarray).__name__}")
    for name, dtypes in ("qvalue", FLOAT8_DTYPES), ("scale", _SCALE_DTYPES):
        leaf = getattr(qarray, name)
        if not is_array(leaf):
            raise ValueError(f"from_qarray: {name}: expected an array, got {type(leaf).__name__}")
        if leaf.dtype not in dtypes:
            raise ValueError(
                f"from_qarray: {name}: expected dtype {' or '.join(map(str, dtypes))}, got {leaf.dtype}")
    if qarray.zero_point is not None:
        raise ValueError("from_qarray: zero_point: expected None, got an array; quantise with absmax")
    shape, scale = qarray.qvalue.shape, qarray.scale.shape
    if len(shape) < 2:
        raise ValueError(f"from_qarray: qvalue: expected at least two axes, got shape {shape}")
    if len(scale) != len(shape):
        raise ValueError(f"from_qarray: scale: expected {len(shape)} axes, as in qvalue of shape {shape}, "
                         f"got shape {scale}")
    if any(count not in (1, size) for size, count in zip(shape[:-2], scale[:-2], strict=True)):
        raise ValueError(f"from_qarray: scale: expected leading axes {shape[:-2]}, or 1 for any, got shape "
                         f"{scale}")


def _check_tiles(axis, shape, scale, block):
    size, count = shape[axis], scale[axis]
    whole = size == 0 or count == 1 or (count > 0 and size % count == 0 and size // count % block == 0)
    if not whole:
        blocks = "1 or multiples of 128" if axis == -2 else "multiples of 128"
        raise ValueError(f"from_qarray: scale: expected tiles of {blocks}, or a single one, along axis "
                         f"{axis} of qvalue of shape {shape}, got a scale of shape {scale}; the contracted "
                         "axis is the last one: a weight [K, N] is given as its .mT")
