"""The command line: python -m jax_fp8gemm info | explain | warmup | autotune | cache | launch."""

from __future__ import annotations

import argparse
import pathlib
import re
import sys

from jax_fp8gemm import diagnose
from jax_fp8gemm.jit import settings
from jax_fp8gemm.jit.autotune import autotune
from jax_fp8gemm.jit.cache import kernel_cache
from jax_fp8gemm.jit.device import KNOWN_DEVICES, Device, current_device, find_device
from jax_fp8gemm.jit.explain import explain
from jax_fp8gemm.jit.problem import (
    DENSE,
    KINDS,
    RAGGED_K,
    SCALE_BLOCK,
    TMA_ALIGNMENT,
    GemmProblem,
    round_up,
)
from jax_fp8gemm.jit.warmup import warmup
from jax_fp8gemm.processes import launch

SHAPES_HELP = "MxNxK, such as 64x2112x7168, or a file with one of these on each line (# starts a comment)"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        settings.configure_logging()
        return options.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"jax_fp8gemm: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_fp8gemm", description=__doc__, epilog=_environment(),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")

    _command(commands, "info", _info, "say whether this machine can run the kernels (exit status 0 if so)")

    command = _command(commands, "explain", _explain, "show how a configuration is chosen; needs no GPU")
    for name in "mnk":
        command.add_argument(name, type=int, metavar=name.upper())
    command.add_argument("--rows", type=int, default=12, help="candidates to show")
    _add_problem_options(command)
    _add_device_options(command)

    command = _command(commands, "warmup", _warmup, "compile the kernels of a list of shapes into the cache")
    command.add_argument("shapes", nargs="+", help=SHAPES_HELP)
    _add_problem_options(command)
    _add_device_options(command)

    command = _command(commands, "autotune", _autotune, "time configurations on this GPU, keep the winners")
    command.add_argument("shapes", nargs="+", help=SHAPES_HELP)
    command.add_argument("--candidates", type=int, default=24, help="configurations to time for each shape")
    command.add_argument("--rounds", type=int, default=9, help="runs of each")
    _add_problem_options(command)

    command = _command(commands, "cache", _cache, "show, or clear, the compiled kernels on disk")
    command.add_argument("--clear", action="store_true", help="delete them; measured configurations stay")

    command = _command(commands, "launch", _launch, "run a jax.distributed program here, in N processes")
    command.add_argument("--processes", type=int, required=True, metavar="N", help="each gets a GPU, if any")
    command.add_argument("program", nargs=argparse.REMAINDER, help="a command, such as python train.py")
    return parser


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run)
    return command


def _environment() -> str:
    width = max(len(variable.name) for variable in settings.VARIABLES)
    rows = [f"  {v.name:<{width}}  {v.meaning} Default: {v.default}." for v in settings.VARIABLES]
    return "\n".join(["environment variables:", *rows])


def _add_problem_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--kind", choices=KINDS, default=DENSE, help=f"of GEMM (default: {DENSE})")
    command.add_argument("--groups", type=int, default=1, help="G, of every kind but dense")
    command.add_argument("--expected-m", type=int, metavar="ROWS",
                         help="of a group of ragged_m (default: M / G) or masked (default: M)")
    command.add_argument("--batch", type=int, default=1, help="GEMMs in one launch")
    command.add_argument("--out-dtype", choices=("bf16", "f32"), help="default: bf16; f32 for ragged_k")
    command.add_argument("--rhs-scale-rows", type=int, choices=(1, SCALE_BLOCK),
                         help="rows of rhs with one scale; default: 128; 1 for ragged_k")
    command.add_argument("--accumulate", action="store_true", help="add to the output (f32)")
    command.add_argument("--batch-invariant", action="store_true", help="forbid split-K")


def _add_device_options(command: argparse.ArgumentParser) -> None:
    names = "; ".join(device.name for device in KNOWN_DEVICES)
    command.add_argument("--gpu", metavar="NAME", help=f"for this GPU instead of the one here ({names})")
    command.add_argument("--num-sms", type=int, help="SMs that a GEMM may use")


def _problem(options: argparse.Namespace, m: int, n: int, k: int) -> GemmProblem:
    """K is rounded up as the lowering pads it; the defaults are those of a kind's function in `gemm.py`."""
    out_dtype, rhs_scale_rows = ("f32", 1) if options.kind == RAGGED_K else ("bf16", SCALE_BLOCK)
    return GemmProblem(
        m, n, round_up(k, TMA_ALIGNMENT), options.batch, kind=options.kind, groups=options.groups,
        expected_m=options.expected_m, out_dtype=options.out_dtype or out_dtype,
        rhs_scale_rows=options.rhs_scale_rows or rhs_scale_rows, accumulate=options.accumulate,
        batch_invariant=options.batch_invariant)


def _problems(options: argparse.Namespace) -> list[GemmProblem]:
    return [_problem(options, *shape) for text in options.shapes for shape in read_shapes(text)]


def read_shapes(text: str) -> list[tuple[int, int, int]]:
    """The shapes that `text`, an MxNxK or the path of a file of these, stands for.

    Raises:
      ValueError: it is neither, or a line of the file is no shape.
    """
    path = pathlib.Path(text)
    lines = path.read_text().splitlines() if path.is_file() else [text]
    words = [line.split("#")[0].strip() for line in lines]
    shapes = [re.fullmatch(r"(\d+)x(\d+)x(\d+)", word) for word in words if word]
    if not all(shapes):
        wrong = next(word for word in words if word and not re.fullmatch(r"\d+x\d+x\d+", word))
        raise ValueError(f"shapes: expected MxNxK, such as 64x2112x7168, or a file of these, got {wrong!r}")
    return [tuple(map(int, shape.groups())) for shape in shapes]


def _device(options: argparse.Namespace) -> Device:
    device = find_device(options.gpu) if options.gpu else current_device()
    return device.limited_to(options.num_sms or settings.num_sms())


def _info(options: argparse.Namespace) -> int:
    text, can_run = diagnose.report()
    print(text)
    return 0 if can_run else 1


def _explain(options: argparse.Namespace) -> int:
    problem = _problem(options, options.m, options.n, options.k)
    print(explain(problem, _device(options), num_rows=options.rows))
    return 0


def _warmup(options: argparse.Namespace) -> int:
    count = warmup(_problems(options), device=_device(options))
    print(f"{count} kernels ready in {diagnose.cache_state()}")
    return 0


def _autotune(options: argparse.Namespace) -> int:
    winners, path = autotune(_problems(options), num_candidates=options.candidates, num_rounds=options.rounds)
    for entry in winners:
        print(f"{entry.problem}: {entry.microseconds:.2f} us  {entry.config}")
    print(f"added to {path}")
    return 0


def _cache(options: argparse.Namespace) -> int:
    if options.clear:
        print(f"{kernel_cache().clear()} kernels deleted")
    print(diagnose.cache_state())
    return 0


def _launch(options: argparse.Namespace) -> int:
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program:
        raise ValueError("launch: expected a command, such as python train.py, got none")
    return launch(program, options.processes)


if __name__ == "__main__":
    sys.exit(main())
