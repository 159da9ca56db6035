#include "ops.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

#define MIMNET_FAST_STRING(x) #x
#define MIMNET_FAST_NAME(x) MIMNET_FAST_STRING(x)

const Kernels& kernels() {
  static const Kernels table = {
      MIMNET_FAST_NAME(MIMNET_FAST_ISA),
      squash,
      squash_backward,
      dynamic_routing,
      dynamic_routing_backward,
      interest_bridge,
      interest_bridge_backward,
      target_attention,
      target_attention_backward,
      multi_granularity_attention,
      multi_granularity_attention_backward,
      mimnet_forward,
      mimnet_forward_backward,
      catalogue_top_k,
      matrix_factorization_adam,
      mimnet_adam,
  };
  return table;
}

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
