"""How each primitive lies on a mesh of devices: THE table, one rule for each.

A rule names the dimensions of operands and results (`mesh/rule.py` has the language). From it follow, in
every mesh mode, which shards a device computes in place, what is summed over devices, and what is refused:

| mesh axes                   | a call                                                    | in               |
|-----------------------------|-----------------------------------------------------------|------------------|
| none, or Manual (shard_map) | is the kernel on the arrays at hand                       | mesh/shard.py    |
| Auto                        | is partitioned by XLA, which asks here when it compiles   | mesh/auto.py     |
| Explicit                    | is planned when it is traced, and becomes a shard_map     | mesh/explicit.py |

Over a factor of operands alone, as K is, devices sum up their f32 terms in one reduce, and round once. Scales
follow their values; where a shard would not be whole blocks of them, the dimension is gathered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8gemm.jit.problem import MASKED, RAGGED_M, SCALE_BLOCK
from jax_fp8gemm.mesh.exchange import from_halves, to_halves
from jax_fp8gemm.mesh.rule import Rule, rule
from jax_fp8gemm.reference import batch_size, group_bounds, rows_per_scale

# Why tokens that are sorted by group cannot be sharded, and what to do instead; {axes} is filled in.
_SORTED = """\
All tokens are sorted by group, whatever device they are on, so that no device has what its shard needs. Let \
every device sort its own tokens, inside of jax.shard_map:

    def experts(x, expert_ids, weights, w):  # of one device: its tokens, and the weights
        rows, group_sizes, positions = permute(x, expert_ids, num_experts)
        return unpermute(fp8_gemm_ragged_m(rows, w, group_sizes), positions, weights)

    tokens = P({axes})
    in_specs = (tokens, tokens, tokens, P())
    jax.shard_map(experts, in_specs=in_specs, out_specs=tokens)(x, expert_ids, weights, w)
"""
_SORTED_GRADIENT = """\
All tokens are sorted by group, whatever device they are on, so that no device has what its shard needs. Let \
every device take the gradient of its own tokens, inside of jax.shard_map, and add them up:

    def gradient(x, dy, group_sizes):  # of one device: its tokens, sorted, and the sizes of its groups [1, G]
        x, dy = (quantize_transposed(array, group_sizes[0]) for array in (x, dy))
        return jax.lax.psum(fp8_gemm_ragged_k(dy, x, group_sizes[0]), {axes})

    jax.shard_map(gradient, in_specs=P({axes}), out_specs=P())(x, dy, group_sizes)
