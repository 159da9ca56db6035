#include "ops.h"

namespace mimnet_fast::binding {
namespace {

// The inputs of both ops, in the order of the schemas.
struct Inputs {
  const Tensor& inputs;
  const OptionalTensor &weight, &logits, &mask, &capsule_mask;
  int64_t capsules, iterations, softmax_over, padding, update;
  bool normalize_agreement, full_gradient, inner_squash, final_squash;
  double temperature;
  int64_t squash;
  double eps, power;

  bool fit() const {
    const int64_t dims = inputs.dim(), k = capsules;
    if (!is_floating(inputs) || dims < 2 || dims > 4 || k < 1 || iterations < 1) return false;
    const bool jagged = is_jagged(inputs, 2, mask);
    const int64_t batch = jagged ? mask->size(0) - 1 : inputs.size(0);
    const int64_t rows = inputs.size(dims - 2), d_in = inputs.size(dims - 1);
    if (d_in < 1 || (!jagged && rows < 1) || (dims == 4 && inputs.size(1) != k)) return false;
    const bool per_position = weight.has_value() && weight->dim() == 4;
    // Positions, which jagged histories may leave to what is given for each.
    int64_t length = rows;
    if (jagged && per_position) length = weight->size(0);
    if (jagged && !per_position && logits.has_value() && logits->dim() == 3) {
      length = logits->size(2);
    }
    const auto weight_fits = [&] {
      if (!weight.has_value()) return true;
      if (dims == 4 || weight->dim() < 2) return false;
      const int64_t d = weight->size(weight->dim() - 1);
      return d > 0 && (fits(weight, inputs, {d_in, d}) || fits(weight, inputs, {k, d_in, d}) ||
                       fits(weight, inputs, {length, k, d_in, d}));
    };
    const auto logits_fit = [&] {
      if (!logits.has_value()) return true;
      if (jagged && fits(logits, inputs, {k, rows})) return true;
      return fits(logits, inputs, {1, k, length}) || fits(logits, inputs, {batch, k, length});
    };
    return weight_fits() && logits_fit() && is_mask(capsule_mask, inputs, {batch, k}) &&
           tells_lengths(mask, inputs, batch, rows, jagged);
  }
};

RoutingArgs arguments(Device& device, const Inputs& in) {
  check_fit(in.fit(), "dynamic_routing");
  RoutingArgs args{};
  args.inputs = view(in.inputs);
  args.weight = view(in.weight);
  args.logits = view(in.logits);
  args.mask = view(in.mask);
  args.capsule_mask = view(in.capsule_mask);
  args.capsules = in.capsules;
  args.iterations = in.iterations;
  args.axis = SoftmaxAxis(in.softmax_over);
  args.padding = Padding(in.padding);
  args.update = Update(in.update);
  args.normalize_agreement = in.normalize_agreement;
  args.full_gradient = in.full_gradient;
  args.inner_squash = in.inner_squash;
  args.final_squash = in.final_squash;
  args.temperature = in.temperature;
  args.squash = {SquashForm(in.squash), in.eps, in.power};
  args.execution = device.execution();
  return args;
}

}  // namespace

Tensors3 dynamic_routing(Tensor inputs, OptionalTensor weight, OptionalTensor logits,
                         OptionalTensor mask, OptionalTensor capsule_mask, int64_t num_capsules,
                         int64_t iterations, int64_t softmax_over, int64_t padding, int64_t update,
                         bool normalize_agreement, bool full_gradient, bool inner_squash,
                         bool final_squash, double temperature, int64_t squash, double eps,
                         double power) {
  Device device(inputs);
  RoutingArgs args =
      arguments(device, {inputs, weight, logits, mask, capsule_mask, num_capsules, iterations,
                         softmax_over, padding, update, normalize_agreement, full_gradient,
                         inner_squash, final_squash, temperature, squash, eps, power});
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
  args.out = view(out);
  args.coupling = view(coupling);
  args.pooled = view(pooled);
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
  const bool jagged = is_jagged(inputs, 2, mask);
  STD_TORCH_CHECK(coupling.dim() == (jagged ? 2 : 3), "mimnet_fast: got another coupling");
  Device device(inputs);
  RoutingArgs args = arguments(
      device, {inputs, weight, logits, mask, capsule_mask, coupling.size(jagged ? 0 : 1),
               iterations, softmax_over, padding, update, normalize_agreement, full_gradient,
               inner_squash, final_squash, temperature, squash, eps, power});
  auto grads = gradients_like<3>({inputs, weight, logits}, inputs, needs);
  // No history may reach the last of the logits.
  if (jagged) torch::stable::zero_(grads[2]);
  args.coupling = view(coupling);
  args.pooled = view(pooled);
  args.grad = view(grad);
  args.grad_inputs = wanted(grads, needs, 0);
  args.grad_weight = wanted(grads, needs, 1);
  args.grad_logits = wanted(grads, needs, 2);
  kernels().dynamic_routing_backward(args);
  return std::tuple_cat(grads);
}

}  // namespace mimnet_fast::binding
