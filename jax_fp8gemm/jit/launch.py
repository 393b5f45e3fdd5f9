"""A launch plan: a kernel and everything that launching it takes, as plain data.

Python decides it once, when a call is lowered; it travels as attributes of the XLA custom call; the C++
side (`jax_fp8gemm/ffi`) follows it without knowing what the kernel computes. A buffer is named by its index
among the call's operands followed by its results.
"""

from __future__ import annotations

import dataclasses

import numpy as np

MAX_RANK = 5  # of a tensor map

# Kinds of argument, and element types of a tensor map: numbers shared with ffi/plan.h.
_POINTER, _SCALAR, _TENSOR_MAP = 0, 1, 2
_MAP_DTYPES = {"u8": 0, "bf16": 1, "f32": 2}
_SWIZZLES = (0, 32, 64, 128)
_RECORD = 4 + 3 * MAX_RANK + 2  # int64s per argument


@dataclasses.dataclass(frozen=True)
class Pointer:
    """The address of a buffer."""

    buffer: int

    def record(self) -> list[int]:
        return [_POINTER, self.buffer]


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A 32-bit unsigned number."""

    value: int

    def record(self) -> list[int]:
        return [_SCALAR, self.value]


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A CUtensorMap over a buffer; dimensions are given innermost first.

    Attributes:
      buffer: which one.
      dtype: "u8", "bf16" or "f32".
      shape: elements per dimension.
      strides: bytes from one index to the next, of every dimension but the innermost.
      box: elements per dimension that one copy moves.
      swizzle: 0, 32, 64 or 128 bytes.
      lead: bytes in front of the buffer at which the map's addresses begin. A map whose dimensions overlap in
        memory may begin there, as long as what is copied lies in the buffer (`plan._row_map`).
    """

    buffer: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    lead: int = 0

    def __post_init__(self):
        rank = len(self.shape)
        if not 1 <= rank <= MAX_RANK or len(self.strides) != rank - 1 or len(self.box) != rank:
            raise ValueError(f"TensorMap: expected 1 to {MAX_RANK} dimensions, as many of box and one stride "
                             f"less, got shape {self.shape}, box {self.box}, strides {self.strides}")
        if self.dtype not in _MAP_DTYPES or self.swizzle not in _SWIZZLES:
            raise ValueError(f"TensorMap: unknown dtype {self.dtype!r} or swizzle {self.swizzle}")

    def record(self) -> list[int]:
        pad = lambda values: [*values, *[0] * (MAX_RANK - len(values))]
        return [_TENSOR_MAP, self.buffer, _MAP_DTYPES[self.dtype], len(self.shape),
                *pad(self.shape), *pad(self.strides), *pad(self.box), self.swizzle, self.lead]


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """A compiled kernel with its launch configuration and arguments.

    Attributes:
      cubin: the compiled module.
      entry: the kernel's symbol in it.
      grid, cluster: CTAs along x, y, z.
      block: threads of a CTA (one dimension).
      shared_bytes: dynamic shared memory of a CTA.
      arguments: the kernel's parameters, in order.
    """

    cubin: bytes
    entry: str
    grid: tuple[int, int, int]
    cluster: tuple[int, int, int]
    block: int
    shared_bytes: int
    arguments: tuple[Pointer | Scalar | TensorMap, ...]

    def attributes(self) -> dict[str, bytes | str | np.ndarray]:
        """The attributes of the custom call; ffi/plan.h reads them."""
        records = np.zeros((len(self.arguments), _RECORD), np.int64)
        for row, argument in zip(records, self.arguments, strict=True):
            values = argument.record()
            row[: len(values)] = values
        launch = [*self.grid, *self.cluster, self.block, self.shared_bytes]
        return {"cubin": self.cubin, "entry": self.entry, "launch": np.array(launch, np.int64),
                "arguments": records.reshape(-1)}
