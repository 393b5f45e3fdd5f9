"""What the examples share: a layer in FP8 beside the same layer in bf16, their difference and their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

ON_GPU = jax.default_backend() == "gpu"
# The devices that there are, in one row: as many as a power of two, which divides the layers' sizes.
_COUNT = 1 << min(jax.device_count(), 32).bit_length() - 1
MESH = jax.make_mesh((_COUNT,), ("devices",), devices=jax.devices()[:_COUNT],
                     axis_types=(jax.sharding.AxisType.Auto,))
SAMPLES, CALLS_PER_SAMPLE = 10, 20


def compare(title: str, fp8: Callable, bf16: Callable, *, hidden: int, token_counts: Sequence[int],
            draw_weights: Callable, specs: Any, to_fp8: Callable) -> None:
    """Prints the error of the FP8 layer and, on GPUs, the times of both, for several numbers of tokens.

    Args:
      title: names the layer and its sizes.
      fp8, bf16: (x [T, hidden] bf16, weights) -> [T, hidden].
      hidden: columns of x.
      token_counts: the T to compare.
      draw_weights: key -> the weights of `bf16`.
      specs: the PartitionSpecs of these on `MESH`; tokens are whole on every device.
      to_fp8: the weights of `bf16` -> those of `fp8`.
    """
    print(f"{title}, on {MESH.size} x {jax.devices()[0].device_kind}")
    draw_weights = jax.jit(draw_weights, out_shardings=jax.tree.map(partial(NamedSharding, MESH), specs))
    with tqdm(total=2 + len(token_counts), leave=False) as progress:
        def step(what: str, function: Callable, *args: Any) -> Any:
            progress.set_description(what)
            result = jax.block_until_ready(function(*args))
            progress.update()
            return result

        weights = step("drawing weights", draw_weights, jax.random.key(0))
        scaled = step("quantising weights", to_fp8, weights)
        rows = [step(f"{count} tokens", _row, count, hidden, (fp8, scaled), (bf16, weights))
                for count in token_counts]
    print("\n tokens   error against bf16" + "         fp8        bf16   speed-up" * ON_GPU, *rows, sep="\n")
    print("\nThe error is that of rounding to 8 bits.",
          "Times include quantising the activations." if ON_GPU else "Times are shown on a GPU.", end="\n\n")


def _row(count: int, hidden: int, *layers: tuple[Callable, Any]) -> str:
    x = jax.random.normal(jax.random.key(count), (count, hidden)).astype(jnp.bfloat16)
    x = jax.device_put(x, NamedSharding(MESH, P()))
    row = f"{count:7d}   {relative_error(*(layer(x, weights) for layer, weights in layers)):18.2%}"
    if ON_GPU:
        fp8, bf16 = (seconds_per_call(layer, x, weights) for layer, weights in layers)
        row += f"   {fp8 * 1e6:6.0f} us   {bf16 * 1e6:6.0f} us   {bf16 / fp8:7.2f}x"
    return row


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    out, expected = (x.astype(jnp.float32) for x in (out, expected))
    return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))


def seconds_per_call(function: Callable, *args: Any) -> float:
    """The median over samples of a row of calls, first call and compilation left out."""
    jax.block_until_ready(function(*args))

    def sample() -> float:
        start = time.perf_counter()
        outs = [function(*args) for _ in range(CALLS_PER_SAMPLE)]
        jax.block_until_ready(outs)
        return (time.perf_counter() - start) / CALLS_PER_SAMPLE

    return statistics.median(sample() for _ in range(SAMPLES))


def normal_matrix(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """bf16 weights of variance 1 / fan_in."""
    return (jax.random.normal(key, shape) * fan_in**-0.5).astype(jnp.bfloat16)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, in f32, rounded once."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(jnp.bfloat16)
