// Which function serves which op, on the device that MIMNET_FAST_DISPATCH_KEY names.
#include "binding/ops.h"

namespace b = mimnet_fast::binding;

STABLE_TORCH_LIBRARY_IMPL(mimnet_fast, MIMNET_FAST_DISPATCH_KEY, m) {
  m.impl("squash", TORCH_BOX(&b::squash));
  m.impl("squash_backward", TORCH_BOX(&b::squash_backward));
  m.impl("dynamic_routing", TORCH_BOX(&b::dynamic_routing));
  m.impl("dynamic_routing_backward", TORCH_BOX(&b::dynamic_routing_backward));
  m.impl("interest_bridge", TORCH_BOX(&b::interest_bridge));
  m.impl("interest_bridge_backward", TORCH_BOX(&b::interest_bridge_backward));
  m.impl("target_attention", TORCH_BOX(&b::target_attention));
  m.impl("target_attention_backward", TORCH_BOX(&b::target_attention_backward));
  m.impl("multi_granularity_attention", TORCH_BOX(&b::multi_granularity_attention));
  m.impl("multi_granularity_attention_backward",
         TORCH_BOX(&b::multi_granularity_attention_backward));
  m.impl("mimnet_forward", TORCH_BOX(&b::mimnet_forward));
  m.impl("mimnet_forward_backward", TORCH_BOX(&b::mimnet_forward_backward));
  m.impl("catalogue_top_k", TORCH_BOX(&b::catalogue_top_k));
  m.impl("matrix_factorization_adam_", TORCH_BOX(&b::matrix_factorization_adam));
  m.impl("mimnet_adam_", TORCH_BOX(&b::mimnet_adam));
}
