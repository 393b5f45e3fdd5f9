"""The static facts of one GEMM call: all that choosing, generating and launching its kernel may depend on."""

from __future__ import annotations

import dataclasses

SCALE_BLOCK = 128  # K is scaled, and promoted, in blocks of this many elements
MAX_SIZE = 2**31 - 2**12  # of M, N, K and the batch: coordinates are int32, tiles reach beyond the edge
TMA_ALIGNMENT = 16  # bytes: the pitch of a row that the copy engine reads or writes

ITEM_BYTES = {"e4m3": 1, "e5m2": 1, "bf16": 2, "f32": 4}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(value: int, multiple: int) -> int:
    return ceil_div(value, multiple) * multiple


DENSE, RAGGED_M, MASKED, RAGGED_K = KINDS = ("dense", "ragged_m", "masked", "ragged_k")


@dataclasses.dataclass(frozen=True)
class GemmProblem:
    """out = dequantised lhs @ dequantised rhs.T (+ out), for each of a batch and, in three kinds, each group.

    | kind     | lhs             | rhs             | out             | a group g of `group_sizes` [batch, G]     |
    |----------|-----------------|-----------------|-----------------|-------------------------------------------|
    | dense    | [batch, M, K]   | [batch, N, K]   | [batch, M, N]   |                                           |
    | ragged_m | [batch, M, K]   | [batch, G, N, K]| [batch, M, N]   | rows of lhs and out, after those of g - 1 |
    | masked   | [batch, G, M, K]| [batch, G, N, K]| [batch, G, M, N]| the first rows of lhs[g] and out[g]       |
    | ragged_k | [batch, M, K]   | [batch, N, K]   | [batch, G, M, N]| columns of lhs and rhs, from a 128-block on |

    Attributes:
      m, n, k: all at least 1, and K a multiple of 16 (the lowering pads K to that; the copy engine needs rows
        of whole 16 bytes).
      batch: number of these in the one launch.
      lhs_batched, rhs_batched: False where the operand has a leading axis of 1, shared by the whole batch.
      kind: one of KINDS.
      groups: G; their sizes are known on the device only.
      expected_m: rows that a group is expected to have. It guides the choice of a configuration, nothing else.
      lhs_dtype, rhs_dtype: "e4m3" or "e5m2".
      out_dtype: "bf16" or "f32".
      rhs_scale_rows: rows of rhs that share a scale: 128 (weights) or 1 (activations). lhs always has 1.
      accumulate: add to what out holds (f32 only) instead of overwriting it.
      batch_invariant: forbid configurations in which a row's bits could depend on M, that is split-K.
    """

    m: int
    n: int
    k: int
    batch: int = 1
    lhs_batched: bool = True
    rhs_batched: bool = True
    kind: str = DENSE
    groups: int = 1
    expected_m: int | None = None
    lhs_dtype: str = "e4m3"
    rhs_dtype: str = "e4m3"
    out_dtype: str = "bf16"
    rhs_scale_rows: int = SCALE_BLOCK
    accumulate: bool = False
    batch_invariant: bool = False

    def __post_init__(self):
        for name in ("m", "n", "k", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"GemmProblem.{name}: expected a whole number of at least 1, got {value!r}")
        if self.k % TMA_ALIGNMENT:
            raise ValueError(f"GemmProblem.k: expected a multiple of {TMA_ALIGNMENT}, got {self.k}")
        for name, allowed in (("lhs_dtype", ("e4m3", "e5m2")), ("rhs_dtype", ("e4m3", "e5m2")),
                              ("out_dtype", ("bf16", "f32")), ("rhs_scale_rows", (1, SCALE_BLOCK))):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise ValueError(f"GemmProblem.{name}: expected one of {allowed}, got {value!r}")
        if self.accumulate and self.out_dtype != "f32":
            raise ValueError(f"GemmProblem.accumulate: expected out_dtype 'f32', got {self.out_dtype!r}")

    @property
    def num_k_blocks(self) -> int:
        return ceil_div(self.k, SCALE_BLOCK)

    @property
    def out_item_bytes(self) -> int:
        return ITEM_BYTES[self.out_dtype]

    @property
    def out_is_tma_aligned(self) -> bool:
        """Whether the copy engine can store the output; if not, the kernel stores from registers."""
        return self.n * self.out_item_bytes % TMA_ALIGNMENT == 0

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k