"""

# ---- the GEMMs


def gemm(lhs, lhs_scale, rhs, rhs_scale, *accumulator, batch_invariant, **_) -> Rule:
    batch = batch_size(lhs.shape[0], rhs.shape[0])
    whole = {"k": "batch_invariant=True allows no sum over devices"} if batch_invariant else {}
    return _product(_factors(batch, lhs, "m k", rhs, "n k", rhs_scale), "b m n", accumulator, whole=whole)


def gemm_ragged_m(lhs, lhs_scale, rhs, rhs_scale, group_sizes, **_) -> Rule:
    factors = _factors(group_sizes.shape[0], lhs, "m k", rhs, "g n k", rhs_scale)
    return _product({**factors, "group_sizes": "b ."}, "b m n", order="b m g n k", disjoint=frozenset("g"),
                    refused={"m": _SORTED}, local=_rows_of_own_groups)


def gemm_masked(lhs, lhs_scale, rhs, rhs_scale, group_sizes, **_) -> Rule:
    factors = _factors(group_sizes.shape[0], lhs, "g m k", rhs, "g n k", rhs_scale)
    return _product({**factors, "group_sizes": "b g"}, "b g m n", local=_own_rows_of_groups)


def gemm_ragged_k(lhs, lhs_scale, rhs, rhs_scale, group_sizes, *accumulator, **_) -> Rule:
    factors = _factors(group_sizes.shape[0], lhs, "m k", rhs, "n k", rhs_scale)
    return _product({**factors, "group_sizes": "b ."}, "b g m n", accumulator,
                    refused={"k": _SORTED_GRADIENT}, local=_columns_of_own_groups)


def _factors(batch, lhs, lhs_dims, rhs, rhs_dims, rhs_scale):
    """The operands that are multiplied, each with the batch in front or, where that shares it, a 1."""
    lhs_dims, rhs_dims = (f"{'b' if x.shape[0] == batch else '.'} {dims}"
                          for x, dims in ((lhs, lhs_dims), (rhs, rhs_dims)))
    in_blocks = lambda dims: dims.replace("k", f"k/{SCALE_BLOCK}")
    rhs_rows = f"n/{rows_per_scale(rhs, rhs_scale)}"
    return {"lhs": lhs_dims, "lhs.scales": in_blocks(lhs_dims),
            "rhs": rhs_dims, "rhs.scales": in_blocks(rhs_dims).replace("n", rhs_rows)}


def _product(operands, result, accumulator=(), **options):
    if accumulator:
        operands, options = {**operands, "accumulator": result}, {**options, "accumulator": len(operands)}
    return rule(operands, {"the result": result}, takes_out_sharding=True, **options)


def _rows_of_own_groups(part, kernel, lhs, lhs_scale, rhs, rhs_scale, group_sizes):
    """G sharded: a device has the weights of some groups, all rows, and computes those of its groups.

    They go in front for the kernel, which begins with the first row, and back to their place afterwards.
    """
    if not part.is_sharded("g"):
        return kernel(lhs, lhs_scale, rhs, rhs_scale, group_sizes)
    starts, ends = group_bounds(group_sizes, lhs.shape[1])
    first, sizes = _own_groups(part, rhs.shape[1], starts, ends - starts)
    (out,) = kernel(_shift(lhs, -first, 1), _shift(lhs_scale, -first, 1), rhs, rhs_scale, sizes)
    return [_shift(out, first, 1)]


def _columns_of_own_groups(part, kernel, lhs, lhs_scale, rhs, rhs_scale, group_sizes, *accumulator):
    """G sharded: a device computes the weight gradients of some groups, of which it has all columns."""
    if not part.is_sharded("g"):
        return kernel(lhs, lhs_scale, rhs, rhs_scale, group_sizes, *accumulator)
    num_blocks = group_sizes // SCALE_BLOCK + (group_sizes % SCALE_BLOCK > 0)
    starts, ends = group_bounds(num_blocks, lhs_scale.shape[2])
    first, blocks = _own_groups(part, group_sizes.shape[1] // part.count("g"), starts, ends - starts)
    lhs, rhs = (_shift(x, -first * SCALE_BLOCK, 2) for x in (lhs, rhs))
    lhs_scale, rhs_scale = (_shift(x, -first, 2) for x in (lhs_scale, rhs_scale))
    return kernel(lhs, lhs_scale, rhs, rhs_scale, blocks * SCALE_BLOCK, *accumulator)


def _own_groups(part, count, starts, sizes):
    """Of starts and sizes [B, G]: where the first own group starts [B], the sizes of the `count` own ones."""
    begin = part.index("g") * count
    own = lambda x: lax.dynamic_slice_in_dim(x, begin, count, axis=1)
    return own(starts)[:, 0], own(sizes)


def _shift(x, steps, axis):
    """x [B, ...] moved by steps [B] along an axis; zeros come in. x [1, ...] becomes [B, ...]."""
    size = x.shape[axis]
    x = jnp.broadcast_to(x, (*steps.shape, *x.shape[1:]))
    padded = jnp.pad(x, [(size, size) if i == axis else (0, 0) for i in range(x.ndim)])
    take = lambda x, start: lax.dynamic_slice_in_dim(x, start, size, axis - 1)
    return jax.vmap(take)(padded, size - steps)


def _own_rows_of_groups(part, kernel, lhs, lhs_scale, rhs, rhs_scale, group_sizes):
    """M sharded: of the first rows of every group, a device has those that lie in its shard."""
    return kernel(lhs, lhs_scale, rhs, rhs_scale, _in_own_rows(part, group_sizes, lhs.shape[2]))


def _in_own_rows(part, sizes, rows):
    """How many of the first `sizes` rows are among the `rows` that this device has of M."""
    if not part.is_sharded("m"):
        return sizes
    return jnp.clip(sizes, 0, rows * part.count("m")) - part.index("m") * rows


# ---- the quantisers


def quantize(x, *, granularity, **_) -> Rule:
    rows, columns = granularity
    return rule({"x": "b r c"}, {"values": "b r c", "scales": f"b r/{rows} c/{columns}"})


def quantize_swiglu(x, *group_sizes, kind, **_) -> Rule:
    sizes = {RAGGED_M: {"group_sizes": "b ."}, MASKED: {"group_sizes": "b"}, None: {}}[kind]
    refused = {"m": _SORTED} if kind == RAGGED_M else {}
    return rule({"x": "b m 2*f", **sizes}, {"values": "b m f", "scales": f"b m f/{SCALE_BLOCK}"},
                refused=refused, local=_halves_and_own_rows)


def _halves_and_own_rows(part, kernel, x, *group_sizes):
    """F sharded: a device has neighbouring columns of gate | up, and needs the same part of either."""
    if part.is_sharded("f"):
        x = to_halves(x, part.axes["f"], part.count("f"), axis=2)
    if group_sizes and group_sizes[0].ndim == 1:  # masked
        group_sizes = [_in_own_rows(part, group_sizes[0], x.shape[1])]
    return kernel(x, *group_sizes)


def quantize_transposed(x, group_sizes, **_) -> Rule:
    return rule({"x": "b t n", "group_sizes": "b ."}, {"values": "b n .", "scales": "b n ."},
                refused={"t": _SORTED_GRADIENT})


# ---- the quantisers of a training step


def quantize_both(x, *group_sizes, **_) -> Rule:
    rows = {"rows": "b t n", "row scales": f"b t n/{SCALE_BLOCK}"}
    columns, options = _columns(x.shape[1], group_sizes, columns="n")
    return rule({"x": "b t n", **_sizes(group_sizes)}, {**rows, **columns}, **options)


def quantize_weights(w, **_) -> Rule:
    blocks = "b {}/{rows} {}/{rows}".format
    return rule({"w": "b k n"}, {"forward": "b n k", "forward scales": blocks("n", "k", rows=SCALE_BLOCK),
                                 "backward": "b k n", "backward scales": blocks("k", "n", rows=SCALE_BLOCK)})


def quantize_swiglu_backward(gate_up, d_hidden, *group_sizes, **_) -> Rule:
    rows = {"rows": "b t 2*f", "row scales": f"b t 2*f/{SCALE_BLOCK}"}
    columns, options = _columns(gate_up.shape[1], group_sizes, columns="2*f")
    hidden, _ = _columns(gate_up.shape[1], group_sizes, columns="f", name="hidden column")
    return rule({"gate_up": "b t 2*f", "d_hidden": "b t f", **_sizes(group_sizes)},
                {**rows, **columns, **hidden}, local=_halves_there_and_back, **options)


def _sizes(group_sizes):
    return {"group_sizes": "b ."} if group_sizes else {}


def _columns(tokens, group_sizes, *, columns, name="column"):
    """Results that are quantised along the tokens, and what that means for these."""
    if group_sizes or tokens % SCALE_BLOCK:
        options = {"refused": {"t": _SORTED}} if group_sizes else {
            "whole": {"t": f"{tokens} tokens are no whole blocks of {SCALE_BLOCK}"}}
        return {f"{name}s": f"b {columns} .", f"{name} scales": f"b {columns} ."}, options
    return {f"{name}s": f"b {columns} t", f"{name} scales": f"b {columns} t/{SCALE_BLOCK}"}, {}


def _halves_there_and_back(part, kernel, gate_up, d_hidden, *group_sizes):
    """F sharded: as `_halves_and_own_rows`, and the gradients of gate | up are neighbouring columns again."""
    if not part.is_sharded("f"):
        return kernel(gate_up, d_hidden, *group_sizes)
    where = part.axes["f"], part.count("f")
    rows, row_scales, columns, column_scales, *hidden = kernel(
        to_halves(gate_up, *where, axis=2), d_hidden, *group_sizes)
    gradients = (rows, 2), (row_scales, 2), (columns, 1), (column_scales, 1)
    return [*(from_halves(x, *where, axis=axis) for x, axis in gradients), *hidden]


# ---- around the grouped GEMMs


def sort_by_expert(expert_ids, **_) -> Rule:
    return rule({"expert_ids": "b t ."}, {"group_sizes": "b .", "positions": "b t .", "num_rows": "b"},
                refused={"t": _SORTED})


def permute(x, positions, num_rows, **_) -> Rule:
    return rule({"x": "b t k", "positions": "b t .", "num_rows": "b"},
                {"values": "b . k", "scales": f"b . k/{SCALE_BLOCK}"}, refused={"t": _SORTED})
