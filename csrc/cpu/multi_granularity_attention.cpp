#include "multi_granularity_attention.h"

#include "ops.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

template <class T>
void fuse(const FusionPlan<T>& p, FusionState<T>& s, const Vec<T>* item, const Vec<T>* prototype,
          const Vec<T>* interests, int64_t groups) {
  const int64_t d = p.fine.d;
  attend<T>(p.fine, s.fine, item, interests, nullptr, groups);
  attend<T>(p.coarse, s.coarse, prototype, interests, nullptr, groups);
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
                   Vec<T>* prototype_grad, Vec<T>* interests_grad, bool accumulate,
                   const Vec<T>* out_grad, const Vec<T>* gate_grad, const Vec<T>* interests,
                   int64_t groups) {
  const int64_t d = p.fine.d;
  attend_values_backward<T>(p.fine, s.fine, out_grad, groups);
  attend_values_backward<T>(p.coarse, s.coarse, out_grad, groups);
  for (int64_t g = 0; g < groups; ++g) {
    const Vec<T> gate = s.gate[g];
    // out_grad . (coarse out - fine out), on the side of the pooled interests
    Vec<T> grad = gate_grad == nullptr ? Vec<T>{} : gate_grad[g];
    for (int64_t i = g * d; i < (g + 1) * d; ++i) {
      grad += s.coarse.pooled_grad[i] * s.coarse.pooled[i];
      grad -= s.fine.pooled_grad[i] * s.fine.pooled[i];
      s.fine.pooled_grad[i] *= T(1) - gate;
      s.coarse.pooled_grad[i] *= gate;
      s.fine_grad[i] = (T(1) - gate) * out_grad[i];
      s.coarse_grad[i] = gate * out_grad[i];
    }
    if (p.coarse.value_bias != nullptr) {
      for (int64_t i = 0; i < d; ++i) grad += out_grad[g * d + i] * p.coarse.value_bias[i];
    }
    if (p.fine.value_bias != nullptr) {
      for (int64_t i = 0; i < d; ++i) grad -= out_grad[g * d + i] * p.fine.value_bias[i];
    }
    s.gate_logit_grad[g] = grad * gate * (T(1) - gate);
  }
  attend_backward<T>(p.fine, s.fine, item_grad, interests_grad, accumulate, nullptr, interests,
                     groups);
  attend_backward<T>(p.coarse, s.coarse, prototype_grad, interests_grad, true, nullptr, interests,
                     groups);
  add_gate_gradient<T>(s, item_grad, p.weight, d, groups);
  add_gate_gradient<T>(s, prototype_grad, p.weight + d, d, groups);
}

namespace {

template <class T>
void forward(const MultiGranularityArgs& args) {
  const int64_t k = args.interests.size[1], d = args.interests.size[2];
  const int64_t candidates = args.item.size[1];
  const FusionPlan<T> p(args.weights, k, d);
  const Blocks<T> blocks(args.item.size[0], args.execution.parallel.threads);
  const int64_t most = blocks.per_block, work = p.work() * kLanes<T> * most * candidates;
  args.execution.parallel(blocks.count, work, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(most * (2 * d + k * d) + FusionState<T>::vectors(p, most));
    Vec<T>* item = scratch.take(most * d);
    Vec<T>* prototype = scratch.take(most * d);
    Vec<T>* interests = scratch.take(most * k * d);
    FusionState<T> s(p, most, scratch);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t groups = blocks.size(block);
      for (int64_t g = 0; g < groups; ++g) {
        load_matrix<T>(interests + g * k * d, args.interests, blocks.group(block, g));
      }
      for (int64_t c = 0; c < candidates; ++c) {
        for (int64_t g = 0; g < groups; ++g) {
          load_rows<T>(item + g * d, args.item, blocks.group(block, g), c);
          load_rows<T>(prototype + g * d, args.prototype, blocks.group(block, g), c);
        }
        fuse<T>(p, s, item, prototype, interests, groups);
        fuse_values<T>(p, s, groups);
        for (int64_t g = 0; g < groups; ++g) {
          store_rows<T>(s.out + g * d, args.out, blocks.group(block, g), c);
          store_column<T>(s.gate[g], args.gate, blocks.group(block, g), c);
        }
      }
    }
  });
}

template <class T>
void backward(const MultiGranularityArgs& args) {
  const int64_t k = args.interests.size[1], d = args.interests.size[2];
  const int64_t candidates = args.item.size[1], batch = args.item.size[0];
  const FusionPlan<T> p(args.weights, k, d);
  FusionRows<T> rows(p, batch * candidates);
  const Blocks<T> blocks(batch, args.execution.parallel.threads);
  const int64_t most = blocks.per_block, work = 3 * p.work() * kLanes<T> * most * candidates;
  args.execution.parallel(blocks.count, work, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(most * (5 * d + 2 * k * d + 1) + FusionState<T>::vectors(p, most));
    Vec<T>* item = scratch.take(most * d);
    Vec<T>* prototype = scratch.take(most * d);
    Vec<T>* item_grad = scratch.take(most * d);
    Vec<T>* prototype_grad = scratch.take(most * d);
    Vec<T>* out_grad = scratch.take(most * d);
    Vec<T>* interests = scratch.take(most * k * d);
    Vec<T>* interests_grad = scratch.take(most * k * d);
    Vec<T>* gate_grad = scratch.take(most);
    FusionState<T> s(p, most, scratch);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t groups = blocks.size(block);
      for (int64_t g = 0; g < groups; ++g) {
        load_matrix<T>(interests + g * k * d, args.interests, blocks.group(block, g));
      }
      for (int64_t i = 0; candidates == 0 && i < groups * k * d; ++i) interests_grad[i] = Vec<T>{};
      for (int64_t c = 0; c < candidates; ++c) {
        for (int64_t g = 0; g < groups; ++g) {
          const Group group = blocks.group(block, g);
          load_rows<T>(item + g * d, args.item, group, c);
          load_rows<T>(prototype + g * d, args.prototype, group, c);
          load_rows<T>(out_grad + g * d, args.grad, group, c);
          if (args.grad_gate) gate_grad[g] = load_column<T>(args.grad_gate, group, c);
        }
        fuse<T>(p, s, item, prototype, interests, groups);
        fuse_backward<T>(p, s, args.grad_item ? item_grad : nullptr,
                         args.grad_prototype ? prototype_grad : nullptr, interests_grad, c > 0,
                         out_grad, args.grad_gate ? gate_grad : nullptr, interests, groups);
        for (int64_t g = 0; g < groups; ++g) {
          const Group group = blocks.group(block, g);
          rows.save(p, s, item, prototype, g, group, candidates, c);
          if (args.grad_item) store_rows<T>(item_grad + g * d, args.grad_item, group, c);
          if (args.grad_prototype) {
            store_rows<T>(prototype_grad + g * d, args.grad_prototype, group, c);
          }
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
                                 bool, const Vec<T>*, const Vec<T>*, const Vec<T>*, int64_t);
MIMNET_FAST_INSTANTIATE(float)
MIMNET_FAST_INSTANTIATE(double)

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
