"""The record of a run, a folder with two files: what it is, and one line of JSON for every step."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, TextIO

import numpy as np

from examples.deepseek.config import Config

_RUN, _STEPS = "run.json", "log.jsonl"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it was recorded.

    Attributes:
      identity: precision, seed, configuration, text: runs of the same identity are the same run.
      environment: the device and the versions of what ran on it.
      steps: one dict for each step, in order; see `append`.
    """

    identity: dict[str, Any]
    environment: dict[str, Any]
    steps: list[dict[str, Any]]

    def column(self, name: str) -> np.ndarray:
        """One value of every step."""
        return np.array([step[name] for step in self.steps])


def read(folder: pathlib.Path) -> Run:
    about = _read_about(folder)
    return Run(about["identity"], about["environment"], _read_steps(folder))


def exists(folder: pathlib.Path) -> bool:
    return (folder / _RUN).exists()


def begin(folder: pathlib.Path, identity: dict[str, Any], environment: dict[str, Any]) -> None:
    """Starts the record of a new run."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"identity": identity, "environment": environment}
    (folder / _RUN).write_text(json.dumps(about, indent=2) + "\n")
    (folder / _STEPS).write_text("")


def check_identity(folder: pathlib.Path, identity: dict[str, Any]) -> None:
    """Raises ValueError where the run in the folder is another one."""
    recorded = _read_about(folder)["identity"]
    # Through JSON, as what was recorded.
    if wrong := differences(recorded, json.loads(json.dumps(identity))):
        raise ValueError(f"{folder}: expected to resume the same run, got other {', '.join(wrong)}")


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names of values that are not equal, as "config.batch: 4, 8"."""
    found = []
    for name in sorted(a.keys() | b.keys()):
        mine, others = a.get(name), b.get(name)
        if isinstance(mine, dict) and isinstance(others, dict):
            found += [f"{name}.{inner}" for inner in differences(mine, others)]
        elif mine != others:
            found.append(f"{name}: {mine}, {others}")
    return found


def last_step(folder: pathlib.Path) -> int:
    """Steps that the record has."""
    return len(_read_steps(folder))


def cut(folder: pathlib.Path, num_steps: int) -> None:
    """Keeps the first steps only: those after a checkpoint are going to be taken again."""
    lines = (folder / _STEPS).read_text().splitlines(keepends=True)
    if len(lines) < num_steps:
        raise ValueError(f"{folder}: expected the {num_steps} steps of the checkpoint, got {len(lines)}")
    (folder / _STEPS).write_text("".join(lines[:num_steps]))


def open_steps(folder: pathlib.Path) -> TextIO:
    return (folder / _STEPS).open("a")


def append(file: TextIO, step: dict[str, Any]) -> None:
    """Writes one step.

    It has `step` from 1 on, `loss`, `gradient_norm`, `load` (tokens of each expert, by layer), `dropped`
    (what of it found no room, by layer), `seconds` and
    `tokens_per_s`; some also `validation_loss` and `digest`, the checksum of the state after the step.
    """
    file.write(json.dumps(step) + "\n")
    file.flush()


def _read_about(folder):
    """What a configuration did not have yet when it was recorded has its default."""
    about = json.loads((folder / _RUN).read_text())
    since = {field.name: field.default for field in dataclasses.fields(Config)
             if field.default is not dataclasses.MISSING}
    about["identity"]["config"] = since | about["identity"]["config"]
    return about


def _read_steps(folder):
    lines = (folder / _STEPS).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a run may end inside of a line
