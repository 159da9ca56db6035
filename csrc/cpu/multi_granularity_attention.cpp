#include "multi_granularity_attention.h"

#include "ops.h"
#include "row_attention.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

template <class T>
void fuse(const FusionPlan<T>& p, FusionState<T>& s, const Vec<T>* item, const Vec<T>* prototype,
          const Vec<T>* interests, int64_t groups) {
  const int64_t d = p.fine.d;
  attend<T>(p.fine, s.fine, item, interests, groups);
  attend<T>(p.coarse, s.coarse, prototype, interests, groups);
  for (int64_t g = 0; g < groups; ++g) {
    Vec<T> logit = splat(p.bias[0]);
    for (int64_t i = 0; i < d; ++i) {
      logit += p.weight[i] * item[g * d + i] + p.weight[d + i] * prototype[g * d + i];
    }
    s.gate[g] = sigmoid<T>(logit);
  }
}

template <class T>
void fuse_values(const FusionPlan<T>& p, FusionState<T>& s, int64_t groups) {
  const int64_t d = p.fine.d;
  attend_values<T>(p.fine, s.fine, groups);
  attend_values<T>(p.coarse, s.coarse, groups);
  for (int64_t g = 0; g < groups; ++g) {
    const Vec<T> gate = s.gate[g];
    for (int64_t i = g * d; i < (g + 1) * d; ++i) {
      s.out[i] = (T(1) - gate) * s.fine.out[i] + gate * s.coarse.out[i];
    }
  }
}

namespace {

// The part of a target's gradient that comes from the gate.
template <class T>
void add_gate_gradient(const FusionState<T>& s, Vec<T>* grad, const T* weight, int64_t d,
                       int64_t groups) {
  if (grad == nullptr) return;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < d; ++i) grad[g * d + i] += weight[i] * s.gate_logit_grad[g];
  }
}

}  // namespace

template <class T>
void fuse_backward(const FusionPlan<T>& p, FusionState<T>& s, Vec<T>* item_grad,
                   Vec<T>* prototype_grad, Vec<T>* interests_grad, const Vec<T>* out_grad,
                   const Vec<T>* interests, int64_t groups) {
  const int64_t d = p.fine.d;
  attend_values_backward<T>(p.fine, s.fine, out_grad, groups);
  attend_values_backward<T>(p.coarse, s.coarse, out_grad, groups);
  for (int64_t g = 0; g < groups; ++g) {
    const Vec<T> gate = s.gate[g];
    // out_grad . (coarse out - fine out), on the side of the pooled interests
    Vec<T> grad{};
    for (int64_t i = g * d; i < (g + 1) * d; ++i) {
      grad += s.coarse.pooled_grad[i] * s.coarse.pooled[i];
      grad -= s.fine.pooled_grad[i] * s.fine.pooled[i];
      s.fine.pooled_grad[i] *= T(1) - gate;
      s.coarse.pooled_grad[i] *= gate;
      s.fine_grad[i] = (T(1) - gate) * out_grad[i];
      s.coarse_grad[i] = gate * out_grad[i];
    }
    for (int64_t i = 0; i < d; ++i) {
      grad += out_grad[g * d + i] * (p.coarse.value_bias[i] - p.fine.value_bias[i]);
    }
    s.gate_logit_grad[g] = grad * gate * (T(1) - gate);
  }
  attend_backward<T>(p.fine, s.fine, item_grad, interests_grad, false, interests, groups);
  attend_backward<T>(p.coarse, s.coarse, prototype_grad, interests_grad, true, interests, groups);
  add_gate_gradient<T>(s, item_grad, p.weight, d, groups);
  add_gate_gradient<T>(s, prototype_grad, p.weight + d, d, groups);
}

