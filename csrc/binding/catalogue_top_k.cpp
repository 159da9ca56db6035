#include "ops.h"

namespace mimnet_fast::binding {

Tensors2 catalogue_top_k(Tensor interests, Tensor items, Tensor prototypes,
                         OptionalTensor prototype_ids, Tensor fine_kw, Tensor fine_kb,
                         Tensor fine_vw, Tensor fine_vb, Tensor coarse_kw, Tensor coarse_kb,
                         Tensor coarse_vw, Tensor coarse_vb, Tensor fusion_weight,
                         Tensor fusion_bias, OptionalTensor excluded,
                         OptionalTensor excluded_offsets, int64_t k) {
  Tensor scores = empty(interests, {interests.size(0), k});
  Tensor indices = empty(interests, {interests.size(0), k}, ScalarType::Long);
  Device device(interests);
  CatalogueArgs args{};
  args.interests = view(interests);
  args.items = view(items);
  args.prototypes = view(prototypes);
  args.prototype_ids = view(prototype_ids);
  args.weights = FusionTensors{fine_kw,   fine_kb,   fine_vw,   fine_vb,       coarse_kw,
                               coarse_kb, coarse_vw, coarse_vb, fusion_weight, fusion_bias}
                     .weights();
  args.excluded = view(excluded);
  args.excluded_offsets = view(excluded_offsets);
  args.scores = view(scores);
  args.indices = view(indices);
  args.execution = device.execution();
  kernels().catalogue_top_k(args);
  return {scores, indices};
}

}  // namespace mimnet_fast::binding
