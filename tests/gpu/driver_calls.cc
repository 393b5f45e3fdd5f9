// Counts the calls of the CUDA driver by their names, whoever makes them: CUPTI calls back on each.
//
// A library for tests: start, work, read, stop. A process can have one subscriber of CUPTI at a time.

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include <dlfcn.h>

namespace {

// From cupti_callbacks.h and cupti_result.h, so that no headers are needed.
struct CallbackData {
  int site;  // 0: entering the call
  const char* function;
  // more follows
};
using Callback = void (*)(void* user, int domain, uint32_t id, const void* data);
using Subscribe = int (*)(void** subscriber, Callback callback, void* user);
using EnableDomain = int (*)(uint32_t enable, void* subscriber, int domain);
using Unsubscribe = int (*)(void* subscriber);
constexpr int kDriverApi = 1;

std::mutex mutex;
std::map<std::string, int> counts;
void* cupti = nullptr;
void* subscriber = nullptr;

void Count(void*, int, uint32_t, const void* data) {
  const auto& call = *static_cast<const CallbackData*>(data);
  if (call.site != 0) return;
  std::lock_guard lock(mutex);
  ++counts[call.function];
}

template <typename Function>
Function Find(const char* name) {
  return reinterpret_cast<Function>(dlsym(cupti, name));
}

}  // namespace

extern "C" {

// Starts counting with the libcupti at `path`; returns CUPTI's status, 0 for success, or -1.
int driver_calls_start(const char* path) {
  cupti = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (cupti == nullptr) return -1;
  if (int status = Find<Subscribe>("cuptiSubscribe")(&subscriber, Count, nullptr)) return status;
  return Find<EnableDomain>("cuptiEnableDomain")(1, subscriber, kDriverApi);
}

// Writes a line "name count" for each function called since the last time, and forgets them. Returns the
// bytes needed; text that is longer than `size` is cut off.
int driver_calls_take(char* text, int size) {
  std::lock_guard lock(mutex);
  std::string lines;
  for (const auto& [name, count] : counts) lines += name + ' ' + std::to_string(count) + '\n';
  counts.clear();
  if (size > 0) {
    std::strncpy(text, lines.c_str(), size - 1);
    text[size - 1] = '\0';
  }
  return static_cast<int>(lines.size()) + 1;
}

int driver_calls_stop() { return Find<Unsubscribe>("cuptiUnsubscribe")(subscriber); }

}  // extern "C"
