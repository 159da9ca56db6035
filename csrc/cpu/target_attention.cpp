#include "target_attention.h"

#include "ops.h"
#include "row_attention.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

template <class T>
MIMNET_FAST_INLINE Vec<T> to_the_power(Vec<T> x, int64_t n) {
  Vec<T> y = splat(T(1));
  for (int64_t i = 0; i < n; ++i) y *= x;
  return y;
}

}  // namespace

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

template <class T>
void weigh_backward(const AttentionPlan<T>& p, Vec<T>* grad, const Vec<T>* coefficients,
                    const Vec<T>* scores) {
  subtract_mean<T>(grad, coefficients, p.interests);
  for (int64_t k = 0; k < p.interests; ++k) {
    Vec<T> slope = splat(p.hard ? T(0) : p.scale);
    if (p.power != 1) slope *= T(p.power) * to_the_power<T>(scores[k], p.power - 1);
    grad[k] *= coefficients[k] * slope;
  }
}

template <class T>
void attend(const AttentionPlan<T>& p, AttentionState<T>& s, const Vec<T>* query,
            const Vec<T>* interests, int64_t groups) {
  const int64_t k = p.interests, d = p.d;
  multiply<T>({s.folded, d, 1}, {query, d, 1}, SharedMatrix<T>(p.key_weight, d, 1), groups, d, d,
              false);
  for (int64_t g = 0; g < groups; ++g) {
    const Vec<T>* u = interests + g * k * d;
    multiply<T>({s.scores + g * k, k, 1}, {s.folded + g * d, d, 1}, ConstLaneMatrix<T>{u, 1, d}, 1,
                k, d, false);
    weigh<T>(p, s.coefficients + g * k, s.scores + g * k, nullptr);
    multiply<T>({s.pooled + g * d, d, 1}, {s.coefficients + g * k, k, 1},
                ConstLaneMatrix<T>{u, d, 1}, 1, d, k, false);
  }
}

template <class T>
void attend_values(const AttentionPlan<T>& p, AttentionState<T>& s, int64_t groups) {
  const int64_t d = p.d;
  for (int64_t i = 0; i < groups * d; ++i) s.out[i] = splat(p.value_bias[i % d]);
  multiply<T>({s.out, d, 1}, {s.pooled, d, 1}, SharedMatrix<T>(p.value_weight, 1, d), groups, d, d,
              true);
}

template <class T>
void attend_values_backward(const AttentionPlan<T>& p, AttentionState<T>& s, const Vec<T>* out_grad,
                            int64_t groups) {
  const int64_t d = p.d;
  multiply<T>({s.pooled_grad, d, 1}, {out_grad, d, 1}, SharedMatrix<T>(p.value_weight, d, 1),
              groups, d, d, false);
}

