"""Writes a table of the README from the results of a benchmark, between its two markers.

python -m benchmarks.readme_table                          # the dense result in benchmarks/results
python -m benchmarks.readme_table benchmarks/results/grouped-nvidia-h200.json
python -m benchmarks.readme_table benchmarks/results/scaling-nvidia-h100-80gb-hbm3.json
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks import environment
from benchmarks.timeline import mean_split

README = pathlib.Path(__file__).parents[1] / "README.md"
_OURS = "fp8_gemm"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a table shows.

    Attributes:
      sizes: titles of the columns that say what a row is.
      times: titles of the peers' times.
      ratios: titles of our speed over peers.
      tags: rows that the table has, and how a mean of them is called.
    """

    sizes: tuple[str, ...]
    times: Mapping[str, str]
    ratios: Mapping[str, str]
    tags: Mapping[str, str]


LAYOUTS = {
    "dense": Layout(
        sizes=("M", "N", "K"),
        times={
            "fp8_gemm": "jax_fp8gemm us",
            "deepgemm": "DeepGEMM us",
            "cublaslt_block": "cuBLASLt us",
            "cutlass_block": "CUTLASS us",
            "jnp_bf16": "`jnp.dot` bf16 us",
        },
        ratios={"deepgemm": "over DeepGEMM", "jnp_bf16": "over bf16"},
        tags={"dense": "Geometric mean"},
    ),
    "grouped": Layout(
        sizes=("kind", "groups x tokens", "M", "N", "K"),
        times={
            "fp8_gemm": "jax_fp8gemm us",
            "deepgemm": "DeepGEMM us",
            "deepgemm_padding": "with its padding us",
            "tokamax_bf16": "tokamax bf16 us",
            "ragged_dot_bf16": "`lax.ragged_dot` bf16 us",
        },
        ratios={
            "deepgemm": "over DeepGEMM",
            "deepgemm_padding": "with its padding",
            "tokamax_bf16": "over tokamax",
            "ragged_dot_bf16": "over `ragged_dot`",
        },
        tags={
            "contiguous": "Ragged M, thousands of tokens a group",
            "masked": "Masked",
            "ragged_k": "Ragged K",
            "small_experts": "Ragged M, small groups",
        },
    ),
}


_BF16_TITLES = {"bf16": "`jnp.dot`", "ragged_dot": "`lax.ragged_dot`", "tokamax": "tokamax"}
KINDS = (*LAYOUTS, "training", "scaling")


def markers(kind: str) -> tuple[str, str]:
    """The lines of the README between which the table of a kind stands."""
    name = "benchmark" if kind == "dense" else f"benchmark:{kind}"
    return f"<!-- {name}:start -->", f"<!-- {name}:end -->"


