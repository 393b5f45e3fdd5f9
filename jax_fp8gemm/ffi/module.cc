// The extension module: registrations only.
#include <nanobind/nanobind.h>

#include "describe.h"
#include "kernel.h"
#include "stages.h"

namespace nb = nanobind;

namespace jax_fp8gemm {

NB_MODULE(_ffi, module) {
  module.def("handlers", [] {
    nb::dict handlers;
    handlers["instantiate"] = nb::capsule(reinterpret_cast<void*>(&Instantiate));
    handlers["initialize"] = nb::capsule(reinterpret_cast<void*>(&Initialize));
    handlers["execute"] = nb::capsule(reinterpret_cast<void*>(&Execute));
    return handlers;
  });
  module.def("kernel_type", [] {
    nb::dict type;
    type["type_id"] = nb::capsule(&Kernel::id);
    type["type_info"] = nb::capsule(&Kernel::info);
    return type;
  });
  module.def("describe_plan", &DescribePlan, nb::arg("entry"), nb::arg("launch").noconvert(),
             nb::arg("arguments").noconvert());
}

}  // namespace jax_fp8gemm
