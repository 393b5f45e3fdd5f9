// A launch plan, decoded: what jit/launch.py wrote into the attributes of the custom call.
#ifndef JAX_FP8GEMM_FFI_PLAN_H_
#define JAX_FP8GEMM_FFI_PLAN_H_

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jax_fp8gemm {

namespace ffi = ::xla::ffi;

// Numbers shared with jit/launch.py; tests/test_ffi_plan.py holds the two together.
inline constexpr int kMaxRank = 5;
inline constexpr int kLaunchSize = 8;                     // grid, cluster, block, shared bytes
inline constexpr int kRecordSize = 4 + 3 * kMaxRank + 2;  // int64s per argument
enum class ArgumentKind : int64_t { kPointer = 0, kScalar = 1, kTensorMap = 2 };
enum class MapType : int64_t { kU8 = 0, kBf16 = 1, kF32 = 2 };

// The address of a buffer; buffers are the call's operands, then its results.
struct Pointer {
  int64_t buffer;
};

struct Scalar {
  uint32_t value;
};

// A CUtensorMap over a buffer; dimensions innermost first, `rank` of each array in use.
struct TensorMap {
  int64_t buffer;
  MapType type;
  int rank;
  std::array<uint64_t, kMaxRank> shape;    // elements
  std::array<uint64_t, kMaxRank> strides;  // bytes, of every dimension but the innermost
  std::array<uint32_t, kMaxRank> box;      // elements
  int64_t swizzle;                         // bytes
  uint64_t lead;                           // bytes in front of the buffer at which the addresses begin
  uint64_t extent;                         // bytes from the first address to the end of the last element
};

using Argument = std::variant<Pointer, Scalar, TensorMap>;

struct Plan {
  std::string entry;
  std::array<uint32_t, 3> grid;
  std::array<uint32_t, 3> cluster;
  uint32_t block;
  uint32_t shared_bytes;
  std::vector<Argument> arguments;

  bool empty() const { return grid[0] == 0 || grid[1] == 0 || grid[2] == 0; }
  uint32_t cluster_size() const { return cluster[0] * cluster[1] * cluster[2]; }
};

// Decodes and checks the attributes. A plan that passes is safe to follow, whatever wrote it: every number is
// in the range of its CUDA type. What only the driver knows (a box that fits the swizzle, say) is left to the
// driver, and where in a map with a lead a copy may begin to the kernel.
ffi::ErrorOr<Plan> DecodePlan(std::string_view entry, ffi::Span<const int64_t> launch,
                              ffi::Span<const int64_t> arguments);

// In words, for errors: "kernel fp8_gemm, grid (132, 1, 1), cluster (2, 1, 1), 384 threads, ...".
std::string Describe(const Plan& plan);
std::string Describe(const TensorMap& map);

const char* Name(MapType type);  // "u8", "bf16" or "f32", as in jit/launch.py
uint64_t ItemBytes(MapType type);

}  // namespace jax_fp8gemm

#endif  // JAX_FP8GEMM_FFI_PLAN_H_
