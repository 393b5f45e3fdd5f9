"""The problems that tests and benchmarks run: one tagged list.

>>> [w.name for w in select("decode")][:2]
['1x2112x7168', '1x7168x16384']
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

SCALE_BLOCK = 128
PROGRAM_CALLS = 20  # GEMMs in one jitted program, where wall time is measured
_PROGRAM_BYTES = 8e9  # that the operands of such a program may take


@dataclasses.dataclass(frozen=True)
class Workload:
    """One dense GEMM: e4m3 lhs [M, K] scaled 1x128, e4m3 rhs [N, K] scaled 128x128, bf16 out [M, N].

    Attributes:
      m, n, k: its sizes.
      tags: what it stands for; see TAGS.
    """

    m: int
    n: int
    k: int
    tags: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def sizes(self) -> dict[str, int]:
        """As a row of the JSON has them."""
        return {"m": self.m, "n": self.n, "k": self.k}

    @property
    def program_calls(self) -> int:
        return PROGRAM_CALLS

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: both operands with their scales read once, a bf16 output written once."""
        k_blocks, n_blocks = -(-self.k // 128), -(-self.n // 128)
        scales = 4 * k_blocks * (self.m + n_blocks)
        return self.k * (self.m + self.n) + scales + 2 * self.m * self.n


@dataclasses.dataclass(frozen=True)
class GroupedWorkload:
    """One grouped GEMM of e4m3 operands; shapes as in `jax_fp8gemm`.

    | kind     | lhs, 1x128 | rhs                | out             |
    |----------|------------|--------------------|-----------------|
    | ragged_m | [M, K]     | [G, N, K], 128x128 | [M, N] bf16     |
    | masked   | [G, M, K]  | [G, N, K], 128x128 | [G, M, N] bf16  |
    | ragged_k | [M, K]     | [N, K], 1x128      | [G, M, N] f32   |

    Attributes:
      kind: one of these.
      m, n, k: its sizes; K of ragged_k has whole blocks of 128 for every group.
      group_sizes: tokens of each group.
      tags: what it stands for; see GROUPED_TAGS.
    """

    kind: str
    m: int
    n: int
    k: int
    group_sizes: tuple[int, ...]
    tags: frozenset[str] = frozenset()

    @property
    def groups(self) -> int:
        return len(self.group_sizes)

    @property
    def tokens(self) -> int:
        return sum(self.group_sizes)

    @property
    def lhs_shape(self) -> tuple[int, ...]:
        return (self.groups, self.m, self.k) if self.kind == "masked" else (self.m, self.k)

    @property
    def rhs_shape(self) -> tuple[int, ...]:
        return (self.n, self.k) if self.kind == "ragged_k" else (self.groups, self.n, self.k)

    @property
    def lhs_scale_shape(self) -> tuple[int, ...]:
        return *self.lhs_shape[:-1], -(-self.k // SCALE_BLOCK)

    @property
    def rhs_scale_shape(self) -> tuple[int, ...]:
        rows_per_scale = 1 if self.kind == "ragged_k" else SCALE_BLOCK
        return *self.rhs_shape[:-2], -(-self.n // rows_per_scale), -(-self.k // SCALE_BLOCK)

    @property
    def expected_group_size(self) -> int:
        return max(1, round(self.tokens / self.groups))

    @property
    def name(self) -> str:
        sizes = f"{self.m}x{self.n}" if self.kind == "ragged_k" else f"{self.n}x{self.k}"
        return f"{self.kind}-{self.groups}x{self.expected_group_size}-{sizes}"

    @property
    def sizes(self) -> dict[str, int | str | list[int]]:
        """As a row of the JSON has them."""
        return {"kind": self.kind, "m": self.m, "n": self.n, "k": self.k, "group_sizes": [*self.group_sizes]}

    @property
    def flops(self) -> int:
        """Of the tokens that there are."""
        return 2 * self.tokens * self.n * (self.m if self.kind == "ragged_k" else self.k)

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: tokens and the weights of groups that have some, read or written once."""
        if self.kind == "ragged_k":
            scales = 4 * -(-self.k // SCALE_BLOCK) * (self.m + self.n)
            return self.tokens * (self.m + self.n) + scales + 4 * self.groups * self.m * self.n
        k_blocks, n_blocks = -(-self.k // SCALE_BLOCK), -(-self.n // SCALE_BLOCK)
        weights = sum(size > 0 for size in self.group_sizes) * (self.n * self.k + 4 * n_blocks * k_blocks)
        return weights + self.tokens * (self.k + 4 * k_blocks + 2 * self.n)

    @property
    def program_calls(self) -> int:
        return int(max(1, min(PROGRAM_CALLS, _PROGRAM_BYTES // self.bytes)))

    @property
    def valid_rows(self) -> np.ndarray:
        """The rows of the result that belong to a group, its leading axes flattened."""
        if self.kind == "ragged_m":
            return np.arange(self.tokens)
        if self.kind == "ragged_k":
            return np.arange(self.groups * self.m)
        return np.concatenate([g * self.m + np.arange(size) for g, size in enumerate(self.group_sizes)])


@dataclasses.dataclass(frozen=True)
class QuantizeWorkload:
    """One quantisation: bf16 to e4m3 [rows, columns] with the given granularity.

    Attributes:
      rows, columns: the sizes of the result.
      granularity: (1, 128) or (128, 128).
      swiglu: of silu(gate) * up, from bf16 [rows, 2 * columns].
    """

    rows: int
    columns: int
    granularity: tuple[int, int] = (1, 128)
    swiglu: bool = False
    has_kernel: ClassVar[bool] = True

    @property
    def name(self) -> str:
        block = f"{self.granularity[0]}x{self.granularity[1]}"
        return f"{self.rows}x{self.columns} {'swiglu ' * self.swiglu}{block}"

    @property
    def bytes(self) -> int:
        """bf16 read once, e4m3 and f32 scales written once."""
        block_rows, block_columns = self.granularity
        scales = -(-self.rows // block_rows) * -(-self.columns // block_columns)
        return (5 if self.swiglu else 3) * self.rows * self.columns + 4 * scales


@dataclasses.dataclass(frozen=True)
class MoeWorkload:
    """One of the operations around the grouped GEMMs, on bf16 and e4m3.

    Attributes:
      operation: "permute", "unpermute" or "transpose".
      tokens, columns: of the operation's bf16 side.
      groups: experts, or with "transpose" groups.
      top_k: experts of a token; 1 with "transpose".
    """

    operation: str
    tokens: int
    columns: int
    groups: int
    top_k: int

    @property
    def has_kernel(self) -> bool:
        return self.operation != "unpermute"

    @property
    def name(self) -> str:
        top_k = "" if self.operation == "transpose" else f"top {self.top_k} of "
        return f"{self.operation} {self.tokens}x{self.columns}, {top_k}{self.groups}"

    @property
    def bytes(self) -> int:
        """bf16, e4m3, f32 scales and int32 indices, read once or written once.

        Of the columns that "transpose" makes, only as many count as there are tokens.
        """
        slots, blocks = self.tokens * self.top_k, -(-self.columns // 128)
        if self.operation == "unpermute":
            return 2 * self.columns * (slots + self.tokens) + 8 * slots
        if self.operation == "permute":
            return 2 * self.tokens * self.columns + slots * (self.columns + 4 * blocks + 8)
        return 3 * self.tokens * self.columns + 4 * -(-self.tokens // 128) * self.columns


@dataclasses.dataclass(frozen=True)
class TrainingWorkload:
    """Forward and backward of a layer on bf16 x [tokens, K].

    Attributes:
      tokens, k: of x.
      n: x @ w [K, N], without groups.
      f: of experts, w [G, K, 2F] and [G, F, K].
      group_sizes: tokens of each expert.
    """

    tokens: int
    k: int
    n: int = 0
    f: int = 0
    group_sizes: tuple[int, ...] = ()

    @property
    def out_features(self) -> int:
        return self.k if self.group_sizes else self.n

    @property
    def weight_shapes(self) -> tuple[tuple[int, ...], ...]:
        if not self.group_sizes:
            return ((self.k, self.n),)
        groups = len(self.group_sizes)
        return (groups, self.k, 2 * self.f), (groups, self.f, self.k)

    @property
    def name(self) -> str:
        if not self.group_sizes:
            return f"{self.tokens}x{self.k}x{self.n}"
        groups = len(self.group_sizes)
        return f"{groups}x{round(self.tokens / groups)} experts {self.k}x{self.f}"

    @property
    def flops(self) -> int:
        """Of the three GEMMs that each weight has."""
        return 6 * self.tokens * self.k * (3 * self.f if self.group_sizes else self.n)


@dataclasses.dataclass(frozen=True)
class TrainingQuantizeWorkload:
    """One quantisation of bf16 to e4m3 by rows and by columns.

    Attributes:
      operation: "both" of x [rows, columns], "weights" of w [batch, rows, columns], or "swiglu backward" of
        gate_up [rows, 2 * columns] and d_hidden [rows, columns].
      rows, columns: the sizes.
      groups: of the rows; 0 is none of them.
      batch: weights.
    """

    operation: str
    rows: int
    columns: int
    groups: int = 0
    batch: int = 1
    has_kernel: ClassVar[bool] = True

    @property
    def name(self) -> str:
        batch = f"{self.batch}x" if self.batch > 1 else ""
        groups = f", {self.groups}" if self.groups else ""
        return f"{self.operation} {batch}{self.rows}x{self.columns}{groups}"

    @property
    def operand_shapes(self) -> tuple[tuple[int, ...], ...]:
        if self.operation == "weights":
            return ((self.batch, self.rows, self.columns),)
        if self.operation == "both":
            return ((self.rows, self.columns),)
        return (self.rows, 2 * self.columns), (self.rows, self.columns)

    @property
    def bytes(self) -> int:
        """bf16 read once, e4m3 and f32 scales written once, of as many tokens by columns as by rows."""
        blocks = lambda size: -(-size // SCALE_BLOCK)
        if self.operation == "weights":
            scales = 2 * blocks(self.rows) * blocks(self.columns)
            return self.batch * (4 * self.rows * self.columns + 4 * scales)
        by_columns = lambda columns: self.rows * columns + 4 * blocks(self.rows) * columns
        by_rows = lambda columns: self.rows * columns + 4 * self.rows * blocks(columns)
        if self.operation == "both":
            return 2 * self.rows * self.columns + by_rows(self.columns) + by_columns(self.columns)
        return (6 * self.rows * self.columns + by_rows(2 * self.columns) + by_columns(2 * self.columns)
                + by_columns(self.columns))


TAGS = {
    "decode": "a few tokens: bound by reading the weights",
    "batch": "64 or 128 tokens: still bound by the weights, with arithmetic to hide",
    "prefill": "4096 tokens: bound by the tensor cores",
    "square": "the usual yardstick of tensor-core rate",
    "dense": "a row of the README's table",
    "sustained": "also run back to back for seconds, where power limits",
    "quick": "the short list behind --quick",
}

# N x K of DeepSeek-V3's projections, a rank's share where the layer is tensor parallel.
_PROJECTIONS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
_TOKENS = {64: "batch", 128: "batch", 4096: "prefill"}
_SUSTAINED = {(4096, 7168, 16384), (4096, 4096, 7168), (8192, 8192, 8192)}
_QUICK = {(64, 4096, 7168), (128, 7168, 2048), (4096, 4096, 7168)}


def _workload(m: int, n: int, k: int, *tags: str) -> Workload:
    extra = [tag for tag, shapes in (("sustained", _SUSTAINED), ("quick", _QUICK)) if (m, n, k) in shapes]
    return Workload(m, n, k, frozenset([*tags, *extra]))


WORKLOADS: tuple[Workload, ...] = (
    *(_workload(m, n, k, kind, "dense") for m, kind in _TOKENS.items() for n, k in _PROJECTIONS),
    _workload(8192, 8192, 8192, "square", "dense"),
    *(_workload(m, n, k, "decode") for m in (1, 16) for n, k in ((2112, 7168), (7168, 16384), (4096, 7168))),
)

GROUPED_TAGS = {
    "contiguous": "training and prefill: thousands of tokens per expert",
    "masked": "decoding with room for more tokens than there are",
    "masked_few": "the masked ones of 16 or 20 tokens per expert",
    "ragged_k": "weight gradients",
    "small_experts": "many experts of sizes that are no multiple of 128",
    "ragged_dot": "compared with jax.lax.ragged_dot and tokamax too",
    "sustained": "also run back to back for seconds, where power limits",
    "quick": "the short list behind --quick",
}
_EXPERT_LAYERS = ((4096, 7168), (7168, 2048))  # N x K of DeepSeek-V3's experts: up and gate, down
_MASKED = ((1, 1182), (2, 518), (4, 262), (32, 20), (32, 195), (8, 16))
_FEW_TOKENS = 32
_ROOM = 1.4  # for the tokens of a masked group, over the mean
_GROUPED_SUSTAINED = {"ragged_m-4x8192-4096x7168", "ragged_k-4x8192-4096x7168"}
_GROUPED_RAGGED_DOT = {"masked-32x20-4096x7168", "masked-32x20-7168x2048", "ragged_k-4x8192-4096x7168",
                       "ragged_k-4x8192-7168x2048"}
_GROUPED_QUICK = {"ragged_m-4x8192-4096x7168", "masked-32x20-4096x7168", "ragged_k-4x8192-4096x7168"}


def _around(mean: int, groups: int) -> tuple[int, ...]:
    """Sizes from 0.7 to 1.3 of their mean."""
    drawn = np.random.default_rng([mean, groups]).uniform(0.7, 1.3, groups)
    return tuple(int(size) for size in np.rint(mean * drawn / drawn.mean()))


def _routed(tokens: int, experts: int, top_k: int) -> tuple[int, ...]:
    """Tokens per expert, where each one goes to `top_k` different experts at random."""
    scores = np.random.default_rng(0).random((tokens, experts))
    chosen = np.argpartition(scores, top_k, axis=1)[:, :top_k]
    return tuple(np.bincount(chosen.ravel(), minlength=experts).tolist())


def _grouped(kind: str, m: int, n: int, k: int, group_sizes: tuple[int, ...], *tags: str) -> GroupedWorkload:
    plain = GroupedWorkload(kind, m, n, k, group_sizes, frozenset(tags))
    extra = {tag for tag, names in (("quick", _GROUPED_QUICK), ("sustained", _GROUPED_SUSTAINED),
                                    ("ragged_dot", _GROUPED_RAGGED_DOT)) if plain.name in names}
    return dataclasses.replace(plain, tags=plain.tags | extra)


def _ragged_m(group_sizes: tuple[int, ...], n: int, k: int, *tags: str) -> GroupedWorkload:
    return _grouped("ragged_m", sum(group_sizes), n, k, group_sizes, *tags)


def _masked(groups: int, mean: int, n: int, k: int) -> GroupedWorkload:
    tags = ("masked", "masked_few") if mean <= _FEW_TOKENS else ("masked",)
    return _grouped("masked", -(-int(_ROOM * mean) // 64) * 64, n, k, _around(mean, groups), *tags)


def _ragged_k(group_sizes: tuple[int, ...], m: int, n: int) -> GroupedWorkload:
    k = sum(-(-size // SCALE_BLOCK) * SCALE_BLOCK for size in group_sizes)
    return _grouped("ragged_k", m, n, k, group_sizes, "ragged_k")


_SMALL_EXPERTS = _routed(8192, 128, 8), tuple(np.random.default_rng(0).integers(20, 61, 64).tolist())

GROUPED_WORKLOADS: tuple[GroupedWorkload, ...] = (
    *(_ragged_m((tokens,) * groups, n, k, "contiguous", "ragged_dot")
      for groups, tokens in ((4, 8192), (8, 4096)) for n, k in _EXPERT_LAYERS),
    *(_masked(groups, mean, n, k) for groups, mean in _MASKED for n, k in _EXPERT_LAYERS),
    *(_ragged_k((tokens,) * groups, m, n)
      for groups, tokens in ((4, 8192), (8, 4096)) for m, n in _EXPERT_LAYERS),
    *(_ragged_m(sizes, n, k, "small_experts")
      for sizes in _SMALL_EXPERTS for n in (4096, 3072) for k in (7168, 2048)),
    _ragged_m((128,) * 32, 4096, 7168, "ragged_dot"),
)

QUANTIZE_WORKLOADS: tuple[QuantizeWorkload, ...] = (
    *(QuantizeWorkload(m, k) for m in (64, 4096, 8192) for k in (2048, 7168, 16384)),
    *(QuantizeWorkload(m, k) for m, k in ((4096, 18432), (32768, 7168))),
    *(QuantizeWorkload(n, k, (128, 128)) for n, k in ((4096, 7168), (7168, 2048), (7168, 16384))),
    *(QuantizeWorkload(m, f, swiglu=True) for m, f in ((64, 2048), (4096, 18432))),
    *(QuantizeWorkload(m, 2048, swiglu=True) for m in (8192, 32768)),
)

_MOE_TOKENS = (64, 4096, 8192, 32768)
MOE_WORKLOADS: tuple[MoeWorkload, ...] = (
    *(MoeWorkload("permute", t, k, 256, 8) for t in _MOE_TOKENS for k in (2048, 7168)),
    MoeWorkload("permute", 131072, 128, 256, 8),
    MoeWorkload("permute", 8192, 7168, 8, 2),
    *(MoeWorkload("unpermute", t, k, 256, 8) for t in _MOE_TOKENS for k in (2048, 7168)),
    *(MoeWorkload("transpose", t, n, 8, 1) for t in (4096, 8192, 32768) for n in (2048, 4096, 7168)),
    *(MoeWorkload("transpose", 32768, 7168, g, 1) for g in (1, 32, 256)),
)


# A draw whose sum is a multiple of 128: tokamax refuses others.
_MANY_EXPERTS = tuple(np.random.default_rng(178).integers(1024, 1281, 64).tolist())
TRAINING_WORKLOADS: tuple[TrainingWorkload, ...] = (
    TrainingWorkload(4096, 7168, n=4096),
    TrainingWorkload(4096, 7168, n=18432),
    TrainingWorkload(8 * 4096, 7168, f=2048, group_sizes=(4096,) * 8),
    TrainingWorkload(sum(_MANY_EXPERTS), 2560, f=1280, group_sizes=_MANY_EXPERTS),
)

TRAINING_QUANTIZE_WORKLOADS: tuple[TrainingQuantizeWorkload, ...] = (
    *(TrainingQuantizeWorkload("both", t, n)
      for t, n in ((64, 7168), (4096, 2048), (4096, 7168), (4096, 18432), (8192, 7168), (32768, 7168))),
    *(TrainingQuantizeWorkload("both", 32768, n, groups=g) for n, g in ((2048, 8), (7168, 8), (7168, 64))),
    *(TrainingQuantizeWorkload("weights", k, n) for k, n in ((7168, 4096), (7168, 18432), (18432, 7168))),
    TrainingQuantizeWorkload("weights", 7168, 4096, batch=8),
    *(TrainingQuantizeWorkload("swiglu backward", t, f)
      for t, f in ((4096, 2048), (4096, 18432), (32768, 2048))),
    *(TrainingQuantizeWorkload("swiglu backward", 32768, 2048, groups=g) for g in (8, 64)),
)


def select(*tags: str) -> list[Workload]:
    """The workloads that carry any of the tags, in the order of the list.

    Raises:
      ValueError: a tag that TAGS does not have.
    """
    if unknown := set(tags) - TAGS.keys():
        raise ValueError(f"select: expected tags among {sorted(TAGS)}, got {sorted(unknown)}")
    return [workload for workload in WORKLOADS if workload.tags & set(tags)]


def select_grouped(*names: str) -> list[GroupedWorkload]:
    """The grouped workloads of these names, or with any of these tags, in the order of the list.

    Raises:
      ValueError: what is neither a name nor a tag.
    """
    known = {w.name for w in GROUPED_WORKLOADS} | GROUPED_TAGS.keys()
    if unknown := set(names) - known:
        raise ValueError(f"select_grouped: expected names or tags of {sorted(known)}, got {sorted(unknown)}")
    return [w for w in GROUPED_WORKLOADS if w.name in names or w.tags & set(names)]


def parse(text: str) -> Workload:
    """The workload of a shape written MxNxK, with its tags where the list has it.

    Raises:
      ValueError: not three positive integers with an x between them.
    """
    try:
        m, n, k = (int(size) for size in text.lower().split("x"))
    except ValueError:
        raise ValueError(f"shape: expected MxNxK such as 64x2112x7168, got {text!r}") from None
    if min(m, n, k) < 1:
        raise ValueError(f"shape: expected sizes of at least 1, got {text!r}")
    listed = {(w.m, w.n, w.k): w for w in WORKLOADS}
    return listed.get((m, n, k), Workload(m, n, k))
