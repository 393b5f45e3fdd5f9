"""Compares runs in FP8 with those in bf16 of the same seeds: how far apart their losses are, and their speed.

    python -m examples.deepseek.compare runs/small --report docs/training.json --page docs/training.md
    python -m examples.deepseek.compare --identical runs/whole/fp8-0 runs/resumed/fp8-0

The first prints the verdict, and its exit status is 0 if FP8's smoothed loss stays within the limit of
bf16's, for every seed. The report has what the page and `plot.py` show. The status of the second is 0 if two
runs have the same bits.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from typing import Any

import numpy as np

from examples.deepseek import log
from examples.deepseek.config import Config
from examples.deepseek.precision import PRECISIONS
from examples.deepseek.train import UNTIMED_STEPS

WINDOW = 200  # steps that a smoothed loss is the mean of
LIMIT = 0.0025  # of FP8's difference, relative to bf16
MARKERS = "<!-- training:start -->", "<!-- training:end -->"
_BF16, _FP8 = PRECISIONS


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Means of `window` values that end at each one, from the first that has as many."""
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def report(folder: pathlib.Path, *, window: int = WINDOW, limit: float = LIMIT) -> dict[str, Any]:
    """What the runs in a folder show, as JSON.

    Smoothed losses are compared from the first window on that has no step of the learning rate's warm-up: in
    it, the loss falls by more in one step than what is looked for.

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
        raise ValueError(f"{folder}: expected runs of train.py, got none")
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


def table(found: dict[str, Any]) -> str:
    """The report in Markdown: the same text for the same report."""
    versions = found["environment"]["versions"]
    by_key = {(run["seed"], run["precision"]): run for run in found["runs"]}
    seeds = sorted({seed for seed, _ in by_key})
    lines = [
        f"{found['environment']['device']}, JAX {versions['jax']}, {found['steps']} steps of "
        f"{found['config']['batch']} x {found['config']['sequence']} bytes. Smoothed over {found['window']} "
        f"steps; differences are FP8's, relative to bf16, the largest one from step {found['start']} on.",
        "",
        "| seed | bf16 loss | FP8 loss | last difference | largest difference | bf16 validation | "
        "FP8 validation | bf16 ms a step | FP8 ms a step | speed-up |",
        "|" + "---:|" * 10,
    ]
    for seed in seeds:
        pair = [by_key[seed, precision] for precision in (_BF16, _FP8)]
        losses = [f"{np.mean(run['loss'][-found['window']:]):.4f}" for run in pair]
        validation = [f"{list(run['validation'].values())[-1]:.4f}" for run in pair]
        seconds = [run["median_seconds"] for run in pair]
        cells = [str(seed), *losses, *_percentages(found["differences"][str(seed)]), *validation,
                 *(f"{each * 1e3:.1f}" for each in seconds), f"{seconds[0] / seconds[1]:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    last, largest = _percentages(found["differences"]["mean"])
    lines += ["", f"{verdict(found)} The mean over seeds differs by {last} at the end, by {largest} at most."]
    return "\n".join(lines) + "\n"


def _percentages(difference):
    return [f"{difference[name]:+.3%}" for name in ("last", "largest")]


def verdict(found: dict[str, Any]) -> str:
    stays = "stays within" if found["within"] else "does not stay within"
    return f"FP8's smoothed loss {stays} {found['limit']:.2%} of bf16's for every seed."


def insert(page: str, text: str) -> str:
    """The page with `text` in place of what stood between the markers.

    Raises:
      ValueError: the page does not have each marker once, in order.
    """
    first, last = MARKERS
    start, end = page.find(first), page.find(last)
    if not 0 <= start < end or page.count(first) != 1 or page.count(last) != 1:
        raise ValueError(f"page: expected one {first} followed by one {last}")
    return f"{page[: start + len(first)]}\n{text}{page[end:]}"


def first_difference(one: pathlib.Path, other: pathlib.Path) -> str | None:
    """Where two runs are not the same to the bit, or None: their losses, gradients, loads and digests."""
    a, b = log.read(one), log.read(other)
    if wrong := log.differences(a.identity, b.identity):
        return ", ".join(wrong)
    if len(a.steps) != len(b.steps):
        return f"{len(a.steps)} and {len(b.steps)} steps"
    for mine, others in zip(a.steps, b.steps, strict=True):
        # A run that was interrupted has a validation where it ended, too.
        names = (mine.keys() & others.keys()) - {"seconds", "tokens_per_s"}
        if wrong := [name for name in sorted(names) if mine[name] != others[name]]:
            return f"step {mine['step']}: {', '.join(wrong)}"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.deepseek.compare",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=pathlib.Path, nargs="?", help="the --out of train.py")
    parser.add_argument("--report", type=pathlib.Path, metavar="JSON", help="write the report there")
    parser.add_argument("--page", type=pathlib.Path, metavar="MD", help="write the table between its markers")
    parser.add_argument("--window", type=int, default=WINDOW, help="steps to smooth over")
    parser.add_argument("--limit", type=float, default=LIMIT, help="of the relative difference")
    parser.add_argument("--identical", type=pathlib.Path, nargs=2, metavar="RUN", help="two folders of runs")
    args = parser.parse_args(arguments)
    if (args.runs is None) == (args.identical is None):
        parser.error("expected either the folder of runs or --identical")
    if args.identical:
        difference = first_difference(*args.identical)
        print("identical" if difference is None else f"different: {difference}")
        return int(difference is not None)
    found = report(args.runs, window=args.window, limit=args.limit)
    if args.report:
        args.report.write_text(json.dumps(found) + "\n")
    if args.page:
        args.page.write_text(insert(args.page.read_text(), table(found)))
    print(table(found))
    return int(not found["within"])


if __name__ == "__main__":
    raise SystemExit(main())
