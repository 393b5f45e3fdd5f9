// The kernel of one custom call: its plan, its library, and a function per device.
#ifndef JAX_FP8GEMM_FFI_KERNEL_H_
#define JAX_FP8GEMM_FFI_KERNEL_H_

#include <cuda.h>

#include <atomic>
#include <memory>
#include <string_view>
#include <vector>

#include "driver.h"
#include "library.h"
#include "plan.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fp8gemm {

// Thread-safe: XLA keeps one for all devices and executions of a call.
class Kernel {
 public:
  static ffi::TypeId id;  // XLA assigns it when the type is registered
  static const ffi::TypeInfo info;

  // Loads the cubin and finds the plan's entry in it. Needs no device; and where there is no usable driver,
  // the kernel can be compiled into a program, for another machine, and not be prepared.
  static ffi::ErrorOr<std::unique_ptr<Kernel>> Create(std::string_view cubin, Plan plan);

  // Makes the kernel ready on a device, whose stream this is: loads it there, sets its attributes, and checks
  // that it takes the plan's arguments and finds the shared memory. Later calls for the device return at
  // once.
  ffi::Error Prepare(int device, CUstream stream);

  const Driver& driver() const { return *driver_; }  // of a prepared kernel
  const Plan& plan() const { return plan_; }
  ffi::ErrorOr<CUfunction> function(int device) const;  // prepared earlier

 private:
  explicit Kernel(Plan plan);
  Kernel(const Driver& driver, Plan plan, std::shared_ptr<const Library> library, CUkernel kernel);

  ffi::ErrorOr<CUfunction> LoadInCurrentContext() const;
  ffi::Error AllowSharedMemory(CUfunction function, int device) const;
  ffi::Error CheckParameters(CUfunction function) const;
  ffi::Error CheckDevice(int device) const;
  ffi::Error Check(CUresult result, const char* call) const;

  const Driver* const driver_ = nullptr;  // null where there is none
  const Plan plan_;
  const std::shared_ptr<const Library> library_;  // keeps kernel_ and functions_ valid
  const CUkernel kernel_ = nullptr;
  std::vector<std::atomic<CUfunction>> functions_;  // by device; null until prepared
};

}  // namespace jax_fp8gemm

#endif  // JAX_FP8GEMM_FFI_KERNEL_H_
