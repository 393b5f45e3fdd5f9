"""How long device work takes: kernel time through CUPTI, wall time, sustained rate.

Kernel time comes from `torch.profiler`, which records every kernel of the process, JAX's too. Kernels carry
no mark of who launched them, so calls are told apart by order: before each call a buffer larger than L2 is
filled, which also evicts the operands, and whatever runs between two fills belongs to the call between them.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

FLUSH_BYTES = 512 << 20  # ten times an H200's L2
_ATTEMPTS = 3  # CUPTI can drop activities when its buffers run full


@dataclasses.dataclass(frozen=True)
class Call:
    """Device work to be timed.

    Attributes:
      run: enqueues it and returns its result.
      wait: takes that result and returns once it is there.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class Activity:
    """A kernel, copy or memset that ran on a device; times in nanoseconds."""

    name: str
    start: int
    end: int
    device: int = 0


@dataclasses.dataclass(frozen=True)
class Samples:
    """Times of one call, in microseconds, the kernels that it ran, and the median time of each.

    A kernel that runs several times in a call counts with its sum.
    """

    times: tuple[float, ...]
    kernels: tuple[str, ...] = ()
    kernel_times: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def iqr(self) -> float:
        """The distance between the quartiles; 0 for a single sample."""
        if len(self.times) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.times, n=4, method="inclusive")
        return third - first

    def summary(self) -> dict[str, Any]:
        """As it stands in the JSON files: microseconds, rounded to the nanosecond."""
        return {
            "median_us": round(self.median, 3),
            "min_us": round(min(self.times), 3),
            "iqr_us": round(self.iqr, 3),
            "samples_us": [round(t, 3) for t in self.times],
            "kernels": list(self.kernels),
        }


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers."""
    return statistics.geometric_mean(values)


def busy_time(activities: Sequence[Activity]) -> int:
    """Nanoseconds in which at least one of the activities ran: overlaps are not counted twice."""
    total, covered_until = 0, 0
    for activity in sorted(activities, key=lambda a: a.start):
        start = max(activity.start, covered_until)
        total += max(0, activity.end - start)
        covered_until = max(covered_until, activity.end)
    return total


def split_at(marker: str, activities: Iterable[Activity]) -> list[list[Activity]]:
    """The activities between each marker and the next, in order of time, without those before the first."""
    groups: list[list[Activity]] = []
    for activity in sorted(activities, key=lambda a: a.start):
        if activity.name == marker:
            groups.append([])
        elif groups:
            groups[-1].append(activity)
    return groups


def samples_of(runs: Sequence[Sequence[Activity]]) -> Samples:
    """The samples of one call, given what ran on the device in each of its runs."""
    kernels = tuple(activity.name for activity in runs[-1])
    time_of = lambda kernel, run: sum(a.end - a.start for a in run if a.name == kernel) / 1e3
    kernel_times = {kernel: statistics.median(time_of(kernel, run) for run in runs) for kernel in kernels}
    return Samples(tuple(busy_time(run) / 1e3 for run in runs), kernels, kernel_times)


def record(work: Callable[[], None]) -> list[Activity]:
    """Runs the work, to its end, and returns everything that ran on the devices meanwhile."""
    import torch
    from torch.autograd import DeviceType

    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        work()
        torch.cuda.synchronize()
    return [
        Activity(event.name(), event.start_ns(), event.start_ns() + event.duration_ns(), event.device_index())
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA
    ]


class KernelTimer:
    """Times calls by the kernels that they run, interleaved, each with a cold L2.

    Example:
      timer = KernelTimer()
      samples = timer({"ours": ours, "theirs": theirs}, repeats=20)
      samples["ours"].median
    """

    def __init__(self):
        import torch

        self._torch = torch
        self._buffer = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self._flush()
        # The longest activity of a fill is its kernel: its name marks the calls' borders.
        recorded = record(self._flush)
        if not recorded:
            raise RuntimeError("torch.profiler recorded no kernel: CUPTI cannot trace on this machine")
        self._marker = max(recorded, key=lambda a: a.end - a.start).name

    def _flush(self) -> None:
        self._buffer.fill_(1)
        self._torch.cuda.synchronize()

    def _run(self, call: Call) -> None:
        self._flush()
        call.wait(call.run())
        self._torch.cuda.synchronize()

    def __call__(self, calls: Mapping[str, Call], repeats: int = 20, warmups: int = 3) -> dict[str, Samples]:
        """Times every call `repeats` times, in an order that is shuffled anew for each repeat.

        Args:
          calls: what to time, by name.
          repeats: samples per call.
          warmups: untimed runs of each call before.

        Returns:
          The samples by name: for each run, the time in which at least one of its kernels was running.

        Raises:
          RuntimeError: the profiler did not record what was run, repeatedly.
        """
        for call in calls.values():
            for _ in range(warmups):
                call.wait(call.run())
        shuffle = random.Random(0)
        order = [name for _ in range(repeats) for name in shuffle.sample(list(calls), len(calls))]
        groups = self._groups([calls[name] for name in order])
        runs: dict[str, list[list[Activity]]] = {name: [] for name in calls}
        for name, group in zip(order, groups, strict=True):
            runs[name].append(group)
        return {name: samples_of(of_call) for name, of_call in runs.items()}

    def _groups(self, calls: Sequence[Call]) -> list[list[Activity]]:
        def work() -> None:
            for call in calls:
                self._run(call)

        for _ in range(_ATTEMPTS):
            groups = split_at(self._marker, record(work))
            if len(groups) == len(calls) and all(groups):
                return groups
        empty = sum(not group for group in groups)
        raise RuntimeError(
            f"torch.profiler: expected kernels of {len(calls)} calls, got {len(groups)} calls, "
            f"{empty} of them without a kernel"
        )


def wall_time(call: Call, runs: int = 10, repeats: int = 20) -> Samples:
    """Wall time of one run; `runs` are enqueued back to back, so that the device never waits for the host."""
    call.wait(call.run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(runs):
            result = call.run()
        call.wait(result)
        times.append((time.perf_counter() - start) / runs * 1e6)
    return Samples(tuple(times))


def sustained_time(call: Call, seconds: float = 2.0, chunk_seconds: float = 0.05) -> Samples:
    """Mean time of one run while the device works without a pause for `seconds`; one sample."""
    estimate = wall_time(call, runs=4, repeats=3).median / 1e6
    chunk = max(1, round(chunk_seconds / estimate))
    runs, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(chunk):
            result = call.run()
        call.wait(result)
        runs += chunk
    return Samples((elapsed / runs * 1e6,))
