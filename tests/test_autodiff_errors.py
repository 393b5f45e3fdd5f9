"""Bad input of the differentiable products: the error names the argument, what was expected and what came."""

import jax.numpy as jnp
import pytest

from jax_fp8gemm import quantize
from jax_fp8gemm.autodiff import dot, feed_forward, prepare, ragged_dot, ragged_feed_forward

BF16 = jnp.bfloat16
X, W, SIZES_2 = jnp.ones((4, 96), BF16), jnp.ones((96, 40), BF16), jnp.array([1, 2])
WG, DOWN, DOWN_G = jnp.ones((2, 96, 40), BF16), jnp.ones((20, 8), BF16), jnp.ones((2, 20, 8), BF16)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: dot(None, W), r"dot: x: expected bfloat16, .* of shape \[\*, K\], got NoneType"),
    (lambda: dot(X.astype(jnp.int32), W), "dot: x: expected .* got int32 of shape"),
    (lambda: dot(X[0, 0], W), r"dot: x: expected .* of shape \[\*, K\], got bfloat16 of shape \(\)"),
    (lambda: dot(X, W[0]), r"dot: w: expected .* of shape \[K, N\] or a PreparedWeight, got bfloat16"),
    (lambda: dot(X, quantize(W)), "dot: w: expected .* got float8_e4m3fn of shape"),
    (lambda: dot(X, W.T), r"dot: w: expected K = 96 in the last axis but one, got shape \(40, 96\)"),
    (lambda: dot(X, prepare(WG)), r"dot: w: expected .* \[K, N\] .* got bfloat16 of shape \(2, 96, 40\)"),
    (lambda: dot(X, W, preferred_element_type=jnp.int32), "dot: preferred_element_type: .* got int32"),
    (lambda: dot(X, W, implementation="cuda"), "implementation: expected one of .* got 'cuda'"),
    (lambda: prepare(W[0]), r"prepare: w: expected .* of shape \[\*, K, N\], got bfloat16 of shape \(40,\)"),
    (lambda: ragged_dot(X[None], WG, SIZES_2), r"ragged_dot: lhs: expected .* of shape \[M, K\], got"),
    (lambda: ragged_dot(X, W, SIZES_2), r"ragged_dot: rhs: expected .* of shape \[G, K, N\] or a Prepared"),
    (lambda: ragged_dot(X, WG.mT, SIZES_2), "ragged_dot: rhs: expected K = 96 in the last axis but one"),
    (lambda: ragged_dot(X, WG, SIZES_2[:1]), r"ragged_dot: group_sizes: expected integers of shape \(2,\)"),
    (lambda: ragged_dot(X, WG, [1, 2]), "ragged_dot: group_sizes: expected integers .* got list"),
    (lambda: feed_forward(X, W[:, :39], DOWN), "feed_forward: gate_up: expected an even number of columns"),
    (lambda: feed_forward(X, W, W), "feed_forward: down: expected F = 20 in the last axis but one"),
    (lambda: ragged_feed_forward(X, WG, DOWN_G[:1], SIZES_2), "ragged_feed_forward: down: expected G = 2 in"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_option_that_lax_ragged_dot_has_and_this_does_not():
    with pytest.raises(NotImplementedError, match="ragged_dot: group_offset: expected None, got 1; cut gro"):
        ragged_dot(X, WG, SIZES_2, group_offset=1)


def test_hopper_is_insisted_on_in_vain():
    for x, w in (X, W), (X, prepare(W)):
        with pytest.raises(NotImplementedError, match="implementation='hopper' needs an NVIDIA Hopper GPU"):
            dot(x, w, implementation="hopper")
