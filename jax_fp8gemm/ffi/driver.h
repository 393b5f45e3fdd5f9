// The CUDA driver, opened at run time: the module imports, and describes itself, on machines that have none.
#ifndef JAX_FP8GEMM_FFI_DRIVER_H_
#define JAX_FP8GEMM_FFI_DRIVER_H_

#include <cuda.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_fp8gemm {

namespace ffi = ::xla::ffi;

// Every entry point in use. cuda.h renames some of them to a version (cuCtxPushCurrent_v2): members and the
// symbols looked up carry the renamed name, so that the types below always match.
#define JAX_FP8GEMM_DRIVER_ENTRIES(X) \
  X(cuInit)                           \
  X(cuGetErrorName)                   \
  X(cuGetErrorString)                 \
  X(cuDeviceGetCount)                 \
  X(cuDeviceGetAttribute)             \
  X(cuCtxPushCurrent)                 \
  X(cuCtxPopCurrent)                  \
  X(cuStreamGetCtx)                   \
  X(cuLibraryLoadData)                \
  X(cuLibraryUnload)                  \
  X(cuLibraryGetKernel)               \
  X(cuKernelGetFunction)              \
  X(cuFuncGetAttribute)               \
  X(cuFuncSetAttribute)               \
  X(cuFuncGetParamInfo)               \
  X(cuFuncLoad)                       \
  X(cuTensorMapEncodeTiled)           \
  X(cuLaunchKernelEx)

struct Driver {
#define JAX_FP8GEMM_DECLARE(entry) decltype(&::entry) entry = nullptr;
  JAX_FP8GEMM_DRIVER_ENTRIES(JAX_FP8GEMM_DECLARE)
#undef JAX_FP8GEMM_DECLARE

  int num_devices = 0;

  // The process's one table, opened and initialised by the first call; an error if this machine has no usable
  // driver.
  static const ffi::ErrorOr<Driver>& Get();

  // Success, or "jax_fp8gemm: <call>: CUDA_ERROR_... (<description>); <context>".
  ffi::Error Check(CUresult result, const char* call, const std::string& context) const;
};

}  // namespace jax_fp8gemm

#endif  // JAX_FP8GEMM_FFI_DRIVER_H_
