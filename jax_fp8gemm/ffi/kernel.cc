#include "kernel.h"

#include <string>
#include <utility>

namespace jax_fp8gemm {
namespace {

constexpr uint32_t kPortableClusterSize = 8;

// Makes a stream's context current, and the former one again when it leaves scope: XLA promises none.
class ScopedContext {
 public:
  ScopedContext(const Driver& driver, CUstream stream) : driver_(driver) {
    CUcontext context = nullptr;
    result_ = driver_.cuStreamGetCtx(stream, &context);
    if (result_ == CUDA_SUCCESS) result_ = driver_.cuCtxPushCurrent(context);
  }
  ~ScopedContext() {
    CUcontext popped;
    if (result_ == CUDA_SUCCESS) driver_.cuCtxPopCurrent(&popped);
  }
  ScopedContext(const ScopedContext&) = delete;
  ScopedContext& operator=(const ScopedContext&) = delete;

  CUresult result() const { return result_; }

 private:
  const Driver& driver_;
  CUresult result_;
};

size_t ParameterBytes(const Argument& argument) {
  struct Bytes {
    size_t operator()(const Pointer&) const { return sizeof(CUdeviceptr); }
    size_t operator()(const Scalar&) const { return sizeof(uint32_t); }
    size_t operator()(const TensorMap&) const { return sizeof(CUtensorMap); }
  };
  return std::visit(Bytes{}, argument);
}

}  // namespace

ffi::TypeId Kernel::id = {};
const ffi::TypeInfo Kernel::info = ffi::MakeTypeInfo<Kernel>();

Kernel::Kernel(Plan plan) : plan_(std::move(plan)) {}

Kernel::Kernel(const Driver& driver, Plan plan, std::shared_ptr<const Library> library, CUkernel kernel)
    : driver_(&driver),
      plan_(std::move(plan)),
      library_(std::move(library)),
      kernel_(kernel),
      functions_(driver.num_devices) {}

ffi::ErrorOr<std::unique_ptr<Kernel>> Kernel::Create(std::string_view cubin, Plan plan) {
  const ffi::ErrorOr<Driver>& driver = Driver::Get();
  if (driver.has_error()) return std::unique_ptr<Kernel>(new Kernel(std::move(plan)));
  auto library = Library::Load(*driver, cubin);
  if (library.has_error()) return ffi::Unexpected(library.error());

  CUkernel kernel = nullptr;
  const CUresult result = driver->cuLibraryGetKernel(&kernel, (*library)->get(), plan.entry.c_str());
  if (result != CUDA_SUCCESS) {
    return ffi::Unexpected(driver->Check(result, "cuLibraryGetKernel", Describe(plan)));
  }
  return std::unique_ptr<Kernel>(new Kernel(*driver, std::move(plan), *std::move(library), kernel));
}

ffi::Error Kernel::Prepare(int device, CUstream stream) {
  if (driver_ == nullptr) return Driver::Get().error();
  if (ffi::Error error = CheckDevice(device); error.failure()) return error;
  if (functions_[device].load(std::memory_order_acquire) != nullptr) return ffi::Error::Success();

  // Two threads may come here at once: they do the same work twice, and store the same function.
  const ScopedContext context(*driver_, stream);
  if (ffi::Error error = Check(context.result(), "cuCtxPushCurrent"); error.failure()) return error;
  const ffi::ErrorOr<CUfunction> function = LoadInCurrentContext();
  if (function.has_error()) return function.error();
  if (ffi::Error error = CheckParameters(*function); error.failure()) return error;
  if (ffi::Error error = AllowSharedMemory(*function, device); error.failure()) return error;
  if (plan_.cluster_size() > kPortableClusterSize) {
    ffi::Error error =
        Check(driver_->cuFuncSetAttribute(*function, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
              "cuFuncSetAttribute(NON_PORTABLE_CLUSTER_SIZE_ALLOWED)");
    if (error.failure()) return error;
  }
  functions_[device].store(*function, std::memory_order_release);
  return ffi::Error::Success();
}

ffi::ErrorOr<CUfunction> Kernel::function(int device) const {
  if (ffi::Error error = CheckDevice(device); error.failure()) return ffi::Unexpected(error);
  CUfunction function = functions_[device].load(std::memory_order_acquire);
  if (function == nullptr) {
    return ffi::Unexpected(ffi::Error::Internal("jax_fp8gemm: executed before it was initialized on device " +
                                                std::to_string(device) + "; " + Describe(plan_)));
  }
  return function;
}

// Loads eagerly: a lazy load at the first launch waits for the device, which may be waiting in a collective
// for a device that this launch holds up.
ffi::ErrorOr<CUfunction> Kernel::LoadInCurrentContext() const {
  CUfunction function = nullptr;
  ffi::Error error = Check(driver_->cuKernelGetFunction(&function, kernel_), "cuKernelGetFunction");
  if (error.success()) error = Check(driver_->cuFuncLoad(function), "cuFuncLoad");
  if (error.failure()) return ffi::Unexpected(error);
  return function;
}

// Allows all that the device has, whatever this plan asks for: plans with other needs share the function.
ffi::Error Kernel::AllowSharedMemory(CUfunction function, int device) const {
  int available = 0, fixed = 0;
  ffi::Error error = Check(
      driver_->cuDeviceGetAttribute(&available, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                                    device),
      "cuDeviceGetAttribute(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)");
  if (error.failure()) return error;
  error = Check(driver_->cuFuncGetAttribute(&fixed, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function),
                "cuFuncGetAttribute(SHARED_SIZE_BYTES)");
  if (error.failure()) return error;

  if (int64_t{plan_.shared_bytes} > available - fixed) {
    return ffi::Error::InvalidArgument(
        "jax_fp8gemm: device " + std::to_string(device) + " has " + std::to_string(available) +
        " bytes of shared memory per block, of which the kernel's static variables take " +
        std::to_string(fixed) + "; " + Describe(plan_));
  }
  return Check(driver_->cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                          available - fixed),
               "cuFuncSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES)");
}

ffi::Error Kernel::CheckParameters(CUfunction function) const {
  size_t count = 0, offset, bytes;
  for (; driver_->cuFuncGetParamInfo(function, count, &offset, &bytes) == CUDA_SUCCESS; ++count) {
    if (count < plan_.arguments.size() && bytes != ParameterBytes(plan_.arguments[count])) {
      return ffi::Error::InvalidArgument("jax_fp8gemm: the kernel's parameter " + std::to_string(count) +
                                         " has " + std::to_string(bytes) + " bytes, the plan's argument " +
                                         std::to_string(ParameterBytes(plan_.arguments[count])) + "; " +
                                         Describe(plan_));
    }
  }
  if (count != plan_.arguments.size()) {
    return ffi::Error::InvalidArgument("jax_fp8gemm: the kernel has " + std::to_string(count) +
                                       " parameters, the plan " + std::to_string(plan_.arguments.size()) +
                                       " arguments; " + Describe(plan_));
  }
  return ffi::Error::Success();
}

ffi::Error Kernel::CheckDevice(int device) const {
  const int num_devices = static_cast<int>(functions_.size());
  if (device >= 0 && device < num_devices) return ffi::Error::Success();
  return ffi::Error::Internal("jax_fp8gemm: expected a device ordinal below " +
                              std::to_string(num_devices) + ", got " + std::to_string(device));
}

ffi::Error Kernel::Check(CUresult result, const char* call) const {
  return result == CUDA_SUCCESS ? ffi::Error::Success() : driver_->Check(result, call, Describe(plan_));
}

}  // namespace jax_fp8gemm
