"""Draws results: of GEMMs a roofline and the speed over DeepGEMM, of scaling what a step's time goes to.

python -m benchmarks.plot                        # every such report in benchmarks/results
python -m benchmarks.plot report.json --out figures/
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import environment
from benchmarks.timeline import mean_split

# Ceilings of the roofline: FP8 tensor cores by the data sheet, memory by the data sheet.
CEILINGS = {"NVIDIA H200": (1979e12, 4.8e12), "NVIDIA H100 80GB HBM3": (1979e12, 3.35e12)}
_COLORS = {
    "fp8_gemm": "#d1495b",
    "deepgemm": "#00798c",
    "cublaslt_block": "#edae49",
    "cublaslt_fast": "#c9a227",
    "cutlass_block": "#66a182",
    "jnp_bf16": "#8d96a3",
    "xla_fp8": "#2e4057",
    "ragged_dot_bf16": "#8d96a3",
    "tokamax_bf16": "#2e4057",
    "deepgemm_padding": "#66a182",
}
_BASELINE, _FALLBACKS = "deepgemm", ("jnp_bf16", "ragged_dot_bf16")
KINDS = ("dense", "grouped", "scaling")  # of reports
# Of a step, from the bottom of a bar to its top, and their colors.
STEP_PARTS = {"gemm": "#d1495b", "quantize": "#edae49", "other": "#8d96a3", "exposed": "#00798c",
              "idle": "#dddddd"}
_LABELS = {"exposed": "exposed communication"}
# A figure of bars shows all rows of a dense report, and the rows with one of these tags of a grouped one.
GROUPED_FIGURES = ("contiguous", "masked", "ragged_k", "small_experts", "ragged_dot")


def _points(report: Mapping[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """FLOP per byte and TFLOPS of every row that a peer has."""
    rows = [row for row in report["rows"] if "kernel" in row["results"].get(name, {})]
    intensity = np.array([row["flops"] / row["bytes"] for row in rows])
    return intensity, np.array([row["results"][name]["kernel"]["tflops"] for row in rows])


def roofline(report: Mapping[str, Any]) -> plt.Figure:
    """TFLOPS over FLOP per byte, with the ceilings of the GPU where they are known."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, peer in report["peers"].items():
        intensity, tflops = _points(report, name)
        if len(tflops):
            axes.loglog(
                intensity,
                tflops,
                "o" if name == "fp8_gemm" else "x",
                color=_COLORS.get(name),
                label=peer["title"],
                zorder=3 if name == "fp8_gemm" else 2,
            )
    if ceilings := CEILINGS.get(report["gpu"]):
        flops_per_s, bytes_per_s = ceilings
        intensity = np.geomspace(*axes.get_xlim(), 200)
        bound = np.minimum(flops_per_s, intensity * bytes_per_s) / 1e12
        axes.loglog(intensity, bound, color="black", linewidth=1, label="data sheet")
    axes.set(
        xlabel="FLOP per byte (FP8 operands)",
        ylabel="TFLOPS",
        title=f"{report['kind'].capitalize()} GEMM, {report['gpu']}",
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small")
    return figure


def bars(report: Mapping[str, Any], tag: str | None = None) -> plt.Figure:
    """Speed of every peer over DeepGEMM, or over bf16 where DeepGEMM is absent, of the rows with the tag."""
    names = [name for name in report["peers"] if len(_points(report, name)[0])]
    baseline = next((name for name in (_BASELINE, *_FALLBACKS) if name in names), _BASELINE)
    rows = [
        row
        for row in report["rows"]
        if "kernel" in row["results"].get(baseline, {}) and (tag is None or tag in row["tags"])
    ]
    names = [name for name in names if any("kernel" in row["results"].get(name, {}) for row in rows)]
    figure, axes = plt.subplots(figsize=(max(8, 0.7 * len(rows)), 5), layout="constrained")
    width = 0.8 / max(len(names), 1)
    for position, name in enumerate(names):
        speed = [
            row["results"][baseline]["kernel"]["median_us"] / row["results"][name]["kernel"]["median_us"]
            if "kernel" in row["results"].get(name, {})
            else 0.0
            for row in rows
        ]
        axes.bar(
            np.arange(len(rows)) + (position - (len(names) - 1) / 2) * width,
            speed,
            width,
            color=_COLORS.get(name),
            label=report["peers"][name]["title"],
        )
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks(
        range(len(rows)), [row["workload"] for row in rows], rotation=60, ha="right", fontsize="small"
    )
    axes.set(
        ylabel=f"speed over {report['peers'][baseline]['title']}" if rows else "",
        title=f"{tag}, {report['gpu']}" if tag else report["gpu"],
    )
    axes.legend(fontsize="small", ncols=4)
    return figure


def scaling(report: Mapping[str, Any]) -> plt.Figure:
    """What a step's time goes to, the mean of the devices of each row, and the efficiency of the rows."""
    figure, (times, efficiency) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rows = report["rows"]
    bottom = np.zeros(len(rows))
    of_rows = [mean_split(row) for row in rows]
    for part, color in STEP_PARTS.items():
        heights = np.array([each.get(part, 0.0) for each in of_rows]) / 1e3
        times.bar(range(len(rows)), heights, 0.7, bottom, color=color, label=_LABELS.get(part, part))
        bottom += heights
    medians = [row["median_us"] / 1e3 for row in rows]
    times.plot(range(len(rows)), medians, "k_", markersize=30, label="step, not profiled")
    times.set_xticks(range(len(rows)), [f"{row['precision']}\n{row['devices']}" for row in rows])
    times.set(xlabel="precision, GPUs", ylabel="ms", title=f"A training step, {report['gpu']}")
    times.set_ylim(top=1.35 * max(*bottom, *medians))  # room for the legend
    times.legend(fontsize="small", ncols=2, loc="upper left")
    for precision in dict.fromkeys(row["precision"] for row in rows):
        points = [(row["devices"], row["efficiency"]) for row in rows
                  if row["precision"] == precision and "efficiency" in row]
        efficiency.plot(*np.reshape(points, (-1, 2)).T, "o-", label=precision)
    efficiency.set(xlabel="GPUs", ylabel="time of one GPU over the time", ylim=(0, 1.1),
                   title="Weak scaling: the same work for each GPU")
    efficiency.set_xticks(sorted({row["devices"] for row in rows}))
    efficiency.grid(alpha=0.2)
    efficiency.legend()
    return figure


def render(report: Mapping[str, Any], folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """Writes the figures as PNG; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, figures = [], {"roofline": roofline}
    if report["kind"] == "scaling":
        figures = {"step": scaling}
    elif report["kind"] == "dense":
        figures["bars"] = bars
    else:
        tags = [tag for tag in GROUPED_FIGURES if any(tag in row["tags"] for row in report["rows"])]
        figures |= {f"{tag}-bars": functools.partial(bars, tag=tag) for tag in tags}
    for name, draw in figures.items():
        figure, path = draw(report), folder / f"{stem}-{name}.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
        paths.append(path)
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=pathlib.Path, nargs="*", help="JSON files of the three benchmarks")
    parser.add_argument(
        "--out", type=pathlib.Path, default=environment.RESULTS, help="folder for the figures"
    )
    arguments = parser.parse_args()
    found = [path for kind in KINDS for path in sorted(environment.RESULTS.glob(f"{kind}-*.json"))]
    for path in arguments.reports or found:
        for figure in render(environment.read(path, *KINDS), arguments.out, path.stem):
            print(figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
