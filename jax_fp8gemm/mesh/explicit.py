"""Explicit mesh axes: shardings are part of the types, and the plan is made when a call is traced."""

from __future__ import annotations

from functools import partial

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from jax_fp8gemm.mesh import shard
from jax_fp8gemm.mesh.plan import Plan, axes_of, contradiction, make_plan, num_parts, openness, refusal
from jax_fp8gemm.mesh.rule import Rule


def is_sharded(aval) -> bool:
    """Whether an array of this type (`jax.typeof`) is sharded over an Explicit mesh axis."""
    return AxisType.Explicit in aval.sharding.mesh.axis_types and any(aval.sharding.spec)


def spec_of(x) -> PartitionSpec | None:
    """The PartitionSpec in the type of x; None where its mesh has no Explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding.spec if AxisType.Explicit in sharding.mesh.axis_types else None


def has_plan(avals, out_spec: PartitionSpec | None) -> bool:
    """Whether a call has to be planned when it is traced."""
    return out_spec is not None or any(map(is_sharded, avals))


def plan_of_types(rule: Rule, avals, result_shapes, out_spec: PartitionSpec | None) -> Plan:
    """The plan for operands of these types, and the result where it is asked to be."""
    return make_plan(rule, avals[0].sharding.mesh.shape, *_shapes_and_specs(avals, result_shapes, out_spec))


def place(name: str, rule: Rule, operands, result_shapes, out_spec: PartitionSpec | None) -> list[jax.Array]:
    """The operands, resharded as the plan has them.

    Raises:
      NotImplementedError: an axis is sharded that must not be.
      ValueError: two operands contradict each other, or they leave the result's sharding open and nothing
        says what it shall be.
    """
    avals = [jax.typeof(x) for x in operands]
    shapes, specs = _shapes_and_specs(avals, result_shapes, out_spec)
    mesh = avals[0].sharding.mesh.shape
    plan = make_plan(rule, mesh, shapes, specs)
    refused = refusal(rule, mesh, specs)
    if refused is not None:
        raise NotImplementedError(f"{name}: {refused}")
    wrong = contradiction(rule, specs)
    if wrong is not None:
        raise ValueError(f"{name}: {wrong}")
    if rule.takes_out_sharding and out_spec is None:
        is_open = openness(rule, mesh, shapes, specs, plan)
        if is_open is not None:
            raise ValueError(f"{name}: out_sharding: expected a PartitionSpec, got None, but {is_open}")
    return [x if tuple(aval.sharding.spec) == tuple(spec) else reshard(x, spec)
            for x, aval, spec in zip(operands, avals, plan.operands, strict=True)]


def requested_spec(name: str, out_sharding, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """What `out_sharding` asks of a result of this shape, with an entry for each dimension.

    Raises:
      ValueError: it is no sharding, or not one that the result can have on this mesh.
    """
    if not isinstance(out_sharding, NamedSharding | PartitionSpec):
        raise ValueError(f"{name}: out_sharding: expected a PartitionSpec, got {type(out_sharding).__name__}")
    spec = out_sharding.spec if isinstance(out_sharding, NamedSharding) else out_sharding
    if len(spec) > len(shape):
        raise ValueError(f"{name}: out_sharding: expected at most {len(shape)} entries, got {spec}")
    spec = PartitionSpec(*spec, *[None] * (len(shape) - len(spec)))
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    for size, axes in zip(shape, map(axes_of, spec), strict=True):
        for axis in axes:
            if kinds.get(axis) != AxisType.Explicit:
                raise ValueError(
                    f"{name}: out_sharding: expected Explicit axes of the operands' mesh, got {axis!r} in "
                    f"{spec} and a mesh of {kinds}; on Auto axes use jax.lax.with_sharding_constraint")
        count = num_parts(mesh.shape, axes)
        if size % count:
            raise ValueError(f"{name}: out_sharding: {spec} cuts an axis of {size} into {count} parts, which "
                             "are not equal; leave that axis out, or pad it")
    return spec


def run(call: shard.Call, plan: Plan, mesh, *operands: jax.Array) -> list[jax.Array]:
    """The results of a call whose operands lie as planned."""
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
                if kind == AxisType.Explicit}
    run_shard = partial(shard.run, call, plan, mesh.shape)
    return jax.shard_map(run_shard, mesh=mesh, axis_names=explicit, in_specs=plan.operands,
                         out_specs=list(plan.results))(*operands)


def _shapes_and_specs(avals, result_shapes, out_spec):
    unasked = [PartitionSpec(*[None] * len(shape)) for shape in result_shapes]
    asked = unasked if out_spec is None else [out_spec, *unasked[1:]]
    return [x.shape for x in avals] + list(result_shapes), [x.sharding.spec for x in avals] + asked