namespace {

// Lane w is the logit of user w's gate.
template <class T>
Vec<T> gate_logit(const FusionPlan<T>& p, GroupRows<T> item, GroupRows<T> prototype, int users) {
  const int64_t d = p.fine.d;
  return p.bias[0] + dot_rows<T>(item, GroupRows<const T>{p.weight, 0}, users, d) +
         dot_rows<T>(prototype, GroupRows<const T>{p.weight + d, 0}, users, d);
}

// to[w] = a[w] x[w], as padded rows.
template <class T>
void scale_rows(GroupRows<T> to, Vec<T> a, GroupRows<T> x, int users, int64_t d) {
  for (int w = 0; w < users; ++w) {
    for (int64_t e = 0; e < d; e += kLanes<T>) {
      vector_at(to[w] + e) = a[w] * vector_at(x[w] + e);
    }
  }
}

template <class T>
void forward(const MultiGranularityArgs& args) {
  constexpr int n = kLanes<T>;
  const int64_t k = args.interests.size[1], d = args.interests.size[2];
  const int64_t candidates = args.item.size[1];
  const FusionPlan<T> p(args.weights, k, d);
  const RowAttention<T> fine(p.fine, false), coarse(p.coarse, false);
  const Blocks<T> blocks(args.item.size[0], args.execution.parallel.threads);
  const int64_t most = blocks.per_block, work = p.work() * n * most * candidates;
  const int64_t copy = InterestRows<T>::vectors(args.interests);
  args.execution.parallel(blocks.count, work, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(most * (6 * padded<T>(d) + 3 * k + copy));
    const GroupRows<T> item = take_rows(scratch, blocks, d),
                       prototype = take_rows(scratch, blocks, d),
                       folded = take_rows(scratch, blocks, d),
                       pooled = take_rows(scratch, blocks, d),
                       fine_out = take_rows(scratch, blocks, d),
                       coarse_out = take_rows(scratch, blocks, d);
    Vec<T>* scores = scratch.take(most * k);
    Vec<T>* coefficients = scratch.take(most * k);
    Vec<T>* copies = scratch.take(most * copy);
    InterestRows<T> interests[Blocks<T>::kMost];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t groups = blocks.size(block), users = users_of(blocks, block);
      const int64_t first = block * most * n;
      for (int64_t g = 0; g < groups; ++g) {
        interests[g] = InterestRows<T>(args.interests, blocks.group(block, g), copies + g * copy);
        interests[g].load();
      }
      const auto attend = [&](const RowAttention<T>& attention, GroupRows<T> query,
                              GroupRows<T> out) {
        attention.fold(folded, query, users);
        for (int64_t g = 0; g < groups; ++g) {
          attention.attend(pooled.from(g * n), coefficients + g * k, scores + g * k,
                           folded.from(g * n), interests[g], nullptr, blocks.group(block, g).users);
        }
        attention.values(out, pooled, coefficients, users);
      };
      for (int64_t c = 0; c < candidates; ++c) {
        load_padded<T>(item, args.item, first, c, users);
        load_padded<T>(prototype, args.prototype, first, c, users);
        attend(fine, item, fine_out);
        attend(coarse, prototype, coarse_out);
        for (int64_t g = 0; g < groups; ++g) {
          const Group group = blocks.group(block, g);
          const Vec<T> gate =
              sigmoid<T>(gate_logit(p, item.from(g * n), prototype.from(g * n), group.users));
          store_column<T>(gate, args.gate, group, c);
          for (int w = 0; w < group.users; ++w) {
            for (int64_t e = 0; e < d; e += n) {
              Vec<T>& out = vector_at(fine_out[g * n + w] + e);
              out = (T(1) - gate[w]) * out + gate[w] * vector_at(coarse_out[g * n + w] + e);
            }
          }
        }
        store_padded<T>(fine_out, args.out, first, c, users);
      }
    }
  });
}

