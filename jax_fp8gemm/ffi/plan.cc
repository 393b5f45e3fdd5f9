#include "plan.h"

#include <cstddef>
#include <limits>
#include <optional>
#include <string>
#include <utility>

namespace jax_fp8gemm {
namespace {

using Record = ffi::Span<const int64_t>;

ffi::Unexpected<ffi::Error> Malformed(const std::string& message) {
  return ffi::Unexpected(ffi::Error::InvalidArgument("jax_fp8gemm: malformed launch plan: " + message));
}

template <typename Values>
std::string Tuple(const Values& values, int size) {
  std::string out = "(";
  for (int i = 0; i < size; ++i) out += (i ? ", " : "") + std::to_string(values[i]);
  return out + ")";
}

// Reads numbers in a range one after the other and keeps the first error.
class Reader {
 public:
  explicit Reader(ffi::Span<const int64_t> values) : values_(values) {}

  int64_t Next(const std::string& name, int64_t low, int64_t high) {
    const int64_t value = values_[position_++];
    if (error_.empty() && (value < low || value > high)) {
      error_ = name + ": expected " + std::to_string(low) + " to " + std::to_string(high) + ", got " +
               std::to_string(value);
    }
    return value;
  }

  // Skips what a shorter list left unused of kMaxRank numbers.
  void SkipUnused(int used) { position_ += kMaxRank - used; }

  const std::string& error() const { return error_; }