template <class T>
void attend_backward(const AttentionPlan<T>& p, AttentionState<T>& s, Vec<T>* query_grad,
                     Vec<T>* interests_grad, bool accumulate, const Vec<T>* interests,
                     int64_t groups) {
  const int64_t k = p.interests, d = p.d;
  for (int64_t g = 0; g < groups; ++g) {
    const Vec<T>* u = interests + g * k * d;
    const Vec<T>* a = s.coefficients + g * k;
    Vec<T>* grad = s.score_grad + g * k;  // first of the coefficients, then of the scores
    multiply<T>({grad, k, 1}, {s.pooled_grad + g * d, d, 1}, ConstLaneMatrix<T>{u, 1, d}, 1, k, d,
                false);
    weigh_backward<T>(p, grad, a, s.scores + g * k);
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
  multiply<T>({query_grad, d, 1}, {s.folded_grad, d, 1}, SharedMatrix<T>(p.key_weight, 1, d),
              groups, d, d, false);
}

namespace {

// A user without any interest gets 0 whatever the value bias is, so no gradient comes from there.
template <class T>
void clear_where_all_absent(GroupRows<T> out_grad, const Vec<T>* present, int64_t k, int users,
                            int64_t d) {
  Vec<T> any{};
  for (int64_t i = 0; i < k; ++i) any += present[i];
  for (int w = 0; w < users; ++w) {
    for (int64_t e = 0; any[w] == T(0) && e < d; ++e) out_grad[w][e] = T(0);
  }
}

template <class T>
void forward(const AttentionArgs& args) {
  constexpr int n = kLanes<T>;
  const AttentionPlan<T> p(args.weights, args.interests.size[1], args.interests.size[2], args.scale,
                           args.power, args.hard);
  const RowAttention<T> attention(p, false);
  const int64_t k = p.interests, d = p.d, candidates = args.query.size[1];
  const Blocks<T> blocks(args.query.size[0], args.execution.parallel.threads);
  const int64_t most = blocks.per_block, work = p.work() * n * most * candidates;
  const int64_t copy = InterestRows<T>::vectors(args.interests);
  args.execution.parallel(blocks.count, work, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(most * (4 * padded<T>(d) + 3 * k + copy));
    const GroupRows<T> query = take_rows(scratch, blocks, d),
                       folded = take_rows(scratch, blocks, d),
                       pooled = take_rows(scratch, blocks, d), out = take_rows(scratch, blocks, d);
    Vec<T>* scores = scratch.take(most * k);
    Vec<T>* coefficients = scratch.take(most * k);
    Vec<T>* present = scratch.take(most * k);
    Vec<T>* copies = scratch.take(most * copy);
    InterestRows<T> interests[Blocks<T>::kMost];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t groups = blocks.size(block), users = users_of(blocks, block);
      const int64_t first = block * most * n;
      for (int64_t g = 0; g < groups; ++g) {
        const Group group = blocks.group(block, g);
        interests[g] = InterestRows<T>(args.interests, group, copies + g * copy);
        interests[g].load();
        if (args.capsule_mask) load_flags<T>(present + g * k, args.capsule_mask, group);
      }
      for (int64_t c = 0; c < candidates; ++c) {
        load_padded<T>(query, args.query, first, c, users);
        attention.fold(folded, query, users);
        for (int64_t g = 0; g < groups; ++g) {
          const Group group = blocks.group(block, g);
          attention.attend(pooled.from(g * n), coefficients + g * k, scores + g * k,
                           folded.from(g * n), interests[g],
                           args.capsule_mask ? present + g * k : nullptr, group.users);
          store_rows<T>(coefficients + g * k, args.coefficients, group, c);
        }
        attention.values(out, pooled, coefficients, users);
        store_padded<T>(out, args.out, first, c, users);
      }
    }
  });
}

