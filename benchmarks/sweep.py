"""Which configuration of the kernel is fastest? Compiles many, checks each, times all of them in one run.

    python -m benchmarks.sweep 64x2112x7168 4096x7168x2048 --top 40 --out sweep.json
    python -m benchmarks.sweep 64x2112x7168 --configs '[{"block_m": 64, "block_n": 32, "num_stages": 8}]'
    python -m benchmarks.sweep --tags batch prefill --top 24
    python -m benchmarks.sweep 7x129280x1536 --check
    python -m benchmarks.sweep --grouped masked masked-8x16-7168x2048 --top 24

It needs PyTorch, NVRTC and the GPU, but neither JAX's GPU support nor the compiled module: `raw_launch`
launches the kernels. Every configuration's output must be within the error bound, and those that do not split
K must have equal bits. DeepGEMM is timed among them where it is installed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import faulthandler
import json
import pathlib
from typing import Any

import torch

from benchmarks import workloads
from benchmarks.buffers import BOUNDS, Buffers
from benchmarks.peers import Absent, Unsupported, deepgemm, deepgemm_grouped
from benchmarks.raw_launch import BoundKernel
from benchmarks.timing import Call, KernelTimer
from benchmarks.workloads import GroupedWorkload, Workload
from jax_fp8gemm.jit import tuned
from jax_fp8gemm.jit.choose import choose, ranked
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import Device, find_device
from jax_fp8gemm.jit.plan import plan_gemm
from jax_fp8gemm.jit.problem import MASKED, RAGGED_K, GemmProblem
from jax_fp8gemm.jit.toolchain import CompileError
from jax_fp8gemm.jit.warmup import compile_all

_HANG_SECONDS = 20  # a kernel that takes longer waits for a barrier that never comes
_YARDSTICK = "DeepGEMM"
_OPTIONS = ("out_dtype", "rhs_scale_rows", "accumulate", "batch")  # arguments that are fields of GemmProblem


@dataclasses.dataclass
class Candidate:
    """A configuration and what became of it.

    Attributes:
      config: the configuration.
      cubin: the compiled kernel, None where it did not compile.
      failure: why it was not timed.
      bits: "same" as those of the first configuration that does not split K, "differ (split-K)", or "DIFFER".
      worst_tile: largest relative error of a 128x128 tile.
    """

    config: GemmConfig
    cubin: bytes | None = None
    failure: str | None = None
    bits: str = ""
    worst_tile: float | None = None
    kernel: BoundKernel | None = None

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self.config))


def compile_candidates(jobs: dict[GemmProblem, list[Candidate]], num_threads: int | None) -> None:
    """Compiles every candidate of every problem, in parallel."""
    pairs = [(problem, candidate) for problem, candidates in jobs.items() for candidate in candidates]
    results = compile_all(
        [(problem, candidate.config) for problem, candidate in pairs], num_threads=num_threads
    )
    for (_, candidate), result in zip(pairs, results, strict=True):
        if isinstance(result, CompileError):  # a row of the table, not the end of the sweep
            candidate.failure = str(result)
        else:
            candidate.cubin = result


def check(
    candidate: Candidate, buffers: Buffers, device: Device, expected: torch.Tensor | None
) -> torch.Tensor:
    """Launches a candidate once into a poisoned output and judges it; returns a copy of the output.

    Args:
      candidate: gets its kernel, error and verdict.
      buffers: what it works on.
      device: sets the number of CTAs.
      expected: the output of the first configuration that does not split K, None before there is one.
    """
    plan = plan_gemm(buffers.problem, candidate.config, candidate.cubin, device.num_sms)
    # A hanging kernel cannot be stopped: its name is printed first, and the process ends in a while.
    print(f"  checking {candidate.config}", flush=True)
    faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
    candidate.kernel = BoundKernel(plan, buffers.addresses())
    buffers.poison()
    candidate.kernel(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    faulthandler.cancel_dump_traceback_later()
    candidate.worst_tile = buffers.worst_tile()
    bound = BOUNDS[buffers.problem.out_dtype]
    if candidate.worst_tile > bound:
        candidate.failure = f"error {candidate.worst_tile:.2e} of a tile, above {bound:.2e}"
    if expected is not None and not torch.equal(_bits(buffers.out), _bits(expected)):
        split = candidate.config.split_k > 1
        candidate.bits = "differ (split-K)" if split else "DIFFER"
        if not split:
            candidate.failure = candidate.failure or "not the bits of the first without split-K"
    else:
        candidate.bits = "same"
    return buffers.out.clone()


def _bits(x: torch.Tensor) -> torch.Tensor:
    """For comparison: rows that are left alone hold NaN, which equals nothing."""
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def yardstick(buffers: Buffers, workload: Workload | GroupedWorkload) -> Call | None:
    """DeepGEMM on the same buffers; None, with the reason printed, where it cannot run."""
    try:
        if buffers.problem != problem_of(workload):
            raise Unsupported("only what the list of workloads has is compared: no batch, its dtypes")
        if buffers.problem.is_grouped:
            return deepgemm_grouped.bind(workload, _grouped_arrays(buffers))
        return deepgemm.bind(buffers.lhs[0], buffers.lhs_scale[0].T, buffers.rhs[0], buffers.rhs_scale[0])
    except (Absent, Unsupported) as error:
        print(f"  {_YARDSTICK}: {error}")
        return None


def _grouped_arrays(buffers: Buffers) -> deepgemm_grouped.Arrays:
    """As `benchmarks.operands.GroupedOperands` has them."""
    rhs_scale = buffers.rhs_scale.mT if buffers.problem.rhs_scale_rows == 1 else buffers.rhs_scale
    arrays = (buffers.lhs, buffers.lhs_scale.mT, buffers.rhs, rhs_scale, buffers.group_sizes)
    lhs, lhs_scale, rhs, rhs_scale, group_sizes = (x[0] for x in arrays)
    return lhs.view(torch.uint8), lhs_scale, rhs.view(torch.uint8), rhs_scale, group_sizes


def problem_of(workload: Workload | GroupedWorkload, **options: Any) -> GemmProblem:
    """The problem that a call for the workload makes; `options` replace its fields."""
    if isinstance(workload, GroupedWorkload):
        options = {"kind": workload.kind, "groups": workload.groups} | options
        if workload.kind == RAGGED_K:
            options = {"out_dtype": "f32", "rhs_scale_rows": 1} | options
        if workload.kind == MASKED:
            options = {"expected_m": workload.expected_group_size} | options
    return GemmProblem(workload.m, workload.n, workload.k, **options)


def time_all(
    candidates: list[Candidate],
    buffers: Buffers,
    workload: Workload | GroupedWorkload,
    timer: KernelTimer,
    repeats: int,
) -> dict[str, Any]:
    """Times the candidates that passed, interleaved with DeepGEMM; the samples by candidate key."""
    stream = torch.cuda.current_stream().cuda_stream

    def call(kernel: BoundKernel) -> Call:
        return Call(run=lambda: kernel(stream), wait=lambda _: None)

    calls = {c.key: call(c.kernel) for c in candidates if c.failure is None}
    if peer := yardstick(buffers, workload):
        calls[_YARDSTICK] = peer
    return timer(calls, repeats=repeats)


def sweep(
    problem: GemmProblem,
    workload: Workload | GroupedWorkload,
    candidates: list[Candidate],
    device: Device,
    timer: KernelTimer | None,
    repeats: int,
) -> list[dict[str, Any]]:
    """Checks and, with a timer, times a problem's candidates; returns the rows, the fastest first."""
    print(problem, flush=True)
    buffers, first = Buffers.random(problem, getattr(workload, "group_sizes", ())), None
    for candidate in candidates:
        if candidate.failure is None:
            try:
                out = check(candidate, buffers, device, first)
            except RuntimeError as error:
                faulthandler.cancel_dump_traceback_later()
                candidate.failure = str(error)
                torch.cuda.synchronize()  # raises if the context is broken: nothing can run then
                continue
            if first is None and candidate.config.split_k == 1:
                first = out
    samples = time_all(candidates, buffers, workload, timer, repeats) if timer else {}
    rows = [
        {
            "config": dataclasses.asdict(c.config),
            "label": str(c.config),
            "bits": c.bits,
            "worst_tile": c.worst_tile,
            "failure": c.failure,
            **(samples[c.key].summary() if c.key in samples else {}),
        }
        for c in candidates
    ]
    if _YARDSTICK in samples:
        rows.append({"label": _YARDSTICK, **samples[_YARDSTICK].summary()})
    for candidate in candidates:
        if candidate.kernel:
            candidate.kernel.unload()
    return sorted(rows, key=lambda row: row.get("median_us", float("inf")))