def _kernel(row: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return row["results"].get(name, {}).get("kernel")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _size(row: Mapping[str, Any], title: str) -> str:
    if title == "kind":
        return row["kind"]
    if title == "groups x tokens":
        sizes = row["group_sizes"]
        exactly = "" if len(set(sizes)) == 1 else "~"
        return f"{len(sizes)} x {exactly}{round(sum(sizes) / len(sizes))}"
    if title == "M" and row.get("kind") in ("ragged_m", "masked"):
        return ""
    if title == "K" and row.get("kind") == "ragged_k":
        return ""
    return str(row[title.lower()])


def _row(row: Mapping[str, Any], layout: Layout) -> str:
    ours = _kernel(row, _OURS)
    cells = [_size(row, title) for title in layout.sizes]
    cells += [f"{found['median_us']:.1f}" if (found := _kernel(row, name)) else "-" for name in layout.times]
    cells += [f"{ours['tflops']:.0f}", f"{ours['gb_per_s']:.0f}"]
    ratios = row["speedup"].get("kernel", {})
    cells += [f"{ratios[name]:.2f}x" if name in ratios else "-" for name in layout.ratios]
    return _line(cells)


def _versions(report: Mapping[str, Any]) -> str:
    found = report["versions"]
    names = {
        "jax": "JAX",
        "torch": "PyTorch",
        "deep_gemm": "DeepGEMM",
        "tokenspeed-deepgemm": "DeepGEMM",
        "nvidia-cutlass": "CUTLASS",
    }
    return ", ".join(f"{title} {found[name]}" for name, title in names.items() if name in found)


def table(report: Mapping[str, Any]) -> str:
    """The table in Markdown, without the markers: the same text for the same report.

    Raises:
      ValueError: the report has no row with kernel times for the table.
    """
    others = {"training": training_table, "scaling": scaling_table}
    return others.get(report["kind"], gemm_table)(report)


def training_table(report: Mapping[str, Any]) -> str:
    """Forward and backward of layers, with the share of quantisation, against the best that bf16 reaches."""
    columns = ("layer", "jax_fp8gemm us", "of it GEMMs us", "quantisation us", "with prepared weights us",
               "best bf16 us", "by", "over it", "with prepared weights")
    lines = [_head(report), "", _line([*columns]), "|" + "---:|" * len(columns)]
    lines += [_training_row(row) for row in report["rows"]]
    return "\n".join(lines) + "\n"


def _training_row(row: Mapping[str, Any]) -> str:
    results, speedup = row["results"], row["speedup_over_best_bf16"]
    parts = results["fp8"]["parts_us"]
    times = {name: found["median_us"] for name, found in results.items()}
    best = min(times.keys() & _BF16_TITLES.keys(), key=times.get, default=None)
    return _line([
        row["workload"],
        f"{times['fp8']:.0f}",
        f"{parts['gemm']:.0f}",
        f"{parts['quantize']:.0f} ({parts['quantize'] / sum(parts.values()):.0%})",
        f"{times['fp8_prepared']:.0f}",
        *((f"{times[best]:.0f}", _BF16_TITLES[best]) if best else ("-", "-")),
        *(f"{speedup[name]:.2f}x" if best else "-" for name in ("fp8", "fp8_prepared")),
    ])


def scaling_table(report: Mapping[str, Any]) -> str:
    """Steps of training on several GPUs, and what their time goes to; of that the mean of the GPUs."""
    parts = {"gemm": "GEMMs", "quantize": "quantisation", "other": "other kernels",
             "exposed": "exposed communication", "idle": "idle", "communication": "communication"}
    columns = ("precision", "GPUs", "step ms", "tokens/s and GPU", "efficiency", *parts.values())
    lines = [f"{_machine(report)} Wall time, median of {report['repeats']} samples of {report['steps']} "
             "steps; its parts, ms, from profiled steps, the mean of the GPUs.",
             "", _line([*columns]), "|" + "---:|" * len(columns)]
    for row in report["rows"]:
        split = mean_split(row)
        lines.append(_line([
            row["precision"], str(row["devices"]), f"{row['median_us'] / 1e3:.1f}",
            f"{row['tokens_per_s_per_device']:,.0f}",
            f"{row['efficiency']:.1%}" if "efficiency" in row else "-",
            *(f"{split[part] / 1e3:.1f}" if split else "-" for part in parts)]))
    return "\n".join(lines) + "\n"


def gemm_table(report: Mapping[str, Any]) -> str:
    """GEMMs of one kind against their peers."""
    layout = LAYOUTS[report["kind"]]
    rows = [row for row in report["rows"] if layout.tags.keys() & set(row["tags"]) and _kernel(row, _OURS)]
    if not rows:
        tags = " or ".join(map(repr, layout.tags))
        raise ValueError(f"report: expected {tags} rows with kernel times of {_OURS}, got none")
    header = [*layout.sizes, *layout.times.values(), "TFLOPS", "GB/s", *layout.ratios.values()]
    lines = [
        _head(report),
        "",
        _line(header),
        "|" + "---:|" * len(header),
        *(_row(row, layout) for row in rows),
        "",
        *_means(report, layout),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _head(report: Mapping[str, Any]) -> str:
    return (f"{_machine(report)} "
            f"Kernel time, cold L2, median of {report['repeats']} interleaved runs in one process.")


def _machine(report: Mapping[str, Any]) -> str:
    return f"{report['gpu']}, driver {report['driver']}, {_versions(report)}, {report['date'][:10]}."


def _means(report: Mapping[str, Any], layout: Layout) -> list[str]:
    lines = []
    for tag, title in layout.tags.items():
        means = report["geometric_means"].get(tag, {})
        found = [
            f"{means[name]['mean']:.2f}x {ratio} (worst row {means[name]['min']:.2f}x)"
            for name, ratio in layout.ratios.items()
            if name in means
        ]
        if found:
            lines += [f"{title}: {', '.join(found)}.", ""]
    return lines


def insert(readme: str, text: str, kind: str = "dense") -> str:
    """The README with `text` in place of what stood between the markers.

    Raises:
      ValueError: the README does not have each marker once, in order.
    """
    first, last = markers(kind)
    start, end = readme.find(first), readme.find(last)
    if not 0 <= start < end or readme.count(first) != 1 or readme.count(last) != 1:
        raise ValueError(f"README: expected one {first} followed by one {last}")
    return f"{readme[: start + len(first)]}\n{text}{readme[end:]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme_table", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "report",
        type=pathlib.Path,
        nargs="?",
        default=environment.RESULTS / "dense-nvidia-h200.json",
        help="JSON file of bench_dense, bench_grouped, bench_training or bench_scaling",
    )
    parser.add_argument("--readme", type=pathlib.Path, default=README)
    arguments = parser.parse_args()
    report = environment.read(arguments.report, *KINDS)
    arguments.readme.write_text(insert(arguments.readme.read_text(), table(report), report["kind"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
