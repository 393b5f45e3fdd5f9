// One launch: tensor maps and pointers filled in from the buffers of this execution, and the kernel enqueued.
#ifndef JAX_FP8GEMM_FFI_LAUNCH_H_
#define JAX_FP8GEMM_FFI_LAUNCH_H_

#include <cuda.h>

#include <cstddef>

#include "driver.h"
#include "plan.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fp8gemm {

struct Buffer {
  void* data;
  size_t bytes;
};

// Follows the plan on a stream. Allocates nothing on the device and asks the stream nothing, so that it can
// be recorded into a CUDA graph; the buffers' contents are not looked at.
ffi::Error Launch(const Driver& driver, const Plan& plan, CUfunction function, CUstream stream,
                  ffi::Span<const Buffer> buffers);

}  // namespace jax_fp8gemm

#endif  // JAX_FP8GEMM_FFI_LAUNCH_H_
