"""The language of sharding rules: which dimension of which array is which factor of the computation.

A rule names the dimensions of each operand and result, as in `b m k/128`:

| dimension | is |
|---|---|
| `m` | the factor m: may be sharded, and is then sharded equally wherever m occurs |
| `k/128` | the blocks of 128 of k: a shard of k has to be whole blocks |
| `2*f` | two halves, each of them f: every device gets the same part of either |
| `.` | nothing that could be sharded |

A factor of operands alone is summed over.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

MAPPED = "mapped"  # and a number: the factor of an axis of vmap


class Dim(NamedTuple):
    """One dimension: its factor (None where nothing may be sharded), how much of that an index stands for,
    and how many copies of it follow one another."""

    factor: str | None
    block: int = 1
    copies: int = 1

    @staticmethod
    def parse(text: str) -> Dim:
        if text == ".":
            return Dim(None)
        copies, factor, block = re.fullmatch(r"(?:(\d+)\*)?([a-z]\w*)(?:/(\d+))?", text).groups()
        return Dim(factor, int(block or 1), int(copies or 1))

    def __str__(self) -> str:
        if self.factor.startswith(MAPPED):
            return "a mapped axis"
        return f"{self.copies if self.copies > 1 else ''}{self.factor.upper()}"


@dataclasses.dataclass(frozen=True)
class Array:
    """An operand or a result: its name for people, and its dimensions."""

    name: str
    dims: tuple[Dim, ...]

    @property
    def follows(self) -> bool:
        """Whether its sharding has no say: scales lie where their values do."""
        return self.name.endswith("scales")


def run_kernel(part, kernel, *operands):
    """What a device does with its shards where that is just the operation itself."""
    return kernel(*operands)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the operands and results of one call may lie on a mesh.

    Attributes:
      operands, results: their dimensions.
      order: all factors; those that come first choose their mesh axes first.
      whole: factors that cannot be sharded, each with the reason; where a user shards one, it is gathered.
      refused: factors that must not even be gathered, each with what to do instead.
      disjoint: factors that are summed over, but of whose terms only one is not zero.
      accumulator: the operand that is added to the sum, if any.
      takes_out_sharding: whether the caller can say where the result shall lie.
      local: (part, kernel, *operands) -> results: what a device does with its shards. `kernel` is the
        operation on local arrays, `part` tells which part of a factor these are (`shard.Part`).
    """

    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    order: tuple[str, ...]
    whole: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    disjoint: frozenset[str] = frozenset()
    accumulator: int | None = None
    takes_out_sharding: bool = False
    local: Callable = run_kernel

    @property
    def summed(self) -> tuple[str, ...]:
        """The factors that no result has."""
        kept = {dim.factor for array in self.results for dim in array.dims}
        return tuple(factor for factor in self.order if factor not in kept)

    def arrays(self) -> tuple[Array, ...]:
        return self.operands + self.results

    def block(self, factor: str) -> int:
        """What a shard of the factor has to be a multiple of."""
        return max(dim.block for array in self.arrays() for dim in array.dims if dim.factor == factor)

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """The sizes of factors, from the shapes of operands and results."""
        sizes = {}
        for array, shape in zip(self.arrays(), shapes, strict=True):
            for dim, size in zip(array.dims, shape, strict=True):
                if dim.factor is not None and dim.block == 1:
                    sizes[dim.factor] = size // dim.copies
        return sizes

    def mapped(self, flags: Sequence[Sequence[bool]]) -> Rule:
        """The rule under `vmap`: for each mapped axis, the outermost first, which operands have it in front.

        Results have all of them.
        """
        names = [f"{MAPPED}{i}" for i in range(len(flags))]

        def in_front(array: Array, has: Sequence[bool]) -> Array:
            front = tuple(Dim(name) for name, flag in zip(names, has, strict=True) if flag)
            return Array(array.name, front + array.dims)

        of_operand = zip(*flags, strict=True) if flags else [()] * len(self.operands)
        return dataclasses.replace(
            self, order=(*names, *self.order),
            operands=tuple(map(in_front, self.operands, of_operand)),
            results=tuple(in_front(array, [True] * len(flags)) for array in self.results))


def rule(operands: Mapping[str, str], results: Mapping[str, str], *, order: str | None = None,
         **options) -> Rule:
    """A `Rule` from its arrays' dimensions as text, by their names.

    Factors choose in the order in which they stand in results, then in operands, unless `order` says another.

    Example:
      >>> rule({"lhs": "m k", "rhs": "n k"}, {"the result": "m n"}).summed
      ('k',)
    """
    parse = lambda name, text: Array(name, tuple(map(Dim.parse, text.split())))
    operands, results = (tuple(parse(*item) for item in arrays.items()) for arrays in (operands, results))
    if order is None:
        factors = (dim.factor for array in results + operands for dim in array.dims)
        order = " ".join(dict.fromkeys(factor for factor in factors if factor is not None))
    return Rule(operands, results, tuple(order.split()), **options)
