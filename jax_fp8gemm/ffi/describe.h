// A launch plan shown to Python, as the C++ side understands it.
#ifndef JAX_FP8GEMM_FFI_DESCRIBE_H_
#define JAX_FP8GEMM_FFI_DESCRIBE_H_

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <string>

namespace jax_fp8gemm {

using Int64Array =
    nanobind::ndarray<const int64_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// A dictionary with the fields of jit.launch.LaunchPlan but the cubin; "arguments" is a list of dictionaries
// with the fields of Pointer, Scalar or TensorMap and their "kind". Raises ValueError where Instantiate would
// fail.
nanobind::dict DescribePlan(const std::string& entry, const Int64Array& launch, const Int64Array& arguments);

}  // namespace jax_fp8gemm

#endif  // JAX_FP8GEMM_FFI_DESCRIBE_H_
