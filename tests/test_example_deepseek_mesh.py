"""The model of examples/deepseek on meshes: what travels, what is computed, which collectives XLA makes."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from examples.deepseek import arguments, config, dispatch, layers, mesh, model, precision, rows, step
from jaxprs import equations
from meshes import collectives as collectives_of

TINY = dataclasses.replace(config.load("tiny"), batch=8)
# Shards of two devices are whole blocks of 128, so that weights travel as FP8.
BLOCKS = dataclasses.replace(TINY, hidden=256, expert_intermediate=256, dense_intermediate=256, nope_dim=112,
                             rope_dim=16)
F32, FP8 = precision.ops("f32"), dataclasses.replace(precision.ops("fp8"), dtype=jnp.dtype(jnp.float32))
U = 2.0**-24


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Most of this module's time would be XLA's; what it computes is the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def layout(*sizes, devices=None):
    return mesh.Layout(mesh.make_mesh(*sizes, devices=devices or jax.devices("cpu")))


def on_experts(function, count, in_specs, out_specs):
    """`function` in a shard_map over `count` devices along the experts' axis."""
    devices = layout(1, count, 1).mesh
    return jax.jit(jax.shard_map(function, mesh=devices, in_specs=in_specs, out_specs=out_specs))


def draw_experts(rng, tokens, k, num_experts):
    return np.stack([rng.permutation(num_experts)[:k] for _ in range(tokens)]).astype(np.int32)


def test_the_order_of_axes_says_which_devices_are_neighbours():
    def ids(order):
        """By (data, expert, tensor)."""
        devices = mesh.make_mesh(2, 2, 2, jax.devices("cpu"), order)
        assert devices.axis_names == tuple(order)
        of_order = np.vectorize(lambda device: device.id)(devices.devices)
        return of_order.transpose([order.index(axis) for axis in mesh.AXES])

    np.testing.assert_array_equal(ids(mesh.AXES).ravel(), np.arange(8))
    np.testing.assert_array_equal(ids(("expert", "data", "tensor"))[1, 0], [2, 3])
    pairs = [("expert", 4), ("data", 2)]
    assert arguments.layout_of(pairs).mesh.axis_names == ("tensor", "expert", "data")


# ---- rows


@pytest.mark.parametrize("capacity", [None, 40, 0])
def test_rows_of_experts_are_those_of_a_loop(rng, capacity):
    experts = rng.integers(-2, 9, (37, 3)).astype(np.int32)
    got = rows.sort_by_expert(jnp.array(experts), 6, capacity)
    expected = [(expert, token, slot) for expert in range(6) for token in range(37) for slot in range(3)
                if experts[token, slot] == expert][:capacity]
    size = 111 if capacity is None else capacity
    assert got.of_tokens.token.shape == got.of_slots.token.shape == (size,)
    np.testing.assert_array_equal(got.of_tokens.token[:len(expected)], [token for _, token, _ in expected])
    np.testing.assert_array_equal(got.of_tokens.token[len(expected):], 37)
    np.testing.assert_array_equal(got.of_slots.token[:len(expected)], [3 * t + s for _, t, s in expected])
    np.testing.assert_array_equal(got.sizes, np.bincount([e for e, _, _ in expected], minlength=6))
    row = np.full((37, 3), size)
    for number, (_, token, slot) in enumerate(expected):
        row[token, slot] = number
    np.testing.assert_array_equal(got.of_tokens.row, row)
    np.testing.assert_array_equal(got.of_slots.row, row.reshape(-1, 1))


def test_spread_and_collect_are_each_other_s_gradients(rng):
    by_expert = rows.sort_by_expert(jnp.array(rng.integers(0, 5, (29, 2)), jnp.int32), 4, 30)
    matrix = np.zeros((30, 29), np.float32)  # of the linear map `spread`
    for row, token in enumerate(by_expert.of_tokens.token):
        if token < 29:
            matrix[row, token] += 1
    x, y = (jnp.array(rng.integers(-9, 9, (size, 5)), jnp.float32) for size in (29, 30))
    out, pull = jax.vjp(lambda x: rows.spread(x, by_expert.of_tokens), x)
    np.testing.assert_array_equal(out, matrix @ x)
    np.testing.assert_array_equal(pull(y)[0], matrix.T @ y)
    out, pull = jax.vjp(lambda y: rows.collect(y, by_expert.of_tokens), y)
    np.testing.assert_array_equal(out, matrix.T @ y)
    np.testing.assert_array_equal(pull(x)[0], matrix @ x)


