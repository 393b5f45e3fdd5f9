"""Auto mesh axes: XLA chooses how arrays are sharded, and asks here what that makes of the call."""

from __future__ import annotations

import contextvars
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jax
import numpy as np

# Private: custom_partitioning decodes shardings with it, and cannot be asked to go on where that fails.
from jax._src.sharding_impls import parse_flatten_op_sharding
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import source_info_util
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_fp8gemm.mesh import shard
from jax_fp8gemm.mesh.plan import make_plan, refusal
from jax_fp8gemm.mesh.rule import Dim, Rule


def mesh_of(ctx) -> Mesh | None:
    """The mesh of a call that is being lowered, where XLA chooses how its arrays are sharded over devices.

    NOTES: the mesh is in the operands' types or, if those were never sharded, in the program's arguments. JAX
    tells the latter alone to custom_partitioning, which then may find no mesh.
    """
    context = ctx.module_context.axis_context
    mesh = ctx.avals_in[0].sharding.mesh
    if mesh.empty:
        mesh = getattr(context, "abstract_mesh", None) or mesh
    devices = getattr(context, "device_assignment", None) or ()
    is_auto = all(kind == AxisType.Auto for kind in mesh.axis_types)
    if len(devices) < 2 or len(devices) != mesh.size or not is_auto:
        return None
    return Mesh(np.array(devices).reshape(mesh.axis_sizes), mesh.axis_names)


def run(call: shard.Call, mesh: Mesh, *operands: jax.Array) -> list[jax.Array]:
    """The results of a call that XLA may partition.

    NOTES: JAX's persistent cache finds such a program in another process only with
    jax_remove_custom_partitioning_ptr_from_cache_key, and then sees nothing of `_partition`: two calls of
    equal shapes, or two versions of this library, would share an executable. So all that makes a difference
    stands beside the call.
    """
    from jax_fp8gemm.jit.fingerprint import fingerprint  # reads all sources, once

    with set_xla_metadata(jax_fp8gemm=f"{call.name} {call.params} {call.mapped} {fingerprint()}"):
        params = {**call.params, "surroundings": Surroundings()}
        return _partitioned(_Static(dataclasses.replace(call, params=params), mesh), *operands)


