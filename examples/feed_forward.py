"""A DeepSeek-V3 feed-forward block with FP8 GEMMs, against the same block in bf16.

    python examples/feed_forward.py

    x [T, 7168] -> down(silu(gate(x)) * up(x))        gate, up [18432, 7168], down [7168, 18432]

On a GPU the block has V3's real sizes, and its time is shown beside that of jnp.dot; on a CPU it is smaller,
and runs in plain jnp.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jax_fp8gemm import fp8_gemm, quantize
from jax_fp8gemm.scaling import ScaledArray

ON_GPU = jax.default_backend() == "gpu"
HIDDEN, INTERMEDIATE = (7168, 18432) if ON_GPU else (512, 1152)
TOKENS = (64, 4096) if ON_GPU else (16, 128)
WEIGHT_BLOCKS = (128, 128)
SAMPLES, CALLS_PER_SAMPLE = 10, 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """[out, in] matrices of the block: bf16 arrays or ScaledArrays."""

    gate: jax.Array | ScaledArray
    up: jax.Array | ScaledArray
    down: jax.Array | ScaledArray


@jax.jit
def init(key) -> Weights:
    def matrix(key, rows, columns):
        return (jax.random.normal(key, (rows, columns)) * columns**-0.5).astype(jnp.bfloat16)

    gate, up, down = jax.random.split(key, 3)
    return Weights(matrix(gate, INTERMEDIATE, HIDDEN), matrix(up, INTERMEDIATE, HIDDEN),
                   matrix(down, HIDDEN, INTERMEDIATE))


@jax.jit
def to_fp8(weights: Weights) -> Weights:
    return jax.tree.map(lambda w: quantize(w, WEIGHT_BLOCKS), weights)


def swiglu(gate, up):
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(jnp.bfloat16)


@jax.jit
def feed_forward_fp8(x, weights: Weights):
    x = quantize(x)
    hidden = swiglu(fp8_gemm(x, weights.gate), fp8_gemm(x, weights.up))
    return fp8_gemm(quantize(hidden), weights.down)


@jax.jit
def feed_forward_bf16(x, weights: Weights):
    hidden = swiglu(jnp.dot(x, weights.gate.T), jnp.dot(x, weights.up.T))
    return jnp.dot(hidden, weights.down.T)


def relative_error(out, expected) -> float:
    out, expected = (x.astype(jnp.float32) for x in (out, expected))
    return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))


def seconds_per_call(function, *args) -> float:
    """The median over samples of a row of calls, first call and compilation left out."""
    jax.block_until_ready(function(*args))

    def sample():
        start = time.perf_counter()
        outs = [function(*args) for _ in range(CALLS_PER_SAMPLE)]
        jax.block_until_ready(outs)
        return (time.perf_counter() - start) / CALLS_PER_SAMPLE

    return statistics.median(sample() for _ in range(SAMPLES))


def main():
    device = jax.devices()[0]
    print(f"DeepSeek-V3 feed-forward block on {device.device_kind}: "
          f"hidden {HIDDEN}, intermediate {INTERMEDIATE}")
    with tqdm(total=2 + len(TOKENS), leave=False) as progress:
        def step(what, function, *args):
            progress.set_description(what)
            result = jax.block_until_ready(function(*args))
            progress.update()
            return result

        weights = step("drawing weights", init, jax.random.key(0))
        scaled = step("quantising weights", to_fp8, weights)
        rows = [step(f"{tokens} tokens", compare, tokens, weights, scaled) for tokens in TOKENS]

    print("\n tokens   error against bf16" + "    fp8_gemm     jnp.dot   speed-up" * ON_GPU)
    for tokens, error, times in rows:
        line = f"{tokens:7d}   {error:18.2%}"
        if times:
            fp8, bf16 = times
            line += f"   {fp8 * 1e6:6.0f} us   {bf16 * 1e6:6.0f} us   {bf16 / fp8:7.2f}x"
        print(line)
    print("\nThe error is that of rounding to 8 bits.",
          "Times include quantising the activations." if ON_GPU else "Times are shown on a GPU.")


def compare(tokens, weights, scaled):
    """Tokens, the relative error of the FP8 block, and on a GPU the seconds of both blocks."""
    x = jax.random.normal(jax.random.key(tokens), (tokens, HIDDEN)).astype(jnp.bfloat16)
    error = relative_error(feed_forward_fp8(x, scaled), feed_forward_bf16(x, weights))
    if not ON_GPU:
        return tokens, error, None
    return tokens, error, (seconds_per_call(feed_forward_fp8, x, scaled),
                           seconds_per_call(feed_forward_bf16, x, weights))


if __name__ == "__main__":
    main()
