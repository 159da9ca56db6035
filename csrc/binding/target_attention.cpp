#include <cmath>

#include "ops.h"

namespace mimnet_fast::binding {
namespace {

AttentionArgs arguments(Device& device, const Tensor& query, const Tensor& interests,
                        const OptionalTensor& key_weight, const OptionalTensor& key_bias,
                        const OptionalTensor& value_weight, const OptionalTensor& value_bias,
                        const OptionalTensor& capsule_mask, double scale, int64_t power,
                        bool hard) {
  const auto fit = [&] {
    if (!is_floating(query) || (query.dim() != 2 && query.dim() != 3) || interests.dim() != 3) {
      return false;
    }
    const int64_t batch = query.size(0), k = interests.size(1), d = query.size(query.dim() - 1);
    const auto projection = [&](const OptionalTensor& weight, const OptionalTensor& bias) {
      return fits(weight, query, {d, d}) && fits(bias, query, {d}) &&
             (weight.has_value() || !bias.has_value());
    };
    return k > 0 && d > 0 && fits(interests, query, {batch, k, d}) &&
           projection(key_weight, key_bias) && projection(value_weight, value_bias) &&
           is_mask(capsule_mask, query, {batch, k}) && std::isfinite(scale) && scale > 0 &&
           power > 0 && (power == 1 || !key_bias.has_value());  // which cancels only there
  };
  check_fit(fit(), "target_attention");
  AttentionArgs args{};
  args.query = with_candidates(query, 3);
  args.interests = view(interests);
  args.weights = {view(key_weight), view(value_weight), view(value_bias)};
  args.capsule_mask = view(capsule_mask);
  args.scale = scale;
  args.power = power;
  args.hard = hard;
  args.execution = device.execution();
  return args;
}

}  // namespace

Tensors2 target_attention(Tensor query, Tensor interests, OptionalTensor key_weight,
                          OptionalTensor key_bias, OptionalTensor value_weight,
                          OptionalTensor value_bias, OptionalTensor capsule_mask, double scale,
                          int64_t power, bool hard) {
  Device device(query);
  AttentionArgs args = arguments(device, query, interests, key_weight, key_bias, value_weight,
                                 value_bias, capsule_mask, scale, power, hard);
  Tensor out = empty(query, query.sizes());
  std::vector<int64_t> sizes = query.sizes().vec();
  sizes.back() = interests.size(1);
  Tensor coefficients = empty(query, sizes);
  args.out = with_candidates(out, 3);
  args.coefficients = with_candidates(coefficients, 3);
  kernels().target_attention(args);
  return {out, coefficients};
}

Tensors6 target_attention_backward(Tensor grad, OptionalTensor grad_weights, Tensor query,
                                   Tensor interests, OptionalTensor key_weight,
                                   OptionalTensor key_bias, OptionalTensor value_weight,
                                   OptionalTensor value_bias, OptionalTensor capsule_mask,
                                   double scale, int64_t power, bool hard, int64_t needs) {
  const auto grads = gradients_like<6>(
      {query, interests, key_weight, key_bias, value_weight, value_bias}, query, needs);
  Device device(query);
  AttentionArgs args = arguments(device, query, interests, key_weight, key_bias, value_weight,
                                 value_bias, capsule_mask, scale, power, hard);
  args.grad = with_candidates(grad, 3);
  if (grad_weights.has_value()) args.grad_coefficients = with_candidates(*grad_weights, 3);
  if (needs & 1) args.grad_query = with_candidates(grads[0], 3);
  args.grad_interests = wanted(grads, needs, 1);
  args.grad_weights = {wanted(grads, needs, 2), wanted(grads, needs, 4), wanted(grads, needs, 5)};
  kernels().target_attention_backward(args);
  Tensor key_bias_grad = grads[3];
  torch::stable::zero_(key_bias_grad);  // the softmax does not see the key bias
  return std::tuple_cat(grads);
}

}  // namespace mimnet_fast::binding
