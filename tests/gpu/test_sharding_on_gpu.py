"""Meshes of several Hopper GPUs: one GPU's bits, gradients and model; kernels that load beside collectives.

Cases, layers and bounds are those of the tests on CPU devices. A mesh takes as many GPUs as there are, up to
eight; what shards over both of its axes needs four.
"""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import test_example_deepseek_generate as of_decoding
import test_example_deepseek_mesh as of_model
import test_sharding_autodiff as of_layers
from examples.deepseek import generate, mesh, step
from examples.deepseek.inference import inference_ops
from jax_fp8gemm.mesh.plan import axes_of
from meshes import assert_same_bits, mesh_of, run, run_alone
from test_sharding import CASES, SIZES, M

# NOTES: where XLA drops a rounding to bf16, a sharded program may differ from another one.
OPTIONS = {"xla_allow_excess_precision": False}
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit, "shard_map": AxisType.Auto}
LOADING_PROGRAM = pathlib.Path(__file__).with_name("loading_program.py")


def assert_collectives(found, expected):
    """The kinds are those of CPUs. On GPUs, XLA combines some of one kind."""
    assert found.keys() == expected.keys()
    assert all(found[kind] <= count for kind, count in expected.items()), (found, expected)


# ---- operations


def names_y(case):
    entries = [entry for spec in (*case.specs, case.out or ()) for entry in spec]
    return any("y" in axes_of(entry) for entry in entries)


@functools.cache
def of_one_gpu(name):
    return run_alone(CASES[name].call, *CASES[name].operands, compiler_options=OPTIONS)


def meant(name, result):
    """Of masked operations the rows that belong to a group: the others hold what memory held."""
    if "masked" not in name:
        return result
    is_meant = np.arange(M) < np.asarray(SIZES)[:, None]
    return jax.tree.map(lambda leaf: np.asarray(leaf)[is_meant], result)


@pytest.mark.parametrize(("mode", "name"), [
    (mode, name) for name, case in CASES.items() for mode in MODES
    if mode != "shard_map" or case.local_out is not None])
def test_operations(gpus, mode, name):
    case = CASES[name]
    devices = gpus(4 if names_y(case) else 2)
    sizes = {"x": 4 if len(devices) >= 8 else 2, "y": 2 if len(devices) >= 4 else 1}
    where = mesh_of(MODES[mode], **sizes, devices=devices)
    call, options = case.call, {}
    if mode == "shard_map":
        call = jax.shard_map(call, mesh=where, in_specs=case.specs, out_specs=case.local_out)
    elif mode == "explicit":
        call = partial(call, out_sharding=case.out)
    elif case.out is not None:
        options = {"out_shardings": NamedSharding(where, case.out)}
    actual, found = run(where, call, case.operands, case.specs, OPTIONS, **options)
    assert_same_bits(meant(name, actual), meant(name, of_one_gpu(name)))
    assert_collectives(found, {} if mode == "shard_map" else case.collectives)


# ---- differentiable products


@functools.cache
def layer_of_one_gpu(name):
    layer = of_layers.LAYERS[name]
    function = partial(of_layers.with_gradients, layer.function)
    return run_alone(function, *layer.operands, layer.cotangent(), compiler_options=OPTIONS)


@pytest.mark.parametrize(("x", "y"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("mode", ["auto", "explicit"])
@pytest.mark.parametrize("name", of_layers.LAYERS)
def test_gradients(gpus, name, mode, x, y):
    layer = of_layers.LAYERS[name]
    where = mesh_of(MODES[mode], x=x, y=y, devices=gpus(x * y))
    specs, operands = (*layer.specs, layer.out), (*layer.operands, layer.cotangent())
    function, options = layer.function, {}
    if mode == "explicit":
        function = partial(function, out_sharding=layer.out)
    else:
        shardings = [NamedSharding(where, spec) for spec in (layer.out, *layer.specs)]
        options = {"out_shardings": tuple(shardings)}
    actual, found = run(
        where, partial(of_layers.with_gradients, function), operands, specs, OPTIONS, **options)
    of_layers.assert_equals(name, actual, layer_of_one_gpu(name))
    if min(x, y) > 1:
        assert_collectives(of_layers.without_exchange(found), layer.collectives)


# ---- the model


def layout(gpus, *sizes):
    return of_model.layout(*sizes, devices=gpus(math.prod(sizes)))


MESHES = pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 4, 1), (2, 2, 1), (2, 2, 2)])


