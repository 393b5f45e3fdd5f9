"""What one device computes: the operation on its shards, and the sum over devices where there is one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive

from jax_fp8gemm.mesh.plan import Axes, Plan
from jax_fp8gemm.mesh.rule import Rule

ALONE = Plan(axes={}, operands=(), results=())


@dataclasses.dataclass(frozen=True)
class Call:
    """One operation with everything static about it.

    Attributes:
      name: of the operation.
      kernel: its primitive on local arrays, with the batching rule that folds mapped axes into one launch.
      rule: how it lies on a mesh, mapped axes included.
      mapped: for each axis of `vmap`, the outermost first, which operands have it in front.
      params: of `kernel`.
    """

    name: str
    kernel: Primitive
    rule: Rule
    mapped: tuple[tuple[bool, ...], ...]
    params: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """Which part of the factors a device has."""

    axes: Mapping[str, Axes]
    mesh: Mapping[str, int]

    def is_sharded(self, factor: str) -> bool:
        return factor in self.axes

    def count(self, factor: str) -> int:
        """In how many parts the factor is cut."""
        return math.prod(self.mesh[name] for name in self.axes.get(factor, ()))

    def index(self, factor: str) -> jax.Array | int:
        """The number of this device's part."""
        return lax.axis_index(self.axes[factor]) if self.is_sharded(factor) else 0


def run(call: Call, plan: Plan, mesh: Mapping[str, int], *operands: jax.Array) -> list[jax.Array]:
    """The shards of the results from those of the operands.

    Terms of a sum over devices leave the kernel as f32, are added up in one reduce, then to the accumulator,
    and rounded once. Terms of which all but one are zero are exact as they are.
    """
    if not plan.reduce and not plan.scatter:
        return _run_kernel(call, plan, mesh, operands)
    params = call.params
    if any(factor in plan.axes for factor in call.rule.summed if factor not in call.rule.disjoint):
        params = {**params, "out_dtype": jnp.dtype(jnp.float32)}
    term = dataclasses.replace(call, params=params)
    if call.rule.accumulator is None:
        (out,) = _run_kernel(term, plan, mesh, operands)
        total = _sum_over_devices(out, plan)
    else:
        out, accumulator = _without_accumulator(term, plan, mesh, operands)
        total = accumulator + _sum_over_devices(out, plan)
    return [total.astype(call.params["out_dtype"])]


def _sum_over_devices(out, plan):
    for dim, axes in plan.scatter:
        out = lax.psum_scatter(out, axes, scatter_dimension=dim, tiled=True)
    return lax.psum(out, plan.reduce) if plan.reduce else out


def _without_accumulator(call, plan, mesh, operands):
    """This device's term, and the accumulator that is still to be added.

    The term is one for all along an axis over which the accumulator alone is mapped.
    """
    place = call.rule.accumulator
    mapped = [flags[:place] + flags[place + 1:] for flags in call.mapped]
    call = dataclasses.replace(call, mapped=tuple(flags for flags in mapped if any(flags)))
    (out,) = _run_kernel(call, plan, mesh, operands[:place] + operands[place + 1:])
    shape = list(operands[place].shape)
    for dim, axes in plan.scatter:
        shape[dim] *= math.prod(mesh[name] for name in axes)
    out = jnp.expand_dims(out, [i for i, flags in enumerate(mapped) if not any(flags)])
    return jnp.broadcast_to(out, shape), operands[place]


def run_alone(call: Call, *operands: jax.Array) -> list[jax.Array]:
    """The results on arrays that are not sharded, or that are one device's already."""
    return _run_kernel(call, ALONE, {}, operands)


def _run_kernel(call, plan, mesh, operands):
    part = Part(plan.axes, mesh)
    kernel = lambda *operands: call.kernel.bind(*match_varying(*operands), **call.params)
    return list(over_mapped(partial(call.rule.local, part, kernel), call.mapped)(*operands))


def over_mapped(function: Callable, mapped: tuple[tuple[bool, ...], ...]) -> Callable:
    """`function` under the vmaps of a `Call`."""
    for flags in reversed(mapped):
        function = jax.vmap(function, in_axes=tuple(0 if flag else None for flag in flags))
    return function


def match_varying(*arrays):
    """The arrays, cast to vary over the same manual mesh axes, as operands must inside shard_map."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(sorted(frozenset.union(*varying) - axes)) for axes in varying]
    return [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(arrays, missing, strict=True)]
