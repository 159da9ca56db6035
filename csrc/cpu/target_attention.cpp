#include "target_attention.h"

#include "ops.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

template <class T>
MIMNET_FAST_INLINE Vec<T> to_the_power(Vec<T> x, int64_t n) {
  Vec<T> y = splat(T(1));
  for (int64_t i = 0; i < n; ++i) y *= x;
  return y;
}

// Scores of one group to coefficients.
template <class T>
void weigh(const AttentionPlan<T>& p, Vec<T>* coefficients, const Vec<T>* scores,
           const Vec<T>* present) {
  const Vec<T> lowest = splat(T(-3e38));
  Vec<T> top = lowest;
  for (int64_t k = 0; k < p.interests; ++k) {
    Vec<T> score = scores[k];
    if (p.power != 1) score = to_the_power<T>(score, p.power);
    score *= p.scale;
    if (present != nullptr) score = select(present[k] > T(0), score, lowest);
    coefficients[k] = score;
    top = maximum(top, score);
  }
  Vec<T> sum{};
  for (int64_t k = 0; k < p.interests; ++k) {
    Vec<T> a;
    if (p.hard) {  // the first of the best
      a = select((coefficients[k] == top) & (sum == T(0)), splat(T(1)), Vec<T>{});
    } else {
      a = exp(coefficients[k] - top);
    }
    if (present != nullptr) a *= present[k];
    coefficients[k] = a;
    sum += a;
  }
  const Vec<T> inverse = select(sum > T(0), T(1) / sum, Vec<T>{});
  for (int64_t k = 0; k < p.interests; ++k) coefficients[k] *= inverse;
}

}  // namespace

template <class T>
void attend(const AttentionPlan<T>& p, AttentionState<T>& s, const Vec<T>* query,
            const Vec<T>* interests, const Vec<T>* present, int64_t groups) {
  const int64_t k = p.interests, d = p.d;
  if (p.key_weight != nullptr) {
    multiply<T>({s.folded, d, 1}, {query, d, 1}, SharedMatrix<T>(p.key_weight, d, 1), groups, d, d,
                false);
  } else {
    for (int64_t i = 0; i < groups * d; ++i) s.folded[i] = query[i];
  }
  for (int64_t g = 0; g < groups; ++g) {
    const Vec<T>* u = interests + g * k * d;
    multiply<T>({s.scores + g * k, k, 1}, {s.folded + g * d, d, 1}, ConstLaneMatrix<T>{u, 1, d}, 1,
                k, d, false);
    weigh<T>(p, s.coefficients + g * k, s.scores + g * k,
             present == nullptr ? nullptr : present + g * k);
    multiply<T>({s.pooled + g * d, d, 1}, {s.coefficients + g * k, k, 1},
                ConstLaneMatrix<T>{u, d, 1}, 1, d, k, false);
  }
}

template <class T>
void attend_values(const AttentionPlan<T>& p, AttentionState<T>& s, int64_t groups) {
  const int64_t k = p.interests, d = p.d;
  if (p.value_weight == nullptr) {
    for (int64_t i = 0; i < groups * d; ++i) s.out[i] = s.pooled[i];
    return;
  }
  for (int64_t g = 0; g < groups; ++g) {
    Vec<T> total{};
    for (int64_t i = 0; i < k; ++i) total += s.coefficients[g * k + i];
    for (int64_t i = 0; i < d; ++i) {
      s.out[g * d + i] = p.value_bias == nullptr ? Vec<T>{} : total * p.value_bias[i];
    }
  }
  multiply<T>({s.out, d, 1}, {s.pooled, d, 1}, SharedMatrix<T>(p.value_weight, 1, d), groups, d, d,
              true);
}

template <class T>
void attend_values_backward(const AttentionPlan<T>& p, AttentionState<T>& s, const Vec<T>* out_grad,
                            int64_t groups) {
  const int64_t d = p.d;
  if (p.value_weight != nullptr) {
    multiply<T>({s.pooled_grad, d, 1}, {out_grad, d, 1}, SharedMatrix<T>(p.value_weight, d, 1),
                groups, d, d, false);
  } else {
    for (int64_t i = 0; i < groups * d; ++i) s.pooled_grad[i] = out_grad[i];
  }
}

