#include "ops.h"

namespace mimnet_fast::binding {
namespace {

cpu::AttentionArgs arguments(const Tensor& query, const Tensor& interests,
                             const OptionalTensor& key_weight, const OptionalTensor& value_weight,
                             const OptionalTensor& value_bias, const OptionalTensor& capsule_mask,
                             double scale, int64_t power, bool hard) {
  cpu::AttentionArgs args{};
  args.query = with_candidates(query, 3);
  args.interests = view(interests);
  args.weights = {view(key_weight), view(value_weight), view(value_bias)};
  args.capsule_mask = view(capsule_mask);
  args.scale = scale;
  args.power = power;
  args.hard = hard;
  args.parallel = parallel();
  return args;
}

}  // namespace

Tensors2 target_attention(Tensor query, Tensor interests, OptionalTensor key_weight, OptionalTensor,
                          OptionalTensor value_weight, OptionalTensor value_bias,
                          OptionalTensor capsule_mask, double scale, int64_t power, bool hard) {
  Tensor out = empty(query, sizes_of(query));
  std::vector<int64_t> sizes = sizes_of(query);
  sizes.back() = interests.size(1);
  Tensor coefficients = empty(query, sizes);
  cpu::AttentionArgs args = arguments(query, interests, key_weight, value_weight, value_bias,
                                      capsule_mask, scale, power, hard);
  args.out = with_candidates(out, 3);
  args.coefficients = with_candidates(coefficients, 3);
  cpu::kernels().target_attention(args);
  return {out, coefficients};
}

Tensors6 target_attention_backward(Tensor grad, OptionalTensor grad_weights, Tensor query,
                                   Tensor interests, OptionalTensor key_weight,
                                   OptionalTensor key_bias, OptionalTensor value_weight,
                                   OptionalTensor value_bias, OptionalTensor capsule_mask,
                                   double scale, int64_t power, bool hard, int64_t needs) {
  Gradients gradients(query, needs);
  Tensors6 grads{gradients.next(query),        gradients.next(interests),
                 gradients.next(key_weight),   gradients.next(key_bias),
                 gradients.next(value_weight), gradients.next(value_bias)};
  cpu::AttentionArgs args = arguments(query, interests, key_weight, value_weight, value_bias,
                                      capsule_mask, scale, power, hard);
  args.grad = with_candidates(grad, 3);
  if (grad_weights.has_value()) args.grad_coefficients = with_candidates(*grad_weights, 3);
  if (needs & 1) args.grad_query = with_candidates(std::get<0>(grads), 3);
  args.grad_interests = wanted(std::get<1>(grads), needs, 1);
  args.grad_weights = {wanted(std::get<2>(grads), needs, 2), wanted(std::get<4>(grads), needs, 4),
                       wanted(std::get<5>(grads), needs, 5)};
  cpu::kernels().target_attention_backward(args);
  torch::stable::zero_(std::get<3>(grads));  // the softmax does not see the key bias
  return grads;
}

}  // namespace mimnet_fast::binding
