"""dot_general: lax.dot_general's own results where FP8 is exact, Flax's hooks, and what is left to lax.

Operands are of magnitude 7 and random signs: FP8 holds them, with scales of 1/64, and float32 all sums. The
results and gradients have to be lax.dot_general's to the bit, whichever axes are contracted.
"""

import inspect
import warnings
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jax_fp8gemm import dot
from jax_fp8gemm.dot_general import Fp8FallbackWarning, _warn_once, dot_general
from jaxprs import count, equations

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
MATMUL = (((1,), (0,)), ((), ()))


@pytest.fixture(autouse=True)
def no_reason_was_warned_of():
    _warn_once.cache_clear()


def sevens(rng, *shape, dtype=F32):
    return jnp.asarray(7 * rng.choice([-1, 1], shape), dtype)


def exact(lhs, rhs, dimension_numbers, **options):
    return lax.dot_general(lhs, rhs, dimension_numbers, lax.Precision.HIGHEST, **options)


@partial(jax.jit, static_argnums=0)
def with_gradients(product, lhs, rhs, dy):
    out, vjp = jax.vjp(product, lhs, rhs)
    return out, *vjp(dy.astype(out.dtype))


def assert_same(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted, strict=True)


def test_the_signature_is_lax_dot_general_s():
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (dot_general, lax.dot_general))
    assert [(p.name, p.kind, p.default) for p in ours] == [
        *((p.name, p.kind, p.default) for p in theirs),
        ("implementation", inspect.Parameter.KEYWORD_ONLY, None)]


