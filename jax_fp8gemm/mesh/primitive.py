"""The primitive that a program shows, in every mesh mode and under any `vmap`.

It leaves both as they are until it is lowered: a mapped axis is only remembered, so that it can be sharded
like any other. Where the arrays are one device's, its lowering puts another primitive, the kernel, whose
batching rule folds the mapped axes into one launch.
"""

from __future__ import annotations

from functools import partial

import jax

# Private, without a public equivalent: custom_partitioning, in a lowering, needs the list of devices.
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import PartitionSpec

from jax_fp8gemm.mesh import auto, explicit, shard


class MeshPrimitive(Primitive):
    """An operation on arrays that may be sharded, with any number of mapped axes in front.

    Its parameters are those of the kernel, and

      mapped: for each axis of `vmap`, the outermost first, which operands have it in front; all results do.
      out_spec: where the one result shall lie on Explicit mesh axes; None leaves it to the operands.
    """

    multiple_results = True

    def __init__(self, operation, kernel: Primitive):
        """`operation` is an `Operation`, `kernel` its primitive on local arrays."""
        super().__init__(operation.name)
        self.operation, self.kernel = operation, kernel
        self.def_abstract_eval(self._types_of_results)
        self.def_impl(lambda *operands, **params: _run_eagerly(self, tuple(params.items()), *operands))
        batching.fancy_primitive_batchers[self] = self._batch
        mlir.register_lowering(self, self._lower)
        prim_requires_devices_during_lowering.add(self)

    def bind(self, *operands, mapped=(), out_spec=None, **params):
        """The results, a list. Operands on Explicit axes are first brought to where the kernel needs them."""
        avals = [jax.typeof(x) for x in operands]
        if explicit.has_plan(avals, out_spec):
            shapes = [shape for shape, _ in self.results(avals, mapped, **params)]
            rule = self._rule(avals, mapped, params)
            operands = explicit.place(self.name, rule, operands, shapes, out_spec)
        return super().bind(*operands, mapped=mapped, out_spec=out_spec, **params)

    def results(self, avals, mapped=(), **params):
        """Shapes and dtypes of the results, mapped axes included."""
        results = self.operation.results(*_without_mapped(avals, mapped), **_of_operation(params))
        sizes, done = [], [0] * len(avals)  # done: mapped axes of each operand
        for flags in mapped:
            sizes.append(next(x.shape[i] for x, i, flag in zip(avals, done, flags, strict=True) if flag))
            done = [i + flag for i, flag in zip(done, flags, strict=True)]
        return [((*sizes, *shape), dtype) for shape, dtype in results]

    def _rule(self, avals, mapped, params):
        rule = self.operation.sharding(*_without_mapped(avals, mapped), **_of_operation(params))
        return rule.mapped(mapped)

    def _plan(self, avals, mapped, out_spec, params):
        """Where things lie on Explicit axes; None where nothing is, or shall be, sharded over one."""
        if not explicit.has_plan(avals, out_spec):
            return None
        shapes = [shape for shape, _ in self.results(avals, mapped, **params)]
        return explicit.plan_of_types(self._rule(avals, mapped, params), avals, shapes, out_spec)

    def _types_of_results(self, *avals, mapped, out_spec, **params):
        results, plan = self.results(avals, mapped, **params), self._plan(avals, mapped, out_spec, params)
        # NOTES: a mesh with Explicit axes wants as many entries of the spec as there are axes.
        specs = plan.results if plan else [PartitionSpec(*[None] * len(shape)) for shape, _ in results]
        return [avals[0].update(shape=shape, dtype=dtype, weak_type=False,
                                sharding=avals[0].sharding.update(spec=spec))
                for (shape, dtype), spec in zip(results, specs, strict=True)]

    def _batch(self, axis, operands, dims, *, mapped, out_spec, **params):
        flags = tuple(dim is not None for dim in dims)
        if not any(flags):
            results = self.bind(*operands, mapped=mapped, out_spec=out_spec, **params)
            return results, [None] * len(results)
        fronts = [batching.bdim_at_front(x, dim, axis.size, axis.explicit_mesh_axis) if flag else x
                  for x, dim, flag in zip(operands, dims, flags, strict=True)]
        if out_spec is not None:
            out_spec = PartitionSpec(axis.explicit_mesh_axis, *out_spec)
        results = self.bind(*fronts, mapped=(flags, *mapped), out_spec=out_spec, **params)
        return results, [0] * len(results)

    def _lower(self, ctx, *operands, mapped, out_spec, **params):
        avals = ctx.avals_in
        plan, mesh = self._plan(avals, mapped, out_spec, params), auto.mesh_of(ctx)
        call = shard.Call(self.name, self.kernel, self._rule(avals, mapped, params), mapped, params)
        if plan is not None:
            run = partial(explicit.run, call, plan, avals[0].sharding.mesh)
        elif mesh is not None:
            run = partial(auto.run, call, mesh)
        else:
            # Also within shard_map where some axes are still Auto: custom_partitioning is not told the mesh
            # in there, and XLA gathers over those axes what it cannot look into.
            run = partial(shard.run_alone, call)
        return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


@partial(jax.jit, static_argnums=(0, 1))
def _run_eagerly(primitive, params, *operands):
    return primitive.bind(*operands, **dict(params))


def _of_operation(params):
    return {name: value for name, value in params.items() if name != "implementation"}


def _without_mapped(avals, mapped):
    """The operands' types as the operation itself knows them."""
    counts = [sum(flags) for flags in zip(*mapped, strict=True)] if mapped else [0] * len(avals)
    return [jax.ShapeDtypeStruct(x.shape[count:], x.dtype) for x, count in zip(avals, counts, strict=True)]
