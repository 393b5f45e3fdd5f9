"""ScaledArray: FP8 values with the f32 scales of their blocks, and THE scale contract.

A block of `rows` x `columns` neighbouring values (the granularity) shares one scale:

| operand of a GEMM | granularity | values    | scales, f32                   |                          |
|-------------------|-------------|-----------|-------------------------------|--------------------------|
| lhs: activations  | (1, 128)    | [*, M, K] | [*, M, ceil(K/128)]           | one per row and 128 of K |
| rhs: weights      | (128, 128)  | [*, N, K] | [*, ceil(N/128), ceil(K/128)] | one per 128 x 128        |
| rhs: activations  | (1, 128)    | [*, N, K] | [*, N, ceil(K/128)]           | for weight gradients     |

`*` are leading axes, equal for values and scales. K, the contracted axis, is the last one of both operands
("NT"). The last block of an axis may be a partial one; nothing is padded or aligned by the caller, and how
scales lie in a GPU's memory is a matter between the lowering and XLA.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_fp8gemm.jit.problem import SCALE_BLOCK, ceil_div

ROW_BLOCKS = (1, SCALE_BLOCK)
SQUARE_BLOCKS = (SCALE_BLOCK, SCALE_BLOCK)
GRANULARITIES = (ROW_BLOCKS, SQUARE_BLOCKS)
FLOAT8_DTYPES = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledArray:
    """FP8 values and their scales; the array meant is `dequantize(self)`, values times scales block by block.

    A pytree with the leaves `values` and `scales`: it goes through jit, vmap, scan, donation, `device_put`
    and checkpoints, and is a valid Flax parameter. Leading axes may be mapped over.

    Attributes:
      values: [*, R, C] float8_e4m3fn or float8_e5m2.
      scales: [*, ceil(R/rows), ceil(C/columns)] float32.
      granularity: (rows, columns) of a block, (1, 128) or (128, 128); static.

    Raises:
      ValueError: the arrays do not fit together. Only arrays are checked: a ScaledArray of shardings, of axis
        numbers or of whatever a tree transformation puts into leaves is built as it comes.

    Example:
      >>> w = ScaledArray(jnp.ones((256, 512), jnp.float8_e4m3fn), jnp.full((2, 4), 0.5), (128, 128))
      >>> w.shape, dequantize(w)[0, 0]
      ((256, 512), Array(0.5, dtype=bfloat16))
    """

    values: jax.Array
    scales: jax.Array
    granularity: tuple[int, int]

    def __post_init__(self):
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"ScaledArray: expected a granularity of {GRANULARITIES}, got {self.granularity!r}")
        if is_array(self.values) and is_array(self.scales):
            self.validate("ScaledArray")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def validate(self, name: str) -> None:
        """Raise a ValueError that starts with `name` unless values and scales keep the contract."""
        for leaf_name, leaf in ("values", self.values), ("scales", self.scales):
            if not is_array(leaf):
                raise ValueError(f"{name}.{leaf_name}: expected an array, got {type(leaf).__name__}")
        if self.values.dtype not in FLOAT8_DTYPES:
            raise ValueError(
                f"{name}.values: expected dtype float8_e4m3fn or float8_e5m2, got {self.values.dtype}")
        if self.scales.dtype != jnp.float32:
            raise ValueError(f"{name}.scales: expected dtype float32, got {self.scales.dtype}")
        if len(self.values.shape) < 2:
            raise ValueError(f"{name}.values: expected at least two axes, got shape {self.values.shape}")
        expected = scale_shape(self.values.shape, self.granularity)
        if self.scales.shape != expected:
            raise ValueError(f"{name}.scales: expected shape {expected} for values of {self.values.shape} "
                             f"and granularity {self.granularity}, got {self.scales.shape}")

    # NOTES: unflattening must not validate. JAX builds trees of object(), None, axis numbers or
    # ShapeDtypeStructs, and tree_map may turn leaves into anything, shapes that do not fit included.
    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("values"), self.values), (key("scales"), self.scales)), self.granularity

    def tree_flatten(self):
        return (self.values, self.scales), self.granularity

    @classmethod
    def tree_unflatten(cls, granularity, leaves):
        array = object.__new__(cls)
        for name, value in zip(("values", "scales", "granularity"), (*leaves, granularity), strict=True):
            object.__setattr__(array, name, value)
        return array


jax.export.register_pytree_node_serialization(
    ScaledArray, serialized_name="jax_fp8gemm.ScaledArray",
    serialize_auxdata=lambda granularity: bytes(granularity),
    deserialize_auxdata=lambda data: tuple(data))


def is_array(x) -> bool:
    """Whether `x` is an array, or says as a `ShapeDtypeStruct` does what array is meant."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def scale_shape(shape: tuple[int, ...], granularity: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of values of `shape`: [*, R, C] -> [*, ceil(R/rows), ceil(C/columns)]."""
    *leading, rows, columns = shape
    return *leading, ceil_div(rows, granularity[0]), ceil_div(columns, granularity[1])


def ragged_k_size(num_tokens: int, num_groups: int) -> int:
    """K of the operands of `fp8_gemm_ragged_k`: columns enough for any sizes of the groups.

    Each group fills whole blocks of 128 columns. That is most where as many groups as there can be have one
    token more than whole blocks: floor((T + 127 * min(G, T)) / 128) blocks.

    Args:
      num_tokens: T, of all groups together.
      num_groups: G.

    Returns:
      A multiple of 128; 0 without tokens or groups.

    Example:
      >>> ragged_k_size(300, 2), ragged_k_size(128, 1), ragged_k_size(2, 256)
      (512, 128, 256)
    """
    if num_groups == 0:
        return 0
    in_part = (SCALE_BLOCK - 1) * min(num_groups, num_tokens)  # of a block, at most
    return (num_tokens + in_part) // SCALE_BLOCK * SCALE_BLOCK


def register_flax_serialization() -> None:
    """Teach `flax.serialization` (msgpack state dicts) about ScaledArray; call it once.

    Other checkpoint libraries, Orbax among them, follow pytrees and need nothing.
    """
    from flax import serialization

    def to_state(array):
        return {"values": array.values, "scales": array.scales}

    def from_state(array, state):
        return dataclasses.replace(array, **state)

    serialization.register_serialization_state(ScaledArray, to_state, from_state, override=True)