# lhs, rhs, contracted axes of both, copies that transpose.
LAYOUTS = {
    "dense": ((5, 3, 140), (140, 36), ((2,), (0,)), 0),
    "no tokens' axis": ((140,), (140, 36), ((0,), (0,)), 0),
    "no rows": ((0, 140), (140, 36), ((1,), (0,)), 0),
    "to several axes": ((5, 140), (140, 3, 12), ((1,), (0,)), 0),
    "from several axes": ((5, 3, 12, 10), (12, 10, 36), ((2, 3), (0, 1)), 0),
    "from several axes, counted down": ((5, 3, 12, 10), (12, 10, 36), ((3, 2), (1, 0)), 0),
    "axes in another order": ((5, 12, 10), (10, 12, 36), ((1, 2), (1, 0)), 1),
    "rhs transposed": ((5, 140), (36, 140), ((1,), (1,)), 1),
    "lhs transposed": ((140, 5), (140, 36), ((0,), (0,)), 1),
    "both, and an axis between": ((12, 5, 10), (36, 10, 2, 12), ((0, 2), (3, 1)), 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients(rng, layout):
    lhs_shape, rhs_shape, contracted, copies = LAYOUTS[layout]
    lhs, rhs = sevens(rng, *lhs_shape), sevens(rng, *rhs_shape)
    numbers = contracted, ((), ())
    dy = sevens(rng, *jax.eval_shape(partial(exact, dimension_numbers=numbers), lhs, rhs).shape)
    got, expected = (with_gradients(partial(product, dimension_numbers=numbers), lhs, rhs, dy)
                     for product in (dot_general, exact))
    assert_same(got, expected)
    transposed = count(lambda lhs, rhs: dot_general(lhs, rhs, numbers), "transpose", lhs, rhs)
    of_dot = count(dot, "transpose", jnp.ones((5, 140)), jnp.ones((140, 36)))
    assert transposed - of_dot == copies


@pytest.mark.parametrize(("lhs", "rhs", "preferred"), [
    (BF16, BF16, None), (F16, F16, None), (F32, F32, None), (BF16, BF16, F32), (F32, F32, BF16),
    (BF16, F32, None), (F16, BF16, None), (BF16, F32, BF16), (BF16, F32, F16)])
def test_dtypes_are_lax_dot_general_s(rng, lhs, rhs, preferred):
    lhs, rhs = sevens(rng, 5, 130, dtype=lhs), sevens(rng, 130, 36, dtype=rhs)
    dy, wide = sevens(rng, 5, 36), partial(exact, dimension_numbers=MATMUL)
    got = with_gradients(partial(dot_general, dimension_numbers=MATMUL, preferred_element_type=preferred),
                         lhs, rhs, dy)
    out = jax.eval_shape(partial(lax.dot_general, dimension_numbers=MATMUL, preferred_element_type=preferred),
                         lhs, rhs)
    expected = with_gradients(wide, lhs.astype(F32), rhs.astype(F32), dy)
    assert_same(got, [x.astype(like.dtype) for x, like in zip(expected, (out, lhs, rhs), strict=True)])


@pytest.mark.parametrize("precision", [
    lax.Precision.HIGHEST, "high", ("default", "highest"), lax.DotAlgorithmPreset.BF16_BF16_F32], ids=str)
def test_precision_changes_nothing(rng, precision):
    lhs, rhs = (jnp.asarray(rng.standard_normal(shape), F32) for shape in ((5, 140), (140, 36)))
    np.testing.assert_array_equal(dot_general(lhs, rhs, MATMUL, precision), dot(lhs, rhs))
    assert not np.array_equal(dot(lhs, rhs), exact(lhs, rhs, MATMUL))


def test_what_looks_like_arrays_is_taken(rng):
    lhs, rhs = np.asarray(sevens(rng, 5, 140)), np.asarray(sevens(rng, 140, 36))
    np.testing.assert_array_equal(dot_general(lhs, rhs, (([1], np.array([0])), ([], []))), lhs @ rhs)
    np.testing.assert_array_equal(dot_general(lhs, rhs, ((1, 0), ((), ()))), lhs @ rhs)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap(rng, axes):
    lhs, rhs, dy = sevens(rng, 3, 5, 140), sevens(rng, 3, 140, 36), sevens(rng, 5, 36)
    args = [x if axis == 0 else x[0] for x, axis in zip((lhs, rhs), axes, strict=True)]

    got, expected = (
        jax.vmap(partial(with_gradients, partial(product, dimension_numbers=MATMUL), dy=dy), axes)
        for product in (dot_general, exact))
    assert_same(got(*args), expected(*args))
    assert count(got, "fp8_gemm", *args) == 3


# ---- Flax's hooks


def seven_init(key, shape, dtype=F32, **_):
    return 7 * jax.random.rademacher(key, shape, dtype)


def signs(query, key, value, **_):
    """In place of attention: something of magnitude 7, so that the output projection is exact as well."""
    return jnp.where(query + key - value < 0, -7.0, 7.0)


LINEN_LAYERS = {
    "Dense": (1, lambda hook, **options: nn.Dense(36, dot_general=hook, **options)),
    "Dense, dot_general_cls": (
        1, lambda hook, **options: nn.Dense(36, dot_general_cls=lambda: hook, **options)),
    "DenseGeneral": (1, lambda hook, **options: nn.DenseGeneral(
        (4, 9), axis=(-1, -2), dot_general=hook, **options)),
    "MultiHeadDotProductAttention": (4, lambda hook, **options: nn.MultiHeadDotProductAttention(
        num_heads=4, qkv_dot_general=hook, out_dot_general=hook, attention_fn=signs, **options)),
    "MultiHeadDotProductAttention, dot_general_cls": (
        4, lambda hook, **options: nn.MultiHeadDotProductAttention(
            num_heads=4, qkv_dot_general_cls=lambda: hook, out_dot_general_cls=lambda: hook,
            attention_fn=signs, **options)),
}


@pytest.mark.parametrize("name", LINEN_LAYERS)
def test_linen_layers(rng, name):
    num_gemms, make = LINEN_LAYERS[name]
    layer, plain = (make(hook, kernel_init=seven_init) for hook in (dot_general, lax.dot_general))
    x = sevens(rng, 2, 5, 12)
    variables = plain.init(jax.random.key(0), x)
    np.testing.assert_array_equal(jax.jit(layer.apply)(variables, x), jax.jit(plain.apply)(variables, x))
    assert count(lambda x: layer.apply(variables, x), "fp8_gemm", x) == num_gemms


NNX_LAYERS = {
    "Linear": (1, lambda hook, **options: nnx.Linear(12, 36, dot_general=hook, **options)),
    "Linear, preferred_element_type": (1, lambda hook, **options: nnx.Linear(
        12, 36, dot_general=hook, dtype=BF16, preferred_element_type=F32, **options)),
    "LinearGeneral": (1, lambda hook, **options: nnx.LinearGeneral(
        (5, 12), (4, 9), axis=(-2, -1), dot_general=hook, **options)),
    "LinearGeneral, dot_general_cls": (1, lambda hook, **options: nnx.LinearGeneral(
        12, (4, 9), dot_general_cls=lambda: hook, **options)),
    "MultiHeadAttention": (4, lambda hook, **options: nnx.MultiHeadAttention(
        4, 12, qkv_dot_general=hook, out_dot_general=hook, attention_fn=signs, decode=False, **options)),
}


@pytest.mark.parametrize("name", NNX_LAYERS)
def test_nnx_layers(rng, name):
    num_gemms, make = NNX_LAYERS[name]
    layer, plain = (make(hook, kernel_init=seven_init, rngs=nnx.Rngs(0))
                    for hook in (dot_general, lax.dot_general))
    x = sevens(rng, 2, 5, 12)
    np.testing.assert_array_equal(nnx.jit(layer)(x), nnx.jit(plain)(x), strict=True)
    graph, state = nnx.split(layer)
    assert count(lambda x: nnx.merge(graph, state)(x), "fp8_gemm", x) == num_gemms


# ---- what is left to lax


def normal(rng, *shape, dtype=F32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


FALLBACKS = {
    "batch dimensions": (lambda rng: (normal(rng, 2, 5, 12), normal(rng, 2, 12, 9)),
                         (((2,), (1,)), ((0,), (0,))), {}, "batch dimensions"),
    "an outer product": (lambda rng: (normal(rng, 5), normal(rng, 9)), (((), ()), ((), ())), {},
                         "no contracted axes"),
    "a vector on the right": (lambda rng: (normal(rng, 5, 12), normal(rng, 12)), (((1,), (0,)), ((), ())), {},
                              "no product with a matrix"),
    "integers": (lambda rng: (jnp.arange(60).reshape(5, 12), jnp.arange(36).reshape(12, 3)), MATMUL, {},
                 "other than bfloat16"),
    "complex numbers": (lambda rng: (normal(rng, 5, 12) + 1j, normal(rng, 12, 9)), MATMUL, {},
                        "other than bfloat16"),
    "FP8": (lambda rng: [normal(rng, *shape, dtype=jnp.float8_e4m3fn) for shape in ((5, 12), (12, 9))],
            MATMUL, {"preferred_element_type": F32}, "other than bfloat16"),
    "an integer result": (lambda rng: (sevens(rng, 5, 12), sevens(rng, 12, 9)), MATMUL,
                          {"preferred_element_type": jnp.int32}, "other than bfloat16"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_the_rest_is_left_to_lax_with_one_warning(rng, name):
    operands, numbers, options, message = FALLBACKS[name]
    lhs, rhs = operands(rng)
    with pytest.warns(Fp8FallbackWarning, match=message) as caught:
        out = dot_general(lhs, rhs, numbers, "highest", **options)
    assert caught[0].filename == __file__
    expected = lax.dot_general(lhs, rhs, numbers, "highest", **options)
    np.testing.assert_array_equal(out, expected, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(dot_general(lhs, rhs, numbers, "highest", **options), expected)


@pytest.mark.parametrize("name", ["batch dimensions", "an outer product", "a vector on the right"])
def test_gradients_of_the_rest(rng, name):
    operands, numbers, options, message = FALLBACKS[name]
    function = partial(dot_general, dimension_numbers=numbers, precision="highest", **options)
    with pytest.warns(Fp8FallbackWarning, match=message):
        check_grads(function, [x.astype(F32) for x in operands(rng)], order=2)


def test_each_reason_has_its_warning(rng):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for operands, numbers, options, _ in FALLBACKS.values():
            dot_general(*operands(rng), numbers, **options)
    assert [warning.category for warning in caught] == [Fp8FallbackWarning] * 3


def test_a_warning_made_an_error_stays_one(rng):
    operands, numbers, _, message = FALLBACKS["batch dimensions"]
    for _ in range(2):
        with pytest.raises(Fp8FallbackWarning, match=message):  # as pytest is told to in this project
            dot_general(*operands(rng), numbers)


def test_attention_scores_are_left_to_lax(rng):
    q, k, v = (normal(rng, 2, 5, 3, 16) for _ in range(3))
    with pytest.warns(Fp8FallbackWarning, match="batch dimensions"):
        out = nn.dot_product_attention(q, k, v, einsum_dot_general=dot_general)
    np.testing.assert_array_equal(out, nn.dot_product_attention(q, k, v))


@pytest.mark.parametrize("shared_weight", [True, False])
def test_shard_map(rng, shared_weight):
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices("cpu")[:4], axis_types=(AxisType.Auto,))
    lhs, rhs, dy = sevens(rng, 64, 256), sevens(rng, 256, 128), sevens(rng, 64, 128)
    specs = (P("x"), P()) if shared_weight else (P(), P(None, "x"))
    sharded = jax.shard_map(partial(dot_general, dimension_numbers=MATMUL), mesh=mesh, in_specs=specs,
                            out_specs=P("x") if shared_weight else P(None, "x"))
    expected = with_gradients(partial(exact, dimension_numbers=MATMUL), lhs, rhs, dy)
    assert_same(with_gradients(sharded, lhs, rhs, dy), expected)
    np.testing.assert_array_equal(sharded(lhs, rhs), expected[0])


def test_explicit_sharding_is_left_to_lax(rng):
    mesh = jax.make_mesh((8,), ("x",), devices=jax.devices("cpu"), axis_types=(AxisType.Explicit,))
    lhs, rhs = normal(rng, 64, 256), normal(rng, 256, 128)
    with jax.set_mesh(mesh):
        spread = jax.device_put(lhs, NamedSharding(mesh, P("x")))
        with pytest.warns(Fp8FallbackWarning, match=r"Explicit mesh axis, .* inside jax\.shard_map"):
            out = dot_general(spread, rhs, MATMUL, out_sharding=P("x", None))
        assert out.sharding.spec == P("x", None)
    # f32 sums of 256 products in two orders.
    bound = 2 * 256 * 2.0**-24 * (np.abs(lhs) @ np.abs(rhs))
    np.testing.assert_array_less(np.abs(np.asarray(out, np.float64) - np.float64(lhs) @ np.float64(rhs)),
                                 bound)


# ---- errors


@pytest.mark.parametrize(("numbers", "options"), [
    ((((0,), (0,)), ((), ())), {}), ((((2,), (0,)), ((), ())), {}), (((((1,), (0,))), ((0,), ())), {}),
    (MATMUL, {"precision": "enough"}), (MATMUL, {"out_sharding": 3})], ids=str)
def test_errors_are_lax_dot_general_s(rng, numbers, options):
    lhs, rhs = normal(rng, 5, 12), normal(rng, 12, 9)
    with pytest.raises((TypeError, ValueError)) as expected:
        jax.eval_shape(partial(lax.dot_general, dimension_numbers=numbers, **options), lhs, rhs)
    with pytest.raises(expected.type) as got:
        dot_general(lhs, rhs, numbers, **options)
    assert str(got.value) == str(expected.value)


def test_implementation_goes_to_dot(rng):
    lhs, rhs = normal(rng, 5, 12), normal(rng, 12, 9)
    with pytest.raises(ValueError, match=r"implementation: expected one of .*got 'triton'"):
        dot_general(lhs, rhs, MATMUL, implementation="triton")
    eqn, = equations(jax.make_jaxpr(lambda *args: dot_general(*args, MATMUL, implementation="reference"))(
        lhs, rhs), "fp8_gemm")
    assert eqn.params["implementation"] == "reference"
