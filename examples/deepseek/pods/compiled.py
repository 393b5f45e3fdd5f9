"""Compiles a step for a mesh of devices that are not there, and compares it with what was expected."""

from __future__ import annotations

import collections
import math
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples.deepseek import model, step
from examples.deepseek.config import Config
from examples.deepseek.mesh import DATA, EXPERT, TENSOR, TOKENS, Layout, check, make_mesh
from examples.deepseek.pods import collectives, expected
from examples.deepseek.pods.collectives import Found, Traffic

# The last pass before XLA of a CPU writes bf16 as f32 and FP8 as f16. What is dead is gone by then.
_PASS = "all-reduce-promotion"
_OPTIONS = {"xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": _PASS,
            # The program never runs: its machine code may be as it comes.
            "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def facts(config: Config, data: int, expert: int) -> dict[str, Any]:
    """What the compiled step communicates and holds, on each of data * expert devices, in bytes.

    Raises:
      ValueError: it is not what `expected` says, or has no loops to read that from.
    """
    if config.unroll:
        raise ValueError("Config: unroll: expected loops over layers, got true")
    layout = Layout(make_mesh(data, expert, order=(EXPERT, DATA, TENSOR)))
    text, arguments = _compile(config, layout)
    by_purpose = match(collectives.read(text, layout.mesh.shape), expected.traffic(config, data, expert))
    found = {"bytes": by_purpose, "state": arguments - expected.batch_bytes(config, data, expert),
             "kept": _kept(text, config, layout)}
    wanted = {"state": expected.state_bytes(config, data, expert),
              "kept": expected.kept_bytes(config, data, expert)}
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(f"{name}: expected {value} bytes on a device of {data} x {expert}, got "
                             f"{found[name]}")
    return found


def _compile(config, layout) -> tuple[str, int]:
    """XLA's text after partitioning, and the bytes of the arguments of a device."""
    check(config, layout.mesh)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        step.abstract_state(config), step.shardings(config, layout))
    sequences = jax.ShapeDtypeStruct((config.batch, config.sequence + 1), jnp.int32,
                                     sharding=NamedSharding(layout.mesh, P(TOKENS)))
    with tempfile.TemporaryDirectory() as folder:
        compiled = step.train_step(config, "fp8", layout).lower(state, sequences).compile(
            _OPTIONS | {"xla_dump_to": folder})
        text, = pathlib.Path(folder).glob(f"*before_{_PASS}.txt")
        return text.read_text(), compiled.memory_analysis().argument_size_in_bytes


def match(found: list[Found], wanted: dict[str, list[Traffic]]) -> dict[str, int]:
    """The bytes of each purpose, if each collective that was found is one that is wanted, and no more.

    Raises:
      ValueError: names those that are not expected, with the operation that they are for, and those missing.
    """
    left = collections.Counter(traffic for each in wanted.values() for traffic in each)
    unexpected = []
    for traffic, source in found:
        if left[traffic] > 0:
            left[traffic] -= 1
        else:
            unexpected.append(f"  {traffic} of {source}")
    missing = [f"  {traffic}" for traffic in left.elements()]
    if unexpected or missing:
        raise ValueError("\n".join(["collectives: not expected", *unexpected, "missing", *missing]))
    return {purpose: sum(traffic.bytes for traffic in each) for purpose, each in wanted.items()}


def _kept(text, config, layout):
    """What the loops over layers carry for each layer in the forward pass, without the parameters."""
    forward = collectives.loops(text)[:2]
    shapes, specs = model.shapes(config), step.shardings(config, layout).params
    kept = {}
    for kind, loop in zip(("dense", "moe"), forward, strict=True):
        is_shape = lambda node: isinstance(node, tuple)
        local = jax.tree.map(lambda shape, sharding: 4 * math.prod(sharding.shard_shape(shape)),
                             shapes[kind], specs[kind], is_leaf=is_shape)
        kept[kind] = loop.stacked_bytes - sum(jax.tree.leaves(local))
    # The biases of the choice of experts, and the routing's loads and what was dropped.
    kept["moe"] -= 4 * config.moe_layers * (2 * config.experts + 1)
    return kept
