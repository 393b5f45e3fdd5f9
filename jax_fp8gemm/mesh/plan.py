"""From a rule and the shardings that arrays have to the ones they get, as pure functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from jax_fp8gemm.mesh.rule import Array, Dim, Rule

Axes = tuple[str, ...]  # of a mesh, over which one dimension is sharded; the first is the slowest


def axes_of(entry: str | Sequence[str] | None) -> Axes:
    """The mesh axes that an entry of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call lies on a mesh: every shard is one that the kernel can compute.

    Attributes:
      axes: the mesh axes over which each factor is sharded.
      operands, results: the PartitionSpecs that follow from them.
      reduce: the mesh axes over which devices hold terms of one sum, each of them to be summed everywhere,
      scatter: or to be left scattered over a dimension of the result: (dimension, mesh axes) pairs.
    """

    axes: Mapping[str, Axes]
    operands: tuple[PartitionSpec, ...]
    results: tuple[PartitionSpec, ...]
    reduce: Axes = ()
    scatter: tuple[tuple[int, Axes], ...] = ()


def make_plan(rule: Rule, mesh: Mapping[str, int], shapes: Sequence[tuple[int, ...]],
              specs: Sequence[PartitionSpec]) -> Plan:
    """The layout nearest to the given one in which every device computes its part in place.

    Factors choose in the rule's order, each from the first array that shards it. What operands say goes
    before what is asked of the result. Where a factor cannot keep its mesh axes it is gathered: slower, but
    never wrong.

    Args:
      rule: of the call.
      mesh: the sizes of the mesh axes.
      shapes, specs: of operands, then results; a result's spec is what is asked of it.
    """
    axes = _choose(rule, mesh, shapes, specs)
    reduce = tuple(name for factor in rule.summed for name in axes.get(factor, ()))
    spec = lambda array: _spec(axes.get(dim.factor, ()) for dim in array.dims)
    operands, results = [*map(spec, rule.operands)], [*map(spec, rule.results)]
    scatter = ()
    if reduce:
        asked = specs[len(rule.operands)]
        results[0], scatter = _scatter(results[0], asked, shapes[-1], mesh, reduce)
        reduce = tuple(name for name in reduce if not any(name in names for _, names in scatter))
    if rule.accumulator is not None:
        operands[rule.accumulator] = results[0]
    return Plan(axes, tuple(operands), tuple(results), reduce, scatter)


def _choose(rule, mesh, shapes, specs):
    sizes, axes, used = rule.sizes(shapes), {}, set()
    arrays = list(zip(rule.arrays(), specs, strict=True))
    last = [rule.accumulator, *range(len(rule.operands), len(arrays))]
    first = [i for i in range(len(rule.operands)) if i not in last]
    for hints in ([arrays[i] for i in first], [arrays[i] for i in last if i is not None]):
        for factor in rule.order:
            given = [given for array, spec in hints if (given := axes_given(array, spec, factor))]
            if factor in axes or not given:
                continue
            may_be_cut = factor not in rule.whole and factor not in rule.refused
            kept = fitting(given[0], sizes[factor], rule.block(factor), mesh, used)
            if kept and (may_be_cut or num_parts(mesh, kept) == 1):
                axes[factor] = kept
                used.update(kept)
    return axes


def axes_given(array: Array, spec: PartitionSpec, factor: str) -> Axes:
    """The mesh axes over which an array is sharded along a factor; none for what follows other arrays."""
    for dim, entry in zip(array.dims, spec, strict=True):
        if dim.factor == factor and not array.follows:
            return axes_of(entry)
    return ()


def fitting(axes: Axes, size: int, block: int, mesh: Mapping[str, int], used: set[str]) -> Axes:
    """As many of the axes, from the first on, as are free and cut `size` into whole blocks."""
    for count in range(len(axes), 0, -1):
        kept = axes[:count]
        parts = num_parts(mesh, kept)
        if not used.intersection(kept) and (parts == 1 or size % (block * parts) == 0):
            return kept
    return ()


def num_parts(mesh: Mapping[str, int], axes: Axes) -> int:
    """In how many parts the mesh axes cut a dimension; those of size 1 leave it whole."""
    return math.prod(mesh[name] for name in axes)


def _spec(axes):
    return PartitionSpec(*[names[0] if len(names) == 1 else names or None for names in axes])


def _scatter(spec, asked, shape, mesh, reduce):
    """The result's spec with those axes of the sum that it is asked to be scattered over, and where."""
    entries, scatter = [*map(axes_of, spec)], []
    for dim, wanted in enumerate(map(axes_of, asked)):
        kept = entries[dim]
        extra = wanted[len(kept):]
        fits = wanted[:len(kept)] == kept and shape[dim] % num_parts(mesh, wanted) == 0
        if extra and fits and set(extra) <= set(reduce):
            entries[dim] = wanted
            scatter.append((dim, extra))
    return _spec(entries), tuple(scatter)


# ---- what a plan had to change, in words


def refusal(rule: Rule, mesh: Mapping[str, int], specs: Sequence[PartitionSpec]) -> str | None:
    """Why this cannot be computed at all, and what to do instead; None where it can."""
    for array, spec in zip(rule.operands, specs, strict=False):
        for dim, entry in zip(array.dims, spec, strict=True):
            axes = axes_of(entry)
            if dim.factor in rule.refused and num_parts(mesh, axes) > 1:
                message = rule.refused[dim.factor].format(axes=_quoted(axes))
                return f"{_where(dim, array, axes)}. {message}"
    return None


def contradiction(rule: Rule, specs: Sequence[PartitionSpec]) -> str | None:
    """Two operands that are sharded differently along one factor; None where there are none."""
    seen = {}
    for array, spec in zip(rule.operands, specs, strict=False):
        for dim, entry in zip(array.dims, spec, strict=True):
            axes = axes_of(entry)
            if not axes or dim.factor is None or array.follows:
                continue
            other, other_axes = seen.setdefault(dim.factor, (array, axes))
            if axes != other_axes:
                return (f"{_where(dim, other, other_axes)}, but over {_quoted(axes)} in {array.name}; "
                        "jax.sharding.reshard one of them")
    return None


def openness(rule: Rule, mesh: Mapping[str, int], shapes: Sequence[tuple[int, ...]],
             specs: Sequence[PartitionSpec], plan: Plan) -> str | None:
    """Why operands leave the result's sharding open; None where they do not."""
    sizes = rule.sizes(shapes)
    for array, spec in zip(rule.operands, specs, strict=False):
        for dim, entry in zip(array.dims, spec, strict=True):
            axes = axes_of(entry)
            if not axes or dim.factor is None or array.follows or plan.axes.get(dim.factor) == axes:
                continue
            return f"{_where(dim, array, axes)}{_reason(rule, dim, axes, sizes, mesh)}"
    for factor in rule.summed:
        axes = plan.axes.get(factor)
        if axes:
            return f"{factor.upper()} is sharded over {_quoted(axes)}, and the result is a sum over it"
    return None


def _reason(rule, dim, axes, sizes, mesh):
    if dim.factor in rule.whole:
        return f": {rule.whole[dim.factor]}"
    size, block, parts = sizes[dim.factor], rule.block(dim.factor), num_parts(mesh, axes)
    if size % (block * parts):
        return f": {size} over {parts} devices makes no whole blocks of {block}"
    return ", over which another dimension is sharded too"


def _where(dim: Dim, array: Array, axes: Axes) -> str:
    return f"{dim} is sharded over {_quoted(axes)} in {array.name}"


def _quoted(axes: Axes) -> str:
    return repr(axes[0] if len(axes) == 1 else axes)
