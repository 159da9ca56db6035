#include "ops.h"

namespace mimnet_fast::binding {
namespace {

cpu::MultiGranularityArgs arguments(const Tensor& item, const Tensor& prototype,
                                    const Tensor& interests, const cpu::FusionWeights& weights) {
  cpu::MultiGranularityArgs args{};
  args.item = with_candidates(item, 3);
  args.prototype = with_candidates(prototype, 3);
  args.interests = view(interests);
  args.weights = weights;
  args.parallel = parallel();
  return args;
}

}  // namespace

Tensors2 multi_granularity_attention(Tensor item, Tensor prototype, Tensor interests,
                                     Tensor fine_kw, Tensor, Tensor fine_vw, Tensor fine_vb,
                                     Tensor coarse_kw, Tensor, Tensor coarse_vw, Tensor coarse_vb,
                                     Tensor fusion_weight, Tensor fusion_bias) {
  Tensor out = empty(item, sizes_of(item));
  std::vector<int64_t> sizes = sizes_of(item);
  sizes.pop_back();
  Tensor gate = empty(item, sizes);
  cpu::MultiGranularityArgs args = arguments(item, prototype, interests,
                                             {{view(fine_kw), view(fine_vw), view(fine_vb)},
                                              {view(coarse_kw), view(coarse_vw), view(coarse_vb)},
                                              view(fusion_weight),
                                              view(fusion_bias)});
  args.out = with_candidates(out, 3);
  args.gate = with_candidates(gate, 2);
  cpu::kernels().multi_granularity_attention(args);
  return {out, gate};
}

Tensors13 multi_granularity_attention_backward(Tensor grad, OptionalTensor grad_gate, Tensor item,
                                               Tensor prototype, Tensor interests, Tensor fine_kw,
                                               Tensor fine_kb, Tensor fine_vw, Tensor fine_vb,
                                               Tensor coarse_kw, Tensor coarse_kb, Tensor coarse_vw,
                                               Tensor coarse_vb, Tensor fusion_weight,
                                               Tensor fusion_bias, int64_t needs) {
  Gradients gradients(item, needs);
  Tensors13 grads{
      gradients.next(item),       gradients.next(prototype), gradients.next(interests),
      gradients.next(fine_kw),    gradients.next(fine_kb),   gradients.next(fine_vw),
      gradients.next(fine_vb),    gradients.next(coarse_kw), gradients.next(coarse_kb),
      gradients.next(coarse_vw),  gradients.next(coarse_vb), gradients.next(fusion_weight),
      gradients.next(fusion_bias)};
  cpu::MultiGranularityArgs args = arguments(item, prototype, interests,
                                             {{view(fine_kw), view(fine_vw), view(fine_vb)},
                                              {view(coarse_kw), view(coarse_vw), view(coarse_vb)},
                                              view(fusion_weight),
                                              view(fusion_bias)});
  args.grad = with_candidates(grad, 3);
  if (grad_gate.has_value()) args.grad_gate = with_candidates(*grad_gate, 2);
  if (needs & 1) args.grad_item = with_candidates(std::get<0>(grads), 3);
  if (needs & 2) args.grad_prototype = with_candidates(std::get<1>(grads), 3);
  args.grad_interests = wanted(std::get<2>(grads), needs, 2);
  args.grad_weights.fine = {wanted(std::get<3>(grads), needs, 3),
                            wanted(std::get<5>(grads), needs, 5),
                            wanted(std::get<6>(grads), needs, 6)};
  args.grad_weights.coarse = {wanted(std::get<7>(grads), needs, 7),
                              wanted(std::get<9>(grads), needs, 9),
                              wanted(std::get<10>(grads), needs, 10)};
  args.grad_weights.weight = wanted(std::get<11>(grads), needs, 11);
  args.grad_weights.bias = wanted(std::get<12>(grads), needs, 12);
  cpu::kernels().multi_granularity_attention_backward(args);
  torch::stable::zero_(std::get<4>(grads));  // the softmax does not see the key biases
  torch::stable::zero_(std::get<8>(grads));
  return grads;
}

}  // namespace mimnet_fast::binding
