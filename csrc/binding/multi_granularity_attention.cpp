#include "ops.h"

namespace mimnet_fast::binding {
namespace {

MultiGranularityArgs arguments(Device& device, const Tensor& item, const Tensor& prototype,
                               const Tensor& interests, const FusionTensors& fusion) {
  const int64_t dims = item.dim(), d = dims > 0 ? item.size(dims - 1) : 0;
  const bool of_items = dims == 2   ? fits(prototype, item, {item.size(0), d})
                        : dims == 3 ? fits(prototype, item, {item.size(0), item.size(1), d})
                                    : false;
  check_fit(of_items && is_floating(item) && d > 0 && interests.dim() == 3 &&
                interests.size(1) > 0 &&
                fits(interests, item, {item.size(0), interests.size(1), d}) && fusion.fit(item, d),
            "multi_granularity_attention");
  MultiGranularityArgs args{};
  args.item = with_candidates(item, 3);
  args.prototype = with_candidates(prototype, 3);
  args.interests = view(interests);
  args.weights = fusion.weights();
  args.execution = device.execution();
  return args;
}

}  // namespace

Tensors2 multi_granularity_attention(Tensor item, Tensor prototype, Tensor interests,
                                     Tensor fine_kw, Tensor fine_kb, Tensor fine_vw, Tensor fine_vb,
                                     Tensor coarse_kw, Tensor coarse_kb, Tensor coarse_vw,
                                     Tensor coarse_vb, Tensor fusion_weight, Tensor fusion_bias) {
  Device device(item);
  MultiGranularityArgs args = arguments(device, item, prototype, interests,
                                        {fine_kw, fine_kb, fine_vw, fine_vb, coarse_kw, coarse_kb,
                                         coarse_vw, coarse_vb, fusion_weight, fusion_bias});
  Tensor out = empty(item, item.sizes());
  Tensor gate = empty(item, item.sizes().slice(0, size_t(item.dim() - 1)));
  args.out = with_candidates(out, 3);
  args.gate = with_candidates(gate, 2);
  kernels().multi_granularity_attention(args);
  return {out, gate};
}

Tensors13 multi_granularity_attention_backward(Tensor grad, OptionalTensor grad_gate, Tensor item,
                                               Tensor prototype, Tensor interests, Tensor fine_kw,
                                               Tensor fine_kb, Tensor fine_vw, Tensor fine_vb,
                                               Tensor coarse_kw, Tensor coarse_kb, Tensor coarse_vw,
                                               Tensor coarse_vb, Tensor fusion_weight,
                                               Tensor fusion_bias, int64_t needs) {
  auto grads =
      gradients_like<13>({item, prototype, interests, fine_kw, fine_kb, fine_vw, fine_vb, coarse_kw,
                          coarse_kb, coarse_vw, coarse_vb, fusion_weight, fusion_bias},
                         item, needs);
  Device device(item);
  MultiGranularityArgs args = arguments(device, item, prototype, interests,
                                        {fine_kw, fine_kb, fine_vw, fine_vb, coarse_kw, coarse_kb,
                                         coarse_vw, coarse_vb, fusion_weight, fusion_bias});
  args.grad = with_candidates(grad, 3);
  if (grad_gate.has_value()) args.grad_gate = with_candidates(*grad_gate, 2);
  if (needs & 1) args.grad_item = with_candidates(grads[0], 3);
  if (needs & 2) args.grad_prototype = with_candidates(grads[1], 3);
  args.grad_interests = wanted(grads, needs, 2);
  args.grad_weights = fusion_gradients(grads, needs, 3);
  kernels().multi_granularity_attention_backward(args);
  return std::tuple_cat(grads);
}

}  // namespace mimnet_fast::binding
