// The part of XLA's runtime that calls FFI handlers: builds call frames, keeps the state, owns errors.
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  std::string message;
};

namespace {

// What stands behind the opaque context that a handler gets.
struct Call {
  void* state;
  void* stream;
  int32_t device;
};

Call* Behind(XLA_FFI_ExecutionContext* context) { return reinterpret_cast<Call*>(context); }

const XLA_FFI_Api* Api() {
  static const XLA_FFI_Api* const api = [] {
    auto* api = new XLA_FFI_Api{};
    api->struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api->XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
      return new XLA_FFI_Error{args->message};
    };
    api->XLA_FFI_Stream_Get = [](XLA_FFI_Stream_Get_Args* args) -> XLA_FFI_Error* {
      args->stream = Behind(args->ctx)->stream;
      return nullptr;
    };
    api->XLA_FFI_DeviceOrdinal_Get = [](XLA_FFI_DeviceOrdinal_Get_Args* args) -> XLA_FFI_Error* {
      args->device_ordinal = Behind(args->ctx)->device;
      return nullptr;
    };
    api->XLA_FFI_State_Set = [](XLA_FFI_State_Set_Args* args) -> XLA_FFI_Error* {
      Behind(args->ctx)->state = args->state;
      return nullptr;
    };
    api->XLA_FFI_State_Get = [](XLA_FFI_State_Get_Args* args) -> XLA_FFI_Error* {
      args->state = Behind(args->ctx)->state;
      return nullptr;
    };
    return api;
  }();
  return api;
}

struct Attributes {
  XLA_FFI_ByteSpan cubin, entry;
  XLA_FFI_Array launch, arguments;
};

struct Buffers {
  Buffers(int count, void** addresses, int64_t* sizes) : buffers(count) {
    for (int i = 0; i < count; ++i) {
      buffers[i].struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
      buffers[i].dtype = XLA_FFI_DataType_F8E4M3FN;  // of one byte: sizes are bytes
      buffers[i].data = addresses[i];
      buffers[i].rank = 1;
      buffers[i].dims = &sizes[i];
      pointers.push_back(&buffers[i]);
    }
  }
  std::vector<XLA_FFI_Buffer> buffers;
  std::vector<void*> pointers;
};

XLA_FFI_CallFrame Frame(Call* call, int stage) {
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = Api();
  frame.ctx = reinterpret_cast<XLA_FFI_ExecutionContext*>(call);
  frame.stage = static_cast<XLA_FFI_ExecutionStage>(stage);
  frame.args.struct_size = XLA_FFI_Args_STRUCT_SIZE;
  frame.rets.struct_size = XLA_FFI_Rets_STRUCT_SIZE;
  frame.attrs.struct_size = XLA_FFI_Attrs_STRUCT_SIZE;
  return frame;
}

// The message of a handler's error, or null; valid until the thread's next call.
const char* Outcome(XLA_FFI_Error* error) {
  static thread_local std::string message;
  if (error == nullptr) return nullptr;
  message = error->message;
  delete error;
  return message.c_str();
}

}  // namespace

extern "C" {

// Calls a handler. Every stage is given the attributes, as XLA does; results follow the operands among the
// buffers.
const char* fake_xla_call(XLA_FFI_Handler* handler, int stage, Call* call, const char* cubin,
                          size_t cubin_size, const char* entry, int64_t* launch, size_t launch_size,
                          int64_t* arguments, size_t arguments_size, int num_operands, int num_results,
                          void** addresses, int64_t* sizes) {
  Attributes attributes{{cubin, cubin_size},
                        {entry, std::string_view(entry).size()},
                        {XLA_FFI_DataType_S64, launch_size, launch},
                        {XLA_FFI_DataType_S64, arguments_size, arguments}};
  std::array<XLA_FFI_ByteSpan, 4> names{{{"arguments", 9}, {"cubin", 5}, {"entry", 5}, {"launch", 6}}};
  std::array<XLA_FFI_ByteSpan*, 4> name_pointers{&names[0], &names[1], &names[2], &names[3]};
  std::array<XLA_FFI_AttrType, 4> types{XLA_FFI_AttrType_ARRAY, XLA_FFI_AttrType_STRING,
                                        XLA_FFI_AttrType_STRING, XLA_FFI_AttrType_ARRAY};
  std::array<void*, 4> values{&attributes.arguments, &attributes.cubin, &attributes.entry,
                              &attributes.launch};

  XLA_FFI_CallFrame frame = Frame(call, stage);
  frame.attrs.size = 4;
  frame.attrs.types = types.data();
  frame.attrs.names = name_pointers.data();
  frame.attrs.attrs = values.data();

  Buffers buffers(num_operands + num_results, addresses, sizes);
  std::vector<XLA_FFI_ArgType> operand_types(num_operands, XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> result_types(num_results, XLA_FFI_RetType_BUFFER);
  frame.args.size = num_operands;
  frame.args.types = operand_types.data();
  frame.args.args = buffers.pointers.data();
  frame.rets.size = num_results;
  frame.rets.types = result_types.data();
  frame.rets.rets = buffers.pointers.data() + num_operands;
  return Outcome(handler(&frame));
}

// The traits of a handler, as XLA asks for them before it calls it; -1 on an error.
int64_t fake_xla_traits(XLA_FFI_Handler* handler, int stage) {
  XLA_FFI_Metadata metadata{};
  metadata.struct_size = sizeof(metadata);
  XLA_FFI_Metadata_Extension extension{};
  extension.extension_base.struct_size = sizeof(extension);
  extension.extension_base.type = XLA_FFI_Extension_Metadata;
  extension.metadata = &metadata;
  XLA_FFI_CallFrame frame = Frame(nullptr, stage);
  frame.extension_start = &extension.extension_base;
  return Outcome(handler(&frame)) ? -1 : static_cast<int64_t>(metadata.traits);
}

// What registering a type does: it gets a number.
void fake_xla_register_type(XLA_FFI_TypeId* id) { id->type_id = 1; }

void fake_xla_destroy(const XLA_FFI_TypeInfo* info, Call* call) { info->deleter(call->state); }

}  // extern "C"
