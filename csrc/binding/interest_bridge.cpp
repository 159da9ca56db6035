#include "ops.h"

namespace mimnet_fast::binding {
namespace {

BridgeArgs arguments(Device& device, const Tensor& interests, const Tensor& source,
                     const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  const auto fit = [&] {
    if (!is_floating(interests) || interests.dim() != 3 || w1.dim() != 2 || b2.dim() != 1 ||
        (source.dim() != 2 && source.dim() != 3)) {
      return false;
    }
    const int64_t batch = interests.size(0), k = interests.size(1), d_interest = interests.size(2);
    const int64_t d_source = source.size(source.dim() - 1);
    const int64_t hidden = w1.size(0), outputs = b2.size(0);
    const auto is = [&](const Tensor& tensor, std::initializer_list<int64_t> sizes) {
      return fits(tensor, interests, sizes);
    };
    return k > 0 && d_interest > 0 && d_source > 0 && hidden > 0 && outputs > 0 &&
           outputs % d_source == 0 &&
           (is(source, {batch, d_source}) || is(source, {batch, k, d_source})) &&
           is(w1, {hidden, d_interest}) && is(b1, {hidden}) && is(w2, {outputs, hidden}) &&
           is(b2, {outputs});
  };
  check_fit(fit(), "interest_bridge");
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
  Device device(interests);
  BridgeArgs args = arguments(device, interests, source, w1, b1, w2, b2);
  const int64_t d_target = b2.size(0) / source.size(source.dim() - 1);
  Tensor out = empty(interests, {interests.size(0), interests.size(1), d_target});
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
