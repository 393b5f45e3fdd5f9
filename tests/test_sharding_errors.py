"""Every wrong sharding: the error names the axis and the mend, and the code that it shows runs."""

import re
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_fp8gemm
from jax_fp8gemm import (
    dequantize,
    fp8_gemm,
    fp8_gemm_masked,
    fp8_gemm_ragged_k,
    fp8_gemm_ragged_m,
    permute,
    quantize_transposed,
    unpermute,
)
from jax_fp8gemm.moe_primitives import permute_p
from meshes import AUTO, EXPLICIT, normal, run, scaled, weights
from test_sharding import DENSE, GRADIENT, GROUPED, IDS, MASKED, SIZES, G, K, M, N, routed, swiglu

ROWS, COLUMNS = P("x"), P(None, "x")
invariant = partial(fp8_gemm, batch_invariant=True)


def message_of(function, operands, specs, *, mesh=EXPLICIT, error=ValueError):
    with pytest.raises(error) as info:
        run(mesh, function, operands, specs)
    return str(info.value)


# ---- Explicit axes: what the result's sharding is


@pytest.mark.parametrize(("function", "operands", "specs", "reason"), [
    (fp8_gemm, DENSE, (COLUMNS, COLUMNS), "K is sharded over 'x', and the result is a sum over it"),
    (fp8_gemm, DENSE, (P(), P(None, ("x", "y"))),
     "K is sharded over ('x', 'y') in rhs: 512 over 8 devices makes no whole blocks of 128"),
    (fp8_gemm, DENSE, (ROWS, ROWS),
     "N is sharded over 'x' in rhs, over which another dimension is sharded too"),
    (fp8_gemm, (scaled(M, K), weights(384, K)), (P(), P("y")),
     "N is sharded over 'y' in rhs: 384 over 2 devices makes no whole blocks of 128"),
    (invariant, DENSE, (COLUMNS, COLUMNS),
     "K is sharded over 'x' in lhs: batch_invariant=True allows no sum over devices"),
    (fp8_gemm_ragged_m, GROUPED, (P(), ROWS, P()), "G is sharded over 'x', and the result is a sum over it"),
    (fp8_gemm_masked, MASKED, (P(None, None, "y"), P(None, None, "y"), P()),
     "K is sharded over 'y', and the result is a sum over it"),
])
def test_what_operands_leave_open_has_to_be_said(function, operands, specs, reason):
    name = getattr(function, "func", function).__name__
    expected = f"{name}: out_sharding: expected a PartitionSpec, got None, but {reason}"
    assert message_of(function, operands, specs) == expected


@pytest.mark.parametrize("out_sharding", [None, P()])
def test_operands_that_contradict_each_other(out_sharding):
    message = message_of(partial(fp8_gemm, out_sharding=out_sharding), DENSE, (COLUMNS, P(None, "y")))
    assert message == (
        "fp8_gemm: K is sharded over 'x' in lhs, but over 'y' in rhs; jax.sharding.reshard one of them")


@pytest.mark.parametrize(("out_sharding", "message"), [
    ("x", "out_sharding: expected a PartitionSpec, got str"),
    (P("x", None, "y"), "out_sharding: expected at most 2 entries, got "),
    (P("z"), "out_sharding: expected Explicit axes of the operands' mesh, got 'z' in "),
    (P(("x", "y"), None), f"out_sharding: {P(('x', 'y'), None)} cuts an axis of 12 into 8 parts, which "
                          "are not equal; leave that axis out, or pad it"),
])
def test_an_out_sharding_that_is_none(out_sharding, message):
    operands = scaled(12, K), weights(N, K)
    got = message_of(partial(fp8_gemm, out_sharding=out_sharding), operands, (P(), P()))
    assert got.startswith(f"fp8_gemm: {message}")


def test_out_sharding_is_for_explicit_axes():
    message = message_of(partial(fp8_gemm, out_sharding=P("x")), DENSE, (P(), P()), mesh=AUTO)
    assert message.endswith("on Auto axes use jax.lax.with_sharding_constraint")
    with pytest.raises(ValueError, match=r"fp8_gemm: out_sharding: expected Explicit axes .* got 'x'"):
        fp8_gemm(*DENSE, out_sharding=P("x"))


def test_shard_map_that_claims_replication():
    wrong = jax.shard_map(fp8_gemm, mesh=AUTO, in_specs=(ROWS, P()), out_specs=P())
    assert "replicat" in message_of(wrong, DENSE, (ROWS, P()), mesh=AUTO)