def print_table(
    problem: GemmProblem, flops: int, rows: list[dict[str, Any]], limit: int
) -> None:
    """The fastest rows, DeepGEMM's among them, and every failure."""
    yard = next((row["median_us"] for row in rows if row["label"] == _YARDSTICK), None)
    print(f"\n{problem}: us, TFLOPS, speed over {_YARDSTICK}, worst tile, bits")
    for rank, row in enumerate(rows):
        if failure := row.get("failure"):
            print(f"  FAILED  {row['label']}: {failure.splitlines()[0][:160]}")
        elif "median_us" not in row:
            print(f"  correct {row['label']}: worst tile {row['worst_tile']:.1e}, bits {row['bits']}")
        elif rank < limit or row["label"] == _YARDSTICK:
            ratio = f"{yard / row['median_us']:5.2f}x" if yard else "     -"
            error = f"{row['worst_tile']:.1e} {row['bits']}" if "config" in row else ""
            print(
                f"  {row['median_us']:8.2f} {flops / row['median_us'] / 1e6:7.0f} {ratio}  "
                f"{row['label']}  {error}"
            )


def write_winners(
    path: pathlib.Path, device: Device, results: dict[GemmProblem, list[dict[str, Any]]]
) -> None:
    """The fastest configuration of each problem, as a table of measured winners (`jax_fp8gemm/jit/tuned`)."""
    entries = []
    for problem, rows in results.items():
        timed = [row for row in rows if "config" in row and "median_us" in row]
        if timed:
            entry = tuned.Entry(problem, GemmConfig(**timed[0]["config"]), timed[0]["median_us"])
            entries.append(entry.to_json())
    path.write_text(json.dumps({"device": device.name, "entries": entries}, indent=1) + "\n")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="MxNxK", help="problems to sweep")
    parser.add_argument(
        "--tags", nargs="+", default=[], choices=workloads.TAGS, help="sweep these workloads too"
    )
    parser.add_argument(
        "--grouped", nargs="+", default=[], metavar="NAME", help="names or tags of grouped workloads"
    )
    parser.add_argument("--top", type=int, default=32, help="configurations from the cost model (default 32)")
    parser.add_argument("--configs", help="JSON list of configurations, or a file of them, instead")
    parser.add_argument("--out-dtype", choices=("bf16", "f32"), help="default bf16; f32 for ragged_k")
    parser.add_argument("--rhs-scale-rows", type=int, choices=(1, 128), help="default 128; 1 for ragged_k")
    parser.add_argument(
        "--accumulate", action="store_const", const=True, help="add to the output (with --out-dtype f32)"
    )
    parser.add_argument("--batch", type=int)
    parser.add_argument("--check", action="store_true", help="only check the results, don't time")
    parser.add_argument("--repeats", type=int, default=20, help="samples per configuration (default 20)")
    parser.add_argument("--limit", type=int, default=12, help="rows to print per problem (default 12)")
    parser.add_argument("--threads", type=int, help="kernels compiled at a time (default: one for each core)")
    parser.add_argument(
        "--out", type=pathlib.Path, help="JSON file for all rows, rewritten after each problem"
    )
    parser.add_argument("--winners", type=pathlib.Path, help="JSON file for the table of measured winners")
    return parser.parse_args()