@MESHES
def test_the_model_s_gradient(gpus, sizes):
    with jax.default_matmul_precision("highest"):  # f32 is f32: the bounds know no TF32
        of_model.assert_gradient_is_that_of_one_device(gpus(1)[0], layout(gpus, *sizes))


@MESHES
def test_the_model_s_gradient_in_fp8(gpus, sizes):
    with jax.default_matmul_precision("highest"):
        of_model.assert_fp8_gradient_is_as_good_as_that_of_one_device(gpus(1)[0], layout(gpus, *sizes))


@functools.cache
def losses(layout):
    """Of four steps of training in FP8, on the same sequences; no token is left out."""
    state, found = step.init(of_model.BLOCKS, 0, layout), []
    for _ in range(4):
        state, metrics = step.train_step(of_model.BLOCKS, "fp8", layout)(
            state, layout.place(of_model.SEQUENCES))
        found.append(float(metrics["loss"]))
        np.testing.assert_array_equal(metrics["dropped"], 0)
    return found


@MESHES
def test_training_steps(gpus, sizes):
    """Activations in bf16 come out as their neighbours where a sum has another order, 2^-8 away."""
    found = losses(layout(gpus, *sizes))
    assert found[-1] < found[0]
    np.testing.assert_allclose(found, losses(mesh.ONE_DEVICE), rtol=2**-8)


# ---- decoding


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 2, 2)])
def test_decoding_has_one_gpu_s_logits(gpus, sizes):
    """In FP8, to what FP8 changes by itself: a number may become its neighbour on another mesh."""
    lengths, state = np.int32([5, 5, 5, 5]), of_decoding.state_of(gpus(1)[0])
    fp8 = inference_ops("fp8", jnp.float32)
    with jax.default_matmul_precision("highest"):
        exact, one, on_mesh = (
            of_decoding.run(state, of_decoding.TOKENS, lengths, ops, where) for ops, where in (
                (inference_ops("f32"), mesh.ONE_DEVICE), (fp8, mesh.ONE_DEVICE), (fp8, layout(gpus, *sizes))))
    assert np.linalg.norm(on_mesh - one) < np.linalg.norm(one - exact) / 2


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 2)])
def test_a_decoding_step_is_replayed_on_every_gpu(gpus, driver_calls, sizes):
    """From CUDA graphs, which hold what is between collectives; nothing is loaded any more."""
    count = math.prod(sizes)
    where = layout(gpus, *sizes) if count > 1 else mesh.ONE_DEVICE
    state, ops = of_decoding.state_of(gpus(1)[0]), inference_ops("fp8")
    weights = of_decoding.load(state, ops, where)
    static = {"config": of_decoding.TINY, "ops": ops, "layout": where}
    tokens = where.place(np.resize(of_decoding.TOKENS, (8, 5)))
    logits, cache = jax.jit(partial(generate.prefill, size=16, **static))(
        weights, state.bias, tokens, where.place(np.full(8, 5, np.int32)))
    decode = jax.jit(partial(generate.decode, **static), donate_argnames="cache")
    token = where.place(np.arange(8, dtype=np.int32))
    for number in range(6):
        driver_calls()
        logits, cache = jax.block_until_ready(decode(weights, state.bias, token, cache=cache))
        calls = driver_calls()
        if number > 2:
            assert calls["cuGraphLaunch"] >= count, calls
            assert not {"cuLibraryLoadData", "cuModuleLoadData", "cuModuleLoadDataEx"} & calls.keys()
        assert np.isfinite(logits).all()


# ---- loading


def test_kernels_load_while_collectives_run(gpus, tmp_path):
    """Over two hundred programs of collectives, with fresh kernels loaded meanwhile, and no hang."""
    gpus(2)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                   "JAX_FP8GEMM_CACHE_DIR": str(tmp_path), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # The program ends itself after its limit; what is beyond that is for a process that cannot.
    done = subprocess.run([sys.executable, LOADING_PROGRAM, "--limit", "240"], env=environment, timeout=300,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-6000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["programs"] >= 100
    assert found["overlapped"] >= found["rounds"] / 2, found
