"""Times forward and backward of layers, in FP8 and in bf16, and splits the FP8 time by kind of kernel.

    python -m benchmarks.bench_training
    python -m benchmarks.bench_training --rows 4096x7168x4096 --peers fp8 fp8_prepared bf16

A step is a layer's result with the gradients of its input and of its weights, all bf16, jitted. The peers are
`jnp.dot`, and for experts `jax.lax.ragged_dot` and tokamax, in bf16. `fp8_prepared` gets weights that are
quantised already, as in all but the first of several microbatches. Writes
benchmarks/results/training-<GPU>.json.
"""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import tqdm

from benchmarks import environment
from benchmarks.timing import Call, KernelTimer, Samples, wall_time
from benchmarks.workloads import TRAINING_WORKLOADS, TrainingWorkload

FP8, BF16 = ("fp8", "fp8_prepared"), ("bf16", "ragged_dot", "tokamax")
SLOW_US, SLOW_REPEATS = 20e3, 3
ERROR_BOUND = 0.1  # of a result against bf16's; five roundings to FP8 of 2^-4 / sqrt(3) each are 0.08
# What a kernel's time is spent on, by the beginning of its name.
PARTS = {"fp8_gemm": "gemm", "fp8_quantize": "quantize"}


def layers(workload: TrainingWorkload) -> Mapping[str, Callable]:
    """name -> (x, *weights, group_sizes) -> y; raises ImportError where nothing but tokamax is missing."""
    import jax
    import jax.numpy as jnp

    from jax_fp8gemm.autodiff import dot, ragged_feed_forward

    if not workload.group_sizes:
        fp8 = lambda x, w, _: dot(x, w)
        return {"fp8": fp8, "fp8_prepared": fp8, "bf16": lambda x, w, _: jnp.dot(x, w)}

    def experts(ragged_dot):
        def layer(x, gate_up, down, group_sizes):
            gate, up = jnp.split(ragged_dot(x, gate_up, group_sizes), 2, axis=1)
            hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
            return ragged_dot(hidden.astype(x.dtype), down, group_sizes)
        return layer

    found = {"fp8": ragged_feed_forward, "fp8_prepared": ragged_feed_forward,
             "ragged_dot": experts(jax.lax.ragged_dot)}
    try:
        import tokamax
    except Exception:  # its import builds Pallas kernels' tables, which fails in many ways
        return found
    return found | {"tokamax": experts(lambda x, w, sizes: tokamax.ragged_dot(x, w, group_sizes=sizes))}


def bind(workload: TrainingWorkload, names: list[str]) -> tuple[dict[str, Call], dict[str, str]]:
    """The compiled steps on random data, and why others are not there."""
    import jax
    import jax.numpy as jnp

    from jax_fp8gemm.autodiff import prepare

    keys = jax.random.split(jax.random.key(0), 2 + len(workload.weight_shapes))
    draw = lambda key, shape, scale: (jax.random.normal(key, shape) * scale).astype(jnp.bfloat16)
    x = draw(keys[0], (workload.tokens, workload.k), 1)
    dy = draw(keys[1], (workload.tokens, workload.out_features), 1)
    weights = [draw(key, shape, shape[-2]**-0.5)
               for key, shape in zip(keys[2:], workload.weight_shapes, strict=True)]
    group_sizes = jnp.array(workload.group_sizes, jnp.int32)

    def step(layer, x, weights, dy):
        y, vjp = jax.vjp(lambda x, *weights: layer(x, *weights, group_sizes), x, *weights)
        dx, *dw = vjp(dy)
        return y, dx, *[getattr(each, "master", each) for each in dw]

    calls, absent = {}, {}
    expected = None
    for name, layer in layers(workload).items():
        if name not in names:
            continue
        of_peer = jax.jit(lambda w: [*map(prepare, w)])(weights) if name == "fp8_prepared" else weights
        operands = x, of_peer, dy
        try:
            compiled = jax.jit(lambda *args, layer=layer: step(layer, *args)).lower(*operands).compile()
            results = compiled(*operands)
        except (RuntimeError, ValueError) as error:
            absent[name] = str(error).splitlines()[0][:200]
            continue
        expected = check(workload, name, results, expected)
        calls[name] = Call(run=lambda compiled=compiled, operands=operands: compiled(*operands),
                           wait=jax.block_until_ready)
    return calls, absent


