"""Compares runs in FP8 with those in bf16 of the same seeds: how far apart their losses are, and their speed.

    python -m examples.deepseek.compare runs/small --out docs
    python -m examples.deepseek.compare --identical runs/whole/fp8-0 runs/resumed/fp8-0

The first prints a table and a verdict; its exit status is 0 if FP8's smoothed loss stays within the limit of
bf16's, for every seed. `--out` gets the report (training.json), the figure (training.png), and the table in
training.md, between its markers where there is such a page. The status of the second is 0 if two runs have
the same bits.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from examples.deepseek import log, plot
from examples.deepseek.precision import PRECISIONS
from examples.deepseek.report import LIMIT, make_report

MARKERS = "<!-- training:start -->", "<!-- training:end -->"
_NAME = "training"


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
        pair = [by_key[seed, precision] for precision in PRECISIONS]
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


def insert(page: str, text: str, markers: tuple[str, str] = MARKERS) -> str:
    """The page with `text` in place of what stood between the markers.

    Raises:
      ValueError: the page does not have each marker once, in order.
    """
    first, last = markers
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


def write(folder: pathlib.Path, found: dict[str, Any]) -> None:
    """Report, figure and page; a page that is there keeps what is around its table."""
    folder.mkdir(parents=True, exist_ok=True)
    report, figure, page = (folder / f"{_NAME}.{suffix}" for suffix in ("json", "png", "md"))
    report.write_text(json.dumps(found) + "\n")
    plot.save(found, figure)
    text = page.read_text() if page.exists() else "\n".join(MARKERS) + "\n"
    shown = f"{table(found)}\n![Losses, their difference, speed, balance of the experts]({figure.name})\n"
    page.write_text(insert(text, shown))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.deepseek.compare",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=pathlib.Path, nargs="?", help="the --out of train.py")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="write report, figure, page")
    parser.add_argument("--window", type=int, help="steps to smooth over; 200, less for short runs")
    parser.add_argument("--limit", type=float, default=LIMIT, help="of the relative difference")
    parser.add_argument("--identical", type=pathlib.Path, nargs=2, metavar="RUN", help="two folders of runs")
    args = parser.parse_args(arguments)
    if (args.runs is None) == (args.identical is None):
        parser.error("expected either the folder of runs or --identical")
    if args.identical:
        difference = first_difference(*args.identical)
        print("identical" if difference is None else f"different: {difference}")
        return int(difference is not None)
    found = make_report(args.runs, window=args.window, limit=args.limit)
    if args.out:
        write(args.out, found)
    print(table(found))
    return int(not found["within"])


if __name__ == "__main__":
    raise SystemExit(main())
