"""What the compiled program communicates: the collectives in XLA's text, and what its loops carry.

That text numbers devices and names no axis of the mesh: axes are found by the devices of a group.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
         "collective-broadcast", "ragged-all-to-all")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s32": 4,
              "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(.*")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_LIMIT = re.compile(r"(%[\w.\-]+) = s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One collective, in all calls of one step.

    Attributes:
      kind: of `KINDS`.
      dtype: as XLA writes it.
      elements: of the whole array: once it is gathered, before it is scattered, that is summed or exchanged.
      axes: names of the mesh axes that the devices of a group differ in, sorted.
      devices: of a group.
      times: that a step runs it.
    """

    kind: str
    dtype: str
    elements: int
    axes: tuple[str, ...]
    devices: int
    times: int

    @property
    def bytes(self) -> int:
        """Of the whole arrays of a step."""
        return self.times * self.elements * ITEM_BYTES[self.dtype]

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step: a sum goes around twice, to be added up and to be told."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.devices - 1) / self.devices


class Found(NamedTuple):
    """A collective of a program, and the operation that it was made for, as JAX wrote it."""

    traffic: Traffic
    source: str


class Loop(NamedTuple):
    """A loop of the program's entry: how often it runs, and the dtype and shape of each array it carries."""

    trips: int
    arrays: list[tuple[str, tuple[int, ...]]]

    @property
    def stacked_bytes(self) -> int:
        """Of the arrays that have a slice for each trip."""
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in self.arrays
                   if shape and shape[0] == self.trips)


def read(text: str, mesh: Mapping[str, int]) -> list[Found]:
    """The collectives of a program's text that move anything: those among one device are left out.

    Args:
      text: of the HLO module, after it was partitioned.
      mesh: sizes of the axes, in the order in which devices are numbered.

    Raises:
      ValueError: an instruction is written in a way that is not known.
    """
    computations = _split(text)
    found = []
    for name, times in _times(computations).items():
        for line in computations[name]:
            if match := _COLLECTIVE.search(line):
                found += _read_line(line, *match.groups(), times, mesh)
    return found


def _read_line(line, result, kind, times, mesh) -> Iterator[Found]:
    devices = first_group(line, math.prod(mesh.values()))
    if len(devices) == 1:
        return
    coordinates = np.unravel_index(devices, tuple(mesh.values()))
    axes = tuple(sorted(
        axis for axis, index in zip(mesh, coordinates, strict=True) if len(set(index.tolist())) > 1))
    if math.prod(mesh[axis] for axis in axes) != len(devices):
        raise ValueError(f"collectives: expected groups along whole axes of {dict(mesh)}, got {devices} in "
                         f"{line.strip()}")
    source = re.search(r'op_name="([^"]*)"', line)
    arrays = _arrays(result)
    if kind == "all-to-all":  # its result is a block from each device
        arrays = [(arrays[0][0], (len(arrays), *arrays[0][1]))]
    for dtype, shape in arrays:
        elements = math.prod(shape) * (len(devices) if kind == "reduce-scatter" else 1)
        yield Found(Traffic(kind, dtype, elements, axes, len(devices), times),
                    source.group(1) if source else "")


def loops(text: str) -> list[Loop]:
    """The loops of a program's entry, in order."""
    computations = _split(text)
    found = []
    for line in computations["ENTRY"]:
        if match := _WHILE.search(line):
            found.append(Loop(_trips(computations[match.group(1)]), _arrays(line.partition(" while(")[0])))
    return found


def _arrays(text):
    return [(dtype, tuple(int(size) for size in shape.split(",") if size))
            for dtype, shape in _ARRAY.findall(text) if dtype in ITEM_BYTES]


def first_group(line: str, count: int) -> list[int]:
    """The devices of the first group of `replica_groups`, which XLA writes in three ways.

        {{0,1},{2,3}}    [2,4]<=[4,2]T(1,0)    mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
    """
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(device) for device in match.group(1).split(",")]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return _iota(match.group(2)).reshape(_ints(match.group(1)))[0].tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]+)\))? \{([^}]*)\}", line):
        axes, order, names = match.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        devices = (_iota(order) if order else np.arange(count)).reshape(tuple(sizes.values()))
        varying = re.findall(r"'(\w+)'", names)
        if ":" not in names:  # of an axis that is taken in parts
            return devices[tuple(slice(None) if name in varying else 0 for name in sizes)].ravel().tolist()
    raise ValueError(f"collectives: expected replica_groups, got {line.strip()}")


def _iota(text):
    """[4,2]T(1,0): the numbers from 0 in this shape, transposed."""
    shape, *order = re.findall(r"[\[(]([\d,]+)[\])]", text)
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return (numbers.transpose(_ints(order[0])) if order else numbers).ravel()


def _ints(text):
    return tuple(int(number) for number in text.split(","))


def _split(text):
    """The lines of each computation; the entry's name is ENTRY."""
    computations, lines = {}, []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations["ENTRY" if line.startswith("ENTRY") else match.group(1)] = []
        else:
            lines.append(line)
    return computations


def _times(computations):
    """How often each computation runs: loops are those of `lax.scan`, which count from 0 to a constant."""
    times = {}

    def visit(name, count):
        times[name] = times.get(name, 0) + count
        for line in computations[name]:
            if match := _WHILE.search(line):
                condition, body = match.groups()
                if _communicates(computations, body):
                    visit(body, count * _trips(computations[condition]))
            elif _COLLECTIVE.search(line) is None:
                for called in _CALLED.findall(line):
                    visit(called, count)

    visit("ENTRY", 1)
    return times


def _communicates(computations, name):
    lines = computations[name]
    called = [match.group(2) for line in lines if (match := _WHILE.search(line))]
    called += [each for line in lines for each in _CALLED.findall(line)]
    return any(map(_COLLECTIVE.search, lines)) or any(_communicates(computations, each) for each in called)


def _trips(condition):
    limits = dict(_LIMIT.findall("\n".join(condition)))
    root = next(line for line in condition if "ROOT" in line)
    found = [limit for name, limit in limits.items() if re.search(rf"{re.escape(name)}\b", root)]
    if "direction=LT" not in root or len(found) != 1:
        raise ValueError(f"collectives: expected a loop that counts up to a constant, got {root.strip()}")
    return int(found[0])
