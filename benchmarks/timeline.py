"""What the time of a device goes to, from the intervals in which its kernels ran."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.timing import Activity

Intervals = list[tuple[int, int]]  # disjoint, in order of time

# What a kernel does, by the first pattern that is found in its name. NCCL's kernels, and XLA's own between
# devices; products, whoever wrote them; this library's kernels around its products.
KINDS = {
    "communication": r"^nccl|AllReduceKernel|RaggedAllToAllKernel|PtoP",
    "quantize": r"^fp8_(quantize|permute|sort)",
    "gemm": r"gemm|nvjet|cutlass|xmma",
}
COMPUTE = ("gemm", "quantize", "other")
_TOP = 20


def kind_of(kernel: str) -> str:
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "other")


def union(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """When at least one of the intervals was under way."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def without(intervals: Intervals, others: Intervals) -> Intervals:
    """When one of the intervals was under way and none of the others."""
    rest: Intervals = []
    next_idx = 0  # of the first of the others that does not end before
    for start, end in intervals:
        while next_idx < len(others) and others[next_idx][1] <= start:
            next_idx += 1
        idx = next_idx
        while idx < len(others) and others[idx][0] < end:
            other_start, other_end = others[idx]
            if start < other_start:
                rest.append((start, other_start))
            start, idx = other_end, idx + 1
        if start < end:
            rest.append((start, end))
    return rest


def length(intervals: Intervals) -> int:
    return sum(end - start for start, end in intervals)


def split(activities: Sequence[Activity], steps: int) -> list[dict[str, Any]]:
    """What a step's time goes to on each device, in microseconds.

    Args:
      activities: of all devices, in `steps` equal steps one after the other.

    Returns:
      For each device, in order: `step`, from the first activity to the end of the last; its parts, which add
      up to it: `gemm`, `quantize`, `other`, `exposed` (communication while nothing is computed) and `idle`;
      and `communication`, all of it. Communication includes waiting for the other devices.
    """
    by_device = collections.defaultdict(list)
    for activity in activities:
        by_device[activity.device].append(activity)
    return [{"device": device, **_split_device(of_device, steps)}
            for device, of_device in sorted(by_device.items())]


def _split_device(activities, steps):
    of_kind = {kind: union((a.start, a.end) for a in activities if kind_of(a.name) == kind)
               for kind in ("communication", *COMPUTE)}
    nanoseconds, computed = {}, []
    for kind in COMPUTE:  # what runs beside a kind before it is that one's time
        nanoseconds[kind] = length(without(of_kind[kind], computed))
        computed = union([*computed, *of_kind[kind]])
    nanoseconds["exposed"] = length(without(of_kind["communication"], computed))
    whole = max(a.end for a in activities) - min(a.start for a in activities)
    nanoseconds["idle"] = whole - sum(nanoseconds.values())
    nanoseconds |= {"communication": length(of_kind["communication"]), "step": whole}
    return {part: round(time / steps / 1e3, 2) for part, time in nanoseconds.items()}


def mean_split(row: Mapping[str, Any]) -> dict[str, float]:
    """The mean over the devices of a row's `split`; empty where the kernels were not recorded."""
    of_devices = row["split"]
    return {part: sum(each[part] for each in of_devices) / len(of_devices)
            for part in (of_devices[0] if of_devices else ()) if part != "device"}


def longest_kernels(activities: Sequence[Activity], steps: int) -> dict[str, float]:
    """Microseconds of a step by kernel and kind, the mean of all devices, of those that take longest."""
    times: collections.Counter[str] = collections.Counter()
    for activity in activities:
        times[f"{kind_of(activity.name)}: {activity.name[:80]}"] += activity.end - activity.start
    devices = len({activity.device for activity in activities})
    return {name: round(time / steps / devices / 1e3, 2) for name, time in times.most_common(_TOP)}
