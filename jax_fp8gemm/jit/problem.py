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
    """out = dequantised lhs @ dequantised rhs.T (+ out), for each of a batch and, in three kinds, of a group.

    | kind     | lhs              | rhs              | out              | a group's part                     |
    |----------|------------------|------------------|------------------|------------------------------------|
    | dense    | [batch, M, K]    | [batch, N, K]    | [batch, M, N]    |                                    |
    | ragged_m | [batch, M, K]    | [batch, G, N, K] | [batch, M, N]    | the next rows of lhs and out       |
    | masked   | [batch, G, M, K] | [batch, G, N, K] | [batch, G, M, N] | the first rows of lhs[g] and out[g]|
    | ragged_k | [batch, M, K]    | [batch, N, K]    | [batch, G, M, N] | the next 128-blocks of K           |

    Attributes:
      m, n, k: all at least 1, and K a multiple of 16 (the lowering pads K to that; the copy engine needs rows
        of whole 16 bytes).
      batch: number of these in the one launch.
      lhs_batched, rhs_batched: False where the operand has a leading axis of 1, shared by the whole batch.
      kind: one of KINDS.
      groups: G; their sizes are known on the device only.
      expected_m: rows that a group of ragged_m or masked is expected to have. A hint for choosing a
        configuration.
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
        for name in ("m", "n", "k", "batch", "groups", "expected_m"):
            value = getattr(self, name)
            if name == "expected_m" and value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"GemmProblem.{name}: expected a whole number of at least 1, got {value!r}")
        if self.k % TMA_ALIGNMENT:
            raise ValueError(f"GemmProblem.k: expected a multiple of {TMA_ALIGNMENT}, got {self.k}")
        for name, allowed in (("kind", KINDS), ("lhs_dtype", ("e4m3", "e5m2")),
                              ("rhs_dtype", ("e4m3", "e5m2")), ("out_dtype", ("bf16", "f32")),
                              ("rhs_scale_rows", (1, SCALE_BLOCK))):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise ValueError(f"GemmProblem.{name}: expected one of {allowed}, got {value!r}")
        if self.accumulate and self.out_dtype != "f32":
            raise ValueError(f"GemmProblem.accumulate: expected out_dtype 'f32', got {self.out_dtype!r}")
        self._check_kind()

    def _check_kind(self):
        if self.kind == DENSE and self.groups != 1:
            raise ValueError(f"GemmProblem.groups: expected 1 for kind {DENSE!r}, got {self.groups}")
        if self.expected_m is not None and not self.ends_anywhere:
            raise ValueError(f"GemmProblem.expected_m: expected None for kind {self.kind!r}, got "
                             f"{self.expected_m}")
        if self.kind == RAGGED_K and self.rhs_scale_rows != 1:
            raise ValueError(f"GemmProblem.rhs_scale_rows: expected 1 for kind {RAGGED_K!r}, got "
                             f"{self.rhs_scale_rows}")
        if self.accumulate and self.kind in (RAGGED_M, MASKED):
            raise ValueError(f"GemmProblem.accumulate: expected False for kind {self.kind!r}, got True")

    def __str__(self) -> str:
        """In a few words: "64x2112x7168 bf16"; a `~` is in front of what only the device knows."""
        count = f"{self.batch} x " if self.batch > 1 else ""
        groups = f"{self.kind} {self.groups} x " if self.is_grouped else ""
        m = f"~{self.rows}" if self.ends_anywhere else self.m
        k = f"~{self.as_dense().k}" if self.kind == RAGGED_K else self.k
        extra = " accumulate" * self.accumulate
        if self.rhs_scale_rows == 1 and self.kind != RAGGED_K:
            extra += " 1x128 rhs"
        return f"{count}{groups}{m}x{self.n}x{k} {self.out_dtype}{extra}"

    @property
    def lhs_shape(self) -> tuple[int, ...]:
        """Of the values; scales have one column for each of `num_k_blocks`."""
        leading = (self.groups,) if self.kind == MASKED else ()
        return self.batch if self.lhs_batched else 1, *leading, self.m, self.k

    @property
    def rhs_shape(self) -> tuple[int, ...]:
        leading = (self.groups,) if self.kind in (RAGGED_M, MASKED) else ()
        return self.batch if self.rhs_batched else 1, *leading, self.n, self.k

    @property
    def lhs_scale_shape(self) -> tuple[int, ...]:
        return *self.lhs_shape[:-1], self.num_k_blocks

    @property
    def rhs_scale_shape(self) -> tuple[int, ...]:
        return *self.rhs_shape[:-2], ceil_div(self.n, self.rhs_scale_rows), self.num_k_blocks

    @property
    def out_shape(self) -> tuple[int, ...]:
        leading = (self.groups,) if self.kind in (MASKED, RAGGED_K) else ()
        return self.batch, *leading, self.m, self.n

    @property
    def is_grouped(self) -> bool:
        """Whether there are group sizes, int32 [batch, groups], on the device."""
        return self.kind != DENSE

    @property
    def ends_anywhere(self) -> bool:
        """Whether groups end at any row, inside of a tile."""
        return self.kind in (RAGGED_M, MASKED)

    @property
    def rows(self) -> int:
        """Rows of a product: M, or what a group whose rows only the device knows is expected to have."""
        if self.kind == RAGGED_M:
            return min(self.expected_m or ceil_div(self.m, self.groups), self.m)
        if self.kind == MASKED:
            return min(self.expected_m or self.m, self.m)
        return self.m

    def as_dense(self) -> GemmProblem:
        """The batched GEMM that takes about as long, if groups have the sizes that are expected."""
        if self.kind == DENSE:
            return self
        k = self.k
        if self.kind == RAGGED_K:
            k = round_up(ceil_div(self.k, self.groups), SCALE_BLOCK)
        return dataclasses.replace(self, m=self.rows, k=k, batch=self.batch * self.groups, lhs_batched=True,
                                   rhs_batched=True, kind=DENSE, groups=1, expected_m=None)

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
        """Of all groups, if they have the rows that are expected."""
        dense = self.as_dense()
        return 2 * dense.batch * dense.m * dense.n * dense.k
