#include "ops.h"

namespace mimnet_fast::binding {
namespace {

// Ids address memory, so they are checked where they are used; everything else was checked in
// Python.
void check_ids(const cpu::View& ids, int64_t rows) {
  for (int64_t i = 0; i < ids.size[0]; ++i) {
    for (int64_t j = 0; j < ids.size[1]; ++j) {
      const int64_t offset = i * ids.stride[0] + j * ids.stride[1];
      const int64_t id = ids.dtype == cpu::DType::int64
                             ? static_cast<const int64_t*>(ids.data)[offset]
                             : static_cast<const int32_t*>(ids.data)[offset];
      STD_TORCH_CHECK(id >= 0 && id < rows, "history: got id ", id, ", need 0 to ", rows - 1,
                      " (a row of the table)");
    }
  }
}

cpu::MIMNetArgs arguments(const Tensor& history, const OptionalTensor& table, const Tensor& source,
                          const Tensor& item, const Tensor& prototype, const Tensor& routing_weight,
                          const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                          const cpu::FusionWeights& fusion, const Tensor& logits,
                          const OptionalTensor& mask, int64_t iterations, int64_t padding) {
  cpu::MIMNetArgs args{};
  args.history = view(history);
  args.table = view(table);
  if (table.has_value()) check_ids(args.history, table->size(0));
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
  args.parallel = parallel();
  return args;
}

}  // namespace

Tensors3 mimnet_forward(Tensor history, OptionalTensor table, Tensor source, Tensor item,
                        Tensor prototype, Tensor routing_weight, Tensor w1, Tensor b1, Tensor w2,
                        Tensor b2, Tensor fine_kw, Tensor, Tensor fine_vw, Tensor fine_vb,
                        Tensor coarse_kw, Tensor, Tensor coarse_vw, Tensor coarse_vb,
                        Tensor fusion_weight, Tensor fusion_bias, Tensor logits,
                        OptionalTensor mask, int64_t iterations, int64_t padding) {
  const int64_t batch = source.size(0), d = source.size(1), k = logits.size(1);
  const ScalarType saved = saved_dtype(source);
  Tensor ratings = empty(source, {batch});
  Tensor pooled = empty(source, {batch, k, d}, saved);
  Tensor transferred = empty(source, {batch, k, d}, saved);
  cpu::MIMNetArgs args =
      arguments(history, table, source, item, prototype, routing_weight, w1, b1, w2, b2,
                fusion_weights(fine_kw, fine_vw, fine_vb, coarse_kw, coarse_vw, coarse_vb,
                               fusion_weight, fusion_bias),
                logits, mask, iterations, padding);
  args.ratings = view(ratings);
  args.pooled = view(pooled);
  args.transferred = view(transferred);
  cpu::kernels().mimnet_forward(args);
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
  cpu::MIMNetArgs args =
      arguments(history, table, source, item, prototype, routing_weight, w1, b1, w2, b2,
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
  cpu::kernels().mimnet_forward_backward(args);
  return std::tuple_cat(grads);
}

}  // namespace mimnet_fast::binding
