// Entry points of the kernels compiled for one instruction set.
#pragma once

#include "../common/kernels.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

const Kernels& kernels();

void squash(const SquashArgs& args);
void squash_backward(const SquashArgs& args);
void dynamic_routing(const RoutingArgs& args);
void dynamic_routing_backward(const RoutingArgs& args);
void interest_bridge(const BridgeArgs& args);
void interest_bridge_backward(const BridgeArgs& args);
void target_attention(const AttentionArgs& args);
void target_attention_backward(const AttentionArgs& args);
void multi_granularity_attention(const MultiGranularityArgs& args);
void multi_granularity_attention_backward(const MultiGranularityArgs& args);
void mimnet_forward(const MIMNetArgs& args);
void mimnet_forward_backward(const MIMNetArgs& args);
void catalogue_top_k(const CatalogueArgs& args);
void matrix_factorization_adam(const FactorizationArgs& args);
void mimnet_adam(const TrainingArgs& args);

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
