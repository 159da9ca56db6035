#include "dynamic_routing.h"

#include <cmath>
#include <optional>

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

// Logits [.., L] of as many positions, or of all that there are.
View first_positions(View logits, int64_t length) {
  if (logits.size[2] > length) logits.size[2] = length;
  return logits;
}

}  // namespace

template <class T>
RoutingGram<T>::RoutingGram(const RoutingMatrices<T>& weight, int64_t d_in, int64_t d) {
  Rows<T> columns;  // of the weight
  columns.allocate(d, d_in);
  const SharedMatrix<T> w = weight.at(0, 0);
  for (int64_t j = 0; j < d; ++j) {
    T* column = columns.get() + j * columns.width;
    for (int64_t i = 0; i < d_in; ++i) column[i] = w.data[i * w.row + j * w.column];
    for (int64_t i = d_in; i < columns.width; ++i) column[i] = T(0);
  }
  rows_.allocate(d_in, d_in);
  const int64_t vectors = rows_.width / kLanes<T>, count = d_in * vectors;
  const auto* sums = reinterpret_cast<Vec<T>*>(rows_.get());
  multiply<T>({reinterpret_cast<Vec<T>*>(rows_.get()), 1, vectors},
              {reinterpret_cast<const Vec<T>*>(columns.get()), 1, vectors}, weight.transposed(0, 0),
              vectors, d_in, d, false);
  Vec<T> norm2{};
  for (int64_t i = 0; i < count; ++i) norm2 += sums[i] * sums[i];
  T total = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) total += norm2[lane];
  lost_ = std::sqrt(total) / 64;
}

template <class T>
void softmax_logits(const RoutingPlan<T>& p, const RoutingLogits<T>& s, int64_t begin,
                    int64_t end) {
  const int64_t k = p.capsules, length = p.length;
  const bool fill = s.mask != nullptr && p.padding == Padding::fill_before;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t l = begin; l < end; ++l) {
      const Vec<T> logit = s.logits[i * length + l] * p.inverse_temperature;
      s.coupling[i * length + l] =
          fill ? select(s.mask[l] > T(0), logit, splat(T(kPaddingLogit))) : logit;
    }
  }
  if (p.axis == SoftmaxAxis::capsules) {
    for (int64_t l = begin; l < end; ++l) softmax<T>(s.coupling + l, k, length, s.present);
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
}

template <class T>
void mask_coupling(const RoutingPlan<T>& p, const RoutingLogits<T>& s) {
  if (s.mask == nullptr || p.padding == Padding::fill_before) return;
  for (int64_t i = 0; i < p.capsules; ++i) {
    for (int64_t l = 0; l < p.length; ++l) s.coupling[i * p.length + l] *= s.mask[l];
  }
}

