"""Weights that are quantised once for several differentiable products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_fp8gemm.quantize import INPUT_DTYPES
from jax_fp8gemm.quantize_training import quantize_weights
from jax_fp8gemm.scaling import ScaledArray, is_array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedWeight:
    """A weight with its FP8 copies, from `prepare`: a pytree that takes the weight's place.

    Attributes:
      master: [*, K, N], the weight itself; its gradient is the gradient of the whole.
      forward: ScaledArray [*, N, K] of granularity (128, 128).
      backward: ScaledArray [*, K, N], the same numbers.
    """

    master: jax.Array
    forward: ScaledArray
    backward: ScaledArray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.master.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.master.dtype


jax.export.register_pytree_node_serialization(
    PreparedWeight, serialized_name="jax_fp8gemm.PreparedWeight",
    serialize_auxdata=lambda _: b"", deserialize_auxdata=lambda _: ())


def prepare(w: Float[Array, "*batch K N"], *, implementation: str | None = None) -> PreparedWeight:
    """Quantise a weight once, for several products: those of microbatches, or of recomputation.

    `dot`, `ragged_dot` and the feed-forward layers take the result in the weight's place, and their gradients
    arrive at `w`, in its dtype. Inside of `jax.grad`, prepare in front of the loop over microbatches; the
    loop's gradients add up in w's dtype, so that a float32 master weight has a float32 sum.

    Args:
      w: [*, K, N] bfloat16, float16 or float32; [G, K, N] for groups.
      implementation: as for `quantize`.

    Returns:
      A PreparedWeight; both orientations come out of one pass over w.

    Raises:
      ValueError: w is no such array.

    Example:
      >>> def loss(w, microbatches):  # [B, T, K]
      ...     w_fp8 = prepare(w)
      ...     return jax.lax.map(lambda x: dot(x, w_fp8).sum(), microbatches).sum()
      >>> dw = jax.grad(loss)(jnp.ones((256, 128)), jnp.ones((2, 16, 256), jnp.bfloat16))
      >>> dw.shape, dw.dtype, dw[0, 0].round(3)
      ((256, 128), dtype('float32'), Array(32., dtype=float32))
    """
    check_float("prepare: w", w, "[*, K, N]", lambda rank: rank >= 2)
    # The copies are constants to differentiation: nothing flows back through them, not even zeros.
    copies = quantize_weights(lax.stop_gradient(jnp.asarray(w)), implementation=implementation)
    return PreparedWeight(jnp.asarray(w), *lax.stop_gradient(copies))


def check_float(name: str, x: jax.Array, axes: str, fits: Callable[[int], bool]) -> None:
    """Raise a ValueError that starts with `name` unless x is bf16, f16 or f32 of a rank that fits `axes`."""
    expected = f"{name}: expected bfloat16, float16 or float32 of shape {axes}"
    if not is_array(x):
        raise ValueError(f"{expected}, got {type(x).__name__}")
    if x.dtype not in INPUT_DTYPES or not fits(len(x.shape)):
        raise ValueError(f"{expected}, got {x.dtype} of shape {tuple(x.shape)}")
