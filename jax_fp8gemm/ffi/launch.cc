#include "launch.h"

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace jax_fp8gemm {
namespace {

constexpr uintptr_t kMapAlignment = 16;  // bytes: of the address under a tensor map

// A kernel parameter as the driver reads it.
union Parameter {
  CUdeviceptr address;
  uint32_t scalar;
  CUtensorMap map;
};

std::string Describe(const Buffer& buffer) {
  return std::to_string(buffer.bytes) + " bytes at address " +
         std::to_string(reinterpret_cast<uintptr_t>(buffer.data));
}

CUtensorMapDataType DataType(MapType type) {
  switch (type) {
    case MapType::kBf16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case MapType::kF32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case MapType::kU8:
      break;
  }
  return CU_TENSOR_MAP_DATA_TYPE_UINT8;
}

CUtensorMapSwizzle Swizzle(int64_t bytes) {
  switch (bytes) {
    case 32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case 64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case 128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
  }
  return CU_TENSOR_MAP_SWIZZLE_NONE;
}

// Fills kernel parameters, one overload per kind of argument.
class Filler {
 public:
  Filler(const Driver& driver, const Plan& plan, ffi::Span<const Buffer> buffers)
      : driver_(driver), plan_(plan), buffers_(buffers) {}

  ffi::Error Fill(const Pointer& pointer, Parameter& parameter) const {
    if (ffi::Error error = CheckBuffer(pointer.buffer); error.failure()) return error;
    parameter.address = reinterpret_cast<CUdeviceptr>(buffers_[pointer.buffer].data);
    return ffi::Error::Success();
  }

  ffi::Error Fill(const Scalar& scalar, Parameter& parameter) const {
    parameter.scalar = scalar.value;
    return ffi::Error::Success();
  }

  ffi::Error Fill(const TensorMap& map, Parameter& parameter) const {
    if (ffi::Error error = CheckBuffer(map.buffer); error.failure()) return error;
    const Buffer& buffer = buffers_[map.buffer];
    if (map.extent > map.lead + buffer.bytes) {
      return Invalid(Describe(map) + " reaches over " + std::to_string(map.extent) +
                     " bytes, the buffer has " + Describe(buffer));
    }
    if ((reinterpret_cast<uintptr_t>(buffer.data) - map.lead) % kMapAlignment) {
      return Invalid(Describe(map) + " needs an address that is a multiple of 16, got " + Describe(buffer));
    }
    return Encode(map, buffer, parameter.map);
  }

 private:
  ffi::Error Encode(const TensorMap& map, const Buffer& buffer, CUtensorMap& encoded) const {
    std::array<uint32_t, kMaxRank> element_strides;
    element_strides.fill(1);
    // FP8 operands are read in boxes 128 bytes wide, one after the other along K: fetch two at a time.
    const CUtensorMapL2promotion promotion =
        map.type == MapType::kU8 ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
    void* const address = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(buffer.data) - map.lead);
    const CUresult result = driver_.cuTensorMapEncodeTiled(
        &encoded, DataType(map.type), map.rank, address, map.shape.data(), map.strides.data(), map.box.data(),
        element_strides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, Swizzle(map.swizzle), promotion,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // zeros outside of the shape
    if (result == CUDA_SUCCESS) return ffi::Error::Success();
    return driver_.Check(result, "cuTensorMapEncodeTiled", Describe(map) + "; " + Describe(plan_));
  }

  ffi::Error CheckBuffer(int64_t index) const {
    if (index < static_cast<int64_t>(buffers_.size())) return ffi::Error::Success();
    return Invalid("expected a buffer index below " + std::to_string(buffers_.size()) + ", got " +
                   std::to_string(index));
  }

  ffi::Error Invalid(const std::string& message) const {
    return ffi::Error::InvalidArgument("jax_fp8gemm: " + message + "; " + Describe(plan_));
  }

  const Driver& driver_;
  const Plan& plan_;
  ffi::Span<const Buffer> buffers_;
};

ffi::Error Enqueue(const Driver& driver, const Plan& plan, CUfunction function, CUstream stream,
                   void** parameters) {
  CUlaunchAttribute cluster{};
  cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  cluster.value.clusterDim = {plan.cluster[0], plan.cluster[1], plan.cluster[2]};
  CUlaunchConfig config{};
  config.gridDimX = plan.grid[0], config.gridDimY = plan.grid[1], config.gridDimZ = plan.grid[2];
  config.blockDimX = plan.block, config.blockDimY = 1, config.blockDimZ = 1;
  config.sharedMemBytes = plan.shared_bytes;
  config.hStream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.cluster_size() > 1 ? 1 : 0;
  const CUresult result = driver.cuLaunchKernelEx(&config, function, parameters, nullptr);
  if (result == CUDA_SUCCESS) return ffi::Error::Success();
  return driver.Check(result, "cuLaunchKernelEx", Describe(plan));
}

}  // namespace

ffi::Error Launch(const Driver& driver, const Plan& plan, CUfunction function, CUstream stream,
                  ffi::Span<const Buffer> buffers) {
  if (plan.empty()) return ffi::Error::Success();  // CUDA refuses an empty grid; nothing is what it asks for

  const Filler filler(driver, plan, buffers);
  std::vector<Parameter> parameters(plan.arguments.size());
  std::vector<void*> addresses(plan.arguments.size());
  for (size_t i = 0; i < plan.arguments.size(); ++i) {
    addresses[i] = &parameters[i];
    ffi::Error error = std::visit([&](const auto& argument) { return filler.Fill(argument, parameters[i]); },
                                  plan.arguments[i]);
    if (error.failure()) return error;
  }
  return Enqueue(driver, plan, function, stream, addresses.data());
}

}  // namespace jax_fp8gemm
