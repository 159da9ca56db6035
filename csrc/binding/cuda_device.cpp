#define USE_CUDA  // the shim declares its CUDA functions only then

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "device.h"

namespace mimnet_fast::binding {

Device::Device(const Tensor& like)
    : like_(like),
      guard_(std::make_shared<torch::stable::accelerator::DeviceGuard>(like.get_device_index())) {}

void* Device::allocate(int64_t bytes) {
  workspaces_.push_back(
      torch::stable::new_empty(like_, {bytes}, torch::headeronly::ScalarType::Byte));
  return workspaces_.back().data_ptr();
}

Execution Device::execution() {
  Execution execution{};
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(like_.get_device_index(), &execution.stream.handle));
  execution.stream.owner = this;
  execution.stream.allocate = [](void* owner, int64_t bytes) {
    return static_cast<Device*>(owner)->allocate(bytes);
  };
  return execution;
}

}  // namespace mimnet_fast::binding
