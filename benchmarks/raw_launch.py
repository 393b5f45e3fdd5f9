"""Follows a LaunchPlan with the CUDA driver API, on any device addresses: no JAX, no XLA.

For tuning and for looking at a kernel alone (`ncu`, `compute-sanitizer`). It needs a current CUDA context,
which `torch.cuda.init()` makes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from cuda.bindings import driver

from jax_fp8gemm.jit.launch import LaunchPlan, Pointer, Scalar, TensorMap

_MAP_DTYPES = {
    "u8": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    "bf16": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    "f32": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
}
_SWIZZLES = {
    0: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
    32: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_32B,
    64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
    128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
}
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


def _call(function: Callable, *arguments):
    """Calls a driver function, raises with its name and the CUDA error's, and returns what it returned."""
    status, *values = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{function.__name__}: {driver.CUresult(status).name}")
    return values[0] if values else None


def _encode(argument: TensorMap, address: int) -> tuple[object, int]:
    """A tensor map over the buffer at `address`: what keeps it alive, and its host address."""
    if address % 16:
        raise ValueError(
            f"buffer {argument.buffer}: expected an address aligned to 16 bytes, got {address:#x}"
        )
    # Through ctypes: the driver wants the map aligned to 64 bytes, which cuda.bindings' own object is not.
    storage = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    tensor_map = -(-ctypes.addressof(storage) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    rank = len(argument.shape)
    promotion = driver.CUtensorMapL2promotion
    status = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.c_void_p(tensor_map),
        int(_MAP_DTYPES[argument.dtype]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address - argument.lead),
        (ctypes.c_uint64 * rank)(*argument.shape),
        (ctypes.c_uint64 * rank)(*argument.strides),
        (ctypes.c_uint32 * rank)(*argument.box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        int(_SWIZZLES[argument.swizzle]),
        int(
            promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B
            if argument.dtype == "u8"
            else promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B
        ),
        int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled: {driver.CUresult(status).name} for {argument}")
    return storage, tensor_map


def _launch_attributes(plan: LaunchPlan) -> list[driver.CUlaunchAttribute]:
    if plan.cluster == (1, 1, 1):
        return []
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    value = attribute.value
    value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = plan.cluster
    return [attribute]


def _load(plan: LaunchPlan) -> tuple[driver.CUlibrary, driver.CUfunction]:
    library = _call(driver.cuLibraryLoadData, plan.cubin, None, None, 0, None, None, 0)
    kernel = _call(driver.cuLibraryGetKernel, library, plan.entry.encode())
    function = _call(driver.cuKernelGetFunction, kernel)
    attribute = driver.CUfunction_attribute
    _call(
        driver.cuFuncSetAttribute,
        function,
        attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        plan.shared_bytes,
    )
    if plan.cluster[0] * plan.cluster[1] * plan.cluster[2] > 8:  # what every cluster-capable GPU must take
        _call(
            driver.cuFuncSetAttribute,
            function,
            attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED,
            1,
        )
    return library, function


class BoundKernel:
    """A launch plan, loaded, with its arguments bound to buffers: calling it launches the kernel.

    Example:
      kernel = BoundKernel(plan, [lhs.data_ptr(), lhs_scale.data_ptr(), rhs.data_ptr(), rhs_scale.data_ptr(),
                                  out.data_ptr()])
      kernel(torch.cuda.current_stream().cuda_stream)

    Args:
      plan: what to launch.
      addresses: device address of every buffer, in the plan's order.

    Raises:
      RuntimeError: the driver refuses; the message names the call and the CUDA error.
      ValueError: a plan that names a buffer that `addresses` does not have, or one that is misaligned.
    """

    def __init__(self, plan: LaunchPlan, addresses: Sequence[int]):
        self._library, self._function = _load(plan)
        # The driver copies the parameters at each launch, from the addresses in this array.
        self._values, pointers = zip(
            *(self._bind(argument, addresses) for argument in plan.arguments), strict=True
        )
        self._parameters = (ctypes.c_void_p * len(pointers))(*pointers)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = plan.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = plan.block, 1, 1
        config.sharedMemBytes = plan.shared_bytes
        attributes = _launch_attributes(plan)
        config.attrs, config.numAttrs = attributes, len(attributes)
        self._config = config

    @staticmethod
    def _bind(argument: Pointer | Scalar | TensorMap, addresses: Sequence[int]) -> tuple[object, int]:
        """A kernel parameter and the host address of its value."""
        if isinstance(argument, Scalar):
            value = ctypes.c_uint32(argument.value)
            return value, ctypes.addressof(value)
        if argument.buffer >= len(addresses):
            raise ValueError(f"addresses: expected one for buffer {argument.buffer}, got {len(addresses)}")
        address = addresses[argument.buffer]
        if isinstance(argument, Pointer):
            value = ctypes.c_void_p(address)
            return value, ctypes.addressof(value)
        return _encode(argument, address)

    def __call__(self, stream: int = 0) -> None:
        """Launches the kernel on a stream, given by its handle."""
        self._config.hStream = driver.CUstream(stream)
        _call(driver.cuLaunchKernelEx, self._config, self._function, ctypes.addressof(self._parameters), 0)

    def unload(self) -> None:
        """Unloads the cubin; the kernel must have finished."""
        _call(driver.cuLibraryUnload, self._library)
