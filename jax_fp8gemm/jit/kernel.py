"""A kernel that is no GEMM: its source, its cubin with how to launch it, and the XLA custom call of that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax

from jax_fp8gemm import ffi
from jax_fp8gemm.jit import settings
from jax_fp8gemm.jit.cubin import find_or_compile
from jax_fp8gemm.jit.launch import LaunchPlan, Pointer, Scalar, TensorMap
from jax_fp8gemm.jit.source import constant

MAX_GRID = 2**31 - 1  # CTAs along x


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instance of `template <class Config> __device__ void fp8gemm::function(parameters)`.

    Attributes:
      header: the file of `cuda/` that has it.
      function: its name. The kernel's is "fp8_" and that.
      constants: what `Config` has: `{"Rows": 8}` becomes `kRows`.
      types: and by which names it has types of the namespace: `{"Input": "Bf16"}`.
      parameters: the function's and the kernel's, such as "const void* x"; the last word is the name.
      threads: of a CTA.
      ctas: of it that a multiprocessor's registers have room for; the compiler sees to that.

    Example:
      >>> kernel = Kernel("twice.cuh", "twice", {"Threads": 256}, {}, ("const float* x", "float* y"), 256)
      >>> plan = kernel.plan(grid=1024, arguments=(Pointer(0), Pointer(1)))
      >>> y, = kernel_call(plan, [jax.ShapeDtypeStruct(x.shape, x.dtype)])(x)
    """

    header: str
    function: str
    constants: Mapping[str, bool | int]
    types: Mapping[str, str]
    parameters: tuple[str, ...]
    threads: int
    ctas: int = 1

    @property
    def entry(self) -> str:
        return f"fp8_{self.function}"

    def source(self) -> str:
        """The translation unit."""
        bounds = f"{self.threads}, {self.ctas}" if self.ctas > 1 else self.threads
        names = ", ".join(parameter.split()[-1].lstrip("*") for parameter in self.parameters)
        return "\n".join([
            f'#include "{self.header}"',
            "",
            "struct Config {",
            *[constant(name, value) for name, value in self.constants.items()],
            *[f"  using {name} = fp8gemm::{type_name};" for name, type_name in self.types.items()],
            "};",
            "",
            f'extern "C" __global__ void __launch_bounds__({bounds}) {self.entry}(',
            f"    {', '.join(self.parameters)}) {{",
            f"  fp8gemm::{self.function}<Config>({names});",
            "}",
            "",
        ])

    def plan(self, grid: int, arguments: Sequence[Pointer | Scalar | TensorMap], *,
             cluster: int = 1, shared_bytes: int = 0) -> LaunchPlan:
        """The compiled kernel, and how to launch it on `grid` CTAs along x.

        Args:
          grid: at most MAX_GRID.
          arguments: one for each parameter, in order.
          cluster: neighbouring CTAs that form one, a divisor of `grid`.
          shared_bytes: dynamic shared memory of a CTA.

        Raises:
          CompileError: the kernel does not compile.
          RuntimeError: there is no compiler; the message says what to install.
        """
        settings.configure_logging()
        cubin = find_or_compile(self.source(), stem=self.entry, description=repr(self))
        return LaunchPlan(cubin, self.entry, grid=(grid, 1, 1), cluster=(cluster, 1, 1),
                          block=self.threads, shared_bytes=shared_bytes, arguments=tuple(arguments))


def kernel_call(plan: LaunchPlan, results: Sequence[jax.ShapeDtypeStruct],
                output_layouts: Sequence[tuple[int, ...] | None] | None = None) -> Callable:
    """The function (*operands) -> list of results that runs `plan`.

    Its buffers are the operands, then the results.

    Args:
      plan: from `Kernel.plan`.
      results: shapes and dtypes.
      output_layouts: for each result its axes from the slowest to the fastest in memory, or None for
        row-major; all are row-major by default, as the operands are.
    """
    ffi.register()
    call = jax.ffi.ffi_call(ffi.TARGET, list(results), output_layouts=output_layouts)
    return partial(call, **plan.attributes())
