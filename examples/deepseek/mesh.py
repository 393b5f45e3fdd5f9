"""How the model lies on devices: a mesh of the axes data, expert and tensor.

| axis   | divides                                                                               |
|--------|---------------------------------------------------------------------------------------|
| data   | sequences; and every matrix, with its optimizer state: along the residual width or,   |
|        | where it has none, along its output (FSDP)                                            |
| expert | sequences, too; and the routed experts                                                |
| tensor | heads, and the width of every feed-forward layer; its devices have the same tokens    |

What is dense is left to XLA, which follows the shardings of the parameters and those that `Layout.tokens`
asks for. The routed experts are a `jax.shard_map` (`layers.routed_experts`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.deepseek.config import Config
from jax_fp8gemm.mesh.plan import axes_of

DATA, EXPERT, TENSOR = AXES = ("data", "expert", "tensor")
TOKENS = (DATA, EXPERT)  # the axes that tokens are divided over

# Of one layer; those of a kind are stacked, with an axis in front that is whole.
_MATRICES = {
    "compress": P(DATA, None),
    "q_up": P(None, (TENSOR, DATA)),
    "kv_up": P(None, (TENSOR, DATA)),
    "out": P(TENSOR, DATA),
    "gate_up": P(DATA, TENSOR),
    "down": P(TENSOR, DATA),
    "router": P(),
    "experts_gate_up": P(EXPERT, DATA, None, TENSOR),
    "experts_down": P(EXPERT, TENSOR, DATA),
    "shared_gate_up": P(DATA, TENSOR),
    "shared_down": P(TENSOR, DATA),
}
_OUTSIDE_OF_LAYERS = {"embedding": P(TENSOR, DATA), "head": P(DATA, TENSOR)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, or one device where `mesh` is None, and what it asks of arrays."""

    mesh: Mesh | None = None

    def tokens(self, x: jax.Array) -> jax.Array:
        """x [B, …] with its sequences divided over devices, and all else whole."""
        return self.constrain(x, TOKENS)

    def place(self, sequences: np.ndarray) -> jax.Array:
        """A batch [B, …] on its devices. On several hosts each has the whole, and takes its part."""
        if self.mesh is None:
            return jnp.asarray(sequences)
        sharding = NamedSharding(self.mesh, P(TOKENS))
        return jax.make_array_from_callback(sequences.shape, sharding, lambda idx: sequences[idx])

    def constrain(self, x: jax.Array, *spec: Any) -> jax.Array:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*spec)))


ONE_DEVICE = Layout()


def make_mesh(data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None,
              order: Sequence[str] = AXES) -> Mesh:
    """A mesh of the first data * expert * tensor devices.

    order: the axes from far to near. Devices that stand next to each other in `devices`, as those of one
    host do, differ in the last one: what communicates most should be there. Where the experts fit on a host
    that is `expert`, after `tensor`. Where they do not, tokens leave it anyway; with `data` nearer, gathers
    of weights and sums of their gradients do not.

    Raises:
      ValueError: there are not as many devices, or several processes would have some that are left over.
    """
    devices, sizes = list(devices or jax.devices()), {DATA: data, EXPERT: expert, TENSOR: tensor}
    count = math.prod(sizes.values())
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(f"mesh: expected all {len(devices)} devices of {jax.process_count()} processes, got "
                         f"data={data} expert={expert} tensor={tensor}")
    if min(sizes.values()) < 1 or count > len(devices):
        raise ValueError(f"mesh: expected sizes of at least 1 and at most {len(devices)} devices, got "
                         f"data={data} expert={expert} tensor={tensor}")
    return jax.make_mesh(tuple(sizes[axis] for axis in order), tuple(order), devices=devices[:count],
                         axis_types=(AxisType.Auto,) * len(sizes))


def check(config: Config, mesh: Mesh) -> None:
    """Raise a ValueError unless the configuration's sizes can be divided over the mesh."""
    for name, size, axes in (
            ("batch", config.batch, TOKENS), ("experts", config.experts, (EXPERT,)),
            ("hidden", config.hidden, (DATA,)), ("heads", config.heads, (TENSOR,)),
            ("heads * (nope_dim + rope_dim)", config.heads * config.qk_dim, (TENSOR, DATA)),
            ("heads * (nope_dim + v_dim)", config.heads * (config.nope_dim + config.v_dim), (TENSOR, DATA)),
            ("dense_intermediate", config.dense_intermediate, (TENSOR,)),
            ("expert_intermediate", config.expert_intermediate, (TENSOR,)),
            ("vocabulary", config.vocabulary, (TENSOR,))):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise ValueError(f"Config: {name}: expected a multiple of {parts}, the size of the mesh axis "
                             f"{' x '.join(axes)}, got {size}")


def param_specs(params: Any) -> Any:
    """The PartitionSpec of every parameter, or of every shape of `model.shapes`."""
    def spec(path, _):
        name = path[-1].key
        if len(path) == 1:
            return _OUTSIDE_OF_LAYERS.get(name, P())
        return P(None, *_MATRICES.get(name, P()))

    return jax.tree.map_with_path(spec, params, is_leaf=lambda node: isinstance(node, tuple))


def without_data(spec: P) -> P:
    """Whole where it was divided over `data`."""
    return P(*(tuple(axis for axis in axes_of(entry) if axis != DATA) or None for entry in spec))


def experts_specs() -> tuple[P, P]:
    """Of one layer's experts_gate_up [E, D, 2, F] and experts_down [E, F, D]."""
    return _MATRICES["experts_gate_up"], _MATRICES["experts_down"]
