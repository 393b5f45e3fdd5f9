#include "library.h"

#include <mutex>
#include <string>
#include <unordered_map>

namespace jax_fp8gemm {
namespace {

// Keyed by the bytes themselves: equal keys are equal kernels, with no hash to trust.
struct Registry {
  std::mutex mutex;
  std::unordered_map<std::string, std::weak_ptr<const Library>> libraries;
};

Registry& GetRegistry() {
  // Leaked: XLA may still instantiate while static objects are destroyed.
  static Registry& registry = *new Registry;
  return registry;
}

}  // namespace

ffi::ErrorOr<std::shared_ptr<const Library>> Library::Load(const Driver& driver, std::string_view cubin) {
  Registry& registry = GetRegistry();
  // Held while loading, so that threads that compile the same call at once load its cubin once.
  const std::lock_guard<std::mutex> lock(registry.mutex);
  std::erase_if(registry.libraries, [](const auto& entry) { return entry.second.expired(); });

  std::string key(cubin);
  if (const auto found = registry.libraries.find(key); found != registry.libraries.end()) {
    if (std::shared_ptr<const Library> library = found->second.lock()) return library;
  }

  CUlibrary handle = nullptr;
  ffi::Error error =
      driver.Check(driver.cuLibraryLoadData(&handle, key.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
                   "cuLibraryLoadData", "a cubin of " + std::to_string(cubin.size()) + " bytes");
  if (error.failure()) return ffi::Unexpected(error);
  auto library = std::make_shared<const Library>(driver, handle);
  registry.libraries.insert_or_assign(std::move(key), library);
  return library;
}

}  // namespace jax_fp8gemm