def test_combine_is_a_weighted_collect_that_keeps_what_it_was_given(rng):
    by_expert = rows.sort_by_expert(jnp.array(rng.integers(0, 5, (29, 2)), jnp.int32), 4, 30)
    # Whole numbers, of which sums in bf16 and f32 are the same.
    y, weights, d_out = (jnp.array(rng.integers(-4, 5, shape), dtype) for shape, dtype in (
        ((30, 8), jnp.bfloat16), ((30, 1), jnp.float32), ((29, 8), jnp.float32)))
    out, pull = jax.vjp(lambda y, weights: rows.combine(y, weights, by_expert.of_tokens), y, weights)
    expected, expected_pull = jax.vjp(
        lambda y, weights: rows.collect(weights * y, by_expert.of_tokens), y, weights)
    np.testing.assert_array_equal(out, expected)
    for got, wanted in zip(pull(d_out), expected_pull(d_out), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)
    assert sorted(leaf.dtype.name for leaf in jax.tree.leaves(pull) if leaf.shape == y.shape) == ["bfloat16"]


@pytest.mark.parametrize("name", precision.PRECISIONS)
def test_experts_results_are_kept_in_bf16(rng, name):
    params, _, x = moe_layer(rng, TINY)
    experts = jnp.array(draw_experts(rng, len(x), 2, TINY.experts))
    gate_up, down = (params[f"experts_{part}"].reshape(TINY.experts, size, -1)
                     for part, size in (("gate_up", TINY.hidden), ("down", TINY.expert_intermediate)))

    def pull(x, weights):
        apply = partial(layers.apply_experts, ops=precision.ops(name))
        return jax.vjp(lambda *args: apply(args[0], experts, args[1], gate_up, down)[0], x, weights)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull, x.astype(jnp.bfloat16), jnp.ones(experts.shape)))
    results = [leaf.dtype for leaf in kept if leaf.shape == (experts.size, TINY.hidden)]
    assert jnp.bfloat16 in results
    assert jnp.float32 not in results


def test_bytes_are_copied_as_words(rng):
    """Their bits, NaN included; what is no whole word is copied all the same."""
    by_expert = rows.sort_by_expert(jnp.array(rng.integers(0, 5, (29, 2)), jnp.int32), 4, 30)
    for columns, dtype in ((8, "uint32"), (6, "float8_e4m3fn")):
        bits = rng.integers(0, 256, (29, columns)).astype(np.uint8)
        run = lambda x: rows.copies(x, by_expert.of_tokens)
        x = jnp.array(bits).view(jnp.float8_e4m3fn)
        expected = np.concatenate([bits, np.zeros((1, columns), np.uint8)])[by_expert.of_tokens.token]
        np.testing.assert_array_equal(np.asarray(run(x)).view(np.uint8), expected)
        gathered = {eqn.outvars[0].aval.dtype.name for eqn in equations(jax.make_jaxpr(run)(x), "gather")}
        assert gathered == {dtype}


# ---- dispatch


@pytest.mark.parametrize(("args", "expected"), [
    # One device: every slot is a row, and no more can come.
    ((100, 8, 64, 1, 2.0), (100, 800)),
    # A token goes once to a device, however many of its experts are there.
    ((100, 8, 64, 4, 2.0), (100, 1600)),
    ((100, 8, 64, 4, 1.0), (100, 800)),
    # V3 on 64 devices: 512 tokens on average from each to each, of 4096; 2 of 4 experts at most were all own.
    ((4096, 8, 256, 64, 1.5), (768, 49152)),
    # One expert to a device: as many rows as tokens.
    ((100, 8, 8, 8, 4.0), (100, 800)),
])
def test_room(args, expected):
    assert dispatch.room(*args) == expected