template <class T>
void apply_routing_weight(const RoutingPlan<T>& p, Vec<T>* capsules, const Vec<T>* pooled) {
  const int64_t k = p.capsules, d_in = p.d_in, d = p.d;
  if (p.kind == RoutingWeight::shared) {
    multiply<T>({capsules, d, 1}, {pooled, d_in, 1}, p.weight->at(0, 0), k, d, d_in, false);
  } else if (p.kind == RoutingWeight::per_capsule) {
    for (int64_t i = 0; i < k; ++i) {
      multiply<T>({capsules + i * d, d, 1}, {pooled + i * d_in, d_in, 1}, p.weight->at(0, i), 1, d,
                  d_in, false);
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
    multiply<T>({pooled_grad, d_in, 1}, {capsule_grad, d, 1}, p.weight->transposed(0, 0), k, d_in,
                d, false);
  } else if (p.kind == RoutingWeight::per_capsule) {
    for (int64_t i = 0; i < k; ++i) {
      multiply<T>({pooled_grad + i * d_in, d_in, 1}, {capsule_grad + i * d, d, 1},
                  p.weight->transposed(0, i), 1, d_in, d, false);
    }
  } else {
    for (int64_t i = 0; i < k * d; ++i) pooled_grad[i] = capsule_grad[i];
  }
}

template <class T>
void load_routing_options(const RoutingPlan<T>& p, RoutingLogits<T>& s, const View& logits,
                          const View& mask, const View& capsule_mask, Group group,
                          const Histories& histories) {
  if (!logits || histories) {
    for (int64_t i = 0; i < p.capsules * p.length; ++i) s.logits[i] = Vec<T>{};
  }
  if (logits && !histories) {
    load_matrix<T>(s.logits, logits, group);
  } else if (logits && logits.dims == 2) {
    load_history_rows<T>(s.logits, logits, histories, group);
  } else if (logits) {
    const View first = first_positions(logits, p.length);
    for (int64_t i = 0; i < p.capsules; ++i) {
      load_rows<T>(s.logits + i * p.length, first, group, i);
    }
  }
  if (histories) {
    for (int64_t l = 0; l < p.length; ++l) {
      Vec<T> real{};
      for (int w = 0; w < group.users; ++w) real[w] = T(l < histories.length(group.user(w)));
      s.mask[l] = real;
    }
  } else if (!mask) {
    s.mask = nullptr;
  } else if (mask.dtype == DType::boolean) {
    load_flags<T>(s.mask, mask, group);
  } else {
    for (int64_t l = 0; l < p.length; ++l) {
      Vec<T> real{};
      for (int w = 0; w < group.users; ++w) {
        const char* item = at(mask, group.user(w));
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
void pool_inputs(const RoutingPlan<T>& p, Vec<T>* pooled, const Vec<T>* coefficients,
                 const Vec<T>* inputs) {
  const int64_t k = p.capsules, length = p.length, d_in = p.d_in;
  if (p.kind == RoutingWeight::none_per_capsule) {
    for (int64_t i = 0; i < k; ++i) {
      multiply<T>({pooled + i * d_in, d_in, 1}, {coefficients + i * length, length, 1},
                  ConstLaneMatrix<T>{inputs + i * length * d_in, d_in, 1}, 1, d_in, length, false);
    }
  } else {
    multiply<T>({pooled, d_in, 1}, {coefficients, length, 1}, ConstLaneMatrix<T>{inputs, d_in, 1},
                k, d_in, length, false);
  }
}

template <class T>
void compare_inputs(const RoutingPlan<T>& p, Vec<T>* out, const Vec<T>* back, const Vec<T>* inputs,
                    bool accumulate) {
  const int64_t k = p.capsules, length = p.length, d_in = p.d_in;
  if (p.kind == RoutingWeight::none_per_capsule) {
    for (int64_t i = 0; i < k; ++i) {
      multiply<T>({out + i * length, length, 1}, {back + i * d_in, d_in, 1},
                  ConstLaneMatrix<T>{inputs + i * length * d_in, 1, d_in}, 1, length, d_in,
                  accumulate);
    }
  } else {
    multiply<T>({out, length, 1}, {back, d_in, 1}, ConstLaneMatrix<T>{inputs, 1, d_in}, k, length,
                d_in, accumulate);
  }
}

namespace {

// back = squash(pooled W) W^T. The capsules are overwritten.
template <class T>
void see_capsules(const RoutingPlan<T>& p, RoutingState<T>& s) {
  const int64_t k = p.capsules, d_in = p.d_in, d = p.d;
  if (p.gram == nullptr) {
    apply_routing_weight(p, s.capsules, s.pooled);
    for (int64_t i = 0; p.inner_squash && i < k; ++i) {
      squash_lanes<T>(s.capsules + i * d, d, p.squash);
    }
    return apply_routing_weight_transposed(p, s.back, s.capsules);
  }
  multiply<T>({s.back, d_in, 1}, {s.pooled, d_in, 1}, p.gram->matrix(), k, d_in, d_in, false);
  for (int64_t i = 0; i < k; ++i) {
    const Vec<T>* pooled = s.pooled + i * d_in;
    Vec<T>* back = s.back + i * d_in;
    Vec<T> norm2{}, pooled2{};
    for (int64_t j = 0; j < d_in; ++j) {
      norm2 += back[j] * pooled[j];
      pooled2 += pooled[j] * pooled[j];
    }
    if (p.inner_squash) {
      const Vec<T> factor = squash_factor<LaneMath<T>>(norm2, p.squash).factor;
      for (int64_t j = 0; j < d_in; ++j) back[j] *= factor;
    }
    const auto lost = norm2 < p.gram->lost() * pooled2;
    if (lanes_where<T>(lost) == 0) continue;
    multiply<T>({s.capsules, d, 1}, {pooled, d_in, 1}, p.weight->at(0, 0), 1, d, d_in, false);
    if (p.inner_squash) squash_lanes<T>(s.capsules, d, p.squash);
    multiply<T>({s.seen, d_in, 1}, {s.capsules, d, 1}, p.weight->transposed(0, 0), 1, d_in, d,
                false);
    for (int64_t j = 0; j < d_in; ++j) back[j] = select(lost, s.seen[j], back[j]);
  }
}

}  // namespace

template <class T>
void route(const RoutingPlan<T>& p, RoutingState<T>& s) {
  for (int64_t step = 1;; ++step) {
    softmax_logits(p, s, 0, p.length);
    mask_coupling(p, s);
    pool_inputs(p, s.pooled, s.coupling, s.inputs);
    if (step == p.iterations) return apply_routing_weight(p, s.capsules, s.pooled);
    see_capsules(p, s);
    compare_inputs(p, s.logits, s.back, s.inputs, true);
  }
}

template <class T>
void routing_input_gradient(const RoutingPlan<T>& p, Vec<T>* grad, const Vec<T>* coupling,
                            const Vec<T>* pooled_grad, int64_t terms) {
  const int64_t k = p.capsules, length = p.length, d_in = p.d_in;
  if (p.kind == RoutingWeight::none_per_capsule) {
    for (int64_t term = 0; term < terms; ++term) {
      const Vec<T>* scale = coupling + term * k * length;
      const Vec<T>* vector = pooled_grad + term * k * d_in;
      for (int64_t i = 0; i < k * length; ++i) {
        for (int64_t d = 0; d < d_in; ++d) {
          const Vec<T> share = scale[i] * vector[i / length * d_in + d];
          grad[i * d_in + d] = term == 0 ? share : grad[i * d_in + d] + share;
        }
      }
    }
  } else {
    multiply<T>({grad, d_in, 1}, {coupling, 1, length}, ConstLaneMatrix<T>{pooled_grad, d_in, 1},
                length, d_in, terms * k, false);
  }
}

template <class T>
LogitGradients<T>::LogitGradients(const RoutingArgs& args, const Users<T>& users,
                                  const RoutingPlan<T>& whole)
    : args_(args),
      users_(users),
      kl_(whole.capsules * whole.length),
      shared_(args.grad_logits && args.grad_logits.dims == 3 && args.grad_logits.size[0] == 1) {
  if (!shared_) return;
  if (users.histories) {
    rows_.allocate(whole.capsules, args.inputs.size[0]);
  } else {
    lanes_ = Buffer<Vec<T>>(users.blocks.groups * kl_);
  }
}

template <class T>
void LogitGradients<T>::store(const RoutingPlan<T>& p, int64_t g, const Vec<T>* grad) const {
  const View& out = args_.grad_logits;
  const Histories& histories = users_.histories;
  const Group group = users_.group(g);
  if (!out) return;
  if (shared_ && !histories) {
    copy_vectors<T>(lanes_.get() + g * kl_, grad, kl_);
  } else if (shared_) {
    store_history_rows<T>(grad, rows_.view(p.capsules, args_.inputs.size[0]), histories, group);
  } else if (out.dims == 2) {
    store_history_rows<T>(grad, out, histories, group);
  } else if (histories) {
    const View first = first_positions(out, p.length);
    for (int64_t k = 0; k < p.capsules; ++k) store_rows<T>(grad + k * p.length, first, group, k);
  } else {
    store_matrix<T>(grad, out, group);
  }
}

template <class T>
void LogitGradients<T>::sum() const {
  if (shared_) users_.histories ? sum_histories() : sum_groups();
}

template <class T>
void LogitGradients<T>::sum_groups() const {
  const View& out = args_.grad_logits;
  const Blocks<T>& blocks = users_.blocks;
  const Vec<T>* grads = lanes_.get();
  const int64_t length = out.size[2], count = out.size[1] * length, full = blocks.batch / kLanes<T>;
  with_storage(out.dtype, [&](auto storage) {
    using S = decltype(storage);
    args_.execution.parallel(count, blocks.groups, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Vec<T> sum{};
        for (int64_t g = 0; g < full; ++g) sum += grads[g * count + i];
        T total = 0;
        for (int w = 0; w < kLanes<T>; ++w) total += sum[w];
        for (int64_t w = 0; w < blocks.batch % kLanes<T>; ++w) total += grads[full * count + i][w];
        S* to = reinterpret_cast<S*>(at(out, 0, i / length, i % length));
        *to = narrow<S>(total);
      }
    });
  });
}

// In the order that dense inputs have.
template <class T>
void LogitGradients<T>::sum_histories() const {
  const View& out = args_.grad_logits;
  const Histories& histories = users_.histories;
  const int64_t positions = histories.positions(), batch = histories.batch();
  const int64_t length = positions < out.size[2] ? positions : out.size[2];
  const int64_t full = batch - batch % kLanes<T>;
  with_storage(out.dtype, [&](auto storage) {
    using S = decltype(storage);
    args_.execution.parallel(out.size[1], rows_.width, [&](int64_t begin, int64_t end) {
      Scratch<T> scratch(length);
      Vec<T>* sums = scratch.take(length);
      for (int64_t k = begin; k < end; ++k) {
        const T* row = rows_.get() + k * rows_.width;
        for (int64_t l = 0; l < length; ++l) sums[l] = Vec<T>{};
        const auto each_user = [&](int64_t first, int64_t last, auto add) {
          for (int64_t b = first; b < last; ++b) {
            const int64_t count = histories.length(b) < length ? histories.length(b) : length;
            for (int64_t l = 0; l < count; ++l) add(b, l, row[histories.first(b) + l]);
          }
        };
        each_user(0, full, [&](int64_t b, int64_t l, T grad) { sums[l][b % kLanes<T>] += grad; });
        for (int64_t l = 0; l < length; ++l) {
          for (int w = 1; w < kLanes<T>; ++w) sums[l][0] += sums[l][w];
        }
        each_user(full, batch, [&](int64_t, int64_t l, T grad) { sums[l][0] += grad; });
        for (int64_t l = 0; l < length; ++l) {
          *reinterpret_cast<S*>(at(out, 0, k, l)) = narrow<S>(T(sums[l][0]));
        }
      }
    });
  });
}

namespace {

// The plan of all users: as long as their longest history.
template <class T>
RoutingPlan<T> make_plan(const RoutingArgs& args, const RoutingMatrices<T>& weight,
                         const Histories& histories) {
  const View& x = args.inputs;
  RoutingPlan<T> p{};
  p.length = histories ? histories.positions() : x.size[x.dims - 2];
  p.capsules = args.capsules;
  p.d_in = x.size[x.dims - 1];
  p.d = args.weight ? args.weight.size[args.weight.dims - 1] : p.d_in;
  constexpr RoutingWeight kinds[] = {RoutingWeight::shared, RoutingWeight::per_capsule,
                                     RoutingWeight::per_position};
  p.kind = args.weight ? kinds[args.weight.dims - 2]
                       : (x.dims == 4 ? RoutingWeight::none_per_capsule : RoutingWeight::none);
  p.weight = args.weight ? &weight : nullptr;
  p.iterations = args.iterations;
  p.axis = args.axis;
  p.padding = args.padding;
  p.update = args.update;
  p.normalize_agreement = args.normalize_agreement;
  p.inner_squash = args.inner_squash;
  p.final_squash = args.final_squash;
  p.inverse_temperature = T(1 / args.temperature);
  p.squash = args.squash;
  return p;
}

template <class T>
void load_inputs(const RoutingPlan<T>& p, Vec<T>* lanes, const View& inputs, Group group,
                 const Histories& histories) {
  if (histories) return load_histories<T>(lanes, inputs, histories, group);
  if (p.kind != RoutingWeight::none_per_capsule) return load_matrix<T>(lanes, inputs, group);
  for (int64_t k = 0; k < p.capsules; ++k) {
    for (int64_t l = 0; l < p.length; ++l) {
      load_rows<T>(lanes + (k * p.length + l) * p.d_in, inputs, group, k, l);
    }
  }
}

template <class T>
void store_inputs(const RoutingPlan<T>& p, const Vec<T>* lanes, const View& inputs, Group group,
                  const Histories& histories) {
  if (histories) return store_histories<T>(lanes, inputs, histories, group);
  if (p.kind != RoutingWeight::none_per_capsule) return store_matrix<T>(lanes, inputs, group);
  for (int64_t k = 0; k < p.capsules; ++k) {
    for (int64_t l = 0; l < p.length; ++l) {
      store_rows<T>(lanes + (k * p.length + l) * p.d_in, inputs, group, k, l);
    }
  }
}

// Votes of a weight per position that one thread keeps for its group instead of forming them again
// in every iteration.
constexpr int64_t kVotesBytes = int64_t(2) << 20;

// Whether the votes of a group are formed, once, and then routed without a weight. To normalise
// those of a shared weight takes all of them, L x D, so that they are the better inputs.
template <class T>
bool routes_votes(const RoutingPlan<T>& p) {
  if (p.kind == RoutingWeight::per_position) {
    return p.capsules * p.length * p.d * int64_t(sizeof(Vec<T>)) <= kVotesBytes;
  }
  return p.kind == RoutingWeight::shared && p.normalize_agreement;
}

template <class T>
RoutingPlan<T> plan_of_votes(RoutingPlan<T> p) {
  p.kind =
      p.kind == RoutingWeight::per_position ? RoutingWeight::none_per_capsule : RoutingWeight::none;
  p.weight = nullptr;
  p.d_in = p.d;
  return p;
}

// Multiply-adds per user.
template <class T>
int64_t votes_work(const RoutingPlan<T>& p) {
  return (p.kind == RoutingWeight::shared ? 1 : p.capsules) * p.length * p.d_in * p.d;
}

template <class T>
void form_votes(const RoutingPlan<T>& p, Vec<T>* votes, const Vec<T>* inputs) {
  const int64_t k = p.capsules, d_in = p.d_in, d = p.d;
  if (p.kind == RoutingWeight::shared) {
    return multiply<T>({votes, d, 1}, {inputs, d_in, 1}, p.weight->at(0, 0), p.length, d, d_in,
                       false);
  }
  for (int64_t l = 0; l < p.length; ++l) {
    for (int64_t i = 0; i < k; ++i) {
      multiply<T>({votes + (i * p.length + l) * d, d, 1}, {inputs + l * d_in, d_in, 1},
                  p.weight->at(l, i), 1, d, d_in, false);
    }
  }
}

// Those of jagged inputs, or of a batch whose padding takes part in no softmax.
Histories histories_of(RoutingArgs& args, int64_t lanes) {
  if (args.inputs.dims == 2) return jagged_histories(args, lanes);
  const bool counts = args.padding == Padding::fill_before ||
                      (args.axis == SoftmaxAxis::inputs && args.padding != Padding::ignore);
  if (args.inputs.dims != 3 || counts) return {};
  return without_padding(args.inputs, args.mask, lanes);
}

template <class T>
void forward(const RoutingArgs& call) {
  RoutingArgs args = call;
  const RoutingMatrices<T> weight(args.weight);
  const Users<T> users(args, histories_of(args, kLanes<T>));
  const Histories& histories = users.histories;
  RoutingPlan<T> whole = make_plan(args, weight, histories);
  const bool usual = whole.update == Update::accumulate && !whole.normalize_agreement;
  std::optional<RoutingGram<T>> gram;
  if (usual && whole.gram_pays()) {
    gram.emplace(weight, whole.d_in, whole.d);
    whole.gram = &*gram;
  }
  const bool of_votes = routes_votes(whole);
  if (whole.kind == RoutingWeight::per_position && !of_votes)
    return route_positions(args, whole, users);
  const bool pools_inputs = of_votes && whole.kind == RoutingWeight::shared;
  const RoutingPlan<T> whole_routed = of_votes ? plan_of_votes(whole) : whole;
  const int64_t work = whole_routed.work() + (of_votes ? votes_work(whole) : 0);
  args.execution.parallel(users.blocks.groups, work * kLanes<T>, [&](int64_t begin, int64_t end) {
    const Scratch<T> memory(RoutingState<T>::vectors(whole_routed) +
                            (of_votes ? whole.input_vectors() : 0) +
                            (pools_inputs ? whole.capsules * whole.d_in : 0));
    for (int64_t g = begin; g < end; ++g) {
      const Group group = users.group(g);
      const RoutingPlan<T> p = plan_of_group(whole, histories, group);
      const RoutingPlan<T> routed = plan_of_group(whole_routed, histories, group);
      Scratch<T> scratch = memory;
      RoutingState<T> s(routed, scratch);
      Vec<T>* inputs = of_votes ? scratch.take(p.input_vectors()) : s.inputs;
      Vec<T>* pooled = pools_inputs ? scratch.take(p.capsules * p.d_in) : s.pooled;
      load_inputs(p, inputs, args.inputs, group, histories);
      load_routing_options(p, s, args.logits, args.mask, args.capsule_mask, group, histories);
      if (of_votes) form_votes(p, s.inputs, inputs);
      if (usual) {
        route(routed, s);
      } else {
        route_any(routed, s);
      }
      if (pools_inputs) pool_inputs(p, pooled, s.coupling, inputs);
      if (p.final_squash) {
        for (int64_t k = 0; k < p.capsules; ++k)
          squash_lanes<T>(s.capsules + k * p.d, p.d, p.squash);
      }
      store_matrix<T>(s.capsules, args.out, group);
      users.store_by_position(s.coupling, args.coupling, group);
      store_matrix<T>(pooled, args.pooled, group);
    }
  });
}

// The weight gradient from the rows that users have left.
template <class T>
void add_up_weight_gradient(const RoutingArgs& args, const RoutingPlan<T>& p, const Rows<T>& inputs,
                            const Rows<T>& grads, int64_t rows) {
  if (!args.grad_weight) return;
  const int64_t matrices = p.kind == RoutingWeight::per_capsule ? p.capsules : 1;
  for (int64_t i = 0; i < matrices; ++i) {
    // Row r of capsule i stands at r * matrices + i; a shared weight takes all rows alike.
    WeightGradients<T> gradients;
    gradients.add({inputs.get() + i * inputs.width, matrices * inputs.width,
                   grads.get() + i * grads.width, matrices * grads.width, rows / matrices, p.d_in,
                   p.d, matrix_of(args.grad_weight, i)});
    gradients.run_all(args.execution.parallel);
  }
}

template <class T>
void full_backward(const RoutingArgs& args, const Users<T>& users, const RoutingPlan<T>& whole) {
  const Histories& histories = users.histories;
  const bool of_votes = routes_votes(whole);
  const RoutingPlan<T> whole_routed = of_votes ? plan_of_votes(whole) : whole;
  const int64_t terms = RoutingTrace<T>::terms(whole);
  const int64_t per_user = of_votes ? whole.length : terms * whole.capsules;
  const int64_t rows = of_votes ? users.rows(args, per_user) : users.batch * per_user;
  Rows<T> input_rows, grad_rows;
  if (args.grad_weight) {
    input_rows.allocate(rows, whole.d_in);
    grad_rows.allocate(rows, whole.d);
  }
  const auto save = [&](const Vec<T>* inputs, const Vec<T>* grads, Group group) {
    if (!args.grad_weight) return;
    const int64_t d_in = whole.d_in, d = whole.d;
    if (of_votes && histories) {
      return each_position<T>(histories, group, [&](int64_t l, Group at_l) {
        save_rows<T>(input_rows.get(), input_rows.width, inputs + l * d_in, d_in, at_l);
        save_rows<T>(grad_rows.get(), grad_rows.width, grads + l * d, d, at_l);
      });
    }
    for (int64_t i = 0; i < per_user; ++i) {
      save_rows<T>(input_rows.get(), input_rows.width, inputs + i * d_in, d_in, group, per_user, i);
      save_rows<T>(grad_rows.get(), grad_rows.width, grads + i * d, d, group, per_user, i);
    }
  };
  const Blocks<T>& blocks = users.blocks;
  const LogitGradients<T> logit_grads(args, users, whole);
  const int64_t work = 3 * whole.work() * kLanes<T>;
  args.execution.parallel(blocks.groups, work, [&](int64_t begin, int64_t end) {
    const Scratch<T> memory(
        RoutingState<T>::vectors(whole_routed) + RoutingTrace<T>::vectors_of(whole_routed) +
        whole_routed.input_vectors() + (of_votes ? 2 * whole.input_vectors() : 0));
    for (int64_t g = begin; g < end; ++g) {
      const Group group = users.group(g);
      const RoutingPlan<T> p = plan_of_group(whole, histories, group);
      const RoutingPlan<T> routed = plan_of_group(whole_routed, histories, group);
      Scratch<T> scratch = memory;
      RoutingState<T> s(routed, scratch);
      const RoutingTrace<T> trace(routed, scratch);
      Vec<T>* routed_grad = scratch.take(routed.input_vectors());
      Vec<T>* inputs = of_votes ? scratch.take(p.input_vectors()) : s.inputs;
      Vec<T>* input_grad = of_votes ? scratch.take(p.input_vectors()) : routed_grad;
      Vec<T>* grad = trace.vectors + (terms - 1) * p.capsules * p.d;
      load_inputs(p, inputs, args.inputs, group, histories);
      load_routing_options(p, s, args.logits, args.mask, args.capsule_mask, group, histories);
      if (of_votes) form_votes(p, s.inputs, inputs);
      route_any(routed, s, &trace);
      load_matrix<T>(grad, args.grad, group);
      for (int64_t i = 0; p.final_squash && i < p.capsules; ++i) {
        squash_backward_lanes<T>(grad + i * p.d, s.capsules + i * p.d, p.d, p.squash);
      }
      route_backward(routed, s, trace, bool(args.grad_logits));
      logit_grads.store(p, g, trace.logit_grad);
      if (!of_votes) save(trace.pooled, trace.vectors, group);
      if (!of_votes && !args.grad_inputs) continue;
      traced_input_gradient(routed, routed_grad, s, trace);
      if (of_votes) {
        save(inputs, routed_grad, group);
        multiply<T>({input_grad, p.d_in, 1}, {routed_grad, p.d, 1}, p.weight->transposed(0, 0),
                    p.length, p.d_in, p.d, false);
      }
      if (args.grad_inputs) store_inputs(p, input_grad, args.grad_inputs, group, histories);
    }
  });
  logit_grads.sum();
  add_up_weight_gradient(args, whole, input_rows, grad_rows, rows);
}

template <class T>
void last_backward(const RoutingArgs& args, const Users<T>& users, const RoutingPlan<T>& whole) {
  const Histories& histories = users.histories;
  const int64_t batch = users.batch, k = whole.capsules;
  Rows<T> pooled_rows, capsule_rows;
  if (args.grad_weight) {
    pooled_rows.allocate(batch * k, whole.d_in);
    capsule_rows.allocate(batch * k, whole.d);
  }
  const int64_t work = k * whole.d_in * (whole.length + 2 * whole.d);
  args.execution.parallel(users.blocks.groups, work * kLanes<T>, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(k * (2 * whole.d_in + 2 * whole.d + whole.length) + whole.input_vectors());
    Vec<T>* pooled = scratch.take(k * whole.d_in);
    Vec<T>* pooled_grad = scratch.take(k * whole.d_in);
    Vec<T>* capsules = scratch.take(k * whole.d);
    Vec<T>* grad = scratch.take(k * whole.d);
    Vec<T>* coupling = scratch.take(k * whole.length);
    Vec<T>* input_grad = scratch.take(whole.input_vectors());
    for (int64_t g = begin; g < end; ++g) {
      const Group group = users.group(g);
      const RoutingPlan<T> p = plan_of_group(whole, histories, group);
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
        users.load_by_position(coupling, args.coupling, group);
        apply_routing_weight_transposed(p, pooled_grad, grad);
        routing_input_gradient(p, input_grad, coupling, pooled_grad);
        store_inputs(p, input_grad, args.grad_inputs, group, histories);
      }
    }
  });
  add_up_weight_gradient(args, whole, pooled_rows, capsule_rows, batch * k);
}

template <class T>
void backward(const RoutingArgs& args) {
  const RoutingMatrices<T> weight(args.weight);
  const Users<T> users(args);
  const RoutingPlan<T> p = make_plan(args, weight, users.histories);
  // Votes of a weight per capsule that are normalised have a gradient along each of them.
  const bool every_vote =
      p.kind == RoutingWeight::per_capsule && p.normalize_agreement && args.full_gradient;
  if (p.kind == RoutingWeight::per_position || every_vote)
    return route_positions_backward(args, p, users);
  args.full_gradient ? full_backward(args, users, p) : last_backward(args, users, p);
}

}  // namespace

void dynamic_routing(const RoutingArgs& args) {
  args.inputs.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void dynamic_routing_backward(const RoutingArgs& args) {
  args.inputs.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

#define MIMNET_FAST_INSTANTIATE(T)                                                                 \
  template void load_routing_options<T>(const RoutingPlan<T>&, RoutingLogits<T>&, const View&,     \
                                        const View&, const View&, Group, const Histories&);        \
  template void softmax_logits<T>(const RoutingPlan<T>&, const RoutingLogits<T>&, int64_t,         \
                                  int64_t);                                                        \
  template void mask_coupling<T>(const RoutingPlan<T>&, const RoutingLogits<T>&);                  \
  template void pool_inputs<T>(const RoutingPlan<T>&, Vec<T>*, const Vec<T>*, const Vec<T>*);      \
  template void compare_inputs<T>(const RoutingPlan<T>&, Vec<T>*, const Vec<T>*, const Vec<T>*,    \
                                  bool);                                                           \
  template void route<T>(const RoutingPlan<T>&, RoutingState<T>&);                                 \
  template void apply_routing_weight<T>(const RoutingPlan<T>&, Vec<T>*, const Vec<T>*);            \
  template void apply_routing_weight_transposed<T>(const RoutingPlan<T>&, Vec<T>*, const Vec<T>*); \
  template void routing_input_gradient<T>(const RoutingPlan<T>&, Vec<T>*, const Vec<T>*,           \
                                          const Vec<T>*, int64_t);                                 \
  template class RoutingGram<T>;                                                                   \
  template class LogitGradients<T>;
MIMNET_FAST_INSTANTIATE(float)
MIMNET_FAST_INSTANTIATE(double)

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
