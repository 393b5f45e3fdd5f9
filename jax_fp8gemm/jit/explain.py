"""Why a problem gets its configuration, as text: candidates with their times, rejections, the winner."""

from __future__ import annotations

import re

from jax_fp8gemm.jit.choose import candidates, choose, ranked
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.cost import STEP_PARTS, Cost, cost
from jax_fp8gemm.jit.device import Device
from jax_fp8gemm.jit.legal import rejection
from jax_fp8gemm.jit.problem import GemmProblem

_PARTS = (*STEP_PARTS, "epilogue", "start", "exchange")
_HEADER = "".join(f"{name:>10}" for name in ("total us", *_PARTS)) + "  bound   waves  configuration"


def explain(problem: GemmProblem, device: Device, *, num_rows: int = 12) -> str:
    """The choice for `problem` on `device`, as a table; nothing is compiled and no GPU is needed.

    Args:
      problem, device: the call, and the GPU that it would run on.
      num_rows: how many of the candidates to show, the best first.
    """
    order, choice = ranked(problem, device), choose(problem, device)
    rows = [_row(config, price) for config, price in order[:num_rows]]
    winner = _row(choice.config, cost(problem, choice.config, device))
    return "\n".join([
        f"{problem} on {device.name}, {device.num_sms} SMs", "",
        f"{len(order)} legal candidates, by the model's microseconds (the parts overlap):",
        _HEADER, *rows, "",
        *_rejections(problem, device), f"winner, by the {choice.source}:", _HEADER, winner, ""])


def _row(config: GemmConfig, price: Cost) -> str:
    seconds = (price.seconds, *(getattr(price, name) for name in _PARTS))
    times = "".join(f"{1e6 * value:10.2f}" for value in seconds)
    return f"{times}  {price.bound:<6}  {price.waves:5}  {config}"


def _rejections(problem: GemmProblem, device: Device) -> list[str]:
    """The reasons, the most frequent first, each with its number of candidates and one of them."""
    groups: dict[str, list[tuple[GemmConfig, str]]] = {}
    for config in candidates(problem, device):
        reason = rejection(problem, config, device)
        if reason is not None:
            groups.setdefault(re.sub(r"\d+", "#", reason), []).append((config, reason))
    total = sum(map(len, groups.values()))
    lines = [f"{total} rejected candidates, by reason, with an example:"]
    for members in sorted(groups.values(), key=len, reverse=True):
        config, reason = members[0]
        lines.append(f"{len(members):10}  {reason}  ({config})")
    return [*lines, ""] if groups else []