@pytest.mark.parametrize("room", [40, 11])
def test_plan_sends_a_token_once_to_each_device_of_its_experts(rng, room):
    experts = draw_experts(rng, 40, 3, 8)
    plan = dispatch.plan(jnp.array(experts), 8, 4, dispatch.Room(room, 0))
    assert plan.row.shape == (40, 3), "fewer experts of a token than devices"
    for device in range(4):
        goes = [token for token in range(40) if any(expert // 2 == device for expert in experts[token])]
        sent = plan.token[device * room : (device + 1) * room]
        np.testing.assert_array_equal(sent[:len(goes)], goes[:room])
        np.testing.assert_array_equal(sent[len(goes):], 40)
        for place, token in enumerate(goes):
            found = [int(row) for row in plan.row[token] if row // room == device and row < 4 * room]
            assert found == ([device * room + place] if place < room else [])
    assert (plan.row < 4 * room).sum() == (plan.token < 40).sum()


@pytest.mark.parametrize(("large", "count"), [(dispatch.LARGE_BYTES, 1), (12 * 12, 2), (1, 4)])
def test_a_message_arrives_with_every_bit(monkeypatch, rng, large, count):
    """Whatever the dtypes of its arrays: large ones in an all-to-all of their own, the rest in one."""
    monkeypatch.setattr(dispatch, "LARGE_BYTES", large)

    def bits(*shape):
        return rng.integers(0, 256, shape).astype(np.uint8)

    # No NaN in bf16: XLA sends it as f32 on CPUs, and may change a NaN's bits.
    sums = jnp.array(np.minimum(bits(24, 12), 0x7F)).view(jnp.bfloat16)
    message = {"values": jnp.array(bits(24, 8)).view(jnp.float8_e4m3fn), "sums": sums,
               "scales": jnp.array(bits(24, 4)).view(jnp.float32),
               "ids": jnp.arange(48, dtype=jnp.int32).reshape(24, 2)}
    # A function of this test's own: JAX knows one that it has traced.
    run = on_experts(lambda message: dispatch.exchange(message, "expert"), 2, P("expert"), P("expert"))
    assert collectives_of(run.lower(message).compile()) == {"all-to-all": count}
    got = run(message)
    order = np.r_[0:6, 12:18, 6:12, 18:24]
    for name, sent in message.items():
        assert got[name].dtype == sent.dtype
        np.testing.assert_array_equal(np.asarray(got[name]).view(np.uint8),
                                      np.asarray(sent)[order].view(np.uint8))


def test_a_message_of_broken_words_is_refused():
    run = on_experts(partial(dispatch.exchange, axis="expert"), 2, P("expert"), P("expert"))
    with pytest.raises(ValueError, match="rows of whole words of 4 bytes, got 3 columns of bfloat16"):
        run(jnp.ones((4, 3), jnp.bfloat16))


@pytest.mark.parametrize("ops", [F32, FP8], ids=["f32", "fp8"])
@pytest.mark.parametrize("room", [20, 9])
def test_tokens_travel_to_their_experts_and_back(rng, ops, room):
    """There, features, weights and experts; back, sums. And the gradients: the same ways, the other way."""
    tokens, k, count, num_experts = 20, 3, 4, 8
    experts = draw_experts(rng, tokens * count, k, num_experts)
    # Whole numbers with 448 in each block: scales of 1, so that FP8 has every bit of them.
    x, d_out = (jnp.array(rng.integers(-8, 9, (tokens * count, 256)), jnp.float32).at[:, ::128].set(448)
                for _ in range(2))
    weights = jnp.array(rng.integers(1, 9, (tokens * count, k)), jnp.float32)

    def local(x, weights, experts, d_out):
        plan = dispatch.plan(experts, num_experts, count, dispatch.Room(room, 0))

        def there_and_back(x, weights):
            there, theirs, ids = dispatch.send(ops, "expert", x, weights, experts, plan)
            is_own = ids // (num_experts // count) == jax.lax.axis_index("expert")
            factor = jnp.where(is_own, theirs, 0).sum(1)
            return dispatch.fetch(ops, "expert", there * factor[:, None], plan)

        out, pull = jax.vjp(there_and_back, x, weights)
        return out, *pull(d_out)

    run = on_experts(local, count, P("expert"), P("expert"))
    out, d_x, d_weights = run(x, weights, experts, d_out)

    is_kept = np.zeros(experts.shape)  # those that find room
    for begin in range(0, len(experts), tokens):
        for device in range(count):
            is_own = experts[begin : begin + tokens] // 2 == device
            is_kept[begin : begin + tokens] += is_own & (np.cumsum(is_own.any(1)) <= room)[:, None]
    assert is_kept.all() == (room == 20)
    factor = (np.asarray(weights) * is_kept).sum(1, keepdims=True)
    np.testing.assert_array_equal(out, factor * x)
    np.testing.assert_array_equal(d_x, factor * d_out)
    np.testing.assert_array_equal(d_weights, is_kept * (np.asarray(x) * d_out).sum(1, keepdims=True))


# ---- layers


def moe_layer(rng, config):
    params = jax.tree.map(lambda leaf: leaf[0], model.init(config, jax.random.key(0))["moe"]["feed_forward"])
    x = jnp.array(rng.standard_normal((512, config.hidden)), jnp.float32)
    return params, jnp.zeros(config.experts), x


def routed_experts(params, bias, x, config, layout):
    run = partial(layers.routed_experts, config=config, ops=F32, layout=layout, apply=layers.apply_experts)
    return jax.jit(run)(params, bias, x)


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 2)])
def test_routed_experts_are_those_of_one_device(rng, sizes):
    params, bias, x = moe_layer(rng, TINY)

    (out, routing), (expected, of_one) = (
        routed_experts(params, bias, x, TINY, where) for where in (layout(*sizes), mesh.ONE_DEVICE))
    # Sums of 128 and 96 products, and of the two experts of a token, in another order.
    np.testing.assert_allclose(out, expected, atol=256 * U * float(jnp.abs(expected).max()))
    np.testing.assert_array_equal(routing.load, of_one.load)
    assert routing.dropped == 0


