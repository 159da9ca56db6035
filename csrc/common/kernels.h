// What the kernels of a device or instruction set offer, and their arguments. An empty view of a
// gradient means that it is not wanted. Shapes are those of the ops; a batch of logits may have
// size 1.
#pragma once

#include "execution.h"
#include "options.h"
#include "view.h"

namespace mimnet_fast {

struct SquashArgs {
  View x;     // [.., D], at most four dimensions
  View grad;  // backward only
  View out;   // squash(x), or in backward the gradient with respect to x
  Squash squash;
  Execution execution;
};

struct RoutingArgs {
  View inputs;        // [B,L,D_in], votes [B,K,L,D] without a weight, or jagged [T,D_in]
  View weight;        // none, [D_in,D], [K,D_in,D] or [L,K,D_in,D]
  View logits;        // none, [B,K,L] or [1,K,L]; with jagged inputs also [K,T]
  View mask;          // none, bool [B,L] or lengths [B]; of jagged inputs the offsets [B+1]
  View capsule_mask;  // none or bool [B,K]
  int64_t capsules, iterations;
  SoftmaxAxis axis;
  Padding padding;
  Update update;
  bool normalize_agreement, full_gradient;
  bool inner_squash, final_squash;
  double temperature;
  Squash squash;
  View out;       // [B,K,D]
  View coupling;  // [B,K,L], or [K,T]
  View pooled;    // [B,K,D_in], or [B,K,D] with a weight per position
  // Backward only: the gradient of out, and what is wanted.
  View grad, grad_inputs, grad_weight, grad_logits;
  Execution execution;
};

struct BridgeArgs {
  View interests;  // [B,K,D_i]
  View source;     // [B,D_s], or [B,K,D_s]: then every interest counts as a user with one interest
  View w1, b1, w2, b2;
  View out;   // [B,K,D_t]
  View grad;  // backward only, with the gradients below
  View grad_interests, grad_source, grad_w1, grad_b1, grad_w2, grad_b2;
  Execution execution;
};

struct AttentionWeights {
  View key_weight, value_weight, value_bias;  // the key bias cancels in the softmax
};

struct AttentionArgs {
  View query;      // [B,C,D]
  View interests;  // [B,K,D]
  AttentionWeights weights;
  View capsule_mask;  // none or bool [B,K]
  double scale;
  int64_t power;
  bool hard;
  View out;           // [B,C,D]
  View coefficients;  // [B,C,K]
  View grad, grad_coefficients;
  View grad_query, grad_interests;
  AttentionWeights grad_weights;
  Execution execution;
};

struct FusionWeights {
  AttentionWeights fine, coarse;
  View weight;  // [2*D]
  View bias;    // [1]
};

struct MultiGranularityArgs {
  View item, prototype;  // [B,C,D]
  View interests;        // [B,K,D]
  FusionWeights weights;
  View out;   // [B,C,D]
  View gate;  // [B,C]
  View grad, grad_gate;
  View grad_item, grad_prototype, grad_interests;
  FusionWeights grad_weights;
  Execution execution;
};

struct MIMNetArgs {
  View history;                  // [B,L,D] or jagged [T,D], or ids [B,L] or [T]
  View table;                    // [N,D] when history holds ids
  View source, item, prototype;  // [B,D]
  View routing_weight, w1, b1, w2, b2;
  FusionWeights fusion;
  View logits, mask;  // as in RoutingArgs
  int64_t iterations;
  Padding padding;
  View ratings;      // [B]
  View pooled;       // [B,K,D]
  View transferred;  // [B,K,D]
  // Of the bridge's hidden units, before the ReLU, where the rating's gradient is 1: [B,K,H], or
  // none. CPU only: what forward keeps there, backward need not find from T again.
  View hidden_grad;
  View grad;
  View grad_history, grad_source, grad_item, grad_prototype;
  View grad_routing_weight, grad_w1, grad_b1, grad_w2, grad_b2;
  FusionWeights grad_fusion;
  Execution execution;
};

struct CatalogueArgs {
  View interests;      // [B,K,D]
  View items;          // [N,D]
  View prototypes;     // [P,D]
  View prototype_ids;  // int64 [N], or none: item n has prototype n
  FusionWeights weights;
  View excluded, excluded_offsets;  // none, or int64 [T] and [B+1]
  View scores;                      // [B,k]
  View indices;                     // int64 [B,k]; -1 where no item is left
  Execution execution;
};

struct Adam {
  double learning_rate, beta1, beta2, eps;
  int64_t first_step;  // the steps before
};

struct FactorizationArgs {
  // Contiguous: [U,D] and [I,D], each with Adam's moments, all updated in place.
  View user_table, user_first, user_second;
  View item_table, item_first, item_second;
  View user_ids, item_ids;  // int64 [N], contiguous
  View ratings;             // [N], contiguous
  int64_t batch_size;
  Adam adam;
  View losses;  // [ceil(N / batch_size)]
  Execution execution;
};

struct TrainingArgs {
  // All parameters of MIMNet one after another, in the order of its op, and Adam's moments, updated
  // in place. The moving average of the parameters is updated too where it is given.
  View parameters, first, second, average;  // [P]
  View users, items;                        // int64 [N]
  View ratings;                             // [N]
  View weights;                             // none, or of each user [U]
  View histories;                           // int64 [U,L], ids of history_table
  View lengths;                             // int64 [U]
  View history_table;                       // [S,D]
  View source_table;                        // [U,D]
  View item_table, prototype_table;         // [M,D]
  View logits;                              // [N,K,L]
  int64_t hidden, batch_size, iterations;
  Padding padding;
  Adam adam;
  double weight_decay;
  double averaging;  // share that the past keeps, less while there is little of it
  View losses;       // [ceil(N / batch_size)]
  Execution execution;
};

struct Kernels {
  const char* target;
  void (*squash)(const SquashArgs&);
  void (*squash_backward)(const SquashArgs&);
  void (*dynamic_routing)(const RoutingArgs&);
  void (*dynamic_routing_backward)(const RoutingArgs&);
  void (*interest_bridge)(const BridgeArgs&);
  void (*interest_bridge_backward)(const BridgeArgs&);
  void (*target_attention)(const AttentionArgs&);
  void (*target_attention_backward)(const AttentionArgs&);
  void (*multi_granularity_attention)(const MultiGranularityArgs&);
  void (*multi_granularity_attention_backward)(const MultiGranularityArgs&);
  void (*mimnet_forward)(const MIMNetArgs&);
  void (*mimnet_forward_backward)(const MIMNetArgs&);
  void (*catalogue_top_k)(const CatalogueArgs&);
  void (*matrix_factorization_adam)(const FactorizationArgs&);  // null on accelerators
  void (*mimnet_adam)(const TrainingArgs&);                     // likewise
};

// Those of the library that this is linked into, for the device at hand.
const Kernels& kernels();

}  // namespace mimnet_fast
