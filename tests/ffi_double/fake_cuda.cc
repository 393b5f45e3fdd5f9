// A libcuda.so.1 without a GPU: two devices, and a journal of what was asked of them, one JSON object per
// line.
//
// A fake cubin is text: "entry size size ...;static shared bytes", the sizes being those of the kernel's
// parameters.
#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kNumDevices = 2;
constexpr int kSharedBytes = 232448;

struct FakeKernel {
  std::string entry;
  std::vector<size_t> parameters;
  int shared_bytes = 0;
};

struct FakeFunction {
  const FakeKernel* kernel;
  uintptr_t context;
};

std::mutex mutex;
std::string journal;
std::map<std::string, CUresult> failures;  // by entry point
int num_maps = 0;
thread_local std::vector<CUcontext> contexts;

class Line {
 public:
  explicit Line(const std::string& call) { text_ << "{\"call\": \"" << call << "\""; }
  ~Line() {
    const std::lock_guard<std::mutex> lock(mutex);
    journal += text_.str() + "}\n";
  }
  template <typename T>
  Line& Add(const char* name, const T& value) {
    text_ << ", \"" << name << "\": " << value;
    return *this;
  }
  template <typename T>
  Line& AddList(const char* name, const T* values, int size) {
    text_ << ", \"" << name << "\": [";
    for (int i = 0; i < size; ++i) text_ << (i ? ", " : "") << values[i];
    text_ << "]";
    return *this;
  }

 private:
  std::ostringstream text_;
};

CUresult Failure(const char* call) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = failures.find(call);
  return found == failures.end() ? CUDA_SUCCESS : found->second;
}

uintptr_t CurrentContext() { return contexts.empty() ? 0 : reinterpret_cast<uintptr_t>(contexts.back()); }

std::string Quoted(const std::string& text) { return "\"" + text + "\""; }

}  // namespace

#define RETURN_INJECTED(call)                                            \
  if (const CUresult failure = Failure(call); failure != CUDA_SUCCESS) { \
    return failure;                                                      \
  }