@pytest.mark.parametrize("count", [4, 2])
def test_what_finds_no_room_is_left_out_and_counted(rng, count):
    """Every token has the experts 0 and 1: of four devices each has one expert, of two the first has both."""
    params, bias, x = moe_layer(rng, TINY)
    bias = bias.at[:2].set(100.0)
    tokens = 512 // count
    # Four devices: half of the tokens travel. Two: all of them, for half of the rows that they make there.
    assert dispatch.room(tokens, 2, 4, count, 1.0) == {4: (64, 128 * 2), 2: (256, 256 * 2)}[count]
    short = dataclasses.replace(TINY, capacity_factor=1.0)
    out, routing = routed_experts(params, bias, x, short, layout(1, count, 1))

    experts, weights = layers.route(x, params["router"], bias, TINY)
    np.testing.assert_array_equal(np.sort(experts, axis=1), np.tile([0, 1], (512, 1)))
    has_room = {4: (np.arange(512) % tokens < 64)[:, None], 2: experts == 0}[count]
    gate_up = params["experts_gate_up"].reshape(4, TINY.hidden, -1)
    expected, _ = layers.apply_experts(x, jnp.where(has_room, experts, -1), weights, gate_up,
                                       params["experts_down"], F32)
    np.testing.assert_allclose(out, expected, atol=256 * U * float(jnp.abs(expected).max()))
    assert routing.dropped == 512
    np.testing.assert_array_equal(routing.load, [512, 512, 0, 0])


# ---- the model


def gradient(config, ops, layout, sequences):
    """The loss and the gradient as a vector."""
    state = step.init(config, 0, layout)
    loss = partial(model.loss, config=config, ops=ops, layout=layout)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, routing), gradients = run(state.params, state.bias, layout.place(sequences))
    np.testing.assert_array_equal(routing.dropped, 0)
    return float(value), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])


SEQUENCES = np.random.default_rng(0).integers(
    0, TINY.vocabulary, (TINY.batch, TINY.sequence + 1)).astype(np.int32)


@functools.cache
def of_one_device(ops, device):
    with jax.default_device(device):
        return gradient(BLOCKS, ops, mesh.ONE_DEVICE, SEQUENCES)


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (1, 4, 1), (1, 1, 2), (2, 2, 2)])
def test_the_gradient_is_that_of_one_device(device, sizes):
    assert_gradient_is_that_of_one_device(device, layout(*sizes))


