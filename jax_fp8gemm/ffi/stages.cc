#include "stages.h"

#include <cuda.h>

#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "kernel.h"
#include "launch.h"
#include "plan.h"

namespace jax_fp8gemm {
namespace {

using Numbers = ffi::Span<const int64_t>;

ffi::ErrorOr<std::unique_ptr<Kernel>> InstantiateKernel(std::string_view cubin, std::string_view entry,
                                                        Numbers launch, Numbers arguments) {
  ffi::ErrorOr<Plan> plan = DecodePlan(entry, launch, arguments);
  if (plan.has_error()) return ffi::Unexpected(plan.error());
  return Kernel::Create(cubin, *std::move(plan));
}

ffi::Error InitializeKernel(CUstream stream, int32_t device, Kernel* kernel) {
  return kernel->Prepare(device, stream);
}

ffi::Error ExecuteKernel(CUstream stream, int32_t device, const Kernel* kernel, ffi::RemainingArgs operands,
                         ffi::RemainingRets results) {
  std::vector<Buffer> buffers;
  buffers.reserve(operands.size() + results.size());
  for (size_t i = 0; i < operands.size(); ++i) {
    const auto operand = operands.get<ffi::AnyBuffer>(i);
    if (operand.has_error()) return operand.error();
    buffers.push_back({operand->untyped_data(), operand->size_bytes()});
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    if (result.has_error()) return result.error();
    buffers.push_back({(*result)->untyped_data(), (*result)->size_bytes()});
  }

  const ffi::ErrorOr<CUfunction> function = kernel->function(device);
  if (function.has_error()) return function.error();
  return Launch(kernel->driver(), kernel->plan(), *function, stream, buffers);
}

}  // namespace

XLA_FFI_Error* Instantiate(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, InstantiateKernel,
                         ffi::Ffi::BindInstantiate()
                             .Attr<std::string_view>("cubin")
                             .Attr<std::string_view>("entry")
                             .Attr<Numbers>("launch")
                             .Attr<Numbers>("arguments"));
  return handler(frame);
}

// The later stages bind no attributes: the kernel has the plan.
XLA_FFI_Error* Initialize(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, InitializeKernel,
                         ffi::Ffi::BindInitialize()
                             .Ctx<ffi::PlatformStream<CUstream>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .Ctx<ffi::State<Kernel>>());
  return handler(frame);
}

XLA_FFI_Error* Execute(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, ExecuteKernel,
                         ffi::Ffi::BindExecute()
                             .Ctx<ffi::PlatformStream<CUstream>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .Ctx<ffi::State<Kernel>>()
                             .RemainingArgs()
                             .RemainingRets(),
                         {ffi::Traits::kCmdBufferCompatible});
  return handler(frame);
}

}  // namespace jax_fp8gemm