template <class T>
void backward(const AttentionArgs& args) {
  constexpr int n = kLanes<T>;
  const AttentionPlan<T> p(args.weights, args.interests.size[1], args.interests.size[2], args.scale,
                           args.power, args.hard);
  const RowAttention<T> attention(p, true);
  const int64_t k = p.interests, d = p.d, candidates = args.query.size[1];
  const int64_t batch = args.query.size[0];
  AttentionRows<T> rows(p, batch * candidates);
  const Blocks<T> blocks(batch, args.execution.parallel.threads);
  const int64_t most = blocks.per_block, work = 3 * p.work() * n * most * candidates;
  const int64_t copy = InterestRows<T>::vectors(args.interests);
  const int64_t grad_copy = args.grad_interests ? InterestRows<T>::vectors(args.grad_interests) : 0;
  args.execution.parallel(blocks.count, work, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(most * (3 * padded<T>(d) + 5 * k + copy + grad_copy));
    const GroupRows<T> folded = take_rows(scratch, blocks, d),
                       pooled_grad = take_rows(scratch, blocks, d),
                       query_grad = take_rows(scratch, blocks, d);
    Vec<T>* scores = scratch.take(most * k);
    Vec<T>* coefficients = scratch.take(most * k);
    Vec<T>* score_grad = scratch.take(most * k);
    Vec<T>* coefficients_grad = scratch.take(most * k);
    Vec<T>* present = scratch.take(most * k);
    Vec<T>* copies = scratch.take(most * copy);
    Vec<T>* grad_copies = scratch.take(most * grad_copy);
    InterestRows<T> interests[Blocks<T>::kMost], interests_grad[Blocks<T>::kMost];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t groups = blocks.size(block), users = users_of(blocks, block);
      const int64_t first = block * most * n;
      for (int64_t g = 0; g < groups; ++g) {
        const Group group = blocks.group(block, g);
        interests[g] = InterestRows<T>(args.interests, group, copies + g * copy);
        interests[g].load();
        if (args.grad_interests) {
          interests_grad[g] =
              InterestRows<T>(args.grad_interests, group, grad_copies + g * grad_copy);
          if (candidates == 0) interests_grad[g].clear();
        }
        if (args.capsule_mask) load_flags<T>(present + g * k, args.capsule_mask, group);
      }
      for (int64_t c = 0; c < candidates; ++c) {
        const auto kept = [&](const Rows<T>& of) {
          return kept_rows(of, blocks, block, candidates, c);
        };
        const GroupRows<T> query = kept(rows.query), out_grad = kept(rows.out_grad);
        const GroupRows<T> pooled = kept(rows.pooled), folded_grad = kept(rows.folded_grad);
        load_padded<T>(query, args.query, first, c, users);
        load_padded<T>(out_grad, args.grad, first, c, users);
        attention.fold(folded, query, users);
        for (int64_t g = 0; g < groups; ++g) {
          const Group group = blocks.group(block, g);
          const Vec<T>* mask = args.capsule_mask ? present + g * k : nullptr;
          attention.attend(pooled.from(g * n), coefficients + g * k, scores + g * k,
                           folded.from(g * n), interests[g], mask, group.users);
          if (mask) clear_where_all_absent<T>(out_grad.from(g * n), mask, k, group.users, d);
        }
        attention.values_backward(pooled_grad, out_grad, users);
        for (int64_t g = 0; g < groups; ++g) {
          const Group group = blocks.group(block, g);
          Vec<T>* more = args.grad_coefficients ? coefficients_grad + g * k : nullptr;
          if (more) load_rows<T>(more, args.grad_coefficients, group, c);
          attention.attend_backward(
              folded_grad.from(g * n), args.grad_interests ? interests_grad + g : nullptr, c > 0,
              score_grad + g * k, more, coefficients + g * k, scores + g * k, folded.from(g * n),
              pooled_grad.from(g * n), interests[g], group.users);
        }
        if (!args.grad_query) continue;
        attention.query_backward(query_grad, folded_grad, users);
        store_padded<T>(query_grad, args.grad_query, first, c, users);
      }
      for (int64_t g = 0; args.grad_interests && g < groups; ++g) interests_grad[g].store();
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

#define MIMNET_FAST_INSTANTIATE(T)                                                                 \
  template void weigh<T>(const AttentionPlan<T>&, Vec<T>*, const Vec<T>*, const Vec<T>*);          \
  template void weigh_backward<T>(const AttentionPlan<T>&, Vec<T>*, const Vec<T>*, const Vec<T>*); \
  template void attend<T>(const AttentionPlan<T>&, AttentionState<T>&, const Vec<T>*,              \
                          const Vec<T>*, int64_t);                                                 \
  template void attend_values<T>(const AttentionPlan<T>&, AttentionState<T>&, int64_t);            \
  template void attend_values_backward<T>(const AttentionPlan<T>&, AttentionState<T>&,             \
                                          const Vec<T>*, int64_t);                                 \
  template void attend_backward<T>(const AttentionPlan<T>&, AttentionState<T>&, Vec<T>*, Vec<T>*,  \
                                   bool, const Vec<T>*, int64_t);
MIMNET_FAST_INSTANTIATE(float)
MIMNET_FAST_INSTANTIATE(double)

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