def assert_gradient_is_that_of_one_device(device, layout):
    value, vector = gradient(BLOCKS, F32, layout, SEQUENCES)
    expected_value, expected = of_one_device(F32, device)
    # Sums in another order: of up to 512 terms, sqrt(512) U / 2 off in the root mean square. The longest way
    # there and back has some 20 products, whose errors add up as their squares do.
    assert distance(vector, expected) < np.sqrt(20 * 512) / 2 * U
    assert abs(value - expected_value) < np.sqrt(20 * 512) / 2 * U * expected_value


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 2)])
def test_the_gradient_in_fp8_is_as_good_as_that_of_one_device(device, sizes):
    assert_fp8_gradient_is_as_good_as_that_of_one_device(device, layout(*sizes))


def assert_fp8_gradient_is_as_good_as_that_of_one_device(device, layout):
    """Where a sum is rounded in another way, a number may become its neighbour in FP8."""
    value, vector = gradient(BLOCKS, FP8, layout, SEQUENCES)
    (exact_value, exact), (one_value, one) = (of_one_device(ops, device) for ops in (F32, FP8))
    error, expected_error = distance(vector, exact), distance(one, exact)
    assert distance(vector, one) < expected_error / 2
    assert abs(error / expected_error - 1) < 0.1
    assert abs(value - one_value) < abs(exact_value - one_value)


def compiled_step(config, name, layout):
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        step.abstract_state(config), step.shardings(config, layout))
    sequences = layout.place(np.zeros((config.batch, config.sequence + 1), np.int32))
    return step.train_step(config, name, layout).lower(state, sequences).compile()


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_tokens_travel_four_times_in_a_layer_of_experts(name):
    """There and back, and the gradient's: none of them again where a layer is recomputed."""
    compiled = compiled_step(TINY, name, layout(1, 4, 1))
    assert collectives_of(compiled)["all-to-all"] == 4
    assert "collective-permute" not in collectives_of(compiled)


def test_a_step_leaves_the_state_where_it_was():
    devices = layout(2, 2, 2)
    state = step.init(TINY, 0, devices)
    losses = []
    for _ in range(4):
        state, metrics = step.train_step(TINY, "fp8", devices)(state, devices.place(SEQUENCES))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    for leaf, sharding in zip(*map(jax.tree.leaves, (state, step.shardings(TINY, devices))), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    shard = state.params["moe"]["feed_forward"]["experts_gate_up"].addressable_shards[0]
    assert shard.data.shape == (2, 2, 64, 2, 48)
    # One checksum for one state, wherever it lies.
    on_one = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state)
    assert step.digest(state) == step.digest(on_one)
    assert "all-gather" not in collectives_of(step.digest.lower(state).compile())


@pytest.mark.parametrize(("sizes", "message"), [
    ((3, 1, 1), r"Config: batch: expected a multiple of 3, the size of the mesh axis data x expert, got 8"),
    ((1, 8, 1), r"Config: experts: expected a multiple of 8, the size of the mesh axis expert, got 4"),
    ((1, 1, 4), r"Config: heads: expected a multiple of 4, the size of the mesh axis tensor, got 2"),
])
def test_what_cannot_be_divided_is_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh.check(TINY, layout(*sizes).mesh)


def test_several_processes_have_all_of_their_devices_in_the_mesh(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"mesh: expected all 8 devices of 2 processes, got data=2"):
        layout(2, 2, 1)
    assert layout(2, 2, 2).mesh.size == 8


def test_an_up_projection_that_cannot_be_divided_over_data_is_named():
    odd = dataclasses.replace(TINY, nope_dim=15)
    message = r"heads \* \(nope_dim \+ rope_dim\): expected a multiple of 8, .* tensor x data, got 46"
    with pytest.raises(ValueError, match=message):
        mesh.check(odd, layout(8, 1, 1).mesh)


@pytest.mark.parametrize("sizes", [(3, 3, 1), (0, 1, 1)])
def test_a_mesh_has_as_many_devices_as_there_are(sizes):
    with pytest.raises(ValueError, match=r"mesh: expected sizes of at least 1 and at most 8 devices"):
        layout(*sizes)
