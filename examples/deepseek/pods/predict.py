"""How long a step would take: its arithmetic and its traffic over measured rates.

Two bounds, between which the truth lies: nothing overlaps, and everything does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping

from examples.deepseek.config import Config
from examples.deepseek.pods import expected
from examples.deepseek.pods.collectives import Traffic

RESULTS = pathlib.Path(__file__).parents[3] / "benchmarks" / "results"
NODE = 8  # GPUs that NVLink connects
PEAK_FLOPS = 1979e12  # of FP8, H100 SXM, data sheet, without sparsity


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one GPU does in a second.

    Attributes:
      dense, experts: FLOPs of products of activations with weights, forward and backward, with quantisation.
      bf16: FLOPs of the embedding and the head.
      attention: FLOPs between tokens.
      f32: FLOPs of the router.
      memory: bytes.
      nvlink: bytes that it sends within a node, by the kind of collective.
      network: bytes that it sends to other nodes.
    """

    dense: float
    experts: float
    bf16: float
    attention: float
    f32: float
    memory: float
    nvlink: Mapping[str, float]
    network: float


def read_rates(folder: pathlib.Path = RESULTS) -> Rates:
    """One H100's from benchmarks/results; what was measured elsewhere or is assumed stands here."""
    training = _rows(folder / "training-nvidia-h100-80gb-hbm3.json")
    quantize = _rows(folder / "quantize-nvidia-h100-80gb-hbm3.json")

    def flops(workload, name):
        row = training[workload]
        return row["flops"] / row["results"][name]["median_us"] * 1e6

    stream = quantize["8192x16384 1x128"]
    return Rates(
        dense=flops("4096x7168x4096", "fp8"), experts=flops("8x4096 experts 7168x2048", "fp8"),
        bf16=flops("4096x7168x4096", "bf16"), attention=400e12, f32=67e12,
        memory=stream["bytes"] / stream["results"]["kernel"]["median_us"] * 1e6,
        nvlink={"all-to-all": 269e9, "all-gather": 254e9, "reduce-scatter": 252e9, "all-reduce": 295e9},
        network=40e9)


def _rows(path):
    return {row["workload"]: row for row in json.loads(path.read_text())["rows"]}


def model_flops(c: Config) -> float:
    """Of a token, forward and backward: what its mathematics needs, nothing twice."""
    work = _flops(dataclasses.replace(c, remat_experts=False))
    attention = 3 * work["attention"] / _ATTENTION_RUNS
    return work["dense"] + work["experts"] + attention + 6 * c.vocabulary * c.hidden


# Of the forward pass: it, its repetition in the backward pass, and the gradients, 5 products for 2.
_ATTENTION_RUNS = 1 + 1 + 2.5


def _flops(c: Config) -> dict[str, float]:
    """Of a token in one step, as it runs."""
    dense = sum(expected.layer_counts(c)[kind] * rows * columns
                for kind, each in expected.matrices(c).items() for rows, columns in each.values())
    expert = sum(math.prod(shape) for shape in expected.expert_matrices(c).values())
    # A token sees half of its sequence on average; values are padded to the width of keys.
    scores = 2 * c.heads * 2 * c.qk_dim * c.sequence / 2
    return {
        "dense": 6 * dense,
        "experts": (6 + 2 * c.remat_experts) * c.moe_layers * c.experts_per_token * expert,
        "attention": _ATTENTION_RUNS * c.layers * scores,
        # Forward and weight gradient of both; the head has a gradient of its input, too.
        "bf16": (4 + 6) * c.vocabulary * c.hidden,
        "f32": 6 * c.moe_layers * c.hidden * c.experts,
    }


def compute_seconds(c: Config, data: int, expert: int, rates: Rates) -> dict[str, float]:
    """Of a step on one device, by what it is spent on."""
    tokens = expected.device_tokens(c, data, expert)
    seconds = {name: tokens * flops / getattr(rates, name) for name, flops in _flops(c).items()}
    # Read and written by what stands between products, forward and backward; with experts' products that are
    # computed again, and have to be written and read as if they were kept.
    between = expected.kept_bytes(dataclasses.replace(c, remat_experts=False), data, expert)
    seconds["between products"] = 4 * sum(between.values()) / rates.memory
    # Reads weight, moments and gradient, writes the first three; the gradient is read twice for its norm.
    parameters = expected.state_bytes(c, data, expert) / expected.STATE_BYTES_OF_A_PARAMETER
    seconds["optimizer"] = parameters * 4 * (4 + 3 + 2) / rates.memory
    return seconds


def link_bytes(traffic: Traffic, in_node: int) -> tuple[float, float]:
    """What a device sends over NVLink, and over the network, in a step.

    Args:
      traffic: of a group of devices.
      in_node: devices of the group that one node has.
    """
    if traffic.kind == "all-to-all":
        return tuple(traffic.bytes * peers / traffic.devices
                     for peers in (in_node - 1, traffic.devices - in_node))
    # As rings: each passes through all of a node's devices, and leaves it once, by one adapter of theirs.
    within = traffic.sent if in_node > 1 else 0.0
    return within, traffic.sent / in_node if in_node < traffic.devices else 0.0


def devices_in_node(traffic: Traffic, data: int, expert: int, nearest: str) -> int:
    """Devices of a group that one node has, where devices are numbered along the axis `nearest` first."""
    near, far = (data, expert) if nearest == "data" else (expert, data)
    if len(traffic.axes) == 2 or min(data, expert) == 1:
        return min(NODE, traffic.devices)
    if traffic.axes == (nearest,):
        return min(NODE, near)
    return min(max(1, NODE // near), far)


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of a step on each device, and the tokens that it has.

    Attributes:
      compute: all kernels, one after the other.
      nvlink, network: of all collectives, if each link did nothing else and waited for nothing.
      serial: compute and collectives, one after the other.
    """

    tokens: int
    compute: float
    nvlink: float
    network: float
    serial: float

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.nvlink, self.network)


def predict(c: Config, data: int, expert: int, rates: Rates, *, nearest: str = "data",
            sums_in_fp8: bool = False, nodes_of_token: int | None = None) -> Step:
    """A step as it is compiled, or with what is not there yet.

    Args:
      nearest: the axis along which devices of a node stand next to each other, by default as in `compiled`.
      sums_in_fp8: experts' sums travel as tokens do, in FP8 with scales.
      nodes_of_token: a token has experts on so many nodes, crosses the network once for each, and is copied
        over NVLink there.
    """
    compute = sum(compute_seconds(c, data, expert, rates).values())
    nvlink = network = communication = 0.0
    for purpose, each in expected.traffic(c, data, expert).items():
        for traffic in each:
            within, across = link_bytes(traffic, devices_in_node(traffic, data, expert, nearest))
            if purpose == expected.SUMS and sums_in_fp8:
                share = expected.packed_bytes(c) / (2 * c.hidden)
                within, across = within * share, across * share
            if traffic.kind == "all-to-all" and nodes_of_token is not None:
                within, across = within + across, across * nodes_of_token / c.experts_per_token
            within, across = within / rates.nvlink[traffic.kind], across / rates.network
            nvlink, network = nvlink + within, network + across
            communication += max(within, across)
    return Step(expected.device_tokens(c, data, expert), compute, nvlink, network, compute + communication)
