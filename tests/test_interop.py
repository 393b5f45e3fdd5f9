"""ScaledArray to and from qwix's QArray, the same numbers, and errors by name; the examples of interop."""

import dataclasses
import pathlib
import re
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import qwix

from jax_fp8gemm import dequantize, fp8_gemm, quantize
from jax_fp8gemm.interop import from_qarray, to_qarray
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples/interop"


def assert_same_numbers(array, qarray):
    """Scales may be repeated; what is meant has to be equal, in f32."""
    np.testing.assert_array_equal(
        np.asarray(array.values).view(np.uint8), np.asarray(qarray.qvalue).view(np.uint8))
    meant = qwix.dequantize(dataclasses.replace(qarray, scale=qarray.scale.astype(jnp.float32)))
    np.testing.assert_array_equal(dequantize(array, jnp.float32), meant)


# Shape, tiles of the axes, granularity.
TILES = {
    "activations": ((5, 384), {0: 1, 1: 128}, ROW_BLOCKS),
    "weights": ((256, 384), {0: 128, 1: 128}, SQUARE_BLOCKS),
    "larger tiles": ((512, 768), {0: 256, 1: 384}, SQUARE_BLOCKS),
    "one scale of all": ((300, 200), {}, SQUARE_BLOCKS),
    "a scale of each row": ((300, 200), {0: 1}, ROW_BLOCKS),
    "a scale of each 128 columns": ((300, 256), {1: 128}, SQUARE_BLOCKS),
    "a scale of each 128 rows": ((256, 300), {0: 128}, SQUARE_BLOCKS),
    "less than a block": ((40, 77), {0: 40, 1: 77}, SQUARE_BLOCKS),
    "one row": ((1, 256), {1: 128}, ROW_BLOCKS),
    "groups": ((3, 256, 128), {0: 1, 1: 128, 2: 128}, SQUARE_BLOCKS),
    "groups that share scales": ((3, 256, 128), {1: 128, 2: 128}, SQUARE_BLOCKS),
    "leading axes": ((2, 3, 40, 256), {0: 1, 2: 1, 3: 128}, ROW_BLOCKS),
}


@pytest.mark.parametrize("name", TILES)
def test_tiles_that_fit(rng, name):
    shape, tiled_axes, granularity = TILES[name]
    dtype = E5M2 if name == "weights" else E4M3
    qarray = qwix.quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), dtype, tiled_axes=tiled_axes)
    array = from_qarray(qarray)
    assert (array.shape, array.dtype, array.granularity) == (shape, dtype, granularity)
    assert_same_numbers(array, qarray)


@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float16])
def test_scales_of_16_bits(rng, scale_dtype):
    x = jnp.asarray(rng.standard_normal((64, 256)), scale_dtype)
    qarray = qwix.quantize(x, E4M3, channelwise_axes=[0], tiled_axes={1: 128})
    assert qarray.scale.dtype == scale_dtype
    assert_same_numbers(from_qarray(qarray), qarray)


def test_a_weight_of_qwix_is_given_transposed(rng):
    """As qwix has it for `dot(x, w)`: [K, N], and a scale for each column."""
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 256), (256, 72)))
    qarray = qwix.quantize(w, E4M3, channelwise_axes=[1])
    rows = quantize(x)
    y = fp8_gemm(rows, from_qarray(qarray.mT), out_dtype=jnp.float32)
    terms = jnp.abs(dequantize(rows, jnp.float32)) @ jnp.abs(qwix.dequantize(qarray))
    expected = dequantize(rows, jnp.float32) @ qwix.dequantize(qarray)
    # Two sums of 256 f32 products, each with a rounding per term and one per factor.
    np.testing.assert_array_less(jnp.abs(y - expected), 2 * (256 + 2) * 2.0**-24 * terms)


@pytest.mark.parametrize(("shape", "granularity"), [
    ((5, 384), ROW_BLOCKS), ((5, 77), ROW_BLOCKS), ((256, 384), SQUARE_BLOCKS), ((128, 40), SQUARE_BLOCKS),
    ((3, 256, 128), SQUARE_BLOCKS)])
