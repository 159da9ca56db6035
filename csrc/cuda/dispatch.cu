#include "ops.cuh"

const mimnet_fast::Kernels& mimnet_fast::kernels() {
  static const Kernels table = {
      "cuda",
      cuda::squash,
      cuda::squash_backward,
      cuda::dynamic_routing,
      cuda::dynamic_routing_backward,
      cuda::interest_bridge,
      cuda::interest_bridge_backward,
      cuda::target_attention,
      cuda::target_attention_backward,
      cuda::multi_granularity_attention,
      cuda::multi_granularity_attention_backward,
      cuda::mimnet_forward,
      cuda::mimnet_forward_backward,
      cuda::catalogue_top_k,
      nullptr,
      nullptr,
  };
  return table;
}
