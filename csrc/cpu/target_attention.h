// Target-guided attention for blocks of users, one candidate each.
//
// The projections stand on the query and on the weighted sum instead of on the K interests:
// score_k = (W_K^T q) . u_k and out = W_V (sum_k a_k u_k) + b_V sum_k a_k.
#pragma once

#include "../common/kernels.h"
#include "weight_gradients.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

template <class T>
class AttentionPlan {
 public:
  int64_t interests, d;
  const T *key_weight, *value_weight, *value_bias;  // null: not given
  T scale;
  int64_t power;
  bool hard;

  AttentionPlan(const AttentionWeights& weights, int64_t k, int64_t width, double multiplier = 1,
                int64_t exponent = 1, bool best_only = false)
      : interests(k),
        d(width),
        scale(T(multiplier)),
        power(exponent),
        hard(best_only),
        key_(weights.key_weight),
        value_(weights.value_weight),
        bias_(weights.value_bias) {
    key_weight = key_.get();
    value_weight = value_.get();
    value_bias = bias_.get();
  }

  // Multiply-adds per user and candidate.
  int64_t work() const { return 2 * d * (d + interests) + 20 * interests; }

 private:
  Parameter<T> key_, value_, bias_;
};

// The arrays of one block, group by group: element e of group g at g * elements + e.
template <class T>
struct AttentionState {
  Vec<T>* folded;        // W_K^T q, D
  Vec<T>* scores;        // K, before power and scale
  Vec<T>* coefficients;  // K
  Vec<T>* score_grad;    // K
  Vec<T>* pooled;        // sum_k a_k u_k, D
  Vec<T>* out;           // D
  Vec<T>* pooled_grad;   // D
  Vec<T>* folded_grad;   // D

  static int64_t vectors(const AttentionPlan<T>& p, int64_t groups) {
    return groups * (5 * p.d + 3 * p.interests);
  }
  AttentionState(const AttentionPlan<T>& p, int64_t groups, Scratch<T>& scratch)
      : folded(scratch.take(groups * p.d)),
        scores(scratch.take(groups * p.interests)),
        coefficients(scratch.take(groups * p.interests)),
        score_grad(scratch.take(groups * p.interests)),
        pooled(scratch.take(groups * p.d)),
        out(scratch.take(groups * p.d)),
        pooled_grad(scratch.take(groups * p.d)),
        folded_grad(scratch.take(groups * p.d)) {}
};

// Scores of one group to coefficients. `present` (1 or 0 per interest) may be null.
template <class T>
void weigh(const AttentionPlan<T>& p, Vec<T>* coefficients, const Vec<T>* scores,
           const Vec<T>* present);

// The gradient of the coefficients, in place, to that of the scores.
template <class T>
void weigh_backward(const AttentionPlan<T>& p, Vec<T>* grad, const Vec<T>* coefficients,
                    const Vec<T>* scores);

// Fills folded, scores, coefficients and pooled.
template <class T>
void attend(const AttentionPlan<T>& p, AttentionState<T>& s, const Vec<T>* query,
            const Vec<T>* interests, int64_t groups);

// After `attend`: fills out, which gradients do not need.
template <class T>
void attend_values(const AttentionPlan<T>& p, AttentionState<T>& s, int64_t groups);

// Fills pooled_grad.
template <class T>
void attend_values_backward(const AttentionPlan<T>& p, AttentionState<T>& s, const Vec<T>* out_grad,
                            int64_t groups);

// After `attend` and `attend_values_backward`: sets query_grad, unless null, and sets or adds to
// interests_grad.
template <class T>
void attend_backward(const AttentionPlan<T>& p, AttentionState<T>& s, Vec<T>* query_grad,
                     Vec<T>* interests_grad, bool accumulate, const Vec<T>* interests,
                     int64_t groups);

// What the gradients of the projections need from every candidate.
template <class T>
struct AttentionRows {
  Rows<T> query, folded_grad, pooled, out_grad;

  AttentionRows(const AttentionPlan<T>& p, int64_t rows) {
    query.allocate(rows, p.d);
    folded_grad.allocate(rows, p.d);
    pooled.allocate(rows, p.d);
    out_grad.allocate(rows, p.d);
  }

  // Rows of one group, after `attend_backward`.
  void save(const AttentionPlan<T>& p, const AttentionState<T>& s, const Vec<T>* query_lanes,
            const Vec<T>* out_grad_lanes, int64_t g, Group group) const {
    const int64_t d = p.d;
    save_rows<T>(query.get(), query.width, query_lanes + g * d, d, group);
    save_rows<T>(folded_grad.get(), query.width, s.folded_grad + g * d, d, group);
    save_rows<T>(pooled.get(), query.width, s.pooled + g * d, d, group);
    save_rows<T>(out_grad.get(), query.width, out_grad_lanes + g * d, d, group);
  }

  void add(const AttentionPlan<T>& p, int64_t rows, const AttentionWeights& views,
           WeightGradients<T>& gradients) const {
    const int64_t w = query.width;
    gradients.add({query.get(), w, folded_grad.get(), w, rows, p.d, p.d, views.key_weight});
    gradients.add({out_grad.get(), w, pooled.get(), w, rows, p.d, p.d, views.value_weight});
    gradients.add_sum(out_grad.get(), w, rows, p.d, views.value_bias);
  }
};

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
