"""What an operation of this library is to JAX: a primitive with its type, batching, lowering and sharding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import PartitionSpec

from jax_fp8gemm.mesh import explicit
from jax_fp8gemm.mesh.primitive import MeshPrimitive
from jax_fp8gemm.mesh.rule import Rule
from jax_fp8gemm.mesh.shard import match_varying, over_mapped

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
      sharding: (*operands, **params) -> how they may lie on a mesh: a row of `sharding.py`.
    """

    name: str
    results: Callable
    batch: Callable
    reference: Callable
    hopper: Callable
    sharding: Callable[..., Rule]


def register(operation: Operation) -> Primitive:
    """A primitive with the rules of `operation`; its parameter `implementation` picks the lowering."""
    return MeshPrimitive(operation, _kernel_primitive(operation))


def _kernel_primitive(operation: Operation) -> Primitive:
    """The operation on local arrays: one launch, whatever is mapped over."""
    primitive = Primitive(f"{operation.name}_kernel")
    primitive.multiple_results = True

    @primitive.def_abstract_eval
    def types_of_results(*operands, implementation, surroundings=None, **params):
        of_rank = lambda rank: operands[0].sharding.update(spec=PartitionSpec(*[None] * rank))
        return [operands[0].update(shape=shape, dtype=dtype, weak_type=False, sharding=of_rank(len(shape)))
                for shape, dtype in operation.results(*operands, **params)]

    batching.fancy_primitive_batchers[primitive] = partial(operation.batch, primitive)
    mlir.register_lowering(primitive, partial(_lower_elsewhere, operation))
    mlir.register_lowering(primitive, partial(_lower_for_cuda, operation), platform="cuda")
    return primitive


def _lower_for_cuda(operation, ctx, *operands, implementation, surroundings=None, **params):
    empty = any(0 in aval.shape for aval in (*ctx.avals_in, *ctx.avals_out))
    if implementation == "reference" or empty:
        return _lower(operation.reference, ctx, operands, params)
    if targets_hopper():
        if surroundings is not None:
            return surroundings.run(_lower, operation.hopper, ctx, operands, params)
        return _lower(operation.hopper, ctx, operands, params)
    return _lower_elsewhere(operation, ctx, *operands, implementation=implementation, **params)


def _lower_elsewhere(operation, ctx, *operands, implementation, surroundings=None, **params):
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


def is_plain_jnp(*operands, implementation) -> bool:
    """Whether to call the reference in place of a primitive: it is asked for, or no kernel can be compiled.

    On Explicit mesh axes it is the primitive that takes care of the shardings.
    """
    if any(explicit.is_sharded(jax.typeof(x)) for x in operands):
        return False
    is_symbolic = any(jax.export.is_symbolic_dim(size) for x in operands for size in x.shape)
    return implementation == "reference" or (implementation is None and is_symbolic)


def bind_or_reference(primitive, reference, *operands, implementation, mapped=(), **params):
    """The results of `primitive`, or of its reference (`is_plain_jnp`); `mapped` as in `MeshPrimitive`."""
    if is_plain_jnp(*operands, implementation=implementation):
        return over_mapped(partial(reference, **params), mapped)(*operands)
    return primitive.bind(*operands, mapped=mapped, implementation=implementation, **params)


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
