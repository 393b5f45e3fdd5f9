"""What an operation of this library is to JAX: a primitive with its type, batching and lowering rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, PartitionSpec

HOPPER = "9.0"  # compute capability
IMPLEMENTATIONS = (None, "hopper", "reference")


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one primitive is; `register` makes it from this.

    Attributes:
      name: of the primitive, as a jaxpr shows it.
      results: (*operands, **params) -> a list of the results' shapes and dtypes.
      batch: (primitive, axis, operands, dims, **params) -> the results and their batched dimensions, two
        lists; dims are as for `jax.vmap`.
      reference: (*operands, **params) -> a list of the results, in plain jnp.
      hopper: the same through the custom call; never sees an empty operand or result.
    """

    name: str
    results: Callable
    batch: Callable
    reference: Callable
    hopper: Callable


def register(operation: Operation) -> Primitive:
    """A primitive with the rules of `operation`; its parameter `implementation` picks the lowering."""
    primitive = Primitive(operation.name)
    primitive.multiple_results = True

    @primitive.def_abstract_eval
    def types_of_results(*operands, implementation, **params):
        if any(map(is_explicitly_sharded, operands)):
            raise NotImplementedError(f"{operation.name}: an operand is sharded over an Explicit mesh axis; "
                                      "call it inside jax.shard_map")
        # NOTES: a mesh with Explicit axes wants as many entries of the spec as there are axes.
        of_rank = lambda rank: operands[0].sharding.update(spec=PartitionSpec(*[None] * rank))
        return [operands[0].update(shape=shape, dtype=dtype, weak_type=False, sharding=of_rank(len(shape)))
                for shape, dtype in operation.results(*operands, **params)]

    primitive.def_impl(lambda *operands, **params: _run_eagerly(primitive, tuple(params.items()), *operands))
    batching.fancy_primitive_batchers[primitive] = partial(operation.batch, primitive)
    mlir.register_lowering(primitive, partial(_lower_elsewhere, operation))
    mlir.register_lowering(primitive, partial(_lower_for_cuda, operation), platform="cuda")
    return primitive


@partial(jax.jit, static_argnums=(0, 1))
def _run_eagerly(primitive, params, *operands):
    return primitive.bind(*operands, **dict(params))


def _lower_for_cuda(operation, ctx, *operands, implementation, **params):
    empty = any(0 in aval.shape for aval in (*ctx.avals_in, *ctx.avals_out))
    if implementation == "reference" or empty:
        return _lower(operation.reference, ctx, operands, params)
    if targets_hopper():
        return _lower(operation.hopper, ctx, operands, params)
    return _lower_elsewhere(operation, ctx, *operands, implementation=implementation, **params)


def _lower_elsewhere(operation, ctx, *operands, implementation, **params):
    if implementation == "hopper":
        platform = " or ".join(ctx.module_context.platforms)
        raise NotImplementedError(
            f"{operation.name}: implementation='hopper' needs an NVIDIA Hopper GPU (compute capability "
            f"{HOPPER}), but is lowered for {platform}; implementation=None runs there too")
    return _lower(operation.reference, ctx, operands, params)


def _lower(function, ctx, operands, params):
    return mlir.lower_fun(partial(function, **params), multiple_results=True)(ctx, *operands)


def targets_hopper() -> bool:
    """Whether lowering for CUDA is for Hopper; where JAX sees no NVIDIA GPU (cross-compilation) it is."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return True
    return all(device.compute_capability == HOPPER for device in devices)


def is_explicitly_sharded(aval) -> bool:
    """Whether an array of this type (`jax.typeof`) is sharded over an Explicit mesh axis."""
    return AxisType.Explicit in aval.sharding.mesh.axis_types and any(aval.sharding.spec)


def suits_kernel(*operands) -> bool:
    """Whether a kernel can be compiled for these, and run where they are."""
    return not any(is_explicitly_sharded(jax.typeof(x)) or any(map(jax.export.is_symbolic_dim, x.shape))
                   for x in operands)


def bind_or_reference(primitive, reference, *operands, implementation, **params):
    """The results of `primitive`, or of its reference where that is asked for or no kernel can be."""
    if implementation == "reference" or (implementation is None and not suits_kernel(*operands)):
        return reference(*operands, **params)
    return primitive.bind(*operands, implementation=implementation, **params)


def fold_into_batch(primitive, axis, operands, dims, **params):
    """The batch rule of a primitive all of whose operands and results have a batch axis first.

    The mapped axis goes into it, for one launch; an operand that is not mapped is repeated, unless none is.
    """
    if all(dim is None for dim in dims):
        results = primitive.bind(*operands, **params)
        return results, [None] * len(results)
    fronts = [batching.bdim_at_front(x, dim, axis.size, axis.explicit_mesh_axis)
              for x, dim in zip(operands, dims, strict=True)]
    batch = fronts[0].shape[1]
    folded = [x.reshape(axis.size * batch, *x.shape[2:]) for x in fronts]
    results = primitive.bind(*match_varying(*folded), **params)
    return [x.reshape(axis.size, batch, *x.shape[1:]) for x in results], [0] * len(results)


def match_varying(*arrays):
    """The arrays, cast to vary over the same manual mesh axes, as operands must inside shard_map."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(sorted(frozenset.union(*varying) - axes)) for axes in varying]
    return [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(arrays, missing, strict=True)]
