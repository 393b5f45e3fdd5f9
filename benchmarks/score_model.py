"""How good is the cost model's choice? Compares it with measured times; needs no GPU.

    python -m benchmarks.score_model benchmarks/results/2026-11-21-sweep-h200.json.gz
    python -m benchmarks.sweep --tags decode prefill --top 200 --out sweep.json
    python -m benchmarks.score_model sweep.json --limit 20

For each problem of a sweep it prints the time of the model's choice over that of the fastest configuration:
among all that were measured, and among the model's own candidates (`choose.ranked`), of which the first that
was measured counts; the second figure sees what the candidates miss, too. Then come the problems with the
worst choices. Whoever changes `jit/cost.py` or `jit/choose.py` runs this before and after.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import pathlib
import statistics

from jax_fp8gemm.jit.choose import ranked
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.cost import cost
from jax_fp8gemm.jit.device import Device, find_device
from jax_fp8gemm.jit.legal import rejection
from jax_fp8gemm.jit.problem import GemmProblem, ceil_div


@dataclasses.dataclass(frozen=True)
class Score:
    """What the model made of one problem.

    Attributes:
      fastest: the fastest configuration, and its microseconds.
      choice: the model's choice among the measured configurations, and its microseconds.
      candidate: the first of the model's candidates that was measured, and its microseconds; None where none
        was.
      rank: its place among the candidates; those before it were not measured.
    """

    problem: GemmProblem
    fastest: tuple[GemmConfig, float]
    choice: tuple[GemmConfig, float]
    candidate: tuple[GemmConfig, float] | None
    rank: int | None

    @property
    def choice_ratio(self) -> float:
        return self.choice[1] / self.fastest[1]

    @property
    def candidate_ratio(self) -> float | None:
        return self.candidate and self.candidate[1] / self.fastest[1]


def read(path: pathlib.Path) -> tuple[Device, dict[GemmProblem, dict[GemmConfig, float]]]:
    """The device and the microseconds of a sweep (`sweep --out`), which may be compressed with gzip."""
    data = path.read_bytes()
    sweep = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    device, times = find_device(sweep["device"]), {}
    for entry in sweep["problems"]:
        problem, microseconds = GemmProblem(**entry["problem"]), {}
        for row in entry["rows"]:
            if "config" in row and "median_us" in row:
                config = as_it_runs(problem, GemmConfig(**row["config"]))
                if rejection(problem, config, device) is None:
                    microseconds[config] = min(row["median_us"], microseconds.get(config, float("inf")))
        if microseconds:
            times[problem] = microseconds
    return device, times


def as_it_runs(problem: GemmProblem, config: GemmConfig) -> GemmConfig:
    """`config` without differences that this problem does not see: bands beyond M; split-K has neither bands
    nor output buffers."""
    if config.split_k > 1:
        return dataclasses.replace(config, raster_group=1, out_buffers=2)
    tiles_m = ceil_div(problem.m, config.block_m * config.cluster_m)
    return dataclasses.replace(config, raster_group=min(config.raster_group, tiles_m))


def score(problem: GemmProblem, times: dict[GemmConfig, float], device: Device) -> Score:
    """Scores the model on one problem, given the microseconds of its measured configurations."""
    fastest = min(times, key=times.__getitem__)
    choice = min(times, key=lambda config: cost(problem, config, device).seconds)
    candidates = (as_it_runs(problem, config) for config, _ in ranked(problem, device))
    measured = ((rank, config) for rank, config in enumerate(candidates) if config in times)
    rank, candidate = next(measured, (None, None))
    return Score(problem, (fastest, times[fastest]), (choice, times[choice]),
                 candidate and (candidate, times[candidate]), rank)


def report(scores: list[Score], limit: int) -> str:
    """The geometric means, and the `limit` problems with the worst choices."""
    lines = [_summary("measured configurations", [each.choice_ratio for each in scores]),
             _summary("the model's candidates",
                      [each.candidate_ratio for each in scores if each.candidate is not None])]
    for each in sorted(scores, key=lambda each: -(each.candidate_ratio or each.choice_ratio))[:limit]:
        config, microseconds = each.candidate or each.choice
        rank = "-" if each.rank is None else each.rank + 1
        lines += [f"{each.problem}: {microseconds / each.fastest[1]:.3f}",
                  f"  {microseconds:9.2f} us  {config} (candidate {rank})",
                  f"  {each.fastest[1]:9.2f} us  {each.fastest[0]}"]
    return "\n".join(lines)


def _summary(among: str, ratios: list[float]) -> str:
    if not ratios:
        return f"{among}: none was measured"
    return (f"{among}: geometric mean {statistics.geometric_mean(ratios):.3f}, worst {max(ratios):.3f}, "
            f"{len(ratios)} problems")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score_model",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=pathlib.Path, help="what benchmarks.sweep --out wrote (or .gz)")
    parser.add_argument("--limit", type=int, default=10, help="problems to show, the worst first")
    arguments = parser.parse_args()
    device, times = read(arguments.sweep)
    scores = [score(problem, configs, device) for problem, configs in times.items()]
    print(report(scores, arguments.limit))


if __name__ == "__main__":
    main()