 private:
  ffi::Span<const int64_t> values_;
  size_t position_ = 0;
  std::string error_;
};

// Bytes from the first address to the end of the last element; none if they do not fit into 64 bits.
std::optional<uint64_t> Extent(const TensorMap& map) {
  uint64_t extent;
  if (__builtin_mul_overflow(map.shape[0], ItemBytes(map.type), &extent)) return std::nullopt;
  for (int i = 1; i < map.rank; ++i) {
    uint64_t offset;
    if (__builtin_mul_overflow(map.shape[i] - 1, map.strides[i - 1], &offset) ||
        __builtin_add_overflow(extent, offset, &extent)) {
      return std::nullopt;
    }
  }
  return extent;
}

constexpr int64_t kMaxBuffers = 1024;  // far beyond any call: keeps a corrupt index out of arithmetic

ffi::ErrorOr<Argument> DecodeTensorMap(Reader& reader) {
  TensorMap map{};
  map.buffer = reader.Next("buffer", 0, kMaxBuffers);
  map.type = static_cast<MapType>(reader.Next("dtype", 0, 2));
  map.rank = static_cast<int>(reader.Next("rank", 1, kMaxRank));
  if (!reader.error().empty()) return Malformed(reader.error());

  // The limits of cuTensorMapEncodeTiled.
  for (int i = 0; i < map.rank; ++i) map.shape[i] = reader.Next("shape", 1, int64_t{1} << 32);
  reader.SkipUnused(map.rank);
  for (int i = 0; i < map.rank - 1; ++i) map.strides[i] = reader.Next("strides", 0, (int64_t{1} << 40) - 1);
  reader.SkipUnused(map.rank - 1);
  for (int i = 0; i < map.rank; ++i) map.box[i] = static_cast<uint32_t>(reader.Next("box", 1, 256));
  reader.SkipUnused(map.rank);
  map.swizzle = reader.Next("swizzle", 0, 128);
  map.lead = reader.Next("lead", 0, (int64_t{1} << 40) - 1);
  if (!reader.error().empty()) return Malformed(reader.error());
  if (map.swizzle != 0 && map.swizzle != 32 && map.swizzle != 64 && map.swizzle != 128) {
    return Malformed("swizzle: expected 0, 32, 64 or 128, got " + std::to_string(map.swizzle));
  }

  const std::optional<uint64_t> extent = Extent(map);
  if (!extent) return Malformed(Describe(map) + " spans more than 64 bits of addresses");
  map.extent = *extent;
  return Argument(map);
}

ffi::ErrorOr<Argument> DecodeArgument(Record record) {
  Reader reader(record);
  const auto kind = static_cast<ArgumentKind>(reader.Next("kind", 0, 2));
  if (!reader.error().empty()) return Malformed(reader.error());
  if (kind == ArgumentKind::kTensorMap) return DecodeTensorMap(reader);

  Argument argument;
  if (kind == ArgumentKind::kPointer) {
    argument = Pointer{reader.Next("buffer", 0, kMaxBuffers)};
  } else {
    constexpr int64_t kMax = std::numeric_limits<uint32_t>::max();
    argument = Scalar{static_cast<uint32_t>(reader.Next("value", 0, kMax))};
  }
  if (!reader.error().empty()) return Malformed(reader.error());
  return argument;
}

// The limits of a launch on any GPU that has clusters.
ffi::ErrorOr<Plan> DecodeLaunch(ffi::Span<const int64_t> launch) {
  constexpr int64_t kMaxGridX = std::numeric_limits<int32_t>::max(), kMaxGridYZ = 65535;
  constexpr int64_t kMaxCluster = 16, kMaxBlock = 1024, kMaxShared = 1 << 20;

  Plan plan{};
  Reader reader(launch);
  for (int i = 0; i < 3; ++i) {
    plan.grid[i] = static_cast<uint32_t>(reader.Next("grid", 0, i == 0 ? kMaxGridX : kMaxGridYZ));
  }
  for (uint32_t& size : plan.cluster) size = static_cast<uint32_t>(reader.Next("cluster", 1, kMaxCluster));
  plan.block = static_cast<uint32_t>(reader.Next("block", 1, kMaxBlock));
  plan.shared_bytes = static_cast<uint32_t>(reader.Next("shared_bytes", 0, kMaxShared));
  if (!reader.error().empty()) return Malformed(reader.error());

  if (plan.cluster_size() > kMaxCluster) {
    return Malformed("cluster: expected at most 16 CTAs, got " + Tuple(plan.cluster, 3));
  }
  for (int i = 0; i < 3; ++i) {
    if (plan.grid[i] % plan.cluster[i]) {
      return Malformed("grid: expected whole clusters of " + Tuple(plan.cluster, 3) + ", got " +
                       Tuple(plan.grid, 3));
    }
  }
  return plan;
}

}  // namespace

ffi::ErrorOr<Plan> DecodePlan(std::string_view entry, ffi::Span<const int64_t> launch,
                              ffi::Span<const int64_t> arguments) {
  if (entry.empty()) return Malformed("entry: expected the name of a kernel, got nothing");
  if (launch.size() != kLaunchSize) {
    return Malformed("launch: expected " + std::to_string(kLaunchSize) + " numbers, got " +
                     std::to_string(launch.size()));
  }
  if (arguments.size() % kRecordSize) {
    return Malformed("arguments: expected records of " + std::to_string(kRecordSize) + " numbers, got " +
                     std::to_string(arguments.size()) + " numbers");
  }

  ffi::ErrorOr<Plan> plan = DecodeLaunch(launch);
  if (plan.has_error()) return plan;
  plan->entry = entry;
  for (size_t begin = 0; begin < arguments.size(); begin += kRecordSize) {
    ffi::ErrorOr<Argument> argument = DecodeArgument(Record(arguments.begin() + begin, kRecordSize));
    if (argument.has_error()) {
      return ffi::Unexpected(ffi::Error::InvalidArgument(argument.error().message() + " (argument " +
                                                         std::to_string(begin / kRecordSize) + ")"));
    }
    plan->arguments.push_back(*std::move(argument));
  }
  return plan;
}

// By strings and not by a stream: a stream's locale fails in a module whose C++ library is linked statically.
std::string Describe(const Plan& plan) {
  return "kernel " + plan.entry + ", grid " + Tuple(plan.grid, 3) + ", cluster " + Tuple(plan.cluster, 3) +
         ", " + std::to_string(plan.block) + " threads, " + std::to_string(plan.shared_bytes) +
         " bytes of dynamic shared memory";
}

std::string Describe(const TensorMap& map) {
  return std::string(Name(map.type)) + " tensor map over buffer " + std::to_string(map.buffer) + ": shape " +
         Tuple(map.shape, map.rank) + ", strides " + Tuple(map.strides, map.rank - 1) + ", box " +
         Tuple(map.box, map.rank) + ", swizzle " + std::to_string(map.swizzle) +
         (map.lead ? ", lead " + std::to_string(map.lead) : "");
}

const char* Name(MapType type) {
  switch (type) {
    case MapType::kU8:
      return "u8";
    case MapType::kBf16:
      return "bf16";
    case MapType::kF32:
      return "f32";
  }
  return "unknown";
}

uint64_t ItemBytes(MapType type) {
  switch (type) {
    case MapType::kU8:
      return 1;
    case MapType::kBf16:
      return 2;
    case MapType::kF32:
      return 4;
  }
  return 0;
}

}  // namespace jax_fp8gemm
