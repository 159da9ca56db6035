// The ops as torch calls them; the schemas are in mimnet_fast/_schemas.py.
#pragma once

#include <tuple>

#include "tensors.h"

namespace mimnet_fast::binding {

using OptionalTensor = std::optional<Tensor>;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors13 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor, Tensor>;
using Tensors19 =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
               Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor squash(Tensor x, int64_t form, double eps, double power);
Tensor squash_backward(Tensor grad, Tensor x, int64_t form, double eps, double power);

Tensors3 dynamic_routing(Tensor inputs, OptionalTensor weight, OptionalTensor logits,
                         OptionalTensor mask, OptionalTensor capsule_mask, int64_t num_capsules,
                         int64_t iterations, int64_t softmax_over, int64_t padding, int64_t update,
                         bool normalize_agreement, bool full_gradient, bool inner_squash,
                         bool final_squash, double temperature, int64_t squash, double eps,
                         double power);
Tensors3 dynamic_routing_backward(Tensor grad, Tensor inputs, OptionalTensor weight,
                                  OptionalTensor logits, OptionalTensor mask,
                                  OptionalTensor capsule_mask, Tensor coupling, Tensor pooled,
                                  int64_t iterations, int64_t softmax_over, int64_t padding,
                                  int64_t update, bool normalize_agreement, bool full_gradient,
                                  bool inner_squash, bool final_squash, double temperature,
                                  int64_t squash, double eps, double power, int64_t needs);

Tensor interest_bridge(Tensor interests, Tensor source, Tensor w1, Tensor b1, Tensor w2, Tensor b2);
Tensors6 interest_bridge_backward(Tensor grad, Tensor interests, Tensor source, Tensor w1,
                                  Tensor b1, Tensor w2, Tensor b2, int64_t needs);

Tensors2 target_attention(Tensor query, Tensor interests, OptionalTensor key_weight,
                          OptionalTensor key_bias, OptionalTensor value_weight,
                          OptionalTensor value_bias, OptionalTensor capsule_mask, double scale,
                          int64_t power, bool hard);
Tensors6 target_attention_backward(Tensor grad, OptionalTensor grad_weights, Tensor query,
                                   Tensor interests, OptionalTensor key_weight,
                                   OptionalTensor key_bias, OptionalTensor value_weight,
                                   OptionalTensor value_bias, OptionalTensor capsule_mask,
                                   double scale, int64_t power, bool hard, int64_t needs);

Tensors2 multi_granularity_attention(Tensor item, Tensor prototype, Tensor interests,
                                     Tensor fine_kw, Tensor fine_kb, Tensor fine_vw, Tensor fine_vb,
                                     Tensor coarse_kw, Tensor coarse_kb, Tensor coarse_vw,
                                     Tensor coarse_vb, Tensor fusion_weight, Tensor fusion_bias);
Tensors13 multi_granularity_attention_backward(Tensor grad, OptionalTensor grad_gate, Tensor item,
                                               Tensor prototype, Tensor interests, Tensor fine_kw,
                                               Tensor fine_kb, Tensor fine_vw, Tensor fine_vb,
                                               Tensor coarse_kw, Tensor coarse_kb, Tensor coarse_vw,
                                               Tensor coarse_vb, Tensor fusion_weight,
                                               Tensor fusion_bias, int64_t needs);

Tensors4 mimnet_forward(Tensor history, OptionalTensor table, Tensor source, Tensor item,
                        Tensor prototype, Tensor routing_weight, Tensor w1, Tensor b1, Tensor w2,
                        Tensor b2, Tensor fine_kw, Tensor fine_kb, Tensor fine_vw, Tensor fine_vb,
                        Tensor coarse_kw, Tensor coarse_kb, Tensor coarse_vw, Tensor coarse_vb,
                        Tensor fusion_weight, Tensor fusion_bias, Tensor logits,
                        OptionalTensor mask, int64_t iterations, int64_t padding, bool keep);
Tensors19 mimnet_forward_backward(Tensor grad, Tensor pooled, Tensor transferred,
                                  Tensor hidden_grad, Tensor history, OptionalTensor table,
                                  Tensor source, Tensor item, Tensor prototype,
                                  Tensor routing_weight, Tensor w1, Tensor b1, Tensor w2, Tensor b2,
                                  Tensor fine_kw, Tensor fine_kb, Tensor fine_vw, Tensor fine_vb,
                                  Tensor coarse_kw, Tensor coarse_kb, Tensor coarse_vw,
                                  Tensor coarse_vb, Tensor fusion_weight, Tensor fusion_bias,
                                  Tensor logits, OptionalTensor mask, int64_t iterations,
                                  int64_t padding, int64_t needs);

Tensors2 catalogue_top_k(Tensor interests, Tensor items, Tensor prototypes,
                         OptionalTensor prototype_ids, Tensor fine_kw, Tensor fine_kb,
                         Tensor fine_vw, Tensor fine_vb, Tensor coarse_kw, Tensor coarse_kb,
                         Tensor coarse_vw, Tensor coarse_vb, Tensor fusion_weight,
                         Tensor fusion_bias, OptionalTensor excluded,
                         OptionalTensor excluded_offsets, int64_t k);

Tensor matrix_factorization_adam(Tensor user_table, Tensor item_table, Tensor user_first,
                                 Tensor user_second, Tensor item_first, Tensor item_second,
                                 Tensor user_ids, Tensor item_ids, Tensor ratings,
                                 int64_t batch_size, int64_t first_step, double learning_rate,
                                 double beta1, double beta2, double eps);

Tensor mimnet_adam(Tensor parameters, Tensor first, Tensor second, OptionalTensor average,
                   Tensor users, Tensor items, Tensor ratings, OptionalTensor weights,
                   Tensor histories, Tensor lengths, Tensor history_table, Tensor source_table,
                   Tensor item_table, Tensor prototype_table, Tensor logits, int64_t hidden,
                   int64_t batch_size, int64_t iterations, int64_t padding, int64_t first_step,
                   double learning_rate, double beta1, double beta2, double eps,
                   double weight_decay, double averaging);

}  // namespace mimnet_fast::binding
