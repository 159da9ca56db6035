#include "dynamic_routing.h"

#include "ops.h"
#include "weight_gradients.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

// Softmax of `count` vectors `stride` apart, in place. `keep` (0 or 1 per lane, or null) removes
// entries before the softmax; where all are removed the result is 0.
template <class T>
MIMNET_FAST_INLINE void softmax(Vec<T>* x, int64_t count, int64_t stride, const Vec<T>* keep) {
  const Vec<T> lowest = splat(T(-3e38));
  Vec<T> top = lowest;
  for (int64_t i = 0; i < count; ++i) {
    const Vec<T> value = x[i * stride];
    top = maximum(top, keep == nullptr ? value : select(keep[i] > T(0), value, lowest));
  }
  Vec<T> sum{};
  for (int64_t i = 0; i < count; ++i) {
    Vec<T> e = exp(x[i * stride] - top);
    if (keep != nullptr) e = select(keep[i] > T(0), e, Vec<T>{});
    x[i * stride] = e;
    sum += e;
  }
  const Vec<T> inverse = select(sum > T(0), T(1) / sum, Vec<T>{});
  for (int64_t i = 0; i < count; ++i) x[i * stride] *= inverse;
}

template <class T>
void couple(const RoutingPlan<T>& p, RoutingState<T>& s) {
  const int64_t k = p.capsules, length = p.length;
  const bool fill = s.mask != nullptr && p.padding == Padding::fill_before;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t l = 0; l < length; ++l) {
      const Vec<T> logit = s.logits[i * length + l] * p.inverse_temperature;
      s.coupling[i * length + l] =
          fill ? select(s.mask[l] > T(0), logit, splat(T(kPaddingLogit))) : logit;
    }
  }
  if (p.axis == SoftmaxAxis::capsules) {
    for (int64_t l = 0; l < length; ++l) softmax<T>(s.coupling + l, k, length, s.present);
  } else {
    const Vec<T>* keep = p.padding == Padding::ignore ? s.mask : nullptr;
    for (int64_t i = 0; i < k; ++i) {
      Vec<T>* row = s.coupling + i * length;
      softmax<T>(row, length, 1, keep);
      if (s.present != nullptr) {
        for (int64_t l = 0; l < length; ++l) row[l] *= s.present[i];
      }
    }
  }
  if (s.mask != nullptr && !fill) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t l = 0; l < length; ++l) s.coupling[i * length + l] *= s.mask[l];
    }
  }
}

}  // namespace

template <class T>
void apply_routing_weight(const RoutingPlan<T>& p, Vec<T>* capsules, const Vec<T>* pooled) {
  const int64_t k = p.capsules, d_in = p.d_in, d = p.d;
  if (p.kind == RoutingWeight::shared) {
    multiply<T>({capsules, d, 1}, {pooled, d_in, 1}, SharedMatrix<T>(p.weight, d, 1), k, d, d_in,
                false);
  } else if (p.kind == RoutingWeight::per_capsule) {
    for (int64_t i = 0; i < k; ++i) {
      multiply<T>({capsules + i * d, d, 1}, {pooled + i * d_in, d_in, 1},
                  SharedMatrix<T>(p.weight + i * d_in * d, d, 1), 1, d, d_in, false);
    }
  } else {
    for (int64_t i = 0; i < k * d; ++i) capsules[i] = pooled[i];
  }
}

template <class T>
void apply_routing_weight_transposed(const RoutingPlan<T>& p, Vec<T>* pooled_grad,
                                     const Vec<T>* capsule_grad) {
  const int64_t k = p.capsules, d_in = p.d_in, d = p.d;
  if (p.kind == RoutingWeight::shared) {
    multiply<T>({pooled_grad, d_in, 1}, {capsule_grad, d, 1}, SharedMatrix<T>(p.weight, 1, d), k,
                d_in, d, false);
  } else if (p.kind == RoutingWeight::per_capsule) {
    for (int64_t i = 0; i < k; ++i) {
      multiply<T>({pooled_grad + i * d_in, d_in, 1}, {capsule_grad + i * d, d, 1},
                  SharedMatrix<T>(p.weight + i * d_in * d, 1, d), 1, d_in, d, false);
    }
  } else {
    for (int64_t i = 0; i < k * d; ++i) pooled_grad[i] = capsule_grad[i];
  }
}

template <class T>
void load_routing_options(const RoutingPlan<T>& p, RoutingState<T>& s, const View& logits,
                          const View& mask, const View& capsule_mask, Group group) {
  if (logits) {
    load_matrix<T>(s.logits, logits, group);
  } else {
    for (int64_t i = 0; i < p.capsules * p.length; ++i) s.logits[i] = Vec<T>{};
  }
  if (!mask) {
    s.mask = nullptr;
  } else if (mask.dtype == DType::boolean) {
    load_flags<T>(s.mask, mask, group);
  } else {
    for (int64_t l = 0; l < p.length; ++l) {
      Vec<T> real{};
      for (int w = 0; w < group.users; ++w) {
        const char* item = at(mask, group.first + w);
        const int64_t items = mask.dtype == DType::int64 ? *reinterpret_cast<const int64_t*>(item)
                                                         : *reinterpret_cast<const int32_t*>(item);
        real[w] = T(l < items);
      }
      s.mask[l] = real;
    }
  }
  if (!capsule_mask) {
    s.present = nullptr;
  } else {
    load_flags<T>(s.present, capsule_mask, group);
  }
}

