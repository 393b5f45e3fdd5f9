"""Where and when a measurement was made: what stands at the top of every JSON file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
from typing import Any

COMMIT = "BENCHMARK_COMMIT"  # environment variable: the commit, for a copy of the checkout without history
SCHEMA = 1  # of the JSON files; a change that old readers misread counts it up
RESULTS = pathlib.Path(__file__).parent / "results"
_PACKAGES = (
    "jax_fp8gemm",
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "tokamax",
    "torch",
    "triton",
    "deep_gemm",
    "tokenspeed-deepgemm",
    "nvidia-cutlass",
    "nvidia-cublas",
    "nvidia-cuda-nvrtc",
    "numpy",
)


def _output(*command: str) -> str:
    """A command's first line of output, empty where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True, cwd=pathlib.Path(__file__).parent
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    if commit := os.environ.get(COMMIT):
        return commit
    commit = _output("git", "rev-parse", "HEAD")
    changed = "+changes" if commit and _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    return commit + changed or "unknown"


def describe(kind: str) -> dict[str, Any]:
    """The head of a JSON file: kind of benchmark, date, GPU, driver, versions, commit."""
    gpu, _, driver = _output(
        "nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"
    ).partition(", ")
    return {
        "schema": SCHEMA,
        "kind": kind,
        "complete": False,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": gpu or "none",
        "driver": driver or "none",
        "versions": _versions(),
        "commit": _commit(),
    }


def write(path: pathlib.Path, report: dict[str, Any]) -> None:
    """Replaces the file in one step, so that no reader sees half of it; lists of numbers take one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    text = re.sub(
        r"\[[-\d.,\s]+\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(report, indent=1)
    )
    partial.write_text(text + "\n")
    partial.replace(path)


def result_path(report: dict[str, Any]) -> pathlib.Path:
    """Where a report is kept: one file per kind of benchmark and GPU."""
    return RESULTS / f"{report['kind']}-{report['gpu'].lower().replace(' ', '-')}.json"


def read(path: pathlib.Path, *kinds: str) -> dict[str, Any]:
    """A report of a benchmark.

    Raises:
      ValueError: the file is of none of these kinds, or of another schema.
    """
    report = json.loads(path.read_text())
    found = report.get("kind"), report.get("schema")
    if found not in [(kind, SCHEMA) for kind in kinds]:
        kind = " or ".join(map(repr, kinds))
        raise ValueError(f"{path}: expected a report of kind {kind} with schema {SCHEMA}, got {found}")
    return report