def test_there_and_back(rng, shape, granularity):
    array = quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), granularity)
    qarray = to_qarray(array)
    assert isinstance(qarray, qwix.QArray)
    assert (qarray.qtype, qarray.zero_point) == (E4M3, None)
    assert_same_numbers(array, qarray)
    back = from_qarray(qarray)
    assert back.granularity == granularity
    np.testing.assert_array_equal(back.scales, array.scales)


def test_inside_of_jit(rng):
    x = jnp.asarray(rng.standard_normal((256, 384)), jnp.float32)
    qarray = qwix.quantize(x, E4M3, tiled_axes={0: 128, 1: 384})
    assert_same_numbers(jax.jit(from_qarray)(qarray), qarray)
    np.testing.assert_array_equal(jax.jit(lambda q: to_qarray(from_qarray(q)))(qarray).scale,
                                  jnp.repeat(qarray.scale, 3, 1))


def qarray(shape=(256, 384), scale=(2, 3), dtype=E4M3, scale_dtype=jnp.float32, zero_point=None):
    return qwix.QArray(jnp.ones(shape, dtype), jnp.ones(scale, scale_dtype), zero_point)


MISTAKES = {
    "an array": (lambda: from_qarray(jnp.ones((2, 2))), r"expected a qwix\.QArray, got ArrayImpl"),
    "no scale": (lambda: from_qarray(types.SimpleNamespace(qvalue=jnp.ones((2, 2), E4M3), scale=1.0,
                                                           zero_point=None)),
                 r"scale: expected an array, got float"),
    "integers": (lambda: from_qarray(qarray(dtype=jnp.int8)),
                 r"qvalue: expected dtype float8_e4m3fn or float8_e5m2, got int8"),
    "scales of 8 bits": (lambda: from_qarray(qarray(scale_dtype=jnp.float8_e8m0fnu)),
                         r"scale: expected dtype bfloat16 or float16 or float32, got float8_e8m0fnu"),
    "a zero point": (lambda: from_qarray(qarray(zero_point=jnp.ones((2, 3), E4M3))),
                     r"zero_point: expected None, got an array"),
    "a vector": (lambda: from_qarray(qarray((256,), (2,))),
                 r"qvalue: expected at least two axes, got shape \(256,\)"),
    "scales of another rank": (lambda: from_qarray(qarray(scale=(3,))),
                               r"scale: expected 2 axes, .* \(256, 384\), got shape \(3,\)"),
    "small tiles": (lambda: from_qarray(qarray(scale=(256, 12))),
                    r"scale: expected tiles of multiples of 128, .*axis -1 .*\(256, 384\), .*\(256, 12\)"),
    "tiles of rows alone": (lambda: from_qarray(qarray(scale=(2, 384))),
                            r"scale: .* multiples of 128, .*axis -1 .*\(2, 384\); .* given as its \.mT"),
    "tiles of 64 rows": (lambda: from_qarray(qarray(scale=(4, 3))),
                         r"scale: .*tiles of 1 or multiples of 128, .*axis -2 .*\(4, 3\)"),
    "as many tiles as there are blocks, of another size": (
        lambda: from_qarray(qarray((128, 130), (1, 2))), r"scale: .*axis -1 of qvalue of shape \(128, 130\)"),
    "tiles that do not divide": (lambda: from_qarray(qarray((128, 256), (1, 3))),
                                 r"scale: .*axis -1 .*\(1, 3\)"),
    "tiles of groups": (lambda: from_qarray(qarray((4, 128, 128), (2, 1, 1))),
                        r"scale: expected leading axes \(4,\), or 1 for any, got shape \(2, 1, 1\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_from_qarray_names_the_mistake(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=f"from_qarray: {message}"):
        call()


@pytest.mark.parametrize(("granularity", "shape", "axis"), [
    (ROW_BLOCKS, (2, 300), -1), (SQUARE_BLOCKS, (200, 128), -2), (SQUARE_BLOCKS, (3, 128, 130), -1)])
def test_partial_blocks_have_no_qarray(granularity, shape, axis):
    message = f"expected a multiple of 128 in axis {axis}, .*got shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=f"to_qarray: array: {message}"):
        to_qarray(quantize(jnp.ones(shape), granularity))


def test_to_qarray_takes_nothing_else():
    with pytest.raises(ValueError, match="to_qarray: expected a ScaledArray, got ArrayImpl"):
        to_qarray(jnp.ones((2, 128)))


# ---- the examples


def run(script):
    """The names of a script that has run."""
    return runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def rounding(num_gemms):
    """The relative error of what comes out of so many GEMMs, one after the other, at most.

    Rounding to e4m3 errs by at most 2^-4 of a number, evenly spread: by 2^-4 / sqrt(3) in the root mean
    square. Of two operands for each GEMM, errors add up as their squares do. LayerNorm and ReLU do not make
    them larger.
    """
    return (2 * num_gemms) ** 0.5 * 2.0**-4 / 3**0.5


@pytest.mark.parametrize(("script", "num_gemms"), [("flax_nnx.py", 2), ("flax_linen.py", 6)])
def test_flax_trains_in_fp8_as_in_bf16(script, num_gemms):
    """Loss by loss: mean squares of y - target, with the same weights at first.

    y and target differ by what two models of the same kind compute, neither of which depends on the other: at
    first by sqrt(2) times the root mean square of either, all that FP8 rounds. From there a loss falls by the
    products of updates and gradients, which go through as many GEMMs again. Where Adam's update has the wrong
    sign it was to gain at most the gradient's error, and it loses as much.
    """
    names = run(script)
    bf16, fp8 = (np.array(names[name]) for name in ("bf16", "fp8"))
    error_of_y = rounding(num_gemms) * (bf16[0] / 2) ** 0.5
    fallen = bf16[0] - bf16
    assert fallen[-1] > bf16[0] / 2, "it learns"
    bound = error_of_y * (bf16**0.5 + fp8**0.5) + 2 * rounding(2 * num_gemms) * np.maximum(fallen, 0)
    np.testing.assert_array_less(np.abs(fp8 - bf16), bound)
    assert np.all(fp8 != bf16), "FP8 was used"


def test_gradients_of_microbatches():
    names = run("microbatches.py")
    assert names["losses"][-1] < 0.9 * names["losses"][0], "it learns"
    weights, batch = names["weights"], (names["x"], jnp.float32(names["x"]))
    loss, gradients = jax.jit(names["loss_and_gradients"])(weights, batch)
    one = jax.jit(jax.value_and_grad(names["mean_square"]))
    parts = [one(weights, jax.tree.map(lambda leaf, i=i: leaf[i], batch)) for i in range(len(names["x"]))]
    expected_loss, expected = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *parts)
    # f32 sums in another order may tip a value that is next to the middle between two of FP8's, so that both
    # are only known to be within FP8's rounding: of two GEMMs forward and two backward.
    np.testing.assert_allclose(loss, expected_loss, rtol=2 * rounding(2))
    for name in weights:
        difference = jnp.linalg.norm(gradients[name] - expected[name])
        assert difference < 2 * rounding(4) * jnp.linalg.norm(expected[name])


def test_orbax_restores_scaled_arrays(capsys):
    names = run("orbax_checkpoint.py")
    saved, restored = (jax.tree.flatten(names[name]) for name in ("params", "restored"))
    assert saved[1] == restored[1], "granularities included"
    for before, after in zip(saved[0], restored[0], strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before.view(jnp.uint8), after.view(jnp.uint8))
    output = capsys.readouterr().out
    assert output.count("restored") == len(saved[0]) == 5
    assert "CHANGED" not in output


def test_orbax_restores_a_scaled_array_alone(rng, tmp_path):
    array = quantize(jnp.asarray(rng.standard_normal((3, 130, 300)), jnp.float32), SQUARE_BLOCKS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "array", array)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "array", jax.eval_shape(lambda: array))
    assert restored.granularity == SQUARE_BLOCKS
    np.testing.assert_array_equal(restored.values.view(jnp.uint8), array.values.view(jnp.uint8))
    np.testing.assert_array_equal(restored.scales, array.scales)


def test_qwix_and_fp8_gemm_take_each_other_s_weights(capsys):
    run("qwix_qarray.py")
    errors = [float(error) / 100 for error in re.findall(r"([\d.]+)%", capsys.readouterr().out)]
    assert len(errors) == 3
    assert all(2.0**-7 < error < rounding(1) for error in errors[:2]), "of both operands"
    assert 2.0**-7 < errors[2] < rounding(1) / 2**0.5, "of the weight alone"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_how_it_is_run_and_fits_on_a_screen(path):
    text = path.read_text()
    assert f"    python examples/interop/{path.name}\n" in text
    assert len(text.splitlines()) < 60
