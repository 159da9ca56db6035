#include "ops.h"

namespace mimnet_fast::binding {
namespace {

MIMNetArgs arguments(Device& device, const Tensor& history, const OptionalTensor& table,
                     const Tensor& source, const Tensor& item, const Tensor& prototype,
                     const Tensor& routing_weight, const Tensor& w1, const Tensor& b1,
                     const Tensor& w2, const Tensor& b2, const FusionWeights& fusion,
                     const Tensor& logits, const OptionalTensor& mask, int64_t iterations,
                     int64_t padding) {
  const bool jagged = is_jagged(history, table.has_value() ? 1 : 2, mask);
  STD_TORCH_CHECK(!jagged || mask->size(0) == source.size(0) + 1,
                  "mimnet_fast: offsets need a value more than there are users");
  MIMNetArgs args{};
  args.history = view(history);
  args.table = view(table);
  args.source = view(source);
  args.item = view(item);
  args.prototype = view(prototype);
  args.routing_weight = view(routing_weight);
  args.w1 = view(w1);
  args.b1 = view(b1);
  args.w2 = view(w2);
  args.b2 = view(b2);
  args.fusion = fusion;
  args.logits = view(logits);
  args.mask = view(mask);
  args.iterations = iterations;
  args.padding = Padding(padding);
  args.execution = device.execution();
  return args;
}

}  // namespace

Tensors3 mimnet_forward(Tensor history, OptionalTensor table, Tensor source, Tensor item,
                        Tensor prototype, Tensor routing_weight, Tensor w1, Tensor b1, Tensor w2,
                        Tensor b2, Tensor fine_kw, Tensor, Tensor fine_vw, Tensor fine_vb,
                        Tensor coarse_kw, Tensor, Tensor coarse_vw, Tensor coarse_vb,
                        Tensor fusion_weight, Tensor fusion_bias, Tensor logits,
                        OptionalTensor mask, int64_t iterations, int64_t padding) {
  const int64_t batch = source.size(0), d = source.size(1), k = logits.size(logits.dim() - 2);
  const ScalarType saved = saved_dtype(source);
  Tensor ratings = empty(source, {batch});
  Tensor pooled = empty(source, {batch, k, d}, saved);
  Tensor transferred = empty(source, {batch, k, d}, saved);
  Device device(source);
  MIMNetArgs args =
      arguments(device, history, table, source, item, prototype, routing_weight, w1, b1, w2, b2,
                fusion_weights(fine_kw, fine_vw, fine_vb, coarse_kw, coarse_vw, coarse_vb,
                               fusion_weight, fusion_bias),
                logits, mask, iterations, padding);
  args.ratings = view(ratings);
  args.pooled = view(pooled);
  args.transferred = view(transferred);
  kernels().mimnet_forward(args);
  return {ratings, pooled, transferred};
}

Tensors19 mimnet_forward_backward(Tensor grad, Tensor pooled, Tensor transferred, Tensor history,
                                  OptionalTensor table, Tensor source, Tensor item,
                                  Tensor prototype, Tensor routing_weight, Tensor w1, Tensor b1,
                                  Tensor w2, Tensor b2, Tensor fine_kw, Tensor fine_kb,
                                  Tensor fine_vw, Tensor fine_vb, Tensor coarse_kw,
                                  Tensor coarse_kb, Tensor coarse_vw, Tensor coarse_vb,
                                  Tensor fusion_weight, Tensor fusion_bias, Tensor logits,
                                  OptionalTensor mask, int64_t iterations, int64_t padding,
                                  int64_t needs) {
  auto grads = gradients_like<19>(
      {history, source, item, prototype, routing_weight, w1, b1, w2, b2, fine_kw, fine_kb, fine_vw,
       fine_vb, coarse_kw, coarse_kb, coarse_vw, coarse_vb, fusion_weight, fusion_bias},
      source, needs);
  Device device(source);
  MIMNetArgs args =
      arguments(device, history, table, source, item, prototype, routing_weight, w1, b1, w2, b2,
                fusion_weights(fine_kw, fine_vw, fine_vb, coarse_kw, coarse_vw, coarse_vb,
                               fusion_weight, fusion_bias),
                logits, mask, iterations, padding);
  args.pooled = view(pooled);
  args.transferred = view(transferred);
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
