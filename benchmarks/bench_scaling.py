"""Weak scaling of a training step with experts over the GPUs of a host: time, efficiency, what it goes to.

    python -m benchmarks.bench_scaling
    python -m benchmarks.bench_scaling --devices 1 2 --precision fp8 --set batch=8

The model of examples/deepseek, its routed experts divided over the mesh axis `expert`. A GPU has the same
work whatever their number: `batch` sequences and `experts` routed experts of the configuration are those of
one GPU, so that with the GPUs the batch grows, and the model. Were the model the same, each GPU would have
fewer experts to update, and would look faster than it scales. Tokens are random, and so go to all experts
evenly; text does so late in training at best. What found no room is in the report.

Writes benchmarks/results/scaling-<GPU>.json after every row, and a figure beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tqdm

from benchmarks import environment, plot, timeline
from benchmarks.timing import Call, record, wall_time

PRECISIONS = ("bf16", "fp8")
BATCHES = 16
PROFILED_STEPS = 5


class Training:
    """Steps of training on some devices, one after the other."""

    def __init__(self, config, precision: str, devices: Sequence[Any]):
        import numpy as np

        from examples.deepseek import mesh, step

        count = len(devices)
        layout = mesh.Layout(mesh.make_mesh(expert=count, devices=devices)) if count > 1 else mesh.ONE_DEVICE
        self.config = dataclasses.replace(config, batch=count * config.batch, experts=count * config.experts)
        self._step = step.train_step(self.config, precision, layout)
        self._state = step.init(self.config, 0, layout)
        # There already when a step wants them, and too many to be learnt.
        shape = BATCHES, self.config.batch, self.config.sequence + 1
        tokens = np.random.default_rng(0).integers(0, self.config.vocabulary, shape, np.int32)
        self._batches = itertools.cycle([layout.place(batch) for batch in tokens])

    def run(self) -> dict[str, Any]:
        """Enqueues a step, and returns its metrics."""
        self._state, metrics = self._step(self._state, next(self._batches))
        return metrics


def powers_of_two(count: int) -> list[int]:
    """Up to `count`."""
    return [2**exponent for exponent in range(count.bit_length())]


def measure(training: Training, num_devices: int, repeats: int, steps: int) -> dict[str, Any]:
    """A row of the JSON, all but the efficiency and what a step's time goes to."""
    import jax
    import numpy as np

    call = Call(run=training.run, wait=jax.block_until_ready)
    wall_time(call, runs=steps, repeats=1)  # compiles; the GPUs' clocks rise
    samples = wall_time(call, runs=steps, repeats=repeats).summary()
    del samples["kernels"]
    metrics, config = jax.device_get(training.run()), training.config
    if not np.isfinite(metrics["loss"]):
        raise RuntimeError(f"{num_devices} devices: the loss is {metrics['loss']}")
    load = np.asarray(metrics["load"])
    tokens = config.tokens_per_step // num_devices
    return {
        "devices": num_devices, "experts": config.experts, "tokens_per_device": tokens, **samples,
        "tokens_per_s_per_device": round(tokens / samples["median_us"] * 1e6, 1),
        "loss": float(metrics["loss"]),
        "dropped": round(float(np.sum(metrics["dropped"]) / load.sum()), 4),
        "largest_load_over_mean": round(float((load.max(-1) / load.mean(-1)).mean()), 3),
    }


def profile(training: Training) -> dict[str, Any]:
    """What a step's time goes to on each device, and its longest kernels; takes a GPU, and PyTorch."""
    import jax

    if jax.default_backend() != "gpu" or importlib.util.find_spec("torch") is None:
        return {}

    def work():
        for _ in range(PROFILED_STEPS):
            metrics = training.run()
        jax.block_until_ready(metrics)

    activities = record(work)
    return {"split": timeline.split(activities, PROFILED_STEPS),
            "kernels_us": timeline.longest_kernels(activities, PROFILED_STEPS)}


def add_efficiency(rows: list[dict[str, Any]]) -> None:
    """The time of one device over that of several, which have the same work each."""
    alone = {row["precision"]: row["median_us"] for row in rows if row["devices"] == 1}
    for row in rows:
        if row["precision"] in alone:
            row["efficiency"] = round(alone[row["precision"]] / row["median_us"], 4)


def print_table(report: Mapping[str, Any]) -> None:
    print(f"\n{report['gpu']}: a step of {report['config']}, ms; tokens per second and GPU")
    print(f"{'':>5}{'GPUs':>5}{'step':>9}{'tokens/s':>10}{'efficiency':>11}{'dropped':>9}  |"
          + "".join(f"{part:>14}" for part in plot.STEP_PARTS) + f"{'communication':>14}")
    for row in report["rows"]:
        efficiency = f"{row['efficiency']:.1%}" if "efficiency" in row else "-"
        print(f"{row['precision']:>5}{row['devices']:>5}{row['median_us'] / 1e3:>9.2f}"
              f"{row['tokens_per_s_per_device']:>10.0f}{efficiency:>11}{row['dropped']:>9.2%}  |", end="")
        parts = timeline.mean_split(row)
        print("".join(f"{parts[part] / 1e3:>14.2f}" if parts else f"{'-':>14}"
                      for part in (*plot.STEP_PARTS, "communication")))


def main(arguments: list[str] | None = None) -> int:
    from examples.deepseek.arguments import named_value, positive
    from examples.deepseek.config import load

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", nargs="+", type=positive,
                        help="how many; the powers of two, as far as there are")
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--config", default="small", help="as of examples.deepseek.train")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", type=named_value,
                        help="fields of the configuration to replace; `batch` and `experts` are of one GPU")
    parser.add_argument("--repeats", type=positive, default=10, help="samples per row (default 10)")
    parser.add_argument("--steps", type=positive, default=5, help="steps of a sample (default 5)")
    parser.add_argument("--profile", nargs="*", default=PRECISIONS, choices=PRECISIONS,
                        help="of which what a step's time goes to is recorded, too (default both)")
    parser.add_argument("--out", type=pathlib.Path,
                        help="JSON file (default benchmarks/results/scaling-<GPU>.json)")
    args = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is shared with PyTorch
    import jax

    devices = jax.devices()
    counts = args.devices or powers_of_two(len(devices))
    if max(counts) > len(devices):
        parser.error(f"--devices: expected at most {len(devices)}, got {max(counts)}")
    config = load(args.config, dict(args.set))
    report = environment.describe("scaling") | {
        "config": args.config, "settings": dataclasses.asdict(config), "repeats": args.repeats,
        "steps": args.steps, "xla_flags": os.environ.get("XLA_FLAGS", ""), "rows": []}
    out = args.out or environment.result_path(report)
    rows = [(precision, count) for count in sorted(counts) for precision in args.precision]
    for precision, count in (bar := tqdm.tqdm(rows, desc="measuring")):
        bar.set_postfix_str(f"{precision}, {count}")
        training = Training(config, precision, devices[:count])
        row = {"precision": precision, **measure(training, count, args.repeats, args.steps),
               "split": [], "kernels_us": {}}
        report["rows"].append(row)
        add_efficiency(report["rows"])
        environment.write(out, report)  # before the profiler has its turn
        if precision in args.profile:
            row |= profile(training)
            environment.write(out, report)
    environment.write(out, report | {"complete": True})
    print_table(report)
    for figure in plot.render(report, out.parent, out.stem):
        print(figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
