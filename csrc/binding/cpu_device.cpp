#include <torch/csrc/stable/ops.h>

#include "device.h"

namespace mimnet_fast::binding {

Device::Device(const Tensor& like) : like_(like) {}

Execution Device::execution() {
  Execution execution{};
  execution.parallel = {[](int64_t count, int64_t grain, void* context, Parallel::Body body) {
                          torch::stable::parallel_for(0, count, grain,
                                                      [context, body](int64_t begin, int64_t end) {
                                                        body(context, begin, end);
                                                      });
                        },
                        int64_t(torch::stable::get_num_threads())};
  return execution;
}

}  // namespace mimnet_fast::binding
