// The device that a call runs on: one definition per library, in <device>_device.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <vector>

#include "../common/kernels.h"

namespace mimnet_fast::binding {

using torch::stable::Tensor;

// Lives as long as the call: it makes the device current and holds the kernels' workspaces.
class Device {
 public:
  explicit Device(const Tensor& like);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  Execution execution();

 private:
  void* allocate(int64_t bytes);

  Tensor like_;
  std::shared_ptr<void> guard_;
  std::vector<Tensor> workspaces_;
};

}  // namespace mimnet_fast::binding