class Surroundings:
    """The context, such as that of `limit_sms`, in which a call was lowered.

    XLA partitions the program when it compiles it, perhaps after that context was left.
    """

    def __init__(self):
        self._context = contextvars.copy_context()

    def run(self, function, *args, **kwargs):
        return self._context.copy().run(function, *args, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """What custom_partitioning passes on as it is; hashable, which a dictionary of parameters is not."""

    call: shard.Call
    mesh: Mesh


@partial(custom_partitioning, static_argnums=(0,))
def _partitioned(static, *operands):
    return shard.run_alone(static.call, *operands)


def _partition(static, _, operands, results):
    """XLA's question: the shardings that it can have, and what each device then runs."""
    call, mesh, arrays = static.call, static.mesh, [*operands, *results]
    specs = [_spec(x, mesh) for x in arrays]
    reason = refusal(call.rule, mesh.shape, specs)
    if reason is not None:
        raise NotImplementedError(f"{call.name}: {reason}")
    plan = make_plan(call.rule, mesh.shape, [x.shape for x in arrays], specs)
    named = lambda specs: [NamedSharding(mesh, spec) for spec in specs]
    run_shard = partial(_run_without_frames, partial(shard.run, call, plan, mesh.shape))
    return mesh, run_shard, named(plan.results), tuple(named(plan.operands))


def _run_without_frames(function, *operands):
    """`function`, traced such that no instruction names the stack frames it comes from.

    NOTES: what a device runs is lowered as a module of its own, with a table of stack frames. XLA inlines the
    instructions without that table: the numbers of their frames then mean others of the program's table, or
    lie past its end. Where XLA goes on to inline loops and calls, it appends frames whose parent is such a
    number. Once the table has grown past that, the parent descends from its own child, and XLA of jaxlib
    0.10.2 follows parents for ever (StackFrames::IsPrefix): whether it finishes depends on how deep in
    Python's stack the program is traced. Without frames of their own, instructions take those of the call.
    """
    with source_info_util.user_context(_no_frames()):
        return function(*operands)


@cache
def _no_frames():
    """A traceback without frames that XLA is told about: a new thread has those of JAX and Python alone."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(source_info_util.current).result().traceback


def _spec(x, mesh):
    """The PartitionSpec of x, with an entry for each dimension.

    Shardy may have split a mesh axis, which no PartitionSpec says: then x counts as replicated.
    """
    try:
        decoded = parse_flatten_op_sharding(x.sharding._to_xla_hlo_sharding(x.ndim), mesh)[0]
    except Exception:
        decoded = ()
    return PartitionSpec(*decoded, *[None] * (x.ndim - len(decoded)))


def _propagation(static, _, operand_types, result_types):
    """How Shardy may carry shardings through the call, such as `b m (kb ki), b m kb, … -> b m (nb ni)`.

    That the scales of a factor follow its values needs the factor cut into blocks and what is in them. Only
    the blocks may be sharded; but what must not be sharded still reaches `_partition` where a user does so.
    """
    rule = static.call.rule
    names = _ShardyNames(rule, rule.sizes([type.shape for type in (*operand_types, *result_types)]))
    side = lambda arrays: ", ".join(" ".join(map(names, array.dims)) for array in arrays)
    text = f"{side(rule.operands)} -> {side(rule.results)}"
    return text, {"reduction_factors": tuple(dict.fromkeys(names.summed)),
                  "need_replication_factors": tuple(dict.fromkeys(names.whole)), **names.compound_sizes()}


class _ShardyNames:
    """From dimensions to Shardy's factors of them; on the way, which of these are summed over or whole.

    NOTES: Shardy wants special factors in the order of their appearance, and none of size 1 in a compound. It
    carries shardings along whole factors, too: what cannot be sharded gets a name of its own in each array.
    """

    def __init__(self, rule: Rule, sizes: dict[str, int]):
        self.rule, self.factor_sizes = rule, sizes
        self.summed: list[str] = []
        self.whole: list[str] = []
        self.sizes: dict[str, int] = {}  # of those that stand in compounds
        self.alone: set[str] = set()  # what stands outside of compounds
        self.count = 0

    def __call__(self, dim: Dim) -> str:
        factor = dim.factor
        block = 1 if factor is None else self.rule.block(factor)
        if factor is None or factor in self.rule.whole or factor in self.rule.refused or (
                block > 1 and (self.factor_sizes[factor] % block or self.factor_sizes[factor] == block)):
            self.count += 1
            return self._whole(f"x{self.count}")
        if factor in self.rule.summed:
            self.summed.append(factor)
        parts = [factor]
        self.sizes[factor] = self.factor_sizes[factor] // block
        if block > dim.block:
            parts.append(self._whole(f"{factor}i", block))
        if dim.copies > 1:  # in truth they are the slower part, but then no sharding of F would say one of 2F
            parts.append(self._whole(f"{factor}c", dim.copies))
        if len(parts) > 1:
            return f"({' '.join(parts)})"
        self.alone.add(factor)
        return factor

    def compound_sizes(self) -> dict[str, int]:
        """The sizes that Shardy cannot see from those of dimensions."""
        return {name: size for name, size in self.sizes.items() if name not in self.alone}

    def _whole(self, name: str, size: int | None = None) -> str:
        self.whole.append(name)
        if size is not None:
            self.sizes[name] = size
        return name


# JAX's own decoding would raise on a split mesh axis before `_partition` is called.
_partitioned.def_partition(_partition, sharding_rule=_propagation, decode_shardings=False)
