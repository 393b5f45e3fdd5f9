"""The problems that tests and benchmarks run: one tagged list.

>>> [w.name for w in select("decode")][:2]
['1x2112x7168', '1x7168x16384']
"""

from __future__ import annotations

import dataclasses


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
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """The fewest bytes to move: both operands with their scales read once, a bf16 output written once."""
        k_blocks, n_blocks = -(-self.k // 128), -(-self.n // 128)
        scales = 4 * k_blocks * (self.m + n_blocks)
        return self.k * (self.m + self.n) + scales + 2 * self.m * self.n


@dataclasses.dataclass(frozen=True)
class QuantizeWorkload:
    """One quantisation: bf16 [rows, columns] to e4m3 with the given granularity.

    Attributes:
      rows, columns: the sizes of the array.
      granularity: (1, 128) or (128, 128).
    """

    rows: int
    columns: int
    granularity: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns} {self.granularity[0]}x{self.granularity[1]}"

    @property
    def bytes(self) -> int:
        """bf16 read once, e4m3 and f32 scales written once."""
        block_rows, block_columns = self.granularity
        scales = -(-self.rows // block_rows) * -(-self.columns // block_columns)
        return 3 * self.rows * self.columns + 4 * scales


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

QUANTIZE_WORKLOADS: tuple[QuantizeWorkload, ...] = (
    *(QuantizeWorkload(m, k, (1, 128)) for m in (64, 4096, 8192) for k in (2048, 7168, 16384)),
    *(QuantizeWorkload(n, k, (128, 128)) for n, k in ((4096, 7168), (7168, 2048), (7168, 16384))),
)


def select(*tags: str) -> list[Workload]:
    """The workloads that carry any of the tags, in the order of the list.

    Raises:
      ValueError: a tag that TAGS does not have.
    """
    if unknown := set(tags) - TAGS.keys():
        raise ValueError(f"select: expected tags among {sorted(TAGS)}, got {sorted(unknown)}")
    return [workload for workload in WORKLOADS if workload.tags & set(tags)]


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
