// The device of the library that runs the CUDA kernels on the host. The library is linked with
// --wrap for two functions of torch, which tell it the memory of a call: what `empty` makes is
// output or workspace, and what the binding otherwise asks the address of is input.
#include "binding/device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>

#include "binding/tensors.h"
#include "executor.h"

using mimnet_fast::cuda::host::global_memory;
using mimnet_fast::cuda::host::Range;

namespace {

thread_local std::vector<void*> made_in_this_call;

void forget_the_call(void*) {
  made_in_this_call.clear();
  global_memory().clear();
}

}  // namespace

extern "C" {

AOTITorchError __real_aoti_torch_aten_new_empty(AtenTensorHandle, const int64_t*, int64_t, int32_t*,
                                                int32_t*, int32_t*, int32_t, int32_t*,
                                                AtenTensorHandle*);
AOTITorchError __real_aoti_torch_get_data_ptr(AtenTensorHandle, void**);

AOTITorchError __wrap_aoti_torch_aten_new_empty(AtenTensorHandle like, const int64_t* sizes,
                                                int64_t dims, int32_t* dtype, int32_t* layout,
                                                int32_t* device, int32_t index, int32_t* pinned,
                                                AtenTensorHandle* made) {
  const AOTITorchError error = __real_aoti_torch_aten_new_empty(like, sizes, dims, dtype, layout,
                                                                device, index, pinned, made);
  if (error != AOTI_TORCH_SUCCESS) return error;
  void* data;
  int64_t count;
  int32_t type;
  __real_aoti_torch_get_data_ptr(*made, &data);
  aoti_torch_get_numel(*made, &count);
  aoti_torch_get_dtype(*made, &type);
  constexpr int nan = 0xff;  // in every byte
  std::memset(data, nan, size_t(count) * aoti_torch_dtype_element_size(type));
  made_in_this_call.push_back(data);
  return error;
}

AOTITorchError __wrap_aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_aoti_torch_get_data_ptr(tensor, data);
  int64_t dims, *sizes, *strides;
  int32_t dtype;
  aoti_torch_get_dim(tensor, &dims);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  int64_t last = 0;
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] == 0) return error;
    last += (sizes[d] - 1) * strides[d];
  }
  const auto begin = reinterpret_cast<uintptr_t>(*data);
  const bool made = std::count(made_in_this_call.begin(), made_in_this_call.end(), *data) > 0;
  global_memory().push_back(
      {begin, begin + size_t(last + 1) * aoti_torch_dtype_element_size(dtype), made});
  return error;
}

}  // extern "C"

namespace mimnet_fast::binding {

Device::Device(const Tensor& like) : like_(like), guard_(nullptr, forget_the_call) {
  STD_TORCH_CHECK(like.scalar_type() != torch::headeronly::ScalarType::Double,
                  "mimnet_fast: CUDA kernels serve no float64");
}

void* Device::allocate(int64_t bytes) {
  workspaces_.push_back(empty(like_, {bytes}, ScalarType::Byte));
  return workspaces_.back().data_ptr();
}

Execution Device::execution() {
  Execution execution{};
  execution.stream.owner = this;
  execution.stream.allocate = [](void* owner, int64_t bytes) {
    return static_cast<Device*>(owner)->allocate(bytes);
  };
  return execution;
}

}  // namespace mimnet_fast::binding
