// The stages of the custom call, as XLA calls them; README.md says what each may do.
#ifndef JAX_FP8GEMM_FFI_STAGES_H_
#define JAX_FP8GEMM_FFI_STAGES_H_

#include "xla/ffi/api/ffi.h"

namespace jax_fp8gemm {

XLA_FFI_Error* Instantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* Initialize(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* Execute(XLA_FFI_CallFrame* frame);

}  // namespace jax_fp8gemm

#endif  // JAX_FP8GEMM_FFI_STAGES_H_