template <class T>
void attend_backward(const AttentionPlan<T>& p, AttentionState<T>& s, Vec<T>* query_grad,
                     Vec<T>* interests_grad, bool accumulate, const Vec<T>* coefficients_grad,
                     const Vec<T>* interests, int64_t groups) {
  const int64_t k = p.interests, d = p.d;
  for (int64_t g = 0; g < groups; ++g) {
    const Vec<T>* u = interests + g * k * d;
    const Vec<T>* a = s.coefficients + g * k;
    Vec<T>* grad = s.score_grad + g * k;  // first of the coefficients, then of the scores
    if (coefficients_grad != nullptr) {
      for (int64_t i = 0; i < k; ++i) grad[i] = coefficients_grad[g * k + i];
    }
    multiply<T>({grad, k, 1}, {s.pooled_grad + g * d, d, 1}, ConstLaneMatrix<T>{u, 1, d}, 1, k, d,
                coefficients_grad != nullptr);
    subtract_mean<T>(grad, a, k);
    for (int64_t i = 0; i < k; ++i) {
      Vec<T> slope = splat(p.hard ? T(0) : p.scale);
      if (p.power != 1) {
        slope *= T(p.power) * to_the_power<T>(s.scores[g * k + i], p.power - 1);
      }
      grad[i] *= a[i] * slope;
    }
    multiply<T>({s.folded_grad + g * d, d, 1}, {grad, k, 1}, ConstLaneMatrix<T>{u, d, 1}, 1, d, k,
                false);
    for (int64_t i = 0; i < k; ++i) {
      Vec<T>* u_grad = interests_grad + (g * k + i) * d;
      for (int64_t j = 0; j < d; ++j) {
        const Vec<T> share = a[i] * s.pooled_grad[g * d + j] + grad[i] * s.folded[g * d + j];
        u_grad[j] = accumulate ? u_grad[j] + share : share;
      }
    }
  }
  if (query_grad == nullptr) return;
  if (p.key_weight != nullptr) {
    multiply<T>({query_grad, d, 1}, {s.folded_grad, d, 1}, SharedMatrix<T>(p.key_weight, 1, d),
                groups, d, d, false);
  } else {
    for (int64_t i = 0; i < groups * d; ++i) query_grad[i] = s.folded_grad[i];
  }
}

namespace {

// A user without any interest gets 0 whatever the value bias is, so no gradient comes from there.
template <class T>
void clear_where_all_absent(const AttentionPlan<T>& p, Vec<T>* out_grad, const Vec<T>* present,
                            int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    Vec<T> any{};
    for (int64_t k = 0; k < p.interests; ++k) any += present[g * p.interests + k];
    for (int64_t i = g * p.d; i < (g + 1) * p.d; ++i) {
      out_grad[i] = select(any > T(0), out_grad[i], Vec<T>{});
    }
  }
}

template <class T>
void forward(const AttentionArgs& args) {
  const AttentionPlan<T> p(args.weights, args.interests.size[1], args.interests.size[2], args.scale,
                           args.power, args.hard);
  const int64_t k = p.interests, d = p.d, candidates = args.query.size[1];
  const Blocks<T> blocks(args.query.size[0], args.execution.parallel.threads);
  const int64_t most = blocks.per_block, work = p.work() * kLanes<T> * most * candidates;
  args.execution.parallel(blocks.count, work, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(most * (d + k * d + k) + AttentionState<T>::vectors(p, most));
    Vec<T>* query = scratch.take(most * d);
    Vec<T>* interests = scratch.take(most * k * d);
    Vec<T>* present = scratch.take(most * k);
    AttentionState<T> s(p, most, scratch);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t groups = blocks.size(block);
      for (int64_t g = 0; g < groups; ++g) {
        const Group group = blocks.group(block, g);
        load_matrix<T>(interests + g * k * d, args.interests, group);
        if (args.capsule_mask) load_flags<T>(present + g * k, args.capsule_mask, group);
      }
      for (int64_t c = 0; c < candidates; ++c) {
        for (int64_t g = 0; g < groups; ++g) {
          load_rows<T>(query + g * d, args.query, blocks.group(block, g), c);
        }
        attend<T>(p, s, query, interests, args.capsule_mask ? present : nullptr, groups);
        attend_values<T>(p, s, groups);
        for (int64_t g = 0; g < groups; ++g) {
          store_rows<T>(s.out + g * d, args.out, blocks.group(block, g), c);
          store_rows<T>(s.coefficients + g * k, args.coefficients, blocks.group(block, g), c);
        }
      }
    }
  });
}

