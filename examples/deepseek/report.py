"""What runs in both precisions show together: the difference of their losses, their speed, their balance."""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

import numpy as np

from examples.deepseek import log
from examples.deepseek.config import Config
from examples.deepseek.precision import PRECISIONS
from examples.deepseek.train import UNTIMED_STEPS

WINDOW = 200  # steps that a smoothed loss is the mean of, in a run of three times as many or more
LIMIT = 0.0025  # of FP8's difference, relative to bf16
_BF16, _FP8 = PRECISIONS


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Means of `window` values that end at each one, from the first that has as many."""
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def make_report(folder: pathlib.Path, *, window: int | None = None, limit: float = LIMIT) -> dict[str, Any]:
    """What the runs in a folder show, as JSON.

    A smoothed loss is the mean of a window, by default of `WINDOW` steps or a third of a shorter run. It
    counts from the first window on that has no step of the learning rate's warm-up: in that, the loss falls
    by more in one step than what is looked for.

    Raises:
      ValueError: a seed has not both precisions, runs differ in more than seed and precision or in their
        number of steps, or are too short to compare.
    """
    runs = {(run.identity["seed"], run.identity["precision"]): run for run in _runs(folder)}
    seeds = sorted({seed for seed, _ in runs})
    if missing := [f"{precision}-{seed}" for seed in seeds for precision in PRECISIONS
                   if (seed, precision) not in runs]:
        raise ValueError(f"{folder}: expected both precisions of every seed, got no {', '.join(missing)}")
    first = runs[seeds[0], _BF16]
    for run in runs.values():
        same = {**run.identity, "seed": first.identity["seed"], "precision": first.identity["precision"]}
        wrong = log.differences(first.identity, same) + log.differences(first.environment, run.environment)
        if wrong:
            raise ValueError(f"{folder}: expected runs that differ in seed and precision alone, got "
                             f"{', '.join(wrong)}")
        if len(run.steps) != len(first.steps):
            raise ValueError(f"{folder}: expected runs of equal length, got {len(first.steps)} and "
                             f"{len(run.steps)} steps")
    config = Config(**first.identity["config"])
    window = window or min(WINDOW, len(first.steps) // 3)
    start = config.warmup + window  # the first step whose window has no warm-up
    if len(first.steps) < start:
        raise ValueError(f"{folder}: expected at least {start} steps, the warm-up and a window of {window}, "
                         f"got {len(first.steps)}")
    found = {
        "environment": first.environment, "config": first.identity["config"], "window": window,
        "limit": limit, "start": start, "steps": len(first.steps),
        "runs": [_run(run) for _, run in sorted(runs.items())],
    }
    differences = {seed: relative_difference(found, seed) for seed in seeds}
    differences["mean"] = np.mean(list(differences.values()), axis=0)
    found["differences"] = {
        str(seed): {"last": values[-1], "largest": values[np.abs(values).argmax()]}
        for seed, values in differences.items()}
    found["within"] = all(abs(each["largest"]) <= limit
                          for name, each in found["differences"].items() if name != "mean")
    return found


def _runs(folder):
    found = [log.read(path) for path in sorted(folder.iterdir()) if log.exists(path)]
    if not found:
        raise ValueError(f"{folder}: expected runs of train, got none")
    return found


def _run(run):
    """A run in the report: its columns, and what is made of them."""
    load = run.column("load")  # [steps, layers, E]
    return {
        "precision": run.identity["precision"],
        "seed": run.identity["seed"],
        "median_seconds": statistics.median(run.column("seconds")[UNTIMED_STEPS:].tolist()),
        "validation": {step["step"]: step["validation_loss"] for step in run.steps
                       if "validation_loss" in step},
        "loss": run.column("loss").tolist(),
        # The fullest expert of any layer, over the mean.
        "imbalance": (load.max(-1) / load.mean(-1)).max(-1).round(3).tolist(),
    }


def relative_difference(found: dict[str, Any], seed: int) -> np.ndarray:
    """FP8's smoothed loss over bf16's, less 1, for the steps from `start` on."""
    losses = {run["precision"]: np.array(run["loss"]) for run in found["runs"] if run["seed"] == seed}
    fp8, bf16 = (smooth(losses[precision][found["start"] - found["window"]:], found["window"])
                 for precision in (_FP8, _BF16))
    return fp8 / bf16 - 1
