#include "ops.h"

namespace mimnet_fast::binding {
namespace {

// The inputs of both ops, in the order of the schemas.
struct Inputs {
  const Tensor& history;
  const OptionalTensor& table;
  const Tensor &source, &item, &prototype, &routing_weight, &w1, &b1, &w2, &b2;
  const FusionTensors fusion;
  const Tensor& logits;
  const OptionalTensor& mask;
  int64_t iterations, padding;

  bool fit(bool jagged) const {
    if (!is_floating(source) || source.dim() != 2 || logits.dim() < 2 || w1.dim() != 2) {
      return false;
    }
    const int64_t batch = source.size(0), d = source.size(1), hidden = w1.size(0);
    const int64_t k = logits.size(logits.dim() - 2), length = logits.size(logits.dim() - 1);
    const auto is = [&](const Tensor& tensor, std::initializer_list<int64_t> sizes) {
      return fits(tensor, source, sizes);
    };
    const auto history_fits = [&] {
      if (table.has_value()) {
        const bool ids =
            history.scalar_type() == ScalarType::Long || history.scalar_type() == ScalarType::Int;
        return ids && history.device() == source.device() && table->dim() == 2 &&
               is(*table, {table->size(0), d}) && (jagged || has_shape(history, {batch, length}));
      }
      return jagged ? is(history, {history.size(0), d}) : is(history, {batch, length, d});
    };
    const auto logits_fit = [&] {
      if (logits.dim() == 2) return jagged && is(logits, {k, history.size(0)});
      return is(logits, {logits.size(0) == 1 ? 1 : batch, k, length}) && (jagged || length > 0);
    };
    return d > 0 && k > 0 && hidden > 0 && iterations > 0 && padding >= 0 && padding < 3 &&
           is(item, {batch, d}) && is(prototype, {batch, d}) && is(routing_weight, {d, d}) &&
           is(w1, {hidden, d}) && is(b1, {hidden}) && is(w2, {d * d, hidden}) && is(b2, {d * d}) &&
           fusion.fit(source, d) && history_fits() && logits_fit() &&
           tells_lengths(mask, source, batch, length, jagged);
  }
};

MIMNetArgs arguments(Device& device, const Inputs& in) {
  check_fit(in.fit(is_jagged(in.history, in.table.has_value() ? 1 : 2, in.mask)), "mimnet_forward");
  MIMNetArgs args{};
  args.history = view(in.history);
  args.table = view(in.table);
  args.source = view(in.source);
  args.item = view(in.item);
  args.prototype = view(in.prototype);
  args.routing_weight = view(in.routing_weight);
  args.w1 = view(in.w1);
  args.b1 = view(in.b1);
  args.w2 = view(in.w2);
  args.b2 = view(in.b2);
  args.fusion = in.fusion.weights();
  args.logits = view(in.logits);
  args.mask = view(in.mask);
  args.iterations = in.iterations;
  args.padding = Padding(in.padding);
  args.execution = device.execution();
  return args;
}

}  // namespace

Tensors4 mimnet_forward(Tensor history, OptionalTensor table, Tensor source, Tensor item,
                        Tensor prototype, Tensor routing_weight, Tensor w1, Tensor b1, Tensor w2,
                        Tensor b2, Tensor fine_kw, Tensor fine_kb, Tensor fine_vw, Tensor fine_vb,
                        Tensor coarse_kw, Tensor coarse_kb, Tensor coarse_vw, Tensor coarse_vb,
                        Tensor fusion_weight, Tensor fusion_bias, Tensor logits,
                        OptionalTensor mask, int64_t iterations, int64_t padding, bool keep) {
  Device device(source);
  MIMNetArgs args = arguments(device, {history,
                                       table,
                                       source,
                                       item,
                                       prototype,
                                       routing_weight,
                                       w1,
                                       b1,
                                       w2,
                                       b2,
                                       {fine_kw, fine_kb, fine_vw, fine_vb, coarse_kw, coarse_kb,
                                        coarse_vw, coarse_vb, fusion_weight, fusion_bias},
                                       logits,
                                       mask,
                                       iterations,
                                       padding});
  const int64_t batch = source.size(0), d = source.size(1), k = logits.size(logits.dim() - 2);
  const ScalarType saved = saved_dtype(source);
  Tensor ratings = empty(source, {batch});
  Tensor pooled = empty(source, {batch, k, d}, saved);
  Tensor transferred = empty(source, {batch, k, d}, saved);
  args.ratings = view(ratings);
  args.pooled = view(pooled);
  args.transferred = view(transferred);
  Tensor hidden_grad =
      keep ? empty(source, {batch, k, w1.size(0)}, saved) : empty(source, {0}, saved);
  if (keep) args.hidden_grad = view(hidden_grad);
  kernels().mimnet_forward(args);
  return {ratings, pooled, transferred, hidden_grad};
}

Tensors19 mimnet_forward_backward(Tensor grad, Tensor pooled, Tensor transferred,
                                  Tensor hidden_grad, Tensor history, OptionalTensor table,
                                  Tensor source, Tensor item, Tensor prototype,
                                  Tensor routing_weight, Tensor w1, Tensor b1, Tensor w2, Tensor b2,
                                  Tensor fine_kw, Tensor fine_kb, Tensor fine_vw, Tensor fine_vb,
                                  Tensor coarse_kw, Tensor coarse_kb, Tensor coarse_vw,
                                  Tensor coarse_vb, Tensor fusion_weight, Tensor fusion_bias,
                                  Tensor logits, OptionalTensor mask, int64_t iterations,
                                  int64_t padding, int64_t needs) {
  auto grads = gradients_like<19>(
      {history, source, item, prototype, routing_weight, w1, b1, w2, b2, fine_kw, fine_kb, fine_vw,
       fine_vb, coarse_kw, coarse_kb, coarse_vw, coarse_vb, fusion_weight, fusion_bias},
      source, needs);
  Device device(source);
  MIMNetArgs args = arguments(device, {history,
                                       table,
                                       source,
                                       item,
                                       prototype,
                                       routing_weight,
                                       w1,
                                       b1,
                                       w2,
                                       b2,
                                       {fine_kw, fine_kb, fine_vw, fine_vb, coarse_kw, coarse_kb,
                                        coarse_vw, coarse_vb, fusion_weight, fusion_bias},
                                       logits,
                                       mask,
                                       iterations,
                                       padding});
  args.pooled = view(pooled);
  args.transferred = view(transferred);
  if (hidden_grad.dim() == 3) args.hidden_grad = view(hidden_grad);
  args.grad = view(grad);
  args.grad_history = wanted(grads, needs, 0);
  args.grad_source = wanted(grads, needs, 1);
  args.grad_item = wanted(grads, needs, 2);
  args.grad_prototype = wanted(grads, needs, 3);
  args.grad_routing_weight = wanted(grads, needs, 4);
  args.grad_w1 = wanted(grads, needs, 5);
  args.grad_b1 = wanted(grads, needs, 6);
  args.grad_w2 = wanted(grads, needs, 7);
  args.grad_b2 = wanted(grads, needs, 8);
  args.grad_fusion = fusion_gradients(grads, needs, 9);
  kernels().mimnet_forward_backward(args);
  return std::tuple_cat(grads);
}

}  // namespace mimnet_fast::binding