template <class T>
void route(const RoutingPlan<T>& p, RoutingState<T>& s) {
  const int64_t k = p.capsules, length = p.length, d_in = p.d_in, d = p.d;
  const bool own_votes = p.kind == RoutingWeight::none_per_capsule;
  for (int64_t step = 1;; ++step) {
    couple(p, s);
    if (own_votes) {
      for (int64_t i = 0; i < k; ++i) {
        multiply<T>({s.pooled + i * d_in, d_in, 1}, {s.coupling + i * length, length, 1},
                    ConstLaneMatrix<T>{s.inputs + i * length * d_in, d_in, 1}, 1, d_in, length,
                    false);
      }
    } else {
      multiply<T>({s.pooled, d_in, 1}, {s.coupling, length, 1},
                  ConstLaneMatrix<T>{s.inputs, d_in, 1}, k, d_in, length, false);
    }
    apply_routing_weight(p, s.capsules, s.pooled);
    if (step == p.iterations) return;
    if (p.inner_squash) {
      for (int64_t i = 0; i < k; ++i) squash_lanes<T>(s.capsules + i * d, d, p.squash);
    }
    apply_routing_weight_transposed(p, s.back, s.capsules);
    if (own_votes) {
      for (int64_t i = 0; i < k; ++i) {
        multiply<T>({s.logits + i * length, length, 1}, {s.back + i * d_in, d_in, 1},
                    ConstLaneMatrix<T>{s.inputs + i * length * d_in, 1, d_in}, 1, length, d_in,
                    true);
      }
    } else {
      multiply<T>({s.logits, length, 1}, {s.back, d_in, 1}, ConstLaneMatrix<T>{s.inputs, 1, d_in},
                  k, length, d_in, true);
    }
  }
}

template <class T>
void routing_input_gradient(const RoutingPlan<T>& p, Vec<T>* grad, const Vec<T>* coupling,
                            const Vec<T>* pooled_grad) {
  const int64_t k = p.capsules, length = p.length, d_in = p.d_in;
  if (p.kind == RoutingWeight::none_per_capsule) {
    for (int64_t i = 0; i < k * length; ++i) {
      for (int64_t d = 0; d < d_in; ++d) {
        grad[i * d_in + d] = coupling[i] * pooled_grad[i / length * d_in + d];
      }
    }
  } else {
    multiply<T>({grad, d_in, 1}, {coupling, 1, length}, ConstLaneMatrix<T>{pooled_grad, d_in, 1},
                length, d_in, k, false);
  }
}

namespace {

template <class T>
RoutingPlan<T> make_plan(const RoutingArgs& args, const T* weight) {
  const View& x = args.inputs;
  RoutingPlan<T> p{};
  p.length = x.size[x.dims - 2];
  p.capsules = args.capsules;
  p.d_in = x.size[x.dims - 1];
  p.d = args.weight ? args.weight.size[args.weight.dims - 1] : p.d_in;
  p.kind = args.weight
               ? (args.weight.dims == 2 ? RoutingWeight::shared : RoutingWeight::per_capsule)
               : (x.dims == 4 ? RoutingWeight::none_per_capsule : RoutingWeight::none);
  p.weight = weight;
  p.iterations = args.iterations;
  p.axis = args.axis;
  p.padding = args.padding;
  p.inner_squash = args.inner_squash;
  p.final_squash = args.final_squash;
  p.inverse_temperature = T(1 / args.temperature);
  p.squash = args.squash;
  return p;
}

template <class T>
void load_inputs(const RoutingPlan<T>& p, Vec<T>* lanes, const View& inputs, Group group) {
  if (p.kind != RoutingWeight::none_per_capsule) return load_matrix<T>(lanes, inputs, group);
  for (int64_t k = 0; k < p.capsules; ++k) {
    for (int64_t l = 0; l < p.length; ++l) {
      load_rows<T>(lanes + (k * p.length + l) * p.d_in, inputs, group, k, l);
    }
  }
}

template <class T>
void store_inputs(const RoutingPlan<T>& p, const Vec<T>* lanes, const View& inputs, Group group) {
  if (p.kind != RoutingWeight::none_per_capsule) return store_matrix<T>(lanes, inputs, group);
  for (int64_t k = 0; k < p.capsules; ++k) {
    for (int64_t l = 0; l < p.length; ++l) {
      store_rows<T>(lanes + (k * p.length + l) * p.d_in, inputs, group, k, l);
    }
  }
}

template <class T>
void forward(const RoutingArgs& args) {
  const Parameter<T> weight(args.weight);
  const RoutingPlan<T> p = make_plan(args, weight.get());
  const Blocks<T> blocks(args.inputs.size[0], args.execution.parallel.threads);
  args.execution.parallel(blocks.groups, p.work() * kLanes<T>, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(RoutingState<T>::vectors(p));
    RoutingState<T> s(p, scratch);
    for (int64_t g = begin; g < end; ++g) {
      const Group group = blocks.group(g / blocks.per_block, g % blocks.per_block);
      load_inputs(p, s.inputs, args.inputs, group);
      load_routing_options(p, s, args.logits, args.mask, args.capsule_mask, group);
      route(p, s);
      if (p.final_squash) {
        for (int64_t k = 0; k < p.capsules; ++k)
          squash_lanes<T>(s.capsules + k * p.d, p.d, p.squash);
      }
      store_matrix<T>(s.capsules, args.out, group);
      store_matrix<T>(s.coupling, args.coupling, group);
      store_matrix<T>(s.pooled, args.pooled, group);
    }
  });
}