def _configs(problem: GemmProblem, device: Device, arguments: argparse.Namespace) -> list[GemmConfig]:
    """The given configurations, or what `fp8_gemm` would take followed by the cost model's best."""
    if text := arguments.configs:
        source = text if text.lstrip().startswith("[") else pathlib.Path(text).read_text()
        return [GemmConfig(**fields) for fields in json.loads(source)]
    chosen = choose(problem, device).config
    others = [config for config, _ in ranked(problem, device) if config != chosen]
    return [chosen, *others][: 1 if arguments.check else arguments.top]


def main() -> int:
    arguments = _parse_arguments()
    dense = [*map(workloads.parse, arguments.shapes), *workloads.select(*arguments.tags)]
    grouped = workloads.select_grouped(*arguments.grouped)
    if not dense and not grouped:
        raise SystemExit("sweep: expected shapes, --tags or --grouped, got none")
    properties = torch.cuda.get_device_properties(0)
    device = find_device(properties.name, properties.multi_processor_count)
    options = {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}
    workload_of = {problem_of(workload, **options): workload for workload in (*dense, *grouped)}
    jobs = {
        problem: [Candidate(config) for config in _configs(problem, device, arguments)]
        for problem in workload_of
    }
    with concurrent.futures.ThreadPoolExecutor(1) as background:
        if not arguments.check:
            background.submit(deepgemm.prepare, [workload.name for workload in dense])
            background.submit(
                deepgemm.prepare, [workload.name for workload in grouped], deepgemm_grouped.__name__
            )
        compile_candidates(jobs, arguments.threads)
    timer = None if arguments.check else KernelTimer()
    results, failed = {}, 0
    for problem, candidates in jobs.items():
        rows = sweep(problem, workload_of[problem], candidates, device, timer, arguments.repeats)
        results[problem] = rows
        failed += sum(bool(row.get("failure")) for row in rows)
        if arguments.out:
            named = [
                {"problem": dataclasses.asdict(problem), "rows": rows} for problem, rows in results.items()
            ]
            arguments.out.write_text(json.dumps({"device": device.name, "problems": named}, indent=1))
        if arguments.winners:
            write_winners(arguments.winners, device, results)
    for problem, rows in results.items():
        print_table(problem, problem.batch * workload_of[problem].flops, rows, arguments.limit)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
