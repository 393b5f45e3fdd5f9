#include "describe.h"

#include <variant>

#include "plan.h"

namespace nb = nanobind;

namespace jax_fp8gemm {
namespace {

template <typename Values>
nb::tuple ToTuple(const Values& values, int size) {
  nb::list list;
  for (int i = 0; i < size; ++i) list.append(values[i]);
  return nb::tuple(list);
}

nb::dict ToDict(const Pointer& pointer) {
  nb::dict fields;
  fields["kind"] = "Pointer";
  fields["buffer"] = pointer.buffer;
  return fields;
}

nb::dict ToDict(const Scalar& scalar) {
  nb::dict fields;
  fields["kind"] = "Scalar";
  fields["value"] = scalar.value;
  return fields;
}

nb::dict ToDict(const TensorMap& map) {
  nb::dict fields;
  fields["kind"] = "TensorMap";
  fields["buffer"] = map.buffer;
  fields["dtype"] = Name(map.type);
  fields["shape"] = ToTuple(map.shape, map.rank);
  fields["strides"] = ToTuple(map.strides, map.rank - 1);
  fields["box"] = ToTuple(map.box, map.rank);
  fields["swizzle"] = map.swizzle;
  fields["lead"] = map.lead;
  return fields;
}

}  // namespace

nb::dict DescribePlan(const std::string& entry, const Int64Array& launch, const Int64Array& arguments) {
  const ffi::ErrorOr<Plan> plan =
      DecodePlan(entry, {launch.data(), launch.size()}, {arguments.data(), arguments.size()});
  if (plan.has_error()) throw nb::value_error(plan.error().message().c_str());

  nb::list described;
  for (const Argument& argument : plan->arguments) {
    described.append(std::visit([](const auto& kind) { return ToDict(kind); }, argument));
  }
  nb::dict fields;
  fields["entry"] = plan->entry;
  fields["grid"] = ToTuple(plan->grid, 3);
  fields["cluster"] = ToTuple(plan->cluster, 3);
  fields["block"] = plan->block;
  fields["shared_bytes"] = plan->shared_bytes;
  fields["arguments"] = nb::tuple(described);
  return fields;
}

}  // namespace jax_fp8gemm