template <class T>
void backward(const AttentionArgs& args) {
  const AttentionPlan<T> p(args.weights, args.interests.size[1], args.interests.size[2], args.scale,
                           args.power, args.hard);
  const int64_t k = p.interests, d = p.d, candidates = args.query.size[1];
  const int64_t batch = args.query.size[0];
  AttentionRows<T> rows(p, batch * candidates);
  const Blocks<T> blocks(batch, args.execution.parallel.threads);
  const int64_t most = blocks.per_block, work = 3 * p.work() * kLanes<T> * most * candidates;
  args.execution.parallel(blocks.count, work, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(most * (3 * d + 2 * k * d + 2 * k) + AttentionState<T>::vectors(p, most));
    Vec<T>* query = scratch.take(most * d);
    Vec<T>* query_grad = scratch.take(most * d);
    Vec<T>* out_grad = scratch.take(most * d);
    Vec<T>* interests = scratch.take(most * k * d);
    Vec<T>* interests_grad = scratch.take(most * k * d);
    Vec<T>* present = scratch.take(most * k);
    Vec<T>* coefficients_grad = scratch.take(most * k);
    AttentionState<T> s(p, most, scratch);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t groups = blocks.size(block);
      for (int64_t g = 0; g < groups; ++g) {
        const Group group = blocks.group(block, g);
        load_matrix<T>(interests + g * k * d, args.interests, group);
        if (args.capsule_mask) load_flags<T>(present + g * k, args.capsule_mask, group);
      }
      for (int64_t i = 0; candidates == 0 && i < groups * k * d; ++i) interests_grad[i] = Vec<T>{};
      for (int64_t c = 0; c < candidates; ++c) {
        for (int64_t g = 0; g < groups; ++g) {
          const Group group = blocks.group(block, g);
          load_rows<T>(query + g * d, args.query, group, c);
          load_rows<T>(out_grad + g * d, args.grad, group, c);
          if (args.grad_coefficients) {
            load_rows<T>(coefficients_grad + g * k, args.grad_coefficients, group, c);
          }
        }
        attend<T>(p, s, query, interests, args.capsule_mask ? present : nullptr, groups);
        if (args.capsule_mask) clear_where_all_absent<T>(p, out_grad, present, groups);
        attend_values_backward<T>(p, s, out_grad, groups);
        attend_backward<T>(p, s, args.grad_query ? query_grad : nullptr, interests_grad, c > 0,
                           args.grad_coefficients ? coefficients_grad : nullptr, interests, groups);
        for (int64_t g = 0; g < groups; ++g) {
          const Group group = blocks.group(block, g);
          rows.save(p, s, query, out_grad, g, group, candidates, c);
          if (args.grad_query) store_rows<T>(query_grad + g * d, args.grad_query, group, c);
        }
      }
      if (!args.grad_interests) continue;
      for (int64_t g = 0; g < groups; ++g) {
        store_matrix<T>(interests_grad + g * k * d, args.grad_interests, blocks.group(block, g));
      }
    }
  });
  WeightGradients<T> gradients;
  rows.add(p, batch * candidates, args.grad_weights, gradients);
  gradients.run_all(args.execution.parallel);
}

}  // namespace

void target_attention(const AttentionArgs& args) {
  args.query.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void target_attention_backward(const AttentionArgs& args) {
  args.query.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

#define MIMNET_FAST_INSTANTIATE(T)                                                                \
  template void attend<T>(const AttentionPlan<T>&, AttentionState<T>&, const Vec<T>*,             \
                          const Vec<T>*, const Vec<T>*, int64_t);                                 \
  template void attend_values<T>(const AttentionPlan<T>&, AttentionState<T>&, int64_t);           \
  template void attend_values_backward<T>(const AttentionPlan<T>&, AttentionState<T>&,            \
                                          const Vec<T>*, int64_t);                                \
  template void attend_backward<T>(const AttentionPlan<T>&, AttentionState<T>&, Vec<T>*, Vec<T>*, \
                                   bool, const Vec<T>*, const Vec<T>*, int64_t);
MIMNET_FAST_INSTANTIATE(float)
MIMNET_FAST_INSTANTIATE(double)

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
