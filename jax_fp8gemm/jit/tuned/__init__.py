"""Measured winners: a JSON table per GPU, shipped in this folder, and the user's own in the cache folder's
`tuned/`.

A table is `{"device": …, "entries": [{"problem": …, "config": …, "microseconds": …}, …]}`, where problem
and config hold the fields of `GemmProblem` and `GemmConfig` that differ from their defaults. An entry serves
its own number of tokens (`tokens`) and, where no table has the exact one, every number of the same bucket
(`bucket`) with otherwise equal facts; among those the nearest counts, of tokens before groups. The user's
table goes before the shipped one, and that before those of GPUs with as many SMs of the same kind: an H100
gets the H200's winners where it has none of its own. An entry that is malformed, or illegal for the problem,
is ignored with a log line.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pathlib
import tempfile

import filelock

from jax_fp8gemm.jit import settings
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import KNOWN_DEVICES, Device
from jax_fp8gemm.jit.legal import rejection
from jax_fp8gemm.jit.problem import KINDS, RAGGED_K, TMA_ALIGNMENT, GemmProblem, round_up

logger = logging.getLogger(__name__)

SHIPPED, USER = "shipped table", "your table"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measurement: the fastest configuration of a problem, and its time."""

    problem: GemmProblem
    config: GemmConfig
    microseconds: float

    def to_json(self) -> dict:
        return {"problem": _set_fields(self.problem), "config": _set_fields(self.config),
                "microseconds": round(self.microseconds, 3)}

    @staticmethod
    def from_json(data: dict) -> Entry:
        config = GemmConfig(**data["config"])
        if any(type(value) not in (int, bool) for value in dataclasses.astuple(config)):
            raise TypeError(f"expected whole numbers in {data['config']}")
        return Entry(GemmProblem(**data["problem"]), config, float(data["microseconds"]))


def _set_fields(instance: GemmProblem | GemmConfig) -> dict:
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    defaults = {field.name: field.default for field in dataclasses.fields(instance)}
    return {name: value for name, value in values.items() if value != defaults[name]}


def tokens(problem: GemmProblem) -> int:
    """Tokens of a product, as far as they are known: its rows or, in a weight gradient, its K."""
    return problem.as_dense().k if problem.kind == RAGGED_K else problem.rows


def bucket(tokens: int) -> int:
    """The most tokens that share measurements: buckets of 8 up to 64, then four to each doubling."""
    step = max(8, 2 ** ((tokens - 1).bit_length() - 3))
    return round_up(tokens, step)


def _facts(problem: GemmProblem) -> GemmProblem:
    """What of a problem, tokens and groups aside, makes a difference in time.

    e5m2 takes as long as e4m3, and `batch_invariant` only makes entries with split-K illegal.
    """
    axis = "k" if problem.kind == RAGGED_K else "m"
    problem = dataclasses.replace(problem, lhs_dtype="e4m3", rhs_dtype="e4m3", batch_invariant=False,
                                  groups=1, expected_m=None, **{axis: TMA_ALIGNMENT})
    return problem if problem.batch > 1 else dataclasses.replace(problem, lhs_batched=True, rhs_batched=True)


def shipped_table(device: Device) -> pathlib.Path:
    return pathlib.Path(__file__).parent / f"{device.slug}.json"


def shipped_tables(device: Device) -> dict[str, pathlib.Path]:
    """The device's own shipped table, then those of GPUs that compute like it, by what they are called."""
    relatives = [d for d in KNOWN_DEVICES if d.name != device.name and d.computes_like(device)]
    return {SHIPPED: shipped_table(device)} | {
        f"{SHIPPED} of the {relative.name}": shipped_table(relative) for relative in relatives}


def user_table(device: Device) -> pathlib.Path | None:
    """The user's own table; None where there is no cache folder to keep it in."""
    folder = settings.cache_dir()
    return folder and folder / "tuned" / f"{device.slug}.json"


def load(path: pathlib.Path | None) -> tuple[Entry, ...]:
    """The entries of a table; none where there is no file, or no readable one."""
    try:
        status = path and os.stat(path)
    except OSError:
        return ()
    return _load(path, status.st_mtime_ns, status.st_size) if status else ()


@functools.lru_cache(maxsize=16)
def _load(path: pathlib.Path, mtime_ns: int, size: int) -> tuple[Entry, ...]:
    try:
        records = list(json.loads(path.read_text())["entries"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is not a table of measured configurations (%r): ignored", path, error)
        return ()
    entries = []
    for record in records:
        try:
            entries.append(Entry.from_json(record))
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: entry %s ignored: %r", path, record, error)
    return tuple(entries)


def find(problem: GemmProblem, device: Device) -> tuple[GemmConfig, str] | None:
    """The measured winner for `problem`, and the table that has it; None where there is none that is legal.

    A limited device has none: the winners were measured on all SMs. Winners that split K are none for a
    batch-invariant problem.
    """
    if device.is_limited:
        return None
    near, tables = [], {USER: user_table(device)} | shipped_tables(device)
    for order, (name, path) in enumerate(tables.items()):
        for entry in load(path):
            if problem.batch_invariant and entry.config.split_k > 1:
                continue
            given, measured = tokens(problem), tokens(entry.problem)
            if _facts(entry.problem) == _facts(problem) and bucket(measured) == bucket(given):
                distance = abs(measured - given), abs(entry.problem.groups - problem.groups)
                near.append(((distance > (0, 0), order, distance), entry.config, name))
    for _, config, name in sorted(near, key=lambda item: item[0]):
        reason = rejection(problem, config, device)
        if reason is None:
            return config, name
        logger.warning("%s: %s is illegal for %s: %s", name, config, problem, reason)
    return None


def add(path: pathlib.Path, device: Device, entries: list[Entry]) -> None:
    """Adds measurements on `device` to the table at `path`; the new replace the old of the same problem."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        merged = {entry.problem: entry for entry in (*load(path), *entries)}
        by_shape = lambda entry: (KINDS.index(entry.problem.kind), entry.problem.n, entry.problem.k,
                                  entry.problem.groups, tokens(entry.problem))
        _write(path, device, sorted(merged.values(), key=by_shape))


def _write(path: pathlib.Path, device: Device, entries: list[Entry]) -> None:
    lines = ",\n    ".join(json.dumps(entry.to_json()) for entry in entries)
    text = f'{{\n  "device": {json.dumps(device.name)},\n  "entries": [\n    {lines}\n  ]\n}}\n'
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)
