"""What a JAX user can call: fp8_gemm, jnp.dot in bf16, and XLA's own FP8 dot."""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental.layout import Format, Layout

from benchmarks.operands import SCALE_BLOCK, Operands
from benchmarks.peers.base import Absent, Peer, Unsupported
from benchmarks.timing import Call
from benchmarks.workloads import Workload
from jax_fp8gemm import ScaledArray, fp8_gemm


def _gpu() -> jax.Device:
    try:
        return jax.devices("cuda")[0]
    except RuntimeError as error:
        raise Absent(f"JAX has no CUDA device: {error}") from None


class JaxPeer(Peer):
    """A GEMM that is a traced function of device arrays, compiled ahead of time."""

    def __init__(self):
        self._device = _gpu()
        self._compiled: dict[tuple[Workload, int], jax.stages.Compiled] = {}

    @abc.abstractmethod
    def gemm(self, workload: Workload, *arrays: jax.Array) -> jax.Array:
        """The GEMM, to be traced."""

    @abc.abstractmethod
    def arrays(self, operands: Operands) -> tuple[jax.Array, ...]:
        """The arguments of `gemm`, on the device."""

    @abc.abstractmethod
    def arguments(self, workload: Workload) -> tuple[tuple[jax.ShapeDtypeStruct, Format | None], ...]:
        """Shape, dtype and layout of the arguments of `gemm`."""

    def _rows_fastest(self, rank: int = 2) -> Format:
        *leading, rows, columns = range(rank)
        return Format(Layout(major_to_minor=(*leading, columns, rows)), self._sharding())

    def _sharding(self) -> jax.sharding.Sharding:
        return jax.sharding.SingleDeviceSharding(self._device)

    def _compile(self, workload: Workload, calls: int) -> jax.stages.Compiled:
        key = workload, calls
        if key not in self._compiled:
            structs, formats = zip(*self.arguments(workload), strict=True)
            formats = tuple(f or self._sharding() for f in formats)
            program = lambda sets: [self.gemm(workload, *arrays) for arrays in sets]
            jitted = jax.jit(program, in_shardings=((formats,) * calls,))
            self._compiled[key] = jitted.lower((structs,) * calls).compile()
        return self._compiled[key]

    def prepare(self, workloads: Sequence[Workload], programs: bool = False) -> None:
        jobs = [(workload, 1) for workload in workloads]
        if programs:
            jobs += [(workload, workload.program_calls) for workload in workloads]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: self._compile_if_supported(*job), jobs))

    def _compile_if_supported(self, workload: Workload, calls: int) -> None:
        with contextlib.suppress(Unsupported):  # `bind` will say why
            self._compile(workload, calls)

    def bind(self, operands: Operands) -> Call:
        return self._call(operands, 1)

    def bind_program(self, operands: Operands) -> Call:
        return self._call(operands, operands.workload.program_calls)

    def _call(self, operands: Operands, calls: int) -> Call:
        compiled = self._compile(operands.workload, calls)
        arrays = self.arrays(operands)
        # Copies: XLA would merge equal calls, and the weights of one would be in L2 for the next.
        sets = (arrays, *(tuple(map(_copy, arrays)) for _ in range(calls - 1)))
        sets = jax.block_until_ready(sets)
        return Call(run=lambda: compiled(sets), wait=jax.block_until_ready)

    def to_host(self, workload: Workload, result: Any, rows: np.ndarray) -> np.ndarray:
        (out,) = result
        return np.asarray(out.reshape(-1, out.shape[-1])[rows].astype(jnp.float32))

    def _put(self, host: np.ndarray | jax.Array, layout: Format | None = None) -> jax.Array:
        return jax.device_put(host, layout or self._device)

    def _row_major(self, *structs: jax.ShapeDtypeStruct) -> tuple[tuple[jax.ShapeDtypeStruct, None], ...]:
        return tuple((struct, None) for struct in structs)


def _copy(array: jax.Array) -> jax.Array:
    return jax.device_put(array.copy(), array.format)  # copy() alone does not keep the layout


def _fp8(bits: np.ndarray) -> np.ndarray:
    return bits.view(ml_dtypes.float8_e4m3fn)


class Fp8Gemm(JaxPeer):
    title = "jax_fp8gemm"
    note = "fp8_gemm under jax.jit; 1x128 lhs scales stored with M fastest, 128x128 rhs scales"

    def gemm(self, workload, lhs, lhs_scale, rhs, rhs_scale):
        return fp8_gemm(
            ScaledArray(lhs, lhs_scale, (1, SCALE_BLOCK)),
            ScaledArray(rhs, rhs_scale, (SCALE_BLOCK, SCALE_BLOCK)),
            out_dtype=jnp.bfloat16,
        )

    def arguments(self, workload):
        m, n, k = workload.m, workload.n, workload.k
        k_blocks, n_blocks = -(-k // SCALE_BLOCK), -(-n // SCALE_BLOCK)
        struct = jax.ShapeDtypeStruct
        return (
            (struct((m, k), jnp.float8_e4m3fn), None),
            (struct((m, k_blocks), jnp.float32), self._rows_fastest()),
            (struct((n, k), jnp.float8_e4m3fn), None),
            (struct((n_blocks, k_blocks), jnp.float32), None),
        )

    def arrays(self, operands):
        return (
            self._put(_fp8(operands.lhs)),
            self._put(operands.lhs_scale, self._rows_fastest()),
            self._put(_fp8(operands.rhs)),
            self._put(operands.rhs_scale),
        )


class JnpBf16(JaxPeer):
    title = "jnp.dot bf16"
    note = "jnp.dot(lhs, rhs.T) on the dequantised operands in bf16, XLA's choice of kernel"

    def gemm(self, workload, lhs, rhs):
        return jnp.dot(lhs, rhs.T)

    def arguments(self, workload):
        return self._row_major(
            jax.ShapeDtypeStruct((workload.m, workload.k), jnp.bfloat16),
            jax.ShapeDtypeStruct((workload.n, workload.k), jnp.bfloat16),
        )

    def arrays(self, operands):
        return (
            dequantize(self._put(_fp8(operands.lhs)), self._put(operands.lhs_scale), 1),
            dequantize(self._put(_fp8(operands.rhs)), self._put(operands.rhs_scale), SCALE_BLOCK),
        )


@functools.partial(jax.jit, static_argnums=2)
def dequantize(values: jax.Array, scale: jax.Array, rows_per_scale: int) -> jax.Array:
    """bf16 [*, R, K] of FP8 values [*, R, K] and f32 scales [*, ceil(R/rows_per_scale), ceil(K/128)]."""
    *_, rows, k = values.shape
    scale = jnp.repeat(jnp.repeat(scale, rows_per_scale, -2)[..., :rows, :], SCALE_BLOCK, -1)[..., :k]
    return (values.astype(jnp.float32) * scale).astype(jnp.bfloat16)


class XlaFp8(JaxPeer):
    title = "XLA FP8 dot"
    note = "lax.dot_general on e4m3 with bf16 out, no scales; the kernels' names say what XLA chose"
    uses_scales = False

    def gemm(self, workload, lhs, rhs):
        return jax.lax.dot_general(lhs, rhs, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    def arguments(self, workload):
        return self._row_major(
            jax.ShapeDtypeStruct((workload.m, workload.k), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((workload.n, workload.k), jnp.float8_e4m3fn),
        )

    def arrays(self, operands):
        return self._put(_fp8(operands.lhs)), self._put(_fp8(operands.rhs))