template <class T>
void backward(const MultiGranularityArgs& args) {
  constexpr int n = kLanes<T>;
  const int64_t k = args.interests.size[1], d = args.interests.size[2];
  const int64_t candidates = args.item.size[1], batch = args.item.size[0];
  const FusionPlan<T> p(args.weights, k, d);
  const RowAttention<T> fine(p.fine, true), coarse(p.coarse, true);
  FusionRows<T> rows(p, batch * candidates);
  const Blocks<T> blocks(batch, args.execution.parallel.threads);
  const int64_t most = blocks.per_block, work = 3 * p.work() * n * most * candidates;
  const int64_t copy = InterestRows<T>::vectors(args.interests);
  const int64_t grad_copy = args.grad_interests ? InterestRows<T>::vectors(args.grad_interests) : 0;
  args.execution.parallel(blocks.count, work, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(most * (6 * padded<T>(d) + 5 * k + 2 + copy + grad_copy));
    const GroupRows<T> out_grad = take_rows(scratch, blocks, d),
                       query_grad = take_rows(scratch, blocks, d);
    struct {
      GroupRows<T> folded, pooled_grad;
      Vec<T>*scores, *coefficients;
    } of_fine, of_coarse;
    for (auto* s : {&of_fine, &of_coarse}) {
      *s = {take_rows(scratch, blocks, d), take_rows(scratch, blocks, d), scratch.take(most * k),
            scratch.take(most * k)};
    }
    Vec<T>* score_grad = scratch.take(k);
    Vec<T>* gates = scratch.take(most);
    Vec<T>* gate_logit_grad = scratch.take(most);
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
        if (!args.grad_interests) continue;
        interests_grad[g] =
            InterestRows<T>(args.grad_interests, group, grad_copies + g * grad_copy);
        if (candidates == 0) interests_grad[g].clear();
      }
      for (int64_t c = 0; c < candidates; ++c) {
        const auto kept = [&](const Rows<T>& of) {
          return kept_rows(of, blocks, block, candidates, c);
        };
        const GroupRows<T> item = kept(rows.fine.query), prototype = kept(rows.coarse.query);
        load_padded<T>(item, args.item, first, c, users);
        load_padded<T>(prototype, args.prototype, first, c, users);
        load_padded<T>(out_grad, args.grad, first, c, users);
        const auto again = [&](const RowAttention<T>& attention, auto& s, AttentionRows<T>& to) {
          attention.fold(s.folded, kept(to.query), users);
          for (int64_t g = 0; g < groups; ++g) {
            attention.attend(kept(to.pooled).from(g * n), s.coefficients + g * k, s.scores + g * k,
                             s.folded.from(g * n), interests[g], nullptr,
                             blocks.group(block, g).users);
          }
          attention.values_backward(s.pooled_grad, out_grad, users);
        };
        again(fine, of_fine, rows.fine);
        again(coarse, of_coarse, rows.coarse);
        for (int64_t g = 0; g < groups; ++g) {
          const Group group = blocks.group(block, g);
          const auto here = [&](GroupRows<T> of) { return of.from(g * n); };
          const auto dot = [&](GroupRows<T> x, auto y) {
            return dot_rows<T>(here(x), y, group.users, d);
          };
          const Vec<T> gate = sigmoid<T>(gate_logit(p, here(item), here(prototype), group.users));
          // out_grad . (coarse out - fine out), on the side of the pooled interests
          Vec<T> grad = dot(of_coarse.pooled_grad, here(kept(rows.coarse.pooled))) -
                        dot(of_fine.pooled_grad, here(kept(rows.fine.pooled)));
          grad += dot(out_grad, GroupRows<const T>{p.coarse.value_bias, 0});
          grad -= dot(out_grad, GroupRows<const T>{p.fine.value_bias, 0});
          if (args.grad_gate) grad += load_column<T>(args.grad_gate, group, c);
          gates[g] = gate;
          gate_logit_grad[g] = grad * gate * (T(1) - gate);
          save_rows<T>(rows.gate_logit_grad.get(), rows.gate_logit_grad.width, gate_logit_grad + g,
                       1, group, candidates, c);
        }
        const auto back = [&](const RowAttention<T>& attention, auto& s, AttentionRows<T>& to,
                              bool is_coarse) {
          for (int64_t g = 0; g < groups; ++g) {
            const Group group = blocks.group(block, g);
            const Vec<T> share = is_coarse ? gates[g] : T(1) - gates[g];
            scale_rows(s.pooled_grad.from(g * n), share, s.pooled_grad.from(g * n), group.users, d);
            scale_rows(kept(to.out_grad).from(g * n), share, out_grad.from(g * n), group.users, d);
            attention.attend_backward(
                kept(to.folded_grad).from(g * n),
                args.grad_interests ? interests_grad + g : nullptr, is_coarse || c > 0, score_grad,
                nullptr, s.coefficients + g * k, s.scores + g * k, s.folded.from(g * n),
                s.pooled_grad.from(g * n), interests[g], group.users);
          }
          const View& target = is_coarse ? args.grad_prototype : args.grad_item;
          if (!target) return;
          const T* const weight = p.weight + (is_coarse ? d : 0);
          attention.query_backward(query_grad, kept(to.folded_grad), users);
          for (int64_t i = 0; i < users; ++i) {
            const T gate = gate_logit_grad[i / n][i % n];
            for (int64_t e = 0; e < d; ++e) query_grad[i][e] += weight[e] * gate;
          }
          store_padded<T>(query_grad, target, first, c, users);
        };
        back(fine, of_fine, rows.fine, false);
        back(coarse, of_coarse, rows.coarse, true);
      }
      for (int64_t g = 0; args.grad_interests && g < groups; ++g) interests_grad[g].store();
    }
  });
  WeightGradients<T> gradients;
  rows.add(p, batch * candidates, args.grad_weights, gradients);
  gradients.run_all(args.execution.parallel);
}

}  // namespace

void multi_granularity_attention(const MultiGranularityArgs& args) {
  args.item.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void multi_granularity_attention_backward(const MultiGranularityArgs& args) {
  args.item.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

#define MIMNET_FAST_INSTANTIATE(T)                                                                 \
  template void fuse<T>(const FusionPlan<T>&, FusionState<T>&, const Vec<T>*, const Vec<T>*,       \
                        const Vec<T>*, int64_t);                                                   \
  template void fuse_values<T>(const FusionPlan<T>&, FusionState<T>&, int64_t);                    \
  template void fuse_backward<T>(const FusionPlan<T>&, FusionState<T>&, Vec<T>*, Vec<T>*, Vec<T>*, \
                                 const Vec<T>*, const Vec<T>*, int64_t);
MIMNET_FAST_INSTANTIATE(float)
MIMNET_FAST_INSTANTIATE(double)

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
