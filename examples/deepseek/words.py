"""Rows of any dtype as rows of 32-bit words: of these a message is made, and bytes are copied as these."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

WORD = jnp.uint32


def whole(x: jax.Array) -> bool:
    """Whether the rows of x [R, C] are whole words."""
    return x.shape[1] * x.dtype.itemsize % WORD.dtype.itemsize == 0


def to_words(x: jax.Array) -> jax.Array:
    """x [R, C] of at most 4 bytes each -> the same bits, [R, W].

    Raises:
      ValueError: its rows are no whole words.
    """
    if not whole(x):
        raise ValueError(f"message: expected rows of whole words of {WORD.dtype.itemsize} bytes, got "
                         f"{x.shape[1]} columns of {x.dtype}")
    size = WORD.dtype.itemsize // x.dtype.itemsize
    return lax.bitcast_convert_type(x.reshape(len(x), -1, size) if size > 1 else x, WORD)


def from_words(words: jax.Array, like: jax.Array) -> jax.Array:
    """words [R, W] -> [R, C], with the columns and the dtype of `like`."""
    return lax.bitcast_convert_type(words, like.dtype).reshape(len(words), like.shape[1])
