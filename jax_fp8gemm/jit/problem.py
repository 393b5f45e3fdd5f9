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


@dataclasses.dataclass(frozen=True)
class GemmProblem:
    """out[g] = dequantised lhs[g] @ dequantised rhs[g].T (+ out[g]), for g in range(batch).

    Attributes:
      m, n, k: lhs is [batch, M, K], rhs [batch, N, K], out [batch, M, N]; all at least 1, and K a multiple of
        16 (the lowering pads K to that; the copy engine needs rows of whole 16 bytes).
      batch: number of GEMMs of these shapes in the one launch.
      lhs_batched, rhs_batched: False where the operand has a leading axis of 1, shared by the whole batch.
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