def check(workload: TrainingWorkload, name: str, results, expected):
    """Compares the results with those of the first peer, of which it keeps some; returns these.

    Raises:
      RuntimeError: they differ by more than FP8 explains.
    """
    import jax.numpy as jnp
    import numpy as np

    some = [np.asarray(each.reshape(-1, each.shape[-1])[::97].astype(jnp.float32)) for each in results]
    for got, other in zip(some, expected or some, strict=True):
        error = np.linalg.norm(got - other) / np.linalg.norm(other)
        if not error < ERROR_BOUND:
            raise RuntimeError(f"{workload.name}: {name} differs from the first peer by {error:.1%}")
    return expected or some


def by_part(samples: Samples) -> dict[str, float]:
    """Microseconds of the FP8 GEMMs, of quantisation, and of all other kernels."""
    parts = {**dict.fromkeys(PARTS.values(), 0.0), "other": 0.0}
    for kernel, time in samples.kernel_times.items():
        part = next((part for prefix, part in PARTS.items() if kernel.startswith(prefix)), "other")
        parts[part] += time
    return {part: round(time, 2) for part, time in parts.items()}


def measure(workload: TrainingWorkload, timer: KernelTimer, names: list[str], repeats: int) -> dict[str, Any]:
    """One row of the JSON."""
    calls, absent = bind(workload, names)
    slow = {name for name, call in calls.items() if wall_time(call, runs=1, repeats=1).median > SLOW_US}
    results = {}
    for group, count in ((calls.keys() - slow, repeats), (slow, SLOW_REPEATS)):
        for name, samples in timer({name: calls[name] for name in group}, count, 1).items() if group else ():
            results[name] = {**samples.summary(), "tflops": round(workload.flops / samples.median / 1e6, 1)}
            if name in FP8:
                results[name]["parts_us"] = by_part(samples)
    speedup = {}
    for name in FP8:
        found = {other: results[other]["median_us"] for other in BF16 if other in results}
        if name in results and found:
            speedup[name] = round(min(found.values()) / results[name]["median_us"], 4)
    return {"workload": workload.name, "tokens": workload.tokens, "k": workload.k,
            "weight_shapes": workload.weight_shapes, "group_sizes": workload.group_sizes,
            "flops": workload.flops, "absent": absent, "results": results, "speedup_over_best_bf16": speedup}


def print_table(report: Mapping[str, Any]) -> None:
    print(f"\n{report['gpu']}: forward and backward, kernel time in us, median of {report['repeats']}")
    for row in report["rows"]:
        print(row["workload"])
        for name, result in row["results"].items():
            parts = result.get("parts_us", {})
            share = f", quantisation {parts['quantize'] / sum(parts.values()):.1%} of it" if parts else ""
            ratio = row["speedup_over_best_bf16"].get(name)
            over = f", {ratio:.2f}x the best bf16" if ratio else ""
            print(f"  {name:>13} {result['median_us']:10.1f} us {result['tflops']:7.0f} TFLOPS{over}{share} "
                  f"{parts or ''}")
        for name, reason in row["absent"].items():
            print(f"  {name:>13} absent: {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_training", description=__doc__.splitlines()[0])
    names = [workload.name for workload in TRAINING_WORKLOADS]
    parser.add_argument("--rows", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--peers", nargs="+", default=[*BF16, *FP8], choices=[*BF16, *FP8])
    parser.add_argument("--repeats", type=int, default=20, help="samples per row (default 20)")
    parser.add_argument(
        "--out", type=pathlib.Path, help="JSON file (default benchmarks/results/training-<GPU>.json)")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is shared with PyTorch
    report = environment.describe("training") | {"repeats": arguments.repeats, "rows": []}
    timer = KernelTimer()
    out = arguments.out or environment.result_path(report)
    rows = [workload for workload in TRAINING_WORKLOADS if workload.name in arguments.rows]
    for workload in (bar := tqdm.tqdm(rows, desc="measuring")):
        bar.set_postfix_str(workload.name)
        report["rows"].append(measure(workload, timer, arguments.peers, arguments.repeats))
        environment.write(out, report)
    environment.write(out, report | {"complete": True})
    print_table(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
