#include "ops.h"

namespace mimnet_fast::binding {
namespace {

BridgeArgs arguments(Device& device, const Tensor& interests, const Tensor& source,
                     const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  BridgeArgs args{};
  args.interests = view(interests);
  args.source = view(source);
  args.w1 = view(w1);
  args.b1 = view(b1);
  args.w2 = view(w2);
  args.b2 = view(b2);
  args.execution = device.execution();
  return args;
}

}  // namespace

Tensor interest_bridge(Tensor interests, Tensor source, Tensor w1, Tensor b1, Tensor w2,
                       Tensor b2) {
  const int64_t d_target = b2.size(0) / source.size(source.dim() - 1);
  Tensor out = empty(interests, {interests.size(0), interests.size(1), d_target});
  Device device(interests);
  BridgeArgs args = arguments(device, interests, source, w1, b1, w2, b2);
  args.out = view(out);
  kernels().interest_bridge(args);
  return out;
}

Tensors6 interest_bridge_backward(Tensor grad, Tensor interests, Tensor source, Tensor w1,
                                  Tensor b1, Tensor w2, Tensor b2, int64_t needs) {
  const auto grads = gradients_like<6>({interests, source, w1, b1, w2, b2}, interests, needs);
  Device device(interests);
  BridgeArgs args = arguments(device, interests, source, w1, b1, w2, b2);
  args.grad = view(grad);
  args.grad_interests = wanted(grads, needs, 0);
  args.grad_source = wanted(grads, needs, 1);
  args.grad_w1 = wanted(grads, needs, 2);
  args.grad_b1 = wanted(grads, needs, 3);
  args.grad_w2 = wanted(grads, needs, 4);
  args.grad_b2 = wanted(grads, needs, 5);
  kernels().interest_bridge_backward(args);
  return std::tuple_cat(grads);
}

}  // namespace mimnet_fast::binding
