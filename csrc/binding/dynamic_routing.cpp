#include "ops.h"

namespace mimnet_fast::binding {

Tensors3 dynamic_routing(Tensor inputs, OptionalTensor weight, OptionalTensor logits,
                         OptionalTensor mask, OptionalTensor capsule_mask, int64_t num_capsules,
                         int64_t iterations, int64_t softmax_over, int64_t padding, int64_t update,
                         bool normalize_agreement, bool full_gradient, bool inner_squash,
                         bool final_squash, double temperature, int64_t squash, double eps,
                         double power) {
  const bool jagged = is_jagged(inputs, 2, mask);
  const int64_t batch = jagged ? mask->size(0) - 1 : inputs.size(0);
  const int64_t length = inputs.size(inputs.dim() - 2), d_in = inputs.size(inputs.dim() - 1);
  const int64_t d = weight.has_value() ? weight->size(weight->dim() - 1) : d_in;
  const ScalarType saved = saved_dtype(inputs);
  Tensor out = empty(inputs, {batch, num_capsules, d});
  Tensor coupling = jagged ? empty(inputs, {num_capsules, length}, saved)
                           : empty(inputs, {batch, num_capsules, length}, saved);
  const bool per_position = weight.has_value() && weight->dim() == 4;
  Tensor pooled = empty(inputs, {batch, num_capsules, per_position ? d : d_in}, saved);
  Device device(inputs);
  RoutingArgs args{};
  args.inputs = view(inputs);
  args.weight = view(weight);
  args.logits = view(logits);
  args.mask = view(mask);
  args.capsule_mask = view(capsule_mask);
  args.capsules = num_capsules;
  args.iterations = iterations;
  args.axis = SoftmaxAxis(softmax_over);
  args.padding = Padding(padding);
  args.update = Update(update);
  args.normalize_agreement = normalize_agreement;
  args.full_gradient = full_gradient;
  args.inner_squash = inner_squash;
  args.final_squash = final_squash;
  args.temperature = temperature;
  args.squash = {SquashForm(squash), eps, power};
  args.out = view(out);
  args.coupling = view(coupling);
  args.pooled = view(pooled);
  args.execution = device.execution();
  kernels().dynamic_routing(args);
  return {out, coupling, pooled};
}

Tensors3 dynamic_routing_backward(Tensor grad, Tensor inputs, OptionalTensor weight,
                                  OptionalTensor logits, OptionalTensor mask,
                                  OptionalTensor capsule_mask, Tensor coupling, Tensor pooled,
                                  int64_t iterations, int64_t softmax_over, int64_t padding,
                                  int64_t update, bool normalize_agreement, bool full_gradient,
                                  bool inner_squash, bool final_squash, double temperature,
                                  int64_t squash, double eps, double power, int64_t needs) {
  auto grads = gradients_like<3>({inputs, weight, logits}, inputs, needs);
  const bool jagged = is_jagged(inputs, 2, mask);
  // No history may reach the last of the logits.
  if (jagged) torch::stable::zero_(grads[2]);
  Device device(inputs);
  RoutingArgs args{};
  args.inputs = view(inputs);
  args.weight = view(weight);
  args.logits = view(logits);
  args.mask = view(mask);
  args.capsule_mask = view(capsule_mask);
  args.capsules = coupling.size(jagged ? 0 : 1);
  args.iterations = iterations;
  args.axis = SoftmaxAxis(softmax_over);
  args.padding = Padding(padding);
  args.update = Update(update);
  args.normalize_agreement = normalize_agreement;
  args.full_gradient = full_gradient;
  args.inner_squash = inner_squash;
  args.final_squash = final_squash;
  args.temperature = temperature;
  args.squash = {SquashForm(squash), eps, power};
  args.coupling = view(coupling);
  args.pooled = view(pooled);
  args.grad = view(grad);
  args.grad_inputs = wanted(grads, needs, 0);
  args.grad_weight = wanted(grads, needs, 1);
  args.grad_logits = wanted(grads, needs, 2);
  args.execution = device.execution();
  kernels().dynamic_routing_backward(args);
  return std::tuple_cat(grads);
}

}  // namespace mimnet_fast::binding
