"""Draws a report: losses, their difference, speed, and how the experts' load evens out.

    python -m examples.deepseek.plot docs/training.json docs/training.png    # compare.py does this, too
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from examples.deepseek.report import relative_difference, smooth

_COLORS = {"bf16": "#8d96a3", "fp8": "#d1495b"}
_BALANCE_WINDOW = 20


def draw(report: dict[str, Any]) -> plt.Figure:
    """Four panels; seeds are lines of the same colour."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    (losses, differences), (speed, balance) = panels
    for run in report["runs"]:
        color = _COLORS[run["precision"]]
        _line(losses, run["loss"], report["window"], color)
        losses.plot(*zip(*((int(step), loss) for step, loss in run["validation"].items()), strict=True), "x",
                    color=color, markersize=4)
        _line(balance, run["imbalance"], min(_BALANCE_WINDOW, report["steps"]), color)
    losses.set(title="loss, x of validation", ylabel=f"nats a byte, mean of {report['window']} steps")
    balance.set(title="fullest expert of any layer", ylabel="tokens over the mean")
    for precision, color in _COLORS.items():
        losses.plot([], [], color=color, label=precision)
    losses.legend()

    limit = 100 * report["limit"]
    for seed in sorted({run["seed"] for run in report["runs"]}):
        values = 100 * relative_difference(report, seed)
        differences.plot(report["start"] + np.arange(len(values)), values, label=f"seed {seed}")
    differences.axhspan(-limit, limit, color="black", alpha=0.08, label=f"within {limit:.2f} %")
    differences.axhline(0, color="black", linewidth=0.8)
    differences.set(title="smoothed loss of FP8 over bf16's", ylabel="%")
    differences.legend(fontsize="small")

    tokens = report["config"]["batch"] * report["config"]["sequence"]
    for position, run in enumerate(report["runs"]):
        bar = speed.bar(position, tokens / run["median_seconds"] / 1e3, color=_COLORS[run["precision"]])
        speed.bar_label(bar, [f"{run['median_seconds'] * 1e3:.1f} ms"], fontsize="small")
    speed.set_xticks(range(len(report["runs"])),
                     [f"{run['precision']}\nseed {run['seed']}" for run in report["runs"]])
    speed.set(title=f"speed, {report['environment']['device']}", ylabel="thousand tokens a second")
    for axes in (losses, differences, balance):
        axes.set_xlabel("step")
        axes.grid(alpha=0.2)
    return figure


def _line(axes, values, window, color):
    smoothed = smooth(np.array(values), window)
    axes.plot(window + np.arange(len(smoothed)), smoothed, color=color, linewidth=1)


def save(report: dict[str, Any], path: pathlib.Path) -> None:
    figure = draw(report)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.deepseek.plot",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("report", type=pathlib.Path, help="JSON file of compare.py")
    parser.add_argument("figure", type=pathlib.Path, help="the file to write, such as training.png")
    args = parser.parse_args(arguments)
    save(json.loads(args.report.read_text()), args.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