extern "C" {

// For the tests: the journal so far (and a fresh one), and calls that shall fail.
const char* fake_cuda_journal() {
  static thread_local std::string taken;
  const std::lock_guard<std::mutex> lock(mutex);
  taken.clear();
  taken.swap(journal);
  return taken.c_str();
}

void fake_cuda_fail(const char* call, int result) {
  const std::lock_guard<std::mutex> lock(mutex);
  failures[call] = static_cast<CUresult>(result);
}

// Streams and contexts are their device's number plus one, so that none is null.
void* fake_cuda_stream(int device) { return reinterpret_cast<void*>(uintptr_t(device) + 1); }

CUresult cuInit(unsigned) {
  RETURN_INJECTED("cuInit");
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult result, const char** name) {
  if (result == CUDA_ERROR_NOT_FOUND) *name = "CUDA_ERROR_NOT_FOUND";
  if (result == CUDA_ERROR_INVALID_VALUE) *name = "CUDA_ERROR_INVALID_VALUE";
  if (result == CUDA_ERROR_NO_DEVICE) *name = "CUDA_ERROR_NO_DEVICE";
  if (result == CUDA_ERROR_OUT_OF_MEMORY) *name = "CUDA_ERROR_OUT_OF_MEMORY";
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "as told";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = kNumDevices;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  if (attribute != CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) return CUDA_ERROR_INVALID_VALUE;
  *value = kSharedBytes;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) {
  *context = reinterpret_cast<CUcontext>(stream);
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  contexts.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  *context = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned,
                           CUlibraryOption*, void**, unsigned) {
  Line("cuLibraryLoadData").Add("context", CurrentContext());
  RETURN_INJECTED("cuLibraryLoadData");
  std::this_thread::sleep_for(std::chrono::milliseconds(5));  // time for another thread to come by
  auto* kernel = new FakeKernel;
  std::istringstream text(static_cast<const char*>(code));
  text >> kernel->entry;
  for (size_t size; text >> size;) kernel->parameters.push_back(size);
  text.clear();
  char semicolon;
  text >> semicolon >> kernel->shared_bytes;
  *library = reinterpret_cast<CUlibrary>(kernel);
  return CUDA_SUCCESS;
}

CUresult cuLibraryUnload(CUlibrary library) {
  Line("cuLibraryUnload");
  delete reinterpret_cast<FakeKernel*>(library);
  return CUDA_SUCCESS;
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  *kernel = reinterpret_cast<CUkernel>(library);
  return reinterpret_cast<FakeKernel*>(library)->entry == name ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  if (CurrentContext() == 0) return CUDA_ERROR_INVALID_CONTEXT;
  *function = reinterpret_cast<CUfunction>(new FakeFunction{reinterpret_cast<const FakeKernel*>(kernel),
                                                            CurrentContext()});  // the process is short
  return CUDA_SUCCESS;
}

CUresult cuFuncLoad(CUfunction function) {
  Line("cuFuncLoad").Add("context", reinterpret_cast<FakeFunction*>(function)->context);
  RETURN_INJECTED("cuFuncLoad");
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  if (attribute != CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  *value = reinterpret_cast<FakeFunction*>(function)->kernel->shared_bytes;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Line("cuFuncSetAttribute")
      .Add("attribute", attribute)
      .Add("value", value)
      .Add("context", reinterpret_cast<FakeFunction*>(function)->context);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t* offset, size_t* size) {
  const std::vector<size_t>& parameters = reinterpret_cast<FakeFunction*>(function)->kernel->parameters;
  if (index >= parameters.size()) return CUDA_ERROR_INVALID_VALUE;
  *offset = 0;
  *size = parameters[index];
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* shape, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  RETURN_INJECTED("cuTensorMapEncodeTiled");
  if (reinterpret_cast<uintptr_t>(map) % 64) return CUDA_ERROR_INVALID_VALUE;
  const int index = num_maps++;
  std::memcpy(map, &index, sizeof(index));
  Line("cuTensorMapEncodeTiled")
      .Add("map", index)
      .Add("type", type)
      .Add("address", reinterpret_cast<uintptr_t>(address))
      .AddList("shape", shape, rank)
      .AddList("strides", strides, rank - 1)
      .AddList("box", box, rank)
      .AddList("element_strides", element_strides, rank)
      .Add("interleave", interleave)
      .Add("swizzle", swizzle)
      .Add("promotion", promotion)
      .Add("fill", fill);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void**) {
  RETURN_INJECTED("cuLaunchKernelEx");
  const FakeFunction& fake = *reinterpret_cast<FakeFunction*>(function);
  std::vector<uint64_t> values;
  for (size_t i = 0; i < fake.kernel->parameters.size(); ++i) {
    uint64_t value = 0;  // a map shows as its number
    const size_t size = fake.kernel->parameters[i];
    std::memcpy(&value, parameters[i], size == 128 ? sizeof(int) : size);
    values.push_back(value);
  }
  const unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const unsigned block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  unsigned cluster[] = {0, 0, 0};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      cluster[0] = attribute.value.clusterDim.x;
      cluster[1] = attribute.value.clusterDim.y;
      cluster[2] = attribute.value.clusterDim.z;
    }
  }
  Line("cuLaunchKernelEx")
      .Add("entry", Quoted(fake.kernel->entry))
      .Add("context", fake.context)
      .Add("stream", reinterpret_cast<uintptr_t>(config->hStream))
      .AddList("grid", grid, 3)
      .AddList("block", block, 3)
      .AddList("cluster", cluster, 3)
      .Add("shared_bytes", config->sharedMemBytes)
      .AddList("parameters", values.data(), static_cast<int>(values.size()));
  return CUDA_SUCCESS;
}

}  // extern "C"
