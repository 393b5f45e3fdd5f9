"""Times the collectives that a model with experts runs, at its messages' sizes, as bus bandwidth.

    python -m benchmarks.bench_collectives
    python -m benchmarks.bench_collectives --devices 4 --megabytes 1 16 256

Sizes are those of examples/deepseek's `small`, experts divided over all devices: a layer's tokens to their
experts in FP8, their sums back in bf16, and the largest matrix in f32. Bus bandwidth is what each device has
to send at least, over the time, as in NVIDIA's nccl-tests: it compares with the links' and, unlike the time,
hardly changes with the number of devices. Wall time in programs of one collective, enqueued back to back.

Writes benchmarks/results/collectives-<GPU>.json.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm

from benchmarks import environment
from benchmarks.timing import Call, wall_time

AXIS = "devices"
# By collective: bytes that a device sends at least, over those of the message, times n / (n - 1). The message
# is what a device puts in; of all_gather, what it gets.
SENT = {"all_to_all": 1, "ragged_all_to_all": 1, "all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
COLUMNS = 1024  # of a message's rows, f32


def messages(num_devices: int) -> dict[str, int]:
    """Bytes by name, of one device."""
    from examples.deepseek.config import PRESETS
    from examples.deepseek.dispatch import room

    config = PRESETS["small"]
    k, hidden = config.experts_per_token, config.hidden
    tokens = num_devices * room(config.tokens_per_step, k, num_devices * config.experts, num_devices,
                                config.capacity_factor).tokens
    fp8 = hidden + 4 * math.ceil(hidden / 128) + 2 * 4 * k  # features, scales, weights and experts
    return {"tokens in FP8": tokens * fp8, "sums in bf16": tokens * 2 * hidden,
            "a matrix in f32": 4 * hidden * 2 * config.dense_intermediate}


def collectives() -> dict[str, Callable]:
    """By name: a device's [n * R, COLUMNS] f32 -> what it gets; of all_gather [R, COLUMNS]."""
    import jax.numpy as jnp
    from jax import lax

    def ragged_all_to_all(x):
        """What `all_to_all` does, with sizes that only the devices know."""
        count = lax.axis_size(AXIS)
        sizes = jnp.full(count, len(x) // count, jnp.int32)
        places = jnp.full(count, lax.axis_index(AXIS) * (len(x) // count), jnp.int32)
        offsets = jnp.arange(count, dtype=jnp.int32) * (len(x) // count)
        return lax.ragged_all_to_all(x, jnp.zeros_like(x), offsets, sizes, places, sizes, axis_name=AXIS)

    return {
        "all_to_all": lambda x: lax.all_to_all(x, AXIS, 0, 0, tiled=True),
        "ragged_all_to_all": ragged_all_to_all,
        "all_gather": lambda x: lax.all_gather(x, AXIS, tiled=True),
        "reduce_scatter": lambda x: lax.psum_scatter(x, AXIS, tiled=True),
        "all_reduce": lambda x: lax.psum(x, AXIS),
    }


def bind(name: str, num_bytes: int, devices: Sequence[Any]) -> tuple[Call, int]:
    """The compiled collective on whole numbers, and the bytes of its message, rounded to whole rows."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    count = len(devices)
    part = max(1, num_bytes // (4 * COLUMNS * count))
    rows = part if name == "all_gather" else part * count  # of a device
    mesh = jax.make_mesh((count,), (AXIS,), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P(AXIS))
    fill = lambda: jnp.broadcast_to(jnp.arange(count * rows, dtype=jnp.float32)[:, None] % 251,
                                    (count * rows, COLUMNS))
    x = jax.jit(fill, out_shardings=sharding)()
    # Results of all_gather and all_reduce are the same everywhere; each device keeps its own here, too.
    function = jax.shard_map(collectives()[name], mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS),
                             check_vma=False)
    compiled = jax.jit(function).lower(x).compile()
    call = Call(run=lambda: compiled(x), wait=jax.block_until_ready)
    return call, 4 * COLUMNS * count * part


def measure(name: str, message: str, num_bytes: int, devices: Sequence[Any], repeats: int) -> dict[str, Any]:
    """One row of the JSON."""
    count = len(devices)
    row = {"collective": name, "message": message, "devices": count}
    try:
        call, num_bytes = bind(name, num_bytes, devices)
        samples = wall_time(call, repeats=repeats)
    except (NotImplementedError, RuntimeError) as error:
        return row | {"bytes": num_bytes, "absent": str(error).splitlines()[0][:200]}
    sent = num_bytes * SENT[name] * (count - 1) / count
    summary = samples.summary()
    del summary["kernels"]
    return row | {"bytes": num_bytes, **summary, "bus_gb_per_s": round(sent / samples.median / 1e3, 2)}


def print_table(report: Mapping[str, Any]) -> None:
    print(f"\n{report['gpu']}: us and bus bandwidth in GB/s")
    for row in report["rows"]:
        result = (f"  absent: {row['absent']}" if "absent" in row else
                  f"{row['median_us']:>10.1f}{row['bus_gb_per_s']:>9.1f}")
        print(f"{row['devices']:>3} {row['collective']:>18} {row['message']:>16} "
              f"{row['bytes'] / 1e6:>8.1f} MB{result}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_collectives", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, help="how many; all by default")
    parser.add_argument("--megabytes", nargs="+", type=float, help="of messages, in place of the model's")
    parser.add_argument("--collectives", nargs="+", default=[*SENT], choices=[*SENT])
    parser.add_argument("--repeats", type=int, default=10, help="samples per row (default 10)")
    parser.add_argument("--out", type=pathlib.Path,
                        help="JSON file (default benchmarks/results/collectives-<GPU>.json)")
    args = parser.parse_args(arguments)
    import jax

    count = args.devices or len(jax.devices())
    if not 2 <= count <= len(jax.devices()):
        parser.error(f"--devices: expected 2 to {len(jax.devices())}, got {count}")
    sizes = ({f"{size:g} MB": int(size * 1e6) for size in args.megabytes} if args.megabytes
             else messages(count))
    report = environment.describe("collectives") | {"repeats": args.repeats, "rows": []}
    out = args.out or environment.result_path(report)
    rows = [(name, message) for message in sizes for name in args.collectives]
    for name, message in (bar := tqdm.tqdm(rows, desc="measuring")):
        bar.set_postfix_str(f"{name}, {message}")
        report["rows"].append(
            measure(name, message, sizes[message], jax.devices()[:count], args.repeats))
        environment.write(out, report)
    environment.write(out, report | {"complete": True})
    print_table(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