# ---- tokens that are sorted by group


def placed_permute(x, positions, num_rows):
    return permute_p.bind(x[None], positions[None], num_rows[None], dtype=jnp.dtype(jnp.float8_e4m3fn),
                          implementation=None)


TOKENS = {
    "M of fp8_gemm_ragged_m": (fp8_gemm_ragged_m, GROUPED, (ROWS, P(), P())),
    "M of fp8_quantize_swiglu": (swiglu, (normal(M, 256), SIZES), (ROWS, P())),
    "T of fp8_sort_by_expert": (routed, (normal(M, K), IDS), (P(), ROWS)),
    "T of fp8_permute": (placed_permute, (normal(M, K), IDS, jnp.int32(40)), (ROWS, P(), P())),
    "T of fp8_quantize_transposed": (quantize_transposed, (normal(M, K), SIZES), (ROWS, P())),
    "K of fp8_gemm_ragged_k": (fp8_gemm_ragged_k, GRADIENT, (COLUMNS, COLUMNS, P())),
}


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", TOKENS)
def test_sorted_tokens_cannot_be_sharded(mesh, name):
    """XLA reports what it was told on Auto axes."""
    function, operands, specs = TOKENS[name]
    error = NotImplementedError if mesh is EXPLICIT else jax.errors.JaxRuntimeError
    message = message_of(function, operands, specs, mesh=mesh, error=error)
    axis, _, primitive = name.split()
    assert re.search(f"{primitive}: {axis} is sharded over 'x' in .*inside of jax.shard_map", message)


def run_shown(message, **names):
    """The value of the code in an error."""
    lines = [line for line in message.splitlines() if not line or line.startswith("    ")]
    *statements, expression = textwrap.dedent("\n".join(lines)).strip().splitlines()
    names = {**vars(jax_fp8gemm), "jax": jax, "P": P, **names}
    exec("\n".join(statements), names)
    with jax.set_mesh(AUTO):
        return eval(expression, names)


def test_the_layer_that_is_shown_runs():
    message = message_of(*TOKENS["M of fp8_gemm_ragged_m"], error=NotImplementedError)
    x, w = normal(M, K), weights(G, N, K)
    routing = jnp.asarray(np.random.default_rng(0).uniform(size=(M, 2)), jnp.float32)
    actual = run_shown(message, x=x, expert_ids=IDS, weights=routing, w=w, num_experts=G)
    rows, group_sizes, positions = permute(x, IDS, G)
    y = np.float32(fp8_gemm_ragged_m(rows, w, group_sizes))
    expected = unpermute(jnp.asarray(y, jnp.bfloat16), positions, routing)
    # f32 sums in another order may round y, and then the sum over two slots, to the next bf16.
    places = 2**-7 * (2 * np.abs(y).max() + np.abs(np.float32(expected)).max())
    np.testing.assert_allclose(np.float32(actual), np.float32(expected), rtol=0, atol=places)


def test_the_gradient_that_is_shown_runs():
    message = message_of(*TOKENS["K of fp8_gemm_ragged_k"], error=NotImplementedError)
    sizes = jnp.array([[5, 1], [0, 6], [2, 3], [6, 0]], jnp.int32)  # on four devices, of six tokens each
    x, dy = (jnp.asarray(np.random.default_rng(seed).integers(-8, 9, (M, size)), jnp.bfloat16)
             for seed, size in ((0, 64), (1, 32)))
    actual = run_shown(message, x=x, dy=dy, group_sizes=sizes)
    expected, magnitude = np.zeros((2, 32, 64)), np.zeros((2, 32, 64))
    for device, sizes_of_device in enumerate(np.asarray(sizes)):
        tokens = slice(6 * device, 6 * device + 6)
        of_x, of_dy = (quantize_transposed(array[tokens], jnp.asarray(sizes_of_device)) for array in (x, dy))
        of_x, of_dy = (np.float64(dequantize(array, jnp.float32)) for array in (of_x, of_dy))
        for group, columns in enumerate((slice(0, 128), slice(128, 256)) if sizes_of_device[0] else
                                        (slice(0), slice(0, 128))):
            expected[group] += of_dy[:, columns] @ of_x[:, columns].T
            magnitude[group] += np.abs(of_dy[:, columns]) @ np.abs(of_x[:, columns]).T
    # Roundings to f32: of either operand here; of the scales' product, that times the values', their sum (6
    # tokens) and the sum over 4 devices there.
    np.testing.assert_array_less(np.abs(actual - expected), 12 * 2**-24 * magnitude + 1e-30)
