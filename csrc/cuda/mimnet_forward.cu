#include <stdexcept>

#include "ops.cuh"

namespace mimnet_fast::cuda {

void mimnet_forward(const MIMNetArgs&) {
  throw std::runtime_error("mimnet_forward: in the making");
}
void mimnet_forward_backward(const MIMNetArgs&) {
  throw std::runtime_error("mimnet_forward: in the making");
}

}  // namespace mimnet_fast::cuda
