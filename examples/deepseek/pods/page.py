"""The page docs/pods.md: its tables and its figure, from what was compiled and from the prediction."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from examples.deepseek import config as configs
from examples.deepseek.compare import insert
from examples.deepseek.config import Config
from examples.deepseek.pods import expected, predict
from examples.deepseek.pods.predict import Rates, Step

MARKERS = "<!-- pods:start -->", "<!-- pods:end -->"
_GB = 1e9
_BARS = {  # fields of Step
    "compute": ("computing", "#30638e"),
    "nvlink": ("NVLink", "#8d96a3"),
    "network": ("network", "#d1495b"),
    "serial": ("step, if nothing overlaps", "#edae49"),
}


class Change(NamedTuple):
    """What is to be different in a prediction: sizes, and the arguments of `predict`."""

    title: str
    sizes: dict[str, Any]
    arguments: dict[str, Any]


# One after the other, each with those before it.
CHANGES = (
    Change("as compiled", {}, {}),
    Change("room for 1.25 times the mean, not 2", {"capacity_factor": 1.25}, {}),
    Change("sums from experts in FP8", {}, {"sums_in_fp8": True}),
    Change("four sequences a device", {"sequences": 4}, {}),
    Change("devices of `expert` in one node, and a token on at most 4 nodes", {},
           {"nearest": "expert", "nodes_of_token": 4}),
)


def pod_config(data: int, expert: int, sequences: int = 1, **sizes: Any) -> Config:
    """DeepSeek-V3 with so many sequences on each device."""
    return configs.load("v3", {"batch": sequences * data * expert, **sizes})


def tables(report: dict[str, Any], rates: Rates) -> str:
    """All tables in Markdown: the same text for the same report and rates."""
    meshes = [(mesh["data"], mesh["expert"]) for mesh in report["meshes"]]
    return "\n".join([
        f"Compiled with JAX {report['jax']} on {report['date']}, for one sequence of 4096 tokens a device.",
        "", "### Bytes that travel", "",
        "GB of whole arrays, a device and step: gathered, before they are scattered, summed up, exchanged.",
        "", *_traffic_table(report), "",
        "### Memory", "", "GB on each device, where an H100 has 80 and an H200 141.", "",
        *_memory_table(report), "",
        "### Time", "", "Seconds of a step, and thousands of tokens a second and GPU.", "",
        *_time_table(meshes, rates), "",
        "### What a step computes", "", "Seconds on each device of the largest mesh.", "",
        *_compute_table(*meshes[-1], rates), "",
        "### What would have to change", "", "On the largest mesh; a row has the changes of those above.", "",
        *_changes_table(*meshes[-1], rates), ""])


def _table(titles, rows):
    return [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1),
            *(f"| {' | '.join(row)} |" for row in rows)]


def _traffic_table(report):
    purposes = list(report["meshes"][0]["bytes"])
    titles = ["data x expert", *purposes]
    return _table(titles, [[_name(mesh), *(f"{mesh['bytes'][purpose] / _GB:.1f}" for purpose in purposes)]
                           for mesh in report["meshes"]])


def _name(mesh):
    return f"{mesh['data']} x {mesh['expert']}"


def _memory_table(report):
    rows = []
    for mesh in report["meshes"]:
        state, kept = mesh["state"] / _GB, sum(mesh["kept"].values()) / _GB
        gradients = mesh["state"] / expected.STATE_BYTES_OF_A_PARAMETER * 4 / _GB
        sizes = mesh["data"], mesh["expert"]
        products = expected.expert_products_bytes(pod_config(*sizes), *sizes) / _GB
        numbers = state, gradients, kept, state + gradients + kept, products
        rows.append([_name(mesh), *(f"{number:.0f}" for number in numbers)])
    return _table(["data x expert", "master weights and moments", "gradients", "kept for the backward pass",
                   "sum", "experts' products, computed again"], rows)


def _time_table(meshes, rates):
    steps = [predict.predict(pod_config(*mesh), *mesh, rates) for mesh in meshes]
    rows = []
    for (data, expert), step in zip(meshes, steps, strict=True):
        bounds = step.serial, step.overlapped
        first = steps[0].serial, steps[0].overlapped
        rows.append([
            f"{data} x {expert}", f"{step.compute:.2f}", f"{step.nvlink:.2f}", f"{step.network:.2f}",
            _both(bounds, "{:.2f}"), _both([step.tokens / each / 1e3 for each in bounds], "{:.2f}"),
            _both([_mfu(data, expert, step.tokens, each) for each in bounds], "{:.1%}"),
            _both([one / each for one, each in zip(first, bounds, strict=True)], "{:.0%}")])
    return _table(["data x expert", "computing", "NVLink", "network", "step: nothing / everything overlaps",
                   "thousand tokens/s", "of FP8 peak", "of the first mesh's speed"], rows)


def _both(bounds, form):
    return " / ".join(form.format(each) for each in bounds)


def _mfu(data, expert, tokens, seconds):
    return tokens * predict.model_flops(pod_config(data, expert)) / seconds / predict.PEAK_FLOPS


def _compute_table(data, expert, rates):
    seconds = predict.compute_seconds(pod_config(data, expert), data, expert, rates)
    titles = {"dense": "dense products, FP8", "experts": "experts' products, FP8", "bf16": "embedding, head",
              "attention": "between tokens", "f32": "router"}
    return _table(["", *(titles.get(name, name) for name in seconds)],
                  [["seconds", *(f"{each:.2f}" for each in seconds.values())]])


def changed_steps(data: int, expert: int, rates: Rates) -> dict[str, Step]:
    """The prediction with the changes, by their titles."""
    sizes, arguments, steps = {}, {}, {}
    for change in CHANGES:
        sizes, arguments = sizes | change.sizes, arguments | change.arguments
        config = pod_config(data, expert, **sizes)
        steps[change.title] = predict.predict(config, data, expert, rates, **arguments)
    return steps


def _changes_table(data, expert, rates):
    rows = []
    for title, step in changed_steps(data, expert, rates).items():
        bounds = step.serial, step.overlapped
        rows.append([title, f"{step.compute:.2f}", f"{step.network:.2f}", _both(bounds, "{:.2f}"),
                     _both([step.tokens / each / 1e3 for each in bounds], "{:.2f}"),
                     _both([_mfu(data, expert, step.tokens, each) for each in bounds], "{:.1%}")])
    return _table(["", "computing", "network", "step: nothing / everything overlaps", "thousand tokens/s",
                   "of FP8 peak"], rows)


def draw(report: dict[str, Any], rates: Rates) -> plt.Figure:
    """Seconds of each mesh: what is computed, and what travels, by the link."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    names = [_name(mesh) for mesh in report["meshes"]]
    steps = [predict.predict(pod_config(mesh["data"], mesh["expert"]), mesh["data"], mesh["expert"], rates)
             for mesh in report["meshes"]]
    for offset, (field, (title, color)) in enumerate(_BARS.items()):
        axes.bar([position + 0.2 * (offset - 1.5) for position in range(len(names))],
                 [getattr(step, field) for step in steps], 0.2, label=title, color=color)
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="data x expert", ylabel="seconds a step",
             title="DeepSeek-V3, 4096 tokens a device, predicted")
    axes.legend()
    axes.grid(axis="y", alpha=0.2)
    return figure


def write(folder: pathlib.Path, report: dict[str, Any]) -> None:
    """Tables and figure into DIR/pods.md and DIR/pods.png."""
    rates = predict.read_rates()
    figure = draw(report, rates)
    figure.savefig(folder / "pods.png", dpi=130)
    plt.close(figure)
    page = folder / "pods.md"
    page.write_text(insert(page.read_text(), tables(report, rates), MARKERS))
