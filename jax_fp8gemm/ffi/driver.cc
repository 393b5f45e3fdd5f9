#include "driver.h"

#include <dlfcn.h>

namespace jax_fp8gemm {
namespace {

constexpr char kLibrary[] = "libcuda.so.1";

ffi::Unexpected<ffi::Error> Unavailable(const std::string& why) {
  return ffi::Unexpected(
      ffi::Error(ffi::ErrorCode::kUnavailable, "jax_fp8gemm: no usable CUDA driver: " + why));
}

ffi::ErrorOr<Driver> Open() {
  // Never closed: the table lives as long as the process.
  void* handle = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return Unavailable(dlerror());

  Driver driver;
#define JAX_FP8GEMM_STRING(text) #text
#define JAX_FP8GEMM_LOOK_UP(entry)                                                                   \
  driver.entry = reinterpret_cast<decltype(driver.entry)>(dlsym(handle, JAX_FP8GEMM_STRING(entry))); \
  if (driver.entry == nullptr) {                                                                     \
    return Unavailable(std::string(kLibrary) +                                                       \
                       " lacks " JAX_FP8GEMM_STRING(entry) "; install a driver for CUDA 13");        \
  }
  JAX_FP8GEMM_DRIVER_ENTRIES(JAX_FP8GEMM_LOOK_UP)
#undef JAX_FP8GEMM_LOOK_UP
#undef JAX_FP8GEMM_STRING

  ffi::Error error = driver.Check(driver.cuInit(0), "cuInit", "opening the driver");
  if (error.success()) {
    error =
        driver.Check(driver.cuDeviceGetCount(&driver.num_devices), "cuDeviceGetCount", "opening the driver");
  }
  if (error.failure()) return ffi::Unexpected(error);
  return driver;
}

}  // namespace

const ffi::ErrorOr<Driver>& Driver::Get() {
  // Leaked: states may outlive static destructors.
  static const auto& driver = *new ffi::ErrorOr<Driver>(Open());
  return driver;
}

ffi::Error Driver::Check(CUresult result, const char* call, const std::string& context) const {
  if (result == CUDA_SUCCESS) return ffi::Error::Success();
  const char *name = nullptr, *description = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &description);
  const std::string code = name ? name : "CUresult " + std::to_string(static_cast<int>(result));
  return ffi::Error::Internal("jax_fp8gemm: " + std::string(call) + ": " + code +
                              (description ? " (" + std::string(description) + ")" : "") + "; " + context);
}

}  // namespace jax_fp8gemm