template <class T>
void backward(const RoutingArgs& args) {
  const Parameter<T> weight(args.weight);
  const RoutingPlan<T> p = make_plan(args, weight.get());
  const int64_t batch = args.inputs.size[0], k = p.capsules;
  Rows<T> pooled_rows, capsule_rows;
  if (args.grad_weight) {
    pooled_rows.allocate(batch * k, p.d_in);
    capsule_rows.allocate(batch * k, p.d);
  }
  const Blocks<T> blocks(batch, args.execution.parallel.threads);
  const int64_t work = k * p.d_in * (p.length + 2 * p.d);
  args.execution.parallel(blocks.groups, work * kLanes<T>, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(k * (2 * p.d_in + 2 * p.d + p.length) + p.input_vectors());
    Vec<T>* pooled = scratch.take(k * p.d_in);
    Vec<T>* pooled_grad = scratch.take(k * p.d_in);
    Vec<T>* capsules = scratch.take(k * p.d);
    Vec<T>* grad = scratch.take(k * p.d);
    Vec<T>* coupling = scratch.take(k * p.length);
    Vec<T>* input_grad = scratch.take(p.input_vectors());
    for (int64_t g = begin; g < end; ++g) {
      const Group group = blocks.group(g / blocks.per_block, g % blocks.per_block);
      load_matrix<T>(grad, args.grad, group);
      load_matrix<T>(pooled, args.pooled, group);
      if (p.final_squash) {
        apply_routing_weight(p, capsules, pooled);
        for (int64_t i = 0; i < k; ++i) {
          squash_backward_lanes<T>(grad + i * p.d, capsules + i * p.d, p.d, p.squash);
        }
      }
      if (args.grad_weight) {
        for (int64_t i = 0; i < k; ++i) {
          save_rows<T>(pooled_rows.get(), pooled_rows.width, pooled + i * p.d_in, p.d_in, group, k,
                       i);
          save_rows<T>(capsule_rows.get(), capsule_rows.width, grad + i * p.d, p.d, group, k, i);
        }
      }
      if (args.grad_inputs) {
        load_matrix<T>(coupling, args.coupling, group);
        apply_routing_weight_transposed(p, pooled_grad, grad);
        routing_input_gradient(p, input_grad, coupling, pooled_grad);
        store_inputs(p, input_grad, args.grad_inputs, group);
      }
    }
  });
  if (!args.grad_weight) return;
  const int64_t pw = pooled_rows.width, cw = capsule_rows.width;
  const int64_t matrices = p.kind == RoutingWeight::per_capsule ? k : 1;
  for (int64_t i = 0; i < matrices; ++i) {
    // Row r of capsule i stands at r * matrices + i; a shared weight takes all rows alike.
    WeightGradients<T> gradients;
    View out = args.grad_weight;
    if (out.dims == 3) {
      out.data = at(out, i);
      out.dims = 2;
      for (int d = 0; d < 2; ++d) out.stride[d] = args.grad_weight.stride[d + 1];
    }
    gradients.add({pooled_rows.get() + i * pw, matrices * pw, capsule_rows.get() + i * cw,
                   matrices * cw, batch * k / matrices, p.d_in, p.d, out});
    gradients.run_all(args.execution.parallel);
  }
}

}  // namespace

void dynamic_routing(const RoutingArgs& args) {
  args.inputs.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void dynamic_routing_backward(const RoutingArgs& args) {
  args.inputs.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

#define MIMNET_FAST_INSTANTIATE(T)                                                                 \
  template void load_routing_options<T>(const RoutingPlan<T>&, RoutingState<T>&, const View&,      \
                                        const View&, const View&, Group);                          \
  template void route<T>(const RoutingPlan<T>&, RoutingState<T>&);                                 \
  template void apply_routing_weight<T>(const RoutingPlan<T>&, Vec<T>*, const Vec<T>*);            \
  template void apply_routing_weight_transposed<T>(const RoutingPlan<T>&, Vec<T>*, const Vec<T>*); \
  template void routing_input_gradient<T>(const RoutingPlan<T>&, Vec<T>*, const Vec<T>*,           \
                                          const Vec<T>*);
MIMNET_FAST_INSTANTIATE(float)
MIMNET_FAST_INSTANTIATE(double)

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
