// Loaded cubins, one per content and process.
#ifndef JAX_FP8GEMM_FFI_LIBRARY_H_
#define JAX_FP8GEMM_FFI_LIBRARY_H_

#include <cuda.h>

#include <memory>
#include <string_view>

#include "driver.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fp8gemm {

// A loaded cubin; thread-safe. It is unloaded with its last holder.
class Library {
 public:
  // The library of these bytes: the one that somebody still holds, or a new one. Needs no context.
  static ffi::ErrorOr<std::shared_ptr<const Library>> Load(const Driver& driver, std::string_view cubin);

  Library(const Driver& driver, CUlibrary library) : driver_(driver), library_(library) {}
  // Fails only where the process, and so the driver, is ending.
  ~Library() { driver_.cuLibraryUnload(library_); }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  CUlibrary get() const { return library_; }

 private:
  const Driver& driver_;
  const CUlibrary library_;
};

}  // namespace jax_fp8gemm

#endif  // JAX_FP8GEMM_FFI_LIBRARY_H_
